//! Limits and neighbours: full filesystems and directories, fragments, shared xattr blocks, ACLs, regions with rubbish behind the filesystem,
//! goldens by our own formatter.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt},
    path::Path,
    sync::Arc,
};

use cloudletd::{
    error::Kind,
    ext4::{edit::edit, format},
    fs::{
        BuildParams, Profile, Region,
        edit::{Attrs, EditOp, EditRequest},
    },
    progress::Progress,
    tree::{Entry, EntryKind, Meta, Span},
    units::{GIB, MIB, Timestamp},
};
use rustix::fs::{XattrFlags, lgetxattr, lsetxattr};
use tempfile::TempDir;

use crate::{check_typical, support::*, typical};

#[test]
fn a_file_in_many_pieces_gets_a_deep_extent_tree() {
    for args in [
        &["-b", "1024", "-N", "4000", "-O", "^has_journal"][..],
        &["-b", "1024", "-N", "4000", "-O", "^has_journal,^extent,^64bit,^metadata_csum,^flex_bg,^huge_file"],
    ] {
        let golden = Golden::make_with(args, "12M", |_| {});
        let mut ops: Vec<(String, EditOp)> = (0..3000).map(|i| (format!("/small/{i}"), write(vec![b's'; 1024]))).collect();
        ops.extend((0..3000).step_by(2).map(|i| (format!("/small/{i}"), EditOp::Remove)));
        // What is free in one piece goes first, then the gaps.
        let big = pattern(9 << 20, 11);
        ops.push(("/big".into(), write(big[..7 << 20].to_vec())));
        ops.extend(big[7 << 20..].chunks(300_000).map(|chunk| ("/big".to_owned(), append(chunk.to_vec()))));
        let request = request(ops.iter().map(|(path, op)| (path.as_str(), op.clone())).collect());
        let edited = golden.edited(&request);
        let extents = edited.debugfs("stat /big");
        assert!(edited.read("/big") == big && edited.debugfs_cat("/big") == big);
        assert!(extents.contains("ETB") || extents.contains("DIND"), "{extents}");
        let again = Golden::copy_of(&edited.path);
        let request = crate::request(vec![("/big", append(vec![b'e'; 5000])), ("/small", EditOp::Remove)]);
        assert!(again.edited(&request).read("/big") == [big, vec![b'e'; 5000]].concat());
        again.edited(&crate::request(vec![("/big", EditOp::Remove)]));
    }
}

#[test]
fn the_last_block_and_the_last_inode_can_be_used_and_not_one_more() {
    let golden = Golden::make_with(&["-b", "1024", "-N", "64", "-O", "^has_journal"], "8M", |_| {});
    let free = golden.image().superblock().free_blocks_count();
    // One file's extents fit its inode here as long as free space has at most four runs: leave room for one extent block.
    let fill = |blocks: u64| request(vec![("/fill", write(vec![1; blocks as usize * 1024]))]);
    let edited = golden.edited(&fill(free - 1));
    assert!(edited.image().superblock().free_blocks_count() <= 1);
    drop(edited);
    let error = golden.edit(&fill(free + 1)).expect_err("too much");
    assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "EXT4_NO_BLOCKS"), "{}", error.chain());
    let inodes = golden.image().superblock().free_inodes_count;
    let names: Vec<String> = (0..=inodes).map(|i| format!("/{i}")).collect();
    let all = |count: u32| request(names[..count as usize].iter().map(|name| (name.as_str(), write(""))).collect());
    assert_eq!(golden.edited(&all(inodes)).image().superblock().free_inodes_count, 0);
    let error = golden.edit(&all(inodes + 1)).expect_err("too many");
    assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "EXT4_NO_INODES"), "{}", error.chain());
}

