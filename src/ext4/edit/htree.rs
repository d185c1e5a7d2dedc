//! Indexed directories: insertion with splits of leaves and index nodes, and the change of a full one-block directory into an indexed one.
//!
//! As in the kernel (`fs/ext4/namei.c`: `ext4_dx_add_entry`, `do_split`, `make_indexed_dir`) a leaf splits where half of its bytes are, an
//! index node in the middle, a full root moves one level down; entries of one hash that two leaves share are marked by the lowest bit of the
//! second leaf's hash. At most two levels (three with large_dir).

use super::{Editor, names::Name, no_space};
use crate::{
    error::{Error, Result, Stage},
    ext4::{
        csum,
        hash::DirHasher,
        layout::{
            corrupt,
            dir::{
                DX_ENTRY_SIZE, DX_NODE_COUNT_AT, DX_ROOT_COUNT_AT, DirEntry, DxRootInfo, dx_count_limit, dx_entry, dx_limit, put_dx_count_limit,
                put_dx_entry, rec_len_for,
            },
            inode::flags,
        },
        read::{DxFrame, Node, Sums},
    },
};

/// Splits one insertion may need: one per level and some for leaves whose entries are uneven.
const SPLITS_MAX: usize = 16;
/// Bytes of the `.` entry, and offset of `..`, in the root of an index.
const DOT_SIZE: usize = 12;

impl Editor {
    /// Adds a name to an indexed directory.
    pub(super) fn dx_add(&mut self, dir: &mut Node, name: &Name) -> Result<()> {
        for _ in 0..SPLITS_MAX {
            let (hasher, levels) = self.image.dx_root(dir)?;
            let (frames, leaf) = self.image.dx_probe(dir, levels, hasher.hash(&name.name))?;
            let (number, block) = self.image.dir_block(dir, leaf)?;
            if self.insert_into(dir, number, &block, name)? {
                return Ok(());
            }
            match frames.iter().rposition(|frame| frame.count < frame.limit) {
                Some(level) if level + 1 == frames.len() => self.split_leaf(dir, &hasher, &frames[level], number, &block)?,
                Some(level) => self.split_node(dir, &frames[level], &frames[level + 1])?,
                None if levels >= self.image.dx_levels_max() => {
                    return Err(no_space(format!("directory inode {}", dir.ino), format!("its index of {} levels is full", levels + 1))
                        .with_reason("EXT4_DIR_FULL"));
                }
                None => self.add_level(dir, &frames[0], levels)?,
            }
        }
        Err(Error::internal(Stage::Edit, format!("directory inode {}", dir.ino), format!("found no room after {SPLITS_MAX} splits")))
    }

    /// Makes a linear directory of one block an indexed one of two. `false` when its hash or first entries are not what that needs.
    pub(super) fn make_indexed(&mut self, dir: &mut Node) -> Result<bool> {
        let version = self.image.sb.def_hash_version;
        let (number, block) = self.image.dir_block(dir, 0)?;
        let dots = DirEntry::parse(&block, 0)?.rec_len == DOT_SIZE && DirEntry::parse(&block, DOT_SIZE)?.name == b"..";
        if self.image.hasher(version).is_none() || !dots {
            return Ok(false);
        }
        let names = self.leaf_names(dir, &block)?;
        let (dots, rest): (Vec<Name>, Vec<Name>) = names.into_iter().partition(|name| name.name == b"." || name.name == b"..");
        if dots.len() != 2 {
            return Err(corrupt(format!("directory inode {}", dir.ino), format!("has {} entries . and ..", dots.len())));
        }
        let leaf = self.fresh_leaf(dir, &rest)?;
        let logical = self.append_dir_block(dir, &leaf)?;
        let mut root = vec![0; block.len()];
        for (at, rec_len, name) in [(0, DOT_SIZE, &dots[0]), (DOT_SIZE, block.len() - DOT_SIZE, &dots[1])] {
            DirEntry { inode: name.ino, rec_len, file_type: name.file_type, name: &name.name }.write(&mut root, at);
        }
        DxRootInfo { hash_version: version, indirect_levels: 0 }.write(&mut root);
        put_dx_count_limit(&mut root, DX_ROOT_COUNT_AT, self.dx_limit(DX_ROOT_COUNT_AT), 1);
        put_dx_entry(&mut root, DX_ROOT_COUNT_AT, 0, 0, logical);
        dir.inode.flags |= flags::INDEX;
        self.put_block(number, root);
        self.seal_dx(dir, number, DX_ROOT_COUNT_AT)?;
        Ok(true)
    }

    /// Names of a leaf in order, free entries left out.
    fn leaf_names(&self, dir: &Node, block: &[u8]) -> Result<Vec<Name>> {
        let mut names = Vec::new();
        self.image.leaf_entries(dir, block, &mut |_, _, entry| {
            if entry.inode != 0 {
                names.push(Name { name: entry.name.to_vec(), ino: entry.inode, file_type: entry.file_type });
            }
            None::<()>
        })?;
        Ok(names)
    }

