//! A mounted tree through a directory handle.
//!
//! Nothing here is given a path of the host, and no path is made by joining: a directory is opened beneath the root with openat2(2) under
//! `RESOLVE_IN_ROOT | NO_MAGICLINKS | NO_XDEV | NO_SYMLINKS`, and everything else happens to one name in one open directory, never following that
//! name. Ownership is set before the mode (chown clears set-user-id), the mode before xattrs (chmod changes ACLs), times last.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat, lgetxattr,
        llistxattr, lremovexattr, lsetxattr, mkdirat, openat2, statat, unlinkat, utimensat,
    },
    io::Errno,
};

use crate::{
    error::{Error, Kind, Result, Stage},
    names::GuestPath,
    tree::Xattr,
    units::Timestamp,
};

/// The xattr that new entries of a directory inherit from it.
pub(super) const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";
/// The xattr that an inherited default ACL becomes.
pub(super) const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
/// File capabilities, which the kernel drops on chown and on writes.
pub(super) const CAPABILITY: &[u8] = b"security.capability";
/// Largest xattr value of Linux (XATTR_SIZE_MAX) and largest list of names (XATTR_LIST_MAX), bytes.
const XATTR_BYTES_MAX: usize = 65536;

const OPEN_DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);

/// One name in one open directory.
pub(super) struct Place<'a> {
    pub directory: &'a OwnedFd,
    pub name: CString,
}

/// How beneath-the-root opens resolve. `NO_SYMLINKS` also for the last component.
fn confined() -> ResolveFlags {
    ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS
}

/// Opens a directory by its path in the tree, through no symlink. ENOENT, ENOTDIR and ELOOP (a symlink on the way) are the caller's to read.
pub(super) fn open_directory(root: &OwnedFd, path: &GuestPath) -> rustix::io::Result<OwnedFd> {
    let relative = path.as_bytes().strip_prefix(b"/").filter(|rest| !rest.is_empty()).unwrap_or(b".");
    openat2(root, relative, OPEN_DIRECTORY, Mode::empty(), confined())
}

