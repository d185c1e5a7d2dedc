//! Golden images and tarballs in a registry, as OCI artifacts (image specification 1.1, "artifact guidance"; distribution specification 1.1).
//!
//! ```text
//! REPOSITORY:golden-KEY                          artifactType application/vnd.cloudlet.golden.v1
//!   config   application/vnd.cloudlet.golden.v1+json          the manifest of the golden (share::manifest), byte for byte
//!   layers   application/vnd.cloudlet.golden.chunk.v1+zstd    its chunks, in the manifest's order: 4 MiB of the disk each, one zstd frame
//! REPOSITORY:rootfs-HEX                          artifactType application/vnd.cloudlet.rootfs.v1
//!   config   application/vnd.oci.empty.v1+json
//!   layers   application/vnd.cloudlet.rootfs.layer.v1         the tarball as it is, so its digest is the tarball's own
//! ```
//!
//! Nothing in an artifact depends on when or by whom it was pushed: hosts that built the same golden push the same artifact, and a registry that has a chunk of another
//! golden is not sent it again. Every blob is held against its digest as it arrives, then the chunk in it against the golden's manifest, then the golden as a whole.
//!
//! Why not the crate `oci-client`: it makes its HTTP client itself, with redirects to any address and proxies of the environment, sends user and password to whatever realm an
//! answer names, and reads manifests and token answers without a limit. What is needed of the protocol is eight requests.

mod auth;
mod client;

use std::{fs::File, sync::Arc};

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

pub use client::Registry;

use super::{
    holder::{Holder, Layer, Offer, Wanted},
    manifest::{CHUNK_LEN, COMPRESSED_SLACK, GoldenManifest, MANIFEST_LEN_MAX},
    remote::{BlobStream, Placed},
};
use crate::{
    error::{Error, Kind, Result, Stage},
    names::Digest,
};

/// Media type of an image manifest.
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const EMPTY_BYTES: &[u8] = b"{}";
const GOLDEN: &str = "application/vnd.cloudlet.golden.v1";
const GOLDEN_CONFIG: &str = "application/vnd.cloudlet.golden.v1+json";
const GOLDEN_CHUNK: &str = "application/vnd.cloudlet.golden.chunk.v1+zstd";
const ROOTFS: &str = "application/vnd.cloudlet.rootfs.v1";
const ROOTFS_LAYER: &str = "application/vnd.cloudlet.rootfs.layer.v1";
/// Largest image manifest, bytes: what registries take (distribution specification, "pushing manifests"). Some 23000 chunks, 90 GiB of data.
const ARTIFACT_LEN_MAX: u64 = 4 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: Digest,
    size: u64,
}

impl Descriptor {
    fn of(media_type: &str, layer: &Layer) -> Descriptor {
        Descriptor { media_type: media_type.into(), digest: layer.digest, size: layer.size }
    }
}

/// An image manifest. Keys that are not here are ignored, as the specification wants it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Artifact {
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    artifact_type: String,
    config: Descriptor,
    layers: Vec<Descriptor>,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

impl Artifact {
    fn new(artifact_type: &str, config: Descriptor, layers: Vec<Descriptor>, annotations: &[(&str, String)]) -> Artifact {
        Artifact {
            schema_version: 2,
            media_type: MANIFEST.into(),
            artifact_type: artifact_type.into(),
            config,
            layers,
            annotations: annotations.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect(),
        }
    }

    /// `Kind::Corrupt` (`REMOTE_ANSWER`) when it is none of the wanted kind.
    fn parse(bytes: &[u8], object: &str, artifact_type: &str) -> Result<Artifact> {
        let wrong = |why: String| Error::new(Kind::Corrupt, Stage::Golden, object, why).with_reason("REMOTE_ANSWER");
        let artifact: Artifact = serde_json::from_slice(bytes).map_err(|error| wrong("is no OCI image manifest".into()).with_source(error))?;
        // A registry that knows 1.0 of the specification only may drop the type; the config's then says what it is.
        let is_it =
            artifact.artifact_type == artifact_type || (artifact.artifact_type.is_empty() && artifact.config.media_type.starts_with(artifact_type));
        if artifact.schema_version != 2 || !is_it {
            return Err(wrong(format!("is an artifact of the type {:?}, expected {artifact_type:?}", artifact.artifact_type)));
        }
        Ok(artifact)
    }
}

fn golden_tag(key: &Digest) -> String {
    format!("golden-{}", key.hex())
}

fn rootfs_tag(digest: &Digest) -> String {
    format!("rootfs-{}", digest.hex())
}

impl Registry {
    /// Puts a chunk there unless it is; `true` when it was sent.
    pub(super) async fn push_chunk(&self, frame: Vec<u8>) -> Result<(Layer, bool)> {
        self.push_bytes(frame).await
    }

