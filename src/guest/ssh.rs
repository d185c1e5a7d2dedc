//! SSH host keys: Ed25519 and ECDSA P-256, made from the identity's seed, in OpenSSH's own file format.
//!
//! Private keys are 0600 and public ones 0644, both owned by root, as sshd(8) demands (`sshd` refuses private keys that others can read).
//! The image's own keys are removed by `scrub`, so that no two instances share one (cloud-init #3268).

use ssh_key::{Algorithm, EcdsaCurve, HashAlg, LineEnding, PrivateKey};

use crate::{
    error::{Error, Result, Stage},
    fs::edit::Attrs,
    guest::{
        config::{HostKeys, InstanceConfig},
        facts::GuestFacts,
        identity::Identity,
        plan::{Plan, Visibility},
        report::HostKeyReport,
        tree::present,
    },
};

/// The host keys that are made: file name part and algorithm. RSA is left to guests that want it: generation takes seconds and no supported
/// client needs it.
const KEYS: [(&str, Algorithm); 2] = [("ed25519", Algorithm::Ed25519), ("ecdsa", Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 })];

/// Writes fresh host keys when the image has an OpenSSH server and the configuration asks for them. Gives the account of their public halves.
pub fn write_host_keys(
    plan: &mut Plan<'_>,
    facts: &GuestFacts,
    config: &InstanceConfig,
    identity: &Identity,
    hostname: Option<&str>,
) -> Result<Vec<HostKeyReport>> {
    let server = present(facts, "/usr/sbin/sshd") || present(facts, "/etc/ssh/sshd_config");
    if config.ssh_host_keys == HostKeys::Remove && server {
        // Red Hat's family and cloud-init make keys at boot; Debian's package does so only when it is installed.
        let maker = ["/usr/lib/systemd/system/sshd-keygen.target", "/usr/lib/systemd/system/sshd-keygen@.service", "/usr/bin/cloud-init"];
        if !maker.iter().any(|path| present(facts, path)) {
            plan.warnings.push("the SSH host keys are removed and nothing is seen in the image that makes new ones at boot".into());
        }
    }
    if config.ssh_host_keys != HostKeys::Fresh {
        return Ok(Vec::new());
    }
    if !server {
        plan.notes.push("no SSH host keys are made: the image has no OpenSSH server".into());
        return Ok(Vec::new());
    }
    let names = known_names(config, hostname);
    let mut reports = Vec::new();
    for (name, algorithm) in KEYS {
        let path = format!("/etc/ssh/ssh_host_{name}_key");
        let key = host_key(identity, name, algorithm)?;
        let failed = |error: ssh_key::Error| Error::internal(Stage::Inject, path.clone(), "encode the host key").with_source(error);
        let private = key.to_openssh(LineEnding::LF).map_err(failed)?;
        let public = key.public_key().to_openssh().map_err(failed)?;
        plan.write_as(&path, private.as_bytes(), Attrs::root(0o600), "fresh SSH host key", Visibility::Secret)?;
        plan.write(&format!("{path}.pub"), format!("{public}\n"), 0o644, "public half of the fresh SSH host key")?;
        // known_hosts has no comment: the first two fields of the public key.
        let bare: Vec<&str> = public.split(' ').take(2).collect();
        reports.push(HostKeyReport {
            algorithm: key.algorithm().as_str().to_owned(),
            fingerprint: key.fingerprint(HashAlg::Sha256).to_string(),
            known_hosts: format!("{names} {}", bare.join(" ")),
        });
    }
    note_configured_keys(plan, facts);
    Ok(reports)
}

/// One host key; the same identity gives the same key.
fn host_key(identity: &Identity, name: &str, algorithm: Algorithm) -> Result<PrivateKey> {
    let mut stream = identity.expand(&format!("ssh-host-key:{name}"));
    let mut key = PrivateKey::random(&mut stream, algorithm)
        .map_err(|error| Error::internal(Stage::Inject, format!("ssh_host_{name}_key"), "generate a host key").with_source(error))?;
    key.set_comment(format!("root@{}", identity.instance));
    Ok(key)
}

