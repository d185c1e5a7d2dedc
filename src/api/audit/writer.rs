//! The thread that writes lines, and what it does when it can't.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use serde_json::json;
use tokio::sync::{mpsc, oneshot};

use super::line::utc;
use crate::{
    error::{Error, Result, Stage},
    render::now_ms,
};

/// Lines that wait for a slow disk; some hundred bytes each. What comes then is lost, and counted.
const WAITING_MAX: usize = 4096;

/// Where lines go.
#[derive(Debug, Clone)]
pub(super) enum Sink {
    File(PathBuf),
    Stderr,
}

enum Job {
    Line(Vec<u8>, Option<oneshot::Sender<io::Result<()>>>),
    Reopen,
}

/// The other end of the thread. It ends with this, after what is waiting.
pub(super) struct Writer {
    jobs: Option<mpsc::Sender<Job>>,
    lost: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread. A file that can't be opened is an error when lines are `required`, else it is tried again with each line.
    pub(super) fn start(sink: Sink, required: bool) -> Result<Writer> {
        let mut output = Output { sink: sink.clone(), file: None, is_torn: false, is_failing: false };
        if let Err(error) = output.ready() {
            let Sink::File(path) = &sink else { return Err(Error::io(Stage::Config, "audit log", "open it", error)) };
            let error = Error::io(Stage::Config, path.display().to_string(), "open the audit log", error);
            if required {
                return Err(error);
            }
            tracing::error!(error = %error.chain(), "the audit log is not written");
        }
        let (jobs, receiver) = mpsc::channel(WAITING_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&lost);
        let thread = thread::Builder::new()
            .name("audit".into())
            .spawn(move || run(output, receiver, &counter))
            .map_err(|error| Error::io(Stage::Config, "audit log", "start the thread that writes it", error))?;
        Ok(Writer { jobs: Some(jobs), lost, thread: Some(thread) })
    }

    /// Has a line written, some time.
    pub(super) fn send(&self, line: Vec<u8>) {
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.try_send(Job::Line(line, None)).is_ok());
        if !sent {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Has a line written and waits until it is.
    pub(super) async fn write(&self, line: Vec<u8>) -> io::Result<()> {
        let gone = || io::Error::other("the thread that writes the audit log is gone");
        let (sender, receiver) = oneshot::channel();
        self.jobs.as_ref().ok_or_else(gone)?.send(Job::Line(line, Some(sender))).await.map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())?
    }

    /// Has the file opened anew before the next line.
    pub(super) fn reopen(&self) {
        if let Some(jobs) = &self.jobs {
            // A full queue has lines, each of which looks whether the file is still there.
            let _ = jobs.try_send(Job::Reopen);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(mut output: Output, mut receiver: mpsc::Receiver<Job>, lost: &AtomicU64) {
    while let Some(job) = receiver.blocking_recv() {
        match job {
            Job::Reopen => output.file = None,
            Job::Line(line, reply) => {
                let missing = lost.swap(0, Ordering::Relaxed);
                if missing > 0 {
                    let line = format!("{}\n", json!({"time": utc(now_ms()), "event": "lost", "lines": missing}));
                    if output.write(line.as_bytes()).is_err() {
                        lost.fetch_add(missing, Ordering::Relaxed);
                    }
                }
                let written = output.write(&line);
                // Who waits for the answer does not do what the line says.
                if written.is_err() && reply.is_none() {
                    lost.fetch_add(1, Ordering::Relaxed);
                }
                if let Some(reply) = reply {
                    let _ = reply.send(written);
                }
            }
        }
    }
}

struct Output {
    sink: Sink,
    file: Option<File>,
    /// Whether the last line in the file has no end.
    is_torn: bool,
    is_failing: bool,
}

impl Output {
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let result = self.try_write(line);
        match &result {
            Ok(()) if self.is_failing => tracing::info!("the audit log is written again"),
            // Once: the log must not be full of it.
            Err(error) if !self.is_failing => tracing::error!(%error, "the audit log can't be written"),
            _ => {}
        }
        self.is_failing = result.is_err();
        result
    }

    fn try_write(&mut self, line: &[u8]) -> io::Result<()> {
        if let Sink::Stderr = self.sink {
            return io::stderr().lock().write_all(line);
        }
        self.ready()?;
        let torn = std::mem::replace(&mut self.is_torn, true);
        let Some(file) = &mut self.file else { return Err(io::Error::other("the file is not open")) };
        // One write for the line, so that lines of two daemons in one file would not mix (write(2), O_APPEND).
        let written = if torn { file.write_all(&[b"\n", line].concat()) } else { file.write_all(line) };
        if let Err(error) = written {
            self.file = None;
            return Err(error);
        }
        self.is_torn = false;
        Ok(())
    }

    /// Opens the file unless it is open and still where it was: whoever rotates it moves it away.
    fn ready(&mut self) -> io::Result<()> {
        let Sink::File(path) = &self.sink else { return Ok(()) };
        let id = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        let is_there = |file: &File| matches!((file.metadata().map(id), std::fs::metadata(path).map(id)), (Ok(open), Ok(there)) if open == there);
        if !self.file.as_ref().is_some_and(is_there) {
            self.file = None;
            let file = File::options().read(true).append(true).create(true).mode(0o640).open(path)?;
            // What an earlier daemon, or a full disk, has left.
            let (len, mut last) = (file.metadata()?.len(), [b'\n']);
            if len > 0 {
                file.read_exact_at(&mut last, len - 1)?;
            }
            self.is_torn = last != [b'\n'];
            self.file = Some(file);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_without_an_end_is_ended_before_the_next_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        std::fs::write(&path, "{\"torn\":").expect("written");
        let writer = Writer::start(Sink::File(path.clone()), true).expect("starts");
        writer.send(b"{}\n".to_vec());
        writer.send(b"{}\n".to_vec());
        drop(writer);
        assert_eq!(std::fs::read_to_string(&path).expect("read"), "{\"torn\":\n{}\n{}\n");
    }

    #[test]
    fn lines_that_could_not_be_written_are_counted_in_the_log() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("missing/log");
        let writer = Writer::start(Sink::File(path.clone()), false).expect("tries again later");
        assert!(Writer::start(Sink::File(path.clone()), true).is_err(), "unless it is required");
        for _ in 0..3 {
            writer.send(b"{}\n".to_vec());
        }
        while writer.lost.load(Ordering::Relaxed) < 3 {
            thread::yield_now();
        }
        std::fs::create_dir(dir.path().join("missing")).expect("made");
        writer.send(b"{\"now\":1}\n".to_vec());
        drop(writer);
        let text = std::fs::read_to_string(&path).expect("read");
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!((lines.len(), &lines[0]["event"], &lines[0]["lines"], &lines[1]["now"]), (2, &"lost".into(), &3.into(), &1.into()));
    }
}
