//! Golden images from holders: peers, registries, buckets.
//!
//! What has arrived of a golden is in one sparse file of the store's `tmp`, under a name that a restart keeps. What of it is there is not noted anywhere: the
//! chunks that have the right hash are there. A transfer that was cut off goes on with the others, at the same holder or at another that has the same golden.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures_util::StreamExt;
use tokio::sync::OwnedMutexGuard;
use uuid::Uuid;

use super::{
    holder::{Holder, Layer, Wanted},
    manifest::{CHUNK_LEN, Chunk, GoldenManifest, chunk_len, hash, is_zero},
};
use crate::{
    error::{Error, Kind, Result, Stage},
    names::Digest,
    progress::Progress,
    render::{Engine, blocking, golden, now_secs},
    source::{mirror::Health, partial},
    store::{Store, digest, records::GoldenRecord, records::GoldenSpec, sync_dir},
    target::Pacer,
};

/// Chunks asked for at the same time: hides the time between request and answer without taking the line for itself.
const CHUNKS_AT_ONCE: usize = 4;
/// Zeros of so many bytes are not written, so that what was a hole becomes one again.
const HOLE: usize = 64 * 1024;

/// Who has a golden, and where its chunks are there when they have names of their own.
struct Place {
    holder: Arc<dyn Holder>,
    layers: Vec<Layer>,
}

/// What some holders say alike about a golden.
struct Named {
    manifest: GoldenManifest,
    places: Vec<Place>,
}

/// A golden on its way, and those who have it.
struct Pull<'p> {
    key: Digest,
    manifest: Arc<GoldenManifest>,
    places: Vec<Place>,
    health: &'p Health,
    file: Arc<File>,
    path: PathBuf,
    pacer: Arc<Pacer>,
    progress: Progress,
}

/// A golden that was asked for from one remote.
#[derive(Debug, Clone)]
pub struct PullGolden {
    /// Name of the registry or bucket.
    pub remote: String,
    /// The golden.
    pub key: Digest,
    /// The image it is noted for; when nobody says, one of the catalogue with its tarball.
    pub image_id: Option<String>,
    /// Digest over the disk's content, when the caller knows it.
    pub digest: Option<Digest>,
}

impl Engine {
    /// Gets a golden from a holder, if this host prefers that and one has it. Whether it is in the store now; when not, the log says why, and it is built.
    ///
    /// Fails only when the caller cancels, or when the store does: no room, no permission. What has arrived then stays for the next try.
    pub async fn pull_golden(self: &Arc<Self>, spec: &GoldenSpec, image_id: &str, progress: &Progress) -> Result<bool> {
        let key = spec.key();
        let flight = self.builds.enter(&key).await;
        progress.check()?;
        let engine = Arc::clone(self);
        if blocking(Stage::Golden, move || Ok(engine.load_golden(key)?.is_some())).await? {
            return Ok(true);
        }
        let Some(named) = self.find_holders(spec, progress).await? else { return Ok(false) };
        match self.bring(flight, named, image_id.to_owned(), progress).await {
            Ok(()) => Ok(true),
            Err(error) => {
                progress.check()?;
                if matches!(error.kind(), Kind::NoSpace | Kind::Internal) {
                    return Err(error);
                }
                tracing::warn!(golden = %key.hex(), error = %error.chain(), "the golden image could not be pulled; it is built here");
                Ok(false)
            }
        }
    }

    /// Gets a golden from one remote. False when it was in the store already.
    ///
    /// Fails with `Kind::NotFound` when the remote does not have it (`REMOTE_NOT_FOUND`) or no image of the catalogue has its tarball (`IMAGE_NOT_FOUND`), `Kind::Corrupt` when
    /// what it has is something else, and as the store does. What has arrived stays for the next call.
    pub async fn pull_golden_from(self: &Arc<Self>, wanted: PullGolden, progress: &Progress) -> Result<bool> {
        let PullGolden { remote, key, image_id, digest } = wanted;
        let holder = self.share.remote(&remote)?.holder();
        let flight = self.builds.enter(&key).await;
        let engine = Arc::clone(self);
        if let Some(loaded) = blocking(Stage::Golden, move || engine.load_golden(key)).await? {
            return same_digest(&key, loaded.record.digest, digest).map(|()| false);
        }
        let offer = holder.offer(&key).await?;
        let manifest = GoldenManifest::parse_for_key(&offer.manifest, &key)?;
        let place = place(holder, offer.layers, &manifest)?;
        same_digest(&key, manifest.digest, digest)?;
        let (engine, rootfs) = (Arc::clone(self), manifest.spec.rootfs);
        let image_id = blocking(Stage::Golden, move || engine.image_of_golden(image_id, rootfs)).await?;
        self.bring(flight, Named { manifest, places: vec![place] }, image_id, progress).await?;
        Ok(true)
    }

