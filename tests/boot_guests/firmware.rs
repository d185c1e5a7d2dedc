//! One rendered disk, unchanged, started by SeaBIOS, by OVMF and by a kernel that QEMU loads: the guest says each time that it is configured as asked.
//!
//! Needs root, QEMU, OVMF, GRUB's packages, the fixtures of `scripts/fixtures.sh` and grpcurl; without them the tests fail. Up to a minute per guest.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::common::{
    boot::{Firmware, Start, firmware_cmdline},
    daemon::Daemon,
    fixture,
    rig::{Rendered, call_ok, check, guest, image, render},
};
use serde_json::{Value, json};

/// What `check` reads in the guest.
const FILES: [&str; 4] = ["/etc/hosts", "/root/.ssh/authorized_keys", "/etc/ssh/ssh_host_ed25519_key", "/etc/ssh/ssh_host_ed25519_key.pub"];

/// The platforms that QEMU stands for here; they choose the disk's layout.
const PLATFORMS: &str = r#"
[[platform]]
name = "bios"
hypervisor = "kvm"
memory = "1 GiB"
[[platform]]
name = "uefi"
hypervisor = "kvm"
firmware = "uefi"
memory = "1 GiB"
[[platform]]
name = "direct"
hypervisor = "kvm"
firmware = "direct"
memory = "1 GiB"
"#;

fn bootable(fixture: &str) -> Value {
    json!({"boot": {"cmdline": firmware_cmdline(fixture, &FILES)}})
}

/// What the guest does as its administrator would: arguments of its own, then update-grub. GRUB replays no journal, so it is written out as at a shutdown.
fn update_grub(arguments: &str) -> String {
    format!(
        r#"export PATH=/usr/sbin:/usr/bin:/sbin:/bin
cat >/etc/default/grub.d/99-test.cfg <<'END-OF-DEFAULTS'
GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {arguments}"
GRUB_CMDLINE_LINUX_DEFAULT=""
GRUB_TIMEOUT=0
END-OF-DEFAULTS
update-grub >/run/boot/update.log 2>&1
echo "status $?" >>/run/boot/update.log
sync
mount -o remount,ro / && mount -o remount,rw /
"#
    )
}

#[test]
fn a_menu_that_the_guests_own_update_grub_wrote_keeps_starting_the_disk() {
    const FIXTURE: &str = "bookworm-signed-ifupdown";
    const SEEN: [&str; 6] = [FILES[0], FILES[1], FILES[2], FILES[3], "/run/boot/update.log", "/boot/grub/grub.cfg"];
    let daemon = Daemon::start("");
    let image = image(&daemon, FIXTURE, &json!({"disk": {"layout": "gpt"}, "boot": {"cmdline": firmware_cmdline(FIXTURE, &SEEN)}}));
    let rendered = render(&daemon, &image, "update-1", "RAW", &json!({}));
    // Its own words, without those of the manifest: what starts it is the menu that it makes now.
    let script = update_grub(&firmware_cmdline(FIXTURE, &FILES));
    let first = guest(FIXTURE, rendered.qemu_args()).start(Start::Firmware(Firmware::Bios)).prelude(&script).boot();
    let log = first.guest_text("/run/boot/update.log");
    assert!(log.trim_end().ends_with("status 0"), "{log}");
    let menu = first.guest_text("/boot/grub/grub.cfg");
    assert!(menu.contains("### BEGIN /etc/grub.d/10_linux ###"), "{menu}");
    let root = rendered.root()["filesystem"]["uuid"].as_str().expect("the mapping has the root's UUID").to_owned();
    for firmware in [Firmware::Bios, Firmware::Uefi] {
        let report = guest(FIXTURE, rendered.disk()).start(Start::Firmware(firmware)).boot();
        check(&report, &rendered, "update-1");
        assert!(
            report.cmdline.starts_with("BOOT_IMAGE=/boot/vmlinuz-") && report.cmdline.contains(&format!("root=UUID={root}")),
            "{}",
            report.cmdline
        );
        assert!(report.cmdline.contains("console=tty0 console=ttyS0,115200 rw"), "our consoles, then the guest's words: {}", report.cmdline);
    }
}

