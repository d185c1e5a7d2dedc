//! What an image carries over from the machine it was made on. After virt-sysprep's list of operations: those that concern identity, which no two
//! instances may share, are done unless the caller skips them; logs, histories and the like are the image author's business and go only when the
//! caller asks. Only what the facts list is removed, each path with its reason.

use crate::{
    error::Result,
    guest::{
        config::{HostKeys, InstanceConfig},
        facts::{GuestFacts, NodeKind},
        plan::Plan,
    },
};

/// What is removed together, named and selected by the caller. After virt-sysprep's operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// SSH host keys (governed by `ssh_host_keys` as well).
    SshHostKeys,
    /// Seeds of the kernel's random generator; a new one is written where the image's init reads one.
    RandomSeed,
    /// Secrets that credentials or stable addresses are derived from.
    Credentials,
    /// DHCP leases and identifiers.
    Dhcp,
    /// What network managers remember.
    NetworkState,
    /// udev's rules that name interfaces by hardware addresses.
    UdevNet,
    /// cloud-init's state.
    CloudInit,
    /// The clock sequence of UUIDs.
    UuidClock,
    /// Log files and the journal.
    Logs,
    /// Histories of shells and editors.
    ShellHistory,
    /// What is in /tmp and /var/tmp.
    Tmp,
    /// Mail spools.
    Mail,
    /// Users' crontabs and at jobs.
    Cron,
    /// Crash dumps.
    Crash,
    /// Caches of package managers.
    PackageCache,
    /// Root's own SSH keys and known hosts (authorized_keys stays).
    SshUserKeys,
    /// Joined domains and their databases: sssd, Samba, Kerberos, puppet, subscription identities.
    DirectoryServices,
    /// Account files as they were before their last change.
    BackupFiles,
}

const OPERATIONS: [(Operation, &str); 18] = [
    (Operation::SshHostKeys, "ssh-host-keys"),
    (Operation::RandomSeed, "random-seed"),
    (Operation::Credentials, "credentials"),
    (Operation::Dhcp, "dhcp"),
    (Operation::NetworkState, "network-state"),
    (Operation::UdevNet, "udev-net"),
    (Operation::CloudInit, "cloud-init"),
    (Operation::UuidClock, "uuid-clock"),
    (Operation::Logs, "logs"),
    (Operation::ShellHistory, "shell-history"),
    (Operation::Tmp, "tmp"),
    (Operation::Mail, "mail"),
    (Operation::Cron, "cron"),
    (Operation::Crash, "crash"),
    (Operation::PackageCache, "package-cache"),
    (Operation::SshUserKeys, "ssh-user-keys"),
    (Operation::DirectoryServices, "directory-services"),
    (Operation::BackupFiles, "backup-files"),
];

impl Operation {
    /// Its name.
    pub fn word(self) -> &'static str {
        OPERATIONS.iter().find(|(operation, _)| *operation == self).map_or("", |(_, word)| word)
    }

    /// Whether it is done unless the caller says otherwise: what no two instances may share.
    pub fn is_default(self) -> bool {
        (self as usize) <= Operation::UuidClock as usize
    }

    /// Whether it is done for this configuration.
    pub fn is_wanted(self, config: &InstanceConfig) -> bool {
        if self == Operation::SshHostKeys && config.ssh_host_keys == HostKeys::Keep {
            return false;
        }
        if self.is_default() { !config.setup.scrub_skip.contains(&self) } else { config.setup.scrub_also.contains(&self) }
    }
}

impl std::str::FromStr for Operation {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = OPERATIONS.iter().find(|(_, word)| *word == text).map(|(operation, _)| *operation);
        found.ok_or_else(|| {
            let words: Vec<&str> = OPERATIONS.iter().map(|(_, word)| *word).collect();
            format!("{:?} is not one of {}", text.chars().take(32).collect::<String>(), words.join(", "))
        })
    }
}

/// One rule: a directory, which names in it, and why they go.
pub(crate) struct Rule {
    /// What it is part of.
    pub(crate) operation: Operation,
    /// The directory; its last component may be `*`.
    pub(crate) directory: &'static str,
    /// Names in it, `*` and `?` as in a shell.
    pub(crate) name: &'static str,
    /// Why.
    pub(crate) why: &'static str,
}

