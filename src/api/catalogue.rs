//! CatalogueService.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::{
    api::{Page, authorise::Caller, encode, images::Images},
    config::streams::{SignaturePolicy, SyncMode},
    error::{Error, Kind, Result, Stage},
    images::NamedImage,
    matching::{Answer, Container, Reason},
    proto::{self, catalogue_service_server::CatalogueService},
    render::{Engine, blocking, now_secs},
    store::catalog::names::Deprecation,
    streams::{Filters, document::Limits, platforms, sync::Offered},
};

/// Bytes of a document of platforms in a request.
const PLATFORMS_LEN_MAX: usize = 4 << 20;
/// Answers of one Match: as many as fit into a message of some megabytes.
const MATCHES_MAX: usize = 5_000;

/// The service over the engine.
pub struct Catalogue(pub Arc<Engine>);

impl Catalogue {
    async fn run<T: Send + 'static>(&self, work: impl FnOnce(&Catalogue) -> Result<T> + Send + 'static) -> Result<Response<T>, Status> {
        let catalogue = Catalogue(Arc::clone(&self.0));
        Ok(Response::new(blocking(Stage::Store, move || work(&catalogue)).await?))
    }

    fn image_id(&self, reference: &str) -> Result<String> {
        if reference.is_empty() {
            return Err(Error::field(Stage::Request, "image", "is required"));
        }
        Ok(self.0.find_image(reference)?.image_id)
    }

    fn named(&self, image_id: &str) -> Result<proto::CatalogueImage> {
        let record = self.0.image(image_id)?.record;
        self.encode(self.0.named_image(record)?)
    }

    fn encode(&self, image: NamedImage) -> Result<proto::CatalogueImage> {
        Ok(proto::CatalogueImage {
            versions: image.versions.iter().map(|row| format!("{}@{}", row.name, row.version)).collect(),
            channels: image.channels,
            labels: image.labels.into_iter().collect(),
            deprecation: image.deprecation.map(|of| proto::Deprecation {
                since: Some(encode::timestamp(of.since)),
                reason: of.reason,
                replacement: of.replacement,
            }),
            image: Some(Images(Arc::clone(&self.0)).encode(image.record)?),
        })
    }

    fn matches(&self, request: &proto::MatchRequest) -> Result<proto::MatchResponse> {
        let kinds = request.containers.iter().map(|kind| container(*kind)).collect::<Result<Vec<_>>>()?;
        let mut platforms = match request.platforms_json.as_str() {
            "" => self.0.instance_types()?,
            text if text.len() > PLATFORMS_LEN_MAX => {
                return Err(Error::field(Stage::Request, "platforms_json", format!("has {} bytes, the limit is {PLATFORMS_LEN_MAX}", text.len())));
            }
            text => {
                let read = self.0.launcher.stream_products(text.as_bytes(), &Limits::default()).and_then(|products| platforms::of(&products));
                read.map_err(|error| match error.kind() {
                    Kind::Corrupt | Kind::NoSpace => Error::field(Stage::Request, "platforms_json", error.message().to_owned()),
                    // Of the reader, not of what it read.
                    _ => error,
                })?
            }
        };
        if !request.platforms.is_empty() {
            if let Some(unknown) = request.platforms.iter().find(|name| !platforms.iter().any(|platform| platform.name == **name)) {
                let known: Vec<&str> = platforms.iter().map(|platform| platform.name.as_str()).collect();
                return Err(Error::new(Kind::NotFound, Stage::Resolve, unknown, "there is no such platform")
                    .with_reason("PLATFORM_NOT_FOUND")
                    .with_violation("platforms", "is not known")
                    .with_hint(format!("known platforms: {}", known.join(", "))));
            }
            platforms.retain(|platform| request.platforms.contains(&platform.name));
        }
        let images = match request.image.as_str() {
            "" => {
                let mut names: Vec<String> = self.0.store.catalog.versions(None)?.into_iter().map(|row| row.name).collect();
                names.dedup();
                names
            }
            given => vec![given.to_owned()],
        };
        if images.len().saturating_mul(platforms.len()) > MATCHES_MAX {
            let what = format!("{} images on {} platforms are more than {MATCHES_MAX} answers", images.len(), platforms.len());
            return Err(Error::field(Stage::Request, "platforms", what).with_hint("name the image, or the platforms"));
        }
        let mut matches = Vec::new();
        for name in images {
            let image = self.0.image_to_match(&name)?;
            let wanted = if kinds.is_empty() { &Container::ALL[..] } else { &kinds };
            for answer in self.0.answers(&image, &platforms, wanted)? {
                // Asking for none is not asking for all.
                let is_match = if kinds.is_empty() { answer.boot.is_empty() } else { answer.is_match() };
                matches.push(platform_match(&name, &answer, is_match));
            }
        }
        Ok(proto::MatchResponse { matches })
    }

    fn streams(&self) -> Result<proto::ListStreamsResponse> {
        let mut streams = Vec::new();
        for config in &self.0.config.streams {
            let name = config.name.as_str();
            let documents = self.0.store.catalog.stream_documents(name)?.into_iter().map(|row| proto::StreamDocument {
                path: row.path,
                updated_at: row.updated.map(encode::timestamp),
                signer: row.signer,
                digest: row.digest,
            });
            let end = self.0.stream_end(name);
            streams.push(proto::Stream {
                name: name.to_owned(),
                url: config.url.clone(),
                signed: config.policy == SignaturePolicy::Signed,
                sync: match config.sync {
                    SyncMode::OnDemand => "on-demand",
                    SyncMode::Catalogue => "catalogue",
                    SyncMode::Fetch => "fetch",
                }
                .to_owned(),
                synced_at: end.as_ref().map(|(at, _)| encode::timestamp(*at)),
                error: end.and_then(|(_, error)| error).unwrap_or_default(),
                documents: documents.collect(),
            });
        }
        Ok(proto::ListStreamsResponse { streams })
    }
}

