//! The block-device mapping: what exists for an instance, in terms that a hypervisor's tools take unchanged. Serialised as it is into the catalogue.

//!
//! The dialects are views of it and never read the host: [`libvirt`], [`xl`], [`qemu`] and [`ec2`], on a [`Bus`] that names the devices ([`names`]).
//! A path that a dialect has no way to write down is refused, never mangled.

pub mod ec2;
pub mod libvirt;
pub mod machine;
pub mod names;
pub mod qemu;
#[cfg(test)]
mod tests;
pub mod xl;

use std::{path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    fs::FsKind,
    names::{Digest, InstanceName, MacAddr},
    target::{Volume, VolumeFormat},
};

/// Version of the serialised form.
pub const MAPPING_VERSION: u32 = 1;

/// All devices of one instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mapping {
    /// [`MAPPING_VERSION`].
    pub version: u32,
    /// The instance.
    pub instance: InstanceName,
    /// The render that made it.
    pub render_id: String,
    /// The image it was made from.
    pub image_id: String,
    /// Devices in boot order, the root first.
    pub devices: Vec<Device>,
    /// Network cards in the guest's order.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// Names of the platforms it was rendered for, as they were called then.
    #[serde(default)]
    pub platforms: Vec<String>,
    /// Identities given to the guest.
    pub identity: GuestIdentity,
    /// What was injected, replaced and removed, secrets redacted (the report of `guest`).
    pub injected: serde_json::Value,
    /// When it was published, seconds since 1970.
    pub created_secs: i64,
}

/// A network card of the instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Name in the guest.
    pub name: String,
    /// Hardware address: the one that the guest's configuration is bound to, or one derived from the instance.
    pub mac: MacAddr,
}

/// What a device is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The root filesystem's disk.
    Root,
    /// Data that outlives the root.
    Data,
    /// Swap space.
    Swap,
    /// Scratch space.
    Scratch,
    /// A configuration seed.
    Seed,
}

/// One block device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// What it is called among the devices of its instance: `root`, `data`, …
    #[serde(default)]
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// 0 boots first.
    pub boot_order: u32,
    /// The volume behind it.
    pub volume: Volume,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// Files behind the volume, nearest first: path and format (`raw`). Empty when it stands alone.
    pub backing_chain: Vec<Backing>,
    /// Digest of the golden it was made from.
    pub golden_digest: Option<Digest>,
    /// Key of the golden it was made from.
    pub golden_key: Option<String>,
    /// Partition-table type, `gpt`, or nothing for a bare filesystem.
    pub partition_table: Option<String>,
    /// GUID of the disk (GPT).
    pub disk_uuid: Option<String>,
    /// Partitions in table order; empty for a bare filesystem.
    pub partitions: Vec<Partition>,
    /// The filesystem that matters on this device.
    pub filesystem: Option<Filesystem>,
    /// Where the guest mounts it, when that is one place other than `/`.
    #[serde(default)]
    pub mount: Option<String>,
}

/// A file behind a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// Absolute path.
    pub path: PathBuf,
    /// Format, always stated, never probed.
    pub format: String,
}

/// One partition, bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partition {
    /// Number in the table, from 1.
    pub number: u32,
    /// Where it starts.
    pub offset_bytes: u64,
    /// How long it is.
    pub size_bytes: u64,
    /// Type GUID, lower case.
    pub type_uuid: String,
    /// Its own GUID, lower case.
    pub uuid: String,
    /// Name in the table.
    pub name: String,
}

/// A filesystem on a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filesystem {
    /// Type.
    pub kind: FsKind,
    /// UUID, lower case with hyphens.
    pub uuid: String,
    /// Label, empty for none.
    pub label: String,
    /// Where it starts on the device, bytes.
    pub offset_bytes: u64,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// What makes this guest this guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestIdentity {
    /// UUID of the instance, derived from its name.
    pub instance_uuid: String,
    /// 32 hexadecimal digits.
    pub machine_id: String,
    /// Host name or FQDN, if one was set.
    pub hostname: Option<String>,
    /// `type fingerprint` of each fresh SSH host key.
    pub ssh_fingerprints: Vec<String>,
    /// Lines for a `known_hosts` file.
    pub known_hosts: Vec<String>,
    /// The keys as DNS records (RFC 4255), in a zone file's syntax. Mappings of older versions have none.
    #[serde(default)]
    pub sshfp: Vec<String>,
}

