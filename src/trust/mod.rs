//! Trust: who vouches for bytes that came from elsewhere.
//!
//! A digest says that bytes are the ones that were meant; a signature says who meant them. This module checks signatures and nothing else: it fetches
//! nothing, keeps nothing and decides nothing about tenants. Everything fails closed: a signature that can't be read, was made by a key that isn't
//! there, is too weak, has expired or was revoked is no signature.
//!
//! ```text
//!  bytes + signature + keys of the operator ─┬▶ openpgp    clear-signed documents and detached signatures, as gpg makes them
//!                                            └▶ minisign   Ed25519
//!  encrypted tarball + keys of the operator ──▶ age   plain bytes
//!  URL ──▶ place ──▶ policy   which of them a tarball from there owes ([[trust]])
//! ```
//!
//! Keys come from files that the operator named. They are the anchor: nothing here asks a key server, follows a web of trust or takes a key from what is
//! to be verified. What is signed is parsed by nobody before the signature was found good.

pub mod age;
pub mod minisign;
pub mod openpgp;
pub mod place;
pub mod policy;

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Stage};

/// Bytes of a signature file. The largest that is seen in the field is an armored one of several RSA 4096 keys, 4 KiB.
pub const SIGNATURE_BYTES_MAX: usize = 64 << 10;
/// How far a clock may be behind the signer's.
pub const CLOCK_SKEW: Duration = Duration::from_secs(600);

/// Who signed, as it is recorded and shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signer {
    /// How: `openpgp` or `minisign`.
    pub method: Method,
    /// The key that the operator named: for OpenPGP the fingerprint of the certificate (of the primary key), for minisign the key id; upper-case hexadecimal.
    pub key: String,
    /// SHA-256 of that key with all that belongs to it (for OpenPGP its self-signatures, subkeys and revocations), hexadecimal: a certificate that was
    /// revoked or given another expiry since does not vouch for what it signed before.
    pub material: String,
    /// When the signature says that it was made, seconds since 1970; unknown for minisign signatures without a trusted timestamp.
    pub made: Option<i64>,
}

/// Kinds of signatures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// OpenPGP (RFC 9580 and what GnuPG makes).
    Openpgp,
    /// minisign: Ed25519.
    Minisign,
}

/// Why something is not trusted; the reason that a caller may branch on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// There is no signature where one is required.
    Missing,
    /// It can't be read as what it claims to be.
    Malformed,
    /// It does not fit the bytes: they, or it, were changed.
    Invalid,
    /// None of the trusted keys made it.
    KeyUnknown,
    /// The key, or the subkey that signed, has expired or is not valid yet.
    KeyExpired,
    /// The key was revoked.
    KeyRevoked,
    /// The signature itself has expired, or was made in the future.
    Expired,
    /// Its digest or its key is too weak to say anything.
    Weak,
}

impl Refusal {
    /// The stable reason.
    pub fn reason(self) -> &'static str {
        match self {
            Refusal::Missing => "SIGNATURE_MISSING",
            Refusal::Malformed => "SIGNATURE_MALFORMED",
            Refusal::Invalid => "SIGNATURE_INVALID",
            Refusal::KeyUnknown => "SIGNATURE_KEY_UNKNOWN",
            Refusal::KeyExpired => "SIGNATURE_KEY_EXPIRED",
            Refusal::KeyRevoked => "SIGNATURE_KEY_REVOKED",
            Refusal::Expired => "SIGNATURE_EXPIRED",
            Refusal::Weak => "SIGNATURE_WEAK",
        }
    }

    /// The error: `Corrupt` for what was damaged, `PermissionDenied` for what the operator's keys do not vouch for.
    pub fn error(self, object: &str, why: impl Into<String>) -> Error {
        let kind = match self {
            Refusal::Malformed | Refusal::Invalid => Kind::Corrupt,
            _ => Kind::PermissionDenied,
        };
        Error::new(kind, Stage::Fetch, object, why).with_reason(self.reason())
    }
}

/// Seconds since 1970; times before are 0.
fn secs(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
