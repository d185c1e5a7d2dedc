//! Reading an existing filesystem: lookups, contents, attributes. Never writes, never trusts.
//!
//! ```text
//! Image            superblock, geometry, a bounded cache of golden blocks, and the editor's changed blocks on top of them
//!  ├─ open.rs      what is accepted and what is refused by name
//!  ├─ map.rs       file block -> disk block: extent trees and the older indirect blocks
//!  ├─ dir.rs       directory blocks, linear and hashed lookup
//!  ├─ path.rs      paths, with symlinks that stay inside the tree
//!  ├─ file.rs      contents, link targets, whole-tree walks
//!  ├─ xattr.rs     extended attributes
//!  └─ copy.rs      a part of the tree, for a sink
//! ```
//!
//! Every number of the image is checked before it is used as an index or a length, every loop is bounded by the size of the filesystem or by
//! a named limit, and with `metadata_csum` every structure's checksum is verified when it is read: a damaged image gives `Kind::Corrupt`,
//! never a panic, an endless loop or unbounded memory. Where the kernel would go on with a warning, this stops.

mod copy;
mod dir;
mod file;
mod map;
mod open;
mod path;
mod xattr;

use std::{cell::RefCell, collections::BTreeMap, collections::HashMap, sync::Arc};

pub use dir::DirItem;
pub(crate) use dir::{DxFrame, Found, leaf_end};
pub use file::Visitor;
pub use map::Mapping;
pub(crate) use path::{Origin, Walked};
pub(crate) use xattr::RawXattr;

use super::{
    csum,
    hash::{DirHasher, HashVersion, Signedness},
    layout::{
        corrupt,
        geometry::Geometry,
        get_u16,
        group::{self, GroupDesc},
        incompat,
        inode::{self, Inode},
        superblock::{FLAG_UNSIGNED_HASH, Superblock},
    },
};
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::{Region, View},
};

/// Golden blocks kept in memory; when there are more, all are dropped. An edit of some files needs a few dozen.
const CACHE_BLOCKS_MAX: usize = 2048;

/// Which checksums a filesystem has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sums {
    /// None at all.
    None,
    /// CRC-16 in group descriptors (`uninit_bg`).
    Groups,
    /// CRC-32C in everything.
    Metadata,
}

/// An open filesystem, for reading.
pub struct Image {
    view: View,
    pub(crate) sb: Superblock,
    pub(crate) geo: Geometry,
    pub(crate) sums: Sums,
    pub(crate) seed: u32,
    cache: RefCell<HashMap<u64, Arc<[u8]>>>,
    /// Blocks that the editor has changed; they hide the golden's.
    pub(crate) overlay: BTreeMap<u64, Arc<[u8]>>,
}

/// An inode with its number and all its bytes (the xattrs in its body are only there).
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) ino: u32,
    pub(crate) inode: Inode,
    pub(crate) raw: Vec<u8>,
}

impl Image {
    /// Opens the filesystem of `region` for reading. `Kind::Unsupported` names a feature that is not handled (also a journal that needs
    /// replay), `Kind::Corrupt` says what is wrong with the superblock.
    pub fn open(region: &Region) -> Result<Image> {
        Self::open_view(View::from(region))
    }

    /// The same for a filesystem on any disk that can be read.
    pub fn open_view(view: View) -> Result<Image> {
        open::open(view)
    }

    /// Fails when the filesystem may be read but not edited: errors recorded in it, not cleanly unmounted, orphans, or a feature that would
    /// need more than this editor knows to write.
    pub fn check_editable(&self) -> Result<()> {
        open::check_editable(&self.sb)
    }

    /// The superblock.
    pub fn superblock(&self) -> &Superblock {
        &self.sb
    }

    /// Where things are.
    pub fn geometry(&self) -> &Geometry {
        &self.geo
    }

    /// Bytes per block.
    pub(crate) fn block_size(&self) -> usize {
        self.geo.block_size as usize
    }

