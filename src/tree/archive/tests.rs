//! Archives are put together byte by byte here, so that every field can be wrong on purpose. Archives made by other tools are in
//! `tests/tar_differential.rs`.

use proptest::prelude::*;

use super::*;
use crate::{
    tree::{Entry, Meta, Span, Xattr, model::Model},
    units::Timestamp,
};

/// One header block.
#[derive(Clone)]
struct Block([u8; 512]);

impl Block {
    fn new(magic: &[u8; 8], flag: u8, name: &[u8], size: u64) -> Self {
        let mut block = [0; 512];
        block[..name.len()].copy_from_slice(name);
        block[257..265].copy_from_slice(magic);
        block[156] = flag;
        Block(block)
            .text(100, "0000644\0")
            .text(108, "0000001\0")
            .text(116, "0000002\0")
            .text(124, &format!("{size:011o}\0"))
            .text(136, "00000000003\0")
    }

    fn ustar(flag: u8, name: &str) -> Self {
        Block::new(b"ustar\x0000", flag, name.as_bytes(), 0)
    }

    fn gnu(flag: u8, name: &str) -> Self {
        Block::new(b"ustar  \0", flag, name.as_bytes(), 0)
    }

    fn v7(flag: u8, name: &str) -> Self {
        Block::new(&[0; 8], flag, name.as_bytes(), 0)
    }

    fn text(self, at: usize, text: &str) -> Self {
        self.bytes(at, text.as_bytes())
    }

    fn bytes(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn size(self, size: u64) -> Self {
        self.text(124, &format!("{size:011o}\0"))
    }

    fn link(self, target: &str) -> Self {
        self.text(157, target)
    }

    /// The block with its checksum, then `data` padded.
    fn with(mut self, data: &[u8]) -> Vec<u8> {
        self.0[148..156].fill(b' ');
        let sum: u32 = self.0.iter().map(|byte| u32::from(*byte)).sum();
        self.0[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let mut bytes = self.0.to_vec();
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }
}

pub(super) fn pax_records(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut len = rest + 1;
        while rest + len.to_string().len() != len {
            len = rest + len.to_string().len();
        }
        bytes.extend_from_slice(format!("{len} {key}=").as_bytes());
        bytes.extend_from_slice(value);
        bytes.push(b'\n');
    }
    bytes
}

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let data = pax_records(records);
    Block::ustar(b'x', "PaxHeaders/x").size(data.len() as u64).with(&data)
}

fn end() -> Vec<u8> {
    vec![0; 1024]
}

fn read_with(archive: &[u8], limits: &Limits, filter: &dyn Fn(&GuestPath) -> bool) -> Result<(Model, Summary)> {
    let mut model = Model::default();
    let summary = read(&mut &archive[..], limits, filter, &mut model, &Progress::default())?;
    Ok((model, summary))
}

fn read_parts(parts: &[Vec<u8>]) -> Result<(Model, Summary)> {
    read_with(&parts.concat(), &Limits::default(), &|_| false)
}

fn path(text: &str) -> GuestPath {
    GuestPath::new(text).expect("valid")
}

#[track_caller]
fn model_of(parts: &[Vec<u8>]) -> Model {
    read_parts(parts).unwrap_or_else(|error| panic!("{error:?}")).0
}

#[track_caller]
fn refused(parts: &[Vec<u8>], reason: &str) -> Error {
    let error = read_parts(parts).expect_err("must be refused");
    assert_eq!(error.reason(), reason, "{error:?}");
    assert!(error.message().contains("at byte "), "{error:?}");
    error
}

