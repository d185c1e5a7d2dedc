//! Seeds: small read-only volumes from which a guest's own cloud-init (or ignition-like tools that read the same) takes its configuration.
//!
//! | format | label | files | read by |
//! |---|---|---|---|
//! | NoCloud | `CIDATA` | `meta-data`, `user-data`, `vendor-data`, `network-config` | cloud-init, datasource NoCloud |
//! | ConfigDrive v2 | `CONFIG-2` | `openstack/latest/{meta_data.json,user_data,vendor_data.json,network_data.json}` | cloud-init, datasource ConfigDrive; OpenStack's readers |
//!
//! Labels of FAT are upper case; cloud-init looks for either case. What is injected into the root is there anyway: a seed is for images whose configuration
//! is cloud-init's business, and for user-data. Pure: the same inputs give the same files.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::{Value, json};

use crate::{
    disk::fat::FatVolumeSpec,
    error::{Error, Kind, Result, Stage},
    guest::{
        config::{Cidr, InstanceConfig, Interface, LinkKind, Network, Route, Secret},
        identity::Identity,
        json,
        network::{
            is_link_local,
            netplan::{Reader, document},
        },
    },
    names::MacAddr,
};

/// Bytes of user-data or vendor-data: what cloud-init's tools and EC2-like services take fits many times.
pub const USER_DATA_LEN_MAX: usize = 4 << 20;
/// cloud-init wants user-data to be there.
const USER_DATA_EMPTY: &[u8] = b"#cloud-config\n{}\n";

/// Which seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeedFormat {
    /// cloud-init's NoCloud.
    NoCloud,
    /// OpenStack's ConfigDrive, version 2.
    ConfigDrive,
}

/// What goes on a seed beside what the instance is told anyway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedSpec {
    /// Which seed.
    pub format: SeedFormat,
    /// User-data as it is; may hold secrets.
    pub user_data: Secret,
    /// Vendor-data as it is; JSON for ConfigDrive.
    pub vendor_data: Secret,
}

/// Everything a seed is made from.
pub struct Inputs<'a> {
    /// What the caller wants on it.
    pub spec: &'a SeedSpec,
    /// What the instance is told.
    pub config: &'a InstanceConfig,
    /// Who it is.
    pub identity: &'a Identity,
    /// UUID of the instance.
    pub instance_uuid: &'a str,
    /// Addresses of its NICs, by interface name.
    pub macs: &'a BTreeMap<String, MacAddr>,
}

/// The volume. `Kind::Unsupported` (reason `SEED_NETWORK`) names what ConfigDrive's network document has no words for.
pub fn volume(inputs: &Inputs<'_>) -> Result<FatVolumeSpec> {
    let id = inputs.identity.uuid_of("seed").into_bytes();
    let (label, files) = match inputs.spec.format {
        SeedFormat::NoCloud => ("CIDATA", no_cloud(inputs)?),
        SeedFormat::ConfigDrive => ("CONFIG-2", config_drive(inputs)?),
    };
    Ok(FatVolumeSpec { label: label.to_owned(), id: u32::from_be_bytes([id[0], id[1], id[2], id[3]]), files })
}

fn hostname(config: &InstanceConfig) -> &str {
    config.hostname.as_ref().map_or(config.instance.as_str(), |name| name.as_str())
}

/// Keys of root and of everybody else, in order, each once: the default user of the image gets them all.
fn keys(config: &InstanceConfig) -> Vec<&str> {
    let mut keys: Vec<&str> = Vec::new();
    for key in config.authorized_keys.iter().flat_map(|keys| &keys.keys) {
        if !keys.contains(&key.as_str()) {
            keys.push(key);
        }
    }
    keys
}

fn user_data(spec: &SeedSpec) -> Vec<u8> {
    if spec.user_data.expose().is_empty() { USER_DATA_EMPTY.to_vec() } else { spec.user_data.expose().to_vec() }
}

fn text(value: &Value) -> Vec<u8> {
    // JSON is YAML: no other writer is needed for cloud-init's documents.
    json::escaped(value).into_bytes()
}

