//! netplan: one YAML document, mode 0600 because netplan warns about and distrusts anything wider (it may hold secrets of Wi-Fi and tunnels).
//! Reference: netplan's YAML configuration reference. Default routes are `routes: - to: default`; `gateway4` is deprecated since 0.103.
//!
//! netplan merges all its files, key by key, so the image's own are removed (`conflicts`).

use std::{fmt::Write as _, net::IpAddr};

use crate::{
    error::{Error, Result, Stage},
    guest::{
        config::{BackendKind, Bond, Bridge, Interface, LinkKind, Network, RouteKind},
        enablement::{State, unit_state},
        facts::GuestFacts,
        network::{Guest, GuestFile, LinkDns, NetRenderer, Presence, Rendered, link_dns, links::MIIMON_MS_DEFAULT},
        tree::present,
    },
};

/// The file that is written.
pub const FILE: &str = "/etc/netplan/50-cloudlet.yaml";

/// The renderer for netplan.
pub struct Netplan;

impl NetRenderer for Netplan {
    fn kind(&self) -> BackendKind {
        BackendKind::Netplan
    }

    fn presence(&self, facts: &GuestFacts) -> Presence {
        let found = ["/usr/sbin/netplan", "/usr/libexec/netplan", "/usr/lib/netplan"].into_iter().find(|path| present(facts, path));
        // Its systemd generator runs at every boot: being there is being enabled.
        found.map_or(Presence::Absent, |path| Presence::Enabled(format!("{path} is in the image")))
    }

    fn owns(&self, path: &str) -> bool {
        path.strip_prefix("/etc/netplan/").is_some_and(|name| name.ends_with(".yaml"))
    }

    fn render(&self, network: &Network, guest: &Guest<'_>) -> Result<Rendered> {
        let content = document(network, Reader::Netplan { daemon: daemon(guest.facts) }, FILE)?;
        let file = GuestFile { path: FILE.into(), content, mode: 0o600, why: "network configuration for netplan".into() };
        Ok(Rendered { files: vec![file], ..Rendered::default() })
    }
}

/// Who reads a version 2 document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    /// netplan itself.
    Netplan {
        /// What netplan writes for.
        daemon: &'static str,
    },
    /// cloud-init, from a seed: no enclosing `network`, no renderer, and destinations as networks.
    CloudInit,
}

/// The whole network as a version 2 document; `path` is for errors.
pub(crate) fn document(network: &Network, reader: Reader, path: &str) -> Result<String> {
    let mut yaml = Yaml::default();
    if let Reader::Netplan { daemon } = reader {
        yaml.line(0, "network:");
        yaml.indent = 1;
        yaml.line(0, "version: 2");
        yaml.line(0, &format!("renderer: {daemon}"));
    } else {
        yaml.line(0, "version: 2");
    }
    let dns = link_dns(network);
    for (section, kind) in [("ethernets", "ethernet"), ("bonds", "bond"), ("bridges", "bridge"), ("vlans", "vlan")] {
        let mut some = false;
        for (interface, dns) in network.interfaces.iter().zip(&dns).filter(|(interface, _)| interface.kind.name() == kind) {
            if !some {
                yaml.line(0, &format!("{section}:"));
                some = true;
            }
            link(&mut yaml, network, interface, dns, reader);
        }
    }
    yaml.finish(path)
}

/// networkd, which netplan starts by itself, unless the image is one that runs NetworkManager instead (a desktop).
fn daemon(facts: &GuestFacts) -> &'static str {
    // A link says more than a preset: Debian's systemd has a preset for networkd, whatever the image uses.
    let claim = |unit| match unit_state(facts, unit) {
        State::Enabled(_) => 2,
        State::Preset(_) => 1,
        State::Disabled | State::Absent => 0,
    };
    let networkd = present(facts, "/usr/lib/systemd/systemd-networkd");
    let manager = present(facts, "/usr/sbin/NetworkManager");
    if manager && (!networkd || claim("NetworkManager.service") > claim("systemd-networkd.service")) { "NetworkManager" } else { "networkd" }
}