#[test]
fn every_kind_of_member_is_read() {
    let model = model_of(&[
        Block::ustar(b'5', "./").text(100, "0000700\0").with(b""),
        Block::ustar(b'0', "./f").size(5).with(b"hello"),
        Block::v7(0, "old").size(3).with(b"abc"),
        Block::v7(0, "olddir/").with(b""),
        Block::gnu(b'7', "contiguous").size(1).with(b"c"),
        Block::ustar(b'1', "hard").link("./f").with(b""),
        Block::ustar(b'2', "soft").link("../../etc/passwd").with(b""),
        Block::ustar(b'3', "null").text(329, "0000001\0").text(337, "0000003\0").with(b""),
        Block::gnu(b'4', "disk").bytes(329, &[0x80, 0, 0, 0, 0, 0, 1, 3]).text(337, "0000000\0").with(b""),
        Block::ustar(b'6', "/absolute/fifo").with(b""),
        Block::ustar(b'0', "name").text(345, "the/prefix").with(b""),
        end(),
    ]);
    let kinds: Vec<(String, EntryKind)> = model.iter().map(|(path, node)| (path.to_string(), node.kind.clone())).collect();
    let file = |len| EntryKind::File { size: len, spans: if len == 0 { vec![] } else { vec![Span { offset: 0, len }] } };
    let want = [
        ("/", EntryKind::Directory),
        ("/absolute", EntryKind::Directory),
        ("/absolute/fifo", EntryKind::Fifo),
        ("/contiguous", file(1)),
        ("/disk", EntryKind::BlockDevice { major: 259, minor: 0 }),
        ("/f", file(5)),
        ("/hard", file(5)),
        ("/null", EntryKind::CharDevice { major: 1, minor: 3 }),
        ("/old", file(3)),
        ("/olddir", EntryKind::Directory),
        ("/soft", EntryKind::Symlink { target: b"../../etc/passwd".to_vec() }),
        ("/the", EntryKind::Directory),
        ("/the/prefix", EntryKind::Directory),
        ("/the/prefix/name", file(0)),
    ];
    assert_eq!(kinds, want.map(|(path, kind)| (path.to_owned(), kind)).to_vec());
    assert_eq!(model.get(&path("/")).map(|node| node.meta.mode), Some(0o700));
    let meta = Meta { mode: 0o644, uid: 1, gid: 2, mtime: Timestamp { secs: 3, nanos: 0 }, xattrs: vec![] };
    assert_eq!(model.get(&path("/f")).map(|node| (node.meta.clone(), node.data.clone())), Some((meta, b"hello".to_vec())));
    assert_eq!(model.links(&path("/f")).len(), 2);
}

#[test]
fn extended_headers_override_the_header_and_globals_lie_between() {
    let global = pax_records(&[("mtime", b"7"), ("uid", b"70000"), ("comment", b"commit")]);
    let records: &[(&str, &[u8])] = &[
        ("path", b"long/name"),
        ("uid", b"4000000000"),
        ("mtime", b"-1.5"),
        ("SCHILY.xattr.user.b", b"\0\xff"),
        ("SCHILY.xattr.security.capability", b"\x01\0\0\x02"),
        ("SCHILY.xattr.com.apple.quarantine", b"x"),
        ("RHT.security.selinux", b"system_u:object_r:etc_t:s0"),
        ("SCHILY.acl.access", b"user::rw-,user:7:rwx,group::r--,mask::rw-,other::---"),
        ("atime", b"1"),
        ("VENDOR.unknown", b"1"),
    ];
    let (model, summary) = read_parts(&[
        Block::ustar(b'g', "g").size(global.len() as u64).with(&global),
        pax(records),
        Block::ustar(b'0', "short").size(2).with(b"hi"),
        Block::ustar(b'0', "other").with(b""),
        end(),
    ])
    .expect("valid");
    let node = model.get(&path("/long/name")).expect("renamed");
    assert_eq!((node.meta.uid, node.meta.gid, node.meta.mode), (4_000_000_000, 2, 0o660));
    assert_eq!(node.meta.mtime, Timestamp { secs: -2, nanos: 500_000_000 });
    let names: Vec<&[u8]> = node.meta.xattrs.iter().map(|xattr| xattr.name.as_slice()).collect();
    assert_eq!(names, [b"security.capability".as_slice(), b"security.selinux", b"system.posix_acl_access", b"user.b"]);
    assert_eq!(node.meta.xattrs[1].value, b"system_u:object_r:etc_t:s0\0");
    let other = model.get(&path("/other")).expect("there");
    assert_eq!((other.meta.uid, other.meta.mtime.secs), (70_000, 7));
    assert_eq!(summary, Summary { entries: 2, left_out: 0, data_bytes: 2, archive_bytes: 512 * 9, xattrs_dropped: 1 });
}

