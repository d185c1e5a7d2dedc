//! The ext4 editor before its judges: e2fsck of three releases finds nothing, debugfs and the kernel read back what was written, the golden never
//! changes. Needs root, loop devices, e2fsprogs and what `scripts/fixtures.sh` needs.

#[path = "../common/mod.rs"]
mod common;
mod corners;
mod hostile;
mod model;
mod support;

use cloudletd::{
    error::Kind,
    fs::edit::{Attrs, EditOp, EditRequest},
    tree::Xattr,
};
use support::*;

/// The edits of a typical injection, one of each kind and the corner cases of paths.
fn typical() -> EditRequest {
    let owned = Attrs { mode: 0o600, uid: 1000, gid: 70_000, xattrs: vec![Xattr { name: b"user.why".to_vec(), value: vec![7; 30] }] };
    request(vec![
        ("/etc/hostname", write("web-1\n")),
        ("/etc/machine-id", write("0123456789abcdef0123456789abcdef\n")),
        ("/etc/hosts", append("10.0.0.1 web-1\n")),
        ("/etc/systemd/network/10-eth0.network", write("[Match]\nName=eth0\n")),
        ("/root/.ssh/authorized_keys", EditOp::WriteFile { content: b"ssh-ed25519 AAAA\n".to_vec(), attrs: owned }),
        ("/var/log/big", append(pattern(500_000, 9))),
        ("/var/log/sparse", append(pattern(10_000, 1))),
        ("/new/dir/in/dirs/file", write(pattern(1_000_000, 5))),
        ("/var/run/through-link", write("in /run\n")),
        ("/lib/deep/er/x", write("")),
        ("/etc/resolv.conf", write("nameserver 10.0.0.2\n")),
        ("/etc/fast", link("../usr")),
        ("/etc/slow", link(&"y/".repeat(300))),
        ("/etc/long-link", link("short")),
        ("/srv", mkdir(0o2755)),
        ("/etc/ssh", mkdir(0o700)),
        ("/etc/passwd", EditOp::SetAttrs { mode: Some(0o4604), owner: Some((5, 100_000)) }),
        ("/etc/passwd", EditOp::SetXattr { name: b"user.big".to_vec(), value: Some(vec![b'x'; 700]) }),
        ("/etc/hosts", EditOp::SetXattr { name: b"user.small".to_vec(), value: None }),
        ("/usr/bin/tool2", EditOp::Remove),
        ("/run/null", EditOp::Remove),
        ("/usr/lib/deep", rename("/srv/deep")),
        ("/many/a-file-with-a-rather-long-name-00007", rename("/etc/os-release")),
        ("/not/there", EditOp::Remove),
        ("/etc/dangles/below", EditOp::Remove),
        ("/var/lib", EditOp::Remove),
    ])
}

