//! A second opinion on network documents: cloud-init's own net-convert turns the same documents into each format that it knows, and what it says of
//! addresses, gateways, routes and resolvers is compared with what injection writes. Other tools judge single back-ends: a shell reads what shells
//! read in the guest, NetworkManager's initrd generator reads the kernel's `ip=`.
//!
//! cloud-init is not installed, only unpacked, by `scripts/setup-debian.sh --test`; without it the test fails. `CLOUDLETD_CLOUD_INIT` names another
//! place than target/tools/cloud-init.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use cloudletd::{
    fs::edit::EditOp,
    guest::{
        config::{Cidr, Network},
        decode,
        facts::GuestFacts,
        report::NetworkReport,
    },
};
use serde_json::json;

use crate::common::guest_trees::{
    self,
    injection::{Given, injected},
};

/// Files by path.
type Files = BTreeMap<String, String>;

/// What a set of files says of one interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Link {
    addresses: BTreeSet<String>,
    gateways: BTreeSet<IpAddr>,
    routes: BTreeSet<(String, IpAddr)>,
}

/// What a set of files says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct View {
    links: BTreeMap<String, Link>,
    servers: BTreeSet<IpAddr>,
    search: BTreeSet<String>,
}

impl View {
    fn link(&mut self, name: &str) -> &mut Link {
        self.links.entry(name.to_owned()).or_default()
    }

    fn servers(&mut self, words: &str) {
        self.servers.extend(words.split([' ', ';', ',']).filter_map(|word| word.parse::<IpAddr>().ok()));
    }

    fn search(&mut self, words: &str) {
        self.search.extend(words.split([' ', ';']).filter(|word| !word.is_empty()).map(str::to_owned));
    }

    fn resolv_conf(&mut self, files: &Files) {
        for line in files.get("/etc/resolv.conf").map(String::as_str).unwrap_or_default().lines() {
            match line.split_once(' ') {
                Some(("nameserver", server)) => self.servers(server),
                Some(("search", domains)) => self.search(domains),
                _ => {}
            }
        }
    }
}

impl Link {
    fn route(&mut self, to: &str, via: &str) {
        let Ok(via) = via.parse::<IpAddr>() else { return };
        if matches!(to, "default" | "0.0.0.0/0" | "::/0") {
            self.gateways.insert(via);
        } else {
            self.routes.insert((to.to_owned(), via));
        }
    }

    fn address(&mut self, address: &str, netmask: Option<&str>) {
        let prefix = |mask: &str| mask.parse::<std::net::Ipv4Addr>().map_or(mask.to_owned(), |mask| u32::from(mask).leading_ones().to_string());
        let whole = if address.contains('/') { address.to_owned() } else { format!("{address}/{}", prefix(netmask.unwrap_or("?"))) };
        self.addresses.insert(decode::parse_cidr(&whole).unwrap_or_else(|why| panic!("{why}")).to_string());
    }
}

/// interfaces(5), with routes by `route add` or `ip route replace`.
fn read_eni(files: &Files) -> View {
    let mut view = View::default();
    let text: String = files.iter().filter(|(path, _)| path.starts_with("/etc/network/interfaces")).map(|(_, text)| &text[..]).collect();
    let mut name = String::new();
    let mut address = String::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["iface", iface, ..] => name = iface.to_owned(),
            ["address", own] if own.contains('/') => view.link(&name).address(own, None),
            ["address", own] => address = own.to_owned(),
            ["netmask", mask] => view.link(&name).address(&address.clone(), Some(mask)),
            ["gateway", via] => view.link(&name).route("default", via),
            ["dns-nameservers", ..] => view.servers(&words[1..].join(" ")),
            ["dns-search", ..] => view.search(&words[1..].join(" ")),
            [_, "ip", "route", "replace", to, "via", via, ..] | [_, "ip", "-6", "route", "replace", to, "via", via, ..] => {
                view.link(&name).route(to, via);
            }
            [_, "route", "add", "default", "gw", via, ..] => view.link(&name).route("default", via),
            [_, "route", "add", "-net", to, "gw", via, ..] => view.link(&name).route(to, via),
            [_, "route", "add", "-A", "inet6", to, "gw", via, ..] => view.link(&name).route(to, via),
            _ => {}
        }
    }
    view.links.remove("lo");
    view.resolv_conf(files);
    view
}

