//! Reading a staged volume back from storage and comparing it with golden and patch, before it is published.
//!
//! What is compared is what the disk holds, not what the page cache does: files are flushed, and read by direct I/O (raw) or after their cached pages were
//! dropped (qcow2, whose tables and compressed clusters have no alignment); devices are read by direct I/O. Holes of a raw file, and what a qcow2 image
//! does not hold, read as zeros by definition: they are not read where zeros are wanted. Nor is what an overlay leaves to its golden, which would be
//! compared with itself.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt, path::Path};

use rustix::fs::Advice;

use crate::{
    error::{Error, Kind, Result, Stage},
    target::{
        bulk::{AlignedBuffer, PIECE_BYTES_MAX, Source},
        extents::{self, Ranges},
        pace::Pace,
        publish::StagedFile,
    },
};

/// Reads back a raw file; `written` is where golden or patch have data.
pub(super) fn raw(source: Source<'_>, written: &Ranges, staged: &StagedFile, pace: Pace<'_>) -> Result<()> {
    flush_and_forget(staged)?;
    let held = extents::data_ranges(staged.file(), source.patch.size_bytes(), staged.path())?;
    let file = staged.open_direct()?;
    compare(source, &extents::union(written, &held), |buffer, offset| file.read_exact_at(buffer, offset), staged.path(), pace)
}

/// Reads back `range` of a device that is open with `O_DIRECT`; `path` is its name.
pub(super) fn device(source: Source<'_>, range: Range<u64>, device: &File, path: &Path, pace: Pace<'_>) -> Result<()> {
    compare(source, std::slice::from_ref(&range), |buffer, offset| device.read_exact_at(buffer, offset), path, pace)
}

/// Flushes a file and drops its pages from the cache, so that what is read next comes from storage.
pub(super) fn flush_and_forget(staged: &StagedFile) -> Result<()> {
    staged.file().sync_data().map_err(|error| staged.error("flush before reading back", error))?;
    // Advice: where the filesystem has no storage behind it (tmpfs), nothing is dropped and nothing needs to be.
    rustix::fs::fadvise(staged.file(), 0, None, Advice::DontNeed).map_err(|errno| staged.error("drop cached pages", errno.into()))
}

/// Compares `ranges` (ascending) of what `read` gives with `source`. `path` is what is read, for messages.
pub(super) fn compare(
    source: Source<'_>,
    ranges: &[Range<u64>],
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    path: &Path,
    pace: Pace<'_>,
) -> Result<()> {
    let (mut stored, mut wanted) = (AlignedBuffer::new(), AlignedBuffer::new());
    let failed = |doing: &str, at: u64, error: io::Error| Error::io(Stage::Target, path.display().to_string(), format!("{doing} at {at}"), error);
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(PIECE_BYTES_MAX) as usize;
            let (stored, wanted) = (stored.slice(len), wanted.slice(len));
            pace.take(len as u64)?;
            read(stored, at).map_err(|error| failed("read back", at, error))?;
            source.read(wanted, at).map_err(|error| failed("read the golden image", at, error))?;
            if let Some(index) = stored.iter().zip(wanted.iter()).position(|(left, right)| left != right) {
                return Err(differs(path, at + index as u64));
            }
            at += len as u64;
        }
    }
    Ok(())
}

/// `Corrupt`, reason `READBACK_MISMATCH`: what was read back at `offset` of the volume is not what was written.
pub(super) fn differs(path: &Path, offset: u64) -> Error {
    let message = format!("what is read back differs from what was written at byte {offset} of the volume");
    Error::new(Kind::Corrupt, Stage::Target, path.display().to_string(), message).with_reason("READBACK_MISMATCH")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fs::patch::BlockPatch, progress::Progress, units::MIB};

    #[test]
    fn one_flipped_byte_is_named_wherever_it_is() {
        let (golden, stored) = (tempfile::tempfile().expect("golden"), tempfile::tempfile().expect("stored"));
        golden.set_len(2 * MIB).expect("size");
        golden.write_all_at(&[7; 5000], 0).expect("write");
        let mut patch = BlockPatch::new(3 * MIB);
        patch.insert(600, vec![9; 4096].into());
        let source = Source { golden: &golden, golden_bytes: 2 * MIB, patch: &patch };
        let (mut whole, progress) = (vec![0; 3 * MIB as usize], Progress::default());
        source.read(&mut whole, 0).expect("reads");
        stored.write_all_at(&whole, 0).expect("write");
        let check = |stored: &File| device(source, 0..3 * MIB, stored, Path::new("volume"), Pace { pacer: None, progress: &progress });
        check(&stored).expect("the same");
        // In the golden's data, in a hole of it, in the patch, behind the golden, and the last byte.
        for at in [4999, MIB + 1, 600 * 4096 + 4095, 2 * MIB + 5, 3 * MIB - 1] {
            stored.write_all_at(&[whole[at as usize] ^ 1], at).expect("flip");
            let error = check(&stored).expect_err("flipped");
            assert_eq!((error.kind(), error.reason()), (Kind::Corrupt, "READBACK_MISMATCH"));
            assert!(error.message().contains(&format!("byte {at} ")), "{error:?}");
            stored.write_all_at(&whole[at as usize..=at as usize], at).expect("restore");
        }
        check(&stored).expect("the same again");
    }
}
