//! The keeper itself: `cloudletd keeper`.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, lchown},
            net::{UnixListener, UnixStream},
            process::ExitStatusExt,
        },
    },
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::Arc,
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::{Gid, Uid, User, geteuid},
};
use rustix::{
    fs::Mode,
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::wire::{Failure, Question, Reply, Request, Then, VERSION, receive, send};
use crate::{
    config::{Config, PoolConfig},
    error::{Error, Kind, Result, Stage},
    fs::mounted::worker as mount_worker,
    host::{
        block::{self, Access, Claim},
        in_use,
        loops::{self, LoopDevice},
        namespace,
    },
    worker,
};

/// Connections at a time. Each loop device that is being attached and each worker has one.
const CONNECTIONS_MAX: usize = 512;
/// How long a question, once begun, may be on its way.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after an error of accept(2) that is about this process, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the configuration allows.
struct Places {
    /// Device pools: their directory and the patterns of their names.
    devices: Vec<(PathBuf, Vec<String>)>,
    /// Directories whose files may be behind loop devices: directory pools and the state directory.
    files: Vec<PathBuf>,
    /// Whether workers that mount are started.
    mounts: bool,
}

/// Serves the daemon of `config.keeper.user` until the process is killed; its children die with it.
///
/// The socket is the one that systemd passes (sd_listen_fds(3)), or made at `config.keeper.socket` for that user alone. `PermissionDenied`: this is not root.
pub fn run(config: &Config) -> Result<()> {
    if !geteuid().is_root() {
        return Err(Error::new(
            Kind::PermissionDenied,
            Stage::Config,
            "keeper",
            "has to be started by root: it keeps the privileges that the daemon has not",
        ));
    }
    let user = user(&config.keeper.user)?;
    let places = Arc::new(Places::new(config));
    let listener = listener(config, user)?;
    tracing::info!(user = %config.keeper.user, version = VERSION, "keeping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let connections = Arc::new(());
    loop {
        let socket = match listener.accept() {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!(%error, "accept a connection");
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let (places, counted) = (Arc::clone(&places), Arc::clone(&connections));
        let refused = (Arc::strong_count(&connections) > CONNECTIONS_MAX + 1).then(|| format!("{CONNECTIONS_MAX} connections are open, the limit"));
        let serve = move || {
            let _counted = counted;
            if let Err(error) = converse(&socket, user, &places, refused) {
                tracing::debug!(%error, "a conversation broke off");
            }
        };
        // Without a thread the connection closes, which the daemon takes for an error.
        if let Err(error) = std::thread::Builder::new().name("keeper".into()).spawn(serve) {
            tracing::warn!(%error, "start a thread");
        }
    }
}

fn user(name: &str) -> Result<(Uid, Gid)> {
    let failed = |why: String| Error::field(Stage::Config, "keeper.user", why);
    if let Ok(number) = name.parse() {
        return Ok((Uid::from_raw(number), Gid::from_raw(number)));
    }
    let found = User::from_name(name).map_err(|errno| failed(format!("look up {name:?}: {errno}")))?;
    found.map(|user| (user.uid, user.gid)).ok_or_else(|| failed(format!("this host has no user {name:?}")))
}

fn listener(config: &Config, (uid, gid): (Uid, Gid)) -> Result<UnixListener> {
    let passed = listenfd::ListenFd::from_env().take_unix_listener(0);
    if let Some(listener) = passed.map_err(|error| Error::io(Stage::Config, "keeper", "take the socket passed by the service manager", error))? {
        return Ok(listener);
    }
    let missing = || Error::field(Stage::Config, "keeper.socket", "is not set, and the service manager passes no socket");
    let path = config.keeper.socket.as_deref().ok_or_else(missing)?;
    let failed = |doing: &'static str| move |error| Error::io(Stage::Config, path.display().to_string(), doing, error);
    match fs::symlink_metadata(path) {
        // One that was killed left it. Two at a time are refused by bind(2) only after this, so it is asked first.
        Ok(metadata) if metadata.file_type().is_socket() && UnixStream::connect(path).is_err() => {
            fs::remove_file(path).map_err(failed("remove the stale socket"))?;
        }
        _ => {}
    }
    // Neither follows a link that somebody put in the socket's place meanwhile.
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path).map_err(failed("listen on the keeper's socket"));
    rustix::process::umask(before);
    let listener = listener?;
    lchown(path, Some(uid.as_raw()), Some(gid.as_raw())).map_err(failed("give the socket to the daemon's user"))?;
    Ok(listener)
}

/// One connection.
fn converse(socket: &UnixStream, (user, _): (Uid, Gid), places: &Places, refused: Option<String>) -> io::Result<()> {
    let peer = getsockopt(socket, PeerCredentials)?;
    let reply = |reply: &Reply| send(socket, reply, []);
    let refuse = |kind: Kind, why: String| reply(&Reply::Failed(Failure::from(&Error::new(kind, Stage::Host, "keeper", why))));
    if peer.uid() != user.as_raw() {
        tracing::warn!(uid = peer.uid(), pid = peer.pid(), "refused a process of another user");
        return refuse(Kind::PermissionDenied, format!("serves user {user} only, not {}", peer.uid()));
    }
    if let Some(why) = refused {
        return refuse(Kind::Busy, why);
    }
    socket.set_read_timeout(Some(QUESTION_TIMEOUT))?;
    socket.set_write_timeout(Some(QUESTION_TIMEOUT))?;
    let Some((Question { version, request }, passed)) = receive(socket)? else { return Ok(()) };
    if version != VERSION {
        return refuse(Kind::Unsupported, format!("is of version {VERSION}, the daemon of {version}: restart both"));
    }
    tracing::debug!(?request, "asked");
    match places.answer(socket, request, passed, peer.pid().unsigned_abs()) {
        Ok(()) => Ok(()),
        Err(Ended::Failed(error)) => {
            tracing::info!(error = %error.chain(), "refused or failed");
            reply(&Reply::Failed(Failure::from(&error)))
        }
        Err(Ended::Broken(error)) => Err(error),
    }
}

/// Why a conversation ended early.
enum Ended {
    /// The daemon hears why.
    Failed(Error),
    /// It can't be told.
    Broken(io::Error),
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Ended::Failed(error)
    }
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Ended::Broken(error)
    }
}

