//! Storage that fails while the daemon works: full, read-only, with I/O errors and short writes (an LD_PRELOAD library, tests/crash/faulty.c). Each failure is told
//! clearly, leaves nothing half written, and is over when its cause is.

use std::{fs, path::Path, process::Command};

use cloudletd::proto::{self, VolumeFormat};

use crate::{
    judge,
    rig::Rig,
    rounds::{self, Kind},
};

const EIO: u32 = libc::EIO as u32;
const ENOSPC: u32 = libc::ENOSPC as u32;
const ENXIO: u32 = libc::ENXIO as u32;
const ENODEV: u32 = libc::ENODEV as u32;
/// What fails, and how; 0 is a short write.
const FAULTS: [(&str, u32); 4] = [("write", EIO), ("write", ENOSPC), ("write", 0), ("sync", EIO)];

#[track_caller]
fn tool(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program} is needed: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A tmpfs that is unmounted at the end.
struct Tiny(std::path::PathBuf);

impl Tiny {
    fn mount(path: &Path, kib: u32) -> Tiny {
        fs::create_dir_all(path).expect("a directory");
        tool("mount", &["-t", "tmpfs", "-o", &format!("size={kib}k,mode=0711"), "tmpfs", path.to_str().expect("text")]);
        Tiny(path.to_owned())
    }

