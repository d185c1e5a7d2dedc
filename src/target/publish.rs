//! Volumes that are files: staged under a temporary name in the pool's directory, published by a rename that replaces nothing.
//!
//! ```text
//!  create  .cloudletd-stage-RENDER-VOLUME   O_EXCL, mode 0600, exclusive flock as long as the stage lives, marked as RENDER's
//!  publish fsync file ─► renameat2(RENAME_NOREPLACE) (or link + unlink) ─► fsync directory
//!  replace fsync file ─► old one not in use? lock it ─► rename over it ─► fsync directory
//!  drop    unlink
//! ```
//!
//! The mark is an extended attribute with the render's id and the file's inode number: after a crash it proves that a file which the catalogue does not know
//! was published by that render, and a copy of the file has another inode. The flock tells a live stage from what a dead daemon left: `sweep` removes only what nobody holds.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FlockOperation, Mode, OFlags, RenameFlags, XattrFlags},
    io::Errno,
};

use crate::{
    error::{Error, Kind, Result, Stage},
    failpoint::reach,
    host::{in_use, loops, mounts},
    names::VolumeName,
    target::{Place, Pool, Proof, Staged, Volume, VolumeFormat, VolumePlan, Wanted},
    units::{MIB, PATCH_BLOCK},
};

/// How temporary names start.
const STAGE_PREFIX: &str = ".cloudletd-stage-";
/// Extended attributes that a file's render is written to, the first that can be had. Only processes with CAP_SYS_ADMIN see or set the one (xattr(7)); the other is
/// for daemons without, and as good as the file's mode.
const MARKS: [&str; 2] = ["trusted.cloudletd.render", "user.cloudletd.render"];
/// Kept free in a pool: one part in this many of the filesystem …
const RESERVE_PART: u64 = 100;
/// … but not more than this. A full filesystem under running guests pauses or corrupts them.
const RESERVE_BYTES_MAX: u64 = 1024 * MIB;

/// A file that is being written.
pub(super) struct StagedFile {
    directory: File,
    directory_path: PathBuf,
    temporary: String,
    path: PathBuf,
    file: File,
    /// Whether the temporary name is still there to be removed.
    armed: bool,
    /// Whether it takes the place of a published file.
    replaces: bool,
    /// Whether it carries its render's mark.
    marked: bool,
    volume: Volume,
}

