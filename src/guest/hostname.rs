//! The host name: /etc/hostname, /etc/hosts, and the files that older or other init systems read instead.
//!
//! Habits differ and programs depend on them, so the tree decides. Debian and its family, Arch, Alpine and SUSE keep the short name in
//! /etc/hostname and let /etc/hosts give the FQDN (Debian Reference 5.1.1: `127.0.1.1 fqdn short`); Red Hat's family keeps the FQDN in
//! /etc/hostname. /etc/hosts is edited, not replaced: only lines for 127.0.1.1, which belong to the host name by that habit, are ours.

use crate::{
    error::Result,
    fs::edit::Attrs,
    guest::{
        config::InstanceConfig,
        facts::{GuestFacts, NodeKind},
        plan::{Plan, Visibility},
        tree::{distribution_ids, present},
    },
    names::Hostname,
};

/// sethostname(2) takes at most this many bytes.
const HOST_NAME_MAX: usize = 64;

/// What the distribution keeps in /etc/hostname.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Habit {
    /// The first label.
    Short,
    /// The whole name.
    Fqdn,
}

/// Writes the host name and returns it; `None` when there is none to write.
pub fn write_hostname(plan: &mut Plan<'_>, facts: &GuestFacts, config: &InstanceConfig) -> Result<Option<Hostname>> {
    let name = match &config.hostname {
        Some(name) => name.clone(),
        None => match config.instance.as_str().parse::<Hostname>() {
            Ok(name) => name,
            Err(_) => {
                plan.warnings.push(format!("no host name is given and the instance name {} is not one: the image's is left", config.instance));
                return Ok(None);
            }
        },
    };
    let own = match habit(facts) {
        Habit::Fqdn if name.as_str().len() <= HOST_NAME_MAX => name.as_str(),
        Habit::Fqdn => {
            plan.notes.push(format!("/etc/hostname gets the short name: the FQDN has more than {HOST_NAME_MAX} characters, the kernel's limit"));
            name.short()
        }
        Habit::Short => name.short(),
    };
    plan.write("/etc/hostname", format!("{own}\n"), 0o644, "host name")?;
    write_other_places(plan, facts, &name, own)?;
    write_hosts(plan, facts, &name)?;
    Ok(Some(name))
}

fn habit(facts: &GuestFacts) -> Habit {
    let ids = distribution_ids(facts);
    let red_hat = ids.iter().any(|id| matches!(*id, "rhel" | "fedora" | "centos")) || present(facts, "/etc/redhat-release");
    if red_hat { Habit::Fqdn } else { Habit::Short }
}

/// Files that are edited only where the image has them: OpenRC on Gentoo, sysconfig before systemd, SUSE's capital name.
fn write_other_places(plan: &mut Plan<'_>, facts: &GuestFacts, name: &Hostname, own: &str) -> Result<()> {
    let mut set = |path: &str, variable: &str, value: &str| -> Result<()> {
        let Some(text) = facts.text(path) else { return Ok(()) };
        match with_variable(text, variable, value) {
            Some(edited) => plan.write_as(path, edited, attrs_of(facts, path), "host name", Visibility::Open),
            None => Ok(()),
        }
    };
    set("/etc/conf.d/hostname", "hostname", name.short())?;
    set("/etc/sysconfig/network", "HOSTNAME", own)?;
    // Debian's mail programs take their domain from here (mailname(5)).
    if facts.node("/etc/mailname").is_some_and(|node| matches!(node.kind, NodeKind::File { .. })) {
        plan.write("/etc/mailname", format!("{name}\n"), 0o644, "host name")?;
    }
    if facts.node("/etc/HOSTNAME").is_some_and(|node| matches!(node.kind, NodeKind::File { .. })) {
        plan.write("/etc/HOSTNAME", format!("{name}\n"), 0o644, "host name")?;
    }
    Ok(())
}

