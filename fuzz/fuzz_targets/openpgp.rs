//! A byte that chooses, and a clear-signed document, a detached signature or a keyring from anybody: whatever is found good is what was signed.

#![no_main]

use std::{
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use cloudletd::trust::openpgp::{Keyring, clearsigned, detached};
use libfuzzer_sys::fuzz_target;

/// What was signed with the key; nothing else ever was.
const SIGNED: &[u8] = b"{\"datatype\": \"image-downloads\"}\n- dashed\n";

fn keyring() -> &'static Keyring {
    static KEYRING: OnceLock<Keyring> = OnceLock::new();
    KEYRING.get_or_init(|| Keyring::parse(include_bytes!("../kit/key.asc"), "key.asc").expect("a keyring"))
}

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else { return };
    // A minute of 2027: the signatures of the seeds are from before.
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    match which % 3 {
        0 => {
            if let Ok(document) = clearsigned(bytes, keyring(), now, "document") {
                assert_eq!(document.payload, SIGNED, "somebody else's text was found good");
            }
        }
        1 => {
            let _ = detached(bytes, keyring(), now, "document", &mut || Ok(Box::new(SIGNED)));
            let other = detached(bytes, keyring(), now, "document", &mut || Ok(Box::new(&SIGNED[1..])));
            assert!(other.is_err(), "{other:?}");
        }
        _ => {
            if let Ok(theirs) = Keyring::parse(bytes, "keyring") {
                let _ = theirs.fingerprints();
                let _ = detached(b"\x88\x75\x04\x00", &theirs, now, "document", &mut || Ok(Box::new(SIGNED)));
            }
        }
    }
});
