//! A child process with mounts of its own.
//!
//! ```text
//!  daemon                                         child (the same program, started again)
//!  Worker::spawn ── stdin: one file ─────────────► enter_private()   before it has a second thread
//!       │        ◄─ stdout: a socket pair ───────► … mounts, works, unmounts …
//!       ├─ finish()  waits for its end
//!       └─ Drop      closes the socket, waits a while, kills
//! ```
//!
//! The daemon never mounts anything itself: what the child mounts is in its own mount namespace, invisible to the host, and the kernel takes it away
//! with the child's last process. The child dies with the daemon: it has a parent-death signal, and its socket reports the end of the stream.

use std::{
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::MetadataExt, net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread::JoinHandle,
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use rustix::fs::{FileType, Mode, makedev, mknodat};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use sys_mount::{FilesystemType, MountFlags, UnmountFlags};

use crate::{
    error::{Error, Kind, Result, Stage},
    host::{
        command::SEARCH_PATH,
        keeper::client::{KeptChild, Leash, keeper},
        sys,
    },
};

/// What glibc's allocator (mallopt(3)) would find out by opening files, which ends a confined process: how many processors there are, when the ninth thread
/// allocates (malloc/arena.c, arena_get2); whether memory is overcommitted, when a thread's heap shrinks (sysdeps/unix/sysv/linux/malloc-sysdep.h).
const ALLOCATOR: [(&str, &str); 2] = [("MALLOC_ARENA_MAX", "8"), ("MALLOC_TRIM_THRESHOLD_", "4611686018427387904")];
/// How long an abandoned worker may take to unmount and go before it is killed.
const ABANDON_GRACE: Duration = Duration::from_secs(10);

/// What a child is killed by.
#[derive(Debug)]
enum Process {
    Own(OwnedFd),
    Kept(Leash),
}

impl Process {
    /// The only error is that it has ended.
    fn kill(&self) {
        let _ended = match self {
            Process::Own(pidfd) => pidfd_send_signal(pidfd.as_fd(), Signal::KILL).map_err(io::Error::from),
            Process::Kept(leash) => leash.kill(),
        };
    }
}

/// A running child that speaks over a socket.
#[derive(Debug)]
pub struct Worker {
    socket: UnixStream,
    process: Process,
    ended: Receiver<io::Result<ExitStatus>>,
    waiter: Option<JoinHandle<()>>,
    name: String,
}

impl Worker {
    /// Starts `program` with `arguments`, `stdin` as its standard input and the other end of [`Worker::socket`] as its standard output. Standard error
    /// is the daemon's own, for panics; the environment is `LC_ALL=C` and `PATH`; the working directory `/`. With a keeper it is the keeper's child and
    /// program.
    pub fn spawn(program: &Path, arguments: &[&str], stdin: OwnedFd) -> Result<Self> {
        let name = format!("{} {}", program.display(), arguments.join(" "));
        let failed = |doing: &str, error| Error::io(Stage::Host, name.clone(), doing, error);
        let (socket, theirs) = UnixStream::pair().map_err(|error| failed("make a socket pair", error))?;
        let theirs = OwnedFd::from(theirs);
        let (started, wait_start) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let thread = std::thread::Builder::new().name("mount-worker".into());
        let waiter = match keeper() {
            Some(keeper) => {
                let child = keeper.start(arguments.first().copied().unwrap_or_default(), &stdin, &theirs)?;
                // The child's end must be the only one.
                drop((stdin, theirs));
                thread.spawn(move || wait_for_kept(child, &started, &end))
            }
            None => {
                let command = worker_command(program, arguments, stdin, theirs);
                // The parent-death signal comes when the *thread* that made the child ends; this one waits for the child, whatever becomes of the caller's.
                thread.spawn(move || start_and_wait(command, &started, &end))
            }
        };
        let waiter = waiter.map_err(|error| failed("start a thread", error))?;
        let process = match wait_start.recv() {
            Ok(Ok(process)) => process,
            Ok(Err(error)) => return Err(failed("start", error)),
            Err(_) => return Err(Error::internal(Stage::Host, name, "the thread that starts it died")),
        };
        Ok(Worker { socket, process, ended, waiter: Some(waiter), name })
    }

    /// Our end of the conversation.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Says that nothing more will be sent, and waits for the worker's end. `Timeout`: it did not end, and was killed.
    pub fn finish(mut self, timeout: Duration) -> Result<ExitStatus> {
        // It may be gone already, and its end of the socket with it.
        let _gone = self.socket.shutdown(Shutdown::Write);
        match self.ended.recv_timeout(timeout) {
            Ok(status) => {
                self.join();
                status.map_err(|error| Error::io(Stage::Host, self.name.clone(), "wait for its end", error))
            }
            Err(RecvTimeoutError::Timeout) => {
                self.kill();
                Err(Error::new(Kind::Timeout, Stage::Host, self.name.clone(), format!("had not ended after {} s and was killed", timeout.as_secs())))
            }
            Err(RecvTimeoutError::Disconnected) => Err(Error::internal(Stage::Host, self.name.clone(), "the thread that waits for it died")),
        }
    }

    /// Waits `patience` for the worker's end, then kills it; says how it ended.
    pub fn abort(mut self, patience: Duration) -> Result<ExitStatus> {
        let failed = |name: &str, error| Error::io(Stage::Host, name, "wait for its end", error);
        match self.ended.recv_timeout(patience) {
            Ok(status) => {
                self.join();
                return status.map_err(|error| failed(&self.name, error));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                self.join();
                return Err(Error::internal(Stage::Host, self.name.clone(), "the thread that waits for it died"));
            }
        }
        self.process.kill();
        match self.ended.recv_timeout(ABANDON_GRACE) {
            Ok(status) => {
                self.join();
                status.map_err(|error| failed(&self.name, error))
            }
            Err(_) => {
                // Inside a system call that does not end. Its thread stays until it does.
                self.waiter = None;
                Err(Error::new(Kind::Timeout, Stage::Host, self.name.clone(), "was killed and does not end"))
            }
        }
    }

    fn kill(&mut self) {
        self.process.kill();
        match self.ended.recv_timeout(ABANDON_GRACE) {
            Err(RecvTimeoutError::Timeout) => {
                // Inside a system call that does not end, on a disk that does not answer. Its thread stays until it does.
                tracing::error!(worker = %self.name, "a killed worker does not end; what it mounted stays until then");
                self.waiter = None;
            }
            Ok(_) | Err(RecvTimeoutError::Disconnected) => self.join(),
        }
    }

    fn join(&mut self) {
        if let Some(waiter) = self.waiter.take()
            && waiter.join().is_err()
        {
            tracing::error!(worker = %self.name, "the thread that waits for a worker panicked");
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.waiter.is_none() {
            return;
        }
        // A worker that sees the end of the stream unmounts in order and goes.
        let _gone = self.socket.shutdown(Shutdown::Both);
        match self.ended.recv_timeout(ABANDON_GRACE) {
            Err(RecvTimeoutError::Timeout) => {
                tracing::warn!(worker = %self.name, "an abandoned worker did not end by itself and is killed");
                self.kill();
            }
            Ok(_) | Err(RecvTimeoutError::Disconnected) => self.join(),
        }
    }
}

/// How a worker is started: see [`Worker::spawn`].
pub(super) fn worker_command(program: &Path, arguments: &[&str], stdin: OwnedFd, stdout: OwnedFd) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("LC_ALL", "C").env("PATH", SEARCH_PATH.join(":")).current_dir("/");
    command.envs(ALLOCATOR);
    command.stdin(Stdio::from(stdin)).stdout(Stdio::from(stdout)).process_group(0);
    sys::kill_with_parent(&mut command);
    sys::inherit_nothing(&mut command);
    command
}

type Started = mpsc::Sender<io::Result<Process>>;
type End = mpsc::Sender<io::Result<ExitStatus>>;

fn start_and_wait(mut command: Command, started: &Started, end: &End) {
    let child = command.spawn();
    // The command holds our copies of the child's descriptors; the child's end must be the only one.
    drop(command);
    match child {
        Ok(mut child) => {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH));
            let opened = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from));
            let usable = opened.is_ok();
            if started.send(opened.map(Process::Own)).is_err() || !usable {
                // Nobody is there to watch it; the error that matters has been sent.
                let _gone = child.kill();
            }
            let _nobody_waits = end.send(child.wait());
        }
        Err(error) => {
            let _nobody_waits = started.send(Err(error));
        }
    }
}

