//! Extended attributes: set and removed, first in the inode, then in its block.
//!
//! An attribute stays where it is while it fits; when neither place has room for a new value all attributes are distributed anew, large ones to
//! the block. A block that several inodes share is never changed: its count goes down and the inode gets its own. ACLs and permission bits
//! are kept consistent as posix_acl_chmod() and posix_acl_update_mode() do.

use super::{Editor, no_space};
use crate::{
    error::{Error, Kind, Result, Stage},
    ext4::{
        csum,
        layout::{
            compat, corrupt, get_u16, get_u32, put_u16, put_u32,
            xattr::{
                IBODY_HEADER_SIZE, INDEX_ACL_ACCESS, INDEX_ACL_DEFAULT, MAGIC, XattrBlockHeader, XattrEntry, acl_to_disk, block_hash, entry_hash,
                split_name,
            },
        },
        read::{Node, RawXattr, Sums},
    },
};

/// ACL entry tags of `linux/posix_acl.h` that go with permission bits.
const ACL_USER_OBJ: u16 = 0x01;
const ACL_USER: u16 = 0x02;
const ACL_GROUP_OBJ: u16 = 0x04;
const ACL_GROUP: u16 = 0x08;
const ACL_MASK: u16 = 0x10;
const ACL_OTHER: u16 = 0x20;

/// Where an inode's attributes are to be.
struct Places {
    body: Vec<RawXattr>,
    block: Vec<RawXattr>,
}

impl Editor {
    /// Sets an attribute by its full name, or removes it. The caller writes the inode.
    pub(super) fn set_xattr(&mut self, node: &mut Node, full_name: &[u8], value: Option<&[u8]>) -> Result<()> {
        let shown = String::from_utf8_lossy(full_name).into_owned();
        let refuse = |what: String| Error::new(Kind::InvalidRequest, Stage::Edit, shown.clone(), what);
        let (index, name) = split_name(full_name).ok_or_else(|| refuse("is not the name of an attribute that ext4 can store".into()))?;
        let value = match value {
            Some(value) if matches!(index, INDEX_ACL_ACCESS | INDEX_ACL_DEFAULT) => Some(acl_to_disk(value).map_err(refuse)?),
            other => other.map(<[u8]>::to_vec),
        };
        let in_block = self.image.block_xattrs(node)?;
        let mut places = Places { body: self.image.ibody_xattrs(node)?, block: in_block.map(|(_, items)| items).unwrap_or_default() };
        let before = (places.body.clone(), places.block.clone());
        let same = |item: &RawXattr| item.index == index && item.name == name;
        places.body.retain(|item| !same(item));
        places.block.retain(|item| !same(item));
        if let Some(value) = value {
            let item = RawXattr { index, name: name.to_vec(), value };
            self.place(node, &mut places, item).ok_or_else(|| {
                no_space(shown, format!("does not fit: an inode's attributes share its body and one block of {} bytes", self.image.geo.block_size))
                    .with_reason("EXT4_XATTR_NO_ROOM")
            })?;
            self.image.sb.feature_compat |= compat::EXT_ATTR;
        }
        if before.0 != places.body {
            self.write_body(node, places.body);
        }
        if before.1 != places.block {
            self.write_block(node, places.block)?;
        }
        Ok(())
    }

    /// Finds room for one more attribute; nothing when there is none.
    fn place(&self, node: &Node, places: &mut Places, item: RawXattr) -> Option<()> {
        let (body, block) = (self.body_room(node), self.image.block_size() - XattrBlockHeader::SIZE);
        if item.value.len() > block {
            return None;
        }
        for (list, room) in [(&mut places.body, body), (&mut places.block, block)] {
            list.push(item.clone());
            if size_of(list) <= room {
                return Some(());
            }
            list.pop();
        }
        let mut all: Vec<RawXattr> = places.body.drain(..).chain(places.block.drain(..)).chain([item]).collect();
        sort(&mut all);
        all.sort_by_key(|item| item.value.len());
        for item in all {
            let list = if size_of(&places.body) + entry_size(&item) <= body { &mut places.body } else { &mut places.block };
            list.push(item);
        }
        (size_of(&places.block) <= block).then_some(())
    }

