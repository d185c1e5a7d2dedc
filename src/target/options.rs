//! What can be chosen about a volume, and which format each choice belongs to.
//!
//! Every option is optional: what is not set is the format's measured default, which its own module states and gives the figures for. An option that a
//! format does not have is refused, not ignored, because the caller would believe in a property that the volume does not have.
//!
//! | option            | raw | loop | qcow2-overlay | qcow2 | block | default                                                    |
//! |-------------------|-----|------|---------------|-------|-------|------------------------------------------------------------|
//! | `cluster_size`    |     |      | yes           | yes   |       | 128 KiB with extended L2, else 64 KiB                      |
//! | `extended_l2`     |     |      | yes           | yes   |       | overlay: yes (QEMU 5.2); standalone: no                    |
//! | `lazy_refcounts`  |     |      | yes           | yes   |       | no                                                         |
//! | `backing_path`    |     |      | yes           |       |       | absolute                                                   |
//! | `compression`     |     |      |               | yes   |       | none                                                       |
//! | `preallocation`   | yes | yes  |               |       |       | sparse                                                     |
//! | `zero_policy`     |     |      |               |       | yes   | auto                                                       |
//! | `read_only`       |     | yes  |               |       |       | no                                                         |
//! | `partition_scan`  |     | yes  |               |       |       | yes                                                        |
//! | `direct_io`       |     | yes  |               |       |       | auto                                                       |
//! | `verify`          | yes | yes  | yes           | yes   | yes   | no                                                         |

use serde::{Deserialize, Serialize};

use super::VolumeFormat;
use crate::{
    error::{Error, Result, Stage},
    units::{Bytes, KIB, MIB},
};

/// Smallest and largest cluster of a qcow2 image (QEMU's docs/interop/qcow2.txt, `cluster_bits`; 2 MiB is QEMU's own limit).
const CLUSTER_BYTES: std::ops::RangeInclusive<u64> = 4 * KIB..=2 * MIB;
/// Extended L2 entries need clusters of at least this: a subcluster has 512 bytes or more (the same document, "Extended L2 Entries").
pub(super) const EXTENDED_L2_CLUSTER_BYTES_MIN: u64 = 16 * KIB;

/// How an overlay names its golden image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackingPath {
    /// By its absolute path.
    #[default]
    Absolute,
    /// Relative to the directory of the volume, so that pool and store can be moved together.
    Relative,
}

/// How the clusters of a standalone qcow2 image are compressed. A guest's writes are never compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// Deflate, which every reader of qcow2 knows.
    Zlib,
    /// Zstandard: smaller and much faster; QEMU 5.1 (August 2020) and later.
    Zstd,
}

/// How much space a raw file takes when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preallocation {
    /// What holds data; the rest are holes.
    #[default]
    Sparse,
    /// All of the virtual size is allocated (`fallocate(2)`), what holds no data is not written: a guest can't run out of space later, unless the
    /// filesystem writes elsewhere what is written again (btrfs). Nothing is shared with the golden. Refused (`PREALLOCATION_UNSUPPORTED`) where the
    /// filesystem can't.
    Falloc,
    /// As `Falloc`, and zeros are written: a guest's first write needs no change of the filesystem's metadata.
    Full,
}

/// How what is neither golden nor patch is made to read as zeros on a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ZeroPolicy {
    /// `BLKZEROOUT`: by the device where it can, else the kernel writes zeros; where the kernel can't either, they are written here.
    #[default]
    Auto,
    /// `BLKZEROOUT` by the device itself; a device that can't (`write_zeroes_max_bytes` is 0) is refused (`ZERO_OUT_UNSUPPORTED`) before anything is
    /// written.
    ZeroOut,
    /// `BLKDISCARD`, then all of it is read back; what does not read as zeros is zeroed as with `Auto`. For thin devices.
    Discard,
    /// Zeros are written by direct I/O, whatever the device promises.
    Write,
    /// As `Auto` inside the volume's size; what the device has beyond keeps its old content, which the guest can read.
    Keep,
}

