//! What `systemctl enable`, `disable` and `mask` do to a tree (systemd.unit(5), "[Install] section options").

use super::{Tree, refuse, why};
use crate::{
    error::Result,
    guest::{
        enablement::enabling_links,
        facts::NodeKind,
        plan::Plan,
        setup::{UnitSetup, UnitState, check_unit_name},
    },
};

const ETC: &str = "/etc/systemd/system";
/// Where unit files are, in the order that systemd looks (systemd.unit(5), "Unit File Load Path"), without those that are made at run time.
const DIRECTORIES: [&str; 5] =
    [ETC, "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system", "/etc/systemd/system.attached"];
/// Units that `Also=` may bring in.
const ALSO_MAX: usize = 32;

/// One unit of the request.
pub(super) fn write_unit(plan: &mut Plan<'_>, tree: &Tree<'_>, field: &str, unit: &UnitSetup) -> Result<()> {
    let own = format!("{ETC}/{}", unit.name);
    let is_masked = is_mask(tree, &own);
    if unit.state == UnitState::Masked {
        if tree.exists(&own) && !is_masked {
            return refuse(field, "UNIT_NOT_LINKABLE", format!("{own} is a file of its own, which a mask would replace"));
        }
        return plan.symlink(&own, "/dev/null", why(unit));
    }
    if is_masked {
        plan.remove(&own, why(unit))?;
    }
    if unit.state == UnitState::Disabled {
        return disable(plan, tree, field, unit);
    }
    let mut names = vec![unit.name.clone()];
    let mut done = 0;
    while let Some(name) = names.get(done).cloned() {
        done += 1;
        for also in enable(plan, tree, field, &name, unit)? {
            if !names.contains(&also) && names.len() < ALSO_MAX {
                names.push(also);
            }
        }
    }
    Ok(())
}

fn is_mask(tree: &Tree<'_>, path: &str) -> bool {
    tree.facts.node(path).is_some_and(|node| matches!(&node.kind, NodeKind::Symlink { target } if target == "/dev/null"))
}

/// The file of a unit: path and text. An instance `a@b.service` has that of its template `a@.service`.
fn unit_file<'t>(tree: &Tree<'t>, name: &str) -> Option<(String, &'t str)> {
    let template = name.split_once('@').and_then(|(prefix, rest)| Some(format!("{prefix}@.{}", rest.rsplit_once('.')?.1)));
    let names = [Some(name.to_owned()), template];
    names.iter().flatten().find_map(|name| {
        DIRECTORIES.iter().map(|directory| format!("{directory}/{name}")).filter(|path| !is_mask(tree, path)).find_map(|path| {
            let text = tree.text(&path)?;
            Some((path, text))
        })
    })
}

/// Makes the links of one unit and gives what its `Also=` names.
fn enable(plan: &mut Plan<'_>, tree: &Tree<'_>, field: &str, name: &str, wish: &UnitSetup) -> Result<Vec<String>> {
    let Some((path, text)) = unit_file(tree, name) else {
        return refuse(field, "NO_SUCH_UNIT", format!("the image has no unit {name} that can be read"));
    };
    let install = Install::of(text);
    if install.is_empty() {
        return refuse(field, "UNIT_STATIC", format!("{path} has no [Install] section: nothing says when to start it"));
    }
    // A template without instance is enabled under its default one (DefaultInstance=).
    let name = match (name.split_once("@."), &install.default_instance) {
        (Some((prefix, suffix)), Some(instance)) => format!("{prefix}@{instance}.{suffix}"),
        (Some(_), None) => return refuse(field, "UNIT_NOT_LINKABLE", format!("{name} is a template: name an instance of it")),
        (None, _) => name.to_owned(),
    };
    let linkable = |link: &str| match expand(link, &name).filter(|link| check_unit_name(link).is_ok()) {
        Some(link) => Ok(link),
        None => refuse(field, "UNIT_NOT_LINKABLE", format!("{path} names {link:?} in its [Install] section, which is not the name of a unit")),
    };
    for (directory, targets) in [("wants", &install.wanted_by), ("requires", &install.required_by), ("upholds", &install.upheld_by)] {
        for target in targets {
            plan.symlink(&format!("{ETC}/{}.{directory}/{name}", linkable(target)?), &path, why(wish))?;
        }
    }
    for alias in &install.alias {
        plan.symlink(&format!("{ETC}/{}", linkable(alias)?), &path, why(wish))?;
    }
    install.also.iter().map(|also| linkable(also)).collect()
}

