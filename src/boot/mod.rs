//! Booting: one golden disk that starts on every platform a provider has, and the answer beforehand whether it will.
//!
//! ```text
//! loaders    this host's GRUB → core images for BIOS and UEFI          one command, cached; digests go into the golden key
//! esp        image + loaders → files of the EFI system partition       the image's own signed shim and GRUB when it brings them
//! bls        image → systemd-boot's entries and kernels                 their text is the instance's
//! embed      loaders → boot sector, BIOS boot partition, ESP           once per golden
//! kernels    facts → kernels and initrds, newest first                 pure
//! edits      facts + identity + platform → grub.cfg, entries, menus    pure, once per instance
//! inspect    kernel and initrd bytes → what they can do                bounded; hostile input gives errors
//! extract    first kernel and initrd of a golden → files beside it     once per golden, when a platform asks
//! supplied   kernels of the provider's, for images that bring none     read once, digests checked
//! check      inspection + platform → plan, or why not                  pure
//! ```
//!
//! No code of the guest is run for any of it, no filesystem is mounted, and no identity of an instance is in boot loaders: GRUB's core images find
//! their root by its place on the disk they were started from.

pub mod bls;
pub mod check;
pub mod edits;
pub mod embed;
pub mod esp;
pub mod extract;
pub mod grub;
pub mod inspect;
pub mod kernels;
pub mod loaders;
pub mod platform;
pub mod prepare;
pub mod supplied;
