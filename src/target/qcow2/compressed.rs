//! Standalone images with compressed clusters.
//!
//! ```text
//!  cluster 0   header
//!          1…  clusters in guest order: compressed ones packed byte by byte, as QEMU packs them, plain ones where compressing gains nothing
//!           …  L2 tables, L1 table, refcount blocks, refcount table
//! ```
//!
//! How long a compressed cluster gets is known only afterwards, so the metadata come last; nothing is written twice either way. Two threads compress a
//! batch of clusters, which are then written in guest order: memory is bounded by the batch, and the file's bytes depend on nothing but golden, patch
//! and options. Several compressed clusters share a host cluster, whose refcount is their number. Clusters that hold only zeros are not stored.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use flate2::{Compress, FlushCompress, Status};

use super::{
    COPIED, Geometry, REFCOUNT_ORDER,
    header::{Choice, Header},
    write_sparse,
};
use crate::{
    error::{Error, Result, Stage},
    host::sys,
    target::{Compression, bulk::Source, extents, pace::Pace, publish::StagedFile},
    units::{KIB, MIB},
};

/// Threads that compress.
const THREADS: usize = 2;
/// Bytes of the guest in a batch, and at least one cluster for each thread.
const BATCH_BYTES: u64 = 4 * MIB;
/// Window of the deflate streams: QEMU inflates with 2^12 bytes (block/qcow2-threads.c).
pub(super) const DEFLATE_WINDOW_BITS: u8 = 12;
/// L2 entry: the cluster is compressed.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Unit in which an L2 entry counts a compressed cluster's bytes.
pub(super) const SECTOR: u64 = 512;

/// Writes all of an image: what `source` holds in `written`, compressed.
pub(super) fn write(
    source: Source<'_>,
    written: &[Range<u64>],
    (geometry, choice): (Geometry, Choice<'_>),
    virtual_size: u64,
    staged: &StagedFile,
    pace: Pace<'_>,
) -> Result<()> {
    let cluster = geometry.cluster();
    let guests: Vec<u64> = extents::widen(written, cluster).into_iter().flat_map(|range| range.start / cluster..range.end / cluster).collect();
    let mut image = Writer { file: staged.file(), geometry, refcounts: vec![1], packed_end: 0, entries: Vec::new() };
    let mut coders = (0..THREADS).map(|_| Coder::new(choice.compression)).collect::<io::Result<Vec<Coder>>>();
    let coders = coders.as_mut().map_err(|error| staged.error("start compressing", io::Error::from(error.kind())))?;
    let batch = usize::try_from(BATCH_BYTES / cluster).unwrap_or(1).max(THREADS);
    for guests in guests.chunks(batch) {
        for (guest, packed) in guests.iter().zip(compress(source, guests, cluster, coders, staged, pace)?) {
            pace.take(packed.len())?;
            image.add(*guest, &packed).map_err(|error| staged.error(format!("write the cluster at {}", guest * cluster), error))?;
            pace.progress.add(cluster);
        }
        image.start_writeback();
    }
    image.finish(virtual_size, choice).map_err(|error| staged.error("write the qcow2 metadata", error))
}

/// A cluster as it is stored.
enum Packed {
    /// Nothing but zeros: not stored.
    Zero,
    Plain(Vec<u8>),
    Compressed(Vec<u8>),
}

impl Packed {
    fn len(&self) -> u64 {
        match self {
            Packed::Zero => 0,
            Packed::Plain(bytes) | Packed::Compressed(bytes) => bytes.len() as u64,
        }
    }
}

/// Reads and compresses `guests`, in their order.
fn compress(source: Source<'_>, guests: &[u64], cluster: u64, coders: &mut [Coder], staged: &StagedFile, pace: Pace<'_>) -> Result<Vec<Packed>> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Result<Packed>)>> = Mutex::new(Vec::with_capacity(guests.len()));
    let work = |coder: &mut Coder| {
        let _priority = pace.lower_priority();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(guest) = guests.get(index) else { break };
            let packed = pace.progress.check().and_then(|()| {
                let mut bytes = vec![0; cluster as usize];
                source
                    .read(&mut bytes, guest * cluster)
                    .and_then(|()| coder.pack(bytes))
                    .map_err(|error| staged.error(format!("compress the golden image at {}", guest * cluster), error))
            });
            done.lock().unwrap_or_else(PoisonError::into_inner).push((index, packed));
        }
    };
    let (work, (own, others)) = (&work, coders.split_first_mut().expect("there is a coder for each thread"));
    std::thread::scope(|scope| {
        for coder in others {
            // Fewer threads are slower, not wrong.
            let _ = std::thread::Builder::new().name("compress".into()).spawn_scoped(scope, move || work(coder));
        }
        work(own);
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    let packed = done.into_iter().map(|(_, packed)| packed).collect::<Result<Vec<Packed>>>()?;
    if packed.len() != guests.len() {
        return Err(Error::internal(Stage::Target, staged.path().display().to_string(), "a compressing thread ended early"));
    }
    Ok(packed)
}

/// One thread's compressor.
enum Coder {
    Deflate(Box<Compress>),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Coder {
    fn new(compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            // Raw deflate, level 6: zlib's default, which QEMU takes.
            Compression::None | Compression::Zlib => {
                Coder::Deflate(Box::new(Compress::new_with_window_bits(flate2::Compression::new(6), false, DEFLATE_WINDOW_BITS)))
            }
            // Level 3, zstd's default, which QEMU takes.
            Compression::Zstd => Coder::Zstd(zstd::bulk::Compressor::new(3)?),
        })
    }

    fn pack(&mut self, cluster: Vec<u8>) -> io::Result<Packed> {
        if cluster.iter().all(|byte| *byte == 0) {
            return Ok(Packed::Zero);
        }
        let smaller = match self {
            Coder::Deflate(coder) => {
                // More than deflate ever needs (stored blocks of 5 bytes more each): zlib-rs 0.6.8 panics in small windows when the output gets full.
                let mut packed = vec![0; cluster.len() + cluster.len() / 8 + 1024];
                coder.reset();
                match coder.compress(&cluster, &mut packed, FlushCompress::Finish)? {
                    Status::StreamEnd if coder.total_out() < cluster.len() as u64 => {
                        packed.truncate(coder.total_out() as usize);
                        Some(packed)
                    }
                    Status::StreamEnd | Status::Ok | Status::BufError => None,
                }
            }
            Coder::Zstd(coder) => Some(coder.compress(&cluster)?).filter(|packed| packed.len() < cluster.len()),
        };
        Ok(smaller.map_or(Packed::Plain(cluster), |mut packed| {
            packed.shrink_to_fit();
            Packed::Compressed(packed)
        }))
    }
}