#[track_caller]
fn check_typical(edited: &Edited) {
    let mount = edited.mount("ro");
    let seen = survey(mount.path());
    let file = |path: &str| seen.get(path).unwrap_or_else(|| panic!("{path} is missing"));
    let big = [pattern(3_000_000, 7), pattern(500_000, 9)].concat();
    let sparse = [vec![0; 5_000_000], b"end".to_vec(), pattern(10_000, 1)].concat();
    for (path, content) in [
        ("/etc/hostname", b"web-1\n".to_vec()),
        ("/etc/machine-id", b"0123456789abcdef0123456789abcdef\n".to_vec()),
        ("/etc/hosts", b"127.0.0.1 localhost\n10.0.0.1 web-1\n".to_vec()),
        ("/etc/systemd/network/10-eth0.network", b"[Match]\nName=eth0\n".to_vec()),
        ("/root/.ssh/authorized_keys", b"ssh-ed25519 AAAA\n".to_vec()),
        ("/var/log/big", big),
        ("/var/log/sparse", sparse),
        ("/new/dir/in/dirs/file", pattern(1_000_000, 5)),
        ("/run/through-link", b"in /run\n".to_vec()),
        ("/srv/deep/er/x", Vec::new()),
        ("/etc/resolv.conf", b"nameserver 10.0.0.2\n".to_vec()),
        ("/etc/os-release", b"7\n".to_vec()),
        ("/usr/bin/tool", pattern(70_000, 3)),
    ] {
        assert!(file(path).content == content, "{path} has other content");
        assert_eq!(file(path).mode & 0o170_000, 0o100_000, "{path} is a regular file");
        assert!(edited.read(path) == content, "{path}: our reader");
    }
    assert!(edited.debugfs_cat("/etc/hostname") == b"web-1\n");
    assert!(edited.debugfs_cat("/new/dir/in/dirs/file") == pattern(1_000_000, 5));
    for (path, target) in [("/etc/fast", "../usr".to_owned()), ("/etc/slow", "y/".repeat(300)), ("/etc/long-link", "short".into())] {
        assert_eq!(text(&file(path).content), target);
    }
    assert_eq!((file("/root/.ssh/authorized_keys").mode, file("/root/.ssh/authorized_keys").owner), (0o100_600, (1000, 70_000)));
    assert_eq!((file("/etc/passwd").mode, file("/etc/passwd").owner), (0o104_604, (5, 100_000)));
    for (path, mode, links) in
        [("/srv", 0o42755, 3), ("/etc/ssh", 0o40700, 2), ("/new", 0o40755, 3), ("/var", 0o40755, 3), ("/usr/bin/tool", 0o100_644, 1)]
    {
        assert_eq!((file(path).mode, file(path).links), (mode, links), "{path}");
    }
    for gone in ["/usr/bin/tool2", "/run/null", "/usr/lib/deep", "/var/lib", "/many/a-file-with-a-rather-long-name-00007"] {
        assert!(!seen.contains_key(gone), "{gone} is still there");
    }
    let image = edited.image();
    let ours = |path: &str| image.xattrs(image.lookup(&guest(path)).expect("lookup").expect("there")).expect("xattrs");
    assert_eq!(ours("/etc/hosts"), []);
    assert_eq!(ours("/etc/passwd"), [Xattr { name: b"user.big".to_vec(), value: vec![b'x'; 700] }]);
    assert_eq!(ours("/root/.ssh/authorized_keys")[0].value, [7; 30]);
}

#[test]
fn typical_edits_are_right_on_every_feature_set() {
    for (name, args) in FEATURE_SETS {
        note(name);
        let golden = Golden::make(args, "64M");
        check_typical(&golden.edited(&typical()));
    }
}

#[test]
fn paths_that_must_not_be_written_are_refused() {
    let golden = Golden::make(&["-b", "4096"], "64M");
    let before = golden.digest();
    for (path, op, kind) in [
        ("/etc/loop/x", write("x"), Kind::Conflict),
        ("/etc/climbs/x", write("x"), Kind::Conflict),
        ("/etc/dangles/x", write("x"), Kind::Conflict),
        ("/etc/hostname/x", write("x"), Kind::Conflict),
        ("/etc", write("x"), Kind::Conflict),
        ("/", write("x"), Kind::InvalidRequest),
        ("/", EditOp::Remove, Kind::InvalidRequest),
        ("/etc/nothing", append("x"), Kind::NotFound),
        ("/etc/os-release", append("x"), Kind::Conflict),
        ("/etc/nothing", rename("/x"), Kind::NotFound),
        ("/etc", rename("/etc/ssh/etc"), Kind::InvalidRequest),
        ("/etc/hosts", rename("/usr"), Kind::Conflict),
        ("/etc/hosts", mkdir(0o755), Kind::Conflict),
        ("/etc/hosts", EditOp::SetXattr { name: b"nonsense".to_vec(), value: None }, Kind::InvalidRequest),
        ("/etc/hosts", EditOp::SetXattr { name: b"user.large".to_vec(), value: Some(vec![0; 5000]) }, Kind::NoSpace),
        ("/huge", write(vec![1; 80 << 20]), Kind::NoSpace),
    ] {
        let error = golden.edit(&request(vec![(path, op.clone())])).expect_err(path);
        assert_eq!(error.kind(), kind, "{} {path}: {}", op.verb(), error.chain());
        assert!(error.object().starts_with('/'), "{}", error.chain());
    }
    golden.edited(&typical());
    assert_eq!(golden.digest(), before, "the golden changed");
}

