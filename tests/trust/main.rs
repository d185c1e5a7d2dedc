//! Signatures and encryption, from the parsers to what a daemon accepts.

mod age;
#[path = "../common/mod.rs"]
mod common;
mod journal;
mod kit;
mod minisign;
mod openpgp;
mod reload;
mod routes;
mod sources;
