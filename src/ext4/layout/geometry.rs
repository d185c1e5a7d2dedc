//! Where things are: groups, backups, descriptor tables, inodes. Derived from a superblock and checked, so that arithmetic on it can't
//! overflow or divide by zero; shared by formatter, reader and editor.

use super::{compat, corrupt, group, incompat, inode, ro_compat, superblock::Superblock};
use crate::error::Result;

/// Which groups hold copies of superblock and descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backups {
    /// Every group.
    All,
    /// Groups 0, 1 and powers of 3, 5 and 7 (sparse_super).
    Sparse,
    /// Group 0 and these two, 0 for none (sparse_super2).
    Two([u32; 2]),
}

/// The shape of a filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes per block: a power of two, 1024..=65536.
    pub block_size: u32,
    /// Blocks in all.
    pub blocks_count: u64,
    /// First block of group 0.
    pub first_data_block: u32,
    /// Blocks per group, at most 8 times the block size.
    pub blocks_per_group: u32,
    /// Inodes per group, at most 8 times the block size.
    pub inodes_per_group: u32,
    /// Bytes per inode.
    pub inode_size: u16,
    /// Bytes per group descriptor.
    pub desc_size: u16,
    /// Blocks of descriptors in all (without reserved ones).
    pub gdt_blocks: u32,
    /// Blocks reserved behind each descriptor table.
    pub reserved_gdt_blocks: u32,
    /// Groups.
    pub groups: u32,
    /// Groups per flexible group, as a power of two; nothing without flex_bg.
    pub flex_log: Option<u8>,
    /// Where the copies are.
    pub backups: Backups,
    /// First meta block group, with meta_bg.
    pub first_meta_bg: Option<u32>,
}

impl Geometry {
    /// Checks the superblock's numbers. `Kind::Corrupt` names the first that can't be.
    pub fn of(sb: &Superblock) -> Result<Self> {
        let bad = |what: String| corrupt("ext4 superblock", what);
        if sb.log_block_size > 6 {
            return Err(bad(format!("has log_block_size {}", sb.log_block_size)));
        }
        let block_size = 1024u32 << sb.log_block_size;
        let bits = block_size * 8;
        let inode_size = if sb.rev_level == 0 { inode::OLD_SIZE as u16 } else { sb.inode_size };
        if !inode_size.is_power_of_two() || usize::from(inode_size) < inode::OLD_SIZE || u32::from(inode_size) > block_size {
            return Err(bad(format!("has inodes of {inode_size} bytes")));
        }
        let desc_size = if sb.has_incompat(incompat::BIT64) { sb.desc_size } else { group::SIZE_32 };
        if !desc_size.is_power_of_two() || desc_size < group::SIZE_32 || u32::from(desc_size) > block_size {
            return Err(bad(format!("has group descriptors of {desc_size} bytes")));
        }
        if sb.blocks_per_group < 8 || sb.blocks_per_group > bits || sb.inodes_per_group < 8 || sb.inodes_per_group > bits {
            return Err(bad(format!("has {} blocks and {} inodes per group; a bitmap block holds {bits}", sb.blocks_per_group, sb.inodes_per_group)));
        }
        if !sb.inodes_per_group.is_multiple_of(block_size / u32::from(inode_size)) {
            return Err(bad(format!("has {} inodes per group, which does not fill blocks", sb.inodes_per_group)));
        }
        let (blocks_count, first) = (sb.blocks_count(), u64::from(sb.first_data_block));
        if first != u64::from(block_size == 1024) || blocks_count <= first || blocks_count > 1 << 48 {
            return Err(bad(format!("has {blocks_count} blocks, the first being {first}")));
        }
        let groups = (blocks_count - first).div_ceil(u64::from(sb.blocks_per_group));
        let groups = u32::try_from(groups).map_err(|_| bad(format!("has {groups} groups")))?;
        if u64::from(groups) * u64::from(sb.inodes_per_group) != u64::from(sb.inodes_count) {
            return Err(bad(format!("has {} inodes in {groups} groups of {}", sb.inodes_count, sb.inodes_per_group)));
        }
        if u32::from(sb.reserved_gdt_blocks) > block_size / 4 || sb.log_groups_per_flex > 31 {
            return Err(bad(format!("has {} reserved descriptor blocks, flex_bg 2^{}", sb.reserved_gdt_blocks, sb.log_groups_per_flex)));
        }
        let gdt_blocks = groups.div_ceil(block_size / u32::from(desc_size));
        Ok(Geometry {
            block_size,
            blocks_count,
            first_data_block: sb.first_data_block,
            blocks_per_group: sb.blocks_per_group,
            inodes_per_group: sb.inodes_per_group,
            inode_size,
            desc_size,
            gdt_blocks,
            reserved_gdt_blocks: sb.reserved_gdt_blocks.into(),
            groups,
            flex_log: sb.has_incompat(incompat::FLEX_BG).then_some(sb.log_groups_per_flex),
            backups: if sb.has_compat(compat::SPARSE_SUPER2) {
                Backups::Two(sb.backup_bgs)
            } else if sb.has_ro_compat(ro_compat::SPARSE_SUPER) {
                Backups::Sparse
            } else {
                Backups::All
            },
            first_meta_bg: sb.has_incompat(incompat::META_BG).then_some(sb.first_meta_bg),
        })
    }

