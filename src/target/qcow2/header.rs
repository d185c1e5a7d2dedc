//! The header cluster of a qcow2 image: fixed fields, extensions, name of the backing file.

use super::{Geometry, REFCOUNT_ORDER};
use crate::{
    error::{Error, Kind, Result, Stage},
    target::{BackingPath, Compression, VolumeOptions},
};

/// Bytes of the fixed header without the compression type, and with it and its padding.
pub(super) const HEADER_BYTES: u32 = 104;
/// As [`HEADER_BYTES`] where the compression type is stated.
pub(super) const HEADER_BYTES_COMPRESSION: u32 = 112;
/// QEMU refuses longer names.
const BACKING_NAME_BYTES_MAX: usize = 1023;
/// Incompatible feature bit 3: the compression type is not zlib.
const COMPRESSION_TYPE: u64 = 1 << 3;
/// Incompatible feature bit 4.
pub(super) const EXTENDED_L2: u64 = 1 << 4;
/// Compatible feature bit 0.
pub(super) const LAZY_REFCOUNTS: u64 = 1;
/// Header extension: format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Header extension: names of features.
const FEATURE_NAMES: u32 = 0x6803_f857;
/// Compression type 1.
const ZSTD: u8 = 1;

/// What the header says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header<'a> {
    /// Cluster size and kind of L2 entries.
    pub geometry: Geometry,
    /// Size the guest sees, bytes.
    pub virtual_size: u64,
    /// Entries of the L1 table.
    pub l1_entries: u64,
    /// Where the L1 table is, bytes.
    pub l1_offset: u64,
    /// Where the refcount table is, bytes.
    pub reftable_offset: u64,
    /// Its clusters.
    pub reftable_clusters: u64,
    /// What was chosen.
    pub choice: Choice<'a>,
}

/// What an image's header says beside its layout.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Choice<'a> {
    /// Name of the backing file, checked by [`backing_name`].
    pub backing: Option<&'a [u8]>,
    /// Refcounts may be updated late.
    pub lazy_refcounts: bool,
    /// How compressed clusters are compressed.
    pub compression: Compression,
}

impl<'a> Choice<'a> {
    /// As `options` say.
    pub fn of(options: &VolumeOptions, backing: Option<&'a [u8]>) -> Self {
        Choice { backing, lazy_refcounts: options.lazy_refcounts.unwrap_or(false), compression: options.compression.unwrap_or_default() }
    }
}

impl Header<'_> {
    /// The bytes of the header, its extensions and the backing file's name.
    pub fn bytes(&self) -> Vec<u8> {
        let is_zstd = self.choice.compression == Compression::Zstd;
        let header_bytes = if is_zstd { HEADER_BYTES_COMPRESSION } else { HEADER_BYTES };
        let extensions = self.extensions();
        let (name_at, name) = match self.choice.backing {
            Some(name) => (u64::from(header_bytes) + extensions.len() as u64, name),
            None => (0, &[][..]),
        };
        let incompatible = if self.geometry.subclusters { EXTENDED_L2 } else { 0 } | if is_zstd { COMPRESSION_TYPE } else { 0 };
        let mut header = Vec::with_capacity(4096);
        let mut long = |value: u64| header.extend_from_slice(&value.to_be_bytes());
        long(u64::from(u32::from_be_bytes(*b"QFI\xfb")) << 32 | 3);
        long(name_at);
        long((name.len() as u64) << 32 | u64::from(self.geometry.cluster_bits));
        long(self.virtual_size);
        // No encryption; L1 entries.
        long(self.l1_entries);
        long(self.l1_offset);
        long(self.reftable_offset);
        // Clusters of the refcount table; no snapshots, at no offset.
        long(self.reftable_clusters << 32);
        long(0);
        long(incompatible);
        long(if self.choice.lazy_refcounts { LAZY_REFCOUNTS } else { 0 });
        // Autoclear features.
        long(0);
        long(u64::from(REFCOUNT_ORDER) << 32 | u64::from(header_bytes));
        if is_zstd {
            long(u64::from(ZSTD) << 56);
        }
        header.extend_from_slice(&extensions);
        header.extend_from_slice(name);
        header
    }

    fn extensions(&self) -> Vec<u8> {
        let mut extensions = Vec::new();
        let mut extension = |kind: u32, data: &[u8]| {
            extensions.extend_from_slice(&kind.to_be_bytes());
            extensions.extend_from_slice(&(data.len() as u32).to_be_bytes());
            extensions.extend_from_slice(data);
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        };
        if self.choice.backing.is_some() {
            // Without it QEMU would have to probe, and what a guest writes to a raw disk can look like any format (CVE-2008-2004).
            extension(BACKING_FORMAT, b"raw");
        }
        // Feature name table: an older QEMU then says what it lacks.
        let mut names = Vec::new();
        let mut feature = |is_used: bool, kind: u8, bit: u8, name: &[u8]| {
            if is_used {
                names.extend_from_slice(&[kind, bit]);
                names.extend_from_slice(name);
                names.resize(names.len().next_multiple_of(48), 0);
            }
        };
        feature(self.choice.compression == Compression::Zstd, 0, 3, b"compression type");
        feature(self.geometry.subclusters, 0, 4, b"extended L2 entries");
        feature(self.choice.lazy_refcounts, 1, 0, b"lazy refcounts");
        if !names.is_empty() {
            extension(FEATURE_NAMES, &names);
        }
        extension(0, &[]);
        extensions
    }
}

