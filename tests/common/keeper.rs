//! A keeper, and daemons of a user without privileges behind it.

use std::{
    fs::{self, File},
    os::unix::{fs::lchown, net::UnixStream, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Whom a daemon without privileges runs as: nobody else does.
pub const KEPT_USER: u32 = 64_077;
/// How long the keeper may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A running keeper. Dropping it kills it (SIGKILL).
pub struct Keeper {
    child: Child,
}

impl Keeper {
    /// The table of a configuration for daemons in `directory`, with `more` in it.
    pub fn table(directory: &Path, more: &str) -> String {
        format!("[keeper]\nsocket = {:?}\nuser = \"{KEPT_USER}\"\n{more}", directory.join("keeper"))
    }

    /// Starts one with the configuration `cloudletd.toml` of `directory`.
    #[track_caller]
    pub fn start(directory: &Path) -> Keeper {
        let log = File::options().append(true).create(true).open(directory.join("keeper.log")).expect("open the keeper's log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_cloudletd"));
        command.args(["keeper", "--config"]).arg(directory.join("cloudletd.toml")).env_remove("NOTIFY_SOCKET").env_remove("LISTEN_FDS");
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().expect("share the log")).stderr(log).spawn().expect("run cloudletd keeper");
        let mut keeper = Keeper { child };
        let deadline = Instant::now() + START_TIMEOUT;
        // Root may connect, and is refused then.
        while UnixStream::connect(directory.join("keeper")).is_err() {
            let lives = keeper.child.try_wait().expect("wait for the keeper").is_none();
            assert!(lives && Instant::now() < deadline, "{}", fs::read_to_string(directory.join("keeper.log")).unwrap_or_default());
            std::thread::sleep(Duration::from_millis(10));
        }
        keeper
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The daemon as the user without privileges, of a copy of the program in `directory`: that user may not be able to read the other.
#[track_caller]
pub fn kept_command(directory: &Path) -> Command {
    let program = directory.join("cloudletd");
    if !program.exists() {
        // By another process: what a thread of this one starts meanwhile would have it open for writing, and nobody could execute it (ETXTBSY).
        let copied = Command::new("install").args(["-m", "755", env!("CARGO_BIN_EXE_cloudletd")]).arg(&program).status();
        assert!(copied.is_ok_and(|status| status.success()), "copy the program");
    }
    let mut command = Command::new(program);
    command.uid(KEPT_USER).gid(KEPT_USER);
    command
}

/// Gives a directory and what is in it to the user without privileges.
#[track_caller]
pub fn give_away(path: &Path) {
    lchown(path, Some(KEPT_USER), Some(KEPT_USER)).unwrap_or_else(|error| panic!("chown {}: {error}", path.display()));
    if fs::symlink_metadata(path).expect("stat").is_dir() {
        fs::read_dir(path).expect("list").for_each(|entry| give_away(&entry.expect("entry").path()));
    }
}

/// `file`, or a copy of it, in `directory`.
#[track_caller]
pub fn copy_into(directory: &Path, file: &Path) -> PathBuf {
    let copy = directory.join(file.file_name().expect("a file's name"));
    if !copy.exists() {
        fs::hard_link(file, &copy).or_else(|_| fs::copy(file, &copy).map(drop)).expect("copy a file");
    }
    copy
}
