//! File targets against a reference raw image, judged by qemu-img. Needs root and qemu-img.

use std::{
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
};

use crate::kit::{self, Kit, MIB, Mounted, judge, make_patch, render, text, tool};
use cloudletd::{
    error::Kind,
    fs::patch::BlockPatch,
    host::loops::{self, LoopDevice, Options},
    names::VolumeName,
    progress::Progress,
    target::{Place, Pool, Volume, VolumeFormat, VolumePlan, Wanted, target_for},
};
use proptest::prelude::*;

const FILE_FORMATS: [VolumeFormat; 3] = [VolumeFormat::Raw, VolumeFormat::Qcow2, VolumeFormat::Qcow2Overlay];

#[test]
fn every_file_format_holds_golden_and_patch_and_passes_the_check() {
    let kit = Kit::new(96 * MIB);
    for format in FILE_FORMATS {
        for (case, size, blocks) in [("same", 96 * MIB, 100), ("larger", 300 * MIB, 60), ("empty", 96 * MIB, 0), ("odd", 96 * MIB + 4096, 7)] {
            let patch = make_patch(size, blocks);
            let volume = kit.render(format, &format!("{}-{case}", format.name()), &patch).expect("renders");
            judge(&kit, &volume.path, format, &patch);
            assert_eq!(volume.virtual_size_bytes, size);
            assert_eq!(volume.backing.is_some(), format == VolumeFormat::Qcow2Overlay);
            let meta = std::fs::metadata(&volume.path).expect("stat");
            assert_eq!(meta.mode() & 0o777, 0o600, "a volume holds secrets");
            assert!(meta.blocks() * 512 <= volume.allocated_size_bytes + 4096, "{case}: {} and {}", meta.blocks() * 512, volume.allocated_size_bytes);
        }
    }
    assert!(kit.pool_content().iter().all(|name| !name.starts_with('.')), "no temporary name is left: {:?}", kit.pool_content());
}

#[test]
fn an_overlay_says_its_backing_format_and_writes_little() {
    let kit = Kit::new(256 * MIB);
    let patch = make_patch(10 << 30, 100);
    let volume = kit.render(VolumeFormat::Qcow2Overlay, "web", &patch).expect("renders");
    let info = tool("qemu-img", &["info", "--output=json", text(&volume.path)]);
    assert!(info.contains("\"backing-filename-format\": \"raw\""), "{info}");
    assert!(info.contains(&format!("\"full-backing-filename\": \"{}\"", text(&kit.golden.path))), "{info}");
    assert!(volume.allocated_size_bytes <= MIB, "{} bytes for 100 blocks", volume.allocated_size_bytes);
    let map = tool("qemu-img", &["map", "--output=json", text(&volume.path)]);
    assert!(map.contains("\"depth\": 1") && map.contains("\"depth\": 0"), "golden and patch are both mapped: {map}");
}

#[test]
fn an_overlay_stays_right_while_a_guest_writes_to_it() {
    let kit = Kit::new(64 * MIB);
    let patch = make_patch(64 * MIB, 40);
    let volume = kit.render(VolumeFormat::Qcow2Overlay, "written", &patch).expect("renders");
    let reference = kit.reference(&patch);
    for (path, format) in [(&volume.path, "qcow2"), (&reference, "raw")] {
        let commands = ["write -P 0x11 100k 300k", "write -P 0x22 33333k 5k", "write -z 40M 1M", "write -P 0x33 67100672 8k"];
        let arguments: Vec<&str> =
            ["-f", format].into_iter().chain(commands.iter().flat_map(|command| ["-c", *command])).chain([text(path)]).collect();
        tool("qemu-io", &arguments);
    }
    let said = tool("qemu-img", &["check", "-f", "qcow2", text(&volume.path)]);
    assert!(said.contains("No errors"), "{said}");
    tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&volume.path), text(&reference)]);
}

