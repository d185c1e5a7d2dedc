//! Who uses a file or a block device, before it is removed or overwritten.
//!
//! Four witnesses, because no single one sees everything: locks on the file (QEMU holds open-file-description locks on bytes 100 to 299,
//! `block/file-posix.c`; others use flock), loop devices bound to it, mounts and holders of a block device, and the open files of other processes in
//! `/proc`. The last needs CAP_SYS_PTRACE and a visible `/proc`; where they are missing the others still speak.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Kind, Result, Stage},
    host::{keeper::client::keeper, loops, mounts},
};

/// How often an open file is looked at before it counts as in use …
const PROBE_LOOKS: u32 = 5;
/// … and the time between two looks.
const PROBE_PAUSE: Duration = Duration::from_millis(50);

/// What a process may have open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Opened {
    /// A file, by device and inode.
    File(u64, u64),
    /// One of these block devices, by number.
    Devices(Vec<(u32, u32)>),
}

impl Opened {
    fn is(&self, other: &std::fs::Metadata) -> bool {
        match self {
            Opened::File(device, inode) => !is_block(other) && (other.dev(), other.ino()) == (*device, *inode),
            Opened::Devices(numbers) => is_block(other) && numbers.contains(&(rustix::fs::major(other.rdev()), rustix::fs::minor(other.rdev()))),
        }
    }
}

/// Refuses with `Conflict` (reason `IN_USE`) when the regular file at `path` is used by anybody else. A missing file is not in use.
pub fn refuse_file_in_use(path: &Path) -> Result<()> {
    if let Some(device) = loops::find_by_backing(path)?.first() {
        return Err(conflict(path, format!("it is attached to {}", device.display())));
    }
    refuse_file_opened(path)
}

/// As [`refuse_file_in_use`], but loop devices may be bound to it.
pub fn refuse_file_opened(path: &Path) -> Result<()> {
    let object = || path.display().to_string();
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(Stage::Target, object(), "open to see whether it is in use", error)),
    };
    if is_record_locked(&file).map_err(|error| Error::io(Stage::Target, object(), "query its locks", error))? {
        return Err(conflict(path, "a process holds a record lock on it, as QEMU does for a disk of a running guest"));
    }
    match flock(&file) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(conflict(path, "a process holds a lock (flock) on it")),
        Err(errno) => return Err(Error::io(Stage::Target, object(), "lock", errno.into())),
    }
    let meta = file.metadata().map_err(|error| Error::io(Stage::Target, object(), "stat", error))?;
    match opener(&Opened::File(meta.dev(), meta.ino()), None)? {
        Some(opener) => Err(conflict(path, format!("{opener} has it open"))),
        None => Ok(()),
    }
}

/// Locks an image or device, open for writing, so that no QEMU that locks as it should (`block/file-posix.c`: one byte per permission from
/// `RAW_LOCK_PERM_BASE`, 100, and from `RAW_LOCK_SHARED_BASE`, 200) has it or gets it, not even for reading; a file also by flock(2) (on devices that is udev's,
/// while it looks at them). Held until the file is closed. `Conflict` (reason `IN_USE`) when somebody was first. Filesystems without locks promise nothing.
pub fn lock_image(file: &File, path: &Path) -> Result<()> {
    let lock = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: libc::SEEK_SET as i16, l_start: 100, l_len: 200, l_pid: 0 };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) | Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOLCK | nix::errno::Errno::EINVAL) => {}
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => {
            return Err(conflict(path, "a process holds a record lock on it, as QEMU does for a disk of a running guest"));
        }
        Err(errno) => return Err(Error::errno(Stage::Target, path.display().to_string(), "lock as QEMU does", errno)),
    }
    if file.metadata().is_ok_and(|meta| is_block(&meta)) {
        return Ok(());
    }
    match flock(file) {
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOLCK) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(conflict(path, "a process holds a lock (flock) on it")),
        Err(errno) => Err(Error::io(Stage::Target, path.display().to_string(), "lock", errno.into())),
    }
}

/// Refuses with `Conflict` (reason `IN_USE`) when the block device, or a partition of it, is mounted, swapped on, held by a device above it (device
/// mapper, md) or open in another process. `path` is for the message.
pub fn refuse_device_in_use(path: &Path, device: (u32, u32)) -> Result<()> {
    refuse_device_in_use_but_by(None, path, device)
}

