//! Devices of the manifest, completed and added to by the request.

use crate::{
    disk::fat,
    error::{Error, Result, Stage},
    fs::FsKind,
    guest::config::BackendKind,
    manifest::{self, Manifest},
    mapping::Role,
    names::{DeviceName, VolumeName},
    render::{
        Engine,
        devices::{Content, DEVICES_MAX, ResolvedDevice},
        golden,
        resolve::format_for,
    },
    spec::{DeviceSpec, RenderSpec},
    target::VolumeFormat,
    units::{Bytes, PATCH_BLOCK},
};

/// Characters of mount options.
const OPTIONS_LEN_MAX: usize = 256;
/// Smallest swap space, bytes: ten pages, as mkswap(8) has it.
pub const SWAP_SIZE_MIN: u64 = 10 * 4096;
/// Bytes of disk per inode when nobody says, as mke2fs.
const BYTES_PER_INODE: u32 = 16384;

/// The devices of a render, those of the manifest first. Every error names the field of request or manifest.
pub fn resolve(engine: &Engine, manifest: &Manifest, spec: &RenderSpec) -> Result<Vec<ResolvedDevice>> {
    let mut given = named(&spec.devices)?;
    let mut devices = Vec::new();
    for (index, device) in manifest.devices().iter().enumerate().filter(|(_, device)| device.role != manifest::Role::Root) {
        let at = given.iter().position(|(_, name, _)| *name == device.name);
        let (field, wanted) = match at {
            Some(at) => {
                let (field, _, wanted) = given.remove(at);
                (field, wanted.clone())
            }
            None => (format!("devices[{index}]"), DeviceSpec::default()),
        };
        devices.push(one(engine, manifest, spec, field, device.name.clone(), wanted, Some(device))?);
    }
    for (field, name, wanted) in given {
        devices.push(one(engine, manifest, spec, field, name, wanted.clone(), None)?);
    }
    if devices.len() > DEVICES_MAX {
        return Err(wrong("spec.devices", format!("the instance would have {} devices beside its root, the limit is {DEVICES_MAX}", devices.len())));
    }
    distinct(spec, &devices)?;
    one_seed(manifest, spec, &devices)?;
    Ok(devices)
}

/// A seed in the root filesystem and one on a volume would both say which instance it is, and cloud-init would take one or the other by its own rules: NoCloud
/// merges them, a ConfigDrive is not looked at where the root's seed narrows the data sources.
fn one_seed(manifest: &Manifest, spec: &RenderSpec, devices: &[ResolvedDevice]) -> Result<()> {
    let Some(device) = devices.iter().find(|device| device.role == Role::Seed) else { return Ok(()) };
    let network = spec.instance.network.as_ref();
    let by_network = network.is_some_and(|network| network.backend.or(manifest.network_backend()) == Some(BackendKind::CloudInit));
    let other = match (&spec.instance.setup.cloud_init, by_network) {
        (Some(_), _) => "instance.cloud_init",
        (None, true) => "the network back-end cloud-init",
        (None, false) => return Ok(()),
    };
    Err(wrong(&device.field, format!("{other} puts a seed for cloud-init into the root filesystem already; an instance has one seed"))
        .with_reason("SEED_TWICE"))
}

fn wrong(field: impl Into<String>, why: impl Into<String>) -> Error {
    Error::field(Stage::Resolve, field, why)
}

/// The request's devices with their names and where they stand.
fn named(devices: &[DeviceSpec]) -> Result<Vec<(String, DeviceName, &DeviceSpec)>> {
    let mut named: Vec<(String, DeviceName, &DeviceSpec)> = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        let field = format!("spec.devices[{index}]");
        let name = match (&device.name, device.role) {
            (Some(name), _) => name.clone(),
            (None, Some(role)) => {
                let before = devices[..index].iter().filter(|other| other.name.is_none() && other.role == Some(role)).count();
                let name = if before == 0 { role.name().to_owned() } else { format!("{}{}", role.name(), before + 1) };
                name.parse().map_err(|why: String| wrong(format!("{field}.name"), why))?
            }
            (None, None) => return Err(wrong(format!("{field}.role"), "is required: data, swap, scratch or seed")),
        };
        if name.as_str() == "root" || named.iter().any(|(_, other, _)| *other == name) {
            return Err(wrong(format!("{field}.name"), format!("{name} is the name of another device")));
        }
        named.push((field, name, device));
    }
    Ok(named)
}

