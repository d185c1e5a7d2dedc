//! Golden images and tarballs in a bucket of an object storage that speaks S3.
//!
//! ```text
//! PREFIX/goldens/KEY.json         the manifest (share::manifest), put last: what has one is whole
//! PREFIX/chunks/BLAKE3.zst        a chunk, one zstd frame, named by the hash of what is in it: goldens share them
//! PREFIX/rootfs/HEX               a tarball, named by its SHA-256
//! ```
//!
//! Everything but a golden's manifest is named by its content, so nothing is ever overwritten by something else, and what a bucket gives is held against its name.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, future::BoxFuture};
use object_store::{
    ClientOptions, CredentialProvider, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder, AwsCredential},
    client::{HttpClient, HttpConnector},
    path::Path,
};

use super::{
    holder::{self, Holder, Offer, Wanted},
    manifest::{CHUNK_LEN, COMPRESSED_SLACK, Chunk, MANIFEST_LEN_MAX},
    remote::{BlobStream, Placed},
};
use crate::{
    config::remote,
    error::{Error, Kind, Result, Stage},
    names::Digest,
};

/// Bytes of a part of a large upload: S3 takes ten thousand parts, so 160 GiB.
const PART_LEN: usize = 16 << 20;
/// For one object that is held in memory: 16 MiB at some 150 KB/s.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a request is made again after it failed.
const RETRY_TIME: Duration = Duration::from_secs(60);
const RETRIES: usize = 4;
/// Largest file of credentials, bytes.
const CREDENTIALS_LEN_MAX: u64 = 64 * 1024;

/// A bucket.
pub struct Bucket {
    name: String,
    bucket: String,
    prefix: String,
    store: AmazonS3,
}

/// Our own client: no redirects, no proxies of the environment.
#[derive(Debug)]
struct Connector(reqwest::Client);

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.0.clone()))
    }
}

/// Reads the file each time, so that keys can be changed.
#[derive(Debug)]
struct CredentialsFile(PathBuf);

#[tonic::async_trait]
impl CredentialProvider for CredentialsFile {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let path = self.0.clone();
        let read = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            File::open(&path)?.take(CREDENTIALS_LEN_MAX).read_to_string(&mut text)?;
            parse_credentials(&text).ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidData, "has no keys in [default]"))
        });
        let failed = |source: std::io::Error| {
            let object = self.0.display().to_string();
            object_store::Error::Generic { store: "S3", source: Box::new(Error::io(Stage::Golden, object, "read the credentials", source)) }
        };
        let read = read.await.map_err(|error| failed(std::io::Error::other(error)))?;
        read.map(Arc::new).map_err(failed)
    }
}

/// The section `[default]` of an INI file as AWS' tools have it; keys before any section count as well.
fn parse_credentials(text: &str) -> Option<AwsCredential> {
    let mut is_default = true;
    let (mut id, mut secret, mut token) = (None, None, None);
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';'])) {
        if let Some(section) = line.strip_prefix('[') {
            is_default = section.trim_end_matches(']').trim() == "default";
        } else if let Some((key, value)) = line.split_once('=').filter(|_| is_default) {
            let value = Some(value.trim().to_owned());
            match key.trim().to_ascii_lowercase().as_str() {
                "aws_access_key_id" => id = value,
                "aws_secret_access_key" => secret = value,
                "aws_session_token" => token = value,
                _ => {}
            }
        }
    }
    Some(AwsCredential { key_id: id?, secret_key: secret?, token })
}

