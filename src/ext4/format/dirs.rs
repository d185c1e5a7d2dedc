//! Directory blocks, built once from all names of a directory.
//!
//! What fits in one block is a linear directory in order of arrival. More becomes a hashed tree: names sorted by hash fill leaves up to
//! four fifths (like e2fsck -D, so that adding a few names later does not split blocks at once), and an index of one or two levels points to
//! the leaves. When a leaf begins with the hash its predecessor ends with, the lowest bit of its index entry says so: lookups then go on.

use super::tree::{NodeId, Tree};
use crate::{
    error::{Error, Kind, Result, Stage},
    ext4::{
        csum,
        hash::DirHasher,
        layout::{
            BLOCK_SIZE,
            dir::{
                DX_INFO_AT, DX_NODE_COUNT_AT, DX_ROOT_COUNT_AT, DirEntry, DxRootInfo, TAIL_SIZE, dx_limit, file_type, file_type_of,
                put_dx_count_limit, put_dx_entry, rec_len_for,
            },
            put_u16,
        },
    },
};

const BLOCK: usize = BLOCK_SIZE as usize;
/// `.` and `..` take 12 bytes each.
const DOTS: usize = 24;

/// A finished directory.
#[derive(Debug)]
pub struct Built {
    /// Its blocks, one after another.
    pub bytes: Vec<u8>,
    /// Whether it is a hashed tree.
    pub indexed: bool,
}

/// How directories of this filesystem are made.
pub struct DirBuilder {
    /// Hash of names.
    pub hasher: DirHasher,
    /// Checksum seed with metadata_csum.
    pub seed: Option<u32>,
}

struct Hashed {
    hash: u32,
    minor: u32,
    name: u32,
}

impl DirBuilder {
    /// Builds directory `id` inside `parent` from the names at the indices `children`; a linear one has at least `blocks_min` blocks.
    pub fn build(&self, tree: &Tree, id: NodeId, parent: NodeId, children: &[u32], blocks_min: usize) -> Result<Built> {
        let seed = self.seed.map(|seed| csum::inode_seed(seed, id.ino(), 0));
        let need: usize = children.iter().map(|index| rec_len_for(tree.name_bytes(tree.name(*index)).len())).sum();
        if DOTS + need <= leaf_end(seed) {
            let mut bytes = vec![0; BLOCK * blocks_min.max(1)];
            for (n, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
                let mut leaf = Leaf::new(block, leaf_end(seed));
                if n == 0 {
                    leaf.push(id.ino(), file_type::DIR, b".");
                    leaf.push(parent.ino(), file_type::DIR, b"..");
                    children.iter().for_each(|index| push_name(&mut leaf, tree, *index));
                }
                leaf.close(seed);
            }
            return Ok(Built { bytes, indexed: false });
        }
        self.build_indexed(tree, (id, parent), children, seed)
    }

