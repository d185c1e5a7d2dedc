//! Which services of the image start at boot, read from the links that enable them: systemd's `*.wants` directories and presets, OpenRC's
//! runlevels, System V's `rc*.d`.
//!
//! Presets (systemd.preset(5)) count only on a first boot, which an image without a machine-id would have had. Injection writes a machine-id, so
//! whoever relies on a preset has to enable the unit by links: [`State::Preset`] says that this is needed.

use crate::guest::{
    facts::{GuestFacts, NodeKind},
    scrub::glob,
    tree::{in_lib, present},
};

/// What the tree says about a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Links start it; the text names one.
    Enabled(String),
    /// No link, but a preset would enable it at the first boot; the text names the preset file.
    Preset(String),
    /// It is there and nothing starts it.
    Disabled,
    /// There is no such unit, or it is masked.
    Absent,
}

/// Where links enable systemd units.
const UNIT_DIRS: [&str; 3] = ["/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"];

/// The state of a systemd unit, e.g. `systemd-networkd.service`.
pub fn unit_state(facts: &GuestFacts, unit: &str) -> State {
    let own = format!("/etc/systemd/system/{unit}");
    let masked = facts.node(&own).is_some_and(|node| matches!(&node.kind, NodeKind::Symlink { target } if target == "/dev/null"));
    let installed = in_lib(facts, &format!("systemd/system/{unit}")).is_some() || present(facts, &own);
    if masked || !installed {
        return State::Absent;
    }
    if let Some(link) = enabling_link(facts, unit) {
        return State::Enabled(link);
    }
    match preset(facts, unit) {
        Some((true, file)) if is_first_boot(facts) => State::Preset(file),
        _ => State::Disabled,
    }
}

/// The first `*.wants` or `*.requires` link for a unit.
pub fn enabling_link(facts: &GuestFacts, unit: &str) -> Option<String> {
    enabling_links(facts, unit).into_iter().next()
}

/// All `*.wants` and `*.requires` links for a unit, those in /etc first.
pub fn enabling_links(facts: &GuestFacts, unit: &str) -> Vec<String> {
    let mut links = Vec::new();
    for directory in UNIT_DIRS {
        let Some((directory, _)) = facts.resolve(directory) else { continue };
        for (name, _) in facts.children(&directory) {
            let link = format!("{directory}/{name}/{unit}");
            if (name.ends_with(".wants") || name.ends_with(".requires")) && facts.node(&link).is_some() && !links.contains(&link) {
                links.push(link);
            }
        }
    }
    links
}

/// OpenRC runlevel or System V links for a service, e.g. `networking`.
pub fn init_script_links(facts: &GuestFacts, service: &str) -> Vec<String> {
    let mut links = Vec::new();
    for (level, _) in facts.children("/etc/runlevels") {
        let link = format!("/etc/runlevels/{level}/{service}");
        if facts.node(&link).is_some() {
            links.push(link);
        }
    }
    for level in ["S", "2", "3", "4", "5"] {
        // Red Hat's are links into /etc/rc.d.
        let Some((directory, _)) = facts.resolve(&format!("/etc/rc{level}.d")) else { continue };
        links.extend(facts.children(&directory).filter(|(name, _)| is_start_link(name, service)).map(|(name, _)| format!("{directory}/{name}")));
    }
    links
}

/// `S` and two digits, then the service.
fn is_start_link(name: &str, service: &str) -> bool {
    name.strip_prefix('S').is_some_and(|rest| rest.len() > 2 && rest.bytes().take(2).all(|b| b.is_ascii_digit()) && rest.get(2..) == Some(service))
}

/// Whether systemd would take the next boot for the first one: /etc/machine-id is missing, empty or `uninitialized` (machine-id(5)).
fn is_first_boot(facts: &GuestFacts) -> bool {
    !facts.exists("/etc/machine-id") || facts.text("/etc/machine-id").is_some_and(|text| matches!(text.trim(), "" | "uninitialized"))
}

