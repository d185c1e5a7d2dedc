//! The ext4 formatter before its judges: e2fsck of three releases, dumpe2fs, debugfs, resize2fs and the kernel. Needs root (loop mounts), e2fsprogs
//! and what `scripts/fixtures.sh` needs.

#[path = "common/e2fsck.rs"]
mod e2fsck;
#[path = "common/fixture.rs"]
#[allow(dead_code, reason = "only e2fsck of other releases is used here")]
mod fixture;
#[path = "root_ext4_format/geometry.rs"]
mod geometry;
#[path = "root_ext4_format/limits.rs"]
mod limits;
#[path = "root_ext4_format/peers_bugs.rs"]
mod peers_bugs;
#[path = "root_ext4_format/support.rs"]
mod support;
#[path = "root_ext4_format/trees.rs"]
mod trees;
