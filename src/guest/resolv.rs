//! /etc/resolv.conf: who maintains it in the guest, and when it is written.
//!
//! | what the image has | what happens |
//! |---|---|
//! | a link into /run/systemd/resolve (or to systemd's static copy), systemd-resolved starts | left; resolvers go to the back-end, or to resolved.conf.d for back-ends that do not tell resolved (ifupdown without its hook) |
//! | no file at all, systemd-resolved starts | linked to resolved's stub, as its own tmpfiles rule would do |
//! | a link into /run/resolvconf, resolvconf installed, ifupdown or netifrc chosen | left; resolvers are the back-end's options |
//! | a link into /run/netconfig or no file, wicked chosen, netconfig installed | left; resolvers are static ones in /etc/sysconfig/network/config |
//! | a link into /run/NetworkManager or /run/netconfig, NetworkManager chosen | left; resolvers are in the profile |
//! | NetworkManager chosen, a plain file or none | left: NetworkManager writes it, unless its configuration says `dns=none` |
//! | a link whose maintainer is not there or does not start, any other link, a plain file, nothing | replaced by a file, if resolvers are given |
//!
//! A file holds at most three servers (resolv.conf(5), MAXNS); what does not fit is reported. Nothing of the host's own resolv.conf is ever used.

use std::net::IpAddr;

use crate::{
    error::Result,
    guest::{
        config::{BackendKind, Network},
        enablement::{State, unit_state},
        facts::{GuestFacts, NodeKind},
        hostname::attrs_of,
        network::{ini::values, is_link_local, shell::with_variables},
        plan::{Plan, Visibility},
        tree::{in_lib, present},
    },
};

const PATH: &str = "/etc/resolv.conf";
/// Where netconfig has its static resolvers.
const NETCONFIG: &str = "/etc/sysconfig/network/config";
/// glibc's and musl's MAXNS.
const SERVERS_MAX: usize = 3;
/// glibc before 2.26 reads six domains.
const SEARCH_MAX: usize = 6;

/// Who answers for DNS in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolver {
    /// systemd-resolved owns resolv.conf; per-link resolvers come from the back-end.
    Resolved,
    /// The same, and ifupdown hands its options to it.
    ResolvedWithHook,
    /// resolvconf or openresolv owns it and takes the options of ifupdown and netifrc.
    Resolvconf,
    /// SUSE's netconfig merges it from its configuration and what wicked learns.
    Netconfig,
    /// NetworkManager owns it.
    NetworkManager,
    /// Nobody: it is a file.
    File,
}

/// Finds out from the tree who maintains resolv.conf when `backend` configures the network.
pub fn resolver(facts: &GuestFacts, backend: BackendKind) -> Resolver {
    let target = match facts.node(PATH).map(|node| &node.kind) {
        Some(NodeKind::Symlink { target }) => Some(target.as_str()),
        _ => None,
    };
    let into = |place: &str| target.is_some_and(|target| target.contains(place));
    let resolved = in_lib(facts, "systemd/systemd-resolved").is_some() && matches!(unit_state(facts, "systemd-resolved.service"), State::Enabled(_));
    if resolved && (into("run/systemd/resolve/") || into("lib/systemd/resolv.conf") || facts.node(PATH).is_none()) {
        let hook = ["/etc/network/if-up.d/resolved", "/etc/network/if-up.d/000resolvconf"].iter().any(|path| facts.exists(path));
        return if backend == BackendKind::Ifupdown && hook { Resolver::ResolvedWithHook } else { Resolver::Resolved };
    }
    if into("resolvconf/") && present(facts, "/usr/sbin/resolvconf") && matches!(backend, BackendKind::Ifupdown | BackendKind::Netifrc) {
        return Resolver::Resolvconf;
    }
    let netconfig = facts.text(NETCONFIG).is_some() && present(facts, "/usr/sbin/netconfig");
    if backend == BackendKind::Wicked && netconfig && (into("run/netconfig/") || facts.node(PATH).is_none()) {
        return Resolver::Netconfig;
    }
    if backend == BackendKind::NetworkManager
        && (target.is_none() || into("run/NetworkManager/") || into("run/netconfig/"))
        && !manager_leaves_dns(facts)
    {
        return Resolver::NetworkManager;
    }
    Resolver::File
}

