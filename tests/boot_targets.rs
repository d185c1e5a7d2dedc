//! One Debian image on every local target, booted in QEMU: the guest itself says that it is configured as asked.
//!
//! Needs root, QEMU, the fixtures of `scripts/fixtures.sh` and grpcurl; without them the tests fail. About 10 s per guest.

mod common;

use std::{fs::File, path::Path, process::Command};

use common::{
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
