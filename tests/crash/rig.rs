//! A daemon that is made to die, its pools, and what it said.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use cloudletd::{
    host::loops::{self, LoopDevice, Options},
    names::Digest,
    proto::{
        self, image_service_client::ImageServiceClient, render_service_client::RenderServiceClient, store_service_client::StoreServiceClient,
        volume_service_client::VolumeServiceClient,
    },
};
use tokio::{net::UnixStream, runtime::Runtime};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::common::{
    keeper::{Keeper, give_away, kept_command},
    leak::loop_devices,
    server::tarball_with,
};

const MIB: u64 = 1 << 20;
/// How long anything may take before the test calls it lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// When the daemon dies.
#[derive(Debug, Clone)]
pub enum Stop {
    /// At a step, when it comes there for the n-th time.
    At { step: &'static str, times: u32 },
    /// So long after the operation was asked for.
    After(Duration),
}

impl Stop {
    pub fn step(&self) -> &str {
        match self {
            Stop::At { step, .. } => step,
            Stop::After(_) => "at random",
        }
    }
}

/// The clients of one connection.
#[derive(Clone)]
pub struct Clients {
    pub images: ImageServiceClient<Channel>,
    pub renders: RenderServiceClient<Channel>,
    pub volumes: VolumeServiceClient<Channel>,
    pub stores: StoreServiceClient<Channel>,
}

/// Everything of a campaign.
pub struct Rig {
    directory: tempfile::TempDir,
    device: PathBuf,
    pub runtime: Runtime,
    daemon: Option<Child>,
    /// The process with the privileges, of daemons that have none.
    keeper: Option<Keeper>,
    pub clients: Option<Clients>,
    pub image: String,
    /// What a clean render of each kind holds, by instance and host name.
    pub reference: BTreeMap<String, Digest>,
    /// Digest of the golden.
    pub golden: String,
    /// What daemons have in their environment besides.
    pub environment: Vec<(String, String)>,
}

impl Rig {
    pub fn new() -> Rig {
        Rig::with(|_| (), &[])
    }

    /// One whose daemons have no privileges, and a keeper that outlives them.
    pub fn kept() -> Rig {
        let mut rig = Rig::new();
        let mut config = File::options().append(true).open(rig.path("cloudletd.toml")).expect("open");
        config.write_all(Keeper::table(rig.directory.path(), "").as_bytes()).expect("write");
        give_away(rig.directory.path());
        rig.keeper = Some(Keeper::start(rig.directory.path()));
        rig
    }

