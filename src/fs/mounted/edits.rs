//! The worker's side of an edit: [`EditOp`]s on a mounted copy-on-write view of a golden, by the rules in [`crate::fs::edit`].
//!
//! Intermediate symlinks are followed by our own walk inside the tree, one open directory per component, so that one that climbs above the root is
//! noticed rather than clamped; the last component is never followed.

use std::{
    collections::VecDeque,
    ffi::CString,
    io::Write,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, Dir, FileType, futimens, readlinkat, renameat, symlinkat},
    io::Errno,
};

use super::confined::{
    ACCESS_ACL, Attributes, CAPABILITY, DEFAULT_ACL, Place, component, file_type, open_child, open_directory, refused_xattr, times_of,
};
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::edit::{Attrs, EditOp},
    names::GuestPath,
    units::Timestamp,
};

const STAGE: Stage = Stage::Edit;
/// Symlinks followed for one path, as Linux does (MAXSYMLINKS).
const LINKS_MAX: u32 = 40;
/// Levels of a directory tree that is removed: each holds a descriptor, and a process has 1024 of them.
const DEPTH_MAX: usize = 512;

/// Applies edits to one tree.
pub(super) struct Editor {
    root: OwnedFd,
    now: Timestamp,
}

/// Whether missing directories on the way are made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Tell,
}

fn conflict(path: &GuestPath, what: impl Into<String>) -> Error {
    Error::new(Kind::Conflict, STAGE, path.to_string(), what)
}

fn link_refused(path: &GuestPath, what: &str) -> Error {
    conflict(path, format!("leads through a symlink that {what}")).with_reason("GUEST_LINK_REFUSED")
}

fn invalid(path: &GuestPath, what: impl Into<String>) -> Error {
    Error::new(Kind::InvalidRequest, STAGE, path.to_string(), what)
}

fn absent(path: &GuestPath) -> Error {
    Error::new(Kind::NotFound, STAGE, path.to_string(), "is not in the image")
}

fn failed(path: &GuestPath, doing: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::io(STAGE, path.to_string(), doing, errno.into())
}

impl Editor {
    /// Everything touched gets `now` as its time.
    pub fn new(root: OwnedFd, now: Timestamp) -> Self {
        Editor { root, now }
    }

    /// Applies one edit. After an error the view is abandoned.
    pub fn apply(&self, path: &GuestPath, op: &EditOp) -> Result<()> {
        match op {
            EditOp::WriteFile { content, attrs } => self.write_file(path, content, attrs),
            EditOp::AppendFile { content } => self.append_file(path, content),
            EditOp::MakeDir { attrs } => self.make_dir(path, attrs),
            EditOp::Symlink { target, attrs } => self.symlink(path, target, attrs),
            EditOp::Remove => self.remove(path),
            EditOp::SetAttrs { mode, owner } => self.set_attrs(path, *mode, *owner),
            EditOp::SetXattr { name, value } => self.set_xattr(path, name, value.as_deref()),
            EditOp::Rename { to } => self.rename(path, to),
        }
    }

    /// Writes everything out and lets go of the tree.
    pub fn finish(self) -> Result<()> {
        rustix::fs::syncfs(&self.root).map_err(|errno| Error::io(STAGE, "filesystem", "write everything out", errno.into()))
    }

    /// The open parent of `path`, and its name there. Nothing when a parent is missing and is not to be made. The root has no place.
    fn locate(&self, path: &GuestPath, missing: Missing) -> Result<Option<(OwnedFd, CString)>> {
        let Some(name) = path.file_name() else { return Err(invalid(path, "the root can't be replaced, moved or removed")) };
        let name = component(name).map_err(|error| Error::io(STAGE, path.to_string(), "take as a name", error))?;
        let parent = path.parent().unwrap_or_else(GuestPath::root);
        let Some(directory) = self.walk(path, &parent, missing)? else { return Ok(None) };
        Ok(Some((directory, name)))
    }

