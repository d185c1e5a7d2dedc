//! ShareService.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::{
    api::authorise::Caller,
    error::{Error, Result, Stage},
    names::Digest,
    progress::Progress,
    proto::{self, share_service_server::ShareService},
    render::{Engine, blocking},
    share::pull::PullGolden,
};

/// The service over the engine.
pub struct Sharing(pub Arc<Engine>);

/// A transfer goes on when whoever asked for it goes away.
async fn on_its_own<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    let ended = tokio::spawn(work).await;
    ended.map_err(|error| Error::internal(Stage::Golden, "share", "the transfer panicked").with_source(error))?
}

fn key(text: &str) -> Result<Digest> {
    format!("sha256:{text}").parse().map_err(|why: String| Error::field(Stage::Request, "golden_key", why))
}

fn digest(field: &'static str, text: &str) -> Result<Digest> {
    text.parse().map_err(|why: String| Error::field(Stage::Request, field, why))
}

#[tonic::async_trait]
impl ShareService for Sharing {
    async fn list_remotes(&self, _request: Request<proto::ListRemotesRequest>) -> Result<Response<proto::ListRemotesResponse>, Status> {
        let share = &self.0.config.share;
        let registries = share.registries.iter().map(|registry| proto::Remote {
            name: registry.name.clone(),
            kind: "registry".into(),
            location: format!(
                "{}/{}",
                registry.url.trim_end_matches('/').trim_start_matches("https://").trim_start_matches("http://"),
                registry.repository
            ),
            goldens: registry.goldens,
        });
        let buckets = share.buckets.iter().map(|bucket| proto::Remote {
            name: bucket.name.clone(),
            kind: "bucket".into(),
            location: format!("s3://{}/{}", bucket.bucket, bucket.prefix),
            goldens: bucket.goldens,
        });
        Ok(Response::new(proto::ListRemotesResponse { remotes: registries.chain(buckets).collect() }))
    }

    async fn push_golden(&self, request: Request<proto::PushGoldenRequest>) -> Result<Response<proto::PushGoldenResponse>, Status> {
        let caller = Caller::of(&request)?;
        let proto::PushGoldenRequest { remote, golden_key } = request.into_inner();
        caller.note("remote", &remote);
        caller.note("golden", &golden_key);
        let (engine, key) = (Arc::clone(&self.0), key(&golden_key)?);
        let pushed = on_its_own(async move { engine.push_golden(&remote, key, &Progress::default()).await }).await?;
        Ok(Response::new(proto::PushGoldenResponse {
            reference: pushed.placed.reference,
            artifact_digest: pushed.placed.digest.map(|digest| digest.to_string()).unwrap_or_default(),
            chunks: pushed.chunks,
            sent_chunks: pushed.sent_chunks,
            sent_bytes: pushed.sent_bytes,
        }))
    }

    async fn pull_golden(&self, request: Request<proto::PullGoldenRequest>) -> Result<Response<proto::PullGoldenResponse>, Status> {
        let caller = Caller::of(&request)?;
        let proto::PullGoldenRequest { remote, golden_key, image_id, digest: wanted } = request.into_inner();
        caller.note("remote", &remote);
        caller.note("golden", &golden_key);
        let key = key(&golden_key)?;
        let wanted = if wanted.is_empty() { None } else { Some(digest("digest", &wanted)?) };
        let pull = PullGolden { remote, key, image_id: Some(image_id).filter(|id| !id.is_empty()), digest: wanted };
        let engine = Arc::clone(&self.0);
        let pulled = on_its_own(async move { engine.pull_golden_from(pull, &Progress::default()).await }).await?;
        let engine = Arc::clone(&self.0);
        let record = blocking(Stage::Store, move || engine.store.catalog.golden(key)).await?;
        Ok(Response::new(proto::PullGoldenResponse { pulled, digest: record.map(|record| record.digest.to_string()).unwrap_or_default() }))
    }

    async fn push_blob(&self, request: Request<proto::PushBlobRequest>) -> Result<Response<proto::PushBlobResponse>, Status> {
        let caller = Caller::of(&request)?;
        let proto::PushBlobRequest { remote, blob_digest } = request.into_inner();
        caller.note("remote", &remote);
        caller.note("blob", &blob_digest);
        let (engine, digest) = (Arc::clone(&self.0), digest("blob_digest", &blob_digest)?);
        let pushed = on_its_own(async move { engine.push_blob(&remote, digest).await }).await?;
        Ok(Response::new(proto::PushBlobResponse {
            reference: pushed.placed.reference,
            artifact_digest: pushed.placed.digest.map(|digest| digest.to_string()).unwrap_or_default(),
            sent_bytes: pushed.sent_bytes,
        }))
    }

    async fn pull_blob(&self, request: Request<proto::PullBlobRequest>) -> Result<Response<proto::PullBlobResponse>, Status> {
        let caller = Caller::of(&request)?;
        let proto::PullBlobRequest { remote, blob_digest } = request.into_inner();
        caller.note("remote", &remote);
        caller.note("blob", &blob_digest);
        let (engine, digest) = (Arc::clone(&self.0), digest("blob_digest", &blob_digest)?);
        let (size_bytes, pulled) = on_its_own(async move { engine.pull_blob(&remote, digest, &Progress::default()).await }).await?;
        Ok(Response::new(proto::PullBlobResponse { pulled, size_bytes }))
    }
}
