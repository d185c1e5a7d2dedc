//! The superblock: 1024 bytes at byte 1024 of the filesystem, with copies at the start of the groups that hold backups.

use super::{corrupt, join, le_struct, need};
use crate::error::Result;

/// Where the first superblock is, bytes.
pub const OFFSET: u64 = 1024;
/// `s_magic`.
pub const MAGIC: u16 = 0xEF53;
/// `s_state`: cleanly unmounted.
pub const STATE_VALID: u16 = 1;
/// `s_state`: errors were seen.
pub const STATE_ERROR: u16 = 2;
/// `s_errors`: go on after an error.
pub const ERRORS_CONTINUE: u16 = 1;
/// `s_rev_level` of everything with features.
pub const REV_DYNAMIC: u32 = 1;
/// `s_flags`: directory hashes treat name bytes as signed.
pub const FLAG_SIGNED_HASH: u32 = 1;
/// `s_flags`: directory hashes treat name bytes as unsigned.
pub const FLAG_UNSIGNED_HASH: u32 = 2;
/// `s_checksum_type`: crc32c.
pub const CHECKSUM_CRC32C: u8 = 1;
/// `s_default_mount_opts`: user xattrs.
pub const DEFM_XATTR_USER: u32 = 0x4;
/// `s_default_mount_opts`: POSIX ACLs.
pub const DEFM_ACL: u32 = 0x8;
/// `s_jnl_backup_type`: `s_jnl_blocks` holds the journal inode's block map and size.
pub const JNL_BACKUP_BLOCKS: u8 = 1;
/// Offset of `s_checksum`; it covers the bytes before it.
pub const CHECKSUM_AT: usize = 0x3FC;

