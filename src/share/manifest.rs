//! The manifest of a golden image: everything about it but the bytes of its disk, and the hash of each chunk of those.

use std::{fs, os::unix::fs::FileExt, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    boot::prepare::DiskBoot,
    error::{Error, Kind, Result, Stage},
    fs::BuiltFs,
    guest::facts::GuestFacts,
    names::Digest,
    store::{
        digest::data_chunks,
        records::{GOLDEN_FORMAT, GoldenRecord, GoldenSpec},
    },
    units::MIB,
};

/// Name and version of the format.
pub const FORMAT: &str = "cloudletd-golden:1";
/// Bytes of the disk in a chunk; the last may be shorter. A pull that was interrupted loses at most a few of them.
pub const CHUNK_LEN: u64 = 4 * MIB;
/// What compression adds to bytes that can't be compressed, and more.
pub const COMPRESSED_SLACK: u64 = 64 * 1024;
/// Largest manifest, bytes: a full disk of 1 TiB has 262144 chunks of some hundred bytes.
pub const MANIFEST_LEN_MAX: u64 = 64 * MIB;

/// A chunk that is not all zeros.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chunk {
    /// Its number; it begins at so many times [`CHUNK_LEN`].
    pub index: u64,
    /// BLAKE3 of its bytes, 64 hexadecimal digits.
    pub blake3: String,
}

/// See the module. JSON; unknown keys are refused, a new version has another `format`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoldenManifest {
    /// [`FORMAT`].
    pub format: String,
    /// [`GOLDEN_FORMAT`] of the builder.
    pub golden_format: u32,
    /// [`GoldenSpec::key`].
    pub key: Digest,
    /// What it was made from.
    pub spec: GoldenSpec,
    /// Digest over the disk's content (`store::digest`).
    pub digest: Digest,
    /// What the build made.
    pub built: BuiltFs,
    /// The text of `facts.json`.
    pub facts: String,
    /// The text of `boot.json`.
    pub boot: String,
    /// [`CHUNK_LEN`].
    pub chunk_bytes: u64,
    /// The chunks, ascending. Those that are missing are all zeros.
    pub chunks: Vec<Chunk>,
}

impl GoldenManifest {
    /// Describes the golden in `dir`. Blocking; reads the whole disk.
    pub fn of(dir: &Path, record: &GoldenRecord) -> Result<GoldenManifest> {
        let failed = |doing: &'static str| move |error| Error::io(Stage::Store, dir.display().to_string(), doing, error);
        let size = record.spec.size_bytes;
        let disk = fs::File::open(dir.join("disk.raw")).map_err(failed("open the golden disk"))?;
        let mut chunks = Vec::new();
        let mut buffer = vec![0; CHUNK_LEN as usize];
        for index in data_chunks(&disk, size, CHUNK_LEN).map_err(failed("find its data"))? {
            let bytes = &mut buffer[..chunk_len(size, index) as usize];
            disk.read_exact_at(bytes, index * CHUNK_LEN).map_err(failed("read the golden disk"))?;
            if !is_zero(bytes) {
                chunks.push(Chunk { index, blake3: hash(bytes) });
            }
        }
        Ok(GoldenManifest {
            format: FORMAT.to_owned(),
            golden_format: GOLDEN_FORMAT,
            key: record.key,
            spec: record.spec.clone(),
            digest: record.digest,
            built: record.built.clone(),
            facts: fs::read_to_string(dir.join("facts.json")).map_err(failed("read facts.json"))?,
            boot: fs::read_to_string(dir.join("boot.json")).map_err(failed("read boot.json"))?,
            chunk_bytes: CHUNK_LEN,
            chunks,
        })
    }

    /// Reads a manifest that somebody else made for `spec`. `Kind::Corrupt` (`GOLDEN_MANIFEST`) when it is not one, or of another golden.
    pub fn parse(bytes: &[u8], spec: &GoldenSpec) -> Result<GoldenManifest> {
        let key = spec.key();
        let wrong = |why: String| Error::new(Kind::Corrupt, Stage::Golden, key.hex(), why).with_reason("GOLDEN_MANIFEST");
        let manifest: GoldenManifest =
            serde_json::from_slice(bytes).map_err(|error| wrong("is no manifest of a golden image".into()).with_source(error))?;
        manifest.check(spec, &key).map_err(|why| wrong(format!("the manifest does not fit: {why}")))?;
        Ok(manifest)
    }

    /// The same for whoever knows nothing but the key, which is a hash over all of the spec.
    pub fn parse_for_key(bytes: &[u8], key: &Digest) -> Result<GoldenManifest> {
        let wrong = |why: &str| Error::new(Kind::Corrupt, Stage::Golden, key.hex(), why).with_reason("GOLDEN_MANIFEST");
        let manifest: GoldenManifest = serde_json::from_slice(bytes).map_err(|error| wrong("is no manifest of a golden image").with_source(error))?;
        if manifest.spec.key() != *key {
            return Err(wrong("the manifest is of another golden image"));
        }
        manifest.check(&manifest.spec, key).map_err(|why| wrong(&format!("the manifest does not fit: {why}")))?;
        Ok(manifest)
    }

    fn check(&self, spec: &GoldenSpec, key: &Digest) -> Result<(), String> {
        if self.format != FORMAT || self.golden_format != GOLDEN_FORMAT {
            return Err(format!("its format is {:?} {}, known is {FORMAT:?} {GOLDEN_FORMAT}", self.format, self.golden_format));
        }
        if self.key != *key || self.spec != *spec {
            return Err(format!("it is of the golden {}", self.key.hex()));
        }
        if self.chunk_bytes != CHUNK_LEN {
            return Err(format!("its chunks have {} bytes, expected {CHUNK_LEN}", self.chunk_bytes));
        }
        if self.built.kind != spec.filesystem || self.built.size_bytes > spec.size_bytes {
            return Err("its filesystem is not the one that was asked for".into());
        }
        let end = spec.size_bytes.div_ceil(CHUNK_LEN);
        let mut next = 0;
        for chunk in &self.chunks {
            if chunk.index < next || chunk.index >= end {
                return Err(format!("chunk {} is out of order or beyond the disk", chunk.index));
            }
            if chunk.blake3.len() != 64 || !chunk.blake3.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
                return Err(format!("the hash of chunk {} is none", chunk.index));
            }
            next = chunk.index + 1;
        }
        serde_json::from_str::<GuestFacts>(&self.facts).map_err(|error| format!("the facts are not readable: {error}"))?;
        serde_json::from_str::<DiskBoot>(&self.boot).map_err(|error| format!("what is known of booting is not readable: {error}"))?;
        Ok(())
    }

    /// A digest of what the golden is: disk, facts and boot. Two hosts that built it alike have the same.
    pub fn identity(&self) -> Digest {
        Digest::of(format!("{}\n{}\n{}", self.digest, Digest::of(self.facts.as_bytes()), Digest::of(self.boot.as_bytes())).as_bytes())
    }

    /// Bytes that its chunks have at most.
    pub fn data_len_max(&self) -> u64 {
        (self.chunks.len() as u64).saturating_mul(CHUNK_LEN).min(self.spec.size_bytes)
    }
}

/// Bytes of a chunk of a disk of `size` bytes.
pub fn chunk_len(size: u64, index: u64) -> u64 {
    CHUNK_LEN.min(size.saturating_sub(index.saturating_mul(CHUNK_LEN)))
}

/// The hash of a chunk's bytes, as manifests have it.
pub fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// Whether bytes are all zeros.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}
