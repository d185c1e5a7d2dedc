//! The worker's side of a build: tree entries into a mounted, empty filesystem, by the rules of [`crate::tree::TreeSink`].
//!
//! Everything that later entries would disturb is kept back to the end: times of directories, and default ACLs, which new entries would inherit.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use rustix::{
    fs::{AtFlags, FileType, Mode, Stat, futimens, linkat, mknodat, symlinkat},
    io::Errno,
};

use super::confined::{Attributes, DEFAULT_ACL, Place, component, file_type, open_child, open_directory, refused_xattr, times_of};
use crate::{
    error::{Error, Kind, Result, Stage},
    names::GuestPath,
    tree::{Entry, EntryKind, Meta, Span},
    units::Timestamp,
};

const STAGE: Stage = Stage::Golden;
/// Bytes per write to a file.
const COPY_BYTES: usize = 256 << 10;

/// What a directory gets at the end.
#[derive(Default)]
struct Deferred {
    mtime: Timestamp,
    default_acl: Option<Vec<u8>>,
}

/// Fills one filesystem.
pub(super) struct Filler {
    root: OwnedFd,
    directories: BTreeMap<GuestPath, Deferred>,
    inodes: u64,
    /// The directory the last entry was in: archives list a directory's entries together.
    last_parent: Option<(GuestPath, OwnedFd)>,
}

