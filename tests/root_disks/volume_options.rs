//! What can be chosen about a volume, judged by qemu-img, losetup and the kernel. Needs root and qemu-img, qemu-io, losetup, mkfs.xfs.

use std::{os::unix::fs::MetadataExt, path::Path};

use crate::kit::{self, Kit, MIB, Noise, judge, make_patch, same_bytes, text, tool};
use cloudletd::{
    error::Kind,
    fs::patch::BlockPatch,
    host::loops::{self, LoopDevice, Options},
    names::Digest,
    target::{BackingPath, Compression, DirectIo, GoldenDisk, Preallocation, VolumeFormat, VolumeOptions, Wanted, target_for},
    units::Bytes,
};
use proptest::prelude::*;

const OVERLAY: VolumeFormat = VolumeFormat::Qcow2Overlay;

/// Every geometry that can be asked for, and the default.
fn geometries() -> Vec<VolumeOptions> {
    let mut all = vec![VolumeOptions::default()];
    for bits in 12..=21 {
        for extended_l2 in [None, Some(false), Some(true)] {
            if extended_l2 != Some(true) || bits >= 14 {
                all.push(VolumeOptions { cluster_size: Some(Bytes(1 << bits)), extended_l2, ..VolumeOptions::default() });
            }
        }
    }
    all
}

/// What qemu-img says about an image, as one line without blanks.
fn info(path: &Path) -> String {
    tool("qemu-img", &["info", "--output=json", text(path)]).split_whitespace().collect()
}

#[test]
fn overlays_and_standalone_images_have_the_geometry_that_was_asked_for() {
    let kit = Kit::new(12 * MIB);
    let patch = make_patch(13 * MIB + 4096, 30);
    for (index, options) in geometries().into_iter().enumerate() {
        for format in [OVERLAY, VolumeFormat::Qcow2] {
            let options = VolumeOptions { verify: true, lazy_refcounts: (index % 2 == 0).then_some(true), ..options.clone() };
            let volume = kit.render_with(format, &format!("{}-{index}", format.name()), &patch, &options).expect("renders");
            judge(&kit, &volume.path, format, &patch);
            let asked = options.cluster_size.map(|size| size.0);
            let extended = options.extended_l2.unwrap_or(format == OVERLAY && asked.is_none_or(|size| size >= 16384));
            let said = info(&volume.path);
            let want = [
                format!("\"cluster-size\":{},", asked.unwrap_or(if extended { 131072 } else { 65536 })),
                format!("\"extended-l2\":{extended}"),
                format!("\"lazy-refcounts\":{}", index % 2 == 0),
            ];
            assert!(want.iter().all(|part| said.contains(part)), "{want:?} {said}");
            assert_eq!(volume.options, options);
            std::fs::remove_file(&volume.path).expect("remove");
        }
    }
}

#[test]
fn every_geometry_bears_a_guests_writes_and_a_later_growth() {
    let kit = Kit::new(8 * MIB);
    let patch = make_patch(8 * MIB + 4096, 25);
    let mut choices: Vec<(VolumeFormat, VolumeOptions)> = Vec::new();
    for (bits, extended_l2) in [(12, None), (14, Some(true)), (16, Some(false)), (17, None), (21, Some(true))] {
        let options = VolumeOptions { cluster_size: Some(Bytes(1 << bits)), extended_l2, ..VolumeOptions::default() };
        choices.push((OVERLAY, VolumeOptions { backing_path: Some(BackingPath::Relative), lazy_refcounts: Some(true), ..options.clone() }));
        choices.push((VolumeFormat::Qcow2, options.clone()));
        choices.push((VolumeFormat::Qcow2, VolumeOptions { compression: Some(Compression::Zlib), ..options.clone() }));
        choices.push((VolumeFormat::Qcow2, VolumeOptions { compression: Some(Compression::Zstd), ..options }));
    }
    for (index, (format, options)) in choices.into_iter().enumerate() {
        let volume = kit.render_with(format, &format!("grown-{index}"), &patch, &options).expect("renders");
        let reference = kit.reference(&patch);
        for (path, kind) in [(&volume.path, "qcow2"), (&reference, "raw")] {
            tool("qemu-img", &["resize", "-q", "-f", kind, text(path), "40M"]);
            let commands = ["write -P 0x11 100k 300k", "write -P 0x22 3333k 5k", "write -z 4M 1M", "write -P 0x33 8380k 40k", "write -P 0x44 39M 1M"];
            let arguments: Vec<&str> =
                ["-f", kind].into_iter().chain(commands.iter().flat_map(|command| ["-c", *command])).chain([text(path)]).collect();
            tool("qemu-io", &arguments);
        }
        let said = tool("qemu-img", &["check", "-f", "qcow2", text(&volume.path)]);
        assert!(said.contains("No errors"), "{options:?}: {said}");
        tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&volume.path), text(&reference)]);
    }
}

