//! A root filesystem as a plain tree in memory: the meaning of [`TreeSink`]'s rules in the fewest words. It is what other sinks are compared
//! with, and what tools print. It holds every byte of content: not for building images.

use std::{collections::BTreeMap, io::Read, ops::Bound};

use super::{Entry, EntryKind, Meta, Span, TreeSink, error_of_read};
use crate::{
    error::{Error, Kind, Result, Stage},
    names::GuestPath,
};

/// What the names of a tree refer to. Hard links share one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it is; never [`EntryKind::HardLink`].
    pub kind: EntryKind,
    /// Owner, mode, time, attributes.
    pub meta: Meta,
    /// The bytes of the spans of a file, one after another; empty for everything else.
    pub data: Vec<u8>,
}

impl Node {
    /// The content of a file with its holes as zeros, for files of at most `len_max` bytes.
    pub fn content(&self, len_max: u64) -> Option<Vec<u8>> {
        let EntryKind::File { size, spans } = &self.kind else { return None };
        let mut content = vec![0; usize::try_from(*size).ok().filter(|_| *size <= len_max)?];
        let mut data = self.data.as_slice();
        for Span { offset, len } in spans {
            let (now, later) = data.split_at_checked(*len as usize)?;
            content.get_mut(*offset as usize..)?.get_mut(..now.len())?.copy_from_slice(now);
            data = later;
        }
        Some(content)
    }
}

/// A tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    nodes: Vec<Node>,
    names: BTreeMap<GuestPath, usize>,
}

impl Default for Model {
    fn default() -> Self {
        Model { nodes: vec![implied_directory()], names: BTreeMap::from([(GuestPath::root(), 0)]) }
    }
}

fn implied_directory() -> Node {
    Node { kind: EntryKind::Directory, meta: Meta { mode: 0o755, ..Meta::default() }, data: Vec::new() }
}

impl Model {
    /// What is at `path` itself.
    pub fn get(&self, path: &GuestPath) -> Option<&Node> {
        self.names.get(path).map(|number| &self.nodes[*number])
    }

    /// Every name with what it refers to, in order of the bytes of the path. The root is always there.
    pub fn iter(&self) -> impl Iterator<Item = (&GuestPath, &Node)> {
        self.names.iter().map(|(path, number)| (path, &self.nodes[*number]))
    }

    /// The names of the node that `path` refers to, `path` included.
    pub fn links(&self, path: &GuestPath) -> Vec<&GuestPath> {
        let number = self.names.get(path);
        self.names.iter().filter(|(_, other)| Some(*other) == number).map(|(path, _)| path).collect()
    }

    fn has_children(&self, path: &GuestPath) -> bool {
        // Everything below starts with the bytes of the path, and so do neighbours such as "/a-b" of "/a", which may stand in between.
        let after = self.names.range::<GuestPath, _>((Bound::Excluded(path), Bound::Unbounded));
        after.take_while(|(name, _)| name.as_bytes().starts_with(path.as_bytes())).any(|(name, _)| name.is_within(path))
    }

    fn make_parents(&mut self, path: &GuestPath) -> Result<()> {
        let Some(parent) = path.parent() else { return Ok(()) };
        match self.get(&parent).map(|node| &node.kind) {
            Some(EntryKind::Directory) => Ok(()),
            Some(_) => Err(refused(path, format!("{parent} above it is not a directory"))),
            None => {
                self.make_parents(&parent)?;
                self.insert(parent, implied_directory());
                Ok(())
            }
        }
    }

    fn insert(&mut self, path: GuestPath, node: Node) {
        self.names.insert(path, self.nodes.len());
        self.nodes.push(node);
    }

    fn hard_link(&mut self, path: &GuestPath, target: &GuestPath) -> Result<()> {
        match self.names.get(target) {
            None => Err(refused(path, format!("is a hard link to {target}, which is not there"))),
            Some(number) if self.nodes[*number].kind == EntryKind::Directory => {
                Err(refused(path, format!("is a hard link to {target}, which is a directory")))
            }
            Some(number) => {
                self.names.insert(path.clone(), *number);
                Ok(())
            }
        }
    }
}

fn refused(path: &GuestPath, message: String) -> Error {
    Error::new(Kind::Corrupt, Stage::Golden, path.to_string(), message)
}

