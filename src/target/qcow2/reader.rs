//! Reading back an image of this daemon by its tables, for verification: header, L1, L2, with subclusters, compressed clusters and a raw backing file.
//!
//! It shares constants with the writer and nothing else: what it knows of an image it reads from the file. It is no reader for foreign images (no
//! snapshots, encryption, external data files), refuses them, and does not trust an offset that it reads.

use std::{fs::File, io, os::unix::fs::FileExt};

use flate2::{Decompress, FlushDecompress};

use super::{
    Geometry,
    compressed::{COMPRESSED, DEFLATE_WINDOW_BITS, SECTOR, offset_bits},
    header::EXTENDED_L2,
};
use crate::target::extents::{self, Ranges};

/// Bits of an L1 or L2 entry that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Largest L1 table, as QEMU's.
const L1_ENTRIES_MAX: u64 = 4 << 20;
/// Incompatible feature bit 3.
const COMPRESSION_TYPE: u64 = 1 << 3;

/// An open image.
pub(super) struct Reader<'a> {
    file: &'a File,
    backing: Option<(&'a File, u64)>,
    geometry: Geometry,
    virtual_size: u64,
    is_zstd: bool,
    l1: Vec<u64>,
    /// The L2 table read last: its offset and its words.
    table: (u64, Vec<u64>),
    /// The compressed cluster read last: its entry and its content.
    unpacked: (u64, Vec<u8>),
}

/// Where a stretch of the guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Backing,
    Zero,
    /// Offset in the file of the cluster's start.
    Plain(u64),
    /// The entry.
    Compressed(u64),
}

