//! Red Hat's network service: `ifcfg-*`, `route-*` and `route6-*` in /etc/sysconfig/network-scripts (initscripts' sysconfig.txt).
//!
//! For images whose interfaces are brought up by `ifup` of initscripts: Red Hat's family up to 7 and network-scripts on 8. Where NetworkManager
//! starts, it comes first and gets keyfiles. `NM_CONTROLLED=no` keeps a NetworkManager that is there as well from reading the files.
//!
//! Default gateways are `GATEWAY` and `IPV6_DEFAULTGW` only where `ifup-eth` accepts them (on the subnet of the first address); everything else
//! is a line of the route files, which go to `ip route add` as they are.

use std::net::IpAddr;

use crate::{
    error::{Error, Kind, Result, Stage},
    guest::{
        config::{BackendKind, Bond, Bridge, Cidr, Interface, LinkKind, Network, RouteKind, Rule},
        enablement::{State, init_script_links, unit_state},
        facts::GuestFacts,
        network::{Guest, GuestFile, GuestLink, NetRenderer, Presence, Rendered, is_link_local, shell},
        tree::{has_systemd, present, shell_variable},
    },
};

/// Where the files are.
pub const DIRECTORY: &str = "/etc/sysconfig/network-scripts";
/// The service's own switch.
const GLOBAL: &str = "/etc/sysconfig/network";
/// IFNAMSIZ without the final NUL: an alias is a label of that length.
const LABEL_LEN_MAX: usize = 15;

/// The renderer for Red Hat's network service.
pub struct Ifcfg;

impl NetRenderer for Ifcfg {
    fn kind(&self) -> BackendKind {
        BackendKind::Ifcfg
    }

    fn presence(&self, facts: &GuestFacts) -> Presence {
        if !present(facts, &format!("{DIRECTORY}/ifup-eth")) {
            return Presence::Absent;
        }
        let unit = if has_systemd(facts) { unit_state(facts, "network.service") } else { State::Absent };
        match (unit, init_script_links(facts, "network").into_iter().next()) {
            (State::Enabled(link), _) | (_, Some(link)) => Presence::Enabled(format!("{link} starts the network service")),
            _ => Presence::Installed("initscripts' ifup is in the image, nothing starts it".into()),
        }
    }

    fn owns(&self, path: &str) -> bool {
        let name = path.strip_prefix(DIRECTORY).and_then(|rest| rest.strip_prefix('/'));
        name.is_some_and(|name| {
            ["ifcfg-", "route-", "route6-", "rule-", "rule6-"].iter().any(|prefix| name.starts_with(prefix)) && name != "ifcfg-lo"
        })
    }

    fn render(&self, network: &Network, guest: &Guest<'_>) -> Result<Rendered> {
        let mut rendered = Rendered::default();
        let has_dns = network.interfaces.iter().any(|interface| !interface.nameservers.is_empty()) || !network.nameservers.is_empty();
        for interface in &network.interfaces {
            let name = &interface.name;
            let mut add = |file: &str, content: String| {
                let why = format!("network configuration of {name}");
                rendered.files.push(GuestFile { path: format!("{DIRECTORY}/{file}"), content, mode: 0o644, why });
            };
            add(&format!("ifcfg-{name}"), ifcfg(network, interface, has_dns)?.finish(name.as_str())?);
            for (index, cidr) in aliases(interface) {
                let label = format!("{name}:{index}");
                if label.len() > LABEL_LEN_MAX {
                    return Err(cannot(
                        interface,
                        &format!("a static address beside DHCP: the alias {label} has more than {LABEL_LEN_MAX} characters"),
                    ));
                }
                let mut file = shell::ShellFile::new();
                file.set("DEVICE", &label);
                file.set("ONPARENT", "yes");
                file.set("IPADDR", cidr.address);
                file.set("PREFIX", cidr.prefix);
                add(&format!("ifcfg-{label}"), file.finish(&label)?);
            }
            for (v6, prefix) in [(false, "route"), (true, "route6")] {
                let lines = routes(interface, v6);
                if !lines.is_empty() {
                    let file = format!("{prefix}-{name}");
                    add(&file, shell::lines(&file, &lines)?);
                }
            }
            for (v6, prefix) in [(false, "rule"), (true, "rule6")] {
                // Arguments of `ip rule add`.
                let lines: Vec<String> = interface.rules.iter().filter(|rule| rule.is_ipv6() == v6).map(Rule::words).collect();
                if !lines.is_empty() {
                    let file = format!("{prefix}-{name}");
                    add(&file, shell::lines(&file, &lines)?);
                }
            }
        }
        switch_on(guest.facts, &mut rendered);
        Ok(rendered)
    }
}