impl Places {
    fn new(config: &Config) -> Places {
        let mut places = Places { devices: Vec::new(), files: vec![config.state_dir.clone()], mounts: config.keeper.mounts };
        for pool in &config.pools {
            match pool.clone() {
                PoolConfig::Directory { path, .. } => places.files.push(path),
                PoolConfig::Devices { path, allow, .. } => places.devices.push((path, allow)),
            }
        }
        places
    }

    fn answer(&self, socket: &UnixStream, request: Request, passed: Vec<OwnedFd>, daemon: u32) -> std::result::Result<(), Ended> {
        let reply = |reply: &Reply| send(socket, reply, []);
        match request {
            Request::Hello => reply(&Reply::Done)?,
            Request::Claim { directory, name, access } => {
                let (allow, is_loop) = self.allowed(&directory, &name)?;
                let check = |device: &Path| if is_loop { self.check_loop(device, &backing_of(device)?) } else { Ok(()) };
                // Before another's is opened; and again, when nobody can bind it to another file any more.
                check(&directory.join(&name))?;
                let claim = Claim::take_for(Some(daemon), &directory, &allow, &name, access)?;
                check(claim.path())?;
                let direct = (access == Access::Write && !is_loop).then(|| claim.open_direct()).transpose()?;
                let descriptors = [claim.file().as_fd()].into_iter().chain(direct.as_ref().map(AsFd::as_fd));
                let (named, node) = (claim.path().to_owned(), claim.node().to_owned());
                send(socket, &Reply::Claimed { named, node, id: claim.id(), size_bytes: claim.size_bytes() }, descriptors)?;
            }
            Request::Look { directory, name } => {
                let allow = self.pool(&directory)?;
                let device = block::look(&block::device_path(&directory, allow, &name)?)?;
                send(socket, &Reply::Looked, [device.as_fd()])?;
            }
            Request::Attach { options, name } => {
                let [backing] = descriptors(passed)?;
                let backing = File::from(backing);
                if !backing.metadata()?.is_file() {
                    return Err(refused(name.display(), "is not a regular file").into());
                }
                attach(socket, LoopDevice::attach(&backing, &name, &options)?)?;
            }
            Request::LoopsOf { device, inode } => reply(&Reply::Devices(loops::find_by_inode((device, inode))?))?,
            Request::Detach { path } => {
                loops::detach_when(&path, |backing| self.check_loop(&path, backing))?;
                reply(&Reply::Done)?;
            }
            Request::Opener { of } => reply(&Reply::Opener(in_use::opener_but(&of, Some(daemon))))?,
            Request::Start { subcommand } => {
                let subcommand = match subcommand.as_str() {
                    worker::SUBCOMMAND => worker::SUBCOMMAND,
                    mount_worker::SUBCOMMAND if self.mounts => mount_worker::SUBCOMMAND,
                    mount_worker::SUBCOMMAND => return Err(refused(subcommand, "keeper.mounts is off: this host makes no xfs and btrfs").into()),
                    _ => return Err(refused(subcommand, "is not a worker").into()),
                };
                let [stdin, stdout] = descriptors(passed)?;
                start(socket, subcommand, stdin, stdout)?;
            }
        }
        Ok(())
    }

