//! Inject: facts + instance configuration → edits and a report. Pure but for the process that expands templates; the edits of the manifest's templates and those of `guest` in one list.

use std::collections::BTreeSet;

use serde_json::Value;
use uuid::Uuid;

use crate::{
    boot::{self, bls::EntryText, edits::BootEdits, esp::EfiProgram, platform::Platform},
    config::PlatformConfig,
    disk::DiskIds,
    error::{Error, Result, Stage},
    fs::{
        FsKind, Profile,
        edit::{Edit, EditRequest},
    },
    guest::{
        self,
        config::{InstanceConfig, Secret},
        facts::NodeKind,
        fstab::{MountLine, Mounts, RootMount},
        identity::Identity,
        report::Change,
        selinux::Labeller,
    },
    manifest::{apply, lxd},
    mapping::GuestIdentity,
    names::{GuestPath, InstanceName},
    render::{
        golden::{GoldenIds, LoadedGolden},
        resolve::{Resolved, ResolvedRender},
    },
    store::records::GoldenSpec,
    units::Timestamp,
    worker::Launcher,
};

/// Namespace of the identities of instances (UUIDv5); drawn once, for good.
const INSTANCE_NAMESPACE: Uuid = uuid::uuid!("d1a0c1ce-8a53-4c5c-9d55-0d3c1c0f9b1e");

/// What one instance changes on its golden.
pub struct Injected {
    /// The request to the filesystem's editor, but for the size.
    pub request: EditRequest,
    /// What the report says: every path, redacted.
    pub report: Value,
    /// Identities given to the guest.
    pub identity: GuestIdentity,
    /// UUID of the root filesystem on the volume.
    pub filesystem_uuid: Uuid,
    /// From which the disk's GUIDs are derived.
    pub disk_identity: Uuid,
    /// Texts of systemd-boot's entries on the disk.
    pub boot_entries: Vec<EntryText>,
}

/// Who the instance is. `seed` is secret; it is drawn once per instance.
pub fn identity(instance: &InstanceName, seed: Secret) -> Result<Identity> {
    Identity::derive(&INSTANCE_NAMESPACE, instance, seed)
}

/// Computes the edits of a render; `now` is stamped on what is touched. Templates are expanded by `launcher`.
pub fn inject(
    launcher: &Launcher,
    resolved: &Resolved,
    render: &ResolvedRender,
    golden: &LoadedGolden,
    identity: &Identity,
    mut mounts: Mounts,
    now: Timestamp,
) -> Result<Injected> {
    let config = &render.spec.instance;
    let filesystem_uuid = root_uuid(&golden.record.spec, identity);
    let image = apply::ImageInfo { id: resolved.image.record.id.clone(), name: resolved.image.manifest.name().to_owned() };
    let context = apply::context(config, &render.args, &image);
    let mut edits = apply::template_edits(&resolved.image.manifest, &golden.facts, context, |sources, context, secret_args| {
        launcher.expand(sources, context, secret_args)
    })?;
    let claimed: BTreeSet<String> = resolved.image.manifest.templates().iter().map(ToString::to_string).collect();
    mount_esp(golden, identity.disk_guid, &mut mounts);
    let root = RootMount { source: format!("UUID={filesystem_uuid}"), fs: golden.record.spec.filesystem, mounts };
    let secret_args = render.args.keys().filter(|name| resolved.image.manifest.is_secret_arg(name)).cloned().collect();
    // What is recorded in the guest are the args as they were used, defaults included.
    let mut config = InstanceConfig { args: render.args.clone(), ..config.clone() };
    if let Some(network) = &mut config.network {
        network.backend = network.backend.or(resolved.image.manifest.network_backend());
    }
    let inputs =
        guest::Inputs { facts: &golden.facts, config: &config, identity, claimed: &claimed, secret_args: &secret_args, fstab_root: Some(&root), now };
    let injection = guest::inject(&inputs)?;
    Labeller::of(&golden.facts, config.setup.selinux).0.label(&mut edits);
    let mut templates = changes(&edits)?;
    edits.extend(injection.edits);
    let lxd = lxd_edits(launcher, resolved, golden, &config, &edits)?;
    templates.extend(changes(&lxd.edits)?);
    edits.extend(lxd.edits);
    let boot = boot_edits(resolved, golden, filesystem_uuid, identity.disk_guid, &edits)?;
    edits.extend(boot.edits);
    let mut report =
        serde_json::to_value(&injection.report).map_err(|error| Error::internal(Stage::Inject, "report", "encode").with_source(error))?;
    if let Some(notes) = report["notes"].as_array_mut() {
        notes.extend(lxd.notes.into_iter().map(Value::String));
    }
    if !templates.is_empty() {
        report["templates"] = Value::Array(templates);
    }
    if let Some(boot) = boot.report {
        report["boot"] = serde_json::to_value(boot).map_err(|error| Error::internal(Stage::Inject, "report", "encode").with_source(error))?;
    }
    let guest_identity = GuestIdentity {
        instance_uuid: Uuid::new_v5(&INSTANCE_NAMESPACE, config.instance.as_str().as_bytes()).to_string(),
        machine_id: injection.report.machine_id.clone(),
        hostname: injection.report.hostname.clone(),
        ssh_fingerprints: injection.report.ssh_host_keys.iter().map(|key| format!("{} {}", key.algorithm, key.fingerprint)).collect(),
        known_hosts: injection.report.ssh_host_keys.iter().map(|key| key.known_hosts.clone()).collect(),
        sshfp: injection.report.ssh_host_keys.iter().filter_map(|key| key.sshfp.clone()).collect(),
    };
    let request = EditRequest {
        edits,
        uuid: (filesystem_uuid != GoldenIds::of(&golden.record.key).filesystem).then(|| filesystem_uuid.into_bytes()),
        label: None,
        size_bytes: None,
        now,
    };
    Ok(Injected { request, report, identity: guest_identity, filesystem_uuid, disk_identity: identity.disk_guid, boot_entries: boot.boot_entries })
}

