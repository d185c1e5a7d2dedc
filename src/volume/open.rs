//! Opening a volume that is there: claimed for as long as it is open.

use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    patch::FilePatch,
    qcow2::{BackingName, Qcow2, Source},
};
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::{ReadAt, patch::BlockPatch},
    host::{
        block::{Access, Claim},
        in_use,
    },
    target::{Place, Pool, Volume, VolumeFormat, target_for},
    units::PATCH_BLOCK,
};

/// A volume that nobody else uses while this lives.
pub struct OpenVolume {
    held: Held,
    disk: Disk,
    path: PathBuf,
    size_bytes: u64,
}

/// What keeps others away.
enum Held {
    File(Arc<File>),
    Device(Claim),
}

/// How the guest's bytes lie in it.
enum Disk {
    Plain(Arc<File>),
    Qcow2(Arc<Qcow2>),
}

impl OpenVolume {
    /// Opens `volume` of `pool` for reading and changing. Files behind a qcow2 image are opened only when they are in one of the directories `known`.
    ///
    /// `Conflict`, reason `IN_USE`: locked, attached, mounted or open elsewhere; `DEVICE_CHANGED`: the name leads to another device than the one the volume
    /// was written to; `BACKING_NOT_KNOWN`: its backing file is somewhere else. `NotFound`: it is gone. `Unsupported` and `Corrupt` as [`Qcow2::open`].
    pub fn open(pool: &Pool, volume: &Volume, known: &[PathBuf]) -> Result<OpenVolume> {
        let volume = target_for(volume.format).adopt(pool, volume)?;
        match volume.format {
            VolumeFormat::Raw => Self::plain(Held::File(claim_file(&volume.path)?), volume.path),
            VolumeFormat::Qcow2 | VolumeFormat::Qcow2Overlay => Self::qcow2(claim_file(&volume.path)?, volume.path, known),
            VolumeFormat::Block => Self::plain(Held::Device(claim_device(pool, &volume)?), volume.path),
            VolumeFormat::Loop => {
                let name = volume.device.file_name().and_then(OsStr::to_str).unwrap_or_default();
                let claim = Claim::take(Path::new("/dev"), &["loop*".to_owned()], name, Access::Write)?;
                Self::plain(Held::Device(claim), volume.device)
            }
        }
    }

    /// Claims a volume to write a file patch that was computed earlier: its content, which may be half changed, is not looked at. Errors as for
    /// [`OpenVolume::open`].
    pub fn claim(pool: &Pool, volume: &Volume) -> Result<OpenVolume> {
        match volume.format {
            VolumeFormat::Qcow2 | VolumeFormat::Qcow2Overlay => {
                let volume = target_for(volume.format).adopt(pool, volume)?;
                Self::plain(Held::File(claim_file(&volume.path)?), volume.path)
            }
            VolumeFormat::Raw | VolumeFormat::Block | VolumeFormat::Loop => Self::open(pool, volume, &[]),
        }
    }

