//! Golden images: built once per key, kept, shared.
//!
//! A build streams blob → decompress → tar → facts → filesystem into one sparse file in the store's `tmp`, adds the partition table, flushes, computes the
//! digest and renames the directory to its place. Everything that decides its bytes is in [`GoldenSpec`], identities included: they are derived from the
//! key, so every host makes the same bytes (of ext4; the kernel, which writes xfs and btrfs, stamps times and generations of its own).

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    sync::{Arc, Mutex},
};

use uuid::Uuid;

use crate::{
    boot::{
        extract::{Extent, Study},
        loaders::{HostLoaders, LoaderDigests},
        prepare::DiskBoot,
    },
    config::Verify,
    disk::{DiskIds, DiskPlan, ESP_SIZE, Layout, types},
    error::{Error, Kind, Result, Stage},
    failpoint::reach,
    fs::{BuiltFs, Filesystem, FsKind},
    guest::facts::GuestFacts,
    host::info::HostInfo,
    names::Digest,
    progress::Progress,
    render::{
        Engine, LOADED_GOLDENS_MAX, blocking,
        fetch::Fetched,
        fill::{self, Filled, Inputs},
        now_secs,
        resolve::Resolved,
    },
    spec::GoldenOptions,
    store::{
        Store,
        records::{GoldenRecord, GoldenSpec},
        sync_dir,
    },
    target::{GoldenDisk, Pacer},
    tree::decompress::Compression,
    worker::Launcher,
};

/// Namespace of the identities of golden images (UUIDv5); drawn once, for good.
const GOLDEN_NAMESPACE: Uuid = uuid::uuid!("5f0c9a86-2f0a-4f5e-9b1d-6a0a52c7d3f1");

/// A golden image that is ready to be used: its row, its disk, its facts.
#[derive(Debug)]
pub struct LoadedGolden {
    /// The row.
    pub record: GoldenRecord,
    /// The disk.
    pub disk: GoldenDisk,
    /// What the tree contains.
    pub facts: GuestFacts,
    /// How the disk can be started.
    pub boot: DiskBoot,
    /// What its kernel can do, once somebody has asked.
    study: Mutex<Option<Arc<Study>>>,
}

impl LoadedGolden {
    /// What is known of its kernel, if that is enough.
    pub(super) fn study(&self, extent: Extent) -> Option<Arc<Study>> {
        self.study.lock().expect("no panic while holding a study").as_ref().filter(|study| study.covers(extent)).map(Arc::clone)
    }

    /// Keeps what was found out.
    pub(super) fn keep_study(&self, study: &Arc<Study>) {
        *self.study.lock().expect("no panic while holding a study") = Some(Arc::clone(study));
    }
}

/// The identities of a golden's own filesystem and disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GoldenIds {
    /// Filesystem UUID.
    pub filesystem: Uuid,
    /// Seed of directory hashes.
    pub hash_seed: Uuid,
    /// The disk, from which the partitions' are derived.
    pub disk: Uuid,
}

impl GoldenIds {
    /// Derived from the golden's key.
    pub fn of(key: &Digest) -> GoldenIds {
        let id = |what: &str| Uuid::new_v5(&GOLDEN_NAMESPACE, format!("{what}:{}", key.hex()).as_bytes());
        GoldenIds { filesystem: id("filesystem"), hash_seed: id("hash-seed"), disk: id("disk") }
    }
}

/// The plan of a golden's disk, or of an instance's with another size and identity.
pub fn disk_plan(spec: &GoldenSpec, size_bytes: u64, identity: Uuid) -> Result<DiskPlan> {
    DiskPlan::new(spec.layout, size_bytes, spec.boot.esp_bytes.unwrap_or(ESP_SIZE), types::root_of(&spec.arch), DiskIds::derived(identity))
}

/// The engine of a filesystem.
pub fn filesystem(kind: FsKind) -> Box<dyn Filesystem> {
    match kind {
        FsKind::Ext4 => Box::new(crate::ext4::Ext4),
        FsKind::Xfs | FsKind::Btrfs => Box::new(crate::fs::mounted::Mounted::new(kind)),
    }
}

impl Engine {
    /// Whether images with this filesystem can be made on this host: the kernel and the tools are there.
    pub fn filesystem_works(&self, kind: FsKind, host: &HostInfo) -> bool {
        match kind {
            FsKind::Ext4 => true,
            FsKind::Xfs => host.filesystems.iter().any(|name| name == "xfs") && host.tool("mkfs.xfs").is_some(),
            FsKind::Btrfs => host.filesystems.iter().any(|name| name == "btrfs") && host.tool("mkfs.btrfs").is_some(),
        }
    }

