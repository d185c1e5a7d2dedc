//! Allocation: block and inode bitmaps, read group by group when needed.
//!
//! Blocks are sought from a goal on (the directory's or the file's neighbourhood), first as one run, then in as few runs as there are; inodes
//! in the parent's group first, then in the following groups. Uninitialised bitmaps (`BLOCK_UNINIT`, `INODE_UNINIT`) are computed when a
//! group is first used, as the kernel's `ext4_init_block_bitmap` does.

use super::{Editor, no_space};
use crate::{
    error::Result,
    ext4::{
        csum,
        layout::{
            corrupt,
            group::{BLOCK_UNINIT, GroupDesc, INODE_UNINIT, INODE_ZEROED},
        },
        read::Sums,
    },
};

/// Groups whose bitmaps are searched for one run of the wanted length before shorter runs are taken.
const GROUPS_FOR_ONE_RUN: u32 = 8;

/// A group that was touched.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) desc: GroupDesc,
    pub(super) dirty: bool,
    pub(super) blocks: Bitmap,
    pub(super) inodes: Bitmap,
}

/// What is known of a bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bitmap {
    /// Not looked at.
    Unread,
    /// Checksum verified.
    Read,
    /// Changed: needs a new checksum.
    Changed,
}

/// Which bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Blocks,
    Inodes,
}

impl Editor {
    /// The state of a group, read the first time.
    pub(super) fn group(&mut self, group: u32) -> Result<&mut Group> {
        if !self.groups.contains_key(&group) {
            let desc = self.image.group_desc(group)?;
            self.groups.insert(group, Group { desc, dirty: false, blocks: Bitmap::Unread, inodes: Bitmap::Unread });
        }
        Ok(self.groups.get_mut(&group).expect("it was just put there"))
    }

    /// Makes sure that a group's bitmap is there and right; its block. A computed bitmap clears its flag.
    fn bitmap(&mut self, group: u32, which: Which) -> Result<u64> {
        let uninit = self.image.has_uninit();
        let state = self.group(group)?;
        let (number, known, flag) = match which {
            Which::Blocks => (state.desc.block_bitmap, state.blocks, BLOCK_UNINIT),
            Which::Inodes => (state.desc.inode_bitmap, state.inodes, INODE_UNINIT),
        };
        if known != Bitmap::Unread {
            return Ok(number);
        }
        let stored = match which {
            Which::Blocks => state.desc.block_bitmap_csum,
            Which::Inodes => state.desc.inode_bitmap_csum,
        };
        let mut now_known = Bitmap::Read;
        if uninit && state.desc.flags & flag != 0 {
            state.desc.flags &= !flag;
            state.dirty = true;
            let desc = state.desc;
            let bits = match which {
                Which::Blocks => self.fresh_block_bitmap(group, &desc),
                Which::Inodes => self.fresh_inode_bitmap(),
            };
            self.put_block(number, bits);
            now_known = Bitmap::Changed;
        } else if self.image.sums == Sums::Metadata {
            let bits = match which {
                Which::Blocks => self.image.geo.blocks_per_group,
                Which::Inodes => self.image.geo.inodes_per_group,
            };
            let block = self.image.block(number)?;
            let sum = csum::bitmap(self.image.seed, &block[..self.image.bitmap_len(bits)]);
            let sum = if self.image.wide_descs() { sum } else { sum & 0xffff };
            if sum != stored {
                return Err(corrupt(format!("group {group}"), format!("bitmap block {number} has checksum {stored:#010x}, computed {sum:#010x}")));
            }
        }
        let state = self.group(group)?;
        match which {
            Which::Blocks => state.blocks = now_known,
            Which::Inodes => state.inodes = now_known,
        }
        Ok(number)
    }

    /// The block of a group's block bitmap, which is there and right.
    pub(super) fn block_bitmap(&mut self, group: u32) -> Result<u64> {
        self.bitmap(group, Which::Blocks)
    }

