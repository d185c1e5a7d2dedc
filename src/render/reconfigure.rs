//! Reconfigure: new addresses, keys or host name on the root volume of an instance that is stopped. The same injection and the same editor as for a render,
//! on the tree as it is now; nothing is mounted.
//!
//! ```text
//!  VolumeRecord ─▶ OpenVolume (claimed) ─▶ Study (ext4, facts of now) ─▶ inject ─▶ BlockPatch ─▶ FilePatch ─▶ redo log ─▶ volume ─▶ catalogue
//!                  └────────────────────────────── reads only ──────────────────────────────┘
//! ```
//!
//! What makes the instance itself stays: filesystem and disk identities, fstab, the machine-id it has, its SSH host keys (unless fresh ones are asked for), and
//! what a first injection removes as another machine's but is this machine's own by now (random seeds, stored secrets, cloud-init's state).

use std::{collections::BTreeSet, fs::File, net::IpAddr, sync::Arc};

use serde_json::Value;
use ssh_key::PublicKey;

use crate::{
    error::{Error, Kind, Result, Stage},
    fs::{
        FsKind,
        edit::{Edit, EditRequest},
        patch::BlockPatch,
    },
    guest::{
        self, applied,
        config::{HostKeys, InstanceConfig, Secret},
        facts::GuestFacts,
        report::HostKeyReport,
        scrub::Operation,
    },
    manifest::{Manifest, apply},
    mapping::{Filesystem, GuestIdentity, Mapping, Role},
    names::{Digest, GuestPath, PoolName, VolumeName},
    progress::Progress,
    render::{Engine, inject, now_ms, study::Root, volume::new_seed},
    store::records::{VolumeKey, VolumeRecord},
    target::Place,
    units::{PATCH_BLOCK, Timestamp},
    volume::{
        FilePatch, OpenVolume,
        redo::{Head, Log, Redo, Row},
    },
};

/// Public halves of host keys that are looked for in the guest.
const PUBLIC_KEYS: [&str; 3] = ["/etc/ssh/ssh_host_ed25519_key.pub", "/etc/ssh/ssh_host_ecdsa_key.pub", "/etc/ssh/ssh_host_rsa_key.pub"];

/// What a first injection removes as another machine's, and is the instance's own by now. Rules that bind names of interfaces to hardware and DHCP leases are
/// still removed: they would come between the guest and its new addresses.
const OWN_STATE: [Operation; 5] =
    [Operation::RandomSeed, Operation::Credentials, Operation::NetworkState, Operation::CloudInit, Operation::UuidClock];

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Reconfigure {
    /// Pool of the root volume.
    pub pool: PoolName,
    /// Its name there.
    pub name: VolumeName,
    /// The configuration. What it does not give stays as it is; its `ssh_host_keys` does not count.
    pub instance: InstanceConfig,
    /// Whether the instance gets new SSH host keys.
    pub fresh_host_keys: bool,
    /// Whether the manifest's templates are expanded again, from the golden image.
    pub expand_templates: bool,
    /// Whether everything is computed and nothing written.
    pub dry_run: bool,
}

/// What was done, or would be.
#[derive(Debug, Clone)]
pub struct Reconfigured {
    /// The edits.
    pub edits: Vec<Edit>,
    /// Changed 4 KiB blocks of the guest's disk.
    pub patch_blocks: u64,
    /// Bytes written to the volume.
    pub written_bytes: u64,
    /// The mapping afterwards; its `injected` is the report.
    pub mapping: Mapping,
}

/// The moments between which a crash may fall.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The redo log is durable; the volume is untouched.
    Logged,
    /// The volume is changed and flushed.
    Applied,
    /// The catalogue knows; the log is still there.
    Recorded,
}

/// Called after each step with what is written where; an error stops there, as a crash would. For tests; the daemon's does nothing.
pub type StepHook<'a> = dyn Fn(Step, &FilePatch, &File) -> Result<()> + 'a;

/// The guest as it will be.
struct Computed {
    edits: Vec<Edit>,
    patch: BlockPatch,
    report: Value,
    identity: GuestIdentity,
    /// The seed of fresh host keys.
    seed: Option<Secret>,
}

/// The name of a volume that is being changed; given back when dropped.
struct Reserved<'a> {
    engine: &'a Engine,
    key: VolumeKey,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.engine.reserved.lock().expect("no panic while holding the reservations").remove(&self.key);
    }
}