#[test]
fn gnu_long_names_are_read() {
    let name = format!("./{}/file", "d".repeat(200));
    let target = "t".repeat(300);
    let long = |flag, text: &str| Block::gnu(flag, "././@LongLink").size(text.len() as u64 + 1).with(format!("{text}\0").as_bytes());
    let model = model_of(&[long(b'K', &target), long(b'L', &name), Block::gnu(b'2', "short").link("short").with(b""), end()]);
    assert_eq!(model.get(&path(&name[1..])).map(|node| node.kind.clone()), Some(EntryKind::Symlink { target: target.into_bytes() }));
}

fn sparse_node() -> (EntryKind, Vec<u8>) {
    (EntryKind::File { size: 10_000, spans: vec![Span { offset: 512, len: 3 }, Span { offset: 4096, len: 2 }] }, b"abcde".to_vec())
}

#[test]
fn all_sparse_formats_give_the_same_file() {
    let number = |value: u64| format!("{value:011o}\0");
    let pairs = [number(512), number(3), number(4096), number(2), number(10_000), number(0)].concat();
    let old = Block::gnu(b'S', "f").size(5).text(386, &pairs).text(483, &number(10_000)).with(b"abcde");
    let split_head = Block::gnu(b'S', "f").size(5).text(386, &pairs[..48]).bytes(482, b"\x01").text(483, &number(10_000)).with(b"");
    let mut extension = pairs.as_bytes()[48..].to_vec();
    extension.resize(512, 0);
    let mut data = b"abcde".to_vec();
    data.resize(512, 0);
    let p00 = pax(&[
        ("GNU.sparse.size", b"10000"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"512"),
        ("GNU.sparse.numbytes", b"3"),
        ("GNU.sparse.offset", b"4096"),
        ("GNU.sparse.numbytes", b"2"),
    ]);
    let p01 = pax(&[("GNU.sparse.size", b"10000"), ("GNU.sparse.numblocks", b"2"), ("GNU.sparse.map", b"512,3,4096,2"), ("GNU.sparse.name", b"f")]);
    let p10 = pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.name", b"f"), ("GNU.sparse.realsize", b"10000")]);
    let mut map = b"2\n512\n3\n4096\n2\n".to_vec();
    map.resize(512, 0);
    map.extend_from_slice(b"abcde");
    let plain = |size: u64, data: &[u8]| Block::ustar(b'0', "GNUSparseFile.0/f").size(size).with(data);
    let cases = [
        ("gnu", vec![old], "/f"),
        ("gnu with extension", vec![split_head, extension, data], "/f"),
        ("0.0", vec![p00, plain(5, b"abcde")], "/GNUSparseFile.0/f"),
        ("0.1", vec![p01, plain(5, b"abcde")], "/f"),
        ("1.0", vec![p10, plain(517, &map)], "/f"),
    ];
    for (name, mut parts, at) in cases {
        parts.push(Block::ustar(b'0', "next").with(b""));
        parts.push(end());
        let model = read_parts(&parts).unwrap_or_else(|error| panic!("{name}: {error:?}")).0;
        let node = model.get(&path(at)).unwrap_or_else(|| panic!("{name}: {model:?}"));
        assert_eq!((node.kind.clone(), node.data.clone()), sparse_node(), "{name}");
        assert!(model.get(&path("/next")).is_some(), "{name}");
    }
}

