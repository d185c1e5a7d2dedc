//! Compiles `proto/` with a pure Rust compiler, so that no `protoc` is needed, and keeps the descriptor set for gRPC reflection.
use std::{env, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = [
        "proto/cloudlet/v1/types.proto",
        "proto/cloudlet/v1/image.proto",
        "proto/cloudlet/v1/render.proto",
        "proto/cloudlet/v1/volume.proto",
        "proto/cloudlet/v1/host.proto",
        "proto/cloudlet/v1/store.proto",
        "proto/cloudlet/v1/catalogue.proto",
        "proto/cloudlet/v1/share.proto",
    ];
    let descriptors = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("cloudlet_descriptor.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
