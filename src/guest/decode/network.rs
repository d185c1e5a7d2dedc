//! The `network` member of the configuration document.

use super::{
    cursor::{Cursor, Fields},
    document,
};
use crate::{
    error::Result,
    guest::config::{BackendKind, Bond, Bridge, Cidr, Interface, LinkKind, Network, Route, RouteKind, Rule, Vlan},
};

/// The network: typed, or as a document of netplan or cloud-init (text, or the document itself as JSON).
pub(super) fn network(cursor: Cursor<'_>) -> Result<Network> {
    let mut fields = cursor.fields()?;
    let backend = fields.optional("backend", backend)?;
    if let Some(network) = fields.optional("document", document::decode)? {
        fields.finish()?;
        return Ok(Network { backend, ..network });
    }
    let network = Network {
        interfaces: fields.optional("interfaces", |cursor| cursor.list(interface))?.unwrap_or_default(),
        nameservers: fields.optional("nameservers", |cursor| cursor.list(Cursor::parse))?.unwrap_or_default(),
        search: fields.optional("search", |cursor| cursor.list(Cursor::parse))?.unwrap_or_default(),
        backend,
    };
    fields.finish()?;
    Ok(network)
}

fn backend(cursor: Cursor<'_>) -> Result<BackendKind> {
    BackendKind::from_name(cursor.text()?).ok_or_else(|| cursor.error(format!("must be one of {}", BackendKind::names())))
}

fn interface(cursor: Cursor<'_>) -> Result<Interface> {
    let mut fields = cursor.fields()?;
    let mut interface = Interface::named(fields.required("name", Cursor::parse)?);
    interface.kind = link_kind(&cursor, &mut fields)?;
    interface.mac = fields.optional("mac", Cursor::parse)?;
    interface.addresses = fields.optional("addresses", |cursor| cursor.list(cidr))?.unwrap_or_default();
    interface.gateway4 = fields.optional("gateway4", Cursor::parse)?;
    interface.gateway6 = fields.optional("gateway6", Cursor::parse)?;
    interface.metric = fields.optional("metric", Cursor::number)?;
    interface.routes = fields.optional("routes", |cursor| cursor.list(route))?.unwrap_or_default();
    interface.rules = fields.optional("rules", |cursor| cursor.list(rule))?.unwrap_or_default();
    interface.dhcp4 = fields.optional("dhcp4", Cursor::boolean)?.unwrap_or_default();
    interface.dhcp6 = fields.optional("dhcp6", Cursor::boolean)?.unwrap_or_default();
    interface.accept_ra = fields.optional("accept_ra", Cursor::boolean)?;
    interface.ipv6_privacy = fields.optional("ipv6_privacy", Cursor::boolean)?;
    interface.link_local = fields.optional("link_local", Cursor::boolean)?;
    interface.optional = fields.optional("optional", Cursor::boolean)?.unwrap_or_default();
    interface.mtu = fields.optional("mtu", Cursor::number)?;
    interface.nameservers = fields.optional("nameservers", |cursor| cursor.list(Cursor::parse))?.unwrap_or_default();
    interface.search = fields.optional("search", |cursor| cursor.list(Cursor::parse))?.unwrap_or_default();
    fields.finish()?;
    Ok(interface)
}

/// At most one of `bond`, `bridge` and `vlan`; a NIC without.
fn link_kind<'v>(cursor: &Cursor<'v>, fields: &mut Fields<'v>) -> Result<LinkKind> {
    let bond = fields.optional("bond", bond)?.map(LinkKind::Bond);
    let bridge = fields.optional("bridge", bridge)?.map(LinkKind::Bridge);
    let vlan = fields.optional("vlan", vlan)?.map(LinkKind::Vlan);
    let mut given = [bond, bridge, vlan].into_iter().flatten();
    match (given.next(), given.next()) {
        (None, _) => Ok(LinkKind::Ethernet),
        (Some(kind), None) => Ok(kind),
        (Some(_), Some(_)) => Err(cursor.error("is more than one of bond, bridge and vlan")),
    }
}

