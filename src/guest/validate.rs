//! Checks that need more than one field, and the limits on counts and sizes. Whatever made an [`InstanceConfig`] (JSON, protobuf, a test), it goes
//! through [`validate`] before anything is rendered; renderers rely on it and do not check again.
//!
//! All violations are collected, not just the first, each with the dotted path of its field.

mod links;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use crate::{
    error::{Error, Result, Stage, Violation},
    guest::{
        accounts::check_crypt_hash,
        config::{Cidr, InstanceConfig, Interface, LinkKind, Network, Route, RouteKind, Rule},
        machine_id::check_machine_id,
        network::is_link_local,
        plan::printable,
        resolv::check_resolver,
        setup,
    },
};

/// Interfaces of one instance, NICs and what stands on them; QEMU's default machine has slots for half as many NICs.
pub const INTERFACES_MAX: usize = 64;
/// Addresses of one instance.
pub const ADDRESSES_MAX: usize = 256;
/// Routing rules of one instance.
const RULES_MAX: usize = 64;
/// Priorities of rules before the main table's, which is 32766.
const RULE_PRIORITY_MAX: u32 = 32765;
/// Routes of one instance, default routes not counted.
pub const ROUTES_MAX: usize = 256;
/// Resolvers in one list.
pub const NAMESERVERS_MAX: usize = 16;
/// Search domains in one list.
pub const SEARCH_MAX: usize = 32;
/// Users with authorized keys.
pub const USERS_MAX: usize = 64;
/// Keys of one user.
pub const KEYS_MAX: usize = 256;
/// One line of authorized_keys, bytes: an RSA key of 16384 bits with options and comment fits.
pub const KEY_LEN_MAX: usize = 16 * 1024;
/// Files in one request.
pub const FILES_MAX: usize = 256;
/// Content of one file, bytes.
pub const FILE_LEN_MAX: usize = 4 << 20;
/// Content of all files, bytes.
pub const FILES_LEN_MAX: usize = 16 << 20;
/// Names the kernel gives to something else (`lo`) or uses for all interfaces in /proc/sys/net (`all`, `default`).
const RESERVED_NAMES: [&str; 3] = ["lo", "all", "default"];
/// Places that the guest covers with other filesystems at boot: a file there would never be seen.
const HIDDEN: [&str; 4] = ["/proc", "/sys", "/dev", "/run"];

struct Checks {
    found: Vec<Violation>,
}

impl Checks {
    fn add(&mut self, field: impl Into<String>, description: impl Into<String>) {
        self.found.push(Violation { field: field.into(), description: description.into() });
    }

    fn limit(&mut self, field: &str, count: usize, max: usize) {
        if count > max {
            self.add(field, format!("has {count} entries, the limit is {max}"));
        }
    }
}

/// Checks a configuration. `Kind::InvalidRequest` with every violation found.
pub fn validate(config: &InstanceConfig) -> Result<()> {
    let mut checks = Checks { found: Vec::new() };
    if let Some(network) = &config.network {
        network_checks(&mut checks, network);
    }
    account_checks(&mut checks, config);
    file_checks(&mut checks, config);
    setup::check(config, &mut |field, description| checks.add(field, description));
    if let Some(id) = &config.machine_id
        && let Err(why) = check_machine_id(id)
    {
        checks.add("machine_id", why);
    }
    let mut found = checks.found.into_iter();
    let Some(first) = found.next() else { return Ok(()) };
    Err(found.fold(Error::field(Stage::Request, first.field, first.description), |error, more| error.with_violation(more.field, more.description)))
}