#[test]
fn an_index_of_two_full_levels_refuses_a_third() {
    let golden = Golden::make_with(&["-b", "1024", "-N", "70000", "-O", "^metadata_csum"], "300M", |_| {});
    let names: Vec<String> = (0..62_000).map(|i| format!("/d/{}{i:05}", "x".repeat(245))).collect();
    let error = golden.edit(&request(names.iter().map(|name| (name.as_str(), write(""))).collect())).expect_err("full");
    assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "EXT4_DIR_FULL"), "{}", error.chain());
    let number: usize = error.object()[error.object().len() - 5..].parse().expect("the name that did not fit");
    assert!(number > 20_000, "{number}");
    // large_dir has a third level.
    let golden = Golden::make_with(&["-b", "1024", "-N", "70000", "-O", "large_dir"], "300M", |_| {});
    let edited = golden.edited(&request(names[..number + 3000].iter().map(|name| (name.as_str(), write(""))).collect()));
    let image = edited.image();
    assert!(names[..number + 3000].iter().step_by(97).all(|name| image.lookup(&guest(name)).expect("lookup").is_some()));
}

#[test]
fn every_hash_is_the_one_that_e2fsck_indexes_with() {
    let name = |i: usize| format!("{i}-gr\u{fc}n-\u{20ac}-{}", "h\u{e9}".repeat(i % 20));
    for (alg, flags) in [("half_md4", "1"), ("half_md4", "2"), ("tea", "1"), ("tea", "2"), ("legacy", "1"), ("legacy", "2")] {
        let golden = Golden::make_with(&["-b", "1024"], "16M", |root| {
            fs::create_dir(root.join("d")).expect("mkdir");
            for i in 0..200 {
                fs::write(root.join("d").join(name(i)), "").expect("write");
            }
        });
        let path = golden.path.to_str().expect("utf-8");
        run("tune2fs", &["-E", &format!("hash_alg={alg}"), path]);
        run("debugfs", &["-w", "-R", &format!("ssv flags {flags}"), path]);
        run_any("e2fsck", &["-fyD", path]);
        assert!(run("debugfs", &["-R", "htree_dump /d", path]).stdout.len() > 1000, "the directory is indexed");
        let image = golden.image();
        assert!((0..200).all(|i| image.lookup(&guest(&format!("/d/{}", name(i)))).expect("lookup").is_some()), "{alg} {flags}");
        let names: Vec<String> = (200..600).flat_map(|i| [format!("/d/{}", name(i)), format!("/new/{}", name(i))]).collect();
        let edited = golden.edited(&request(names.iter().map(|name| (name.as_str(), write(""))).collect()));
        let mount = edited.mount("ro");
        assert!(names.iter().all(|name| mount.path().join(&name[1..]).exists()), "{alg} {flags}: the kernel finds all");
    }
}

#[test]
fn shared_xattr_blocks_are_split_and_acls_follow_the_mode() {
    let golden = Golden::make(&["-b", "4096"], "64M");
    let acl = |group: u16, mask: u16| {
        let mut value = 2_u32.to_le_bytes().to_vec();
        for (tag, bits, id) in [(1_u16, 6_u16, u32::MAX), (2, 7, 1000), (4, group, u32::MAX), (0x10, mask, u32::MAX), (0x20, 4, u32::MAX)] {
            value.extend([tag.to_le_bytes(), bits.to_le_bytes()].concat());
            value.extend(id.to_le_bytes());
        }
        value
    };
    {
        let mount = Edited::borrowed(&golden.path).mount("rw,acl");
        for name in ["etc/hostname", "etc/hosts", "etc/passwd"] {
            lsetxattr(mount.path().join(name), "trusted.same", &[9; 900], XattrFlags::empty()).expect("setxattr");
        }
        lsetxattr(mount.path().join("usr/bin/tool"), "system.posix_acl_access", &acl(4, 5), XattrFlags::empty()).expect("setfacl");
    }
    let shared = golden.image().stat(golden.image().lookup(&guest("/etc/hosts")).expect("lookup").expect("there")).expect("stat").file_acl;
    let other = golden.image().stat(golden.image().lookup(&guest("/etc/passwd")).expect("lookup").expect("there")).expect("stat").file_acl;
    assert!(shared != 0 && shared == other, "the kernel shares the block");
    let change = |value: Option<Vec<u8>>| EditOp::SetXattr { name: b"trusted.same".to_vec(), value };
    let edited = golden.edited(&request(vec![
        ("/etc/hosts", change(Some(vec![8; 1000]))),
        ("/etc/hostname", change(None)),
        ("/usr/bin/tool", EditOp::SetAttrs { mode: Some(0o710), owner: None }),
        ("/etc/machine-id", EditOp::SetXattr { name: b"system.posix_acl_access".to_vec(), value: Some(acl(0, 7)) }),
        ("/etc/ssh", EditOp::SetXattr { name: b"system.posix_acl_default".to_vec(), value: Some(acl(5, 5)) }),
    ]));
    let mount = edited.mount("ro,acl");
    let get = |path: &str, name: &str| {
        let mut value = vec![0; 4096];
        lgetxattr(mount.path().join(path), name, &mut value[..]).ok().map(|len| value[..len].to_vec())
    };
    assert_eq!(get("etc/hosts", "trusted.same"), Some(vec![8; 1000]));
    assert_eq!(get("etc/hostname", "trusted.same"), None);
    assert_eq!(get("etc/passwd", "trusted.same"), Some(vec![9; 900]));
    let mut chmodded = acl(4, 1);
    (chmodded[6], chmodded[38]) = (7, 0);
    assert_eq!(get("usr/bin/tool", "system.posix_acl_access"), Some(chmodded), "owner, mask and others follow chmod 0710");
    assert_eq!(get("etc/machine-id", "system.posix_acl_access"), Some(acl(0, 7)));
    assert_eq!(fs::metadata(mount.path().join("etc/machine-id")).expect("stat").mode() & 0o777, 0o674);
    assert_eq!(get("etc/ssh", "system.posix_acl_default"), Some(acl(5, 5)));
    assert_eq!(get("etc/ssh", "system.posix_acl_access"), None);
}

