//! A real `cloudletd` process with a state directory and a socket of its own.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use super::keeper::{Keeper, copy_into, give_away, kept_command};

/// How long the daemon may take to listen; its budget is 100 ms, the machine may be busy.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// How long it may take to drain after SIGTERM before the test calls it a bug.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// A running daemon. Dropping it stops it; [`Daemon::stop`] also checks how it ended.
pub struct Daemon {
    child: Option<Child>,
    /// The process with the privileges, of a daemon that has none.
    keeper: Option<Keeper>,
    directory: PathBuf,
    /// Removed with the daemon, when the daemon made it.
    owned: Option<tempfile::TempDir>,
    config: PathBuf,
}

impl Daemon {
    /// Starts one in a new temporary directory, with `config` (TOML, may be empty) added to what a private daemon needs: `state_dir`, the
    /// socket, and `file://` roots for the fixtures and its own directory.
    #[track_caller]
    pub fn start(config: &str) -> Self {
        let owned = tempfile::Builder::new().prefix("cloudletd-test-").tempdir().expect("make a temporary directory");
        let mut daemon = Self::start_in(owned.path(), config);
        daemon.owned = Some(owned);
        daemon
    }

    /// The same, as a user without privileges behind a keeper, with `keeper` added to its table.
    #[track_caller]
    pub fn start_kept(keeper: &str, config: &str) -> Self {
        let owned = tempfile::Builder::new().prefix("cloudletd-test-").tempdir().expect("make a temporary directory");
        let mut daemon = Self::configured(owned.path(), config, Some(keeper));
        daemon.owned = Some(owned);
        daemon
    }

    /// The same in a directory of the caller's choice, e.g. on a filesystem made for the test, or one an earlier daemon used.
    ///
    /// `config` is tables only, without `[listen]`; a `[fetch]` table in it gets the `file_roots` added. A pool named `default` lies in
    /// `state/volumes` below the directory when it names no pool.
    #[track_caller]
    pub fn start_in(directory: &Path, config: &str) -> Self {
        Self::configured(directory, config, None)
    }

    #[track_caller]
    fn configured(directory: &Path, config: &str, keeper: Option<&str>) -> Self {
        let directory = fs::canonicalize(directory).expect("the daemon's directory exists");
        let path = directory.join("cloudletd.toml");
        let roots = [super::fixture::directory(), directory.clone()];
        let quoted: Vec<String> = roots.iter().map(|root| format!("{:?}", root.to_str().expect("test paths are UTF-8"))).collect();
        let file_roots = format!("[fetch]\nfile_roots = [{}]\n", quoted.join(", "));
        let tables = if config.contains("[fetch]\n") { config.replacen("[fetch]\n", &file_roots, 1) } else { format!("{file_roots}{config}") };
        let is_kept = keeper.is_some();
        let keeper = keeper.map(|more| Keeper::table(&directory, more)).unwrap_or_default();
        let text = format!("state_dir = {:?}\n[listen]\nunix = {:?}\n{keeper}{tables}\n", directory.join("state"), directory.join("sock"));
        fs::write(&path, text).expect("write the configuration");
        let mut daemon = Self { child: None, keeper: None, directory, owned: None, config: path };
        if is_kept {
            give_away(&daemon.directory);
            daemon.start_keeper();
        }
        daemon.spawn();
        daemon
    }

