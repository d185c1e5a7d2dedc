//! Signatures made by minisign itself.

use std::{fs, io::Read, time::SystemTime};

use crate::kit::Minisign;
use cloudletd::{
    error::Result,
    trust::{
        Method, Signer,
        minisign::{Keys, detached},
    },
};

fn keys(minisign: &Minisign) -> Keys {
    Keys::parse(&fs::read_to_string(minisign.public_key()).expect("read"), "keys").expect("minisign writes keys")
}

fn check(signature: &[u8], keys: &Keys, bytes: &[u8]) -> Result<Signer> {
    let bytes = bytes.to_vec();
    detached(signature, keys, SystemTime::now(), "file", &mut || Ok(Box::new(std::io::Cursor::new(bytes.clone())) as Box<dyn Read>))
}

#[track_caller]
fn refused(result: Result<Signer>, reason: &str) {
    let error = result.expect_err(reason);
    assert_eq!(error.reason(), reason, "{}", error.chain());
}

#[test]
fn what_minisign_signs_is_accepted_from_its_key_only() {
    let (ours, other) = (Minisign::new(), Minisign::new());
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("file");
    let content: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    fs::write(&file, &content).expect("write");
    let signature = ours.sign(&file, &[]);
    let signer = check(&signature, &keys(&ours), &content).expect("good");
    assert_eq!((signer.method, signer.key), (Method::Minisign, ours.key_id()));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs() as i64;
    assert!(signer.made.is_some_and(|made| (now - 60..=now + 60).contains(&made)));
    check(&signature, &keys(&other).joined(keys(&ours)), &content).expect("one of two keys");
    refused(check(&signature, &keys(&other), &content), "SIGNATURE_KEY_UNKNOWN");
    refused(check(&signature, &keys(&ours), &content[1..]), "SIGNATURE_INVALID");
    // The trusted comment is signed, the other is not.
    let text = String::from_utf8(signature).expect("text");
    refused(check(text.replace("timestamp:", "timestamp:9").as_bytes(), &keys(&ours), &content), "SIGNATURE_INVALID");
    check(text.replace("untrusted comment: ", "untrusted comment: really ").as_bytes(), &keys(&ours), &content).expect("an untrusted comment");
}

#[test]
fn the_old_kind_of_signature_is_refused_with_a_hint() {
    let minisign = Minisign::new();
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("file");
    fs::write(&file, b"content").expect("write");
    let error = check(&minisign.sign(&file, &["-l"]), &keys(&minisign), b"content").expect_err("legacy");
    assert_eq!(error.reason(), "SIGNATURE_WEAK");
    assert!(error.hint().is_some_and(|hint| hint.contains("0.10")));
}

#[test]
fn a_signature_from_the_future_is_refused() {
    let minisign = Minisign::new();
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("file");
    fs::write(&file, b"content").expect("write");
    let signature = minisign.sign(&file, &["-t", "timestamp:99999999999"]);
    refused(check(&signature, &keys(&minisign), b"content"), "SIGNATURE_EXPIRED");
}
