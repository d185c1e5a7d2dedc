//! Edits: what injection wants changed in a guest's tree. Pure data, the same for every filesystem and every target.

use crate::{names::GuestPath, tree::Xattr, units::Timestamp};

/// One change of the guest's tree, with the reason that the report gives for it.
#[derive(Clone, PartialEq, Eq)]
pub struct Edit {
    /// The path it applies to.
    pub path: GuestPath,
    /// What to do.
    pub op: EditOp,
    /// Why, for the report; one clause, e.g. `static addresses for eth0`.
    pub why: String,
    /// Whether the content is secret: it is then redacted from plans, reports and logs.
    pub secret: bool,
}

/// The kinds of change. Missing parent directories are made 0755 0:0. The last component is never followed when it is a symlink: writing
/// replaces the link itself. Intermediate components that are symlinks are followed inside the tree (at most 40, as Linux does); a link that
/// dangles, loops or climbs is an error.
#[derive(Clone, PartialEq, Eq)]
pub enum EditOp {
    /// Create a regular file or replace whatever non-directory is there (a fresh inode: other hard links keep the old content).
    WriteFile {
        /// All of it.
        content: Vec<u8>,
        /// Owner, mode and xattrs.
        attrs: Attrs,
    },
    /// Append to an existing regular file, keeping its inode.
    AppendFile {
        /// The bytes to add.
        content: Vec<u8>,
    },
    /// Make a directory; if it is there its owner and mode are set.
    MakeDir {
        /// Owner, mode and xattrs.
        attrs: Attrs,
    },
    /// Create a symlink or replace whatever non-directory is there.
    Symlink {
        /// The target, 1..=4095 bytes.
        target: Vec<u8>,
        /// Owner; mode is ignored.
        attrs: Attrs,
    },
    /// Remove a file, link or whole directory tree. Nothing happens when it is not there.
    Remove,
    /// Set mode and owner of what is there.
    SetAttrs {
        /// New permission bits, if given.
        mode: Option<u16>,
        /// New owner and group, if given.
        owner: Option<(u32, u32)>,
    },
    /// Set one extended attribute, or remove it when there is no value.
    SetXattr {
        /// Full name.
        name: Vec<u8>,
        /// New value.
        value: Option<Vec<u8>>,
    },
    /// Rename within the tree; replaces a non-directory at the new path.
    Rename {
        /// The new path.
        to: GuestPath,
    },
}

/// Owner, permission bits and xattrs for something an edit makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attrs {
    /// Permission bits `0..=0o7777`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<Xattr>,
}

impl Attrs {
    /// Owned by root.
    pub fn root(mode: u16) -> Self {
        Attrs { mode, uid: 0, gid: 0, xattrs: Vec::new() }
    }
}

/// All that changes in one filesystem for one instance.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct EditRequest {
    /// In order; later ones see the effect of earlier ones.
    pub edits: Vec<Edit>,
    /// New filesystem UUID.
    pub uuid: Option<[u8; 16]>,
    /// New label, at most 16 bytes for ext4, 12 for XFS.
    pub label: Option<String>,
    /// Grow the filesystem to this many bytes (rounded down to its block size); never smaller than it is.
    pub size_bytes: Option<u64>,
    /// The time stamped on everything the edits touch; an input, so that a retry gives the same bytes.
    pub now: Timestamp,
}

impl std::fmt::Debug for Edit {
    /// Never prints contents: they may hold secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} ({})", self.op.verb(), self.path, self.why)
    }
}

impl EditOp {
    /// The word for it in plans and reports.
    pub fn verb(&self) -> &'static str {
        match self {
            EditOp::WriteFile { .. } => "write",
            EditOp::AppendFile { .. } => "append",
            EditOp::MakeDir { .. } => "mkdir",
            EditOp::Symlink { .. } => "symlink",
            EditOp::Remove => "remove",
            EditOp::SetAttrs { .. } => "set-attrs",
            EditOp::SetXattr { .. } => "set-xattr",
            EditOp::Rename { .. } => "rename",
        }
    }
}
