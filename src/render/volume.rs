//! Volume: golden + edits → block patch → staged → published volumes, and the mapping that says what exists now.
//!
//! An instance has a root and may have further devices. All are staged before the first is published; the root is published last, and one transaction of the
//! catalogue makes all of them known. When something fails in between, what was published is removed again.

use std::{collections::BTreeSet, fs::File, sync::Arc};

use serde_json::Value;

use crate::{
    boot::{bls, platform::Firmware},
    disk::DiskPlan,
    error::{Error, Kind, Result, Stage},
    ext4::read::Image,
    failpoint::reach,
    fs::{FsKind, Region, edit::Edit, patch::BlockPatch},
    guest::{
        config::{LinkKind, Secret},
        identity::Identity,
    },
    mapping::{Backing, Device, Filesystem, GuestIdentity, MAPPING_VERSION, Mapping, Nic, Role},
    names::{Digest, MacAddr, PoolName, VolumeName},
    progress::Progress,
    render::{
        Engine, blocking,
        devices::{self, ResolvedDevice, content},
        golden::{GoldenIds, LoadedGolden, disk_plan, filesystem},
        inject::{self, Injected},
        now_ms, now_secs, plan,
        resolve::{Resolved, ResolvedRender},
    },
    spec::{JobSpec, RenderSpec},
    store::{
        catalog::journal::{Intent, RenderEntry, Sealed, SealedVolume},
        records::{RenderRecord, VolumeKey, VolumeRecord},
    },
    target::{Place, Proof, Staged, Volume, VolumeFormat, VolumePlan, Wanted, target_for},
    units::{PATCH_BLOCK, Timestamp},
    worker::Launcher,
};

/// What is written per instance beside the patch, at most: headers and tables of an overlay, metadata of an empty filesystem.
const OVERHEAD_ALLOCATION: u64 = 16 << 20;

/// Published volumes whose rows are not written yet.
pub struct Made {
    /// The root first.
    volumes: Vec<VolumeRecord>,
    /// Those that took the place of a row.
    replaced: BTreeSet<VolumeKey>,
    /// Those that this render published and nobody else knows.
    published: Vec<Volume>,
    /// What the replaced root had and the new one has not.
    leftover: Vec<VolumeKey>,
}

/// What a render would do.
pub struct Plan {
    /// Key of the golden, when the tarball's digest is known.
    pub golden_key: Option<Digest>,
    /// Virtual size of the volume in bytes.
    pub size_bytes: u64,
    /// The further devices.
    pub devices: Vec<ResolvedDevice>,
    /// What needs the golden.
    pub ready: Option<ReadyPlan>,
}

/// The part of a plan that needs the golden image.
pub struct ReadyPlan {
    /// The report that the render would give ([`plan::of_report`]), redacted.
    pub injected: Value,
    /// The edits.
    pub edits: Vec<Edit>,
    /// Changed 4 KiB blocks.
    pub patch_blocks: u64,
}

/// What is computed before anything is written.
struct Prepared {
    identity: Identity,
    injected: Injected,
    plan: DiskPlan,
    patch: BlockPatch,
    nics: Vec<Nic>,
    now: Timestamp,
}

impl Engine {
    /// Plans a render; writes nothing.
    pub async fn plan(self: &Arc<Self>, spec: RenderSpec) -> Result<Plan> {
        let key = "plan".parse().map_err(|why: String| Error::internal(Stage::Request, "plan", why))?;
        let mut resolved = self.resolve(JobSpec::Render { key, spec: Box::new(spec) }).await?;
        let (engine, known) = (Arc::clone(self), resolved.golden.complete());
        if let Some(golden) = blocking(Stage::Golden, move || known.map(|spec| engine.load_golden(spec.key())).transpose()).await?.flatten() {
            self.check_platforms(&resolved, &golden).await?;
        }
        let engine = Arc::clone(self);
        blocking(Stage::Edit, move || {
            if let Some(render) = &mut resolved.render {
                engine.find_existing(render)?;
            }
            let render = resolved.render.as_ref().ok_or_else(|| Error::internal(Stage::Resolve, "plan", "a render without a volume"))?;
            let spec = resolved.golden.complete();
            let golden = match &spec {
                Some(spec) => engine.load_golden(spec.key())?,
                None => None,
            };
            let size_bytes = render.spec.size_bytes.unwrap_or(resolved.golden.size_bytes());
            let ready = match golden {
                Some(golden) => {
                    let prepared = prepare(&engine.launcher, &resolved, render, &golden, size_bytes, &Progress::default())?;
                    let Prepared { injected, patch, .. } = prepared;
                    let has_keys = render.replaces.as_ref().is_some_and(|record| record.seed.is_some());
                    let keys = if has_keys { plan::HostKeys::Kept } else { plan::HostKeys::Drawn };
                    Some(ReadyPlan {
                        injected: plan::of_report(injected.report, keys),
                        patch_blocks: patch.len() as u64,
                        edits: injected.request.edits,
                    })
                }
                None => None,
            };
            Ok(Plan { golden_key: spec.map(|spec| spec.key()), size_bytes, devices: render.devices.clone(), ready })
        })
        .await
    }

