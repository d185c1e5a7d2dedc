//! Encrypted tarballs: age (C2SP age-encryption.org/v1), X25519 recipients.
//!
//! ```text
//!  blob ─┬─ header (16 KiB at most) + identities ─▶ unwrap ─▶ FileKey      in a process that sees nothing but these
//!        └─ all of it + FileKey ─▶ open ─▶ plain bytes ─▶ decompress …       in the one that builds the golden image
//! ```
//!
//! Two steps, because what is inside an encrypted archive is a stranger's all the same: whoever has our public key can make one. The process that unpacks it
//! gets the key of this one file and never the identities, which are as good as every other file's.
//!
//! Each chunk of 64 KiB is authenticated before a byte of it comes out, and the last one says that it is the last: what was changed or cut off ends in
//! `AGE_CORRUPT`, never in a shorter tree. The digest in a manifest is that of the encrypted file, as it is fetched; a signature is over that file too.
//!
//! Not taken: passphrases (there is nobody to ask, and a hostile header decides how much work one costs), ASCII armor, plugins, SSH and post-quantum keys.

use std::{
    cell::RefCell,
    fs::{File, OpenOptions},
    io::{self, BufReader, Read},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use age::{DecryptError, Decryptor, secrecy::ExposeSecret, x25519};
use age_core::format::{FileKey as AgeFileKey, Stanza};

use crate::{
    error::{Error, Kind, Result, Stage},
    guest::config::Secret,
};

/// How every encrypted file begins; a version follows.
const MAGIC: &[u8] = b"age-encryption.org/";
/// How one in ASCII armor begins.
const ARMOR: &[u8] = b"-----BEGIN AGE ENCRYPTED FILE-----";
/// As much as [`is_encrypted`] looks at.
pub const DETECT_LEN: usize = ARMOR.len();
/// Bytes of a header: one of a hundred recipients fits. Reading one takes quadratic time in the number of its lines.
pub const HEADER_BYTES_MAX: usize = 16 << 10;
/// Bytes of the key of one file.
pub const FILE_KEY_LEN: usize = 16;
/// Bytes of a file of identities.
const IDENTITIES_BYTES_MAX: u64 = 64 << 10;
/// Identities in all. Each is tried on each recipient.
const IDENTITIES_MAX: usize = 16;
/// How an identity is written.
const IDENTITY_PREFIX: &str = "AGE-SECRET-KEY-1";
/// How much is read at once: a chunk with its tag, and a little.
const BUFFER_LEN: usize = 128 << 10;

/// The key of one encrypted file.
#[derive(Clone, PartialEq, Eq)]
pub struct FileKey([u8; FILE_KEY_LEN]);

impl FileKey {
    /// From its bytes.
    pub fn new(bytes: [u8; FILE_KEY_LEN]) -> Self {
        FileKey(bytes)
    }

    /// Its bytes, for the process that opens the file.
    pub fn expose(&self) -> &[u8; FILE_KEY_LEN] {
        &self.0
    }
}

impl std::fmt::Debug for FileKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

/// The keys of the operator's, as text.
#[derive(Debug, Clone, Default)]
pub struct Identities {
    lines: Vec<Secret>,
}

impl Identities {
    /// Reads files of identities. Errors name the file and never what is in it: `PermissionDenied` (`SECRET_KEY_READABLE`) when others may read it;
    /// `InvalidRequest` (`SECRET_KEY_INVALID`) for what is no list of X25519 identities.
    pub fn read(paths: &[PathBuf]) -> Result<Identities> {
        let mut lines = Vec::new();
        for path in paths {
            lines.extend(Self::parse(&read_private(path)?, &path.display().to_string())?.lines);
        }
        if lines.len() > IDENTITIES_MAX {
            return Err(invalid("age.identities", format!("name {} identities, the limit is {IDENTITIES_MAX}", lines.len())));
        }
        Ok(Identities { lines })
    }

    /// Reads lines of identities; those that are empty or begin with `#` are none.
    pub fn parse(text: &[u8], object: &str) -> Result<Identities> {
        let text = std::str::from_utf8(text).map_err(|_| invalid(object, "is not text".into()))?;
        let mut lines = Vec::new();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            // What the library says about a key that is wrong has no place in a log.
            if !line.starts_with(IDENTITY_PREFIX) || line.parse::<x25519::Identity>().is_err() {
                return Err(invalid(object, "holds something other than X25519 identities (age-keygen), or one that is encrypted".into()));
            }
            lines.push(Secret::new(line.as_bytes()));
        }
        if lines.is_empty() {
            return Err(invalid(object, "holds no identity".into()));
        }
        Ok(Identities { lines })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// All of them, a line each, for the process that unwraps.
    pub fn text(&self) -> Secret {
        Secret::new(self.lines.iter().map(Secret::expose).collect::<Vec<_>>().join(&b'\n'))
    }
}

fn invalid(object: &str, why: String) -> Error {
    Error::field(Stage::Config, object, why).with_reason("SECRET_KEY_INVALID")
}

/// A file that nobody else can read or change.
fn read_private(path: &Path) -> Result<Vec<u8>> {
    let object = path.display().to_string();
    let failed = |doing: &str, error| Error::io(Stage::Config, object.clone(), doing, error);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let file = file.map_err(|error| failed("open the identities", error))?;
    let meta = file.metadata().map_err(|error| failed("stat the identities", error))?;
    let ours = rustix::process::geteuid().as_raw();
    if !meta.is_file() || meta.mode() & 0o077 != 0 || (meta.uid() != ours && meta.uid() != 0) {
        let why = format!("has mode {:04o} and belongs to user {}; secret keys are for the daemon alone", meta.mode() & 0o7777, meta.uid());
        return Err(Error::new(Kind::PermissionDenied, Stage::Config, object, why)
            .with_reason("SECRET_KEY_READABLE")
            .with_hint("chmod 0600, chown root"));
    }
    let mut bytes = Vec::new();
    file.take(IDENTITIES_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| failed("read the identities", error))?;
    if bytes.len() as u64 > IDENTITIES_BYTES_MAX {
        return Err(invalid(&object, format!("has more than {IDENTITIES_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

/// Whether a file that begins like this is encrypted (give it [`DETECT_LEN`] bytes when there are as many).
pub fn is_encrypted(first: &[u8]) -> bool {
    first.starts_with(MAGIC) || first.starts_with(ARMOR)
}

/// The header of an encrypted file, with what follows it; nothing when the file is not encrypted. Its position stays where it is.
pub fn header_of(blob: &File, object: &str) -> Result<Option<Vec<u8>>> {
    let mut first = vec![0; DETECT_LEN];
    let len = read_start(blob, &mut first, object)?;
    if !is_encrypted(&first[..len]) {
        return Ok(None);
    }
    let mut header = vec![0; HEADER_BYTES_MAX];
    let len = read_start(blob, &mut header, object)?;
    header.truncate(len);
    Ok(Some(header))
}

fn read_start(blob: &File, buffer: &mut [u8], object: &str) -> Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match blob.read_at(&mut buffer[len..], len as u64) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io(Stage::Golden, object, "read the tarball", error)),
        }
    }
    Ok(len)
}

/// Finds out now what a confined process can't find out later: texts of the library's errors are looked up when the first is shown.
pub fn prepare() {
    let _shown = DecryptError::InvalidHeader.to_string();
}

/// What the library says. Its own errors are not kept: their texts are looked up in files.
fn refused(error: &DecryptError, object: &str) -> Error {
    let of = |kind, reason: &'static str, why: &str| Error::new(kind, Stage::Golden, object, why).with_reason(reason);
    match error {
        DecryptError::NoMatchingKeys => of(Kind::PermissionDenied, "AGE_KEY_UNKNOWN", "is encrypted, and none of the identities opens it")
            .with_hint("see age.identities; the tarball's recipients are chosen when it is encrypted (age --recipient)"),
        DecryptError::UnknownFormat => of(Kind::Unsupported, "AGE_UNSUPPORTED", "is encrypted by an unknown version of age"),
        DecryptError::ExcessiveWork { .. } => passphrase(object),
        DecryptError::Io(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
            Error::io(Stage::Golden, object, "read the encrypted tarball", io::Error::from(error.kind()))
        }
        _ => of(Kind::Corrupt, "AGE_CORRUPT", "its encryption header is damaged, cut off or longer than any"),
    }
}

fn passphrase(object: &str) -> Error {
    Error::new(Kind::Unsupported, Stage::Golden, object, "is encrypted with a passphrase")
        .with_reason("AGE_UNSUPPORTED")
        .with_hint("encrypt it to a recipient (age --recipient)")
}

fn check_kind<R>(decryptor: &Decryptor<R>, first: &[u8], object: &str) -> Result<()> {
    debug_assert!(!first.starts_with(ARMOR));
    if decryptor.is_scrypt() { Err(passphrase(object)) } else { Ok(()) }
}

/// An identity that notes the key it finds.
struct Noting<'i> {
    identity: &'i x25519::Identity,
    found: &'i RefCell<Option<FileKey>>,
}

impl age::Identity for Noting<'_> {
    fn unwrap_stanza(&self, stanza: &Stanza) -> Option<std::result::Result<AgeFileKey, DecryptError>> {
        let unwrapped = self.identity.unwrap_stanza(stanza)?;
        if let Ok(key) = &unwrapped {
            *self.found.borrow_mut() = Some(FileKey(*key.expose_secret()));
        }
        Some(unwrapped)
    }
}

