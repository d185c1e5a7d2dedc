//! The tree in memory while entries arrive: metadata only, a fixed number of bytes per inode and per name.
//!
//! ```text
//! nodes   64 bytes per inode: owner, mode, times, links, and by type where the data is
//! names   20 bytes per name plus the name itself in one arena, and 8 to 16 bytes in the lookup table
//! runs    16 bytes per run of blocks, usually one per file
//! ```
//!
//! About 120 bytes and the name per entry. A name is never removed: what replaces an entry takes over its name.

use std::hash::{BuildHasher, RandomState};

use super::shape::Run;
use crate::{
    error::{Error, Kind, Result, Stage},
    ext4::layout::{ino, inode::mode},
    units::Timestamp,
};

/// Index of an inode in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(u32);

impl NodeId {
    /// The root directory.
    pub const ROOT: NodeId = NodeId(0);
    /// `lost+found`.
    pub const LOST_FOUND: NodeId = NodeId(1);

    /// The inode number: 2 for the root, then from 11 on.
    pub fn ino(self) -> u32 {
        if self == Self::ROOT { ino::ROOT } else { ino::FIRST - 1 + self.0 }
    }

    /// The node of an inode number, if it has one.
    pub fn of_ino(number: u32) -> Option<NodeId> {
        match number {
            ino::ROOT => Some(Self::ROOT),
            _ => number.checked_sub(ino::FIRST - 1).filter(|index| *index > 0).map(NodeId),
        }
    }

    fn index(self) -> usize {
        self.0 as usize
    }
}

/// A part of the tree's runs or bytes: start and number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Slice {
    /// First.
    pub at: u32,
    /// How many.
    pub len: u32,
}

impl Slice {
    fn range(self) -> std::ops::Range<usize> {
        self.at as usize..self.at as usize + self.len as usize
    }
}

/// What an inode is, and where its data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// Nothing: the inode is free.
    Free,
    /// A directory. `runs` is empty until the end.
    Dir {
        /// The directory it is in.
        parent: NodeId,
        /// Names in it.
        children: u32,
        /// Its blocks.
        runs: Slice,
    },
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// Its blocks.
        runs: Slice,
    },
    /// A symlink that fits into the inode; its target in the arena.
    FastSymlink(Slice),
    /// A symlink in a block.
    SlowSymlink {
        /// Bytes.
        size: u32,
        /// Its block.
        runs: Slice,
    },
    /// A character or block device.
    Device {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A FIFO or socket.
    Special,
}

/// An inode.
#[derive(Debug, Clone)]
pub struct Node {
    /// All its times.
    pub mtime: Timestamp,
    /// Type and data.
    pub body: Body,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names of a non-directory; subdirectories of a directory plus two.
    pub links: u32,
    /// Index of its xattrs plus one, 0 for none.
    pub xattrs: u32,
    /// Type and permissions.
    pub mode: u16,
    /// Whether the directory is a hashed tree.
    pub indexed: bool,
}

impl Node {
    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & mode::TYPE == mode::DIR
    }

    /// Its blocks.
    pub fn runs(&self) -> Slice {
        match self.body {
            Body::Dir { runs, .. } | Body::File { runs, .. } | Body::SlowSymlink { runs, .. } => runs,
            _ => Slice::default(),
        }
    }
}

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub struct Name {
    /// The directory.
    pub parent: NodeId,
    /// What it names.
    pub node: NodeId,
    at: u32,
    hash: u32,
    len: u8,
}

/// The tree.
pub struct Tree {
    nodes: Vec<Node>,
    free_nodes: Vec<NodeId>,
    names: Vec<Name>,
    bytes: Vec<u8>,
    runs: Vec<Run>,
    /// Open addressing; indices into `names` plus one.
    table: Vec<u32>,
    /// Keyed, so that an archive can't choose names that collide. Its randomness never reaches the result.
    hasher: RandomState,
    nodes_max: u32,
}

