//! `[worker]`: the processes that read foreign bytes.

use std::path::PathBuf;

use serde::Deserialize;

use crate::{
    error::{Error, Result, Stage},
    units::{Bytes, GIB, MIB},
};

/// Whether foreign bytes are read in a process that can do nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Confine {
    /// They are; where it can't be had, nothing is built.
    #[default]
    Required,
    /// They are read by the daemon itself. For hosts whose kernel has no seccomp, and for finding faults.
    Off,
}

/// `[worker]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Worker {
    /// `required` or `off`.
    pub confine: Confine,
    /// Memory that one build may write to; what needs more fails. At least 256 MiB.
    pub memory_max: Bytes,
    /// The program that is the worker. Default: the daemon's own. For programs that have the daemon as a library.
    pub program: Option<PathBuf>,
}

impl Default for Worker {
    fn default() -> Self {
        Worker { confine: Confine::Required, memory_max: Bytes(2 * GIB), program: None }
    }
}

impl Worker {
    pub(super) fn check(&self) -> Result<()> {
        if self.memory_max.0 < 256 * MIB {
            let why = format!("worker.memory_max: {} is less than decompressing an archive may need, 256 MiB", self.memory_max);
            return Err(Error::field(Stage::Config, "worker.memory_max", why));
        }
        Ok(())
    }
}
