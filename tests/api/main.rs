//! The API tier: a real server in this process on a unix socket, the generated client, a real store in a temporary directory. No root, no network.

mod access;
mod audit;
#[path = "../common/mod.rs"]
mod common;
mod devices;
mod errors;
mod images;
mod lifecycle;
mod platforms;
mod quotas;
mod renders;
mod store;
mod streams;
mod tls;
