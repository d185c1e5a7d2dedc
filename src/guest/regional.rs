//! Time zone, locale, keymap and what the hardware clock shows, if asked: written where the image's own programs keep them.
//!
//! /etc/localtime is a symlink (localtime(5)); Debian also has the name in /etc/timezone. The locale is in /etc/locale.conf (locale.conf(5)) or, on
//! Debian and its family, /etc/default/locale; the keymap in /etc/vconsole.conf (vconsole.conf(5)), on Debian /etc/default/keyboard (keyboard(5)),
//! with OpenRC /etc/conf.d/keymaps. /etc/adjtime's third line says what the hardware clock shows (adjtime_config(5)). Other variables in these
//! files stay. The values were checked to be single words, so that nothing needs quotes.

use crate::{
    error::{Error, Result, Stage},
    guest::{
        config::InstanceConfig,
        facts::GuestFacts,
        hostname::attrs_of,
        plan::{Plan, Visibility},
        setup::HardwareClock,
        tree::{distribution_ids, has_systemd, musl, present},
    },
};

/// Writes what is asked for. `Kind::InvalidRequest`, `NO_TIMEZONE`, when the image does not have the time zone's data.
pub fn write_settings(plan: &mut Plan<'_>, facts: &GuestFacts, config: &InstanceConfig) -> Result<()> {
    let setup = &config.setup;
    let debian = distribution_ids(facts).contains(&"debian") || present(facts, "/etc/debian_version");
    if let Some(zone) = &setup.timezone {
        write_timezone(plan, facts, zone, debian)?;
    }
    if let Some(locale) = &setup.locale {
        let path = if debian { "/etc/default/locale" } else { "/etc/locale.conf" };
        write_variable(plan, facts, path, "LANG", locale, "locale")?;
        if !has_locale(facts, locale) {
            plan.warnings.push(format!("the image has no data for the locale {locale} under /usr/lib/locale: programs fall back to C"));
        }
    }
    if let Some(keymap) = &setup.keymap {
        if debian {
            write_variable(plan, facts, "/etc/default/keyboard", "XKBLAYOUT", keymap, "keyboard layout")?;
        } else if facts.exists("/etc/conf.d/keymaps") && !has_systemd(facts) {
            write_variable(plan, facts, "/etc/conf.d/keymaps", "keymap", keymap, "console keymap")?;
        } else {
            write_variable(plan, facts, "/etc/vconsole.conf", "KEYMAP", keymap, "console keymap")?;
        }
    }
    if let Some(clock) = setup.hardware_clock {
        write_clock(plan, facts, clock)?;
    }
    Ok(())
}

fn write_timezone(plan: &mut Plan<'_>, facts: &GuestFacts, zone: &str, debian: bool) -> Result<()> {
    // The facts list the first level only: areas and zones without one.
    let first = zone.split('/').next().unwrap_or(zone);
    if !facts.exists(&format!("/usr/share/zoneinfo/{first}")) {
        let message = format!("the image has no /usr/share/zoneinfo/{first}");
        return Err(Error::field(Stage::Inject, "timezone", message).with_reason("NO_TIMEZONE"));
    }
    let why = "time zone";
    plan.symlink("/etc/localtime", &format!("../usr/share/zoneinfo/{zone}"), why)?;
    if debian || facts.exists("/etc/timezone") {
        plan.write("/etc/timezone", format!("{zone}\n"), 0o644, why)?;
    }
    if facts.exists("/etc/sysconfig/clock") {
        write_variable(plan, facts, "/etc/sysconfig/clock", "ZONE", zone, why)?;
    }
    Ok(())
}

/// Whether programs will find the locale's data, as far as a list of names can tell: an archive may hold anything.
fn has_locale(facts: &GuestFacts, locale: &str) -> bool {
    let plain = |name: &str| name.to_lowercase().replace(['-', '.'], "");
    let builtin = matches!(plain(locale).as_str(), "c" | "posix" | "cutf8");
    let found = facts
        .resolve("/usr/lib/locale")
        .is_some_and(|(directory, _)| facts.children(&directory).any(|(name, _)| name.starts_with("locale-archive") || plain(name) == plain(locale)));
    builtin || musl(facts) || found
}

fn write_clock(plan: &mut Plan<'_>, facts: &GuestFacts, clock: HardwareClock) -> Result<()> {
    let word = if clock == HardwareClock::Utc { "UTC" } else { "LOCAL" };
    let old = facts.text("/etc/adjtime").unwrap_or("0.0 0 0\n0\nUTC\n");
    let mut lines: Vec<&str> = old.lines().take(3).collect();
    lines.resize(3, "0");
    lines[2] = word;
    plan.write("/etc/adjtime", lines.join("\n") + "\n", 0o644, "what the hardware clock shows")?;
    if !has_systemd(facts) && facts.exists("/etc/conf.d/hwclock") {
        write_variable(plan, facts, "/etc/conf.d/hwclock", "clock", word, "what the hardware clock shows")?;
    }
    Ok(())
}

/// Sets a variable in a file of assignments: in place of the one that is there, else at the end.
fn write_variable(plan: &mut Plan<'_>, facts: &GuestFacts, path: &str, variable: &str, value: &str, why: &str) -> Result<()> {
    let old = match (facts.exists(path), facts.text(path)) {
        (true, None) => {
            plan.warnings.push(format!("{path} is left as it is: it is too large or not UTF-8 text"));
            return Ok(());
        }
        (_, text) => text.unwrap_or_default(),
    };
    plan.write_as(path, with_variable(old, variable, value), attrs_of(facts, path), why, Visibility::Open)
}

fn with_variable(text: &str, variable: &str, value: &str) -> String {
    let assignment = format!("{variable}=\"{value}\"");
    let mut lines: Vec<&str> = Vec::new();
    let mut done = false;
    for line in text.lines() {
        let ours = line.trim_start().strip_prefix(variable).is_some_and(|rest| rest.starts_with('='));
        if !ours {
            lines.push(line);
        } else if !std::mem::replace(&mut done, true) {
            lines.push(&assignment);
        }
    }
    if !done {
        lines.push(&assignment);
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_is_set_once_and_others_stay() {
        assert_eq!(with_variable("", "LANG", "C.UTF-8"), "LANG=\"C.UTF-8\"\n");
        assert_eq!(
            with_variable("# x\nLANG=a\nLC_TIME=b\n LANG=c\n#LANG=d\nLANGUAGE=e", "LANG", "f"),
            "# x\nLANG=\"f\"\nLC_TIME=b\n#LANG=d\nLANGUAGE=e\n"
        );
    }
}
