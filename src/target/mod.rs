//! Targets: golden + block patch → a volume on local storage. The only code that writes volumes.
//!
//! Life cycle: [`Target::check`] refuses what can be refused before anything is touched; [`Target::stage`] writes everything under a temporary
//! name (or, on a raw device, everything but the first MiB); [`Staged::publish`] makes it durable and gives it its name. Dropping a [`Staged`]
//! abandons it and leaves nothing. All of it runs on blocking threads.
//!
//! Flushes, each of which waits for the disk:
//!
//! | format              | flushes | what, and why                                                                                                   |
//! |---------------------|---------|-----------------------------------------------------------------------------------------------------------------|
//! | raw, qcow2, overlay | 2       | the file, so that a name never leads to less than a volume; then, renamed, its directory: the name               |
//! | loop                | 2       | as raw; attaching needs none                                                                                     |
//! | block               | 4       | the marked head, before anything else is overwritten; the data, before the head; the head, before its first 4 KiB; those |
//! | any, `verify`       | +1      | the data, before it is read back (block: it is flushed by then)                                                  |
//!
//! With a reflink the file's flush is a commit of the filesystem's journal and little else, and so is the directory's: that is one commit more than
//! `cp --reflink` and one `sync`. It stays: to rename first and flush once would let a crash leave a name without its bytes, and only some filesystems
//! promise that flushing a file makes its new name durable.

pub mod block;
mod bulk;
pub mod extents;
pub mod looped;
pub mod options;
pub mod pace;
pub(crate) mod publish;
pub mod qcow2;
pub mod raw;
mod verify;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::{
    options::{BackingPath, Compression, DirectIo, Preallocation, VolumeOptions, ZeroPolicy},
    pace::{IoPriority, Pace, Pacer},
};
use crate::{
    error::Result,
    fs::patch::BlockPatch,
    names::{Digest, PoolName, VolumeName},
    progress::Progress,
};

/// How a volume is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeFormat {
    /// A raw file in a directory pool.
    Raw,
    /// A qcow2 file whose backing file is the golden: only the patch is written.
    Qcow2Overlay,
    /// A qcow2 file that stands alone.
    Qcow2,
    /// A raw block device of a block pool (logical volume, partition, whole disk).
    Block,
    /// A raw file in a directory pool, attached to a loop device.
    Loop,
}

impl VolumeFormat {
    /// The name used in documents and the protocol.
    pub fn name(self) -> &'static str {
        match self {
            VolumeFormat::Raw => "raw",
            VolumeFormat::Qcow2Overlay => "qcow2-overlay",
            VolumeFormat::Qcow2 => "qcow2",
            VolumeFormat::Block => "block",
            VolumeFormat::Loop => "loop",
        }
    }
}

/// The implementation of a format.
pub fn target_for(format: VolumeFormat) -> &'static dyn Target {
    match format {
        VolumeFormat::Raw => &raw::Raw,
        VolumeFormat::Qcow2Overlay => &qcow2::overlay::Overlay,
        VolumeFormat::Qcow2 => &qcow2::standalone::Standalone,
        VolumeFormat::Block => &block::Block,
        VolumeFormat::Loop => &looped::Looped,
    }
}

/// A configured place that volumes live in. Requests name it; they never name a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub name: PoolName,
    /// What it is.
    pub place: Place,
}

/// What a pool is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A directory: files `NAME.raw`, `NAME.qcow2`.
    Directory {
        /// Absolute path, made by the operator or at start.
        path: PathBuf,
    },
    /// Block devices: volume `NAME` is the device `DIRECTORY/NAME`, and it must match the allow-list.
    Devices {
        /// Where the device nodes or links are, e.g. `/dev/vg0` or `/dev/disk/by-id`.
        directory: PathBuf,
        /// Shell-style patterns of the names that may be written; nothing else is ever opened.
        allow: Vec<String>,
    },
}

/// A finished, immutable disk in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoldenDisk {
    /// The raw, sparse file.
    pub path: PathBuf,
    /// Its size in bytes, a multiple of 4096.
    pub size_bytes: u64,
    /// Digest over its content, as the golden's record has it.
    pub digest: Digest,
}

/// What a target is asked to make.
#[derive(Debug, Clone)]
pub struct VolumePlan<'a> {
    /// Where.
    pub pool: &'a Pool,
    /// Under which name.
    pub name: &'a VolumeName,
    /// From which disk.
    pub golden: &'a GoldenDisk,
    /// With which changes; `patch.size_bytes()` is the volume's virtual size.
    pub patch: &'a BlockPatch,
    /// Whether live signatures on a block device may be overwritten.
    pub overwrite: bool,
    /// Unique per render, safe in file names: temporary names are `.cloudletd-stage-<render>-<volume>`.
    pub render: &'a str,
    /// What was chosen about it.
    pub options: &'a VolumeOptions,
    /// Limits of bulk I/O.
    pub pacer: Option<&'a Pacer>,
    /// The volume of that name that this one takes the place of, if it is still there. Files are replaced by one rename when the new one is published:
    /// until then the old volume is untouched, also when anything fails. A block device has no second place: its old content is gone once staging has
    /// begun, and the cleared first MiB says so.
    pub replace: Option<&'a Volume>,
}

impl<'a> VolumePlan<'a> {
    /// A plan with nothing chosen: empty places only, default options, no limits, nothing replaced.
    pub fn new(pool: &'a Pool, name: &'a VolumeName, golden: &'a GoldenDisk, patch: &'a BlockPatch, render: &'a str) -> Self {
        VolumePlan { pool, name, golden, patch, overwrite: false, render, options: &VolumeOptions::DEFAULT, pacer: None, replace: None }
    }

