//! Any bytes as a compressed archive in each declared format, under small limits: what comes out is within them, and does not depend on how it is
//! read.

#![no_main]

use std::io::{Cursor, Read};

use cloudletd::{
    progress::Progress,
    tree::decompress::{self, Compression, Limits},
};
use libfuzzer_sys::fuzz_target;

const OUTPUT_MAX: u64 = 2 << 20;
/// What the decoder's thread may be ahead of its limits: one chunk.
const CHUNK: u64 = 256 << 10;
const ALL: [Compression; 5] = [Compression::None, Compression::Gzip, Compression::Xz, Compression::Zstd, Compression::Bzip2];

/// The output, and whether it ended well.
fn read(bytes: &[u8], media: Compression, buffer_len: usize) -> Option<(Vec<u8>, bool)> {
    let limits = Limits { output_bytes: OUTPUT_MAX, ratio: 100, ratio_free_bytes: 64 << 10, memory_bytes: 8 << 20 };
    let mut reader = decompress::open_with(Box::new(Cursor::new(bytes.to_vec())), media, limits, &Progress::default()).ok()?;
    let mut output = Vec::new();
    let mut buffer = vec![0; buffer_len];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Some((output, true)),
            Ok(len) => output.extend_from_slice(&buffer[..len]),
            Err(error) => {
                let error = cloudletd::tree::error_of_read(error, cloudletd::error::Stage::Golden, "archive", "read");
                assert!(!error.reason().is_empty(), "{}", error.chain());
                return Some((output, false));
            }
        }
        assert!(media == Compression::None || output.len() as u64 <= OUTPUT_MAX + CHUNK);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((media, bytes)) = bytes.split_first() else { return };
    let media = ALL[usize::from(*media) % ALL.len()];
    let detected = Compression::detect(&bytes[..bytes.len().min(decompress::DETECT_LEN)]);
    let Some((output, ended)) = read(bytes, media, 64 << 10) else { return };
    assert_eq!(detected, Some(media), "only what was declared is opened");
    if media == Compression::None {
        assert!(ended && output == bytes);
    }
    // What came before an error may differ by what was decoded ahead, what ended well may not.
    if ended && let Some((other, other_ended)) = read(bytes, media, 1 + bytes.len() % 777) {
        assert!(other_ended && other == output);
    }
    // A reader that nobody reads to the end stops its thread.
    if let Ok(reader) = decompress::open(Box::new(Cursor::new(bytes.to_vec())), media) {
        drop(reader);
    }
});
