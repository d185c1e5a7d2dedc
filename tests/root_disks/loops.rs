//! Loop devices and the loop target on the real kernel. Needs root and losetup, mkfs.ext4, sgdisk.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::kit::{Kit, MIB, make_patch, same_bytes, text, tool};
use cloudletd::{
    error::Kind,
    host::{
        in_use,
        loops::{self, LoopDevice, Options},
        mounts,
    },
    target::{VolumeFormat, target_for},
};

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).expect("open")
}

fn image(kit: &Kit, name: &str, size: u64) -> PathBuf {
    let path = kit.directory.path().join(name);
    File::create(&path).expect("create").set_len(size).expect("size");
    path
}

#[test]
fn eight_threads_attach_and_close_25_times_each_without_a_failure_or_a_leak() {
    let kit = Kit::new(2 * MIB);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let path = image(&kit, &format!("t{thread}.img"), MIB);
            scope.spawn(move || {
                for round in 0..25u64 {
                    let device = LoopDevice::attach(&open(&path), &path, &Options::guarded()).expect("attach");
                    let mark = (thread << 32 | round).to_be_bytes();
                    device.file().expect("open").write_all_at(&mark, 512).expect("write");
                    let node = device.path().to_owned();
                    assert_eq!(loops::find_by_backing(&path).expect("list"), [node]);
                    device.close().expect("close");
                    assert!(loops::find_by_backing(&path).expect("list").is_empty(), "close waits");
                    let mut back = [0; 8];
                    open(&path).read_exact_at(&mut back, 512).expect("read");
                    assert_eq!(back, mark, "close flushes");
                }
            });
        }
    });
}

#[test]
fn options_reach_the_kernel() {
    let kit = Kit::new(2 * MIB);
    let path = image(&kit, "options.img", 8 * MIB);
    let options = Options { offset: MIB, size_limit: 2 * MIB, block_size: 4096, read_only: true, direct_io: true, ..Options::guarded() };
    let device = LoopDevice::attach(&File::open(&path).expect("open"), &path, &options).expect("attach");
    let row = tool("losetup", &["--noheadings", "--raw", "--output", "OFFSET,SIZELIMIT,RO,AUTOCLEAR,LOG-SEC", text(device.path())]);
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["1048576", "2097152", "1", "1", "4096"]);
    device.close().expect("close");
    let device = LoopDevice::attach(&open(&path), &path, &Options::persistent()).expect("attach");
    let row = tool("losetup", &["--noheadings", "--raw", "--output", "RO,AUTOCLEAR,PARTSCAN,DIO", text(device.path())]);
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["0", "0", "1", "1"], "the disk below can do direct I/O");
    device.close().expect("close");
}

/// Kernels without GPT support (CONFIG_EFI_PARTITION) show none; losetup is the judge of what this one can.
#[test]
fn partitions_appear_with_the_attach_as_they_do_with_losetup() {
    let kit = Kit::new(2 * MIB);
    let path = image(&kit, "parted.img", 32 * MIB);
    tool("sgdisk", &["--new=1:2048:+4M", "--new=2:0:0", text(&path)]);
    let node = PathBuf::from(tool("losetup", &["--find", "--show", "--partscan", text(&path)]).trim());
    let shown = |node: &Path| [1, 2, 3].map(|number| mounts::block_number(Path::new(&format!("{}p{number}", node.display()))).is_some());
    let want = shown(&node);
    loops::detach(&node).expect("detach");
    let device = LoopDevice::attach(&open(&path), &path, &Options { partitions: true, ..Options::guarded() }).expect("attach");
    assert_eq!(shown(device.path()), want);
    assert_eq!(device.partition_path(1), Path::new(&format!("{}p1", device.path().display())));
    device.close().expect("close");
}

