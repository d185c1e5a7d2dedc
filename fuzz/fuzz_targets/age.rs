//! An encrypted tarball: any bytes as one. Nothing panics, what comes out is no longer than what goes in, and is the same twice; the key that the header gives
//! opens the file that it is of.

#![no_main]

use std::{
    io::{Cursor, Read},
    sync::LazyLock,
};

use cloudletd::trust::age::{HEADER_BYTES_MAX, Identities, open, unwrap};
use libfuzzer_sys::fuzz_target;

/// Of nobody: the seeds are encrypted to it.
const IDENTITY: &str = "AGE-SECRET-KEY-1P647Z5UFUGVSYWSTAKS08RJAC6FD2CKDSP0QDS43LXA8VL0C5TPSXWW3P0";

static IDENTITIES: LazyLock<Identities> = LazyLock::new(|| Identities::parse(IDENTITY.as_bytes(), "key").expect("an identity"));

fn opened(bytes: &[u8]) -> Option<Vec<u8>> {
    let key = unwrap(&bytes[..bytes.len().min(HEADER_BYTES_MAX)], &IDENTITIES, "file").ok()?;
    let mut reader = open(Cursor::new(bytes.to_vec()), &key, "file").expect("the header is the one that was unwrapped");
    let mut plain = Vec::new();
    reader.read_to_end(&mut plain).ok()?;
    Some(plain)
}

fuzz_target!(|bytes: &[u8]| {
    let _ = Identities::parse(bytes, "key");
    let Some(plain) = opened(bytes) else { return };
    assert!(plain.len() < bytes.len());
    assert_eq!(opened(bytes), Some(plain));
});
