//! The kernel's own `ip=` argument (Documentation/admin-guide/nfs/nfsroot.rst), for images without any network tooling, booted with a kernel of
//! the host's choice.
//!
//! No file is written but resolv.conf: the argument is part of the report, and whoever describes the boot has to pass it on. The kernel knows
//! one interface and IPv4, a gateway on its subnet, and no more; everything else is refused rather than left out.

use std::net::Ipv4Addr;

use crate::{
    error::{Error, Kind, Result, Stage},
    guest::{
        config::{BackendKind, Cidr, Interface, LinkKind, Network},
        facts::GuestFacts,
        network::{Guest, NetRenderer, Presence, Rendered},
    },
};

/// The renderer for the kernel's argument.
pub struct KernelIp;

impl NetRenderer for KernelIp {
    fn kind(&self) -> BackendKind {
        BackendKind::KernelIp
    }

    fn presence(&self, _: &GuestFacts) -> Presence {
        Presence::OnRequest("the kernel configures the interface by itself, if it is told so".into())
    }

    fn owns(&self, _: &str) -> bool {
        false
    }

    fn render(&self, network: &Network, guest: &Guest<'_>) -> Result<Rendered> {
        let mut rendered = Rendered { kernel_arguments: argument(network)?.into_iter().collect(), ..Rendered::default() };
        if let Some(argument) = rendered.kernel_arguments.first() {
            rendered.notes.push(format!("the kernel must be started with {argument}, and must have CONFIG_IP_PNP and the NIC's driver built in"));
        }
        if guest.facts.exists("/etc/resolv.conf") && network.interfaces.iter().any(|interface| interface.dhcp4) {
            rendered
                .notes
                .push("resolvers from the kernel's DHCP are in /proc/net/pnp, where nothing looks unless resolv.conf is a link to it".into());
        }
        Ok(rendered)
    }
}

fn cannot(what: &str) -> Error {
    Error::new(Kind::Unsupported, Stage::Inject, "network", format!("the kernel's ip= can't express {what}")).with_reason("NETWORK_NOT_EXPRESSIBLE")
}

/// `ip=CLIENT:SERVER:GATEWAY:NETMASK:HOSTNAME:DEVICE:AUTOCONF`; `None` when no interface is to be configured.
pub(super) fn argument(network: &Network) -> Result<Option<String>> {
    let mut used = network.interfaces.iter().filter(|interface| !interface.is_bare() || interface.kind != LinkKind::Ethernet);
    let Some(interface) = used.next() else { return Ok(None) };
    if used.next().is_some() {
        return Err(cannot("more than one configured interface"));
    }
    check(interface)?;
    // One NIC alone needs no name, which the kernel and the guest may see differently.
    let device = if network.interfaces.len() == 1 { "" } else { interface.name.as_str() };
    if interface.dhcp4 {
        return Ok(Some(format!("ip=:::::{device}:dhcp")));
    }
    let mut addresses = interface.family(false);
    let (Some(cidr), None) = (addresses.next(), addresses.next()) else { return Err(cannot("more than one address")) };
    let gateway = match interface.gateway4 {
        Some(gateway) if !cidr.contains(gateway.into()) => {
            return Err(cannot(&format!("the gateway {gateway}, which is not on the subnet of {cidr}")));
        }
        gateway => gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
    };
    Ok(Some(format!("ip={}::{gateway}:{}::{device}:off", cidr.address, netmask(cidr))))
}

fn netmask(cidr: &Cidr) -> Ipv4Addr {
    u32::MAX.checked_shl(32u32.saturating_sub(u32::from(cidr.prefix))).unwrap_or(0).into()
}

fn check(interface: &Interface) -> Result<()> {
    let v6 = interface.family(true).next().is_some() || interface.gateway6.is_some() || interface.dhcp6;
    let refused = [
        (interface.kind != LinkKind::Ethernet, "bonds, bridges and VLANs"),
        (v6, "IPv6"),
        (interface.accept_ra.is_some() || interface.ipv6_privacy.is_some() || interface.link_local.is_some(), "settings of IPv6"),
        (interface.dhcp4 && interface.family(false).next().is_some(), "DHCP together with a static address"),
        (!interface.routes.is_empty(), "routes"),
        (!interface.rules.is_empty(), "routing rules"),
        (interface.metric.is_some(), "a metric"),
        (interface.mtu.is_some(), "an MTU"),
    ];
    match refused.into_iter().find(|(given, _)| *given) {
        Some((_, what)) => Err(cannot(what)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(interfaces: Vec<Interface>) -> Network {
        Network { interfaces, ..Network::default() }
    }

    fn eth0() -> Interface {
        let addresses = vec![crate::guest::decode::parse_cidr("192.0.2.10/24").expect("address")];
        Interface { addresses, gateway4: Some(Ipv4Addr::new(192, 0, 2, 1)), ..Interface::named("eth0".parse().expect("name")) }
    }

    #[test]
    fn one_address_or_dhcp_becomes_an_argument() {
        assert_eq!(argument(&network(vec![eth0()])).expect("fits").as_deref(), Some("ip=192.0.2.10::192.0.2.1:255.255.255.0:::off"));
        let dhcp = Interface { dhcp4: true, ..Interface::named("eth0".parse().expect("name")) };
        let idle = Interface::named("eth1".parse().expect("name"));
        assert_eq!(argument(&network(vec![idle.clone(), dhcp])).expect("fits").as_deref(), Some("ip=:::::eth0:dhcp"));
        assert_eq!(argument(&network(vec![idle])).expect("fits"), None);
    }

    #[test]
    fn what_the_kernel_does_not_know_is_refused_by_name() {
        type Break = fn(&mut Interface);
        let cases: [(&str, Break); 5] = [
            ("IPv6", |eth0| eth0.gateway6 = Some("fe80::1".parse().expect("address"))),
            ("not on the subnet", |eth0| eth0.addresses[0].prefix = 32),
            ("MTU", |eth0| eth0.mtu = Some(1400)),
            ("more than one address", |eth0| eth0.addresses.push(eth0.addresses[0])),
            ("DHCP together", |eth0| eth0.dhcp4 = true),
        ];
        for (what, break_it) in cases {
            let mut wrong = eth0();
            break_it(&mut wrong);
            let error = argument(&network(vec![wrong])).expect_err(what);
            assert!(error.message().contains(what) && error.kind() == Kind::Unsupported, "{error}");
        }
        let other = Interface { name: "eth1".parse().expect("name"), ..eth0() };
        assert!(argument(&network(vec![eth0(), other])).is_err());
    }
}
