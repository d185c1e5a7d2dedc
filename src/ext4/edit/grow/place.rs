//! Where the bitmaps and inode tables of new groups go.
//!
//! With flex_bg those of all new groups of one flexible group are packed behind the base blocks of its first new group (and the following
//! ones, when blocks are small): first the block bitmaps, then the inode bitmaps, then the tables. Otherwise each group holds its own. Used
//! blocks of a new group are always a prefix.

use super::plan::cramped;
use crate::{error::Result, ext4::layout::geometry::Geometry};

/// Where a new group's metadata is, and how many blocks at its own start are in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Placed {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
    /// Blocks used at the start of the group.
    pub(super) used: u32,
    /// Whether bitmaps or tables of other groups, or of a packed flexible group, are in it: its bitmap can't be left uninitialised then.
    pub(super) hosts_others: bool,
}

/// Places the metadata of groups `first..geo.groups`.
pub(super) fn place(geo: &Geometry, first: u32) -> Result<Vec<Placed>> {
    let mut all = Vec::with_capacity((geo.groups - first) as usize);
    let mut group = first;
    while group < geo.groups {
        let end = match geo.flex_log {
            Some(log) if log > 0 && log < 31 => ((group >> log) + 1).saturating_mul(1 << log).min(geo.groups),
            _ => group + 1,
        };
        if end - group > 1
            && let Some(packed) = pack(geo, group, end)
        {
            all.extend(packed);
        } else {
            for group in group..end {
                all.push(alone(geo, group)?);
            }
        }
        group = end;
    }
    Ok(all)
}

/// A group that holds its own metadata.
fn alone(geo: &Geometry, group: u32) -> Result<Placed> {
    let base = geo.base_blocks_in(group);
    let used = base + 2 + geo.itable_blocks();
    if used > geo.group_blocks(group) {
        return Err(cramped(group));
    }
    let start = geo.group_start(group) + u64::from(base);
    Ok(Placed { block_bitmap: start, inode_bitmap: start + 1, inode_table: start + 2, used, hosts_others: false })
}

/// Groups `from..to` packed together; nothing when they don't fit.
fn pack(geo: &Geometry, from: u32, to: u32) -> Option<Vec<Placed>> {
    let mut placed: Vec<Placed> = (from..to).map(|group| Placed { used: geo.base_blocks_in(group), ..Placed::default() }).collect();
    if (from..to).zip(&placed).any(|(group, placed)| placed.used > geo.group_blocks(group)) {
        return None;
    }
    let mut host = 0;
    let mut take = |placed: &mut Vec<Placed>, len: u32| {
        while host < placed.len() {
            let group = from + host as u32;
            let used = placed[host].used;
            if u64::from(used) + u64::from(len) <= u64::from(geo.group_blocks(group)) {
                placed[host].used += len;
                placed[host].hosts_others = true;
                return Some(geo.group_start(group) + u64::from(used));
            }
            host += 1;
        }
        None
    };
    for i in 0..placed.len() {
        placed[i].block_bitmap = take(&mut placed, 1)?;
    }
    for i in 0..placed.len() {
        placed[i].inode_bitmap = take(&mut placed, 1)?;
    }
    for i in 0..placed.len() {
        placed[i].inode_table = take(&mut placed, geo.itable_blocks())?;
    }
    Some(placed)
}
