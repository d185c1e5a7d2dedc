//! Clear-signing the documents that we publish, as `gpg --clearsign` does it.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use pgp::{
    composed::{ArmorOptions, CleartextSignedMessage, Deserializable, SignedSecretKey},
    packet::{Signature, SignatureConfig, SignatureType, Subpacket, SubpacketData},
    types::{KeyDetails, Password, SigningKey, Timestamp},
};

use crate::error::{Error, Kind, Result, Stage};

/// Bytes of a secret key's file.
const LEN_MAX: u64 = 1 << 20;

/// A secret key that signs. Its content is never shown.
pub struct Signer {
    key: SignedSecretKey,
    object: String,
}

impl Signer {
    /// Reads a key as `gpg --export-secret-keys` writes it, armored or not. `Kind::PermissionDenied` (`SECRET_KEY_READABLE`) when others than its owner may
    /// read the file, `Kind::InvalidRequest` when it is no key, or has a passphrase.
    pub fn read(path: &Path) -> Result<Signer> {
        let object = path.display().to_string();
        let failed = |error| Error::io(Stage::Config, object.clone(), "read the secret key", error);
        let metadata = fs::metadata(path).map_err(failed)?;
        if metadata.permissions().mode() & 0o077 != 0 {
            let why = format!("its mode {:o} lets others than its owner read it", metadata.permissions().mode() & 0o7777);
            return Err(Error::new(Kind::PermissionDenied, Stage::Config, object, why).with_reason("SECRET_KEY_READABLE").with_hint("chmod 0600"));
        }
        let wrong = |why: &str| Error::new(Kind::InvalidRequest, Stage::Config, object.clone(), why.to_owned()).with_reason("SECRET_KEY_INVALID");
        if metadata.len() > LEN_MAX {
            return Err(wrong("is too large for a key"));
        }
        let bytes = fs::read(path).map_err(failed)?;
        let (key, _) = SignedSecretKey::from_reader_single(&bytes[..]).map_err(|error| wrong("is not an OpenPGP secret key").with_source(error))?;
        let signer = Signer { key, object: object.clone() };
        // A key that can't sign is found out now, not when the first image is published.
        signer.clearsign("test\n")?;
        Ok(signer)
    }

    /// Fingerprint of the primary key, upper-case hexadecimal.
    pub fn fingerprint(&self) -> String {
        format!("{:X}", self.key.primary_key.fingerprint())
    }

    /// The text with its signature around it. Lines must not end in white space, which no signature covers.
    pub fn clearsign(&self, text: &str) -> Result<String> {
        // The primary key where it is for signing, else the newest subkey that is: what GnuPG makes has either.
        let primary = may_sign(self.key.details.users.iter().flat_map(|user| &user.signatures).chain(&self.key.details.direct_signatures));
        let subkey = self.key.secret_subkeys.iter().rev().find(|subkey| may_sign(subkey.signatures.iter()));
        let signed = match subkey {
            Some(subkey) if !primary => sign(text, &subkey.key),
            _ => sign(text, &self.key.primary_key),
        };
        let wrong = |error: pgp::errors::Error| {
            Error::new(Kind::InvalidRequest, Stage::Config, self.object.clone(), "the key can't sign")
                .with_source(error)
                .with_reason("SECRET_KEY_INVALID")
        };
        signed.and_then(|message| message.to_armored_string(ArmorOptions::default())).map_err(wrong)
    }
}

fn may_sign<'a>(mut signatures: impl Iterator<Item = &'a Signature>) -> bool {
    signatures.any(|signature| signature.key_flags().sign())
}

fn sign(text: &str, key: &impl SigningKey) -> pgp::errors::Result<CleartextSignedMessage> {
    let mut config = SignatureConfig::v4(SignatureType::Text, key.algorithm(), key.hash_alg());
    config.hashed_subpackets = vec![
        Subpacket::regular(SubpacketData::SignatureCreationTime(Timestamp::now()))?,
        Subpacket::regular(SubpacketData::IssuerFingerprint(key.fingerprint()))?,
    ];
    config.unhashed_subpackets = vec![Subpacket::regular(SubpacketData::IssuerKeyId(key.legacy_key_id()))?];
    CleartextSignedMessage::new(text, config, key, &Password::empty())
}
