//! What several test programs share: daemons of their own or in this process, guests and trees, other people's servers and judges, finding leaks.
//!
//! Each program uses its own part of it.
#![allow(dead_code, unused_imports, reason = "every test program compiles this module and uses a part of it")]

pub mod boot;
pub mod daemon;
pub mod e2fsck;
pub mod fixture;
pub mod guest_trees;
pub mod keeper;
pub mod leak;
pub mod pki;
pub mod pygrub;
pub mod rig;
pub mod server;
pub mod sites;
