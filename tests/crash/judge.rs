//! What has to hold whenever a daemon serves, and what volumes hold; other people's tools say so.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
};

use cloudletd::{
    names::Digest,
    proto::{self, VolumeFormat},
};

use crate::{common::leak::loop_devices, rig::Rig};

const MIB: u64 = 1 << 20;

/// Runs a tool; what it printed when it succeeded.
#[track_caller]
fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program} is needed: {error}"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}", output.status);
    text
}

/// A digest over the files of an ext4 filesystem, without times: paths, types, modes, contents. e2fsck has to be content, and qemu-img with its container.
#[track_caller]
pub fn content(rig: &Rig, volume: &proto::Volume) -> Digest {
    Digest::of(lines(rig, volume).join("\n").as_bytes())
}

/// The lines that [`content`] is made of, one per path.
#[track_caller]
pub fn lines(rig: &Rig, volume: &proto::Volume) -> Vec<String> {
    let scratch = rig.path("scratch");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(scratch.join("tree")).expect("directory");
    let raw = match volume.format() {
        VolumeFormat::Qcow2 | VolumeFormat::Qcow2Overlay => {
            tool("qemu-img", &["check", "-q", &volume.path]);
            let raw = scratch.join("raw");
            tool("qemu-img", &["convert", "-q", "-f", "qcow2", "-O", "raw", &volume.path, raw.to_str().expect("text")]);
            raw
        }
        _ => PathBuf::from(&volume.path),
    };
    let raw = raw.to_str().expect("text");
    tool("e2fsck", &["-f", "-n", raw]);
    tool("debugfs", &["-R", &format!("rdump / {}", scratch.join("tree").display()), raw]);
    let mut lines = Vec::new();
    walk(&scratch.join("tree"), &mut lines);
    assert!(lines.iter().any(|line| line.contains("usr/bin/program")), "debugfs gave nothing: {lines:?}");
    let _ = fs::remove_dir_all(&scratch);
    lines
}

fn walk(directory: &Path, lines: &mut Vec<String>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(directory).expect("read").map(|entry| entry.expect("an entry").path()).collect();
    entries.sort();
    for path in entries {
        let meta = fs::symlink_metadata(&path).expect("stat");
        let is_report = path.components().any(|part| part.as_os_str() == ".cloudlet");
        let what = if meta.is_dir() || is_report {
            // The report in the guest says when.
            String::new()
        } else if meta.is_file() {
            Digest::of(&fs::read(&path).expect("read")).hex()
        } else {
            fs::read_link(&path).map(|target| target.display().to_string()).unwrap_or_default()
        };
        let name = path.to_string_lossy().split_once("/tree/").map(|(_, name)| name.to_owned()).unwrap_or_default();
        lines.push(format!("{name} {:o} {what}", meta.mode()));
        if meta.is_dir() {
            walk(&path, lines);
        }
    }
}

fn is_zero(path: &Path, offset: u64, len: u64) -> bool {
    let mut bytes = vec![1; len as usize];
    File::open(path).expect("open").read_exact_at(&mut bytes, offset).expect("read");
    bytes.iter().all(|byte| *byte == 0)
}

/// Volumes and renders as the daemon lists them.
pub struct Seen {
    pub volumes: Vec<proto::Volume>,
    pub renders: Vec<proto::Render>,
}

/// Asks the daemon what there is, and looks whether that, and nothing else, is there. `blank`: the device may be blank though there is a volume on it,
/// because its replacement was interrupted.
#[track_caller]
pub fn look(rig: &Rig, blank: bool) -> Seen {
    let mut clients = rig.clients();
    let (volumes, renders, goldens) = rig.runtime.block_on(async {
        let volumes = clients.volumes.list_volumes(proto::ListVolumesRequest { page_size: 1000, ..Default::default() }).await.expect("a list");
        let renders = clients.renders.list_renders(proto::ListRendersRequest { page_size: 1000, ..Default::default() }).await.expect("a list");
        let goldens = clients.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list");
        (volumes.into_inner().volumes, renders.into_inner().renders, goldens.into_inner().goldens)
    });
    let listed: BTreeSet<String> = volumes.iter().filter(|volume| volume.format() != VolumeFormat::Block).map(|volume| volume.path.clone()).collect();
    let there: BTreeSet<String> =
        fs::read_dir(rig.path("pool")).expect("the pool").map(|entry| entry.expect("an entry").path().display().to_string()).collect();
    assert_eq!(there, listed, "files of the pool, and volumes of the catalogue\n{}", rig.log());
    loops_fit(rig, &volumes);
    device_fits(rig, &volumes, blank);
    store_fits(rig, &goldens);
    let busy: Vec<&proto::Render> =
        renders.iter().filter(|render| matches!(render.state(), proto::RenderState::Queued | proto::RenderState::Running)).collect();
    assert!(busy.is_empty(), "nobody works on {busy:?}");
    journal_is_empty(rig);
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read");
    let state = rig.path("state").display().to_string();
    let below = mounts.lines().filter(|line| line.split(' ').nth(4).is_some_and(|point| point.starts_with(&state) && point != state)).count();
    assert_eq!(below, 0, "{mounts}");
    no_children(rig);
    Seen { volumes, renders }
}

