//! Where everything that does not depend on the content goes: derived from the region's size alone, before the first entry arrives.
//!
//! ```text
//! group 0                                                       group 1 (a backup)           group 16
//! | super | descs | reserved descs | 16 block bitmaps |        | super | descs | reserved |   | bitmaps and tables of 16..31 |
//! | 16 inode bitmaps | 16 inode tables | resize | journal | data ....
//! ```
//!
//! The journal takes the first gap that holds it in one piece (group 0 up to 64 MiB of journal): nothing is known yet about where data will end,
//! everything in use stays together at the front of the disk, and data after it is not cut in two. mke2fs puts it in the middle to shorten the
//! seeks of spinning disks.

use std::ops::Range;

use super::super::{
    layout::{
        BLOCK_SIZE,
        extent::LEN_MAX,
        geometry::{Backups, Geometry},
        group,
    },
    profile::{BYTES_PER_INODE, FLEX_LOG, Features, INODE_SIZE},
};
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::BuildParams,
    units::Bytes,
};

/// Fewest blocks of a filesystem: below, mke2fs makes no journal either.
pub const BLOCKS_MIN: u64 = 2048;
const BLOCKS_PER_GROUP: u32 = BLOCK_SIZE * 8;
const INODES_PER_BLOCK: u32 = BLOCK_SIZE / INODE_SIZE as u32;
/// Blocks a last group must have beyond its own metadata to be worth having (mke2fs).
const LAST_GROUP_SPARE: u64 = 50;

/// A run of blocks of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First block of the file.
    pub logical: u32,
    /// Blocks.
    pub len: u32,
    /// First block on disk.
    pub start: u64,
}

/// Where a group's own metadata is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Block of the block bitmap.
    pub block_bitmap: u64,
    /// Block of the inode bitmap.
    pub inode_bitmap: u64,
    /// First block of the inode table.
    pub inode_table: u64,
}

/// The plan.
#[derive(Debug)]
pub struct Shape {
    /// Sizes and counts.
    pub geometry: Geometry,
    /// Features.
    pub features: Features,
    /// Per group.
    pub places: Vec<Place>,
    /// Ascending, disjoint, not adjacent: every block that is not for content.
    pub reserved: Vec<Range<u64>>,
    /// The journal's blocks.
    pub journal: Vec<Run>,
    /// The double-indirect block of the resize inode.
    pub resize_block: u64,
}

impl Shape {
    /// Plans a filesystem in `len` bytes. `Kind::NoSpace` when that is too little, `Kind::Unsupported` when too much (2^32 blocks),
    /// `Kind::InvalidRequest` for a bad inode ratio.
    pub fn new(len: u64, params: &BuildParams) -> Result<Self> {
        if !BYTES_PER_INODE.contains(&params.bytes_per_inode) {
            let (low, high) = BYTES_PER_INODE.into_inner();
            return Err(Error::field(Stage::Golden, "bytes_per_inode", format!("is {}, allowed are {low} to {high}", params.bytes_per_inode)));
        }
        let blocks = len / u64::from(BLOCK_SIZE);
        if blocks < BLOCKS_MIN {
            return Err(too_small(len));
        }
        if blocks > u64::from(u32::MAX) {
            let message = format!("{} is more than the 2^32 blocks of 4 KiB that a filesystem with a resize inode can have", Bytes(len));
            return Err(Error::new(Kind::Unsupported, Stage::Golden, "ext4", message));
        }
        let features = Features::of(params.profile);
        let geometry = plan_geometry(blocks, &features, params.bytes_per_inode);
        let mut shape = Shape { places: place_groups(&geometry), geometry, features, reserved: Vec::new(), journal: Vec::new(), resize_block: 0 };
        shape.reserve_groups();
        if shape.reserved.last().is_some_and(|last| last.end > shape.geometry.blocks_count) {
            return Err(too_small(len));
        }
        let first_gap = shape.gaps().next();
        shape.resize_block = first_gap.ok_or_else(|| too_small(len))?.start;
        shape.reserved.push(shape.resize_block..shape.resize_block + 1);
        shape.tidy();
        shape.place_journal(len)?;
        Ok(shape)
    }

    /// Ranges that are free for content, ascending.
    pub fn gaps(&self) -> impl Iterator<Item = Range<u64>> {
        let ends = std::iter::once(0).chain(self.reserved.iter().map(|range| range.end));
        let starts = self.reserved.iter().map(|range| range.start).chain(std::iter::once(self.geometry.blocks_count));
        ends.zip(starts).map(|(end, start)| end..start).filter(|gap| !gap.is_empty())
    }

    fn reserve_groups(&mut self) {
        let geometry = &self.geometry;
        let table = u64::from(geometry.itable_blocks());
        for (group, place) in (0..).zip(&self.places) {
            let start = geometry.group_start(group);
            let base = u64::from(geometry.base_blocks_in(group));
            let blocks = [place.block_bitmap..place.block_bitmap + 1, place.inode_bitmap..place.inode_bitmap + 1];
            self.reserved.extend([start..start + base, place.inode_table..place.inode_table + table].into_iter().chain(blocks));
        }
        self.tidy();
    }

    fn tidy(&mut self) {
        self.reserved.retain(|range| !range.is_empty());
        self.reserved.sort_unstable_by_key(|range| range.start);
        self.reserved.dedup_by(|next, last| {
            let adjacent = last.end == next.start;
            if adjacent {
                last.end = next.end;
            }
            adjacent
        });
    }

