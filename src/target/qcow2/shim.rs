//! qcow2-rs 0.1.6, kept on a short lead.
//!
//! The crate reads and writes qcow2 well; around that it has edges that this file takes off:
//! - It is only ever given images that this daemon has laid out a moment ago: [`refuse_foreign`] checks the header ourselves first. (Foreign ones may panic
//!   it, and internal snapshots would be corrupted.)
//! - Its futures are not `Send` and a device that is dropped with metadata to flush panics: each image lives on a thread of its own with its own
//!   runtime, is always flushed, and is forgotten rather than dropped when that failed. A panic ends that thread, not the daemon.
//! - Its own I/O backends assert, and punch holes with flags that Linux refuses. [`Io`] is ours: whole transfers or an errno, zeros past the end of the
//!   file, no writes to the header.
//! - It syncs the file for each step of its metadata. A staged file has no name and is synced as a whole before it gets one, so [`Io`] does not sync.
//! - It turns off the `log` crate in release builds; this daemon logs by `tracing`.

use std::{fs::File, mem::ManuallyDrop, os::unix::fs::FileExt, path::Path};

use qcow2_rs::{
    dev::{Qcow2Dev, Qcow2DevParams},
    error::{Qcow2Error, Qcow2Result},
    meta::Qcow2Header,
    ops::{Qcow2IoOps, Qcow2OpsFlags},
};
use rustix::fs::FallocateFlags;

use crate::error::{Error, Kind, Result, Stage};

/// The header and its extensions fit: only images without a backing file are opened.
const HEADER_READ_BYTES: usize = 4096;
/// Smallest unit of its metadata writes, a power of two.
const BLOCK_BITS: u8 = 12;

/// An open image on its thread.
pub(super) type Image = Qcow2Dev<Io>;

/// Opens the image in `file`, lets `work` use it, flushes its metadata (to the page cache). `path` is for messages.
///
/// `Corrupt`: not an image of ours. `Internal`: qcow2-rs failed or panicked; the operating system's error is the source where there is one.
pub(super) fn with_image<T: Send>(file: &File, path: &Path, work: impl AsyncFnOnce(&Image) -> Result<T> + Send) -> Result<T> {
    let file = file.try_clone().map_err(|error| Error::io(Stage::Target, path.display().to_string(), "duplicate the descriptor", error))?;
    let body = move || -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .map_err(|error| Error::io(Stage::Target, path.display().to_string(), "start a runtime", error))?;
        runtime.block_on(session(file, path, work))
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("qcow2".into())
            .spawn_scoped(scope, body)
            .map_err(|error| Error::io(Stage::Target, path.display().to_string(), "start a thread", error))?;
        thread.join().unwrap_or_else(|_| Err(Error::internal(Stage::Target, path.display().to_string(), "qcow2-rs panicked")))
    })
}

/// The crate's error as ours.
pub(super) fn failed(path: &Path, doing: &str, error: Qcow2Error) -> Error {
    Error::internal(Stage::Target, path.display().to_string(), doing).with_source(Said(error.to_string()))
}

async fn session<T>(file: File, path: &Path, work: impl AsyncFnOnce(&Image) -> Result<T>) -> Result<T> {
    let io = Io { file };
    let mut bytes = vec![0; HEADER_READ_BYTES];
    io.read(0, &mut bytes).map_err(|error| Error::io(Stage::Target, path.display().to_string(), "read the header", error))?;
    refuse_foreign(&bytes, path)?;
    let header = Qcow2Header::from_buf(&bytes).map_err(|error| failed(path, "parse the header", error))?;
    let params = Qcow2DevParams::new(BLOCK_BITS, None, None, false, false);
    let image = Image::new(path, header, &params, io).map_err(|error| failed(path, "open", error))?;
    // Its Drop panics while metadata is dirty; a leak of some memory is better.
    let image = ManuallyDrop::new(image);
    image.qcow2_prep_io().await.map_err(|error| failed(path, "load the tables", error))?;
    let result = work(&image).await;
    let flushed = image.flush_meta().await.map_err(|error| failed(path, "flush the metadata", error));
    if !image.need_flush_meta() {
        drop(ManuallyDrop::into_inner(image));
    }
    let value = result?;
    flushed?;
    Ok(value)
}

/// Accepts only what `Layout` writes without a backing file.
fn refuse_foreign(header: &[u8], path: &Path) -> Result<()> {
    let word = |at: usize| header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes);
    let zero = |range: std::ops::Range<usize>| header.get(range).is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0));
    let is_ours = header.starts_with(b"QFI\xfb")
        && word(4) == 3
        // No backing file.
        && zero(8..20)
        && (12..=21).contains(&word(20))
        // No encryption.
        && zero(32..36)
        // No snapshots, no features but lazy refcounts, which mean nothing as long as the image is not marked dirty.
        && zero(60..87)
        && header.get(87).is_some_and(|bits| *bits <= super::header::LAZY_REFCOUNTS as u8)
        && zero(88..96)
        && word(96) == super::REFCOUNT_ORDER
        && word(100) == super::header::HEADER_BYTES;
    if is_ours {
        return Ok(());
    }
    Err(Error::new(Kind::Corrupt, Stage::Target, path.display().to_string(), "is not a qcow2 image of this daemon"))
}

