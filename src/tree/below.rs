//! A directory of an archive as the root of the tree: LXD's and Incus' unified tarballs have the root filesystem below `rootfs/`.

use std::io::Read;

use super::{Entry, EntryKind, TreeSink};
use crate::{
    error::{Error, Kind, Result, Stage},
    names::GuestPath,
};

/// A sink in front of another one: what is below `prefix` goes on without it, and nothing else does.
pub struct Below<'a> {
    prefix: GuestPath,
    inner: &'a mut dyn TreeSink,
    /// Whether anything was below the prefix.
    found: bool,
}

/// `path` as it is in the tree whose root is `prefix`; `None` when it is outside.
pub fn strip(prefix: &GuestPath, path: &GuestPath) -> Option<GuestPath> {
    if !path.is_within(prefix) {
        return None;
    }
    let skip = if prefix.is_root() { 0 } else { prefix.as_bytes().len() };
    let rest = &path.as_bytes()[skip..];
    if rest.is_empty() { Some(GuestPath::root()) } else { GuestPath::new(rest).ok() }
}

/// Whether a member can be left out unread: it is neither in the tree, nor a directory on the way to it.
pub fn is_beside(prefix: &GuestPath, path: &GuestPath) -> bool {
    !path.is_within(prefix) && !prefix.is_within(path)
}

impl<'a> Below<'a> {
    /// What is below `prefix` goes on to `inner`.
    pub fn new(prefix: GuestPath, inner: &'a mut dyn TreeSink) -> Self {
        Below { prefix, inner, found: false }
    }

    /// Ends it. `Kind::InvalidRequest`, reason `ROOTFS_PREFIX`, when the archive had nothing below the prefix.
    pub fn finish(self) -> Result<()> {
        if self.found {
            return Ok(());
        }
        let message = format!("the archive has nothing below {}, where the manifest says the root filesystem is", self.prefix);
        Err(Error::new(Kind::InvalidRequest, Stage::Golden, "rootfs.prefix", message).with_reason("ROOTFS_PREFIX"))
    }
}

impl TreeSink for Below<'_> {
    fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<()> {
        let Some(path) = strip(&self.prefix, &entry.path) else { return Ok(()) };
        self.found = true;
        let kind = match &entry.kind {
            EntryKind::HardLink { target } => {
                let target = strip(&self.prefix, target).ok_or_else(|| {
                    let message = format!("is a hard link to {target}, which is not below {}", self.prefix);
                    Error::new(Kind::InvalidRequest, Stage::Golden, entry.path.to_string(), message).with_reason("HARD_LINK_LEFT_OUT")
                })?;
                EntryKind::HardLink { target }
            }
            other => other.clone(),
        };
        self.inner.entry(&Entry { path, kind, meta: entry.meta.clone() }, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Meta;

    fn path(text: &str) -> GuestPath {
        GuestPath::new(text).expect("a path")
    }

    struct Names(Vec<String>);

    impl TreeSink for Names {
        fn entry(&mut self, entry: &Entry, _: &mut dyn Read) -> Result<()> {
            let target = match &entry.kind {
                EntryKind::HardLink { target } => format!(" = {target}"),
                _ => String::new(),
            };
            self.0.push(format!("{}{target}", entry.path));
            Ok(())
        }
    }

    #[test]
    fn the_tree_below_a_prefix_is_a_tree_of_its_own() {
        let mut names = Names(Vec::new());
        let mut below = Below::new(path("/rootfs"), &mut names);
        let entry = |at: &str, kind| Entry { path: path(at), kind, meta: Meta::default() };
        let link = |target: &str| EntryKind::HardLink { target: path(target) };
        for (at, kind) in [
            ("/metadata.yaml", EntryKind::Fifo),
            ("/rootfs", EntryKind::Directory),
            ("/rootfs/etc", EntryKind::Directory),
            ("/rootfs/rootfs/a", EntryKind::Fifo),
            ("/rootfs2/etc", EntryKind::Fifo),
            ("/rootfs/b", link("/rootfs/rootfs/a")),
        ] {
            below.entry(&entry(at, kind), &mut std::io::empty()).expect("taken");
        }
        assert_eq!(
            below.entry(&entry("/rootfs/c", link("/metadata.yaml")), &mut std::io::empty()).expect_err("outside").reason(),
            "HARD_LINK_LEFT_OUT"
        );
        below.finish().expect("there was a tree");
        assert_eq!(names.0, ["/", "/etc", "/rootfs/a", "/b = /rootfs/a"]);
        assert_eq!(Below::new(path("/x"), &mut Names(Vec::new())).finish().expect_err("nothing").reason(), "ROOTFS_PREFIX");
    }

    #[test]
    fn only_what_is_beside_the_way_is_left_out_unread() {
        let prefix = path("/a/rootfs");
        for (at, beside) in [("/", false), ("/a", false), ("/a/rootfs", false), ("/a/rootfs/x", false), ("/b", true), ("/a/templates", true)] {
            assert_eq!(is_beside(&prefix, &path(at)), beside, "{at}");
        }
    }
}