    fn place_journal(&mut self, len: u64) -> Result<()> {
        let mut left = journal_blocks(self.geometry.blocks_count);
        let whole = self.gaps().find(|gap| gap.end - gap.start >= u64::from(left));
        let gaps: Vec<Range<u64>> = match whole {
            Some(gap) => vec![gap],
            None => self.gaps().collect(),
        };
        let mut logical = 0;
        for gap in gaps {
            let take = u64::from(left).min(gap.end - gap.start) as u32;
            if take > 0 {
                self.journal.push(Run { logical, len: take, start: gap.start });
                self.reserved.push(gap.start..gap.start + u64::from(take));
                (logical, left) = (logical + take, left - take);
            }
        }
        self.tidy();
        if left > 0 { Err(too_small(len)) } else { Ok(()) }
    }
}

fn too_small(len: u64) -> Error {
    let message = format!("{} is too small for this filesystem's own structures; at least {}", Bytes(len), Bytes(BLOCKS_MIN * u64::from(BLOCK_SIZE)));
    Error::new(Kind::NoSpace, Stage::Golden, "ext4", message).with_hint("a larger disk, or more bytes per inode")
}

/// Journal size by filesystem size, blocks of 4 KiB: `ext2fs_default_journal_size` of e2fsprogs 1.47.
fn journal_blocks(blocks: u64) -> u32 {
    const STEPS: [(u64, u32); 8] = [
        (32 << 10, 1 << 10),
        (256 << 10, 4 << 10),
        (512 << 10, 8 << 10),
        (4 << 20, 16 << 10),
        (8 << 20, 32 << 10),
        (16 << 20, 64 << 10),
        (32 << 20, 128 << 10),
        (u64::MAX, 256 << 10),
    ];
    STEPS.iter().find(|(below, _)| blocks < *below).map_or(LEN_MAX, |(_, journal)| *journal)
}

/// Counts as mke2fs computes them; a last group too small for its own metadata and a little more is left off.
fn plan_geometry(mut blocks: u64, features: &Features, bytes_per_inode: u32) -> Geometry {
    let desc_size = if features.bit64() { group::SIZE_64 } else { group::SIZE_32 };
    loop {
        let groups = blocks.div_ceil(u64::from(BLOCKS_PER_GROUP)) as u32;
        let geometry = Geometry {
            block_size: BLOCK_SIZE,
            blocks_count: blocks,
            first_data_block: 0,
            blocks_per_group: BLOCKS_PER_GROUP,
            inodes_per_group: inodes_per_group(blocks, groups, bytes_per_inode),
            inode_size: INODE_SIZE,
            desc_size,
            gdt_blocks: groups.div_ceil(BLOCK_SIZE / u32::from(desc_size)),
            reserved_gdt_blocks: reserved_gdt_blocks(blocks, groups, desc_size),
            groups,
            flex_log: Some(FLEX_LOG),
            backups: Backups::Sparse,
            first_meta_bg: None,
        };
        let last = blocks % u64::from(BLOCKS_PER_GROUP);
        let overhead = 2 + u64::from(geometry.itable_blocks()) + u64::from(geometry.base_blocks_in(groups - 1));
        if groups > 1 && last > 0 && last < overhead + LAST_GROUP_SPARE {
            blocks -= last;
        } else {
            return geometry;
        }
    }
}

fn inodes_per_group(blocks: u64, groups: u32, bytes_per_inode: u32) -> u32 {
    let wanted = (blocks * u64::from(BLOCK_SIZE) / u64::from(bytes_per_inode)).div_ceil(u64::from(groups));
    let whole = (wanted as u32).max(1).next_multiple_of(INODES_PER_BLOCK);
    // Inode numbers have 32 bits.
    whole.min(u32::MAX / groups / INODES_PER_BLOCK * INODES_PER_BLOCK)
}

/// Room to grow 1024 times, at most what one block of pointers can name (`calc_reserved_gdt_blocks` of e2fsprogs).
fn reserved_gdt_blocks(blocks: u64, groups: u32, desc_size: u16) -> u32 {
    let per_block = BLOCK_SIZE / u32::from(desc_size);
    let max_blocks = (blocks * 1024).min(u64::from(u32::MAX));
    let max_groups = max_blocks.div_ceil(u64::from(BLOCKS_PER_GROUP)) as u32;
    (max_groups.div_ceil(per_block) - groups.div_ceil(per_block)).min(BLOCK_SIZE / 4)
}

/// Bitmaps and tables of each flexible group, packed at its start, around the backups that lie there.
fn place_groups(geometry: &Geometry) -> Vec<Place> {
    let per_flex = 1u32 << FLEX_LOG;
    let mut places = Vec::with_capacity(geometry.groups as usize);
    for first in (0..geometry.groups).step_by(per_flex as usize) {
        let count = per_flex.min(geometry.groups - first);
        let mut at = geometry.group_start(first);
        let mut take = |blocks: u32| {
            at = clear_of_backups(geometry, at, blocks);
            let start = at;
            at += u64::from(blocks);
            start
        };
        let block_bitmaps: Vec<u64> = (0..count).map(|_| take(1)).collect();
        let inode_bitmaps: Vec<u64> = (0..count).map(|_| take(1)).collect();
        for (block_bitmap, inode_bitmap) in block_bitmaps.into_iter().zip(inode_bitmaps) {
            places.push(Place { block_bitmap, inode_bitmap, inode_table: take(geometry.itable_blocks()) });
        }
    }
    places
}

/// The first place at or after `at` where `blocks` blocks touch no superblock copy or descriptor table.
fn clear_of_backups(geometry: &Geometry, mut at: u64, blocks: u32) -> u64 {
    let mut group = geometry.group_of_block(at);
    while group < geometry.groups && geometry.group_start(group) < at + u64::from(blocks) {
        let base = u64::from(geometry.base_blocks_in(group));
        if base > 0 {
            at = at.max(geometry.group_start(group) + base);
        }
        group += 1;
    }
    at
}
