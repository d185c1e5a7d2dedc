//! Cloudlet manifests: what an image is, in one JSON document.
//!
//! The format is 0.0.4 of 2010 as it was, and beside it what a provider needs today (root filesystem, boot, disk, devices). Whoever holds a
//! [`Manifest`] need not check anything in it again.
//!
//! ```text
//! bytes ─ json ─ read ─ Manifest ─┬─ args      values a user gave, with defaults, checked
//!                                 ├─ volatile  paths that are left out of the image
//!                                 └─ apply     files of the image that are templates → edits
//! ```
//!
//! Reading has two halves, so that the first can be done by a process that can do nothing else. [`Manifest::parse`] is both. [`Manifest::judged`] is what
//! is left of it when somebody else has parsed the text and compiled what is compiled of it (the schema of `args`, the patterns of `volatile`, templates):
//! every field is read from the document again, by the same rules.
//!
//! A manifest lies at `/.cloudlet/manifest` in the tree, beside the tarball, or comes with the call that creates the image. Nothing in it leads to
//! a path of the host, and no part of it is ever executed: `entry_points.chroot` is kept for those who run containers elsewhere.

pub mod apply;
pub mod args;
pub mod check;
pub mod hint;
mod id;
pub mod json;
pub mod lxd;
mod read;
pub mod schema;
pub mod template;
pub mod volatile;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    disk::Layout,
    error::Result,
    fs::{FsKind, Profile},
    guest::config::BackendKind,
    manifest::{args::Args, json::Document, volatile::Volatile},
    names::{DeviceName, Digest, GuestPath},
    units::Bytes,
};

pub use id::ImageId;

/// Bytes of a manifest.
pub const LEN_MAX: usize = 1024 * 1024;
/// Nesting of a manifest.
pub const DEPTH_MAX: usize = 64;
/// Where a manifest lies in the tree it describes.
pub const PATH: &str = "/.cloudlet/manifest";

/// A manifest whose every field is right.
#[derive(Debug, Clone)]
pub struct Manifest {
    name: Option<String>,
    description: Option<String>,
    author: Option<String>,
    arch: Option<String>,
    secret_args: BTreeSet<String>,
    templates: Vec<GuestPath>,
    persistent: Vec<GuestPath>,
    volatile: Vec<String>,
    entry_points: EntryPoints,
    rootfs: Option<Rootfs>,
    filesystem: FilesystemSpec,
    disk: DiskSpec,
    boot: BootSpec,
    devices: Vec<Device>,
    network_backend: Option<BackendKind>,
    lxd: Vec<lxd::LxdTemplate>,
    document: Value,
    digest: Digest,
}

/// `entry_points`: any number of ways to start the image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EntryPoints {
    /// The image brings a kernel; a boot loader can start it.
    pub kernel: Option<KernelSpec>,
    /// The image has an init and needs this kernel of somebody else's.
    pub init: Option<KernelSpec>,
    /// The image can be used by changing root into it.
    pub chroot: Option<ChrootSpec>,
}

/// A kernel: which system, version and build of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KernelSpec {
    /// Operating system, e.g. `linux`.
    pub os: Option<String>,
    /// Version, e.g. `2.6.32`.
    pub version: Option<String>,
    /// Build, e.g. `xen-686`.
    pub flavor: Option<String>,
}

/// Commands of an image that is entered by chroot; never run by this daemon. Each is one string (for a shell) or a list of words.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChrootSpec {
    /// The image's program.
    pub command: Vec<String>,
    /// Before it.
    pub enter: Vec<String>,
    /// After it.
    pub exit: Vec<String>,
}

