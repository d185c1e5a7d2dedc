//! SUSE's wicked: `ifcfg-*`, `ifroute-*` and `ifsysctl-*` in /etc/sysconfig/network (ifcfg(5), ifroute(5), wicked's client/suse/compat-suse.c).
//!
//! `BOOTPROTO` names everything dynamic, joined by `+`; static addresses always count beside it. Resolvers belong to netconfig, which
//! merges them into resolv.conf: see [`crate::guest::resolv`].

use std::net::IpAddr;

use crate::{
    error::Result,
    guest::{
        config::{BackendKind, Bond, Bridge, Interface, LinkKind, Network, RouteKind},
        enablement::{State, unit_state},
        facts::GuestFacts,
        network::{Guest, GuestFile, GuestLink, NetRenderer, Presence, Rendered, shell},
        tree::{in_lib, present},
    },
};

/// Where the files are.
pub const DIRECTORY: &str = "/etc/sysconfig/network";
const UNIT: &str = "wicked.service";

/// The links that `systemctl enable wicked` makes; wicked's own daemons come with it by `Also=`.
const ENABLE: [(&str, &str); 6] = [
    ("network.service", UNIT),
    ("network-online.target.wants/wicked.service", UNIT),
    ("multi-user.target.wants/wicked.service", UNIT),
    ("system-network.target.wants/wickedd-auto4.service", "wickedd-auto4.service"),
    ("system-network.target.wants/wickedd-dhcp4.service", "wickedd-dhcp4.service"),
    ("system-network.target.wants/wickedd-dhcp6.service", "wickedd-dhcp6.service"),
];

/// The renderer for wicked.
pub struct Wicked;

impl NetRenderer for Wicked {
    fn kind(&self) -> BackendKind {
        BackendKind::Wicked
    }

    fn presence(&self, facts: &GuestFacts) -> Presence {
        if !present(facts, "/usr/sbin/wicked") && !present(facts, "/usr/sbin/wickedd") {
            return Presence::Absent;
        }
        match unit_state(facts, UNIT) {
            State::Enabled(link) => Presence::Enabled(format!("{link} starts wicked")),
            State::Preset(file) => Presence::Preset(format!("{file} would enable wicked at the first boot")),
            State::Disabled => Presence::Installed("wicked is in the image, not enabled".into()),
            State::Absent => Presence::Absent,
        }
    }

    fn owns(&self, path: &str) -> bool {
        let name = path.strip_prefix(DIRECTORY).and_then(|rest| rest.strip_prefix('/'));
        name.is_some_and(|name| ["ifcfg-", "ifroute-", "ifrule-", "ifsysctl-"].iter().any(|prefix| name.starts_with(prefix)) && name != "ifcfg-lo")
    }

    fn render(&self, network: &Network, guest: &Guest<'_>) -> Result<Rendered> {
        let mut rendered = Rendered::default();
        for interface in &network.interfaces {
            let name = &interface.name;
            let mut add = |prefix: &str, content: String| {
                let why = format!("network configuration of {name}");
                rendered.files.push(GuestFile { path: format!("{DIRECTORY}/{prefix}-{name}"), content, mode: 0o644, why });
            };
            add("ifcfg", ifcfg(network, interface).finish(name.as_str())?);
            let routes = routes(interface);
            if !routes.is_empty() {
                add("ifroute", shell::lines(name.as_str(), &routes)?);
            }
            let rules: Vec<String> =
                interface.rules.iter().map(|rule| format!("{} {}", if rule.is_ipv6() { "ipv6" } else { "ipv4" }, rule.words())).collect();
            if !rules.is_empty() {
                add("ifrule", shell::lines(name.as_str(), &rules)?);
            }
            let settings = settings(network, interface);
            if !settings.is_empty() {
                add("ifsysctl", shell::lines(name.as_str(), &settings)?);
            }
        }
        if !matches!(unit_state(guest.facts, UNIT), State::Enabled(_)) {
            rendered.notes.push("wicked is enabled by links: the image does not start it by itself".into());
            for (link, unit) in ENABLE {
                if let Some(target) = in_lib(guest.facts, &format!("systemd/system/{unit}")) {
                    rendered.links.push(GuestLink { path: format!("/etc/systemd/system/{link}"), target, why: "enables wicked".into() });
                }
            }
        }
        Ok(rendered)
    }
}

fn boot_protocols(interface: &Interface) -> String {
    let dynamic: Vec<&str> = match (interface.dhcp4, interface.dhcp6) {
        (true, true) => vec!["dhcp4", "dhcp6"],
        (true, false) => vec!["dhcp4"],
        (false, true) => vec!["dhcp6"],
        (false, false) => Vec::new(),
    };
    // DHCPv6 brings the prefixes of router advertisements along.
    let auto = (interface.accept_ra == Some(true) && !interface.dhcp6).then_some("auto6");
    let all: Vec<&str> = dynamic.into_iter().chain(auto).collect();
    if all.is_empty() { "static".into() } else { all.join("+") }
}

