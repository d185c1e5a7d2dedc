use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use super::*;
use crate::{
    ext4::format,
    fs::{
        BuildParams, Profile,
        edit::{Attrs, EditOp},
    },
    names::GuestPath,
    tree::{Entry, EntryKind, Meta, Span, TreeSink},
    units::{GIB, MIB},
};

/// A small filesystem by the formatter, in an unlinked file.
fn golden(profile: Profile, len: u64) -> Region {
    let file = tempfile::tempfile().expect("temporary file");
    file.set_len(len).expect("size");
    let region = Region { file: Arc::new(file), offset: 0, len };
    let params =
        BuildParams { uuid: [7; 16], hash_seed: [9; 16], label: "golden".into(), profile, epoch_secs: 1_700_000_000, bytes_per_inode: 16384 };
    let mut builder = format::builder(&params, region.clone(), &Progress::default()).expect("builder");
    let mut entry = |path: &str, kind: EntryKind, data: &[u8]| {
        let meta = Meta { mode: 0o644, ..Meta::default() };
        TreeSink::entry(&mut *builder, &Entry { path: guest(path), kind, meta }, &mut &data[..]).expect("entry");
    };
    entry("/etc", EntryKind::Directory, b"");
    for (path, data) in [("/etc/hostname", &b"golden\n"[..]), ("/etc/hosts", b"127.0.0.1 localhost\n")] {
        entry(path, EntryKind::File { size: data.len() as u64, spans: vec![Span { offset: 0, len: data.len() as u64 }] }, data);
    }
    entry("/lib", EntryKind::Symlink { target: b"usr/lib".to_vec() }, b"");
    builder.finish().expect("finish");
    region
}

fn guest(path: &str) -> GuestPath {
    GuestPath::new(path).expect("a path")
}

fn write(path: &str, content: &[u8]) -> Edit {
    let op = EditOp::WriteFile { content: content.to_vec(), attrs: Attrs::root(0o640) };
    Edit { path: guest(path), op, why: String::new(), secret: false }
}

fn request(edits: Vec<Edit>) -> EditRequest {
    EditRequest { edits, now: Timestamp { secs: 1_900_000_000, nanos: 5 }, ..EditRequest::default() }
}

fn run(region: &Region, request: &EditRequest) -> Result<BlockPatch> {
    edit(region, request, &Progress::default())
}

/// The filesystem that a patch makes of a golden.
fn applied(region: &Region, patch: &BlockPatch) -> Image {
    let file: File = tempfile::tempfile().expect("temporary file");
    let mut bytes = vec![0; region.len as usize];
    region.file.read_exact_at(&mut bytes, region.offset).expect("read");
    file.write_all_at(&bytes, 0).expect("write");
    file.set_len(patch.size_bytes()).expect("size");
    for (number, block) in patch.iter() {
        file.write_all_at(block, number * 4096).expect("write");
    }
    Image::open(&Region { file: Arc::new(file), offset: 0, len: patch.size_bytes() }).expect("open")
}

fn content(image: &Image, path: &str) -> Option<Vec<u8>> {
    image.lookup(&guest(path)).expect("lookup").map(|ino| image.read_file(ino, MIB).expect("read"))
}

#[test]
fn written_files_are_read_back_from_the_patched_golden_and_the_golden_keeps_its_own() {
    for profile in [Profile::Modern, Profile::Grub206, Profile::Compat] {
        let region = golden(profile, 32 * MIB);
        let patch = run(&region, &request(vec![write("/etc/hostname", b"web-1\n"), write("/a/b/c", &[5; 10_000])])).expect("edit");
        let image = applied(&region, &patch);
        assert_eq!(content(&image, "/etc/hostname").as_deref(), Some(&b"web-1\n"[..]));
        assert_eq!(content(&image, "/a/b/c").as_deref(), Some(&[5; 10_000][..]));
        assert_eq!(content(&Image::open(&region).expect("open"), "/etc/hostname").as_deref(), Some(&b"golden\n"[..]));
        let ino = image.lookup(&guest("/a/b/c")).expect("lookup").expect("there");
        let stat = image.stat(ino).expect("stat");
        assert_eq!((stat.mode & 0o7777, stat.mtime.secs, stat.crtime.nanos), (0o640, 1_900_000_000, 5));
    }
}

