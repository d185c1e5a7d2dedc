//! XFS, btrfs and ext4 by the host's kernel: build, edit, hostile trees, deaths. Needs root, loop devices, FUSE, and the Debian packages xfsprogs,
//! btrfs-progs, e2fsprogs, mount and util-linux.

mod deaths;
mod tree;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use cloudletd::{
    error::Kind,
    fs::{
        BuildParams, BuiltFs, Filesystem, FsKind, Profile, Region,
        edit::{Attrs, Edit, EditOp, EditRequest},
        mounted::Mounted,
        patch::BlockPatch,
    },
    names::Digest,
    progress::Progress,
    tree::{EntryKind, Xattr},
    units::Timestamp,
};
use tree::{Member, assert_same, directory, everything, expectation, file, found, member, meta, path};

const MIB: u64 = 1 << 20;
const EPOCH: i64 = 1_650_000_000;
const OFFSET: u64 = MIB;
const NOW: Timestamp = Timestamp { secs: 1_750_000_000, nanos: 5 };
const KINDS: [FsKind; 3] = [FsKind::Ext4, FsKind::Xfs, FsKind::Btrfs];

pub fn engine(kind: FsKind) -> Mounted {
    assert!(rustix::process::geteuid().is_root(), "these tests need root");
    Mounted::new(kind).with_program(env!("CARGO_BIN_EXE_cloudletd"))
}

pub fn params() -> BuildParams {
    BuildParams {
        uuid: *b"golden-uuid-0123",
        hash_seed: *b"golden-seed-0123",
        label: "golden".into(),
        profile: Profile::Modern,
        epoch_secs: EPOCH,
        bytes_per_inode: 16384,
    }
}

fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C").output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed by this test: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {} {text}", output.status);
    text
}

/// A disk file with a filesystem's region of `len` bytes behind 1 MiB of something else.
pub fn disk(directory: &Path, name: &str, len: u64) -> (PathBuf, Region) {
    let path = directory.join(name);
    let file = File::options().read(true).write(true).create_new(true).open(&path).expect("disk file");
    file.set_len(OFFSET + len + MIB).expect("sparse");
    for at in [0, OFFSET + len] {
        file.write_all_at(&[0xa5; MIB as usize], at).expect("guard");
    }
    (path, Region { file: Arc::new(file), offset: OFFSET, len })
}

pub fn build(kind: FsKind, region: &Region, members: &[Member]) -> cloudletd::error::Result<BuiltFs> {
    let mut builder = engine(kind).builder(&params(), region.clone(), &Progress::default())?;
    for (entry, data) in members {
        builder.entry(entry, &mut &data[..])?;
    }
    builder.finish()
}

/// The region as a file of its own, with the patch applied, sparse.
fn extract(region: &Region, patch: &BlockPatch, to: &Path) {
    let file = File::options().read(true).write(true).create_new(true).open(to).expect("image");
    file.set_len(patch.size_bytes().max(region.len)).expect("sparse");
    let mut buffer = vec![0; MIB as usize];
    for at in (0..region.len).step_by(MIB as usize) {
        let len = (region.len - at).min(MIB) as usize;
        region.file.read_exact_at(&mut buffer[..len], region.offset + at).expect("read");
        if buffer[..len].iter().any(|byte| *byte != 0) {
            file.write_all_at(&buffer[..len], at).expect("write");
        }
    }
    for (number, block) in patch.iter() {
        file.write_all_at(block, number * 4096).expect("patch");
    }
}

fn fsck(kind: FsKind, image: &Path) {
    let image = image.to_str().expect("text");
    match kind {
        FsKind::Ext4 => tool("e2fsck", &["-fn", image]),
        FsKind::Xfs => tool("xfs_repair", &["-n", "-f", image]),
        FsKind::Btrfs => tool("btrfs", &["check", "--readonly", image]),
    };
}

/// Mounted read-only while it lives, by its real identity (no nouuid).
struct View(PathBuf);

