//! Which URLs and which addresses may be asked (failures.md, rule 12). A URL comes from a manifest, so from a stranger; what it reaches from
//! inside the provider's network is decided here, for every hop and for every address a name resolves to, before the first packet.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use reqwest::Url;
use serde::Deserialize;

use crate::error::{Error, Kind, Result, Stage};

/// Longest URL, bytes: what servers in the field take at most.
const URL_LEN_MAX: usize = 8192;

/// A range of addresses, `10.0.0.0/8` or `fd00::/8`; a lone address is a range of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Network {
    address: IpAddr,
    prefix_len: u8,
}

impl Network {
    /// Whether `address` is in it. An IPv4 range never holds IPv6 addresses, nor the other way round.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(network), IpAddr::V4(address)) => same_prefix(network.to_bits().into(), address.to_bits().into(), 32 - self.prefix_len),
            (IpAddr::V6(network), IpAddr::V6(address)) => same_prefix(network.to_bits(), address.to_bits(), 128 - self.prefix_len),
            _ => false,
        }
    }
}

fn same_prefix(one: u128, other: u128, host_bits: u8) -> bool {
    (one ^ other).checked_shr(host_bits.into()).unwrap_or(0) == 0
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not an address range such as 10.0.0.0/8 or fd00::/8");
        let (address, len) = match text.split_once('/') {
            Some((address, len)) => (address, Some(len)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let max = if address.is_ipv4() { 32 } else { 128 };
        let prefix_len = len.map_or(Ok(max), |len| len.parse::<u8>()).map_err(|_| bad())?;
        if prefix_len > max {
            return Err(bad());
        }
        Ok(Network { address, prefix_len })
    }
}

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_len)
    }
}

/// What may be asked. `Kind::PermissionDenied` with reason `URL_NOT_ALLOWED` is what the rest gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UrlPolicy {
    /// `http` and `https`, or one of them. `file` depends on the roots alone.
    pub schemes: BTreeSet<String>,
    /// Hosts that may be asked: names, `*.example.com` for everything below a name, or addresses. Empty: every host.
    pub allow_hosts: Vec<String>,
    /// Hosts that may not be asked, in the same form; stronger than `allow_hosts`.
    pub deny_hosts: Vec<String>,
    /// Ports that may be asked. Empty: every port.
    pub ports: BTreeSet<u16>,
    /// Whether loopback, link-local, private and other addresses that are not public may be asked.
    pub allow_private_addresses: bool,
    /// Addresses that may be asked although they are not public.
    pub allow_addresses: Vec<Network>,
    /// Addresses that may not be asked; stronger than everything that allows them.
    pub deny_addresses: Vec<Network>,
}

impl Default for UrlPolicy {
    fn default() -> Self {
        UrlPolicy {
            schemes: ["http", "https"].map(str::to_owned).into(),
            allow_hosts: Vec::new(),
            deny_hosts: Vec::new(),
            ports: BTreeSet::new(),
            allow_private_addresses: false,
            allow_addresses: Vec::new(),
            deny_addresses: Vec::new(),
        }
    }
}

impl UrlPolicy {
    /// Checks what can be seen of an `http` or `https` URL before its name is resolved.
    pub fn check_url(&self, url: &Url) -> Result<()> {
        if !matches!(url.scheme(), "http" | "https") || !self.schemes.contains(url.scheme()) {
            return Err(refused(url, format!("the scheme {} is not allowed", url.scheme())));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(refused(url, "a user name or password in a URL is not allowed".into()));
        }
        let host = url.host_str().unwrap_or_default();
        if !self.allow_hosts.is_empty() && !self.allow_hosts.iter().any(|pattern| host_matches(pattern, host)) {
            return Err(refused(url, format!("the host {host} is not among those allowed")));
        }
        if self.deny_hosts.iter().any(|pattern| host_matches(pattern, host)) {
            return Err(refused(url, format!("the host {host} is denied")));
        }
        let port = url.port_or_known_default().unwrap_or(0);
        if !self.ports.is_empty() && !self.ports.contains(&port) {
            return Err(refused(url, format!("the port {port} is not among those allowed")));
        }
        // An address in a URL is never resolved, so the resolver does not see it. The parser has already turned 0x7f.1 and the like into addresses.
        match host.trim_matches(['[', ']']).parse() {
            Ok(address) if !self.allows_address(address) => Err(refused(url, format!("the address {address} is not allowed"))),
            _ => Ok(()),
        }
    }

