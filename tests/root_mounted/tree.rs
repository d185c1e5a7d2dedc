//! A tree with everything in it, and a comparison of a mounted filesystem with what it should hold.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use cloudletd::{
    names::GuestPath,
    tree::{Entry, EntryKind, Meta, Span, Xattr},
    units::Timestamp,
};

pub type Member = (Entry, Vec<u8>);

pub fn path(text: impl AsRef<[u8]>) -> GuestPath {
    GuestPath::new(text).expect("a valid path")
}

pub fn meta(mode: u16, uid: u32, gid: u32, secs: i64, nanos: u32) -> Meta {
    Meta { mode, uid, gid, mtime: Timestamp { secs, nanos }, xattrs: Vec::new() }
}

pub fn member(at: impl AsRef<[u8]>, kind: EntryKind, meta: Meta) -> Member {
    (Entry { path: path(at), kind, meta }, Vec::new())
}

pub fn file(at: impl AsRef<[u8]>, content: &[u8], meta: Meta) -> Member {
    let size = content.len() as u64;
    let spans = if content.is_empty() { Vec::new() } else { vec![Span { offset: 0, len: size }] };
    (Entry { path: path(at), kind: EntryKind::File { size, spans }, meta }, content.to_vec())
}

pub fn directory(at: impl AsRef<[u8]>, meta: Meta) -> Member {
    member(at, EntryKind::Directory, meta)
}

fn with(mut member: Member, xattrs: &[(&[u8], &[u8])]) -> Member {
    member.0.meta.xattrs = xattrs.iter().map(|(name, value)| Xattr { name: name.to_vec(), value: value.to_vec() }).collect();
    member.0.meta.xattrs.sort();
    member
}

/// An access ACL as getxattr(2) gives it: version 2, entries {tag, perm, id}.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(perm.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

const NOBODY: u32 = u32::MAX;

