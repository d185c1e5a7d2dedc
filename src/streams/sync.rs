//! Keeping the catalogue in step with a source: new versions come in, their channel moves, old ones that nothing needs go.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use super::{
    filter::Filters,
    import::{Described, Offer, choose},
    tree::{Kept, root_of},
};
use crate::{
    config::streams::{StreamConfig, SyncMode},
    error::{Error, Kind, Result, Stage},
    names::Digest,
    progress::Progress,
    render::{Engine, blocking, now_secs, vouch::ManifestOrigin},
    source,
    spec::{GoldenOptions, JobSpec},
    store::catalog::streams::StreamImage,
};

/// Skipped versions that a report names.
const SKIPPED_MAX: usize = 200;

/// What a synchronisation did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// Products documents that were read.
    pub documents: usize,
    /// Versions that the filters let through.
    pub offered: usize,
    /// Images that were catalogued now.
    pub imported: Vec<String>,
    /// Images that were there already.
    pub unchanged: usize,
    /// Images whose bytes were fetched now.
    pub fetched: usize,
    /// Images that were removed.
    pub removed: Vec<String>,
    /// What was left alone, and why: versions that can't be used, images that can't be removed.
    pub skipped: Vec<(String, String)>,
}

/// A version that a source offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offered {
    /// Content id of its document.
    pub content_id: String,
    /// Product.
    pub product: String,
    /// Version.
    pub version: String,
    /// Architecture, operating system and release, as the publisher says them.
    pub arch: String,
    /// Operating system.
    pub os: String,
    /// Release.
    pub release: String,
    /// What it would be called here.
    pub name: String,
    /// Its root filesystem.
    pub digest: Option<Digest>,
    /// Bytes of it.
    pub size: u64,
    /// Why it can't be catalogued; empty when it can.
    pub unusable: String,
    /// The image that it is, when it is catalogued.
    pub image_id: Option<String>,
}

impl Report {
    fn skip(&mut self, what: String, why: String) {
        if self.skipped.len() < SKIPPED_MAX {
            self.skipped.push((what, why));
        }
    }
}

impl Engine {
    /// Reads a source anew and does what its configuration says. `Kind::Busy` when that is already being done.
    pub async fn sync_stream(self: &Arc<Self>, name: &str) -> Result<Report> {
        self.stream(name)?;
        let key = name.to_owned();
        let _flight = self.streams.flights.enter(&key).await;
        let outcome = self.sync_now(name).await;
        let end = outcome.as_ref().err().map(Error::chain);
        if let Ok(mut ends) = self.streams.ends.lock() {
            ends.insert(key, (now_secs(), end));
        }
        outcome
    }

    /// When a source was last synchronised, and why that failed if it did.
    pub fn stream_end(&self, name: &str) -> Option<(i64, Option<String>)> {
        self.streams.ends.lock().ok()?.get(name).cloned()
    }

    async fn sync_now(self: &Arc<Self>, name: &str) -> Result<Report> {
        let documents = self.refresh_stream(name).await?;
        let config = self.stream(name)?.clone();
        let engine = Arc::clone(self);
        let mode = config.sync;
        let (mut report, newest) = blocking(Stage::Store, move || engine.take_in(&config, documents)).await?;
        if mode == SyncMode::Fetch {
            for image in newest {
                match self.fetch_image(&image).await {
                    Ok(true) => report.fetched += 1,
                    Ok(false) => {}
                    Err(error) if error.kind() == Kind::NoSpace => return Err(error),
                    Err(error) => report.skip(image, error.chain()),
                }
            }
        }
        tracing::info!(
            stream = name,
            documents,
            offered = report.offered,
            imported = report.imported.len(),
            removed = report.removed.len(),
            "stream synchronised"
        );
        Ok(report)
    }

