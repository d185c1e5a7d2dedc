//! Instances with several devices: data, swap, scratch; rendered again; deleted.

use cloudletd::{
    proto::{self, DeviceRole, VolumeFormat},
    units::MIB,
};

use crate::common::server::{Daemon, cat, judge, member, spec, tarball, volume};

const MANIFEST: &str = r#"{
    "persistent": ["/var/lib/app"],
    "devices": [{"role": "data", "size": "64 MiB", "persistent": true, "filesystem": {"type": "ext4"}}, {"role": "swap", "size": "16 MiB"}]
}"#;

/// The small tarball with something at /var/lib/app that is worth keeping.
fn tarball_with_data() -> Vec<u8> {
    let plain = tarball();
    let mut tar = tar::Builder::new(plain[..plain.len() - 1024].to_vec());
    member(&mut tar, "var/lib/app", tar::EntryType::Directory, 0o750, b"");
    member(&mut tar, "var/lib/app/seed.db", tar::EntryType::Regular, 0o600, &vec![0x5a; 300_000]);
    member(&mut tar, "var/lib/app/empty", tar::EntryType::Directory, 0o700, b"");
    tar.into_inner().expect("a tarball")
}

fn device(name: &str, role: DeviceRole) -> proto::DeviceSpec {
    proto::DeviceSpec { name: name.into(), role: role as i32, ..Default::default() }
}

async fn image(daemon: &mut Daemon) -> String {
    let digest = daemon.upload(&tarball_with_data()).await;
    daemon.image_of(&digest, MANIFEST).await
}

async fn delete(daemon: &mut Daemon, name: &str, delete_data: bool) -> Result<bool, tonic::Status> {
    let request = proto::DeleteVolumeRequest { volume: Some(volume(name)), delete_data };
    daemon.volumes.delete_volume(request).await.map(|response| response.into_inner().deleted)
}

