//! A network document of somebody else: decoded under limits. Errors have no control character and a path, what is taken survives the way through
//! our own form, and the same bytes give the same network.

#![no_main]

use cloudletd::guest::{applied::network_value, decode};
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let network = match decode::network_document(text) {
        Ok(network) => network,
        Err(error) => {
            assert!(!error.chain().chars().any(char::is_control), "{:?}", error.chain());
            assert!(!error.violations().is_empty(), "{}", error.chain());
            return;
        }
    };
    assert_eq!(decode::network_document(text).ok().as_ref(), Some(&network), "the same text gives the same network");
    // Validation may refuse it; what it takes is the same network when it is written down and read again.
    let document = json!({"instance": "web1", "network": {"document": text}});
    let Ok(decoded) = decode::from_value(&document, None) else { return };
    let again = json!({"instance": "web1", "network": network_value(&network)});
    let again = decode::from_value(&again, None).expect("our own form of a valid network is valid");
    assert_eq!(again.config.network, decoded.config.network);
});
