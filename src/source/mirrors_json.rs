//! `mirrors.json` of simplestreams: who else has the content of a stream, as Juju's tools write and read it.
//!
//! Two documents have the same shape, `{"mirrors": {CONTENT_ID: [ENTRY…]}, "updated": …, "format": "mirrors:1.0"}`. In the index of mirrors an entry has a
//! `path`, below the same root, of a further document, and the `format` `mirrors:1.0`. In that document an entry has the `mirror`'s root URL and the
//! `path` of the products below it. Either may have `clouds`, pairs of `region` and `endpoint`; without them it is for everybody. Unknown keys are ignored;
//! some writers put `updated` and `format` into `mirrors` itself, so what is no list there is left out.

use std::{collections::BTreeMap, io::Read, path::Path};

use serde::Deserialize;
use serde_json::Value;

use super::policy;
use crate::error::{Error, Kind, Result, Stage};

/// Largest document, bytes; real ones have some kilobytes.
const DOCUMENT_LEN_MAX: u64 = 4 << 20;
/// Entries of a document that are looked at.
const ENTRIES_MAX: usize = 10_000;

/// A cloud that a mirror is for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Cloud {
    /// Region, e.g. `us-east-1`.
    pub region: String,
    /// URL of the cloud's endpoint.
    pub endpoint: String,
}

/// Where an entry leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leads {
    /// To a further document of mirrors, at this path below the root of the tree.
    Document(String),
    /// To a mirror.
    Mirror {
        /// Root URL of the mirror, http or https.
        url: String,
        /// Path of the products below it.
        path: String,
    },
}

/// An entry of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Content that it has, e.g. `com.ubuntu.cloud:released:download`.
    pub content_id: String,
    /// Where it leads.
    pub leads: Leads,
    /// Clouds that it is for; empty: all.
    pub clouds: Vec<Cloud>,
}

impl Entry {
    /// Whether it is for a cloud: it names none, or this one. A slash at the end of an endpoint means nothing.
    pub fn is_for(&self, region: &str, endpoint: &str) -> bool {
        let bare = |url: &str| url.trim_end_matches('/').to_owned();
        self.clouds.is_empty() || self.clouds.iter().any(|cloud| cloud.region == region && bare(&cloud.endpoint) == bare(endpoint))
    }
}

