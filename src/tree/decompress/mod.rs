//! Compressed archives to plain bytes: what was declared is compared with what is there, then decoded on a thread of its own, under limits.
//!
//! ```text
//! input ─ Counted ─ decoder ─ pump thread ══ chunks ══▶ Pumped: Read
//!                             (limits)      ◀═ empty ══
//! ```
//!
//! The digest of an archive is that of its compressed bytes and was checked before anything here runs (failures.md, rule 9).
//!
//! Every format may consist of several members one after another (gzip members, zstd frames, xz and bzip2 streams): they are one archive. Anything
//! else after a member is refused: what gzip(1) calls "trailing garbage, ignored" would be bytes that one tool sees and another does not.

mod pump;
mod xz;

use std::{
    io::{self, BufRead, BufReader, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};

use super::archive::checksum_is_right;
use crate::{
    error::{Error, Kind, Result, Stage},
    progress::Progress,
    units::{GIB, MIB},
};

const STAGE: Stage = Stage::Golden;
const OBJECT: &str = "archive";

/// How much is read from the input at once. Compressed bytes; a third of it comes out of a typical archive's chunk.
const INPUT_BUFFER_LEN: usize = 128 * 1024;

/// As much as detection looks at: one tar header.
pub const DETECT_LEN: usize = 512;

/// Finds out now what a confined process can't find out later.
pub fn prepare() {
    let _known = xz::threads();
}

/// How a root filesystem comes: how its archive is compressed, or that it is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// A plain tar archive.
    None,
    /// gzip (RFC 1952).
    Gzip,
    /// xz.
    Xz,
    /// Zstandard (RFC 8878).
    Zstd,
    /// bzip2.
    Bzip2,
    /// No archive but a squashfs image, which compresses by itself ([`super::squashfs`]).
    Squashfs,
}

impl Compression {
    /// The name in documents and messages: `none`, `gzip`, `xz`, `zstd`, `bzip2`, `squashfs`.
    pub fn name(self) -> &'static str {
        match self {
            Compression::None => "none",
            Compression::Gzip => "gzip",
            Compression::Xz => "xz",
            Compression::Zstd => "zstd",
            Compression::Bzip2 => "bzip2",
            Compression::Squashfs => "squashfs",
        }
    }

    /// What a media type says; parameters and case are ignored. Nothing for types that say nothing (`application/octet-stream`) or something else.
    pub fn from_media_type(media_type: &str) -> Option<Compression> {
        let essence = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        Some(match essence.as_str() {
            "application/x-tar" | "application/tar" | "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => {
                Compression::None
            }
            "application/gzip"
            | "application/x-gzip"
            | "application/x-tgz"
            | "application/x-gtar"
            | "application/x-compressed-tar"
            | "application/x-tar+gzip"
            | "application/tar+gzip"
            | "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Compression::Gzip,
            "application/x-xz" | "application/x-xz-compressed-tar" | "application/x-tar+xz" | "application/vnd.oci.image.layer.v1.tar+xz" => {
                Compression::Xz
            }
            "application/zstd"
            | "application/x-zstd"
            | "application/x-zstd-compressed-tar"
            | "application/x-tar+zstd"
            | "application/vnd.oci.image.layer.v1.tar+zstd" => Compression::Zstd,
            "application/x-bzip2"
            | "application/x-bzip"
            | "application/bzip2"
            | "application/x-bzip-compressed-tar"
            | "application/x-bzip2-compressed-tar"
            | "application/x-tar+bzip2" => Compression::Bzip2,
            // The first is registered with IANA; the others are what tools say.
            "application/vnd.squashfs" | "application/x-squashfs" | "application/squashfs" => Compression::Squashfs,
            _ => return None,
        })
    }

    /// What a file name or the path of a URL suggests. A suggestion for people's convenience: what was declared decides.
    pub fn from_file_name(name: &str) -> Option<Compression> {
        let name = name.to_ascii_lowercase();
        [
            (Compression::None, &[".tar"][..]),
            (Compression::Gzip, &[".tar.gz", ".tgz"]),
            (Compression::Xz, &[".tar.xz", ".txz"]),
            (Compression::Zstd, &[".tar.zst", ".tzst", ".tar.zstd"]),
            (Compression::Bzip2, &[".tar.bz2", ".tbz2", ".tbz"]),
            (Compression::Squashfs, &[".squashfs", ".sqfs", ".sfs"]),
        ]
        .into_iter()
        .find_map(|(compression, suffixes)| suffixes.iter().any(|suffix| name.ends_with(suffix)).then_some(compression))
    }

    /// What the first bytes are (give it [`DETECT_LEN`] when there are as many). A tar header is looked for first, because a member may be called
    /// `BZh9`.
    pub fn detect(first: &[u8]) -> Option<Compression> {
        if let Some(block) = first.first_chunk::<DETECT_LEN>()
            && (checksum_is_right(block) || *block == [0; DETECT_LEN])
        {
            return Some(Compression::None);
        }
        match first {
            [0x1f, 0x8b, 8, ..] => Some(Compression::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Compression::Xz),
            // A frame, or a skippable frame such as pzstd and the seekable format put in front.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Compression::Zstd),
            [b'h', b's', b'q', b's', ..] => Some(Compression::Squashfs),
            [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, ..] => Some(Compression::Bzip2),
            _ => None,
        }
    }
}

