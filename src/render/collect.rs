//! Garbage collection, the part that looks and removes; what goes is decided by [`crate::store::gc`].
//!
//! ```text
//!  look    rows of goldens and blobs, volumes, leases, files of pools, running jobs, locks   ─► Item {bytes, last used, why it stays}
//!  choose  the longest unused, until enough is free                                          ─► Item {goes}
//!  remove  mark in the catalogue ─► wanted meanwhile? unmark : rename away or unlink ─► row and mark go ─► bytes go
//! ```
//!
//! A job says what it wants before it looks whether it is there; a removal is marked before it looks whether a job wants it. So at least one of the two sees
//! the other. What is left of a removal that was interrupted is finished at the next start.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    sync::Arc,
    time::Duration,
};

use crate::{
    error::{Error, Kind, Result, Stage},
    failpoint::reach,
    host::in_use,
    names::Digest,
    render::{Engine, blocking, now_secs},
    store::{
        catalog::{gc::Begun, leases::Held},
        gc::{self, Item, Keep, Kept},
        records::ImageRecord,
        sync_dir,
    },
    target::{Place, qcow2::backing},
};

/// How much is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// As the configured budget says.
    Budget,
    /// Until this many bytes are used at most; 0 for everything that may go.
    AtMost(u64),
    /// Until this many bytes are freed.
    Free(u64),
}

/// What was done, or would be.
#[derive(Debug, Clone, PartialEq)]
pub struct Collected {
    /// Goldens and blobs, the longest unused first; those without a reason to stay are gone.
    pub items: Vec<Item>,
    /// Bytes in use before.
    pub used_bytes: u64,
    /// Bytes freed.
    pub freed_bytes: u64,
}

/// What jobs that have not ended may want.
struct Wanted {
    goldens: BTreeSet<Digest>,
    images: BTreeSet<String>,
    /// When the oldest of them was admitted, seconds since 1970: what was used later may be theirs.
    since: Option<i64>,
}

impl Engine {
    /// Removes goldens and blobs that nobody needs until the goal is reached, or says what would go. `min_age_secs`: instead of the configured one. Blocking.
    pub fn collect(&self, goal: Goal, min_age_secs: Option<u64>, dry_run: bool) -> Result<Collected> {
        let _turn = self.collecting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let now = now_secs();
        if !dry_run {
            self.store.catalog.drop_expired_leases(now)?;
            self.store.catalog.use_was_not_after(now)?;
        }
        let min_age = min_age_secs.unwrap_or(self.config.gc.min_age_secs);
        let mut items = self.items(now, i64::try_from(min_age).unwrap_or(i64::MAX))?;
        let used_bytes = items.iter().map(|item| item.bytes).fold(0, u64::saturating_add);
        let config = &self.config.gc;
        let bytes = match goal {
            Goal::Budget => gc::over_budget(used_bytes, config.max_size.0, config.high_water_percent, config.low_water_percent),
            Goal::AtMost(max) => used_bytes.saturating_sub(max),
            Goal::Free(bytes) => bytes,
        };
        gc::choose(&mut items, bytes);
        let mut freed_bytes = 0u64;
        for item in items.iter_mut().filter(|item| item.keep.is_none()) {
            let kept = if dry_run { None } else { self.collect_one(item, now)? };
            match kept {
                Some(keep) => item.keep = Some(keep),
                None => freed_bytes = freed_bytes.saturating_add(item.bytes),
            }
        }
        Ok(Collected { items, used_bytes, freed_bytes })
    }

    /// Frees about `bytes` for somebody who would be refused otherwise; what can't be freed is logged.
    pub(super) fn make_room(&self, bytes: u64) {
        match self.collect(Goal::Free(bytes), None, false) {
            Ok(done) => tracing::info!(wanted_bytes = bytes, freed_bytes = done.freed_bytes, "collected for want of space"),
            Err(error) => tracing::error!(error = %error.chain(), "garbage collection failed"),
        }
    }

