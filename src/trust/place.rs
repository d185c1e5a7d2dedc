//! Where something came from, in a form that can be compared: two spellings of one place are one place.
//!
//! A rule that names `https://images.example/` is worth nothing if `HTTPS://Images.Example:443/`, `https://user@images.example./` or
//! `https://images.example/%2e/x` step around it. URLs are parsed as the client that fetches parses them (WHATWG), and then compared by host, port and
//! decoded path segments. Where one server and the next disagree about what a path means, the stricter reading wins:
//!
//! ```text
//! rule requires    http and https are one, letters of either case, empty segments count for nothing
//! rule exempts     scheme, host, port and segments are exactly its own
//! ambiguous        a segment with an encoded slash, `..;` and the like: no reading is taken, Policy refuses
//! ```

use std::borrow::Cow;

use reqwest::Url;

/// What uploaded tarballs are called in rules.
pub const UPLOAD: &str = "upload:";
/// What manifests that come with a call are called in rules.
pub const MANIFEST: &str = "manifest:";

/// The beginning of URLs, or one URL, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    scheme: String,
    host: String,
    port: Option<u16>,
    /// Percent-decoded, those that are empty left out.
    segments: Vec<Vec<u8>>,
    /// A server may read the path in another way than we do.
    is_ambiguous: bool,
}

/// How well a rule's place fits a URL's: the longer, and then the one that is written like it, decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fit {
    segments: usize,
    is_exact: bool,
}

impl Place {
    /// Takes a URL apart. What is wrong with it otherwise; user, password, query and fragment say nothing about the place.
    pub fn parse(text: &str) -> Result<Place, String> {
        let url = Url::parse(text).map_err(|error| error.to_string())?;
        if url.cannot_be_a_base() {
            return Err("is not a URL with a path".into());
        }
        // `example.org.` is `example.org`; hosts of schemes that the URL standard does not know are left as they were written.
        let host = url.host_str().unwrap_or_default().trim_end_matches('.').to_ascii_lowercase();
        let encoded: Vec<&str> = url.path().split('/').filter(|segment| !segment.is_empty()).collect();
        let segments: Vec<Vec<u8>> = encoded.iter().map(|segment| decode(segment).into_owned()).collect();
        let is_ambiguous = segments.iter().any(|segment| is_ambiguous(segment));
        Ok(Place { scheme: url.scheme().to_owned(), host, port: url.port_or_known_default(), segments, is_ambiguous })
    }

    /// Whether servers disagree about what its path is.
    pub fn is_ambiguous(&self) -> bool {
        self.is_ambiguous
    }

    /// Whether it and `url` are of one server, whatever their paths.
    pub fn is_of_server(&self, url: &Place) -> bool {
        let is_web = |scheme: &str| matches!(scheme, "http" | "https");
        let is_default = |place: &Place| matches!((place.scheme.as_str(), place.port), ("http", Some(80)) | ("https", Some(443)));
        let ports_fit = self.port == url.port || (is_default(self) && is_default(url));
        let schemes_fit = self.scheme == url.scheme || (is_web(&self.scheme) && is_web(&url.scheme));
        schemes_fit && ports_fit && self.host == url.host
    }

    /// Whether `url` lies below it, in the widest reading; how well.
    pub fn covers(&self, url: &Place) -> Option<Fit> {
        let is_below = self.is_of_server(url)
            && self.segments.len() <= url.segments.len()
            && self.segments.iter().zip(&url.segments).all(|(ours, theirs)| ours.eq_ignore_ascii_case(theirs));
        is_below.then(|| Fit { segments: self.segments.len(), is_exact: self.covers_exactly(url).is_some() })
    }

    /// Whether `url` lies below it, letter for letter; how well.
    pub fn covers_exactly(&self, url: &Place) -> Option<Fit> {
        let is_below = self.scheme == url.scheme
            && self.host == url.host
            && self.port == url.port
            && url.segments.starts_with(&self.segments)
            && !url.is_ambiguous;
        is_below.then_some(Fit { segments: self.segments.len(), is_exact: true })
    }
}

fn decode(segment: &str) -> Cow<'_, [u8]> {
    let bytes = segment.as_bytes();
    if !bytes.contains(&b'%') {
        return Cow::Borrowed(bytes);
    }
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let hex = |at: usize| bytes.get(at).and_then(|digit| char::from(*digit).to_digit(16)).and_then(|digit| u8::try_from(digit).ok());
        match (byte, hex(at + 1), hex(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push(high << 4 | low);
                at += 3;
            }
            _ => {
                decoded.push(*byte);
                at += 1;
            }
        }
    }
    Cow::Owned(decoded)
}

