//! Extended attributes of new inodes: what fits goes into the inode, the rest into one block, and inodes with equal sets share that block.
//!
//! A shared block's reference count is known at the end only, so the block is kept in memory until then. That is done for the first
//! [`KEPT_MAX`] blocks; an archive with more different ones than that gets each later one written at once, unshared.

use std::collections::{BTreeMap, HashMap};

use super::super::{
    layout::{
        BLOCK_SIZE,
        inode::{EXTRA_ISIZE, OLD_SIZE},
        put_u32,
        xattr::{self, IBODY_HEADER_SIZE, REFCOUNT_MAX, XattrBlockHeader, XattrEntry},
    },
    profile::INODE_SIZE,
};
use crate::{
    error::{Error, Kind, Result, Stage},
    names::GuestPath,
    tree::Xattr,
};

/// Where the xattrs of an inode begin: behind its fields.
pub const IBODY_AT: usize = OLD_SIZE + EXTRA_ISIZE as usize;
const IBODY_ROOM: usize = INODE_SIZE as usize - IBODY_AT - IBODY_HEADER_SIZE;
const BLOCK_ROOM: usize = BLOCK_SIZE as usize - XattrBlockHeader::SIZE;
/// Four zero bytes behind the last entry.
const END: usize = 4;
/// Blocks kept in memory: 16 MiB.
const KEPT_MAX: usize = 4096;
/// Sets that later inodes can share.
const KNOWN_MAX: usize = 65536;

/// One attribute in its form on disk.
#[derive(Debug, Clone)]
struct Stored {
    index: u8,
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Stored {
    fn size(&self) -> usize {
        XattrEntry::len(self.name.len()) + self.value.len().next_multiple_of(4)
    }
}

/// A set of attributes, encoded.
#[derive(Debug)]
struct Set {
    /// What follows the inode's fields; empty when nothing is there.
    ibody: Vec<u8>,
    /// What did not fit there.
    block: Block,
    /// Inodes that use the set.
    users: u32,
}

/// The part of a set outside the inode.
#[derive(Debug)]
enum Block {
    None,
    /// Its bytes without reference count and checksum.
    Kept(Vec<u8>),
    /// Its number on disk; one inode uses it.
    Written(u64),
}

/// All sets of a build, equal ones once.
#[derive(Default)]
pub struct Sets {
    sets: Vec<Set>,
    by_content: BTreeMap<Vec<Xattr>, u32>,
    kept: usize,
}

impl Sets {
    /// Keeps the attributes of `path` and returns their index plus one, 0 for none. `write` puts a block that can't be kept on disk and returns
    /// its number. `Kind::Unsupported` names what ext4 can't store: a namespace it has no number for, or more than inode and block hold;
    /// `Kind::Corrupt` a value that is not what its name promises.
    pub fn add(&mut self, path: &GuestPath, attrs: &[Xattr], write: &mut dyn FnMut(Vec<u8>) -> Result<u64>) -> Result<u32> {
        if attrs.is_empty() {
            return Ok(0);
        }
        if let Some(index) = self.by_content.get(attrs) {
            self.sets[*index as usize].users += 1;
            return Ok(index + 1);
        }
        let mut set = encode(path, attrs)?;
        let mut shareable = self.by_content.len() < KNOWN_MAX;
        if let Block::Kept(bytes) = &mut set.block {
            if self.kept < KEPT_MAX && shareable {
                self.kept += 1;
            } else {
                put_u32(bytes, REFCOUNT_AT, 1);
                (set.block, shareable) = (Block::Written(write(std::mem::take(bytes))?), false);
            }
        }
        let index = self.sets.len() as u32;
        self.sets.push(set);
        if shareable {
            self.by_content.insert(attrs.to_vec(), index);
        }
        Ok(index + 1)
    }

    /// An inode that used the set `handle` (index plus one) is gone. Returns the block that is free now, if one was written for it.
    pub fn release(&mut self, handle: u32) -> Option<u64> {
        let set = handle.checked_sub(1).and_then(|index| self.sets.get_mut(index as usize))?;
        set.users -= 1;
        match set.block {
            Block::Written(number) if set.users == 0 => Some(number),
            _ => None,
        }
    }

