//! Changing an image in place: a block patch of the guest's disk becomes a patch of the file. Pure: nothing is written here.
//!
//! A cluster that this image alone has is overwritten where it is. What lies behind the image, is zeros or is compressed gets a new cluster at the end of the
//! file, filled up from what the guest saw; with extended L2 entries only the subclusters that change are taken. The backing files are only read. Order does
//! not matter: the patch is applied under a redo log, as a whole.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    COMPRESSED, COPIED, OFFSET_MASK, Qcow2, SUBCLUSTERS, ZERO, corrupt,
    read::{Entry, compressed_extent},
    refcounts::Metadata,
    unsupported,
};
use crate::{
    error::{Error, Result, Stage},
    fs::patch::BlockPatch,
    units::PATCH_BLOCK,
    volume::patch::FilePatch,
};

/// Zeros in new clusters are left out in pieces of this many bytes.
const PIECE: u64 = 4096;

/// What changes in one guest cluster: byte in it, and the new bytes.
type Changes<'p> = Vec<(u64, &'p [u8])>;

impl Qcow2 {
    /// The bytes of the file that change for `patch`, whose size is the image's. `Kind::Corrupt` when the image is not consistent where it would be
    /// written, `Kind::Unsupported` when it must not be changed.
    pub fn plan(&self, patch: &BlockPatch) -> Result<FilePatch> {
        if self.header.has_bitmaps {
            return Err(unsupported(&self.source.name, "persistent dirty bitmaps: the next incremental backup would miss what is changed")
                .with_hint("remove them (qemu-img bitmap --remove) and make a full backup next"));
        }
        let clusters = self.by_cluster(patch)?;
        if clusters.is_empty() {
            return Ok(FilePatch::default());
        }
        let metadata = Metadata::new(self)?;
        let mut planner = Planner { occupied: metadata.occupied(), metadata, l1: self.l1.clone(), image: self, patch: FilePatch::default() };
        for (guest, changes) in clusters {
            planner.change(guest, &changes)?;
        }
        let Planner { metadata, mut patch, .. } = planner;
        metadata.finish(&mut patch)?;
        Ok(patch)
    }

    /// The changes by guest cluster; what is beyond the virtual size is left out.
    fn by_cluster<'p>(&self, patch: &'p BlockPatch) -> Result<BTreeMap<u64, Changes<'p>>> {
        let (cluster, size) = (self.header.cluster(), self.header.size);
        let mut clusters: BTreeMap<u64, Changes<'p>> = BTreeMap::new();
        for (number, block) in patch.iter() {
            let start = number * PATCH_BLOCK;
            if start >= size {
                let text = format!("the patch changes byte {start}, the disk has {size}");
                return Err(Error::internal(Stage::Target, self.source.name.as_str(), text));
            }
            let mut rest = &block[..(size - start).min(PATCH_BLOCK) as usize];
            let mut at = start;
            while !rest.is_empty() {
                let within = at % cluster;
                let (now, later) = rest.split_at(rest.len().min((cluster - within) as usize));
                clusters.entry(at / cluster).or_default().push((within, now));
                at += now.len() as u64;
                rest = later;
            }
        }
        Ok(clusters)
    }
}

struct Planner<'a> {
    image: &'a Qcow2,
    metadata: Metadata<'a>,
    l1: Vec<u64>,
    occupied: BTreeSet<u64>,
    patch: FilePatch,
}

