//! Plan: the report of a render that has not happened. It is the very report that the render will give, computed by the same functions, but for what is decided
//! when the render runs: SSH host keys that are drawn then, and the time that is recorded in the guest. Those values are replaced by [`LATER`], so that nobody
//! takes a fingerprint from a plan.

use serde_json::Value;

use crate::guest::applied;

/// Stands in a plan for what is decided when the render runs.
pub const LATER: &str = "decided when rendered";

/// Whether the instance's SSH host keys exist already, or are drawn by the render.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostKeys {
    /// A render that replaces an instance's root gives it the keys that it has.
    Kept,
    /// Nobody can know them yet.
    Drawn,
}

/// Makes a plan's report of `report`. Its shape stays: the same changes in the same order, the same keys by algorithm.
pub fn of_report(mut report: Value, keys: HostKeys) -> Value {
    for change in report["changes"].as_array_mut().into_iter().flatten() {
        let path = change["path"].as_str().unwrap_or_default();
        let is_public_key = path.starts_with("/etc/ssh/ssh_host_") && path.ends_with("_key.pub");
        if change["content"].is_string() && (path == applied::PATH || (is_public_key && keys == HostKeys::Drawn)) {
            change["content"] = LATER.into();
        }
    }
    if keys == HostKeys::Drawn {
        for key in report["ssh_host_keys"].as_array_mut().into_iter().flatten() {
            for field in ["fingerprint", "known_hosts", "sshfp"] {
                if key[field].is_string() {
                    key[field] = LATER.into();
                }
            }
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_is_decided_later_is_left_open() {
        let report = || {
            json!({
                "machine_id": "m",
                "changes": [
                    {"path": "/etc/hosts", "content": "sha256:1"}, {"path": "/etc/ssh/ssh_host_rsa_key", "content": "redacted"},
                    {"path": "/etc/ssh/ssh_host_rsa_key.pub", "content": "sha256:2"}, {"path": "/etc/ssh/ssh_host_ecdsa_key.pub", "verb": "remove"},
                    {"path": applied::PATH, "content": "sha256:3"},
                ],
                "ssh_host_keys": [{"algorithm": "ssh-rsa", "fingerprint": "SHA256:x", "known_hosts": "a ssh-rsa AAAA", "sshfp": null}],
            })
        };
        let mut kept = report();
        kept["changes"][4]["content"] = LATER.into();
        assert_eq!(of_report(report(), HostKeys::Kept), kept);
        let mut drawn = kept;
        drawn["changes"][2]["content"] = LATER.into();
        drawn["ssh_host_keys"] = json!([{"algorithm": "ssh-rsa", "fingerprint": LATER, "known_hosts": LATER, "sshfp": null}]);
        assert_eq!(of_report(report(), HostKeys::Drawn), drawn);
    }
}
