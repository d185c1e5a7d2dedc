//! Loop devices: a file as a block device.
//!
//! The `loopdev` crate hands out free devices and detaches them; binding is one `LOOP_CONFIGURE`, so that nobody (udev above all) ever sees a device
//! that is bound but not configured. Between "this number is free" and the bind any process may take the number: only the errnos of that race are
//! retried, until a deadline. After the bind the device is asked which inode it is bound to.
//!
//! ```text
//!  attach() ──► LoopDevice ──► close()  flush, detach, wait until unbound
//!                   │     └──► keep()   stays bound after this process (Lifetime::UntilDetached)
//!                   └─ Drop: detaches once, logs what leaks; with Lifetime::Guard the kernel detaches even after SIGKILL
//! ```
//!
//! While the guard lives it holds an exclusive flock on the node, which udev respects (systemd, "Locking Block Device Access").

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use loopdev::LoopControl;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Kind, Result, Stage},
    host::{
        keeper::client::{KeptLoop, keeper},
        sys::{self, LOOP_AUTOCLEAR, LOOP_DIRECT_IO, LOOP_PARTSCAN, LOOP_READ_ONLY, LoopInfo},
    },
};

/// How long an attach may lose the race for free numbers. 200 attaches by 8 threads need well under a second.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait for the kernel to unbind; the last close of any other opener (a udev probe) ends it.
const DETACH_TIMEOUT: Duration = Duration::from_secs(5);

/// Threads of this process take turns; what is left to retry are races with other processes.
static ATTACH_TURN: Mutex<()> = Mutex::new(());

/// Who ends the binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lifetime {
    /// The kernel, when the guard (and every other opener) is gone, whatever happens to this process.
    Guard,
    /// Whoever calls [`detach`]; it outlives this process.
    UntilDetached,
}

/// How to attach.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Options {
    /// Refuse writes; the backing file may then be open for reading only.
    pub read_only: bool,
    /// Let the kernel make `/dev/loopNpM` for the partitions.
    pub partitions: bool,
    /// Bypass the page cache of the backing file where its filesystem can.
    pub direct_io: bool,
    /// Where the device starts in the file, bytes, a multiple of 512.
    pub offset: u64,
    /// Size of the device in bytes, 0 for the rest of the file.
    pub size_limit: u64,
    /// Logical block size, 0 for what the kernel takes (512, or the backing's with direct I/O).
    pub block_size: u32,
    /// Who ends it.
    pub lifetime: Lifetime,
}

impl Options {
    /// Whole file, writable, no partition scan, page cache, ended with the guard.
    pub fn guarded() -> Self {
        let lifetime = Lifetime::Guard;
        Options { read_only: false, partitions: false, direct_io: false, offset: 0, size_limit: 0, block_size: 0, lifetime }
    }

    /// Whole file, writable, partitions, direct I/O where possible, until detached: a volume.
    pub fn persistent() -> Self {
        Options { partitions: true, direct_io: true, lifetime: Lifetime::UntilDetached, ..Options::guarded() }
    }

    fn flags(&self) -> u32 {
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        flag(self.read_only, LOOP_READ_ONLY)
            | flag(self.partitions, LOOP_PARTSCAN)
            | flag(self.direct_io, LOOP_DIRECT_IO)
            | flag(self.lifetime == Lifetime::Guard, LOOP_AUTOCLEAR)
    }
}

/// A bound loop device.
#[derive(Debug)]
pub struct LoopDevice {
    /// `None` only after `close` or `keep` took it.
    held: Option<Held>,
    path: PathBuf,
}

#[derive(Debug)]
enum Held {
    Bound(Bound),
    /// By the keeper.
    Kept(KeptLoop),
}

#[derive(Debug)]
struct Bound {
    device: loopdev::LoopDevice,
    /// The same device, opened a second time for the lock: the crate's handle can't be borrowed as a descriptor safely.
    node: File,
}

/// A loop device that is bound to something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// `/dev/loopN`.
    pub path: PathBuf,
    /// Path of the backing file as the kernel knows it now; ` (deleted)` is appended when it has none any more.
    pub backing: PathBuf,
}

