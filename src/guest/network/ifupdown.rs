//! ifupdown: /etc/network/interfaces (interfaces(5)) for Debian's ifupdown, Alpine's ifupdown-ng, and busybox.
//!
//! They share the file format and differ in what they know: busybox takes one stanza per interface and family, and a netmask instead of a prefix;
//! neither it nor ifupdown-ng knows `accept_ra`. What one of them lacks is done with commands that all three run the same way.
//!
//! The file is replaced as a whole; `source` lines for interfaces.d are kept when files stay there (`conflicts` removes those for our devices).

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr},
};

use crate::{
    error::{Error, Result, Stage},
    guest::{
        config::{BackendKind, Cidr, Interface, LinkKind, Network, RouteKind},
        enablement::{State, init_script_links, unit_state},
        facts::{GuestFacts, NodeKind},
        network::{Guest, GuestFile, GuestLink, LinkDns, NetRenderer, Presence, Rendered, conflicts, link_dns},
        resolv::Resolver,
        tree::{has_systemd, in_lib, present},
    },
};

/// The file that is written.
pub const FILE: &str = "/etc/network/interfaces";
/// Further stanzas of packages and administrators.
pub const DIRECTORY: &str = "/etc/network/interfaces.d";

/// Which program reads the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flavour {
    Debian,
    Ng,
    Busybox,
}

/// The renderer for ifupdown.
pub struct Ifupdown;

impl NetRenderer for Ifupdown {
    fn kind(&self) -> BackendKind {
        BackendKind::Ifupdown
    }

    fn presence(&self, facts: &GuestFacts) -> Presence {
        if !present(facts, "/usr/sbin/ifup") && !present(facts, "/usr/bin/ifup") {
            return Presence::Absent;
        }
        let unit = if has_systemd(facts) { unit_state(facts, "networking.service") } else { State::Absent };
        match (unit, init_script_links(facts, "networking").into_iter().next()) {
            (State::Enabled(link), _) | (_, Some(link)) => Presence::Enabled(format!("{link} starts ifup")),
            (State::Preset(file), None) => Presence::Preset(format!("{file} would enable ifup at the first boot")),
            (State::Disabled | State::Absent, None) => Presence::Installed("ifup is in the image, nothing starts it".into()),
        }
    }

    fn owns(&self, path: &str) -> bool {
        path == FILE || path.strip_prefix(DIRECTORY).is_some_and(|rest| rest.starts_with('/'))
    }

    fn render(&self, network: &Network, guest: &Guest<'_>) -> Result<Rendered> {
        let flavour = flavour(guest.facts);
        let mut text = String::from("# Written by cloudletd.\n");
        if conflicts::kept_interface_files(guest.facts, network) {
            text.push_str(&format!("source {DIRECTORY}/*\n"));
        }
        text.push_str("\nauto lo\niface lo inet loopback\n");
        let mut rendered = Rendered::default();
        let all_dns = link_dns(network);
        for at in network.bottom_up() {
            let dns = if guest.resolver.takes_ifupdown_options() { all_dns[at].clone() } else { LinkDns::default() };
            stanzas(&mut text, network, &network.interfaces[at], &dns, flavour)?;
        }
        check_clients(network, guest.facts, flavour, &mut rendered.warnings);
        rendered.files.push(GuestFile { path: FILE.into(), content: text, mode: 0o644, why: "network configuration for ifupdown".into() });
        enable(guest.facts, &mut rendered);
        Ok(rendered)
    }
}

fn flavour(facts: &GuestFacts) -> Flavour {
    let target = ["/usr/sbin/ifup", "/sbin/ifup", "/usr/bin/ifup", "/bin/ifup"].into_iter().find_map(|path| {
        match facts.node(&crate::guest::plan::canonical(facts, path)).map(|node| &node.kind) {
            Some(NodeKind::Symlink { target }) => Some(target.as_str()),
            _ => None,
        }
    });
    if target.is_some_and(|target| target.ends_with("busybox")) {
        Flavour::Busybox
    } else if facts.exists("/usr/libexec/ifupdown-ng") {
        Flavour::Ng
    } else {
        Flavour::Debian
    }
}

/// One stanza under construction.
struct Stanza {
    head: String,
    lines: Vec<String>,
}

impl Stanza {
    fn new(interface: &Interface, v6: bool, method: &str) -> Self {
        Stanza { head: format!("iface {} {} {method}", interface.name, if v6 { "inet6" } else { "inet" }), lines: Vec::new() }
    }