#[test]
fn the_same_request_gives_the_same_patch_and_nothing_gives_an_empty_one() {
    let region = golden(Profile::Modern, 32 * MIB);
    let edits = request((0..50).map(|i| write(&format!("/new/{i}"), &[i; 3000])).collect());
    assert!(run(&region, &edits).expect("edit") == run(&region, &edits).expect("again"));
    let nothing = run(&region, &request(Vec::new())).expect("edit");
    assert!(nothing.is_empty() && nothing.size_bytes() == region.len);
}

#[test]
fn eleven_small_files_change_a_few_dozen_blocks() {
    let region = golden(Profile::Modern, 256 * MIB);
    let edits = request((0..11).map(|i| write(&format!("/etc/conf.d/{i}"), &[1; 300])).collect());
    let blocks = run(&region, &edits).expect("edit").len();
    assert!(blocks <= 24, "{blocks} blocks");
}

#[test]
fn a_request_that_fails_or_is_cancelled_gives_no_patch() {
    let region = golden(Profile::Modern, 32 * MIB);
    let error = run(&region, &request(vec![write("/x", b""), write("/etc", b"")])).expect_err("a directory is in the way");
    assert_eq!((error.kind(), error.object()), (Kind::Conflict, "/etc"));
    let error = run(&region, &request(vec![write("/lib/x", b"")])).expect_err("the link dangles");
    assert_eq!((error.kind(), error.reason()), (Kind::Conflict, "GUEST_LINK_REFUSED"));
    let label = EditRequest { label: Some("seventeen letters".into()), ..EditRequest::default() };
    assert_eq!(run(&region, &label).expect_err("too long").kind(), Kind::InvalidRequest);
    let progress = Progress::default();
    progress.cancel();
    assert_eq!(edit(&region, &request(Vec::new()), &progress).expect_err("cancelled").kind(), Kind::Cancelled);
}

#[test]
fn growth_ends_where_the_descriptor_table_does_and_says_so() {
    let region = golden(Profile::Modern, 32 * MIB);
    let error = run(&region, &EditRequest { size_bytes: Some(u64::MAX), ..request(Vec::new()) }).expect_err("too large");
    assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "EXT4_GROW_LIMIT"));
    let largest: u64 = error.message().split(' ').rev().nth(3).and_then(|word| word.parse().ok()).expect("the largest size is named");
    assert!(largest >= GIB, "{}", error.chain());
    let patch = run(&region, &EditRequest { size_bytes: Some(largest), ..request(Vec::new()) }).expect("the largest size works");
    assert_eq!(patch.size_bytes(), largest.next_multiple_of(4096));
    assert!(run(&region, &EditRequest { size_bytes: Some(largest + 4096), ..request(Vec::new()) }).is_err());
    let smaller = run(&region, &EditRequest { size_bytes: Some(MIB), ..request(Vec::new()) }).expect("nothing to do");
    assert!(smaller.is_empty() && smaller.size_bytes() == region.len);
}

#[test]
fn names_in_an_index_are_found_after_splits() {
    let region = golden(Profile::Modern, 64 * MIB);
    let names: Vec<String> = (0..1500).map(|i| format!("/dir/{}{i}", "long-".repeat(i % 30))).collect();
    let mut edits: Vec<Edit> = names.iter().map(|name| write(name, b"")).collect();
    edits.extend(names.iter().step_by(3).map(|name| Edit { op: EditOp::Remove, ..write(name, b"") }));
    let image = applied(&region, &run(&region, &request(edits)).expect("edit"));
    for (i, name) in names.iter().enumerate() {
        assert_eq!(image.lookup(&guest(name)).expect("lookup").is_some(), i % 3 != 0, "{name}");
    }
    let dir = image.lookup(&guest("/dir")).expect("lookup").expect("there");
    assert_eq!(image.read_dir(dir).expect("items").len(), 1000);
}
