//! The worker that reads foreign bytes: the same golden image as without it, nothing it may not do, nothing left when it dies.
//!
//! Needs root (namespaces, another user); fails without. The misdeeds exist in builds with debug assertions only, which tests are.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::common::{daemon::Daemon, fixture, leak::LeakGuard};
use cloudletd::{
    config::worker::{Confine, Worker},
    disk::Layout,
    error::{Error, Kind, Result},
    fs::{
        FsKind, Profile, ReadAt,
        edit::{Attrs, Edit, EditOp, EditRequest},
    },
    names::{Digest, GuestPath},
    progress::Progress,
    render::{
        golden::{BuiltDisk, build_disk},
        study::Root,
    },
    store::records::{GoldenBoot, GoldenSpec},
    target::Pacer,
    tree::decompress::Compression,
    units::{Bytes, MIB, Timestamp},
    worker::Launcher,
};

/// Killed for a system call.
const SIGSYS: &str = "SIGSYS";

fn spec(size_bytes: u64) -> GoldenSpec {
    GoldenSpec {
        rootfs: Digest::of(b"worker test"),
        prefix: None,
        volatile: vec!["/tmp/.*".into()],
        templates: vec!["/etc/hostname".into()],
        filesystem: FsKind::Ext4,
        profile: Profile::Modern,
        label: "root".into(),
        bytes_per_inode: 16384,
        layout: Layout::Bare,
        size_bytes,
        arch: "x86_64".into(),
        boot: GoldenBoot::default(),
    }
}

fn launcher(confine: Confine) -> Launcher {
    Launcher::new(&Worker { confine, ..Worker::default() }).with_program(env!("CARGO_BIN_EXE_cloudletd"))
}

struct Build {
    dir: tempfile::TempDir,
    result: Result<BuiltDisk>,
}

fn build_with(launcher: &Launcher, pacer: Pacer, blob: &Path, declared: Option<Compression>, size_bytes: u64) -> Build {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let dir = tempfile::tempdir().expect("temporary directory");
    let progress = Progress::default();
    let result = build_disk(dir.path(), blob, declared, &spec(size_bytes), launcher, &Arc::new(pacer), &progress);
    if result.is_ok() {
        let reading = progress.reading();
        assert!((1..=reading.bytes_total).contains(&reading.bytes_done), "the daemon knows how far the worker is: {reading:?}");
    }
    Build { dir, result }
}

fn build(launcher: &Launcher, blob: &Path, declared: Option<Compression>) -> Build {
    build_with(launcher, Pacer::default(), blob, declared, 64 * MIB)
}

/// A small archive of all kinds of members.
fn archive(dir: &Path) -> std::path::PathBuf {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("etc")).expect("make a tree");
    fs::write(tree.join("etc/os-release"), "ID=debian\nVERSION_ID=12\n").expect("write");
    fs::write(tree.join("etc/hostname"), "guest\n").expect("write");
    fs::write(tree.join("large"), (0..3_000_000u32).flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>()).expect("write");
    std::os::unix::fs::symlink("etc", tree.join("link")).expect("link");
    let path = dir.join("tree.tar");
    run("tar", &["--create", "--file", path.to_str().expect("text"), "--directory", tree.to_str().expect("text"), "."]);
    path
}

#[track_caller]
fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

#[track_caller]
fn error_of(build: Build) -> Error {
    build.result.expect_err("the build fails")
}

#[test]
fn a_worker_makes_the_same_disk_from_every_kind_of_archive() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let tar = archive(dir.path());
    let path = tar.to_str().expect("text");
    run("gzip", &["--keep", "--fast", path]);
    run("xz", &["--keep", "-0", "--threads=2", "--block-size=1MiB", path]);
    run("zstd", &["--quiet", "--keep", path]);
    run("bzip2", &["--keep", path]);
    let whole = build(&launcher(Confine::Off), &tar, Some(Compression::None));
    let whole_disk = fs::read(whole.dir.path().join("disk.raw")).expect("the disk");
    let want = whole.result.expect("in this process");
    for (end, declared) in [("", None), (".gz", Some(Compression::Gzip)), (".gz", None), (".xz", None), (".zst", None), (".bz2", None)] {
        let blob = dir.path().join(format!("tree.tar{end}"));
        let made = build(&launcher(Confine::Required), &blob, declared);
        let disk = made.result.unwrap_or_else(|error| panic!("{end}: {}", error.chain()));
        assert_eq!((disk.digest, &disk.filesystem), (want.digest, &want.filesystem), "{end}");
        assert!(fs::read(made.dir.path().join("disk.raw")).expect("the disk") == whole_disk, "{end}: other bytes");
        for name in ["facts.json", "boot.json"] {
            let read = |dir: &Path| fs::read(dir.join(name)).expect("written");
            assert_eq!(read(made.dir.path()), read(whole.dir.path()), "{end}: {name}");
        }
    }
}

