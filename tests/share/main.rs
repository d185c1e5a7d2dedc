//! Goldens between hosts, and between hosts and the registries and buckets of others.

#[path = "../common/mod.rs"]
mod common;
mod kit;
mod peers;
mod remotes;