    /// What its bulk I/O is done under.
    fn pace<'p>(&'p self, progress: &'p Progress) -> Pace<'p> {
        Pace { pacer: self.pacer, progress }
    }
}

/// What [`Target::check`] is asked about.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// Where.
    pub pool: &'a Pool,
    /// Under which name.
    pub name: &'a VolumeName,
    /// Virtual size in bytes.
    pub size_bytes: u64,
    /// A bound on what will be allocated for data and metadata, without preallocation.
    pub allocate_bytes: u64,
    /// Whether live signatures on a block device may be overwritten.
    pub overwrite: bool,
    /// What was chosen about it.
    pub options: &'a VolumeOptions,
    /// As in [`VolumePlan::replace`].
    pub replace: Option<&'a Volume>,
}

impl<'a> Wanted<'a> {
    /// A question with nothing chosen.
    pub fn new(pool: &'a Pool, name: &'a VolumeName, size_bytes: u64, allocate_bytes: u64) -> Self {
        Wanted { pool, name, size_bytes, allocate_bytes, overwrite: false, options: &VolumeOptions::DEFAULT, replace: None }
    }
}

/// A volume that exists, complete and durable. Kept in the catalogue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// The pool it is in.
    pub pool: PoolName,
    /// Its name there.
    pub name: VolumeName,
    /// How it is stored.
    pub format: VolumeFormat,
    /// The file or device that holds the bytes.
    pub path: PathBuf,
    /// What a guest is given: `path`, or the loop device.
    pub device: PathBuf,
    /// Size the guest sees, bytes.
    pub virtual_size_bytes: u64,
    /// Bytes allocated on the host's storage when it was published (for a block device: its size).
    pub allocated_size_bytes: u64,
    /// The golden file it depends on, for overlays.
    pub backing: Option<PathBuf>,
    /// Identity of the block device it was written to, so that another device under the same name is never touched.
    pub pinned: Option<DeviceId>,
    /// What was chosen about it; a loop device is attached again in the same way.
    #[serde(default, skip_serializing_if = "VolumeOptions::is_default")]
    pub options: VolumeOptions,
}

/// Identity of a block device: `st_rdev` and `/sys/dev/block/MAJ:MIN/diskseq` (Linux 5.15; BLKGETDISKSEQ), where the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceId {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Grows with every new device of the running kernel; not comparable across reboots.
    pub diskseq: Option<u64>,
    /// Which boot of the host the numbers belong to (first half of the kernel's boot id): across reboots they mean nothing.
    #[serde(default)]
    pub boot: Option<u64>,
}

/// How to tell later, after a crash, that what is there under a volume's name is what a certain render published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proof {
    /// The file carries the render's id and its own inode number in an extended attribute (`trusted.cloudletd.render`, or `user.` of a daemon without privileges).
    Mark,
    /// The file has this inode number; for filesystems without such attributes.
    Inode(u64),
    /// The device begins with these bytes.
    Head {
        /// SHA-256 of them.
        digest: Digest,
        /// How many.
        bytes: u64,
    },
}

/// A volume that is written but not yet there. Dropping it abandons it.
pub trait Staged: Send {
    /// Bytes allocated so far.
    fn allocated_size_bytes(&self) -> Result<u64>;
    /// Where the staged bytes are, for checks by judges.
    fn path(&self) -> &Path;
    /// The volume as far as it is known before it is published.
    fn foreseen(&self) -> &Volume;
    /// How to tell after a crash whether it was published.
    fn proof(&self) -> Result<Proof>;
    /// Flushes data and metadata, gives it its name (never replacing anything that exists), flushes the directory.
    fn publish(self: Box<Self>) -> Result<Volume>;
}

/// One way of storing volumes. Stateless.
pub trait Target: Send + Sync {
    /// Which way.
    fn format(&self) -> VolumeFormat;

    /// Refuses what can't work: wrong kind of pool, name taken (`AlreadyExists`), device not allowed, in use, too small (`Conflict`/`NoSpace`),
    /// signatures without `overwrite` (`Conflict`, reason `DEVICE_NOT_EMPTY`), options of another format (`InvalidRequest`), a volume to be replaced that is
    /// in use (`Conflict`, reason `VOLUME_IN_USE`), too little space in the pool. Writes nothing.
    fn check(&self, wanted: &Wanted<'_>) -> Result<()>;

    /// Writes the volume under a temporary name. On an error nothing is left behind.
    fn stage(&self, plan: &VolumePlan<'_>, progress: &Progress) -> Result<Box<dyn Staged>>;

    /// Makes the volume usable again after a restart of daemon or host (attaches its loop device, verifies its pinned device). Returns the volume as it is
    /// now; changes nothing when all is well.
    fn adopt(&self, pool: &Pool, volume: &Volume) -> Result<Volume>;

    /// Removes the volume: detaches its loop device, unlinks its file; on a block device clears the first and last MiB. Refuses (`Conflict`) while it is in use.
    /// Done already is success.
    fn delete(&self, pool: &Pool, volume: &Volume) -> Result<()>;

    /// Whether what is there under this name is what `render` published, as `proof` tells.
    fn is_published(&self, pool: &Pool, name: &VolumeName, render: &str, proof: &Proof) -> Result<bool> {
        publish::is_published(pool, self.format(), name, render, proof)
    }

    /// Ends the stage that `render` left under this name when its daemon died, if there is one that `sweep` does not find: nothing of it can be taken for a
    /// volume afterwards. Gives whether there was.
    fn abandon(&self, _pool: &Pool, _name: &VolumeName, _render: &str) -> Result<bool> {
        Ok(false)
    }

    /// Removes what stages of earlier daemons left in `pool` (temporary names only); returns what was removed, or would be with `dry_run`.
    fn sweep(&self, pool: &Pool, dry_run: bool) -> Result<Vec<PathBuf>>;
}
