//! Bonds, bridges and VLANs: who stands on whom, and which options go together. What the kernel would refuse is refused here, with the field.

use std::collections::BTreeMap;

use super::Checks;
use crate::{
    guest::config::{Bond, BondMode, Bridge, Interface, LinkKind, Network, Vlan},
    names::InterfaceName,
};

/// Longest link monitoring interval, milliseconds; beyond a minute it monitors nothing.
const MIIMON_MS_MAX: u32 = 60_000;
/// The kernel keeps hundredths of a second in 32 bits.
const AGEING_S_MAX: u32 = 1_000_000;

/// All checks of the network's links.
pub(super) fn link_checks(checks: &mut Checks, network: &Network) {
    for (index, interface) in network.interfaces.iter().enumerate() {
        let field = format!("network.interfaces[{index}]");
        name_checks(checks, &field, interface);
        match &interface.kind {
            LinkKind::Ethernet => {}
            LinkKind::Bond(bond) => bond_checks(checks, &format!("{field}.bond"), network, interface, bond),
            LinkKind::Bridge(bridge) => bridge_checks(checks, &format!("{field}.bridge"), network, interface, bridge),
            LinkKind::Vlan(vlan) => vlan_checks(checks, &format!("{field}.vlan"), network, interface, vlan),
        }
        if network.master(&interface.name).is_some() {
            member_checks(checks, &field, network, interface);
        }
    }
    cycle_checks(checks, network);
}

/// udev refuses names that are numbers (systemd's ifname_valid). A dot means VLAN to ifupdown, netifrc and initscripts alike: it must say the truth.
fn name_checks(checks: &mut Checks, field: &str, interface: &Interface) {
    let name = interface.name.as_str();
    if name.bytes().all(|b| b.is_ascii_digit()) {
        checks.add(format!("{field}.name"), format!("{name} is a number, not the name of an interface"));
    }
    match interface.vlan() {
        Some(vlan) if name.contains('.') && name != format!("{}.{}", vlan.link, vlan.id) => {
            checks.add(
                format!("{field}.name"),
                format!("{name} has a dot, which means VLAN {} of {} only as {}.{}", vlan.id, vlan.link, vlan.link, vlan.id),
            );
        }
        None if name.contains('.') => {
            checks.add(format!("{field}.name"), format!("{name} is not the name of a NIC, bond or bridge: a dot is for VLANs (eth0.5)"));
        }
        _ => {}
    }
    // bonding_masters is a file in the directory of interfaces.
    if name == "bonding_masters" {
        checks.add(format!("{field}.name"), format!("{name} is reserved"));
    }
}

fn find<'n>(network: &'n Network, name: &InterfaceName) -> Option<&'n Interface> {
    network.interfaces.iter().find(|interface| interface.name == *name)
}

/// Members exist, are of a kind that fits, are given once and belong to nobody else.
fn members(checks: &mut Checks, field: &str, network: &Network, own: &Interface, members: &[InterfaceName], fits: &[&str]) {
    for (index, name) in members.iter().enumerate() {
        let at = format!("{field}.members[{index}]");
        match find(network, name) {
            None => checks.add(at.clone(), format!("{name} is not in network.interfaces")),
            Some(member) if member.name == own.name => checks.add(at.clone(), format!("{name} can't be its own member")),
            Some(member) if !fits.contains(&member.kind.name()) => {
                checks.add(at.clone(), format!("{name} is a {}; members of a {} are {}", member.kind.name(), own.kind.name(), fits.join(", ")));
            }
            Some(_) => {}
        }
        if members[..index].contains(name) {
            checks.add(at.clone(), format!("{name} is given twice"));
        }
        let others = network.interfaces.iter().filter(|other| other.name != own.name);
        let other = others.filter(|other| !matches!(other.kind, LinkKind::Vlan(_))).find(|other| other.kind.below().contains(name));
        if let Some(other) = other {
            checks.add(at, format!("{name} is also a member of {}", other.name));
        }
    }
}