impl StagedFile {
    /// Creates the temporary file for `plan`. `AlreadyExists`: the name is taken, or another stage of the same render runs.
    pub fn create(plan: &VolumePlan<'_>, format: VolumeFormat) -> Result<Self> {
        validate(plan, format)?;
        let directory_path = directory_of(plan.pool, format)?.to_owned();
        let directory = File::open(&directory_path)
            .map_err(|error| Error::io(Stage::Target, directory_path.display().to_string(), "open the pool's directory", error))?;
        refuse_taken(&directory_path, plan.name, format, plan.replace)?;
        let temporary = format!("{STAGE_PREFIX}{}-{}", plan.render, plan.name.as_str());
        let path = directory_path.join(&temporary);
        let file = create_temporary(&directory, &temporary, &path)?;
        let marked = mark(&file, plan.render);
        reach("file-created");
        let final_path = directory_path.join(file_name(plan.name, format));
        let volume = Volume {
            pool: plan.pool.name.clone(),
            name: plan.name.clone(),
            format,
            path: final_path.clone(),
            device: final_path,
            virtual_size_bytes: plan.patch.size_bytes(),
            allocated_size_bytes: 0,
            backing: None,
            pinned: None,
            options: plan.options.clone(),
        };
        Ok(StagedFile { directory, directory_path, temporary, path, file, armed: true, replaces: plan.replace.is_some(), marked, volume })
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A second descriptor for direct I/O, or one as the first where the filesystem has none (EINVAL: tmpfs before Linux 6.6). It is opened through the
    /// first, not by name.
    pub fn open_direct(&self) -> Result<File> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        match OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.file.try_clone().map_err(|error| self.error("duplicate the descriptor", error))
            }
            other => other.map_err(|error| self.error("open for direct I/O", error)),
        }
    }

    /// The temporary path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Says that the volume depends on another file.
    pub fn set_backing(&mut self, path: &Path) {
        self.volume.backing = Some(path.to_owned());
    }

    /// Bytes allocated by the filesystem.
    pub fn allocated_size_bytes(&self) -> Result<u64> {
        let meta = self.file.metadata().map_err(|error| self.error("stat", error))?;
        Ok(meta.blocks().saturating_mul(512))
    }

    /// An error about this file.
    pub fn error(&self, doing: impl Into<String>, error: io::Error) -> Error {
        Error::io(Stage::Target, self.path.display().to_string(), doing, error)
    }

    /// See the head of this file. What `Drop` would have removed is the published volume afterwards.
    pub fn publish(mut self) -> Result<Volume> {
        reach("file-written");
        self.file.sync_all().map_err(|error| self.error("flush", error))?;
        reach("file-flushed");
        self.volume.allocated_size_bytes = self.allocated_size_bytes()?;
        let name = file_name(&self.volume.name, self.volume.format);
        let renamed = if self.replaces {
            // Looked at again: a guest may have been started while the new volume was written. From here on none can be.
            let _old = claim_replaced(&self.volume.path, self.volume.format)?;
            rustix::fs::renameat(&self.directory, &self.temporary, &self.directory, &name)
        } else {
            rename_no_replace(&self.directory, &self.temporary, &name)
        };
        match renamed {
            Ok(()) => self.armed = false,
            // Another file than this one has the name.
            Err(Errno::EXIST) => return Err(taken(&self.volume.path)),
            Err(errno) => return Err(self.error(format!("publish as {name}"), errno.into())),
        }
        reach("file-named");
        if let Err(error) = self.directory.sync_all() {
            let error = Error::io(Stage::Target, self.directory_path.display().to_string(), "flush the pool's directory", error);
            if self.replaces {
                // The old volume's name is gone already: what is there now is the new one, and that is what has to be known of it.
                tracing::error!(path = %self.volume.path.display(), error = %error.chain(), "the replaced volume may come back after a power cut");
                return Ok(self.volume.clone());
            }
            // Not durable is not there.
            return Err(match rustix::fs::unlinkat(&self.directory, &name, AtFlags::empty()) {
                Ok(()) => error,
                Err(errno) => error.with_cleanup_failure(Error::io(Stage::Target, name, "remove", errno.into())),
            });
        }
        reach("file-durable");
        Ok(self.volume.clone())
    }

    /// The volume as far as it is known.
    pub fn foreseen(&self) -> &Volume {
        &self.volume
    }

    /// See [`Staged::proof`].
    pub fn proof(&self) -> Result<Proof> {
        if self.marked {
            return Ok(Proof::Mark);
        }
        Ok(Proof::Inode(self.file.metadata().map_err(|error| self.error("stat", error))?.ino()))
    }
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        if self.armed
            && let Err(errno) = rustix::fs::unlinkat(&self.directory, &self.temporary, AtFlags::empty())
        {
            tracing::warn!(path = %self.path.display(), error = %errno, "a staged file is left behind");
        }
    }
}

impl Staged for StagedFile {
    fn allocated_size_bytes(&self) -> Result<u64> {
        StagedFile::allocated_size_bytes(self)
    }

    fn path(&self) -> &Path {
        StagedFile::path(self)
    }

    fn foreseen(&self) -> &Volume {
        StagedFile::foreseen(self)
    }

    fn proof(&self) -> Result<Proof> {
        StagedFile::proof(self)
    }

    fn publish(self: Box<Self>) -> Result<Volume> {
        StagedFile::publish(*self)
    }
}

/// What a file of `render` carries.
fn mark_of(render: &str, inode: u64) -> String {
    format!("{render} {inode}")
}

/// Marks a file as `render`'s; `false` where that is not possible (NFS, FAT).
fn mark(file: &File, render: &str) -> bool {
    let Ok(meta) = file.metadata() else { return false };
    let mark = mark_of(render, meta.ino());
    MARKS.iter().any(|name| rustix::fs::fsetxattr(file, *name, mark.as_bytes(), XattrFlags::empty()).is_ok())
}

