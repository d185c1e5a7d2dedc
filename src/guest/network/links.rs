//! What an interface is besides a NIC: bonds, bridges and VLANs, and how they stand on each other.
//!
//! Words of options are the kernel's own (Documentation/networking/bonding.rst, ip-link(8)), which every back-end passes on.

use crate::{
    guest::config::{Interface, Network},
    names::InterfaceName,
};

/// Link monitoring of a bond when nothing is said, milliseconds. The kernel's default is none at all: a dead link would never be noticed.
pub const MIIMON_MS_DEFAULT: u32 = 100;

/// What an interface is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum LinkKind {
    /// A NIC.
    #[default]
    Ethernet,
    /// Several NICs as one.
    Bond(Bond),
    /// A switch.
    Bridge(Bridge),
    /// A tagged network on another interface.
    Vlan(Vlan),
}

impl LinkKind {
    /// The word used in documents and reports.
    pub fn name(&self) -> &'static str {
        match self {
            LinkKind::Ethernet => "ethernet",
            LinkKind::Bond(_) => "bond",
            LinkKind::Bridge(_) => "bridge",
            LinkKind::Vlan(_) => "vlan",
        }
    }

    /// The interfaces that this one is made of: a bond's or bridge's members, a VLAN's link.
    pub fn below(&self) -> &[InterfaceName] {
        match self {
            LinkKind::Ethernet => &[],
            LinkKind::Bond(bond) => &bond.members,
            LinkKind::Bridge(bridge) => &bridge.members,
            LinkKind::Vlan(vlan) => std::slice::from_ref(&vlan.link),
        }
    }
}

/// Words with a value each: parsing, printing, and the list for messages.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$inner:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$inner])* $variant,)* }

        impl $name {
            /// The kernel's word.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $word,)* }
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok($name::$variant),)*
                    _ => Err(format!("must be one of {}", [$($word),*].join(", "))),
                }
            }
        }
    };
}

words! {
    /// How a bond uses its members.
    BondMode {
        /// Packets in turn.
        BalanceRr = "balance-rr",
        /// One at a time.
        ActiveBackup = "active-backup",
        /// By a hash of the packet.
        BalanceXor = "balance-xor",
        /// Everything everywhere.
        Broadcast = "broadcast",
        /// LACP; the switch takes part.
        Lacp = "802.3ad",
        /// By load, outgoing.
        BalanceTlb = "balance-tlb",
        /// By load, both ways.
        BalanceAlb = "balance-alb",
    }
}

words! {
    /// How often a LACP partner is asked to send.
    LacpRate {
        /// Every 30 s.
        Slow = "slow",
        /// Every second.
        Fast = "fast",
    }
}

words! {
    /// What of a packet picks the member it leaves by.
    HashPolicy {
        /// MAC addresses.
        Layer2 = "layer2",
        /// MAC and IP addresses.
        Layer23 = "layer2+3",
        /// IP addresses and ports.
        Layer34 = "layer3+4",
        /// As layer2+3, inside tunnels.
        Encap23 = "encap2+3",
        /// As layer3+4, inside tunnels.
        Encap34 = "encap3+4",
    }
}

words! {
    /// What happens to packets that take a route.
    RouteKind {
        /// They go on.
        Unicast = "unicast",
        /// They vanish.
        Blackhole = "blackhole",
        /// They are answered: host unreachable.
        Unreachable = "unreachable",
        /// They are answered: administratively prohibited.
        Prohibit = "prohibit",
    }
}

/// Several NICs as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bond {
    /// NICs of the same network, at least one.
    pub members: Vec<InterfaceName>,
    /// How they are used.
    pub mode: BondMode,
    /// The member that is used while its link is up; active-backup, balance-tlb and balance-alb only.
    pub primary: Option<InterfaceName>,
    /// Link monitoring, milliseconds; `None` is [`MIIMON_MS_DEFAULT`], 0 is none.
    pub miimon_ms: Option<u32>,
    /// 802.3ad only.
    pub lacp_rate: Option<LacpRate>,
    /// balance-xor, 802.3ad and balance-tlb only.
    pub hash_policy: Option<HashPolicy>,
}

impl Bond {
    /// Options in the order the kernel wants them (mode first, while the bond has no members), with the kernel's names in sysfs.
    pub fn options(&self) -> Vec<(&'static str, String)> {
        let mut options = vec![("mode", self.mode.name().to_owned()), ("miimon", self.miimon_ms.unwrap_or(MIIMON_MS_DEFAULT).to_string())];
        options.extend(self.lacp_rate.map(|rate| ("lacp_rate", rate.name().to_owned())));
        options.extend(self.hash_policy.map(|policy| ("xmit_hash_policy", policy.name().to_owned())));
        options
    }
}

/// A switch. Times are whole seconds, as in IEEE 802.1D.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bridge {
    /// NICs, bonds and VLANs of the same network; none is a bridge for the guest's own guests.
    pub members: Vec<InterfaceName>,
    /// Spanning tree.
    pub stp: bool,
    /// Seconds a port listens and learns each before it forwards, 2..=30; of use with `stp` only.
    pub forward_delay: Option<u32>,
    /// Seconds between hellos, 1..=10.
    pub hello_time: Option<u32>,
    /// Seconds until another root is forgotten, 6..=40.
    pub max_age: Option<u32>,
    /// Seconds until a learnt address is forgotten.
    pub ageing_time: Option<u32>,
    /// Priority, 0..=65535; the least is the root.
    pub priority: Option<u32>,
}