/// A child that nobody watches ends with its connection, here.
fn wait_for_kept(child: KeptChild, started: &Started, end: &End) {
    let leash = child.leash();
    let usable = leash.is_ok();
    if started.send(leash.map(Process::Kept)).is_ok() && usable {
        let _nobody_waits = end.send(child.wait());
    }
}

/// Gives this process a mount namespace of its own, from which nothing propagates to the host's. Must be called while the process has one thread:
/// unshare(2) moves only the calling one.
pub fn enter_private() -> Result<()> {
    let object = "mount namespace";
    let threads = std::fs::read_dir("/proc/self/task").map_err(|error| Error::io(Stage::Host, object, "count threads", error))?.count();
    if threads != 1 {
        return Err(Error::internal(Stage::Host, object, format!("a process with {threads} threads can't move to a namespace of its own")));
    }
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| {
        Error::errno(Stage::Host, object, "make a private one", errno).with_hint("the daemon needs CAP_SYS_ADMIN for filesystems other than ext4")
    })?;
    let none: Option<&str> = None;
    // Slave, not private: what the host unmounts meanwhile is unmounted here too, instead of being kept busy by this process.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).map_err(|errno| Error::errno(Stage::Host, object, "cut propagation", errno))
}

/// Something mounted by this process in its private namespace.
#[derive(Debug)]
pub struct PrivateMount {
    target: PathBuf,
    mounted: bool,
}

