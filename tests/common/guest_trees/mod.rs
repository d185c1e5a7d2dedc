//! Hand-made facts of the kinds of images that injection has to serve: just enough of each tree for detection and editing to be real.

#![allow(dead_code, reason = "each test program uses its own part")]

mod distributions;
pub mod injection;

use cloudletd::guest::facts::{GuestFacts, Node, NodeKind};

/// What a line of a tree is.
pub enum Is<'a> {
    /// A program or other file whose content nobody reads.
    Present,
    /// A text file.
    Text(&'a str),
    /// A symlink.
    To(&'a str),
    /// A directory.
    Dir,
}
use Is::{Dir, Present, Text, To};

/// Adds a path with all its parents.
pub fn put(facts: &mut GuestFacts, path: &str, is: &Is<'_>) {
    let mut parent = String::new();
    for name in path.split('/').filter(|name| !name.is_empty()) {
        parent.push('/');
        parent.push_str(name);
        facts.nodes.entry(parent.clone()).or_insert(Node { kind: NodeKind::Directory, mode: 0o755, uid: 0, gid: 0 });
    }
    let (kind, mode) = match is {
        Present => (NodeKind::File { size: 1000, content: None }, 0o755),
        Text(text) => (NodeKind::File { size: text.len() as u64, content: Some(text.as_bytes().to_vec()) }, 0o644),
        To(target) => (NodeKind::Symlink { target: (*target).to_owned() }, 0o777),
        Dir => (NodeKind::Directory, 0o755),
    };
    facts.nodes.insert(path.to_owned(), Node { kind, mode, uid: 0, gid: 0 });
}

/// Sets mode and owner of a path.
pub fn own(facts: &mut GuestFacts, path: &str, mode: u16, uid: u32, gid: u32) {
    let node = facts.nodes.get_mut(path).expect("a path of the tree");
    (node.mode, node.uid, node.gid) = (mode, uid, gid);
}

fn tree(lines: &[(&str, Is<'_>)]) -> GuestFacts {
    let mut facts = GuestFacts::default();
    put(&mut facts, "/", &Dir);
    facts.nodes.remove("");
    for (path, is) in lines {
        put(&mut facts, path, is);
    }
    put(
        &mut facts,
        "/etc/passwd",
        &Text("root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\nada:x:1000:1000:Ada:/home/ada:/bin/sh\n"),
    );
    put(&mut facts, "/etc/shadow", &Text("root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\nada:!:19000:0:99999:7:::\n"));
    own(&mut facts, "/etc/shadow", 0o640, 0, 42);
    put(&mut facts, "/root", &Dir);
    put(&mut facts, "/home/ada", &Dir);
    own(&mut facts, "/home/ada", 0o755, 1000, 1000);
    facts
}

fn merged_usr(lines: &mut Vec<(&str, Is<'_>)>) {
    lines.extend([("/bin", To("usr/bin")), ("/sbin", To("usr/sbin")), ("/lib", To("usr/lib"))]);
}

fn systemd(lines: &mut Vec<(&str, Is<'_>)>) {
    merged_usr(lines);
    for path in [
        "/usr/lib/systemd/systemd",
        "/usr/lib/systemd/systemd-networkd",
        "/usr/lib/systemd/systemd-udevd",
        "/usr/bin/udevadm",
        "/usr/lib/systemd/system/systemd-networkd.service",
        "/usr/lib/systemd/system/systemd-networkd.socket",
        "/usr/lib/systemd/system/systemd-networkd-wait-online.service",
    ] {
        lines.push((path, Present));
    }
}

/// Debian bookworm as debootstrap and the installer leave it: ifupdown started by networking.service, networkd there but not enabled.
pub fn debian_ifupdown() -> GuestFacts {
    let mut lines = vec![
        ("/etc/os-release", To("../usr/lib/os-release")),
        ("/usr/lib/os-release", Text("ID=debian\nVERSION_ID=\"12\"\n")),
        ("/etc/hostname", Text("builder\n")),
        ("/etc/hosts", Text("127.0.0.1\tlocalhost\n127.0.1.1\tbuilder.lan builder\n::1\tlocalhost ip6-localhost ip6-loopback\n")),
        ("/etc/fstab", Text("# UNCONFIGURED FSTAB FOR BASE SYSTEM\n")),
        ("/etc/machine-id", Text("11111111111111111111111111111111\n")),
        ("/var/lib/dbus/machine-id", To("/etc/machine-id")),
        ("/etc/resolv.conf", Text("nameserver 10.9.8.7\n")),
        ("/usr/sbin/ifup", Present),
        ("/usr/sbin/dhclient", Present),
        ("/usr/sbin/sshd", Present),
        ("/etc/ssh/sshd_config", Text("Include /etc/ssh/sshd_config.d/*.conf\n")),
        ("/etc/ssh/ssh_host_rsa_key", Present),
        ("/etc/ssh/ssh_host_rsa_key.pub", Present),
        ("/etc/ssh/ssh_host_ed25519_key", Present),
        (
            "/etc/network/interfaces",
            Text("source /etc/network/interfaces.d/*\n\nauto lo\niface lo inet loopback\n\nallow-hotplug ens3\niface ens3 inet dhcp\n"),
        ),
        ("/etc/network/interfaces.d", Dir),
        ("/usr/lib/systemd/system/networking.service", Present),
        ("/etc/systemd/system/multi-user.target.wants/networking.service", To("/lib/systemd/system/networking.service")),
        ("/etc/systemd/network", Dir),
        ("/var/lib/systemd/random-seed", Present),
        ("/var/lib/dhcp/dhclient.ens3.leases", Present),
        ("/etc/udev/rules.d/70-persistent-net.rules", Present),
    ];
    systemd(&mut lines);
    tree(&lines)
}

/// An Ubuntu-like cloud image: netplan over networkd, resolved, cloud-init.
pub fn ubuntu_netplan() -> GuestFacts {
    let mut lines = vec![
        ("/etc/os-release", Text("ID=ubuntu\nID_LIKE=debian\n")),
        ("/etc/machine-id", Text("uninitialized\n")),
        ("/usr/sbin/netplan", To("/usr/share/netplan/netplan.script")),
        ("/etc/netplan/50-cloud-init.yaml", Text("network: {version: 2, ethernets: {ens3: {dhcp4: true}}}\n")),
        ("/etc/systemd/system/multi-user.target.wants/systemd-networkd.service", To("/usr/lib/systemd/system/systemd-networkd.service")),
        ("/usr/lib/systemd/systemd-resolved", Present),
        ("/usr/lib/systemd/system/systemd-resolved.service", Present),
        ("/etc/systemd/system/sysinit.target.wants/systemd-resolved.service", To("/usr/lib/systemd/system/systemd-resolved.service")),
        ("/etc/resolv.conf", To("../run/systemd/resolve/stub-resolv.conf")),
        ("/usr/bin/cloud-init", Present),
        ("/etc/cloud/cloud.cfg", Text("users: []\n")),
        ("/var/lib/cloud/instance", To("/var/lib/cloud/instances/i-1")),
        ("/var/lib/cloud/instances/i-1", Dir),
        ("/usr/sbin/sshd", Present),
        ("/etc/ssh/sshd_config", Text("KbdInteractiveAuthentication no\n")),
    ];
    systemd(&mut lines);
    tree(&lines)
}

/// A Fedora-like image: NetworkManager with a DHCP profile of its own, SELinux.
pub fn fedora_network_manager() -> GuestFacts {
    let mut lines = vec![
        ("/etc/os-release", Text("ID=fedora\n")),
        ("/etc/redhat-release", Present),
        ("/etc/machine-id", Text("22222222222222222222222222222222\n")),
        ("/usr/sbin/NetworkManager", Present),
        ("/usr/lib/systemd/system/NetworkManager.service", Present),
        ("/usr/lib/systemd/system/NetworkManager-wait-online.service", Present),
        ("/etc/systemd/system/multi-user.target.wants/NetworkManager.service", To("/usr/lib/systemd/system/NetworkManager.service")),
        (
            "/etc/NetworkManager/system-connections/eth0.nmconnection",
            Text("[connection]\nid=eth0\ntype=ethernet\ninterface-name=eth0\n[ipv4]\nmethod=auto\n"),
        ),
        ("/etc/selinux/config", Text("SELINUX=enforcing\nSELINUXTYPE=targeted\n")),
        ("/usr/sbin/sshd", Present),
        ("/etc/ssh/sshd_config", Text("AuthorizedKeysFile\t.ssh/authorized_keys\n")),
    ];
    systemd(&mut lines);
    tree(&lines)
}

/// An Arch-like image: networkd with a catch-all DHCP file, resolved.
pub fn arch_networkd() -> GuestFacts {
    let mut lines = vec![
        ("/etc/os-release", Text("ID=arch\n")),
        ("/etc/machine-id", Text("")),
        ("/etc/systemd/system/multi-user.target.wants/systemd-networkd.service", To("/usr/lib/systemd/system/systemd-networkd.service")),
        ("/etc/systemd/network/20-ethernet.network", Text("[Match]\nName=en*\nName=eth*\n\n[Network]\nDHCP=yes\n")),
        ("/usr/lib/systemd/systemd-resolved", Present),
        ("/usr/lib/systemd/system/systemd-resolved.service", Present),
        ("/etc/systemd/system/sysinit.target.wants/systemd-resolved.service", To("/usr/lib/systemd/system/systemd-resolved.service")),
        ("/etc/resolv.conf", To("/run/systemd/resolve/stub-resolv.conf")),
    ];
    systemd(&mut lines);
    tree(&lines)
}

/// Alpine: OpenRC, ifupdown-ng, no udev, no merged /usr.
pub fn alpine_ifupdown_ng() -> GuestFacts {
    tree(&[
        ("/etc/os-release", Text("ID=alpine\n")),
        ("/etc/alpine-release", Present),
        ("/etc/hostname", Text("localhost\n")),
        ("/bin/busybox", Present),
        ("/sbin/ifup", To("/sbin/ifupdown")),
        ("/sbin/udhcpc", To("/bin/busybox")),
        ("/usr/libexec/ifupdown-ng", Dir),
        ("/lib/ld-musl-x86_64.so.1", Present),
        ("/etc/init.d/networking", Present),
        ("/etc/runlevels/boot/networking", To("/etc/init.d/networking")),
        ("/etc/network/interfaces", Text("auto lo\niface lo inet loopback\nauto eth0\niface eth0 inet dhcp\n")),
        ("/etc/ssh/sshd_config", Text("#Port 22\n")),
        ("/usr/sbin/sshd", Present),
    ])
}

/// The same with busybox's own ifup, not enabled.
pub fn alpine_busybox() -> GuestFacts {
    let mut facts = alpine_ifupdown_ng();
    facts.nodes.remove("/usr/libexec/ifupdown-ng");
    facts.nodes.remove("/etc/runlevels/boot/networking");
    put(&mut facts, "/sbin/ifup", &To("/bin/busybox"));
    facts
}

/// A distribution that does not exist, in a version that nobody knows: networkd is there, nothing enables anything, no resolv.conf.
pub fn invented_future() -> GuestFacts {
    let mut lines = vec![("/usr/lib/os-release", Text("ID=tomorrow\nVERSION_ID=\"99.4\"\nID_LIKE=yesterday\n")), ("/etc", Dir)];
    systemd(&mut lines);
    tree(&lines)
}

/// All trees with their names.
pub fn all() -> Vec<(&'static str, GuestFacts)> {
    let mut all = vec![
        ("debian-ifupdown", debian_ifupdown()),
        ("ubuntu-netplan", ubuntu_netplan()),
        ("fedora-network-manager", fedora_network_manager()),
        ("arch-networkd", arch_networkd()),
        ("alpine-ifupdown-ng", alpine_ifupdown_ng()),
        ("alpine-busybox", alpine_busybox()),
        ("invented-future", invented_future()),
    ];
    all.extend(distributions::all());
    all
}

/// Debian's account files as debootstrap leaves them, shortened, with sudo installed.
pub fn debian_with_accounts() -> GuestFacts {
    let mut facts = debian_ifupdown();
    let texts = [
        ("/etc/group", "root:x:0:\nadm:x:4:\nsudo:x:27:\nshadow:x:42:\nusers:x:100:\nnogroup:x:65534:\nada:x:1000:\n"),
        ("/etc/gshadow", "root:*::\nadm:*::\nsudo:*::\nshadow:*::\nusers:*::\nnogroup:*::\nada:!::\n"),
        ("/etc/subuid", "ada:100000:65536\n"),
        ("/etc/subgid", "ada:100000:65536\n"),
        ("/etc/login.defs", "# comment\nUID_MIN\t\t\t 1000\nUID_MAX\t\t\t60000\nUMASK\t\t022\nHOME_MODE\t0700\nUSERGROUPS_ENAB yes\n"),
        ("/etc/default/useradd", "# Default values\nSHELL=/bin/sh\n# HOME=/srv\n"),
        ("/etc/shells", "# /etc/shells\n/bin/sh\n/bin/bash\n"),
        ("/etc/sudoers", "Defaults\tenv_reset\nroot\tALL=(ALL:ALL) ALL\n@includedir /etc/sudoers.d\n"),
        ("/etc/skel/.profile", "# ~/.profile\n"),
        ("/etc/skel/.config/app.conf", "a=1\n"),
        ("/etc/nsswitch.conf", "passwd:         files\ngroup:          files\n"),
    ];
    for (path, text) in texts {
        put(&mut facts, path, &Text(text));
    }
    own(&mut facts, "/etc/gshadow", 0o640, 0, 42);
    for path in ["/usr/bin/sudo", "/usr/bin/bash", "/bin/sh"] {
        put(&mut facts, path, &Present);
    }
    facts.nodes.remove("/bin/sh");
    facts
}