    fn set(&mut self, key: &str, value: impl std::fmt::Display) {
        self.lines.push(format!("{key} {value}"));
    }
}

fn stanzas(text: &mut String, network: &Network, interface: &Interface, dns: &LinkDns<'_>, flavour: Flavour) -> Result<()> {
    let mut all = family_stanzas(interface, false, flavour);
    all.extend(family_stanzas(interface, true, flavour));
    if all.is_empty() {
        let mut idle = Stanza::new(interface, false, "manual");
        idle.set("up", "ip link set dev $IFACE up");
        idle.set("down", "ip link set dev $IFACE down");
        all.push(idle);
    }
    let first = &mut all[0];
    if let Some(mtu) = interface.mtu {
        // Not an option of the dhcp method: a command works with every method.
        first.lines.insert(0, format!("pre-up ip link set dev $IFACE mtu {mtu}"));
    }
    let static_v6 = interface.family(true).next().is_some() || interface.dhcp6;
    if let Some(accept) = interface.accept_ra
        && (flavour != Flavour::Debian || (!accept && !static_v6))
    {
        // A kernel without IPv6 has no such file, and that is fine.
        let value = u8::from(accept);
        first.lines.insert(0, format!("pre-up echo {value} > /proc/sys/net/ipv6/conf/$IFACE/accept_ra || true"));
    }
    if let Some(prefer) = interface.ipv6_privacy {
        first.lines.insert(0, format!("pre-up echo {} > /proc/sys/net/ipv6/conf/$IFACE/use_tempaddr || true", if prefer { 2 } else { 0 }));
    }
    if interface.link_local == Some(false) || network.master(&interface.name).is_some() {
        // IN6_ADDR_GEN_MODE_NONE.
        first.lines.insert(0, "pre-up echo 1 > /proc/sys/net/ipv6/conf/$IFACE/addr_gen_mode || true".into());
    }
    let (made, unmade) = device_commands(interface);
    first.lines.splice(0..0, made);
    if let Some(last) = all.last_mut() {
        last.lines.extend(unmade);
    }
    let first = &mut all[0];
    if !dns.servers.is_empty() {
        first.set("dns-nameservers", dns.servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
    }
    if !dns.search.is_empty() {
        first.set("dns-search", dns.search.iter().map(|domain| domain.as_str()).collect::<Vec<_>>().join(" "));
    }
    let _ = write!(text, "\nauto {}\n", interface.name);
    for stanza in all {
        let _ = writeln!(text, "{}", stanza.head);
        for line in stanza.lines {
            if line.chars().any(char::is_control) {
                return Err(Error::internal(Stage::Inject, FILE, "a value contains control characters"));
            }
            let _ = writeln!(text, "    {line}");
        }
    }
    Ok(())
}

/// What makes a bond, bridge or VLAN before it is configured, and what removes it. iproute2's, busybox's and ifupdown-ng's `ip` all take these
/// forms; options go by sysfs, which needs no further package. Loading the module of bonds may make a `bond0`, hence the questions.
fn device_commands(interface: &Interface) -> (Vec<String>, Option<String>) {
    let mut commands = Vec::new();
    let mut run = |command: String| commands.push(format!("pre-up {command}"));
    let kind = interface.kind.name();
    match &interface.kind {
        LinkKind::Ethernet => return (Vec::new(), None),
        LinkKind::Vlan(vlan) => {
            run(format!("ip link set dev {} up", vlan.link));
            run(format!("[ -e /sys/class/net/$IFACE ] || ip link add link {} name $IFACE type vlan id {}", vlan.link, vlan.id));
        }
        LinkKind::Bond(_) | LinkKind::Bridge(_) => {
            run(format!("modprobe -q {} || true", if kind == "bond" { "bonding" } else { "bridge" }));
            run(format!("[ -e /sys/class/net/$IFACE ] || ip link add name $IFACE type {kind}"));
        }
    }
    if let Some(mac) = interface.mac {
        run(format!("ip link set dev $IFACE address {mac}"));
    }
    match &interface.kind {
        LinkKind::Bond(bond) => {
            run("ip link set dev $IFACE down".into());
            for (name, value) in bond.options() {
                run(format!("echo {value} > /sys/class/net/$IFACE/bonding/{name}"));
            }
            for member in &bond.members {
                // The kernel takes only interfaces that are down, and brings them up itself.
                run(format!("ip link set dev {member} down"));
                run(format!("ip link set dev {member} master $IFACE"));
            }
            if let Some(primary) = &bond.primary {
                run(format!("echo {primary} > /sys/class/net/$IFACE/bonding/primary"));
            }
        }
        LinkKind::Bridge(bridge) => {
            for (name, value) in bridge.sysfs_options() {
                run(format!("echo {value} > /sys/class/net/$IFACE/bridge/{name}"));
            }
            for member in &bridge.members {
                run(format!("ip link set dev {member} up"));
                run(format!("ip link set dev {member} master $IFACE"));
            }
        }
        LinkKind::Ethernet | LinkKind::Vlan(_) => {}
    }
    (commands, Some("post-down ip link delete dev $IFACE || true".into()))
}

fn family_stanzas(interface: &Interface, v6: bool, flavour: Flavour) -> Vec<Stanza> {
    let mut stanzas = Vec::new();
    let gateway = interface.gateways().find(|gateway| gateway.is_ipv6() == v6);
    if if v6 { interface.dhcp6 } else { interface.dhcp4 } {
        stanzas.push(dhcp(interface, v6, flavour));
    }
    let addresses: Vec<&Cidr> = interface.family(v6).collect();
    // The stanza whose address has the gateway on its subnet brings up the default route.
    let holder = gateway.and_then(|gateway| match gateway {
        _ if crate::guest::network::is_link_local(gateway) => (!addresses.is_empty()).then_some(0),
        _ => addresses.iter().position(|cidr| cidr.contains(gateway)),
    });
    for (index, cidr) in addresses.iter().enumerate() {
        if index > 0 && flavour == Flavour::Busybox {
            if let Some(stanza) = stanzas.last_mut() {
                stanza.set("up", format!("ip addr add {cidr} dev $IFACE"));
            }
            continue;
        }
        let mut stanza = Stanza::new(interface, v6, "static");
        address(&mut stanza, cidr, flavour);
        if v6 && flavour == Flavour::Debian && index == 0 && !interface.dhcp6 {
            ra_options(&mut stanza, interface);
        }
        if let (Some(gateway), true) = (gateway, holder == Some(index)) {
            stanza.set("gateway", gateway);
            if let Some(metric) = interface.metric {
                stanza.set("metric", metric);
            }
        }
        stanzas.push(stanza);
    }
    if stanzas.is_empty() && v6 && interface.accept_ra == Some(true) {
        stanzas.push(slaac(interface, flavour));
    }
    let by_command = gateway.filter(|_| holder.is_none() || (flavour == Flavour::Busybox && holder != Some(0)));
    let mut commands = Vec::new();
    if let Some(gateway) = by_command {
        default_route(&mut commands, interface, gateway);
    }
    extra_routes(&mut commands, interface, v6);
    let ip = if v6 { "ip -6 rule" } else { "ip rule" };
    for rule in interface.rules.iter().filter(|rule| rule.is_ipv6() == v6) {
        commands.push(format!("up {ip} add {}", rule.words()));
        commands.push(format!("down {ip} del {}", rule.words()));
    }
    match stanzas.last_mut() {
        Some(last) => last.lines.extend(commands),
        None if !commands.is_empty() => {
            let mut manual = Stanza::new(interface, v6, "manual");
            manual.set("up", "ip link set dev $IFACE up");
            manual.lines.extend(commands);
            stanzas.push(manual);
        }
        None => {}
    }
    stanzas
}

fn dhcp(interface: &Interface, v6: bool, flavour: Flavour) -> Stanza {
    let mut stanza = Stanza::new(interface, v6, "dhcp");
    if v6 && flavour == Flavour::Debian {
        ra_options(&mut stanza, interface);
    } else if let (false, Some(metric)) = (v6, interface.metric) {
        stanza.set("metric", metric);
    }
    stanza
}

/// Addresses from router advertisements alone. busybox does not know the method `auto`; the kernel does the same once the link is up.
fn slaac(interface: &Interface, flavour: Flavour) -> Stanza {
    if flavour == Flavour::Busybox {
        let mut manual = Stanza::new(interface, true, "manual");
        manual.set("up", "ip link set dev $IFACE up");
        return manual;
    }
    let mut auto = Stanza::new(interface, true, "auto");
    if flavour == Flavour::Debian {
        auto.set("accept_ra", 1);
    }
    auto
}

/// interfaces(5): static switches address autoconfiguration off by default, and leaves accept_ra to the kernel.
fn ra_options(stanza: &mut Stanza, interface: &Interface) {
    if let Some(accept) = interface.accept_ra {
        stanza.set("accept_ra", u8::from(accept));
        stanza.set("autoconf", u8::from(accept));
    }
}

fn address(stanza: &mut Stanza, cidr: &Cidr, flavour: Flavour) {
    if flavour != Flavour::Busybox {
        return stanza.set("address", cidr);
    }
    stanza.set("address", cidr.address);
    match cidr.address {
        IpAddr::V4(_) => {
            let bits = u32::MAX.checked_shl(32u32.saturating_sub(u32::from(cidr.prefix))).unwrap_or(0);
            stanza.set("netmask", Ipv4Addr::from(bits));
        }
        IpAddr::V6(_) => stanza.set("netmask", cidr.prefix),
    }
}

fn ip_route(v6: bool) -> &'static str {
    if v6 { "ip -6 route replace" } else { "ip route replace" }
}

