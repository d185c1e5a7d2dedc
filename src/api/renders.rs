//! RenderService.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::Stream;
use tonic::{Request, Response, Status};

use crate::{
    api::{Page, authorise::Caller, decode, encode},
    config::Role,
    error::{Error, Kind, Result, Stage},
    names::Digest,
    proto::{self, render_service_server::RenderService},
    render::{
        Engine, blocking,
        jobs::{Snapshot, no_render},
    },
    spec::{GoldenOptions, JobSpec, RenderSpec},
    store::{catalog::owners::owned_key, records::RenderState},
};

/// Time between two messages of a watch.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);

/// The service over the engine.
pub struct Renders(pub Arc<Engine>);

/// Whether the caller may make volumes in every pool of a spec.
fn check_pools(caller: &Caller, spec: &RenderSpec) -> Result<()> {
    caller.check_pool(&spec.pool, Role::Render, "spec.volume.pool")?;
    for (index, device) in spec.devices.iter().enumerate() {
        if let Some(pool) = &device.pool {
            caller.check_pool(pool, Role::Render, &format!("spec.devices[{index}].volume.pool"))?;
        }
    }
    Ok(())
}

/// A render that the caller may see; any other is not there.
fn visible(engine: &Engine, caller: &Caller, id: &str) -> Result<Snapshot> {
    let snapshot = engine.render(id)?;
    let pool = snapshot.record.volume.as_ref().map(|(pool, _)| pool.as_str());
    if caller.sees(pool) { Ok(snapshot) } else { Err(no_render(id)) }
}

impl Renders {
    /// Puts the image's id in the place of a name.
    fn name_image(&self, spec: &mut Option<proto::RenderSpec>, key: Option<&str>) -> Result<()> {
        if let Some(spec) = spec {
            spec.image_id = self.0.image_of_request(&spec.image_id, key)?;
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl RenderService for Renders {
    async fn plan_render(&self, request: Request<proto::PlanRenderRequest>) -> Result<Response<proto::PlanRenderResponse>, Status> {
        let caller = Caller::of(&request)?;
        let mut spec = request.into_inner().spec;
        self.name_image(&mut spec, None)?;
        let spec = decode::render_spec(spec)?;
        check_pools(&caller, &spec)?;
        let plan = self.0.plan(spec).await?;
        Ok(Response::new(proto::PlanRenderResponse {
            golden_key: plan.golden_key.map(|key| key.hex()).unwrap_or_default(),
            golden_ready: plan.ready.is_some(),
            injected_json: plan.ready.as_ref().map(|ready| ready.injected.to_string()).unwrap_or_default(),
            patch_blocks: plan.ready.as_ref().map_or(0, |ready| ready.patch_blocks),
            size_bytes: plan.size_bytes,
            devices: plan.devices.iter().map(encode::planned_device).collect(),
            edits: plan
                .ready
                .map(|ready| ready.edits)
                .unwrap_or_default()
                .iter()
                .map(|edit| proto::PlannedEdit { verb: edit.op.verb().to_owned(), path: edit.path.to_string(), why: edit.why.clone() })
                .collect(),
        }))
    }

    async fn start_render(&self, request: Request<proto::StartRenderRequest>) -> Result<Response<proto::StartRenderResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        caller.note("key", &request.idempotency_key);
        let key = request.idempotency_key.parse().map_err(|why: String| Error::field(Stage::Request, "idempotency_key", why))?;
        let mut spec = request.spec;
        self.name_image(&mut spec, Some(&owned_key(caller.owner(), &request.idempotency_key)))?;
        let spec = decode::render_spec(spec)?;
        caller.note("volume", format_args!("{}/{}", spec.pool, spec.volume));
        caller.note("image", &spec.image_id);
        check_pools(&caller, &spec)?;
        let started = self.0.start_for(JobSpec::Render { key, spec: Box::new(spec) }, Some(caller.claim())).await?;
        caller.note("render", &started.snapshot.record.id);
        Ok(Response::new(proto::StartRenderResponse { created: started.created, render: Some(encode::render(started.snapshot)) }))
    }

    type WatchRenderStream = Pin<Box<dyn Stream<Item = Result<proto::WatchRenderResponse, Status>> + Send>>;

    async fn watch_render(&self, request: Request<proto::WatchRenderRequest>) -> Result<Response<Self::WatchRenderStream>, Status> {
        let caller = Caller::of(&request)?;
        let id = request.into_inner().render_id;
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let first = visible(&self.0, &caller, &id)?;
        let engine = Arc::clone(&self.0);
        tokio::spawn(async move {
            let mut snapshot = first;
            let mut following = engine.follow(&id);
            loop {
                let ended = snapshot.record.state.is_final();
                if sender.send(Ok(proto::WatchRenderResponse { render: Some(encode::render(snapshot)) })).await.is_err() || ended {
                    return;
                }
                match &mut following {
                    // Woken early by a change of state, otherwise to show progress.
                    Some((_, changes)) => {
                        let _ = tokio::time::timeout(WATCH_INTERVAL, changes.changed()).await;
                    }
                    None => tokio::time::sleep(WATCH_INTERVAL).await,
                }
                snapshot = match engine.render(&id) {
                    Ok(snapshot) => snapshot,
                    Err(error) => {
                        let _ = sender.send(Err(error.into())).await;
                        return;
                    }
                };
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))))
    }

    async fn get_render(&self, request: Request<proto::GetRenderRequest>) -> Result<Response<proto::GetRenderResponse>, Status> {
        let caller = Caller::of(&request)?;
        let snapshot = visible(&self.0, &caller, &request.into_inner().render_id)?;
        Ok(Response::new(proto::GetRenderResponse { render: Some(encode::render(snapshot)) }))
    }

    async fn list_renders(&self, request: Request<proto::ListRendersRequest>) -> Result<Response<proto::ListRendersResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let page = Page::new(request.page_size, &request.page_token)?;
        let state = match request.state() {
            proto::RenderState::Unspecified => None,
            proto::RenderState::Queued => Some(RenderState::Queued),
            proto::RenderState::Running => Some(RenderState::Running),
            proto::RenderState::Succeeded => Some(RenderState::Succeeded),
            proto::RenderState::Failed => Some(RenderState::Failed),
            proto::RenderState::Cancelled => Some(RenderState::Cancelled),
        };
        let (renders, next_page_token) = page.cut(self.0.renders(caller.pools().as_deref(), state, page.limit(), page.offset)?);
        let renders = renders.into_iter().map(encode::render).collect();
        Ok(Response::new(proto::ListRendersResponse { renders, next_page_token }))
    }

