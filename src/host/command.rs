//! Running a tool of the host. The only place that starts processes for their output.
//!
//! A tool is found by name in a fixed search path and started with its arguments as they are (no shell), an environment of `LC_ALL=C` and `PATH`,
//! standard input closed, its own process group, and a parent-death signal. Standard output and error are drained at the same time, so that a full
//! pipe can't stall it, and kept up to a limit. When its time is over the whole group is killed.

use std::{
    ffi::{OsStr, OsString},
    io::Read,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{Signal, killpg},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::Pid,
};

use crate::{
    error::{Error, Kind, Result, Stage},
    host::sys,
};

/// Where tools are looked for, first match wins. Never the caller's PATH.
pub const SEARCH_PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Bytes of each stream that are kept; the rest is read and dropped. Error messages of all tools used fit many times.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// How much of standard error goes into an error message.
const MESSAGE_BYTES_MAX: usize = 2000;
/// How long to wait for the pipes to close after the tool has ended; a background child of its own may hold them open.
const DRAIN_GRACE: Duration = Duration::from_secs(1);

/// What a tool that succeeded said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Standard output, at most 1 MiB of it.
    pub stdout: Vec<u8>,
    /// Standard error, at most 1 MiB of it.
    pub stderr: Vec<u8>,
}

/// The absolute path of a tool, if this host has it. `name` is a plain file name.
pub fn find(name: &str) -> Option<PathBuf> {
    if name.is_empty() || name.contains('/') {
        return None;
    }
    SEARCH_PATH.iter().map(|directory| Path::new(directory).join(name)).find(|path| {
        use std::os::unix::fs::PermissionsExt;
        path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    })
}

/// Runs a tool to its end and gives its output if it exited with 0.
///
/// `Unsupported` (reason `TOOL_MISSING`): not on this host. `Timeout`: killed after `timeout`. `Internal` with reason `TOOL_FAILED` (exit status) or
/// `TOOL_KILLED` (signal): standard error is in the message.
pub fn run(name: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>, timeout: Duration) -> Result<Output> {
    let (status, output) = run_any_status(name, arguments, timeout)?;
    if status.success() {
        return Ok(output);
    }
    let said = String::from_utf8_lossy(&output.stderr[..output.stderr.len().min(MESSAGE_BYTES_MAX)]).trim().replace('\n', "; ");
    Err(match status.signal() {
        Some(signal) => Error::new(Kind::Internal, Stage::Host, name, format!("killed by signal {signal}: {said}")).with_reason("TOOL_KILLED"),
        None => Error::new(Kind::Internal, Stage::Host, name, format!("exited with status {}: {said}", status.code().unwrap_or(-1)))
            .with_reason("TOOL_FAILED"),
    })
}

