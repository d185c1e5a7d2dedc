//! NetworkManager: one keyfile connection per interface (nm-settings-keyfile(5)), 0600 and root's, or NetworkManager ignores it.
//!
//! With a MAC the profile is bound to the permanent MAC instead of the name, so that addresses follow the hardware even if udev could not
//! rename the interface. Properties that a method does not allow (a resolver with `method=disabled`) make NetworkManager refuse the whole
//! profile, so they are left out, with a warning.

use std::net::IpAddr;

use crate::{
    error::{Error, Kind, Result, Stage},
    guest::{
        config::{BackendKind, Bond, Bridge, Interface, LinkKind, Network, RouteKind, Rule, Vlan},
        enablement::{State, unit_state},
        facts::GuestFacts,
        network::{Guest, GuestFile, GuestLink, LinkDns, NetRenderer, Presence, Rendered, ini::Ini, link_dns},
        tree::{has_systemd, in_lib, present},
    },
};

const UNIT: &str = "NetworkManager.service";

/// The links that `systemctl enable NetworkManager` makes.
const ENABLE: [(&str, &str); 3] = [
    ("multi-user.target.wants/NetworkManager.service", UNIT),
    ("dbus-org.freedesktop.nm-dispatcher.service", "NetworkManager-dispatcher.service"),
    ("network-online.target.wants/NetworkManager-wait-online.service", "NetworkManager-wait-online.service"),
];

/// The renderer for NetworkManager.
pub struct NetworkManager;

impl NetRenderer for NetworkManager {
    fn kind(&self) -> BackendKind {
        BackendKind::NetworkManager
    }

    fn presence(&self, facts: &GuestFacts) -> Presence {
        let program = "/usr/sbin/NetworkManager";
        if !present(facts, program) && !present(facts, "/usr/bin/NetworkManager") {
            return Presence::Absent;
        }
        if let Some(link) = crate::guest::enablement::init_script_links(facts, "NetworkManager").into_iter().next().filter(|_| !has_systemd(facts)) {
            return Presence::Enabled(format!("{link} starts NetworkManager"));
        }
        match unit_state(facts, UNIT) {
            State::Enabled(link) => Presence::Enabled(format!("{link} starts NetworkManager")),
            State::Preset(file) => Presence::Preset(format!("{file} would enable NetworkManager at the first boot")),
            State::Disabled => Presence::Installed("NetworkManager is in the image, not enabled".into()),
            State::Absent if has_systemd(facts) => Presence::Absent,
            State::Absent => Presence::Installed("NetworkManager is in the image".into()),
        }
    }

    fn owns(&self, path: &str) -> bool {
        path.starts_with("/etc/NetworkManager/system-connections/")
    }

    fn render(&self, network: &Network, guest: &Guest<'_>) -> Result<Rendered> {
        let mut rendered = Rendered::default();
        for (interface, dns) in network.interfaces.iter().zip(link_dns(network)) {
            if interface.link_local == Some(false) && interface.family(true).next().is_some() {
                let message = format!("NetworkManager can't express IPv6 addresses without a link-local one (interface {})", interface.name);
                return Err(Error::new(Kind::Unsupported, Stage::Inject, "network", message).with_reason("NETWORK_NOT_EXPRESSIBLE"));
            }
            let path = format!("/etc/NetworkManager/system-connections/cloudlet-{}.nmconnection", interface.name);
            let uuid = guest.identity.uuid_of(&format!("network-manager:{}", interface.name));
            let content = keyfile(network, interface, &dns, &uuid.to_string(), &mut rendered.warnings).finish(&path)?;
            rendered.files.push(GuestFile { path, content, mode: 0o600, why: format!("network configuration of {}", interface.name) });
        }
        if network.interfaces.is_empty() {
            let content = "# Written by cloudletd.\n[main]\nno-auto-default=*\n".to_owned();
            let path = "/etc/NetworkManager/conf.d/90-cloudlet-no-auto-default.conf".to_owned();
            rendered.files.push(GuestFile { path, content, mode: 0o644, why: "no interface is to be configured, not even by DHCP".into() });
        }
        if has_systemd(guest.facts) && !matches!(unit_state(guest.facts, UNIT), State::Enabled(_)) {
            rendered.notes.push("NetworkManager is enabled by links: the image does not start it by itself".into());
            for (link, unit) in ENABLE {
                if let Some(target) = in_lib(guest.facts, &format!("systemd/system/{unit}")) {
                    let path = format!("/etc/systemd/system/{link}");
                    rendered.links.push(GuestLink { path, target, why: "enables NetworkManager".into() });
                }
            }
        }
        Ok(rendered)
    }
}

