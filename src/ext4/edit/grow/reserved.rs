//! The resize inode (7): it owns the reserved descriptor blocks, so that nobody else takes them.
//!
//! Its only block pointer is the double-indirect one. That block points, at the index of each reserved descriptor block (modulo the pointers
//! of a block), to the reserved block behind the primary table; this in turn, used as an indirect block, lists the same block of each backup
//! group in ascending order. See e2fsprogs' `ext2fs_create_resize_inode` and the kernel's `add_new_gdb` and `reserve_backup_gdb`.
//!
//! A new group with a backup is one more entry in each of those lists. A golden has room to grow 1024 times, as mke2fs leaves it: 512 blocks for 4 GiB, and
//! every instance would have its own copy of them all. So what is grown keeps the room to grow [`ROOM`] times again, and the rest becomes free.

use super::super::{
    Editor,
    alloc::{Bitmap, clear_bits},
};
use crate::{
    error::Result,
    ext4::layout::{compat, corrupt, geometry::Geometry, get_u32, group::BLOCK_UNINIT, ino, put_u32},
};

/// How many times larger than it is made a grown filesystem can become by its descriptor table alone; the kernel goes on by meta_bg after that
/// (`ext4_convert_meta_bg` in fs/ext4/resize.c, Linux 3.7).
const ROOM: u32 = 16;

/// Byte of the double-indirect pointer in `i_block`.
const DOUBLE_AT: usize = 13 * 4;

impl Editor {
    /// Frees the reserved descriptor blocks that would have to be written only to be kept. The geometry is already the new one, and gets the smaller reserve.
    pub(super) fn trim_reserved(&mut self, old: &Geometry) -> Result<()> {
        let geo = &self.image.geo;
        let has_new_backups = (old.groups..geo.groups).any(|group| geo.has_super(group));
        if !self.image.sb.has_compat(compat::RESIZE_INODE) || geo.first_meta_bg.is_some() || !has_new_backups {
            return Ok(());
        }
        let kept = geo.groups.saturating_mul(ROOM).div_ceil(geo.descs_per_block()).saturating_sub(geo.gdt_blocks).min(geo.reserved_gdt_blocks);
        let freed = geo.reserved_gdt_blocks - kept;
        if freed == 0 {
            return Ok(());
        }
        let first = 1 + geo.gdt_blocks + kept;
        let room = (0..old.groups).filter(|group| old.has_super(*group)).map(|group| old.group_blocks(group)).min();
        if room.is_none_or(|room| first + freed > room) {
            return Err(corrupt("superblock", format!("{} reserved descriptor blocks do not fit into a group", geo.reserved_gdt_blocks)));
        }
        let holders: Vec<u32> = (0..old.groups).filter(|group| geo.has_super(*group)).collect();
        self.image.geo.reserved_gdt_blocks = kept;
        self.image.sb.reserved_gdt_blocks = kept as u16;
        let uninit = self.image.has_uninit();
        for group in &holders {
            // The bitmap of a group without one follows from the geometry.
            if !(uninit && self.group(*group)?.desc.flags & BLOCK_UNINIT != 0) {
                let number = self.block_bitmap(*group)?;
                clear_bits(self.block_mut(number)?, first, freed);
                self.group(*group)?.blocks = Bitmap::Changed;
            }
            let state = self.group(*group)?;
            state.desc.free_blocks += freed;
            state.dirty = true;
            self.count_free(freed, 0);
        }
        let overhead = &mut self.image.sb.overhead_clusters;
        *overhead = overhead.saturating_sub(freed.saturating_mul(holders.len() as u32));
        Ok(())
    }

    /// Takes the descriptor blocks that the new shape uses, and those that it does not keep, from the resize inode, and enters the backups in new groups for
    /// those that stay.
    /// The geometry is already the new one.
    pub(super) fn take_reserved(&mut self, old: &Geometry) -> Result<()> {
        if !self.image.sb.has_compat(compat::RESIZE_INODE) {
            return Ok(());
        }
        let new = self.image.geo.clone();
        let per_block = self.image.addresses_per_block();
        let mut node = self.image.node(ino::RESIZE)?;
        let bad = |what: &str| corrupt("resize inode", what.to_owned());
        let double = u64::from(get_u32(&node.inode.block, DOUBLE_AT));
        if double <= u64::from(old.first_data_block) || double >= old.blocks_count {
            return Err(bad("has no double-indirect block"));
        }
        let pointers = self.image.block(double)?;
        let home = u64::from(old.first_data_block) + 1;
        for index in old.gdt_blocks..old.gdt_blocks + old.reserved_gdt_blocks {
            if u64::from(get_u32(&pointers, slot(index, per_block))) != home + u64::from(index) {
                return Err(bad("does not hold all reserved descriptor blocks"));
            }
        }
        let backups: Vec<u32> = (1..new.groups).filter(|group| new.has_super(*group)).collect();
        let known = backups.iter().filter(|group| **group < old.groups).count();
        if backups.len() > per_block as usize {
            return Err(bad("has no room for so many backups"));
        }
        let kept = new.gdt_blocks + new.reserved_gdt_blocks;
        for index in (old.gdt_blocks..new.gdt_blocks).chain(kept..old.gdt_blocks + old.reserved_gdt_blocks) {
            put_u32(self.block_mut(double)?, slot(index, per_block), 0);
        }
        if known < backups.len() {
            for index in new.gdt_blocks..kept {
                let primary = home + u64::from(index);
                let list = self.block_mut(primary)?;
                for (i, group) in backups.iter().enumerate().skip(known) {
                    let copy = primary + u64::from(*group) * u64::from(new.blocks_per_group);
                    put_u32(list, i * 4, copy as u32);
                }
            }
        }
        let owned = 1 + u64::from(new.reserved_gdt_blocks) * (1 + backups.len() as u64);
        node.inode.blocks = owned * u64::from(new.block_size / 512);
        self.write_node(&mut node)
    }
}

/// Byte of the pointer for descriptor block `index`.
fn slot(index: u32, per_block: u32) -> usize {
    (index % per_block) as usize * 4
}
