//! The pipeline: one file per stage, each consuming the previous stage's value.
//!
//! ```text
//! jobs      admit under an idempotency key, wait for permits, run, record the end
//! resolve   spec → Resolved {image, manifest, args, pool, golden spec without the tarball's digest}
//! fetch     Resolved → Fetched {blob on disk, golden spec complete}        async, single flight per URL
//! vouch     whose signature a tarball or manifest owes, verified before anything reads it
//! golden    Fetched → Golden {disk, facts}                                 blocking, one build per key
//! fill      the part of it that reads foreign bytes                        in a confined process (worker)
//! inject    Golden + instance → edits and report                           pure
//! devices   what an instance has beside its root: contents, fstab lines
//! volume    Golden + edits → patch → staged → published volumes + mapping  blocking
//! collect   garbage: goldens and tarballs that nobody needs go when space is short
//! admission space promised to renders that run; memory
//! quota     what one owner's renders may take together
//! reconfigure  a stopped instance's volume, changed in place
//! study     what of it reads the guest's filesystem                in a confined process (worker)
//! start     which kernel an instance starts with on a platform, or why it does not
//! machine   the whole machine in the forms of hypervisors' tools
//! recover   what a daemon does first
//! verify    are goldens and tarballs what they were
//! reap      what older versions and operators left
//! ```
//!
//! Async code never blocks: resolve and fetch are async, the rest runs on blocking threads under permits. A dropped call stops nothing; a cancelled job
//! stops at the next check and leaves nothing.

mod admission;
pub mod collect;
pub mod devices;
pub mod fetch;
pub mod fill;
pub mod flight;
pub mod golden;
pub mod inject;
pub mod jobs;
pub mod keys;
mod machine;
mod manifests;
pub mod plan;
pub mod prerender;
pub mod quota;
pub mod reap;
pub mod reconfigure;
mod recover;
pub mod resolve;
pub(crate) mod start;
pub mod study;
pub mod verify;
pub mod volume;
pub mod vouch;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio::sync::Semaphore;

use crate::{
    boot::supplied::SuppliedKernels,
    config::{Config, KernelConfig},
    error::{Error, Kind, Result, Stage},
    host::info::HostInfo,
    names::{Digest, PoolName},
    render::{admission::Admission, flight::Flights, golden::LoadedGolden, jobs::Job},
    source::{self, Fetcher},
    store::{
        Store,
        records::{RenderRecord, VolumeKey},
    },
    target::{
        Pool,
        pace::{self, Pacer},
    },
    trust::SIGNATURE_BYTES_MAX,
    worker::Launcher,
};

/// How old the answer about tools and versions of the host may be.
const HOST_INFO_AGE_MAX: Duration = Duration::from_secs(60);
/// Goldens whose facts are kept parsed in memory. A provider renders from a handful of images at a time.
const LOADED_GOLDENS_MAX: usize = 32;

/// Uploads at one time. Each holds a blocking thread for as long as the sender likes, and those are what everything else runs on.
pub const UPLOADS_MAX: usize = 16;

/// Layers of confinement that this host does not give; none when nothing is confined; why nothing can be.
pub type Layers = Result<Option<Vec<String>>, String>;

/// Everything the stages share. One per daemon.
pub struct Engine {
    /// The store.
    pub store: Store,
    /// The configuration.
    pub config: Config,
    /// Pools by name.
    pub pools: BTreeMap<PoolName, Pool>,
    pub(crate) fetcher: Arc<Fetcher>,
    /// Kernels of the configuration.
    kernels: SuppliedKernels,
    /// For signatures: the same sources, little patience for large files.
    signature_fetcher: Fetcher,
    keys: keys::Keys,
    manifests: manifests::Manifests,
    host: Mutex<Option<(Instant, Arc<HostInfo>)>>,
    loaded: Mutex<Vec<Arc<LoadedGolden>>>,
    pub(crate) fetches: Flights<String>,
    pub(crate) builds: Flights<Digest>,
    fetch_permits: Semaphore,
    build_permits: Semaphore,
    /// One per upload that goes on.
    pub upload_permits: Semaphore,
    render_permits: Arc<Semaphore>,
    jobs: Mutex<HashMap<String, Arc<Job>>>,
    /// Goldens and tarballs whose bytes this process has seen to be right.
    verified: Mutex<HashSet<Digest>>,
    /// Ends of renders that the catalogue did not take, by id: their rows say that they run, and nobody works on them.
    unrecorded: Mutex<HashMap<String, RenderRecord>>,
    /// Volumes that a job is making, so that two jobs never make the same one.
    reserved: Mutex<HashSet<VolumeKey>>,
    /// What is promised to renders that run.
    pub(crate) admission: Admission,
    /// Held by the one that collects garbage.
    collecting: Mutex<()>,
    /// Goldens that the configuration wants prepared, as far as they are.
    prepared: Mutex<BTreeSet<Digest>>,
    /// What renders hold of their owners' quotas.
    quotas: Arc<quota::Quotas>,
    /// How fast bulk data is written.
    pub(crate) pacer: Arc<Pacer>,
    /// What is known of simplestreams sources.
    pub(crate) streams: crate::streams::tree::State,
    /// What [`Launcher::missing_layers`] said last: it starts a process.
    layers: Mutex<Option<(Instant, Layers)>>,
    /// Starts the processes that read foreign bytes.
    pub(crate) launcher: Launcher,
    /// What is known of other hosts.
    pub(crate) share: crate::share::State,
}