impl Planner<'_> {
    fn change(&mut self, guest: u64, changes: &Changes<'_>) -> Result<()> {
        let header = &self.image.header;
        let (per_table, extended) = (header.l2_entries(), header.extended_l2);
        let table = self.table((guest / per_table) as usize)?;
        let index = (guest % per_table) as usize;
        let entry = Entry::get(self.metadata.get_mut(table)?, index, extended);
        let new = if entry.word & COMPRESSED != 0 {
            self.replace_compressed(guest, entry, changes)?
        } else if extended {
            self.change_subclusters(guest, entry, changes)?
        } else {
            self.change_cluster(guest, entry, changes)?
        };
        if new != entry {
            new.put(self.metadata.get_mut(table)?, index, extended);
        }
        Ok(())
    }

    /// The host offset of an L2 table that may be changed; a new one when there is none.
    fn table(&mut self, index: usize) -> Result<u64> {
        let entry = *self.l1.get(index).ok_or_else(|| corrupt(&self.image.source.name, format!("has no L1 entry {index}")))?;
        let offset = entry & OFFSET_MASK;
        if offset != 0 {
            let cluster = self.image.header.cluster();
            let is_inside = offset < self.image.source.len || !self.is_original_table(index);
            if !offset.is_multiple_of(cluster) || !is_inside {
                return Err(corrupt(&self.image.source.name, format!("has an L2 table at {offset}, where none can be")));
            }
            if entry & COPIED == 0 || (self.is_original_table(index) && self.metadata.count(offset / cluster)? != 1) {
                return Err(self.shared("L2 table", offset));
            }
            return Ok(offset);
        }
        let offset = self.metadata.allocate()?;
        self.l1[index] = offset | COPIED;
        let (cluster, at) = (self.image.header.cluster(), index as u64 * 8);
        let l1 = self.image.header.l1_offset + at / cluster * cluster;
        let within = (at % cluster) as usize;
        self.metadata.get_mut(l1)?[within..within + 8].copy_from_slice(&(offset | COPIED).to_be_bytes());
        Ok(offset)
    }

    fn is_original_table(&self, index: usize) -> bool {
        self.image.l1.get(index) == self.l1.get(index)
    }

    fn shared(&self, what: &str, offset: u64) -> Error {
        corrupt(&self.image.source.name, format!("has a {what} at {offset} that is referred to more than once, without snapshots"))
            .with_hint("qemu-img check -r all repairs reference counts")
    }

    /// Fails unless the cluster at `host` holds data of one guest cluster only.
    fn check_own(&mut self, entry: Entry, host: u64) -> Result<()> {
        let number = host / self.image.header.cluster();
        if self.occupied.contains(&number) {
            return Err(corrupt(&self.image.source.name, format!("has a data cluster at {host}, where its tables are")));
        }
        if entry.word & COPIED == 0 || self.metadata.count(number)? != 1 {
            return Err(self.shared("data cluster", host));
        }
        Ok(())
    }

    /// A cluster with a standard entry.
    fn change_cluster(&mut self, guest: u64, entry: Entry, changes: &Changes<'_>) -> Result<Entry> {
        let host = self.image.host_of(entry)?;
        let reads_zero = self.image.header.version >= 3 && entry.word & ZERO != 0;
        if host != 0 {
            self.check_own(entry, host)?;
            if !reads_zero {
                for (within, bytes) in changes {
                    self.patch.put(host + within, bytes.to_vec());
                }
                return Ok(entry);
            }
        }
        let bytes = self.seen_with(guest, changes)?;
        if host != 0 {
            // A cluster that is kept for later, with anything in it.
            self.patch.put(host, bytes);
            return Ok(Entry { word: host | COPIED, bits: 0 });
        }
        let host = self.metadata.allocate()?;
        self.put_new(host, &bytes);
        Ok(Entry { word: host | COPIED, bits: 0 })
    }

    /// A cluster whose subclusters are allocated one by one.
    fn change_subclusters(&mut self, guest: u64, entry: Entry, changes: &Changes<'_>) -> Result<Entry> {
        let cluster = self.image.header.cluster();
        let size = cluster / SUBCLUSTERS;
        let mut host = self.image.host_of(entry)?;
        let mut bits = entry.bits;
        if host != 0 {
            self.check_own(entry, host)?;
        } else {
            if entry.bits as u32 != 0 {
                return Err(corrupt(&self.image.source.name, "has an allocated subcluster without a cluster"));
            }
            host = self.metadata.allocate()?;
        }
        // What each touched subcluster holds afterwards: the changed bytes alone where it is allocated, else all of it.
        let mut whole: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        for (within, bytes) in changes {
            let mut at = *within;
            let mut rest = *bytes;
            while !rest.is_empty() {
                let index = at / size;
                let (now, later) = rest.split_at(rest.len().min((size - at % size) as usize));
                if entry.bits >> index & 1 != 0 {
                    // Fails for one that is marked as zero too.
                    self.image.piece(entry, at)?;
                    self.patch.put(host + at, now.to_vec());
                } else {
                    let content = match whole.entry(index) {
                        std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
                        std::collections::btree_map::Entry::Vacant(vacant) => {
                            let mut content = vec![0; size as usize];
                            if now.len() as u64 != size {
                                self.image.read(&mut content, guest * cluster + index * size)?;
                            }
                            vacant.insert(content)
                        }
                    };
                    let start = (at % size) as usize;
                    content[start..start + now.len()].copy_from_slice(now);
                    bits = (bits | 1 << index) & !(1 << (index + 32));
                }
                at += now.len() as u64;
                rest = later;
            }
        }
        for (index, content) in whole {
            self.patch.put(host + index * size, content);
        }
        Ok(Entry { word: host | COPIED, bits })
    }

    /// A compressed cluster: a new one takes its place.
    fn replace_compressed(&mut self, guest: u64, entry: Entry, changes: &Changes<'_>) -> Result<Entry> {
        let bytes = self.seen_with(guest, changes)?;
        let (offset, len) = compressed_extent(entry.word, self.image.header.cluster_bits);
        self.metadata.release(offset, len)?;
        let host = self.metadata.allocate()?;
        self.put_new(host, &bytes);
        let bits = if self.image.header.extended_l2 { u64::from(u32::MAX) } else { 0 };
        Ok(Entry { word: host | COPIED, bits })
    }

    /// What the guest sees in a cluster, with the changes in it.
    fn seen_with(&self, guest: u64, changes: &Changes<'_>) -> Result<Vec<u8>> {
        let cluster = self.image.header.cluster();
        let mut bytes = vec![0; cluster as usize];
        let changed: u64 = changes.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        if changed < cluster {
            self.image.read(&mut bytes, guest * cluster)?;
        }
        for (within, new) in changes {
            let start = *within as usize;
            bytes[start..start + new.len()].copy_from_slice(new);
        }
        Ok(bytes)
    }

    /// A new cluster, which lies beyond the end of the file: zeros need not be written.
    fn put_new(&mut self, host: u64, bytes: &[u8]) {
        for (number, piece) in bytes.chunks(PIECE as usize).enumerate() {
            if piece.iter().any(|byte| *byte != 0) {
                self.patch.put(host + number as u64 * PIECE, piece.to_vec());
            }
        }
    }
}