    /// Whether packets may be sent to `address`.
    pub fn allows_address(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        if self.deny_addresses.iter().any(|network| network.contains(address)) || is_never_a_server(address) {
            return false;
        }
        self.allow_private_addresses || self.allow_addresses.iter().any(|network| network.contains(address)) || is_public(address)
    }
}

/// The refusal of a URL.
pub(super) fn refused(url: &Url, message: String) -> Error {
    Error::new(Kind::PermissionDenied, Stage::Fetch, shown(url), message).with_reason("URL_NOT_ALLOWED")
}

/// Parses a URL of a manifest.
pub(super) fn parse(url: &str) -> Result<Url> {
    let wrong = |message: String| {
        let start: String = url.chars().take(200).collect();
        Error::new(Kind::InvalidRequest, Stage::Fetch, format!("{start:?}"), message).with_reason("URL_INVALID")
    };
    if url.len() > URL_LEN_MAX {
        return Err(wrong(format!("the URL has {} bytes, the limit is {URL_LEN_MAX}", url.len())));
    }
    // The parser would silently drop them.
    if url.chars().any(|letter| letter.is_control() || letter.is_whitespace()) {
        return Err(wrong("the URL contains spaces or control characters".into()));
    }
    Url::parse(url).map_err(|error| wrong("it is not a URL".into()).with_source(error))
}

/// A URL for messages and logs: without user, password, query and fragment, which may be secrets (pre-signed URLs).
pub(super) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    let _ = url.set_username("");
    let _ = url.set_password(None);
    let query = url.query().is_some();
    url.set_query(None);
    url.set_fragment(None);
    if query { format!("{url}?…") } else { url.to_string() }
}

/// Whether a host is named by a pattern: itself, or `*.` and a name that it is below.
pub(super) fn host_matches(pattern: &str, host: &str) -> bool {
    let host = host.trim_end_matches('.');
    match pattern.strip_prefix("*.") {
        Some(domain) => {
            host.len() > domain.len() + 1
                && host.as_bytes()[host.len() - domain.len() - 1] == b'.'
                && host.as_bytes()[host.len() - domain.len()..].eq_ignore_ascii_case(domain.as_bytes())
        }
        None => pattern.trim_end_matches('.').eq_ignore_ascii_case(host),
    }
}

/// Addresses that are no single machine.
fn is_never_a_server(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_unspecified() || address.is_broadcast() || address.is_multicast() || address.octets()[0] == 0,
        IpAddr::V6(address) => address.is_unspecified() || address.is_multicast(),
    }
}

