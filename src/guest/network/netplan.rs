//! netplan: one YAML document, mode 0600 because netplan warns about and distrusts anything wider (it may hold secrets of Wi-Fi and tunnels).
//! Reference: netplan's YAML configuration reference. Default routes are `routes: - to: default`; `gateway4` is deprecated since 0.103.
//!
//! netplan merges all its files, key by key, so the image's own are removed (`conflicts`).

use std::fmt::Write as _;

use crate::{
    error::{Error, Result, Stage},
    guest::{
        config::{BackendKind, Interface, Network},
        enablement::{State, unit_state},
        facts::GuestFacts,
        network::{Guest, GuestFile, LinkDns, NetRenderer, Presence, Rendered, link_dns},
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
        let mut yaml = Yaml::default();
        yaml.line(0, "network:");
        yaml.line(1, "version: 2");
        yaml.line(1, &format!("renderer: {}", daemon(guest.facts)));
        if !network.interfaces.is_empty() {
            yaml.line(1, "ethernets:");
        }
        for (interface, dns) in network.interfaces.iter().zip(link_dns(network)) {
            ethernet(&mut yaml, interface, &dns);
        }
        let file = GuestFile { path: FILE.into(), content: yaml.finish()?, mode: 0o600, why: "network configuration for netplan".into() };
        Ok(Rendered { files: vec![file], ..Rendered::default() })
    }
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

fn ethernet(yaml: &mut Yaml, interface: &Interface, dns: &LinkDns<'_>) {
    yaml.line(2, &format!("{}:", quote(interface.name.as_str())));
    if let Some(mac) = interface.mac {
        yaml.line(3, "match:");
        yaml.line(4, &format!("macaddress: {}", quote(&mac.to_string())));
        yaml.line(3, &format!("set-name: {}", quote(interface.name.as_str())));
    }
    yaml.line(3, &format!("dhcp4: {}", interface.dhcp4));
    yaml.line(3, &format!("dhcp6: {}", interface.dhcp6));
    if let Some(metric) = interface.metric {
        for (key, on) in [("dhcp4-overrides", interface.dhcp4), ("dhcp6-overrides", interface.dhcp6)] {
            if on {
                yaml.line(3, &format!("{key}:"));
                yaml.line(4, &format!("route-metric: {metric}"));
            }
        }
    }
    if let Some(accept) = interface.accept_ra {
        yaml.line(3, &format!("accept-ra: {accept}"));
    }
    if let Some(mtu) = interface.mtu {
        yaml.line(3, &format!("mtu: {mtu}"));
    }
    if interface.addresses.is_empty() && !interface.dhcp4 && !interface.dhcp6 && interface.accept_ra != Some(true) {
        // Nothing to wait for: the boot must not hang on network-online.target.
        yaml.line(3, "optional: true");
    }
    yaml.list(3, "addresses", interface.addresses.iter().map(ToString::to_string));
    routes(yaml, interface);
    if !dns.servers.is_empty() || !dns.search.is_empty() {
        yaml.line(3, "nameservers:");
        yaml.list(4, "addresses", dns.servers.iter().map(ToString::to_string));
        yaml.list(4, "search", dns.search.iter().map(ToString::to_string));
    }
}

fn routes(yaml: &mut Yaml, interface: &Interface) {
    if interface.gateways().next().is_none() && interface.routes.is_empty() {
        return;
    }
    yaml.line(3, "routes:");
    for gateway in interface.gateways() {
        yaml.line(4, "- to: \"default\"");
        yaml.line(5, &format!("via: {}", quote(&gateway.to_string())));
        if interface.is_off_subnet(gateway) {
            yaml.line(5, "on-link: true");
        }
        if let Some(metric) = interface.metric {
            yaml.line(5, &format!("metric: {metric}"));
        }
    }
    for route in &interface.routes {
        let to = if route.to.prefix == 0 && route.via.is_some() { "default".to_owned() } else { route.to.to_string() };
        yaml.line(4, &format!("- to: {}", quote(&to)));
        match route.via {
            Some(via) => {
                yaml.line(5, &format!("via: {}", quote(&via.to_string())));
                if route.on_link {
                    yaml.line(5, "on-link: true");
                }
            }
            // A route without a next hop is one of link scope.
            None => yaml.line(5, "scope: link"),
        }
        if let Some(metric) = route.metric {
            yaml.line(5, &format!("metric: {metric}"));
        }
    }
}

/// Writes block-style YAML, two blanks per level.
#[derive(Default)]
struct Yaml {
    text: String,
    bad: bool,
}

impl Yaml {
    fn line(&mut self, level: usize, text: &str) {
        self.bad |= text.chars().any(char::is_control);
        let _ = writeln!(self.text, "{:indent$}{text}", "", indent = level * 2);
    }

    fn list(&mut self, level: usize, key: &str, items: impl Iterator<Item = String>) {
        for (index, item) in items.enumerate() {
            if index == 0 {
                self.line(level, &format!("{key}:"));
            }
            self.line(level + 1, &format!("- {}", quote(&item)));
        }
    }

    fn finish(self) -> Result<String> {
        if self.bad {
            Err(Error::internal(Stage::Inject, FILE, "a value contains control characters"))
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
        assert!(yaml.finish().is_err());
    }
}