#[test]
fn a_relative_backing_path_moves_with_pool_and_golden() {
    let kit = Kit::new(4 * MIB);
    let patch = make_patch(6 * MIB, 9);
    let options = VolumeOptions { backing_path: Some(BackingPath::Relative), verify: true, ..VolumeOptions::default() };
    let volume = kit.render_with(OVERLAY, "moves", &patch, &options).expect("renders");
    judge(&kit, &volume.path, OVERLAY, &patch);
    assert!(info(&volume.path).contains("\"backing-filename\":\"../golden.img\""), "{}", info(&volume.path));
    assert_eq!(volume.backing.as_deref(), Some(kit.golden.path.as_path()), "the daemon goes on knowing it by its absolute path");
    let moved = kit.directory.path().join("moved");
    std::fs::create_dir(&moved).expect("directory");
    let reference = kit.reference(&patch);
    std::fs::rename(&kit.golden.path, moved.join("golden.img")).expect("rename");
    std::fs::rename(kit.pool_path(), moved.join("pool")).expect("rename");
    tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&moved.join("pool/moves.qcow2")), text(&reference)]);
}

/// Half of it text-like, half noise: as a root filesystem of programs and compressed archives.
fn mixed_golden(kit: &Kit) -> GoldenDisk {
    use std::os::unix::fs::FileExt;
    let path = kit.directory.path().join("mixed.img");
    let file = std::fs::File::create(&path).expect("create");
    file.set_len(24 * MIB).expect("size");
    let mut noise = Noise(99);
    let words: Vec<Vec<u8>> = (0..200).map(|index| noise.bytes(3 + index % 9)).collect();
    for part in 0..20u64 {
        let bytes = if part % 2 == 0 {
            noise.bytes(600_000)
        } else {
            let mut bytes = Vec::new();
            while bytes.len() < 600_000 {
                bytes.extend_from_slice(&words[(noise.next() % 200) as usize]);
            }
            bytes
        };
        file.write_all_at(&bytes, part * MIB).expect("write");
    }
    GoldenDisk { path, size_bytes: 24 * MIB, digest: Digest::of(b"mixed") }
}

