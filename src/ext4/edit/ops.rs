//! The edits, with the meaning that [`crate::fs::edit`] gives them.
//!
//! An intermediate symlink that dangles is an error for what makes something; removing below one removes nothing, as for any other path that
//! is not there. Parents that are made get 0755 0:0. Setting a mode does not clear set-user-id bits, and default ACLs of the parent are not
//! inherited: an edit gives the owner, the bits and the attributes it means.

use std::collections::HashSet;

use super::{Editor, names::Name};
use crate::{
    error::{Error, Kind, Result, Stage},
    ext4::{
        layout::{
            corrupt, ino,
            inode::{BLOCK_LEN, LINK_MAX, mode},
            ro_compat,
        },
        read::{Found, Node, Origin, Walked},
    },
    fs::edit::{Attrs, EditOp},
    names::GuestPath,
};

/// Longest symlink target, bytes.
const LINK_TARGET_MAX: usize = 4095;

/// Where a path's last component is or would be.
struct Place {
    /// Inodes from the root to the directory.
    stack: Vec<u32>,
    dir: Node,
    name: Vec<u8>,
    found: Option<Found>,
}

fn conflict(path: &GuestPath, what: impl Into<String>) -> Error {
    Error::new(Kind::Conflict, Stage::Edit, path.to_string(), what)
}

fn invalid(path: &GuestPath, what: impl Into<String>) -> Error {
    Error::new(Kind::InvalidRequest, Stage::Edit, path.to_string(), what)
}

impl Editor {
    pub(super) fn apply_op(&mut self, path: &GuestPath, op: &EditOp) -> Result<()> {
        match op {
            EditOp::WriteFile { content, attrs } => self.write_file(path, content, attrs),
            EditOp::AppendFile { content } => self.append_file(path, content),
            EditOp::MakeDir { attrs } => self.make_dir(path, attrs),
            EditOp::Symlink { target, attrs } => self.symlink(path, target, attrs),
            EditOp::Remove => self.remove(path),
            EditOp::SetAttrs { mode, owner } => self.set_attrs(path, *mode, *owner),
            EditOp::SetXattr { name, value } => {
                let mut node = self.existing(path)?;
                self.set_xattr(&mut node, name, value.as_deref())?;
                if name == b"system.posix_acl_access" && value.is_some() {
                    self.mode_follows_acl(&mut node)?;
                }
                node.inode.ctime = self.now;
                self.write_node(&mut node)
            }
            EditOp::Rename { to } => self.rename(path, to),
        }
    }

    /// The place of a path that must not be the root. Missing parents are made (`make`), or there is no place.
    fn place_of(&mut self, path: &GuestPath, make: bool) -> Result<Option<Place>> {
        let Some(name) = path.file_name() else { return Err(invalid(path, "the root can't be replaced, moved or removed")) };
        let parent = path.parent().unwrap_or_else(GuestPath::root);
        let stack = match self.image.walk_path(&parent)? {
            Walked::There(stack) => stack,
            Walked::Missing(_, _) | Walked::NotADirectory(_) if !make => return Ok(None),
            Walked::NotADirectory(ino) => return Err(conflict(path, format!("inode {ino} on the way is not a directory"))),
            Walked::Missing(_, rest) if rest.iter().any(|(_, origin)| *origin == Origin::Link) => {
                return Err(conflict(path, "leads through a symlink that dangles").with_reason("GUEST_LINK_REFUSED"));
            }
            Walked::Missing(mut stack, rest) => {
                for (name, _) in rest {
                    let mut dir = self.image.top(&stack)?;
                    let made = self.make_child_dir(&mut dir, &name, &Attrs::root(0o755))?;
                    stack.push(made);
                }
                stack
            }
        };
        let dir = self.image.top(&stack)?;
        if !dir.inode.is_dir() {
            return if make { Err(conflict(path, format!("inode {} on the way is not a directory", dir.ino))) } else { Ok(None) };
        }
        let found = self.image.dir_find(&dir, name)?;
        Ok(Some(Place { stack, dir, name: name.to_vec(), found }))
    }

    /// The inode at a path that must be there.
    fn existing(&mut self, path: &GuestPath) -> Result<Node> {
        let number = self.image.lookup(path)?.ok_or_else(|| Error::new(Kind::NotFound, Stage::Edit, path.to_string(), "is not in the image"))?;
        self.image.node(number)
    }

    fn write_file(&mut self, path: &GuestPath, content: &[u8], attrs: &Attrs) -> Result<()> {
        let place = self.place_to_fill(path)?;
        let mut node = self.new_inode(place.dir.ino, mode::FILE | bits(path, attrs.mode)?, (attrs.uid, attrs.gid))?;
        self.init_map(&mut node)?;
        self.append(&mut node, content)?;
        self.finish_new(place, node, attrs)
    }

