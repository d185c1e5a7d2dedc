//! The formatter: entries in archive order become an ext4 filesystem in one pass.
//!
//! ```text
//! Shape::new      the region's size decides where all fixed metadata and the journal are
//! entry()         file data goes to its final blocks as it arrives; names and inodes are kept in memory (tree)
//! finish()        directories, xattr blocks, extent blocks, inode tables, bitmaps, descriptors, superblocks
//! ```
//!
//! The region reads as zeros when the build starts; what is zero is never written, so the disk file stays sparse. Nothing depends on clocks or
//! randomness: the same entries and parameters give the same bytes.

mod alloc;
mod data;
mod dirs;
mod extents;
mod finish;
mod inodes;
mod shape;
mod special;
mod tree;
mod writer;
mod xattrs;

use std::{io::Read, sync::Arc};

use self::{
    alloc::Blocks,
    data::Store,
    shape::Shape,
    tree::{Body, Node, NodeId, Slice, Tree},
    writer::Writer,
    xattrs::Sets,
};
use super::{
    csum,
    layout::{
        BLOCK_SIZE,
        inode::{BLOCK_LEN, LINK_MAX, clamp_time, mode},
    },
};
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::{BuildParams, BuiltFs, Region, TreeBuilder, WriteObserver},
    names::GuestPath,
    progress::Progress,
    tree::{Entry, EntryKind, Meta, TreeSink},
    units::{Bytes, Timestamp},
};

/// Smallest region a filesystem can be made in, bytes.
pub const SIZE_MIN: u64 = shape::BLOCKS_MIN * BLOCK_SIZE as u64;
/// Bytes of a label.
const LABEL_MAX: usize = 16;

/// Starts a build. `Kind::InvalidRequest` for a label or inode ratio out of range, `Kind::NoSpace` or `Kind::Unsupported` for a region too small or
/// too large. The builder writes from a thread of its own; dropping it stops that thread.
pub fn builder(params: &BuildParams, region: Region, progress: &Progress) -> Result<Box<dyn TreeBuilder>> {
    if params.label.len() > LABEL_MAX {
        return Err(Error::field(Stage::Golden, "label", format!("has {} bytes, ext4 has room for {LABEL_MAX}", params.label.len())));
    }
    let shape = Shape::new(region.len, params)?;
    let store = Store { blocks: Blocks::new(&shape), writer: Writer::new(region, progress)? };
    let time = clamp_time(Timestamp { secs: params.epoch_secs, nanos: 0 });
    Ok(Box::new(Formatter {
        tree: Tree::new(shape.geometry.inodes_count(), time),
        seed: shape.features.metadata_csum().then(|| csum::seed_of(&params.uuid)),
        shape,
        params: params.clone(),
        time,
        sets: Sets::default(),
        store,
        last_dir: (Vec::new(), NodeId::ROOT),
        progress: progress.clone(),
    }))
}

/// A build under way.
struct Formatter {
    shape: Shape,
    params: BuildParams,
    /// Time of what has none of its own.
    time: Timestamp,
    /// Checksum seed with metadata_csum.
    seed: Option<u32>,
    tree: Tree,
    sets: Sets,
    store: Store,
    /// Path and node of the directory the last entry was in: archives list directories together.
    last_dir: (Vec<u8>, NodeId),
    progress: Progress,
}

impl TreeBuilder for Formatter {
    fn observe(&mut self, observer: Arc<dyn WriteObserver>) {
        self.store.writer.observe(observer);
    }

    fn finish(self: Box<Self>) -> Result<BuiltFs> {
        self.progress.check()?;
        self.complete()
    }
}

impl TreeSink for Formatter {
    fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<()> {
        self.progress.check()?;
        let Some(name) = entry.path.file_name() else {
            return self.root_entry(entry);
        };
        let parent = self.parent_of(&entry.path)?;
        let existing = self.tree.find(parent, name);
        match &entry.kind {
            EntryKind::Directory => self.directory(entry, parent, name, existing),
            EntryKind::HardLink { target } => self.hard_link(entry, target, parent, name, existing),
            _ => {
                self.check_replaceable(&entry.path, existing)?;
                let node = self.other(entry, data)?;
                let id = self.add_node(&entry.path, node)?;
                self.place(parent, name, existing, id)
            }
        }
    }
}

impl Formatter {
    fn root_entry(&mut self, entry: &Entry) -> Result<()> {
        match entry.kind {
            EntryKind::Directory => self.set_meta(NodeId::ROOT, entry),
            _ => Err(corrupt(&entry.path, "the root can only be a directory".into())),
        }
    }

