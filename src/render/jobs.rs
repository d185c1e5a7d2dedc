//! Jobs: admission under an idempotency key, permits, progress, cancellation, and the end that is recorded.
//!
//! ```text
//!            admit                 permit                 publish + record
//!  (none) ──────────▶ queued ──────────────▶ running ──────────────────────▶ succeeded
//!                        │                      │
//!                        └───────── cancel ─────┴──▶ cancelled      error ──▶ failed
//! ```
//!
//! The row in the catalogue is durable before the caller has its answer, and the volume's row and the render's final row are one transaction. A failed or
//! cancelled render has left nothing, so its key may start it again with the same spec; a succeeded one always gives the same answer.

use std::sync::Arc;

use tokio::sync::watch;

use crate::{
    error::{Error, Kind, Result, Stage},
    failpoint::reach,
    names::Digest,
    progress::{Progress, Reading},
    render::{
        Engine, blocking,
        devices::ResolvedDevice,
        now_ms,
        quota::{Claim, Hold},
        resolve::Resolved,
    },
    spec::{JobSpec, first_difference},
    store::{
        catalog::{
            Admitted,
            journal::Intent,
            owners::{callers_key, owned_key},
        },
        records::{FailureRecord, RenderRecord, RenderState, VolumeKey},
    },
};

/// A job that has not ended.
pub struct Job {
    /// How far it is; also how it is cancelled.
    pub progress: Progress,
    record: watch::Sender<RenderRecord>,
}

/// A render as it is at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Its row.
    pub record: RenderRecord,
    /// Its progress, while it runs.
    pub reading: Option<Reading>,
}

impl Job {
    fn snapshot(&self) -> Snapshot {
        Snapshot { record: self.record.borrow().clone(), reading: Some(self.progress.reading()) }
    }

    fn update(&self, change: impl FnOnce(&mut RenderRecord)) {
        self.record.send_modify(change);
    }
}

/// What [`Engine::start`] found or did.
#[derive(Debug, Clone)]
pub struct Started {
    /// The render.
    pub snapshot: Snapshot,
    /// Whether it is new (or started again).
    pub created: bool,
}

impl Engine {
    /// Admits a job of the daemon's own; see [`Engine::start_for`].
    pub async fn start(self: &Arc<Self>, job: JobSpec) -> Result<Started> {
        self.start_for(job, None).await
    }