impl View {
    fn new(image: &Path, kind: FsKind) -> Self {
        let at = image.with_extension("mnt");
        fs::create_dir(&at).expect("mount point");
        let options = "ro,loop,nodev,nosuid,noexec";
        tool("mount", &["-t", kind.name(), "-o", options, image.to_str().expect("text"), at.to_str().expect("text")]);
        View(at)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // Another test's thread may be between fork and exec, with a copy of our descriptors.
        let unmount = || Command::new("umount").arg(&self.0).stderr(std::process::Stdio::null()).status().is_ok_and(|status| status.success());
        let done = (0..50).any(|attempt| {
            std::thread::sleep(std::time::Duration::from_millis(attempt * 2));
            unmount()
        });
        assert!(done || std::thread::panicking(), "umount {}", self.0.display());
    }
}

fn digest(file: &File) -> Digest {
    let mut bytes = Vec::new();
    let mut reader = io::BufReader::new(file.try_clone().expect("clone"));
    io::Seek::rewind(&mut reader).expect("rewind");
    io::Read::read_to_end(&mut reader, &mut bytes).expect("read");
    Digest::of(&bytes)
}

fn blkid(image: &Path, tag: &str) -> String {
    tool("blkid", &["-p", "-o", "value", "-s", tag, image.to_str().expect("text")]).trim().to_owned()
}

/// Loop devices on the file, and whether any of them is in this (the host's) mount table.
pub fn loops_of(path: &Path) -> Vec<PathBuf> {
    cloudletd::host::loops::find_by_backing(path).expect("list loop devices")
}

/// Lines of the mount table that have to do with the engine.
pub fn visible_mounts(loops: &[PathBuf]) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let ours = |line: &&str| line.contains(" cloudletd ") || loops.iter().any(|device| line.contains(&format!(" {} ", device.display())));
    table.lines().filter(ours).map(str::to_owned).collect()
}

fn size_of(kind: FsKind) -> u64 {
    engine(kind).size_min().max(64 * MIB)
}

#[test]
fn a_built_tree_has_every_property_of_its_entries() {
    for kind in KINDS {
        let directory = tempfile::tempdir().expect("directory");
        let (golden, region) = disk(directory.path(), "disk.img", size_of(kind));
        let members = everything();
        let built = build(kind, &region, &members).expect("built");
        assert_eq!((built.kind, built.size_bytes), (kind, region.len));
        assert!(built.used_bytes > 500_000 && built.used_bytes < region.len, "{built:?}");
        assert_eq!(loops_of(&golden), [] as [PathBuf; 0]);
        let mut guard = vec![0; MIB as usize];
        for at in [0, OFFSET + region.len] {
            region.file.read_exact_at(&mut guard, at).expect("read");
            assert!(guard.iter().all(|byte| *byte == 0xa5), "{kind:?} wrote outside of its region");
        }
        let image = directory.path().join("fs.img");
        extract(&region, &BlockPatch::default(), &image);
        fsck(kind, &image);
        assert_eq!(blkid(&image, "UUID"), "676f6c64-656e-2d75-7569-642d30313233");
        assert_eq!(blkid(&image, "LABEL"), "golden");
        let view = View::new(&image, kind);
        let wanted = expectation(&members, EPOCH);
        assert_same(&found(&view.0), &wanted);
        let inodes: std::collections::BTreeSet<u64> = walk_inodes(&view.0);
        assert_eq!(built.inodes, inodes.len() as u64, "{kind:?}");
        let hole = fs::metadata(view.0.join("hole")).expect("there");
        assert_eq!((hole.len(), hole.blocks()), (1 << 30, 0));
        assert!(fs::metadata(view.0.join("sparse")).expect("there").blocks() * 512 < 200_000, "holes are kept");
    }
}

