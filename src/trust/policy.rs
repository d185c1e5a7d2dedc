//! Whose signature a source owes: the rules of the configuration, with their keys read.
//!
//! The rule with the longest prefix of the URL that the image names decides, before mirrors: where the bytes really came from changes nothing. URLs are
//! compared as places ([`super::place`]), so that no spelling of one steps around its rule. No rule: a digest is all that is asked for. A rule that
//! requires a signature is never fulfilled by the absence of one (failures.md, 31): what can't be fetched, read or verified is refused.
//!
//! A file that is missing or holds no key keeps the daemon from starting, and from taking what has changed since. What a key vouched for is believed for as
//! long as the same key, with the same expiry and without a revocation, is in the configuration.

use std::{fs::File, io::Read, path::Path};

use super::{
    Method, Signer,
    minisign::{self, Keys},
    openpgp::{self, Keyring},
    place::{Fit, MANIFEST, Place, UPLOAD},
};
use crate::{
    config::trust::{Require, Trust},
    error::{Error, Kind, Result, Stage},
    worker::Vouching,
};

/// Suffix of minisign's signatures.
const MINISIGN_SUFFIX: &str = ".minisig";
/// Suffixes of OpenPGP signatures, in the order they are asked for: armored ones, and `gpg --detach-sign`'s own.
const OPENPGP_SUFFIXES: [&str; 2] = [".asc", ".sig"];

/// The rules.
#[derive(Debug, Default)]
pub struct Policy {
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    below: Below,
    required: Option<Required>,
}

/// What a rule is about.
#[derive(Debug)]
enum Below {
    /// All tarballs.
    All,
    /// Tarballs that are uploaded.
    Uploads,
    /// Manifests that come with a call.
    Manifests,
    /// Tarballs below a URL.
    Place(Place),
}

/// A signature that is owed: any of these is enough.
#[derive(Debug)]
pub struct Required {
    ways: Vec<Way>,
}

/// One kind of signature.
#[derive(Debug)]
struct Way {
    keys: TrustedKeys,
    suffixes: Vec<String>,
}

#[derive(Debug)]
enum TrustedKeys {
    Openpgp(Keyring),
    Minisign(Keys),
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let object = path.display().to_string();
    let mut bytes = Vec::new();
    let opened = File::open(path).and_then(|file| file.take(openpgp::KEYRING_BYTES_MAX as u64 + 1).read_to_end(&mut bytes));
    opened.map_err(|error| Error::io(Stage::Config, object, "read trusted keys", error))?;
    Ok(bytes)
}

impl Policy {
    /// Reads the keys of all rules. Errors name the file.
    pub fn new(rules: &[Trust]) -> Result<Policy> {
        let rules = rules.iter().map(Rule::new).collect::<Result<_>>()?;
        Ok(Policy { rules })
    }

    /// Whether no rule requires anything.
    pub fn is_empty(&self) -> bool {
        self.rules.iter().all(|rule| rule.required.is_none())
    }

    /// The signature that a tarball from `url` owes, if any. `PermissionDenied` (`URL_AMBIGUOUS`) for a URL that servers read in different ways when a rule
    /// could be meant by it.
    pub fn required(&self, url: &str) -> Result<Option<&Required>> {
        if self.is_empty() {
            return Ok(None);
        }
        let all = || self.rules.iter().find(|rule| matches!(rule.below, Below::All));
        let Ok(place) = Place::parse(url) else {
            return Err(
                Error::new(Kind::PermissionDenied, Stage::Fetch, url, "is no URL that a rule could be found for").with_reason("URL_AMBIGUOUS")
            );
        };
        if place.is_ambiguous() && self.rules.iter().any(|rule| rule.is_about_server(&place)) {
            let why = "its path can be read in two ways, and signatures are required from there";
            return Err(Error::new(Kind::PermissionDenied, Stage::Fetch, url, why)
                .with_reason("URL_AMBIGUOUS")
                .with_hint("name the file without encoded slashes, percent signs or ..;"));
        }
        let fitting = self.rules.iter().filter_map(|rule| rule.fit(&place).map(|fit| (fit, rule)));
        let longest = fitting.max_by_key(|(fit, _)| *fit).map(|(_, rule)| rule);
        Ok(longest.or_else(all).and_then(|rule| rule.required.as_ref()))
    }