/// How the image in `directory` names its backing file `path`, both absolute. A relative name is resolved against the directory of the image, whatever
/// the working directory (QEMU's docs/system/images.rst); both paths are taken without symbolic links, because `..` leaves a directory by its real parent.
pub(super) fn backing_name(path: &std::path::Path, directory: &std::path::Path, kind: BackingPath) -> Result<Vec<u8>> {
    use std::os::unix::ffi::OsStrExt;
    let name = match kind {
        BackingPath::Absolute => path.as_os_str().as_bytes().to_vec(),
        BackingPath::Relative => {
            let real = |path: &std::path::Path| {
                std::fs::canonicalize(path).map_err(|error| Error::io(Stage::Target, path.display().to_string(), "resolve", error))
            };
            relative(&real(path)?, &real(directory)?)
        }
    };
    check_backing_name(&name)?;
    Ok(name)
}

/// `path` as seen from `directory`. It starts with a dot, so that nothing in it reads as a protocol (`nbd:`).
fn relative(path: &std::path::Path, directory: &std::path::Path) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    let shared = path.components().zip(directory.components()).take_while(|(left, right)| left == right).count();
    let up = directory.components().count() - shared;
    let mut name = if up == 0 { b".".to_vec() } else { [&b".."[..]].repeat(up).join(&b'/') };
    for component in path.components().skip(shared) {
        name.push(b'/');
        name.extend_from_slice(component.as_os_str().as_bytes());
    }
    name
}

/// Whether `name` can be the name of a backing file.
fn check_backing_name(name: &[u8]) -> Result<()> {
    if matches!(name.first(), Some(b'/' | b'.')) && name.len() <= BACKING_NAME_BYTES_MAX {
        return Ok(());
    }
    let message = format!("a qcow2 image names its backing file by a path of at most {BACKING_NAME_BYTES_MAX} bytes, this has {}", name.len());
    Err(Error::new(Kind::InvalidRequest, Stage::Target, String::from_utf8_lossy(name), message))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn backing_names_are_paths_and_short_enough_for_qemu() {
        assert!(check_backing_name(b"/a").is_ok() && check_backing_name(b"../a").is_ok());
        for bad in [&b""[..], b"a", b"nbd://host", b"json:{}", &[b'/'; 1024]] {
            assert!(check_backing_name(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn relative_names_lead_from_the_directory_to_the_file() {
        for (path, directory, want) in [
            ("/srv/store/a.raw", "/srv/pool", "../store/a.raw"),
            ("/srv/pool/nbd:x", "/srv/pool", "./nbd:x"),
            ("/a", "/srv/pool", "../../a"),
            ("/srv/pool/deep/a", "/srv/pool", "./deep/a"),
            ("/a", "/", "./a"),
        ] {
            assert_eq!(String::from_utf8_lossy(&relative(Path::new(path), Path::new(directory))), want);
        }
    }

    #[test]
    fn the_compression_type_is_stated_where_it_is_not_zlib() {
        let geometry = Geometry { cluster_bits: 16, subclusters: false };
        let header = |compression| {
            let choice = Choice { compression, lazy_refcounts: true, ..Choice::default() };
            Header { geometry, virtual_size: 1 << 30, l1_entries: 2, l1_offset: 1 << 17, reftable_offset: 1 << 18, reftable_clusters: 1, choice }
                .bytes()
        };
        let (zlib, zstd) = (header(Compression::Zlib), header(Compression::Zstd));
        assert_eq!((zlib[79], zlib[87], &zlib[100..104]), (0, 1, &104u32.to_be_bytes()[..]));
        assert_eq!((zstd[79], zstd[87], &zstd[100..104], zstd[104]), (8, 1, &112u32.to_be_bytes()[..], 1));
    }
}
