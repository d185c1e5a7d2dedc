//! The redo log: a change of a volume, durable before the volume is touched.
//!
//! ```text
//!  redo/ID.tmp ──fsync──▶ redo/ID.redo ──fsync directory──▶ [volume written, flushed] ──▶ [catalogue] ──▶ removed
//!        │                      │
//!        └ a crash here:        └ a crash from here on: read again at the next start, applied again, recorded again. Applying is idempotent.
//!          nothing happened
//!
//!  file:  "cldredo1" | u32 length | head, JSON | u64 least length of the file | u32 pieces | pieces: u64 offset, u32 length, bytes | SHA-256 of all before
//! ```
//!
//! Numbers are little-endian. A log holds what is written into a guest, secrets among it: the directory has mode 0700, its files 0600.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::patch::FilePatch;
use crate::{
    error::{Error, Kind, Result, Stage},
    mapping::Mapping,
    store::sync_dir,
};

const MAGIC: &[u8; 8] = b"cldredo1";
/// Bytes of a log that are read, at most; a change of configuration is some hundred KiB.
const LOG_BYTES_MAX: u64 = 1 << 30;
const DIGEST_BYTES: usize = 32;

/// What is changed, and what the catalogue says afterwards.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// Pool of the volume.
    pub pool: String,
    /// Its name there.
    pub name: String,
    /// The render that made it: a volume that was made anew since is another one.
    pub render_id: String,
    /// Its inode, when it is a file.
    pub inode: Option<u64>,
    /// Rows of the catalogue that change with it, itself first.
    pub rows: Vec<Row>,
}

/// A volume's row.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Pool.
    pub pool: String,
    /// Name.
    pub name: String,
    /// Its new mapping.
    pub mapping: Mapping,
    /// The new seed of its host keys; `None` keeps the one it has. Secret.
    pub seed: Option<Vec<u8>>,
}

/// The logs of one store.
pub struct Redo {
    dir: PathBuf,
}

/// One durable log.
pub struct Log {
    path: PathBuf,
    /// What it is about.
    pub head: Head,
    /// What is written.
    pub patch: FilePatch,
}

impl Redo {
    /// The logs in the state directory `state`; the directory is made when it is missing.
    pub fn open(state: &Path) -> Result<Redo> {
        let dir = state.join("redo");
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(Error::io(Stage::Store, dir.display().to_string(), "make directory", error))
            }
            _ => Ok(Redo { dir }),
        }
    }

    /// Writes a log; it is durable when this returns, and nothing is left when it fails.
    pub fn write(&self, head: Head, patch: FilePatch) -> Result<Log> {
        let id = Uuid::new_v4().simple().to_string();
        let (tmp, path) = (self.dir.join(format!("{id}.tmp")), self.dir.join(format!("{id}.redo")));
        let failed = |doing: &'static str| {
            let object = path.display().to_string();
            move |error| Error::io(Stage::Store, object, doing, error)
        };
        let bytes = encode(&head, &patch)?;
        let written = File::options().write(true).create_new(true).mode(0o600).open(&tmp).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&tmp, &path)
        });
        let durable = written.map_err(failed("write the redo log")).and_then(|()| sync_dir(&self.dir));
        if let Err(error) = durable {
            let left: Vec<Error> = [&tmp, &path]
                .into_iter()
                .filter_map(|path| fs::remove_file(path).err().filter(|error| error.kind() != io::ErrorKind::NotFound))
                .map(|error| Error::io(Stage::Store, path.display().to_string(), "remove the unfinished redo log", error))
                .collect();
            return Err(left.into_iter().fold(error, Error::with_cleanup_failure));
        }
        Ok(Log { path, head, patch })
    }

    /// All logs that were not finished, and the errors of those that can't be read. Removes what was never durable.
    pub fn pending(&self) -> Result<(Vec<Log>, Vec<Error>)> {
        let failed = |error| Error::io(Stage::Store, self.dir.display().to_string(), "list the redo logs", error);
        let (mut logs, mut errors) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("redo") => match read(&path) {
                    Ok((head, patch)) => logs.push(Log { path, head, patch }),
                    Err(error) => errors.push(error),
                },
                Some("tmp") => fs::remove_file(&path).map_err(failed)?,
                _ => {}
            }
        }
        logs.sort_by(|a, b| a.path.cmp(&b.path));
        Ok((logs, errors))
    }
}

