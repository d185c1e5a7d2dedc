//! The guest's network: one neutral model, one renderer per back-end, chosen by what the tree contains and starts.
//!
//! [`choose`] asks every renderer of [`PREFERENCE`]; [`apply`] removes what would shadow the new configuration ([`conflicts`]), lets the renderer
//! turn model and facts into files, pins interface names ([`link`]), keeps cloud-init off, and settles DNS ([`crate::guest::resolv`]). Renderers
//! are pure and know nothing of each other; another back-end is one file and one entry in the list.
//!
//! Values are typed (names, MACs, addresses, host names), so nothing that could break out of a line of configuration exists in the model; every
//! writer here refuses control characters all the same (failures.md 14).

pub mod conflicts;
pub mod ifupdown;
pub mod ini;
pub mod link;
pub mod netplan;
pub mod network_manager;
pub mod networkd;

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
        tree::present,
    },
    names::Hostname,
};

/// The renderers in the order of preference. netplan first: where it is installed it owns the others' files and writes them anew at each boot.
/// NetworkManager before networkd, because every systemd tree contains networkd but only those that use NetworkManager start it. ifupdown last:
/// it is the one that stays installed, unused, when an administrator moves to another.
pub const PREFERENCE: [&dyn NetRenderer; 4] = [&netplan::Netplan, &network_manager::NetworkManager, &networkd::Networkd, &ifupdown::Ifupdown];

/// What a tree says about one back-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// Not there.
    Absent,
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
        BackendKind::Networkd => &networkd::Networkd,
        BackendKind::Ifupdown => &ifupdown::Ifupdown,
    }
}

/// Picks the back-end: the one asked for if it is installed, else the first that the guest starts, else the first that a preset would start, else the
/// first that is installed. `None` when the tree has no network tooling.
pub fn choose(network: &Network, facts: &GuestFacts) -> Result<Option<(&'static dyn NetRenderer, String)>> {
    if let Some(kind) = network.backend {
        let renderer = renderer(kind);
        return match renderer.presence(facts) {
            Presence::Absent => {
                let message = format!("{} is asked for but the image does not contain it", kind.name());
                Err(Error::field(Stage::Inject, "network.backend", message).with_reason("BACKEND_NOT_IN_IMAGE"))
            }
            Presence::Installed(what) | Presence::Preset(what) | Presence::Enabled(what) => Ok(Some((renderer, format!("asked for; {what}")))),
        };
    }
    let found: Vec<_> = PREFERENCE.iter().map(|renderer| (*renderer, renderer.presence(facts))).collect();
    let enabled = found.iter().find_map(|(renderer, presence)| match presence {
        Presence::Enabled(why) => Some((*renderer, why.clone())),
        _ => None,
    });
    let preset = || {
        found.iter().find_map(|(renderer, presence)| match presence {
            Presence::Preset(why) => Some((*renderer, format!("{why}; nothing else is there that the guest starts"))),
            _ => None,
        })
    };
    let installed = || {
        found.iter().find_map(|(renderer, presence)| match presence {
            Presence::Installed(why) => Some((*renderer, format!("{why}; nothing else is there that the guest starts"))),
            _ => None,
        })
    };
    Ok(enabled.or_else(preset).or_else(installed))
}

/// Writes the network into the plan. `Kind::Unsupported` with reason `NO_NETWORK_BACKEND` when the image has nothing to configure interfaces with.
pub fn apply(plan: &mut Plan<'_>, facts: &GuestFacts, network: &Network, identity: &Identity) -> Result<NetworkReport> {
    let chosen = choose(network, facts)?;
    let template = plan.claimed().find(|path| match &chosen {
        Some((renderer, _)) => renderer.owns(path),
        None => PREFERENCE.iter().any(|renderer| renderer.owns(path)),
    });
    let template = template.map(str::to_owned);
    let (backend, why) = match (&chosen, &template) {
        (_, Some(path)) => ("template", format!("{path} is written by {}", plan.claimant(path).unwrap_or("a template"))),
        (Some((renderer, why)), None) => (renderer.kind().name(), why.clone()),
        (None, None) if network.interfaces.is_empty() => ("none", "the image has no network tooling and no interface is to be configured".to_owned()),
        (None, None) => return Err(no_backend()),
    };
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
        plan.notes.extend(rendered.notes);
        plan.warnings.extend(rendered.warnings);
    } else if template.is_some() {
        plan.notes.push(format!("the network configuration is left to the template of {}: no native file is written", template.unwrap_or_default()));
    }
    link::pin_names(plan, facts, network)?;
    keep_cloud_init_off(plan, facts)?;
    let resolv_conf = resolv::write_resolv_conf(plan, facts, network, chosen.as_ref().map(|(renderer, _)| renderer.kind()))?;
    Ok(NetworkReport { backend: backend.to_owned(), why, interfaces: network.interfaces.iter().map(interface_report).collect(), resolv_conf })
}

fn no_backend() -> Error {
    let names: Vec<&str> = PREFERENCE.iter().map(|renderer| renderer.kind().name()).collect();
    Error::new(Kind::Unsupported, Stage::Inject, "network", format!("the image has none of {}", names.join(", ")))
        .with_reason("NO_NETWORK_BACKEND")
        .with_hint("install one of them in the image, or let a template of the manifest write the configuration, or give no network")
}

/// cloud-init writes its own network configuration at every boot of a new instance unless told not to (cloud-init #4121).
fn keep_cloud_init_off(plan: &mut Plan<'_>, facts: &GuestFacts) -> Result<()> {
    if !present(facts, "/usr/bin/cloud-init") && !facts.exists("/etc/cloud/cloud.cfg") {
        return Ok(());
    }
    let why = "cloud-init would overwrite the network configuration";
    plan.write("/etc/cloud/cloud.cfg.d/99-cloudlet-network.cfg", "network:\n  config: disabled\n", 0o644, why)
}

fn interface_report(interface: &Interface) -> InterfaceReport {
    let dynamic = [("dhcp4", interface.dhcp4), ("dhcp6", interface.dhcp6), ("slaac", interface.accept_ra == Some(true))];
    InterfaceReport {
        name: interface.name.to_string(),
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
        interface.gateway4.is_some() || interface.gateway6.is_some() || interface.routes.iter().any(|route| route.to.prefix == 0)
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
