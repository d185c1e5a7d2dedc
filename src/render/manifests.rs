//! Manifests as the daemon holds them: read by a process that can do nothing else, once. What it found is in the catalogue; those used last are in memory.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex},
};

use super::Engine;
use crate::{
    error::{Error, Kind, Result, Stage},
    manifest::{ImageId, Manifest},
    names::Digest,
    store::records::ImageRecord,
};

/// Bytes of the texts whose readings are kept in memory; a reading takes some times as much.
const TEXTS_BYTES_MAX: usize = 2 << 20;

/// Readings by the digest of their text, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Manifests(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    readings: HashMap<Digest, (Arc<Manifest>, usize)>,
    order: VecDeque<Digest>,
    bytes: usize,
}

impl Manifests {
    fn get(&self, text: &Digest) -> Option<Arc<Manifest>> {
        self.0.lock().ok()?.readings.get(text).map(|(manifest, _)| Arc::clone(manifest))
    }

    fn keep(&self, text: Digest, len: usize, manifest: &Arc<Manifest>) {
        // Nothing is lost but time when another thread panicked here.
        let Ok(mut kept) = self.0.lock() else { return };
        if len > TEXTS_BYTES_MAX || kept.readings.insert(text, (Arc::clone(manifest), len)).is_some() {
            return;
        }
        kept.order.push_back(text);
        kept.bytes += len;
        while kept.bytes > TEXTS_BYTES_MAX {
            let Some(oldest) = kept.order.pop_front() else { return };
            kept.bytes -= kept.readings.remove(&oldest).map_or(0, |(_, len)| len);
        }
    }
}

impl Engine {
    /// Reads a manifest. Errors as those of [`Manifest::parse`], and `WORKER_DIED`.
    pub fn read_manifest(&self, text: &str) -> Result<Arc<Manifest>> {
        let digest = Digest::of(text.as_bytes());
        if let Some(manifest) = self.manifests.get(&digest) {
            return Ok(manifest);
        }
        let manifest = Arc::new(self.launcher.manifest(text)?);
        self.manifests.keep(digest, text.len(), &manifest);
        Ok(manifest)
    }

    fn known_manifest(&self, record: &ImageRecord) -> Result<Arc<Manifest>> {
        let text = Digest::of(record.manifest.as_bytes());
        if let Some(manifest) = self.manifests.get(&text) {
            return Ok(manifest);
        }
        if let Some(judged) = self.store.catalog.reading(&record.id)? {
            let manifest = Arc::new(Manifest::judged(judged)?);
            self.manifests.keep(text, record.manifest.len(), &manifest);
            return Ok(manifest);
        }
        // Of an older cloudletd.
        let manifest = self.read_manifest(&record.manifest)?;
        self.store.catalog.put_reading(&record.id, &manifest.to_judged())?;
        Ok(manifest)
    }

    /// The manifest of a catalogued image. `Kind::Corrupt` when what its reader found has not the image's id: no reader changes what an image
    /// means once it is catalogued.
    pub fn manifest_of(&self, record: &ImageRecord) -> Result<Arc<Manifest>> {
        let manifest = self.known_manifest(record)?;
        let digest = record.rootfs_digest.map(|digest| digest.to_string());
        let identities = [digest.as_deref(), record.rootfs_url.as_deref()];
        if identities.into_iter().flatten().any(|identity| ImageId::derive(&manifest, identity).as_str() == record.id) {
            return Ok(manifest);
        }
        Err(Error::new(Kind::Corrupt, Stage::Resolve, &record.id, "its manifest is not the one that it was catalogued with")
            .with_reason("IMAGE_CHANGED"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_readings_give_way() {
        let manifests = Manifests::default();
        let manifest = Arc::new(Manifest::parse(b"{}").expect("right"));
        let keys: Vec<Digest> = (0..20u8).map(|n| Digest::of(&[n])).collect();
        for key in &keys {
            manifests.keep(*key, 1 << 17, &manifest);
            manifests.keep(*key, 1 << 17, &manifest);
        }
        let there: Vec<bool> = keys.iter().map(|key| manifests.get(key).is_some()).collect();
        assert_eq!(there, [[false; 4].as_slice(), &[true; 16]].concat());
        manifests.keep(Digest::of(b"large"), TEXTS_BYTES_MAX + 1, &manifest);
        assert_eq!(manifests.0.lock().expect("whole").bytes, TEXTS_BYTES_MAX);
    }
}
