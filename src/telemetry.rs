//! Logs: to the journal under systemd, as text on a terminal, as JSON lines otherwise. The level comes from `CLOUDLETD_LOG` (tracing's filter syntax), `info`
//! by default (the FUSE library names every call that it leaves to the kernel: of it only errors). Secrets never reach it: their types do not show them.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

/// Sets up logging for the process. Called once, first.
pub fn start() {
    let filter = EnvFilter::try_from_env("CLOUDLETD_LOG").unwrap_or_else(|_| EnvFilter::new("info,fuser=error"));
    let registry = tracing_subscriber::registry().with(filter);
    // JOURNAL_STREAM is set by systemd for services whose output goes to the journal (systemd.exec(5)).
    if std::env::var_os("JOURNAL_STREAM").is_some()
        && let Ok(journal) = tracing_journald::layer()
    {
        registry.with(journal).init();
    } else if std::io::stderr().is_terminal() {
        registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false)).init();
    } else {
        registry.with(tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(std::io::stderr)).init();
    }
}