fn bond_checks(checks: &mut Checks, field: &str, network: &Network, own: &Interface, bond: &Bond) {
    members(checks, field, network, own, &bond.members, &["ethernet"]);
    if bond.members.is_empty() {
        checks.add(format!("{field}.members"), "a bond needs at least one member");
    }
    let mode = bond.mode;
    if let Some(primary) = &bond.primary {
        if !bond.members.contains(primary) {
            checks.add(format!("{field}.primary"), format!("{primary} is not a member"));
        }
        if !matches!(mode, BondMode::ActiveBackup | BondMode::BalanceTlb | BondMode::BalanceAlb) {
            checks.add(format!("{field}.primary"), format!("has no meaning in mode {}", mode.name()));
        }
    }
    if bond.lacp_rate.is_some() && mode != BondMode::Lacp {
        checks.add(format!("{field}.lacp_rate"), format!("has no meaning in mode {}", mode.name()));
    }
    if bond.hash_policy.is_some() && !matches!(mode, BondMode::BalanceXor | BondMode::Lacp | BondMode::BalanceTlb) {
        checks.add(format!("{field}.xmit_hash_policy"), format!("has no meaning in mode {}", mode.name()));
    }
    match bond.miimon_ms {
        Some(0) if matches!(mode, BondMode::Lacp | BondMode::BalanceTlb | BondMode::BalanceAlb) => {
            checks.add(format!("{field}.miimon_ms"), format!("mode {} needs link monitoring", mode.name()));
        }
        Some(ms) if ms > MIIMON_MS_MAX => checks.add(format!("{field}.miimon_ms"), format!("{ms} is more than {MIIMON_MS_MAX}")),
        _ => {}
    }
}

fn bridge_checks(checks: &mut Checks, field: &str, network: &Network, own: &Interface, bridge: &Bridge) {
    members(checks, field, network, own, &bridge.members, &["ethernet", "bond", "vlan"]);
    let mut range = |name: &str, value: Option<u32>, least: u32, most: u32| {
        if let Some(value) = value.filter(|value| !(least..=most).contains(value)) {
            checks.add(format!("{field}.{name}"), format!("{value} is not {least} to {most}"));
        }
    };
    // The kernel's bounds (net/bridge/br_private_stp.h) for a bridge with spanning tree; without, only the hello time is bounded.
    range("forward_delay", bridge.forward_delay, if bridge.stp { 2 } else { 0 }, 30);
    range("hello_time", bridge.hello_time, 1, 10);
    range("max_age", bridge.max_age, 6, 40);
    range("ageing_time", bridge.ageing_time, 0, AGEING_S_MAX);
    range("priority", bridge.priority, 0, 65_535);
}

fn vlan_checks(checks: &mut Checks, field: &str, network: &Network, own: &Interface, vlan: &Vlan) {
    if !(1..=4094).contains(&vlan.id) {
        checks.add(format!("{field}.id"), format!("{} is not 1 to 4094 (IEEE 802.1Q)", vlan.id));
    }
    let at = format!("{field}.link");
    match find(network, &vlan.link) {
        None => checks.add(at, format!("{} is not in network.interfaces", vlan.link)),
        Some(link) if link.name == own.name => checks.add(at, "a VLAN can't be on itself"),
        Some(link) if matches!(link.kind, LinkKind::Vlan(_)) => checks.add(at, format!("{} is a VLAN itself: one tag is all there is", link.name)),
        Some(link) => {
            if let Some(master) = network.master(&link.name).filter(|master| master.is_bond) {
                checks.add(at, format!("{} is a member of {}: the VLAN belongs on the bond", link.name, master.name));
            }
            if let (Some(own), Some(below)) = (own.mtu, link.mtu)
                && own > below
            {
                checks.add(field.replace(".vlan", ".mtu"), format!("{own} is more than {below}, the MTU of {}", link.name));
            }
        }
    }
    let earlier = network.vlans_on(&vlan.link).find(|(name, other)| other.id == vlan.id && **name != own.name);
    if let Some((name, _)) = earlier {
        checks.add(format!("{field}.id"), format!("{} of {} is also {name}", vlan.id, vlan.link));
    }
}

/// A member has no network of its own: the kernel would not use it.
fn member_checks(checks: &mut Checks, field: &str, network: &Network, member: &Interface) {
    let Some(master) = network.master(&member.name) else { return };
    let routed = member.gateways().next().is_some() || !member.routes.is_empty();
    let dns = !member.nameservers.is_empty() || !member.search.is_empty();
    if !member.is_bare() || routed || dns || member.accept_ra.is_some() || member.ipv6_privacy.is_some() || member.link_local == Some(true) {
        checks.add(field, format!("{} is a member of {}: addresses, routes and resolvers belong there", member.name, master.name));
    }
}

