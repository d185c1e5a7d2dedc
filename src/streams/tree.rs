//! Reading a source: its index and documents are fetched, verified on the very bytes that are parsed, never older than before, and kept.
//!
//! ```text
//! URL ─ fetch (policy, mirrors, byte cap) ─ clear-signature ─ parse ─ freshness ─▶ STATE_DIR/streams/NAME/HEX.json + row {updated, digest, signer}
//! ```
//!
//! What is kept is the signed payload, not the document around it, and its digest is in the catalogue: reading it again needs no network and no key. All
//! documents of a source are accepted together or not at all.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

use reqwest::Url;

use super::{
    document::{self, Document, Index, Limits, Products, invalid},
    path::StreamPath,
};
use crate::{
    config::{
        Config,
        streams::{SignaturePolicy, StreamConfig},
    },
    error::{Error, Kind, Result, Stage},
    names::Digest,
    progress::Progress,
    render::{Engine, blocking, fetch::fetcher_config, flight::Flights, now_secs},
    source::{Descriptor, Fetcher, Mirror},
    store::catalog::streams::{StreamDocument, check_freshness},
    trust::openpgp::Keyring,
    worker::Launcher,
};

/// Documents of one source: an index of the whole world has a few dozen.
const DOCUMENTS_MAX: usize = 256;
/// Where an index is when the URL names a mirror's root.
const INDEX: &str = "streams/v1/index.json";
/// Datatype of documents that name files to download.
const DOWNLOADS: &str = "image-downloads";

/// What the daemon remembers of its sources while it runs.
#[derive(Default)]
pub struct State {
    /// One synchronisation of a source at a time.
    pub(super) flights: Flights<String>,
    /// One publication at a time.
    pub(super) publishing: std::sync::Mutex<()>,
    /// How the last one of each source ended: when, and why it failed.
    pub(super) ends: std::sync::Mutex<std::collections::HashMap<String, (i64, Option<String>)>>,
}

/// A source of the configuration, ready to be read.
struct Source {
    config: StreamConfig,
    root: Url,
    start: StreamPath,
    fetcher: Fetcher,
    launcher: Launcher,
    keyring: Option<Keyring>,
    limits: Limits,
    tmp: PathBuf,
}

/// A document that was verified.
struct Verified {
    payload: Vec<u8>,
    signer: String,
}

/// A products document, and where it came from.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Its path in the tree.
    pub path: String,
    /// What it says.
    pub products: Products,
}

/// Root of a mirror and the document to begin with, from the URL of the configuration.
pub fn root_of(url: &str) -> Result<(Url, StreamPath)> {
    let wrong = |why: &str| Error::field(Stage::Config, "stream.url", format!("{url:?}: {why}"));
    let mut root = Url::parse(url).map_err(|_| wrong("is not a URL"))?;
    root.set_query(None);
    root.set_fragment(None);
    let path = root.path().to_owned();
    if !path.ends_with(".json") && !path.ends_with(".sjson") {
        return Ok((root, StreamPath::new(INDEX).map_err(|why| wrong(&why))?));
    }
    // Paths of a document are relative to what comes before `streams/`, wherever the document itself is.
    let cut = path.find("/streams/").or_else(|| path.rfind('/')).unwrap_or(0);
    root.set_path(&path[..=cut]);
    let start = StreamPath::new(&path[cut + 1..]).map_err(|why| wrong(&why))?.unsigned();
    Ok((root, start))
}

/// What lets the fetcher ask the sources of the configuration wherever they are: the operator named them.
pub fn mirrors(config: &Config) -> Vec<Mirror> {
    let root = |stream: &StreamConfig| root_of(&stream.url).ok().map(|(root, _)| root.as_str().trim_end_matches('/').to_owned());
    config.streams.iter().filter_map(root).map(|root| Mirror { prefix: root.clone(), replace: vec![root], trusted: true }).collect()
}

