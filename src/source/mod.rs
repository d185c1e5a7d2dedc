//! Getting a root filesystem's bytes: from a URL of a manifest to a file whose digest was checked as the bytes arrived.
//!
//! ```text
//! Descriptor ─ policy ─ candidates (mirrors) ─┬─ http   redirects, ranges, stalls ─┐
//!                                             └─ file   below a root               ├─ DigestWriter ─ size, digest, fsync
//!                          retries, one budget of time ◀───────────────────────────┘
//! ```
//!
//! Only `http`, `https` and `file` exist, without proxies and without decoding on the way: the digest is that of the bytes as they came off the
//! wire (failures.md, rules 9, 12, 25 and 28). The file keeps the name that the caller gave it; publishing it, and seeing to it that one transfer
//! runs for however many want the same bytes, is the store's business.
//!
//! # Retries
//!
//! A *round* asks each candidate once, those that failed lately last ([`mirror`]). What may pass (no answer, 408, 429, 5xx, a stall, a broken
//! connection) is asked again in the next round after a pause that doubles and is cut randomly; what stays wrong (404, wrong size or digest, a URL that is not allowed) takes the candidate out. Bytes
//! that arrived are kept: the next request asks for the rest. Without a digest in the descriptor the rest is only taken from the same URL, when the
//! server says by `ETag` or `Last-Modified` that it is still the same file; with one, the digest decides.

mod clients;
mod file;
mod http;
pub mod mirror;
pub mod mirrors_json;
pub(crate) mod partial;
mod policy;
mod resolver;
#[cfg(test)]
mod tests;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use reqwest::Url;
use tokio::time::Instant;

use clients::Clients;
pub use clients::{Authorities, Rules, SourceRules};
pub use mirror::Mirror;
pub use partial::DigestWriter;
pub use policy::{Network, UrlPolicy};

use crate::{
    error::{Error, Kind, Result, Stage},
    names::Digest,
    progress::Progress,
    units::GIB,
};

/// Longest pause between two rounds: a server that comes back is noticed within it.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// How soon cancelling is noticed while nothing arrives.
const CANCEL_CHECK: Duration = Duration::from_millis(100);

/// How to fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// How hosts are asked that no source is for.
    pub rules: Rules,
    /// How certain hosts are asked; the first that fits is used.
    pub sources: Vec<SourceRules>,
    /// For a whole fetch with all its retries.
    pub total_timeout: Duration,
    /// Rounds over the candidates; at least one.
    pub attempts: u32,
    /// Pause after the first round; doubled after each further one, up to 30 s.
    pub pause: Duration,
    /// Largest file, bytes as transferred.
    pub size_max: u64,
    /// Directories that `file` URLs may name files below. Absolute, without `..`.
    pub file_roots: Vec<PathBuf>,
    /// URLs with a prefix are fetched from elsewhere; the rules with the first prefix that fits are used.
    pub mirrors: Vec<Mirror>,
    /// How long a mirror is put aside after its first failure.
    pub mirror_back_off: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            rules: Rules {
                policy: UrlPolicy::default(),
                connect_timeout: Duration::from_secs(10),
                idle_timeout: Duration::from_secs(30),
                redirects_max: 5,
                authorities: Authorities::Host,
            },
            sources: Vec::new(),
            total_timeout: Duration::from_secs(3600),
            attempts: 5,
            pause: Duration::from_millis(500),
            size_max: 16 * GIB,
            file_roots: Vec::new(),
            mirrors: Vec::new(),
            mirror_back_off: Duration::from_secs(30),
        }
    }
}

/// What to fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Where it is.
    pub url: String,
    /// What it must be, when that is known.
    pub digest: Option<Digest>,
    /// How long it must be, when that is known, bytes.
    pub size: Option<u64>,
}

/// What was fetched; the bytes are in the file that the caller named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Digest of the bytes as transferred.
    pub digest: Digest,
    /// Their number.
    pub size: u64,
    /// What the server called it (`Content-Type`), for people; servers don't know.
    pub media_type_hint: Option<String>,
    /// Where it came from in the end, without query.
    pub url_used: String,
}

/// Whether a text is a URL that this module could fetch, whatever the policy. `Kind::InvalidRequest` (`URL_INVALID`).
pub fn check_url_text(text: &str) -> Result<()> {
    let url = policy::parse(text)?;
    match url.scheme() {
        "http" | "https" | "file" => Ok(()),
        other => Err(policy::refused(&url, format!("the scheme {other} is not http, https or file"))),
    }
}

