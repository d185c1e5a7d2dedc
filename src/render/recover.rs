//! What a daemon does first: it puts right what the one before it left.

use crate::{
    error::{Error, Kind, Result, Stage},
    render::{Engine, jobs::failure_of, now_ms},
    store::records::VolumeRecord,
    target::{Place, VolumeFormat, target_for},
};

impl Engine {
    /// What a daemon does first: renders that a stopped daemon left are failed, temporary files of pools are removed, loop devices are attached again,
    /// and volumes whose reconfiguration was interrupted get the rest of it.
    pub fn recover(&self) -> Result<()> {
        let interrupted = Error::new(Kind::Unavailable, Stage::Target, "render", "the daemon was stopped while this render waited or ran")
            .with_reason("DAEMON_RESTARTED")
            .with_hint("start it again with the same idempotency key");
        let failed = self.store.catalog.fail_interrupted(failure_of(&interrupted), now_ms())?;
        if failed > 0 {
            tracing::warn!(renders = failed, "renders of the stopped daemon are marked as failed");
        }
        self.finish_removals()?;
        for pool in self.pools.values() {
            if let Place::Directory { path } = &pool.place {
                std::fs::create_dir_all(path)
                    .map_err(|error| Error::io(Stage::Host, path.display().to_string(), "make the pool's directory", error))?;
                for removed in target_for(VolumeFormat::Raw).sweep(pool, false)? {
                    tracing::warn!(path = %removed.display(), "an unfinished volume was removed");
                }
            }
        }
        for record in self.store.catalog.volumes_of_format(VolumeFormat::Loop)? {
            self.adopt(record);
        }
        self.finish_reconfigurations()
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
