//! Standard tools judge the other files that injection writes: ssh-keygen the host keys and known_hosts lines, pwck, grpck and visudo the accounts,
//! findmnt the fstab.
//!
//! Needs root (pwck and grpck change their root) and the Debian packages openssh-client, dropbear-bin, passwd, sudo and util-linux; without them the tests fail.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::Path,
    process::{Command, Output},
};

use cloudletd::{
    fs::edit::EditOp,
    guest::{
        Injection, decode,
        facts::{GuestFacts, NodeKind},
    },
};

use crate::common::guest_trees::{
    self,
    injection::{Given, injected, name, root_mount},
};

const DOCUMENT: &str = r#"{
    "hostname": "web1.example.com",
    "root_password_hash": "$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc.eoxqOmSuNp2xS0ktL3nh/",
    "network": {"interfaces": [{"name": "eth0", "addresses": ["192.0.2.10/24"]}]}
}"#;

/// Injects into the Debian-like tree and writes the tree's own text files and the edits below `root`.
fn apply(root: &Path) {
    apply_to(root, &guest_trees::debian_ifupdown(), DOCUMENT);
}

fn apply_to(root: &Path, facts: &GuestFacts, document: &str) -> Injection {
    let config = decode::from_json(document.as_bytes(), Some(&name())).expect("valid").config;
    let injection = injected(facts, &config, &Given { fstab_root: Some(root_mount()), ..Given::default() }).expect("injects");
    let write = |path: &str, content: &[u8], mode: u16| {
        let path = root.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().expect("parent")).expect("directories");
        fs::write(&path, content).expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode.into())).expect("mode");
    };
    for (path, node) in &facts.nodes {
        if let NodeKind::File { content: Some(content), .. } = &node.kind {
            write(path, content, node.mode);
        }
    }
    for edit in &injection.edits {
        let path = edit.path.to_string();
        let at = root.join(path.trim_start_matches('/'));
        match &edit.op {
            EditOp::WriteFile { content, attrs } => {
                write(&path, content, attrs.mode);
                chown(&at, Some(attrs.uid), Some(attrs.gid)).expect("chown");
            }
            EditOp::MakeDir { .. } => fs::create_dir_all(&at).expect("mkdir"),
            EditOp::Symlink { target, .. } => {
                fs::create_dir_all(at.parent().expect("parent")).expect("directories");
                let _ = fs::remove_file(&at);
                symlink(std::str::from_utf8(target).expect("text"), &at).expect("symlink");
            }
            EditOp::Remove => {
                let _ = fs::remove_file(&at);
            }
            _ => panic!("{edit:?} is not known to this test"),
        }
    }
    injection
}

#[track_caller]
fn tool(program: &str, arguments: &[&str]) -> Output {
    assert!(Path::new(program).exists(), "this test needs {program}: install openssh-client, dropbear-bin, passwd, sudo, util-linux");
    Command::new(program).args(arguments).env("LC_ALL", "C").output().expect("runs")
}