    /// How long the golden's region is, bytes.
    pub(crate) fn region_len(&self) -> u64 {
        self.view.len
    }

    /// One filesystem block: the changed one if the editor has one, else the golden's.
    pub(crate) fn block(&self, number: u64) -> Result<Arc<[u8]>> {
        if let Some(block) = self.overlay.get(&number) {
            return Ok(block.clone());
        }
        self.golden_block(number)
    }

    /// One block of the golden. Beyond its region everything is zero.
    fn golden_block(&self, number: u64) -> Result<Arc<[u8]>> {
        if let Some(block) = self.cache.borrow().get(&number) {
            return Ok(block.clone());
        }
        if number >= self.geo.blocks_count {
            return Err(corrupt(format!("block {number}"), format!("is outside the filesystem of {} blocks", self.geo.blocks_count)));
        }
        let mut block = vec![0; self.block_size()];
        self.read_golden(number * u64::from(self.geo.block_size), &mut block)?;
        let block: Arc<[u8]> = block.into();
        let mut cache = self.cache.borrow_mut();
        if cache.len() >= CACHE_BLOCKS_MAX {
            cache.clear();
        }
        cache.insert(number, block.clone());
        Ok(block)
    }

    /// Bytes of the golden at `offset` of the region; what lies beyond the region stays as it is in `into` (zeros).
    pub(crate) fn read_golden(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let inside = self.view.len.saturating_sub(offset).min(into.len() as u64) as usize;
        self.view
            .disk
            .read_all_at(&mut into[..inside], self.view.offset + offset)
            .map_err(|error| Error::io(Stage::Edit, "golden image", format!("reading {inside} bytes at byte {offset} of the filesystem"), error))
    }

    /// The descriptor of a group, with its checksum and its block numbers checked.
    pub(crate) fn group_desc(&self, group: u32) -> Result<GroupDesc> {
        let object = || format!("group {group}");
        if group >= self.geo.groups {
            return Err(corrupt(object(), format!("is outside the filesystem of {} groups", self.geo.groups)));
        }
        let (block, at) = self.geo.desc_location(group);
        let block = self.block(block)?;
        let raw = &block[at..at + usize::from(self.geo.desc_size)];
        let desc = GroupDesc::parse(raw)?;
        if let Some(sum) = self.group_desc_sum(group, raw)
            && sum != desc.checksum
        {
            return Err(corrupt(object(), format!("descriptor has checksum {:#06x}, computed {sum:#06x}", desc.checksum)));
        }
        let first = u64::from(self.geo.first_data_block);
        let table_end = desc.inode_table.checked_add(self.geo.itable_blocks().into());
        let inside = |block: u64| block > first && block < self.geo.blocks_count;
        if !inside(desc.block_bitmap)
            || !inside(desc.inode_bitmap)
            || !inside(desc.inode_table)
            || table_end.is_none_or(|end| end > self.geo.blocks_count)
        {
            return Err(corrupt(object(), "bitmaps or inode table are outside the filesystem"));
        }
        if desc.free_blocks > self.geo.blocks_per_group
            || desc.free_inodes > self.geo.inodes_per_group
            || desc.itable_unused > self.geo.inodes_per_group
        {
            return Err(corrupt(object(), "has more free blocks or inodes than there are"));
        }
        Ok(desc)
    }

    /// What `bg_checksum` of these descriptor bytes should be, if descriptors have checksums.
    pub(crate) fn group_desc_sum(&self, group: u32, raw: &[u8]) -> Option<u16> {
        match self.sums {
            Sums::None => None,
            Sums::Groups => Some(csum::group_desc_crc16(&self.sb.uuid, group, raw)),
            Sums::Metadata => Some(csum::group_desc(self.seed, group, raw)),
        }
    }

