//! Accounts of the image: root's password hash and authorized keys.
//!
//! passwd(5) and shadow(5) are parsed as data; no NSS, crypt or locale of the tree is ever used (failures.md 4). Nothing is decided by names
//! that the image does not have. A password is only ever taken as a crypt(5) hash: a cleartext password is refused, and without a hash the
//! account stays as the image has it.

use crate::{
    error::{Error, Kind, Result, Stage},
    fs::edit::Attrs,
    guest::{
        config::{AuthorizedKeys, InstanceConfig},
        facts::{GuestFacts, NodeKind},
        plan::{Plan, Visibility},
        ssh::keyword,
    },
};

/// One line of passwd(5), as far as it is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Account<'t> {
    password: &'t str,
    uid: u32,
    gid: u32,
    home: &'t str,
    shell: &'t str,
}

/// Homes that packages give to accounts which have none.
const NO_HOMES: [&str; 5] = ["/", "/nonexistent", "/dev/null", "/var/empty", "/proc"];

/// Sets the root password hash and writes the authorized keys of each user named. `Kind::InvalidRequest` names the field when a user does not
/// exist in the image or has no home.
pub fn write_accounts(plan: &mut Plan<'_>, facts: &GuestFacts, config: &InstanceConfig) -> Result<()> {
    match &config.root_password_hash {
        Some(hash) => set_root_hash(plan, facts, hash.expose())?,
        None => warn_of_empty_root_password(plan, facts),
    }
    if config.authorized_keys.iter().any(|keys| !keys.keys.is_empty()) {
        warn_of_other_key_files(plan, facts);
    }
    for keys in &config.authorized_keys {
        write_authorized_keys(plan, facts, keys)?;
    }
    Ok(())
}

/// Writes `~user/.ssh/authorized_keys`. The file is written as given and **replaces** what the image had: a key of the image's builder must not
/// stay valid on an instance whose keys are managed. The directory becomes 0700 and the file 0600, both the user's (sshd's StrictModes).
fn write_authorized_keys(plan: &mut Plan<'_>, facts: &GuestFacts, keys: &AuthorizedKeys) -> Result<()> {
    let field = format!("authorized_keys.{}", keys.user);
    let account = account(facts, &keys.user).ok_or_else(|| {
        Error::field(Stage::Inject, field.clone(), format!("the image's /etc/passwd has no user {:?}", keys.user)).with_reason("NO_SUCH_USER")
    })?;
    let home = account.home.trim_end_matches('/');
    if home.is_empty() || NO_HOMES.contains(&home) || crate::guest::plan::guest_path(home).is_err() {
        let message = format!("the user's home is {:?}, where no keys can be kept", account.home);
        return Err(Error::field(Stage::Inject, field, message).with_reason("USER_WITHOUT_HOME"));
    }
    let attrs = |mode| Attrs { mode, uid: account.uid, gid: account.gid, xattrs: Vec::new() };
    let directory = format!("{home}/.ssh");
    let file = format!("{directory}/authorized_keys");
    if let Some(who) = plan.claimant(&file) {
        plan.notes.push(format!("{file} is left to {who}"));
        return Ok(());
    }
    // Only there do the facts list homes; elsewhere one that is not listed may well exist, and its mode must stay.
    if (home == "/root" || home.starts_with("/home/")) && facts.resolve(home).is_none() {
        plan.make_dir(home, attrs(0o700), format!("the home of {} is not in the image", keys.user))?;
    }
    if facts.node(&directory).is_some_and(|node| node.kind != NodeKind::Directory) {
        // A link here could lead the write, and its mode, to somewhere else in the tree.
        plan.remove(&directory, "keys go into a directory, not through a link or file")?;
    }
    plan.make_dir(&directory, attrs(0o700), format!("authorized keys of {}", keys.user))?;
    if facts.node(&file).is_some() {
        plan.notes.push(format!("{file} of the image is replaced: only the keys of the request stay valid"));
    }
    let mut content = keys.keys.join("\n");
    if !content.is_empty() {
        content.push('\n');
    }
    plan.write_as(&file, content, attrs(0o600), format!("{} authorized key(s) of {}", keys.keys.len(), keys.user), Visibility::Open)?;
    if ["nologin", "false", "true", "sync"].contains(&account.shell.rsplit('/').next().unwrap_or_default()) {
        plan.warnings.push(format!("{} has the shell {}: the keys give no shell", keys.user, account.shell));
    }
    Ok(())
}

