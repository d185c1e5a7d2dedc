//! Signatures, signed documents and keys: nothing panics, no signature is good over bytes that nobody signed, a keyring that is read is the same when written and
//! read again.

#![no_main]

use std::{
    io::Read,
    sync::LazyLock,
    time::{Duration, SystemTime},
};

use cloudletd::trust::{
    minisign::{self, Keys},
    openpgp::{self, Keyring},
};
use libfuzzer_sys::fuzz_target;

static RING: LazyLock<Keyring> = LazyLock::new(|| Keyring::parse(include_bytes!("../goldens/trust.gpg"), "ring").expect("a keyring"));
static KEYS: LazyLock<Keys> = LazyLock::new(|| Keys::parse(include_str!("../goldens/trust.pub"), "keys").expect("keys"));

/// What the seeds sign.
const SIGNED: &[u8] = b"signed";

fuzz_target!(|input: &[u8]| {
    let Some((kind, bytes)) = input.split_first() else { return };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let mut other = || Ok(Box::new(&b"somebody else's"[..]) as Box<dyn Read>);
    let mut signed = || Ok(Box::new(SIGNED) as Box<dyn Read>);
    match kind % 5 {
        0 => {
            assert!(openpgp::detached(bytes, &RING, now, "file", &mut other).is_err());
            if let Ok(signer) = openpgp::detached(bytes, &RING, now, "file", &mut signed) {
                assert_eq!([signer.key], RING.fingerprints()[..]);
            }
        }
        1 => {
            if let Ok(document) = openpgp::clearsigned(bytes, &RING, now, "document") {
                assert_eq!(document.payload.trim_ascii_end(), SIGNED);
            }
        }
        2 => {
            if let Ok(ring) = Keyring::parse(bytes, "ring") {
                let again = Keyring::parse(&ring.to_bytes().expect("can be written"), "ring").expect("what was written");
                assert!(ring.materials().eq(again.materials()));
            }
        }
        3 => {
            assert!(minisign::detached(bytes, &KEYS, now, "file", &mut other).is_err());
            if let Ok(signer) = minisign::detached(bytes, &KEYS, now, "file", &mut signed) {
                assert_eq!([signer.key], KEYS.ids()[..]);
            }
        }
        _ => {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            if let Ok(keys) = Keys::parse(text, "keys") {
                let again = Keys::parse(&keys.to_text(), "keys").expect("what was written");
                assert!(keys.materials().eq(again.materials()));
            }
        }
    }
});
