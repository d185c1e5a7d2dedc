//! Where golden images and tarballs are put, so that hosts need not know each other: registries and buckets.

use std::{fs::File, sync::Arc};

use futures_util::stream::BoxStream;

use super::{
    bucket::Bucket,
    holder::{Holder, Layer},
    manifest::{Chunk, GoldenManifest},
    oci::Registry,
};
use crate::{
    config::share::Share,
    error::{Error, Kind, Result, Stage},
    names::Digest,
    source::Fetcher,
};

/// A registry or a bucket of the configuration.
#[derive(Clone)]
pub enum Remote {
    /// OCI artifacts.
    Registry(Arc<Registry>),
    /// Objects of S3.
    Bucket(Arc<Bucket>),
}

/// Where something was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// As other tools write it: `HOST/REPOSITORY:TAG`, `s3://BUCKET/KEY`.
    pub reference: String,
    /// Digest of the artifact, of a registry.
    pub digest: Option<Digest>,
}

/// A tarball as it arrives.
pub struct BlobStream {
    /// Bytes of all of it.
    pub size: u64,
    /// Where the first part begins.
    pub offset: u64,
    /// Its parts.
    pub parts: BoxStream<'static, Result<bytes::Bytes>>,
}

/// What became of a chunk.
pub(super) enum Put {
    /// It was there.
    There(Option<Layer>),
    /// It was sent.
    Sent(Option<Layer>, u64),
}

impl Remote {
    /// Those of the configuration by name, and whether each is asked for goldens.
    pub(super) fn all(config: &Share, fetcher: &Arc<Fetcher>) -> Result<Vec<(Remote, bool)>> {
        let registries = config.registries.iter().map(|one| Ok((Remote::Registry(Arc::new(Registry::new(one, fetcher)?)), one.goldens)));
        let buckets = config.buckets.iter().map(|one| Ok((Remote::Bucket(Arc::new(Bucket::new(one)?)), one.goldens)));
        registries.chain(buckets).collect()
    }

    /// As one who has goldens.
    pub fn holder(&self) -> Arc<dyn Holder> {
        match self {
            Remote::Registry(registry) => Arc::clone(registry) as Arc<dyn Holder>,
            Remote::Bucket(bucket) => Arc::clone(bucket) as Arc<dyn Holder>,
        }
    }

    /// Puts a chunk there. `frame` makes its zstd frame, when it is needed.
    pub(super) async fn put_chunk<F>(&self, chunk: &Chunk, frame: impl FnOnce() -> F + Send) -> Result<Put>
    where
        F: Future<Output = Result<Vec<u8>>> + Send,
    {
        match self {
            Remote::Registry(registry) => {
                let frame = frame().await?;
                let len = frame.len() as u64;
                let (layer, sent) = registry.push_chunk(frame).await?;
                Ok(if sent { Put::Sent(Some(layer), len) } else { Put::There(Some(layer)) })
            }
            Remote::Bucket(bucket) => {
                if bucket.has_chunk(chunk).await? {
                    return Ok(Put::There(None));
                }
                let frame = frame().await?;
                let len = frame.len() as u64;
                bucket.put_chunk(chunk, frame).await?;
                Ok(Put::Sent(None, len))
            }
        }
    }

    /// Puts the manifest there, which makes the golden whole.
    pub(super) async fn finish_golden(&self, manifest: &GoldenManifest, encoded: &[u8], layers: &[Layer]) -> Result<Placed> {
        match self {
            Remote::Registry(registry) => registry.finish_golden(manifest, encoded, layers).await,
            Remote::Bucket(bucket) => bucket.put_golden(&manifest.key, encoded.to_vec()).await,
        }
    }

    /// Puts a tarball there; `true` when it was sent.
    pub(super) async fn put_rootfs(&self, digest: Digest, file: Arc<File>, size: u64) -> Result<(Placed, bool)> {
        match self {
            Remote::Registry(registry) => registry.push_rootfs(digest, file, size).await,
            Remote::Bucket(bucket) => bucket.put_rootfs(&digest, file, size).await,
        }
    }

    /// A tarball, from `offset` on if it can be had so. `Kind::NotFound` when it is not there.
    pub(super) async fn rootfs(&self, digest: &Digest, offset: u64) -> Result<BlobStream> {
        match self {
            Remote::Registry(registry) => registry.rootfs(digest, offset).await,
            Remote::Bucket(bucket) => bucket.rootfs(digest, offset).await,
        }
    }
}

impl super::State {
    /// The registry or bucket of that name. `Kind::NotFound` (`REMOTE_UNKNOWN`) when none is configured.
    pub(super) fn remote(&self, name: &str) -> Result<Remote> {
        let found = self.remotes.iter().find(|remote| remote.holder().name() == name).cloned();
        found.ok_or_else(|| {
            Error::new(Kind::NotFound, Stage::Request, name, "no registry and no bucket of that name is configured").with_reason("REMOTE_UNKNOWN")
        })
    }
}
