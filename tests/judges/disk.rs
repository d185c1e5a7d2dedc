//! What sgdisk and sfdisk say about disks with a partition table: every offset, size, type and GUID. Needs gdisk and fdisk, no privilege.

use std::{fs::File, os::unix::fs::FileExt, path::Path, process::Command, sync::Arc};

use cloudletd::{
    disk::{DiskIds, DiskPlan, ESP_SIZE, Layout, SECTOR, types},
    fs::{Region, patch::BlockPatch},
    mapping::Partition,
};
use uuid::Uuid;

const MIB: u64 = 1 << 20;

fn run(program: &str, args: &[&str], image: &Path) -> String {
    let path = "/usr/sbin:/usr/bin:/sbin:/bin";
    let output = Command::new(program).args(args).arg(image).env("PATH", path).env("LC_ALL", "C").output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed by this test (Debian packages gdisk, fdisk): {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

fn plan(size: u64, arch: &str, seed: u8) -> DiskPlan {
    DiskPlan::new(Layout::Gpt, size, ESP_SIZE, types::root_of(arch), DiskIds::derived(Uuid::from_bytes([seed; 16]))).expect("valid")
}

fn judge(image: &Path, plan: &DiskPlan) {
    let verdict = run("sgdisk", &["--verify"], image);
    assert!(verdict.contains("No problems found") && !verdict.contains("Warning"), "{verdict}");
    // On a disk of whole MiB the root ends at a multiple of 1 MiB; otherwise sgdisk remarks that it does not.
    assert_eq!(verdict.contains("Caution"), !plan.size_bytes().is_multiple_of(MIB), "{verdict}");
    let verdict = run("sfdisk", &["--verify"], image);
    assert!(verdict.contains("No errors detected") && !verdict.contains("do not agree"), "{verdict}");
    let json: serde_json::Value = serde_json::from_str(&run("sfdisk", &["--json"], image)).expect("sfdisk prints JSON");
    let table = &json["partitiontable"];
    assert_eq!(table["label"], "gpt");
    assert_eq!(table["sectorsize"], SECTOR);
    assert_eq!(table["firstlba"], 34);
    assert_eq!(table["lastlba"].as_u64(), Some(plan.size_bytes() / SECTOR - 34));
    assert_eq!(table["id"].as_str().map(str::to_lowercase), plan.disk_uuid());
    let found: Vec<Partition> = table["partitions"].as_array().expect("partitions").iter().map(partition).collect();
    let mut wanted = plan.describe();
    wanted.sort_by_key(|p| p.number);
    let mut found = found;
    found.sort_by_key(|p| p.number);
    assert_eq!(found, wanted);
}

fn partition(value: &serde_json::Value) -> Partition {
    let text = |key: &str| value[key].as_str().expect("text").to_owned();
    let node = text("node");
    let number = node.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).expect("a number");
    Partition {
        number,
        offset_bytes: value["start"].as_u64().expect("start") * SECTOR,
        size_bytes: value["size"].as_u64().expect("size") * SECTOR,
        type_uuid: text("type").to_lowercase(),
        uuid: text("uuid").to_lowercase(),
        name: text("name"),
    }
}

fn image(directory: &Path, name: &str, size: u64) -> (std::path::PathBuf, Region) {
    let path = directory.join(name);
    let file = File::options().read(true).write(true).create_new(true).open(&path).expect("image");
    file.set_len(size).expect("sparse");
    (path, Region { file: Arc::new(file), offset: 0, len: size })
}

#[test]
fn judges_accept_new_tables_of_every_size() {
    let directory = tempfile::tempdir().expect("directory");
    for (index, (size, arch)) in [(68 * MIB, "amd64"), (100 * MIB + 4096, "arm64"), (10 << 30, "amd64"), (3 << 40, "riscv64")].into_iter().enumerate()
    {
        let (path, disk) = image(directory.path(), &format!("golden{index}.img"), size);
        plan(size, arch, 1).write_table(&disk).expect("written");
        judge(&path, &plan(size, arch, 1));
    }
}

#[test]
fn judges_accept_patched_tables() {
    let directory = tempfile::tempdir().expect("directory");
    for (index, size) in [100 * MIB, 100 * MIB + 4096, 100 * MIB + 12288, 7 << 30, 5 << 40].into_iter().enumerate() {
        let (path, golden) = image(directory.path(), &format!("disk{index}.img"), 100 * MIB);
        plan(100 * MIB, "amd64", 1).write_table(&golden).expect("written");
        let instance = plan(size, "amd64", 2);
        let patch = instance.patch(&golden, BlockPatch::default()).expect("patched");
        golden.file.set_len(patch.size_bytes()).expect("grown");
        for (number, block) in patch.iter() {
            golden.file.write_all_at(block, number * 4096).expect("applied");
        }
        judge(&path, &instance);
    }
}

#[test]
fn judges_accept_hybrid_tables_and_see_the_root_in_both() {
    let directory = tempfile::tempdir().expect("directory");
    for (index, size) in [100 * MIB, 7 << 30, 2 << 40].into_iter().enumerate() {
        let plan = |size, seed: u8| {
            DiskPlan::new(Layout::Hybrid, size, ESP_SIZE, types::root_of("amd64"), DiskIds::derived(Uuid::from_bytes([seed; 16]))).expect("valid")
        };
        let (path, golden) = image(directory.path(), &format!("disk{index}.img"), 80 * MIB);
        plan(80 * MIB, 1).write_table(&golden).expect("written");
        let patch = plan(size, 2).patch(&golden, BlockPatch::default()).expect("patched");
        golden.file.set_len(patch.size_bytes()).expect("grown");
        for (number, block) in patch.iter() {
            golden.file.write_all_at(block, number * 4096).expect("applied");
        }
        let verdict = run("sgdisk", &["--verify"], &path);
        assert!(verdict.contains("No problems found"), "{verdict}");
        let shown = run("sgdisk", &["--print-mbr"], &path);
        let root = plan(size, 2).root();
        assert!(
            shown.lines().any(|line| line.contains("0x83") && line.contains(&(root.offset / SECTOR).to_string()) && line.contains('*')),
            "{shown}"
        );
    }
}

#[test]
fn the_judge_would_notice_an_old_backup_table() {
    let directory = tempfile::tempdir().expect("directory");
    let (path, disk) = image(directory.path(), "disk.img", 100 * MIB);
    plan(100 * MIB, "amd64", 1).write_table(&disk).expect("written");
    disk.file.set_len(200 * MIB).expect("grown");
    let output = Command::new("/usr/sbin/sgdisk").arg("--verify").arg(&path).output().expect("sgdisk");
    assert!(!String::from_utf8_lossy(&output.stdout).contains("No problems found"));
}
