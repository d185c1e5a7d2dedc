//! Mirrors: which places are asked for a URL, in which order, and which of them are put aside for a while.
//!
//! ```text
//! URL ─ rules with the first prefix that fits ─┬─ digest known ───▶ every mirror, in order
//!                                              └─ digest unknown ─▶ mirrors of rules with `trusted`, the URL itself where a rule names it;
//!                                                                   the URL itself when nothing else is left
//! ```
//!
//! Whoever knows the digest may take the bytes from anybody; whoever does not takes them from where the manifest says, or from whom the operator trusts.
//!
//! A mirror that fails by its own fault (no answer, a stall, 5xx, a cut transfer, wrong bytes, an answer that makes no sense) is asked last until its
//! back-off is over, which doubles with each further failure. It is still asked when nobody else has the file: a mirror that is put aside beats none.
//! That it does not have a file (404) is no fault.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use reqwest::Url;
use tokio::time::Instant;

use super::{Candidate, Descriptor, Fetcher, Then, file, policy};
use crate::error::{Error, Kind, Result, Stage};

/// In the URL of a mirror, the place of the digest: such a mirror keeps files by content (`http://mirror/v1/blobs/{digest}`).
pub const DIGEST_PLACE: &str = "{digest}";
/// The same for the digest's 64 hexadecimal digits alone (`http://mirror/blobs/sha256/{sha256}`).
pub const SHA256_PLACE: &str = "{sha256}";
/// Longest time that a mirror is put aside: one that was repaired is used again within it.
const BACK_OFF_MAX: Duration = Duration::from_secs(900);
/// Places remembered; what is more belongs to a configuration that nobody has.
const PLACES_MAX: usize = 1024;

/// A rewrite rule. The operator wrote it, so its targets may be at any address and host; where they redirect to may not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mirror {
    /// What is replaced: a URL prefix, or without a scheme a host and the beginning of a path (`deb.example`, `deb.example/cloud`) for http and https.
    /// It ends at a slash: `https://deb.example/cloud` does not fit `https://deb.example/clouds/x`.
    pub prefix: String,
    /// What takes its place, in order of preference; [`DIGEST_PLACE`] or [`SHA256_PLACE`] in it is replaced by the digest, and nothing is appended. Only these are asked; to
    /// fall back on the origin, name it last.
    pub replace: Vec<String>,
    /// Whether these may be asked for files whose digest nobody knows.
    pub trusted: bool,
}

impl Mirror {
    /// Checks the rule. `Kind::InvalidRequest` naming what is wrong.
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |text: String| Error::field(Stage::Config, "fetch.mirror", text);
        let prefix = if has_scheme(&self.prefix) { self.prefix.clone() } else { format!("https://{}", self.prefix) };
        for url in std::iter::once(&prefix).chain(&self.replace) {
            let parsed = policy::parse(url).map_err(|error| wrong(error.to_string()))?;
            if !matches!(parsed.scheme(), "http" | "https" | "file") || parsed.query().is_some() || parsed.fragment().is_some() {
                return Err(wrong(format!("{url:?} is not an http, https or file URL without query")));
            }
        }
        for place in [DIGEST_PLACE, SHA256_PLACE] {
            if let Some(url) = self.replace.iter().find(|url| url.contains(place) && !after_host(url).is_some_and(|path| path.contains(place))) {
                return Err(wrong(format!("{url:?} has {place} outside of its path")));
            }
        }
        Ok(())
    }

    /// What is left of `url` behind the prefix, when that ends where a part of the URL does.
    fn rest_of<'u>(&self, url: &'u str) -> Option<&'u str> {
        let subject = if has_scheme(&self.prefix) { url } else { url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"))? };
        let rest = subject.strip_prefix(self.prefix.as_str())?;
        (self.prefix.ends_with('/') || rest.is_empty() || rest.starts_with(['/', '?'])).then_some(rest)
    }
}

fn has_scheme(prefix: &str) -> bool {
    prefix.contains("://")
}

