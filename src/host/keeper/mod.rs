//! The keeper: the one process with privileges, for daemons that have none.
//!
//! ```text
//!  daemon, user cloudletd, no capabilities                    keeper, root, no network, no gRPC
//!  host::block, loops, in_use, namespace ── one connection ─► SO_PEERCRED: that user, or refused
//!                                           for each object   {request} + descriptors
//!                       {answer} + descriptors ◄───────────── claims, attaches, looks, starts a worker
//!                                           the end of it ──► what was not kept is given up
//! ```
//!
//! The daemon has everything that is large: the API, HTTP, the catalogue, rendering. What takes privileges are seven requests, each of which says what it is for
//! and none of which opens a path that the keeper's own configuration does not name:
//!
//! | request | what the keeper does | what a daemon that was taken over could make of it |
//! |---|---|---|
//! | `Claim` | opens a device of a device pool exclusively, or a loop device over a file of a directory pool or the state directory | write to volumes and to allowed devices that nobody uses, which is what it is for |
//! | `Look` | opens a device of a device pool for reading | read them |
//! | `Attach` | binds a loop device to a regular file that the daemon has open | use up loop devices; the node is not handed out |
//! | `LoopsOf`, `Detach` | finds loop devices of a file; detaches one that is over a file of a directory pool or the state directory and not in use | detach volumes |
//! | `Opener` | looks through `/proc` for who has a file or device open | learn the names of processes |
//! | `Start` | starts a worker of this program with two descriptors of the daemon's | have files read by confined processes; have filesystems that it wrote mounted in a private namespace, unless `keeper.mounts` is off |
//!
//! To read all that runs with privileges: this folder, [`super::descriptors`], [`super::block`], [`super::in_use`], [`super::loops`], [`super::mounts`],
//! [`super::sys`]; and of the workers, which are children, [`super::confine::withdraw`], after which they hear what is to be done, and [`crate::fs::mounted::worker`], which keeps
//! its own until it ends.
//!
//! Without a keeper the daemon does all of it itself, as root.

pub(in crate::host) mod client;
mod serve;
mod wire;

pub use self::{client::use_keeper, serve::run};
