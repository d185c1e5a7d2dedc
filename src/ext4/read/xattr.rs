//! Extended attributes as stored: in the body of the inode, and in one block.

use super::{Image, Node};
use crate::{
    error::Result,
    ext4::{
        csum,
        layout::{
            corrupt, get_u32,
            inode::OLD_SIZE,
            xattr::{IBODY_HEADER_SIZE, INDEX_ACL_ACCESS, INDEX_ACL_DEFAULT, MAGIC, XattrBlockHeader, XattrEntry, acl_from_disk, join_name},
        },
    },
    tree::Xattr,
};

/// An attribute in the form on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawXattr {
    pub(crate) index: u8,
    pub(crate) name: Vec<u8>,
    pub(crate) value: Vec<u8>,
}

impl Image {
    /// Where the area for xattrs starts in an inode's bytes: behind the extra fields. Nothing when the inode has no room for any.
    pub(crate) fn ibody_start(&self, node: &Node) -> Option<usize> {
        let start = OLD_SIZE + usize::from(node.inode.extra_isize);
        // Without extra fields there is no area: the kernel looks for one only when i_extra_isize is set.
        (node.inode.extra_isize != 0 && start + IBODY_HEADER_SIZE + 4 <= node.raw.len()).then_some(start)
    }

    /// The attributes in the inode.
    pub(crate) fn ibody_xattrs(&self, node: &Node) -> Result<Vec<RawXattr>> {
        match self.ibody_start(node) {
            Some(start) if get_u32(&node.raw, start) == MAGIC => {
                let area = &node.raw[start + IBODY_HEADER_SIZE..];
                parse(area, 0).map_err(|what| corrupt(format!("inode {}: xattrs", node.ino), what))
            }
            _ => Ok(Vec::new()),
        }
    }

    /// The attributes in the xattr block of the inode, with the block's reference count; nothing without one.
    pub(crate) fn block_xattrs(&self, node: &Node) -> Result<Option<(u32, Vec<RawXattr>)>> {
        let number = node.inode.file_acl;
        if number == 0 {
            return Ok(None);
        }
        let object = || format!("inode {}: xattr block {number}", node.ino);
        if number <= u64::from(self.geo.first_data_block) {
            return Err(corrupt(object(), "is not a block for data"));
        }
        let block = self.block(number)?;
        let header = XattrBlockHeader::parse(&block).map_err(|error| corrupt(object(), error.message().to_owned()))?;
        self.verify(object, || (header.checksum, csum::xattr_block(self.seed, number, &block)))?;
        if header.refcount == 0 {
            return Err(corrupt(object(), "has no references"));
        }
        let items = parse(&block, XattrBlockHeader::SIZE).map_err(|what| corrupt(object(), what))?;
        Ok(Some((header.refcount, items)))
    }

    /// All attributes as getxattr(2) shows them, sorted by name. Unknown namespaces are left out, as by the kernel.
    pub(crate) fn node_xattrs(&self, node: &Node) -> Result<Vec<Xattr>> {
        let mut raw = self.ibody_xattrs(node)?;
        if let Some((_, items)) = self.block_xattrs(node)? {
            raw.extend(items);
        }
        let mut xattrs = Vec::new();
        for item in raw {
            let Some(name) = join_name(item.index, &item.name) else { continue };
            let value = if matches!(item.index, INDEX_ACL_ACCESS | INDEX_ACL_DEFAULT) {
                acl_from_disk(&item.value).map_err(|what| corrupt(format!("inode {}: {}", node.ino, String::from_utf8_lossy(&name)), what))?
            } else {
                item.value
            };
            xattrs.push(Xattr { name, value });
        }
        xattrs.sort();
        xattrs.dedup_by(|a, b| a.name == b.name);
        Ok(xattrs)
    }
}

/// Entries of an area; the list starts at byte `first`, value offsets count from byte 0.
fn parse(area: &[u8], first: usize) -> std::result::Result<Vec<RawXattr>, String> {
    let (mut items, mut at) = (Vec::new(), first);
    while let Some(entry) = XattrEntry::parse(area, at).map_err(|error| error.message().to_owned())? {
        if entry.value_inum != 0 {
            return Err("has a value in another inode (ea_inode)".into());
        }
        let (start, size) = (usize::from(entry.value_offs), entry.value_size as usize);
        let value = if size == 0 { Some(&[][..]) } else { start.checked_add(size).and_then(|end| area.get(start..end)) };
        let Some(value) = value else {
            return Err(format!("has a value of {size} bytes at byte {start}, outside its area of {}", area.len()));
        };
        items.push(RawXattr { index: entry.index, name: entry.name.to_vec(), value: value.to_vec() });
        at += XattrEntry::len(entry.name.len());
    }
    Ok(items)
}
