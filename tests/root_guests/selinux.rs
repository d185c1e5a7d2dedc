//! libselinux judges our reading of file_contexts(5): matchpathcon(8) with Debian's policy, on all paths of a live system's configuration and some more.
//!
//! Needs root, a Debian mirror once (the policy is kept beside the fixtures) and the packages selinux-utils and policycoreutils; fails without them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use cloudletd::guest::selinux::contexts::{FileContexts, FileKind, Label};

/// Paths that injection writes, and others on which rules meet.
const PATHS: [&str; 40] = [
    "/etc/passwd",
    "/etc/shadow",
    "/etc/group",
    "/etc/gshadow",
    "/etc/subuid",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/machine-id",
    "/etc/resolv.conf",
    "/etc/fstab",
    "/etc/localtime",
    "/etc/timezone",
    "/etc/locale.conf",
    "/etc/adjtime",
    "/etc/ssh/ssh_host_rsa_key",
    "/etc/ssh/ssh_host_ed25519_key.pub",
    "/etc/ssh/sshd_config.d/00-cloudlet.conf",
    "/etc/sudoers.d/90-cloudlet",
    "/etc/systemd/system/cloudlet-first-boot.service",
    "/etc/systemd/system/multi-user.target.wants/x.service",
    "/etc/systemd/network/10-cloudlet-eth0.network",
    "/etc/network/interfaces",
    "/etc/NetworkManager/system-connections/x.nmconnection",
    "/etc/netplan/50-cloudlet.yaml",
    "/etc/udev/rules.d/70-cloudlet-net.rules",
    "/usr/local/sbin/cloudlet-first-boot",
    "/usr/lib/systemd/system/x.service",
    "/usr/lib64/x.so",
    "/lib/x.so.1",
    "/bin/sh",
    "/root",
    "/root/.ssh",
    "/root/.ssh/authorized_keys",
    "/home/ada",
    "/home/ada/.ssh/authorized_keys",
    "/home/ada/.config/systemd/user/x.service",
    "/var/lib/systemd/random-seed",
    "/var/lib/cloud/seed/nocloud/user-data",
    "/.cloudlet/applied_config",
    "/.autorelabel",
];

fn policy() -> PathBuf {
    let root = std::env::var_os("CLOUDLETD_FIXTURES").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fixtures"), PathBuf::from);
    let directory = root.join("selinux-policy-default");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/selinux-policy.sh");
    let made = Command::new(script).arg(&directory).output().expect("runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    directory.join("etc/selinux/default/contexts/files")
}

/// Real paths of this machine: what packages put there is what policies are written for.
fn collect(directory: &Path, left: &mut usize, paths: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut entries: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    entries.sort();
    for path in entries {
        if *left == 0 {
            return;
        }
        if let Some(text) = path.to_str().filter(|text| !text.contains(char::is_whitespace)) {
            paths.push(text.to_owned());
            *left -= 1;
        }
        if path.is_dir() && !path.is_symlink() {
            collect(&path, left, paths);
        }
    }
}

#[test]
fn every_path_has_the_label_that_libselinux_gives_it() {
    let files = policy();
    let text = |name: &str| fs::read_to_string(files.join(name)).unwrap_or_default();
    let base = text("file_contexts");
    assert!(base.lines().count() > 3000, "a real policy");
    let mut contexts = FileContexts::parse(
        &[&base, &text("file_contexts.homedirs"), &text("file_contexts.local")],
        &text("file_contexts.subs"),
        &text("file_contexts.subs_dist"),
    );
    assert_eq!(contexts.skipped, 0);
    let mut paths: Vec<String> = PATHS.iter().map(|path| (*path).to_owned()).collect();
    for (directory, count) in
        [("/etc", 400), ("/usr/bin", 150), ("/usr/sbin", 150), ("/usr/lib/systemd", 150), ("/var", 200), ("/run", 30), ("/boot", 10)]
    {
        collect(Path::new(directory), &mut { count }, &mut paths);
    }
    assert!(paths.len() > 500, "only {} paths", paths.len());
    let mut different = Vec::new();
    for (mode, kind) in [("file", FileKind::File), ("dir", FileKind::Directory), ("link", FileKind::Symlink)] {
        let file = files.join("file_contexts");
        let said =
            Command::new("matchpathcon").arg("-f").arg(file).args(["-m", mode]).args(&paths).output().expect("matchpathcon: install selinux-utils");
        let said = String::from_utf8(said.stdout).expect("text");
        let lines: Vec<(&str, &str)> = said.lines().filter_map(|line| line.split_once('\t')).collect();
        assert_eq!(lines.len(), paths.len(), "matchpathcon answers for each path");
        for (path, wanted) in lines {
            let got = match contexts.lookup(path, kind) {
                Label::Context(context) => context,
                Label::None | Label::Unknown => "<<none>>".to_owned(),
            };
            if got != wanted {
                different.push(format!("{mode} {path}: {got}, libselinux says {wanted}"));
            }
        }
    }
    assert!(different.is_empty(), "{} of {} differ:\n{}", different.len(), paths.len() * 3, different.join("\n"));
}
