//! Reference counts of host clusters, and new clusters at the end of the file.
//!
//! Everything changed lies in memory, as whole clusters, until it becomes part of the file patch. A cluster is only ever taken when its count is zero, so that
//! an image which refers to places beyond its end stays right.

use std::collections::{BTreeMap, BTreeSet};

use super::{OFFSET_MASK, Qcow2, corrupt, header::REFTABLE_BYTES_MAX, read_or_zeros};
use crate::{
    error::{Error, Kind, Result, Stage},
    volume::patch::FilePatch,
};

/// Clusters in use beyond the end of the file that are skipped, at most.
const SKIPPED_MAX: u64 = 1 << 20;
/// Only changed pieces of metadata of this many bytes are written.
const PIECE: usize = 512;

/// Metadata of an image that is being changed.
pub(super) struct Metadata<'a> {
    image: &'a Qcow2,
    /// Clusters in memory: as they are in the file, and as they will be.
    clusters: BTreeMap<u64, (Vec<u8>, Vec<u8>)>,
    /// Host offsets of refcount blocks.
    reftable: Vec<u64>,
    reftable_offset: u64,
    reftable_clusters: u64,
    reftable_changed: bool,
    /// The first cluster that may be free.
    next: u64,
    skipped: u64,
}

impl<'a> Metadata<'a> {
    pub(super) fn new(image: &'a Qcow2) -> Result<Self> {
        let header = &image.header;
        let bytes = read_or_zeros(&image.source, header.reftable_offset, (header.reftable_clusters * header.cluster()) as usize)?;
        let reftable: Vec<u64> = bytes.chunks_exact(8).map(|entry| u64::from_be_bytes(entry.try_into().expect("eight bytes")) & !511).collect();
        // New clusters go to the end: nothing that is in use may be beyond it.
        let tables = [header.l1_offset + (header.l1_size * 8).saturating_sub(1), header.reftable_offset];
        if let Some(beyond) = tables.into_iter().chain(reftable.iter().copied()).find(|offset| *offset >= image.source.len) {
            return Err(corrupt(&image.source.name, format!("has a table at {beyond}, beyond its end")));
        }
        Ok(Metadata {
            image,
            clusters: BTreeMap::new(),
            reftable,
            reftable_offset: header.reftable_offset,
            reftable_clusters: header.reftable_clusters,
            reftable_changed: false,
            next: image.source.len.div_ceil(header.cluster()),
            skipped: 0,
        })
    }

    fn cluster(&self) -> u64 {
        self.image.header.cluster()
    }

    /// A metadata cluster to be changed, by its host offset.
    pub(super) fn get_mut(&mut self, offset: u64) -> Result<&mut Vec<u8>> {
        if !self.clusters.contains_key(&offset) {
            let bytes = read_or_zeros(&self.image.source, offset, self.cluster() as usize)?;
            self.clusters.insert(offset, (bytes.clone(), bytes));
        }
        Ok(&mut self.clusters.get_mut(&offset).expect("it was just put there").1)
    }

    /// Host clusters that hold header and tables: data never lies there.
    pub(super) fn occupied(&self) -> BTreeSet<u64> {
        let cluster = self.cluster();
        let span = |offset: u64, len: u64| offset / cluster..(offset + len).div_ceil(cluster);
        let header = &self.image.header;
        let mut all = BTreeSet::from([0]);
        all.extend(span(header.l1_offset, header.l1_size * 8));
        all.extend(span(header.reftable_offset, header.reftable_clusters * cluster));
        all.extend(self.reftable.iter().filter(|offset| **offset != 0).map(|offset| offset / cluster));
        all.extend(self.image.l1.iter().map(|entry| entry & OFFSET_MASK).filter(|offset| *offset != 0).map(|offset| offset / cluster));
        all
    }

    fn per_block(&self) -> u64 {
        (self.cluster() * 8) >> self.image.header.refcount_order
    }

    /// The offset of the refcount block for a host cluster; 0 when there is none.
    fn block_of(&self, host: u64) -> Result<u64> {
        let offset = self.reftable.get((host / self.per_block()) as usize).copied().unwrap_or(0);
        if !offset.is_multiple_of(self.cluster()) {
            return Err(corrupt(&self.image.source.name, format!("has a refcount block at {offset}, which is not a multiple of the cluster size")));
        }
        Ok(offset)
    }

    /// How often a host cluster is referred to.
    pub(super) fn count(&mut self, host: u64) -> Result<u64> {
        let (block, index, order) = (self.block_of(host)?, host % self.per_block(), self.image.header.refcount_order);
        Ok(if block == 0 { 0 } else { get_count(self.get_mut(block)?, index, order) })
    }

    fn set_count(&mut self, host: u64, count: u64) -> Result<()> {
        let (slot, index, order) = (host / self.per_block(), host % self.per_block(), self.image.header.refcount_order);
        if slot >= self.reftable.len() as u64 {
            self.grow_reftable(slot)?;
        }
        let mut block = self.block_of(host)?;
        if block == 0 {
            // The new block is in the table before its own count is set: that count may belong into the block itself.
            let at = self.free_cluster()?;
            block = at * self.cluster();
            self.reftable[slot as usize] = block;
            self.reftable_changed = true;
            self.set_count(at, 1)?;
        }
        put_count(self.get_mut(block)?, index, order, count);
        Ok(())
    }