fn no_cloud(inputs: &Inputs<'_>) -> Result<BTreeMap<String, Vec<u8>>> {
    let meta = json!({
        "instance-id": inputs.instance_uuid,
        "local-hostname": hostname(inputs.config),
        "public-keys": keys(inputs.config),
    });
    let mut files = BTreeMap::from([("meta-data".to_owned(), text(&meta)), ("user-data".to_owned(), user_data(inputs.spec))]);
    if !inputs.spec.vendor_data.expose().is_empty() {
        files.insert("vendor-data".into(), inputs.spec.vendor_data.expose().to_vec());
    }
    if let Some(network) = &inputs.config.network {
        files.insert("network-config".into(), document(network, Reader::CloudInit, "network-config")?.into_bytes());
    }
    Ok(files)
}

fn config_drive(inputs: &Inputs<'_>) -> Result<BTreeMap<String, Vec<u8>>> {
    let keys: serde_json::Map<String, Value> =
        keys(inputs.config).into_iter().enumerate().map(|(index, key)| (format!("key-{index}"), json!(key))).collect();
    let meta = json!({
        "uuid": inputs.instance_uuid,
        "name": inputs.config.instance.as_str(),
        "hostname": hostname(inputs.config),
        "public_keys": keys,
    });
    let at = |name: &str| format!("openstack/latest/{name}");
    let mut files = BTreeMap::from([(at("meta_data.json"), text(&meta)), (at("user_data"), user_data(inputs.spec))]);
    if !inputs.spec.vendor_data.expose().is_empty() {
        files.insert(at("vendor_data.json"), inputs.spec.vendor_data.expose().to_vec());
    }
    if let Some(network) = &inputs.config.network {
        files.insert(at("network_data.json"), text(&network_data(network, inputs.macs)?));
    }
    Ok(files)
}

/// OpenStack's network metadata (nova, doc/api_schemas/network_data.json): links, networks on them, services.
fn network_data(network: &Network, macs: &BTreeMap<String, MacAddr>) -> Result<Value> {
    let mut links = Vec::new();
    let mut networks = Vec::new();
    for interface in &network.interfaces {
        if !interface.rules.is_empty() {
            return Err(unsupported(interface, "routing rules"));
        }
        links.push(link(interface, macs)?);
        networks_of(interface, &mut networks)?;
    }
    let resolvers = network.nameservers.iter().chain(network.interfaces.iter().flat_map(|interface| &interface.nameservers));
    let services: Vec<Value> = resolvers.map(|address| json!({"type": "dns", "address": address.to_string()})).collect();
    Ok(json!({"links": links, "networks": networks, "services": services}))
}

fn unsupported(interface: &Interface, what: &str) -> Error {
    let why = format!("a ConfigDrive has no words for {what}; use NoCloud");
    Error::new(Kind::Unsupported, Stage::Inject, format!("interface {}", interface.name), why).with_reason("SEED_NETWORK")
}

fn link(interface: &Interface, macs: &BTreeMap<String, MacAddr>) -> Result<Value> {
    let name = interface.name.as_str();
    let mut link = json!({"id": name, "name": name});
    if let Some(mtu) = interface.mtu {
        link["mtu"] = mtu.into();
    }
    let mac = interface.mac.or_else(|| macs.get(name).copied());
    match &interface.kind {
        LinkKind::Ethernet => link["type"] = "phy".into(),
        LinkKind::Bond(bond) => {
            link["type"] = "bond".into();
            link["bond_links"] = bond.members.iter().map(|member| member.as_str()).collect();
            for (option, value) in bond.options() {
                link[format!("bond_{option}")] = value.into();
            }
        }
        LinkKind::Vlan(vlan) => {
            link["type"] = "vlan".into();
            link["vlan_id"] = vlan.id.into();
            link["vlan_link"] = vlan.link.as_str().into();
            if let Some(mac) = mac.or_else(|| macs.get(vlan.link.as_str()).copied()) {
                link["vlan_mac_address"] = mac.to_string().into();
            }
        }
        LinkKind::Bridge(_) => return Err(unsupported(interface, "bridges")),
    }
    if let Some(mac) = mac {
        link["ethernet_mac_address"] = mac.to_string().into();
    }
    Ok(link)
}