    /// The golden of a fetched image: from memory, from the store, or built now. `begin` is called before work that takes long.
    pub async fn golden(self: &Arc<Self>, fetched: Fetched, progress: &Progress, begin: impl Fn()) -> Result<(Resolved, Arc<LoadedGolden>)> {
        let key = fetched.golden.key();
        if let Some(loaded) = self.loaded_golden(&key) {
            return Ok((fetched.resolved, loaded));
        }
        let flight = self.builds.enter(&key).await;
        progress.check()?;
        let (engine, progress) = (Arc::clone(self), progress.clone());
        let stored = blocking(Stage::Golden, move || engine.load_golden(key)).await?;
        if let Some(loaded) = stored {
            return Ok((fetched.resolved, loaded));
        }
        let permit = self.build_permits.acquire().await;
        let _permit = permit.map_err(|error| Error::internal(Stage::Golden, "", "the build permits are closed").with_source(error))?;
        progress.check()?;
        self.admission.check_memory()?;
        begin();
        let engine = Arc::clone(self);
        blocking(Stage::Golden, move || {
            let need = build_size(&fetched)?;
            let promise = || engine.admission.promise_store(&engine.store.tmp(), need, "the golden image");
            let _promised = match promise() {
                Err(error) if error.kind() == Kind::NoSpace => {
                    engine.make_room(need);
                    promise()?
                }
                other => other?,
            };
            // The flight is held until the golden can be found, even if whoever awaits this goes away.
            let _flight = flight;
            let begun = std::time::Instant::now();
            engine.store.catalog.touch_blob(fetched.golden.rootfs, now_secs())?;
            engine.verify_blob(fetched.golden.rootfs)?;
            let launcher = engine.launcher.clone().with_identities(engine.keys.identities());
            let record = build(&engine.store, &fetched, &launcher, &engine.pacer, &progress)?;
            engine.mark_verified(record.key);
            tracing::info!(golden = %record.key.hex(), image = %record.image_id, used_bytes = record.built.used_bytes, ms = begun.elapsed().as_millis() as u64, "golden image built");
            crate::share::pull::forget_partial(&engine.store, &key);
            let loaded = engine.load_golden(key)?.ok_or_else(|| Error::internal(Stage::Golden, key.hex(), "was built and is not there"))?;
            Ok((fetched.resolved, loaded))
        })
        .await
    }

    /// Whether the golden that these options mean is built already, and owes no signature.
    pub async fn is_built(self: &Arc<Self>, image_id: &str, options: &GoldenOptions) -> Result<bool> {
        let (engine, image_id, options) = (Arc::clone(self), image_id.to_owned(), options.clone());
        blocking(Stage::Resolve, move || {
            let image = engine.image(&image_id)?;
            match engine.golden_spec(&image, &options)?.complete() {
                Some(_) if engine.owes_signature(&image.record)? => Ok(false),
                Some(spec) => Ok(engine.store.catalog.golden(spec.key())?.is_some() && engine.store.golden_dir(&spec.key()).exists()),
                None => Ok(false),
            }
        })
        .await
    }

    pub(super) fn loaded_golden(&self, key: &Digest) -> Option<Arc<LoadedGolden>> {
        if self.config.golden.verify == Verify::Always {
            // It is looked at again where it is loaded.
            return None;
        }
        let mut loaded = self.loaded.lock().expect("no panic while holding loaded goldens");
        let index = loaded.iter().position(|golden| golden.record.key == *key)?;
        // Most recently used last.
        let golden = loaded.remove(index);
        loaded.push(Arc::clone(&golden));
        Some(golden)
    }

