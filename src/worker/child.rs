//! The worker's own side: `cloudletd worker`, started by [`super::Launcher`] and by nobody else.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    process::ExitCode,
    sync::{Arc, Mutex},
};

use super::{
    SUBCOMMAND, archive, failed, fork_server, guest,
    small::QUESTION_BYTES_MAX,
    wire::{Job, LOADERS_BYTES_MAX, Reply, Request, WireError},
};
use crate::{
    error::{Error, Result, Stage},
    ext4::Ext4,
    fs::mounted::wire::{receive, send},
    host::{
        confine::{Limits, withdraw},
        descriptors::passed,
    },
    manifest::volatile::Volatile,
    names::GuestPath,
    progress::Progress,
    render::fill::{Brake, Filled, Inputs, fill},
    tree::decompress,
    trust::age,
    units::MIB,
};

/// Bytes that are written between two questions to the daemon when writing is paced.
const TAKE_BYTES: u64 = MIB;

/// Serves one job; call it before the process has a second thread. The exit status says whether the conversation came to its end.
pub fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The conversation itself is broken, so this is the only place left for it.
            let _closed = writeln!(io::stderr(), "{SUBCOMMAND}: {}", error.chain());
            ExitCode::FAILURE
        }
    }
}

/// The socket, shared by the thread that works and those that write.
pub(super) struct Daemon {
    from: BufReader<UnixStream>,
    to: BufWriter<UnixStream>,
}

impl Daemon {
    pub(super) fn over(socket: UnixStream) -> Result<Daemon> {
        let clone = socket.try_clone().map_err(failed("take the socket"))?;
        Ok(Daemon { from: BufReader::new(socket), to: BufWriter::new(clone) })
    }

    /// The socket itself, when what was read of it has been taken.
    pub(super) fn into_socket(self) -> UnixStream {
        self.from.into_inner()
    }

    pub(super) fn request(&mut self) -> Result<Option<(Request, Vec<u8>)>> {
        match receive(&mut self.from, LOADERS_BYTES_MAX.max(QUESTION_BYTES_MAX)).map_err(failed("receive"))? {
            Some((Some(request), data)) => Ok(Some((request, data))),
            Some((None, _)) => Err(Error::internal(Stage::Host, SUBCOMMAND, "data came where a request belongs")),
            None => Ok(None),
        }
    }

    pub(super) fn reply(&mut self, reply: &Reply) -> Result<()> {
        self.reply_with(reply, &[])
    }

    /// One frame of many: it goes when there are enough, or with the next reply.
    pub(super) fn put(&mut self, reply: Option<&Reply>, data: &[u8]) -> Result<()> {
        send(&mut self.to, reply, data).map_err(failed("reply"))
    }

    pub(super) fn reply_with(&mut self, reply: &Reply, data: &[u8]) -> Result<()> {
        send(&mut self.to, Some(reply), data).and_then(|()| self.to.flush()).map_err(failed("reply"))
    }
}

fn serve() -> Result<()> {
    let socket = io::stdout().as_fd().try_clone_to_owned().map(UnixStream::from).map_err(failed("take the socket"))?;
    let blob = io::stdin().as_fd().try_clone_to_owned().map(File::from).map_err(failed("take the tarball"))?;
    // Before anything is buffered: descriptors come beside the first byte.
    let disk = passed(&socket).map_err(failed("take the disk"))?.and_then(|descriptors| descriptors.into_iter().next());
    let disk = File::from(disk.ok_or_else(|| Error::internal(Stage::Host, SUBCOMMAND, "the disk's descriptor was not passed"))?);
    let mut daemon = Daemon::over(socket)?;
    decompress::prepare();
    // Whoever talks here may have no privileges: nothing of it is heard with any.
    let withdrawn = match withdraw() {
        Ok(withdrawn) => withdrawn,
        Err(error) => return daemon.reply(&Reply::Failed(WireError::from(&error))),
    };
    let (job, data) = match daemon.request()? {
        Some((Request::Fill(job), data)) => (job, data),
        Some((Request::Tree(job), data)) => return archive::serve(&job, &data, blob, daemon, withdrawn),
        Some((Request::Study(job), _)) => return guest::serve(&job, daemon, withdrawn),
        Some((Request::Readers { memory_bytes }, _)) => return fork_server::serve(memory_bytes, &disk, daemon, withdrawn),
        Some(_) => return Err(Error::internal(Stage::Host, SUBCOMMAND, "a conversation starts with a job")),
        None => return Ok(()),
    };
    prepare(job.is_encrypted)?;
    let limits = Limits { memory_bytes: job.memory_bytes, file_bytes: Some(job.spec.size_bytes) };
    let misdeed = job.misdeed.clone();
    let confined = match withdrawn.confine(limits, || misdeed::before_the_filter(misdeed.as_deref())) {
        Ok(confined) => confined,
        Err(error) => return daemon.reply(&Reply::Failed(WireError::from(&error))),
    };
    daemon.reply(&Reply::Confined { missing: confined.missing })?;
    misdeed::behind_the_filter(job.misdeed.as_deref());
    let daemon = Arc::new(Mutex::new(daemon));
    let result = work(&job, &data, blob, Arc::new(disk), &daemon);
    let reply = match result {
        Ok(filled) => Reply::Done(Box::new(filled)),
        Err(error) => Reply::Failed(WireError::from(&error)),
    };
    daemon.lock().map_err(|_| Error::internal(Stage::Host, SUBCOMMAND, "a writing thread panicked"))?.reply(&reply)
}

