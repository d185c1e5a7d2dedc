use std::{io::Write, thread, time::Duration};

use proptest::prelude::*;

use super::*;
use crate::tree::error_of_read;

const ALL: [Compression; 5] = [Compression::None, Compression::Gzip, Compression::Xz, Compression::Zstd, Compression::Bzip2];
const COMPRESSED: [Compression; 4] = [Compression::Gzip, Compression::Xz, Compression::Zstd, Compression::Bzip2];

/// Compressible, not constant, and a tar header at the start.
fn sample(len: usize) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_path("f").expect("short");
    header.set_size(len.saturating_sub(512) as u64);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    let mut state = 1u32;
    bytes.extend((512..len).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 29) as u8
    }));
    bytes
}

fn compress(bytes: &[u8], media: Compression) -> Vec<u8> {
    match media {
        Compression::None => bytes.to_vec(),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).expect("to memory");
            encoder.finish().expect("to memory")
        }
        Compression::Xz => {
            let stream = liblzma::stream::MtStreamBuilder::new().preset(0).threads(1).block_size(64 * 1024).encoder().expect("an encoder");
            let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
            encoder.write_all(bytes).expect("to memory");
            encoder.finish().expect("to memory")
        }
        Compression::Zstd => zstd::encode_all(bytes, 1).expect("to memory"),
        Compression::Squashfs => unreachable!("is no archive"),
        Compression::Bzip2 => {
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            encoder.write_all(bytes).expect("to memory");
            encoder.finish().expect("to memory")
        }
    }
}

fn decompress(bytes: &[u8], media: Compression, limits: Limits) -> Result<Vec<u8>> {
    let mut reader = open_with(Box::new(io::Cursor::new(bytes.to_vec())), media, limits, &Progress::default())?;
    let mut out = Vec::new();
    reader.read_to_end(&mut out).map_err(|error| error_of_read(error, STAGE, OBJECT, "read"))?;
    Ok(out)
}

#[test]
fn every_format_gives_back_what_went_in_also_in_several_members() {
    for len in [1024, 300_000, 3_000_000] {
        let bytes = sample(len);
        for media in ALL {
            assert!(decompress(&compress(&bytes, media), media, Limits::default()).expect("valid") == bytes, "{media:?} {len}");
            let halves = [compress(&bytes[..len / 2], media), compress(&bytes[len / 2..], media)].concat();
            assert!(decompress(&halves, media, Limits::default()).expect("valid") == bytes, "{media:?} {len} in two members");
        }
    }
}

#[test]
fn what_is_declared_must_be_what_is_there() {
    let bytes = sample(2048);
    for real in ALL {
        for declared in ALL.into_iter().filter(|declared| *declared != real) {
            let error = decompress(&compress(&bytes, real), declared, Limits::default()).expect_err("a lie");
            assert_eq!((error.kind(), error.reason()), (Kind::InvalidRequest, "FORMAT_MISMATCH"), "{error:?}");
            assert!(error.message().contains(declared.name()) && error.message().contains(real.name()), "{error:?}");
        }
    }
    for garbage in [b"".as_slice(), b"<html>not found</html>", &[7; 600]] {
        for media in ALL {
            let error = decompress(garbage, media, Limits::default()).expect_err("no archive");
            assert_eq!((error.kind(), error.reason()), (Kind::Corrupt, "FORMAT_UNKNOWN"));
        }
    }
    assert_eq!(Compression::detect(b"BZh9 is a fine file name"), None);
    let mut header = tar::Header::new_ustar();
    header.set_path("BZh91AY&SY").expect("short");
    header.set_cksum();
    assert_eq!(Compression::detect(header.as_bytes()), Some(Compression::None));
}

