//! `[[trust]]` in a running daemon: what a source owes is asked for before anything is read, whoever asks and whatever is in the store already.
//!
//! Signatures are made by minisign and GnuPG; without them the tests fail.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::common::daemon::Daemon;
use crate::kit::{Gpg, Minisign};
use serde_json::{Value, json};

/// A source of tarballs below a directory of the test.
struct Source {
    dir: tempfile::TempDir,
}

impl Source {
    fn new() -> Source {
        let dir = tempfile::tempdir().expect("temporary directory");
        for name in ["pgp", "mini", "free"] {
            fs::create_dir(dir.path().join(name)).expect("make a directory");
        }
        Source { dir }
    }

    /// A tarball that holds `content`.
    fn tarball(&self, name: &str, content: &str) -> PathBuf {
        let tree = tempfile::tempdir().expect("temporary directory");
        fs::write(tree.path().join("content"), content).expect("write");
        let path = fs::canonicalize(self.dir.path()).expect("is there").join(name);
        let status = Command::new("tar").arg("--create").arg("--file").arg(&path).arg("--directory").arg(tree.path()).arg(".").status();
        assert!(status.expect("run tar").success());
        path
    }

    fn daemon(&self, gpg: &Gpg, minisign: &Minisign) -> Daemon {
        let keys = self.dir.path().join("keys.gpg");
        fs::write(&keys, gpg.export(&["builder"])).expect("write the keyring");
        let root = fs::canonicalize(self.dir.path()).expect("is there");
        let root = root.display();
        Daemon::start_in(
            self.dir.path(),
            &format!(
                "[[trust]]\nprefix = 'file://{root}/'\nrequire = 'signature'\nopenpgp = ['{}']\n\
                 [[trust]]\nprefix = 'file://{root}/mini/'\nrequire = 'signature'\nminisign = ['{}']\n\
                 [[trust]]\nprefix = 'file://{root}/free/'\nrequire = 'nothing'\n",
                keys.display(),
                minisign.public_key().display()
            ),
        )
    }
}

/// What became of an image: its JSON after the golden was built, or what was said.
fn build(daemon: &Daemon, name: &str, tarball: &Path) -> Result<Value, String> {
    let manifest = json!({
        "name": name, "arch": "x86_64", "entry_points": {"kernel": {"os": "linux"}}, "rootfs": {"url": format!("file://{}", tarball.display())},
    });
    let path = daemon.directory().join(format!("{name}.json"));
    fs::write(&path, manifest.to_string()).expect("write the manifest");
    let path = path.to_str().expect("text");
    let create = || -> Value { serde_json::from_str(&daemon.script_ok("create-image.sh", &[path, "--json"])).expect("JSON") };
    let id = create()["image"]["id"].as_str().expect("an id").to_owned();
    let output = daemon.script("prerender.sh", &[&id, "--size", "67108864"]);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(create()["image"].clone()) } else { Err(said) }
}

#[track_caller]
fn refused(result: Result<Value, String>, reason: &str) {
    let said = result.expect_err(reason);
    assert!(said.contains(reason), "{reason} is not in: {said}");
}

fn left(daemon: &Daemon) -> usize {
    ["blobs", "tmp", "goldens"].iter().map(|folder| files(&daemon.directory().join("state").join(folder))).sum()
}

fn files(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { files(&entry.path()) } else { 1 }).sum()
}

fn beside(tarball: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", tarball.display()))
}

fn keys() -> (Gpg, Minisign) {
    let gpg = Gpg::new();
    gpg.make_key("builder", "ed25519", "sign", "0");
    gpg.make_key("stranger", "ed25519", "sign", "0");
    (gpg, Minisign::new())
}

#[test]
fn a_signed_tarball_is_built_and_the_image_says_who_signed() {
    let ((gpg, minisign), source) = (keys(), Source::new());
    let daemon = source.daemon(&gpg, &minisign);
    let pgp = source.tarball("pgp/a.tar", "a");
    fs::write(beside(&pgp, ".asc"), gpg.sign("builder", &fs::read(&pgp).expect("read"), &["--armor"])).expect("write");
    let image = build(&daemon, "pgp", &pgp).unwrap_or_else(|said| panic!("{said}"));
    assert_eq!(
        (&image["rootfs"]["signedBy"]["method"], &image["rootfs"]["signedBy"]["key"]),
        (&json!("openpgp"), &json!(gpg.fingerprint("builder")))
    );
    assert!(image["rootfs"]["signedBy"]["madeAt"].is_string(), "{image}");
    let mini = source.tarball("mini/b.tar", "b");
    minisign.sign(&mini, &[]);
    let image = build(&daemon, "mini", &mini).unwrap_or_else(|said| panic!("{said}"));
    assert_eq!((&image["rootfs"]["signedBy"]["method"], &image["rootfs"]["signedBy"]["key"]), (&json!("minisign"), &json!(minisign.key_id())));
    let free = source.tarball("free/c.tar", "c");
    let image = build(&daemon, "free", &free).unwrap_or_else(|said| panic!("{said}"));
    assert!(image["rootfs"]["signedBy"].is_null(), "{image}");
}

