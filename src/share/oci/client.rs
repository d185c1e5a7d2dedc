//! The requests of the distribution specification.

use std::{collections::HashMap, fs::File, sync::Arc, time::Duration};

use futures_util::StreamExt;
use reqwest::{
    Body, Client, Method, RequestBuilder, Response, StatusCode, Url,
    header::{self, HeaderMap, HeaderValue},
};
use tokio::sync::Mutex;
use tokio_util::io::ReaderStream;

use super::{
    super::{
        holder::{self, Layer},
        remote::BlobStream,
    },
    auth::{self, Challenge, Credentials, TokenAnswer},
};
use crate::{
    config::remote,
    error::{Error, Kind, Result, Stage},
    names::Digest,
    source::{self, Fetcher},
};

/// For a request whose answer is short, or a chunk: 4 MiB at some 100 KB/s.
const PATIENCE: Duration = Duration::from_secs(60);
/// For a tarball to be taken.
const UPLOAD_PATIENCE: Duration = Duration::from_secs(3600);
/// How often a request is made that may succeed the next time.
const ATTEMPTS: u32 = 4;
/// Pause after the first attempt; doubled for each further one.
const PAUSE: Duration = Duration::from_millis(300);
/// What of an error's document is read.
const ERROR_LEN_MAX: u64 = 64 * 1024;
/// Bytes of a file read at once.
const READ_LEN: usize = 256 * 1024;

/// What a token is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Pull,
    Push,
}

/// A repository of a registry.
pub struct Registry {
    name: String,
    base: Url,
    repository: String,
    credentials: Credentials,
    token_server: Option<Url>,
    client: Client,
    /// Follows redirects to where the policy lets it.
    fetcher: Arc<Fetcher>,
    authorizations: Mutex<HashMap<Action, HeaderValue>>,
}

impl Registry {
    /// Reads the certificates; nothing is asked yet.
    pub fn new(config: &remote::Registry, fetcher: &Arc<Fetcher>) -> Result<Registry> {
        let base = source::parse_url(&config.url)?;
        Ok(Registry {
            name: config.name.clone(),
            client: holder::client(&config.url, base.scheme() == "https", config.ca.as_deref(), None)?,
            base,
            repository: config.repository.clone(),
            credentials: Credentials::new(config),
            token_server: config.token_server.as_deref().map(source::parse_url).transpose()?,
            fetcher: Arc::clone(fetcher),
            authorizations: Mutex::default(),
        })
    }

    pub(super) fn label(&self) -> &str {
        &self.name
    }

    /// `HOST[:PORT]/REPOSITORY`, as other tools write it.
    pub(super) fn place(&self) -> String {
        let host = self.base.host_str().unwrap_or_default();
        let port = self.base.port().map(|port| format!(":{port}")).unwrap_or_default();
        format!("{host}{port}/{}", self.repository)
    }

    fn url(&self, path: &str) -> Result<Url> {
        let url = self.base.join(&format!("v2/{}/{path}", self.repository));
        url.map_err(|error| Error::internal(Stage::Golden, self.place(), "a request's URL is none").with_source(error))
    }

    fn error(&self, kind: Kind, what: &str, message: impl Into<String>) -> Error {
        Error::new(kind, Stage::Golden, format!("{}: {what}", self.place()), message).with_reason("REMOTE_ANSWER")
    }

    /// Bytes of a manifest. `Kind::NotFound` when there is none of that tag.
    pub(super) async fn get_manifest(&self, tag: &str, media_type: &str, len_max: u64) -> Result<Vec<u8>> {
        let url = self.url(&format!("manifests/{tag}"))?;
        let response = self
            .ask(Action::Pull, tag, &[StatusCode::OK], |client| client.get(url.clone()).timeout(PATIENCE).header(header::ACCEPT, media_type))
            .await?;
        holder::body(response, &format!("{}:{tag}", self.place()), len_max, "REMOTE_ANSWER").await
    }

    pub(super) async fn put_manifest(&self, tag: &str, media_type: &str, bytes: Vec<u8>, digest: &Digest) -> Result<()> {
        let url = self.url(&format!("manifests/{tag}"))?;
        let bytes = bytes::Bytes::from(bytes);
        let made = |client: &Client| client.put(url.clone()).timeout(PATIENCE).header(header::CONTENT_TYPE, media_type).body(bytes.clone());
        let response = self.ask(Action::Push, tag, &[StatusCode::CREATED], made).await?;
        let named = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        match named.filter(|named| *named != digest.to_string()) {
            Some(named) => Err(self.error(Kind::Corrupt, tag, format!("the registry has stored {named:?}, sent was {digest}"))),
            None => Ok(()),
        }
    }

