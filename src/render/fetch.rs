//! Fetch: the root filesystem's bytes get into the store, once however many ask.

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{
    config::{self, share::Prefer},
    error::{Error, Kind, Result, Stage},
    names::Digest,
    progress::Progress,
    render::{Engine, blocking, now_secs, resolve::Resolved},
    source::{self, Authorities, Descriptor, Rules, SourceRules, UrlPolicy},
    store::records::{GoldenSpec, ImageRecord},
    trust::Refusal,
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
        // That bytes are here, or at a peer, says nothing about who vouches for them.
        if self.check_vouched(&resolved.image.record).await? {
            begin();
            self.download(&resolved.image.record, progress).await?;
        }
        let here = match self.pulled(&resolved, progress, &begin).await? {
            Some(digest) => Some(digest),
            None => self.known_blob(&resolved).await?,
        };
        let digest = match here {
            Some(digest) => digest,
            None => {
                begin();
                self.download(&resolved.image.record, progress).await?
            }
        };
        let golden = resolved.golden.with_digest(digest);
        Ok(Fetched { golden, blob: self.store.blob_path(&digest), resolved })
    }

    /// The digest of the tarball, if this host prefers to take goldens from peers, and the one made from it is here, or has come from one now.
    async fn pulled(self: &Arc<Self>, resolved: &Resolved, progress: &Progress, begin: &impl Fn()) -> Result<Option<Digest>> {
        let Some(spec) = resolved.golden.complete().filter(|_| self.config.golden.prefer == Prefer::Pull) else { return Ok(None) };
        if self.loaded_golden(&spec.key()).is_some() {
            return Ok(Some(spec.rootfs));
        }
        begin();
        let is_here = self.pull_golden(&spec, &resolved.image.record.id, progress).await?;
        Ok(is_here.then_some(spec.rootfs))
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

    /// Gets the tarball of an image into the store, however many ask for it at the same time, and gives its digest.
    pub(crate) async fn download(self: &Arc<Self>, image: &ImageRecord, progress: &Progress) -> Result<Digest> {
        let Some(url) = image.rootfs_url.clone() else {
            let what = image.rootfs_digest.map(|digest| digest.to_string()).unwrap_or_default();
            if self.check_vouched(image).await? {
                return Err(Refusal::Missing.error(&what, "uploaded tarballs owe a signature").with_hint("upload it again, with its signature"));
            }
            return Err(Error::new(Kind::NotFound, Stage::Fetch, what, "the uploaded root filesystem is no longer in the store")
                .with_reason("ROOTFS_NOT_FOUND")
                .with_hint("upload it again"));
        };
        let flight = self.fetches.enter(&url).await;
        // Whoever had the flight before may have fetched it, and noted the digest that nobody knew.
        let engine = Arc::clone(self);
        let id = image.id.clone();
        let image = blocking(Stage::Fetch, move || Ok(engine.image(&id)?.record)).await?;
        let here = match image.rootfs_digest {
            Some(digest) => {
                let engine = Arc::clone(self);
                blocking(Stage::Fetch, move || engine.store.has_blob(&digest)).await?.then_some(digest)
            }
            None => None,
        };
        let is_owed = self.check_vouched(&image).await?;
        if let Some(digest) = here.filter(|_| !is_owed) {
            return Ok(digest);
        }
        let permit = self.fetch_permits.acquire().await;
        let _permit = permit.map_err(|error| Error::internal(Stage::Fetch, "", "the fetch permits are closed").with_source(error))?;
        progress.check()?;
        // First what is small, and may end it.
        let signature = if is_owed { self.fetch_signature(&url, progress).await? } else { None };
        if let Some(digest) = here {
            let engine = Arc::clone(self);
            return blocking(Stage::Fetch, move || {
                let _flight = flight;
                engine.vouch(signature.as_deref(), &url, &engine.store.blob_path(&digest), &digest)?;
                Ok(digest)
            })
            .await;
        }
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
        let descriptor = Descriptor { url: url.clone(), digest: image.rootfs_digest, size: image.rootfs_size };
        let fetched = self.fetcher.fetch(&descriptor, &partial, progress).await?;
        let engine = Arc::clone(self);
        blocking(Stage::Fetch, move || {
            let _flight = flight;
            if let Err(error) = engine.vouch(signature.as_deref(), &url, &partial, &fetched.digest) {
                // What nobody vouches for is not kept: the next attempt would go on with it.
                return Err(match std::fs::remove_file(&partial) {
                    Ok(()) => error,
                    Err(failure) => error.with_cleanup_failure(Error::io(Stage::Fetch, partial.display().to_string(), "remove", failure)),
                });
            }
            engine.store.publish_blob(&partial, fetched.digest, fetched.size, now_secs())?;
            engine.mark_verified(fetched.digest);
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
pub fn fetcher_config(config: &config::Config) -> source::Config {
    let fetch = &config.fetch;
    let general = Rules {
        policy: UrlPolicy {
            schemes: fetch.schemes.clone(),
            allow_hosts: fetch.allow_hosts.clone(),
            deny_hosts: fetch.deny_hosts.clone(),
            ports: fetch.ports.clone(),
            allow_private_addresses: fetch.allow_private_addresses,
            allow_addresses: fetch.allow_addresses.clone(),
            deny_addresses: fetch.deny_addresses.clone(),
        },
        connect_timeout: Duration::from_secs(fetch.connect_timeout_secs),
        idle_timeout: Duration::from_secs(fetch.idle_timeout_secs),
        redirects_max: fetch.max_redirects,
        authorities: fetch.ca_file.clone().map_or(Authorities::Host, Authorities::HostAnd),
    };
    source::Config {
        sources: config.sources.iter().map(|source| of_source(source, &general)).collect(),
        rules: general,
        total_timeout: Duration::from_secs(fetch.total_timeout_secs),
        attempts: fetch.attempts,
        size_max: fetch.max_size.0,
        file_roots: fetch.file_roots.clone(),
        mirrors: fetch
            .mirrors
            .iter()
            .map(|mirror| source::Mirror { prefix: mirror.prefix.clone(), replace: mirror.replace.clone(), trusted: mirror.trusted })
            .collect(),
        ..source::Config::default()
    }
}

/// The rules of a source: its own, then the general ones. Addresses that are denied in general stay so.
fn of_source(source: &config::Source, general: &Rules) -> SourceRules {
    let policy = &general.policy;
    let seconds = |secs: Option<u64>, general: Duration| secs.map_or(general, Duration::from_secs);
    SourceRules {
        hosts: source.hosts.clone(),
        rules: Rules {
            policy: UrlPolicy {
                schemes: source.schemes.clone().unwrap_or_else(|| policy.schemes.clone()),
                allow_hosts: policy.allow_hosts.clone(),
                deny_hosts: policy.deny_hosts.clone(),
                ports: source.ports.clone().unwrap_or_else(|| policy.ports.clone()),
                allow_private_addresses: source.allow_private_addresses.unwrap_or(policy.allow_private_addresses),
                allow_addresses: source.allow_addresses.clone().unwrap_or_else(|| policy.allow_addresses.clone()),
                deny_addresses: policy.deny_addresses.iter().chain(&source.deny_addresses).copied().collect(),
            },
            connect_timeout: seconds(source.connect_timeout_secs, general.connect_timeout),
            idle_timeout: seconds(source.idle_timeout_secs, general.idle_timeout),
            redirects_max: source.max_redirects.unwrap_or(general.redirects_max),
            authorities: source.ca_file.clone().map_or_else(|| general.authorities.clone(), Authorities::Only),
        },
    }
}
