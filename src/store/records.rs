//! Rows of the catalogue.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    boot::loaders::LoaderDigests,
    disk::Layout,
    fs::{BuiltFs, FsKind, Profile},
    guest::config::Secret,
    mapping::{Mapping, Role},
    names::{Digest, PoolName, VolumeName},
    target::Volume,
};

/// A catalogued manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRecord {
    /// `img-` and 20 hexadecimal digits.
    pub id: String,
    /// The manifest as given, JSON text.
    pub manifest: String,
    /// Where the root filesystem comes from, unless it was uploaded.
    pub rootfs_url: Option<String>,
    /// Digest of the root filesystem as transferred, once known.
    pub rootfs_digest: Option<Digest>,
    /// Its size in bytes, once known.
    pub rootfs_size: Option<u64>,
    /// Its declared media type.
    pub media_type: Option<String>,
    /// Seconds since 1970.
    pub created: i64,
}

/// Everything that decides the bytes of a golden disk; its key is the hash of this. A new field must be added to [`GoldenSpec::key`] to compile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoldenSpec {
    /// Digest of the tarball.
    pub rootfs: Digest,
    /// Directory of the tarball that is the root of the tree, when it is not the tarball's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// Patterns left out, in order.
    pub volatile: Vec<String>,
    /// Template paths whose content the facts keep, in order.
    pub templates: Vec<String>,
    /// Filesystem.
    pub filesystem: FsKind,
    /// ext4 features.
    pub profile: Profile,
    /// Filesystem label.
    pub label: String,
    /// Bytes of disk per inode.
    pub bytes_per_inode: u32,
    /// Layout of the disk.
    pub layout: Layout,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Architecture, which decides the type GUID of a root partition.
    pub arch: String,
    /// What of booting is part of the golden.
    #[serde(default)]
    pub boot: GoldenBoot,
}

/// The part of booting that decides bytes of a golden disk, or facts about it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GoldenBoot {
    /// Boot loaders of the host that are put on a disk with a partition table; none for a bare filesystem.
    pub loaders: LoaderDigests,
    /// Kernel that the manifest names.
    pub kernel: Option<String>,
    /// Initrd that the manifest names.
    pub initrd: Option<String>,
    /// Size of the EFI system partition in bytes, when it is not the usual one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub esp_bytes: Option<u64>,
}

/// Changes whenever the same [`GoldenSpec`] gives other bytes or other facts.
pub const GOLDEN_FORMAT: u32 = 3;

impl GoldenSpec {
    /// The golden key: a hash of every field and of [`GOLDEN_FORMAT`].
    pub fn key(&self) -> Digest {
        let GoldenSpec { rootfs, prefix, volatile, templates, filesystem, profile, label, bytes_per_inode, layout, size_bytes, arch, boot } = self;
        let GoldenBoot { loaders: LoaderDigests { bios, efi }, kernel, initrd, esp_bytes } = boot;
        let boot = serde_json::json!([bios, efi, kernel, initrd]);
        let mut value = serde_json::json!([
            GOLDEN_FORMAT,
            rootfs,
            volatile,
            templates,
            filesystem,
            profile,
            label,
            bytes_per_inode,
            layout,
            size_bytes,
            arch,
            boot
        ]);
        // Goldens from before there was a prefix keep their key.
        if let (Some(prefix), Some(value)) = (prefix, value.as_array_mut()) {
            value.push(prefix.clone().into());
        }
        // As those with the usual system partition do; a number is no prefix.
        if let (Some(esp_bytes), Some(value)) = (esp_bytes, value.as_array_mut()) {
            value.push((*esp_bytes).into());
        }
        Digest::of(value.to_string().as_bytes())
    }
}

/// A golden disk in the store.
#[derive(Debug, Clone, PartialEq)]
pub struct GoldenRecord {
    /// [`GoldenSpec::key`].
    pub key: Digest,
    /// What it was made from.
    pub spec: GoldenSpec,
    /// Image it was first built for.
    pub image_id: String,
    /// Digest over its content (`store::digest`).
    pub digest: Digest,
    /// Bytes allocated.
    pub allocated: u64,
    /// What the build made.
    pub built: BuiltFs,
    /// Seconds since 1970.
    pub created: i64,
    /// Seconds since 1970.
    pub last_used: i64,
}

/// State of a render.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RenderState {
    /// Waiting.
    Queued,
    /// At work.
    Running,
    /// Done.
    Succeeded,
    /// Failed.
    Failed,
    /// Cancelled.
    Cancelled,
}

impl RenderState {
    /// The name in the catalogue.
    pub fn name(self) -> &'static str {
        match self {
            RenderState::Queued => "queued",
            RenderState::Running => "running",
            RenderState::Succeeded => "succeeded",
            RenderState::Failed => "failed",
            RenderState::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(self, RenderState::Succeeded | RenderState::Failed | RenderState::Cancelled)
    }
}

/// Why a render ended without a volume, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureRecord {
    /// gRPC code.
    pub code: i32,
    /// Stable reason.
    pub reason: String,
    /// The whole chain of messages.
    pub message: String,
    /// What an operator can do.
    pub hint: String,
    /// Stage.
    pub stage: String,
    /// Whether trying again may help.
    pub retryable: bool,
}

/// A render job.
#[derive(Debug, Clone, PartialEq)]
pub struct RenderRecord {
    /// `rnd-` and 20 hexadecimal digits.
    pub id: String,
    /// Idempotency key; for prerenders one of our own.
    pub key: String,
    /// The canonical spec with secrets replaced by their digests, for comparing.
    pub spec: Value,
    /// Image.
    pub image_id: String,
    /// Instance, none for prerenders.
    pub instance: Option<String>,
    /// Pool and volume name, none for prerenders.
    pub volume: Option<(String, String)>,
    /// State.
    pub state: RenderState,
    /// Stage it is or ended in.
    pub stage: String,
    /// Why it failed.
    pub failure: Option<FailureRecord>,
    /// Golden it uses.
    pub golden_key: Option<Digest>,
    /// Milliseconds since 1970.
    pub created_ms: i64,
    /// Milliseconds since 1970.
    pub started_ms: Option<i64>,
    /// Milliseconds since 1970.
    pub finished_ms: Option<i64>,
}

/// Pool and name of a volume.
pub type VolumeKey = (PoolName, VolumeName);

/// A volume with its mapping.
#[derive(Debug, Clone, PartialEq)]
pub struct VolumeRecord {
    /// The volume.
    pub volume: Volume,
    /// For a root the mapping of its whole instance; for any other volume that of itself alone.
    pub mapping: Mapping,
    /// Golden that it needs (a lease): what an overlay is backed by, or where the kernel lies that it is started with.
    pub golden_key: Option<Digest>,
    /// Seconds since 1970.
    pub created: i64,
    /// What it is for.
    pub role: Role,
    /// The root of the instance it is attached to; none for roots, and for data whose root is gone.
    pub root: Option<VolumeKey>,
    /// What the SSH host keys of a root were made from: the same instance rendered again keeps them.
    pub seed: Option<Secret>,
}

impl VolumeRecord {
    /// Pool and name.
    pub fn key(&self) -> VolumeKey {
        (self.volume.pool.clone(), self.volume.name.clone())
    }
}
