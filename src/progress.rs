//! How far a job is, and whether it should stop. Shared between the worker thread and whoever watches.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::error::{Error, Kind, Result, Stage};

/// A handle to a job's progress; clones share it.
#[derive(Clone, Default)]
pub struct Progress(Arc<State>);

#[derive(Default)]
struct State {
    stage: Mutex<Option<(Stage, Instant)>>,
    bytes_done: AtomicU64,
    bytes_total: AtomicU64,
    cancelled: AtomicBool,
}

/// A reading of a job's progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// The stage it is in, once it has started.
    pub stage: Option<Stage>,
    /// Bytes of that stage done.
    pub bytes_done: u64,
    /// Bytes of that stage in all, 0 when not known.
    pub bytes_total: u64,
    /// Time spent in that stage so far.
    pub elapsed: Duration,
}

impl Reading {
    /// Time to the end of the stage at the rate so far; `None` when nothing can be said.
    pub fn eta(&self) -> Option<Duration> {
        if self.bytes_done == 0 || self.bytes_total <= self.bytes_done {
            return None;
        }
        let rest = (self.bytes_total - self.bytes_done) as f64 / self.bytes_done as f64;
        Some(self.elapsed.mul_f64(rest))
    }
}

impl Progress {
    /// Enters a stage; the counters start again.
    pub fn enter(&self, stage: Stage, bytes_total: u64) {
        let mut current = self.0.stage.lock().expect("no panic while holding the stage");
        *current = Some((stage, Instant::now()));
        self.0.bytes_done.store(0, Ordering::Relaxed);
        self.0.bytes_total.store(bytes_total, Ordering::Relaxed);
    }

    /// Counts bytes of the current stage.
    pub fn add(&self, bytes: u64) {
        self.0.bytes_done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Asks the job to stop at the next check.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
    }

    /// Fails with `Kind::Cancelled` when the job should stop. Called between units of work; what was staged is then abandoned.
    pub fn check(&self) -> Result<()> {
        if self.0.cancelled.load(Ordering::Acquire) {
            let stage = self.reading().stage.unwrap_or(Stage::Request);
            return Err(Error::new(Kind::Cancelled, stage, "", "cancelled by the caller"));
        }
        Ok(())
    }

    /// Where it is now.
    pub fn reading(&self) -> Reading {
        let stage = *self.0.stage.lock().expect("no panic while holding the stage");
        Reading {
            stage: stage.map(|(stage, _)| stage),
            bytes_done: self.0.bytes_done.load(Ordering::Relaxed),
            bytes_total: self.0.bytes_total.load(Ordering::Relaxed),
            elapsed: stage.map_or(Duration::ZERO, |(_, since)| since.elapsed()),
        }
    }
}
