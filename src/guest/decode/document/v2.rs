//! Version 2: netplan's configuration (netplan-yaml(5)), which is cloud-init's version 2 as well.
//!
//! The key of an interface is its name, unless `set-name` or a plain `match: name` says another; bonds, bridges and VLANs refer to keys. A NIC that
//! is matched by MAC gets its name pinned, so that a key which was only a label becomes the name.

use std::collections::BTreeMap;

use serde_json::json;

use super::{Cursor, destination};
use crate::{
    error::Result,
    guest::{
        config::{Bond, Bridge, Cidr, Interface, LinkKind, Network, Route, RouteKind, Rule, Vlan},
        decode::cursor::Fields,
    },
    names::InterfaceName,
};

/// Keys to names.
type Names = BTreeMap<String, InterfaceName>;

pub(super) fn decode(mut fields: Fields<'_>) -> Result<Network> {
    fields.optional("renderer", |cursor| match cursor.text()? {
        "networkd" | "NetworkManager" | "sriov" => Ok(()),
        _ => Err(cursor.error("must be networkd or NetworkManager")),
    })?;
    let sections = ["ethernets", "bonds", "bridges", "vlans"];
    let mut given = Vec::new();
    for section in sections {
        // `ethernets:` with nothing below is what a generator leaves of an empty list.
        let entries = fields.optional(section, |cursor| cursor.fields()?.each(|id, cursor| Ok((id.to_owned(), cursor))))?.unwrap_or_default();
        given.extend(entries.into_iter().map(|(id, cursor)| (section, id, cursor)));
    }
    fields.finish()?;
    let mut names = Names::new();
    for (section, id, cursor) in &given {
        let name = name_of(section, id, cursor)?;
        if names.insert(id.clone(), name).is_some() {
            return Err(cursor.error("is the key of two interfaces"));
        }
    }
    let interfaces = given.into_iter().map(|(section, id, cursor)| interface(section, &names, &id, cursor)).collect::<Result<_>>()?;
    Ok(Network { interfaces, ..Network::default() })
}

/// The name that an interface will have.
fn name_of(section: &str, id: &str, cursor: &Cursor<'_>) -> Result<InterfaceName> {
    let mut fields = cursor.fields()?;
    let set = fields.optional("set-name", Cursor::parse)?;
    let by_name = fields.optional("match", |cursor| cursor.fields()?.optional("name", |cursor| Ok((cursor.text()?.to_owned(), cursor))))?.flatten();
    match (set, by_name) {
        (Some(name), _) => Ok(name),
        (None, Some((name, cursor))) if section == "ethernets" => {
            name.parse().map_err(|why| cursor.error(format!("can't be expressed: {why}; give the MAC address instead of a pattern")))
        }
        _ => id.parse().map_err(|why| cursor.error(format!("the key is not the name of an interface, and set-name is not given: {why}"))),
    }
}

fn refer(cursor: Cursor<'_>, names: &Names) -> Result<InterfaceName> {
    let id = cursor.word()?;
    names.get(&id).cloned().ok_or_else(|| cursor.error("is not an interface of this document"))
}

fn interface(section: &str, names: &Names, id: &str, cursor: Cursor<'_>) -> Result<Interface> {
    let name = names.get(id).cloned().ok_or_else(|| cursor.error("has no name"))?;
    let mut fields = cursor.fields()?;
    let mut interface = Interface::named(name);
    match section {
        "ethernets" => ethernet(&mut interface, &mut fields)?,
        "bonds" => interface.kind = LinkKind::Bond(bond(&mut fields, names)?),
        "bridges" => interface.kind = LinkKind::Bridge(bridge(&mut fields, names)?),
        _ => {
            let id = fields.required("id", Cursor::loose_number)?;
            interface.kind = LinkKind::Vlan(Vlan { id, link: fields.required("link", |cursor| refer(cursor, names))? });
        }
    }
    if section != "ethernets" {
        interface.mac = fields.optional("macaddress", Cursor::parse)?;
    }
    common(&mut interface, &mut fields)?;
    fields.finish()?;
    Ok(interface)
}

fn ethernet(interface: &mut Interface, fields: &mut Fields<'_>) -> Result<()> {
    let renamed = fields.optional("set-name", |cursor| Ok(cursor.text()?.to_owned()))?;
    if let Some(matched) = fields.optional("match", Ok)? {
        let mut matching = matched.fields()?;
        interface.mac = matching.optional("macaddress", Cursor::parse)?;
        let name = matching.optional("name", |cursor| Ok(cursor.text()?.to_owned()))?;
        matching.refuse("driver", &[], "an interface is found by its MAC address or its name")?;
        matching.finish()?;
        match (interface.mac, name, renamed) {
            (None, Some(old), Some(new)) if old != new => {
                return Err(matched.error(format!("can't be expressed: {new} is pinned to a MAC address, which is not given")));
            }
            (None, None, _) => return Err(matched.error("can't be expressed: neither macaddress nor name is given")),
            _ => {}
        }
    }
    fields.refuse("macaddress", &[], "a NIC keeps its own address (match: macaddress finds it)")
}

