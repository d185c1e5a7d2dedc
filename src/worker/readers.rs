//! The daemon's side of the fork server, and one question to one of its children.

use std::{
    fs::File,
    io::{BufReader, BufWriter, ErrorKind, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use super::{
    ANSWER_TIMEOUT, Conversation, Launcher, death, died, failed,
    small::{Answer, SmallJob, Task},
    wire::{Reply, Request},
};
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::mounted::wire::{receive, send},
    host::descriptors::{pass, passed},
    units::MIB,
};

/// Children that wait for a question.
const SPARE: usize = 3;
/// What is added to the time for an answer when a file is read: the slowest disk and hash worth waiting for.
const FILE_BYTES_PER_SEC: u64 = 10 * MIB;

/// The fork server: started when it is first needed, and again when it has ended.
#[derive(Debug, Default)]
pub(super) struct Readers {
    server: Mutex<Option<Arc<Server>>>,
}

#[derive(Debug)]
struct Server {
    control: UnixStream,
    missing: Vec<String>,
    /// Ends the process when it is dropped.
    _conversation: Mutex<Conversation>,
}

impl Server {
    fn start(program: &Path, memory_bytes: u64) -> Result<Server> {
        let nothing = File::open("/dev/null").map_err(failed("open /dev/null"))?;
        let mut conversation = Conversation::start(program, &nothing, nothing.as_fd())?;
        let sent = conversation.send(&Request::Readers { memory_bytes }, &[]);
        match sent.and_then(|()| conversation.confined()) {
            Ok(missing) => {
                let control = conversation.worker.socket().try_clone().map_err(failed("duplicate its socket"))?;
                control.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(failed("set a timeout"))?;
                // Not before its answer was read: descriptors are lost to a reader that takes them for data.
                (0..SPARE).try_for_each(|_| pass(&control, [])).map_err(failed("ask for readers"))?;
                Ok(Server { control, missing, _conversation: Mutex::new(conversation) })
            }
            Err(error) => Err(conversation.abort(error)),
        }
    }

    /// The socket of a child, which has `file` from now on. `WouldBlock`: all children were busy for as long as an answer may take.
    fn take(&self, file: Option<&File>) -> std::io::Result<UnixStream> {
        let socket = passed(&self.control)?.and_then(|descriptors| descriptors.into_iter().next());
        let socket = UnixStream::from(socket.ok_or(ErrorKind::UnexpectedEof)?);
        pass(&self.control, [])?;
        pass(&socket, file.map(AsFd::as_fd))?;
        Ok(socket)
    }
}

/// A socket that is read until some time, however many pieces the other side makes of what it says.
struct Until<'s> {
    socket: &'s UnixStream,
    end: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let left = self.end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()).ok_or(ErrorKind::TimedOut)?;
        self.socket.set_read_timeout(Some(left))?;
        (&mut &*self.socket).read(into)
    }
}

impl Readers {
    fn server(&self, program: &Path, memory_bytes: u64) -> Result<Arc<Server>> {
        let mut server = self.server.lock().map_err(|_| Error::internal(Stage::Host, super::SUBCOMMAND, "starting the fork server panicked"))?;
        if let Some(server) = &*server {
            return Ok(Arc::clone(server));
        }
        let started = Arc::new(Server::start(program, memory_bytes)?);
        *server = Some(Arc::clone(&started));
        Ok(started)
    }

    /// A child that waits for a question, and the layers that it is confined without. It has `file` and nothing else.
    fn child(&self, program: &Path, memory_bytes: u64, file: Option<&File>) -> Result<(UnixStream, Vec<String>)> {
        let mut is_second = false;
        loop {
            let server = self.server(program, memory_bytes)?;
            match server.take(file) {
                Ok(socket) => return Ok((socket, server.missing.clone())),
                Err(error) if !is_second && matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof) => {
                    tracing::warn!("the fork server has ended and is started again");
                    self.forget(&server);
                    is_second = true;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let why = format!("all readers have been busy for {} s", ANSWER_TIMEOUT.as_secs());
                    return Err(Error::new(Kind::Busy, Stage::Host, super::SUBCOMMAND, why).with_reason("READERS_BUSY").with_hint("try again later"));
                }
                Err(error) => return Err(failed("take a reader")(error)),
            }
        }
    }

    fn forget(&self, ended: &Arc<Server>) {
        if let Ok(mut server) = self.server.lock()
            && server.as_ref().is_some_and(|server| Arc::ptr_eq(server, ended))
        {
            *server = None;
        }
    }
}

impl Launcher {
    /// The answer of a process that is made for this question; its data are of at most `answer_max` bytes.
    pub(super) fn ask(&self, task: Task, data: &[u8], file: Option<&File>, answer_max: usize) -> Result<(Answer, Vec<u8>)> {
        self.ask_noting(task, data, file, answer_max).map(|(answer, data, _)| (answer, data))
    }

    /// The same, and the layers that the process was confined without.
    pub(super) fn ask_noting(&self, task: Task, data: &[u8], file: Option<&File>, answer_max: usize) -> Result<(Answer, Vec<u8>, Vec<String>)> {
        let (socket, missing) = self.readers.child(&self.program, self.settings.memory_max.0, file)?;
        let len = file.and_then(|file| file.metadata().ok()).map_or(0, |metadata| metadata.len());
        let patience = self.patience + Duration::from_secs(len / FILE_BYTES_PER_SEC);
        let end = Instant::now() + patience;
        socket.set_write_timeout(Some(patience)).map_err(failed("set a timeout"))?;
        let mut to = BufWriter::new(&socket);
        let question = Request::Small(Box::new(SmallJob { task, misdeed: self.misdeed.clone() }));
        match send(&mut to, Some(&question), data).and_then(|()| to.flush()) {
            // A child that is gone left an answer, or its end says why.
            Err(error) if !matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => return Err(failed("ask")(error)),
            _ => {}
        }
        // What could not be sent has been said.
        let _rest = to.into_parts();
        match receive(&mut BufReader::new(Until { socket: &socket, end }), answer_max) {
            Ok(Some((Some(Reply::Answer(answer)), data))) => Ok((*answer, data, missing)),
            Ok(Some((Some(Reply::Failed(error)), _))) => Err(error.into_error()),
            Ok(Some((Some(Reply::Ended { signal, code }), _))) => Err(death(signal, code)),
            Ok(Some(_)) => Err(died("its answer is to another question")),
            Ok(None) => Err(died("ended without an answer")),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Err(died("had no answer in time and was killed")),
            Err(error) => Err(died("its answer can't be read").with_source(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_who_answers_byte_by_byte_has_no_more_time_than_others() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let trickle = std::thread::spawn(move || {
            while (&theirs).write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(5))
            }
        });
        let begun = Instant::now();
        let error = Until { socket: &ours, end: begun + Duration::from_millis(200) }.read_exact(&mut [0; 100_000]).expect_err("never all of it");
        assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock), "{error}");
        assert!(begun.elapsed() >= Duration::from_millis(200));
        drop(ours);
        trickle.join().expect("ends");
    }
}
