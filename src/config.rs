//! The configuration file: TOML, every key with a default and a unit, unknown keys refused, everything cross-checked before a socket is bound.

mod access;
pub mod age;
mod audit;
mod fetch;
mod gc;
mod keeper;
mod kernels;
mod listen;
pub mod remote;
pub mod share;
pub mod streams;
pub mod trust;
mod verify;
pub mod worker;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

pub use access::{Access, CallerLimits, Fingerprint, OWNER_LEN_MAX, Role};
pub use audit::AuditConfig;
pub use fetch::{Fetch, Mirror, Source};
pub use listen::{Listen, TCP_WITHOUT_TLS_CONSENT, Tls, TlsVersion};

use serde::Deserialize;

pub use self::{gc::Gc, keeper::Keeper, verify::Verify};
use crate::{
    boot::platform::{Bus, Console, Firmware, Hypervisor, Mode, Platform},
    disk::Layout,
    error::{Error, Kind, Result, Stage},
    fs::{FsKind, Profile},
    names::PoolName,
    target::{IoPriority, Place, Pool},
    units::{Bytes, GIB, MIB},
};

pub use kernels::KernelConfig;

/// Where state is kept when neither file nor flag says.
pub const STATE_DIR_DEFAULT: &str = "/var/lib/cloudletd";
/// Where the daemon listens when neither file nor flag says.
pub const SOCKET_DEFAULT: &str = "/run/cloudletd/cloudletd.sock";

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Directory of catalogue, blobs and golden images. Absolute.
    pub state_dir: PathBuf,
    /// Sockets.
    pub listen: Listen,
    /// Who may do what. Default: whoever `listen` lets in may do everything.
    pub access: Vec<Access>,
    /// Who did what.
    pub audit: AuditConfig,
    /// Pools that volumes live in. Default: one directory pool named `default` in `STATE_DIR/volumes`.
    #[serde(rename = "pool")]
    pub pools: Vec<PoolConfig>,
    /// Fetching root filesystems.
    pub fetch: Fetch,
    /// Rules for certain hosts, in place of those of `fetch`.
    #[serde(rename = "source")]
    pub sources: Vec<Source>,
    /// Golden images.
    pub golden: Golden,
    /// Garbage collection.
    pub gc: Gc,
    /// Limits on what runs and waits.
    pub limits: Limits,
    /// What instances run on. Default: none.
    #[serde(rename = "platform")]
    pub platforms: Vec<PlatformConfig>,
    /// Kernels for images that bring none, in order of preference. Default: none.
    #[serde(rename = "kernel")]
    pub kernels: Vec<KernelConfig>,
    /// Firmware for machines with UEFI, as QEMU takes it.
    pub uefi: Uefi,
    /// Trees of images to read (simplestreams). Default: none.
    #[serde(rename = "stream")]
    pub streams: Vec<streams::StreamConfig>,
    /// The tree of our own.
    pub publish: streams::Publish,
    /// Processes that read foreign bytes.
    pub worker: worker::Worker,
    /// The process with the privileges, if the daemon has none.
    pub keeper: Keeper,
    /// What other hosts may take from this one, and whom it takes from.
    pub share: share::Share,
    /// Keys that open encrypted tarballs. Default: none.
    pub age: age::Age,
    /// Whose signatures are required, by source. Default: nobody's.
    #[serde(rename = "trust")]
    pub trust: Vec<trust::Trust>,
}

