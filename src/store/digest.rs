//! The digest of a golden disk.
//!
//! A golden is a sparse file of many gigabytes with a few hundred megabytes in it; hashing the zeros would cost more than building it. So the digest is defined
//! over chunks: SHA-256 over the text `cloudletd-golden-2`, the size in bytes (u64 LE), and for each 1 MiB chunk (the last may be shorter) that is not all
//! zeros, in order, its number (u64 LE) and the BLAKE3 of its bytes. It depends on content only, not on which zeros are holes. BLAKE3, because the content is
//! several times what was downloaded and every byte of it is hashed while the disk is built: with SHA-256 that was the larger part of a build's work on two
//! cores, CPU instructions for it or not.

use std::{
    collections::HashMap,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Mutex, MutexGuard},
    thread,
};

use sha2::{Digest as _, Sha256};

use crate::{
    error::{Error, Result, Stage},
    fs::WriteObserver,
    names::Digest,
    units::MIB,
};

const CHUNK: u64 = MIB;
/// Hashing threads: enough to hide the page cache's latency, few enough to leave running guests alone.
const THREADS: usize = 2;
/// What a gap in a chunk reads as.
static ZEROS: [u8; CHUNK as usize] = [0; CHUNK as usize];

/// What is known of a chunk: its hash, or that it is all zeros.
type Known = Option<[u8; 32]>;

/// Computes the digest of the disk at `path`.
pub fn of_disk(path: &Path) -> Result<Digest> {
    let object = path.display().to_string();
    let opened = File::open(path).and_then(|file| file.metadata().map(|metadata| (file, metadata.len())));
    let (file, size) = opened.map_err(|error| Error::io(Stage::Golden, object.clone(), "open for its digest", error))?;
    Follower::new(size).finish(&file, &object)
}

/// Hashes a disk while it is written. Chunks that are written from front to back in one go, which are nearly all of them, are hashed from memory as they
/// pass; the others are read back at the end. A disk that nobody shows the writes of gets the same digest, more slowly.
pub struct Follower {
    size: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    open: Option<Open>,
    /// Chunks that were written: those hashed, and those (`None`) that have to be read.
    done: HashMap<u64, Option<Known>>,
}

/// The chunk that is being written.
struct Open {
    chunk: u64,
    /// Bytes hashed so far.
    len: u64,
    is_zero: bool,
    hash: blake3::Hasher,
}

impl Follower {
    /// For a disk of `size` bytes that reads as zeros.
    pub fn new(size: u64) -> Self {
        Follower { size, state: Mutex::default() }
    }

    /// A range was written that [`WriteObserver::written`] was not told about.
    pub fn forget(&self, range: Range<u64>) {
        let mut state = self.state();
        for chunk in range.start / CHUNK..range.end.div_ceil(CHUNK) {
            state.forget(chunk);
        }
    }

    /// The digest of the disk `file`, which has been written completely; `object` is its name in errors.
    pub fn finish(&self, file: &File, object: &str) -> Result<Digest> {
        let failed = |doing: &'static str| move |error: io::Error| Error::io(Stage::Golden, object, doing, error);
        let chunks = data_chunks(file, self.size, CHUNK).map_err(failed("find its data"))?;
        let mut known = std::mem::take(&mut self.state().done);
        let unknown: Vec<u64> = chunks.iter().copied().filter(|chunk| !matches!(known.get(chunk), Some(Some(_)))).collect();
        let next = Mutex::new(unknown.into_iter());
        let read = || self.read_chunks(file, &next);
        let hashes = thread::scope(|scope| -> Result<Vec<(u64, Known)>> {
            let workers: Vec<_> = (0..THREADS).map(|_| scope.spawn(read)).collect();
            let mut hashes = Vec::new();
            for worker in workers {
                let joined = worker.join().map_err(|_| Error::internal(Stage::Golden, object, "a hashing thread panicked"))?;
                hashes.extend(joined.map_err(failed("hash"))?);
            }
            Ok(hashes)
        })?;
        known.extend(hashes.into_iter().map(|(chunk, hash)| (chunk, Some(hash))));
        let mut total = Sha256::new();
        total.update(b"cloudletd-golden-2");
        total.update(self.size.to_le_bytes());
        for chunk in chunks {
            if let Some(Some(Some(hash))) = known.get(&chunk) {
                total.update(chunk.to_le_bytes());
                total.update(hash);
            }
        }
        Ok(Digest::from_bytes(total.finalize().into()))
    }

    fn read_chunks(&self, file: &File, next: &Mutex<impl Iterator<Item = u64>>) -> io::Result<Vec<(u64, Known)>> {
        let (mut hashes, mut buffer) = (Vec::new(), vec![0u8; CHUNK as usize]);
        loop {
            let Some(chunk) = next.lock().expect("no panic while taking a chunk").next() else { return Ok(hashes) };
            let bytes = &mut buffer[..self.chunk_len(chunk) as usize];
            file.read_exact_at(bytes, chunk * CHUNK)?;
            let is_zero = bytes.iter().all(|byte| *byte == 0);
            hashes.push((chunk, (!is_zero).then(|| blake3::hash(bytes).into())));
        }
    }

    fn chunk_len(&self, chunk: u64) -> u64 {
        CHUNK.min(self.size - chunk * CHUNK)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while hashing")
    }
}

