//! Fetch: the root filesystem's bytes get into the store, once however many ask.

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{
    config,
    error::{Error, Kind, Result, Stage},
    names::Digest,
    progress::Progress,
    render::{Engine, blocking, now_secs, resolve::Resolved},
    source::{self, Descriptor, UrlPolicy},
    store::records::GoldenSpec,
};

/// A job whose tarball is in the store.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// The job.
    pub resolved: Resolved,
    /// The golden it needs, complete.
    pub golden: GoldenSpec,
    /// The tarball, its digest verified when it arrived.
    pub blob: PathBuf,
}

impl Engine {
    /// Makes sure that the tarball is in the store. `begin` is called before work that takes long.
    pub async fn fetch(self: &Arc<Self>, resolved: Resolved, progress: &Progress, begin: impl Fn()) -> Result<Fetched> {
        let digest = match self.known_blob(&resolved).await? {
            Some(digest) => digest,
            None => {
                begin();
                self.download(&resolved, progress).await?
            }
        };
        let golden = resolved.golden.with_digest(digest);
        Ok(Fetched { golden, blob: self.store.blob_path(&digest), resolved })
    }

    /// The digest of the tarball, if it is known and either the bytes or the golden made from them are here.
    async fn known_blob(self: &Arc<Self>, resolved: &Resolved) -> Result<Option<Digest>> {
        let Some(spec) = resolved.golden.complete() else { return Ok(None) };
        if self.loaded_golden(&spec.key()).is_some() {
            return Ok(Some(spec.rootfs));
        }
        let engine = Arc::clone(self);
        blocking(Stage::Fetch, move || {
            let here = engine.store.has_blob(&spec.rootfs)? || engine.load_golden(spec.key())?.is_some();
            Ok(here.then_some(spec.rootfs))
        })
        .await
    }

    async fn download(self: &Arc<Self>, resolved: &Resolved, progress: &Progress) -> Result<Digest> {
        let image = &resolved.image.record;
        let Some(url) = image.rootfs_url.clone() else {
            let what = image.rootfs_digest.map(|digest| digest.to_string()).unwrap_or_default();
            return Err(Error::new(Kind::NotFound, Stage::Fetch, what, "the uploaded root filesystem is no longer in the store")
                .with_reason("ROOTFS_NOT_FOUND")
                .with_hint("upload it again"));
        };
        let flight = self.fetches.enter(&url).await;
        // Whoever had the flight before may have fetched it, and noted the digest that nobody knew.
        let engine = Arc::clone(self);
        let id = image.id.clone();
        let image = blocking(Stage::Fetch, move || Ok(engine.image(&id)?.record)).await?;
        if let Some(digest) = image.rootfs_digest {
            let engine = Arc::clone(self);
            if blocking(Stage::Fetch, move || engine.store.has_blob(&digest)).await? {
                return Ok(digest);
            }
        }
        let permit = self.fetch_permits.acquire().await;
        let _permit = permit.map_err(|error| Error::internal(Stage::Fetch, "", "the fetch permits are closed").with_source(error))?;
        progress.check()?;
        let _promised = match image.rootfs_size {
            Some(size) => {
                let promise = || self.admission.promise_store(&self.store.tmp(), size, "the root filesystem's tarball");
                match promise() {
                    Err(error) if error.kind() == Kind::NoSpace => {
                        let engine = Arc::clone(self);
                        blocking(Stage::Store, move || {
                            engine.make_room(size);
                            Ok(())
                        })
                        .await?;
                        Some(promise()?)
                    }
                    other => Some(other?),
                }
            }
            None => None,
        };
        progress.enter(Stage::Fetch, image.rootfs_size.unwrap_or(0));
        // The same URL and digest always use the same name, so that an interrupted transfer is resumed.
        let name = Digest::of(format!("{url}\n{:?}", image.rootfs_digest).as_bytes());
        let partial = self.store.tmp().join(format!("partial-{}", name.hex()));
        let descriptor = Descriptor { url, digest: image.rootfs_digest, size: image.rootfs_size };
        let fetched = self.fetcher.fetch(&descriptor, &partial, progress).await?;
        let engine = Arc::clone(self);
        blocking(Stage::Fetch, move || {
            let _flight = flight;
            engine.store.publish_blob(&partial, fetched.digest, fetched.size, now_secs())?;
            if image.rootfs_digest.is_none() || image.rootfs_size.is_none() {
                engine.store.catalog.set_image_rootfs(&image.id, fetched.digest, fetched.size)?;
            }
            tracing::info!(image = %image.id, digest = %fetched.digest, bytes = fetched.size, "root filesystem fetched");
            Ok(fetched.digest)
        })
        .await
    }
}

/// The fetcher's configuration from the daemon's.
pub fn fetcher_config(config: &config::Fetch) -> source::Config {
    source::Config {
        idle_timeout: Duration::from_secs(config.idle_timeout_secs),
        total_timeout: Duration::from_secs(config.total_timeout_secs),
        attempts: config.attempts,
        size_max: config.max_size.0,
        file_roots: config.file_roots.clone(),
        policy: UrlPolicy {
            schemes: config.schemes.clone(),
            allow_hosts: config.allow_hosts.clone(),
            allow_private_addresses: config.allow_private_addresses,
            ..UrlPolicy::default()
        },
        mirrors: config.mirrors.iter().map(|mirror| source::Mirror { prefix: mirror.prefix.clone(), replace: mirror.replace.clone() }).collect(),
        ..source::Config::default()
    }
}