    pub(crate) fn load_golden(&self, key: Digest) -> Result<Option<Arc<LoadedGolden>>> {
        if let Some(loaded) = self.loaded_golden(&key) {
            return Ok(Some(loaded));
        }
        let Some(record) = self.store.catalog.golden(key)? else { return Ok(None) };
        let dir = self.store.golden_dir(&key);
        let path = dir.join("disk.raw");
        let size = match fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                tracing::warn!(golden = %key.hex(), "the golden image is gone from the store; it is built again");
                return Ok(None);
            }
            Err(error) => return Err(Error::io(Stage::Golden, path.display().to_string(), "look at the golden image", error)),
        };
        if size != record.spec.size_bytes {
            let why = format!("has {size} bytes, its record says {}", record.spec.size_bytes);
            return Err(Error::new(Kind::Corrupt, Stage::Golden, path.display().to_string(), why).with_reason("GOLDEN_CORRUPT"));
        }
        if !self.verify_golden(&record)? {
            return Ok(None);
        }
        let facts = read_json(&dir.join("facts.json"))?;
        let boot = read_json(&dir.join("boot.json"))?;
        let golden = Arc::new(LoadedGolden {
            disk: GoldenDisk { path, size_bytes: size, digest: record.digest },
            record,
            facts,
            boot,
            study: Mutex::new(None),
        });
        let mut loaded = self.loaded.lock().expect("no panic while holding loaded goldens");
        // One that was marked for removal meanwhile is not remembered.
        if self.store.catalog.golden(key)?.is_none() {
            return Ok(None);
        }
        if loaded.len() >= LOADED_GOLDENS_MAX {
            loaded.remove(0);
        }
        loaded.push(Arc::clone(&golden));
        Ok(Some(golden))
    }
}

/// About how much a golden allocates, bytes: a tarball's size, times what compressors usually save on a root filesystem; never more than the disk.
fn build_size(fetched: &Fetched) -> Result<u64> {
    let object = || fetched.blob.display().to_string();
    let size = fs::metadata(&fetched.blob).map_err(|error| Error::io(Stage::Golden, object(), "look at the tarball", error))?.len();
    let compression = match fetched.resolved.image.compression()? {
        Some(compression) => compression,
        None => {
            let blob = File::open(&fetched.blob).map_err(|error| Error::io(Stage::Golden, object(), "open the tarball", error))?;
            // What is inside an encrypted one nobody knows yet; compressed, most often.
            if crate::trust::age::header_of(&blob, &object())?.is_some() {
                return Ok(size.saturating_mul(3).min(fetched.golden.size_bytes));
            }
            fill::detected(&blob, &object())?
        }
    };
    let factor = if compression == Compression::None { 1 } else { 3 };
    Ok(size.saturating_mul(factor).min(fetched.golden.size_bytes))
}

/// Builds a golden in the store and gives its row. On an error nothing is left.
fn build(store: &Store, fetched: &Fetched, launcher: &Launcher, pacer: &Arc<Pacer>, progress: &Progress) -> Result<GoldenRecord> {
    let spec = &fetched.golden;
    let key = spec.key();
    let tmp = store.tmp().join(format!("golden-{}-{}", key.hex(), Uuid::new_v4().simple()));
    fs::create_dir(&tmp).map_err(|error| Error::io(Stage::Golden, tmp.display().to_string(), "make the build's directory", error))?;
    reach("golden-begun");
    let declared = fetched.resolved.image.compression();
    let built = declared.and_then(|declared| build_disk(&tmp, &fetched.blob, declared, spec, launcher, pacer, progress)).and_then(|built| {
        let BuiltDisk { filesystem: built, digest, allocated } = built;
        let record = GoldenRecord {
            key,
            spec: spec.clone(),
            image_id: fetched.resolved.image.record.id.clone(),
            digest,
            allocated,
            built,
            created: now_secs(),
            last_used: now_secs(),
        };
        // The row first: see the head of `store`.
        store.catalog.put_golden(record.clone())?;
        reach("golden-recorded");
        publish(store, &tmp, &key)?;
        Ok(record)
    });
    match built {
        Ok(record) => Ok(record),
        Err(error) => Err(match fs::remove_dir_all(&tmp) {
            Err(failure) if failure.kind() != std::io::ErrorKind::NotFound => {
                error.with_cleanup_failure(Error::io(Stage::Golden, tmp.display().to_string(), "remove the unfinished build", failure))
            }
            _ => error,
        }),
    }
}

/// What [`build_disk`] made.
#[derive(Debug)]
pub struct BuiltDisk {
    /// The root filesystem.
    pub filesystem: BuiltFs,
    /// Digest over the disk's content.
    pub digest: Digest,
    /// Bytes allocated for the disk.
    pub allocated: u64,
}