/// The key of the file that begins with `header`, if one of the identities opens it; the header's own authentication is checked by it.
///
/// `PermissionDenied` (`AGE_KEY_UNKNOWN`), `Unsupported` (`AGE_UNSUPPORTED`: passphrases, armor, other versions), `Corrupt` (`AGE_CORRUPT`).
pub fn unwrap(header: &[u8], identities: &Identities, object: &str) -> Result<FileKey> {
    if header.starts_with(ARMOR) {
        return Err(Error::new(Kind::Unsupported, Stage::Golden, object, "is encrypted in ASCII armor")
            .with_reason("AGE_UNSUPPORTED")
            .with_hint("encrypt it without --armor"));
    }
    let decryptor = Decryptor::new_buffered(header).map_err(|error| refused(&error, object))?;
    check_kind(&decryptor, header, object)?;
    let mut keys = Vec::new();
    for line in &identities.lines {
        let text = std::str::from_utf8(line.expose()).map_err(|_| invalid("age.identities", "are not text".into()))?;
        keys.push(text.parse::<x25519::Identity>().map_err(|_| invalid("age.identities", "are not X25519 identities".into()))?);
    }
    let found = RefCell::new(None);
    let noting: Vec<Noting<'_>> = keys.iter().map(|identity| Noting { identity, found: &found }).collect();
    decryptor.decrypt(noting.iter().map(|noting| noting as &dyn age::Identity)).map_err(|error| refused(&error, object))?;
    found.into_inner().ok_or_else(|| Error::internal(Stage::Golden, object, "was opened by a key that nobody has"))
}