fn ifcfg(network: &Network, interface: &Interface) -> shell::ShellFile {
    let mut file = shell::ShellFile::new();
    // Lists would be ambiguous unquoted; wicked reads shell quotes.
    let is_member = network.master(&interface.name).is_some();
    file.set("STARTMODE", "auto");
    file.set("BOOTPROTO", if is_member { "none".to_owned() } else { boot_protocols(interface) });
    for (index, cidr) in interface.addresses.iter().enumerate() {
        file.set(&if index == 0 { "IPADDR".to_owned() } else { format!("IPADDR_{index}") }, cidr);
    }
    if let Some(mtu) = interface.mtu {
        file.set("MTU", mtu);
    }
    if let Some(mac) = interface.mac.filter(|_| interface.kind != LinkKind::Ethernet) {
        file.set("LLADDR", mac);
    }
    match &interface.kind {
        LinkKind::Ethernet => {}
        LinkKind::Bond(bond) => {
            let Bond { members, primary, .. } = bond;
            let mut options: Vec<String> = bond.options().iter().map(|(name, value)| format!("{name}={value}")).collect();
            options.extend(primary.as_ref().map(|primary| format!("primary={primary}")));
            file.set("BONDING_MASTER", "yes");
            file.set("BONDING_MODULE_OPTS", options.join(" "));
            for (index, member) in members.iter().enumerate() {
                file.set(&format!("BONDING_SLAVE_{index}"), member);
            }
        }
        LinkKind::Bridge(Bridge { members, stp, forward_delay, hello_time, max_age, ageing_time, priority }) => {
            file.set("BRIDGE", "yes");
            file.set("BRIDGE_PORTS", members.iter().map(|member| member.as_str()).collect::<Vec<_>>().join(" "));
            file.set("BRIDGE_STP", if *stp { "on" } else { "off" });
            for (name, value) in [
                ("BRIDGE_FORWARDDELAY", forward_delay),
                ("BRIDGE_HELLOTIME", hello_time),
                ("BRIDGE_MAXAGE", max_age),
                ("BRIDGE_AGEINGTIME", ageing_time),
                ("BRIDGE_PRIORITY", priority),
            ] {
                if let Some(value) = value {
                    file.set(name, value);
                }
            }
        }
        LinkKind::Vlan(vlan) => {
            file.set("ETHERDEVICE", &vlan.link);
            file.set("VLAN_ID", vlan.id);
        }
    }
    file
}

/// `DESTINATION GATEWAY NETMASK INTERFACE OPTIONS`; a neighbour outside of all subnets is reached by a route of its own first.
fn routes(interface: &Interface) -> Vec<String> {
    let mut lines = Vec::new();
    let host = |hop: IpAddr| format!("{hop}/{} - - {}", if hop.is_ipv6() { 128 } else { 32 }, interface.name);
    for gateway in interface.gateways() {
        if interface.is_off_subnet(gateway) {
            lines.push(host(gateway));
        }
        let metric = interface.metric.map(|metric| format!(" metric {metric}")).unwrap_or_default();
        lines.push(format!("default {gateway} - {}{metric}", interface.name));
    }
    for route in &interface.routes {
        if let Some(via) = route.via.filter(|via| route.on_link && interface.is_off_subnet(*via)) {
            lines.push(host(via));
        }
        let via = route.via.map_or("-".to_owned(), |via| via.to_string());
        let mut line = format!("{} {via} - {}", route.to, if route.kind == RouteKind::Unicast { interface.name.as_str() } else { "-" });
        if route.kind != RouteKind::Unicast {
            line.push_str(&format!(" type {}", route.kind.name()));
        }
        line.extend(route.metric.map(|metric| format!(" metric {metric}")));
        line.extend(route.table.map(|table| format!(" table {table}")));
        lines.push(line);
    }
    lines
}

/// Kernel settings of the interface, which wicked applies with it.
fn settings(network: &Network, interface: &Interface) -> Vec<String> {
    let mut lines = Vec::new();
    let mut set = |name: &str, value: u8| lines.push(format!("net/ipv6/conf/{}/{name} = {value}", interface.name));
    if let Some(accept) = interface.accept_ra {
        set("accept_ra", u8::from(accept));
        set("autoconf", u8::from(accept));
    }
    if let Some(prefer) = interface.ipv6_privacy {
        set("use_tempaddr", if prefer { 2 } else { 0 });
    }
    if interface.link_local == Some(false) || network.master(&interface.name).is_some() {
        set("addr_gen_mode", 1);
    }
    lines
}
