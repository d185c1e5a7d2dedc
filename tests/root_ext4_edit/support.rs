//! Goldens made by mke2fs, patches applied to copies, and the judges: e2fsck, debugfs and the kernel.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
};

use cloudletd::{
    error::Result,
    ext4::{edit::edit, read::Image},
    fs::{
        Region,
        edit::{Attrs, Edit, EditOp, EditRequest},
        patch::BlockPatch,
    },
    names::{Digest, GuestPath},
    progress::Progress,
    units::{PATCH_BLOCK, Timestamp},
};
use tempfile::TempDir;

use crate::common::e2fsck;

/// The time that all edits stamp: 2031-01-01, with nanoseconds.
pub const NOW: Timestamp = Timestamp { secs: 1_924_992_000, nanos: 123_456_789 };

/// Feature sets that a golden may have: a name, and what mke2fs gets for it.
pub const FEATURE_SETS: &[(&str, &[&str])] = &[
    ("default", &["-b", "4096"]),
    ("no-metadata-csum", &["-b", "4096", "-O", "^metadata_csum"]),
    ("no-64bit", &["-b", "4096", "-O", "^64bit"]),
    ("uninit-bg", &["-b", "4096", "-O", "^metadata_csum,uninit_bg"]),
    ("no-checksums", &["-b", "4096", "-O", "^metadata_csum,^uninit_bg,^64bit"]),
    ("ext3-like", &["-b", "4096", "-O", "^extent,^64bit,^metadata_csum,^flex_bg,^huge_file,^uninit_bg,^extra_isize", "-I", "128"]),
    ("1k", &["-b", "1024"]),
    ("2k", &["-b", "2048"]),
    ("1k-ext3-like", &["-b", "1024", "-O", "^extent,^64bit,^metadata_csum,^flex_bg,^huge_file,^uninit_bg"]),
    ("no-flex-bg", &["-b", "4096", "-O", "^flex_bg"]),
    ("no-resize-inode", &["-b", "4096", "-O", "^resize_inode"]),
    ("csum-seed", &["-b", "4096", "-O", "metadata_csum_seed"]),
    ("orphan-file", &["-b", "4096", "-O", "orphan_file"]),
    ("no-dir-index", &["-b", "1024", "-O", "^dir_index"]),
    ("no-journal", &["-b", "4096", "-O", "^has_journal,^sparse_super,^resize_inode"]),
];

/// Runs a tool and fails the test when it is missing or fails.
#[track_caller]
pub fn run(program: &str, args: &[&str]) -> Output {
    let output = run_any(program, args);
    assert!(output.status.success(), "{program} {args:?}: {}\n{}{}", output.status, text(&output.stdout), text(&output.stderr));
    output
}

/// Runs a tool; its exit status is the caller's business.
#[track_caller]
pub fn run_any(program: &str, args: &[&str]) -> Output {
    Command::new(program)
        .args(args)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("MKE2FS_DEVICE_SECTSIZE", "512")
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program} is needed for this test: {error}"))
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// An image file that must not change.
pub struct Golden {
    pub dir: TempDir,
    pub path: PathBuf,
}

/// Writes a small tree in the shape of a root filesystem.
pub fn plant(root: &Path) {
    for dir in
        ["etc/systemd/network", "etc/ssh", "usr/bin", "usr/lib/deep/er/and/deeper", "var/log", "var/lib/dbus", "run", "root/.ssh", "many", "empty"]
    {
        fs::create_dir_all(root.join(dir)).expect("mkdir");
    }
    for (path, content) in
        [("etc/hostname", "golden\n"), ("etc/passwd", "root:x:0:0::/root:/bin/sh\n"), ("etc/machine-id", ""), ("usr/lib/os-release", "ID=debian\n")]
    {
        fs::write(root.join(path), content).expect("write");
    }
    fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n").expect("write");
    fs::write(root.join("var/log/big"), pattern(3_000_000, 7)).expect("write");
    fs::write(root.join("usr/bin/tool"), pattern(70_000, 3)).expect("write");
    let sparse = File::create(root.join("var/log/sparse")).expect("create");
    sparse.write_all_at(b"end", 5_000_000).expect("write");
    for i in 0..300 {
        fs::write(root.join(format!("many/a-file-with-a-rather-long-name-{i:05}")), format!("{i}\n")).expect("write");
    }
    for (path, target) in [
        ("etc/os-release", "../usr/lib/os-release"),
        ("lib", "usr/lib"),
        ("var/run", "/run"),
        ("etc/resolv.conf", "../run/resolv.conf"),
        ("etc/loop", "loop"),
        ("etc/climbs", "../../../etc"),
        ("etc/dangles", "/nowhere/at/all"),
    ] {
        symlink(target, root.join(path)).expect("symlink");
    }
    symlink("x/".repeat(200), root.join("etc/long-link")).expect("symlink");
    fs::hard_link(root.join("usr/bin/tool"), root.join("usr/bin/tool2")).expect("link");
    run("mkfifo", &[root.join("run/fifo").to_str().expect("utf-8")]);
    run("mknod", &[root.join("run/null").to_str().expect("utf-8"), "c", "1", "3"]);
    fs::set_permissions(root.join("etc/passwd"), fs::Permissions::from_mode(0o640)).expect("chmod");
}

