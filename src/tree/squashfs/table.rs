//! The superblock, metadata blocks, and the tables that are made of them.

use std::{cell::Cell, collections::HashMap, fs::File, io, os::unix::fs::FileExt, rc::Rc};

use super::{Checked, MAGIC, NAME_LEN_MAX, Name, Refusal, inode::Listing};
use crate::error::{Error, Stage};

/// Bytes of a metadata block, uncompressed, at most.
const META_LEN: usize = 8192;
const SUPERBLOCK_LEN: usize = 96;
/// Metadata blocks kept, decompressed: 4 MiB.
const CACHED_BLOCKS: usize = 512;
/// Fragment blocks kept, decompressed: at most 8 MiB.
const CACHED_FRAGMENTS: usize = 8;
/// What a block size in a file and a fragment have for "stored as it is".
const STORED: u32 = 1 << 24;
/// A table that is not there.
const NO_TABLE: u64 = u64::MAX;
/// Owners at most: their numbers have 16 bits.
const OWNERS_MAX: usize = 65536;
/// Memory that an xz decoder may take: its dictionary is at most a block.
const XZ_MEMORY: u64 = 32 << 20;

/// An input that is read where it is needed.
pub trait ReadAt {
    /// Fills the buffer from `offset` on.
    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()>;
    /// Bytes of the input.
    fn len(&self) -> io::Result<u64>;
    /// Whether there are none.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Told how far the input has been used, for whoever shows progress.
    fn used(&self, _offset: u64) {}
}

impl ReadAt for File {
    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, out, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn used(&self, offset: u64) {
        use std::io::{Seek, SeekFrom};
        // Whoever shares the descriptor sees it (worker); where it stands means nothing here.
        let _unseekable = (&mut &*self).seek(SeekFrom::Start(offset));
    }
}

impl ReadAt for &[u8] {
    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).ok();
        let part = start.and_then(|start| self.get(start..start.checked_add(out.len())?));
        out.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(<[u8]>::len(self) as u64)
    }
}

/// How blocks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compressor {
    Gzip,
    Xz,
    Lz4,
    Zstd,
}

impl Compressor {
    fn of(number: u16) -> Checked<Compressor> {
        Ok(match number {
            1 => Compressor::Gzip,
            4 => Compressor::Xz,
            5 => Compressor::Lz4,
            6 => Compressor::Zstd,
            2 => return Err(Refusal::unsupported("the image is compressed with lzma; gzip, xz, zstd and lz4 are read")),
            3 => return Err(Refusal::unsupported("the image is compressed with lzo; gzip, xz, zstd and lz4 are read")),
            other => return Err(Refusal::corrupt(format!("the image is compressed with number {other}, which means nothing"))),
        })
    }

    /// At most `len_max` bytes; more is damage.
    fn decompress(self, input: &[u8], len_max: usize) -> Checked<Vec<u8>> {
        use std::io::Read;
        let damaged = |why: String| Refusal::corrupt(format!("a block can't be decompressed: {why}"));
        let all = |reader: &mut dyn Read| {
            let mut out = Vec::new();
            reader.take(len_max as u64 + 1).read_to_end(&mut out).map_err(|error| damaged(error.to_string()))?;
            Ok::<_, Refusal>(out)
        };
        let out = match self {
            Compressor::Gzip => all(&mut flate2::bufread::ZlibDecoder::new(input))?,
            Compressor::Xz => {
                let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, 0).map_err(|error| damaged(error.to_string()))?;
                all(&mut liblzma::bufread::XzDecoder::new_stream(input, stream))?
            }
            Compressor::Lz4 => {
                let mut out = vec![0; len_max];
                let len = lz4_flex::block::decompress_into(input, &mut out).map_err(|error| damaged(error.to_string()))?;
                out.truncate(len);
                out
            }
            Compressor::Zstd => zstd::bulk::decompress(input, len_max).map_err(|error| damaged(error.to_string()))?,
        };
        match out.len() > len_max {
            true => Err(damaged(format!("it has more than {len_max} bytes"))),
            false => Ok(out),
        }
    }
}