/// Whether a back-end hands the resolvers of its interfaces to systemd-resolved.
fn tells_resolved(kind: BackendKind) -> bool {
    match kind {
        BackendKind::Netplan | BackendKind::NetworkManager | BackendKind::Networkd | BackendKind::CloudInit => true,
        BackendKind::Wicked | BackendKind::Ifcfg | BackendKind::Netifrc | BackendKind::Ifupdown | BackendKind::KernelIp => false,
    }
}

/// NetworkManager.conf(5): `dns=none` and `rc-manager=unmanaged` keep it off resolv.conf.
fn manager_leaves_dns(facts: &GuestFacts) -> bool {
    let drop_ins = ["/etc/NetworkManager/conf.d", "/usr/lib/NetworkManager/conf.d"]
        .into_iter()
        .flat_map(|directory| facts.children(directory).map(move |(name, _)| format!("{directory}/{name}")));
    std::iter::once("/etc/NetworkManager/NetworkManager.conf".to_owned())
        .chain(drop_ins)
        .filter_map(|path| facts.text(&path))
        .any(|text| values(text, "main", "dns").contains(&"none") || values(text, "main", "rc-manager").contains(&"unmanaged"))
}

/// All resolvers and search domains of the network in one list: the system's first, then those of each link, link-local ones with their zone.
fn merged(network: &Network) -> (Vec<String>, Vec<String>) {
    let mut servers: Vec<String> = Vec::new();
    let mut search: Vec<String> = Vec::new();
    let add = |list: &mut Vec<String>, item: String| {
        if !list.contains(&item) {
            list.push(item);
        }
    };
    network.nameservers.iter().for_each(|server| add(&mut servers, server.to_string()));
    network.search.iter().for_each(|domain| add(&mut search, domain.to_string()));
    for interface in &network.interfaces {
        for server in &interface.nameservers {
            let text = if is_link_local(*server) { format!("{server}%{}", interface.name) } else { server.to_string() };
            add(&mut servers, text);
        }
        interface.search.iter().for_each(|domain| add(&mut search, domain.to_string()));
    }
    (servers, search)
}

/// Applies the policy of the module page; the answer says what happens to the file, for the report. `backend` is `None` when the tree has none.
pub fn write_resolv_conf(plan: &mut Plan<'_>, facts: &GuestFacts, network: &Network, backend: Option<BackendKind>) -> Result<String> {
    let (servers, search) = merged(network);
    if let Some(who) = plan.claimant(PATH) {
        plan.notes.push(format!("{PATH} is left to {who}"));
        return Ok(format!("left to {who}"));
    }
    let nothing = servers.is_empty() && search.is_empty();
    match backend.map_or(Resolver::File, |backend| resolver(facts, backend)) {
        Resolver::Resolved | Resolver::ResolvedWithHook => {
            if facts.node(PATH).is_none() {
                plan.symlink(PATH, "../run/systemd/resolve/stub-resolv.conf", "systemd-resolved answers DNS queries")?;
            }
            if !nothing && backend.is_some_and(|kind| !tells_resolved(kind) && resolver(facts, kind) == Resolver::Resolved) {
                write_resolved_drop_in(plan, &servers, &search)?;
                return Ok("left to systemd-resolved, which gets the resolvers by resolved.conf.d".into());
            }
            Ok("left to systemd-resolved, which gets the resolvers from the network configuration".into())
        }
        Resolver::Resolvconf => {
            Ok(format!("left to resolvconf, which gets the resolvers from {}", backend.map_or("the network configuration", BackendKind::name)))
        }
        Resolver::Netconfig if nothing => Ok("left to netconfig; no resolvers are given".into()),
        Resolver::Netconfig => write_netconfig(plan, facts, &servers, &search),
        Resolver::NetworkManager => Ok("left to NetworkManager, which gets the resolvers from the profiles".into()),
        Resolver::File if nothing => {
            if network.interfaces.iter().all(|interface| !interface.dhcp4 && !interface.dhcp6) && facts.node(PATH).is_some() {
                plan.notes.push(format!("no resolvers are given: {PATH} stays as the image has it"));
            }
            Ok("left as it is: no resolvers are given".into())
        }
        Resolver::File => write_file(plan, facts, network, servers, search),
    }
}

