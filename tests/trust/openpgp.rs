//! OpenPGP signatures made by GnuPG: what it signs is accepted, and everything that is wrong with a signature is refused for its own reason.

use std::{
    fs,
    io::{self, Read},
    time::{Duration, SystemTime},
};

use crate::kit::Gpg;
use cloudletd::{
    error::{Kind, Result},
    trust::{
        Method, Signer,
        openpgp::{Clearsigned, Keyring, clearsigned, detached},
    },
};

const TEXT: &str = "{\"index\": \"x\"}\n- a dash\n-----BEGIN NOTHING-----\ntrailing \t \n\nlast\n";

fn keyring(gpg: &Gpg, ids: &[&str]) -> Keyring {
    Keyring::parse(&gpg.export(ids), "keyring").expect("gpg exports certificates")
}

fn check(signature: &[u8], keyring: &Keyring, bytes: &[u8]) -> Result<Signer> {
    let bytes = bytes.to_vec();
    detached(signature, keyring, SystemTime::now(), "file", &mut || Ok(Box::new(io::Cursor::new(bytes.clone())) as Box<dyn Read>))
}

fn clear(document: &[u8], keyring: &Keyring) -> Result<Clearsigned> {
    clearsigned(document, keyring, SystemTime::now(), "document")
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, reason: &str) {
    let error = result.expect_err(reason);
    assert_eq!(error.reason(), reason, "{}", error.chain());
    let damaged = matches!(reason, "SIGNATURE_MALFORMED" | "SIGNATURE_INVALID");
    assert_eq!(error.kind(), if damaged { Kind::Corrupt } else { Kind::PermissionDenied });
}

#[test]
fn what_gnupg_signs_with_any_modern_key_is_accepted() {
    for (name, algorithm) in [("ed", "ed25519"), ("rsa", "rsa2048"), ("p256", "nistp256"), ("p384", "nistp384")] {
        let gpg = Gpg::new();
        gpg.make_key(name, algorithm, "sign", "0");
        let keys = keyring(&gpg, &[name]);
        let before = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs() as i64;
        for armor in [&["--armor"][..], &[]] {
            let signer = check(&gpg.sign(name, b"payload", armor), &keys, b"payload").unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
            assert_eq!((signer.method, &signer.key), (Method::Openpgp, &gpg.fingerprint(name)));
            assert!(signer.made.is_some_and(|made| (before - 60..before + 60).contains(&made)), "{signer:?}");
        }
        let signed = clear(&gpg.clearsign(name, TEXT.as_bytes(), &[]), &keys).unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
        assert_eq!(signed.signer.key, gpg.fingerprint(name));
        assert_eq!(String::from_utf8(signed.payload).expect("text"), TEXT.replace("trailing \t ", "trailing"));
    }
}

#[test]
fn gnupg_reads_the_same_text_out_of_a_clear_signed_document() {
    let gpg = Gpg::new();
    gpg.make_key("key", "ed25519", "sign", "0");
    let keys = keyring(&gpg, &["key"]);
    for text in [TEXT, "", "\n", "\n\n", "no end of line", "- x\n--\n---\n", "a\r\nb\r\n", "  x \r\n"] {
        let document = gpg.clearsign("key", text.as_bytes(), &[]);
        let ours = clear(&document, &keys).unwrap_or_else(|error| panic!("{text:?}: {}", error.chain()));
        // GnuPG keeps the line ends it found, and drops white space at the end of lines as we do.
        let theirs: String = gpg.verified_text(&document).lines().map(|line| format!("{}\n", line.trim_end())).collect();
        let ours: String = String::from_utf8(ours.payload).expect("text").lines().map(|line| format!("{line}\n")).collect();
        assert_eq!(ours, theirs, "{text:?}");
    }
}

