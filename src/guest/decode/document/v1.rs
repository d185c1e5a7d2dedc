//! Version 1 of cloud-init's network-config: a list of things, with addresses in `subnets` (cloud-init's network-config-format-v1).

use std::net::{IpAddr, Ipv4Addr};

use super::{Cursor, destination};
use crate::{
    error::Result,
    guest::{
        config::{Bond, BondMode, Bridge, Cidr, Interface, LinkKind, Network, Route, RouteKind, Vlan},
        decode::cursor::Fields,
    },
    names::Hostname,
};

pub(super) fn decode(mut fields: Fields<'_>) -> Result<Network> {
    let entries = fields.required("config", |cursor| cursor.list(Ok))?;
    fields.finish()?;
    let mut network = Network::default();
    // Routes and resolvers may stand before the interfaces they are for.
    let mut later = Vec::new();
    for cursor in entries {
        let mut fields = cursor.fields()?;
        let kind = fields.required("type", |cursor| Ok((cursor.text()?, cursor)))?;
        match kind.0 {
            "physical" | "bond" | "bridge" | "vlan" => {
                let interface = interface(kind.0, fields)?;
                network.interfaces.push(interface);
            }
            "nameserver" | "route" => later.push((kind.0, cursor, fields)),
            // Written by OpenStack for the loopback interface, which every guest has.
            "loopback" => {}
            _ => return Err(kind.1.error("must be physical, bond, bridge, vlan, nameserver or route")),
        }
    }
    for (kind, cursor, fields) in later {
        if kind == "route" { global_route(&mut network, &cursor, fields)? } else { nameserver(&mut network, fields)? }
    }
    Ok(network)
}

fn interface(kind: &str, mut fields: Fields<'_>) -> Result<Interface> {
    let mut interface = Interface::named(fields.required("name", Cursor::parse)?);
    interface.mac = fields.optional("mac_address", Cursor::parse)?;
    interface.mtu = fields.optional("mtu", Cursor::loose_number)?;
    interface.accept_ra = fields.optional("accept-ra", Cursor::loose_boolean)?;
    interface.kind = match kind {
        "bond" => LinkKind::Bond(bond(&mut fields)?),
        "bridge" => LinkKind::Bridge(bridge(&mut fields)?),
        "vlan" => LinkKind::Vlan(Vlan { id: fields.required("vlan_id", Cursor::loose_number)?, link: fields.required("vlan_link", Cursor::parse)? }),
        _ => LinkKind::Ethernet,
    };
    let subnets = fields.optional("subnets", |cursor| cursor.list(Ok))?.unwrap_or_default();
    for cursor in subnets {
        subnet(&mut interface, &cursor)?;
    }
    fields.refuse("wakeonlan", &[serde_json::json!(false)], "wake-on-LAN is left as the guest has it")?;
    fields.finish()?;
    Ok(interface)
}

fn subnet(interface: &mut Interface, cursor: &Cursor<'_>) -> Result<()> {
    let mut fields = cursor.fields()?;
    let kind = fields.required("type", |cursor| Ok((cursor.text()?, cursor)))?;
    match kind.0 {
        "dhcp" | "dhcp4" => interface.dhcp4 = true,
        "dhcp6" | "ipv6_dhcpv6-stateful" => interface.dhcp6 = true,
        "ipv6_slaac" => interface.accept_ra = Some(true),
        "ipv6_dhcpv6-stateless" => (interface.accept_ra, interface.dhcp6) = (Some(true), true),
        "static" | "static6" => {
            let netmask = fields.optional("netmask", |cursor| cursor.word())?;
            let address = fields.required("address", |cursor| address(&cursor, netmask.as_deref()))?;
            interface.addresses.push(address);
        }
        "manual" => {}
        _ => return Err(kind.1.error("must be dhcp, dhcp4, dhcp6, static, static6, manual, ipv6_slaac or ipv6_dhcpv6-stateful or -stateless")),
    }
    let gateway = fields.optional("gateway", |cursor| Ok((cursor.clone().parse()?, cursor)))?;
    match gateway {
        Some((IpAddr::V4(gateway), at)) if interface.gateway4.replace(gateway).is_some_and(|old| old != gateway) => {
            return Err(at.error("can't be expressed: a second gateway of the same family"));
        }
        Some((IpAddr::V6(gateway), at)) if interface.gateway6.replace(gateway).is_some_and(|old| old != gateway) => {
            return Err(at.error("can't be expressed: a second gateway of the same family"));
        }
        _ => {}
    }
    let metric = fields.optional("metric", |cursor| Ok((cursor.clone().loose_number()?, cursor)))?;
    if let Some((metric, at)) = metric
        && interface.metric.replace(metric).is_some_and(|old| old != metric)
    {
        return Err(at.error("can't be expressed: an interface has one metric for its default routes"));
    }
    let servers: Vec<IpAddr> = fields.optional("dns_nameservers", one_or_many)?.unwrap_or_default();
    interface.nameservers.extend(servers);
    let search: Vec<Hostname> = fields.optional("dns_search", one_or_many)?.unwrap_or_default();
    interface.search.extend(search);
    interface.routes.extend(fields.optional("routes", |cursor| cursor.list(|cursor| route(cursor.fields()?)))?.unwrap_or_default());
    fields.refuse("control", &[serde_json::json!("auto")], "every interface is brought up at boot")?;
    fields.refuse("broadcast", &[], "the broadcast address follows from the prefix")?;
    fields.finish()
}