#[test]
fn dropping_the_guard_detaches_and_so_does_killing_the_process() {
    let kit = Kit::new(2 * MIB);
    let path = image(&kit, "dropped.img", MIB);
    drop(LoopDevice::attach(&open(&path), &path, &Options::guarded()).expect("attach"));
    wait_until_free(&path);
    // This test program once more, as a process that attaches and is killed.
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", "loops::child_that_attaches_and_waits", "--nocapture"])
        .env("CLOUDLETD_TEST_ATTACH", &path)
        .stdout(Stdio::null())
        .spawn()
        .expect("start");
    let deadline = Instant::now() + Duration::from_secs(20);
    while loops::find_by_backing(&path).expect("list").is_empty() {
        assert!(Instant::now() < deadline, "the child never attached");
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().expect("kill");
    child.wait().expect("wait");
    wait_until_free(&path);
}

/// Does nothing unless it is started by the test above.
#[test]
fn child_that_attaches_and_waits() {
    if let Some(path) = std::env::var_os("CLOUDLETD_TEST_ATTACH").map(PathBuf::from) {
        let _device = LoopDevice::attach(&open(&path), &path, &Options::guarded()).expect("attach");
        std::thread::sleep(Duration::from_secs(60));
    }
}

#[track_caller]
fn wait_until_free(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !loops::find_by_backing(path).expect("list").is_empty() {
        assert!(Instant::now() < deadline, "still attached");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_renamed_or_linked_backing_file_is_still_found() {
    let kit = Kit::new(2 * MIB);
    let path = image(&kit, "before.img", MIB);
    let device = LoopDevice::attach(&open(&path), &path, &Options::guarded()).expect("attach");
    let (renamed, link) = (kit.directory.path().join("after.img"), kit.directory.path().join("link.img"));
    std::fs::rename(&path, &renamed).expect("rename");
    std::fs::hard_link(&renamed, &link).expect("link");
    std::fs::remove_file(&renamed).expect("remove");
    assert_eq!(loops::find_by_backing(&link).expect("list"), [device.path().to_owned()]);
    assert!(loops::find_by_backing(&path).expect("a missing file has none").is_empty());
    device.close().expect("close");
}

#[test]
fn a_mounted_loop_device_is_not_detached() {
    let kit = Kit::new(2 * MIB);
    let path = image(&kit, "mounted.img", 16 * MIB);
    tool("mkfs.ext4", &["-q", text(&path)]);
    let device = LoopDevice::attach(&open(&path), &path, &Options::persistent()).expect("attach").keep().expect("keep");
    let point = kit.directory.path().join("mnt with space");
    std::fs::create_dir(&point).expect("mount point");
    tool("mount", &[text(&device), text(&point)]);
    let number = mounts::block_number(&device).expect("a block device");
    assert_eq!(mounts::mount_points_of(number).expect("mountinfo"), std::slice::from_ref(&point));
    assert_eq!(loops::detach(&device).expect_err("mounted").reason(), "DEVICE_IN_USE");
    let error = in_use::refuse_device_in_use(&device, number).expect_err("mounted");
    assert!(error.message().contains("mnt with space"), "{error:?}");
    assert_eq!(loops::find_by_backing(&path).expect("list"), std::slice::from_ref(&device));
    tool("umount", &[text(&point)]);
    loops::detach(&device).expect("free now");
    loops::detach(&device).expect("done already is success");
}

#[test]
fn a_loop_volume_outlives_its_maker_and_is_adopted_attached_again_and_deleted() {
    let kit = Kit::new(32 * MIB);
    let target = target_for(VolumeFormat::Loop);
    let patch = make_patch(40 * MIB, 25);
    let volume = kit.render(VolumeFormat::Loop, "xen", &patch).expect("renders");
    assert!(same_bytes(&volume.device, &kit.reference(&patch), 40 * MIB));
    assert_eq!(target.adopt(&kit.pool, &volume).expect("all is well"), volume);
    // As after a reboot.
    loops::detach(&volume.device).expect("detach");
    let adopted = target.adopt(&kit.pool, &volume).expect("attaches");
    assert_eq!(loops::find_by_backing(&adopted.path).expect("list"), std::slice::from_ref(&adopted.device));
    let holder = open_exclusively(&adopted.device);
    let error = target.delete(&kit.pool, &adopted).expect_err("claimed");
    assert_eq!(error.kind(), Kind::Conflict, "{error:?}");
    assert!(adopted.path.exists());
    drop(holder);
    let mut reader = Command::new("sleep").arg("60").stdin(File::open(&adopted.device).expect("open")).spawn().expect("sleep");
    let error = target.delete(&kit.pool, &adopted).expect_err("open elsewhere");
    assert!(error.message().contains("sleep (pid"), "{error:?}");
    reader.kill().expect("kill");
    reader.wait().expect("wait");
    target.delete(&kit.pool, &adopted).expect("deletes");
    target.delete(&kit.pool, &adopted).expect("done already is success");
    assert_eq!(kit.pool_content(), [""; 0]);
}

/// Opens a block device as a holder would.
fn open_exclusively(path: &Path) -> File {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().read(true).custom_flags(libc::O_EXCL).open(path).expect("exclusive open")
}