    /// One whose directory was prepared by `prepare`, and whose daemons have more in their environment.
    pub fn with(prepare: impl FnOnce(&Path), environment: &[(&str, &str)]) -> Rig {
        assert!(nix::unistd::geteuid().is_root(), "this test attaches loop devices: it needs root");
        let directory = tempfile::Builder::new().prefix("cloudletd-crash-").tempdir_in("/var/tmp").expect("temporary directory");
        let root = directory.path();
        prepare(root);
        let backing = root.join("device.img");
        let file = File::options().read(true).write(true).create_new(true).open(&backing).expect("create");
        file.set_len(40 * MIB).expect("size");
        // Not held open: a device that somebody has open is not written.
        let device = LoopDevice::attach(&file, &backing, &Options::persistent()).expect("attach").keep().expect("keep");
        fs::create_dir_all(root.join("by-id")).expect("directory");
        std::os::unix::fs::symlink(&device, root.join("by-id/vm-disk")).expect("link");
        // Without an SSH server no keys are drawn: two renders of one instance hold the same.
        fs::write(root.join("rootfs.tar"), tarball_with(&[("etc/fstab", 0o644, b"# nothing yet\n")], 1)).expect("write");
        let config = format!(
            "state_dir = {:?}\n[listen]\nunix = {:?}\n[fetch]\nfile_roots = [{:?}]\n[golden]\nsize = \"24 MiB\"\n[limits]\nmemory_reserve = 0\n\
             [[pool]]\nname = \"files\"\nkind = \"directory\"\npath = {:?}\n[[pool]]\nname = \"devices\"\nkind = \"devices\"\npath = {:?}\nallow = [\"vm-*\"]\n",
            root.join("state"),
            root.join("sock"),
            root,
            root.join("pool"),
            root.join("by-id")
        );
        fs::write(root.join("cloudletd.toml"), config).expect("write");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        Rig {
            directory,
            device,
            runtime,
            daemon: None,
            keeper: None,
            clients: None,
            image: String::new(),
            reference: BTreeMap::new(),
            golden: String::new(),
            environment: environment.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn device(&self) -> &Path {
        &self.device
    }

    /// What the daemons said, the last lines of it.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.path("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Starts a daemon; gives the time until it serves, or nothing when it died before, as it was told to.
    pub fn start(&mut self, stop_at: Option<(&str, u32)>) -> Option<Duration> {
        assert!(self.daemon.is_none(), "one runs");
        let mut log = File::options().append(true).create(true).open(self.path("log")).expect("open the log");
        writeln!(log, "--- start {stop_at:?}").expect("write the log");
        let mut command = if self.keeper.is_some() { kept_command(self.directory.path()) } else { Command::new(env!("CARGO_BIN_EXE_cloudletd")) };
        command.args(["serve", "--config"]).arg(self.path("cloudletd.toml")).env_remove("NOTIFY_SOCKET").env_remove("LISTEN_FDS");
        if let Some((step, times)) = stop_at {
            command.env("CLOUDLETD_STOP_AT", format!("{step}:{times}"));
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let output = log.try_clone().expect("share the log");
        let begun = Instant::now();
        let mut child = command.stdin(Stdio::null()).stdout(output).stderr(log).spawn().expect("run cloudletd");
        let socket = self.path("sock");
        loop {
            if let Some(status) = child.try_wait().expect("wait for cloudletd") {
                assert!(stop_at.is_some() && status.signal() == Some(libc::SIGKILL), "cloudletd ended with {status}:\n{}", self.log());
                return None;
            }
            if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "cloudletd does not listen:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        let served = begun.elapsed();
        self.daemon = Some(child);
        let connector = tower::service_fn(move |_: Uri| {
            let path = socket.clone();
            async move { UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
        });
        let channel = self.runtime.block_on(async { Endpoint::from_static("http://localhost").connect_with_connector(connector).await });
        let Ok(channel) = channel else {
            assert!(stop_at.is_some(), "the daemon does not answer:\n{}", self.log());
            self.reap();
            return None;
        };
        self.clients = Some(Clients {
            images: ImageServiceClient::new(channel.clone()),
            renders: RenderServiceClient::new(channel.clone()),
            volumes: VolumeServiceClient::new(channel.clone()),
            stores: StoreServiceClient::new(channel),
        });
        Some(served)
    }

    /// SIGKILL, unless it is dead already. Gives whether it had died by itself, as it was told to.
    pub fn kill(&mut self) -> bool {
        let mut child = self.daemon.take().expect("a daemon runs");
        self.clients = None;
        let died = match child.try_wait().expect("wait for cloudletd") {
            Some(status) => {
                assert_eq!(status.signal(), Some(libc::SIGKILL), "cloudletd ended with {status}:\n{}", self.log());
                true
            }
            None => false,
        };
        if !died {
            child.kill().expect("kill cloudletd");
            child.wait().expect("wait for cloudletd");
        }
        died
    }

    /// Whether the daemon is dead.
    pub fn has_ended(&mut self) -> bool {
        self.daemon.as_mut().is_none_or(|child| matches!(child.try_wait(), Ok(Some(_))))
    }

    /// After a call that failed: the daemon died at `step`, or the call was refused, which is an error of the test or the daemon.
    pub fn reap_or_fail(&mut self, step: &str) {
        let begun = Instant::now();
        while !self.has_ended() {
            assert!(begun.elapsed() < Duration::from_secs(5), "the call failed and the daemon lives; it was to die at {step}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(1));
        }
        self.reap();
    }

    /// Waits for the end of a daemon that is dying.
    pub fn reap(&mut self) {
        let mut child = self.daemon.take().expect("a daemon runs");
        self.clients = None;
        let begun = Instant::now();
        while child.try_wait().expect("wait for cloudletd").is_none() {
            assert!(begun.elapsed() < PATIENCE, "the daemon does not die");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn clients(&self) -> Clients {
        self.clients.clone().expect("a daemon serves")
    }

    /// Catalogues the image, and remembers what clean renders hold.
    pub fn learn(&mut self) {
        self.start(None);
        self.catalogue_image();
        crate::rounds::learn(self);
    }

    /// Catalogues the image.
    pub fn catalogue_image(&mut self) {
        let mut clients = self.clients();
        let manifest = serde_json::json!({"name": "small", "entry_points": {"init": {}}, "rootfs": {"url": format!("file://{}", self.path("rootfs.tar").display())}});
        let request = proto::CreateImageRequest { manifest_json: manifest.to_string(), ..Default::default() };
        let created = self.runtime.block_on(clients.images.create_image(request)).expect("created").into_inner();
        self.image = created.image.expect("an image").id;
    }

    /// Ends the campaign: a daemon that is asked to stop stops, and nothing is left.
    pub fn finish(mut self) {
        self.start(None);
        let pid = self.daemon.as_ref().expect("runs").id();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGTERM).expect("asked to stop");
        let status = self.daemon.take().expect("runs").wait().expect("waited");
        assert!(status.success(), "{status}:\n{}", self.log());
        loops::detach(&self.device).expect("detached");
        for (name, backing) in loop_devices() {
            assert!(!backing.starts_with(self.directory.path().to_str().expect("text")), "{name} is left on {backing}");
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // A failed campaign leaves no devices behind.
        for (name, backing) in loop_devices() {
            if backing.starts_with(&*self.directory.path().to_string_lossy()) {
                let _ = Command::new("losetup").args(["--detach", &format!("/dev/{name}")]).status();
            }
        }
        if std::thread::panicking() {
            eprintln!("--- the daemons' log, its end ---\n{}", self.log());
            if std::env::var_os("CLOUDLETD_KEEP_WRECK").is_some() {
                self.directory.disable_cleanup(true);
                eprintln!("kept: {}", self.directory.path().display());
            }
        }
    }
}