impl Engine {
    /// Changes the configuration of an instance on its root volume. Blocking.
    ///
    /// `Conflict`, with reasons: `VOLUME_BUSY` (a render has the name), `IN_USE`, `JOURNAL_DIRTY` and `EXT4_NOT_CLEAN` (the guest was not shut down),
    /// `ROOT_CHANGED` (another filesystem is where the root was), `GOLDEN_NOT_FOUND` (templates can't be expanded). `InvalidRequest`: `NOT_A_ROOT`,
    /// `INSTANCE_DIFFERS`, and what injection refuses. `Unsupported`: a root that is not ext4, an image that can't be changed in place. The volume is as it
    /// was after any of them. `RECONFIGURE_INCOMPLETE`: writing failed; the volume is in between until the next try or start of the daemon.
    pub fn reconfigure(&self, wanted: &Reconfigure, hook: &StepHook<'_>) -> Result<Reconfigured> {
        let begun = std::time::Instant::now();
        let _reserved = self.reserve_one((wanted.pool.clone(), wanted.name.clone()))?;
        let record = self.root_of(wanted)?;
        let redo = Redo::open(self.store.dir())?;
        // A change that was interrupted comes first: nothing is computed from half of it.
        let (pending, _) = redo.pending()?;
        for log in pending.into_iter().filter(|log| log.head.pool == wanted.pool.as_str() && log.head.name == wanted.name.as_str()) {
            self.finish_log(log)?;
        }
        let record = self.store.catalog.volume(wanted.pool.as_str(), wanted.name.as_str())?.unwrap_or(record);
        let open = self.open_volume(&record)?;
        let computed = self.compute(wanted, &record, &open)?;
        let patch = open.plan(&computed.patch)?;
        let mapping = Mapping { identity: computed.identity.clone(), injected: computed.report.clone(), ..record.mapping.clone() };
        let (patch_blocks, written_bytes) = (computed.patch.len() as u64, patch.bytes());
        if !wanted.dry_run && !patch.is_empty() {
            let head = self.head(&record, &open, &mapping, computed.seed)?;
            self.write(&redo, head, patch, &open, hook)?;
            tracing::info!(pool = %wanted.pool, volume = %wanted.name, blocks = patch_blocks, bytes = written_bytes, ms = begun.elapsed().as_millis() as u64, "instance reconfigured");
        }
        Ok(Reconfigured { edits: computed.edits, patch_blocks, written_bytes, mapping })
    }