fn link(yaml: &mut Yaml, network: &Network, interface: &Interface, dns: &LinkDns<'_>, reader: Reader) {
    yaml.line(1, &format!("{}:", quote(interface.name.as_str())));
    match (&interface.kind, interface.mac) {
        (LinkKind::Ethernet, Some(mac)) => {
            yaml.line(2, "match:");
            yaml.line(3, &format!("macaddress: {}", quote(&mac.to_string())));
            yaml.line(2, &format!("set-name: {}", quote(interface.name.as_str())));
        }
        (_, Some(mac)) => yaml.line(2, &format!("macaddress: {}", quote(&mac.to_string()))),
        _ => {}
    }
    match &interface.kind {
        LinkKind::Ethernet => {}
        LinkKind::Bond(bond) => bond_keys(yaml, bond),
        LinkKind::Bridge(bridge) => bridge_keys(yaml, bridge),
        LinkKind::Vlan(vlan) => {
            yaml.line(2, &format!("id: {}", vlan.id));
            yaml.line(2, &format!("link: {}", quote(vlan.link.as_str())));
        }
    }
    yaml.line(2, &format!("dhcp4: {}", interface.dhcp4));
    yaml.line(2, &format!("dhcp6: {}", interface.dhcp6));
    if let Some(metric) = interface.metric {
        for (key, on) in [("dhcp4-overrides", interface.dhcp4), ("dhcp6-overrides", interface.dhcp6)] {
            if on {
                yaml.line(2, &format!("{key}:"));
                yaml.line(3, &format!("route-metric: {metric}"));
            }
        }
    }
    if let Some(accept) = interface.accept_ra {
        yaml.line(2, &format!("accept-ra: {accept}"));
    }
    if let Some(prefer) = interface.ipv6_privacy {
        yaml.line(2, &format!("ipv6-privacy: {prefer}"));
    }
    // A member has nothing to say on its own.
    let is_member = network.master(&interface.name).is_some();
    if interface.link_local == Some(false) || is_member {
        yaml.line(2, "link-local: []");
    }
    if let Some(mtu) = interface.mtu {
        yaml.line(2, &format!("mtu: {mtu}"));
    }
    if interface.is_bare() || interface.optional {
        // Nothing to wait for: the boot must not hang on network-online.target.
        yaml.line(2, "optional: true");
    }
    yaml.list(2, "addresses", interface.addresses.iter().map(ToString::to_string));
    routes(yaml, interface, reader);
    rules(yaml, interface);
    if !dns.servers.is_empty() || !dns.search.is_empty() {
        yaml.line(2, "nameservers:");
        yaml.list(3, "addresses", dns.servers.iter().map(ToString::to_string));
        yaml.list(3, "search", dns.search.iter().map(ToString::to_string));
    }
}

fn rules(yaml: &mut Yaml, interface: &Interface) {
    if interface.rules.is_empty() {
        return;
    }
    yaml.line(2, "routing-policy:");
    for rule in &interface.rules {
        let mut dash = "- ";
        for (key, cidr) in [("from", rule.from), ("to", rule.to)] {
            if let Some(cidr) = cidr {
                let level = if dash.is_empty() { 4 } else { 3 };
                yaml.line(level, &format!("{}{key}: {}", std::mem::take(&mut dash), quote(&cidr.to_string())));
            }
        }
        yaml.line(4, &format!("table: {}", rule.table));
        for (key, value) in [("priority", rule.priority), ("mark", rule.mark)] {
            if let Some(value) = value {
                yaml.line(4, &format!("{key}: {value}"));
            }
        }
    }
}

