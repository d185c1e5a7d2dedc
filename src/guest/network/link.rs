//! Interface names by hardware address: systemd.link(5) files where systemd's udev is, a udev rule where eudev is.
//!
//! Whether a name sticks is decided by udev, which can't give an interface a name that another one has at that moment: with names in the
//! kernel's own space (`eth0`, `eth1`) and several NICs, swapping them fails. Back-ends that can match by MAC do so and do not depend on it.

use crate::{
    error::Result,
    guest::{
        config::Network,
        facts::GuestFacts,
        network::ini::{Ini, values},
        plan::Plan,
        tree::{has_systemd, has_udev, present},
    },
};

const DIRECTORY: &str = "/etc/systemd/network";

/// Pins the name of every interface that has a MAC, and removes the image's own .link files for the same names or MACs.
pub fn pin_names(plan: &mut Plan<'_>, facts: &GuestFacts, network: &Network) -> Result<()> {
    let pinned: Vec<_> = network.nics().filter_map(|interface| Some((&interface.name, interface.mac?))).collect();
    if pinned.is_empty() {
        return Ok(());
    }
    remove_persistent_rules(plan, facts)?;
    if !has_udev(facts) {
        plan.notes
            .push("interface names are not pinned to MACs: the image has no udev, the kernel names interfaces eth0, eth1, … in bus order".into());
        return Ok(());
    }
    if !has_systemd(facts) && !present(facts, "/usr/lib/systemd/systemd-udevd") {
        let mut rules = String::from("# Written by cloudletd.\n");
        for (name, mac) in &pinned {
            // Only hardware has a driver: a VLAN, bond or bridge on top has the same address.
            rules.push_str(&format!(
                "SUBSYSTEM==\"net\", ACTION==\"add\", DRIVERS==\"?*\", ATTR{{type}}==\"1\", ATTR{{address}}==\"{mac}\", NAME=\"{name}\"\n"
            ));
        }
        return plan.write("/etc/udev/rules.d/70-cloudlet-net.rules", rules, 0o644, "names interfaces by MAC");
    }
    remove_other_links(plan, facts, network)?;
    for (name, mac) in &pinned {
        let path = format!("{DIRECTORY}/10-cloudlet-{name}.link");
        let mut ini = Ini::new();
        ini.section("Match");
        ini.set("MACAddress", mac);
        ini.set("Type", "ether");
        ini.section("Link");
        ini.set("Name", name);
        plan.write(&path, ini.finish(&path)?, 0o644, format!("pins the name {name} to {mac}"))?;
    }
    let kernel_names = pinned.iter().filter(|(name, _)| is_kernel_name(name.as_str())).count();
    if kernel_names > 1 {
        plan.notes.push(format!(
            "{kernel_names} interfaces are pinned to names of the kernel's own (ethN): udev can't swap two of them if the NICs come up in another order"
        ));
    }
    Ok(())
}

/// Rules of generations of generators, cloud-init's among them: they name NICs by addresses of the machine that the image was made on, and udev
/// would take them before a .link file.
fn remove_persistent_rules(plan: &mut Plan<'_>, facts: &GuestFacts) -> Result<()> {
    let Some((directory, _)) = facts.resolve("/etc/udev/rules.d") else { return Ok(()) };
    for (file, _) in facts.children(&directory).filter(|(file, _)| file.contains("persistent-net") && file.ends_with(".rules")) {
        plan.remove(&format!("{directory}/{file}"), "names interfaces by another machine's hardware addresses")?;
    }
    Ok(())
}

fn is_kernel_name(name: &str) -> bool {
    name.strip_prefix("eth").is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

fn remove_other_links(plan: &mut Plan<'_>, facts: &GuestFacts, network: &Network) -> Result<()> {
    let Some((directory, _)) = facts.resolve(DIRECTORY) else { return Ok(()) };
    for (file, _) in facts.children(&directory).filter(|(file, _)| file.ends_with(".link") && !file.starts_with("10-cloudlet-")) {
        let path = format!("{directory}/{file}");
        let Some(text) = facts.text(&path) else { continue };
        let macs: Vec<String> =
            values(text, "Match", "MACAddress").iter().flat_map(|value| value.split_whitespace()).map(str::to_lowercase).collect();
        let names = values(text, "Link", "Name");
        let clash = network
            .nics()
            .find(|interface| names.contains(&interface.name.as_str()) || interface.mac.is_some_and(|mac| macs.contains(&mac.to_string())));
        if let Some(interface) = clash {
            plan.remove(&path, format!("gives a name to the hardware or takes the name of {}", interface.name))?;
        }
    }
    Ok(())
}