#[test]
fn truncation_at_any_place_and_trailing_garbage_are_corruption() {
    let bytes = sample(200_000);
    for media in COMPRESSED {
        let compressed = compress(&bytes, media);
        for len in [20, 600, compressed.len() / 2, compressed.len() - 9, compressed.len() - 4, compressed.len() - 1] {
            let error = decompress(&compressed[..len], media, Limits::default()).expect_err("truncated");
            assert_eq!((error.kind(), error.reason()), (Kind::Corrupt, "DECOMPRESS_TRUNCATED"), "{media:?} {len}: {error:?}");
        }
        for garbage in [b"x".as_slice(), b"garbage and more of it, long enough to be a header", &[0xff; 1000]] {
            let error = decompress(&[&compressed, garbage].concat(), media, Limits::default()).expect_err("garbage");
            assert_eq!(error.kind(), Kind::Corrupt, "{media:?} {garbage:?}: {error:?}");
        }
    }
    // The padding that the xz format knows, and one that it does not.
    let compressed = compress(&bytes, Compression::Xz);
    let padded = [&compressed, &[0; 8][..], &compressed, &[0; 4]].concat();
    assert_eq!(decompress(&padded, Compression::Xz, Limits::default()).expect("valid").len(), 2 * bytes.len());
    assert!(decompress(&[&compressed, &[0; 3][..]].concat(), Compression::Xz, Limits::default()).is_err());
}

#[test]
fn a_flipped_bit_is_noticed() {
    let bytes = sample(200_000);
    for media in [Compression::Gzip, Compression::Xz, Compression::Bzip2] {
        let mut compressed = compress(&bytes, media);
        let middle = compressed.len() / 2;
        compressed[middle] ^= 0x10;
        let error = decompress(&compressed, media, Limits::default()).expect_err("damaged");
        assert_eq!(error.kind(), Kind::Corrupt, "{media:?}: {error:?}");
    }
}

#[test]
fn bombs_stop_at_the_ratio_or_at_the_total() {
    let zeros = vec![0; 8 << 20];
    for media in [Compression::Xz, Compression::Zstd, Compression::Bzip2] {
        let bomb = compress(&zeros, media);
        let limits = Limits { ratio: 100, ratio_free_bytes: 1 << 20, ..Limits::default() };
        assert!(decompress(&bomb, media, Limits::default()).is_ok(), "{media:?}: zeros are legitimate");
        let Err(error) = decompress(&bomb, media, limits) else { panic!("{media:?}: a bomb was taken") };
        assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "DECOMPRESS_LIMIT"), "{media:?} {error:?}");
        let error = decompress(&bomb, media, Limits { output_bytes: 5 << 20, ..Limits::default() }).expect_err("too long");
        assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "DECOMPRESS_LIMIT"), "{media:?} {error:?}");
    }
}

#[test]
fn windows_beyond_the_memory_limit_are_refused() {
    let bytes = sample(2 << 20);
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).expect("an encoder");
    encoder.window_log(21).expect("allowed");
    encoder.write_all(&bytes).expect("to memory");
    let compressed = encoder.finish().expect("to memory");
    let limits = |memory_bytes| Limits { memory_bytes, ..Limits::default() };
    assert!(decompress(&compressed, Compression::Zstd, limits(2 * MIB)).is_ok());
    let error = decompress(&compressed, Compression::Zstd, limits(MIB)).expect_err("too large");
    assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "DECOMPRESS_LIMIT"), "{error:?}");

    let stream = liblzma::stream::Stream::new_easy_encoder(6, liblzma::stream::Check::Crc64).expect("an encoder");
    let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
    encoder.write_all(&bytes).expect("to memory");
    let compressed = encoder.finish().expect("to memory");
    let error = decompress(&compressed, Compression::Xz, limits(4 * MIB)).expect_err("-6 needs 9 MiB");
    assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "DECOMPRESS_LIMIT"), "{error:?}");
}

#[test]
fn errors_of_the_input_keep_their_kind_and_cancelling_works() {
    struct Broken(io::Cursor<Vec<u8>>);
    impl Read for Broken {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            match self.0.read(out)? {
                0 => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
                len => Ok(len),
            }
        }
    }
    /// Members without end.
    struct Endless(Vec<u8>, usize);
    impl Read for Endless {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let len = (&self.0[self.1..]).read(out)?;
            self.1 = (self.1 + len) % self.0.len();
            Ok(len)
        }
    }
    let bytes = sample(500_000);
    for media in ALL {
        let mut compressed = compress(&bytes, media);
        compressed.truncate(compressed.len() / 2);
        let mut reader = open(Box::new(Broken(io::Cursor::new(compressed))), media).expect("the beginning is there");
        let error = io::copy(&mut reader, &mut io::sink()).expect_err("the disk is full");
        assert_eq!(error_of_read(error, STAGE, "", "").kind(), Kind::NoSpace, "{media:?}");

        let progress = Progress::default();
        let mut reader = open_with(Box::new(Endless(compress(&bytes, media), 0)), media, Limits::default(), &progress).expect("valid");
        progress.cancel();
        let error = io::copy(&mut reader, &mut io::sink()).expect_err("cancelled");
        assert_eq!(error_of_read(error, STAGE, "", "").kind(), Kind::Cancelled, "{media:?}");
    }
}