/// Nothing stands on itself, however many steps away.
fn cycle_checks(checks: &mut Checks, network: &Network) {
    let below: BTreeMap<&str, &[InterfaceName]> =
        network.interfaces.iter().map(|interface| (interface.name.as_str(), interface.kind.below())).collect();
    for (index, interface) in network.interfaces.iter().enumerate() {
        let mut seen: Vec<&str> = Vec::new();
        let mut todo: Vec<&str> = below[interface.name.as_str()].iter().map(InterfaceName::as_str).collect();
        while let Some(name) = todo.pop() {
            if name == interface.name.as_str() {
                // Directly is said by the others.
                if !below[name].iter().any(|other| other.as_str() == name) {
                    checks.add(format!("network.interfaces[{index}]"), format!("{name} stands on itself, by way of {}", seen.join(", ")));
                }
                break;
            }
            if !seen.contains(&name) {
                seen.push(name);
                todo.extend(below.get(name).copied().unwrap_or_default().iter().map(InterfaceName::as_str));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::guest::decode::from_value;

    fn fields(interfaces: Value) -> Vec<String> {
        let document = json!({"instance": "web1", "network": {"interfaces": interfaces}});
        match from_value(&document, None) {
            Ok(_) => Vec::new(),
            Err(error) => error.violations().iter().map(|violation| violation.field.trim_start_matches("network.interfaces").to_owned()).collect(),
        }
    }

    #[test]
    fn links_that_fit_together_are_taken() {
        assert!(
            fields(json!([
                {"name": "eth0"}, {"name": "eth1"},
                {"name": "bond0", "bond": {"members": ["eth0", "eth1"], "mode": "active-backup", "primary": "eth0"}},
                {"name": "bond0.7", "vlan": {"id": 7, "link": "bond0"}},
                {"name": "br0", "addresses": ["192.0.2.1/24"], "bridge": {"members": ["bond0.7"], "stp": true, "forward_delay": 2}},
            ]))
            .is_empty()
        );
    }

    #[test]
    fn what_the_kernel_would_refuse_is_refused_with_its_field() {
        let eth0 = json!({"name": "eth0"});
        let bond = |bond: Value| json!([eth0, {"name": "bond0", "bond": bond}]);
        let vlan = |name: &str, id: u32| json!([eth0, {"name": name, "vlan": {"id": id, "link": "eth0"}}]);
        let long = "a".repeat(16);
        for (interfaces, field) in [
            (bond(json!({"members": [], "mode": "balance-rr"})), "[1].bond.members"),
            (bond(json!({"members": ["eth9"], "mode": "balance-rr"})), "[1].bond.members[0]"),
            (bond(json!({"members": ["eth0", "eth0"], "mode": "balance-rr"})), "[1].bond.members[1]"),
            (bond(json!({"members": ["bond0"], "mode": "balance-rr"})), "[1].bond.members[0]"),
            (bond(json!({"members": ["eth0"], "mode": "round-robin"})), "[1].bond.mode"),
            (bond(json!({"members": ["eth0"], "mode": "802.3ad", "primary": "eth0"})), "[1].bond.primary"),
            (bond(json!({"members": ["eth0"], "mode": "active-backup", "primary": "eth1"})), "[1].bond.primary"),
            (bond(json!({"members": ["eth0"], "mode": "balance-rr", "lacp_rate": "fast"})), "[1].bond.lacp_rate"),
            (bond(json!({"members": ["eth0"], "mode": "balance-rr", "xmit_hash_policy": "layer2"})), "[1].bond.xmit_hash_policy"),
            (bond(json!({"members": ["eth0"], "mode": "802.3ad", "miimon_ms": 0})), "[1].bond.miimon_ms"),
            (vlan("v", 0), "[1].vlan.id"),
            (vlan("v", 4095), "[1].vlan.id"),
            (vlan("eth0.6", 5), "[1].name"),
            (vlan(&long, 5), "[1].name"),
            (json!([{"name": "eth0.5"}]), "[0].name"),
            (json!([{"name": "v", "vlan": {"id": 5, "link": "v"}}]), "[0].vlan.link"),
            (json!([eth0, {"name": "a", "vlan": {"id": 5, "link": "eth0"}}, {"name": "b", "vlan": {"id": 5, "link": "a"}}]), "[2].vlan.link"),
            (json!([eth0, {"name": "a", "vlan": {"id": 5, "link": "eth0"}}, {"name": "b", "vlan": {"id": 5, "link": "eth0"}}]), "[2].vlan.id"),
            (json!([{"name": "br0", "bridge": {"members": ["v"]}}, {"name": "v", "vlan": {"id": 5, "link": "br0"}}]), "[0]"),
            (json!([eth0, {"name": "br0", "bridge": {"members": ["eth0"], "stp": true, "forward_delay": 1}}]), "[1].bridge.forward_delay"),
            (json!([{"name": "eth0", "addresses": ["192.0.2.1/24"]}, {"name": "br0", "bridge": {"members": ["eth0"]}}]), "[0]"),
            (
                json!([eth0, {"name": "br0", "bridge": {"members": ["eth0"]}}, {"name": "br1", "bridge": {"members": ["eth0"]}}]),
                "[1].bridge.members[0]",
            ),
            (json!([{"name": "eth0", "bond": {"members": [], "mode": "balance-rr"}, "bridge": {}}]), "[0]"),
            (json!([{"name": "eth0", "routes": [{"to": "10.0.0.0/8", "table": 255}]}]), "[0].routes[0].table"),
        ] {
            let found = fields(interfaces.clone());
            assert!(found.iter().any(|found| found == field), "{interfaces}: {field} is not in {found:?}");
        }
    }
}
