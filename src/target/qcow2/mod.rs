//! qcow2 images (QEMU's docs/interop/qcow2.txt, version 3) whose whole layout is known before the first byte is written.
//!
//! ```text
//!  cluster 0   header, extensions, backing file name
//!          1…  refcount table
//!           …  refcount blocks: 1 for every cluster of the file, 0 beyond
//!           …  L1 table
//!           …  L2 tables, only those that are needed, in guest order
//!           …  data clusters in guest order: neighbours in the guest are neighbours in the file
//! ```
//!
//! Nothing is allocated as one goes, so nothing is written twice and no order of flushes matters: the file has no name until it is complete. Metadata
//! pages that hold only zeros are left as holes.
//!
//! - `overlay` writes images over a golden: our own writer, because the patch is known and qcow2-rs has neither raw backing files nor subclusters.
//! - `standalone` lays out images that need no golden, copies the data, and has qcow2-rs put the patch in and read the image back.
//! - `compressed` writes standalone images with compressed clusters, metadata last.
//! - `header` is the header cluster, `reader` reads an image back by its tables, `shim` is the only user of qcow2-rs.

pub mod backing;
mod compressed;
mod header;
pub mod overlay;
mod reader;
mod shim;
pub mod standalone;

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use crate::{
    error::{Error, Kind, Result, Stage},
    target::{
        VolumeOptions, Wanted,
        bulk::Source,
        extents::{self, Ranges},
        options::EXTENDED_L2_CLUSTER_BYTES_MIN,
        pace::Pace,
        publish::{self, StagedFile},
        qcow2::{
            header::{Choice, Header},
            reader::Reader,
        },
        verify,
    },
    units::{KIB, MIB, PATCH_BLOCK},
};

/// QEMU refuses larger L1 tables.
const L1_BYTES_MAX: u64 = 32 * MIB;
/// Refcounts have 2^4 bits, QEMU's default.
const REFCOUNT_ORDER: u32 = 4;
/// Refcount is one and the cluster may be written in place.
const COPIED: u64 = 1 << 63;
/// Subclusters per cluster with extended L2 entries.
const SUBCLUSTERS: u64 = 32;

/// The shape of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Geometry {
    /// A cluster has `2^cluster_bits` bytes, 12 to 21.
    cluster_bits: u32,
    /// Extended L2 entries: each cluster has 32 subclusters that are allocated one by one (QEMU 5.2).
    subclusters: bool,
}

impl Geometry {
    /// What `options` ask for. Subclusters are used where they are asked for or the format's default and the clusters are large enough for them. Clusters
    /// have 128 KiB with them, so that one is a patch block, else 64 KiB, QEMU's default.
    fn of(options: &VolumeOptions, subclusters_by_default: bool) -> Self {
        let asked = options.cluster_size.map(|size| size.0);
        let is_large_enough = asked.is_none_or(|size| size >= EXTENDED_L2_CLUSTER_BYTES_MIN);
        let subclusters = options.extended_l2.unwrap_or(subclusters_by_default && is_large_enough);
        let size = asked.unwrap_or(if subclusters { 128 * KIB } else { 64 * KIB });
        Geometry { cluster_bits: size.trailing_zeros(), subclusters }
    }

    /// Bytes that are allocated together: a subcluster, or a cluster.
    fn unit(self) -> u64 {
        if self.subclusters { self.cluster() / SUBCLUSTERS } else { self.cluster() }
    }

    /// Which subclusters of guest cluster `guest` have bytes in `ranges`, which are ascending and do not touch.
    fn bitmap(self, ranges: &[Range<u64>], guest: u64) -> u32 {
        let start = guest * self.cluster();
        let mut bits = 0;
        let first = ranges.partition_point(|range| range.end <= start);
        for range in ranges[first..].iter().take_while(|range| range.start < start + self.cluster()) {
            let from = range.start.saturating_sub(start) / self.unit();
            let to = (range.end - start).div_ceil(self.unit()).min(SUBCLUSTERS);
            bits |= (from..to).fold(0, |bits, index| bits | 1 << index);
        }
        bits
    }

