//! Hostile values: every field of an instance's configuration that holds text, on every tree and back-end, is refused or stays in its place.

use std::{collections::BTreeSet, sync::LazyLock};

use crate::common::guest_trees::{
    self, Is,
    injection::{Given, HASH, KEY, injected, name, root_mount},
    put,
};
use cloudletd::{
    error::Error,
    fs::edit::EditOp,
    guest::{Injection, config::InstanceConfig, decode, facts::GuestFacts},
    units::Timestamp,
};
use proptest::{prelude::*, sample::select};
use serde_json::{Value, json};

fn try_with(facts: &GuestFacts, config: &InstanceConfig) -> Result<Injection, Error> {
    injected(facts, config, &Given { fstab_root: Some(root_mount()), now: Timestamp { secs: 5, nanos: 0 }, ..Given::default() })
}

/// A document with every field that holds text, each with a value that every tree takes where it takes the field at all.
fn every_text() -> Value {
    json!({
        "instance": "web1", "hostname": "web1.example.com", "args": {"title": "t", "list": ["a"]},
        "network": {
            "interfaces": [
                {"name": "eth0", "mac": "52:54:00:00:00:01", "addresses": ["192.0.2.10/24", "2001:db8::10/64"], "gateway4": "192.0.2.1", "gateway6": "fe80::1",
                 "routes": [{"to": "10.0.0.0/8", "via": "192.0.2.254", "type": "unicast"}], "rules": [{"from": "192.0.2.0/24", "to": "10.0.0.0/8", "table": 7}],
                 "nameservers": ["192.0.2.53"], "search": ["example.com"]},
                {"name": "eth1"}, {"name": "eth2"},
                {"name": "bond0", "bond": {"members": ["eth1"], "mode": "active-backup", "primary": "eth1"}},
                {"name": "bond0.5", "vlan": {"id": 5, "link": "bond0"}},
                {"name": "br0", "bridge": {"members": ["eth2"]}}
            ],
            "nameservers": ["192.0.2.54"], "search": ["example.net"], "backend": "netplan"
        },
        "authorized_keys": {"root": [KEY]}, "root_password_hash": HASH, "machine_id": "0123456789abcdef0123456789abcdef", "ssh_host_keys": "keep",
        "files": [{"path": "/etc/app", "content": "x", "mode": "0644", "user": "root", "group": "root", "xattrs": {"user.a": "AAE="}}],
        "users": [{"name": "bob", "full_name": "Bob", "home": "/home/bob", "shell": "/bin/sh", "groups": ["root"], "sudo": "no", "password_hash": HASH}],
        "root_login": "keys-only", "ssh_host_key_types": ["ed25519"], "timezone": "Europe/Berlin", "locale": "de_DE.UTF-8", "keymap": "de",
        "hardware_clock": "utc", "units": [{"name": "nginx.service", "state": "enabled"}], "first_boot_script": "#!/bin/sh\n",
        "cloud_init": {"user_data": "#cloud-config\n", "vendor_data": "", "meta_data": {"a": "b"}}, "selinux": "auto",
        "scrub_skip": ["dhcp"], "scrub_also": ["logs"]
    })
}

/// A tree that has what every field of [`every_text`] needs.
fn debian_with_everything() -> GuestFacts {
    let mut facts = guest_trees::debian_with_accounts();
    for (path, is) in [
        ("/usr/bin/cloud-init", Is::Present),
        ("/usr/share/zoneinfo", Is::Dir),
        ("/usr/share/zoneinfo/Europe", Is::Dir),
        ("/usr/lib/systemd/system/nginx.service", Is::Text("[Install]\nWantedBy=multi-user.target\n")),
    ] {
        put(&mut facts, path, &is);
    }
    facts
}

/// Paths of all texts in a document, names of free members included (as those of `args`).
fn texts(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::String(_) => found.push(at.to_owned()),
        Value::Array(items) => items.iter().enumerate().for_each(|(index, item)| texts(item, &format!("{at}/{index}"), found)),
        Value::Object(members) => members.iter().for_each(|(name, member)| texts(member, &format!("{at}/{name}"), found)),
        _ => {}
    }
}

/// What is the caller's own text, whatever is in it.
const VERBATIM: [&str; 4] = ["/files/0/content", "/first_boot_script", "/cloud_init/user_data", "/cloud_init/vendor_data"];

/// Texts that would mean more than a value where they are written.
const HOSTILE: [&str; 25] = [
    "x\nINJECTED=1",
    "x\rINJECTED",
    "x\u{0}y",
    "\u{1b}[31mx",
    "x\u{85}INJECTED",
    "x\u{2028}INJECTED",
    "x\u{7f}",
    "$(INJECTED)",
    "`INJECTED`",
    "x; INJECTED",
    "x' INJECTED '",
    "x\" INJECTED \"",
    "x\\nINJECTED",
    "x: INJECTED",
    "- INJECTED",
    "x #INJECTED",
    "x\tINJECTED",
    "%INJECTED",
    "{INJECTED: 1}",
    "../../INJECTED",
    "x:INJECTED:0:0",
    "*",
    "&INJECTED",
    "!INJECTED",
    "\u{202e}INJECTED",
];