impl LoopDevice {
    /// Attaches `backing`, an open regular file (or block device), writable unless `options.read_only`. `name` is shown by losetup and used in errors.
    ///
    /// `Busy`: no free device could be had in 10 s. `Unsupported`: no loop driver.
    pub fn attach(backing: &File, name: &Path, options: &Options) -> Result<Self> {
        if let Some(keeper) = keeper() {
            let kept = keeper.attach(backing, name, options)?;
            return Ok(LoopDevice { path: kept.path.clone(), held: Some(Held::Kept(kept)) });
        }
        let doing = || name.display().to_string();
        let identity = backing.metadata().map_err(|error| Error::io(Stage::Host, doing(), "stat before attaching to a loop device", error))?;
        let control = LoopControl::open().map_err(|error| {
            let hint = "load the loop module (modprobe loop) and allow /dev/loop-control in the unit's DeviceAllow";
            Error::io(Stage::Host, "/dev/loop-control", "open", error).with_hint(hint)
        })?;
        let mut options = *options;
        let deadline = Instant::now() + ATTACH_TIMEOUT;
        let mut pause = Duration::from_micros(200);
        loop {
            let attempt = {
                let _turn = ATTACH_TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                try_attach(&control, backing, name, &options)
            };
            let error = match attempt {
                Ok(device) => return device.verify(&identity, name),
                Err(error) => error,
            };
            match error.raw_os_error() {
                // Filesystems without direct I/O: some kernels refuse, others ignore the flag.
                Some(libc::EINVAL) if options.direct_io => options.direct_io = false,
                Some(libc::EBUSY | libc::ENXIO | libc::ENOENT | libc::EAGAIN) if Instant::now() < deadline => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(20));
                }
                Some(libc::EBUSY | libc::ENXIO | libc::ENOENT | libc::EAGAIN) => {
                    let message = format!("no free loop device could be had in {} s", ATTACH_TIMEOUT.as_secs());
                    return Err(Error::new(Kind::Busy, Stage::Host, doing(), message).with_source(error));
                }
                _ => return Err(Error::io(Stage::Host, doing(), "attach to a loop device", error)),
            }
        }
    }

    /// The node, `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The node of partition `number` (from 1); it exists when the table has it and `partitions` was set.
    pub fn partition_path(&self, number: u32) -> PathBuf {
        PathBuf::from(format!("{}p{number}", self.path.display()))
    }

    /// The open device, for reading and writing. A keeper does not hand it out.
    pub fn file(&self) -> Result<&File> {
        match &self.held {
            Some(Held::Bound(bound)) => Ok(&bound.node),
            _ => Err(Error::internal(Stage::Host, self.path.display().to_string(), "this process does not have the loop device open")),
        }
    }

    /// Whether it bypasses the page cache of its file, as the kernel decided.
    pub fn is_direct(&self) -> Result<bool> {
        if let Some(Held::Kept(kept)) = &self.held {
            return Ok(kept.is_direct);
        }
        let status = sys::loop_status(self.file()?).map_err(|error| self.error("query", error))?;
        Ok(status.flags & LOOP_DIRECT_IO != 0)
    }

    /// Gives up the lock that keeps udev away, for tools that lock the device themselves (mkfs.btrfs).
    pub fn unlock(&self) -> Result<()> {
        rustix::fs::flock(self.file()?, FlockOperation::Unlock).map_err(|errno| self.error("unlock", errno.into()))
    }

    /// Flushes, detaches and waits until the kernel has let go of the file. `Busy`: somebody still has the device open; it goes with their close.
    pub fn close(mut self) -> Result<()> {
        let bound = match self.held.take() {
            Some(Held::Bound(bound)) => bound,
            Some(Held::Kept(kept)) => return kept.close(),
            None => return Ok(()),
        };
        let synced = bound.node.sync_all().map_err(|error| self.error("flush", error));
        let detached = bound.detach().map_err(|error| self.error("detach", error));
        synced?;
        detached?;
        wait_until_unbound(&self.path, None)
    }

    /// Leaves the device bound and gives its path. Only sensible with [`Lifetime::UntilDetached`].
    pub fn keep(mut self) -> Result<PathBuf> {
        if let Some(Held::Kept(kept)) = self.held.take() {
            kept.keep()?;
        }
        Ok(std::mem::take(&mut self.path))
    }

    fn verify(self, backing: &std::fs::Metadata, name: &Path) -> Result<Self> {
        let status = sys::loop_status(self.file()?).map_err(|error| self.error("query after attaching", error))?;
        if (status.device, status.inode) != (backing.dev(), backing.ino()) {
            let message = format!(
                "is bound to inode {} on device {:#x}; expected inode {} on {:#x} ({})",
                status.inode,
                status.device,
                backing.ino(),
                backing.dev(),
                name.display()
            );
            return Err(Error::internal(Stage::Host, self.path.display().to_string(), message));
        }
        Ok(self)
    }

    fn error(&self, doing: &str, error: io::Error) -> Error {
        Error::io(Stage::Host, self.path.display().to_string(), doing, error)
    }
}

