//! Which features a new filesystem has, and why.
//!
//! | feature | modern | grub206 | compat | why |
//! |---|---|---|---|---|
//! | has_journal, ext_attr, dir_index, filetype, extent, flex_bg, sparse_super, large_file, huge_file, dir_nlink, extra_isize | yes | yes | yes | what mke2fs has made for ext4 since 2008; read by every boot loader |
//! | resize_inode | yes | yes | yes | the guest can grow online, up to 1024 times, without moving anything |
//! | 64bit | yes | yes | no | pygrub's reader (libfsimage) and extlinux know 32-byte group descriptors only |
//! | metadata_csum | yes | yes | no | needs Linux 3.5 and e2fsprogs 1.43; GRUB 2.06 reads it |
//! | metadata_csum_seed | yes | no | no | the seed stays when the UUID changes, so a new UUID touches superblocks only; needs Linux 4.4, and GRUB up to 2.06 refuses it |
//! | uninit_bg (gdt_csum) | no | no | yes | a read-only compatible feature, so readers ignore it: libfsimage and extlinux grew up on the uninit_bg filesystems that mke2fs made by default from 2008 to 2015; fsck skips unused inode tables by it. metadata_csum replaces it |
//! | orphan_file, fast_commit, ea_inode, inline_data | no | no | no | boot loaders or kernels in use refuse them |
//!
//! Journal: no feature bits, as mke2fs leaves it; the kernel adds 64bit and the checksum version it knows when it first mounts read-write. With
//! checksum_v3 set here, kernels before 3.18 would refuse the journal.

use super::layout::{compat, incompat, ro_compat};
use crate::fs::Profile;

/// Bytes per inode record: room for the extra fields and 96 bytes of xattrs, as mke2fs makes it.
pub const INODE_SIZE: u16 = 256;
/// Groups per flexible group, as a power of two (16, as mke2fs).
pub const FLEX_LOG: u8 = 4;
/// Share of blocks only root may use (mke2fs -m).
pub const RESERVED_PERCENT: u64 = 5;
/// Allowed bytes per inode: below a block no group's bitmap could hold the inodes; the upper bound is mke2fs's.
pub const BYTES_PER_INODE: std::ops::RangeInclusive<u32> = 4096..=64 << 20;

/// The three feature words of a superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// `s_feature_compat`.
    pub compat: u32,
    /// `s_feature_incompat`.
    pub incompat: u32,
    /// `s_feature_ro_compat`.
    pub ro_compat: u32,
}

impl Features {
    /// The features of a profile.
    pub fn of(profile: Profile) -> Self {
        let common = Features {
            compat: compat::HAS_JOURNAL | compat::EXT_ATTR | compat::RESIZE_INODE | compat::DIR_INDEX,
            incompat: incompat::FILETYPE | incompat::EXTENTS | incompat::FLEX_BG,
            ro_compat: ro_compat::SPARSE_SUPER | ro_compat::LARGE_FILE | ro_compat::HUGE_FILE | ro_compat::DIR_NLINK | ro_compat::EXTRA_ISIZE,
        };
        let checked = Features { incompat: common.incompat | incompat::BIT64, ro_compat: common.ro_compat | ro_compat::METADATA_CSUM, ..common };
        match profile {
            Profile::Modern => Features { incompat: checked.incompat | incompat::CSUM_SEED, ..checked },
            Profile::Grub206 => checked,
            Profile::Compat => Features { ro_compat: common.ro_compat | ro_compat::GDT_CSUM, ..common },
        }
    }

    /// Whether the checksum seed is stored.
    pub fn csum_seed(&self) -> bool {
        self.incompat & incompat::CSUM_SEED != 0
    }

    /// Whether all metadata has crc32c checksums.
    pub fn metadata_csum(&self) -> bool {
        self.ro_compat & ro_compat::METADATA_CSUM != 0
    }

    /// Whether descriptors have 64 bytes.
    pub fn bit64(&self) -> bool {
        self.incompat & incompat::BIT64 != 0
    }
}
