//! Volumes that exist: opened for reading and changed in place, without mounting and without the guest's or the host's kernel looking inside.
//!
//! ```text
//!  Volume ──open──▶ OpenVolume      claimed: nobody else uses it, and nobody starts to while this lives
//!                     │ reader       the guest's disk, whatever the format (fs::ReadAt)
//!                     │ plan         BlockPatch of the disk → FilePatch of the file or device   (pure)
//!                     ▼
//!                   redo::Log        the file patch, durable in the store before the volume is touched
//!                     │ apply        write, flush, then the log goes
//! ```
//!
//! A change is all or nothing: what a crash interrupts is applied again from the log when the daemon starts, and applying again changes nothing more. Golden
//! images behind a volume are only read.

pub mod open;
pub mod patch;
pub mod qcow2;
pub mod redo;

pub use self::{open::OpenVolume, patch::FilePatch};
