//! Names and identifiers that are valid by construction: once a value of these types exists, nothing after it re-checks.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::Digest as _;

/// Bounds of a path inside a guest, PATH_MAX and NAME_MAX of Linux (`limits.h`).
pub const PATH_LEN_MAX: usize = 4096;
/// See [`PATH_LEN_MAX`].
pub const NAME_LEN_MAX: usize = 255;

macro_rules! string_name {
    ($(#[$doc:meta])* $name:ident, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The text of the name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                let check: fn(&str) -> Result<(), String> = $check;
                check(text).map(|()| $name(text.to_owned()))
            }
        }
        impl TryFrom<String> for $name {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

fn check_label(text: &str, len_max: usize, extra: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("is empty".into());
    }
    if text.len() > len_max {
        return Err(format!("has {} characters, the limit is {len_max}", text.len()));
    }
    if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err(format!("{text:?} does not start with a letter or digit"));
    }
    match text.chars().find(|c| !c.is_ascii_alphanumeric() && !extra.contains(*c)) {
        Some(bad) => Err(format!("{text:?} contains {bad:?}; allowed are letters, digits and {extra:?}")),
        None => Ok(()),
    }
}

string_name! {
    /// The name of a configured pool: 1..=64 of `A-Z a-z 0-9 . _ -`, starting with a letter or digit.
    PoolName, |text| check_label(text, 64, "._-")
}
string_name! {
    /// The name of a volume inside its pool: 1..=128 of `A-Z a-z 0-9 . _ -`, starting with a letter or digit. Never a path.
    VolumeName, |text| check_label(text, 128, "._-")
}
string_name! {
    /// The name of an instance: 1..=128 of `A-Z a-z 0-9 . _ -`, starting with a letter or digit.
    InstanceName, |text| check_label(text, 128, "._-")
}
string_name! {
    /// The name of a device of an instance: 1..=12 of `a-z 0-9 -`, starting with a letter; short enough for a label of every filesystem.
    DeviceName, check_device
}
string_name! {
    /// A caller's idempotency key: 1..=128 of `A-Z a-z 0-9 . _ : -`, starting with a letter or digit.
    RenderKey, |text| check_label(text, 128, "._:-")
}
string_name! {
    /// A network interface name as Linux accepts it (IFNAMSIZ 16 with the NUL): 1..=15 of `A-Z a-z 0-9 . _ -`, not `.` or `..`.
    InterfaceName, |text| check_label(text, 15, "._-")
}
string_name! {
    /// A host name or fully qualified domain name (RFC 1123): labels of 1..=63 `A-Z a-z 0-9 -`, no label starts or ends with `-`, 253 in all.
    Hostname, check_hostname
}

fn check_device(text: &str) -> Result<(), String> {
    check_label(text, 12, "-")?;
    if !text.starts_with(|c: char| c.is_ascii_lowercase()) || text.contains(|c: char| c.is_ascii_uppercase()) {
        return Err(format!("{text:?} is not a device name: lower-case letters, digits and '-', starting with a letter"));
    }
    Ok(())
}

fn check_hostname(text: &str) -> Result<(), String> {
    if text.is_empty() || text.len() > 253 {
        return Err(format!("a host name has 1 to 253 characters, this has {}", text.len()));
    }
    for label in text.split('.') {
        if label.is_empty() || label.len() > 63 {
            return Err(format!("{text:?}: each label of a host name has 1 to 63 characters"));
        }
        if label.starts_with('-') || label.ends_with('-') {
            return Err(format!("{text:?}: a label of a host name can't start or end with '-'"));
        }
        if let Some(bad) = label.chars().find(|c| !c.is_ascii_alphanumeric() && *c != '-') {
            return Err(format!("{text:?} contains {bad:?}; a host name has letters, digits and '-' (RFC 1123)"));
        }
    }
    Ok(())
}

impl Hostname {
    /// The first label.
    pub fn short(&self) -> &str {
        self.0.split('.').next().unwrap_or(&self.0)
    }

    /// Everything after the first label, if there is any.
    pub fn domain(&self) -> Option<&str> {
        self.0.split_once('.').map(|(_, domain)| domain)
    }
}