impl Source {
    fn open(engine: &Engine, config: StreamConfig) -> Result<Source> {
        let (root, start) = root_of(&config.url)?;
        let mut fetch = fetcher_config(&engine.config);
        fetch.mirrors.extend(mirrors(&engine.config));
        fetch.size_max = config.max_document_size.0;
        let limits = Limits { bytes_max: config.max_document_size.0, ..Limits::default() };
        let keyring = match (config.policy, &config.keyring) {
            (SignaturePolicy::Unsigned, _) => None,
            (SignaturePolicy::Signed, None) => return Err(Error::field(Stage::Config, "stream.keyring", "is required for signed documents")),
            (SignaturePolicy::Signed, Some(path)) => Some(read_keyring(path)?),
        };
        Ok(Source { config, root, start, fetcher: Fetcher::new(fetch)?, launcher: engine.launcher.clone(), keyring, limits, tmp: engine.store.tmp() })
    }

    async fn document(&self, path: &StreamPath) -> Result<Verified> {
        let path = if self.keyring.is_some() { path.signed() } else { path.unsigned() };
        let url = path.below(&self.root)?;
        let partial = self.tmp.join(format!("stream-{}", uuid::Uuid::new_v4().simple()));
        let descriptor = Descriptor { url: url.to_string(), digest: None, size: None };
        let fetched = self.fetcher.fetch(&descriptor, &partial, &Progress::default()).await;
        let opened = partial.clone();
        let file = blocking(Stage::Fetch, move || {
            let file = fs::File::open(&opened).map_err(|error| Error::io(Stage::Fetch, opened.display().to_string(), "open the document", error));
            let _ = fs::remove_file(&opened);
            file
        })
        .await;
        fetched.map_err(|error| match error.reason() {
            "ROOTFS_TOO_LARGE" => Error::new(Kind::NoSpace, Stage::Fetch, url.as_str(), format!("is larger than {}", self.config.max_document_size))
                .with_reason("STREAM_TOO_LARGE")
                .with_hint("see stream.max_document_size"),
            _ => error,
        })?;
        let mut file = file?;
        let (keyring, launcher) = (self.keyring.clone(), self.launcher.clone());
        blocking(Stage::Fetch, move || match keyring {
            None => {
                let mut payload = Vec::new();
                file.read_to_end(&mut payload).map_err(|error| Error::io(Stage::Fetch, url.as_str(), "read the document", error))?;
                Ok(Verified { payload, signer: String::new() })
            }
            Some(keyring) => {
                let signed = launcher.clearsigned(&file, &keyring, url.as_str())?;
                Ok(Verified { payload: signed.payload, signer: signed.signer.key })
            }
        })
        .await
    }

    /// Which documents an index names that are wanted.
    fn wanted(&self, index: &Index) -> Result<Vec<(String, StreamPath)>> {
        for id in &self.config.content {
            if !index.entries.contains_key(id) {
                let known: Vec<&str> = index.entries.keys().take(20).map(String::as_str).collect();
                let why = format!("its index has no content {id}; there are: {}", known.join(", "));
                return Err(
                    Error::new(Kind::NotFound, Stage::Fetch, format!("stream {}", self.config.name), why).with_reason("STREAM_CONTENT_NOT_FOUND")
                );
            }
        }
        let is_wanted = |id: &str, entry: &document::IndexEntry| {
            if self.config.content.is_empty() { entry.datatype == DOWNLOADS } else { self.config.content.iter().any(|wanted| wanted == id) }
        };
        let wanted: Vec<_> = index
            .entries
            .iter()
            .filter(|(id, entry)| is_wanted(id, entry) && entry.format == "products:1.0")
            .map(|(id, entry)| (id.clone(), entry.path.clone()))
            .collect();
        if wanted.len() > DOCUMENTS_MAX {
            return Err(invalid(format!("the index names {} documents, the limit is {DOCUMENTS_MAX}; name some in stream.content", wanted.len())));
        }
        Ok(wanted)
    }