    /// Puts the manifest of a golden there whose chunks are `layers`, which makes it whole.
    pub(super) async fn finish_golden(&self, manifest: &GoldenManifest, encoded: &[u8], layers: &[Layer]) -> Result<Placed> {
        let (config, _) = self.push_bytes(encoded.to_vec()).await?;
        let annotations = [
            ("org.opencontainers.image.title", format!("cloudlet golden image {}", manifest.key.hex())),
            ("cloudlet.golden.key", manifest.key.hex()),
            ("cloudlet.golden.digest", manifest.digest.to_string()),
            ("cloudlet.golden.rootfs", manifest.spec.rootfs.to_string()),
        ];
        let layers = layers.iter().map(|layer| Descriptor::of(GOLDEN_CHUNK, layer)).collect();
        let artifact = Artifact::new(GOLDEN, Descriptor::of(GOLDEN_CONFIG, &config), layers, &annotations);
        self.put_artifact(&golden_tag(&manifest.key), &artifact).await
    }

    /// Puts a tarball there; `true` when it was sent.
    pub(super) async fn push_rootfs(&self, digest: Digest, file: Arc<File>, size: u64) -> Result<(Placed, bool)> {
        let layer = Layer { digest, size };
        let sent = self.push_file(&layer, file).await?;
        let (config, _) = self.push_bytes(EMPTY_BYTES.to_vec()).await?;
        let annotations = [("org.opencontainers.image.title", format!("{}.tar", digest.hex()))];
        let artifact = Artifact::new(ROOTFS, Descriptor::of(EMPTY, &config), vec![Descriptor::of(ROOTFS_LAYER, &layer)], &annotations);
        Ok((self.put_artifact(&rootfs_tag(&digest), &artifact).await?, sent))
    }

    async fn put_artifact(&self, tag: &str, artifact: &Artifact) -> Result<Placed> {
        let bytes = serde_json::to_vec(artifact).map_err(|error| Error::internal(Stage::Golden, tag, "encode the artifact").with_source(error))?;
        if bytes.len() as u64 > ARTIFACT_LEN_MAX {
            let why =
                format!("its image manifest has {} bytes for {} chunks, registries take {ARTIFACT_LEN_MAX}", bytes.len(), artifact.layers.len());
            return Err(Error::new(Kind::Unsupported, Stage::Golden, tag, why).with_reason("GOLDEN_TOO_LARGE").with_hint("a bucket takes it"));
        }
        let digest = Digest::of(&bytes);
        self.put_manifest(tag, MANIFEST, bytes, &digest).await?;
        Ok(Placed { reference: format!("{}:{tag}", self.place()), digest: Some(digest) })
    }

    async fn artifact(&self, tag: &str, artifact_type: &str) -> Result<Artifact> {
        let bytes = self.get_manifest(tag, MANIFEST, ARTIFACT_LEN_MAX).await?;
        Artifact::parse(&bytes, &format!("{}:{tag}", self.place()), artifact_type)
    }

    /// A tarball from `offset` on, or from its start when the registry knows no ranges.
    pub(super) async fn rootfs(&self, digest: &Digest, offset: u64) -> Result<BlobStream> {
        let artifact = self.artifact(&rootfs_tag(digest), ROOTFS).await?;
        let layer = artifact.layers.iter().find(|layer| layer.digest == *digest).ok_or_else(|| {
            let why = format!("the artifact does not have {digest}");
            Error::new(Kind::Corrupt, Stage::Golden, self.place(), why).with_reason("REMOTE_ANSWER")
        })?;
        self.stream_blob(&Layer { digest: layer.digest, size: layer.size }, offset).await
    }
}

impl Holder for Registry {
    fn name(&self) -> &str {
        self.label()
    }

    fn offer<'h>(&'h self, key: &'h Digest) -> BoxFuture<'h, Result<Offer>> {
        Box::pin(async move {
            let artifact = self.artifact(&golden_tag(key), GOLDEN).await?;
            let layer = |descriptor: &Descriptor| Layer { digest: descriptor.digest, size: descriptor.size };
            let manifest = self.get_blob(&layer(&artifact.config), MANIFEST_LEN_MAX).await?;
            Ok(Offer { manifest, layers: artifact.layers.iter().map(layer).collect() })
        })
    }

    fn chunk<'h>(&'h self, wanted: Wanted<'h>) -> BoxFuture<'h, Result<Vec<u8>>> {
        Box::pin(async move {
            let missing = || Error::internal(Stage::Golden, self.place(), "a registry was asked for a chunk without its layer");
            self.get_blob(wanted.layer.ok_or_else(missing)?, CHUNK_LEN + COMPRESSED_SLACK).await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_artifact_is_read_as_what_it_says_it_is() {
        let layer = Layer { digest: Digest::of(b"x"), size: 1 };
        let artifact = Artifact::new(GOLDEN, Descriptor::of(GOLDEN_CONFIG, &layer), vec![Descriptor::of(GOLDEN_CHUNK, &layer)], &[("a", "b".into())]);
        let bytes = serde_json::to_vec(&artifact).expect("JSON");
        assert_eq!(Artifact::parse(&bytes, "r", GOLDEN).expect("one"), artifact);
        assert_eq!(Artifact::parse(&bytes, "r", ROOTFS).expect_err("another").reason(), "REMOTE_ANSWER");
        for (from, to) in [("\"schemaVersion\":2", "\"schemaVersion\":1"), ("sha256:", "sha512:"), ("\"layers\"", "\"manifests\"")] {
            let text = String::from_utf8(bytes.clone()).expect("text").replace(from, to);
            assert!(Artifact::parse(text.as_bytes(), "r", GOLDEN).is_err(), "{text}");
        }
    }
}
