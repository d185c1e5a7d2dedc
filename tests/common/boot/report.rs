//! What a guest said about itself.

use std::{collections::BTreeMap, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;

/// A guest's own account of its configuration, after its network tool had settled.
#[derive(Debug)]
pub struct Report {
    /// `ip -j addr`.
    pub links: Vec<Link>,
    /// `ip -j -4 route`, main table.
    pub routes4: Vec<Route>,
    /// `ip -j -6 route`, main table.
    pub routes6: Vec<Route>,
    /// /etc/resolv.conf as a program of the guest reads it.
    pub resolv_conf: String,
    /// systemd-resolved's list of upstream resolvers, when it runs: what is behind the stub in `resolv_conf`.
    pub resolved: Option<String>,
    /// The kernel's host name. In a fast boot it was set from /etc/hostname.
    pub hostname: String,
    /// /etc/hostname.
    pub etc_hostname: String,
    /// /etc/machine-id without the newline.
    pub machine_id: String,
    /// Kernel command line.
    pub cmdline: String,
    /// Kernel release.
    pub kernel: String,
    /// Device, type and options of the root mount.
    pub root: String,
    /// Files that were asked for, by path.
    pub files: BTreeMap<String, GuestFile>,
    /// Failed units, one per line; full boots only.
    pub failed_units: Option<String>,
    /// Seconds the guest had run when its network had settled.
    pub uptime_seconds: f64,
    /// What the boot took on this machine, with building the initramfs.
    pub elapsed: Duration,
    /// Console, for messages of failing assertions.
    pub console: String,
}

/// A network interface.
#[derive(Clone, Debug)]
pub struct Link {
    /// Name.
    pub name: String,
    /// Hardware address, lower case.
    pub mac: String,
    /// MTU in bytes.
    pub mtu: u64,
    /// Whether it is administratively up.
    pub up: bool,
    /// Addresses with prefix length, link-local ones included.
    pub addresses: Vec<String>,
    /// The rest, as iproute2 prints it.
    pub raw: Value,
}

/// A route of the main table.
#[derive(Clone, Debug)]
pub struct Route {
    /// Destination: "default", or an address with or without prefix length.
    pub to: String,
    /// Next hop; empty for a device route.
    pub gateway: String,
    /// Interface.
    pub device: String,
    /// Metric, 0 when iproute2 prints none.
    pub metric: u64,
    /// e.g. "onlink", "linkdown".
    pub flags: Vec<String>,
}

/// A file of the guest.
#[derive(Clone, PartialEq, Eq)]
pub enum GuestFile {
    /// A regular file.
    File {
        /// Permission bits.
        mode: u32,
        /// Numeric owner.
        uid: u32,
        /// Numeric group.
        gid: u32,
        /// Content.
        content: Vec<u8>,
    },
    /// A symbolic link and where it points.
    Link(String),
    /// A directory and the names in it.
    Directory {
        /// Permission bits.
        mode: u32,
        /// Names, sorted as ls does.
        names: Vec<String>,
    },
    /// Nothing of that name.
    Missing,
}

impl std::fmt::Debug for GuestFile {
    /// Contents as text: reports of failed tests are read by people.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            GuestFile::File { mode, uid, gid, content } => write!(f, "file {mode:04o} {uid}:{gid} {:?}", String::from_utf8_lossy(content)),
            GuestFile::Link(target) => write!(f, "-> {target:?}"),
            GuestFile::Directory { mode, names } => write!(f, "directory {mode:04o} {names:?}"),
            GuestFile::Missing => f.write_str("missing"),
        }
    }
}