#[test]
fn a_whole_debian_is_built_by_a_worker_with_the_digest_it_has_without() {
    let tarball = fixture::get("bookworm-ifupdown").tarball;
    let digest = |confine| {
        let begun = Instant::now();
        let built = build_with(&launcher(confine), Pacer::default(), &tarball, None, 2048 * MIB);
        println!("{confine:?}: {} ms", begun.elapsed().as_millis());
        built.result.unwrap_or_else(|error| panic!("{}", error.chain())).digest
    };
    assert_eq!(digest(Confine::Required), digest(Confine::Off));
}

#[test]
fn a_worker_that_makes_a_forbidden_call_is_killed_and_the_build_says_so() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let tar = archive(dir.path());
    for call in ["open", "socket", "execve", "ptrace", "mount", "kill", "fork", "io_uring"] {
        let build = build(&launcher(Confine::Required).with_misdeed(call), &tar, None);
        let mut leaks = LeakGuard::new(build.dir.path());
        let error = error_of(build);
        assert_eq!((error.kind(), error.reason()), (Kind::Internal, "WORKER_DIED"), "{call}: {}", error.chain());
        assert!(error.message().contains(SIGSYS), "{call}: {}", error.chain());
        leaks.check();
    }
}

/// Decoders of large archives have more threads than glibc has heaps before it asks the system for the number of processors.
#[test]
fn a_worker_with_many_threads_that_allocate_asks_for_no_file() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let tar = archive(dir.path());
    let build = build(&launcher(Confine::Required).with_misdeed("many-threads"), &tar, None);
    if let Err(error) = build.result {
        panic!("{}", error.chain());
    }
}

#[test]
fn behind_the_filter_there_is_no_file_no_network_and_no_way_back_to_root() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let tar = archive(dir.path());
    for attempt in ["layer-open", "layer-list", "layer-connect", "layer-exec"] {
        let error = error_of(build(&launcher(Confine::Required).with_misdeed(attempt), &tar, None));
        // 78: it tried and did not succeed; 77: it did.
        assert!(error.message().contains("exit status: 78"), "{attempt}: {}", error.chain());
    }
}

#[test]
fn a_panic_and_hunger_for_memory_end_the_worker_and_not_the_daemon() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let tar = archive(dir.path());
    let error = error_of(build(&launcher(Confine::Required).with_misdeed("panic"), &tar, None));
    assert!(error.message().contains("exit status: 101"), "{}", error.chain());
    let settings = Worker { memory_max: Bytes(256 * MIB), ..Worker::default() };
    let hungry = Launcher::new(&settings).with_program(env!("CARGO_BIN_EXE_cloudletd")).with_misdeed("memory");
    let error = error_of(build(&hungry, &tar, None));
    assert_eq!(error.reason(), "WORKER_DIED", "{}", error.chain());
    assert!(error.message().contains("signal 6"), "an allocation that fails aborts: {}", error.chain());
}

#[test]
fn what_is_wrong_with_an_archive_is_said_as_it_is_without_a_worker() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("bad.tar");
    let tar = archive(dir.path());
    let cut = fs::read(&tar).expect("the archive");
    for (what, bytes) in [("text", b"no archive at all\n".repeat(100)), ("cut", cut[..5000].to_vec()), ("empty", Vec::new())] {
        fs::write(&path, bytes).expect("write");
        let [here, there] = [Confine::Off, Confine::Required].map(|confine| {
            let build = build(&launcher(confine), &path, None);
            let dir = build.dir.path().display().to_string();
            let error = build.result.expect_err("refused");
            (error.chain().replace(&dir, "DIR"), error.kind(), error.stage(), error.reason(), error.hint().map(str::to_owned))
        });
        assert_eq!(here, there, "{what}");
    }
    // A tree that does not fit the disk.
    let [here, there] = [Confine::Off, Confine::Required].map(|confine| {
        let error = error_of(build_with(&launcher(confine), Pacer::default(), &tar, None, 8 * MIB));
        (error.kind(), error.reason())
    });
    assert_eq!(here, there);
    assert_eq!(here.0, Kind::NoSpace);
}