impl TreeSink for Model {
    fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<()> {
        self.make_parents(&entry.path)?;
        let old = self.names.get(&entry.path).copied();
        let old_is_directory = old.is_some_and(|number| self.nodes[number].kind == EntryKind::Directory);
        if let (Some(number), true, EntryKind::Directory) = (old, old_is_directory, &entry.kind) {
            self.nodes[number].meta = entry.meta.clone();
            return Ok(());
        }
        if old_is_directory && (entry.path.is_root() || self.has_children(&entry.path)) {
            return Err(refused(&entry.path, "would replace a directory that is not empty".into()));
        }
        if let EntryKind::HardLink { target } = &entry.kind {
            return self.hard_link(&entry.path, target);
        }
        let mut node = Node { kind: entry.kind.clone(), meta: entry.meta.clone(), data: Vec::new() };
        data.read_to_end(&mut node.data).map_err(|error| error_of_read(error, Stage::Golden, &entry.path.display(), "read its content"))?;
        self.insert(entry.path.clone(), node);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> GuestPath {
        GuestPath::new(text).expect("valid")
    }

    fn put(model: &mut Model, at: &str, kind: EntryKind, mut data: &[u8]) -> Result<()> {
        model.entry(&Entry { path: path(at), kind, meta: Meta { mode: 0o700, ..Meta::default() } }, &mut data)
    }

    fn file(len: u64) -> EntryKind {
        EntryKind::File { size: len, spans: vec![Span { offset: 0, len }] }
    }

    #[test]
    fn parents_are_implied_and_take_later_metadata() {
        let mut model = Model::default();
        put(&mut model, "/a/b/f", file(1), b"x").expect("made");
        assert_eq!(model.get(&path("/a")).map(|node| node.meta.mode), Some(0o755));
        put(&mut model, "/a", EntryKind::Directory, b"").expect("made");
        assert_eq!(model.get(&path("/a")).map(|node| node.meta.mode), Some(0o700));
        assert!(model.get(&path("/a/b/f")).is_some());
    }

    #[test]
    fn the_last_member_wins_but_never_over_a_full_directory_or_through_a_link() {
        let mut model = Model::default();
        put(&mut model, "/a/f", file(1), b"x").expect("made");
        put(&mut model, "/a-b", EntryKind::Fifo, b"").expect("made");
        let symlink = EntryKind::Symlink { target: b"/etc".to_vec() };
        assert!(put(&mut model, "/a", symlink.clone(), b"").is_err());
        assert!(put(&mut model, "/", symlink.clone(), b"").is_err());
        put(&mut model, "/a/f", symlink.clone(), b"").expect("replaced");
        assert!(put(&mut model, "/a/f/g", EntryKind::Fifo, b"").is_err());
        put(&mut model, "/a/f", EntryKind::Directory, b"").expect("replaced");
        put(&mut model, "/a/f", symlink, b"").expect("an empty directory is replaced");
    }

    #[test]
    fn hard_links_share_a_node_until_one_name_is_replaced() {
        let mut model = Model::default();
        put(&mut model, "/f", file(1), b"x").expect("made");
        put(&mut model, "/g", EntryKind::HardLink { target: path("/f") }, b"").expect("linked");
        put(&mut model, "/f", EntryKind::HardLink { target: path("/f") }, b"").expect("nothing to do");
        assert_eq!(model.links(&path("/f")).len(), 2);
        put(&mut model, "/f", file(2), b"yy").expect("replaced");
        assert_eq!(model.get(&path("/g")).map(|node| node.data.clone()), Some(b"x".to_vec()));
        assert!(put(&mut model, "/h", EntryKind::HardLink { target: path("/none") }, b"").is_err());
        assert!(put(&mut model, "/h", EntryKind::HardLink { target: path("/") }, b"").is_err());
    }

    #[test]
    fn holes_are_zeros() {
        let mut model = Model::default();
        let spans = vec![Span { offset: 2, len: 2 }, Span { offset: 6, len: 1 }];
        put(&mut model, "/f", EntryKind::File { size: 8, spans }, b"abc").expect("made");
        assert_eq!(model.get(&path("/f")).and_then(|node| node.content(8)), Some(b"\0\0ab\0\0c\0".to_vec()));
        assert_eq!(model.get(&path("/f")).and_then(|node| node.content(7)), None);
    }
}