#[test]
fn ssh_keygen_agrees_with_keys_fingerprints_and_known_hosts() {
    let root = tempfile::tempdir().expect("scratch");
    let document = DOCUMENT.replacen('{', r#"{"ssh_host_key_types": ["ed25519", "ecdsa", "rsa"],"#, 1);
    let injection = apply_to(root.path(), &guest_trees::debian_ifupdown(), &document);
    let keys = &injection.report.ssh_host_keys;
    assert_eq!(keys.len(), 3);
    let known = root.path().join("known_hosts");
    fs::write(&known, keys.iter().map(|key| format!("{}\n", key.known_hosts)).collect::<String>()).expect("write");
    for (name, key) in ["ed25519", "ecdsa", "rsa"].iter().zip(keys) {
        let path = root.path().join(format!("etc/ssh/ssh_host_{name}_key"));
        let path = path.to_str().expect("UTF-8");
        let public = tool("/usr/bin/ssh-keygen", &["-y", "-f", path]);
        assert!(public.status.success(), "{}", String::from_utf8_lossy(&public.stderr));
        let public = String::from_utf8(public.stdout).expect("text");
        let beside = fs::read_to_string(format!("{path}.pub")).expect("public key");
        assert_eq!(public, beside, "the private key belongs to the public one");
        let listed = String::from_utf8(tool("/usr/bin/ssh-keygen", &["-l", "-f", path]).stdout).expect("text");
        assert!(listed.contains(&key.fingerprint), "{listed}");
        let records = String::from_utf8(tool("/usr/bin/ssh-keygen", &["-r", "web1.example.com.", "-f", path]).stdout).expect("text");
        let record = key.sshfp.as_deref().expect("a record");
        assert!(records.lines().any(|line| line == record), "{record} is not among {records}");
    }
    for host in ["web1.example.com", "web1", "192.0.2.10"] {
        let found = tool("/usr/bin/ssh-keygen", &["-F", host, "-f", known.to_str().expect("UTF-8")]);
        assert_eq!(String::from_utf8_lossy(&found.stdout).lines().filter(|line| !line.starts_with('#')).count(), 3, "{host}");
    }
}

#[test]
fn pwck_and_findmnt_find_nothing_wrong() {
    let root = tempfile::tempdir().expect("scratch");
    apply(root.path());
    let at = |path: &str| root.path().join(path).to_str().expect("UTF-8").to_owned();
    let accounts = tool("/usr/sbin/pwck", &["--read-only", "--quiet", &at("etc/passwd"), &at("etc/shadow")]);
    let told = String::from_utf8_lossy(&accounts.stdout);
    // Homes and shells are looked up on the machine that runs the test: only complaints about lines count.
    assert!(!told.contains("invalid") && !told.contains("no matching"), "{told}");
    let mounts = tool("/usr/bin/findmnt", &["--noheadings", "--tab-file", &at("etc/fstab"), "--output", "SOURCE,TARGET,FSTYPE"]);
    let told = String::from_utf8_lossy(&mounts.stdout);
    let fields: Vec<&str> = told.split_whitespace().collect();
    assert_eq!(fields, ["UUID=6a1f0a5e-0000-4000-8000-000000000001", "/", "ext4"], "{told}");
}

#[test]
fn pwck_grpck_and_visudo_find_nothing_wrong_with_users_that_were_made() {
    let root = tempfile::tempdir().expect("scratch");
    let facts = guest_trees::debian_with_accounts();
    let document = r#"{"root_login": "keys-only", "users": [
        {"name": "bob", "full_name": "Bob B", "groups": ["adm", "sudo"], "sudo": "nopasswd"},
        {"name": "eve", "uid": 4321, "home": "/srv/eve", "sudo": "password", "password_hash":
         "$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc.eoxqOmSuNp2xS0ktL3nh/"},
        {"name": "ada", "groups": ["sudo"], "lock_password": true}]}"#;
    for path in ["bin/bash", "bin/sh", "usr/sbin/nologin", "home/ada/x", "root/x", "nonexistent/x"] {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().expect("parent")).expect("directories");
        fs::write(&path, "").expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
    }
    apply_to(root.path(), &facts, document);
    let at = root.path().to_str().expect("UTF-8");
    for program in ["/usr/sbin/pwck", "/usr/sbin/grpck"] {
        let found = tool(program, &["--read-only", "--root", at]);
        assert!(found.status.success() && found.stdout.is_empty(), "{program}: {}", String::from_utf8_lossy(&found.stdout));
    }
    let sudoers = root.path().join("etc/sudoers.d/90-cloudlet");
    let checked = tool("/usr/sbin/visudo", &["--check", "--strict", "--owner", "--perms", "--file", sudoers.to_str().expect("UTF-8")]);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn dropbear_reads_the_key_that_is_made_for_it() {
    let root = tempfile::tempdir().expect("scratch");
    let mut facts = guest_trees::alpine_busybox();
    for path in ["/usr/sbin/sshd", "/etc/ssh/sshd_config"] {
        facts.nodes.remove(path);
    }
    guest_trees::put(&mut facts, "/usr/sbin/dropbear", &guest_trees::Is::Present);
    let injection = apply_to(root.path(), &facts, "{}");
    let path = root.path().join("etc/dropbear/dropbear_ed25519_host_key");
    let shown = tool("/usr/bin/dropbearkey", &["-y", "-f", path.to_str().expect("UTF-8")]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    let key = injection.report.ssh_host_keys[0].known_hosts.split_once(' ').expect("two fields").1;
    assert!(shown.contains(key), "{key} is not in {shown}");
}

#[test]
fn systemctl_and_systemd_analyze_agree_with_units_that_were_enabled() {
    let root = tempfile::tempdir().expect("scratch");
    let mut facts = guest_trees::debian_ifupdown();
    let unit = "[Unit]\nDescription=x\n[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n";
    for name in ["on.service", "off.service", "masked.service", "getty@.service"] {
        guest_trees::put(&mut facts, &format!("/usr/lib/systemd/system/{name}"), &guest_trees::Is::Text(unit));
    }
    let wants = "/etc/systemd/system/multi-user.target.wants/off.service";
    guest_trees::put(&mut facts, wants, &guest_trees::Is::To("/usr/lib/systemd/system/off.service"));
    let document = r##"{"first_boot_script": "#!/bin/sh\ntrue\n", "units": [{"name": "on.service", "state": "enabled"}, {"name": "off.service", "state": "disabled"},
        {"name": "masked.service", "state": "masked"}, {"name": "getty@ttyS1.service", "state": "enabled"}]}"##;
    apply_to(root.path(), &facts, document);
    let at = format!("--root={}", root.path().display());
    for (name, state) in [
        ("on.service", "enabled"),
        ("off.service", "disabled"),
        ("masked.service", "masked"),
        ("getty@ttyS1.service", "enabled"),
        ("cloudlet-first-boot.service", "enabled"),
    ] {
        let found = tool("/usr/bin/systemctl", &[&at, "is-enabled", name]);
        assert_eq!(String::from_utf8_lossy(&found.stdout).trim(), state, "{name}: {}", String::from_utf8_lossy(&found.stderr));
    }
    // The program is looked up on the machine that runs the test, the rest of the unit is the guest's.
    let own = root.path().join("etc/systemd/system/cloudlet-first-boot.service");
    let text = fs::read_to_string(&own).expect("the unit").replace("/usr/local/sbin/cloudlet-first-boot", "/bin/true");
    fs::write(&own, text).expect("write");
    let checked = tool("/usr/bin/systemd-analyze", &["verify", "--man=no", own.to_str().expect("UTF-8")]);
    let told = String::from_utf8_lossy(&checked.stderr);
    assert!(checked.status.success() && !told.contains("cloudlet-first-boot"), "{told}");
}
