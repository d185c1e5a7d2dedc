//! Inodes: made, written back with their checksum, counted down and freed.

use super::Editor;
use crate::{
    error::Result,
    ext4::{
        csum,
        layout::{
            corrupt,
            inode::{EXTRA_ISIZE, Inode, OLD_SIZE, flags, mode},
        },
        read::{Node, Sums},
    },
};

impl Editor {
    /// A new inode near `parent`, in memory only: type and permissions, owner, times. No links, no content yet.
    pub(super) fn new_inode(&mut self, parent: u32, file_mode: u16, owner: (u32, u32)) -> Result<Node> {
        let ino = self.alloc_inode(parent, file_mode & mode::TYPE == mode::DIR)?;
        let size = usize::from(self.image.geo.inode_size);
        let mut inode = Inode::zeroed();
        inode.mode = file_mode;
        (inode.uid, inode.gid) = owner;
        (inode.atime, inode.ctime, inode.mtime, inode.crtime) = (self.now, self.now, self.now, self.now);
        inode.extra_isize = match size - OLD_SIZE {
            0 => 0,
            room => {
                let want = self.image.sb.want_extra_isize.max(self.image.sb.min_extra_isize);
                if want >= 4 && want.is_multiple_of(4) && usize::from(want) <= room { want } else { EXTRA_ISIZE }
            }
        };
        // The kernel draws generations at random; they must differ when a number is used again, and they must not differ between retries.
        self.inodes_made += 1;
        let entropy = [self.now.secs.to_le_bytes(), (u64::from(self.now.nanos) << 32 | u64::from(self.inodes_made)).to_le_bytes()].concat();
        inode.generation = csum::update(csum::update(self.image.seed, &ino.to_le_bytes()), &entropy);
        Ok(Node { ino, inode, raw: vec![0; size] })
    }

    /// Writes an inode with its checksum into its block of the table.
    pub(super) fn write_node(&mut self, node: &mut Node) -> Result<()> {
        node.inode.write(&mut node.raw);
        if self.image.sums == Sums::Metadata {
            csum::set_inode(self.image.seed, node.ino, &mut node.raw);
        }
        let (block, at) = self.image.inode_place(node.ino)?;
        self.block_mut(block)?[at..at + node.raw.len()].copy_from_slice(&node.raw);
        Ok(())
    }

    /// Counts blocks in (or out) of `i_blocks`.
    pub(super) fn count_blocks(&self, node: &mut Node, added: u64, removed: u64) {
        let unit = if node.inode.flags & flags::HUGE_FILE != 0 { 1 } else { u64::from(self.image.geo.block_size / 512) };
        node.inode.blocks = node.inode.blocks.saturating_add(added * unit).saturating_sub(removed * unit);
    }

    /// Takes one name away from something that is not a directory; the last one frees it.
    pub(super) fn unlink_node(&mut self, ino: u32) -> Result<()> {
        let mut node = self.image.node(ino)?;
        if node.inode.links > 1 {
            node.inode.links -= 1;
            node.inode.ctime = self.now;
            return self.write_node(&mut node);
        }
        self.free_node(&node)
    }

    /// Frees an inode with all its blocks. Its bytes become zero: deleted inodes are told by the bitmap, and nothing of the old owner stays.
    pub(super) fn free_node(&mut self, node: &Node) -> Result<()> {
        let has_blocks = match node.inode.mode & mode::TYPE {
            mode::FILE | mode::DIR => true,
            mode::SYMLINK => !self.image.is_fast_link(node),
            mode::CHAR | mode::BLOCK | mode::FIFO | mode::SOCKET => false,
            other => return Err(corrupt(format!("inode {}", node.ino), format!("has type {other:#x}"))),
        };
        if has_blocks {
            self.free_content(node)?;
        }
        self.drop_xattr_block(node)?;
        let (block, at) = self.image.inode_place(node.ino)?;
        let size = node.raw.len();
        self.block_mut(block)?[at..at + size].fill(0);
        self.free_inode_number(node.ino, node.inode.is_dir())
    }
}
