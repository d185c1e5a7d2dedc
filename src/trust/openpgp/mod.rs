//! OpenPGP signatures as GnuPG makes them: detached (binary or armored) and clear-signed documents.
//!
//! The packets and the arithmetic are those of the `pgp` crate; which key may sign what and when is decided here (`certificate`), because a library that
//! verifies a signature says nothing about expiry, revocation or key usage. The clear-signed framing is taken apart here too (`cleartext`): the crate's
//! own reader takes quadratic time and allows text around the block.
//!
//! What is refused: digests other than SHA-2 from 256 bits up and SHA-3; RSA below 2048 bits, DSA; signatures without an issuer; unknown critical
//! subpackets; keys that are expired, not yet valid, revoked, or not made for signing; signing subkeys that don't vouch for their primary key in turn;
//! signatures that have expired or come from the future. Self-signatures *inside* the operator's keyring may use SHA-1, as those of older
//! distributions' keys do: whoever can change that file needs no collision.

mod certificate;
mod cleartext;

use std::{
    io::{self, BufReader, Cursor, Read},
    time::SystemTime,
};

use pgp::{
    armor::Dearmor,
    composed::{Deserializable, SignedPublicKey},
    crypto::hash::HashAlgorithm,
    packet::{Packet, PacketParser, Signature, SignatureType},
    types::KeyDetails,
};

use self::certificate::{Certificate, SigningKey};
use super::{CLOCK_SKEW, Method, Refusal, SIGNATURE_BYTES_MAX, Signer, secs};
use crate::error::{Error, Result, Stage};

/// Bytes of a keyring file. Debian's own, with all its archive keys, has 57 KiB.
pub const KEYRING_BYTES_MAX: usize = 4 << 20;
/// Bytes of a clear-signed document; Ubuntu's largest index has 3 MiB.
pub const DOCUMENT_BYTES_MAX: usize = 256 << 20;
/// Certificates in one keyring.
const CERTIFICATES_MAX: usize = 256;
/// Signatures over one document; archives that change keys have two or three.
const SIGNATURES_MAX: usize = 16;
/// Signatures by known keys that are tried: each costs a pass over the data.
const ATTEMPTS_MAX: usize = 4;

/// The keys that may vouch.
#[derive(Debug, Clone)]
pub struct Keyring {
    certificates: Vec<Certificate>,
}

impl Keyring {
    /// Reads certificates as `gpg --export` (binary) or `gpg --export --armor` writes them; several may follow each other in one file, armored or not.
    /// `object` names the file in errors. `Config` errors: it holds no certificate, or one that can't be read.
    pub fn parse(bytes: &[u8], object: &str) -> Result<Keyring> {
        let wrong = |why: String| Error::field(Stage::Config, object, why).with_reason("BAD_KEYRING");
        if bytes.len() > KEYRING_BYTES_MAX {
            return Err(wrong(format!("has {} bytes, the limit is {KEYRING_BYTES_MAX}", bytes.len())));
        }
        let mut certificates = Vec::new();
        for block in blocks(bytes) {
            let (keys, _) = SignedPublicKey::from_reader_many(Cursor::new(block))
                .map_err(|error| wrong("holds no OpenPGP certificate".into()).with_source(error))?;
            for key in keys {
                let key = key.map_err(|error| wrong("holds a certificate that can't be read".into()).with_source(error))?;
                certificates.push(Certificate::new(key));
                if certificates.len() > CERTIFICATES_MAX {
                    return Err(wrong(format!("holds more than {CERTIFICATES_MAX} certificates")));
                }
            }
        }
        if certificates.is_empty() {
            return Err(wrong("holds no OpenPGP certificate".into()));
        }
        Ok(Keyring { certificates })
    }

    /// The fingerprints of the certificates, upper-case hexadecimal, in the file's order.
    pub fn fingerprints(&self) -> Vec<String> {
        self.certificates.iter().map(Certificate::fingerprint).collect()
    }

    /// The certificates as [`Keyring::parse`] reads them.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let certificates: Vec<Vec<u8>> = self
            .certificates
            .iter()
            .map(Certificate::to_bytes)
            .collect::<Result<_, _>>()
            .map_err(|error| Error::internal(Stage::Config, "keyring", "a certificate that was read can't be written").with_source(error))?;
        Ok(certificates.concat())
    }

    /// Each certificate's fingerprint, and a digest of all that belongs to it.
    pub fn materials(&self) -> impl Iterator<Item = (String, String)> {
        self.certificates.iter().map(|certificate| (certificate.fingerprint(), certificate.material()))
    }

    /// The keyrings' certificates together.
    #[must_use]
    pub fn joined(mut self, other: Keyring) -> Keyring {
        self.certificates.extend(other.certificates);
        self
    }

    fn keys(&self) -> impl Iterator<Item = (&Certificate, SigningKey<'_>)> {
        self.certificates.iter().flat_map(|certificate| certificate.keys().map(move |key| (certificate, key)))
    }
}

