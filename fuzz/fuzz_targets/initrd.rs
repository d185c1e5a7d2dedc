//! Any bytes as an initrd: what is listed is in order and plausible.

#![no_main]

use cloudletd::boot::inspect::initrd;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match initrd::read(bytes) {
        Ok(facts) => {
            assert!(!facts.archives.is_empty() && facts.modules.len() <= facts.entries as usize);
            assert!(facts.modules.is_sorted() && facts.builtin.is_sorted());
            assert!(facts.modules.iter().all(|module| module.len() <= 64 && module.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'-')));
        }
        Err(error) => assert_eq!(error.reason(), "INITRD_UNREADABLE"),
    }
});
