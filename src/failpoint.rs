//! Failpoints: named moments at which a test lets the process die as a power cut would have it, so that every step of the journal is tried.
//!
//! `CLOUDLETD_STOP_AT=STEP:N` ends the process with SIGKILL when it comes to STEP for the N-th time (from 1). Only builds with debug assertions look at it;
//! a release build has nothing here.

/// All steps, in about the order in which a render comes to them.
pub const STEPS: [&str; 27] = [
    // The render and what it will make are in the catalogue.
    "render-admitted",
    // A tarball: in the catalogue; under its name.
    "blob-recorded",
    "blob-named",
    // A golden: its directory is there; in the catalogue; under its name.
    "golden-begun",
    "golden-recorded",
    "golden-named",
    // A volume that is a file: created and marked; written; flushed; under its name; its name flushed.
    "file-created",
    "file-written",
    "file-flushed",
    "file-named",
    "file-durable",
    // A loop device has the staged file.
    "loop-attached",
    // A block device: cleared and marked; all but the head written; half of the head written; all of it.
    "head-marked",
    "head-next",
    "head-half",
    "head-written",
    // What is going to be published is in the journal; all is published; the catalogue knows.
    "render-sealed",
    "render-published",
    "render-recorded",
    // Deleting a volume: marked, removed, forgotten.
    "delete-marked",
    "delete-unlinked",
    "delete-recorded",
    // Collecting a golden or tarball: marked, gone.
    "collect-marked",
    "collect-unlinked",
    // The next start: rubbish is swept, interrupted renders are settled, and they are marked as failed.
    "recover-swept",
    "recover-settled",
    "recover-failed",
];

/// The process comes to `step`.
#[cfg(debug_assertions)]
pub fn reach(step: &'static str) {
    use std::sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    };
    static STOP_AT: OnceLock<Option<(String, u32)>> = OnceLock::new();
    static REACHED: AtomicU32 = AtomicU32::new(0);
    debug_assert!(STEPS.contains(&step), "{step} is not in the list of steps");
    let wanted = STOP_AT.get_or_init(|| {
        let text = std::env::var("CLOUDLETD_STOP_AT").ok()?;
        let (step, times) = text.split_once(':')?;
        Some((step.to_owned(), times.parse().ok()?))
    });
    if let Some((name, times)) = wanted
        && name == step
        && REACHED.fetch_add(1, Ordering::SeqCst) + 1 == *times
    {
        // Nothing is unwound, flushed or dropped. A failure to die would be seen by the test.
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    }
}

/// The process comes to `step`: nothing to be done outside of tests.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn reach(_step: &'static str) {}