    async fn cancel_render(&self, request: Request<proto::CancelRenderRequest>) -> Result<Response<proto::CancelRenderResponse>, Status> {
        let caller = Caller::of(&request)?;
        let id = request.into_inner().render_id;
        caller.note("render", &id);
        if let Some((pool, _)) = visible(&self.0, &caller, &id)?.record.volume {
            let pool = pool.parse().map_err(|why: String| Error::internal(Stage::Request, &id, why))?;
            caller.check_pool(&pool, Role::Render, "render_id")?;
        }
        let snapshot = self.0.cancel(&id)?;
        Ok(Response::new(proto::CancelRenderResponse { render: Some(encode::render(snapshot)) }))
    }

    async fn prerender(&self, request: Request<proto::PrerenderRequest>) -> Result<Response<proto::PrerenderResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let golden =
            GoldenOptions { platforms: decode::platforms(&request.platforms, "platforms")?, ..decode::golden_options(request.golden, "golden")? };
        let image_id = self.0.image_of_request(&request.image_id, None)?;
        caller.note("image", &image_id);
        let already_built = self.0.is_built(&image_id, &golden).await?;
        let started = self.0.start_for(JobSpec::Prerender { image_id, golden }, Some(caller.claim())).await?;
        caller.note("render", &started.snapshot.record.id);
        Ok(Response::new(proto::PrerenderResponse { render: Some(encode::render(started.snapshot)), already_built }))
    }

    async fn list_goldens(&self, request: Request<proto::ListGoldensRequest>) -> Result<Response<proto::ListGoldensResponse>, Status> {
        let image_id = request.into_inner().image_id;
        let goldens = self.0.store.catalog.goldens((!image_id.is_empty()).then_some(image_id.as_str()))?;
        let goldens = goldens
            .into_iter()
            .map(|(golden, backed)| {
                let dir = self.0.store.golden_dir(&golden.key);
                encode::golden(golden, backed, &dir)
            })
            .collect();
        Ok(Response::new(proto::ListGoldensResponse { goldens }))
    }

    async fn delete_golden(&self, request: Request<proto::DeleteGoldenRequest>) -> Result<Response<proto::DeleteGoldenResponse>, Status> {
        let caller = Caller::of(&request)?;
        let text = request.into_inner().golden_key;
        caller.note("golden", &text);
        let key: Digest = format!("sha256:{text}").parse().map_err(|why: String| Error::field(Stage::Request, "golden_key", why))?;
        let engine = Arc::clone(&self.0);
        blocking(Stage::Store, move || {
            if engine.store.catalog.golden(key)?.is_none() {
                return Err(Error::new(Kind::NotFound, Stage::Store, key.hex(), "there is no such golden image").with_reason("GOLDEN_NOT_FOUND"));
            }
            engine.remove_golden(key)
        })
        .await?;
        Ok(Response::new(proto::DeleteGoldenResponse {}))
    }
}
