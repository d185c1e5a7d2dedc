//! Whether goldens and tarballs still hold what they held when they were stored: on use, as `golden.verify` says, and all of them when the store is scrubbed.
//!
//! What does not is moved to `STATE_DIR/quarantine` for somebody to look at, and made anew when it is wanted. A golden that volumes lie over can't be moved from
//! under them: it stays, is refused to new renders (`GOLDEN_CORRUPT`), and is named by every scrub.

use std::{fs, io::Read, path::Path, sync::Arc, time::Duration};

use sha2::{Digest as _, Sha256};

use crate::{
    config::Verify,
    error::{Error, Kind, Result, Stage},
    names::Digest,
    render::{Engine, blocking, now_secs},
    store::{digest, gc::Kept, records::GoldenRecord, sync_dir},
};

/// Something that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    /// Golden or tarball.
    pub kind: Kept,
    /// Golden key or digest.
    pub object: Digest,
    /// What is wrong.
    pub why: String,
    /// Whether it was moved away; else volumes depend on it.
    pub quarantined: bool,
}

/// What a scrub found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Goldens and tarballs that were read.
    pub checked: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those that are damaged.
    pub damaged: Vec<Damaged>,
}

impl Engine {
    /// Remembers that this process has seen the right bytes.
    pub(crate) fn mark_verified(&self, object: Digest) {
        self.verified.lock().expect("no panic while holding what is verified").insert(object);
    }

    fn needs_look(&self, object: Digest) -> bool {
        match self.config.golden.verify {
            Verify::Never => false,
            Verify::Always => true,
            Verify::FirstUse => !self.verified.lock().expect("no panic while holding what is verified").contains(&object),
        }
    }

    /// Looks at a golden that is about to be used, if the configuration says so. `false`: it was damaged, nobody depends on it, and it is gone. `Kind::Corrupt`
    /// (reason `GOLDEN_CORRUPT`): it is damaged and volumes lie over it.
    pub(super) fn verify_golden(&self, record: &GoldenRecord) -> Result<bool> {
        if !self.needs_look(record.key) {
            return Ok(true);
        }
        match self.golden_damage(record)? {
            None => {
                self.mark_verified(record.key);
                Ok(true)
            }
            Some(why) if self.quarantine_golden(record, &why)? => Ok(false),
            Some(why) => {
                let hint = "volumes lie over it: delete or move them, then collect it; new renders can use another size or layout meanwhile";
                Err(Error::new(Kind::Corrupt, Stage::Golden, record.key.hex(), why).with_reason("GOLDEN_CORRUPT").with_hint(hint))
            }
        }
    }

    /// Looks at a tarball that a golden is about to be built from, if the configuration says so. `Kind::Unavailable` (reason `BLOB_CORRUPT`): it was damaged and
    /// is gone; the next try fetches it again.
    pub(super) fn verify_blob(&self, digest: Digest) -> Result<()> {
        if !self.needs_look(digest) {
            return Ok(());
        }
        match self.blob_damage(&digest)? {
            None => {
                self.mark_verified(digest);
                Ok(())
            }
            Some(why) => {
                self.quarantine_blob(digest, &why)?;
                let hint = "try again: it is fetched again; an upload has to be uploaded again";
                Err(Error::new(Kind::Unavailable, Stage::Golden, digest.to_string(), why).with_reason("BLOB_CORRUPT").with_hint(hint))
            }
        }
    }

    /// Reads every golden and tarball and compares it with its digest; what is damaged is quarantined unless volumes depend on it. Blocking, for as long as the
    /// storage takes.
    pub fn scrub(&self) -> Result<Scrubbed> {
        let mut scrubbed = Scrubbed::default();
        for (record, _) in self.store.catalog.goldens(None)? {
            // Collected meanwhile.
            if self.store.catalog.golden(record.key)?.is_none() {
                continue;
            }
            (scrubbed.checked, scrubbed.bytes) = (scrubbed.checked + 1, scrubbed.bytes.saturating_add(record.allocated));
            if let Some(why) = self.golden_damage(&record)? {
                let quarantined = self.quarantine_golden(&record, &why)?;
                scrubbed.damaged.push(Damaged { kind: Kept::Golden, object: record.key, why, quarantined });
            }
        }
        for blob in self.store.catalog.blobs()? {
            if !self.store.has_blob(&blob.digest)? {
                continue;
            }
            (scrubbed.checked, scrubbed.bytes) = (scrubbed.checked + 1, scrubbed.bytes.saturating_add(blob.size));
            if let Some(why) = self.blob_damage(&blob.digest)? {
                self.quarantine_blob(blob.digest, &why)?;
                scrubbed.damaged.push(Damaged { kind: Kept::Blob, object: blob.digest, why, quarantined: true });
            }
        }
        Ok(scrubbed)
    }

