//! The Debian root filesystems that `scripts/fixtures.sh` makes and keeps.
//!
//! A test that names a fixture gets it: when it is missing or stale the script makes it (10 to 90 seconds, root needed). The script locks, so tests
//! that run at the same time make each fixture once.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

/// One root filesystem, with what a direct boot of it needs.
pub struct Fixture {
    /// e.g. `bookworm-ifupdown`.
    pub name: String,
    /// The tarball, zstd.
    pub tarball: PathBuf,
    /// Its kernel.
    pub kernel: PathBuf,
    /// The initrd its own initramfs-tools made.
    pub initrd: PathBuf,
    /// `/lib` of the tree, holding `modules/RELEASE`.
    pub lib: PathBuf,
}

/// Where fixtures are kept: `$CLOUDLETD_FIXTURES`, or `target/fixtures` of the checkout.
pub fn directory() -> PathBuf {
    std::env::var_os("CLOUDLETD_FIXTURES").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fixtures"), PathBuf::from)
}

/// Runs the script for a fixture unless this process has.
#[track_caller]
fn make(name: &str) {
    // The script's own check costs tens of milliseconds and forks; once per process is enough.
    static READY: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    let mut ready = READY.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if ready.get_or_insert_default().insert(name.to_owned()) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/fixtures.sh");
        let output = Command::new(&script)
            .arg(name)
            .env("CLOUDLETD_FIXTURES", directory())
            .output()
            .unwrap_or_else(|error| panic!("run {}: {error}", script.display()));
        if !output.status.success() {
            ready.get_or_insert_default().remove(name);
            panic!("fixture {name} could not be made: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
    }
}

/// The command that runs e2fsck of another Debian release, by its own loader and with its own libraries.
#[track_caller]
pub fn e2fsck_of(suite: &str) -> Vec<PathBuf> {
    let name = format!("e2fsprogs-{suite}");
    make(&name);
    let parts = directory().join(name);
    let loader = fs::read_dir(&parts)
        .unwrap_or_else(|error| panic!("read {}: {error}", parts.display()))
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"ld-linux")))
        .unwrap_or_else(|| panic!("{} has no loader", parts.display()));
    vec![loader, "--library-path".into(), parts.clone(), parts.join("e2fsck")]
}

/// The fixture of that name, made now if need be.
#[track_caller]
pub fn get(name: &str) -> Fixture {
    make(name);
    let directory = directory();
    let parts = directory.join(name);
    let fixture = Fixture {
        name: name.to_owned(),
        tarball: directory.join(format!("{name}.tar.zst")),
        kernel: parts.join("vmlinuz"),
        initrd: parts.join("initrd.img"),
        lib: parts.join("lib"),
    };
    for path in [&fixture.tarball, &fixture.kernel, &fixture.initrd, &fixture.lib] {
        assert!(path.exists(), "fixture {name} lacks {}", path.display());
    }
    fixture
}

impl Fixture {
    /// Release of its kernel, e.g. `6.1.0-40-cloud-amd64`.
    pub fn kernel_release(&self) -> String {
        let modules = self.lib.join("modules");
        let mut names: Vec<String> = fs::read_dir(&modules)
            .unwrap_or_else(|error| panic!("read {}: {error}", modules.display()))
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(names.len(), 1, "one kernel is expected in {}: {names:?}", modules.display());
        names.remove(0)
    }
}
