//! Which paths of a root filesystem become facts.
//!
//! A trie of patterns, one path component per level; `*` and the like match within a component. A path is listed when it matches a pattern or is
//! a parent of one (links among the parents are what [`crate::guest::facts::GuestFacts::resolve`] follows). Patterns are written as on a system
//! whose /bin, /sbin and /lib are merged into /usr; they hold for the others too. About a hundred thousand paths go through `lists` per image:
//! most are decided by their first or second component.

use std::collections::BTreeMap;

use crate::{
    guest::{
        facts::FactsPolicy,
        scrub::{RULES, glob},
    },
    names::GuestPath,
};

/// Listed, without content.
const LISTED: &[&str] = &[
    // Who the image is, and which programs it has.
    "/etc/debian_version",
    "/etc/redhat-release",
    "/etc/alpine-release",
    "/usr/lib/systemd/systemd",
    "/usr/lib/systemd/systemd-networkd",
    "/usr/lib/systemd/systemd-resolved",
    "/usr/lib/systemd/systemd-udevd",
    "/usr/lib/systemd/resolv.conf",
    "/usr/lib/ld-musl-*",
    "/usr/sbin/init",
    "/usr/bin/busybox",
    "/usr/bin/udevadm",
    "/usr/bin/cloud-init",
    "/usr/sbin/{udevd,sshd,dropbear,netplan,NetworkManager,ifup,dhclient,dhcpcd,udhcpc,resolvconf,wicked,wickedd,netconfig}",
    "/usr/bin/{bash,sudo,doas}",
    "/etc/sudoers.d",
    "/etc/localtime",
    "/etc/inittab",
    "/usr/share/zoneinfo/*",
    "/usr/lib/locale/*",
    "/usr/bin/{NetworkManager,ifup,dhcpcd,udhcpc}",
    "/usr/libexec/netplan",
    "/usr/lib/netplan",
    "/usr/libexec/ifupdown-ng",
    "/usr/lib/netifrc",
    "/etc/sysconfig/network-scripts/ifup-eth",
    "/etc/cloud/cloud-init.disabled",
    "/var/lib/cloud/seed/*",
    "/etc/udev/rules.d/*persistent-net*",
    // What starts at boot.
    "/usr/lib/systemd/system/{systemd-networkd,systemd-resolved,NetworkManager,networking,network,dhcpcd,wicked,ssh,sshd}*",
    "/usr/lib/systemd/system/systemd-network-generator.service",
    "/usr/lib/systemd/system/*.{wants,requires}/*",
    "/etc/systemd/system/*",
    "/etc/systemd/system/*.{wants,requires}/*",
    "/etc/init.d/*",
    "/etc/runlevels/*/*",
    "/etc/rc?.d/*",
    "/etc/rc.d/{init.d,rc?.d}/*",
    // The places of accounts.
    "/root/.ssh/authorized_keys",
    "/home/*/.ssh/authorized_keys",
    "/var/lib/dbus/machine-id",
    "/.autorelabel",
    "/.cloudlet/*",
    // Kernels and boot loaders.
    "/boot/*",
    "/boot/{grub,grub2,efi,loader,extlinux,syslinux}/*",
    "/boot/loader/entries/*",
    "/{vmlinuz,initrd.img}",
    "/etc/default/grub.d/*",
    "/usr/lib/modules/*",
    "/usr/lib/modules/*/{vmlinuz,initrd,initramfs.img}",
    "/usr/lib/systemd/network/*",
    "/etc/network/{if-up.d,if-pre-up.d,interfaces.d}/*",
];

