//! Writing a golden's data with the patch merged in, by direct I/O with several requests in flight.
//!
//! The work is cut into pieces of at most 1 MiB; each thread takes the next piece, reads it from the golden (through the page cache, where goldens
//! usually are), puts the patch's blocks over it and writes it with one aligned call. So no byte is written twice, and the instance's data does not
//! push other things out of the host's page cache.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use rustix::{fs::FallocateFlags, io::Errno};

use crate::{
    error::{Error, Result, Stage},
    fs::patch::BlockPatch,
    target::{extents, pace::Pace, publish::StagedFile},
    units::{MIB, PATCH_BLOCK},
};

/// Writers per volume, which is the queue depth; more brought nothing on the disks measured.
const THREADS_MAX: usize = 4;
/// Bytes per request.
pub(super) const PIECE_BYTES_MAX: u64 = MIB;

/// As [`write`], into a file that is new and sparse: the space is allocated first, in runs, so that the writers need not wait for each other inside the
/// filesystem (ext4 and XFS serialise direct writes that allocate), and a lack of space shows at once.
pub(super) fn write_new(source: Source<'_>, pieces: &[Piece], staged: &StagedFile, pace: Pace<'_>) -> Result<()> {
    let targets: Vec<Range<u64>> = pieces.iter().map(|piece| piece.to..piece.to + (piece.from.end - piece.from.start)).collect();
    for run in extents::union(&targets, &[]) {
        match rustix::fs::fallocate(staged.file(), FallocateFlags::KEEP_SIZE, run.start, run.end - run.start) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => break,
            Err(errno) => return Err(staged.error(format!("allocate {} bytes", run.end - run.start), errno.into())),
        }
        pace.progress.check()?;
    }
    write(source, pieces, &staged.open_direct()?, &staged.path().display().to_string(), pace)
}

/// Where the bytes come from.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    /// The golden, open.
    pub golden: &'a File,
    /// Its size; beyond it zeros are read.
    pub golden_bytes: u64,
    /// What lies over it.
    pub patch: &'a BlockPatch,
}

impl Source<'_> {
    /// Fills `buffer` with what the volume holds at `offset` (both multiples of 4096).
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let inside = self.golden_bytes.saturating_sub(offset).min(buffer.len() as u64) as usize;
        self.golden.read_exact_at(&mut buffer[..inside], offset)?;
        buffer[inside..].fill(0);
        for (index, block) in buffer.chunks_mut(PATCH_BLOCK as usize).enumerate() {
            if let Some(new) = self.patch.get(offset / PATCH_BLOCK + index as u64) {
                block.copy_from_slice(&new[..block.len()]);
            }
        }
        Ok(())
    }
}

/// A range of the volume (multiples of 4096) and where it goes in the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// Bytes of the volume, at most [`PIECE_BYTES_MAX`].
    pub from: Range<u64>,
    /// Offset in the output.
    pub to: u64,
}

/// Cuts `from`, which goes to `to`, into pieces; cuts lie at multiples of the piece size in the volume.
pub(super) fn cut(from: Range<u64>, to: u64, pieces: &mut Vec<Piece>) {
    let mut at = from.start;
    while at < from.end {
        let end = (at / PIECE_BYTES_MAX + 1).saturating_mul(PIECE_BYTES_MAX).min(from.end);
        pieces.push(Piece { from: at..end, to: to + (at - from.start) });
        at = end;
    }
}