    /// The image that a golden of this tarball is noted for.
    fn image_of_golden(&self, image_id: Option<String>, rootfs: Digest) -> Result<String> {
        let Some(id) = image_id else {
            let found = self.store.catalog.image_with_rootfs(rootfs)?;
            return found.map(|image| image.id).ok_or_else(|| {
                Error::new(Kind::NotFound, Stage::Golden, rootfs.to_string(), "no image of the catalogue has this root filesystem")
                    .with_reason("IMAGE_NOT_FOUND")
                    .with_hint("create the image first, with this digest of its root filesystem")
            });
        };
        let image = self.image(&id)?.record;
        match image.rootfs_digest {
            Some(digest) if digest != rootfs => {
                let why = format!("its root filesystem is {digest}, the golden image was made from {rootfs}");
                Err(Error::new(Kind::Conflict, Stage::Golden, id, why).with_reason("IMAGE_DIFFERS"))
            }
            _ => Ok(image.id),
        }
    }

    /// Gets what is missing of a golden and gives it its place. The flight is held until it can be found there.
    async fn bring(self: &Arc<Self>, flight: OwnedMutexGuard<()>, named: Named, image_id: String, progress: &Progress) -> Result<()> {
        let Named { manifest, places } = named;
        let _promised = self.admission.promise_store(&self.store.tmp(), manifest.data_len_max(), "a golden image of another host")?;
        let manifest = Arc::new(manifest);
        progress.enter(Stage::Golden, manifest.data_len_max());
        let begun = std::time::Instant::now();
        let path = partial_path(&self.store, &manifest);
        let (opened, described, checked) = (path.clone(), Arc::clone(&manifest), progress.clone());
        let (file, missing) = blocking(Stage::Golden, move || open_partial(&opened, &described, &checked)).await?;
        let (all, asked, key) = (manifest.chunks.len(), missing.len(), manifest.key);
        let pull = Pull {
            key,
            manifest: Arc::clone(&manifest),
            places,
            health: &self.share.health,
            file: Arc::new(file),
            path,
            pacer: Arc::clone(&self.pacer),
            progress: progress.clone(),
        };
        pull.fetch(missing).await?;
        let engine = Arc::clone(self);
        let (file, path) = (Arc::clone(&pull.file), pull.path.clone());
        let landed = blocking(Stage::Golden, move || {
            // Held until the golden can be found, even if whoever awaits this goes away.
            let _flight = flight;
            let record = land(&engine.store, &file, &path, &manifest, image_id)?;
            engine.mark_verified(record.key);
            Ok(())
        })
        .await;
        let names = pull.places.iter().map(|place| place.holder.name());
        match &landed {
            Ok(()) => {
                names.for_each(|name| self.share.health.worked(name));
                tracing::info!(golden = %key.hex(), chunks = all, fetched = asked, ms = begun.elapsed().as_millis() as u64, "golden image pulled");
            }
            Err(error) if error.kind() == Kind::Corrupt => names.for_each(|name| self.share.health.failed(name, error)),
            Err(_) => {}
        }
        landed
    }