fn one(
    engine: &Engine,
    manifest: &Manifest,
    spec: &RenderSpec,
    field: String,
    name: DeviceName,
    wanted: DeviceSpec,
    base: Option<&manifest::Device>,
) -> Result<ResolvedDevice> {
    let at = |rest: &str| format!("{field}.{rest}");
    let role = role_of(&field, &wanted, base)?;
    let pool = engine.pool(wanted.pool.as_ref().unwrap_or(&spec.pool)).map_err(|error| error.under_field(&field))?.clone();
    let volume: VolumeName = match wanted.volume.clone() {
        Some(volume) => volume,
        None => format!("{}-{name}", spec.volume).parse().map_err(|why: String| wrong(at("volume.name"), why))?,
    };
    let format = format_for(&pool, wanted.format, &at("format"))?;
    if format == VolumeFormat::Qcow2Overlay {
        return Err(
            wrong(at("format"), "a device without an image has nothing to lie over: use raw, qcow2 or block").with_reason("FORMAT_NEEDS_IMAGE")
        );
    }
    wanted.options.check(format).map_err(|error| error.under_field(&field))?;
    let persistent = wanted.persistent || base.is_some_and(|base| base.persistent);
    let mount = wanted.mount.clone().or_else(|| base.and_then(|base| base.mount.clone()));
    let filesystem =
        wanted.filesystem.or_else(|| base.and_then(|base| base.filesystem.as_ref()).map(|filesystem| filesystem.kind.unwrap_or_default()));
    let content = content_of(engine, &field, &name, role, filesystem, mount.is_some() || persistent, &wanted, base)?;
    let fitting = |seed: &crate::guest::cloud_seed::SeedSpec| {
        // Beside the caller's bytes there are a few documents of some KiB; networks have bounds.
        fat::size_for([seed.user_data.expose().len() as u64, seed.vendor_data.expose().len() as u64, 256 << 10])
    };
    let size_bytes = wanted.size_bytes.or(wanted.seed.as_ref().map(fitting)).or_else(|| base.and_then(|base| base.size).map(|size| size.0));
    check_size(engine, &at("size_bytes"), size_bytes, &content)?;
    check_mount(&field, role, &wanted, mount.as_ref(), persistent, manifest)?;
    Ok(ResolvedDevice {
        name,
        role,
        pool,
        volume,
        format,
        size_bytes,
        content,
        mount,
        mount_options: wanted.mount_options,
        persistent: if persistent { manifest.persistent().to_vec() } else { Vec::new() },
        overwrite: wanted.overwrite,
        options: wanted.options,
        existing: None,
        field,
    })
}

fn role_of(field: &str, wanted: &DeviceSpec, base: Option<&manifest::Device>) -> Result<Role> {
    let at = format!("{field}.role");
    let base = base.and_then(|base| match base.role {
        manifest::Role::Root => None,
        manifest::Role::Data => Some(Role::Data),
        manifest::Role::Swap => Some(Role::Swap),
        manifest::Role::Scratch => Some(Role::Scratch),
    });
    match (wanted.role, base) {
        (Some(Role::Root), _) => Err(wrong(at, "the root is spec.volume; this list has data, swap, scratch and seed")),
        (Some(role), Some(base)) if role != base => {
            Err(wrong(at, format!("is {}, the manifest's device of this name is {}", role.name(), base.name())))
        }
        (Some(role), _) => Ok(role),
        (None, Some(base)) => Ok(base),
        (None, None) => Err(wrong(at, "is required: the manifest has no device of this name")),
    }
}

#[expect(clippy::too_many_arguments, reason = "what a device holds is decided by all of these together, once")]
fn content_of(
    engine: &Engine,
    field: &str,
    name: &DeviceName,
    role: Role,
    filesystem: Option<FsKind>,
    mounted: bool,
    wanted: &DeviceSpec,
    base: Option<&manifest::Device>,
) -> Result<Content> {
    let base = base.and_then(|base| base.filesystem.as_ref());
    let label = wanted.label.clone().or_else(|| base.and_then(|base| base.label.clone())).unwrap_or_else(|| name.to_string());
    let check_label = |len_max: usize, of: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if label.len() > len_max || !label.chars().all(allowed) {
            return Err(wrong(format!("{field}.label"), format!("{label:?} is not a label of {of}: at most {len_max} of A-Z a-z 0-9 . _ -")));
        }
        Ok(())
    };
    if (role == Role::Seed) != wanted.seed.is_some() {
        return Err(wrong(format!("{field}.seed"), "belongs to a device of the role seed, and every seed needs one"));
    }
    if let Some(seed) = &wanted.seed {
        if filesystem.is_some() || mounted || wanted.label.is_some() {
            return Err(wrong(
                format!("{field}.filesystem"),
                "a seed is a FAT volume with the label that its readers look for; it is not mounted by fstab",
            ));
        }
        return Ok(Content::Seed(seed.clone()));
    }
    if role == Role::Swap {
        if filesystem.is_some() {
            return Err(wrong(format!("{field}.filesystem"), "swap has no filesystem"));
        }
        check_label(16, "swap space")?;
        return Ok(Content::Swap { label });
    }
    let Some(kind) = filesystem.or(mounted.then_some(engine.config.golden.filesystem)) else { return Ok(Content::Empty) };
    let len_max = match kind {
        FsKind::Ext4 => 16,
        FsKind::Xfs => 12,
        FsKind::Btrfs => 255,
    };
    check_label(len_max, kind.name())?;
    let profile = base.and_then(|base| base.profile);
    let bytes_per_inode = base.and_then(|base| base.bytes_per_inode).unwrap_or(BYTES_PER_INODE);
    Ok(Content::Filesystem { kind, label, profile, bytes_per_inode })
}

