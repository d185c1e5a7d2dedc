//! Small jobs: one question about foreign bytes, one answer, by a process that the fork server makes for it.
//!
//! ```text
//!  Probe        nothing ─▶ that a process can be confined here
//!  Unwrap       header of an encrypted tarball + identities ─▶ the key of this file
//!  Verify       signature + keys, over the file or the bytes that are passed ─▶ who signed
//!  Clearsigned  document in the file + keys ─▶ what is signed, and who signed
//!  Manifest     a manifest ─▶ its document, which arguments are secret
//!  Args         a schema + arguments ─▶ arguments with defaults
//!  Templates    templates + what they see ─▶ files
//!  Stream       a document of a simplestreams source ─▶ what is in it
//!  LxdMetadata  metadata tarball of Incus or LXD in the file ─▶ its part of a manifest
//! ```
//!
//! What comes back is a key of 16 bytes, a [`Signer`], bytes that some signature is over, or JSON of the types that the daemon keeps. A process that was taken
//! over by what it reads can lie in these, and no more: it has what it was asked with (identities, the operator's public keys, arguments of one instance), and
//! nowhere to send it. What it says about a signer is compared with the keys that were given; of a manifest every field is read again from the document
//! that it gives back. That this is the document which it was given is not checked: it can say that its text is another manifest, whose image then has the other's fields
//! and id, this text, and whichever secret arguments it says.

use std::{
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use super::{
    Launcher, child, died, manifest,
    stream::{self, Wanted},
    wire::{Reply, WireError},
};
use crate::{
    config::worker::Confine,
    error::{Error, Result, Stage},
    manifest::lxd,
    streams::document::Limits,
    trust::{
        Method, Signer,
        age::{self, FILE_KEY_LEN, FileKey, Identities},
        minisign::{self, Keys},
        openpgp::{self, DOCUMENT_BYTES_MAX, Keyring},
    },
};

/// What is made of an image's metadata, bytes: 64 templates and as many sources.
const METADATA_LEN_MAX: usize = 32 << 20;

/// What a question is about, bytes: as much as a signed document may have.
pub(super) const QUESTION_BYTES_MAX: usize = DOCUMENT_BYTES_MAX;

/// A question.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SmallJob {
    pub task: Task,
    pub misdeed: Option<String>,
}

/// What is asked; the frame's data are the parts whose lengths are named, one after the other.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Task {
    /// Nothing.
    Probe,
    /// Parts: header, identities.
    Unwrap { object: String, header: usize },
    /// Parts: signature, keys, and the signed bytes unless they are the file.
    Verify { object: String, method: Method, signature: usize, keys: usize, is_a_file: bool, now: SystemTime },
    /// Part: keyring.
    Clearsigned { object: String, now: SystemTime },
    /// No part.
    LxdMetadata { object: String },
    /// Its text.
    Manifest,
    /// JSON.
    Args,
    /// JSON.
    Templates,
    /// JSON.
    LxdTemplates,
    /// The document.
    Stream { limits: Limits, wanted: Wanted },
}

/// An answer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// It is confined.
    Here,
    /// The key is the frame's data.
    Unwrapped,
    /// Who signed.
    Signed(Signer),
    /// Who signed; the payload is the frame's data.
    Payload(Signer),
    /// JSON in the frame's data.
    Described,
}

/// Keys of one kind that may vouch.
#[derive(Debug, Clone, Copy)]
pub enum Vouching<'k> {
    /// OpenPGP certificates.
    Openpgp(&'k Keyring),
    /// minisign keys.
    Minisign(&'k Keys),
}

impl Vouching<'_> {
    fn method(&self) -> Method {
        match self {
            Vouching::Openpgp(_) => Method::Openpgp,
            Vouching::Minisign(_) => Method::Minisign,
        }
    }

    fn bytes(&self) -> Result<Vec<u8>> {
        match self {
            Vouching::Openpgp(ring) => ring.to_bytes(),
            Vouching::Minisign(keys) => Ok(keys.to_text().into_bytes()),
        }
    }

    /// Whether the signer is one of the keys, as it was given.
    fn holds(&self, signer: &Signer) -> bool {
        match self {
            Vouching::Openpgp(ring) => ring.materials().any(|(key, material)| (key, material) == (signer.key.clone(), signer.material.clone())),
            Vouching::Minisign(keys) => keys.materials().any(|(key, material)| (key, &material) == (signer.key.as_str(), &signer.material)),
        }
    }
}

