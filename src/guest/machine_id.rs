//! machine-id(5): /etc/machine-id and D-Bus's copy of it.
//!
//! Two machines with one id take each other's DHCP leases (networkd and NetworkManager derive the DUID from it) and journals. The file is written,
//! not emptied: an empty one makes systemd treat the boot as the first, which runs presets and first-boot questions.

use crate::{
    error::Result,
    guest::{
        facts::{GuestFacts, NodeKind},
        plan::Plan,
    },
};

/// Writes the id; `id` is 32 lower-case hexadecimal digits. D-Bus's file is written only where the image has a file of its own instead of the
/// usual link.
pub fn write_machine_id(plan: &mut Plan<'_>, facts: &GuestFacts, id: &str) -> Result<()> {
    plan.write("/etc/machine-id", format!("{id}\n"), 0o444, "machine-id of this instance")?;
    let dbus = "/var/lib/dbus/machine-id";
    if facts.node(dbus).is_some_and(|node| matches!(node.kind, NodeKind::File { .. })) {
        plan.write(dbus, format!("{id}\n"), 0o644, "D-Bus keeps a copy of the machine-id")?;
    }
    Ok(())
}

/// Whether `text` can be a machine-id: 32 lower-case hexadecimal digits, not all zero (machine-id(5)).
pub fn check_machine_id(text: &str) -> Result<(), String> {
    let hex = text.len() == 32 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if !hex {
        return Err("a machine-id has 32 lower-case hexadecimal digits".into());
    }
    if text.bytes().all(|b| b == b'0') { Err("a machine-id can't be all zero".into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_ids_are_32_lower_case_hex_digits() {
        assert_eq!(check_machine_id("0123456789abcdef0123456789abcdef"), Ok(()));
        for bad in ["", "0123456789ABCDEF0123456789abcdef", &"0".repeat(32), &"a".repeat(31), "0123456789abcdef0123456789abcde\n", &"é".repeat(16)] {
            assert!(check_machine_id(bad).is_err(), "{bad:?}");
        }
    }
}
