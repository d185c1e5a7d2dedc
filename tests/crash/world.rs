//! What changes around the daemon: the clock steps, a device is gone when it starts, another host does the same on another day.

use std::{
    fs,
    path::{Path, PathBuf},
};

use cloudletd::proto::{self, VolumeFormat, collect_garbage_request::Goal};

use crate::{
    faults::faulty,
    judge,
    rig::Rig,
    rounds::{self, Kind},
};

const YEAR: i64 = 365 * 24 * 3600;

fn collect(rig: &Rig, min_age_seconds: u64) -> Vec<proto::StoreObject> {
    let request = proto::CollectGarbageRequest { dry_run: false, goal: Some(Goal::UsedBytesMax(0)), min_age_seconds: Some(min_age_seconds) };
    rig.runtime.block_on(rig.clients().stores.collect_garbage(request)).expect("collected").into_inner().objects
}

#[test]
fn a_clock_that_steps_by_years_changes_no_answer_and_removes_nothing_that_is_used() {
    let library = faulty();
    let mut rig = Rig::with(|_| (), &[]);
    let clock = rig.path("clock");
    rig.environment =
        vec![("LD_PRELOAD".into(), library.path().to_str().expect("text").into()), ("FAULTY_CLOCK".into(), clock.to_str().expect("text").into())];
    rig.start(None);
    rig.catalogue_image();
    let first = rounds::render(&rig, Kind::Render(VolumeFormat::Qcow2Overlay), "first", "one");
    let answer = rounds::demand(&rig, &first).expect("a render");
    let began = answer.created_at.expect("a time").seconds;
    for (number, years) in [-20, 20, 0].into_iter().enumerate() {
        fs::write(&clock, (years * YEAR).to_string()).expect("a step");
        for restarted in [false, true] {
            let context = format!("{years} years, restarted: {restarted}");
            if restarted {
                rig.kill();
                rig.start(None);
            }
            assert_eq!(rounds::demand(&rig, &first).as_ref(), Some(&answer), "{context}: the answer to a retry");
            let block = rounds::render(&rig, Kind::Render(VolumeFormat::Block), &format!("block-{number}-{restarted}"), "two");
            let made = rounds::demand(&rig, &block).expect("a render").created_at.expect("a time").seconds;
            assert!((made - began - years * YEAR).abs() < 3600, "{context}: the clock did not step: {made}, {began}");
            rounds::demand(&rig, &rounds::delete(VolumeFormat::Block));
            // The overlay lies over the golden.
            collect(&rig, 0);
            let seen = judge::look(&rig, false);
            rounds::expect_content(&rig, Kind::Render(VolumeFormat::Qcow2Overlay), "one", &seen, &context);
        }
    }
    // Used twenty years from now, as it seems: that is not long ago.
    rounds::demand(&rig, &rounds::delete(VolumeFormat::Qcow2Overlay));
    fs::write(&clock, (20 * YEAR).to_string()).expect("a step");
    rounds::demand(&rig, &rounds::render(&rig, Kind::Render(VolumeFormat::Qcow2Overlay), "last", "one"));
    rounds::demand(&rig, &rounds::delete(VolumeFormat::Qcow2Overlay));
    fs::write(&clock, "0").expect("a step");
    let kept = collect(&rig, 3600);
    assert!(kept.iter().any(|object| object.kind == "golden") && kept.iter().all(|object| !object.removed), "{kept:?}");
    assert!(collect(&rig, 0).iter().all(|object| object.removed));
    judge::look(&rig, false);
    rig.kill();
}

