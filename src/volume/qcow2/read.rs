//! Reading: guest offset → piece → bytes.

use std::{io, sync::Arc};

use super::{COMPRESSED, Layer, OFFSET_MASK, Qcow2, SUBCLUSTERS, TABLES_BYTES_MAX, ZERO, corrupt, inflate, read_or_zeros};
use crate::{
    error::{Error, Result, Stage},
    fs::ReadAt,
};

/// An L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Entry {
    /// The first 64 bits.
    pub(super) word: u64,
    /// With extended entries: subclusters that are allocated (low half) and that read as zeros (high half).
    pub(super) bits: u64,
}

/// Where bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece {
    /// In the file behind the image, if there is one.
    Hole,
    /// Nowhere: they are zeros.
    Zeros,
    /// In this file, at this byte.
    Data(u64),
    /// In a compressed cluster with this L2 entry.
    Compressed(u64),
}

/// Where a compressed cluster lies: byte and length, as QEMU's qcow2_parse_compressed_l2_entry.
pub(super) fn compressed_extent(word: u64, cluster_bits: u32) -> (u64, u64) {
    let shift = 62 - (cluster_bits - 8);
    let offset = word & ((1 << shift) - 1);
    let sectors = ((word >> shift) & ((1 << (cluster_bits - 8)) - 1)) + 1;
    (offset, sectors * 512 - (offset & 511))
}

impl Entry {
    /// Reads entry `index` of a table.
    pub(super) fn get(table: &[u8], index: usize, extended: bool) -> Entry {
        let long = |at: usize| table.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes);
        if extended { Entry { word: long(index * 16), bits: long(index * 16 + 8) } } else { Entry { word: long(index * 8), bits: 0 } }
    }

    /// Writes entry `index` of a table.
    pub(super) fn put(self, table: &mut [u8], index: usize, extended: bool) {
        if extended {
            table[index * 16..index * 16 + 8].copy_from_slice(&self.word.to_be_bytes());
            table[index * 16 + 8..index * 16 + 16].copy_from_slice(&self.bits.to_be_bytes());
        } else {
            table[index * 8..index * 8 + 8].copy_from_slice(&self.word.to_be_bytes());
        }
    }
}

impl Qcow2 {
    /// What is at byte `within` of a guest cluster with this entry, and for how many bytes.
    pub(super) fn piece(&self, entry: Entry, within: u64) -> Result<(Piece, u64)> {
        let cluster = self.header.cluster();
        if entry.word & COMPRESSED != 0 {
            return Ok((Piece::Compressed(entry.word), cluster - within));
        }
        let host = self.host_of(entry)?;
        if self.header.extended_l2 {
            let size = cluster / SUBCLUSTERS;
            let index = within / size;
            let left = size - within % size;
            let (allocated, zero) = (entry.bits >> index & 1 != 0, entry.bits >> (index + 32) & 1 != 0);
            return match (allocated, zero) {
                (true, true) => Err(corrupt(&self.source.name, "has a subcluster that is both allocated and zero")),
                (true, false) if host == 0 => Err(corrupt(&self.source.name, "has an allocated subcluster without a cluster")),
                (true, false) => Ok((Piece::Data(host + within), left)),
                (false, true) => Ok((Piece::Zeros, left)),
                (false, false) => Ok((Piece::Hole, left)),
            };
        }
        let left = cluster - within;
        if self.header.version >= 3 && entry.word & ZERO != 0 {
            return Ok((Piece::Zeros, left));
        }
        Ok((if host == 0 { Piece::Hole } else { Piece::Data(host + within) }, left))
    }

    /// The host offset of an entry that is not compressed; 0 for none.
    pub(super) fn host_of(&self, entry: Entry) -> Result<u64> {
        let host = entry.word & OFFSET_MASK;
        if !host.is_multiple_of(self.header.cluster()) {
            return Err(corrupt(&self.source.name, format!("has a cluster at {host}, which is not a multiple of the cluster size")));
        }
        Ok(host)
    }

