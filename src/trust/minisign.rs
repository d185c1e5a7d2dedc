//! minisign signatures: Ed25519 over the BLAKE2b digest of a file, with a signed comment.
//!
//! A signature is four lines: an untrusted comment, the signature, a trusted comment (by minisign itself `timestamp:SECONDS` and the file's name), and a
//! signature over both. There is no expiry and no revocation: a key that is not trusted any more is taken out of the configuration. Signatures of
//! minisign before 0.10 are over the whole file instead of its digest (`Ed` instead of `ED`); they can't be checked in a stream and are refused.

use std::{
    io::{self, Read},
    time::SystemTime,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use minisign_verify::{Error as VerifyError, PublicKey, Signature};

use super::{CLOCK_SKEW, Method, Refusal, SIGNATURE_BYTES_MAX, Signer, secs};
use crate::{
    error::{Error, Result, Stage},
    names::Digest,
};

/// Keys in one file.
const KEYS_MAX: usize = 64;
/// Bytes of a signed file that are hashed at a time.
const CHUNK_LEN: usize = 64 << 10;

/// How every signature of minisign's begins.
pub const MAGIC: &[u8] = b"untrusted comment:";

/// The keys that may vouch.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    keys: Vec<Key>,
}

#[derive(Debug, Clone)]
struct Key {
    id: String,
    /// SHA-256 of the key with its id, hexadecimal.
    material: String,
    text: String,
    key: PublicKey,
}

/// The key id as minisign prints it.
fn id(encoded: &str) -> Option<String> {
    let bytes = STANDARD.decode(encoded.trim()).ok()?;
    let id: [u8; 8] = bytes.get(2..10)?.try_into().ok()?;
    Some(format!("{:016X}", u64::from_le_bytes(id)))
}

impl Keys {
    /// Reads public keys: files as `minisign -G` writes them, one after another, or the keys alone, a line each. `object` names the file in errors.
    pub fn parse(text: &str, object: &str) -> Result<Keys> {
        let wrong = |why: String| Error::field(Stage::Config, object, why).with_reason("BAD_KEYRING");
        let mut keys = Vec::new();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("untrusted comment:")) {
            let key = PublicKey::from_base64(line).map_err(|error| wrong("holds a line that is not a minisign key".into()).with_source(error))?;
            let id = id(line).ok_or_else(|| wrong("holds a line that is not a minisign key".into()))?;
            keys.push(Key { id, material: Digest::of(line.as_bytes()).hex(), text: line.to_owned(), key });
            if keys.len() > KEYS_MAX {
                return Err(wrong(format!("holds more than {KEYS_MAX} keys")));
            }
        }
        if keys.is_empty() {
            return Err(wrong("holds no minisign key".into()));
        }
        Ok(Keys { keys })
    }

    /// The ids of the keys, as minisign prints them.
    pub fn ids(&self) -> Vec<String> {
        self.keys.iter().map(|key| key.id.clone()).collect()
    }

    /// The keys as [`Keys::parse`] reads them.
    pub fn to_text(&self) -> String {
        self.keys.iter().map(|key| format!("{}\n", key.text)).collect()
    }

    /// Each key's id, and a digest of all that it is.
    pub fn materials(&self) -> impl Iterator<Item = (&str, String)> {
        self.keys.iter().map(|key| (key.id.as_str(), key.material.clone()))
    }

    /// These keys and others.
    #[must_use]
    pub fn joined(mut self, other: Keys) -> Keys {
        self.keys.extend(other.keys);
        self
    }
}