impl Filler {
    /// `root` is the root of an empty filesystem. What has no time of its own gets `epoch`.
    pub fn new(root: OwnedFd, epoch: Timestamp) -> Result<Self> {
        let mut directories = BTreeMap::from([(GuestPath::root(), Deferred { mtime: epoch, default_acl: None })]);
        let mut inodes = 1;
        let failed = |errno: Errno| Error::io(STAGE, "/", "prepare the root directory", errno.into());
        rustix::fs::fchown(&root, Some(rustix::fs::Uid::ROOT), Some(rustix::fs::Gid::ROOT)).map_err(failed)?;
        rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755)).map_err(failed)?;
        // ext4 comes with a directory of its own.
        let lost = GuestPath::new("/lost+found").map_err(|why| Error::internal(STAGE, "/", why))?;
        if open_directory(&root, &lost).is_ok() {
            directories.insert(lost, Deferred { mtime: epoch, default_acl: None });
            inodes += 1;
        }
        Ok(Filler { root, directories, inodes, last_parent: None })
    }

    /// Inodes made so far, the root included.
    pub fn inodes(&self) -> u64 {
        self.inodes
    }

    /// Takes one entry; `data` is read for files. On an error the tree is as it was, or has the entry half-made: the build is then abandoned.
    pub fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<()> {
        let path = &entry.path;
        let Some(name) = path.file_name() else {
            return match entry.kind {
                EntryKind::Directory => self.root_metadata(&entry.meta),
                _ => Err(refuse(path, "the root of the tree can only be a directory")),
            };
        };
        let name = component(name).map_err(|error| Error::io(STAGE, path.to_string(), "take as a name", error))?;
        let parent = path.parent().unwrap_or_else(GuestPath::root);
        // Before anything is removed: a hard link may be refused, or name itself.
        if let EntryKind::HardLink { target } = &entry.kind
            && self.link_target(path, target)?
        {
            return Ok(());
        }
        let directory = self.parent(path, &parent)?;
        let place = Place { directory: &directory, name };
        let made = self.put(entry, &place, data);
        self.last_parent = Some((parent, directory));
        made
    }

    fn put(&mut self, entry: &Entry, place: &Place<'_>, data: &mut dyn Read) -> Result<()> {
        let path = &entry.path;
        let failed = |doing: &str, errno: Errno| Error::io(STAGE, path.to_string(), doing, errno.into());
        let found = place.stat().map_err(|errno| failed("look up", errno))?;
        if entry.kind == EntryKind::Directory {
            match found {
                Some(stat) if file_type(&stat) == FileType::Directory => place.clear_xattrs().map_err(|errno| failed("replace xattrs", errno))?,
                Some(stat) => {
                    self.remove(path, place, &stat)?;
                    self.make_directory(path, place)?;
                }
                None => self.make_directory(path, place)?,
            }
            return self.directory_metadata(path, place, &entry.meta);
        }
        if let Some(stat) = found {
            self.remove(path, place, &stat)?;
        }
        let meta = &entry.meta;
        let mut bits = Some(meta.mode);
        match &entry.kind {
            EntryKind::Directory => {}
            EntryKind::HardLink { target } => return self.link(path, place, target),
            EntryKind::File { size, spans } => return self.file(path, place, (*size, spans), meta, data),
            EntryKind::Symlink { target } => {
                bits = None;
                symlinkat(&target[..], place.directory, &place.name).map_err(|errno| failed("make a symlink", errno))?;
            }
            EntryKind::CharDevice { major, minor } => node(path, place, FileType::CharacterDevice, (*major, *minor))?,
            EntryKind::BlockDevice { major, minor } => node(path, place, FileType::BlockDevice, (*major, *minor))?,
            EntryKind::Fifo => node(path, place, FileType::Fifo, (0, 0))?,
            EntryKind::Socket => node(path, place, FileType::Socket, (0, 0))?,
        }
        self.inodes += 1;
        place.set_attributes(STAGE, path, &attributes(meta, bits))?;
        place.set_times(meta.mtime).map_err(|errno| failed("set times", errno))
    }

    /// Opens the parent directory, making what is missing of it.
    fn parent(&mut self, path: &GuestPath, parent: &GuestPath) -> Result<OwnedFd> {
        if let Some((last, directory)) = self.last_parent.take()
            && last == *parent
        {
            return Ok(directory);
        }
        match open_directory(&self.root, parent) {
            Ok(directory) => Ok(directory),
            Err(Errno::NOENT) => self.make_parents(path, parent),
            Err(errno) => Err(not_through(path, parent, errno)),
        }
    }

    fn make_parents(&mut self, path: &GuestPath, parent: &GuestPath) -> Result<OwnedFd> {
        let failed = |errno: Errno| Error::io(STAGE, parent.to_string(), "make the parent directory", errno.into());
        let mut at = GuestPath::root();
        let mut directory = open_directory(&self.root, &at).map_err(failed)?;
        for name in parent.components() {
            at = at.join(name).map_err(|why| Error::internal(STAGE, parent.to_string(), why))?;
            let name = component(name).map_err(|error| Error::io(STAGE, at.to_string(), "take as a name", error))?;
            directory = match open_child(&directory, &name) {
                Ok(child) => child,
                Err(Errno::NOENT) => {
                    let place = Place { directory: &directory, name };
                    self.make_directory(&at, &place)?;
                    let implicit = Meta { mode: 0o755, ..Meta::default() };
                    self.directory_metadata(&at, &place, &implicit)?;
                    open_child(&directory, &place.name).map_err(failed)?
                }
                Err(errno) => return Err(not_through(path, parent, errno)),
            };
        }
        Ok(directory)
    }

    fn make_directory(&mut self, path: &GuestPath, place: &Place<'_>) -> Result<()> {
        place.make_directory().map_err(|errno| Error::io(STAGE, path.to_string(), "make a directory", errno.into()))?;
        self.inodes += 1;
        Ok(())
    }

    fn directory_metadata(&mut self, path: &GuestPath, place: &Place<'_>, meta: &Meta) -> Result<()> {
        place.set_attributes(STAGE, path, &attributes(meta, Some(meta.mode)))?;
        self.defer(path, meta);
        Ok(())
    }

    fn defer(&mut self, path: &GuestPath, meta: &Meta) {
        let default_acl = meta.xattrs.iter().find(|xattr| xattr.name == DEFAULT_ACL).map(|xattr| xattr.value.clone());
        self.directories.insert(path.clone(), Deferred { mtime: meta.mtime, default_acl });
    }

    fn root_metadata(&mut self, meta: &Meta) -> Result<()> {
        // "." is a name in the root that is the root.
        let place = Place { directory: &self.root, name: c".".to_owned() };
        place.clear_xattrs().map_err(|errno| Error::io(STAGE, "/", "replace xattrs", errno.into()))?;
        place.set_attributes(STAGE, &GuestPath::root(), &attributes(meta, Some(meta.mode)))?;
        self.defer(&GuestPath::root(), meta);
        Ok(())
    }

    /// Removes what a new entry replaces. A directory that is not empty is never replaced by something else.
    fn remove(&mut self, path: &GuestPath, place: &Place<'_>, stat: &Stat) -> Result<()> {
        let failed = |errno: Errno| Error::io(STAGE, path.to_string(), "replace what has the name", errno.into());
        if file_type(stat) == FileType::Directory {
            match place.remove_directory() {
                Ok(()) => {
                    self.directories.remove(path);
                    self.inodes = self.inodes.saturating_sub(1);
                }
                Err(Errno::NOTEMPTY | Errno::EXIST) => return Err(refuse(path, "would replace a directory that is not empty")),
                Err(errno) => return Err(failed(errno)),
            }
        } else {
            place.unlink().map_err(failed)?;
            if stat.st_nlink == 1 {
                self.inodes = self.inodes.saturating_sub(1);
            }
        }
        Ok(())
    }

    /// Checks the target of a hard link; true when it is the link itself.
    fn link_target(&mut self, path: &GuestPath, target: &GuestPath) -> Result<bool> {
        let missing = || refuse(path, format!("is a hard link to {target}, which is not there"));
        let (Some(name), Some(parent)) = (target.file_name(), target.parent()) else {
            return Err(refuse(path, format!("is a hard link to {target}, a directory")));
        };
        let directory = match open_directory(&self.root, &parent) {
            Ok(directory) => directory,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Err(missing()),
            Err(errno) => return Err(Error::io(STAGE, path.to_string(), format!("look up its target {target}"), errno.into())),
        };
        let name = component(name).map_err(|error| Error::io(STAGE, path.to_string(), "take as a name", error))?;
        let stat = Place { directory: &directory, name }.stat();
        match stat.map_err(|errno| Error::io(STAGE, path.to_string(), format!("look up its target {target}"), errno.into()))? {
            None => Err(missing()),
            Some(stat) if file_type(&stat) == FileType::Directory => Err(refuse(path, format!("is a hard link to {target}, a directory"))),
            Some(_) => Ok(path == target),
        }
    }

    fn link(&mut self, path: &GuestPath, place: &Place<'_>, target: &GuestPath) -> Result<()> {
        let failed = |errno: Errno| Error::io(STAGE, path.to_string(), format!("make a hard link to {target}"), errno.into());
        let parent = open_directory(&self.root, &target.parent().unwrap_or_else(GuestPath::root)).map_err(failed)?;
        // No flag: a symlink itself gets another name.
        linkat(&parent, target.file_name().unwrap_or_default(), place.directory, &place.name, AtFlags::empty()).map_err(failed)
    }

    fn file(&mut self, path: &GuestPath, place: &Place<'_>, (size, spans): (u64, &[Span]), meta: &Meta, data: &mut dyn Read) -> Result<()> {
        let failed = |doing: String, error: io::Error| Error::io(STAGE, path.to_string(), doing, error);
        let file = std::fs::File::from(place.create_file().map_err(|errno| failed("make a file".into(), errno.into()))?);
        self.inodes += 1;
        let mut buffer = vec![0; COPY_BYTES];
        for span in spans {
            let (mut at, mut left) = (span.offset, span.len);
            while left > 0 {
                let want = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                data.read_exact(&mut buffer[..want]).map_err(|error| failed("read its data".into(), error))?;
                file.write_all_at(&buffer[..want], at).map_err(|error| failed(format!("write {want} bytes at {at}"), error))?;
                at = at.checked_add(want as u64).ok_or_else(|| refuse(path, "has data beyond the largest offset"))?;
                left -= want as u64;
            }
        }
        file.set_len(size).map_err(|error| failed(format!("set its size to {size}"), error))?;
        place.set_attributes(STAGE, path, &attributes(meta, Some(meta.mode)))?;
        futimens(file.as_fd(), &times_of(meta.mtime)).map_err(|errno| failed("set times".into(), errno.into()))
    }

    /// Sets what was kept back, writes everything out, and gives the free bytes.
    pub fn finish(mut self) -> Result<u64> {
        self.last_parent = None;
        // Deepest first, since setting an ACL or a time changes nothing above.
        for (path, deferred) in self.directories.iter().rev() {
            let failed = |doing: &str, errno: Errno| Error::io(STAGE, path.to_string(), doing, errno.into());
            let directory = open_directory(&self.root, path).map_err(|errno| failed("open to complete", errno))?;
            if let Some(acl) = &deferred.default_acl {
                let place = Place { directory: &directory, name: c".".to_owned() };
                place.set_xattr(DEFAULT_ACL, acl).map_err(|errno| refused_xattr(STAGE, path, DEFAULT_ACL, errno))?;
            }
            futimens(&directory, &times_of(deferred.mtime)).map_err(|errno| failed("set times", errno))?;
        }
        let failed = |errno: Errno| Error::io(STAGE, "filesystem", "write everything out", errno.into());
        rustix::fs::syncfs(&self.root).map_err(failed)?;
        super::confined::free_bytes(&self.root).map_err(failed)
    }
}