fn account_checks(checks: &mut Checks, config: &InstanceConfig) {
    if let Some(hash) = &config.root_password_hash {
        let text = std::str::from_utf8(hash.expose()).map_err(|_| "is not text".to_owned());
        if let Err(why) = text.and_then(check_crypt_hash) {
            checks.add("root_password_hash", why);
        }
    }
    checks.limit("authorized_keys", config.authorized_keys.len(), USERS_MAX);
    for (index, keys) in config.authorized_keys.iter().enumerate() {
        let field = format!("authorized_keys.{}", keys.user.escape_default());
        if let Err(why) = check_user(&keys.user) {
            checks.add(format!("authorized_keys[{index}].user"), why);
        }
        if config.authorized_keys[..index].iter().any(|earlier| earlier.user == keys.user) {
            checks.add(field.clone(), "is given twice");
        }
        checks.limit(&field, keys.keys.len(), KEYS_MAX);
        for (index, key) in keys.keys.iter().enumerate() {
            if let Err(why) = check_authorized_key(key) {
                checks.add(format!("{field}[{index}]"), why);
            }
        }
    }
}

/// A user name as passwd(5) can hold it; whether it exists is the image's business.
pub fn check_user(user: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '$');
    if user.is_empty() || user.len() > 32 || user.starts_with('-') || !user.chars().all(allowed) {
        return Err(format!("{:?} is not a user name: 1 to 32 letters, digits, '_', '-', '.'", user.chars().take(64).collect::<String>()));
    }
    Ok(())
}

/// One line of authorized_keys (sshd(8)): optional options, algorithm, base64, comment.
pub fn check_authorized_key(line: &str) -> Result<(), String> {
    if line.len() > KEY_LEN_MAX {
        return Err(format!("has {} bytes, the limit is {KEY_LEN_MAX}", line.len()));
    }
    if line.chars().any(char::is_control) {
        return Err("contains control characters; one key is one line".into());
    }
    if line.contains("PRIVATE KEY") {
        return Err("is a private key; give the public one".into());
    }
    // The parser quotes what it decoded from the base64, which may be any bytes.
    line.parse::<ssh_key::authorized_keys::Entry>()
        .map(|_| ())
        .map_err(|error| format!("is not an authorized_keys line: {}", printable(&error.to_string())))
}

fn file_checks(checks: &mut Checks, config: &InstanceConfig) {
    checks.limit("files", config.files.len(), FILES_MAX);
    let total: usize = config.files.iter().map(|file| file.content.expose().len()).sum();
    if total > FILES_LEN_MAX {
        checks.add("files", format!("hold {total} bytes, the limit is {FILES_LEN_MAX}"));
    }
    for (index, file) in config.files.iter().enumerate() {
        let field = format!("files[{index}]");
        let path = file.path.display();
        if file.path.is_root() {
            checks.add(format!("{field}.path"), "is a directory");
        }
        if path.chars().any(char::is_control) {
            checks.add(format!("{field}.path"), "contains control characters");
        }
        if let Some(hidden) = HIDDEN.iter().find(|hidden| path.strip_prefix(**hidden).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))) {
            checks.add(format!("{field}.path"), format!("is below {hidden}, which the guest covers at boot"));
        }
        if config.files[..index].iter().any(|earlier| earlier.path == file.path) {
            checks.add(format!("{field}.path"), format!("{path} is given twice"));
        }
        if file.mode > 0o7777 {
            checks.add(format!("{field}.mode"), format!("{:o} has more than permission bits", file.mode));
        }
        setup::check_file(file, &mut |rest, description| checks.add(format!("{field}.{rest}"), description));
        if file.content.expose().len() > FILE_LEN_MAX {
            checks.add(format!("{field}.content"), format!("has {} bytes, the limit is {FILE_LEN_MAX}", file.content.expose().len()));
        }
    }
}