/// The host part of a known_hosts line: all names and static addresses, comma-separated (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT).
fn known_names(config: &InstanceConfig, hostname: Option<&str>) -> String {
    let mut names: Vec<String> = Vec::new();
    if let Some(name) = hostname {
        names.push(name.to_owned());
        if let Some((short, _)) = name.split_once('.') {
            names.push(short.to_owned());
        }
    }
    for interface in config.network.iter().flat_map(|network| &network.interfaces) {
        names.extend(interface.addresses.iter().map(|cidr| cidr.address.to_string()));
    }
    if names.is_empty() { config.instance.to_string() } else { names.join(",") }
}

/// Says so when sshd_config names host keys that are not among those made: sshd refuses to start without any key, and logs each missing one.
fn note_configured_keys(plan: &mut Plan<'_>, facts: &GuestFacts) {
    let Some(text) = facts.text("/etc/ssh/sshd_config") else { return };
    let listed: Vec<&str> = text.lines().filter_map(|line| keyword(line, "HostKey")).collect();
    let made = |path: &str| KEYS.iter().any(|(name, _)| path == format!("/etc/ssh/ssh_host_{name}_key"));
    if !listed.is_empty() && !listed.iter().any(|path| made(path)) {
        plan.warnings.push(format!(
            "sshd_config names only host keys that are not made here ({}): the SSH server starts only if the guest makes them itself",
            listed.join(", ")
        ));
    }
}

/// The value of an sshd_config keyword on this line; keywords are not case-sensitive (sshd_config(5)).
pub(crate) fn keyword<'t>(line: &'t str, name: &str) -> Option<&'t str> {
    let line = line.trim();
    let end = line.find(|c: char| c.is_whitespace() || c == '=')?;
    let (word, rest) = line.split_at(end);
    word.eq_ignore_ascii_case(name).then(|| rest.trim_start_matches(|c: char| c.is_whitespace() || c == '=').trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::guest::config::Secret;

    fn identity(seed: u8) -> Identity {
        Identity::derive(&Uuid::nil(), &"web1".parse().expect("name"), Secret::new(vec![seed; 32])).expect("valid")
    }

    #[test]
    fn host_keys_repeat_themselves_for_one_seed_and_are_pinned() {
        let print = |seed: u8| -> Vec<String> {
            KEYS.into_iter().map(|(n, a)| host_key(&identity(seed), n, a).expect("key").fingerprint(HashAlg::Sha256).to_string()).collect()
        };
        assert_eq!(print(1), print(1));
        assert_ne!(print(1), print(2));
        // A dependency that turns the same stream into other keys would change the keys of instances on a retry: this must stay.
        assert_eq!(print(7), ["SHA256:zMJn3/219fWXUi3dOxX+ZjRFuPzf1g8Ev1F+wHYTCrU", "SHA256:H7jdvjUp0JppsKxUr6r3CMn5caNl0RdRCv/6t7Fjrb8"]);
    }

    #[test]
    fn keys_read_back_as_openssh_files() {
        for (name, algorithm) in KEYS {
            let key = host_key(&identity(3), name, algorithm).expect("key");
            let text = key.to_openssh(LineEnding::LF).expect("encodes");
            let again = PrivateKey::from_openssh(text.as_bytes()).expect("decodes");
            assert_eq!(again.public_key().key_data(), key.public_key().key_data());
            assert_eq!(again.comment(), "root@web1");
            assert!(text.ends_with("-----END OPENSSH PRIVATE KEY-----\n"), "{name}: OpenSSH wants the final line feed");
        }
    }

    #[test]
    fn sshd_keywords_are_found_in_all_their_spellings() {
        for line in ["HostKey /a", "hostkey\t/a", " HostKey=/a", "HOSTKEY = \"/a\""] {
            assert_eq!(keyword(line, "HostKey"), Some("/a"), "{line}");
        }
        for line in ["#HostKey /a", "HostKeyAlgorithms x", "HostKey"] {
            assert_eq!(keyword(line, "HostKey"), None, "{line}");
        }
    }
}