/// Whether an address belongs to the public Internet, after the IANA special-purpose registries (RFC 6890 and its updates). Addresses that carry
/// an IPv4 address inside are as public as that one.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_documentation()
        || a == 0
        || a >= 224
        || (a == 100 && b & 0xc0 == 64) // RFC 6598, carrier-grade NAT
        || (a == 192 && b == 0 && c == 0) // RFC 6890, protocol assignments
        || (a == 192 && b == 88 && c == 99) // RFC 7526, the old 6to4 relay
        || (a == 198 && b & 0xfe == 18); // RFC 2544, benchmarks
    !special
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let embedded = |high: u16, low: u16| is_public_v4(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)));
    match segments {
        // RFC 4291 2.5.5.1, ::a.b.c.d, with :: and ::1 among them.
        [0, 0, 0, 0, 0, 0, _, _] => false,
        // RFC 4291 2.5.5.2, ::ffff:a.b.c.d; canonical addresses never get here, but who knows who calls.
        [0, 0, 0, 0, 0, 0xffff, high, low] => embedded(high, low),
        // RFC 6052, NAT64; RFC 8215 has the local-use prefix next to it.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x64, 0xff9b, ..] => false,
        // RFC 3056, 6to4.
        [0x2002, high, low, ..] => embedded(high, low),
        // RFC 2928: Teredo, ORCHID, benchmarks and other protocol assignments.
        [0x2001, second, ..] if second < 0x200 => false,
        [0x2001, 0xdb8, ..] => false,
        [0x3fff, second, ..] if second < 0x1000 => false,
        // What is allocated for global unicast at all (RFC 4291 2.4); this leaves out fc00::/7, fe80::/10, fec0::/10 and 100::/64.
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(policy: &UrlPolicy, url: &str) -> bool {
        policy.check_url(&parse(url).expect("a URL")).is_ok()
    }

    #[test]
    fn addresses_that_are_not_public_are_denied_in_every_disguise() {
        let policy = UrlPolicy::default();
        for host in [
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f.1",
            "0177.0.0.1",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "198.18.0.1",
            "192.0.2.1",
            "240.0.0.1",
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::127.0.0.1]",
            "[fe80::1]",
            "[fc00::1]",
            "[fd00::1]",
            "[fec0::1]",
            "[ff02::1]",
            "[64:ff9b::7f00:1]",
            "[64:ff9b:1::1]",
            "[2002:7f00:1::]",
            "[2001::1]",
            "[2001:db8::1]",
            "[100::1]",
        ] {
            assert!(!allows(&policy, &format!("http://{host}/x")), "{host}");
        }
        for host in ["8.8.8.8", "[2606:4700::1]", "[64:ff9b::808:808]", "example.com", "172.32.0.1", "100.128.0.1"] {
            assert!(allows(&policy, &format!("http://{host}/x")), "{host}");
        }
    }

    #[test]
    fn ranges_can_be_allowed_and_denied_and_denial_wins() {
        let policy = UrlPolicy {
            allow_addresses: vec!["10.1.0.0/16".parse().expect("a range"), "fd00::/8".parse().expect("a range")],
            deny_addresses: vec!["10.1.2.3".parse().expect("an address"), "8.8.8.0/24".parse().expect("a range")],
            ..UrlPolicy::default()
        };
        for (address, want) in
            [("10.1.9.9", true), ("10.2.0.1", false), ("10.1.2.3", false), ("fd12::1", true), ("fc00::1", false), ("8.8.8.8", false)]
        {
            assert_eq!(policy.allows_address(address.parse().expect("an address")), want, "{address}");
        }
        assert!(policy.allows_address("::ffff:10.1.9.9".parse().expect("an address")));
        let all = UrlPolicy { allow_private_addresses: true, ..UrlPolicy::default() };
        assert!(all.allows_address("127.0.0.1".parse().expect("an address")));
        assert!(!all.allows_address("224.0.0.1".parse().expect("an address")));
        assert!("0.0.0.0/0".parse::<Network>().expect("a range").contains("1.2.3.4".parse().expect("an address")));
        assert!("::/0".parse::<Network>().expect("a range").contains("fe80::1".parse().expect("an address")));
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "::/129", "10.0.0.0/-1", "a/8"] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }

    #[test]
    fn schemes_hosts_ports_and_credentials_are_checked() {
        let policy = UrlPolicy {
            schemes: ["https".to_owned()].into(),
            allow_hosts: vec!["*.Example.com".into(), "mirror.test".into()],
            deny_hosts: vec!["bad.example.com".into()],
            ports: [443, 8443].into(),
            ..UrlPolicy::default()
        };
        for (url, want) in [
            ("https://a.example.com/x", true),
            ("https://a.b.EXAMPLE.com:8443/x", true),
            ("https://mirror.test./x", true),
            ("https://example.com/x", false),
            ("https://aexample.com/x", false),
            ("https://a.example.com.evil.org/x", false),
            ("https://bad.example.com/x", false),
            ("https://bad.example.com./x", false),
            ("http://a.example.com/x", false),
            ("https://a.example.com:444/x", false),
            ("https://user@a.example.com/x", false),
            ("https://:secret@a.example.com/x", false),
            ("ftp://a.example.com/x", false),
            ("gopher://a.example.com/x", false),
            ("data:text/plain,x", false),
        ] {
            assert_eq!(allows(&policy, url), want, "{url}");
        }
        for bad in ["", "x", "http://", "http://a b/", "http://a/\nHost: b", "http://[::1", &format!("http://a/{}", "x".repeat(URL_LEN_MAX))] {
            assert_eq!(parse(bad).expect_err("no URL").kind(), Kind::InvalidRequest, "{bad}");
        }
    }

    #[test]
    fn secrets_of_a_url_are_not_shown() {
        let url = parse("https://user:pw@a.example/x?X-Amz-Signature=abc#frag").expect("a URL");
        assert_eq!(shown(&url), "https://a.example/x?…");
    }
}
