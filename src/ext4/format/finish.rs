//! The end of a build: directories, then what describes them, down to the superblock.

use std::ops::Range;

use super::{
    Formatter,
    dirs::DirBuilder,
    inodes::InodeCounts,
    tree::{Body, NodeId},
};
use crate::{
    error::{Error, Result, Stage},
    ext4::{
        csum,
        hash::{DirHasher, HashVersion, Signedness},
        layout::{
            BLOCK_SIZE,
            group::{self, GroupDesc},
            ino,
            inode::EXTRA_ISIZE,
            superblock::{self as super_block, Superblock},
        },
        profile::{FLEX_LOG, INODE_SIZE, RESERVED_PERCENT},
    },
    fs::{BuiltFs, FsKind},
};

/// `lost+found` is made large enough to take many files without needing new blocks, as mke2fs does (16 KiB).
const LOST_FOUND_BLOCKS: usize = 4;

impl Formatter {
    /// Writes everything that is still in memory.
    pub(super) fn complete(mut self) -> Result<BuiltFs> {
        self.write_directories()?;
        let mut xattr_blocks = self.sets.place_blocks(&mut |block| self.store.xattr_block(self.seed, block))?;
        let counts = self.write_inodes(&mut xattr_blocks)?;
        let blocks = std::mem::replace(&mut self.store.blocks, super::Blocks::new(&self.shape));
        let (used, free_blocks) = blocks.into_used();
        let descs = self.write_bitmaps(&used, &counts)?;
        debug_assert_eq!(descs.iter().map(|desc| u64::from(desc.free_blocks)).sum::<u64>(), free_blocks);
        self.write_descriptors(&descs, free_blocks, &counts)?;
        let size = self.shape.geometry.blocks_count;
        let built = BuiltFs {
            kind: FsKind::Ext4,
            used_bytes: (size - free_blocks) * u64::from(BLOCK_SIZE),
            inodes: self.tree.live(),
            size_bytes: size * u64::from(BLOCK_SIZE),
        };
        self.store.writer.finish()?;
        Ok(built)
    }

    fn write_directories(&mut self) -> Result<()> {
        let hasher = DirHasher { version: HashVersion::HalfMd4, signedness: Signedness::Signed, seed: DirHasher::seed_words(&self.params.hash_seed) };
        let builder = DirBuilder { hasher, seed: self.seed };
        let (order, starts) = self.tree.by_directory();
        for (position, id) in self.tree.ids().enumerate() {
            let Body::Dir { parent, children, .. } = self.tree.node(id).body else { continue };
            let names = &order[starts[position] as usize..starts[position + 1] as usize];
            let blocks_min = if id == NodeId::LOST_FOUND { LOST_FOUND_BLOCKS } else { 1 };
            let built = builder.build(&self.tree, id, parent, names, blocks_min)?;
            let subdirs = names.iter().filter(|index| self.tree.node(self.tree.name(**index).node).is_dir()).count();
            let runs = self.store.bytes("a directory", &built.bytes)?;
            let runs = self.tree.add_runs(&runs)?;
            let node = self.tree.node_mut(id);
            node.body = Body::Dir { parent, children, runs };
            node.indexed = built.indexed;
            node.links = 2 + subdirs as u32;
        }
        Ok(())
    }

    /// Writes the bitmaps that are not all zero and makes the descriptors, still without their own checksum.
    fn write_bitmaps(&mut self, used: &[Range<u64>], counts: &InodeCounts) -> Result<Vec<GroupDesc>> {
        let mut descs = Vec::with_capacity(self.shape.places.len());
        let mut used = used;
        for (group, place) in (0..).zip(&self.shape.places) {
            let mut desc = GroupDesc {
                block_bitmap: place.block_bitmap,
                inode_bitmap: place.inode_bitmap,
                inode_table: place.inode_table,
                // The region reads as zeros, so the guest's kernel need not clear the rest of the table in the background.
                flags: group::INODE_ZEROED,
                ..GroupDesc::default()
            };
            let (bits, taken) = block_bits(&self.shape.geometry, group, &mut used);
            desc.free_blocks = self.shape.geometry.group_blocks(group) - taken;
            if let Some(seed) = self.seed {
                desc.block_bitmap_csum = csum::bitmap(seed, &bits);
            }
            if bits.iter().any(|byte| *byte != 0) {
                self.store.writer.put_at(place.block_bitmap * u64::from(BLOCK_SIZE), &bits)?;
            }
            descs.push(desc);
        }
        for (group, desc) in (0..).zip(&mut descs) {
            self.inode_bitmap(group, desc, counts)?;
        }
        Ok(descs)
    }

