//! What is on a block device: a table of the magic bytes of filesystems, volume managers, partition tables and encryption.
//!
//! Used to refuse overwriting something that lives. It reads at most a few dozen small ranges and interprets nothing beyond the magic, so hostile
//! content can at worst cause a refusal. Offsets are those of the formats' own documents and of util-linux's libblkid.

use std::{fs::File, io, os::unix::fs::FileExt};

/// Where a magic lies.
#[derive(Clone, Copy)]
enum At {
    /// Bytes from the start.
    Start(u64),
    /// Bytes from the end.
    End(u64),
    /// md 1.0 superblock: 8 KiB before the end, rounded down to 4 KiB.
    Md10,
    /// md 0.9 superblock: the last whole 64 KiB.
    Md09,
    /// Bytes into the last whole 4 KiB (DRBD's internal metadata).
    LastPage(u64),
}

impl At {
    fn offset(self, size: u64) -> Option<u64> {
        match self {
            At::Start(offset) => Some(offset),
            At::End(distance) => size.checked_sub(distance),
            At::Md10 => (size & !511).checked_sub(8192).map(|offset| offset & !4095),
            At::Md09 => (size & !0xffff).checked_sub(0x10000),
            At::LastPage(offset) => (size & !4095).checked_sub(4096).and_then(|page| page.checked_add(offset)),
        }
    }
}