    /// The block bitmap of a group that holds nothing but its own metadata: base blocks, and those of its bitmaps and its inode table that are
    /// inside it; bits behind the end are set.
    pub(super) fn fresh_block_bitmap(&self, group: u32, desc: &GroupDesc) -> Vec<u8> {
        let geo = &self.image.geo;
        let mut bits = vec![0; self.image.block_size()];
        set_bits(&mut bits, 0, geo.base_blocks_in(group).min(geo.group_blocks(group)));
        for (start, len) in [(desc.block_bitmap, 1), (desc.inode_bitmap, 1), (desc.inode_table, geo.itable_blocks())] {
            for block in start..start + u64::from(len) {
                if geo.group_of_block(block) == group {
                    set_bits(&mut bits, (block - geo.group_start(group)) as u32, 1);
                }
            }
        }
        let used = geo.group_blocks(group);
        let all = bits.len() as u32 * 8;
        set_bits(&mut bits, used, all - used);
        bits
    }

    /// An inode bitmap with no inode in use; bits behind the end are set.
    pub(super) fn fresh_inode_bitmap(&self) -> Vec<u8> {
        let mut bits = vec![0; self.image.block_size()];
        let all = bits.len() as u32 * 8;
        let used = self.image.geo.inodes_per_group;
        set_bits(&mut bits, used, all - used);
        bits
    }

    /// Allocates up to `want` (not 0) adjacent blocks as near behind `goal` as there are: first block and how many. `Kind::NoSpace` when
    /// there is none at all.
    pub(super) fn alloc_run(&mut self, goal: u64, want: u32) -> Result<(u64, u32)> {
        let goal = if goal >= self.image.geo.blocks_count { 0 } else { goal };
        let (groups, home) = (self.image.geo.groups, self.image.geo.group_of_block(goal));
        let mut searched = 0;
        for one_run in [true, false] {
            for i in 0..groups {
                let group = (home + i) % groups;
                let free = self.group(group)?.desc.free_blocks;
                if free == 0 || one_run && free < want {
                    continue;
                }
                if one_run {
                    searched += 1;
                    if searched > GROUPS_FOR_ONE_RUN {
                        break;
                    }
                }
                let from = if i == 0 { goal.saturating_sub(self.image.geo.group_start(group)) as u32 } else { 0 };
                if let Some((bit, len)) = self.find_free(group, from, want)?
                    && (!one_run || len >= want)
                {
                    let start = self.image.geo.group_start(group) + u64::from(bit);
                    self.take_blocks(group, bit, len)?;
                    return Ok((start, len));
                }
            }
        }
        Err(no_space("filesystem", format!("{want} more blocks of {} bytes are needed, none is free", self.image.geo.block_size))
            .with_reason("EXT4_NO_BLOCKS")
            .with_hint("ask for a larger volume"))
    }

    /// The first run of `want` free blocks from bit `from` on, else from the group's start, else the longest one.
    fn find_free(&mut self, group: u32, from: u32, want: u32) -> Result<Option<(u32, u32)>> {
        let number = self.bitmap(group, Which::Blocks)?;
        let bits = self.image.block(number)?;
        let limit = self.image.geo.group_blocks(group);
        let near = find_run(&bits, from, limit, want);
        if let Some((_, len)) = near
            && len >= want
        {
            return Ok(near);
        }
        let any = find_run(&bits, 0, limit, want);
        Ok(match (near, any) {
            (Some(near), Some(any)) if near.1 >= any.1 => Some(near),
            (near, any) => any.or(near),
        })
    }

    fn take_blocks(&mut self, group: u32, bit: u32, len: u32) -> Result<()> {
        let number = self.bitmap(group, Which::Blocks)?;
        set_bits(self.block_mut(number)?, bit, len);
        let state = self.group(group)?;
        state.blocks = Bitmap::Changed;
        state.dirty = true;
        state.desc.free_blocks = state.desc.free_blocks.saturating_sub(len);
        let free = self.image.sb.free_blocks_count().saturating_sub(len.into());
        self.image.sb.set_free_blocks_count(free);
        Ok(())
    }

    /// Allocates one block.
    pub(super) fn alloc_block(&mut self, goal: u64) -> Result<u64> {
        Ok(self.alloc_run(goal, 1)?.0)
    }