/// A SHA-256 digest, written `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Digest(sha2::Sha256::digest(bytes).into())
    }

    /// A digest computed elsewhere.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Digest(bytes)
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 lower-case hexadecimal digits, safe as a file name.
    pub fn hex(&self) -> String {
        use fmt::Write as _;
        self.0.iter().fold(String::with_capacity(64), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let hex = text.strip_prefix("sha256:").ok_or_else(|| format!("{text:?} is not a digest: it must be sha256: and 64 hexadecimal digits"))?;
        if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(format!("{text:?} is not a digest: after sha256: come 64 lower-case hexadecimal digits"));
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
            let digit = |c: u8| if c.is_ascii_digit() { c - b'0' } else { c - b'a' + 10 };
            *byte = digit(pair[0]) << 4 | digit(pair[1]);
        }
        Ok(Digest(bytes))
    }
}

impl TryFrom<String> for Digest {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}
impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}
impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// An Ethernet address; written lower case with colons. Multicast and all-zero addresses are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

impl FromStr for MacAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a MAC address: six pairs of hexadecimal digits separated by ':' or '-'");
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        if bytes[0] & 1 == 1 || bytes == [0; 6] {
            return Err(format!("{text:?} is not the address of one interface (multicast or all zero)"));
        }
        Ok(MacAddr(bytes))
    }
}

impl TryFrom<String> for MacAddr {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}
impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> String {
        mac.to_string()
    }
}
impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An absolute path inside a guest's tree, as bytes, normalised: starts with `/`, no empty, `.` or `..` component, no NUL, no trailing slash,
/// at most [`PATH_LEN_MAX`] bytes with components of at most [`NAME_LEN_MAX`]. The root is `/`. It is never turned into a path of the host.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestPath(Vec<u8>);

impl GuestPath {
    /// The root of the tree.
    pub fn root() -> Self {
        GuestPath(b"/".to_vec())
    }

    /// Accepts an absolute path; repeated slashes and `.` components are dropped, `..` is refused.
    pub fn new(path: impl AsRef<[u8]>) -> Result<Self, String> {
        let path = path.as_ref();
        if path.first() != Some(&b'/') {
            return Err(format!("path {:?} is not absolute", String::from_utf8_lossy(path)));
        }
        Self::normalise(path)
    }

    /// Accepts the name of an archive member: absolute or relative, leading `./` allowed; `..` is refused wherever it stands.
    pub fn from_member(name: impl AsRef<[u8]>) -> Result<Self, String> {
        Self::normalise(name.as_ref())
    }

    fn normalise(path: &[u8]) -> Result<Self, String> {
        let show = || String::from_utf8_lossy(&path[..path.len().min(200)]).into_owned();
        if path.is_empty() {
            return Err("path is empty".into());
        }
        if path.contains(&0) {
            return Err(format!("path {:?} contains a NUL byte", show()));
        }
        let mut clean = Vec::with_capacity(path.len() + 1);
        for name in path.split(|b| *b == b'/') {
            match name {
                b"" | b"." => continue,
                b".." => return Err(format!("path {:?} contains \"..\"", show())),
                _ if name.len() > NAME_LEN_MAX => {
                    return Err(format!("path {:?}: a component has {} bytes, the limit is {NAME_LEN_MAX}", show(), name.len()));
                }
                _ => {
                    clean.push(b'/');
                    clean.extend_from_slice(name);
                }
            }
        }
        if clean.is_empty() {
            clean.push(b'/');
        }
        if clean.len() > PATH_LEN_MAX {
            return Err(format!("path {:?}… has {} bytes, the limit is {PATH_LEN_MAX}", show(), clean.len()));
        }
        Ok(GuestPath(clean))
    }

    /// The bytes, starting with `/`.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is `/`.
    pub fn is_root(&self) -> bool {
        self.0 == b"/"
    }

