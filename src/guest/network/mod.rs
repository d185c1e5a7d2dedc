//! The guest's network: one neutral model, one renderer per back-end, chosen by what the tree contains and starts.
//!
//! [`choose`] asks every renderer of [`PREFERENCE`]; [`apply`] removes what would shadow the new configuration ([`conflicts`]), lets the renderer
//! turn model and facts into files, pins interface names ([`link`]), keeps cloud-init off, and settles DNS ([`crate::guest::resolv`]). Renderers
//! are pure and know nothing of each other; another back-end is one file and one entry in the list.
//!
//! Values are typed (names, MACs, addresses, host names), so nothing that could break out of a line of configuration exists in the model; every
//! writer here refuses control characters all the same (failures.md 14).

pub mod cloud_init;
pub mod conflicts;
pub mod ifcfg;
pub mod ifupdown;
pub mod ini;
pub mod kernel_ip;
pub mod link;
pub mod links;
pub mod netifrc;
pub mod netplan;
pub mod network_manager;
pub mod networkd;
pub mod shell;
pub mod wicked;

use std::net::IpAddr;

use crate::{
    error::{Error, Kind, Result, Stage},
    guest::{
        config::{BackendKind, Cidr, Interface, Network},
        facts::GuestFacts,
        identity::Identity,
        plan::Plan,
        report::{InterfaceReport, NetworkReport},
        resolv::{self, Resolver},
    },
    names::Hostname,
};

/// The renderers in the order of preference, the only such list. Among those that the guest starts the first wins, then among those that a preset
/// would start, then among those that are merely installed:
///
/// | back-end | why it is where it is |
/// |---|---|
/// | netplan | where it is installed it owns the others' files and writes them anew at each boot |
/// | network-manager | every systemd tree contains networkd, but only those that use NetworkManager start it |
/// | wicked | the same; SUSE images have either this or NetworkManager |
/// | networkd | |
/// | ifcfg | the network service of Red Hat 7 runs beside NetworkManager, which is meant |
/// | netifrc | Gentoo images may start networkd or NetworkManager instead and still have it |
/// | ifupdown | the one that stays installed, unused, when an administrator moves to another |
/// | cloud-init | when asked for: the native back-ends say what is there before the first boot |
/// | kernel-ip | when asked for, or when there is nothing else and it can express the network |
pub const PREFERENCE: [&dyn NetRenderer; 9] = [
    &netplan::Netplan,
    &network_manager::NetworkManager,
    &wicked::Wicked,
    &networkd::Networkd,
    &ifcfg::Ifcfg,
    &netifrc::Netifrc,
    &ifupdown::Ifupdown,
    &cloud_init::CloudInit,
    &kernel_ip::KernelIp,
];

/// What a tree says about one back-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// Not there.
    Absent,
    /// It could be used, but only by those who ask for it; the text names what was found.
    OnRequest(String),
    /// Its program is there but nothing starts it; the text names what was found.
    Installed(String),
    /// It is there, and a preset would start it at a first boot; the text names the preset. Weaker than a link: Debian's systemd brings a preset for
    /// networkd, whatever the image uses.
    Preset(String),
    /// It is there and the guest starts it; the text names what decides.
    Enabled(String),
}

/// A file that a renderer wants in the guest, owned by root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFile {
    /// Absolute path.
    pub path: String,
    /// Content.
    pub content: String,
    /// Permission bits.
    pub mode: u16,
    /// Why, for the report.
    pub why: String,
}

/// A link that a renderer wants in the guest, e.g. to enable a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestLink {
    /// Absolute path.
    pub path: String,
    /// Target.
    pub target: String,
    /// Why, for the report.
    pub why: String,
}

/// What a renderer makes of a network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rendered {
    /// Files.
    pub files: Vec<GuestFile>,
    /// Links.
    pub links: Vec<GuestLink>,
    /// What the kernel has to be started with, for the boot description.
    pub kernel_arguments: Vec<String>,
    /// For the report.
    pub notes: Vec<String>,
    /// For the report.
    pub warnings: Vec<String>,
}