#[test]
fn a_paced_worker_writes_no_faster_than_it_may() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let tar = archive(dir.path());
    let begun = Instant::now();
    let pacer = Pacer::new(Some(8 * MIB), MIB, cloudletd::target::IoPriority::Inherit);
    build_with(&launcher(Confine::Required), pacer, &tar, None, 64 * MIB).result.unwrap_or_else(|error| panic!("{}", error.chain()));
    // 12 MB of content at 8 MiB a second.
    assert!(begun.elapsed() > Duration::from_millis(900), "{:?}", begun.elapsed());
}

#[test]
fn a_cancelled_build_ends_its_worker_at_once() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let tar = archive(dir.path());
    let target = tempfile::tempdir().expect("temporary directory");
    let progress = Progress::default();
    let stopper = progress.clone();
    let cancel = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        stopper.cancel();
    });
    let begun = Instant::now();
    // A byte rate that would take a minute.
    let pacer = Arc::new(Pacer::new(Some(MIB / 8), MIB / 8, cloudletd::target::IoPriority::Inherit));
    let error = build_disk(target.path(), &tar, None, &spec(64 * MIB), &launcher(Confine::Required), &pacer, &progress).expect_err("cancelled");
    cancel.join().expect("no panic");
    assert_eq!(error.kind(), Kind::Cancelled, "{}", error.chain());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

/// Processes of this daemon that are workers.
pub fn workers_of(daemon: u32) -> Vec<i32> {
    let children = fs::read_dir(format!("/proc/{daemon}/task")).expect("a running daemon");
    let is_worker = |pid: &i32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.ends_with(b"\0worker\0"));
    let lists = children.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()).filter(is_worker).collect()
}