    /// Finishes the removals that a stopped daemon began, and forgets goldens whose files never got their name.
    pub(super) fn finish_removals(&self) -> Result<()> {
        let catalog = &self.store.catalog;
        for (kind, object) in catalog.removals()? {
            self.unlink(kind, &object)?;
            catalog.end_removal(kind, object)?;
            tracing::warn!(kind = kind.name(), %object, "an interrupted removal was finished");
        }
        for (golden, volumes) in catalog.goldens(None)? {
            if volumes == 0 && !self.store.golden_dir(&golden.key).exists() {
                catalog.end_removal(Kept::Golden, golden.key)?;
                tracing::warn!(golden = %golden.key.hex(), "a golden image without files was forgotten");
            }
        }
        Ok(())
    }

    /// Removes a golden image that no volume is backed by, no job uses and no lease holds: `Kind::Conflict` otherwise.
    pub fn remove_golden(&self, key: Digest) -> Result<()> {
        let _turn = self.collecting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut item = Item { kind: Kept::Golden, object: key, bytes: 0, last_used: 0, keep: None };
        let overlay = self.overlays()?.remove(&key.hex()).map(Keep::Overlay);
        match overlay.map_or_else(|| self.collect_one(&mut item, now_secs()), |keep| Ok(Some(keep)))? {
            None => Ok(()),
            Some(keep) => Err(Error::new(Kind::Conflict, Stage::Store, key.hex(), keep.to_string()).with_reason(match keep {
                Keep::Lease { .. } => "GOLDEN_LEASED",
                _ => "GOLDEN_IN_USE",
            })),
        }
    }

    /// Everything that could go, with the reasons of those that stay.
    fn items(&self, now: i64, min_age: i64) -> Result<Vec<Item>> {
        let catalog = &self.store.catalog;
        let (goldens, blobs, images, overlays, wanted) =
            (catalog.goldens(None)?, catalog.blobs()?, catalog.images(u32::MAX, 0)?, self.overlays()?, self.wanted());
        let configured = self.configured();
        let leases: Vec<_> = catalog.leases()?.into_iter().filter(|lease| lease.expires.is_none_or(|expires| expires > now)).collect();
        let leased = |kind: Held, object: &str| {
            let lease = leases.iter().find(|lease| lease.kind == kind && lease.object == object)?;
            Some(Keep::Lease { owner: lease.owner.clone(), reason: lease.reason.clone() })
        };
        let young = |used: i64| {
            let age = now.saturating_sub(used).max(0);
            (age < min_age).then_some(Keep::Young(age))
        };
        let mut items = Vec::with_capacity(goldens.len() + blobs.len());
        for (golden, volumes) in goldens {
            let name = golden.key.hex();
            let keep = (volumes > 0)
                .then_some(Keep::Volumes(volumes))
                .or_else(|| overlays.get(&name).cloned().map(Keep::Overlay))
                .or_else(|| wanted.goldens.contains(&golden.key).then_some(Keep::Running))
                .or_else(|| leased(Held::Golden, &name).or_else(|| leased(Held::Image, &golden.image_id)))
                .or_else(|| (configured.contains(&name) || configured.contains(&golden.image_id)).then_some(Keep::Configured))
                .or_else(|| young(golden.last_used));
            items.push(Item { kind: Kept::Golden, object: golden.key, bytes: golden.allocated, last_used: golden.last_used, keep });
        }
        for blob in blobs {
            let name = blob.digest.to_string();
            let of: Vec<&ImageRecord> = images.iter().filter(|image| image.rootfs_digest == Some(blob.digest)).collect();
            let keep = of
                .iter()
                .find(|image| image.rootfs_url.is_none())
                .map(|image| Keep::OnlyCopy(image.id.clone()))
                .or_else(|| is_wanted(&wanted, &of, blob.last_used).then_some(Keep::Running))
                .or_else(|| leased(Held::Blob, &name).or_else(|| of.iter().find_map(|image| leased(Held::Image, &image.id))))
                .or_else(|| (configured.contains(&name) || of.iter().any(|image| configured.contains(&image.id))).then_some(Keep::Configured))
                .or_else(|| young(blob.last_used));
            items.push(Item { kind: Kept::Blob, object: blob.digest, bytes: blob.size, last_used: blob.last_used, keep });
        }
        Ok(items)
    }

