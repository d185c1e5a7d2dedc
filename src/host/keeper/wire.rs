//! What daemon and keeper say: a byte with descriptors, the length of a JSON document (u32, little-endian), the document.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    error::{Error, Kind, Stage},
    host::{
        block::Access,
        descriptors::{pass, passed},
        in_use::Opened,
        loops::Options,
    },
    target::DeviceId,
};

/// Bytes of a document: a few paths.
const DOCUMENT_BYTES_MAX: u32 = 64 << 10;

/// Both are one package; what one says means the same to the other only when they are of one version.
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The first thing that is said over a connection.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Question {
    /// [`VERSION`].
    pub version: String,
    pub request: Request,
}

/// What is asked for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Whether there is a keeper.
    Hello,
    /// See [`crate::host::block::Claim::take`]. The allow-list is the keeper's own.
    Claim { directory: PathBuf, name: String, access: Access },
    /// See [`crate::host::block::look`].
    Look { directory: PathBuf, name: String },
    /// See [`crate::host::loops::LoopDevice::attach`]. The file is passed; what follows is a [`Then`].
    Attach { options: Options, name: PathBuf },
    /// The loop devices that are bound to a file, by device and inode.
    LoopsOf { device: u64, inode: u64 },
    /// See [`crate::host::loops::detach`].
    Detach { path: PathBuf },
    /// See [`crate::host::in_use`].
    Opener { of: Opened },
    /// Starts a worker by its subcommand; standard input and output are passed. The end of the connection is the end of the worker.
    Start { subcommand: String },
}

/// What becomes of a loop device that was attached. The end of the connection detaches it, too.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Then {
    /// It stays.
    Keep,
    /// It is flushed and detached.
    Close,
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    Done,
    /// The device is passed, and for writing a second descriptor for direct I/O when it is one of a device pool.
    Claimed {
        named: PathBuf,
        node: PathBuf,
        id: DeviceId,
        size_bytes: u64,
    },
    /// The device is passed.
    Looked,
    Attached {
        path: PathBuf,
        is_direct: bool,
    },
    Devices(Vec<PathBuf>),
    Opener(Option<String>),
    Started,
    /// The worker's wait status.
    Ended {
        status: i32,
    },
    Failed(Failure),
}

/// An error on its way.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    kind: String,
    stage: String,
    object: String,
    message: String,
    reason: String,
    hint: Option<String>,
}

/// Reasons that the keeper gives beside those that follow from the kind.
const REASONS: [&str; 5] = ["DEVICE_CHANGED", "DEVICE_IN_USE", "DEVICE_NOT_ALLOWED", "IN_USE", "NOT_A_BLOCK_DEVICE"];
const STAGES: [Stage; 2] = [Stage::Host, Stage::Target];

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        let chain = error.chain();
        let message = chain.strip_prefix(&format!("{}: ", error.object())).unwrap_or(&chain).to_owned();
        let (kind, stage) = (format!("{:?}", error.kind()), error.stage().name().to_owned());
        Failure { kind, stage, object: error.object().to_owned(), message, reason: error.reason().to_owned(), hint: error.hint().map(str::to_owned) }
    }
}

impl Failure {
    pub fn into_error(self) -> Error {
        let stage = STAGES.into_iter().find(|stage| stage.name() == self.stage).unwrap_or(Stage::Host);
        let error = Error::new(Kind::told(&self.kind), stage, self.object, self.message).with_told_reason(&REASONS, &self.reason);
        match self.hint {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }
}

pub(super) fn send<'d>(socket: &UnixStream, document: &impl Serialize, descriptors: impl IntoIterator<Item = BorrowedFd<'d>>) -> io::Result<()> {
    let text = serde_json::to_vec(document)?;
    let len = u32::try_from(text.len()).ok().filter(|len| *len <= DOCUMENT_BYTES_MAX).ok_or_else(|| io::Error::from_raw_os_error(libc::EMSGSIZE))?;
    pass(socket, descriptors)?;
    (&mut &*socket).write_all(&[&len.to_le_bytes(), &text[..]].concat())
}

/// Nothing when the other end has closed.
pub(super) fn receive<T: DeserializeOwned>(socket: &UnixStream) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let Some(descriptors) = passed(socket)? else { return Ok(None) };
    let mut len = [0; 4];
    (&mut &*socket).read_exact(&mut len)?;
    let len = u32::from_le_bytes(len);
    if len > DOCUMENT_BYTES_MAX {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let mut text = vec![0; len as usize];
    (&mut &*socket).read_exact(&mut text)?;
    Ok(Some((serde_json::from_slice(&text)?, descriptors)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_the_same_on_the_other_side() {
        let error =
            Error::new(Kind::Conflict, Stage::Target, "/dev/vg/a", "is in use: it is mounted on /mnt").with_reason("IN_USE").with_hint("unmount it");
        let told = Failure::from(&error).into_error();
        assert_eq!((told.kind(), told.stage(), told.reason(), told.hint()), (error.kind(), error.stage(), error.reason(), error.hint()));
        assert_eq!(told.chain(), error.chain());
        let odd = Failure { kind: "Marvellous".into(), reason: "MADE_UP".into(), ..Failure::from(&error) }.into_error();
        assert_eq!((odd.kind(), odd.reason()), (Kind::Internal, "INTERNAL"));
    }

    #[test]
    fn documents_that_are_too_long_are_refused_before_they_are_read() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let long = send(&ours, &"x".repeat(DOCUMENT_BYTES_MAX as usize), []).expect_err("too long");
        assert_eq!(long.raw_os_error(), Some(libc::EMSGSIZE));
        (&ours).write_all(&[0, 0xff, 0xff, 0xff, 0xff]).expect("write");
        assert_eq!(receive::<Request>(&theirs).expect_err("refused").raw_os_error(), Some(libc::EMSGSIZE));
        drop(ours);
        assert!(receive::<Request>(&theirs).expect("the end").is_none());
    }
}
