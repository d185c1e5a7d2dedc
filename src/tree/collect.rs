//! Gathers [`GuestFacts`] while a tree streams by on its way to another sink.
//!
//! The facts describe the tree as it is at the end: the last member of a name wins, a directory that is replaced loses nothing (it was empty),
//! a hard link describes what its target was when the link was made. To answer that for a hard link to a path that nobody lists, one short record
//! is kept for each name that is not a directory, by a hash of the path.
//!
//! A listed path brings the directories above it into the facts, whether or not the policy lists them: [`GuestFacts::resolve`] walks through them.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    io::{self, Read},
};

use super::{Entry, EntryKind, Meta, Span, TreeSink, error_of_read};
use crate::{
    error::{Result, Stage},
    guest::{
        facts::{CONTENT_LEN_MAX, CONTENT_TOTAL_MAX, FactsPolicy, GuestFacts, Node, NodeKind},
        selinux::XATTR,
    },
    names::GuestPath,
};

/// A sink in front of another one.
pub struct Collector<'a> {
    inner: &'a mut dyn TreeSink,
    policy: &'a dyn FactsPolicy,
    facts: GuestFacts,
    content_total: u64,
    /// Every directory that was a member, for the day something below it is listed.
    directories: BTreeMap<GuestPath, Node>,
    /// What every other name is. The hash has fixed keys: results don't depend on the run, and whoever makes two paths of one archive collide
    /// only gets wrong facts about their own image.
    others: HashMap<u64, Node>,
    hasher: BuildHasherDefault<DefaultHasher>,
    /// The parent of the last listed path: members come directory by directory.
    last_parent: Option<GuestPath>,
}

impl<'a> Collector<'a> {
    /// Everything goes on to `inner`; `policy` says what is remembered.
    pub fn new(inner: &'a mut dyn TreeSink, policy: &'a dyn FactsPolicy) -> Self {
        Collector {
            inner,
            policy,
            facts: GuestFacts::default(),
            content_total: 0,
            directories: BTreeMap::new(),
            others: HashMap::new(),
            hasher: BuildHasherDefault::default(),
            last_parent: None,
        }
    }

    /// The facts about what went by.
    pub fn finish(self) -> GuestFacts {
        self.facts
    }

    fn hash(&self, path: &GuestPath) -> u64 {
        self.hasher.hash_one(path.as_bytes())
    }

    /// Whether the content of this file is to be kept, as far as the policy and the caps let it.
    fn keeps(&self, path: &str, size: u64) -> bool {
        let given_back = self.facts.nodes.get(path).map_or(0, content_len);
        size <= CONTENT_LEN_MAX && self.content_total - given_back + size <= CONTENT_TOTAL_MAX && self.policy.keeps_content(path)
    }

    fn remember(&mut self, entry: &Entry, content: Option<Vec<u8>>) {
        let node = match &entry.kind {
            EntryKind::HardLink { target } => self.node_of_target(target),
            kind => Some(node(kind, &entry.meta, content)),
        };
        // The inner sink has accepted the link, so its target was here; a collision of hashes can hide it, and then nothing is known.
        let Some(node) = node else { return };
        if node.kind == NodeKind::Directory {
            self.others.remove(&self.hash(&entry.path));
            self.directories.insert(entry.path.clone(), node.clone());
        } else {
            self.directories.remove(&entry.path);
            self.others.insert(self.hash(&entry.path), without_content(&node));
        }
        let Ok(path) = std::str::from_utf8(entry.path.as_bytes()) else { return };
        let label = entry.meta.xattrs.iter().find(|xattr| xattr.name == XATTR.as_bytes()).and_then(|xattr| std::str::from_utf8(&xattr.value).ok());
        self.facts.labels.remove(path);
        if let Some(label) = label.filter(|_| self.policy.lists(path)) {
            self.facts.labels.insert(path.to_owned(), label.trim_end_matches('\0').to_owned());
        }
        if self.policy.lists(path) {
            self.list_parents(&entry.path);
            self.put(path, node);
        } else if self.facts.nodes.contains_key(path) {
            // It is above something that is listed, and this is its own member, late.
            self.put(path, node);
        }
    }