    fn reserve_one(&self, key: VolumeKey) -> Result<Reserved<'_>> {
        let mut reserved = self.reserved.lock().expect("no panic while holding the reservations");
        if !reserved.insert(key.clone()) {
            return Err(Error::new(Kind::Conflict, Stage::Resolve, format!("{}/{}", key.0, key.1), "a render or another change has this volume")
                .with_reason("VOLUME_BUSY"));
        }
        Ok(Reserved { engine: self, key })
    }

    /// The row, when it is one whose instance can be reconfigured.
    fn root_of(&self, wanted: &Reconfigure) -> Result<VolumeRecord> {
        let object = format!("{}/{}", wanted.pool, wanted.name);
        self.pool(&wanted.pool)?;
        let record = self.store.catalog.volume(wanted.pool.as_str(), wanted.name.as_str())?;
        let record = record
            .ok_or_else(|| Error::new(Kind::NotFound, Stage::Resolve, object.as_str(), "there is no such volume").with_reason("VOLUME_NOT_FOUND"))?;
        if record.role != Role::Root {
            let why = format!("is a {} volume; an instance is reconfigured on its root", record.role.name());
            return Err(Error::field(Stage::Resolve, "volume", why).with_reason("NOT_A_ROOT"));
        }
        if record.mapping.instance != wanted.instance.instance {
            let why = format!("the volume is instance {}'s; identities are derived from the name, which stays", record.mapping.instance);
            return Err(Error::field(Stage::Resolve, "instance.name", why).with_reason("INSTANCE_DIFFERS"));
        }
        match filesystem_of(&record) {
            Some(filesystem) if filesystem.kind == FsKind::Ext4 && filesystem.offset_bytes.is_multiple_of(PATCH_BLOCK) => Ok(record),
            other => {
                let kind = other.map_or("no known", |filesystem| filesystem.kind.name());
                let why = format!("has {kind} root filesystem; only ext4 is changed in place");
                Err(Error::new(Kind::Unsupported, Stage::Resolve, object, why)
                    .with_reason("FILESYSTEM_NOT_EDITABLE")
                    .with_hint("render the instance again with replace"))
            }
        }
    }

    fn open_volume(&self, record: &VolumeRecord) -> Result<OpenVolume> {
        let pool = self.pool(&record.volume.pool)?;
        // The goldens are the store's; what an operator has put between lies beside the volume.
        let mut known = vec![self.store.dir().join("goldens")];
        if let Place::Directory { path } = &pool.place {
            known.push(path.clone());
        }
        OpenVolume::open(pool, &record.volume, &known)
    }

    fn compute(&self, wanted: &Reconfigure, record: &VolumeRecord, open: &OpenVolume) -> Result<Computed> {
        let progress = Progress::default();
        let image = self.image(&record.mapping.image_id)?;
        let manifest = &image.manifest;
        let root = root_of_disk(record, open)?;
        let mut watched: Vec<GuestPath> = manifest.templates().to_vec();
        watched.extend(PUBLIC_KEYS.iter().chain([&applied::PATH]).filter_map(|path| GuestPath::new(path).ok()));
        // What a guest has written is read by a process that can do nothing else.
        let study = self.launcher.study(open.reader(), &root, &watched, &progress)?;
        let facts = study.facts();

        let seed = match (wanted.fresh_host_keys, &record.seed) {
            (false, Some(seed)) => seed.clone(),
            _ => new_seed()?,
        };
        let identity = inject::identity(&wanted.instance.instance, seed.clone())?;
        let mut config = config_of(wanted, record, facts);
        let mut edits = Vec::new();
        if wanted.expand_templates {
            config.args = self.launcher.resolve_args(manifest, &config.args).map_err(|error| error.under_field("instance"))?;
            edits = self.template_edits(record, manifest, &config)?;
        } else if config.args.is_empty() {
            config.args = recorded_args(facts);
        }
        if let Some(network) = &mut config.network {
            network.backend = network.backend.or(manifest.network_backend());
        }
        let claimed: BTreeSet<String> = manifest.templates().iter().map(ToString::to_string).collect();
        let secret_args = config.args.keys().filter(|name| manifest.is_secret_arg(name)).cloned().collect();
        let now = now();
        let inputs =
            guest::Inputs { facts, config: &config, identity: &identity, claimed: &claimed, secret_args: &secret_args, fstab_root: None, now };
        let mut injection = guest::inject(&inputs)?;
        if !wanted.expand_templates && !claimed.is_empty() {
            let paths: Vec<&str> = claimed.iter().map(String::as_str).collect();
            injection.report.notes.push(format!("what the manifest's templates wrote is left as it is: {}", paths.join(", ")));
        }
        edits.extend(injection.edits);
        let identity = identity_of(record, &config, &injection.report, facts);
        let report =
            serde_json::to_value(&injection.report).map_err(|error| Error::internal(Stage::Inject, "report", "encode").with_source(error))?;
        let request = EditRequest { edits, uuid: None, label: None, size_bytes: None, now };
        let mut patch = BlockPatch::new(open.size_bytes());
        patch.merge_at(root.offset, study.edit(&request, &progress)?);
        Ok(Computed { edits: request.edits, patch, report, identity, seed: wanted.fresh_host_keys.then_some(seed) })
    }

    /// The templates' edits, from the golden's own files: what is in the guest was expanded already.
    fn template_edits(&self, record: &VolumeRecord, manifest: &Manifest, config: &InstanceConfig) -> Result<Vec<Edit>> {
        if manifest.templates().is_empty() {
            return Ok(Vec::new());
        }
        let key: Option<Digest> = record.mapping.devices.first().and_then(|root| format!("sha256:{}", root.golden_key.as_deref()?).parse().ok());
        let golden = key.map(|key| self.load_golden(key)).transpose()?.flatten().ok_or_else(|| {
            Error::new(Kind::Conflict, Stage::Inject, record.volume.name.as_str(), "the golden image that has the manifest's templates is gone")
                .with_reason("GOLDEN_NOT_FOUND")
                .with_hint("prerender the image, or reconfigure without expand_templates")
        })?;
        let info = apply::ImageInfo { id: record.mapping.image_id.clone(), name: manifest.name().to_owned() };
        let context = apply::context(config, &config.args, &info);
        apply::template_edits(manifest, &golden.facts, context, |sources, context, secret_args| self.launcher.expand(sources, context, secret_args))
    }

    /// What the log says about the change: the volume, and every row of its instance.
    fn head(&self, record: &VolumeRecord, open: &OpenVolume, mapping: &Mapping, seed: Option<Secret>) -> Result<Head> {
        let (pool, name) = record.key();
        let mut rows =
            vec![Row { pool: pool.to_string(), name: name.to_string(), mapping: mapping.clone(), seed: seed.map(|seed| seed.expose().to_vec()) }];
        for attached in self.store.catalog.volumes_of_root(pool.as_str(), name.as_str())? {
            let identity = GuestIdentity { ssh_fingerprints: Vec::new(), known_hosts: Vec::new(), sshfp: Vec::new(), ..mapping.identity.clone() };
            let (pool, name) = attached.key();
            rows.push(Row { pool: pool.to_string(), name: name.to_string(), mapping: Mapping { identity, ..attached.mapping }, seed: None });
        }
        Ok(Head { pool: pool.to_string(), name: name.to_string(), render_id: record.mapping.render_id.clone(), inode: open.inode(), rows })
    }

    fn write(&self, redo: &Redo, head: Head, patch: FilePatch, open: &OpenVolume, hook: &StepHook<'_>) -> Result<()> {
        let object = || open.path().display().to_string();
        patch.reserve(open.file()).map_err(|error| Error::io(Stage::Target, object(), "make room for the change", error))?;
        let log = redo.write(head, patch)?;
        hook(Step::Logged, &log.patch, open.file())?;
        log.patch.apply(open.file()).map_err(|error| {
            Error::io(Stage::Target, object(), "write the change", error)
                .with_reason("RECONFIGURE_INCOMPLETE")
                .with_hint("do not start the instance: the change is finished by the next attempt to reconfigure it, or when the daemon starts")
        })?;
        hook(Step::Applied, &log.patch, open.file())?;
        self.store.catalog.reconfigure_volumes(log.head.rows.clone())?;
        hook(Step::Recorded, &log.patch, open.file())?;
        log.remove()
    }

    /// Finishes what a stopped daemon was changing. What can't be finished now stays, is reported, and is tried again.
    pub(super) fn finish_reconfigurations(&self) -> Result<()> {
        let (logs, errors) = Redo::open(self.store.dir())?.pending()?;
        for error in errors {
            tracing::error!(error = %error.chain(), "a redo log can't be read");
        }
        for log in logs {
            let volume = format!("{}/{}", log.head.pool, log.head.name);
            if let Err(error) = self.finish_log(log) {
                tracing::error!(%volume, error = %error.chain(), "the interrupted reconfiguration of a volume could not be finished");
            }
        }
        Ok(())
    }

    fn finish_log(&self, log: Log) -> Result<()> {
        let volume = format!("{}/{}", log.head.pool, log.head.name);
        let record = self.store.catalog.volume(&log.head.pool, &log.head.name)?;
        let Some(record) = record.filter(|record| record.mapping.render_id == log.head.render_id) else {
            tracing::warn!(%volume, "a reconfiguration was interrupted whose volume is gone; it is forgotten");
            return log.remove();
        };
        let pool = self.pool(&record.volume.pool)?;
        let open = OpenVolume::claim(pool, &record.volume)?;
        if open.inode() != log.head.inode {
            let why = "is another file than the one whose reconfiguration was interrupted";
            return Err(Error::new(Kind::Conflict, Stage::Target, open.path().display().to_string(), why).with_reason("RECONFIGURE_OTHER_FILE"));
        }
        let failed = |error| Error::io(Stage::Target, open.path().display().to_string(), "write the interrupted change again", error);
        log.patch.apply(open.file()).map_err(failed)?;
        self.store.catalog.reconfigure_volumes(log.head.rows.clone())?;
        tracing::warn!(%volume, bytes = log.patch.bytes(), "an interrupted reconfiguration was finished");
        log.remove()
    }
}

