//! Filesystems: how a tree becomes a region of a disk, and how edits become a block patch.
//!
//! [`Filesystem::builder`] starts a build into a region that holds zeros; entries stream into the builder, `finish` completes it and returns
//! what was made. [`Filesystem::edit`] reads a golden and gives the blocks that change; it never writes. Both run on blocking threads.
//! `ext4` is written directly in user space; `xfs` and `btrfs` (and ext4, as the test oracle) are made by the host's mkfs and kernel on a loop
//! device that only a child in its own mount namespace ever sees (`mounted`). Nothing a guest has written to is ever mounted.

pub mod edit;
pub mod mounted;
pub mod patch;

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    fs::{edit::EditRequest, patch::BlockPatch},
    progress::Progress,
    tree::TreeSink,
};

/// The filesystems a root can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum FsKind {
    /// ext4, the default.
    #[default]
    Ext4,
    /// XFS, by the host's kernel.
    Xfs,
    /// btrfs, by the host's kernel.
    Btrfs,
}

impl FsKind {
    /// The name as mount(8) and blkid(8) know it.
    pub fn name(self) -> &'static str {
        match self {
            FsKind::Ext4 => "ext4",
            FsKind::Xfs => "xfs",
            FsKind::Btrfs => "btrfs",
        }
    }
}

/// A part of a disk file, bytes; `offset` and `len` are multiples of 4096.
#[derive(Debug, Clone)]
pub struct Region {
    /// The disk, open for what the callee needs.
    pub file: Arc<File>,
    /// Where the region starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

/// Bytes that can be read at any place: a file, or a disk inside one (qcow2).
pub trait ReadAt: Send + Sync {
    /// Fills `into` with the bytes at `offset`.
    fn read_all_at(&self, into: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn read_all_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(into, offset)
    }
}

/// A part of a disk that is only read, bytes.
#[derive(Clone)]
pub struct View {
    /// The disk.
    pub disk: Arc<dyn ReadAt>,
    /// Where the part starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

impl From<&Region> for View {
    fn from(region: &Region) -> View {
        View { disk: Arc::clone(&region.file) as Arc<dyn ReadAt>, offset: region.offset, len: region.len }
    }
}

/// What a new filesystem is to be. All identities are inputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildParams {
    /// Filesystem UUID.
    pub uuid: [u8; 16],
    /// Seed of directory hashes (ext4).
    pub hash_seed: [u8; 16],
    /// Label; empty for none.
    pub label: String,
    /// Which features (ext4).
    pub profile: Profile,
    /// Creation time stamped into the superblock and on what has no time of its own, seconds since 1970.
    pub epoch_secs: i64,
    /// Bytes of disk per inode (ext4), as mke2fs -i; 16384 is mke2fs's default.
    pub bytes_per_inode: u32,
}

/// ext4 feature profiles; the tables with their reasons are in `ext4::profile`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// 64bit, metadata_csum and metadata_csum_seed (kernel 4.4, e2fsprogs 1.43): with the seed stored, an instance gets its own UUID by changing
    /// the superblocks only. No orphan_file. For whatever boots by a kernel the host loads, or by GRUB 2.12 and later.
    #[default]
    Modern,
    /// As `Modern` without metadata_csum_seed, for boot loaders up to GRUB 2.06, which refuse it. A new UUID costs a rewrite of all metadata in use.
    Grub206,
    /// For pygrub's own reader and extlinux: no 64bit, no metadata_csum.
    Compat,
}

/// What a finished build made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuiltFs {
    /// Which filesystem.
    pub kind: FsKind,
    /// Bytes in use, metadata included.
    pub used_bytes: u64,
    /// Entries, directories included, hard links counted once.
    pub inodes: u64,
    /// Size of the filesystem in bytes.
    pub size_bytes: u64,
}

/// Sees what is written to a disk, in the order it is written.
pub trait WriteObserver: Send + Sync {
    /// `bytes` were written at byte `offset` of the disk file.
    fn written(&self, offset: u64, bytes: &[u8]);
}

/// Takes the entries of a root filesystem and finishes the filesystem. Dropping it abandons the build; the region's content is then undefined.
pub trait TreeBuilder: TreeSink + Send {
    /// Has every write of the disk shown to `observer`, if this builder knows them; to be called before the first entry.
    fn observe(&mut self, _observer: Arc<dyn WriteObserver>) {}

    /// Writes what is still in memory. The data is in the page cache, not yet durable: the caller syncs the disk file once.
    fn finish(self: Box<Self>) -> Result<BuiltFs>;
}

/// Reads files of a tree that a filesystem of ours holds.
pub trait TreeReader {
    /// The content of the file at `path`, symlinks inside the tree followed; nothing when there is no file. `Kind::NoSpace` when it has more than
    /// `len_max` bytes.
    fn read(&self, path: &str, len_max: u64) -> Result<Option<Vec<u8>>>;
    /// Names in the directory at `path`, in order; none when there is no directory.
    fn list(&self, path: &str) -> Result<Vec<String>>;
}

/// One kind of filesystem. Stateless.
pub trait Filesystem: Send + Sync {
    /// Which one.
    fn kind(&self) -> FsKind;

    /// Smallest region it can be made in, bytes.
    fn size_min(&self) -> u64;

    /// Starts a build into `region`, which reads as zeros. `progress` is checked for cancellation.
    fn builder(&self, params: &BuildParams, region: Region, progress: &Progress) -> Result<Box<dyn TreeBuilder>>;

    /// Computes the changed blocks of the filesystem in `region`; block 0 of the patch is the region's first. Only reads.
    /// `Kind::Unsupported` names a feature it can't handle, `Kind::Corrupt` what is wrong with the image, `Kind::NoSpace` what ran out.
    fn edit(&self, region: Region, request: &EditRequest, progress: &Progress) -> Result<BlockPatch>;

    /// Opens the filesystem in `region`, which a build has finished, for looking things up. Only reads.
    fn tree(&self, region: &Region) -> Result<Box<dyn TreeReader>>;
}
