//! ImageService.

use std::{sync::Arc, time::Duration};

use tonic::{Request, Response, Status, Streaming};

use crate::{
    api::{Page, authorise::Caller, encode},
    error::{Error, Kind, Result, Stage},
    manifest::Manifest,
    names::Digest,
    proto::{self, image_service_server::ImageService},
    render::{Engine, UPLOADS_MAX, blocking, now_secs, vouch::ManifestOrigin},
    store::records::ImageRecord,
};

/// The service over the engine.
pub struct Images(pub Arc<Engine>);

fn no_image(id: &str) -> Error {
    Error::new(Kind::NotFound, Stage::Resolve, id, "there is no such image")
        .with_reason("IMAGE_NOT_FOUND")
        .with_violation("image_id", "is not catalogued")
}

/// Whether the caller may take a root filesystem from where the request or its manifest says.
fn check_source(caller: &Caller, request: &proto::CreateImageRequest, manifest: &Manifest) -> Result<()> {
    let url = manifest.rootfs().and_then(|rootfs| rootfs.url.as_deref());
    [url, Some(request.rootfs_url.as_str())].into_iter().flatten().filter(|url| !url.is_empty()).try_for_each(|url| caller.check_image_url(url))
}

/// The next message of an upload; a sender that is silent for `idle` has its place taken away.
async fn next(stream: &mut Streaming<proto::UploadRootfsRequest>, idle: Duration) -> Result<Option<proto::UploadRootfsRequest>, Status> {
    match tokio::time::timeout(idle, stream.message()).await {
        Ok(message) => message,
        Err(_) => {
            let why = format!("the sender sent nothing for {} s", idle.as_secs());
            Err(Error::new(Kind::Timeout, Stage::Fetch, "upload", why).with_reason("UPLOAD_STALLED").into())
        }
    }
}

impl Images {
    pub(super) fn encode(&self, record: ImageRecord) -> Result<proto::Image> {
        let manifest = self.0.manifest_of(&record)?;
        let cached = match &record.rootfs_digest {
            Some(digest) => self.0.store.has_blob(digest)?,
            None => false,
        };
        let (signer, manifest_signer) = self.0.signers(&record)?;
        Ok(proto::Image {
            id: record.id,
            name: manifest.name().to_owned(),
            description: manifest.description().to_owned(),
            author: manifest.author().to_owned(),
            arch: manifest.arch().unwrap_or_default().to_owned(),
            entry_points: manifest.entry_point_names().into_iter().map(str::to_owned).collect(),
            manifest_json: record.manifest,
            rootfs: Some(proto::Rootfs {
                url: record.rootfs_url.unwrap_or_default(),
                digest: record.rootfs_digest.map(|digest| digest.to_string()).unwrap_or_default(),
                size_bytes: record.rootfs_size.unwrap_or_default(),
                media_type: record.media_type.unwrap_or_default(),
                cached,
                signed_by: signer.map(encode::signer),
            }),
            created_at: Some(encode::timestamp(record.created)),
            manifest_signed_by: manifest_signer.map(encode::signer),
        })
    }

