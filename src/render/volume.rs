//! Volume: golden + edits → block patch → staged → published, and the mapping that says what exists now.

use std::{fs::File, sync::Arc};

use serde_json::Value;

use crate::{
    disk::DiskPlan,
    error::{Error, Kind, Result, Stage},
    fs::{Region, edit::Edit, patch::BlockPatch},
    guest::config::Secret,
    mapping::{Backing, Device, Filesystem, MAPPING_VERSION, Mapping, Role},
    names::{Digest, PoolName, VolumeName},
    progress::Progress,
    render::{
        Engine, blocking,
        golden::{GoldenIds, LoadedGolden, disk_plan, filesystem},
        inject::{Injected, inject},
        jobs::failure_of,
        now_ms, now_secs,
        resolve::{Resolved, ResolvedRender},
    },
    spec::{JobSpec, RenderSpec},
    store::records::{RenderRecord, VolumeRecord},
    target::{Place, Volume, VolumeFormat, VolumePlan, Wanted, target_for},
    units::{PATCH_BLOCK, Timestamp},
};

/// What is written per instance beside the patch, at most: headers and tables of an overlay.
const OVERLAY_ALLOCATION: u64 = 16 << 20;

/// A published volume whose row is not written yet.
pub struct Made {
    volume: Volume,
    mapping: Mapping,
    golden_key: Option<Digest>,
}

/// What a render would do.
pub struct Plan {
    /// Key of the golden, when the tarball's digest is known.
    pub golden_key: Option<Digest>,
    /// Virtual size of the volume in bytes.
    pub size_bytes: u64,
    /// What needs the golden.
    pub ready: Option<ReadyPlan>,
}

/// The part of a plan that needs the golden image.
pub struct ReadyPlan {
    /// What would be injected, redacted.
    pub injected: Value,
    /// The edits.
    pub edits: Vec<Edit>,
    /// Changed 4 KiB blocks.
    pub patch_blocks: u64,
}

impl Engine {
    /// Plans a render; writes nothing.
    pub async fn plan(self: &Arc<Self>, spec: RenderSpec) -> Result<Plan> {
        let key = "plan".parse().map_err(|why: String| Error::internal(Stage::Request, "plan", why))?;
        let resolved = self.resolve(JobSpec::Render { key, spec: Box::new(spec) }).await?;
        let engine = Arc::clone(self);
        blocking(Stage::Edit, move || {
            let size = |golden: u64, render: &ResolvedRender| render.spec.size_bytes.unwrap_or(golden);
            let render = resolved.render.as_ref().ok_or_else(|| Error::internal(Stage::Resolve, "plan", "a render without a volume"))?;
            let spec = resolved.golden.complete();
            let golden = match &spec {
                Some(spec) => engine.load_golden(spec.key())?,
                None => None,
            };
            let size_bytes = size(resolved.golden.size_bytes(), render);
            let ready = match golden {
                Some(golden) => {
                    let injected = inject(&resolved, render, &golden, new_seed()?, now_timestamp())?;
                    let (_, patch) = patch_of(&golden, &injected, size_bytes, &Progress::default())?;
                    Some(ReadyPlan { injected: injected.report, patch_blocks: patch.len() as u64, edits: injected.request.edits })
                }
                None => None,
            };
            Ok(Plan { golden_key: spec.map(|spec| spec.key()), size_bytes, ready })
        })
        .await
    }