fn keyfile(network: &Network, interface: &Interface, dns: &LinkDns<'_>, uuid: &str, warnings: &mut Vec<String>) -> Ini {
    let mut ini = Ini::new();
    ini.section("connection");
    ini.set("id", format!("cloudlet-{}", interface.name));
    ini.set("uuid", uuid);
    ini.set("type", interface.kind.name());
    let is_nic = interface.kind == LinkKind::Ethernet;
    if interface.mac.is_none() || !is_nic {
        ini.set("interface-name", &interface.name);
    }
    // Before whatever profile without a device the image may have.
    ini.set("autoconnect-priority", 100);
    let master = network.master(&interface.name);
    if let Some(master) = master {
        ini.set("master", master.name);
        ini.set("slave-type", if master.is_bond { "bond" } else { "bridge" });
    }
    link_section(&mut ini, interface);
    ini.section("ethernet");
    if let Some(mac) = interface.mac {
        ini.set(if is_nic { "mac-address" } else { "cloned-mac-address" }, mac);
    }
    if let Some(mtu) = interface.mtu {
        ini.set("mtu", mtu);
    }
    if master.is_some() {
        // A member has no addresses, and NetworkManager wants no section of theirs.
        return ini;
    }
    let (method4, method6) = (method4(interface), method6(interface));
    let carries = [method4 != "disabled", !matches!(method6, "disabled" | "link-local")];
    let has_dns = !dns.servers.is_empty() || !dns.search.is_empty();
    if has_dns && !carries.contains(&true) {
        warnings.push(format!("resolvers of {} are left out: NetworkManager knows none on an interface without addresses", interface.name));
    }
    for (v6, method) in [(false, method4), (true, method6)] {
        ini.section(if v6 { "ipv6" } else { "ipv4" });
        ini.set("method", method);
        // eui64 as the kernel does it; NetworkManager's default gives addresses that nobody outside can foresee.
        if v6 && matches!(method, "auto" | "dhcp") {
            ini.set("addr-gen-mode", "eui64");
        }
        if let (true, Some(prefer)) = (v6, interface.ipv6_privacy) {
            ini.set("ip6-privacy", if prefer { 2 } else { 0 });
        }
        addresses_and_routes(&mut ini, interface, v6);
        let servers: Vec<&IpAddr> = dns.servers.iter().filter(|server| server.is_ipv6() == v6).collect();
        if carries[usize::from(v6)] {
            list(&mut ini, "dns", servers.iter().map(ToString::to_string));
            // Search domains belong to no family: the first section that may hold them does.
            if !v6 || !carries[0] {
                list(&mut ini, "dns-search", dns.search.iter().map(ToString::to_string));
            }
        } else if !servers.is_empty() && carries[usize::from(!v6)] {
            let family = if v6 { "IPv6" } else { "IPv4" };
            warnings.push(format!(
                "{family} resolvers of {} are left out: the interface has no {family} for NetworkManager to reach them by",
                interface.name
            ));
        }
    }
    ini
}

