//! The ext4 formatter before its judges: e2fsck of three releases, dumpe2fs, debugfs, resize2fs and the kernel. Needs root (loop mounts), e2fsprogs
//! and what `scripts/fixtures.sh` needs.

#[path = "../common/mod.rs"]
mod common;
mod geometry;
mod limits;
mod peers_bugs;
mod support;
mod trees;