le_struct! {
    /// All fields, named as in the kernel without the `s_`.
    Superblock, 1024, {
        /// Inodes in all.
        inodes_count: u32 = 0x0,
        /// Blocks in all, low half.
        blocks_count_lo: u32 = 0x4,
        /// Blocks only root may use, low half.
        r_blocks_count_lo: u32 = 0x8,
        /// Free blocks, low half.
        free_blocks_count_lo: u32 = 0xC,
        /// Free inodes.
        free_inodes_count: u32 = 0x10,
        /// First block of group 0: 1 with blocks of 1 KiB, else 0.
        first_data_block: u32 = 0x14,
        /// Block size is `1024 << this`.
        log_block_size: u32 = 0x18,
        /// Cluster size is `1024 << this`.
        log_cluster_size: u32 = 0x1C,
        /// Blocks per group.
        blocks_per_group: u32 = 0x20,
        /// Clusters per group.
        clusters_per_group: u32 = 0x24,
        /// Inodes per group.
        inodes_per_group: u32 = 0x28,
        /// Last mount, seconds, low 32 bits.
        mtime: u32 = 0x2C,
        /// Last write, seconds, low 32 bits.
        wtime: u32 = 0x30,
        /// Mounts since the last check.
        mnt_count: u16 = 0x34,
        /// Mounts until the next check; 0xffff for never.
        max_mnt_count: u16 = 0x36,
        /// [`MAGIC`].
        magic: u16 = 0x38,
        /// [`STATE_VALID`] and others.
        state: u16 = 0x3A,
        /// What to do after an error.
        errors: u16 = 0x3C,
        /// Minor revision.
        minor_rev_level: u16 = 0x3E,
        /// Last check, seconds, low 32 bits.
        lastcheck: u32 = 0x40,
        /// Seconds between checks; 0 for never.
        checkinterval: u32 = 0x44,
        /// 0 is Linux.
        creator_os: u32 = 0x48,
        /// [`REV_DYNAMIC`].
        rev_level: u32 = 0x4C,
        /// User that may use reserved blocks.
        def_resuid: u16 = 0x50,
        /// Group that may use reserved blocks.
        def_resgid: u16 = 0x52,
        /// First inode that is not reserved.
        first_ino: u32 = 0x54,
        /// Bytes per inode.
        inode_size: u16 = 0x58,
        /// The group this copy is in.
        block_group_nr: u16 = 0x5A,
        /// See [`super::compat`].
        feature_compat: u32 = 0x5C,
        /// See [`super::incompat`].
        feature_incompat: u32 = 0x60,
        /// See [`super::ro_compat`].
        feature_ro_compat: u32 = 0x64,
        /// UUID.
        uuid: [u8; 16] = 0x68,
        /// Label, padded with NULs.
        volume_name: [u8; 16] = 0x78,
        /// Where it was last mounted.
        last_mounted: [u8; 64] = 0x88,
        /// Unused (compression).
        algorithm_usage_bitmap: u32 = 0xC8,
        /// Unused (preallocation).
        prealloc_blocks: u8 = 0xCC,
        /// Unused (preallocation).
        prealloc_dir_blocks: u8 = 0xCD,
        /// Blocks kept after each descriptor table for growth.
        reserved_gdt_blocks: u16 = 0xCE,
        /// UUID of an external journal.
        journal_uuid: [u8; 16] = 0xD0,
        /// Inode of the journal.
        journal_inum: u32 = 0xE0,
        /// Device of an external journal.
        journal_dev: u32 = 0xE4,
        /// Head of the list of orphaned inodes.
        last_orphan: u32 = 0xE8,
        /// Seed of directory hashes.
        hash_seed: [u32; 4] = 0xEC,
        /// Default hash, see `hash`.
        def_hash_version: u8 = 0xFC,
        /// [`JNL_BACKUP_BLOCKS`].
        jnl_backup_type: u8 = 0xFD,
        /// Bytes per group descriptor with 64bit; 0 or 32 without.
        desc_size: u16 = 0xFE,
        /// Default mount options.
        default_mount_opts: u32 = 0x100,
        /// First meta block group.
        first_meta_bg: u32 = 0x104,
        /// Creation, seconds, low 32 bits.
        mkfs_time: u32 = 0x108,
        /// Copy of the journal inode: 15 words of `i_block`, then size high and low.
        jnl_blocks: [u32; 17] = 0x10C,
        /// Blocks in all, high half.
        blocks_count_hi: u32 = 0x150,
        /// Reserved blocks, high half.
        r_blocks_count_hi: u32 = 0x154,
        /// Free blocks, high half.
        free_blocks_count_hi: u32 = 0x158,
        /// Every inode has at least this many extra bytes.
        min_extra_isize: u16 = 0x15C,
        /// New inodes should have this many extra bytes.
        want_extra_isize: u16 = 0x15E,
        /// [`FLAG_SIGNED_HASH`] and others.
        flags: u32 = 0x160,
        /// RAID stride, blocks.
        raid_stride: u16 = 0x164,
        /// Seconds between multiple-mount checks.
        mmp_interval: u16 = 0x166,
        /// Block of multiple-mount protection.
        mmp_block: u64 = 0x168,
        /// RAID stripe width, blocks.
        raid_stripe_width: u32 = 0x170,
        /// Groups per flexible group, as a power of two.
        log_groups_per_flex: u8 = 0x174,
        /// [`CHECKSUM_CRC32C`].
        checksum_type: u8 = 0x175,
        /// Encryption version.
        encryption_level: u8 = 0x176,
        /// Padding.
        reserved_pad: u8 = 0x177,
        /// KiB ever written.
        kbytes_written: u64 = 0x178,
        /// Unused (snapshots).
        snapshot_inum: u32 = 0x180,
        /// Unused (snapshots).
        snapshot_id: u32 = 0x184,
        /// Unused (snapshots).
        snapshot_r_blocks_count: u64 = 0x188,
        /// Unused (snapshots).
        snapshot_list: u32 = 0x190,
        /// Errors seen.
        error_count: u32 = 0x194,
        /// First error, seconds.
        first_error_time: u32 = 0x198,
        /// Its inode.
        first_error_ino: u32 = 0x19C,
        /// Its block.
        first_error_block: u64 = 0x1A0,
        /// Its function.
        first_error_func: [u8; 32] = 0x1A8,
        /// Its line.
        first_error_line: u32 = 0x1C8,
        /// Last error, seconds.
        last_error_time: u32 = 0x1CC,
        /// Its inode.
        last_error_ino: u32 = 0x1D0,
        /// Its line.
        last_error_line: u32 = 0x1D4,
        /// Its block.
        last_error_block: u64 = 0x1D8,
        /// Its function.
        last_error_func: [u8; 32] = 0x1E0,
        /// Default mount options as text.
        mount_opts: [u8; 64] = 0x200,
        /// Inode of user quota.
        usr_quota_inum: u32 = 0x240,
        /// Inode of group quota.
        grp_quota_inum: u32 = 0x244,
        /// Blocks of overhead, 0 when not computed.
        overhead_clusters: u32 = 0x248,
        /// Groups with backups under sparse_super2.
        backup_bgs: [u32; 2] = 0x24C,
        /// Encryption algorithms.
        encrypt_algos: [u8; 4] = 0x254,
        /// Encryption salt.
        encrypt_pw_salt: [u8; 16] = 0x258,
        /// Inode of lost+found (hardly used).
        lpf_ino: u32 = 0x268,
        /// Inode of project quota.
        prj_quota_inum: u32 = 0x26C,
        /// Checksum seed with metadata_csum_seed.
        checksum_seed: u32 = 0x270,
        /// Bits 32..40 of `wtime`.
        wtime_hi: u8 = 0x274,
        /// Bits 32..40 of `mtime`.
        mtime_hi: u8 = 0x275,
        /// Bits 32..40 of `mkfs_time`.
        mkfs_time_hi: u8 = 0x276,
        /// Bits 32..40 of `lastcheck`.
        lastcheck_hi: u8 = 0x277,
        /// Bits 32..40 of `first_error_time`.
        first_error_time_hi: u8 = 0x278,
        /// Bits 32..40 of `last_error_time`.
        last_error_time_hi: u8 = 0x279,
        /// Code of the first error.
        first_error_errcode: u8 = 0x27A,
        /// Code of the last error.
        last_error_errcode: u8 = 0x27B,
        /// Character set of case folding.
        encoding: u16 = 0x27C,
        /// Flags of case folding.
        encoding_flags: u16 = 0x27E,
        /// Inode of the orphan file.
        orphan_file_inum: u32 = 0x280,
        /// Not used yet.
        reserved: [u32; 94] = 0x284,
        /// crc32c of the bytes before.
        checksum: u32 = CHECKSUM_AT,
    }
}

