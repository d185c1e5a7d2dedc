//! `golden.verify`.

use serde::Deserialize;

/// When stored bytes are compared with their digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verify {
    /// Only when the store is scrubbed.
    Never,
    /// Before a process uses what it has not fetched or built itself.
    #[default]
    FirstUse,
    /// Before every use: each warm render reads the whole golden image.
    Always,
}