/// Listed with their content.
const KEPT: &[&str] = &[
    "/etc/{os-release,passwd,shadow,group,hosts,hostname,HOSTNAME,fstab,resolv.conf,machine-id,nsswitch.conf}",
    "/etc/{gshadow,subuid,subgid,login.defs,shells,sudoers}",
    "/etc/default/useradd",
    "/etc/{timezone,adjtime,locale.conf,vconsole.conf,mailname}",
    "/etc/default/{locale,keyboard}",
    "/etc/conf.d/{keymaps,hwclock}",
    "/etc/sysconfig/clock",
    "/usr/lib/systemd/system/*.{service,socket,timer,path}",
    "/etc/systemd/system/*.{service,socket,timer,path}",
    "/etc/init.d/*",
    "/etc/skel/*",
    "/etc/skel/*/*",
    "/usr/lib/os-release",
    "/etc/conf.d/{hostname,net}",
    "/etc/sysconfig/network",
    "/etc/sysconfig/network-scripts/{ifcfg,route,route6,rule,rule6}-*",
    "/etc/sysconfig/network/{config,ifcfg-*,ifroute-*,ifrule-*,ifsysctl-*}",
    "/etc/selinux/config",
    "/etc/selinux/*/contexts/files/file_contexts",
    "/etc/selinux/*/contexts/files/file_contexts.{homedirs,local,subs,subs_dist}",
    "/etc/ssh/sshd_config",
    "/etc/ssh/sshd_config.d/*.conf",
    "/etc/network/interfaces",
    "/etc/network/interfaces.d/*",
    "/etc/netplan/*",
    "/etc/systemd/network/*",
    "/etc/systemd/resolved.conf",
    "/etc/systemd/resolved.conf.d/*",
    "/etc/systemd/system-preset/*",
    "/usr/lib/systemd/system-preset/*",
    "/etc/NetworkManager/NetworkManager.conf",
    "/etc/NetworkManager/conf.d/*",
    "/usr/lib/NetworkManager/conf.d/*",
    "/etc/NetworkManager/system-connections/*",
    "/etc/cloud/cloud.cfg",
    "/etc/cloud/cloud.cfg.d/*",
    "/etc/iscsi/initiatorname.iscsi",
    "/.cloudlet/manifest",
    "/boot/{grub,grub2}/{grub.cfg,menu.lst,grubenv}",
    "/boot/loader/entries/*.conf",
];

/// The policy: what injection looks at, and the manifest's templates.
pub struct Watch {
    root: Level,
}

#[derive(Default)]
struct Level {
    literal: BTreeMap<String, Level>,
    globs: Vec<(String, Level)>,
    /// A pattern ends here.
    listed: bool,
    /// And wants the content.
    kept: bool,
}

impl Watch {
    /// `extra` are the paths of the manifest's templates: their content is needed to expand them.
    pub fn new(extra: &[GuestPath]) -> Self {
        let mut watch = Watch { root: Level::default() };
        for pattern in LISTED {
            watch.add_both(pattern, false);
        }
        for pattern in KEPT {
            watch.add_both(pattern, true);
        }
        for rule in &RULES {
            watch.add_both(&format!("{}/{}", rule.directory, rule.name), false);
        }
        for path in extra {
            // A template is one path, whatever characters it has.
            let names: Vec<&str> = path.components().filter_map(|name| std::str::from_utf8(name).ok()).collect();
            if names.len() == path.components().count() {
                watch.root.add(&names, true, Literal::Always);
            }
        }
        watch
    }

    /// Adds a pattern, and the same without `/usr`.
    fn add_both(&mut self, pattern: &str, kept: bool) {
        for path in braces(pattern) {
            let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
            self.root.add(&names, kept, Literal::UnlessGlob);
            if names.first() == Some(&"usr") {
                self.root.add(&names[1..], kept, Literal::UnlessGlob);
            }
        }
    }
}

/// How a component is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Literal {
    Always,
    UnlessGlob,
}

impl Level {
    fn add(&mut self, names: &[&str], kept: bool, literal: Literal) {
        let Some((first, rest)) = names.split_first() else {
            self.listed = true;
            self.kept |= kept;
            return;
        };
        let is_glob = literal == Literal::UnlessGlob && first.contains(['*', '?', '[']);
        let next = if !is_glob {
            self.literal.entry((*first).to_owned()).or_default()
        } else {
            let at = self.globs.iter().position(|(pattern, _)| pattern == first).unwrap_or_else(|| {
                self.globs.push(((*first).to_owned(), Level::default()));
                self.globs.len() - 1
            });
            &mut self.globs[at].1
        };
        next.add(rest, kept, literal);
    }