fn common(interface: &mut Interface, fields: &mut Fields<'_>) -> Result<()> {
    interface.dhcp4 = fields.optional("dhcp4", Cursor::loose_boolean)?.unwrap_or_default();
    interface.dhcp6 = fields.optional("dhcp6", Cursor::loose_boolean)?.unwrap_or_default();
    interface.accept_ra = fields.optional("accept-ra", Cursor::loose_boolean)?;
    interface.ipv6_privacy = fields.optional("ipv6-privacy", Cursor::loose_boolean)?;
    interface.optional = fields.optional("optional", Cursor::loose_boolean)?.unwrap_or_default();
    interface.mtu = fields.optional("mtu", Cursor::loose_number)?;
    interface.link_local = fields.optional("link-local", link_local)?.flatten();
    interface.addresses = fields.optional("addresses", |cursor| cursor.list(address))?.unwrap_or_default();
    interface.gateway4 = fields.optional("gateway4", Cursor::parse)?;
    interface.gateway6 = fields.optional("gateway6", Cursor::parse)?;
    if let Some((servers, search)) = fields.optional("nameservers", nameservers)? {
        (interface.nameservers, interface.search) = (servers, search);
    }
    for overrides in ["dhcp4-overrides", "dhcp6-overrides"] {
        let metric = fields.optional(overrides, |cursor| {
            let mut fields = cursor.fields()?;
            let metric = fields.optional("route-metric", Cursor::loose_number::<u32>)?;
            // What is on unless it is switched off.
            for on in ["use-dns", "use-hostname", "use-ntp", "use-routes", "use-mtu", "send-hostname"] {
                fields.refuse(on, &[json!(true)], "everything that a lease has is used")?;
            }
            fields.finish()?;
            Ok(metric.map(|metric| (metric, cursor)))
        })?;
        if let Some((metric, cursor)) = metric.flatten() {
            if interface.metric.is_some_and(|other| other != metric) {
                return Err(cursor.error("can't be expressed: an interface has one metric for its default routes"));
            }
            interface.metric = Some(metric);
        }
    }
    routes(interface, fields)?;
    fields.refuse("wakeonlan", &[json!(false)], "wake-on-LAN is left as the guest has it")?;
    fields.refuse("critical", &[json!(false)], "a lease is given up when its interface goes down")?;
    fields.refuse("activation-mode", &[], "every interface is brought up at boot")?;
    interface.rules = fields.optional("routing-policy", |cursor| cursor.list(rule))?.unwrap_or_default();
    Ok(())
}

/// An address without a prefix length is one host, as ip-rule(8) has it.
fn rule(cursor: Cursor<'_>) -> Result<Rule> {
    let mut fields = cursor.fields()?;
    let network = |cursor: Cursor<'_>| match cursor.text()?.parse::<std::net::IpAddr>() {
        Ok(address) => Ok(Cidr { address, prefix: if address.is_ipv4() { 32 } else { 128 } }),
        Err(_) => super::super::parse_cidr(cursor.text()?).map_err(|why| cursor.error(why)),
    };
    let rule = Rule {
        from: fields.optional("from", network)?,
        to: fields.optional("to", network)?,
        table: fields.required("table", Cursor::loose_number)?,
        priority: fields.optional("priority", Cursor::loose_number)?,
        mark: fields.optional("mark", Cursor::loose_number)?,
    };
    fields.refuse("type-of-service", &[json!(0)], "a rule has from, to, table, priority and mark")?;
    fields.finish()?;
    Ok(rule)
}

fn routes(interface: &mut Interface, fields: &mut Fields<'_>) -> Result<()> {
    let given = fields.optional("routes", |cursor| cursor.list(|cursor| Ok((route(&cursor)?, cursor))))?.unwrap_or_default();
    for (route, cursor) in given {
        // The default route of the main table is the interface's gateway where it can be: back-ends know it best as that.
        let is_main = route.to.prefix == 0 && route.table.is_none() && route.kind == RouteKind::Unicast;
        let taken = match route.via {
            Some(std::net::IpAddr::V4(via)) if is_main && interface.gateway4.is_none() => interface.gateway4.replace(via).is_none(),
            Some(std::net::IpAddr::V6(via)) if is_main && interface.gateway6.is_none() => interface.gateway6.replace(via).is_none(),
            _ => false,
        };
        if !taken {
            interface.routes.push(route);
            continue;
        }
        if route.metric.is_some() && interface.metric.is_some() && interface.metric != route.metric {
            return Err(cursor.error("can't be expressed: the default routes of an interface have one metric"));
        }
        interface.metric = interface.metric.or(route.metric);
    }
    Ok(())
}

