//! Paths: resolved component by component in the image's own tree. A symlink is followed inside the tree only, at most 40 on one path.

use std::collections::VecDeque;

use super::{Image, Node};
use crate::{
    error::{Error, Kind, Result, Stage},
    ext4::layout::{corrupt, ino},
    names::GuestPath,
};

/// Symlinks followed on one path, as Linux (MAXSYMLINKS).
const LINKS_MAX: usize = 40;
/// Components waiting to be walked; link targets add to them.
const COMPONENTS_MAX: usize = 16 * 1024;

/// Where a component comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The path that was asked for.
    Path,
    /// The target of a symlink.
    Link,
}

/// A component still to be walked.
pub(crate) type Component = (Vec<u8>, Origin);

/// How far a path led.
#[derive(Debug, Clone)]
pub(crate) enum Walked {
    /// To a directory or, as the last component, to anything: the inodes from the root to it, itself last.
    There(Vec<u32>),
    /// To a directory (the inodes from the root to it) where the first of these components is missing.
    Missing(Vec<u32>, Vec<Component>),
    /// To something that is not a directory, although components follow.
    NotADirectory(u32),
}

impl Image {
    /// The inode of a path; the last component is not followed when it is a symlink. Nothing when it isn't there.
    pub fn lookup(&self, path: &GuestPath) -> Result<Option<u32>> {
        let Some(name) = path.file_name() else { return Ok(Some(ino::ROOT)) };
        let parents = path.parent().unwrap_or_else(GuestPath::root);
        match self.walk_path(&parents)? {
            Walked::There(stack) => {
                let dir = self.top(&stack)?;
                if !dir.inode.is_dir() {
                    return Ok(None);
                }
                Ok(self.dir_find(&dir, name)?.map(|found| found.ino))
            }
            Walked::Missing(..) | Walked::NotADirectory(_) => Ok(None),
        }
    }

    /// The inode of a path, with the last component followed too. Nothing when it isn't there or a link dangles.
    pub fn resolve(&self, path: &GuestPath) -> Result<Option<u32>> {
        match self.walk_path(path)? {
            Walked::There(stack) => Ok(stack.last().copied()),
            Walked::Missing(..) | Walked::NotADirectory(_) => Ok(None),
        }
    }

    /// The last inode of a walk.
    pub(crate) fn top(&self, stack: &[u32]) -> Result<Node> {
        self.node(stack.last().copied().unwrap_or(ino::ROOT))
    }

    /// Walks all components, following every symlink. `Kind::Conflict` when links loop or climb above the root.
    pub(crate) fn walk_path(&self, path: &GuestPath) -> Result<Walked> {
        let refuse = |what: &str| Err(Error::new(Kind::Conflict, Stage::Edit, path.to_string(), what.to_owned()).with_reason("GUEST_LINK_REFUSED"));
        let mut rest: VecDeque<Component> = path.components().map(|name| (name.to_vec(), Origin::Path)).collect();
        let (mut stack, mut links) = (vec![ino::ROOT], 0);
        let mut top = self.node(ino::ROOT)?;
        while let Some((name, origin)) = rest.pop_front() {
            if !top.inode.is_dir() {
                return Ok(Walked::NotADirectory(top.ino));
            }
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    stack.pop();
                    if stack.is_empty() {
                        return refuse("leads through a symlink that climbs above the root");
                    }
                    top = self.top(&stack)?;
                    continue;
                }
                _ => {}
            }
            let Some(found) = self.dir_find(&top, &name)? else {
                let missing = std::iter::once((name, origin)).chain(rest).collect();
                return Ok(Walked::Missing(stack, missing));
            };
            let node = self.node(found.ino)?;
            if !node.inode.is_symlink() {
                stack.push(found.ino);
                top = node;
                continue;
            }
            links += 1;
            if links > LINKS_MAX {
                return refuse("leads through too many symlinks (a loop?)");
            }
            let target = self.link_target(&node)?;
            if target.first() == Some(&b'/') {
                stack.truncate(1);
                top = self.node(ino::ROOT)?;
            }
            for part in target.split(|byte| *byte == b'/').rev().filter(|part| !part.is_empty()) {
                rest.push_front((part.to_vec(), Origin::Link));
            }
            if rest.len() > COMPONENTS_MAX {
                return Err(corrupt(path.to_string(), "leads through symlinks with endless targets"));
            }
        }
        Ok(Walked::There(stack))
    }
}