    /// Makes and publishes the volumes of a render. Blocking.
    pub fn make_volumes(
        &self,
        render_id: &str,
        resolved: &Resolved,
        render: &ResolvedRender,
        golden: &LoadedGolden,
        progress: &Progress,
    ) -> Result<Made> {
        progress.enter(Stage::Inject, 0);
        let size_bytes = volume_size(render, golden)?;
        let _promised = self.check_targets(render, golden, size_bytes)?;
        let prepared = prepare(&self.launcher, resolved, render, golden, size_bytes, progress)?;
        progress.check()?;
        progress.enter(Stage::Target, 0);
        let mut staged: Vec<(Box<dyn Staged>, Option<Filesystem>)> = Vec::new();
        let image = open_root(golden)?;
        let macs = prepared.nics.iter().map(|nic| (nic.name.clone(), nic.mac)).collect();
        let source = content::Source {
            store: &self.store,
            render: render_id,
            golden: image.as_ref(),
            profile: golden.record.spec.profile,
            now: prepared.now,
            config: &render.spec.instance,
            identity: &prepared.identity,
            instance_uuid: &prepared.injected.identity.instance_uuid,
            macs: &macs,
        };
        for device in render.devices.iter().filter(|device| device.kept().is_none()) {
            let uuid = device_uuid(&prepared.identity, device);
            staged.push(self.stage_device(device, uuid, &source, progress)?);
        }
        let plan = VolumePlan {
            overwrite: render.spec.overwrite,
            options: &render.spec.options,
            pacer: Some(&self.pacer),
            replace: render.replaces.as_ref().map(|record| &record.volume),
            ..VolumePlan::new(&render.pool, &render.spec.volume, &golden.disk, &prepared.patch, render_id)
        };
        let root = target_for(render.format).stage(&plan, progress)?;
        progress.check()?;
        let root_record = |volume: &Volume| self.root_record(render_id, resolved, render, golden, &prepared, volume);
        self.seal(render_id, render, golden, &staged, &*root, &root_record)?;
        let fresh = self.publish(render, staged)?;
        let ours = || fresh.iter().map(|(volume, _)| volume).filter(|volume| !replaces(render, volume));
        let root = root.publish().map_err(|error| self.unpublish(ours(), error))?;
        reach("render-published");
        let published = ours().chain(Some(&root).filter(|_| render.replaces.is_none())).cloned().collect();
        let volumes = records(render, root_record(&root), fresh)?;
        let replaced = volumes.iter().filter(|record| is_row(render, record)).map(VolumeRecord::key).collect();
        let leftover = leftover(render, &volumes);
        Ok(Made { volumes, replaced, published, leftover })
    }

    /// Puts the rows that are going to be written into the journal before anything is published, when a crash in between could not be undone without them:
    /// something is replaced, or what is published does not say by itself whose it is.
    fn seal(
        &self,
        render_id: &str,
        render: &ResolvedRender,
        golden: &LoadedGolden,
        staged: &[(Box<dyn Staged>, Option<Filesystem>)],
        root: &dyn Staged,
        root_record: &dyn Fn(&Volume) -> VolumeRecord,
    ) -> Result<()> {
        let mut proofs = vec![(root.foreseen(), root.proof()?)];
        for (device, _) in staged {
            proofs.push((device.foreseen(), device.proof()?));
        }
        if proofs.iter().all(|(volume, proof)| *proof == Proof::Mark && !replaces(render, volume)) {
            return Ok(());
        }
        let fresh = staged.iter().map(|(device, filesystem)| (device.foreseen().clone(), filesystem.clone())).collect();
        let records = records(render, root_record(root.foreseen()), fresh)?;
        let (leftover, seed) = (leftover(render, &records), records[0].seed.clone());
        let seal = |record: VolumeRecord| {
            let proof = proofs.iter().find(|(volume, _)| (&volume.pool, &volume.name) == (&record.volume.pool, &record.volume.name));
            let replaces = is_row(render, &record);
            SealedVolume::of(record, proof.map(|(_, proof)| proof.clone()), replaces)
        };
        let volumes = records.into_iter().map(seal).collect();
        let intents =
            proofs.iter().map(|(volume, _)| Intent { pool: volume.pool.clone(), name: volume.name.clone(), format: volume.format }).collect();
        let sealed = Sealed { volumes, leftover, golden_key: Some(golden.record.key) };
        self.store.catalog.seal_render(render_id, RenderEntry { intents, sealed: Some(sealed) }, seed)?;
        reach("render-sealed");
        Ok(())
    }