/// As [`run`], for tools whose exit status is an answer.
pub fn run_any_status(name: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>, timeout: Duration) -> Result<(ExitStatus, Output)> {
    let path = find(name).ok_or_else(|| {
        Error::new(Kind::Unsupported, Stage::Host, name, format!("this tool is not in {}", SEARCH_PATH.join(":"))).with_reason("TOOL_MISSING")
    })?;
    let arguments: Vec<OsString> = arguments.into_iter().map(|argument| argument.as_ref().to_owned()).collect();
    let started = Instant::now();
    tracing::debug!(tool = %path.display(), ?arguments, "run");
    let mut command = Command::new(&path);
    command.args(&arguments).env_clear().env("LC_ALL", "C").env("PATH", SEARCH_PATH.join(":"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    sys::kill_with_parent(&mut command);
    let mut child = command.spawn().map_err(|error| Error::io(Stage::Host, path.display().to_string(), "start", error))?;
    let stdout = Drain::start(child.stdout.take());
    let stderr = Drain::start(child.stderr.take());
    let status = wait(&mut child, name, timeout);
    let give_up = Instant::now() + DRAIN_GRACE;
    let output = Output { stdout: stdout.finish(give_up), stderr: stderr.finish(give_up) };
    tracing::debug!(tool = %path.display(), ms = started.elapsed().as_millis() as u64, ?status, "ran");
    Ok((status?, output))
}

/// Waits for the end of `child`, at most `timeout`; then kills its group. It is reaped in either case.
fn wait(child: &mut Child, name: &str, timeout: Duration) -> Result<ExitStatus> {
    let pid = Pid::from_raw(child.id() as i32);
    let (ended, wait_end) = mpsc::channel();
    // This thread waits without reaping (WNOWAIT): the process id stays ours until `child.wait()` below, so a kill can't hit a stranger.
    let waiter = std::thread::Builder::new().name("tool-wait".into()).spawn(move || {
        while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(nix::errno::Errno::EINTR) {}
        let _ = ended.send(());
    });
    let in_time = match &waiter {
        Ok(_) => wait_end.recv_timeout(timeout) != Err(RecvTimeoutError::Timeout),
        Err(_) => false,
    };
    if !in_time {
        // ESRCH can't be: the group's leader is not reaped yet.
        killpg(pid, Signal::SIGKILL).map_err(|errno| Error::errno(Stage::Host, name, "kill after timeout", errno))?;
    }
    let status = child.wait().map_err(|error| Error::io(Stage::Host, name, "wait", error))?;
    waiter.map_err(|error| Error::io(Stage::Host, name, "start a waiting thread", error))?.join().unwrap_or_default();
    if !in_time {
        return Err(Error::new(Kind::Timeout, Stage::Host, name, format!("killed after {} ms", timeout.as_millis())));
    }
    Ok(status)
}

/// A thread that reads one stream to its end.
struct Drain {
    kept: Arc<Mutex<Vec<u8>>>,
    done: mpsc::Receiver<()>,
}

impl Drain {
    fn start(stream: Option<impl Read + Send + 'static>) -> Self {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let (end, done) = mpsc::channel();
        if let Some(mut stream) = stream {
            let kept = Arc::clone(&kept);
            let body = move || {
                let mut buffer = [0; 8192];
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    let mut kept = kept.lock().expect("no panic while holding the output");
                    let room = OUTPUT_BYTES_MAX.saturating_sub(kept.len());
                    kept.extend_from_slice(&buffer[..count.min(room)]);
                }
                drop(end);
            };
            // Without a thread the stream closes and the tool gets SIGPIPE: it fails, nothing hangs.
            let _ = std::thread::Builder::new().name("tool-output".into()).spawn(body);
        }
        Drain { kept, done }
    }

    fn finish(self, give_up: Instant) -> Vec<u8> {
        let _ = self.done.recv_timeout(give_up.saturating_duration_since(Instant::now()));
        std::mem::take(&mut self.kept.lock().expect("no panic while holding the output"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn output_status_signal_and_absence_are_told_apart() {
        let output = run("sh", ["-c", "echo out; echo err >&2"], 5 * SECOND).expect("runs");
        assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
        let failed = run("sh", ["-c", "echo why >&2; exit 3"], 5 * SECOND).expect_err("status 3");
        assert_eq!((failed.reason(), failed.message()), ("TOOL_FAILED", "exited with status 3: why"));
        let killed = run("sh", ["-c", "kill -TERM $$"], 5 * SECOND).expect_err("signal");
        assert_eq!(killed.reason(), "TOOL_KILLED");
        let missing = run("no-such-tool-anywhere", [""; 0], SECOND).expect_err("missing");
        assert_eq!((missing.kind(), missing.reason()), (Kind::Unsupported, "TOOL_MISSING"));
        assert_eq!(find("../bin/sh"), None);
    }

    #[test]
    fn a_tool_that_hangs_is_killed_with_its_children() {
        let started = Instant::now();
        let error = run("sh", ["-c", "sleep 100 & sleep 100"], Duration::from_millis(200)).expect_err("hangs");
        assert_eq!(error.kind(), Kind::Timeout);
        assert!(started.elapsed() < 5 * SECOND);
    }

    #[test]
    fn a_flood_on_both_streams_is_capped_and_does_not_stall() {
        let output = run("sh", ["-c", "head -c 3000000 /dev/zero >&2; head -c 3000000 /dev/zero"], 20 * SECOND).expect("runs");
        assert_eq!((output.stdout.len(), output.stderr.len()), (OUTPUT_BYTES_MAX, OUTPUT_BYTES_MAX));
    }

    #[test]
    fn the_environment_is_clean_and_input_is_empty() {
        let output = run("sh", ["-c", "cat; echo ${HOME-none} ${LC_ALL}"], 5 * SECOND).expect("runs");
        assert_eq!(output.stdout, b"none C\n");
    }

    #[test]
    fn a_background_child_that_keeps_the_pipes_does_not_hold_the_caller() {
        let started = Instant::now();
        let output = run("sh", ["-c", "sleep 20 & echo done"], 10 * SECOND).expect("runs");
        assert_eq!(output.stdout, b"done\n");
        assert!(started.elapsed() < 5 * SECOND);
    }
}
