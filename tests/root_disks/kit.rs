//! What the root_* tests of targets share: a synthetic golden, patches, a reference, and a sweep for leaks.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use cloudletd::{
    fs::patch::BlockPatch,
    host::loops::{self, LoopDevice, Options},
    names::{Digest, VolumeName},
    progress::Progress,
    target::{GoldenDisk, Place, Pool, Volume, VolumeFormat, VolumeOptions, VolumePlan, target_for},
};

pub const MIB: u64 = 1 << 20;

/// A directory of one test, its golden and its pool; checks for leaked loop devices and mounts when it is dropped.
pub struct Kit {
    pub directory: tempfile::TempDir,
    pub golden: GoldenDisk,
    pub pool: Pool,
}

impl Kit {
    /// Panics with the reason when root is missing.
    pub fn new(golden_bytes: u64) -> Self {
        Kit::below(Path::new("/var/tmp"), golden_bytes)
    }

    pub fn below(parent: &Path, golden_bytes: u64) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test attaches loop devices and mounts: it needs root");
        let directory = tempfile::Builder::new().prefix("cloudletd-test-").tempdir_in(parent).expect("temporary directory");
        let golden = make_golden(&directory.path().join("golden.img"), golden_bytes);
        let path = directory.path().join("pool");
        std::fs::create_dir(&path).expect("pool directory");
        let pool = Pool { name: "files".parse().expect("valid"), place: Place::Directory { path } };
        Kit { directory, golden, pool }
    }

    pub fn pool_path(&self) -> &Path {
        match &self.pool.place {
            Place::Directory { path } => path,
            Place::Devices { .. } => unreachable!("the kit's pool is a directory"),
        }
    }

    /// Stages and publishes.
    pub fn render(&self, format: VolumeFormat, name: &str, patch: &BlockPatch) -> cloudletd::error::Result<Volume> {
        render(&self.pool, &self.golden, format, name, patch, false)
    }

    /// As [`Kit::render`] with what was chosen.
    pub fn render_with(&self, format: VolumeFormat, name: &str, patch: &BlockPatch, options: &VolumeOptions) -> cloudletd::error::Result<Volume> {
        render_as(&self.pool, &self.golden, format, name, patch, options)
    }

    /// A raw file with golden and patch, written the plain way.
    pub fn reference(&self, patch: &BlockPatch) -> PathBuf {
        self.reference_of(&self.golden, patch)
    }

    /// As [`Kit::reference`] for another golden.
    pub fn reference_of(&self, golden: &GoldenDisk, patch: &BlockPatch) -> PathBuf {
        let path = self.directory.path().join("reference.raw");
        std::fs::copy(&golden.path, &path).expect("copy");
        let mut permissions = std::fs::metadata(&path).expect("stat").permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o600);
        std::fs::set_permissions(&path, permissions).expect("chmod");
        let file = File::options().write(true).open(&path).expect("open");
        file.set_len(patch.size_bytes()).expect("size");
        for (number, data) in patch.iter() {
            file.write_all_at(data, number * 4096).expect("write");
        }
        path
    }

    /// Names in the pool's directory.
    pub fn pool_content(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.pool_path())
            .expect("list")
            .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Kit {
    fn drop(&mut self) {
        let mine = |path: &Path| path.starts_with(self.directory.path());
        let leaked: Vec<_> = loops::attached().expect("list").into_iter().filter(|device| mine(&device.backing)).collect();
        for device in &leaked {
            let _ = loops::detach(&device.path);
        }
        let mounts = cloudletd::host::mounts::mounts().expect("mountinfo");
        let mounted: Vec<_> = mounts.iter().filter(|mount| mine(&mount.mount_point)).map(|mount| mount.mount_point.clone()).collect();
        if !std::thread::panicking() {
            assert!(leaked.is_empty(), "loop devices are left behind: {leaked:?}");
            assert!(mounted.is_empty(), "mounts are left behind: {mounted:?}");
        }
    }
}

/// Stages and publishes with what was chosen.
pub fn render_as(
    pool: &Pool,
    golden: &GoldenDisk,
    format: VolumeFormat,
    name: &str,
    patch: &BlockPatch,
    options: &VolumeOptions,
) -> cloudletd::error::Result<Volume> {
    let name: VolumeName = name.parse().expect("valid name");
    let plan = VolumePlan { options, ..VolumePlan::new(pool, &name, golden, patch, "r-1") };
    target_for(format).stage(&plan, &Progress::default())?.publish()
}

pub fn render(
    pool: &Pool,
    golden: &GoldenDisk,
    format: VolumeFormat,
    name: &str,
    patch: &BlockPatch,
    overwrite: bool,
) -> cloudletd::error::Result<Volume> {
    let name: VolumeName = name.parse().expect("valid name");
    let plan = VolumePlan { overwrite, ..VolumePlan::new(pool, &name, golden, patch, "r-1") };
    target_for(format).stage(&plan, &Progress::default())?.publish()
}