    /// The patterns of the device pool in `directory`.
    fn pool(&self, directory: &Path) -> Result<&[String]> {
        let pool = self.devices.iter().find(|(path, _)| path == directory);
        pool.map(|(_, allow)| allow.as_slice()).ok_or_else(|| refused(directory.display(), "is not a pool of devices in the keeper's configuration"))
    }

    /// Under which patterns a device may be claimed, and whether it is a loop device, over which file has to be looked at when it is.
    fn allowed(&self, directory: &Path, name: &str) -> Result<(Vec<String>, bool)> {
        match self.pool(directory) {
            Ok(allow) if directory != Path::new("/dev") || block::device_path(directory, allow, name).is_ok() => Ok((allow.to_vec(), false)),
            Err(error) if directory != Path::new("/dev") => Err(error),
            _ => Ok((vec!["loop*".to_owned()], true)),
        }
    }

    /// Refuses a loop device that is over a file elsewhere than in our directories, by their paths as they are configured: what a link leads to is another's.
    fn check_loop(&self, device: &Path, backing: &Path) -> Result<()> {
        if self.files.iter().any(|directory| backing.starts_with(directory)) {
            return Ok(());
        }
        Err(refused(device.display(), "its file is neither in a directory pool nor in the state directory of the keeper's configuration"))
    }
}

fn backing_of(device: &Path) -> Result<PathBuf> {
    let found = loops::attached()?.into_iter().find(|attached| attached.path == device);
    found.map(|attached| attached.backing).ok_or_else(|| refused(device.display(), "is not a loop device that is bound to a file"))
}

fn refused(what: impl std::fmt::Display, why: &str) -> Error {
    Error::new(Kind::PermissionDenied, Stage::Host, what.to_string(), why).with_reason("DEVICE_NOT_ALLOWED")
}

fn descriptors<const N: usize>(passed: Vec<OwnedFd>) -> Result<[OwnedFd; N]> {
    let found = passed.len();
    <[OwnedFd; N]>::try_from(passed)
        .map_err(|_| Error::internal(Stage::Host, "keeper", format!("{N} descriptors belong to the request, {found} came")))
}

/// Waits for what becomes of the device.
fn attach(socket: &UnixStream, device: LoopDevice) -> std::result::Result<(), Ended> {
    send(socket, &Reply::Attached { path: device.path().to_owned(), is_direct: device.is_direct()? }, [])?;
    // A volume is written and flushed between the two.
    socket.set_read_timeout(None)?;
    match receive(socket)? {
        Some((Then::Keep, _)) => drop(device.keep()?),
        Some((Then::Close, _)) => device.close()?,
        // The daemon is gone.
        None => return Ok(()),
    }
    Ok(send(socket, &Reply::Done, [])?)
}

/// Starts a worker and waits for its end, or for the end of the connection, which is its end too.
fn start(socket: &UnixStream, subcommand: &'static str, stdin: OwnedFd, stdout: OwnedFd) -> std::result::Result<(), Ended> {
    let failed = |doing: &'static str| move |error| Error::io(Stage::Host, subcommand, doing, error);
    let mut command = namespace::worker_command(Path::new("/proc/self/exe"), &[subcommand], stdin, stdout);
    let mut child = command.spawn().map_err(failed("start"))?;
    // It holds our copies of the child's descriptors; the daemon's end must be the only one.
    drop(command);
    let watched = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH));
    let watched = watched.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from));
    let told = watched.and_then(|pidfd| send(socket, &Reply::Started, []).and_then(|()| wait(socket.as_fd(), pidfd.as_fd())));
    if !matches!(told, Ok(Woken::Child)) {
        child.kill().map_err(failed("kill"))?;
    }
    let status: ExitStatus = child.wait().map_err(failed("wait for its end"))?;
    told?;
    Ok(send(socket, &Reply::Ended { status: status.into_raw() }, [])?)
}

enum Woken {
    Child,
    Connection,
}

fn wait(connection: BorrowedFd<'_>, pidfd: BorrowedFd<'_>) -> io::Result<Woken> {
    loop {
        let mut polled = [PollFd::new(connection, PollFlags::POLLIN), PollFd::new(pidfd, PollFlags::POLLIN)];
        match poll(&mut polled, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other?,
        };
        let is_woken = |polled: &PollFd<'_>| polled.revents().is_some_and(|events| !events.is_empty());
        if is_woken(&polled[1]) {
            return Ok(Woken::Child);
        }
        if is_woken(&polled[0]) {
            return Ok(Woken::Connection);
        }
    }
}