/// A list, or words in one text.
fn one_or_many<T: std::str::FromStr<Err: std::fmt::Display>>(cursor: Cursor<'_>) -> Result<Vec<T>> {
    if cursor.is_list() {
        return cursor.list(Cursor::parse);
    }
    let words = cursor.text()?.split([' ', ',']).filter(|word| !word.is_empty());
    words.map(|word| word.parse().map_err(|error: T::Err| cursor.error(error.to_string()))).collect()
}

fn address(cursor: &Cursor<'_>, netmask: Option<&str>) -> Result<Cidr> {
    let text = cursor.text()?;
    let whole = match netmask {
        _ if text.contains('/') => text.to_owned(),
        Some(netmask) => format!("{text}/{}", prefix(netmask).map_err(|why| cursor.error(why))?),
        None => return Err(cursor.error("has neither a prefix length nor a netmask")),
    };
    super::super::parse_cidr(&whole).map_err(|why| cursor.error(why))
}

/// A prefix length, also written as a dotted netmask.
fn prefix(netmask: &str) -> Result<String, String> {
    match netmask.parse::<Ipv4Addr>() {
        Ok(mask) if u32::from(mask).leading_ones() + u32::from(mask).trailing_zeros() < 32 => {
            Err(format!("{mask} is not a netmask: its ones are not together"))
        }
        Ok(mask) => Ok(u32::from(mask).leading_ones().to_string()),
        Err(_) => Ok(netmask.chars().take(64).collect()),
    }
}

fn route(mut fields: Fields<'_>) -> Result<Route> {
    let via: Option<IpAddr> = fields.optional("gateway", Cursor::parse)?;
    let netmask = fields.optional("netmask", |cursor| cursor.word())?;
    let v6 = via.is_some_and(|via| via.is_ipv6());
    let to = |cursor: Cursor<'_>| match &netmask {
        Some(netmask) if !cursor.text()?.contains('/') => Ok(address(&cursor, Some(netmask))?.network()),
        _ => destination(&cursor, v6),
    };
    // Both words are in use for the same thing.
    let network = fields.optional("network", to)?;
    let route = Route {
        to: match network {
            Some(network) => network,
            None => fields.required("destination", to)?,
        },
        via,
        kind: RouteKind::Unicast,
        metric: fields.optional("metric", Cursor::loose_number)?,
        table: fields.optional("table", Cursor::loose_number)?,
        on_link: false,
    };
    fields.finish()?;
    Ok(route)
}

/// A route without an interface: it belongs to the one whose subnet has the next hop.
fn global_route(network: &mut Network, cursor: &Cursor<'_>, fields: Fields<'_>) -> Result<()> {
    let route = route_of_list(fields)?;
    let holds = |interface: &&mut Interface| route.via.is_some_and(|via| interface.addresses.iter().any(|cidr| cidr.contains(via)));
    match network.interfaces.iter_mut().find(holds) {
        Some(interface) => interface.routes.push(route),
        None => return Err(cursor.error("can't be expressed: no interface has an address on the network of the gateway")),
    }
    Ok(())
}

/// As [`route`], for an entry of the list, whose type was read.
fn route_of_list(mut fields: Fields<'_>) -> Result<Route> {
    fields.optional("type", |_| Ok(()))?;
    route(fields)
}

