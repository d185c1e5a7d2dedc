//! The digest of a golden disk.
//!
//! A golden is a sparse file of many gigabytes with a few hundred megabytes in it; hashing the zeros would cost more than building it. So the digest is defined
//! over chunks: SHA-256 over the text `cloudletd-golden-1`, the size in bytes (u64 LE), and for each 1 MiB chunk (the last may be shorter) that is not all
//! zeros, in order, its number (u64 LE) and the SHA-256 of its bytes. It depends on content only, not on which zeros are holes.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path, sync::Mutex, thread};

use sha2::{Digest as _, Sha256};

use crate::{
    error::{Error, Result, Stage},
    names::Digest,
    units::MIB,
};

const CHUNK: u64 = MIB;
/// Hashing threads: enough to hide the page cache's latency, few enough to leave running guests alone.
const THREADS: usize = 2;

/// Computes the digest of the disk at `path`.
pub fn of_disk(path: &Path) -> Result<Digest> {
    let failed = |doing: &'static str| move |error: io::Error| Error::io(Stage::Golden, path.display().to_string(), doing, error);
    let file = File::open(path).map_err(failed("open for its digest"))?;
    let size = file.metadata().map_err(failed("read its size"))?.len();
    let chunks = data_chunks(&file, size).map_err(failed("find its data"))?;
    let next = Mutex::new(chunks.iter().enumerate());
    let hashes: Vec<Mutex<Option<[u8; 32]>>> = chunks.iter().map(|_| Mutex::new(None)).collect();
    thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| -> io::Result<()> {
                    let mut buffer = vec![0u8; CHUNK as usize];
                    loop {
                        let Some((index, chunk)) = next.lock().expect("no panic while taking a chunk").next() else { return Ok(()) };
                        let len = CHUNK.min(size - chunk * CHUNK) as usize;
                        file.read_exact_at(&mut buffer[..len], chunk * CHUNK)?;
                        if buffer[..len].iter().any(|byte| *byte != 0) {
                            *hashes[index].lock().expect("no panic while storing a hash") = Some(Sha256::digest(&buffer[..len]).into());
                        }
                    }
                })
            })
            .collect();
        for worker in workers {
            worker
                .join()
                .map_err(|_| Error::internal(Stage::Golden, path.display().to_string(), "a hashing thread panicked"))?
                .map_err(failed("hash"))?;
        }
        Ok(())
    })?;
    let mut total = Sha256::new();
    total.update(b"cloudletd-golden-1");
    total.update(size.to_le_bytes());
    for (chunk, hash) in chunks.iter().zip(&hashes) {
        if let Some(hash) = *hash.lock().expect("all threads have ended") {
            total.update(chunk.to_le_bytes());
            total.update(hash);
        }
    }
    Ok(Digest::from_bytes(total.finalize().into()))
}

/// Numbers of the chunks that are not entirely in a hole.
fn data_chunks(file: &File, size: u64) -> io::Result<Vec<u64>> {
    let mut chunks = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start))?;
        let first = (start / CHUNK).max(chunks.last().map_or(0, |last| last + 1));
        chunks.extend(first..end.div_ceil(CHUNK));
        at = end;
    }
    Ok(chunks)
}

#[cfg(test)]
mod tests {
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
}
