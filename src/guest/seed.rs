//! The seed of the kernel's random generator: where the image's init reads one at boot, a new one per instance is written.
//!
//! A virtual machine without a hardware source waits for entropy at its first boot, and an image's own seed is shared by all its instances (so it is
//! removed, [`crate::guest::scrub`]). The new one comes from the identity's secret seed, so that a retry repeats itself. No program credits entropy
//! for it unless told to (systemd-random-seed.service(8), seedrng's `seed.no-credit`): it is on a disk, after all.

use rand_core::RngCore;

use crate::{
    error::Result,
    fs::edit::Attrs,
    guest::{
        config::InstanceConfig,
        facts::GuestFacts,
        identity::Identity,
        plan::{Plan, Visibility},
        scrub::Operation,
        tree::has_systemd,
    },
};

/// What the kernel's pool takes at once (random(4)), and what all programs read.
const LEN: usize = 512;

/// Writes the seed, unless the caller keeps the image's.
pub fn write_random_seed(plan: &mut Plan<'_>, facts: &GuestFacts, config: &InstanceConfig, identity: &Identity) -> Result<()> {
    if !Operation::RandomSeed.is_wanted(config) {
        return Ok(());
    }
    let path = if has_systemd(facts) {
        "/var/lib/systemd/random-seed"
    } else if facts.exists("/etc/init.d/seedrng") {
        "/var/lib/seedrng/seed.no-credit"
    } else if facts.exists("/etc/runlevels") && facts.exists("/etc/init.d/urandom") {
        "/var/lib/misc/random-seed"
    } else if facts.exists("/etc/init.d/urandom") {
        "/var/lib/urandom/random-seed"
    } else {
        return Ok(());
    };
    let mut seed = vec![0; LEN];
    identity.expand("random-seed").fill_bytes(&mut seed);
    if path.starts_with("/var/lib/seedrng/") {
        plan.make_dir("/var/lib/seedrng", Attrs::root(0o700), "random seed of this instance")?;
    }
    plan.write_as(path, seed, Attrs::root(0o600), "random seed of this instance", Visibility::Secret)
}
