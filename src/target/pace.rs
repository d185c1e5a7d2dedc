//! Pacing of bulk I/O, so that images that are being written do not starve the guests that are running.
//!
//! A [`Pacer`] is shared by everything that writes in bulk: renders of all formats, read-back verification, builds of golden images. It is a token bucket:
//! bytes are taken before they are written; tokens come back at the configured rate, at most `burst_bytes` are saved up. The bucket may go into debt by
//! one request, so a request larger than the burst passes too and the average still holds. Waiting is by blocking, in short naps, and ends early when the
//! job is cancelled. Callers wait in no order; each request is small (1 MiB), so none waits for long behind another.
//!
//! The pacer also carries the I/O priority of the threads that write. The kernel honours it with the BFQ and mq-deadline schedulers and ignores it with
//! `none` (ioprio_set(2), Documentation/block/ioprio.rst); the rate holds everywhere.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{error::Result, host::sys, progress::Progress, units::MIB};

/// A cancelled job is noticed at least this often.
const NAP_MAX: Duration = Duration::from_millis(50);
/// Saved up when nothing was asked for, unless configured otherwise.
pub const BURST_BYTES_DEFAULT: u64 = 16 * MIB;

/// I/O priority of the threads that write in bulk (ioprio_set(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoPriority {
    /// That of the daemon.
    #[default]
    Inherit,
    /// Best effort, lowest level (7).
    Low,
    /// Only when nobody else uses the disk.
    Idle,
}

impl IoPriority {
    /// The kernel's number: class in the upper 3 of 16 bits, level below.
    fn value(self) -> Option<u16> {
        match self {
            IoPriority::Inherit => None,
            IoPriority::Low => Some(sys::IOPRIO_CLASS_BEST_EFFORT << sys::IOPRIO_CLASS_SHIFT | 7),
            IoPriority::Idle => Some(sys::IOPRIO_CLASS_IDLE << sys::IOPRIO_CLASS_SHIFT),
        }
    }
}

/// Limits of bulk I/O. The default limits nothing.
#[derive(Debug, Default)]
pub struct Pacer {
    bucket: Option<Mutex<Bucket>>,
    priority: IoPriority,
}

#[derive(Debug)]
struct Bucket {
    bytes_per_second: f64,
    burst_bytes: f64,
    /// Negative: a debt.
    tokens: f64,
    filled: Instant,
}

impl Pacer {
    /// At most `bytes_per_second` on average (`None` or 0: no limit), `burst_bytes` at once after a pause (at least 1), by threads of `priority`.
    pub fn new(bytes_per_second: Option<u64>, burst_bytes: u64, priority: IoPriority) -> Self {
        let burst_bytes = burst_bytes.max(1) as f64;
        let bucket = bytes_per_second
            .filter(|rate| *rate > 0)
            .map(|rate| Mutex::new(Bucket { bytes_per_second: rate as f64, burst_bytes, tokens: burst_bytes, filled: Instant::now() }));
        Pacer { bucket, priority }
    }

    /// Whether anything is limited at all.
    pub fn is_limiting(&self) -> bool {
        self.bucket.is_some()
    }

    /// Waits until `bytes` may be written. `Cancelled` when the job is cancelled meanwhile.
    pub fn take(&self, bytes: u64, progress: &Progress) -> Result<()> {
        let Some(bucket) = &self.bucket else { return Ok(()) };
        loop {
            progress.check()?;
            let wait = bucket.lock().unwrap_or_else(PoisonError::into_inner).take(bytes, Instant::now());
            if wait.is_zero() {
                return Ok(());
            }
            std::thread::sleep(wait.min(NAP_MAX));
        }
    }

    /// Gives the calling thread the pacer's priority until the guard is dropped. A kernel that refuses is no reason to fail: it is logged.
    pub fn lower_priority(&self) -> PriorityGuard {
        let Some(value) = self.priority.value() else { return PriorityGuard { before: None } };
        match sys::io_priority(0).and_then(|before| sys::set_io_priority(value).map(|()| before)) {
            Ok(before) => PriorityGuard { before: Some(before) },
            Err(error) => {
                tracing::debug!(%error, "the I/O priority of a bulk thread could not be lowered");
                PriorityGuard { before: None }
            }
        }
    }
}

/// What bulk I/O is done under: the limits, if any, and the job that may be cancelled.
#[derive(Clone, Copy)]
pub struct Pace<'a> {
    /// The limits.
    pub pacer: Option<&'a Pacer>,
    /// The job.
    pub progress: &'a Progress,
}