/// `rootfs`: the tarball. Without `url` it is uploaded with the manifest or lies beside it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rootfs {
    /// An absolute URL; which schemes and hosts are allowed is the host's policy.
    pub url: Option<String>,
    /// Digest of the bytes as they are transferred, compressed if they are.
    pub digest: Option<Digest>,
    /// Their exact number.
    pub size: Option<u64>,
    /// Media type, e.g. `application/vnd.oci.image.layer.v1.tar+zstd`; without it the first bytes tell.
    pub media_type: Option<String>,
    /// Directory in the tarball that is the root of the tree; `None` when the tarball's own root is.
    pub prefix: Option<GuestPath>,
}

/// `filesystem`: what is left out is decided by the host's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FilesystemSpec {
    /// Which one.
    pub kind: Option<FsKind>,
    /// Label, 1..=16 bytes for ext4, 12 for XFS, 255 for btrfs, of `A-Z a-z 0-9 . _ -`.
    pub label: Option<String>,
    /// Bytes of disk per inode, ext4 only, 1024..=67108864.
    pub bytes_per_inode: Option<u32>,
    /// Features, ext4 only.
    pub profile: Option<Profile>,
}

/// `disk`: what is left out is decided by the host's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DiskSpec {
    /// How the filesystem lies on it.
    pub layout: Option<Layout>,
    /// Size of the golden disk, a multiple of 1 MiB; an instance's disk may be larger.
    pub size: Option<Bytes>,
    /// Size of the EFI system partition.
    pub esp_size: Option<Bytes>,
    /// How it is attached.
    pub bus: Option<Bus>,
}

/// How a disk is attached to the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bus {
    /// virtio-blk.
    Virtio,
    /// A SCSI controller (virtio-scsi where there is one).
    Scsi,
    /// AHCI.
    Sata,
    /// IDE.
    Ide,
    /// NVMe.
    Nvme,
    /// The Xen paravirtual block device.
    Xen,
}

impl Bus {
    /// The word in documents.
    pub fn name(self) -> &'static str {
        match self {
            Bus::Virtio => "virtio",
            Bus::Scsi => "scsi",
            Bus::Sata => "sata",
            Bus::Ide => "ide",
            Bus::Nvme => "nvme",
            Bus::Xen => "xen",
        }
    }
}

/// `boot`: paths in the image, hints for images whose kernel is not where distributions put it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BootSpec {
    /// Kernel.
    pub kernel: Option<GuestPath>,
    /// Initial RAM filesystem; only with a kernel.
    pub initrd: Option<GuestPath>,
    /// Kernel command line, at most 2048 bytes, without control characters.
    pub cmdline: Option<String>,
}

/// One of `devices`: a disk that an instance of this image is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// What requests call it; unique. Default: the role, with a number from the second of a role on (`data`, `data2`).
    pub name: DeviceName,
    /// What for.
    pub role: Role,
    /// Size, a multiple of 1 MiB; for the root the default is `disk.size`.
    pub size: Option<Bytes>,
    /// Filesystem made on it.
    pub filesystem: Option<FilesystemSpec>,
    /// Where the guest mounts it.
    pub mount: Option<GuestPath>,
    /// Whether it holds what is at the manifest's `persistent` paths; only data, at most one.
    pub persistent: bool,
}

/// What a device is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The image itself; at most one.
    Root,
    /// Data that outlives the instance.
    Data,
    /// Swap space.
    Swap,
    /// Space whose content may be lost.
    Scratch,
}

impl Role {
    /// The word in documents.
    pub fn name(self) -> &'static str {
        match self {
            Role::Root => "root",
            Role::Data => "data",
            Role::Swap => "swap",
            Role::Scratch => "scratch",
        }
    }
}

/// A document that a process which can do nothing else found to be a manifest; what that says of `args` is all that a reader of this takes on trust.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// The document.
    pub document: Value,
    /// The arguments whose schema says that they are secret.
    pub secret_args: BTreeSet<String>,
}

