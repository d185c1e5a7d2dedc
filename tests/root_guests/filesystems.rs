//! Roots that only the host's kernel writes, xfs and btrfs, through the daemon: rendered, grown, judged by their own tools and the kernel, and not
//! changed in place. Needs root, loop devices, xfsprogs, btrfs-progs, the fixtures of `scripts/fixtures.sh` and grpcurl.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use crate::common::{
    daemon::Daemon,
    leak::LeakGuard,
    rig::{Rendered, call, call_ok, image, render},
};
use serde_json::json;

const FIXTURE: &str = "bookworm-ifupdown";
const MIB: u64 = 1 << 20;
/// Goldens of these are 2 GiB.
const GROWN: u64 = 5 << 30;

#[track_caller]
fn judge(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).output().unwrap_or_else(|error| panic!("{tool} is needed: {error}"));
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{tool} {args:?}: {}\n{said}", output.status);
    said
}

/// The filesystem's own checker, on a copy: `xfs_repair -n` does not judge a log that is to be replayed, and nothing of ours leaves one.
#[track_caller]
fn check(filesystem: &str, disk: &str) {
    match filesystem {
        "xfs" => judge("xfs_repair", &["-n", "-f", disk]),
        _ => judge("btrfs", &["check", "--readonly", disk]),
    };
}

/// What the kernel sees: size of the filesystem in bytes and the host name's file.
#[track_caller]
fn mounted(filesystem: &str, disk: &str, at: &Path) -> (u64, String) {
    let at = at.to_str().expect("test paths are UTF-8");
    judge("mount", &["-t", filesystem, "-o", "loop,ro", disk, at]);
    let size = judge("df", &["--block-size=1", "--output=size", at]).lines().last().expect("a line").trim().parse().expect("a number");
    let hostname = fs::read_to_string(Path::new(at).join("etc/hostname"));
    judge("umount", &[at]);
    (size, hostname.expect("read /etc/hostname"))
}

#[test]
fn xfs_and_btrfs_roots_are_rendered_grown_and_each_has_its_own_uuid() {
    let daemon = Daemon::start("");
    let mut guard = LeakGuard::new(daemon.directory());
    let image = image(&daemon, FIXTURE, &json!({}));
    let at = tempfile::tempdir().expect("a directory");
    for filesystem in ["xfs", "btrfs"] {
        let mut uuids = BTreeSet::new();
        for (number, format) in ["RAW", "QCOW2_OVERLAY", "QCOW2"].into_iter().enumerate() {
            let instance = format!("{filesystem}-{number}");
            let more = json!({"golden": {"filesystem": filesystem, "sizeBytes": (2048 * MIB).to_string()}, "sizeBytes": GROWN.to_string()});
            let rendered = render(&daemon, &image, &instance, format, &more);
            let path = rendered.root()["volume"]["device"].as_str().expect("the mapping names a device");
            let disk = if format == "RAW" {
                path.to_owned()
            } else {
                let raw = at.path().join("judged.raw");
                let raw = raw.to_str().expect("test paths are UTF-8").to_owned();
                assert!(judge("qemu-img", &["check", "-f", "qcow2", path]).contains("No errors were found"));
                judge("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", path, &raw]);
                raw
            };
            check(filesystem, &disk);
            let mountpoint = at.path().join(&instance);
            fs::create_dir(&mountpoint).expect("a directory");
            let (size, hostname) = mounted(filesystem, &disk, &mountpoint);
            assert!(size > GROWN - 200 * MIB && size <= GROWN, "{instance}: {size}");
            assert_eq!(hostname, format!("{instance}\n"));
            let uuid = judge("blkid", &["--probe", "--match-tag", "UUID", "--output", "value", &disk]);
            assert_eq!(rendered.root()["filesystem"]["uuid"], uuid.trim(), "{instance}");
            assert!(uuids.insert(uuid), "{instance} has the UUID of another");
        }
    }
    guard.check();
}

#[test]
fn filesystems_that_only_the_kernel_writes_are_not_changed_in_place_and_the_answer_says_what_to_do() {
    let daemon = Daemon::start("");
    let image = image(&daemon, FIXTURE, &json!({}));
    for filesystem in ["xfs", "btrfs"] {
        let rendered = render(&daemon, &image, filesystem, "RAW", &json!({"golden": {"filesystem": filesystem}}));
        let volume = json!({"pool": "default", "name": filesystem});
        let request = json!({"volume": volume, "instance": {"name": filesystem, "hostname": "moved.example.net"}});
        let refused = call(&daemon, "VolumeService/ReconfigureVolume", &request).expect_err("not in place");
        assert!(refused.contains(&format!("has {filesystem} root filesystem; only ext4 is changed in place")), "{refused}");
        assert!(refused.contains("render the instance again with replace"), "{refused}");
        let now = Rendered { answer: call_ok(&daemon, "VolumeService/GetMapping", &json!({"volume": volume})) };
        assert_eq!(now.answer["mapping"], rendered.answer["mapping"], "nothing has changed");
    }
}
