//! Names in directories: put in, taken out, pointed elsewhere. Callers have looked the name up; they write the directory's inode afterwards.

use super::{Editor, no_space};
use crate::{
    error::{Error, Result, Stage},
    ext4::{
        csum,
        layout::{
            compat, corrupt,
            dir::{DirEntry, TAIL_SIZE, file_type_of, rec_len_for},
            incompat,
            inode::flags,
            put_u16, put_u32,
        },
        read::{Found, Node, Sums, leaf_end},
    },
};

/// Largest directory without the large_dir feature, bytes (i_size_high is not used for directories there).
const DIR_SIZE_MAX: u64 = 0x7fff_ffff;

/// An entry as it goes into a leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) name: Vec<u8>,
    pub(super) ino: u32,
    pub(super) file_type: u8,
}

impl Editor {
    /// The `file_type` of directory entries for an inode, 0 when the filesystem does not store it.
    pub(super) fn entry_type(&self, node: &Node) -> u8 {
        if self.image.sb.has_incompat(incompat::FILETYPE) { file_type_of(node.inode.mode) } else { 0 }
    }

    /// Adds a name that is not there yet.
    pub(super) fn add_name(&mut self, dir: &mut Node, name: &Name) -> Result<()> {
        self.touch(dir);
        if self.image.is_indexed(dir) {
            return self.dx_add(dir, name);
        }
        // An index that the filesystem has no feature for would be overwritten below: it is none any more (ext4_add_entry does the same).
        dir.inode.flags &= !flags::INDEX;
        let blocks = self.image.dir_blocks(dir)?;
        for logical in 0..blocks {
            let (number, block) = self.image.dir_block(dir, logical)?;
            if self.insert_into(dir, number, &block, name)? {
                return Ok(());
            }
        }
        if blocks == 1 && self.image.sb.has_compat(compat::DIR_INDEX) && self.make_indexed(dir)? {
            return self.dx_add(dir, name);
        }
        let leaf = self.fresh_leaf(dir, std::slice::from_ref(name))?;
        self.append_dir_block(dir, &leaf)?;
        Ok(())
    }

    /// Points a name at another inode.
    pub(super) fn replace_name(&mut self, dir: &mut Node, found: &Found, ino: u32, file_type: u8) -> Result<()> {
        self.touch(dir);
        let block = self.block_mut(found.block)?;
        put_u32(block, found.at, ino);
        block[found.at + 7] = file_type;
        self.seal_leaf(dir, found.block)
    }

    /// Takes a name out: its room goes to the entry before it, or it becomes a free entry. Its bytes are wiped.
    pub(super) fn remove_name(&mut self, dir: &mut Node, found: &Found) -> Result<()> {
        self.touch(dir);
        let block = self.block_mut(found.block)?;
        let rec_len = DirEntry::parse(block, found.at)?.rec_len;
        match found.before {
            Some(before) => {
                let joined = DirEntry::parse(block, before)?.rec_len + rec_len;
                block[found.at..found.at + rec_len].fill(0);
                put_u16(block, before + 4, joined as u16);
            }
            None => {
                block[found.at..found.at + rec_len].fill(0);
                put_u16(block, found.at + 4, rec_len as u16);
            }
        }
        self.seal_leaf(dir, found.block)
    }

    /// Points `..` of a directory that moved at its new parent.
    pub(super) fn set_dotdot(&mut self, dir: &Node, parent: u32) -> Result<()> {
        let (number, block) = self.image.dir_block(dir, 0)?;
        let at = self.image.leaf_entries(dir, &block, &mut |at, _, entry| (entry.name == b"..").then_some(at))?;
        let at = at.ok_or_else(|| corrupt(format!("directory inode {}", dir.ino), "has no .. entry"))?;
        put_u32(self.block_mut(number)?, at, parent);
        match self.image.dx_kind(dir, 0, &block) {
            Some(count_at) => self.seal_dx(dir, number, count_at),
            None => self.seal_leaf(dir, number),
        }
    }

    /// Gives a directory that has just been made its first block.
    pub(super) fn init_dir(&mut self, dir: &mut Node, parent: u32) -> Result<()> {
        let file_type = self.entry_type(dir);
        let dots = [Name { name: b".".to_vec(), ino: dir.ino, file_type }, Name { name: b"..".to_vec(), ino: parent, file_type }];
        let block = self.fresh_leaf(dir, &dots)?;
        self.append(dir, &block)
    }

    /// A leaf with these entries and, where there are checksums, its tail. They fit: callers have split before.
    pub(super) fn fresh_leaf(&self, dir: &Node, names: &[Name]) -> Result<Vec<u8>> {
        let mut block = vec![0; self.image.block_size()];
        let end = block.len() - if self.image.sums == Sums::Metadata { TAIL_SIZE } else { 0 };
        let mut at = 0;
        for (i, name) in names.iter().enumerate() {
            let need = rec_len_for(name.name.len());
            if at + need > end {
                return Err(Error::internal(Stage::Edit, format!("directory inode {}", dir.ino), "a leaf got more entries than it holds"));
            }
            let rec_len = if i + 1 == names.len() { end - at } else { need };
            DirEntry { inode: name.ino, rec_len, file_type: name.file_type, name: &name.name }.write(&mut block, at);
            at += rec_len;
        }
        if names.is_empty() {
            DirEntry { inode: 0, rec_len: end, file_type: 0, name: b"" }.write(&mut block, 0);
        }
        if self.image.sums == Sums::Metadata {
            csum::set_dir_leaf(self.image.inode_seed(dir), &mut block);
        }
        Ok(block)
    }

    /// Puts a name into a leaf if there is room for it.
    pub(super) fn insert_into(&mut self, dir: &Node, number: u64, block: &[u8], name: &Name) -> Result<bool> {
        let need = rec_len_for(name.name.len());
        let room = self.image.leaf_entries(dir, block, &mut |at, _, entry| {
            let used = if entry.inode == 0 { 0 } else { rec_len_for(entry.name.len()) };
            (entry.rec_len - used >= need).then_some((at, used, entry.rec_len))
        })?;
        let Some((at, used, rec_len)) = room else { return Ok(false) };
        debug_assert!(at + rec_len <= leaf_end(block, self.image.sums));
        let block = self.block_mut(number)?;
        if used > 0 {
            put_u16(block, at + 4, used as u16);
        }
        DirEntry { inode: name.ino, rec_len: rec_len - used, file_type: name.file_type, name: &name.name }.write(block, at + used);
        self.seal_leaf(dir, number)?;
        Ok(true)
    }

    /// Appends a block (with its checksum) to a directory; its file block.
    pub(super) fn append_dir_block(&mut self, dir: &mut Node, block: &[u8]) -> Result<u32> {
        let logical = self.image.dir_blocks(dir)?;
        if dir.inode.size + block.len() as u64 > DIR_SIZE_MAX && !self.image.sb.has_incompat(incompat::LARGEDIR) {
            return Err(no_space(format!("directory inode {}", dir.ino), "can't get larger than 2 GiB"));
        }
        self.append(dir, block)?;
        Ok(logical)
    }

    /// Renews the checksum of a leaf.
    pub(super) fn seal_leaf(&mut self, dir: &Node, number: u64) -> Result<()> {
        if self.image.sums == Sums::Metadata {
            let seed = self.image.inode_seed(dir);
            csum::set_dir_leaf(seed, self.block_mut(number)?);
        }
        Ok(())
    }

    /// Stamps a changed directory.
    pub(super) fn touch(&self, dir: &mut Node) {
        (dir.inode.mtime, dir.inode.ctime) = (self.now, self.now);
    }
}