    /// Catalogues what is new, and removes what is old; gives the images that should be there.
    fn take_in(&self, config: &StreamConfig, documents: usize) -> Result<(Report, Vec<String>)> {
        let mut report = Report { documents, ..Report::default() };
        let trees = self.stream_tree(config.name.as_str())?;
        let offers = self.newest(config, &trees, &mut report)?;
        let mut newest = Vec::new();
        if config.sync == SyncMode::OnDemand {
            return Ok((report, newest));
        }
        let known = self.store.catalog.stream_images(config.name.as_str())?;
        let mut wanted = BTreeSet::new();
        // Oldest first, so that the channel ends at the newest.
        for (product, version, offer) in offers.into_iter().rev() {
            wanted.insert((product.clone(), version.clone()));
            let before = known.iter().find(|image| image.product == product && image.version == version);
            match self.import_offer(config, &offer) {
                Ok(id) => {
                    if before.is_some_and(|image| image.image_id == id) {
                        report.unchanged += 1;
                    } else {
                        report.imported.push(id.clone());
                    }
                    newest.push(id);
                }
                Err(error) => report.skip(offer.item.pedigree(), error.chain()),
            }
        }
        if wanted.is_empty() && !known.is_empty() {
            // A publisher's accident should not empty the catalogue.
            report.skip(config.name.to_string(), "offers nothing any more; no image was removed".into());
            return Ok((report, newest));
        }
        for image in known {
            if wanted.contains(&(image.product.clone(), image.version.clone())) || newest.contains(&image.image_id) {
                continue;
            }
            match self.delete_image(&image.image_id) {
                Ok(()) => report.removed.push(image.image_id),
                Err(error) if error.kind() == Kind::Conflict => report.skip(format!("{}/{}", image.product, image.version), error.chain()),
                Err(error) => return Err(error),
            }
        }
        Ok((report, newest))
    }

