//! Which keys of a certificate may sign, and when.
//!
//! A certificate is a primary key, signatures that the primary key made over itself and its user ids (they carry expiry and usage), and subkeys with
//! signatures that bind them. Of several self-signatures the newest good one counts, as GnuPG does it. A revocation counts whatever its reason and whether
//! or not it can be verified: it stands in a file of the operator's, and the safe reading is that the key is gone.

use std::io::Read;

use pgp::{
    composed::{SignedPublicKey, SignedPublicSubKey},
    crypto::public_key::PublicKeyAlgorithm,
    packet::{PublicKey, PublicSubkey, Signature, SignatureType, SubpacketData},
    ser::Serialize,
    types::{KeyDetails, Tag},
};

use super::super::{CLOCK_SKEW, Refusal};
use crate::names::Digest;

/// Serialised parameters of an RSA key of 2048 bits: two lengths of 2 bytes, a modulus of 256, an exponent of 1 at least.
const RSA_2048_LEN: usize = 2 + 256 + 2 + 1;

type Judgement = Result<(), (Refusal, String)>;

/// A certificate of the operator's.
#[derive(Debug, Clone)]
pub(super) struct Certificate {
    key: SignedPublicKey,
    material: String,
}

/// A key of a certificate.
#[derive(Debug, Clone, Copy)]
pub(super) enum SigningKey<'a> {
    /// The primary key itself.
    Primary(&'a PublicKey),
    /// A subkey.
    Subkey(&'a SignedSubkey),
}

/// A subkey with what binds it.
pub(super) type SignedSubkey = SignedPublicSubKey;

impl SigningKey<'_> {
    /// Whether this key made `signature` over `data`.
    pub fn verify(&self, signature: &Signature, data: impl Read) -> pgp::errors::Result<()> {
        match self {
            SigningKey::Primary(key) => signature.verify(*key, data),
            SigningKey::Subkey(subkey) => signature.verify(&subkey.key, data),
        }
    }
}

impl Certificate {
    pub fn new(key: SignedPublicKey) -> Self {
        // What was read can be written; if not, the fingerprint is what there is.
        let material = key.to_bytes().map_or_else(|_| format!("{:X}", key.primary_key.fingerprint()), |bytes| Digest::of(&bytes).hex());
        Certificate { key, material }
    }

    /// The whole certificate, binary.
    pub fn to_bytes(&self) -> pgp::errors::Result<Vec<u8>> {
        self.key.to_bytes()
    }

    /// SHA-256 of the whole certificate, hexadecimal.
    pub fn material(&self) -> String {
        self.material.clone()
    }

    pub fn fingerprint(&self) -> String {
        format!("{:X}", self.key.primary_key.fingerprint())
    }

    pub fn keys(&self) -> impl Iterator<Item = SigningKey<'_>> {
        std::iter::once(SigningKey::Primary(&self.key.primary_key)).chain(self.key.public_subkeys.iter().map(SigningKey::Subkey))
    }

    /// Whether `key`, one of this certificate's, may have made `signature`, seen from `now`.
    pub fn may_sign(&self, key: SigningKey<'_>, signature: &Signature, now: u64) -> Judgement {
        let made = signature.created().map_or(0, |time| u64::from(time.as_secs()));
        let primary = &self.key.primary_key;
        if !self.key.details.revocation_signatures.is_empty() {
            return Err((Refusal::KeyRevoked, format!("key {} was revoked", self.fingerprint())));
        }
        let Some(newest) = self.newest_self_signature(now) else {
            return Err((Refusal::KeyExpired, format!("key {} has no valid self-signature", self.fingerprint())));
        };
        check_time(primary, newest, made, now)?;
        match key {
            SigningKey::Primary(primary) => {
                check_strength(primary)?;
                // Without flags (keys of old) a primary key may sign.
                if has_flags(newest) && !newest.key_flags().sign() {
                    return Err((Refusal::KeyUnknown, format!("key {} is not for signing", self.fingerprint())));
                }
                Ok(())
            }
            SigningKey::Subkey(subkey) => {
                check_strength(&subkey.key)?;
                check_subkey(primary, subkey, made, now)
            }
        }
    }

    /// The newest good signature of the primary key over itself or over a user id that was not revoked later.
    fn newest_self_signature(&self, now: u64) -> Option<&Signature> {
        let primary = &self.key.primary_key;
        let direct = self.key.details.direct_signatures.iter().filter(|signature| signature.verify_key(primary).is_ok());
        let over_ids = self.key.details.users.iter().filter_map(|user| {
            let ours = || user.signatures.iter().filter(|signature| signature.verify_certification(primary, Tag::UserId, &user.id).is_ok());
            let newest = ours().filter(|signature| signature.is_certification()).max_by_key(|signature| signature.created())?;
            let revoked = ours().any(|signature| signature.typ() == Some(SignatureType::CertRevocation) && signature.created() >= newest.created());
            (!revoked).then_some(newest)
        });
        direct.chain(over_ids).filter(|signature| is_in_force(signature, now)).max_by_key(|signature| signature.created())
    }
}

