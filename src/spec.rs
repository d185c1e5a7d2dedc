//! What is to be rendered, validated once at the edge; nothing after it re-checks.

use serde_json::Value;

use crate::{
    disk::Layout,
    fs::{FsKind, Profile},
    guest::{cloud_seed::SeedSpec, config::InstanceConfig},
    mapping::Role,
    names::{DeviceName, GuestPath, PoolName, RenderKey, VolumeName},
    target::{VolumeFormat, VolumeOptions},
};

/// One instance to render.
#[derive(Debug, Clone)]
pub struct RenderSpec {
    /// Image id.
    pub image_id: String,
    /// What the instance is told.
    pub instance: InstanceConfig,
    /// Pool of the root volume.
    pub pool: PoolName,
    /// Name of the root volume.
    pub volume: VolumeName,
    /// How it is stored; by the pool's kind when not given.
    pub format: Option<VolumeFormat>,
    /// Virtual size in bytes, a multiple of 4096; the golden's when not given.
    pub size_bytes: Option<u64>,
    /// Whether signatures on a block device may be overwritten.
    pub overwrite: bool,
    /// How the format stores it.
    pub options: VolumeOptions,
    /// Whether a root volume of this name that the same instance has already is replaced; its identity and its data volumes stay.
    pub replace: bool,
    /// Further devices; one that has the name of a device of the manifest completes it.
    pub devices: Vec<DeviceSpec>,
    /// Options of the golden, and the platforms that the instance is for.
    pub golden: GoldenOptions,
    /// The request as it was decoded, secrets replaced by digests; two requests are the same when this is equal.
    pub canonical: Value,
}

/// A device of an instance beside its root; what is not given comes from the manifest's device of the same name, then from the defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceSpec {
    /// What it is called; the role when not given, with a number from the second of a role on.
    pub name: Option<DeviceName>,
    /// What it is for; never a root.
    pub role: Option<Role>,
    /// Pool; the root's when not given.
    pub pool: Option<PoolName>,
    /// Name in the pool; `ROOT-DEVICE` when not given.
    pub volume: Option<VolumeName>,
    /// How it is stored; by the pool's kind when not given.
    pub format: Option<VolumeFormat>,
    /// Size in bytes, a multiple of 4096.
    pub size_bytes: Option<u64>,
    /// Filesystem.
    pub filesystem: Option<FsKind>,
    /// Label of the filesystem or swap space.
    pub label: Option<String>,
    /// Where the guest mounts it.
    pub mount: Option<GuestPath>,
    /// Mount options for fstab.
    pub mount_options: Option<String>,
    /// Whether it holds what is at the manifest's persistent paths.
    pub persistent: bool,
    /// Whether signatures on a block device may be overwritten.
    pub overwrite: bool,
    /// How the format stores it.
    pub options: VolumeOptions,
    /// What a seed holds.
    pub seed: Option<SeedSpec>,
}

/// What a golden image is to be like; what is not given comes from the manifest, then from the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GoldenOptions {
    /// Filesystem.
    pub filesystem: Option<FsKind>,
    /// Layout.
    pub layout: Option<Layout>,
    /// Size in bytes, a multiple of 4096.
    pub size_bytes: Option<u64>,
    /// ext4 features.
    pub profile: Option<Profile>,
    /// Names of the platforms that its disk has to start on; they decide what nobody else does.
    pub platforms: Vec<String>,
}

/// A job: a render, or a golden image ahead of time.
#[derive(Debug, Clone)]
pub enum JobSpec {
    /// Make a volume.
    Render {
        /// The caller's idempotency key.
        key: RenderKey,
        /// What to make.
        spec: Box<RenderSpec>,
    },
    /// Make a golden image.
    Prerender {
        /// Image id.
        image_id: String,
        /// Options.
        golden: GoldenOptions,
    },
}

/// The first field in which two canonical requests differ, as a dotted path.
pub fn first_difference(old: &Value, new: &Value) -> Option<String> {
    fn walk(path: &str, old: &Value, new: &Value) -> Option<String> {
        match (old, new) {
            (Value::Object(old), Value::Object(new)) => {
                let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
                keys.into_iter().find_map(|key| {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    walk(&path, old.get(key).unwrap_or(&Value::Null), new.get(key).unwrap_or(&Value::Null))
                })
            }
            (Value::Array(old), Value::Array(new)) if old.len() == new.len() => {
                old.iter().zip(new).enumerate().find_map(|(index, (old, new))| walk(&format!("{path}[{index}]"), old, new))
            }
            _ => (old != new).then(|| path.to_owned()),
        }
    }
    walk("", old, new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_differing_field_is_named() {
        let old = serde_json::json!({"spec": {"instance": {"hostname": "a", "keys": [1, 2]}}});
        let mut new = old.clone();
        assert_eq!(first_difference(&old, &new), None);
        new["spec"]["instance"]["keys"][1] = 3.into();
        assert_eq!(first_difference(&old, &new).as_deref(), Some("spec.instance.keys[1]"));
        new["spec"]["instance"]["hostname"] = "b".into();
        assert_eq!(first_difference(&old, &new).as_deref(), Some("spec.instance.hostname"));
        assert_eq!(first_difference(&old, &serde_json::json!({})).as_deref(), Some("spec"));
    }
}
