//! SSH host keys: Ed25519, ECDSA P-256 and RSA, made from the identity's seed, in OpenSSH's own file format, or Dropbear's.
//!
//! Private keys are 0600 and public ones 0644, both owned by root, as sshd(8) demands (`sshd` refuses private keys that others can read).
//! The image's own keys are removed by `scrub`, so that no two instances share one (cloud-init #3268).

use ssh_key::{Algorithm, EcdsaCurve, HashAlg, LineEnding, PrivateKey, PublicKey, private::RsaKeypair};

use crate::{
    error::{Error, Result, Stage},
    fs::edit::Attrs,
    guest::{
        config::{HostKeys, InstanceConfig},
        facts::GuestFacts,
        identity::Identity,
        plan::{Plan, Visibility},
        report::HostKeyReport,
        setup::KeyType,
        tree::present,
    },
};

/// Bits of an RSA key: what ssh-keygen(1) makes.
const RSA_BITS: usize = 3072;

impl KeyType {
    /// The part of the file's name, and the name of the key's stream of key material.
    fn name(self) -> &'static str {
        match self {
            KeyType::Ed25519 => "ed25519",
            KeyType::Ecdsa => "ecdsa",
            KeyType::Rsa => "rsa",
        }
    }

    fn path(self) -> String {
        format!("/etc/ssh/ssh_host_{}_key", self.name())
    }
}

/// Writes fresh host keys when the image has an SSH server and the configuration asks for them. Gives the account of their public halves.
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
    let dropbear = present(facts, "/usr/sbin/dropbear");
    if !server && !dropbear {
        plan.notes.push("no SSH host keys are made: the image has no OpenSSH server".into());
        return Ok(Vec::new());
    }
    let names = known_names(config, hostname);
    let mut reports = Vec::new();
    for kind in key_types(facts, config, server) {
        let key = host_key(identity, kind)?;
        if server {
            write_openssh(plan, kind, &key)?;
        }
        if dropbear {
            write_dropbear(plan, facts, &key)?;
        }
        reports.push(HostKeyReport::of(key.public_key(), &names, hostname)?);
    }
    if server {
        note_configured_keys(plan, facts, &reports);
    }
    Ok(reports)
}

/// Which keys: those asked for; else Ed25519 and ECDSA, and RSA where sshd_config names that one and neither of the others. RSA is otherwise left out:
/// generation takes seconds and no supported client needs it. Dropbear alone gets Ed25519, the one kind whose file is written here.
fn key_types(facts: &GuestFacts, config: &InstanceConfig, server: bool) -> Vec<KeyType> {
    if !server {
        return vec![KeyType::Ed25519];
    }
    let asked = &config.setup.ssh_host_key_types;
    if !asked.is_empty() {
        return asked.clone();
    }
    let listed = configured_keys(facts);
    let names = |kind: KeyType| listed.iter().any(|path| *path == kind.path());
    if names(KeyType::Rsa) && !names(KeyType::Ed25519) && !names(KeyType::Ecdsa) {
        return vec![KeyType::Rsa];
    }
    vec![KeyType::Ed25519, KeyType::Ecdsa]
}

fn failed(what: &str) -> impl FnOnce(ssh_key::Error) -> Error {
    let what = what.to_owned();
    move |error| Error::internal(Stage::Inject, what, "encode the host key").with_source(error)
}

fn write_openssh(plan: &mut Plan<'_>, kind: KeyType, key: &PrivateKey) -> Result<()> {
    let path = kind.path();
    let private = key.to_openssh(LineEnding::LF).map_err(failed(&path))?;
    let public = key.public_key().to_openssh().map_err(failed(&path))?;
    plan.write_as(&path, private.as_bytes(), Attrs::root(0o600), "fresh SSH host key", Visibility::Secret)?;
    plan.write(&format!("{path}.pub"), format!("{public}\n"), 0o644, "public half of the fresh SSH host key")
}

/// Dropbear's own format: the name, then seed and public key as one string, both with their length before them (buf_put_ed25519_priv_key).
fn write_dropbear(plan: &mut Plan<'_>, facts: &GuestFacts, key: &PrivateKey) -> Result<()> {
    let Some(pair) = key.key_data().ed25519() else { return Ok(()) };
    let name = b"ssh-ed25519";
    let mut content = Vec::with_capacity(83);
    content.extend((name.len() as u32).to_be_bytes());
    content.extend(name);
    content.extend(64_u32.to_be_bytes());
    content.extend(pair.private.to_bytes());
    content.extend(pair.public.0);
    if !facts.exists("/etc/dropbear") {
        plan.make_dir("/etc/dropbear", Attrs::root(0o755), "fresh SSH host key")?;
    }
    plan.write_as("/etc/dropbear/dropbear_ed25519_host_key", content, Attrs::root(0o600), "fresh SSH host key", Visibility::Secret)
}