    fn l1_entries(self, virtual_size: u64) -> u64 {
        virtual_size.div_ceil(self.cluster()).div_ceil(self.l2_entries()).max(1)
    }

    /// Clusters of refcount blocks and of the table that lists them for a file of `used` clusters and these.
    fn refcount_clusters(self, used: u64) -> (u64, u64) {
        let (mut blocks, mut table) = (1, 1);
        loop {
            let need = (used + blocks + table).div_ceil(self.refcounts_per_block());
            let list = (need * 8).div_ceil(self.cluster());
            if (need, list) == (blocks, table) {
                return (blocks, table);
            }
            (blocks, table) = (need, list);
        }
    }

    fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    fn l2_entry_bytes(self) -> u64 {
        if self.subclusters { 16 } else { 8 }
    }

    fn l2_entries(self) -> u64 {
        self.cluster() / self.l2_entry_bytes()
    }

    fn refcounts_per_block(self) -> u64 {
        (self.cluster() * 8) >> REFCOUNT_ORDER
    }
}

/// Where everything lies in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Layout {
    geometry: Geometry,
    virtual_size: u64,
    l1_entries: u64,
    /// First cluster and number of clusters of each part, in file order.
    reftable: Range<u64>,
    refblocks: Range<u64>,
    l1: Range<u64>,
    l2: Range<u64>,
    data: Range<u64>,
    /// Guest clusters that are allocated, with the index of the first one's data cluster.
    allocated: Vec<(Range<u64>, u64)>,
    /// L1 index of each L2 table, ascending.
    tables: Vec<u64>,
}

impl Layout {
    /// The layout of an image of `virtual_size` bytes in which the clusters touched by `ranges` (guest bytes) are allocated.
    fn new(geometry: Geometry, virtual_size: u64, ranges: &[Range<u64>]) -> Result<Self> {
        let cluster = geometry.cluster();
        let per_table = geometry.l2_entries();
        let l1_entries = geometry.l1_entries(virtual_size);
        if l1_entries * 8 > L1_BYTES_MAX {
            let message = format!("{virtual_size} bytes are too many for qcow2 clusters of {cluster} bytes");
            return Err(Error::new(Kind::Unsupported, Stage::Target, "", message));
        }
        let (mut allocated, mut tables, mut clusters) = (Vec::new(), Vec::new(), 0);
        for range in extents::widen(ranges, cluster) {
            let guest = range.start / cluster..range.end / cluster;
            for table in guest.start / per_table..=(guest.end - 1) / per_table {
                if tables.last() != Some(&table) {
                    tables.push(table);
                }
            }
            allocated.push((guest.clone(), clusters));
            clusters += guest.end - guest.start;
        }
        let l1_clusters = (l1_entries * 8).div_ceil(cluster);
        let fixed = 1 + l1_clusters + tables.len() as u64 + clusters;
        let (refblocks, reftable) = geometry.refcount_clusters(fixed);
        let mut at = 1;
        let mut take = |count: u64| {
            let start = at;
            at += count;
            start..at
        };
        let (reftable, refblocks) = (take(reftable), take(refblocks));
        let (l1, l2, data) = (take(l1_clusters), take(tables.len() as u64), take(clusters));
        Ok(Layout { geometry, virtual_size, l1_entries, reftable, refblocks, l1, l2, data, allocated, tables })
    }

    /// Length of the file in bytes.
    fn file_bytes(&self) -> u64 {
        self.data.end * self.geometry.cluster()
    }

    /// Where the guest's byte `offset`, which lies in an allocated cluster, is in the file.
    fn host_offset(&self, offset: u64) -> u64 {
        let cluster = self.geometry.cluster();
        let guest = offset / cluster;
        let after = self.allocated.partition_point(|(range, _)| range.start <= guest);
        let (range, first) = &self.allocated[after.checked_sub(1).expect("only offsets in allocated clusters are asked for")];
        (self.data.start + first + (guest - range.start)) * cluster + offset % cluster
    }

