//! The tar reader against GNU tar and Python's tarfile: archives made by either, read by all, must be one tree (failures.md, rule 18).
//!
//! Needs `tar`, `python3`, `gzip`, `xz`, `bzip2` and `zstd`, and a temporary directory with extended attributes. Root is not needed; with it, owners,
//! device nodes and privileged attributes are compared too.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File, FileTimes},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use cloudletd::{
    error::{Error, Kind},
    names::GuestPath,
    progress::Progress,
    tree::{
        EntryKind,
        archive::{self, Limits},
        decompress::{self, Compression},
        model::Model,
    },
};
use sha2::{Digest, Sha256};

/// What two readers must agree on. Times of symlinks and modes of symlinks are not among it: extracting does not always keep them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    kind: String,
    mode: Option<u32>,
    owner: Option<(u32, u32)>,
    mtime: Option<(i64, i64)>,
    /// The first of the names of this node.
    first_name: String,
    xattrs: BTreeMap<String, Vec<u8>>,
}

type Tree = BTreeMap<String, Seen>;

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[track_caller]
fn run(program: &str, args: &[&OsStr], dir: &Path) -> Vec<u8> {
    let output = Command::new(program).args(args).current_dir(dir).env("LC_ALL", "C.UTF-8").env("TZ", "UTC").output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed for this test: {error}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[track_caller]
fn tar(dir: &Path, args: &[&str]) {
    run("tar", &args.iter().map(OsStr::new).collect::<Vec<_>>(), dir);
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn read_bytes(bytes: Box<dyn Read + Send>, compression: Compression) -> Result<Model, Error> {
    let mut model = Model::default();
    let mut input = decompress::open(bytes, compression)?;
    archive::read(&mut input, &Limits::default(), &|_| false, &mut model, &Progress::default())?;
    Ok(model)
}

fn read_file(path: &Path) -> Result<Model, Error> {
    read_bytes(Box::new(File::open(path).expect("the archive")), Compression::None)
}

fn ours(model: &Model) -> Tree {
    let mut firsts: BTreeMap<String, String> = BTreeMap::new();
    for (path, _) in model.iter() {
        let first = model.links(path)[0].to_string();
        firsts.insert(path.to_string(), first);
    }
    let seen = model.iter().map(|(path, node)| {
        let kind = match &node.kind {
            EntryKind::Directory => "directory".to_owned(),
            EntryKind::File { size, .. } => format!("file {size} {}", hex(&node.content(1 << 30).expect("small"))),
            EntryKind::Symlink { target } => format!("symlink {}", String::from_utf8_lossy(target)),
            EntryKind::CharDevice { major, minor } => format!("char {major}:{minor}"),
            EntryKind::BlockDevice { major, minor } => format!("block {major}:{minor}"),
            EntryKind::Fifo => "fifo".to_owned(),
            EntryKind::Socket | EntryKind::HardLink { .. } => panic!("{path} can't be that"),
        };
        let is_symlink = matches!(node.kind, EntryKind::Symlink { .. });
        let xattrs = node.meta.xattrs.iter().map(|xattr| (String::from_utf8_lossy(&xattr.name).into_owned(), xattr.value.clone()));
        let seen = Seen {
            kind,
            mode: (!is_symlink).then_some(node.meta.mode.into()),
            owner: Some((node.meta.uid, node.meta.gid)),
            mtime: (!is_symlink).then_some((node.meta.mtime.secs, node.meta.mtime.nanos.into())),
            first_name: firsts[&path.to_string()].clone(),
            xattrs: xattrs.collect(),
        };
        (path.to_string(), seen)
    });
    seen.collect()
}

/// What GNU tar makes of an archive on a disk.
fn extracted(archive: &Path) -> Tree {
    let dir = tempfile::tempdir().expect("a directory");
    let mut args = vec!["--extract", "--preserve-permissions", "--numeric-owner", "--file", archive.to_str().expect("text")];
    if is_root() {
        args.extend(["--same-owner", "--acls", "--xattrs", "--xattrs-include=*"]);
    }
    tar(dir.path(), &args);
    let mut tree = Tree::new();
    let mut firsts = BTreeMap::new();
    walk(dir.path(), dir.path(), &mut tree, &mut firsts);
    tree
}

fn walk(top: &Path, at: &Path, tree: &mut Tree, firsts: &mut BTreeMap<u64, String>) {
    let meta = fs::symlink_metadata(at).expect("there");
    let name = format!("/{}", at.strip_prefix(top).expect("below").display());
    let kind = meta.file_type();
    let text = if kind.is_dir() {
        "directory".to_owned()
    } else if kind.is_file() {
        format!("file {} {}", meta.size(), hex(&fs::read(at).expect("readable")))
    } else if kind.is_symlink() {
        format!("symlink {}", fs::read_link(at).expect("a link").display())
    } else if kind.is_char_device() {
        format!("char {}:{}", nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev()))
    } else if kind.is_block_device() {
        format!("block {}:{}", nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev()))
    } else {
        "fifo".to_owned()
    };
    let seen = Seen {
        kind: text,
        mode: (!kind.is_symlink()).then_some(meta.mode() & 0o7777),
        owner: is_root().then_some((meta.uid(), meta.gid())),
        mtime: (!kind.is_symlink()).then_some((meta.mtime(), meta.mtime_nsec())),
        first_name: String::new(),
        xattrs: if kind.is_symlink() { BTreeMap::new() } else { xattrs_of(at) },
    };
    let mut children: Vec<PathBuf> =
        if kind.is_dir() { fs::read_dir(at).expect("readable").map(|entry| entry.expect("readable").path()).collect() } else { Vec::new() };
    children.sort();
    let first_name = firsts.entry(meta.ino()).or_insert_with(|| name.clone()).clone();
    tree.insert(name, Seen { first_name, ..seen });
    for child in children {
        walk(top, &child, tree, firsts);
    }
}

