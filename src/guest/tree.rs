//! Questions about the image's tree that more than one part of injection asks.

use crate::guest::{
    facts::{GuestFacts, NodeKind},
    plan::canonical,
};

/// Whether something that can be used is at `path`: it exists, or is a symlink whose target is not among the listed paths (a link to
/// `/etc/alternatives` or a multi-call binary). A link to /dev/null counts as absent, as systemd's masks do. Parent links (`/sbin` →
/// `usr/sbin`) are followed; an image without them is asked in both places, with and without `/usr`.
pub fn present(facts: &GuestFacts, path: &str) -> bool {
    let at = |path: &str| match facts.node(&canonical(facts, path)).map(|node| &node.kind) {
        Some(NodeKind::Symlink { target }) => target != "/dev/null",
        Some(_) => true,
        None => false,
    };
    at(path) || path.strip_prefix("/usr").is_some_and(at)
}

/// Where a file of systemd's installed units or configuration is: `/usr/lib/systemd/…` or `/lib/systemd/…`, whichever the image has.
pub fn in_lib(facts: &GuestFacts, below: &str) -> Option<String> {
    ["/usr/lib", "/lib"].into_iter().map(|lib| format!("{lib}/{below}")).find(|path| facts.exists(path))
}

/// Whether the image runs systemd as its init, as far as a tree can tell.
pub fn has_systemd(facts: &GuestFacts) -> bool {
    present(facts, "/usr/lib/systemd/systemd")
}

/// Whether the image's C library is musl.
pub fn musl(facts: &GuestFacts) -> bool {
    facts.resolve("/lib").is_some_and(|(lib, _)| facts.children(&lib).any(|(name, _)| name.starts_with("ld-musl-")))
}

/// Whether udev is there (systemd's or eudev).
pub fn has_udev(facts: &GuestFacts) -> bool {
    present(facts, "/usr/lib/systemd/systemd-udevd") || present(facts, "/usr/bin/udevadm") || present(facts, "/usr/sbin/udevd")
}

/// A variable of an os-release(5) style file, quotes removed.
pub fn shell_variable<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines().filter_map(|line| line.trim().strip_prefix(name)?.strip_prefix('=')).next_back().map(|value| value.trim().trim_matches(['"', '\'']))
}

/// The image's os-release ID and everything in ID_LIKE.
pub fn distribution_ids(facts: &GuestFacts) -> Vec<&str> {
    let Some(text) = facts.text("/etc/os-release").or_else(|| facts.text("/usr/lib/os-release")) else { return Vec::new() };
    let id = shell_variable(text, "ID").into_iter();
    id.chain(shell_variable(text, "ID_LIKE").into_iter().flat_map(str::split_whitespace)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shell_variables_lose_their_quotes_and_the_last_wins() {
        let text = "ID=debian\nID_LIKE=\"rhel fedora\"\nVERSION_ID='9'\nID=x\n";
        assert_eq!(shell_variable(text, "ID"), Some("x"));
        assert_eq!(shell_variable(text, "ID_LIKE"), Some("rhel fedora"));
        assert_eq!(shell_variable(text, "VERSION_ID"), Some("9"));
        assert_eq!(shell_variable(text, "VERSION"), None);
    }
}
