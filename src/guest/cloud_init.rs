//! cloud-init, where the image has it: it must not undo what was written here.
//!
//! At its first boot cloud-init deletes SSH host keys and makes others, and sets the host name from its datasource. A file in cloud.cfg.d says which
//! of these are done already. (`network` says the same of the network, in a file of its own.)

use serde_json::Value;

use crate::{
    error::{Error, Result, Stage},
    fs::edit::Attrs,
    guest::{
        config::InstanceConfig,
        facts::GuestFacts,
        identity::Identity,
        json,
        network::cloud_init::{SEED, is_installed},
        plan::{Plan, Visibility},
    },
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

/// Writes the file, where there is a cloud-init to read it.
pub fn write_settings(plan: &mut Plan<'_>, facts: &GuestFacts, done: Done) -> Result<()> {
    if !is_installed(facts) || done == Done::default() {
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

/// Writes the request's seed. `Kind::InvalidRequest`, `NO_CLOUD_INIT`, when the image has no cloud-init.
///
/// meta-data is JSON, which is YAML. A new `instance-id` is what makes cloud-init run once for this instance. The list of datasources is narrowed to
/// the seed's, so that the guest does not probe for metadata services for minutes.
///
/// With the network back-end `cloud-init` there is one seed, not two: its network-config and the request's documents. What the back-end's own meta-data and
/// user-data say is said by the defaults here and by [`write_settings`].
pub fn write_seed(plan: &mut Plan<'_>, facts: &GuestFacts, config: &InstanceConfig, identity: &Identity, hostname: Option<&str>) -> Result<()> {
    let Some(seed) = &config.setup.cloud_init else { return Ok(()) };
    if !is_installed(facts) {
        let message = "the image has no cloud-init that would read it";
        return Err(Error::field(Stage::Inject, "cloud_init", message).with_reason("NO_CLOUD_INIT"));
    }
    let mut meta = seed.meta_data.clone();
    meta.entry("instance-id").or_insert_with(|| format!("i-{}", identity.uuid_of("cloud-init-instance").simple()).into());
    if let Some(name) = hostname {
        meta.entry("local-hostname").or_insert_with(|| name.into());
    }
    let why = "cloud-init seed of the request";
    plan.make_dir(SEED, Attrs::root(0o700), why)?;
    let empty: &[u8] = b"";
    let vendor = seed.vendor_data.as_ref().map_or(empty, |data| data.expose());
    let meta = json::escaped(&Value::Object(meta));
    for (name, content) in [("meta-data", meta.as_bytes()), ("user-data", seed.user_data.expose()), ("vendor-data", vendor)] {
        let path = format!("{SEED}/{name}");
        if plan.supersede(&path) {
            plan.notes.push(format!("{path} is the request's: the network back-end adds its network-config to that seed"));
        }
        plan.write_as(&path, content, Attrs::root(0o600), why, Visibility::Secret)?;
    }
    plan.write("/etc/cloud/cloud.cfg.d/99-cloudlet-seed.cfg", "# Written by cloudletd.\ndatasource_list: [NoCloud, None]\n", 0o644, why)
}