    fn stage_device(
        &self,
        device: &ResolvedDevice,
        uuid: uuid::Uuid,
        source: &content::Source<'_>,
        progress: &Progress,
    ) -> Result<(Box<dyn Staged>, Option<Filesystem>)> {
        let content = content::prepare(device, content::size_of(device)?, uuid, source, progress)?;
        let plan = VolumePlan {
            overwrite: device.overwrite,
            options: &device.options,
            pacer: Some(&self.pacer),
            replace: device.replaced().map(|record| &record.volume),
            ..VolumePlan::new(&device.pool, &device.volume, &content.disk, &content.patch, source.render)
        };
        let staged = target_for(device.format).stage(&plan, progress).map_err(|error| error.under_field(&device.field))?;
        Ok((staged, content.filesystem.clone()))
    }

    /// Publishes the further devices; when one fails, those before it are removed.
    fn publish(&self, render: &ResolvedRender, staged: Vec<(Box<dyn Staged>, Option<Filesystem>)>) -> Result<Vec<(Volume, Option<Filesystem>)>> {
        let mut published: Vec<(Volume, Option<Filesystem>)> = Vec::new();
        for (staged, filesystem) in staged {
            match staged.publish() {
                Ok(volume) => published.push((volume, filesystem)),
                Err(error) => {
                    return Err(self.unpublish(published.iter().map(|(volume, _)| volume).filter(|volume| !replaces(render, volume)), error));
                }
            }
        }
        Ok(published)
    }