/// Bytes that tell their position.
pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] ^ seed).collect()
}

impl Golden {
    /// Makes an image of `size` (mke2fs syntax) with the planted tree and, through `debugfs`, some xattrs; its directories are then indexed
    /// as `e2fsck -D` does.
    #[track_caller]
    pub fn make(args: &[&str], size: &str) -> Golden {
        Golden::make_with(args, size, plant)
    }

    #[track_caller]
    pub fn make_with(args: &[&str], size: &str, plant: impl Fn(&Path)) -> Golden {
        assert_eq!(nix::unistd::geteuid().as_raw(), 0, "root is needed: the judges mount images");
        let dir = TempDir::new().expect("temporary directory");
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).expect("mkdir");
        plant(&tree);
        let path = dir.path().join("golden.ext4");
        let mut all =
            vec!["-q", "-F", "-t", "ext4", "-U", "01234567-89ab-4def-8123-456789abcdef", "-E", "hash_seed=11234567-89ab-4def-8123-456789abcdef"];
        all.extend_from_slice(args);
        let (tree, image) = (tree.to_str().expect("utf-8"), path.to_str().expect("utf-8"));
        all.extend_from_slice(&["-d", tree, image, size]);
        run("mke2fs", &all);
        if Path::new(tree).join("etc").exists() {
            for request in ["ea_set /etc/hosts user.small v", "ea_set /usr/bin/tool security.capability 01234567890123456789"] {
                run("debugfs", &["-w", "-R", request, image]);
            }
        }
        let status = run_any("e2fsck", &["-fyD", image]).status.code();
        assert!(matches!(status, Some(0 | 1)), "e2fsck -fyD: {status:?}");
        fs::remove_dir_all(tree).expect("remove tree");
        Golden { dir, path }
    }

    /// A golden that is a copy of another image.
    pub fn copy_of(image: &Path) -> Golden {
        let dir = TempDir::new().expect("temporary directory");
        let path = dir.path().join("golden.ext4");
        run("cp", &["--sparse=always", image.to_str().expect("utf-8"), path.to_str().expect("utf-8")]);
        Golden { dir, path }
    }

    pub fn region(&self) -> Region {
        let file = File::open(&self.path).expect("open golden");
        let len = file.metadata().expect("metadata").len();
        Region { file: Arc::new(file), offset: 0, len }
    }

    pub fn image(&self) -> Image {
        Image::open(&self.region()).expect("open image")
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&fs::read(&self.path).expect("read"))
    }

    pub fn edit(&self, request: &EditRequest) -> Result<BlockPatch> {
        edit(&self.region(), request, &Progress::default())
    }

    /// Edits, twice with the same result, applies the patch to a copy and lets e2fsck judge it.
    #[track_caller]
    pub fn edited(&self, request: &EditRequest) -> Edited {
        let patch = self.edit(request).unwrap_or_else(|error| panic!("{}", error.chain()));
        assert!(self.edit(request).expect("again") == patch, "the same input gives the same patch");
        self.apply(&patch)
    }

    #[track_caller]
    pub fn apply(&self, patch: &BlockPatch) -> Edited {
        self.apply_into(patch, self.dir.path())
    }

    /// The same, with the copy in a directory that may outlive the golden.
    #[track_caller]
    pub fn apply_into(&self, patch: &BlockPatch, dir: &Path) -> Edited {
        let path = dir.join("edited.ext4");
        run("cp", &["--sparse=always", self.path.to_str().expect("utf-8"), path.to_str().expect("utf-8")]);
        let file = File::options().write(true).open(&path).expect("open copy");
        file.set_len(patch.size_bytes()).expect("grow");
        for (number, block) in patch.iter() {
            assert!((number + 1) * PATCH_BLOCK <= patch.size_bytes(), "block {number} is behind the end");
            file.write_all_at(block, number * PATCH_BLOCK).expect("write");
        }
        let edited = Edited { path, keep: false };
        edited.fsck();
        edited
    }
}

/// A copy of a golden with a patch applied.
pub struct Edited {
    pub path: PathBuf,
    keep: bool,
}