    fn check_age(&self, what: &str, updated: Option<i64>, now: i64) -> Result<()> {
        let Some(max) = self.config.max_age_secs.and_then(|secs| i64::try_from(secs).ok()) else { return Ok(()) };
        let why = match updated {
            Some(updated) if now.saturating_sub(updated) <= max => return Ok(()),
            Some(updated) => format!("is of {}, which is more than {max} seconds ago", super::date::format(updated)),
            None => "does not say when it was updated, and stream.max_age_secs is set".to_owned(),
        };
        Err(Error::new(Kind::Conflict, Stage::Fetch, format!("stream {}: {what}", self.config.name), why).with_reason("STREAM_STALE"))
    }

    /// The document, and what reading it gives.
    async fn parsed<T: Send + 'static>(
        &self,
        document: Verified,
        parse: impl FnOnce(&Launcher, &[u8], &Limits) -> Result<T> + Send + 'static,
    ) -> Result<(Verified, Result<T>)> {
        let (launcher, limits) = (self.launcher.clone(), self.limits);
        blocking(Stage::Fetch, move || {
            let parsed = parse(&launcher, &document.payload, &limits);
            Ok((document, parsed))
        })
        .await
    }

    /// Reads everything that is wanted: what to keep, by path, with its row.
    async fn read(&self, before: &[StreamDocument], now: i64) -> Result<Vec<(StreamDocument, Option<Vec<u8>>)>> {
        let mut read = Vec::new();
        let first = self.document(&self.start).await?;
        let (first, document) = self.parsed(first, |launcher, bytes, limits| launcher.stream_document(bytes, limits)).await?;
        let mut wanted = Vec::new();
        match document? {
            Document::Index(index) => {
                self.check_age(self.start.as_str(), index.updated, now)?;
                wanted = self.wanted(&index)?;
                read.push((row(&self.start, index.updated, &first, now), None));
            }
            Document::Products(products) => {
                self.check_age(self.start.as_str(), products.updated, now)?;
                let row = row(&self.start, products.updated, &first, now);
                read.push((row, Some(first.payload)));
            }
        }
        for (id, path) in wanted {
            let document = self.document(&path).await?;
            let (document, products) = self.parsed(document, |launcher, bytes, limits| launcher.stream_products(bytes, limits)).await?;
            let products = products
                .map_err(|error| Error::new(error.kind(), Stage::Fetch, path.as_str(), error.message().to_owned()).with_reason(error.reason()))?;
            // Otherwise one signed document could be served in the place of another.
            if products.content_id != id && (self.keyring.is_some() || !products.content_id.is_empty()) {
                return Err(invalid(format!("{path} is about {:?}, the index says {id:?}", products.content_id)));
            }
            self.check_age(path.as_str(), products.updated, now)?;
            let row = row(&path.unsigned(), products.updated, &document, now);
            read.push((row, Some(document.payload)));
        }
        for (row, _) in &read {
            let known = before.iter().find(|known| known.path == row.path).and_then(|known| known.updated);
            check_freshness(self.config.name.as_str(), row, known)?;
        }
        Ok(read)
    }
}

fn row(path: &StreamPath, updated: Option<i64>, document: &Verified, now: i64) -> StreamDocument {
    let digest = Digest::of(&document.payload).to_string();
    StreamDocument { path: path.to_string(), updated, digest, signer: document.signer.clone(), checked: now }
}

fn read_keyring(path: &Path) -> Result<Keyring> {
    let object = path.display().to_string();
    let bytes = fs::read(path).map_err(|error| Error::io(Stage::Config, object.clone(), "read the keyring", error))?;
    Keyring::parse(&bytes, &object)
}

impl Engine {
    /// The source with this name. `NotFound` naming the ones there are.
    pub fn stream(&self, name: &str) -> Result<&StreamConfig> {
        self.config.streams.iter().find(|stream| stream.name.as_str() == name).ok_or_else(|| {
            let known: Vec<&str> = self.config.streams.iter().map(|stream| stream.name.as_str()).collect();
            Error::new(Kind::NotFound, Stage::Resolve, name, "there is no such stream")
                .with_reason("STREAM_NOT_FOUND")
                .with_violation("stream", "is not configured")
                .with_hint(format!("configured streams: {}", known.join(", ")))
        })
    }

    fn kept_dir(&self, name: &str) -> PathBuf {
        self.store.dir().join("streams").join(name)
    }