/// Sizes to grow a golden of 64 MiB to, bytes: one block, less than a group, one group, several, many.
const GROWN: [u64; 6] = [(64 << 20) + 4096, 100 << 20, 192 << 20, 643 << 20, (1 << 30) + (200 << 10), 6400 << 20];

#[test]
fn growth_is_clean_on_every_feature_set_and_at_every_size() {
    for (i, (name, args)) in FEATURE_SETS.iter().enumerate() {
        let golden = Golden::make(args, "64M");
        // All sizes where descriptors differ; the others share the code and take turns.
        let all = ["default", "no-checksums", "1k"].contains(name);
        for (_, size) in GROWN.into_iter().enumerate().filter(|(j, _)| all || j % 3 == i % 3) {
            let grow = EditRequest { size_bytes: Some(size), ..typical() };
            let patch = match golden.edit(&grow) {
                Ok(patch) => patch,
                Err(error) => {
                    assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "EXT4_GROW_LIMIT"), "{}", error.chain());
                    note(&format!("{name} {size}: {}", error.chain()));
                    continue;
                }
            };
            note(&format!("{name} {size}: {} blocks", patch.len()));
            assert_eq!(patch.size_bytes(), size.next_multiple_of(4096));
            let edited = golden.apply(&patch);
            let blocks = edited.image().geometry().blocks_count * u64::from(edited.image().geometry().block_size);
            assert!(blocks <= size && blocks + (9 << 20) > size, "{name}: {blocks} of {size}");
        }
    }
}

#[test]
fn a_grown_filesystem_keeps_room_to_grow_sixteen_times_and_writes_no_more_for_it() {
    const GIB: u64 = 1 << 30;
    let golden = Golden::make(&[], "4G");
    let blocks = |size| golden.edit(&EditRequest { size_bytes: size, ..typical() }).expect("fits").len();
    let reserved = |image: &str| -> u32 {
        let said = String::from_utf8(run("dumpe2fs", &["-h", image]).stdout).expect("text");
        // Not told when there are none.
        let line = said.lines().find(|line| line.starts_with("Reserved GDT blocks"));
        line.map_or(0, |line| line.split_whitespace().last().expect("a word").parse().expect("a number"))
    };
    let (same, grown) = (blocks(None), blocks(Some(20 * GIB)));
    note(&format!("4 GiB: {same} blocks, 20 GiB: {grown}"));
    assert!(grown < same + 100, "{grown} blocks for growth, {same} without");
    // 160 groups in 3 blocks of descriptors; 2560 groups take 40.
    let edited = golden.edited(&EditRequest { size_bytes: Some(20 * GIB), ..typical() });
    assert_eq!(reserved(edited.str()), 37);
    check_typical(&edited);
    run("resize2fs", &[edited.str(), "320G"]);
    edited.fsck();
    assert_eq!((edited.image().geometry().gdt_blocks, reserved(edited.str())), (40, 0));
    // What lies beyond is resize2fs' own to find.
    run("resize2fs", &[edited.str(), "400G"]);
    edited.fsck();
}

#[test]
fn a_grown_filesystem_can_be_filled_by_the_kernel_and_grown_again() {
    for (name, args) in FEATURE_SETS.iter().filter(|(name, _)| ["default", "1k", "ext3-like"].contains(name)) {
        note(name);
        let golden = Golden::make(args, "64M");
        let edited = golden.edited(&EditRequest { size_bytes: Some(643 << 20), ..typical() });
        {
            let mount = edited.mount("rw");
            for i in 0..40 {
                std::fs::create_dir(mount.path().join(format!("d{i}"))).expect("mkdir");
                for j in 0..100 {
                    std::fs::write(mount.path().join(format!("d{i}/f{j}")), b"x").expect("write");
                }
            }
            let fill = mount.path().join("fill");
            if *name == "ext3-like" {
                std::fs::write(&fill, pattern(200 << 20, 1)).expect("fill");
            } else {
                run("fallocate", &["-l", "520M", fill.to_str().expect("utf-8")]);
            }
        }
        run("e2fsck", &["-fp", edited.str()]);
        run("resize2fs", &[edited.str(), "3G"]);
        edited.fsck();
        {
            let _mount = edited.mount("rw");
        }
        edited.fsck();
        check_typical(&edited);
    }
}

