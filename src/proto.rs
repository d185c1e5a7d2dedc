//! The generated protocol; its documentation is in `proto/cloudlet/v1`.
#![allow(missing_docs, clippy::all, clippy::pedantic)]

tonic::include_proto!("cloudlet.v1");

/// The encoded file descriptor set, for reflection.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cloudlet_descriptor.bin"));