fn bond(cursor: Cursor<'_>) -> Result<Bond> {
    let mut fields = cursor.fields()?;
    let bond = Bond {
        members: fields.required("members", |cursor| cursor.list(Cursor::parse))?,
        mode: fields.required("mode", Cursor::parse)?,
        primary: fields.optional("primary", Cursor::parse)?,
        miimon_ms: fields.optional("miimon_ms", Cursor::number)?,
        lacp_rate: fields.optional("lacp_rate", Cursor::parse)?,
        hash_policy: fields.optional("xmit_hash_policy", Cursor::parse)?,
    };
    fields.finish()?;
    Ok(bond)
}

fn bridge(cursor: Cursor<'_>) -> Result<Bridge> {
    let mut fields = cursor.fields()?;
    let bridge = Bridge {
        members: fields.optional("members", |cursor| cursor.list(Cursor::parse))?.unwrap_or_default(),
        stp: fields.optional("stp", Cursor::boolean)?.unwrap_or_default(),
        forward_delay: fields.optional("forward_delay", Cursor::number)?,
        hello_time: fields.optional("hello_time", Cursor::number)?,
        max_age: fields.optional("max_age", Cursor::number)?,
        ageing_time: fields.optional("ageing_time", Cursor::number)?,
        priority: fields.optional("priority", Cursor::number)?,
    };
    fields.finish()?;
    Ok(bridge)
}

fn vlan(cursor: Cursor<'_>) -> Result<Vlan> {
    let mut fields = cursor.fields()?;
    let vlan = Vlan { id: fields.required("id", Cursor::number)?, link: fields.required("link", Cursor::parse)? };
    fields.finish()?;
    Ok(vlan)
}

fn route(cursor: Cursor<'_>) -> Result<Route> {
    let mut fields = cursor.fields()?;
    let via: Option<std::net::IpAddr> = fields.optional("via", Cursor::parse)?;
    let v6 = via.is_some_and(|via| via.is_ipv6());
    let route = Route {
        to: fields.required("to", |cursor| match cursor.text()? {
            // As ip(8) and netplan say it; the family is the next hop's.
            "default" if via.is_none() => Err(cursor.error("default needs a next hop in via, which tells the family")),
            "default" => default_route(v6, &cursor),
            _ => cidr(cursor),
        })?,
        via,
        kind: fields.optional("type", Cursor::parse)?.unwrap_or(RouteKind::Unicast),
        table: fields.optional("table", Cursor::number)?,
        metric: fields.optional("metric", Cursor::number)?,
        on_link: fields.optional("on_link", Cursor::boolean)?.unwrap_or_default(),
    };
    fields.finish()?;
    Ok(route)
}

fn rule(cursor: Cursor<'_>) -> Result<Rule> {
    let mut fields = cursor.fields()?;
    let rule = Rule {
        from: fields.optional("from", cidr)?,
        to: fields.optional("to", cidr)?,
        table: fields.required("table", Cursor::number)?,
        priority: fields.optional("priority", Cursor::number)?,
        mark: fields.optional("mark", Cursor::number)?,
    };
    fields.finish()?;
    Ok(rule)
}

fn default_route(v6: bool, cursor: &Cursor<'_>) -> Result<Cidr> {
    parse_cidr(if v6 { "::/0" } else { "0.0.0.0/0" }).map_err(|why| cursor.error(why))
}

fn cidr(cursor: Cursor<'_>) -> Result<Cidr> {
    parse_cidr(cursor.text()?).map_err(|why| cursor.error(why))
}

/// An address with its prefix length, `192.0.2.10/24`. The prefix is never guessed.
pub fn parse_cidr(text: &str) -> Result<Cidr, String> {
    let shown = || text.chars().take(64).collect::<String>().escape_default().to_string();
    let (address, prefix) = text.split_once('/').ok_or_else(|| format!("\"{}\" has no prefix length (as in 192.0.2.10/24)", shown()))?;
    let address: std::net::IpAddr = address.parse().map_err(|_| format!("\"{}\" is not an IP address with a prefix length", shown()))?;
    let max = if address.is_ipv4() { 32 } else { 128 };
    let digits = !prefix.is_empty() && prefix.len() <= 3 && prefix.bytes().all(|b| b.is_ascii_digit());
    match prefix.parse::<u8>() {
        Ok(prefix) if digits && prefix <= max => Ok(Cidr { address, prefix }),
        _ => Err(format!("\"{}\": the prefix length must be 0 to {max}", shown())),
    }
}