/// Removes the links that enable a unit, as far as they are in /etc; what a package's own links start has to be masked.
fn disable(plan: &mut Plan<'_>, tree: &Tree<'_>, field: &str, unit: &UnitSetup) -> Result<()> {
    if unit_file(tree, &unit.name).is_none() {
        return refuse(field, "NO_SUCH_UNIT", format!("the image has no unit {} that can be read", unit.name));
    }
    for link in enabling_links(tree.facts, &unit.name) {
        if link.starts_with("/etc/") {
            plan.remove(&link, why(unit))?;
        } else {
            plan.warnings.push(format!("{} is started by {link}, which belongs to its package: mask it instead", unit.name));
        }
    }
    let aliases = tree.facts.children(ETC).filter(|(name, node)| {
        matches!(&node.kind, NodeKind::Symlink { target } if *name != unit.name && target.rsplit('/').next() == Some(unit.name.as_str()))
    });
    for (alias, _) in aliases {
        plan.remove(&format!("{ETC}/{alias}"), why(unit))?;
    }
    Ok(())
}

/// Says the same to `systemctl preset-all`, which some distributions run on upgrades; the first matching line of all files counts
/// (systemd.preset(5)).
pub(super) fn write_preset(plan: &mut Plan<'_>, units: &[UnitSetup]) -> Result<()> {
    let line = |unit: &UnitSetup| match unit.state {
        UnitState::Enabled => Some(format!("enable {}\n", unit.name)),
        UnitState::Disabled => Some(format!("disable {}\n", unit.name)),
        UnitState::Masked => None,
    };
    let text: String = units.iter().filter_map(line).collect();
    if text.is_empty() {
        return Ok(());
    }
    plan.write("/etc/systemd/system-preset/00-cloudlet.preset", format!("# Written by cloudletd.\n{text}"), 0o644, "units of the request")
}

/// An [Install] section.
#[derive(Debug, Default, PartialEq, Eq)]
struct Install {
    wanted_by: Vec<String>,
    required_by: Vec<String>,
    upheld_by: Vec<String>,
    alias: Vec<String>,
    also: Vec<String>,
    default_instance: Option<String>,
}

impl Install {
    fn of(text: &str) -> Self {
        let mut install = Install::default();
        let mut inside = false;
        // A backslash at the end of a line joins it with the next (systemd.syntax(7)).
        let joined = text.replace("\\\r\n", " ").replace("\\\n", " ");
        for line in joined.lines().map(str::trim) {
            if line.starts_with('[') {
                inside = line == "[Install]";
            }
            let Some((key, value)) = line.split_once('=').filter(|_| inside && !line.starts_with(['#', ';'])) else { continue };
            let list = match key.trim() {
                "WantedBy" => &mut install.wanted_by,
                "RequiredBy" => &mut install.required_by,
                "UpheldBy" => &mut install.upheld_by,
                "Alias" => &mut install.alias,
                "Also" => &mut install.also,
                "DefaultInstance" => {
                    install.default_instance = Some(value.trim().to_owned());
                    continue;
                }
                _ => continue,
            };
            // An empty assignment resets the list.
            if value.trim().is_empty() {
                list.clear();
            }
            list.extend(value.split_whitespace().map(str::to_owned));
        }
        install
    }

    fn is_empty(&self) -> bool {
        self.wanted_by.is_empty() && self.required_by.is_empty() && self.upheld_by.is_empty() && self.alias.is_empty() && self.also.is_empty()
    }
}

/// Replaces the specifiers that do not depend on the running system; `None` for others.
fn expand(text: &str, unit: &str) -> Option<String> {
    let stem = unit.rsplit_once('.').map_or(unit, |(stem, _)| stem);
    let (prefix, instance) = stem.split_once('@').unwrap_or((stem, ""));
    let mut expanded = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            expanded.push(c);
            continue;
        }
        match chars.next()? {
            'i' => expanded.push_str(instance),
            'p' => expanded.push_str(prefix),
            'n' => expanded.push_str(unit),
            'N' => expanded.push_str(stem),
            'j' => expanded.push_str(prefix.rsplit('-').next().unwrap_or(prefix)),
            '%' => expanded.push('%'),
            _ => return None,
        }
    }
    Some(expanded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn install_sections_are_read_as_systemd_does() {
        let text = "[Unit]\nWantedBy=no.target\n[Install]\n# WantedBy=no.target\nWantedBy=a.target b.target\nWantedBy=\nWantedBy = c.target \\\n d.target\nAlias=x.service\nDefaultInstance=tty1\n[Service]\nAlias=no.service\n";
        let install = Install::of(text);
        assert_eq!((install.wanted_by, install.alias), (vec!["c.target".to_owned(), "d.target".to_owned()], vec!["x.service".to_owned()]));
        assert_eq!(install.default_instance.as_deref(), Some("tty1"));
        assert!(Install::of("[Unit]\nDescription=x\n").is_empty());
    }

    #[test]
    fn specifiers_of_the_name_are_replaced_and_others_are_not_guessed() {
        assert_eq!(expand("%p-%i.%%", "foo-bar@x.service").as_deref(), Some("foo-bar-x.%"));
        assert_eq!(expand("%j@%N.target", "foo-bar@x.service").as_deref(), Some("bar@foo-bar@x.target"));
        for text in ["%H.target", "a%", "%"] {
            assert_eq!(expand(text, "a.service"), None, "{text}");
        }
    }
}