#[test]
fn members_that_readers_disagree_about_are_refused() {
    let long = |name: &str| Block::gnu(b'L', "L").size(name.len() as u64 + 1).with(format!("{name}\0").as_bytes());
    let file = || Block::ustar(b'0', "f").with(b"");
    let cases: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("two sizes", vec![pax(&[("size", b"1024")]), Block::ustar(b'0', "f").size(0).with(b""), vec![1; 1024]]),
        ("two names", vec![pax(&[("path", b"a")]), long("b"), Block::gnu(b'0', "c").with(b"")]),
        ("two PAX headers", vec![pax(&[("path", b"a")]), pax(&[("uid", b"1")]), file()]),
        ("two long names", vec![long("a"), long("a"), file()]),
        ("a key twice", vec![pax(&[("path", b"a"), ("path", b"b")]), file()]),
        ("a directory with data", vec![Block::ustar(b'5', "d").size(512).with(&[1; 512])]),
        ("a symlink with data", vec![Block::ustar(b'2', "d").link("x").size(512).with(&[1; 512])]),
        ("a hard link with data", vec![file(), Block::ustar(b'1', "d").link("f").size(512).with(&[1; 512])]),
        ("a v7 directory with data", vec![Block::v7(0, "d/").size(512).with(&[1; 512])]),
        ("an extension in a v7 header", vec![Block::v7(b'L', "L").size(2).with(b"x\0")]),
        ("a global header inside", vec![pax(&[("path", b"a")]), Block::ustar(b'g', "g").with(b""), file()]),
        ("two attribute values", vec![pax(&[("LIBARCHIVE.xattr.user.a", b"AQI"), ("SCHILY.xattr.user.a", b"x")]), file()]),
        (
            "a sparse map that does not fit its data",
            vec![pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"0,4")]), Block::ustar(b'0', "f").size(5).with(b"12345")],
        ),
        ("a sparse directory", vec![pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"9,0")]), Block::ustar(b'5', "f").with(b"")]),
    ];
    for (name, mut parts) in cases {
        parts.push(end());
        let error = read_parts(&parts).err().unwrap_or_else(|| panic!("{name} was accepted"));
        assert_eq!((error.kind(), error.reason()), (Kind::Corrupt, "ARCHIVE_AMBIGUOUS"), "{name}: {error:?}");
    }
}

#[test]
fn damage_is_named_with_member_and_offset() {
    let file = || Block::ustar(b'0', "good").with(b"");
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("\"..\"", Block::ustar(b'0', "a/../b").with(b"")),
        ("\"..\"", Block::ustar(b'1', "b").link("../good").with(b"")),
        ("NUL", [pax(&[("path", b"a\0b")]), file()].concat()),
        ("empty", Block::ustar(b'0', "").with(b"")),
        ("size field", Block::ustar(b'0', "f").text(124, "           \0").with(b"")),
        ("size field", Block::ustar(b'0', "f").bytes(124, &[0xff; 12]).with(b"")),
        ("size field", Block::ustar(b'0', "f").bytes(124, &[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).with(b"")),
        ("uid", Block::ustar(b'0', "f").bytes(108, &[0xff; 8]).with(b"")),
        ("mode field", Block::ustar(b'0', "f").text(100, "rw-r--r-").with(b"")),
        ("symlink target", Block::ustar(b'2', "f").with(b"")),
        ("device number", Block::ustar(b'3', "f").text(329, "0010000\0").text(337, "0000000\0").with(b"")),
        ("checksum", vec![b'x'; 512]),
        ("no device number", Block::v7(b'3', "f").with(b"")),
        ("after the end-of-archive", [vec![0; 512], file()].concat()),
        ("after the end-of-archive", [end(), file()].concat()),
        ("end of the archive", pax(&[("path", b"a")])),
    ];
    for (want, bad) in cases {
        let error = refused(&[file(), bad, end()], "ARCHIVE_CORRUPT");
        assert!(error.message().contains(want), "{want}: {error:?}");
        assert!(error.message().contains("at byte 512") || error.message().contains("at byte 1"), "{error:?}");
    }
    for flag in [b'D', b'M', b'N', b'V', b'X', b'A', b'E', b'I', b'Q', b'~', b'8'] {
        refused(&[Block::ustar(flag, "f").with(b""), end()], "ARCHIVE_UNSUPPORTED");
    }
    refused(&[pax(&[("SCHILY.realsize", b"5")]), file(), end()], "ARCHIVE_UNSUPPORTED");
    refused(&[pax(&[("hdrcharset", b"ISO-IR 8859 1 1998")]), file(), end()], "ARCHIVE_UNSUPPORTED");
    refused(&[pax(&[("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.size", b"1")]), file(), end()], "ARCHIVE_UNSUPPORTED");
}

