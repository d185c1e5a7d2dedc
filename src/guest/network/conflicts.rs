//! What in the image would shadow or contradict the new network configuration: found, removed, and said so (failures.md 30).
//!
//! A profile conflicts when it can match one of our interfaces: by name, by MAC, by a pattern that catches Ethernet NICs in general, or because
//! it names no device at all. When the request wants no interface configured, every Ethernet profile conflicts. Files of back-ends that are not
//! installed are inert and stay.

use crate::{
    error::Result,
    guest::{
        config::{BackendKind, LinkKind, Network},
        enablement::{State, enabling_links, init_script_links, unit_state},
        facts::GuestFacts,
        network::{Presence, ifcfg, ifupdown, ini::values, netifrc, netplan, renderer, wicked},
        plan::Plan,
        scrub::glob,
        tree::{present, shell_variable},
    },
};

/// Names that NICs usually get; a pattern that matches one of them catches NICs in general.
const TYPICAL_NAMES: [&str; 6] = ["eth0", "ens3", "enp1s0", "eno1", "enX0", "enx525400123456"];

/// What a profile applies to.
#[derive(Debug, Default)]
struct Selector {
    names: Vec<String>,
    macs: Vec<String>,
    /// It is for something that is not Ethernet.
    foreign: bool,
}

impl Selector {
    fn conflicts(&self, network: &Network) -> bool {
        if self.foreign {
            // A bond of the same name is the same device.
            return network.interfaces.iter().any(|interface| self.names.iter().any(|name| name == interface.name.as_str()));
        }
        if network.interfaces.is_empty() || (self.names.is_empty() && self.macs.is_empty()) {
            return !self.names.iter().any(|name| name == "lo");
        }
        let ours = |interface: &crate::guest::config::Interface| {
            self.names.iter().any(|name| glob(name, interface.name.as_str())) || interface.mac.is_some_and(|mac| self.macs.contains(&mac.to_string()))
        };
        let catches_all = |name: &String| name.contains(['*', '?', '[']) && TYPICAL_NAMES.iter().any(|typical| glob(name, typical));
        network.interfaces.iter().any(ours) || self.names.iter().any(catches_all)
    }
}

/// Removes every conflicting profile of every back-end that is installed, and keeps other managers off our interfaces.
pub fn remove(plan: &mut Plan<'_>, facts: &GuestFacts, network: &Network, chosen: BackendKind) -> Result<()> {
    let installed = |kind| renderer(kind).presence(facts) != Presence::Absent;
    if installed(BackendKind::Netplan) {
        for path in files(facts, "/etc/netplan", &[".yaml"]).into_iter().filter(|path| path != netplan::FILE) {
            plan.remove(&path, "netplan merges all its files: this one would add to or override the new configuration")?;
        }
    }
    if installed(BackendKind::Networkd) {
        for path in files(facts, "/etc/systemd/network", &[".network"]).into_iter().filter(|path| !path.contains("/10-cloudlet-")) {
            remove_if(plan, network, &path, facts.text(&path).map(networkd_selector))?;
        }
    }
    if installed(BackendKind::Networkd) {
        for path in files(facts, "/etc/systemd/network", &[".netdev"]).into_iter().filter(|path| !path.contains("/10-cloudlet-")) {
            remove_if(plan, network, &path, facts.text(&path).map(netdev_selector))?;
        }
    }
    if installed(BackendKind::NetworkManager) {
        for path in files(facts, "/etc/NetworkManager/system-connections", &[""]).into_iter().filter(|path| !path.contains("/cloudlet-")) {
            remove_if(plan, network, &path, facts.text(&path).map(keyfile_selector))?;
        }
        if chosen != BackendKind::NetworkManager
            && matches!(unit_state(facts, "NetworkManager.service"), State::Enabled(_) | State::Preset(_))
            && chosen != BackendKind::Netplan
        {
            keep_network_manager_off(plan, network)?;
        }
    }
    if installed(BackendKind::NetworkManager) || installed(BackendKind::Ifcfg) {
        ifcfg_files(plan, facts, network, ifcfg::DIRECTORY, &["route-", "route6-", "rule-", "rule6-"])?;
    }
    if installed(BackendKind::Wicked) || installed(BackendKind::NetworkManager) {
        ifcfg_files(plan, facts, network, wicked::DIRECTORY, &["ifroute-", "ifrule-", "ifsysctl-"])?;
    }
    ifupdown_files(plan, facts, network, chosen)?;
    netifrc_links(plan, facts, network, chosen)?;
    stop_dhcpcd(plan, facts)
}