/// The file while clusters are appended.
struct Writer<'a> {
    file: &'a File,
    geometry: Geometry,
    /// References of each host cluster so far; its length is the end of the file.
    refcounts: Vec<u16>,
    /// Where the next compressed cluster may begin: behind the last one, 0 before the first.
    packed_end: u64,
    /// Guest cluster and its L2 entry, ascending.
    entries: Vec<(u64, u64)>,
}

impl Writer<'_> {
    fn add(&mut self, guest: u64, packed: &Packed) -> io::Result<()> {
        match packed {
            Packed::Zero => {}
            Packed::Plain(bytes) => {
                let at = self.take(1) * self.geometry.cluster();
                self.file.write_all_at(bytes, at)?;
                self.entries.push((guest, at | COPIED));
            }
            Packed::Compressed(bytes) => {
                let at = self.place(bytes.len() as u64)?;
                self.file.write_all_at(bytes, at)?;
                self.entries.push((guest, compressed_entry(self.geometry, at, bytes.len() as u64)));
            }
        }
        Ok(())
    }

    /// Appends clusters with one reference; gives the first one's number.
    fn take(&mut self, count: u64) -> u64 {
        let first = self.refcounts.len();
        self.refcounts.resize(first + count as usize, 1);
        first as u64
    }

    /// Finds room for `len` compressed bytes (less than a cluster) as QEMU's `qcow2_alloc_bytes` does: in the cluster that was begun, or across its end
    /// where the next one is free, or in a new one. Counts the references.
    fn place(&mut self, len: u64) -> io::Result<u64> {
        let cluster = self.geometry.cluster();
        let mut at = self.packed_end;
        let room = at.next_multiple_of(cluster) - at;
        if room < len {
            let new = self.refcounts.len() as u64;
            self.refcounts.push(0);
            if at == 0 || at.next_multiple_of(cluster) != new * cluster {
                at = new * cluster;
            }
        }
        for number in at / cluster..=(at + len - 1) / cluster {
            let count = &mut self.refcounts[number as usize];
            *count = count.checked_add(1).ok_or_else(|| io::Error::other("more than 65535 compressed clusters in one"))?;
        }
        self.packed_end = at + len;
        Ok(at)
    }

    /// Of what the batch before wrote; the file is flushed later in any case.
    fn start_writeback(&self) {
        let _ = sys::start_writeback(self.file, 0, 0);
    }

    fn finish(mut self, virtual_size: u64, choice: Choice<'_>) -> io::Result<()> {
        let cluster = self.geometry.cluster();
        let l1_entries = self.geometry.l1_entries(virtual_size);
        let mut l1 = vec![0; l1_entries as usize * 8];
        self.write_tables(&mut l1)?;
        let l1_at = self.take((l1_entries * 8).div_ceil(cluster)) * cluster;
        write_sparse(self.file, &l1, l1_at)?;
        // The refcount blocks count themselves and the table that lists them.
        let used = self.refcounts.len() as u64;
        let (blocks, table) = self.geometry.refcount_clusters(used);
        let (blocks_at, table_at) = (self.take(blocks), self.take(table));
        let counts: Vec<u8> = self.refcounts.iter().flat_map(|count| count.to_be_bytes()).collect();
        self.file.set_len(self.refcounts.len() as u64 * cluster)?;
        self.file.write_all_at(&counts, blocks_at * cluster)?;
        let list: Vec<u8> = (blocks_at..blocks_at + blocks).flat_map(|number| (number * cluster).to_be_bytes()).collect();
        write_sparse(self.file, &list, table_at * cluster)?;
        let header = Header {
            geometry: self.geometry,
            virtual_size,
            l1_entries,
            l1_offset: l1_at,
            reftable_offset: table_at * cluster,
            reftable_clusters: table,
            choice,
        };
        self.file.write_all_at(&header.bytes(), 0)
    }

    /// Writes the L2 tables and enters them into `l1`.
    fn write_tables(&mut self, l1: &mut [u8]) -> io::Result<()> {
        let (cluster, per_table, entry_bytes) = (self.geometry.cluster(), self.geometry.l2_entries(), self.geometry.l2_entry_bytes() as usize);
        let entries = std::mem::take(&mut self.entries);
        for chunk in entries.chunk_by(|left, right| left.0 / per_table == right.0 / per_table) {
            let mut table = vec![0; cluster as usize];
            for (guest, entry) in chunk {
                let at = (guest % per_table) as usize * entry_bytes;
                table[at..at + 8].copy_from_slice(&entry.to_be_bytes());
                if self.geometry.subclusters && entry & COMPRESSED == 0 {
                    // All of its subclusters are allocated.
                    table[at + 8..at + 16].copy_from_slice(&u64::from(u32::MAX).to_be_bytes());
                }
            }
            let (number, index) = (self.take(1), (chunk[0].0 / per_table) as usize * 8);
            write_sparse(self.file, &table, number * cluster)?;
            l1[index..index + 8].copy_from_slice(&((number * cluster) | COPIED).to_be_bytes());
        }
        Ok(())
    }
}

/// The L2 entry of `len` compressed bytes at `at`: the offset in the low `70 - cluster_bits` bits, above it the number of sectors after the first one.
fn compressed_entry(geometry: Geometry, at: u64, len: u64) -> u64 {
    let sectors = (at + len - 1) / SECTOR - at / SECTOR;
    COMPRESSED | sectors << offset_bits(geometry) | at
}

/// Bits of the offset in a compressed cluster's entry (docs/interop/qcow2.txt, "Compressed Clusters Descriptor").
pub(super) fn offset_bits(geometry: Geometry) -> u32 {
    62 - (geometry.cluster_bits - 8)
}

const _: () = assert!(REFCOUNT_ORDER == 4 && 4 * KIB >= SECTOR, "refcounts are written as u16");