    /// Admits a job for an owner and sets it going. Everything that can be refused without touching the host is refused here. Must be called on the runtime.
    pub async fn start_for(self: &Arc<Self>, job: JobSpec, claim: Option<Claim>) -> Result<Started> {
        let waiting = self.jobs.lock().expect("no panic while holding the job table").len();
        if waiting >= self.config.limits.queued_renders {
            return Err(Error::new(Kind::Busy, Stage::Request, "queue", format!("{waiting} renders wait or run, the limit is {waiting}"))
                .with_reason("QUEUE_FULL")
                .with_hint("try again later, or raise limits.queued_renders"));
        }
        let mut record = new_record(&job);
        if let Some(claim) = &claim {
            record.key = owned_key(&claim.owner, &record.key);
        }
        // The same request as before gets its answer before anything is looked at that may have changed since.
        if let Some(existing) = self.existing(&record).await? {
            return Ok(existing);
        }
        let resolved = self.resolve(job).await?;
        let (engine, key) = (Arc::clone(self), record.key.clone());
        let (resolved, held, claim) = blocking(Stage::Resolve, move || {
            let (resolved, reservation) = Arc::clone(&engine).reserve(resolved)?;
            // Nobody else works on these volumes now.
            engine.settle_pending(&key)?;
            let hold = claim.as_ref().map(|claim| engine.claim(claim, &resolved)).transpose()?;
            Ok((resolved, (reservation, hold), claim))
        })
        .await?;
        let engine = Arc::clone(self);
        let intents = intents(&resolved);
        self.record_ends().await?;
        let admitted = blocking(Stage::Store, move || {
            if let Some(claim) = &claim {
                engine.store.catalog.note_render_owner(&record.key, &claim.owner)?;
            }
            engine.store.catalog.admit_render(record, intents)
        })
        .await?;
        let record = match admitted {
            Admitted::Started(record) => record,
            Admitted::Existing(existing) => return self.same_or_conflict(existing, &resolved.canonical),
        };
        reach("render-admitted");
        let job = Arc::new(Job { progress: Progress::default(), record: watch::Sender::new(record.clone()) });
        self.jobs.lock().expect("no panic while holding the job table").insert(record.id.clone(), Arc::clone(&job));
        let snapshot = job.snapshot();
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            engine.run(&job, resolved, held).await;
        });
        Ok(Started { snapshot, created: true })
    }

    /// Records the ends that the catalogue did not take; nothing is admitted before it does.
    async fn record_ends(self: &Arc<Self>) -> Result<()> {
        let ends: Vec<RenderRecord> = self.unrecorded.lock().expect("no panic while holding the unrecorded ends").values().cloned().collect();
        for end in ends {
            let (engine, row) = (Arc::clone(self), end.clone());
            // What it left, if it did, is for the next start to look after.
            blocking(Stage::Store, move || engine.store.catalog.end_render(row, false)).await?;
            self.unrecorded.lock().expect("no panic while holding the unrecorded ends").remove(&end.id);
        }
        Ok(())
    }

    async fn existing(self: &Arc<Self>, record: &RenderRecord) -> Result<Option<Started>> {
        let (engine, key) = (Arc::clone(self), record.key.clone());
        let found = blocking(Stage::Store, move || engine.store.catalog.render_by_key(&key)).await?;
        let found = found.map(|found| self.unrecorded_end(&found.id).unwrap_or(found));
        match found {
            Some(found) if !matches!(found.state, RenderState::Failed | RenderState::Cancelled) || found.spec != record.spec => {
                self.same_or_conflict(found, &record.spec).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn same_or_conflict(&self, existing: RenderRecord, canonical: &serde_json::Value) -> Result<Started> {
        match first_difference(&existing.spec, canonical) {
            None => Ok(Started { snapshot: self.live(existing), created: false }),
            Some(field) => Err(Error::new(
                Kind::AlreadyExists,
                Stage::Request,
                callers_key(&existing.key),
                format!("the idempotency key belongs to render {}, whose {field} differs", existing.id),
            )
            .with_reason("IDEMPOTENCY_KEY_REUSED")
            .with_violation(field, "differs from the first request with this key")),
        }
    }

    /// How a render ended whose end the catalogue did not take.
    fn unrecorded_end(&self, id: &str) -> Option<RenderRecord> {
        self.unrecorded.lock().expect("no panic while holding the unrecorded ends").get(id).cloned()
    }

    /// The render as it is now, from memory while it runs.
    fn live(&self, record: RenderRecord) -> Snapshot {
        match self.jobs.lock().expect("no panic while holding the job table").get(&record.id) {
            Some(job) => job.snapshot(),
            None => Snapshot { record: self.unrecorded_end(&record.id).unwrap_or(record), reading: None },
        }
    }

    /// One render. `NotFound` when there is none.
    pub fn render(&self, id: &str) -> Result<Snapshot> {
        if let Some(job) = self.jobs.lock().expect("no panic while holding the job table").get(id) {
            return Ok(job.snapshot());
        }
        let record = self.store.catalog.render(id)?.ok_or_else(|| no_render(id))?;
        Ok(Snapshot { record: self.unrecorded_end(id).unwrap_or(record), reading: None })
    }

    /// Renders, newest first; of these pools and of none, when some are given.
    pub fn renders(&self, pools: Option<&[&str]>, state: Option<RenderState>, limit: u32, offset: u64) -> Result<Vec<Snapshot>> {
        let records = self.store.catalog.renders(pools, state, limit, offset)?;
        Ok(records.into_iter().map(|record| self.live(record)).collect())
    }

    /// A receiver of the render's changes while it runs, and the job for its progress; `None` when it has ended.
    pub fn follow(&self, id: &str) -> Option<(Arc<Job>, watch::Receiver<RenderRecord>)> {
        let jobs = self.jobs.lock().expect("no panic while holding the job table");
        jobs.get(id).map(|job| (Arc::clone(job), job.record.subscribe()))
    }

    /// Asks a render to stop. No effect on one that has ended.
    pub fn cancel(&self, id: &str) -> Result<Snapshot> {
        if let Some(job) = self.jobs.lock().expect("no panic while holding the job table").get(id) {
            job.progress.cancel();
        }
        self.render(id)
    }

    /// How many jobs run and how many wait.
    pub fn load(&self) -> (u32, u32) {
        let jobs = self.jobs.lock().expect("no panic while holding the job table");
        let running = jobs.values().filter(|job| job.record.borrow().state == RenderState::Running).count();
        (running as u32, (jobs.len() - running) as u32)
    }

    /// Waits until no job is left.
    pub async fn idle(&self) {
        while !self.jobs.lock().expect("no panic while holding the job table").is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// Asks every job to stop.
    pub fn cancel_all(&self) {
        for job in self.jobs.lock().expect("no panic while holding the job table").values() {
            job.progress.cancel();
        }
    }

    /// The rows of all jobs that have not ended.
    pub(super) fn live_records(&self) -> Vec<RenderRecord> {
        let jobs = self.jobs.lock().expect("no panic while holding the job table");
        jobs.values().map(|job| job.record.borrow().clone()).collect()
    }

    /// Whether a job for this image or golden waits or runs.
    pub fn is_wanted(&self, image_id: Option<&str>, golden: Option<Digest>) -> bool {
        self.jobs.lock().expect("no panic while holding the job table").values().any(|job| {
            let record = job.record.borrow();
            image_id.is_some_and(|id| record.image_id == id) || golden.is_some_and(|key| record.golden_key == Some(key))
        })
    }

    async fn run(self: &Arc<Self>, job: &Arc<Job>, resolved: Resolved, held: (Option<Reservation>, Option<Hold>)) {
        let started = std::time::Instant::now();
        let id = job.record.borrow().id.clone();
        let result = self.stages(job, resolved).await;
        let stage = job.progress.reading().stage.map_or("resolve", Stage::name);
        let record = match result {
            // The stages recorded the end together with the volume.
            Ok(record) => {
                tracing::info!(render = %id, ms = started.elapsed().as_millis() as u64, "render succeeded");
                record
            }
            Err(error) => {
                let cancelled = error.kind() == Kind::Cancelled;
                if cancelled {
                    tracing::info!(render = %id, stage, "render cancelled");
                } else {
                    tracing::error!(render = %id, stage, error = %error.chain(), "render failed");
                }
                let mut record = job.record.borrow().clone();
                record.state = if cancelled { RenderState::Cancelled } else { RenderState::Failed };
                record.stage = stage.to_owned();
                record.failure = Some(failure_of(&error));
                record.finished_ms = Some(now_ms());
                let (engine, row) = (Arc::clone(self), record.clone());
                // What could not be undone is looked after at the next start.
                let left_nothing = error.cleanup_failures().is_empty();
                if let Err(error) = blocking(Stage::Store, move || engine.store.catalog.end_render(row, left_nothing)).await {
                    tracing::error!(render = %id, error = %error.chain(), "the end of a render could not be recorded");
                    self.unrecorded.lock().expect("no panic while holding the unrecorded ends").insert(id.clone(), record.clone());
                }
                record
            }
        };
        // Whoever sees the end may use key and name again at once: both are free before anybody is told.
        drop(held);
        self.jobs.lock().expect("no panic while holding the job table").remove(&id);
        job.record.send_replace(record);
    }

    /// Runs the stages; gives the final row, which is recorded already.
    async fn stages(self: &Arc<Self>, job: &Arc<Job>, resolved: Resolved) -> Result<RenderRecord> {
        let progress = job.progress.clone();
        let begin = |job: &Job| {
            job.update(|record| {
                record.state = RenderState::Running;
                record.started_ms = Some(now_ms());
            });
        };
        // Said before anything is looked for: garbage collection keeps what a job wants.
        if let Some(spec) = resolved.golden.complete() {
            job.update(|record| record.golden_key = Some(spec.key()));
        }
        // What is warm takes a render permit at once; what has to be fetched or built first takes those permits, so that cold work never blocks warm renders.
        let fetched = self.fetch(resolved, &progress, || begin(job)).await?;
        job.update(|record| record.golden_key = Some(fetched.golden.key()));
        let (resolved, golden) = self.golden(fetched, &progress, || begin(job)).await?;
        progress.check()?;
        self.check_platforms(&resolved, &golden).await?;
        progress.check()?;
        let permit = Arc::clone(&self.render_permits).acquire_owned().await;
        let permit = permit.map_err(|error| Error::internal(Stage::Inject, "", "the render permits are closed").with_source(error))?;
        progress.check()?;
        begin(job);
        let engine = Arc::clone(self);
        let job = Arc::clone(job);
        blocking(Stage::Target, move || {
            let _permit = permit;
            let end = |job: &Job| {
                let mut record = job.record.borrow().clone();
                record.state = RenderState::Succeeded;
                record.stage = Stage::Report.name().to_owned();
                record.finished_ms = Some(now_ms());
                record
            };
            match resolved.render.as_ref() {
                Some(render) => {
                    let id = job.record.borrow().id.clone();
                    let made = engine.make_volumes(&id, &resolved, render, &golden, &job.progress)?;
                    let record = end(&job);
                    made.record(&engine, record.clone())?;
                    Ok(record)
                }
                None => {
                    let record = end(&job);
                    engine.store.catalog.update_render(record.clone())?;
                    Ok(record)
                }
            }
        })
        .await
    }

    /// Reserves the names of all volumes of a job, and finds what is there under them.
    fn reserve(self: Arc<Self>, mut resolved: Resolved) -> Result<(Resolved, Option<Reservation>)> {
        let Some(render) = &mut resolved.render else { return Ok((resolved, None)) };
        let mut names = vec![(render.spec.pool.clone(), render.spec.volume.clone())];
        names.extend(render.devices.iter().map(ResolvedDevice::key));
        let mut reserved = self.reserved.lock().expect("no panic while holding the reservations");
        if let Some((pool, name)) = names.iter().find(|name| reserved.contains(name)) {
            let why = "another render is making a volume of this name";
            return Err(Error::new(Kind::AlreadyExists, Stage::Resolve, format!("{pool}/{name}"), why)
                .with_reason("VOLUME_EXISTS")
                .with_violation("spec.volume.name", "is taken"));
        }
        reserved.extend(names.iter().cloned());
        drop(reserved);
        let reservation = Reservation { engine: Arc::clone(&self), names };
        self.find_existing(render)?;
        Ok((resolved, Some(reservation)))
    }
}

/// The right to make volumes of some names; given back when dropped.
struct Reservation {
    engine: Arc<Engine>,
    names: Vec<VolumeKey>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut reserved = self.engine.reserved.lock().expect("no panic while holding the reservations");
        for name in &self.names {
            reserved.remove(name);
        }
    }
}

/// What a job will make, for the journal: all but the devices that are kept as they are.
fn intents(resolved: &Resolved) -> Vec<Intent> {
    let Some(render) = &resolved.render else { return Vec::new() };
    let root = Intent { pool: render.pool.name.clone(), name: render.spec.volume.clone(), format: render.format };
    let devices = render.devices.iter().filter(|device| device.kept().is_none());
    let devices = devices.map(|device| Intent { pool: device.pool.name.clone(), name: device.volume.clone(), format: device.format });
    std::iter::once(root).chain(devices).collect()
}

/// There is none of this id, as far as the caller may know.
pub(crate) fn no_render(id: &str) -> Error {
    Error::new(Kind::NotFound, Stage::Request, id, "there is no such render").with_reason("RENDER_NOT_FOUND")
}

fn new_record(job: &JobSpec) -> RenderRecord {
    let id = format!("rnd-{}", &uuid::Uuid::new_v4().simple().to_string()[..20]);
    let (key, spec, image_id, instance, volume) = match job {
        JobSpec::Render { key, spec } => (
            key.to_string(),
            spec.canonical.clone(),
            spec.image_id.clone(),
            Some(spec.instance.instance.to_string()),
            Some((spec.pool.to_string(), spec.volume.to_string())),
        ),
        // A prerender is idempotent by its nature; every call is a job of its own that ends at once when the golden is there.
        JobSpec::Prerender { image_id, .. } => (format!("prerender:{id}"), serde_json::Value::Null, image_id.clone(), None, None),
    };
    RenderRecord {
        id,
        key,
        spec,
        image_id,
        instance,
        volume,
        state: RenderState::Queued,
        stage: Stage::Resolve.name().to_owned(),
        failure: None,
        golden_key: None,
        created_ms: now_ms(),
        started_ms: None,
        finished_ms: None,
    }
}

/// An error as it is kept with its render.
pub fn failure_of(error: &Error) -> FailureRecord {
    FailureRecord {
        code: crate::api::status::code_of(error.kind()) as i32,
        reason: error.reason().to_owned(),
        message: error.chain(),
        hint: error.hint().unwrap_or_default().to_owned(),
        stage: error.stage().name().to_owned(),
        retryable: error.is_retryable(),
    }
}
