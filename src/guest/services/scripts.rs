//! Services of OpenRC and System V init: scripts in /etc/init.d, started by links.

use super::{Init, Tree, refuse, why};
use crate::{
    error::Result,
    guest::{
        enablement::init_script_links,
        plan::Plan,
        setup::{UnitSetup, UnitState},
    },
};

/// One service of the request; a unit's name may end in `.service`, so that one request serves images of both kinds.
pub(super) fn write_service(plan: &mut Plan<'_>, tree: &Tree<'_>, field: &str, unit: &UnitSetup, init: Init) -> Result<()> {
    let name = unit.name.strip_suffix(".service").unwrap_or(&unit.name);
    let script = format!("/etc/init.d/{name}");
    if !tree.exists(&script) {
        return refuse(field, "NO_SUCH_UNIT", format!("the image has no {script}"));
    }
    match unit.state {
        UnitState::Masked => refuse(field, "UNIT_NOT_LINKABLE", "only systemd can mask a service: disable it instead".into()),
        UnitState::Disabled => init_script_links(tree.facts, name).iter().try_for_each(|link| plan.remove(link, why(unit))),
        UnitState::Enabled if init == Init::OpenRc => plan.symlink(&format!("/etc/runlevels/default/{name}"), &script, why(unit)),
        UnitState::Enabled => {
            for (level, starts) in levels(tree.text(&script).unwrap_or_default()) {
                // After everything that the image has, and stopped before it.
                let link = if starts { format!("S99{name}") } else { format!("K01{name}") };
                plan.symlink(&format!("/etc/rc{level}.d/{link}"), &format!("../init.d/{name}"), why(unit))?;
            }
            Ok(())
        }
    }
}

/// The runlevels of a script's LSB header (`Default-Start`, `Default-Stop`), with whether it is started there.
fn levels(script: &str) -> Vec<(char, bool)> {
    let header = |name: &str, otherwise: &str| -> Vec<char> {
        let line = script.lines().find_map(|line| line.strip_prefix("# ")?.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or(otherwise).split_whitespace().filter(|word| word.len() == 1).flat_map(str::chars).filter(|c| "0123456S".contains(*c)).collect()
    };
    let starts = header("Default-Start", "2 3 4 5").into_iter().map(|level| (level, true));
    starts.chain(header("Default-Stop", "0 1 6").into_iter().map(|level| (level, false))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runlevels_come_from_the_lsb_header() {
        let script = "#!/bin/sh\n### BEGIN INIT INFO\n# Default-Start:     2 S\n# Default-Stop:\n### END INIT INFO\n";
        assert_eq!(levels(script), [('2', true), ('S', true)]);
        assert_eq!(levels("#!/bin/sh\n").len(), 7);
    }
}
