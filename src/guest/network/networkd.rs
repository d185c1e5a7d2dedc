//! systemd-networkd: one `.network` file per interface (systemd.network(5)), mode 0644 because the daemon runs as its own user and must read it.
//!
//! Files are matched in the order of their names and the first match wins, for all directories together; ours sort before what distributions
//! ship (80- and up). With a MAC the match is by MAC and `Type=ether`, so that a VLAN, bond or bridge on top, which inherits the MAC, does not match.

use crate::{
    error::Result,
    guest::{
        config::{BackendKind, Bond, Bridge, Interface, LinkKind, Network, RouteKind, Vlan},
        enablement::{State, unit_state},
        facts::GuestFacts,
        network::{Guest, GuestFile, GuestLink, LinkDns, NetRenderer, Presence, Rendered, ini::Ini, link_dns, links::MIIMON_MS_DEFAULT},
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
            let content = network_file(network, interface, &dns).finish(&path)?;
            rendered.files.push(GuestFile { path, content, mode: 0o644, why: format!("network configuration of {}", interface.name) });
            if let Some(ini) = netdev_file(interface) {
                let path = format!("/etc/systemd/network/10-cloudlet-{}.netdev", interface.name);
                let why = format!("makes the {} {}", interface.kind.name(), interface.name);
                rendered.files.push(GuestFile { content: ini.finish(&path)?, path, mode: 0o644, why });
            }
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

/// The device itself (systemd.netdev(5)), unless it is a NIC.
fn netdev_file(interface: &Interface) -> Option<Ini> {
    let mut ini = Ini::new();
    ini.section("NetDev");
    ini.set("Name", &interface.name);
    let kind = (interface.kind != LinkKind::Ethernet).then(|| interface.kind.name())?;
    ini.set("Kind", kind);
    if let Some(mac) = interface.mac {
        ini.set("MACAddress", mac);
    }
    match &interface.kind {
        LinkKind::Ethernet => {}
        LinkKind::Bond(Bond { members: _, mode, primary: _, miimon_ms, lacp_rate, hash_policy }) => {
            ini.section("Bond");
            ini.set("Mode", mode.name());
            ini.set("MIIMonitorSec", format!("{}ms", miimon_ms.unwrap_or(MIIMON_MS_DEFAULT)));
            if let Some(rate) = lacp_rate {
                ini.set("LACPTransmitRate", rate.name());
            }
            if let Some(policy) = hash_policy {
                ini.set("TransmitHashPolicy", policy.name());
            }
        }
        LinkKind::Bridge(Bridge { members: _, stp, forward_delay, hello_time, max_age, ageing_time, priority }) => {
            ini.section("Bridge");
            ini.set("STP", if *stp { "yes" } else { "no" });
            for (key, value) in [
                ("ForwardDelaySec", forward_delay),
                ("HelloTimeSec", hello_time),
                ("MaxAgeSec", max_age),
                ("AgeingTimeSec", ageing_time),
                ("Priority", priority),
            ] {
                if let Some(value) = value {
                    ini.set(key, value);
                }
            }
        }
        LinkKind::Vlan(Vlan { id, link: _ }) => {
            ini.section("VLAN");
            ini.set("Id", id);
        }
    }
    Some(ini)
}

fn match_section(ini: &mut Ini, network: &Network, interface: &Interface) {
    ini.section("Match");
    match interface.mac.filter(|_| interface.kind == LinkKind::Ethernet) {
        // A member of a bond gets the bond's MAC; its own is the permanent one (systemd 247).
        Some(mac) if network.master(&interface.name).is_some_and(|master| master.is_bond) => ini.set("PermanentMACAddress", mac),
        Some(mac) => {
            ini.set("MACAddress", mac);
            ini.set("Type", "ether");
        }
        None => ini.set("Name", &interface.name),
    }
}

fn network_file(network: &Network, interface: &Interface, dns: &LinkDns<'_>) -> Ini {
    let mut ini = Ini::new();
    match_section(&mut ini, network, interface);
    let idle = interface.is_bare() || interface.optional;
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
    if let Some(master) = network.master(&interface.name) {
        ini.set(if master.is_bond { "Bond" } else { "Bridge" }, master.name);
        let bond = network.interfaces.iter().find(|other| other.name == *master.name).map(|other| &other.kind);
        if matches!(bond, Some(LinkKind::Bond(bond)) if bond.primary.as_ref() == Some(&interface.name)) {
            ini.set("PrimarySlave", "yes");
        }
    }
    for (vlan, _) in network.vlans_on(&interface.name) {
        ini.set("VLAN", vlan);
    }
    if matches!(&interface.kind, LinkKind::Bridge(_)) {
        // A bridge without members, or whose members are down, has no carrier and has its addresses all the same, as everywhere else.
        ini.set("ConfigureWithoutCarrier", "yes");
    }
    if interface.link_local == Some(false) || network.master(&interface.name).is_some() {
        ini.set("LinkLocalAddressing", "no");
    }
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
    if let Some(prefer) = interface.ipv6_privacy {
        ini.set("IPv6PrivacyExtensions", if prefer { "yes" } else { "no" });
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
            None if route.kind != RouteKind::Unicast => ini.set("Type", route.kind.name()),
            None => ini.set("Scope", "link"),
        }
        if route.on_link && route.via.is_some() {
            ini.set("GatewayOnLink", "yes");
        }
        if let Some(metric) = route.metric {
            ini.set("Metric", metric);
        }
        if let Some(table) = route.table {
            ini.set("Table", table);
        }
    }
    for rule in &interface.rules {
        ini.section("RoutingPolicyRule");
        for (key, cidr) in [("From", rule.from), ("To", rule.to)] {
            if let Some(cidr) = cidr {
                ini.set(key, cidr);
            }
        }
        if let Some(mark) = rule.mark {
            ini.set("FirewallMark", mark);
        }
        ini.set("Table", rule.table);
        if let Some(priority) = rule.priority {
            ini.set("Priority", priority);
        }
    }
}
