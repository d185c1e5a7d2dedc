//! Vouch: whose signature is over the bytes, before anything reads them.
//!
//! ```text
//! tarball    of a URL          its signature lies beside it; fetched under the same rules, before the tarball
//!            uploaded          its signature comes in the header of the upload
//! manifest   of a call         its signature comes with it
//!            of [[golden.prerender]]   beside the file
//!            of a stream       the stream's documents are signed; those of an unsigned stream are refused where manifests owe a signature
//! ```
//!
//! Who signed is kept by digest and place, not by image: a signature is over bytes. What was taken before there was a rule, or by a key that is not trusted any
//! more, is asked for its signature again the next time that it is used, whatever is in the store: tarball, golden image, or one of a peer.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Engine, blocking};
use crate::{
    config::streams::SignaturePolicy,
    error::{Error, Kind, Result, Stage},
    names::Digest,
    progress::Progress,
    source::Descriptor,
    store::records::ImageRecord,
    trust::{
        Method, Refusal, SIGNATURE_BYTES_MAX, Signer,
        place::{MANIFEST, UPLOAD},
        policy::Required,
    },
    worker::Signed,
};

/// Where a manifest comes from.
#[derive(Debug, Clone, Copy)]
pub enum ManifestOrigin<'a> {
    /// A call, with a detached signature or an empty one.
    Call(&'a [u8]),
    /// A file of the configuration's; its signature lies beside it.
    File(&'a Path),
    /// The import from the stream of this name.
    Stream(&'a str),
}

/// A manifest that may be parsed: whatever signature it owed is there.
#[derive(Debug, Clone, Copy)]
pub struct VouchedManifest<'a>(&'a str);

impl<'a> VouchedManifest<'a> {
    /// Its text.
    pub fn as_str(&self) -> &'a str {
        self.0
    }
}

fn place(image: &ImageRecord) -> &str {
    image.rootfs_url.as_deref().unwrap_or(UPLOAD)
}

/// How a stream's word for a manifest is noted.
fn stream_place(name: &str) -> String {
    format!("stream:{name}")
}

impl Engine {
    /// Whether the tarball's source owes a signature that was not verified yet, or was by a key that is not trusted any more. Blocking.
    pub(super) fn owes_signature(&self, image: &ImageRecord) -> Result<bool> {
        let trust = self.keys.trust();
        let required = match &image.rootfs_url {
            Some(url) => trust.required(url)?,
            None => trust.required_of_uploads(),
        };
        let Some(required) = required else { return Ok(false) };
        let Some(digest) = &image.rootfs_digest else { return Ok(true) };
        Ok(!self.store.catalog.signer(digest, place(image))?.is_some_and(|signer| required.trusts(&signer)))
    }

    /// [`Engine::owes_signature`] after the same question about the manifest, which is refused (`SIGNATURE_MISSING`) when the answer is yes.
    pub(super) async fn check_vouched(self: &Arc<Self>, image: &ImageRecord) -> Result<bool> {
        if self.keys.trust().is_empty() {
            return Ok(false);
        }
        let (engine, image) = (Arc::clone(self), image.clone());
        blocking(Stage::Fetch, move || {
            engine.check_manifest_vouched(&image)?;
            engine.owes_signature(&image)
        })
        .await
    }

    fn check_manifest_vouched(&self, image: &ImageRecord) -> Result<()> {
        let trust = self.keys.trust();
        let Some(required) = trust.required_of_manifests() else { return Ok(()) };
        let digest = Digest::of(image.manifest.as_bytes());
        if self.store.catalog.signer(&digest, MANIFEST)?.is_some_and(|signer| required.trusts(&signer)) {
            return Ok(());
        }
        for stream in self.config.streams.iter().filter(|stream| stream.policy == SignaturePolicy::Signed) {
            if self.store.catalog.signer(&digest, &stream_place(stream.name.as_str()))?.is_some() {
                return Ok(());
            }
        }
        let why = "manifests owe a signature, and nobody who is trusted now signed this one";
        Err(Refusal::Missing.error(&image.id, why).with_hint("catalogue the manifest again, with its signature"))
    }

    /// The signature beside a tarball; none when nobody requires one. What can't be had is `SIGNATURE_MISSING`, unless trying again may help.
    pub(super) async fn fetch_signature(&self, url: &str, progress: &Progress) -> Result<Option<Vec<u8>>> {
        let trust = self.keys.trust();
        let Some(required) = trust.required(url)? else { return Ok(None) };
        let mut first = None;
        for url in required.signature_urls(url) {
            match self.fetch_small(&url, progress).await {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(error) if error.is_retryable() || matches!(error.kind(), Kind::Cancelled | Kind::Internal) => return Err(error),
                Err(error) => {
                    first.get_or_insert((url, error));
                }
            }
        }
        let why = "a signature is required for this source and there is none that can be had";
        Err(match first {
            Some((url, error)) => Refusal::Missing.error(&url, why).with_source(error),
            None => Refusal::Missing.error(url, why),
        })
    }

    async fn fetch_small(&self, url: &str, progress: &Progress) -> Result<Vec<u8>> {
        let descriptor = Descriptor { url: url.to_owned(), digest: None, size: None };
        let path = self.store.tmp().join(format!("signature-{}", uuid::Uuid::new_v4().simple()));
        let fetched = self.signature_fetcher.fetch(&descriptor, &path, progress).await;
        let read = match fetched {
            Ok(_) => tokio::fs::read(&path).await.map_err(|error| Error::io(Stage::Fetch, url, "read the signature", error)),
            Err(error) => Err(error),
        };
        // A transfer that failed may have left something or nothing.
        let _gone = tokio::fs::remove_file(&path).await;
        read
    }