/// A platform (instance type) as it is configured.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformConfig {
    /// Name that requests use: 1 to 64 of `A-Z a-z 0-9 . _ -`.
    pub name: PoolName,
    /// The hypervisor.
    pub hypervisor: Hypervisor,
    /// How the machine is virtualised. Default: hvm on Xen, kvm on KVM, metal without a hypervisor.
    pub mode: Option<Mode>,
    /// What starts first. Default: loader for pv, direct for pvh, else bios.
    pub firmware: Option<Firmware>,
    /// How disks are attached. Default: xen on Xen, virtio on KVM, scsi without a hypervisor.
    pub bus: Option<Bus>,
    /// Architecture. Default: the host's.
    pub arch: Option<String>,
    /// Consoles; the last one is the guest's main one. Default: what suits the mode.
    #[serde(default)]
    pub consoles: Vec<Console>,
    /// Whether only signed programs are started.
    #[serde(default)]
    pub secure_boot: bool,
    /// Whether disks get `/boot/extlinux/extlinux.conf`, for boards and loaders that read it.
    #[serde(default)]
    pub extlinux: bool,
    /// Virtual CPUs.
    #[serde(default = "one")]
    pub cpus: u32,
    /// Memory.
    pub memory: Bytes,
    /// Whether an instance may run virtual machines of its own.
    #[serde(default)]
    pub nested_virtualization: bool,
    /// Bridge of the host that NICs are attached to.
    #[serde(default = "default_bridge")]
    pub bridge: String,
    /// Region, for those who have several.
    #[serde(default)]
    pub region: String,
    /// URL of the cloud's endpoint.
    #[serde(default)]
    pub endpoint: String,
}

fn one() -> u32 {
    1
}

fn default_bridge() -> String {
    "br0".to_owned()
}

impl PlatformConfig {
    /// With the defaults filled in.
    pub fn platform(&self) -> Platform {
        let mode = self.mode.unwrap_or(match self.hypervisor {
            Hypervisor::Xen => Mode::Hvm,
            Hypervisor::Kvm => Mode::Kvm,
            Hypervisor::None => Mode::Metal,
        });
        Platform {
            hypervisor: self.hypervisor,
            mode,
            firmware: self.firmware.unwrap_or(match mode {
                Mode::Pv => Firmware::Loader,
                Mode::Pvh => Firmware::Direct,
                Mode::Hvm | Mode::Kvm | Mode::Metal => Firmware::Bios,
            }),
            bus: self.bus.unwrap_or(match self.hypervisor {
                Hypervisor::Xen => Bus::Xen,
                Hypervisor::Kvm => Bus::Virtio,
                Hypervisor::None => Bus::Scsi,
            }),
            arch: self.arch.clone().unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            consoles: self.consoles.clone(),
            secure_boot: self.secure_boot,
            extlinux: self.extlinux,
        }
    }
}

/// Firmware for machines with UEFI.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Uefi {
    /// The program. Default: where Debian's ovmf has it.
    pub code: PathBuf,
    /// The program for Secure Boot.
    pub secure_code: PathBuf,
    /// Empty variables.
    pub variables: PathBuf,
    /// Variables with the keys of Secure Boot.
    pub secure_variables: PathBuf,
}

impl Default for Uefi {
    fn default() -> Self {
        Uefi {
            code: "/usr/share/OVMF/OVMF_CODE_4M.fd".into(),
            secure_code: "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd".into(),
            variables: "/usr/share/OVMF/OVMF_VARS_4M.fd".into(),
            secure_variables: "/usr/share/OVMF/OVMF_VARS_4M.ms.fd".into(),
        }
    }
}

/// A pool as it is configured.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum PoolConfig {
    /// Volumes are files of a directory.
    Directory {
        /// Name that requests use.
        name: PoolName,
        /// Absolute path; made at start (0750) when it is missing.
        path: PathBuf,
    },
    /// Volumes are block devices that exist.
    Devices {
        /// Name that requests use.
        name: PoolName,
        /// Directory with the nodes or links, e.g. `/dev/vg0`.
        path: PathBuf,
        /// Shell-style patterns of the names that may be written. At least one.
        allow: Vec<String>,
    },
}