impl Tree {
    /// A tree of a root and `lost+found`, with room for inodes up to number `inodes`.
    pub fn new(inodes: u32, time: Timestamp) -> Self {
        let dir = |links, permissions| Node {
            mtime: time,
            body: Body::Dir { parent: NodeId::ROOT, children: 0, runs: Slice::default() },
            uid: 0,
            gid: 0,
            links,
            xattrs: 0,
            mode: mode::DIR | permissions,
            indexed: false,
        };
        let mut tree = Tree {
            nodes: vec![dir(2, 0o755), dir(2, 0o700)],
            free_nodes: Vec::new(),
            names: Vec::new(),
            bytes: Vec::new(),
            runs: Vec::new(),
            table: vec![0; 1024],
            hasher: RandomState::new(),
            nodes_max: inodes.saturating_sub(ino::FIRST - 1).saturating_add(1),
        };
        tree.insert_name(NodeId::ROOT, b"lost+found", NodeId::LOST_FOUND);
        tree
    }

    /// An inode.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// An inode, to change.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// Inodes in use.
    pub fn live(&self) -> u64 {
        (self.nodes.len() - self.free_nodes.len()) as u64
    }

    /// Whether an inode number's node exists and is not free.
    pub fn is_used(&self, id: NodeId) -> bool {
        self.nodes.get(id.index()).is_some_and(|node| node.body != Body::Free)
    }

    /// All inode ids ever made, in the order of their numbers; some may be free.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.nodes.len() as u32).map(NodeId)
    }

    /// Adds an inode; nothing when the filesystem has no more.
    pub fn add_node(&mut self, node: Node) -> Option<NodeId> {
        if let Some(id) = self.free_nodes.pop() {
            self.nodes[id.index()] = node;
            return Some(id);
        }
        if self.nodes.len() >= self.nodes_max as usize {
            return None;
        }
        self.nodes.push(node);
        Some(NodeId(self.nodes.len() as u32 - 1))
    }

    /// Makes an inode free; its number is used again.
    pub fn free_node(&mut self, id: NodeId) {
        let node = &mut self.nodes[id.index()];
        (node.body, node.mode, node.links, node.xattrs) = (Body::Free, 0, 0, 0);
        self.free_nodes.push(id);
    }

    /// Keeps runs and says where they are.
    pub fn add_runs(&mut self, runs: &[Run]) -> Result<Slice> {
        let at = arena_index(self.runs.len() + runs.len(), "runs of blocks")? - runs.len() as u32;
        self.runs.extend_from_slice(runs);
        Ok(Slice { at, len: runs.len() as u32 })
    }

    /// The runs of a slice.
    pub fn runs(&self, slice: Slice) -> &[Run] {
        &self.runs[slice.range()]
    }

    /// Keeps bytes and says where they are.
    pub fn add_bytes(&mut self, bytes: &[u8]) -> Result<Slice> {
        let at = arena_index(self.bytes.len() + bytes.len(), "bytes of names")? - bytes.len() as u32;
        self.bytes.extend_from_slice(bytes);
        Ok(Slice { at, len: bytes.len() as u32 })
    }

    /// The bytes of a slice.
    pub fn bytes(&self, slice: Slice) -> &[u8] {
        &self.bytes[slice.range()]
    }

    /// The name at an index.
    pub fn name(&self, index: u32) -> Name {
        self.names[index as usize]
    }

    /// The bytes of a name.
    pub fn name_bytes(&self, name: Name) -> &[u8] {
        &self.bytes[name.at as usize..][..usize::from(name.len)]
    }

    /// Index of a name in a directory.
    pub fn find(&self, parent: NodeId, name: &[u8]) -> Option<u32> {
        self.probe(parent, name, self.hash(parent, name)).ok()
    }

    /// Adds a name that is not there yet.
    pub fn add_name(&mut self, parent: NodeId, name: &[u8], node: NodeId) -> Result<()> {
        arena_index(self.bytes.len() + name.len(), "bytes of names")?;
        arena_index(self.names.len() + 1, "names")?;
        self.insert_name(parent, name, node);
        Ok(())
    }

    /// Lets a name mean another inode.
    pub fn set_name(&mut self, index: u32, node: NodeId) {
        self.names[index as usize].node = node;
    }

    /// Indices of all names, by directory and within one in the order of arrival; where each directory's begin, one more at the end.
    pub fn by_directory(&self) -> (Vec<u32>, Vec<u32>) {
        let mut starts = vec![0u32; self.nodes.len() + 1];
        for name in &self.names {
            starts[name.parent.index() + 1] += 1;
        }
        for i in 1..starts.len() {
            starts[i] += starts[i - 1];
        }
        let mut next = starts.clone();
        let mut order = vec![0; self.names.len()];
        for (index, name) in (0..).zip(&self.names) {
            let slot = &mut next[name.parent.index()];
            order[*slot as usize] = index;
            *slot += 1;
        }
        (order, starts)
    }

    fn insert_name(&mut self, parent: NodeId, name: &[u8], node: NodeId) {
        if (self.names.len() + 1) * 2 > self.table.len() {
            self.grow_table();
        }
        let hash = self.hash(parent, name);
        if let Err(slot) = self.probe(parent, name, hash) {
            let at = self.bytes.len() as u32;
            self.bytes.extend_from_slice(name);
            self.names.push(Name { parent, node, at, hash, len: name.len() as u8 });
            self.table[slot] = self.names.len() as u32;
            if let Body::Dir { children, .. } = &mut self.nodes[parent.index()].body {
                *children += 1;
            }
        }
    }

    fn grow_table(&mut self) {
        let len = self.table.len() * 2;
        self.table = vec![0; len];
        for (index, name) in (1..).zip(&self.names) {
            let mut slot = name.hash as usize & (len - 1);
            while self.table[slot] != 0 {
                slot = (slot + 1) & (len - 1);
            }
            self.table[slot] = index;
        }
    }

    /// Index of the name, or the slot where it belongs.
    fn probe(&self, parent: NodeId, name: &[u8], hash: u32) -> std::result::Result<u32, usize> {
        let mask = self.table.len() - 1;
        let mut slot = hash as usize & mask;
        while self.table[slot] != 0 {
            let index = self.table[slot] - 1;
            let found = self.names[index as usize];
            if found.hash == hash && found.parent == parent && self.name_bytes(found) == name {
                return Ok(index);
            }
            slot = (slot + 1) & mask;
        }
        Err(slot)
    }

    fn hash(&self, parent: NodeId, name: &[u8]) -> u32 {
        self.hasher.hash_one((parent, name)) as u32
    }
}

