//! The host's named images as a simplestreams tree that any web server can serve.
//!
//! ```text
//! DIRECTORY/
//!   images/HEX.root.tar.zst          root filesystems and manifests by digest; never changed, removed one generation after the last mention
//!   streams/v1 ─▶ .v1-UUID/          one generation of documents; the link is swapped, so that readers see all of it or none
//!     index.json   index.sjson
//!     CONTENT.json CONTENT.sjson     images
//!     PLATFORMS.json …               instance types
//!     .content                       a digest of what is said, times left out, and of who signed
//! ```
//!
//! Lists are published as lists, and as comma strings beside them: simplestreams' own tools drop fields that are lists.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::{Value, json};

use super::{Limits, Products, date, platforms, signing::Signer};
use crate::{
    config::streams::Publish,
    error::{Error, Kind, Result, Stage},
    matching,
    names::Digest,
    render::{Engine, now_secs},
    store::{catalog::names::VersionRow, records::ImageRecord, sync_dir},
    tree::decompress::{Compression, DETECT_LEN},
};

/// What was published.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Published {
    /// The directory.
    pub directory: PathBuf,
    /// Products in it.
    pub products: usize,
    /// Versions of them.
    pub versions: usize,
    /// Instance types in it.
    pub platforms: usize,
    /// Fingerprint of the key that signed; empty when none did.
    pub signer: String,
    /// Images that are not in it, and why.
    pub skipped: Vec<(String, String)>,
}

/// A file of the tree, and where its bytes are.
enum Source {
    Blob(Digest),
    Bytes(Vec<u8>),
}

/// Everything of one generation.
#[derive(Default)]
struct Plan {
    products: BTreeMap<String, Value>,
    files: BTreeMap<String, Source>,
    versions: usize,
    skipped: Vec<(String, String)>,
}

/// The file of a generation that says what it consists of.
const CONTENT_FILE: &str = ".content";

impl Engine {
    /// Publishes what [`Engine::publish_images`] would, unless the generation that readers see says the same. Blocking.
    pub fn publish_changes(self: &Arc<Self>) -> Result<Option<Published>> {
        self.publish_tree(true)
    }

    /// Publishes every named image whose bytes are here and which is not deprecated. Blocking. `Kind::Unsupported` (`NOT_PUBLISHING`) without
    /// `publish.directory`. Readers see the tree of before or the new one.
    pub fn publish_images(self: &Arc<Self>) -> Result<Published> {
        self.publish_tree(false)?.ok_or_else(|| Error::internal(Stage::Report, "publish", "nothing was published"))
    }

    fn publish_tree(self: &Arc<Self>, only_changes: bool) -> Result<Option<Published>> {
        let config = self.config.publish.clone();
        let directory = config.directory.clone().ok_or_else(|| {
            Error::new(Kind::Unsupported, Stage::Report, "publish.directory", "is not configured: nothing is published").with_reason("NOT_PUBLISHING")
        })?;
        let _one = self.streams.publishing.lock().map_err(|_| Error::internal(Stage::Report, "publish", "publishing panicked before"))?;
        let signer = config.secret_key.as_deref().map(Signer::read).transpose()?;
        let plan = self.plan_publication(&config)?;
        let now = now_secs();
        let offered = self.instance_types()?;
        let prefix = prefix_of(&config.content_id);
        let platforms_id = format!("{prefix}:platforms");
        let documents_at = |now: i64| {
            let images = json!({
                "format": "products:1.0", "content_id": config.content_id, "datatype": "image-downloads", "updated": date::format(now), "products": plan.products,
            });
            let mut documents = vec![(config.content_id.clone(), images)];
            if !offered.is_empty() {
                documents.push((platforms_id.clone(), platforms::document(&platforms_id, &offered, now)));
            }
            documents
        };
        let documents = documents_at(now);
        let tree = Tree { directory: &directory, signer: signer.as_ref() };
        tree.prepare()?;
        // Told apart without the time, or every look would find a change.
        let content = format!("{:?} {:?}", documents_at(0), signer.as_ref().map(Signer::fingerprint));
        let content = format!("{}\n", Digest::of(content.as_bytes()));
        if only_changes && tree.has(&content, &documents, plan.files.keys()) {
            return Ok(None);
        }
        for (name, source) in &plan.files {
            match source {
                Source::Blob(digest) => tree.link(&self.blob_file(digest), name)?,
                Source::Bytes(bytes) => tree.write(name, bytes)?,
            }
        }
        tree.swap(&documents, &content, now)?;
        let signer = signer.as_ref().map(Signer::fingerprint).unwrap_or_default();
        tracing::info!(directory = %directory.display(), products = plan.products.len(), versions = plan.versions, signer, "images published");
        let (products, platforms) = (plan.products.len(), offered.len());
        Ok(Some(Published { products, versions: plan.versions, platforms, signer, skipped: plan.skipped, directory }))
    }

