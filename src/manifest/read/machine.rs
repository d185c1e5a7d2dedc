//! The fields about disk, filesystem and boot.

use serde_json::Value;

use super::fields::{DISK_UNIT, Fields};
use crate::{
    disk::{ESP_SIZE, ESP_SIZE_MAX, Layout},
    fs::{FsKind, Profile},
    manifest::{BootSpec, Bus, Device, DiskSpec, FilesystemSpec, Role, json::element},
    names::{DeviceName, GuestPath},
    units::Bytes,
};

/// Devices of an image.
const DEVICES_MAX: usize = 16;
/// Bytes of a kernel command line, COMMAND_LINE_SIZE of x86 (arch/x86/include/asm/setup.h).
const CMDLINE_LEN_MAX: usize = 2048;

/// `filesystem` of the image or of a device.
pub fn filesystem(problems: &mut Fields, given: Option<&Value>, field: &str) -> FilesystemSpec {
    let known = ["type", "label", "bytes_per_inode", "profile"];
    let Some(given) = given.and_then(|given| problems.object(given, field, &known)) else { return FilesystemSpec::default() };
    let kinds = [FsKind::Ext4, FsKind::Xfs, FsKind::Btrfs];
    let spec = FilesystemSpec {
        kind: problems.choice(given, field, "type", &kinds.map(|kind| (kind.name(), kind))),
        label: problems.word(given, field, "label", 255),
        // The bounds of mke2fs -i.
        bytes_per_inode: problems.number(given, field, "bytes_per_inode", 1024..=64 << 20),
        profile: problems.choice(given, field, "profile", &[("modern", Profile::Modern), ("grub206", Profile::Grub206), ("compat", Profile::Compat)]),
    };
    let kind = spec.kind.unwrap_or_default();
    let label_max = match kind {
        FsKind::Ext4 => 16,
        FsKind::Xfs => 12,
        FsKind::Btrfs => 255,
    };
    if let Some(label) = spec.label.as_ref().filter(|label| label.len() > label_max) {
        problems.add(format!("{field}.label"), format!("{label:?} has {} bytes, a label of {} has at most {label_max}", label.len(), kind.name()));
    }
    for (name, given) in [("bytes_per_inode", spec.bytes_per_inode.is_some()), ("profile", spec.profile.is_some())] {
        if given && kind != FsKind::Ext4 {
            problems.add(format!("{field}.{name}"), format!("only ext4 has it, not {}", kind.name()));
        }
    }
    spec
}

/// `disk`.
pub fn disk(problems: &mut Fields, given: Option<&Value>) -> DiskSpec {
    let field = "disk";
    let Some(given) = given.and_then(|given| problems.object(given, field, &["layout", "size", "esp_size", "bus"])) else {
        return DiskSpec::default();
    };
    let buses = [Bus::Virtio, Bus::Scsi, Bus::Sata, Bus::Ide, Bus::Nvme, Bus::Xen];
    let spec = DiskSpec {
        layout: problems.choice(given, field, "layout", &[("bare", Layout::Bare), ("gpt", Layout::Gpt), ("hybrid", Layout::Hybrid)]),
        size: problems.size(given, field, "size", 8 * DISK_UNIT, DISK_UNIT),
        esp_size: problems.size(given, field, "esp_size", ESP_SIZE, DISK_UNIT),
        bus: problems.choice(given, field, "bus", &buses.map(|bus| (bus.name(), bus))),
    };
    if let Some(size) = spec.esp_size.filter(|size| size.0 > ESP_SIZE_MAX) {
        problems.add("disk.esp_size", format!("{size} is more than {}", Bytes(ESP_SIZE_MAX)));
    }
    if spec.esp_size.is_some() && spec.layout == Some(Layout::Bare) {
        problems.add("disk.esp_size", "a bare filesystem has no EFI system partition");
    }
    spec
}

/// `boot`.
pub fn boot(problems: &mut Fields, given: Option<&Value>) -> BootSpec {
    let field = "boot";
    let Some(given) = given.and_then(|given| problems.object(given, field, &["kernel", "initrd", "cmdline"])) else { return BootSpec::default() };
    let below_root =
        |text: &str| GuestPath::new(text).and_then(|path| if path.is_root() { Err("must be a path below the root".into()) } else { Ok(path) });
    let spec = BootSpec {
        kernel: problems.checked(given, field, "kernel", below_root),
        initrd: problems.checked(given, field, "initrd", below_root),
        cmdline: problems.line(given, field, "cmdline", CMDLINE_LEN_MAX),
    };
    if given.contains_key("initrd") && !given.contains_key("kernel") {
        problems.add("boot.initrd", "goes with boot.kernel, which is missing");
    }
    spec
}

