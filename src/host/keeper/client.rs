//! The daemon's side.

use std::{
    fs::File,
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::OnceLock,
    time::Duration,
};

use super::wire::{Question, Reply, Request, Then, VERSION, receive, send};
use crate::{
    error::{Error, Result, Stage},
    host::{block::Access, in_use::Opened, loops::Options},
    target::DeviceId,
};

/// How long an answer may take: detaching and attaching wait for others, up to some ten seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

static SOCKET: OnceLock<PathBuf> = OnceLock::new();

/// From now on this process leaves to the keeper that listens on `socket` what takes privileges. Workers that it starts are not this process.
///
/// It is asked whether it is there and of this version.
pub fn use_keeper(socket: &Path) -> Result<()> {
    let keeper = Keeper(SOCKET.get_or_init(|| socket.to_owned()));
    match keeper.ask(Request::Hello, [])? {
        (_, Reply::Done, _) => Ok(()),
        (_, other, _) => Err(keeper.unexpected(&other)),
    }
}

/// The keeper, if this process has one.
pub(in crate::host) fn keeper() -> Option<Keeper> {
    SOCKET.get().map(|socket| Keeper(socket))
}

#[derive(Debug, Clone, Copy)]
pub(in crate::host) struct Keeper(&'static Path);

/// A device that the keeper has claimed for this process.
#[derive(Debug)]
pub(in crate::host) struct Claimed {
    pub file: File,
    pub direct: Option<File>,
    pub named: PathBuf,
    pub node: PathBuf,
    pub id: DeviceId,
    pub size_bytes: u64,
}

impl Keeper {
    fn ask<'d>(self, request: Request, descriptors: impl IntoIterator<Item = BorrowedFd<'d>>) -> Result<(UnixStream, Reply, Vec<OwnedFd>)> {
        let failed = |doing: &'static str| move |error| Error::io(Stage::Host, self.0.display().to_string(), doing, error);
        let socket = UnixStream::connect(self.0).map_err(|error| failed("reach the keeper")(error).with_hint("start cloudletd-keeper"))?;
        for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
            set(&socket, Some(ANSWER_TIMEOUT)).map_err(failed("set a timeout"))?;
        }
        match send(&socket, &Question { version: VERSION.to_owned(), request }, descriptors) {
            // One that refuses this user says so before it hears anything.
            Err(error) if !matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => return Err(failed("ask")(error)),
            _ => {}
        }
        let (reply, descriptors) = self.answer(&socket)?;
        Ok((socket, reply, descriptors))
    }

    fn answer(self, socket: &UnixStream) -> Result<(Reply, Vec<OwnedFd>)> {
        match receive(socket) {
            Ok(Some((Reply::Failed(failure), _))) => Err(failure.into_error()),
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(Error::internal(Stage::Host, self.0.display().to_string(), "the keeper closed the connection without an answer")),
            Err(error) => Err(Error::io(Stage::Host, self.0.display().to_string(), "receive the keeper's answer", error)),
        }
    }

    fn unexpected(self, reply: &Reply) -> Error {
        Error::internal(Stage::Host, self.0.display().to_string(), format!("the keeper's answer was {reply:?}"))
    }

    pub fn claim(self, directory: &Path, name: &str, access: Access) -> Result<Claimed> {
        match self.ask(Request::Claim { directory: directory.to_owned(), name: name.to_owned(), access }, [])? {
            (_, Reply::Claimed { named, node, id, size_bytes }, passed) => {
                let mut files = passed.into_iter().map(File::from);
                let file = files.next().ok_or_else(|| Error::internal(Stage::Host, self.0.display().to_string(), "the keeper passed no device"))?;
                Ok(Claimed { file, direct: files.next(), named, node, id, size_bytes })
            }
            (_, other, _) => Err(self.unexpected(&other)),
        }
    }

    pub fn look(self, directory: &Path, name: &str) -> Result<File> {
        match self.ask(Request::Look { directory: directory.to_owned(), name: name.to_owned() }, [])? {
            (_, Reply::Looked, mut passed) if passed.len() == 1 => Ok(File::from(passed.remove(0))),
            (_, other, _) => Err(self.unexpected(&other)),
        }
    }

    pub fn attach(self, backing: &File, name: &Path, options: &Options) -> Result<KeptLoop> {
        match self.ask(Request::Attach { options: *options, name: name.to_owned() }, [backing.as_fd()])? {
            (connection, Reply::Attached { path, is_direct }, _) => Ok(KeptLoop { keeper: self, connection, path, is_direct }),
            (_, other, _) => Err(self.unexpected(&other)),
        }
    }

    pub fn loops_of(self, (device, inode): (u64, u64)) -> Result<Vec<PathBuf>> {
        match self.ask(Request::LoopsOf { device, inode }, [])? {
            (_, Reply::Devices(devices), _) => Ok(devices),
            (_, other, _) => Err(self.unexpected(&other)),
        }
    }

    pub fn detach(self, path: &Path) -> Result<()> {
        match self.ask(Request::Detach { path: path.to_owned() }, [])? {
            (_, Reply::Done, _) => Ok(()),
            (_, other, _) => Err(self.unexpected(&other)),
        }
    }

    pub fn opener(self, of: &Opened) -> Result<Option<String>> {
        match self.ask(Request::Opener { of: of.clone() }, [])? {
            (_, Reply::Opener(opener), _) => Ok(opener),
            (_, other, _) => Err(self.unexpected(&other)),
        }
    }

    pub fn start(self, subcommand: &str, stdin: &OwnedFd, stdout: &OwnedFd) -> Result<KeptChild> {
        match self.ask(Request::Start { subcommand: subcommand.to_owned() }, [stdin.as_fd(), stdout.as_fd()])? {
            (connection, Reply::Started, _) => {
                connection.set_read_timeout(None).map_err(|error| Error::io(Stage::Host, self.0.display().to_string(), "set a timeout", error))?;
                Ok(KeptChild { connection })
            }
            (_, other, _) => Err(self.unexpected(&other)),
        }
    }
}

