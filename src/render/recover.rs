//! What a daemon does first: it puts right what the one before it left.
//!
//! ```text
//!  pools     temporary files go, with the loop devices on them
//!  journal   each interrupted render: published to the last volume? recorded : what it published goes ─► marked as failed
//!            removals of volumes, goldens and tarballs are finished
//!  devices   loop volumes are attached again
//!  redo      interrupted reconfigurations are finished
//! ```
//!
//! Every step can itself be interrupted and is then done again. What one render or volume left is no reason not to serve the others: what can't be put right
//! now (a pool that is not mounted, a device in use) is logged, stays in the journal, and is tried again at the next start.

use crate::{
    error::{Error, Kind, Result, Stage},
    failpoint::reach,
    guest::config::Secret,
    render::{Engine, jobs::failure_of, now_ms},
    store::{
        catalog::journal::{Intent, RenderEntry, Sealed, SealedVolume},
        records::{RenderRecord, RenderState, VolumeKey, VolumeRecord},
    },
    target::{Place, Proof, Volume, VolumeFormat, VolumeOptions, target_for},
};

/// What became of an interrupted render.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Settled {
    /// It had published all of it: it succeeded.
    Recorded,
    /// Nothing of it is left.
    TakenBack,
}

impl Engine {
    /// See the head of this file. Blocking.
    pub fn recover(&self) -> Result<()> {
        for pool in self.pools.values() {
            if let Place::Directory { path } = &pool.place {
                std::fs::create_dir_all(path)
                    .map_err(|error| Error::io(Stage::Host, path.display().to_string(), "make the pool's directory", error))?;
                for removed in target_for(VolumeFormat::Raw).sweep(pool, false)? {
                    tracing::warn!(path = %removed.display(), "an unfinished volume was removed");
                }
            }
        }
        reach("recover-swept");
        self.settle_renders()?;
        reach("recover-settled");
        let interrupted = Error::new(Kind::Unavailable, Stage::Target, "render", "the daemon was stopped while this render waited or ran")
            .with_reason("DAEMON_RESTARTED")
            .with_hint("start it again with the same idempotency key");
        let failed = self.store.catalog.fail_interrupted(failure_of(&interrupted), now_ms())?;
        if failed > 0 {
            tracing::warn!(renders = failed, "renders of the stopped daemon are marked as failed");
        }
        reach("recover-failed");
        self.finish_volume_removals()?;
        self.finish_removals()?;
        for record in self.store.catalog.volumes_of_format(VolumeFormat::Loop)? {
            self.adopt(record);
        }
        self.finish_reconfigurations()
    }

    fn settle_renders(&self) -> Result<()> {
        for (id, entry, seed) in self.store.catalog.render_entries()? {
            if let Err(error) = self.settle_entry(&id, entry, seed) {
                tracing::error!(render = %id, error = %error.chain(), "what an interrupted render left could not be put right yet");
            }
        }
        Ok(())
    }

    /// Before the render of a key is started again: what it left the last time, and the start could not put right. Its volumes have to be reserved.
    pub(super) fn settle_pending(&self, key: &str) -> Result<()> {
        let Some(render) = self.store.catalog.render_by_key(key)?.filter(|render| render.state.is_final()) else { return Ok(()) };
        for (id, entry, seed) in self.store.catalog.render_entries()?.into_iter().filter(|(id, ..)| *id == render.id) {
            self.settle_entry(&id, entry, seed).map_err(|error| {
                let message = format!("what this render left when it was interrupted can't be put right yet: {}", error.message());
                Error::new(Kind::Unavailable, Stage::Target, error.object(), message).with_reason("RENDER_UNSETTLED")
            })?;
        }
        Ok(())
    }

    fn settle_entry(&self, id: &str, entry: RenderEntry, seed: Option<Secret>) -> Result<()> {
        let settled = match self.store.catalog.render(id)? {
            Some(render) => self.settle(&render, entry, seed)?,
            // A render's row is never removed; without one nothing of it counts.
            None => self.take_back(id, &entry).map(|()| Settled::TakenBack)?,
        };
        match settled {
            Settled::Recorded => {
                tracing::warn!(render = %id, "an interrupted render had published all of its volumes and is recorded");
                Ok(())
            }
            Settled::TakenBack => self.store.catalog.forget_render_entry(id),
        }
    }