/// What the crate said, without its type.
#[derive(Debug)]
struct Said(String);

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Said {}

/// Positioned I/O on the image file.
pub(super) struct Io {
    file: File,
}

impl Io {
    /// Fills `buffer`; past the end of the file are zeros.
    fn read(&self, mut offset: u64, mut buffer: &mut [u8]) -> std::io::Result<()> {
        while !buffer.is_empty() {
            match self.file.read_at(buffer, offset) {
                Ok(0) => {
                    buffer.fill(0);
                    break;
                }
                Ok(count) => {
                    buffer = &mut buffer[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Qcow2IoOps for Io {
    async fn read_to(&self, offset: u64, buffer: &mut [u8]) -> Qcow2Result<usize> {
        self.read(offset, buffer)?;
        Ok(buffer.len())
    }

    async fn write_from(&self, offset: u64, buffer: &[u8]) -> Qcow2Result<()> {
        if offset < HEADER_READ_BYTES as u64 {
            return Err("the header of a staged image is not rewritten".into());
        }
        Ok(self.file.write_all_at(buffer, offset)?)
    }

    async fn fallocate(&self, offset: u64, len: usize, flags: u32) -> Qcow2Result<()> {
        let keep = FallocateFlags::KEEP_SIZE;
        let mode = if flags & Qcow2OpsFlags::FALLOCATE_ZERO_RAGE != 0 { FallocateFlags::ZERO_RANGE } else { FallocateFlags::PUNCH_HOLE };
        match rustix::fs::fallocate(&self.file, mode | keep, offset, len as u64) {
            Ok(()) => Ok(()),
            // Either way the range has to read as zeros afterwards.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(self.file.write_all_at(&vec![0; len], offset)?),
            Err(errno) => Err(std::io::Error::from(errno).into()),
        }
    }

    async fn fsync(&self, _offset: u64, _len: usize, _flags: u32) -> Qcow2Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::qcow2::{Geometry, Layout, header::Choice};

    fn image() -> File {
        let file = tempfile::tempfile().expect("temporary file");
        let layout = Layout::new(Geometry { cluster_bits: 16, subclusters: false }, 1 << 30, &[0..65536, 1 << 29..(1 << 29) + 1]).expect("lays out");
        layout.write_metadata(&file, Choice::default(), |_| 0).expect("writes");
        file
    }

    #[test]
    fn what_is_written_is_read_back_in_a_later_session_also_where_nothing_was_allocated() {
        let (file, path) = (image(), Path::new("t"));
        let offsets = [0, 1 << 29, 777 << 16];
        with_image(&file, path, async |image: &Image| {
            for offset in offsets {
                image.write_at(&[offset as u8 | 0x11; 4096], offset).await.map_err(|error| failed(path, "write", error))?;
            }
            Ok(())
        })
        .expect("writes");
        let back = with_image(&file, path, async |image: &Image| {
            let mut bytes = vec![0; 4096];
            for offset in offsets {
                image.read_at(&mut bytes, offset).await.map_err(|error| failed(path, "read", error))?;
                assert!(bytes.iter().all(|byte| *byte == offset as u8 | 0x11), "{offset}");
            }
            image.check().await.map_err(|error| failed(path, "check", error))
        });
        back.expect("reads");
    }

    #[test]
    fn a_failure_with_unflushed_metadata_and_a_panic_end_the_session_and_nothing_else() {
        let (file, path) = (image(), Path::new("t"));
        let refused = with_image(&file, path, async |image: &Image| {
            image.write_at(&[1; 4096], 5 << 20).await.map_err(|error| failed(path, "write", error))?;
            Err::<(), _>(Error::new(Kind::Cancelled, Stage::Target, "t", "stop"))
        });
        assert_eq!(refused.expect_err("the caller's error").kind(), Kind::Cancelled);
        let panicked = with_image(&file, path, async |image: &Image| -> Result<()> {
            image.write_at(&[1; 4096], 9 << 20).await.map_err(|error| failed(path, "write", error))?;
            panic!("as qcow2-rs may")
        });
        assert_eq!(panicked.expect_err("a panic").kind(), Kind::Internal);
    }

    #[test]
    fn foreign_images_are_refused_before_the_crate_sees_them() {
        for (at, value) in [(0, 0u8), (7, 2), (15, 1), (23, 40), (35, 1), (63, 1), (79, 4), (95, 1), (99, 9), (103, 112)] {
            let file = image();
            file.write_all_at(&[value], at).expect("write");
            let error = with_image(&file, Path::new("t"), async |_: &Image| Ok(())).expect_err("foreign");
            assert_eq!(error.kind(), Kind::Corrupt, "byte {at}");
        }
        let empty = tempfile::tempfile().expect("temporary file");
        assert_eq!(with_image(&empty, Path::new("t"), async |_: &Image| Ok(())).expect_err("empty").kind(), Kind::Corrupt);
    }
}