/// VFS capabilities, version 2: cap_net_raw, permitted and effective.
pub const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Members in archive order, with implicit parents, replaced names and metadata that comes late.
pub fn everything() -> Vec<Member> {
    let plain = || meta(0o644, 0, 0, 1_700_000_000, 123_456_789);
    let user = 1u16;
    let access = acl(&[(1, 6, NOBODY), (2, 7, 1000), (4, 4, NOBODY), (0x10, 7, NOBODY), (0x20, 4, NOBODY)]);
    let default = acl(&[(1, 7, NOBODY), (2, 5, 1000), (4, 5, NOBODY), (0x10, 5, NOBODY), (0x20, 0, NOBODY)]);
    let mut members = vec![
        directory("/", meta(0o755, 0, 0, 1_600_000_000, 1)),
        directory("/etc", meta(0o755, 0, 0, 1_500_000_000, 999_999_999)),
        file("/etc/hostname", b"golden\n", plain()),
        file("/etc/shadow", b"root:*:\n", meta(0o640, 0, 42, 5, 0)),
        file("/usr/bin/sudo", &[0x7f; 100_000], meta(0o4755, 0, 0, 1_700_000_001, 0)),
        file("/usr/bin/wall", b"wall", meta(0o2755, 0, 5, 1_700_000_001, 0)),
        with(file("/usr/bin/ping", &[1; 5000], meta(0o755, 0, 0, 1, 0)), &[(b"security.capability", &CAPABILITY)]),
        // A set-group-id directory and one with a default ACL: nothing may be inherited.
        directory("/var/mail", meta(0o2775, 0, 8, 77, 0)),
        directory("/var/mail/sub", meta(0o755, 8, 8, 78, 0)),
        with(directory("/srv/shared", meta(0o750, 1000, 1000, 79, 5)), &[(b"system.posix_acl_default", &default)]),
        file("/srv/shared/plain", b"no acl", meta(0o640, 1000, 1000, 80, 0)),
        directory("/srv/shared/sub", meta(0o700, 0, 0, 81, 0)),
        with(file("/srv/acl", b"acl", meta(0o674, 0, 0, 82, 0)), &[(b"system.posix_acl_access", &access)]),
        with(file("/srv/user", b"x", plain()), &[(b"user.comment", b"hello\0there"), (b"user.empty", b""), (b"trusted.t", &[9; 1000])]),
        directory("/tmp", meta(0o1777, 0, 0, 83, 0)),
        member("/bin", EntryKind::Symlink { target: b"usr/bin".to_vec() }, meta(0o777, 0, 0, 84, 7)),
        member("/long", EntryKind::Symlink { target: [b"x/".repeat(300), b"..".to_vec()].concat() }, meta(0o777, 12, 34, 85, 0)),
        member("/out", EntryKind::Symlink { target: b"/etc/../../../..".to_vec() }, meta(0o777, 0, 0, 86, 0)),
        member("/dev/null", EntryKind::CharDevice { major: 1, minor: 3 }, meta(0o666, 0, 0, 87, 0)),
        member("/dev/big", EntryKind::CharDevice { major: 511, minor: 262_143 }, meta(0o600, 0, 0, 88, 0)),
        member("/dev/sda", EntryKind::BlockDevice { major: 8, minor: 0 }, meta(0o660, 0, 6, 89, 0)),
        member("/run/pipe", EntryKind::Fifo, meta(0o620, 0, 0, 90, 0)),
        member("/run/socket", EntryKind::Socket, meta(0o755, 0, 0, 91, 0)),
        file("/empty", b"", meta(0o000, 4_000_000_000, 4_000_000_001, -86_400, 250_000_000)),
        file(b"/bytes \xff\xfe\n\"'\\", b"odd name", plain()),
        member("/usr/bin/sudo-link", EntryKind::HardLink { target: path("/usr/bin/sudo") }, plain()),
        member("/bin-link", EntryKind::HardLink { target: path("/bin") }, plain()),
        member("/usr/bin/sudo", EntryKind::HardLink { target: path("/usr/bin/sudo") }, plain()),
        // Replaced: file by file, link by file, file by directory, empty directory by file.
        file("/etc/issue", b"old", plain()),
        file("/etc/issue", b"new issue", meta(0o600, 3, 4, 92, 0)),
        member("/etc/mtab", EntryKind::Symlink { target: b"/etc/shadow".to_vec() }, plain()),
        file("/etc/mtab", b"through no link", meta(0o644, 0, 0, 93, 0)),
        file("/opt", b"file", plain()),
        directory("/opt", meta(0o711, 0, 0, 94, 0)),
        directory("/gone", plain()),
        file("/gone", b"now a file", meta(0o644, 0, 0, 95, 0)),
        // Late metadata of an implicit parent.
        file("/implicit/deep/file", b"1", plain()),
        directory("/implicit", meta(0o700, user.into(), 2, 96, 0)),
    ];
    let sparse = EntryKind::File { size: 3 << 20, spans: vec![Span { offset: 4096, len: 10 }, Span { offset: 1 << 20, len: 8192 }] };
    members.push((Entry { path: path("/sparse"), kind: sparse, meta: plain() }, [vec![b'a'; 10], vec![b'b'; 8192]].concat()));
    members.push((Entry { path: path("/hole"), kind: EntryKind::File { size: 1 << 30, spans: Vec::new() }, meta: plain() }, Vec::new()));
    for number in 0..400u32 {
        members.push(file(format!("/many/file-{number:04}"), number.to_string().repeat(number as usize % 50).as_bytes(), plain()));
    }
    members
}

/// What a path should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    pub kind: &'static str,
    pub content: Vec<u8>,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, i64),
    pub device: (u32, u32),
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Paths of the same inode share it.
    pub links: u64,
}

/// The tree that the members make, by the sink's rules, for valid members.
pub fn expectation(members: &[Member], epoch: i64) -> BTreeMap<Vec<u8>, Expected> {
    let mut inodes: Vec<Expected> = Vec::new();
    let mut names: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
    let mut put = |names: &mut BTreeMap<Vec<u8>, usize>, at: &[u8], expected: Expected| {
        inodes.push(expected);
        names.insert(at.to_vec(), inodes.len() - 1);
    };
    let implicit = |mtime: i64| of("directory", Vec::new(), &meta(0o755, 0, 0, mtime, 0), (0, 0));
    put(&mut names, b"/", implicit(epoch));
    for (entry, data) in members {
        let mut parent = entry.path.parent();
        while let Some(missing) = parent.filter(|parent| !names.contains_key(parent.as_bytes())) {
            put(&mut names, missing.as_bytes(), implicit(0));
            parent = missing.parent();
        }
        let at = entry.path.as_bytes();
        let expected = match &entry.kind {
            EntryKind::HardLink { target } => {
                let inode = names[target.as_bytes()];
                names.insert(at.to_vec(), inode);
                continue;
            }
            EntryKind::Directory => of("directory", Vec::new(), &entry.meta, (0, 0)),
            EntryKind::File { size, spans } => {
                // Large holes are not spelled out.
                let mut content = vec![0; if *size > 64 << 20 { 0 } else { *size as usize }];
                let mut used = 0;
                for span in spans {
                    content[span.offset as usize..(span.offset + span.len) as usize].copy_from_slice(&data[used..used + span.len as usize]);
                    used += span.len as usize;
                }
                of("file", content, &entry.meta, (0, 0))
            }
            EntryKind::Symlink { target } => {
                let mut expected = of("symlink", target.clone(), &entry.meta, (0, 0));
                expected.mode = 0o777;
                expected
            }
            EntryKind::CharDevice { major, minor } => of("char", Vec::new(), &entry.meta, (*major, *minor)),
            EntryKind::BlockDevice { major, minor } => of("block", Vec::new(), &entry.meta, (*major, *minor)),
            EntryKind::Fifo => of("fifo", Vec::new(), &entry.meta, (0, 0)),
            EntryKind::Socket => of("socket", Vec::new(), &entry.meta, (0, 0)),
        };
        put(&mut names, at, expected);
    }
    let mut links: BTreeMap<usize, u64> = BTreeMap::new();
    names.values().for_each(|inode| *links.entry(*inode).or_default() += 1);
    names.into_iter().map(|(name, inode)| (name, Expected { links: links[&inode], ..inodes[inode].clone() })).collect()
}