    /// Removes volumes that nobody knows of, because of `error`.
    fn unpublish<'a>(&self, volumes: impl Iterator<Item = &'a Volume>, mut error: Error) -> Error {
        for volume in volumes {
            if let Err(failure) = self.pool(&volume.pool).and_then(|pool| target_for(volume.format).delete(pool, volume)) {
                error = error.with_cleanup_failure(failure);
            }
        }
        error
    }

    /// Asks every target whether it can do what it will be asked for, and promises it the space until the answer is dropped.
    fn check_targets(&self, render: &ResolvedRender, golden: &LoadedGolden, size_bytes: u64) -> Result<Vec<crate::render::admission::Promise<'_>>> {
        let spec = &render.spec;
        let data = if render.format == VolumeFormat::Qcow2Overlay { 0 } else { golden.record.allocated };
        let promise = self.admission.promise(&render.pool.name, data + OVERHEAD_ALLOCATION);
        target_for(render.format).check(&Wanted {
            overwrite: spec.overwrite,
            options: &spec.options,
            replace: render.replaces.as_ref().map(|record| &record.volume),
            ..Wanted::new(&render.pool, &spec.volume, size_bytes, promise.total())
        })?;
        let mut promises = vec![promise];
        for device in render.devices.iter().filter(|device| device.kept().is_none()) {
            let promise = self.admission.promise(&device.pool.name, OVERHEAD_ALLOCATION);
            let wanted = Wanted {
                overwrite: device.overwrite,
                options: &device.options,
                replace: device.replaced().map(|record| &record.volume),
                ..Wanted::new(&device.pool, &device.volume, content::size_of(device)?, promise.total())
            };
            target_for(device.format).check(&wanted).map_err(|error| error.under_field(&device.field))?;
            promises.push(promise);
        }
        Ok(promises)
    }

    fn root_record(
        &self,
        render_id: &str,
        resolved: &Resolved,
        render: &ResolvedRender,
        golden: &LoadedGolden,
        prepared: &Prepared,
        volume: &Volume,
    ) -> VolumeRecord {
        let (injected, spec) = (&prepared.injected, &golden.record.spec);
        let root = prepared.plan.root();
        let device = Device {
            golden_digest: Some(golden.record.digest),
            golden_key: Some(golden.record.key.hex()),
            partition_table: prepared.plan.partition_table().map(str::to_owned),
            disk_uuid: prepared.plan.disk_uuid(),
            partitions: prepared.plan.describe(),
            filesystem: Some(Filesystem {
                kind: spec.filesystem,
                uuid: injected.filesystem_uuid.to_string(),
                label: spec.label.clone(),
                offset_bytes: root.offset,
                size_bytes: root.len,
            }),
            ..plain("root", Role::Root, volume.clone())
        };
        VolumeRecord {
            mapping: Mapping {
                version: MAPPING_VERSION,
                instance: render.spec.instance.instance.clone(),
                render_id: render_id.to_owned(),
                image_id: resolved.image.record.id.clone(),
                devices: vec![device],
                nics: prepared.nics.clone(),
                platforms: resolved.platforms.iter().map(|config| config.name.to_string()).collect(),
                identity: injected.identity.clone(),
                injected: injected.report.clone(),
                created_secs: now_secs(),
            },
            golden_key: needs_golden(resolved, render, golden).then_some(golden.record.key),
            created: now_secs(),
            role: Role::Root,
            root: None,
            seed: Some(prepared.identity.seed.clone()),
            volume: volume.clone(),
        }
    }

    /// Removes a volume and its row; `false` when there was none. A root takes its swap, scratch and seed volumes with it, and its data with `with_data`;
    /// otherwise data stays, attached to nothing. What is attached to a root is not removed by itself.
    pub fn delete_volume(&self, pool: &PoolName, name: &VolumeName, with_data: bool) -> Result<bool> {
        let catalog = &self.store.catalog;
        let Some(record) = catalog.volume(pool.as_str(), name.as_str())? else {
            self.pool(pool)?;
            return Ok(false);
        };
        if let Some((root_pool, root_name)) = &record.root {
            let why = format!("it is attached to the root {root_pool}/{root_name}");
            return Err(Error::new(Kind::Conflict, Stage::Target, format!("{pool}/{name}"), why)
                .with_reason("VOLUME_ATTACHED")
                .with_hint("delete the root; delete_data takes its data volumes along"));
        }
        let mut going = catalog.volumes_of_root(pool.as_str(), name.as_str())?;
        going.retain(|attached| with_data || attached.role != Role::Data);
        going.push(record);
        // All at once: a removal that is interrupted is finished, not stopped in the middle.
        catalog.begin_volume_removal(going.iter().map(VolumeRecord::key).collect())?;
        reach("delete-marked");
        for (index, record) in going.iter().enumerate() {
            if let Err(error) = self.remove(record) {
                let cancelled = catalog.cancel_volume_removal(going[index..].iter().map(VolumeRecord::key).collect());
                return Err(match cancelled {
                    Ok(()) => error,
                    Err(failure) => error.with_cleanup_failure(failure),
                });
            }
        }
        Ok(true)
    }

    pub(super) fn remove(&self, record: &VolumeRecord) -> Result<()> {
        let (pool, name) = record.key();
        target_for(record.volume.format).delete(self.pool(&pool)?, &record.volume)?;
        reach("delete-unlinked");
        self.store.catalog.delete_volume(pool.as_str(), name.as_str())?;
        reach("delete-recorded");
        tracing::info!(%pool, volume = %name, role = record.role.name(), "volume deleted");
        Ok(())
    }
}

impl Made {
    /// Records volumes and end of the render in one transaction. When that fails the volumes are removed again: nobody would know of them.
    pub fn record(self, engine: &Engine, render: RenderRecord) -> Result<()> {
        let Made { volumes, replaced, published, leftover } = self;
        let recorded = engine.store.catalog.finish_render(volumes, replaced, leftover.clone(), render);
        recorded.map_err(|error| engine.unpublish(published.iter(), error))?;
        reach("render-recorded");
        for (pool, name) in leftover {
            // The instance is complete; what it no longer has can also be deleted by hand.
            if let Err(error) = engine.delete_volume(&pool, &name, false) {
                tracing::error!(%pool, volume = %name, error = %error.chain(), "a device that the instance no longer has could not be removed");
            }
        }
        Ok(())
    }
}

