//! What several integration tests share: booting guests, running the daemon, finding leaks.
//!
//! Each test crate uses its own part of it.
#![allow(dead_code, unused_imports, reason = "every test crate compiles this module and uses a part of it")]

pub mod boot;
pub mod daemon;
pub mod fixture;
pub mod leak;
pub mod pygrub;
pub mod rig;