/// A loop device that ends with the connection unless it is kept.
#[derive(Debug)]
pub(in crate::host) struct KeptLoop {
    keeper: Keeper,
    connection: UnixStream,
    pub path: PathBuf,
    pub is_direct: bool,
}

impl KeptLoop {
    pub fn keep(self) -> Result<()> {
        self.then(&Then::Keep)
    }

    pub fn close(self) -> Result<()> {
        self.then(&Then::Close)
    }

    fn then(self, what: &Then) -> Result<()> {
        send(&self.connection, what, []).map_err(|error| Error::io(Stage::Host, self.path.display().to_string(), "ask the keeper", error))?;
        match self.keeper.answer(&self.connection)? {
            (Reply::Done, _) => Ok(()),
            (other, _) => Err(self.keeper.unexpected(&other)),
        }
    }
}

/// A process that was started by the keeper, and ends with the connection.
#[derive(Debug)]
pub(in crate::host) struct KeptChild {
    connection: UnixStream,
}

impl KeptChild {
    /// What kills it when it is shut down for writing.
    pub fn leash(&self) -> io::Result<Leash> {
        self.connection.try_clone().map(Leash)
    }

    pub fn wait(self) -> io::Result<ExitStatus> {
        match receive(&self.connection)? {
            Some((Reply::Ended { status }, _)) => Ok(ExitStatus::from_raw(status)),
            Some((other, _)) => Err(io::Error::other(format!("the keeper's answer was {other:?}"))),
            // A keeper that died took its children with it.
            None => Ok(ExitStatus::from_raw(libc::SIGKILL)),
        }
    }
}

#[derive(Debug)]
pub(in crate::host) struct Leash(UnixStream);

impl Leash {
    pub fn kill(&self) -> io::Result<()> {
        self.0.shutdown(Shutdown::Write)
    }
}
