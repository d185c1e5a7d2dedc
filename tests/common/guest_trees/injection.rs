//! Injection into a tree, for the instance web1, with everything fixed that a test has no wish about.

use std::collections::BTreeSet;

use cloudletd::{
    error::Error,
    fs::FsKind,
    guest::{
        Injection, Inputs,
        config::{InstanceConfig, Secret},
        facts::GuestFacts,
        fstab::RootMount,
        identity::Identity,
        inject,
    },
    names::InstanceName,
    units::Timestamp,
};

/// A public key that SSH takes.
pub const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ me@example";
/// A password hash of crypt(5).
pub const HASH: &str = "$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc.eoxqOmSuNp2xS0ktL3nh/";

/// The instance's name.
pub fn name() -> InstanceName {
    "web1".parse().expect("name")
}

/// A root filesystem that fstab is to name.
pub fn root_mount() -> RootMount {
    RootMount { source: "UUID=6a1f0a5e-0000-4000-8000-000000000001".into(), fs: FsKind::Ext4, mounts: Default::default() }
}

/// What injection is told besides tree and configuration.
#[derive(Default)]
pub struct Given {
    pub claimed: BTreeSet<String>,
    pub secret_args: BTreeSet<String>,
    pub fstab_root: Option<RootMount>,
    pub now: Timestamp,
}

/// Injects into a tree.
pub fn injected(facts: &GuestFacts, config: &InstanceConfig, given: &Given) -> Result<Injection, Error> {
    let identity = Identity::derive(&uuid::Uuid::from_u128(1), &config.instance, Secret::new(vec![7; 32])).expect("identity");
    let Given { claimed, secret_args, fstab_root, now } = given;
    inject(&Inputs { facts, config, identity: &identity, claimed, secret_args, fstab_root: fstab_root.as_ref(), now: *now })
}