/// Name, place, magic. The more specific come first: the first match gives the name.
const TABLE: &[(&str, At, &[u8])] = &[
    ("LUKS", At::Start(0), b"LUKS\xba\xbe"),
    ("LUKS (second header)", At::Start(0x4000), b"SKUL\xba\xbe"),
    ("LVM2 physical volume", At::Start(0), b"LABELONE"),
    ("LVM2 physical volume", At::Start(512), b"LABELONE"),
    ("LVM2 physical volume", At::Start(1024), b"LABELONE"),
    ("LVM2 physical volume", At::Start(1536), b"LABELONE"),
    ("md RAID 1.1", At::Start(0), &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("md RAID 1.2", At::Start(4096), &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("md RAID 1.0", At::Md10, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("md RAID 0.90", At::Md09, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("md RAID 0.90", At::Md09, &[0xa9, 0x2b, 0x4e, 0xfc]),
    ("DDF RAID", At::End(512), &[0xde, 0x11, 0xde, 0x11]),
    ("Intel RAID", At::End(1024), b"Intel Raid ISM Cfg Sig. "),
    ("DRBD 8", At::LastPage(60), &[0x83, 0x74, 0x02, 0x6b]),
    ("DRBD 8.4", At::LastPage(60), &[0x83, 0x74, 0x02, 0x6c]),
    ("DRBD 9", At::LastPage(60), &[0x83, 0x74, 0x02, 0x6d]),
    ("bcache", At::Start(0x1018), &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca, 0x82, 0x65, 0xf5, 0x7f, 0x48, 0xba, 0x6d, 0x81]),
    ("bcachefs", At::Start(0x1018), &[0xc6, 0x85, 0x73, 0xf6, 0x66, 0xce, 0x90, 0xa9, 0xd9, 0x6a, 0x60, 0xcf, 0x80, 0x3d, 0xf7, 0xef]),
    ("Stratis pool", At::Start(0x204), b"!Stra0tis\x86\xff\x02^\x41rh"),
    ("Ceph BlueStore", At::Start(0), b"bluestore block device"),
    ("VMFS volume", At::Start(0x100000), &[0x0d, 0xd0, 0x01, 0xc0]),
    ("qcow2 image", At::Start(0), b"QFI\xfb"),
    ("VHD image", At::Start(0), b"conectix"),
    ("xfs", At::Start(0), b"XFSB"),
    ("btrfs", At::Start(0x10040), b"_BHRfS_M"),
    ("squashfs", At::Start(0), b"hsqs"),
    ("erofs", At::Start(1024), &[0xe2, 0xe1, 0xf5, 0xe0]),
    ("f2fs", At::Start(1024), &[0x10, 0x20, 0xf5, 0xf2]),
    ("jfs", At::Start(32768), b"JFS1"),
    ("reiserfs", At::Start(0x10034), b"ReIsEr"),
    ("gfs2", At::Start(0x10000), &[0x01, 0x16, 0x19, 0x70]),
    ("ocfs2", At::Start(0x1000), b"OCFSV2"),
    ("ocfs2", At::Start(0x800), b"OCFSV2"),
    ("nilfs2", At::Start(0x406), &[0x34, 0x34]),
    ("iso9660", At::Start(0x8001), b"CD001"),
    ("udf", At::Start(0x8001), b"BEA01"),
    ("ntfs", At::Start(3), b"NTFS    "),
    ("exfat", At::Start(3), b"EXFAT   "),
    ("vfat", At::Start(82), b"FAT32   "),
    ("vfat", At::Start(54), b"FAT16   "),
    ("vfat", At::Start(54), b"FAT12   "),
    ("swap", At::Start(4086), b"SWAPSPACE2"),
    ("swap", At::Start(4086), b"SWAP-SPACE"),
    ("swap", At::Start(8182), b"SWAPSPACE2"),
    ("swap", At::Start(16374), b"SWAPSPACE2"),
    ("swap", At::Start(65526), b"SWAPSPACE2"),
    ("ext2/3/4", At::Start(0x438), &[0x53, 0xef]),
    ("GPT", At::Start(512), b"EFI PART"),
    ("GPT", At::Start(4096), b"EFI PART"),
    ("GPT (backup header)", At::End(512), b"EFI PART"),
    ("GPT (backup header)", At::End(4096), b"EFI PART"),
    ("MBR or boot sector", At::Start(510), &[0x55, 0xaa]),
];

/// ZFS keeps uberblocks of 1 KiB each in the second half of each 256 KiB label; the magic is in the writer's byte order.
const ZFS_MAGIC: u64 = 0x00ba_b10c;

/// The names of what was found, most telling first, each once; empty when nothing is recognised. `size` is the device's size in bytes.
pub fn probe(device: &File, size: u64) -> io::Result<Vec<&'static str>> {
    let mut found: Vec<&'static str> = Vec::new();
    for (name, at, magic) in TABLE {
        if !found.contains(name)
            && let Some(offset) = at.offset(size)
            && matches_at(device, size, offset, magic)?
        {
            found.push(name);
        }
    }
    if has_zfs_label(device, size)? {
        found.insert(0, "zfs");
    }
    Ok(found)
}

fn matches_at(device: &File, size: u64, offset: u64, magic: &[u8]) -> io::Result<bool> {
    if offset.checked_add(magic.len() as u64).is_none_or(|end| end > size) {
        return Ok(false);
    }
    let mut bytes = [0; 32];
    let bytes = &mut bytes[..magic.len()];
    device.read_exact_at(bytes, offset)?;
    Ok(bytes == magic)
}

fn has_zfs_label(device: &File, size: u64) -> io::Result<bool> {
    const LABEL: u64 = 256 << 10;
    let end = size & !(LABEL - 1);
    let labels = [Some(0), Some(LABEL), end.checked_sub(LABEL), end.checked_sub(2 * LABEL)];
    let mut ring = vec![0; LABEL as usize / 2];
    for label in labels.into_iter().flatten().filter(|label| label + LABEL <= size) {
        device.read_exact_at(&mut ring, label + LABEL / 2)?;
        let is_magic = |block: &[u8]| block.starts_with(&ZFS_MAGIC.to_le_bytes()) || block.starts_with(&ZFS_MAGIC.to_be_bytes());
        if ring.chunks(1024).any(is_magic) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 8 << 20;

    fn scratch() -> File {
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(SIZE).expect("size");
        file
    }

    #[test]
    fn every_row_of_the_table_is_found_and_an_empty_device_is_empty() {
        assert_eq!(probe(&scratch(), SIZE).expect("reads"), Vec::<&str>::new());
        for (name, at, magic) in TABLE {
            let file = scratch();
            file.write_all_at(magic, at.offset(SIZE).expect("fits")).expect("write");
            assert!(probe(&file, SIZE).expect("reads").contains(name), "{name}");
        }
        let file = scratch();
        file.write_all_at(&ZFS_MAGIC.to_be_bytes(), (128 << 10) + 5 * 1024).expect("write");
        assert_eq!(probe(&file, SIZE).expect("reads"), ["zfs"]);
    }

    #[test]
    fn a_device_full_of_noise_or_too_small_for_a_magic_is_read_without_error() {
        let file = scratch();
        file.write_all_at(&vec![0xa5; SIZE as usize], 0).expect("write");
        assert_eq!(probe(&file, SIZE).expect("reads"), Vec::<&str>::new());
        for size in [0, 1, 511, 512, 4096, 65536] {
            file.set_len(size).expect("size");
            assert_eq!(probe(&file, size).expect("reads"), Vec::<&str>::new(), "{size}");
        }
    }
}