    fn inode_bitmap(&mut self, group: u32, desc: &mut GroupDesc, counts: &InodeCounts) -> Result<()> {
        let per_group = self.shape.geometry.inodes_per_group;
        let Some(dirs) = counts.dirs.get(group as usize) else {
            (desc.free_inodes, desc.itable_unused) = (per_group, per_group);
            desc.flags |= group::INODE_UNINIT;
            return Ok(());
        };
        let mut bits = vec![0; BLOCK_SIZE as usize];
        let (mut taken, mut unused) = (0, per_group);
        for index in 0..per_group {
            let number = group * per_group + index + 1;
            let is_used = number < ino::FIRST || NodeId::of_ino(number).is_some_and(|id| self.tree.is_used(id));
            if is_used {
                bits[index as usize / 8] |= 1 << (index % 8);
                (taken, unused) = (taken + 1, per_group - index - 1);
            }
        }
        set_bits(&mut bits, per_group..BLOCK_SIZE * 8);
        (desc.free_inodes, desc.itable_unused, desc.used_dirs) = (per_group - taken, unused, *dirs);
        if let Some(seed) = self.seed {
            desc.inode_bitmap_csum = csum::bitmap(seed, &bits[..per_group as usize / 8]);
        }
        self.store.writer.put_at(desc.inode_bitmap * u64::from(BLOCK_SIZE), &bits)
    }

    /// Writes descriptors and superblock, first the copies, at last those of group 0.
    fn write_descriptors(&mut self, descs: &[GroupDesc], free_blocks: u64, counts: &InodeCounts) -> Result<()> {
        let geometry = &self.shape.geometry;
        let mut table = vec![0; geometry.gdt_blocks as usize * BLOCK_SIZE as usize];
        for ((group, desc), raw) in (0..).zip(descs).zip(table.chunks_exact_mut(usize::from(geometry.desc_size))) {
            desc.write(raw);
            let checksum = match self.seed {
                Some(seed) => csum::group_desc(seed, group, raw),
                None => csum::group_desc_crc16(&self.params.uuid, group, raw),
            };
            GroupDesc { checksum, ..*desc }.write(raw);
        }
        let mut sb = self.superblock(free_blocks, descs.iter().map(|desc| desc.free_inodes).sum())?;
        Self::back_up_journal(&counts.journal, &mut sb);
        let copies: Vec<(u32, u64)> =
            (0..geometry.groups).rev().filter(|group| geometry.has_super(*group)).map(|group| (group, geometry.group_start(group))).collect();
        for (group, start) in copies {
            let at = start * u64::from(BLOCK_SIZE);
            self.store.writer.put_at(at + u64::from(BLOCK_SIZE), &table)?;
            sb.block_group_nr = group as u16;
            let mut raw = [0; Superblock::SIZE];
            sb.write(&mut raw);
            if self.seed.is_some() {
                Superblock { checksum: csum::superblock(&raw), ..sb.clone() }.write(&mut raw);
            }
            self.store.writer.put_at(at + if group == 0 { super_block::OFFSET } else { 0 }, &raw)?;
        }
        Ok(())
    }

