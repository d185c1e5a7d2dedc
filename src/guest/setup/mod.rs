//! What an instance is asked to be beyond name, keys, files and network: accounts and who may log in. The default asks for nothing.
//!
//! The words of each enum are the same in JSON documents, in the protocol and in messages; [`std::str::FromStr`] is their one reader.

mod check;

use std::str::FromStr;

pub(crate) use check::{check, check_file, check_unit_name};

use serde_json::{Map, Value};

use crate::{
    guest::{config::Secret, scrub::Operation},
    names::GuestPath,
};

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GuestSetup {
    /// Users to make, or to change where the image has them, in order.
    pub users: Vec<UserSetup>,
    /// How root may log in.
    pub root_login: RootLogin,
    /// Which SSH host keys are made; Ed25519 and ECDSA when empty.
    pub ssh_host_key_types: Vec<KeyType>,
    /// Time zone, e.g. `Europe/Berlin`; the image's when not given.
    pub timezone: Option<String>,
    /// Locale, e.g. `de_DE.UTF-8`; the image's when not given.
    pub locale: Option<String>,
    /// Console keymap or keyboard layout, e.g. `de`; the image's when not given.
    pub keymap: Option<String>,
    /// What the hardware clock shows; the image's setting when not given.
    pub hardware_clock: Option<HardwareClock>,
    /// Operations of [`crate::guest::scrub`] that are left out although they are done unless said otherwise.
    pub scrub_skip: Vec<Operation>,
    /// Operations of [`crate::guest::scrub`] that are done besides.
    pub scrub_also: Vec<Operation>,
    /// Services that are started at boot, or not.
    pub units: Vec<UnitSetup>,
    /// Runs as root at the first boot, after the network is up, until it has succeeded once. Begins with `#!`.
    pub first_boot_script: Option<Secret>,
    /// A seed for the image's cloud-init.
    pub cloud_init: Option<CloudInitSeed>,
    /// How files get their SELinux labels.
    pub selinux: Selinux,
}

/// What is done about SELinux, in images that use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Selinux {
    /// Labels by the image's policy where its tree came with labels, else the guest relabels itself.
    #[default]
    Auto,
    /// The guest relabels itself at its first boot.
    Relabel,
    /// Nothing.
    Leave,
}

/// One service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitSetup {
    /// Name of a systemd unit with its suffix, which images with another init take without `.service`.
    pub name: String,
    /// What becomes of it.
    pub state: UnitState,
}

/// Whether a service is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitState {
    /// At boot.
    Enabled,
    /// Not by itself.
    Disabled,
    /// Not at all (systemd only).
    Masked,
}

/// What cloud-init's NoCloud datasource finds in the root filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudInitSeed {
    /// `user-data`: as cloud-init takes it, e.g. beginning with `#cloud-config` or `#!`.
    pub user_data: Secret,
    /// `vendor-data`.
    pub vendor_data: Option<Secret>,
    /// Members of `meta-data` besides `instance-id` and `local-hostname`, which are given if these do not.
    pub meta_data: Map<String, Value>,
}

/// One user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserSetup {
    /// Login name.
    pub name: String,
    /// Numeric id; the image's next free one by its login.defs when not given. A user that exists keeps its own, which must be this one.
    pub uid: Option<u32>,
    /// Whole name, for the comment field; no `:`, `,` or control characters.
    pub full_name: Option<String>,
    /// Home; `/home/NAME` (or below what the image's useradd defaults say) when not given. Only for users that are made.
    pub home: Option<GuestPath>,
    /// Login shell; what the image's useradd defaults say when not given.
    pub shell: Option<GuestPath>,
    /// Supplementary groups, which the image must have.
    pub groups: Vec<String>,
    /// Whether the user may become root.
    pub sudo: Sudo,
    /// What happens to the password.
    pub password: Password,
}

impl UserSetup {
    /// A user of whom only the name is given.
    pub fn named(name: &str) -> Self {
        UserSetup {
            name: name.to_owned(),
            uid: None,
            full_name: None,
            home: None,
            shell: None,
            groups: Vec::new(),
            sudo: Sudo::No,
            password: Password::Keep,
        }
    }
}

/// A user's password field in shadow(5).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Password {
    /// As the image has it; a user that is made has none that matches.
    #[default]
    Keep,
    /// A crypt(5) hash.
    Hash(Secret),
    /// No password matches; keys do.
    Locked,
}

/// Whether a user may become root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sudo {
    /// As the image has it.
    #[default]
    No,
    /// With the user's password.
    WithPassword,
    /// Without being asked.
    WithoutPassword,
}

/// How root may log in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RootLogin {
    /// As the image has it.
    #[default]
    Image,
    /// Over SSH with a key only; on a console with the password, if there is one.
    KeysOnly,
    /// Over SSH with the password too.
    Password,
    /// Not at all: no password matches, SSH refuses root, the image's authorized keys of root are removed.
    No,
}

/// The kinds of SSH host keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyType {
    /// Ed25519 (RFC 8709).
    Ed25519,
    /// ECDSA on NIST P-256 (RFC 5656).
    Ecdsa,
    /// RSA with 3072 bits. Takes a second or more to make.
    Rsa,
}

/// What a machine's hardware clock shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HardwareClock {
    /// UTC.
    Utc,
    /// Local time.
    Local,
}

/// Makes [`FromStr`] and the list of words of an enum.
macro_rules! words {
    ($type:ty, $($word:literal => $value:expr),+ $(,)?) => {
        impl FromStr for $type {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok($value),)+
                    other => Err(format!("{:?} is not one of {}", other.chars().take(32).collect::<String>(), [$($word),+].join(", "))),
                }
            }
        }
    };
}

words!(Sudo, "no" => Sudo::No, "password" => Sudo::WithPassword, "nopasswd" => Sudo::WithoutPassword);
words!(UnitState, "enabled" => UnitState::Enabled, "disabled" => UnitState::Disabled, "masked" => UnitState::Masked);
words!(Selinux, "auto" => Selinux::Auto, "relabel" => Selinux::Relabel, "leave" => Selinux::Leave);
words!(KeyType, "ed25519" => KeyType::Ed25519, "ecdsa" => KeyType::Ecdsa, "rsa" => KeyType::Rsa);
words!(HardwareClock, "utc" => HardwareClock::Utc, "local" => HardwareClock::Local);
words!(RootLogin, "image" => RootLogin::Image, "keys-only" => RootLogin::KeysOnly, "password" => RootLogin::Password, "no" => RootLogin::No);

impl Sudo {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Sudo::No => "no",
            Sudo::WithPassword => "password",
            Sudo::WithoutPassword => "nopasswd",
        }
    }
}
