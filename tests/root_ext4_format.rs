//! The ext4 formatter before its judges: e2fsck, dumpe2fs, debugfs, resize2fs and the kernel. Needs root (loop mounts) and e2fsprogs.

#[path = "root_ext4_format/geometry.rs"]
mod geometry;
#[path = "root_ext4_format/limits.rs"]
mod limits;
#[path = "root_ext4_format/support.rs"]
mod support;
#[path = "root_ext4_format/trees.rs"]
mod trees;