    fn settle(&self, render: &RenderRecord, entry: RenderEntry, seed: Option<Secret>) -> Result<Settled> {
        let Some(sealed) = &entry.sealed else {
            self.take_back(&render.id, &entry)?;
            return Ok(Settled::TakenBack);
        };
        let mut published = Vec::new();
        for volume in &sealed.volumes {
            published.push((volume, self.is_published(&render.id, volume)?));
        }
        // The root is published last. A render that its caller was told the failure of stays failed, unless what it replaced is gone.
        let complete = published.iter().all(|(_, published)| *published);
        let replaces = sealed.volumes.iter().any(|volume| volume.replaces && volume.proof.is_some());
        if complete && (!render.state.is_final() || replaces) {
            self.record_settled(render, sealed, seed)?;
            return Ok(Settled::Recorded);
        }
        for (volume, _) in published.iter().filter(|(volume, published)| *published && volume.replaces && volume.proof.is_some()) {
            // What it replaced is gone: the row says what is there now.
            let seed = self.row(&volume.volume)?.and_then(|row| row.seed);
            let root = self.row(&volume.volume)?.and_then(|row| row.root);
            self.store.catalog.replace_volume(VolumeRecord { root, ..volume.record(self.adopted(&volume.volume), seed) })?;
        }
        for (volume, _) in published.iter().filter(|(volume, published)| *published && !volume.replaces && volume.proof.is_some()) {
            target_for(volume.volume.format).delete(self.pool(&volume.volume.pool)?, &volume.volume)?;
            tracing::warn!(render = %render.id, pool = %volume.volume.pool, volume = %volume.volume.name, "a volume of an interrupted render was removed");
        }
        self.take_back(&render.id, &entry)?;
        Ok(Settled::TakenBack)
    }

    fn is_published(&self, render: &str, sealed: &SealedVolume) -> Result<bool> {
        let Some(proof) = &sealed.proof else { return Ok(true) };
        let volume = &sealed.volume;
        target_for(volume.format).is_published(self.pool(&volume.pool)?, &volume.name, render, proof)
    }

    /// Records a render that had published everything.
    fn record_settled(&self, render: &RenderRecord, sealed: &Sealed, seed: Option<Secret>) -> Result<()> {
        let records: Vec<VolumeRecord> = sealed
            .volumes
            .iter()
            .enumerate()
            .map(|(index, volume)| volume.record(self.adopted(&volume.volume), seed.clone().filter(|_| index == 0)))
            .collect();
        let mut records = records;
        // The root's mapping describes the devices too.
        let volumes: Vec<Volume> = records.iter().map(|record| record.volume.clone()).collect();
        if let Some(root) = records.first_mut() {
            for device in &mut root.mapping.devices {
                if let Some(volume) = volumes.iter().find(|volume| (&volume.pool, &volume.name) == (&device.volume.pool, &device.volume.name)) {
                    device.volume = volume.clone();
                }
            }
        }
        let replaced = sealed.volumes.iter().filter(|volume| volume.replaces).map(|volume| (volume.volume.pool.clone(), volume.volume.name.clone()));
        let record = RenderRecord {
            state: RenderState::Succeeded,
            stage: Stage::Report.name().to_owned(),
            failure: None,
            golden_key: sealed.golden_key,
            started_ms: render.started_ms.or(Some(render.created_ms)),
            finished_ms: Some(now_ms()),
            ..render.clone()
        };
        self.store.catalog.finish_render(records, replaced.collect(), sealed.leftover.clone(), record)
    }

