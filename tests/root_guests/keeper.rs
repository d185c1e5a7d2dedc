//! A daemon that is a user without privileges, and the keeper that has them: everything works as for root, and what the keeper is asked beyond its
//! configuration is refused. Needs root, loop devices, the tools of XFS and btrfs, the fixtures of `scripts/fixtures.sh` and grpcurl.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::AsFd,
        unix::{fs::symlink, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use cloudletd::host::{
    descriptors::{pass, passed},
    loops::{LoopDevice, Options, attached, detach},
};
use rustix::{
    process::{Gid, Uid},
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};
use serde_json::{Value, json};

use crate::common::{
    daemon::Daemon,
    keeper::KEPT_USER,
    leak::LeakGuard,
    rig::{call_ok, image, render},
};

const FIXTURE: &str = "bookworm-ifupdown";

/// A device of root's, and a directory with a link to it, which is a pool when it is configured.
struct Device {
    node: PathBuf,
    links: tempfile::TempDir,
    _backing: tempfile::NamedTempFile,
}

impl Device {
    fn new(name: &str) -> Device {
        let backing = tempfile::NamedTempFile::new().expect("a file");
        backing.as_file().set_len(2 << 30).expect("a size");
        // Not open in this process, which is another than the daemon.
        let node = LoopDevice::attach(backing.as_file(), backing.path(), &Options::persistent()).and_then(LoopDevice::keep).expect("attach");
        let links = tempfile::tempdir().expect("a directory");
        symlink(&node, links.path().join(name)).expect("a link");
        Device { node, links, _backing: backing }
    }

    /// Its pool, for a configuration.
    fn pool(&self) -> String {
        let path = self.links.path().to_str().expect("test paths are UTF-8");
        format!("[[pool]]\nname = \"devices\"\nkind = \"devices\"\npath = {path:?}\nallow = [\"vm-*\"]\n")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let detached = detach(&self.node);
        assert!(detached.is_ok() || std::thread::panicking(), "{detached:?}");
    }
}

/// A daemon without privileges, with a pool of files beside that of `device`.
fn kept(device: &Device) -> (Daemon, tempfile::TempDir) {
    let files = tempfile::tempdir().expect("a directory");
    std::os::unix::fs::chown(files.path(), Some(KEPT_USER), Some(KEPT_USER)).expect("chown");
    let path = files.path().to_str().expect("test paths are UTF-8");
    let pools = format!("[[pool]]\nname = \"default\"\nkind = \"directory\"\npath = {path:?}\n{}", device.pool());
    (Daemon::start_kept("", &format!("[golden]\nsize = \"1 GiB\"\n{pools}")), files)
}

fn status_of(pid: u32, key: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the status of a process");
    status.lines().find_map(|line| line.strip_prefix(key)).expect("a line of it").trim().to_owned()
}

#[track_caller]
fn judge(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).output().unwrap_or_else(|error| panic!("{tool} is needed: {error}"));
    assert!(output.status.success(), "{tool} {args:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_daemon_without_privileges_renders_changes_and_deletes_on_every_target() {
    let device = Device::new("vm-1");
    let (daemon, files) = kept(&device);
    let mut guards = [LeakGuard::new(daemon.directory()), LeakGuard::new(files.path())];
    assert_eq!(status_of(daemon.pid(), "Uid:"), [KEPT_USER.to_string().as_str(); 4].join("\t"));
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(u64::from_str_radix(&status_of(daemon.pid(), set), 16), Ok(0), "{set}");
    }
    assert_eq!(status_of(daemon.pid(), "Groups:"), "");
    let info = call_ok(&daemon, "HostService/GetHostInfo", &json!({}));
    assert_eq!(info["confinement"]["keeper"], daemon.keeper_socket().to_str().expect("test paths are UTF-8"));
    let missing = info["confinement"]["missing"].as_array().expect("a list");
    assert!(missing.iter().all(|layer| !layer.to_string().contains("another user")), "workers have the layers that need privileges: {missing:?}");

    let image = image(&daemon, FIXTURE, &json!({}));
    let cases = [
        ("raw-1", "RAW", "default", "ext4"),
        ("overlay-1", "QCOW2_OVERLAY", "default", "ext4"),
        ("qcow2-1", "QCOW2", "default", "ext4"),
        ("loop-1", "LOOP", "default", "ext4"),
        ("vm-1", "BLOCK", "devices", "ext4"),
        ("xfs-1", "RAW", "default", "xfs"),
        ("btrfs-1", "RAW", "default", "btrfs"),
    ];
    for (name, format, pool, filesystem) in cases {
        let volume = json!({"pool": pool, "name": name});
        let more = json!({"volume": volume, "golden": {"filesystem": filesystem}});
        let rendered = render(&daemon, &image, name, format, &more);
        let path = rendered.root()["volume"]["device"].as_str().expect("a device").to_owned();
        if format == "RAW" {
            let mut mark = [0; 100];
            let len = rustix::fs::getxattr(&path, "user.cloudletd.render", &mut mark).expect("its render's mark, for a recovery");
            assert!(mark[..len].starts_with(b"rnd-"), "{mark:?}");
        }
        match (filesystem, format) {
            ("ext4", "RAW" | "LOOP" | "BLOCK") => {
                judge("e2fsck", &["-fn", &path]);
                assert_eq!(judge("debugfs", &["-R", "cat /etc/hostname", &path]).trim_end().split('.').next(), Some(name));
            }
            ("ext4", _) => drop(judge("qemu-img", &["check", &path])),
            ("xfs", _) => drop(judge("xfs_repair", &["-n", "-f", &path])),
            _ => drop(judge("btrfs", &["check", "--readonly", &path])),
        }
        if filesystem == "ext4" {
            let request = json!({"volume": volume, "instance": {"name": name, "hostname": "moved.example.net"}});
            call_ok(&daemon, "VolumeService/ReconfigureVolume", &request);
        }
        if format == "LOOP" {
            assert!(judge("debugfs", &["-R", "cat /etc/hosts", &path]).contains("moved.example.net"));
            assert!(attached().expect("list").iter().any(|device| device.path == Path::new(&path)), "{path}");
        }
        let deleted = call_ok(&daemon, "VolumeService/DeleteVolume", &json!({"volume": volume}));
        assert_eq!(deleted["deleted"], true, "{name}");
    }
    guards.iter_mut().for_each(LeakGuard::check);
}