/// What a renderer may look at besides the model.
pub struct Guest<'a> {
    /// The tree.
    pub facts: &'a GuestFacts,
    /// For identifiers inside configuration files.
    pub identity: &'a Identity,
    /// Who answers DNS queries in the guest.
    pub resolver: Resolver,
}

/// One back-end. Life cycle: `presence` for the choice, `owns` to find out whether a template writes the back-end's configuration instead, then
/// `render` once. Implementations hold no state. `render` fails with `Kind::Unsupported` when the back-end can't express the network.
pub trait NetRenderer: Sync {
    /// Which one.
    fn kind(&self) -> BackendKind;
    /// What the tree says.
    fn presence(&self, facts: &GuestFacts) -> Presence;
    /// Whether `path` is one of its configuration files.
    fn owns(&self, path: &str) -> bool;
    /// Model and facts to files.
    fn render(&self, network: &Network, guest: &Guest<'_>) -> Result<Rendered>;
}

/// The renderer of a back-end.
pub fn renderer(kind: BackendKind) -> &'static dyn NetRenderer {
    match kind {
        BackendKind::Netplan => &netplan::Netplan,
        BackendKind::NetworkManager => &network_manager::NetworkManager,
        BackendKind::Wicked => &wicked::Wicked,
        BackendKind::Networkd => &networkd::Networkd,
        BackendKind::Ifcfg => &ifcfg::Ifcfg,
        BackendKind::Netifrc => &netifrc::Netifrc,
        BackendKind::Ifupdown => &ifupdown::Ifupdown,
        BackendKind::CloudInit => &cloud_init::CloudInit,
        BackendKind::KernelIp => &kernel_ip::KernelIp,
    }
}

/// Picks the back-end: the one asked for if it is installed, else the first that the guest starts, else the first that a preset would start, else the
/// first that is installed, else the kernel's `ip=` if that is enough. `None` when the tree has no network tooling.
pub fn choose(network: &Network, facts: &GuestFacts) -> Result<Option<(&'static dyn NetRenderer, String)>> {
    if let Some(kind) = network.backend {
        let renderer = renderer(kind);
        return match renderer.presence(facts) {
            Presence::Absent => {
                let message = format!("{} is asked for but the image does not contain it", kind.name());
                Err(Error::field(Stage::Inject, "network.backend", message).with_reason("BACKEND_NOT_IN_IMAGE"))
            }
            Presence::OnRequest(what) | Presence::Installed(what) | Presence::Preset(what) | Presence::Enabled(what) => {
                Ok(Some((renderer, format!("asked for; {what}"))))
            }
        };
    }
    let found: Vec<_> = PREFERENCE.iter().map(|renderer| (*renderer, renderer.presence(facts))).collect();
    let enabled = found.iter().find_map(|(renderer, presence)| match presence {
        Presence::Enabled(why) => Some((*renderer, why.clone())),
        _ => None,
    });
    let weaker = |text: &dyn Fn(&Presence) -> Option<&String>| {
        let found = found.iter().find_map(|(renderer, presence)| Some((*renderer, text(presence)?)));
        found.map(|(renderer, why)| (renderer, format!("{why}; nothing else is there that the guest starts")))
    };
    let preset = || weaker(&|presence| if let Presence::Preset(why) = presence { Some(why) } else { None });
    let installed = || weaker(&|presence| if let Presence::Installed(why) = presence { Some(why) } else { None });
    let kernel = || {
        let needed = kernel_ip::argument(network).is_ok_and(|argument| argument.is_some());
        needed.then(|| (renderer(BackendKind::KernelIp), "the image has no network tooling; the kernel can do this by itself".to_owned()))
    };
    Ok(enabled.or_else(preset).or_else(installed).or_else(kernel))
}

