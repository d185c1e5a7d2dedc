//! Hands out blocks for content in ascending order around what is reserved.
//!
//! Everything below the cursor is in use except what was given back; above it only the reserved ranges are. So the state is a cursor and a few
//! ranges, whatever the size of the filesystem, and bitmaps are made from it once, at the end.

use std::ops::Range;

use super::shape::Shape;

/// Files up to this many blocks skip a gap that is too small when the next one holds them whole.
const KEEP_WHOLE_MAX: u64 = 2048;

/// The allocator.
#[derive(Debug)]
pub struct Blocks {
    reserved: Vec<Range<u64>>,
    next_reserved: usize,
    cursor: u64,
    end: u64,
    given_back: Vec<Range<u64>>,
    free: u64,
}

impl Blocks {
    /// All gaps of `shape` are free.
    pub fn new(shape: &Shape) -> Self {
        let free = shape.gaps().map(|gap| gap.end - gap.start).sum();
        Blocks { reserved: shape.reserved.clone(), next_reserved: 0, cursor: 0, end: shape.geometry.blocks_count, given_back: Vec::new(), free }
    }

    /// Free blocks.
    pub fn free(&self) -> u64 {
        self.free
    }

    /// The next up to `want` (not zero) adjacent blocks; nothing when all are used.
    pub fn take(&mut self, want: u64) -> Option<Range<u64>> {
        let mut gap = self.gap();
        if gap < want && gap > 0 && want <= KEEP_WHOLE_MAX && self.gap_after_next() >= want {
            self.given_back.push(self.cursor..self.cursor + gap);
            self.cursor += gap;
            gap = self.gap();
        }
        let taken = if gap > 0 {
            let start = self.cursor;
            self.cursor += gap.min(want);
            start..self.cursor
        } else {
            let range = self.given_back.pop()?;
            let len = (range.end - range.start).min(want);
            if range.start + len < range.end {
                self.given_back.push(range.start + len..range.end);
            }
            range.start..range.start + len
        };
        self.free -= taken.end - taken.start;
        Some(taken)
    }

    /// Returns blocks that were taken.
    pub fn give_back(&mut self, range: Range<u64>) {
        self.free += range.end - range.start;
        self.given_back.push(range);
    }

    /// Ends the allocation: the used ranges (ascending, may touch) and the number of free blocks.
    pub fn into_used(mut self) -> (Vec<Range<u64>>, u64) {
        self.given_back.sort_unstable_by_key(|range| range.start);
        let mut used = Vec::new();
        let mut at = 0;
        for hole in &self.given_back {
            used.push(at..hole.start);
            at = hole.end;
        }
        used.push(at..self.cursor);
        used.extend(self.reserved.iter().filter(|range| range.end > self.cursor).map(|range| range.start.max(self.cursor)..range.end));
        used.retain(|range| !range.is_empty());
        (used, self.free)
    }

    /// Free blocks from the cursor on, the cursor moved over what is reserved there.
    fn gap(&mut self) -> u64 {
        while let Some(range) = self.reserved.get(self.next_reserved).filter(|range| range.start <= self.cursor) {
            self.cursor = self.cursor.max(range.end);
            self.next_reserved += 1;
        }
        self.reserved.get(self.next_reserved).map_or(self.end, |range| range.start) - self.cursor
    }

    fn gap_after_next(&self) -> u64 {
        let Some(next) = self.reserved.get(self.next_reserved) else { return 0 };
        self.reserved.get(self.next_reserved + 1).map_or(self.end, |range| range.start) - next.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(reserved: &[Range<u64>], end: u64) -> Blocks {
        let free = end - reserved.iter().map(|range| range.end - range.start).sum::<u64>();
        Blocks { reserved: reserved.to_vec(), next_reserved: 0, cursor: 0, end, given_back: Vec::new(), free }
    }

    #[test]
    fn ascends_around_what_is_reserved_and_keeps_small_files_whole() {
        let mut pool = blocks(&[0..10, 20..30, 90..91], 100);
        assert_eq!(pool.take(4), Some(10..14));
        assert_eq!(pool.take(7), Some(30..37), "6 are left before the reserved range, 53 behind it");
        assert_eq!(pool.take(60), Some(37..90));
        assert_eq!(pool.take(60), Some(91..100));
        assert_eq!(pool.take(60), Some(14..20), "what was skipped is used at last");
        assert_eq!((pool.take(1), pool.free()), (None, 0));
        let (used, free) = pool.into_used();
        assert_eq!((used.first(), used.len(), free), (Some(&(0..100)), 1, 0));
    }

    #[test]
    fn blocks_given_back_are_free_again() {
        let mut pool = blocks(&[0..1, 1..2], 10);
        assert_eq!(pool.take(3), Some(2..5));
        assert_eq!(pool.take(2), Some(5..7));
        pool.give_back(2..5);
        assert_eq!(pool.free(), 6);
        assert_eq!(pool.into_used(), (vec![0..2, 5..7], 6));
    }
}