impl WriteObserver for Follower {
    fn written(&self, mut offset: u64, mut bytes: &[u8]) {
        let mut state = self.state();
        while !bytes.is_empty() {
            let (chunk, within) = (offset / CHUNK, offset % CHUNK);
            let (part, rest) = bytes.split_at(bytes.len().min((CHUNK - within) as usize));
            state.written(chunk, within, part, self.chunk_len(chunk));
            (offset, bytes) = (offset + part.len() as u64, rest);
        }
    }
}

impl State {
    fn forget(&mut self, chunk: u64) {
        if self.open.as_ref().is_some_and(|open| open.chunk == chunk) {
            self.open = None;
        }
        self.done.insert(chunk, None);
    }

    /// `part` was written at byte `within` of a chunk of `chunk_len` bytes.
    fn written(&mut self, chunk: u64, within: u64, part: &[u8], chunk_len: u64) {
        if self.open.as_ref().is_none_or(|open| open.chunk != chunk) {
            if let Some(left) = self.open.take() {
                self.done.insert(left.chunk, None);
            }
            if self.done.contains_key(&chunk) {
                return self.forget(chunk);
            }
        }
        let open = self.open.get_or_insert_with(|| Open { chunk, len: 0, is_zero: true, hash: blake3::Hasher::new() });
        if within < open.len {
            // Written again: the hash has the old bytes in it.
            return self.forget(chunk);
        }
        open.hash.update(&ZEROS[..(within - open.len) as usize]);
        open.hash.update(part);
        open.is_zero = open.is_zero && part.iter().all(|byte| *byte == 0);
        open.len = within + part.len() as u64;
        if open.len == chunk_len
            && let Some(full) = self.open.take()
        {
            self.done.insert(chunk, Some((!full.is_zero).then(|| full.hash.finalize().into())));
        }
    }
}

/// Numbers of the chunks of `chunk_len` bytes that are not entirely in a hole.
pub(crate) fn data_chunks(file: &File, size: u64, chunk_len: u64) -> io::Result<Vec<u64>> {
    let mut chunks = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start))?;
        let first = (start / chunk_len).max(chunks.last().map_or(0, |last| last + 1));
        chunks.extend(first..end.div_ceil(chunk_len));
        at = end;
    }
    Ok(chunks)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn holes_and_written_zeros_have_the_same_digest_and_every_byte_counts() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let digest_of = |name: &str, fill: &dyn Fn(&File)| {
            let path = dir.path().join(name);
            let file = File::create(&path).expect("create");
            file.set_len(10 * MIB + 4096).expect("size");
            fill(&file);
            of_disk(&path).expect("digest")
        };
        let sparse = digest_of("sparse", &|file| file.write_all_at(b"x", 5 * MIB).expect("write"));
        let zeros = digest_of("zeros", &|file| {
            file.write_all_at(&vec![0; 10 * MIB as usize], 0).expect("write");
            file.write_all_at(b"x", 5 * MIB).expect("write");
        });
        let moved = digest_of("moved", &|file| file.write_all_at(b"x", 6 * MIB).expect("write"));
        let tail = digest_of("tail", &|file| {
            file.write_all_at(b"x", 5 * MIB).expect("write");
            file.write_all_at(b"y", 10 * MIB + 4095).expect("write");
        });
        assert_eq!(sparse, zeros);
        assert_ne!(sparse, moved);
        assert_ne!(sparse, tail);
    }

    proptest! {
        #[test]
        fn following_the_writes_gives_the_digest_of_the_disk(
            writes in prop::collection::vec((0u64..5 * MIB, 0u64..3 * MIB / 2, 0u8..3, any::<bool>()), 0..12),
            adjacent: bool,
        ) {
            let size = 5 * MIB + 8192;
            let file = tempfile::NamedTempFile::new().expect("temporary file");
            file.as_file().set_len(size).expect("size");
            let follower = Follower::new(size);
            let mut end = 0;
            for (at, len, value, told) in writes {
                let at = if adjacent { end } else { at };
                let len = len.min(size - at);
                end = at + len;
                let bytes = vec![value; len as usize];
                file.as_file().write_all_at(&bytes, at).expect("write");
                if told {
                    follower.written(at, &bytes);
                } else {
                    follower.forget(at..end);
                }
            }
            prop_assert_eq!(follower.finish(file.as_file(), "disk").expect("digest"), of_disk(file.path()).expect("digest"));
        }
    }

    #[test]
    fn a_disk_written_from_front_to_back_is_not_read_again() {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        file.as_file().set_len(3 * MIB).expect("size");
        let follower = Follower::new(3 * MIB);
        for (at, len, value) in [(0, MIB / 2, 1), (MIB / 2, MIB, 2), (3 * MIB - 10, 10, 3)] {
            let bytes = vec![value; len as usize];
            file.as_file().write_all_at(&bytes, at).expect("write");
            follower.written(at, &bytes);
        }
        let known: Vec<(u64, bool)> = {
            let state = follower.state();
            let mut known: Vec<_> = state.done.iter().map(|(chunk, known)| (*chunk, known.is_some())).collect();
            known.sort_unstable();
            known
        };
        // The second was left before its end.
        assert_eq!(known, [(0, true), (1, false), (2, true)]);
        assert_eq!(follower.finish(file.as_file(), "disk").expect("digest"), of_disk(file.path()).expect("digest"));
    }
}