    /// The manifest that enough holders name, and those, the well ones first.
    async fn find_holders(&self, spec: &GoldenSpec, progress: &Progress) -> Result<Option<Named>> {
        let (state, key) = (&self.share, spec.key());
        let mut all: Vec<Named> = Vec::new();
        for holder in &state.holders {
            progress.check()?;
            // Building is better than waiting for somebody who was down a moment ago.
            if state.health.aside(holder.name()).is_some() {
                continue;
            }
            let offered = holder.offer(&key).await.and_then(|offer| {
                let manifest = GoldenManifest::parse(&offer.manifest, spec)?;
                let place = place(Arc::clone(holder), offer.layers, &manifest)?;
                Ok((manifest, place))
            });
            match offered {
                Ok((manifest, place)) => match all.iter_mut().find(|other| other.manifest == manifest) {
                    Some(other) => other.places.push(place),
                    None => all.push(Named { manifest, places: vec![place] }),
                },
                Err(error) if error.kind() == Kind::NotFound => {}
                Err(error) => state.health.failed(holder.name(), &error),
            }
        }
        if all.len() > 1 {
            let say = |named: &Named| format!("{} says {}", named.places[0].holder.name(), named.manifest.identity());
            let digests: Vec<String> = all.iter().map(say).collect();
            tracing::warn!(golden = %key.hex(), "there are different golden images of one key: {}", digests.join(", "));
        }
        let most = all.iter().map(|named| named.places.len()).max().unwrap_or(0);
        if most > 0 && most < self.config.share.agree {
            tracing::warn!(golden = %key.hex(), "{most} name the same golden image, {} are wanted", self.config.share.agree);
        }
        // Of two that equally many name, that of the holder which is configured first.
        Ok(all.into_iter().find(|named| named.places.len() == most).filter(|named| named.places.len() >= self.config.share.agree))
    }
}

/// Whether the golden that is here or there is the one that the caller means.
fn same_digest(key: &Digest, actual: Digest, wanted: Option<Digest>) -> Result<()> {
    match wanted.filter(|wanted| *wanted != actual) {
        None => Ok(()),
        Some(wanted) => {
            let why = format!("the golden image has digest {actual}, {wanted} is wanted");
            Err(Error::new(Kind::Corrupt, Stage::Golden, key.hex(), why).with_reason("DIGEST_MISMATCH"))
        }
    }
}

/// A holder that says where the chunks are says it of every chunk.
fn place(holder: Arc<dyn Holder>, layers: Vec<Layer>, manifest: &GoldenManifest) -> Result<Place> {
    if !layers.is_empty() && layers.len() != manifest.chunks.len() {
        let why = format!("{} has {} layers for {} chunks", holder.name(), layers.len(), manifest.chunks.len());
        return Err(Error::new(Kind::Corrupt, Stage::Golden, manifest.key.hex(), why).with_reason("GOLDEN_MANIFEST"));
    }
    Ok(Place { holder, layers })
}

impl Pull<'_> {
    /// Gets the missing chunks. The first that nobody gives ends it, when those that are under way have arrived.
    async fn fetch(&self, missing: Vec<Chunk>) -> Result<()> {
        let is_over = AtomicBool::new(false);
        let is_over = &is_over;
        let transfers =
            missing.into_iter().map(|chunk| async move { if is_over.load(Ordering::Relaxed) { Ok(()) } else { self.fetch_chunk(chunk).await } });
        let mut transfers = futures_util::stream::iter(transfers).buffer_unordered(CHUNKS_AT_ONCE);
        let mut outcome = Ok(());
        while let Some(result) = transfers.next().await {
            if let Err(error) = result.and_then(|()| self.progress.check())
                && outcome.is_ok()
            {
                is_over.store(true, Ordering::Relaxed);
                outcome = Err(error);
            }
        }
        outcome
    }

    async fn fetch_chunk(&self, chunk: Chunk) -> Result<()> {
        let mut failures = Vec::new();
        let (mut kind, last) = (Kind::Unavailable, self.places.len());
        for place in &self.places {
            let name = place.holder.name();
            self.progress.check()?;
            if self.health.aside(name).is_some() && last > failures.len() + 1 {
                continue;
            }
            match self.ask(place, &chunk).await {
                Ok(()) => return Ok(()),
                Err(error) if error.stage() != Stage::Golden || matches!(error.kind(), Kind::NoSpace | Kind::Cancelled) => return Err(error),
                Err(error) => {
                    if error.kind() != Kind::NotFound {
                        self.health.failed(name, &error);
                    }
                    // A lone holder that has wrong bytes has them the next time too.
                    if last == 1 && error.kind() == Kind::Corrupt {
                        kind = Kind::Corrupt;
                    }
                    failures.push(error.chain());
                }
            }
        }
        let message = format!("nobody gave chunk {}: {}", chunk.index, failures.join("; "));
        Err(Error::new(kind, Stage::Golden, self.key.hex(), message).with_reason("GOLDEN_PEERS"))
    }

    async fn ask(&self, place: &Place, chunk: &Chunk) -> Result<()> {
        let position = self.manifest.chunks.binary_search_by_key(&chunk.index, |chunk| chunk.index).ok();
        let layer = position.and_then(|position| place.layers.get(position));
        let compressed = place.holder.chunk(Wanted { key: &self.key, chunk, layer }).await?;
        let (file, path, pacer, progress) = (Arc::clone(&self.file), self.path.clone(), Arc::clone(&self.pacer), self.progress.clone());
        let (chunk, name, len) = (chunk.clone(), place.holder.name().to_owned(), chunk_len(self.manifest.spec.size_bytes, chunk.index));
        blocking(Stage::Golden, move || {
            let bytes = verified(&compressed, &chunk, len, &name)?;
            pacer.take(len, &progress)?;
            write_sparsely(&file, &bytes, chunk.index * CHUNK_LEN)
                .map_err(|error| Error::io(Stage::Store, path.display().to_string(), "write a chunk", error))?;
            progress.add(len);
            Ok(())
        })
        .await
    }
}

