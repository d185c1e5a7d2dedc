//! Guests of rendered disks: QEMU boots them, and they report their own addresses. Needs root, QEMU and the root filesystems of scripts/fixtures.sh.

#[path = "../common/mod.rs"]
mod common;
mod firmware;
mod networks;
mod reconfigure;
mod secure;
mod service;
mod shared;
mod targets;
