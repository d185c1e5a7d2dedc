//! What other people's programs say of what the daemon writes and reads: no root.

#[path = "../common/mod.rs"]
mod common;
mod disk;
mod fat;
mod mapping;
mod net_second_opinion;
mod qcow2;
mod squashfs;
mod streams;
mod tar;
