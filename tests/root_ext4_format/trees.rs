//! What goes in comes out: trees read back through the kernel.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use cloudletd::{
    fs::Profile,
    tree::EntryKind,
    units::{GIB, MIB, Timestamp},
};

use crate::support::{Image, Item, Model, dir, feed_directory, file, link, node, params, run, sparse, symlink, walk, xattrs};

const PROFILES: [Profile; 3] = [Profile::Modern, Profile::Grub206, Profile::Compat];

/// One of everything.
fn zoo() -> Vec<Item> {
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [(0x01u16, 6u16, u32::MAX), (0x02, 4, 1000), (0x04, 4, u32::MAX), (0x10, 4, u32::MAX), (0x20, 4, u32::MAX)] {
        acl.extend(tag.to_le_bytes().into_iter().chain(permissions.to_le_bytes()).chain(id.to_le_bytes()));
    }
    let capability = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00".to_vec();
    let time = |secs, nanos| move |meta: &mut cloudletd::tree::Meta| meta.mtime = Timestamp { secs, nanos };
    vec![
        dir("/").with(|meta| meta.mtime.nanos = 5),
        dir("/etc").with(|meta| meta.mode = 0o2775),
        file("/etc/hostname", "zoo\n"),
        file("/etc/empty", ""),
        file("/etc/big", vec![7; 3 * MIB as usize + 17]),
        file("/implied/parents/here", "x").with(|meta| (meta.uid, meta.gid) = (70_000, u32::MAX - 1)),
        file("/etc/suid", "#!").with(|meta| meta.mode = 0o6755),
        link("/etc/hostname2", "/etc/hostname"),
        link("/implied/hostname3", "/etc/hostname2"),
        symlink("/etc/s59", vec![b'a'; 59]),
        symlink("/etc/s60", vec![b'b'; 60]),
        symlink("/etc/s61", vec![b'c'; 61]),
        symlink("/etc/s4095", vec![b'd'; 4095]),
        node("/dev/null", EntryKind::CharDevice { major: 1, minor: 3 }),
        node("/dev/big", EntryKind::CharDevice { major: 4095, minor: 0xfffff }),
        node("/dev/sda", EntryKind::BlockDevice { major: 8, minor: 0 }),
        node("/dev/nvme", EntryKind::BlockDevice { major: 259, minor: 300 }),
        node("/dev/zero-zero", EntryKind::CharDevice { major: 0, minor: 0 }),
        node("/run/fifo", EntryKind::Fifo),
        node("/run/socket", EntryKind::Socket),
        file("/times/1901", "").with(time(-2_147_483_648, 1)),
        file("/times/1969", "").with(time(-1, 999_999_999)),
        file("/times/2038", "").with(time(2_147_483_648, 7)),
        file("/times/2106", "").with(time(4_294_967_296, 0)),
        file("/times/2446", "").with(time(15_032_385_535, 999_999_999)),
        file("/x/one", "1").xattr("user.a", "1").xattr("user.empty", ""),
        file("/x/cap", "1").xattr("security.capability", capability),
        file("/x/acl", "1").xattr("system.posix_acl_access", acl).with(|meta| meta.mode = 0o644),
        file("/x/block", "1").xattr("user.a", vec![b'v'; 3000]).xattr("trusted.b", "in the inode"),
        dir("/x/same1").xattr("user.shared", vec![b'v'; 500]),
        dir("/x/same2").xattr("user.shared", vec![b'v'; 500]),
        symlink("/x/symlink", "target").xattr("trusted.on-a-link", "1"),
        file([b"/names/".as_slice(), &[0xff, 0xfe, b'\n', 0x80]].concat(), "not UTF-8"),
        file([b"/names/".as_slice(), &[b'n'; 255]].concat(), "255 bytes"),
        sparse("/holes/front", 1 << 20, &[((1 << 20) - 5, b"12345".to_vec())]),
        sparse("/holes/only", 6 * GIB + 1, &[]),
        sparse("/holes/far", 5 * GIB, &[(3, b"abc".to_vec()), (4 * GIB + 4095, b"de".to_vec())]),
        sparse("/holes/one-block", 5000, &[(0, b"a".to_vec()), (2000, b"b".to_vec()), (4090, b"0123456789".to_vec())]),
    ]
}

