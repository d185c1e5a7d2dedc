//! Sizes and shapes: the same numbers as mke2fs, clean at every border, and room to grow.

use std::{collections::BTreeMap, fs::File};

use cloudletd::{
    error::Kind,
    fs::{BuildParams, Profile},
    units::{GIB, KIB, MIB},
};

use crate::support::{Image, Model, dir, feed, file, params, run, start};

const BLOCK: u64 = 4 * KIB;
const GROUP: u64 = 128 * MIB;
const FLEX: u64 = 16 * GROUP;

fn header(path: &std::path::Path) -> BTreeMap<String, String> {
    let output = run("dumpe2fs", &["-h".as_ref(), path.as_os_str()]);
    assert!(output.status.success(), "dumpe2fs: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter_map(|line| line.split_once(':')).map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect()
}

fn with_ratio(profile: Profile, bytes_per_inode: u32) -> BuildParams {
    BuildParams { bytes_per_inode, ..params(profile) }
}

#[test]
fn counts_are_those_of_mke2fs() {
    let features = [
        (Profile::Modern, "metadata_csum_seed,^orphan_file"),
        (Profile::Grub206, "^metadata_csum_seed,^orphan_file"),
        (Profile::Compat, "^64bit,^metadata_csum,uninit_bg,^metadata_csum_seed,^orphan_file"),
    ];
    let keys = [
        "Filesystem features",
        "Filesystem flags",
        "Default mount options",
        "Filesystem state",
        "Errors behavior",
        "Inode count",
        "Block count",
        "Reserved block count",
        "Free inodes",
        "First block",
        "Reserved GDT blocks",
        "Blocks per group",
        "Inodes per group",
        "Flex block group size",
        "Maximum mount count",
        "Check interval",
        "First inode",
        "Inode size",
        "Required extra isize",
        "Desired extra isize",
        "Journal inode",
        "Default directory hash",
        "Journal backup",
        "Checksum type",
        "Journal features",
        "Total journal blocks",
        "Group descriptor size",
        "Journal start",
    ];
    let sizes = [9 * MIB, 64 * MIB, GROUP + 4 * MIB, GROUP - BLOCK, GIB, 3 * GIB, 10 * GIB + 7 * MIB, 40 * GIB, 300 * GIB];
    for (profile, flags) in features {
        for size in sizes {
            let image = Image::of(size, profile, &[]);
            let peer = image.dir.path().join("peer.img");
            File::create(&peer).and_then(|file| file.set_len(size)).expect("make a sparse file");
            let args = ["-q", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "5", "-O", flags];
            let args: Vec<&std::ffi::OsStr> = args.iter().map(AsRef::as_ref).chain([peer.as_os_str()]).collect();
            let output = run("mke2fs", &args);
            assert!(output.status.success(), "mke2fs: {}", String::from_utf8_lossy(&output.stderr));
            let (ours, theirs) = (header(&image.path), header(&peer));
            for key in keys {
                assert_eq!(ours.get(key), theirs.get(key), "{key} of {size} bytes, {profile:?}");
            }
        }
    }
}

#[test]
fn every_border_of_groups_and_flexible_groups_is_clean() {
    let mut sizes: Vec<u64> = vec![8 * MIB, 8 * MIB + BLOCK];
    for border in [GROUP, 2 * GROUP, 3 * GROUP, 4 * GROUP, FLEX, FLEX + GROUP] {
        // One block, some too few and some just enough blocks in the last group.
        sizes.extend([border - BLOCK, border, border + BLOCK, border + 2 * MIB, border + 2 * MIB + 300 * KIB, border + 3 * MIB, border + 4 * MIB]);
    }
    for size in sizes {
        let profile = if size % (2 * BLOCK) == 0 { Profile::Modern } else { Profile::Compat };
        let image = Image::of(size, profile, &[dir("/a"), file("/a/b", vec![1; 70_000])]);
        image.assert_clean();
        assert!(image.built.size_bytes <= size && image.built.size_bytes + 8 * MIB > size, "{size}: {:?}", image.built);
    }
}

#[test]
fn a_last_group_is_dropped_below_and_kept_from_mke2fs_s_threshold() {
    // About 260 blocks of table, 2 bitmaps, backup of super, descriptors and 15 reserved ones, and 50 blocks to spare.
    let sizes: Vec<u64> = (280..380).map(|blocks| GROUP + blocks * BLOCK).collect();
    let kept: Vec<bool> = sizes
        .iter()
        .map(|size| {
            let image = Image::of(*size, Profile::Modern, &[]);
            if image.built.size_bytes != GROUP {
                image.assert_clean();
            }
            image.built.size_bytes == *size
        })
        .collect();
    assert!(!kept[0] && kept[kept.len() - 1] && kept.is_sorted(), "there is one threshold: {kept:?}");
}

#[test]
fn many_inodes_push_tables_over_backups_and_it_stays_clean() {
    // 4096 bytes per inode: 2048 blocks of table per group, 32768 for the 16 groups at the front: they reach into group 1 with its backup.
    let items = [dir("/d"), file("/d/f", vec![3; 100_000])];
    for size in [FLEX, FLEX + GROUP / 2, GROUP, 20 * MIB] {
        let image = Image::with(size, &with_ratio(Profile::Modern, 4096), |sink| feed(sink, &items)).expect("build");
        image.assert_clean();
        let mounted = image.mount("ro");
        Model::of(&items).assert_at(&mounted.at);
        mounted.unmount();
    }
    let image = Image::with(GIB, &with_ratio(Profile::Compat, 64 << 20), |sink| feed(sink, &items)).expect("build");
    image.assert_clean();
}

#[test]
fn a_terabyte_is_a_sparse_file_of_little_metadata() {
    use std::os::unix::fs::MetadataExt as _;
    let image = Image::with(1024 * GIB, &with_ratio(Profile::Modern, 1 << 20), |sink| feed(sink, &[file("/f", "x")])).expect("build");
    image.assert_clean();
    let allocated = image.path.metadata().expect("stat").blocks() * 512;
    assert!(allocated < 64 * MIB, "{allocated} bytes are allocated");
}

#[test]
fn sizes_and_ratios_out_of_range_are_refused_with_the_limit() {
    let dir = tempfile::tempdir().expect("make a temporary directory");
    let path = dir.path().join("disk");
    let refused = |size, params: &BuildParams| start(&path, 0, size, params).err().map(|error| error.kind());
    let good = params(Profile::Modern);
    assert_eq!(refused(8 * MIB - BLOCK, &good), Some(Kind::NoSpace));
    assert_eq!(refused(8 * MIB, &good), None);
    for ratio in [0, 4095, (64 << 20) + 1] {
        assert_eq!(refused(GIB, &with_ratio(Profile::Modern, ratio)), Some(Kind::InvalidRequest));
    }
    assert_eq!(refused(GIB, &BuildParams { label: "x".repeat(17), ..good.clone() }), Some(Kind::InvalidRequest));
}

#[test]
fn resize2fs_grows_it_and_so_does_the_kernel_while_mounted() {
    for profile in [Profile::Modern, Profile::Grub206, Profile::Compat] {
        let image = Image::of(200 * MIB, profile, &[dir("/d"), file("/d/f", vec![9; 1_000_000])]);
        File::options().write(true).open(&image.path).and_then(|file| file.set_len(3 * GIB)).expect("grow the disk");
        let output = run("resize2fs", &["-f".as_ref(), image.path.as_os_str(), "2G".as_ref()]);
        assert!(output.status.success(), "resize2fs: {}", String::from_utf8_lossy(&output.stderr));
        image.assert_clean();
        let mounted = image.mount("ro");
        assert_eq!(std::fs::read(mounted.at.join("d/f")).expect("read"), vec![9; 1_000_000]);
        mounted.unmount();
        if !may_resize_online() {
            eprintln!("not tried: growing while mounted; the kernel wants CAP_SYS_RESOURCE for it");
            continue;
        }
        // resize2fs has cut the file to the filesystem's size.
        File::options().write(true).open(&image.path).and_then(|file| file.set_len(3 * GIB)).expect("grow the disk");
        let mounted = image.mount("rw");
        let device = run("findmnt", &["-n".as_ref(), "-o".as_ref(), "SOURCE".as_ref(), mounted.at.as_os_str()]);
        let device = String::from_utf8_lossy(&device.stdout).trim().to_owned();
        let output = run("resize2fs", &[device.as_ref()]);
        assert!(output.status.success(), "resize2fs online: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(std::fs::read(mounted.at.join("d/f")).expect("read"), vec![9; 1_000_000]);
        mounted.unmount();
        image.assert_clean();
        assert_eq!(header(&image.path)["Block count"], (3 * GIB / BLOCK).to_string());
    }
}

/// Even root lacks it in some containers.
fn may_resize_online() -> bool {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let status = std::fs::read_to_string("/proc/self/status").expect("read /proc/self/status");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("a kernel with capabilities");
    u64::from_str_radix(effective.trim(), 16).expect("hexadecimal") & CAP_SYS_RESOURCE != 0
}