fn route(cursor: &Cursor<'_>) -> Result<Route> {
    let mut fields = cursor.fields()?;
    let via: Option<std::net::IpAddr> = fields.optional("via", Cursor::parse)?;
    let v6 = via.is_some_and(|via| via.is_ipv6());
    let kind = fields.optional("type", Cursor::parse)?.unwrap_or(RouteKind::Unicast);
    let route = Route {
        to: fields.required("to", |cursor| {
            if cursor.text()? == "default" && via.is_none() {
                return Err(cursor.error("default needs a next hop in via, which tells the family"));
            }
            destination(&cursor, v6)
        })?,
        via,
        kind,
        metric: fields.optional("metric", Cursor::loose_number)?,
        table: fields.optional("table", Cursor::loose_number)?.filter(|table| *table != 254),
        on_link: fields.optional("on-link", Cursor::loose_boolean)?.unwrap_or_default(),
    };
    let link = json!("link");
    let scopes = if via.is_none() { vec![link, json!("global")] } else { vec![json!("global")] };
    fields.refuse("scope", &scopes, "the scope follows from the next hop")?;
    for other in ["from", "mtu", "congestion-window", "advertised-receive-window", "advertised-mss"] {
        fields.refuse(other, &[], "a route has a destination, a next hop, a metric, a table and a type")?;
    }
    fields.finish()?;
    Ok(route)
}

/// netplan takes an object with lifetime and label in place of the text; only the plain form can be expressed.
fn address(cursor: Cursor<'_>) -> Result<Cidr> {
    if cursor.is_object() {
        return Err(cursor.error("can't be expressed: an address has no lifetime and no label"));
    }
    super::super::parse_cidr(cursor.text()?).map_err(|why| cursor.error(why))
}

type Dns = (Vec<std::net::IpAddr>, Vec<crate::names::Hostname>);

fn nameservers(cursor: Cursor<'_>) -> Result<Dns> {
    let mut fields = cursor.fields()?;
    let servers = fields.optional("addresses", |cursor| cursor.list(Cursor::parse))?.unwrap_or_default();
    let search = fields.optional("search", |cursor| cursor.list(Cursor::parse))?.unwrap_or_default();
    fields.finish()?;
    Ok((servers, search))
}

/// Which families have link-local addresses; netplan's default is IPv6.
fn link_local(cursor: Cursor<'_>) -> Result<Option<bool>> {
    let families = cursor.clone().list(|cursor| Ok(cursor.text()?.to_owned()))?;
    match families.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => Ok(Some(false)),
        ["ipv6"] => Ok(None),
        _ => Err(cursor.error("can't be expressed: IPv4 has no link-local addresses here; give [] or [ipv6]")),
    }
}

fn members(fields: &mut Fields<'_>, names: &Names) -> Result<Vec<InterfaceName>> {
    Ok(fields.optional("interfaces", |cursor| cursor.list(|cursor| refer(cursor, names)))?.unwrap_or_default())
}

fn bond(fields: &mut Fields<'_>, names: &Names) -> Result<Bond> {
    let members = members(fields, names)?;
    let mut bond =
        Bond { members, mode: crate::guest::config::BondMode::BalanceRr, primary: None, miimon_ms: None, lacp_rate: None, hash_policy: None };
    let Some(mut fields) = fields.optional("parameters", |cursor| cursor.fields())? else { return Ok(bond) };
    if let Some(mode) = fields.optional("mode", Cursor::parse)? {
        bond.mode = mode;
    }
    bond.primary = fields.optional("primary", |cursor| refer(cursor, names))?;
    bond.miimon_ms = fields.optional("mii-monitor-interval", milliseconds)?;
    bond.lacp_rate = fields.optional("lacp-rate", Cursor::parse)?;
    bond.hash_policy = fields.optional("transmit-hash-policy", Cursor::parse)?;
    fields.finish()?;
    Ok(bond)
}

/// netplan's times are milliseconds without a unit, or have one.
fn milliseconds(cursor: Cursor<'_>) -> Result<u32> {
    let text = cursor.word()?;
    let (number, factor) = match text.strip_suffix("ms") {
        Some(number) => (number, 1),
        None => text.strip_suffix('s').map_or((&text[..], 1), |number| (number, 1000)),
    };
    let number = number.parse::<u32>().ok().and_then(|number| number.checked_mul(factor));
    number.ok_or_else(|| cursor.error("must be a number of milliseconds, or have the unit ms or s"))
}

fn seconds(cursor: Cursor<'_>) -> Result<u32> {
    let text = cursor.word()?;
    text.strip_suffix('s').unwrap_or(&text).parse().map_err(|_| cursor.error("must be a whole number of seconds"))
}

fn bridge(fields: &mut Fields<'_>, names: &Names) -> Result<Bridge> {
    // netplan's default is a spanning tree.
    let mut bridge = Bridge { members: members(fields, names)?, stp: true, ..Bridge::default() };
    let Some(mut fields) = fields.optional("parameters", |cursor| cursor.fields())? else { return Ok(bridge) };
    bridge.stp = fields.optional("stp", Cursor::loose_boolean)?.unwrap_or(true);
    bridge.forward_delay = fields.optional("forward-delay", seconds)?;
    bridge.hello_time = fields.optional("hello-time", seconds)?;
    bridge.max_age = fields.optional("max-age", seconds)?;
    bridge.ageing_time = fields.optional("ageing-time", seconds)?;
    bridge.priority = fields.optional("priority", Cursor::loose_number)?;
    fields.finish()?;
    Ok(bridge)
}
