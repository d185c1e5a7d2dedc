//! What an image carries over from the machine it was made on and no two instances may share. After virt-sysprep's list of operations, reduced
//! to identity: logs and shell histories are the image author's business. Only what the facts list is removed, each with its reason.

use crate::{
    error::Result,
    guest::{
        config::{HostKeys, InstanceConfig},
        facts::GuestFacts,
        plan::Plan,
    },
};

/// One rule: a directory, which names in it, and why they go.
pub(crate) struct Rule {
    /// The directory.
    pub(crate) directory: &'static str,
    /// Names in it, `*` and `?` as in a shell.
    pub(crate) name: &'static str,
    /// Why.
    pub(crate) why: &'static str,
}

const fn rule(directory: &'static str, name: &'static str, why: &'static str) -> Rule {
    Rule { directory, name, why }
}

const HOST_KEY: &str = "SSH host key of the image";
const SEED: &str = "random seed: instances must not start from the same entropy";
const LEASE: &str = "DHCP lease or identifier of another machine";
const CLOUD: &str = "cloud-init state of another instance";

/// All rules, in the order they are reported.
pub(crate) const RULES: [Rule; 38] = [
    rule("/etc/ssh", "ssh_host_*_key", HOST_KEY),
    rule("/etc/ssh", "ssh_host_*_key.pub", HOST_KEY),
    rule("/etc/ssh", "ssh_host_*_key-cert.pub", HOST_KEY),
    rule("/etc/ssh", "ssh_host_key", HOST_KEY),
    rule("/etc/ssh", "ssh_host_key.pub", HOST_KEY),
    rule("/etc/dropbear", "dropbear_*_host_key", HOST_KEY),
    rule("/var/lib/systemd", "random-seed", SEED),
    rule("/var/lib/urandom", "random-seed", SEED),
    rule("/var/lib/misc", "random-seed", SEED),
    rule("/var/lib", "random-seed", SEED),
    rule("/var/lib/seedrng", "seed.*", SEED),
    rule("/etc", "random-seed", SEED),
    rule("/boot/loader", "random-seed", SEED),
    rule("/boot/efi/loader", "random-seed", SEED),
    rule("/efi/loader", "random-seed", SEED),
    rule("/var/lib/systemd", "credential.secret", "secret that systemd derives credentials of one machine from"),
    rule("/var/lib/dhcp", "*.lease*", LEASE),
    rule("/var/lib/dhcp3", "*.lease*", LEASE),
    rule("/var/lib/dhclient", "*.lease*", LEASE),
    rule("/var/lib/dhcpcd", "*", LEASE),
    rule("/var/lib/dhcpcd5", "*", LEASE),
    rule("/var/lib/udhcpc", "*", LEASE),
    rule("/var/db/dhcpcd", "*", LEASE),
    rule("/etc", "dhcpcd.duid", LEASE),
    rule("/etc", "dhcpcd.secret", LEASE),
    rule("/var/lib/NetworkManager", "*.lease", LEASE),
    rule("/var/lib/NetworkManager", "secret_key", "secret that stable addresses and client identifiers are derived from"),
    rule("/var/lib/NetworkManager", "seen-bssids", "state of another machine's network"),
    rule("/var/lib/NetworkManager", "timestamps", "state of another machine's network"),
    rule("/var/lib/wicked", "*.xml", LEASE),
    rule("/etc/udev/rules.d", "70-persistent-net.rules", "names interfaces by another machine's hardware addresses"),
    rule("/etc/udev/rules.d", "75-persistent-net-generator.rules", "writes rules that name interfaces by hardware addresses"),
    rule("/var/lib/cloud", "instance", CLOUD),
    rule("/var/lib/cloud", "instances", CLOUD),
    rule("/var/lib/cloud", "data", CLOUD),
    rule("/var/lib/cloud", "sem", CLOUD),
    rule("/var/lib/libuuid", "clock.txt", "clock sequence of another machine's UUIDs"),
    rule("/var/lib/private/systemd", "credential.secret", "secret that systemd derives credentials of one machine from"),
];

/// Removes every leftover the facts list. With `ssh_host_keys: keep` the host keys stay.
pub fn remove_leftovers(plan: &mut Plan<'_>, facts: &GuestFacts, config: &InstanceConfig) -> Result<()> {
    for rule in &RULES {
        if rule.why == HOST_KEY && config.ssh_host_keys == HostKeys::Keep {
            continue;
        }
        let Some((directory, _)) = facts.resolve(rule.directory) else { continue };
        for (name, _) in facts.children(&directory) {
            if glob(rule.name, name) {
                plan.remove(&format!("{directory}/{name}"), rule.why)?;
            }
        }
    }
    let initiator = facts.text("/etc/iscsi/initiatorname.iscsi").is_some_and(|text| text.lines().any(|line| line.starts_with("InitiatorName=")));
    if initiator {
        plan.warnings.push("the image has a fixed iSCSI initiator name (/etc/iscsi/initiatorname.iscsi), which all its instances share".into());
    }
    Ok(())
}

/// Shell patterns with `*`, `?` and `[…]` (ranges, `!` negates), for whole names, as fnmatch(3) without flags.
pub(crate) fn glob(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        let step = match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
                continue;
            }
            Some('?') => Some(p + 1),
            Some('[') => class(&pattern, p, name[n]),
            Some(c) if *c == name[n] => Some(p + 1),
            _ => None,
        };
        match (step, star) {
            (Some(next), _) => (p, n) = (next, n + 1),
            (None, Some((star_p, star_n))) => {
                star = Some((star_p, star_n + 1));
                (p, n) = (star_p + 1, star_n + 1);
            }
            (None, None) => return false,
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// Matches the class that starts at `pattern[at]` (a `[`) and gives the position after it; a `[` without end stands for itself.
fn class(pattern: &[char], at: usize, c: char) -> Option<usize> {
    let negated = matches!(pattern.get(at + 1), Some('!' | '^'));
    let start = at + 1 + usize::from(negated);
    let Some(end) = (start + 1..pattern.len()).find(|i| pattern[*i] == ']') else { return (c == '[').then_some(at + 1) };
    let (mut i, mut found) = (start, false);
    while i < end {
        if i + 2 < end && pattern[i + 1] == '-' {
            found |= (pattern[i]..=pattern[i + 2]).contains(&c);
            i += 3;
        } else {
            found |= pattern[i] == c;
            i += 1;
        }
    }
    (found != negated).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_as_a_shell_does() {
        for (pattern, name) in [
            ("*", ""),
            ("*", "x"),
            ("ssh_host_*_key", "ssh_host_rsa_key"),
            ("a?c", "abc"),
            ("en*", "ens3"),
            ("*.lease*", "dhclient.eth0.leases"),
            ("eth[0-3]", "eth2"),
            ("eth[!0-3]", "eth4"),
            ("a*b*c", "aXbYbZc"),
            ("[", "["),
        ] {
            assert!(glob(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in
            [("", "x"), ("ssh_host_*_key", "ssh_host_rsa_key.pub"), ("a?c", "ac"), ("eth[0-3]", "eth4"), ("a*b", "ac"), ("[!a]", "a")]
        {
            assert!(!glob(pattern, name), "{pattern} {name}");
        }
        assert!(!glob(&"*a".repeat(2000), &"b".repeat(2000)), "no exponential time");
    }
}
