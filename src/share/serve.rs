//! What other hosts may read.

use std::{fs::File, io::SeekFrom, net::SocketAddr, os::unix::fs::FileExt, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{
    io::{AsyncReadExt, AsyncSeekExt},
    net::TcpListener,
    sync::Semaphore,
};
use tokio_util::io::ReaderStream;

use super::manifest;
use crate::{
    config::Config,
    error::{Error, Kind, Result, Stage},
    names::Digest,
    progress::Progress,
    render::{Engine, blocking},
    server::{
        http::{self, Part, parse_range},
        tls::Certificates,
    },
    share::manifest::{CHUNK_LEN, GoldenManifest},
};

/// Bytes of a blob read at once.
const READ_LEN: usize = 256 * 1024;
/// Goldens read and compressed at the same time: guests need the cores more.
const COMPRESSIONS_MAX: usize = 2;
/// zstd's fastest ordinary level: hosts are near each other.
const ZSTD_LEVEL: i32 = 1;
/// How long a host waits for a blob that is fetched for it, before it is asked to come back; shorter than the patience of a cloudletd that asks.
const PULL_WAIT: Duration = Duration::from_secs(20);
/// When to come back, seconds.
const RETRY_AFTER_SECS: u64 = 5;

struct Shared {
    engine: Arc<Engine>,
    compressions: Semaphore,
}

/// An error as an answer. Other hosts get the reason, the log gets the rest.
struct Refusal(Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self.0.kind() {
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::InvalidRequest => StatusCode::BAD_REQUEST,
            Kind::Busy | Kind::Unavailable | Kind::Timeout | Kind::NoSpace => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        if status.is_server_error() {
            tracing::warn!(error = %self.0.chain(), "another host could not be answered");
        }
        let mut response = (status, format!("{}\n", self.0.reason())).into_response();
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER_SECS.into());
        }
        response
    }
}

/// Binds the address.
pub async fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| Error::io(Stage::Config, address.to_string(), "listen for other hosts", error))
}

/// Serves what `config` says until `stop` is ready; with `share.tls` to clients of `certificates`.
pub fn server<S: Future<Output = ()> + Send>(
    listener: TcpListener,
    engine: &Arc<Engine>,
    config: &Config,
    certificates: Option<&Arc<Certificates>>,
    stop: S,
) -> Result<impl Future<Output = ()> + Send + use<S>> {
    let certificates = certificates.filter(|_| config.share.tls).map(Arc::clone);
    let door = http::Door { allow: config.share.networks()?, certificates, connections_max: config.share.max_connections };
    let shared = Arc::new(Shared { engine: Arc::clone(engine), compressions: Semaphore::new(COMPRESSIONS_MAX) });
    let router = Router::new()
        .route("/v1/blobs/{digest}", get(blob))
        .route("/v1/goldens/{key}/manifest", get(golden_manifest))
        .route("/v1/goldens/{key}/chunks/{index}", get(golden_chunk))
        .with_state(shared);
    Ok(http::serve(listener, door, router, stop))
}

fn not_found(object: impl Into<String>) -> Error {
    Error::new(Kind::NotFound, Stage::Store, object, "is not here").with_reason("NOT_FOUND")
}

/// A golden's key in a path: 64 lower-case hexadecimal digits.
fn key_of(text: &str) -> Result<Digest> {
    format!("sha256:{text}").parse().map_err(|_| not_found("golden"))
}