#[test]
fn an_archive_may_end_at_a_member_boundary_only() {
    let archive = [Block::ustar(b'0', "a").with(b""), pax(&[("path", b"bb")]), Block::ustar(b'0', "b").size(700).with(&[7; 700])].concat();
    let whole = archive.len();
    for len in 0..=whole {
        let result = read_with(&archive[..len], &Limits::default(), &|_| false);
        match len {
            _ if len == 512 || len == whole => assert!(result.is_ok(), "{len}: {result:?}"),
            _ => assert_eq!(result.expect_err("truncated").reason(), "ARCHIVE_TRUNCATED", "{len}"),
        }
    }
    // One zero block, or zeros up to any length, are an end too.
    for zeros in [512, 1024, 10240 - 512] {
        assert!(read_with(&[&archive[..], &vec![0; zeros]].concat(), &Limits::default(), &|_| false).is_ok());
    }
}

#[test]
fn a_size_of_8_gib_and_more_may_stand_in_the_extended_header_alone() {
    for in_header in [0, (1 << 33) - 1] {
        let head = [pax(&[("size", b"8589934592")]), Block::ustar(b'0', "f").size(in_header).with(b"")].concat();
        let error = read_with(&head, &Limits::default(), &|_| false).expect_err("no data follows");
        assert_eq!(error.reason(), "ARCHIVE_TRUNCATED");
        assert!(error.message().contains("8589934592 bytes are missing"), "{error:?}");
    }
}

#[test]
fn limits_are_kept() {
    let deep = format!("{}f", "d/".repeat(40));
    let attributes: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", &[7; 300]), ("SCHILY.xattr.user.b", &[7; 300])];
    let archive = [
        Block::ustar(b'0', &deep).size(600).with(&[1; 600]),
        pax(attributes),
        Block::ustar(b'0', "g").with(b""),
        pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"0,1,2,1,4,1")]),
        Block::ustar(b'0', "h").size(3).with(b"abc"),
        end(),
    ]
    .concat();
    let exact = Limits {
        entries: 3,
        depth: 41,
        extension_bytes: pax_records(attributes).len() as u64,
        xattr_value_bytes: 300,
        xattr_total_bytes: 612,
        sparse_pairs: 3,
        file_bytes: 600,
        archive_bytes: archive.len() as u64,
    };
    let read = |limits: &Limits| read_with(&archive, limits, &|_| false);
    read(&exact).unwrap_or_else(|error| panic!("{error:?}"));
    let tighter = [
        Limits { entries: 2, ..exact.clone() },
        Limits { depth: 40, ..exact.clone() },
        Limits { extension_bytes: exact.extension_bytes - 1, ..exact.clone() },
        Limits { xattr_value_bytes: 299, ..exact.clone() },
        Limits { xattr_total_bytes: 611, ..exact.clone() },
        Limits { sparse_pairs: 2, ..exact.clone() },
        Limits { file_bytes: 599, ..exact.clone() },
        Limits { archive_bytes: archive.len() as u64 - 1, ..exact.clone() },
    ];
    for limits in tighter {
        let Err(error) = read(&limits) else { panic!("{limits:?} was not kept") };
        assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "ARCHIVE_LIMIT"), "{limits:?}: {error:?}");
    }
}

#[test]
fn volatile_paths_are_left_out_with_what_is_below() {
    let archive = [
        Block::ustar(b'5', "tmp/").with(b""),
        Block::ustar(b'0', "tmp/f").size(600).with(&[1; 600]),
        Block::ustar(b'0', "kept").size(1).with(b"k"),
        Block::ustar(b'1', "tmp/link").link("kept").with(b""),
        end(),
    ];
    let filter = |path: &GuestPath| path.as_bytes() == b"/tmp";
    let (model, summary) = read_with(&archive.concat(), &Limits::default(), &filter).expect("valid");
    assert_eq!(model.iter().map(|(path, _)| path.to_string()).collect::<Vec<_>>(), ["/", "/kept"]);
    assert_eq!((summary.entries, summary.left_out, summary.data_bytes), (1, 3, 1));

    let link = [Block::ustar(b'0', "tmp/f").with(b""), Block::ustar(b'1', "kept").link("tmp/f").with(b""), end()].concat();
    let error = read_with(&link, &Limits::default(), &filter).expect_err("the data is gone");
    assert_eq!((error.kind(), error.reason()), (Kind::InvalidRequest, "HARD_LINK_LEFT_OUT"));
    assert!(error.to_string().contains("/kept") && error.to_string().contains("/tmp/f"), "{error}");
}

