//! Compression inside kernels and initrds. It is not that of archives ([`crate::tree::decompress`]): one stream ends where it ends, other bytes follow,
//! and the kernel's own build knows formats (lzma, lz4's legacy frame) that no archive here has.

use std::io::{self, BufRead, Read};

use serde::{Deserialize, Serialize};

use crate::units::MIB;

/// Window of a decoder, bytes: the kernel's build packs with `xz --lzma2=dict=32MiB` (scripts/xz_wrap.sh) and `zstd -22 --ultra` (128 MiB).
const MEMORY_MAX: u64 = 160 * MIB;
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// Uncompressed bytes of a block in lz4's legacy frame (lz4_Frame_format.md); no block is compressed to more than the bound.
const LZ4_BLOCK_LEN: usize = 8 << 20;
const LZ4_COMPRESSED_MAX: usize = LZ4_BLOCK_LEN + LZ4_BLOCK_LEN / 255 + 16;
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// How a kernel's payload, an initrd or a module is compressed: the kernel's own list (lib/decompress.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard.
    Zstd,
    /// lz4, the legacy frame.
    Lz4,
    /// LZMA alone.
    Lzma,
    /// bzip2.
    Bzip2,
    /// lzop; recognised, not read.
    Lzo,
}

impl Packing {
    /// What the first bytes say.
    pub fn detect(first: &[u8]) -> Option<Packing> {
        Some(match first {
            [0x1f, 0x8b, ..] | [0x1f, 0x9e, ..] => Packing::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Packing::Xz,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Packing::Zstd,
            [0x02, 0x21, 0x4c, 0x18, ..] => Packing::Lz4,
            [0x5d, 0, 0, ..] => Packing::Lzma,
            [b'B', b'Z', b'h', ..] => Packing::Bzip2,
            [0x89, b'L', b'Z', b'O', ..] => Packing::Lzo,
            _ => return None,
        })
    }

    /// The name in documents and messages.
    pub fn name(self) -> &'static str {
        match self {
            Packing::Gzip => "gzip",
            Packing::Xz => "xz",
            Packing::Zstd => "zstd",
            Packing::Lz4 => "lz4",
            Packing::Lzma => "lzma",
            Packing::Bzip2 => "bzip2",
            Packing::Lzo => "lzo",
        }
    }

    /// Decodes one stream; `input` is left behind it when the decoder was read to its end.
    pub fn decoder<'a, R: BufRead + 'a>(self, input: R) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Packing::Gzip => Box::new(flate2::bufread::GzDecoder::new(input)),
            Packing::Bzip2 => Box::new(bzip2::bufread::BzDecoder::new(input)),
            Packing::Xz => Box::new(liblzma::bufread::XzDecoder::new_stream(input, liblzma::stream::Stream::new_stream_decoder(MEMORY_MAX, 0)?)),
            Packing::Lzma => Box::new(liblzma::bufread::XzDecoder::new_stream(input, liblzma::stream::Stream::new_lzma_decoder(MEMORY_MAX)?)),
            Packing::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(input)?.single_frame();
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Box::new(decoder)
            }
            Packing::Lz4 => Box::new(Lz4Legacy { input, block: Vec::new(), at: 0, begun: false }),
            Packing::Lzo => return Err(io::Error::new(io::ErrorKind::Unsupported, "lzo is not read")),
        })
    }
}

/// lz4's legacy frame: magic, then blocks of a length (32 bits, little endian) and that many bytes, until the input ends or a length is none.
struct Lz4Legacy<R> {
    input: R,
    block: Vec<u8>,
    at: usize,
    begun: bool,
}