fn attributes(meta: &Meta, bits: Option<u16>) -> Attributes<'_> {
    Attributes { uid: meta.uid, gid: meta.gid, bits, xattrs: &meta.xattrs, skip_default_acl: true }
}

fn node(path: &GuestPath, place: &Place<'_>, kind: FileType, (major, minor): (u32, u32)) -> Result<()> {
    let made = mknodat(place.directory, &place.name, kind, Mode::RUSR | Mode::WUSR, rustix::fs::makedev(major, minor));
    made.map_err(|errno| match errno {
        // XFS takes 9 bits of major and 18 of minor number (xfs_vn_mknod).
        Errno::INVAL => Error::new(Kind::Unsupported, STAGE, path.to_string(), format!("this filesystem can't store device number {major}:{minor}")),
        errno => Error::io(STAGE, path.to_string(), format!("make a {kind:?}"), errno.into()),
    })
}

fn refuse(path: &GuestPath, what: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, STAGE, path.to_string(), what)
}

fn not_through(path: &GuestPath, parent: &GuestPath, errno: Errno) -> Error {
    match errno {
        Errno::NOTDIR | Errno::LOOP => refuse(path, format!("its parent {parent} leads through something that is not a directory")),
        errno => Error::io(STAGE, path.to_string(), format!("open its parent {parent}"), errno.into()),
    }
}