    /// Makes and publishes the volume of a render. Blocking.
    pub fn make_volume(
        &self,
        render_id: &str,
        resolved: &Resolved,
        render: &ResolvedRender,
        golden: &LoadedGolden,
        progress: &Progress,
    ) -> Result<Made> {
        let (spec, target) = (&render.spec, target_for(render.format));
        progress.enter(Stage::Inject, 0);
        let injected = inject(resolved, render, golden, new_seed()?, now_timestamp())?;
        progress.check()?;
        progress.enter(Stage::Edit, 0);
        let size_bytes = volume_size(render, golden)?;
        let allocate = match render.format {
            VolumeFormat::Qcow2Overlay => OVERLAY_ALLOCATION,
            _ => golden.record.allocated + OVERLAY_ALLOCATION,
        };
        target.check(&Wanted { overwrite: spec.overwrite, ..Wanted::new(&render.pool, &spec.volume, size_bytes, allocate) })?;
        let (plan, patch) = patch_of(golden, &injected, size_bytes, progress)?;
        progress.check()?;
        progress.enter(Stage::Target, 0);
        let staged = target.stage(
            &VolumePlan { overwrite: spec.overwrite, ..VolumePlan::new(&render.pool, &spec.volume, &golden.disk, &patch, render_id) },
            progress,
        )?;
        progress.check()?;
        let volume = staged.publish()?;
        let golden_key = (render.format == VolumeFormat::Qcow2Overlay).then_some(golden.record.key);
        let mapping = mapping_of(render_id, resolved, render, golden, &injected, &plan, &volume);
        Ok(Made { volume, mapping, golden_key })
    }

    /// Removes a volume and its row; `false` when there was none.
    pub fn delete_volume(&self, pool: &PoolName, name: &VolumeName) -> Result<bool> {
        let pool = self.pool(pool)?;
        let Some(record) = self.store.catalog.volume(pool.name.as_str(), name.as_str())? else { return Ok(false) };
        target_for(record.volume.format).delete(pool, &record.volume)?;
        self.store.catalog.delete_volume(pool.name.as_str(), name.as_str())?;
        tracing::info!(pool = %pool.name, volume = %name, "volume deleted");
        Ok(true)
    }

    /// What a daemon does first: renders that a stopped daemon left are failed, temporary files of pools are removed, loop devices are attached again.
    pub fn recover(&self) -> Result<()> {
        let interrupted = Error::new(Kind::Unavailable, Stage::Target, "render", "the daemon was stopped while this render waited or ran")
            .with_reason("DAEMON_RESTARTED")
            .with_hint("start it again with the same idempotency key");
        let failed = self.store.catalog.fail_interrupted(failure_of(&interrupted), now_ms())?;
        if failed > 0 {
            tracing::warn!(renders = failed, "renders of the stopped daemon are marked as failed");
        }
        for pool in self.pools.values() {
            if let Place::Directory { path } = &pool.place {
                std::fs::create_dir_all(path)
                    .map_err(|error| Error::io(Stage::Host, path.display().to_string(), "make the pool's directory", error))?;
                for removed in target_for(VolumeFormat::Raw).sweep(pool, false)? {
                    tracing::warn!(path = %removed.display(), "an unfinished volume was removed");
                }
            }
        }
        for record in self.store.catalog.volumes_of_format(VolumeFormat::Loop)? {
            self.adopt(record);
        }
        Ok(())
    }

    /// A volume that can't be adopted is reported and left alone: the others, and the daemon, go on.
    fn adopt(&self, mut record: VolumeRecord) {
        let adopted = self.pool(&record.volume.pool).and_then(|pool| target_for(record.volume.format).adopt(pool, &record.volume));
        match adopted {
            Ok(volume) if volume == record.volume => {}
            Ok(volume) => {
                tracing::info!(pool = %volume.pool, volume = %volume.name, device = %volume.device.display(), "volume attached again");
                for device in &mut record.mapping.devices {
                    if device.volume.pool == volume.pool && device.volume.name == volume.name {
                        device.volume = volume.clone();
                    }
                }
                record.volume = volume;
                if let Err(error) = self.store.catalog.update_volume(record) {
                    tracing::error!(error = %error.chain(), "the volume's new device could not be recorded");
                }
            }
            Err(error) => {
                tracing::error!(pool = %record.volume.pool, volume = %record.volume.name, error = %error.chain(), "a volume could not be attached again");
            }
        }
    }
}