    fn directory(&mut self, entry: &Entry, parent: NodeId, name: &[u8], existing: Option<u32>) -> Result<()> {
        if let Some(id) = existing.map(|index| self.tree.name(index).node).filter(|id| self.tree.node(*id).is_dir()) {
            return self.set_meta(id, entry);
        }
        self.check_replaceable(&entry.path, existing)?;
        let body = Body::Dir { parent, children: 0, runs: Slice::default() };
        let node = self.node(&entry.path, &entry.meta, mode::DIR, body)?;
        let id = self.add_node(&entry.path, node)?;
        self.place(parent, name, existing, id)
    }

    fn hard_link(&mut self, entry: &Entry, target: &GuestPath, parent: NodeId, name: &[u8], existing: Option<u32>) -> Result<()> {
        let Some(id) = self.lookup(target) else {
            return Err(corrupt(&entry.path, format!("is a hard link to {target}, which did not come before")));
        };
        if self.tree.node(id).is_dir() {
            return Err(corrupt(&entry.path, format!("is a hard link to {target}, which is a directory")));
        }
        if existing.is_some_and(|index| self.tree.name(index).node == id) {
            return Ok(());
        }
        self.check_replaceable(&entry.path, existing)?;
        let links = &mut self.tree.node_mut(id).links;
        if *links >= LINK_MAX {
            let message = format!("would be link number {} of {target}, the limit of ext4 is {LINK_MAX}", *links + 1);
            return Err(Error::new(Kind::Unsupported, Stage::Golden, entry.path.to_string(), message).with_reason("TOO_MANY_LINKS"));
        }
        *links += 1;
        self.place(parent, name, existing, id)
    }

    /// The node of anything but a directory or hard link, its data stored.
    fn other(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<Node> {
        let (kind, body) = match &entry.kind {
            EntryKind::File { size, spans } => {
                let runs = self.store.file(&entry.path, *size, spans, data)?;
                (mode::FILE, Body::File { size: *size, runs: self.tree.add_runs(&runs)? })
            }
            EntryKind::Symlink { target } => (mode::SYMLINK, self.symlink(&entry.path, target)?),
            EntryKind::CharDevice { major, minor } => (mode::CHAR, device(&entry.path, *major, *minor)?),
            EntryKind::BlockDevice { major, minor } => (mode::BLOCK, device(&entry.path, *major, *minor)?),
            EntryKind::Fifo => (mode::FIFO, Body::Special),
            EntryKind::Socket => (mode::SOCKET, Body::Special),
            EntryKind::Directory | EntryKind::HardLink { .. } => {
                return Err(Error::internal(Stage::Golden, entry.path.to_string(), "has no node of its own"));
            }
        };
        self.node(&entry.path, &entry.meta, kind, body)
    }

    fn symlink(&mut self, path: &GuestPath, target: &[u8]) -> Result<Body> {
        match target.len() {
            0 => Err(corrupt(path, "is a symlink to nothing".into())),
            len if len < BLOCK_LEN => Ok(Body::FastSymlink(self.tree.add_bytes(target)?)),
            // The block also holds the NUL that ends the target.
            len if len < BLOCK_SIZE as usize => {
                let runs = self.store.bytes(&path.to_string(), target)?;
                Ok(Body::SlowSymlink { size: len as u32, runs: self.tree.add_runs(&runs)? })
            }
            len => Err(corrupt(path, format!("is a symlink to {len} bytes, the limit is {}", BLOCK_SIZE - 1))),
        }
    }

    fn add_xattrs(&mut self, path: &GuestPath, meta: &Meta) -> Result<u32> {
        self.sets.add(path, &meta.xattrs, &mut |block| self.store.xattr_block(self.seed, block))
    }

    fn release_xattrs(&mut self, handle: u32) {
        if let Some(block) = self.sets.release(handle) {
            self.store.blocks.give_back(block..block + 1);
        }
    }

    fn node(&mut self, path: &GuestPath, meta: &Meta, kind: u16, body: Body) -> Result<Node> {
        Ok(Node {
            mtime: clamp_time(meta.mtime),
            body,
            uid: meta.uid,
            gid: meta.gid,
            links: if kind == mode::DIR { 2 } else { 1 },
            xattrs: self.add_xattrs(path, meta)?,
            mode: kind | meta.mode & 0o7777,
            indexed: false,
        })
    }

    fn set_meta(&mut self, id: NodeId, entry: &Entry) -> Result<()> {
        let handle = self.add_xattrs(&entry.path, &entry.meta)?;
        let node = self.tree.node_mut(id);
        let old = std::mem::replace(&mut node.xattrs, handle);
        (node.uid, node.gid, node.mtime) = (entry.meta.uid, entry.meta.gid, clamp_time(entry.meta.mtime));
        node.mode = mode::DIR | entry.meta.mode & 0o7777;
        self.release_xattrs(old);
        Ok(())
    }

    fn add_node(&mut self, path: &GuestPath, node: Node) -> Result<NodeId> {
        self.tree.add_node(node).ok_or_else(|| {
            let geometry = &self.shape.geometry;
            let message = format!(
                "no inode left: the filesystem of {} has {} (one per {} bytes)",
                Bytes(geometry.blocks_count * u64::from(BLOCK_SIZE)),
                geometry.inodes_count(),
                self.params.bytes_per_inode
            );
            Error::new(Kind::NoSpace, Stage::Golden, path.to_string(), message)
                .with_reason("INODES_EXHAUSTED")
                .with_hint("a larger disk, or fewer bytes per inode")
        })
    }

    /// Gives a name in `parent` to `id`; what had it before loses it.
    fn place(&mut self, parent: NodeId, name: &[u8], existing: Option<u32>, id: NodeId) -> Result<()> {
        let Some(index) = existing else {
            return self.tree.add_name(parent, name, id);
        };
        let old = self.tree.name(index).node;
        self.tree.set_name(index, id);
        let node = self.tree.node_mut(old);
        if node.is_dir() {
            // Its path may be the remembered one.
            self.last_dir = (Vec::new(), NodeId::ROOT);
        } else {
            node.links -= 1;
            if node.links > 0 {
                return Ok(());
            }
        }
        let (runs, handle) = (node.runs(), node.xattrs);
        for run in self.tree.runs(runs) {
            self.store.blocks.give_back(run.start..run.start + u64::from(run.len));
        }
        self.release_xattrs(handle);
        self.tree.free_node(old);
        Ok(())
    }

    /// A directory is only replaced when it is empty, `lost+found` never: fsck wants it.
    fn check_replaceable(&self, path: &GuestPath, existing: Option<u32>) -> Result<()> {
        let Some(id) = existing.map(|index| self.tree.name(index).node) else { return Ok(()) };
        match self.tree.node(id).body {
            Body::Dir { children, .. } if children > 0 => Err(corrupt(path, format!("would replace a directory of {children} entries"))),
            Body::Dir { .. } if id == NodeId::LOST_FOUND => Err(corrupt(path, "would replace the directory that fsck needs".into())),
            _ => Ok(()),
        }
    }

    /// The directory a path is in; missing ones are made.
    fn parent_of(&mut self, path: &GuestPath) -> Result<NodeId> {
        let bytes = path.as_bytes();
        let dir = &bytes[..bytes.iter().rposition(|byte| *byte == b'/').unwrap_or(0)];
        if dir == self.last_dir.0 {
            return Ok(self.last_dir.1);
        }
        let mut id = NodeId::ROOT;
        for name in dir.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            id = match self.tree.find(id, name) {
                Some(index) => self.tree.name(index).node,
                None => self.implied_dir(path, id, name)?,
            };
            if !self.tree.node(id).is_dir() {
                return Err(corrupt(path, format!("leads through {:?}, which is not a directory", String::from_utf8_lossy(name))));
            }
        }
        self.last_dir = (dir.to_vec(), id);
        Ok(id)
    }