    /// Frees adjacent blocks. What the overlay has of them is forgotten: a freed block's content means nothing.
    pub(super) fn free_blocks(&mut self, start: u64, len: u64) -> Result<()> {
        let end = start.checked_add(len).filter(|end| *end <= self.image.geo.blocks_count);
        let Some(end) = end.filter(|_| start > u64::from(self.image.geo.first_data_block)) else {
            return Err(corrupt(format!("block {start}"), format!("{len} blocks to free are outside the filesystem")));
        };
        let mut block = start;
        while block < end {
            let group = self.image.geo.group_of_block(block);
            let bit = (block - self.image.geo.group_start(group)) as u32;
            let len = (end - block).min(u64::from(self.image.geo.blocks_per_group - bit)) as u32;
            let number = self.bitmap(group, Which::Blocks)?;
            let bits = self.block_mut(number)?;
            if !all_set(bits, bit, len) {
                return Err(corrupt(format!("group {group}"), format!("blocks {block}..{} are in use and marked free", block + u64::from(len))));
            }
            clear_bits(bits, bit, len);
            let state = self.group(group)?;
            state.blocks = Bitmap::Changed;
            state.dirty = true;
            state.desc.free_blocks += len;
            block += u64::from(len);
        }
        let free = self.image.sb.free_blocks_count().saturating_add(len);
        self.image.sb.set_free_blocks_count(free);
        let gone: Vec<u64> = self.image.overlay.range(start..end).map(|(number, _)| *number).collect();
        for number in gone {
            self.image.overlay.remove(&number);
        }
        Ok(())
    }

    /// Allocates an inode number, in the group of `parent` if it has one. The inode's bytes are still to be written.
    pub(super) fn alloc_inode(&mut self, parent: u32, directory: bool) -> Result<u32> {
        let geo = &self.image.geo;
        let (groups, home) = (geo.groups, geo.inode_group(parent).0);
        let (per_group, reserved) = (geo.inodes_per_group, self.first_inode() - 1);
        for i in 0..groups {
            let group = (home + i) % groups;
            if self.group(group)?.desc.free_inodes == 0 {
                continue;
            }
            let number = self.bitmap(group, Which::Inodes)?;
            let bits = self.image.block(number)?;
            let from = reserved.saturating_sub(group.saturating_mul(per_group)).min(per_group);
            let Some((index, _)) = find_run(&bits, from, per_group, 1) else { continue };
            self.take_inode(group, index, directory)?;
            return Ok(group * per_group + index + 1);
        }
        Err(no_space("filesystem", format!("no free inode is left of {}", self.image.geo.inodes_count())).with_reason("EXT4_NO_INODES"))
    }

    /// The first inode number that is not reserved.
    fn first_inode(&self) -> u32 {
        if self.image.sb.rev_level == 0 { 11 } else { self.image.sb.first_ino.max(11) }
    }

    fn take_inode(&mut self, group: u32, index: u32, directory: bool) -> Result<()> {
        let number = self.bitmap(group, Which::Inodes)?;
        set_bits(self.block_mut(number)?, index, 1);
        let per_group = self.image.geo.inodes_per_group;
        let uninit = self.image.has_uninit();
        if uninit && self.group(group)?.desc.flags & BLOCK_UNINIT != 0 {
            // The kernel initialises the block bitmap together with the first inode of a group (ext4_new_inode).
            self.bitmap(group, Which::Blocks)?;
        }
        let state = self.group(group)?;
        state.inodes = Bitmap::Changed;
        state.dirty = true;
        state.desc.free_inodes -= 1;
        state.desc.used_dirs = state.desc.used_dirs.saturating_add(directory.into());
        let (desc, used) = (state.desc, per_group - state.desc.itable_unused);
        if uninit && index >= used {
            state.desc.itable_unused = per_group - index - 1;
            if desc.flags & INODE_ZEROED == 0 {
                self.zero_inodes(&desc, used, index)?;
            }
        }
        self.image.sb.free_inodes_count = self.image.sb.free_inodes_count.saturating_sub(1);
        Ok(())
    }

    /// Zeroes inodes `from..=to` of a table that may hold rubbish behind its used part.
    fn zero_inodes(&mut self, desc: &GroupDesc, from: u32, to: u32) -> Result<()> {
        let size = usize::from(self.image.geo.inode_size);
        for index in from..=to {
            let (block, at) = self.image.geo.inode_location(desc.inode_table, index);
            self.block_mut(block)?[at..at + size].fill(0);
        }
        Ok(())
    }

