//! Admission: what has to be there before work starts, and stays there while it runs.
//!
//! Space that a render will allocate is promised to it until it ends, so that two renders do not both count on the last gigabyte of a pool. What a render has
//! written already counts twice while it runs, as promised and as used: near the end of a pool this refuses a little early, never too late. Memory is asked
//! of the kernel before a golden image is built: MemAvailable of proc_meminfo(5), and what the daemon's own control group leaves.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

use crate::{
    error::{Error, Kind, Result, Stage},
    names::PoolName,
    units::{Bytes, MIB},
};

/// Memory that building a golden image takes beside a part of the inodes' state, bytes: buffers of the decompressor (zstd windows, xz dictionaries) and of
/// the writer.
const BUILD_MEMORY: u64 = 96 * MIB;

/// What stands for the store among the pools' names: no pool can have it.
const STORE: &str = "";

/// Promises and reserves.
pub struct Admission {
    /// By pool; the store's own space under [`STORE`].
    promised: Mutex<HashMap<String, u64>>,
    memory_reserve: u64,
}

/// Space of a pool that is promised to one render; given back when dropped.
pub struct Promise<'a> {
    admission: &'a Admission,
    place: String,
    bytes: u64,
    total: u64,
}

impl Admission {
    /// `memory_reserve` bytes of memory are left to the guests.
    pub fn new(memory_reserve: u64) -> Admission {
        Admission { promised: Mutex::new(HashMap::new()), memory_reserve }
    }

    /// Promises `bytes` of `pool`. Whether they are there is for the caller to see.
    pub fn promise(&self, pool: &PoolName, bytes: u64) -> Promise<'_> {
        self.promise_of(pool.as_str(), bytes)
    }

    /// Promises `bytes` of the store in `directory`. `Kind::NoSpace` with reason `STORE_FULL` when its filesystem has less than everything that is promised.
    pub fn promise_store(&self, directory: &Path, bytes: u64, what: &str) -> Result<Promise<'_>> {
        let promise = self.promise_of(STORE, bytes);
        let object = || directory.display().to_string();
        let free = rustix::fs::statvfs(directory).map_err(|errno| Error::io(Stage::Store, object(), "ask for free space", errno.into()))?;
        let free = free.f_bavail.saturating_mul(free.f_frsize);
        if promise.total > free {
            let why = format!("{what} needs about {}, promised are {} in all, and {} are free", Bytes(bytes), Bytes(promise.total), Bytes(free));
            return Err(Error::new(Kind::NoSpace, Stage::Store, object(), why).with_reason("STORE_FULL"));
        }
        Ok(promise)
    }

    fn promise_of(&self, place: &str, bytes: u64) -> Promise<'_> {
        let mut promised = self.promised.lock().expect("no panic while holding the promises");
        let total = promised.entry(place.to_owned()).or_default();
        *total = total.saturating_add(bytes);
        Promise { admission: self, place: place.to_owned(), bytes, total: *total }
    }

    /// Whether there is memory for building a golden image. `Kind::Busy` with reason `MEMORY_LOW` when not.
    pub fn check_memory(&self) -> Result<()> {
        let Some(available) = available_memory(Path::new("/proc"), Path::new("/sys/fs/cgroup")) else { return Ok(()) };
        let need = BUILD_MEMORY.saturating_add(self.memory_reserve);
        if available >= need {
            return Ok(());
        }
        let why = format!(
            "{} of memory are available, building a golden image needs {} beside the reserve of {}",
            Bytes(available),
            Bytes(BUILD_MEMORY),
            Bytes(self.memory_reserve)
        );
        Err(Error::new(Kind::Busy, Stage::Golden, "memory", why)
            .with_reason("MEMORY_LOW")
            .with_hint("try again later, or lower limits.memory_reserve"))
    }
}

impl Promise<'_> {
    /// Everything that is promised of the pool, this included, bytes.
    pub fn total(&self) -> u64 {
        self.total
    }
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        let mut promised = self.admission.promised.lock().expect("no panic while holding the promises");
        if let Some(total) = promised.get_mut(&self.place) {
            *total = total.saturating_sub(self.bytes);
        }
    }
}