impl PrivateMount {
    /// Mounts `source` with the filesystem `kind` and its options `data` on `target`: no device nodes, no set-user-id, no execution, no access times.
    pub fn new(source: &Path, target: &Path, kind: &str, data: &str) -> Result<Self> {
        Self::with_flags(source, target, kind, data, MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NOATIME)
    }

    /// The same for reading only: nothing is written to `source`.
    pub fn read_only(source: &Path, target: &Path, kind: &str, data: &str) -> Result<Self> {
        let quiet = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NOATIME;
        Self::with_flags(source, target, kind, data, quiet | MountFlags::RDONLY)
    }

    /// Covers `/dev` with one that has only `device` (a block device) and `null`. Tools that look through all devices of the host, as btrfs-progs do
    /// for a second filesystem of the same UUID, then find this one only, and can't touch another by mistake.
    pub fn only_device(device: &Path) -> Result<Self> {
        let failed = |doing: &str, error| Error::io(Stage::Host, device.display().to_string(), doing, error);
        let number = std::fs::metadata(device).map_err(|error| failed("stat", error))?.rdev();
        let devices = Path::new("/dev");
        let name = device.strip_prefix(devices).map_err(|_| Error::internal(Stage::Host, device.display().to_string(), "is not in /dev"))?;
        let mount = Self::with_flags(Path::new("tmpfs"), devices, "tmpfs", "size=64k,mode=755", MountFlags::NOSUID | MountFlags::NOEXEC)?;
        let directory = std::fs::File::open(devices).map_err(|error| failed("open the private /dev", error))?;
        for (name, kind, number) in [(name, FileType::BlockDevice, number), (Path::new("null"), FileType::CharacterDevice, makedev(1, 3))] {
            mknodat(&directory, name, kind, Mode::RUSR | Mode::WUSR, number).map_err(|errno| failed("make its private node", errno.into()))?;
        }
        Ok(mount)
    }

    fn with_flags(source: &Path, target: &Path, kind: &str, data: &str, flags: MountFlags) -> Result<Self> {
        let mut builder = sys_mount::Mount::builder().fstype(FilesystemType::from(kind)).flags(flags);
        if !data.is_empty() {
            builder = builder.data(data);
        }
        builder.mount(source, target).map_err(|error| {
            let error = Error::io(Stage::Host, source.display().to_string(), format!("mount as {kind}"), error);
            if error.kind() == Kind::NotFound { error.with_hint(format!("this host's kernel has no {kind}: load its module")) } else { error }
        })?;
        Ok(PrivateMount { target: target.to_owned(), mounted: true })
    }

    /// Where it is.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Unmounts and waits until everything is written. `Conflict`: something below is still open.
    pub fn unmount(mut self) -> Result<()> {
        self.mounted = false;
        sys_mount::unmount(&self.target, UnmountFlags::empty())
            .map_err(|error| Error::io(Stage::Host, self.target.display().to_string(), "unmount", error))
    }
}

impl Drop for PrivateMount {
    fn drop(&mut self) {
        if self.mounted
            && let Err(error) = sys_mount::unmount(&self.target, UnmountFlags::empty())
        {
            // It ends with the namespace.
            tracing::warn!(target = %self.target.display(), %error, "a private mount is left to the end of the process");
        }
    }
}