/// Looks a user up the way getpwnam(3) reads the file: the first line with that name wins.
fn account<'t>(facts: &'t GuestFacts, user: &str) -> Option<Account<'t>> {
    facts.text("/etc/passwd")?.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        match fields[..] {
            [name, password, uid, gid, _, home, shell] if name == user => {
                Some(Account { password, uid: uid.parse().ok()?, gid: gid.parse().ok()?, home, shell })
            }
            _ => None,
        }
    })
}

/// sshd_config(5) AuthorizedKeysFile elsewhere means that the file written here is never read.
fn warn_of_other_key_files(plan: &mut Plan<'_>, facts: &GuestFacts) {
    let Some(text) = facts.text("/etc/ssh/sshd_config") else { return };
    let elsewhere = text.lines().filter_map(|line| keyword(line, "AuthorizedKeysFile")).find(|value| !value.contains(".ssh/authorized_keys"));
    if let Some(value) = elsewhere {
        plan.warnings.push(format!("sshd_config reads keys from {value:?}, not from ~/.ssh/authorized_keys where they are written"));
    }
}

fn warn_of_empty_root_password(plan: &mut Plan<'_>, facts: &GuestFacts) {
    let inline = account(facts, "root").is_some_and(|root| root.password.is_empty());
    let shadow = facts.text("/etc/shadow").is_some_and(|text| text.lines().any(|line| line.starts_with("root::")));
    if inline || shadow {
        plan.warnings.push("root has an empty password in the image and no hash is given: it stays empty".into());
    }
}

/// Puts the hash into root's line of /etc/shadow. All other lines, their order and root's other fields stay byte for byte.
fn set_root_hash(plan: &mut Plan<'_>, facts: &GuestFacts, hash: &[u8]) -> Result<()> {
    let hash = std::str::from_utf8(hash).ok().filter(|hash| check_crypt_hash(hash).is_ok());
    let hash = hash.ok_or_else(|| Error::field(Stage::Inject, "root_password_hash", "is not a crypt(5) hash"))?;
    let why = "root password hash";
    let (content, attrs) = match facts.resolve("/etc/shadow") {
        Some((_, node)) => {
            let text = facts.text("/etc/shadow").ok_or_else(|| unreadable("/etc/shadow"))?;
            (with_root_field(text, hash), Attrs { mode: node.mode, uid: node.uid, gid: node.gid, xattrs: Vec::new() })
        }
        None => (format!("root:{hash}:19000:0:99999:7:::\n"), Attrs::root(0o600)),
    };
    // A shadow file that anybody may read would hand out the hash (shadow-utils makes it 0640 root:shadow, Fedora 0000).
    let attrs = Attrs { mode: attrs.mode & 0o640, ..attrs };
    if content.lines().any(|line| line.starts_with("root:") && line.split(':').nth(2) == Some("0")) {
        plan.notes.push("root's password is marked as expired in the image: the first login has to change it".into());
    }
    plan.write_as("/etc/shadow", content, attrs, why, Visibility::Secret)?;
    let inline = account(facts, "root").filter(|root| root.password != "x");
    if inline.is_some() {
        // passwd(5): only "x" makes the shadow entry count.
        let text = facts.text("/etc/passwd").ok_or_else(|| unreadable("/etc/passwd"))?;
        let node = facts.resolve("/etc/passwd").map(|(_, node)| node.clone()).ok_or_else(|| unreadable("/etc/passwd"))?;
        let attrs = Attrs { mode: node.mode, uid: node.uid, gid: node.gid, xattrs: Vec::new() };
        plan.write_as("/etc/passwd", with_root_field(text, "x"), attrs, "root's password is in /etc/shadow", Visibility::Open)?;
    }
    let musl = facts.resolve("/lib").is_some_and(|(lib, _)| facts.children(&lib).any(|(name, _)| name.starts_with("ld-musl-")));
    if musl && hash.starts_with("$y$") {
        plan.warnings.push("the image uses musl, whose crypt does not know yescrypt ($y$): use $6$ or $2b$".into());
    }
    Ok(())
}