/// The same, whatever the process `daemon` has open, for which this one is asked.
pub(super) fn refuse_device_in_use_but_by(daemon: Option<u32>, path: &Path, device: (u32, u32)) -> Result<()> {
    refuse_device_claimed(path, device)?;
    match opener(&Opened::Devices(with_partitions(device)), daemon)? {
        Some(opener) => Err(conflict(path, format!("{opener} has it open"))),
        None => Ok(()),
    }
}

/// As [`refuse_device_in_use`], without looking at open files.
pub fn refuse_device_claimed(path: &Path, device: (u32, u32)) -> Result<()> {
    let parts = with_partitions(device);
    // A loop device holds what it is attached to without claiming it.
    let over = loops::attached()?.into_iter().find(|upper| mounts::block_number(&upper.backing).is_some_and(|number| parts.contains(&number)));
    if let Some(upper) = over {
        return Err(conflict(path, format!("it is attached to {}", upper.path.display())));
    }
    for part in parts {
        let which = if part == device { "it".to_owned() } else { format!("its partition {}:{}", part.0, part.1) };
        if let Some(point) = mounts::mount_points_of(part)?.first() {
            return Err(conflict(path, format!("{which} is mounted on {}", point.display())));
        }
        if mounts::is_swap(part)? {
            return Err(conflict(path, format!("{which} is used as swap space")));
        }
        if let Some(holder) = holders(part).first() {
            return Err(conflict(path, format!("{which} is held by {holder}")));
        }
    }
    Ok(())
}

/// The device and its partitions.
fn with_partitions(device: (u32, u32)) -> Vec<(u32, u32)> {
    let mut all = vec![device];
    let Ok(entries) = std::fs::read_dir(sys_path(device)) else { return all };
    for entry in entries.flatten() {
        if entry.path().join("partition").exists()
            && let Ok(text) = std::fs::read_to_string(entry.path().join("dev"))
            && let Some((major, minor)) = text.trim().split_once(':')
            && let (Ok(major), Ok(minor)) = (major.parse(), minor.parse())
        {
            all.push((major, minor));
        }
    }
    all
}

fn holders(device: (u32, u32)) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(sys_path(device).join("holders")) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn sys_path(device: (u32, u32)) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", device.0, device.1))
}

/// Takes the lock, looking again for as long as [`opener`] does: a process that is just being started has every file of its parent, locks and all, until it
/// is another program.
fn flock(file: &File) -> Result<(), rustix::io::Errno> {
    for _ in 1..PROBE_LOOKS {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(PROBE_PAUSE),
            other => return other,
        }
    }
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive)
}

/// Whether anybody else holds any POSIX or open-file-description lock on `file`, shared or exclusive.
fn is_record_locked(file: &File) -> io::Result<bool> {
    // An exclusive lock on everything would conflict with any lock there is; F_OFD_GETLK only asks.
    let mut lock = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)) {
        Ok(_) => Ok(lock.l_type != libc::F_UNLCK as i16),
        // Filesystems without locks.
        Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOLCK | nix::errno::Errno::EINVAL) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn is_block(meta: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    meta.file_type().is_block_device()
}

/// Another process with such a file open, as `NAME (pid N)`; see [`opener_but`]. The keeper sees those of other users, too.
fn opener(what: &Opened, daemon: Option<u32>) -> Result<Option<String>> {
    match keeper() {
        Some(keeper) => keeper.opener(what),
        None => Ok(opener_but(what, daemon)),
    }
}

/// A process other than this one and `daemon` that still has such a file open after [`PROBE_LOOKS`] looks: udev and monitoring open things for a moment.
pub(super) fn opener_but(what: &Opened, daemon: Option<u32>) -> Option<String> {
    for _ in 1..PROBE_LOOKS {
        find_opener(what, daemon)?;
        std::thread::sleep(PROBE_PAUSE);
    }
    find_opener(what, daemon)
}

fn find_opener(what: &Opened, daemon: Option<u32>) -> Option<String> {
    let own = std::process::id();
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if pid == own || Some(pid) == daemon {
            continue;
        }
        // Processes come, go and hide; what can't be read has no say.
        let Ok(files) = std::fs::read_dir(entry.path().join("fd")) else { continue };
        for file in files.flatten() {
            // Follows the link to the open file itself, in whatever namespace that is.
            if std::fs::metadata(file.path()).is_ok_and(|meta| what.is(&meta)) {
                let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                return Some(format!("{} (pid {pid})", name.trim()));
            }
        }
    }
    None
}

fn conflict(path: &Path, why: impl Into<String>) -> Error {
    Error::new(Kind::Conflict, Stage::Target, path.display().to_string(), format!("is in use: {}", why.into())).with_reason("IN_USE")
}