    fn node_of_target(&self, target: &GuestPath) -> Option<Node> {
        let listed = std::str::from_utf8(target.as_bytes()).ok().and_then(|path| self.facts.nodes.get(path));
        listed.or_else(|| self.others.get(&self.hash(target))).cloned()
    }

    fn put(&mut self, path: &str, mut node: Node) {
        if let Some(old) = self.facts.nodes.get(path) {
            self.content_total -= content_len(old);
        }
        // A hard link brings a copy of its target's content; it counts too, and is listed without content when the cap is reached.
        if self.content_total + content_len(&node) > CONTENT_TOTAL_MAX || !self.policy.keeps_content(path) {
            node = without_content(&node);
        }
        self.content_total += content_len(&node);
        self.facts.nodes.insert(path.to_owned(), node);
    }

    fn list_parents(&mut self, path: &GuestPath) {
        let parent = path.parent();
        if parent == self.last_parent {
            return;
        }
        let mut at = parent.clone();
        while let Some(directory) = at {
            if let Ok(text) = std::str::from_utf8(directory.as_bytes()) {
                let node = self.directories.get(&directory);
                self.facts.nodes.entry(text.to_owned()).or_insert_with(|| node.cloned().unwrap_or_else(implied_directory));
            }
            at = directory.parent();
        }
        self.last_parent = parent;
    }
}

impl TreeSink for Collector<'_> {
    fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<()> {
        let EntryKind::File { size, spans } = &entry.kind else {
            self.inner.entry(entry, data)?;
            self.remember(entry, None);
            return Ok(());
        };
        if !std::str::from_utf8(entry.path.as_bytes()).is_ok_and(|path| self.keeps(path, *size)) {
            self.inner.entry(entry, data)?;
            self.remember(entry, None);
            return Ok(());
        }
        let mut tee = Tee { data, taken: Vec::with_capacity(*size as usize) };
        self.inner.entry(entry, &mut tee)?;
        // What the inner sink had no use for is wanted here all the same.
        io::copy(&mut tee, &mut io::sink()).map_err(|error| error_of_read(error, Stage::Golden, &entry.path.display(), "read its content"))?;
        let content = with_holes(&tee.taken, *size, spans);
        self.remember(entry, Some(content));
        Ok(())
    }
}

/// Hands the bytes on and keeps them. It stands in front of files of at most [`CONTENT_LEN_MAX`] only.
struct Tee<'d> {
    data: &'d mut dyn Read,
    taken: Vec<u8>,
}

impl Read for Tee<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let len = self.data.read(out)?;
        self.taken.extend_from_slice(&out[..len]);
        Ok(len)
    }
}

fn with_holes(data: &[u8], size: u64, spans: &[Span]) -> Vec<u8> {
    let mut content = vec![0; size as usize];
    let mut rest = data;
    for span in spans {
        let (now, later) = rest.split_at(rest.len().min(span.len as usize));
        if let Some(place) = content.get_mut(span.offset as usize..).and_then(|place| place.get_mut(..now.len())) {
            place.copy_from_slice(now);
        }
        rest = later;
    }
    content
}

fn node(kind: &EntryKind, meta: &Meta, content: Option<Vec<u8>>) -> Node {
    let kind = match kind {
        EntryKind::Directory => NodeKind::Directory,
        EntryKind::File { size, .. } => NodeKind::File { size: *size, content },
        // A target that is not text leads to a path that is not in the facts anyway.
        EntryKind::Symlink { target } => match std::str::from_utf8(target) {
            Ok(target) => NodeKind::Symlink { target: target.to_owned() },
            Err(_) => NodeKind::Other,
        },
        EntryKind::HardLink { .. } | EntryKind::CharDevice { .. } | EntryKind::BlockDevice { .. } | EntryKind::Fifo | EntryKind::Socket => {
            NodeKind::Other
        }
    };
    Node { kind, mode: meta.mode, uid: meta.uid, gid: meta.gid }
}

/// What [`TreeSink`]'s rules say about a directory that has no member of its own.
fn implied_directory() -> Node {
    Node { kind: NodeKind::Directory, mode: 0o755, uid: 0, gid: 0 }
}