impl Bound {
    /// The unbinding itself happens with the last close.
    fn detach(self) -> io::Result<()> {
        match self.device.detach() {
            // Not bound any more: somebody was faster.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(()),
            other => other,
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = match self.held.take() {
            Some(Held::Bound(bound)) => bound.detach().map_err(|error| self.error("detach", error)),
            Some(Held::Kept(kept)) => kept.close(),
            None => Ok(()),
        };
        if let Err(error) = detached {
            tracing::warn!(device = %self.path.display(), error = %error.chain(), "a loop device is left attached");
        }
    }
}

fn try_attach(control: &LoopControl, backing: &File, name: &Path, options: &Options) -> io::Result<LoopDevice> {
    let device = control.next_free()?;
    let path = device.path().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
    let node = OpenOptions::new().read(true).write(!options.read_only).open(&path)?;
    if !node.metadata()?.file_type().is_block_device() {
        return Err(io::Error::from_raw_os_error(libc::ENOTBLK));
    }
    rustix::fs::flock(&node, FlockOperation::NonBlockingLockExclusive)?;
    let info = LoopInfo::new(name.as_os_str().as_encoded_bytes(), options.offset, options.size_limit, options.flags());
    sys::loop_configure(&device, backing, options.block_size, &info)?;
    Ok(LoopDevice { held: Some(Held::Bound(Bound { device, node })), path })
}

/// All bound loop devices, by number of their node's directory order.
pub fn attached() -> Result<Vec<Attached>> {
    let directory = "/sys/block";
    let entries = std::fs::read_dir(directory).map_err(|error| Error::io(Stage::Host, directory, "list", error))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Error::io(Stage::Host, directory, "list", error))?;
        let name = entry.file_name();
        if !name.as_encoded_bytes().starts_with(b"loop") {
            continue;
        }
        // Not bound (no such attribute), or unbound while it was read.
        if let Some(backing) = backing_of(&name) {
            found.push(Attached { path: Path::new("/dev").join(name), backing });
        }
    }
    Ok(found)
}

/// The loop devices whose backing file is the file at `path`, by device and inode, whatever it is called elsewhere.
pub fn find_by_backing(path: &Path) -> Result<Vec<PathBuf>> {
    let wanted = match std::fs::metadata(path) {
        Ok(meta) => (meta.dev(), meta.ino()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(Stage::Host, path.display().to_string(), "stat", error)),
    };
    match keeper() {
        Some(keeper) => keeper.loops_of(wanted),
        None => find_by_inode(wanted),
    }
}

/// As [`find_by_backing`], for the file that is this device and inode.
pub(super) fn find_by_inode(wanted: (u64, u64)) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for device in attached()? {
        // The path usually tells without opening the device; an opener delays the end of a binding that is just being released.
        match std::fs::metadata(&device.backing) {
            Ok(meta) if (meta.dev(), meta.ino()) != wanted => continue,
            _ => {}
        }
        let Ok(node) = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&device.path) else { continue };
        if sys::loop_status(&node).is_ok_and(|status| (status.device, status.inode) == wanted) {
            found.push(device.path);
        }
    }
    Ok(found)
}

/// Detaches the loop device at `path` and waits until it is unbound. Not bound is success. `Conflict` (reason `DEVICE_IN_USE`): it, or a partition of
/// it, is mounted or claimed; nothing was changed. `Busy`: somebody has it open; the kernel ends it with their close.
pub fn detach(path: &Path) -> Result<()> {
    match keeper() {
        Some(keeper) => keeper.detach(path),
        None => detach_when(path, |_| Ok(())),
    }
}

/// The same, when nothing is said against the file that it is bound to; nobody can bind it to another in between.
pub(super) fn detach_when(path: &Path, check: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let object = || path.display().to_string();
    let bound_to = path.file_name().and_then(backing_of);
    if bound_to.is_none() {
        return Ok(());
    }
    let node = match OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path) {
        Ok(node) => node,
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            return Err(Error::io(Stage::Host, object(), "detach: it is mounted or claimed by another process", error).with_reason("DEVICE_IN_USE"));
        }
        Err(error) => return Err(Error::io(Stage::Host, object(), "open to detach", error)),
    };
    match path.file_name().and_then(backing_of) {
        Some(backing) => check(&backing)?,
        None => return Ok(()),
    }
    let device = loopdev::LoopDevice::open(path).map_err(|error| Error::io(Stage::Host, object(), "open to detach", error))?;
    Bound { device, node }.detach().map_err(|error| Error::io(Stage::Host, object(), "detach", error))?;
    wait_until_unbound(path, bound_to.as_deref())
}

/// `backing`: what it was bound to; another file under the same number means that it was unbound and taken again.
fn wait_until_unbound(path: &Path, backing: Option<&Path>) -> Result<()> {
    let Some(name) = path.file_name() else { return Ok(()) };
    let before = backing.map(Path::to_owned).or_else(|| backing_of(name));
    let deadline = Instant::now() + DETACH_TIMEOUT;
    let mut pause = Duration::from_micros(100);
    while let Some(now) = backing_of(name) {
        if Some(&now) != before.as_ref() {
            break;
        }
        if Instant::now() >= deadline {
            let message = format!("still bound to {} after {} s: another process has it open", now.display(), DETACH_TIMEOUT.as_secs());
            return Err(Error::new(Kind::Busy, Stage::Host, path.display().to_string(), message).with_reason("DEVICE_IN_USE"));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    Ok(())
}

/// `/sys/block/loopN/loop/backing_file`; nothing when the device is not bound.
fn backing_of(name: &std::ffi::OsStr) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    // The attribute is at most a page.
    let mut text = vec![0; 8192];
    let file = File::open(Path::new("/sys/block").join(name).join("loop/backing_file")).ok()?;
    let len = file.read_at(&mut text, 0).ok()?;
    text.truncate(len);
    while text.last() == Some(&b'\n') {
        text.pop();
    }
    Some(PathBuf::from(std::ffi::OsString::from_vec(text)))
}
