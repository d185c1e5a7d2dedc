//! How root may log in over SSH: sshd_config(5) `PermitRootLogin`, in a file of its own where sshd reads those first, else in sshd_config.
//!
//! The first value that sshd obtains for a keyword is the one that counts, so ours has to come before all others: in sshd_config.d under a name
//! that sorts first, if the Include line stands before any PermitRootLogin, or else as the first line of sshd_config.

use crate::{
    error::Result,
    guest::{
        facts::GuestFacts,
        hostname::attrs_of,
        plan::{Plan, Visibility},
        setup::RootLogin,
        ssh::keyword,
        tree::present,
    },
};

const CONFIG: &str = "/etc/ssh/sshd_config";
const DROP_IN: &str = "/etc/ssh/sshd_config.d/00-cloudlet.conf";

/// Writes the policy; the password is the caller's part.
pub(super) fn write_login_policy(plan: &mut Plan<'_>, facts: &GuestFacts, policy: RootLogin) -> Result<()> {
    let value = match policy {
        RootLogin::Image => return Ok(()),
        RootLogin::KeysOnly => "prohibit-password",
        RootLogin::Password => "yes",
        RootLogin::No => "no",
    };
    if policy == RootLogin::No && facts.node("/root/.ssh/authorized_keys").is_some() {
        plan.remove("/root/.ssh/authorized_keys", "root may not log in")?;
    }
    if present(facts, "/usr/sbin/dropbear") {
        plan.warnings.push("the image has dropbear, whose options for root are on its command line: the policy for root reaches sshd only".into());
    }
    let why = "how root may log in over SSH";
    let Some(text) = facts.text(CONFIG) else {
        if facts.exists(CONFIG) || present(facts, "/usr/sbin/sshd") {
            plan.warnings.push(format!("{CONFIG} can't be read: how root may log in is left as it is"));
        }
        return Ok(());
    };
    let mut in_match = false;
    for line in text.lines() {
        in_match |= keyword(line, "Match").is_some();
        if in_match && keyword(line, "PermitRootLogin").is_some() {
            plan.warnings.push("sshd_config has a PermitRootLogin inside a Match block, which may say otherwise for some".into());
            break;
        }
    }
    // Debian's and Fedora's sshd_config begin with the Include.
    let first = text.lines().find_map(|line| {
        let include = keyword(line, "Include").is_some_and(|files| files.split_whitespace().any(|glob| glob == "/etc/ssh/sshd_config.d/*.conf"));
        let other = keyword(line, "PermitRootLogin").is_some() || keyword(line, "Match").is_some();
        (include || other).then_some(include)
    });
    if first == Some(true) {
        return plan.write(DROP_IN, format!("# Written by cloudletd.\nPermitRootLogin {value}\n"), 0o600, why);
    }
    let edited = format!("# Written by cloudletd.\nPermitRootLogin {value}\n{text}");
    plan.write_as(CONFIG, edited, attrs_of(facts, CONFIG), why, Visibility::Open)
}