    /// The volume as it is there: with its loop device and what it takes. As it was foreseen when that can't be found out.
    fn adopted(&self, foreseen: &Volume) -> Volume {
        match self.pool(&foreseen.pool).and_then(|pool| target_for(foreseen.format).adopt(pool, foreseen)) {
            Ok(mut volume) => {
                if let (VolumeFormat::Raw | VolumeFormat::Qcow2 | VolumeFormat::Qcow2Overlay | VolumeFormat::Loop, Ok(meta)) =
                    (volume.format, std::fs::metadata(&volume.path))
                {
                    volume.allocated_size_bytes = std::os::unix::fs::MetadataExt::blocks(&meta).saturating_mul(512);
                }
                volume
            }
            Err(error) => {
                tracing::error!(pool = %foreseen.pool, volume = %foreseen.name, error = %error.chain(), "a volume could not be adopted");
                foreseen.clone()
            }
        }
    }

    fn row(&self, volume: &Volume) -> Result<Option<VolumeRecord>> {
        self.store.catalog.volume(volume.pool.as_str(), volume.name.as_str())
    }

    /// Removes what a render published or half wrote and nobody knows of. What does not say that it is this render's is left alone.
    fn take_back(&self, render: &str, entry: &RenderEntry) -> Result<()> {
        for Intent { pool, name, format } in &entry.intents {
            let (pool, target) = (self.pool(pool)?, target_for(*format));
            if target.abandon(pool, name, render)? {
                tracing::warn!(render, pool = %pool.name, volume = %name, "a device that was half written was cleared");
            }
            let is_known = self.store.catalog.volume(pool.name.as_str(), name.as_str())?.is_some();
            if !is_known && target.is_published(pool, name, render, &Proof::Mark)? {
                target.delete(pool, &stub(pool.name.clone(), name.clone(), *format))?;
                tracing::warn!(render, pool = %pool.name, volume = %name, "a volume of an interrupted render was removed");
            }
        }
        Ok(())
    }

    /// Finishes the removals of volumes that were begun.
    fn finish_volume_removals(&self) -> Result<()> {
        for key in self.store.catalog.volume_removals()? {
            if let Err(error) = self.finish_volume_removal(&key) {
                let (pool, name) = &key;
                tracing::error!(%pool, volume = %name, error = %error.chain(), "an interrupted removal could not be finished yet");
            }
        }
        Ok(())
    }

    fn finish_volume_removal(&self, key: &VolumeKey) -> Result<()> {
        match self.store.catalog.volume(key.0.as_str(), key.1.as_str())? {
            Some(record) => self.remove(&record),
            None => self.store.catalog.cancel_volume_removal(vec![key.clone()]),
        }
    }

    /// A volume that can't be adopted is reported and left alone: the others, and the daemon, go on.
    fn adopt(&self, mut record: VolumeRecord) {
        let adopted = self.pool(&record.volume.pool).and_then(|pool| target_for(record.volume.format).adopt(pool, &record.volume));
        match adopted {
            Ok(volume) if volume == record.volume => {}
            Ok(volume) => {
                tracing::info!(pool = %volume.pool, volume = %volume.name, device = %volume.device.display(), "volume attached again");
                for device in &mut record.mapping.devices {
                    if device.volume.pool == volume.pool && device.volume.name == volume.name {
                        device.volume = volume.clone();
                    }
                }
                record.volume = volume;
                if let Err(error) = self.store.catalog.update_volume(record) {
                    tracing::error!(error = %error.chain(), "the volume's new device could not be recorded");
                }
            }
            Err(error) => {
                tracing::error!(pool = %record.volume.pool, volume = %record.volume.name, error = %error.chain(), "a volume could not be attached again");
            }
        }
    }
}

/// A volume of which only pool, name and format are known: enough to remove it.
fn stub(pool: crate::names::PoolName, name: crate::names::VolumeName, format: VolumeFormat) -> Volume {
    Volume {
        pool,
        name,
        format,
        path: std::path::PathBuf::new(),
        device: std::path::PathBuf::new(),
        virtual_size_bytes: 0,
        allocated_size_bytes: 0,
        backing: None,
        pinned: None,
        options: VolumeOptions::default(),
    }
}