/// Bytes of memory that can be had without swapping; nothing when the kernel does not say. `proc` and `cgroups` are where these are mounted.
fn available_memory(proc: &Path, cgroups: &Path) -> Option<u64> {
    let meminfo = fs::read_to_string(proc.join("meminfo")).ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let host = line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)?;
    Some(host.min(cgroup_memory(proc, cgroups).unwrap_or(u64::MAX)))
}

/// What the control groups of this process leave it (cgroup v2: memory.max less memory.current without page cache, of each from its own to the root).
fn cgroup_memory(proc: &Path, cgroups: &Path) -> Option<u64> {
    let own = fs::read_to_string(proc.join("self/cgroup")).ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    let mut left: Option<u64> = None;
    let mut directory: PathBuf = cgroups.join(path.trim_start_matches('/'));
    while directory.starts_with(cgroups) {
        let number = |name: &str| fs::read_to_string(directory.join(name)).ok()?.trim().parse::<u64>().ok();
        if let (Some(max), Some(current)) = (number("memory.max"), number("memory.current")) {
            // Page cache is given back when somebody needs the memory.
            let stat = fs::read_to_string(directory.join("memory.stat")).unwrap_or_default();
            let cache: u64 = ["active_file ", "inactive_file "]
                .iter()
                .filter_map(|name| stat.lines().find_map(|line| line.strip_prefix(name))?.trim().parse::<u64>().ok())
                .sum();
            let here = max.saturating_sub(current.saturating_sub(cache));
            left = Some(left.map_or(here, |left| left.min(here)));
        }
        if !directory.pop() {
            break;
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_add_up_and_are_given_back() {
        let admission = Admission::new(0);
        let (pool, other): (PoolName, PoolName) = ("a".parse().expect("valid"), "b".parse().expect("valid"));
        let first = admission.promise(&pool, 10);
        assert_eq!((first.total(), admission.promise(&other, 5).total()), (10, 5));
        assert_eq!(admission.promise(&pool, 7).total(), 17);
        drop(first);
        assert_eq!(admission.promise(&pool, 1).total(), 1);
    }

    #[test]
    fn a_store_without_the_space_refuses_before_anything_is_written() {
        let admission = Admission::new(0);
        let here = Path::new("/");
        let error = admission.promise_store(here, u64::MAX, "a golden image").err().expect("no disk has that much");
        assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "STORE_FULL"));
        assert!(admission.promise_store(here, 1, "a golden image").is_ok(), "what was refused is not held");
    }

    #[test]
    fn the_tightest_control_group_decides_what_memory_is_left() {
        let dir = tempfile::tempdir().expect("a directory");
        let (proc, cgroups) = (dir.path().join("proc"), dir.path().join("cg"));
        let write = |path: PathBuf, text: &str| {
            fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            fs::write(path, text).expect("written");
        };
        write(proc.join("meminfo"), "MemTotal: 999 kB\nMemAvailable:    1000 kB\n");
        assert_eq!(available_memory(&proc, &cgroups), Some(1_024_000));
        write(proc.join("self/cgroup"), "0::/system.slice/x.service\n");
        write(cgroups.join("system.slice/x.service/memory.max"), "max\n");
        write(cgroups.join("system.slice/x.service/memory.current"), "5\n");
        write(cgroups.join("system.slice/memory.max"), "1000\n");
        write(cgroups.join("system.slice/memory.current"), "400\n");
        assert_eq!(available_memory(&proc, &cgroups), Some(600));
        write(cgroups.join("system.slice/memory.stat"), "anon 300\nactive_file 30\ninactive_file 70\n");
        assert_eq!(available_memory(&proc, &cgroups), Some(700));
        assert_eq!(available_memory(&dir.path().join("nowhere"), &cgroups), None);
    }

    #[test]
    fn a_reserve_beyond_all_memory_refuses_builds_and_says_so() {
        let error = Admission::new(u64::MAX).check_memory().expect_err("no host has that much");
        assert_eq!((error.kind(), error.reason()), (Kind::Busy, "MEMORY_LOW"));
        assert!(Admission::new(0).check_memory().is_ok(), "96 MiB are there wherever the tests run");
    }
}