/// A sparse file: a dense first MiB, islands of noise of different sizes, an island at the end, some of them straddling clusters. Mode 0444.
pub fn make_golden(path: &Path, size: u64) -> GoldenDisk {
    let file = File::create(path).expect("create");
    file.set_len(size).expect("size");
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15 ^ size);
    file.write_all_at(&noise.bytes(MIB as usize), 0).expect("write");
    let mut at = MIB + 3 * 4096;
    while at + MIB < size {
        let len = 4096 * (1 + noise.next() % 200);
        file.write_all_at(&noise.bytes(len.min(size - at) as usize), at).expect("write");
        at += len + 4096 * (1 + noise.next() % 700);
    }
    file.write_all_at(&noise.bytes(8192), size - 8192).expect("write");
    file.sync_all().expect("sync");
    let mut permissions = file.metadata().expect("stat").permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o444);
    std::fs::set_permissions(path, permissions).expect("chmod");
    GoldenDisk { path: path.to_owned(), size_bytes: size, digest: Digest::of(b"synthetic") }
}

/// A patch of `count` blocks spread over `size` bytes, with runs, the first and the last block, and a block of zeros.
pub fn make_patch(size: u64, count: u64) -> BlockPatch {
    let mut noise = Noise(count.wrapping_mul(77) + 1);
    let mut patch = BlockPatch::new(size);
    let blocks = size / 4096;
    for index in 0..count {
        let number = match index {
            0 => 0,
            1 => blocks - 1,
            // Every third continues a run.
            _ if index % 3 == 0 => patch.iter().next_back().map_or(1, |(last, _)| (last.max(1) - 1).min(blocks - 1)),
            _ => noise.next() % blocks,
        };
        let data = if index == 2 { vec![0; 4096] } else { noise.bytes(4096) };
        patch.insert(number, data.into());
    }
    patch
}

/// A small generator, so that tests repeat themselves.
pub struct Noise(pub u64);

impl Noise {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// qemu-img finds no error in `path` and the same content as in the reference of `patch`.
#[track_caller]
pub fn judge(kit: &Kit, path: &Path, format: VolumeFormat, patch: &BlockPatch) {
    let kind = if matches!(format, VolumeFormat::Qcow2 | VolumeFormat::Qcow2Overlay) { "qcow2" } else { "raw" };
    if kind == "qcow2" {
        let said = tool("qemu-img", &["check", "-f", kind, text(path)]);
        assert!(said.contains("No errors were found"), "{said}");
    }
    let reference = kit.reference(patch);
    let said = tool("qemu-img", &["compare", "-f", kind, "-F", "raw", text(path), text(&reference)]);
    assert!(said.contains("Images are identical"), "{said}");
    let info = tool("qemu-img", &["info", "-f", kind, "--output=json", text(path)]);
    assert!(info.contains(&format!("\"virtual-size\": {},", patch.size_bytes())), "{info}");
}

/// A filesystem in a file, mounted below the kit's directory.
pub struct Mounted {
    device: Option<LoopDevice>,
    pub point: PathBuf,
}

impl Mounted {
    pub fn new(kit: &Kit, name: &str, mkfs: &[&str], size: u64) -> Self {
        let (image, point) = (kit.directory.path().join(format!("{name}.fs")), kit.directory.path().join(name));
        File::create(&image).expect("create").set_len(size).expect("size");
        let arguments: Vec<&str> = mkfs[1..].iter().copied().chain([text(&image)]).collect();
        tool(mkfs[0], &arguments);
        std::fs::create_dir(&point).expect("mount point");
        let file = File::options().read(true).write(true).open(&image).expect("open");
        let device = LoopDevice::attach(&file, &image, &Options::guarded()).expect("attach");
        tool("mount", &[text(device.path()), text(&point)]);
        Mounted { device: Some(device), point }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        tool("umount", &[text(&self.point)]);
        if let Some(device) = self.device.take() {
            device.close().expect("detach");
        }
    }
}

/// Runs a tool that must succeed and gives its standard output.
#[track_caller]
pub fn tool(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(name).args(arguments).output().unwrap_or_else(|error| panic!("{name} is needed for this test: {error}"));
    assert!(
        output.status.success(),
        "{name} {arguments:?} failed: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Whether two files or devices hold the same first `len` bytes.
pub fn same_bytes(left: &Path, right: &Path, len: u64) -> bool {
    let (left, right) = (File::open(left).expect("open"), File::open(right).expect("open"));
    let (mut a, mut b) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    let mut at = 0;
    while at < len {
        let count = (len - at).min(MIB) as usize;
        left.read_exact_at(&mut a[..count], at).expect("read");
        right.read_exact_at(&mut b[..count], at).expect("read");
        if a[..count] != b[..count] {
            return false;
        }
        at += count as u64;
    }
    true
}

/// Whether a range reads as zeros.
pub fn reads_zero(path: &Path, from: u64, to: u64) -> bool {
    let file = File::open(path).expect("open");
    let mut buffer = vec![0; MIB as usize];
    let mut at = from;
    while at < to {
        let count = (to - at).min(MIB) as usize;
        file.read_exact_at(&mut buffer[..count], at).expect("read");
        if buffer[..count].iter().any(|byte| *byte != 0) {
            return false;
        }
        at += count as u64;
    }
    true
}