fn network_checks(checks: &mut Checks, network: &Network) {
    let interfaces = &network.interfaces;
    checks.limit("network.interfaces", interfaces.len(), INTERFACES_MAX);
    checks.limit("network.interfaces", interfaces.iter().map(|interface| interface.addresses.len()).sum(), ADDRESSES_MAX);
    checks.limit("network.interfaces", interfaces.iter().map(|interface| interface.routes.len()).sum(), ROUTES_MAX);
    checks.limit("network.interfaces", interfaces.iter().map(|interface| interface.rules.len()).sum(), RULES_MAX);
    dns_checks(checks, "network", &network.nameservers, network.search.len());
    for (index, server) in network.nameservers.iter().enumerate() {
        if is_link_local(*server) {
            checks.add(format!("network.nameservers[{index}]"), format!("{server} is link-local: give it under the interface it is on"));
        }
    }
    let mut addresses: BTreeMap<IpAddr, String> = BTreeMap::new();
    for (index, interface) in interfaces.iter().enumerate() {
        let field = format!("network.interfaces[{index}]");
        let earlier = &interfaces[..index];
        if let Some(at) = earlier.iter().position(|other| other.name == interface.name) {
            checks.add(format!("{field}.name"), format!("{} is also the name of network.interfaces[{at}]", interface.name));
        }
        let nic = |interface: &Interface| interface.kind == LinkKind::Ethernet;
        // A bond, bridge or VLAN has the MAC of what it stands on unless told otherwise.
        if let Some(at) = earlier.iter().position(|other| other.mac.is_some() && other.mac == interface.mac && nic(other) && nic(interface)) {
            checks.add(format!("{field}.mac"), format!("is also the MAC of network.interfaces[{at}]"));
        }
        for (at, cidr) in interface.addresses.iter().enumerate() {
            let own = format!("{field}.addresses[{at}]");
            // Link-local addresses are only unique per link.
            if !is_link_local(cidr.address)
                && let Some(first) = addresses.insert(cidr.address, own.clone())
            {
                checks.add(own, format!("{} is also {first}", cidr.address));
            }
        }
        interface_checks(checks, &field, interface);
    }
    links::link_checks(checks, network);
    default_route_checks(checks, interfaces);
}

fn dns_checks(checks: &mut Checks, field: &str, servers: &[IpAddr], search: usize) {
    checks.limit(&format!("{field}.nameservers"), servers.len(), NAMESERVERS_MAX);
    checks.limit(&format!("{field}.search"), search, SEARCH_MAX);
    for (index, server) in servers.iter().enumerate() {
        if let Err(why) = check_resolver(*server) {
            checks.add(format!("{field}.nameservers[{index}]"), why);
        }
    }
}

fn interface_checks(checks: &mut Checks, field: &str, interface: &Interface) {
    let name = interface.name.as_str();
    if RESERVED_NAMES.contains(&name) {
        checks.add(format!("{field}.name"), format!("{name} is reserved"));
    }
    for (index, cidr) in interface.addresses.iter().enumerate() {
        if let Err(why) = check_address(cidr) {
            checks.add(format!("{field}.addresses[{index}]"), why);
        }
    }
    let v6 = interface.family(true).next().is_some() || interface.gateway6.is_some() || interface.dhcp6 || interface.accept_ra == Some(true);
    match interface.mtu {
        Some(mtu) if mtu < 68 => checks.add(format!("{field}.mtu"), format!("{mtu} is less than 68, the least for IPv4 (RFC 791)")),
        Some(mtu) if mtu < 1280 && v6 => checks.add(format!("{field}.mtu"), format!("{mtu} is less than 1280, the least for IPv6 (RFC 8200)")),
        _ => {}
    }
    if interface.link_local == Some(false) && (interface.accept_ra == Some(true) || interface.dhcp6) {
        checks.add(format!("{field}.link_local"), "router advertisements and DHCPv6 need a link-local address");
    }
    dns_checks(checks, field, &interface.nameservers, interface.search.len());
    if let Some(gateway) = interface.gateway4 {
        let dynamic = interface.dhcp4;
        gateway_checks(checks, &format!("{field}.gateway4"), interface, gateway.into(), dynamic);
    }
    if let Some(gateway) = interface.gateway6 {
        let dynamic = interface.dhcp6 || interface.accept_ra == Some(true);
        gateway_checks(checks, &format!("{field}.gateway6"), interface, gateway.into(), dynamic);
    }
    for (index, rule) in interface.rules.iter().enumerate() {
        let field = format!("{field}.rules[{index}]");
        rule_checks(checks, &field, rule);
        if interface.rules[..index].contains(rule) {
            checks.add(field, "is there twice");
        }
    }
    for (index, route) in interface.routes.iter().enumerate() {
        route_checks(checks, &format!("{field}.routes[{index}]"), interface, route);
        if interface.routes[..index].iter().any(|earlier| (earlier.to, earlier.metric, earlier.table) == (route.to, route.metric, route.table)) {
            checks.add(format!("{field}.routes[{index}]"), format!("is a second route to {} with the same metric and table", route.to));
        }
    }
}