fn walk_inodes(root: &Path) -> std::collections::BTreeSet<u64> {
    let mut inodes = std::collections::BTreeSet::new();
    let mut pending = vec![root.to_owned()];
    while let Some(at) = pending.pop() {
        let stat = fs::symlink_metadata(&at).expect("stat");
        inodes.insert(stat.ino());
        if stat.is_dir() {
            pending.extend(fs::read_dir(&at).expect("list").map(|entry| entry.expect("entry").path()));
        }
    }
    inodes
}

#[test]
fn hostile_members_are_refused_and_the_build_goes_on() {
    let directory_ = tempfile::tempdir().expect("directory");
    let (_, region) = disk(directory_.path(), "disk.img", size_of(FsKind::Ext4));
    let mut builder = engine(FsKind::Ext4).builder(&params(), region.clone(), &Progress::default()).expect("started");
    let plain = || meta(0o644, 0, 0, 1, 0);
    let good = [
        member("/link", EntryKind::Symlink { target: b"/etc".to_vec() }, plain()),
        member("/up", EntryKind::Symlink { target: b"../../../../../../tmp".to_vec() }, plain()),
        file("/file", b"x", plain()),
        directory("/etc", meta(0o755, 0, 0, 2, 0)),
        file("/etc/passwd", b"root", plain()),
    ];
    for (entry, data) in &good {
        builder.entry(entry, &mut &data[..]).expect("a good entry");
    }
    let link = |at: &str, to: &str| member(at, EntryKind::HardLink { target: path(to) }, plain());
    let bad = [
        file("/link/evil", &[7; 3_000_000], plain()),
        file("/up/evil", b"evil", plain()),
        file("/up/deeper/evil", b"evil", plain()),
        file("/file/below", b"evil", plain()),
        file("/etc", b"evil", plain()),
        member("/etc", EntryKind::Symlink { target: b"/tmp".to_vec() }, plain()),
        link("/hard", "/missing"),
        link("/hard", "/etc"),
        link("/hard", "/link/passwd"),
        link("/link/hard", "/file"),
        file("/", b"root", plain()),
    ];
    for (entry, data) in &bad {
        let error = builder.entry(entry, &mut &data[..]).expect_err("refused");
        assert_eq!(error.kind(), Kind::Corrupt, "{entry:?}: {error:?}");
    }
    builder.finish().expect("finished");
    assert!(!Path::new("/tmp/evil").exists(), "a link in the tree led to the host");
    let image = directory_.path().join("fs.img");
    extract(&region, &BlockPatch::default(), &image);
    fsck(FsKind::Ext4, &image);
    let view = View::new(&image, FsKind::Ext4);
    let wanted = expectation(&good, EPOCH);
    assert_same(&found(&view.0), &wanted);
}

#[test]
fn a_full_filesystem_and_a_short_reader_are_errors() {
    let directory = tempfile::tempdir().expect("directory");
    let (golden, region) = disk(directory.path(), "disk.img", 16 * MIB);
    let big = file("/big", &vec![1; 40 << 20], meta(0o644, 0, 0, 1, 0));
    let error = build(FsKind::Ext4, &region, &[big]).expect_err("full");
    assert_eq!(error.kind(), Kind::NoSpace, "{error:?}");
    let mut builder = engine(FsKind::Ext4).builder(&params(), region.clone(), &Progress::default()).expect("started");
    let (entry, _) = file("/short", &[1; 1000], meta(0o644, 0, 0, 1, 0));
    assert_eq!(builder.entry(&entry, &mut &[0; 10][..]).expect_err("short").kind(), Kind::Corrupt);
    assert!(builder.finish().is_err());
    let small = disk(directory.path(), "small.img", 8 * MIB).1;
    assert_eq!(build(FsKind::Ext4, &small, &[]).expect_err("too small").kind(), Kind::NoSpace);
    assert_eq!(loops_of(&golden), [] as [PathBuf; 0]);
}