/// Parses a URL of the configuration. `Kind::InvalidRequest` (`URL_INVALID`).
pub fn parse_url(url: &str) -> Result<Url> {
    policy::parse(url)
}

/// Fetches under one configuration. Shared by all transfers; connections are reused.
#[derive(Debug)]
pub struct Fetcher {
    config: Config,
    clients: Clients,
    /// Which mirrors failed lately.
    health: mirror::Health,
}

/// One place to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Candidate {
    File {
        url: Url,
        place: file::Place,
    },
    /// `mirror` is the replacement of the rule, none for the origin.
    Http {
        url: Url,
        mirror: Option<String>,
    },
}

impl Candidate {
    fn url(&self) -> &Url {
        match self {
            Candidate::File { url, .. } | Candidate::Http { url, .. } => url,
        }
    }

    /// What its health is kept under.
    fn mirror(&self) -> Option<&str> {
        match self {
            Candidate::Http { mirror, .. } => mirror.as_deref(),
            Candidate::File { .. } => None,
        }
    }
}

/// What to do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// The place may do better next time, after at least so long if it said so.
    Retry(Option<Duration>),
    /// The place has nothing for us.
    NextCandidate,
    /// No place can help: cancelled, out of time, no room.
    GiveUp,
}

#[derive(Debug)]
struct Failure {
    error: Error,
    then: Then,
}

impl Failure {
    fn retry(error: Error) -> Self {
        Failure { error, then: Then::Retry(None) }
    }

    fn next(error: Error) -> Self {
        Failure { error, then: Then::NextCandidate }
    }

    fn give_up(error: Error) -> Self {
        Failure { error, then: Then::GiveUp }
    }
}

/// A transfer over all its attempts.
struct Transfer<'t> {
    descriptor: &'t Descriptor,
    progress: &'t Progress,
    deadline: Instant,
    /// Absent only while a blocking thread has it.
    writer: Option<DigestWriter>,
    /// Where the bytes in the writer came from.
    origin: Option<http::Origin>,
    /// Whether bytes of another URL or of an earlier run are among them, so that a wrong digest may be their fault.
    is_mixed: bool,
}

impl Fetcher {
    /// Checks the configuration. `Kind::InvalidRequest` naming what is wrong with it.
    pub fn new(config: Config) -> Result<Fetcher> {
        let wrong = |field: &str, text: String| Err(Error::field(Stage::Config, field, text));
        if config.attempts == 0 {
            return wrong("fetch.attempts", "must be at least 1".into());
        }
        for root in &config.file_roots {
            if !root.is_absolute() || root.components().any(|part| part == std::path::Component::ParentDir) {
                return wrong("fetch.file_roots", format!("{root:?} is not an absolute path without \"..\""));
            }
        }
        config.mirrors.iter().try_for_each(Mirror::check)?;
        let health = mirror::Health::new(config.mirror_back_off);
        Ok(Fetcher { clients: Clients::new(&config), config, health })
    }

    /// Whether a URL could be fetched as far as its text tells. `Kind::InvalidRequest` (`URL_INVALID`) when it is no URL, `Kind::PermissionDenied`
    /// (`URL_NOT_ALLOWED`) when the policy forbids it. What its name resolves to is looked at when it is fetched.
    pub fn check_url(&self, url: &str) -> Result<()> {
        // Some digest: whether there is one is known when it is fetched.
        let descriptor = Descriptor { url: url.to_owned(), digest: Some(Digest::of(b"")), size: None };
        self.candidates(&policy::parse(url)?, &descriptor).map(drop)
    }

