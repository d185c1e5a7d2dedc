//! `[age]`: the keys that open encrypted tarballs. By reference: the keys themselves are in files of their own and nowhere else.

use std::path::PathBuf;

use serde::Deserialize;

use crate::error::{Error, Result, Stage};

/// `[age]`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Age {
    /// Files of X25519 identities as `age-keygen` writes them; of the daemon's user and readable by it alone (mode 0600 or 0400). Absolute.
    pub identities: Vec<PathBuf>,
}

impl Age {
    pub(super) fn check(&self) -> Result<()> {
        match self.identities.iter().find(|path| !path.is_absolute()) {
            Some(path) => Err(Error::field(Stage::Config, "age.identities", format!("age.identities: {path:?} is not an absolute path"))),
            None => Ok(()),
        }
    }
}
