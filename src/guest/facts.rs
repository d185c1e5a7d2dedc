//! What a root filesystem contains, as far as injection needs to know. Gathered while the tree streams by and kept beside the golden, so that a
//! warm render never opens the image to decide what to write.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Content kept per file, bytes; larger files are listed without content.
///
/// An SELinux policy's file_contexts, the largest that is read, has some 400 KiB.
pub const CONTENT_LEN_MAX: u64 = 1024 * 1024;
/// Content kept in all, bytes; beyond it files are listed without content.
pub const CONTENT_TOTAL_MAX: u64 = 16 * 1024 * 1024;

/// The facts of one golden image: what is where (for the paths that matter), and the content of the files that injection edits.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GuestFacts {
    /// By absolute path (bytes that are not UTF-8 make a path unknown here: nothing that injection cares about has such a name).
    pub nodes: BTreeMap<String, Node>,
    /// SELinux labels (`security.selinux`, without its NUL) of the paths in `nodes` that came with one.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// One path of the tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// What it is.
    pub kind: NodeKind,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What a path is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeKind {
    /// A directory.
    Directory,
    /// A file, with its content where that is kept.
    File {
        /// Size in bytes.
        size: u64,
        /// The content, when it is one of the files that injection reads.
        #[serde(with = "content")]
        content: Option<Vec<u8>>,
    },
    /// A symlink and where it points.
    Symlink {
        /// Target as it stands.
        target: String,
    },
    /// Anything else.
    Other,
}

/// Contents as base64: as lists of numbers they would be four times as long, and there are megabytes of them.
mod content {
    use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(content: &Option<Vec<u8>>, serializer: S) -> Result<S::Ok, S::Error> {
        content.as_ref().map(|bytes| BASE64.encode(bytes)).serialize(serializer)
    }

    pub(super) fn deserialize<'d, D: Deserializer<'d>>(deserializer: D) -> Result<Option<Vec<u8>>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| BASE64.decode(text).map_err(D::Error::custom)).transpose()
    }
}

impl GuestFacts {
    /// What is at `path` itself, links not followed.
    pub fn node(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// Follows symlinks inside the tree (at most 40) in every component; `None` when there is nothing or a link dangles. Gives the final path.
    pub fn resolve(&self, path: &str) -> Option<(String, &Node)> {
        let mut pending: Vec<String> = path.split('/').rev().filter(|name| !name.is_empty()).map(str::to_owned).collect();
        let mut at = String::new();
        let mut links = 0;
        while let Some(name) = pending.pop() {
            match name.as_str() {
                "." => continue,
                ".." => {
                    at.truncate(at.rfind('/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let next = format!("{at}/{name}");
            match &self.nodes.get(&next)?.kind {
                NodeKind::Symlink { target } => {
                    links += 1;
                    if links > 40 {
                        return None;
                    }
                    if target.starts_with('/') {
                        at.clear();
                    }
                    pending.extend(target.split('/').rev().filter(|name| !name.is_empty()).map(str::to_owned));
                }
                _ => at = next,
            }
        }
        let at = if at.is_empty() { "/".to_owned() } else { at };
        self.nodes.get(&at).map(|node| (at, node))
    }

    /// Whether something is there, links followed.
    pub fn exists(&self, path: &str) -> bool {
        self.resolve(path).is_some()
    }

    /// The content of a file, links followed.
    pub fn content(&self, path: &str) -> Option<&[u8]> {
        match &self.resolve(path)?.1.kind {
            NodeKind::File { content, .. } => content.as_deref(),
            _ => None,
        }
    }

    /// The content as text, when it is UTF-8.
    pub fn text(&self, path: &str) -> Option<&str> {
        std::str::from_utf8(self.content(path)?).ok()
    }

    /// Names directly inside a directory, links not followed, in order.
    pub fn children<'a>(&'a self, directory: &str) -> impl Iterator<Item = (&'a str, &'a Node)> + use<'a> {
        let prefix = if directory == "/" { "/".to_owned() } else { format!("{directory}/") };
        let len = prefix.len();
        self.nodes
            .range(prefix.clone()..)
            .take_while(move |(path, _)| path.starts_with(&prefix))
            .filter(move |(path, _)| path.len() > len && !path[len..].contains('/'))
            .map(move |(path, node)| (&path[len..], node))
    }
}

/// Which paths are listed, and which of them keep their content. The lists are in `guest::watch`.
pub trait FactsPolicy: Send + Sync {
    /// Whether `path` is listed at all.
    fn lists(&self, path: &str) -> bool;
    /// Whether the content of the file at `path` is kept (within the caps).
    fn keeps_content(&self, path: &str) -> bool;
}