    /// Sets the file's length and writes all metadata. `subclusters` gives the allocation bitmap of a guest cluster for extended L2 entries.
    fn write_metadata(&self, file: &File, choice: Choice<'_>, subclusters: impl Fn(u64) -> u32) -> Result<(), io::Error> {
        let cluster = self.geometry.cluster();
        file.set_len(self.file_bytes())?;
        file.write_all_at(&self.header(choice).bytes(), 0)?;
        let offsets =
            |range: &Range<u64>, flags: u64| -> Vec<u8> { range.clone().flat_map(|number| ((number * cluster) | flags).to_be_bytes()).collect() };
        write_sparse(file, &offsets(&self.refblocks, 0), self.reftable.start * cluster)?;
        let refcounts = 1u16.to_be_bytes().repeat(usize::try_from(self.data.end).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?);
        file.write_all_at(&refcounts, self.refblocks.start * cluster)?;
        let mut l1 = vec![0; self.l1_entries as usize * 8];
        for (number, table) in self.l2.clone().zip(&self.tables) {
            let at = *table as usize * 8;
            l1[at..at + 8].copy_from_slice(&((number * cluster) | COPIED).to_be_bytes());
        }
        write_sparse(file, &l1, self.l1.start * cluster)?;
        self.write_l2(file, subclusters)
    }

    fn write_l2(&self, file: &File, subclusters: impl Fn(u64) -> u32) -> io::Result<()> {
        let (cluster, entry_bytes) = (self.geometry.cluster(), self.geometry.l2_entry_bytes() as usize);
        let per_table = self.geometry.l2_entries();
        let mut table = vec![0; cluster as usize];
        let mut ranges = self.allocated.iter().peekable();
        for (number, index) in self.l2.clone().zip(&self.tables) {
            table.fill(0);
            let span = index * per_table..(index + 1) * per_table;
            while let Some((range, first)) = ranges.peek() {
                for guest in range.start.max(span.start)..range.end.min(span.end) {
                    let at = (guest - span.start) as usize * entry_bytes;
                    let host = (self.data.start + first + (guest - range.start)) * cluster;
                    table[at..at + 8].copy_from_slice(&(host | COPIED).to_be_bytes());
                    if self.geometry.subclusters {
                        // High half: subclusters that read as zeros; low half: those with data.
                        table[at + 8..at + 16].copy_from_slice(&u64::from(subclusters(guest)).to_be_bytes());
                    }
                }
                if range.end > span.end {
                    break;
                }
                ranges.next();
            }
            write_sparse(file, &table, number * cluster)?;
        }
        Ok(())
    }

    fn header<'a>(&self, choice: Choice<'a>) -> Header<'a> {
        let cluster = self.geometry.cluster();
        Header {
            geometry: self.geometry,
            virtual_size: self.virtual_size,
            l1_entries: self.l1_entries,
            l1_offset: self.l1.start * cluster,
            reftable_offset: self.reftable.start * cluster,
            reftable_clusters: self.reftable.end - self.reftable.start,
            choice,
        }
    }
}

/// What [`publish::check`] asks, and whether qcow2 with the clusters asked for can map so large a disk.
fn check(wanted: &Wanted<'_>, format: crate::target::VolumeFormat, subclusters_by_default: bool) -> Result<()> {
    publish::check(wanted, format)?;
    Layout::new(Geometry::of(wanted.options, subclusters_by_default), wanted.size_bytes, &[]).map(|_| ())
}

/// Reads a staged image back by its tables; see [`verify`]. `written`: where it must hold something, or zeros. `backing`: the golden, for overlays.
fn read_back(source: Source<'_>, written: &Ranges, backing: Option<(&File, u64)>, staged: &StagedFile, pace: Pace<'_>) -> Result<()> {
    verify::flush_and_forget(staged)?;
    let failed = |error| staged.error("read back the image's tables", error);
    let mut image = Reader::open(staged.file(), backing).map_err(failed)?;
    if image.virtual_size() != source.patch.size_bytes() {
        return Err(verify::differs(staged.path(), image.virtual_size().min(source.patch.size_bytes())));
    }
    let ranges = extents::union(written, &image.held().map_err(failed)?);
    verify::compare(source, &ranges, |buffer, offset| image.read(buffer, offset), staged.path(), pace)
}