fn cannot(interface: &Interface, what: &str) -> Error {
    Error::new(Kind::Unsupported, Stage::Inject, "network", format!("ifcfg files can't express {what} (interface {})", interface.name))
        .with_reason("NETWORK_NOT_EXPRESSIBLE")
}

/// With DHCP for IPv4, `ifup-eth` ignores static addresses; they are aliases then.
fn aliases(interface: &Interface) -> impl Iterator<Item = (usize, &Cidr)> {
    interface.family(false).enumerate().filter(|_| interface.dhcp4)
}

fn ifcfg(network: &Network, interface: &Interface, has_dns: bool) -> Result<shell::ShellFile> {
    let mut file = shell::ShellFile::new();
    file.set("DEVICE", &interface.name);
    link_variables(&mut file, interface)?;
    match (&interface.kind, interface.mac) {
        (LinkKind::Ethernet, Some(mac)) => file.set("HWADDR", mac),
        (_, Some(mac)) => file.set("MACADDR", mac),
        _ => {}
    }
    file.set("ONBOOT", "yes");
    file.set("NM_CONTROLLED", "no");
    if let Some(master) = network.master(&interface.name) {
        if master.is_bond {
            file.set("MASTER", master.name);
            file.set("SLAVE", "yes");
        } else {
            file.set("BRIDGE", master.name);
        }
    }
    if let Some(mtu) = interface.mtu {
        file.set("MTU", mtu);
    }
    file.set("BOOTPROTO", if interface.dhcp4 { "dhcp" } else { "none" });
    if has_dns && interface.dhcp4 {
        // /etc/resolv.conf holds what was given.
        file.set("PEERDNS", "no");
    }
    for (index, cidr) in interface.family(false).enumerate().filter(|_| !interface.dhcp4) {
        let number = if index == 0 { String::new() } else { index.to_string() };
        file.set(&format!("IPADDR{number}"), cidr.address);
        file.set(&format!("PREFIX{number}"), cidr.prefix);
    }
    if let Some(gateway) = own_gateway(interface, false) {
        file.set("GATEWAY", gateway);
    }
    if let Some(metric) = interface.metric {
        file.set("METRIC", metric);
    }
    ipv6_variables(&mut file, interface)?;
    Ok(file)
}

fn ipv6_variables(file: &mut shell::ShellFile, interface: &Interface) -> Result<()> {
    if interface.link_local == Some(false) {
        return Err(cannot(interface, "an interface without link-local address"));
    }
    let addresses: Vec<String> = interface.family(true).map(ToString::to_string).collect();
    if !addresses.is_empty() || interface.dhcp6 || interface.accept_ra == Some(true) {
        file.set("IPV6INIT", "yes");
    }
    if let Some(accept) = interface.accept_ra {
        file.set("IPV6_AUTOCONF", if accept { "yes" } else { "no" });
    }
    if interface.dhcp6 {
        file.set("DHCPV6C", "yes");
    }
    if interface.ipv6_privacy == Some(true) {
        file.set("IPV6_PRIVACY", "rfc3041");
    }
    if let Some((first, rest)) = addresses.split_first() {
        file.set("IPV6ADDR", first);
        if !rest.is_empty() {
            file.set("IPV6ADDR_SECONDARIES", rest.join(" "));
        }
    }
    if let Some(gateway) = own_gateway(interface, true) {
        let zone = if is_link_local(gateway) { format!("%{}", interface.name) } else { String::new() };
        file.set("IPV6_DEFAULTGW", format!("{gateway}{zone}"));
    }
    Ok(())
}

/// The gateway that the interface's own file can say: IPv4 on the subnet of the first address, IPv6 on any subnet and without a metric.
fn own_gateway(interface: &Interface, v6: bool) -> Option<IpAddr> {
    let gateway = interface.gateways().find(|gateway| gateway.is_ipv6() == v6)?;
    let fits = if v6 {
        interface.metric.is_none() && !interface.is_off_subnet(gateway)
    } else {
        !interface.dhcp4 && interface.family(false).next().is_some_and(|cidr| cidr.contains(gateway))
    };
    fits.then_some(gateway)
}

