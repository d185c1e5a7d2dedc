//! What dosfstools and mtools say about FAT volumes. Needs dosfstools and mtools, no privilege.

use std::{
    path::Path,
    process::{Command, Output},
};

use cloudletd::{
    disk::fat::{self, FatVolumeSpec},
    units::MIB,
};

fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C").output();
    output.unwrap_or_else(|error| panic!("{program} is needed by this test (Debian packages dosfstools, mtools): {error}"))
}

fn ok(program: &str, args: &[&str]) -> Vec<u8> {
    let output = run(program, args);
    let text = || String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {}", text());
    output.stdout
}

/// A volume with empty, small and large files, in directories, with long names and names that collide in their short form.
fn spec(label: &str, large: usize) -> FatVolumeSpec {
    let mut spec = FatVolumeSpec { label: label.into(), id: 0xabcd_0123, ..FatVolumeSpec::default() };
    for (path, content) in [
        ("user-data", b"#cloud-config\nhostname: web1\n".to_vec()),
        ("meta-data", b"instance-id: i-1\n".to_vec()),
        ("empty", Vec::new()),
        ("EFI/BOOT/BOOTX64.EFI", (0..large).map(|n| (n * 7) as u8).collect()),
        ("EFI/BOOT/grub.cfg", b"configfile x\n".to_vec()),
        ("openstack/latest/network_data.json", b"{}".to_vec()),
        ("openstack/latest/network_data-of-another-name.json", b"[]".to_vec()),
    ] {
        spec.files.insert(path.into(), content);
    }
    for number in 0..100 {
        spec.files.insert(format!("many/a file with a long name, nearly the same {number}").replace(',', ""), vec![number; usize::from(number) * 10]);
    }
    spec
}

fn judge(image: &Path, label: &str, spec: &FatVolumeSpec) {
    let image = image.to_str().expect("a UTF-8 path");
    let verdict = String::from_utf8(ok("fsck.fat", &["-n", "-v", image])).expect("text");
    assert!(!verdict.contains("Dirty") && !verdict.contains("differences") && !verdict.contains("wrong"), "{verdict}");
    let shown = String::from_utf8_lossy(&ok("mlabel", &["-s", "-i", image, "::"])).into_owned();
    assert!(shown.contains(label), "{shown}");
    let shown = String::from_utf8_lossy(&ok("mdir", &["-i", image, "::"])).into_owned();
    assert!(shown.contains("ABCD-0123"), "{shown}");
    for (path, content) in &spec.files {
        assert!(ok("mtype", &["-i", image, &format!("::{path}")]) == *content, "{path}");
    }
    let probed = String::from_utf8_lossy(&ok("blkid", &["-p", "-o", "export", image])).into_owned();
    for line in [format!("LABEL={label}"), "UUID=ABCD-0123".into(), "TYPE=vfat".into()] {
        assert!(probed.lines().any(|found| found == line), "{probed}");
    }
}

#[test]
fn judges_accept_volumes_of_every_kind_and_find_the_files() {
    let directory = tempfile::tempdir().expect("directory");
    for (size, label, upper, large) in [
        (MIB, "cidata", "CIDATA", 70_000),
        (5 * MIB, "config-2", "CONFIG-2", 3_000_000),
        (40 * MIB, "x", "X", 3_000_000),
        (64 * MIB, "EFI", "EFI", 30_000_000),
        (70 * MIB + 4096, "ESP_1234567", "ESP_1234567", 3_000_000),
        (1024 * MIB, "big", "BIG", 1),
    ] {
        let path = directory.path().join(format!("{label}.img"));
        let spec = spec(label, large);
        std::fs::write(&path, fat::build_bytes(size, &spec).expect("built")).expect("written");
        judge(&path, upper, &spec);
    }
}

#[test]
fn the_judge_would_notice_a_damaged_table() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("damaged.img");
    let mut bytes = fat::build_bytes(MIB, &spec("cidata", 70_000)).expect("built");
    // The first copy of the table; the boot sector is all that comes before it.
    bytes[512 + 100..512 + 110].fill(0);
    std::fs::write(&path, bytes).expect("written");
    assert!(!run("fsck.fat", &["-n", path.to_str().expect("UTF-8")]).status.success());
}