fn xattrs_of(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0u8; 4096];
    let len = rustix::fs::llistxattr(path, &mut names[..]).expect("extended attributes");
    let mut xattrs = BTreeMap::new();
    for name in names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0u8; 4096];
        let len = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).expect("readable");
        value.truncate(len);
        xattrs.insert(String::from_utf8_lossy(name).into_owned(), value);
    }
    xattrs
}

const PYTHON_READER: &str = r#"
import hashlib, json, sys, tarfile
out, first = {}, {}
with tarfile.open(sys.argv[1]) as archive:
    for m in archive:
        name = "/" + "/".join(p for p in m.name.split("/") if p not in ("", "."))
        if m.isreg():
            data = archive.extractfile(m).read()
            kind = "file %d %s" % (m.size, hashlib.sha256(data).hexdigest()[:16])
        elif m.isdir(): kind = "directory"
        elif m.issym(): kind = "symlink " + m.linkname
        elif m.islnk():
            target = "/" + "/".join(p for p in m.linkname.split("/") if p not in ("", "."))
            out[name] = out[target]
            continue
        elif m.ischr(): kind = "char %d:%d" % (m.devmajor, m.devminor)
        elif m.isblk(): kind = "block %d:%d" % (m.devmajor, m.devminor)
        elif m.isfifo(): kind = "fifo"
        else: sys.exit("unknown type %r" % m.type)
        out[name] = [kind, m.mode & 0o7777, m.uid, m.gid]
print(json.dumps(out))
"#;

/// What Python makes of an archive: kind, mode, owner by name.
fn python_sees(archive: &Path) -> BTreeMap<String, (String, u32, u32, u32)> {
    let text = run("python3", &[OsStr::new("-c"), OsStr::new(PYTHON_READER), archive.as_os_str()], Path::new("/"));
    serde_json::from_slice(&text).expect("JSON")
}

