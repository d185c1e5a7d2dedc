//! A damaged ext4 image and a list of edits: errors are fine; panics, loops and memory without bound are not. What comes out is within the disk and
//! the same twice; and from an image without damage comes one that is read without an error and has what was written.

#![no_main]

use std::{collections::BTreeMap, os::unix::fs::FileExt};

use arbitrary::{Arbitrary, Result, Unstructured};
use cloudletd::{
    error::Kind,
    ext4::{edit::edit, read::Image},
    fs::{
        edit::{Attrs, Edit, EditOp, EditRequest},
        patch::BlockPatch,
    },
    names::GuestPath,
    progress::Progress,
    tree::Xattr,
    units::Timestamp,
};
use fuzz_kit::{damage::Damaged, goldens::Golden};
use libfuzzer_sys::fuzz_target;

/// Edits in one request.
const EDITS_MAX: usize = 10;
/// What a filesystem may be asked to grow to: a descriptor block holds 64 groups of 128 MiB, so this costs megabytes.
const SIZE_MAX: u64 = 1 << 40;
/// Blocks of a patch: what is written, some metadata, and the descriptors of [`SIZE_MAX`] with their backups.
const PATCH_BLOCKS_MAX: usize = 20_000;

const PATHS: [&str; 18] = [
    "/",
    "/etc",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/hosts.link",
    "/etc/fast",
    "/etc/slow",
    "/etc/loop",
    "/etc/fast/deep/er/file",
    "/etc/null",
    "/var",
    "/var/run/new",
    "/var/sparse",
    "/many",
    "/many/a-file-with-a-name-that-is-long-enough-to-fill-blocks-042",
    "/new/dir/in/dirs/file",
    "/usr/lib/deep",
    "/lost+found",
];

fn path(input: &mut Unstructured<'_>) -> Result<GuestPath> {
    let which = usize::from(u8::arbitrary(input)?);
    let known = GuestPath::new(PATHS[which % PATHS.len()]).expect("a path");
    if which < 180 {
        return Ok(known);
    }
    // A name of some length below it; many of them make a directory split.
    let name = [b'a' + u8::arbitrary(input)? % 26].repeat(1 + usize::from(u8::arbitrary(input)?) % 255);
    Ok(known.join(name).unwrap_or(known))
}

fn content(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let len = usize::from(u16::arbitrary(input)?);
    // Mostly small; some larger than what is free in the smallest golden.
    let len = if len > 65_000 { (len - 65_000) * 8192 } else { len };
    Ok(vec![b'c'; len])
}

fn xattr(input: &mut Unstructured<'_>) -> Result<Xattr> {
    let names = ["user.a", "user.small", "user.large", "security.capability", "trusted.x", "system.posix_acl_access", "odd", "user."];
    let name = names[usize::from(u8::arbitrary(input)?) % names.len()].as_bytes().to_vec();
    Ok(Xattr { name, value: vec![b'v'; usize::from(u16::arbitrary(input)?) % 5000] })
}

fn attrs(input: &mut Unstructured<'_>) -> Result<Attrs> {
    let mut attrs = Attrs { mode: u16::arbitrary(input)? & 0o7777, uid: u32::arbitrary(input)?, gid: u32::arbitrary(input)?, xattrs: Vec::new() };
    if bool::arbitrary(input)? {
        attrs.xattrs.push(xattr(input)?);
    }
    Ok(attrs)
}

fn op(input: &mut Unstructured<'_>) -> Result<EditOp> {
    Ok(match u8::arbitrary(input)? % 8 {
        0 => EditOp::WriteFile { content: content(input)?, attrs: attrs(input)? },
        1 => EditOp::AppendFile { content: content(input)? },
        2 => EditOp::MakeDir { attrs: attrs(input)? },
        3 => EditOp::Symlink { target: vec![b't'; usize::from(u16::arbitrary(input)?) % 4200], attrs: attrs(input)? },
        4 => EditOp::Remove,
        5 => EditOp::SetAttrs { mode: Option::arbitrary(input)?, owner: Option::arbitrary(input)? },
        6 => {
            let xattr = xattr(input)?;
            EditOp::SetXattr { name: xattr.name, value: bool::arbitrary(input)?.then_some(xattr.value) }
        }
        _ => EditOp::Rename { to: path(input)? },
    })
}