/// Armored blocks one by one; a file without armor is one block.
fn blocks(bytes: &[u8]) -> Vec<&[u8]> {
    const BEGIN: &[u8] = b"-----BEGIN PGP PUBLIC KEY BLOCK-----";
    let starts: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(BEGIN) && (*at == 0 || bytes[*at - 1] == b'\n')).collect();
    if starts.is_empty() {
        return vec![bytes];
    }
    let ends = starts.iter().copied().skip(1).chain([bytes.len()]);
    starts.iter().copied().zip(ends).map(|(start, end)| &bytes[start..end]).collect()
}

/// What a signature was found good over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clearsigned {
    /// The signed text: dash-escapes undone, white space at the ends of lines gone (no signature covers it), each line ended by one LF.
    pub payload: Vec<u8>,
    /// Who signed.
    pub signer: Signer,
}

/// Verifies a clear-signed document (`gpg --clearsign`, as `InRelease` and `*.sjson` files are) and gives what was signed. There must be exactly one
/// block and nothing around it. `object` names the document in errors; `now` is the time that keys have to be valid at.
///
/// Errors have the reasons of [`Refusal`].
pub fn clearsigned(bytes: &[u8], keyring: &Keyring, now: SystemTime, object: &str) -> Result<Clearsigned> {
    if bytes.len() > DOCUMENT_BYTES_MAX {
        return Err(Refusal::Malformed.error(object, format!("the document has {} bytes, the limit is {DOCUMENT_BYTES_MAX}", bytes.len())));
    }
    let parts = cleartext::split(bytes).map_err(|why| Refusal::Malformed.error(object, why))?;
    let signatures = read_signatures(parts.signature, object)?;
    let signer = verify(&signatures, SignatureType::Text, keyring, now, object, &mut || Ok(Box::new(&parts.signed[..])))?;
    Ok(Clearsigned { payload: parts.payload, signer })
}

/// Verifies a detached signature (`gpg --detach-sign`, armored or not). `open` gives the signed bytes from their start; it is called once for each
/// signature that one of the keys may have made, which is nearly always one.
///
/// Errors have the reasons of [`Refusal`], but for those of reading the bytes.
pub fn detached(
    signature: &[u8],
    keyring: &Keyring,
    now: SystemTime,
    object: &str,
    open: &mut dyn FnMut() -> io::Result<Box<dyn Read>>,
) -> Result<Signer> {
    let signatures = read_signatures(signature, object)?;
    // A detached text signature leaves line ends open, so the bytes are not what was signed.
    let mut open = || open().map(|data| data as Box<dyn Read + '_>);
    verify(&signatures, SignatureType::Binary, keyring, now, object, &mut open)
}

/// Reads the signature packets of a file. Anything else in it is an error: a signed message, a key, another block.
fn read_signatures(bytes: &[u8], object: &str) -> Result<Vec<Signature>> {
    let malformed = |why: String| Refusal::Malformed.error(object, why);
    if bytes.len() > SIGNATURE_BYTES_MAX {
        return Err(malformed(format!("the signature has {} bytes, the limit is {SIGNATURE_BYTES_MAX}", bytes.len())));
    }
    let packets = match cleartext::armored_signature(bytes).map_err(|why| malformed(why.to_owned()))? {
        None => bytes.to_vec(),
        Some(block) => {
            let mut packets = Vec::new();
            let read = Dearmor::new(BufReader::new(block)).take(SIGNATURE_BYTES_MAX as u64).read_to_end(&mut packets);
            read.map_err(|error| malformed("the signature's armor can't be read".into()).with_source(error))?;
            packets
        }
    };
    let mut signatures = Vec::new();
    for packet in PacketParser::new(Cursor::new(packets)) {
        match packet {
            Ok(Packet::Signature(signature)) => signatures.push(signature),
            // RFC 9580 section 5.8: to be ignored wherever it stands.
            Ok(Packet::Marker(_)) => {}
            Ok(_) => return Err(malformed("holds something other than signatures".into())),
            Err(error) => return Err(malformed("the signature can't be read".into()).with_source(error)),
        }
        if signatures.len() > SIGNATURES_MAX {
            return Err(malformed(format!("holds more than {SIGNATURES_MAX} signatures")));
        }
    }
    if signatures.is_empty() {
        return Err(malformed("holds no signature".into()));
    }
    Ok(signatures)
}

/// One good signature by one of the keys is enough: archives are signed by the old key and the new. The refusal of the last signature by a known key is
/// given otherwise.
fn verify<'a>(
    signatures: &[Signature],
    typ: SignatureType,
    keyring: &Keyring,
    now: SystemTime,
    object: &str,
    open: &mut dyn FnMut() -> io::Result<Box<dyn Read + 'a>>,
) -> Result<Signer> {
    let now = secs(now);
    let (mut refusal, mut attempts) = (None, 0);
    for signature in signatures {
        for (certificate, key) in keyring.keys().filter(|(_, key)| is_issuer(signature, key)) {
            let may = check_signature(signature, typ, now).and_then(|()| certificate.may_sign(key, signature, now));
            if let Err((why, text)) = may {
                refusal = Some(why.error(object, text));
                continue;
            }
            attempts += 1;
            if attempts > ATTEMPTS_MAX {
                return Err(Refusal::Malformed.error(object, format!("holds more than {ATTEMPTS_MAX} signatures of known keys that are not good")));
            }
            let data = open().map_err(|error| Error::io(Stage::Fetch, object, "read what is signed", error))?;
            let mut watched = Watched { data, failure: None };
            let verified = key.verify(signature, &mut watched);
            if let Some(error) = watched.failure {
                return Err(Error::io(Stage::Fetch, object, "read what is signed", error));
            }
            match verified {
                Ok(()) => {
                    return Ok(Signer {
                        method: Method::Openpgp,
                        key: certificate.fingerprint(),
                        material: certificate.material(),
                        made: created(signature),
                    });
                }
                Err(error) => refusal = Some(Refusal::Invalid.error(object, "the signature does not fit the bytes").with_source(error)),
            }
        }
    }
    Err(refusal.unwrap_or_else(|| {
        let made_by = signatures.iter().flat_map(issuers).collect::<Vec<_>>().join(", ");
        Refusal::KeyUnknown.error(object, format!("signed by {}, which is not among the trusted keys", or_nobody(&made_by)))
    }))
}

