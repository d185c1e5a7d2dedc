//! The network messages of a request.

use std::{net::IpAddr, str::FromStr};

use super::{list, optional, parsed};
use crate::{
    error::{Error, Result, Stage},
    guest::{
        self,
        config::{BackendKind, Bond, Bridge, Cidr, Interface, LinkKind, Network, Route, RouteKind, Rule, Vlan},
    },
    proto,
};

fn address<T: FromStr>(field: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| Error::field(Stage::Request, field, format!("{text:?} is not an IP address of the kind that is meant here")))
}

fn cidr(field: &str, text: &str) -> Result<Cidr> {
    crate::guest::decode::parse_cidr(text).map_err(|why| Error::field(Stage::Request, field, why))
}

/// The network of an instance.
pub(super) fn network(field: &str, message: &proto::Network) -> Result<Network> {
    let wrong = || Error::field(Stage::Request, format!("{field}.backend"), format!("{:?} is none of {}", message.backend, BackendKind::names()));
    let backend = match message.backend.as_str() {
        "" => None,
        name => Some(BackendKind::from_name(name).ok_or_else(wrong)?),
    };
    if !message.document.is_empty() {
        let alone = proto::Network { document: message.document.clone(), backend: message.backend.clone(), ..Default::default() };
        if *message != alone {
            return Err(Error::field(Stage::Request, format!("{field}.document"), "is exclusive with interfaces, nameservers and search"));
        }
        let network = guest::decode::network_document(&message.document).map_err(|error| error.under_field(&format!("{field}.document")))?;
        return Ok(Network { backend, ..network });
    }
    Ok(Network {
        interfaces: list(&format!("{field}.interfaces"), &message.interfaces, interface)?,
        nameservers: list(&format!("{field}.nameservers"), &message.nameservers, |field, text| address::<IpAddr>(field, text))?,
        search: list(&format!("{field}.search"), &message.search, |field, text| parsed(field, text))?,
        backend,
    })
}

fn interface(field: &str, message: &proto::Interface) -> Result<Interface> {
    let at = |rest: &str| format!("{field}.{rest}");
    let gateway = |name: &str, text: &str| (!text.is_empty()).then(|| (at(name), text.to_owned()));
    let mtu = u16::try_from(message.mtu).map_err(|_| Error::field(Stage::Request, at("mtu"), format!("{} is more than 65535", message.mtu)))?;
    Ok(Interface {
        name: parsed(&at("name"), &message.name)?,
        kind: link_kind(field, message)?,
        mac: optional(&at("mac"), &message.mac)?,
        addresses: list(&at("addresses"), &message.addresses, |field, text| cidr(field, text))?,
        gateway4: gateway("gateway4", &message.gateway4).map(|(field, text)| address(&field, &text)).transpose()?,
        gateway6: gateway("gateway6", &message.gateway6).map(|(field, text)| address(&field, &text)).transpose()?,
        metric: message.metric,
        routes: list(&at("routes"), &message.routes, route)?,
        rules: list(&at("rules"), &message.rules, rule)?,
        dhcp4: message.dhcp4,
        dhcp6: message.dhcp6,
        accept_ra: message.accept_ra,
        ipv6_privacy: message.ipv6_privacy,
        link_local: message.link_local,
        optional: message.optional,
        mtu: (mtu > 0).then_some(mtu),
        nameservers: list(&at("nameservers"), &message.nameservers, |field, text| address::<IpAddr>(field, text))?,
        search: list(&at("search"), &message.search, |field, text| parsed(field, text))?,
    })
}

fn link_kind(field: &str, message: &proto::Interface) -> Result<LinkKind> {
    let names = |at: &str, names: &[String]| list(at, names, |at, name| parsed(at, name));
    match (&message.bond, &message.bridge, &message.vlan) {
        (None, None, None) => Ok(LinkKind::Ethernet),
        (Some(bond), None, None) => Ok(LinkKind::Bond(Bond {
            members: names(&format!("{field}.bond.members"), &bond.members)?,
            mode: parsed(&format!("{field}.bond.mode"), &bond.mode)?,
            primary: optional(&format!("{field}.bond.primary"), &bond.primary)?,
            miimon_ms: bond.miimon_ms,
            lacp_rate: optional(&format!("{field}.bond.lacp_rate"), &bond.lacp_rate)?,
            hash_policy: optional(&format!("{field}.bond.xmit_hash_policy"), &bond.xmit_hash_policy)?,
        })),
        (None, Some(bridge), None) => Ok(LinkKind::Bridge(Bridge {
            members: names(&format!("{field}.bridge.members"), &bridge.members)?,
            stp: bridge.stp,
            forward_delay: bridge.forward_delay,
            hello_time: bridge.hello_time,
            max_age: bridge.max_age,
            ageing_time: bridge.ageing_time,
            priority: bridge.priority,
        })),
        (None, None, Some(vlan)) => {
            let at = format!("{field}.vlan.id");
            let id = u16::try_from(vlan.id).map_err(|_| Error::field(Stage::Request, at, format!("{} is not 1 to 4094", vlan.id)))?;
            Ok(LinkKind::Vlan(Vlan { id, link: parsed(&format!("{field}.vlan.link"), &vlan.link)? }))
        }
        _ => Err(Error::field(Stage::Request, field, "is more than one of bond, bridge and vlan")),
    }
}

