//! Secure Boot: Debian's signed shim, GRUB and kernel from the image, started by OVMF with Microsoft's keys, which starts nothing else.
//!
//! Needs root, QEMU, OVMF, GRUB's packages, the fixtures of `scripts/fixtures.sh` and grpcurl; without them the tests fail. A minute or two per guest.

use crate::common::{
    boot::{Firmware, Start, firmware_cmdline},
    daemon::Daemon,
    rig::{call, check, guest, image, render},
};
use serde_json::json;

const PLATFORM: &str = r#"
[[platform]]
name = "secure"
hypervisor = "kvm"
firmware = "uefi"
secure_boot = true
memory = "1 GiB"
"#;

/// What the guest sees of the firmware: the variable's five bytes are four of attributes and one that is 1 when Secure Boot is on.
const LOOK: &str = "
mount -t efivarfs efivarfs /sys/firmware/efi/efivars
od -An -tu1 /sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c >/run/boot/secure
dmesg | grep -i 'secure boot' >/run/boot/log
cat /sys/kernel/security/lockdown >/run/boot/lockdown 2>/dev/null
";

const FILES: [&str; 7] = [
    "/etc/hosts",
    "/root/.ssh/authorized_keys",
    "/etc/ssh/ssh_host_ed25519_key",
    "/etc/ssh/ssh_host_ed25519_key.pub",
    "/etc/fstab",
    "/run/boot/secure",
    "/run/boot/log",
];

#[test]
fn debians_signed_chain_starts_under_secure_boot_and_the_guest_says_so() {
    const FIXTURE: &str = "bookworm-signed-ifupdown";
    let daemon = Daemon::start(PLATFORM);
    let image = image(&daemon, FIXTURE, &json!({"boot": {"cmdline": firmware_cmdline(FIXTURE, &FILES)}}));
    // Nobody says gpt but the platform.
    let rendered = render(&daemon, &image, "secure-1", "RAW", &json!({"platforms": ["secure"]}));
    let report = guest(FIXTURE, rendered.disk()).start(Start::Firmware(Firmware::SecureBoot)).prelude(LOOK).boot();
    check(&report, &rendered, "secure-1");
    let variable = report.guest_text("/run/boot/secure");
    assert_eq!(variable.split_whitespace().last(), Some("1"), "{variable}\n{report:#?}");
    let log = report.guest_text("/run/boot/log");
    assert!(log.to_lowercase().contains("secure boot enabled"), "{log}");
    // The guest's own tools find the partition: by its GUID, which is this instance's.
    let partitions = rendered.root()["partitions"].as_array().expect("partitions").clone();
    let esp = partitions.iter().find(|partition| partition["name"] == "esp").expect("an ESP")["uuid"].as_str().expect("a GUID").to_owned();
    let fstab = report.guest_text("/etc/fstab");
    let line = fstab.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find(|words| words.get(1) == Some(&"/boot/efi"));
    assert_eq!(line.as_deref().map(|words| (words[0].to_owned(), words[2])), Some((format!("PARTUUID={esp}"), "vfat")), "{fstab}");
}

#[test]
fn an_image_without_a_signed_chain_is_refused_for_secure_boot() {
    let daemon = Daemon::start(PLATFORM);
    let image = image(&daemon, "bookworm-ifupdown", &json!({}));
    let spec = json!({
        "imageId": image, "volume": {"pool": "default", "name": "secure-2"}, "instance": {"name": "secure-2"}, "platforms": ["secure"],
    });
    let started = call(&daemon, "RenderService/StartRender", &json!({"idempotencyKey": "secure-2", "spec": spec})).expect("accepted");
    let ended = call(&daemon, "RenderService/WatchRender", &json!({"renderId": started["render"]["id"]})).expect("watched");
    assert_eq!(ended["render"]["state"], "RENDER_STATE_FAILED", "{ended:#}");
    assert_eq!(ended["render"]["error"]["reason"], "SECURE_BOOT", "{ended:#}");
    assert!(ended["render"]["error"]["hint"].as_str().is_some_and(|hint| hint.contains("shim-signed")), "{ended:#}");
}