impl Drop for Edited {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("KEEP_WRECK").is_some() {
            let kept = std::env::temp_dir().join("wreck.ext4");
            let _ = fs::copy(&self.path, &kept);
            eprintln!("kept {}", kept.display());
        }
        if !self.keep {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Edited {
    /// An image that somebody else owns, to mount it.
    pub fn borrowed(image: &Path) -> Edited {
        Edited { path: image.to_path_buf(), keep: true }
    }

    pub fn str(&self) -> &str {
        self.path.to_str().expect("utf-8")
    }

    /// No e2fsck may find anything at all.
    #[track_caller]
    pub fn fsck(&self) {
        e2fsck::assert_clean(&self.path);
    }

    pub fn image(&self) -> Image {
        let file = File::open(&self.path).expect("open");
        let len = file.metadata().expect("metadata").len();
        Image::open(&Region { file: Arc::new(file), offset: 0, len }).expect("open image")
    }

    /// Content of a file through our reader.
    #[track_caller]
    pub fn read(&self, path: &str) -> Vec<u8> {
        let image = self.image();
        let ino = image.lookup(&guest(path)).expect("lookup").unwrap_or_else(|| panic!("{path} is not there"));
        image.read_file(ino, 1 << 30).expect("read")
    }

    /// Content of a file as debugfs sees it.
    pub fn debugfs_cat(&self, path: &str) -> Vec<u8> {
        run("debugfs", &["-R", &format!("cat \"{path}\""), self.str()]).stdout
    }

    pub fn debugfs(&self, request: &str) -> String {
        text(&run("debugfs", &["-R", request, self.str()]).stdout)
    }

    /// Mounted by the kernel; unmounted when dropped.
    #[track_caller]
    pub fn mount(&self, options: &str) -> Mount {
        let dir = TempDir::new().expect("temporary directory");
        run("mount", &["-t", "ext4", "-o", &format!("loop,{options}"), self.str(), dir.path().to_str().expect("utf-8")]);
        Mount { dir: Some(dir) }
    }
}

pub struct Mount {
    dir: Option<TempDir>,
}

impl Mount {
    pub fn path(&self) -> &Path {
        self.dir.as_ref().expect("mounted").path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Some(dir) = self.dir.take() {
            // Busy while a child of another test thread, between fork and exec, still holds a file of it.
            for _ in 0..100 {
                let output = Command::new("umount").arg(dir.path()).output();
                if output.is_ok_and(|output| output.status.success()) {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            // Never remove what is below a mount that stayed.
            eprintln!("{} stays mounted", dir.keep().display());
        }
    }
}

/// What the kernel shows of a path: type and permission bits, owner, size, link count, content or link target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub mode: u32,
    pub owner: (u32, u32),
    pub links: u64,
    pub content: Vec<u8>,
}

/// Everything in a mounted tree, by path.
pub fn survey(root: &Path) -> BTreeMap<String, Seen> {
    let mut all = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let content = if meta.is_dir() {
            todo.extend(fs::read_dir(&path).expect("readdir").map(|entry| entry.expect("entry").path()));
            Vec::new()
        } else if meta.is_symlink() {
            std::os::unix::ffi::OsStringExt::into_vec(fs::read_link(&path).expect("readlink").into_os_string())
        } else if meta.is_file() {
            fs::read(&path).expect("read")
        } else {
            meta.rdev().to_string().into_bytes()
        };
        let name = format!("/{}", path.strip_prefix(root).expect("below the root").display());
        all.insert(name, Seen { mode: meta.mode(), owner: (meta.uid(), meta.gid()), links: meta.nlink(), content });
    }
    all
}

pub fn guest(path: &str) -> GuestPath {
    GuestPath::new(path).expect("a path")
}

pub fn request(ops: Vec<(&str, EditOp)>) -> EditRequest {
    let edits = ops.into_iter().map(|(path, op)| Edit { path: guest(path), op, why: "a test".into(), secret: false }).collect();
    EditRequest { edits, now: NOW, ..EditRequest::default() }
}

pub fn write(content: impl Into<Vec<u8>>) -> EditOp {
    EditOp::WriteFile { content: content.into(), attrs: Attrs::root(0o644) }
}

pub fn append(content: impl Into<Vec<u8>>) -> EditOp {
    EditOp::AppendFile { content: content.into() }
}

pub fn mkdir(mode: u16) -> EditOp {
    EditOp::MakeDir { attrs: Attrs::root(mode) }
}

pub fn link(target: &str) -> EditOp {
    EditOp::Symlink { target: target.into(), attrs: Attrs::root(0o777) }
}

pub fn rename(to: &str) -> EditOp {
    EditOp::Rename { to: guest(to) }
}

/// Writes a line to the test's output, measured or observed.
pub fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