/// ifcfg files of one directory, with the files of routes and rules that go with a device.
fn ifcfg_files(plan: &mut Plan<'_>, facts: &GuestFacts, network: &Network, directory: &str, companions: &[&str]) -> Result<()> {
    let all = files(facts, directory, &[""]);
    for path in &all {
        let name = path.rsplit('/').next().unwrap_or_default();
        // An alias (eth0:1) goes with its interface.
        let Some(config) = name.strip_prefix("ifcfg-").filter(|device| !matches!(*device, "lo" | "bootstrap")) else { continue };
        let device = config.split(':').next().unwrap_or(config);
        let selector = facts.text(path).map(|text| ifcfg_selector(text, device));
        let conflicts = selector.as_ref().is_some_and(|selector| selector.conflicts(network));
        remove_if(plan, network, path, selector)?;
        for companion in companions.iter().filter(|_| conflicts) {
            if let Some(path) = all.iter().find(|path| path.rsplit('/').next() == Some(&format!("{companion}{config}")[..])) {
                plan.remove(path, format!("goes with ifcfg-{config} of the image, which is for the same interface"))?;
            }
        }
    }
    Ok(())
}

/// netifrc's services of our interfaces, when another back-end configures them.
fn netifrc_links(plan: &mut Plan<'_>, facts: &GuestFacts, network: &Network, chosen: BackendKind) -> Result<()> {
    if chosen == BackendKind::Netifrc || renderer(BackendKind::Netifrc).presence(facts) == Presence::Absent {
        return Ok(());
    }
    for link in netifrc::service_links(facts) {
        let name = link.rsplit('/').next().and_then(|service| service.strip_prefix("net.")).unwrap_or_default();
        if network.interfaces.is_empty() || network.interfaces.iter().any(|interface| interface.name.as_str() == name) {
            plan.remove(&link, format!("netifrc must leave {name} alone"))?;
        }
    }
    Ok(())
}

fn files(facts: &GuestFacts, directory: &str, suffixes: &[&str]) -> Vec<String> {
    let Some((directory, _)) = facts.resolve(directory) else { return Vec::new() };
    let wanted = |name: &str| suffixes.iter().any(|suffix| name.ends_with(suffix));
    facts.children(&directory).filter(|(name, _)| wanted(name)).map(|(name, _)| format!("{directory}/{name}")).collect()
}

fn remove_if(plan: &mut Plan<'_>, network: &Network, path: &str, selector: Option<Selector>) -> Result<()> {
    match selector {
        Some(selector) if selector.conflicts(network) => plan.remove(path, "network profile of the image for the same interface"),
        Some(_) => Ok(()),
        None => {
            plan.warnings.push(format!("{path} may be a network profile for the same interface, but its content is not known"));
            Ok(())
        }
    }
}