/// Where the guest's own tools find the EFI system partition: in an image that has a place for it, or boot loaders of its own to update there. By the
/// partition's GUID, which is this instance's; the volume's serial number is the golden's. A guest whose kernel has no vfat starts without it.
fn mount_esp(golden: &LoadedGolden, disk: Uuid, mounts: &mut Mounts) {
    const PLACE: &str = "/boot/efi";
    let Some(program) = &golden.boot.efi else { return };
    if mounts.lines.iter().any(|line| line.target == PLACE) {
        return;
    }
    match golden.facts.resolve(PLACE) {
        Some((path, node)) if path == PLACE && node.kind == NodeKind::Directory => {}
        None if matches!(program, EfiProgram::ImageShim { .. } | EfiProgram::ImageBootEntries { .. }) => match GuestPath::new(PLACE) {
            Ok(path) => mounts.directories.push(path),
            Err(_) => return,
        },
        Some(_) | None => return,
    }
    mounts.lines.push(MountLine {
        source: format!("PARTUUID={}", DiskIds::derived(disk).esp),
        target: PLACE.to_owned(),
        kind: "vfat".to_owned(),
        options: "umask=0077,nofail".to_owned(),
        pass: 0,
    });
}

fn changes(edits: &[Edit]) -> Result<Vec<Value>> {
    let changes = edits.iter().map(Change::of).map(serde_json::to_value).collect::<std::result::Result<Vec<Value>, _>>();
    changes.map_err(|error| Error::internal(Stage::Inject, "report", "encode").with_source(error))
}

/// What the image's own templates write, in LXD's words, but for what is written already.
fn lxd_edits(launcher: &Launcher, resolved: &Resolved, golden: &LoadedGolden, config: &InstanceConfig, others: &[Edit]) -> Result<lxd::Applied> {
    let manifest = &resolved.image.manifest;
    let has_secrets = config.args.keys().any(|name| manifest.is_secret_arg(name));
    let instance = lxd::Instance { config, arch: &golden.record.spec.arch, has_secrets };
    let mut applied = lxd::apply(manifest.lxd_templates(), &golden.facts, &instance, others, |requests| launcher.expand_lxd(requests))?;
    Labeller::of(&golden.facts, config.setup.selinux).0.label(&mut applied.edits);
    Ok(applied)
}

/// What makes the disk of this instance boot. What something else writes already is left to it.
fn boot_edits(resolved: &Resolved, golden: &LoadedGolden, root_uuid: Uuid, disk: Uuid, others: &[Edit]) -> Result<BootEdits> {
    let spec = &golden.record.spec;
    let platforms: Vec<Platform> = resolved.platforms.iter().map(PlatformConfig::platform).collect();
    let inputs = boot::edits::Inputs {
        facts: &golden.facts,
        spec: resolved.image.manifest.boot(),
        layout: spec.layout,
        root_uuid,
        root_partition: spec.layout.is_partitioned().then(|| DiskIds::derived(disk).root),
        arch: &spec.arch,
        boot_entries: match &golden.boot.efi {
            Some(EfiProgram::ImageBootEntries { token }) => Some((token, &golden.boot.entries)),
            _ => None,
        },
        platforms: &platforms,
    };
    boot::edits::edits(&inputs, &|path| others.iter().any(|edit| edit.path.display() == path))
}

/// Every instance has a filesystem UUID of its own, except where giving it one means rewriting all metadata (ext4 checksums without a stored seed).
fn root_uuid(spec: &GoldenSpec, identity: &Identity) -> Uuid {
    match (spec.filesystem, spec.profile) {
        (FsKind::Ext4, Profile::Grub206) => GoldenIds::of(&spec.key()).filesystem,
        _ => identity.root_fs_uuid,
    }
}