fn variables(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once('=')).map(|(name, value)| (name, value.trim_matches(['"', '\'']))).collect()
}

/// Both dialects of ifcfg files.
fn read_ifcfg(files: &Files) -> View {
    let mut view = View::default();
    for (path, text) in files.iter().filter(|(path, _)| path.starts_with("/etc/sysconfig/network")) {
        let file = path.rsplit('/').next().expect("a name");
        let values = variables(text);
        if let Some(name) = file.strip_prefix("ifcfg-").map(|name| name.split(':').next().expect("a name")) {
            for (variable, value) in &values {
                let number = |stem: &str| variable.strip_prefix(stem).filter(|rest| rest.trim_start_matches('_').bytes().all(|b| b.is_ascii_digit()));
                if let Some(rest) = number("IPADDR") {
                    let mask = values.get(&format!("PREFIX{rest}")[..]).or_else(|| values.get(&format!("NETMASK{rest}")[..]));
                    view.link(name).address(value, mask.copied());
                } else if number("DNS").is_some_and(|rest| !rest.is_empty()) {
                    view.servers(value);
                } else if *variable == "DOMAIN" {
                    view.search(value);
                } else if number("IPADDR6").is_some() || *variable == "IPV6ADDR" {
                    view.link(name).address(value, None);
                } else if *variable == "IPV6ADDR_SECONDARIES" {
                    value.split(' ').for_each(|address| view.link(name).address(address, None));
                } else if matches!(*variable, "GATEWAY" | "IPV6_DEFAULTGW") {
                    view.link(name).route("default", value.split('%').next().expect("an address"));
                }
            }
            view.link(name);
        } else if let Some(name) = file.strip_prefix("route-").or_else(|| file.strip_prefix("route6-")).or_else(|| file.strip_prefix("ifroute-")) {
            for line in text.lines() {
                let words: Vec<&str> = line.split_whitespace().collect();
                match words[..] {
                    [to, "via", via, ..] | [to, via, "-", ..] => view.link(name).route(to, via),
                    _ => {}
                }
            }
            for (variable, to) in values.iter().filter(|(variable, _)| variable.starts_with("ADDRESS")) {
                let of = |stem: &str| values.get(&variable.replace("ADDRESS", stem)[..]).copied().unwrap_or_default();
                let mask = u32::from(of("NETMASK").parse::<std::net::Ipv4Addr>().expect("a netmask")).leading_ones();
                view.link(name).route(&format!("{to}/{mask}"), of("GATEWAY"));
            }
        } else if file == "config" {
            view.servers(values.get("NETCONFIG_DNS_STATIC_SERVERS").copied().unwrap_or_default());
            view.search(values.get("NETCONFIG_DNS_STATIC_SEARCHLIST").copied().unwrap_or_default());
        }
    }
    view.resolv_conf(files);
    view
}

/// `[Section]` files: every section with its values, in order.
fn sections(text: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut all: Vec<(String, Vec<(String, String)>)> = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            all.push((name.to_owned(), Vec::new()));
        } else if let (Some((key, value)), Some((_, values))) = (line.split_once('='), all.last_mut()) {
            values.push((key.to_owned(), value.to_owned()));
        }
    }
    all
}

fn read_networkd(files: &Files) -> View {
    let mut view = View::default();
    for (path, text) in files.iter().filter(|(path, _)| path.ends_with(".network")) {
        let name = path.trim_end_matches(".network").rsplit_once("-init-").or(path.trim_end_matches(".network").rsplit_once("cloudlet-"));
        let name = name.expect("named after the interface").1;
        view.link(name);
        for (section, values) in sections(text) {
            let get = |key: &str| -> Vec<&str> { values.iter().filter(|(name, _)| name == key).map(|(_, value)| value.as_str()).collect() };
            get("Address").iter().for_each(|address| view.link(name).address(address, None));
            get("DNS").iter().for_each(|servers| view.servers(servers));
            get("Domains").iter().for_each(|domains| view.search(domains));
            if let (true, Some(via)) = (section == "Route", get("Gateway").first()) {
                view.link(name).route(get("Destination").first().unwrap_or(&"default"), via);
            }
        }
    }
    view
}

