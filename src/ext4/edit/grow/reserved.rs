//! The resize inode (7): it owns the reserved descriptor blocks, so that nobody else takes them.
//!
//! Its only block pointer is the double-indirect one. That block points, at the index of each reserved descriptor block (modulo the pointers
//! of a block), to the reserved block behind the primary table; this in turn, used as an indirect block, lists the same block of each backup
//! group in ascending order. See e2fsprogs' `ext2fs_create_resize_inode` and the kernel's `add_new_gdb` and `reserve_backup_gdb`.

use super::super::Editor;
use crate::{
    error::Result,
    ext4::layout::{compat, corrupt, geometry::Geometry, get_u32, ino, put_u32},
};

/// Byte of the double-indirect pointer in `i_block`.
const DOUBLE_AT: usize = 13 * 4;

impl Editor {
    /// Takes the descriptor blocks that the new shape uses from the resize inode, and enters the backups in new groups for those that stay.
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
        for index in old.gdt_blocks..new.gdt_blocks {
            put_u32(self.block_mut(double)?, slot(index, per_block), 0);
        }
        if known < backups.len() {
            for index in new.gdt_blocks..new.gdt_blocks + new.reserved_gdt_blocks {
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
