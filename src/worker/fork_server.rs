//! The fork server: a confined process that reads nothing, and whose children answer one question each.
//!
//! ```text
//!  daemon                       fork server                              child, a reader
//!  Readers ── start ──────────► confined: no files, network, exec
//!          ── some bytes ─────► fork for each of them ────────────────► closes what is others', waits
//!          ◄── {its socket} ───
//!  ask takes a socket
//!      ── one byte ───────────► fork the next
//!      ── {file} ──────────────────────────────────────────────────────► gives up fork and recvmsg
//!      ── question ────────────────────────────────────────────────────► reads the first foreign byte
//!      ◄─────────────────────────────────────────────────────── answer ── exit
//!      ◄─ Ended {signal, code} ─ when it ends in any other way
//!      closes the socket ─────► kills a child that nobody waits for
//! ```
//!
//! A process of its own for each question costs a millisecond of a processor this way instead of the 3 ms that start, dynamic linking and namespaces take, and
//! most of that is over when the question comes. What one document makes of its reader, the next never meets. What the children share is the layout of their
//! memory, as the processes of a browser's zygote do.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use nix::poll::{PollFd, PollFlags, ppoll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};

use super::{
    SUBCOMMAND,
    child::{self, Daemon},
    failed, small,
    wire::{Reply, Request, WireError},
};
use crate::{
    error::{Error, Result, Stage},
    host::{
        confine::{ForkServer, Limits, Withdrawn},
        descriptors::{pass, passed},
    },
};

/// Children at a time; who takes one more waits for the end of another. Each has two descriptors here, and one more while its socket is on its way.
const CHILDREN_MAX: usize = 16;

struct Child {
    pidfd: OwnedFd,
    /// Where it answers; nothing when it was killed because nobody listens.
    socket: Option<UnixStream>,
}

/// Serves until the daemon closes the socket. Returns in the children too, when their answer is given.
pub(super) fn serve(memory_bytes: u64, nothing: &File, mut daemon: Daemon, withdrawn: Withdrawn) -> Result<()> {
    small::prepare()?;
    // Standard output is the socket to the daemon, which is no child's.
    rustix::stdio::dup2_stdout(nothing).map_err(|errno| failed("put the socket out of reach")(errno.into()))?;
    let server = match ForkServer::confine(withdrawn, Limits { memory_bytes, file_bytes: None }) {
        Ok(server) => server,
        Err(error) => return daemon.reply(&Reply::Failed(WireError::from(&error))),
    };
    daemon.reply(&Reply::Confined { missing: server.confined().missing.clone() })?;
    let control = daemon.into_socket();
    let mut children: Vec<Child> = Vec::new();
    let mut wanted = 0;
    loop {
        while wanted > 0 && children.len() < CHILDREN_MAX {
            let (theirs, ours) = UnixStream::pair().map_err(failed("make a socket pair"))?;
            match server.fork().map_err(failed("fork"))? {
                None => {
                    drop((control, children, theirs));
                    return answer(server, ours);
                }
                Some(pid) => {
                    let pid = Pid::from_raw(pid.as_raw()).ok_or_else(|| failed("fork")(io::Error::from_raw_os_error(libc::ECHILD)))?;
                    // Without it nobody could end the child: all end with this process, and the next question starts another.
                    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| failed("watch a child")(errno.into()))?;
                    match pass(&control, [theirs.as_fd()]) {
                        Ok(()) => children.push(Child { pidfd, socket: Some(ours) }),
                        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                        Err(error) => return Err(failed("pass a child's socket")(error)),
                    }
                }
            }
            wanted -= 1;
        }
        if wait(&control, &mut children)? {
            match passed(&control).map_err(failed("listen"))? {
                Some(_) => wanted += 1,
                None => return Ok(()),
            }
        }
    }
}

/// Waits for the daemon or for something of the children, whose ends it tells; says whether the daemon took a child, or is gone.
fn wait(control: &UnixStream, children: &mut Vec<Child>) -> Result<bool> {
    let mut polled = vec![PollFd::new(control.as_fd(), PollFlags::POLLIN)];
    for child in children.iter() {
        polled.push(PollFd::new(child.pidfd.as_fd(), PollFlags::POLLIN));
        polled.extend(child.socket.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::empty())));
    }
    match ppoll(&mut polled, None, None) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(errno) => return Err(failed("wait")(errno.into())),
    }
    let mut events = polled.iter().map(|polled| polled.revents().unwrap_or(PollFlags::empty())).collect::<Vec<_>>().into_iter();
    let control_events = events.next().unwrap_or(PollFlags::empty());
    let mut kept = Vec::with_capacity(children.len());
    for mut child in children.drain(..) {
        let has_ended = events.next().is_some_and(|events| events.contains(PollFlags::POLLIN));
        let is_alone = child.socket.is_some() && events.next().is_some_and(|events| events.contains(PollFlags::POLLHUP));
        if has_ended {
            tell(child);
            continue;
        }
        if is_alone {
            // The only error is that it has ended.
            let _ended = pidfd_send_signal(&child.pidfd, Signal::KILL);
            child.socket = None;
        }
        kept.push(child);
    }
    *children = kept;
    Ok(control_events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP))
}

/// Takes the status of a child that has ended, and says it to whom waits for an answer unless there was one.
fn tell(child: Child) {
    let Ok(Some(status)) = waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED) else { return };
    let Some(socket) = child.socket.filter(|_| status.exit_status() != Some(0)) else { return };
    let ended = Reply::Ended { signal: status.terminating_signal(), code: status.exit_status() };
    // Who asked may have gone.
    let _gone = Daemon::over(socket).and_then(|mut daemon| daemon.reply(&ended));
}

/// The child's life. Its file comes before the question, and before it can take no more.
fn answer(server: ForkServer, socket: UnixStream) -> Result<()> {
    let child = server.into_child();
    small::warm_up();
    let Some(mut descriptors) = passed(&socket).map_err(failed("take a file"))? else { return Ok(()) };
    let mut daemon = Daemon::over(socket)?;
    if let Err(error) = child.become_reader() {
        return daemon.reply(&Reply::Failed(WireError::from(&error)));
    }
    match daemon.request()? {
        Some((Request::Small(job), data)) => {
            child::misdeed::behind_the_filter(job.misdeed.as_deref());
            small::serve(&job, &data, descriptors.pop().map(File::from), &mut daemon)
        }
        Some(_) => Err(Error::internal(Stage::Host, SUBCOMMAND, "a reader is asked one question")),
        None => Ok(()),
    }
}