/// What is signed.
#[derive(Debug, Clone, Copy)]
pub enum Signed<'b> {
    /// A file, from its start.
    File(&'b File),
    /// Bytes.
    Bytes(&'b [u8]),
}

impl Launcher {
    /// The key of a tarball, if it is encrypted. `PermissionDenied`: `AGE_NO_IDENTITY` (none is configured); otherwise as [`age::unwrap`].
    pub(super) fn file_key(&self, blob: &File, object: &str) -> Result<Option<FileKey>> {
        let Some(header) = age::header_of(blob, object)? else { return Ok(None) };
        if self.identities.is_empty() {
            let why = "is encrypted, and there is no identity to open it with";
            return Err(Error::new(crate::error::Kind::PermissionDenied, Stage::Golden, object, why)
                .with_reason("AGE_NO_IDENTITY")
                .with_hint("name a file of age-keygen's in age.identities"));
        }
        if self.settings.confine == Confine::Off {
            return age::unwrap(&header, &self.identities, object).map(Some);
        }
        let task = Task::Unwrap { object: object.to_owned(), header: header.len() };
        let data = [&header[..], self.identities.text().expose()].concat();
        match self.ask(task, &data, None, FILE_KEY_LEN)? {
            (Answer::Unwrapped, key) => match <[u8; FILE_KEY_LEN]>::try_from(&key[..]) {
                Ok(key) => Ok(Some(FileKey::new(key))),
                Err(_) => Err(died("its key is not one")),
            },
            _ => Err(died("its answer is to another question")),
        }
    }

    /// Verifies a detached signature, as [`openpgp::detached`] and [`minisign::detached`] do, in a worker unless configured otherwise.
    pub fn verify(&self, keys: Vouching<'_>, signature: &[u8], signed: Signed<'_>, object: &str) -> Result<Signer> {
        let now = SystemTime::now();
        if self.settings.confine == Confine::Off {
            return verify(keys, signature, signed, now, object);
        }
        let of_keys = keys.bytes()?;
        let (bytes, file): (&[u8], _) = match signed {
            Signed::File(file) => (&[], Some(file)),
            Signed::Bytes(bytes) => (bytes, None),
        };
        let task = Task::Verify {
            object: object.to_owned(),
            method: keys.method(),
            signature: signature.len(),
            keys: of_keys.len(),
            is_a_file: file.is_some(),
            now,
        };
        let data = [signature, &of_keys, bytes].concat();
        match self.ask(task, &data, file, 0)? {
            (Answer::Signed(signer), _) if keys.holds(&signer) => Ok(signer),
            _ => Err(died("its answer is to another question")),
        }
    }

    /// Verifies a clear-signed document, as [`openpgp::clearsigned`] does, in a worker unless configured otherwise.
    pub fn clearsigned(&self, document: &File, keyring: &Keyring, object: &str) -> Result<openpgp::Clearsigned> {
        let now = SystemTime::now();
        if self.settings.confine == Confine::Off {
            return openpgp::clearsigned(&whole(document, object)?, keyring, now, object);
        }
        let task = Task::Clearsigned { object: object.to_owned(), now };
        match self.ask(task, &keyring.to_bytes()?, Some(document), DOCUMENT_BYTES_MAX)? {
            (Answer::Payload(signer), payload) if Vouching::Openpgp(keyring).holds(&signer) => Ok(openpgp::Clearsigned { payload, signer }),
            _ => Err(died("its answer is to another question")),
        }
    }

    /// What the metadata tarball of an Incus or LXD image says, as [`lxd::import::tarball`] does, in a worker unless configured otherwise.
    pub fn lxd_metadata(&self, tarball: &File, object: &str) -> Result<serde_json::Value> {
        if self.settings.confine == Confine::Off {
            return lxd::import::tarball(again(tarball, object)?, object);
        }
        self.described(Task::LxdMetadata { object: object.to_owned() }, &[], Some(tarball), METADATA_LEN_MAX)
    }

    /// Which layers of confinement this host does not give, in words; none when workers are not confined at all. Asks a process.
    pub fn missing_layers(&self) -> Result<Option<Vec<String>>> {
        if self.settings.confine == Confine::Off {
            return Ok(None);
        }
        match self.ask_noting(Task::Probe, &[], None, 0)? {
            (Answer::Here, _, missing) => Ok(Some(missing)),
            _ => Err(died("its answer is to another question")),
        }
    }
}

/// What readers can't find out once they are confined, for the process that they are copies of.
pub(super) fn prepare() -> Result<()> {
    age::prepare();
    manifest::prepare()?;
    child::prepare(false)
}

/// What most questions need, done once in the process that will be asked: the memory that it shares with its siblings becomes its own page by page, which
/// takes longer than many an answer.
pub(super) fn warm_up() {
    manifest::warm_up();
}

/// The reader's side.
pub(super) fn serve(job: &SmallJob, data: &[u8], file: Option<File>, daemon: &mut child::Daemon) -> Result<()> {
    match answer(&job.task, data, file) {
        Ok((answer, data)) => daemon.reply_with(&Reply::Answer(Box::new(answer)), &data),
        Err(error) => daemon.reply(&Reply::Failed(WireError::from(&error))),
    }
}

fn answer(task: &Task, data: &[u8], file: Option<File>) -> Result<(Answer, Vec<u8>)> {
    let wrong = || Error::internal(Stage::Host, super::SUBCOMMAND, "the parts are not what the job says");
    let file = || file.as_ref().ok_or_else(wrong);
    match task {
        Task::Probe => Ok((Answer::Here, Vec::new())),
        Task::Unwrap { object, header } => {
            let (header, identities) = data.split_at_checked(*header).ok_or_else(wrong)?;
            let key = age::unwrap(header, &Identities::parse(identities, "age.identities")?, object)?;
            Ok((Answer::Unwrapped, key.expose().to_vec()))
        }
        Task::Verify { object, method, signature, keys, is_a_file, now } => {
            let (signature, rest) = data.split_at_checked(*signature).ok_or_else(wrong)?;
            let (keys, bytes) = rest.split_at_checked(*keys).ok_or_else(wrong)?;
            let signed = if *is_a_file { Signed::File(file()?) } else { Signed::Bytes(bytes) };
            let signer = match method {
                Method::Openpgp => verify(Vouching::Openpgp(&Keyring::parse(keys, "keys")?), signature, signed, *now, object)?,
                Method::Minisign => {
                    let keys = Keys::parse(std::str::from_utf8(keys).map_err(|_| wrong())?, "keys")?;
                    verify(Vouching::Minisign(&keys), signature, signed, *now, object)?
                }
            };
            Ok((Answer::Signed(signer), Vec::new()))
        }
        Task::Clearsigned { object, now } => {
            let openpgp::Clearsigned { payload, signer } =
                openpgp::clearsigned(&whole(file()?, object)?, &Keyring::parse(data, "keys")?, *now, object)?;
            Ok((Answer::Payload(signer), payload))
        }
        Task::LxdMetadata { object } => Ok((Answer::Described, lxd::import::tarball(again(file()?, object)?, object)?.to_string().into_bytes())),
        Task::Stream { limits, wanted } => Ok((Answer::Described, stream::answer(data, limits, *wanted)?)),
        Task::Manifest => Ok((Answer::Described, manifest::judge(data)?)),
        Task::Args => Ok((Answer::Described, manifest::resolve(data)?)),
        Task::Templates => Ok((Answer::Described, manifest::expand(data)?)),
        Task::LxdTemplates => Ok((Answer::Described, manifest::expand_lxd(data)?)),
    }
}

fn verify(keys: Vouching<'_>, signature: &[u8], signed: Signed<'_>, now: SystemTime, object: &str) -> Result<Signer> {
    let mut open = || -> std::io::Result<Box<dyn Read>> {
        Ok(match signed {
            Signed::Bytes(bytes) => Box::new(std::io::Cursor::new(bytes.to_vec())),
            Signed::File(file) => {
                let mut file = file.try_clone()?;
                file.seek(SeekFrom::Start(0))?;
                Box::new(BufReader::with_capacity(1 << 18, file))
            }
        })
    };
    match keys {
        Vouching::Openpgp(ring) => openpgp::detached(signature, ring, now, object, &mut open),
        Vouching::Minisign(keys) => minisign::detached(signature, keys, now, object, &mut open),
    }
}

fn again(file: &File, object: &str) -> Result<File> {
    file.try_clone().map_err(|error| Error::io(Stage::Manifest, object, "duplicate its descriptor", error))
}

fn whole(mut file: &File, object: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.take(DOCUMENT_BYTES_MAX as u64 + 1).read_to_end(&mut bytes));
    read.map_err(|error| Error::io(Stage::Fetch, object, "read the document", error))?;
    Ok(bytes)
}
