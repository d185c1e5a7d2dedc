//! Block devices: claiming one so that the right one, and only an unused one, is written.
//!
//! A claim is taken by the device's name in a pool. The name must match the pool's allow-list before anything is opened. The node (or what its link
//! leads to) is opened with `O_EXCL`, which fails while the kernel has it mounted or claimed in any namespace, and from then on every question is put
//! to the open descriptor: device number, sequence number, size. Names are not trusted twice.

use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Kind, Result, Stage},
    host::{
        in_use,
        keeper::client::{Claimed, keeper},
        signatures, sys,
    },
    target::DeviceId,
};

/// Alignment that direct I/O is done with; devices with larger logical blocks are refused.
pub const LOGICAL_BLOCK_MAX: u64 = 4096;

/// What a claim is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// Looking: opened for reading.
    Inspect,
    /// Overwriting: opened for reading and writing.
    Write,
}

/// A block device held exclusively, as long as this lives.
#[derive(Debug)]
pub struct Claim {
    file: File,
    /// The same for direct I/O, from the keeper: this process can't open it.
    direct: Option<File>,
    /// The name it was claimed by.
    named: PathBuf,
    /// The node behind the name, e.g. `/dev/dm-3`.
    node: PathBuf,
    id: DeviceId,
    size_bytes: u64,
}

impl Claim {
    /// Claims the device called `name` in `directory`.
    ///
    /// `PermissionDenied` (reason `DEVICE_NOT_ALLOWED`): no pattern of `allow` matches the name. `NotFound`: no such node. `InvalidRequest`: not a block
    /// device. `Conflict` (reason `IN_USE`): mounted, swapped on, held or open elsewhere. `Unsupported`: logical blocks larger than 4096 bytes.
    pub fn take(directory: &Path, allow: &[String], name: &str, access: Access) -> Result<Self> {
        if let Some(keeper) = keeper() {
            device_path(directory, allow, name)?;
            let Claimed { file, direct, named, node, id, size_bytes } = keeper.claim(directory, name, access)?;
            return Ok(Claim { file, direct, named, node, id, size_bytes });
        }
        Self::take_for(None, directory, allow, name, access)
    }

    /// The same, by this process, whatever the process `daemon` has open, for which it is done.
    pub(super) fn take_for(daemon: Option<u32>, directory: &Path, allow: &[String], name: &str, access: Access) -> Result<Self> {
        let named = device_path(directory, allow, name)?;
        let object = || named.display().to_string();
        let node = std::fs::canonicalize(&named).map_err(|error| Error::io(Stage::Target, object(), "resolve", error))?;
        let before = std::fs::metadata(&node).map_err(|error| Error::io(Stage::Target, object(), "stat", error))?;
        if !before.file_type().is_block_device() {
            let message = format!("is not a block device: it leads to {}", node.display());
            return Err(Error::new(Kind::InvalidRequest, Stage::Target, object(), message).with_reason("NOT_A_BLOCK_DEVICE"));
        }
        let number = number_of(&before);
        // First, because its refusals say more than EBUSY does.
        in_use::refuse_device_in_use_but_by(daemon, &named, number)?;
        let file = OpenOptions::new()
            .read(true)
            .write(access == Access::Write)
            .custom_flags(libc::O_EXCL | libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&node)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EBUSY) => {
                    Error::io(Stage::Target, object(), "is in use: the kernel has it mounted or claimed", error).with_reason("IN_USE")
                }
                _ => Error::io(Stage::Target, object(), "open exclusively", error),
            })?;
        let opened = file.metadata().map_err(|error| Error::io(Stage::Target, object(), "stat after opening", error))?;
        if !opened.file_type().is_block_device() || number_of(&opened) != number {
            return Err(changed(&named, "was replaced while it was being opened"));
        }
        let size_bytes = sys::device_size(&file).map_err(|error| Error::io(Stage::Target, object(), "get its size", error))?;
        let logical = rustix::fs::ioctl_blksszget(&file).map_err(|errno| Error::io(Stage::Target, object(), "get its block size", errno.into()))?;
        if u64::from(logical) > LOGICAL_BLOCK_MAX {
            let message = format!("has logical blocks of {logical} bytes, the limit is {LOGICAL_BLOCK_MAX}");
            return Err(Error::new(Kind::Unsupported, Stage::Target, object(), message));
        }
        let id = device_id(&file, number);
        Ok(Claim { file, direct: None, named, node, id, size_bytes })
    }

    /// The open device.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The name it was claimed by, a path in the pool.
    pub fn path(&self) -> &Path {
        &self.named
    }

    /// The node behind the name.
    pub fn node(&self) -> &Path {
        &self.node
    }

    /// Who it is.
    pub fn id(&self) -> DeviceId {
        self.id
    }

    /// Its size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Whether the device can make ranges read as zeros by itself: `queue/write_zeroes_max_bytes` of it, or of the disk that it is a partition of, in
    /// sysfs (Documentation/ABI/stable/sysfs-block) is not 0.
    pub fn zeroes_by_itself(&self) -> bool {
        let directory = PathBuf::from(format!("/sys/dev/block/{}:{}", self.id.major, self.id.minor));
        let limit = ["queue", "../queue"].iter().find_map(|queue| std::fs::read_to_string(directory.join(queue).join("write_zeroes_max_bytes")).ok());
        limit.and_then(|text| text.trim().parse::<u64>().ok()).is_some_and(|bytes| bytes > 0)
    }

    /// A second descriptor of the same device for aligned direct I/O. It is opened through the first one, not by name.
    pub fn open_direct(&self) -> Result<File> {
        if let Some(direct) = &self.direct {
            let copy = direct.try_clone();
            return copy.map_err(|error| Error::io(Stage::Target, self.named.display().to_string(), "duplicate its descriptor", error));
        }
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
            .map_err(|error| Error::io(Stage::Target, self.named.display().to_string(), "open for direct I/O", error))
    }

    /// Refuses with `Conflict` (reason `DEVICE_NOT_EMPTY`) when something recognisable is on it.
    pub fn refuse_signatures(&self) -> Result<()> {
        let object = self.named.display().to_string();
        let found = signatures::probe(&self.file, self.size_bytes)
            .map_err(|error| Error::io(Stage::Target, object.as_str(), "look for signatures", error))?;
        if found.is_empty() {
            return Ok(());
        }
        Err(Error::new(Kind::Conflict, Stage::Target, object, format!("holds {}", found.join(", ")))
            .with_reason("DEVICE_NOT_EMPTY")
            .with_hint("set overwrite if its content is to be lost"))
    }

    /// Fails with `Conflict` (reason `DEVICE_CHANGED`) unless the name still leads to the device that was claimed and its size is what it was.
    pub fn verify(&self) -> Result<()> {
        let meta = std::fs::metadata(&self.named)
            .map_err(|error| Error::io(Stage::Target, self.named.display().to_string(), "stat before publishing", error))?;
        if !meta.file_type().is_block_device() || number_of(&meta) != (self.id.major, self.id.minor) {
            return Err(changed(&self.named, "leads to another device now"));
        }
        if sys::disk_sequence(&self.file).ok() != self.id.diskseq {
            return Err(changed(&self.named, "was replaced by another device with the same number"));
        }
        let size = sys::device_size(&self.file)
            .map_err(|error| Error::io(Stage::Target, self.named.display().to_string(), "get its size before publishing", error))?;
        if size != self.size_bytes {
            return Err(changed(&self.named, format!("has {size} bytes now, it had {}", self.size_bytes)));
        }
        Ok(())
    }
}

