//! The reaper: what older versions, crashes that the journal does not know of, or operators left. It says what it found; only what is proven to be this daemon's
//! is removed, and only when that was asked for.
//!
//! | what                                   | proof that it is ours                                                    | removed                       |
//! |----------------------------------------|--------------------------------------------------------------------------|-------------------------------|
//! | stage in a pool                        | its name, and no process holds its lock                                  | yes                           |
//! | volume that the catalogue does not know | its mark: the id of a render, and the file's own inode number            | with `volumes`, if not in use |
//! | golden without a row                   | a directory of the store named by a key, no file of a pool lies over it  | yes, if not in use            |
//! | tarball without a row                  | a file of the store whose SHA-256 is its name                            | yes                           |
//! | interrupted download of no image       | a file of the store's `tmp`, unused for an hour                          | yes                           |
//! | loop device                            | its file was a stage of a pool or a file of the store's `tmp`            | detached, if not in use       |
//! | row of a volume without its file       | –                                                                        | never: DeleteVolume does      |
//! | anything else in pools and store       | none                                                                     | never: it is only named       |
//!
//! A volume that is not known may be what is left after an old catalogue was put back: it holds somebody's data. That is why it needs a word of its own.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use crate::{
    error::{Error, Result, Stage},
    host::{in_use, loops, mounts},
    names::Digest,
    render::{Engine, verify::hash_of},
    store::sync_dir,
    target::{Place, VolumeFormat, publish, target_for},
};

/// How long an interrupted download has to be untouched.
const PARTIAL_AGE_MIN: Duration = Duration::from_secs(3600);

/// What kind of thing is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// A temporary file of a pool.
    Stage,
    /// A volume that the catalogue does not know.
    Volume,
    /// A golden without a row.
    Golden,
    /// A tarball without a row.
    Blob,
    /// An interrupted download.
    Partial,
    /// A loop device.
    LoopDevice,
    /// A row of a volume whose file is gone.
    Row,
    /// Something that is not known to be ours.
    Foreign,
}

impl Left {
    /// The name in the protocol.
    pub fn name(self) -> &'static str {
        match self {
            Left::Stage => "stage",
            Left::Volume => "volume",
            Left::Golden => "golden",
            Left::Blob => "blob",
            Left::Partial => "partial",
            Left::LoopDevice => "loop-device",
            Left::Row => "row",
            Left::Foreign => "foreign",
        }
    }
}

/// Something that is left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// What it is.
    pub left: Left,
    /// Where it is.
    pub path: PathBuf,
    /// Bytes that it takes, as far as that can be said.
    pub bytes: u64,
    /// Why it is taken for what it is.
    pub why: String,
    /// Whether it was removed (would be, in a dry run).
    pub removed: bool,
    /// Why it stays; empty when it does not.
    pub kept_because: String,
}

/// What may be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reap {
    /// Nothing is.
    pub dry_run: bool,
    /// Volumes too that the catalogue does not know.
    pub volumes: bool,
}

/// A thing that was found, and how it would be removed.
struct Found<'a> {
    left: Left,
    path: PathBuf,
    why: String,
    /// Why it can't be removed, if so.
    keep: Option<String>,
    remove: Box<dyn FnOnce() -> Result<()> + 'a>,
}

impl Engine {
    /// Finds what is left over, and removes what is proven to be ours. Blocking.
    pub fn reap(&self, reap: Reap) -> Result<Vec<Leftover>> {
        // Nothing is collected or gets a name in the store meanwhile.
        let _turn = self.collecting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut found = self.rows_without_files()?;
        found.extend(self.loop_devices()?);
        found.extend(self.in_pools(reap)?);
        found.extend(self.goldens_without_rows()?);
        found.extend(self.blobs_without_rows()?);
        found.extend(self.partials()?);
        found.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(found.into_iter().map(|found| carry_out(found, reap.dry_run)).collect())
    }

