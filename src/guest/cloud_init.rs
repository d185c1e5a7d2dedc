//! cloud-init, where the image has it: it must not undo what was written here.
//!
//! At its first boot cloud-init deletes SSH host keys and makes others, and sets the host name from its datasource. A file in cloud.cfg.d says which
//! of these are done already. (`network` says the same of the network, in a file of its own.)

use crate::{
    error::Result,
    guest::{facts::GuestFacts, plan::Plan, tree::present},
};

/// Where: after the distribution's own files and before nothing.
const DROP_IN: &str = "/etc/cloud/cloud.cfg.d/99-cloudlet-identity.cfg";

/// What was written here and is cloud-init's no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Done {
    /// The host name.
    pub hostname: bool,
    /// SSH host keys were made, or the image's are kept.
    pub host_keys: bool,
}

/// Whether the image has cloud-init.
pub fn has_cloud_init(facts: &GuestFacts) -> bool {
    present(facts, "/usr/bin/cloud-init") || facts.exists("/etc/cloud/cloud.cfg")
}

/// Writes the file, where there is a cloud-init to read it.
pub fn write_settings(plan: &mut Plan<'_>, facts: &GuestFacts, done: Done) -> Result<()> {
    if !has_cloud_init(facts) || done == Done::default() {
        return Ok(());
    }
    let mut text = String::from("# Written by cloudletd.\n");
    for (is_done, line) in [(done.hostname, "preserve_hostname: true\n"), (done.host_keys, "ssh_deletekeys: false\n")] {
        if is_done {
            text.push_str(line);
        }
    }
    plan.write(DROP_IN, text, 0o644, "keeps cloud-init from replacing what is configured here")
}
