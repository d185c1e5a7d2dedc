//! The published tree over HTTP: read-only files with ranges, for clients of simplestreams and for other hosts.
//!
//! `GET` and `HEAD` of regular files below the directory; no listings, no names that begin with a dot, no way out of the directory. Plain HTTP: documents
//! are signed and items have digests, and who wants TLS puts a web server in front.

use std::{
    io::SeekFrom,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use tokio::{
    io::{AsyncReadExt, AsyncSeekExt},
    net::TcpListener,
    sync::Semaphore,
};
use tokio_util::io::ReaderStream;

use crate::{
    error::{Error, Result, Stage},
    names::Digest,
    render::{Engine, blocking},
};

/// Transfers at the same time; more are asked to come back.
const TRANSFERS_MAX: usize = 256;
/// Bytes read at once.
const CHUNK_LEN: usize = 256 * 1024;
/// Where blobs are.
const BLOBS: &str = "/blobs/sha256/";
/// Bytes of a path.
const PATH_LEN_MAX: usize = 4096;

struct Served {
    root: PathBuf,
    /// Whose blobs are served, if they are.
    blobs: Option<Arc<Engine>>,
    permits: Arc<Semaphore>,
}

/// Binds the address.
pub async fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| Error::io(Stage::Config, address.to_string(), "listen for readers of the published tree", error))
}

/// Serves the directory `root` until `stop` is ready, and the blobs of an engine.
pub async fn serve(listener: TcpListener, root: PathBuf, blobs: Option<Arc<Engine>>, stop: impl Future<Output = ()> + Send + 'static) {
    let served = Arc::new(Served { root, blobs, permits: Arc::new(Semaphore::new(TRANSFERS_MAX)) });
    let router = Router::new().fallback(answer).with_state(served);
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stop).await {
        tracing::error!(%error, "serving the published tree ended");
    }
}

async fn answer(State(served): State<Arc<Served>>, method: Method, uri: Uri, headers: HeaderMap) -> Response {
    if method != Method::GET && method != Method::HEAD {
        return (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "GET, HEAD")]).into_response();
    }
    let Ok(permit) = Arc::clone(&served.permits).try_acquire_owned() else {
        return (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "5")]).into_response();
    };
    let (root, relative) = match (uri.path().strip_prefix(BLOBS), &served.blobs) {
        (Some(hex), Some(engine)) => match blob(engine, hex).await {
            Ok(Some(path)) => path,
            Ok(None) => return StatusCode::NOT_FOUND.into_response(),
            Err(error) => {
                tracing::warn!(hex, error = %error.chain(), "a blob that was asked for could not be fetched");
                return (StatusCode::BAD_GATEWAY, [(header::RETRY_AFTER, "30")]).into_response();
            }
        },
        _ => match relative(uri.path()) {
            Some(relative) => (served.root.clone(), relative),
            None => return StatusCode::NOT_FOUND.into_response(),
        },
    };
    let found = tokio::task::spawn_blocking(move || open(&root, &relative)).await;
    let Ok(Some((file, len, media_type))) = found else { return StatusCode::NOT_FOUND.into_response() };
    let range = match headers.get(header::RANGE).map(|range| range.to_str().map(|text| parse_range(text, len))) {
        None | Some(Err(_) | Ok(Range::Whole)) => None,
        Some(Ok(Range::Part(first, last))) => Some((first, last)),
        Some(Ok(Range::Unsatisfiable)) => {
            return (StatusCode::RANGE_NOT_SATISFIABLE, [(header::CONTENT_RANGE, format!("bytes */{len}"))]).into_response();
        }
    };
    let (first, count) = range.map_or((0, len), |(first, last)| (first, last - first + 1));
    let mut file = tokio::fs::File::from_std(file);
    if first > 0 && file.seek(SeekFrom::Start(first)).await.is_err() {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    let body = if method == Method::HEAD {
        Body::empty()
    } else {
        // The permit goes with the body: it is given back when the transfer ends, however it ends.
        let stream = futures_util::StreamExt::map(ReaderStream::with_capacity(file.take(count), CHUNK_LEN), move |chunk| {
            let _ = &permit;
            chunk
        });
        Body::from_stream(stream)
    };
    let mut response = Response::new(body);
    *response.status_mut() = if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, count.into());
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(media_type));
    headers.insert(header::ACCEPT_RANGES, header::HeaderValue::from_static("bytes"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    if let Some((first, last)) = range
        && let Ok(value) = format!("bytes {first}-{last}/{len}").parse()
    {
        headers.insert(header::CONTENT_RANGE, value);
    }
    response
}

/// A blob's directory and name: of an image that is catalogued here, fetched for whoever asks first. Anything else is not there: this is no open proxy.
async fn blob(engine: &Arc<Engine>, hex: &str) -> Result<Option<(PathBuf, PathBuf)>> {
    let Ok(digest) = format!("sha256:{hex}").parse::<Digest>() else { return Ok(None) };
    let looking = Arc::clone(engine);
    let (here, image) =
        blocking(Stage::Store, move || Ok((looking.store.has_blob(&digest)?, looking.store.catalog.image_of_rootfs(&digest)?))).await?;
    let Some(image) = image else { return Ok(None) };
    if !here {
        engine.fetch_image(&image).await?;
    }
    let path = engine.store.blob_path(&digest);
    Ok(path.parent().map(|dir| (dir.to_owned(), PathBuf::from(digest.hex()))))
}

/// The path below the root that a request means; nothing when it means none.
fn relative(path: &str) -> Option<PathBuf> {
    if path.len() > PATH_LEN_MAX {
        return None;
    }
    let decoded = percent_decoded(path.strip_prefix('/')?)?;
    let text = String::from_utf8(decoded).ok()?;
    // Names that begin with a dot are unfinished, or generations that only the link leads to.
    let fine = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(|c: char| c.is_control() || c == '\\');
    text.split('/').all(fine).then(|| PathBuf::from(text))
}

fn percent_decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digit = |byte: u8| char::from(byte).to_digit(16);
            let value = digit(bytes.next()?)? * 16 + digit(bytes.next()?)?;
            decoded.push(u8::try_from(value).ok()?);
        } else {
            decoded.push(byte);
        }
    }
    Some(decoded)
}

