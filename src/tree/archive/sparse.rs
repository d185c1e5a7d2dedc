//! Sparse members: from the maps of the four formats to ascending, disjoint spans that agree with the stored size.
//!
//! The formats are in the GNU tar manual, "Storing Sparse Files": old GNU (type `S`), and PAX 0.0, 0.1 and 1.0. In 1.0 the map is at the start
//! of the data, as decimal numbers on lines of their own, padded to a block.

use super::{
    Limits, Refusal,
    header::sparse_pairs,
    pax::{SparseKeys, decimal},
    stream::{BLOCK, Stream},
};
use crate::{error::Result, tree::Span};

/// What a sparse member consists of.
pub(super) struct Sparse {
    /// Size with the holes.
    pub(super) size: u64,
    /// Where data is.
    pub(super) spans: Vec<Span>,
}

/// Reads the extension blocks of an old GNU member; they stand between its header and its data and do not count in its size.
pub(super) fn gnu_extensions(stream: &mut Stream<'_>, pairs: &mut Vec<(u64, u64)>, limits: &Limits, name: &str) -> Result<()> {
    loop {
        let at = stream.offset();
        let block = stream.block()?.ok_or_else(|| stream.truncated("inside a sparse map"))?;
        // struct sparse_header: 21 pairs, then isextended.
        let more = sparse_pairs(&block[..504]).map_err(|refusal| refusal.at(at, name))?;
        pairs.extend(more);
        limits.check_sparse_pairs(pairs.len() as u64).map_err(|refusal| refusal.at(at, name))?;
        if block[504] == 0 {
            return Ok(());
        }
    }
}

/// Reads the map of format 1.0 from the member's data: the pairs and how many of the member's `stored` bytes it took.
pub(super) fn map_in_data(stream: &mut Stream<'_>, stored: u64, limits: &Limits, name: &str) -> Result<(Vec<(u64, u64)>, u64)> {
    let mut numbers = MapNumbers { line: Vec::new(), taken: 0, block: [0; BLOCK], position: BLOCK };
    let at = stream.offset();
    let count = numbers.next(stream, stored, name)?;
    limits.check_sparse_pairs(count).map_err(|refusal| refusal.at(at, name))?;
    let mut pairs = Vec::new();
    for _ in 0..count {
        pairs.push((numbers.next(stream, stored, name)?, numbers.next(stream, stored, name)?));
    }
    Ok((pairs, numbers.taken))
}

struct MapNumbers {
    line: Vec<u8>,
    taken: u64,
    block: [u8; BLOCK],
    position: usize,
}

impl MapNumbers {
    fn next(&mut self, stream: &mut Stream<'_>, stored: u64, name: &str) -> Result<u64> {
        self.line.clear();
        loop {
            if self.position == BLOCK {
                if self.taken >= stored {
                    return Err(
                        Refusal::corrupt(format!("the sparse map does not end within the {stored} bytes of the member")).at(stream.offset(), name)
                    );
                }
                self.block = stream.block()?.ok_or_else(|| stream.truncated("inside a sparse map"))?;
                self.taken += BLOCK as u64;
                self.position = 0;
            }
            let byte = self.block[self.position];
            self.position += 1;
            if byte == b'\n' {
                return decimal(b"the sparse map", &self.line).map_err(|refusal| refusal.at(stream.offset(), name));
            }
            // A number below 2^63 has 19 digits.
            if self.line.len() == 20 {
                return Err(Refusal::corrupt("a number of the sparse map has more than 20 digits").at(stream.offset(), name));
            }
            self.line.push(byte);
        }
    }
}

/// Which of the PAX formats the keys speak of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PaxSparse {
    /// 0.0 and 0.1: the map is among the keys.
    InKeys,
    /// 1.0: the map is at the start of the data.
    InData,
}

/// Tells the format, or refuses an unknown one.
pub(super) fn pax_format(keys: &SparseKeys) -> Result<PaxSparse, Refusal> {
    match (keys.major, keys.minor, &keys.pairs) {
        (Some(1), Some(0), None) => Ok(PaxSparse::InData),
        (Some(1), Some(0), Some(_)) => Err(Refusal::corrupt("a sparse map both in the extended header and in the data").reason("ARCHIVE_AMBIGUOUS")),
        (None, None, _) | (Some(0), Some(0 | 1), _) => Ok(PaxSparse::InKeys),
        (major, minor, _) => Err(Refusal::unsupported(format!(
            "sparse format {}.{}",
            major.map_or("?".to_owned(), |number| number.to_string()),
            minor.map_or("?".to_owned(), |number| number.to_string())
        ))),
    }
}

/// Checks the pairs of a map: ascending, disjoint, within `size`, and together as long as the `stored` data. Empty pairs (GNU tar ends a map with
/// one at the file's size) are dropped, neighbours are joined.
pub(super) fn checked(pairs: &[(u64, u64)], size: u64, stored: u64) -> Result<Sparse, Refusal> {
    let mut spans: Vec<Span> = Vec::with_capacity(pairs.len());
    let mut end = 0;
    let mut total = 0u64;
    for (offset, len) in pairs.iter().copied() {
        let next = offset.checked_add(len).filter(|next| *next <= size);
        let next = next.ok_or_else(|| Refusal::corrupt(format!("the sparse map has {len} bytes at {offset}, beyond the size {size}")))?;
        if offset < end {
            return Err(Refusal::corrupt(format!("the sparse map has {len} bytes at {offset}, before the end {end} of the data in front of it")));
        }
        // Disjoint spans within `size` cannot sum up to more than it.
        total += len;
        match spans.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.offset + last.len == offset => last.len += len,
            _ => spans.push(Span { offset, len }),
        }
        end = next;
    }
    if total != stored {
        return Err(Refusal::corrupt(format!("the sparse map has {total} bytes of data, the member {stored}")).reason("ARCHIVE_AMBIGUOUS"));
    }
    Ok(Sparse { size, spans })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(offset: u64, len: u64) -> Span {
        Span { offset, len }
    }

    #[test]
    fn maps_are_joined_and_checked() {
        let spans = |pairs: &[(u64, u64)], size, stored| checked(pairs, size, stored).map(|sparse| sparse.spans).ok();
        assert_eq!(spans(&[(0, 512), (512, 512), (4096, 100), (8192, 0)], 8192, 1124), Some(vec![span(0, 1024), span(4096, 100)]));
        assert_eq!(spans(&[], 1 << 40, 0), Some(vec![]));
        assert_eq!(spans(&[(0, 0)], 0, 0), Some(vec![]));
        for (pairs, size, stored) in [
            (&[(0u64, 10u64), (5, 10)][..], 100, 20),
            (&[(10, 5), (0, 5)], 100, 10),
            (&[(96, 5)], 100, 5),
            (&[(u64::MAX, 2)], u64::MAX, 2),
            (&[(0, 10)], 100, 11),
            (&[(0, 10)], 100, 9),
        ] {
            assert_eq!(spans(pairs, size, stored), None, "{pairs:?} {size} {stored}");
        }
    }
}
