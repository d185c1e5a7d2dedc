//! File data: from the archive straight to its final place.

use std::io::{self, Read};

use super::{Blocks, Writer, no_space, shape::Run};
use crate::{
    error::{Error, Kind, Result, Stage},
    ext4::{csum, layout::BLOCK_SIZE},
    names::GuestPath,
    tree::{Span, error_of_read},
    units::Bytes,
};

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Block numbers in a file have 32 bits and the last is reserved (EXT_MAX_BLOCKS).
const FILE_BLOCKS_MAX: u64 = u32::MAX as u64;

/// Free blocks and the way to write them.
pub struct Store {
    /// Free blocks.
    pub blocks: Blocks,
    /// The region.
    pub writer: Writer,
}

impl Store {
    /// Stores bytes that are in memory: directories, long symlinks.
    pub fn bytes(&mut self, what: &str, bytes: &[u8]) -> Result<Vec<Run>> {
        let blocks = (bytes.len() as u64).div_ceil(BLOCK);
        let mut runs = Vec::new();
        self.take(what, 0, blocks, &mut runs)?;
        for run in &runs {
            let from = run.logical as usize * BLOCK as usize;
            let to = (from + run.len as usize * BLOCK as usize).min(bytes.len());
            self.writer.seek(run.start * BLOCK)?;
            self.writer.put(&bytes[from..to])?;
            self.writer.zeros(u64::from(run.len) * BLOCK - (to - from) as u64)?;
        }
        Ok(runs)
    }

    /// Stores a block of extended attributes and returns its number; with `seed` it gets its checksum, which depends on that.
    pub fn xattr_block(&mut self, seed: Option<u32>, mut block: Vec<u8>) -> Result<u64> {
        let number = self.blocks.take(1).ok_or_else(|| no_space("a block of extended attributes", 1, 0))?.start;
        if let Some(seed) = seed {
            csum::set_xattr_block(seed, number, &mut block);
        }
        self.writer.put_at(number * BLOCK, &block)?;
        Ok(number)
    }

    /// Stores the data of a file; blocks that no span touches stay holes. Reads `data` to its end.
    pub fn file(&mut self, path: &GuestPath, size: u64, spans: &[Span], data: &mut dyn Read) -> Result<Vec<Run>> {
        check_spans(path, size, spans)?;
        let ranges = block_ranges(spans);
        let needed = ranges.iter().map(|range| range.end - range.start).sum();
        if needed > self.blocks.free() {
            return Err(no_space(&path.to_string(), needed, self.blocks.free()));
        }
        let mut runs = Vec::new();
        for range in ranges {
            self.take(&path.to_string(), range.start, range.end - range.start, &mut runs)?;
        }
        let mut source = Source { path, spans, data };
        for run in &runs {
            self.writer.seek(run.start * BLOCK)?;
            source.copy(u64::from(run.logical) * BLOCK, u64::from(run.len) * BLOCK, &mut self.writer)?;
        }
        source.expect_end()?;
        Ok(runs)
    }

    /// Takes `blocks` blocks for the file's blocks from `logical` on.
    fn take(&mut self, what: &str, mut logical: u64, mut blocks: u64, runs: &mut Vec<Run>) -> Result<()> {
        while blocks > 0 {
            let taken = self.blocks.take(blocks).ok_or_else(|| no_space(what, blocks, 0))?;
            let len = taken.end - taken.start;
            runs.push(Run { logical: logical as u32, len: len as u32, start: taken.start });
            (logical, blocks) = (logical + len, blocks - len);
        }
        Ok(())
    }
}

fn check_spans(path: &GuestPath, size: u64, spans: &[Span]) -> Result<()> {
    let bad = |kind, message: String| Err(Error::new(kind, Stage::Golden, path.to_string(), message));
    if size.div_ceil(BLOCK) > FILE_BLOCKS_MAX {
        return bad(Kind::Unsupported, format!("is {} long, the limit of ext4 is {}", Bytes(size), Bytes(FILE_BLOCKS_MAX * BLOCK)));
    }
    let mut end = 0;
    for span in spans {
        match span.offset.checked_add(span.len) {
            Some(next) if span.len > 0 && span.offset >= end && next <= size => end = next,
            _ => return bad(Kind::Corrupt, format!("has data of {} bytes at {}, the file being {size} bytes long", span.len, span.offset)),
        }
    }
    Ok(())
}

/// The file's blocks that spans touch, as ranges that do not touch each other.
fn block_ranges(spans: &[Span]) -> Vec<std::ops::Range<u64>> {
    let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
    for span in spans {
        let (start, end) = (span.offset / BLOCK, (span.offset + span.len).div_ceil(BLOCK));
        match ranges.last_mut() {
            Some(last) if start <= last.end => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

/// The rest of a file's data.
struct Source<'a> {
    path: &'a GuestPath,
    /// Those not used up yet.
    spans: &'a [Span],
    data: &'a mut dyn Read,
}

impl Source<'_> {
    /// Writes the bytes `from..from + len` of the file: data where there is a span, else zeros.
    fn copy(&mut self, mut from: u64, len: u64, writer: &mut Writer) -> Result<()> {
        let end = from + len;
        while from < end {
            let Some(span) = self.spans.first() else {
                return writer.zeros(end - from);
            };
            if from < span.offset {
                let gap = span.offset.min(end) - from;
                writer.zeros(gap)?;
                from += gap;
                continue;
            }
            let span_end = span.offset + span.len;
            let part = span_end.min(end) - from;
            self.read(part, writer)?;
            from += part;
            if from == span_end {
                self.spans = &self.spans[1..];
            }
        }
        Ok(())
    }

    fn read(&mut self, mut left: u64, writer: &mut Writer) -> Result<()> {
        while left > 0 {
            let room = writer.room()?;
            let want = left.min(room.len() as u64) as usize;
            let got = match self.data.read(&mut room[..want]) {
                Ok(0) => return Err(self.corrupt(format!("its data ends {left} bytes early"))),
                Ok(got) => got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.failed(e)),
            };
            writer.advance(got);
            left -= got as u64;
        }
        Ok(())
    }

    /// The reader's end must be the file's.
    fn expect_end(&mut self) -> Result<()> {
        loop {
            match self.data.read(&mut [0]) {
                Ok(0) => return Ok(()),
                Ok(_) => return Err(self.corrupt("has more data than its size".into())),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.failed(e)),
            }
        }
    }

    fn corrupt(&self, message: String) -> Error {
        Error::new(Kind::Corrupt, Stage::Golden, self.path.to_string(), message)
    }

    fn failed(&self, error: io::Error) -> Error {
        error_of_read(error, Stage::Golden, &self.path.to_string(), "read its data")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(offset: u64, len: u64) -> Span {
        Span { offset, len }
    }

    #[test]
    fn spans_become_block_ranges_that_do_not_touch() {
        assert_eq!(block_ranges(&[span(0, 1), span(10, 20), span(4096, 1), span(12288, 5000)]), [0..2, 3..5]);
        assert_eq!(block_ranges(&[]), []);
    }

    #[test]
    fn spans_outside_the_file_or_out_of_order_are_refused() {
        let path = GuestPath::root();
        for (size, spans) in [(10, vec![span(0, 11)]), (10, vec![span(5, 2), span(6, 1)]), (10, vec![span(0, 0)]), (10, vec![span(u64::MAX, 2)])] {
            assert_eq!(check_spans(&path, size, &spans).expect_err("bad").kind(), Kind::Corrupt, "{spans:?}");
        }
        assert_eq!(check_spans(&path, 17 << 40, &[]).expect_err("too long").kind(), Kind::Unsupported);
    }
}
