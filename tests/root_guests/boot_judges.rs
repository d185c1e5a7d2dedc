//! What other people's tools say about kernels, initrds and rendered disks: readelf, lsinitramfs, pygrub, sgdisk, sfdisk, fsck.fat, mtools. Needs root, those
//! tools, the fixtures of `scripts/fixtures.sh` and grpcurl.

use std::{fs, path::Path, process::Command};

use crate::common::{
    daemon::Daemon,
    fixture, pygrub,
    rig::{image, render},
};
use cloudletd::boot::inspect::{initrd, kernel, unpack::Packing};
use serde_json::json;

/// A shell command's output; it has to succeed unless `may_fail`.
#[track_caller]
fn shell(script: &str, file: &Path, may_fail: bool) -> Vec<u8> {
    let output =
        Command::new("bash").args(["-c", script, "judge"]).arg(file).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").output().expect("run bash");
    assert!(may_fail || output.status.success(), "{script} {}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// As the kernel's scripts/extract-vmlinux does it: whatever unpacks to an ELF file behind a magic.
#[track_caller]
fn vmlinux(bytes: &[u8], packing: Packing, scratch: &Path) -> Vec<u8> {
    let (magic, tool): (&[u8], &str) = match packing {
        Packing::Lz4 => (&[0x02, 0x21, 0x4c, 0x18], "lz4 -dc <\"$1\""),
        Packing::Zstd => (&[0x28, 0xb5, 0x2f, 0xfd], "zstd -dcq <\"$1\""),
        Packing::Xz => (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz --single-stream -dcq <\"$1\""),
        other => panic!("a fixture's kernel is compressed with {}", other.name()),
    };
    for at in bytes.windows(magic.len()).enumerate().filter(|(_, window)| *window == magic).map(|(at, _)| at) {
        fs::write(scratch, &bytes[at..]).expect("write the payload");
        let plain = shell(tool, scratch, true);
        if plain.starts_with(b"\x7fELF") {
            return plain;
        }
    }
    panic!("no ELF file in the kernel");
}

#[test]
fn the_pvh_entry_of_debians_kernels_is_the_one_that_readelf_shows() {
    let scratch = tempfile::NamedTempFile::new().expect("a file");
    for name in ["bookworm-ifupdown", "trixie-ifupdown"] {
        let bytes = fs::read(fixture::get(name).kernel).expect("read the kernel");
        let facts = kernel::read(&bytes).expect("a kernel");
        assert_eq!((facts.machine.as_deref(), &facts.notes[..]), (Some("x86_64"), &[][..]), "{name}");
        fs::write(scratch.path(), vmlinux(&bytes, facts.packing.expect("compressed"), scratch.path())).expect("write vmlinux");
        let shown = String::from_utf8_lossy(&shell("readelf --notes --wide \"$1\"", scratch.path(), false)).into_owned();
        let note = shown.lines().find(|line| line.contains("Xen") && line.contains("0x00000012")).unwrap_or_else(|| panic!("{name}: {shown}"));
        let digits: Vec<u8> = note
            .split("description data:")
            .nth(1)
            .expect("data")
            .split_whitespace()
            .rev()
            .map(|byte| u8::from_str_radix(byte, 16).expect("a byte"))
            .collect();
        let address = digits.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        assert_eq!(facts.pvh_entry, Some(address), "{name}: {note}");
        // binutils names types after another owner of notes: 1 is XEN_ELFNOTE_ENTRY.
        assert_eq!(facts.xen_pv, Some(shown.lines().any(|line| line.contains("Xen") && line.contains("NT_VERSION"))), "{name}");
    }
}

#[test]
fn an_initrds_modules_are_those_that_lsinitramfs_lists() {
    let scratch = tempfile::NamedTempFile::new().expect("a file");
    for name in ["bookworm-ifupdown", "trixie-ifupdown"] {
        let bytes = fs::read(fixture::get(name).initrd).expect("read the initrd");
        let facts = initrd::read(&bytes).expect("an initrd");
        // All its archives: trixie's has the modules in a plain one before the packed one.
        fs::write(scratch.path(), &bytes).expect("write the initrd");
        let listed = String::from_utf8(shell("lsinitramfs \"$1\"", scratch.path(), false)).expect("names");
        let mut modules: Vec<String> = listed.lines().filter_map(initrd::module_name).collect();
        modules.sort_unstable();
        modules.dedup();
        assert!(modules.len() > 50, "{name}: {listed}");
        assert_eq!(facts.modules, modules, "{name}");
    }
}

#[test]
fn pygrub_finds_the_kernel_on_a_bare_and_on_a_partitioned_disk() {
    let daemon = Daemon::start("");
    let fixture = fixture::get("bookworm-ifupdown");
    let (kernel, initrd) = (fs::read(&fixture.kernel).expect("read the kernel"), fs::read(&fixture.initrd).expect("read the initrd"));
    for (instance, layout) in [("pygrub-1", "bare"), ("pygrub-2", "gpt")] {
        let image = image(&daemon, "bookworm-ifupdown", &json!({"disk": {"layout": layout}, "filesystem": {"profile": "compat"}}));
        let rendered = render(&daemon, &image, instance, "RAW", &json!({}));
        let path = rendered.root()["volume"]["device"].as_str().expect("a path").to_owned();
        let found = pygrub::run(Path::new(&path));
        assert!(found.kernel == kernel && found.ramdisk.as_ref() == Some(&initrd), "{layout}: pygrub took something else out: {}", found.args);
        let uuid = rendered.root()["filesystem"]["uuid"].as_str().expect("a UUID");
        assert!(found.args.starts_with(&format!("root=UUID={uuid} ro ")), "{layout}: {}", found.args);
        if layout == "gpt" {
            judge_partitions(&rendered.answer, Path::new(&path));
        }
    }
}

#[test]
fn pygrub_reads_extlinux_and_menu_lst_where_there_is_no_other_menu() {
    let daemon = Daemon::start("[[platform]]\nname = \"board\"\nhypervisor = \"xen\"\nmode = \"pv\"\nmemory = \"512 MiB\"\nextlinux = true\n");
    let fixture = fixture::get("bookworm-ifupdown");
    for (instance, layout) in [("extlinux-1", "bare"), ("extlinux-2", "gpt")] {
        let image = image(&daemon, "bookworm-ifupdown", &json!({"disk": {"layout": layout}}));
        let rendered = render(&daemon, &image, instance, "RAW", &json!({"platforms": ["board"]}));
        let path = rendered.root()["volume"]["device"].as_str().expect("a path").to_owned();
        let uuid = rendered.root()["filesystem"]["uuid"].as_str().expect("a UUID");
        let offset = rendered.root()["filesystem"]["offsetBytes"].as_str().expect("a number").to_owned();
        // As it is, without GRUB 2's menu, without GRUB legacy's.
        for gone in [None, Some("/boot/grub/grub.cfg"), Some("/boot/grub/menu.lst")] {
            if let Some(gone) = gone {
                shell(&format!("debugfs -w -R 'rm {gone}' \"$1?offset={offset}\""), Path::new(&path), false);
            }
            let found = pygrub::run(Path::new(&path));
            assert!(found.kernel == fs::read(&fixture.kernel).expect("readable"), "{layout} without {gone:?}: {}", found.args);
            assert!(found.ramdisk == fs::read(&fixture.initrd).ok(), "{layout} without {gone:?}");
            assert_eq!(found.args.trim_end(), format!("root=UUID={uuid} ro console=hvc0"), "{layout} without {gone:?}");
        }
    }
}

/// The ESP of a disk as files, as the guest's own bootctl sees them.
#[test]
fn bootctl_lists_the_entries_of_an_image_with_systemd_boot() {
    const FIXTURE: &str = "bookworm-sdboot-ifupdown";
    let daemon = Daemon::start("");
    let image = image(&daemon, FIXTURE, &json!({"disk": {"layout": "gpt", "esp_size": "256 MiB"}}));
    let rendered = render(&daemon, &image, "bootctl-1", "RAW", &json!({}));
    let path = rendered.root()["volume"]["device"].as_str().expect("a path").to_owned();
    judge_partitions(&rendered.answer, Path::new(&path));
    let scratch = tempfile::tempdir().expect("a directory");
    // It wants the root of a filesystem, which nobody else sees; the checks that it relaxes are about a FAT on a disk.
    let script = "mcopy -s -i \"$1@@2M\" ::/EFI ::/loader ::/debian";
    shell(&format!("{script} {}", scratch.path().display()), Path::new(&path), false);
    let listed = format!(
        "unshare --mount bash -c 'mount -t tmpfs esp /mnt && {} /mnt && SYSTEMD_RELAX_ESP_CHECKS=1 bootctl --esp-path=/mnt --json=short --no-pager list' \
         judge \"$1\"",
        script
    );
    let listed = shell(&listed, Path::new(&path), false);
    let entries: Vec<serde_json::Value> = serde_json::Deserializer::from_slice(&listed).into_iter().map(|entry| entry.expect("JSON")).collect();
    assert_eq!(entries.len(), 1, "{entries:#?}");
    let uuid = rendered.root()["filesystem"]["uuid"].as_str().expect("a UUID");
    assert!(entries[0]["options"].as_str().expect("options").starts_with(&format!("root=UUID={uuid} ro ")), "{entries:#?}");
    assert_eq!(entries[0]["title"], entries[0]["showTitle"]);
    let fixture = fixture::get(FIXTURE);
    for (file, original) in [(&entries[0]["linux"], &fixture.kernel), (&entries[0]["initrd"][0], &fixture.initrd)] {
        let copy = scratch.path().join(file.as_str().expect("a path").trim_start_matches('/'));
        assert!(fs::read(&copy).expect("bootctl names a file that is there") == fs::read(original).expect("readable"), "{}", copy.display());
    }
}

#[track_caller]
fn judge_partitions(answer: &serde_json::Value, disk: &Path) {
    let verdict = String::from_utf8_lossy(&shell("sgdisk --verify \"$1\"", disk, false)).into_owned();
    assert!(verdict.contains("No problems found"), "{verdict}");
    shell("sfdisk --verify \"$1\"", disk, false);
    let scratch = tempfile::NamedTempFile::new().expect("a file");
    let esp = answer["mapping"]["devices"][0]["partitions"]
        .as_array()
        .expect("partitions")
        .iter()
        .find(|partition| partition["name"] == "esp")
        .expect("an ESP");
    let number = |key: &str| esp[key].as_str().and_then(|text| text.parse::<u64>().ok()).or_else(|| esp[key].as_u64()).expect("a number");
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; number("sizeBytes") as usize];
    fs::File::open(disk).expect("open").read_exact_at(&mut bytes, number("offsetBytes")).expect("read the ESP");
    fs::write(scratch.path(), &bytes).expect("write the ESP");
    shell("fsck.fat -n \"$1\"", scratch.path(), false);
    let listed = String::from_utf8_lossy(&shell("mdir -b -/ -i \"$1\" ::", scratch.path(), false)).into_owned();
    assert!(listed.contains("::/EFI/BOOT/BOOTX64.EFI"), "{listed}");
}
