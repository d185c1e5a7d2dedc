//! One transfer over HTTP: follows redirects by hand, because each hop is a new URL to be checked, resumes where it may, and tells failures that
//! pass from those that stay (RFC 9110; ranges are its section 14).

use std::{error::Error as StdError, io, time::Duration};

use reqwest::{
    Response, StatusCode, Url,
    header::{self, HeaderMap},
};
use tokio::sync::mpsc;

use super::{
    Failure, Fetcher, Then, Transfer,
    partial::{DigestWriter, too_large},
    policy::{refused, shown},
    size_mismatch,
};
use crate::error::{Error, Kind, Result, Stage, kind_of_io};

/// Chunks between the network and the disk; one is at most some hundred kilobytes.
const CHUNKS_AHEAD: usize = 16;
/// What a server may ask us to wait; more is a refusal by other means.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(120);

/// Where bytes came from, for asking the same place for the rest of the same file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Origin {
    url: Url,
    /// A strong `ETag`, or `Last-Modified`.
    validator: Option<String>,
}

/// A response whose body is to be taken.
struct Body {
    response: Response,
    url: Url,
    /// Where in the file it starts.
    offset: u64,
    /// Size of the whole file, when the server says.
    total: Option<u64>,
}

enum Answer {
    Body(Box<Body>),
    /// There is nothing after what we have.
    Complete,
    /// What we have does not fit what is there.
    StartAgain,
}

impl Fetcher {
    /// Asks `url` for what is missing and writes it. What the server calls the file, and the URL after all redirects.
    pub(super) async fn transfer_http(&self, url: &Url, is_mirror: bool, transfer: &mut Transfer<'_>) -> Result<(Option<String>, Url), Failure> {
        // At most once more: without a range there is nothing to start again.
        for _ in 0..2 {
            if transfer.len() > 0 && !self.may_resume(url, transfer) {
                transfer.restart().await.map_err(Failure::give_up)?;
            }
            let (response, at) = self.request(url, is_mirror, transfer).await?;
            match answer(response, at, transfer)? {
                Answer::Body(body) => return self.take_body(url, *body, transfer).await,
                Answer::Complete => return Ok((None, url.clone())),
                Answer::StartAgain => transfer.restart().await.map_err(Failure::give_up)?,
            }
        }
        Err(Failure::next(bad_answer(url, "asks for ranges again and again")))
    }

    fn may_resume(&self, url: &Url, transfer: &Transfer<'_>) -> bool {
        let same_place = transfer.origin.as_ref().is_some_and(|origin| origin.url == *url && origin.validator.is_some());
        transfer.descriptor.digest.is_some() || same_place
    }

    async fn request(&self, url: &Url, is_mirror: bool, transfer: &Transfer<'_>) -> Result<(Response, Url), Failure> {
        let mut at = url.clone();
        let first = self.config.rules(url).1;
        for hop in 0..=first.redirects_max {
            let trusted = is_mirror && hop == 0;
            if !trusted {
                self.config.rules(&at).1.policy.check_url(&at).map_err(Failure::next)?;
            }
            let mut request =
                self.clients.of(&self.config, &at, trusted).map_err(Failure::give_up)?.get(at.clone()).header(header::ACCEPT_ENCODING, "identity");
            if transfer.len() > 0 {
                request = request.header(header::RANGE, format!("bytes={}-", transfer.len()));
                let origin = transfer.origin.as_ref().filter(|origin| origin.url == *url);
                if let Some(validator) = origin.and_then(|origin| origin.validator.as_ref()) {
                    request = request.header(header::IF_RANGE, validator);
                }
            }
            let patience = first.connect_timeout + first.idle_timeout;
            let sent = transfer.watched(tokio::time::timeout(patience, request.send())).await.map_err(Failure::give_up)?;
            let response = match sent {
                Ok(response) => response.map_err(|error| failed(&at, "ask for it", error))?,
                Err(_) => return Err(Failure::retry(stalled(&at, patience, "did not answer"))),
            };
            match redirect(&at, &response).map_err(Failure::next)? {
                None => return Ok((response, at)),
                Some(next) => at = next,
            }
        }
        Err(Failure::next(bad_answer(url, &format!("redirects more than {} times", first.redirects_max)).with_reason("TOO_MANY_REDIRECTS")))
    }