    /// The versions that should be in the catalogue: of each product the newest ones that can be used, newest first.
    fn newest<'t>(&self, config: &StreamConfig, trees: &'t [Kept], report: &mut Report) -> Result<Vec<(String, String, Offer<'t>)>> {
        let filters = filters_of(config)?;
        let mut offers = Vec::new();
        for tree in trees {
            for (product, of_product) in &tree.products.products {
                let mut left = config.keep;
                for version in of_product.versions.keys().rev() {
                    if left == 0 {
                        break;
                    }
                    let items = accepted(&tree.products, product, version, &filters)?;
                    if items.is_empty() {
                        continue;
                    }
                    report.offered += 1;
                    match choose(items.into_iter()).and_then(|offer| self.check_offer(config, offer)) {
                        Ok(offer) => {
                            left -= 1;
                            offers.push((product.clone(), version.clone(), offer));
                        }
                        Err(why) => report.skip(format!("{product}/{version}"), why),
                    }
                }
            }
        }
        Ok(offers)
    }

    fn check_offer<'t>(&self, config: &StreamConfig, offer: Offer<'t>) -> Result<Offer<'t>, String> {
        let max = config.max_image_size.unwrap_or(self.config.fetch.max_size).min(self.config.fetch.max_size);
        match offer.download.size {
            Some(size) if size > max.0 => Err(format!("{} has {size} bytes, the limit is {max}", offer.item.item)),
            _ => Ok(offer),
        }
    }

    /// What the metadata beside a split image's root filesystem says. Fetched once: the image that this version is already remembers. Templates that are not
    /// understood are left out, and the image says why; bytes that can't be had, or are others than the tree says, are errors. Blocking, on the runtime.
    fn described(&self, config: &StreamConfig, offer: &Offer<'_>, root: &reqwest::Url) -> Result<Option<Described>> {
        let Some(metadata) = &offer.metadata else { return Ok(None) };
        let known = self.store.catalog.stream_images(config.name.as_str())?;
        let same = |image: &&StreamImage| image.product == offer.item.product && image.version == offer.item.version;
        if let Some(image) = known.iter().find(same)
            && let Some(described) = Described::of_manifest(&self.image(&image.image_id)?.record.manifest)
            && described.digest == metadata.digest
        {
            return Ok(Some(described));
        }
        let url = metadata.download.path.below(root)?.to_string();
        let object = url.clone();
        let descriptor = source::Descriptor { url, digest: Some(metadata.digest), size: metadata.download.size };
        let path = self.store.tmp().join(format!("metadata-{}", uuid::Uuid::new_v4().simple()));
        let fetched = tokio::runtime::Handle::current().block_on(self.fetcher.fetch(&descriptor, &path, &Progress::default()));
        let opened =
            fetched.and_then(|_| std::fs::File::open(&path).map_err(|error| Error::io(Stage::Fetch, object.as_str(), "open the metadata", error)));
        // A transfer that failed may have left something or nothing.
        let _gone = std::fs::remove_file(&path);
        let digest = metadata.digest;
        match self.launcher.lxd_metadata(&opened?, &object) {
            Ok(said) => Ok(Some(Described { digest, lxd: said.get("lxd").cloned(), left_out: None })),
            Err(error) if error.kind() == Kind::InvalidRequest => {
                tracing::warn!(image = %offer.item.pedigree(), error = %error.chain(), "templates of an image are left out");
                let why = error.chain().chars().filter(|c| !c.is_control()).take(400).collect();
                Ok(Some(Described { digest, lxd: None, left_out: Some(why) }))
            }
            Err(error) => Err(error),
        }
    }

    /// Catalogues an offer with its names; gives the image's id.
    fn import_offer(&self, config: &StreamConfig, offer: &Offer<'_>) -> Result<String> {
        let (root, _) = root_of(&config.url)?;
        let described = self.described(config, offer, &root)?;
        let manifest = offer.manifest(config.name.as_str(), &root, described.as_ref())?;
        let (record, created) = self.create_image(self.vouch_manifest(&manifest, ManifestOrigin::Stream(config.name.as_str()))?, "", "")?;
        let now = now_secs();
        let stream = config.name.as_str();
        let image =
            StreamImage { product: offer.item.product.into(), version: offer.item.version.into(), image_id: record.id.clone(), imported: now };
        let known = self.store.catalog.stream_images(stream)?;
        if !known.iter().any(|known| known.product == image.product && known.version == image.version && known.image_id == image.image_id) {
            self.store.catalog.put_stream_image(stream, image)?;
        }
        let Some(called) = offer.called() else { return Ok(record.id) };
        let mut name = called.name.clone();
        let named = match self.name_image(&name, &called.version, &record.id, &[], now) {
            // Two products of a publisher under one name: the second gets that of its product.
            Err(error) if error.kind() == Kind::AlreadyExists && called.own_name.is_some() => {
                name = called.own_name.clone().unwrap_or_default();
                self.name_image(&name, &called.version, &record.id, &[], now)?
            }
            other => other?,
        };
        if named || created {
            let channels = self.store.catalog.channels(Some(&name))?;
            let at = channels.iter().find(|row| row.channel == config.channel).map(|row| row.version.as_str());
            // Forward only: somebody may have pointed it at an older version for a reason, and then only a newer one moves it.
            if at.is_none_or(|at| at < called.version.as_str()) {
                self.store.catalog.set_channel(&name, &config.channel, &called.version, now)?;
            }
            for alias in called.aliases.iter().filter(|_| name == called.name) {
                match self.store.catalog.alias(alias)? {
                    Some(other) if other != name => {}
                    _ => match self.alias_image(alias, &name) {
                        Err(error) if error.kind() == Kind::AlreadyExists => {}
                        other => other?,
                    },
                }
            }
        }
        Ok(record.id)
    }

    /// Catalogues one version of a source's tree as it was accepted last. `Kind::NotFound` (`STREAM_VERSION_NOT_FOUND`), `Kind::Unsupported`
    /// (`STREAM_IMAGE_UNUSABLE`) when none of its items is a root tarball. `version` empty: the newest.
    pub fn import_stream_image(&self, stream: &str, product: &str, version: &str) -> Result<String> {
        let config = self.stream(stream)?;
        let filters = filters_of(config)?;
        let trees = self.stream_tree(stream)?;
        let missing = |why: String| Error::new(Kind::NotFound, Stage::Resolve, product, why).with_reason("STREAM_VERSION_NOT_FOUND");
        let tree = trees
            .iter()
            .find(|tree| tree.products.products.contains_key(product))
            .ok_or_else(|| missing(format!("stream {stream} has no such product")).with_hint("synchronise the stream if it was never read"))?;
        let versions = &tree.products.products[product].versions;
        let candidates: Vec<&str> = if version.is_empty() { versions.keys().rev().map(String::as_str).collect() } else { vec![version] };
        let mut why = format!("it has no version {version}");
        for version in candidates.into_iter().filter(|version| versions.contains_key(*version)) {
            let items = accepted(&tree.products, product, version, &filters)?;
            match choose(items.into_iter()).and_then(|offer| self.check_offer(config, offer)) {
                Ok(offer) => return self.import_offer(config, &offer),
                Err(reason) => why = reason,
            }
        }
        if versions.is_empty() || (!version.is_empty() && !versions.contains_key(version)) {
            return Err(missing(why));
        }
        Err(Error::new(Kind::Unsupported, Stage::Resolve, product, why).with_reason("STREAM_IMAGE_UNUSABLE"))
    }

    /// What a source offers, as it was accepted last: versions that its filters and `filters` let through, by product, newest first.
    pub fn stream_offers(&self, stream: &str, filters: &Filters) -> Result<Vec<Offered>> {
        let config = self.stream(stream)?;
        let own = filters_of(config)?;
        let known: BTreeMap<(String, String), String> =
            self.store.catalog.stream_images(stream)?.into_iter().map(|image| ((image.product, image.version), image.image_id)).collect();
        let mut offered = Vec::new();
        for tree in self.stream_tree(stream)? {
            for (product, of_product) in &tree.products.products {
                for version in of_product.versions.keys().rev() {
                    let mut items = accepted(&tree.products, product, version, &own)?;
                    let mut kept = Vec::new();
                    for item in items.drain(..) {
                        if filters.accept(&item)? {
                            kept.push(item);
                        }
                    }
                    let Some(first) = kept.first().copied() else { continue };
                    let text = |key: &str| first.text(key).unwrap_or_default().chars().filter(|c| !c.is_control()).take(128).collect::<String>();
                    let release = if text("version").is_empty() { text("release") } else { text("version") };
                    let choice = choose(kept.into_iter()).and_then(|offer| self.check_offer(config, offer));
                    offered.push(Offered {
                        content_id: tree.products.content_id.clone(),
                        product: product.clone(),
                        version: version.clone(),
                        arch: text("arch"),
                        os: text("os"),
                        release,
                        name: choice.as_ref().ok().and_then(Offer::called).map(|called| called.name).unwrap_or_default(),
                        digest: choice.as_ref().ok().and_then(|offer| offer.download.digest),
                        size: choice.as_ref().ok().and_then(|offer| offer.download.size).unwrap_or_default(),
                        unusable: choice.err().unwrap_or_default(),
                        image_id: known.get(&(product.clone(), version.clone())).cloned(),
                    });
                }
            }
        }
        Ok(offered)
    }

    /// Makes sure that an image's bytes are here; whether they had to be fetched.
    pub async fn fetch_image(self: &Arc<Self>, image_id: &str) -> Result<bool> {
        let resolved = self.resolve(JobSpec::Prerender { image_id: image_id.to_owned(), golden: GoldenOptions::default() }).await?;
        let begun = std::sync::atomic::AtomicBool::new(false);
        self.fetch(resolved, &Progress::default(), || begun.store(true, std::sync::atomic::Ordering::Relaxed)).await?;
        Ok(begun.into_inner())
    }
}

