//! `[audit]`: who did what, one JSON line per call that changes something or was denied.

use std::path::PathBuf;

use serde::Deserialize;

use crate::error::{Error, Result, Stage};

/// Where the audit log goes. Default: nowhere.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditConfig {
    /// File that lines are appended to; made with mode 0640, and made again when it was moved away. Absolute.
    pub file: Option<PathBuf>,
    /// Whether the lines go to standard error, which is the journal under systemd. Exclusive with `file`.
    pub stderr: bool,
    /// Whether calls that change something are refused when they can't be logged. Each of them then has a line before it begins besides.
    pub required: bool,
}

impl AuditConfig {
    /// Refuses what does not fit together.
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |field: &str, why: &str| Err(Error::field(Stage::Config, field, format!("{field}: {why}")));
        if self.file.is_some() && self.stderr {
            return wrong("audit.stderr", "is exclusive with audit.file");
        }
        if self.file.as_ref().is_some_and(|path| !path.is_absolute()) {
            return wrong("audit.file", "is not an absolute path");
        }
        if self.required && self.file.is_none() && !self.stderr {
            return wrong("audit.required", "needs audit.file or audit.stderr");
        }
        Ok(())
    }
}