fn write_file(plan: &mut Plan<'_>, facts: &GuestFacts, network: &Network, servers: Vec<String>, search: Vec<String>) -> Result<String> {
    let mut text = String::from("# Written by cloudletd.\n");
    for server in servers.iter().take(SERVERS_MAX) {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !search.is_empty() {
        text.push_str(&format!("search {}\n", search.join(" ")));
    }
    if let Some(rest) = servers.get(SERVERS_MAX..).filter(|rest| !rest.is_empty()) {
        plan.warnings.push(format!("{PATH} holds {SERVERS_MAX} servers (resolv.conf(5), MAXNS): {} left out", rest.join(", ")));
    }
    if search.len() > SEARCH_MAX {
        plan.warnings.push(format!("{PATH} has {} search domains: glibc before 2.26 reads the first {SEARCH_MAX}", search.len()));
    }
    if network.interfaces.iter().any(|interface| interface.dhcp4 || interface.dhcp6) {
        plan.notes.push(format!("{PATH} is written with the resolvers given; the guest's DHCP client may replace it"));
    }
    let (why, told) = match facts.node(PATH).map(|node| &node.kind) {
        Some(NodeKind::Symlink { target }) => {
            let shown: String = target.chars().filter(|c| !c.is_control()).take(200).collect();
            (format!("resolvers; replaces the link to {shown}, which nothing in the image maintains"), "written; it was a link that nobody maintains")
        }
        _ => ("resolvers".to_owned(), "written"),
    };
    plan.write(PATH, text, 0o644, why)?;
    Ok(told.to_owned())
}

fn write_netconfig(plan: &mut Plan<'_>, facts: &GuestFacts, servers: &[String], search: &[String]) -> Result<String> {
    let old = facts.text(NETCONFIG).unwrap_or_default();
    let variables = [("NETCONFIG_DNS_STATIC_SERVERS", servers.join(" ")), ("NETCONFIG_DNS_STATIC_SEARCHLIST", search.join(" "))];
    let text = with_variables(old, &variables);
    plan.write_as(NETCONFIG, text, attrs_of(facts, NETCONFIG), "resolvers, which netconfig merges into resolv.conf", Visibility::Open)?;
    Ok("left to netconfig, which gets the resolvers by its configuration".into())
}

fn write_resolved_drop_in(plan: &mut Plan<'_>, servers: &[String], search: &[String]) -> Result<()> {
    let mut text = String::from("# Written by cloudletd.\n[Resolve]\n");
    if !servers.is_empty() {
        text.push_str(&format!("DNS={}\n", servers.join(" ")));
    }
    if !search.is_empty() {
        text.push_str(&format!("Domains={}\n", search.join(" ")));
    }
    plan.write(
        "/etc/systemd/resolved.conf.d/90-cloudlet.conf",
        text,
        0o644,
        "resolvers: the back-end has no way to hand them to systemd-resolved here",
    )
}

/// Whether an address can be a resolver: not unspecified, multicast or broadcast. A loopback address can (a resolver inside the guest).
pub fn check_resolver(server: IpAddr) -> Result<(), String> {
    let broadcast = matches!(server, IpAddr::V4(v4) if v4.is_broadcast());
    if server.is_unspecified() || server.is_multicast() || broadcast {
        return Err(format!("{server} can't be a resolver: it is the address of no single host"));
    }
    Ok(())
}
