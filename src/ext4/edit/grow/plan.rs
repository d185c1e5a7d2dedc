//! What a grown filesystem looks like, and which sizes can't be reached.

use crate::{
    error::{Error, Kind, Result, Stage},
    ext4::{
        edit::no_space,
        layout::{
            compat,
            geometry::{Backups, Geometry},
            incompat,
        },
        read::{Image, unsupported},
    },
};

/// A last group must have this many blocks more than its own metadata, as in resize2fs (`adjust_fs_info`).
const LAST_GROUP_SPARE_MIN: u64 = 50;

/// The shape after growing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) blocks_count: u64,
    pub(super) groups: u32,
    pub(super) gdt_blocks: u32,
}

/// Decides the shape for `size_bytes`; nothing when the filesystem does not get larger. `Kind::NoSpace` names the largest size there is.
pub(super) fn plan(image: &Image, size_bytes: u64) -> Result<Option<Plan>> {
    let geo = &image.geo;
    let wanted = size_bytes / u64::from(geo.block_size);
    if wanted <= geo.blocks_count {
        return Ok(None);
    }
    if matches!(geo.backups, Backups::Two(_)) {
        return Err(unsupported("filesystem", "growing with sparse_super2"));
    }
    let limit = blocks_max(image);
    if wanted > limit {
        return Err(too_large(geo, size_bytes, limit));
    }
    let first = u64::from(geo.first_data_block);
    let per_group = u64::from(geo.blocks_per_group);
    let mut blocks_count = wanted;
    let mut groups = (blocks_count - first).div_ceil(per_group);
    let rest = (blocks_count - first) % per_group;
    if rest != 0 && groups > u64::from(geo.groups) && rest < overhead(geo, groups as u32 - 1) + LAST_GROUP_SPARE_MIN {
        blocks_count -= rest;
        groups -= 1;
    }
    if blocks_count <= geo.blocks_count {
        return Ok(None);
    }
    let groups = groups as u32;
    Ok(Some(Plan { blocks_count, groups, gdt_blocks: geo.gdt_blocks.max(groups.div_ceil(geo.descs_per_block())) }))
}

/// The most blocks this filesystem can have: descriptors in their table and its reserved blocks, inode numbers of 32 bits, block numbers of 32
/// bits without 64bit; backups of reserved descriptor blocks must be within the 32 bits of the resize inode's pointers.
fn blocks_max(image: &Image) -> u64 {
    let geo = &image.geo;
    let reserved = if image.sb.has_compat(compat::RESIZE_INODE) { geo.reserved_gdt_blocks } else { 0 };
    let by_table = u64::from(geo.gdt_blocks + reserved) * u64::from(geo.descs_per_block());
    let by_inodes = u64::from(u32::MAX / geo.inodes_per_group);
    let by_groups = u64::from(geo.first_data_block) + by_table.min(by_inodes) * u64::from(geo.blocks_per_group);
    let by_number = if image.sb.has_incompat(incompat::BIT64) && !image.sb.has_compat(compat::RESIZE_INODE) { 1 << 48 } else { u64::from(u32::MAX) };
    by_groups.min(by_number)
}

fn too_large(geo: &Geometry, size_bytes: u64, limit: u64) -> Error {
    let largest = limit * u64::from(geo.block_size);
    no_space("filesystem", format!("can't grow to {size_bytes} bytes: its descriptor table and numbers allow {largest} bytes at most"))
        .with_reason("EXT4_GROW_LIMIT")
        .with_hint(format!("ask for at most {largest} bytes, or build the golden image with more reserved descriptor blocks"))
}

/// Blocks of metadata that a group may have to hold.
fn overhead(geo: &Geometry, group: u32) -> u64 {
    let base = if geo.has_super(group) { 1 + u64::from(geo.gdt_blocks) + u64::from(geo.reserved_gdt_blocks) } else { 0 };
    base + 2 + u64::from(geo.itable_blocks())
}

/// A group that can't hold its own metadata: only filesystems with strange numbers have that.
pub(super) fn cramped(group: u32) -> Error {
    Error::new(Kind::Unsupported, Stage::Edit, format!("group {group}"), "has no room for its bitmaps and inode table")
}
