//! Every version of e2fsck there is: the host's, and those of other Debian releases. What one of them finds, a guest of that release would find.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::OnceLock,
};

use super::fixture;

/// Releases besides the host's: Debian 11 with e2fsprogs 1.46, Debian 13 with 1.47.2.
const SUITES: [&str; 2] = ["bullseye", "trixie"];
/// Where the superblock has `s_feature_compat`, and `COMPAT_ORPHAN_FILE` in it, which came with e2fsprogs 1.47.
const FEATURE_COMPAT_AT: u64 = 1024 + 0x5c;
const ORPHAN_FILE: u32 = 0x1000;

/// One e2fsck.
pub struct Judge {
    command: Vec<PathBuf>,
    /// What it says of itself, e.g. `e2fsck 1.46.2 (28-Feb-2021)`.
    pub version: String,
}

impl Judge {
    fn new(command: Vec<PathBuf>) -> Judge {
        let mut judge = Judge { command, version: String::new() };
        let output = judge.run(&["-V".as_ref()]);
        judge.version = String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_owned();
        assert!(output.status.success() && judge.version.starts_with("e2fsck 1."), "{:?}: {}", judge.command, judge.version);
        judge
    }

    #[track_caller]
    fn run(&self, args: &[&Path]) -> Output {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).args(args).env("LC_ALL", "C").stdin(Stdio::null());
        command.output().unwrap_or_else(|error| panic!("{:?} is needed for this test: {error}", self.command))
    }

    fn knows(&self, image: &Path) -> bool {
        let mut word = [0; 4];
        File::open(image).and_then(|file| file.read_exact_at(&mut word, FEATURE_COMPAT_AT)).expect("read the superblock");
        u32::from_le_bytes(word) & ORPHAN_FILE == 0 || !self.version.starts_with("e2fsck 1.46")
    }
}

/// All of them, the host's first.
#[track_caller]
pub fn judges() -> &'static [Judge] {
    static JUDGES: OnceLock<Vec<Judge>> = OnceLock::new();
    JUDGES.get_or_init(|| {
        let host = ["/usr/sbin/e2fsck", "/sbin/e2fsck"].map(PathBuf::from).into_iter().find(|path| path.exists());
        let host = Judge::new(vec![host.expect("e2fsprogs is installed")]);
        let others = SUITES.into_iter().map(|suite| Judge::new(fixture::e2fsck_of(suite)));
        std::iter::once(host).chain(others).collect()
    })
}

/// `e2fsck -fn` of every version that knows the image's features must find nothing at all.
#[track_caller]
pub fn assert_clean(image: &Path) {
    for judge in judges().iter().filter(|judge| judge.knows(image)) {
        let output = judge.run(&["-fn".as_ref(), image]);
        let text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned();
        assert_eq!(output.status.code(), Some(0), "{}: {text}", judge.version);
    }
}

/// The host's `e2fsck -fn` must find something. Gives what it says.
#[track_caller]
pub fn assert_damaged(image: &Path) -> String {
    let output = judges()[0].run(&["-fn".as_ref(), image]);
    let text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned();
    assert_ne!(output.status.code(), Some(0), "finds nothing: {text}");
    text
}
