//! A file patch: bytes of a file or device that change, for any format of volume.

use std::{collections::BTreeMap, fs::File, io, os::unix::fs::FileExt};

use crate::{fs::patch::BlockPatch, units::PATCH_BLOCK};

/// Changed bytes by their place in the file. Complete in itself: applied twice, or again after it was applied half, it gives the same file.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct FilePatch {
    /// Pieces that don't overlap.
    writes: BTreeMap<u64, Vec<u8>>,
    /// The file is at least this long afterwards; 0 for what never grows.
    len_min: u64,
}

impl FilePatch {
    /// The patch of a disk whose bytes lie in the file as they are.
    pub fn plain(patch: &BlockPatch) -> FilePatch {
        let writes = patch.runs().into_iter().map(|(first, blocks)| (first * PATCH_BLOCK, blocks.concat())).collect();
        FilePatch { writes, len_min: 0 }
    }

    /// Adds a piece that no other piece overlaps.
    pub(super) fn put(&mut self, offset: u64, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.writes.insert(offset, bytes);
        }
    }

    /// Says how long the file is at least.
    pub(super) fn set_len_min(&mut self, len: u64) {
        self.len_min = len;
    }

    /// The file's least length in bytes.
    pub fn len_min(&self) -> u64 {
        self.len_min
    }

    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Bytes that are written.
    pub fn bytes(&self) -> u64 {
        self.writes.values().map(|bytes| bytes.len() as u64).sum()
    }

    /// The pieces in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.writes.iter().map(|(offset, bytes)| (*offset, &bytes[..]))
    }

    /// Makes sure that applying does not run out of space, as far as the filesystem can promise: blocks are allocated, no byte changes. To be called
    /// while nothing has been written. Filesystems that can't (EOPNOTSUPP) promise nothing.
    pub fn reserve(&self, file: &File) -> io::Result<()> {
        for (offset, bytes) in self.iter() {
            match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::KEEP_SIZE, offset, bytes.len() as u64) {
                Ok(()) => {}
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::NODEV) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Writes everything into a regular file or block device and flushes it.
    pub fn apply(&self, file: &File) -> io::Result<()> {
        if self.len_min > 0 && file.metadata()?.len() < self.len_min {
            file.set_len(self.len_min)?;
        }
        for (offset, bytes) in self.iter() {
            file.write_all_at(bytes, offset)?;
        }
        file.sync_all()
    }
}

impl std::fmt::Debug for FilePatch {
    /// Never prints contents: they may hold secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FilePatch({} pieces, {} bytes, at least {} long)", self.writes.len(), self.bytes(), self.len_min)
    }
}