    /// Opens the directory `wanted` names, through symlinks.
    fn walk(&self, path: &GuestPath, wanted: &GuestPath, missing: Missing) -> Result<Option<OwnedFd>> {
        let mut pending: VecDeque<(Vec<u8>, bool)> = wanted.components().map(|name| (name.to_vec(), false)).collect();
        let open_root = || open_directory(&self.root, &GuestPath::root()).map_err(failed(path, "open the root"));
        let mut stack = vec![open_root()?];
        let mut links = 0;
        while let Some((name, from_link)) = pending.pop_front() {
            if name == b".." {
                if stack.len() == 1 {
                    return Err(link_refused(path, "climbs above the root"));
                }
                stack.pop();
                continue;
            }
            let top = stack.last().expect("the root is never popped");
            let name = component(&name).map_err(|error| Error::io(STAGE, path.to_string(), "take as a name", error))?;
            let place = Place { directory: top, name };
            match place.stat().map_err(failed(path, "look up"))?.map(|stat| file_type(&stat)) {
                Some(FileType::Directory) => {}
                Some(FileType::Symlink) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(link_refused(path, "loops"));
                    }
                    let target = readlinkat(top, &place.name, Vec::new()).map_err(failed(path, "read a symlink"))?.into_bytes();
                    if target.first() == Some(&b'/') {
                        stack.truncate(1);
                    }
                    let parts = target.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
                    for part in parts.collect::<Vec<_>>().into_iter().rev() {
                        pending.push_front((part.to_vec(), true));
                    }
                    continue;
                }
                None if missing == Missing::Tell => return Ok(None),
                None if from_link => return Err(link_refused(path, "dangles")),
                None => self.make_parent(path, &place)?,
                Some(_) if missing == Missing::Tell => return Ok(None),
                Some(_) => return Err(conflict(path, "something on the way is not a directory")),
            }
            let child = open_child(top, &place.name).map_err(failed(path, "open a directory on the way"))?;
            stack.push(child);
        }
        Ok(stack.pop())
    }

    fn make_parent(&self, path: &GuestPath, place: &Place<'_>) -> Result<()> {
        place.make_directory().map_err(failed(path, "make a parent directory"))?;
        self.settle(path, place, &Attrs::root(0o755), true)?;
        self.touch(path, place.directory)
    }

    /// Gives something new its attributes and nothing else: a default ACL of the directory it is in does not count.
    fn settle(&self, path: &GuestPath, place: &Place<'_>, attrs: &Attrs, has_mode: bool) -> Result<()> {
        if attrs.mode & !0o7777 != 0 {
            return Err(invalid(path, format!("mode {:#o} has more than permission bits", attrs.mode)));
        }
        for inherited in [ACCESS_ACL, DEFAULT_ACL] {
            match place.remove_xattr(inherited) {
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(failed(path, "drop an inherited ACL")(errno)),
            }
        }
        let bits = has_mode.then_some(attrs.mode);
        let wanted = Attributes { uid: attrs.uid, gid: attrs.gid, bits, xattrs: &attrs.xattrs, skip_default_acl: false };
        place.set_attributes(STAGE, path, &wanted)?;
        place.set_times(self.now).map_err(failed(path, "set times"))
    }

    fn touch(&self, path: &GuestPath, directory: &OwnedFd) -> Result<()> {
        futimens(directory, &times_of(self.now)).map_err(failed(path, "set the times of its directory"))
    }

    /// The place for something that is not a directory, with what was there removed.
    fn make_room(&self, path: &GuestPath) -> Result<(OwnedFd, CString)> {
        let (directory, name) = self.locate(path, Missing::Make)?.ok_or_else(|| absent(path))?;
        let place = Place { directory: &directory, name: name.clone() };
        match place.stat().map_err(failed(path, "look up"))? {
            Some(stat) if file_type(&stat) == FileType::Directory => return Err(conflict(path, "is a directory; it is not replaced")),
            Some(_) => place.unlink().map_err(failed(path, "replace what has the name"))?,
            None => {}
        }
        Ok((directory, name))
    }

    fn write_file(&self, path: &GuestPath, content: &[u8], attrs: &Attrs) -> Result<()> {
        let (directory, name) = self.make_room(path)?;
        let place = Place { directory: &directory, name };
        let mut file = std::fs::File::from(place.create_file().map_err(failed(path, "make a file"))?);
        file.write_all(content).map_err(|error| Error::io(STAGE, path.to_string(), format!("write {} bytes", content.len()), error))?;
        self.settle(path, &place, attrs, true)?;
        self.touch(path, &directory)
    }

    fn append_file(&self, path: &GuestPath, content: &[u8]) -> Result<()> {
        let (directory, name) = self.locate(path, Missing::Tell)?.ok_or_else(|| absent(path))?;
        let place = Place { directory: &directory, name };
        match place.stat().map_err(failed(path, "look up"))?.map(|stat| file_type(&stat)) {
            Some(FileType::RegularFile) => {}
            Some(_) => return Err(conflict(path, "is not a regular file; nothing is appended")),
            None => return Err(absent(path)),
        }
        // The first write of anybody drops capabilities, as if the content were no longer to be trusted with them.
        let capability = place.get_xattr(CAPABILITY).map_err(failed(path, "read capabilities"))?;
        let mut file = std::fs::File::from(place.open_to_append().map_err(failed(path, "open to append"))?);
        file.write_all(content).map_err(|error| Error::io(STAGE, path.to_string(), format!("append {} bytes", content.len()), error))?;
        if let Some(capability) = capability {
            place.set_xattr(CAPABILITY, &capability).map_err(|errno| refused_xattr(STAGE, path, CAPABILITY, errno))?;
        }
        futimens(file.as_fd(), &times_of(self.now)).map_err(failed(path, "set times"))
    }

    fn make_dir(&self, path: &GuestPath, attrs: &Attrs) -> Result<()> {
        if path.is_root() {
            return self.settle_existing(path, &Place { directory: &self.root, name: c".".to_owned() }, attrs);
        }
        let (directory, name) = self.locate(path, Missing::Make)?.ok_or_else(|| absent(path))?;
        let place = Place { directory: &directory, name };
        match place.stat().map_err(failed(path, "look up"))? {
            Some(stat) if file_type(&stat) == FileType::Directory => self.settle_existing(path, &place, attrs),
            Some(_) => Err(conflict(path, "is not a directory; it is not replaced by one")),
            None => {
                place.make_directory().map_err(failed(path, "make a directory"))?;
                self.settle(path, &place, attrs, true)?;
                self.touch(path, &directory)
            }
        }
    }

    fn settle_existing(&self, path: &GuestPath, place: &Place<'_>, attrs: &Attrs) -> Result<()> {
        let wanted = Attributes { uid: attrs.uid, gid: attrs.gid, bits: Some(attrs.mode & 0o7777), xattrs: &attrs.xattrs, skip_default_acl: false };
        place.set_attributes(STAGE, path, &wanted)
    }

    fn symlink(&self, path: &GuestPath, target: &[u8], attrs: &Attrs) -> Result<()> {
        if target.is_empty() || target.len() > 4095 || target.contains(&0) {
            return Err(invalid(path, format!("a symlink's target has 1 to 4095 bytes without NUL, not {}", target.len())));
        }
        let (directory, name) = self.make_room(path)?;
        let place = Place { directory: &directory, name };
        symlinkat(target, &directory, &place.name).map_err(failed(path, "make a symlink"))?;
        let wanted = Attributes { uid: attrs.uid, gid: attrs.gid, bits: None, xattrs: &attrs.xattrs, skip_default_acl: false };
        place.set_attributes(STAGE, path, &wanted)?;
        place.set_times(self.now).map_err(failed(path, "set times"))?;
        self.touch(path, &directory)
    }

    fn remove(&self, path: &GuestPath) -> Result<()> {
        let Some((directory, name)) = self.locate(path, Missing::Tell)? else { return Ok(()) };
        let place = Place { directory: &directory, name };
        match place.stat().map_err(failed(path, "look up"))? {
            None => return Ok(()),
            Some(stat) if file_type(&stat) == FileType::Directory => {
                remove_below(path, &place, 0)?;
                place.remove_directory().map_err(failed(path, "remove"))?;
            }
            Some(_) => place.unlink().map_err(failed(path, "remove"))?,
        }
        self.touch(path, &directory)
    }

    fn set_attrs(&self, path: &GuestPath, mode: Option<u16>, owner: Option<(u32, u32)>) -> Result<()> {
        let (directory, name);
        let place = if path.is_root() {
            Place { directory: &self.root, name: c".".to_owned() }
        } else {
            (directory, name) = self.locate(path, Missing::Tell)?.ok_or_else(|| absent(path))?;
            Place { directory: &directory, name }
        };
        let stat = place.stat().map_err(failed(path, "look up"))?.ok_or_else(|| absent(path))?;
        let is_link = file_type(&stat) == FileType::Symlink;
        if let Some(mode) = mode
            && (mode & !0o7777 != 0 || is_link)
        {
            return Err(invalid(path, format!("mode {mode:#o} can't be set on it")));
        }
        let capability = if owner.is_some() { place.get_xattr(CAPABILITY).map_err(failed(path, "read capabilities"))? } else { None };
        if let Some((uid, gid)) = owner {
            place.chown(uid, gid).map_err(failed(path, "set the owner"))?;
        }
        if !is_link {
            // A change of owner has dropped set-user-id.
            let kept = (stat.st_mode & 0o7777) as u16;
            place.chmod(mode.unwrap_or(kept)).map_err(failed(path, "set the mode"))?;
        }
        if let Some(capability) = capability {
            place.set_xattr(CAPABILITY, &capability).map_err(|errno| refused_xattr(STAGE, path, CAPABILITY, errno))?;
        }
        Ok(())
    }

    fn set_xattr(&self, path: &GuestPath, name: &[u8], value: Option<&[u8]>) -> Result<()> {
        let (directory, file);
        let place = if path.is_root() {
            Place { directory: &self.root, name: c".".to_owned() }
        } else {
            (directory, file) = self.locate(path, Missing::Tell)?.ok_or_else(|| absent(path))?;
            Place { directory: &directory, name: file }
        };
        if place.stat().map_err(failed(path, "look up"))?.is_none() {
            return Err(absent(path));
        }
        let done = match value {
            Some(value) => place.set_xattr(name, value),
            None => place.remove_xattr(name),
        };
        done.map_err(|errno| refused_xattr(STAGE, path, name, errno))
    }

    fn rename(&self, from: &GuestPath, to: &GuestPath) -> Result<()> {
        let (directory, name) = self.locate(from, Missing::Tell)?.ok_or_else(|| absent(from))?;
        let source = Place { directory: &directory, name };
        let moved = source.stat().map_err(failed(from, "look up"))?.ok_or_else(|| absent(from))?;
        let (into, new_name) = self.locate(to, Missing::Make)?.ok_or_else(|| absent(to))?;
        let target = Place { directory: &into, name: new_name };
        if let Some(found) = target.stat().map_err(failed(to, "look up"))? {
            if (found.st_dev, found.st_ino) == (moved.st_dev, moved.st_ino) {
                return Ok(());
            }
            if file_type(&found) == FileType::Directory {
                return Err(conflict(to, "is a directory; it is not replaced"));
            }
            target.unlink().map_err(failed(to, "replace what has the name"))?;
        }
        renameat(&directory, &source.name, &into, &target.name).map_err(|errno| match errno {
            Errno::INVAL => invalid(to, format!("is inside {from}, which moves")),
            errno => failed(from, "rename")(errno),
        })?;
        self.touch(from, &directory)?;
        self.touch(to, &into)
    }
}

/// Removes everything in the directory at `place`. The tree can't change meanwhile, and no name is followed.
fn remove_below(path: &GuestPath, place: &Place<'_>, depth: usize) -> Result<()> {
    if depth >= DEPTH_MAX {
        return Err(Error::new(Kind::Unsupported, STAGE, path.to_string(), format!("has more than {DEPTH_MAX} levels below it")));
    }
    let directory = open_child(place.directory, &place.name).map_err(failed(path, "open to remove"))?;
    // Names are collected first: removing while reading may skip some.
    let mut names = Vec::new();
    for entry in Dir::read_from(&directory).map_err(failed(path, "list to remove"))? {
        let entry = entry.map_err(failed(path, "list to remove"))?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    for name in names {
        let child = Place { directory: &directory, name };
        let is_directory = child.stat().map_err(failed(path, "look up to remove"))?.is_some_and(|stat| file_type(&stat) == FileType::Directory);
        if is_directory {
            remove_below(path, &child, depth + 1)?;
            child.remove_directory().map_err(failed(path, "remove"))?;
        } else {
            rustix::fs::unlinkat(&directory, &child.name, AtFlags::empty()).map_err(failed(path, "remove"))?;
        }
    }
    Ok(())
}