#[test]
fn rubbish_behind_the_filesystem_does_not_get_into_a_grown_one() {
    for (name, args) in FEATURE_SETS.iter().filter(|(name, _)| ["default", "no-checksums", "1k"].contains(name)) {
        let golden = Golden::make(args, "64M");
        let (offset, len) = (MIB, 200 * MIB);
        let disk = golden.dir.path().join("disk");
        let file = File::options().read(true).write(true).create_new(true).open(&disk).expect("disk");
        file.write_all_at(&vec![0xa5; (offset + len) as usize], 0).expect("rubbish");
        file.write_all_at(&fs::read(&golden.path).expect("read"), offset).expect("filesystem");
        let region = Region { file: Arc::new(file), offset, len };
        let request = EditRequest { size_bytes: Some(400 * MIB), ..typical() };
        let patch = edit(&region, &request, &Progress::default()).unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
        let mut bytes = vec![0; len as usize];
        region.file.read_exact_at(&mut bytes, offset).expect("read");
        fs::write(golden.dir.path().join("inner"), bytes).expect("write");
        let edited = Golden::copy_of(&golden.dir.path().join("inner")).apply_into(&patch, golden.dir.path());
        check_typical(&edited);
        let mount = edited.mount("rw");
        for i in 0..300 {
            fs::create_dir_all(mount.path().join(format!("more/{i}/x"))).expect("mkdir");
        }
        drop(mount);
        edited.fsck();
    }
}

#[test]
fn growth_beyond_one_descriptor_block_keeps_the_resize_inode_right() {
    for (args, sizes) in [(&["-b", "4096"][..], [9 * GIB, 50 * GIB]), (&["-b", "1024"], [GIB, 3 * GIB])] {
        for size in sizes {
            let golden = Golden::make_with(args, "64M", |_| {});
            let edited = golden.edited(&EditRequest { size_bytes: Some(size), ..request(vec![("/x", write("x"))]) });
            let image = edited.image();
            assert!(image.geometry().gdt_blocks > golden.image().geometry().gdt_blocks);
            // Once more, from what was grown.
            let larger = Golden::copy_of(&edited.path);
            larger.edited(&EditRequest { size_bytes: Some(size + GIB), ..request(vec![("/y", write("y"))]) });
        }
        let golden = Golden::make_with(args, "64M", |_| {});
        let error = golden.edit(&EditRequest { size_bytes: Some(1 << 50), ..request(Vec::new()) }).expect_err("too large");
        assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "EXT4_GROW_LIMIT"), "{}", error.chain());
    }
}