/// Whether this is the name of a temporary file of a pool.
pub(crate) fn is_stage_name(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes().starts_with(STAGE_PREFIX.as_bytes())
}

/// The render whose mark the file at `path` carries; none when it has none, or is a copy of the one that has.
pub(crate) fn marked_by(path: &Path) -> Result<Option<String>> {
    let failed = |doing: &str, error: io::Error| Error::io(Stage::Target, path.display().to_string(), doing, error);
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|error| failed("see who made it", error))?,
    };
    let inode = file.metadata().map_err(|error| failed("stat", error))?.ino();
    for name in MARKS {
        let mut value = [0; 256];
        let len = match rustix::fs::fgetxattr(&file, name, &mut value) {
            Ok(len) => len,
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => continue,
            Err(errno) => return Err(failed("read its mark", errno.into())),
        };
        let render = std::str::from_utf8(&value[..len]).ok().and_then(|text| text.split_once(' ')).map(|(render, _)| render);
        if let Some(render) = render.filter(|render| value[..len] == *mark_of(render, inode).as_bytes()) {
            return Ok(Some(render.to_owned()));
        }
    }
    Ok(None)
}

/// See [`Target::is_published`](super::Target::is_published).
pub(super) fn is_published(pool: &Pool, format: VolumeFormat, name: &VolumeName, render: &str, proof: &Proof) -> Result<bool> {
    let path = directory_of(pool, format)?.join(file_name(name, format));
    let object = || path.display().to_string();
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened.map_err(|error| Error::io(Stage::Target, object(), "see who made it", error))?,
    };
    let inode = file.metadata().map_err(|error| Error::io(Stage::Target, object(), "stat", error))?.ino();
    match proof {
        Proof::Inode(wanted) => Ok(*wanted == inode),
        Proof::Head { .. } => Ok(false),
        Proof::Mark => Ok(marked_by(&path)?.as_deref() == Some(render)),
    }
}

/// The checks of a file target that write nothing.
pub(super) fn check(wanted: &Wanted<'_>, format: VolumeFormat) -> Result<()> {
    wanted.options.check(format)?;
    let (directory, name) = (directory_of(wanted.pool, format)?, wanted.name);
    refuse_taken(directory, name, format, wanted.replace)?;
    let allocate_bytes = wanted.options.allocation(wanted.size_bytes, wanted.allocate_bytes);
    let object = || directory.display().to_string();
    let stat = rustix::fs::statvfs(directory).map_err(|errno| Error::io(Stage::Target, object(), "get the pool's free space", errno.into()))?;
    let available = stat.f_bavail.saturating_mul(stat.f_frsize);
    let reserve = (stat.f_blocks.saturating_mul(stat.f_frsize) / RESERVE_PART).min(RESERVE_BYTES_MAX);
    if allocate_bytes.saturating_add(reserve) > available {
        let message = format!("{} needs {allocate_bytes} bytes and {reserve} are kept free, the pool has {available}", name.as_str());
        return Err(Error::new(Kind::NoSpace, Stage::Target, object(), message).with_reason("POOL_FULL"));
    }
    Ok(())
}

/// Finds a published file again: it must be there, regular, and its backing file too.
pub(super) fn adopt(pool: &Pool, volume: &Volume) -> Result<Volume> {
    let path = directory_of(pool, volume.format)?.join(file_name(&volume.name, volume.format));
    let object = || path.display().to_string();
    let meta = std::fs::symlink_metadata(&path).map_err(|error| Error::io(Stage::Target, object(), "find the volume's file", error))?;
    if !meta.is_file() {
        return Err(Error::new(Kind::Corrupt, Stage::Target, object(), "is not a regular file"));
    }
    if let Some(backing) = &volume.backing {
        std::fs::metadata(backing).map_err(|error| {
            Error::io(Stage::Target, backing.display().to_string(), format!("find the golden image behind {}", object()), error)
                .with_reason("BACKING_MISSING")
        })?;
    }
    Ok(Volume { path, ..volume.clone() })
}