/// What decompression may cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that come out in all. `Kind::NoSpace`, reason `DECOMPRESS_LIMIT`, like the next.
    pub output_bytes: u64,
    /// Bytes that come out per byte that goes in, once more than [`Limits::ratio_free_bytes`] came out. Real root filesystems have 2 to 5; with a
    /// large file of zeros among them, some tens.
    pub ratio: u64,
    /// Output for which the ratio does not matter: honest small archives of zeros exist, and so much is quickly written.
    pub ratio_free_bytes: u64,
    /// Memory for a decoder's window, and for the blocks of a parallel one. `xz -9` wants 65 MiB, `zstd --ultra -22` 128 MiB.
    pub memory_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { output_bytes: 64 * GIB, ratio: 1000, ratio_free_bytes: GIB, memory_bytes: 128 * MIB }
    }
}

/// Opens an archive that was declared to be `media`, under the default limits.
///
/// The beginning is read at once. `Kind::InvalidRequest` (reason `FORMAT_MISMATCH`) when it is compressed in another way than declared,
/// `Kind::Corrupt` (`FORMAT_UNKNOWN`) when it is no archive at all. Errors of the reader carry a [`crate::error::Error`]: see
/// [`super::error_of_read`]. Dropping the reader stops the thread and waits for it, which takes as long as one read of `input`.
pub fn open(input: Box<dyn Read + Send>, media: Compression) -> Result<Box<dyn Read + Send>> {
    open_with(input, media, Limits::default(), &Progress::default())
}

/// Opens an archive under other limits; `progress` advances by the compressed bytes, as far as they were needed, and can stop it.
pub fn open_with(input: Box<dyn Read + Send>, media: Compression, limits: Limits, progress: &Progress) -> Result<Box<dyn Read + Send>> {
    let consumed = Arc::new(AtomicU64::new(0));
    let mut counted = Counted { input, consumed: Arc::clone(&consumed), progress: progress.clone() };
    let mut first = Vec::with_capacity(DETECT_LEN);
    counted
        .by_ref()
        .take(DETECT_LEN as u64)
        .read_to_end(&mut first)
        .map_err(|error| super::error_of_read(error, STAGE, OBJECT, "read its beginning"))?;
    check_declared(media, &first)?;
    let input = BufReader::with_capacity(INPUT_BUFFER_LEN, io::Cursor::new(first).chain(counted));
    match decoder(input, media, &limits)? {
        Decoder::Plain(input) => Ok(input),
        Decoder::Compressed(decoder) => Ok(Box::new(pump::start(decoder, media, limits, consumed)?)),
    }
}