    /// The signature that an uploaded tarball owes, if any.
    pub fn required_of_uploads(&self) -> Option<&Required> {
        let uploads = self.rules.iter().find(|rule| matches!(rule.below, Below::Uploads));
        let all = || self.rules.iter().find(|rule| matches!(rule.below, Below::All));
        uploads.or_else(all).and_then(|rule| rule.required.as_ref())
    }

    /// The signature that a manifest owes which comes with a call, if any.
    pub fn required_of_manifests(&self) -> Option<&Required> {
        self.rules.iter().find(|rule| matches!(rule.below, Below::Manifests)).and_then(|rule| rule.required.as_ref())
    }
}

impl Rule {
    fn new(rule: &Trust) -> Result<Rule> {
        let below = match rule.prefix.as_str() {
            "*" => Below::All,
            UPLOAD => Below::Uploads,
            MANIFEST => Below::Manifests,
            prefix => Below::Place(Place::parse(prefix).map_err(|why| Error::field(Stage::Config, "trust.prefix", format!("{prefix:?}: {why}")))?),
        };
        if rule.require == Require::Nothing {
            return Ok(Rule { below, required: None });
        }
        let mut ways = Vec::new();
        let suffixes = |default: &[&str]| match &rule.suffix {
            Some(suffix) => vec![suffix.clone()],
            None => default.iter().map(|suffix| (*suffix).to_owned()).collect(),
        };
        let mut keys = Vec::new();
        for path in &rule.minisign {
            let object = path.display().to_string();
            let text =
                String::from_utf8(read(path)?).map_err(|_| Error::field(Stage::Config, object.clone(), "is not text").with_reason("BAD_KEYRING"))?;
            keys.push(Keys::parse(&text, &object)?);
        }
        if let Some(keys) = keys.into_iter().reduce(Keys::joined) {
            ways.push(Way { keys: TrustedKeys::Minisign(keys), suffixes: suffixes(&[MINISIGN_SUFFIX]) });
        }
        let mut rings = Vec::new();
        for path in &rule.openpgp {
            rings.push(Keyring::parse(&read(path)?, &path.display().to_string())?);
        }
        if let Some(ring) = rings.into_iter().reduce(Keyring::joined) {
            ways.push(Way { keys: TrustedKeys::Openpgp(ring), suffixes: suffixes(&OPENPGP_SUFFIXES) });
        }
        if ways.is_empty() {
            return Err(Error::field(Stage::Config, "trust.require", "a signature needs keys: openpgp or minisign"));
        }
        Ok(Rule { below, required: Some(Required { ways }) })
    }

    /// How well it fits. A rule that exempts fits only what is written as it is.
    fn fit(&self, url: &Place) -> Option<Fit> {
        match (&self.below, &self.required) {
            (Below::Place(place), Some(_)) => place.covers(url),
            (Below::Place(place), None) => place.covers_exactly(url),
            _ => None,
        }
    }

    /// Whether it requires something of the server that a URL is of.
    fn is_about_server(&self, url: &Place) -> bool {
        let is_there = match &self.below {
            Below::All => true,
            Below::Place(place) => place.is_of_server(url),
            Below::Uploads | Below::Manifests => false,
        };
        is_there && self.required.is_some()
    }
}

impl Required {
    /// Where the signature of `url` may be, in the order of asking: a suffix is added to the path, before a query.
    pub fn signature_urls(&self, url: &str) -> Vec<String> {
        let end = url.find(['?', '#']).unwrap_or(url.len());
        let (path, query) = url.split_at(end);
        self.suffixes().map(|suffix| format!("{path}{suffix}{query}")).collect()
    }

    /// What is added to a file's name for its signature, in the order of asking.
    pub fn suffixes(&self) -> impl Iterator<Item = &str> {
        self.ways.iter().flat_map(|way| way.suffixes.iter().map(String::as_str))
    }

    /// Whether what this signer vouched for is still believed: the key, as it was then, is one of those that may vouch.
    pub fn trusts(&self, signer: &Signer) -> bool {
        self.ways.iter().any(|way| match (&way.keys, signer.method) {
            (TrustedKeys::Openpgp(ring), Method::Openpgp) => ring.materials().any(|(key, material)| key == signer.key && material == signer.material),
            (TrustedKeys::Minisign(keys), Method::Minisign) => {
                keys.materials().any(|(key, material)| key == signer.key && material == signer.material)
            }
            _ => false,
        })
    }