/// Opens what is at `path` for reading, through symlinks that stay in the tree. Nothing when there is nothing, or only a loop of links.
pub(super) fn open_to_read(root: &OwnedFd, path: &GuestPath) -> rustix::io::Result<Option<OwnedFd>> {
    let relative = path.as_bytes().strip_prefix(b"/").filter(|rest| !rest.is_empty()).unwrap_or(b".");
    // Nobody waits for the other end of a FIFO, and no device is there to be opened (nodev).
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    match openat2(root, relative, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV) {
        Ok(opened) => Ok(Some(opened)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS | Errno::NXIO | Errno::NAMETOOLONG) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Opens the directory called `name` in `directory`.
pub(super) fn open_child(directory: &OwnedFd, name: &CString) -> rustix::io::Result<OwnedFd> {
    openat2(directory, name, OPEN_DIRECTORY, Mode::empty(), confined())
}

/// A component as the kernel takes it.
pub(super) fn component(name: &[u8]) -> io::Result<CString> {
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    CString::new(name).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Permission bits for rustix.
pub(super) fn mode_of(bits: u16) -> Mode {
    Mode::from_raw_mode(u32::from(bits & 0o7777))
}

/// Both times of an inode.
pub(super) fn times_of(time: Timestamp) -> Timestamps {
    let spec = Timespec { tv_sec: time.secs, tv_nsec: time.nanos.into() };
    Timestamps { last_access: spec, last_modification: spec }
}

impl Place<'_> {
    /// What has this name, if anything.
    pub fn stat(&self) -> rustix::io::Result<Option<Stat>> {
        match statat(self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Creates a regular file that must not exist and opens it for writing.
    pub fn create_file(&self) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // RESOLVE_NO_SYMLINKS and O_EXCL: the name is new or it fails.
        openat2(self.directory, &self.name, flags, Mode::RUSR | Mode::WUSR, confined())
    }

    /// Opens an existing regular file for appending.
    pub fn open_to_append(&self) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        openat2(self.directory, &self.name, flags, Mode::empty(), confined())
    }

    /// Makes a directory that must not exist.
    pub fn make_directory(&self) -> rustix::io::Result<()> {
        mkdirat(self.directory, &self.name, Mode::RWXU)
    }

    /// Removes a name that is not a directory.
    pub fn unlink(&self) -> rustix::io::Result<()> {
        unlinkat(self.directory, &self.name, AtFlags::empty())
    }

    /// Removes an empty directory.
    pub fn remove_directory(&self) -> rustix::io::Result<()> {
        unlinkat(self.directory, &self.name, AtFlags::REMOVEDIR)
    }

    /// Sets owner and group, of a symlink itself.
    pub fn chown(&self, uid: u32, gid: u32) -> rustix::io::Result<()> {
        // (uid_t)-1 means "leave it" to chown(2); no inode can be owned by it.
        if uid == u32::MAX || gid == u32::MAX {
            return Err(rustix::io::Errno::INVAL);
        }
        chownat(self.directory, &self.name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Sets permission bits. Only for what is known not to be a symlink: fchmodat(2) follows them, and only this process is in the tree.
    pub fn chmod(&self, bits: u16) -> rustix::io::Result<()> {
        chmodat(self.directory, &self.name, mode_of(bits), AtFlags::empty())
    }

    /// Sets both times, of a symlink itself.
    pub fn set_times(&self, time: Timestamp) -> rustix::io::Result<()> {
        utimensat(self.directory, &self.name, &times_of(time), AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Runs an xattr call that takes a path with the directory as the working directory: there is no form of it with a directory handle before
    /// Linux 6.13, and neither symlinks nor device nodes can be opened for the form with a file handle. The worker's thread is its only user.
    fn here<T>(&self, call: impl FnOnce(&CString) -> rustix::io::Result<T>) -> rustix::io::Result<T> {
        rustix::process::fchdir(self.directory)?;
        let result = call(&self.name);
        // So that no directory of the tree is held when it is unmounted.
        rustix::process::chdir("/")?;
        result
    }

    /// Sets an extended attribute, of a symlink itself.
    pub fn set_xattr(&self, name: &[u8], value: &[u8]) -> rustix::io::Result<()> {
        self.here(|file| lsetxattr(file, name, value, XattrFlags::empty()))
    }

    /// Removes an extended attribute; done already is success.
    pub fn remove_xattr(&self, name: &[u8]) -> rustix::io::Result<()> {
        match self.here(|file| lremovexattr(file, name)) {
            Err(rustix::io::Errno::NODATA) => Ok(()),
            other => other,
        }
    }

    /// The value of an extended attribute, if there is one.
    pub fn get_xattr(&self, name: &[u8]) -> rustix::io::Result<Option<Vec<u8>>> {
        let mut value = vec![0; XATTR_BYTES_MAX];
        match self.here(|file| lgetxattr(file, name, &mut value[..])) {
            Ok(len) => {
                value.truncate(len);
                Ok(Some(value))
            }
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Removes every extended attribute that can be listed, except security labels, which the kernel owns.
    pub fn clear_xattrs(&self) -> rustix::io::Result<()> {
        let mut list = vec![0; XATTR_BYTES_MAX];
        let len = match self.here(|file| llistxattr(file, &mut list[..])) {
            Ok(len) => len,
            Err(rustix::io::Errno::OPNOTSUPP) => 0,
            Err(errno) => return Err(errno),
        };
        for name in list[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty() && *name != b"security.selinux") {
            self.remove_xattr(name)?;
        }
        Ok(())
    }

    /// Owner, mode and xattrs in the order that keeps each from undoing another. `bits` is nothing for a symlink. Default ACLs are left out when
    /// `skip_default_acl`: they would be inherited by entries that come later.
    pub fn set_attributes(&self, stage: Stage, path: &GuestPath, wanted: &Attributes<'_>) -> Result<()> {
        let failed = |doing: &str, errno: rustix::io::Errno| Error::io(stage, path.to_string(), doing, errno.into());
        self.chown(wanted.uid, wanted.gid).map_err(|errno| failed(&format!("set owner {}:{}", wanted.uid, wanted.gid), errno))?;
        if let Some(bits) = wanted.bits {
            self.chmod(bits).map_err(|errno| failed(&format!("set mode {bits:#o}"), errno))?;
        }
        for xattr in wanted.xattrs {
            if wanted.skip_default_acl && xattr.name == DEFAULT_ACL {
                continue;
            }
            self.set_xattr(&xattr.name, &xattr.value).map_err(|errno| refused_xattr(stage, path, &xattr.name, errno))?;
        }
        Ok(())
    }
}

/// What [`Place::set_attributes`] sets.
pub(super) struct Attributes<'a> {
    pub uid: u32,
    pub gid: u32,
    pub bits: Option<u16>,
    pub xattrs: &'a [Xattr],
    pub skip_default_acl: bool,
}

/// An xattr that the kernel will not store there (a user attribute on a symlink, an ACL that is none) is the tree's fault, except for lack of room.
pub(super) fn refused_xattr(stage: Stage, path: &GuestPath, name: &[u8], errno: rustix::io::Errno) -> Error {
    let doing = format!("set extended attribute {}", String::from_utf8_lossy(name));
    match errno {
        rustix::io::Errno::PERM | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL | rustix::io::Errno::RANGE | rustix::io::Errno::TOOBIG => {
            let text = format!("{doing}: the filesystem does not take it there");
            Error::new(Kind::Unsupported, stage, path.to_string(), text).with_reason("XATTR_REFUSED").with_source(io::Error::from(errno))
        }
        _ => Error::io(stage, path.to_string(), doing, errno.into()),
    }
}

/// The type of what a stat describes.
pub(super) fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Room and inodes of the filesystem that the handle is on.
pub(super) fn free_bytes(root: &OwnedFd) -> rustix::io::Result<u64> {
    let stat = rustix::fs::fstatvfs(root.as_fd())?;
    Ok(stat.f_bfree.saturating_mul(stat.f_frsize))
}

/// Opens the root of what is mounted at `target`.
pub(super) fn open_root(target: &std::path::Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(CWD, target, OPEN_DIRECTORY, Mode::empty())
}