impl Pace<'_> {
    /// Waits until `bytes` (1 MiB at most, or a cancel is noticed late) may be read or written; see [`Pacer::take`].
    pub fn take(&self, bytes: u64) -> Result<()> {
        match self.pacer {
            Some(pacer) => pacer.take(bytes, self.progress),
            None => self.progress.check(),
        }
    }

    /// The largest request that keeps the rate even: `most` where nothing is limited, else at most 1 MiB.
    pub fn request_bytes(&self, most: u64) -> u64 {
        if self.pacer.is_some_and(|pacer| pacer.bucket.is_some()) { most.min(MIB) } else { most }
    }

    /// As [`Pacer::lower_priority`].
    pub fn lower_priority(&self) -> PriorityGuard {
        self.pacer.map_or(PriorityGuard { before: None }, Pacer::lower_priority)
    }
}

/// Gives a thread its old I/O priority back when it is dropped, on that thread.
#[derive(Debug)]
#[must_use = "the priority lasts as long as the guard"]
pub struct PriorityGuard {
    before: Option<u16>,
}

impl Drop for PriorityGuard {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && let Err(error) = sys::set_io_priority(before)
        {
            tracing::warn!(%error, "a thread keeps a lowered I/O priority");
        }
    }
}

impl Bucket {
    /// Takes `bytes` and says zero, or says how long to wait before asking again.
    fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        let elapsed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        self.tokens = (self.tokens + elapsed * self.bytes_per_second).min(self.burst_bytes);
        // More than the burst never comes together: a full bucket is enough, the rest is owed.
        let needed = (bytes as f64).min(self.burst_bytes);
        if self.tokens >= needed {
            self.tokens -= bytes as f64;
            return Duration::ZERO;
        }
        Duration::from_secs_f64(((needed - self.tokens) / self.bytes_per_second).clamp(1e-4, 3600.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn the_average_holds_for_requests_of_any_size_and_the_burst_is_free() {
        for request in [1u64, 700, 4096, 50_000] {
            let start = Instant::now();
            let mut bucket = Bucket { bytes_per_second: 10_000.0, burst_bytes: 5_000.0, tokens: 5_000.0, filled: start };
            let (mut now, mut taken) = (start, 0);
            while now < start + Duration::from_secs(100) {
                match bucket.take(request, now) {
                    Duration::ZERO => taken += request,
                    wait => now += wait,
                }
            }
            let most = 100 * 10_000 + 5_000 + request;
            assert!(taken <= most && taken + 2 * request + 5_000 >= 1_000_000, "{request}: {taken} of {most}");
        }
    }

    #[test]
    fn threads_share_one_rate() {
        let pacer = Pacer::new(Some(10 * MIB), MIB, IoPriority::Inherit);
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..16).try_for_each(|_| pacer.take(MIB / 16, &Progress::default())).expect("not cancelled"));
            }
        });
        // 4 MiB, the first of them at once.
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(290), "{took:?}");
    }

    #[test]
    fn a_cancelled_job_stops_waiting_and_no_limit_never_waits() {
        let pacer = Pacer::new(Some(1), 1, IoPriority::Inherit);
        let progress = Progress::default();
        pacer.take(1000, &progress).expect("the first is on credit");
        let start = Instant::now();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pacer.take(1, &progress));
            std::thread::sleep(Duration::from_millis(20));
            progress.cancel();
            assert_eq!(waiting.join().expect("no panic").expect_err("cancelled").kind(), Kind::Cancelled);
        });
        assert!(start.elapsed() < Duration::from_secs(2));
        Pacer::default().take(u64::MAX, &Progress::default()).expect("no limit");
    }

    #[test]
    fn the_priority_is_in_effect_while_the_guard_lives() {
        std::thread::spawn(|| {
            let before = sys::io_priority(0).expect("asks");
            for (priority, want) in [(IoPriority::Low, 2 << 13 | 7), (IoPriority::Idle, 3 << 13)] {
                let guard = Pacer::new(None, 0, priority).lower_priority();
                assert_eq!(sys::io_priority(0).expect("asks"), want, "{priority:?}");
                drop(guard);
                assert_eq!(sys::io_priority(0).expect("asks"), before);
            }
            let _guard = Pacer::default().lower_priority();
            assert_eq!(sys::io_priority(0).expect("asks"), before);
        })
        .join()
        .expect("no panic");
    }
}
