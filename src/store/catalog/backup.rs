//! Whether the catalogue is whole, and copies of it while it is in use.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rusqlite::Connection;
use sha2::{Digest as _, Sha256};

use super::{connect, failed};
use crate::{
    error::{Error, Kind, Result, Stage},
    names::Digest,
    store::{Store, sync_dir},
};

/// How names of backups begin and end; in between is the time, UTC, so that names sort by age.
const PREFIX: &str = "catalog-";
const SUFFIX: &str = ".sqlite";

/// A backup that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// The file.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// Its SHA-256.
    pub digest: Digest,
    /// Older backups that went.
    pub removed: Vec<PathBuf>,
}

/// Refuses a catalogue whose pages or indexes do not fit together: `Kind::Corrupt` with reason `CATALOG_CORRUPT`. What is wrong in it would otherwise come out as
/// volumes that are not known and goldens that are collected from under them.
pub(super) fn require_whole(connection: &Connection, object: &str) -> Result<()> {
    match connection.query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0)) {
        Ok(answer) if answer == "ok" => Ok(()),
        Ok(answer) => Err(damaged(object, &answer)),
        Err(error) => Err(told_apart(object, failed("check the catalogue")(error))),
    }
}

/// An error of opening the catalogue: damage that SQLite meets before anything is checked has the reason of damage that the check finds.
pub(super) fn told_apart(object: &str, error: Error) -> Error {
    if error.kind() == Kind::Corrupt { damaged(object, &error.chain()) } else { error }
}

fn damaged(object: &str, why: &str) -> Error {
    Error::new(Kind::Corrupt, Stage::Store, object, format!("the catalogue is damaged: {why}"))
        .with_reason("CATALOG_CORRUPT")
        .with_hint("put a backup in its place (README, Recovery); nothing was changed")
}

impl Store {
    /// Copies the catalogue to `STATE_DIR/backups`, as it is at one moment, while it is in use, and checks the copy. `keep`: how many backups stay; 0 for all.
    pub fn back_up(&self, keep: usize) -> Result<Backup> {
        let dir = self.dir().join("backups");
        let io = |path: &Path, doing: &'static str| {
            let object = path.display().to_string();
            move |error| Error::io(Stage::Store, object, doing, error)
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io(&dir, "make the directory of backups"))?;
        let source = connect(&self.dir().join("catalog.sqlite"))?;
        let name: String = source
            .query_row("SELECT ?1 || strftime('%Y%m%dT%H%M%fZ', 'now') || ?2", [PREFIX, SUFFIX], |row| row.get(0))
            .map_err(failed("name the backup"))?;
        let (path, unfinished) = (dir.join(&name), dir.join(format!(".{name}.tmp")));
        // SQLite takes a file that is empty; made here it has its mode from the beginning: there are secrets in it.
        let made = File::options().write(true).create_new(true).mode(0o600).open(&unfinished);
        made.map_err(io(&unfinished, "create the backup"))?;
        let written = copy(&source, &unfinished).and_then(|(size, digest)| {
            fs::rename(&unfinished, &path).map_err(io(&path, "name the backup"))?;
            sync_dir(&dir)?;
            Ok((size, digest))
        });
        match written {
            Ok((size, digest)) => Ok(Backup { path, size, digest, removed: if keep == 0 { Vec::new() } else { remove_old(&dir, keep)? } }),
            Err(error) => Err(match fs::remove_file(&unfinished) {
                Err(failure) if failure.kind() != std::io::ErrorKind::NotFound => {
                    error.with_cleanup_failure(io(&unfinished, "remove the unfinished backup")(failure))
                }
                _ => error,
            }),
        }
    }
}

fn copy(source: &Connection, to: &Path) -> Result<(u64, Digest)> {
    let object = || to.display().to_string();
    // One read transaction: writers go on beside it (WAL).
    source.execute("VACUUM INTO ?1", [to.to_string_lossy()]).map_err(failed("copy the catalogue"))?;
    let copied = Connection::open_with_flags(to, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(failed("open the copy"))?;
    require_whole(&copied, &object())?;
    drop(copied);
    let mut file = File::open(to).map_err(|error| Error::io(Stage::Store, object(), "open the copy", error))?;
    file.sync_all().map_err(|error| Error::io(Stage::Store, object(), "flush the copy", error))?;
    let (mut hash, mut size, mut buffer) = (Sha256::new(), 0u64, vec![0; 1 << 16]);
    loop {
        let count = file.read(&mut buffer).map_err(|error| Error::io(Stage::Store, object(), "read the copy", error))?;
        if count == 0 {
            return Ok((size, Digest::from_bytes(hash.finalize().into())));
        }
        hash.update(&buffer[..count]);
        size += count as u64;
    }
}

/// Removes all but the newest `keep` backups.
fn remove_old(dir: &Path, keep: usize) -> Result<Vec<PathBuf>> {
    let failed = |error| Error::io(Stage::Store, dir.display().to_string(), "remove old backups", error);
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX)) {
            names.push(entry.path());
        }
    }
    names.sort();
    let old: Vec<PathBuf> = names.iter().take(names.len().saturating_sub(keep)).cloned().collect();
    old.iter().try_for_each(fs::remove_file).map_err(failed)?;
    Ok(old)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::*;
    use crate::store::catalog::Catalog;

    #[test]
    fn a_backup_is_whole_private_and_opens_as_a_catalogue_with_what_was_in_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("opens");
        let digest = Digest::of(b"x");
        store.catalog.put_blob(digest, 7, 1).expect("added");
        let backup = store.back_up(0).expect("backed up");
        store.catalog.put_blob(Digest::of(b"later"), 7, 1).expect("added");
        let meta = fs::metadata(&backup.path).expect("there");
        assert_eq!((meta.len(), meta.permissions().mode() & 0o777), (backup.size, 0o600));
        assert_eq!(Digest::of(&fs::read(&backup.path).expect("read")), backup.digest);
        let restored = dir.path().join("restored.sqlite");
        fs::copy(&backup.path, &restored).expect("copied");
        let catalog = Catalog::open(&restored).expect("opens");
        assert_eq!(catalog.blobs().expect("read").len(), 1);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(2));
            store.back_up(2).expect("backed up");
        }
        assert_eq!(fs::read_dir(dir.path().join("backups")).expect("listed").count(), 2);
    }

    #[test]
    fn a_damaged_catalogue_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("catalog.sqlite");
        let catalog = Catalog::open(&path).expect("opens");
        for index in 0..2000u32 {
            catalog.put_blob(Digest::of(&index.to_le_bytes()), 7, 1).expect("added");
        }
        drop(catalog);
        // Checkpointed when the last connection was closed.
        let file = File::options().read(true).write(true).open(&path).expect("opens");
        let size = file.metadata().expect("there").len();
        assert!(size > 64 << 10, "{size}");
        for page in 4..size / 4096 {
            file.write_all_at(&[0x5a; 512], page * 4096).expect("damaged");
        }
        let before = fs::read(&path).expect("read");
        let error = Catalog::open(&path).err().expect("refused");
        assert_eq!((error.kind(), error.reason()), (Kind::Corrupt, "CATALOG_CORRUPT"));
        assert!(error.hint().is_some());
        assert!(fs::read(&path).expect("read") == before, "nothing was written");
        fs::write(&path, b"this is no database, it is text that is long enough to be looked at ".repeat(100)).expect("written");
        let error = Catalog::open(&path).err().expect("refused");
        assert_eq!(error.kind(), Kind::Corrupt);
    }
}