#[test]
fn a_worker_killed_in_the_middle_leaves_nothing_in_the_daemons_store() {
    // Slow enough to be caught in the act.
    let daemon = Daemon::start("[limits]\nwrite_bandwidth = '16 MiB'\n");
    let tarball = fixture::get("bookworm-ifupdown").tarball;
    let manifest = serde_json::json!({
        "name": "debian-12", "arch": "x86_64", "entry_points": {"kernel": {"os": "linux"}}, "rootfs": {"url": format!("file://{}", tarball.display())},
    });
    let path = daemon.directory().join("manifest.json");
    File::create(&path).and_then(|mut file| file.write_all(manifest.to_string().as_bytes())).expect("write the manifest");
    let created = daemon.script_ok("create-image.sh", &[path.to_str().expect("text")]);
    let id = created.split_whitespace().find(|word| word.starts_with("img-")).expect("an id").to_owned();
    let killer = {
        let pid = daemon.pid();
        // What read the manifest is one too, and stays.
        let before = workers_of(pid);
        std::thread::spawn(move || {
            let give_up = Instant::now() + Duration::from_secs(30);
            loop {
                assert!(Instant::now() < give_up, "no worker was seen");
                if let Some(worker) = workers_of(pid).iter().find(|worker| !before.contains(worker)) {
                    std::thread::sleep(Duration::from_millis(300));
                    return nix::sys::signal::kill(nix::unistd::Pid::from_raw(*worker), nix::sys::signal::Signal::SIGKILL).is_ok();
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        })
    };
    let output = daemon.script("prerender.sh", &[&id]);
    assert!(killer.join().expect("no panic"), "the worker was there to be killed");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("WORKER_DIED"), "{said}");
    let left = |folder: &str| fs::read_dir(daemon.directory().join("state").join(folder)).map_or(0, |entries| entries.count());
    assert_eq!((left("goldens"), left("tmp")), (0, 0), "a build that failed leaves nothing");
}

/// A guest's disk: an ext4 filesystem in a file, made by mke2fs.
fn guest_disk(dir: &Path) -> (Arc<File>, Root) {
    let path = dir.join("guest.raw");
    fs::write(&path, b"").expect("create");
    File::options().write(true).open(&path).and_then(|file| file.set_len(64 * MIB)).expect("set its size");
    let tree = dir.join("guest");
    fs::create_dir_all(tree.join("etc")).expect("make a tree");
    fs::write(tree.join("etc/hostname"), "guest\n").expect("write");
    fs::write(tree.join("etc/os-release"), "ID=debian\n").expect("write");
    let uuid = "3f0e9a52-1111-4222-8333-444455556666";
    run("mke2fs", &["-q", "-F", "-t", "ext4", "-U", uuid, "-d", tree.to_str().expect("text"), path.to_str().expect("text")]);
    let root = Root { object: "guest".into(), offset: 0, len: 64 * MIB, uuid: uuid.into(), disk_len: 64 * MIB };
    (Arc::new(File::open(path).expect("there")), root)
}

fn edits() -> EditRequest {
    let write = |path: &str, content: Vec<u8>| Edit {
        path: GuestPath::new(path).expect("a path"),
        op: EditOp::WriteFile { content, attrs: Attrs::root(0o600) },
        why: "a test".into(),
        secret: true,
    };
    let edits = vec![write("/etc/hostname", b"moved\n".to_vec()), write("/etc/large", vec![b'x'; 1_000_000])];
    EditRequest { edits, now: Timestamp { secs: 1_800_000_000, nanos: 7 }, ..EditRequest::default() }
}

#[test]
fn a_guests_filesystem_is_read_by_a_process_that_can_do_nothing_else() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let dir = tempfile::tempdir().expect("temporary directory");
    let (disk, root) = guest_disk(dir.path());
    let watched = [GuestPath::new("/etc/hostname").expect("a path")];
    let (progress, reader) = (Progress::default(), || Arc::clone(&disk) as Arc<dyn ReadAt>);
    let study = |confine| launcher(confine).study(reader(), &root, &watched, &progress).unwrap_or_else(|error| panic!("{}", error.chain()));
    let (inside, confined) = (study(Confine::Off), study(Confine::Required));
    assert_eq!(confined.facts().text("/etc/hostname"), Some("guest\n"));
    assert_eq!(inside.facts(), confined.facts());
    let patch = |study: cloudletd::worker::Study| study.edit(&edits(), &progress).unwrap_or_else(|error| panic!("{}", error.chain()));
    let (inside, confined) = (patch(inside), patch(confined));
    assert!(inside.iter().eq(confined.iter()) && confined.len() > 200, "{inside:?} {confined:?}");
    let changed = dir.path().join("changed.raw");
    fs::copy(dir.path().join("guest.raw"), &changed).expect("copy");
    let file = File::options().write(true).open(&changed).expect("there");
    confined.iter().for_each(|(number, block)| std::os::unix::fs::FileExt::write_all_at(&file, block, number * 4096).expect("write"));
    run("e2fsck", &["-fn", changed.to_str().expect("text")]);

    for call in ["open", "socket", "execve", "fork", "panic"] {
        let error = launcher(Confine::Required).with_misdeed(call).study(reader(), &root, &watched, &progress).err().expect(call);
        assert_eq!(error.reason(), "WORKER_DIED", "{call}: {}", error.chain());
    }
    // What is refused has the reason that it has without a worker; what is given up ends the process.
    let other = Root { uuid: uuid::Uuid::nil().to_string(), ..root.clone() };
    for confine in [Confine::Off, Confine::Required] {
        let error = launcher(confine).study(reader(), &other, &watched, &progress).err().expect("another filesystem");
        assert_eq!((error.kind(), error.reason()), (Kind::Conflict, "ROOT_CHANGED"));
        let begun = Instant::now();
        drop(study(confine));
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
}

#[test]
fn a_filesystem_that_was_made_to_hurt_its_reader_hurts_nobody() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (disk, root) = guest_disk(dir.path());
    let progress = Progress::default();
    let mut bytes = fs::read(dir.path().join("guest.raw")).expect("there");
    // The superblock's own fields, the group descriptors, the first inodes: extreme values everywhere.
    let mut refused = 0;
    for at in (1024..1024 + 264).step_by(4).chain((4096..4096 + 64).step_by(4)) {
        let kept = bytes[at..at + 4].to_vec();
        bytes[at..at + 4].copy_from_slice(&0xffff_fff0u32.to_le_bytes());
        let path = dir.path().join("hostile.raw");
        fs::write(&path, &bytes[..2 << 20]).and_then(|()| File::options().write(true).open(&path)?.set_len(64 * MIB)).expect("write");
        let file: Arc<dyn ReadAt> = Arc::new(File::open(&path).expect("there"));
        match cloudletd::render::study::open(file, &root) {
            Ok((view, image)) => {
                let _any = cloudletd::render::study::facts(&image, &[], &progress);
                let _any = cloudletd::render::study::edit(view, &edits(), &progress);
            }
            Err(_) => refused += 1,
        }
        bytes[at..at + 4].copy_from_slice(&kept);
    }
    assert!(refused > 20, "{refused}");
    drop(disk);
}

