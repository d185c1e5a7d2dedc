//! A qcow2 image of any bytes over a backing file: opened, read, a change of it planned. Errors are fine; panics, loops and memory without bound are not.
//!
//! The input is the image's file; without a valid magic it gets one, so that the rest of the header is reached at once.

#![no_main]

use std::{io, sync::Arc};

use cloudletd::{
    fs::{ReadAt, patch::BlockPatch},
    volume::qcow2::{Qcow2, Source},
};
use libfuzzer_sys::fuzz_target;

/// Bytes of the guest's disk that are read.
const READ_MAX: u64 = 4 << 20;

struct Memory(Vec<u8>);

impl ReadAt for Memory {
    fn read_all_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let part = self.0.get(start..).and_then(|rest| rest.get(..into.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(part);
        Ok(())
    }
}

fn source(name: &str, bytes: Vec<u8>) -> Source {
    Source { name: name.into(), len: bytes.len() as u64, file: Arc::new(Memory(bytes)) }
}

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    if let Some(magic) = bytes.get_mut(..4) {
        magic.copy_from_slice(b"QFI\xfb");
    }
    let behind = bytes.clone();
    let Ok(image) = Qcow2::open(source("image", bytes), &|name, _| Ok(source(&format!("behind {name}"), behind.clone()))) else { return };
    let len = image.virtual_size().min(READ_MAX);
    let mut buffer = vec![0; 65_536];
    for at in (0..len).step_by(buffer.len()) {
        let part = (len - at).min(buffer.len() as u64) as usize;
        let _ = image.read_all_at(&mut buffer[..part], at);
    }
    let mut patch = BlockPatch::new(image.virtual_size());
    for number in (0..image.virtual_size().div_ceil(4096)).step_by(97).take(16) {
        patch.insert(number, vec![7; 4096].into());
    }
    if let Ok(plan) = image.plan(&patch) {
        assert!(plan.iter().all(|(offset, bytes)| offset.checked_add(bytes.len() as u64).is_some()));
    }
});
