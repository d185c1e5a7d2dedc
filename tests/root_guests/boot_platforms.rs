//! One disk for every platform, and a machine for each: what other people's tools say. pygrub, libvirt's schema, xl's dry run, sgdisk, sfdisk, fsck.fat.
//! Needs root, those tools, GRUB's packages, the fixtures of `scripts/fixtures.sh` and grpcurl.

use std::{fs, path::Path, process::Command};

use crate::common::{
    daemon::Daemon,
    fixture, pygrub,
    rig::{Rendered, call, call_ok, image, render},
};
use cloudletd::names::Digest;
use serde_json::{Value, json};

const FIXTURE: &str = "bookworm-ifupdown";
/// The root's UUID is at the same place on all of them.
const PLATFORMS: &str = r#"
[[platform]]
name = "kvm-bios"
hypervisor = "kvm"
memory = "1 GiB"
[[platform]]
name = "kvm-uefi"
hypervisor = "kvm"
firmware = "uefi"
memory = "1 GiB"
[[platform]]
name = "kvm-scsi"
hypervisor = "kvm"
bus = "scsi"
memory = "1 GiB"
[[platform]]
name = "micro"
hypervisor = "kvm"
firmware = "direct"
consoles = ["serial"]
memory = "256 MiB"
[[platform]]
name = "xen-pv"
hypervisor = "xen"
mode = "pv"
memory = "512 MiB"
[[platform]]
name = "xen-pv-direct"
hypervisor = "xen"
mode = "pv"
firmware = "direct"
memory = "512 MiB"
[[platform]]
name = "xen-pvh"
hypervisor = "xen"
mode = "pvh"
memory = "512 MiB"
[[platform]]
name = "xen-hvm"
hypervisor = "xen"
memory = "1 GiB"
[[platform]]
name = "metal"
hypervisor = "none"
firmware = "uefi"
bus = "nvme"
memory = "4 GiB"
"#;
const ALL: [&str; 9] = ["kvm-bios", "kvm-uefi", "kvm-scsi", "micro", "xen-pv", "xen-pv-direct", "xen-pvh", "xen-hvm", "metal"];

/// A command's output; it has to succeed.
#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C").output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed by this test: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

fn machine_on(daemon: &Daemon, instance: &str, platform: &str) -> Result<Value, String> {
    let request = json!({"volume": {"pool": "default", "name": instance}, "platform": platform});
    call(daemon, "VolumeService/GetMapping", &request).map(|answer| answer["machine"].clone())
}

#[track_caller]
fn disk_of(rendered: &Rendered) -> &str {
    rendered.root()["volume"]["device"].as_str().expect("a path")
}

#[test]
fn one_disk_for_all_platforms_passes_every_judge() {
    let daemon = Daemon::start(PLATFORMS);
    let image = image(&daemon, FIXTURE, &json!({}));
    let rendered = render(&daemon, &image, "all-1", "RAW", &json!({"platforms": ALL}));
    let disk = disk_of(&rendered).to_owned();
    // The platforms chose: a table for the firmwares, features for pygrub.
    assert_eq!(rendered.root()["partitionTable"], "gpt", "{:#}", rendered.root());
    let verdict = run("sgdisk", &["--verify", &disk]);
    assert!(verdict.contains("No problems found"), "{verdict}");
    assert!(run("sfdisk", &["--verify", &disk]).contains("No errors detected"));
    let directory = tempfile::tempdir().expect("a directory");
    let esp = directory.path().join("esp");
    run(
        "dd",
        &["if=".to_owned() + &disk, format!("of={}", esp.display()), "bs=1M".into(), "skip=2".into(), "count=64".into()]
            .each_ref()
            .map(String::as_str),
    );
    run("fsck.fat", &["-n", esp.to_str().expect("text")]);
    let found = pygrub::run(Path::new(&disk));
    assert!(found.kernel == fs::read(fixture::get(FIXTURE).kernel).expect("readable") && found.ramdisk.is_some(), "{}", found.args);
    for platform in ALL {
        let machine = machine_on(&daemon, "all-1", platform).unwrap_or_else(|error| panic!("{platform}: {error}"));
        judge_machine(platform, &machine, directory.path());
    }
}