/// Writes the pages of `bytes` that are not all zeros; the file is new, so the rest reads as zeros already.
fn write_sparse(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let page = PATCH_BLOCK as usize;
    let is_zero = |chunk: &[u8]| chunk.iter().all(|byte| *byte == 0);
    let mut runs = Ranges::new();
    for (index, chunk) in bytes.chunks(page).enumerate() {
        let (start, end) = ((index * page) as u64, (index * page + chunk.len()) as u64);
        if is_zero(chunk) {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs.into_iter().try_for_each(|run| file.write_all_at(&bytes[run.start as usize..run.end as usize], offset + run.start))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PLAIN: Geometry = Geometry { cluster_bits: 16, subclusters: false };

    proptest! {
        #[test]
        fn every_allocated_cluster_has_a_place_of_its_own_inside_the_file(
            list in prop::collection::vec((0u64..1 << 40, 1u64..1 << 24), 0..20),
            cluster_bits in 12u32..=21,
            subclusters: bool,
        ) {
            let geometry = Geometry { cluster_bits: if subclusters { cluster_bits.max(14) } else { cluster_bits }, subclusters };
            let ranges = extents::union(&list.iter().map(|(at, len)| *at..at + len).collect::<Vec<_>>(), &[]);
            let layout = Layout::new(geometry, 1 << 41, &ranges)?;
            let cluster = geometry.cluster();
            let mut seen = BTreeSet::new();
            for range in &ranges {
                for at in [range.start, (range.start + range.end) / 2, range.end - 1] {
                    let host = layout.host_offset(at);
                    prop_assert_eq!(host % cluster, at % cluster);
                    prop_assert!(layout.data.contains(&(host / cluster)));
                    seen.insert((at / cluster, host / cluster));
                }
            }
            let (guests, hosts): (BTreeSet<u64>, BTreeSet<u64>) = seen.iter().copied().unzip();
            prop_assert_eq!(guests.len(), seen.len());
            prop_assert_eq!(hosts.len(), seen.len());
            // The refcount blocks reach to the end of the file, and the table to the last of them.
            prop_assert!((layout.refblocks.end - layout.refblocks.start) * geometry.refcounts_per_block() >= layout.data.end);
            prop_assert!((layout.reftable.end - layout.reftable.start) * cluster / 8 >= layout.refblocks.end - layout.refblocks.start);
            prop_assert_eq!(layout.l2.end - layout.l2.start, layout.tables.len() as u64);
        }
    }

    #[test]
    fn a_disk_beyond_what_qcow2_can_map_is_refused() {
        let small = Geometry { cluster_bits: 12, subclusters: false };
        assert!(Layout::new(small, 8 << 40, &[]).is_ok());
        assert_eq!(Layout::new(small, (8 << 40) + 4096, &[]).expect_err("too large").kind(), Kind::Unsupported);
        assert!(Layout::new(PLAIN, 1 << 50, &[]).is_ok());
    }

    #[test]
    fn the_header_is_what_the_specification_says() {
        let layout = Layout::new(Geometry { cluster_bits: 17, subclusters: true }, 3 << 30, std::slice::from_ref(&(0..4096))).expect("lays out");
        let header = layout.header(Choice { backing: Some(b"/store/golden.img"), ..Choice::default() }).bytes();
        let long = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
        assert_eq!((&header[..4], word(4), word(20), long(24)), (&b"QFI\xfb"[..], 3, 17, 3 << 30));
        let name = long(8) as usize;
        assert_eq!(&header[name..name + word(16) as usize], b"/store/golden.img");
        // 3 GiB are three tables of 1 GiB; refcount table, refcount block, L1 table, L2 table, data: one cluster each.
        assert_eq!((word(36), long(40), long(48), word(56)), (3, 3 << 17, 1 << 17, 1));
        assert_eq!((long(72), long(80), long(88), word(96), word(100)), (header::EXTENDED_L2, 0, 0, 4, 104));
        assert_eq!((word(104), word(108), &header[112..115]), (0xe279_2aca, 3, &b"raw"[..]));
    }
}