    /// The components, none for the root.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|b| *b == b'/').filter(|name| !name.is_empty())
    }

    /// The last component, or nothing for the root.
    pub fn file_name(&self) -> Option<&[u8]> {
        self.components().next_back()
    }

    /// The directory it is in, or nothing for the root.
    pub fn parent(&self) -> Option<GuestPath> {
        let slash = self.0.iter().rposition(|b| *b == b'/')?;
        if self.is_root() {
            None
        } else if slash == 0 {
            Some(GuestPath::root())
        } else {
            Some(GuestPath(self.0[..slash].to_vec()))
        }
    }

    /// The path of `name` (one component, or several separated by slashes) below this one.
    pub fn join(&self, name: impl AsRef<[u8]>) -> Result<GuestPath, String> {
        let mut bytes = self.0.clone();
        bytes.push(b'/');
        bytes.extend_from_slice(name.as_ref());
        Self::normalise(&bytes)
    }

    /// Whether this path is `other` or below it.
    pub fn is_within(&self, other: &GuestPath) -> bool {
        other.is_root() || self == other || (self.0.starts_with(&other.0) && self.0.get(other.0.len()) == Some(&b'/'))
    }

    /// For messages and documents; bytes that are not UTF-8 are replaced.
    pub fn display(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.0)
    }
}

impl FromStr for GuestPath {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        GuestPath::new(text)
    }
}
impl fmt::Debug for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.display())
    }
}
impl fmt::Display for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_paths_are_normalised_and_cannot_climb() {
        for (given, want) in [("/", "/"), ("//etc///passwd/", "/etc/passwd"), ("/./a/./b", "/a/b"), ("/a b/\u{e9}", "/a b/\u{e9}")] {
            assert_eq!(GuestPath::new(given).map(|p| p.to_string()), Ok(want.to_string()), "{given}");
        }
        for bad in ["", "etc/passwd", "/..", "/a/../b", "/a/..", "/a\0b"] {
            assert!(GuestPath::new(bad).is_err(), "{bad:?}");
        }
        assert!(GuestPath::new(format!("/{}", "x".repeat(256))).is_err());
        assert!(GuestPath::new("/x".repeat(2049)).is_err());
        assert_eq!(GuestPath::from_member("./etc/hosts").map(|p| p.to_string()), Ok("/etc/hosts".into()));
        assert!(GuestPath::from_member("../x").is_err());
    }

    #[test]
    fn guest_path_relations() {
        let path = GuestPath::new("/a/bc/d").expect("valid");
        assert_eq!(path.parent(), Some(GuestPath::new("/a/bc").expect("valid")));
        assert_eq!(GuestPath::new("/a").expect("valid").parent(), Some(GuestPath::root()));
        assert_eq!(GuestPath::root().parent(), None);
        assert!(path.is_within(&GuestPath::new("/a/bc").expect("valid")));
        assert!(!path.is_within(&GuestPath::new("/a/b").expect("valid")));
        assert!(path.is_within(&GuestPath::root()));
    }

    #[test]
    fn digests_are_lower_case_hex_only() {
        let digest = Digest::of(b"abc");
        assert_eq!(digest.to_string(), "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        for bad in ["sha256:../../etc/passwd", "sha256:BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD", "md5:00", ""] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_refuse_paths_and_control_characters() {
        for bad in ["", ".", "..", "../x", "a/b", "a\nb", "-a", "a b", &"x".repeat(129)] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad:?}");
        }
        assert!("web-1.root_0".parse::<VolumeName>().is_ok());
        for bad in ["-a", "a-", "a..b", "a_b", "a\nb", "", &"x".repeat(64)] {
            assert!(bad.parse::<Hostname>().is_err(), "{bad:?}");
        }
        for bad in ["", "Data", "0data", "data_1", "a234567890123"] {
            assert!(bad.parse::<DeviceName>().is_err(), "{bad:?}");
        }
        assert!("data-2".parse::<DeviceName>().is_ok());
        let host: Hostname = "web1.example.com".parse().expect("valid");
        assert_eq!((host.short(), host.domain()), ("web1", Some("example.com")));
    }

    #[test]
    fn macs_in_either_case() {
        assert_eq!("52:54:00:AB:cd:0F".parse::<MacAddr>().map(|m| m.to_string()), Ok("52:54:00:ab:cd:0f".into()));
        for bad in ["", "52:54:00:ab:cd", "52:54:00:ab:cd:0f:00", "5254:00:ab:cd:0f", "01:00:5e:00:00:01", "00:00:00:00:00:00", "+2:54:00:ab:cd:0f"] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
    }
}
