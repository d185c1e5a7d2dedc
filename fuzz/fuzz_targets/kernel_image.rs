//! Any bytes as a kernel: what is found out about it is within its limits, and can be written down and read back.

#![no_main]

use cloudletd::boot::inspect::kernel::{self, KernelFacts};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match kernel::read(bytes) {
        Ok(facts) => {
            assert!(facts.release.as_ref().is_none_or(|release| release.len() <= 256 && !release.chars().any(char::is_control)));
            assert!(facts.pvh_entry.is_none() || facts.xen_pv.is_some(), "a note without an ELF file");
            let text = serde_json::to_vec(&facts).expect("JSON");
            assert_eq!(serde_json::from_slice::<KernelFacts>(&text).expect("read back"), facts);
        }
        Err(error) => assert_eq!(error.reason(), "KERNEL_FORMAT_UNKNOWN"),
    }
});