fn nameserver(network: &mut Network, mut fields: Fields<'_>) -> Result<()> {
    fields.optional("type", |_| Ok(()))?;
    let servers: Vec<IpAddr> = fields.required("address", one_or_many)?;
    let search: Vec<Hostname> = fields.optional("search", one_or_many)?.unwrap_or_default();
    let interface = fields.optional("interface", |cursor| Ok((cursor.text()?, cursor)))?;
    fields.finish()?;
    let (into_servers, into_search) = match interface {
        None => (&mut network.nameservers, &mut network.search),
        Some((name, cursor)) => match network.interfaces.iter_mut().find(|interface| interface.name.as_str() == name) {
            Some(interface) => (&mut interface.nameservers, &mut interface.search),
            None => return Err(cursor.error("is not an interface of this document")),
        },
    };
    into_servers.extend(servers);
    into_search.extend(search);
    Ok(())
}

/// The first of several spellings that is there: with `-`, with `_`, and without the prefix.
fn any<'v, T>(fields: &mut Fields<'v>, names: &[&'static str], decode: impl Fn(Cursor<'v>) -> Result<T>) -> Result<Option<T>> {
    let mut found = None;
    for name in names {
        let value = fields.optional(name, &decode)?;
        found = found.or(value);
    }
    Ok(found)
}

fn bond(fields: &mut Fields<'_>) -> Result<Bond> {
    let members = fields.required("bond_interfaces", |cursor| cursor.list(Cursor::parse))?;
    let mut bond = Bond { members, mode: BondMode::BalanceRr, primary: None, miimon_ms: None, lacp_rate: None, hash_policy: None };
    let Some(mut fields) = fields.optional("params", |cursor| cursor.fields())? else { return Ok(bond) };
    if let Some(mode) = any(&mut fields, &["bond-mode", "bond_mode", "mode"], mode)? {
        bond.mode = mode;
    }
    bond.primary = any(&mut fields, &["bond-primary", "bond_primary", "primary"], Cursor::parse)?;
    bond.miimon_ms = any(&mut fields, &["bond-miimon", "bond_miimon", "miimon"], Cursor::loose_number)?;
    bond.lacp_rate = any(&mut fields, &["bond-lacp-rate", "bond-lacp_rate", "bond_lacp_rate", "lacp_rate"], |cursor| match &cursor.word()?[..] {
        "0" => Ok(crate::guest::config::LacpRate::Slow),
        "1" => Ok(crate::guest::config::LacpRate::Fast),
        word => word.parse().map_err(|why: String| cursor.error(why)),
    })?;
    bond.hash_policy =
        any(&mut fields, &["bond-xmit-hash-policy", "bond-xmit_hash_policy", "bond_xmit_hash_policy", "xmit_hash_policy"], Cursor::parse)?;
    fields.finish()?;
    Ok(bond)
}

/// A word, or the number of the kernel's list.
fn mode(cursor: Cursor<'_>) -> Result<BondMode> {
    let word = match &cursor.word()?[..] {
        "0" => "balance-rr",
        "1" => "active-backup",
        "2" => "balance-xor",
        "3" => "broadcast",
        "4" => "802.3ad",
        "5" => "balance-tlb",
        "6" => "balance-alb",
        word => return word.parse().map_err(|why: String| cursor.error(why)),
    };
    word.parse().map_err(|why: String| cursor.error(why))
}

fn bridge(fields: &mut Fields<'_>) -> Result<Bridge> {
    let mut bridge =
        Bridge { members: fields.optional("bridge_interfaces", |cursor| cursor.list(Cursor::parse))?.unwrap_or_default(), ..Bridge::default() };
    let Some(mut fields) = fields.optional("params", |cursor| cursor.fields())? else { return Ok(bridge) };
    bridge.stp = any(&mut fields, &["bridge_stp", "bridge-stp"], Cursor::loose_boolean)?.unwrap_or_default();
    bridge.forward_delay = any(&mut fields, &["bridge_fd", "bridge-fd"], Cursor::loose_number)?;
    bridge.hello_time = any(&mut fields, &["bridge_hello", "bridge-hello"], Cursor::loose_number)?;
    bridge.max_age = any(&mut fields, &["bridge_maxage", "bridge-maxage"], Cursor::loose_number)?;
    bridge.ageing_time = any(&mut fields, &["bridge_ageing", "bridge-ageing"], Cursor::loose_number)?;
    bridge.priority = any(&mut fields, &["bridge_bridgeprio", "bridge-bridgeprio"], Cursor::loose_number)?;
    fields.finish()?;
    Ok(bridge)
}