#[test]
fn raw_and_standalone_are_as_sparse_as_the_golden() {
    let kit = Kit::new(128 * MIB);
    let golden = std::fs::metadata(&kit.golden.path).expect("stat").blocks() * 512;
    let patch = make_patch(2 << 30, 20);
    for format in [VolumeFormat::Raw, VolumeFormat::Qcow2] {
        let volume = kit.render(format, format.name(), &patch).expect("renders");
        assert!(volume.allocated_size_bytes <= golden + 20 * 4096 + MIB, "{}: {} for {golden}", format.name(), volume.allocated_size_bytes);
    }
}

#[test]
fn a_name_that_is_taken_in_any_format_is_refused_and_kept() {
    let kit = Kit::new(4 * MIB);
    let patch = make_patch(4 * MIB, 3);
    let first = kit.render(VolumeFormat::Raw, "disk", &patch).expect("renders");
    let before = std::fs::read(&first.path).expect("read");
    for format in FILE_FORMATS {
        let error = kit.render(format, "disk", &BlockPatch::new(8 * MIB)).expect_err("taken");
        assert_eq!(error.kind(), Kind::AlreadyExists, "{error:?}");
        let name = "disk".parse().expect("valid");
        assert_eq!(target_for(format).check(&Wanted::new(&kit.pool, &name, 4096, 4096)).expect_err("taken").kind(), Kind::AlreadyExists);
    }
    assert_eq!(std::fs::read(&first.path).expect("read"), before);
    assert_eq!(kit.pool_content(), ["disk.raw"]);
}

#[test]
fn a_name_that_is_taken_after_staging_is_not_replaced() {
    let kit = Kit::new(4 * MIB);
    let (patch, name) = (make_patch(4 * MIB, 3), "late".parse().expect("valid"));
    let plan = VolumePlan { overwrite: true, ..VolumePlan::new(&kit.pool, &name, &kit.golden, &patch, "r-2") };
    let staged = target_for(VolumeFormat::Raw).stage(&plan, &Progress::default()).expect("stages");
    std::fs::write(kit.pool_path().join("late.raw"), "mine").expect("write");
    assert_eq!(staged.publish().expect_err("taken").kind(), Kind::AlreadyExists);
    assert_eq!(std::fs::read(kit.pool_path().join("late.raw")).expect("read"), b"mine");
    assert_eq!(kit.pool_content(), ["late.raw"]);
}

#[test]
fn dropping_a_stage_and_cancelling_leave_nothing() {
    let kit = Kit::new(8 * MIB);
    let (patch, name) = (make_patch(8 * MIB, 9), "gone".parse().expect("valid"));
    let plan = VolumePlan::new(&kit.pool, &name, &kit.golden, &patch, "r-3");
    for format in FILE_FORMATS {
        let staged = target_for(format).stage(&plan, &Progress::default()).expect("stages");
        assert!(staged.path().exists() && staged.allocated_size_bytes().expect("stat") > 0);
        drop(staged);
        assert_eq!(kit.pool_content(), [""; 0]);
        let progress = Progress::default();
        progress.cancel();
        assert_eq!(target_for(format).stage(&plan, &progress).err().expect("cancelled").kind(), Kind::Cancelled, "{}", format.name());
        assert_eq!(kit.pool_content(), [""; 0]);
    }
}

#[test]
fn sweep_takes_what_a_dead_stage_left_and_spares_a_live_one() {
    let kit = Kit::new(4 * MIB);
    let (patch, name) = (make_patch(4 * MIB, 2), "live".parse().expect("valid"));
    let plan = VolumePlan::new(&kit.pool, &name, &kit.golden, &patch, "r-4");
    let target = target_for(VolumeFormat::Qcow2Overlay);
    let live = target.stage(&plan, &Progress::default()).expect("stages");
    let dead = kit.pool_path().join(".cloudletd-stage-r-0-old");
    std::fs::write(&dead, "left").expect("write");
    std::fs::write(kit.pool_path().join("other"), "not ours").expect("write");
    assert_eq!(target.sweep(&kit.pool, true).expect("dry run"), std::slice::from_ref(&dead));
    assert!(dead.exists());
    assert_eq!(target.sweep(&kit.pool, false).expect("sweeps"), std::slice::from_ref(&dead));
    assert!(!dead.exists());
    live.publish().expect("the live one is published");
    // What the same render left behind does not stop its retry.
    std::fs::write(kit.pool_path().join(".cloudletd-stage-r-1-again"), "left").expect("write");
    kit.render(VolumeFormat::Raw, "again", &patch).expect("renders");
    assert_eq!(kit.pool_content(), ["again.raw", "live.qcow2", "other"]);
}