fn route(field: &str, message: &proto::Route) -> Result<Route> {
    let via = if message.via.is_empty() { None } else { Some(address::<IpAddr>(&format!("{field}.via"), &message.via)?) };
    let default = if via.is_some_and(|via| via.is_ipv6()) { "::/0" } else { "0.0.0.0/0" };
    Ok(Route {
        to: cidr(&format!("{field}.to"), if message.to == "default" { default } else { &message.to })?,
        via,
        kind: optional(&format!("{field}.type"), &message.r#type)?.unwrap_or(RouteKind::Unicast),
        metric: message.metric,
        table: message.table,
        on_link: message.on_link,
    })
}

fn rule(field: &str, message: &proto::RoutingRule) -> Result<Rule> {
    let network = |name: &str, text: &str| if text.is_empty() { Ok(None) } else { cidr(&format!("{field}.{name}"), text).map(Some) };
    Ok(Rule {
        from: network("from", &message.from)?,
        to: network("to", &message.to)?,
        table: message.table,
        priority: message.priority,
        mark: message.mark,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field_of(message: &proto::Network) -> String {
        network("n", message).expect_err("refused").violations()[0].field.clone()
    }

    fn nic(name: &str) -> proto::Interface {
        proto::Interface { name: name.into(), ..Default::default() }
    }

    #[test]
    fn links_and_routes_are_read_and_their_errors_have_a_path() {
        let bond = proto::Bond { members: vec!["eth0".into()], mode: "802.3ad".into(), lacp_rate: "fast".into(), ..Default::default() };
        let route = proto::Route { to: "default".into(), via: "2001:db8::1".into(), table: Some(7), ..Default::default() };
        let link = proto::Interface { bond: Some(bond.clone()), routes: vec![route.clone()], ..nic("bond0") };
        let message = proto::Network { interfaces: vec![nic("eth0"), link.clone()], backend: "wicked".into(), ..Default::default() };
        let decoded = network("n", &message).expect("valid");
        assert_eq!(decoded.backend, Some(BackendKind::Wicked));
        assert_eq!(decoded.interfaces[1].kind.name(), "bond");
        assert_eq!(decoded.interfaces[1].routes[0].to.to_string(), "::/0");
        for (interface, field) in [
            (proto::Interface { bond: Some(proto::Bond { mode: "x".into(), ..bond.clone() }), ..nic("b") }, "n.interfaces[0].bond.mode"),
            (proto::Interface { bond: Some(proto::Bond { members: vec!["a b".into()], ..bond }), ..nic("b") }, "n.interfaces[0].bond.members[0]"),
            (proto::Interface { vlan: Some(proto::Vlan { id: 70_000, link: "eth0".into() }), ..nic("v") }, "n.interfaces[0].vlan.id"),
            (proto::Interface { bridge: Some(proto::Bridge::default()), ..link }, "n.interfaces[0]"),
            (proto::Interface { routes: vec![proto::Route { r#type: "nat".into(), ..route }], ..nic("e") }, "n.interfaces[0].routes[0].type"),
        ] {
            assert_eq!(field_of(&proto::Network { interfaces: vec![interface], ..Default::default() }), field);
        }
    }

    #[test]
    fn a_document_stands_alone_but_for_the_back_end() {
        let message =
            proto::Network { document: "{version: 2, ethernets: {eth0: {dhcp4: true}}}".into(), backend: "netplan".into(), ..Default::default() };
        let decoded = network("n", &message).expect("valid");
        assert!(decoded.interfaces[0].dhcp4 && decoded.backend == Some(BackendKind::Netplan));
        assert_eq!(field_of(&proto::Network { search: vec!["example.com".into()], ..message.clone() }), "n.document");
        let wrong = proto::Network { document: "{version: 2, ethernets: {eth0: {dhcp: 1}}}".into(), ..message };
        assert_eq!(field_of(&wrong), "n.document.ethernets.eth0.dhcp");
    }
}