impl<R: BufRead> Lz4Legacy<R> {
    /// The next four bytes; nothing at the end of the input.
    fn word(&mut self) -> io::Result<Option<[u8; 4]>> {
        let mut word = [0; 4];
        match self.input.read_exact(&mut word) {
            Ok(()) => Ok(Some(word)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether there was another block.
    fn next_block(&mut self) -> io::Result<bool> {
        let corrupt = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        if !self.begun {
            if self.word()? != Some(LZ4_LEGACY) {
                return Err(corrupt("no lz4 legacy frame"));
            }
            self.begun = true;
        }
        let len = loop {
            match self.word()? {
                None | Some([0, 0, 0, 0]) => return Ok(false),
                // Another frame: what `cat` of two makes.
                Some(LZ4_LEGACY) => {}
                Some(word) => break usize::try_from(u32::from_le_bytes(word)).unwrap_or(usize::MAX),
            }
        };
        // The kernel's build puts the uncompressed length behind the last block (scripts/Makefile.lib, size_append).
        if len > LZ4_COMPRESSED_MAX {
            return Ok(false);
        }
        let mut packed = Vec::new();
        (&mut self.input).take(len as u64).read_to_end(&mut packed)?;
        if packed.len() < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.block.resize(LZ4_BLOCK_LEN, 0);
        let plain = lz4_flex::block::decompress_into(&packed, &mut self.block).map_err(|error| corrupt(&error.to_string()))?;
        self.block.truncate(plain);
        self.at = 0;
        Ok(true)
    }
}

impl<R: BufRead> Read for Lz4Legacy<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.at == self.block.len() && !out.is_empty() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let len = out.len().min(self.block.len() - self.at);
        out[..len].copy_from_slice(&self.block[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;

    pub(crate) fn pack(packing: Packing, plain: &[u8]) -> Vec<u8> {
        match packing {
            Packing::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(plain).and_then(|()| encoder.finish()).expect("gzip")
            }
            Packing::Bzip2 => {
                let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
                encoder.write_all(plain).and_then(|()| encoder.finish()).expect("bzip2")
            }
            Packing::Zstd => zstd::encode_all(plain, 1).expect("zstd"),
            Packing::Xz | Packing::Lzma => {
                let options = liblzma::stream::LzmaOptions::new_preset(0).expect("options");
                let stream = match packing {
                    Packing::Lzma => liblzma::stream::Stream::new_lzma_encoder(&options),
                    _ => liblzma::stream::Stream::new_easy_encoder(0, liblzma::stream::Check::Crc32),
                };
                let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream.expect("an encoder"));
                encoder.write_all(plain).and_then(|()| encoder.finish()).expect("xz")
            }
            // Literals only: a token with the length, then the bytes (lz4_Block_format.md).
            Packing::Lz4 => {
                let mut out = LZ4_LEGACY.to_vec();
                for chunk in plain.chunks(LZ4_BLOCK_LEN) {
                    let mut block = Vec::new();
                    if chunk.len() < 15 {
                        block.push((chunk.len() as u8) << 4);
                    } else {
                        block.push(0xf0);
                        block.extend(std::iter::repeat_n(255, (chunk.len() - 15) / 255));
                        block.push(((chunk.len() - 15) % 255) as u8);
                    }
                    block.extend_from_slice(chunk);
                    out.extend((block.len() as u32).to_le_bytes());
                    out.extend(block);
                }
                out
            }
            Packing::Lzo => vec![0x89, b'L', b'Z', b'O'],
        }
    }

    pub(crate) const READ: [Packing; 6] = [Packing::Gzip, Packing::Xz, Packing::Zstd, Packing::Lz4, Packing::Lzma, Packing::Bzip2];

    #[test]
    fn each_stream_is_known_by_its_beginning_and_ends_where_it_ends() {
        let plain: Vec<u8> = (0..100_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for packing in READ {
            let mut bytes = pack(packing, &plain);
            assert_eq!(Packing::detect(&bytes), Some(packing));
            // A length that no block has.
            bytes.extend([0xf0; 8]);
            let mut input = &bytes[..];
            let mut out = Vec::new();
            packing.decoder(&mut input).expect("a decoder").read_to_end(&mut out).unwrap_or_else(|error| panic!("{packing:?}: {error}"));
            assert!(out == plain, "{packing:?}");
            assert_eq!(input.len(), if packing == Packing::Lz4 { 4 } else { 8 }, "{packing:?}");
        }
    }
}
