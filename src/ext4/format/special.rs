//! The two hidden inodes with blocks: the journal and the reserved descriptor blocks.

use super::{Formatter, extents, shape::Run};
use crate::{
    error::Result,
    ext4::layout::{
        BLOCK_SIZE,
        inode::{Inode, flags, mode},
        journal::{self, JournalSuperblock},
        put_u32,
        superblock::Superblock,
    },
    units::Timestamp,
};

/// Pointers per block.
const POINTERS: u32 = BLOCK_SIZE / 4;
/// Index of the double-indirect pointer in `i_block`.
const DIND: usize = 13;
/// Direct pointers.
const DIRECT: u64 = 12;

fn hidden(time: Timestamp) -> Inode {
    Inode { mode: mode::FILE | 0o600, links: 1, atime: time, ctime: time, mtime: time, crtime: time, ..Inode::zeroed() }
}

impl Formatter {
    /// Writes an empty journal and returns its inode.
    pub(super) fn journal(&mut self, inode_seed: Option<u32>) -> Result<Inode> {
        let runs: &[Run] = &self.shape.journal;
        let blocks: u32 = runs.iter().map(|run| run.len).sum();
        let superblock = JournalSuperblock {
            blocktype: journal::BLOCKTYPE_SUPERBLOCK_V2,
            blocksize: BLOCK_SIZE,
            maxlen: blocks,
            first: 1,
            sequence: 1,
            start: 0,
            errno: 0,
            feature_compat: 0,
            feature_incompat: 0,
            feature_ro_compat: 0,
            uuid: [0; 16],
            nr_users: 1,
            checksum_type: 0,
            checksum: 0,
        };
        let mut raw = [0; journal::SIZE];
        superblock.write(&mut raw);
        if let Some(first) = runs.first() {
            self.store.writer.put_at(first.start * u64::from(BLOCK_SIZE), &raw)?;
        }
        let root = extents::build(runs, inode_seed, &mut self.store.blocks, &mut self.store.writer)?;
        Ok(Inode {
            size: u64::from(blocks) * u64::from(BLOCK_SIZE),
            blocks: (u64::from(blocks) + root.tree_blocks) * u64::from(BLOCK_SIZE / 512),
            flags: flags::EXTENTS,
            block: root.block,
            ..hidden(self.time)
        })
    }

    /// Copies where the journal is into the superblock, for e2fsck when inode 8 is lost.
    pub(super) fn back_up_journal(inode: &Inode, sb: &mut Superblock) {
        for (word, bytes) in sb.jnl_blocks.iter_mut().zip(inode.block.chunks_exact(4)) {
            *word = crate::ext4::layout::get_u32(bytes, 0);
        }
        sb.jnl_blocks[15] = (inode.size >> 32) as u32;
        sb.jnl_blocks[16] = inode.size as u32;
    }

    /// Writes the block map that owns the reserved descriptor blocks, and returns its inode: the double-indirect block points to the reserved
    /// blocks of group 0, at the index that the descriptor block will have when it is needed; each of those points to its copies in the groups
    /// with backups, ascending. It is there even when nothing could be reserved, as mke2fs makes it. (Linux fs/ext4/resize.c, verify_reserved_gdb; e2fsprogs lib/ext2fs/res_gdt.c.)
    pub(super) fn resize_inode(&mut self) -> Result<Inode> {
        let double = self.shape.resize_block;
        let geometry = &self.shape.geometry;
        let backups: Vec<u64> = (1..geometry.groups).filter(|group| geometry.has_super(*group)).map(|group| geometry.group_start(group)).collect();
        let mut pointers = vec![0; BLOCK_SIZE as usize];
        for n in 0..geometry.reserved_gdt_blocks {
            let index = geometry.gdt_blocks + n;
            let block = u64::from(geometry.first_data_block) + 1 + u64::from(index);
            put_u32(&mut pointers, (index % POINTERS) as usize * 4, block as u32);
            if backups.is_empty() {
                continue;
            }
            let mut copies = vec![0; BLOCK_SIZE as usize];
            for (slot, start) in copies.chunks_exact_mut(4).zip(&backups) {
                put_u32(slot, 0, (block + start) as u32);
            }
            self.store.writer.put_at(block * u64::from(BLOCK_SIZE), &copies)?;
        }
        self.store.writer.put_at(double * u64::from(BLOCK_SIZE), &pointers)?;
        let blocks = 1 + u64::from(geometry.reserved_gdt_blocks) * (1 + backups.len() as u64);
        let span = u64::from(POINTERS) * u64::from(POINTERS) + u64::from(POINTERS) + DIRECT;
        let mut inode = Inode { size: span * u64::from(BLOCK_SIZE), blocks: blocks * u64::from(BLOCK_SIZE / 512), ..hidden(self.time) };
        put_u32(&mut inode.block, DIND * 4, double as u32);
        Ok(inode)
    }
}