#[test]
fn compressed_images_are_small_repeatable_and_read_by_qemu() {
    let mut kit = Kit::new(2 * MIB);
    kit.golden = mixed_golden(&kit);
    let patch = make_patch(30 * MIB, 50);
    let plain = kit.render(VolumeFormat::Qcow2, "plain", &patch).expect("renders");
    for (compression, name) in [(Compression::Zlib, "zlib"), (Compression::Zstd, "zstd")] {
        for extended_l2 in [None, Some(true)] {
            let options = VolumeOptions { compression: Some(compression), extended_l2, verify: true, ..VolumeOptions::default() };
            let label = format!("{name}-{}", extended_l2.is_some());
            let begun = std::time::Instant::now();
            let volume = kit.render_with(VolumeFormat::Qcow2, &label, &patch, &options).expect("renders");
            let took = begun.elapsed();
            judge(&kit, &volume.path, VolumeFormat::Qcow2, &patch);
            assert!(info(&volume.path).contains(&format!("\"compression-type\":\"{name}\"")), "{}", info(&volume.path));
            let again = kit.render_with(VolumeFormat::Qcow2, &format!("{label}-again"), &patch, &options).expect("renders");
            assert_eq!(std::fs::read(&volume.path).expect("read"), std::fs::read(&again.path).expect("read"), "{label}");
            let converted = kit.directory.path().join("converted.qcow2");
            let begun = std::time::Instant::now();
            let cluster = if extended_l2.is_some() { "compression_type=NAME,extended_l2=on,cluster_size=128k" } else { "compression_type=NAME" };
            let reference = kit.reference(&patch);
            tool(
                "qemu-img",
                &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &cluster.replace("NAME", name), text(&reference), text(&converted)],
            );
            let (ours, theirs) = (std::fs::metadata(&volume.path).expect("stat").len(), std::fs::metadata(&converted).expect("stat").len());
            eprintln!("{label}: {ours} bytes in {took:?} with verification; qemu-img convert -c: {theirs} in {:?}", begun.elapsed());
            assert!(ours < plain.allocated_size_bytes * 8 / 10, "{label}: {ours} of {}", plain.allocated_size_bytes);
            assert!(ours <= theirs + theirs / 20 + 512 * 1024, "{label}: {ours}, qemu-img {theirs}");
        }
    }
}

#[test]
fn preallocated_files_have_all_their_space() {
    let kit = Kit::new(16 * MIB);
    let patch = make_patch(24 * MIB, 12);
    let name = "x".parse().expect("valid");
    for (preallocation, least) in [(Preallocation::Sparse, 0), (Preallocation::Falloc, 24 * MIB), (Preallocation::Full, 24 * MIB)] {
        let options = VolumeOptions { preallocation: Some(preallocation), verify: true, ..VolumeOptions::default() };
        let volume = kit.render_with(VolumeFormat::Raw, &format!("{preallocation:?}").to_lowercase(), &patch, &options).expect("renders");
        judge(&kit, &volume.path, VolumeFormat::Raw, &patch);
        let allocated = std::fs::metadata(&volume.path).expect("stat").blocks() * 512;
        assert!(allocated >= least && (least > 0 || allocated < 20 * MIB), "{preallocation:?}: {allocated}");
        let map = tool("filefrag", &["-v", text(&volume.path)]);
        assert_eq!(map.contains("unwritten"), preallocation == Preallocation::Falloc, "{map}");
        // What will be allocated is asked of the pool before.
        let wanted = Wanted { options: &options, ..Wanted::new(&kit.pool, &name, 1 << 50, 4096) };
        assert_eq!(target_for(VolumeFormat::Raw).check(&wanted).is_err(), least > 0);
    }
}

#[test]
fn preallocated_files_share_nothing_on_a_reflinking_filesystem() {
    let kit = Kit::new(4 * MIB);
    let xfs = kit::Mounted::new(&kit, "xfs", &["mkfs.xfs", "-q", "-m", "reflink=1"], 400 * MIB);
    let inner = Kit::below(&xfs.point, 16 * MIB);
    let patch = make_patch(24 * MIB, 12);
    for preallocation in [Preallocation::Sparse, Preallocation::Falloc, Preallocation::Full] {
        let options = VolumeOptions { preallocation: Some(preallocation), verify: true, ..VolumeOptions::default() };
        let volume = inner.render_with(VolumeFormat::Raw, &format!("{preallocation:?}").to_lowercase(), &patch, &options).expect("renders");
        judge(&inner, &volume.path, VolumeFormat::Raw, &patch);
        let map = tool("filefrag", &["-v", text(&volume.path)]);
        assert_eq!(map.contains("shared"), preallocation == Preallocation::Sparse, "{preallocation:?}: {map}");
    }
    for format in [OVERLAY, VolumeFormat::Qcow2] {
        let options = VolumeOptions { extended_l2: Some(true), cluster_size: Some(Bytes(1 << 18)), verify: true, ..VolumeOptions::default() };
        let volume = inner.render_with(format, format.name(), &patch, &options).expect("renders");
        judge(&inner, &volume.path, format, &patch);
    }
}

