//! The API tier: a real server in this process on a unix socket, the generated client, a real store in a temporary directory. No root, no network.

mod access;
mod audit;
mod devices;
mod errors;
mod images;
mod lifecycle;
mod pki;
mod platforms;
mod quotas;
mod renders;
mod store;
mod streams;
mod support;
mod tls;