impl Engine {
    /// Sets up the stages over an opened store.
    pub fn new(store: Store, config: Config) -> Result<Arc<Engine>> {
        let pools = config.target_pools().into_iter().map(|pool| (pool.name.clone(), pool)).collect();
        let mut fetching = fetch::fetcher_config(&config);
        fetching.mirrors.extend(crate::streams::tree::mirrors(&config));
        // A signature vouches for itself, so any mirror may give it.
        let of_anybody = fetching.mirrors.iter().cloned().map(|mirror| source::Mirror { trusted: true, ..mirror }).collect();
        let small = source::Config { size_max: SIGNATURE_BYTES_MAX as u64, mirrors: of_anybody, ..fetching.clone() };
        let signature_fetcher = Fetcher::new(small)?;
        let fetcher = Arc::new(Fetcher::new(fetching)?);
        let keys = keys::Keys::load(&config)?;
        let share = crate::share::State::new(&config.share, &fetcher)?;
        Ok(Arc::new(Engine {
            store,
            pools,
            fetcher,
            kernels: SuppliedKernels::new(config.kernels.iter().map(KernelConfig::source).collect()),
            signature_fetcher,
            keys,
            manifests: Default::default(),
            host: Mutex::new(None),
            loaded: Mutex::new(Vec::new()),
            fetches: Flights::default(),
            builds: Flights::default(),
            fetch_permits: Semaphore::new(config.limits.concurrent_fetches),
            upload_permits: Semaphore::new(UPLOADS_MAX),
            build_permits: Semaphore::new(config.limits.concurrent_builds),
            render_permits: Arc::new(Semaphore::new(config.limits.concurrent_renders)),
            jobs: Mutex::new(HashMap::new()),
            verified: Mutex::new(HashSet::new()),
            unrecorded: Mutex::new(HashMap::new()),
            share,
            reserved: Mutex::new(HashSet::new()),
            admission: Admission::new(config.limits.memory_reserve.0),
            collecting: Mutex::new(()),
            prepared: Mutex::new(BTreeSet::new()),
            quotas: Arc::default(),
            pacer: Arc::new(Pacer::new(Some(config.limits.write_bandwidth.0), pace::BURST_BYTES_DEFAULT, config.limits.io_priority)),
            streams: Default::default(),
            layers: Mutex::new(None),
            launcher: Launcher::new(&config.worker),
            config,
        }))
    }

    /// Reads the files of trusted keys and identities again. Blocking.
    pub fn reload_keys(&self) {
        self.keys.reload(&self.config);
    }

    /// Since when the keys are in force; nothing where none are configured.
    pub fn key_status(&self) -> Option<keys::KeyStatus> {
        let has_none = self.config.trust.is_empty() && self.config.age.identities.is_empty();
        (!has_none).then(|| self.keys.status())
    }

    /// What the host is, at most [`HOST_INFO_AGE_MAX`] old: finding out starts a process per tool. Blocking.
    pub fn host_info(&self) -> Result<Arc<HostInfo>> {
        let mut host = self.host.lock().map_err(|_| Error::internal(Stage::Host, "host", "finding out about the host panicked"))?;
        if let Some((since, info)) = &*host
            && since.elapsed() < HOST_INFO_AGE_MAX
        {
            return Ok(Arc::clone(info));
        }
        let info = Arc::new(HostInfo::gather()?);
        *host = Some((Instant::now(), Arc::clone(&info)));
        Ok(info)
    }

    /// Which layers of confinement this host does not give, at most [`HOST_INFO_AGE_MAX`] old; none when nothing is confined; why nothing can be. Blocking.
    pub fn missing_layers(&self) -> Layers {
        let mut layers = self.layers.lock().map_err(|_| "finding out about confinement panicked".to_owned())?;
        if let Some((since, known)) = &*layers
            && since.elapsed() < HOST_INFO_AGE_MAX
        {
            return known.clone();
        }
        let found = self.launcher.missing_layers().map_err(|error| error.chain());
        *layers = Some((Instant::now(), found.clone()));
        found
    }

    /// The pool with this name. `NotFound` naming the ones there are.
    pub fn pool(&self, name: &PoolName) -> Result<&Pool> {
        self.pools.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.pools.keys().map(PoolName::as_str).collect();
            Error::new(Kind::NotFound, Stage::Resolve, name.as_str(), "there is no such pool")
                .with_reason("POOL_NOT_FOUND")
                .with_violation("volume.pool", format!("{name} is not configured"))
                .with_hint(format!("configured pools: {}", known.join(", ")))
        })
    }
}

/// Seconds since 1970.
pub fn now_secs() -> i64 {
    now_ms() / 1000
}

/// Milliseconds since 1970.
pub fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Runs blocking work on tokio's blocking threads; a panic there becomes an internal error instead of taking the daemon down.
pub async fn blocking<T: Send + 'static>(stage: Stage, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::internal(stage, "", "the work panicked").with_source(error)),
    }
}