/// Reads `archive` with all three. `implied` are the directories that have no member of their own; what readers give those is up to them.
#[track_caller]
fn all_agree(archive: &Path, implied: &[&str]) -> Model {
    let model = read_file(archive).unwrap_or_else(|error| panic!("{}: {error:?}", archive.display()));
    let ours = ours(&model);
    let mut gnu = extracted(archive);
    let names = |tree: &Tree| tree.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&ours), names(&gnu), "{}: names differ from GNU tar's", archive.display());
    for (name, ours) in &ours {
        let mut gnu = gnu.remove(name).expect("names agree");
        if implied.contains(&name.as_str()) {
            assert_eq!(ours.kind, gnu.kind, "{name}");
            continue;
        }
        // Without root nobody else's owner and attributes can be set.
        gnu.owner = gnu.owner.or(ours.owner);
        if !is_root() {
            gnu.xattrs.clone_from(&ours.xattrs);
        }
        assert_eq!(*ours, gnu, "{}: {name} differs from GNU tar's", archive.display());
    }
    for (name, (kind, mode, uid, gid)) in python_sees(archive) {
        let ours = ours.get(&name).unwrap_or_else(|| panic!("{}: Python sees {name}", archive.display()));
        let symlink = ours.kind.starts_with("symlink");
        assert_eq!((&ours.kind, ours.owner), (&kind, Some((uid, gid))), "{}: {name} differs from Python's", archive.display());
        // Lists of access change the mode when they are set; Python knows nothing about them.
        let has_acl = ours.xattrs.contains_key("system.posix_acl_access");
        assert!(symlink || has_acl || ours.mode == Some(mode), "{}: mode of {name} differs from Python's", archive.display());
    }
    model
}

fn set_time(path: &Path, secs: i64, nanos: u32) {
    let base = SystemTime::UNIX_EPOCH;
    let whole = Duration::from_secs(secs.unsigned_abs());
    let time = (if secs < 0 { base - whole } else { base + whole }) + Duration::from_nanos(nanos.into());
    let file = File::open(path).expect("readable");
    file.set_times(FileTimes::new().set_modified(time).set_accessed(time)).expect("settable");
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::lsetxattr(path, name, value, flags)
        .unwrap_or_else(|error| panic!("set {name}: extended attributes are needed for this test: {error}"));
}

/// What every format can hold.
fn plain_tree(top: &Path) {
    fs::create_dir_all(top.join("etc/sub")).expect("made");
    fs::write(top.join("etc/passwd"), b"root:x:0:0::/root:/bin/sh\n").expect("written");
    fs::write(top.join("etc/empty"), b"").expect("written");
    fs::write(top.join("etc/sub/block"), vec![7; 512]).expect("written");
    fs::write(top.join("etc/sub/odd"), vec![8; 1_000_003]).expect("written");
    fs::hard_link(top.join("etc/sub/odd"), top.join("etc/zlink")).expect("linked");
    symlink("../passwd", top.join("etc/sub/link")).expect("linked");
    fs::set_permissions(top.join("etc/sub/block"), fs::Permissions::from_mode(0o4751)).expect("set");
    fs::set_permissions(top.join("etc/sub"), fs::Permissions::from_mode(0o1777)).expect("set");
    for name in ["etc/passwd", "etc/empty", "etc/sub/block", "etc/sub/odd", "etc/sub", "etc", "."] {
        set_time(&top.join(name), 1_600_000_000, 0);
    }
    if is_root() {
        nix::unistd::chown(&top.join("etc/passwd"), Some(1000.into()), Some(2000.into())).expect("set");
    }
}