/// Makes `disk.raw`, `facts.json` and `boot.json` in the directory `dir` from the tarball `blob`, all durable when this returns. `declared` is how the tarball is said to be
/// compressed; the bytes decide when nobody said. On an error unfinished files stay behind in `dir`.
pub fn build_disk(
    dir: &Path,
    blob: &Path,
    declared: Option<Compression>,
    spec: &GoldenSpec,
    launcher: &Launcher,
    pacer: &Arc<Pacer>,
    progress: &Progress,
) -> Result<BuiltDisk> {
    let path = dir.join("disk.raw");
    let failed = |doing: &'static str| {
        let object = path.display().to_string();
        move |error| Error::io(Stage::Golden, object.clone(), doing, error)
    };
    let disk = File::options().read(true).write(true).create_new(true).open(&path).map_err(failed("create the disk"))?;
    disk.set_len(spec.size_bytes).map_err(failed("set the disk's size"))?;
    let disk = Arc::new(disk);
    let (blob_name, disk_name) = (blob.display().to_string(), path.display().to_string());
    let opened = File::open(blob).and_then(|file| file.metadata().map(|metadata| (file, metadata.len())));
    let (blob, blob_len) = opened.map_err(|error| Error::io(Stage::Golden, blob_name.clone(), "open the tarball", error))?;
    progress.enter(Stage::Golden, blob_len);
    let loaders = loaders_of(spec, dir)?;
    let inputs =
        Inputs { blob, blob_name: &blob_name, declared, file_key: None, disk: Arc::clone(&disk), disk_name: &disk_name, spec, loaders: &loaders };
    let Filled { filesystem, digest, facts, boot } = launcher.fill(inputs, pacer, progress)?;
    let documents = [("facts.json", encode(&facts)?), ("boot.json", encode(&boot)?)];
    disk.set_permissions(fs::Permissions::from_mode(0o444)).map_err(failed("make the disk read-only"))?;
    for (name, bytes) in &documents {
        write_durably(&dir.join(name), bytes)?;
    }
    let allocated = disk.metadata().map_err(failed("read the allocated size"))?.blocks() * 512;
    sync_dir(dir)?;
    Ok(BuiltDisk { filesystem, digest, allocated })
}

/// The boot loaders that a golden's key was made with.
fn loaders_of(spec: &GoldenSpec, scratch: &Path) -> Result<Arc<HostLoaders>> {
    if spec.boot.loaders == LoaderDigests::default() {
        return Ok(Arc::default());
    }
    let loaders = HostLoaders::of_host(&spec.arch, scratch)?;
    if loaders.digests() != spec.boot.loaders {
        let text = "the host's GRUB is not the one that this golden image was planned with";
        return Err(Error::new(Kind::Unavailable, Stage::Golden, spec.key().hex(), text).with_reason("HOST_LOADERS_CHANGED"));
    }
    loaders.reading(spec.filesystem, scratch)
}

fn encode(document: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(document).map_err(|error| Error::internal(Stage::Golden, "golden", "encode what is known about it").with_source(error))
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let object = || path.display().to_string();
    let bytes = fs::read(path).map_err(|error| Error::io(Stage::Golden, object(), "read what is known about the golden image", error))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::new(Kind::Corrupt, Stage::Golden, object(), "is not readable").with_source(error))
}

pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |error| Error::io(Stage::Golden, path.display().to_string(), "write", error);
    let mut file = File::create_new(path).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.set_permissions(fs::Permissions::from_mode(0o400)).map_err(failed)?;
    file.sync_all().map_err(failed)
}

/// Gives a finished build its name. What is there under that name had no row before the build (the caller looked): it is what an older cloudletd left when it
/// was stopped.
pub(crate) fn publish(store: &Store, tmp: &Path, key: &Digest) -> Result<()> {
    let dir = store.golden_dir(key);
    let failed = |doing: &'static str| {
        let object = dir.display().to_string();
        move |error| Error::io(Stage::Golden, object, doing, error)
    };
    if dir.exists() {
        fs::remove_dir_all(&dir).map_err(failed("remove what an interrupted build left"))?;
    }
    fs::set_permissions(tmp, fs::Permissions::from_mode(0o711)).map_err(failed("set the directory's mode"))?;
    fs::rename(tmp, &dir).map_err(failed("move the golden image to its place"))?;
    reach("golden-named");
    sync_dir(&store.dir().join("goldens"))
}

/// The ext4 profile a golden has when nobody says.
pub fn default_profile(layout: Layout, loaders: &HostLoaders) -> crate::fs::Profile {
    match layout {
        Layout::Bare => crate::fs::Profile::Modern,
        // The disk is started by this GRUB, which said that it can read it.
        Layout::Gpt | Layout::Hybrid if loaders.reads_checksum_seed => crate::fs::Profile::Modern,
        Layout::Gpt | Layout::Hybrid => crate::fs::Profile::Grub206,
    }
}