    /// Where an inode lies: block and byte.
    pub(crate) fn inode_place(&self, ino: u32) -> Result<(u64, usize)> {
        if ino == 0 || ino > self.geo.inodes_count() {
            return Err(corrupt(format!("inode {ino}"), format!("is outside 1..={}", self.geo.inodes_count())));
        }
        let (group, index) = self.geo.inode_group(ino);
        let desc = self.group_desc(group)?;
        Ok(self.geo.inode_location(desc.inode_table, index))
    }

    /// An inode that is in use.
    pub(crate) fn node(&self, ino: u32) -> Result<Node> {
        let (block, at) = self.inode_place(ino)?;
        let block = self.block(block)?;
        let raw = block[at..at + usize::from(self.geo.inode_size)].to_vec();
        let inode = Inode::parse(&raw).map_err(|error| corrupt(format!("inode {ino}"), error.message().to_owned()))?;
        self.verify(
            || format!("inode {ino}"),
            || {
                let sum = csum::inode(self.seed, ino, inode.generation, &raw);
                let stored = u32::from(get_u16(&raw, csum::INODE_CSUM_LO_AT));
                if csum::inode_has_hi(&raw) { (stored | u32::from(get_u16(&raw, csum::INODE_CSUM_HI_AT)) << 16, sum) } else { (stored, sum & 0xffff) }
            },
        )?;
        if inode.links == 0 || inode.mode & inode::mode::TYPE == 0 {
            return Err(corrupt(format!("inode {ino}"), "is referred to but not in use"));
        }
        if inode.flags & (inode::flags::INLINE_DATA | inode::flags::ENCRYPT | inode::flags::EA_INODE | inode::flags::CASEFOLD) != 0 {
            return Err(unsupported(format!("inode {ino}"), format!("inode flags {:#x}", inode.flags)));
        }
        Ok(Node { ino, inode, raw })
    }

    /// With `metadata_csum`, compares a stored with a computed checksum.
    pub(crate) fn verify(&self, object: impl FnOnce() -> String, stored_and_computed: impl FnOnce() -> (u32, u32)) -> Result<()> {
        if self.sums == Sums::Metadata {
            let (stored, computed) = stored_and_computed();
            if stored != computed {
                return Err(corrupt(object(), format!("has checksum {stored:#010x}, computed {computed:#010x}")));
            }
        }
        Ok(())
    }

    /// The seed for what belongs to an inode.
    pub(crate) fn inode_seed(&self, node: &Node) -> u32 {
        csum::inode_seed(self.seed, node.ino, node.inode.generation)
    }

    /// How this filesystem hashes names, with the algorithm of one directory.
    pub(crate) fn hasher(&self, version: u8) -> Option<DirHasher> {
        let signedness = if self.sb.flags & FLAG_UNSIGNED_HASH != 0 { Signedness::Unsigned } else { Signedness::Signed };
        Some(DirHasher { version: HashVersion::from_disk(version)?, signedness, seed: self.sb.hash_seed })
    }

    /// Whether block-mapped bookkeeping for uninitialised groups is in use.
    pub(crate) fn has_uninit(&self) -> bool {
        self.sums != Sums::None
    }

    /// Levels of inner nodes that an index may have below its root.
    pub(crate) fn dx_levels_max(&self) -> u8 {
        if self.sb.has_incompat(incompat::LARGEDIR) { 2 } else { 1 }
    }

    /// Bits of a bitmap block that count for its checksum, as bytes: blocks (or inodes) per group / 8.
    pub(crate) fn bitmap_len(&self, bits: u32) -> usize {
        (bits as usize / 8).min(self.block_size())
    }

    /// Whether descriptors have room for the high half of bitmap checksums.
    pub(crate) fn wide_descs(&self) -> bool {
        self.geo.desc_size >= group::SIZE_64
    }
}

/// `Kind::Unsupported`, naming the feature.
pub(crate) fn unsupported(object: impl Into<String>, feature: impl Into<String>) -> Error {
    Error::new(Kind::Unsupported, Stage::Edit, object, format!("{} is not supported", feature.into())).with_reason("EXT4_FEATURE_UNSUPPORTED")
}
