//! An instance that has run gets another address and name while it is stopped, and says so itself when it runs again.
//!
//! Needs root, QEMU, the fixtures of `scripts/fixtures.sh` and grpcurl; without them the tests fail. About 10 s per boot.

use crate::common::{
    boot::Guest,
    daemon::Daemon,
    rig::{LOGIN_KEY, MACS, Rendered, call, call_ok, check, guest, image, render},
};
use serde_json::{Value, json};

const FIXTURE: &str = "bookworm-ifupdown";

/// What is booted: the guest of [`guest`], with its root in this partition of the disk.
fn machine(rendered: &Rendered, partition: Option<u32>) -> Guest<'_> {
    let guest = guest(FIXTURE, rendered.qemu_args());
    match partition {
        Some(number) => guest.root_partition(number),
        None => guest,
    }
}

/// Renders, boots (the guest writes to its disk), reconfigures, boots again. `more` is added to the request; `partition` is where it puts the root.
#[track_caller]
fn moves(instance: &str, format: &str, more: &Value, partition: Option<u32>) {
    let daemon = Daemon::start("");
    let image = image(&daemon, FIXTURE, &json!({}));
    let rendered = render(&daemon, &image, instance, format, more);
    check(&machine(&rendered, partition).cmdline("boot.clean=1").boot(), &rendered, instance);

    let volume = json!({"pool": "default", "name": instance});
    let network = json!({"interfaces": [{"name": "eth0", "mac": MACS[0], "addresses": ["198.51.100.77/24"], "gateway4": "198.51.100.1"}], "nameservers": ["198.51.100.53"]});
    let config = json!({"hostname": "moved.example.net", "network": network, "authorized_keys": {"root": [LOGIN_KEY]}});
    let request = json!({"volume": volume, "instance": {"name": instance, "configJson": config.to_string()}});
    let answer = call_ok(&daemon, "VolumeService/ReconfigureVolume", &request);
    assert_ne!(answer["patchBlocks"], "0", "{answer:#}");
    let moved = Rendered { answer: call_ok(&daemon, "VolumeService/GetMapping", &json!({"volume": volume})) };

    // Not shut down this time.
    let report = machine(&moved, partition).boot();
    let context = format!("{report:#?}");
    assert_eq!(report.link_by_mac(MACS[0]).global_addresses(), ["198.51.100.77/24"], "{context}");
    let route = report.default_route4().unwrap_or_else(|| panic!("no default route: {context}"));
    assert_eq!((route.gateway.as_str(), route.device.as_str()), ("198.51.100.1", "eth0"), "{context}");
    assert_eq!(report.nameservers(), ["198.51.100.53"], "{context}");
    assert_eq!(report.hostname, "moved", "{context}");
    let identity = |rendered: &Rendered| rendered.answer["mapping"]["identity"].clone();
    assert_eq!(report.machine_id, identity(&rendered)["machineId"], "the instance is the same: {context}");
    assert_eq!(identity(&moved)["sshFingerprints"], identity(&rendered)["sshFingerprints"]);
    let public = report.guest_text("/etc/ssh/ssh_host_ed25519_key.pub");
    assert!(identity(&rendered)["knownHosts"].to_string().contains(public.split_whitespace().nth(1).expect("a key")), "{public}");

    let refused = call(&daemon, "VolumeService/ReconfigureVolume", &request).expect_err("the guest was not shut down");
    assert!(refused.contains("journal needs recovery"), "{refused}");
    call_ok(&daemon, "VolumeService/DeleteVolume", &json!({"volume": volume}));
}

#[test]
fn an_overlay_that_has_run_moves_to_another_address() {
    moves("overlay-9", "QCOW2_OVERLAY", &json!({}), None);
}

#[test]
fn a_raw_volume_that_has_run_moves_to_another_address() {
    moves("raw-9", "RAW", &json!({}), None);
}

#[test]
fn a_disk_with_partitions_moves_to_another_address() {
    moves("gpt-9", "QCOW2_OVERLAY", &json!({"golden": {"layout": "DISK_LAYOUT_GPT"}}), Some(1));
}