    fn remount(&self, options: &str) {
        tool("mount", &["-o", &format!("remount,{options}"), self.0.to_str().expect("text")]);
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// A render that failed leaves no volume of its own; the reason is one that a caller can read.
#[track_caller]
fn failed(rig: &Rig, answer: Result<Option<proto::Render>, tonic::Status>, context: &str) -> bool {
    let message = match answer {
        Ok(Some(render)) if render.state() == proto::RenderState::Succeeded => return false,
        Ok(render) => render.and_then(|render| render.error).map(|error| error.message).unwrap_or_default(),
        Err(status) => status.message().to_owned(),
    };
    assert!(message.len() > 20, "{context}: {message:?} says nothing\n{}", rig.log());
    true
}

#[test]
fn a_store_that_is_too_small_refuses_or_fails_cleanly_at_every_size_and_works_when_it_has_grown() {
    let mut refused = 0;
    for kib in (1024..=2048).step_by(128) {
        let mut tiny = None;
        let mut rig = Rig::with(|root| tiny = Some(Tiny::mount(&root.join("state"), kib)), &[]);
        let tiny = tiny.expect("mounted");
        rig.start(None);
        rig.catalogue_image();
        let operation = rounds::render(&rig, Kind::Render(VolumeFormat::Raw), "key", "two");
        let answer = rig.runtime.block_on(rounds::ask(rig.clients(), &operation));
        let context = format!("a store of {kib} KiB");
        if failed(&rig, answer, &context) {
            refused += 1;
            // Without the journal: an entry that could not be written is not there.
            let left: Vec<_> = fs::read_dir(rig.path("pool")).expect("the pool").collect();
            assert!(left.is_empty(), "{context}: {left:?}");
            tiny.remount("size=64m");
            rounds::demand(&rig, &operation);
        }
        judge::look(&rig, false);
        // A store that is full to the last block can't write down what it is to forget.
        tiny.remount("size=64m");
        rounds::demand(&rig, &rounds::delete(VolumeFormat::Raw));
        rig.kill();
        drop(tiny);
    }
    assert!(refused > 0, "the smallest store was enough");
}

#[test]
fn a_pool_that_is_full_or_read_only_refuses_cleanly_and_works_afterwards() {
    for format in [VolumeFormat::Qcow2Overlay, VolumeFormat::Qcow2, VolumeFormat::Raw, VolumeFormat::Loop] {
        let mut tiny = None;
        let mut rig = Rig::with(|root| tiny = Some(Tiny::mount(&root.join("pool"), 2048)), &[]);
        let tiny = tiny.expect("mounted");
        rig.start(None);
        rig.catalogue_image();
        let operation = rounds::render(&rig, Kind::Render(format), "key", "two");
        for (broken, repaired) in [("size=2m", "size=64m"), ("ro", "rw")] {
            tiny.remount(broken);
            let answer = rig.runtime.block_on(rounds::ask(rig.clients(), &operation));
            let context = format!("{format:?} in a pool with {broken}");
            assert!(failed(&rig, answer, &context), "{context}: it succeeded");
            judge::look(&rig, false);
            tiny.remount(repaired);
        }
        rounds::demand(&rig, &operation);
        judge::look(&rig, false);
        rounds::demand(&rig, &rounds::delete(format));
        rig.kill();
        drop(tiny);
    }
}

/// tests/crash/faulty.c as a library.
pub fn faulty() -> tempfile::NamedTempFile {
    let library = tempfile::Builder::new().prefix("cloudletd-faulty-").suffix(".so").tempfile().expect("a file");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/crash/faulty.c");
    tool("cc", &["-shared", "-fPIC", "-O1", "-o", library.path().to_str().expect("text"), source.to_str().expect("text"), "-ldl"]);
    library
}

/// Renders to `format` with the n-th write or flush below `prefix` failing, for each n until none fails any more.
fn every_failure(prefix: &str, kind: Kind, step: usize, faults: &[(&str, u32)]) {
    let library = faulty();
    let mut rig = Rig::with(|_| (), &[]);
    let prefix = if prefix == "device" { rig.device().to_owned() } else { rig.path(prefix) };
    let switch = rig.path("switch");
    rig.environment = vec![
        ("LD_PRELOAD".into(), library.path().to_str().expect("text").into()),
        ("FAULTY_PREFIX".into(), prefix.to_str().expect("text").into()),
        ("FAULTY_SWITCH".into(), switch.to_str().expect("text").into()),
    ];
    rig.start(None);
    rig.catalogue_image();
    // The golden is warm, unless it is what is tried.
    let warm = rounds::render(&rig, Kind::Render(VolumeFormat::Qcow2Overlay), "warm", "one");
    rounds::demand(&rig, &warm);
    rounds::demand(&rig, &rounds::delete(VolumeFormat::Qcow2Overlay));
    let mut failures = 0;
    for (what, code) in faults.iter().copied() {
        let mut nth = 1;
        loop {
            let context = format!("{} below {}: {what} {nth} fails with {code}", kind.name(), prefix.display());
            if kind == Kind::Cold {
                rounds::demand(&rig, &rounds::collect());
            }
            let operation = rounds::render(&rig, kind, &format!("{what}-{code}-{nth}"), "two");
            fs::write(&switch, format!("{what} {nth} {code}")).expect("broken");
            let answer = rig.runtime.block_on(rounds::ask(rig.clients(), &operation));
            fs::remove_file(&switch).expect("repaired");
            let has_failed = failed(&rig, answer, &context);
            if has_failed {
                failures += 1;
                let seen = judge::look_beside(&rig);
                assert!(seen.volumes.is_empty(), "{context}: {:?}\n{}", seen.volumes, rig.log());
            }
            rounds::demand(&rig, &operation);
            let seen = judge::look(&rig, false);
            rounds::expect_content(&rig, kind, "two", &seen, &context);
            rounds::demand(&rig, &rounds::delete(kind.format()));
            judge::look(&rig, false);
            // A short write is gone on with; the first without an effect ends the others.
            if (!has_failed && code != 0) || nth > 12 || (code == 0 && nth >= 3) {
                break;
            }
            nth += step;
        }
    }
    assert!(failures > 0, "nothing ever failed below {}", prefix.display());
    rig.kill();
}

#[test]
fn io_errors_full_disks_and_short_writes_of_pools_leave_nothing_and_are_over_when_repaired() {
    for format in [VolumeFormat::Qcow2Overlay, VolumeFormat::Qcow2, VolumeFormat::Raw, VolumeFormat::Loop] {
        every_failure("pool", Kind::Render(format), 1, &FAULTS);
    }
}

#[test]
fn io_errors_short_writes_and_the_loss_of_a_device_leave_it_blank_and_are_over_when_repaired() {
    // A device that is taken away while it is open answers ENXIO, or ENODEV.
    let faults = [&FAULTS[..], &[("write", ENXIO), ("sync", ENODEV)]].concat();
    every_failure("device", Kind::Render(VolumeFormat::Block), 1, &faults);
}

#[test]
fn io_errors_full_disks_and_short_writes_of_fetch_and_build_leave_nothing_and_are_over_when_repaired() {
    every_failure("state/tmp", Kind::Cold, 3, &FAULTS);
}

#[test]
fn io_errors_of_the_catalogue_lose_no_volume_and_are_over_when_repaired() {
    every_failure("state/catalog.sqlite", Kind::Render(VolumeFormat::Qcow2), 1, &FAULTS);
}