/// Prerenders a Debian on a host of its own, whose clock is off by `years`; digests of the golden disks.
fn goldens_of_debian(library: &Path, years: i64) -> Vec<String> {
    let fixtures =
        std::env::var_os("CLOUDLETD_FIXTURES").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fixtures"), PathBuf::from);
    let tarball = fixtures.join("bookworm-ifupdown.tar.zst");
    let mut rig = Rig::with(
        |root| {
            fs::copy(&tarball, root.join("debian.tar.zst")).unwrap_or_else(|error| panic!("{}: {error} (scripts/fixtures.sh)", tarball.display()));
            fs::write(root.join("clock"), (years * YEAR).to_string()).expect("write");
        },
        &[],
    );
    let clock = rig.path("clock");
    rig.environment =
        vec![("LD_PRELOAD".into(), library.to_str().expect("text").into()), ("FAULTY_CLOCK".into(), clock.to_str().expect("text").into())];
    rig.start(None);
    let mut clients = rig.clients();
    let url = format!("file://{}", rig.path("debian.tar.zst").display());
    let manifest = serde_json::json!({"name": "debian", "entry_points": {"kernel": {"os": "linux"}}, "rootfs": {"url": url}});
    let mut digests = Vec::new();
    rig.runtime.block_on(async {
        let request = proto::CreateImageRequest { manifest_json: manifest.to_string(), ..Default::default() };
        let image = clients.images.create_image(request).await.expect("created").into_inner().image.expect("an image").id;
        for layout in [proto::DiskLayout::Bare, proto::DiskLayout::Gpt, proto::DiskLayout::Hybrid] {
            let golden = proto::GoldenOptions { layout: layout as i32, size_bytes: 2 << 30, ..Default::default() };
            let request = proto::PrerenderRequest { image_id: image.clone(), golden: Some(golden), ..Default::default() };
            let render = clients.renders.prerender(request).await.expect("accepted").into_inner().render.expect("a render").id;
            let mut stream = clients.renders.watch_render(proto::WatchRenderRequest { render_id: render }).await.expect("watched").into_inner();
            let mut last = None;
            while let Some(message) = stream.message().await.expect("no error in the stream") {
                last = message.render;
            }
            let last = last.expect("an end");
            assert_eq!(last.state(), proto::RenderState::Succeeded, "{:?}", last.error);
            let goldens = clients.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list").into_inner().goldens;
            digests.push(goldens.iter().find(|golden| golden.key == last.golden_key).expect("it is there").digest.clone());
        }
    });
    rig.kill();
    digests
}

#[test]
fn golden_disks_are_the_same_on_two_hosts_and_dates_in_every_layout() {
    let library = faulty();
    let (here, there) = (goldens_of_debian(library.path(), 0), goldens_of_debian(library.path(), 7));
    assert_eq!(here, there);
    assert!(here[0] != here[1] && here[1] != here[2], "{here:?}");
}

#[test]
fn a_device_that_is_gone_at_the_next_start_is_settled_when_it_is_back() {
    for step in ["head-marked", "head-half", "head-written"] {
        let mut rig = Rig::new();
        rig.start(None);
        rig.catalogue_image();
        rig.kill();
        let operation = rounds::render(&rig, Kind::Render(VolumeFormat::Block), "only", "two");
        rig.start(Some((step, 1)));
        rig.runtime.block_on(rounds::ask(rig.clients(), &operation)).expect_err("the daemon dies");
        rig.reap_or_fail(step);

        let link = rig.path("by-id/vm-disk");
        fs::remove_file(&link).expect("gone");
        rig.start(None);
        let answer = rig.runtime.block_on(rounds::ask(rig.clients(), &operation)).expect_err("there is no device");
        assert!(answer.code() == tonic::Code::Unavailable && answer.message().contains("vm-disk"), "{step}: {answer:?}");
        // Nothing is forgotten, and everything else works.
        let beside = rounds::render(&rig, Kind::Render(VolumeFormat::Raw), "beside", "one");
        rounds::demand(&rig, &beside);
        rounds::demand(&rig, &rounds::delete(VolumeFormat::Raw));
        assert!(rig.log().contains("vm-disk"), "{step}: the log names what is missing\n{}", rig.log());
        rig.kill();

        std::os::unix::fs::symlink(rig.device(), &link).expect("back");
        rig.start(None);
        judge::look(&rig, false);
        rounds::demand(&rig, &operation);
        let seen = judge::look(&rig, false);
        rounds::expect_content(&rig, Kind::Render(VolumeFormat::Block), "two", &seen, step);
        rounds::demand(&rig, &rounds::delete(VolumeFormat::Block));
        judge::look(&rig, false);
        rig.kill();
    }
}