    /// Removes one; gives the reason when it stays after all.
    fn collect_one(&self, item: &mut Item, now: i64) -> Result<Option<Keep>> {
        let catalog = &self.store.catalog;
        // A build of the key waits until it is gone, and then builds it; one that is at work keeps it.
        let _flight = match item.kind {
            Kept::Golden => match self.builds.try_enter(&item.object) {
                Some(flight) => Some(flight),
                None => return Ok(Some(Keep::Running)),
            },
            Kept::Blob => None,
        };
        // No blob of this name appears while it is removed.
        let _gate = self.store.blob_gate();
        if let Begun::Refused(keep) = catalog.begin_removal(item.kind, item.object, now)? {
            return Ok(Some(keep));
        }
        reach("collect-marked");
        // Before looking who wants it: whoever says so later does not find it any more.
        self.loaded
            .lock()
            .expect("no panic while holding loaded goldens")
            .retain(|loaded| item.kind != Kept::Golden || loaded.record.key != item.object);
        if let Some(keep) = self.wanted_now(item)? {
            catalog.cancel_removal(item.kind, item.object)?;
            return Ok(Some(keep));
        }
        if let Err(error) = self.unlink(item.kind, &item.object) {
            // It has its name still: nothing is lost.
            catalog.cancel_removal(item.kind, item.object)?;
            return Err(error);
        }
        reach("collect-unlinked");
        catalog.end_removal(item.kind, item.object)?;
        tracing::info!(kind = item.kind.name(), object = %item.object, bytes = item.bytes, "collected");
        Ok(None)
    }

    /// Whether somebody wants what was just marked.
    fn wanted_now(&self, item: &Item) -> Result<Option<Keep>> {
        let wanted = self.wanted();
        match item.kind {
            Kept::Golden => {
                if wanted.goldens.contains(&item.object) {
                    return Ok(Some(Keep::Running));
                }
                let disk = self.store.golden_dir(&item.object).join("disk.raw");
                match in_use::refuse_file_in_use(&disk) {
                    Err(error) if error.kind() == Kind::Conflict => Ok(Some(Keep::InUse(error.message().to_owned()))),
                    other => other.map(|()| None),
                }
            }
            Kept::Blob => {
                let images = self.store.catalog.images(u32::MAX, 0)?;
                let of: Vec<&ImageRecord> = images.iter().filter(|image| image.rootfs_digest == Some(item.object)).collect();
                Ok(is_wanted(&wanted, &of, item.last_used).then_some(Keep::Running))
            }
        }
    }

    /// Takes the name from a golden or blob, durably, and frees its bytes. Gone already is success. On an error it still has its name.
    pub(super) fn unlink(&self, kind: Kept, object: &Digest) -> Result<()> {
        let failed = |path: &std::path::Path, doing: &'static str, error| Error::io(Stage::Store, path.display().to_string(), doing, error);
        let is_gone = |error: &std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
        match kind {
            Kept::Golden => {
                let dir = self.store.golden_dir(object);
                // In `tmp` it is rubbish, whatever happens next.
                let gone = self.store.tmp().join(format!("gone-{}-{}", object.hex(), uuid::Uuid::new_v4().simple()));
                match fs::rename(&dir, &gone) {
                    Err(error) if is_gone(&error) => return Ok(()),
                    other => other.map_err(|error| failed(&dir, "move the golden image away", error))?,
                }
                sync_dir(&self.store.dir().join("goldens"))?;
                if let Err(error) = fs::remove_dir_all(&gone) {
                    tracing::warn!(path = %gone.display(), %error, "a removed golden image still takes space until the next start");
                }
            }
            Kept::Blob => {
                let path = self.store.blob_path(object);
                match fs::remove_file(&path) {
                    Err(error) if is_gone(&error) => return Ok(()),
                    other => other.map_err(|error| failed(&path, "remove the tarball", error))?,
                }
                sync_dir(&self.store.dir().join("blobs"))?;
            }
        }
        Ok(())
    }