    /// First block of a group.
    pub fn group_start(&self, group: u32) -> u64 {
        u64::from(self.first_data_block) + u64::from(group) * u64::from(self.blocks_per_group)
    }

    /// Blocks of a group; only the last may have fewer than `blocks_per_group`.
    pub fn group_blocks(&self, group: u32) -> u32 {
        (self.blocks_count - self.group_start(group)).min(u64::from(self.blocks_per_group)) as u32
    }

    /// The group a block is in. Blocks before `first_data_block` count as group 0.
    pub fn group_of_block(&self, block: u64) -> u32 {
        (block.saturating_sub(u64::from(self.first_data_block)) / u64::from(self.blocks_per_group)) as u32
    }

    /// Whether a group starts with a copy of the superblock.
    pub fn has_super(&self, group: u32) -> bool {
        match self.backups {
            _ if group == 0 => true,
            Backups::All => true,
            Backups::Sparse => group == 1 || [3, 5, 7].iter().any(|base| is_power_of(group, *base)),
            Backups::Two(groups) => groups.contains(&group),
        }
    }

    /// Descriptors per block.
    pub fn descs_per_block(&self) -> u32 {
        self.block_size / u32::from(self.desc_size)
    }

    /// Descriptor blocks stored behind the superblock copy of `group`, without the reserved ones (ext4_bg_num_gdb).
    pub fn gdt_blocks_in(&self, group: u32) -> u32 {
        match self.first_meta_bg {
            Some(first) if group / self.descs_per_block() >= first => {
                let within = group % self.descs_per_block();
                u32::from(within == 0 || within == 1 || within == self.descs_per_block() - 1)
            }
            Some(first) if self.has_super(group) => first.min(self.gdt_blocks),
            None if self.has_super(group) => self.gdt_blocks,
            _ => 0,
        }
    }

    /// Blocks at the start of a group for superblock, descriptors and reserved descriptors (ext4_num_base_meta_clusters).
    pub fn base_blocks_in(&self, group: u32) -> u32 {
        let spread = self.first_meta_bg.is_some_and(|first| group / self.descs_per_block() >= first);
        let has_super = self.has_super(group);
        u32::from(has_super) + self.gdt_blocks_in(group) + if has_super && !spread { self.reserved_gdt_blocks } else { 0 }
    }

    /// Block and byte in it of the first copy of a group's descriptor.
    pub fn desc_location(&self, group: u32) -> (u64, usize) {
        let (index, byte) = (group / self.descs_per_block(), group % self.descs_per_block() * u32::from(self.desc_size));
        let block = match self.first_meta_bg {
            Some(first) if index >= first => {
                let home = index * self.descs_per_block();
                self.group_start(home) + u64::from(self.has_super(home))
            }
            _ => u64::from(self.first_data_block) + 1 + u64::from(index),
        };
        (block, byte as usize)
    }

    /// Blocks of a group's inode table.
    pub fn itable_blocks(&self) -> u32 {
        (u64::from(self.inodes_per_group) * u64::from(self.inode_size)).div_ceil(u64::from(self.block_size)) as u32
    }

    /// Inodes in all.
    pub fn inodes_count(&self) -> u32 {
        self.groups * self.inodes_per_group
    }

    /// Group of inode `number` (1 and up) and its index there.
    pub fn inode_group(&self, number: u32) -> (u32, u32) {
        let index = number.saturating_sub(1);
        (index / self.inodes_per_group, index % self.inodes_per_group)
    }

    /// Block and byte in it of an inode at `index` of a table that starts at block `table`.
    pub fn inode_location(&self, table: u64, index: u32) -> (u64, usize) {
        let byte = u64::from(index) * u64::from(self.inode_size);
        (table + byte / u64::from(self.block_size), (byte % u64::from(self.block_size)) as usize)
    }
}

fn is_power_of(mut number: u32, base: u32) -> bool {
    while number > 1 && number.is_multiple_of(base) {
        number /= base;
    }
    number == 1
}