const fn rule(operation: Operation, directory: &'static str, name: &'static str, why: &'static str) -> Rule {
    Rule { operation, directory, name, why }
}

const HOST_KEY: &str = "SSH host key of the image";
const SEED: &str = "random seed: instances must not start from the same entropy";
const LEASE: &str = "DHCP lease or identifier of another machine";
const CLOUD: &str = "cloud-init state of another instance";
const LOG: &str = "log of another machine";
const HISTORY: &str = "history of another machine's users";
const TMP: &str = "temporary file of another machine";
const MAIL: &str = "mail of another machine";
const CRON: &str = "scheduled jobs of another machine's users";
const CRASH: &str = "crash dump of another machine";
const CACHE: &str = "cache of the package manager";
const USER_KEY: &str = "SSH key or known hosts of another machine's root";
const JOINED: &str = "membership of another machine in a domain or service";
const BACKUP: &str = "accounts as they were before a change";

/// All rules, in the order they are reported.
pub(crate) const RULES: [Rule; 104] = [
    rule(Operation::SshHostKeys, "/etc/ssh", "ssh_host_*_key", HOST_KEY),
    rule(Operation::SshHostKeys, "/etc/ssh", "ssh_host_*_key.pub", HOST_KEY),
    rule(Operation::SshHostKeys, "/etc/ssh", "ssh_host_*_key-cert.pub", HOST_KEY),
    rule(Operation::SshHostKeys, "/etc/ssh", "ssh_host_key", HOST_KEY),
    rule(Operation::SshHostKeys, "/etc/ssh", "ssh_host_key.pub", HOST_KEY),
    rule(Operation::SshHostKeys, "/etc/dropbear", "dropbear_*_host_key", HOST_KEY),
    rule(Operation::RandomSeed, "/var/lib/systemd", "random-seed", SEED),
    rule(Operation::RandomSeed, "/var/lib/urandom", "random-seed", SEED),
    rule(Operation::RandomSeed, "/var/lib/misc", "random-seed", SEED),
    rule(Operation::RandomSeed, "/var/lib", "random-seed", SEED),
    rule(Operation::RandomSeed, "/var/lib/seedrng", "seed.*", SEED),
    rule(Operation::RandomSeed, "/etc", "random-seed", SEED),
    rule(Operation::RandomSeed, "/boot/loader", "random-seed", SEED),
    rule(Operation::RandomSeed, "/boot/efi/loader", "random-seed", SEED),
    rule(Operation::RandomSeed, "/efi/loader", "random-seed", SEED),
    rule(Operation::Credentials, "/var/lib/systemd", "credential.secret", "secret that systemd derives credentials of one machine from"),
    rule(Operation::Dhcp, "/var/lib/dhcp", "*.lease*", LEASE),
    rule(Operation::Dhcp, "/var/lib/dhcp3", "*.lease*", LEASE),
    rule(Operation::Dhcp, "/var/lib/dhclient", "*.lease*", LEASE),
    rule(Operation::Dhcp, "/var/lib/dhcpcd", "*", LEASE),
    rule(Operation::Dhcp, "/var/lib/dhcpcd5", "*", LEASE),
    rule(Operation::Dhcp, "/var/lib/udhcpc", "*", LEASE),
    rule(Operation::Dhcp, "/var/db/dhcpcd", "*", LEASE),
    rule(Operation::Dhcp, "/etc", "dhcpcd.duid", LEASE),
    rule(Operation::Dhcp, "/etc", "dhcpcd.secret", LEASE),
    rule(Operation::Dhcp, "/var/lib/NetworkManager", "*.lease", LEASE),
    rule(Operation::Credentials, "/var/lib/NetworkManager", "secret_key", "secret that stable addresses and client identifiers are derived from"),
    rule(Operation::NetworkState, "/var/lib/NetworkManager", "seen-bssids", "state of another machine's network"),
    rule(Operation::NetworkState, "/var/lib/NetworkManager", "timestamps", "state of another machine's network"),
    rule(Operation::Dhcp, "/var/lib/wicked", "*.xml", LEASE),
    rule(Operation::UdevNet, "/etc/udev/rules.d", "70-persistent-net.rules", "names interfaces by another machine's hardware addresses"),
    rule(Operation::UdevNet, "/etc/udev/rules.d", "75-persistent-net-generator.rules", "writes rules that name interfaces by hardware addresses"),
    rule(Operation::CloudInit, "/var/lib/cloud", "instance", CLOUD),
    rule(Operation::CloudInit, "/var/lib/cloud", "instances", CLOUD),
    rule(Operation::CloudInit, "/var/lib/cloud", "data", CLOUD),
    rule(Operation::CloudInit, "/var/lib/cloud", "sem", CLOUD),
    rule(Operation::UuidClock, "/var/lib/libuuid", "clock.txt", "clock sequence of another machine's UUIDs"),
    rule(Operation::Credentials, "/var/lib/private/systemd", "credential.secret", "secret that systemd derives credentials of one machine from"),
    rule(Operation::Logs, "/var/log", "*.log*", LOG),
    rule(Operation::Logs, "/var/log", "*.[0-9]*", LOG),
    rule(Operation::Logs, "/var/log", "messages*", LOG),
    rule(Operation::Logs, "/var/log", "syslog*", LOG),
    rule(Operation::Logs, "/var/log", "secure*", LOG),
    rule(Operation::Logs, "/var/log", "maillog*", LOG),
    rule(Operation::Logs, "/var/log", "cron*", LOG),
    rule(Operation::Logs, "/var/log", "debug*", LOG),
    rule(Operation::Logs, "/var/log", "dmesg*", LOG),
    rule(Operation::Logs, "/var/log", "wtmp*", LOG),
    rule(Operation::Logs, "/var/log", "btmp*", LOG),
    rule(Operation::Logs, "/var/log", "lastlog", LOG),
    rule(Operation::Logs, "/var/log", "faillog", LOG),
    rule(Operation::Logs, "/var/log", "tallylog", LOG),
    rule(Operation::Logs, "/var/log/journal", "*", LOG),
    rule(Operation::Logs, "/var/log/audit", "*", LOG),
    rule(Operation::Logs, "/var/log/apt", "*", LOG),
    rule(Operation::Logs, "/var/log/anaconda", "*", LOG),
    rule(Operation::Logs, "/var/log/installer", "*", LOG),
    rule(Operation::Logs, "/var/log/sa", "*", LOG),
    rule(Operation::Logs, "/root", "anaconda-ks.cfg", LOG),
    rule(Operation::Logs, "/root", "original-ks.cfg", LOG),
    rule(Operation::ShellHistory, "/root", ".*_history", HISTORY),
    rule(Operation::ShellHistory, "/root", ".lesshst", HISTORY),
    rule(Operation::ShellHistory, "/root", ".viminfo", HISTORY),
    rule(Operation::ShellHistory, "/home/*", ".*_history", HISTORY),
    rule(Operation::ShellHistory, "/home/*", ".lesshst", HISTORY),
    rule(Operation::ShellHistory, "/home/*", ".viminfo", HISTORY),
    rule(Operation::Tmp, "/tmp", "*", TMP),
    rule(Operation::Tmp, "/var/tmp", "*", TMP),
    rule(Operation::Mail, "/var/mail", "*", MAIL),
    rule(Operation::Mail, "/var/spool/mail", "*", MAIL),
    rule(Operation::Mail, "/var/spool/postfix/*", "*", MAIL),
    rule(Operation::Cron, "/var/spool/cron", "*", CRON),
    rule(Operation::Cron, "/var/spool/cron/crontabs", "*", CRON),
    rule(Operation::Cron, "/var/spool/cron/atjobs", "*", CRON),
    rule(Operation::Cron, "/var/spool/at", "*", CRON),
    rule(Operation::Crash, "/var/crash", "*", CRASH),
    rule(Operation::Crash, "/var/log/dump", "*", CRASH),
    rule(Operation::Crash, "/var/spool/abrt", "*", CRASH),
    rule(Operation::Crash, "/var/lib/systemd/coredump", "*", CRASH),
    rule(Operation::PackageCache, "/var/cache/apt/archives", "*.deb", CACHE),
    rule(Operation::PackageCache, "/var/cache/apt", "*.bin", CACHE),
    rule(Operation::PackageCache, "/var/cache/dnf", "*", CACHE),
    rule(Operation::PackageCache, "/var/cache/yum", "*", CACHE),
    rule(Operation::PackageCache, "/var/cache/libdnf5", "*", CACHE),
    rule(Operation::PackageCache, "/var/cache/apk", "*", CACHE),
    rule(Operation::PackageCache, "/var/cache/pacman/pkg", "*", CACHE),
    rule(Operation::PackageCache, "/var/cache/zypp", "*", CACHE),
    rule(Operation::SshUserKeys, "/root/.ssh", "id_*", USER_KEY),
    rule(Operation::SshUserKeys, "/root/.ssh", "known_hosts*", USER_KEY),
    rule(Operation::DirectoryServices, "/var/lib/sss/db", "*", JOINED),
    rule(Operation::DirectoryServices, "/var/lib/samba/private", "*", JOINED),
    rule(Operation::DirectoryServices, "/var/kerberos/krb5kdc", "*", JOINED),
    rule(Operation::DirectoryServices, "/etc", "krb5.keytab", JOINED),
    rule(Operation::DirectoryServices, "/var/lib/puppet/ssl", "*", JOINED),
    rule(Operation::DirectoryServices, "/etc/puppetlabs/puppet/ssl", "*", JOINED),
    rule(Operation::DirectoryServices, "/etc/sysconfig/rhn", "systemid", JOINED),
    rule(Operation::DirectoryServices, "/etc/pki/consumer", "*", JOINED),
    rule(Operation::DirectoryServices, "/var/lib/yum", "uuid", JOINED),
    rule(Operation::BackupFiles, "/etc", "passwd-", BACKUP),
    rule(Operation::BackupFiles, "/etc", "shadow-", BACKUP),
    rule(Operation::BackupFiles, "/etc", "group-", BACKUP),
    rule(Operation::BackupFiles, "/etc", "gshadow-", BACKUP),
    rule(Operation::BackupFiles, "/etc", "subuid-", BACKUP),
    rule(Operation::BackupFiles, "/etc", "subgid-", BACKUP),
];