fn filters(texts: &[String]) -> Result<Filters> {
    Filters::parse(texts).map_err(|why| Error::field(Stage::Request, "filters", why))
}

fn stream_image(offered: Offered) -> proto::StreamImage {
    proto::StreamImage {
        content_id: offered.content_id,
        product: offered.product,
        version: offered.version,
        arch: offered.arch,
        os: offered.os,
        release: offered.release,
        name: offered.name,
        digest: offered.digest.map(|digest| digest.to_string()).unwrap_or_default(),
        size_bytes: offered.size,
        unusable: offered.unusable,
        image_id: offered.image_id.unwrap_or_default(),
    }
}

fn container(kind: i32) -> Result<Container> {
    match proto::ContainerKind::try_from(kind) {
        Ok(proto::ContainerKind::Lxc) => Ok(Container::Lxc),
        Ok(proto::ContainerKind::Kvm) => Ok(Container::Kvm),
        Ok(proto::ContainerKind::Xen) => Ok(Container::Xen),
        _ => Err(Error::field(Stage::Request, "containers", format!("{kind} is not a kind of container"))),
    }
}

fn container_kind(kind: Container) -> proto::ContainerKind {
    match kind {
        Container::Lxc => proto::ContainerKind::Lxc,
        Container::Kvm => proto::ContainerKind::Kvm,
        Container::Xen => proto::ContainerKind::Xen,
    }
}

fn reasons(reasons: &[Reason]) -> Vec<proto::MatchReason> {
    reasons.iter().map(|reason| proto::MatchReason { code: reason.code.to_owned(), message: reason.message.clone() }).collect()
}