fn host_route(commands: &mut Vec<String>, hop: IpAddr) {
    let (v6, len) = (hop.is_ipv6(), if hop.is_ipv6() { 128 } else { 32 });
    commands.push(format!("up {} {hop}/{len} dev $IFACE", ip_route(v6)));
}

/// A gateway that no address contains is reached by a route of its own first: `onlink` is not in every `ip`.
fn default_route(commands: &mut Vec<String>, interface: &Interface, gateway: IpAddr) {
    if interface.is_off_subnet(gateway) {
        host_route(commands, gateway);
    }
    let metric = interface.metric.map(|metric| format!(" metric {metric}")).unwrap_or_default();
    commands.push(format!("up {} default via {gateway} dev $IFACE{metric}", ip_route(gateway.is_ipv6())));
}

fn extra_routes(commands: &mut Vec<String>, interface: &Interface, v6: bool) {
    for route in interface.routes.iter().filter(|route| route.to.address.is_ipv6() == v6) {
        let kind = if route.kind == RouteKind::Unicast { String::new() } else { format!("{} ", route.kind.name()) };
        let mut command = format!("up {} {kind}{}", ip_route(v6), route.to);
        if let Some(via) = route.via {
            if route.on_link && interface.is_off_subnet(via) {
                host_route(commands, via);
            }
            let _ = write!(command, " via {via}");
        }
        if kind.is_empty() {
            command.push_str(" dev $IFACE");
        }
        if let Some(metric) = route.metric {
            let _ = write!(command, " metric {metric}");
        }
        if let Some(table) = route.table {
            let _ = write!(command, " table {table}");
        }
        commands.push(command);
    }
}