#[test]
fn a_signing_subkey_speaks_for_its_certificate_and_an_encryption_subkey_for_nobody() {
    let gpg = Gpg::new();
    gpg.make_key("cert", "ed25519", "cert", "0");
    gpg.add_subkey("cert", "ed25519", "sign", "0");
    gpg.add_subkey("cert", "cv25519", "encr", "0");
    let signer = check(&gpg.sign("cert", b"x", &[]), &keyring(&gpg, &["cert"]), b"x").expect("the subkey signs");
    assert_eq!(signer.key, gpg.fingerprint("cert"));
}

#[test]
fn changed_bytes_and_changed_signatures_are_invalid() {
    let gpg = Gpg::new();
    gpg.make_key("key", "ed25519", "sign", "0");
    let keys = keyring(&gpg, &["key"]);
    let signature = gpg.sign("key", b"payload", &[]);
    refused(check(&signature, &keys, b"Payload"), "SIGNATURE_INVALID");
    refused(check(&signature, &keys, b"payload\n"), "SIGNATURE_INVALID");
    refused(check(&signature, &keys, b""), "SIGNATURE_INVALID");
    let mut changed = 0;
    for at in 0..signature.len() {
        let mut bytes = signature.clone();
        bytes[at] ^= 1;
        // Subpackets that are not signed may change: the issuer's id is a hint only.
        if check(&bytes, &keys, b"payload").is_err() {
            changed += 1;
        }
    }
    assert!(changed * 10 > signature.len() * 8, "{changed} of {} bytes matter", signature.len());
    let document = String::from_utf8(gpg.clearsign("key", TEXT.as_bytes(), &[])).expect("text");
    refused(clear(document.replace("index", "Index").as_bytes(), &keys), "SIGNATURE_INVALID");
    refused(clear(document.replace("last", "last\nmore").as_bytes(), &keys), "SIGNATURE_INVALID");
}

#[test]
fn nothing_but_one_signature_is_a_signature() {
    let gpg = Gpg::new();
    gpg.make_key("key", "ed25519", "sign", "0");
    let keys = keyring(&gpg, &["key"]);
    let document = gpg.clearsign("key", b"text\n", &[]);
    let armored = gpg.sign("key", b"x", &["--armor"]);
    let text = String::from_utf8(document.clone()).expect("text");
    for bytes in [
        Vec::new(),
        b"no signature".to_vec(),
        gpg.export(&["key"]),
        [&armored[..], b"junk"].concat(),
        [b"junk\n", &armored[..]].concat(),
        armored[..armored.len() / 2].to_vec(),
        vec![0xff; 70_000],
        // A signed message holds its own data, which is not the file beside it.
        gpg.run(&["--local-user", "key", "--sign", "--output", "-"], b"x"),
    ] {
        refused(check(&bytes, &keys, b"x"), "SIGNATURE_MALFORMED");
    }
    refused(clear(format!("before\n{text}").as_bytes(), &keys), "SIGNATURE_MALFORMED");
    refused(clear(format!("{text}after\n").as_bytes(), &keys), "SIGNATURE_MALFORMED");
    refused(clear(format!("{text}{text}").as_bytes(), &keys), "SIGNATURE_MALFORMED");
    refused(clear(b"text\n", &keys), "SIGNATURE_MALFORMED");
    // A detached signature over the text is not one over the document, and the other way round.
    let text_signature = gpg.sign("key", b"x", &["--textmode"]);
    refused(check(&text_signature, &keys, b"x"), "SIGNATURE_MALFORMED");
}

#[test]
fn a_signature_over_another_file_or_by_another_key_is_refused() {
    let gpg = Gpg::new();
    gpg.make_key("one", "ed25519", "sign", "0");
    gpg.make_key("two", "ed25519", "sign", "0");
    refused(check(&gpg.sign("one", b"other file", &[]), &keyring(&gpg, &["one"]), b"this file"), "SIGNATURE_INVALID");
    refused(check(&gpg.sign("two", b"x", &[]), &keyring(&gpg, &["one"]), b"x"), "SIGNATURE_KEY_UNKNOWN");
    refused(clear(&gpg.clearsign("two", b"x\n", &[]), &keyring(&gpg, &["one"])), "SIGNATURE_KEY_UNKNOWN");
    // Signed by both, as archives are while they change keys.
    let both = gpg.run(&["--local-user", "two", "--local-user", "one", "--detach-sign", "--output", "-"], b"x");
    for name in ["one", "two"] {
        assert_eq!(check(&both, &keyring(&gpg, &[name]), b"x").expect("one of them is enough").key, gpg.fingerprint(name));
    }
    refused(check(&both, &keyring(&gpg, &["one", "two"]), b"y"), "SIGNATURE_INVALID");
}

