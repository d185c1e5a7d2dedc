//! Passing open descriptors over unix sockets (unix(7), SCM_RIGHTS), each lot beside one byte.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg};

/// Descriptors that are passed at a time.
const PASSED_MAX: usize = 2;

/// Sends descriptors, at most 2, beside one byte.
pub fn pass<'d>(socket: &UnixStream, descriptors: impl IntoIterator<Item = BorrowedFd<'d>>) -> io::Result<()> {
    let descriptors: Vec<_> = descriptors.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PASSED_MAX))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !message.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    sendmsg(socket, &[IoSlice::new(&[0])], &mut message, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The descriptors that come beside one byte; nothing when the other end has closed. They are lost to who reads that byte in any other way.
pub fn passed(socket: &UnixStream) -> io::Result<Option<Vec<OwnedFd>>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PASSED_MAX))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut message, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = message.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors = descriptors.flatten().collect();
    Ok((received.bytes > 0).then_some(descriptors))
}