#[test]
fn many_files_split_leaves_and_indexes_and_can_be_removed_again() {
    for (name, args, files) in [
        ("4k", &["-b", "4096", "-N", "30000"][..], 20_000),
        ("1k", &["-b", "1024", "-N", "30000"], 8_000),
        ("no checksums", &["-b", "1024", "-N", "9000", "-O", "^metadata_csum"], 6_000),
    ] {
        let golden = Golden::make(args, "200M");
        let names: Vec<String> = (0..files).map(|i| format!("/flat/{}-file-{i}", "n".repeat(i % 60))).collect();
        let mut all = request(names.iter().map(|name| (name.as_str(), write(""))).collect());
        let start = std::time::Instant::now();
        let patch = golden.edit(&all).unwrap_or_else(|error| panic!("{}", error.chain()));
        note(&format!("{name}: {files} files in {:?}, {} blocks", start.elapsed(), patch.len()));
        let edited = golden.apply(&patch);
        let tree = edited.debugfs("htree_dump /flat");
        assert!(tree.contains("Indirect levels: 1") || files > 10_000, "{}", &tree[..tree.len().min(300)]);
        {
            let mount = edited.mount("ro");
            for name in &names {
                assert!(mount.path().join(&name[1..]).is_file(), "{name}");
            }
            assert_eq!(std::fs::read_dir(mount.path().join("flat")).expect("readdir").count(), files);
        }
        let image = edited.image();
        assert!(names.iter().all(|name| image.lookup(&guest(name)).expect("lookup").is_some()));
        drop(edited);
        let gone = all
            .edits
            .iter()
            .filter(|edit| !edit.path.as_bytes().ends_with(b"7"))
            .map(|edit| cloudletd::fs::edit::Edit { op: EditOp::Remove, ..edit.clone() });
        let gone: Vec<_> = gone.collect();
        let left = files - gone.len();
        all.edits.extend(gone);
        let edited = golden.edited(&all);
        assert_eq!(edited.image().read_dir(edited.image().lookup(&guest("/flat")).expect("lookup").expect("there")).expect("items").len(), left);
        all.edits.extend(request(vec![("/flat", EditOp::Remove)]).edits);
        drop(edited);
        golden.edited(&all);
    }
}

#[test]
fn a_new_uuid_and_label_reach_every_copy_and_every_checksum() {
    let sets = ["default", "uninit-bg", "no-checksums", "1k", "csum-seed", "orphan-file", "no-journal"];
    for (name, args) in FEATURE_SETS.iter().filter(|(name, _)| sets.contains(name)) {
        let golden = Golden::make(args, "300M");
        let uuid = *b"\x5a\x5a\x01\x02\x03\x04\x45\x06\x87\x08\x09\x0a\x0b\x0c\x0d\x0e";
        let identity = EditRequest { uuid: Some(uuid), label: Some("guest-root".into()), ..typical() };
        let patch = golden.edit(&identity).unwrap_or_else(|error| panic!("{}", error.chain()));
        note(&format!("{name}: {} blocks", patch.len()));
        let edited = golden.apply(&patch);
        check_typical(&edited);
        let blkid = text(&run("blkid", &["-p", "-o", "export", edited.str()]).stdout);
        assert!(blkid.contains("UUID=5a5a0102-0304-4506-8708-090a0b0c0d0e") && blkid.contains("LABEL=guest-root"), "{blkid}");
        let geo = edited.image().geometry().clone();
        let backup = geo.group_start(1).to_string();
        let dump = text(
            &run("dumpe2fs", &["-h", "-o", &format!("superblock={backup}"), "-o", &format!("blocksize={}", geo.block_size), edited.str()]).stdout,
        );
        assert!(dump.contains("5a5a0102-0304-4506-8708-090a0b0c0d0e") && dump.contains("guest-root"), "{dump}");
        let output = run_any("e2fsck", &["-fn", "-b", &backup, "-B", &geo.block_size.to_string(), edited.str()]);
        assert!(matches!(output.status.code(), Some(0 | 4)), "{}{}", text(&output.stdout), text(&output.stderr));
    }
}