#[test]
fn adopt_finds_the_file_and_says_when_the_golden_is_gone() {
    let kit = Kit::new(4 * MIB);
    let volume = kit.render(VolumeFormat::Qcow2Overlay, "v", &make_patch(4 * MIB, 2)).expect("renders");
    let target = target_for(VolumeFormat::Qcow2Overlay);
    assert_eq!(target.adopt(&kit.pool, &volume).expect("adopts"), volume);
    std::fs::rename(&kit.golden.path, kit.directory.path().join("elsewhere")).expect("rename");
    let error = target.adopt(&kit.pool, &volume).expect_err("golden gone");
    assert_eq!((error.kind(), error.reason()), (Kind::NotFound, "BACKING_MISSING"));
    target.delete(&kit.pool, &volume).expect("deletes");
    assert_eq!(target.adopt(&kit.pool, &volume).expect_err("gone").kind(), Kind::NotFound);
    target.delete(&kit.pool, &volume).expect("done already is success");
}

#[test]
fn delete_refuses_a_file_that_a_lock_a_loop_or_a_process_holds() {
    let kit = Kit::new(4 * MIB);
    let volume = kit.render(VolumeFormat::Raw, "busy", &make_patch(4 * MIB, 2)).expect("renders");
    let target = target_for(VolumeFormat::Raw);
    let refused = |why: &str| {
        let error = target.delete(&kit.pool, &volume).expect_err(why);
        assert_eq!((error.kind(), error.reason()), (Kind::Conflict, "IN_USE"), "{why}: {error:?}");
        assert!(volume.path.exists());
    };
    // As QEMU does it: a shared open-file-description lock on byte 100.
    let file = File::options().read(true).write(true).open(&volume.path).expect("open");
    let lock = libc::flock { l_type: libc::F_RDLCK as i16, l_whence: 0, l_start: 100, l_len: 1, l_pid: 0 };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).expect("lock");
    refused("record lock");
    drop(file);
    let device = LoopDevice::attach(&File::options().read(true).write(true).open(&volume.path).expect("open"), &volume.path, &Options::guarded())
        .expect("attach");
    refused("loop");
    device.close().expect("detach");
    let mut reader = std::process::Command::new("sleep").arg("60").stdin(File::open(&volume.path).expect("open")).spawn().expect("sleep");
    refused("open elsewhere");
    reader.kill().expect("kill");
    reader.wait().expect("wait");
    target.delete(&kit.pool, &volume).expect("free now");
    assert!(!volume.path.exists());
}

#[test]
fn a_running_qemu_is_seen() {
    let kit = Kit::new(4 * MIB);
    let volume = kit.render(VolumeFormat::Qcow2Overlay, "run", &make_patch(4 * MIB, 2)).expect("renders");
    let mut guest = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", text(&volume.path)])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("qemu-io is needed for this test");
    let target = target_for(VolumeFormat::Qcow2Overlay);
    std::thread::sleep(std::time::Duration::from_millis(500));
    let error = target.delete(&kit.pool, &volume).expect_err("in use");
    assert!(error.message().contains("record lock"), "{error:?}");
    drop(guest.stdin.take());
    guest.wait().expect("wait");
    target.delete(&kit.pool, &volume).expect("free now");
}