/// What each text of [`every_text`] is asked for with: that field alone (trees differ in what they have for the others), with another value for the text.
fn document(path: &str, value: Option<&str>) -> Result<InstanceConfig, Error> {
    let field = path.split('/').nth(1).expect("a name");
    let mut document = json!({field: every_text()[field]});
    if path != "/network/backend" && field == "network" {
        // Each tree's own.
        document["network"].as_object_mut().expect("an object").remove("backend");
    }
    if let Some(value) = value {
        *document.pointer_mut(path).expect("a field") = value.into();
    }
    decode::from_value(&document, Some(&name())).map(|decoded| decoded.config)
}

fn hostile_paths() -> Vec<String> {
    let mut paths = Vec::new();
    texts(&every_text(), "", &mut paths);
    assert!(paths.len() > 45, "{paths:?}");
    paths.retain(|path| !VERBATIM.contains(&path.as_str()));
    paths
}

static TREES: LazyLock<Vec<(&str, GuestFacts)>> = LazyLock::new(|| {
    let mut trees = guest_trees::all();
    trees.push(("debian with everything", debian_with_everything()));
    trees
});

#[test]
fn no_hostile_text_in_any_field_gets_out_of_its_place_on_any_tree() {
    let trees = &*TREES;
    let mut accepted = BTreeSet::new();
    for path in hostile_paths() {
        let plain = document(&path, None).unwrap_or_else(|error| panic!("{path}: {error}"));
        let refused: Vec<String> =
            trees.iter().filter_map(|(tree, facts)| try_with(facts, &plain).err().map(|error| format!("{tree}: {error}"))).collect();
        let least = match path.as_str() {
            "/network/backend" => 3,
            path if path.starts_with("/network/") => 15,
            _ => 1,
        };
        assert!(trees.len() - refused.len() >= least, "{path} as it is: {refused:#?}");
        for value in HOSTILE {
            let Ok(config) = document(&path, Some(value)) else { continue };
            for (tree, facts) in trees {
                let Ok(injection) = try_with(facts, &config) else { continue };
                accepted.insert(path.clone());
                check_written(&injection, &format!("{tree}: {path} = {value:?}"));
            }
        }
    }
    // What may be any text of one line: arguments, and comments that are made part of nothing.
    for path in &accepted {
        let free = ["/args/", "/cloud_init/meta_data", "/users/0/full_name", "/authorized_keys/", "/files/0/path", "/users/0/home", "/users/0/shell"];
        assert!(free.iter().any(|free| path.starts_with(free)), "{path} took a hostile value");
    }
    assert!(accepted.contains("/args/title"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// The same with texts that nobody thought of.
    #[test]
    fn no_text_at_all_gets_out_of_its_place(path in select(hostile_paths()), tree in 0..TREES.len(), before in "\\PC{0,3}", odd in any::<char>(), after in "[ -~]{0,4}") {
        let value = format!("{before}{odd}{after}\nINJECTED");
        let on_one_line = value.replace('\n', "");
        // A name may well be one, a locale's modifier included: `x@INJECTED`.
        let harmless = on_one_line.chars().all(|c| c.is_ascii_alphanumeric() || "-._@".contains(c));
        for value in [value.as_str(), &on_one_line].into_iter().take(if harmless { 1 } else { 2 }) {
            if let Ok(config) = document(&path, Some(value)) && let Ok(injection) = try_with(&TREES[tree].1, &config) {
                check_written(&injection, &format!("{}: {path} = {value:?}", TREES[tree].0));
            }
        }
    }
}

/// What is written for a hostile text has no control character, and no shell that reads the file sees a command.
#[track_caller]
fn check_written(injection: &Injection, what: &str) {
    for edit in &injection.edits {
        let path = edit.path.display();
        assert!(!path.chars().any(char::is_control) && !path.contains("/../"), "{what}: {path}");
        let EditOp::WriteFile { content, .. } = &edit.op else { continue };
        let Ok(content) = std::str::from_utf8(content) else { continue };
        assert!(!content.chars().any(|c| c.is_control() && c != '\n' && c != '\t'), "{what}: {path} has a control character");
        assert!(!content.lines().any(|line| line.trim_start().starts_with("INJECTED")), "{what}: {path} has a line of its own\n{content}");
        let by_shell = ["/etc/network/", "/etc/conf.d/", "/etc/sysconfig/", "/etc/default/", "/etc/locale.conf", "/etc/vconsole.conf"];
        assert!(!(by_shell.iter().any(|place| path.starts_with(place)) && content.contains("INJECTED")), "{what}: {path}\n{content}");
    }
    let report = serde_json::to_string(&injection.report).expect("a report");
    assert!(!report.contains("\\u00") && !report.contains("\\n"), "{what}: {report}");
}
