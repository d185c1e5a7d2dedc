//! The configuration of one instance, valid by construction: what the caller wants inside the guest. Decoded from the API, from JSON on the
//! command line, or from a configuration of 2010 (`{"args": …, "dns": …, "ip": …}`) by `guest::decode`.

use std::{fmt, net::IpAddr};

use serde_json::{Map, Value};

pub use crate::guest::network::links::{Bond, BondMode, Bridge, HashPolicy, LacpRate, LinkKind, RouteKind, Vlan};
use crate::{
    guest::setup::GuestSetup,
    names::{GuestPath, Hostname, InstanceName, InterfaceName, MacAddr},
    tree::Xattr,
};

/// Everything an instance is told about itself.
#[derive(Debug, Clone, PartialEq)]
pub struct InstanceConfig {
    /// The provider's name for the instance; identities are derived from it.
    pub instance: InstanceName,
    /// Host name or FQDN; the instance name when not given and it is a valid one.
    pub hostname: Option<Hostname>,
    /// Values for the manifest's `args`.
    pub args: Map<String, Value>,
    /// The network; `None` leaves the image's own network configuration alone.
    pub network: Option<Network>,
    /// Keys that may log in, per user.
    pub authorized_keys: Vec<AuthorizedKeys>,
    /// Crypt hash for root (`$6$…`, `$y$…`, `$2b$…`, `$5$…`); `None` leaves the account as it is.
    pub root_password_hash: Option<Secret>,
    /// Overrides the derived machine-id: 32 hexadecimal digits.
    pub machine_id: Option<String>,
    /// Make fresh SSH host keys (default) or leave what is there.
    pub ssh_host_keys: HostKeys,
    /// Further files to write.
    pub files: Vec<InjectedFile>,
    /// Users and login.
    pub setup: GuestSetup,
}

/// What happens to the SSH host keys of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HostKeys {
    /// Keys of the image are removed and new ones (Ed25519, ECDSA) made, if the image has an SSH server.
    #[default]
    Fresh,
    /// Keys of the image are removed; the guest makes its own at first boot.
    Remove,
    /// Nothing is touched.
    Keep,
}

/// A file the caller wants in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InjectedFile {
    /// Where.
    pub path: GuestPath,
    /// Content.
    pub content: Secret,
    /// Permission bits.
    pub mode: u16,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Owner by name, instead of `uid`: a user of the image or of the request.
    pub user: Option<String>,
    /// Group by name, instead of `gid`.
    pub group: Option<String>,
    /// Extended attributes, sorted by name; `user.`, `trusted.` and `security.` only.
    pub xattrs: Vec<Xattr>,
}

/// The keys of one user of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorizedKeys {
    /// A name in the image's own passwd file.
    pub user: String,
    /// Lines in `authorized_keys` form, each parsed and without control characters.
    pub keys: Vec<String>,
}

/// Bytes that never show up in logs, plans, reports or `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Wraps secret bytes.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Secret(bytes.into())
    }

    /// The bytes, for writing them into the guest and nothing else.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// The neutral network model, close to netplan's version 2.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Network {
    /// NICs, in the caller's order; names and MACs are unique.
    pub interfaces: Vec<Interface>,
    /// Resolvers of the whole system, v4 and v6.
    pub nameservers: Vec<IpAddr>,
    /// Search domains of the whole system.
    pub search: Vec<Hostname>,
    /// Force a back-end instead of detecting it.
    pub backend: Option<BackendKind>,
}

/// One interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Name in the guest; that of a NIC is pinned to its MAC when there is one.
    pub name: InterfaceName,
    /// What it is.
    pub kind: LinkKind,
    /// A NIC's hardware address, which it is found by; the address that a bond, bridge or VLAN gets.
    pub mac: Option<MacAddr>,
    /// Static addresses, v4 and v6.
    pub addresses: Vec<Cidr>,
    /// Default gateway for IPv4; on-link when no address of this interface contains it.
    pub gateway4: Option<std::net::Ipv4Addr>,
    /// Default gateway for IPv6; link-local is allowed; on-link when no address contains it.
    pub gateway6: Option<std::net::Ipv6Addr>,
    /// Metric of the default routes.
    pub metric: Option<u32>,
    /// Further routes.
    pub routes: Vec<Route>,
    /// Routing rules that go with the interface.
    pub rules: Vec<Rule>,
    /// DHCP for IPv4.
    pub dhcp4: bool,
    /// DHCP for IPv6.
    pub dhcp6: bool,
    /// Accept router advertisements: `None` leaves the guest's default. networkd's is to accept them: without a router it waits some 12 s before
    /// it calls a link configured (measured with 252), so an interface with static addresses only is better off with `Some(false)`.
    pub accept_ra: Option<bool>,
    /// Prefer temporary addresses where addresses come from router advertisements (RFC 8981); `None` leaves the guest's default.
    pub ipv6_privacy: Option<bool>,
    /// Whether the interface has an IPv6 link-local address; `None` leaves the guest's default, which is to have one.
    pub link_local: Option<bool>,
    /// The boot does not wait for this interface, where the guest's tool can be told so.
    pub optional: bool,
    /// MTU in bytes, 68..=65535 (1280 or more with IPv6).
    pub mtu: Option<u16>,
    /// Resolvers on this link only.
    pub nameservers: Vec<IpAddr>,
    /// Search domains on this link only.
    pub search: Vec<Hostname>,
}

