//! Who an instance is: identifiers and key material, all inputs or derived from inputs. Nothing is drawn here, so a retry repeats itself.
//!
//! Identifiers are UUIDv5 (RFC 9562, section 5.5) of the daemon's namespace and the instance's name. Key material is expanded from a 32-byte
//! seed with SHA-256 in counter mode, with a label for each use: `block[i] = SHA-256("cloudletd-expand-v1" || len(label) || label || seed || i)`.
//! With a uniform, secret seed the blocks are independent for whoever does not know it; a key made from them is as strong as the seed.

use std::fmt::Write as _;

use rand_core::{CryptoRng, RngCore};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::{
    error::{Error, Kind, Result, Stage},
    guest::config::Secret,
    names::InstanceName,
};

/// Length of the seed, bytes.
pub const SEED_LEN: usize = 32;

/// The identity of one instance.
#[derive(Debug, Clone, PartialEq)]
pub struct Identity {
    /// The provider's name for it.
    pub instance: InstanceName,
    /// machine-id(5); never all zero.
    pub machine_id: [u8; 16],
    /// UUID of the root filesystem.
    pub root_fs_uuid: Uuid,
    /// GUID of the disk.
    pub disk_guid: Uuid,
    /// Secret that keys are made from, [`SEED_LEN`] bytes.
    pub seed: Secret,
}

impl Identity {
    /// Derives all identifiers. The seed is drawn once per instance by the caller and kept with the job; `Kind::Internal` when it has
    /// another length than [`SEED_LEN`].
    pub fn derive(namespace: &Uuid, instance: &InstanceName, seed: Secret) -> Result<Self> {
        if seed.expose().len() != SEED_LEN {
            let message = format!("the identity seed has {} bytes, expected {SEED_LEN}", seed.expose().len());
            return Err(Error::new(Kind::Internal, Stage::Inject, instance.as_str(), message));
        }
        let id = |what: &str| Uuid::new_v5(namespace, format!("{what}:{instance}").as_bytes());
        Ok(Identity {
            instance: instance.clone(),
            machine_id: id("machine-id").into_bytes(),
            root_fs_uuid: id("root-filesystem"),
            disk_guid: id("disk"),
            seed,
        })
    }

    /// The machine-id as its file holds it: 32 lower-case hexadecimal digits.
    pub fn machine_id_hex(&self) -> String {
        self.machine_id.iter().fold(String::with_capacity(32), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    /// A UUID for one thing inside the guest, e.g. a NetworkManager connection.
    pub fn uuid_of(&self, what: &str) -> Uuid {
        Uuid::new_v5(&self.root_fs_uuid, what.as_bytes())
    }

    /// The stream of key material for one use.
    pub(crate) fn expand(&self, label: &str) -> Expand {
        let mut prefix = Sha256::new();
        prefix.update(b"cloudletd-expand-v1");
        prefix.update((label.len() as u64).to_be_bytes());
        prefix.update(label.as_bytes());
        prefix.update(self.seed.expose());
        Expand { prefix, counter: 0, block: [0; 32], left: 0 }
    }
}

/// SHA-256 in counter mode as a random number generator, for key generation that repeats itself.
pub(crate) struct Expand {
    prefix: Sha256,
    counter: u64,
    block: [u8; 32],
    left: usize,
}

impl RngCore for Expand {
    fn next_u32(&mut self) -> u32 {
        let mut bytes = [0; 4];
        self.fill_bytes(&mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn next_u64(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.fill_bytes(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn fill_bytes(&mut self, out: &mut [u8]) {
        for byte in out {
            if self.left == 0 {
                let mut hash = self.prefix.clone();
                hash.update(self.counter.to_be_bytes());
                self.block = hash.finalize().into();
                self.counter += 1;
                self.left = self.block.len();
            }
            *byte = self.block[self.block.len() - self.left];
            self.left -= 1;
        }
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), rand_core::Error> {
        self.fill_bytes(out);
        Ok(())
    }
}

impl CryptoRng for Expand {}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(name: &str, seed: u8) -> Identity {
        Identity::derive(&Uuid::from_u128(7), &name.parse().expect("name"), Secret::new(vec![seed; 32])).expect("seed of 32 bytes")
    }

    #[test]
    fn the_same_inputs_give_the_same_identity_and_others_differ() {
        assert_eq!(identity("web1", 1), identity("web1", 1));
        let (a, b) = (identity("web1", 1), identity("web2", 1));
        assert_ne!(a.machine_id, b.machine_id);
        assert_ne!(a.root_fs_uuid, b.root_fs_uuid);
        let ids = [Uuid::from_bytes(a.machine_id), a.root_fs_uuid, a.disk_guid];
        assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
        assert!(a.machine_id_hex().len() == 32 && a.machine_id_hex().bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
    }

    #[test]
    fn expansion_depends_on_seed_and_label_and_not_on_how_it_is_read() {
        let read = |seed, label: &str, step: usize| {
            let (mut stream, mut out) = (identity("x", seed).expand(label), vec![0; 100]);
            out.chunks_mut(step).for_each(|part| stream.fill_bytes(part));
            out
        };
        assert_eq!(read(1, "a", 100), read(1, "a", 7));
        assert_ne!(read(1, "a", 100), read(1, "b", 100));
        assert_ne!(read(1, "a", 100), read(2, "a", 100));
    }

    #[test]
    fn the_seed_is_never_printed() {
        assert!(!format!("{:?}", identity("web1", 0x41)).contains("65"));
        let short = Identity::derive(&Uuid::nil(), &"a".parse().expect("name"), Secret::new(vec![1; 31]));
        assert!(short.is_err_and(|error| error.kind() == Kind::Internal));
    }
}