#[test]
fn expired_and_revoked_keys_are_refused_though_the_signature_was_good_once() {
    let gpg = Gpg::new();
    gpg.make_key("short", "ed25519", "sign", "seconds=86400");
    let signature = gpg.sign("short", b"x", &[]);
    let keys = keyring(&gpg, &["short"]);
    check(&signature, &keys, b"x").expect("valid today");
    let later = SystemTime::now() + Duration::from_secs(2 * 86400);
    refused(detached(&signature, &keys, later, "file", &mut || Ok(Box::new(&b"x"[..]))), "SIGNATURE_KEY_EXPIRED");
    // Before the key was made.
    let earlier = SystemTime::now() - Duration::from_secs(2 * 86400);
    refused(detached(&signature, &keys, earlier, "file", &mut || Ok(Box::new(&b"x"[..]))), "SIGNATURE_EXPIRED");

    gpg.make_key("gone", "ed25519", "sign", "0");
    let signature = gpg.sign("gone", b"x", &[]);
    check(&signature, &keyring(&gpg, &["gone"]), b"x").expect("valid before it is revoked");
    gpg.revoke("gone");
    refused(check(&signature, &keyring(&gpg, &["gone"]), b"x"), "SIGNATURE_KEY_REVOKED");
}

#[test]
fn an_expired_signature_is_refused() {
    let gpg = Gpg::new();
    gpg.make_key("key", "ed25519", "sign", "0");
    let keys = keyring(&gpg, &["key"]);
    let signature = gpg.sign("key", b"x", &["--default-sig-expire", "1d"]);
    check(&signature, &keys, b"x").expect("valid today");
    let later = SystemTime::now() + Duration::from_secs(2 * 86400);
    refused(detached(&signature, &keys, later, "file", &mut || Ok(Box::new(&b"x"[..]))), "SIGNATURE_EXPIRED");
}

#[test]
fn weak_digests_and_weak_keys_are_refused() {
    let gpg = Gpg::new();
    gpg.make_key("key", "rsa2048", "sign", "0");
    let keys = keyring(&gpg, &["key"]);
    for digest in ["SHA1", "RIPEMD160", "SHA224"] {
        let options = ["--digest-algo", digest, "--allow-weak-digest-algos"];
        refused(check(&gpg.sign("key", b"x", &options), &keys, b"x"), "SIGNATURE_WEAK");
        refused(clear(&gpg.clearsign("key", b"x\n", &options), &keys), "SIGNATURE_WEAK");
    }
    for digest in ["SHA256", "SHA384", "SHA512"] {
        check(&gpg.sign("key", b"x", &["--digest-algo", digest]), &keys, b"x").expect(digest);
    }
    gpg.make_key("weak", "rsa1024", "sign", "0");
    refused(check(&gpg.sign("weak", b"x", &["--digest-algo", "SHA256"]), &keyring(&gpg, &["weak"]), b"x"), "SIGNATURE_WEAK");
    gpg.make_key("dsa", "dsa2048", "sign", "0");
    refused(check(&gpg.sign("dsa", b"x", &["--digest-algo", "SHA256"]), &keyring(&gpg, &["dsa"]), b"x"), "SIGNATURE_WEAK");
}

