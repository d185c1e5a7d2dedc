//! Booting.

pub mod platform;
