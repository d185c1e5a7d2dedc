//! Paths of a tree: relative to the mirror's root, and never out of it.

use std::fmt;

use reqwest::Url;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, Stage};

/// Bytes of a path; PATH_MAX of Linux is 4096 with the NUL, and the mirror's own directory comes before it.
const LEN_MAX: usize = 2048;
/// Bytes of one component (NAME_MAX).
const COMPONENT_LEN_MAX: usize = 255;

/// A relative path in a tree: components that are not empty, `.` or `..`, without control characters and backslashes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StreamPath(String);

impl StreamPath {
    /// Accepts a path as a document gives it. The error says what is wrong with it.
    pub fn new(text: &str) -> Result<StreamPath, String> {
        let shown = || text.chars().take(120).collect::<String>();
        if text.len() > LEN_MAX {
            return Err(format!("path {:?}… has {} bytes, the limit is {LEN_MAX}", shown(), text.len()));
        }
        if text.contains(|c: char| c.is_control() || c == '\\') {
            return Err(format!("path {:?} contains a control character or a backslash", shown()));
        }
        for component in text.split('/') {
            match component {
                "" => return Err(format!("path {:?} is empty, absolute or has an empty component", shown())),
                "." | ".." => return Err(format!("path {:?} contains {component:?}", shown())),
                // A URL instead of a path; a colon alone is part of many names (`com.ubuntu.cloud:released:download.json`).
                _ if component.ends_with(':') => return Err(format!("path {:?} is not relative", shown())),
                _ if component.len() > COMPONENT_LEN_MAX => {
                    return Err(format!("path {:?}: a component has {} bytes, the limit is {COMPONENT_LEN_MAX}", shown(), component.len()));
                }
                _ => {}
            }
        }
        Ok(StreamPath(text.to_owned()))
    }

    /// The path as it stands in the document.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path with `.json` at its end replaced by `.sjson`: where the signed form of a document is.
    pub fn signed(&self) -> StreamPath {
        match self.0.strip_suffix(".json") {
            Some(stem) => StreamPath(format!("{stem}.sjson")),
            None => self.clone(),
        }
    }

    /// The opposite of [`StreamPath::signed`].
    pub fn unsigned(&self) -> StreamPath {
        match self.0.strip_suffix(".sjson") {
            Some(stem) => StreamPath(format!("{stem}.json")),
            None => self.clone(),
        }
    }

    /// The URL of this path below `root`. Every character that means something in a URL is quoted: `%2e%2e` is a name, not a way up.
    pub fn below(&self, root: &Url) -> Result<Url> {
        let mut url = root.clone();
        let refused = || Error::field(Stage::Fetch, "url", format!("{root} can't have paths below it"));
        url.set_query(None);
        url.set_fragment(None);
        url.path_segments_mut().map_err(|()| refused())?.pop_if_empty().extend(self.0.split('/'));
        Ok(url)
    }
}

impl TryFrom<String> for StreamPath {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        StreamPath::new(&text)
    }
}
impl From<StreamPath> for String {
    fn from(path: StreamPath) -> String {
        path.0
    }
}
impl fmt::Display for StreamPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_stays_below_the_root() {
        let root = Url::parse("https://mirror.example/cloud/?x#y").expect("a URL");
        for (path, want) in [
            ("streams/v1/com.ubuntu.cloud:released:download.json", "https://mirror.example/cloud/streams/v1/com.ubuntu.cloud:released:download.json"),
            ("com.ubuntu.cloud:x/a", "https://mirror.example/cloud/com.ubuntu.cloud:x/a"),
            ("a/%2e%2e/b", "https://mirror.example/cloud/a/%252e%252e/b"),
            ("a?b#c", "https://mirror.example/cloud/a%3Fb%23c"),
            ("images/x y", "https://mirror.example/cloud/images/x%20y"),
        ] {
            let url = StreamPath::new(path).expect(path).below(&root).expect(path);
            assert_eq!(url.as_str(), want);
        }
        for bad in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a/./b",
            "a//b",
            "a\\b",
            "http://elsewhere/x",
            "a\nb",
            "a/",
            &"x".repeat(256),
            &"x/".repeat(1100),
        ] {
            assert!(StreamPath::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn signed_and_unsigned_names_belong_together() {
        let path = StreamPath::new("streams/v1/index.json").expect("a path");
        assert_eq!(path.signed().as_str(), "streams/v1/index.sjson");
        assert_eq!(path.signed().unsigned(), path);
    }

    proptest::proptest! {
        #[test]
        fn whatever_is_accepted_is_below_the_root(text in "[a-c./%:?#\\\\ e2]{1,24}") {
            let root = Url::parse("http://mirror.example/a/b").expect("a URL");
            if let Ok(path) = StreamPath::new(&text) {
                let url = path.below(&root).expect("a URL");
                proptest::prop_assert!(url.path().starts_with("/a/b/"), "{url}");
                // Normalised by somebody else too.
                let again = Url::parse(url.as_str()).expect("a URL");
                proptest::prop_assert!(again.path().starts_with("/a/b/"), "{again}");
                proptest::prop_assert_eq!(again.host_str(), Some("mirror.example"));
            }
        }
    }
}