/// Makes what a confined process can't. How many processors there are, which decoders ask and is in files of the cgroup, was found out before.
pub(super) fn prepare(is_encrypted: bool) -> Result<()> {
    if is_encrypted {
        age::prepare();
    }
    let volatile = Volatile::compile(&["a.*", "(?!b)c"])?;
    volatile.matches(&GuestPath::root()).map(drop)
}

fn work(job: &Job, data: &[u8], blob: File, disk: Arc<File>, daemon: &Arc<Mutex<Daemon>>) -> Result<Filled> {
    let (file_key, loaders) = job.parts(data)?;
    let progress = Progress::default();
    progress.enter(Stage::Golden, 0);
    let (blob_name, disk_name) = (&job.blob_name, &job.disk_name);
    let inputs = Inputs { blob, blob_name, declared: job.declared, file_key, disk, disk_name, spec: &job.spec, loaders: &loaders };
    let brake: Arc<dyn Brake> = match job.is_paced {
        true => Arc::new(Asking { daemon: Arc::clone(daemon), owed: Mutex::new(0) }),
        false => Arc::new(Free),
    };
    fill(inputs, &Ext4, brake, &progress)
}

/// Nothing is limited.
struct Free;

impl Brake for Free {
    fn take(&self, _bytes: u64) {}
}

/// The daemon's limits hold for all that it writes together: it is asked.
struct Asking {
    daemon: Arc<Mutex<Daemon>>,
    owed: Mutex<u64>,
}

impl Brake for Asking {
    fn take(&self, bytes: u64) {
        let (Ok(mut owed), Ok(mut daemon)) = (self.owed.lock(), self.daemon.lock()) else { return };
        *owed += bytes;
        if *owed >= TAKE_BYTES {
            let asked = daemon.reply(&Reply::Take { bytes: std::mem::take(&mut *owed) });
            // A daemon that went away, or cancelled, kills this process: there is nothing to decide here.
            let _gone = asked.and_then(|()| daemon.request());
        }
    }
}

/// What a worker does when a test asks it to misbehave; nothing at all in a daemon built without debug assertions.
#[cfg(debug_assertions)]
pub(super) mod misdeed {
    use crate::host::sys;

    /// Tries what the layers below the filter have to stop. An attempt that succeeds is told by a status of its own.
    pub fn before_the_filter(misdeed: Option<&str>) {
        let Some(misdeed) = misdeed else { return };
        let succeeded = match misdeed {
            "layer-open" => std::fs::File::open("/proc/self/status").is_ok() || std::fs::File::open("/etc/passwd").is_ok(),
            "layer-list" => std::fs::read_dir("/").is_ok_and(|mut entries| entries.next().is_some()),
            "layer-connect" => {
                std::net::TcpStream::connect(("127.0.0.1", 9)).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
            }
            "layer-exec" => sys::forbidden_call(libc::SYS_setuid).is_ok(),
            _ => return,
        };
        std::process::exit(if succeeded { 77 } else { 78 });
    }

    /// Makes the call; the process does not survive it. One that does says so.
    pub fn behind_the_filter(misdeed: Option<&str>) {
        let call = match misdeed {
            None => return,
            Some("open") => libc::SYS_openat,
            Some("socket") => libc::SYS_socket,
            Some("execve") => libc::SYS_execve,
            Some("ptrace") => libc::SYS_ptrace,
            Some("mount") => libc::SYS_mount,
            Some("kill") => libc::SYS_kill,
            Some("fork") => libc::SYS_clone,
            Some("io_uring") => libc::SYS_io_uring_setup,
            Some("sendmsg") => libc::SYS_sendmsg,
            Some("socketpair") => libc::SYS_socketpair,
            Some("recvmsg") => libc::SYS_recvmsg,
            Some("pidfd") => libc::SYS_pidfd_open,
            Some("hang") => loop {
                std::thread::sleep(std::time::Duration::from_secs(1));
            },
            Some("descriptors") => std::process::exit(100 + open_descriptors()),
            Some("panic") => panic!("asked to"),
            Some("many-threads") => return many_threads(),
            Some("memory") => {
                let mut hoard: Vec<Vec<u8>> = Vec::new();
                loop {
                    hoard.push(vec![1; 16 << 20]);
                }
            }
            Some(_) => return,
        };
        let _survived = sys::forbidden_call(call);
        std::process::exit(77);
    }

    /// No misdeed: how many descriptors a process has.
    fn open_descriptors() -> i32 {
        (0..64).filter(|number| sys::is_open(*number)).count() as i32
    }

    /// No misdeed: what decoders of large archives do. Each thread has memory of its own while all the others have.
    fn many_threads() {
        let barrier = std::sync::Barrier::new(40);
        std::thread::scope(|scope| {
            for _ in 0..40 {
                scope.spawn(|| {
                    let memory = vec![1u8; 1 << 16];
                    barrier.wait();
                    std::hint::black_box(&memory);
                });
            }
        });
    }
}

#[cfg(not(debug_assertions))]
pub(super) mod misdeed {
    pub fn before_the_filter(misdeed: Option<&str>) {
        if misdeed.is_some() {
            std::process::exit(76);
        }
    }

    pub fn behind_the_filter(_misdeed: Option<&str>) {}
}
