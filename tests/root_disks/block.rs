//! The block target on loop devices that a previous tenant has filled. Needs root and mkfs.ext4, mkfs.btrfs, mkfs.vfat, mkswap, sgdisk and partx.

use std::{
    fs::File,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::kit::{self, Kit, MIB, make_patch, reads_zero, render, same_bytes, text, tool};
use cloudletd::{
    error::Kind,
    fs::patch::BlockPatch,
    host::{
        block::{Access, Claim},
        loops::{LoopDevice, Options},
        signatures,
    },
    names::VolumeName,
    progress::Progress,
    target::{Place, Pool, Volume, VolumeFormat, VolumeOptions, VolumePlan, Wanted, ZeroPolicy, block, target_for},
};

/// A device full of 0xA5 under the name `vm-disk` in a directory of links, as /dev/disk/by-id is one.
struct Device {
    kit: Kit,
    device: Option<LoopDevice>,
    pool: Pool,
    size: u64,
}

impl Device {
    fn new(golden_bytes: u64, size: u64) -> Self {
        Device::with(golden_bytes, size, Options { partitions: true, ..Options::guarded() })
    }

    fn with(golden_bytes: u64, size: u64, options: Options) -> Self {
        let kit = Kit::new(golden_bytes);
        let backing = kit.directory.path().join("device.img");
        let file = File::options().read(true).write(true).create_new(true).open(&backing).expect("create");
        let tenant = vec![0xa5; MIB as usize];
        for at in (0..size).step_by(MIB as usize) {
            file.write_all_at(&tenant[..(size - at).min(MIB) as usize], at).expect("fill");
        }
        let device = LoopDevice::attach(&file, &backing, &options).expect("attach");
        let directory = kit.directory.path().join("by-id");
        std::fs::create_dir(&directory).expect("directory");
        std::os::unix::fs::symlink(device.path(), directory.join("vm-disk")).expect("link");
        let pool = Pool { name: "devices".parse().expect("valid"), place: Place::Devices { directory, allow: vec!["vm-*".into()] } };
        Device { kit, device: Some(device), pool, size }
    }

    fn node(&self) -> &Path {
        self.device.as_ref().expect("attached").path()
    }

    fn link(&self) -> PathBuf {
        self.kit.directory.path().join("by-id/vm-disk")
    }

    fn check(&self, size: u64, overwrite: bool) -> cloudletd::error::Result<()> {
        target_for(VolumeFormat::Block).check(&Wanted { overwrite, ..Wanted::new(&self.pool, &name(), size, size) })
    }

    fn render(&self, patch: &BlockPatch, overwrite: bool) -> cloudletd::error::Result<Volume> {
        render(&self.pool, &self.kit.golden, VolumeFormat::Block, "vm-disk", patch, overwrite)
    }

    /// Whether the previous tenant's bytes are all still there.
    fn is_untouched(&self) -> bool {
        let file = File::open(self.node()).expect("open");
        let mut buffer = vec![0; MIB as usize];
        (0..self.size / MIB).all(|index| {
            file.read_exact_at(&mut buffer, index * MIB).expect("read");
            buffer.iter().all(|byte| *byte == 0xa5)
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Some(device) = self.device.take()
            && let Err(error) = device.close()
        {
            eprintln!("{error:?}");
        }
    }
}

fn name() -> VolumeName {
    "vm-disk".parse().expect("valid")
}

#[test]
fn a_used_device_holds_golden_and_patch_and_nothing_of_the_previous_tenant() {
    for block_size in [512, 4096] {
        let device = Device::with(48 * MIB, 80 * MIB, Options { block_size, ..Options::guarded() });
        for (round, patch) in [make_patch(64 * MIB, 50), make_patch(80 * MIB, 9), make_patch(48 * MIB, 0)].iter().enumerate() {
            // The first finds nothing recognisable, the later ones find the golden of the one before, or not: it is noise.
            let volume = device.render(patch, true).unwrap_or_else(|error| panic!("round {round}: {error:?}"));
            assert!(same_bytes(device.node(), &device.kit.reference(patch), patch.size_bytes()), "round {round}");
            assert!(reads_zero(device.node(), patch.size_bytes(), 80 * MIB), "round {round}");
            assert_eq!((volume.virtual_size_bytes, volume.allocated_size_bytes), (80 * MIB, 80 * MIB));
            assert_eq!((volume.path.as_path(), volume.device.as_path()), (device.link().as_path(), device.link().as_path()));
            let pinned = volume.pinned.expect("pinned");
            assert!(pinned.major == 7 && pinned.diskseq.is_some() && pinned.boot.is_some(), "{pinned:?}");
        }
    }
}

#[test]
fn a_golden_smaller_than_the_head_and_a_device_as_small_work() {
    let device = Device::new(2 * MIB, 2 * MIB);
    let patch = make_patch(2 * MIB, 5);
    device.render(&patch, false).expect("renders");
    assert!(same_bytes(device.node(), &device.kit.reference(&patch), 2 * MIB));
    assert_eq!(block::size_bytes(&device.pool, &name()).expect("size"), 2 * MIB);
}

#[test]
fn a_staged_device_has_no_head_until_it_is_published_and_none_when_it_is_abandoned() {
    let device = Device::new(16 * MIB, 32 * MIB);
    let (patch, name) = (make_patch(16 * MIB, 20), name());
    let plan = VolumePlan::new(&device.pool, &name, &device.kit.golden, &patch, "r");
    let target = target_for(VolumeFormat::Block);
    let staged = target.stage(&plan, &Progress::default()).expect("stages");
    // But for the mark of the render that writes it.
    let mut mark = [0; 20];
    File::open(device.node()).and_then(|node| node.read_exact_at(&mut mark, 0)).expect("read");
    assert_eq!(&mark, b"cloudletd stage of r");
    assert!(reads_zero(device.node(), 512, MIB) && !reads_zero(device.node(), MIB, 16 * MIB));
    drop(staged);
    assert!(reads_zero(device.node(), 0, MIB));
    let progress = Progress::default();
    progress.cancel();
    assert_eq!(target.stage(&plan, &progress).err().expect("cancelled").kind(), Kind::Cancelled);
    assert!(reads_zero(device.node(), 0, MIB));
    let staged = target.stage(&plan, &Progress::default()).expect("stages");
    assert_eq!(device.check(MIB, true).expect_err("held by the stage").kind(), Kind::Conflict);
    staged.publish().expect("publishes");
    assert!(same_bytes(device.node(), &device.kit.reference(&patch), 16 * MIB));
}

#[test]
fn a_name_outside_the_allow_list_is_never_opened() {
    let device = Device::new(2 * MIB, 4 * MIB);
    let directory = device.kit.directory.path().join("by-id");
    std::os::unix::fs::symlink(device.node(), directory.join("root-disk")).expect("link");
    let patch = BlockPatch::new(2 * MIB);
    let error = render(&device.pool, &device.kit.golden, VolumeFormat::Block, "root-disk", &patch, true).expect_err("not allowed");
    assert_eq!((error.kind(), error.reason()), (Kind::PermissionDenied, "DEVICE_NOT_ALLOWED"));
    let error = render(&device.pool, &device.kit.golden, VolumeFormat::Block, "vm-none", &patch, true).expect_err("missing");
    assert_eq!(error.kind(), Kind::NotFound);
    std::fs::write(directory.join("vm-file"), "text").expect("write");
    let error = render(&device.pool, &device.kit.golden, VolumeFormat::Block, "vm-file", &patch, true).expect_err("a file");
    assert_eq!((error.kind(), error.reason()), (Kind::InvalidRequest, "NOT_A_BLOCK_DEVICE"));
    assert_eq!(device.kit.render(VolumeFormat::Block, "vm-disk", &patch).expect_err("kind").reason(), "POOL_KIND_DIFFERS");
    assert!(device.is_untouched());
}

#[test]
fn a_device_that_is_too_small_is_refused_untouched() {
    let device = Device::new(8 * MIB, 4 * MIB);
    let error = device.render(&BlockPatch::new(8 * MIB), true).expect_err("too small");
    assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "DEVICE_TOO_SMALL"));
    assert_eq!(device.check(4 * MIB + 1, true).expect_err("too small").reason(), "DEVICE_TOO_SMALL");
    device.check(4 * MIB, true).expect("fits");
    assert!(device.is_untouched());
}

#[test]
fn signatures_are_named_and_refused_unless_overwritten() {
    let device = Device::new(2 * MIB, 160 * MIB);
    let node = text(device.node()).to_owned();
    let patch = make_patch(2 * MIB, 3);
    // The other rows of the table are covered by its unit test.
    let makers: [(&str, &[&str], &str); 5] = [
        ("mkfs.ext4", &["-q", "-F"], "ext2/3/4"),
        ("mkfs.btrfs", &["-q", "-f"], "btrfs"),
        ("mkswap", &[], "swap"),
        ("mkfs.vfat", &["-F", "32", "-I"], "vfat"),
        ("sgdisk", &["--clear"], "GPT"),
    ];
    for (maker, options, want) in makers {
        device.render(&BlockPatch::new(2 * MIB), true).expect("clears");
        let head = File::options().write(true).open(device.node()).expect("open");
        head.write_all_at(&vec![0; 2 * MIB as usize], 0).expect("clear the golden's noise");
        drop(head);
        let arguments: Vec<&str> = options.iter().copied().chain([node.as_str()]).collect();
        tool(maker, &arguments);
        let found = signatures::probe(&File::open(device.node()).expect("open"), 160 * MIB).expect("reads");
        assert!(found.contains(&want), "{maker}: {found:?}");
        for error in [device.check(2 * MIB, false).expect_err("lives"), device.render(&patch, false).expect_err("lives")] {
            assert_eq!((error.kind(), error.reason()), (Kind::Conflict, "DEVICE_NOT_EMPTY"), "{maker}: {error:?}");
            assert!(error.message().contains(want), "{error:?}");
        }
        device.check(2 * MIB, true).expect("overwrite");
    }
    device.render(&patch, true).expect("overwrite");
    assert!(same_bytes(device.node(), &device.kit.reference(&patch), 2 * MIB));
    assert!(reads_zero(device.node(), 2 * MIB, 160 * MIB), "the backup GPT is gone too");
}

#[test]
fn a_device_in_use_is_refused_whoever_uses_it() {
    let device = Device::new(2 * MIB, 64 * MIB);
    let patch = BlockPatch::new(2 * MIB);
    let refused = |why: &str, says: &str| {
        for error in [device.check(2 * MIB, true).expect_err(why), device.render(&patch, true).expect_err(why)] {
            assert_eq!((error.kind(), error.reason()), (Kind::Conflict, "IN_USE"), "{why}: {error:?}");
            assert!(error.chain().contains(says), "{why}: {error:?}");
        }
    };
    let holder = File::options().read(true).custom_flags(libc::O_EXCL).open(device.node()).expect("open");
    refused("claimed", "claimed");
    drop(holder);
    let mut reader = std::process::Command::new("sleep").arg("60").stdin(File::open(device.node()).expect("open")).spawn().expect("sleep");
    refused("open in another process", "sleep (pid");
    reader.kill().expect("kill");
    reader.wait().expect("wait");

    let point = device.kit.directory.path().join("mnt");
    std::fs::create_dir(&point).expect("mount point");
    tool("mkfs.ext4", &["-q", "-F", text(device.node())]);
    tool("mount", &[text(device.node()), text(&point)]);
    refused("mounted", "mounted on");
    tool("umount", &[text(&point)]);

    // A partition of it is mounted.
    tool("sgdisk", &["--zap-all", text(device.node())]);
    tool("sgdisk", &["--new=1:2048:0", text(device.node())]);
    tool("partx", &["--update", text(device.node())]);
    let part = device.device.as_ref().expect("attached").partition_path(1);
    tool("mkfs.ext4", &["-q", "-F", text(&part)]);
    tool("mount", &[text(&part), text(&point)]);
    refused("partition mounted", "its partition");
    tool("umount", &[text(&point)]);
    // The loop driver rereads the table of a device whose partitions are gone.
    tool("partx", &["--delete", text(device.node())]);

    // Another loop device lies over it.
    let upper = LoopDevice::attach(&File::options().read(true).write(true).open(device.node()).expect("open"), device.node(), &Options::guarded());
    let upper = upper.expect("attach");
    refused("under a loop device", "attached to /dev/loop");
    upper.close().expect("close");
    device.render(&patch, true).expect("free now");
}

#[test]
fn the_identity_is_pinned_and_another_device_under_the_name_is_never_touched() {
    let mut device = Device::new(2 * MIB, 8 * MIB);
    let target = target_for(VolumeFormat::Block);
    let volume = device.render(&make_patch(2 * MIB, 3), true).expect("renders");
    assert_eq!(target.adopt(&device.pool, &volume).expect("adopts"), volume);
    // The same file, perhaps even under the same number, but a new device.
    device.device.take().expect("attached").close().expect("detach");
    let backing = device.kit.directory.path().join("device.img");
    let file = File::options().read(true).write(true).open(&backing).expect("open");
    let again = LoopDevice::attach(&file, &backing, &Options::guarded()).expect("attach");
    std::fs::remove_file(device.link()).expect("remove");
    std::os::unix::fs::symlink(again.path(), device.link()).expect("link");
    device.device = Some(again);
    for error in [target.adopt(&device.pool, &volume).expect_err("another"), target.delete(&device.pool, &volume).expect_err("another")] {
        assert_eq!((error.kind(), error.reason()), (Kind::Conflict, "DEVICE_CHANGED"), "{error:?}");
    }
    assert!(!reads_zero(device.node(), 0, MIB), "it was not cleared");
    // After a reboot the numbers mean nothing: the name and the size decide, and the new numbers are pinned.
    let mut before_reboot = volume.clone();
    before_reboot.pinned.as_mut().expect("pinned").boot = Some(1);
    let adopted = target.adopt(&device.pool, &before_reboot).expect("adopts");
    assert_ne!(adopted.pinned, volume.pinned);
    let larger = Volume { virtual_size_bytes: 16 * MIB, ..before_reboot };
    assert_eq!(target.adopt(&device.pool, &larger).expect_err("shrunk").reason(), "DEVICE_CHANGED");
    target.delete(&device.pool, &adopted).expect("deletes");
    assert!(reads_zero(device.node(), 0, MIB) && reads_zero(device.node(), 7 * MIB, 8 * MIB));
    target.delete(&device.pool, &adopted).expect("done already is success");
}

#[test]
fn a_link_that_is_moved_while_staged_stops_the_publishing() {
    let device = Device::new(2 * MIB, 8 * MIB);
    let other = Device::new(2 * MIB, 8 * MIB);
    let (patch, name) = (make_patch(2 * MIB, 3), name());
    let plan = VolumePlan::new(&device.pool, &name, &device.kit.golden, &patch, "r");
    let staged = target_for(VolumeFormat::Block).stage(&plan, &Progress::default()).expect("stages");
    std::fs::remove_file(device.link()).expect("remove");
    std::os::unix::fs::symlink(other.node(), device.link()).expect("link");
    assert_eq!(staged.publish().expect_err("moved").reason(), "DEVICE_CHANGED");
    assert!(reads_zero(device.node(), 0, MIB), "the abandoned one does not look bootable");
    assert!(other.is_untouched());
}

#[test]
fn two_claims_of_one_device_exclude_each_other() {
    let device = Device::new(2 * MIB, 4 * MIB);
    let directory = device.kit.directory.path().join("by-id");
    let take = || Claim::take(&directory, &["vm-*".into()], "vm-disk", Access::Write);
    let first = take().expect("claims");
    assert_eq!(take().expect_err("claimed").reason(), "IN_USE");
    assert_eq!(first.node(), device.node());
    drop(first);
    take().expect("free again");
}

#[test]
fn a_volume_whose_device_is_gone_counts_as_deleted() {
    let device = Device::new(2 * MIB, 4 * MIB);
    let volume = device.render(&make_patch(2 * MIB, 1), true).expect("renders");
    std::fs::remove_file(device.link()).expect("remove");
    target_for(VolumeFormat::Block).delete(&device.pool, &volume).expect("nothing to do");
}

/// The device renders `patch` by every zero policy: golden, patch, and zeros everywhere else.
#[test]
fn every_zero_policy_leaves_nothing_of_the_previous_tenant_but_keep_beyond_the_volume() {
    for policy in [ZeroPolicy::Auto, ZeroPolicy::ZeroOut, ZeroPolicy::Discard, ZeroPolicy::Write, ZeroPolicy::Keep] {
        let device = Device::new(16 * MIB, 40 * MIB);
        let patch = make_patch(24 * MIB, 20);
        let options = VolumeOptions { zero_policy: Some(policy), verify: true, ..VolumeOptions::default() };
        let volume = kit::render_as(&device.pool, &device.kit.golden, VolumeFormat::Block, "vm-disk", &patch, &options)
            .unwrap_or_else(|error| panic!("{policy:?}: {error:?}"));
        assert_eq!(volume.options, options);
        assert!(same_bytes(device.node(), &device.kit.reference(&patch), 24 * MIB), "{policy:?}");
        assert_eq!(reads_zero(device.node(), 24 * MIB, 40 * MIB), policy != ZeroPolicy::Keep, "{policy:?}");
        if policy == ZeroPolicy::Keep {
            let mut tail = vec![0; 16 * MIB as usize];
            File::open(device.node()).expect("open").read_exact_at(&mut tail, 24 * MIB).expect("read");
            assert!(tail.iter().all(|byte| *byte == 0xa5), "what is kept is kept whole");
        }
    }
}

#[test]
fn a_device_that_cannot_zero_by_itself_is_refused_before_anything_is_written_when_that_was_asked_for() {
    let device = Device::new(2 * MIB, 8 * MIB);
    let number = cloudletd::host::mounts::block_number(device.node()).expect("a device");
    let limit = PathBuf::from(format!("/sys/dev/block/{}:{}/queue/write_zeroes_max_bytes", number.0, number.1));
    let can = std::fs::read_to_string(&limit).expect("readable").trim() != "0";
    let options = VolumeOptions { zero_policy: Some(ZeroPolicy::ZeroOut), ..VolumeOptions::default() };
    let check = target_for(VolumeFormat::Block).check(&Wanted { options: &options, ..Wanted::new(&device.pool, &name(), 2 * MIB, 2 * MIB) });
    let rendered = kit::render_as(&device.pool, &device.kit.golden, VolumeFormat::Block, "vm-disk", &BlockPatch::new(2 * MIB), &options);
    assert_eq!((check.is_ok(), rendered.is_ok()), (can, can));
    for error in [check.err(), rendered.err()].into_iter().flatten() {
        assert_eq!((error.kind(), error.reason()), (Kind::Unsupported, "ZERO_OUT_UNSUPPORTED"));
        assert!(device.is_untouched());
    }
}

#[test]
fn tiny_and_empty_sources_work_on_devices() {
    for (golden_bytes, size) in [(4096, 4096), (4096, 64 * 1024), (64 * 1024, 64 * 1024)] {
        let device = Device::new(2 * MIB, 3 * MIB);
        let path = device.kit.directory.path().join("tiny.img");
        File::create(&path).expect("create").set_len(golden_bytes).expect("size");
        let golden = cloudletd::target::GoldenDisk { path, size_bytes: golden_bytes, digest: cloudletd::names::Digest::of(b"tiny") };
        let mut patch = BlockPatch::new(size);
        patch.insert(size / 4096 - 1, vec![0x5b; 4096].into());
        let options = VolumeOptions { verify: true, ..VolumeOptions::default() };
        kit::render_as(&device.pool, &golden, VolumeFormat::Block, "vm-disk", &patch, &options).expect("renders");
        assert!(same_bytes(device.node(), &device.kit.reference_of(&golden, &patch), size));
        assert!(reads_zero(device.node(), size, 3 * MIB), "{golden_bytes} {size}");
    }
}
