//! pygrub, which Xen runs on a disk to find what to start: its own filesystem readers and its own idea of GRUB's menus.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// What pygrub took out of a disk.
#[derive(Debug)]
pub struct Found {
    /// The kernel's bytes.
    pub kernel: Vec<u8>,
    /// The initrd's bytes.
    pub ramdisk: Option<Vec<u8>>,
    /// The kernel's command line.
    pub args: String,
}

/// Runs it on `disk`.
#[track_caller]
pub fn run(disk: &Path) -> Found {
    let program =
        fs::read_dir("/usr/lib").expect("/usr/lib").filter_map(|entry| Some(entry.ok()?.path().join("bin/pygrub"))).find(|path| path.exists());
    let program = program.expect("pygrub is needed by this test (Debian package xen-utils-4.17)");
    let directory = tempfile::tempdir().expect("a directory");
    let output = Command::new(program).args(["-q", "--output-format=simple", "--output-directory"]).arg(directory.path()).arg(disk).output();
    let output = output.expect("run pygrub");
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}{errors}");
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ').map(str::to_owned));
    let file = |key: &str| value(key).map(|path| fs::read(PathBuf::from(path)).expect("read what pygrub took out"));
    let kernel = file("kernel").unwrap_or_else(|| panic!("pygrub found no kernel: {text}{errors}"));
    Found { kernel, ramdisk: file("ramdisk"), args: value("args").unwrap_or_default() }
}
