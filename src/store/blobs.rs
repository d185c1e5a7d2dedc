//! Blobs: root filesystem tarballs named by the digest of their bytes.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

use crate::{
    error::{Error, Kind, Result, Stage},
    failpoint::reach,
    names::Digest,
    store::{Store, sync_dir},
    units::Bytes,
};

impl Store {
    /// Where the blob with this digest is, whether it exists or not.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs").join(digest.hex())
    }

    /// Whether the blob is here, complete.
    pub fn has_blob(&self, digest: &Digest) -> Result<bool> {
        let path = self.blob_path(digest);
        let size = match fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(Error::io(Stage::Store, path.display().to_string(), "look at the blob", error)),
        };
        // The row may be there before the file: only both together are a blob.
        Ok(self.catalog.blob_size(*digest)? == Some(size))
    }

    /// Moves a complete, flushed file from `tmp` to its place. Its bytes must have been hashed as they were written.
    pub fn publish_blob(&self, from: &Path, digest: Digest, size: u64, now: i64) -> Result<()> {
        let to = self.blob_path(&digest);
        let failed = |doing: &'static str| move |error| Error::io(Stage::Store, from.display().to_string(), doing, error);
        fs::set_permissions(from, fs::Permissions::from_mode(0o444)).map_err(failed("make the blob read-only"))?;
        let _gate = self.blob_gate();
        // The row first: what a crash leaves in between is a row that counts for nothing, not a file that nobody knows of.
        self.catalog.put_blob(digest, size, now)?;
        reach("blob-recorded");
        fs::rename(from, &to).map_err(failed("move the blob to its place"))?;
        reach("blob-named");
        sync_dir(&self.dir.join("blobs"))
    }

    /// Starts receiving a blob.
    pub fn upload(&self, expected: Option<Digest>, size_max: u64) -> Result<Upload<'_>> {
        let path = self.tmp().join(format!("upload-{}", uuid::Uuid::new_v4().simple()));
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| Error::io(Stage::Store, path.display().to_string(), "create the upload's file", error))?;
        Ok(Upload { store: self, path, file: Some(file), hash: Sha256::new(), size: 0, size_max, expected })
    }
}

/// A blob on its way in. Dropping it removes what has arrived.
pub struct Upload<'a> {
    store: &'a Store,
    path: PathBuf,
    file: Option<File>,
    hash: Sha256,
    size: u64,
    size_max: u64,
    expected: Option<Digest>,
}

impl Upload<'_> {
    /// Takes the next bytes. `Kind::NoSpace` past the limit.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.size += bytes.len() as u64;
        if self.size > self.size_max {
            return Err(Error::new(
                Kind::NoSpace,
                Stage::Fetch,
                "upload",
                format!("has more than {} bytes ({})", self.size_max, Bytes(self.size_max)),
            )
            .with_reason("ROOTFS_TOO_LARGE"));
        }
        self.hash.update(bytes);
        let file = self.file.as_mut().ok_or_else(|| Error::internal(Stage::Fetch, "upload", "is closed already"))?;
        file.write_all(bytes).map_err(|error| Error::io(Stage::Fetch, self.path.display().to_string(), "write the upload", error))
    }

    /// Checks size and digest, flushes, lets `vouch` look at the file, publishes. `Kind::Corrupt` when they differ from what was announced.
    pub fn finish(mut self, announced_size: Option<u64>, now: i64, vouch: impl FnOnce(&Path, &Digest) -> Result<()>) -> Result<(Digest, u64)> {
        let size = self.size;
        if let Some(announced) = announced_size.filter(|announced| *announced != size) {
            return Err(Error::new(Kind::Corrupt, Stage::Fetch, "upload", format!("has {size} bytes, {announced} were announced"))
                .with_reason("SIZE_MISMATCH"));
        }
        let digest = Digest::from_bytes(std::mem::take(&mut self.hash).finalize().into());
        if let Some(expected) = self.expected.filter(|expected| *expected != digest) {
            return Err(Error::new(Kind::Corrupt, Stage::Fetch, "upload", format!("has digest {digest}, {expected} was announced"))
                .with_reason("DIGEST_MISMATCH"));
        }
        if let Some(file) = self.file.take() {
            file.sync_all().map_err(|error| Error::io(Stage::Fetch, self.path.display().to_string(), "flush the upload", error))?;
        }
        vouch(&self.path, &digest)?;
        self.store.publish_blob(&self.path, digest, size, now)?;
        Ok((digest, size))
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        // After publishing there is nothing of that name any more.
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "an abandoned upload could not be removed");
        }
    }
}