/// `devices`.
pub fn devices(problems: &mut Fields, given: Option<&Value>, root: &FilesystemSpec, disk: &DiskSpec) -> Vec<Device> {
    let Some(given) = given else { return Vec::new() };
    let list = problems.list(given, "devices");
    if list.len() > DEVICES_MAX {
        problems.add("devices", format!("has {} devices, the limit is {DEVICES_MAX}", list.len()));
        return Vec::new();
    }
    let mut devices: Vec<Device> = Vec::new();
    for (index, given) in list.iter().enumerate() {
        let field = element("devices", index);
        if let Some(device) = device(problems, given, &field, &devices) {
            if device.role == Role::Root && devices.iter().any(|device| device.role == Role::Root) {
                problems.add(format!("{field}.role"), "there is a root already");
            }
            if device.role == Role::Root && device.filesystem.is_some() && *root != FilesystemSpec::default() {
                problems.add(format!("{field}.filesystem"), "the root's filesystem is described by \"filesystem\" already");
            }
            if device.role == Role::Root && device.size.is_some() && disk.size.is_some() {
                problems.add(format!("{field}.size"), "the root's size is given by \"disk.size\" already");
            }
            if let Some(mount) = device.mount.as_ref().filter(|mount| devices.iter().any(|other| other.mount.as_ref() == Some(mount))) {
                problems.add(format!("{field}.mount"), format!("{mount} is where another device is mounted"));
            }
            if devices.iter().any(|other| other.name == device.name) {
                problems.add(format!("{field}.name"), format!("{} is the name of another device", device.name));
            }
            if device.persistent && devices.iter().any(|other| other.persistent) {
                problems.add(format!("{field}.persistent"), "another device holds the persistent paths already");
            }
            devices.push(device);
        }
    }
    devices
}

/// The name of a device that was not given one: its role, counted from the second of that role on.
fn default_name(role: Role, before: &[Device]) -> Option<DeviceName> {
    let count = before.iter().filter(|other| other.role == role).count();
    if count == 0 { role.name().parse().ok() } else { format!("{}{}", role.name(), count + 1).parse().ok() }
}

fn device(problems: &mut Fields, given: &Value, field: &str, before: &[Device]) -> Option<Device> {
    let given = problems.object(given, field, &["name", "role", "size", "filesystem", "mount", "persistent"])?;
    let roles = [Role::Root, Role::Data, Role::Swap, Role::Scratch];
    if !given.contains_key("role") {
        problems.add(format!("{field}.role"), "is required: one of root, data, swap, scratch");
    }
    let role = problems.choice(given, field, "role", &roles.map(|role| (role.name(), role)))?;
    let device = Device {
        name: problems.checked(given, field, "name", str::parse::<DeviceName>).or_else(|| default_name(role, before))?,
        role,
        size: problems.size(given, field, "size", DISK_UNIT, DISK_UNIT),
        filesystem: given.get("filesystem").map(|given| filesystem(problems, Some(given), &format!("{field}.filesystem"))),
        mount: problems.checked(given, field, "mount", str::parse::<GuestPath>),
        persistent: problems.flag(given, field, "persistent"),
    };
    let role = device.role.name();
    if device.role != Role::Root && !given.contains_key("size") {
        problems.add(format!("{field}.size"), format!("is required for a device of the role {role}"));
    }
    match (&device.mount, device.role) {
        (Some(mount), Role::Root) if !mount.is_root() => problems.add(format!("{field}.mount"), format!("the root is mounted at /, not at {mount}")),
        (Some(mount), Role::Data | Role::Scratch) if mount.is_root() => problems.add(format!("{field}.mount"), "/ is where the root is mounted"),
        (Some(_), Role::Swap) => problems.add(format!("{field}.mount"), "swap is not mounted"),
        (Some(_), Role::Data | Role::Scratch) if device.filesystem.is_none() => {
            problems.add(format!("{field}.filesystem"), "is required for a device that is mounted")
        }
        _ => {}
    }
    if device.persistent && (device.role != Role::Data || device.mount.is_some()) {
        problems.add(format!("{field}.persistent"), "is for a data device without a mount point: it is mounted at the persistent paths");
    }
    if device.role == Role::Swap && device.filesystem.is_some() {
        problems.add(format!("{field}.filesystem"), "swap has no filesystem");
    }
    Some(device)
}