    /// A whole blob, held against its digest.
    pub(super) async fn get_blob(&self, layer: &Layer, len_max: u64) -> Result<Vec<u8>> {
        let what = layer.digest.to_string();
        if layer.size > len_max {
            return Err(self.error(Kind::Corrupt, &what, format!("has {} bytes, at most {len_max} are expected", layer.size)));
        }
        let mut attempt = 1;
        loop {
            let received = async {
                let response = self.blob_response(&layer.digest, 0).await?;
                holder::body(response, &format!("{}@{what}", self.place()), layer.size, "REMOTE_ANSWER").await
            };
            let late = || self.error(Kind::Timeout, &what, format!("has not arrived within {} s", PATIENCE.as_secs()));
            match tokio::time::timeout(PATIENCE, received).await.unwrap_or_else(|_| Err(late())) {
                Ok(bytes) if Digest::of(&bytes) == layer.digest => return Ok(bytes),
                Ok(bytes) => {
                    let message = format!("what arrives has {} bytes and digest {}", bytes.len(), Digest::of(&bytes));
                    return Err(self.error(Kind::Corrupt, &what, message).with_reason("DIGEST_MISMATCH"));
                }
                Err(error) if attempt < ATTEMPTS && matches!(error.kind(), Kind::Unavailable | Kind::Timeout) => self.pause(attempt).await,
                Err(error) => return Err(error),
            }
            attempt += 1;
        }
    }

    /// A blob from `offset` on, as it arrives; whoever takes it holds it against its digest.
    pub(super) async fn stream_blob(&self, layer: &Layer, offset: u64) -> Result<BlobStream> {
        let response = self.blob_response(&layer.digest, offset).await?;
        let offset = if response.status() == StatusCode::PARTIAL_CONTENT { offset } else { 0 };
        let place = format!("{}@{}", self.place(), layer.digest);
        let parts = response.bytes_stream().map(move |part| part.map_err(|error| holder::failed(&place, "receive it", error)));
        Ok(BlobStream { size: layer.size, offset, parts: parts.boxed() })
    }

    async fn blob_response(&self, digest: &Digest, offset: u64) -> Result<Response> {
        let url = self.url(&format!("blobs/{digest}"))?;
        let what = digest.to_string();
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if offset > 0 {
            let range = HeaderValue::from_str(&format!("bytes={offset}-"));
            headers.insert(header::RANGE, range.map_err(|error| Error::internal(Stage::Golden, what.clone(), "a range").with_source(error))?);
        }
        let fits = [
            StatusCode::OK,
            StatusCode::PARTIAL_CONTENT,
            StatusCode::MOVED_PERMANENTLY,
            StatusCode::FOUND,
            StatusCode::SEE_OTHER,
            StatusCode::TEMPORARY_REDIRECT,
            StatusCode::PERMANENT_REDIRECT,
        ];
        // Without a limit of time for the body here: a tarball may take long, and a chunk is bounded by whoever reads it.
        let response = self.ask(Action::Pull, &what, &fits, |client| client.get(url.clone()).headers(headers.clone())).await?;
        if !response.status().is_redirection() {
            return Ok(response);
        }
        // Where the storage behind it is. Nothing that says who we are goes along.
        let response = self.fetcher.follow(response, url, &headers, PATIENCE).await?;
        if response.status().is_success() { Ok(response) } else { Err(self.unexpected(&what, response).await) }
    }

    /// Puts bytes there unless they are; `true` when they were sent.
    pub(super) async fn push_bytes(&self, bytes: Vec<u8>) -> Result<(Layer, bool)> {
        let layer = Layer { digest: Digest::of(&bytes), size: bytes.len() as u64 };
        if self.has_blob(&layer).await? {
            return Ok((layer, false));
        }
        let body = bytes::Bytes::from(bytes);
        self.upload(&layer, PATIENCE, || Ok(Body::from(body.clone()))).await?;
        Ok((layer, true))
    }

    /// The same for a file.
    pub(super) async fn push_file(&self, layer: &Layer, file: Arc<File>) -> Result<bool> {
        if self.has_blob(layer).await? {
            return Ok(false);
        }
        let body = || {
            use std::io::{Seek, SeekFrom};
            let failed = |error| Error::io(Stage::Store, layer.digest.to_string(), "read the tarball", error);
            let mut file = file.try_clone().map_err(failed)?;
            file.seek(SeekFrom::Start(0)).map_err(failed)?;
            Ok(Body::wrap_stream(ReaderStream::with_capacity(tokio::fs::File::from_std(file), READ_LEN)))
        };
        self.upload(layer, UPLOAD_PATIENCE, body).await?;
        Ok(true)
    }