    /// Gives an inode number back.
    pub(super) fn free_inode_number(&mut self, ino: u32, directory: bool) -> Result<()> {
        let (group, index) = self.image.geo.inode_group(ino);
        let number = self.bitmap(group, Which::Inodes)?;
        if ino < self.first_inode() || !all_set(&self.image.block(number)?, index, 1) {
            return Err(corrupt(format!("inode {ino}"), "is reserved or marked free, and referred to"));
        }
        clear_bits(self.block_mut(number)?, index, 1);
        let state = self.group(group)?;
        state.inodes = Bitmap::Changed;
        state.dirty = true;
        state.desc.free_inodes += 1;
        state.desc.used_dirs = state.desc.used_dirs.saturating_sub(u32::from(directory));
        self.image.sb.free_inodes_count = self.image.sb.free_inodes_count.saturating_add(1);
        Ok(())
    }
}

fn bit(bits: &[u8], index: u32) -> bool {
    bits[index as usize / 8] >> (index % 8) & 1 == 1
}

/// Sets `len` bits from `start` on.
pub(super) fn set_bits(bits: &mut [u8], start: u32, len: u32) {
    each_byte(start, len, |byte, mask| bits[byte] |= mask);
}

/// Clears `len` bits from `start` on.
pub(super) fn clear_bits(bits: &mut [u8], start: u32, len: u32) {
    each_byte(start, len, |byte, mask| bits[byte] &= !mask);
}

fn all_set(bits: &[u8], start: u32, len: u32) -> bool {
    let mut all = true;
    each_byte(start, len, |byte, mask| all &= bits[byte] & mask == mask);
    all
}

fn each_byte(start: u32, len: u32, mut each: impl FnMut(usize, u8)) {
    let (mut at, end) = (start, start + len);
    while at < end {
        let (first, last) = (at % 8, (end - at + at % 8).min(8));
        each(at as usize / 8, ((1_u16 << last) - (1 << first)) as u8);
        at += last - first;
    }
}

/// The first run of at least `want` clear bits in `from..limit` (cut to `want`), else the longest run there.
pub(super) fn find_run(bits: &[u8], from: u32, limit: u32, want: u32) -> Option<(u32, u32)> {
    let (mut at, mut best) = (from, None::<(u32, u32)>);
    while at < limit {
        if at.is_multiple_of(8) && bits[at as usize / 8] == 0xff {
            at += 8;
            continue;
        }
        if bit(bits, at) {
            at += 1;
            continue;
        }
        let start = at;
        while at < limit && at - start < want {
            if at.is_multiple_of(8) && limit - at >= 8 && want - (at - start) >= 8 && bits[at as usize / 8] == 0 {
                at += 8;
            } else if bit(bits, at) {
                break;
            } else {
                at += 1;
            }
        }
        if best.is_none_or(|(_, len)| at - start > len) {
            best = Some((start, at - start));
        }
        if at - start >= want {
            break;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_from_the_start_on_and_the_longest_is_the_second_choice() {
        let mut bits = vec![0xff; 64];
        clear_bits(&mut bits, 13, 3);
        clear_bits(&mut bits, 100, 40);
        clear_bits(&mut bits, 300, 5);
        assert_eq!(find_run(&bits, 0, 512, 1), Some((13, 1)));
        assert_eq!(find_run(&bits, 0, 512, 4), Some((100, 4)));
        assert_eq!(find_run(&bits, 120, 512, 40), Some((120, 20)));
        assert_eq!(find_run(&bits, 0, 512, 99), Some((100, 40)));
        assert_eq!(find_run(&bits, 0, 512, 40), Some((100, 40)));
        assert_eq!(find_run(&bits, 0, 110, 40), Some((100, 10)));
        assert_eq!(find_run(&bits, 305, 512, 1), None);
        assert_eq!(find_run(&bits, 302, 303, 7), Some((302, 1)));
    }

    #[test]
    fn bits_are_set_and_cleared_across_bytes() {
        for (start, len) in [(0, 0), (0, 1), (7, 1), (3, 9), (8, 8), (5, 40), (0, 64)] {
            let mut bits = vec![0; 8];
            set_bits(&mut bits, start, len);
            for index in 0..64 {
                assert_eq!(bit(&bits, index), (start..start + len).contains(&index), "{start}+{len} at {index}");
            }
            assert!(all_set(&bits, start, len));
            clear_bits(&mut bits, start, len);
            assert_eq!(bits, [0; 8]);
        }
    }
}