    /// Starts the process again in the same directory, after [`Daemon::stop`] or [`Daemon::kill`].
    #[track_caller]
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "the daemon is still running");
        self.spawn();
    }

    /// Starts the keeper of a kept daemon, again if it was killed.
    #[track_caller]
    pub fn start_keeper(&mut self) {
        self.keeper = Some(Keeper::start(&self.directory));
    }

    /// Kills the keeper (SIGKILL).
    pub fn kill_keeper(&mut self) {
        self.keeper = None;
    }

    /// The keeper's process id.
    pub fn keeper_pid(&self) -> u32 {
        self.keeper.as_ref().expect("the daemon is kept").pid()
    }

    /// The keeper's socket.
    pub fn keeper_socket(&self) -> PathBuf {
        self.directory.join("keeper")
    }

    #[track_caller]
    fn spawn(&mut self) {
        let mut log = File::options().append(true).create(true).open(self.directory.join("log")).expect("open the daemon's log");
        writeln!(log, "--- start").expect("write the daemon's log");
        let mut command = if self.keeper.is_some() { kept_command(&self.directory) } else { Command::new(env!("CARGO_BIN_EXE_cloudletd")) };
        let child = command
            .args(["serve", "--config"])
            .arg(&self.config)
            .env_remove("NOTIFY_SOCKET")
            .env_remove("LISTEN_FDS")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("share the log"))
            .stderr(log)
            .spawn()
            .expect("run cloudletd");
        let child = self.child.insert(child);
        let deadline = Instant::now() + START_TIMEOUT;
        let socket = self.directory.join("sock");
        while UnixStream::connect(&socket).is_err() {
            if let Some(status) = child.try_wait().expect("wait for cloudletd") {
                panic!("cloudletd ended with {status} before it listened:\n{}", self.log());
            }
            assert!(Instant::now() < deadline, "cloudletd does not listen on {}:\n{}", socket.display(), self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A file where the daemon's user may read it: itself, or a copy in the daemon's directory.
    #[track_caller]
    pub fn readable(&self, file: &Path) -> PathBuf {
        if self.keeper.is_none() { file.to_owned() } else { copy_into(&self.directory, file) }
    }

    /// Its unix socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("sock")
    }

    /// Its address as the operator scripts take it.
    pub fn address(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// The directory it lives in: `state`, `sock`, `log`, `cloudletd.toml`, and `state/volumes` when the configuration names no pool.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Directory of the pool named `default` when the configuration names no pool.
    pub fn default_pool(&self) -> PathBuf {
        self.directory.join("state/volumes")
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the daemon runs").id()
    }

    /// What it has logged since it was first started.
    pub fn log(&self) -> String {
        fs::read(self.directory.join("log")).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Resident memory in KiB, from /proc.
    pub fn resident_kib(&self) -> u64 {
        self.status_kib("VmRSS:")
    }

    /// Peak resident memory in KiB, from /proc.
    pub fn peak_resident_kib(&self) -> u64 {
        self.status_kib("VmHWM:")
    }

    fn status_kib(&self, key: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("read the daemon's status");
        let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("the kernel reports memory");
        line.trim().trim_end_matches(" kB").parse().expect("the kernel reports kilobytes")
    }

    /// Open file descriptors.
    pub fn open_descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("read the daemon's descriptors").count()
    }

    /// SIGTERM, then waits until it has drained.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.signal("TERM");
        let deadline = Instant::now() + STOP_TIMEOUT;
        let child = self.child.as_mut().expect("the daemon runs");
        loop {
            if let Some(status) = child.try_wait().expect("wait for cloudletd") {
                self.child = None;
                return status;
            }
            assert!(Instant::now() < deadline, "cloudletd does not stop:\n{}", fs::read_to_string(self.directory.join("log")).unwrap_or_default());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGKILL: what a crash looks like to the host.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill cloudletd");
            child.wait().expect("wait for cloudletd");
        }
    }

    #[track_caller]
    fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.pid().to_string()]).status().expect("run kill");
        assert!(status.success(), "cloudletd is gone:\n{}", self.log());
    }

    /// Runs an operator script from `scripts/` against it.
    #[track_caller]
    pub fn script(&self, name: &str, arguments: &[&str]) -> Output {
        Command::new(script_path(name))
            .args(arguments)
            .env("CLOUDLETD_ADDR", self.address())
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|error| panic!("run {name}: {error}"))
    }

    /// The same, and it has to succeed; returns what it printed.
    #[track_caller]
    pub fn script_ok(&self, name: &str, arguments: &[&str]) -> String {
        let output = self.script(name, arguments);
        assert!(
            output.status.success(),
            "{name} {arguments:?}: {}\n{}{}\n--- daemon ---\n{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        String::from_utf8(output.stdout).expect("scripts print UTF-8")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let Some(child) = self.child.as_mut() else { return };
        // A failing test is not made to wait for a drain, but loop devices are detached by a daemon that is asked to stop.
        let asked = Command::new("kill").args(["-s", "TERM", &child.id().to_string()]).status().is_ok_and(|status| status.success());
        let deadline = Instant::now() + Duration::from_secs(10);
        while asked && Instant::now() < deadline {
            if matches!(child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = child.kill();
        let _ = child.wait();
        if std::thread::panicking() {
            eprintln!("--- cloudletd's log ---\n{}", self.log());
        }
    }
}

/// Path of an operator script.
pub fn script_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name)
}