/// One host key; the same identity gives the same key.
fn host_key(identity: &Identity, kind: KeyType) -> Result<PrivateKey> {
    let name = kind.name();
    let mut stream = identity.expand(&format!("ssh-host-key:{name}"));
    let made = match kind {
        KeyType::Ed25519 => PrivateKey::random(&mut stream, Algorithm::Ed25519),
        KeyType::Ecdsa => PrivateKey::random(&mut stream, Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 }),
        KeyType::Rsa => RsaKeypair::random(&mut stream, RSA_BITS).map(PrivateKey::from),
    };
    let mut key = made.map_err(|error| Error::internal(Stage::Inject, format!("ssh_host_{name}_key"), "generate a host key").with_source(error))?;
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

/// The host keys that sshd_config names.
fn configured_keys(facts: &GuestFacts) -> Vec<&str> {
    facts.text("/etc/ssh/sshd_config").into_iter().flat_map(str::lines).filter_map(|line| keyword(line, "HostKey")).collect()
}

/// Says so when sshd_config names host keys that are not among those made: sshd refuses to start without any key, and logs each missing one.
fn note_configured_keys(plan: &mut Plan<'_>, facts: &GuestFacts, made: &[HostKeyReport]) {
    let listed = configured_keys(facts);
    let is_made = |path: &&str| {
        [KeyType::Ed25519, KeyType::Ecdsa, KeyType::Rsa].iter().any(|kind| kind.path() == **path && made.iter().any(|key| key.is(*kind)))
    };
    if !listed.is_empty() && !listed.iter().any(is_made) {
        plan.warnings.push(format!(
            "sshd_config names only host keys that are not made here ({}): the SSH server starts only if the guest makes them itself",
            listed.join(", ")
        ));
    }
}

/// The algorithm's number in SSHFP records (RFC 4255, 6594, 7479); none for what they do not have.
fn sshfp_number(algorithm: &Algorithm) -> Option<u8> {
    match algorithm {
        Algorithm::Rsa { .. } => Some(1),
        Algorithm::Ecdsa { .. } => Some(3),
        Algorithm::Ed25519 => Some(4),
        _ => None,
    }
}

impl HostKeyReport {
    /// The account of a public key; `names` are the host part of its known_hosts line, `hostname` owns its DNS record.
    pub fn of(key: &PublicKey, names: &str, hostname: Option<&str>) -> Result<Self> {
        let algorithm = key.algorithm();
        let public = key.to_openssh().map_err(failed(algorithm.as_str()))?;
        // known_hosts has no comment: the first two fields of the public key.
        let bare: Vec<&str> = public.split(' ').take(2).collect();
        let fingerprint = key.fingerprint(HashAlg::Sha256);
        let hex: String = fingerprint.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        // A name with a domain is whole: without the dot a zone's own name would be added to it.
        let owner = hostname.map(|name| if name.contains('.') { format!("{name}.") } else { name.to_owned() });
        Ok(HostKeyReport {
            algorithm: algorithm.as_str().to_owned(),
            fingerprint: fingerprint.to_string(),
            known_hosts: format!("{names} {}", bare.join(" ")),
            sshfp: owner.zip(sshfp_number(&algorithm)).map(|(owner, number)| format!("{owner} IN SSHFP {number} 2 {hex}")),
        })
    }

    fn is(&self, kind: KeyType) -> bool {
        let prefix = match kind {
            KeyType::Ed25519 => "ssh-ed25519",
            KeyType::Ecdsa => "ecdsa-",
            KeyType::Rsa => "ssh-rsa",
        };
        self.algorithm.starts_with(prefix)
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

    const KEYS: [KeyType; 2] = [KeyType::Ed25519, KeyType::Ecdsa];

    fn identity(seed: u8) -> Identity {
        Identity::derive(&Uuid::nil(), &"web1".parse().expect("name"), Secret::new(vec![seed; 32])).expect("valid")
    }

    #[test]
    fn host_keys_repeat_themselves_for_one_seed_and_are_pinned() {
        let print = |seed: u8| -> Vec<String> {
            KEYS.into_iter().map(|kind| host_key(&identity(seed), kind).expect("key").fingerprint(HashAlg::Sha256).to_string()).collect()
        };
        assert_eq!(print(1), print(1));
        assert_ne!(print(1), print(2));
        // A dependency that turns the same stream into other keys would change the keys of instances on a retry: this must stay.
        assert_eq!(print(7), ["SHA256:zMJn3/219fWXUi3dOxX+ZjRFuPzf1g8Ev1F+wHYTCrU", "SHA256:H7jdvjUp0JppsKxUr6r3CMn5caNl0RdRCv/6t7Fjrb8"]);
    }

    #[test]
    fn keys_read_back_as_openssh_files() {
        for kind in KEYS {
            let key = host_key(&identity(3), kind).expect("key");
            let text = key.to_openssh(LineEnding::LF).expect("encodes");
            let again = PrivateKey::from_openssh(text.as_bytes()).expect("decodes");
            assert_eq!(again.public_key().key_data(), key.public_key().key_data());
            assert_eq!(again.comment(), "root@web1");
            assert!(text.ends_with("-----END OPENSSH PRIVATE KEY-----\n"), "{kind:?}: OpenSSH wants the final line feed");
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