#[test]
fn the_keeper_sees_who_uses_a_device_where_the_daemon_can_not() {
    let device = Device::new("vm-1");
    let (daemon, _files) = kept(&device);
    let image = image(&daemon, FIXTURE, &json!({}));
    let volume = json!({"pool": "devices", "name": "vm-1"});
    let spec = json!({"imageId": image, "volume": volume, "format": "VOLUME_FORMAT_BLOCK", "instance": {"name": "vm-1"}});
    let request = json!({"idempotencyKey": "in-use", "spec": spec});
    // This process is root: its descriptors are nothing that another user may look at.
    let opened = File::open(&device.node).expect("open");
    let started = call_ok(&daemon, "RenderService/StartRender", &request);
    let refused = call_ok(&daemon, "RenderService/WatchRender", &json!({"renderId": started["render"]["id"]})).to_string();
    assert!(refused.contains("IN_USE") && refused.contains(&format!("pid {}", std::process::id())), "{refused}");
    drop(opened);
}

/// Says one thing to the keeper as a user; its answer, and how many descriptors came with it.
fn tell(socket: &Path, user: u32, version: &str, request: &Value, file: Option<&File>) -> (Value, usize) {
    let connection = connect_as(socket, user);
    let text = json!({"version": version, "request": request}).to_string();
    let sent = pass(&connection, file.map(AsFd::as_fd));
    let _refused_before = sent.and_then(|()| (&connection).write_all(&[&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()));
    let Some(descriptors) = passed(&connection).expect("an answer") else { return (Value::Null, 0) };
    let mut len = [0; 4];
    (&connection).read_exact(&mut len).expect("a length");
    let mut answer = vec![0; u32::from_le_bytes(len) as usize];
    (&connection).read_exact(&mut answer).expect("an answer");
    (serde_json::from_slice(&answer).expect("JSON"), descriptors.len())
}

/// Credentials are of the thread that connects (unix(7), SO_PEERCRED), and this thread ends with them.
fn connect_as(socket: &Path, user: u32) -> UnixStream {
    let socket: PathBuf = socket.to_owned();
    let thread = std::thread::spawn(move || {
        let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
        set_thread_groups(&[]).expect("this test needs root");
        set_thread_res_gid(gid, gid, gid).expect("this test needs root");
        set_thread_res_uid(uid, uid, uid).expect("this test needs root");
        UnixStream::connect(&socket)
    });
    thread.join().expect("a thread").expect("connect")
}

/// What a daemon that was taken over might try.
#[test]
fn the_keeper_does_nothing_beyond_its_configuration() {
    let (ours, foreign) = (Device::new("vm-1"), Device::new("vm-2"));
    let (daemon, files) = kept(&ours);
    let socket = daemon.keeper_socket();
    let ask = |request: Value| tell(&socket, KEPT_USER, env!("CARGO_PKG_VERSION"), &request, None);
    let (links, stranger) = (ours.links.path().to_str(), foreign.links.path().to_str());
    let node = &foreign.node;
    let loop_name = node.file_name().and_then(|name| name.to_str());
    let claim = |directory, name, access| ask(json!({"Claim": {"directory": directory, "name": name, "access": access}}));
    let refusals = [
        ("a device beside the patterns", claim(links, Some("sda"), "Write")),
        ("a path", claim(links, Some("../vm-1"), "Write")),
        ("a directory that is no pool", claim(stranger, Some("vm-2"), "Write")),
        ("a loop device of somebody else", claim(Some("/dev"), loop_name, "Write")),
        ("a device of the host", claim(Some("/dev"), Some("vda"), "Inspect")),
        ("a look elsewhere", ask(json!({"Look": {"directory": stranger, "name": "vm-2"}}))),
        ("a look beside the patterns", ask(json!({"Look": {"directory": "/dev", "name": "mem"}}))),
        ("a loop device of somebody else, to be detached", ask(json!({"Detach": {"path": node}}))),
        ("another program", ask(json!({"Start": {"subcommand": "serve"}}))),
        ("a directory, attached", {
            let directory = File::open(files.path()).expect("open");
            let attach = json!({"Attach": {"options": Options::persistent(), "name": "x"}});
            tell(&socket, KEPT_USER, env!("CARGO_PKG_VERSION"), &attach, Some(&directory))
        }),
    ];
    for (what, (answer, descriptors)) in refusals {
        let failure = &answer["Failed"];
        assert!(matches!(failure["kind"].as_str(), Some("PermissionDenied" | "InvalidRequest")), "{what}: {answer}");
        assert_eq!(descriptors, 0, "{what}");
    }
    assert!(attached().expect("list").iter().any(|device| device.path == *node), "still attached");

    // What it does do, so that the refusals above are not of something else.
    let (claimed, descriptors) = claim(links, Some("vm-1"), "Write");
    assert_eq!((claimed["Claimed"]["size_bytes"].as_u64(), descriptors), (Some(2 << 30), 2), "{claimed}");
    let (looked, descriptors) = ask(json!({"Look": {"directory": links, "name": "vm-1"}}));
    assert_eq!((&looked, descriptors), (&json!("Looked"), 1));

    // Nobody else is served, root included; nor is another version.
    for user in [0, KEPT_USER + 1] {
        // The socket's mode keeps the others out before that.
        fs::set_permissions(&socket, std::os::unix::fs::PermissionsExt::from_mode(0o666)).expect("chmod");
        let (answer, _) = tell(&socket, user, env!("CARGO_PKG_VERSION"), &json!("Hello"), None);
        assert_eq!(answer["Failed"]["kind"], "PermissionDenied", "{answer}");
    }
    let (answer, _) = tell(&socket, KEPT_USER, "0.0.0", &json!("Hello"), None);
    assert!(answer["Failed"]["message"].as_str().is_some_and(|message| message.contains("restart both")), "{answer}");
    assert_eq!(ask(json!("Hello")).0, json!("Done"));
    // Nonsense ends the conversation, not the keeper.
    assert_eq!(ask(json!({"Fly": {}})).0, Value::Null);
    assert_eq!(ask(json!("Hello")).0, json!("Done"));
}

#[test]
fn an_attached_file_that_nobody_keeps_is_detached_and_workers_end_with_who_asked() {
    let device = Device::new("vm-1");
    let (mut daemon, files) = kept(&device);
    let backing = files.path().join("attached");
    let file = File::options().read(true).write(true).create_new(true).open(&backing).expect("create");
    file.set_len(1 << 20).expect("a size");
    let is_attached = || attached().expect("list").iter().any(|device| device.backing == backing);
    let connection = connect_as(&daemon.keeper_socket(), KEPT_USER);
    let request =
        json!({"version": env!("CARGO_PKG_VERSION"), "request": {"Attach": {"options": Options::persistent(), "name": backing}}}).to_string();
    pass(&connection, [file.as_fd()]).expect("send");
    (&connection).write_all(&[&(request.len() as u32).to_le_bytes(), request.as_bytes()].concat()).expect("send");
    assert_eq!(passed(&connection).expect("an answer").map(|passed| passed.len()), Some(0), "the node is not handed out");
    assert!(is_attached());
    drop(connection);
    wait_until("detached", || !is_attached());

    // The readers of foreign bytes are the keeper's children, and the daemon's to end.
    image(&daemon, FIXTURE, &json!({}));
    let children = |pid: u32| fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let has_workers = |keeper: u32| {
        let tasks = fs::read_dir(format!("/proc/{keeper}/task")).expect("tasks").flatten();
        tasks.into_iter().any(|task| fs::read_to_string(task.path().join("children")).is_ok_and(|children| !children.trim().is_empty()))
    };
    assert_eq!(children(daemon.pid()), "");
    assert!(has_workers(daemon.keeper_pid()));
    daemon.kill();
    wait_until("no worker is left", || !has_workers(daemon.keeper_pid()));

    // A keeper that was killed is missed by what needs it, and by nothing else; when it is there again, all goes on.
    daemon.restart();
    let image = image(&daemon, FIXTURE, &json!({}));
    daemon.kill_keeper();
    call_ok(&daemon, "HostService/GetHostInfo", &json!({}));
    let spec =
        json!({"imageId": image, "volume": {"pool": "default", "name": "loop-1"}, "format": "VOLUME_FORMAT_LOOP", "instance": {"name": "loop-1"}});
    let ended = |daemon: &Daemon, key: &str| {
        let started = call_ok(daemon, "RenderService/StartRender", &json!({"idempotencyKey": key, "spec": spec}));
        call_ok(daemon, "RenderService/WatchRender", &json!({"renderId": started["render"]["id"]}))
    };
    let failed = ended(&daemon, "without");
    assert_eq!(failed["render"]["state"], "RENDER_STATE_FAILED", "{failed:#}");
    assert!(failed.to_string().contains("reach the keeper"), "{failed:#}");
    daemon.start_keeper();
    let rendered = ended(&daemon, "with");
    assert_eq!(rendered["render"]["state"], "RENDER_STATE_SUCCEEDED", "{rendered:#}\n{}", daemon.log());
    call_ok(&daemon, "VolumeService/DeleteVolume", &json!({"volume": {"pool": "default", "name": "loop-1"}}));
}

#[test]
fn without_mounts_the_keeper_starts_no_worker_that_mounts() {
    let daemon = Daemon::start_kept("mounts = false\n", "");
    let image = image(&daemon, FIXTURE, &json!({}));
    let spec = json!({"imageId": image, "volume": {"pool": "default", "name": "xfs-1"}, "format": "VOLUME_FORMAT_RAW",
        "instance": {"name": "xfs-1"}, "golden": {"filesystem": "xfs"}});
    let started = call_ok(&daemon, "RenderService/StartRender", &json!({"idempotencyKey": "xfs", "spec": spec}));
    let ended = call_ok(&daemon, "RenderService/WatchRender", &json!({"renderId": started["render"]["id"]}));
    assert_eq!(ended["render"]["state"], "RENDER_STATE_FAILED", "{ended:#}");
    assert!(ended.to_string().contains("keeper.mounts is off"), "{ended:#}");
    render(&daemon, &image, "ext4-1", "RAW", &json!({}));
}