    fn kept_path(&self, name: &str, path: &str) -> PathBuf {
        self.kept_dir(name).join(format!("{}.json", Digest::of(path.as_bytes()).hex()))
    }

    /// Reads a source anew; gives the number of its products documents. On any error what was accepted before stays.
    pub(super) async fn refresh_stream(self: &Arc<Self>, name: &str) -> Result<usize> {
        let config = self.stream(name)?.clone();
        let engine = Arc::clone(self);
        let (source, before) = blocking(Stage::Fetch, move || {
            let before = engine.store.catalog.stream_documents(config.name.as_str())?;
            Ok((Source::open(&engine, config)?, before))
        })
        .await?;
        let read = source.read(&before, now_secs()).await?;
        let (engine, name) = (Arc::clone(self), name.to_owned());
        blocking(Stage::Store, move || engine.keep(&name, read)).await
    }

    fn keep(&self, name: &str, read: Vec<(StreamDocument, Option<Vec<u8>>)>) -> Result<usize> {
        let dir = self.kept_dir(name);
        let failed = |doing: &'static str| {
            let object = dir.display().to_string();
            move |error| Error::io(Stage::Store, object.clone(), doing, error)
        };
        fs::create_dir_all(&dir).map_err(failed("make the stream's directory"))?;
        let mut kept = Vec::new();
        for (row, payload) in &read {
            let Some(payload) = payload else { continue };
            let to = self.kept_path(name, &row.path);
            let staged = to.with_extension("new");
            fs::write(&staged, payload).and_then(|()| fs::File::open(&staged)?.sync_all()).map_err(failed("write a document"))?;
            fs::rename(&staged, &to).map_err(failed("publish a document"))?;
            kept.push(to);
        }
        crate::store::sync_dir(&dir)?;
        self.store.catalog.put_stream_documents(name, read.into_iter().map(|(row, _)| row).collect())?;
        // Documents that the index no longer names; their rows stay, so that they can't come back older.
        for entry in fs::read_dir(&dir).map_err(failed("list the stream's directory"))? {
            let path = entry.map_err(failed("list the stream's directory"))?.path();
            if !kept.contains(&path) {
                fs::remove_file(&path).map_err(failed("remove a document"))?;
            }
        }
        Ok(kept.len())
    }

    /// The documents of a source as they were accepted last; none before the first time. Blocking. `Kind::Corrupt` when a file is not what was accepted.
    pub fn stream_tree(&self, name: &str) -> Result<Vec<Kept>> {
        let config = self.stream(name)?;
        let limits = Limits { bytes_max: config.max_document_size.0, ..Limits::default() };
        let mut documents = Vec::new();
        for row in self.store.catalog.stream_documents(name)? {
            let path = self.kept_path(name, &row.path);
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io(Stage::Store, path.display().to_string(), "read a stream's document", error)),
            };
            if Digest::of(&bytes).to_string() != row.digest {
                return Err(Error::new(Kind::Corrupt, Stage::Store, path.display().to_string(), "is not the document that was accepted")
                    .with_hint("synchronise the stream again"));
            }
            documents.push(Kept { path: row.path, products: self.launcher.stream_products(&bytes, &limits)? });
        }
        Ok(documents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_what_comes_before_streams() {
        for (url, root, start) in [
            ("https://cloud-images.ubuntu.com/releases/streams/v1/index.sjson", "https://cloud-images.ubuntu.com/releases/", "streams/v1/index.json"),
            ("https://images.linuxcontainers.org", "https://images.linuxcontainers.org/", "streams/v1/index.json"),
            ("https://images.linuxcontainers.org/", "https://images.linuxcontainers.org/", "streams/v1/index.json"),
            ("https://a.example/m/streams/v1/images.json", "https://a.example/m/", "streams/v1/images.json"),
            ("https://a.example/x/products.json", "https://a.example/x/", "products.json"),
        ] {
            let (found, path) = root_of(url).expect(url);
            assert_eq!((found.as_str(), path.as_str()), (root, start), "{url}");
        }
    }
}