    /// Whether `names` lead to a level that `accept` takes.
    fn find(&self, mut names: std::str::Split<'_, char>, accept: &dyn Fn(&Level) -> bool) -> bool {
        let Some(name) = names.next() else { return accept(self) };
        if let Some(next) = self.literal.get(name)
            && next.find(names.clone(), accept)
        {
            return true;
        }
        self.globs.iter().any(|(pattern, next)| glob(pattern, name) && next.find(names.clone(), accept))
    }
}

impl FactsPolicy for Watch {
    fn lists(&self, path: &str) -> bool {
        // Every level exists because a pattern ends at it or below it.
        path == "/" || path.strip_prefix('/').is_some_and(|rest| self.root.find(rest.split('/'), &|_| true)) || is_account_path(path)
    }

    fn keeps_content(&self, path: &str) -> bool {
        path.strip_prefix('/').is_some_and(|rest| self.root.find(rest.split('/'), &|level| level.kept))
    }
}

/// Homes can be anywhere; what matters in them has a name that tells.
fn is_account_path(path: &str) -> bool {
    path.ends_with("/.ssh") || path.ends_with("/.ssh/authorized_keys")
}

/// Expands `{a,b}`, not nested.
fn braces(pattern: &str) -> Vec<String> {
    let parts = pattern.split_once('{').and_then(|(before, rest)| Some((before, rest.split_once('}')?)));
    match parts {
        None => vec![pattern.to_owned()],
        Some((before, (inside, after))) => inside.split(',').flat_map(|word| braces(&format!("{before}{word}{after}"))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_injection_reads_is_listed_with_parents_and_in_both_layouts() {
        let watch = Watch::new(&[GuestPath::new("/srv/app/conf [1].tmpl").expect("path")]);
        for path in [
            "/",
            "/etc",
            "/usr",
            "/sbin",
            "/lib",
            "/etc/hosts",
            "/sbin/ifup",
            "/usr/sbin/ifup",
            "/lib/systemd/system/systemd-networkd.service",
            "/usr/lib/systemd/system/sockets.target.wants/x.socket",
            "/etc/systemd/system/multi-user.target.wants/ssh.service",
            "/etc/ssh/ssh_host_rsa_key",
            "/home/a/.ssh/authorized_keys",
            "/srv/data/u/.ssh",
            "/lib/modules/6.1.0-18-amd64",
            "/boot/vmlinuz-6.1",
            "/etc/rcS.d/S12networking",
            "/srv",
            "/srv/app",
            "/srv/app/conf [1].tmpl",
            "/var/lib/dhcp/dhclient.eth0.leases",
        ] {
            assert!(watch.lists(path), "{path}");
        }
        for path in ["/usr/bin/ls", "/etc/ssh/moduli", "/lib/modules/6.1/kernel", "/usr/share/doc", "/etc/sshd", "/srv/app/conf 1.tmpl", "etc"] {
            assert!(!watch.lists(path), "{path}");
        }
    }

    #[test]
    fn contents_are_kept_only_of_what_is_read() {
        let watch = Watch::new(&[GuestPath::new("/srv/t").expect("path")]);
        for path in ["/etc/hosts", "/etc/shadow", "/etc/netplan/a.yaml", "/lib/systemd/system-preset/90-x.preset", "/srv/t"] {
            assert!(watch.keeps_content(path), "{path}");
        }
        for path in ["/etc/ssh/ssh_host_rsa_key", "/etc", "/boot/vmlinuz-6.1", "/sbin/ifup", "/srv"] {
            assert!(!watch.keeps_content(path), "{path}");
        }
    }
}