/// Defaults of golden images.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Golden {
    /// Size of a golden disk when neither manifest nor request says. Sparse: costs what is in it.
    pub size: Bytes,
    /// Filesystem when neither manifest nor request says.
    pub filesystem: FsKind,
    /// Layout when neither manifest nor request says.
    pub layout: Layout,
    /// Largest golden disk.
    pub max_size: Bytes,
    /// When a golden image, and a tarball that one is built from, is compared with its digest.
    pub verify: Verify,
    /// Seconds between two scrubs, which compare everything in the store with its digest; 0 for none.
    pub scrub_interval_secs: u64,
    /// Whether a golden image that is not here is built, or taken from a `share.peer`, registry or bucket that has it. Default: build.
    pub prefer: share::Prefer,
    /// Golden images that are prepared when the daemon starts.
    #[serde(rename = "prerender")]
    pub prerenders: Vec<Prerender>,
}

/// A golden image that is prepared when the daemon starts. What is not given comes from the manifest and the defaults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prerender {
    /// Id of a catalogued image. Exclusive with `manifest`; one of the two is required.
    pub image: Option<String>,
    /// A manifest on this host; it is catalogued if it is not yet. Absolute.
    pub manifest: Option<PathBuf>,
    /// Where the root filesystem of `manifest` is, when the manifest does not say.
    pub rootfs_url: Option<String>,
    /// Filesystem.
    pub filesystem: Option<FsKind>,
    /// Layout.
    pub layout: Option<Layout>,
    /// Size of the disk.
    pub size: Option<Bytes>,
    /// ext4 features.
    pub profile: Option<Profile>,
    /// Names of the platforms that it has to start on.
    #[serde(default)]
    pub platforms: Vec<String>,
}

/// Limits on what runs and waits.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Renders that write volumes at the same time.
    pub concurrent_renders: usize,
    /// Golden images built at the same time.
    pub concurrent_builds: usize,
    /// Root filesystems fetched at the same time.
    pub concurrent_fetches: usize,
    /// Renders that may wait or run; more are refused with RESOURCE_EXHAUSTED.
    pub queued_renders: usize,
    /// Largest volume.
    pub volume_max_size: Bytes,
    /// Seconds that running renders get to finish after SIGTERM.
    pub drain_timeout_secs: u64,
    /// Memory that is left to the guests: a golden image is not built when less would remain.
    pub memory_reserve: Bytes,
    /// Bytes a second that all volumes and golden images together are written with; 0 for as fast as the storage takes them.
    pub write_bandwidth: Bytes,
    /// I/O priority of the threads that write in bulk: inherit, low or idle.
    pub io_priority: IoPriority,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            state_dir: STATE_DIR_DEFAULT.into(),
            listen: Listen::default(),
            access: Vec::new(),
            audit: AuditConfig::default(),
            pools: Vec::new(),
            fetch: Fetch::default(),
            sources: Vec::new(),
            golden: Golden::default(),
            gc: Gc::default(),
            limits: Limits::default(),
            platforms: Vec::new(),
            kernels: Vec::new(),
            uefi: Uefi::default(),
            streams: Vec::new(),
            publish: streams::Publish::default(),
            worker: worker::Worker::default(),
            keeper: Keeper::default(),
            share: share::Share::default(),
            age: age::Age::default(),
            trust: Vec::new(),
        }
    }
}