fn filters_of(config: &StreamConfig) -> Result<Filters> {
    Filters::parse(&config.filters).map_err(|why| Error::field(Stage::Config, "stream.filters", why))
}

fn accepted<'t>(tree: &'t super::Products, product: &'t str, version: &'t str, filters: &Filters) -> Result<Vec<super::ItemRef<'t>>> {
    let mut items = Vec::new();
    for item in tree.items_of(product, version) {
        if filters.accept(&item)? {
            items.push(item);
        }
    }
    Ok(items)
}

/// Looks at every source that is kept in step, again and again. Ends when it is dropped.
pub async fn run(engine: Arc<Engine>) {
    let streams: Vec<StreamConfig> = engine.config.streams.iter().filter(|stream| stream.sync != SyncMode::OnDemand).cloned().collect();
    let mut tasks = tokio::task::JoinSet::new();
    for stream in streams {
        let engine = Arc::clone(&engine);
        tasks.spawn(async move {
            loop {
                if let Err(error) = engine.sync_stream(stream.name.as_str()).await {
                    tracing::warn!(stream = %stream.name, error = %error.chain(), again_secs = stream.interval_secs, "stream not synchronised");
                }
                tokio::time::sleep(Duration::from_secs(stream.interval_secs)).await;
            }
        });
    }
    while tasks.join_next().await.is_some() {}
}
