//! Golden images that the configuration wants prepared: begun when the daemon serves, tried again until they are there.

use std::{sync::Arc, time::Duration};

use crate::{
    config::Prerender,
    error::{Error, Kind, Result, Stage},
    render::{Engine, blocking, vouch::ManifestOrigin},
    spec::{GoldenOptions, JobSpec},
    store::records::RenderState,
};

/// Time before the second attempt; doubled for each further one.
const RETRY_FIRST: Duration = Duration::from_secs(15);
/// Longest time between two attempts.
const RETRY_MAX: Duration = Duration::from_secs(600);

/// Prepares every golden image of the configuration's list, one after another; those that fail are tried again later. Ends when all are there.
pub async fn prepare_all(engine: Arc<Engine>) {
    let mut waiting: Vec<Prerender> = engine.config.golden.prerenders.clone();
    let mut pause = RETRY_FIRST;
    while !waiting.is_empty() {
        let mut failed = Vec::new();
        for prerender in waiting {
            let what = prerender.image.clone().unwrap_or_else(|| prerender.manifest.iter().map(|path| path.display().to_string()).collect());
            match prepare(&engine, &prerender).await {
                Ok(()) => tracing::info!(image = what, "the golden image is prepared"),
                // What is wrong with the document stays wrong until somebody changes it, and then restarts or calls.
                Err(error) if !worth_another(&error) => {
                    tracing::error!(image = what, error = %error.chain(), "the golden image can't be prepared");
                }
                Err(error) => {
                    tracing::warn!(image = what, error = %error.chain(), again_secs = pause.as_secs(), "the golden image is not prepared yet");
                    failed.push(prerender);
                }
            }
        }
        waiting = failed;
        if !waiting.is_empty() {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }
}

fn worth_another(error: &Error) -> bool {
    error.is_retryable() || matches!(error.kind(), Kind::NoSpace | Kind::Busy | Kind::Unavailable | Kind::Timeout | Kind::NotFound)
}

async fn prepare(engine: &Arc<Engine>, prerender: &Prerender) -> Result<()> {
    let image_id = match &prerender.image {
        Some(id) => id.clone(),
        None => catalogue(engine, prerender).await?,
    };
    let golden = GoldenOptions {
        filesystem: prerender.filesystem,
        layout: prerender.layout,
        size_bytes: prerender.size.map(|size| size.0),
        profile: prerender.profile,
        platforms: prerender.platforms.clone(),
    };
    let started = engine.start(JobSpec::Prerender { image_id, golden }).await?;
    let id = started.snapshot.record.id;
    if let Some((_job, mut changes)) = engine.follow(&id) {
        // An error means that the job is gone, and then it has ended.
        let _ = changes.wait_for(|record| record.state.is_final()).await;
    }
    let end = Arc::clone(engine);
    let record = blocking(Stage::Golden, move || end.render(&id)).await?.record;
    match (record.state, record.failure) {
        (RenderState::Succeeded, _) => {
            engine.prepared.lock().expect("no panic while holding the prepared goldens").extend(record.golden_key);
            Ok(())
        }
        (_, Some(failure)) => {
            let kind = if failure.retryable { Kind::Unavailable } else { Kind::Conflict };
            Err(Error::new(kind, Stage::Golden, record.image_id, failure.message))
        }
        (state, None) => Err(Error::internal(Stage::Golden, record.image_id, format!("the render ended as {}", state.name()))),
    }
}

/// The id of the image that a manifest of this host describes.
async fn catalogue(engine: &Arc<Engine>, prerender: &Prerender) -> Result<String> {
    let (engine, prerender) = (Arc::clone(engine), prerender.clone());
    blocking(Stage::Manifest, move || {
        let path = prerender.manifest.unwrap_or_default();
        let text = std::fs::read_to_string(&path)
            .map_err(|error| Error::io(Stage::Manifest, path.display().to_string(), "read the manifest to be prepared", error))?;
        let (record, _) = engine.create_image(
            engine.vouch_manifest(&text, ManifestOrigin::File(&path))?,
            "",
            prerender.rootfs_url.as_deref().unwrap_or_default(),
        )?;
        Ok(record.id)
    })
    .await
}