/// The bytes of a chunk. `Kind::Corrupt` (`GOLDEN_CHUNK`) when they are not those of the manifest.
fn verified(compressed: &[u8], chunk: &Chunk, len: u64, peer: &str) -> Result<Vec<u8>> {
    let wrong = |why: String| Error::new(Kind::Corrupt, Stage::Golden, peer, format!("chunk {} {why}", chunk.index)).with_reason("GOLDEN_CHUNK");
    let capacity = usize::try_from(len).map_err(|_| wrong("is too large".into()))?;
    let bytes = zstd::bulk::decompress(compressed, capacity).map_err(|error| wrong("can't be decompressed".into()).with_source(error))?;
    if bytes.len() != capacity {
        return Err(wrong(format!("has {} bytes, expected {len}", bytes.len())));
    }
    let actual = hash(&bytes);
    if actual != chunk.blake3 {
        return Err(wrong(format!("has the hash {actual}, expected {}", chunk.blake3)));
    }
    Ok(bytes)
}

fn write_sparsely(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    for (index, part) in bytes.chunks(HOLE).enumerate() {
        let at = offset + (index * HOLE) as u64;
        // What is there of an interrupted pull may be anything.
        if is_zero(part) && reads_as_zeros(file, at, part.len())? {
            continue;
        }
        file.write_all_at(part, at)?;
    }
    Ok(())
}

fn reads_as_zeros(file: &File, offset: u64, len: usize) -> io::Result<bool> {
    let mut there = vec![0; len];
    file.read_exact_at(&mut there, offset)?;
    Ok(is_zero(&there))
}

/// Where a golden arrives. The store keeps files of this name when it starts.
fn partial_path(store: &Store, manifest: &GoldenManifest) -> PathBuf {
    store.tmp().join(format!("{}{}", partial_prefix(&manifest.key), manifest.identity().hex()))
}

fn partial_prefix(key: &Digest) -> String {
    format!("partial-golden-{}-", key.hex())
}

/// Removes what has arrived of a golden that is complete by other means. Blocking; a failure is logged.
pub(crate) fn forget_partial(store: &Store, key: &Digest) {
    let prefix = partial_prefix(key);
    let Ok(entries) = fs::read_dir(store.tmp()) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)) {
        if let Err(error) = fs::remove_file(entry.path()) {
            tracing::warn!(path = %entry.path().display(), %error, "what was pulled of a golden image could not be removed");
        }
    }
}

/// Opens the file and finds out which chunks are not in it yet.
fn open_partial(path: &Path, manifest: &GoldenManifest, progress: &Progress) -> Result<(File, Vec<Chunk>)> {
    let failed = |doing: &'static str| move |error| Error::io(Stage::Store, path.display().to_string(), doing, error);
    let size = manifest.spec.size_bytes;
    let file = partial::open(path, Stage::Store)?;
    // Cut to nothing when it is something else.
    if file.metadata().map_err(failed("read its size"))?.len() != size {
        file.set_len(0).and_then(|()| file.set_len(size)).map_err(failed("set its size"))?;
        return Ok((file, manifest.chunks.clone()));
    }
    let mut buffer = vec![0; CHUNK_LEN as usize];
    let mut missing = Vec::new();
    for chunk in &manifest.chunks {
        progress.check()?;
        let bytes = &mut buffer[..chunk_len(size, chunk.index) as usize];
        file.read_exact_at(bytes, chunk.index * CHUNK_LEN).map_err(failed("read what is there"))?;
        if !is_zero(bytes) && hash(bytes) == chunk.blake3 {
            progress.add(bytes.len() as u64);
        } else {
            missing.push(chunk.clone());
        }
    }
    Ok((file, missing))
}