/// What apt's hook does when a kernel is installed (zz-systemd-boot), and what one that goes does.
const KERNEL_INSTALL: &str = r#"export PATH=/usr/sbin:/usr/bin:/sbin:/bin
modprobe vfat
mkdir -p /boot/efi
mount -t vfat "$(findfs PARTLABEL=esp)" /boot/efi
release=$(uname -r)
{
    kernel-install --verbose add "$release" "/boot/vmlinuz-$release" "/boot/initrd.img-$release"
    echo "add $?"
    kernel-install add 1.0-old "/boot/vmlinuz-$release" && kernel-install remove 1.0-old
    echo "remove $?"
    bootctl --esp-path=/boot/efi list
    ls -R /boot/efi/loader /boot/efi/debian
    cat /boot/efi/loader/entries/*
} >/run/boot/install.log 2>&1
umount /boot/efi
sync
"#;

#[test]
fn systemd_boot_starts_the_images_kernel_and_then_what_kernel_install_wrote() {
    const FIXTURE: &str = "bookworm-sdboot-ifupdown";
    const SEEN: [&str; 5] = [FILES[0], FILES[1], FILES[2], FILES[3], "/run/boot/install.log"];
    let daemon = Daemon::start(PLATFORMS);
    let image =
        image(&daemon, FIXTURE, &json!({"boot": {"cmdline": firmware_cmdline(FIXTURE, &SEEN)}, "disk": {"layout": "gpt", "esp_size": "128 MiB"}}));
    let rendered = render(&daemon, &image, "sdboot-1", "RAW", &json!({"platforms": ["uefi", "bios"]}));
    let root = rendered.root()["filesystem"]["uuid"].as_str().expect("the mapping has the root's UUID").to_owned();
    let first = guest(FIXTURE, rendered.qemu_args()).start(Start::Firmware(Firmware::Uefi)).prelude(KERNEL_INSTALL).boot();
    check(&first, &rendered, "sdboot-1");
    let log = first.guest_text("/run/boot/install.log");
    assert!(first.cmdline.starts_with("initrd=\\debian\\"), "systemd-boot says so: {}", first.cmdline);
    assert!(first.cmdline.contains(&format!("root=UUID={root}")), "{}", first.cmdline);
    assert!(log.contains("add 0") && log.contains("remove 0"), "{log}");
    assert!(log.contains("90-loaderentry.install") && log.contains(&format!("root=UUID={root}")) && !log.contains("1.0-old.conf"), "{log}");
    let second = guest(FIXTURE, rendered.disk()).start(Start::Firmware(Firmware::Uefi)).boot();
    check(&second, &rendered, "sdboot-1");
    assert!(second.cmdline.starts_with("initrd=\\debian\\") && second.cmdline.contains(&format!("root=UUID={root}")), "{}", second.cmdline);
}

/// The fixture's tarball with a unified kernel image in it: systemd's stub with the fixture's own kernel and initrd, and this command line (systemd-stub(7)).
#[track_caller]
fn with_unified_kernel(fixture: &str, directory: &Path, cmdline: &str) -> PathBuf {
    let run = |program: &str, args: &[&str]| {
        let status = Command::new(program).args(args).status().unwrap_or_else(|error| panic!("{program} is needed: {error}"));
        assert!(status.success(), "{program} {args:?}: {status}");
    };
    let text = |path: &Path| path.to_str().expect("test paths are UTF-8").to_owned();
    let made = fixture::get(fixture);
    let (tree, words, tarball) = (directory.join("tree"), directory.join("cmdline"), directory.join("uki.tar"));
    fs::create_dir_all(tree.join("boot/efi/EFI/Linux")).expect("directories");
    fs::write(&words, cmdline).expect("written");
    let mut sections = Vec::new();
    // Without the first systemd-boot does not list it.
    for (name, file, at) in [
        (".osrel", "/usr/lib/os-release".to_owned(), "0x20000"),
        (".cmdline", text(&words), "0x30000"),
        (".linux", text(&made.kernel), "0x2000000"),
        (".initrd", text(&made.initrd), "0x3000000"),
    ] {
        sections.extend(["--add-section".to_owned(), format!("{name}={file}"), "--change-section-vma".to_owned(), format!("{name}={at}")]);
    }
    let stub = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub".to_owned();
    sections.extend([stub, text(&tree.join("boot/efi/EFI/Linux/debian.efi"))]);
    run("objcopy", &sections.iter().map(String::as_str).collect::<Vec<_>>());
    run("zstd", &["--decompress", "--quiet", "--force", "-o", &text(&tarball), &text(&made.tarball)]);
    run("tar", &["--append", "--file", &text(&tarball), "--directory", &text(&tree), "--owner=0", "--group=0", "boot/efi"]);
    tarball
}

#[test]
fn a_unified_kernel_image_starts_by_itself_and_by_the_images_systemd_boot() {
    for (fixture, instance) in [("bookworm-ifupdown", "uki-1"), ("bookworm-sdboot-ifupdown", "uki-2")] {
        let daemon = Daemon::start(PLATFORMS);
        let cmdline = format!("root=LABEL=uki-root {}", firmware_cmdline(fixture, &FILES));
        let tarball = with_unified_kernel(fixture, daemon.directory(), &cmdline);
        // No kernel besides that GRUB could start.
        let manifest = json!({
            "rootfs": {"url": format!("file://{}", tarball.display())}, "filesystem": {"label": "uki-root"}, "disk": {"layout": "gpt"},
            "volatile": ["/boot/(vmlinuz|initrd|config|System).*", "/(vmlinuz|initrd).*"]
        });
        let image = image(&daemon, fixture, &manifest);
        let rendered = render(&daemon, &image, instance, "RAW", &json!({"platforms": ["uefi"]}));
        let report = guest(fixture, rendered.disk()).start(Start::Firmware(Firmware::Uefi)).boot();
        check(&report, &rendered, instance);
        assert!(report.cmdline.contains("root=LABEL=uki-root"), "{}", report.cmdline);
    }
}

#[track_caller]
fn starts_by(daemon: &Daemon, fixture: &str, rendered: &Rendered, instance: &str, start: Start) {
    let root = rendered.root()["filesystem"]["uuid"].as_str().expect("the mapping has the root's UUID").to_owned();
    let cmdline;
    let mut guest = guest(fixture, rendered.disk()).start(start);
    let machine = call_ok(daemon, "VolumeService/GetMapping", &json!({"volume": {"pool": "default", "name": instance}, "platform": "direct"}));
    let kernel = &machine["machine"]["kernel"];
    if start == Start::Full {
        // The files that the daemon took out of the image, and the line that it gives with them but for what the harness adds itself.
        assert_eq!(fs::read(kernel["kernel"].as_str().expect("a path")).ok(), fs::read(fixture::get(fixture).kernel).ok());
        let line = kernel["cmdline"].as_str().expect("a command line");
        let own = firmware_cmdline(fixture, &FILES);
        cmdline = format!("{} rw", line.strip_suffix(&own).expect("the manifest's words come last").trim_end());
        guest = guest.cmdline(&cmdline);
    }
    let report = guest.boot();
    check(&report, rendered, instance);
    assert!(report.cmdline.contains(&format!("root=UUID={root}")), "{}", report.cmdline);
}

#[track_caller]
fn one_disk_starts_everywhere(fixture: &str, instance: &str) {
    let daemon = Daemon::start(PLATFORMS);
    let image = image(&daemon, fixture, &bootable(fixture));
    let rendered = render(&daemon, &image, instance, "RAW", &json!({"platforms": ["bios", "uefi", "direct"]}));
    for start in [Start::Firmware(Firmware::Bios), Start::Firmware(Firmware::Uefi), Start::Full] {
        starts_by(&daemon, fixture, &rendered, instance, start);
    }
}

#[test]
fn one_disk_of_bookworm_starts_by_bios_by_uefi_and_by_its_kernel() {
    one_disk_starts_everywhere("bookworm-ifupdown", "firmware-1");
}

/// GRUB reads the filesystem that the kernel wrote and the instance changed; so does the daemon, which takes the kernel out.
#[track_caller]
fn a_root_of_another_filesystem_starts(filesystem: &str) {
    const FIXTURE: &str = "bookworm-ifupdown";
    let instance = format!("other-{filesystem}");
    let daemon = Daemon::start(PLATFORMS);
    let mut manifest = bootable(FIXTURE);
    manifest["filesystem"] = json!({"type": filesystem});
    let image = image(&daemon, FIXTURE, &manifest);
    let rendered = render(&daemon, &image, &instance, "RAW", &json!({"platforms": ["bios", "uefi", "direct"]}));
    assert_eq!(rendered.root()["filesystem"]["type"], filesystem, "{:#}", rendered.root());
    for start in [Start::Firmware(Firmware::Bios), Start::Firmware(Firmware::Uefi), Start::Full] {
        starts_by(&daemon, FIXTURE, &rendered, &instance, start);
    }
}

#[test]
fn an_xfs_root_starts_by_bios_by_uefi_and_by_its_kernel() {
    a_root_of_another_filesystem_starts("xfs");
}

#[test]
fn a_btrfs_root_starts_by_bios_by_uefi_and_by_its_kernel() {
    a_root_of_another_filesystem_starts("btrfs");
}

#[test]
fn one_disk_of_trixie_starts_by_bios_by_uefi_and_by_its_kernel() {
    one_disk_starts_everywhere("trixie-ifupdown", "firmware-2");
}