/// The same while there may be entries of the journal: of a render whose failure could not be recorded when the catalogue failed.
#[track_caller]
pub fn look_beside(rig: &Rig) -> Seen {
    let mut clients = rig.clients();
    let request = proto::ListVolumesRequest { page_size: 1000, ..Default::default() };
    let volumes = rig.runtime.block_on(clients.volumes.list_volumes(request)).expect("a list").into_inner().volumes;
    let there = fs::read_dir(rig.path("pool")).expect("the pool").count();
    assert_eq!(there, volumes.iter().filter(|volume| volume.format() != VolumeFormat::Block).count(), "files of the pool\n{}", rig.log());
    loops_fit(rig, &volumes);
    device_fits(rig, &volumes, false);
    Seen { volumes, renders: Vec::new() }
}

fn journal_is_empty(rig: &Rig) {
    let catalogue =
        rusqlite::Connection::open_with_flags(rig.path("state/catalog.sqlite"), rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY).expect("opens");
    let journal: Vec<String> = catalogue
        .prepare("SELECT what || ' ' || subject || ' ' || detail FROM journal")
        .and_then(|mut statement| statement.query_map([], |row| row.get(0))?.collect())
        .expect("the journal is read");
    assert!(journal.is_empty(), "the journal is not empty: {journal:?}\n{}", rig.log());
}

fn loops_fit(rig: &Rig, volumes: &[proto::Volume]) {
    let pool = rig.path("pool");
    let mut attached: BTreeMap<String, String> = BTreeMap::new();
    for (name, backing) in loop_devices() {
        if backing.starts_with(pool.to_str().expect("text")) || backing.starts_with(rig.path("state").to_str().expect("text")) {
            assert!(attached.insert(backing.clone(), format!("/dev/{name}")).is_none(), "{backing} is attached twice");
        }
    }
    let wanted: BTreeMap<String, String> =
        volumes.iter().filter(|volume| volume.format() == VolumeFormat::Loop).map(|volume| (volume.path.clone(), volume.device.clone())).collect();
    assert_eq!(attached, wanted, "loop devices, and volumes on them\n{}", rig.log());
}

fn device_fits(rig: &Rig, volumes: &[proto::Volume], blank: bool) {
    let is_blank = is_zero(rig.device(), 0, MIB) && is_zero(rig.device(), 39 * MIB, MIB);
    let has_row = volumes.iter().any(|volume| volume.format() == VolumeFormat::Block);
    if !has_row {
        assert!(is_blank, "the device belongs to nobody and is not blank\n{}", rig.log());
    } else {
        assert!(blank || !is_blank, "the device has a volume and is blank\n{}", rig.log());
    }
}

fn store_fits(rig: &Rig, goldens: &[proto::Golden]) {
    let names = |path: &str| -> BTreeSet<String> {
        fs::read_dir(rig.path(path)).expect("a directory").map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    };
    let left: Vec<String> = names("state/tmp").into_iter().filter(|name| !name.starts_with("partial-")).collect();
    assert!(left.is_empty(), "temporary files: {left:?}");
    let keys: BTreeSet<String> = goldens.iter().map(|golden| golden.key.clone()).collect();
    assert_eq!(names("state/goldens"), keys, "directories of goldens, and their rows\n{}", rig.log());
    for golden in goldens {
        let disk = rig.path("state/goldens").join(&golden.key).join("disk.raw");
        let digest = cloudletd::store::digest::of_disk(&disk).expect("hashed").to_string();
        assert_eq!(digest, golden.digest, "the golden's content");
        assert!(rig.golden.is_empty() || rig.golden == digest, "the golden is not the one that was built first");
    }
    for name in names("state/blobs") {
        assert_eq!(Digest::of(&fs::read(rig.path("state/blobs").join(&name)).expect("read")).hex(), name, "a tarball's content");
    }
}

/// Every process that knows the state directory is the daemon, or its keeper.
fn no_children(rig: &Rig) {
    let state = rig.path("cloudletd.toml").display().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("proc").flatten() {
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.contains(&state) && !line.contains("\0keeper\0") {
            found.push(line);
        }
    }
    assert_eq!(found.len(), 1, "one daemon: {found:?}");
}
