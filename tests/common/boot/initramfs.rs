//! The initramfs of a fast guest: busybox, the few modules that reach the disk and the network cards, and two scripts.
//!
//! It exists because the distribution's own initrd takes most of a boot under software emulation. Modules come from the fixture, so they fit the
//! kernel; whatever else the guest needs it loads from its own disk.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::Read as _,
    path::{Path, PathBuf},
};

use crate::common::fixture::Fixture;

/// Runs in the initramfs, as PID 1.
const INIT: &str = include_str!("init.sh");
/// Runs in the guest's root, as PID 1.
const REPORT: &str = include_str!("report.sh");

/// The script that reports, for boots that bring their own init.
pub fn report_script() -> &'static str {
    REPORT
}

/// Builds a cpio archive (newc, not compressed: QEMU copies it, the guest would have to decompress it).
#[track_caller]
pub fn build(fixture: &Fixture, filesystem: &str) -> Vec<u8> {
    let mut archive = Cpio::default();
    for directory in ["bin", "dev", "proc", "sys", "run", "root", "modules"] {
        archive.directory(directory);
    }
    archive.device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, &static_busybox());
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("report.sh", 0o755, REPORT.as_bytes());
    let modules = Modules::read(fixture);
    let mut order = String::new();
    for (index, path) in modules.closure(&["virtio_pci", "virtio_blk", "virtio_net", "crc32c_generic", filesystem]).iter().enumerate() {
        let name = format!("modules/{index:02}.ko");
        archive.file(&name, 0o644, &decompressed(path));
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    archive.finish()
}

#[track_caller]
fn static_busybox() -> Vec<u8> {
    let path = Path::new("/bin/busybox");
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("read {}: {error} (install busybox-static)", path.display()));
    // A dynamic busybox would need its libraries in the initramfs. PT_INTERP names the loader of a dynamic program.
    let dynamic = bytes.windows(11).take(4096).any(|window| window == b"/lib64/ld-l");
    assert!(!dynamic, "{} is not static: install busybox-static", path.display());
    bytes
}

/// What depmod wrote about a kernel's modules.
struct Modules {
    directory: PathBuf,
    /// Name with underscores to path below `directory`.
    paths: HashMap<String, String>,
    /// Path to the paths it depends on.
    dependencies: HashMap<String, Vec<String>>,
    builtin: HashSet<String>,
}

impl Modules {
    #[track_caller]
    fn read(fixture: &Fixture) -> Self {
        let directory = fixture.lib.join("modules").join(fixture.kernel_release());
        let read = |name: &str| {
            let path = directory.join(name);
            fs::read_to_string(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
        };
        let mut paths = HashMap::new();
        let mut dependencies = HashMap::new();
        for line in read("modules.dep").lines() {
            let (path, rest) = line.split_once(':').expect("modules.dep has a colon in each line");
            paths.insert(module_name(path), path.to_owned());
            dependencies.insert(path.to_owned(), rest.split_whitespace().map(str::to_owned).collect());
        }
        let builtin = read("modules.builtin").lines().map(module_name).collect();
        Self { directory, paths, dependencies, builtin }
    }

    /// Files of these modules and all they need, in the order to load them. Modules that are built in need no file.
    #[track_caller]
    fn closure(&self, names: &[&str]) -> Vec<PathBuf> {
        let mut order = Vec::new();
        for name in names {
            if self.builtin.contains(*name) {
                continue;
            }
            let path = self.paths.get(*name).unwrap_or_else(|| panic!("{} has no module {name}", self.directory.display()));
            self.visit(path, &mut order);
        }
        order.iter().map(|path| self.directory.join(path)).collect()
    }

    fn visit(&self, path: &str, order: &mut Vec<String>) {
        if order.iter().any(|known| known == path) {
            return;
        }
        for dependency in &self.dependencies[path] {
            self.visit(dependency, order);
        }
        order.push(path.to_owned());
    }
}

/// `kernel/fs/ext4/ext4.ko.xz` is module `ext4`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// A module's bytes; Debian ships them plain (bookworm) or as xz (trixie), others as zstd.
#[track_caller]
fn decompressed(path: &Path) -> Vec<u8> {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
    let mut plain = Vec::new();
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => liblzma::read::XzDecoder::new(&bytes[..]).read_to_end(&mut plain).map(drop),
        Some("zst") => zstd::stream::copy_decode(&bytes[..], &mut plain),
        _ => return bytes,
    }
    .unwrap_or_else(|error| panic!("decompress {}: {error}", path.display()));
    plain
}

/// A writer of the kernel's initramfs format (Documentation/driver-api/early-userspace/buffer-format.rst, newc).
#[derive(Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    /// Adds a directory.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, 0o040_755, (0, 0), &[]);
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, 0o100_000 | mode, (0, 0), content);
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, 0o020_600, (major, minor), &[]);
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let length = u32::try_from(content.len()).expect("initramfs files are small");
        let name = u32::try_from(path.len() + 1).expect("paths are short");
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check.
        let fields = [self.entries, mode, 0, 0, 1, 0, length, 0, 0, device.0, device.1, name, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
