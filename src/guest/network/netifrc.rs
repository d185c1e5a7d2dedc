//! Gentoo's netifrc: /etc/conf.d/net, a file of shell variables (net.example of netifrc), and one service per interface, a link to `net.lo`.
//!
//! Variables are named after the interface, with `_` for what a shell name can't have. VLANs are started by the interface that carries them and
//! have no service of their own. Kernel settings that netifrc has no variable for are written by `preup` and `postup`: devices that netifrc makes
//! exist only after the first.

use std::net::IpAddr;

use crate::{
    error::{Error, Kind, Result, Stage},
    guest::{
        config::{BackendKind, Interface, LinkKind, Network, RouteKind, Rule},
        enablement::init_script_links,
        facts::GuestFacts,
        network::{Guest, GuestFile, GuestLink, LinkDns, NetRenderer, Presence, Rendered, link_dns, shell::ShellFile},
        resolv::Resolver,
        tree::present,
    },
};

/// The file that is written.
pub const FILE: &str = "/etc/conf.d/net";

/// The renderer for netifrc.
pub struct Netifrc;

impl NetRenderer for Netifrc {
    fn kind(&self) -> BackendKind {
        BackendKind::Netifrc
    }

    fn presence(&self, facts: &GuestFacts) -> Presence {
        if !present(facts, "/usr/lib/netifrc") || !present(facts, "/etc/init.d/net.lo") {
            return Presence::Absent;
        }
        match service_links(facts).into_iter().next() {
            Some(link) => Presence::Enabled(format!("{link} starts netifrc")),
            None => Presence::Installed("netifrc is in the image, no interface of it is started".into()),
        }
    }

    fn owns(&self, path: &str) -> bool {
        path == FILE
    }

    fn render(&self, network: &Network, guest: &Guest<'_>) -> Result<Rendered> {
        let mut rendered = Rendered::default();
        let mut file = ShellFile::new();
        let mut settings = Vec::new();
        check_names(network)?;
        let all_dns = link_dns(network);
        for at in network.bottom_up() {
            let interface = &network.interfaces[at];
            let dns = if guest.resolver == Resolver::Resolvconf { all_dns[at].clone() } else { LinkDns::default() };
            variables(&mut file, network, interface, &dns);
            settings.extend(kernel_settings(network, interface));
            // A VLAN is started by its link, a member by its bond or bridge.
            if interface.vlan().is_none() && network.master(&interface.name).is_none() {
                services(guest.facts, interface, &mut rendered);
            }
        }
        if !settings.is_empty() {
            file.raw("cloudlet_settings() {");
            file.raw("    case ${IFACE} in");
            settings.iter().for_each(|line| file.raw(line));
            file.raw("    esac");
            file.raw("    return 0");
            file.raw("}");
            file.raw("preup() { cloudlet_settings; }");
            file.raw("postup() { cloudlet_settings; }");
        }
        if guest.facts.exists(FILE) {
            rendered.notes.push(format!("{FILE} of the image is replaced"));
        }
        let content = file.finish(FILE)?;
        rendered.files.push(GuestFile { path: FILE.into(), content, mode: 0o644, why: "network configuration for netifrc".into() });
        let dhcp = network.interfaces.iter().any(|interface| interface.dhcp4 || interface.dhcp6);
        if dhcp && !["/usr/sbin/dhcpcd", "/usr/sbin/dhclient", "/usr/sbin/udhcpc"].iter().any(|path| present(guest.facts, path)) {
            rendered.warnings.push("DHCP is asked for, but the image has none of dhcpcd, dhclient and udhcpc".into());
        }
        Ok(rendered)
    }
}

/// The services of interfaces that a runlevel starts.
pub fn service_links(facts: &GuestFacts) -> Vec<String> {
    let services = facts.children("/etc/init.d").map(|(name, _)| name).filter(|name| name.starts_with("net.") && *name != "net.lo");
    services.flat_map(|name| init_script_links(facts, name)).collect()
}

fn services(facts: &GuestFacts, interface: &Interface, rendered: &mut Rendered) {
    let service = format!("/etc/init.d/net.{}", interface.name);
    let link = |path: String, target: &str| GuestLink { path, target: target.to_owned(), why: format!("starts {}", interface.name) };
    if facts.node(&service).is_none() {
        rendered.links.push(link(service.clone(), "net.lo"));
    }
    rendered.links.push(link(format!("/etc/runlevels/default/net.{}", interface.name), &service));
}