fn filesystem_of(record: &VolumeRecord) -> Option<&Filesystem> {
    record.mapping.devices.first().and_then(|root| root.filesystem.as_ref())
}

/// Where the root filesystem is, and which.
fn root_of_disk(record: &VolumeRecord, open: &OpenVolume) -> Result<Root> {
    let object = open.path().display().to_string();
    let made = filesystem_of(record).ok_or_else(|| Error::internal(Stage::Edit, object.as_str(), "has no filesystem"))?;
    // A guest may have grown partition and filesystem: what the superblock says counts, as far as the disk goes.
    let len = open.size_bytes().saturating_sub(made.offset_bytes) / PATCH_BLOCK * PATCH_BLOCK;
    Ok(Root { object, offset: made.offset_bytes, len, uuid: made.uuid.clone(), disk_len: open.size_bytes() })
}

/// The configuration with what stays filled in.
fn config_of(wanted: &Reconfigure, record: &VolumeRecord, facts: &GuestFacts) -> InstanceConfig {
    let old = &record.mapping.identity;
    let is_id = |id: &str| id.len() == 32 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) && id.bytes().any(|byte| byte != b'0');
    let has = facts.text("/etc/machine-id").map(str::trim).filter(|id| is_id(id)).unwrap_or(&old.machine_id);
    let mut setup = wanted.instance.setup.clone();
    let skipped: Vec<Operation> = OWN_STATE.into_iter().filter(|operation| !setup.scrub_skip.contains(operation)).collect();
    setup.scrub_skip.extend(skipped);
    InstanceConfig {
        setup,
        hostname: wanted.instance.hostname.clone().or_else(|| old.hostname.as_deref().and_then(|name| name.parse().ok())),
        machine_id: wanted.instance.machine_id.clone().or_else(|| Some(has.to_owned())),
        ssh_host_keys: if wanted.fresh_host_keys { HostKeys::Fresh } else { HostKeys::Keep },
        ..wanted.instance.clone()
    }
}

