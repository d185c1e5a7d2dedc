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
    server::http::{self, Part, parse_range},
};

/// Transfers at the same time; more are asked to come back.
const TRANSFERS_MAX: usize = 256;
/// Connections at the same time; more wait in the backlog of the socket.
const CONNECTIONS_MAX: usize = 2 * TRANSFERS_MAX;
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
    http::serve(listener, http::Door { allow: Vec::new(), certificates: None, connections_max: CONNECTIONS_MAX }, router, stop).await;
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
        None | Some(Err(_) | Ok(Part::Whole)) => None,
        Some(Ok(Part::Bytes { first, last })) => Some((first, last)),
        Some(Ok(Part::None)) => {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_in_the_tree() {
        assert_eq!(relative("/streams/v1/index.json"), Some(PathBuf::from("streams/v1/index.json")));
        assert_eq!(relative("/a%3Ab"), Some(PathBuf::from("a:b")));
        for bad in ["/", "", "/..", "/a/../b", "/%2e%2e/x", "/a//b", "/.v1-x/index.json", "/a%00", "/a%zz", "/a%2", "/a\\b", "//etc/passwd"] {
            assert_eq!(relative(bad), None, "{bad}");
        }
    }
}
