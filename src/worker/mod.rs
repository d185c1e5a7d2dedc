//! The worker: foreign bytes are read in a process that can do nothing else.
//!
//! ```text
//!  daemon                                           cloudletd worker (nobody, no files, no network, no exec)
//!  opens tarball and disk
//!  Launcher::fill ── stdin: the tarball, read-only ─►
//!                 ── socket: disk (SCM_RIGHTS) ─────►   host::confine, its first half: no privileges, files and network
//!                 ── job ───────────────────────────►   the second: no system calls; and only then reads the first byte
//!                 ◄─ Confined {what this host lacks} ─
//!                 ◄─ Take {bytes} ─ Go ─►                when writing is paced
//!                 ◄─ Done {facts, digest, …} | Failed ─   exit
//! ```
//!
//! In it run the decompressors, the tar reader, the ext4 writer, the reader of kernels and initrds and the writer of boot loaders (`render::fill`): all that
//! sees a stranger's archive before it has become a filesystem of our own making. What comes back is a document of the types that the daemon keeps; the
//! daemon parses nothing else. A worker that was taken over decides what one golden image contains, which the archive it was made from decided anyway.
//!
//! If the worker dies (a forbidden system call: SIGSYS; memory: SIGABRT or SIGKILL; a panic: status 101) the build fails with reason `WORKER_DIED` and the
//! caller removes what was begun. Cancelling kills it. It dies with the daemon (parent-death signal), or with the keeper that started it for the daemon.
//!
//! Small jobs (`small`): signatures and signed documents, headers of encrypted tarballs. Each is done by a process of its own all the same, a child of the
//! fork server (`fork_server`), which is started once and reads nothing. Manifests, arguments under a manifest's schema, templates (`manifest`) and
//! documents of streams (`stream`) are small jobs too. A guest's filesystem (`guest`): its process has not even the volume open.
//!
//! Not here, and why:
//!
//! - Answers of registries, peers and mirrors, which are JSON of few plain types: serde reads them as it reads the answers of workers, so that a worker
//!   between would be read by the same code.
//! - The files of an image that injection edits or looks into, which came out of a worker as facts: small texts (a Debian's: 163, with 400 paths 235 KB), read by
//!   memory-safe code on the way of every warm render, where a process that reads all of them would take half as long as the render.
//! - The operator's own: configuration, keyrings when the daemon starts, kernels and boot loaders of the host.
//! - Headers and tables of qcow2 volumes: the hypervisor writes them, and a process that plans changes to them could name another backing file.
//! - Writing XFS and btrfs: the kernel's, for a mount worker that is root. The archive is read in a worker all the same and its entries pass through the daemon
//!   (`archive`); only a filesystem that was made here a moment ago is mounted.

mod archive;
mod child;
mod fork_server;
mod guest;
mod manifest;
mod readers;
mod small;
mod stream;
mod wire;