    async fn take_body(&self, asked: &Url, body: Body, transfer: &mut Transfer<'_>) -> Result<(Option<String>, Url), Failure> {
        let Body { mut response, url, offset, total } = body;
        let object = shown(&url);
        if let Some((total, expected)) = total.zip(transfer.descriptor.size).filter(|(total, expected)| total != expected) {
            return Err(Failure::next(size_mismatch(&object, expected, total)));
        }
        if let Some(total) = total.filter(|total| *total > self.config.size_max) {
            return Err(Failure::next(too_large(&object, Some(total), self.config.size_max)));
        }
        if offset == 0 && transfer.len() > 0 {
            transfer.restart().await.map_err(Failure::give_up)?;
        }
        let origin = Origin { url: asked.clone(), validator: validator(response.headers()) };
        if offset > 0 && transfer.origin.as_ref().is_none_or(|before| before.url != origin.url) {
            transfer.is_mixed = true;
        }
        transfer.origin = Some(origin);
        transfer.progress.enter(Stage::Fetch, total.unwrap_or(0));
        transfer.progress.add(offset);
        let media_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let limit = transfer.descriptor.size.unwrap_or(u64::MAX);
        self.write_body(&mut response, &url, offset, limit, transfer).await?;
        if let Some(total) = total.filter(|total| *total != transfer.len()) {
            let message = format!("ended after {} of {total} bytes", transfer.len());
            return Err(Failure::retry(Error::new(Kind::Unavailable, Stage::Fetch, object, message).with_reason("TRANSFER_INCOMPLETE")));
        }
        Ok((media_type, url))
    }

    /// Moves chunks from the network to the thread that hashes and writes them. The writer always comes back, with what has arrived.
    async fn write_body(&self, response: &mut Response, url: &Url, offset: u64, limit: u64, transfer: &mut Transfer<'_>) -> Result<(), Failure> {
        let mut writer =
            transfer.writer.take().ok_or_else(|| Failure::give_up(Error::internal(Stage::Fetch, "", "the transfer has lost its file")))?;
        let (send, receive) = mpsc::channel(CHUNKS_AHEAD);
        let written = tokio::task::spawn_blocking(move || (write_chunks(receive, &mut writer), writer));
        let mut have = offset;
        let patience = self.config.rules(url).1.idle_timeout;
        let received = loop {
            let next = match transfer.watched(tokio::time::timeout(patience, response.chunk())).await {
                Ok(next) => next,
                Err(error) => break Err(Failure::give_up(error)),
            };
            match next {
                Err(_) => break Err(Failure::retry(stalled(url, patience, "sent nothing"))),
                Ok(Err(error)) => break Err(failed(url, "transfer it", error)),
                Ok(Ok(None)) => break Ok(()),
                Ok(Ok(Some(chunk))) => {
                    have += chunk.len() as u64;
                    if have > limit {
                        break Err(Failure::next(size_mismatch(&shown(url), limit, have)));
                    }
                    transfer.progress.add(chunk.len() as u64);
                    // An error means that the writer has ended, and it says why.
                    if send.send(chunk).await.is_err() {
                        break Ok(());
                    }
                }
            }
        };
        drop(send);
        let (result, writer) = written
            .await
            .map_err(|error| Failure::give_up(Error::internal(Stage::Fetch, "", "the thread that writes has panicked").with_source(error)))?;
        transfer.writer = Some(writer);
        result.map_err(Failure::give_up)?;
        received
    }
}