#[test]
fn without_a_good_signature_nothing_is_taken_and_nothing_is_left() {
    let ((gpg, minisign), source) = (keys(), Source::new());
    let daemon = source.daemon(&gpg, &minisign);
    let before = left(&daemon);
    let good = source.tarball("pgp/good.tar", "good");
    let signature = gpg.sign("builder", &fs::read(&good).expect("read"), &["--armor"]);
    let stranger = gpg.sign("stranger", &fs::read(&good).expect("read"), &["--armor"]);
    for (name, suffix, signature, reason) in [
        ("stripped", "", None, "SIGNATURE_MISSING"),
        ("elsewhere", ".gpg", Some(&signature), "SIGNATURE_MISSING"),
        ("other-file", ".asc", Some(&signature), "SIGNATURE_INVALID"),
        ("junk", ".asc", Some(&b"no signature".to_vec()), "SIGNATURE_MALFORMED"),
        ("empty", ".asc", Some(&Vec::new()), "SIGNATURE_M"),
        ("huge", ".asc", Some(&vec![b'x'; 100_000]), "SIGNATURE_M"),
        ("stranger", ".asc", Some(&stranger), "SIGNATURE_KEY_UNKNOWN"),
    ] {
        let tarball = source.tarball(&format!("pgp/{name}.tar"), name);
        if let Some(bytes) = signature {
            fs::write(beside(&tarball, suffix), bytes).expect("write");
        }
        refused(build(&daemon, name, &tarball), reason);
        assert_eq!(left(&daemon), before, "{name}");
    }
    let mini = source.tarball("mini/x.tar", "x");
    minisign.sign(&mini, &[]);
    fs::write(&mini, fs::read(source.tarball("free/y.tar", "y")).expect("read")).expect("tamper");
    refused(build(&daemon, "tampered", &mini), "SIGNATURE_INVALID");
    // An OpenPGP signature where minisign is asked for.
    let wrong = source.tarball("mini/z.tar", "z");
    fs::write(beside(&wrong, ".minisig"), &signature).expect("write");
    refused(build(&daemon, "wrong-kind", &wrong), "SIGNATURE_MALFORMED");
    assert_eq!(left(&daemon), before);
    // What was refused may be signed later.
    fs::write(beside(&good, ".asc"), &signature).expect("write");
    build(&daemon, "good", &good).unwrap_or_else(|said| panic!("{said}"));
}

#[test]
fn bytes_that_are_in_the_store_already_are_not_trusted_for_it() {
    let ((gpg, minisign), source) = (keys(), Source::new());
    let daemon = source.daemon(&gpg, &minisign);
    let free = source.tarball("free/a.tar", "same");
    build(&daemon, "free", &free).unwrap_or_else(|said| panic!("{said}"));
    let digest = {
        let output = Command::new("sha256sum").arg(&free).output().expect("run sha256sum");
        String::from_utf8_lossy(&output.stdout).split_whitespace().next().expect("a digest").to_owned()
    };
    let owed = fs::canonicalize(source.dir.path()).expect("is there").join("pgp/a.tar");
    fs::copy(&free, &owed).expect("copy");
    // The manifest names the digest of bytes that are here, built and all.
    let manifest = json!({
        "name": "owed", "arch": "x86_64", "entry_points": {"kernel": {"os": "linux"}},
        "rootfs": {"url": format!("file://{}", owed.display()), "digest": format!("sha256:{digest}")},
    });
    let path = daemon.directory().join("owed.json");
    fs::write(&path, manifest.to_string()).expect("write");
    let created: Value = serde_json::from_str(&daemon.script_ok("create-image.sh", &[path.to_str().expect("text"), "--json"])).expect("JSON");
    let id = created["image"]["id"].as_str().expect("an id");
    let try_it = || daemon.script("prerender.sh", &[id, "--size", "67108864"]);
    let output = try_it();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("SIGNATURE_MISSING"), "{said}");
    fs::write(beside(&owed, ".asc"), gpg.sign("builder", &fs::read(&owed).expect("read"), &[])).expect("write");
    let output = try_it();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
