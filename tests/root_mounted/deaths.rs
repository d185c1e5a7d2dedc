//! What is left when a worker or the daemon is killed: nothing.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use cloudletd::{
    error::Kind,
    fs::{
        Filesystem, FsKind,
        edit::{Attrs, Edit, EditOp, EditRequest},
    },
    progress::Progress,
};

use super::{
    build, disk, engine, loops_of, params,
    tree::{everything, file, meta, path},
    visible_mounts,
};

const MIB: u64 = 1 << 20;
/// Makes this test program act as a daemon, for somebody to kill.
const ACT: &str = "CLOUDLETD_TEST_ACT";

/// Workers whose parent is `parent`, found by their command line.
fn workers_of(parent: u32) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("procfs").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let ppid = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)).and_then(|ppid| ppid.parse::<u32>().ok());
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if ppid == Some(parent) && command.split(|byte| *byte == 0).any(|word| word == b"mount-worker") {
            found.push(pid);
        }
    }
    found
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    // It may have ended by itself.
    let _ended = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

#[track_caller]
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A binding of a loop device: its name, and the sequence number that every new binding changes.
type Binding = (String, String);

fn sequence(name: &str) -> Option<String> {
    let of = |attribute: &str| fs::read_to_string(format!("/sys/block/{name}/{attribute}")).ok();
    of("loop/backing_file").and(of("diskseq"))
}

/// The loop devices that a process has open.
fn loops_in(pid: i32) -> Vec<Binding> {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").flatten();
    let names = links.filter_map(|link| Some(fs::read_link(link.path()).ok()?.to_str()?.strip_prefix("/dev/")?.to_owned()));
    names.filter(|name| name.starts_with("loop")).filter_map(|name| Some((name.clone(), sequence(&name)?))).collect()
}

#[test]
fn nothing_shows_in_the_hosts_mount_table_and_an_abandoned_build_leaves_nothing() {
    let directory = tempfile::tempdir().expect("directory");
    let (golden, region) = disk(directory.path(), "disk.img", 64 * MIB);
    let mut builder = engine(FsKind::Ext4).builder(&params(), region, &Progress::default()).expect("started");
    for (entry, data) in everything().iter().take(10) {
        builder.entry(entry, &mut &data[..]).expect("taken");
    }
    let devices = loops_of(&golden);
    assert_eq!(devices.len(), 1, "the build is on a loop device");
    assert_eq!(visible_mounts(&devices), [] as [String; 0]);
    drop(builder);
    assert_eq!(loops_of(&golden), [] as [PathBuf; 0], "gone when the builder is dropped");
}

#[test]
fn a_cancelled_build_and_edit_stop() {
    let directory = tempfile::tempdir().expect("directory");
    let (golden, region) = disk(directory.path(), "disk.img", 64 * MIB);
    let progress = Progress::default();
    let mut builder = engine(FsKind::Ext4).builder(&params(), region.clone(), &progress).expect("started");
    progress.cancel();
    let (entry, data) = file("/x", b"x", meta(0o644, 0, 0, 1, 0));
    assert_eq!(builder.entry(&entry, &mut &data[..]).expect_err("cancelled").kind(), Kind::Cancelled);
    drop(builder);
    build(FsKind::Ext4, &region, &[]).expect("built");
    let error = engine(FsKind::Ext4).edit(region, &EditRequest::default(), &progress).expect_err("cancelled");
    assert_eq!(error.kind(), Kind::Cancelled);
    assert_eq!(loops_of(&golden), [] as [PathBuf; 0]);
}

/// The acts, each for ever or until killed. Without the variable this test has nothing to do.
#[test]
fn act_as_a_daemon() {
    let Ok(act) = std::env::var(ACT) else { return };
    let (act, golden) = act.split_once(':').expect("act:path");
    let disk = std::sync::Arc::new(fs::File::options().read(true).write(true).open(golden).expect("golden"));
    let region = cloudletd::fs::Region { file: disk, offset: MIB, len: fs::metadata(golden).expect("size").len() - 2 * MIB };
    match act {
        "build" => {
            let mut builder = engine(FsKind::Xfs).builder(&params(), region, &Progress::default()).expect("started");
            for number in 0u64.. {
                let (entry, data) = file(format!("/d{}/f{number}", number % 50), &[number as u8; 20_000], meta(0o644, 0, 0, 1, 0));
                if builder.entry(&entry, &mut &data[..]).is_err() {
                    std::thread::sleep(Duration::from_secs(60));
                }
            }
        }
        "edit" => {
            let write = |n: u32| EditOp::WriteFile { content: vec![n as u8; 100], attrs: Attrs::root(0o644) };
            let edits = (0..200_000).map(|n| Edit { path: path(format!("/f{}", n % 100)), op: write(n), why: String::new(), secret: false });
            let request = EditRequest { edits: edits.collect(), ..EditRequest::default() };
            let ended = engine(FsKind::Xfs).edit(region, &request, &Progress::default());
            panic!("the edit ended by itself: {ended:?}");
        }
        other => panic!("no such act: {other}"),
    }
}

fn start_act(act: &str, golden: &Path) -> Child {
    Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "deaths::act_as_a_daemon", "--nocapture"])
        .env(ACT, format!("{act}:{}", golden.display()))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("started")
}

#[test]
fn killing_worker_or_daemon_leaves_no_loop_device_and_no_process() {
    for (act, victim) in [("build", "worker"), ("build", "daemon"), ("edit", "worker"), ("edit", "daemon")] {
        for wait_ms in [300, 900] {
            let directory = tempfile::tempdir().expect("directory");
            let (golden, region) = disk(directory.path(), "disk.img", 300 * MIB);
            if act == "edit" {
                build(FsKind::Xfs, &region, &everything()).expect("built");
            }
            let mut daemon = start_act(act, &golden);
            eventually("the worker runs", || !workers_of(daemon.id()).is_empty());
            std::thread::sleep(Duration::from_millis(wait_ms));
            let workers = workers_of(daemon.id());
            let bindings: Vec<Binding> = workers.iter().copied().flat_map(loops_in).collect();
            assert!(!bindings.is_empty(), "the {act} is on a loop device");
            match victim {
                "worker" => workers.iter().copied().for_each(kill),
                _ => daemon.kill().expect("killed"),
            }
            let gone = |pid: i32| fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "));
            eventually(&format!("{act}: the worker is gone after the {victim} was killed"), || workers.iter().copied().all(gone));
            eventually(&format!("{act}: no loop device on the golden after the {victim} was killed"), || loops_of(&golden).is_empty());
            let unbound = |(name, before): &Binding| sequence(name).as_ref() != Some(before);
            eventually(&format!("{act}: {bindings:?} are unbound after the {victim} was killed"), || bindings.iter().all(unbound));
            // It may have ended with its worker.
            let _ended = daemon.kill();
            daemon.wait().expect("reaped");
            assert_eq!(visible_mounts(&[]), [] as [String; 0]);
        }
    }
}