    /// Bytes for entries, values and the end mark in the inode.
    fn body_room(&self, node: &Node) -> usize {
        self.image.ibody_start(node).map_or(0, |start| node.raw.len() - start - IBODY_HEADER_SIZE)
    }

    fn write_body(&self, node: &mut Node, mut items: Vec<RawXattr>) {
        let Some(start) = self.image.ibody_start(node) else { return };
        sort(&mut items);
        node.raw[start..].fill(0);
        if !items.is_empty() {
            put_u32(&mut node.raw, start, MAGIC);
            write_area(&mut node.raw[start + IBODY_HEADER_SIZE..], 0, &items, false);
        }
    }

    /// Puts attributes into the inode's own block: made, changed or (without attributes) freed.
    fn write_block(&mut self, node: &mut Node, mut items: Vec<RawXattr>) -> Result<()> {
        let shared = self.image.block_xattrs(node)?.is_some_and(|(count, _)| count > 1);
        if node.inode.file_acl != 0 && (shared || items.is_empty()) {
            self.drop_xattr_block(node)?;
            node.inode.file_acl = 0;
            self.count_blocks(node, 0, 1);
        }
        if items.is_empty() {
            return Ok(());
        }
        if node.inode.file_acl == 0 {
            node.inode.file_acl = self.alloc_block(self.image.geo.group_start(self.image.geo.inode_group(node.ino).0))?;
            self.count_blocks(node, 1, 0);
        }
        // The kernel searches blocks by this order.
        sort(&mut items);
        let mut block = vec![0; self.image.block_size()];
        let hashes = write_area(&mut block, XattrBlockHeader::SIZE, &items, true);
        let mut header = XattrBlockHeader::zeroed();
        (header.magic, header.refcount, header.blocks, header.hash) = (MAGIC, 1, 1, block_hash(hashes));
        header.write(&mut block);
        let number = node.inode.file_acl;
        if self.image.sums == Sums::Metadata {
            csum::set_xattr_block(self.image.seed, number, &mut block);
        }
        self.put_block(number, block);
        Ok(())
    }

    /// Takes an inode's reference from its xattr block; the last one frees it. The inode itself is left as it is.
    pub(super) fn drop_xattr_block(&mut self, node: &Node) -> Result<()> {
        let Some((count, _)) = self.image.block_xattrs(node)? else { return Ok(()) };
        let number = node.inode.file_acl;
        if count == 1 {
            return self.free_blocks(number, 1);
        }
        let (seed, sums) = (self.image.seed, self.image.sums);
        let block = self.block_mut(number)?;
        put_u32(block, 4, count - 1);
        if sums == Sums::Metadata {
            csum::set_xattr_block(seed, number, block);
        }
        Ok(())
    }

    /// After permission bits changed: the access ACL's entries for owner, mask (or group) and others follow, if there is one.
    pub(super) fn acl_follows_mode(&mut self, node: &mut Node) -> Result<()> {
        let Some(mut acl) = self.access_acl(node)? else { return Ok(()) };
        let mode = node.inode.mode;
        let tags = acl_tags(node.ino, &acl)?;
        let has_mask = tags.iter().any(|(_, tag)| *tag == ACL_MASK);
        for (at, tag) in tags {
            let bits = match tag {
                ACL_USER_OBJ => mode >> 6,
                ACL_MASK => mode >> 3,
                ACL_GROUP_OBJ if !has_mask => mode >> 3,
                ACL_OTHER => mode,
                _ => continue,
            };
            put_u16(&mut acl, at + 2, bits & 7);
        }
        let (mut body, mut block) = (self.image.ibody_xattrs(node)?, self.image.block_xattrs(node)?.map(|(_, items)| items).unwrap_or_default());
        if let Some(item) = body.iter_mut().find(|item| item.index == INDEX_ACL_ACCESS) {
            item.value = acl;
            self.write_body(node, body);
        } else if let Some(item) = block.iter_mut().find(|item| item.index == INDEX_ACL_ACCESS) {
            item.value = acl;
            self.write_block(node, block)?;
        }
        Ok(())
    }

