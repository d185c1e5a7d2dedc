//! Devices of an instance beside its root: data that outlives it, swap, scratch space, configuration seeds.
//!
//! ```text
//! resolve   devices of the manifest + those of the request → ResolvedDevice         pure
//! mounts    what the root's fstab says about them                                   reads the golden
//! content   a sparse file or a patch with what a new device holds                   writes in the store's tmp only
//! ```
//!
//! A new device goes the way of a root: what it holds is a disk file in the store's `tmp` plus a block patch, and a target makes a volume of that. A data
//! volume that the instance has already is kept as it is: nothing opens it.

pub mod content;
pub mod mounts;
mod resolve;

use crate::{
    fs::{FsKind, Profile},
    guest::cloud_seed::SeedSpec,
    mapping::Role,
    names::{DeviceName, GuestPath, VolumeName},
    store::records::{VolumeKey, VolumeRecord},
    target::{Pool, VolumeFormat, VolumeOptions},
};

pub use resolve::resolve;

/// Devices of one instance, the root not counted.
pub const DEVICES_MAX: usize = 16;
/// Where the data device is mounted when the persistent paths are several, or files.
pub const PERSISTENT_MOUNT: &str = "/.cloudlet/persistent";

/// A device whose names all mean something.
#[derive(Debug, Clone)]
pub struct ResolvedDevice {
    /// Where it stands in the request or manifest, for messages: `spec.devices[1]`, `devices[2]`.
    pub field: String,
    /// What it is called; unique in the instance.
    pub name: DeviceName,
    /// What it is for; never a root.
    pub role: Role,
    /// Its pool.
    pub pool: Pool,
    /// Its name there.
    pub volume: VolumeName,
    /// How it is stored.
    pub format: VolumeFormat,
    /// Its size in bytes, a multiple of 4096; a block device without one has the size it has.
    pub size_bytes: Option<u64>,
    /// What it holds when it is new.
    pub content: Content,
    /// Where the guest mounts it.
    pub mount: Option<GuestPath>,
    /// Mount options, when they are not the role's.
    pub mount_options: Option<String>,
    /// Paths of the image whose content moves to it; it is mounted there.
    pub persistent: Vec<GuestPath>,
    /// Whether signatures on a block device may be overwritten.
    pub overwrite: bool,
    /// How the format stores it.
    pub options: VolumeOptions,
    /// The volume that is there already: data is kept, anything else replaced.
    pub existing: Option<Box<VolumeRecord>>,
}

/// What a new device holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    Empty,
    /// A filesystem.
    Filesystem {
        /// Which one.
        kind: FsKind,
        /// Its label.
        label: String,
        /// ext4 features; those of the root when nobody says.
        profile: Option<Profile>,
        /// Bytes of disk per inode.
        bytes_per_inode: u32,
    },
    /// Swap space.
    Swap {
        /// Its label.
        label: String,
    },
    /// A configuration seed.
    Seed(SeedSpec),
}

impl ResolvedDevice {
    /// Pool and volume.
    pub fn key(&self) -> VolumeKey {
        (self.pool.name.clone(), self.volume.clone())
    }

    /// The volume that stays as it is.
    pub fn kept(&self) -> Option<&VolumeRecord> {
        self.existing.as_deref().filter(|_| self.role == Role::Data)
    }

    /// The volume whose place the new one takes.
    pub fn replaced(&self) -> Option<&VolumeRecord> {
        self.existing.as_deref().filter(|_| self.role != Role::Data)
    }
}
