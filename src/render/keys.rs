//! The operator's key files, whose signatures count and what opens encrypted tarballs: read at start and whenever the daemon is asked to read them again.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use super::now_secs;
use crate::{
    config::Config,
    error::Result,
    trust::{age::Identities, policy::Policy},
};

/// The keys in force.
#[derive(Debug)]
pub(crate) struct Keys(RwLock<InForce>);

#[derive(Debug)]
struct InForce {
    trust: Arc<Policy>,
    identities: Arc<Identities>,
    status: KeyStatus,
}

/// Since when the keys are in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyStatus {
    /// When they were read, seconds since 1970.
    pub loaded: i64,
    /// Why the files as they were the last time are not in force.
    pub error: Option<String>,
}

impl InForce {
    fn load(config: &Config) -> Result<InForce> {
        let (trust, identities) = (Policy::new(&config.trust)?, Identities::read(&config.age.identities)?);
        Ok(InForce { trust: Arc::new(trust), identities: Arc::new(identities), status: KeyStatus { loaded: now_secs(), error: None } })
    }
}

impl Keys {
    /// Reads all files that the configuration names. Errors name the file.
    pub(crate) fn load(config: &Config) -> Result<Keys> {
        InForce::load(config).map(|keys| Keys(RwLock::new(keys)))
    }

    /// Reads them again, all or none: when one is wrong, what was read before stays in force, and log and status say so. Blocking.
    pub(crate) fn reload(&self, config: &Config) {
        let loaded = InForce::load(config);
        let mut keys = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match loaded {
            Ok(loaded) => {
                tracing::info!("trusted keys and identities loaded again");
                *keys = loaded;
            }
            Err(error) => {
                tracing::error!(error = %error.chain(), "trusted keys and identities not loaded again; the former ones stay in force");
                keys.status.error = Some(error.chain());
            }
        }
    }

    fn keys(&self) -> RwLockReadGuard<'_, InForce> {
        // Whoever holds it for writing only moves values.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose signatures are required.
    pub(crate) fn trust(&self) -> Arc<Policy> {
        Arc::clone(&self.keys().trust)
    }

    /// What opens encrypted tarballs.
    pub(crate) fn identities(&self) -> Arc<Identities> {
        Arc::clone(&self.keys().identities)
    }

    /// Since when.
    pub(crate) fn status(&self) -> KeyStatus {
        self.keys().status.clone()
    }
}
