//! The end of an edit: bitmap and descriptor checksums, the superblock, backups, and the overlay as a patch of 4 KiB blocks.

use super::{Backups, Editor, alloc::Bitmap};
use crate::{
    error::Result,
    ext4::{
        csum,
        layout::{corrupt, put_u16, put_u32, superblock},
        read::{Image, Sums},
    },
    fs::patch::BlockPatch,
    units::{PATCH_BLOCK, round_up},
};

impl Editor {
    /// Writes what has been kept in memory so far into the overlay.
    pub(super) fn commit(&mut self) -> Result<()> {
        let groups: Vec<u32> = self.groups.iter().filter(|(_, state)| state.dirty).map(|(group, _)| *group).collect();
        if groups.is_empty() && self.image.overlay.is_empty() && self.backups == Backups::Keep {
            return Ok(());
        }
        for group in groups {
            self.commit_group(group)?;
        }
        self.image.sb.set_wtime(self.now.secs);
        self.put_superblock(0, 0)?;
        self.commit_backups()
    }

    fn commit_group(&mut self, group: u32) -> Result<()> {
        let state = self.group(group)?;
        let (mut desc, blocks, inodes) = (state.desc, state.blocks, state.inodes);
        state.dirty = false;
        if self.image.sums == Sums::Metadata {
            let geo = &self.image.geo;
            if blocks == Bitmap::Changed {
                let block = self.image.block(desc.block_bitmap)?;
                desc.block_bitmap_csum = csum::bitmap(self.image.seed, &block[..self.image.bitmap_len(geo.blocks_per_group)]);
            }
            if inodes == Bitmap::Changed {
                let block = self.image.block(desc.inode_bitmap)?;
                desc.inode_bitmap_csum = csum::bitmap(self.image.seed, &block[..self.image.bitmap_len(geo.inodes_per_group)]);
            }
        }
        self.group(group)?.desc = desc;
        self.put_desc(group)
    }

    /// Writes the descriptor of a group that is in memory, with its checksum.
    pub(super) fn put_desc(&mut self, group: u32) -> Result<()> {
        let desc = self.group(group)?.desc;
        let (block, at) = self.image.geo.desc_location(group);
        let end = at + usize::from(self.image.geo.desc_size);
        let bytes = &mut self.block_mut(block)?[at..end];
        desc.write(bytes);
        let raw = bytes.to_vec();
        if let Some(sum) = self.image.group_desc_sum(group, &raw) {
            put_u16(&mut self.block_mut(block)?[at..end], 0x1e, sum);
            self.group(group)?.desc.checksum = sum;
        }
        Ok(())
    }

    /// Writes the superblock into its place in a group: group 0, or one with a backup. The first starts at byte 1024, the others at their
    /// block.
    fn put_superblock(&mut self, group: u32, group_nr: u16) -> Result<()> {
        let block_size = self.image.block_size() as u64;
        let place = if group == 0 { superblock::OFFSET } else { self.image.geo.group_start(group) * block_size };
        let (number, at) = (place / block_size, (place % block_size) as usize);
        let mut sb = self.image.sb.clone();
        sb.block_group_nr = group_nr;
        let sums = self.image.sums;
        let bytes = &mut self.block_mut(number)?[at..at + 1024];
        sb.write(bytes);
        if sums == Sums::Metadata {
            let sum = csum::superblock(bytes);
            put_u32(bytes, superblock::CHECKSUM_AT, sum);
        }
        Ok(())
    }

    /// The other copies of superblock and descriptors, as tune2fs(8) and resize2fs(8) write them.
    fn commit_backups(&mut self) -> Result<()> {
        if self.backups == Backups::Keep {
            return Ok(());
        }
        let geo = self.image.geo.clone();
        for group in (1..geo.groups).filter(|group| geo.has_super(*group)) {
            if geo.base_blocks_in(group) > geo.group_blocks(group) {
                return Err(corrupt(format!("group {group}"), "has no room for its backup of superblock and descriptors"));
            }
            self.put_superblock(group, group as u16)?;
            if self.backups == Backups::Tables {
                for i in 0..u64::from(geo.gdt_blocks) {
                    let table = self.image.block(u64::from(geo.first_data_block) + 1 + i)?;
                    self.image.overlay.insert(geo.group_start(group) + 1 + i, table);
                }
            }
        }
        Ok(())
    }

    /// The changed blocks, whole patch blocks filled up from the golden.
    pub(super) fn into_patch(self, size_bytes: Option<u64>) -> Result<BlockPatch> {
        let Image { overlay, .. } = &self.image;
        let block_size = self.image.block_size() as u64;
        let wanted = size_bytes.map_or(0, |bytes| bytes - bytes % block_size);
        let mut patch = BlockPatch::new(round_up(self.image.region_len().max(wanted), PATCH_BLOCK));
        let mut pending: Option<(u64, Box<[u8]>)> = None;
        for (number, block) in overlay {
            let byte = number * block_size;
            let (patch_block, at) = (byte / PATCH_BLOCK, (byte % PATCH_BLOCK) as usize);
            if pending.as_ref().is_none_or(|(current, _)| *current != patch_block) {
                if let Some((done, data)) = pending.take() {
                    patch.insert(done, data);
                }
                let mut data = vec![0; PATCH_BLOCK as usize].into_boxed_slice();
                if block_size < PATCH_BLOCK {
                    self.image.read_golden(patch_block * PATCH_BLOCK, &mut data)?;
                }
                pending = Some((patch_block, data));
            }
            if let Some((_, data)) = &mut pending {
                data[at..at + block.len()].copy_from_slice(block);
            }
        }
        if let Some((done, data)) = pending {
            patch.insert(done, data);
        }
        Ok(patch)
    }
}