fn or_nobody(keys: &str) -> &str {
    if keys.is_empty() { "a key that is not named" } else { keys }
}

fn created(signature: &Signature) -> Option<i64> {
    signature.created().map(|time| i64::from(time.as_secs()))
}

/// Who a signature says made it, upper-case hexadecimal.
fn issuers(signature: &Signature) -> Vec<String> {
    let fingerprints: Vec<String> = signature.issuer_fingerprint().iter().map(|print| format!("{print:X}")).collect();
    if !fingerprints.is_empty() {
        return fingerprints;
    }
    signature.issuer_key_id().iter().map(|id| id.to_string().to_uppercase()).collect()
}

/// Whether the signature names this key as its maker. One that names nobody would have to be tried with every key.
fn is_issuer(signature: &Signature, key: &SigningKey<'_>) -> bool {
    let prints = signature.issuer_fingerprint();
    let ids = signature.issuer_key_id();
    match key {
        SigningKey::Primary(key) => prints.contains(&&key.fingerprint()) || ids.contains(&&key.legacy_key_id()),
        SigningKey::Subkey(key) => prints.contains(&&key.fingerprint()) || ids.contains(&&key.legacy_key_id()),
    }
}

/// What can be said against a signature without its bytes.
fn check_signature(signature: &Signature, typ: SignatureType, now: u64) -> Result<(), (Refusal, String)> {
    if signature.typ() != Some(typ) {
        return Err((Refusal::Malformed, format!("the signature is of type {:?}, not {typ:?}", signature.typ())));
    }
    match signature.hash_alg() {
        Some(HashAlgorithm::Sha256 | HashAlgorithm::Sha384 | HashAlgorithm::Sha512 | HashAlgorithm::Sha3_256 | HashAlgorithm::Sha3_512) => {}
        Some(other) => return Err((Refusal::Weak, format!("the signature's digest is {other}; SHA-256 is the least that is accepted"))),
        None => return Err((Refusal::Malformed, "the signature is of an unknown version".into())),
    }
    let Some(made) = signature.created() else {
        return Err((Refusal::Malformed, "the signature does not say when it was made".into()));
    };
    let made = u64::from(made.as_secs());
    if made > now + CLOCK_SKEW.as_secs() {
        return Err((Refusal::Expired, format!("the signature says that it was made {} s in the future", made - now)));
    }
    if let Some(lasts) = signature.signature_expiration_time().map(|lasts| u64::from(lasts.as_secs())).filter(|lasts| *lasts > 0)
        && made + lasts <= now
    {
        return Err((Refusal::Expired, format!("the signature expired {} s ago", now - made - lasts)));
    }
    Ok(())
}

/// Keeps the failure of reading apart from a signature that is not good.
struct Watched<'a> {
    data: Box<dyn Read + 'a>,
    failure: Option<io::Error>,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.data.read(buffer).map_err(|error| {
            let told = io::Error::from(error.kind());
            self.failure = Some(error);
            told
        })
    }
}
