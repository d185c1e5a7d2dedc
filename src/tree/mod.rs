//! The root filesystem as a stream of entries.
//!
//! A tarball is read once, front to back: `archive` turns bytes into [`Entry`] values under limits (`squashfs` does it of an image), and a [`TreeSink`]
//! consumes them. Member
//! names become [`GuestPath`]s (no `..`, no NUL, bounded); they never become paths of the host. Symlink targets and xattr values are data.

pub mod archive;
pub mod below;
pub mod collect;
pub mod decompress;
pub mod model;
pub mod squashfs;

use std::io::{self, Read};

use crate::{
    error::{Error, Result, Stage},
    names::GuestPath,
    units::Timestamp,
};

/// Ownership, permission bits, time and extended attributes of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permission bits with set-user-id, set-group-id and sticky: `0o0000..=0o7777`.
    pub mode: u16,
    /// Numeric owner, as in the archive; names are ignored (they would need the guest's NSS).
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Modification time; also used for the other times of the inode.
    pub mtime: Timestamp,
    /// Extended attributes, sorted by name, names unique.
    pub xattrs: Vec<Xattr>,
}

/// An extended attribute with its full name (`security.capability`, `system.posix_acl_access`, `user.x`) and the value as `getxattr(2)` gives it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Xattr {
    /// Full name with its namespace prefix.
    pub name: Vec<u8>,
    /// Raw value.
    pub value: Vec<u8>,
}

/// A run of data of a file, bytes. Between spans there are holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Offset in the file.
    pub offset: u64,
    /// Length; not zero.
    pub len: u64,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A regular file of `size` bytes. The data reader gives the bytes of `spans` one after another; spans are ascending, disjoint and end at
    /// or before `size`. A file without holes has one span (none when empty).
    File {
        /// Size in bytes, holes included.
        size: u64,
        /// Where there is data.
        spans: Vec<Span>,
    },
    /// A symbolic link; 1..=4095 bytes, no NUL.
    Symlink {
        /// The target, never followed.
        target: Vec<u8>,
    },
    /// Another name of an entry that came earlier in the archive.
    HardLink {
        /// The earlier name.
        target: GuestPath,
    },
    /// A character device node.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device node.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A UNIX socket (only from trees and squashfs images, never from tar).
    Socket,
}

/// One member of a root filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it is in the guest.
    pub path: GuestPath,
    /// What it is.
    pub kind: EntryKind,
    /// Owner, mode, time, xattrs. For a hard link the archive's values are carried but sinks ignore them.
    pub meta: Meta,
}

/// Consumes a root filesystem in archive order.
///
/// Rules that every sink keeps:
/// - a missing parent directory is made, mode 0755, owner 0:0, mtime 0, and takes the metadata of a later member of that name;
/// - the same path again: a directory over a directory updates its metadata and keeps its children; any other combination replaces the old
///   entry, except that a non-directory never replaces a directory that is not empty and nothing is ever created through a symlink: a member
///   whose parent path leads through a non-directory is refused (`Kind::Corrupt`);
/// - a hard link whose target is missing or a directory is refused; a hard link onto itself changes nothing;
/// - `/` itself may be a member and gives the root directory's metadata.
///
/// `data` is read to its end for files and is empty for everything else.
pub trait TreeSink {
    /// Takes one entry.
    fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<()>;
}

/// Turns an error of a reader of this module back into what it was: readers that have more to say than an errno carry a [`crate::error::Error`]
/// inside the [`io::Error`], because `Read` has no other place for it. Anything else is classified as [`Error::io`] does.
pub fn error_of_read(error: io::Error, stage: Stage, object: &str, doing: &str) -> Error {
    match error.downcast::<Error>() {
        Ok(inner) => inner,
        Err(error) => Error::io(stage, object, doing, error),
    }
}
