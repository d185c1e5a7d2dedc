//! The guests' own network programs judge what injection writes: Debian's ifup, systemd-networkd, NetworkManager and netplan's generator run on the
//! files of every case, in fresh network, mount, PID and IPC namespaces with a veth pair for each NIC, and the kernel's addresses and routes are
//! compared with what the request said.
//!
//! Needs root, and the Debian packages ifupdown, systemd, network-manager, netplan.io, dbus, iproute2 and util-linux; without them the tests fail.
//! Nothing outlives a test: the processes die with the PID namespace, mounts and devices with theirs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::OnceLock,
};

use cloudletd::{
    fs::edit::EditOp,
    guest::{
        config::{InstanceConfig, Network, Route, RouteKind},
        decode,
        facts::GuestFacts,
    },
};
use serde_json::Value;

use crate::common::guest_trees::{
    self,
    injection::{Given, injected, name},
};

/// What every script starts with: the caller's mounts stay untouched, /run is empty, udev looks absent (a read-only /sys is how systemd tells),
/// addresses are usable at once.
const PREPARE: &str = r#"
set -eu
mount -t tmpfs none /run
mount -t sysfs -o ro none /sys
ip link set lo up
echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad
echo 0 > /proc/sys/net/ipv6/conf/all/accept_dad
n=0
while read -r name mac; do
    ip link add "$name" address "$mac" mtu 1500 type veth peer name "peer$n"
    echo 1 > "/proc/sys/net/ipv6/conf/peer$n/disable_ipv6"
    ip link set "peer$n" mtu 9000
    ip link set "peer$n" up
    n=$((n + 1))
done < "$CASE/nics"
have() {
    a=$(ip -o addr show scope global | wc -l)
    r=$( (ip -o -4 route show default; ip -o -6 route show default) | wc -l)
    [ "$a" -ge "$ADDRESSES" ] && [ "$r" -ge "$ROUTES" ]
}
settle() {
    i=0
    while ! have && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done
    # What should not be there gets a moment to show up.
    sleep 0.3
}
tell() {
    ip -j addr show; ip -j -4 route show; ip -j -6 route show; ip -j -4 route show table all; ip -j -6 route show table all
}
"#;

struct Case {
    name: String,
    config: InstanceConfig,
    /// Path and content of every file written.
    files: BTreeMap<String, Vec<u8>>,
    directory: PathBuf,
}

impl Case {
    fn network(&self) -> &Network {
        self.config.network.as_ref().expect("every case has a network")
    }

    /// A kind of interface of this case that the running kernel has no module for: then only what the judge says of the files counts.
    fn missing_kind(&self) -> Option<&'static str> {
        static MISSING: OnceLock<Vec<&'static str>> = OnceLock::new();
        let missing = MISSING.get_or_init(|| ["bond", "vlan"].into_iter().filter(|kind| !kernel_makes(kind)).collect());
        missing.iter().copied().find(|kind| self.network().interfaces.iter().any(|interface| interface.kind.name() == *kind))
    }

    fn dhcp(&self) -> bool {
        self.network().interfaces.iter().any(|interface| interface.dhcp4 || interface.dhcp6)
    }

    /// Puts the files below `from` (a directory of the guest) into a directory of their own.
    fn place(&self, from: &str, into: &str) -> PathBuf {
        let directory = self.directory.join(into);
        fs::create_dir_all(&directory).expect("directory");
        for (path, content) in &self.files {
            if let Some(name) = path.strip_prefix(from).and_then(|rest| rest.strip_prefix('/')).filter(|name| !name.contains('/')) {
                let path = directory.join(name);
                fs::write(&path, content).expect("write");
                fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("mode");
            }
        }
        directory
    }
}

fn kernel_makes(kind: &str) -> bool {
    let script = "ip link add a type veth peer name b && ip link add link a name c type vlan id 5".to_owned();
    let script = if kind == "vlan" { script } else { format!("ip link add c type {kind}") };
    Command::new("/usr/bin/unshare").args(["--net", "/bin/sh", "-c", &script]).output().is_ok_and(|output| output.status.success())
}

fn need(programs: &[&str]) {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root: it makes network namespaces");
    for program in programs {
        assert!(
            Path::new(program).exists(),
            "this test needs {program}: install ifupdown, systemd, network-manager, netplan.io, dbus, iproute2, util-linux"
        );
    }
}