/// The part of a variable that names an interface.
fn variable(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

/// Names that differ only in what a shell name can't have would share their variables.
fn check_names(network: &Network) -> Result<()> {
    for (index, interface) in network.interfaces.iter().enumerate() {
        let own = variable(interface.name.as_str());
        if let Some(other) = network.interfaces[..index].iter().find(|other| variable(other.name.as_str()) == own) {
            let message = format!("netifrc can't tell {} from {}: both are {own} in its variables", interface.name, other.name);
            return Err(Error::new(Kind::Unsupported, Stage::Inject, "network", message).with_reason("NETWORK_NOT_EXPRESSIBLE"));
        }
    }
    Ok(())
}

fn variables(file: &mut ShellFile, network: &Network, interface: &Interface, dns: &LinkDns<'_>) {
    let own = variable(interface.name.as_str());
    if let Some(mac) = interface.mac.filter(|_| interface.kind != LinkKind::Ethernet && interface.vlan().is_none()) {
        file.set(&format!("mac_{own}"), mac);
    }
    match &interface.kind {
        LinkKind::Ethernet | LinkKind::Vlan(_) => {}
        LinkKind::Bond(bond) => {
            file.set(&format!("slaves_{own}"), words(bond.members.iter()));
            for (name, value) in bond.options() {
                file.set(&format!("{name}_{own}"), value);
            }
            if let Some(primary) = &bond.primary {
                file.set(&format!("primary_{own}"), primary);
            }
        }
        LinkKind::Bridge(bridge) => {
            file.set(&format!("bridge_{own}"), words(bridge.members.iter()));
            for (name, value) in bridge.sysfs_options() {
                file.set(&format!("bridge_{name}_{own}"), value);
            }
        }
    }
    let vlans: Vec<_> = network.vlans_on(&interface.name).collect();
    if !vlans.is_empty() {
        file.set(&format!("vlans_{own}"), words(vlans.iter().map(|(_, vlan)| vlan.id)));
    }
    for (name, vlan) in vlans {
        file.set(&format!("{own}_vlan{}_name", vlan.id), name);
        if let Some(mac) = network.interfaces.iter().find(|other| other.name == *name).and_then(|other| other.mac) {
            file.set(&format!("{own}_vlan{}_mac", vlan.id), mac);
        }
    }
    if let Some(mtu) = interface.mtu {
        file.set(&format!("mtu_{own}"), mtu);
    }
    let mut config: Vec<String> = interface.addresses.iter().map(ToString::to_string).collect();
    config.extend(interface.dhcp4.then(|| "dhcp".to_owned()));
    config.extend(interface.dhcp6.then(|| "dhcpv6".to_owned()));
    if interface.dhcp4 && !interface.dhcp6 {
        // dhcpcd would ask for IPv6 as well.
        file.set(&format!("dhcpcd_{own}"), "-4");
    }
    if config.is_empty() {
        config.push("null".into());
    }
    file.set_lines(&format!("config_{own}"), &config);
    file.set_lines(&format!("routes_{own}"), &routes(interface));
    for (v6, variable) in [(false, "rules"), (true, "rules6")] {
        let rules: Vec<String> = interface.rules.iter().filter(|rule| rule.is_ipv6() == v6).map(Rule::words).collect();
        if !rules.is_empty() {
            file.set_lines(&format!("{variable}_{own}"), &rules);
        }
    }
    if let Some(metric) = interface.metric {
        file.set(&format!("metric_{own}"), metric);
    }
    if !dns.servers.is_empty() {
        file.set(&format!("dns_servers_{own}"), words(dns.servers.iter()));
    }
    if !dns.search.is_empty() {
        file.set(&format!("dns_search_{own}"), words(dns.search.iter()));
    }
}

fn words(items: impl Iterator<Item = impl ToString>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join(" ")
}

/// Arguments of `ip route add` without the device, which netifrc adds.
fn routes(interface: &Interface) -> Vec<String> {
    let mut lines = Vec::new();
    let host = |hop: IpAddr| format!("{hop}/{}", if hop.is_ipv6() { 128 } else { 32 });
    // netifrc tells the family by a colon; `default` needs help.
    let default = |v6: bool| if v6 { "-6 default" } else { "default" };
    for gateway in interface.gateways() {
        if interface.is_off_subnet(gateway) {
            lines.push(host(gateway));
        }
        lines.push(format!("{} via {gateway}", default(gateway.is_ipv6())));
    }
    for route in &interface.routes {
        if let Some(via) = route.via.filter(|via| route.on_link && interface.is_off_subnet(*via)) {
            lines.push(host(via));
        }
        let mut line = if route.kind == RouteKind::Unicast { String::new() } else { format!("{} ", route.kind.name()) };
        line.push_str(&route.to.to_string());
        line.extend(route.via.map(|via| format!(" via {via}")));
        line.extend(route.metric.map(|metric| format!(" metric {metric}")));
        line.extend(route.table.map(|table| format!(" table {table}")));
        lines.push(line);
    }
    lines
}

fn kernel_settings(network: &Network, interface: &Interface) -> Option<String> {
    let mut settings: Vec<(&str, u8)> = Vec::new();
    if let Some(accept) = interface.accept_ra {
        settings.extend([("accept_ra", u8::from(accept)), ("autoconf", u8::from(accept))]);
    }
    if let Some(prefer) = interface.ipv6_privacy {
        settings.push(("use_tempaddr", if prefer { 2 } else { 0 }));
    }
    if interface.link_local == Some(false) || network.master(&interface.name).is_some() {
        settings.push(("addr_gen_mode", 1));
    }
    let commands: Vec<String> =
        settings.iter().map(|(name, value)| format!("echo {value} > /proc/sys/net/ipv6/conf/{}/{name}", interface.name)).collect();
    // Before the device is made there is no such file, and a kernel without IPv6 never has it.
    (!commands.is_empty()).then(|| format!("        {}) {{ {}; }} 2>/dev/null ;;", interface.name, commands.join("; ")))
}