/// A device without a size is one that is there already, or a block device.
fn check_size(engine: &Engine, field: &str, size: Option<u64>, content: &Content) -> Result<()> {
    let refuse = |why: String| Err(wrong(field, why).with_reason("BAD_SIZE"));
    let Some(size) = size else { return Ok(()) };
    let (least, what) = match content {
        Content::Empty => (PATCH_BLOCK, "a device"),
        Content::Swap { .. } => (SWAP_SIZE_MIN, "swap space"),
        Content::Seed(_) => (crate::disk::fat::SIZE_MIN, "a seed"),
        Content::Filesystem { kind, .. } => (golden::filesystem(*kind).size_min(), kind.name()),
    };
    if size < least {
        return refuse(format!("{} is less than {what} needs, {}", Bytes(size), Bytes(least)));
    }
    if size > engine.config.limits.volume_max_size.0 {
        return refuse(format!("{} is more than limits.volume_max_size, {}", Bytes(size), engine.config.limits.volume_max_size));
    }
    Ok(())
}

fn check_mount(
    field: &str,
    role: Role,
    wanted: &DeviceSpec,
    mount: Option<&crate::names::GuestPath>,
    persistent: bool,
    manifest: &Manifest,
) -> Result<()> {
    let at = |rest: &str| format!("{field}.{rest}");
    if let Some(mount) = mount {
        if !matches!(role, Role::Data | Role::Scratch) {
            return Err(wrong(at("mount"), format!("a device for {} is not mounted", role.name())));
        }
        if mount.is_root() || mount.display().chars().any(|c| c.is_control() || c == char::REPLACEMENT_CHARACTER) {
            return Err(wrong(at("mount"), "is an absolute path below the root, in UTF-8, without control characters"));
        }
    }
    if persistent {
        if role != Role::Data || mount.is_some() {
            return Err(wrong(at("persistent"), "is for a data device without a mount point: it is mounted at the persistent paths"));
        }
        if manifest.persistent().is_empty() {
            return Err(wrong(at("persistent"), "the manifest has no persistent paths").with_reason("NOTHING_PERSISTENT"));
        }
    }
    if let Some(options) = &wanted.mount_options
        && (options.is_empty() || options.len() > OPTIONS_LEN_MAX || !options.chars().all(|c| c.is_ascii_graphic() && c != '\\' && c != '#'))
    {
        let why = format!("{options:?} is not a list of mount options: 1 to {OPTIONS_LEN_MAX} printable characters without blanks, \\ and #");
        return Err(wrong(at("mount_options"), why));
    }
    Ok(())
}

/// No two devices are the same volume, or mounted at the same place; at most one holds the persistent paths.
fn distinct(spec: &RenderSpec, devices: &[ResolvedDevice]) -> Result<()> {
    for (index, device) in devices.iter().enumerate() {
        let others = &devices[..index];
        let volume = |other: &ResolvedDevice| other.key() == device.key();
        if others.iter().any(volume) || (&device.pool.name, &device.volume) == (&spec.pool, &spec.volume) {
            return Err(wrong(format!("{}.volume", device.field), format!("{}/{} is another device's volume", device.pool.name, device.volume)));
        }
        if device.mount.is_some() && others.iter().any(|other| other.mount == device.mount) {
            return Err(wrong(format!("{}.mount", device.field), "is where another device is mounted"));
        }
        if !device.persistent.is_empty() && others.iter().any(|other| !other.persistent.is_empty()) {
            return Err(wrong(format!("{}.persistent", device.field), "another device holds the persistent paths already"));
        }
    }
    Ok(())
}