fn request(input: &mut Unstructured<'_>, golden: &Golden) -> Result<EditRequest> {
    let mut request = EditRequest { now: Timestamp { secs: i64::from(u32::arbitrary(input)?), nanos: 1 }, ..EditRequest::default() };
    let choice = u8::arbitrary(input)?;
    request.uuid = (choice & 1 != 0).then_some([choice; 16]);
    request.label = (choice & 2 != 0).then(|| "l".repeat(usize::from(choice >> 3) % 20));
    if choice & 4 != 0 {
        let (shift, more) = (u8::arbitrary(input)? % 41, u32::arbitrary(input)?);
        request.size_bytes = Some((golden.bytes.len() as u64 + (u64::from(more) << shift)).min(SIZE_MAX));
    }
    for _ in 0..usize::from(u8::arbitrary(input)?) % (EDITS_MAX + 1) {
        request.edits.push(Edit { path: path(input)?, op: op(input)?, why: String::new(), secret: false });
    }
    Ok(request)
}

/// What files must contain in the end, as far as that is plain: the last edit, and no rename or removal that could have moved it.
fn written(request: &EditRequest) -> BTreeMap<&GuestPath, &[u8]> {
    let mut files = BTreeMap::new();
    for edit in &request.edits {
        match &edit.op {
            EditOp::WriteFile { content, .. } if !edit.path.components().any(|name| matches!(name, b"fast" | b"run" | b"loop" | b"slow")) => {
                files.insert(&edit.path, &content[..]);
            }
            EditOp::SetAttrs { .. } | EditOp::SetXattr { .. } | EditOp::MakeDir { .. } => {}
            _ => files.clear(),
        }
    }
    files
}

/// Applies a patch to the golden's file, hands it over, and takes it back.
fn with_applied(golden: &Golden, patch: &BlockPatch, check: impl FnOnce()) {
    golden.file.set_len(patch.size_bytes()).expect("grow");
    for (number, block) in patch.iter() {
        golden.file.write_all_at(block, number * 4096).expect("apply");
    }
    check();
    golden.file.set_len(golden.bytes.len() as u64).expect("shrink");
    for (number, _) in patch.iter() {
        let at = (number * 4096) as usize;
        if at < golden.bytes.len() {
            golden.file.write_all_at(&golden.bytes[at..golden.bytes.len().min(at + 4096)], at as u64).expect("take back");
        }
    }
}

fn check_applied(golden: &Golden, patch: &BlockPatch, request: &EditRequest) {
    let mut region = golden.region();
    region.len = patch.size_bytes();
    let image = Image::open(&region).expect("the edited image opens");
    image.check_editable().expect("the edited image is clean");
    image
        .walk(&mut |path, ino, inode| {
            let path = String::from_utf8_lossy(path);
            image.xattrs(ino).unwrap_or_else(|error| panic!("{path}: {}", error.chain()));
            if inode.is_file() {
                image.read_file(ino, 1 << 24).unwrap_or_else(|error| panic!("{path}: {}", error.chain()));
            }
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    for (path, content) in written(request) {
        let ino = image.lookup(path).expect("lookup").unwrap_or_else(|| panic!("{path} is missing"));
        assert!(image.read_file(ino, 1 << 24).expect("a file") == content, "{path} has another content");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Unstructured::new(bytes);
    let Ok(damaged) = Damaged::from_input(&mut input) else { return };
    let golden = damaged.golden;
    let Ok(request) = request(&mut input, golden) else { return };
    let outcome = edit(&golden.region(), &request, &Progress::default());
    match outcome {
        Ok(patch) => {
            assert!(patch.len() <= PATCH_BLOCKS_MAX, "{} blocks", patch.len());
            assert!(patch.size_bytes() >= golden.bytes.len() as u64);
            assert!(patch.iter().all(|(number, _)| (number + 1) * 4096 <= patch.size_bytes()), "a block behind the end");
            let again = edit(&golden.region(), &request, &Progress::default());
            assert!(again.is_ok_and(|again| again == patch), "the same input gives the same patch");
            if damaged.is_whole() {
                with_applied(golden, &patch, || check_applied(golden, &patch, &request));
            }
        }
        Err(error) => {
            let allowed = [Kind::NoSpace, Kind::NotFound, Kind::Conflict, Kind::InvalidRequest, Kind::Unsupported];
            assert!(!damaged.is_whole() || allowed.contains(&error.kind()), "{}", error.chain());
            let _ = error.chain();
        }
    }
});