impl Log {
    /// Removes the log: the change is complete, or about a volume that is gone.
    pub fn remove(self) -> Result<()> {
        let failed = |error| Error::io(Stage::Store, self.path.display().to_string(), "remove the redo log", error);
        fs::remove_file(&self.path).map_err(failed)?;
        sync_dir(self.path.parent().unwrap_or(Path::new("/")))
    }
}

fn encode(head: &Head, patch: &FilePatch) -> Result<Vec<u8>> {
    let too_long = || Error::internal(Stage::Store, "redo log", "a part of the change has more than 4 GiB");
    let head = serde_json::to_vec(head).map_err(|error| Error::internal(Stage::Store, "redo log", "encode").with_source(error))?;
    let mut bytes = Vec::with_capacity(head.len() + patch.bytes() as usize + 4096);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&u32::try_from(head.len()).map_err(|_| too_long())?.to_le_bytes());
    bytes.extend_from_slice(&head);
    bytes.extend_from_slice(&patch.len_min().to_le_bytes());
    bytes.extend_from_slice(&u32::try_from(patch.iter().count()).map_err(|_| too_long())?.to_le_bytes());
    for (offset, piece) in patch.iter() {
        bytes.extend_from_slice(&offset.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(piece.len()).map_err(|_| too_long())?.to_le_bytes());
        bytes.extend_from_slice(piece);
    }
    let digest = Sha256::digest(&bytes);
    bytes.extend_from_slice(&digest);
    Ok(bytes)
}

fn read(path: &Path) -> Result<(Head, FilePatch)> {
    let object = path.display().to_string();
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(LOG_BYTES_MAX).read_to_end(&mut bytes));
    read.map_err(|error| Error::io(Stage::Store, object.as_str(), "read the redo log", error))?;
    decode(&bytes).ok_or_else(|| {
        Error::new(Kind::Corrupt, Stage::Store, object, "is not a redo log as it was written")
            .with_reason("REDO_CORRUPT")
            .with_hint("the volume it was for may be changed in part: render it again")
    })
}

fn decode(bytes: &[u8]) -> Option<(Head, FilePatch)> {
    let (bytes, digest) = bytes.split_at_checked(bytes.len().checked_sub(DIGEST_BYTES)?)?;
    if Sha256::digest(bytes).as_slice() != digest {
        return None;
    }
    let mut rest = bytes.strip_prefix(MAGIC)?;
    let mut take = |len: usize| {
        let (now, later) = rest.split_at_checked(len)?;
        rest = later;
        Some(now)
    };
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    let head_len = number(take(4)?) as usize;
    let head = serde_json::from_slice(take(head_len)?).ok()?;
    let mut patch = FilePatch::default();
    patch.set_len_min(number(take(8)?));
    for _ in 0..number(take(4)?) {
        let offset = number(take(8)?);
        let len = number(take(4)?) as usize;
        patch.put(offset, take(len)?.to_vec());
    }
    Some((head, patch))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change() -> (Head, FilePatch) {
        let mut patch = FilePatch::default();
        patch.put(4096, vec![7; 5000]);
        patch.put(1 << 40, b"secret".to_vec());
        patch.set_len_min(99);
        (Head { pool: "default".into(), name: "web1".into(), render_id: "rnd-1".into(), inode: Some(5), rows: Vec::new() }, patch)
    }

    #[test]
    fn a_log_is_found_again_as_it_was_written_until_it_is_removed() {
        let state = tempfile::tempdir().expect("a directory");
        let redo = Redo::open(state.path()).expect("opens");
        let (head, patch) = change();
        let log = redo.write(head.clone(), patch.clone()).expect("writes");
        fs::write(state.path().join("redo/abc.tmp"), "never durable").expect("writes");
        let (found, errors) = Redo::open(state.path()).and_then(|redo| redo.pending()).expect("lists");
        assert!(errors.is_empty() && found.len() == 1);
        assert!(found[0].head == head && found[0].patch == patch);
        assert!(!state.path().join("redo/abc.tmp").exists());
        log.remove().expect("removes");
        assert!(redo.pending().expect("lists").0.is_empty());
    }

    #[test]
    fn every_damage_is_seen() {
        let (head, patch) = change();
        let bytes = encode(&head, &patch).expect("encodes");
        assert!(decode(&bytes).is_some());
        for at in (0..bytes.len()).step_by(37) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 4;
            assert!(decode(&damaged).is_none(), "byte {at}");
            assert!(decode(&bytes[..at]).is_none(), "{at} bytes");
        }
    }

    #[test]
    fn contents_are_never_printed() {
        assert!(!format!("{:?}", change().1).contains("115"));
    }
}