/// An identity that knows the key of this one file.
struct Known(FileKey);

impl age::Identity for Known {
    fn unwrap_stanza(&self, _stanza: &Stanza) -> Option<std::result::Result<AgeFileKey, DecryptError>> {
        Some(Ok(AgeFileKey::new(Box::new(self.0.0))))
    }
}

/// The plain bytes of an encrypted file, from its start. Errors of the reader carry a [`crate::error::Error`]: see [`crate::tree::error_of_read`].
pub fn open(input: impl Read + Send + 'static, key: &FileKey, object: &str) -> Result<Box<dyn Read + Send>> {
    let decryptor = Decryptor::new_buffered(BufReader::with_capacity(BUFFER_LEN, input)).map_err(|error| refused(&error, object))?;
    let known = Known(key.clone());
    let reader = decryptor.decrypt([&known as &dyn age::Identity].into_iter()).map_err(|error| refused(&error, object))?;
    Ok(Box::new(Opened { reader, object: object.to_owned() }))
}

struct Opened<R> {
    reader: R,
    object: String,
}

impl<R: Read> Read for Opened<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.reader.read(out).map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => error,
            // Of the disk: it has an errno.
            _ if error.raw_os_error().is_some() => error,
            _ => {
                let why = "the encrypted tarball is damaged or cut off";
                io::Error::other(Error::new(Kind::Corrupt, Stage::Golden, self.object.clone(), why).with_reason("AGE_CORRUPT"))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::PermissionsExt};

    use age::secrecy::SecretString;

    use super::*;

    fn identity() -> (x25519::Identity, Identities) {
        let identity = x25519::Identity::generate();
        let text = format!("# created: today\n# public key: {}\n{}\n", identity.to_public(), identity.to_string().expose_secret());
        let identities = Identities::parse(text.as_bytes(), "key").expect("an identity");
        (identity, identities)
    }

    fn encrypted(to: &[&dyn age::Recipient], plain: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let encryptor = age::Encryptor::with_recipients(to.iter().copied()).expect("recipients");
        let mut writer = encryptor.wrap_output(&mut bytes).expect("a header");
        writer.write_all(plain).expect("written");
        writer.finish().expect("finished");
        bytes
    }

    fn opened(bytes: &[u8], identities: &Identities) -> Result<Vec<u8>> {
        let key = unwrap(&bytes[..bytes.len().min(HEADER_BYTES_MAX)], identities, "file")?;
        let mut plain = Vec::new();
        let mut reader = open(io::Cursor::new(bytes.to_vec()), &key, "file")?;
        reader.read_to_end(&mut plain).map_err(|error| crate::tree::error_of_read(error, Stage::Golden, "file", "read"))?;
        Ok(plain)
    }

    #[test]
    fn every_length_comes_out_as_it_went_in_and_no_prefix_of_it_does() {
        let (identity, identities) = identity();
        for len in [0usize, 1, 65535, 65536, 65537, 131_072, 200_000] {
            let plain: Vec<u8> = (0..len).map(|at| at as u8).collect();
            let bytes = encrypted(&[&identity.to_public()], &plain);
            assert!(is_encrypted(&bytes));
            assert!(opened(&bytes, &identities).expect("ours") == plain, "{len}");
            let header_len = bytes.len() - (plain.len() + 16 * plain.len().div_ceil(65536).max(1));
            for cut in [bytes.len() - 1, bytes.len() - 16, header_len + 65552, header_len + 2 * 65552, header_len, header_len - 1, 30] {
                if cut < bytes.len() {
                    assert_eq!(opened(&bytes[..cut], &identities).expect_err("cut off").reason(), "AGE_CORRUPT", "{len} cut to {cut}");
                }
            }
            let longer = [&bytes[..], b"x"].concat();
            assert_eq!(opened(&longer, &identities).expect_err("longer").reason(), "AGE_CORRUPT");
        }
    }

    #[test]
    fn no_changed_byte_comes_out_and_nothing_panics() {
        let (identity, identities) = identity();
        let bytes = encrypted(&[&identity.to_public()], b"content");
        for at in 0..bytes.len() {
            for value in [0, b'\n', b' ', 0xff, bytes[at] ^ 1, bytes[at] ^ 0x20] {
                let mut bytes = bytes.clone();
                if bytes[at] != value {
                    bytes[at] = value;
                    assert!(opened(&bytes, &identities).is_err(), "byte {at} as {value}");
                }
            }
        }
    }

    #[test]
    fn other_keys_passphrases_armor_and_other_versions_are_refused_by_name() {
        let ((ours, identities), (other, _)) = (identity(), identity());
        let reason = |bytes: &[u8]| opened(bytes, &identities).expect_err("refused").reason();
        assert_eq!(reason(&encrypted(&[&other.to_public()], b"x")), "AGE_KEY_UNKNOWN");
        assert_eq!(opened(&encrypted(&[&other.to_public(), &ours.to_public()], b"x"), &identities).expect("one of two"), b"x");
        let mut scrypt = age::scrypt::Recipient::new(SecretString::from("secret".to_owned()));
        scrypt.set_work_factor(2);
        assert_eq!(reason(&encrypted(&[&scrypt], b"x")), "AGE_UNSUPPORTED");
        assert_eq!(reason(b"-----BEGIN AGE ENCRYPTED FILE-----\nYWdl\n-----END AGE ENCRYPTED FILE-----\n"), "AGE_UNSUPPORTED");
        assert_eq!(reason(b"age-encryption.org/v2\n--- x\n"), "AGE_UNSUPPORTED");
        assert_eq!(reason(b"age-encryption.org/v1\n"), "AGE_CORRUPT");
    }

    #[test]
    fn a_header_that_is_too_long_is_refused_and_costs_little() {
        let (identity, identities) = identity();
        let recipients: Vec<x25519::Recipient> = (0..400).map(|_| x25519::Identity::generate().to_public()).chain([identity.to_public()]).collect();
        let recipients: Vec<&dyn age::Recipient> = recipients.iter().map(|recipient| recipient as &dyn age::Recipient).collect();
        assert_eq!(opened(&encrypted(&recipients, b"x"), &identities).expect_err("long").reason(), "AGE_CORRUPT");
        let fits = encrypted(&recipients[300..], b"x");
        assert_eq!(opened(&fits, &identities).expect("a hundred recipients"), b"x");
    }

    #[test]
    fn identities_are_the_daemons_alone_and_are_never_shown() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("key");
        let (identity, identities) = identity();
        std::fs::write(&path, identity.to_string().expose_secret()).expect("written");
        for (mode, is_good) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("chmod");
            match Identities::read(std::slice::from_ref(&path)) {
                Ok(read) => assert!(is_good && !read.is_empty(), "{mode:o}"),
                Err(error) => assert!(!is_good && error.reason() == "SECRET_KEY_READABLE", "{mode:o}: {}", error.chain()),
            }
        }
        assert!(!format!("{identities:?} {:?}", identities.text()).contains("AGE-SECRET"));
        for text in
            ["", "# nothing\n", "AGE-SECRET-KEY-1NONSENSE", "AGE-SECRET-KEY-PQ-1X", "AGE-PLUGIN-X-1", "age-encryption.org/v1\n", "ssh-ed25519 AAAA"]
        {
            let error = Identities::parse(text.as_bytes(), "key").expect_err(text);
            assert_eq!(error.reason(), "SECRET_KEY_INVALID");
            assert!(!error.chain().contains("NONSENSE"));
        }
    }
}
