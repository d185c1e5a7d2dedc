//! Compressed clusters: raw deflate streams or zstd frames that give exactly one cluster. What follows in the last sector is not theirs.

use std::io;

use flate2::{Decompress, FlushDecompress};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use super::header::Compression;

/// Largest zstd window, 2^this bytes: QEMU's is never larger than a cluster (2 MiB), other writers' levels go up to this.
const ZSTD_WINDOW_LOG_MAX: u32 = 24;

/// Decompresses to exactly `len` bytes.
pub(super) fn inflate(kind: Compression, compressed: &[u8], len: usize) -> io::Result<Vec<u8>> {
    let mut out = vec![0; len];
    let filled = match kind {
        Compression::Zlib => {
            let mut stream = Decompress::new(false);
            // Trailing bytes are no error, nor is a missing end when all of the cluster is there (QEMU takes both).
            stream.decompress(compressed, &mut out, FlushDecompress::Finish).map_err(invalid)?;
            stream.total_out() as usize
        }
        Compression::Zstd => {
            let mut decoder = Decoder::new()?;
            decoder.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX))?;
            let mut input = InBuffer::around(compressed);
            let mut output = OutBuffer::around(&mut out[..]);
            loop {
                let before = (input.pos(), output.pos());
                let left = decoder.run(&mut input, &mut output).map_err(invalid)?;
                // The end of the frame, no room, or no progress.
                if left == 0 || output.pos() == len || (input.pos(), output.pos()) == before {
                    break;
                }
            }
            output.pos()
        }
    };
    if filled == len { Ok(out) } else { Err(invalid(format!("a compressed cluster gives {filled} bytes instead of {len}"))) }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
