//! `[keeper]`: the process that has the privileges which the daemon has not.

use std::path::PathBuf;

use serde::Deserialize;

use crate::error::{Error, Result, Stage};

/// `[keeper]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Keeper {
    /// Path of its unix socket; absolute. Default: none, the daemon is root and does all by itself.
    pub socket: Option<PathBuf>,
    /// Name or number of the user whose processes it serves: the daemon's.
    pub user: String,
    /// Whether it starts the workers that mount filesystems: what XFS and btrfs images need.
    pub mounts: bool,
}

impl Default for Keeper {
    fn default() -> Self {
        Keeper { socket: None, user: "cloudletd".to_owned(), mounts: true }
    }
}

impl Keeper {
    pub(super) fn check(&self) -> Result<()> {
        match &self.socket {
            Some(path) if !path.is_absolute() => {
                Err(Error::field(Stage::Config, "keeper.socket", format!("keeper.socket: {path:?} is not an absolute path")))
            }
            _ => Ok(()),
        }
    }
}