    fn symlink(&mut self, path: &GuestPath, target: &[u8], attrs: &Attrs) -> Result<()> {
        if target.is_empty() || target.len() > LINK_TARGET_MAX || target.contains(&0) {
            return Err(invalid(path, format!("a symlink's target has 1..={LINK_TARGET_MAX} bytes without NUL, not {}", target.len())));
        }
        if target.len() >= self.image.block_size() {
            let what = format!("a symlink's target of {} bytes does not fit a block of {}", target.len(), self.image.geo.block_size);
            return Err(Error::new(Kind::Unsupported, Stage::Edit, path.to_string(), what));
        }
        let place = self.place_to_fill(path)?;
        let mut node = self.new_inode(place.dir.ino, mode::SYMLINK | 0o777, (attrs.uid, attrs.gid))?;
        if target.len() < BLOCK_LEN {
            node.inode.block[..target.len()].copy_from_slice(target);
            node.inode.size = target.len() as u64;
        } else {
            self.init_map(&mut node)?;
            self.append(&mut node, target)?;
        }
        self.finish_new(place, node, attrs)
    }

    /// The place for something that is not a directory. What is there loses this name (and is freed with its last name, so that its inode and
    /// blocks can be used again); the entry itself is still to be pointed at the new inode.
    fn place_to_fill(&mut self, path: &GuestPath) -> Result<Place> {
        let place = self.place_of(path, true)?.ok_or_else(|| Error::internal(Stage::Edit, path.to_string(), "no place was made"))?;
        if let Some(found) = &place.found {
            if self.image.node(found.ino)?.inode.is_dir() {
                return Err(conflict(path, "is a directory; it is not replaced by something else"));
            }
            self.unlink_node(found.ino)?;
        }
        Ok(place)
    }

    fn finish_new(&mut self, mut place: Place, mut node: Node, attrs: &Attrs) -> Result<()> {
        for xattr in &attrs.xattrs {
            self.set_xattr(&mut node, &xattr.name, Some(&xattr.value))?;
        }
        node.inode.links = 1;
        self.write_node(&mut node)?;
        let file_type = self.entry_type(&node);
        match &place.found {
            Some(found) => self.replace_name(&mut place.dir, found, node.ino, file_type)?,
            None => self.add_name(&mut place.dir, &Name { name: place.name, ino: node.ino, file_type })?,
        }
        self.write_node(&mut place.dir)
    }

    fn append_file(&mut self, path: &GuestPath, content: &[u8]) -> Result<()> {
        let mut node = self.existing(path)?;
        if !node.inode.is_file() {
            return Err(conflict(path, "is not a regular file"));
        }
        self.append(&mut node, content)?;
        (node.inode.mtime, node.inode.ctime) = (self.now, self.now);
        self.write_node(&mut node)
    }

    fn make_dir(&mut self, path: &GuestPath, attrs: &Attrs) -> Result<()> {
        if !path.is_root() {
            let place = self.place_of(path, true)?.ok_or_else(|| Error::internal(Stage::Edit, path.to_string(), "no place was made"))?;
            if place.found.is_none() {
                let mut dir = place.dir;
                let attrs = Attrs { mode: bits(path, attrs.mode)?, ..attrs.clone() };
                self.make_child_dir(&mut dir, &place.name, &attrs)?;
                return Ok(());
            }
        }
        let mut node = self.existing(path)?;
        if !node.inode.is_dir() {
            return Err(conflict(path, "is there and not a directory"));
        }
        self.change_attrs(path, &mut node, Some(attrs.mode), Some((attrs.uid, attrs.gid)))?;
        for xattr in &attrs.xattrs {
            self.set_xattr(&mut node, &xattr.name, Some(&xattr.value))?;
        }
        self.write_node(&mut node)
    }

    /// Makes a directory whose name is not there, and writes both inodes; its number.
    fn make_child_dir(&mut self, parent: &mut Node, name: &[u8], attrs: &Attrs) -> Result<u32> {
        let mut node = self.new_inode(parent.ino, mode::DIR | attrs.mode, (attrs.uid, attrs.gid))?;
        self.init_map(&mut node)?;
        self.init_dir(&mut node, parent.ino)?;
        for xattr in &attrs.xattrs {
            self.set_xattr(&mut node, &xattr.name, Some(&xattr.value))?;
        }
        node.inode.links = 2;
        self.write_node(&mut node)?;
        let file_type = self.entry_type(&node);
        self.add_name(parent, &Name { name: name.to_vec(), ino: node.ino, file_type })?;
        self.add_link(parent)?;
        self.write_node(parent)?;
        Ok(node.ino)
    }

