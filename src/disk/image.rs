//! A disk seen through the blocks that change: reads fall through to the file below, writes stay in memory.
//!
//! The partition-table code writes to a seekable stream. Given this one, the same code makes a new table in a golden file and computes the patch
//! of an instance, and can't touch anything but blocks that end up in the patch.

use std::{
    collections::BTreeMap,
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
};

use crate::{
    fs::{Region, patch::BlockPatch},
    units::PATCH_BLOCK,
};

/// The changed blocks of a disk of `len` bytes over `base`. What lies beyond the base reads as zeros.
pub(super) struct DiskImage<'a> {
    base: &'a Region,
    len: u64,
    position: u64,
    blocks: BTreeMap<u64, Box<[u8]>>,
}

impl<'a> DiskImage<'a> {
    /// `len` is a multiple of 4096.
    pub(super) fn new(base: &'a Region, len: u64) -> Self {
        DiskImage { base, len, position: 0, blocks: BTreeMap::new() }
    }

    /// Block `number` as the base has it.
    fn base_block(&self, number: u64) -> io::Result<Box<[u8]>> {
        let mut block = vec![0; PATCH_BLOCK as usize].into_boxed_slice();
        let start = number * PATCH_BLOCK;
        if start < self.base.len {
            let len = (self.base.len - start).min(PATCH_BLOCK) as usize;
            read_full_at(self.base, &mut block[..len], start)?;
        }
        Ok(block)
    }

    /// Puts zeros over whole blocks.
    pub(super) fn zero_blocks(&mut self, numbers: std::ops::Range<u64>) {
        for number in numbers {
            self.blocks.insert(number, vec![0; PATCH_BLOCK as usize].into());
        }
    }

    /// The blocks that differ from the base, as a patch of the whole disk.
    pub(super) fn into_patch(self) -> io::Result<BlockPatch> {
        let mut patch = BlockPatch::new(self.len);
        let blocks = self.blocks.clone();
        for (number, block) in blocks {
            if self.base_block(number)? != block {
                patch.insert(number, block);
            }
        }
        Ok(patch)
    }

    /// The part of one block that a transfer of `wanted` bytes at the current position covers: block number, offset in it, length.
    fn piece(&self, wanted: usize) -> Option<(u64, usize, usize)> {
        if self.position >= self.len {
            return None;
        }
        let within = (self.position % PATCH_BLOCK) as usize;
        let len = wanted.min(PATCH_BLOCK as usize - within).min(usize::try_from(self.len - self.position).unwrap_or(usize::MAX));
        Some((self.position / PATCH_BLOCK, within, len))
    }
}

/// Reads at `offset` of the region; bytes past the end of the file read as zeros, since a sparse disk file may be shorter than its region.
pub(super) fn read_full_at(region: &Region, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let start = region.offset.checked_add(offset).ok_or(io::ErrorKind::InvalidInput)?;
    let mut done = 0;
    while done < buffer.len() {
        match region.file.read_at(&mut buffer[done..], start + done as u64) {
            Ok(0) => {
                buffer[done..].fill(0);
                return Ok(());
            }
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Read for DiskImage<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some((number, within, len)) = self.piece(buffer.len()) else { return Ok(0) };
        match self.blocks.get(&number) {
            Some(block) => buffer[..len].copy_from_slice(&block[within..within + len]),
            None => buffer[..len].copy_from_slice(&self.base_block(number)?[within..within + len]),
        }
        self.position += len as u64;
        Ok(len)
    }
}

impl Write for DiskImage<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let Some((number, within, len)) = self.piece(buffer.len()) else { return Ok(0) };
        if !self.blocks.contains_key(&number) {
            let block = self.base_block(number)?;
            self.blocks.insert(number, block);
        }
        let block = self.blocks.get_mut(&number).expect("the block was put there above");
        block[within..within + len].copy_from_slice(&buffer[..len]);
        self.position += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for DiskImage<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(delta) => self.len.checked_add_signed(delta),
            SeekFrom::Current(delta) => self.position.checked_add_signed(delta),
        };
        self.position = position.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        Ok(self.position)
    }
}