impl Default for Golden {
    fn default() -> Self {
        Golden {
            size: Bytes(4 * GIB),
            filesystem: FsKind::Ext4,
            layout: Layout::Bare,
            max_size: Bytes(1024 * GIB),
            verify: Verify::default(),
            scrub_interval_secs: 7 * 86_400,
            prefer: share::Prefer::Build,
            prerenders: Vec::new(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            concurrent_renders: 8,
            concurrent_builds: 2,
            concurrent_fetches: 4,
            queued_renders: 4096,
            volume_max_size: Bytes(16 * 1024 * GIB),
            drain_timeout_secs: 60,
            memory_reserve: Bytes(256 * MIB),
            write_bandwidth: Bytes(0),
            io_priority: IoPriority::Inherit,
        }
    }
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Config> {
        let text =
            std::fs::read_to_string(path).map_err(|error| Error::io(Stage::Config, path.display().to_string(), "read the configuration", error))?;
        Config::parse(&text).map_err(|error| {
            Error::new(error.kind(), Stage::Config, path.display().to_string(), error.message().to_owned()).with_reason("BAD_CONFIG")
        })
    }

    /// Reads and checks the text of a file.
    pub fn parse(text: &str) -> Result<Config> {
        let config: Config = toml::from_str(text)
            .map_err(|error| Error::new(Kind::InvalidRequest, Stage::Config, "", error.to_string().trim_end().replace('\n', "; ")))?;
        config.checked()
    }

    /// Fills in what depends on other keys and refuses what does not fit together.
    pub fn checked(mut self) -> Result<Config> {
        let wrong = |field: &str, why: String| Err(Error::field(Stage::Config, field, format!("{field}: {why}")));
        if self.pools.is_empty() {
            let name: PoolName = "default".parse().map_err(|why: String| Error::internal(Stage::Config, "default", why))?;
            self.pools.push(PoolConfig::Directory { name, path: self.state_dir.join("volumes") });
        }
        if !self.state_dir.is_absolute() {
            return wrong("state_dir", format!("{:?} is not an absolute path", self.state_dir));
        }
        self.listen.check()?;
        self.fetch.check()?;
        self.audit.check()?;
        for (index, source) in self.sources.iter().enumerate() {
            source.check(index, &self.fetch)?;
        }
        let mut names = BTreeSet::new();
        for (index, pool) in self.pools.iter().enumerate() {
            let (name, path) = match pool {
                PoolConfig::Directory { name, path } => (name, path),
                PoolConfig::Devices { name, path, allow } => {
                    if allow.is_empty() {
                        return wrong(&format!("pool[{index}].allow"), "names no device; nothing could ever be written".into());
                    }
                    (name, path)
                }
            };
            if !names.insert(name.clone()) {
                return wrong(&format!("pool[{index}].name"), format!("{name} is there twice"));
            }
            if !path.is_absolute() {
                return wrong(&format!("pool[{index}].path"), format!("{path:?} is not an absolute path"));
            }
        }
        for (index, mirror) in self.fetch.mirrors.iter_mut().enumerate() {
            if let Some(path) = &mirror.mirrors_json {
                for url in crate::source::mirrors_json::read(path).map_err(|error| error.under_field(&format!("fetch.mirror[{index}]")))? {
                    if !mirror.replace.contains(&url) {
                        mirror.replace.push(url);
                    }
                }
            }
        }
        if let Some(index) = self.fetch.mirrors.iter().position(|mirror| mirror.replace.is_empty()) {
            return wrong(&format!("fetch.mirror[{index}].replace"), "names no mirror".into());
        }
        for (index, entry) in self.access.iter().enumerate() {
            entry.check(index, &names)?;
        }
        if self.golden.size.0 < 16 * MIB || self.golden.size > self.golden.max_size {
            return wrong("golden.size", format!("{} is not between 16 MiB and golden.max_size ({})", self.golden.size, self.golden.max_size));
        }
        for (index, prerender) in self.golden.prerenders.iter().enumerate() {
            let at = |key: &str| format!("golden.prerender[{index}].{key}");
            match (&prerender.image, &prerender.manifest) {
                (Some(_), None) if prerender.rootfs_url.is_none() => {}
                (Some(_), None) => return wrong(&at("rootfs_url"), "goes with manifest, not with image".into()),
                (None, Some(path)) if path.is_absolute() => {}
                (None, Some(path)) => return wrong(&at("manifest"), format!("{path:?} is not an absolute path")),
                _ => return wrong(&at("image"), "either image or manifest says what is prepared".into()),
            }
            if let Some(name) = prerender.platforms.iter().find(|name| !self.platforms.iter().any(|platform| platform.name.as_str() == name.as_str()))
            {
                return wrong(&at("platforms"), format!("there is no platform {name}"));
            }
        }
        if let Some((field, why)) = self.gc.contradiction() {
            return wrong(field, why);
        }
        let mut names = BTreeSet::new();
        for (index, platform) in self.platforms.iter().enumerate() {
            let at = |key: &str| format!("platform[{index}].{key}");
            if !names.insert(&platform.name) {
                return wrong(&at("name"), format!("{} is there twice", platform.name));
            }
            if let Some(why) = platform.platform().contradiction() {
                return wrong(&at("mode"), why);
            }
            if platform.cpus == 0 || platform.memory.0 < MIB {
                return wrong(&at("memory"), "a machine has at least 1 CPU and 1 MiB of memory".into());
            }
            if platform.bridge.is_empty() || !platform.bridge.chars().all(|c| c.is_ascii_graphic() && c != '/') {
                return wrong(&at("bridge"), format!("{:?} is not the name of a network bridge", platform.bridge));
            }
        }
        kernels::check(&self.kernels)?;
        streams::check(&self.streams, &self.publish)?;
        share::check(&self.share, &self.listen, self.golden.prefer)?;
        if (1..MIB).contains(&self.limits.write_bandwidth.0) {
            return wrong("limits.write_bandwidth", format!("{} a second is less than 1 MiB; 0 is no limit", self.limits.write_bandwidth));
        }
        for (field, value) in [
            ("limits.concurrent_renders", self.limits.concurrent_renders),
            ("limits.concurrent_builds", self.limits.concurrent_builds),
            ("limits.concurrent_fetches", self.limits.concurrent_fetches),
            ("limits.queued_renders", self.limits.queued_renders),
        ] {
            if value == 0 || value > 1 << 20 {
                return wrong(field, format!("{value} is not between 1 and 1048576"));
            }
        }
        self.worker.check()?;
        self.keeper.check()?;
        self.age.check()?;
        trust::check(&self.trust)?;
        Ok(self)
    }

    /// The pools as targets take them.
    pub fn target_pools(&self) -> Vec<Pool> {
        self.pools
            .iter()
            .map(|pool| match pool.clone() {
                PoolConfig::Directory { name, path } => Pool { name, place: Place::Directory { path } },
                PoolConfig::Devices { name, path, allow } => Pool { name, place: Place::Devices { directory: path, allow } },
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_configuration_at_all_is_usable() {
        let config = Config::parse("").expect("defaults hold");
        assert_eq!(config.pools.len(), 1);
        assert_eq!(config.target_pools()[0].place, Place::Directory { path: "/var/lib/cloudletd/volumes".into() });
    }

    #[test]
    fn the_example_shows_the_defaults() {
        let shown = Config::parse(include_str!("../systemd/cloudletd.toml.example")).expect("the example is correct");
        let default = Config::default().checked().expect("defaults hold");
        assert_eq!((shown.listen, shown.access, shown.audit), (default.listen, default.access, default.audit));
        assert_eq!((shown.fetch, shown.sources, shown.keeper), (default.fetch, default.sources, default.keeper));
    }

    #[test]
    fn unknown_keys_and_contradictions_are_named() {
        for (text, want) in [
            ("stat_dir = '/x'", "stat_dir"),
            ("[listen]\ntcp = '127.0.0.1:1'", "listen.tcp"),
            ("state_dir = 'relative'", "state_dir"),
            ("[[pool]]\nname='a'\nkind='directory'\npath='/a'\n[[pool]]\nname='a'\nkind='directory'\npath='/b'", "pool[1].name"),
            ("[[pool]]\nname='a'\nkind='devices'\npath='/dev'\nallow=[]", "pool[0].allow"),
            ("[fetch]\nschemes=['ftp']", "fetch.schemes"),
            ("[fetch]\nallow_addresses=['10.0.0.0/33']", "10.0.0.0/33"),
            ("[fetch]\nmax_redirects=21", "fetch.max_redirects"),
            ("[fetch]\nconnect_timeout_secs=0", "fetch.connect_timeout_secs"),
            ("[fetch]\nca_file='ca.pem'", "fetch.ca_file"),
            ("[[source]]\nhosts=[]", "source[0].hosts"),
            ("[[source]]\nports=[80]", "hosts"),
            ("[[source]]\nhosts=['a']\nidle_timeout_secs=0", "source[0].idle_timeout_secs"),
            ("[[source]]\nhosts=['a']\nca_file='ca.pem'", "source[0].ca_file"),
            ("[audit]\nrequired=true", "audit.required"),
            ("[audit]\nfile='a.log'", "audit.file"),
            ("[audit]\nfile='/a.log'\nstderr=true", "audit.stderr"),
            ("[golden]\nsize='1 KiB'", "golden.size"),
            ("[limits]\nconcurrent_renders=0", "limits.concurrent_renders"),
            ("[gc]\nlow_water_percent=99", "gc.low_water_percent"),
            ("[gc]\nkeep=['../x']", "gc.keep"),
            ("[limits]\nwrite_bandwidth='1 KiB'", "limits.write_bandwidth"),
            ("[[platform]]\nname='a'\nhypervisor='kvm'\nmode='pv'\nmemory='1 GiB'", "platform[0].mode"),
            ("[[platform]]\nname='a'\nhypervisor='kvm'\nmemory='1 KiB'", "platform[0].memory"),
            ("[[stream]]\nname='a'\nurl='https://a.example/'", "stream[0].keyring"),
            ("[[stream]]\nname='a'\nurl='nowhere'\npolicy='unsigned'", "stream[0].url"),
            ("[[stream]]\nname='a'\nurl='https://a.example/'\npolicy='unsigned'\nfilters=['arch']", "stream[0].filters"),
            ("[publish]\nlisten='127.0.0.1:1'", "publish.directory"),
            ("[age]\nidentities=['key']", "age.identities"),
            ("[keeper]\nsocket='keeper.sock'", "keeper.socket"),
            ("[[trust]]\nprefix='https://a/'\nrequire='signature'", "trust[0].require"),
            ("[[trust]]\nprefix='https://a/'\nrequire='signature'\nopenpgp=['/a']\nminisign=['/b']\nsuffix='.s'", "trust[0].suffix"),
            ("[[trust]]\nprefix='https://a/x%2fy/'\nrequire='nothing'", "trust[0].prefix"),
            ("[[trust]]\nprefix='uploads:'\nrequire='nothing'", "trust[0].prefix"),
            ("[[trust]]\nprefix='https://a/b/'\nrequire='nothing'\n[[trust]]\nprefix='https://A:443//%62/'\nrequire='nothing'", "trust[1].prefix"),
            ("[[trust]]\nprefix='https://a/'\nrequire='nothing'\nopenpgp=['/a']", "trust[0].require"),
            ("[[trust]]\nprefix='https://a'\nrequire='nothing'", "trust[0].prefix"),
            ("[[trust]]\nprefix='*'\nrequire='nothing'\n[[trust]]\nprefix='*'\nrequire='nothing'", "trust[1].prefix"),
            ("[[trust]]\nprefix='*'\nrequire='signature'\nopenpgp=['a']", "trust[0].openpgp"),
            ("[[trust]]\nprefix='*'\nrequire='signature'\nopenpgp=['/a']\nsuffix='/../x'", "trust[0].suffix"),
            ("[[trust]]\nprefix='*'", "require"),
            ("[[golden.prerender]]\nsize='1 GiB'", "golden.prerender[0].image"),
            ("[[golden.prerender]]\nimage='a'\nmanifest='/b'", "golden.prerender[0].image"),
            ("[[golden.prerender]]\nmanifest='b'", "golden.prerender[0].manifest"),
            ("[[golden.prerender]]\nimage='a'\nplatforms=['b']", "golden.prerender[0].platforms"),
            ("[[golden.prerender]]\nimage='a'\nrootfs_url='http://b'", "golden.prerender[0].rootfs_url"),
        ] {
            let error = Config::parse(text).expect_err(text);
            assert!(error.chain().contains(want), "{text}: {}", error.chain());
        }
    }
}