    fn blob_file(&self, digest: &Digest) -> PathBuf {
        self.store.blob_path(digest)
    }

    fn plan_publication(self: &Arc<Self>, config: &Publish) -> Result<Plan> {
        let mut plan = Plan::default();
        let mut aliases: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (alias, name) in self.store.catalog.aliases()? {
            aliases.entry(name).or_default().push(alias);
        }
        let platforms = self.instance_types()?;
        for row in self.store.catalog.versions(None)? {
            let what = format!("{}@{}", row.name, row.version);
            if row.deprecated {
                plan.skipped.push((what, "is deprecated".into()));
                continue;
            }
            let Some(record) = self.store.catalog.image(&row.image_id)? else { continue };
            let (digest, size) = match (record.rootfs_digest, record.rootfs_size) {
                (Some(digest), Some(size)) if self.store.has_blob(&digest)? => (digest, size),
                _ => {
                    plan.skipped.push((what, "its root filesystem is not on this host".into()));
                    continue;
                }
            };
            let manifest = self.manifest_of(&record)?;
            let items = self.published_items(&record, digest, size, &mut plan)?;
            let arch = manifest.arch().unwrap_or(std::env::consts::ARCH).to_owned();
            let image = matching::Image::of_manifest(&row.name, &manifest);
            let subject = matching::Subject::Catalogued(Box::new(self.image(&record.id)?));
            let answers = self.answers(&subject, &platforms, &matching::Container::ALL)?;
            let product = plan
                .products
                .entry(format!("{}:{}:{arch}", prefix_of(&config.content_id), row.name))
                .or_insert_with(|| product(&row, &arch, aliases.get(&row.name).map(Vec::as_slice).unwrap_or_default(), &image, &answers));
            product["versions"][&row.version] = json!({"image_id": record.id, "pubname": what, "items": items});
            plan.versions += 1;
        }
        Ok(plan)
    }

    /// The items of a version, their files added to the plan.
    fn published_items(&self, record: &ImageRecord, digest: Digest, size: u64, plan: &mut Plan) -> Result<Value> {
        let ftype = match self.compression(record, &digest)? {
            Compression::None => "root.tar",
            Compression::Gzip => "root.tar.gz",
            Compression::Xz => "root.tar.xz",
            Compression::Zstd => "root.tar.zst",
            Compression::Bzip2 => "root.tar.bz2",
            Compression::Squashfs => "squashfs",
        };
        let manifest = record.manifest.clone().into_bytes();
        let of_manifest = Digest::of(&manifest);
        let (root_path, manifest_path) = (format!("images/{}.{ftype}", digest.hex()), format!("images/{}.manifest.json", of_manifest.hex()));
        let items = json!({
            ftype: {"ftype": ftype, "path": root_path, "sha256": digest.hex(), "size": size},
            "manifest.json": {"ftype": "cloudlet.manifest", "path": manifest_path, "sha256": of_manifest.hex(), "size": manifest.len()},
        });
        plan.files.insert(root_path, Source::Blob(digest));
        plan.files.insert(manifest_path, Source::Bytes(manifest));
        Ok(items)
    }

    fn compression(&self, record: &ImageRecord, digest: &Digest) -> Result<Compression> {
        if let Some(compression) = record.media_type.as_deref().and_then(Compression::from_media_type) {
            return Ok(compression);
        }
        let path = self.store.blob_path(digest);
        let mut first = Vec::with_capacity(DETECT_LEN);
        let read = fs::File::open(&path).and_then(|file| std::io::Read::read_to_end(&mut std::io::Read::take(file, DETECT_LEN as u64), &mut first));
        read.map_err(|error| Error::io(Stage::Report, path.display().to_string(), "look at the root filesystem", error))?;
        Compression::detect(&first).ok_or_else(|| {
            Error::new(Kind::Unsupported, Stage::Report, path.display().to_string(), "is not an archive").with_reason("ROOTFS_FORMAT_UNKNOWN")
        })
    }
}

fn prefix_of(content_id: &str) -> &str {
    content_id.split(':').next().unwrap_or(content_id)
}

/// A list, and the comma string of it under the name that old clients know.
pub(super) fn both(fields: &mut Value, list_key: &str, comma_key: &str, list: &[String]) {
    fields[comma_key] = list.join(",").into();
    fields[list_key] = json!(list);
}