/// A self-signature that was made, and has not expired itself.
fn is_in_force(signature: &Signature, now: u64) -> bool {
    let Some(made) = signature.created().map(|time| u64::from(time.as_secs())) else { return false };
    let lasts = signature.signature_expiration_time().map_or(0, |lasts| u64::from(lasts.as_secs()));
    made <= now + CLOCK_SKEW.as_secs() && (lasts == 0 || made + lasts > now)
}

fn has_flags(signature: &Signature) -> bool {
    signature.config().is_some_and(|config| config.hashed_subpackets().any(|packet| matches!(packet.data, SubpacketData::KeyFlags(_))))
}

/// Whether the key was there when the signature was made, and is valid now.
fn check_time(key: &impl KeyDetails, binding: &Signature, made: u64, now: u64) -> Judgement {
    let name = format!("{:X}", key.fingerprint());
    let born = u64::from(key.created_at().as_secs());
    if made < born {
        return Err((Refusal::KeyExpired, format!("the signature is older than its key {name}")));
    }
    let lasts = binding.key_expiration_time().map_or(0, |lasts| u64::from(lasts.as_secs()));
    if lasts > 0 && born + lasts <= now {
        return Err((Refusal::KeyExpired, format!("key {name} expired {} s ago", now - born - lasts)));
    }
    Ok(())
}

fn check_strength(key: &impl KeyDetails) -> Judgement {
    let weak = |why: &str| Err((Refusal::Weak, format!("key {:X} {why}", key.fingerprint())));
    match key.algorithm() {
        PublicKeyAlgorithm::RSA | PublicKeyAlgorithm::RSASign if key.public_params().write_len() < RSA_2048_LEN => {
            weak("is of RSA with less than 2048 bits")
        }
        PublicKeyAlgorithm::RSA
        | PublicKeyAlgorithm::RSASign
        | PublicKeyAlgorithm::ECDSA
        | PublicKeyAlgorithm::EdDSALegacy
        | PublicKeyAlgorithm::Ed25519
        | PublicKeyAlgorithm::Ed448 => Ok(()),
        _ => weak("is of an algorithm that is not accepted for signatures"),
    }
}

fn check_subkey(primary: &PublicKey, subkey: &SignedSubkey, made: u64, now: u64) -> Judgement {
    let name = || format!("{:X}", subkey.key.fingerprint());
    if subkey.signatures.iter().any(|signature| signature.typ() == Some(SignatureType::SubkeyRevocation)) {
        return Err((Refusal::KeyRevoked, format!("subkey {} was revoked", name())));
    }
    let bindings = subkey.signatures.iter().filter(|signature| signature.typ() == Some(SignatureType::SubkeyBinding));
    let good = bindings.filter(|signature| signature.verify_subkey_binding(primary, &subkey.key).is_ok() && is_in_force(signature, now));
    let Some(binding) = good.max_by_key(|signature| signature.created()) else {
        return Err((Refusal::KeyUnknown, format!("subkey {} is not bound to its primary key", name())));
    };
    check_time(&subkey.key, binding, made, now)?;
    if !binding.key_flags().sign() {
        return Err((Refusal::KeyUnknown, format!("subkey {} is not for signing", name())));
    }
    // Without it anybody could claim another's signing subkey as one of theirs.
    if !binding.embedded_signature().is_some_and(|back| vouches(back, &subkey.key, primary)) {
        return Err((Refusal::KeyUnknown, format!("subkey {} does not vouch for its primary key", name())));
    }
    Ok(())
}

fn vouches(back: &Signature, subkey: &PublicSubkey, primary: &PublicKey) -> bool {
    back.verify_primary_key_binding(subkey, primary).is_ok()
}
