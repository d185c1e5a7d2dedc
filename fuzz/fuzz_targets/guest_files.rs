//! A byte that chooses an image, one that chooses a file of it that injection reads, and what the image has there instead: a configuration with everything is
//! injected. It ends, the same input gives the same edits, and what is written is not much longer than what was read.

#![no_main]

#[path = "../../tests/guest_trees/mod.rs"]
mod guest_trees;

use std::{collections::BTreeSet, sync::OnceLock};

use cloudletd::{
    error::Kind,
    fs::{FsKind, edit::EditOp},
    guest::{
        Inputs,
        config::{InstanceConfig, Secret},
        decode,
        facts::{GuestFacts, NodeKind},
        fstab::RootMount,
        identity::Identity,
        inject,
    },
    names::InstanceName,
    units::Timestamp,
};
use libfuzzer_sys::fuzz_target;
use serde_json::json;
use uuid::Uuid;

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ me@example";

fn trees() -> &'static [(&'static str, GuestFacts)] {
    static TREES: OnceLock<Vec<(&'static str, GuestFacts)>> = OnceLock::new();
    TREES.get_or_init(guest_trees::all)
}

fn config() -> &'static InstanceConfig {
    static CONFIG: OnceLock<InstanceConfig> = OnceLock::new();
    CONFIG.get_or_init(|| {
        let name: InstanceName = "web1".parse().expect("a name");
        let document = json!({
            "hostname": "web1.example.com", "args": {"title": "t"}, "timezone": "Europe/Berlin",
            "authorized_keys": {"root": [KEY], "bob": [KEY]}, "users": [{"name": "bob", "full_name": "Bob", "groups": ["root"]}],
            "network": {"nameservers": ["192.0.2.53"], "search": ["example.com"], "interfaces": [
                {"name": "eth0", "mac": "52:54:00:00:00:01", "addresses": ["192.0.2.10/24", "2001:db8::10/64"], "gateway4": "192.0.2.1"},
                {"name": "eth1", "dhcp4": true}]}
        });
        decode::from_value(&document, Some(&name)).expect("a configuration").config
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
    let identity = Identity::derive(&Uuid::from_u128(1), &config.instance, Secret::new(vec![7; 32])).expect("an identity");
    let root = RootMount { source: "UUID=0000-1".into(), fs: FsKind::Ext4, mounts: Default::default() };
    let none = BTreeSet::new();
    let now = Timestamp { secs: 5, nanos: 0 };
    let inputs = Inputs { facts: &facts, config, identity: &identity, claimed: &none, secret_args: &none, fstab_root: Some(&root), now };
    match inject(&inputs) {
        Ok(injection) => {
            assert_eq!(inject(&inputs).as_ref().ok(), Some(&injection), "the same input gives the same edits");
            for edit in &injection.edits {
                if let EditOp::WriteFile { content: written, .. } = &edit.op {
                    assert!(written.len() <= 4 * content.len() + 65536, "{} has {} bytes", edit.path, written.len());
                }
            }
        }
        Err(error) => assert!(error.kind() != Kind::Internal, "{}", error.chain()),
    }
});