#[test]
fn the_host_says_which_layers_it_does_not_give() {
    assert_eq!(launcher(Confine::Off).missing_layers().expect("asked nobody"), None);
    let missing = launcher(Confine::Required).missing_layers().expect("a worker can be confined").expect("is confined");
    // Which they are depends on the host; that this one has namespaces follows from being root.
    assert!(missing.iter().all(|layer| !layer.contains("another user")), "{missing:?}");
    println!("missing here: {missing:?}");
}

/// Mounts a disk for reading as long as it lives.
struct Mounted {
    at: tempfile::TempDir,
}

impl Mounted {
    fn new(disk: &Path, kind: &str) -> Mounted {
        let at = tempfile::tempdir().expect("temporary directory");
        let options = if kind == "xfs" { "loop,ro,nouuid,norecovery" } else { "loop,ro" };
        run("mount", &["-t", kind, "-o", options, disk.to_str().expect("text"), at.path().to_str().expect("text")]);
        Mounted { at }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _gone = Command::new("umount").arg(self.at.path()).status();
    }
}

#[test]
fn an_archive_for_xfs_or_btrfs_is_read_by_a_worker_too() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let tar = archive(dir.path());
    run("zstd", &["--quiet", "--keep", tar.to_str().expect("text")]);
    for (kind, filesystem) in [("xfs", FsKind::Xfs), ("btrfs", FsKind::Btrfs)] {
        let build = |confine, blob: &Path, misdeed: Option<&str>| {
            let launcher = misdeed.into_iter().fold(launcher(confine), |launcher, misdeed| launcher.with_misdeed(misdeed));
            let dir = tempfile::tempdir().expect("temporary directory");
            let spec = GoldenSpec { filesystem, ..spec(512 * MIB) };
            let result = build_disk(dir.path(), blob, None, &spec, &launcher, &Arc::new(Pacer::default()), &Progress::default());
            Build { dir, result }
        };
        let zst = dir.path().join("tree.tar.zst");
        let builds = [(Confine::Off, tar.as_path()), (Confine::Required, &tar), (Confine::Required, &zst)].map(|(confine, blob)| {
            let build = build(confine, blob, None);
            if let Err(error) = &build.result {
                panic!("{kind}, {confine:?}: {}", error.chain());
            }
            build.dir
        });
        let facts = |dir: &tempfile::TempDir| fs::read(dir.path().join("facts.json")).expect("written");
        assert!(builds.iter().all(|dir| facts(dir) == facts(&builds[0])), "{kind}: other facts");
        for built in &builds[1..] {
            let (one, other) = (Mounted::new(&builds[0].path().join("disk.raw"), kind), Mounted::new(&built.path().join("disk.raw"), kind));
            let paths = [one.at.path().to_str().expect("text"), other.at.path().to_str().expect("text")];
            run("diff", &["-r", "--no-dereference", paths[0], paths[1]]);
        }
        // What is wrong with an archive has the reason that it has without a worker, wherever in it that is.
        let cut = dir.path().join("cut.tar");
        fs::write(&cut, &fs::read(&tar).expect("there")[..6_000_000]).expect("write");
        for confine in [Confine::Off, Confine::Required] {
            assert_eq!(error_of(build(confine, &cut, None)).reason(), "ARCHIVE_TRUNCATED", "{kind}, {confine:?}");
        }
        for call in ["open", "execve", "mount"] {
            let build = build(Confine::Required, &tar, Some(call));
            let mut leaks = LeakGuard::new(build.dir.path());
            assert_eq!(error_of(build).reason(), "WORKER_DIED", "{kind}, {call}");
            leaks.check();
        }
    }
}