fn after_host(url: &str) -> Option<&str> {
    let (_, rest) = url.split_once("://")?;
    rest.find('/').map(|at| &rest[at..])
}

impl Fetcher {
    /// The places to ask for what `descriptor` describes, in order of preference; `url` is its URL.
    pub(super) fn candidates(&self, url: &Url, descriptor: &Descriptor) -> Result<Vec<Candidate>> {
        let text = url.as_str();
        let Some(first) = self.config.mirrors.iter().find(|mirror| mirror.rest_of(text).is_some()) else {
            return Ok(vec![self.origin(url)?]);
        };
        let mut candidates: Vec<Candidate> = Vec::new();
        for mirror in self.config.mirrors.iter().filter(|mirror| mirror.prefix == first.prefix) {
            let Some(rest) = mirror.rest_of(text) else { continue };
            for base in &mirror.replace {
                let Some(rewritten) = rewritten(url, base, rest, descriptor)? else { continue };
                if descriptor.digest.is_none() && !mirror.trusted && rewritten != *url {
                    continue;
                }
                let candidate = match rewritten.scheme() {
                    "file" => Candidate::File { place: file::place(&rewritten, &self.config.file_roots)?, url: rewritten },
                    _ => Candidate::Http { url: rewritten, mirror: Some(base.clone()) },
                };
                if !candidates.iter().any(|other| other.url() == candidate.url()) {
                    candidates.push(candidate);
                }
            }
        }
        if !candidates.is_empty() {
            return Ok(candidates);
        }
        // Without a digest, and with nobody to be trusted, the origin is the only one who can say what the file is.
        if descriptor.digest.is_none() {
            return Ok(vec![self.origin(url)?]);
        }
        Err(policy::refused(url, "its mirror rule has no replacement".into()))
    }

    fn origin(&self, url: &Url) -> Result<Candidate> {
        if url.scheme() == "file" {
            return Ok(Candidate::File { url: url.clone(), place: file::place(url, &self.config.file_roots)? });
        }
        self.config.rules(url).1.policy.check_url(url)?;
        Ok(Candidate::Http { url: url.clone(), mirror: None })
    }
}

/// The URL of a file at a mirror; nothing when the mirror goes by digest and there is none.
fn rewritten(url: &Url, base: &str, rest: &str, descriptor: &Descriptor) -> Result<Option<Url>> {
    if base.contains(DIGEST_PLACE) || base.contains(SHA256_PLACE) {
        let Some(digest) = &descriptor.digest else { return Ok(None) };
        return policy::parse(&base.replace(DIGEST_PLACE, &digest.to_string()).replace(SHA256_PLACE, &digest.hex())).map(Some);
    }
    let base_url = policy::parse(base)?;
    let rewritten = policy::parse(&format!("{}/{}", base.trim_end_matches('/'), rest.trim_start_matches('/')))?;
    // The rest is a stranger's: it can only choose a path.
    let place = |url: &Url| (url.scheme().to_owned(), url.host_str().map(str::to_owned), url.port());
    if place(&rewritten) != place(&base_url) || !rewritten.path().starts_with(base_url.path().trim_end_matches('/')) {
        return Err(policy::refused(url, "the URL leads out of its mirror".into()));
    }
    Ok(Some(rewritten))
}

/// Which places failed lately.
#[derive(Debug)]
pub struct Health {
    /// Back-off after the first failure.
    first: Duration,
    places: Mutex<HashMap<String, Aside>>,
}

/// A place that failed.
#[derive(Debug, Clone)]
struct Aside {
    /// Failures since the last success.
    failures: u32,
    until: Instant,
    why: String,
}

impl Health {
    /// Everybody is well. `first` is the back-off after the first failure; it doubles with each further one, up to a quarter of an hour.
    pub fn new(first: Duration) -> Health {
        Health { first, places: Mutex::default() }
    }