/// What libvirt's schema and Xen's parser say, and what the kernel's files are.
#[track_caller]
fn judge_machine(platform: &str, machine: &Value, scratch: &Path) {
    let text = |key: &str| machine[key].as_str().unwrap_or_default().to_owned();
    if !text("libvirtDomain").is_empty() {
        let path = scratch.join("domain.xml");
        fs::write(&path, text("libvirtDomain")).expect("written");
        run("virt-xml-validate", &[path.to_str().expect("text"), "domain"]);
    }
    if !text("xlConfig").is_empty() {
        let path = scratch.join("domain.cfg");
        fs::write(&path, text("xlConfig")).expect("written");
        let meant = xl_dry_run(&path, scratch);
        let kind = platform.split('-').nth(1).expect("xen-MODE");
        assert_eq!(meant["c_info"]["type"], kind, "{meant:#}");
        assert_eq!((meant["disks"].as_array().map(Vec::len), meant["nics"].as_array().map(Vec::len)), (Some(1), Some(2)), "{meant:#}");
        for (theirs, ours) in [("kernel", "kernel"), ("ramdisk", "initrd"), ("cmdline", "cmdline")] {
            assert_eq!(meant["b_info"][theirs], machine["kernel"][ours], "{theirs}: {meant:#}");
        }
    }
    let forms = ["libvirtDomain", "xlConfig"].iter().filter(|form| !text(form).is_empty()).count();
    assert_eq!(forms, if platform.starts_with("xen") { 2 } else { usize::from(platform != "metal") }, "{platform}: {machine:#}");
    let kernel = &machine["kernel"];
    let direct = ["micro", "xen-pv-direct", "xen-pvh"].contains(&platform);
    assert_eq!(kernel.is_object(), direct, "{platform}: {machine:#}");
    if direct {
        let fixture = fixture::get(FIXTURE);
        for (key, original) in [("kernel", &fixture.kernel), ("initrd", &fixture.initrd)] {
            let (given, original) = (fs::read(kernel[key].as_str().expect("a path")).expect("readable"), fs::read(original).expect("readable"));
            assert!(given == original, "{platform}: {key} is not the image's");
            assert_eq!(kernel[format!("{key}Digest")], Digest::of(&original).to_string());
        }
    }
}

/// What `xl create -n` says a configuration means: its own parser and checks, with nothing but the hypervisor taken away.
#[track_caller]
fn xl_dry_run(config: &Path, scratch: &Path) -> Value {
    let stub = scratch.join("no_hypervisor.so");
    if !stub.exists() {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/xl/no_hypervisor.c");
        run("cc", &["-shared", "-fPIC", "-o", stub.to_str().expect("text"), source]);
    }
    let xl = fs::read_dir("/usr/lib").expect("/usr/lib").filter_map(|entry| Some(entry.ok()?.path().join("bin/xl"))).find(|path| path.exists());
    let xl = xl.expect("xl is needed by this test (Debian package xen-utils-4.17)");
    let output = Command::new(xl).args(["create", "-n"]).arg(config).env("LD_PRELOAD", &stub).output().expect("run xl");
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}{errors}");
    let json = text.find('{').map(|at| &text[at..]).unwrap_or_else(|| panic!("xl says nothing: {text}{errors}"));
    serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {json}"))
}

#[test]
fn a_bare_disk_for_xen_and_microvms_has_its_kernel_beside_it() {
    let daemon = Daemon::start(PLATFORMS);
    let image = image(&daemon, FIXTURE, &json!({}));
    let rendered = render(&daemon, &image, "bare-1", "RAW", &json!({"platforms": ["xen-pvh", "xen-pv"]}));
    assert_eq!(rendered.root()["partitionTable"], "", "{:#}", rendered.root());
    let scratch = tempfile::tempdir().expect("a directory");
    for platform in ["xen-pvh", "xen-pv", "xen-pv-direct", "micro"] {
        let machine = machine_on(&daemon, "bare-1", platform).unwrap_or_else(|error| panic!("{platform}: {error}"));
        judge_machine(platform, &machine, scratch.path());
    }
    let pvh = machine_on(&daemon, "bare-1", "xen-pvh").expect("a machine");
    let uuid = rendered.root()["filesystem"]["uuid"].as_str().expect("a UUID");
    assert_eq!(pvh["kernel"]["cmdline"], format!("root=UUID={uuid} ro console=hvc0"));
    let refused = machine_on(&daemon, "bare-1", "kvm-uefi").expect_err("no partition table");
    assert!(refused.contains("FailedPrecondition") && refused.contains("LAYOUT_FIRMWARE"), "{refused}");
    let found = pygrub::run(Path::new(disk_of(&rendered)));
    assert_eq!(found.args, format!("root=UUID={uuid} ro console=hvc0"));
}

