//! What is to be rendered, validated once at the edge; nothing after it re-checks.

use serde_json::Value;

use crate::{
    disk::Layout,
    fs::{FsKind, Profile},
    guest::config::InstanceConfig,
    names::{PoolName, RenderKey, VolumeName},
    target::VolumeFormat,
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
    /// Options of the golden.
    pub golden: GoldenOptions,
    /// The request as it was decoded, secrets replaced by digests; two requests are the same when this is equal.
    pub canonical: Value,
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