/// Computes everything about a render that can be computed without writing.
fn prepare(
    launcher: &Launcher,
    resolved: &Resolved,
    render: &ResolvedRender,
    golden: &LoadedGolden,
    size_bytes: u64,
    progress: &Progress,
) -> Result<Prepared> {
    let now = now_timestamp();
    // The same instance rendered again is the same instance.
    let seed = match render.replaces.as_ref().and_then(|record| record.seed.clone()) {
        Some(seed) => seed,
        None => new_seed()?,
    };
    let identity = inject::identity(&render.spec.instance.instance, seed)?;
    let image = open_root(golden)?;
    let mounts = devices::mounts::mounts(&render.devices, image.as_ref(), |device| device_uuid(&identity, device))?;
    let injected = inject::inject(launcher, resolved, render, golden, &identity, mounts, now)?;
    progress.check()?;
    progress.enter(Stage::Edit, 0);
    let (plan, patch) = patch_of(golden, &injected, size_bytes, progress)?;
    Ok(Prepared { nics: nics(render, &identity), identity, injected, plan, patch, now })
}

/// The cards of an instance. One whose address nobody gave gets one that is the same whenever the instance is rendered (locally administered, in QEMU's
/// range).
fn nics(render: &ResolvedRender, identity: &Identity) -> Vec<Nic> {
    let interfaces =
        render.spec.instance.network.iter().flat_map(|network| &network.interfaces).filter(|interface| interface.kind == LinkKind::Ethernet);
    let derived = |name: &str| {
        let id = identity.uuid_of(&format!("mac:{name}")).into_bytes();
        MacAddr([0x52, 0x54, 0x00, id[0], id[1], id[2]])
    };
    interfaces
        .map(|interface| Nic { name: interface.name.to_string(), mac: interface.mac.unwrap_or_else(|| derived(interface.name.as_str())) })
        .collect()
}

/// The rows of an instance's volumes, the root's first; `fresh` are the devices that are made, in their order.
fn records(render: &ResolvedRender, root: VolumeRecord, fresh: Vec<(Volume, Option<Filesystem>)>) -> Result<Vec<VolumeRecord>> {
    let (mut fresh, mut devices, mut records) = (fresh.into_iter(), Vec::new(), vec![root]);
    for (index, device) in render.devices.iter().enumerate() {
        let described = match device.kept().and_then(|kept| kept.mapping.devices.first()) {
            Some(kept) => kept.clone(),
            None => {
                let (volume, filesystem) = fresh.next().ok_or_else(|| Error::internal(Stage::Target, device.field.clone(), "was not published"))?;
                plain_device(device, volume, filesystem)
            }
        };
        devices.push(Device { boot_order: index as u32 + 1, ..described });
    }
    for (device, described) in render.devices.iter().zip(&devices) {
        records.push(device_record(device, described, &records[0]));
    }
    records[0].mapping.devices.extend(devices);
    Ok(records)
}

/// What a replaced root had, but for data, and the new one has not.
fn leftover(render: &ResolvedRender, records: &[VolumeRecord]) -> Vec<VolumeKey> {
    let now: BTreeSet<VolumeKey> = records.iter().map(VolumeRecord::key).collect();
    render.attached.iter().filter(|record| record.role != Role::Data && !now.contains(&record.key())).map(VolumeRecord::key).collect()
}

/// Whether this volume takes the place of another.
fn replaces(render: &ResolvedRender, volume: &Volume) -> bool {
    let is = |record: &VolumeRecord| (&record.volume.pool, &record.volume.name) == (&volume.pool, &volume.name);
    render.replaces.iter().any(|record| is(record)) || render.devices.iter().filter_map(|device| device.replaced()).any(is)
}

/// Whether the catalogue has a row for this volume already.
fn is_row(render: &ResolvedRender, record: &VolumeRecord) -> bool {
    match record.role {
        Role::Root => render.replaces.is_some(),
        _ => render.devices.iter().any(|device| device.existing.is_some() && device.key() == record.key()),
    }
}

/// The UUID of a device's filesystem or swap space: the same whenever the instance is rendered.
fn device_uuid(identity: &Identity, device: &ResolvedDevice) -> uuid::Uuid {
    identity.uuid_of(&format!("device:{}", device.name))
}

fn plain(name: &str, role: Role, volume: Volume) -> Device {
    Device {
        name: name.to_owned(),
        role,
        boot_order: 0,
        read_only: false,
        backing_chain: volume.backing.iter().map(|path| Backing { path: path.clone(), format: "raw".to_owned() }).collect(),
        golden_digest: None,
        golden_key: None,
        partition_table: None,
        disk_uuid: None,
        partitions: Vec::new(),
        filesystem: None,
        mount: None,
        volume,
    }
}

