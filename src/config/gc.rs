//! `[gc]`: what the store may use, and what is never collected.

use serde::Deserialize;

use crate::units::Bytes;

/// Garbage collection of golden images and root filesystems.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gc {
    /// Bytes that golden images and tarballs may use together; 0 for no budget: then only what stands in the way of a build or a fetch goes.
    pub max_size: Bytes,
    /// Percent of `max_size` in use at which collecting begins.
    pub high_water_percent: u8,
    /// Percent of `max_size` that it goes down to.
    pub low_water_percent: u8,
    /// Seconds since its last use before anything may go.
    pub min_age_secs: u64,
    /// Seconds between two looks; 0 for none.
    pub interval_secs: u64,
    /// What is never collected: image ids, golden keys (64 hexadecimal digits), digests of tarballs (`sha256:…`).
    pub keep: Vec<String>,
}

impl Default for Gc {
    fn default() -> Self {
        Gc { max_size: Bytes(0), high_water_percent: 95, low_water_percent: 80, min_age_secs: 3600, interval_secs: 600, keep: Vec::new() }
    }
}

impl Gc {
    /// The first key that does not fit, and why.
    pub(super) fn contradiction(&self) -> Option<(&'static str, String)> {
        if !(1..=100).contains(&self.high_water_percent) {
            return Some(("gc.high_water_percent", format!("{} is not between 1 and 100", self.high_water_percent)));
        }
        if self.low_water_percent > self.high_water_percent {
            return Some((
                "gc.low_water_percent",
                format!("{} is more than gc.high_water_percent, {}", self.low_water_percent, self.high_water_percent),
            ));
        }
        if i64::try_from(self.min_age_secs).is_err() {
            return Some(("gc.min_age_secs", format!("{} is no time", self.min_age_secs)));
        }
        let is_hex = |text: &str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        let wrong = self.keep.iter().find(|name| !(name.starts_with("img-") || is_hex(name) || name.strip_prefix("sha256:").is_some_and(is_hex)))?;
        Some(("gc.keep", format!("{wrong:?} is neither an image id (img-…), nor a golden key (64 hexadecimal digits), nor a digest (sha256:…)")))
    }
}