/// Little-endian numbers out of bytes, in order.
pub(super) struct Fields<'f>(pub &'f [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Checked<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>().ok_or_else(|| Refusal::corrupt("a structure ends too early"))?;
        self.0 = rest;
        Ok(*first)
    }

    pub fn u16(&mut self) -> Checked<u16> {
        self.take().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Checked<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Checked<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

/// Where a block of data is, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    pub offset: u64,
    /// Length and the bit [`STORED`].
    pub word: u32,
}

impl Stored {
    /// Bytes in the image; nothing for a hole.
    pub fn len(self) -> u32 {
        self.word & (STORED - 1)
    }
}

/// A metadata block, and where the next one begins.
#[derive(Clone)]
struct MetaBlock {
    bytes: Rc<Vec<u8>>,
    next: u64,
}

/// A place in a row of metadata blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor {
    block: u64,
    offset: usize,
}

/// An opened image.
pub(super) struct Image<'i> {
    input: &'i dyn ReadAt,
    len: u64,
    compressor: Compressor,
    block_len: u32,
    root: u64,
    inode_table: u64,
    directory_table: u64,
    owners: Vec<u32>,
    fragment_count: u32,
    fragment_table: u64,
    pub(super) xattr_table: Option<XattrTable>,
    cache: HashMap<u64, MetaBlock>,
    /// The fragment blocks that were used last: files that share one are neighbours.
    fragments: Vec<(u32, Rc<Vec<u8>>)>,
    /// Bytes that blocks may still have, those counted twice that are read twice.
    work: Cell<u64>,
}

/// Where extended attributes are.
#[derive(Debug, Clone, Copy)]
pub(super) struct XattrTable {
    /// What references into the pairs are relative to.
    pub pairs: u64,
    pub count: u32,
    /// Where the pointers to the blocks of the index are.
    pub index: u64,
}

