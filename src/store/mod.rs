//! The host's own store: catalogue, blobs and golden images.
//!
//! ```text
//! STATE_DIR/
//!   lock                    held (flock) by the one daemon that uses the directory
//!   catalog.sqlite          images, blobs, goldens, renders, volumes with their mappings (SQLite, WAL)
//!   blobs/HEX               root filesystem tarballs, named by the SHA-256 of their bytes, mode 0444
//!   goldens/KEY/disk.raw    golden disks, sparse, mode 0444
//!   goldens/KEY/facts.json  what the tree contains (guest::facts)
//!   goldens/KEY/boot.json   how the disk can be started (boot::prepare)
//!   backups/                copies of the catalogue (store::catalog::backup)
//!   quarantine/             what was found damaged (render::verify)
//!   tmp/                    everything unfinished; emptied at start
//!   volumes/                the default pool, when none is configured
//! ```
//!
//! Names in `blobs` and `goldens` are lower-case hexadecimal and nothing else. A file there is complete: it was written in `tmp`, flushed, and renamed. Its
//! row is written before it has its name: a row without its files is nothing, and goes at the next start or with the next look; files without a row are never
//! made.

pub mod blobs;
pub mod catalog;
pub mod digest;
pub mod gc;
pub mod records;

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::fcntl::{Flock, FlockArg};
use tokio::sync::watch;

use crate::{
    error::{Error, Kind, Result, Stage},
    store::catalog::Catalog,
};

/// The opened store. One per process and directory.
pub struct Store {
    dir: PathBuf,
    /// Rows.
    pub catalog: Catalog,
    /// Held while a blob gets or loses its name.
    gate: Mutex<()>,
    _lock: Flock<File>,
    /// Behind the lock, so that it goes after it.
    opened: watch::Sender<()>,
}

impl Store {
    /// Opens or makes the store in `dir` (made with mode 0700 when missing), takes its lock and empties `tmp`.
    ///
    /// `Kind::Busy` when another daemon has it.
    pub fn open(dir: &Path) -> Result<Store> {
        // QEMU runs as another user and must be able to open goldens by path, but nobody may list them.
        for (sub, mode) in [("", 0o711), ("goldens", 0o711), ("blobs", 0o700), ("tmp", 0o700)] {
            let path = if sub.is_empty() { dir.to_path_buf() } else { dir.join(sub) };
            make_dir(&path, mode).map_err(|error| Error::io(Stage::Store, path.display().to_string(), "make directory", error))?;
        }
        let lock_path = dir.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(|error| Error::io(Stage::Store, lock_path.display().to_string(), "open the store's lock", error))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
            Error::new(Kind::Busy, Stage::Store, dir.display().to_string(), "another cloudletd uses this state directory").with_source(errno)
        })?;
        let store = Store {
            dir: dir.to_path_buf(),
            catalog: Catalog::open(&dir.join("catalog.sqlite"))?,
            gate: Mutex::new(()),
            _lock: lock,
            opened: watch::Sender::new(()),
        };
        store.empty_tmp()?;
        Ok(store)
    }

    /// The state directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Ready when the store is dropped and its lock free: from then on another process may open it.
    pub fn closed(&self) -> impl Future<Output = ()> + use<> {
        let mut opened = self.opened.subscribe();
        // Nothing is ever sent; it fails when the sender goes.
        async move { while opened.changed().await.is_ok() {} }
    }

    /// Where unfinished things are written; on the same filesystem as everything else of the store.
    pub fn tmp(&self) -> PathBuf {
        self.dir.join("tmp")
    }

    /// Directory of the golden image with this key.
    pub fn golden_dir(&self, key: &crate::names::Digest) -> PathBuf {
        self.dir.join("goldens").join(key.hex())
    }

    /// While this is held no blob gets a name.
    pub fn blob_gate(&self) -> MutexGuard<'_, ()> {
        // It guards no data: what a panicking holder left is found by looking.
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn empty_tmp(&self) -> Result<()> {
        let tmp = self.tmp();
        let failed = |error| Error::io(Stage::Store, tmp.display().to_string(), "empty the directory of unfinished files", error);
        for entry in fs::read_dir(&tmp).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_type().map_err(failed)?.is_dir() {
                fs::remove_dir_all(entry.path()).map_err(failed)?;
            } else if !entry.file_name().to_string_lossy().starts_with("partial-") {
                // Interrupted downloads are resumed; everything else starts anew.
                fs::remove_file(entry.path()).map_err(failed)?;
            }
        }
        Ok(())
    }
}

/// Makes a directory with exactly this mode, whatever the umask; one that is there keeps the mode it has.
fn make_dir(path: &Path, mode: u32) -> std::io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Flushes a directory, so that a rename in it survives power loss.
pub fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|error| Error::io(Stage::Store, path.display().to_string(), "flush directory", error))
}