    /// Fetches into `partial`, which may have the beginning from an interrupted fetch of the same descriptor; it is durable when this returns.
    ///
    /// Fails with `Kind::Corrupt` for another digest (`DIGEST_MISMATCH`) or size (`SIZE_MISMATCH`) than described, `NotFound`, `PermissionDenied`,
    /// `NoSpace` (`ROOTFS_TOO_LARGE`, or the file system's), `Unavailable` or `Timeout` when it did not work within attempts and time, and
    /// `Cancelled`. What has arrived stays in `partial` for the next try, unless it was wrong.
    pub async fn fetch(&self, descriptor: &Descriptor, partial: &Path, progress: &Progress) -> Result<Fetched> {
        let url = policy::parse(&descriptor.url)?;
        let mut candidates = self.candidates(&url, descriptor)?;
        let wanted = policy::shown(&url);
        if let Some(size) = descriptor.size.filter(|size| *size > self.config.size_max) {
            return Err(partial::too_large(&wanted, Some(size), self.config.size_max));
        }
        let deadline = Instant::now() + self.config.total_timeout;
        let writer = self.open_partial(partial, descriptor.digest.is_some(), progress).await?;
        let is_mixed = !writer.is_empty();
        let mut transfer = Transfer { descriptor, progress, deadline, writer: Some(writer), origin: None, is_mixed };
        let mut failures = Vec::new();
        let mut pause = self.config.pause;
        for round in 1..=self.config.attempts {
            let mut wait = Duration::ZERO;
            let mut remaining = Vec::new();
            // Stable: those that are put aside are asked last, each group in the order of the configuration.
            candidates.sort_by_key(|candidate: &Candidate| candidate.mirror().is_some_and(|mirror| self.health.aside(mirror).is_some()));
            for candidate in candidates {
                let failure = match self.ask_and_note(&candidate, &mut transfer).await {
                    Ok(fetched) => return Ok(fetched),
                    Err(failure) => failure,
                };
                tracing::debug!(round, error = %failure.error.chain(), "fetch attempt failed");
                let place = policy::shown(candidate.url());
                match failure.then {
                    Then::GiveUp => return Err(with_earlier(failure.error, &wanted, failures)),
                    Then::NextCandidate => {}
                    Then::Retry(at_least) => {
                        wait = wait.max(at_least.unwrap_or_default());
                        remaining.push(candidate);
                    }
                }
                failures.push((place, failure.error));
            }
            candidates = remaining;
            if candidates.is_empty() || round == self.config.attempts {
                break;
            }
            transfer.sleep(wait.max(jittered(pause))).await.map_err(|error| with_earlier(error, &wanted, std::mem::take(&mut failures)))?;
            pause = (pause * 2).min(PAUSE_MAX);
        }
        Err(mirror::verdict(&wanted, failures))
    }

    /// Asks one candidate, once more when its bytes only spoiled what another place had given, and remembers how it did.
    async fn ask_and_note(&self, candidate: &Candidate, transfer: &mut Transfer<'_>) -> Result<Fetched, Failure> {
        let mut asked = self.ask(candidate, transfer).await;
        // Now from the start, with bytes of this place alone; with the next round's first place in between they would be mixed again.
        if matches!(&asked, Err(failure) if failure.error.kind() == Kind::Corrupt && matches!(failure.then, Then::Retry(_))) {
            asked = self.ask(candidate, transfer).await;
        }
        if let Some(mirror) = candidate.mirror() {
            match &asked {
                Ok(_) => self.health.worked(mirror),
                Err(failure) if mirror::is_own_fault(&failure.error, failure.then) => self.health.failed(mirror, &failure.error),
                Err(_) => {}
            }
        }
        asked
    }

    async fn open_partial(&self, partial: &Path, resume: bool, progress: &Progress) -> Result<DigestWriter> {
        let (path, size_max, progress) = (partial.to_owned(), self.config.size_max, progress.clone());
        on_blocking_thread(move || if resume { DigestWriter::resume(&path, size_max, &progress) } else { DigestWriter::create(&path, size_max) })
            .await
    }

    /// Asks one candidate for what is missing and checks the result.
    async fn ask(&self, candidate: &Candidate, transfer: &mut Transfer<'_>) -> Result<Fetched, Failure> {
        let (media_type_hint, url) = match candidate {
            Candidate::File { url, place } => {
                self.copy_file(url, place, transfer).await?;
                (None, url.clone())
            }
            Candidate::Http { url, mirror } => self.transfer_http(url, mirror.is_some(), transfer).await?,
        };
        let url_used = policy::shown(&url);
        let (digest, size) = transfer.finish(&url_used).await?;
        Ok(Fetched { digest, size, media_type_hint, url_used })
    }