impl Bucket {
    /// Reads the certificates; nothing is asked yet.
    pub fn new(config: &remote::Bucket) -> Result<Bucket> {
        let wrong = |error| Error::new(Kind::InvalidRequest, Stage::Config, config.name.clone(), "share.bucket does not fit").with_source(error);
        let is_http = config.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http:"));
        let client = holder::client(&config.name, !is_http, config.ca.as_deref(), None)?;
        let retry = RetryConfig { max_retries: RETRIES, retry_timeout: RETRY_TIME, ..RetryConfig::default() };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&config.bucket)
            .with_region(&config.region)
            .with_allow_http(is_http)
            .with_virtual_hosted_style_request(config.virtual_hosted)
            .with_retry(retry)
            .with_http_connector(Connector(client));
        if let Some(endpoint) = &config.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/'));
        }
        builder = match &config.credentials_file {
            Some(path) => builder.with_credentials(Arc::new(CredentialsFile(path.clone()))),
            None => builder.with_skip_signature(true),
        };
        let store = builder.build().map_err(wrong)?;
        Ok(Bucket { name: config.name.clone(), bucket: config.bucket.clone(), prefix: config.prefix.clone(), store })
    }

    fn path(&self, rest: String) -> Path {
        Path::from(if self.prefix.is_empty() { rest } else { format!("{}/{rest}", self.prefix) })
    }

    fn shown(&self, path: &Path) -> String {
        format!("s3://{}/{path}", self.bucket)
    }

    fn golden(&self, key: &Digest) -> Path {
        self.path(format!("goldens/{}.json", key.hex()))
    }

    fn chunk_path(&self, chunk: &Chunk) -> Path {
        self.path(format!("chunks/{}.zst", chunk.blake3))
    }

    fn rootfs_path(&self, digest: &Digest) -> Path {
        self.path(format!("rootfs/{}", digest.hex()))
    }

    fn failed(&self, path: &Path, doing: &str, error: object_store::Error) -> Error {
        use object_store::Error as Failure;
        let (kind, reason) = match &error {
            Failure::NotFound { .. } => (Kind::NotFound, "REMOTE_NOT_FOUND"),
            Failure::PermissionDenied { .. } | Failure::Unauthenticated { .. } => (Kind::PermissionDenied, "REMOTE_AUTH"),
            _ => (Kind::Unavailable, "REMOTE_ANSWER"),
        };
        Error::new(kind, Stage::Golden, self.shown(path), doing).with_reason(reason).with_source(error)
    }

    async fn in_time<T>(&self, path: &Path, doing: &str, work: impl Future<Output = object_store::Result<T>>) -> Result<T> {
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(done) => done.map_err(|error| self.failed(path, doing, error)),
            Err(_) => Err(Error::new(Kind::Timeout, Stage::Golden, self.shown(path), format!("{doing}: no end within {} s", PATIENCE.as_secs()))),
        }
    }

    async fn is_there(&self, path: &Path) -> Result<bool> {
        match self.in_time(path, "look for it", self.store.head(path)).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == Kind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn get(&self, path: &Path, len_max: u64) -> Result<Vec<u8>> {
        let work = async {
            let result = self.store.get(path).await?;
            let len = result.meta.size;
            if len > len_max {
                return Ok(Err(len));
            }
            result.bytes().await.map(Ok)
        };
        match self.in_time(path, "get it", work).await? {
            Ok(bytes) => Ok(bytes.into()),
            Err(len) => {
                let why = format!("has {len} bytes, at most {len_max} are expected");
                Err(Error::new(Kind::Corrupt, Stage::Golden, self.shown(path), why).with_reason("REMOTE_ANSWER"))
            }
        }
    }

    async fn put(&self, path: &Path, bytes: Vec<u8>) -> Result<()> {
        self.in_time(path, "put it", self.store.put(path, PutPayload::from(bytes))).await.map(drop)
    }

    pub(super) async fn has_chunk(&self, chunk: &Chunk) -> Result<bool> {
        self.is_there(&self.chunk_path(chunk)).await
    }

    pub(super) async fn put_chunk(&self, chunk: &Chunk, frame: Vec<u8>) -> Result<()> {
        self.put(&self.chunk_path(chunk), frame).await
    }

    pub(super) async fn put_golden(&self, key: &Digest, encoded: Vec<u8>) -> Result<Placed> {
        let path = self.golden(key);
        self.put(&path, encoded).await?;
        Ok(Placed { reference: self.shown(&path), digest: None })
    }

    /// Puts a tarball there; `true` when it was sent. What an upload that fails has sent is given up.
    pub(super) async fn put_rootfs(&self, digest: &Digest, file: Arc<File>, size: u64) -> Result<(Placed, bool)> {
        let path = self.rootfs_path(digest);
        let placed = Placed { reference: self.shown(&path), digest: None };
        if self.is_there(&path).await? {
            return Ok((placed, false));
        }
        if size <= PART_LEN as u64 {
            self.put(&path, read_part(&file, 0).await?).await?;
            return Ok((placed, true));
        }
        let mut upload = self.in_time(&path, "begin an upload", self.store.put_multipart(&path)).await?;
        let sent = async {
            let mut offset = 0;
            while offset < size {
                let part = read_part(&file, offset).await?;
                offset += part.len() as u64;
                self.in_time(&path, "put a part of it", upload.put_part(PutPayload::from(part))).await?;
            }
            self.in_time(&path, "end an upload", upload.complete()).await
        };
        if let Err(error) = sent.await {
            return Err(match self.in_time(&path, "give up an upload", upload.abort()).await {
                Ok(()) => error,
                Err(failure) => error.with_cleanup_failure(failure),
            });
        }
        Ok((placed, true))
    }

    pub(super) async fn rootfs(&self, digest: &Digest, offset: u64) -> Result<BlobStream> {
        let path = self.rootfs_path(digest);
        let size = self.in_time(&path, "look for it", self.store.head(&path)).await?.size;
        // What is there already is no shorter: the caller finds out by the digest whether it is right.
        let offset = if offset < size { offset } else { 0 };
        let options = GetOptions { range: (offset > 0).then_some(GetRange::Offset(offset)), ..GetOptions::default() };
        let result = self.in_time(&path, "get it", self.store.get_opts(&path, options)).await?;
        let offset = result.range.start;
        let place = self.shown(&path);
        let parts = result
            .into_stream()
            .map(move |part| part.map_err(|error| Error::new(Kind::Unavailable, Stage::Golden, place.clone(), "receive it").with_source(error)));
        Ok(BlobStream { size, offset, parts: parts.boxed() })
    }
}

