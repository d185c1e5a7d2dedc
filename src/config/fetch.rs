//! `[fetch]`: where root filesystems may come from.

use std::{collections::BTreeSet, path::PathBuf};

use serde::Deserialize;

use crate::{
    error::{Error, Result, Stage},
    units::{Bytes, GIB},
};

/// Fetching root filesystems.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fetch {
    /// Directories that `file://` URLs may name files below. Default: none.
    pub file_roots: Vec<PathBuf>,
    /// URL schemes that may be used, besides file.
    pub schemes: BTreeSet<String>,
    /// Hosts that may be asked (exact names, or `*.example.com`). Default: every host.
    pub allow_hosts: Vec<String>,
    /// Whether loopback, link-local and private addresses may be asked.
    pub allow_private_addresses: bool,
    /// Largest tarball, bytes as transferred.
    pub max_size: Bytes,
    /// Seconds without a byte before a transfer counts as stalled.
    pub idle_timeout_secs: u64,
    /// Seconds for the whole transfer, retries included.
    pub total_timeout_secs: u64,
    /// Attempts per transfer.
    pub attempts: u32,
    /// Mirrors: URLs with this prefix are fetched from these instead, in order.
    #[serde(rename = "mirror")]
    pub mirrors: Vec<Mirror>,
}

/// A rewrite rule.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    /// URL prefix that is replaced.
    pub prefix: String,
    /// What it is replaced with, tried in order.
    pub replace: Vec<String>,
}

impl Default for Fetch {
    fn default() -> Self {
        Fetch {
            file_roots: Vec::new(),
            schemes: ["http", "https"].map(String::from).into(),
            allow_hosts: Vec::new(),
            allow_private_addresses: false,
            max_size: Bytes(16 * GIB),
            idle_timeout_secs: 30,
            total_timeout_secs: 3600,
            attempts: 5,
            mirrors: Vec::new(),
        }
    }
}

impl Fetch {
    /// Refuses what does not fit together.
    pub(super) fn check(&self) -> Result<()> {
        for (index, root) in self.file_roots.iter().enumerate() {
            if !root.is_absolute() {
                let field = format!("fetch.file_roots[{index}]");
                return Err(Error::field(Stage::Config, &field, format!("{field}: {root:?} is not an absolute path")));
            }
        }
        Ok(())
    }
}