impl Fetcher {
    /// The client for a URL that a server named, when the policy lets it be asked.
    pub(crate) fn guarded(&self, url: &Url) -> Result<&reqwest::Client> {
        self.config.rules(url).1.policy.check_url(url)?;
        self.clients.of(&self.config, url, false)
    }

    /// Follows the redirects of an answer that came from `at`, each under the policy, with these headers and no others.
    pub(crate) async fn follow(&self, mut response: Response, mut at: Url, headers: &HeaderMap, patience: Duration) -> Result<Response> {
        let redirects_max = self.config.rules(&at).1.redirects_max;
        for _ in 0..redirects_max {
            let Some(next) = redirect(&at, &response)? else { return Ok(response) };
            let sent = tokio::time::timeout(patience, self.guarded(&next)?.get(next.clone()).headers(headers.clone()).send()).await;
            response = sent.map_err(|_| stalled(&next, patience, "did not answer"))?.map_err(|error| failed(&next, "ask for it", error).error)?;
            at = next;
        }
        match redirect(&at, &response)? {
            None => Ok(response),
            Some(_) => Err(bad_answer(&at, &format!("redirects more than {redirects_max} times")).with_reason("TOO_MANY_REDIRECTS")),
        }
    }
}

/// Runs on a blocking thread, until the other end is dropped or the disk fails.
fn write_chunks<C: AsRef<[u8]>>(mut receive: mpsc::Receiver<C>, writer: &mut DigestWriter) -> Result<()> {
    while let Some(chunk) = receive.blocking_recv() {
        writer.take(chunk.as_ref())?;
    }
    Ok(())
}

/// Where a redirect leads. A step from https down to http is refused: it would take away what the first URL promised.
fn redirect(at: &Url, response: &Response) -> Result<Option<Url>> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
    let location = location.ok_or_else(|| bad_answer(at, "redirects without saying where to"))?;
    let next = at.join(location).map_err(|error| bad_answer(at, "redirects to something that is no URL").with_source(error))?;
    if at.scheme() == "https" && next.scheme() != "https" {
        return Err(refused(&next, format!("the redirect from {} leads from https to {}", shown(at), next.scheme())));
    }
    Ok(Some(next))
}

/// What an answer means for what we have.
fn answer(response: Response, url: Url, transfer: &Transfer<'_>) -> Result<Answer, Failure> {
    let status = response.status();
    let have = transfer.len();
    match status {
        StatusCode::OK => {
            let total = response.content_length();
            Ok(Answer::Body(Box::new(Body { response, url, offset: 0, total })))
        }
        StatusCode::PARTIAL_CONTENT => match content_range(response.headers()) {
            Some((Some(start), total)) if have > 0 && start == have => Ok(Answer::Body(Box::new(Body { response, url, offset: have, total }))),
            // A range that nobody asked for.
            _ if have == 0 => Err(Failure::next(bad_answer(&url, "answers with a part of the file"))),
            _ => Ok(Answer::StartAgain),
        },
        StatusCode::RANGE_NOT_SATISFIABLE if have > 0 => match content_range(response.headers()) {
            Some((None, Some(total))) if total == have => Ok(Answer::Complete),
            _ => Ok(Answer::StartAgain),
        },
        _ => Err(of_status(&url, status, response.headers())),
    }
}

/// `bytes 5-9/10`, `bytes 5-9/*` or `bytes */10`: start and total.
fn content_range(headers: &HeaderMap) -> Option<(Option<u64>, Option<u64>)> {
    let value = headers.get(header::CONTENT_RANGE)?.to_str().ok()?.trim().strip_prefix("bytes ")?;
    let (range, total) = value.split_once('/')?;
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    if range == "*" {
        return Some((None, total));
    }
    let (start, _) = range.split_once('-')?;
    Some((Some(start.parse().ok()?), total))
}