    async fn has_blob(&self, layer: &Layer) -> Result<bool> {
        let url = self.url(&format!("blobs/{}", layer.digest))?;
        let fits = [StatusCode::OK, StatusCode::TEMPORARY_REDIRECT, StatusCode::NOT_FOUND];
        let what = layer.digest.to_string();
        let response = self.ask(Action::Push, &what, &fits, |client| client.head(url.clone())).await?;
        Ok(response.status() != StatusCode::NOT_FOUND)
    }

    /// POST, then PUT: a monolithic upload.
    async fn upload(&self, layer: &Layer, patience: Duration, body: impl Fn() -> Result<Body>) -> Result<()> {
        let what = layer.digest.to_string();
        let begin = self.url("blobs/uploads/")?;
        let mut attempt = 1;
        loop {
            let begun =
                self.ask(Action::Push, &what, &[StatusCode::ACCEPTED], |client| client.post(begin.clone()).header(header::CONTENT_LENGTH, 0)).await?;
            let mut place = self.upload_place(&what, &begin, &begun)?;
            place.query_pairs_mut().append_pair("digest", &what);
            let request = self.client.put(place).timeout(patience);
            let request = request.header(header::CONTENT_TYPE, "application/octet-stream").header(header::CONTENT_LENGTH, layer.size).body(body()?);
            let sent = match self.authorized(Action::Push, request).await.send().await {
                Ok(response) if response.status() == StatusCode::CREATED => return Ok(()),
                Ok(response) => Err(self.unexpected(&what, response).await),
                Err(error) => Err(holder::failed(&format!("{}@{what}", self.place()), "upload it", error)),
            };
            match sent {
                Err(error) if attempt < ATTEMPTS && matches!(error.kind(), Kind::Unavailable | Kind::Timeout) => self.pause(attempt).await,
                done => return done,
            }
            attempt += 1;
        }
    }

    /// Where an upload goes on. Only the registry itself: it is sent what says who we are.
    fn upload_place(&self, what: &str, at: &Url, begun: &Response) -> Result<Url> {
        let location = begun.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
        let place = location.and_then(|location| at.join(location).ok());
        let place = place.ok_or_else(|| self.error(Kind::Corrupt, what, "the registry does not say where an upload goes"))?;
        if place.origin() != self.base.origin() {
            let host = place.host_str().unwrap_or_default().to_owned();
            return Err(self.error(Kind::PermissionDenied, what, format!("the registry wants uploads at {host}, which is not the registry")));
        }
        Ok(place)
    }

    async fn pause(&self, attempt: u32) {
        tokio::time::sleep(PAUSE * 2u32.saturating_pow(attempt - 1)).await;
    }

    async fn authorized(&self, action: Action, request: RequestBuilder) -> RequestBuilder {
        match self.authorizations.lock().await.get(&action) {
            Some(value) => request.header(header::AUTHORIZATION, value.clone()),
            None => request,
        }
    }

    /// Makes a request until its answer has one of the statuses that fit, or can't have it. The body is not awaited.
    async fn ask(&self, action: Action, what: &str, fits: &[StatusCode], make: impl Fn(&Client) -> RequestBuilder) -> Result<Response> {
        let mut attempt = 1;
        loop {
            let error = match self.ask_once(action, what, &make).await {
                Ok(response) if fits.contains(&response.status()) => return Ok(response),
                Ok(response) => self.unexpected(what, response).await,
                Err(error) => error,
            };
            if attempt == ATTEMPTS || !matches!(error.kind(), Kind::Unavailable | Kind::Timeout) {
                return Err(error);
            }
            tracing::debug!(registry = self.name, error = %error.chain(), "asked again");
            self.pause(attempt).await;
            attempt += 1;
        }
    }

    /// One request, made again once when the registry wants to know who asks.
    async fn ask_once(&self, action: Action, what: &str, make: &impl Fn(&Client) -> RequestBuilder) -> Result<Response> {
        let mut is_known = false;
        loop {
            let request = self.authorized(action, make(&self.client)).await;
            let sent = tokio::time::timeout(PATIENCE, request.send()).await;
            let sent = sent.map_err(|_| self.error(Kind::Timeout, what, format!("no answer within {} s", PATIENCE.as_secs())))?;
            let response = sent.map_err(|error| holder::failed(&format!("{}: {what}", self.place()), "ask the registry", error))?;
            if response.status() != StatusCode::UNAUTHORIZED {
                return Ok(response);
            }
            if is_known {
                self.authorizations.lock().await.remove(&action);
                return Err(self.denied("the registry does not take the credentials"));
            }
            is_known = true;
            let value = self.authorization(action, response.headers()).await?;
            self.authorizations.lock().await.insert(action, value);
        }
    }