fn read_keyfiles(files: &Files) -> View {
    let mut view = View::default();
    for (path, text) in files.iter().filter(|(path, _)| path.ends_with(".nmconnection")) {
        let name =
            path.trim_end_matches(".nmconnection").rsplit_once("cloud-init-").or(path.trim_end_matches(".nmconnection").rsplit_once("cloudlet-"));
        let name = name.expect("named after the interface").1;
        view.link(name);
        for (section, values) in sections(text).iter().filter(|(section, _)| section.starts_with("ipv")) {
            for (key, value) in values {
                let number = |stem: &str| key.strip_prefix(stem).is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit()) && !rest.is_empty());
                match &key[..] {
                    "gateway" => view.link(name).route("default", value),
                    "dns" => view.servers(value),
                    "dns-search" => view.search(value),
                    _ if number("address") => view.link(name).address(value, None),
                    _ if number("route") => {
                        let words: Vec<&str> = value.split(',').collect();
                        view.link(name).route(words[0], words.get(1).copied().unwrap_or_default());
                    }
                    _ => assert!(!section.is_empty()),
                }
            }
        }
    }
    view
}

/// By our own decoder: what cloud-init passes on of a version 2 document is the document.
fn read_netplan(files: &Files) -> View {
    let (_, text) = files.iter().find(|(path, _)| path.starts_with("/etc/netplan/")).expect("a netplan file");
    view_of(&decode::network_document(text).expect("netplan's form"))
}

fn view_of(network: &Network) -> View {
    let mut view = View::default();
    for interface in &network.interfaces {
        let link = view.link(interface.name.as_str());
        link.addresses = interface.addresses.iter().map(Cidr::to_string).collect();
        link.gateways = interface.gateways().collect();
        link.routes = interface.routes.iter().filter_map(|route| Some((route.to.to_string(), route.via?))).collect();
        view.servers.extend(&interface.nameservers);
        view.search.extend(interface.search.iter().map(ToString::to_string));
    }
    view.servers.extend(&network.nameservers);
    view.search.extend(network.search.iter().map(ToString::to_string));
    view
}

fn tree(name: &str) -> GuestFacts {
    guest_trees::all().into_iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("no tree {name}")).1
}

/// What injection writes into a tree.
fn ours(network: serde_json::Value, facts: &GuestFacts) -> (Files, NetworkReport, Network) {
    let document = json!({"instance": "web1", "network": network});
    let config = decode::from_value(&document, None).unwrap_or_else(|error| panic!("{:?}", error.violations())).config;
    let injection = injected(facts, &config, &Given::default()).expect("injects");
    // What is not text (the random seed) is nothing of the network's.
    let files = injection.edits.into_iter().filter_map(|edit| match edit.op {
        EditOp::WriteFile { content, .. } => Some((edit.path.to_string(), String::from_utf8(content).ok()?)),
        _ => None,
    });
    (files.collect(), injection.report.network.expect("a network"), config.network.expect("a network"))
}

fn cloud_init() -> PathBuf {
    let place = std::env::var_os("CLOUDLETD_CLOUD_INIT").map(PathBuf::from);
    let place = place.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/cloud-init"));
    let packages = place.join("usr/lib/python3/dist-packages");
    assert!(packages.join("cloudinit").is_dir(), "this test needs cloud-init unpacked in {}: run scripts/setup-debian.sh --test", place.display());
    packages
}

/// What net-convert is asked: kind of output, distribution, document, directory for the answer. One process for all, most of its time is starting.
const CONVERT: &str = r#"
import sys
from cloudinit.cmd.devel import net_convert
for line in sys.stdin:
    kind, distribution, document, out = line.rstrip("\n").split("\t")
    macs = ["--mac", "eth0,52:54:00:00:00:01", "--mac", "eth1,52:54:00:00:00:02"]
    arguments = ["--kind", "yaml", "--output-kind", kind, "--distro", distribution, "--network-data", document, "--directory", out]
    net_convert.handle_args("net-convert", net_convert.get_parser().parse_args(arguments + macs))
"#;

fn convert(jobs: &str) {
    let output = run(Command::new("python3").args(["-c", CONVERT]).env("PYTHONPATH", cloud_init()).env("LC_ALL", "C.UTF-8"), jobs);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn files_below(out: &Path) -> Files {
    let mut files = Files::new();
    let mut open = vec![out.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).expect("made").map(|entry| entry.expect("entry").path()) {
            if entry.is_dir() {
                open.push(entry);
            } else {
                let path = format!("/{}", entry.strip_prefix(out).expect("below").display());
                files.insert(path, fs::read_to_string(&entry).expect("text"));
            }
        }
    }
    files
}

