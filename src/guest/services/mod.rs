//! Services that the caller wants started, not started or masked, and the script of the first boot: by what the image's init reads.
//!
//! ```text
//!  systemd   links that systemctl(1) would make from the unit's [Install] section, and a preset that says the same   (systemd)
//!  OpenRC    a link in the default runlevel                                                                       (scripts)
//!  System V  S and K links of the runlevels in the script's LSB header                                            (scripts)
//! ```
//!
//! Which init it is follows from what the tree has; nothing of the guest is run.

mod first_boot;
mod scripts;
mod systemd;

use crate::{
    error::{Error, Result, Stage},
    guest::{
        config::InstanceConfig,
        facts::GuestFacts,
        plan::Plan,
        setup::{UnitSetup, UnitState},
        tree::has_systemd,
    },
};

/// What starts services in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Init {
    Systemd,
    OpenRc,
    SysV,
}

fn init_of(facts: &GuestFacts) -> Option<Init> {
    if has_systemd(facts) {
        return Some(Init::Systemd);
    }
    if facts.exists("/etc/runlevels") {
        return Some(Init::OpenRc);
    }
    (facts.exists("/etc/inittab") || facts.exists("/etc/rc2.d")).then_some(Init::SysV)
}

/// The image and what the request adds to it.
struct Tree<'a> {
    facts: &'a GuestFacts,
    config: &'a InstanceConfig,
}

impl<'a> Tree<'a> {
    /// The content of a file as the guest will have it: the request's own files first.
    fn text(&self, path: &str) -> Option<&'a str> {
        let given = self.config.files.iter().find(|file| file.path.display() == path);
        match given {
            Some(file) => std::str::from_utf8(file.content.expose()).ok(),
            None => self.facts.text(path),
        }
    }

    fn exists(&self, path: &str) -> bool {
        self.config.files.iter().any(|file| file.path.display() == path) || self.facts.exists(path)
    }
}

/// Writes links for the units of the request, and the first-boot script. `Kind::InvalidRequest` names the field: `NO_SUCH_UNIT`, `UNIT_STATIC` (nothing
/// in the unit says when to start it), `UNIT_NOT_LINKABLE`, `NO_INIT` (no init that is known).
pub fn write_services(plan: &mut Plan<'_>, facts: &GuestFacts, config: &InstanceConfig) -> Result<()> {
    let tree = Tree { facts, config };
    let needs = if config.setup.units.is_empty() { "first_boot_script" } else { "units" };
    if config.setup.units.is_empty() && config.setup.first_boot_script.is_none() {
        return Ok(());
    }
    let Some(init) = init_of(facts) else {
        let message = "the image has no init that is known: neither systemd, OpenRC nor System V's";
        return Err(Error::field(Stage::Inject, needs, message).with_reason("NO_INIT"));
    };
    for (index, unit) in config.setup.units.iter().enumerate() {
        let field = format!("units[{index}]");
        match init {
            Init::Systemd => systemd::write_unit(plan, &tree, &field, unit)?,
            Init::OpenRc | Init::SysV => scripts::write_service(plan, &tree, &field, unit, init)?,
        }
    }
    if init == Init::Systemd {
        systemd::write_preset(plan, &config.setup.units)?;
    }
    match &config.setup.first_boot_script {
        Some(script) => first_boot::write(plan, script.expose(), init),
        None => Ok(()),
    }
}

fn refuse<T>(field: &str, reason: &'static str, message: String) -> Result<T> {
    Err(Error::field(Stage::Inject, field, message).with_reason(reason))
}

/// What a change is for, in the report.
fn why(unit: &UnitSetup) -> String {
    let word = match unit.state {
        UnitState::Enabled => "is started at boot",
        UnitState::Disabled => "is not started at boot",
        UnitState::Masked => "can't be started",
    };
    format!("{} {word}, as the request says", unit.name)
}
