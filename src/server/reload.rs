//! What is read again while the daemon runs: trusted keys and identities on SIGHUP, certificates then and when their files change.

use std::{sync::Arc, time::Duration};

use tokio::signal::unix::{SignalKind, signal};

use super::tls::Certificates;
use crate::{
    api::audit::Audit,
    error::{Error, Result, Stage},
    render::Engine,
};

/// Between two looks when looking is switched off; a timer has to have some period.
const NEVER: Duration = Duration::from_secs(24 * 3600);

/// Watches until the task that it gives is aborted. The signal's handler is there when this returns.
pub fn watch(
    engine: Arc<Engine>,
    certificates: Option<Arc<Certificates>>,
    audit: Option<Arc<Audit>>,
    interval_secs: u64,
) -> Result<tokio::task::JoinHandle<()>> {
    let mut hangup = signal(SignalKind::hangup()).map_err(|error| Error::io(Stage::Host, "signals", "listen for SIGHUP", error))?;
    let looks = interval_secs > 0;
    let interval = if looks { Duration::from_secs(interval_secs) } else { NEVER };
    Ok(tokio::spawn(async move {
        loop {
            let asked = tokio::select! {
                signal = hangup.recv() => signal.is_some(),
                () = tokio::time::sleep(interval) => false,
            };
            if let Some(audit) = audit.as_ref().filter(|_| asked) {
                audit.reopen();
            }
            let (engine, certificates) = (Arc::clone(&engine), certificates.clone());
            // What comes of it is told where it happens: in the log and in the status.
            let work = move || {
                if asked {
                    engine.reload_keys();
                }
                if let Some(certificates) = certificates.filter(|certificates| asked || (looks && certificates.have_changed())) {
                    let _ = certificates.reload();
                }
            };
            let _ = tokio::task::spawn_blocking(work).await;
        }
    }))
}