    async fn copy_file(&self, url: &Url, place: &file::Place, transfer: &mut Transfer<'_>) -> Result<(), Failure> {
        let (url, place, size_max, progress) = (url.clone(), place.clone(), self.config.size_max, transfer.progress.clone());
        transfer.is_mixed = false;
        transfer.origin = None;
        let copied = transfer
            .with_writer(move |writer| {
                writer.restart()?;
                file::copy(&url, &place, writer, size_max, &progress)
            })
            .await;
        copied.map_err(|error| if error.kind() == Kind::Cancelled { Failure::give_up(error) } else { Failure::next(error) })
    }
}

impl Transfer<'_> {
    /// Lends the writer to a blocking thread.
    async fn with_writer<T: Send + 'static>(&mut self, work: impl FnOnce(&mut DigestWriter) -> Result<T> + Send + 'static) -> Result<T> {
        let mut writer = self.writer.take().ok_or_else(|| Error::internal(Stage::Fetch, "", "the transfer has lost its file"))?;
        let (writer, result) = on_blocking_thread(move || {
            let result = work(&mut writer);
            Ok((writer, result))
        })
        .await?;
        self.writer = Some(writer);
        result
    }

    fn len(&self) -> u64 {
        self.writer.as_ref().map_or(0, DigestWriter::len)
    }

    async fn restart(&mut self) -> Result<()> {
        self.origin = None;
        self.is_mixed = false;
        self.with_writer(DigestWriter::restart).await
    }

    /// Compares what has arrived with what was described, and makes it durable.
    async fn finish(&mut self, url: &str) -> Result<(Digest, u64), Failure> {
        let digest = self.writer.as_ref().map(DigestWriter::digest);
        let wrong = self.mismatch(url, digest);
        let Some(error) = wrong else {
            return self.with_writer(DigestWriter::finish).await.map_err(Failure::give_up);
        };
        let again = self.is_mixed;
        self.restart().await.map_err(Failure::give_up)?;
        // Once more from the start, with bytes of one place only.
        Err(if again { Failure::retry(error) } else { Failure::next(error) })
    }

    fn mismatch(&self, url: &str, digest: Option<Digest>) -> Option<Error> {
        let len = self.len();
        if let Some(size) = self.descriptor.size.filter(|size| *size != len) {
            return Some(size_mismatch(url, size, len));
        }
        let (expected, actual) = (self.descriptor.digest?, digest?);
        (expected != actual).then(|| {
            let message = format!("has digest {actual} ({len} bytes), expected {expected}");
            Error::new(Kind::Corrupt, Stage::Fetch, url, message).with_reason("DIGEST_MISMATCH")
        })
    }

    /// Runs `work`, unless the caller cancels or the whole budget of time runs out first.
    async fn watched<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        tokio::pin!(work);
        loop {
            self.progress.check()?;
            let now = Instant::now();
            if now >= self.deadline {
                return Err(Error::new(Kind::Timeout, Stage::Fetch, "", "the time for the whole transfer is over"));
            }
            if let Ok(output) = tokio::time::timeout_at(self.deadline.min(now + CANCEL_CHECK), &mut work).await {
                return Ok(output);
            }
        }
    }

    async fn sleep(&self, pause: Duration) -> Result<()> {
        self.watched(tokio::time::sleep(pause)).await
    }
}

fn size_mismatch(url: &str, expected: u64, actual: u64) -> Error {
    Error::new(Kind::Corrupt, Stage::Fetch, url, format!("has {actual} bytes, expected {expected}")).with_reason("SIZE_MISMATCH")
}

/// Between a half and the whole of `pause`, so that hosts that failed together don't come back together.
fn jittered(pause: Duration) -> Duration {
    let mut random = [0; 2];
    // Without randomness they do come back together, which is no reason to fail.
    let share = getrandom::fill(&mut random).map_or(u16::MAX, |()| u16::from_le_bytes(random));
    pause.mul_f64(0.5 + f64::from(share) / f64::from(u16::MAX) / 2.0)
}

/// A failure that ends everything, with what went wrong before as its cause.
fn with_earlier(error: Error, wanted: &str, earlier: Vec<(String, Error)>) -> Error {
    if error.kind() != Kind::Timeout || earlier.is_empty() {
        return error;
    }
    error.with_source(mirror::verdict(wanted, earlier))
}

async fn on_blocking_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::internal(Stage::Fetch, "", "a thread that writes has panicked").with_source(error)),
    }
}