    fn build_indexed(&self, tree: &Tree, (id, parent): (NodeId, NodeId), children: &[u32], seed: Option<u32>) -> Result<Built> {
        let mut names: Vec<Hashed> = children
            .iter()
            .map(|index| {
                let (hash, minor) = self.hasher.hash_both(tree.name_bytes(tree.name(*index)));
                Hashed { hash, minor, name: *index }
            })
            .collect();
        names.sort_unstable_by_key(|name| (name.hash, name.minor, name.name));
        let leaves = split(tree, &names, leaf_end(seed) / 5 * 4);

        let root_limit = usize::from(dx_limit(BLOCK_SIZE, DX_ROOT_COUNT_AT, seed.is_some()));
        let node_limit = usize::from(dx_limit(BLOCK_SIZE, DX_NODE_COUNT_AT, seed.is_some()));
        let nodes = if leaves.len() <= root_limit { 0 } else { leaves.len().div_ceil(node_limit) };
        if nodes > root_limit {
            let message = format!("the directory has {} names, more than two levels of a hashed tree hold", names.len());
            return Err(Error::new(Kind::Unsupported, Stage::Golden, format!("inode {}", id.ino()), message));
        }
        let first_leaf = 1 + nodes;
        let mut bytes = vec![0; (first_leaf + leaves.len()) * BLOCK];
        let (index, leaf_area) = bytes.split_at_mut(first_leaf * BLOCK);
        let mut entries: Vec<(u32, u32)> = Vec::with_capacity(leaves.len());
        for ((n, range), block) in (0..).zip(&leaves).zip(leaf_area.chunks_exact_mut(BLOCK)) {
            let mut leaf = Leaf::new(block, leaf_end(seed));
            names[range.clone()].iter().for_each(|name| push_name(&mut leaf, tree, name.name));
            leaf.close(seed);
            let continued = range.start > 0 && names[range.start - 1].hash == names[range.start].hash;
            entries.push((names[range.start].hash | u32::from(continued), first_leaf as u32 + n));
        }
        let (root, inner) = index.split_at_mut(BLOCK);
        let mut above: Vec<(u32, u32)> = Vec::with_capacity(nodes);
        for ((n, part), block) in (1..).zip(entries.chunks(node_limit)).zip(inner.chunks_exact_mut(BLOCK)) {
            // An empty entry that covers the block hides the node from code that knows no index.
            DirEntry { inode: 0, rec_len: BLOCK, file_type: 0, name: b"" }.write(block, 0);
            put_index(block, DX_NODE_COUNT_AT, node_limit, part, seed);
            above.push((part[0].0, n));
        }
        DirEntry { inode: id.ino(), rec_len: 12, file_type: file_type::DIR, name: b"." }.write(root, 0);
        DirEntry { inode: parent.ino(), rec_len: BLOCK - 12, file_type: file_type::DIR, name: b".." }.write(root, 12);
        DxRootInfo { hash_version: self.hasher.version.to_disk(), indirect_levels: u8::from(nodes > 0) }.write(root);
        debug_assert_eq!(DX_INFO_AT, DOTS);
        put_index(root, DX_ROOT_COUNT_AT, root_limit, if nodes > 0 { &above } else { &entries }, seed);
        Ok(Built { bytes, indexed: true })
    }
}

/// Ranges of names per leaf, each of at most `fill` bytes (a name always fits).
fn split(tree: &Tree, names: &[Hashed], fill: usize) -> Vec<std::ops::Range<usize>> {
    let (mut leaves, mut start, mut used) = (Vec::new(), 0, 0);
    for (i, name) in names.iter().enumerate() {
        let len = rec_len_for(tree.name_bytes(tree.name(name.name)).len());
        if used + len > fill && i > start {
            leaves.push(start..i);
            (start, used) = (i, 0);
        }
        used += len;
    }
    leaves.push(start..names.len());
    leaves
}

fn put_index(block: &mut [u8], count_at: usize, limit: usize, entries: &[(u32, u32)], seed: Option<u32>) {
    put_dx_count_limit(block, count_at, limit as u16, entries.len() as u16);
    for (i, (hash, target)) in entries.iter().enumerate() {
        put_dx_entry(block, count_at, i, *hash, *target);
    }
    if let Some(seed) = seed {
        csum::set_dx_block(seed, block, count_at);
    }
}

fn leaf_end(seed: Option<u32>) -> usize {
    if seed.is_some() { BLOCK - TAIL_SIZE } else { BLOCK }
}

fn push_name(leaf: &mut Leaf, tree: &Tree, index: u32) {
    let name = tree.name(index);
    leaf.push(name.node.ino(), file_type_of(tree.node(name.node).mode), tree.name_bytes(name));
}

/// Fills one block of entries.
struct Leaf<'a> {
    block: &'a mut [u8],
    at: usize,
    last: Option<usize>,
    end: usize,
}

impl<'a> Leaf<'a> {
    fn new(block: &'a mut [u8], end: usize) -> Self {
        Leaf { block, at: 0, last: None, end }
    }

    fn push(&mut self, inode: u32, file_type: u8, name: &[u8]) {
        let rec_len = rec_len_for(name.len());
        DirEntry { inode, rec_len, file_type, name }.write(self.block, self.at);
        self.last = Some(self.at);
        self.at += rec_len;
    }

    /// The last entry takes the rest of the block; an empty block is one free entry.
    fn close(self, seed: Option<u32>) {
        match self.last {
            Some(last) => put_u16(self.block, last + 4, (self.end - last) as u16),
            None => DirEntry { inode: 0, rec_len: self.end, file_type: 0, name: b"" }.write(self.block, 0),
        }
        if let Some(seed) = seed {
            csum::set_dir_leaf(seed, self.block);
        }
    }
}