/// What GRUB reads from a file of the first partition: the same sources as the modules in the core images.
#[track_caller]
fn read_by_grub(disk: &str, path: &str) -> Vec<u8> {
    let output =
        Command::new("grub-fstest").args([disk, "cat", &format!("(loop0,gpt1){path}")]).output().expect("grub-fstest (Debian package grub-common)");
    assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn kernels_come_out_of_xfs_and_btrfs_and_grub_reads_them_there() {
    let daemon = Daemon::start(PLATFORMS);
    let scratch = tempfile::tempdir().expect("a directory");
    for filesystem in ["xfs", "btrfs"] {
        let image = image(&daemon, FIXTURE, &json!({"filesystem": {"type": filesystem}}));
        let rendered = render(&daemon, &image, filesystem, "RAW", &json!({"platforms": ["kvm-bios", "kvm-uefi", "micro", "xen-pvh"]}));
        assert_eq!((&rendered.root()["filesystem"]["type"], &rendered.root()["partitionTable"]), (&json!(filesystem), &json!("gpt")));
        for platform in ["kvm-bios", "micro", "xen-pvh", "metal"] {
            let machine = machine_on(&daemon, filesystem, platform).unwrap_or_else(|error| panic!("{filesystem} {platform}: {error}"));
            judge_machine(platform, &machine, scratch.path());
        }
        let refused = machine_on(&daemon, filesystem, "xen-pv").expect_err("pygrub's reader is for ext4");
        assert!(refused.contains("FS_PROFILE"), "{refused}");
        let disk = disk_of(&rendered);
        let menu = String::from_utf8(read_by_grub(disk, "/boot/grub/grub.cfg")).expect("text");
        let uuid = rendered.root()["filesystem"]["uuid"].as_str().expect("a UUID");
        let words: Vec<&str> = menu.lines().find(|line| line.starts_with("\tlinux ")).expect("a kernel").split_whitespace().collect();
        assert_eq!(words[2], format!("root=UUID={uuid}"));
        assert!(read_by_grub(disk, words[1]) == fs::read(fixture::get(FIXTURE).kernel).expect("readable"), "GRUB reads another kernel");
    }
}

#[test]
fn two_hosts_make_the_same_golden_disk_with_boot_loaders() {
    let digest = || {
        // No larger than it has to be: a sum over the whole file is made.
        let daemon = Daemon::start("[golden]\nsize = \"1 GiB\"\n");
        let image = image(&daemon, FIXTURE, &json!({"disk": {"layout": "gpt"}}));
        let started = call_ok(&daemon, "RenderService/Prerender", &json!({"imageId": image}));
        let id = started["render"]["id"].as_str().expect("an id").to_owned();
        let ended = call_ok(&daemon, "RenderService/WatchRender", &json!({"renderId": id}));
        assert_eq!(ended["render"]["state"], "RENDER_STATE_SUCCEEDED", "{ended:#}");
        let golden = call_ok(&daemon, "RenderService/ListGoldens", &json!({}))["goldens"][0].clone();
        // Their own digest, and one over the file that knows nothing of it.
        let path = daemon.directory().join("state/goldens").join(golden["key"].as_str().expect("a key")).join("disk.raw");
        let sum = run("sha256sum", &[path.to_str().expect("text")]);
        (golden["digest"].as_str().expect("a digest").to_owned(), sum.split_whitespace().next().expect("a sum").to_owned())
    };
    let first = digest();
    // Another directory, and another second: a date on the disk would show.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert_eq!(first, digest());
}
