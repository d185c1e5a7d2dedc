//! The configuration of 2010: `{"args": {…}, "dns": {"nameservers": […]}, "ip": {"interfaces": [{…}]}}`.
//!
//! It was written by several programs that spelled things differently, so synonyms are taken and unknown fields are noted instead of refused. An
//! interface has `name` or `device`; `address` or `addr`, with `netmask` (dotted, or a prefix length) or `prefix`, or as `address/prefix`;
//! `gateway`; perhaps `mac`, `mtu`, `dhcp`. The host name is the argument `hostname`, as the templates of that time expect it.

use std::net::IpAddr;

use super::{Cursor, Decoded, Fields, instance_name, parse_cidr};
use crate::{
    error::Result,
    guest::config::{Cidr, InstanceConfig, Interface, Network},
    names::{Hostname, InstanceName},
};

/// Decodes a document of this form.
pub(super) fn decode(root: Cursor<'_>, instance: Option<&InstanceName>) -> Result<Decoded> {
    let mut notes = Vec::new();
    let mut fields = root.fields()?;
    let args = fields.optional("args", Cursor::map)?.unwrap_or_default();
    let name = instance_name(fields.optional("instance", Cursor::parse)?, instance)?;
    let mut network = Network::default();
    if let Some((servers, search, unknown)) = fields.optional("dns", dns)? {
        network.nameservers = servers;
        network.search = search;
        notes.extend(unknown);
    }
    let ip = fields.optional("ip", |cursor| {
        let mut fields = cursor.fields()?;
        let interfaces = fields.optional("interfaces", |cursor| cursor.list(interface))?;
        Ok((interfaces, fields.unknown()))
    })?;
    let has_interfaces = matches!(&ip, Some((Some(_), _)));
    if let Some((interfaces, unknown)) = ip {
        notes.extend(unknown);
        for (interface, unknown) in interfaces.into_iter().flatten() {
            network.interfaces.push(interface);
            notes.extend(unknown);
        }
    }
    notes.extend(fields.unknown());
    let has_name = args.get("hostname").is_some_and(|value| !value.is_null());
    let hostname = args.get("hostname").and_then(|value| value.as_str()).and_then(|text| text.parse::<Hostname>().ok());
    let config = InstanceConfig {
        instance: name,
        hostname,
        args,
        // Without a list of interfaces the image's own are meant, and only the resolvers are given.
        network: (has_interfaces || !network.nameservers.is_empty()).then_some(network),
        authorized_keys: Vec::new(),
        root_password_hash: None,
        machine_id: None,
        ssh_host_keys: Default::default(),
        files: Vec::new(),
        setup: Default::default(),
    };
    let mut notes: Vec<String> =
        notes.into_iter().map(|field| format!("{field} has no meaning in a configuration of the 2010 form and is ignored")).collect();
    if has_name && config.hostname.is_none() {
        notes.push("args.hostname is not a host name (RFC 1123) and is left to the templates".into());
    }
    Ok(Decoded { config, notes })
}

type Dns = (Vec<IpAddr>, Vec<Hostname>, Vec<String>);

fn dns(cursor: Cursor<'_>) -> Result<Dns> {
    let mut fields = cursor.fields()?;
    let servers = fields.optional("nameservers", |cursor| cursor.list(Cursor::parse))?.unwrap_or_default();
    let mut search: Vec<Hostname> = fields.optional("domain", Cursor::parse)?.into_iter().collect();
    search.extend(fields.optional("search", one_or_many)?.unwrap_or_default());
    let unknown = fields.unknown();
    Ok((servers, search, unknown))
}

fn one_or_many(cursor: Cursor<'_>) -> Result<Vec<Hostname>> {
    if cursor.is_text() { Ok(vec![cursor.parse()?]) } else { cursor.list(Cursor::parse) }
}

/// The first of several spellings that is there.
fn any<'v, T>(fields: &mut Fields<'v>, names: &[&'static str], decode: impl Fn(Cursor<'v>) -> Result<T>) -> Result<Option<T>> {
    let mut found = None;
    for name in names {
        let value = fields.optional(name, &decode)?;
        found = found.or(value);
    }
    Ok(found)
}

fn interface(cursor: Cursor<'_>) -> Result<(Interface, Vec<String>)> {
    let mut fields = cursor.fields()?;
    let name =
        any(&mut fields, &["name", "device", "dev", "interface"], Cursor::parse)?.ok_or_else(|| cursor.error("has neither name nor device"))?;
    let mut interface = Interface::named(name);
    interface.mac = any(&mut fields, &["mac", "hwaddr", "hwaddress"], Cursor::parse)?;
    interface.mtu = fields.optional("mtu", Cursor::number)?;
    interface.dhcp4 = fields.optional("dhcp", Cursor::boolean)?.unwrap_or_default();
    let address = any(&mut fields, &["address", "addr", "ip"], |cursor| Ok(cursor.text()?.to_owned()))?;
    let prefix = any(&mut fields, &["netmask", "prefix"], prefix_text)?;
    if let Some(address) = address {
        let own = address_with(&address, prefix.as_deref()).map_err(|why| cursor.error(why))?;
        interface.addresses.push(own);
    }
    match any(&mut fields, &["gateway", "gw"], Cursor::parse)? {
        Some(IpAddr::V4(gateway)) => interface.gateway4 = Some(gateway),
        Some(IpAddr::V6(gateway)) => interface.gateway6 = Some(gateway),
        None => {}
    }
    interface.gateway6 = interface.gateway6.or(fields.optional("gateway6", Cursor::parse)?);
    let unknown = fields.unknown();
    Ok((interface, unknown))
}

/// A netmask is text, or a number that is a prefix length.
fn prefix_text(cursor: Cursor<'_>) -> Result<String> {
    if cursor.is_text() { Ok(cursor.text()?.to_owned()) } else { Ok(cursor.number::<u8>()?.to_string()) }
}

fn address_with(address: &str, netmask: Option<&str>) -> Result<Cidr, String> {
    if address.contains('/') {
        return parse_cidr(address);
    }
    let netmask = netmask.ok_or_else(|| "has an address but no netmask".to_owned())?;
    let prefix = match netmask.parse::<std::net::Ipv4Addr>() {
        Ok(mask) => {
            let bits = u32::from(mask);
            if bits.leading_ones() + bits.trailing_zeros() < 32 {
                return Err(format!("{mask} is not a netmask: its ones are not together"));
            }
            bits.leading_ones().to_string()
        }
        Err(_) => netmask.to_owned(),
    };
    parse_cidr(&format!("{address}/{prefix}"))
}