    /// After an access ACL was set: the permission bits follow.
    pub(super) fn mode_follows_acl(&mut self, node: &mut Node) -> Result<()> {
        let Some(acl) = self.access_acl(node)? else { return Ok(()) };
        let tags = acl_tags(node.ino, &acl)?;
        let perms = |wanted: u16| tags.iter().find(|(_, tag)| *tag == wanted).map(|(at, _)| get_u16(&acl, at + 2) & 7);
        let class = |shift: u32, bits: Option<u16>, mode: u16| bits.map_or(mode, |bits| mode & !(7 << shift) | bits << shift);
        node.inode.mode = class(6, perms(ACL_USER_OBJ), node.inode.mode);
        node.inode.mode = class(3, perms(ACL_MASK).or(perms(ACL_GROUP_OBJ)), node.inode.mode);
        node.inode.mode = class(0, perms(ACL_OTHER), node.inode.mode);
        Ok(())
    }

    /// The access ACL as stored.
    fn access_acl(&self, node: &Node) -> Result<Option<Vec<u8>>> {
        let mut items = self.image.ibody_xattrs(node)?;
        items.extend(self.image.block_xattrs(node)?.map(|(_, items)| items).unwrap_or_default());
        Ok(items.into_iter().find(|item| item.index == INDEX_ACL_ACCESS).map(|item| item.value))
    }
}

/// Offsets and tags of the entries of a stored ACL.
fn acl_tags(ino: u32, acl: &[u8]) -> Result<Vec<(usize, u16)>> {
    let (mut tags, mut at) = (Vec::new(), 4);
    while at < acl.len() {
        let tag = if at + 4 <= acl.len() { get_u16(acl, at) } else { 0 };
        let len = match tag {
            ACL_USER | ACL_GROUP => 8,
            ACL_USER_OBJ | ACL_GROUP_OBJ | ACL_MASK | ACL_OTHER => 4,
            _ => return Err(corrupt(format!("inode {ino}"), format!("has an ACL entry with tag {tag:#x}"))),
        };
        tags.push((at, tag));
        at += len;
    }
    if acl.len() < 4 || get_u32(acl, 0) != 1 || at != acl.len() {
        return Err(corrupt(format!("inode {ino}"), format!("has an ACL of {} bytes", acl.len())));
    }
    Ok(tags)
}

/// The order of blocks: namespace, length of the name, name.
fn sort(items: &mut [RawXattr]) {
    items.sort_by(|a, b| (a.index, a.name.len(), &a.name).cmp(&(b.index, b.name.len(), &b.name)));
}

fn entry_size(item: &RawXattr) -> usize {
    XattrEntry::len(item.name.len()) + item.value.len().next_multiple_of(4)
}

/// Bytes that attributes need, the end mark of four zero bytes included.
fn size_of(items: &[RawXattr]) -> usize {
    items.iter().map(entry_size).sum::<usize>() + 4
}

/// Writes entries from byte `first` on and values from the end down; the hashes of the entries. The area is zero and large enough.
fn write_area(area: &mut [u8], first: usize, items: &[RawXattr], hashed: bool) -> Vec<u32> {
    let (mut at, mut end, mut hashes) = (first, area.len(), Vec::new());
    for item in items {
        end -= item.value.len().next_multiple_of(4);
        area[end..end + item.value.len()].copy_from_slice(&item.value);
        let hash = if hashed { entry_hash(&item.name, &item.value) } else { 0 };
        let value_offs = if item.value.is_empty() { 0 } else { end as u16 };
        XattrEntry { index: item.index, name: &item.name, value_offs, value_inum: 0, value_size: item.value.len() as u32, hash }.write(area, at);
        at += XattrEntry::len(item.name.len());
        hashes.push(hash);
    }
    hashes
}