/// What a block device is, as seen without claiming it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Who it is.
    pub id: DeviceId,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// Opens a block device of a pool, which may be in use, for reading.
pub fn look(path: &Path) -> Result<File> {
    if let (Some(keeper), Some(directory), Some(name)) = (keeper(), path.parent(), path.file_name().and_then(OsStr::to_str)) {
        return keeper.look(directory, name);
    }
    let failed = |doing: &str, error: io::Error| Error::io(Stage::Target, path.display().to_string(), doing, error);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|error| failed("open", error))?;
    let meta = file.metadata().map_err(|error| failed("stat", error))?;
    if !meta.file_type().is_block_device() {
        return Err(
            Error::new(Kind::InvalidRequest, Stage::Target, path.display().to_string(), "is not a block device").with_reason("NOT_A_BLOCK_DEVICE")
        );
    }
    Ok(file)
}

/// Looks at a block device that may be in use.
pub fn identify(path: &Path) -> Result<Identity> {
    let failed = |doing: &str, error: io::Error| Error::io(Stage::Target, path.display().to_string(), doing, error);
    let file = look(path)?;
    let meta = file.metadata().map_err(|error| failed("stat", error))?;
    let size_bytes = sys::device_size(&file).map_err(|error| failed("get its size", error))?;
    Ok(Identity { id: device_id(&file, number_of(&meta)), size_bytes })
}

fn device_id(file: &File, number: (u32, u32)) -> DeviceId {
    DeviceId { major: number.0, minor: number.1, diskseq: sys::disk_sequence(file).ok(), boot: boot_token() }
}

impl DeviceId {
    /// Fails with `Conflict` (reason `DEVICE_CHANGED`) when the device at `path` is not the one that `pinned` describes. After a reboot numbers mean
    /// nothing; then the name, and the size that the caller knows, have to do.
    pub fn require_same(&self, pinned: &DeviceId, path: &Path) -> Result<()> {
        let same_boot = pinned.boot.is_none() || pinned.boot == self.boot;
        if same_boot && (pinned.major, pinned.minor, pinned.diskseq) != (self.major, self.minor, self.diskseq) {
            let message = format!(
                "is device {}:{} with sequence number {:?}, the volume was written to {}:{} with {:?}",
                self.major, self.minor, self.diskseq, pinned.major, pinned.minor, pinned.diskseq
            );
            return Err(changed(path, message));
        }
        Ok(())
    }
}