fn networks_of(interface: &Interface, networks: &mut Vec<Value>) -> Result<()> {
    let name = interface.name.as_str();
    for (on, kind) in [(interface.dhcp4, "ipv4_dhcp"), (interface.dhcp6, "ipv6_dhcp")] {
        if on {
            networks.push(json!({"id": format!("{name}-{kind}"), "link": name, "type": kind}));
        }
    }
    if interface.accept_ra == Some(true) && !interface.dhcp6 && interface.addresses.iter().all(|address| address.address.is_ipv4()) {
        networks.push(json!({"id": format!("{name}-slaac"), "link": name, "type": "ipv6_slaac"}));
    }
    let mut routed = [false, false];
    for (index, address) in interface.addresses.iter().enumerate() {
        let v6 = address.address.is_ipv6();
        let mut network = json!({
            "id": format!("{name}-{index}"), "link": name, "type": if v6 { "ipv6" } else { "ipv4" },
            "ip_address": address.address.to_string(), "netmask": mask(address),
        });
        // Routes belong to the first network of their family.
        if !std::mem::replace(&mut routed[usize::from(v6)], true) {
            network["routes"] = routes(interface, v6)?.into();
        }
        networks.push(network);
    }
    Ok(())
}

fn routes(interface: &Interface, v6: bool) -> Result<Vec<Value>> {
    let gateway = if v6 { interface.gateway6.map(IpAddr::V6) } else { interface.gateway4.map(IpAddr::V4) };
    let default = Cidr { address: if v6 { IpAddr::from([0u16; 8]) } else { IpAddr::from([0u8; 4]) }, prefix: 0 };
    let route = |to: &Cidr, via: IpAddr| json!({"network": to.address.to_string(), "netmask": mask(to), "gateway": via.to_string()});
    let within = |via: IpAddr| interface.addresses.iter().any(|address| same_network(address, via)) || is_link_local(via);
    let mut routes: Vec<Value> = Vec::new();
    if let Some(gateway) = gateway {
        if !within(gateway) {
            return Err(unsupported(interface, "gateways outside of every network"));
        }
        routes.push(route(&default, gateway));
    }
    for given in interface.routes.iter().filter(|route| route.to.address.is_ipv6() == v6) {
        let Route { to, via: Some(via), table: None, .. } = given else { return Err(unsupported(interface, "device routes and routing tables")) };
        routes.push(route(to, *via));
    }
    Ok(routes)
}

fn same_network(address: &Cidr, other: IpAddr) -> bool {
    match (address.address, other) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(address.prefix)).unwrap_or(0);
            a.to_bits() & mask == b.to_bits() & mask
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(address.prefix)).unwrap_or(0);
            a.to_bits() & mask == b.to_bits() & mask
        }
        _ => false,
    }
}