/// A host address of an interface.
fn check_address(cidr: &Cidr) -> Result<(), String> {
    let address = cidr.address;
    let max = if address.is_ipv4() { 32 } else { 128 };
    if cidr.prefix > max || cidr.prefix == 0 {
        return Err(format!("{cidr}: the prefix length must be 1 to {max}"));
    }
    if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
        return Err(format!("{address} can't be the address of an interface (unspecified, multicast or loopback)"));
    }
    match address {
        IpAddr::V4(v4) => {
            if v4.octets()[0] == 0 || v4.octets()[0] >= 240 {
                return Err(format!("{address} is in a reserved block (0.0.0.0/8, 240.0.0.0/4)"));
            }
            // A /31 has no network and broadcast address (RFC 3021).
            if cidr.prefix <= 30 && (is_network(v4, cidr.prefix) || is_broadcast(v4, cidr.prefix)) {
                return Err(format!("{cidr} is the network or broadcast address of its own subnet"));
            }
        }
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => return Err(format!("{address} is an IPv4-mapped address")),
        IpAddr::V6(_) => {}
    }
    Ok(())
}

fn host_mask(prefix: u8) -> u32 {
    u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0)
}

fn is_network(address: Ipv4Addr, prefix: u8) -> bool {
    u32::from(address) & host_mask(prefix) == 0
}

fn is_broadcast(address: Ipv4Addr, prefix: u8) -> bool {
    u32::from(address) & host_mask(prefix) == host_mask(prefix)
}

fn check_next_hop(interface: &Interface, hop: IpAddr) -> Result<(), String> {
    let broadcast = matches!(hop, IpAddr::V4(v4) if v4.is_broadcast());
    if hop.is_unspecified() || hop.is_multicast() || hop.is_loopback() || broadcast {
        return Err(format!("{hop} can't be a gateway: it is the address of no single neighbour"));
    }
    if interface.addresses.iter().any(|cidr| cidr.address == hop) {
        return Err(format!("{hop} is the interface's own address"));
    }
    let useless = |cidr: &&Cidr| match (cidr.address, hop) {
        (IpAddr::V4(_), IpAddr::V4(v4)) => cidr.prefix <= 30 && cidr.contains(hop) && (is_network(v4, cidr.prefix) || is_broadcast(v4, cidr.prefix)),
        _ => false,
    };
    match interface.addresses.iter().find(useless) {
        Some(cidr) => Err(format!("{hop} is the network or broadcast address of {cidr}")),
        None => Ok(()),
    }
}

/// A default gateway: on a subnet of the interface, link-local, or anything else, which then becomes an on-link route.
fn gateway_checks(checks: &mut Checks, field: &str, interface: &Interface, gateway: IpAddr, dynamic: bool) {
    if let Err(why) = check_next_hop(interface, gateway) {
        checks.add(field, why);
    }
    if !dynamic && interface.family(gateway.is_ipv6()).next().is_none() {
        checks.add(field, format!("{gateway} is of no use: the interface has no address of that family"));
    }
}