fn link_variables(file: &mut shell::ShellFile, interface: &Interface) -> Result<()> {
    match &interface.kind {
        LinkKind::Ethernet => file.set("TYPE", "Ethernet"),
        LinkKind::Bond(bond) => {
            let Bond { primary, .. } = bond;
            let mut options: Vec<String> = bond.options().iter().map(|(name, value)| format!("{name}={value}")).collect();
            options.extend(primary.as_ref().map(|primary| format!("primary={primary}")));
            file.set("TYPE", "Bond");
            file.set("BONDING_MASTER", "yes");
            file.set("BONDING_OPTS", options.join(" "));
        }
        LinkKind::Bridge(bridge) => {
            let Bridge { stp, .. } = bridge;
            file.set("TYPE", "Bridge");
            file.set("STP", if *stp { "on" } else { "off" });
            let options = bridge.sysfs_options().into_iter().filter(|(name, _)| *name != "stp_state");
            let options: Vec<String> = options.map(|(name, value)| format!("{name}={value}")).collect();
            if !options.is_empty() {
                file.set("BRIDGING_OPTS", options.join(" "));
            }
        }
        LinkKind::Vlan(vlan) => {
            let names = [format!("{}.{}", vlan.link, vlan.id), format!("vlan{}", vlan.id)];
            if !names.contains(&interface.name.as_str().to_owned()) {
                // ifup of initscripts takes the tag from the name.
                return Err(cannot(interface, &format!("this name for a VLAN: it must be {} or {}", names[0], names[1])));
            }
            file.set("TYPE", "Vlan");
            file.set("VLAN", "yes");
            file.set("PHYSDEV", &vlan.link);
            file.set("VID", vlan.id);
        }
    }
    Ok(())
}

/// Arguments of `ip route add`, one route per line; a neighbour outside of all subnets is reached by a route of its own first.
fn routes(interface: &Interface, v6: bool) -> Vec<String> {
    let mut lines = Vec::new();
    let host = |hop: IpAddr| format!("{hop}/{} dev {}", if v6 { 128 } else { 32 }, interface.name);
    let gateway = interface.gateways().find(|gateway| gateway.is_ipv6() == v6);
    if let Some(gateway) = gateway.filter(|_| own_gateway(interface, v6).is_none()) {
        if interface.is_off_subnet(gateway) {
            lines.push(host(gateway));
        }
        let metric = interface.metric.map(|metric| format!(" metric {metric}")).unwrap_or_default();
        lines.push(format!("default via {gateway} dev {}{metric}", interface.name));
    }
    for route in interface.routes.iter().filter(|route| route.to.address.is_ipv6() == v6) {
        if let Some(via) = route.via.filter(|via| route.on_link && interface.is_off_subnet(*via)) {
            lines.push(host(via));
        }
        let mut line = match (route.kind, route.via) {
            (RouteKind::Unicast, Some(via)) => format!("{} via {via} dev {}", route.to, interface.name),
            (RouteKind::Unicast, None) => format!("{} dev {}", route.to, interface.name),
            (kind, _) => format!("{} {}", kind.name(), route.to),
        };
        line.extend(route.metric.map(|metric| format!(" metric {metric}")));
        line.extend(route.table.map(|table| format!(" table {table}")));
        lines.push(line);
    }
    lines
}

/// The service does nothing without `NETWORKING=yes`, and not before somebody starts it.
fn switch_on(facts: &GuestFacts, rendered: &mut Rendered) {
    match facts.text(GLOBAL) {
        None => {
            let why = "the network service does nothing without it".to_owned();
            rendered.files.push(GuestFile { path: GLOBAL.into(), content: "# Written by cloudletd.\nNETWORKING=yes\n".into(), mode: 0o644, why });
        }
        Some(text) => {
            if shell_variable(text, "NETWORKING").is_some_and(|value| value != "yes") {
                rendered.warnings.push(format!("{GLOBAL} of the image says that there is no networking"));
            }
            if shell_variable(text, "GATEWAY").is_some_and(|value| !value.is_empty()) {
                rendered.warnings.push(format!("{GLOBAL} of the image has a GATEWAY of its own, which the network service uses for every interface"));
            }
        }
    }
    if matches!(Ifcfg.presence(facts), Presence::Enabled(_)) {
        return;
    }
    if !facts.exists("/etc/init.d/network") {
        rendered.warnings.push("nothing in the image runs ifup at boot, and there is no service that could be enabled".into());
        return;
    }
    for level in ["2", "3", "4", "5"] {
        let path = format!("/etc/rc{level}.d/S10network");
        rendered.links.push(GuestLink { path, target: "../init.d/network".into(), why: "starts the network service".into() });
    }
    rendered.notes.push("the network service is enabled by links: the image does not start it by itself".into());
}