fn platform_match(image: &str, answer: &Answer, is_match: bool) -> proto::PlatformMatch {
    let containers = answer.containers.iter().map(|(kind, why)| proto::ContainerMatch {
        kind: container_kind(*kind) as i32,
        possible: why.is_empty(),
        reasons: reasons(why),
    });
    proto::PlatformMatch {
        image: image.to_owned(),
        platform: answer.platform.name.clone(),
        regions: answer.platform.clouds.iter().map(|cloud| cloud.region.clone()).filter(|region| !region.is_empty()).collect(),
        matches: is_match,
        boots: answer.boot.is_empty(),
        boot_reasons: reasons(&answer.boot),
        containers: containers.collect(),
    }
}

pub(super) fn skipped(list: Vec<(String, String)>) -> Vec<proto::Skipped> {
    list.into_iter().map(|(what, why)| proto::Skipped { what, why }).collect()
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[tonic::async_trait]
impl CatalogueService for Catalogue {
    async fn list_streams(&self, _: Request<proto::ListStreamsRequest>) -> Result<Response<proto::ListStreamsResponse>, Status> {
        self.run(Catalogue::streams).await
    }

    async fn sync_stream(&self, request: Request<proto::SyncStreamRequest>) -> Result<Response<proto::SyncStreamResponse>, Status> {
        let caller = Caller::of(&request)?;
        let name = request.into_inner().stream;
        caller.note("stream", &name);
        // A caller that goes away does not leave half a synchronisation.
        let engine = Arc::clone(&self.0);
        let running = tokio::spawn(async move { engine.sync_stream(&name).await });
        let report = running.await.map_err(|error| Error::internal(Stage::Fetch, "stream", "synchronising panicked").with_source(error))??;
        Ok(Response::new(proto::SyncStreamResponse {
            documents: count(report.documents),
            offered: count(report.offered),
            imported: report.imported,
            unchanged: count(report.unchanged),
            fetched: count(report.fetched),
            removed: report.removed,
            skipped: skipped(report.skipped),
        }))
    }

    async fn list_stream_images(
        &self,
        request: Request<proto::ListStreamImagesRequest>,
    ) -> Result<Response<proto::ListStreamImagesResponse>, Status> {
        let request = request.into_inner();
        let page = Page::new(request.page_size, &request.page_token)?;
        self.run(move |catalogue| {
            let offers = catalogue.0.stream_offers(&request.stream, &filters(&request.filters)?)?;
            let skip = usize::try_from(page.offset).unwrap_or(usize::MAX);
            let (offers, next_page_token) = page.cut(offers.into_iter().skip(skip).take(page.limit() as usize).collect());
            Ok(proto::ListStreamImagesResponse { images: offers.into_iter().map(stream_image).collect(), next_page_token })
        })
        .await
    }

    async fn import_stream_image(
        &self,
        request: Request<proto::ImportStreamImageRequest>,
    ) -> Result<Response<proto::ImportStreamImageResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        caller.note("stream", &request.stream);
        caller.note("product", &request.product);
        caller.note("version", &request.version);
        self.run(move |catalogue| {
            let id = catalogue.0.import_stream_image(&request.stream, &request.product, &request.version)?;
            Ok(proto::ImportStreamImageResponse { image: Some(catalogue.named(&id)?) })
        })
        .await
    }

    async fn publish_images(&self, _: Request<proto::PublishImagesRequest>) -> Result<Response<proto::PublishImagesResponse>, Status> {
        self.run(|catalogue| {
            let published = catalogue.0.publish_images()?;
            Ok(proto::PublishImagesResponse {
                directory: published.directory.to_string_lossy().into_owned(),
                products: count(published.products),
                versions: count(published.versions),
                platforms: count(published.platforms),
                signer: published.signer,
                skipped: skipped(published.skipped),
            })
        })
        .await
    }

    async fn r#match(&self, request: Request<proto::MatchRequest>) -> Result<Response<proto::MatchResponse>, Status> {
        let request = request.into_inner();
        self.run(move |catalogue| catalogue.matches(&request)).await
    }

    async fn set_image_name(&self, request: Request<proto::SetImageNameRequest>) -> Result<Response<proto::SetImageNameResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        caller.note("image", &request.image);
        caller.note("version", format_args!("{}@{}", request.name, request.version));
        self.run(move |catalogue| {
            let id = catalogue.image_id(&request.image)?;
            let created = catalogue.0.name_image(&request.name, &request.version, &id, &request.channels, now_secs())?;
            Ok(proto::SetImageNameResponse { created })
        })
        .await
    }

    async fn remove_image_name(&self, request: Request<proto::RemoveImageNameRequest>) -> Result<Response<proto::RemoveImageNameResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        caller.note("version", format_args!("{}@{}", request.name, request.version));
        self.run(move |catalogue| {
            if !catalogue.0.store.catalog.delete_version(&request.name, &request.version)? {
                let what = format!("{}@{}", request.name, request.version);
                return Err(Error::new(Kind::NotFound, Stage::Store, what, "there is no such version").with_reason("VERSION_NOT_FOUND"));
            }
            Ok(proto::RemoveImageNameResponse {})
        })
        .await
    }

    async fn set_image_alias(&self, request: Request<proto::SetImageAliasRequest>) -> Result<Response<proto::SetImageAliasResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        caller.note("alias", &request.alias);
        caller.note("name", &request.name);
        self.run(move |catalogue| {
            catalogue.0.alias_image(&request.alias, &request.name)?;
            Ok(proto::SetImageAliasResponse {})
        })
        .await
    }

    async fn resolve_image(&self, request: Request<proto::ResolveImageRequest>) -> Result<Response<proto::ResolveImageResponse>, Status> {
        let reference = request.into_inner().reference;
        self.run(move |catalogue| {
            let found = catalogue.0.find_image(&reference)?;
            let pinned = found.version.map_or_else(|| found.image_id.clone(), |(name, version)| format!("{name}@{version}"));
            Ok(proto::ResolveImageResponse { image: Some(catalogue.named(&found.image_id)?), pinned })
        })
        .await
    }

    async fn search_images(&self, request: Request<proto::SearchImagesRequest>) -> Result<Response<proto::SearchImagesResponse>, Status> {
        let request = request.into_inner();
        let page = Page::new(request.page_size, &request.page_token)?;
        self.run(move |catalogue| {
            let found = catalogue.0.search_images(&filters(&request.filters)?, page.limit(), page.offset)?;
            let (found, next_page_token) = page.cut(found);
            let images = found.into_iter().map(|image| catalogue.encode(image)).collect::<Result<Vec<_>>>()?;
            Ok(proto::SearchImagesResponse { images, next_page_token })
        })
        .await
    }

    async fn label_image(&self, request: Request<proto::LabelImageRequest>) -> Result<Response<proto::LabelImageResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        caller.note("image", &request.image);
        self.run(move |catalogue| {
            let id = catalogue.image_id(&request.image)?;
            catalogue.0.label_image(&id, &request.labels.into_iter().collect())?;
            Ok(proto::LabelImageResponse { image: Some(catalogue.named(&id)?) })
        })
        .await
    }

    async fn deprecate_image(&self, request: Request<proto::DeprecateImageRequest>) -> Result<Response<proto::DeprecateImageResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        caller.note("image", &request.image);
        self.run(move |catalogue| {
            let id = catalogue.image_id(&request.image)?;
            let deprecation = (!request.undo).then_some(Deprecation { since: now_secs(), reason: request.reason, replacement: request.replacement });
            catalogue.0.deprecate_image(&id, deprecation)?;
            Ok(proto::DeprecateImageResponse { image: Some(catalogue.named(&id)?) })
        })
        .await
    }

    async fn check_delete_image(
        &self,
        request: Request<proto::CheckDeleteImageRequest>,
    ) -> Result<Response<proto::CheckDeleteImageResponse>, Status> {
        let reference = request.into_inner().image;
        self.run(move |catalogue| {
            let id = catalogue.image_id(&reference)?;
            Ok(proto::CheckDeleteImageResponse { reasons: catalogue.0.why_not_delete(&id)? })
        })
        .await
    }
}