#[test]
fn loop_devices_are_attached_as_chosen_and_attached_again_in_the_same_way() {
    let kit = Kit::new(4 * MIB);
    let patch = make_patch(4 * MIB, 5);
    let target = target_for(VolumeFormat::Loop);
    let shown = |device: &Path| {
        let row = tool("losetup", &["--noheadings", "--raw", "--output", "RO,PARTSCAN,DIO", text(device)]);
        row.split_whitespace().map(|word| word == "1").collect::<Vec<bool>>()
    };
    let cases = [
        (None, None, None, [false, true, true]),
        (Some(true), Some(false), Some(DirectIo::Off), [true, false, false]),
        (Some(false), Some(true), Some(DirectIo::On), [false, true, true]),
    ];
    for (index, (read_only, partition_scan, direct_io, want)) in cases.into_iter().enumerate() {
        let options = VolumeOptions { read_only, partition_scan, direct_io, verify: true, ..VolumeOptions::default() };
        let volume = kit.render_with(VolumeFormat::Loop, &format!("loop-{index}"), &patch, &options).expect("renders");
        assert_eq!(shown(&volume.device), want, "{options:?}");
        assert!(same_bytes(&volume.device, &kit.reference(&patch), 4 * MIB));
        loops::detach(&volume.device).expect("detach, as a reboot would");
        let adopted = target.adopt(&kit.pool, &volume).expect("adopts");
        assert_eq!(shown(&adopted.device), want, "{options:?} again");
        target.delete(&kit.pool, &adopted).expect("deletes");
    }
}

/// tmpfs has no direct I/O before Linux 6.6; where it has, a filesystem whose blocks are larger than the device's would be needed.
#[test]
fn direct_io_that_is_insisted_on_is_refused_where_it_is_not_to_be_had() {
    let kit = Kit::new(2 * MIB);
    let point = kit.directory.path().join("tmpfs");
    std::fs::create_dir(&point).expect("mount point");
    tool("mount", &["-t", "tmpfs", "-o", "size=64m", "none", text(&point)]);
    let outcome = std::panic::catch_unwind(|| {
        let inner = Kit::below(&point, 2 * MIB);
        let probe = point.join("probe");
        std::fs::write(&probe, vec![0; 4096]).expect("write");
        let open = std::fs::File::options().read(true).write(true).open(&probe).expect("open");
        let device = LoopDevice::attach(&open, &probe, &Options { direct_io: true, ..Options::guarded() }).expect("attach");
        let can = device.is_direct().expect("asks");
        device.close().expect("close");
        let patch = make_patch(2 * MIB, 3);
        let options = VolumeOptions { direct_io: Some(DirectIo::On), ..VolumeOptions::default() };
        match inner.render_with(VolumeFormat::Loop, "insists", &patch, &options) {
            Ok(volume) => {
                assert!(can, "the kernel can't");
                target_for(VolumeFormat::Loop).delete(&inner.pool, &volume).expect("deletes");
            }
            Err(error) => {
                assert!(!can, "{error:?}");
                assert_eq!((error.kind(), error.reason()), (Kind::Unsupported, "DIRECT_IO_UNSUPPORTED"));
            }
        }
        assert_eq!(inner.pool_content(), [""; 0]);
        let auto = inner.render(VolumeFormat::Loop, "auto", &patch).expect("renders");
        target_for(VolumeFormat::Loop).delete(&inner.pool, &auto).expect("deletes");
    });
    tool("umount", &[text(&point)]);
    outcome.expect("as above");
}

