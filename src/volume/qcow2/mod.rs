//! qcow2 images as QEMU leaves them: read, and changed in place, in user space.
//!
//! ```text
//! header.rs    what is accepted and what is refused by name
//! read.rs      guest offset → piece (hole, zeros, data, compressed) → bytes, through the backing chain
//! inflate.rs   compressed clusters
//! write.rs     block patch → file patch: in place where the cluster is ours alone, else new clusters at the end of the file
//! refcounts.rs counts of host clusters, and where new ones are
//! ```
//!
//! Accepted: versions 2 and 3, all cluster sizes, standard and extended L2 entries (subclusters), zero clusters, compressed clusters (zlib and zstd), lazy
//! refcounts when the image was closed cleanly, all refcount widths, backing files whose format is declared. Refused by name: encryption, external data files,
//! internal snapshots, dirty and corrupt images, and every incompatible feature that is not known here; for changing also persistent dirty bitmaps, which
//! would not learn of the change.
//!
//! The image is not trusted: tables are read cluster by cluster into a bounded cache, every offset is checked before it is used, nothing is allocated by a
//! number of the image beyond the format's own limits, and what lies beyond the end of the file reads as zeros, as it does for QEMU.

mod header;
mod inflate;
mod read;
mod refcounts;
mod write;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex},
};

pub use self::header::BackingName;
use self::header::{HEADER_2_BYTES, Header};
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::ReadAt,
};

/// Images of one chain, at most. QEMU has no limit; libvirt's is 200, and each costs every read a look.
const CHAIN_MAX: usize = 16;
/// Bytes of L2 tables kept in memory per image; when there are more, all are dropped.
const TABLES_BYTES_MAX: u64 = 16 << 20;
/// Bits of an L1 or L2 entry that are a host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The refcount of what an entry points to is one: it may be written in place.
const COPIED: u64 = 1 << 63;
/// The cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros (version 3, standard entries).
const ZERO: u64 = 1;
/// Subclusters of a cluster with extended L2 entries.
const SUBCLUSTERS: u64 = 32;

/// Bytes with a name: a file of a chain.
#[derive(Clone)]
pub struct Source {
    /// What it is called in messages.
    pub name: String,
    /// Its bytes.
    pub file: Arc<dyn ReadAt>,
    /// How many there are.
    pub len: u64,
}

/// Finds the file behind an image: gets the image's own name and what its header says. Decides what may be opened.
pub type BackingOpener<'a> = dyn Fn(&str, &BackingName) -> Result<Source> + 'a;

/// An open image with what is behind it.
pub struct Qcow2 {
    source: Source,
    header: Header,
    l1: Vec<u64>,
    backing: Option<Layer>,
    cache: Mutex<Cache>,
}

/// What is behind an image.
enum Layer {
    Raw(Source),
    Qcow2(Box<Qcow2>),
}

#[derive(Default)]
struct Cache {
    /// L2 tables by host offset.
    tables: HashMap<u64, Arc<[u8]>>,
    /// The last cluster that was decompressed, by its L2 entry.
    inflated: Option<(u64, Arc<[u8]>)>,
}

impl Qcow2 {
    /// Opens an image for reading. `opener` gives the files behind it. `Kind::Unsupported` (reason `QCOW2_FEATURE_UNSUPPORTED`) names what is not handled,
    /// `Kind::Corrupt` what is wrong.
    pub fn open(source: Source, opener: &BackingOpener<'_>) -> Result<Qcow2> {
        Self::open_at(source, opener, &mut BTreeSet::new())
    }

    fn open_at(source: Source, opener: &BackingOpener<'_>, names: &mut BTreeSet<String>) -> Result<Qcow2> {
        if !names.insert(source.name.clone()) {
            return Err(corrupt(&source.name, "is its own backing file"));
        }
        if names.len() > CHAIN_MAX {
            return Err(unsupported(&source.name, format!("a chain of more than {CHAIN_MAX} images")));
        }
        let start = read_or_zeros(&source, 0, HEADER_2_BYTES)?;
        let cluster_bits = header::cluster_bits(&source.name, &start)?;
        let first = read_or_zeros(&source, 0, (1u64 << cluster_bits).min(source.len) as usize)?;
        let header = Header::parse(&source.name, &first)?;
        let l1 = read_or_zeros(&source, header.l1_offset, header.l1_size as usize * 8)?;
        let l1 = l1.chunks_exact(8).map(|entry| u64::from_be_bytes(entry.try_into().expect("eight bytes"))).collect();
        let backing = match &header.backing {
            None => None,
            Some(name) => {
                let format = name.format.as_deref();
                // To probe would be to believe what a guest wrote to a raw disk (CVE-2008-2004).
                if !matches!(format, Some("raw" | "qcow2")) {
                    let which = format.map_or("no declared format".to_owned(), |format| format!("the format {format:?}"));
                    return Err(unsupported(&source.name, format!("a backing file with {which}")));
                }
                let behind = opener(&source.name, name)?;
                Some(match format {
                    Some("raw") => Layer::Raw(behind),
                    _ => Layer::Qcow2(Box::new(Self::open_at(behind, opener, names)?)),
                })
            }
        };
        Ok(Qcow2 { source, header, l1, backing, cache: Mutex::default() })
    }

    /// Size that the guest sees, bytes.
    pub fn virtual_size(&self) -> u64 {
        self.header.size
    }
}

/// `len` bytes at `offset`; what is beyond the end of the file is zeros. `len` is bounded by the caller.
fn read_or_zeros(source: &Source, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let inside = source.len.saturating_sub(offset).min(len as u64) as usize;
    source
        .file
        .read_all_at(&mut bytes[..inside], offset)
        .map_err(|error| Error::io(Stage::Target, source.name.as_str(), format!("read {inside} bytes at {offset}"), error))?;
    Ok(bytes)
}

fn corrupt(object: &str, message: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, Stage::Target, object, message).with_reason("QCOW2_CORRUPT").with_hint("look at it with qemu-img check")
}

fn unsupported(object: &str, feature: impl Into<String>) -> Error {
    Error::new(Kind::Unsupported, Stage::Target, object, format!("the qcow2 image has {}, which is not supported here", feature.into()))
        .with_reason("QCOW2_FEATURE_UNSUPPORTED")
}