async fn golden_manifest(State(shared): State<Arc<Shared>>, Path(key): Path<String>) -> Result<Response, Refusal> {
    let bytes = encoded_manifest(&shared, key_of(&key)?).await?;
    let body = axum::body::Bytes::from_owner(SharedBytes(bytes));
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

struct SharedBytes(Arc<Vec<u8>>);

impl AsRef<[u8]> for SharedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

async fn encoded_manifest(shared: &Shared, key: Digest) -> Result<Arc<Vec<u8>>> {
    let engine = &shared.engine;
    // One reads the golden, however many ask.
    let _flight = engine.share.making.enter(&key).await;
    let (finding, known) = (Arc::clone(engine), engine.share.manifest(&key));
    let record = blocking(Stage::Store, move || finding.store.catalog.golden(key)).await?.ok_or_else(|| not_found(key.hex()))?;
    if let Some(bytes) = known {
        return Ok(bytes);
    }
    let _permit = shared.compressions.acquire().await;
    let dir = engine.store.golden_dir(&key);
    let bytes = blocking(Stage::Store, move || super::push::encode(&GoldenManifest::of(&dir, &record)?)).await?;
    let bytes = Arc::new(bytes);
    engine.share.keep_manifest(key, &bytes);
    Ok(bytes)
}

async fn golden_chunk(State(shared): State<Arc<Shared>>, Path((key, index)): Path<(String, u64)>) -> Result<Response, Refusal> {
    let key = key_of(&key)?;
    let _permit = shared.compressions.acquire().await;
    let engine = Arc::clone(&shared.engine);
    let bytes = blocking(Stage::Store, move || {
        let record = engine.store.catalog.golden(key)?.ok_or_else(|| not_found(key.hex()))?;
        let len = manifest::chunk_len(record.spec.size_bytes, index);
        if len == 0 {
            return Err(not_found(format!("{} chunk {index}", key.hex())));
        }
        let path = engine.store.golden_dir(&key).join("disk.raw");
        let failed = |doing: &'static str| move |error| Error::io(Stage::Store, key.hex(), doing, error);
        let mut buffer = vec![0; usize::try_from(len).unwrap_or_default()];
        let disk = File::open(&path).map_err(failed("open the golden disk"))?;
        disk.read_exact_at(&mut buffer, index * CHUNK_LEN).map_err(failed("read the golden disk"))?;
        zstd::bulk::compress(&buffer, ZSTD_LEVEL).map_err(failed("compress a chunk"))
    })
    .await?;
    Ok(([(header::CONTENT_TYPE, "application/zstd")], bytes).into_response())
}

async fn blob(State(shared): State<Arc<Shared>>, Path(digest): Path<String>, headers: HeaderMap) -> Result<Response, Refusal> {
    let digest: Digest = digest.parse().map_err(|_| not_found("blob"))?;
    let tag = format!("\"{digest}\"");
    let (file, len) = match open_blob(&shared.engine, digest).await? {
        Some(opened) => opened,
        None => {
            pull_through(&shared.engine, digest).await?;
            open_blob(&shared.engine, digest).await?.ok_or_else(|| not_found(digest.to_string()))?
        }
    };
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let names_it = |list: &str| list.split(',').any(|other| matches!(other.trim(), "*") || other.trim() == tag);
    let mut response = if text(header::IF_NONE_MATCH).is_some_and(names_it) {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        // A part of something else than the client has is of no use: it gets all of it (RFC 9110, 13.1.5).
        let range = text(header::RANGE).filter(|_| text(header::IF_RANGE).is_none_or(|condition| condition == tag));
        part_of(file, len, range.map_or(Part::Whole, |range| parse_range(range, len))).await?
    };
    let headers = response.headers_mut();
    headers.insert(header::ETAG, HeaderValue::from_str(&tag).map_err(|error| Error::internal(Stage::Store, tag, "is no tag").with_source(error))?);
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("public, max-age=31536000, immutable"));
    Ok(response)
}

async fn part_of(file: File, len: u64, part: Part) -> Result<Response> {
    let (first, count) = match part {
        Part::Whole => (0, len),
        Part::Bytes { first, last } => (first, last - first + 1),
        Part::None => {
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, [(header::CONTENT_RANGE, format!("bytes */{len}"))]).into_response());
        }
    };
    let mut file = tokio::fs::File::from_std(file);
    file.seek(SeekFrom::Start(first)).await.map_err(|error| Error::io(Stage::Store, "blob", "seek", error))?;
    let body = Body::from_stream(ReaderStream::with_capacity(file.take(count), READ_LEN));
    let mut response =
        ([(header::CONTENT_LENGTH, count.to_string()), (header::CONTENT_TYPE, "application/octet-stream".into())], body).into_response();
    if let Part::Bytes { first, last } = part {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let range = HeaderValue::from_str(&format!("bytes {first}-{last}/{len}"));
        let range = range.map_err(|error| Error::internal(Stage::Store, "range", "is no header").with_source(error))?;
        response.headers_mut().insert(header::CONTENT_RANGE, range);
    }
    Ok(response)
}

async fn open_blob(engine: &Arc<Engine>, digest: Digest) -> Result<Option<(File, u64)>> {
    let engine = Arc::clone(engine);
    blocking(Stage::Store, move || {
        if !engine.store.has_blob(&digest)? {
            return Ok(None);
        }
        let failed = |doing: &'static str| move |error| Error::io(Stage::Store, digest.to_string(), doing, error);
        let file = File::open(engine.store.blob_path(&digest)).map_err(failed("open the blob"))?;
        let len = file.metadata().map_err(failed("read its size"))?.len();
        Ok(Some((file, len)))
    })
    .await
}

/// Fetches a blob from this host's own sources. Whoever asks waits a while; the transfer goes on without them.
async fn pull_through(engine: &Arc<Engine>, digest: Digest) -> Result<()> {
    if !engine.config.share.pull_through {
        return Err(not_found(digest.to_string()));
    }
    let finding = Arc::clone(engine);
    let image = blocking(Stage::Store, move || finding.store.catalog.image_with_rootfs(digest)).await?;
    let Some(image) = image.filter(|image| image.rootfs_url.is_some()) else { return Err(not_found(digest.to_string())) };
    let come_back = || Error::new(Kind::Unavailable, Stage::Fetch, digest.to_string(), "is being fetched").with_reason("BLOB_ON_ITS_WAY");
    // Nobody waits for a transfer that somebody else began: two hosts that are each other's mirrors would wait for each other.
    if image.rootfs_url.as_ref().is_some_and(|url| engine.fetches.is_busy(url)) {
        return Err(come_back());
    }
    let fetching = Arc::clone(engine);
    let transfer = tokio::spawn(async move {
        let fetched = fetching.download(&image, &Progress::default()).await;
        if let Err(error) = &fetched {
            tracing::warn!(%digest, error = %error.chain(), "a blob that another host asked for could not be fetched");
        }
        fetched.map(drop)
    });
    match tokio::time::timeout(PULL_WAIT, transfer).await {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => Err(Error::internal(Stage::Fetch, digest.to_string(), "the transfer panicked").with_source(error)),
        Err(_) => Err(come_back()),
    }
}