impl<'a> Reader<'a> {
    /// Reads the header and the L1 table. `backing`: the golden and its size.
    pub fn open(file: &'a File, backing: Option<(&'a File, u64)>) -> io::Result<Self> {
        let mut header = [0; 112];
        file.read_exact_at(&mut header, 0)?;
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let long = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        let (cluster_bits, features) = (word(20), long(72));
        let is_known = header.starts_with(b"QFI\xfb")
            && word(4) == 3
            && (12..=21).contains(&cluster_bits)
            && word(32) == 0
            && word(60) == 0
            && features & !(EXTENDED_L2 | COMPRESSION_TYPE) == 0
            && (long(8) != 0) == backing.is_some();
        let l1_entries = u64::from(word(36));
        if !is_known || l1_entries > L1_ENTRIES_MAX {
            return Err(corrupt("the header is not one that was written here".into()));
        }
        let is_zstd = features & COMPRESSION_TYPE != 0 && header[104] == 1;
        let geometry = Geometry { cluster_bits, subclusters: features & EXTENDED_L2 != 0 };
        let l1 = words(file, long(40), l1_entries as usize)?;
        Ok(Reader { file, backing, geometry, virtual_size: long(24), is_zstd, l1, table: (0, Vec::new()), unpacked: (0, Vec::new()) })
    }

    /// Size the guest sees, bytes.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// Fills `buffer` with what a guest would read at `offset`.
    pub fn read(&mut self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            let (place, end) = self.find(offset)?;
            let count = buffer.len().min((end - offset) as usize);
            let (part, rest) = std::mem::take(&mut buffer).split_at_mut(count);
            let within = offset % self.geometry.cluster();
            match place {
                Place::Zero => part.fill(0),
                Place::Plain(host) => self.file.read_exact_at(part, host + within)?,
                Place::Compressed(entry) => part.copy_from_slice(&self.unpack(entry)?[within as usize..within as usize + count]),
                Place::Backing => {
                    let (golden, len) = self.backing.map_or((None, 0), |(golden, len)| (Some(golden), len));
                    let inside = len.saturating_sub(offset).min(count as u64) as usize;
                    if let Some(golden) = golden {
                        golden.read_exact_at(&mut part[..inside], offset)?;
                    }
                    part[inside..].fill(0);
                }
            }
            (buffer, offset) = (rest, offset + count as u64);
        }
        Ok(())
    }

    /// The guest's bytes that the image itself holds.
    pub fn held(&mut self) -> io::Result<Ranges> {
        let (mut held, mut at) = (Ranges::new(), 0);
        let per_l1 = self.geometry.cluster() * self.geometry.l2_entries();
        while at < self.virtual_size {
            if self.l1.get((at / per_l1) as usize).is_none_or(|entry| entry & OFFSET == 0) {
                at = (at / per_l1 + 1) * per_l1;
                continue;
            }
            let (place, end) = self.find(at)?;
            if place != Place::Backing {
                held.push(at..end.min(self.virtual_size));
            }
            at = end;
        }
        Ok(extents::union(&held, &[]))
    }

    /// Where the byte at `offset` is, and up to where the same holds (at most to the end of its cluster).
    fn find(&mut self, offset: u64) -> io::Result<(Place, u64)> {
        let (cluster, per_table) = (self.geometry.cluster(), self.geometry.l2_entries());
        let guest = offset / cluster;
        let end = (guest + 1) * cluster;
        let table = match self.l1.get((guest / per_table) as usize) {
            Some(entry) => entry & OFFSET,
            None => return Err(corrupt(format!("{offset} is beyond the L1 table"))),
        };
        if table == 0 {
            return Ok((Place::Backing, end));
        }
        if self.table.0 != table {
            self.table = (table, words(self.file, table, (cluster / 8) as usize)?);
        }
        let index = (guest % per_table) as usize;
        let words = &self.table.1;
        if !self.geometry.subclusters {
            let entry = words[index];
            let place = match entry {
                _ if entry & COMPRESSED != 0 => Place::Compressed(entry),
                _ if entry & 1 != 0 => Place::Zero,
                _ if entry & OFFSET == 0 => Place::Backing,
                _ => Place::Plain(entry & OFFSET),
            };
            return Ok((place, end));
        }
        let (entry, bitmap) = (words[index * 2], words[index * 2 + 1]);
        if entry & COMPRESSED != 0 {
            return Ok((Place::Compressed(entry), end));
        }
        let unit = self.geometry.unit();
        let place_of = |number: u64| match (bitmap >> number & 1, bitmap >> (32 + number) & 1) {
            (1, _) => Place::Plain(entry & OFFSET),
            (_, 1) => Place::Zero,
            _ => Place::Backing,
        };
        let first = offset % cluster / unit;
        let same = (first..cluster / unit).take_while(|number| place_of(*number) == place_of(first)).count() as u64;
        Ok((place_of(first), guest * cluster + (first + same) * unit))
    }

    fn unpack(&mut self, entry: u64) -> io::Result<&[u8]> {
        if self.unpacked.0 != entry {
            let bits = offset_bits(self.geometry);
            let at = entry & ((1 << bits) - 1);
            let sectors = ((entry & !(3 << 62)) >> bits) + 1;
            let mut packed = vec![0; (sectors * SECTOR - at % SECTOR) as usize];
            self.file.read_exact_at(&mut packed, at)?;
            let mut plain = vec![0; self.geometry.cluster() as usize];
            if self.is_zstd {
                // Behind the frame, up to the end of its sector, lies the next one.
                let len = zstd::zstd_safe::find_frame_compressed_size(&packed).map_err(|_| corrupt(format!("no zstd frame at {at}")))?;
                let count = zstd::bulk::decompress_to_buffer(&packed[..len], &mut plain)?;
                if count != plain.len() {
                    return Err(corrupt(format!("the compressed cluster at {at} has {count} bytes")));
                }
            } else {
                let mut stream = Decompress::new_with_window_bits(false, DEFLATE_WINDOW_BITS);
                // The status says little: what follows the stream's end is the next cluster's.
                stream.decompress(&packed, &mut plain, FlushDecompress::Finish)?;
                if stream.total_out() != plain.len() as u64 {
                    return Err(corrupt(format!("the compressed cluster at {at} has {} bytes", stream.total_out())));
                }
            }
            self.unpacked = (entry, plain);
        }
        Ok(&self.unpacked.1)
    }
}

fn words(file: &File, at: u64, count: usize) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().expect("eight bytes"))).collect())
}

fn corrupt(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