    fn superblock(&self, free_blocks: u64, free_inodes: u32) -> Result<Superblock> {
        let (geometry, params) = (&self.shape.geometry, &self.params);
        let mut label = [0; 16];
        label[..params.label.len()].copy_from_slice(params.label.as_bytes());
        let reserved = u16::try_from(geometry.reserved_gdt_blocks).map_err(|_| Error::internal(Stage::Golden, "ext4", "too many reserved blocks"))?;
        let mut sb = Superblock {
            inodes_count: geometry.inodes_count(),
            free_inodes_count: free_inodes,
            first_data_block: geometry.first_data_block,
            log_block_size: BLOCK_SIZE.trailing_zeros() - 10,
            log_cluster_size: BLOCK_SIZE.trailing_zeros() - 10,
            blocks_per_group: geometry.blocks_per_group,
            clusters_per_group: geometry.blocks_per_group,
            inodes_per_group: geometry.inodes_per_group,
            max_mnt_count: u16::MAX,
            magic: super_block::MAGIC,
            state: super_block::STATE_VALID,
            errors: super_block::ERRORS_CONTINUE,
            rev_level: super_block::REV_DYNAMIC,
            first_ino: ino::FIRST,
            inode_size: INODE_SIZE,
            feature_compat: self.shape.features.compat,
            feature_incompat: self.shape.features.incompat,
            feature_ro_compat: self.shape.features.ro_compat,
            uuid: params.uuid,
            volume_name: label,
            reserved_gdt_blocks: reserved,
            journal_inum: ino::JOURNAL,
            jnl_backup_type: super_block::JNL_BACKUP_BLOCKS,
            hash_seed: DirHasher::seed_words(&params.hash_seed),
            def_hash_version: HashVersion::HalfMd4.to_disk(),
            flags: super_block::FLAG_SIGNED_HASH,
            desc_size: if self.shape.features.bit64() { geometry.desc_size } else { 0 },
            default_mount_opts: super_block::DEFM_XATTR_USER | super_block::DEFM_ACL,
            min_extra_isize: EXTRA_ISIZE,
            want_extra_isize: EXTRA_ISIZE,
            log_groups_per_flex: FLEX_LOG,
            checksum_type: if self.seed.is_some() { super_block::CHECKSUM_CRC32C } else { 0 },
            checksum_seed: self.seed.filter(|_| self.shape.features.csum_seed()).unwrap_or(0),
            kbytes_written: self.store.writer.written() / 1024,
            ..Superblock::zeroed()
        };
        sb.set_blocks_count(geometry.blocks_count);
        sb.set_r_blocks_count(geometry.blocks_count * RESERVED_PERCENT / 100);
        sb.set_free_blocks_count(free_blocks);
        // The superblock has 40 bits without sign.
        let now = params.epoch_secs.clamp(0, (1 << 40) - 1);
        sb.set_mkfs_time(now);
        sb.set_wtime(now);
        sb.set_lastcheck(now);
        Ok(sb)
    }
}

/// The block bitmap of a group and how many of its blocks are used. `used` loses the ranges that end in the group.
fn block_bits(geometry: &crate::ext4::layout::geometry::Geometry, group: u32, used: &mut &[Range<u64>]) -> (Vec<u8>, u32) {
    let mut bits = vec![0; BLOCK_SIZE as usize];
    let start = geometry.group_start(group);
    let end = start + u64::from(geometry.group_blocks(group));
    let mut taken = 0;
    while let Some(range) = used.first().filter(|range| range.start < end) {
        let within = (range.start.max(start) - start) as u32..(range.end.min(end) - start) as u32;
        taken += within.end - within.start;
        set_bits(&mut bits, within);
        if range.end > end {
            break;
        }
        *used = &used[1..];
    }
    // Blocks behind the end of the last group count as used.
    set_bits(&mut bits, (end - start) as u32..BLOCK_SIZE * 8);
    (bits, taken)
}

fn set_bits(bits: &mut [u8], range: Range<u32>) {
    let (mut at, end) = (range.start, range.end);
    while at < end {
        if at % 8 == 0 && end - at >= 8 {
            bits[at as usize / 8] = 0xff;
            at += 8;
        } else {
            bits[at as usize / 8] |= 1 << (at % 8);
            at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_ranges_are_set_exactly() {
        for (range, want) in [(0..0, [0, 0, 0]), (3..5, [0x18, 0, 0]), (7..17, [0x80, 0xff, 0x01]), (0..24, [0xff; 3])] {
            let mut bits = [0; 3];
            set_bits(&mut bits, range.clone());
            assert_eq!(bits, want, "{range:?}");
        }
    }
}