/// The args that the guest was told, secrets redacted as they are there.
fn recorded_args(facts: &GuestFacts) -> serde_json::Map<String, Value> {
    let document: Option<Value> = facts.text(applied::PATH).and_then(|text| serde_json::from_str(text).ok());
    document.and_then(|mut document| document.get_mut("args").map(Value::take)).and_then(|args| args.as_object().cloned()).unwrap_or_default()
}

/// Who the guest is afterwards. Host keys are those in the guest, whoever made them.
fn identity_of(record: &VolumeRecord, config: &InstanceConfig, report: &guest::report::Report, facts: &GuestFacts) -> GuestIdentity {
    let old = &record.mapping.identity;
    let hostname = report.hostname.clone().or_else(|| old.hostname.clone());
    let mut keys = report.ssh_host_keys.clone();
    if keys.is_empty() {
        let names = known_names(old, config, hostname.as_deref());
        let public = PUBLIC_KEYS.iter().filter_map(|path| PublicKey::from_openssh(facts.text(path)?).ok());
        keys.extend(public.filter_map(|key| HostKeyReport::of(&key, &names, hostname.as_deref()).ok()));
    }
    GuestIdentity {
        instance_uuid: old.instance_uuid.clone(),
        machine_id: report.machine_id.clone(),
        ssh_fingerprints: keys.iter().map(|key| format!("{} {}", key.algorithm, key.fingerprint)).collect(),
        known_hosts: keys.iter().map(|key| key.known_hosts.clone()).collect(),
        sshfp: keys.iter().filter_map(|key| key.sshfp.clone()).collect(),
        hostname,
    }
}

/// The host part of known_hosts lines: the names, and the new addresses, or those there were when the network is left alone.
fn known_names(old: &GuestIdentity, config: &InstanceConfig, hostname: Option<&str>) -> String {
    let mut names: Vec<String> = hostname.into_iter().map(str::to_owned).collect();
    names.extend(hostname.and_then(|name| Some(name.split_once('.')?.0.to_owned())));
    match &config.network {
        Some(network) => names.extend(network.interfaces.iter().flat_map(|interface| &interface.addresses).map(|cidr| cidr.address.to_string())),
        None => {
            let before = old.known_hosts.first().and_then(|line| line.split(' ').next()).unwrap_or_default();
            names.extend(before.split(',').filter(|name| name.parse::<IpAddr>().is_ok()).map(str::to_owned));
        }
    }
    if names.is_empty() { config.instance.to_string() } else { names.join(",") }
}

fn now() -> Timestamp {
    let ms = now_ms();
    Timestamp { secs: ms.div_euclid(1000), nanos: (ms.rem_euclid(1000) * 1_000_000) as u32 }
}

impl Engine {
    /// [`Engine::reconfigure`] off the runtime's threads.
    pub async fn reconfigure_volume(self: &Arc<Self>, wanted: Reconfigure) -> Result<Reconfigured> {
        let engine = Arc::clone(self);
        crate::render::blocking(Stage::Target, move || engine.reconfigure(&wanted, &|_, _, _| Ok(()))).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn known_hosts_lines_have_the_new_names_and_keep_addresses_that_stay() {
        let old = GuestIdentity {
            instance_uuid: String::new(),
            machine_id: String::new(),
            hostname: Some("a.example.com".into()),
            ssh_fingerprints: Vec::new(),
            sshfp: Vec::new(),
            known_hosts: vec!["a.example.com,a,192.0.2.1,2001:db8::1 ssh-ed25519 AAAA".into()],
        };
        let config = crate::guest::decode::from_json(b"{}", Some(&"web1".parse().expect("name"))).expect("valid").config;
        assert_eq!(known_names(&old, &config, Some("b.example.com")), "b.example.com,b,192.0.2.1,2001:db8::1");
        assert_eq!(known_names(&old, &config, None), "192.0.2.1,2001:db8::1");
    }
}