impl Made {
    /// Records volume and end of the render in one transaction. When that fails the volume is removed again: nobody would know of it.
    pub fn record(self, engine: &Engine, render: RenderRecord) -> Result<()> {
        let record = VolumeRecord { volume: self.volume.clone(), mapping: self.mapping, golden_key: self.golden_key, created: now_secs() };
        engine.store.catalog.finish_render(record, render).map_err(|error| {
            let undone = engine.pool(&self.volume.pool).and_then(|pool| target_for(self.volume.format).delete(pool, &self.volume));
            match undone {
                Ok(()) => error,
                Err(failure) => error.with_cleanup_failure(failure),
            }
        })
    }
}

/// The virtual size: what was asked for, else the golden's; a block device has the size it has.
fn volume_size(render: &ResolvedRender, golden: &LoadedGolden) -> Result<u64> {
    match (&render.pool.place, render.spec.size_bytes) {
        (Place::Devices { .. }, None) => {
            let device = crate::target::block::size_bytes(&render.pool, &render.spec.volume)?;
            // A device that is too small is refused by the target, which says so better.
            Ok((device / PATCH_BLOCK * PATCH_BLOCK).max(golden.disk.size_bytes))
        }
        (_, size) => Ok(size.unwrap_or(golden.disk.size_bytes)),
    }
}

/// The blocks of the whole disk that the edits, the new identities and the new size change.
fn patch_of(golden: &LoadedGolden, injected: &Injected, size_bytes: u64, progress: &Progress) -> Result<(DiskPlan, BlockPatch)> {
    let spec = &golden.record.spec;
    let path = &golden.disk.path;
    let file = File::open(path).map_err(|error| Error::io(Stage::Edit, path.display().to_string(), "open the golden image", error))?;
    let disk = Region { file: Arc::new(file), offset: 0, len: golden.disk.size_bytes };
    let before = disk_plan(spec, golden.disk.size_bytes, GoldenIds::of(&golden.record.key).disk)?.root();
    let plan = disk_plan(spec, size_bytes, injected.disk_identity)?;
    let root = Region { file: Arc::clone(&disk.file), offset: before.offset, len: before.len };
    let mut request = injected.request.clone();
    request.size_bytes = (plan.root().len > before.len).then_some(plan.root().len);
    let patch = filesystem(spec.filesystem).edit(root, &request, progress)?;
    let patch = plan.patch(&disk, patch)?;
    Ok((plan, patch))
}

fn mapping_of(
    render_id: &str,
    resolved: &Resolved,
    render: &ResolvedRender,
    golden: &LoadedGolden,
    injected: &Injected,
    plan: &DiskPlan,
    volume: &Volume,
) -> Mapping {
    let root = plan.root();
    let spec = &golden.record.spec;
    let backing_chain = volume.backing.iter().map(|path| Backing { path: path.clone(), format: "raw".to_owned() }).collect();
    Mapping {
        version: MAPPING_VERSION,
        instance: render.spec.instance.instance.clone(),
        render_id: render_id.to_owned(),
        image_id: resolved.image.record.id.clone(),
        devices: vec![Device {
            role: Role::Root,
            boot_order: 0,
            volume: volume.clone(),
            read_only: false,
            backing_chain,
            golden_digest: Some(golden.record.digest),
            golden_key: Some(golden.record.key.hex()),
            partition_table: plan.partition_table().map(str::to_owned),
            disk_uuid: plan.disk_uuid(),
            partitions: plan.describe(),
            filesystem: Some(Filesystem {
                kind: spec.filesystem,
                uuid: injected.filesystem_uuid.to_string(),
                label: spec.label.clone(),
                offset_bytes: root.offset,
                size_bytes: root.len,
            }),
        }],
        identity: injected.identity.clone(),
        injected: injected.report.clone(),
        created_secs: now_secs(),
    }
}

fn now_timestamp() -> Timestamp {
    let ms = now_ms();
    Timestamp { secs: ms.div_euclid(1000), nanos: (ms.rem_euclid(1000) * 1_000_000) as u32 }
}

/// The secret that an instance's host keys are made from; lives as long as the render.
fn new_seed() -> Result<Secret> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| Error::internal(Stage::Inject, "seed", "ask the kernel for random bytes").with_source(error))?;
    Ok(Secret::new(seed))
}
