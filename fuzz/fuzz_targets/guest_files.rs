//! A byte that chooses an image, one that chooses a file of it that injection reads, and what the image has there instead: a configuration with everything is
//! injected. It ends, the same input gives the same edits, and what is written is not much longer than what was read.

#![no_main]

#[path = "../../tests/common/guest_trees/mod.rs"]
mod guest_trees;

use std::sync::OnceLock;

use cloudletd::{
    error::Kind,
    fs::edit::EditOp,
    guest::{
        config::InstanceConfig,
        decode,
        facts::{GuestFacts, NodeKind},
    },
    units::Timestamp,
};
use guest_trees::injection::{Given, KEY, injected, name, root_mount};
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fn trees() -> &'static [(&'static str, GuestFacts)] {
    static TREES: OnceLock<Vec<(&'static str, GuestFacts)>> = OnceLock::new();
    TREES.get_or_init(guest_trees::all)
}

fn config() -> &'static InstanceConfig {
    static CONFIG: OnceLock<InstanceConfig> = OnceLock::new();
    CONFIG.get_or_init(|| {
        let document = json!({
            "hostname": "web1.example.com", "args": {"title": "t"}, "timezone": "Europe/Berlin",
            "authorized_keys": {"root": [KEY], "bob": [KEY]}, "users": [{"name": "bob", "full_name": "Bob", "groups": ["root"]}],
            "network": {"nameservers": ["192.0.2.53"], "search": ["example.com"], "interfaces": [
                {"name": "eth0", "mac": "52:54:00:00:00:01", "addresses": ["192.0.2.10/24", "2001:db8::10/64"], "gateway4": "192.0.2.1"},
                {"name": "eth1", "dhcp4": true}]}
        });
        decode::from_value(&document, Some(&name())).expect("a configuration").config
    })
}

fuzz_target!(|bytes: &[u8]| {
    let [which, file, content @ ..] = bytes else { return };
    let (_, facts) = &trees()[usize::from(*which) % trees().len()];
    let mut facts = facts.clone();
    let files = facts.nodes.values_mut().filter_map(|node| match &mut node.kind {
        NodeKind::File { size, content: Some(content) } => Some((size, content)),
        _ => None,
    });
    let mut files: Vec<_> = files.collect();
    let chosen = usize::from(*file) % files.len();
    *files[chosen].0 = content.len() as u64;
    files[chosen].1.clone_from(&content.to_vec());

    let config = config();
    let given = Given { fstab_root: Some(root_mount()), now: Timestamp { secs: 5, nanos: 0 }, ..Given::default() };
    match injected(&facts, config, &given) {
        Ok(injection) => {
            assert_eq!(injected(&facts, config, &given).as_ref().ok(), Some(&injection), "the same input gives the same edits");
            for edit in &injection.edits {
                if let EditOp::WriteFile { content: written, .. } = &edit.op {
                    assert!(written.len() <= 4 * content.len() + 65536, "{} has {} bytes", edit.path, written.len());
                }
            }
        }
        Err(error) => assert!(error.kind() != Kind::Internal, "{}", error.chain()),
    }
});
