//! One rendered disk, unchanged, started by SeaBIOS, by OVMF and by a kernel that QEMU loads: the guest says each time that it is configured as asked.
//!
//! Needs root, QEMU, OVMF, GRUB's packages, the fixtures of `scripts/fixtures.sh` and grpcurl; without them the tests fail. Up to a minute per guest.

mod common;

use common::{
    boot::{Firmware, Start, firmware_cmdline},
    daemon::Daemon,
    rig::{Rendered, check, guest, image, render},
};
use serde_json::{Value, json};

/// What `check` reads in the guest.
const FILES: [&str; 4] = ["/etc/hosts", "/root/.ssh/authorized_keys", "/etc/ssh/ssh_host_ed25519_key", "/etc/ssh/ssh_host_ed25519_key.pub"];

fn partitioned(fixture: &str) -> Value {
    json!({"disk": {"layout": "gpt"}, "boot": {"cmdline": firmware_cmdline(fixture, &FILES)}})
}

#[track_caller]
fn starts_by(fixture: &str, rendered: &Rendered, instance: &str, start: Start) {
    let root = rendered.root()["filesystem"]["uuid"].as_str().expect("the mapping has the root's UUID").to_owned();
    let mut guest = guest(fixture, rendered.disk()).start(start);
    let cmdline = format!("root=UUID={root} rw");
    if start == Start::Full {
        guest = guest.cmdline(&cmdline);
    }
    let report = guest.boot();
    check(&report, rendered, instance);
    assert!(report.cmdline.contains(&format!("root=UUID={root}")), "{}", report.cmdline);
}

#[track_caller]
fn one_disk_starts_everywhere(fixture: &str, instance: &str) {
    let daemon = Daemon::start("");
    let image = image(&daemon, fixture, &partitioned(fixture));
    let rendered = render(&daemon, &image, instance, "RAW", &json!({}));
    for start in [Start::Firmware(Firmware::Bios), Start::Firmware(Firmware::Uefi), Start::Full] {
        starts_by(fixture, &rendered, instance, start);
    }
}

#[test]
fn one_disk_of_bookworm_starts_by_bios_by_uefi_and_by_its_kernel() {
    one_disk_starts_everywhere("bookworm-ifupdown", "firmware-1");
}

#[test]
fn one_disk_of_trixie_starts_by_bios_by_uefi_and_by_its_kernel() {
    one_disk_starts_everywhere("trixie-ifupdown", "firmware-2");
}
