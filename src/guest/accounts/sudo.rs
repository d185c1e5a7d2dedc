//! Who may become root: sudoers(5), or doas.conf(5) where the image has only that.

use crate::{
    error::{Error, Result, Stage},
    fs::edit::Attrs,
    guest::{
        config::InstanceConfig,
        facts::GuestFacts,
        plan::{Plan, Visibility},
        setup::Sudo,
        tree::present,
    },
};

const SUDOERS: &str = "/etc/sudoers.d/90-cloudlet";
const DOAS: &str = "/etc/doas.d/90-cloudlet.conf";

/// Writes one file for all users who may. `Kind::InvalidRequest`, `NO_SUDO`, when the image has neither sudo with an includedir nor doas.
pub(super) fn write(plan: &mut Plan<'_>, facts: &GuestFacts, config: &InstanceConfig) -> Result<()> {
    let users: Vec<(usize, &str, Sudo)> = config
        .setup
        .users
        .iter()
        .enumerate()
        .filter(|(_, user)| user.sudo != Sudo::No)
        .map(|(at, user)| (at, user.name.as_str(), user.sudo))
        .collect();
    let Some((first, ..)) = users.first() else { return Ok(()) };
    let mut text = String::from("# Written by cloudletd.\n");
    // sudo skips files whose names contain '.' or end in '~'; sudoers(5) wants 0440.
    if includes_directory(facts) {
        for (_, name, sudo) in &users {
            let tag = if *sudo == Sudo::WithoutPassword { "NOPASSWD: " } else { "" };
            text.push_str(&format!("{name} ALL=(ALL:ALL) {tag}ALL\n"));
        }
        return plan.write_as(SUDOERS, text, Attrs::root(0o440), "users who may use sudo", Visibility::Open);
    }
    if present(facts, "/usr/bin/doas") {
        for (_, name, sudo) in &users {
            let option = if *sudo == Sudo::WithoutPassword { "nopass" } else { "persist" };
            text.push_str(&format!("permit {option} {name}\n"));
        }
        return plan.write_as(DOAS, text, Attrs::root(0o600), "users who may use doas", Visibility::Open);
    }
    let message = "the image has neither sudo that reads /etc/sudoers.d nor doas";
    Err(Error::field(Stage::Inject, format!("users[{first}].sudo"), message).with_reason("NO_SUDO"))
}

/// Whether /etc/sudoers takes in /etc/sudoers.d (`#includedir` until 1.9.1, `@includedir` since). An unreadable file is taken for the usual one.
fn includes_directory(facts: &GuestFacts) -> bool {
    if !present(facts, "/usr/bin/sudo") {
        return false;
    }
    let Some(text) = facts.text("/etc/sudoers") else { return facts.exists("/etc/sudoers.d") };
    text.lines().any(|line| {
        let mut words = line.split_whitespace();
        matches!(words.next(), Some("@includedir" | "#includedir"))
            && words.next().is_some_and(|path| path.trim_matches('"').trim_end_matches('/') == "/etc/sudoers.d")
    })
}