#[test]
fn a_finished_tree_is_read_without_a_change_and_links_do_not_lead_out_of_it() {
    let directory = tempfile::tempdir().expect("directory");
    for kind in KINDS {
        let (path, region) = disk(directory.path(), kind.name(), size_of(kind));
        let large: Vec<u8> = (0..3_500_000u32).flat_map(u32::to_le_bytes).collect();
        let link = |at: &str, target: &str| member(at, EntryKind::Symlink { target: target.into() }, meta(0o777, 0, 0, EPOCH, 0));
        let members = [
            tree::directory("/boot", meta(0o700, 0, 0, EPOCH, 0)),
            file("/boot/vmlinuz-1", &large, meta(0o600, 0, 0, EPOCH, 0)),
            file("/boot/empty", b"", meta(0, 5, 5, EPOCH, 0)),
            link("/vmlinuz", "boot/vmlinuz-1"),
            link("/boot/absolute", "/boot/empty"),
            link("/boot/out", "../../../../../../etc/passwd"),
            link("/boot/loop", "loop"),
            member("/boot/fifo", EntryKind::Fifo, meta(0o600, 0, 0, EPOCH, 0)),
            member("/boot/null", EntryKind::CharDevice { major: 1, minor: 3 }, meta(0o666, 0, 0, EPOCH, 0)),
        ];
        build(kind, &region, &members).expect("built");
        let before = digest(&region.file);
        // As a golden is kept, and as it is opened.
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444)).expect("chmod");
        let only_read = Region { file: Arc::new(File::open(&path).expect("open")), ..region.clone() };
        let reader = engine(kind).tree(&only_read).expect("mounted for reading");
        assert!(visible_mounts(&loops_of(&path)).is_empty(), "nobody else sees it");
        for at in ["/boot/vmlinuz-1", "/vmlinuz"] {
            assert!(reader.read(at, 1 << 30).expect("read").is_some_and(|bytes| bytes == large), "{} {at}", kind.name());
        }
        assert_eq!(reader.read("/vmlinuz", 1000).expect_err("too large").kind(), Kind::NoSpace);
        assert_eq!(reader.read("/boot/absolute", 10).expect("read"), Some(Vec::new()), "after a refusal the conversation goes on");
        for nothing in ["/boot/out", "/boot/loop", "/boot/fifo", "/boot/null", "/boot", "/boot/vmlinuz-1/x", "/nowhere/x"] {
            assert_eq!(reader.read(nothing, 1 << 20).expect("no file"), None, "{} {nothing}", kind.name());
        }
        assert_eq!(reader.list("/boot").expect("listed"), ["absolute", "empty", "fifo", "loop", "null", "out", "vmlinuz-1"]);
        assert!(reader.list("/vmlinuz").expect("none").is_empty() && reader.list("/nowhere").expect("none").is_empty());
        drop(reader);
        assert_eq!(digest(&region.file), before, "{}: reading changed it", kind.name());
        assert!(loops_of(&path).is_empty(), "a loop device is left");
    }
}

fn edit(at: &str, op: EditOp) -> Edit {
    Edit { path: path(at), op, why: "a test".into(), secret: false }
}