    fn implied_dir(&mut self, path: &GuestPath, parent: NodeId, name: &[u8]) -> Result<NodeId> {
        let meta = Meta { mode: 0o755, ..Meta::default() };
        let node = self.node(path, &meta, mode::DIR, Body::Dir { parent, children: 0, runs: Slice::default() })?;
        let id = self.add_node(path, node)?;
        self.tree.add_name(parent, name, id)?;
        Ok(id)
    }

    /// What a path names, nothing when it or a directory on the way is missing. Symlinks are not followed.
    fn lookup(&self, path: &GuestPath) -> Option<NodeId> {
        path.components().try_fold(NodeId::ROOT, |id, name| self.tree.find(id, name).map(|index| self.tree.name(index).node))
    }
}

fn device(path: &GuestPath, major: u32, minor: u32) -> Result<Body> {
    // The widths of dev_t in the kernel (MINORBITS 20).
    if major < 1 << 12 && minor < 1 << 20 {
        return Ok(Body::Device { major, minor });
    }
    let message = format!("device numbers {major}:{minor} do not fit 12 and 20 bits");
    Err(Error::new(Kind::Unsupported, Stage::Golden, path.to_string(), message))
}

fn corrupt(path: &GuestPath, message: String) -> Error {
    Error::new(Kind::Corrupt, Stage::Golden, path.to_string(), message)
}

/// `object` needs `needed` blocks, `free` are left.
fn no_space(object: &str, needed: u64, free: u64) -> Error {
    let [needed, free] = [needed, free].map(|blocks| Bytes(blocks * u64::from(BLOCK_SIZE)));
    Error::new(Kind::NoSpace, Stage::Golden, object, format!("needs {needed}, the filesystem has {free} left")).with_hint("a larger disk")
}