#[test]
fn pools_of_the_wrong_kind_and_impossible_sizes_are_refused() {
    let kit = Kit::new(4 * MIB);
    let devices = Pool { name: "devs".parse().expect("valid"), place: Place::Devices { directory: "/dev".into(), allow: vec![] } };
    for format in FILE_FORMATS {
        let error = render(&devices, &kit.golden, format, "x", &BlockPatch::new(4 * MIB), false).expect_err("kind");
        assert_eq!((error.kind(), error.reason()), (Kind::InvalidRequest, "POOL_KIND_DIFFERS"));
        assert_eq!(kit.render(format, "x", &BlockPatch::new(MIB)).expect_err("smaller").kind(), Kind::InvalidRequest);
        let mut beyond = BlockPatch::new(4 * MIB);
        beyond.insert(4 * MIB / 4096, vec![1; 4096].into());
        assert_eq!(kit.render(format, "x", &beyond).expect_err("beyond").kind(), Kind::Internal);
        let error = target_for(format).check(&Wanted::new(&kit.pool, &"x".parse().expect("valid"), 1 << 60, 1 << 60)).expect_err("full");
        assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "POOL_FULL"));
    }
    let short = cloudletd::target::GoldenDisk { size_bytes: 8 * MIB, ..kit.golden.clone() };
    let error = render(&kit.pool, &short, VolumeFormat::Raw, "x", &BlockPatch::new(8 * MIB), false).expect_err("golden differs");
    assert_eq!(error.kind(), Kind::Corrupt);
    assert_eq!(kit.pool_content(), [""; 0]);
}

#[test]
fn a_full_pool_is_reported_and_nothing_stays_in_it() {
    let kit = Kit::new(64 * MIB);
    let tiny = Mounted::new(&kit, "tiny", &["mkfs.ext4", "-q", "-O", "^has_journal"], 8 * MIB);
    let pool = Pool { name: "tiny".parse().expect("valid"), place: Place::Directory { path: tiny.point.clone() } };
    for format in [VolumeFormat::Raw, VolumeFormat::Qcow2] {
        let error = render(&pool, &kit.golden, format, "big", &make_patch(64 * MIB, 10), false).expect_err("full");
        assert_eq!(error.kind(), Kind::NoSpace, "{}: {error:?}", format.name());
        let left: Vec<_> = std::fs::read_dir(&tiny.point).expect("list").map(|entry| entry.expect("entry").file_name()).collect();
        assert_eq!(left, ["lost+found"]);
    }
}

#[test]
fn on_a_reflinking_filesystem_raw_shares_the_goldens_blocks() {
    let kit = Kit::new(4 * MIB);
    let xfs = Mounted::new(&kit, "xfs", &["mkfs.xfs", "-q", "-m", "reflink=1"], 400 * MIB);
    let inner = Kit::below(&xfs.point, 64 * MIB);
    for format in FILE_FORMATS {
        let patch = make_patch(80 * MIB, 30);
        let volume = inner.render(format, format.name(), &patch).expect("renders");
        judge(&inner, &volume.path, format, &patch);
    }
    let map = tool("filefrag", &["-v", text(&inner.pool_path().join("raw.raw"))]);
    assert!(map.contains("shared"), "{map}");
}