fn arena_index(len: usize, what: &str) -> Result<u32> {
    u32::try_from(len).map_err(|_| Error::new(Kind::Unsupported, Stage::Golden, "ext4", format!("the tree has more than 2^32 {what}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_per_inode_and_name_stays_small() {
        assert!(size_of::<Node>() <= 64, "{}", size_of::<Node>());
        assert!(size_of::<Name>() <= 20, "{}", size_of::<Name>());
        assert!(size_of::<Run>() <= 16, "{}", size_of::<Run>());
    }

    #[test]
    fn names_are_found_in_their_directory_only_and_counted() {
        let mut tree = Tree::new(100_000, Timestamp::default());
        for i in 0..5000u32 {
            let node = tree.node(NodeId::LOST_FOUND).clone();
            let id = tree.add_node(node).expect("room");
            tree.add_name(NodeId::ROOT, format!("n{i}").as_bytes(), id).expect("fits");
        }
        let index = tree.find(NodeId::ROOT, b"n4321").expect("was added");
        assert_eq!(tree.name(index).node.ino(), 12 + 4321);
        assert_eq!(tree.find(NodeId::LOST_FOUND, b"n4321"), None);
        let (order, starts) = tree.by_directory();
        assert_eq!(starts[1], 5001);
        assert!(order.is_sorted());
    }

    #[test]
    fn inodes_end_and_free_ones_are_used_again() {
        let mut tree = Tree::new(13, Timestamp::default());
        let node = tree.node(NodeId::LOST_FOUND).clone();
        let (first, second) = (tree.add_node(node.clone()), tree.add_node(node.clone()));
        assert_eq!((first.map(NodeId::ino), second.map(NodeId::ino)), (Some(12), Some(13)));
        assert_eq!(tree.add_node(node.clone()), None);
        tree.free_node(first.expect("made above"));
        assert_eq!(tree.add_node(node).map(NodeId::ino), Some(12));
        assert_eq!(tree.live(), 4);
    }
}