    /// Verifies what `url` owes over the file `path` with this digest, and notes who signed. Blocking.
    pub(super) fn vouch(&self, signature: Option<&[u8]>, url: &str, path: &Path, digest: &Digest) -> Result<()> {
        let trust = self.keys.trust();
        let Some(required) = trust.required(url)? else { return Ok(()) };
        let signature = signature.ok_or_else(|| Refusal::Missing.error(url, "a signature is required for this source"))?;
        self.note(self.verify_file(required, signature, path, url)?, digest, url)
    }

    fn verify_file(&self, required: &Required, signature: &[u8], path: &Path, object: &str) -> Result<Signer> {
        let file = File::open(path).map_err(|error| Error::io(Stage::Fetch, path.display().to_string(), "open what is signed", error))?;
        self.launcher.verify(required.keys_for(signature), signature, Signed::File(&file), object)
    }

    fn verify_text(&self, required: &Required, signature: &[u8], text: &str, object: &str) -> Result<Signer> {
        if signature.len() > SIGNATURE_BYTES_MAX {
            return Err(Refusal::Malformed.error(object, "the signature is longer than any"));
        }
        self.launcher.verify(required.keys_for(signature), signature, Signed::Bytes(text.as_bytes()), object)
    }

    fn note(&self, signer: Signer, digest: &Digest, place: &str) -> Result<()> {
        tracing::info!(place, key = %signer.key, %digest, "signature verified");
        self.store.catalog.put_signer(digest, place, &signer)
    }

    /// Verifies what an uploaded tarball owes, before it gets its place. Blocking.
    pub fn vouch_upload(&self, signature: &[u8], path: &Path, digest: &Digest) -> Result<()> {
        let trust = self.keys.trust();
        let Some(required) = trust.required_of_uploads() else { return Ok(()) };
        if signature.is_empty() {
            return Err(Refusal::Missing.error("upload", "uploaded tarballs owe a signature").with_violation("header.signature", "is required"));
        }
        self.note(self.verify_file(required, signature, path, "upload")?, digest, UPLOAD)
    }

    /// Who vouches for an image's tarball, and for its manifest, as noted. Blocking.
    pub fn signers(&self, image: &ImageRecord) -> Result<(Option<Signer>, Option<Signer>)> {
        let catalog = &self.store.catalog;
        let rootfs = image.rootfs_digest.map(|digest| catalog.signer(&digest, place(image))).transpose()?.flatten();
        let digest = Digest::of(image.manifest.as_bytes());
        let manifest = match catalog.signer(&digest, MANIFEST)? {
            Some(signer) => Some(signer),
            None => {
                let of_stream = |stream: &crate::config::streams::StreamConfig| catalog.signer(&digest, &stream_place(stream.name.as_str()));
                self.config.streams.iter().map(of_stream).find_map(Result::transpose).transpose()?
            }
        };
        Ok((rootfs, manifest))
    }

    /// Verifies what a manifest owes before it is parsed, and notes who signed. Blocking.
    pub fn vouch_manifest<'t>(&self, text: &'t str, origin: ManifestOrigin<'_>) -> Result<VouchedManifest<'t>> {
        let trust = self.keys.trust();
        let required = trust.required_of_manifests();
        let digest = Digest::of(text.as_bytes());
        match (origin, required) {
            (ManifestOrigin::Stream(name), required) => self.vouch_of_stream(name, &digest, required.is_some())?,
            (_, None) => {}
            (ManifestOrigin::Call(signature), Some(required)) => {
                if signature.is_empty() {
                    let why = "manifests owe a signature";
                    return Err(Refusal::Missing.error("manifest", why).with_violation("manifest_signature", "is required"));
                }
                self.note(self.verify_text(required, signature, text, "manifest")?, &digest, MANIFEST)?;
            }
            (ManifestOrigin::File(path), Some(required)) => {
                let signature = beside(path, required)?;
                self.note(self.verify_text(required, &signature, text, &path.display().to_string())?, &digest, MANIFEST)?;
            }
        }
        Ok(VouchedManifest(text))
    }

    fn vouch_of_stream(&self, name: &str, digest: &Digest, is_owed: bool) -> Result<()> {
        let documents = self.store.catalog.stream_documents(name)?;
        let is_signed = self.stream(name)?.policy == SignaturePolicy::Signed;
        let signed = documents.iter().find(|row| is_signed && !row.signer.is_empty());
        match signed {
            Some(row) => {
                let signer = Signer { method: Method::Openpgp, key: row.signer.clone(), material: String::new(), made: row.updated };
                self.store.catalog.put_signer(digest, &stream_place(name), &signer)
            }
            None if is_owed => Err(Refusal::Missing.error(&stream_place(name), "manifests owe a signature, and the stream's documents have none")),
            None => Ok(()),
        }
    }
}

/// The signature that lies beside a file of the operator's.
fn beside(path: &Path, required: &Required) -> Result<Vec<u8>> {
    let object = path.display().to_string();
    for suffix in required.suffixes() {
        let signature = PathBuf::from(format!("{object}{suffix}"));
        match std::fs::metadata(&signature) {
            Ok(metadata) if metadata.len() > SIGNATURE_BYTES_MAX as u64 => {
                return Err(Refusal::Malformed.error(&signature.display().to_string(), "is larger than any signature"));
            }
            Ok(_) => {
                return std::fs::read(&signature).map_err(|error| Error::io(Stage::Manifest, signature.display().to_string(), "read", error));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(Stage::Manifest, signature.display().to_string(), "look for a signature", error)),
        }
    }
    Err(Refusal::Missing.error(&object, "manifests owe a signature, and there is none beside the file"))
}
