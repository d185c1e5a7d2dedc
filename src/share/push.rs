//! Golden images and tarballs into registries and buckets, and tarballs out of them.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering},
};

use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::mpsc;

use super::{
    holder::Layer,
    manifest::{CHUNK_LEN, Chunk, GoldenManifest, chunk_len, hash},
    remote::{BlobStream, Placed, Put, Remote},
};
use crate::{
    error::{Error, Kind, Result, Stage},
    names::Digest,
    progress::Progress,
    render::{Engine, blocking, now_secs},
    source::DigestWriter,
};

/// Chunks on their way at the same time.
const CHUNKS_AT_ONCE: usize = 4;
/// What is stored is read by many: better compressed than between hosts, and always the same, so that the same chunk is the same blob.
const ZSTD_LEVEL: i32 = 3;
/// Parts between the network and the disk.
const PARTS_AHEAD: usize = 16;

/// What a push did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// Where it is now.
    pub placed: Placed,
    /// Chunks of the golden; 1 for a tarball.
    pub chunks: u64,
    /// Those of them that were not there.
    pub sent_chunks: u64,
    /// Bytes of those.
    pub sent_bytes: u64,
}

impl Engine {
    /// Puts a golden of the store into a registry or bucket; what is there of it is not sent again.
    ///
    /// Fails with `Kind::NotFound` when there is no such golden (`GOLDEN_NOT_FOUND`) or remote (`REMOTE_UNKNOWN`), and as the remote does. What was sent stays for the next try.
    pub async fn push_golden(self: &Arc<Self>, remote: &str, key: Digest, progress: &Progress) -> Result<Pushed> {
        let remote = self.share.remote(remote)?;
        let finding = Arc::clone(self);
        let loaded = blocking(Stage::Golden, move || finding.load_golden(key))
            .await?
            .ok_or_else(|| Error::new(Kind::NotFound, Stage::Store, key.hex(), "there is no such golden image").with_reason("GOLDEN_NOT_FOUND"))?;
        // Open from here on: what collects garbage may take its name, not its bytes.
        let (dir, record, path) = (self.store.golden_dir(&key), loaded.record.clone(), loaded.disk.path.clone());
        let known = self.share.manifest(&key);
        let (disk, encoded, manifest) = blocking(Stage::Golden, move || {
            let disk = File::open(&path).map_err(|error| Error::io(Stage::Store, path.display().to_string(), "open the golden disk", error))?;
            let encoded = match known {
                Some(encoded) => encoded,
                None => Arc::new(encode(&GoldenManifest::of(&dir, &record)?)?),
            };
            let manifest = GoldenManifest::parse(&encoded, &record.spec)?;
            Ok((Arc::new(disk), encoded, Arc::new(manifest)))
        })
        .await?;
        self.share.keep_manifest(key, &encoded);
        progress.enter(Stage::Golden, manifest.data_len_max());
        let (sent_chunks, sent_bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        let (counted_chunks, counted_bytes) = (&sent_chunks, &sent_bytes);
        let (remote, disk, manifest) = (&remote, &disk, &manifest);
        let transfers = manifest.chunks.iter().cloned().map(|chunk| async move {
            progress.check()?;
            let len = chunk_len(manifest.spec.size_bytes, chunk.index);
            let put = push_chunk(remote, disk, &chunk, len).await?;
            progress.add(len);
            Ok(match put {
                Put::There(layer) => layer,
                Put::Sent(layer, bytes) => {
                    counted_chunks.fetch_add(1, Ordering::Relaxed);
                    counted_bytes.fetch_add(bytes, Ordering::Relaxed);
                    layer
                }
            })
        });
        // In order: a layer's place is its chunk's.
        let layers: Vec<Option<Layer>> = futures_util::stream::iter(transfers).buffered(CHUNKS_AT_ONCE).try_collect().await?;
        let layers: Vec<Layer> = layers.into_iter().flatten().collect();
        let placed = remote.finish_golden(manifest, &encoded, &layers).await?;
        let (sent_chunks, sent_bytes) = (sent_chunks.into_inner(), sent_bytes.into_inner());
        tracing::info!(golden = %key.hex(), to = placed.reference, sent_chunks, sent_bytes, "golden image pushed");
        Ok(Pushed { placed, chunks: manifest.chunks.len() as u64, sent_chunks, sent_bytes })
    }

    /// Puts a tarball of the store into a registry or bucket, unless it is there. `Kind::NotFound` (`BLOB_NOT_FOUND`) when it is not in the store.
    pub async fn push_blob(self: &Arc<Self>, remote: &str, digest: Digest) -> Result<Pushed> {
        let remote = self.share.remote(remote)?;
        let engine = Arc::clone(self);
        let (file, size) = blocking(Stage::Store, move || {
            if !engine.store.has_blob(&digest)? {
                let missing = Error::new(Kind::NotFound, Stage::Store, digest.to_string(), "there is no such tarball in the store");
                return Err(missing.with_reason("BLOB_NOT_FOUND"));
            }
            let failed = |error| Error::io(Stage::Store, digest.to_string(), "open the tarball", error);
            let file = File::open(engine.store.blob_path(&digest)).map_err(failed)?;
            let size = file.metadata().map_err(failed)?.len();
            Ok((file, size))
        })
        .await?;
        let (placed, sent) = remote.put_rootfs(digest, Arc::new(file), size).await?;
        tracing::info!(%digest, to = placed.reference, sent, "tarball pushed");
        Ok(Pushed { placed, chunks: 1, sent_chunks: u64::from(sent), sent_bytes: if sent { size } else { 0 } })
    }

    /// Gets a tarball from a registry or bucket into the store. Its size, and whether it came now; what has arrived of one that fails stays for the next call.
    ///
    /// Fails with `Kind::NotFound` (`REMOTE_NOT_FOUND`) when it is not there, `Kind::Corrupt` (`DIGEST_MISMATCH`) when what is there is something else.
    pub async fn pull_blob(self: &Arc<Self>, remote: &str, digest: Digest, progress: &Progress) -> Result<(u64, bool)> {
        let remote = self.share.remote(remote)?;
        let _flight = self.fetches.enter(&format!("remote blob {digest}")).await;
        let engine = Arc::clone(self);
        let here = blocking(Stage::Store, move || {
            let here = engine.store.has_blob(&digest)?;
            Ok(if here { engine.store.catalog.blob_size(digest)? } else { None })
        });
        if let Some(size) = here.await? {
            return Ok((size, false));
        }
        let path = self.store.tmp().join(format!("partial-blob-{}", digest.hex()));
        let mut attempt = 0;
        let size = loop {
            attempt += 1;
            match self.pull_blob_once(&remote, digest, &path, progress).await {
                Ok(size) => break size,
                // Bytes of an earlier try may be the fault: it is begun anew, once.
                Err(error) if attempt < 3 && matches!(error.kind(), Kind::Unavailable | Kind::Timeout | Kind::Corrupt) => {
                    tracing::debug!(%digest, error = %error.chain(), "asked for the rest");
                }
                Err(error) => return Err(error),
            }
        };
        let engine = Arc::clone(self);
        blocking(Stage::Store, move || {
            engine.store.publish_blob(&path, digest, size, now_secs())?;
            engine.mark_verified(digest);
            Ok(())
        })
        .await?;
        tracing::info!(%digest, bytes = size, "tarball pulled");
        Ok((size, true))
    }

    async fn pull_blob_once(&self, remote: &Remote, digest: Digest, path: &std::path::Path, progress: &Progress) -> Result<u64> {
        let size_max = self.config.fetch.max_size.0;
        let (opened, checked) = (path.to_owned(), progress.clone());
        let mut writer = blocking(Stage::Fetch, move || DigestWriter::resume(&opened, size_max, &checked)).await?;
        let BlobStream { size, offset, mut parts } = remote.rootfs(&digest, writer.len()).await?;
        if size > size_max {
            let why = format!("has {size} bytes, the limit is {size_max}");
            return Err(Error::new(Kind::NoSpace, Stage::Fetch, digest.to_string(), why).with_reason("ROOTFS_TOO_LARGE"));
        }
        let _promised = self.admission.promise_store(&self.store.tmp(), size.saturating_sub(offset), "the root filesystem's tarball")?;
        progress.enter(Stage::Fetch, size);
        progress.add(offset);
        if offset != writer.len() {
            writer = blocking(Stage::Fetch, move || writer.restart().map(|()| writer)).await?;
        }
        let (send, mut receive) = mpsc::channel::<bytes::Bytes>(PARTS_AHEAD);
        let written = tokio::task::spawn_blocking(move || {
            while let Some(part) = receive.blocking_recv() {
                writer.take(&part)?;
            }
            Ok::<_, Error>(writer)
        });
        let patience = std::time::Duration::from_secs(self.config.fetch.idle_timeout_secs);
        let received = loop {
            progress.check()?;
            match tokio::time::timeout(patience, parts.next()).await {
                Err(_) => {
                    let why = format!("nothing came for {} s", patience.as_secs());
                    break Err(Error::new(Kind::Timeout, Stage::Fetch, digest.to_string(), why).with_reason("TRANSFER_STALLED"));
                }
                Ok(None) => break Ok(()),
                Ok(Some(Err(error))) => break Err(error),
                Ok(Some(Ok(part))) => {
                    progress.add(part.len() as u64);
                    // An error means that the writer has ended, and it says why.
                    if send.send(part).await.is_err() {
                        break Ok(());
                    }
                }
            }
        };
        drop(send);
        let writer =
            written.await.map_err(|error| Error::internal(Stage::Fetch, digest.to_string(), "the writing thread panicked").with_source(error))?;
        let mut writer = writer?;
        received?;
        blocking(Stage::Fetch, move || {
            let (actual, len) = writer.finish()?;
            if actual == digest {
                return Ok(len);
            }
            if len < size {
                let why = format!("ended after {len} of {size} bytes");
                return Err(Error::new(Kind::Unavailable, Stage::Fetch, digest.to_string(), why).with_reason("TRANSFER_INCOMPLETE"));
            }
            writer.restart()?;
            Err(Error::new(Kind::Corrupt, Stage::Fetch, digest.to_string(), format!("what arrives has digest {actual}"))
                .with_reason("DIGEST_MISMATCH"))
        })
        .await
    }
}

/// A manifest as it is sent.
pub(super) fn encode(manifest: &GoldenManifest) -> Result<Vec<u8>> {
    serde_json::to_vec(manifest).map_err(|error| Error::internal(Stage::Store, manifest.key.hex(), "encode the manifest").with_source(error))
}

/// Puts a chunk of a disk into a remote. `Kind::Corrupt` (`GOLDEN_CORRUPT`) when the disk's bytes are not the manifest's.
async fn push_chunk(remote: &Remote, disk: &Arc<File>, chunk: &Chunk, len: u64) -> Result<Put> {
    let (disk, wanted) = (Arc::clone(disk), chunk.clone());
    let frame = move || {
        blocking(Stage::Golden, move || {
            let object = || format!("chunk {}", wanted.index);
            let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
            disk.read_exact_at(&mut bytes, wanted.index * CHUNK_LEN)
                .map_err(|error| Error::io(Stage::Store, object(), "read the golden disk", error))?;
            if hash(&bytes) != wanted.blake3 {
                let why = "the disk's bytes are not those of its manifest";
                return Err(Error::new(Kind::Corrupt, Stage::Store, object(), why).with_reason("GOLDEN_CORRUPT"));
            }
            zstd::bulk::compress(&bytes, ZSTD_LEVEL).map_err(|error| Error::io(Stage::Golden, object(), "compress it", error))
        })
    };
    remote.put_chunk(chunk, frame).await
}