impl Manifest {
    /// Reads a manifest: at most [`LEN_MAX`] bytes of JSON nested at most [`DEPTH_MAX`] deep, no key twice, no unknown field but `x-…`.
    ///
    /// `Kind::InvalidRequest` with a violation per problem; `field` is the dotted path (`entry_points.kernel.os`, `volatile[2]`). A text that is
    /// not JSON gives one violation with line and column, reason `MANIFEST_SYNTAX`; everything else has reason `MANIFEST_INVALID` or a narrower one.
    pub fn parse(bytes: &[u8]) -> Result<Manifest> {
        let document = Document::parse(bytes, LEN_MAX, DEPTH_MAX).map_err(read::syntax_error)?;
        read::manifest(&document.value, None)
    }

    /// The manifest that somebody else judged to be right. Errors as those of [`Manifest::parse`], should that not be true.
    pub fn judged(judged: Judged) -> Result<Manifest> {
        read::manifest(&judged.document, Some(judged.secret_args))
    }

    /// What [`Manifest::judged`] takes.
    pub fn to_judged(&self) -> Judged {
        Judged { document: self.document.clone(), secret_args: self.secret_args.clone() }
    }

    /// Short name of the image, e.g. `debian-5.0`; empty when it has none.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("")
    }

    /// What it is, for people; may have several lines; empty when there is none.
    pub fn description(&self) -> &str {
        self.description.as_deref().unwrap_or("")
    }

    /// Who made it, e.g. `Name <address>`; empty when nobody says.
    pub fn author(&self) -> &str {
        self.author.as_deref().unwrap_or("")
    }

    /// Hardware architecture as it is written, e.g. `i386`; see [`Manifest::machine`].
    pub fn arch(&self) -> Option<&str> {
        self.arch.as_deref()
    }

    /// The architecture in the kernel's words (`uname -m`) for the ones known by several: `i386` is `i686`, `amd64` is `x86_64`.
    pub fn machine(&self) -> Option<&str> {
        self.arch.as_deref().map(|arch| match arch {
            "i386" | "i486" | "i586" | "i686" | "x86" | "ia32" => "i686",
            "amd64" | "x86_64" | "x86-64" | "x64" => "x86_64",
            "arm64" | "aarch64" => "aarch64",
            "ppc64el" | "ppc64le" | "powerpc64le" => "ppc64le",
            other => other,
        })
    }

    /// What a user may configure, as it is written: what [`Args::compile`] takes. Nothing when the image takes no arguments.
    pub fn args(&self) -> Option<&Value> {
        self.document.get("args")
    }

    /// The arguments that a user gave with defaults filled in, checked; see [`Args::resolve`]. Compiles the schema.
    pub fn resolve_args(&self, given: &Map<String, Value>) -> Result<Map<String, Value>> {
        Args::compile(self.args().unwrap_or(&Value::Object(Map::new())))?.resolve(given)
    }

    /// Whether the argument `name`, or anything in it, is secret.
    pub fn is_secret_arg(&self, name: &str) -> bool {
        self.secret_args.contains(name)
    }

    /// The names of the secret arguments.
    pub fn secret_args(&self) -> &BTreeSet<String> {
        &self.secret_args
    }

    /// Files of the image that are templates; each once, in order.
    pub fn templates(&self) -> &[GuestPath] {
        &self.templates
    }

    /// Templates of LXD and Incus, in the order of their paths.
    pub fn lxd_templates(&self) -> &[lxd::LxdTemplate] {
        &self.lxd
    }

    /// Files and directories that hold data to keep.
    pub fn persistent(&self) -> &[GuestPath] {
        &self.persistent
    }

    /// Whether `path` holds data to keep: one of `persistent` or below one.
    pub fn is_persistent(&self, path: &GuestPath) -> bool {
        self.persistent.iter().any(|kept| path.is_within(kept))
    }

    /// The patterns of paths that are not part of the image, as they are written; [`Volatile::compile`] takes them again.
    pub fn volatile(&self) -> &[String] {
        &self.volatile
    }

    /// The same, compiled.
    pub fn volatile_patterns(&self) -> Result<Volatile> {
        Volatile::compile(&self.volatile)
    }

    /// How the image can be started.
    pub fn entry_points(&self) -> &EntryPoints {
        &self.entry_points
    }

    /// The names of the entry points it has: `kernel`, `init`, `chroot`.
    pub fn entry_point_names(&self) -> Vec<&'static str> {
        let EntryPoints { kernel, init, chroot } = &self.entry_points;
        let named = [("kernel", kernel.is_some()), ("init", init.is_some()), ("chroot", chroot.is_some())];
        named.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
    }

    /// Where its root filesystem comes from, if the manifest says anything about it.
    pub fn rootfs(&self) -> Option<&Rootfs> {
        self.rootfs.as_ref()
    }

    /// What filesystem its root becomes, if the manifest says.
    pub fn filesystem(&self) -> Option<FsKind> {
        self.root_filesystem().kind
    }

    /// Which features the filesystem has, if the manifest says.
    pub fn profile(&self) -> Option<Profile> {
        self.root_filesystem().profile
    }

    /// Label of the root filesystem, if the manifest says.
    pub fn label(&self) -> Option<&str> {
        self.root_filesystem().label.as_deref()
    }

    /// Bytes of disk per inode, if the manifest says.
    pub fn bytes_per_inode(&self) -> Option<u32> {
        self.root_filesystem().bytes_per_inode
    }

    /// `filesystem`, or the one of the root among `devices`: they are the same thing, said in two places.
    fn root_filesystem(&self) -> &FilesystemSpec {
        let root = self.devices.iter().find(|device| device.role == Role::Root);
        root.and_then(|root| root.filesystem.as_ref()).unwrap_or(&self.filesystem)
    }

    /// How the filesystem lies on the disk, if the manifest says.
    pub fn layout(&self) -> Option<Layout> {
        self.disk.layout
    }

    /// Size of the golden disk in bytes, if the manifest says: `disk.size`, or the size of the root among `devices`.
    pub fn disk_size(&self) -> Option<u64> {
        let root = self.devices.iter().find(|device| device.role == Role::Root);
        self.disk.size.or(root.and_then(|root| root.size)).map(|size| size.0)
    }

    /// Size of the EFI system partition in bytes, if the manifest says.
    pub fn esp_size(&self) -> Option<u64> {
        self.disk.esp_size.map(|size| size.0)
    }

    /// How the disk is to be attached, if the manifest says.
    pub fn bus(&self) -> Option<Bus> {
        self.disk.bus
    }

    /// Where its kernel is, if that can't be found by itself.
    pub fn boot(&self) -> &BootSpec {
        &self.boot
    }

    /// The disks of an instance, in order.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// Which network configuration the guest reads, if the manifest says.
    pub fn network_backend(&self) -> Option<BackendKind> {
        self.network_backend
    }

    /// SHA-256 of the document in canonical form (no white space, keys sorted by their bytes): formatting and order of keys don't matter.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The document as it was given, defaults not filled in.
    pub fn to_json(&self) -> &Value {
        &self.document
    }
}

/// The digest of a document in canonical form.
fn canonical_digest(document: &Value) -> Digest {
    let mut text = Vec::new();
    canonical(document, &mut text);
    Digest::of(&text)
}

fn canonical(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Object(members) => {
            let mut sorted: Vec<_> = members.iter().collect();
            sorted.sort_by(|a, b| a.0.cmp(b.0));
            out.push(b'{');
            for (index, (name, member)) in sorted.into_iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                out.extend_from_slice(Value::from(name.as_str()).to_string().as_bytes());
                out.push(b':');
                canonical(member, out);
            }
            out.push(b'}');
        }
        Value::Array(elements) => {
            out.push(b'[');
            for (index, element) in elements.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                canonical(element, out);
            }
            out.push(b']');
        }
        plain => out.extend_from_slice(plain.to_string().as_bytes()),
    }
}

#[cfg(test)]
mod tests;