    fn rows_without_files(&self) -> Result<Vec<Found<'_>>> {
        let mut found = Vec::new();
        for record in self.store.catalog.volumes(None, u32::MAX, 0)? {
            let volume = record.volume;
            if volume.format != VolumeFormat::Block
                && matches!(fs::symlink_metadata(&volume.path), Err(error) if error.kind() == std::io::ErrorKind::NotFound)
            {
                let why = format!("the catalogue has volume {}/{}, its file is gone", volume.pool, volume.name);
                found.push(only_named(Left::Row, volume.path, why, "delete the volume, if it is not to come back"));
            }
        }
        Ok(found)
    }

    fn loop_devices(&self) -> Result<Vec<Found<'_>>> {
        let known: BTreeSet<PathBuf> =
            self.store.catalog.volumes_of_format(VolumeFormat::Loop)?.into_iter().map(|record| record.volume.path).collect();
        let tmp = self.store.tmp();
        let mut found = Vec::new();
        for device in loops::attached()? {
            let text = device.backing.to_string_lossy().into_owned();
            let (file, is_gone) = text.strip_suffix(" (deleted)").map_or((text.as_str(), false), |file| (file, true));
            let file = PathBuf::from(file);
            let in_pool = self.pools.values().any(|pool| matches!(&pool.place, Place::Directory { path } if file.parent() == Some(path)));
            let is_stage = in_pool && file.file_name().is_some_and(publish::is_stage_name);
            let why = format!("is attached to {text}");
            // A stage that is being published now is attached, and its file is there and locked.
            if (is_stage || file.starts_with(&tmp)) && is_gone {
                let (path, node) = (device.path.clone(), device.path);
                let keep = mounts::block_number(&node)
                    .and_then(|number| in_use::refuse_device_in_use(&node, number).err())
                    .map(|error| error.message().to_owned());
                found.push(Found { left: Left::LoopDevice, path, why, keep, remove: Box::new(move || loops::detach(&node)) });
            } else if in_pool && !is_stage && (is_gone || !known.contains(&file)) {
                found.push(only_named(Left::LoopDevice, device.path, why, "it may be an operator's"));
            }
        }
        Ok(found)
    }

    fn in_pools(&self, reap: Reap) -> Result<Vec<Found<'_>>> {
        let mut found = Vec::new();
        for pool in self.pools.values() {
            let Place::Directory { path: directory } = &pool.place else { continue };
            let known: BTreeSet<PathBuf> =
                self.store.catalog.volumes(Some(&[pool.name.as_str()]), u32::MAX, 0)?.into_iter().map(|record| record.volume.path).collect();
            for stage in target_for(VolumeFormat::Raw).sweep(pool, true)? {
                let why = "a temporary file that nobody holds".to_owned();
                let remove = Box::new(move || target_for(VolumeFormat::Raw).sweep(pool, false).map(|_| ()));
                found.push(Found { left: Left::Stage, path: stage, why, keep: None, remove });
            }
            for path in files_of(directory)? {
                if known.contains(&path) || path.file_name().is_some_and(publish::is_stage_name) {
                    continue;
                }
                found.extend(match publish::marked_by(&path)? {
                    _ if self.is_reserved(pool, &path) => None,
                    None => Some(only_named(Left::Foreign, path, "a file in a pool without a mark of ours".to_owned(), "nothing says whose it is")),
                    Some(render) => {
                        let keep = match in_use::refuse_file_in_use(&path) {
                            Err(error) => Some(error.message().to_owned()),
                            Ok(()) if !reap.volumes => Some("volumes go only when that is asked for".to_owned()),
                            Ok(()) => None,
                        };
                        let (directory, file) = (directory.clone(), path.clone());
                        let remove = Box::new(move || remove_file(&file).and_then(|()| sync_dir(&directory)));
                        Some(Found { left: Left::Volume, path, why: format!("made by {render}, and not in the catalogue"), keep, remove })
                    }
                });
            }
        }
        Ok(found)
    }

    /// Whether a render or another change has the volume of this file.
    fn is_reserved(&self, pool: &crate::target::Pool, path: &Path) -> bool {
        let reserved = self.reserved.lock().expect("no panic while holding the reservations");
        path.file_stem().is_some_and(|stem| reserved.iter().any(|(of, name)| *of == pool.name && stem == name.as_str()))
    }

    fn goldens_without_rows(&self) -> Result<Vec<Found<'_>>> {
        let directory = self.store.dir().join("goldens");
        let known: BTreeSet<String> = self.store.catalog.goldens(None)?.into_iter().map(|(golden, _)| golden.key.hex()).collect();
        let overlays = self.overlays()?;
        let mut found = Vec::new();
        for path in entries_of(&directory)? {
            let Some(key) = name_of(&path).filter(|name| !known.contains(name)) else { continue };
            let Ok(digest) = format!("sha256:{key}").parse::<Digest>() else {
                found.push(only_named(Left::Foreign, path, "is not the name of a golden image".to_owned(), "nothing says whose it is"));
                continue;
            };
            let keep = match (overlays.get(&key), in_use::refuse_file_in_use(&path.join("disk.raw"))) {
                (Some(overlay), _) => Some(format!("{overlay} lies over it")),
                (None, Err(error)) => Some(error.message().to_owned()),
                (None, Ok(())) => self.builds.is_busy(&digest).then(|| "it is being built".to_owned()),
            };
            let remove = Box::new(move || self.unlink(crate::store::gc::Kept::Golden, &digest));
            found.push(Found { left: Left::Golden, path, why: "a golden image that the catalogue does not know".to_owned(), keep, remove });
        }
        Ok(found)
    }

    fn blobs_without_rows(&self) -> Result<Vec<Found<'_>>> {
        let directory = self.store.dir().join("blobs");
        let known: BTreeSet<String> = self.store.catalog.blobs()?.into_iter().map(|blob| blob.digest.hex()).collect();
        let mut found = Vec::new();
        for path in entries_of(&directory)? {
            let Some(name) = name_of(&path).filter(|name| !known.contains(name)) else { continue };
            if !path.is_file() || hash_of(&path)?.hex() != name {
                found.push(only_named(Left::Foreign, path, "its name is not its digest".to_owned(), "nothing says whose it is"));
                continue;
            }
            let (directory, file) = (directory.clone(), path.clone());
            let remove = Box::new(move || {
                let _gate = self.store.blob_gate();
                remove_file(&file).and_then(|()| sync_dir(&directory))
            });
            found.push(Found { left: Left::Blob, path, why: "a tarball that the catalogue does not know".to_owned(), keep: None, remove });
        }
        Ok(found)
    }

    fn partials(&self) -> Result<Vec<Found<'_>>> {
        let images = self.store.catalog.images(u32::MAX, 0)?;
        let wanted: BTreeSet<String> = images
            .iter()
            .filter_map(|image| {
                Some(format!("partial-{}", Digest::of(format!("{}\n{:?}", image.rootfs_url.as_ref()?, image.rootfs_digest).as_bytes()).hex()))
            })
            .collect();
        let mut found = Vec::new();
        for path in entries_of(&self.store.tmp())? {
            let Some(name) = name_of(&path).filter(|name| name.starts_with("partial-")) else { continue };
            let of_an_image = wanted.iter().any(|wanted| name.starts_with(wanted.as_str()));
            let is_old = fs::metadata(&path)
                .and_then(|meta| meta.modified())
                .is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > PARTIAL_AGE_MIN));
            if !of_an_image && is_old {
                let file = path.clone();
                let why = "an interrupted download that no image needs".to_owned();
                found.push(Found { left: Left::Partial, path, why, keep: None, remove: Box::new(move || remove_file(&file)) });
            }
        }
        Ok(found)
    }
}

