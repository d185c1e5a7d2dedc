//! Inode tables: every node becomes its record, in the order of inode numbers.

use super::{
    Formatter, extents,
    tree::{Body, NodeId},
    xattrs::{IBODY_AT, Placed},
};
use crate::{
    error::Result,
    ext4::{
        csum,
        layout::{
            BLOCK_SIZE, ino,
            inode::{BLOCK_LEN, Inode, LINK_MAX, encode_device, flags, mode},
        },
        profile::INODE_SIZE,
    },
};

/// What the group descriptors need to know about inodes.
pub(super) struct InodeCounts {
    /// Per group with used inodes: directories.
    pub dirs: Vec<u32>,
    /// The journal's inode, for its copy in the superblock.
    pub journal: Inode,
}

impl Formatter {
    /// Writes all inodes up to the last that was ever used.
    pub(super) fn write_inodes(&mut self, xattr_blocks: &mut Placed) -> Result<InodeCounts> {
        let per_group = self.shape.geometry.inodes_per_group;
        let last = self.tree.ids().last().unwrap_or(NodeId::ROOT).ino();
        let journal = self.journal(self.seed.map(|seed| csum::inode_seed(seed, ino::JOURNAL, 0)))?;
        let resize = self.resize_inode()?;
        let mut counts = InodeCounts { dirs: vec![0; last.div_ceil(per_group) as usize], journal };
        for number in 1..=last {
            let mut raw = [0; INODE_SIZE as usize];
            let inode = match number {
                ino::JOURNAL => Some(counts.journal.clone()),
                ino::RESIZE => Some(resize.clone()),
                _ => match NodeId::of_ino(number) {
                    Some(id) => self.inode(id, &mut raw, xattr_blocks)?,
                    None => None,
                },
            };
            let (group, index) = self.shape.geometry.inode_group(number);
            if let Some(inode) = inode {
                inode.write(&mut raw);
                if let Some(seed) = self.seed {
                    csum::set_inode(seed, number, &mut raw);
                }
                counts.dirs[group as usize] += u32::from(inode.is_dir());
            }
            let (block, byte) = self.shape.geometry.inode_location(self.shape.places[group as usize].inode_table, index);
            self.store.writer.put_at(block * u64::from(BLOCK_SIZE) + byte as u64, &raw)?;
        }
        Ok(counts)
    }

    /// The inode of a node, with its xattrs put into `raw`; nothing when it is free.
    fn inode(&mut self, id: NodeId, raw: &mut [u8], xattr_blocks: &mut Placed) -> Result<Option<Inode>> {
        let node = self.tree.node(id).clone();
        if node.body == Body::Free {
            return Ok(None);
        }
        let time = node.mtime;
        let mut inode = Inode {
            mode: node.mode,
            uid: node.uid,
            gid: node.gid,
            atime: time,
            ctime: time,
            mtime: time,
            crtime: time,
            // With dir_nlink one link means: more subdirectories than can be counted.
            links: if node.is_dir() && node.links > LINK_MAX { 1 } else { node.links as u16 },
            ..Inode::zeroed()
        };
        let runs = self.tree.runs(node.runs());
        let mut blocks: u64 = runs.iter().map(|run| u64::from(run.len)).sum();
        match node.body {
            Body::Dir { .. } => inode.size = blocks * u64::from(BLOCK_SIZE),
            Body::File { size, .. } => inode.size = size,
            Body::SlowSymlink { size, .. } => inode.size = size.into(),
            Body::FastSymlink(target) => {
                let target = self.tree.bytes(target);
                inode.block[..target.len()].copy_from_slice(target);
                inode.size = target.len() as u64;
            }
            Body::Device { major, minor } => inode.block = encode_device(major, minor),
            Body::Special | Body::Free => {}
        }
        debug_assert!(inode.size < BLOCK_LEN as u64 || node.mode & mode::TYPE != mode::SYMLINK || blocks == 1);
        if matches!(node.body, Body::Dir { .. } | Body::File { .. } | Body::SlowSymlink { .. }) {
            let seed = self.seed.map(|seed| csum::inode_seed(seed, id.ino(), 0));
            let root = extents::build(runs, seed, &mut self.store.blocks, &mut self.store.writer)?;
            (inode.block, inode.flags) = (root.block, flags::EXTENTS | if node.indexed { flags::INDEX } else { 0 });
            blocks += root.tree_blocks;
        }
        if let Some((number, left)) = xattr_blocks.get_mut(&node.xattrs).and_then(|list| list.iter_mut().find(|(_, left)| *left > 0)) {
            *left -= 1;
            inode.file_acl = *number;
            blocks += 1;
        }
        let ibody = self.sets.ibody(node.xattrs);
        raw[IBODY_AT..IBODY_AT + ibody.len()].copy_from_slice(ibody);
        inode.blocks = blocks * u64::from(BLOCK_SIZE / 512);
        Ok(Some(inode))
    }
}
