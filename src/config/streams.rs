//! `[[stream]]`: trees of images to read; `[publish]`: the tree of our own.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    error::{Error, Result, Stage},
    names::PoolName,
    source,
    streams::Filters,
    trust::openpgp::DOCUMENT_BYTES_MAX,
    units::{Bytes, MIB},
};

/// A source of images.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamConfig {
    /// Name that requests use: 1 to 64 of `A-Z a-z 0-9 . _ -`.
    pub name: PoolName,
    /// Where it is: the root of the mirror, or the URL of its index or of one products document.
    pub url: String,
    /// Whether documents have to be signed. Default: they have to.
    #[serde(default)]
    pub policy: SignaturePolicy,
    /// OpenPGP public keys that may sign, as `gpg --export` writes them, armored or not. Required for `signed`.
    pub keyring: Option<PathBuf>,
    /// Content ids of the index that are read. Default: all of datatype `image-downloads`.
    #[serde(default)]
    pub content: Vec<String>,
    /// Which items are wanted, as for sstream-query: `arch=amd64`, `release~(noble|jammy)`, `!=`, `!~`; all have to hold.
    #[serde(default)]
    pub filters: Vec<String>,
    /// What is done without being asked.
    #[serde(default)]
    pub sync: SyncMode,
    /// Versions of each product that are kept in the catalogue; older ones that nothing uses are removed.
    #[serde(default = "one")]
    pub keep: u32,
    /// Channel that follows the newest version.
    #[serde(default = "stable")]
    pub channel: String,
    /// Seconds between two looks at the source.
    #[serde(default = "hourly")]
    pub interval_secs: u64,
    /// Age of a document in seconds beyond which it is refused: a mirror that was frozen shows no updates either. Default: none.
    pub max_age_secs: Option<u64>,
    /// Largest document, at most 256 MiB.
    #[serde(default = "document_size")]
    pub max_document_size: Bytes,
    /// Largest root filesystem; `fetch.max_size` holds as well.
    pub max_image_size: Option<Bytes>,
}

/// Whether documents have to be signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SignaturePolicy {
    /// `.sjson`, clear-signed by a key of the keyring; nothing else is read.
    #[default]
    Signed,
    /// `.json`: the operator trusts the way it comes.
    Unsigned,
}

/// What is done without being asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SyncMode {
    /// Documents are read when a call asks for it, images are catalogued one by one.
    #[default]
    OnDemand,
    /// The newest versions are catalogued; their bytes come with the first render.
    Catalogue,
    /// Their bytes are fetched as well.
    Fetch,
}

fn one() -> u32 {
    1
}

fn stable() -> String {
    "stable".to_owned()
}

fn hourly() -> u64 {
    3600
}

fn document_size() -> Bytes {
    Bytes(32 * MIB)
}

/// The tree of our own.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Publish {
    /// Directory that a web server serves. Absolute, made when missing. Default: nothing is published.
    pub directory: Option<PathBuf>,
    /// Content id of the images.
    pub content_id: String,
    /// OpenPGP secret key, as `gpg --export-secret-keys` writes it, without passphrase; readable by its owner only. Default: nothing is signed.
    pub secret_key: Option<PathBuf>,
    /// A document of instance types (`platforms:1.0`) to publish beside the host's own platforms. Absolute.
    pub platforms: Option<PathBuf>,
    /// Address and port that the tree is served at, read-only HTTP. Default: not by this daemon.
    pub listen: Option<SocketAddr>,
    /// Seconds between two looks whether something has changed, which is then published. 0: only when a call asks for it.
    pub interval_secs: u64,
    /// Whether `/blobs/sha256/HEX` is served there too: root filesystems of catalogued images, fetched first when they are not here yet.
    pub blobs: bool,
}

impl Default for Publish {
    fn default() -> Self {
        Publish {
            directory: None,
            content_id: "cloudlets:released:download".into(),
            secret_key: None,
            platforms: None,
            listen: None,
            interval_secs: 0,
            blobs: false,
        }
    }
}

/// Refuses what does not fit together.
pub(super) fn check(streams: &[StreamConfig], publish: &Publish) -> Result<()> {
    let wrong = |field: &str, why: String| Err(Error::field(Stage::Config, field, format!("{field}: {why}")));
    for (index, stream) in streams.iter().enumerate() {
        let at = |key: &str| format!("stream[{index}].{key}");
        if streams[..index].iter().any(|other| other.name == stream.name) {
            return wrong(&at("name"), format!("{} is there twice", stream.name));
        }
        if let Err(error) = source::check_url_text(&stream.url) {
            return wrong(&at("url"), error.to_string());
        }
        match (stream.policy, &stream.keyring) {
            (SignaturePolicy::Signed, None) => return wrong(&at("keyring"), "is required: without keys nothing can be verified".into()),
            (SignaturePolicy::Unsigned, Some(_)) => return wrong(&at("keyring"), "has no use where nothing is verified".into()),
            (_, Some(path)) if !path.is_absolute() => return wrong(&at("keyring"), format!("{path:?} is not an absolute path")),
            _ => {}
        }
        if let Err(why) = Filters::parse(&stream.filters) {
            return wrong(&at("filters"), why);
        }
        if stream.max_document_size.0 > DOCUMENT_BYTES_MAX as u64 {
            let why = format!("{} is more than {}", stream.max_document_size, Bytes(DOCUMENT_BYTES_MAX as u64));
            return wrong(&at("max_document_size"), why);
        }
        if stream.keep == 0 {
            return wrong(&at("keep"), "must be at least 1".into());
        }
        if stream.interval_secs < 60 {
            return wrong(&at("interval_secs"), format!("{} is less than a minute", stream.interval_secs));
        }
        if let Err(why) = crate::images::check_channel(&stream.channel) {
            return wrong(&at("channel"), why);
        }
    }
    let absolute = |path: &Option<PathBuf>| path.as_deref().is_none_or(Path::is_absolute);
    for (key, path) in [("directory", &publish.directory), ("secret_key", &publish.secret_key), ("platforms", &publish.platforms)] {
        if !absolute(path) {
            return wrong(&format!("publish.{key}"), format!("{path:?} is not an absolute path"));
        }
    }
    if publish.content_id.is_empty() || publish.content_id.contains(|c: char| !(c.is_ascii_alphanumeric() || ":._-".contains(c))) {
        return wrong("publish.content_id", format!("{:?} is not made of letters, digits and :._-", publish.content_id));
    }
    if publish.blobs && publish.listen.is_none() {
        return wrong("publish.blobs", "needs publish.listen".into());
    }
    if publish.directory.is_none() && publish.interval_secs > 0 {
        return wrong("publish.interval_secs", "needs publish.directory".into());
    }
    if publish.directory.is_none() && (publish.listen.is_some() || publish.secret_key.is_some()) {
        return wrong("publish.directory", "is required for publish.listen and publish.secret_key".into());
    }
    Ok(())
}