/// A golden by our own formatter, from a tree on the host.
fn formatted(profile: Profile, len: u64) -> Golden {
    let dir = TempDir::new().expect("temporary directory");
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).expect("mkdir");
    plant(&tree);
    let path = dir.path().join("golden.ext4");
    let file = File::options().read(true).write(true).create_new(true).open(&path).expect("create");
    file.set_len(len).expect("size");
    let params =
        BuildParams { uuid: [3; 16], hash_seed: [4; 16], label: "golden".into(), profile, epoch_secs: 1_700_000_000, bytes_per_inode: 16384 };
    let mut builder = format::builder(&params, Region { file: Arc::new(file), offset: 0, len }, &Progress::default()).expect("builder");
    let (mut todo, mut links) = (vec![tree.clone()], HashMap::new());
    while let Some(at) = todo.pop() {
        let mut below: Vec<_> = fs::read_dir(&at).expect("readdir").map(|entry| entry.expect("entry").path()).collect();
        below.sort();
        for path in below {
            let meta = fs::symlink_metadata(&path).expect("stat");
            let name = guest(&format!("/{}", path.strip_prefix(&tree).expect("below").display()));
            let mut data: Box<dyn Read> = Box::new(std::io::empty());
            let first = links.entry(meta.ino()).or_insert_with(|| name.clone()).clone();
            let kind = if meta.is_dir() {
                todo.push(path.clone());
                EntryKind::Directory
            } else if first != name {
                EntryKind::HardLink { target: first }
            } else if meta.is_symlink() {
                EntryKind::Symlink { target: fs::read_link(&path).expect("readlink").into_os_string().into_encoded_bytes() }
            } else if meta.file_type().is_fifo() {
                EntryKind::Fifo
            } else if meta.file_type().is_char_device() {
                EntryKind::CharDevice { major: 1, minor: 3 }
            } else {
                data = Box::new(File::open(&path).expect("open"));
                let spans = if meta.len() == 0 { Vec::new() } else { vec![Span { offset: 0, len: meta.len() }] };
                EntryKind::File { size: meta.len(), spans }
            };
            let meta = Meta { mode: (meta.mode() & 0o7777) as u16, mtime: Timestamp { secs: meta.mtime(), nanos: 0 }, ..Meta::default() };
            builder.entry(&Entry { path: name, kind, meta }, &mut *data).expect("entry");
        }
    }
    builder.finish().expect("finish");
    fs::remove_dir_all(Path::new(&tree)).expect("remove");
    Golden { dir, path }
}

#[test]
fn goldens_of_our_formatter_are_edited_grown_and_renamed() {
    for profile in [Profile::Modern, Profile::Grub206, Profile::Compat] {
        let golden = formatted(profile, 64 * MIB);
        let small = EditOp::SetXattr { name: b"user.small".to_vec(), value: Some(b"v".to_vec()) };
        let mut edits = request(vec![("/etc/hosts", small)]);
        edits.edits.extend(typical().edits);
        check_typical(&golden.edited(&edits));
        for size in [(64 << 20) + 4096, 300 * MIB, 10 * GIB] {
            let request = EditRequest { size_bytes: Some(size), uuid: Some([6; 16]), label: Some("web-1".into()), ..edits.clone() };
            let patch = golden.edit(&request).unwrap_or_else(|error| panic!("{}", error.chain()));
            note(&format!("{profile:?} {size}: {} blocks", patch.len()));
            let edited = golden.apply(&patch);
            check_typical(&edited);
            let _mount = edited.mount("rw");
        }
        let nobody = Attrs { mode: 0o600, uid: 65534, gid: 65534, xattrs: Vec::new() };
        let many = (0..3000).map(|i| (format!("/many/more-{i}"), EditOp::WriteFile { content: vec![7; i % 50], attrs: nobody.clone() }));
        let many: Vec<(String, EditOp)> = many.collect();
        golden.edited(&request(many.iter().map(|(path, op)| (path.as_str(), op.clone())).collect()));
    }
}
