//! The `cloudletd` command. See `cloudletd help`.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

use cloudletd::{
    config::Config,
    error::{Error, Result, Stage},
    fs::mounted::worker,
    host::keeper,
    manifest, server, telemetry, worker as build_worker,
};

/// Renders cloudlets to bootable, configured disks.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon.
    Serve {
        /// Configuration file (TOML). Without one, defaults hold.
        #[arg(long, value_name = "FILE", env = "CLOUDLETD_CONFIG")]
        config: Option<PathBuf>,
        /// Directory of catalogue, blobs and golden images; overrides the file.
        #[arg(long, value_name = "DIRECTORY", env = "CLOUDLETD_STATE_DIR")]
        state_dir: Option<PathBuf>,
        /// Path of the unix socket, as a path or unix:PATH; overrides the file.
        #[arg(long, value_name = "PATH", env = "CLOUDLETD_LISTEN")]
        listen: Option<String>,
        /// Path of the keeper's socket; overrides the file.
        #[arg(long, value_name = "PATH", env = "CLOUDLETD_KEEPER")]
        keeper: Option<PathBuf>,
    },
    /// Run the keeper: the process with the privileges of a daemon that has none.
    Keeper {
        /// Configuration file of the daemon (TOML). Without one, defaults hold.
        #[arg(long, value_name = "FILE", env = "CLOUDLETD_CONFIG")]
        config: Option<PathBuf>,
    },
    /// Work with configuration files.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Work with manifests.
    Manifest {
        #[command(subcommand)]
        command: ManifestCommand,
    },
    /// Started by the daemon for filesystems that the kernel writes; not for people.
    #[command(name = worker::SUBCOMMAND, hide = true)]
    MountWorker,
    /// Started by the daemon to read foreign bytes; not for people.
    #[command(name = build_worker::SUBCOMMAND, hide = true)]
    Worker,
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Check a configuration file.
    Check {
        /// The file.
        file: PathBuf,
    },
}

#[derive(Subcommand)]
enum ManifestCommand {
    /// Print the JSON Schema of manifests.
    Schema,
    /// Check manifests; points at each offending field.
    Check {
        /// The files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Print the manifest of an LXD or Incus image, made of the metadata.yaml and templates in its tarball.
    FromLxd {
        /// The metadata tarball of a split image, or a unified tarball.
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // The workers enter namespaces of their own, which must happen before there is any other thread.
    match arguments.command {
        Command::MountWorker => return worker::main(),
        Command::Worker => return build_worker::main(),
        _ => {}
    }
    match run(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cloudletd: {}", error.chain());
            if let Some(hint) = error.hint() {
                eprintln!("  {hint}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Serve { config, state_dir, listen, keeper } => {
            telemetry::start();
            let mut loaded = match &config {
                Some(path) => Config::load(path)?,
                None => Config::default(),
            };
            if let Some(dir) = state_dir {
                // A default pool follows the state directory.
                if config.is_none() {
                    loaded.pools.clear();
                }
                loaded.state_dir = dir;
            }
            if let Some(listen) = listen {
                loaded.listen.unix = listen.trim_start_matches("unix://").trim_start_matches("unix:").into();
            }
            loaded.keeper.socket = keeper.or(loaded.keeper.socket);
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .thread_name("cloudletd")
                .max_blocking_threads(BLOCKING_THREADS_MAX)
                .build()
                .map_err(|error| Error::io(Stage::Host, "runtime", "start the runtime", error))?;
            runtime.block_on(server::serve(loaded.checked()?))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Keeper { config } => {
            telemetry::start();
            let loaded = match &config {
                Some(path) => Config::load(path)?,
                None => Config::default().checked()?,
            };
            keeper::run(&loaded).map(|()| ExitCode::SUCCESS)
        }
        Command::Config { command: ConfigCommand::Check { file } } => {
            Config::load(&file)?;
            println!("{}: correct", file.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Manifest { command: ManifestCommand::Schema } => {
            println!("{:#}", manifest::schema::schema());
            Ok(ExitCode::SUCCESS)
        }
        Command::Manifest { command: ManifestCommand::Check { files } } => check_manifests(&files),
        Command::Manifest { command: ManifestCommand::FromLxd { file } } => {
            println!("{:#}", manifest::lxd::import::file(&file)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::MountWorker | Command::Worker => unreachable!("handled before"),
    }
}

/// Bound on blocking threads: renders and builds have permits of their own, this bounds short catalogue work of many calls at once.
const BLOCKING_THREADS_MAX: usize = 128;

fn check_manifests(files: &[PathBuf]) -> Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for file in files {
        let bytes = std::fs::read(file).map_err(|error| Error::io(Stage::Manifest, file.display().to_string(), "read the manifest", error))?;
        let report = manifest::check::check(&bytes);
        print!("{}", report.render(&file.display().to_string()));
        if !report.is_valid() {
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}
