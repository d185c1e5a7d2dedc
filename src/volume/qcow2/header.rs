//! The header of a qcow2 image (QEMU's docs/interop/qcow2.txt), versions 2 and 3, with the extensions that matter. What is not understood is refused by name.

use std::ops::RangeInclusive;

use super::{corrupt, unsupported};
use crate::error::Result;

/// `QFI\xfb`.
const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a version 2 header, and the least that is read.
pub(super) const HEADER_2_BYTES: usize = 72;
/// Bytes of a version 3 header without the compression type.
const HEADER_3_BYTES: usize = 104;
/// The specification's bounds, which are QEMU's too.
const CLUSTER_BITS: RangeInclusive<u32> = 9..=21;
/// With subclusters of at least 512 bytes.
const EXTENDED_CLUSTER_BITS_MIN: u32 = 14;
/// QEMU refuses larger L1 tables.
const L1_BYTES_MAX: u64 = 32 << 20;
/// QEMU refuses larger refcount tables.
pub(super) const REFTABLE_BYTES_MAX: u64 = 8 << 20;
/// QEMU refuses longer names.
const BACKING_NAME_BYTES_MAX: usize = 1023;
/// Extensions of one image; there are five kinds.
const EXTENSIONS_MAX: usize = 64;

const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
const EXTENSION_EXTERNAL_DATA: u32 = 0x4441_5441;

const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
/// Incompatible features that are refused by name.
const REFUSED: [(u64, &str); 3] = [
    (1 << 0, "refcounts that were not written back (dirty bit): it was not closed cleanly"),
    (1 << 1, "metadata that is marked as corrupt"),
    (1 << 2, "an external data file"),
];

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    /// Raw deflate.
    Zlib,
    /// A zstd frame.
    Zstd,
}

/// The file behind an image, as its header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// Path as it stands; relative ones start from the image's directory.
    pub path: Vec<u8>,
    /// The declared format, `raw` or `qcow2`; `None` when there is none declared.
    pub format: Option<String>,
}

/// What the header says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// Virtual size in bytes.
    pub(super) size: u64,
    /// Entries.
    pub(super) l1_size: u64,
    pub(super) l1_offset: u64,
    pub(super) reftable_offset: u64,
    pub(super) reftable_clusters: u64,
    pub(super) autoclear: u64,
    /// Refcounts have `2^this` bits.
    pub(super) refcount_order: u32,
    pub(super) extended_l2: bool,
    pub(super) compression: Compression,
    pub(super) backing: Option<BackingName>,
    /// Persistent dirty bitmaps.
    pub(super) has_bitmaps: bool,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes)
}

/// Cluster bits of a header of which at least [`HEADER_2_BYTES`] are there.
pub(super) fn cluster_bits(object: &str, start: &[u8]) -> Result<u32> {
    if start.len() < HEADER_2_BYTES || word(start, 0) != MAGIC {
        return Err(corrupt(object, "is not a qcow2 image"));
    }
    match word(start, 20) {
        bits if CLUSTER_BITS.contains(&bits) => Ok(bits),
        bits => Err(corrupt(object, format!("has clusters of 2^{bits} bytes, the format's limits are 2^9 and 2^21"))),
    }
}