    /// A place failed by its own fault.
    pub fn failed(&self, place: &str, why: &Error) {
        let mut places = self.places();
        let now = Instant::now();
        if places.len() >= PLACES_MAX {
            places.retain(|_, aside| aside.until > now);
        }
        let failures = places.get(place).map_or(0, |aside| aside.failures).saturating_add(1);
        let back_off = back_off(self.first, failures);
        tracing::warn!(mirror = place, failures, back_off_secs = back_off.as_secs_f64(), error = %why.chain(), "put aside");
        places.insert(place.to_owned(), Aside { failures, until: now + back_off, why: why.chain() });
    }

    /// A place did what was asked of it.
    pub fn worked(&self, place: &str) {
        self.places().remove(place);
    }

    /// Whether a place is put aside now, and why.
    pub fn aside(&self, place: &str) -> Option<String> {
        let now = Instant::now();
        self.places().get(place).filter(|aside| aside.until > now).map(|aside| aside.why.clone())
    }

    fn places(&self) -> MutexGuard<'_, HashMap<String, Aside>> {
        self.places.lock().expect("no panic while holding the table of mirrors")
    }
}

/// How long a place is put aside after so many failures, at least one.
fn back_off(first: Duration, failures: u32) -> Duration {
    first.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(BACK_OFF_MAX)
}

/// Whether a failure is the place's own fault. `then` is what follows from it: wrong bytes that are asked for again were a mixture of several places.
pub(super) fn is_own_fault(error: &Error, then: Then) -> bool {
    match error.kind() {
        Kind::Unavailable | Kind::Timeout => then != Then::GiveUp,
        Kind::Corrupt => then == Then::NextCandidate,
        // It leads elsewhere, or is not who it should be.
        Kind::PermissionDenied => matches!(error.reason(), "URL_NOT_ALLOWED" | "TLS_CERTIFICATE"),
        _ => false,
    }
}

/// What to report when no candidate is left: a failure that may pass if there is one, else the first. When several places were asked, each is named with its
/// last failure.
pub(super) fn verdict(wanted: &str, mut failures: Vec<(String, Error)>) -> Error {
    let Some(telling) = failures.iter().rposition(|(_, error)| error.is_retryable()).or_else(|| (!failures.is_empty()).then_some(0)) else {
        return Error::internal(Stage::Fetch, "", "nothing was tried");
    };
    let mut last: Vec<(&str, &Error)> = Vec::new();
    for (place, error) in &failures {
        match last.iter_mut().find(|(other, _)| other == place) {
            Some(entry) => entry.1 = error,
            None => last.push((place.as_str(), error)),
        }
    }
    if last.len() < 2 {
        return failures.swap_remove(telling).1;
    }
    // An error names what it happened to, which may be behind a redirect of the place.
    let text = |(place, error): &(&str, &Error)| {
        let chain = error.chain();
        if chain.starts_with(place) { chain } else { format!("{place}: {chain}") }
    };
    let each: Vec<String> = last.iter().map(text).collect();
    let message = format!("none of {} places gave it: {}", last.len(), each.join("; "));
    let telling = &failures[telling].1;
    Error::new(telling.kind(), Stage::Fetch, wanted, message).with_reason(telling.reason())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_offs_double_up_to_a_limit_and_end_with_a_success() {
        let seconds: Vec<u64> = (1..=8).chain([u32::MAX]).map(|failures| back_off(Duration::from_secs(30), failures).as_secs()).collect();
        assert_eq!(seconds, [30, 60, 120, 240, 480, 900, 900, 900, 900]);
        let health = Health::new(Duration::from_secs(30));
        let why = Error::new(Kind::Unavailable, Stage::Fetch, "http://m/", "is down");
        health.failed("http://m/", &why);
        health.failed("http://m/", &why);
        assert_eq!(health.places()["http://m/"].failures, 2);
        assert!(health.aside("http://m/").expect("aside").contains("is down"));
        assert!(health.aside("http://other/").is_none());
        health.worked("http://m/");
        assert!(health.aside("http://m/").is_none());
    }
}