    /// What is wrong with a golden; nothing when it holds what it held, or is gone.
    fn golden_damage(&self, record: &GoldenRecord) -> Result<Option<String>> {
        let dir = self.store.golden_dir(&record.key);
        let size = match fs::metadata(dir.join("disk.raw")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|error| Error::io(Stage::Golden, dir.display().to_string(), "look at the golden image", error))?.len(),
        };
        if size != record.spec.size_bytes {
            return Ok(Some(format!("has {size} bytes, its record says {}", record.spec.size_bytes)));
        }
        let found = digest::of_disk(&dir.join("disk.raw"))?;
        Ok((found != record.digest).then(|| format!("its content has digest {found}, it was stored with {}", record.digest)))
    }

    fn blob_damage(&self, digest: &Digest) -> Result<Option<String>> {
        let path = self.store.blob_path(digest);
        match hash_of(&path) {
            Ok(found) if found == *digest => Ok(None),
            Ok(found) => Ok(Some(format!("its bytes have digest {found}, it was stored with {digest}"))),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Moves a golden away unless a volume or a file of a pool lies over it.
    fn quarantine_golden(&self, record: &GoldenRecord, why: &str) -> Result<bool> {
        let _turn = self.collecting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let depends = self.store.catalog.goldens(None)?.iter().any(|(golden, volumes)| golden.key == record.key && *volumes > 0);
        if depends || self.overlays()?.contains_key(&record.key.hex()) {
            tracing::error!(golden = %record.key.hex(), why, "a golden image that volumes lie over is damaged");
            return Ok(false);
        }
        self.loaded.lock().expect("no panic while holding loaded goldens").retain(|loaded| loaded.record.key != record.key);
        self.move_away(&self.store.golden_dir(&record.key), "golden", &record.key, why)?;
        self.store.catalog.end_removal(Kept::Golden, record.key)?;
        Ok(true)
    }

    fn quarantine_blob(&self, digest: Digest, why: &str) -> Result<()> {
        let _gate = self.store.blob_gate();
        self.move_away(&self.store.blob_path(&digest), "blob", &digest, why)?;
        self.store.catalog.end_removal(Kept::Blob, digest)
    }

    fn move_away(&self, from: &Path, kind: &str, object: &Digest, why: &str) -> Result<()> {
        let dir = self.store.dir().join("quarantine");
        let failed = |doing: &'static str| move |error| Error::io(Stage::Store, from.display().to_string(), doing, error);
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed("make the quarantine"))?;
        let to = dir.join(format!("{kind}-{}-{}-{}", object.hex(), now_secs(), uuid::Uuid::new_v4().simple()));
        fs::rename(from, &to).map_err(failed("move what is damaged to the quarantine"))?;
        sync_dir(&dir)?;
        tracing::error!(kind, %object, to = %to.display(), why, "something of the store is damaged and was moved to the quarantine");
        Ok(())
    }
}

/// Scrubs the store every `golden.scrub_interval_secs`.
pub async fn scrub_regularly(engine: Arc<Engine>) {
    let interval = engine.config.golden.scrub_interval_secs;
    if interval == 0 {
        return;
    }
    loop {
        tokio::time::sleep(Duration::from_secs(interval)).await;
        let worker = Arc::clone(&engine);
        match blocking(Stage::Store, move || worker.scrub()).await {
            Ok(done) => tracing::info!(objects = done.checked, bytes = done.bytes, damaged = done.damaged.len(), "store scrubbed"),
            Err(error) => tracing::error!(error = %error.chain(), "the store could not be scrubbed"),
        }
    }
}

/// SHA-256 of a file.
pub(super) fn hash_of(path: &Path) -> Result<Digest> {
    let failed = |error| Error::io(Stage::Store, path.display().to_string(), "hash", error);
    let (mut file, mut hash, mut buffer) = (fs::File::open(path).map_err(failed)?, Sha256::new(), vec![0; 1 << 18]);
    loop {
        let count = file.read(&mut buffer).map_err(failed)?;
        if count == 0 {
            return Ok(Digest::from_bytes(hash.finalize().into()));
        }
        hash.update(&buffer[..count]);
    }
}
