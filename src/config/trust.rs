//! `[[trust]]`: whose signature a root filesystem or a manifest needs, by where it comes from.

use std::path::PathBuf;

use serde::Deserialize;

use crate::{
    error::{Error, Result, Stage},
    trust::place::{MANIFEST, Place, UPLOAD},
};

/// What a source owes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Require {
    /// A good signature by one of the keys; without one nothing is taken from there.
    Signature,
    /// Nothing: an exception from a rule with a shorter prefix.
    Nothing,
}

/// One rule. The longest prefix that fits decides.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trust {
    /// The beginning of URLs of tarballs, ending with a slash; `upload:` for tarballs that are uploaded; `*` for all tarballs; `manifest:` for manifests that
    /// come with a call.
    pub prefix: String,
    /// `signature` or `nothing`.
    pub require: Require,
    /// Files of OpenPGP certificates, as `gpg --export` writes them, armored or not. Absolute.
    #[serde(default)]
    pub openpgp: Vec<PathBuf>,
    /// Files of minisign public keys. Absolute. With keys of both kinds a signature of either is enough.
    #[serde(default)]
    pub minisign: Vec<PathBuf>,
    /// What is added to a tarball's URL for its signature. Default: `.minisig` with minisign keys; `.asc`, and where there is none `.sig`, with OpenPGP keys.
    pub suffix: Option<String>,
}

/// Refuses rules that could not mean what they say.
pub(super) fn check(rules: &[Trust]) -> Result<()> {
    let mut known: Vec<(&str, Option<Place>)> = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let wrong = |key: &str, why: String| {
            let field = format!("trust[{index}].{key}");
            Err(Error::field(Stage::Config, field.clone(), format!("{field}: {why}")))
        };
        let place = match rule.prefix.as_str() {
            "*" | UPLOAD | MANIFEST => None,
            prefix if !prefix.ends_with('/') || prefix.contains(['?', '#']) => {
                let why = format!("{prefix:?} is neither *, {UPLOAD}, {MANIFEST} nor the beginning of a URL that ends with a slash");
                return wrong("prefix", why);
            }
            prefix => match Place::parse(prefix) {
                Ok(place) if place.is_ambiguous() => return wrong("prefix", format!("{prefix:?} can be read in two ways")),
                Ok(place) => Some(place),
                Err(why) => return wrong("prefix", format!("{prefix:?}: {why}")),
            },
        };
        if known.iter().any(|(prefix, other)| *prefix == rule.prefix || (place.is_some() && *other == place)) {
            return wrong("prefix", format!("{:?} is there twice", rule.prefix));
        }
        known.push((&rule.prefix, place));
        if let Some(path) = rule.openpgp.iter().chain(&rule.minisign).find(|path| !path.is_absolute()) {
            return wrong("openpgp", format!("{path:?} is not an absolute path"));
        }
        match (rule.require, rule.openpgp.is_empty() && rule.minisign.is_empty()) {
            (Require::Signature, true) => return wrong("require", "a signature needs keys: openpgp or minisign".into()),
            (Require::Nothing, false) => return wrong("require", "nothing is required, so keys mean nothing".into()),
            _ => {}
        }
        let Some(suffix) = &rule.suffix else { continue };
        if suffix.len() < 2 || !suffix.starts_with('.') || !suffix[1..].bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return wrong("suffix", format!("{suffix:?} is not a dot and letters"));
        }
        if !rule.openpgp.is_empty() && !rule.minisign.is_empty() {
            return wrong("suffix", "goes with keys of one kind".into());
        }
    }
    Ok(())
}