impl Report {
    /// Reads what report.sh wrote.
    ///
    /// # Panics
    /// When the report is incomplete; the message holds the console.
    #[track_caller]
    pub(super) fn parse(raw: &str, console: String, elapsed: Duration) -> Self {
        let mut items: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in raw.lines() {
            let (key, value) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), ""));
            // UEFI firmware and GRUB draw on every serial port before the guest has it.
            if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_') {
                continue;
            }
            let bytes = STANDARD.decode(value).unwrap_or_else(|error| panic!("report line {line:?}: {error}\n{console}"));
            items.entry(key.to_owned()).or_default().push(String::from_utf8_lossy(&bytes).into_owned());
        }
        if let Some(why) = items.get("failed") {
            panic!("the initramfs failed: {why:?}\n{}", super::tail(&console));
        }
        assert!(items.contains_key("end"), "the guest ended without a whole report: {:?}\n{}", items.keys(), super::tail(&console));
        let one = |key: &str| items.get(key).map(|values| values[0].clone());
        let trimmed = |key: &str| one(key).unwrap_or_default().trim().to_owned();
        let json = |key: &str| -> Vec<Value> {
            let text = one(key).unwrap_or_default();
            if text.trim().is_empty() {
                return Vec::new();
            }
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{key}: {error}: {text}"))
        };
        Self {
            links: json("addresses").into_iter().map(Link::new).collect(),
            routes4: json("routes4").iter().map(Route::new).collect(),
            routes6: json("routes6").iter().map(Route::new).collect(),
            resolv_conf: one("resolv_conf").unwrap_or_default(),
            resolved: one("resolved"),
            hostname: trimmed("hostname"),
            etc_hostname: trimmed("etc_hostname"),
            machine_id: trimmed("machine_id"),
            cmdline: trimmed("cmdline"),
            kernel: trimmed("kernel"),
            root: trimmed("root"),
            files: items.get("file").into_iter().flatten().map(|text| GuestFile::parse(text)).collect(),
            failed_units: one("failed_units").map(|units| units.trim().to_owned()),
            uptime_seconds: trimmed("uptime").parse().unwrap_or(f64::NAN),
            elapsed,
            console,
        }
    }

    /// The interface of that name.
    #[track_caller]
    pub fn link(&self, name: &str) -> &Link {
        self.links.iter().find(|link| link.name == name).unwrap_or_else(|| panic!("no interface {name}: {:#?}\n{}", self.links, self.console))
    }

    /// The interface with that hardware address.
    #[track_caller]
    pub fn link_by_mac(&self, mac: &str) -> &Link {
        let mac = mac.to_ascii_lowercase();
        self.links.iter().find(|link| link.mac == mac).unwrap_or_else(|| panic!("no interface with {mac}: {:#?}\n{}", self.links, self.console))
    }

    /// The only IPv4 default route, or none.
    #[track_caller]
    pub fn default_route4(&self) -> Option<&Route> {
        only_default(&self.routes4)
    }

    /// The only IPv6 default route, or none.
    #[track_caller]
    pub fn default_route6(&self) -> Option<&Route> {
        only_default(&self.routes6)
    }

    /// Resolvers in the order they are asked; those behind systemd-resolved's stub when it runs.
    pub fn nameservers(&self) -> Vec<&str> {
        self.resolver_lines("nameserver").collect()
    }

    /// Search domains.
    pub fn search(&self) -> Vec<&str> {
        self.resolver_lines("search").flat_map(str::split_whitespace).collect()
    }

    /// A file that was asked for.
    #[track_caller]
    pub fn guest_file(&self, path: &str) -> &GuestFile {
        self.files.get(path).unwrap_or_else(|| panic!("{path} was not asked for"))
    }

    /// The content of a file that was asked for, as text.
    #[track_caller]
    pub fn guest_text(&self, path: &str) -> String {
        match self.guest_file(path) {
            GuestFile::File { content, .. } => String::from_utf8(content.clone()).expect("the file is text"),
            other => panic!("{path} is {other:?}"),
        }
    }

    fn resolver_lines<'a>(&'a self, keyword: &'a str) -> impl Iterator<Item = &'a str> {
        let text = self.resolved.as_deref().unwrap_or(&self.resolv_conf);
        text.lines().filter_map(move |line| line.strip_prefix(keyword)?.strip_prefix([' ', '\t'])).map(str::trim)
    }
}

#[track_caller]
fn only_default(routes: &[Route]) -> Option<&Route> {
    let defaults: Vec<&Route> = routes.iter().filter(|route| route.to == "default").collect();
    assert!(defaults.len() <= 1, "more than one default route: {defaults:#?}");
    defaults.first().copied()
}

fn string(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

impl Link {
    fn new(raw: Value) -> Self {
        let addresses = raw["addr_info"].as_array().into_iter().flatten();
        Self {
            name: string(&raw, "ifname"),
            mac: string(&raw, "address"),
            mtu: raw["mtu"].as_u64().unwrap_or_default(),
            up: raw["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "UP")),
            addresses: addresses.map(|address| format!("{}/{}", string(address, "local"), address["prefixlen"])).collect(),
            raw,
        }
    }

    /// Whether it has this address, written with its prefix length in canonical form.
    pub fn has_address(&self, address: &str) -> bool {
        self.addresses.iter().any(|known| known == address)
    }

    /// Its addresses without IPv6 link-local ones, which the kernel adds.
    pub fn global_addresses(&self) -> Vec<&str> {
        self.addresses.iter().map(String::as_str).filter(|address| !address.starts_with("fe80:")).collect()
    }
}

impl Route {
    fn new(raw: &Value) -> Self {
        // An IPv4 route over an IPv6 next hop has "via" in place of "gateway".
        let gateway = raw["gateway"].as_str().or_else(|| raw["via"]["host"].as_str()).unwrap_or_default().to_owned();
        Self {
            to: string(raw, "dst"),
            gateway,
            device: string(raw, "dev"),
            metric: raw["metric"].as_u64().unwrap_or_default(),
            flags: raw["flags"].as_array().into_iter().flatten().filter_map(|flag| flag.as_str().map(str::to_owned)).collect(),
        }
    }
}

impl GuestFile {
    /// Path, "mode uid gid", kind and payload, one per line.
    fn parse(text: &str) -> (String, Self) {
        let lines: Vec<&str> = text.lines().collect();
        let [path, attributes, kind, rest @ ..] = lines.as_slice() else { panic!("report of a file: {text:?}") };
        let payload = rest.first().copied().unwrap_or_default();
        let mut numbers = attributes.split(' ');
        let mode = u32::from_str_radix(numbers.next().unwrap_or_default(), 8).expect("stat prints an octal mode");
        let mut number = || numbers.next().unwrap_or_default().parse().expect("stat prints numeric owners");
        let (uid, gid) = (number(), number());
        let file = match *kind {
            "file" => Self::File { mode, uid, gid, content: STANDARD.decode(payload).expect("base64 prints base64") },
            "link" => Self::Link(payload.to_owned()),
            "directory" => Self::Directory { mode, names: payload.split_whitespace().map(str::to_owned).collect() },
            _ => Self::Missing,
        };
        ((*path).to_owned(), file)
    }
}