/// Removes every leftover the facts list, of the operations that are wanted.
pub fn remove_leftovers(plan: &mut Plan<'_>, facts: &GuestFacts, config: &InstanceConfig) -> Result<()> {
    for rule in RULES.iter().filter(|rule| rule.operation.is_wanted(config)) {
        for directory in directories(facts, rule.directory) {
            for (name, node) in facts.children(&directory) {
                // The directories in a spool belong to packages; only what users left there goes.
                let spool = rule.operation == Operation::Cron && node.kind == NodeKind::Directory;
                if glob(rule.name, name) && !spool {
                    plan.remove(&format!("{directory}/{name}"), rule.why)?;
                }
            }
        }
    }
    let initiator = facts.text("/etc/iscsi/initiatorname.iscsi").is_some_and(|text| text.lines().any(|line| line.starts_with("InitiatorName=")));
    if initiator {
        plan.warnings.push("the image has a fixed iSCSI initiator name (/etc/iscsi/initiatorname.iscsi), which all its instances share".into());
    }
    Ok(())
}

/// A rule's directory where the image has it, or each of them when the last component is `*`. Links inside are not followed: what they lead to is
/// not this rule's.
fn directories(facts: &GuestFacts, directory: &str) -> Vec<String> {
    let Some(parent) = directory.strip_suffix("/*") else { return facts.resolve(directory).map(|(path, _)| path).into_iter().collect() };
    let Some((parent, _)) = facts.resolve(parent) else { return Vec::new() };
    facts.children(&parent).filter(|(_, node)| node.kind == NodeKind::Directory).map(|(name, _)| format!("{parent}/{name}")).collect()
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
    fn every_operation_has_a_word_a_rule_and_its_place_in_the_order() {
        for (index, (operation, word)) in OPERATIONS.iter().enumerate() {
            assert_eq!((*operation as usize, operation.word(), word.parse()), (index, *word, Ok(*operation)));
            assert!(RULES.iter().any(|rule| rule.operation == *operation), "{word} has no rule");
        }
        assert!("bash".parse::<Operation>().is_err());
    }

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
