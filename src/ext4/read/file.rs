//! Contents of files and links, and the walk over a whole tree.

use std::collections::HashSet;

use super::{DirItem, Image, Node, unsupported};
use crate::{
    error::{Error, Kind, Result, Stage},
    ext4::layout::{
        corrupt, ino,
        inode::{BLOCK_LEN, Inode, flags},
    },
    tree::Xattr,
};

/// Longest symlink target, bytes.
pub(crate) const LINK_TARGET_MAX: u64 = 4095;
/// Deepest tree that is walked; paths have at most 4096 bytes.
const DEPTH_MAX: usize = 2048;

/// Gets the path, number and inode of something in the tree; an error ends the walk.
pub type Visitor<'a> = dyn FnMut(&[u8], u32, &Inode) -> Result<()> + 'a;

impl Image {
    /// An inode in use.
    pub fn stat(&self, ino: u32) -> Result<Inode> {
        Ok(self.node(ino)?.inode)
    }

    /// The names in a directory except `.` and `..`.
    pub fn read_dir(&self, ino: u32) -> Result<Vec<DirItem>> {
        self.dir_items(&self.node(ino)?)
    }

    /// The content of a regular file of at most `size_max` bytes; a larger one is `Kind::NoSpace`. Holes read as zeros.
    pub fn read_file(&self, ino: u32, size_max: u64) -> Result<Vec<u8>> {
        let node = self.node(ino)?;
        if !node.inode.is_file() {
            return Err(Error::new(Kind::Conflict, Stage::Edit, format!("inode {ino}"), "is not a regular file"));
        }
        if node.inode.size > size_max {
            return Err(Error::new(
                Kind::NoSpace,
                Stage::Edit,
                format!("inode {ino}"),
                format!("has {} bytes, more than the {size_max} that are read", node.inode.size),
            ));
        }
        self.content(&node)
    }

    /// The target of a symlink.
    pub fn read_link(&self, ino: u32) -> Result<Vec<u8>> {
        let node = self.node(ino)?;
        if !node.inode.is_symlink() {
            return Err(Error::new(Kind::Conflict, Stage::Edit, format!("inode {ino}"), "is not a symlink"));
        }
        self.link_target(&node)
    }

    /// All extended attributes, sorted by name, values as getxattr(2) gives them.
    pub fn xattrs(&self, ino: u32) -> Result<Vec<Xattr>> {
        self.node_xattrs(&self.node(ino)?)
    }

    /// Calls `each` with path, inode number and inode of everything in the tree, the root (`/`) first and a directory before its entries.
    pub fn walk(&self, each: &mut Visitor<'_>) -> Result<()> {
        let mut seen = HashSet::new();
        let mut todo = vec![(Vec::new(), ino::ROOT, 0)];
        while let Some((path, ino, depth)) = todo.pop() {
            let node = self.node(ino)?;
            each(if path.is_empty() { b"/" } else { &path }, ino, &node.inode)?;
            if !node.inode.is_dir() {
                continue;
            }
            // A directory has one name; another one closes a loop.
            if !seen.insert(ino) || depth >= DEPTH_MAX {
                return Err(corrupt(format!("directory inode {ino}"), "is part of a loop"));
            }
            for item in self.dir_items(&node)?.into_iter().rev() {
                let mut below = path.clone();
                below.push(b'/');
                below.extend_from_slice(&item.name);
                todo.push((below, item.ino, depth + 1));
            }
        }
        Ok(())
    }

    /// The content of a file or slow symlink whose size the caller has bounded.
    fn content(&self, node: &Node) -> Result<Vec<u8>> {
        let size = usize::try_from(node.inode.size).map_err(|_| unsupported(format!("inode {}", node.ino), "a size above the address space"))?;
        let block_size = self.block_size();
        let mut content = vec![0; size];
        for run in self.mapping(node)?.runs.iter().filter(|run| !run.unwritten) {
            for i in 0..run.len {
                let at = (run.block as usize + i as usize).saturating_mul(block_size);
                if at >= size {
                    break;
                }
                let len = block_size.min(size - at);
                let block = self.block(run.start + u64::from(i))?;
                content[at..at + len].copy_from_slice(&block[..len]);
            }
        }
        Ok(content)
    }

    /// Whether a symlink's target is in the inode (ext4_inode_is_fast_symlink): it has no blocks but that of its xattrs.
    pub(crate) fn is_fast_link(&self, node: &Node) -> bool {
        let xattr_blocks = if node.inode.file_acl != 0 { u64::from(self.geo.block_size / 512) } else { 0 };
        let blocks = if node.inode.flags & flags::HUGE_FILE != 0 {
            node.inode.blocks.saturating_mul(u64::from(self.geo.block_size / 512))
        } else {
            node.inode.blocks
        };
        node.inode.flags & flags::EXTENTS == 0 && blocks <= xattr_blocks
    }

    pub(crate) fn link_target(&self, node: &Node) -> Result<Vec<u8>> {
        let object = || format!("symlink inode {}", node.ino);
        if node.inode.size == 0 || node.inode.size > LINK_TARGET_MAX {
            return Err(corrupt(object(), format!("has {} bytes", node.inode.size)));
        }
        let target = if self.is_fast_link(node) {
            let size = node.inode.size as usize;
            if size >= BLOCK_LEN {
                return Err(corrupt(object(), format!("has {size} bytes but no block")));
            }
            node.inode.block[..size].to_vec()
        } else {
            self.content(node)?
        };
        if target.contains(&0) {
            return Err(corrupt(object(), "has a NUL in its target"));
        }
        Ok(target)
    }
}