#[test]
fn progress_counts_compressed_bytes() {
    let bytes = sample(500_000);
    for media in ALL {
        let compressed = compress(&bytes, media);
        let progress = Progress::default();
        let mut reader = open_with(Box::new(io::Cursor::new(compressed.clone())), media, Limits::default(), &progress).expect("valid");
        io::copy(&mut reader, &mut io::sink()).expect("valid");
        assert_eq!(progress.reading().bytes_done, compressed.len() as u64, "{media:?}");
    }
}

#[test]
fn a_reader_dropped_early_ends_its_thread() {
    let bytes = sample(8 << 20);
    for media in COMPRESSED {
        let mut reader = open(Box::new(io::Cursor::new(compress(&bytes, media))), media).expect("valid");
        let mut first = [0; 100];
        reader.read_exact(&mut first).expect("valid");
        // Let the thread fill every chunk and wait for room.
        thread::sleep(Duration::from_millis(20));
        let dropper = thread::spawn(move || drop(reader));
        let waited = (0..500).any(|_| {
            thread::sleep(Duration::from_millis(10));
            dropper.is_finished()
        });
        assert!(waited, "{media:?}: the drop hangs");
    }
}

#[test]
fn a_squashfs_image_is_known_and_is_no_archive() {
    let image = [b"hsqs".as_slice(), &[0; 92]].concat();
    assert_eq!(Compression::detect(&image), Some(Compression::Squashfs));
    assert_eq!(Compression::from_media_type("application/vnd.squashfs"), Some(Compression::Squashfs));
    assert_eq!(Compression::from_file_name("rootfs.SQUASHFS"), Some(Compression::Squashfs));
    for declared in [Compression::Squashfs, Compression::Xz] {
        let error = open_with(Box::new(io::Cursor::new(image.clone())), declared, Limits::default(), &Progress::default()).err().expect("refused");
        assert_eq!(error.reason(), "FORMAT_MISMATCH");
    }
}

#[test]
fn media_types_and_names_are_known() {
    for (text, want) in [
        ("application/x-tar", Some(Compression::None)),
        ("application/vnd.oci.image.layer.v1.tar+gzip", Some(Compression::Gzip)),
        ("Application/GZIP; charset=binary", Some(Compression::Gzip)),
        ("application/vnd.oci.image.layer.v1.tar+zstd", Some(Compression::Zstd)),
        ("application/x-xz", Some(Compression::Xz)),
        ("application/x-bzip2", Some(Compression::Bzip2)),
        ("application/octet-stream", None),
        ("text/html", None),
    ] {
        assert_eq!(Compression::from_media_type(text), want, "{text}");
    }
    assert_eq!(Compression::from_file_name("Debian.TAR.zst"), Some(Compression::Zstd));
    assert_eq!(Compression::from_file_name("x.gz"), None);
    for media in ALL {
        let text = serde_json::to_string(&media).expect("a name");
        assert_eq!(text, format!("{:?}", media.name()));
        assert_eq!(serde_json::from_str::<Compression>(&text).ok(), Some(media));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Damage anywhere ends in bytes or an error, never in a panic or a hang.
    #[test]
    fn damaged_streams_end_in_an_answer(which in 0usize..4, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let media = COMPRESSED[which];
        let mut compressed = compress(&sample(20_000), media);
        for (at, byte) in changes {
            let at = at.index(compressed.len());
            compressed[at] = byte;
        }
        let _ = decompress(&compressed, media, Limits { output_bytes: 1 << 20, ..Limits::default() });
    }
}