fn check_clients(network: &Network, facts: &GuestFacts, flavour: Flavour, warnings: &mut Vec<String>) {
    let clients = ["/usr/sbin/dhclient", "/usr/sbin/dhcpcd", "/usr/sbin/udhcpc", "/usr/bin/udhcpc"];
    let dhcp = network.interfaces.iter().any(|interface| interface.dhcp4 || interface.dhcp6);
    if dhcp && !clients.iter().any(|path| present(facts, path)) {
        warnings.push("DHCP is asked for, but the image has none of dhclient, dhcpcd and udhcpc".into());
    }
    if flavour != Flavour::Debian && network.interfaces.iter().any(|interface| interface.dhcp6) {
        warnings.push("DHCPv6 is asked for: busybox's and ifupdown-ng's DHCP support covers IPv4 only, unless dhcpcd is installed".into());
    }
}

/// Makes the guest run ifup at boot when it does not do so yet.
fn enable(facts: &GuestFacts, rendered: &mut Rendered) {
    if matches!(Ifupdown.presence(facts), Presence::Enabled(_)) {
        return;
    }
    let why = "starts ifup at boot".to_owned();
    if let Some(target) = in_lib(facts, "systemd/system/networking.service").filter(|_| has_systemd(facts)) {
        rendered.links.push(GuestLink { path: "/etc/systemd/system/multi-user.target.wants/networking.service".into(), target, why });
    } else if facts.exists("/etc/init.d/networking") && facts.exists("/etc/runlevels") {
        rendered.links.push(GuestLink { path: "/etc/runlevels/boot/networking".into(), target: "/etc/init.d/networking".into(), why });
    } else {
        rendered.warnings.push("nothing in the image runs ifup at boot, and there is no service that could be enabled".into());
        return;
    }
    rendered.notes.push("ifupdown is enabled by a link: the image does not start it by itself".into());
}

impl Resolver {
    /// Whether `dns-nameservers` in a stanza reaches somebody.
    fn takes_ifupdown_options(self) -> bool {
        matches!(self, Resolver::Resolvconf | Resolver::ResolvedWithHook)
    }
}