    /// Moves the upper half (by hash) of a leaf's bytes to a new leaf.
    fn split_leaf(&mut self, dir: &mut Node, hasher: &DirHasher, parent: &DxFrame, number: u64, block: &[u8]) -> Result<()> {
        let mut names: Vec<(u32, Name)> = self.leaf_names(dir, block)?.into_iter().map(|name| (hasher.hash(&name.name), name)).collect();
        if names.len() < 2 {
            return Err(corrupt(format!("directory inode {}", dir.ino), "has a full leaf with one entry"));
        }
        names.sort_by_key(|(hash, _)| *hash);
        let half = block.len() / 2;
        let (mut size, mut at) = (0, names.len());
        while at > 1 {
            let next = rec_len_for(names[at - 1].1.name.len());
            if size + next / 2 > half {
                break;
            }
            size += next;
            at -= 1;
        }
        let at = if at > 1 { at } else { names.len() / 2 };
        let (hash, continued) = (names[at].0, names[at].0 == names[at - 1].0);
        let upper: Vec<Name> = names.split_off(at).into_iter().map(|(_, name)| name).collect();
        let lower: Vec<Name> = names.into_iter().map(|(_, name)| name).collect();
        let upper = self.fresh_leaf(dir, &upper)?;
        let logical = self.append_dir_block(dir, &upper)?;
        let lower = self.fresh_leaf(dir, &lower)?;
        self.put_block(number, lower);
        self.insert_index(dir, parent, hash | u32::from(continued), logical)
    }

    /// Moves the upper half of a full index node to a new one; `parent` has room for it.
    fn split_node(&mut self, dir: &mut Node, parent: &DxFrame, full: &DxFrame) -> Result<()> {
        let block = self.image.block(full.block)?;
        let keep = full.count / 2;
        if keep == 0 {
            return Err(corrupt(format!("directory inode {}", dir.ino), "has an index node with room for one entry"));
        }
        let moved: Vec<(u32, u32)> = (keep..full.count).map(|i| dx_entry(&block, full.count_at, i)).collect();
        let hash = moved[0].0;
        let logical = self.append_node(dir, &moved)?;
        put_dx_count_limit(self.block_mut(full.block)?, full.count_at, full.limit as u16, keep as u16);
        self.seal_dx(dir, full.block, full.count_at)?;
        self.insert_index(dir, parent, hash, logical)
    }

    /// Moves all entries of a full root to a new node below it.
    fn add_level(&mut self, dir: &mut Node, root: &DxFrame, levels: u8) -> Result<()> {
        let block = self.image.block(root.block)?;
        let entries: Vec<(u32, u32)> = (0..root.count).map(|i| dx_entry(&block, root.count_at, i)).collect();
        let mut info = DxRootInfo::parse(&block)?;
        let logical = self.append_node(dir, &entries)?;
        info.indirect_levels = levels + 1;
        let bytes = self.block_mut(root.block)?;
        info.write(bytes);
        put_dx_count_limit(bytes, root.count_at, root.limit as u16, 1);
        put_dx_entry(bytes, root.count_at, 0, 0, logical);
        self.seal_dx(dir, root.block, root.count_at)
    }

    /// A new inner node with these entries; its file block.
    fn append_node(&mut self, dir: &mut Node, entries: &[(u32, u32)]) -> Result<u32> {
        let mut block = vec![0; self.image.block_size()];
        DirEntry { inode: 0, rec_len: block.len(), file_type: 0, name: b"" }.write(&mut block, 0);
        put_dx_count_limit(&mut block, DX_NODE_COUNT_AT, self.dx_limit(DX_NODE_COUNT_AT), entries.len() as u16);
        for (i, (hash, child)) in entries.iter().enumerate() {
            put_dx_entry(&mut block, DX_NODE_COUNT_AT, i, *hash, *child);
        }
        if self.image.sums == Sums::Metadata {
            csum::set_dx_block(self.image.inode_seed(dir), &mut block, DX_NODE_COUNT_AT);
        }
        self.append_dir_block(dir, &block)
    }

    /// Puts an entry behind the one that a frame stands on. The frame has room.
    fn insert_index(&mut self, dir: &Node, frame: &DxFrame, hash: u32, child: u32) -> Result<()> {
        let block = self.block_mut(frame.block)?;
        let (limit, count) = dx_count_limit(block, frame.count_at)?;
        let from = frame.count_at + (frame.pos + 1) * DX_ENTRY_SIZE;
        let to = frame.count_at + usize::from(count) * DX_ENTRY_SIZE;
        block.copy_within(from..to, from + DX_ENTRY_SIZE);
        put_dx_entry(block, frame.count_at, frame.pos + 1, hash, child);
        put_dx_count_limit(block, frame.count_at, limit, count + 1);
        self.seal_dx(dir, frame.block, frame.count_at)
    }

    fn dx_limit(&self, count_at: usize) -> u16 {
        dx_limit(self.image.geo.block_size, count_at, self.image.sums == Sums::Metadata)
    }

    /// Renews the checksum of an index block.
    pub(super) fn seal_dx(&mut self, dir: &Node, number: u64, count_at: usize) -> Result<()> {
        if self.image.sums == Sums::Metadata {
            let seed = self.image.inode_seed(dir);
            csum::set_dx_block(seed, self.block_mut(number)?, count_at);
        }
        Ok(())
    }
}
