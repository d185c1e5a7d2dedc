//! systemd-networkd: one `.network` file per interface (systemd.network(5)), mode 0644 because the daemon runs as its own user and must read it.
//!
//! Files are matched in the order of their names and the first match wins, for all directories together; ours sort before what distributions
//! ship (80- and up). With a MAC the match is by MAC and `Type=ether`, so that a VLAN made on top, which inherits the MAC, does not match.

use crate::{
    error::Result,
    guest::{
        config::{BackendKind, Interface, Network},
        enablement::{State, unit_state},
        facts::GuestFacts,
        network::{Guest, GuestFile, GuestLink, LinkDns, NetRenderer, Presence, Rendered, ini::Ini, link_dns},
        tree::{in_lib, present},
    },
};

const UNIT: &str = "systemd-networkd.service";

/// The links that `systemctl enable systemd-networkd` makes (its `[Install]` section): link, unit.
const ENABLE: [(&str, &str); 5] = [
    ("multi-user.target.wants/systemd-networkd.service", UNIT),
    ("dbus-org.freedesktop.network1.service", UNIT),
    ("sockets.target.wants/systemd-networkd.socket", "systemd-networkd.socket"),
    ("network-online.target.wants/systemd-networkd-wait-online.service", "systemd-networkd-wait-online.service"),
    ("sysinit.target.wants/systemd-network-generator.service", "systemd-network-generator.service"),
];

/// The renderer for systemd-networkd.
pub struct Networkd;

impl NetRenderer for Networkd {
    fn kind(&self) -> BackendKind {
        BackendKind::Networkd
    }

    fn presence(&self, facts: &GuestFacts) -> Presence {
        if !present(facts, "/usr/lib/systemd/systemd-networkd") {
            return Presence::Absent;
        }
        match unit_state(facts, UNIT) {
            State::Enabled(link) => Presence::Enabled(format!("{link} starts systemd-networkd")),
            State::Preset(file) => Presence::Preset(format!("{file} would enable systemd-networkd at the first boot")),
            State::Disabled => Presence::Installed("systemd-networkd is in the image, not enabled".into()),
            State::Absent => Presence::Absent,
        }
    }

    fn owns(&self, path: &str) -> bool {
        path.strip_prefix("/etc/systemd/network/").is_some_and(|name| name.ends_with(".network") || name.ends_with(".netdev"))
    }

    fn render(&self, network: &Network, guest: &Guest<'_>) -> Result<Rendered> {
        let mut rendered = Rendered::default();
        for (interface, dns) in network.interfaces.iter().zip(link_dns(network)) {
            let path = format!("/etc/systemd/network/10-cloudlet-{}.network", interface.name);
            let content = network_file(interface, &dns).finish(&path)?;
            rendered.files.push(GuestFile { path, content, mode: 0o644, why: format!("network configuration of {}", interface.name) });
        }
        if !matches!(unit_state(guest.facts, UNIT), State::Enabled(_)) {
            rendered.notes.push("systemd-networkd is enabled by links: the image does not start it by itself".into());
            for (link, unit) in ENABLE {
                if let Some(target) = in_lib(guest.facts, &format!("systemd/system/{unit}")) {
                    let path = format!("/etc/systemd/system/{link}");
                    rendered.links.push(GuestLink { path, target, why: "enables systemd-networkd".into() });
                }
            }
        }
        Ok(rendered)
    }
}

fn network_file(interface: &Interface, dns: &LinkDns<'_>) -> Ini {
    let mut ini = Ini::new();
    ini.section("Match");
    match interface.mac {
        Some(mac) => {
            ini.set("MACAddress", mac);
            ini.set("Type", "ether");
        }
        None => ini.set("Name", &interface.name),
    }
    let idle = interface.addresses.is_empty() && !interface.dhcp4 && !interface.dhcp6 && interface.accept_ra != Some(true);
    if interface.mtu.is_some() || idle {
        ini.section("Link");
        if let Some(mtu) = interface.mtu {
            ini.set("MTUBytes", mtu);
        }
        if idle {
            // Nothing to wait for: the boot must not hang on network-online.target.
            ini.set("RequiredForOnline", "no");
        }
    }
    ini.section("Network");
    ini.set(
        "DHCP",
        match (interface.dhcp4, interface.dhcp6) {
            (true, true) => "yes",
            (true, false) => "ipv4",
            (false, true) => "ipv6",
            (false, false) => "no",
        },
    );
    if let Some(accept) = interface.accept_ra {
        ini.set("IPv6AcceptRA", if accept { "yes" } else { "no" });
    }
    for address in &interface.addresses {
        ini.set("Address", address);
    }
    for server in &dns.servers {
        ini.set("DNS", server);
    }
    if !dns.search.is_empty() {
        ini.set("Domains", dns.search.iter().map(|domain| domain.as_str()).collect::<Vec<_>>().join(" "));
    }
    routes(&mut ini, interface);
    if let Some(metric) = interface.metric {
        for (section, on) in [("DHCPv4", interface.dhcp4), ("IPv6AcceptRA", interface.accept_ra == Some(true) || interface.dhcp6)] {
            if on {
                ini.section(section);
                ini.set("RouteMetric", metric);
            }
        }
    }
    ini
}

fn routes(ini: &mut Ini, interface: &Interface) {
    for gateway in interface.gateways() {
        ini.section("Route");
        ini.set("Gateway", gateway);
        if interface.is_off_subnet(gateway) {
            ini.set("GatewayOnLink", "yes");
        }
        if let Some(metric) = interface.metric {
            ini.set("Metric", metric);
        }
    }
    for route in &interface.routes {
        ini.section("Route");
        ini.set("Destination", route.to);
        match route.via {
            Some(via) => ini.set("Gateway", via),
            None => ini.set("Scope", "link"),
        }
        if route.on_link && route.via.is_some() {
            ini.set("GatewayOnLink", "yes");
        }
        if let Some(metric) = route.metric {
            ini.set("Metric", metric);
        }
    }
}