fn check_declared(media: Compression, first: &[u8]) -> Result<()> {
    match Compression::detect(first) {
        Some(detected) if detected == media => Ok(()),
        Some(detected) => {
            let message = format!("declared compression is {}, the bytes are {}", media.name(), detected.name());
            Err(Error::new(Kind::InvalidRequest, STAGE, OBJECT, message).with_reason("FORMAT_MISMATCH"))
        }
        None => {
            let show: Vec<String> = first.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            let message =
                format!("declared compression is {}, the bytes ({} …) are no tar archive in any known compression", media.name(), show.join(" "));
            Err(Error::new(Kind::Corrupt, STAGE, OBJECT, message).with_reason("FORMAT_UNKNOWN"))
        }
    }
}

enum Decoder {
    Plain(Box<dyn Read + Send>),
    Compressed(Box<dyn Read + Send>),
}

fn decoder<R: BufRead + Send + 'static>(input: R, media: Compression, limits: &Limits) -> Result<Decoder> {
    Ok(Decoder::Compressed(match media {
        Compression::None => return Ok(Decoder::Plain(Box::new(input))),
        Compression::Squashfs => {
            let text = "is a squashfs image, where a tar archive was expected";
            return Err(Error::new(Kind::InvalidRequest, STAGE, OBJECT, text).with_reason("FORMAT_MISMATCH"));
        }
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Compression::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(input)),
        Compression::Xz => Box::new(xz::XzStreams::new(input, limits.memory_bytes).map_err(|error| error_of_decoder(error, media))?),
        Compression::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(input).map_err(|error| error_of_decoder(error, media))?;
            decoder.window_log_max(limits.memory_bytes.max(1).ilog2()).map_err(|error| error_of_decoder(error, media))?;
            Box::new(decoder)
        }
    }))
}

/// What a decoder's failure means. Those of the input pass through it unchanged.
fn error_of_decoder(error: io::Error, media: Compression) -> Error {
    let error = match error.downcast::<Error>() {
        Ok(of_input) => return of_input,
        Err(error) => error,
    };
    let wants_memory = error.get_ref().is_some_and(|inner| {
        matches!(inner.downcast_ref(), Some(liblzma::stream::Error::MemLimit | liblzma::stream::Error::Mem))
            // ZSTD_error_frameParameter_windowTooLarge has no number in this interface.
            || inner.to_string().contains("requires too much memory")
    });
    let (kind, reason, text) = if wants_memory {
        (Kind::NoSpace, "DECOMPRESS_LIMIT", "decoding needs more memory than is allowed")
    } else if error.kind() == io::ErrorKind::UnexpectedEof || error.to_string() == "incomplete frame" {
        (Kind::Corrupt, "DECOMPRESS_TRUNCATED", "the compressed data ends too early")
    } else {
        (Kind::Corrupt, "DECOMPRESS_CORRUPT", "the compressed data is damaged, or something else follows it")
    };
    Error::new(kind, STAGE, OBJECT, format!("decompress {}: {text}", media.name())).with_reason(reason).with_source(error)
}

/// Counts what the decoder takes, and makes the input's own errors recognisable behind it.
struct Counted {
    input: Box<dyn Read + Send>,
    consumed: Arc<AtomicU64>,
    progress: Progress,
}

impl Read for Counted {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.progress.check().map_err(io::Error::other)?;
        let len = loop {
            match self.input.read(out) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(io::Error::other(super::error_of_read(error, STAGE, OBJECT, "read the compressed bytes"))),
                Ok(len) => break len,
            }
        };
        self.consumed.fetch_add(len as u64, Ordering::Relaxed);
        self.progress.add(len as u64);
        Ok(len)
    }
}

#[cfg(test)]
mod tests;