/// Writes all pieces to `output`, which is open with `O_DIRECT`. Not durable yet. `object` is the output's name for messages.
pub(super) fn write(source: Source<'_>, pieces: &[Piece], output: &File, object: &str, pace: Pace<'_>) -> Result<()> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let first_error = Mutex::new(None);
    let work = || -> Result<()> {
        let _priority = pace.lower_priority();
        let mut memory = AlignedBuffer::new();
        while !stop.load(Ordering::Relaxed) {
            let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            let len = piece.from.end - piece.from.start;
            pace.take(len)?;
            let buffer = memory.slice(len as usize);
            source
                .read(buffer, piece.from.start)
                .map_err(|error| Error::io(Stage::Target, object, format!("read the golden image at {}", piece.from.start), error))?;
            output.write_all_at(buffer, piece.to).map_err(|error| Error::io(Stage::Target, object, format!("write at {}", piece.to), error))?;
            pace.progress.add(len);
        }
        Ok(())
    };
    let run = || {
        if let Err(error) = work() {
            stop.store(true, Ordering::Relaxed);
            // The first cause wins.
            first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    };
    std::thread::scope(|scope| {
        for number in 1..pieces.len().min(THREADS_MAX) {
            // Fewer threads are slower, not wrong.
            let _ = std::thread::Builder::new().name(format!("bulk-{number}")).spawn_scoped(scope, run);
        }
        run();
    });
    first_error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Memory that direct I/O accepts: aligned to 4096 bytes inside a larger vector, which needs no unsafe.
pub(super) struct AlignedBuffer(Vec<u8>);

impl AlignedBuffer {
    pub fn new() -> Self {
        AlignedBuffer(vec![0; (PIECE_BYTES_MAX + PATCH_BLOCK) as usize])
    }

    /// The first `len` aligned bytes, `len` at most [`PIECE_BYTES_MAX`].
    pub fn slice(&mut self, len: usize) -> &mut [u8] {
        let skip = self.0.as_ptr().align_offset(PATCH_BLOCK as usize);
        &mut self.0[skip..skip + len]
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::{
        host::sys,
        progress::Progress,
        target::{IoPriority, Pacer},
    };

    #[test]
    fn pieces_cover_the_range_and_keep_its_distance() {
        let mut pieces = Vec::new();
        cut(MIB - 4096..3 * MIB + 8192, 64 * MIB, &mut pieces);
        let lens: Vec<u64> = pieces.iter().map(|piece| piece.from.end - piece.from.start).collect();
        assert_eq!(lens, [4096, MIB, MIB, 8192]);
        assert!(pieces.iter().all(|piece| piece.to - piece.from.start == 63 * MIB + 4096));
    }

    #[test]
    fn the_threads_that_write_have_the_pacers_priority_and_keep_to_its_rate() {
        let (golden, output) = (tempfile::tempfile().expect("golden"), tempfile::tempfile().expect("output"));
        golden.set_len(12 * MIB).expect("size");
        let mut pieces = Vec::new();
        cut(0..12 * MIB, 0, &mut pieces);
        let (patch, progress) = (BlockPatch::new(12 * MIB), Progress::default());
        let pacer = Pacer::new(Some(16 * MIB), MIB, IoPriority::Low);
        let begun = Instant::now();
        let seen = std::thread::scope(|scope| {
            let (source, pace) =
                (Source { golden: &golden, golden_bytes: 12 * MIB, patch: &patch }, Pace { pacer: Some(&pacer), progress: &progress });
            let (pieces, output) = (&pieces, &output);
            let writing = scope.spawn(move || write(source, pieces, output, "output", pace).expect("writes"));
            let mut seen = std::collections::BTreeSet::new();
            while !writing.is_finished() {
                for task in std::fs::read_dir("/proc/self/task").expect("lists").filter_map(std::result::Result::ok) {
                    let Ok(name) = std::fs::read_to_string(task.path().join("comm")) else { continue };
                    let tid: u32 = task.file_name().to_str().and_then(|tid| tid.parse().ok()).expect("a number");
                    if name.starts_with("bulk-") && sys::io_priority(tid).is_ok_and(|value| value == 2 << 13 | 7) {
                        seen.insert(name.trim().to_owned());
                    }
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            seen
        });
        assert!(seen.contains("bulk-1"), "{seen:?}");
        assert!(begun.elapsed() >= Duration::from_millis(650), "11 of 12 MiB are paced: {:?}", begun.elapsed());
    }

    #[test]
    fn buffers_are_aligned() {
        assert_eq!(AlignedBuffer::new().slice(4096).as_ptr().align_offset(4096), 0);
    }
}