/// Writes the network into the plan. `Kind::Unsupported` with reason `NO_NETWORK_BACKEND` when the image has nothing to configure interfaces with.
pub fn apply(plan: &mut Plan<'_>, facts: &GuestFacts, network: &Network, identity: &Identity) -> Result<NetworkReport> {
    let chosen = choose(network, facts)?;
    let template = plan.claimed().find(|path| match &chosen {
        Some((renderer, _)) if renderer.kind() != BackendKind::KernelIp => renderer.owns(path),
        // Nothing that is in the image was chosen: any back-end's file tells that the template's author knows better.
        _ => PREFERENCE.iter().any(|renderer| renderer.owns(path)),
    });
    let template = template.map(str::to_owned);
    let (backend, why) = match (&chosen, &template) {
        (_, Some(path)) => ("template", format!("{path} is written by {}", plan.claimant(path).unwrap_or("a template"))),
        (Some((renderer, why)), None) => (renderer.kind().name(), why.clone()),
        (None, None) if network.interfaces.is_empty() => ("none", "the image has no network tooling and no interface is to be configured".to_owned()),
        (None, None) => return Err(no_backend()),
    };
    let kind = chosen.as_ref().map(|(renderer, _)| renderer.kind());
    let by_template = template.is_some();
    let mut kernel_arguments = Vec::new();
    if let (Some((renderer, _)), None) = (&chosen, &template) {
        conflicts::remove(plan, facts, network, renderer.kind())?;
        let resolver = resolv::resolver(facts, renderer.kind());
        let rendered = renderer.render(network, &Guest { facts, identity, resolver })?;
        for file in rendered.files {
            plan.write(&file.path, file.content, file.mode, file.why)?;
        }
        for link in rendered.links {
            if facts.node(&link.path).is_none() {
                plan.symlink(&link.path, &link.target, link.why)?;
            }
        }
        if network.backend.is_none() && renderer.kind() == BackendKind::KernelIp {
            plan.warnings.push(format!("the image has no network tooling: it must be booted with {}", rendered.kernel_arguments.join(" ")));
        }
        kernel_arguments = rendered.kernel_arguments;
        plan.notes.extend(rendered.notes);
        plan.warnings.extend(rendered.warnings);
    } else if template.is_some() {
        plan.notes.push(format!("the network configuration is left to the template of {}: no native file is written", template.unwrap_or_default()));
    }
    if kind == Some(BackendKind::CloudInit) && !by_template {
        cloud_init::let_it_run(plan, facts)?;
    } else {
        link::pin_names(plan, facts, network)?;
        keep_cloud_init_off(plan, facts)?;
    }
    let resolv_conf = resolv::write_resolv_conf(plan, facts, network, kind)?;
    let interfaces = network.interfaces.iter().map(interface_report).collect();
    Ok(NetworkReport { backend: backend.to_owned(), why, interfaces, resolv_conf, kernel_arguments })
}

fn no_backend() -> Error {
    let own = |kind: &BackendKind| !matches!(kind, BackendKind::CloudInit | BackendKind::KernelIp);
    let names: Vec<&str> = PREFERENCE.iter().map(|renderer| renderer.kind()).filter(own).map(BackendKind::name).collect();
    let message = format!("the image has none of {}, and the kernel's ip= can't express this network", names.join(", "));
    Error::new(Kind::Unsupported, Stage::Inject, "network", message)
        .with_reason("NO_NETWORK_BACKEND")
        .with_hint("install one of them in the image, or let a template of the manifest write the configuration, or give no network")
}

/// cloud-init writes its own network configuration at every boot of a new instance unless told not to (cloud-init #4121).
fn keep_cloud_init_off(plan: &mut Plan<'_>, facts: &GuestFacts) -> Result<()> {
    if !cloud_init::is_installed(facts) {
        return Ok(());
    }
    let why = "cloud-init would overwrite the network configuration";
    plan.write("/etc/cloud/cloud.cfg.d/99-cloudlet-network.cfg", "network:\n  config: disabled\n", 0o644, why)
}

fn interface_report(interface: &Interface) -> InterfaceReport {
    let dynamic = [("dhcp4", interface.dhcp4), ("dhcp6", interface.dhcp6), ("slaac", interface.accept_ra == Some(true))];
    InterfaceReport {
        name: interface.name.to_string(),
        kind: interface.kind.name(),
        mac: interface.mac.map(|mac| mac.to_string()),
        addresses: interface.addresses.iter().map(Cidr::to_string).collect(),
        dynamic: dynamic.into_iter().filter(|(_, on)| *on).map(|(name, _)| name.to_owned()).collect(),
    }
}