/// Whether a loop device bypasses the page cache of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirectIo {
    /// Where the file's filesystem can.
    #[default]
    Auto,
    /// Yes, and the volume is refused (`DIRECT_IO_UNSUPPORTED`) where it can't.
    On,
    /// No.
    Off,
}

/// What a caller chose about a volume; see the head of this file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VolumeOptions {
    /// Cluster size of a qcow2 image: a power of two from 4 KiB to 2 MiB, at least 16 KiB with extended L2 entries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<Bytes>,
    /// Extended L2 entries (subclusters, QEMU 5.2). `false` gives images that older QEMUs read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
    /// Lets QEMU postpone refcount updates while a guest writes: fewer flushes, and a check after a crash.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// How an overlay names its golden.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_path: Option<BackingPath>,
    /// Compressed clusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// Space taken by a raw file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preallocation: Option<Preallocation>,
    /// Zeros on a block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_policy: Option<ZeroPolicy>,
    /// The loop device refuses writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
    /// The kernel makes nodes for the partitions on the loop device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition_scan: Option<bool>,
    /// Page cache under the loop device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_io: Option<DirectIo>,
    /// Reads the whole volume back from storage before it is published and compares it with golden and patch.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub verify: bool,
}

impl VolumeOptions {
    /// Nothing chosen.
    pub const DEFAULT: VolumeOptions = VolumeOptions {
        cluster_size: None,
        extended_l2: None,
        lazy_refcounts: None,
        backing_path: None,
        compression: None,
        preallocation: None,
        zero_policy: None,
        read_only: None,
        partition_scan: None,
        direct_io: None,
        verify: false,
    };

    /// Whether nothing was chosen.
    pub fn is_default(&self) -> bool {
        *self == VolumeOptions::DEFAULT
    }

    /// Refuses (`InvalidRequest`, field `options.NAME`) what `format` does not have and values outside their limits.
    pub fn check(&self, format: VolumeFormat) -> Result<()> {
        use VolumeFormat::{Block, Loop, Qcow2, Qcow2Overlay, Raw};
        let belongs: [(&str, bool, &[VolumeFormat]); 10] = [
            ("cluster_size", self.cluster_size.is_some(), &[Qcow2Overlay, Qcow2]),
            ("extended_l2", self.extended_l2.is_some(), &[Qcow2Overlay, Qcow2]),
            ("lazy_refcounts", self.lazy_refcounts.is_some(), &[Qcow2Overlay, Qcow2]),
            ("backing_path", self.backing_path.is_some(), &[Qcow2Overlay]),
            ("compression", self.compression.is_some(), &[Qcow2]),
            ("preallocation", self.preallocation.is_some(), &[Raw, Loop]),
            ("zero_policy", self.zero_policy.is_some(), &[Block]),
            ("read_only", self.read_only.is_some(), &[Loop]),
            ("partition_scan", self.partition_scan.is_some(), &[Loop]),
            ("direct_io", self.direct_io.is_some(), &[Loop]),
        ];
        for (name, is_set, formats) in belongs {
            if is_set && !formats.contains(&format) {
                let names: Vec<&str> = formats.iter().map(|format| format.name()).collect();
                return Err(refused(name, format!("{} volumes do not have it; it belongs to {}", format.name(), names.join(" and "))));
            }
        }
        self.check_clusters()
    }

    fn check_clusters(&self) -> Result<()> {
        let Some(Bytes(size)) = self.cluster_size else { return Ok(()) };
        if !size.is_power_of_two() || !CLUSTER_BYTES.contains(&size) {
            let (least, most) = (Bytes(*CLUSTER_BYTES.start()), Bytes(*CLUSTER_BYTES.end()));
            return Err(refused("cluster_size", format!("is {size} bytes; it is a power of two from {least} to {most}")));
        }
        if self.extended_l2 == Some(true) && size < EXTENDED_L2_CLUSTER_BYTES_MIN {
            let least = Bytes(EXTENDED_L2_CLUSTER_BYTES_MIN);
            return Err(refused("cluster_size", format!("is {size} bytes; with extended_l2 it is at least {least}")));
        }
        Ok(())
    }

