//! What the program is made of: licences, origin and kind of every dependency, and where the crate itself is unsafe. Works without network; advisories are what
//! `cargo audit` and `cargo deny check advisories` are for, where there is one.

use std::{fs, path::Path, process::Command};

use serde_json::Value;

/// Licences that the program may be under together with its own, SPDX.
const LICENCES: [&str; 13] = [
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT",
    "MIT-0",
    "0BSD",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "Unlicense",
    "CC0-1.0",
    "bzip2-1.0.6",
];

/// Crates that must not get in by the back door, and why.
const BANNED: [(&str, &str); 7] = [
    ("openssl-sys", "TLS is rustls with ring; a second stack doubles the advisories"),
    ("native-tls", "the same"),
    ("aws-lc-sys", "the same"),
    ("boring-sys", "the same"),
    ("serde_yaml", "not maintained"),
    ("tar", "PAX sizes are read differently from other tools; tests only"),
    ("libz-sys", "zlib-rs is what decompresses"),
];

/// What the keeper runs with privileges, beside reading the operator's configuration; `src/host/keeper/mod.rs` says so too.
const PRIVILEGED: [&str; 9] = ["keeper/mod", "keeper/wire", "keeper/serve", "block", "in_use", "loops", "mounts", "sys", "descriptors"];
/// Lines that one reads in one sitting, comments included.
const SITTING: usize = 2_000;

#[test]
fn what_runs_with_privileges_can_be_read_in_one_sitting() {
    let lines = |name: &&str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/host/{name}.rs"));
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        text.split("#[cfg(test)]\nmod tests").next().expect("a first part").lines().count()
    };
    let total: usize = PRIVILEGED.iter().map(lines).sum();
    assert!((1..=SITTING).contains(&total), "{total} lines");
}

fn packages() -> Vec<Value> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--locked", "--offline", "--format-version=1", "--filter-platform=x86_64-unknown-linux-gnu"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("run cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    document["packages"].as_array().expect("a list").clone()
}

/// Whether an SPDX expression leaves a choice that is allowed. `/` is how old manifests wrote OR.
fn is_allowed(expression: &str) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let (value, rest) = any(&words);
    assert!(rest.is_empty(), "{expression:?} is not understood");
    value
}

fn any<'w>(words: &'w [&'w str]) -> (bool, &'w [&'w str]) {
    let (mut value, mut rest) = all(words);
    while let ["OR", after @ ..] = rest {
        let (next, after) = all(after);
        (value, rest) = (value || next, after);
    }
    (value, rest)
}

fn all<'w>(words: &'w [&'w str]) -> (bool, &'w [&'w str]) {
    let (mut value, mut rest) = one(words);
    while let ["AND", after @ ..] = rest {
        let (next, after) = one(after);
        (value, rest) = (value && next, after);
    }
    (value, rest)
}

fn one<'w>(words: &'w [&'w str]) -> (bool, &'w [&'w str]) {
    match words {
        ["(", inside @ ..] => match any(inside) {
            (value, [")", rest @ ..]) => (value, rest),
            (value, rest) => (value, rest),
        },
        [name, "WITH", exception, rest @ ..] => (LICENCES.contains(&format!("{name} WITH {exception}").as_str()), rest),
        [name, rest @ ..] => (LICENCES.contains(name), rest),
        [] => (false, &[]),
    }
}

#[test]
fn licences_are_understood_as_they_are_written() {
    for (expression, allowed) in [
        ("MIT", true),
        ("MIT/Apache-2.0", true),
        ("GPL-3.0 OR MIT", true),
        ("GPL-3.0 AND MIT", false),
        ("(MIT OR GPL-3.0) AND Unicode-3.0", true),
        ("(MIT OR GPL-3.0) AND GPL-2.0", false),
        ("Apache-2.0 WITH LLVM-exception", true),
        ("GPL-2.0 WITH Classpath-exception-2.0", false),
        ("", false),
    ] {
        assert_eq!(is_allowed(expression), allowed, "{expression}");
    }
}

#[test]
fn every_dependency_has_a_licence_that_fits_and_comes_from_the_one_registry() {
    let packages = packages();
    let mut sources = std::collections::BTreeSet::new();
    for package in &packages {
        let (name, version) = (package["name"].as_str().expect("a name"), package["version"].as_str().expect("a version"));
        let licence = package["license"].as_str().unwrap_or_else(|| panic!("{name} {version} names no licence"));
        assert!(is_allowed(licence), "{name} {version} is under {licence}");
        match package["source"].as_str() {
            Some(source) => drop(sources.insert(source)),
            None => assert_eq!(name, env!("CARGO_PKG_NAME"), "{name} {version} comes from a path"),
        }
    }
    assert!(packages.len() > 100, "this is not all: {}", packages.len());
    assert!(sources.len() == 1 && sources.iter().all(|source| source.starts_with("registry+")), "{sources:?}");
}

#[test]
fn nothing_that_was_ruled_out_is_linked() {
    // `tree` leaves out what only tests and build scripts need.
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let arguments = ["tree", "--locked", "--offline", "--edges=normal", "--prefix=none", "--format={p}", "--target=x86_64-unknown-linux-gnu"];
    let output = Command::new(cargo).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("run cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    let names: Vec<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(names.contains(&"rustls"), "{text}");
    for (name, why) in BANNED {
        assert!(!names.contains(&name), "{name} is linked: {why}");
    }
}

#[test]
fn unsafe_is_in_one_file_and_each_use_says_why_it_is_sound() {
    let mut count = 0;
    visit(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut |path, text| {
        let lines: Vec<&str> = text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if !code.split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|word| word == "unsafe") {
                continue;
            }
            let place = format!("{}:{}", path.display(), index + 1);
            assert!(path.ends_with("src/host/sys.rs"), "{place}: unsafe belongs to src/host/sys.rs");
            let reason = lines[index.saturating_sub(8)..index].iter().any(|line| line.to_ascii_uppercase().contains("SAFETY"));
            assert!(reason, "{place}: no comment says why this is sound");
            count += 1;
        }
    });
    println!("{count} uses of unsafe");
    assert!(count > 0, "the search finds nothing");
}

fn visit(directory: &Path, each: &mut impl FnMut(&Path, &str)) {
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            visit(&path, each);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            each(&path, &fs::read_to_string(&path).expect("text"));
        }
    }
}