    /// The L2 entry of a guest cluster.
    pub(super) fn entry(&self, guest: u64) -> Result<Entry> {
        let per_table = self.header.l2_entries();
        let table = self.l1.get((guest / per_table) as usize).copied().unwrap_or(0) & OFFSET_MASK;
        if table == 0 {
            return Ok(Entry::default());
        }
        let table = self.table(table)?;
        Ok(Entry::get(&table, (guest % per_table) as usize, self.header.extended_l2))
    }

    /// An L2 table.
    pub(super) fn table(&self, offset: u64) -> Result<Arc<[u8]>> {
        let cluster = self.header.cluster();
        if !offset.is_multiple_of(cluster) {
            return Err(corrupt(&self.source.name, format!("has an L2 table at {offset}, which is not a multiple of the cluster size")));
        }
        if let Some(table) = self.cached(|cache| cache.tables.get(&offset).cloned())? {
            return Ok(table);
        }
        let table: Arc<[u8]> = read_or_zeros(&self.source, offset, cluster as usize)?.into();
        self.cached(|cache| {
            if cache.tables.len() as u64 >= (TABLES_BYTES_MAX / cluster).max(2) {
                cache.tables.clear();
            }
            cache.tables.insert(offset, Arc::clone(&table));
        })?;
        Ok(table)
    }

    fn cached<T>(&self, with: impl FnOnce(&mut super::Cache) -> T) -> Result<T> {
        let mut cache = self.cache.lock().map_err(|_| Error::internal(Stage::Target, self.source.name.as_str(), "a reader of the image panicked"))?;
        Ok(with(&mut cache))
    }

    /// A compressed cluster, decompressed.
    pub(super) fn inflated(&self, word: u64) -> Result<Arc<[u8]>> {
        if let Some(known) = self.cached(|cache| cache.inflated.as_ref().filter(|(of, _)| *of == word).map(|(_, bytes)| Arc::clone(bytes)))? {
            return Ok(known);
        }
        let (offset, len) = compressed_extent(word, self.header.cluster_bits);
        if offset >= self.source.len {
            return Err(corrupt(&self.source.name, format!("has a compressed cluster at {offset}, beyond its end")));
        }
        let compressed = read_or_zeros(&self.source, offset, len as usize)?;
        let bytes: Arc<[u8]> = inflate::inflate(self.header.compression, &compressed, self.header.cluster() as usize)
            .map_err(|error| corrupt(&self.source.name, format!("has a compressed cluster at {offset} that can't be read")).with_source(error))?
            .into();
        self.cached(|cache| cache.inflated = Some((word, Arc::clone(&bytes))))?;
        Ok(bytes)
    }

    /// Fills `into` with the guest's bytes at `offset`; beyond the virtual size they are zeros.
    pub(super) fn read(&self, into: &mut [u8], offset: u64) -> Result<()> {
        let cluster = self.header.cluster();
        let inside = self.header.size.saturating_sub(offset).min(into.len() as u64) as usize;
        let (mut rest, beyond) = into.split_at_mut(inside);
        beyond.fill(0);
        let mut at = offset;
        while !rest.is_empty() {
            let within = at % cluster;
            let (piece, left) = self.piece(self.entry(at / cluster)?, within)?;
            let len = (rest.len() as u64).min(left) as usize;
            let (now, later) = rest.split_at_mut(len);
            match piece {
                Piece::Hole => match &self.backing {
                    Some(layer) => layer.read(now, at)?,
                    None => now.fill(0),
                },
                Piece::Zeros => now.fill(0),
                Piece::Data(host) => now.copy_from_slice(&read_or_zeros(&self.source, host, len)?),
                Piece::Compressed(word) => {
                    let start = within as usize;
                    now.copy_from_slice(&self.inflated(word)?[start..start + len]);
                }
            }
            at += len as u64;
            rest = later;
        }
        Ok(())
    }
}

impl Layer {
    /// As [`Qcow2::read`].
    fn read(&self, into: &mut [u8], offset: u64) -> Result<()> {
        match self {
            Layer::Raw(source) => {
                into.copy_from_slice(&read_or_zeros(source, offset, into.len())?);
                Ok(())
            }
            Layer::Qcow2(image) => image.read(into, offset),
        }
    }
}

impl ReadAt for Qcow2 {
    fn read_all_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let inside = offset.checked_add(into.len() as u64).is_some_and(|end| end <= self.header.size);
        if !inside {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read(into, offset).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}