    fn plain(held: Held, path: PathBuf) -> Result<OpenVolume> {
        let failed = |doing: &'static str| {
            let object = path.display().to_string();
            move |error| Error::io(Stage::Target, object, doing, error)
        };
        let (file, len) = match &held {
            Held::File(file) => (Arc::clone(file), file.metadata().map_err(failed("stat"))?.len()),
            Held::Device(claim) => {
                in_use::lock_image(claim.file(), &path)?;
                (Arc::new(claim.file().try_clone().map_err(failed("duplicate the descriptor"))?), claim.size_bytes())
            }
        };
        Ok(OpenVolume { held, disk: Disk::Plain(file), path, size_bytes: len / PATCH_BLOCK * PATCH_BLOCK })
    }

    fn qcow2(file: Arc<File>, path: PathBuf, known: &[PathBuf]) -> Result<OpenVolume> {
        let len = file.metadata().map_err(|error| Error::io(Stage::Target, path.display().to_string(), "stat", error))?.len();
        let source = Source { name: path.display().to_string(), file: Arc::clone(&file) as Arc<dyn ReadAt>, len };
        let image = Arc::new(Qcow2::open(source, &|image, name| backing(image, name, known))?);
        let size_bytes = image.virtual_size();
        Ok(OpenVolume { held: Held::File(file), disk: Disk::Qcow2(image), path, size_bytes })
    }

    /// The guest's disk.
    pub fn reader(&self) -> Arc<dyn ReadAt> {
        match &self.disk {
            Disk::Plain(file) => Arc::clone(file) as Arc<dyn ReadAt>,
            Disk::Qcow2(image) => Arc::clone(image) as Arc<dyn ReadAt>,
        }
    }

    /// Size of the guest's disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The file or device that is written to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its open file.
    pub fn file(&self) -> &File {
        match &self.held {
            Held::File(file) => file,
            Held::Device(claim) => claim.file(),
        }
    }

    /// The inode of a volume that is a file.
    pub fn inode(&self) -> Option<u64> {
        match &self.held {
            Held::File(file) => file.metadata().ok().map(|meta| meta.ino()),
            Held::Device(_) => None,
        }
    }

    /// The bytes of the file or device that change for a patch of the guest's disk. Writes nothing.
    pub fn plan(&self, patch: &BlockPatch) -> Result<FilePatch> {
        if let Some((last, _)) = patch.iter().next_back()
            && last >= self.size_bytes.div_ceil(PATCH_BLOCK)
        {
            let text = format!("the patch changes block {last}, beyond the disk's {} bytes", self.size_bytes);
            return Err(Error::internal(Stage::Target, self.path.display().to_string(), text));
        }
        match &self.disk {
            Disk::Plain(_) => Ok(FilePatch::plain(patch)),
            Disk::Qcow2(image) => image.plan(patch),
        }
    }
}

/// Opens a volume's file, when nobody else has it, and locks it.
fn claim_file(path: &Path) -> Result<Arc<File>> {
    in_use::refuse_file_in_use(path)?;
    let failed = |doing: &str, error: io::Error| Error::io(Stage::Target, path.display().to_string(), doing, error);
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let file = file.map_err(|error| failed("open the volume", error))?;
    if !file.metadata().map_err(|error| failed("stat", error))?.is_file() {
        return Err(Error::new(Kind::Corrupt, Stage::Target, path.display().to_string(), "is not a regular file"));
    }
    in_use::lock_image(&file, path)?;
    Ok(Arc::new(file))
}

fn claim_device(pool: &Pool, volume: &Volume) -> Result<Claim> {
    let Place::Devices { directory, allow } = &pool.place else {
        return Err(Error::internal(Stage::Target, pool.name.as_str(), "a block device in a pool that is a directory"));
    };
    let claim = Claim::take(directory, allow, volume.name.as_str(), Access::Write)?;
    if let Some(pinned) = &volume.pinned {
        claim.id().require_same(pinned, claim.path())?;
    }
    Ok(claim)
}

/// Opens the file behind an image, when it is where such files are.
fn backing(image: &str, name: &BackingName, known: &[PathBuf]) -> Result<Source> {
    let shown = String::from_utf8_lossy(&name.path).into_owned();
    let refuse = |why: String| Error::new(Kind::Conflict, Stage::Target, image.to_owned(), why).with_reason("BACKING_NOT_KNOWN");
    let path = Path::new(OsStr::from_bytes(&name.path));
    if !path.is_absolute() && name.path.split(|byte| *byte == b'/').next().is_some_and(|first| first.contains(&b':')) {
        return Err(refuse(format!("its backing file {shown:?} is not a path")));
    }
    let path = Path::new(image).parent().unwrap_or(Path::new("/")).join(path);
    let real = std::fs::canonicalize(&path).map_err(|error| {
        Error::io(Stage::Target, path.display().to_string(), format!("find the backing file of {image}"), error).with_reason("BACKING_MISSING")
    })?;
    if !known.iter().filter_map(|directory| std::fs::canonicalize(directory).ok()).any(|directory| real.starts_with(directory)) {
        return Err(refuse(format!("its backing file {shown:?} is neither a golden image of this daemon nor in the volume's pool")));
    }
    let failed = |doing: &str, error: io::Error| Error::io(Stage::Target, real.display().to_string(), doing, error);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&real);
    let file = file.map_err(|error| failed("open the backing file", error))?;
    let meta = file.metadata().map_err(|error| failed("stat", error))?;
    if !meta.is_file() {
        return Err(refuse(format!("its backing file {shown:?} is not a regular file")));
    }
    Ok(Source { name: real.display().to_string(), file: Arc::new(file), len: meta.len() })
}