fn cases(facts: &GuestFacts, scratch: &Path) -> Vec<Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/net/cases");
    let mut paths: Vec<PathBuf> = fs::read_dir(root).expect("cases").map(|entry| entry.expect("entry").path()).collect();
    paths.sort();
    let case = |path: &PathBuf| {
        let config = decode::from_json(&fs::read(path).expect("case"), Some(&name())).expect("valid").config;
        let injection = injected(facts, &config, &Given::default()).expect("injects");
        let files = injection.edits.into_iter().filter_map(|edit| match edit.op {
            EditOp::WriteFile { content, .. } => Some((edit.path.to_string(), content)),
            _ => None,
        });
        let files = files.collect();
        let name = path.file_stem().expect("name").to_string_lossy().into_owned();
        let directory = scratch.join(&name);
        fs::create_dir_all(&directory).expect("directory");
        Case { name, config, files, directory }
    };
    paths.iter().map(case).collect()
}

/// Runs a script in namespaces of its own; the judge's addresses and routes come back as three lines of JSON.
fn run(case: &Case, script: &str) -> Output {
    let network = case.network();
    let mut nics = String::new();
    for (index, interface) in network.nics().enumerate() {
        let mac = interface.mac.map_or_else(|| format!("52:54:00:ff:00:{index:02x}"), |mac| mac.to_string());
        nics.push_str(&format!("{} {mac}\n", interface.name));
    }
    fs::write(case.directory.join("nics"), nics).expect("nics");
    // What the kernel can't make is not waited for.
    let whole = case.missing_kind().is_none();
    let addresses: usize = network.interfaces.iter().map(|interface| interface.addresses.len()).sum();
    let routes = network.interfaces.iter().map(|interface| interface.gateways().count()).sum::<usize>();
    Command::new("/usr/bin/unshare")
        .args(["--net", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"])
        .args(["/usr/bin/timeout", "--signal=KILL", "60", "/bin/sh", "-c", &format!("{PREPARE}{script}")])
        .env("CASE", &case.directory)
        .env("ADDRESSES", if whole { addresses } else { 0 }.to_string())
        .env("ROUTES", if whole { routes } else { 0 }.to_string())
        .env("LC_ALL", "C")
        .output()
        .expect("unshare runs")
}

fn strings(list: &Value, key: &str) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(|item| item[key].as_str().map(str::to_owned)).collect()
}

/// Whether a route of a table of its own, or of another type, is among all routes.
fn has_route(all: &Value, route: &Route) -> bool {
    let to = if route.to.prefix == 0 { "default".to_owned() } else { route.to.to_string() };
    all.as_array().into_iter().flatten().any(|found| {
        let table = found["table"].as_str().and_then(|table| table.parse().ok()).or(found["table"].as_u64().map(|table| table as u32));
        found["dst"] == to && found["type"].as_str().unwrap_or("unicast") == route.kind.name() && table == route.table
    })
}

/// Compares the kernel's state with the request. Gives what differs.
fn compare(case: &Case, output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    let told: Vec<Value> = text.lines().filter(|line| line.starts_with('[')).filter_map(|line| serde_json::from_str(line).ok()).collect();
    let log = format!("{}{}", text, String::from_utf8_lossy(&output.stderr));
    let [links, routes4, routes6, all4, all6] = &told[..] else { return vec![format!("{}: the judge did not finish: {log}", case.name)] };
    let mut wrong = Vec::new();
    let mut check = |what: String, want: String, got: String| {
        if want != got {
            wrong.push(format!("{}: {what}: wanted {want}, the guest has {got}\n{log}", case.name));
        }
    };
    for interface in &case.network().interfaces {
        let name = interface.name.as_str();
        let link = links.as_array().into_iter().flatten().find(|link| link["ifname"] == name).expect("the NIC is there");
        let got: BTreeSet<String> = link["addr_info"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|address| address["scope"] == "global")
            .map(|address| format!("{}/{}", address["local"].as_str().unwrap_or_default(), address["prefixlen"]))
            .collect();
        let want: BTreeSet<String> = interface.addresses.iter().map(ToString::to_string).collect();
        check(format!("addresses of {name}"), format!("{want:?}"), format!("{got:?}"));
        let master = case.network().master(&interface.name).map(|master| master.name.as_str()).unwrap_or_default();
        check(format!("master of {name}"), master.into(), link["master"].as_str().unwrap_or_default().into());
        if let (Some(mac), true) = (interface.mac, interface.kind.name() == "bridge") {
            check(format!("MAC of {name}"), mac.to_string(), link["address"].as_str().unwrap_or_default().into());
        }
        if let Some(mtu) = interface.mtu {
            check(format!("MTU of {name}"), mtu.to_string(), link["mtu"].to_string());
        }
        for (v6, routes) in [(false, routes4), (true, routes6)] {
            let own: Vec<&Value> = routes.as_array().into_iter().flatten().filter(|route| route["dev"] == name).collect();
            let default: Vec<&&Value> = own.iter().filter(|route| route["dst"] == "default").collect();
            let want: Vec<String> = interface.gateways().filter(|gateway| gateway.is_ipv6() == v6).map(|gateway| gateway.to_string()).collect();
            let got: Vec<String> = default.iter().map(|route| route["gateway"].as_str().unwrap_or_default().to_owned()).collect();
            check(format!("default gateway of {name}"), format!("{want:?}"), format!("{got:?}"));
            if let (Some(metric), Some(route)) = (interface.metric, default.first()) {
                check(format!("metric of {name}"), metric.to_string(), route["metric"].to_string());
            }
            let destinations = strings(&own.iter().map(|route| (*route).clone()).collect(), "dst");
            let all = if v6 { all6 } else { all4 };
            for route in interface.routes.iter().filter(|route| route.to.address.is_ipv6() == v6) {
                if route.table.is_some() || route.kind != RouteKind::Unicast {
                    check(format!("route to {} in its table", route.to), "true".into(), has_route(all, route).to_string());
                    continue;
                }
                check(format!("route of {name} to {}", route.to), "true".into(), destinations.contains(&route.to.to_string()).to_string());
            }
        }
    }
    wrong
}

/// Runs every case that `fits` through a judge and fails with everything that differs.
fn judge(facts: &GuestFacts, at_least: usize, fits: impl Fn(&Case) -> bool, prepare: impl Fn(&Case), script: &str) {
    let scratch = tempfile::tempdir().expect("scratch");
    let mut wrong = Vec::new();
    let mut count = 0;
    for case in cases(facts, scratch.path()).iter().filter(|case| fits(case)) {
        prepare(case);
        let output = run(case, script);
        if case.missing_kind().is_none() {
            wrong.extend(compare(case, &output));
        }
        let log = String::from_utf8_lossy(&output.stderr);
        for complaint in ["Unknown key", "Unknown section", "Failed to parse", "ignoring", "invalid", "No such file"] {
            if let Some(line) = log.lines().find(|line| line.contains(complaint) && line.contains("cloudlet")) {
                wrong.push(format!("{}: the judge complains: {line}", case.name));
            }
        }
        count += 1;
    }
    assert!(count >= at_least, "only {count} cases were judged");
    assert!(wrong.is_empty(), "{} differences:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn debian_ifup_brings_up_what_was_asked_for() {
    need(&["/sbin/ifup", "/sbin/ip", "/usr/bin/unshare"]);
    // DHCP would run dhclient, which has nobody to ask.
    let script = r#"
# ifupdown's commands set options of bridges there.
mount -o remount,rw /sys
mkdir -p /run/network
ifup --all --no-scripts --interfaces="$CASE/etc/interfaces" >&2
settle
tell
"#;
    judge(
        &guest_trees::debian_ifupdown(),
        20,
        |case| !case.dhcp() && case.missing_kind().is_none(),
        |case| drop(case.place("/etc/network", "etc")),
        script,
    );
}

#[test]
fn busybox_ifup_brings_up_what_was_asked_for() {
    need(&["/bin/busybox", "/sbin/ip", "/usr/bin/unshare"]);
    // busybox's own ip as well: it knows less than iproute2's.
    let script = r#"
mount -o remount,rw /sys
mkdir -p /run/network /run/bin
for name in ip ifup ifdown run-parts; do ln -s /bin/busybox "/run/bin/$name"; done
mount -t tmpfs none /etc/network
mkdir /etc/network/if-pre-up.d /etc/network/if-up.d
# busybox brings lo up by itself and takes an address that is there for a failure.
ip link set lo down
ip addr flush dev lo
PATH=/run/bin:$PATH /run/bin/ifup -a -i "$CASE/etc/interfaces" >&2
settle
tell
"#;
    judge(
        &guest_trees::alpine_busybox(),
        20,
        |case| !case.dhcp() && case.missing_kind().is_none(),
        |case| drop(case.place("/etc/network", "etc")),
        script,
    );
}

#[test]
fn debian_ifquery_reads_every_case() {
    need(&["/sbin/ifquery"]);
    let scratch = tempfile::tempdir().expect("scratch");
    for case in cases(&guest_trees::debian_ifupdown(), scratch.path()) {
        let file = case.place("/etc/network", "etc").join("interfaces");
        for interface in &case.network().interfaces {
            let output = Command::new("/sbin/ifquery").arg("--interfaces").arg(&file).arg(interface.name.as_str()).output().expect("ifquery");
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && output.stderr.is_empty(), "{}: {}", case.name, String::from_utf8_lossy(&output.stderr));
            for address in &interface.addresses {
                // ifquery splits the prefix off and shows it as a netmask.
                assert!(text.lines().any(|line| line == format!("address: {}", address.address)), "{}: {address} is not in\n{text}", case.name);
            }
        }
    }
}

const NETWORKD: &str = r#"
mkdir -p /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/netif/lldp
chown -R systemd-network: /run/systemd/netif
chmod 755 "$CASE" "$CASE/etc"
chmod 644 "$CASE"/etc/* || true
mount --bind "$CASE/etc" /etc/systemd/network
SYSTEMD_LOG_TARGET=console SYSTEMD_LOG_LEVEL=info /lib/systemd/systemd-networkd >&2 &
settle
tell
"#;

#[test]
fn systemd_networkd_brings_up_what_was_asked_for() {
    need(&["/lib/systemd/systemd-networkd", "/sbin/ip", "/usr/bin/unshare"]);
    judge(&guest_trees::arch_networkd(), 24, |_| true, |case| drop(case.place("/etc/systemd/network", "etc")), NETWORKD);
}

#[test]
fn network_manager_brings_up_what_was_asked_for() {
    need(&["/usr/sbin/NetworkManager", "/usr/bin/dbus-daemon", "/sbin/ip", "/usr/bin/unshare"]);
    let script = r#"
mkdir -p /run/dbus /run/NetworkManager /run/udev/data
mount --bind "$CASE/etc" /etc/NetworkManager/system-connections
mount -t tmpfs none /var/lib/NetworkManager
printf '[main]\nplugins=keyfile\nno-auto-default=*\ndns=none\n[keyfile]\nunmanaged-devices=interface-name:peer*\n' > /run/nm.conf
dbus-daemon --system --fork
NetworkManager --config=/run/nm.conf --config-dir=/run/none --no-daemon --log-level=WARN >&2 &
settle
tell
"#;
    judge(&guest_trees::fedora_network_manager(), 24, |_| true, |case| drop(case.place("/etc/NetworkManager/system-connections", "etc")), script);
}

#[test]
fn nmcli_reads_every_profile_of_every_case() {
    need(&["/usr/bin/nmcli"]);
    let scratch = tempfile::tempdir().expect("scratch");
    let mut count = 0;
    for case in cases(&guest_trees::fedora_network_manager(), scratch.path()) {
        for (path, content) in case.files.iter().filter(|(path, _)| path.ends_with(".nmconnection")) {
            let mut command = Command::new("/usr/bin/nmcli");
            command.args(["--offline", "connection", "modify", "connection.autoconnect", "yes"]);
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("nmcli");
            child.stdin.take().expect("stdin").write_all(content).expect("keyfile");
            let output = child.wait_with_output().expect("nmcli");
            let (text, complaint) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success() && complaint.is_empty(), "{}: {path}: {complaint}", case.name);
            // What nmcli writes back is what it understood: every value of ours is still there.
            let ours = String::from_utf8_lossy(content);
            for line in ours.lines().filter(|line| ["address", "route", "parent=", "mode=", "id=", "master="].iter().any(|key| line.starts_with(key)))
            {
                let (_, value) = line.split_once('=').expect("key=value");
                // nmcli turns words of options around (mode=1) only where a number is given.
                assert!(text.contains(value), "{}: {path}: {line} is not in\n{text}", case.name);
            }
            count += 1;
        }
    }
    assert!(count >= 40, "only {count} profiles");
}

#[test]
fn netplan_generates_for_networkd_without_complaint_and_networkd_brings_it_up() {
    need(&["/usr/sbin/netplan", "/lib/systemd/systemd-networkd", "/sbin/ip", "/usr/bin/unshare"]);
    let generate = |case: &Case| {
        let root = case.directory.join("root");
        case.place("/etc/netplan", "root/etc/netplan");
        let output = Command::new("/usr/sbin/netplan").args(["generate", "--root-dir"]).arg(&root).output().expect("netplan");
        let complaint = String::from_utf8_lossy(&output.stderr);
        // With a root directory netplan still tries to talk to the host's systemd about an Open vSwitch unit.
        let complaint: Vec<&str> = complaint.lines().filter(|line| !line.contains("systemctl") && !line.contains("ovs")).collect();
        assert!(output.status.success() && complaint.is_empty(), "{}: {complaint:?}", case.name);
        let etc = case.directory.join("etc");
        fs::create_dir_all(&etc).expect("directory");
        let made = root.join("run/systemd/network");
        for entry in made.is_dir().then(|| fs::read_dir(made).expect("generated")).into_iter().flatten() {
            let entry = entry.expect("entry");
            // A veth has no permanent MAC; everything else stays as netplan wrote it.
            let text = fs::read_to_string(entry.path()).expect("text").replace("PermanentMACAddress=", "MACAddress=");
            fs::write(etc.join(entry.file_name()), text).expect("write");
        }
    };
    judge(&guest_trees::ubuntu_netplan(), 24, |_| true, generate, NETWORKD);
}