use std::{
    fs::File,
    io::{BufReader, BufWriter, Seek, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

pub use self::{
    child::main,
    guest::Study,
    small::{Signed, Vouching},
};
use self::{
    readers::Readers,
    wire::{Job, Reply, Request},
};
use crate::{
    config::worker::{Confine, Worker as Settings},
    error::{Error, Result, Stage},
    ext4::Ext4,
    fs::{
        Filesystem, FsKind,
        mounted::{
            Mounted,
            wire::{receive, send},
        },
    },
    host::{descriptors::pass, namespace::Worker},
    progress::Progress,
    render::fill::{self, Brake, Filled, Inputs},
    target::Pacer,
    trust::age::Identities,
};

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "worker";
/// How often a waiting daemon looks whether the job was cancelled, and how far it is.
const POLL: Duration = Duration::from_millis(50);
/// How long the answer to a small job may take; a process that has none by then is killed by the fork server, which sees that nobody waits for it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the rest of an answer may take: it is in memory, but the machine may be busy.
const FRAME_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a worker may take to end after its last answer.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// How workers are started.
#[derive(Debug, Clone)]
pub struct Launcher {
    program: PathBuf,
    settings: Settings,
    identities: Arc<Identities>,
    misdeed: Option<String>,
    readers: Arc<Readers>,
    /// How long the answer to a small job may take.
    patience: Duration,
}

impl Launcher {
    /// Workers are this program, started again.
    pub fn new(settings: &Settings) -> Self {
        let program = settings.program.clone().unwrap_or_else(|| "/proc/self/exe".into());
        Launcher { program, settings: settings.clone(), identities: Arc::default(), misdeed: None, readers: Arc::default(), patience: ANSWER_TIMEOUT }
    }

    /// Encrypted tarballs are opened by these.
    #[must_use]
    pub fn with_identities(self, identities: Arc<Identities>) -> Self {
        Launcher { identities, ..self }
    }

    /// Workers are `program`: for tests and benchmarks, whose own program is not the daemon.
    #[must_use]
    pub fn with_program(self, program: impl Into<PathBuf>) -> Self {
        Launcher { program: program.into(), readers: Arc::default(), ..self }
    }

    /// An answer to a small job may take so long, and what reading its file takes.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Launcher { patience, ..self }
    }

    /// Workers do what no worker may do, once they are confined: for the test that shows what becomes of them. A daemon built without debug assertions
    /// refuses such a job.
    #[must_use]
    pub fn with_misdeed(self, misdeed: &str) -> Self {
        Launcher { misdeed: Some(misdeed.to_owned()), ..self }
    }

    /// Fills a disk as [`fill::fill`] does, in a worker unless configured otherwise.
    pub fn fill(&self, inputs: Inputs<'_>, pacer: &Arc<Pacer>, progress: &Progress) -> Result<Filled> {
        let inputs = Inputs { file_key: self.file_key(&inputs.blob, inputs.blob_name)?, ..inputs };
        if self.settings.confine == Confine::Off || inputs.spec.filesystem != FsKind::Ext4 {
            let brake = Arc::new(InProcess { pacer: Arc::clone(pacer), progress: progress.clone() });
            let filesystem: Box<dyn Filesystem> = match inputs.spec.filesystem {
                FsKind::Ext4 => Box::new(Ext4),
                kind @ (FsKind::Xfs | FsKind::Btrfs) => Box::new(Mounted::new(kind).with_program(self.program.clone())),
            };
            return fill::fill_from(inputs, &*filesystem, brake, progress, &mut |archive, sink| match self.settings.confine {
                Confine::Off => fill::read_archive(archive, sink, progress),
                Confine::Required => self.archive(archive, sink, progress),
            });
        }
        progress.check()?;
        let mut conversation = Conversation::start(&self.program, &inputs.blob, inputs.disk.as_fd())?;
        let job = Job::new(&inputs, self.settings.memory_max.0, pacer.is_limiting(), self.misdeed.clone());
        let result = conversation.send(&Request::Fill(Box::new(job)), &wire::data_out(&inputs));
        let filled = result.and_then(|()| conversation.follow(&inputs.blob, pacer, progress));
        match filled {
            Ok(filled) => conversation.finish().map(|()| filled),
            Err(error) => Err(conversation.abort(error)),
        }
    }
}

struct InProcess {
    pacer: Arc<Pacer>,
    progress: Progress,
}

impl Brake for InProcess {
    fn take(&self, bytes: u64) {
        let _cancelled = self.pacer.take(bytes, &self.progress);
    }
}

/// Talking to a worker.
#[derive(Debug)]
struct Conversation {
    from: BufReader<UnixStream>,
    to: BufWriter<UnixStream>,
    worker: Worker,
    /// Layers that this host does not give, as the worker says.
    missing: Vec<String>,
}

fn failed(doing: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::io(Stage::Host, SUBCOMMAND, doing, error)
}

fn died(why: impl Into<String>) -> Error {
    Error::internal(Stage::Golden, SUBCOMMAND, why)
        .with_reason("WORKER_DIED")
        .with_hint("SIGSYS means a forbidden system call, SIGABRT or SIGKILL most often memory (worker.memory_max); the journal has more")
}

/// What became of a process that gave no answer.
fn death(signal: Option<i32>, code: Option<i32>) -> Error {
    match (signal, code) {
        (Some(libc::SIGSYS), _) => died("was killed for a system call that it may not make (SIGSYS)"),
        (Some(signal), _) => died(format!("was killed by signal {signal}")),
        (None, Some(code)) => died(format!("ended with exit status: {code} without an answer")),
        (None, None) => died("ended without an answer"),
    }
}

impl Conversation {
    fn start(program: &Path, stdin: &File, disk: BorrowedFd<'_>) -> Result<Self> {
        let blob = stdin.try_clone().map_err(failed("duplicate the tarball's descriptor"))?;
        let worker = Worker::spawn(program, &[SUBCOMMAND], blob.into())?;
        let clone = || worker.socket().try_clone().map_err(failed("duplicate its socket"));
        let (from, to) = (BufReader::new(clone()?), BufWriter::new(clone()?));
        pass(worker.socket(), [disk]).map_err(failed("pass the disk's descriptor"))?;
        Ok(Conversation { from, to, worker, missing: Vec::new() })
    }

    fn send(&mut self, request: &Request, data: &[u8]) -> Result<()> {
        match send(&mut self.to, Some(request), data).and_then(|()| self.to.flush()) {
            // A worker that is gone left an answer, or its end says why.
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EPIPE | libc::ECONNRESET)) => Err(failed("send")(error)),
            _ => Ok(()),
        }
    }

    /// Answers the worker until it is done.
    fn follow(&mut self, blob: &File, pacer: &Arc<Pacer>, progress: &Progress) -> Result<Filled> {
        let mut read = 0;
        loop {
            self.set_timeout(POLL)?;
            self.wait(Some(blob), &mut read, progress)?;
            // Once a frame has begun the rest of it is on its way.
            self.set_timeout(FRAME_TIMEOUT)?;
            match receive(&mut self.from, 0) {
                Ok(Some((Some(Reply::Confined { missing }), _))) => self.note_missing(missing),
                Ok(Some((Some(Reply::Take { bytes }), _))) => {
                    pacer.take(bytes, progress)?;
                    self.send(&Request::Go, &[])?;
                }
                Ok(Some((Some(Reply::Done(filled)), _))) => return Ok(*filled),
                Ok(Some((Some(Reply::Failed(error)), _))) => return Err(error.into_error()),
                Ok(Some((Some(_), _))) => return Err(died("its answer is to another question")),
                Ok(Some((None, _))) => return Err(died("an answer was empty")),
                Ok(None) => return Err(died("ended without an answer")),
                Err(error) => return Err(died("its answer can't be read").with_source(error)),
            }
        }
    }

    /// The layers that the worker is confined without, when that is the only answer that is due.
    fn confined(&mut self) -> Result<Vec<String>> {
        self.set_timeout(FRAME_TIMEOUT)?;
        match receive(&mut self.from, 0) {
            Ok(Some((Some(Reply::Confined { missing }), _))) => {
                self.note_missing(missing);
                Ok(std::mem::take(&mut self.missing))
            }
            Ok(Some((Some(Reply::Failed(error)), _))) => Err(error.into_error()),
            Ok(_) => Err(died("ended without an answer")),
            Err(error) => Err(died("its answer can't be read").with_source(error)),
        }
    }

    fn note_missing(&mut self, missing: Vec<String>) {
        for layer in &missing {
            tracing::warn!(layer, "the worker is confined without one layer that this host does not give");
        }
        self.missing = missing;
    }

    fn set_timeout(&self, timeout: Duration) -> Result<()> {
        self.worker.socket().set_read_timeout(Some(timeout)).map_err(failed("set a timeout"))
    }

    /// Waits for the first byte of an answer. How far the worker is shows in the tarball's position, which both processes share.
    fn wait(&mut self, blob: Option<&File>, read: &mut u64, progress: &Progress) -> Result<()> {
        use std::io::BufRead;
        loop {
            progress.check()?;
            let waited = self.from.fill_buf().map(|_| ());
            if let Some(Ok(at)) = blob.map(|mut blob| blob.stream_position()) {
                progress.add(at.saturating_sub(*read));
                *read = at.max(*read);
            }
            match waited {
                Ok(()) => return Ok(()),
                Err(error)
                    if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut | std::io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(died("its answer can't be read").with_source(error)),
            }
        }
    }

    fn finish(self) -> Result<()> {
        let Conversation { from, to, worker, missing: _ } = self;
        drop((from, to));
        let status = worker.finish(EXIT_TIMEOUT)?;
        if status.success() { Ok(()) } else { Err(died(format!("ended with {status} after its answer"))) }
    }

    /// Ends the worker, whose work nobody wants; says in the error how it ended if that is all that is known.
    fn abort(self, error: Error) -> Error {
        let Conversation { from, to, worker, missing: _ } = self;
        drop((from, to));
        let died_itself = error.reason() == "WORKER_DIED";
        match worker.abort(if died_itself { EXIT_TIMEOUT } else { Duration::ZERO }) {
            Ok(status) if died_itself => death(status.signal(), status.code()),
            Ok(_) => error,
            Err(failure) => error.with_cleanup_failure(failure),
        }
    }
}