fn edits() -> Vec<Edit> {
    let attrs = |mode| Attrs { mode, uid: 1, gid: 2, xattrs: vec![Xattr { name: b"user.k".to_vec(), value: b"v".to_vec() }] };
    vec![
        edit("/etc/hostname", EditOp::WriteFile { content: b"instance\n".to_vec(), attrs: Attrs::root(0o644) }),
        edit("/usr/bin/sudo-link", EditOp::WriteFile { content: b"apart".to_vec(), attrs: attrs(0o4711) }),
        edit("/bin/through-link", EditOp::WriteFile { content: b"followed inside".to_vec(), attrs: Attrs::root(0o600) }),
        edit("/new/deep/file", EditOp::WriteFile { content: vec![3; 50_000], attrs: Attrs::root(0o644) }),
        edit("/srv/shared/made", EditOp::WriteFile { content: b"no acl".to_vec(), attrs: Attrs::root(0o640) }),
        edit("/usr/bin/ping", EditOp::AppendFile { content: b"tail".to_vec() }),
        edit("/home/user/.ssh", EditOp::MakeDir { attrs: Attrs { mode: 0o700, uid: 1000, gid: 1000, xattrs: Vec::new() } }),
        edit("/var/mail", EditOp::MakeDir { attrs: Attrs::root(0o2755) }),
        edit("/etc/resolv.conf", EditOp::Symlink { target: b"../run/resolv.conf".to_vec(), attrs: Attrs::root(0o777) }),
        edit("/etc/mtab", EditOp::Symlink { target: b"/proc/mounts".to_vec(), attrs: Attrs::root(0o777) }),
        edit("/many", EditOp::Remove),
        edit("/nothing/here", EditOp::Remove),
        edit("/usr/bin/sudo", EditOp::SetAttrs { mode: None, owner: Some((7, 8)) }),
        edit("/etc/shadow", EditOp::SetAttrs { mode: Some(0o600), owner: None }),
        edit("/srv/user", EditOp::SetXattr { name: b"user.comment".to_vec(), value: None }),
        edit("/srv/user", EditOp::SetXattr { name: b"user.new".to_vec(), value: Some(b"1".to_vec()) }),
        edit("/etc/issue", EditOp::Rename { to: path("/moved/issue") }),
        edit("/opt", EditOp::Rename { to: path("/gone") }),
    ]
}

/// The same edits on the expectation.
fn expected_after_edits(members: &[Member]) -> BTreeMap<Vec<u8>, tree::Expected> {
    let now = (NOW.secs, i64::from(NOW.nanos));
    let mut wanted = expectation(members, EPOCH);
    let template = wanted[&b"/etc/hostname"[..]].clone();
    let of = |kind, content: &[u8], mode, owner, xattrs: &[(&[u8], &[u8])]| tree::Expected {
        kind,
        content: content.to_vec(),
        mode,
        owner,
        mtime: now,
        xattrs: xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect(),
        ..template.clone()
    };
    let mut put = |at: &str, expected| wanted.insert(at.as_bytes().to_vec(), expected);
    put("/etc/hostname", of("file", b"instance\n", 0o644, (0, 0), &[]));
    put("/usr/bin/sudo-link", of("file", b"apart", 0o4711, (1, 2), &[(b"user.k", b"v")]));
    put("/usr/bin/through-link", of("file", b"followed inside", 0o600, (0, 0), &[]));
    for made in ["/new", "/new/deep", "/home", "/home/user", "/moved"] {
        put(made, of("directory", b"", 0o755, (0, 0), &[]));
    }
    put("/new/deep/file", of("file", &[3; 50_000], 0o644, (0, 0), &[]));
    put("/srv/shared/made", of("file", b"no acl", 0o640, (0, 0), &[]));
    put("/home/user/.ssh", of("directory", b"", 0o700, (1000, 1000), &[]));
    put("/etc/resolv.conf", of("symlink", b"../run/resolv.conf", 0o777, (0, 0), &[]));
    put("/etc/mtab", of("symlink", b"/proc/mounts", 0o777, (0, 0), &[]));
    wanted.retain(|name, _| name != b"/many" && !name.starts_with(b"/many/"));
    let mut change = |at: &str, with: &mut dyn FnMut(&mut tree::Expected)| with(wanted.get_mut(at.as_bytes()).expect("there"));
    change("/usr/bin/ping", &mut |e| {
        e.content.extend(b"tail");
        e.mtime = now;
    });
    change("/var/mail", &mut |e| (e.mode, e.owner) = (0o2755, (0, 0)));
    change("/usr/bin/sudo", &mut |e| (e.owner, e.links) = ((7, 8), 1));
    change("/etc/shadow", &mut |e| e.mode = 0o600);
    change("/srv/user", &mut |e| {
        e.xattrs.remove(&b"user.comment"[..]);
        e.xattrs.insert(b"user.new".to_vec(), b"1".to_vec());
    });
    for (from, to) in [("/etc/issue", "/moved/issue"), ("/opt", "/gone")] {
        let moved = wanted.remove(from.as_bytes()).expect("there");
        wanted.insert(to.as_bytes().to_vec(), moved);
    }
    for touched in ["/", "/etc", "/usr/bin", "/srv/shared"] {
        wanted.get_mut(touched.as_bytes()).expect("there").mtime = now;
    }
    wanted
}