    /// One reference less to each cluster that the bytes touch.
    pub(super) fn release(&mut self, offset: u64, len: u64) -> Result<()> {
        let cluster = self.cluster();
        for host in offset / cluster..=(offset + len - 1) / cluster {
            match self.count(host)? {
                0 => return Err(corrupt(&self.image.source.name, format!("uses the cluster at {} and counts it as free", host * cluster))),
                count => self.set_count(host, count - 1)?,
            }
        }
        Ok(())
    }

    /// A new cluster with one reference, its host offset.
    pub(super) fn allocate(&mut self) -> Result<u64> {
        let host = self.free_cluster()?;
        self.set_count(host, 1)?;
        Ok(host * self.cluster())
    }

    /// The next cluster that nothing refers to, taken for good.
    fn free_cluster(&mut self) -> Result<u64> {
        loop {
            let host = self.next;
            self.next += 1;
            if (host + 1).saturating_mul(self.cluster()) > i64::MAX as u64 {
                return Err(Error::new(Kind::NoSpace, Stage::Target, self.image.source.name.as_str(), "the file would be longer than a file can be"));
            }
            if self.count(host)? == 0 {
                return Ok(host);
            }
            self.skipped += 1;
            if self.skipped > SKIPPED_MAX {
                return Err(corrupt(&self.image.source.name, "counts references to clusters far beyond its end"));
            }
        }
    }

    /// Moves the refcount table to a new place where it has an entry for `slot`.
    fn grow_reftable(&mut self, slot: u64) -> Result<()> {
        let cluster = self.cluster();
        // Room for the table's own clusters and blocks, and for the next time.
        let entries = (slot + 2).max(self.reftable.len() as u64 * 2) + (slot / (cluster / 8) + 2);
        let clusters = (entries * 8).div_ceil(cluster);
        if clusters * cluster > REFTABLE_BYTES_MAX {
            let text = format!("a refcount table of {} bytes would be needed, the format's limit is {REFTABLE_BYTES_MAX}", clusters * cluster);
            return Err(Error::new(Kind::NoSpace, Stage::Target, self.image.source.name.as_str(), text));
        }
        let (old, old_len) = (self.reftable_offset, self.reftable_clusters * cluster);
        let mut first = self.free_cluster()?;
        let mut last = first;
        while last + 1 - first < clusters {
            let taken = self.free_cluster()?;
            if taken != last + 1 {
                first = taken;
            }
            last = taken;
        }
        self.reftable.resize((clusters * cluster / 8) as usize, 0);
        (self.reftable_offset, self.reftable_clusters, self.reftable_changed) = (first * cluster, clusters, true);
        for host in first..=last {
            self.set_count(host, 1)?;
        }
        self.release(old, old_len)
    }

    /// Adds what changed to `patch`.
    pub(super) fn finish(mut self, patch: &mut FilePatch) -> Result<()> {
        let cluster = self.cluster();
        if self.reftable_changed {
            let bytes: Vec<u8> = self.reftable.iter().flat_map(|offset| offset.to_be_bytes()).collect();
            let start = self.reftable_offset;
            for (number, part) in bytes.chunks(cluster as usize).enumerate() {
                self.get_mut(start + number as u64 * cluster)?[..part.len()].copy_from_slice(part);
            }
        }
        let (offset, clusters) = (self.reftable_offset, self.reftable_clusters as u32);
        if offset != self.image.header.reftable_offset || self.image.header.autoclear != 0 {
            let is_3 = self.image.header.version >= 3;
            let header = self.get_mut(0)?;
            header[48..56].copy_from_slice(&offset.to_be_bytes());
            header[56..60].copy_from_slice(&clusters.to_be_bytes());
            if is_3 {
                // Whoever changes an image clears the features that it does not keep right.
                header[88..96].fill(0);
            }
        }
        for (offset, (before, after)) in &self.clusters {
            let mut at = 0;
            for (old, new) in before.chunks(PIECE).zip(after.chunks(PIECE)) {
                if old != new {
                    patch.put(offset + at, new.to_vec());
                }
                at += old.len() as u64;
            }
        }
        if self.next > self.image.source.len.div_ceil(cluster) {
            patch.set_len_min(self.next * cluster);
        }
        Ok(())
    }
}

/// Count `index` of a refcount block whose counts have `2^order` bits.
fn get_count(block: &[u8], index: u64, order: u32) -> u64 {
    let index = index as usize;
    if order < 3 {
        let bits = 1 << order;
        let at = index * bits;
        return u64::from(block[at / 8] >> (at % 8)) & ((1 << bits) - 1);
    }
    let bytes = 1 << (order - 3);
    block[index * bytes..(index + 1) * bytes].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn put_count(block: &mut [u8], index: u64, order: u32, count: u64) {
    let index = index as usize;
    if order < 3 {
        let bits = 1 << order;
        let (at, mask) = (index * bits, ((1u16 << bits) - 1) as u8);
        let byte = &mut block[at / 8];
        *byte = *byte & !(mask << (at % 8)) | (count as u8 & mask) << (at % 8);
        return;
    }
    let bytes = 1 << (order - 3);
    block[index * bytes..(index + 1) * bytes].copy_from_slice(&count.to_be_bytes()[8 - bytes..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_are_kept_apart() {
        for order in 0..=6 {
            let mut block = vec![0; 64];
            let bits = 1u32 << order;
            let max = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
            let entries = (64 * 8) >> order;
            for index in 0..entries {
                put_count(&mut block, index, order, (index * 7 + 1) & max);
            }
            for index in 0..entries {
                assert_eq!(get_count(&block, index, order), (index * 7 + 1) & max, "order {order}, count {index}");
            }
        }
    }
}
