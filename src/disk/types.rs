//! Partition type GUIDs: the UEFI specification (5.3.3), the Discoverable Partitions Specification and GRUB's BIOS boot partition.

use uuid::{Uuid, uuid};

/// EFI system partition.
pub const ESP: Uuid = uuid!("c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
/// GRUB's BIOS boot partition: its core image, no filesystem. The bytes spell `Hah!IdontNeedEFI`.
pub const BIOS_BOOT: Uuid = uuid!("21686148-6449-6e6f-744e-656564454649");
/// Linux filesystem data, for a root of an architecture that has no type of its own.
pub const LINUX_DATA: Uuid = uuid!("0fc63daf-8483-4772-8e79-3d69d8477de4");

/// The root partition's type by architecture, in the spellings of `uname -m` and of Debian.
const ROOTS: [(&[&str], Uuid); 8] = [
    (&["x86_64", "amd64"], uuid!("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")),
    (&["i386", "i486", "i586", "i686", "x86"], uuid!("44479540-f297-41b2-9af7-d131d5f0458a")),
    (&["aarch64", "arm64"], uuid!("b921b045-1df0-41c3-af44-4c6f280d3fae")),
    (&["arm", "armv7l", "armhf"], uuid!("69dad710-2ce4-4e3c-b16c-21a1d49abed3")),
    (&["riscv64"], uuid!("72ec70a6-cf74-40e6-bd49-4bda08e8f224")),
    (&["ppc64le", "ppc64el"], uuid!("c31c45e6-3f39-412e-80fb-4809c4980599")),
    (&["s390x"], uuid!("5eead9a9-fe09-4a1e-a1d7-520d00531306")),
    (&["loongarch64", "loong64"], uuid!("77055800-792c-4f94-b39a-98c91b762bb6")),
];

/// The type GUID of a root partition for `arch`, which systemd-gpt-auto-generator finds without an fstab; [`LINUX_DATA`] for one that the
/// Discoverable Partitions Specification has no type for.
pub fn root_of(arch: &str) -> Uuid {
    ROOTS.iter().find(|(names, _)| names.contains(&arch)).map_or(LINUX_DATA, |(_, guid)| *guid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_an_architecture_has_the_same_root_type() {
        assert_eq!(root_of("amd64"), root_of("x86_64"));
        assert_eq!(root_of("arm64"), root_of("aarch64"));
        assert_ne!(root_of("arm64"), root_of("amd64"));
        assert_eq!(root_of("vax"), LINUX_DATA);
    }
}
