//! A seed for the image's own cloud-init (datasource NoCloud), in the root filesystem, when it is asked for: cloud-init then writes the network
//! configuration for whatever it finds in the guest.
//!
//! Only the network is left to it. Host name, SSH keys and accounts are injected as always, so the seed's user-data keeps cloud-init from
//! changing them: without `ssh_deletekeys: false` it would remove the host keys at the first boot.

use crate::{
    error::Result,
    guest::{
        config::{BackendKind, Network},
        facts::GuestFacts,
        network::{
            Guest, GuestFile, NetRenderer, Presence, Rendered,
            netplan::{Reader, document},
        },
        plan::Plan,
        tree::present,
    },
};

/// Where the NoCloud datasource looks without a device.
pub const SEED: &str = "/var/lib/cloud/seed/nocloud";
/// Read after everything that an image has: cloud-init sorts by name.
const DATASOURCE: &str = "/etc/cloud/cloud.cfg.d/99_zz_cloudlet_datasource.cfg";

/// The renderer for cloud-init's seed.
pub struct CloudInit;

impl NetRenderer for CloudInit {
    fn kind(&self) -> BackendKind {
        BackendKind::CloudInit
    }

    fn presence(&self, facts: &GuestFacts) -> Presence {
        if is_installed(facts) { Presence::OnRequest("cloud-init is in the image".into()) } else { Presence::Absent }
    }

    fn owns(&self, path: &str) -> bool {
        path.strip_prefix(SEED).is_some_and(|rest| rest.starts_with('/'))
    }

    fn render(&self, network: &Network, guest: &Guest<'_>) -> Result<Rendered> {
        let config = format!("{SEED}/network-config");
        // The identifier decides whether cloud-init takes the boot for an instance's first.
        let meta = format!("instance-id: {}\n", guest.identity.uuid_of("cloud-init"));
        let user = "#cloud-config\npreserve_hostname: true\nmanage_etc_hosts: false\nssh_deletekeys: false\n".to_owned();
        let datasource = "# Written by cloudletd.\ndatasource_list: [ NoCloud, None ]\n".to_owned();
        let file = |path: String, content: String, mode: u16, why: &str| GuestFile { path, content, mode, why: why.to_owned() };
        let files = vec![
            file(config.clone(), document(network, Reader::CloudInit, &config)?, 0o600, "network configuration for cloud-init"),
            file(format!("{SEED}/meta-data"), meta, 0o600, "tells cloud-init which instance this is"),
            file(format!("{SEED}/user-data"), user, 0o600, "keeps cloud-init from undoing what is injected"),
            file(DATASOURCE.into(), datasource, 0o644, "cloud-init must use the seed and look no further"),
        ];
        let notes = vec!["cloud-init writes the network configuration at the first boot, from the seed".to_owned()];
        let by_route = network.interfaces.iter().any(|interface| {
            let by_route = |gateway| interface.metric.is_some() || interface.is_off_subnet(gateway);
            interface.gateway6.is_some_and(|gateway| by_route(gateway.into())) || interface.routes.iter().any(|route| route.to.prefix == 0)
        });
        // Found by its own net-convert: the prefix length 0 counts as none.
        let warning = "an IPv6 default route with a metric or off-subnet is a route to ::/0, which cloud-init up to 22.4 takes for ::/64";
        let mut warnings: Vec<String> = by_route.then(|| warning.to_owned()).into_iter().collect();
        if network.interfaces.iter().any(|interface| !interface.rules.is_empty()) {
            warnings.push("cloud-init hands routing rules on to netplan only; its other renderers leave them out".into());
        }
        Ok(Rendered { files, notes, warnings, ..Rendered::default() })
    }
}

/// Whether the image has cloud-init.
pub fn is_installed(facts: &GuestFacts) -> bool {
    present(facts, "/usr/bin/cloud-init") || facts.exists("/etc/cloud/cloud.cfg")
}

/// Removes what keeps the image's cloud-init from running or from configuring the network.
pub fn let_it_run(plan: &mut Plan<'_>, facts: &GuestFacts) -> Result<()> {
    if facts.exists("/etc/cloud/cloud-init.disabled") {
        plan.remove("/etc/cloud/cloud-init.disabled", "cloud-init is asked to configure the network")?;
    }
    let files: Vec<&str> = facts.children("/etc/cloud/cloud.cfg.d").map(|(name, _)| name).filter(|name| name.ends_with(".cfg")).collect();
    for name in files {
        let path = format!("/etc/cloud/cloud.cfg.d/{name}");
        if path != DATASOURCE && facts.text(&path).is_some_and(disables_network) {
            plan.remove(&path, "keeps cloud-init from configuring the network")?;
        }
    }
    Ok(())
}

/// Whether a file says `network: {config: disabled}`, in one line or two.
fn disables_network(text: &str) -> bool {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let squeezed: String = lines.flat_map(str::chars).filter(|c| !c.is_whitespace() && !"{}'\"".contains(*c)).collect();
    squeezed.contains("network:config:disabled")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_that_disable_the_network_are_seen() {
        assert!(disables_network("# x\nnetwork: {config: disabled}\n"));
        assert!(disables_network("network:\n  config: disabled\n"));
        assert!(!disables_network("#network: {config: disabled}\nusers: []\n"));
    }
}