/// A slash in the middle of a segment (a server may decode it and split there, or not), a percent sign (it may decode twice), a control character, or dots
/// with parameters (`..;x`, which some application servers take for `..`).
fn is_ambiguous(segment: &[u8]) -> bool {
    let name = segment.split(|byte| *byte == b';').next().unwrap_or_default();
    segment.iter().any(|byte| matches!(byte, b'/' | b'\\' | b'%') || byte.is_ascii_control()) || name == b"." || name == b".." || name.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(url: &str) -> Place {
        Place::parse(url).unwrap_or_else(|why| panic!("{url}: {why}"))
    }

    #[test]
    fn spellings_of_one_place_are_below_one_prefix() {
        let prefix = place("https://images.example/signed/");
        for url in [
            "https://images.example/signed/x.tar",
            "HTTPS://IMAGES.Example:443/signed/x.tar",
            "https://images.example./signed/x.tar",
            "https://user:secret@images.example/signed/x.tar",
            "https://images.example/%73igned/x.tar",
            "https://images.example/Signed/x.tar",
            "https://images.example//signed//x.tar",
            "https://images.example/free/../signed/x.tar",
            "https://images.example/free/%2e%2E/signed/x.tar",
            "https://images.example\\signed\\x.tar",
            "https:images.example/signed/x.tar",
            "https://images.example/si\tgned/x.tar",
            "http://images.example/signed/x.tar?token=1#part",
            "https://images.example/signed",
        ] {
            assert!(prefix.covers(&place(url)).is_some(), "{url}");
        }
        for url in [
            "https://images.example.evil/signed/x.tar",
            "https://images.example@evil.example/signed/x.tar",
            "https://evil.example/https://images.example/signed/x.tar",
            "https://images.example:8443/signed/x.tar",
            "https://images.example/signed-not/x.tar",
            "https://images.example/signed/../free/x.tar",
            "https://images.example/?/signed/x.tar",
            "file:///signed/x.tar",
        ] {
            assert!(prefix.covers(&place(url)).is_none(), "{url}");
        }
    }

    #[test]
    fn addresses_are_one_however_they_are_written() {
        let prefix = place("http://127.0.0.1/");
        for url in ["http://0x7f.1/x", "http://2130706433/x", "http://127.1:80/x", "https://127.0.0.1/x"] {
            assert!(prefix.covers(&place(url)).is_some(), "{url}");
        }
        assert!(place("http://[::1]/").covers(&place("http://[0:0::1]/x")).is_some());
        assert!(place("https://b\u{fc}cher.example/").covers(&place("https://xn--bcher-kva.example/x")).is_some());
    }

    #[test]
    fn an_exact_cover_takes_nothing_loosely() {
        let prefix = place("https://images.example/free/");
        assert!(prefix.covers_exactly(&place("https://images.example/free/x.tar")).is_some());
        for url in [
            "http://images.example/free/x.tar",
            "https://images.example/FREE/x.tar",
            "https://images.example/free/..%2fsigned/x.tar",
            "https://images.example/free/..;/signed/x.tar",
            "https://images.example/free/%2e%2e/signed/x.tar",
        ] {
            assert!(prefix.covers_exactly(&place(url)).is_none(), "{url}");
        }
    }

    #[test]
    fn paths_that_servers_read_in_two_ways_are_known() {
        for path in ["a%2fb", "a%5Cb", "a%252fb", "a%00", "..;/b", "..;x=1/b", "%2e%2e%2fb", ".;/b", ";x/b"] {
            assert!(place(&format!("https://a.example/{path}")).is_ambiguous(), "{path}");
        }
        for path in ["", "a/b.tar.xz", "a%20b", "..a/b", "a;b", "debian%2D12/x", "~u/x", "a+b:c@d"] {
            assert!(!place(&format!("https://a.example/{path}")).is_ambiguous(), "{path}");
        }
    }

    #[test]
    fn what_has_no_path_is_no_place() {
        for text in ["", "a", "upload:", "mailto:a@b", "https://", "https://a b/"] {
            assert!(Place::parse(text).is_err(), "{text}");
        }
    }
}