/// What the presets say: files sorted by name, one in /etc hides one of the same name in /usr/lib, the first matching line wins
/// (systemd.preset(5)). Gives the decision and the file.
fn preset(facts: &GuestFacts, unit: &str) -> Option<(bool, String)> {
    let mut files: Vec<(String, String)> = Vec::new();
    for directory in ["/etc/systemd/system-preset", "/usr/lib/systemd/system-preset", "/lib/systemd/system-preset"] {
        let Some((directory, _)) = facts.resolve(directory) else { continue };
        for (name, _) in facts.children(&directory) {
            if name.ends_with(".preset") && !files.iter().any(|(known, _)| known == name) {
                files.push((name.to_owned(), format!("{directory}/{name}")));
            }
        }
    }
    files.sort();
    files.into_iter().find_map(|(_, path)| {
        let decision = facts.text(&path)?.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            let verb = words.next()?;
            let pattern = words.next()?;
            match verb {
                "enable" if glob(pattern, unit) => Some(true),
                "disable" if glob(pattern, unit) => Some(false),
                _ => None,
            }
        })?;
        Some((decision, path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::facts::Node;

    fn facts(nodes: &[(&str, Option<&str>)]) -> GuestFacts {
        let mut facts = GuestFacts::default();
        for (path, content) in nodes {
            let mut parent = String::new();
            for name in path.split('/').filter(|name| !name.is_empty()) {
                parent.push('/');
                parent.push_str(name);
                facts.nodes.entry(parent.clone()).or_insert(Node { kind: NodeKind::Directory, mode: 0o755, uid: 0, gid: 0 });
            }
            let kind = match content.map(|content| (content.strip_prefix("-> "), content)) {
                None => NodeKind::File { size: 1, content: None },
                Some((Some(target), _)) => NodeKind::Symlink { target: target.to_owned() },
                Some((None, content)) => NodeKind::File { size: content.len() as u64, content: Some(content.into()) },
            };
            facts.nodes.insert((*path).to_owned(), Node { kind, mode: 0o644, uid: 0, gid: 0 });
        }
        facts
    }

    const UNIT: (&str, Option<&str>) = ("/usr/lib/systemd/system/n.service", Some(""));

    #[test]
    fn links_enable_and_masks_disable() {
        let link = ("/etc/systemd/system/multi-user.target.wants/n.service", Some("-> /usr/lib/systemd/system/n.service"));
        assert!(matches!(unit_state(&facts(&[UNIT, link]), "n.service"), State::Enabled(path) if path == link.0));
        let mask = ("/etc/systemd/system/n.service", Some("-> /dev/null"));
        assert_eq!(unit_state(&facts(&[UNIT, link, mask]), "n.service"), State::Absent);
        assert_eq!(unit_state(&facts(&[UNIT]), "n.service"), State::Disabled);
        assert_eq!(unit_state(&facts(&[link]), "n.service"), State::Absent, "a link to a unit that is not there starts nothing");
    }

    #[test]
    fn presets_count_in_order_and_only_for_a_first_boot() {
        let low = ("/usr/lib/systemd/system-preset/90-a.preset", Some("disable *\n"));
        let high = ("/usr/lib/systemd/system-preset/10-b.preset", Some("# x\nenable n.*\n"));
        assert!(matches!(unit_state(&facts(&[UNIT, low, high]), "n.service"), State::Preset(path) if path == high.0));
        let hidden = ("/etc/systemd/system-preset/10-b.preset", Some(""));
        assert_eq!(unit_state(&facts(&[UNIT, low, high, hidden]), "n.service"), State::Disabled);
        let id = ("/etc/machine-id", Some("0123456789abcdef0123456789abcdef\n"));
        assert_eq!(unit_state(&facts(&[UNIT, low, high, id]), "n.service"), State::Disabled);
    }

    #[test]
    fn init_scripts_are_enabled_by_runlevels_and_start_links() {
        let tree = facts(&[
            ("/etc/runlevels/boot/networking", Some("-> /etc/init.d/networking")),
            ("/etc/rcS.d/S12networking", Some("-> ../init.d/networking")),
        ]);
        assert_eq!(init_script_links(&tree, "networking"), ["/etc/runlevels/boot/networking", "/etc/rcS.d/S12networking"]);
        assert!(init_script_links(&tree, "working").is_empty());
    }
}