fn plain_device(device: &ResolvedDevice, volume: Volume, filesystem: Option<Filesystem>) -> Device {
    let mount = device.mount.as_ref().map(ToString::to_string);
    Device { filesystem, mount, read_only: device.role == Role::Seed, ..plain(device.name.as_str(), device.role, volume) }
}

/// The row of a further device; `root` is that of its instance.
fn device_record(device: &ResolvedDevice, described: &Device, root: &VolumeRecord) -> VolumeRecord {
    let kept = device.kept();
    VolumeRecord {
        volume: described.volume.clone(),
        mapping: Mapping {
            devices: vec![Device { boot_order: 0, ..described.clone() }],
            identity: GuestIdentity { ssh_fingerprints: Vec::new(), known_hosts: Vec::new(), sshfp: Vec::new(), ..root.mapping.identity.clone() },
            injected: Value::Null,
            ..root.mapping.clone()
        },
        golden_key: None,
        created: kept.map_or(root.created, |kept| kept.created),
        role: device.role,
        root: Some(root.key()),
        seed: None,
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

/// The golden's disk and where its root filesystem is on it.
fn regions(golden: &LoadedGolden) -> Result<(Region, Region)> {
    let path = &golden.disk.path;
    let file = File::open(path).map_err(|error| Error::io(Stage::Edit, path.display().to_string(), "open the golden image", error))?;
    let disk = Region { file: Arc::new(file), offset: 0, len: golden.disk.size_bytes };
    let root = disk_plan(&golden.record.spec, golden.disk.size_bytes, GoldenIds::of(&golden.record.key).disk)?.root();
    let root = Region { file: Arc::clone(&disk.file), offset: root.offset, len: root.len };
    Ok((disk, root))
}

/// Where the root filesystem of a golden is.
pub(super) fn root_region(golden: &LoadedGolden) -> Result<Region> {
    regions(golden).map(|(_, root)| root)
}

/// The root filesystem of a golden for looking things up, when that needs no kernel.
fn open_root(golden: &LoadedGolden) -> Result<Option<Image>> {
    match golden.record.spec.filesystem {
        FsKind::Ext4 => Image::open(&regions(golden)?.1).map(Some),
        FsKind::Xfs | FsKind::Btrfs => Ok(None),
    }
}

/// Whether the volume is of use only as long as its golden is: an overlay, and what is started with the kernel that lies beside the golden.
fn needs_golden(resolved: &Resolved, render: &ResolvedRender, golden: &LoadedGolden) -> bool {
    let direct = resolved.platforms.iter().any(|config| config.platform().firmware == Firmware::Direct);
    render.format == VolumeFormat::Qcow2Overlay || (direct && !golden.boot.kernels.is_empty())
}

/// The blocks of the whole disk that the edits, the new identities and the new size change.
fn patch_of(golden: &LoadedGolden, injected: &Injected, size_bytes: u64, progress: &Progress) -> Result<(DiskPlan, BlockPatch)> {
    let spec = &golden.record.spec;
    let (disk, root) = regions(golden)?;
    let plan = disk_plan(spec, size_bytes, injected.disk_identity)?;
    let mut request = injected.request.clone();
    request.size_bytes = (plan.root().len > root.len).then_some(plan.root().len);
    let patch = filesystem(spec.filesystem).edit(root, &request, progress)?;
    let mut patch = plan.patch(&disk, patch)?;
    if let Some(extent) = plan.esp().filter(|_| !injected.boot_entries.is_empty()) {
        let esp = Region { file: Arc::clone(&disk.file), offset: extent.offset, len: extent.len };
        patch.merge_at(extent.offset, bls::patch(&esp, &golden.boot.entries, &injected.boot_entries)?);
    }
    Ok((plan, patch))
}

fn now_timestamp() -> Timestamp {
    let ms = now_ms();
    Timestamp { secs: ms.div_euclid(1000), nanos: (ms.rem_euclid(1000) * 1_000_000) as u32 }
}

/// The secret that an instance's host keys are made from; lives as long as the render.
pub(super) fn new_seed() -> Result<Secret> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| Error::internal(Stage::Inject, "seed", "ask the kernel for random bytes").with_source(error))?;
    Ok(Secret::new(seed))
}