    /// Counts a subdirectory's `..` (ext4_inc_count): with dir_nlink an indexed directory's count stops at 1.
    fn add_link(&mut self, dir: &mut Node) -> Result<()> {
        let links = u32::from(dir.inode.links) + 1;
        dir.inode.links = if dir.inode.links == 1 {
            1
        } else if links <= LINK_MAX {
            links as u16
        } else if self.image.is_indexed(dir) && self.image.sb.has_ro_compat(ro_compat::DIR_NLINK) {
            1
        } else {
            return Err(super::no_space(format!("directory inode {}", dir.ino), format!("has {LINK_MAX} links already")));
        };
        Ok(())
    }

    fn remove_link(dir: &mut Node) {
        if dir.inode.links > 2 {
            dir.inode.links -= 1;
        }
    }

    fn remove(&mut self, path: &GuestPath) -> Result<()> {
        let Some(Place { mut dir, found: Some(found), .. }) = self.place_of(path, false)? else { return Ok(()) };
        let node = self.image.node(found.ino)?;
        self.remove_name(&mut dir, &found)?;
        if node.inode.is_dir() {
            self.free_tree(node, &dir)?;
            Self::remove_link(&mut dir);
        } else {
            self.unlink_node(node.ino)?;
        }
        self.write_node(&mut dir)
    }

    /// Frees a directory and everything below it.
    fn free_tree(&mut self, top: Node, parent: &Node) -> Result<()> {
        let mut seen = HashSet::from([ino::ROOT, parent.ino]);
        let mut todo = vec![top];
        while let Some(dir) = todo.pop() {
            if !seen.insert(dir.ino) {
                return Err(corrupt(format!("directory inode {}", dir.ino), "has two names"));
            }
            for item in self.image.dir_items(&dir)? {
                let node = self.image.node(item.ino)?;
                if node.inode.is_dir() {
                    todo.push(node);
                } else {
                    self.unlink_node(item.ino)?;
                }
            }
            self.free_node(&dir)?;
        }
        Ok(())
    }

    fn set_attrs(&mut self, path: &GuestPath, mode: Option<u16>, owner: Option<(u32, u32)>) -> Result<()> {
        let mut node = self.existing(path)?;
        self.change_attrs(path, &mut node, mode, owner)?;
        self.write_node(&mut node)
    }

    /// A symlink has no permission bits of its own: only its owner changes.
    fn change_attrs(&mut self, path: &GuestPath, node: &mut Node, new_mode: Option<u16>, owner: Option<(u32, u32)>) -> Result<()> {
        if let Some(new_mode) = new_mode
            && !node.inode.is_symlink()
        {
            node.inode.mode = node.inode.mode & mode::TYPE | bits(path, new_mode)?;
            self.acl_follows_mode(node)?;
        }
        if let Some(owner) = owner {
            (node.inode.uid, node.inode.gid) = owner;
        }
        node.inode.ctime = self.now;
        Ok(())
    }

    fn rename(&mut self, from: &GuestPath, to: &GuestPath) -> Result<()> {
        let missing = || Error::new(Kind::NotFound, Stage::Edit, from.to_string(), "is not in the image");
        let moved = self.place_of(from, false)?.and_then(|place| place.found).ok_or_else(missing)?.ino;
        let target = self.place_of(to, true)?.ok_or_else(missing)?;
        if target.stack.contains(&moved) {
            return Err(invalid(to, format!("is inside {from}, which moves")));
        }
        if let Some(found) = &target.found {
            if found.ino == moved {
                return Ok(());
            }
            if self.image.node(found.ino)?.inode.is_dir() {
                return Err(conflict(to, "is a directory; it is not replaced"));
            }
            self.unlink_node(found.ino)?;
            let mut dir = target.dir;
            self.remove_name(&mut dir, found)?;
            self.write_node(&mut dir)?;
        }
        // Each step reads the directories again: both names may be in the same one.
        let Place { mut dir, found: Some(found), .. } = self.place_of(from, false)?.ok_or_else(missing)? else { return Err(missing()) };
        let mut node = self.image.node(moved)?;
        self.remove_name(&mut dir, &found)?;
        if node.inode.is_dir() {
            Self::remove_link(&mut dir);
        }
        self.write_node(&mut dir)?;
        let mut into = self.image.top(&target.stack)?;
        let file_type = self.entry_type(&node);
        self.add_name(&mut into, &Name { name: target.name, ino: moved, file_type })?;
        if node.inode.is_dir() {
            self.add_link(&mut into)?;
            if into.ino != dir.ino {
                self.set_dotdot(&node, into.ino)?;
            }
        }
        self.write_node(&mut into)?;
        node.inode.ctime = self.now;
        self.write_node(&mut node)
    }
}

/// Permission bits, checked.
fn bits(path: &GuestPath, mode: u16) -> Result<u16> {
    if mode & !0o7777 == 0 { Ok(mode) } else { Err(invalid(path, format!("mode {mode:#o} has more than permission bits"))) }
}
