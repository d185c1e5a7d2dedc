//! The layouts of well-known distributions, as far as their network is concerned: what their images contain, start and configure.

use cloudletd::guest::facts::GuestFacts;

use super::{
    Is::{self, Dir, Present, Text, To},
    put, systemd, tree,
};

const NM_LINK: &str = "/etc/systemd/system/multi-user.target.wants/NetworkManager.service";
const NM_UNIT: &str = "/usr/lib/systemd/system/NetworkManager.service";
const NETWORKD_LINK: &str = "/etc/systemd/system/multi-user.target.wants/systemd-networkd.service";
const NETWORKD_UNIT: &str = "/usr/lib/systemd/system/systemd-networkd.service";

fn resolved(lines: &mut Vec<(&str, Is<'_>)>) {
    lines.extend([
        ("/usr/lib/systemd/systemd-resolved", Present),
        ("/usr/lib/systemd/system/systemd-resolved.service", Present),
        ("/etc/systemd/system/sysinit.target.wants/systemd-resolved.service", To("/usr/lib/systemd/system/systemd-resolved.service")),
        ("/etc/resolv.conf", To("../run/systemd/resolve/stub-resolv.conf")),
    ]);
}

fn cloud_init(lines: &mut Vec<(&str, Is<'_>)>) {
    lines.extend([
        ("/usr/bin/cloud-init", Present),
        ("/etc/cloud/cloud.cfg", Text("users: []\n")),
        ("/etc/cloud/cloud.cfg.d/05_logging.cfg", Text("output: {all: '| tee -a /var/log/cloud-init-output.log'}\n")),
    ]);
}

fn network_manager(lines: &mut Vec<(&str, Is<'_>)>) {
    lines.extend([
        (NM_UNIT, Present),
        ("/usr/lib/systemd/system/NetworkManager-wait-online.service", Present),
        (NM_LINK, To(NM_UNIT)),
        ("/etc/NetworkManager/NetworkManager.conf", Text("[main]\n\n[logging]\n")),
    ]);
}

/// Debian 11's generic cloud image: ifupdown, with what cloud-init wrote for the machine it was tried on.
pub fn debian_11() -> GuestFacts {
    let mut lines = vec![
        ("/usr/lib/os-release", Text("ID=debian\nVERSION_ID=\"11\"\n")),
        ("/usr/sbin/ifup", Present),
        ("/usr/sbin/dhclient", Present),
        ("/usr/sbin/resolvconf", Present),
        ("/etc/resolv.conf", To("/etc/resolvconf/run/resolv.conf")),
        ("/etc/network/interfaces", Text("source /etc/network/interfaces.d/*\nauto lo\niface lo inet loopback\n")),
        ("/etc/network/interfaces.d/50-cloud-init", Text("auto lo\niface lo inet loopback\n\nauto eth0\niface eth0 inet dhcp\n")),
        ("/usr/lib/systemd/system/networking.service", Present),
        ("/etc/systemd/system/multi-user.target.wants/networking.service", To("/lib/systemd/system/networking.service")),
        ("/etc/systemd/system/network-online.target.wants/networking.service", To("/lib/systemd/system/networking.service")),
        ("/var/lib/dhcp/dhclient.eth0.leases", Present),
    ];
    cloud_init(&mut lines);
    systemd(&mut lines);
    tree(&lines)
}

/// Debian 13's generic cloud image: netplan over networkd.
pub fn debian_13() -> GuestFacts {
    let mut lines = vec![
        ("/usr/lib/os-release", Text("ID=debian\nVERSION_ID=\"13\"\n")),
        ("/usr/sbin/netplan", To("../share/netplan/netplan.script")),
        (
            "/etc/netplan/90-default.yaml",
            Text(
                "network:\n  version: 2\n  ethernets:\n    all-en:\n      match: {name: en*}\n      dhcp4: true\n    all-eth:\n      match: {name: eth*}\n      dhcp4: true\n",
            ),
        ),
        (NETWORKD_LINK, To(NETWORKD_UNIT)),
    ];
    resolved(&mut lines);
    cloud_init(&mut lines);
    systemd(&mut lines);
    tree(&lines)
}

/// Debian in a version that nobody has seen: everything in /usr/bin, networkd alone, a directory that did not exist before.
pub fn debian_27() -> GuestFacts {
    let mut lines = vec![
        ("/usr/lib/os-release", Text("ID=debian\nVERSION_ID=\"27\"\nVERSION_CODENAME=stinky-pete\n")),
        (NETWORKD_LINK, To(NETWORKD_UNIT)),
        ("/usr/lib/systemd/network/89-ethernet.network", Text("[Match]\nKind=!*\nType=ether\n[Network]\nDHCP=yes\n")),
        ("/etc/systemd/network.d", Dir),
        ("/usr/bin/ip", Present),
    ];
    resolved(&mut lines);
    systemd(&mut lines);
    let mut facts = tree(&lines);
    put(&mut facts, "/usr/sbin", &To("bin"));
    facts
}

/// Devuan: Debian's ifupdown under System V init, with eudev.
pub fn devuan() -> GuestFacts {
    tree(&[
        ("/usr/lib/os-release", Text("ID=devuan\nID_LIKE=debian\n")),
        ("/sbin/ifup", Present),
        ("/sbin/dhclient", Present),
        ("/sbin/udevd", Present),
        ("/bin/udevadm", Present),
        ("/etc/init.d/networking", Present),
        ("/etc/rcS.d/S12networking", To("../init.d/networking")),
        ("/etc/network/interfaces", Text("auto lo\niface lo inet loopback\n\nauto eth0\niface eth0 inet dhcp\n")),
        ("/etc/udev/rules.d/70-persistent-net.rules", Text("SUBSYSTEM==\"net\", ATTR{address}==\"00:11:22:33:44:55\", NAME=\"eth0\"\n")),
    ])
}

/// Ubuntu 22.04's cloud image.
pub fn ubuntu_22() -> GuestFacts {
    let mut lines = vec![
        ("/usr/lib/os-release", Text("ID=ubuntu\nID_LIKE=debian\nVERSION_ID=\"22.04\"\n")),
        ("/usr/sbin/netplan", To("/usr/share/netplan/netplan.script")),
        ("/lib/netplan/00-network-manager-all.yaml", Text("network: {version: 2, renderer: networkd}\n")),
        ("/etc/netplan/00-installer-config.yaml", Text("network: {version: 2, ethernets: {ens18: {dhcp4: true}}}\n")),
        ("/etc/netplan/50-cloud-init.yaml", Text("network: {version: 2, ethernets: {ens3: {dhcp4: true}}}\n")),
        ("/etc/cloud/cloud.cfg.d/90-installer-network.cfg", Text("network: {version: 2, ethernets: {ens18: {dhcp4: true}}}\n")),
        (NETWORKD_LINK, To(NETWORKD_UNIT)),
    ];
    resolved(&mut lines);
    cloud_init(&mut lines);
    systemd(&mut lines);
    let mut facts = tree(&lines);
    // Merged: what the list says of /lib is in /usr/lib.
    put(&mut facts, "/lib", &To("usr/lib"));
    facts
}

/// Ubuntu 24.04's cloud image.
pub fn ubuntu_24() -> GuestFacts {
    let mut lines = vec![
        ("/usr/lib/os-release", Text("ID=ubuntu\nID_LIKE=debian\nVERSION_ID=\"24.04\"\n")),
        ("/usr/sbin/netplan", To("../share/netplan/netplan.script")),
        ("/usr/libexec/netplan", Dir),
        (NETWORKD_LINK, To(NETWORKD_UNIT)),
        ("/var/lib/cloud/instance", To("/var/lib/cloud/instances/i-1")),
    ];
    resolved(&mut lines);
    cloud_init(&mut lines);
    systemd(&mut lines);
    tree(&lines)
}

/// Fedora 42: /usr/sbin is /usr/bin.
pub fn fedora_42() -> GuestFacts {
    let mut lines = vec![
        ("/usr/lib/os-release", Text("ID=fedora\nVERSION_ID=42\n")),
        ("/etc/redhat-release", Present),
        ("/usr/bin/NetworkManager", Present),
        ("/etc/selinux/config", Text("SELINUX=enforcing\n")),
    ];
    network_manager(&mut lines);
    resolved(&mut lines);
    systemd(&mut lines);
    let mut facts = tree(&lines);
    put(&mut facts, "/usr/sbin", &To("bin"));
    facts
}

/// AlmaLinux 8: NetworkManager reading ifcfg files.
pub fn alma_8() -> GuestFacts {
    let mut lines = vec![
        ("/usr/lib/os-release", Text("ID=\"almalinux\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"8.10\"\n")),
        ("/etc/redhat-release", Present),
        ("/usr/sbin/NetworkManager", Present),
        ("/etc/sysconfig/network", Text("NETWORKING=yes\nNOZEROCONF=yes\n")),
        ("/etc/sysconfig/network-scripts/ifcfg-eth0", Text("DEVICE=\"eth0\"\nBOOTPROTO=\"dhcp\"\nONBOOT=\"yes\"\nTYPE=\"Ethernet\"\n")),
        ("/etc/selinux/config", Text("SELINUX=enforcing\n")),
    ];
    network_manager(&mut lines);
    cloud_init(&mut lines);
    systemd(&mut lines);
    tree(&lines)
}

/// Rocky Linux 9: keyfiles, a left-over ifcfg file that its NetworkManager still reads.
pub fn rocky_9() -> GuestFacts {
    let mut lines = vec![
        ("/usr/lib/os-release", Text("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"9.5\"\n")),
        ("/etc/redhat-release", Present),
        ("/usr/sbin/NetworkManager", Present),
        ("/etc/sysconfig/network-scripts/readme-ifcfg-rh.txt", Text("NetworkManager stores new network profiles in keyfile format\n")),
        ("/etc/sysconfig/network-scripts/ifcfg-ens3", Text("DEVICE=ens3\nBOOTPROTO=dhcp\nONBOOT=yes\n")),
        (
            "/etc/NetworkManager/system-connections/cloud-init-eth0.nmconnection",
            Text("[connection]\nid=cloud-init eth0\ntype=ethernet\ninterface-name=eth0\n[ipv4]\nmethod=auto\n"),
        ),
        ("/etc/selinux/config", Text("SELINUX=enforcing\n")),
    ];
    network_manager(&mut lines);
    cloud_init(&mut lines);
    systemd(&mut lines);
    tree(&lines)
}

/// AlmaLinux 10: keyfiles only.
pub fn alma_10() -> GuestFacts {
    let mut lines = vec![
        ("/usr/lib/os-release", Text("ID=\"almalinux\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"10.0\"\n")),
        ("/etc/redhat-release", Present),
        ("/usr/sbin/NetworkManager", Present),
        ("/etc/selinux/config", Text("SELINUX=enforcing\n")),
    ];
    network_manager(&mut lines);
    cloud_init(&mut lines);
    systemd(&mut lines);
    tree(&lines)
}

/// CentOS 7 without NetworkManager, as its cloud images for providers often are: the network service of initscripts.
pub fn centos_7() -> GuestFacts {
    let mut lines = vec![
        ("/usr/lib/os-release", Text("ID=\"centos\"\nID_LIKE=\"rhel fedora\"\nVERSION_ID=\"7\"\n")),
        ("/etc/redhat-release", Present),
        ("/etc/init.d", To("rc.d/init.d")),
        ("/etc/rc3.d", To("rc.d/rc3.d")),
        ("/etc/rc.d/init.d/network", Present),
        ("/etc/rc.d/rc3.d/S10network", To("../init.d/network")),
        ("/etc/sysconfig/network", Text("NETWORKING=yes\nHOSTNAME=localhost.localdomain\n")),
        ("/etc/sysconfig/network-scripts/ifup-eth", Present),
        ("/etc/sysconfig/network-scripts/ifcfg-lo", Text("DEVICE=lo\nIPADDR=127.0.0.1\nONBOOT=yes\n")),
        ("/etc/sysconfig/network-scripts/ifcfg-eth0", Text("DEVICE=eth0\nBOOTPROTO=dhcp\nONBOOT=yes\nTYPE=Ethernet\n")),
        ("/etc/sysconfig/network-scripts/route-eth0", Text("10.0.0.0/8 via 10.1.1.1\n")),
        ("/usr/sbin/dhclient", Present),
        ("/var/lib/dhclient/dhclient--eth0.lease", Present),
        ("/etc/resolv.conf", Text("nameserver 10.1.1.1\n")),
        ("/etc/selinux/config", Text("SELINUX=enforcing\n")),
    ];
    cloud_init(&mut lines);
    systemd(&mut lines);
    let mut facts = tree(&lines);
    facts.nodes.remove("/usr/lib/systemd/systemd-networkd");
    facts
}

const NETCONFIG: &str =
    "## Path:\tNetwork/General\nNETCONFIG_DNS_POLICY=\"auto\"\nNETCONFIG_DNS_STATIC_SEARCHLIST=\"\"\nNETCONFIG_DNS_STATIC_SERVERS=\"\"\n";

/// openSUSE Leap 15: wicked and netconfig.
pub fn leap_wicked() -> GuestFacts {
    let mut lines = vec![
        ("/usr/lib/os-release", Text("ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\nVERSION_ID=\"15.6\"\n")),
        ("/usr/sbin/wicked", Present),
        ("/usr/sbin/wickedd", Present),
        ("/usr/sbin/netconfig", Present),
        ("/usr/lib/systemd/system/wicked.service", Present),
        ("/etc/systemd/system/network.service", To("/usr/lib/systemd/system/wicked.service")),
        ("/etc/systemd/system/multi-user.target.wants/wicked.service", To("/usr/lib/systemd/system/wicked.service")),
        ("/etc/resolv.conf", To("/run/netconfig/resolv.conf")),
        ("/etc/sysconfig/network/config", Text(NETCONFIG)),
        ("/etc/sysconfig/network/ifcfg-lo", Text("IPADDR=127.0.0.1/8\n")),
        ("/etc/sysconfig/network/ifcfg-eth0", Text("BOOTPROTO='dhcp'\nSTARTMODE='auto'\n")),
        ("/etc/sysconfig/network/ifroute-eth0", Text("default 10.0.0.1 - -\n")),
        ("/var/lib/wicked/lease-eth0-dhcp-ipv4.xml", Present),
        ("/etc/udev/rules.d/85-persistent-net-cloud-init.rules", Present),
    ];
    cloud_init(&mut lines);
    systemd(&mut lines);
    tree(&lines)
}

/// openSUSE Tumbleweed: NetworkManager, netconfig keeps resolv.conf.
pub fn tumbleweed() -> GuestFacts {
    let mut lines = vec![
        ("/usr/lib/os-release", Text("ID=\"opensuse-tumbleweed\"\nID_LIKE=\"opensuse suse\"\nVERSION_ID=\"20261101\"\n")),
        ("/usr/sbin/NetworkManager", Present),
        ("/usr/sbin/netconfig", Present),
        ("/etc/resolv.conf", To("/run/netconfig/resolv.conf")),
        ("/etc/sysconfig/network/config", Text(NETCONFIG)),
    ];
    network_manager(&mut lines);
    systemd(&mut lines);
    tree(&lines)
}

/// Gentoo under OpenRC, with netifrc and dhcpcd.
pub fn gentoo() -> GuestFacts {
    tree(&[
        ("/etc/os-release", Text("NAME=Gentoo\nID=gentoo\n")),
        ("/lib/netifrc", Dir),
        ("/sbin/dhcpcd", Present),
        ("/sbin/udevd", Present),
        ("/etc/conf.d/hostname", Text("hostname=\"localhost\"\n")),
        ("/etc/conf.d/net", Text("config_enp1s0=\"dhcp\"\n")),
        ("/etc/init.d/net.lo", Present),
        ("/etc/init.d/net.eth0", To("net.lo")),
        ("/etc/init.d/dhcpcd", Present),
        ("/etc/runlevels/boot/net.lo", To("/etc/init.d/net.lo")),
        ("/etc/runlevels/default/net.eth0", To("/etc/init.d/net.eth0")),
        ("/etc/runlevels/default/dhcpcd", To("/etc/init.d/dhcpcd")),
        ("/etc/resolv.conf", Text("nameserver 10.0.2.3\n")),
    ])
}

/// An image of one program, without any network tooling: the kernel has to do it.
pub fn unikernel_like() -> GuestFacts {
    tree(&[("/usr/lib/os-release", Text("ID=appliance\n")), ("/sbin/init", Present), ("/etc/hostname", Text("app\n"))])
}

/// All of them with their names.
pub fn all() -> Vec<(&'static str, GuestFacts)> {
    vec![
        ("debian-11-ifupdown", debian_11()),
        ("debian-13-netplan", debian_13()),
        ("debian-27-networkd", debian_27()),
        ("devuan-ifupdown", devuan()),
        ("ubuntu-22-netplan", ubuntu_22()),
        ("ubuntu-24-netplan", ubuntu_24()),
        ("fedora-42-network-manager", fedora_42()),
        ("alma-8-network-manager", alma_8()),
        ("rocky-9-network-manager", rocky_9()),
        ("alma-10-network-manager", alma_10()),
        ("centos-7-ifcfg", centos_7()),
        ("leap-wicked", leap_wicked()),
        ("tumbleweed-network-manager", tumbleweed()),
        ("gentoo-netifrc", gentoo()),
        ("appliance-kernel-ip", unikernel_like()),
    ]
}