/// What makes the device, unless it is a NIC. VLANs keep reordered headers (`flags=1`), the kernel's default.
fn link_section(ini: &mut Ini, interface: &Interface) {
    match &interface.kind {
        LinkKind::Ethernet => {}
        LinkKind::Bond(bond) => {
            let Bond { primary, .. } = bond;
            ini.section("bond");
            for (name, value) in bond.options() {
                ini.set(name, value);
            }
            if let Some(primary) = primary {
                ini.set("primary", primary);
            }
        }
        LinkKind::Bridge(bridge) => {
            let Bridge { stp, .. } = bridge;
            ini.section("bridge");
            ini.set("stp", stp);
            for (name, value) in bridge.options().into_iter().filter(|(name, _)| *name != "stp_state") {
                ini.set(&name.replace('_', "-"), value);
            }
        }
        LinkKind::Vlan(Vlan { id, link }) => {
            ini.section("vlan");
            ini.set("flags", 1);
            ini.set("id", id);
            ini.set("parent", link);
        }
    }
}

fn method4(interface: &Interface) -> &'static str {
    if interface.dhcp4 {
        "auto"
    } else if interface.family(false).next().is_some() {
        "manual"
    } else {
        "disabled"
    }
}

/// `auto` is router advertisements, with DHCPv6 when they ask for it; `manual` ignores them; `dhcp` is DHCPv6 alone.
fn method6(interface: &Interface) -> &'static str {
    let addressed = interface.family(true).next().is_some();
    if interface.link_local == Some(false) && !addressed {
        return "disabled";
    }
    match (interface.accept_ra, interface.dhcp6) {
        (Some(true), _) | (None, true) => "auto",
        (Some(false), true) => "dhcp",
        (None | Some(false), false) if addressed => "manual",
        (Some(false), false) => "link-local",
        (None, false) => "auto",
    }
}

/// `addressN`, `gateway`, `routeN`. A gateway outside of all subnets gets a device route of its own, which every version understands.
fn addresses_and_routes(ini: &mut Ini, interface: &Interface, v6: bool) {
    for (index, address) in interface.family(v6).enumerate() {
        ini.set(&format!("address{}", index + 1), address);
    }
    let mut count = 0;
    let mut route = |ini: &mut Ini, value: String, options: Vec<String>| {
        count += 1;
        ini.set(&format!("route{count}"), value);
        if !options.is_empty() {
            ini.set(&format!("route{count}_options"), options.join(","));
        }
    };
    if let Some(gateway) = interface.gateways().find(|gateway| gateway.is_ipv6() == v6) {
        ini.set("gateway", gateway);
        if interface.is_off_subnet(gateway) {
            route(ini, format!("{gateway}/{}", if v6 { 128 } else { 32 }), Vec::new());
        }
    }
    if let Some(metric) = interface.metric {
        ini.set("route-metric", metric);
    }
    for extra in interface.routes.iter().filter(|extra| extra.to.address.is_ipv6() == v6) {
        let unspecified = if v6 { "::" } else { "0.0.0.0" };
        let value = match (extra.via, extra.metric) {
            (Some(via), Some(metric)) => format!("{},{via},{metric}", extra.to),
            (Some(via), None) => format!("{},{via}", extra.to),
            (None, Some(metric)) => format!("{},{unspecified},{metric}", extra.to),
            (None, None) => extra.to.to_string(),
        };
        let mut options = Vec::new();
        if extra.on_link && extra.via.is_some() {
            options.push("onlink=true".to_owned());
        }
        if let Some(table) = extra.table {
            options.push(format!("table={table}"));
        }
        if extra.kind != RouteKind::Unicast {
            options.push(format!("type={}", extra.kind.name()));
        }
        route(ini, value, options);
    }
    // NetworkManager wants a priority (nm-settings-keyfile(5)); the kernel gives the last before the main table's to a rule without.
    for (index, rule) in interface.rules.iter().filter(|rule| rule.is_ipv6() == v6).enumerate() {
        let rule = Rule { priority: rule.priority.or(Some(32765)), ..*rule };
        ini.set(&format!("routing-rule{}", index + 1), rule.words());
    }
}

/// Lists are separated by semicolons, one after the last too.
fn list(ini: &mut Ini, key: &str, items: impl Iterator<Item = String>) {
    let text: String = items.map(|item| format!("{item};")).collect();
    if !text.is_empty() {
        ini.set(key, text);
    }
}