/// A prefix length as an address: `255.255.255.0`, `ffff:ffff:ffff:ffff::`.
fn mask(network: &Cidr) -> String {
    match network.address {
        IpAddr::V4(_) => std::net::Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(network.prefix)).unwrap_or(0)).to_string(),
        IpAddr::V6(_) => std::net::Ipv6Addr::from_bits(u128::MAX.checked_shl(128 - u32::from(network.prefix)).unwrap_or(0)).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::guest::decode;

    const CONFIG: &str = r#"{
        "hostname": "web1.example.com", "authorized_keys": {"root": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEkgVGhpbmsgVGhlcmVmb3JlIEFtIE5vdCBBIEtleSEh a"], "admin": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEkgVGhpbmsgVGhlcmVmb3JlIEFtIE5vdCBBIEtleSEh a", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEkgVGhpbmsgVGhlcmVmb3JlIEFtIE5vdCBBIEtleSEi b"]},
        "network": {"interfaces": [
            {"name": "eth0", "mac": "52:54:00:00:00:01", "addresses": ["192.0.2.10/24", "2001:db8::10/64"], "gateway4": "192.0.2.1", "gateway6": "fe80::1",
             "routes": [{"to": "10.9.0.0/16", "via": "192.0.2.9"}]},
            {"name": "eth1", "dhcp4": true}
        ], "nameservers": ["192.0.2.53"]}
    }"#;

    fn volume_of(format: SeedFormat, config: &str, user_data: &str) -> Result<FatVolumeSpec> {
        let name = "web1".parse().expect("a name");
        let config = decode::from_json(config.as_bytes(), Some(&name)).expect("a configuration").config;
        let identity = Identity::derive(&Uuid::from_u128(7), &name, Secret::new([9; 32])).expect("an identity");
        let spec = SeedSpec { format, user_data: Secret::new(user_data), vendor_data: Secret::new("") };
        let macs = BTreeMap::from([("eth1".to_owned(), MacAddr([0x52, 0x54, 0, 0, 0, 2]))]);
        volume(&Inputs { spec: &spec, config: &config, identity: &identity, instance_uuid: "u-1", macs: &macs })
    }

    fn json_of(volume: &FatVolumeSpec, path: &str) -> Value {
        serde_json::from_slice(&volume.files[path]).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    #[test]
    fn no_cloud_has_the_four_documents() {
        let volume = volume_of(SeedFormat::NoCloud, CONFIG, "#!/bin/sh\n").expect("a volume");
        assert_eq!(volume.label, "CIDATA");
        assert_eq!(volume.files.keys().collect::<Vec<_>>(), ["meta-data", "network-config", "user-data"]);
        let meta = json_of(&volume, "meta-data");
        assert_eq!((&meta["local-hostname"], meta["public-keys"].as_array().map(Vec::len)), (&json!("web1.example.com"), Some(2)));
        assert_eq!(volume.files["user-data"], b"#!/bin/sh\n");
        let network = String::from_utf8_lossy(&volume.files["network-config"]).into_owned();
        assert!(network.contains("\nversion: 2\n") && network.contains("192.0.2.10/24"), "{network}");
        assert!(volume_of(SeedFormat::NoCloud, "{}", "").expect("a volume").files["user-data"].starts_with(b"#cloud-config"));
    }

    #[test]
    fn a_config_drive_has_links_networks_and_routes() {
        let volume = volume_of(SeedFormat::ConfigDrive, CONFIG, "").expect("a volume");
        assert_eq!(volume.label, "CONFIG-2");
        assert_eq!(json_of(&volume, "openstack/latest/meta_data.json")["uuid"], "u-1");
        let data = json_of(&volume, "openstack/latest/network_data.json");
        assert_eq!(data["links"][1]["ethernet_mac_address"], "52:54:00:00:00:02");
        let networks = data["networks"].as_array().expect("a list");
        let of = |id: &str| networks.iter().find(|network| network["id"] == id).unwrap_or_else(|| panic!("{id} in {data:#}"));
        assert_eq!((&of("eth0-0")["netmask"], &of("eth0-1")["netmask"]), (&json!("255.255.255.0"), &json!("ffff:ffff:ffff:ffff::")));
        assert_eq!(of("eth0-0")["routes"][1], json!({"network": "10.9.0.0", "netmask": "255.255.0.0", "gateway": "192.0.2.9"}));
        assert_eq!(of("eth0-1")["routes"][0]["gateway"], "fe80::1");
        assert_eq!(of("eth1-ipv4_dhcp")["type"], "ipv4_dhcp");
    }

    #[test]
    fn what_a_config_drive_cannot_say_is_refused_by_name() {
        let off_link = r#"{"network": {"interfaces": [{"name": "eth0", "addresses": ["192.0.2.10/32"], "gateway4": "198.51.100.1"}]}}"#;
        let error = volume_of(SeedFormat::ConfigDrive, off_link, "").expect_err("no such word");
        assert_eq!(error.reason(), "SEED_NETWORK");
        assert!(volume_of(SeedFormat::NoCloud, off_link, "").is_ok());
    }
}
