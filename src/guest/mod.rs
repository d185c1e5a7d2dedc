//! Injection: what makes an instance out of an image, as pure data.
//!
//! [`inject`] takes the facts of a golden image ([`facts::GuestFacts`]), the configuration of the instance ([`config::InstanceConfig`]) and its
//! identity ([`identity::Identity`]) and gives a list of edits with a report that says what, why and by whom. It reads nothing else and writes
//! nothing: the same inputs give the same edits, on every host and for every target, and they can be shown before they are applied.
//!
//! ```text
//!  facts ──┐   scrub        leftovers of the machine the image was made on are removed
//!  config ─┼─▶ hostname     /etc/hostname, /etc/hosts
//!  identity┘   machine_id   /etc/machine-id
//!              ssh          host keys from the identity's seed
//!              seed         the random generator's seed
//!              regional     time zone, locale, keymap, hardware clock
//!              accounts     users, root's password and login, authorized keys, sudo
//!              network      one back-end's files, names by MAC, resolv.conf; what would shadow them is removed
//!              fstab        the root line, and those of further devices
//!              services     units, first-boot script
//!              cloud_init   what cloud-init must not undo
//!              files        what the caller wants besides
//!              selinux      labels by the image's policy, or a request to relabel
//!              applied      /.cloudlet/applied_config, without secrets
//! ```
//!
//! Rules that hold for all parts:
//! - What a template of the manifest or a file of the request writes is not written here ([`plan::Plan`]).
//! - What the image contains decides, never the name or version of a distribution; `os-release` only tells habits (the host name's form).
//! - No value with a control character reaches a file: values are typed, and every writer refuses them again (failures.md 14).
//! - Secrets (host keys, shadow, the request's files) are marked; reports and logs show `redacted` for them.
//! - The modes of injected files: host keys, netplan, NetworkManager profiles, authorized_keys 0600; `.ssh` 0700; shadow as the image has it but
//!   never readable by others; machine-id 0444; the rest 0644 (failures.md 19).

pub mod accounts;
pub mod applied;
pub mod cloud_init;
pub mod cloud_seed;
pub mod config;
pub mod decode;
pub mod enablement;
pub mod facts;
pub mod from_image;
pub mod fstab;
pub mod hostname;
pub mod identity;
mod json;
pub mod machine_id;
pub mod network;
pub mod plan;
pub mod regional;
pub mod report;
pub mod resolv;
pub mod scrub;
pub mod seed;
pub mod selinux;
pub mod services;
pub mod setup;
pub mod ssh;
pub mod tree;
pub mod validate;
pub mod watch;

use std::collections::BTreeSet;

use crate::{
    error::Result,
    fs::edit::{Attrs, Edit},
    guest::{config::InstanceConfig, facts::GuestFacts, fstab::RootMount, identity::Identity, plan::Plan, report::Report},
    units::Timestamp,
};

/// Everything injection looks at.
pub struct Inputs<'a> {
    /// The image.
    pub facts: &'a GuestFacts,
    /// What the caller wants; checked again by [`validate::validate`].
    pub config: &'a InstanceConfig,
    /// Who the instance is.
    pub identity: &'a Identity,
    /// Absolute paths that the manifest's templates write.
    pub claimed: &'a BTreeSet<String>,
    /// Names of `args` whose values are secret and must not be recorded in the guest.
    pub secret_args: &'a BTreeSet<String>,
    /// What fstab says about `/` and the instance's further devices; `None` leaves fstab alone.
    pub fstab_root: Option<&'a RootMount>,
    /// Recorded as the time the configuration was applied.
    pub now: Timestamp,
}

/// What injection wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Injection {
    /// The edits, in order.
    pub edits: Vec<Edit>,
    /// The account of them.
    pub report: Report,
}

/// Computes the edits. `Kind::InvalidRequest` names the wrong field (a user that the image does not have, a gateway that can't be reached),
/// `Kind::Unsupported` what the image can't do (`NO_NETWORK_BACKEND`, `GUEST_FILE_UNREADABLE`).
pub fn inject(inputs: &Inputs<'_>) -> Result<Injection> {
    let Inputs { facts, config, identity, claimed, secret_args, fstab_root, now } = *inputs;
    validate::validate(config)?;
    let mut plan = Plan::new(facts, claimed);
    for file in &config.files {
        plan.claim_for_caller(&file.path.display());
    }
    scrub::remove_leftovers(&mut plan, facts, config)?;
    let hostname = hostname::write_hostname(&mut plan, facts, config)?;
    let machine_id = config.machine_id.clone().unwrap_or_else(|| identity.machine_id_hex());
    machine_id::write_machine_id(&mut plan, facts, &machine_id)?;
    seed::write_random_seed(&mut plan, facts, config, identity)?;
    regional::write_settings(&mut plan, facts, config)?;
    let ssh_host_keys = ssh::write_host_keys(&mut plan, facts, config, identity, hostname.as_ref().map(|name| name.as_str()))?;
    let (users, owners) = accounts::write_accounts(&mut plan, facts, config, now)?;
    let network = match &config.network {
        Some(network) => Some(network::apply(&mut plan, facts, network, identity)?),
        None => {
            plan.notes.push("no network is given: the image's own network configuration is left alone".into());
            None
        }
    };
    if let Some(root) = fstab_root {
        fstab::write_fstab(&mut plan, facts, root)?;
    }
    for (index, file) in config.files.iter().enumerate() {
        let (uid, gid) = owners.of(&format!("files[{index}]"), file)?;
        let attrs = Attrs { mode: file.mode, uid, gid, xattrs: file.xattrs.clone() };
        plan.write_callers(&file.path, file.content.expose(), attrs);
    }
    services::write_services(&mut plan, facts, config)?;
    cloud_init::write_seed(&mut plan, facts, config, identity, hostname.as_ref().map(|name| name.as_str()))?;
    let done =
        cloud_init::Done { hostname: hostname.is_some(), host_keys: config.ssh_host_keys == config::HostKeys::Keep || !ssh_host_keys.is_empty() };
    cloud_init::write_settings(&mut plan, facts, done)?;
    let (mut labeller, relabel) = selinux::Labeller::of(facts, config.setup.selinux);
    selinux::relabel(&mut plan, relabel)?;
    applied::write_applied_config(&mut plan, config, secret_args, &machine_id, now)?;
    let (edits, changes, notes, warnings) = plan.finish(&mut labeller);
    let hostname = hostname.map(|name| name.to_string());
    Ok(Injection { edits, report: Report { hostname, machine_id, network, ssh_host_keys, users, changes, notes, warnings } })
}