fn product(row: &VersionRow, arch: &str, aliases: &[String], image: &matching::Image, answers: &[matching::Answer]) -> Value {
    let (os, release) = row.name.split_once('/').unwrap_or((row.name.as_str(), ""));
    let mut fields = json!({"os": os, "image_name": row.name, "arch": arch, "versions": {}});
    if !release.is_empty() {
        fields["release"] = release.into();
        fields["version"] = release.into();
    }
    both(&mut fields, "alias_list", "aliases", aliases);
    let entry_points: Vec<String> = image.entry_points.iter().map(|entry| entry.name().to_owned()).collect();
    both(&mut fields, "entry_point_list", "entry_points", &entry_points);
    let boots: Vec<&matching::Answer> = answers.iter().filter(|answer| answer.boot.is_empty()).collect();
    let virt: BTreeSet<String> = boots.iter().map(|answer| answer.platform.mode.name().to_owned()).collect();
    both(&mut fields, "virt_list", "virt", &virt.into_iter().collect::<Vec<_>>());
    let names: Vec<String> = boots.iter().map(|answer| answer.platform.name.clone()).collect();
    both(&mut fields, "platform_list", "platforms", &names);
    let kinds: BTreeSet<String> = boots
        .iter()
        .flat_map(|answer| answer.containers.iter().filter(|(_, reasons)| reasons.is_empty()))
        .map(|(kind, _)| kind.name().to_owned())
        .collect();
    both(&mut fields, "container_kinds", "containers", &kinds.into_iter().collect::<Vec<_>>());
    fields
}

struct Tree<'a> {
    directory: &'a Path,
    signer: Option<&'a Signer>,
}

