//! A byte that chooses an image, and a document: decoded, validated, injected. No control character of a value gets into a file or a message, and
//! the same input gives the same edits.

#![no_main]

#[path = "../../tests/common/guest_trees/mod.rs"]
mod guest_trees;

use std::{
    collections::{BTreeSet, HashSet},
    sync::OnceLock,
};

use cloudletd::{
    fs::edit::EditOp,
    guest::{decode, facts::GuestFacts},
    units::Timestamp,
};
use guest_trees::injection::{Given, injected, name, root_mount};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fn trees() -> &'static [(&'static str, GuestFacts)] {
    static TREES: OnceLock<Vec<(&'static str, GuestFacts)>> = OnceLock::new();
    TREES.get_or_init(guest_trees::all)
}

/// All strings and keys with control characters inside; the caller's own files may have any content. The end of a line after a key is how it comes out of its file.
fn bad_texts(value: &Value, found: &mut Vec<String>) {
    let is_bad = |text: &str| text.trim().chars().any(char::is_control);
    match value {
        Value::String(text) if is_bad(text) => found.push(text.clone()),
        Value::Array(elements) => elements.iter().for_each(|value| bad_texts(value, found)),
        Value::Object(members) => {
            for (name, member) in members {
                if is_bad(name) {
                    found.push(name.clone());
                }
                if !matches!(&name[..], "content" | "content_base64") {
                    bad_texts(member, found);
                }
            }
        }
        _ => {}
    }
}

fn is_control(c: char) -> bool {
    c.is_control() && !matches!(c, '\n' | '\t')
}

fuzz_target!(|bytes: &[u8]| {
    let Some((which, text)) = bytes.split_first() else { return };
    let (_, facts) = &trees()[usize::from(*which) % trees().len()];
    let decoded = match decode::from_json(text, (which & 0x80 == 0).then(name).as_ref()) {
        Ok(decoded) => decoded,
        Err(error) => {
            assert!(!error.chain().chars().any(is_control), "{:?}", error.chain());
            return;
        }
    };
    let config = decoded.config;
    let claimed = BTreeSet::from(["/etc/motd".to_owned()]);
    let secret_args = BTreeSet::from(["pin".to_owned()]);
    let now = Timestamp { secs: 5, nanos: 0 };
    let given = Given { claimed, secret_args, fstab_root: Some(root_mount()), now };
    let injection = match injected(facts, &config, &given) {
        Ok(injection) => injection,
        Err(error) => {
            assert!(error.kind() != cloudletd::error::Kind::Internal, "{}", error.chain());
            assert!(!error.chain().chars().any(is_control), "{:?}", error.chain());
            return;
        }
    };
    assert_eq!(injected(facts, &config, &given).as_ref().ok(), Some(&injection), "the same input gives the same edits");
    let document: Value = serde_json::from_slice(text).expect("it was decoded");
    let mut bad = Vec::new();
    bad_texts(&document, &mut bad);
    let own: HashSet<String> = config.files.iter().map(|file| file.path.to_string()).collect();
    for edit in &injection.edits {
        let path = edit.path.to_string();
        assert!(!path.chars().any(char::is_control), "{path:?}");
        assert!(path != "/etc/motd" || own.contains(&path), "a template's file was written");
        let content = match &edit.op {
            EditOp::WriteFile { content, .. } if !own.contains(&path) => content,
            EditOp::Symlink { target, .. } => target,
            _ => continue,
        };
        if path.ends_with("/random-seed") {
            // Random bytes of the instance's own, whatever the document says.
            assert_eq!(content.len(), 512, "{path}");
            continue;
        }
        let content = std::str::from_utf8(content).unwrap_or_else(|_| panic!("{path} is not text"));
        assert!(!content.chars().any(is_control), "{path}: {content:?}");
        for text in &bad {
            assert!(!content.contains(text.as_str()), "{path} has {text:?}: {content:?}");
        }
    }
    let report = serde_json::to_string(&injection.report).expect("a report");
    assert!(!report.chars().any(char::is_control), "{report:?}");
    let _ = format!("{injection:?}");
});