/// Formats of net-convert: its name, its distribution, a tree of ours, who reads it, and what cloud-init says nothing about.
type Format = (&'static str, &'static str, &'static str, fn(&Files) -> View, Silent);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Silent {
    Nothing,
    /// cloud-init 22.4 writes no ifroute files for SUSE at all, and the resolvers of version 1's subnets nowhere.
    RoutesAndLinkDns,
}

const FORMATS: [Format; 6] = [
    ("eni", "debian", "debian-11-ifupdown", read_eni, Silent::Nothing),
    ("sysconfig", "centos", "centos-7-ifcfg", read_ifcfg, Silent::Nothing),
    ("sysconfig", "sles", "leap-wicked", read_ifcfg, Silent::RoutesAndLinkDns),
    ("networkd", "arch", "arch-networkd", read_networkd, Silent::Nothing),
    ("netplan", "ubuntu", "ubuntu-netplan", read_netplan, Silent::Nothing),
    ("network-manager", "fedora", "fedora-network-manager", read_keyfiles, Silent::Nothing),
];

#[test]
fn cloud_init_says_the_same_of_addresses_routes_and_resolvers() {
    let scratch = tempfile::tempdir().expect("scratch");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/net/documents");
    let mut documents: Vec<PathBuf> = fs::read_dir(root).expect("documents").map(|entry| entry.expect("entry").path()).collect();
    documents.sort();
    assert!(documents.len() >= 4);
    let name_of = |document: &Path| document.file_stem().expect("name").to_string_lossy().into_owned();
    let out = |document: &Path, kind, distribution| scratch.path().join(format!("{}-{kind}-{distribution}", name_of(document)));
    let mut jobs = String::new();
    for document in &documents {
        for (kind, distribution, ..) in FORMATS {
            jobs.push_str(&format!("{kind}\t{distribution}\t{}\t{}\n", document.display(), out(document, kind, distribution).display()));
        }
    }
    convert(&jobs);
    let mut wrong = Vec::new();
    for document in &documents {
        let name = name_of(document);
        let text = fs::read_to_string(document).expect("text");
        for (kind, distribution, tree_name, read, silent) in FORMATS {
            let (files, _, network) = ours(json!({"document": text}), &tree(tree_name));
            let (mut our_view, mut their_view) = (read(&files), read(&files_below(&out(document, kind, distribution))));
            let mut said = view_of(&network);
            for view in [&mut our_view, &mut their_view, &mut said] {
                // Interfaces without anything are left out by some readers here and some of cloud-init's renderers.
                view.links.retain(|_, link| *link != Link::default());
            }
            // Ours says what the document says, all of it.
            if our_view != said {
                wrong.push(format!("{name}, {tree_name}: {our_view:#?} is not {said:#?}"));
            }
            if silent == Silent::RoutesAndLinkDns {
                for view in [&mut our_view, &mut their_view] {
                    view.links.values_mut().for_each(|link| (link.gateways, link.routes) = Default::default());
                }
                if their_view.servers.is_empty() {
                    (our_view.servers, our_view.search) = Default::default();
                }
            }
            if our_view != their_view {
                wrong.push(format!("{name}, {kind} for {distribution}: ours {our_view:#?}\ncloud-init's {their_view:#?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differences\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn cloud_init_reads_its_seed_as_it_is_meant() {
    let scratch = tempfile::tempdir().expect("scratch");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/net/documents");
    for document in fs::read_dir(root).expect("documents").map(|entry| entry.expect("entry").path()) {
        let name = document.file_stem().expect("name").to_string_lossy().into_owned();
        let text = fs::read_to_string(&document).expect("text");
        let (files, _, network) = ours(json!({"document": text, "backend": "cloud-init"}), &tree("ubuntu-24-netplan"));
        let seed = scratch.path().join(format!("{name}.yaml"));
        fs::write(&seed, &files["/var/lib/cloud/seed/nocloud/network-config"]).expect("seed");
        for (kind, distribution, read) in [("eni", "debian", read_eni as fn(&Files) -> View), ("networkd", "arch", read_networkd)] {
            let out = scratch.path().join(format!("{name}-{kind}"));
            convert(&format!("{kind}\t{distribution}\t{}\t{}\n", seed.display(), out.display()));
            let (mut got, mut want) = (read(&files_below(&out)), view_of(&network));
            for view in [&mut got, &mut want] {
                view.links.retain(|_, link| *link != Link::default());
            }
            assert_eq!(got, want, "{name}: {kind}");
        }
    }
}

/// Every case of the golden files on a tree, as far as it can be expressed there.
fn cases_on(facts: &GuestFacts) -> Vec<(String, Files, NetworkReport, Network)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/net/cases");
    let mut paths: Vec<PathBuf> = fs::read_dir(root).expect("cases").map(|entry| entry.expect("entry").path()).collect();
    paths.sort();
    let one = |path: &PathBuf| {
        let case: serde_json::Value = serde_json::from_slice(&fs::read(path).expect("case")).expect("JSON");
        let (files, report, network) = ours(case["network"].clone(), facts);
        (path.file_stem().expect("name").to_string_lossy().into_owned(), files, report, network)
    };
    paths.iter().map(one).collect()
}

#[test]
fn a_shell_finds_in_netifrcs_file_what_the_network_says() {
    for (name, files, _, network) in cases_on(&tree("gentoo-netifrc")) {
        for interface in &network.interfaces {
            let variable = interface.name.as_str().replace(['.', '-'], "_");
            let script = format!(". /dev/stdin && IFACE={} && {{ ! type preup >/dev/null || preup; }} && echo $config_{variable}", interface.name);
            let got = shell(&script, &files["/etc/conf.d/net"]);
            for cidr in &interface.addresses {
                assert!(got.split_whitespace().any(|word| word == cidr.to_string()), "{name}: {cidr} of {} is not in {got}", interface.name);
            }
        }
    }
}

#[test]
fn a_shell_finds_in_every_ifcfg_file_what_the_network_says() {
    for (name, files, _, network) in cases_on(&tree("centos-7-ifcfg")) {
        for interface in &network.interfaces {
            let file = &files[&format!("/etc/sysconfig/network-scripts/ifcfg-{}", interface.name)];
            let got = shell(". /dev/stdin && echo $DEVICE ${HWADDR-} ${MACADDR-} ${MTU-}", file);
            let mac = interface.mac.map(|mac| mac.to_string());
            let mtu = interface.mtu.map(|mtu| mtu.to_string());
            let want: Vec<String> = [Some(interface.name.to_string()), mac, mtu].into_iter().flatten().collect();
            assert_eq!(got.trim(), want.join(" "), "{name}");
        }
    }
}

fn shell(script: &str, input: &str) -> String {
    let output = run(Command::new("/bin/sh").args(["-eu", "-c", script]), input);
    assert!(output.status.success() && output.stderr.is_empty(), "{input}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn run(command: &mut Command, input: &str) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    child.stdin.take().expect("stdin").write_all(input.as_bytes()).expect("input");
    child.wait_with_output().expect("ends")
}

#[test]
fn networkmanagers_initrd_generator_reads_the_kernels_argument() {
    let generator = "/usr/lib/NetworkManager/nm-initrd-generator";
    assert!(Path::new(generator).exists(), "this test needs {generator}: install network-manager");
    let facts = tree("appliance-kernel-ip");
    for (network, want) in [
        (
            json!({"interfaces": [{"name": "eth0", "addresses": ["192.0.2.10/24"], "gateway4": "192.0.2.1"}]}),
            vec!["address1=192.0.2.10/24,192.0.2.1|address1=192.0.2.10/24", "method=manual"],
        ),
        (json!({"interfaces": [{"name": "eth0", "dhcp4": true}, {"name": "eth1"}]}), vec!["interface-name=eth0", "method=auto"]),
    ] {
        let (_, report, _) = ours(network, &facts);
        assert_eq!((report.backend.as_str(), report.kernel_arguments.len()), ("kernel-ip", 1));
        let output = Command::new(generator).args(["--stdout", "--", &report.kernel_arguments[0]]).output().expect("runs");
        let text = String::from_utf8_lossy(&output.stdout);
        let (_, v4) = text.split_once("[ipv4]").unwrap_or_else(|| panic!("{text} {}", String::from_utf8_lossy(&output.stderr)));
        for line in want {
            let whole = if line.starts_with("interface") { &text } else { v4 };
            assert!(line.split('|').any(|line| whole.lines().any(|own| own == line)), "{line} is not in {text}");
        }
    }
}