#[test]
fn tiny_and_empty_sources_work_in_every_file_format() {
    use std::os::unix::fs::FileExt;
    let base = Kit::new(2 * MIB);
    for (case, golden_bytes, size, blocks) in [
        ("hole", 4096u64, 4096u64, 0u64),
        ("hole-larger", 4096, 1 << 16, 0),
        ("hole-patched", 4096, 1 << 16, 3),
        ("tiny", 1 << 16, 1 << 16, 2),
        ("one", 4096, 4096, 1),
    ] {
        let path = base.directory.path().join(format!("{case}.img"));
        let file = std::fs::File::create(&path).expect("create");
        file.set_len(golden_bytes).expect("size");
        if case == "tiny" {
            file.write_all_at(&[0x77; 5000], 8192).expect("write");
        }
        let golden = GoldenDisk { path, size_bytes: golden_bytes, digest: Digest::of(case.as_bytes()) };
        let mut patch = BlockPatch::new(size);
        let step = (size / 4096 - 1) / blocks.max(2).saturating_sub(1);
        (0..blocks).for_each(|index| patch.insert(index * step, vec![index as u8 + 1; 4096].into()));
        let mut choices: Vec<(VolumeFormat, VolumeOptions)> = Vec::new();
        for compression in [Compression::None, Compression::Zlib, Compression::Zstd] {
            choices.push((VolumeFormat::Qcow2, VolumeOptions { compression: Some(compression), ..VolumeOptions::default() }));
        }
        choices.push((VolumeFormat::Qcow2, VolumeOptions { extended_l2: Some(true), ..VolumeOptions::default() }));
        choices.push((OVERLAY, VolumeOptions::default()));
        for preallocation in [Preallocation::Sparse, Preallocation::Falloc, Preallocation::Full] {
            choices.push((VolumeFormat::Raw, VolumeOptions { preallocation: Some(preallocation), ..VolumeOptions::default() }));
        }
        choices.push((VolumeFormat::Loop, VolumeOptions::default()));
        let reference = base.reference_of(&golden, &patch);
        for (index, (format, options)) in choices.into_iter().enumerate() {
            let options = VolumeOptions { verify: true, ..options };
            let volume = kit::render_as(&base.pool, &golden, format, &format!("{case}-{index}"), &patch, &options)
                .unwrap_or_else(|error| panic!("{case} {format:?} {options:?}: {error:?}"));
            if matches!(format, OVERLAY | VolumeFormat::Qcow2) {
                assert!(tool("qemu-img", &["check", "-f", "qcow2", text(&volume.path)]).contains("No errors"), "{case}");
                tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&volume.path), text(&reference)]);
            } else {
                assert!(same_bytes(&volume.device, &reference, size), "{case} {format:?}");
            }
            if format == VolumeFormat::Loop {
                loops::detach(&volume.device).expect("detaches");
            }
            std::fs::remove_file(&volume.path).expect("remove");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_patches_are_right_in_every_geometry_and_compression(
        blocks in prop::collection::btree_map(0u64..4000, any::<u64>(), 0..100),
        extra in 0u64..20_000,
        choice in 0usize..29,
        compression in prop::sample::select(vec![None, Some(Compression::Zlib), Some(Compression::Zstd)]),
        lazy_refcounts in prop::option::of(any::<bool>()),
    ) {
        let kit = Kit::new(6 * MIB);
        let mut patch = BlockPatch::new((6 * MIB + extra * 4096).max(4000 * 4096));
        for (number, seed) in blocks {
            // A third of them compresses well.
            let data = if seed % 3 == 0 { vec![seed as u8; 4096] } else { Noise(seed | 1).bytes(4096) };
            patch.insert(number, data.into());
        }
        let options = VolumeOptions { lazy_refcounts, verify: true, ..geometries().swap_remove(choice) };
        let standalone = VolumeOptions { compression, ..options.clone() };
        for (format, options) in [(OVERLAY, options), (VolumeFormat::Qcow2, standalone)] {
            let volume = kit.render_with(format, format.name(), &patch, &options).expect("renders");
            judge(&kit, &volume.path, format, &patch);
        }
    }
}