fn rule_checks(checks: &mut Checks, field: &str, rule: &Rule) {
    match (rule.from, rule.to) {
        (None, None) => checks.add(field, "needs from or to: without them every packet would use the table"),
        (Some(from), Some(to)) if from.address.is_ipv4() != to.address.is_ipv4() => {
            checks.add(format!("{field}.to"), format!("{to} is of another family than {from}"));
        }
        _ => {}
    }
    for (name, cidr) in [("from", rule.from), ("to", rule.to)] {
        let Some(cidr) = cidr else { continue };
        let (max, host_bits) = match cidr.address {
            IpAddr::V4(v4) => (32, !is_network(v4, cidr.prefix)),
            IpAddr::V6(v6) => (128, u128::from(v6) & u128::MAX.checked_shr(u32::from(cidr.prefix)).unwrap_or(0) != 0),
        };
        if cidr.prefix > max || host_bits {
            checks.add(format!("{field}.{name}"), format!("{cidr} is no network: its prefix length is wrong, or bits are set beyond it"));
        }
    }
    if rule.table == 0 {
        checks.add(format!("{field}.table"), "0 is no routing table");
    }
    if rule.priority.is_some_and(|priority| !(1..=RULE_PRIORITY_MAX).contains(&priority)) {
        checks.add(format!("{field}.priority"), format!("must be 1 to {RULE_PRIORITY_MAX}"));
    }
}

fn route_checks(checks: &mut Checks, field: &str, interface: &Interface, route: &Route) {
    let max = if route.to.address.is_ipv4() { 32 } else { 128 };
    if route.to.prefix > max {
        checks.add(format!("{field}.to"), format!("{}: the prefix length must be 0 to {max}", route.to));
        return;
    }
    let host_bits = match route.to.address {
        IpAddr::V4(v4) => !is_network(v4, route.to.prefix),
        IpAddr::V6(v6) => u128::from(v6) & u128::MAX.checked_shr(u32::from(route.to.prefix)).unwrap_or(0) != 0,
    };
    if host_bits {
        checks.add(format!("{field}.to"), format!("{} has bits set beyond its prefix, the kernel refuses such a route", route.to));
    }
    if matches!(route.table, Some(0 | 255)) {
        checks.add(format!("{field}.table"), "tables 0 and 255 are the kernel's own");
    }
    if route.kind != RouteKind::Unicast && (route.via.is_some() || route.on_link) {
        checks.add(format!("{field}.via"), format!("a route of type {} has no next hop", route.kind.name()));
        return;
    }
    let Some(via) = route.via else { return };
    if via.is_ipv4() != route.to.address.is_ipv4() {
        checks.add(format!("{field}.via"), format!("{via} is of another family than {}", route.to));
    } else if let Err(why) = check_next_hop(interface, via) {
        checks.add(format!("{field}.via"), why);
    } else if !route.on_link && interface.is_off_subnet(via) && !interface.gateways().any(|gateway| gateway == via) {
        checks.add(format!("{field}.via"), format!("{via} is on no subnet of the interface; set on_link if it is a neighbour all the same"));
    }
}

/// The kernel takes one default route per family and metric; the second fails, and ifupdown with it.
fn default_route_checks(checks: &mut Checks, interfaces: &[Interface]) {
    let mut seen: BTreeMap<(bool, Option<u32>), String> = BTreeMap::new();
    for (index, interface) in interfaces.iter().enumerate() {
        let gateways = interface.gateways().map(|gateway| {
            let field = if gateway.is_ipv6() { "gateway6" } else { "gateway4" };
            (gateway.is_ipv6(), interface.metric, format!("network.interfaces[{index}].{field}"))
        });
        let routes = interface
            .routes
            .iter()
            .enumerate()
            .filter(|(_, route)| route.to.prefix == 0 && matches!(route.table, None | Some(254)))
            .map(|(at, route)| (route.to.address.is_ipv6(), route.metric, format!("network.interfaces[{index}].routes[{at}]")));
        for (v6, metric, field) in gateways.chain(routes) {
            if let Some(first) = seen.get(&(v6, metric)) {
                let description = format!("is a second default route with the same metric as {first}: give one of them another metric");
                checks.add(field, description);
            } else {
                seen.insert((v6, metric), field);
            }
        }
    }
}