async fn volumes(daemon: &mut Daemon) -> Vec<String> {
    let listed = daemon.volumes.list_volumes(proto::ListVolumesRequest::default()).await.expect("a list").into_inner().volumes;
    let mut names: Vec<String> = listed.into_iter().map(|volume| volume.r#ref.expect("named").name).collect();
    names.sort();
    names
}

fn path(device: &proto::Device) -> String {
    device.volume.as_ref().expect("a volume").path.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_has_data_swap_and_scratch_in_one_mapping_and_in_its_fstab() {
    let mut daemon = Daemon::start().await;
    let image = image(&mut daemon).await;
    let mut wanted = spec(&image, "db1", VolumeFormat::Raw);
    let mut scratch = device("scratch", DeviceRole::Scratch);
    (scratch.size_bytes, scratch.mount, scratch.format) = (128 * MIB, "/srv/my scratch".into(), VolumeFormat::Qcow2 as i32);
    wanted.devices = vec![scratch];
    daemon.render("key", wanted).await;
    let mapping = daemon.mapping("db1").await;
    let devices = &mapping.mapping.as_ref().expect("a mapping").devices;
    let names: Vec<(&str, DeviceRole, u32)> = devices.iter().map(|device| (device.name.as_str(), device.role(), device.boot_order)).collect();
    assert_eq!(
        names,
        [("root", DeviceRole::Root, 0), ("data", DeviceRole::Data, 1), ("swap", DeviceRole::Swap, 2), ("scratch", DeviceRole::Scratch, 3)]
    );
    let [root, data, swap, scratch] = &devices[..] else { panic!("four devices") };
    assert!(path(data).ends_with("/db1-data.raw") && path(scratch).ends_with("/db1-scratch.qcow2"));

    // Every filesystem is sound and carries the UUID that fstab mounts it by.
    let fstab = cat(&path(root), "/etc/fstab");
    let uuid = |device: &proto::Device| device.filesystem.as_ref().expect("a filesystem").uuid.clone();
    let raw = daemon.dir.join("scratch.judged").to_string_lossy().into_owned();
    judge("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &path(scratch), &raw]);
    for (file, device, line) in [
        (path(data), data, format!("UUID={} /var/lib/app ext4 defaults 0 2\n", uuid(data))),
        (raw, scratch, format!("UUID={} /srv/my\\040scratch ext4 defaults,nofail 0 2\n", uuid(scratch))),
    ] {
        judge("e2fsck", &["-fn", &file]);
        assert!(judge("blkid", &["--probe", &file]).contains(&format!("UUID=\"{}\"", uuid(device))));
        assert!(fstab.contains(&line), "{line} is not in {fstab}");
    }
    judge("e2fsck", &["-fn", &path(root)]);
    let swap_uuid = judge("swaplabel", &[&path(swap)]);
    let swap_uuid = swap_uuid.lines().find_map(|line| line.strip_prefix("UUID:")).expect("a UUID").trim();
    assert!(fstab.contains(&format!("UUID={swap_uuid} none swap sw,nofail 0 0\n")), "{fstab}");
    assert!(judge("file", &["--brief", &path(swap)]).contains("4095 pages"), "16 MiB less the header's page");

    // What was at the persistent path is on the data device, owner, mode and all, and the mount points are there.
    assert_eq!(cat(&path(data), "/seed.db").len(), 300_000);
    let stat = judge("debugfs", &["-R", "stat /seed.db", &path(data)]);
    assert!(stat.contains("Mode:  0600"), "{stat}");
    let stat = judge("debugfs", &["-R", "stat /", &path(data)]);
    assert!(stat.contains("Mode:  0750"), "the mounted directory has the mode of the image's: {stat}");
    assert!(judge("debugfs", &["-R", "stat \"/srv/my scratch\"", &path(root)]).contains("Type: directory"));
    // Every dialect lists all of them.
    assert_eq!((mapping.xl_disks.len(), mapping.libvirt_xml.matches("<disk ").count()), (4, 4));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_a_root_leaves_its_data_which_the_same_instance_finds_again() {
    let mut daemon = Daemon::start().await;
    let image = image(&mut daemon).await;
    daemon.render("one", spec(&image, "db1", VolumeFormat::Raw)).await;
    let attached = delete(&mut daemon, "db1-data", false).await.expect_err("it is attached");
    assert_eq!(attached.code(), tonic::Code::FailedPrecondition);
    assert!(delete(&mut daemon, "db1", false).await.expect("deleted"));
    assert_eq!(volumes(&mut daemon).await, ["db1-data"]);

    let plan = daemon.renders.plan_render(proto::PlanRenderRequest { spec: Some(spec(&image, "db1", VolumeFormat::Raw)) }).await;
    let planned: Vec<(String, bool)> = plan.expect("a plan").into_inner().devices.into_iter().map(|device| (device.name, device.kept)).collect();
    assert_eq!(planned, [("data".to_owned(), true), ("swap".to_owned(), false)]);
    daemon.render("two", spec(&image, "db1", VolumeFormat::Raw)).await;
    let mapping = daemon.mapping("db1").await.mapping.expect("a mapping");
    assert_eq!(mapping.devices.len(), 3);
    assert!(delete(&mut daemon, "db1", true).await.expect("deleted"));
    assert!(volumes(&mut daemon).await.is_empty());
    let left: Vec<_> = std::fs::read_dir(daemon.dir.join("pool")).expect("the pool").collect();
    assert!(left.is_empty(), "{left:?}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_persistent_paths_share_a_device_and_are_bound_to_their_places() {
    let mut daemon = Daemon::start().await;
    let digest = daemon.upload(&tarball_with_data()).await;
    let image = daemon.image_of(&digest, r#"{"persistent": ["/var/lib/app", "/etc/motd", "/srv/new"]}"#).await;
    let mut wanted = spec(&image, "db1", VolumeFormat::Raw);
    wanted.devices = vec![proto::DeviceSpec { size_bytes: 32 * MIB, persistent: true, ..device("", DeviceRole::Data) }];
    daemon.render("key", wanted).await;
    let devices = daemon.mapping("db1").await.mapping.expect("a mapping").devices;
    let (root, data) = (path(&devices[0]), path(&devices[1]));
    for file in [&root, &data] {
        judge("e2fsck", &["-fn", file]);
    }
    let fstab = cat(&root, "/etc/fstab");
    let at = |line: &str| fstab.find(line).unwrap_or_else(|| panic!("{line} is not in {fstab}"));
    let mount = at(" /.cloudlet/persistent ext4 defaults 0 2\n");
    for bound in ["/var/lib/app", "/etc/motd", "/srv/new"] {
        assert!(at(&format!("/.cloudlet/persistent{bound} {bound} none bind 0 0\n")) > mount);
    }
    assert_eq!(cat(&data, "/var/lib/app/seed.db").len(), 300_000);
    assert!(cat(&data, "/etc/motd").starts_with("Welcome"));
    for (image, directory) in [(&data, "/srv/new"), (&root, "/srv/new"), (&root, "/.cloudlet/persistent")] {
        assert!(judge("debugfs", &["-R", &format!("stat {directory}"), image]).contains("Type: directory"), "{directory}");
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_that_make_no_sense_are_refused_by_field() {
    let mut daemon = Daemon::start().await;
    let image = image(&mut daemon).await;
    type Break = fn(&mut proto::RenderSpec);
    let cases: [(&str, Break); 10] = [
        ("spec.devices[0].role", |spec| spec.devices = vec![device("", DeviceRole::Unspecified)]),
        ("spec.devices[0].role", |spec| spec.devices = vec![device("data", DeviceRole::Swap)]),
        ("spec.devices[0].role", |spec| spec.devices = vec![device("x", DeviceRole::Root)]),
        ("spec.devices[0].size_bytes", |spec| spec.devices = vec![device("more", DeviceRole::Scratch)]),
        ("spec.devices[0].size_bytes", |spec| spec.devices = vec![proto::DeviceSpec { size_bytes: 4096, ..device("swap", DeviceRole::Swap) }]),
        ("spec.devices[0].mount", |spec| spec.devices = vec![proto::DeviceSpec { mount: "/x".into(), ..device("swap", DeviceRole::Swap) }]),
        ("spec.devices[0].mount", |spec| {
            spec.devices = vec![proto::DeviceSpec { mount: "/x\n/dev/sda / ext4".into(), size_bytes: 16 << 20, ..device("x", DeviceRole::Data) }];
        }),
        ("spec.devices[0].mount_options", |spec| {
            spec.devices =
                vec![proto::DeviceSpec { mount: "/x".into(), mount_options: "a b".into(), size_bytes: 16 << 20, ..device("x", DeviceRole::Data) }];
        }),
        ("spec.devices[0].format", |spec| {
            spec.devices = vec![proto::DeviceSpec { format: VolumeFormat::Qcow2Overlay as i32, ..device("data", DeviceRole::Data) }];
        }),
        ("spec.devices[0].volume", |spec| spec.devices = vec![proto::DeviceSpec { volume: Some(volume("db1")), ..device("data", DeviceRole::Data) }]),
    ];
    for (field, break_it) in cases {
        let mut wanted = spec(&image, "db1", VolumeFormat::Raw);
        break_it(&mut wanted);
        let status = daemon.start_render("key", wanted).await.expect_err(field);
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{field}: {}", status.message());
        let details = tonic_types::StatusExt::get_error_details(&status);
        let fields: Vec<&str> =
            details.bad_request().map(|bad| bad.field_violations.iter().map(|violation| violation.field.as_str()).collect()).unwrap_or_default();
        assert_eq!(fields, [field], "{}", status.message());
    }
    assert!(volumes(&mut daemon).await.is_empty());
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listed_golden_images_are_prepared_when_the_daemon_starts() {
    let dir = tempfile::tempdir().expect("a directory");
    let tarball = dir.path().join("small.tar");
    std::fs::write(&tarball, crate::common::server::tarball()).expect("written");
    let manifest = dir.path().join("small.json");
    std::fs::write(&manifest, r#"{"name": "small", "entry_points": {"init": {}}}"#).expect("written");
    let prerender = cloudletd::config::Prerender {
        image: None,
        manifest: Some(manifest),
        rootfs_url: Some(format!("file://{}", tarball.display())),
        filesystem: None,
        layout: None,
        size: Some(cloudletd::units::Bytes(96 * MIB)),
        profile: None,
        platforms: Vec::new(),
    };
    let mut daemon = Daemon::start_in(dir.path(), |config| config.golden.prerenders = vec![prerender]).await;
    let begun = std::time::Instant::now();
    let golden = loop {
        let goldens = daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list").into_inner().goldens;
        if let Some(golden) = goldens.into_iter().next() {
            break golden;
        }
        assert!(begun.elapsed().as_secs() < 60, "nothing was prepared");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    };
    assert_eq!(golden.size_bytes, 96 * MIB);
    daemon.stop().await;
}
#[tokio::test(flavor = "multi_thread")]
async fn a_root_rendered_again_keeps_identity_and_data_and_nothing_else() {
    let mut daemon = Daemon::start().await;
    let image = image(&mut daemon).await;
    let mut wanted = spec(&image, "db1", VolumeFormat::Qcow2Overlay);
    wanted.devices = vec![proto::DeviceSpec { size_bytes: 32 * MIB, mount: "/tmp/s".into(), ..device("scratch", DeviceRole::Scratch) }];
    daemon.render("first", wanted.clone()).await;
    let before = daemon.mapping("db1").await.mapping.expect("a mapping");
    let data = path(&before.devices[1]);
    // The guest wrote something to its data.
    let script = daemon.dir.join("marker");
    std::fs::write(&script, "written by the guest").expect("written");
    judge("debugfs", &["-w", "-R", &format!("write {} /marker", script.display()), &data]);

    let taken = daemon.start_render("second", wanted.clone()).await.expect_err("the name is taken");
    assert_eq!(taken.code(), tonic::Code::AlreadyExists);
    // Another image, another host name, no scratch device: still the same instance.
    let digest = daemon.upload(&tarball_with_data()).await;
    let other = daemon.image_of(&digest, &MANIFEST.replace("\"persistent\": [", "\"description\": \"new\", \"persistent\": [")).await;
    wanted.image_id = other.clone();
    (wanted.replace, wanted.devices) = (true, Vec::new());
    wanted.instance.as_mut().expect("set").hostname = "db2.example.com".into();
    daemon.render("third", wanted.clone()).await;
    let after = daemon.mapping("db1").await.mapping.expect("a mapping");
    assert_eq!(after.image_id, other);
    let identity = |mapping: &proto::Mapping| {
        let identity = mapping.identity.clone().expect("an identity");
        (identity.machine_id, identity.ssh_fingerprints, mapping.devices[0].filesystem.clone().expect("a filesystem").uuid)
    };
    assert_eq!(identity(&before), identity(&after));
    assert_eq!(after.identity.as_ref().expect("an identity").hostname, "db2.example.com");
    assert_eq!(after.devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>(), ["root", "data", "swap"]);
    assert_eq!(path(&after.devices[1]), data);
    assert_eq!(cat(&data, "/marker"), "written by the guest");
    assert_eq!(volumes(&mut daemon).await, ["db1", "db1-data", "db1-swap"], "scratch went with the root that had it");
    judge("qemu-img", &["check", "-f", "qcow2", &path(&after.devices[0])]);

    // Another instance never gets them.
    wanted.instance.as_mut().expect("set").name = "intruder".into();
    let refused = daemon.start_render("fourth", wanted).await.expect_err("not its root");
    assert_eq!(refused.code(), tonic::Code::AlreadyExists);
    assert!(refused.message().contains("db1"), "{}", refused.message());
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_is_a_read_only_volume_with_the_label_and_documents_of_its_format() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    for (name, format, label, user_data) in [
        ("seeded", proto::SeedFormat::Nocloud, "CIDATA", "user-data"),
        ("driven", proto::SeedFormat::ConfigDrive, "CONFIG-2", "openstack/latest/user_data"),
    ] {
        let mut wanted = spec(&image, name, VolumeFormat::Raw);
        let secret = b"#!/bin/sh\n# hunter2\n".to_vec();
        let seed = proto::SeedSpec { format: format as i32, user_data: secret.clone(), vendor_data: Vec::new() };
        wanted.devices = vec![proto::DeviceSpec { seed: Some(seed), ..device("", DeviceRole::Seed) }];
        daemon.render(name, wanted).await;
        let mapping = daemon.mapping(name).await;
        let devices = mapping.mapping.expect("a mapping").devices;
        let seed = &devices[1];
        assert!(seed.read_only && seed.role() == DeviceRole::Seed && seed.name == "seed");
        let file = path(seed);
        judge("fsck.fat", &["-n", &file]);
        assert!(judge("blkid", &["--probe", &file]).contains(&format!("LABEL=\"{label}\"")));
        assert_eq!(judge("mtype", &["-i", &file, &format!("::/{user_data}")]).as_bytes(), secret);
        // What may be secret is on the volume and nowhere else.
        let catalogue = std::fs::read(daemon.dir.join("state/catalog.sqlite-wal")).expect("the catalogue's log");
        assert!(!mapping.mapping_json.contains("hunter2") && !catalogue.windows(7).any(|bytes| bytes == b"hunter2"));
    }
    // One seed: cloud-init would choose between two by rules of its own.
    let mut twice = spec(&image, "twice", VolumeFormat::Raw);
    let seed = proto::SeedSpec { format: proto::SeedFormat::Nocloud as i32, ..Default::default() };
    twice.devices = vec![proto::DeviceSpec { seed: Some(seed), ..device("", DeviceRole::Seed) }];
    twice.instance.as_mut().expect("set").cloud_init = Some(proto::CloudInitSeed::default());
    let refused = daemon.start_render("twice", twice).await.expect_err("two seeds");
    assert!(refused.message().contains("instance has one seed"), "{}", refused.message());
    assert!(delete(&mut daemon, "seeded", false).await.expect("deleted"));
    assert_eq!(volumes(&mut daemon).await, ["driven", "driven-seed"]);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bulk_writing_keeps_to_the_configured_bandwidth() {
    let time = async |bandwidth: u64| {
        let mut daemon = Daemon::start_with(|config| config.limits.write_bandwidth = cloudletd::units::Bytes(bandwidth)).await;
        let image = daemon.image().await;
        // What a pause saves up would hide the rate.
        daemon.render("warm", spec(&image, "warm", VolumeFormat::Qcow2Overlay)).await;
        let begun = std::time::Instant::now();
        for index in 0..8 {
            daemon.render(&format!("key-{index}"), spec(&image, &format!("raw-{index}"), VolumeFormat::Raw)).await;
        }
        let elapsed = begun.elapsed();
        daemon.stop().await;
        elapsed
    };
    // Eight times about 3.3 MiB, of which a burst of 16 MiB is free: more than 10 MiB at 4 MiB a second.
    let (paced, free) = (time(4 * MIB).await, time(0).await);
    assert!(paced.as_secs_f64() > 2.0, "{paced:?}");
    assert!(free < paced, "{free:?} without a limit, {paced:?} with one");
}