/// Gives a complete golden its place, as a build does. `Kind::Corrupt` (`GOLDEN_CORRUPT`) when it is not the one of the manifest; it is gone then.
fn land(store: &Store, disk: &File, partial: &Path, manifest: &GoldenManifest, image_id: String) -> Result<GoldenRecord> {
    let failed = |doing: &'static str| move |error| Error::io(Stage::Store, partial.display().to_string(), doing, error);
    let digest = digest::of_disk(partial)?;
    if digest != manifest.digest {
        fs::remove_file(partial).map_err(failed("remove a wrong golden image"))?;
        let message = format!("what was pulled has digest {digest}, the manifest says {}", manifest.digest);
        return Err(Error::new(Kind::Corrupt, Stage::Golden, manifest.key.hex(), message).with_reason("GOLDEN_CORRUPT"));
    }
    let tmp = store.tmp().join(format!("golden-{}-{}", manifest.key.hex(), Uuid::new_v4().simple()));
    fs::create_dir(&tmp).map_err(failed("make the golden's directory"))?;
    let placed = complete(disk, partial, &tmp, manifest).and_then(|()| {
        let record = GoldenRecord {
            key: manifest.key,
            spec: manifest.spec.clone(),
            image_id,
            digest,
            allocated: disk.metadata().map_err(failed("read the allocated size"))?.blocks() * 512,
            built: manifest.built.clone(),
            created: now_secs(),
            last_used: now_secs(),
        };
        // The row first, as a build has it: see the head of `store`.
        store.catalog.put_golden(record.clone())?;
        golden::publish(store, &tmp, &manifest.key)?;
        Ok(record)
    });
    placed.map_err(|error| match fs::remove_dir_all(&tmp) {
        Err(failure) if failure.kind() != io::ErrorKind::NotFound => {
            error.with_cleanup_failure(Error::io(Stage::Golden, tmp.display().to_string(), "remove the unfinished golden image", failure))
        }
        _ => error,
    })
}

/// Puts the files of a golden into the directory `tmp`, all durable.
fn complete(disk: &File, partial: &Path, tmp: &Path, manifest: &GoldenManifest) -> Result<()> {
    let failed = |doing: &'static str| move |error| Error::io(Stage::Store, partial.display().to_string(), doing, error);
    golden::write_durably(&tmp.join("facts.json"), manifest.facts.as_bytes())?;
    golden::write_durably(&tmp.join("boot.json"), manifest.boot.as_bytes())?;
    disk.set_permissions(fs::Permissions::from_mode(0o444)).map_err(failed("make the disk read-only"))?;
    disk.sync_all().map_err(failed("flush the disk"))?;
    fs::rename(partial, tmp.join("disk.raw")).map_err(failed("move the disk"))?;
    sync_dir(tmp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_taken_only_with_its_own_bytes() {
        let bytes = vec![3; 10_000];
        let chunk = Chunk { index: 5, blake3: hash(&bytes) };
        let compressed = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).expect("compressed");
        assert_eq!(verified(&compressed(&bytes), &chunk, 10_000, "peer").expect("right"), bytes);
        let bomb = compressed(&vec![3; 1 << 24]);
        for wrong in [&compressed(&bytes[1..]), &compressed(&[4; 10_000]), &bomb, &b"<html>".to_vec(), &Vec::new()] {
            let error = verified(wrong, &chunk, 10_000, "peer").expect_err("wrong");
            assert_eq!((error.kind(), error.reason()), (Kind::Corrupt, "GOLDEN_CHUNK"));
        }
    }

    #[test]
    fn zeros_become_holes_unless_something_else_is_there() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(4 << 20).expect("sized");
        let mut bytes = vec![0; 1 << 20];
        bytes[HOLE] = 1;
        write_sparsely(&file, &bytes, 1 << 20).expect("written");
        let allocated = file.metadata().expect("there").blocks() * 512;
        assert!((1..=2 * HOLE as u64).contains(&allocated), "{allocated}");
        file.write_all_at(&[9; 100], (1 << 20) + 5 * HOLE as u64).expect("written");
        write_sparsely(&file, &bytes, 1 << 20).expect("written");
        let mut there = vec![0; 1 << 20];
        file.read_exact_at(&mut there, 1 << 20).expect("read");
        assert!(there == bytes);
    }
}