fn open(root: &Path, relative: &Path) -> Option<(std::fs::File, u64, &'static str)> {
    // The one link of the tree leads to its generation; whatever leads elsewhere is not ours.
    let root = root.canonicalize().ok()?;
    let path = root.join(relative).canonicalize().ok()?;
    if !path.starts_with(&root) {
        return None;
    }
    let file = std::fs::File::open(&path).ok()?;
    let metadata = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
    let media_type = match relative.extension().and_then(|extension| extension.to_str()) {
        Some("json") => "application/json",
        Some("sjson") => "text/plain; charset=utf-8",
        _ => "application/octet-stream",
    };
    Some((file, metadata.len(), media_type))
}

#[derive(Debug, PartialEq, Eq)]
enum Range {
    /// No range that this server understands: all of it (RFC 9110, 14.2).
    Whole,
    /// First and last byte.
    Part(u64, u64),
    /// Nothing of it is there.
    Unsatisfiable,
}

fn parse_range(text: &str, len: u64) -> Range {
    let Some((first, last)) = text.trim().strip_prefix("bytes=").and_then(|range| range.split_once('-')) else { return Range::Whole };
    match (first.trim(), last.trim()) {
        ("", suffix) => match suffix.parse::<u64>() {
            Ok(0) => Range::Unsatisfiable,
            Ok(_) if len == 0 => Range::Unsatisfiable,
            Ok(count) => Range::Part(len.saturating_sub(count), len - 1),
            Err(_) => Range::Whole,
        },
        (first, last) => {
            let last = if last.is_empty() { Ok(u64::MAX) } else { last.parse::<u64>() };
            match (first.parse::<u64>(), last) {
                (Ok(first), Ok(last)) if first > last => Range::Whole,
                (Ok(first), Ok(_)) if first >= len => Range::Unsatisfiable,
                (Ok(first), Ok(last)) => Range::Part(first, last.min(len - 1)),
                // Several ranges among them: all of it is a right answer.
                _ => Range::Whole,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_rfc_9110() {
        for (text, want) in [
            ("bytes=0-", Range::Part(0, 99)),
            ("bytes=10-19", Range::Part(10, 19)),
            ("bytes=90-1000", Range::Part(90, 99)),
            ("bytes=-10", Range::Part(90, 99)),
            ("bytes=-1000", Range::Part(0, 99)),
            ("bytes=100-", Range::Unsatisfiable),
            ("bytes=-0", Range::Unsatisfiable),
            ("bytes=5-4", Range::Whole),
            ("bytes=0-1,3-4", Range::Whole),
            ("lines=0-1", Range::Whole),
            ("bytes=x-", Range::Whole),
        ] {
            assert_eq!(parse_range(text, 100), want, "{text}");
        }
        assert_eq!(parse_range("bytes=0-", 0), Range::Unsatisfiable);
    }

    #[test]
    fn paths_stay_in_the_tree() {
        assert_eq!(relative("/streams/v1/index.json"), Some(PathBuf::from("streams/v1/index.json")));
        assert_eq!(relative("/a%3Ab"), Some(PathBuf::from("a:b")));
        for bad in ["/", "", "/..", "/a/../b", "/%2e%2e/x", "/a//b", "/.v1-x/index.json", "/a%00", "/a%zz", "/a%2", "/a\\b", "//etc/passwd"] {
            assert_eq!(relative(bad), None, "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn ranges_lie_in_the_file(text in "bytes=[0-9]{0,22}-[0-9]{0,22}", len in 0u64..1000) {
            if let Range::Part(first, last) = parse_range(&text, len) {
                proptest::prop_assert!(first <= last && last < len);
            }
        }
    }
}