#[test]
fn an_edit_is_a_clean_patch_and_the_golden_is_only_read() {
    for kind in KINDS {
        let directory = tempfile::tempdir().expect("directory");
        let (golden, region) = disk(directory.path(), "disk.img", size_of(kind));
        let members = everything();
        build(kind, &region, &members).expect("built");
        let before = digest(&region.file);
        // A golden is immutable: it is opened for reading only.
        let read_only = Region { file: Arc::new(File::open(&golden).expect("golden")), ..region.clone() };
        for grow in [None, Some(size_of(kind) * 3 + 12_345)] {
            let request =
                EditRequest { edits: edits(), uuid: Some(*b"instance-uuid-01"), label: Some("instance".into()), size_bytes: grow, now: NOW };
            let started = std::time::Instant::now();
            let patch = engine(kind).edit(read_only.clone(), &request, &Progress::default()).expect("edited");
            println!("{kind:?} grow {grow:?}: {patch:?} in {:?}", started.elapsed());
            assert_eq!(patch.size_bytes(), grow.map_or(region.len, |size| size / 4096 * 4096));
            assert!(patch.len() < 4000, "{kind:?}: {} blocks changed", patch.len());
            assert_eq!(digest(&region.file), before, "{kind:?}: the golden changed");
            let image = directory.path().join(format!("instance-{}.img", grow.is_some()));
            extract(&region, &patch, &image);
            fsck(kind, &image);
            assert_eq!(blkid(&image, "UUID"), "696e7374-616e-6365-2d75-7569642d3031");
            assert_eq!(blkid(&image, "LABEL"), "instance");
            let view = View::new(&image, kind);
            assert_same(&found(&view.0), &expected_after_edits(&members));
            let stat = rustix::fs::statvfs(&view.0).expect("statvfs");
            let shown = stat.f_blocks * stat.f_frsize;
            assert!(shown <= patch.size_bytes() && shown * 100 > patch.size_bytes() * 60, "{kind:?} shows {shown} of {}", patch.size_bytes());
        }
        assert_eq!(loops_of(&golden), [] as [PathBuf; 0]);
    }
}

#[test]
fn a_second_edit_of_a_patched_xfs_finds_a_valid_log() {
    // The log's records got another UUID and new checksums: the kernel must take them when it mounts read-write.
    let directory = tempfile::tempdir().expect("directory");
    let (_, region) = disk(directory.path(), "disk.img", size_of(FsKind::Xfs));
    build(FsKind::Xfs, &region, &everything()).expect("built");
    let mut image = region;
    for round in 0..3u8 {
        let write = EditOp::WriteFile { content: vec![round; 100_000], attrs: Attrs::root(0o644) };
        let edits = vec![edit(&format!("/round/{round}"), write), edit("/many", EditOp::Remove)];
        let request = EditRequest { edits, uuid: Some([round + 1; 16]), label: None, size_bytes: None, now: NOW };
        let patch = engine(FsKind::Xfs).edit(image.clone(), &request, &Progress::default()).expect("edited");
        let path = directory.path().join(format!("round-{round}.img"));
        extract(&image, &patch, &path);
        fsck(FsKind::Xfs, &path);
        let mount_point = path.with_extension("rw");
        fs::create_dir(&mount_point).expect("mount point");
        let at = mount_point.to_str().expect("text");
        let copy = path.with_extension("copy");
        fs::copy(&path, &copy).expect("copied");
        tool("mount", &["-t", "xfs", "-o", "loop", copy.to_str().expect("text"), at]);
        fs::write(mount_point.join("written"), b"by the guest").expect("writable");
        tool("umount", &[at]);
        fsck(FsKind::Xfs, &copy);
        let file = File::options().read(true).open(&path).expect("image");
        let len = file.metadata().expect("size").len();
        image = Region { file: Arc::new(file), offset: 0, len };
    }
}

