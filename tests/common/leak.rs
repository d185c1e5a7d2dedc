//! Finds what a test left on the host: loop devices, mounts, temporary files, processes of the daemon.

use std::{collections::BTreeSet, fs, path::Path};

/// A snapshot of the host, compared when the test says so, or at the end of the scope.
///
/// Other tests may run at the same time, so the guard looks only at what names `scope`, a directory that belongs to this test (its
/// state directory or pools): loop devices whose backing file is below it, mounts of or on it, and temporary names in it.
pub struct LeakGuard {
    scope: String,
    before: BTreeSet<String>,
    checked: bool,
}

impl LeakGuard {
    /// Remembers how things are now.
    #[track_caller]
    pub fn new(scope: impl AsRef<Path>) -> Self {
        let scope = fs::canonicalize(scope.as_ref()).expect("the scope of a leak guard exists").to_str().expect("test paths are UTF-8").to_owned();
        let before = snapshot(&scope);
        Self { scope, before, checked: false }
    }

    /// Fails if there is anything now that was not there before.
    #[track_caller]
    pub fn check(&mut self) {
        self.checked = true;
        let leaked: Vec<String> = snapshot(&self.scope).difference(&self.before).cloned().collect();
        assert!(leaked.is_empty(), "left behind: {leaked:#?}");
    }
}

impl Drop for LeakGuard {
    fn drop(&mut self) {
        if !self.checked && !std::thread::panicking() {
            self.check();
        }
    }
}

/// Everything of `scope` that a finished operation must not leave.
fn snapshot(scope: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (name, backing) in loop_devices() {
        if backing.starts_with(scope) {
            found.insert(format!("loop device {name} on {backing}"));
        }
    }
    for line in fs::read_to_string("/proc/self/mountinfo").expect("read mountinfo").lines() {
        if line.contains(scope) {
            found.insert(format!("mount {line}"));
        }
    }
    temporary_names(Path::new(scope), &mut found);
    found
}

/// Attached loop devices with their backing files, from sysfs: needs no tool.
pub fn loop_devices() -> Vec<(String, String)> {
    let mut devices = Vec::new();
    for entry in fs::read_dir("/sys/block").expect("read /sys/block").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Ok(backing) = fs::read_to_string(entry.path().join("loop/backing_file")) {
            devices.push((name, backing.trim_end().to_owned()));
        }
    }
    devices
}

/// Staged files have names that no finished one may have: a leading dot, or "tmp" as a word; and everything in a directory `tmp` is unfinished.
fn temporary_names(directory: &Path, found: &mut BTreeSet<String>) {
    // A directory may vanish while it is walked; what is gone has not leaked.
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let temporary = name.starts_with('.') || name.split(['.', '-', '_']).any(|word| matches!(word, "tmp" | "partial" | "staging" | "part"));
        if temporary && !is_directory {
            found.insert(format!("temporary file {}", entry.path().display()));
        }
        if is_directory {
            if name == "tmp" {
                for inner in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
                    found.insert(format!("temporary file {}", inner.path().display()));
                }
            }
            temporary_names(&entry.path(), found);
        }
    }
}
