//! Targets and who may use them: loop devices, block devices, mounts, users. Needs root.

mod access;
mod block;
mod kit;
mod loops;
mod targets;
mod volume_options;