#[test]
fn edits_that_cannot_be_are_refused() {
    let directory = tempfile::tempdir().expect("directory");
    let (_, region) = disk(directory.path(), "disk.img", size_of(FsKind::Ext4));
    let mut members = everything();
    let link = |at: &str, target: &[u8]| member(at, EntryKind::Symlink { target: target.to_vec() }, meta(0o777, 0, 0, 1, 0));
    members.extend([link("/dangling", b"/not/there"), link("/loop", b"loop"), link("/climbs", b"../../tmp"), link("/abs", b"/etc")]);
    build(FsKind::Ext4, &region, &members).expect("built");
    let write = || EditOp::WriteFile { content: b"x".to_vec(), attrs: Attrs::root(0o644) };
    let table = [
        ("/dangling/x", write(), Kind::Conflict),
        ("/loop/x", write(), Kind::Conflict),
        ("/climbs/x", write(), Kind::Conflict),
        ("/etc/hostname/x", write(), Kind::Conflict),
        ("/etc", write(), Kind::Conflict),
        ("/", EditOp::Remove, Kind::InvalidRequest),
        ("/etc/missing", EditOp::AppendFile { content: b"x".to_vec() }, Kind::NotFound),
        ("/abs", EditOp::AppendFile { content: b"x".to_vec() }, Kind::Conflict),
        ("/etc/hostname", EditOp::MakeDir { attrs: Attrs::root(0o755) }, Kind::Conflict),
        ("/etc/missing", EditOp::SetAttrs { mode: Some(0o600), owner: None }, Kind::NotFound),
        ("/missing", EditOp::Rename { to: path("/x") }, Kind::NotFound),
        ("/usr", EditOp::Rename { to: path("/usr/bin/usr") }, Kind::InvalidRequest),
        ("/etc/hostname", EditOp::Rename { to: path("/usr") }, Kind::Conflict),
    ];
    for (at, op, kind) in table {
        let verb = op.verb();
        let request = EditRequest { edits: vec![edit(at, op)], now: NOW, ..EditRequest::default() };
        let error = engine(FsKind::Ext4).edit(region.clone(), &request, &Progress::default()).expect_err("refused");
        assert_eq!(error.kind(), kind, "{verb} {at}: {error:?}");
    }
    let request = EditRequest { edits: vec![edit("/abs/inside", write())], now: NOW, ..EditRequest::default() };
    engine(FsKind::Ext4).edit(region.clone(), &request, &Progress::default()).expect("an absolute link means the tree's root");
    let shrink = EditRequest { size_bytes: Some(region.len - 4096), now: NOW, ..EditRequest::default() };
    assert_eq!(engine(FsKind::Ext4).edit(region, &shrink, &Progress::default()).expect_err("shrinks").kind(), Kind::InvalidRequest);
}

#[test]
fn a_patch_beyond_the_limit_is_refused_with_its_name() {
    for kind in KINDS {
        let directory = tempfile::tempdir().expect("directory");
        let (golden, region) = disk(directory.path(), "disk.img", size_of(kind));
        build(kind, &region, &[]).expect("built");
        let write = EditOp::WriteFile { content: (0..16 << 20).map(|i: u32| (i / 7) as u8).collect(), attrs: Attrs::root(0o644) };
        let request = EditRequest { edits: vec![edit("/big", write)], now: NOW, ..EditRequest::default() };
        let small = engine(kind).with_patch_bytes_max(8 * MIB);
        let error = small.edit(region, &request, &Progress::default()).expect_err("too much");
        assert_eq!(error.kind(), Kind::NoSpace, "{kind:?}: {error:?}");
        assert!(error.message().contains("8 MiB"), "{error:?}");
        assert_eq!(loops_of(&golden), [] as [PathBuf; 0]);
    }
}