fn words(lists: &[&str]) -> Vec<String> {
    lists.iter().flat_map(|list| list.split([' ', '\t', ',', ';'])).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn lower(words: Vec<String>) -> Vec<String> {
    words.into_iter().map(|word| word.to_lowercase().replace('-', ":")).collect()
}

fn networkd_selector(text: &str) -> Selector {
    let names = words(&values(text, "Match", "Name"));
    let mut macs = lower(words(&values(text, "Match", "MACAddress")));
    macs.extend(lower(words(&values(text, "Match", "PermanentMACAddress"))));
    let types = words(&values(text, "Match", "Type"));
    let foreign = (!types.is_empty() && !types.iter().any(|kind| kind == "ether")) || !values(text, "Match", "Kind").is_empty();
    // A negated list matches everything else.
    let names = if names.first().is_some_and(|name| name.starts_with('!')) { Vec::new() } else { names };
    Selector { names, macs, foreign }
}

/// A device that is made: it conflicts by its name only.
fn netdev_selector(text: &str) -> Selector {
    Selector { names: words(&values(text, "NetDev", "Name")), macs: Vec::new(), foreign: true }
}

fn keyfile_selector(text: &str) -> Selector {
    let mut names = words(&values(text, "connection", "interface-name"));
    names.extend(words(&values(text, "match", "interface-name")));
    let kinds = values(text, "connection", "type");
    let ethernet = ["ethernet", "802-3-ethernet"];
    let macs = ethernet.iter().flat_map(|section| words(&values(text, section, "mac-address"))).collect();
    Selector { names, macs: lower(macs), foreign: !kinds.iter().any(|kind| ethernet.contains(kind)) }
}

fn ifcfg_selector(text: &str, from_name: &str) -> Selector {
    let macs: Vec<String> = shell_variable(text, "HWADDR").map(str::to_owned).into_iter().collect();
    let device = shell_variable(text, "DEVICE").map(str::to_owned).or_else(|| macs.is_empty().then(|| from_name.to_owned()));
    // SUSE names the kind by the variables that only it has.
    let made = ["BONDING_MASTER", "BRIDGE", "VLAN"].iter().any(|name| shell_variable(text, name).is_some_and(|value| value == "yes"))
        || ["ETHERDEVICE", "TUNNEL"].iter().any(|name| shell_variable(text, name).is_some());
    let foreign = made || shell_variable(text, "TYPE").is_some_and(|kind| !kind.eq_ignore_ascii_case("ethernet"));
    Selector { names: device.into_iter().collect(), macs: lower(macs), foreign }
}

/// The interfaces that a file in interfaces(5) form configures, lo left out; mapping patterns are not looked into.
fn stanza_names(text: &str) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        if matches!(fields.next(), Some("iface" | "auto" | "allow-hotplug" | "allow-auto")) {
            let all: Vec<&str> = fields.collect();
            let count = if line.trim_start().starts_with("iface") { 1 } else { all.len() };
            names.extend(all[..count.min(all.len())].iter().filter(|name| **name != "lo").map(|name| (*name).to_owned()));
        }
    }
    names
}

fn is_stanza_conflict(facts: &GuestFacts, path: &str, network: &Network) -> bool {
    let names = facts.text(path).map(stanza_names).unwrap_or_default();
    !names.is_empty() && Selector { names, ..Selector::default() }.conflicts(network)
}

/// Whether files stay in interfaces.d that the new /etc/network/interfaces has to read.
pub fn kept_interface_files(facts: &GuestFacts, network: &Network) -> bool {
    files(facts, ifupdown::DIRECTORY, &[""]).iter().any(|path| !is_stanza_conflict(facts, path, network))
}

fn ifupdown_files(plan: &mut Plan<'_>, facts: &GuestFacts, network: &Network, chosen: BackendKind) -> Result<()> {
    if renderer(BackendKind::Ifupdown).presence(facts) == Presence::Absent {
        return Ok(());
    }
    for path in files(facts, ifupdown::DIRECTORY, &[""]) {
        if is_stanza_conflict(facts, &path, network) {
            plan.remove(&path, "network profile of the image for the same interface")?;
        }
    }
    let Some(text) = facts.text(ifupdown::FILE) else { return Ok(()) };
    let names = stanza_names(text);
    if chosen == BackendKind::Ifupdown {
        if !names.is_empty() {
            plan.notes.push(format!("{} of the image is replaced; it configured {}", ifupdown::FILE, unique(&names)));
        }
    } else if is_stanza_conflict(facts, ifupdown::FILE, network) {
        let why = format!("ifupdown must leave the interfaces alone; the image's file configured {}", unique(&names));
        let source = if kept_interface_files(facts, network) { format!("source {}/*\n", ifupdown::DIRECTORY) } else { String::new() };
        plan.write(ifupdown::FILE, format!("# Written by cloudletd.\n{source}\nauto lo\niface lo inet loopback\n"), 0o644, why)?;
    }
    Ok(())
}

fn unique(names: &[String]) -> String {
    let mut names = names.to_vec();
    names.dedup();
    names.sort();
    names.dedup();
    names.join(", ")
}