#[test]
fn everything_a_tree_can_hold_reads_back_through_the_kernel() {
    let items = zoo();
    for profile in PROFILES {
        let image = Image::of(64 * MIB, profile, &items);
        image.assert_clean();
        let dump = run("dumpe2fs", &[image.path.as_os_str()]);
        assert!(dump.status.success(), "dumpe2fs: {}", String::from_utf8_lossy(&dump.stderr));
        assert_eq!(image.debugfs("cat /etc/hostname"), "zoo\n");
        let mounted = image.mount("ro");
        Model::of(&items).assert_at(&mounted.at);
        mounted.unmount();
    }
}

#[test]
fn the_same_input_gives_the_same_bytes_at_any_offset() {
    let items = zoo();
    let read = |image: &Image| fs::read(&image.path).expect("read the image");
    let first = read(&Image::of(32 * MIB, Profile::Modern, &items));
    assert!(first == read(&Image::of(32 * MIB, Profile::Modern, &items)));
    let dir = tempfile::tempdir().expect("make a temporary directory");
    let path = dir.path().join("disk");
    let mut builder = crate::support::start(&path, MIB, 32 * MIB, &params(Profile::Modern)).expect("start");
    crate::support::feed(&mut *builder, &items).expect("feed");
    builder.finish().expect("finish");
    let disk = fs::read(&path).expect("read the disk");
    assert!(disk[..MIB as usize].iter().all(|b| *b == 0), "nothing is written before the region");
    assert!(disk[MIB as usize..] == first[..]);
}

#[test]
fn the_kernel_writes_into_it_and_it_stays_clean() {
    for profile in PROFILES {
        let image = Image::of(64 * MIB, profile, &zoo());
        let mounted = image.mount("rw");
        for i in 0..300 {
            fs::create_dir_all(mounted.at.join(format!("new/{i}"))).expect("make a directory");
            fs::write(mounted.at.join(format!("etc/file-{i}")), vec![i as u8; 5000]).expect("write a file");
        }
        fs::remove_file(mounted.at.join("etc/big")).expect("remove a file");
        fs::remove_dir_all(mounted.at.join("x")).expect("remove what shares an xattr block");
        fs::write(mounted.at.join("holes/front"), "now short").expect("truncate a file");
        mounted.unmount();
        image.assert_clean();
    }
}

#[test]
fn a_real_tree_of_the_host_reads_back_unchanged() {
    let roots: Vec<&str> = ["/etc", "/usr/share/doc", "/usr/bin"].into_iter().filter(|root| Path::new(root).is_dir()).collect();
    let image = Image::with(3 * GIB, &params(Profile::Modern), |sink| roots.iter().try_for_each(|root| feed_directory(sink, Path::new(root), root)))
        .expect("build the filesystem");
    image.assert_clean();
    let mounted = image.mount("ro");
    let mut compared = 0;
    for root in roots {
        walk(Path::new(root), &mut |path| {
            let there = mounted.at.join(path.strip_prefix("/").expect("absolute"));
            let (want, got) = (fs::symlink_metadata(path)?, fs::symlink_metadata(&there)?);
            let shown = path.display();
            let of = |stat: &fs::Metadata| (stat.mode(), stat.uid(), stat.gid(), stat.mtime(), stat.mtime_nsec());
            assert_eq!(of(&got), of(&want), "{shown}");
            assert_eq!(xattrs(&there), xattrs(path), "xattrs of {shown}");
            if want.is_file() {
                assert!(fs::read(&there)? == fs::read(path)?, "content of {shown}");
            } else if want.is_symlink() {
                assert_eq!(fs::read_link(&there)?, fs::read_link(path)?, "target of {shown}");
            }
            compared += 1;
            Ok(())
        })
        .expect("everything is there");
    }
    assert!(compared > 100, "{compared} paths");
    mounted.unmount();
}