fn routes(yaml: &mut Yaml, interface: &Interface, reader: Reader) {
    let default = |v6: bool| match reader {
        Reader::Netplan { .. } => "default",
        Reader::CloudInit if v6 => "::/0",
        Reader::CloudInit => "0.0.0.0/0",
    };
    // cloud-init 22.4 takes `::/0` for a network of /64: what can be said as a gateway is.
    let is_key = |gateway: &IpAddr| reader == Reader::CloudInit && interface.metric.is_none() && !interface.is_off_subnet(*gateway);
    for gateway in interface.gateways().filter(is_key) {
        yaml.line(2, &format!("gateway{}: {}", if gateway.is_ipv6() { 6 } else { 4 }, quote(&gateway.to_string())));
    }
    if interface.gateways().all(|gateway| is_key(&gateway)) && interface.routes.is_empty() {
        return;
    }
    yaml.line(2, "routes:");
    for gateway in interface.gateways().filter(|gateway| !is_key(gateway)) {
        yaml.line(3, &format!("- to: {}", quote(default(gateway.is_ipv6()))));
        yaml.line(4, &format!("via: {}", quote(&gateway.to_string())));
        if interface.is_off_subnet(gateway) {
            yaml.line(4, "on-link: true");
        }
        if let Some(metric) = interface.metric {
            yaml.line(4, &format!("metric: {metric}"));
        }
    }
    for route in &interface.routes {
        let to = if route.to.prefix == 0 && route.via.is_some() { default(route.to.address.is_ipv6()).to_owned() } else { route.to.to_string() };
        yaml.line(3, &format!("- to: {}", quote(&to)));
        match route.via {
            Some(via) => {
                yaml.line(4, &format!("via: {}", quote(&via.to_string())));
                if route.on_link {
                    yaml.line(4, "on-link: true");
                }
            }
            None if route.kind != RouteKind::Unicast => yaml.line(4, &format!("type: {}", route.kind.name())),
            // A route without a next hop is one of link scope.
            None => yaml.line(4, "scope: link"),
        }
        if let Some(metric) = route.metric {
            yaml.line(4, &format!("metric: {metric}"));
        }
        if let Some(table) = route.table {
            yaml.line(4, &format!("table: {table}"));
        }
    }
}

fn bond_keys(yaml: &mut Yaml, bond: &Bond) {
    yaml.list(2, "interfaces", bond.members.iter().map(ToString::to_string));
    yaml.line(2, "parameters:");
    yaml.line(3, &format!("mode: {}", quote(bond.mode.name())));
    yaml.line(3, &format!("mii-monitor-interval: {}", bond.miimon_ms.unwrap_or(MIIMON_MS_DEFAULT)));
    if let Some(primary) = &bond.primary {
        yaml.line(3, &format!("primary: {}", quote(primary.as_str())));
    }
    if let Some(rate) = bond.lacp_rate {
        yaml.line(3, &format!("lacp-rate: {}", quote(rate.name())));
    }
    if let Some(policy) = bond.hash_policy {
        yaml.line(3, &format!("transmit-hash-policy: {}", quote(policy.name())));
    }
}

fn bridge_keys(yaml: &mut Yaml, bridge: &Bridge) {
    yaml.list(2, "interfaces", bridge.members.iter().map(ToString::to_string));
    yaml.line(2, "parameters:");
    yaml.line(3, &format!("stp: {}", bridge.stp));
    for (name, value) in bridge.options().into_iter().filter(|(name, _)| *name != "stp_state") {
        yaml.line(3, &format!("{}: {value}", name.replace('_', "-")));
    }
}

/// Writes block-style YAML, two blanks per level.
#[derive(Default)]
struct Yaml {
    text: String,
    /// Levels before the first.
    indent: usize,
    bad: bool,
}

impl Yaml {
    fn line(&mut self, level: usize, text: &str) {
        self.bad |= text.chars().any(char::is_control);
        let _ = writeln!(self.text, "{:indent$}{text}", "", indent = (level + self.indent) * 2);
    }

    fn list(&mut self, level: usize, key: &str, items: impl Iterator<Item = String>) {
        for (index, item) in items.enumerate() {
            if index == 0 {
                self.line(level, &format!("{key}:"));
            }
            self.line(level + 1, &format!("- {}", quote(&item)));
        }
    }

    fn finish(self, path: &str) -> Result<String> {
        if self.bad {
            Err(Error::internal(Stage::Inject, path, "a value contains control characters"))
        } else {
            Ok(format!("# Written by cloudletd.\n{}", self.text))
        }
    }
}

/// A double-quoted YAML scalar (YAML 1.2, 7.3.1). Quoting is never optional: `1:20` is a number in YAML 1.1, and a MAC of digits is one too.
fn quote(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_are_quoted_and_lines_can_not_be_broken() {
        assert_eq!(quote("a\"b\\"), "\"a\\\"b\\\\\"");
        let mut yaml = Yaml::default();
        yaml.line(0, "a\nb");
        assert!(yaml.finish(FILE).is_err());
    }
}