fn of(kind: &'static str, content: Vec<u8>, meta: &Meta, device: (u32, u32)) -> Expected {
    let xattrs = meta.xattrs.iter().map(|xattr| (xattr.name.clone(), xattr.value.clone())).collect();
    let mtime = (meta.mtime.secs, meta.mtime.nanos.into());
    Expected { kind, content, mode: meta.mode.into(), owner: (meta.uid, meta.gid), mtime, device, xattrs, links: 1 }
}

/// What is below `root`, without ext4's own directory.
pub fn found(root: &Path) -> BTreeMap<Vec<u8>, Expected> {
    let mut tree = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let at = root.join(&relative);
        let expected = describe(&at);
        if expected.kind == "directory" {
            pending.extend(fs::read_dir(&at).expect("list").map(|entry| relative.join(entry.expect("entry").file_name())));
        }
        let name = [b"/", relative.as_os_str().as_bytes()].concat();
        if name != b"/lost+found" {
            tree.insert(name, expected);
        }
    }
    tree
}

fn describe(at: &Path) -> Expected {
    let stat = fs::symlink_metadata(at).expect("stat");
    let kind = stat.file_type();
    let (name, content) = match () {
        () if kind.is_dir() => ("directory", Vec::new()),
        () if kind.is_symlink() => ("symlink", fs::read_link(at).expect("target").into_os_string().into_vec()),
        () if kind.is_char_device() => ("char", Vec::new()),
        () if kind.is_block_device() => ("block", Vec::new()),
        () if kind.is_fifo() => ("fifo", Vec::new()),
        () if kind.is_socket() => ("socket", Vec::new()),
        () if stat.len() > 64 << 20 => ("file", Vec::new()),
        () => ("file", fs::read(at).expect("content")),
    };
    let device = if matches!(name, "char" | "block") { (rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev())) } else { (0, 0) };
    let links = if name == "directory" { 1 } else { stat.nlink() };
    let (owner, mtime) = ((stat.uid(), stat.gid()), (stat.mtime(), stat.mtime_nsec()));
    Expected { kind: name, content, mode: stat.mode() & 0o7777, owner, mtime, device, xattrs: xattrs(at), links }
}

fn xattrs(at: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = vec![0; 65536];
    let len = rustix::fs::llistxattr(at, &mut list[..]).expect("list xattrs");
    // A label of the host, and XFS's second name for an ACL.
    let foreign = |name: &[u8]| name == b"security.selinux" || name.starts_with(b"trusted.SGI_ACL_");
    let names = list[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty() && !foreign(name));
    names
        .map(|name| {
            let mut value = vec![0; 65536];
            let len = rustix::fs::lgetxattr(at, name, &mut value[..]).expect("read an xattr");
            (name.to_vec(), value[..len].to_vec())
        })
        .collect()
}

/// Compares name by name, so that a failure is readable.
#[track_caller]
pub fn assert_same(found: &BTreeMap<Vec<u8>, Expected>, wanted: &BTreeMap<Vec<u8>, Expected>) {
    let shown = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
    for (name, wanted) in wanted {
        let found = found.get(name).unwrap_or_else(|| panic!("{} is missing", shown(name)));
        assert_eq!(found.content.len(), wanted.content.len(), "size of {}", shown(name));
        assert!(found.content == wanted.content, "content of {}", shown(name));
        let without = |expected: &Expected| Expected { content: Vec::new(), ..expected.clone() };
        assert_eq!(without(found), without(wanted), "{}", shown(name));
    }
    for name in found.keys() {
        assert!(wanted.contains_key(name), "{} should not be there", shown(name));
    }
}