/// `text` with the assignment of `variable` replaced, when it has one; the value is a host name and needs quotes only.
fn with_variable(text: &str, variable: &str, value: &str) -> Option<String> {
    let is_ours = |line: &str| line.trim_start().strip_prefix(variable).is_some_and(|rest| rest.starts_with('='));
    if !text.lines().any(is_ours) {
        return None;
    }
    let lines: Vec<String> = text.split('\n').map(|line| if is_ours(line) { format!("{variable}=\"{value}\"") } else { line.to_owned() }).collect();
    Some(lines.join("\n"))
}

/// Owner and mode of a file of the image, for writing it again.
pub(crate) fn attrs_of(facts: &GuestFacts, path: &str) -> Attrs {
    facts.resolve(path).map_or(Attrs::root(0o644), |(_, node)| Attrs { mode: node.mode, uid: node.uid, gid: node.gid, xattrs: Vec::new() })
}

fn write_hosts(plan: &mut Plan<'_>, facts: &GuestFacts, name: &Hostname) -> Result<()> {
    let old = match (facts.exists("/etc/hosts"), facts.text("/etc/hosts")) {
        (false, _) => "",
        (true, Some(text)) => text,
        (true, None) => {
            plan.warnings.push("/etc/hosts is left as it is: it is too large or not UTF-8 text".into());
            return Ok(());
        }
    };
    plan.write("/etc/hosts", hosts_with(old, name), 0o644, "the host name resolves without DNS")
}

/// `old` with one line for 127.0.1.1, at the place of the first such line or after the line for localhost; missing localhost lines are added,
/// everything else is kept.
fn hosts_with(old: &str, name: &Hostname) -> String {
    let own = match name.domain() {
        Some(_) => format!("127.0.1.1\t{name} {}", name.short()),
        None => format!("127.0.1.1\t{name}"),
    };
    let address = |line: &str| line.split('#').next().and_then(|line| line.split_whitespace().next()).map(str::to_owned);
    let mut lines: Vec<String> = Vec::new();
    let mut done = false;
    for line in old.lines() {
        if address(line).as_deref() == Some("127.0.1.1") {
            if !std::mem::replace(&mut done, true) {
                lines.push(own.clone());
            }
        } else {
            lines.push(line.to_owned());
        }
    }
    let has = |lines: &[String], wanted: &str| lines.iter().position(|line| address(line).as_deref() == Some(wanted));
    if has(&lines, "127.0.0.1").is_none() {
        lines.insert(0, "127.0.0.1\tlocalhost".into());
    }
    if !done {
        let after = has(&lines, "127.0.0.1").map_or(0, |at| at + 1);
        lines.insert(after, own);
    }
    if has(&lines, "::1").is_none() {
        lines.push("::1\tlocalhost ip6-localhost ip6-loopback".into());
    }
    lines.push(String::new());
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Hostname {
        text.parse().expect("host name")
    }

    #[test]
    fn hosts_keeps_every_other_line_and_its_order() {
        let old = "127.0.0.1 localhost\n# mine\n127.0.1.1 builder.lan builder\n10.0.0.1\tdb # 127.0.1.1\n::1 localhost\n127.0.1.1 twice\n";
        let new = "127.0.0.1 localhost\n# mine\n127.0.1.1\tweb1.example.com web1\n10.0.0.1\tdb # 127.0.1.1\n::1 localhost\n";
        assert_eq!(hosts_with(old, &name("web1.example.com")), new);
        assert_eq!(hosts_with(new, &name("web1.example.com")), new, "a second time changes nothing");
    }

    #[test]
    fn a_missing_hosts_file_gets_the_usual_lines() {
        assert_eq!(hosts_with("", &name("web1")), "127.0.0.1\tlocalhost\n127.0.1.1\tweb1\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    }

    #[test]
    fn variables_are_replaced_in_place_and_never_added() {
        assert_eq!(with_variable("# x\nhostname=\"a\"\nb=1\n", "hostname", "w"), Some("# x\nhostname=\"w\"\nb=1\n".into()));
        assert_eq!(with_variable("#hostname=a\n", "hostname", "w"), None);
    }
}