#[derive(Deserialize)]
struct Document {
    mirrors: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
struct RawEntry {
    mirror: Option<String>,
    path: Option<String>,
    #[serde(default)]
    clouds: Vec<Cloud>,
}

/// The entries of a document, ordered by content id, those of one id as they are written. `Kind::InvalidRequest` when it is none, or an entry is wrong.
pub fn parse(bytes: &[u8]) -> Result<Vec<Entry>> {
    let wrong = |text: String| Error::field(Stage::Config, "mirrors", text);
    if bytes.len() as u64 > DOCUMENT_LEN_MAX {
        return Err(wrong(format!("the document has {} bytes, the limit is {DOCUMENT_LEN_MAX}", bytes.len())));
    }
    let document: Document = serde_json::from_slice(bytes).map_err(|error| wrong(format!("is no document of mirrors: {error}")))?;
    let mut entries = Vec::new();
    for (content_id, list) in document.mirrors {
        let Value::Array(list) = list else { continue };
        for value in list {
            if entries.len() >= ENTRIES_MAX {
                return Err(wrong(format!("has more than {ENTRIES_MAX} entries")));
            }
            let raw: RawEntry = serde_json::from_value(value).map_err(|error| wrong(format!("{content_id}: {error}")))?;
            entries.push(entry(&content_id, raw).map_err(|why| wrong(format!("{content_id}: {why}")))?);
        }
    }
    Ok(entries)
}

fn entry(content_id: &str, raw: RawEntry) -> Result<Entry, String> {
    let path = raw.path.unwrap_or_default();
    let leaves = path.starts_with('/') || path.contains("://") || path.contains('\\') || path.split('/').any(|part| part == "..");
    if leaves || path.chars().any(char::is_control) {
        return Err(format!("the path {path:?} leads out of the tree"));
    }
    let leads = match raw.mirror {
        Some(url) => {
            let parsed = policy::parse(&url).map_err(|error| error.to_string())?;
            let is_more = parsed.query().is_some() || parsed.fragment().is_some() || !parsed.username().is_empty() || parsed.password().is_some();
            if is_more || !matches!(parsed.scheme(), "http" | "https") {
                return Err(format!("the mirror {url:?} is not an http or https URL without user, query and fragment"));
            }
            // As it will be asked for: paths are put behind it.
            Leads::Mirror { url: parsed.into(), path }
        }
        None if !path.is_empty() => Leads::Document(path),
        None => return Err("an entry has neither mirror nor path".into()),
    };
    Ok(Entry { content_id: content_id.to_owned(), leads, clouds: raw.clouds })
}

/// The root URLs of the mirrors of a document on this host, each once, in the document's order. Blocking.
///
/// `Kind::InvalidRequest` for a document that has none: an index of mirrors leads to the documents that have them.
pub fn read(path: &Path) -> Result<Vec<String>> {
    let object = || path.display().to_string();
    if !path.is_absolute() {
        return Err(Error::field(Stage::Config, "mirrors_json", format!("{path:?} is not an absolute path")));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(DOCUMENT_LEN_MAX + 1).read_to_end(&mut bytes))
        .map_err(|error| Error::io(Stage::Config, object(), "read the mirrors", error))?;
    let mut urls = Vec::new();
    for entry in parse(&bytes)? {
        if let Leads::Mirror { url, .. } = entry.leads
            && !urls.contains(&url)
        {
            urls.push(url);
        }
    }
    if urls.is_empty() {
        let error = Error::new(Kind::InvalidRequest, Stage::Config, object(), "names no mirror").with_violation("mirrors_json", "names no mirror");
        return Err(error.with_hint("an index of mirrors has the paths of the documents that name them"));
    }
    Ok(urls)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Juju's tools write them.
    const INDEX: &str = r#"{"mirrors": {"com.ubuntu.juju:released:agents": [
        {"datatype": "content-download", "path": "streams/v1/cpc-mirrors.json", "updated": "20130806", "format": "mirrors:1.0",
         "clouds": [{"region": "us-east-2", "endpoint": "https://ec2.us-east-2.example.com"}]}]},
        "updated": "Wed, 01 May 2013 13:31:26 +0000", "format": "index:1.0"}"#;
    const MIRRORS: &str = r#"{"mirrors": {"updated": "x", "format": "mirrors:1.0", "com.ubuntu.juju:released:agents": [
        {"mirror": "https://one.example/juju", "path": "streams/v1/agents.json", "format": "products:1.0"},
        {"mirror": "http://two.example/", "path": "streams/v1/agents.json", "clouds": [{"region": "r", "endpoint": "https://e/"}]},
        {"mirror": "https://one.example/juju", "path": "streams/v1/more.json"}]}}"#;

    #[test]
    fn both_kinds_of_documents_are_read() {
        let index = parse(INDEX.as_bytes()).expect("an index");
        assert_eq!(index[0].leads, Leads::Document("streams/v1/cpc-mirrors.json".into()));
        assert!(
            index[0].is_for("us-east-2", "https://ec2.us-east-2.example.com/") && !index[0].is_for("us-east-1", "https://ec2.us-east-2.example.com")
        );
        let mirrors = parse(MIRRORS.as_bytes()).expect("mirrors");
        assert_eq!(mirrors.len(), 3);
        assert_eq!(mirrors[1].leads, Leads::Mirror { url: "http://two.example/".into(), path: "streams/v1/agents.json".into() });
        let lenient = parse(MIRRORS.replace("http://two.example/", "Http:\\\\two.example").as_bytes()).expect("a URL as browsers take it");
        assert_eq!(lenient[1].leads, mirrors[1].leads);
        assert!(mirrors[0].is_for("anywhere", "") && mirrors[1].is_for("r", "https://e") && !mirrors[1].is_for("r", "https://f"));
    }

    #[test]
    fn a_file_gives_its_mirrors_once_and_in_order() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("mirrors.json");
        std::fs::write(&path, MIRRORS).expect("written");
        assert_eq!(read(&path).expect("read"), ["https://one.example/juju", "http://two.example/"]);
        std::fs::write(&path, INDEX).expect("written");
        assert_eq!(read(&path).expect_err("an index").message(), "names no mirror");
        assert_eq!(read(Path::new("mirrors.json")).expect_err("relative").kind(), Kind::InvalidRequest);
    }

    #[test]
    fn what_leads_elsewhere_or_is_none_is_refused() {
        let list = |entry: &str| format!(r#"{{"mirrors": {{"a": [{entry}]}}}}"#);
        for text in [
            "",
            "[]",
            r#"{"index": {}}"#,
            &list("{}"),
            &list(r#"{"path": "/etc/passwd"}"#),
            &list(r#"{"path": "a/../../b"}"#),
            &list(r#"{"path": "http://elsewhere/x"}"#),
            &list(r#"{"mirror": "file:///etc"}"#),
            &list(r#"{"mirror": "http://user:pw@host/"}"#),
            &list(r#"{"mirror": "http://host/#there"}"#),
            &list(r#"{"mirror": 7}"#),
            &list(r#"{"mirror": "http://a/", "clouds": "all"}"#),
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
