//! Which bytes of a golden hold data: the map of allocated ranges of a sparse file, by `lseek(SEEK_DATA)` and `SEEK_HOLE` (lseek(2)).
//!
//! The kernel counts pages that are in the page cache but not yet on disk as data, so a golden that was written a moment ago maps correctly. A
//! filesystem without holes answers "all data", which costs time and no correctness. Ranges are widened to 4096 bytes, the unit of a patch.

use std::{fs::File, ops::Range, path::Path};

use rustix::{fs::SeekFrom, io::Errno};

use crate::{
    error::{Error, Kind, Result, Stage},
    fs::patch::BlockPatch,
    target::GoldenDisk,
    units::PATCH_BLOCK,
};

/// Byte ranges, ascending, not empty, not touching.
pub type Ranges = Vec<Range<u64>>;

/// The ranges of `file` below `size` that hold data. `path` is for messages.
pub fn data_ranges(file: &File, size: u64, path: &Path) -> Result<Ranges> {
    let failed = |doing: &str, errno: Errno| Error::io(Stage::Target, path.display().to_string(), doing, errno.into());
    let mut ranges = Ranges::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data beyond.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(failed("find data", errno)),
        };
        if start >= size {
            break;
        }
        let end = rustix::fs::seek(file, SeekFrom::Hole(start)).map_err(|errno| failed("find a hole", errno))?.min(size);
        // A file that shrinks under us would make no progress.
        if end <= at {
            return Err(Error::new(Kind::Corrupt, Stage::Target, path.display().to_string(), "changed while it was being mapped"));
        }
        push(&mut ranges, round_down(start)..round_up(end).min(size));
        at = end;
    }
    Ok(ranges)
}

/// The bytes that a patch replaces, in runs.
pub fn patch_ranges(patch: &BlockPatch) -> Ranges {
    let mut ranges = Ranges::new();
    for (number, _) in patch.iter() {
        push(&mut ranges, number * PATCH_BLOCK..(number + 1) * PATCH_BLOCK);
    }
    ranges
}

/// What is in either.
pub fn union(left: &[Range<u64>], right: &[Range<u64>]) -> Ranges {
    let mut all: Ranges = left.iter().chain(right).cloned().collect();
    all.sort_by_key(|range| range.start);
    let mut ranges = Ranges::new();
    for range in all {
        push(&mut ranges, range);
    }
    ranges
}

/// What is below `size` and in none of `ranges`.
pub fn complement(ranges: &[Range<u64>], size: u64) -> Ranges {
    let mut gaps = Ranges::new();
    let mut at = 0;
    for range in ranges {
        push(&mut gaps, at..range.start.min(size));
        at = at.max(range.end);
    }
    push(&mut gaps, at.min(size)..size);
    gaps
}

/// Each range widened to multiples of `unit` (a power of two).
pub fn widen(ranges: &[Range<u64>], unit: u64) -> Ranges {
    let mut wide = Ranges::new();
    for range in ranges {
        push(&mut wide, range.start & !(unit - 1)..range.end.div_ceil(unit) * unit);
    }
    wide
}

/// What lies below `size`.
pub fn clip(mut ranges: Ranges, size: u64) -> Ranges {
    ranges.retain(|range| range.start < size);
    if let Some(last) = ranges.last_mut() {
        last.end = last.end.min(size);
    }
    ranges
}

/// Bytes in all.
pub fn total(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// Opens a golden and checks that it has the size its record says.
pub fn open_golden(golden: &GoldenDisk) -> Result<File> {
    let object = || golden.path.display().to_string();
    let file = File::open(&golden.path).map_err(|error| Error::io(Stage::Target, object(), "open the golden image", error))?;
    let meta = file.metadata().map_err(|error| Error::io(Stage::Target, object(), "stat the golden image", error))?;
    if !meta.is_file() || meta.len() != golden.size_bytes {
        let message = format!("the golden image has {} bytes, its record says {}", meta.len(), golden.size_bytes);
        return Err(Error::new(Kind::Corrupt, Stage::Target, object(), message).with_reason("GOLDEN_SIZE_DIFFERS"));
    }
    Ok(file)
}

/// Appends a range that starts at or after the last one's start; joins it when they touch.
fn push(ranges: &mut Ranges, range: Range<u64>) {
    if range.start >= range.end {
        return;
    }
    match ranges.last_mut() {
        Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
        _ => ranges.push(range),
    }
}

fn round_down(offset: u64) -> u64 {
    offset & !(PATCH_BLOCK - 1)
}

fn round_up(offset: u64) -> u64 {
    offset.div_ceil(PATCH_BLOCK) * PATCH_BLOCK
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn data_that_is_only_in_the_page_cache_is_mapped_and_holes_are_not() {
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(64 << 20).expect("size");
        file.write_all_at(b"x", 5000).expect("write");
        file.write_all_at(&[1; 8192], 32 << 20).expect("write");
        let ranges = data_ranges(&file, 64 << 20, Path::new("t")).expect("maps");
        assert_eq!(ranges, [4096..8192, (32 << 20)..(32 << 20) + 8192]);
        assert_eq!(data_ranges(&file, 4096, Path::new("t")).expect("maps"), Ranges::new(), "nothing below 4096");
    }

    /// The obvious way: one flag per unit.
    fn flags(ranges: &[Range<u64>], size: u64) -> Vec<bool> {
        (0..size).map(|at| ranges.iter().any(|range| range.contains(&at))).collect()
    }

    proptest! {
        #[test]
        fn set_operations_agree_with_flags(left in prop::collection::vec((0u64..60, 1u64..9), 0..8), right in prop::collection::vec((0u64..60, 1u64..9), 0..8)) {
            let clean = |list: &[(u64, u64)]| union(&list.iter().map(|(at, len)| *at..at + len).collect::<Vec<_>>(), &[]);
            let (left, right) = (clean(&left), clean(&right));
            let both = union(&left, &right);
            let want: Vec<bool> = flags(&left, 80).iter().zip(flags(&right, 80)).map(|(a, b)| *a || b).collect();
            prop_assert_eq!(flags(&both, 80), want);
            prop_assert!(both.windows(2).all(|pair| pair[0].end < pair[1].start), "ascending and not touching");
            prop_assert_eq!(flags(&complement(&both, 50), 80), flags(&both, 80).iter().enumerate().map(|(at, on)| at < 50 && !on).collect::<Vec<_>>());
            prop_assert_eq!(total(&both), flags(&both, 80).iter().filter(|on| **on).count() as u64);
            let wide = flags(&widen(&both, 8), 80);
            prop_assert_eq!(wide, (0..80).map(|at| (at / 8 * 8..at / 8 * 8 + 8).any(|near| both.iter().any(|range| range.contains(&near)))).collect::<Vec<_>>());
        }
    }
}