/// Unlinks a published file unless it is in use. Not there is success.
pub(super) fn delete(pool: &Pool, format: VolumeFormat, name: &VolumeName) -> Result<()> {
    let directory_path = directory_of(pool, format)?;
    let name = file_name(name, format);
    let path = directory_path.join(&name);
    in_use::refuse_file_in_use(&path)?;
    let directory = File::open(directory_path)
        .map_err(|error| Error::io(Stage::Target, directory_path.display().to_string(), "open the pool's directory", error))?;
    match rustix::fs::unlinkat(&directory, &name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(Error::io(Stage::Target, path.display().to_string(), "remove", errno.into())),
    }
    directory.sync_all().map_err(|error| Error::io(Stage::Target, directory_path.display().to_string(), "flush the pool's directory", error))
}

/// Removes temporary files that no live stage holds. Pools of devices have none.
pub(super) fn sweep(pool: &Pool, dry_run: bool) -> Result<Vec<PathBuf>> {
    let Place::Directory { path } = &pool.place else { return Ok(Vec::new()) };
    let failed = |doing: &str, error: io::Error| Error::io(Stage::Target, path.display().to_string(), doing, error);
    let mut removed = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|error| failed("list the pool", error))? {
        let entry = entry.map_err(|error| failed("list the pool", error))?;
        let is_ours = entry.file_name().as_encoded_bytes().starts_with(STAGE_PREFIX.as_bytes());
        if !is_ours || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        let Ok(file) = File::open(entry.path()) else { continue };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        if !dry_run {
            // A loop volume is attached before it has its name.
            for device in loops::find_by_backing(&entry.path())? {
                loops::detach(&device)?;
            }
            std::fs::remove_file(entry.path()).map_err(|error| failed("remove a stale stage", error))?;
        }
        removed.push(entry.path());
    }
    removed.sort();
    Ok(removed)
}

/// The directory of a pool that holds files.
pub(super) fn directory_of(pool: &Pool, format: VolumeFormat) -> Result<&Path> {
    match &pool.place {
        Place::Directory { path } => Ok(path),
        Place::Devices { .. } => {
            let message = format!("the pool holds block devices; {} needs a pool that is a directory", format.name());
            Err(Error::new(Kind::InvalidRequest, Stage::Target, pool.name.as_str(), message).with_reason("POOL_KIND_DIFFERS"))
        }
    }
}

/// The file of a volume in its pool's directory.
pub(super) fn file_name(name: &VolumeName, format: VolumeFormat) -> String {
    let extension = match format {
        VolumeFormat::Raw | VolumeFormat::Loop | VolumeFormat::Block => "raw",
        VolumeFormat::Qcow2 | VolumeFormat::Qcow2Overlay => "qcow2",
    };
    format!("{}.{extension}", name.as_str())
}

/// What must hold of every plan, whatever the target.
pub(super) fn validate(plan: &VolumePlan<'_>, format: VolumeFormat) -> Result<()> {
    plan.options.check(format)?;
    let (size, golden) = (plan.patch.size_bytes(), plan.golden.size_bytes);
    let refuse = |message: String| Err(Error::new(Kind::InvalidRequest, Stage::Target, plan.name.as_str(), message));
    if size < golden {
        return refuse(format!("a volume of {size} bytes can't hold the golden image of {golden} bytes"));
    }
    if !size.is_multiple_of(PATCH_BLOCK) || !golden.is_multiple_of(PATCH_BLOCK) || size > i64::MAX as u64 {
        return refuse(format!("sizes are multiples of {PATCH_BLOCK} below 2^63; volume {size}, golden image {golden}"));
    }
    if let Some((last, _)) = plan.patch.iter().next_back()
        && last >= size / PATCH_BLOCK
    {
        return Err(Error::internal(Stage::Target, plan.name.as_str(), format!("patch block {last} lies beyond the volume's {size} bytes")));
    }
    if plan.render.is_empty() || plan.render.contains(['/', '\0']) {
        return Err(Error::internal(Stage::Target, plan.render, "a render id is a part of a file name"));
    }
    Ok(())
}