#[test]
fn a_keyring_may_be_armored_binary_or_several_blocks_and_must_not_be_empty() {
    let gpg = Gpg::new();
    gpg.make_key("one", "ed25519", "sign", "0");
    gpg.make_key("two", "rsa2048", "sign", "0");
    let both = vec![gpg.fingerprint("one"), gpg.fingerprint("two")];
    assert_eq!(keyring(&gpg, &["one", "two"]).fingerprints(), both);
    let armored = |name: &str| gpg.run(&["--armor", "--export", name], b"");
    let blocks = [armored("one"), armored("two")].concat();
    assert_eq!(Keyring::parse(&blocks, "keyring").expect("two blocks").fingerprints(), both);
    assert_eq!(keyring(&gpg, &["one"]).joined(keyring(&gpg, &["two"])).fingerprints(), both);
    for bytes in
        [&b""[..], b"nothing", &[0x99, 0xff, 0xff][..], b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nxxxx\n-----END PGP PUBLIC KEY BLOCK-----\n"]
    {
        assert_eq!(Keyring::parse(bytes, "keyring").expect_err("no keyring").reason(), "BAD_KEYRING");
    }
}

#[test]
fn a_large_clear_signed_index_takes_linear_time() {
    let gpg = Gpg::new();
    gpg.make_key("key", "ed25519", "sign", "0");
    let text: String = (0..100_000).map(|line| format!("  \"item-{line}\": \"0123456789abcdef0123456789abcdef\",\n")).collect();
    let document = gpg.clearsign("key", text.as_bytes(), &[]);
    let started = std::time::Instant::now();
    let signed = clear(&document, &keyring(&gpg, &["key"])).expect("good");
    assert_eq!(signed.payload, text.as_bytes());
    assert!(started.elapsed() < Duration::from_secs(5), "{} bytes took {:?}", document.len(), started.elapsed());
}

#[test]
fn the_real_archive_keys_of_the_host_can_be_read() {
    let directory = "/usr/share/keyrings";
    let mut read = 0;
    for entry in fs::read_dir(directory).expect("Debian has keyrings").flatten() {
        let path = entry.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("debian-archive") && name.to_string_lossy().ends_with(".gpg")) {
            let keys = Keyring::parse(&fs::read(&path).expect("readable"), "keyring").unwrap_or_else(|error| panic!("{path:?}: {}", error.chain()));
            read += keys.fingerprints().len();
        }
    }
    assert!(read > 3, "{directory} holds debian-archive-keyring");
}

/// Damage that a hostile server can do to a file: each byte changed, cut off there, or doubled.
fn damaged(bytes: &[u8]) -> impl Iterator<Item = Vec<u8>> + '_ {
    (0..bytes.len()).flat_map(move |at| {
        let changed = [0x00, 0x7f, 0xff, bytes[at] ^ 0x80, bytes[at].wrapping_add(1)].map(|value| {
            let mut bytes = bytes.to_vec();
            bytes[at] = value;
            bytes
        });
        changed.into_iter().chain([bytes[..at].to_vec(), [&bytes[..at], &bytes[at / 2..]].concat()])
    })
}

#[test]
fn no_damage_to_a_signature_or_a_keyring_makes_the_reader_panic_or_accept() {
    let gpg = Gpg::new();
    gpg.make_key("key", "ed25519", "sign", "0");
    let keys = keyring(&gpg, &["key"]);
    let signature = gpg.sign("key", b"x", &[]);
    for bytes in damaged(&signature) {
        // Whatever it is now, it is never good over other bytes.
        assert!(check(&bytes, &keys, b"y").is_err());
    }
    for bytes in damaged(&gpg.export(&["key"])) {
        if let Ok(keys) = Keyring::parse(&bytes, "keyring") {
            assert!(check(&signature, &keys, b"y").is_err());
        }
    }
    for bytes in damaged(&gpg.sign("key", b"x", &["--armor"])).step_by(3) {
        assert!(check(&bytes, &keys, b"y").is_err());
    }
    let document = gpg.clearsign("key", b"text\n", &[]);
    for bytes in damaged(&document).step_by(3) {
        if let Ok(signed) = clear(&bytes, &keys) {
            // White space at the ends of lines and the armor's headers may change.
            assert_eq!(signed.payload, b"text\n", "{}", String::from_utf8_lossy(&bytes));
        }
    }
}
