//! Reconfiguring stopped instances: every format, what is refused, and crashes between the steps. e2fsck, debugfs, qemu-img and the kernel are the judges.
//!
//! Needs root, loop devices, mount, e2fsprogs and QEMU's tools; without them the tests fail.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use crate::common::server::{self, Daemon, cat, judge, spec, volume};
use cloudletd::{
    config::{Config, PoolConfig},
    error::{Error, Kind, Result, Stage},
    host::loops::{self, LoopDevice, Options},
    proto::{self, VolumeFormat},
    render::{
        Engine,
        reconfigure::{Reconfigure, Step},
    },
    store::Store,
    units::{GIB, MIB},
    volume::patch::FilePatch,
};

const NEW_ADDRESS: &str = "198.51.100.77/24";

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// New address, new host name, a key.
fn change(name: &str) -> proto::ReconfigureVolumeRequest {
    proto::ReconfigureVolumeRequest {
        volume: Some(volume(name)),
        instance: Some(proto::InstanceConfig {
            name: name.into(),
            hostname: "moved.example.net".into(),
            network: Some(proto::Network {
                interfaces: vec![proto::Interface {
                    name: "eth0".into(),
                    mac: "52:54:00:00:00:01".into(),
                    addresses: vec![NEW_ADDRESS.into()],
                    gateway4: "198.51.100.1".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            authorized_keys: vec![proto::AuthorizedKeys {
                user: "root".into(),
                keys: vec!["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEkgVGhpbmsgVGhlcmVmb3JlIEFtIE5vdCBBIEtleSEh new@example.com".into()],
            }],
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The volume's disk as a raw file or device for the judges; qcow2 images are checked on the way.
fn disk_of(daemon: &Daemon, mapping: &proto::GetMappingResponse) -> PathBuf {
    let root = mapping.mapping.as_ref().expect("a mapping").devices[0].clone();
    let path = root.volume.expect("a volume").path;
    if root.format == "raw" {
        return path.into();
    }
    let said = judge("qemu-img", &["check", "-f", "qcow2", &path]);
    assert!(said.contains("No errors were found"), "{said}");
    let raw = daemon.dir.join("judged.raw");
    judge("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &path, text(&raw)]);
    raw
}

/// The filesystem is clean and says what [`change`] asked for.
#[track_caller]
fn check_changed(disk: &Path) {
    judge("e2fsck", &["-fn", text(disk)]);
    let interfaces = cat(text(disk), "/etc/network/interfaces");
    assert!(interfaces.contains("198.51.100.77") && !interfaces.contains("192.0.2.10"), "{interfaces}");
    assert_eq!(cat(text(disk), "/etc/hostname"), "moved\n");
    assert!(cat(text(disk), "/root/.ssh/authorized_keys").contains("new@example.com"));
}

fn golden_of(daemon: &Daemon) -> (PathBuf, Vec<u8>) {
    let goldens = fs::read_dir(daemon.dir.join("state/goldens")).expect("goldens");
    let path = goldens.flatten().next().expect("a golden").path().join("disk.raw");
    let bytes = fs::read(&path).expect("read");
    (path, bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_format_gets_its_new_address_in_place_and_the_golden_is_only_read() {
    let backing = tempfile::NamedTempFile::new().expect("a file");
    // A loop device allocates what is zeroed on it: this one is small.
    backing.as_file().set_len(GIB).expect("sparse");
    let device = LoopDevice::attach(backing.as_file(), backing.path(), &Options::guarded()).expect("attached");
    let links = tempfile::tempdir().expect("a directory");
    std::os::unix::fs::symlink(device.path(), links.path().join("vm-1")).expect("a link");
    let path = links.path().to_path_buf();
    let mut daemon = Daemon::start_with(|config| {
        config.pools.push(PoolConfig::Devices { name: "disks".parse().expect("valid"), path, allow: vec!["vm-*".into()] });
    })
    .await;
    let image = daemon.image().await;
    for (name, format) in [
        ("raw", VolumeFormat::Raw),
        ("overlay", VolumeFormat::Qcow2Overlay),
        ("alone", VolumeFormat::Qcow2),
        ("looped", VolumeFormat::Loop),
        ("vm-1", VolumeFormat::Block),
    ] {
        let place = proto::VolumeRef { pool: if format == VolumeFormat::Block { "disks" } else { "default" }.into(), name: name.into() };
        let size_bytes = if format == VolumeFormat::Block { GIB } else { 20 * GIB };
        let spec = proto::RenderSpec { size_bytes, volume: Some(place.clone()), ..spec(&image, name, format) };
        daemon.render(name, spec).await;
        let get = proto::GetMappingRequest { volume: Some(place.clone()), ..Default::default() };
        let before = daemon.volumes.get_mapping(get.clone()).await.expect("a mapping").into_inner();
        let (golden, content) = golden_of(&daemon);
        let key = cat(text(&disk_of(&daemon, &before)), "/etc/ssh/ssh_host_ed25519_key");
        assert!(key.contains("PRIVATE KEY"));

        let begun = Instant::now();
        let request = proto::ReconfigureVolumeRequest { volume: Some(place), ..change(name) };
        let answer = daemon.volumes.reconfigure_volume(request.clone()).await.expect("reconfigures").into_inner();
        println!("{name}: {size_bytes} bytes reconfigured in {:?}: {} blocks, {} bytes", begun.elapsed(), answer.patch_blocks, answer.written_bytes);
        assert!(answer.patch_blocks > 0 && answer.edits.iter().any(|edit| edit.path == "/etc/network/interfaces"), "{answer:?}");
        assert!(answer.injected_json.contains(NEW_ADDRESS), "{}", answer.injected_json);

        let after = daemon.volumes.get_mapping(get).await.expect("a mapping").into_inner();
        let disk = disk_of(&daemon, &after);
        check_changed(&disk);
        assert_eq!(cat(text(&disk), "/etc/ssh/ssh_host_ed25519_key"), key, "the instance is the same");
        assert!(fs::read(golden).expect("read") == content, "{name}: the golden is only read");
        let identity = |mapping: &proto::GetMappingResponse| mapping.mapping.clone().expect("a mapping").identity.expect("an identity");
        let (old, new) = (identity(&before), identity(&after));
        assert_eq!((&new.machine_id, &new.ssh_fingerprints), (&old.machine_id, &old.ssh_fingerprints));
        assert_eq!(new.hostname, "moved.example.net");
        assert!(new.known_hosts[0].starts_with("moved.example.net,moved,198.51.100.77 ssh-"), "{:?}", new.known_hosts);
        let renamed: Vec<String> = old.sshfp.iter().map(|line| line.replacen(&format!("{name}.example.com."), "moved.example.net.", 1)).collect();
        assert!(!renamed.is_empty() && new.sshfp == renamed, "{:?} was {:?}", new.sshfp, old.sshfp);
        // Once more, with new host keys; and a look at it that changes nothing.
        let fresh = proto::ReconfigureVolumeRequest { fresh_host_keys: true, ..request.clone() };
        daemon.volumes.reconfigure_volume(fresh).await.expect("reconfigures");
        let disk = disk_of(&daemon, &after);
        judge("e2fsck", &["-fn", text(&disk)]);
        assert_ne!(cat(text(&disk), "/etc/ssh/ssh_host_ed25519_key"), key);
        if format == VolumeFormat::Qcow2Overlay {
            let path = daemon.dir.join("pool/overlay.qcow2");
            let bytes = fs::read(&path).expect("read");
            let dry =
                daemon.volumes.reconfigure_volume(proto::ReconfigureVolumeRequest { dry_run: true, ..request }).await.expect("plans").into_inner();
            assert!(dry.patch_blocks > 0 && fs::read(&path).expect("read") == bytes);
        }
    }
    assert!(fs::read_dir(daemon.dir.join("state/redo")).expect("list").next().is_none(), "no log is left");
    daemon.volumes.delete_volume(proto::DeleteVolumeRequest { volume: Some(volume("looped")), ..Default::default() }).await.expect("deleted");
    daemon.stop().await;
    device.close().expect("detached");
}

/// The kernel's mount of a raw volume, undone when dropped.
struct Mounted {
    device: Option<LoopDevice>,
    at: tempfile::TempDir,
}

impl Mounted {
    fn new(path: &Path) -> Mounted {
        let file = File::options().read(true).write(true).open(path).expect("open");
        let device = LoopDevice::attach(&file, path, &Options::guarded()).expect("attached");
        let at = tempfile::tempdir().expect("a directory");
        judge("mount", &["-t", "ext4", text(device.path()), text(at.path())]);
        Mounted { device: Some(device), at }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A process that another test is just starting has this one's files open for a moment.
        let unmounted = (0..50).any(|_| {
            let done = Command::new("umount").arg(self.at.path()).status().is_ok_and(|status| status.success());
            if !done {
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
            done
        });
        let closed = self.device.take().is_some_and(|device| device.close().is_ok());
        assert!(std::thread::panicking() || (unmounted && closed), "the mount is left behind");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_its_guest_wrote_to_is_changed_and_a_dirty_journal_is_refused() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    daemon.render("a", proto::RenderSpec { size_bytes: GIB, ..spec(&image, "guest", VolumeFormat::Raw) }).await;
    let path = daemon.dir.join("pool/guest.raw");
    let mounted = Mounted::new(&path);
    let root = mounted.at.path();
    // What guests do: many files, an index, holes, attributes, removed files, their own keys and machine-id.
    fs::create_dir(root.join("srv")).expect("mkdir");
    for number in 0..3000 {
        fs::write(root.join(format!("srv/file-{number:05}")), vec![number as u8; number % 9000]).expect("write");
    }
    for number in (0..3000).step_by(3) {
        fs::remove_file(root.join(format!("srv/file-{number:05}"))).expect("remove");
    }
    fs::write(root.join("etc/machine-id"), "0123456789abcdef0123456789abcdef\n").expect("write");
    File::create(root.join("hole")).expect("create").write_all_at(b"end", 5 << 30).expect("write");
    Command::new("sync").status().expect("sync");
    // The disk as it would be found after a power failure.
    let dirty = daemon.dir.join("dirty.raw");
    judge("cp", &["--sparse=always", text(mounted.device.as_ref().expect("attached").path()), text(&dirty)]);
    let error = daemon.volumes.reconfigure_volume(change("guest")).await.expect_err("it is in use");
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error:?}");
    drop(mounted);

    let clean = daemon.dir.join("clean.raw");
    judge("cp", &["--sparse=always", text(&path), text(&clean)]);
    judge("cp", &["--sparse=always", text(&dirty), text(&path)]);
    let error = daemon.volumes.reconfigure_volume(change("guest")).await.expect_err("the journal is dirty");
    assert!(error.message().contains("journal"), "{error:?}");
    assert!(reason(&error).contains("JOURNAL_DIRTY"), "{error:?}");
    judge("cmp", &[text(&path), text(&dirty)]);

    judge("cp", &["--sparse=always", text(&clean), text(&path)]);
    let answer = daemon.volumes.reconfigure_volume(change("guest")).await.expect("reconfigures").into_inner();
    check_changed(&path);
    let identity = answer.mapping.expect("a mapping").identity.expect("an identity");
    assert_eq!(identity.machine_id, "0123456789abcdef0123456789abcdef", "the guest's own stays");
    assert_eq!(cat(text(&path), "/srv/file-00001").len(), 1);
    let mounted = Mounted::new(&path);
    assert_eq!(fs::read_dir(mounted.at.path().join("srv")).expect("list").count(), 2000);
    drop(mounted);
    judge("e2fsck", &["-fn", text(&path)]);
    daemon.stop().await;
}

fn reason(status: &tonic::Status) -> String {
    String::from_utf8_lossy(status.details()).into_owned()
}

/// qemu-io with an image open for writing, until it is dropped.
struct Holder(Child);

impl Holder {
    fn new(path: &Path, format: &str) -> Holder {
        let mut child =
            Command::new("qemu-io").args(["-f", format, text(path)]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("qemu-io");
        // It has its locks when it answers; the pipe stays open.
        std::io::Write::write_all(child.stdin.as_mut().expect("a pipe"), b"length\n").expect("write");
        std::thread::sleep(std::time::Duration::from_millis(700));
        Holder(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_use_or_not_ours_to_change_is_refused_by_name() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    for (name, format, qemu) in [("one", VolumeFormat::Raw, "raw"), ("two", VolumeFormat::Qcow2Overlay, "qcow2")] {
        let devices = vec![proto::DeviceSpec {
            role: proto::DeviceRole::Data as i32,
            size_bytes: 32 * MIB,
            volume: Some(volume(&format!("{name}-data"))),
            mount: "/srv".into(),
            ..Default::default()
        }];
        daemon.render(name, proto::RenderSpec { devices, ..spec(&image, name, format) }).await;
        let path = PathBuf::from(daemon.mapping(name).await.mapping.expect("a mapping").devices[0].volume.clone().expect("a volume").path);
        let before = fs::read(&path).expect("read");
        let holder = Holder::new(&path, qemu);
        let error = daemon.volumes.reconfigure_volume(change(name)).await.expect_err("QEMU has it");
        assert!(reason(&error).contains("IN_USE") && error.code() == tonic::Code::FailedPrecondition, "{error:?}");
        drop(holder);
        let error = daemon
            .volumes
            .reconfigure_volume(proto::ReconfigureVolumeRequest { volume: Some(volume(&format!("{name}-data"))), ..change(name) })
            .await;
        assert!(reason(&error.expect_err("not a root")).contains("NOT_A_ROOT"));
        let mut other = change(name);
        other.instance.as_mut().expect("set").name = "another".into();
        assert!(reason(&daemon.volumes.reconfigure_volume(other).await.expect_err("another instance")).contains("INSTANCE_DIFFERS"));
        assert!(fs::read(&path).expect("read") == before, "nothing was written");
        daemon.volumes.reconfigure_volume(change(name)).await.expect("reconfigures");
        // The rows of what is attached know the new name too.
        let data = proto::GetMappingRequest { volume: Some(volume(&format!("{name}-data"))), ..Default::default() };
        let data = daemon.volumes.get_mapping(data).await.expect("a mapping").into_inner().mapping.expect("a mapping");
        assert_eq!(data.identity.expect("an identity").hostname, "moved.example.net");
    }
    let gone = daemon.volumes.reconfigure_volume(change("nothing")).await.expect_err("no volume");
    assert_eq!(gone.code(), tonic::Code::NotFound);
    daemon.stop().await;
}

/// The daemon's engine without its server.
fn engine(dir: &Path) -> std::sync::Arc<Engine> {
    let mut config = Config { state_dir: dir.join("state"), ..Config::default() };
    // This process is no cloudletd.
    config.worker.program = Some(env!("CARGO_BIN_EXE_cloudletd").into());
    config.pools = vec![PoolConfig::Directory { name: "default".parse().expect("valid"), path: dir.join("pool") }];
    let store = Store::open(&config.state_dir).expect("the store");
    Engine::new(store, config.checked().expect("valid")).expect("an engine")
}

fn wanted(name: &str) -> Reconfigure {
    let request = change(name);
    Reconfigure {
        pool: "default".parse().expect("valid"),
        name: name.parse().expect("valid"),
        instance: cloudletd::api::decode::instance_config("instance", request.instance.as_ref()).expect("valid"),
        fresh_host_keys: false,
        expand_templates: false,
        dry_run: false,
    }
}

fn crash() -> Error {
    Error::new(Kind::Cancelled, Stage::Target, "test", "the power fails")
}

/// A part of the patch, as a crash may leave it.
fn write_some(patch: &FilePatch, file: &File, every: usize) {
    for (offset, bytes) in patch.iter().step_by(every) {
        file.write_all_at(&bytes[..bytes.len() / 2], offset).expect("write");
    }
}

type Crash = fn(Step, &FilePatch, &File) -> Result<()>;

/// What happens before the power fails.
const CRASHES: [(&str, Crash); 5] = [
    ("before anything is written", |step, _, _| if step == Step::Logged { Err(crash()) } else { Ok(()) }),
    ("after some of it", |step, patch, file| {
        write_some(patch, file, 2);
        if step == Step::Logged { Err(crash()) } else { Ok(()) }
    }),
    ("after most of it", |step, patch, file| {
        write_some(patch, file, 1);
        file.set_len(file.metadata().expect("stat").len().max(patch.len_min())).expect("grow");
        if step == Step::Logged { Err(crash()) } else { Ok(()) }
    }),
    ("before the catalogue knows", |step, _, _| if step == Step::Applied { Err(crash()) } else { Ok(()) }),
    ("before the log is removed", |step, _, _| if step == Step::Recorded { Err(crash()) } else { Ok(()) }),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_step_is_finished_when_the_daemon_starts() {
    let owned = tempfile::tempdir().expect("a directory");
    let mut daemon = Daemon::start_in(owned.path(), |_| ()).await;
    let image = daemon.image().await;
    let formats = [("raw", VolumeFormat::Raw), ("overlay", VolumeFormat::Qcow2Overlay), ("alone", VolumeFormat::Qcow2)];
    for (crash, _) in CRASHES.iter().enumerate() {
        for (format, kind) in formats {
            let name = format!("{format}-{crash}");
            daemon.render(&name, spec(&image, &name, kind)).await;
        }
    }
    daemon.stop().await;
    {
        let engine = engine(owned.path());
        for (crash, (what, hook)) in CRASHES.iter().enumerate() {
            for (format, _) in formats {
                let error = engine.reconfigure(&wanted(&format!("{format}-{crash}")), hook).expect_err("the power failed");
                assert_eq!(error.kind(), Kind::Cancelled, "{what}: {error:?}");
            }
        }
        assert_eq!(fs::read_dir(owned.path().join("state/redo")).expect("list").count(), CRASHES.len() * formats.len());
    }
    let mut daemon = Daemon::start_in(owned.path(), |_| ()).await;
    assert_eq!(fs::read_dir(owned.path().join("state/redo")).expect("list").count(), 0, "everything is finished");
    for (crash, (what, _)) in CRASHES.iter().enumerate() {
        for (format, _) in formats {
            println!("{format}: {what}");
            let mapping = daemon.mapping(&format!("{format}-{crash}")).await;
            check_changed(&disk_of(&daemon, &mapping));
            assert_eq!(mapping.mapping.expect("a mapping").identity.expect("an identity").hostname, "moved.example.net");
        }
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_volume_is_changed_nobody_else_gets_it_and_the_next_change_finishes_an_interrupted_one() {
    let owned = tempfile::tempdir().expect("a directory");
    let mut daemon = Daemon::start_in(owned.path(), |_| ()).await;
    let image = daemon.image().await;
    daemon.render("k", spec(&image, "held", VolumeFormat::Qcow2Overlay)).await;
    daemon.stop().await;
    let engine = engine(owned.path());
    let path = owned.path().join("pool/held.qcow2");
    let failed = engine.reconfigure(&wanted("held"), &|step, patch, file| {
        if step == Step::Logged {
            let started = Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 1 0 4k", text(&path)]).output().expect("qemu-io");
            let said = String::from_utf8_lossy(&started.stderr).into_owned();
            assert!(said.contains("lock"), "a guest can't start now: {said}");
            let again = engine.reconfigure(&wanted("held"), &|_, _, _| Ok(())).expect_err("one at a time");
            assert_eq!((again.kind(), again.reason()), (Kind::Conflict, "VOLUME_BUSY"));
            assert!(engine.delete_volume(&"default".parse().expect("valid"), &"held".parse().expect("valid"), false).is_err());
            write_some(patch, file, 3);
            return Err(crash());
        }
        Ok(())
    });
    assert_eq!(failed.expect_err("the power failed").kind(), Kind::Cancelled);
    let mut second = wanted("held");
    second.instance.network = None;
    engine.reconfigure(&second, &|_, _, _| Ok(())).expect("the first is finished, then this one");
    assert_eq!(fs::read_dir(owned.path().join("state/redo")).expect("list").count(), 0);
    let raw = owned.path().join("judged.raw");
    judge("qemu-img", &["check", "-f", "qcow2", text(&path)]);
    judge("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&path), text(&raw)]);
    check_changed(&raw);
    assert!(loops::find_by_backing(&path).expect("list").is_empty());
}

/// The root filesystem of a disk as a file of its own.
fn root_of_disk(daemon: &Daemon, mapping: &proto::GetMappingResponse, disk: &Path) -> PathBuf {
    let root = mapping.mapping.as_ref().expect("a mapping").devices[0].filesystem.clone().expect("a filesystem");
    let judged = daemon.dir.join("root.judged");
    let (from, to) = (format!("if={}", text(disk)), format!("of={}", text(&judged)));
    let (skip, count) = (format!("skip={}", root.offset_bytes), format!("count={}", root.size_bytes));
    judge("dd", &[&from, &to, "bs=1M", "conv=sparse", "iflag=skip_bytes,count_bytes", &skip, &count]);
    judged
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_partition_of_a_disk_is_found_and_nothing_else_is_touched() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    for (name, format) in [("gpt-raw", VolumeFormat::Raw), ("gpt-overlay", VolumeFormat::Qcow2Overlay)] {
        let golden = proto::GoldenOptions { layout: proto::DiskLayout::Gpt as i32, size_bytes: 256 * MIB, ..Default::default() };
        daemon.render(name, proto::RenderSpec { golden: Some(golden), size_bytes: GIB, ..spec(&image, name, format) }).await;
        let get = proto::GetMappingRequest { volume: Some(volume(name)), ..Default::default() };
        let before = daemon.volumes.get_mapping(get.clone()).await.expect("a mapping").into_inner();
        let filesystem = before.mapping.as_ref().expect("a mapping").devices[0].filesystem.clone().expect("a filesystem");
        assert!(filesystem.offset_bytes >= MIB, "{filesystem:?}");
        let disk = disk_of(&daemon, &before);
        let table = judge("sfdisk", &["--dump", text(&disk)]);
        let outside = |disk: &Path| {
            let mut bytes = vec![0; filesystem.offset_bytes as usize];
            File::open(disk).expect("open").read_exact_at(&mut bytes, 0).expect("read");
            bytes
        };
        let boot = outside(&disk);
        let fstab = cat(text(&root_of_disk(&daemon, &before, &disk)), "/etc/fstab");
        assert!(fstab.contains(&filesystem.uuid), "{fstab}");

        let answer = daemon.volumes.reconfigure_volume(change(name)).await.expect("reconfigures").into_inner();
        assert!(answer.patch_blocks > 0 && answer.patch_blocks < 200, "{}", answer.patch_blocks);
        let after = daemon.volumes.get_mapping(get).await.expect("a mapping").into_inner();
        let disk = disk_of(&daemon, &after);
        let root = root_of_disk(&daemon, &after, &disk);
        check_changed(&root);
        assert_eq!(cat(text(&root), "/etc/fstab"), fstab, "the root is mounted as before");
        assert!(judge("sgdisk", &["-v", text(&disk)]).contains("No problems found"));
        let names =
            |table: &str| table.lines().filter(|line| !line.starts_with("device:")).map(|line| line.replace(text(&disk), "")).collect::<Vec<_>>();
        assert_eq!(names(&judge("sfdisk", &["--dump", text(&disk)])), names(&table));
        assert!(outside(&disk) == boot, "what is before the root is as it was");
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn templates_are_expanded_again_only_when_that_is_asked_for() {
    let mut daemon = Daemon::start().await;
    let digest = daemon.upload(&server::tarball()).await;
    let image = daemon.image_of(&digest, r#"{"args": {"greeting": {"type": "string", "default": "guests"}}, "templates": ["/etc/motd"]}"#).await;
    let greeting = |text: &str| {
        let value = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(text.into())) };
        Some(prost_types::Struct { fields: [("greeting".to_owned(), value)].into() })
    };
    let mut wanted = spec(&image, "web1", VolumeFormat::Raw);
    wanted.instance.as_mut().expect("set").args = greeting("first");
    daemon.render("key", wanted).await;
    let path = daemon.dir.join("pool/web1.raw");
    let motd = || cat(text(&path), "/etc/motd");
    assert_eq!(motd(), "Welcome to first on web1.example.com\n");

    let mut request = change("web1");
    request.instance.as_mut().expect("set").args = greeting("second");
    let kept = daemon.volumes.reconfigure_volume(request.clone()).await.expect("reconfigures").into_inner();
    assert_eq!(motd(), "Welcome to first on web1.example.com\n");
    assert!(kept.injected_json.contains("what the manifest's templates wrote is left as it is: /etc/motd"), "{}", kept.injected_json);

    request.expand_templates = true;
    daemon.volumes.reconfigure_volume(request.clone()).await.expect("reconfigures");
    assert_eq!(motd(), "Welcome to second on moved.example.net\n");
    judge("e2fsck", &["-fn", text(&path)]);
    // Args that are not given have their defaults, as in a render.
    request.instance.as_mut().expect("set").args = None;
    daemon.volumes.reconfigure_volume(request.clone()).await.expect("reconfigures");
    assert_eq!(motd(), "Welcome to guests on moved.example.net\n");

    let goldens = daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list").into_inner().goldens;
    let delete = proto::DeleteGoldenRequest { golden_key: goldens[0].key.clone() };
    daemon.renders.delete_golden(delete).await.expect("nothing is backed by it");
    let error = daemon.volumes.reconfigure_volume(request).await.expect_err("the templates are gone");
    assert!(reason(&error).contains("GOLDEN_NOT_FOUND"), "{error:?}");
    assert_eq!(motd(), "Welcome to guests on moved.example.net\n");
    daemon.stop().await;
}