/// NetworkManager starts DHCP on every Ethernet interface that no profile covers.
fn keep_network_manager_off(plan: &mut Plan<'_>, network: &Network) -> Result<()> {
    let devices: Vec<String> = network
        .interfaces
        .iter()
        .map(|interface| match interface.mac.filter(|_| interface.kind == LinkKind::Ethernet) {
            Some(mac) => format!("mac:{mac}"),
            None => format!("interface-name:{}", interface.name),
        })
        .collect();
    let path = "/etc/NetworkManager/conf.d/90-cloudlet-unmanaged.conf";
    let list = if devices.is_empty() { "type:ethernet".to_owned() } else { devices.join(";") };
    plan.write(
        path,
        format!("# Written by cloudletd.\n[keyfile]\nunmanaged-devices={list}\n"),
        0o644,
        "NetworkManager must leave the interfaces alone",
    )
}

/// dhcpcd as a service of its own runs DHCP on every interface it finds.
fn stop_dhcpcd(plan: &mut Plan<'_>, facts: &GuestFacts) -> Result<()> {
    if !present(facts, "/usr/sbin/dhcpcd") && !present(facts, "/usr/bin/dhcpcd") {
        return Ok(());
    }
    let mut links = enabling_links(facts, "dhcpcd.service");
    links.extend(init_script_links(facts, "dhcpcd"));
    for link in links.iter().filter(|link| link.starts_with("/etc/")) {
        plan.remove(link, "dhcpcd as a service configures every interface by DHCP")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::config::Interface;

    fn network(names: &[(&str, Option<&str>)]) -> Network {
        let interface = |(name, mac): &(&str, Option<&str>)| Interface {
            mac: mac.map(|mac| mac.parse().expect("MAC")),
            ..Interface::named(name.parse().expect("name"))
        };
        Network { interfaces: names.iter().map(interface).collect(), ..Network::default() }
    }

    #[test]
    fn profiles_conflict_by_name_mac_pattern_or_when_they_name_nothing() {
        let ours = network(&[("eth0", Some("52:54:00:aa:bb:cc"))]);
        for text in [
            "[Match]\nName=eth0\n",
            "[Match]\nName=en* eth*\n",
            "[Match]\nMACAddress=52:54:00:AA:BB:CC\n",
            "[Network]\nDHCP=yes\n",
            "[Match]\nType=ether\n",
            "[Match]\nName=!docker*\n",
            "[Match]\nName=*\n",
        ] {
            assert!(networkd_selector(text).conflicts(&ours), "{text}");
        }
        for text in
            ["[Match]\nName=eth1\n", "[Match]\nName=wlan*\nType=wlan\n", "[Match]\nKind=bridge\nName=*\n", "[Match]\nMACAddress=52:54:00:aa:bb:cd\n"]
        {
            assert!(!networkd_selector(text).conflicts(&ours), "{text}");
        }
        assert!(networkd_selector("[Match]\nName=eth1\n").conflicts(&network(&[])), "no network at all leaves no Ethernet profile");
        let profile = "[connection]\ntype=802-3-ethernet\n[802-3-ethernet]\nmac-address=52-54-00-AA-BB-CC\n";
        assert!(keyfile_selector(profile).conflicts(&ours));
        assert!(!keyfile_selector("[connection]\ntype=wifi\n").conflicts(&ours));
        assert!(ifcfg_selector("BOOTPROTO=dhcp\n", "eth0").conflicts(&ours));
        assert!(!ifcfg_selector("DEVICE=br0\nTYPE=Bridge\n", "eth0").conflicts(&ours));
        assert!(!ifcfg_selector("BRIDGE='yes'\nBRIDGE_PORTS='eth0'\n", "br0").conflicts(&ours));
        assert!(ifcfg_selector("BRIDGE=br0\n", "eth0").conflicts(&ours), "Red Hat's way to say that eth0 is a member");
        assert!(!netdev_selector("[NetDev]\nName=bond0\nKind=bond\n").conflicts(&ours));
        assert!(netdev_selector("[NetDev]\nName=bond0\nKind=bond\n").conflicts(&network(&[("bond0", None)])));
        assert!(keyfile_selector("[connection]\ntype=bond\ninterface-name=bond0\n").conflicts(&network(&[("bond0", None)])));
    }

    #[test]
    fn stanza_names_come_from_auto_and_iface_lines() {
        assert_eq!(stanza_names("auto lo eth0\niface lo inet loopback\n iface ens3 inet dhcp\n#iface x inet dhcp\n"), ["eth0", "ens3"]);
    }
}
