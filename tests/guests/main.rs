//! What is injected into the trees of a dozen distributions, without a disk and without root.

#[path = "../common/mod.rs"]
mod common;
mod hostile;
mod inject;
mod net_golden;
mod setup;