/// `text` with the second field of root's first line replaced; a line is added when there is none.
fn with_root_field(text: &str, value: &str) -> String {
    let mut found = false;
    let mut lines: Vec<String> = Vec::new();
    for line in text.split('\n') {
        let mut fields: Vec<&str> = line.split(':').collect();
        if !found && fields.len() >= 2 && fields[0] == "root" {
            found = true;
            fields[1] = value;
        }
        lines.push(fields.join(":"));
    }
    if !found {
        lines.insert(0, format!("root:{value}:19000:0:99999:7:::"));
    }
    lines.join("\n")
}

fn unreadable(path: &str) -> Error {
    Error::new(Kind::Unsupported, Stage::Inject, path, "is too large or not UTF-8 text, it can't be edited").with_reason("GUEST_FILE_UNREADABLE")
}

/// Accepts the hashes of crypt(5) that are still sound: SHA-512 (`$6$`), SHA-256 (`$5$`), yescrypt (`$y$`), bcrypt (`$2b$`), each with its exact
/// shape. Everything else, cleartext first of all, is refused; the message never repeats the value.
pub fn check_crypt_hash(hash: &str) -> Result<(), String> {
    const SHAPES: &str = "give a crypt(5) hash of the form $6$…, $5$…, $y$… or $2b$…, e.g. from \"mkpasswd -m yescrypt\" or \"openssl passwd -6\"";
    let alphabet = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'/');
    let fields: Vec<&str> = hash.split('$').collect();
    let sha = |salt: &str, digest: &str, len: usize| (1..=16).contains(&salt.len()) && alphabet(salt) && digest.len() == len && alphabet(digest);
    let sha_len = |kind: &str| if kind == "6" { 86 } else { 43 };
    let right = match fields[..] {
        ["", kind @ ("6" | "5"), salt, digest] => sha(salt, digest, sha_len(kind)),
        ["", kind @ ("6" | "5"), rounds, salt, digest] => {
            let count = rounds.strip_prefix("rounds=").and_then(|count| count.parse::<u32>().ok());
            count.is_some_and(|count| (1000..=999_999_999).contains(&count)) && sha(salt, digest, sha_len(kind))
        }
        ["", "y", params, salt, digest] => {
            (1..=16).contains(&params.len())
                && alphabet(params)
                && (1..=86).contains(&salt.len())
                && alphabet(salt)
                && digest.len() == 43
                && alphabet(digest)
        }
        ["", "2b", cost, rest] => {
            cost.len() == 2 && cost.parse::<u8>().is_ok_and(|cost| (4..=31).contains(&cost)) && rest.len() == 53 && alphabet(rest)
        }
        _ => false,
    };
    if right { Ok(()) } else { Err(format!("is not a crypt(5) hash ({} characters); {SHAPES}", hash.chars().count())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA512: &str = "$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc.eoxqOmSuNp2xS0ktL3nh/";

    #[test]
    fn only_sound_crypt_hashes_are_accepted_and_the_value_is_not_repeated() {
        let yescrypt = format!("$y$j9T$F5Jx5fExrKuPp53xLKQ..1${}", "a".repeat(43));
        let bcrypt = format!("$2b$12${}", "a".repeat(53));
        let rounds = SHA512.replace("$6$", "$6$rounds=5000$");
        for good in [SHA512, &yescrypt, &bcrypt, &rounds] {
            assert_eq!(check_crypt_hash(good), Ok(()), "{good}");
        }
        let bad = ["", "hunter2", "*", "!", "x", "$1$abc$0123456789012345678901", "$6$salt$short", "$6$sa:lt$", "$2b$99$", "$6$"];
        for bad in bad {
            assert!(check_crypt_hash(bad).is_err_and(|message| bad.len() < 4 || !message.contains(bad)), "{bad}");
        }
        for tail in ["\n", ":", "\r", "\0", "é"] {
            assert!(check_crypt_hash(&format!("{SHA512}{tail}")).is_err(), "{tail:?}");
        }
    }

    #[test]
    fn only_the_second_field_of_root_changes() {
        let text = "daemon:*:1:0:99999:7:::\nroot:!:19000:1:2:3:4:5:\nroots:*:1::::::\nroot:second:1::::::";
        assert_eq!(with_root_field(text, "H"), "daemon:*:1:0:99999:7:::\nroot:H:19000:1:2:3:4:5:\nroots:*:1::::::\nroot:second:1::::::");
        assert_eq!(with_root_field("a:b:\n", "H"), "root:H:19000:0:99999:7:::\na:b:\n");
    }
}