/// What only GNU and PAX archives can hold.
fn rich_tree(top: &Path) {
    plain_tree(top);
    let long = top.join(format!("long/{}/{}", "d".repeat(120), "e".repeat(200)));
    fs::create_dir_all(&long).expect("made");
    fs::write(long.join("f".repeat(150)), b"deep").expect("written");
    fs::hard_link(long.join("f".repeat(150)), top.join("long/hard")).expect("linked");
    symlink("t".repeat(300), top.join("long/soft")).expect("linked");
    fs::write(top.join("long/n\u{e4}me with space\nand newline"), b"x").expect("written");
    fs::write(top.join("long/old"), b"x").expect("written");
    set_time(&top.join("long/old"), -100_000, 0);
    nix::unistd::mkfifo(&top.join("long/fifo"), nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("made");
    if is_root() {
        use nix::sys::stat::{Mode, SFlag, makedev, mknod};
        mknod(&top.join("long/char"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o620), makedev(136, 70_000)).expect("made");
        mknod(&top.join("long/disk"), SFlag::S_IFBLK, Mode::from_bits_truncate(0o660), makedev(259, 7)).expect("made");
        nix::unistd::chown(&top.join("long/old"), Some(3_000_000_000.into()), Some(4_000_000_000.into())).expect("set");
    }
}

fn sparse_file(path: &Path, size: u64, data: impl IntoIterator<Item = u64>) {
    let mut file = File::create(path).expect("made");
    for at in data {
        file.seek(SeekFrom::Start(at)).expect("seekable");
        file.write_all(&[(at / 4096 % 200) as u8 + 1; 4096]).expect("written");
    }
    file.set_len(size).expect("extended");
    file.sync_all().expect("flushed");
}

fn sparse_tree(top: &Path) {
    fs::create_dir_all(top).expect("made");
    sparse_file(&top.join("hole"), 1 << 20, []);
    sparse_file(&top.join("few"), (1 << 20) + 5, [65_536, 524_288]);
    sparse_file(&top.join("many"), 16 << 20, (0..60).map(|number| number * 200_704));
    sparse_file(&top.join("ends-with-data"), 1 << 20, [0, (1 << 20) - 4096]);
    fs::write(top.join(format!("{}-after", "n".repeat(120))), b"after").expect("written");
}

fn has_holes(model: &Model, path: &str) -> bool {
    let node = model.get(&GuestPath::new(path).expect("valid")).expect("there");
    matches!(&node.kind, EntryKind::File { size, .. } if (node.data.len() as u64) < *size / 2)
}

#[test]
fn archives_of_gnu_tar_in_every_format_are_read_alike() {
    let dir = tempfile::tempdir().expect("a directory");
    let (plain, rich) = (dir.path().join("plain"), dir.path().join("rich"));
    fs::create_dir_all(&plain).expect("made");
    fs::create_dir_all(&rich).expect("made");
    plain_tree(&plain);
    rich_tree(&rich);
    for format in ["v7", "oldgnu", "gnu", "ustar", "posix"] {
        let archive = dir.path().join(format!("{format}.tar"));
        tar(&plain, &["--create", "--format", format, "--numeric-owner", "--file", archive.to_str().expect("text"), "."]);
        all_agree(&archive, &[]);
    }
    for format in ["gnu", "posix"] {
        let archive = dir.path().join(format!("rich-{format}.tar"));
        tar(&rich, &["--create", "--format", format, "--numeric-owner", "--file", archive.to_str().expect("text"), "."]);
        all_agree(&archive, &[]);
    }
    // Nanoseconds, and owners by name beside the numbers.
    set_time(&plain.join("etc/empty"), 1_600_000_000, 123_456_789);
    set_time(&plain.join("etc/passwd"), -2, 500_000_000);
    let archive = dir.path().join("nanos.tar");
    tar(&plain, &["--create", "--format=posix", "--pax-option=comment=x", "--file", archive.to_str().expect("text"), "."]);
    all_agree(&archive, &[]);
}

#[test]
fn sparse_archives_of_every_version_are_read_alike() {
    let dir = tempfile::tempdir().expect("a directory");
    let top = dir.path().join("top");
    sparse_tree(&top);
    for (name, options) in [
        ("gnu", &["--format=gnu"][..]),
        ("oldgnu", &["--format=oldgnu"]),
        ("0.0", &["--format=posix", "--sparse-version=0.0"]),
        ("0.1", &["--format=posix", "--sparse-version=0.1"]),
        ("1.0", &["--format=posix", "--sparse-version=1.0"]),
    ] {
        let archive = dir.path().join(format!("{name}.tar"));
        let mut args = vec!["--create", "--sparse", "--numeric-owner", "--file", archive.to_str().expect("text")];
        args.extend(options);
        args.push(".");
        tar(&top, &args);
        let model = all_agree(&archive, &[]);
        for file in ["/hole", "/few", "/many", "/ends-with-data"] {
            assert!(has_holes(&model, file), "{name}: {file} has lost its holes");
        }
    }
}

#[test]
fn attributes_and_access_lists_are_read_alike() {
    let dir = tempfile::tempdir().expect("a directory");
    let top = dir.path().join("top");
    plain_tree(&top);
    set_xattr(&top.join("etc/passwd"), "user.text", b"value");
    set_xattr(&top.join("etc/passwd"), "user.binary", b"\0\n=\xff");
    set_xattr(&top.join("etc/passwd"), "user.empty", b"");
    set_xattr(&top.join("etc/sub"), "user.on-directory", b"1");
    // u::rw-,u:12345:r--,g::r--,m::rw-,o::---
    let acl = [
        [2, 0, 0, 0].as_slice(),
        &[1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 0x39, 0x30, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255],
        &[16, 0, 6, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255],
    ]
    .concat();
    set_xattr(&top.join("etc/empty"), "system.posix_acl_access", &acl);
    set_xattr(&top.join("etc"), "system.posix_acl_default", &acl);
    if is_root() {
        set_xattr(&top.join("etc/sub/block"), "security.capability", &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        set_xattr(&top.join("etc/sub/odd"), "trusted.overlay.opaque", b"y");
    }
    let archive = dir.path().join("x.tar");
    let args =
        ["--create", "--format=posix", "--numeric-owner", "--acls", "--xattrs", "--xattrs-include=*", "--file", archive.to_str().expect("text"), "."];
    tar(&top, &args);
    let model = all_agree(&archive, &[]);
    // And what was archived is what the source had: the judge can't have agreed on nothing.
    for name in ["etc", "etc/passwd", "etc/empty", "etc/sub", "etc/sub/block", "etc/sub/odd"] {
        let node = model.get(&GuestPath::from_member(name).expect("valid")).expect("there");
        let got: BTreeMap<String, Vec<u8>> =
            node.meta.xattrs.iter().map(|xattr| (String::from_utf8_lossy(&xattr.name).into_owned(), xattr.value.clone())).collect();
        assert_eq!(got, xattrs_of(&top.join(name)), "{name}");
        assert_eq!(u32::from(node.meta.mode), fs::metadata(top.join(name)).expect("there").mode() & 0o7777, "{name}");
    }
}

#[test]
fn members_that_come_again_replace_the_earlier_ones_alike() {
    let dir = tempfile::tempdir().expect("a directory");
    let top = dir.path().join("top");
    plain_tree(&top);
    let archive = dir.path().join("x.tar");
    let file = archive.to_str().expect("text");
    tar(&top, &["--create", "--format=posix", "--numeric-owner", "--file", file, "."]);
    fs::write(top.join("etc/passwd"), b"changed").expect("written");
    fs::remove_file(top.join("etc/empty")).expect("removed");
    symlink("passwd", top.join("etc/empty")).expect("linked");
    fs::remove_file(top.join("etc/sub/odd")).expect("removed");
    fs::write(top.join("etc/sub/odd"), b"no longer linked").expect("written");
    fs::set_permissions(top.join("etc/sub"), fs::Permissions::from_mode(0o700)).expect("set");
    tar(&top, &["--append", "--format=posix", "--numeric-owner", "--file", file, "./etc/passwd", "./etc/empty", "./etc/sub/odd"]);
    tar(&top, &["--append", "--format=posix", "--numeric-owner", "--no-recursion", "--file", file, "./etc/sub"]);
    let model = all_agree(&archive, &["/etc"]);
    assert_eq!(model.links(&GuestPath::new("/etc/zlink").expect("valid")).len(), 1);
}

const PYTHON_WRITER: &str = r#"
import io, sys, tarfile
form = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[sys.argv[2]]
with tarfile.open(sys.argv[1], "w", format=form, encoding="utf-8") as archive:
    def add(name, type=tarfile.REGTYPE, data=b"", **fields):
        info = tarfile.TarInfo(name)
        info.type, info.size, info.mode, info.mtime = type, len(data), 0o644, 1500000000
        for key, value in fields.items(): setattr(info, key, value)
        archive.addfile(info, io.BytesIO(data) if data else None)
    add("usr", tarfile.DIRTYPE, mode=0o755)
    add("usr/file", data=b"hello" * 1000, uid=1234, gid=5678, uname="nobody-knows", gname="me-neither")
    add("usr/hard", tarfile.LNKTYPE, linkname="usr/file")
    add("usr/soft", tarfile.SYMTYPE, linkname="../usr/file")
    add("usr/fifo", tarfile.FIFOTYPE)
    add("usr/" + "d" * 90, tarfile.DIRTYPE, mode=0o2755)
    add("usr/" + "d" * 90 + "/" + "f" * 90, data=b"prefix")
    if "devices" in sys.argv[3:]:
        add("usr/null", tarfile.CHRTYPE, devmajor=1, devminor=3)
        add("usr/disk", tarfile.BLKTYPE, devmajor=253, devminor=1000)
    if form != tarfile.USTAR_FORMAT:
        add("usr/" + "l" * 180, data=b"long name")
        add("usr/longlink", tarfile.SYMTYPE, linkname="t" * 200)
        add("usr/big-owner", data=b"x", uid=4000000000, gid=3000000)
        add("usr/old", data=b"x", mtime=-1000000)
        add("usr/\u00fcnicode", data=b"y")
    if form == tarfile.PAX_FORMAT:
        add("usr/nanos", data=b"z", mtime=1500000000.25)
        add("usr/before", data=b"z", mtime=-1.5)
        add("usr/attributes", data=b"z", pax_headers={"SCHILY.xattr.user.a": "1", "comment": "nothing", "VENDOR.key": "v"})
    add("usr/file2", data=b"end")
    add(".", tarfile.DIRTYPE, mode=0o711)
"#;

#[test]
fn archives_of_python_are_read_alike() {
    let dir = tempfile::tempdir().expect("a directory");
    for format in ["ustar", "gnu", "pax"] {
        let archive = dir.path().join(format!("{format}.tar"));
        let mut args = vec![OsStr::new("-c"), OsStr::new(PYTHON_WRITER), archive.as_os_str(), OsStr::new(format)];
        if is_root() {
            args.push(OsStr::new("devices"));
        }
        run("python3", &args, dir.path());
        all_agree(&archive, &[]);
    }
}

#[test]
fn archives_compressed_by_the_usual_tools_are_the_same() {
    let dir = tempfile::tempdir().expect("a directory");
    let top = dir.path().join("top");
    fs::create_dir_all(&top).expect("made");
    rich_tree(&top);
    let archive = dir.path().join("x.tar");
    tar(&top, &["--create", "--format=posix", "--file", archive.to_str().expect("text"), "."]);
    let plain = read_file(&archive).expect("valid");
    for (program, args, compression) in [
        ("gzip", &["-c"][..], Compression::Gzip),
        ("bzip2", &["-c"], Compression::Bzip2),
        ("xz", &["-c", "-1"], Compression::Xz),
        ("xz", &["-c", "-1", "-T2", "--block-size=100000"], Compression::Xz),
        ("xz", &["-c", "-9e", "--check=sha256"], Compression::Xz),
        ("zstd", &["-c", "-q"], Compression::Zstd),
        ("zstd", &["-c", "-q", "-19", "--long=27"], Compression::Zstd),
    ] {
        let mut args: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
        args.push(archive.as_os_str());
        let bytes = run(program, &args, dir.path());
        let model = read_bytes(Box::new(std::io::Cursor::new(bytes)), compression).unwrap_or_else(|error| panic!("{program}: {error:?}"));
        assert!(model == plain, "{program} {args:?}");
    }
}

#[test]
fn archives_that_split_readers_are_refused() {
    // Python and GNU tar stop at the first archive's end, with no word about the second one.
    let dir = tempfile::tempdir().expect("a directory");
    let top = dir.path().join("top");
    plain_tree(&top);
    let (one, two) = (dir.path().join("1.tar"), dir.path().join("2.tar"));
    tar(&top, &["--create", "--file", one.to_str().expect("text"), "etc/passwd"]);
    tar(&top, &["--create", "--file", two.to_str().expect("text"), "etc/empty"]);
    let joined = dir.path().join("joined.tar");
    fs::write(&joined, [fs::read(&one).expect("made"), fs::read(&two).expect("made")].concat()).expect("written");
    assert_eq!(python_sees(&joined).len(), 1);
    assert_eq!(read_file(&joined).expect_err("two archives").kind(), Kind::Corrupt);
    // A volume label and an incremental archive are GNU's own; Python takes the label for a file.
    let label = dir.path().join("label.tar");
    tar(&top, &["--create", "--format=gnu", "--label=name", "--file", label.to_str().expect("text"), "etc/passwd"]);
    assert_eq!(read_file(&label).expect_err("a label").kind(), Kind::Unsupported);
    let incremental = dir.path().join("incremental.tar");
    let snapshot = format!("--listed-incremental={}", dir.path().join("snapshot").display());
    tar(&top, &["--create", "--format=gnu", &snapshot, "--file", incremental.to_str().expect("text"), "etc"]);
    assert_eq!(read_file(&incremental).expect_err("a directory listing").kind(), Kind::Unsupported);
}