impl Header {
    /// Parses `first`, the first cluster of an image (or what there is of it).
    pub(super) fn parse(object: &str, first: &[u8]) -> Result<Header> {
        let cluster_bits = cluster_bits(object, first)?;
        let version = word(first, 4);
        if !(2..=3).contains(&version) {
            return Err(unsupported(object, format!("qcow2 version {version}")));
        }
        let is_3 = version == 3;
        if is_3 && first.len() < HEADER_3_BYTES {
            return Err(corrupt(object, format!("has a header of {} bytes", first.len())));
        }
        match word(first, 32) {
            0 => {}
            1 => return Err(unsupported(object, "encryption (AES)")),
            2 => return Err(unsupported(object, "encryption (LUKS)")),
            method => return Err(unsupported(object, format!("encryption method {method}"))),
        }
        if word(first, 60) > 0 {
            return Err(unsupported(object, format!("{} internal snapshots", word(first, 60))));
        }
        let incompatible = if is_3 { long(first, 72) } else { 0 };
        if let Some((_, name)) = REFUSED.iter().find(|(bit, _)| incompatible & bit != 0) {
            return Err(unsupported(object, *name));
        }
        let unknown = incompatible & !(INCOMPATIBLE_COMPRESSION | INCOMPATIBLE_EXTENDED_L2);
        if unknown != 0 {
            return Err(unsupported(object, format!("incompatible feature bit {}", unknown.trailing_zeros())));
        }
        let header_length = if is_3 { word(first, 100) as usize } else { HEADER_2_BYTES };
        if is_3 && (header_length < HEADER_3_BYTES || header_length > first.len()) {
            return Err(corrupt(object, format!("has a header of {header_length} bytes")));
        }
        let compression = match incompatible & INCOMPATIBLE_COMPRESSION {
            0 => Compression::Zlib,
            _ if header_length <= HEADER_3_BYTES => return Err(corrupt(object, "has a compression type that its header is too short for")),
            _ => match first[HEADER_3_BYTES] {
                0 => Compression::Zlib,
                1 => Compression::Zstd,
                other => return Err(unsupported(object, format!("compression type {other}"))),
            },
        };
        let mut header = Header {
            version,
            cluster_bits,
            size: long(first, 24),
            l1_size: word(first, 36).into(),
            l1_offset: long(first, 40),
            reftable_offset: long(first, 48),
            reftable_clusters: word(first, 56).into(),
            autoclear: if is_3 { long(first, 88) } else { 0 },
            refcount_order: if is_3 { word(first, 96) } else { 4 },
            extended_l2: incompatible & INCOMPATIBLE_EXTENDED_L2 != 0,
            compression,
            backing: None,
            has_bitmaps: false,
        };
        header.check(object)?;
        header.backing = backing_path(object, first)?.map(|path| BackingName { path, format: None });
        header.read_extensions(object, first, header_length)?;
        Ok(header)
    }

    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn l2_entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster() / self.l2_entry_bytes()
    }

    fn check(&self, object: &str) -> Result<()> {
        let wrong = |why: String| Err(corrupt(object, why));
        let cluster = self.cluster();
        if self.extended_l2 && self.cluster_bits < EXTENDED_CLUSTER_BITS_MIN {
            return wrong(format!("has extended L2 entries with clusters of {cluster} bytes"));
        }
        if i64::try_from(self.size).is_err() {
            return wrong(format!("has a virtual size of {} bytes", self.size));
        }
        if self.refcount_order > 6 {
            return wrong(format!("has refcounts of 2^{} bits", self.refcount_order));
        }
        let needed = self.size.div_ceil(cluster).div_ceil(self.l2_entries());
        if self.l1_size < needed || self.l1_size * 8 > L1_BYTES_MAX {
            return wrong(format!("has {} L1 entries, {needed} are needed and {} allowed", self.l1_size, L1_BYTES_MAX / 8));
        }
        if self.reftable_clusters == 0 || self.reftable_clusters > REFTABLE_BYTES_MAX / cluster {
            return wrong(format!("has a refcount table of {} clusters", self.reftable_clusters));
        }
        for (what, offset, len) in [("L1", self.l1_offset, self.l1_size * 8), ("refcount", self.reftable_offset, self.reftable_clusters * cluster)] {
            let in_file = offset.checked_add(len).is_some_and(|end| i64::try_from(end).is_ok());
            if !offset.is_multiple_of(cluster) || !in_file || (offset == 0 && len > 0) {
                return wrong(format!("has its {what} table at {offset}"));
            }
        }
        Ok(())
    }

    fn read_extensions(&mut self, object: &str, first: &[u8], start: usize) -> Result<()> {
        // They end where the backing file's name starts, if there is one.
        let end = match long(first, 8) {
            0 => first.len(),
            offset => usize::try_from(offset).unwrap_or(usize::MAX).min(first.len()),
        };
        let mut at = start;
        for _ in 0..EXTENSIONS_MAX {
            if at.checked_add(8).is_none_or(|next| next > end) {
                return Ok(());
            }
            let (kind, len) = (word(first, at), word(first, at + 4) as usize);
            if kind == 0 {
                return Ok(());
            }
            let data = at.checked_add(8).and_then(|data| first[..end].get(data..data.checked_add(len)?));
            let data = data.ok_or_else(|| corrupt(object, format!("has a header extension of {len} bytes at {at}")))?;
            match kind {
                EXTENSION_BACKING_FORMAT => {
                    if let (Some(backing), Ok(name)) = (&mut self.backing, std::str::from_utf8(data)) {
                        backing.format = Some(name.to_owned());
                    }
                }
                EXTENSION_BITMAPS => self.has_bitmaps = true,
                EXTENSION_EXTERNAL_DATA => return Err(unsupported(object, "an external data file")),
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        Err(corrupt(object, format!("has more than {EXTENSIONS_MAX} header extensions")))
    }
}

/// The name of the backing file.
fn backing_path(object: &str, first: &[u8]) -> Result<Option<Vec<u8>>> {
    let (offset, len) = (long(first, 8), word(first, 16) as usize);
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    let name = usize::try_from(offset).ok().filter(|_| len <= BACKING_NAME_BYTES_MAX).and_then(|at| first.get(at..at.checked_add(len)?));
    match name {
        Some(name) if !name.contains(&0) => Ok(Some(name.to_vec())),
        _ => Err(corrupt(object, format!("names a backing file of {len} bytes at {offset}"))),
    }
}
