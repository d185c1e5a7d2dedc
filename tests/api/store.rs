//! Garbage collection, leases, and what a daemon that was killed in between leaves to the next.

use cloudletd::proto::{self, VolumeFormat, collect_garbage_request::Goal, create_lease_request::Object};

use crate::common::server::{Daemon, judge, spec, volume};

/// Everything that may go, however young it is.
fn everything(dry_run: bool) -> proto::CollectGarbageRequest {
    proto::CollectGarbageRequest { dry_run, goal: Some(Goal::UsedBytesMax(0)), min_age_seconds: Some(0) }
}

async fn collect(daemon: &mut Daemon, request: proto::CollectGarbageRequest) -> proto::CollectGarbageResponse {
    daemon.stores.collect_garbage(request).await.expect("collected").into_inner()
}

/// What became of the only golden: the word why it stayed, or that it went.
fn golden_of(response: &proto::CollectGarbageResponse) -> (&str, &proto::StoreObject) {
    let golden = response.objects.iter().find(|object| object.kind == "golden").expect("a golden is listed");
    (if golden.removed { "removed" } else { golden.kept_because.as_str() }, golden)
}

async fn delete(daemon: &mut Daemon, name: &str) {
    let request = proto::DeleteVolumeRequest { volume: Some(volume(name)), delete_data: false };
    daemon.volumes.delete_volume(request).await.expect("deleted");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_volumes_files_and_leases_refer_to_stays_and_the_rest_goes_and_comes_back() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    let first = daemon.render("key", spec(&image, "web1", VolumeFormat::Qcow2Overlay)).await;
    let answer = collect(&mut daemon, everything(false)).await;
    let (word, golden) = golden_of(&answer);
    assert_eq!((word, golden.name.as_str()), ("BACKS_VOLUMES", first.golden_key.as_str()));
    let disk = daemon.dir.join("state/goldens").join(&golden.name).join("disk.raw");
    let blob = answer.objects.iter().find(|object| object.kind == "blob").expect("the tarball is listed");
    assert_eq!((blob.removed, blob.kept_because.as_str()), (false, "ONLY_COPY"), "nobody could upload it again");
    assert!(answer.freed_bytes == 0 && answer.used_bytes >= blob.size_bytes + golden.size_bytes);
    delete(&mut daemon, "web1").await;

    // A file that an operator made.
    let (overlay, backing) = (daemon.dir.join("pool/mine.qcow2"), disk.to_str().expect("text").to_owned());
    judge("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &backing, overlay.to_str().expect("text")]);
    assert_eq!(golden_of(&collect(&mut daemon, everything(false)).await).0, "BACKS_FILE");
    std::fs::remove_file(&overlay).expect("removed");

    let lease =
        proto::CreateLeaseRequest { object: Some(Object::ImageId(image.clone())), owner: "ops".into(), reason: "wave 7".into(), ttl_seconds: 0 };
    let lease = daemon.stores.create_lease(lease).await.expect("leased").into_inner().lease.expect("described");
    let answer = collect(&mut daemon, everything(false)).await;
    assert_eq!((golden_of(&answer).0, golden_of(&answer).1.explanation.as_str()), ("LEASED", "ops holds a lease: wave 7"));
    let refused = daemon.images.delete_image(proto::DeleteImageRequest { image_id: image.clone() }).await.expect_err("leased");
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    let listed = daemon.stores.list_leases(proto::ListLeasesRequest {}).await.expect("listed").into_inner().leases;
    assert_eq!(listed, std::slice::from_ref(&lease));
    let release = proto::ReleaseLeaseRequest { lease_id: lease.id };
    assert!(daemon.stores.release_lease(release.clone()).await.expect("released").into_inner().released);
    assert!(!daemon.stores.release_lease(release).await.expect("asked").into_inner().released);

    let young = proto::CollectGarbageRequest { min_age_seconds: None, ..everything(false) };
    assert_eq!(golden_of(&collect(&mut daemon, young).await).0, "RECENTLY_USED");
    assert_eq!(golden_of(&collect(&mut daemon, proto::CollectGarbageRequest { goal: None, ..everything(false) }).await).0, "ENOUGH_FREE");
    let would = collect(&mut daemon, everything(true)).await;
    assert!(golden_of(&would).0 == "removed" && would.freed_bytes > 0 && disk.exists(), "a dry run removes nothing");
    let done = collect(&mut daemon, everything(false)).await;
    assert!(golden_of(&done).0 == "removed" && done.freed_bytes == would.freed_bytes && !disk.exists());
    assert!(daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list").into_inner().goldens.is_empty());
    assert_eq!(std::fs::read_dir(daemon.dir.join("state/tmp")).expect("tmp").count(), 0);

    let again = daemon.render("again", spec(&image, "web2", VolumeFormat::Qcow2Overlay)).await;
    assert_eq!(again.golden_key, first.golden_key);
    judge("qemu-img", &["check", daemon.dir.join("pool/web2.qcow2").to_str().expect("text")]);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_of_nothing_and_of_nobody_are_refused() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    let request = |object: Option<Object>, owner: &str| proto::CreateLeaseRequest { object, owner: owner.into(), ..Default::default() };
    for (wanted, code) in [
        (request(None, "ops"), tonic::Code::InvalidArgument),
        (request(Some(Object::ImageId("img-0".into())), "ops"), tonic::Code::NotFound),
        (request(Some(Object::GoldenKey("../etc".into())), "ops"), tonic::Code::InvalidArgument),
        (request(Some(Object::GoldenKey("0".repeat(64))), "ops"), tonic::Code::NotFound),
        (request(Some(Object::BlobDigest(format!("sha256:{}", "0".repeat(64)))), "ops"), tonic::Code::NotFound),
        (request(Some(Object::ImageId(image.clone())), ""), tonic::Code::InvalidArgument),
        (request(Some(Object::ImageId(image.clone())), "a\nb"), tonic::Code::InvalidArgument),
        (proto::CreateLeaseRequest { ttl_seconds: u64::MAX, ..request(Some(Object::ImageId(image.clone())), "ops") }, tonic::Code::InvalidArgument),
    ] {
        assert_eq!(daemon.stores.create_lease(wanted.clone()).await.expect_err("refused").code(), code, "{wanted:?}");
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_was_interrupted_is_finished_at_the_next_start() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut daemon = Daemon::start_in(dir.path(), |_| ()).await;
    let image = daemon.image().await;
    let key = daemon.render("key", spec(&image, "web1", VolumeFormat::Raw)).await.golden_key;
    daemon.stop().await;
    let mark = |what: &str, subject: &str| {
        let catalogue = rusqlite::Connection::open(dir.path().join("state/catalog.sqlite")).expect("opens");
        catalogue.execute("INSERT INTO journal (what, subject, detail, since) VALUES (?1, ?2, '{}', 1)", [what, subject]).expect("marked");
    };
    let golden = dir.path().join("state/goldens").join(&key);
    // Marked, and its files still there; then marked, and its files gone.
    for files in [true, false] {
        mark("remove-golden", &key);
        if !files {
            std::fs::remove_dir_all(&golden).expect("removed");
        }
        let mut daemon = Daemon::start_in(dir.path(), |_| ()).await;
        assert!(!golden.exists());
        assert!(daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list").into_inner().goldens.is_empty());
        daemon.render(&format!("again-{files}"), spec(&image, &format!("again-{files}"), VolumeFormat::Raw)).await;
        assert!(golden.exists());
        daemon.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn collecting_while_rendering_never_takes_a_golden_from_under_a_volume() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    let mut stores = daemon.stores.clone();
    let collector = tokio::spawn(async move {
        let (mut removed, begun) = (0u32, std::time::Instant::now());
        while begun.elapsed() < std::time::Duration::from_secs(3) {
            let answer = stores.collect_garbage(everything(false)).await.expect("collected").into_inner();
            removed += answer.objects.iter().filter(|object| object.removed).count() as u32;
        }
        removed
    });
    let (mut made, mut gone) = (0u32, 0u32);
    while !collector.is_finished() {
        let name = format!("vm{made}-{gone}");
        let started = daemon.start_render(&name, spec(&image, &name, VolumeFormat::Qcow2Overlay)).await.expect("accepted").render.expect("a render");
        let ended = daemon.wait(&started.id).await;
        if ended.state() == proto::RenderState::Succeeded {
            judge("qemu-img", &["check", "-q", daemon.dir.join(format!("pool/{name}.qcow2")).to_str().expect("text")]);
            made += 1;
            delete(&mut daemon, &name).await;
        } else {
            assert_eq!(ended.error.as_ref().expect("why").reason, "GOLDEN_GONE", "{ended:?}");
            assert!(!daemon.dir.join(format!("pool/{name}.qcow2")).exists());
            gone += 1;
        }
    }
    let removed = collector.await.expect("no panic");
    assert!(made > 0, "no render succeeded beside the collector");
    assert!(removed > 0, "the collector never found the golden unused");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_left_is_named_and_only_what_is_proven_ours_goes() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    let key = daemon.render("key", spec(&image, "web1", VolumeFormat::Raw)).await.golden_key;
    daemon.render("kept", spec(&image, "web2", VolumeFormat::Qcow2)).await;
    let (pool, state) = (daemon.dir.join("pool"), daemon.dir.join("state"));
    // A volume that the catalogue forgot, a copy of it that an operator made, and a file of the operator's.
    let catalogue = rusqlite::Connection::open(state.join("catalog.sqlite")).expect("opens");
    catalogue.execute("DELETE FROM volumes WHERE name='web1'", []).expect("forgotten");
    judge("cp", &["--preserve=all", pool.join("web1.raw").to_str().expect("text"), pool.join("copy.raw").to_str().expect("text")]);
    std::fs::write(pool.join("notes.txt"), "mine").expect("written");
    std::fs::write(pool.join(".cloudletd-stage-rnd-0-web9"), "unfinished").expect("written");
    // A golden and a tarball without rows, and one whose name is not its digest.
    catalogue.execute("DELETE FROM goldens", []).expect("forgotten");
    let blob = std::fs::read_dir(state.join("blobs")).expect("blobs").next().expect("one").expect("an entry").path();
    catalogue.execute("DELETE FROM blobs", []).expect("forgotten");
    std::fs::write(state.join("blobs").join("0".repeat(64)), "tampered").expect("written");
    drop(catalogue);
    let mut reap = async |dry_run: bool, volumes: bool| {
        let left = daemon.stores.reap_leftovers(proto::ReapLeftoversRequest { dry_run, volumes }).await.expect("reaped").into_inner().leftovers;
        let name = |left: &proto::Leftover| left.path.rsplit('/').next().expect("a name").to_owned();
        let mut found: Vec<(String, String, bool)> = left.iter().map(|left| (left.kind.clone(), name(left), left.removed)).collect();
        found.sort();
        found
    };
    let blob_name = blob.file_name().expect("a name").to_str().expect("text").to_owned();
    let expected = |volumes: bool| {
        let mut list = vec![
            ("blob".to_owned(), blob_name.clone(), true),
            ("foreign".to_owned(), "0".repeat(64), false),
            ("foreign".to_owned(), "copy.raw".to_owned(), false),
            ("foreign".to_owned(), "notes.txt".to_owned(), false),
            ("golden".to_owned(), key.clone(), true),
            ("stage".to_owned(), ".cloudletd-stage-rnd-0-web9".to_owned(), true),
            ("volume".to_owned(), "web1.raw".to_owned(), volumes),
        ];
        list.sort();
        list
    };
    assert_eq!(reap(true, true).await, expected(true));
    assert!(pool.join("web1.raw").exists() && blob.exists() && state.join("goldens").join(&key).exists(), "a dry run removes nothing");
    assert_eq!(reap(false, false).await, expected(false));
    assert!(pool.join("web1.raw").exists() && !blob.exists() && !state.join("goldens").join(&key).exists());
    reap(false, true).await;
    let mut left: Vec<_> = std::fs::read_dir(&pool).expect("the pool").map(|entry| entry.expect("an entry").file_name()).collect();
    left.sort();
    assert_eq!(left, ["copy.raw", "notes.txt", "web2.qcow2"]);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_directory_of_a_stopped_daemon_is_free_at_once() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for round in 0..20 {
        let mut daemon = Daemon::start_in(dir.path(), |_| ()).await;
        let image = daemon.image().await;
        daemon.render(&format!("key{round}"), spec(&image, &format!("web{round}"), VolumeFormat::Qcow2Overlay)).await;
        daemon.stores.backup_catalog(proto::BackupCatalogRequest { keep: 3 }).await.expect("backed up");
        daemon.stop().await;
        cloudletd::store::Store::open(&dir.path().join("state")).unwrap_or_else(|error| panic!("round {round}: {error:?}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_put_in_the_place_of_a_damaged_catalogue_brings_everything_back() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut daemon = Daemon::start_in(dir.path(), |_| ()).await;
    let image = daemon.image().await;
    daemon.render("key", spec(&image, "web1", VolumeFormat::Qcow2Overlay)).await;
    let mapping = daemon.mapping("web1").await;
    let backup = daemon.stores.backup_catalog(proto::BackupCatalogRequest { keep: 3 }).await.expect("backed up").into_inner();
    daemon.stop().await;
    let catalogue = dir.path().join("state/catalog.sqlite");
    std::fs::write(&catalogue, b"nothing of a database ".repeat(1000)).expect("damaged");
    let mut config = cloudletd::config::Config { state_dir: dir.path().join("state"), ..Default::default() };
    config.listen.unix = dir.path().join("other");
    let refused = cloudletd::server::serve_until(config.checked().expect("valid"), std::future::pending()).await.expect_err("damaged");
    assert_eq!(refused.kind(), cloudletd::error::Kind::Corrupt, "{refused:?}");
    // What the README says.
    for beside in ["catalog.sqlite-wal", "catalog.sqlite-shm"] {
        let _ = std::fs::remove_file(dir.path().join("state").join(beside));
    }
    std::fs::copy(&backup.path, &catalogue).expect("put back");
    let mut daemon = Daemon::start_in(dir.path(), |_| ()).await;
    assert_eq!(daemon.mapping("web1").await, mapping);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_not_what_the_manifest_declares_are_refused_and_leave_nothing() {
    let mut daemon = Daemon::start().await;
    let digest = daemon.upload(&crate::common::server::tarball()).await;
    let more = format!(r#"{{"rootfs": {{"digest": "{digest}", "media_type": "application/zstd"}}}}"#);
    let image = daemon.image_of(&digest, &more).await;
    let started = daemon.start_render("key", spec(&image, "web1", VolumeFormat::Raw)).await.expect("accepted").render.expect("a render");
    let ended = daemon.wait(&started.id).await;
    assert_eq!(ended.state(), proto::RenderState::Failed);
    for dir in ["state/tmp", "state/goldens", "pool"] {
        assert_eq!(std::fs::read_dir(daemon.dir.join(dir)).expect(dir).count(), 0, "{dir}");
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_golden_is_found_on_use_and_by_a_scrub_and_made_anew_unless_volumes_lie_over_it() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut daemon = Daemon::start_in(dir.path(), |_| ()).await;
    let image = daemon.image().await;
    let key = daemon.render("key", spec(&image, "web1", VolumeFormat::Raw)).await.golden_key;
    let disk = dir.path().join("state/goldens").join(&key).join("disk.raw");
    let damage = || {
        use std::os::unix::fs::{FileExt, PermissionsExt};
        std::fs::set_permissions(&disk, std::fs::Permissions::from_mode(0o644)).expect("writable");
        std::fs::File::options().write(true).open(&disk).expect("opens").write_all_at(&[0x5a; 512], 40 << 20).expect("damaged");
    };
    let mut stores = daemon.stores.clone();
    let clean = stores.scrub_store(proto::ScrubStoreRequest {}).await.expect("scrubbed").into_inner();
    assert!(clean.checked == 2 && clean.bytes > 0 && clean.damaged.is_empty(), "{clean:?}");
    damage();
    daemon.stop().await;
    // First use by another process: built again, and what was damaged is kept to be looked at.
    let mut daemon = Daemon::start_in(dir.path(), |_| ()).await;
    daemon.render("second", spec(&image, "web2", VolumeFormat::Qcow2Overlay)).await;
    assert_eq!(std::fs::read_dir(dir.path().join("state/quarantine")).expect("there").count(), 1);
    damage();
    let found = daemon.stores.scrub_store(proto::ScrubStoreRequest {}).await.expect("scrubbed").into_inner().damaged;
    assert!(found.len() == 1 && found[0].name == key && !found[0].quarantined && disk.exists(), "a volume lies over it: {found:?}");
    daemon.stop().await;
    let mut daemon = Daemon::start_in(dir.path(), |_| ()).await;
    let started = daemon.start_render("third", spec(&image, "web3", VolumeFormat::Raw)).await.expect("accepted").render.expect("a render");
    let refused = daemon.wait(&started.id).await;
    assert_eq!(refused.error.expect("why").reason, "GOLDEN_CORRUPT");
    delete(&mut daemon, "web2").await;
    daemon.render("third", spec(&image, "web3", VolumeFormat::Raw)).await;
    // A tarball.
    let blob = std::fs::read_dir(dir.path().join("state/blobs")).expect("blobs").next().expect("one").expect("an entry").path();
    std::fs::remove_file(&blob).expect("removed");
    let size = daemon.images.get_image(proto::GetImageRequest { image_id: image.clone() }).await.expect("there").into_inner();
    std::fs::write(&blob, vec![7; size.image.expect("an image").rootfs.expect("one").size_bytes as usize]).expect("tampered");
    let found = daemon.stores.scrub_store(proto::ScrubStoreRequest {}).await.expect("scrubbed").into_inner().damaged;
    assert!(found.len() == 1 && found[0].kind == "blob" && found[0].quarantined && !blob.exists(), "{found:?}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_registries_and_buckets_nothing_is_pushed_or_pulled() {
    let mut daemon = Daemon::start().await;
    let golden_key = "0".repeat(64);
    assert!(daemon.shares.list_remotes(proto::ListRemotesRequest {}).await.expect("listed").into_inner().remotes.is_empty());
    let push = proto::PushGoldenRequest { remote: "r".into(), golden_key: golden_key.clone() };
    assert_eq!(daemon.shares.push_golden(push).await.expect_err("no such remote").code(), tonic::Code::NotFound);
    let pull = proto::PullGoldenRequest { remote: "r".into(), golden_key: "x".into(), ..Default::default() };
    assert_eq!(daemon.shares.pull_golden(pull).await.expect_err("no key").code(), tonic::Code::InvalidArgument);
    let pull = proto::PullGoldenRequest { remote: "r".into(), golden_key, digest: "x".into(), ..Default::default() };
    assert_eq!(daemon.shares.pull_golden(pull).await.expect_err("no digest").code(), tonic::Code::InvalidArgument);
    daemon.stop().await;
}