impl Interface {
    /// An interface without anything but a name.
    pub fn named(name: InterfaceName) -> Self {
        Interface {
            name,
            kind: LinkKind::Ethernet,
            mac: None,
            addresses: Vec::new(),
            gateway4: None,
            gateway6: None,
            metric: None,
            routes: Vec::new(),
            rules: Vec::new(),
            dhcp4: false,
            dhcp6: false,
            accept_ra: None,
            ipv6_privacy: None,
            link_local: None,
            optional: false,
            mtu: None,
            nameservers: Vec::new(),
            search: Vec::new(),
        }
    }
}

/// An address with its prefix length (0..=32 or 0..=128).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    /// The address, host bits kept.
    pub address: IpAddr,
    /// Prefix length.
    pub prefix: u8,
}

/// A static route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Destination network.
    pub to: Cidr,
    /// Next hop; `None` is a device route.
    pub via: Option<IpAddr>,
    /// What happens to packets that take it.
    pub kind: RouteKind,
    /// Metric.
    pub metric: Option<u32>,
    /// Routing table; `None` is the main one (254).
    pub table: Option<u32>,
    /// The next hop is on the link although no address contains it.
    pub on_link: bool,
}

/// A routing rule: which packets use which table (ip-rule(8)). At least one of `from` and `to` is given; they are of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Source network.
    pub from: Option<Cidr>,
    /// Destination network.
    pub to: Option<Cidr>,
    /// The routing table.
    pub table: u32,
    /// Rules are tried in the order of their priorities, the lowest first; `None` is before the main table's (32766).
    pub priority: Option<u32>,
    /// The mark that a packet has to have.
    pub mark: Option<u32>,
}

impl Rule {
    /// Whether it is one of IPv6.
    pub fn is_ipv6(&self) -> bool {
        self.from.or(self.to).is_some_and(|cidr| cidr.address.is_ipv6())
    }

    /// What `ip rule add` takes, but for the family.
    pub fn words(&self) -> String {
        let Rule { from, to, table, priority, mark } = self;
        let mut words = Vec::new();
        for (word, cidr) in [("from", from), ("to", to)] {
            words.extend(cidr.map(|cidr| format!("{word} {cidr}")));
        }
        words.extend(mark.map(|mark| format!("fwmark {mark}")));
        words.push(format!("table {table}"));
        words.extend(priority.map(|priority| format!("priority {priority}")));
        words.join(" ")
    }
}

/// The guest network configurations that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BackendKind {
    /// netplan YAML.
    Netplan,
    /// NetworkManager keyfiles.
    NetworkManager,
    /// SUSE's wicked: ifcfg files in /etc/sysconfig/network.
    Wicked,
    /// systemd-networkd units.
    Networkd,
    /// Red Hat's network service: ifcfg files in /etc/sysconfig/network-scripts.
    Ifcfg,
    /// Gentoo's netifrc: /etc/conf.d/net.
    Netifrc,
    /// ifupdown's /etc/network/interfaces (Debian, Alpine, busybox).
    Ifupdown,
    /// A seed for the image's cloud-init, which then writes the configuration itself; only when asked for.
    CloudInit,
    /// The kernel's own `ip=` argument; for images without any network tooling.
    KernelIp,
}

impl BackendKind {
    /// All of them.
    pub const ALL: [BackendKind; 9] = [
        BackendKind::Netplan,
        BackendKind::NetworkManager,
        BackendKind::Wicked,
        BackendKind::Networkd,
        BackendKind::Ifcfg,
        BackendKind::Netifrc,
        BackendKind::Ifupdown,
        BackendKind::CloudInit,
        BackendKind::KernelIp,
    ];

    /// The name used in documents, reports and the protocol.
    pub fn name(self) -> &'static str {
        match self {
            BackendKind::Netplan => "netplan",
            BackendKind::NetworkManager => "network-manager",
            BackendKind::Wicked => "wicked",
            BackendKind::Networkd => "networkd",
            BackendKind::Ifcfg => "ifcfg",
            BackendKind::Netifrc => "netifrc",
            BackendKind::Ifupdown => "ifupdown",
            BackendKind::CloudInit => "cloud-init",
            BackendKind::KernelIp => "kernel-ip",
        }
    }

    /// The back-end of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// All names, for messages.
    pub fn names() -> String {
        Self::ALL.map(BackendKind::name).join(", ")
    }
}