impl<'i> Image<'i> {
    /// `work_max` is how many bytes all blocks may have that are read, those counted twice that are read twice.
    pub fn open(input: &'i dyn ReadAt, work_max: u64) -> Checked<Image<'i>> {
        let io = |doing: &'static str| move |error| Refusal::from(Error::io(Stage::Golden, "squashfs image", doing, error));
        let file_len = input.len().map_err(io("read its size"))?;
        let mut block = [0; SUPERBLOCK_LEN];
        if file_len < SUPERBLOCK_LEN as u64 {
            return Err(truncated(format!("the image has {file_len} bytes, its superblock {SUPERBLOCK_LEN}")));
        }
        input.read_exact_at(&mut block, 0).map_err(io("read its superblock"))?;
        if block[..4] != MAGIC {
            return Err(Refusal::corrupt("is no squashfs image"));
        }
        let mut fields = Fields(&block[4..]);
        let (_inodes, _time, block_len, fragment_count) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
        let (compressor, block_log, _flags, owner_count) = (fields.u16()?, fields.u16()?, fields.u16()?, fields.u16()?);
        let (major, minor) = (fields.u16()?, fields.u16()?);
        let (root, len) = (fields.u64()?, fields.u64()?);
        let (owner_table, xattr_table, inode_table) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let (directory_table, fragment_table) = (fields.u64()?, fields.u64()?);
        if (major, minor) != (4, 0) {
            return Err(Refusal::unsupported(format!("the image has version {major}.{minor}, known is 4.0")));
        }
        if !(12..=20).contains(&block_log) || block_len != 1 << block_log {
            return Err(Refusal::corrupt(format!("blocks of {block_len} bytes (2^{block_log})")));
        }
        if len > file_len {
            return Err(truncated(format!("the image has {len} bytes, {file_len} are there")));
        }
        let mut image = Image {
            input,
            len,
            compressor: Compressor::of(compressor)?,
            block_len,
            root,
            inode_table,
            directory_table,
            owners: Vec::new(),
            fragment_count,
            fragment_table,
            xattr_table: None,
            cache: HashMap::new(),
            fragments: Vec::new(),
            work: Cell::new(work_max),
        };
        image.read_owners(owner_table, usize::from(owner_count))?;
        if xattr_table != NO_TABLE {
            let mut header = [0; 16];
            image.read_at(&mut header, xattr_table)?;
            let mut fields = Fields(&header);
            image.xattr_table = Some(XattrTable { pairs: fields.u64()?, count: fields.u32()?, index: xattr_table + 16 });
        }
        Ok(image)
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn root(&self) -> u64 {
        self.root
    }

    pub fn block_len(&self) -> u32 {
        self.block_len
    }

    /// Tells whoever watches how far the content is.
    pub fn used(&self, offset: u64) {
        self.input.used(offset);
    }

    /// Only what belongs to the image.
    fn read_at(&self, out: &mut [u8], offset: u64) -> Checked<()> {
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > self.len) {
            return Err(truncated(format!("{} bytes at {offset} are beyond the image's end at {}", out.len(), self.len)));
        }
        let failed = |error| Refusal::from(Error::io(Stage::Golden, "squashfs image", "read it", error));
        self.input.read_exact_at(out, offset).map_err(failed)
    }

    /// A block of content; `len_max` is what it may have.
    pub fn block(&self, stored: Stored, len_max: usize) -> Checked<Vec<u8>> {
        let len = stored.len() as usize;
        if len > self.block_len as usize {
            return Err(Refusal::corrupt(format!("a stored block of {len} bytes, blocks have {}", self.block_len)));
        }
        let mut bytes = vec![0; len];
        self.read_at(&mut bytes, stored.offset)?;
        self.unpacked(bytes, stored.word & STORED != 0, len_max)
    }

    /// What a block consists of, which is paid for.
    fn unpacked(&self, bytes: Vec<u8>, is_stored: bool, len_max: usize) -> Checked<Vec<u8>> {
        let out = if is_stored { bytes } else { self.compressor.decompress(&bytes, len_max)? };
        let left = self.work.get().checked_sub(out.len() as u64);
        self.work.set(left.ok_or_else(|| Refusal::limit("the same blocks are needed again and again"))?);
        Ok(out)
    }

    fn meta_block(&mut self, at: u64) -> Checked<MetaBlock> {
        if let Some(block) = self.cache.get(&at) {
            return Ok(block.clone());
        }
        let mut header = [0; 2];
        self.read_at(&mut header, at)?;
        let header = u16::from_le_bytes(header);
        let (is_stored, len) = (header & 0x8000 != 0, usize::from(header & 0x7fff));
        if len > META_LEN {
            return Err(Refusal::corrupt(format!("a metadata block of {len} bytes at {at}")));
        }
        let mut bytes = vec![0; len];
        self.read_at(&mut bytes, at + 2)?;
        let block = MetaBlock { bytes: Rc::new(self.unpacked(bytes, is_stored, META_LEN)?), next: at + 2 + len as u64 };
        if self.cache.len() >= CACHED_BLOCKS {
            self.cache.clear();
        }
        self.cache.insert(at, block.clone());
        Ok(block)
    }

    /// A place that a reference (block in the upper 48 bits, offset in the lower 16) into the row at `start` means.
    pub fn cursor(&self, start: u64, reference: u64) -> Checked<Cursor> {
        let (block, offset) = (reference >> 16, (reference & 0xffff) as usize);
        let block = start.checked_add(block).filter(|_| offset < META_LEN);
        Ok(Cursor { block: block.ok_or_else(|| Refusal::corrupt("a reference leads nowhere"))?, offset })
    }

    /// A place of the inode table.
    pub fn inode_cursor(&self, reference: u64) -> Checked<Cursor> {
        self.cursor(self.inode_table, reference)
    }

    /// The next bytes of a row of metadata blocks.
    pub fn take(&mut self, cursor: &mut Cursor, out: &mut [u8]) -> Checked<()> {
        let mut done = 0;
        while done < out.len() {
            let block = self.meta_block(cursor.block)?;
            let rest = block.bytes.get(cursor.offset..).unwrap_or_default();
            // Only the last block of a row may be short.
            if rest.is_empty() {
                return Err(Refusal::corrupt("a structure goes on beyond its table"));
            }
            let len = rest.len().min(out.len() - done);
            out[done..done + len].copy_from_slice(&rest[..len]);
            done += len;
            cursor.offset += len;
            if cursor.offset == META_LEN {
                *cursor = Cursor { block: block.next, offset: 0 };
            }
        }
        Ok(())
    }

    /// The same, as an array.
    pub fn take_array<const N: usize>(&mut self, cursor: &mut Cursor) -> Checked<[u8; N]> {
        let mut out = [0; N];
        self.take(cursor, &mut out)?;
        Ok(out)
    }

    /// Entry `number` of a table with `entry_len` bytes an entry, whose blocks are pointed to at `pointers`.
    pub fn entry<const N: usize>(&mut self, pointers: u64, number: u32) -> Checked<[u8; N]> {
        let at = u64::from(number) * N as u64;
        let mut pointer = [0; 8];
        let place = pointers.checked_add(at / META_LEN as u64 * 8).ok_or_else(|| Refusal::corrupt("a table is nowhere"))?;
        self.read_at(&mut pointer, place)?;
        let mut cursor = Cursor { block: u64::from_le_bytes(pointer), offset: (at % META_LEN as u64) as usize };
        self.take_array(&mut cursor)
    }

    fn read_owners(&mut self, table: u64, count: usize) -> Checked<()> {
        debug_assert!(count <= OWNERS_MAX);
        for number in 0..count {
            let bytes = self.entry::<4>(table, number as u32)?;
            self.owners.push(u32::from_le_bytes(bytes));
        }
        Ok(())
    }

    /// An owner or group by its number in the table.
    pub fn owner(&self, number: u16) -> Checked<u32> {
        self.owners.get(usize::from(number)).copied().ok_or_else(|| Refusal::corrupt(format!("owner number {number} of {}", self.owners.len())))
    }

    /// The content of a fragment block.
    pub fn fragment(&mut self, number: u32) -> Checked<Rc<Vec<u8>>> {
        if let Some((_, bytes)) = self.fragments.iter().find(|(known, _)| *known == number) {
            return Ok(Rc::clone(bytes));
        }
        if number >= self.fragment_count {
            return Err(Refusal::corrupt(format!("fragment {number} of {}", self.fragment_count)));
        }
        let entry = self.entry::<16>(self.fragment_table, number)?;
        let mut fields = Fields(&entry);
        let stored = Stored { offset: fields.u64()?, word: fields.u32()? };
        let bytes = Rc::new(self.block(stored, self.block_len as usize)?);
        if self.fragments.len() >= CACHED_FRAGMENTS {
            self.fragments.remove(0);
        }
        self.fragments.push((number, Rc::clone(&bytes)));
        Ok(bytes)
    }

    /// The names of a directory, at most `count_max`.
    pub fn names(&mut self, listing: &Listing, count_max: u64) -> Checked<Vec<Name>> {
        let mut cursor = self.cursor(self.directory_table, u64::from(listing.block) << 16 | u64::from(listing.offset))?;
        let mut left = u64::from(listing.len);
        let mut spend = |len: u64| {
            left = left.checked_sub(len).ok_or_else(|| Refusal::corrupt("the directory is longer than its inode says"))?;
            Ok::<u64, Refusal>(left)
        };
        let mut names: Vec<Name> = Vec::new();
        while spend(0)? > 0 {
            spend(12)?;
            let header = self.take_array::<12>(&mut cursor)?;
            let mut fields = Fields(&header);
            let (count, block) = (fields.u32()?, fields.u32()?);
            if count >= 256 {
                return Err(Refusal::corrupt(format!("a run of {count} names in the directory")));
            }
            for _ in 0..=count {
                let entry = self.take_array::<8>(&mut cursor)?;
                let mut fields = Fields(&entry);
                let (offset, _number, _kind, len) = (fields.u16()?, fields.u16()?, fields.u16()?, usize::from(fields.u16()?) + 1);
                if len > NAME_LEN_MAX {
                    return Err(Refusal::corrupt(format!("a name of {len} bytes in the directory")));
                }
                spend(8 + len as u64)?;
                let mut name = vec![0; len];
                self.take(&mut cursor, &mut name)?;
                if matches!(name.as_slice(), b"." | b"..") || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
                    return Err(Refusal::corrupt(format!("the name {:?} in the directory", String::from_utf8_lossy(&name))));
                }
                if names.last().is_some_and(|before| before.name >= name) {
                    return Err(Refusal::corrupt(format!("the name {:?} is out of order, or there twice", String::from_utf8_lossy(&name))));
                }
                names.push(Name { name, inode: u64::from(block) << 16 | u64::from(offset) });
                if names.len() as u64 > count_max {
                    return Err(Refusal::limit("the image has too many names"));
                }
            }
        }
        Ok(names)
    }
}

fn truncated(message: String) -> Refusal {
    Refusal { reason: "ARCHIVE_TRUNCATED", ..Refusal::corrupt(message) }
}