/// A volume's name is unique in its pool, whatever the format; only the file that is replaced may have it, and nobody may use it.
fn refuse_taken(directory: &Path, name: &VolumeName, format: VolumeFormat, replace: Option<&Volume>) -> Result<()> {
    let own = file_name(name, format);
    for format in [VolumeFormat::Raw, VolumeFormat::Qcow2] {
        let path = directory.join(file_name(name, format));
        let is_replaced = replace.is_some_and(|old| old.name == *name && old.path == path) && path == directory.join(&own);
        match std::fs::symlink_metadata(&path) {
            Ok(_) if is_replaced => {}
            Ok(_) => return Err(taken(&path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(Stage::Target, path.display().to_string(), "see whether the name is free", error)),
        }
    }
    if replace.is_some() { refuse_replaced_in_use(&directory.join(own), format) } else { Ok(()) }
}

/// A loop volume is always attached to its device; what counts is who uses that, or the file besides.
pub(super) fn refuse_replaced_in_use(path: &Path, format: VolumeFormat) -> Result<()> {
    let refused = |error: Error| error.with_reason("VOLUME_IN_USE");
    if format != VolumeFormat::Loop {
        return in_use::refuse_file_in_use(path).map_err(refused);
    }
    for device in loops::find_by_backing(path)? {
        if let Some(number) = mounts::block_number(&device) {
            in_use::refuse_device_in_use(&device, number).map_err(refused)?;
        }
    }
    in_use::refuse_file_opened(path).map_err(refused)
}

/// The file that is replaced, locked as QEMU locks images, so that no guest is started from it while it gives way. Nothing when it is gone already.
fn claim_replaced(path: &Path, format: VolumeFormat) -> Result<Option<File>> {
    refuse_replaced_in_use(path, format)?;
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|error| Error::io(Stage::Target, path.display().to_string(), "open the volume that is replaced", error))?,
    };
    in_use::lock_image(&file, path).map_err(|error| error.with_reason("VOLUME_IN_USE"))?;
    Ok(Some(file))
}

fn taken(path: &Path) -> Error {
    Error::new(Kind::AlreadyExists, Stage::Target, path.display().to_string(), "the volume's name is taken").with_reason("VOLUME_EXISTS")
}

fn create_temporary(directory: &File, name: &str, path: &Path) -> Result<File> {
    let failed = |doing: &str, errno: Errno| Error::io(Stage::Target, path.display().to_string(), doing, errno.into());
    // Twice: the first may meet what an earlier daemon left of the same render.
    for attempt in 0..2 {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match rustix::fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(descriptor) => {
                let file = File::from(descriptor);
                rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|errno| failed("lock", errno))?;
                return Ok(file);
            }
            Err(Errno::EXIST) if attempt == 0 => {}
            Err(errno) => return Err(failed("create", errno)),
        }
        let stale = match rustix::fs::openat(directory, name, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()) {
            Ok(descriptor) => File::from(descriptor),
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(failed("open what an earlier stage left", errno)),
        };
        if rustix::fs::flock(&stale, FlockOperation::NonBlockingLockExclusive).is_err() {
            let message = "another stage of the same render and volume is running";
            return Err(Error::new(Kind::Conflict, Stage::Target, path.display().to_string(), message));
        }
        rustix::fs::unlinkat(directory, name, AtFlags::empty()).map_err(|errno| failed("remove what an earlier stage left", errno))?;
    }
    Err(Error::new(Kind::Busy, Stage::Target, path.display().to_string(), "the temporary name is created by somebody else again and again"))
}

/// Filesystems without RENAME_NOREPLACE (EINVAL) get a hard link, which never replaces either.
fn rename_no_replace(directory: &File, from: &str, to: &str) -> Result<(), Errno> {
    match rustix::fs::renameat_with(directory, from, directory, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) => {
            rustix::fs::linkat(directory, from, directory, to, AtFlags::empty())?;
            rustix::fs::unlinkat(directory, from, AtFlags::empty())
        }
        other => other,
    }
}