#[test]
fn concurrent_edits_of_one_golden_do_not_disturb_each_other() {
    for kind in KINDS {
        let directory = tempfile::tempdir().expect("directory");
        let (_, region) = disk(directory.path(), "disk.img", size_of(kind));
        build(kind, &region, &everything()).expect("built");
        std::thread::scope(|scope| {
            for number in 1..=4u8 {
                let (region, directory) = (region.clone(), directory.path());
                scope.spawn(move || {
                    let write = EditOp::WriteFile { content: vec![number; 1000], attrs: Attrs::root(0o644) };
                    let (edits, uuid) = (vec![edit("/number", write)], Some([number; 16]));
                    let request = EditRequest { edits, uuid, now: NOW, ..EditRequest::default() };
                    let patch = engine(kind).edit(region.clone(), &request, &Progress::default()).expect("edited");
                    let image = directory.join(format!("instance-{number}.img"));
                    extract(&region, &patch, &image);
                    fsck(kind, &image);
                    let view = View::new(&image, kind);
                    assert_eq!(fs::read(view.0.join("number")).expect("read"), [number; 1000]);
                });
            }
        });
    }
}

#[test]
fn every_profile_of_ext4_and_an_empty_label_can_be_built_and_edited() {
    for (kind, profile) in [
        (FsKind::Ext4, Profile::Modern),
        (FsKind::Ext4, Profile::Grub206),
        (FsKind::Ext4, Profile::Compat),
        (FsKind::Xfs, Profile::Modern),
        (FsKind::Btrfs, Profile::Modern),
    ] {
        let directory = tempfile::tempdir().expect("directory");
        let (_, region) = disk(directory.path(), "disk.img", size_of(kind));
        let params = BuildParams { label: String::new(), profile, ..params() };
        let mut builder = engine(kind).builder(&params, region.clone(), &Progress::default()).expect("started");
        let (entry, data) = file("/etc/hostname", b"golden", meta(0o644, 0, 0, 1, 0));
        builder.entry(&entry, &mut &data[..]).expect("taken");
        builder.finish().expect("built");
        let write = EditOp::WriteFile { content: b"instance".to_vec(), attrs: Attrs::root(0o644) };
        let (edits, uuid) = (vec![edit("/etc/hostname", write)], Some([9; 16]));
        let request = EditRequest { edits, uuid, size_bytes: Some(region.len * 2), now: NOW, ..EditRequest::default() };
        let patch = engine(kind).edit(region.clone(), &request, &Progress::default()).expect("edited");
        let image = directory.path().join("instance.img");
        extract(&region, &patch, &image);
        fsck(kind, &image);
        assert_eq!(blkid(&image, "UUID"), "09090909-0909-0909-0909-090909090909");
        let view = View::new(&image, kind);
        assert_eq!(fs::read(view.0.join("etc/hostname")).expect("read"), b"instance");
    }
}

#[test]
fn labels_without_room_are_refused() {
    let directory = tempfile::tempdir().expect("directory");
    let (_, region) = disk(directory.path(), "disk.img", size_of(FsKind::Xfs));
    for (kind, label) in
        [(FsKind::Xfs, "thirteen-long"), (FsKind::Ext4, "seventeen-bytes-x"), (FsKind::Xfs, "-L"), (FsKind::Btrfs, "a/b"), (FsKind::Ext4, "a\n")]
    {
        let params = BuildParams { label: label.into(), ..params() };
        let Err(error) = engine(kind).builder(&params, region.clone(), &Progress::default()) else { panic!("{label:?} was taken") };
        assert_eq!(error.kind(), Kind::InvalidRequest, "{label:?}");
    }
}
