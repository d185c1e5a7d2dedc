//! Everything privileged: kernel objects and commands of the host.
//!
//! Nothing outside this folder imports `std::process`, mount or ioctl code. Each kernel object has one guard, whose acquire and release sit in one
//! file, with two exits: `close` for the success path and `Drop`, which tries once and logs what leaks. `sys` is the only unsafe code of the crate.
//!
//! A daemon that is not root leaves what takes privileges to a process that is, the `keeper`; callers of this folder see no difference.

pub mod block;
pub mod command;
pub mod confine;
pub mod descriptors;
pub mod in_use;
pub mod info;
pub mod keeper;
pub mod loops;
pub mod mounts;
pub mod namespace;
pub mod signatures;
pub mod sys;