/// The next bytes of a file.
async fn read_part(file: &Arc<File>, offset: u64) -> Result<Vec<u8>> {
    let file = Arc::clone(file);
    crate::render::blocking(Stage::Store, move || {
        let failed = |error| Error::io(Stage::Store, "tarball", "read it", error);
        let mut file = &*file;
        file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        let mut part = Vec::new();
        file.take(PART_LEN as u64).read_to_end(&mut part).map_err(failed)?;
        match part.is_empty() {
            true => Err(Error::new(Kind::Corrupt, Stage::Store, "tarball", "is shorter than it was")),
            false => Ok(part),
        }
    })
    .await
}

impl Holder for Bucket {
    fn name(&self) -> &str {
        &self.name
    }

    fn offer<'h>(&'h self, key: &'h Digest) -> BoxFuture<'h, Result<Offer>> {
        Box::pin(async move { Ok(Offer { manifest: self.get(&self.golden(key), MANIFEST_LEN_MAX).await?, layers: Vec::new() }) })
    }

    fn chunk<'h>(&'h self, wanted: Wanted<'h>) -> BoxFuture<'h, Result<Vec<u8>>> {
        Box::pin(async move { self.get(&self.chunk_path(wanted.chunk), CHUNK_LEN + COMPRESSED_SLACK).await })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_read_as_the_tools_of_aws_do() {
        let text =
            "# c\n[other]\naws_access_key_id=x\naws_secret_access_key=y\n[default]\nAWS_ACCESS_KEY_ID = id \naws_secret_access_key=se=cret\n; d\n";
        let found = parse_credentials(text).expect("keys");
        assert_eq!((found.key_id.as_str(), found.secret_key.as_str(), found.token), ("id", "se=cret", None));
        assert_eq!(parse_credentials("aws_access_key_id=a\naws_secret_access_key=b\naws_session_token=c").expect("keys").token.as_deref(), Some("c"));
        for none in ["", "[default]\naws_access_key_id=a", "[other]\naws_access_key_id=a\naws_secret_access_key=b"] {
            assert!(parse_credentials(none).is_none(), "{none}");
        }
    }
}