/// Verifies a signature as `minisign -S` makes it. `open` gives the signed bytes from their start; it is called at most once.
///
/// Errors have the reasons of [`Refusal`], but for those of reading the bytes.
pub fn detached(signature: &[u8], keys: &Keys, now: SystemTime, object: &str, open: &mut dyn FnMut() -> io::Result<Box<dyn Read>>) -> Result<Signer> {
    let malformed = |why: &str| Refusal::Malformed.error(object, why);
    if signature.len() > SIGNATURE_BYTES_MAX {
        return Err(malformed("the signature is longer than any"));
    }
    let text = std::str::from_utf8(signature).map_err(|_| malformed("is not a minisign signature"))?;
    if text.lines().count() != 4 {
        return Err(malformed("is not a minisign signature of four lines"));
    }
    let named = text.lines().nth(1).and_then(id).ok_or_else(|| malformed("is not a minisign signature"))?;
    let signature = Signature::decode(text).map_err(|error| malformed("is not a minisign signature").with_source(error))?;
    // Ids are eight bytes that anybody can choose: two keys may share one, and each is tried.
    let candidates: Vec<&Key> = keys.keys.iter().filter(|key| key.id == named).collect();
    if candidates.is_empty() {
        return Err(Refusal::KeyUnknown.error(object, format!("signed by {named}, which is not among the trusted keys")));
    }
    let mut verifiers = Vec::new();
    for key in candidates {
        let verifier = key.key.verify_stream(&signature).map_err(|error| match error {
            VerifyError::UnsupportedLegacyMode => {
                Refusal::Weak.error(object, "is a signature of the old kind, without a digest").with_hint("sign again with minisign 0.10 or newer")
            }
            error => malformed("is not a minisign signature").with_source(error),
        })?;
        verifiers.push((key, verifier));
    }
    let reading = |error| Error::io(Stage::Fetch, object, "read what is signed", error);
    let mut data = open().map_err(reading)?;
    let mut chunk = vec![0; CHUNK_LEN];
    loop {
        match data.read(&mut chunk) {
            Ok(0) => break,
            Ok(len) => verifiers.iter_mut().for_each(|(_, verifier)| verifier.update(&chunk[..len])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(reading(error)),
        }
    }
    let good = verifiers.iter_mut().find_map(|(key, verifier)| verifier.finalize().is_ok().then_some(*key));
    let key = good.ok_or_else(|| Refusal::Invalid.error(object, "the signature does not fit the bytes"))?;
    let made = timestamp(signature.trusted_comment());
    if made.is_some_and(|made| made > secs(now).saturating_add(CLOCK_SKEW.as_secs())) {
        return Err(Refusal::Expired.error(object, "the signature says that it was made in the future"));
    }
    Ok(Signer { method: Method::Minisign, key: named, material: key.material.clone(), made: made.and_then(|made| i64::try_from(made).ok()) })
}

/// The time in a trusted comment, which is signed but free text.
fn timestamp(comment: &str) -> Option<u64> {
    comment.split_whitespace().find_map(|word| word.strip_prefix("timestamp:")).and_then(|secs| secs.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the minisign crate's own documentation.
    const KEY: &str = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";
    const SIGNATURE: &str = "untrusted comment: signature from minisign secret key\n\
        RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=\n\
        trusted comment: timestamp:1633700835\tfile:test\tprehashed\n\
        wLMDjy9FLAuxZ3q4NlEvkgtyhrr0gtTu6KC4KBJdITbbOeAi1zBIYo0v4iTgt8jJpIidRJnp94ABQkJAgAooBQ==\n";

    fn check(signature: &str, bytes: &'static [u8]) -> Result<Signer> {
        let keys = Keys::parse(KEY, "keys").expect("a key");
        detached(signature.as_bytes(), &keys, SystemTime::now(), "file", &mut || Ok(Box::new(bytes)))
    }

    #[test]
    fn a_known_signature_is_good_and_every_change_of_it_is_not() {
        let signer = check(SIGNATURE, b"test").expect("good");
        assert_eq!((signer.key.as_str(), signer.made), ("E7620F1842B4E81F", Some(1_633_700_835)));
        assert_eq!(check(SIGNATURE, b"Test").expect_err("tampered").reason(), "SIGNATURE_INVALID");
        for at in SIGNATURE.find('\n').expect("lines")..SIGNATURE.len() - 1 {
            let mut bytes = SIGNATURE.as_bytes().to_vec();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            assert!(check(&String::from_utf8(bytes).expect("text"), b"test").is_err(), "byte {at}");
        }
    }

    #[test]
    fn only_four_lines_are_a_signature() {
        for text in ["", "a\nb\nc\nd\n", &format!("{SIGNATURE}more\n"), &SIGNATURE[..200]] {
            assert_eq!(check(text, b"test").expect_err("malformed").reason(), "SIGNATURE_MALFORMED", "{text:?}");
        }
    }
}
