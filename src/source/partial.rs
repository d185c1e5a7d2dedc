//! The file a transfer goes into, and the digest of what is in it.

use std::{
    fs::{File, OpenOptions, Permissions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use sha2::{Digest as _, Sha256};

use crate::{
    error::{Error, Kind, Result, Stage},
    names::Digest,
    progress::Progress,
    units::Bytes,
};

const READ_LEN: usize = 256 * 1024;

/// A transfer that was dropped still finishes its last write; that takes milliseconds.
const LOCK_ATTEMPTS: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Writes to a file and hashes what it writes, up to a limit. Blocking; the file is locked while this exists, so that two transfers can't mix.
#[derive(Debug)]
pub struct DigestWriter {
    file: File,
    path: PathBuf,
    hash: Sha256,
    len: u64,
    len_max: u64,
}

impl DigestWriter {
    /// Opens `path` (made with mode 0600 when it is not there) and drops what was in it. At most `len_max` bytes are taken.
    pub fn create(path: &Path, len_max: u64) -> Result<Self> {
        let mut writer = DigestWriter::open(path, len_max)?;
        writer.restart()?;
        Ok(writer)
    }

    /// Opens `path` and goes on behind what is in it, which is read and hashed. More than `len_max` bytes are of no use and are dropped.
    pub fn resume(path: &Path, len_max: u64, progress: &Progress) -> Result<Self> {
        let mut writer = DigestWriter::open(path, len_max)?;
        let mut buffer = vec![0; READ_LEN];
        loop {
            progress.check()?;
            let len = match writer.file.read(&mut buffer) {
                Ok(0) => return Ok(writer),
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(writer.failed("read what is there", error)),
            };
            writer.len += len as u64;
            if writer.len > len_max {
                writer.restart()?;
                return Ok(writer);
            }
            writer.hash.update(&buffer[..len]);
        }
    }

    fn open(path: &Path, len_max: u64) -> Result<Self> {
        let file = open(path, Stage::Fetch)?;
        Ok(DigestWriter { file, path: path.to_owned(), hash: Sha256::new(), len: 0, len_max })
    }

    /// Bytes taken so far, those that were there included.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing was taken yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes bytes. `Kind::NoSpace` with reason `ROOTFS_TOO_LARGE` beyond the limit, and what the file system says.
    pub fn take(&mut self, bytes: &[u8]) -> Result<()> {
        let len = self.len.saturating_add(bytes.len() as u64);
        if len > self.len_max {
            return Err(too_large(&self.path.display().to_string(), None, self.len_max));
        }
        self.file.write_all(bytes).map_err(|error| self.failed("write", error))?;
        self.hash.update(bytes);
        self.len = len;
        Ok(())
    }

    /// Drops everything that was taken.
    pub fn restart(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(|error| self.failed("truncate", error))?;
        self.file.seek(SeekFrom::Start(0)).map_err(|error| self.failed("seek to the start", error))?;
        self.hash = Sha256::new();
        self.len = 0;
        Ok(())
    }

    /// Makes it durable, and gives digest and size. The name's directory is the caller's to flush, when it has its last name.
    pub fn finish(&mut self) -> Result<(Digest, u64)> {
        self.file.sync_all().map_err(|error| self.failed("flush", error))?;
        Ok((self.digest(), self.len))
    }

    /// The digest of what was taken so far.
    pub fn digest(&self) -> Digest {
        Digest::from_bytes(self.hash.clone().finalize().into())
    }

    fn failed(&self, doing: &str, error: io::Error) -> Error {
        Error::io(Stage::Fetch, self.path.display().to_string(), doing, error)
    }
}

impl Write for DigestWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.take(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Opens what an interrupted transfer may have left (made with mode 0600 when it is not there), locked: one transfer at a time writes a file. `Kind::Busy` when
/// another one goes on doing so. Blocking.
pub(crate) fn open(path: &Path, stage: Stage) -> Result<File> {
    let failed = |doing: &str, error| Error::io(stage, path.display().to_string(), doing, error);
    let open = |is_written: bool| {
        OpenOptions::new().read(true).write(is_written).create(is_written).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path)
    };
    let opened = match open(true) {
        // A daemon that died had made it read-only, as it was complete, and not named it. Only root writes it all the same.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            open(false).and_then(|file| file.set_permissions(Permissions::from_mode(0o600))).and_then(|()| open(true))
        }
        other => other,
    };
    let file = opened.map_err(|error| failed("open for writing", error))?;
    let mut attempt = 1;
    while let Err(error) = file.try_lock() {
        match error {
            TryLockError::WouldBlock if attempt < LOCK_ATTEMPTS => {
                attempt += 1;
                thread::sleep(LOCK_PAUSE);
            }
            TryLockError::WouldBlock => {
                return Err(Error::new(Kind::Busy, stage, path.display().to_string(), "another transfer is writing this file"));
            }
            TryLockError::Error(error) => return Err(failed("lock", error)),
        }
    }
    Ok(file)
}

/// More than is allowed, or more than was announced is said by the caller.
pub(super) fn too_large(object: &str, size: Option<u64>, max: u64) -> Error {
    let message = match size {
        Some(size) => format!("has {size} bytes, the limit is {max} ({})", Bytes(max)),
        None => format!("has more than {max} bytes ({})", Bytes(max)),
    };
    Error::new(Kind::NoSpace, Stage::Fetch, object, message).with_reason("ROOTFS_TOO_LARGE")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_file_has_the_digest_of_all_of_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("blob");
        let mut writer = DigestWriter::create(&path, 10).expect("made");
        writer.take(b"hello").expect("room");
        drop(writer);
        let mut writer = DigestWriter::resume(&path, 10, &Progress::default()).expect("opened");
        assert_eq!(writer.len(), 5);
        writer.take(b"world").expect("room");
        assert_eq!(writer.take(b"!").expect_err("too much").reason(), "ROOTFS_TOO_LARGE");
        assert_eq!(writer.finish().expect("flushed"), (Digest::of(b"helloworld"), 10));
        assert_eq!(std::fs::read(&path).expect("there"), b"helloworld");
        writer.restart().expect("truncated");
        assert_eq!(writer.finish().expect("flushed"), (Digest::of(b""), 0));
    }

    #[test]
    fn what_is_longer_than_allowed_is_not_resumed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("blob");
        std::fs::write(&path, b"0123456789").expect("written");
        assert!(DigestWriter::resume(&path, 9, &Progress::default()).expect("opened").is_empty());
        assert_eq!(std::fs::metadata(&path).expect("there").len(), 0);
    }

    #[test]
    fn two_writers_of_one_file_and_symlinks_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("blob");
        let _first = DigestWriter::create(&path, 10).expect("made");
        assert_eq!(DigestWriter::create(&path, 10).expect_err("locked").kind(), Kind::Busy);
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).expect("made");
        assert!(DigestWriter::create(&dir.path().join("link"), 10).is_err());
    }
}
