//! A manifest, the content of its templates, and a path, separated by NUL bytes: parsed, checked, its templates rendered, its patterns matched.

#![no_main]

use std::collections::BTreeSet;

use cloudletd::{
    guest::{
        config::InstanceConfig,
        decode,
        facts::{GuestFacts, Node, NodeKind},
    },
    manifest::{Manifest, apply, check, template},
    names::{GuestPath, InstanceName},
};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};

fn config() -> InstanceConfig {
    let name: InstanceName = "web1".parse().expect("a name");
    let document = json!({"hostname": "web1.example.com", "network": {"nameservers": ["192.0.2.53", "2001:db8::53"], "search": ["example.com"], "interfaces": [
        {"name": "eth0", "mac": "52:54:00:00:00:01", "addresses": ["192.0.2.10/24", "2001:db8::10/64"], "gateway4": "192.0.2.1"}, {"name": "eth1", "dhcp4": true}]}});
    decode::from_value(&document, Some(&name)).expect("a configuration").config
}

/// A tree in which every template of the manifest has this content.
fn facts(manifest: &Manifest, source: &[u8]) -> GuestFacts {
    let mut facts = GuestFacts::default();
    let mut put = |path: &GuestPath, kind: NodeKind| {
        let path = String::from_utf8_lossy(path.as_bytes()).into_owned();
        facts.nodes.entry(path).or_insert(Node { kind, mode: 0o640, uid: 1, gid: 2 });
    };
    for path in manifest.templates() {
        let mut above = path.parent();
        while let Some(directory) = above {
            put(&directory, NodeKind::Directory);
            above = directory.parent();
        }
        put(path, NodeKind::File { size: source.len() as u64, content: Some(source.to_vec()) });
    }
    facts
}

fn check_manifest(manifest: &Manifest, source: &[u8]) {
    let text = serde_json::to_vec_pretty(manifest.to_json()).expect("JSON");
    let again = Manifest::parse(&text).expect("a manifest can be read back");
    assert_eq!(again.digest(), manifest.digest(), "white space doesn't matter");
    let judged = Manifest::judged(manifest.to_judged()).expect("what was judged right is right");
    assert_eq!((judged.digest(), judged.secret_args(), judged.volatile()), (manifest.digest(), manifest.secret_args(), manifest.volatile()));
    let _ = (manifest.machine(), manifest.entry_point_names(), manifest.disk_size(), manifest.label(), manifest.layout());
    let args = manifest.resolve_args(&Map::new());
    for name in ["hostname", "a", "password"] {
        let given = Map::from_iter([(name.to_owned(), Value::from("x\u{7}y")), ("n".to_owned(), Value::from(3))]);
        assert!(manifest.resolve_args(&given).is_err(), "a control character got through");
        let given = Map::from_iter([(name.to_owned(), Value::from("xy"))]);
        let _ = manifest.resolve_args(&given);
    }
    let image = apply::ImageInfo { id: "img-1".into(), name: manifest.name().to_owned() };
    let context = apply::context(&config(), &args.unwrap_or_default(), &image);
    if let Ok(edits) = apply::template_edits(manifest, &facts(manifest, source), context, |sources, context, secret| apply::expand(&sources, &context, secret)) {
        let listed: BTreeSet<&GuestPath> = manifest.templates().iter().collect();
        assert!(edits.iter().all(|edit| listed.contains(&edit.path)), "an edit of something else");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(3, |byte| *byte == 0);
    let (document, source, path) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let report = check::check(document);
    let _ = report.render("manifest.json").to_string();
    let parsed = Manifest::parse(document);
    assert_eq!(parsed.is_ok(), report.is_valid(), "check and parse agree");
    if let Ok(source) = std::str::from_utf8(source) {
        let context =
            json!({"args": {"hostname": "h", "list": [1, 2, "three"], "secret": "s3cret", "on": true}, "ip": {"interfaces": [{"name": "eth0"}]}});
        if let Ok(text) = template::render("/etc/x", source, &context) {
            assert!(text.len() <= template::OUTPUT_LEN_MAX);
            assert!(template::check("/etc/x", source).is_ok(), "what renders is right");
        }
    }
    match parsed {
        Err(error) => {
            let _ = error.chain();
        }
        Ok(manifest) => {
            check_manifest(&manifest, source);
            if let Ok(path) = GuestPath::from_member(path) {
                let _ = manifest.volatile_patterns().expect("compiled before").matches(&path);
            }
        }
    }
});