fn without_content(node: &Node) -> Node {
    let kind = match &node.kind {
        NodeKind::File { size, .. } => NodeKind::File { size: *size, content: None },
        NodeKind::Directory => NodeKind::Directory,
        NodeKind::Symlink { target } => NodeKind::Symlink { target: target.clone() },
        NodeKind::Other => NodeKind::Other,
    };
    Node { kind, mode: node.mode, uid: node.uid, gid: node.gid }
}

fn content_len(node: &Node) -> u64 {
    match &node.kind {
        NodeKind::File { content: Some(content), .. } => content.len() as u64,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::model::Model;

    /// Lists what is below /etc, /lib and /bin and keeps what ends in .conf.
    struct Policy;
    impl FactsPolicy for Policy {
        fn lists(&self, path: &str) -> bool {
            ["/etc/", "/lib", "/bin/"].iter().any(|prefix| path.starts_with(prefix))
        }
        fn keeps_content(&self, path: &str) -> bool {
            path.ends_with(".conf")
        }
    }

    fn path(text: &str) -> GuestPath {
        GuestPath::new(text).expect("valid")
    }

    fn file(data: &[u8]) -> EntryKind {
        EntryKind::File { size: data.len() as u64, spans: vec![Span { offset: 0, len: data.len() as u64 }] }
    }

    fn link(target: &str) -> EntryKind {
        EntryKind::HardLink { target: path(target) }
    }

    fn facts(entries: &[(&str, EntryKind, u16, &[u8])]) -> GuestFacts {
        let mut model = Model::default();
        let mut collector = Collector::new(&mut model, &Policy);
        for (at, kind, mode, data) in entries {
            let entry = Entry { path: path(at), kind: kind.clone(), meta: Meta { mode: *mode, uid: 5, ..Meta::default() } };
            collector.entry(&entry, &mut &data[..]).unwrap_or_else(|error| panic!("{at}: {error:?}"));
        }
        let facts = collector.finish();
        // Every fact agrees with the tree that the inner sink got.
        for (at, node) in &facts.nodes {
            let real = model.get(&path(at)).unwrap_or_else(|| panic!("{at} is not in the tree"));
            assert_eq!((node.mode, node.uid), (real.meta.mode, real.meta.uid), "{at}");
            if let NodeKind::File { content: Some(content), .. } = &node.kind {
                assert_eq!(Some(content), real.content(CONTENT_LEN_MAX).as_ref(), "{at}");
            }
        }
        facts
    }

    #[test]
    fn listed_files_are_kept_with_content_where_the_policy_says_so() {
        let facts = facts(&[
            ("/etc/a.conf", file(b"one"), 0o644, b"one"),
            ("/etc/passwd", file(b"root"), 0o644, b"root"),
            ("/usr/x.conf", file(b"two"), 0o644, b"two"),
            ("/lib", EntryKind::Symlink { target: b"usr/lib".to_vec() }, 0o777, b""),
        ]);
        assert_eq!(facts.content("/etc/a.conf"), Some(&b"one"[..]));
        assert_eq!(facts.content("/etc/passwd"), None);
        assert!(facts.exists("/etc/passwd") && facts.exists("/") && facts.node("/lib").is_some());
        assert!(facts.node("/usr/x.conf").is_none());
    }

    #[test]
    fn parents_have_their_own_metadata_whether_it_comes_before_or_after() {
        let facts = facts(&[
            ("/etc", EntryKind::Directory, 0o750, b""),
            ("/etc/sub/a.conf", file(b"x"), 0o644, b"x"),
            ("/bin/late/b", file(b"x"), 0o644, b"x"),
            ("/bin/late", EntryKind::Directory, 0o711, b""),
            ("/bin", EntryKind::Directory, 0o700, b""),
        ]);
        let mode = |path: &str| facts.node(path).map(|node| node.mode);
        assert_eq!([mode("/etc"), mode("/bin"), mode("/bin/late")], [Some(0o750), Some(0o700), Some(0o711)]);
        assert_eq!(facts.node("/etc/sub").map(|node| (node.mode, node.uid)), Some((0o755, 0)));
    }

    #[test]
    fn the_last_member_of_a_name_wins() {
        let facts = facts(&[
            ("/etc/a.conf", file(b"one"), 0o644, b"one"),
            ("/etc/a.conf", file(b"three"), 0o600, b"three"),
            ("/etc/b.conf", file(b"one"), 0o644, b"one"),
            ("/etc/b.conf", EntryKind::Symlink { target: b"a.conf".to_vec() }, 0o777, b""),
            ("/etc/d", EntryKind::Directory, 0o755, b""),
            ("/etc/d", EntryKind::Fifo, 0o600, b""),
        ]);
        assert_eq!(facts.content("/etc/b.conf"), Some(&b"three"[..]));
        assert_eq!(facts.node("/etc/d").map(|node| node.kind.clone()), Some(NodeKind::Other));
    }

    #[test]
    fn a_hard_link_describes_its_target_also_when_that_is_not_listed() {
        let facts = facts(&[
            ("/usr/bin/busybox", file(b"ELF"), 0o755, b"ELF"),
            ("/bin/sh", link("/usr/bin/busybox"), 0, b""),
            ("/etc/a.conf", file(b"one"), 0o640, b"one"),
            ("/etc/b.conf", link("/etc/a.conf"), 0, b""),
            ("/etc/a.conf", file(b"two"), 0o644, b"two"),
            ("/etc/plain", link("/etc/b.conf"), 0, b""),
        ]);
        assert_eq!(facts.node("/bin/sh").map(|node| (node.kind.clone(), node.mode)), Some((NodeKind::File { size: 3, content: None }, 0o755)));
        assert_eq!((facts.content("/etc/b.conf"), facts.node("/etc/b.conf").map(|node| node.mode)), (Some(&b"one"[..]), Some(0o640)));
        assert_eq!(facts.content("/etc/a.conf"), Some(&b"two"[..]));
        assert_eq!(facts.content("/etc/plain"), None);
    }

    #[test]
    fn content_beyond_the_caps_is_listed_without() {
        let big = vec![b'x'; CONTENT_LEN_MAX as usize];
        let too_big = vec![b'x'; CONTENT_LEN_MAX as usize + 1];
        let mut entries = vec![("/etc/too-big.conf".to_owned(), &too_big)];
        let fits = CONTENT_TOTAL_MAX / CONTENT_LEN_MAX;
        entries.extend((0..fits + 1).map(|number| (format!("/etc/{number:04}.conf"), &big)));
        // Replacing one gives its room back.
        entries.push(("/etc/0000.conf".to_owned(), &big));
        let entries: Vec<(&str, EntryKind, u16, &[u8])> =
            entries.iter().map(|(path, data)| (path.as_str(), file(data), 0o644, data.as_slice())).collect();
        let facts = facts(&entries);
        assert_eq!(facts.content("/etc/too-big.conf"), None);
        assert!(facts.exists("/etc/too-big.conf"));
        assert!(facts.content(&format!("/etc/{:04}.conf", fits - 1)).is_some());
        assert_eq!(facts.content(&format!("/etc/{fits:04}.conf")), None);
        assert_eq!(facts.content("/etc/0000.conf").map(<[u8]>::len), Some(big.len()));
    }

    #[test]
    fn holes_of_kept_files_are_zeros_and_a_sink_that_reads_nothing_takes_nothing_away() {
        struct Blind;
        impl TreeSink for Blind {
            fn entry(&mut self, _: &Entry, _: &mut dyn Read) -> Result<()> {
                Ok(())
            }
        }
        let mut blind = Blind;
        let mut collector = Collector::new(&mut blind, &Policy);
        let kind = EntryKind::File { size: 6, spans: vec![Span { offset: 1, len: 2 }, Span { offset: 5, len: 1 }] };
        let entry = Entry { path: path("/etc/a.conf"), kind, meta: Meta::default() };
        collector.entry(&entry, &mut &b"abc"[..]).expect("taken");
        assert_eq!(collector.finish().content("/etc/a.conf"), Some(&b"\0ab\0\0c"[..]));
    }
}