    /// Bytes that a raw file of `size_bytes` takes when it needs `data_bytes` for its data.
    pub(super) fn allocation(&self, size_bytes: u64, data_bytes: u64) -> u64 {
        match self.preallocation.unwrap_or_default() {
            Preallocation::Sparse => data_bytes,
            Preallocation::Falloc | Preallocation::Full => data_bytes.max(size_bytes),
        }
    }
}

fn refused(name: &str, why: String) -> Error {
    Error::field(Stage::Target, format!("options.{name}"), why)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [VolumeFormat; 5] = [VolumeFormat::Raw, VolumeFormat::Loop, VolumeFormat::Qcow2Overlay, VolumeFormat::Qcow2, VolumeFormat::Block];

    #[test]
    fn an_option_is_refused_by_every_format_that_does_not_have_it() {
        let options = VolumeOptions::default;
        let cases: [(&str, VolumeOptions, &[VolumeFormat]); 11] = [
            ("cluster_size", VolumeOptions { cluster_size: Some(Bytes(65536)), ..options() }, &ALL[2..4]),
            ("extended_l2", VolumeOptions { extended_l2: Some(false), ..options() }, &ALL[2..4]),
            ("lazy_refcounts", VolumeOptions { lazy_refcounts: Some(true), ..options() }, &ALL[2..4]),
            ("backing_path", VolumeOptions { backing_path: Some(BackingPath::Relative), ..options() }, &ALL[2..3]),
            ("compression", VolumeOptions { compression: Some(Compression::Zstd), ..options() }, &ALL[3..4]),
            ("preallocation", VolumeOptions { preallocation: Some(Preallocation::Full), ..options() }, &ALL[..2]),
            ("zero_policy", VolumeOptions { zero_policy: Some(ZeroPolicy::Write), ..options() }, &ALL[4..]),
            ("read_only", VolumeOptions { read_only: Some(true), ..options() }, &ALL[1..2]),
            ("partition_scan", VolumeOptions { partition_scan: Some(false), ..options() }, &ALL[1..2]),
            ("direct_io", VolumeOptions { direct_io: Some(DirectIo::On), ..options() }, &ALL[1..2]),
            ("verify", VolumeOptions { verify: true, ..options() }, &ALL),
        ];
        for (name, options, formats) in cases {
            for format in ALL {
                match options.check(format) {
                    Ok(()) => assert!(formats.contains(&format), "{name} {format:?}"),
                    Err(error) => {
                        assert!(!formats.contains(&format), "{name} {format:?}: {error:?}");
                        assert_eq!(error.violations()[0].field, format!("options.{name}"));
                    }
                }
            }
        }
    }

    #[test]
    fn cluster_sizes_have_limits() {
        let with = |size, extended_l2| VolumeOptions { cluster_size: Some(Bytes(size)), extended_l2, ..VolumeOptions::default() };
        for size in [0, 512, 2048, 4097, 65535, 4 << 20, u64::MAX] {
            let error = with(size, None).check(VolumeFormat::Qcow2).expect_err("outside");
            assert!(error.message().contains("4 KiB to 2 MiB"), "{error:?}");
        }
        assert!(with(8192, Some(true)).check(VolumeFormat::Qcow2Overlay).expect_err("too small").message().contains("16 KiB"));
        with(8192, None).check(VolumeFormat::Qcow2Overlay).expect("without subclusters");
    }

    #[test]
    fn documents_name_the_options_and_unknown_ones_are_refused() {
        let read: VolumeOptions =
            serde_json::from_str(r#"{"cluster_size": "64 KiB", "compression": "zstd", "zero_policy": "zero-out", "verify": true}"#).expect("reads");
        assert_eq!((read.cluster_size, read.compression, read.verify), (Some(Bytes(65536)), Some(Compression::Zstd), true));
        assert!(serde_json::from_str::<VolumeOptions>(r#"{"clusters": 1}"#).is_err());
        assert_eq!(serde_json::to_string(&VolumeOptions::default()).expect("writes"), "{}");
        assert!(VolumeOptions::default().is_default());
    }
}
