//! One Debian image on every local target, booted in QEMU: the guest itself says that it is configured as asked.
//!
//! Needs root, QEMU, the fixtures of `scripts/fixtures.sh` and grpcurl; without them the tests fail. About 10 s per guest.

use std::{fs::File, path::Path, process::Command};

use crate::common::{
    boot::GuestFile,
    daemon::Daemon,
    leak::LeakGuard,
    rig::{call_ok, check, guest, image, render},
};
use serde_json::json;

const FIXTURE: &str = "bookworm-ifupdown";

/// Renders one instance to `format`, boots it, checks the guest, deletes the volume and looks for leftovers.
#[track_caller]
fn target_boots(instance: &str, format: &str) {
    let daemon = Daemon::start("");
    let mut leaks = LeakGuard::new(daemon.directory());
    let image = image(&daemon, FIXTURE, &json!({}));
    let rendered = render(&daemon, &image, instance, format, &json!({}));
    check(&guest(FIXTURE, rendered.disk()).boot(), &rendered, instance);
    let deleted = call_ok(&daemon, "VolumeService/DeleteVolume", &json!({"volume": {"pool": "default", "name": instance}}));
    assert_eq!(deleted["deleted"], true);
    leaks.check();
}

#[test]
fn a_raw_file_boots_as_configured() {
    target_boots("raw-1", "RAW");
}

#[test]
fn a_qcow2_overlay_on_the_golden_boots_as_configured() {
    target_boots("overlay-1", "QCOW2_OVERLAY");
}

#[test]
fn a_standalone_qcow2_boots_as_configured() {
    target_boots("qcow2-1", "QCOW2");
}

#[test]
fn an_attached_loop_device_boots_as_configured() {
    target_boots("loop-1", "LOOP");
}

#[test]
fn a_block_device_of_a_pool_boots_as_configured() {
    let backing = tempfile::NamedTempFile::new().expect("make a file");
    backing.as_file().set_len(2 << 30).expect("make it sparse");
    let device = LoopDevice::attach(backing.path());
    // A pool is a directory with nodes or links; this one has a link to our loop device and nothing else.
    let links = tempfile::tempdir().expect("make a directory");
    std::os::unix::fs::symlink(&device.0, links.path().join("vm-block-1")).expect("make a link");
    let config = format!(
        "[golden]\nsize = \"1 GiB\"\n[[pool]]\nname = \"default\"\nkind = \"devices\"\npath = {:?}\nallow = [\"vm-*\"]\n",
        links.path().to_str().expect("test paths are UTF-8")
    );
    let daemon = Daemon::start(&config);
    let image = image(&daemon, FIXTURE, &json!({}));
    let rendered = render(&daemon, &image, "vm-block-1", "BLOCK", &json!({}));
    check(&guest(FIXTURE, rendered.disk()).boot(), &rendered, "vm-block-1");
}

#[test]
fn the_mappings_own_qemu_arguments_boot() {
    let daemon = Daemon::start("");
    let image = image(&daemon, FIXTURE, &json!({}));
    let rendered = render(&daemon, &image, "args-1", "QCOW2_OVERLAY", &json!({}));
    check(&guest(FIXTURE, rendered.qemu_args()).boot(), &rendered, "args-1");
}

#[test]
fn a_guest_mounts_its_data_scratch_and_swap_by_its_own_fstab() {
    let daemon = Daemon::start("");
    let image = image(&daemon, FIXTURE, &json!({"persistent": ["/var/lib/dpkg"]}));
    let devices = json!([
        {"role": "DEVICE_ROLE_DATA", "persistent": true, "sizeBytes": 256 << 20},
        {"role": "DEVICE_ROLE_SWAP", "sizeBytes": 64 << 20, "format": "VOLUME_FORMAT_QCOW2"},
        {"role": "DEVICE_ROLE_SCRATCH", "sizeBytes": 64 << 20, "mount": "/srv/scratch"},
    ]);
    let rendered = render(&daemon, &image, "db-1", "QCOW2_OVERLAY", &json!({"devices": devices}));
    let guest = guest(FIXTURE, rendered.qemu_args()).cmdline("boot.mounts=1").file("/proc/1/mounts").file("/proc/swaps").file("/var/lib/dpkg");
    let report = guest.boot();
    check(&report, &rendered, "db-1");
    let mounts = report.guest_text("/proc/1/mounts");
    let mounted = |target: &str| mounts.lines().any(|line| line.split(' ').nth(1) == Some(target) && line.split(' ').nth(2) == Some("ext4"));
    assert!(mounted("/var/lib/dpkg") && mounted("/srv/scratch"), "{mounts}");
    assert!(report.guest_text("/proc/swaps").contains("/dev/vdc"), "{report:#?}");
    // What the image had there is what the guest sees there, from the other disk.
    let GuestFile::Directory { names, .. } = report.guest_file("/var/lib/dpkg") else { panic!("no persistent directory: {report:#?}") };
    assert!(names.iter().any(|name| name == "status"), "{names:?}");
}

/// A loop device of the test's own, detached at the end.
struct LoopDevice(String);

impl LoopDevice {
    #[track_caller]
    fn attach(backing: &Path) -> Self {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(backing).output().expect("run losetup");
        assert!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
        let name = String::from_utf8(output.stdout).expect("a device name").trim().to_owned();
        File::open(&name).expect("the device can be opened");
        Self(name)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.0).status().is_ok_and(|status| status.success());
        if !detached && !std::thread::panicking() {
            panic!("{} cannot be detached", self.0);
        }
    }
}