/// What `If-Range` may carry: a weak tag may not (RFC 9110, 13.1.5).
fn validator(headers: &HeaderMap) -> Option<String> {
    let text = |name| headers.get(name).and_then(|value: &header::HeaderValue| value.to_str().ok()).map(str::to_owned);
    text(header::ETAG).filter(|tag| tag.starts_with('"')).or_else(|| text(header::LAST_MODIFIED))
}

fn of_status(url: &Url, status: StatusCode, headers: &HeaderMap) -> Failure {
    let (kind, reason) = match status.as_u16() {
        404 | 410 => (Kind::NotFound, "ROOTFS_NOT_FOUND"),
        401 | 403 | 407 | 451 => (Kind::PermissionDenied, "HTTP_STATUS"),
        408 | 425 | 429 | 500..=599 => (Kind::Unavailable, "HTTP_STATUS"),
        _ => (Kind::InvalidRequest, "HTTP_STATUS"),
    };
    let error = Error::new(kind, Stage::Fetch, shown(url), format!("the server answers {status}")).with_reason(reason);
    if kind != Kind::Unavailable {
        return Failure::next(error);
    }
    let seconds = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(|text| text.trim().parse().ok());
    match seconds.map(Duration::from_secs) {
        Some(wait) if wait > RETRY_AFTER_MAX => Failure::next(error),
        wait => Failure { error, then: Then::Retry(wait) },
    }
}

fn bad_answer(url: &Url, what: &str) -> Error {
    Error::new(Kind::Corrupt, Stage::Fetch, shown(url), format!("the server {what}")).with_reason("HTTP_ANSWER")
}

fn stalled(url: &Url, patience: Duration, what: &str) -> Error {
    let message = format!("the server {what} for {:.1} s", patience.as_secs_f64());
    Error::new(Kind::Unavailable, Stage::Fetch, shown(url), message).with_reason("TRANSFER_STALLED")
}

/// Sorts an error of the client. Its text has the whole URL in it, so that is taken out.
fn failed(url: &Url, doing: &str, error: reqwest::Error) -> Failure {
    let error = error.without_url();
    if let Some(refusal) = find_refusal(&error) {
        return Failure::next(refusal);
    }
    let object = shown(url);
    if is_about_certificates(&error) {
        let refusal = Error::new(Kind::PermissionDenied, Stage::Fetch, object, "the server's certificate is not accepted");
        return Failure::next(refusal.with_reason("TLS_CERTIFICATE").with_source(error));
    }
    let kind = match io_kind(&error) {
        Some(kind @ (Kind::Unavailable | Kind::Busy)) => kind,
        _ if error.is_timeout() => Kind::Timeout,
        _ => Kind::Unavailable,
    };
    Failure::retry(Error::new(kind, Stage::Fetch, object, doing).with_source(error))
}

/// The chain of causes, with what `io::Error` hides inside itself.
fn causes<'e>(error: &'e (dyn StdError + 'static)) -> impl Iterator<Item = &'e (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error: &&'e (dyn StdError + 'static)| -> Option<&'e (dyn StdError + 'static)> {
        match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        }
    })
}

/// The resolver's refusal, made again because the client only lends it.
fn find_refusal(error: &reqwest::Error) -> Option<Error> {
    let refusal = causes(error).find_map(|cause| cause.downcast_ref::<Error>())?;
    Some(Error::new(refusal.kind(), Stage::Fetch, refusal.object(), refusal.message()).with_reason("URL_NOT_ALLOWED"))
}

fn is_about_certificates(error: &reqwest::Error) -> bool {
    causes(error).any(|cause| matches!(cause.downcast_ref(), Some(rustls::Error::InvalidCertificate(_))))
}

fn io_kind(error: &reqwest::Error) -> Option<Kind> {
    causes(error).find_map(|cause| cause.downcast_ref::<io::Error>()).filter(|error| error.raw_os_error().is_some()).map(kind_of_io)
}