fn only_named<'a>(left: Left, path: PathBuf, why: String, keep: &str) -> Found<'a> {
    Found { left, path, why, keep: Some(keep.to_owned()), remove: Box::new(|| Ok(())) }
}

fn carry_out(found: Found<'_>, dry_run: bool) -> Leftover {
    let Found { left, path, why, keep, remove } = found;
    let bytes = bytes_of(&path);
    let kept_because = match keep {
        Some(keep) => keep,
        None if dry_run => String::new(),
        None => match remove() {
            Ok(()) => {
                tracing::warn!(path = %path.display(), kind = left.name(), "a leftover was removed");
                String::new()
            }
            Err(error) => error.chain(),
        },
    };
    Leftover { left, path, bytes, why, removed: kept_because.is_empty(), kept_because }
}

/// Bytes allocated for a file, or for the files of a directory.
fn bytes_of(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
    if !meta.is_dir() {
        return meta.blocks().saturating_mul(512);
    }
    let files = fs::read_dir(path).into_iter().flatten().flatten();
    files.filter_map(|entry| Some(entry.metadata().ok()?.blocks().saturating_mul(512))).fold(0, u64::saturating_add)
}

fn name_of(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_str()?.to_owned())
}

fn entries_of(directory: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error| Error::io(Stage::Store, directory.display().to_string(), "list", error);
    fs::read_dir(directory).map_err(failed)?.map(|entry| Ok(entry.map_err(failed)?.path())).collect()
}

fn files_of(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = entries_of(directory)?;
    files.retain(|path| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file()));
    Ok(files)
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(Stage::Store, path.display().to_string(), "remove", error)),
        _ => Ok(()),
    }
}