/// A loop volume shows the same bytes, and its file can't go while it is attached elsewhere.
#[test]
fn loops_of_a_raw_volume_show_golden_and_patch() {
    let kit = Kit::new(16 * MIB);
    let patch = make_patch(20 * MIB, 12);
    let volume = kit.render(VolumeFormat::Loop, "l", &patch).expect("renders");
    assert_eq!(loops::find_by_backing(&volume.path).expect("lists"), std::slice::from_ref(&volume.device));
    assert!(kit::same_bytes(&volume.device, &kit.reference(&patch), 20 * MIB));
    target_for(VolumeFormat::Loop).delete(&kit.pool, &volume).expect("deletes");
    assert_eq!(kit.pool_content(), [""; 0]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_patches_are_in_every_format_what_they_are_in_the_reference(
        blocks in prop::collection::btree_map(0u64..6000, any::<u64>(), 0..120),
        extra in 0u64..40_000,
    ) {
        let kit = Kit::new(8 * MIB);
        let size = (8 * MIB + extra * 4096).max(6000 * 4096);
        let mut patch = BlockPatch::new(size);
        for (number, seed) in blocks {
            patch.insert(number, kit::Noise(seed | 1).bytes(4096).into());
        }
        for format in FILE_FORMATS {
            let volume = kit.render(format, format.name(), &patch).expect("renders");
            judge(&kit, &volume.path, format, &patch);
        }
    }
}

/// The test's own judge must be able to say no.
#[test]
fn a_flipped_byte_is_noticed_by_the_judge() {
    let kit = Kit::new(4 * MIB);
    let patch = make_patch(4 * MIB, 2);
    let volume = kit.render(VolumeFormat::Raw, "flip", &patch).expect("renders");
    let file = File::options().read(true).write(true).open(&volume.path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 777).expect("read");
    file.write_all_at(&[byte[0] ^ 1], 777).expect("write");
    drop(file);
    let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| judge(&kit, &volume.path, VolumeFormat::Raw, &patch)));
    assert!(failed.is_err());
}

#[test]
fn a_file_is_replaced_at_once_when_nobody_uses_it_and_not_at_all_otherwise() {
    let kit = Kit::new(16 * MIB);
    for (format, image) in [(VolumeFormat::Raw, "raw"), (VolumeFormat::Qcow2, "qcow2"), (VolumeFormat::Qcow2Overlay, "qcow2")] {
        let name: VolumeName = format!("again-{}", format.name()).parse().expect("valid");
        let stage = |byte: u8, replace: Option<&Volume>| {
            let mut patch = BlockPatch::new(kit.golden.size_bytes);
            patch.insert(3, vec![byte; 4096].into());
            let plan = VolumePlan { replace, ..VolumePlan::new(&kit.pool, &name, &kit.golden, &patch, "r-again") };
            target_for(format).stage(&plan, &Progress::default())
        };
        let first = stage(1, None).and_then(|staged| staged.publish()).expect("published");
        assert_eq!(stage(2, None).err().expect("taken").reason(), "VOLUME_EXISTS");
        let shown = |volume: &Volume| {
            let out = kit.directory.path().join("shown.raw");
            tool("qemu-img", &["convert", "-f", image, "-O", "raw", volume.path.to_str().expect("text"), out.to_str().expect("text")]);
            std::fs::read(&out).expect("read")[3 * 4096]
        };
        // What is staged and dropped leaves the old one.
        drop(stage(3, Some(&first)).expect("staged"));
        assert_eq!(shown(&first), 1);
        // A process that has it as a guest's disk would: QEMU's own locks.
        let staged = stage(4, Some(&first)).expect("staged");
        let path = first.path.to_str().expect("text").to_owned();
        let mut holder = std::process::Command::new("qemu-io")
            .args(["-f", image, &path])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("qemu-io is needed by this test (Debian package qemu-utils)");
        let begun = std::time::Instant::now();
        while target_for(format).check(&Wanted { replace: Some(&first), ..Wanted::new(&kit.pool, &name, kit.golden.size_bytes, 0) }).is_ok() {
            assert!(begun.elapsed().as_secs() < 20, "the holder is not seen");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        assert_eq!(staged.publish().expect_err("in use").reason(), "VOLUME_IN_USE");
        assert_eq!(stage(5, Some(&first)).err().expect("in use").reason(), "VOLUME_IN_USE");
        holder.kill().expect("killed");
        holder.wait().expect("gone");
        assert_eq!(shown(&first), 1, "the old volume is untouched");
        let second = stage(6, Some(&first)).and_then(|staged| staged.publish()).expect("replaced");
        assert_eq!((shown(&second), &second.path), (6, &first.path));
        target_for(format).delete(&kit.pool, &second).expect("deleted");
    }
}