impl Superblock {
    /// Reads 1024 bytes. `Kind::Corrupt` when they are too few or the magic is wrong; everything else is judged by
    /// [`super::geometry::Geometry::of`].
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        need(bytes, Self::SIZE, "ext4 superblock")?;
        let sb = Self::get(bytes);
        if sb.magic != MAGIC {
            return Err(corrupt("ext4 superblock", format!("has magic {:#06x}, not {MAGIC:#06x}", sb.magic)));
        }
        Ok(sb)
    }

    /// Whether every bit of `flag` is set in `s_feature_compat`.
    pub fn has_compat(&self, flag: u32) -> bool {
        self.feature_compat & flag == flag
    }
    /// Whether every bit of `flag` is set in `s_feature_incompat`.
    pub fn has_incompat(&self, flag: u32) -> bool {
        self.feature_incompat & flag == flag
    }
    /// Whether every bit of `flag` is set in `s_feature_ro_compat`.
    pub fn has_ro_compat(&self, flag: u32) -> bool {
        self.feature_ro_compat & flag == flag
    }

    /// Blocks in all. The high halves count only with 64bit, as in the kernel.
    pub fn blocks_count(&self) -> u64 {
        join(self.blocks_count_lo, self.high(self.blocks_count_hi))
    }
    /// Sets the number of blocks.
    pub fn set_blocks_count(&mut self, blocks: u64) {
        (self.blocks_count_lo, self.blocks_count_hi) = (blocks as u32, (blocks >> 32) as u32);
    }
    /// Reserved blocks.
    pub fn r_blocks_count(&self) -> u64 {
        join(self.r_blocks_count_lo, self.high(self.r_blocks_count_hi))
    }
    /// Sets the number of reserved blocks.
    pub fn set_r_blocks_count(&mut self, blocks: u64) {
        (self.r_blocks_count_lo, self.r_blocks_count_hi) = (blocks as u32, (blocks >> 32) as u32);
    }
    /// Free blocks.
    pub fn free_blocks_count(&self) -> u64 {
        join(self.free_blocks_count_lo, self.high(self.free_blocks_count_hi))
    }
    /// Sets the number of free blocks.
    pub fn set_free_blocks_count(&mut self, blocks: u64) {
        (self.free_blocks_count_lo, self.free_blocks_count_hi) = (blocks as u32, (blocks >> 32) as u32);
    }
    /// Sets the time of the last write (40 bits).
    pub fn set_wtime(&mut self, secs: i64) {
        (self.wtime, self.wtime_hi) = (secs as u32, (secs >> 32) as u8);
    }
    /// Sets the time of creation (40 bits).
    pub fn set_mkfs_time(&mut self, secs: i64) {
        (self.mkfs_time, self.mkfs_time_hi) = (secs as u32, (secs >> 32) as u8);
    }
    /// Sets the time of the last check (40 bits).
    pub fn set_lastcheck(&mut self, secs: i64) {
        (self.lastcheck, self.lastcheck_hi) = (secs as u32, (secs >> 32) as u8);
    }

    fn high(&self, half: u32) -> u32 {
        if self.has_incompat(super::incompat::BIT64) { half } else { 0 }
    }
}