    /// The bytes for the inode's body, maybe empty.
    pub fn ibody(&self, handle: u32) -> &[u8] {
        handle.checked_sub(1).and_then(|index| self.sets.get(index as usize)).map_or(&[], |set| &set.ibody)
    }

    /// Every block, by the handle of its set and with the number of inodes that use it. Those still in memory go through `write`, once for each
    /// [`REFCOUNT_MAX`] users.
    pub fn place_blocks(&mut self, write: &mut dyn FnMut(Vec<u8>) -> Result<u64>) -> Result<Placed> {
        let mut placed = Placed::new();
        for (handle, set) in (1..).zip(&mut self.sets).filter(|(_, set)| set.users > 0) {
            match &set.block {
                Block::None => {}
                Block::Written(number) => placed.entry(handle).or_default().push((*number, set.users)),
                Block::Kept(bytes) => {
                    let mut left = set.users;
                    while left > 0 {
                        let users = left.min(REFCOUNT_MAX);
                        let mut bytes = bytes.clone();
                        put_u32(&mut bytes, REFCOUNT_AT, users);
                        placed.entry(handle).or_default().push((write(bytes)?, users));
                        left -= users;
                    }
                }
            }
        }
        Ok(placed)
    }
}

/// Blocks by the handle of their set, each with the number of inodes that are still to get it.
pub type Placed = HashMap<u32, Vec<(u64, u32)>>;
/// Offset of the reference count in a block.
const REFCOUNT_AT: usize = 4;

fn unsupported(path: &GuestPath, message: String) -> Error {
    Error::new(Kind::Unsupported, Stage::Golden, path.to_string(), message)
}

fn encode(path: &GuestPath, attrs: &[Xattr]) -> Result<Set> {
    let mut stored = attrs.iter().map(|attr| to_stored(path, attr)).collect::<Result<Vec<_>>>()?;
    // The order the kernel searches blocks by.
    stored.sort_by(|a, b| (a.index, a.name.len(), &a.name).cmp(&(b.index, b.name.len(), &b.name)));
    let mut room = IBODY_ROOM - END;
    let (inner, outer): (Vec<Stored>, Vec<Stored>) = stored.into_iter().partition(|attr| {
        let fits = attr.size() <= room;
        if fits {
            room -= attr.size();
        }
        fits
    });
    let needed: usize = outer.iter().map(Stored::size).sum();
    if needed > BLOCK_ROOM - END {
        let names: Vec<String> = attrs.iter().map(|attr| format!("{} ({} bytes)", String::from_utf8_lossy(&attr.name), attr.value.len())).collect();
        let message = format!("extended attributes need {needed} bytes beside the inode, ext4 has {}: {}", BLOCK_ROOM - END, names.join(", "));
        return Err(unsupported(path, message).with_reason("XATTR_TOO_BIG"));
    }
    let mut set = Set { ibody: Vec::new(), block: Block::None, users: 1 };
    if !inner.is_empty() {
        set.ibody = vec![0; IBODY_HEADER_SIZE + IBODY_ROOM];
        put_u32(&mut set.ibody, 0, xattr::MAGIC);
        // Inside an inode value offsets count from the first entry and hashes are zero.
        put_entries(&mut set.ibody[IBODY_HEADER_SIZE..], 0, &inner, false);
    }
    if !outer.is_empty() {
        let mut block = vec![0; BLOCK_SIZE as usize];
        let hashes = outer.iter().map(|attr| xattr::entry_hash(&attr.name, &attr.value));
        let header = XattrBlockHeader { magic: xattr::MAGIC, blocks: 1, hash: xattr::block_hash(hashes), ..XattrBlockHeader::zeroed() };
        header.write(&mut block);
        put_entries(&mut block, XattrBlockHeader::SIZE, &outer, true);
        set.block = Block::Kept(block);
    }
    Ok(set)
}

fn to_stored(path: &GuestPath, attr: &Xattr) -> Result<Stored> {
    let shown = String::from_utf8_lossy(&attr.name);
    let Some((index, name)) = xattr::split_name(&attr.name) else {
        return Err(unsupported(path, format!("ext4 can't store the extended attribute {shown:?}: unknown namespace or name too long")));
    };
    let value = if index == xattr::INDEX_ACL_ACCESS || index == xattr::INDEX_ACL_DEFAULT {
        xattr::acl_to_disk(&attr.value).map_err(|why| Error::new(Kind::Corrupt, Stage::Golden, path.to_string(), format!("{shown} {why}")))?
    } else {
        attr.value.clone()
    };
    Ok(Stored { index, name: name.to_vec(), value })
}

/// Entries from `at` upwards, values from the end downwards.
fn put_entries(area: &mut [u8], mut at: usize, attrs: &[Stored], hashed: bool) {
    let mut value_at = area.len();
    for attr in attrs {
        value_at -= attr.value.len().next_multiple_of(4);
        area[value_at..value_at + attr.value.len()].copy_from_slice(&attr.value);
        let entry = XattrEntry {
            index: attr.index,
            name: &attr.name,
            value_offs: if attr.value.is_empty() { 0 } else { value_at as u16 },
            value_inum: 0,
            value_size: attr.value.len() as u32,
            hash: if hashed { xattr::entry_hash(&attr.name, &attr.value) } else { 0 },
        };
        entry.write(area, at);
        at += XattrEntry::len(attr.name.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr(name: &str, len: usize) -> Xattr {
        Xattr { name: name.as_bytes().to_vec(), value: vec![7; len] }
    }

    fn none(_: Vec<u8>) -> Result<u64> {
        panic!("no block is to be written")
    }

    #[test]
    fn small_sets_stay_in_the_inode_and_equal_ones_are_kept_once() {
        let (mut sets, path) = (Sets::default(), GuestPath::root());
        let first = sets.add(&path, &[attr("user.a", 20)], &mut none).expect("fits");
        assert_eq!(sets.add(&path, &[attr("user.a", 20)], &mut none).expect("fits"), first);
        assert!(!sets.ibody(first).is_empty());
        assert!(sets.place_blocks(&mut none).expect("nothing to do").is_empty());
        let second = sets.add(&path, &[attr("user.a", 200)], &mut none).expect("fits");
        let placed = sets.place_blocks(&mut |_| Ok(77)).expect("placed");
        assert_eq!(placed[&second], [(77, 1)]);
        assert_eq!(sets.release(second), None);
        assert!(sets.place_blocks(&mut none).expect("nobody uses it").is_empty());
    }

    #[test]
    fn blocks_beyond_those_kept_are_written_at_once_and_unshared() {
        let (mut sets, path) = (Sets::default(), GuestPath::root());
        for i in 0..KEPT_MAX {
            sets.add(&path, &[attr(&format!("user.{i}"), 200)], &mut none).expect("kept");
        }
        let mut next = 1000;
        let mut write = |block: Vec<u8>| {
            assert_eq!(block[REFCOUNT_AT], 1);
            next += 1;
            Ok(next)
        };
        let first = sets.add(&path, &[attr("user.more", 200)], &mut write).expect("written");
        let second = sets.add(&path, &[attr("user.more", 200)], &mut write).expect("written again");
        assert_ne!(first, second);
        assert_eq!(sets.release(first), Some(1001));
        assert_eq!(sets.place_blocks(&mut |_| Ok(5)).expect("placed")[&second], [(1002, 1)]);
    }

    #[test]
    fn the_limit_is_exact_and_named() {
        let (mut sets, path) = (Sets::default(), GuestPath::new("/x").expect("valid"));
        let most = BLOCK_ROOM - END - XattrEntry::len(1);
        assert!(sets.add(&path, &[attr("user.a", most)], &mut none).is_ok());
        let error = sets.add(&path, &[attr("user.a", most + 1)], &mut none).expect_err("one byte too many");
        assert_eq!((error.kind(), error.reason(), error.object()), (Kind::Unsupported, "XATTR_TOO_BIG", "/x"));
        assert!(sets.add(&path, &[attr("nonsense.a", 1)], &mut none).is_err());
    }
}