impl Tree<'_> {
    fn failed(&self, doing: &'static str) -> impl Fn(std::io::Error) -> Error {
        let object = self.directory.display().to_string();
        move |error| Error::io(Stage::Report, object.clone(), doing, error)
    }

    fn prepare(&self) -> Result<()> {
        for sub in ["", "images", "streams"] {
            let path = self.directory.join(sub);
            if !path.is_dir() {
                fs::create_dir_all(&path).map_err(self.failed("make the directory"))?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(self.failed("open the directory to readers"))?;
            }
        }
        Ok(())
    }

    /// A file by digest: what is there has the right bytes already.
    fn link(&self, from: &Path, name: &str) -> Result<()> {
        let to = self.directory.join(name);
        match fs::hard_link(from, &to) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            // Another filesystem, or one without links: copied, shared where it can share.
            Err(_) => self.stage(&to, |staged| fs::copy(from, staged).map(drop)),
            Ok(()) => Ok(()),
        }
    }

    /// Whether readers see this content, and every file of it is there.
    fn has<'f>(&self, content: &str, documents: &[(String, Value)], mut files: impl Iterator<Item = &'f String>) -> bool {
        let current = self.directory.join("streams/v1");
        let suffixes: &[&str] = if self.signer.is_some() { &["json", "sjson"] } else { &["json"] };
        let mut names = documents.iter().map(|(content_id, _)| content_id.as_str()).chain(["index"]);
        fs::read_to_string(current.join(CONTENT_FILE)).is_ok_and(|there| there == content)
            && names.all(|name| suffixes.iter().all(|suffix| current.join(format!("{name}.{suffix}")).is_file()))
            && files.all(|name| self.directory.join(name).is_file())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let to = self.directory.join(name);
        if to.exists() { Ok(()) } else { self.stage(&to, |staged| fs::write(staged, bytes)) }
    }

    fn stage(&self, to: &Path, fill: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<()> {
        let staged = self.directory.join("images").join(format!(".new-{}", uuid::Uuid::new_v4().simple()));
        let done = fill(&staged)
            .and_then(|()| fs::set_permissions(&staged, fs::Permissions::from_mode(0o444)))
            .and_then(|()| fs::File::open(&staged)?.sync_all())
            .and_then(|()| fs::rename(&staged, to));
        if done.is_err() {
            let _ = fs::remove_file(&staged);
        }
        done.map_err(self.failed("write a file of the tree"))
    }

    /// Writes one generation of documents and makes it the one that readers see; then removes what only generations before the last one named.
    fn swap(&self, documents: &[(String, Value)], content: &str, now: i64) -> Result<()> {
        let streams = self.directory.join("streams");
        let current = streams.join("v1");
        let before = match fs::read_link(&current) {
            Ok(target) => Some(target),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(_) => {
                let why = "is there and is not a link that cloudletd made; publish to a directory of its own";
                return Err(Error::new(Kind::Conflict, Stage::Report, current.display().to_string(), why).with_reason("PUBLISH_DIRECTORY_TAKEN"));
            }
        };
        let generation = format!(".v1-{}", uuid::Uuid::new_v4().simple());
        let dir = streams.join(&generation);
        fs::create_dir(&dir).and_then(|()| fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))).map_err(self.failed("make a generation"))?;
        for (content_id, document) in documents {
            self.document(&dir, content_id, document)?;
        }
        for (name, suffix) in [("index.json", "json"), ("index.sjson", "sjson")] {
            // The signed index names the signed documents: who starts signed stays signed.
            let index = text_of(&index(documents, suffix, now));
            match (suffix, self.signer) {
                ("json", _) => self.file(&dir.join(name), index.as_bytes())?,
                (_, Some(signer)) => self.file(&dir.join(name), signer.clearsign(&index)?.as_bytes())?,
                (_, None) => {}
            }
        }
        self.file(&dir.join(CONTENT_FILE), content.as_bytes())?;
        sync_dir(&dir)?;
        sync_dir(&self.directory.join("images"))?;
        let link = streams.join(format!(".link-{}", uuid::Uuid::new_v4().simple()));
        symlink(&generation, &link).and_then(|()| fs::rename(&link, &current)).map_err(self.failed("swap the generation"))?;
        sync_dir(&streams)?;
        let keep: Vec<PathBuf> = before.into_iter().map(|target| streams.join(target)).chain([dir]).collect();
        self.prune(&streams, &keep)
    }

    fn document(&self, dir: &Path, content_id: &str, document: &Value) -> Result<()> {
        let text = text_of(document);
        self.file(&dir.join(format!("{content_id}.json")), text.as_bytes())?;
        match self.signer {
            Some(signer) => self.file(&dir.join(format!("{content_id}.sjson")), signer.clearsign(&text)?.as_bytes()),
            None => Ok(()),
        }
    }

    fn file(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        fs::write(path, bytes)
            .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o644)))
            .and_then(|()| fs::File::open(path)?.sync_all())
            .map_err(self.failed("write a document"))
    }

    /// Keeps two generations, so that who read the index a moment ago still finds what it names.
    fn prune(&self, streams: &Path, keep: &[PathBuf]) -> Result<()> {
        let failed = self.failed("remove what is no longer published");
        let list = |dir: &Path| -> std::io::Result<Vec<PathBuf>> { fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.path())).collect() };
        for path in list(streams).map_err(&failed)? {
            let is_generation = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".v1-"));
            if is_generation && !keep.contains(&path) {
                fs::remove_dir_all(&path).map_err(&failed)?;
            }
        }
        let mut named = BTreeSet::new();
        for generation in keep.iter().filter(|path| path.is_dir()) {
            for path in list(generation).map_err(&failed)? {
                let bytes = if path.extension().is_some_and(|extension| extension == "json") { fs::read(&path).map_err(&failed)? } else { continue };
                if let Ok(products) = Products::parse(&bytes, &Limits::default()) {
                    named.extend(products.items().filter_map(|item| item.text("path").map(|path| self.directory.join(&*path))));
                }
            }
        }
        for path in list(&self.directory.join("images")).map_err(&failed)? {
            if !named.contains(&path) {
                fs::remove_file(&path).map_err(&failed)?;
            }
        }
        Ok(())
    }
}

/// Publishes whatever has changed, as often as the configuration says. Never ends; does nothing when it says never.
pub async fn publish_regularly(engine: std::sync::Arc<Engine>) {
    let interval = std::time::Duration::from_secs(engine.config.publish.interval_secs);
    if interval.is_zero() || engine.config.publish.directory.is_none() {
        return;
    }
    loop {
        let publishing = std::sync::Arc::clone(&engine);
        // What was published is logged where it happens.
        if let Err(error) = crate::render::blocking(Stage::Report, move || publishing.publish_changes()).await {
            tracing::warn!(error = %error.chain(), again_secs = interval.as_secs(), "images not published");
        }
        tokio::time::sleep(interval).await;
    }
}

/// A document as it is written: indented, no white space at the ends of lines, which signatures do not cover.
fn text_of(document: &Value) -> String {
    format!("{document:#}\n")
}

fn index(documents: &[(String, Value)], suffix: &str, now: i64) -> Value {
    let entries = documents.iter().map(|(content_id, document)| {
        let products: Vec<&String> = document["products"].as_object().map(|products| products.keys().collect()).unwrap_or_default();
        let entry = json!({
            "datatype": document["datatype"], "format": "products:1.0", "path": format!("streams/v1/{content_id}.{suffix}"), "products": products,
            "updated": document["updated"],
        });
        (content_id.clone(), entry)
    });
    json!({"format": "index:1.0", "updated": date::format(now), "index": entries.collect::<serde_json::Map<_, _>>()})
}