/// Path of the device `name` in `directory` if the pool's patterns allow it.
pub fn device_path(directory: &Path, allow: &[String], name: &str) -> Result<PathBuf> {
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        return Err(Error::new(Kind::InvalidRequest, Stage::Target, name, "is not the name of a device in a pool"));
    }
    if !allow.iter().any(|pattern| glob_matches(pattern.as_bytes(), name.as_bytes())) {
        let message = format!("no pattern of the pool's allow-list matches it ({})", allow.join(", "));
        return Err(Error::new(Kind::PermissionDenied, Stage::Target, name, message).with_reason("DEVICE_NOT_ALLOWED"));
    }
    Ok(directory.join(name))
}

/// Shell patterns without braces: `*`, `?`, `[a-z]`, `[!a-z]`, and `\` before a literal. A malformed class matches nothing. Linear in space, at most
/// quadratic in time: it only ever goes back to the last star.
pub fn glob_matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        let step = match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, n));
                p += 1;
                continue;
            }
            Some(_) => match_one(&pattern[p..], name[n]),
            None => None,
        };
        match (step, star) {
            (Some(used), _) => (p, n) = (p + used, n + 1),
            (None, Some((after, at))) => {
                star = Some((after, at + 1));
                (p, n) = (after, at + 1);
            }
            (None, None) => return false,
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// How many bytes of `pattern` match `byte`, if they do.
fn match_one(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern {
        [b'?', ..] => Some(1),
        [b'\\', literal, ..] => (*literal == byte).then_some(2),
        [b'[', class @ ..] => {
            let negated = class.first() == Some(&b'!');
            let class = if negated { &class[1..] } else { class };
            // A bracket that comes first is a member.
            let end = class.iter().skip(1).position(|b| *b == b']')? + 1;
            let (mut members, mut hit) = (&class[..end], false);
            while let Some((&low, rest)) = members.split_first() {
                if let [b'-', high, after @ ..] = rest {
                    hit |= (low..=*high).contains(&byte);
                    members = after;
                } else {
                    hit |= low == byte;
                    members = rest;
                }
            }
            (hit != negated).then_some(1 + usize::from(negated) + end + 1)
        }
        [literal, ..] => (*literal == byte).then_some(1),
        [] => None,
    }
}

/// The first half of `/proc/sys/kernel/random/boot_id`, which changes with every boot.
pub fn boot_token() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let hex: String = text.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    u64::from_str_radix(&hex, 16).ok()
}

fn number_of(meta: &std::fs::Metadata) -> (u32, u32) {
    (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()))
}

fn changed(path: &Path, why: impl Into<String>) -> Error {
    Error::new(Kind::Conflict, Stage::Target, path.display().to_string(), why).with_reason("DEVICE_CHANGED")
}

/// Tells the device that a range is not needed (`BLKDISCARD`); what it reads as afterwards is undefined. `EOPNOTSUPP`: it can't.
pub fn discard_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    sys::discard(file, offset, len)
}

/// Makes `len` bytes from `offset` read as zeros: by the device where it can, else by writing them. Both are multiples of the logical block size.
pub fn zero_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    match sys::zero_out(file, offset, len) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOTTY)) => {}
        other => return other,
    }
    let zeros = vec![0; 1 << 20];
    let mut done = 0;
    while done < len {
        let count = (len - done).min(zeros.len() as u64);
        file.write_all_at(&zeros[..count as usize], offset + done)?;
        done += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_a_shell() {
        for (pattern, name, want) in [
            ("vm-*", "vm-1", true),
            ("vm-*", "root", false),
            ("*", "", true),
            ("*-disk", "a-disk-b-disk", true),
            ("*-disk", "a-disk-b", false),
            ("sd[b-d]", "sdc", true),
            ("sd[b-d]", "sda", false),
            ("sd[!a]", "sda", false),
            ("sd[!a]", "sdb", true),
            ("sd?", "sd", false),
            ("sd?", "sdb1", false),
            ("a[]b]c", "a]c", true),
            ("a[bc", "ab", false),
            ("a\\*", "a*", true),
            ("a\\*", "ab", false),
            ("", "", true),
            ("", "a", false),
        ] {
            assert_eq!(glob_matches(pattern.as_bytes(), name.as_bytes()), want, "{pattern} {name}");
        }
        let stars = "*a".repeat(2000);
        assert!(!glob_matches(stars.as_bytes(), "a".repeat(1999).as_bytes()), "and it does not take for ever");
    }

    #[test]
    fn names_outside_the_allow_list_are_refused_before_anything_is_opened() {
        let error = device_path(Path::new("/dev"), &["vm-*".into()], "sda").expect_err("not allowed");
        assert_eq!((error.kind(), error.reason()), (Kind::PermissionDenied, "DEVICE_NOT_ALLOWED"));
        for name in ["", ".", "..", "vm-/../sda"] {
            assert!(device_path(Path::new("/dev"), &["*".into()], name).is_err(), "{name}");
        }
    }

    #[test]
    fn this_boot_has_a_token() {
        assert!(boot_token().is_some());
    }
}
