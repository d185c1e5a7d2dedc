//! Which paths are left out, remembered along the current directory so that a filter made of many patterns is asked once per path component
//! that changed and not once per component of every member.

use crate::names::GuestPath;

/// The filter with the answers for the last path.
pub(super) struct LeftOut<'f> {
    filter: &'f dyn Fn(&GuestPath) -> bool,
    /// The ancestors of the last path that was asked for, from the top, with the answer for each.
    ancestors: Vec<(GuestPath, bool)>,
}

impl<'f> LeftOut<'f> {
    pub(super) fn new(filter: &'f dyn Fn(&GuestPath) -> bool) -> Self {
        LeftOut { filter, ancestors: Vec::new() }
    }

    /// Whether `path` or something above it is left out. The root never is.
    pub(super) fn contains(&mut self, path: &GuestPath) -> bool {
        let Some(parent) = path.parent() else { return false };
        self.in_left_out_directory(&parent) || (self.filter)(path)
    }

    fn in_left_out_directory(&mut self, directory: &GuestPath) -> bool {
        while self.ancestors.last().is_some_and(|(known, _)| !directory.is_within(known)) {
            self.ancestors.pop();
        }
        let mut missing = Vec::new();
        let mut at = directory.clone();
        while !at.is_root() && self.ancestors.last().is_none_or(|(known, _)| *known != at) {
            let Some(parent) = at.parent() else { break };
            missing.push(std::mem::replace(&mut at, parent));
        }
        for directory in missing.into_iter().rev() {
            let answer = self.ancestors.last().is_some_and(|(_, out)| *out) || (self.filter)(&directory);
            self.ancestors.push((directory, answer));
        }
        self.ancestors.last().is_some_and(|(_, out)| *out)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_is_below_a_left_out_path_is_left_out_and_directories_are_asked_once() {
        let asked = Cell::new(0);
        let filter = |path: &GuestPath| {
            asked.set(asked.get() + 1);
            matches!(path.as_bytes(), b"/tmp" | b"/var/cache/apt" | b"/")
        };
        let mut left_out = LeftOut::new(&filter);
        let mut contains = |path: &str| left_out.contains(&GuestPath::new(path).expect("valid"));
        for (path, want) in [
            ("/", false),
            ("/tmp", true),
            ("/tmp/a", true),
            ("/tmp/a/b", true),
            ("/tmpfile", false),
            ("/var/cache/apt/x", true),
            ("/var/cache/aptitude", false),
            ("/var/cache", false),
            ("/var/cache/apt", true),
            ("/a", false),
        ] {
            assert_eq!(contains(path), want, "{path}");
        }
        asked.set(0);
        for number in 0..100 {
            assert!(!contains(&format!("/usr/lib/modules/{number}")));
        }
        assert_eq!(asked.get(), 100 + 3);
    }
}