impl Bridge {
    /// Options with the kernel's names in sysfs and values in the documents' unit (seconds, a number), `stp_state` first.
    pub fn options(&self) -> Vec<(&'static str, u32)> {
        let Bridge { members: _, stp, forward_delay, hello_time, max_age, ageing_time, priority } = self;
        let timed = [
            ("forward_delay", forward_delay),
            ("hello_time", hello_time),
            ("max_age", max_age),
            ("ageing_time", ageing_time),
            ("priority", priority),
        ];
        std::iter::once(("stp_state", u32::from(*stp))).chain(timed.into_iter().filter_map(|(name, value)| Some((name, (*value)?)))).collect()
    }

    /// As [`Bridge::options`], in the unit sysfs takes: times in hundredths of a second.
    pub fn sysfs_options(&self) -> Vec<(&'static str, u64)> {
        let scale = |name| if matches!(name, "stp_state" | "priority") { 1 } else { 100 };
        self.options().into_iter().map(|(name, value)| (name, u64::from(value) * scale(name))).collect()
    }
}

/// A tagged network (IEEE 802.1Q) on another interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vlan {
    /// The tag, 1..=4094.
    pub id: u16,
    /// The NIC, bond or bridge that carries it.
    pub link: InterfaceName,
}

/// What has an interface as its member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Master<'n> {
    /// The bond or bridge.
    pub name: &'n InterfaceName,
    /// Whether it is a bond.
    pub is_bond: bool,
}

impl Network {
    /// The bond or bridge that `name` is a member of.
    pub fn master(&self, name: &InterfaceName) -> Option<Master<'_>> {
        self.interfaces.iter().find_map(|interface| match &interface.kind {
            LinkKind::Bond(bond) if bond.members.contains(name) => Some(Master { name: &interface.name, is_bond: true }),
            LinkKind::Bridge(bridge) if bridge.members.contains(name) => Some(Master { name: &interface.name, is_bond: false }),
            _ => None,
        })
    }

    /// The VLANs that stand on `name`.
    pub fn vlans_on<'n>(&'n self, name: &InterfaceName) -> impl Iterator<Item = (&'n InterfaceName, &'n Vlan)> {
        self.interfaces.iter().filter_map(move |interface| match &interface.kind {
            LinkKind::Vlan(vlan) if vlan.link == *name => Some((&interface.name, vlan)),
            _ => None,
        })
    }

    /// The NICs.
    pub fn nics(&self) -> impl Iterator<Item = &Interface> {
        self.interfaces.iter().filter(|interface| interface.kind == LinkKind::Ethernet)
    }

    /// Positions of the interfaces with those that others stand on first; otherwise in the caller's order. A network with a cycle, which
    /// `validate` refuses, keeps the caller's order for its members.
    pub fn bottom_up(&self) -> Vec<usize> {
        let mut order: Vec<usize> = Vec::with_capacity(self.interfaces.len());
        let placed = |order: &[usize], name: &InterfaceName| {
            order.iter().any(|at| self.interfaces[*at].name == *name) || !self.interfaces.iter().any(|other| other.name == *name)
        };
        while order.len() < self.interfaces.len() {
            let rest: Vec<usize> = (0..self.interfaces.len()).filter(|at| !order.contains(at)).collect();
            let ready = rest.iter().find(|at| self.interfaces[**at].kind.below().iter().all(|name| placed(&order, name)));
            let Some(next) = ready.or(rest.first()) else { break };
            order.push(*next);
        }
        order
    }
}

impl Interface {
    /// Whether nothing gives it an address.
    pub fn is_bare(&self) -> bool {
        self.addresses.is_empty() && !self.dhcp4 && !self.dhcp6 && self.accept_ra != Some(true)
    }

    /// The VLAN, when it is one.
    pub fn vlan(&self) -> Option<&Vlan> {
        match &self.kind {
            LinkKind::Vlan(vlan) => Some(vlan),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_on_others_comes_after_them_and_the_rest_keeps_its_order() {
        let name = |text: &str| text.parse::<InterfaceName>().expect("name");
        let vlan = |id, link: &str| LinkKind::Vlan(Vlan { id, link: name(link) });
        let bridge = LinkKind::Bridge(Bridge { members: vec![name("v5"), name("eth1")], ..Bridge::default() });
        let kinds = [("br0", bridge), ("v5", vlan(5, "eth0")), ("eth1", LinkKind::Ethernet), ("eth0", LinkKind::Ethernet)];
        let interfaces = kinds.into_iter().map(|(text, kind)| Interface { kind, ..Interface::named(name(text)) }).collect();
        let network = Network { interfaces, ..Network::default() };
        let order: Vec<&str> = network.bottom_up().into_iter().map(|at| network.interfaces[at].name.as_str()).collect();
        assert_eq!(order, ["eth1", "eth0", "v5", "br0"]);
        assert_eq!(network.master(&name("v5")).map(|master| (master.name.as_str(), master.is_bond)), Some(("br0", false)));
    }

    #[test]
    fn words_are_the_kernels_and_others_are_refused_with_the_list() {
        assert_eq!("802.3ad".parse(), Ok(BondMode::Lacp));
        assert!("round-robin".parse::<BondMode>().is_err_and(|why| why.contains("balance-rr")));
    }
}