#[test]
fn the_readers_failure_is_reported_and_not_what_the_sink_makes_of_it() {
    struct Careless;
    impl TreeSink for Careless {
        fn entry(&mut self, _: &Entry, data: &mut dyn Read) -> Result<()> {
            let mut bytes = Vec::new();
            data.read_to_end(&mut bytes).map_err(|_| Error::internal(STAGE, "sink", "something"))?;
            Ok(())
        }
    }
    let archive = Block::ustar(b'0', "f").size(600).with(b"");
    let error = read(&mut &archive[..], &Limits::default(), &|_| false, &mut Careless, &Progress::default()).expect_err("truncated");
    assert_eq!(error.reason(), "ARCHIVE_TRUNCATED");
    let progress = Progress::default();
    progress.cancel();
    let error = read(&mut &archive[..], &Limits::default(), &|_| false, &mut Careless, &progress).expect_err("cancelled");
    assert_eq!(error.kind(), Kind::Cancelled);
}

#[test]
fn a_sink_that_reads_nothing_does_not_shift_the_archive() {
    struct Names(Vec<String>);
    impl TreeSink for Names {
        fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<()> {
            let mut one = [0; 1];
            let _ = data.read(&mut one);
            self.0.push(entry.path.to_string());
            Ok(())
        }
    }
    let big = vec![9; 300_000];
    let archive = [Block::ustar(b'0', "a").size(300_000).with(&big), Block::ustar(b'0', "b").size(1).with(b"x"), end()].concat();
    let mut names = Names(vec![]);
    read(&mut &archive[..], &Limits::default(), &|_| false, &mut names, &Progress::default()).expect("valid");
    assert_eq!(names.0, ["/a", "/b"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever bytes of a real archive are changed: an answer, never a panic, and never more members than there are blocks.
    #[test]
    fn damaged_archives_end_in_an_answer(changes in prop::collection::vec((0usize..6144, any::<u8>()), 1..8), fix in any::<bool>()) {
        let number = |value: u64| format!("{value:011o}\0");
        let mut archive = [
            pax(&[("path", b"aa"), ("mtime", b"1.5"), ("SCHILY.xattr.user.a", b"v")]),
            Block::ustar(b'0', "a").size(3).with(b"abc"),
            Block::gnu(b'L', "L").size(4).with(b"bbb\0"),
            Block::gnu(b'S', "f").size(5).text(386, &number(512)).text(398, &number(5)).text(483, &number(10_000)).with(b"abcde"),
            pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.name", b"s"), ("GNU.sparse.realsize", b"9")]),
            Block::ustar(b'0', "s").size(513).with(&[b"1\n0\n1\n".as_slice(), &[0; 506], b"x"].concat()),
            end(),
        ].concat();
        for (at, byte) in changes {
            let at = at % archive.len();
            archive[at] = byte;
        }
        if fix {
            for block in archive.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
                let fixed = Block(block.try_into().expect("512 bytes")).with(b"");
                block.copy_from_slice(&fixed);
            }
        }
        if let Ok((model, summary)) = read_with(&archive, &Limits::default(), &|_| false) {
            prop_assert!(summary.entries <= archive.len() as u64 / 512);
            for (path, node) in model.iter() {
                prop_assert!(!path.as_bytes().contains(&0));
                if let EntryKind::File { size, spans } = &node.kind {
                    prop_assert!(spans.windows(2).all(|pair| pair[0].offset + pair[0].len < pair[1].offset));
                    prop_assert!(spans.last().is_none_or(|last| last.offset + last.len <= *size));
                    prop_assert_eq!(spans.iter().map(|span| span.len).sum::<u64>(), node.data.len() as u64);
                }
                prop_assert!(node.meta.xattrs.is_sorted_by(|a: &Xattr, b: &Xattr| a.name < b.name));
            }
        }
    }
}
