//! Golden files of the network back-ends: every case of tests/data/net/cases on every kind of tree, compared with tests/data/net/<tree>/<case>.txt.
//! Setting `CLOUDLETD_REWRITE_GOLDEN=1` writes them anew; the difference is then reviewed like code.

use std::{fmt::Write as _, fs, path::Path};

use cloudletd::{
    error::Kind,
    fs::edit::EditOp,
    guest::{decode, facts::GuestFacts},
    units::Timestamp,
};

use crate::common::guest_trees::{
    self,
    injection::{Given, injected, name},
};

/// What has nothing to do with the network, and is tested elsewhere.
const OTHER_TOPICS: [&str; 9] = [
    "/etc/cloud/cloud.cfg.d/99-cloudlet-identity.cfg",
    "/etc/hosts",
    "/etc/machine-id",
    "/etc/ssh/",
    "/.cloudlet",
    "/.autorelabel",
    "/var/lib/",
    "/etc/udev/rules.d/70-p",
    "/etc/shadow",
];

fn account(facts: &GuestFacts, document: &[u8]) -> String {
    let config = decode::from_json(document, Some(&name())).expect("a valid case").config;
    let mut text = String::new();
    let injection = match injected(facts, &config, &Given { now: Timestamp { secs: 1_700_000_000, nanos: 0 }, ..Given::default() }) {
        Ok(injection) => injection,
        Err(error) if error.kind() == Kind::Unsupported => return format!("refused ({}): {}\n", error.reason(), error.message()),
        Err(error) => panic!("{}", error.chain()),
    };
    let network = injection.report.network.expect("every case has a network");
    let _ = writeln!(text, "backend: {}\nwhy: {}\nresolv.conf: {}", network.backend, network.why, network.resolv_conf);
    for argument in &network.kernel_arguments {
        let _ = writeln!(text, "kernel argument: {argument}");
    }
    for edit in &injection.edits {
        let path = edit.path.to_string();
        if OTHER_TOPICS.iter().any(|other| path.starts_with(other)) {
            continue;
        }
        let _ = write!(text, "\n==== {} {path}", edit.op.verb());
        match &edit.op {
            EditOp::WriteFile { content, attrs } => {
                let content = std::str::from_utf8(content).expect("configuration is text");
                assert!(!content.chars().any(|c| c.is_control() && c != '\n' && c != '\t'), "{path}");
                let _ = write!(text, " {:04o} {}:{} ({})\n{content}", attrs.mode, attrs.uid, attrs.gid, edit.why);
            }
            EditOp::Symlink { target, .. } => {
                let _ = writeln!(text, " -> {} ({})", String::from_utf8_lossy(target), edit.why);
            }
            _ => {
                let _ = writeln!(text, " ({})", edit.why);
            }
        }
    }
    for note in injection.report.notes {
        let _ = writeln!(text, "\nnote: {note}");
    }
    for warning in injection.report.warnings {
        let _ = writeln!(text, "\nwarning: {warning}");
    }
    text
}

#[test]
fn every_case_on_every_tree_gives_the_reviewed_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/net");
    let rewrite = std::env::var_os("CLOUDLETD_REWRITE_GOLDEN").is_some();
    let mut cases: Vec<_> = fs::read_dir(root.join("cases")).expect("cases").map(|entry| entry.expect("entry").path()).collect();
    cases.sort();
    assert!(cases.len() >= 20, "only {} cases", cases.len());
    let mut different = Vec::new();
    for (tree, facts) in guest_trees::all() {
        fs::create_dir_all(root.join(tree)).expect("directory of the tree");
        for case in &cases {
            let name = case.file_stem().expect("name").to_string_lossy().into_owned();
            let got = account(&facts, &fs::read(case).expect("case"));
            let path = root.join(tree).join(format!("{name}.txt"));
            if rewrite {
                fs::write(&path, got).expect("write golden");
            } else if fs::read_to_string(&path).unwrap_or_default() != got {
                different.push(format!("{}:\n{got}", path.display()));
            }
        }
        let goldens = fs::read_dir(root.join(tree)).expect("tree").count();
        assert_eq!(goldens, cases.len(), "{tree} has golden files without a case, or the other way round");
    }
    assert!(different.is_empty(), "{} differ; CLOUDLETD_REWRITE_GOLDEN=1 writes them\n{}", different.len(), different.join("\n----\n"));
}
