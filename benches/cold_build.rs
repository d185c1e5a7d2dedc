//! Golden disks built and edited in this process, by the functions the daemon calls, with a clock around them. `scripts/bench.sh` runs it beside its
//! peers; by hand: `cargo bench --bench cold_build -- build TARBALL DIRECTORY`.
//!
//! Every command prints one JSON object per run; times are milliseconds.

use std::{
    error::Error,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use clap::{CommandFactory, Parser, Subcommand};
use cloudletd::{
    config::worker::{self as config, Confine},
    disk::Layout,
    ext4::Ext4,
    fs::{
        Filesystem, FsKind, Profile, Region,
        edit::{Attrs, Edit, EditOp, EditRequest},
    },
    guest::watch::Watch,
    names::{Digest, GuestPath},
    progress::Progress,
    render::golden::build_disk,
    store::records::{GoldenBoot, GoldenSpec},
    tree::{
        Entry, TreeSink, archive,
        collect::Collector,
        decompress::{self, Compression},
    },
    units::{Bytes, PATCH_BLOCK, Timestamp},
    worker::Launcher,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Parser)]
struct Arguments {
    /// Nothing: print the help, which is what a plain `cargo bench` gets.
    #[command(subcommand)]
    command: Option<Command>,
    /// How often.
    #[arg(long, global = true, default_value_t = 1)]
    runs: u32,
    /// Cargo gives it to every benchmark.
    #[arg(long, global = true, hide = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Tarball to durable golden disk: decompress, read, facts, ext4, digest, flush; everything the daemon does but rename and row.
    Build {
        tarball: PathBuf,
        /// Where the disk is made; on the filesystem to be measured.
        directory: PathBuf,
        #[arg(long, default_value = "4 GiB", value_parser = size)]
        size: Bytes,
        /// The daemon's program: foreign bytes are read by a confined worker, as the daemon has it. Without, in this process.
        #[arg(long)]
        worker: Option<PathBuf>,
        /// Leave the disk of the last run behind, as DIRECTORY/golden/disk.raw.
        #[arg(long)]
        keep: bool,
    },
    /// Parts of it alone: decompressing, reading the archive, collecting facts.
    Stages { tarball: PathBuf },
    /// Eleven files of a raw ext4 image, in place and durable.
    Edit { image: PathBuf },
}

fn size(text: &str) -> std::result::Result<Bytes, String> {
    text.parse()
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let Some(command) = &arguments.command else { return Ok(Arguments::command().print_help()?) };
    for run in 0..arguments.runs {
        let last = run + 1 == arguments.runs;
        let line = match command {
            Command::Build { tarball, directory, size, worker, keep } => build(tarball, directory, *size, worker.as_deref(), *keep && last)?,
            Command::Stages { tarball } => stages(tarball)?,
            Command::Edit { image } => edit(image)?,
        };
        println!("{line}");
    }
    Ok(())
}

fn ms(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e6).round() / 1e3
}

fn compression(tarball: &Path) -> Result<Compression> {
    let name = tarball.file_name().unwrap_or_default().to_string_lossy();
    Ok(Compression::from_file_name(&name).ok_or_else(|| format!("{name} does not say how it is compressed"))?)
}

fn build(tarball: &Path, directory: &Path, size: Bytes, worker: Option<&Path>, keep: bool) -> Result<serde_json::Value> {
    let spec = GoldenSpec {
        rootfs: Digest::of(tarball.as_os_str().as_encoded_bytes()),
        prefix: None,
        volatile: Vec::new(),
        templates: Vec::new(),
        filesystem: FsKind::Ext4,
        profile: Profile::Modern,
        label: "root".into(),
        bytes_per_inode: 16384,
        layout: Layout::Bare,
        size_bytes: size.0,
        arch: "x86_64".into(),
        boot: GoldenBoot::default(),
    };
    let settings = config::Worker { confine: if worker.is_some() { Confine::Required } else { Confine::Off }, ..config::Worker::default() };
    let launcher = worker.iter().fold(Launcher::new(&settings), |launcher, program| launcher.with_program(*program));
    let pacer = Arc::new(cloudletd::target::Pacer::default());
    let golden = directory.join("golden");
    if golden.exists() {
        fs::remove_dir_all(&golden)?;
    }
    fs::create_dir(&golden)?;
    let begun = Instant::now();
    let built = build_disk(&golden, tarball, Some(compression(tarball)?), &spec, &launcher, &pacer, &Progress::default())?;
    let total = ms(begun);
    if !keep {
        fs::remove_dir_all(&golden)?;
    }
    Ok(serde_json::json!({"ms": total, "inodes": built.filesystem.inodes, "allocated_bytes": built.allocated, "digest": built.digest.to_string()}))
}