    /// The keys that a signature is to be verified with. Which kind it is of is seen from its text, not from where it lay.
    pub fn keys_for(&self, signature: &[u8]) -> Vouching<'_> {
        let is_minisign = signature.starts_with(minisign::MAGIC);
        let of = |way: &'_ Way| matches!(way.keys, TrustedKeys::Minisign(_)) == is_minisign;
        // Where only one kind is required, its reader says what is wrong with the other. There is always one: see `Rule::new`.
        let way = self.ways.iter().find(|way| of(way)).unwrap_or(&self.ways[0]);
        match &way.keys {
            TrustedKeys::Openpgp(ring) => Vouching::Openpgp(ring),
            TrustedKeys::Minisign(keys) => Vouching::Minisign(keys),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "untrusted comment: minisign public key\nRWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3\n";

    fn rule(prefix: &str, key: Option<&Path>) -> Trust {
        Trust {
            prefix: prefix.into(),
            require: if key.is_some() { Require::Signature } else { Require::Nothing },
            openpgp: Vec::new(),
            minisign: key.into_iter().map(Path::to_owned).collect(),
            suffix: None,
        }
    }

    fn with_key(rules: impl Fn(&Path) -> Vec<Trust>) -> Policy {
        let dir = tempfile::tempdir().expect("temporary directory");
        let key = dir.path().join("key.pub");
        std::fs::write(&key, KEY).expect("write");
        Policy::new(&rules(&key)).expect("keys are read")
    }

    #[test]
    fn the_longest_prefix_decides_and_no_rule_asks_for_nothing() {
        let policy = with_key(|key| vec![rule("https://a/", Some(key)), rule("https://a/free/", None), rule("*", Some(key))]);
        for (url, owes) in [
            ("https://a/x.tar", true),
            ("https://a/free/x.tar", false),
            ("http://a/free/x.tar", true),
            ("file:///x", true),
            ("https://a/free/../x.tar", true),
            ("https://a/free/%2e%2e/x.tar", true),
            ("https://a/FREE/x.tar", true),
            ("https://a.evil/free/x.tar", true),
            ("https://u:p@a:443/free/x.tar", false),
        ] {
            assert_eq!(policy.required(url).expect(url).is_some(), owes, "{url}");
        }
        assert!(policy.required_of_uploads().is_some() && policy.required_of_manifests().is_none());
        assert!(Policy::default().required("https://a/x.tar").expect("no rules").is_none());
        let required = policy.required("https://a/x.tar").expect("a URL").expect("required");
        assert_eq!(required.signature_urls("https://a/x.tar?token=1"), ["https://a/x.tar.minisig?token=1"]);
    }

    #[test]
    fn no_spelling_of_a_url_steps_around_its_rule() {
        let policy = with_key(|key| vec![rule("https://a.example/signed/", Some(key))]);
        for url in [
            "HTTPS://A.EXAMPLE/signed/x",
            "https://a.example:443/signed/x",
            "http://a.example/signed/x",
            "https://user@a.example/signed/x",
            "https://a.example./signed/x",
            "https://a.example//signed/x",
            "https://a.example/%73igned/x",
            "https://a.example/SIGNED/x",
            "https://a.example/free/../signed/x",
        ] {
            assert!(policy.required(url).expect(url).is_some(), "{url}");
        }
        for url in ["https://a.example/free%2f..%2fsigned/x", "https://a.example/free/..;/signed/x", "https://a.example/%2573igned/x", "nonsense"] {
            assert_eq!(policy.required(url).expect_err(url).reason(), "URL_AMBIGUOUS", "{url}");
        }
        for url in ["https://a.example.evil/signed/x", "https://a.example@evil/signed/x", "https://evil/a%2fb", "https://a.example:444/signed/x"] {
            assert!(policy.required(url).expect(url).is_none(), "{url}");
        }
    }

    #[test]
    fn uploads_and_manifests_have_rules_of_their_own() {
        let policy = with_key(|key| vec![rule("*", Some(key)), rule("upload:", None), rule("manifest:", Some(key))]);
        assert!(policy.required_of_uploads().is_none() && policy.required_of_manifests().is_some());
        assert!(policy.required("https://a/x").expect("a URL").is_some());
    }

    #[test]
    fn keys_that_are_not_there_keep_the_daemon_from_starting() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("key.pub");
        assert!(Policy::new(&[rule("*", Some(&path))]).is_err(), "missing");
        std::fs::write(&path, "no key\n").expect("write");
        assert_eq!(Policy::new(&[rule("*", Some(&path))]).expect_err("no key").reason(), "BAD_KEYRING");
    }
}
