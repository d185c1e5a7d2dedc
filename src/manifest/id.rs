//! The name of an image in the catalogue.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{manifest::Manifest, names::Digest};

/// `img-` and 20 lower-case hexadecimal digits (80 bits), derived from the manifest and the root filesystem: the same image has the same id
/// on every host, and creating it twice gives one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageId(String);

/// Hexadecimal digits after `img-`.
const HEX_LEN: usize = 20;

impl ImageId {
    /// The id for a manifest and what tells its root filesystem from others: the digest of the tarball, or its URL while no digest is known.
    pub fn derive(manifest: &Manifest, rootfs: &str) -> ImageId {
        ImageId::from_digest(&manifest.digest(), rootfs)
    }

    fn from_digest(manifest: &Digest, rootfs: &str) -> ImageId {
        let hex = Digest::of(format!("cloudletd image 1\n{manifest}\n{rootfs}\n").as_bytes()).hex();
        ImageId(format!("img-{}", &hex[..HEX_LEN]))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ImageId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let hex = text.strip_prefix("img-").unwrap_or("");
        if hex.len() == HEX_LEN && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            Ok(ImageId(text.to_owned()))
        } else {
            let shown: String = text.chars().take(64).collect();
            Err(format!("{shown:?} is not an image id: it must be img- and {HEX_LEN} lower-case hexadecimal digits"))
        }
    }
}

impl TryFrom<String> for ImageId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}
impl From<ImageId> for String {
    fn from(id: ImageId) -> String {
        id.0
    }
}
impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_follow_from_both_digests_and_are_never_paths() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let id = ImageId::from_digest(&a, "x");
        assert_eq!(id, ImageId::from_digest(&a, "x"));
        assert_eq!(id.to_string().parse(), Ok(id.clone()));
        assert!(id != ImageId::from_digest(&a, "") && id != ImageId::from_digest(&b, "x"));
        for bad in ["", "img-", "img-../../../etc/passwd", "img-ABCDEF0123456789ABCD", "img-00000000000000000000\n", "ami-00000000000000000000"] {
            assert!(bad.parse::<ImageId>().is_err(), "{bad:?}");
        }
    }
}