/// The buses a device can be shown on; decides its name in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bus {
    /// Xen's paravirtual block device, `xvda`.
    Xen,
    /// virtio-blk, `vda`.
    Virtio,
    /// SCSI, SATA or USB, `sda`.
    Scsi,
    /// NVMe, `nvme0n1`.
    Nvme,
}

impl FromStr for Bus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "xen" => Ok(Bus::Xen),
            "virtio" => Ok(Bus::Virtio),
            "scsi" => Ok(Bus::Scsi),
            "nvme" => Ok(Bus::Nvme),
            _ => Err(format!("{text:?} is not a bus; use xen, virtio, scsi or nvme")),
        }
    }
}

impl Bus {
    /// The name used in documents.
    pub fn name(self) -> &'static str {
        match self {
            Bus::Xen => "xen",
            Bus::Virtio => "virtio",
            Bus::Scsi => "scsi",
            Bus::Nvme => "nvme",
        }
    }
}

/// The forms a mapping can be asked for in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    /// `<disk>` elements of a libvirt domain.
    Libvirt,
    /// The `disk = [ … ]` setting of an xl domain configuration.
    Xl,
    /// Arguments of QEMU, as a JSON list of strings.
    Qemu,
    /// A JSON document after EC2's DescribeImages.
    Ec2,
}

impl FromStr for Dialect {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "libvirt" => Ok(Dialect::Libvirt),
            "xl" => Ok(Dialect::Xl),
            "qemu" => Ok(Dialect::Qemu),
            "ec2" => Ok(Dialect::Ec2),
            _ => Err(format!("{text:?} is not a dialect; use libvirt, xl, qemu or ec2")),
        }
    }
}

impl Dialect {
    /// The mapping in this dialect with its devices on `bus`, text that ends in a newline. `Kind::Unsupported` with reason
    /// `PATH_NOT_EXPRESSIBLE` for a path that can't be written in it, `BUS_NOT_EXPRESSIBLE` for a bus it does not have.
    pub fn render(self, mapping: &Mapping, bus: Bus) -> Result<String> {
        let json = |value: &serde_json::Value| format!("{value:#}\n");
        match self {
            Dialect::Libvirt => libvirt::disks(mapping, bus),
            Dialect::Xl => xl::disk_setting(mapping, bus),
            Dialect::Qemu => Ok(json(&qemu::arguments(mapping, bus)?.into())),
            Dialect::Ec2 => Ok(json(&ec2::document(mapping, bus)?)),
        }
    }
}

impl Device {
    /// How the bytes that a hypervisor opens are formatted: `raw` or `qcow2`.
    pub fn image_format(&self) -> &'static str {
        match self.volume.format {
            VolumeFormat::Raw | VolumeFormat::Block | VolumeFormat::Loop => "raw",
            VolumeFormat::Qcow2 | VolumeFormat::Qcow2Overlay => "qcow2",
        }
    }

    /// Whether a hypervisor opens a block device rather than a file.
    pub fn is_block_device(&self) -> bool {
        match self.volume.format {
            VolumeFormat::Block | VolumeFormat::Loop => true,
            VolumeFormat::Raw | VolumeFormat::Qcow2 | VolumeFormat::Qcow2Overlay => false,
        }
    }

    /// Whether firmware should try to boot from it.
    pub fn is_bootable(&self) -> bool {
        matches!(self.role, Role::Root | Role::Data)
    }
}

impl Role {
    /// The name used in documents.
    pub fn name(self) -> &'static str {
        match self {
            Role::Root => "root",
            Role::Data => "data",
            Role::Swap => "swap",
            Role::Scratch => "scratch",
            Role::Seed => "seed",
        }
    }
}