    fn denied(&self, message: &str) -> Error {
        Error::new(Kind::PermissionDenied, Stage::Golden, self.place(), message).with_reason("REMOTE_AUTH")
    }

    /// What meets a registry's challenge.
    async fn authorization(&self, action: Action, headers: &HeaderMap) -> Result<HeaderValue> {
        if let Some(token) = self.credentials.token().await? {
            return Ok(token);
        }
        let password = self.credentials.password().await?;
        match auth::challenge(headers) {
            Some(Challenge::Basic) => match password {
                Some((username, password)) => auth::basic(&username, &password),
                None => Err(self.denied("the registry wants user and password, none are configured")),
            },
            Some(Challenge::Bearer { realm, service }) => self.fetch_token(action, &realm, service.as_deref(), password).await,
            None => Err(self.denied("the registry wants a kind of credentials that is not supported")),
        }
    }

    async fn fetch_token(&self, action: Action, realm: &str, service: Option<&str>, password: Option<(String, String)>) -> Result<HeaderValue> {
        let mut url = source::parse_url(realm)?;
        let actions = match action {
            Action::Pull => "pull",
            Action::Push => "pull,push",
        };
        url.query_pairs_mut().append_pair("scope", &format!("repository:{}:{actions}", self.repository));
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", service);
        }
        let is_named = url.origin() == self.base.origin() || self.token_server.as_ref().is_some_and(|server| server.origin() == url.origin());
        let request = match (is_named, password) {
            (true, Some((username, password))) => self.client.get(url).header(header::AUTHORIZATION, auth::basic(&username, &password)?),
            (true, None) => self.client.get(url),
            (false, None) => self.fetcher.guarded(&url)?.request(Method::GET, url),
            (false, Some(_)) => {
                let host = url.host_str().unwrap_or_default();
                let error = self.denied(&format!("the registry wants the password to be sent to {host}"));
                return Err(error.with_hint(format!("if that is its token server: token_server = \"{}\"", url.origin().ascii_serialization())));
            }
        };
        let place = format!("{}: token", self.place());
        let response = request.timeout(PATIENCE).send().await.map_err(|error| holder::failed(&place, "ask the token server", error))?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(self.denied("the token server does not take the credentials")),
            _ => return Err(self.unexpected("token", response).await),
        }
        let bytes = holder::body(response, &place, ERROR_LEN_MAX, "REMOTE_ANSWER").await?;
        let token = serde_json::from_slice::<TokenAnswer>(&bytes).ok().and_then(TokenAnswer::token);
        auth::bearer(&token.ok_or_else(|| self.denied("the token server's answer has no token"))?)
    }

    /// The error that an answer is.
    async fn unexpected(&self, what: &str, response: Response) -> Error {
        let status = response.status();
        let kind = match status.as_u16() {
            404 | 410 => Kind::NotFound,
            401 | 403 | 407 => Kind::PermissionDenied,
            413 | 507 => Kind::NoSpace,
            408 | 425 | 429 | 500..=599 => Kind::Unavailable,
            _ => Kind::Corrupt,
        };
        let reason = match kind {
            Kind::NotFound => "REMOTE_NOT_FOUND",
            Kind::PermissionDenied => "REMOTE_AUTH",
            _ => "REMOTE_ANSWER",
        };
        let codes = match tokio::time::timeout(PATIENCE, holder::body(response, "", ERROR_LEN_MAX, reason)).await {
            Ok(Ok(bytes)) => error_codes(&bytes),
            _ => String::new(),
        };
        self.error(kind, what, format!("the registry answers {status}{codes}")).with_reason(reason)
    }
}

/// The codes of an error's document (distribution specification, "error codes"): stable words, unlike its messages, which may be anything.
fn error_codes(bytes: &[u8]) -> String {
    let document: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
    let errors = document["errors"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is_code = |code: &&str| code.len() <= 40 && code.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_');
    let codes: Vec<&str> = errors.iter().filter_map(|error| error["code"].as_str()).filter(is_code).take(3).collect();
    if codes.is_empty() { String::new() } else { format!(" ({})", codes.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_codes_of_an_errors_document_are_shown() {
        assert_eq!(error_codes(br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"\u001b[31mx"},{"code":"x y"}]}"#), " (MANIFEST_UNKNOWN)");
        for none in [&b"<html>"[..], b"{}", b"{\"errors\":3}", b""] {
            assert_eq!(error_codes(none), "");
        }
    }
}