/// Reads everything and keeps nothing.
struct Nothing;

impl TreeSink for Nothing {
    fn entry(&mut self, _entry: &Entry, data: &mut dyn Read) -> cloudletd::error::Result<()> {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(1..) = data.read(&mut buffer) {}
        Ok(())
    }
}

fn stages(tarball: &Path) -> Result<serde_json::Value> {
    let open = || -> Result<Box<dyn Read + Send>> { Ok(decompress::open(Box::new(File::open(tarball)?), compression(tarball)?)?) };
    let limits = archive::Limits::default();
    let begun = Instant::now();
    io::copy(&mut open()?, &mut io::sink())?;
    let decompress = ms(begun);
    let begun = Instant::now();
    archive::read(&mut *open()?, &limits, &|_| false, &mut Nothing, &Progress::default())?;
    let read = ms(begun);
    let begun = Instant::now();
    let (mut nothing, watch) = (Nothing, Watch::new(&[]));
    let mut collector = Collector::new(&mut nothing, &watch);
    archive::read(&mut *open()?, &limits, &|_| false, &mut collector, &Progress::default())?;
    Ok(serde_json::json!({"decompress_ms": decompress, "and_read_ms": read, "and_facts_ms": ms(begun)}))
}

/// What an injection into Debian writes.
const FILES: [(&str, usize, u16); 11] = [
    ("/etc/hostname", 12, 0o644),
    ("/etc/hosts", 230, 0o644),
    ("/etc/machine-id", 33, 0o444),
    ("/etc/fstab", 110, 0o644),
    ("/etc/resolv.conf", 80, 0o644),
    ("/etc/network/interfaces", 600, 0o644),
    ("/root/.ssh/authorized_keys", 400, 0o600),
    ("/etc/ssh/ssh_host_ed25519_key", 411, 0o600),
    ("/etc/ssh/ssh_host_ed25519_key.pub", 100, 0o644),
    ("/etc/ssh/ssh_host_ecdsa_key", 513, 0o600),
    ("/etc/ssh/ssh_host_ecdsa_key.pub", 180, 0o644),
];

fn edit(image: &Path) -> Result<serde_json::Value> {
    let edits = FILES.map(|(path, len, mode)| {
        let path = GuestPath::new(path).map_err(|error| format!("{path}: {error}"))?;
        let op = EditOp::WriteFile { content: vec![b'x'; len], attrs: Attrs::root(mode) };
        Ok(Edit { path, op, why: "benchmark".into(), secret: false })
    });
    let edits = edits.into_iter().collect::<Result<Vec<Edit>>>()?;
    let request = EditRequest { edits, now: Timestamp { secs: 1_700_000_000, nanos: 0 }, ..EditRequest::default() };
    let begun = Instant::now();
    let file = Arc::new(File::options().read(true).write(true).open(image)?);
    let region = Region { file: Arc::clone(&file), offset: 0, len: file.metadata()?.len() };
    let patch = Ext4.edit(region, &request, &Progress::default())?;
    let computed = ms(begun);
    for (number, block) in patch.iter() {
        file.write_all_at(block, number * PATCH_BLOCK)?;
    }
    file.sync_all()?;
    Ok(serde_json::json!({"edit_ms": computed, "durable_ms": ms(begun), "blocks": patch.len()}))
}