/// Resolvers and search domains that go on one link.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkDns<'n> {
    /// Servers in order.
    pub servers: Vec<IpAddr>,
    /// Domains in order.
    pub search: Vec<&'n Hostname>,
}

/// DNS per interface for back-ends that know it only per link. What holds for the whole system goes on every interface with a default route, or,
/// without any, on the first that has an address; a link without either could not reach a resolver.
pub fn link_dns(network: &Network) -> Vec<LinkDns<'_>> {
    let routed = |interface: &Interface| {
        interface.gateway4.is_some()
            || interface.gateway6.is_some()
            || interface.routes.iter().any(|route| route.to.prefix == 0 && route.table.is_none())
    };
    let addressed =
        |interface: &Interface| !interface.addresses.is_empty() || interface.dhcp4 || interface.dhcp6 || interface.accept_ra == Some(true);
    let any_routed = network.interfaces.iter().any(routed);
    let fallback = network.interfaces.iter().position(addressed);
    network
        .interfaces
        .iter()
        .enumerate()
        .map(|(index, interface)| {
            if network.master(&interface.name).is_some() {
                return LinkDns::default();
            }
            let carries = if any_routed { routed(interface) } else { fallback == Some(index) };
            let mut dns = LinkDns { servers: interface.nameservers.clone(), search: interface.search.iter().collect() };
            if carries {
                let (servers, search) = (dns.servers.clone(), dns.search.clone());
                dns.servers.extend(network.nameservers.iter().filter(|server| !servers.contains(server)));
                dns.search.extend(network.search.iter().filter(|domain| !search.contains(domain)));
            }
            dns
        })
        .collect()
}

impl Cidr {
    /// Whether `address` is inside this network. A /32 or /128 contains only itself.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                let mask = u32::MAX.checked_shl(32u32.saturating_sub(u32::from(self.prefix))).unwrap_or(0);
                u32::from(own) & mask == u32::from(other) & mask
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                let mask = u128::MAX.checked_shl(128u32.saturating_sub(u32::from(self.prefix))).unwrap_or(0);
                u128::from(own) & mask == u128::from(other) & mask
            }
            _ => false,
        }
    }
}

impl Cidr {
    /// The network that the address is in: host bits cleared.
    pub fn network(&self) -> Cidr {
        let address = match self.address {
            IpAddr::V4(own) => {
                let mask = u32::MAX.checked_shl(32u32.saturating_sub(u32::from(self.prefix))).unwrap_or(0);
                IpAddr::V4((u32::from(own) & mask).into())
            }
            IpAddr::V6(own) => {
                let mask = u128::MAX.checked_shl(128u32.saturating_sub(u32::from(self.prefix))).unwrap_or(0);
                IpAddr::V6((u128::from(own) & mask).into())
            }
        };
        Cidr { address, prefix: self.prefix }
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// Whether an IPv6 address is link-local (fe80::/10), reachable on any link without an address of its network.
pub fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.segments()[0] & 0xffc0 == 0xfe80)
}

impl Interface {
    /// Whether a gateway needs an explicit on-link route: no address of this interface contains it and it is not link-local.
    pub fn is_off_subnet(&self, gateway: IpAddr) -> bool {
        !is_link_local(gateway) && !self.addresses.iter().any(|cidr| cidr.contains(gateway))
    }

    /// The default gateways, IPv4 first.
    pub fn gateways(&self) -> impl Iterator<Item = IpAddr> {
        self.gateway4.map(IpAddr::V4).into_iter().chain(self.gateway6.map(IpAddr::V6))
    }

    /// Static addresses of one family.
    pub fn family(&self, v6: bool) -> impl Iterator<Item = &Cidr> {
        self.addresses.iter().filter(move |cidr| cidr.address.is_ipv6() == v6)
    }
}