    fn get(&self, id: &str) -> Result<proto::Image> {
        self.encode(self.0.store.catalog.image(id)?.ok_or_else(|| no_image(id))?)
    }
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn create_image(&self, request: Request<proto::CreateImageRequest>) -> Result<Response<proto::CreateImageResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let images = Images(Arc::clone(&self.0));
        let response = blocking(Stage::Resolve, move || {
            // Before the first parser.
            let manifest = images.0.vouch_manifest(&request.manifest_json, ManifestOrigin::Call(&request.manifest_signature))?;
            // An error that is passed over here would pass the caller's limits over too.
            let read = images.0.read_manifest(manifest.as_str()).map_err(|error| error.under_field("manifest_json"))?;
            check_source(&caller, &request, &read)?;
            let (record, created) = images.0.create_image(manifest, &request.rootfs_digest, &request.rootfs_url)?;
            caller.note("image", &record.id);
            tracing::info!(image = %record.id, created, "image catalogued");
            Ok(proto::CreateImageResponse { image: Some(images.encode(record)?), created })
        });
        Ok(Response::new(response.await?))
    }

    async fn upload_rootfs(&self, request: Request<Streaming<proto::UploadRootfsRequest>>) -> Result<Response<proto::UploadRootfsResponse>, Status> {
        use proto::upload_rootfs_request::Part;
        let caller = Caller::of(&request)?;
        let mut stream = request.into_inner();
        // Each has a thread, and the sender decides how long.
        let _permit = self.0.upload_permits.try_acquire().map_err(|_| {
            let why = format!("{UPLOADS_MAX} uploads go on already");
            Error::new(Kind::Busy, Stage::Fetch, "upload", why).with_reason("UPLOADS_BUSY").with_hint("try again later")
        })?;
        let idle = Duration::from_secs(self.0.config.fetch.idle_timeout_secs);
        let header = match next(&mut stream, idle).await?.and_then(|message| message.part) {
            Some(Part::Header(header)) => header,
            _ => return Err(Error::field(Stage::Request, "header", "the first message must be the header").into()),
        };
        let expected: Option<Digest> = match header.digest.as_str() {
            "" => None,
            digest => Some(digest.parse().map_err(|why: String| Error::field(Stage::Request, "header.digest", why))?),
        };
        let announced = (header.size_bytes > 0).then_some(header.size_bytes);
        let size_max = self.0.config.fetch.max_size.0;
        if announced.is_some_and(|size| size > size_max) {
            let why = format!("{} is more than fetch.max_size, {size_max}", header.size_bytes);
            return Err(Error::new(Kind::NoSpace, Stage::Fetch, "upload", why).with_reason("ROOTFS_TOO_LARGE").into());
        }
        // The file is written by one blocking thread, fed through a bounded channel: a fast sender waits for the disk.
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<Vec<u8>>(8);
        let engine = Arc::clone(&self.0);
        let writer = tokio::spawn(blocking(Stage::Fetch, move || {
            let mut upload = engine.store.upload(expected, size_max)?;
            let mut complete = false;
            while let Some(chunk) = receiver.blocking_recv() {
                if chunk.is_empty() {
                    complete = true;
                    break;
                }
                upload.write(&chunk)?;
            }
            if !complete {
                return Err(Error::new(Kind::Cancelled, Stage::Fetch, "upload", "the sender went away before the end"));
            }
            upload.finish(announced, now_secs(), |path, digest| engine.vouch_upload(&header.signature, path, digest))
        }));
        // An empty chunk marks the end: a channel that closes without one means the caller went away.
        loop {
            match next(&mut stream, idle).await? {
                Some(proto::UploadRootfsRequest { part: Some(Part::Chunk(chunk)) }) => {
                    if !chunk.is_empty() && sender.send(chunk).await.is_err() {
                        break;
                    }
                }
                Some(_) => return Err(Error::field(Stage::Request, "part", "after the header come chunks only").into()),
                None => {
                    let _ = sender.send(Vec::new()).await;
                    break;
                }
            }
        }
        drop(sender);
        let written = writer.await.map_err(|error| Error::internal(Stage::Fetch, "upload", "the writer panicked").with_source(error))?;
        let (digest, size) = written?;
        caller.note("rootfs", digest);
        tracing::info!(%digest, size, "root filesystem uploaded");
        Ok(Response::new(proto::UploadRootfsResponse {
            rootfs: Some(proto::Rootfs {
                url: String::new(),
                digest: digest.to_string(),
                size_bytes: size,
                media_type: String::new(),
                cached: true,
                signed_by: None,
            }),
        }))
    }

    async fn get_image(&self, request: Request<proto::GetImageRequest>) -> Result<Response<proto::GetImageResponse>, Status> {
        let image = self.get(&request.into_inner().image_id)?;
        Ok(Response::new(proto::GetImageResponse { image: Some(image) }))
    }

    async fn list_images(&self, request: Request<proto::ListImagesRequest>) -> Result<Response<proto::ListImagesResponse>, Status> {
        let request = request.into_inner();
        let page = Page::new(request.page_size, &request.page_token)?;
        let (records, next_page_token) = page.cut(self.0.store.catalog.images(page.limit(), page.offset)?);
        let images = records.into_iter().map(|record| self.encode(record)).collect::<Result<Vec<_>>>()?;
        Ok(Response::new(proto::ListImagesResponse { images, next_page_token }))
    }

    async fn delete_image(&self, request: Request<proto::DeleteImageRequest>) -> Result<Response<proto::DeleteImageResponse>, Status> {
        let caller = Caller::of(&request)?;
        let id = request.into_inner().image_id;
        caller.note("image", &id);
        let engine = Arc::clone(&self.0);
        blocking(Stage::Store, move || {
            engine.delete_image(&id)?;
            tracing::info!(image = %id, "image deleted");
            Ok(())
        })
        .await?;
        Ok(Response::new(proto::DeleteImageResponse {}))
    }
}