    fn wanted(&self) -> Wanted {
        let mut wanted = Wanted { goldens: BTreeSet::new(), images: BTreeSet::new(), since: None };
        for record in self.live_records() {
            wanted.goldens.extend(record.golden_key);
            let since = record.created_ms / 1000;
            wanted.since = Some(wanted.since.map_or(since, |oldest: i64| oldest.min(since)));
            wanted.images.insert(record.image_id);
        }
        wanted
    }

    /// What the configuration keeps: `gc.keep`, and what it has prepared.
    fn configured(&self) -> BTreeSet<String> {
        let prepared = self.prepared.lock().expect("no panic while holding the prepared goldens");
        let mut configured: BTreeSet<String> = prepared.iter().map(Digest::hex).collect();
        configured.extend(self.config.gc.keep.iter().cloned());
        configured.extend(self.config.golden.prerenders.iter().filter_map(|prerender| prerender.image.clone()));
        configured
    }

    /// Keys of goldens that files of directory pools lie over, whoever made them, each with such a file.
    pub(super) fn overlays(&self) -> Result<BTreeMap<String, String>> {
        let mut found = BTreeMap::new();
        for pool in self.pools.values() {
            let Place::Directory { path } = &pool.place else { continue };
            let failed = |doing: &'static str, error| Error::io(Stage::Store, path.display().to_string(), doing, error);
            let entries = match fs::read_dir(path) {
                // Not mounted: nobody knows what would be there.
                Err(error) => return Err(failed("look for overlays in the pool", error)),
                Ok(entries) => entries,
            };
            for entry in entries {
                let entry = entry.map_err(|error| failed("look for overlays in the pool", error))?;
                if !entry.file_type().is_ok_and(|kind| kind.is_file()) {
                    continue;
                }
                match backing::backing_name(&entry.path()) {
                    Ok(name) => {
                        found.extend(name.iter().flat_map(|name| backing::keys_in(name)).map(|key| (key, entry.path().display().to_string())))
                    }
                    // Removed meanwhile.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(Error::io(Stage::Store, entry.path().display().to_string(), "see what the image lies over", error)),
                }
            }
        }
        Ok(found)
    }
}

/// Whether a job that has not ended may want a tarball of these images that was used last at `used`.
fn is_wanted(wanted: &Wanted, images: &[&ImageRecord], used: i64) -> bool {
    images.iter().any(|image| wanted.images.contains(&image.id)) || wanted.since.is_some_and(|since| used >= since)
}

/// Keeps the store within its budget, every `gc.interval_secs`.
pub async fn collect_regularly(engine: Arc<Engine>) {
    let interval = engine.config.gc.interval_secs;
    if interval == 0 || engine.config.gc.max_size.0 == 0 {
        return;
    }
    loop {
        let worker = Arc::clone(&engine);
        match blocking(Stage::Store, move || worker.collect(Goal::Budget, None, false)).await {
            Ok(done) if done.freed_bytes > 0 => {
                tracing::info!(used_bytes = done.used_bytes, freed_bytes = done.freed_bytes, "the store is within its budget")
            }
            Ok(_) => {}
            Err(error) => tracing::error!(error = %error.chain(), "garbage collection failed"),
        }
        tokio::time::sleep(Duration::from_secs(interval)).await;
    }
}
