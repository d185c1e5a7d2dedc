//! StoreService.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::{
    api::{authorise::Caller, encode},
    error::{Error, Kind, Result, Stage},
    names::Digest,
    proto::{self, collect_garbage_request::Goal as WantedGoal, store_service_server::StoreService},
    render::{
        Engine, blocking,
        collect::{Collected, Goal},
        now_secs,
        reap::{Leftover, Reap},
        verify::Damaged,
    },
    store::{
        catalog::leases::{Held, Lease},
        gc::{Item, Kept},
    },
};

/// Longest name of an owner.
const OWNER_CHARS_MAX: usize = 200;
/// Longest reason.
const REASON_CHARS_MAX: usize = 1000;

/// The service over the engine.
pub struct Stores(pub Arc<Engine>);

#[tonic::async_trait]
impl StoreService for Stores {
    async fn create_lease(&self, request: Request<proto::CreateLeaseRequest>) -> Result<Response<proto::CreateLeaseResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        caller.note("holder", &request.owner);
        let engine = Arc::clone(&self.0);
        let lease = blocking(Stage::Store, move || create_lease(&engine, request)).await?;
        caller.note("lease", &lease.id);
        caller.note(lease.kind.name(), &lease.object);
        Ok(Response::new(proto::CreateLeaseResponse { lease: Some(encode_lease(lease)) }))
    }

    async fn release_lease(&self, request: Request<proto::ReleaseLeaseRequest>) -> Result<Response<proto::ReleaseLeaseResponse>, Status> {
        let caller = Caller::of(&request)?;
        let id = request.into_inner().lease_id;
        caller.note("lease", &id);
        let engine = Arc::clone(&self.0);
        let released = blocking(Stage::Store, move || engine.store.catalog.release_lease(&id)).await?;
        Ok(Response::new(proto::ReleaseLeaseResponse { released }))
    }

    async fn list_leases(&self, _request: Request<proto::ListLeasesRequest>) -> Result<Response<proto::ListLeasesResponse>, Status> {
        let engine = Arc::clone(&self.0);
        let leases = blocking(Stage::Store, move || engine.store.catalog.leases()).await?;
        Ok(Response::new(proto::ListLeasesResponse { leases: leases.into_iter().map(encode_lease).collect() }))
    }

    async fn collect_garbage(&self, request: Request<proto::CollectGarbageRequest>) -> Result<Response<proto::CollectGarbageResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        caller.note("dry_run", request.dry_run);
        let goal = match request.goal {
            None => Goal::Budget,
            Some(WantedGoal::UsedBytesMax(max)) => Goal::AtMost(max),
            Some(WantedGoal::FreeBytes(bytes)) => Goal::Free(bytes),
        };
        let engine = Arc::clone(&self.0);
        let done = blocking(Stage::Store, move || engine.collect(goal, request.min_age_seconds, request.dry_run)).await?;
        Ok(Response::new(encode_collected(done)))
    }

    async fn reap_leftovers(&self, request: Request<proto::ReapLeftoversRequest>) -> Result<Response<proto::ReapLeftoversResponse>, Status> {
        let caller = Caller::of(&request)?;
        let proto::ReapLeftoversRequest { dry_run, volumes } = request.into_inner();
        caller.note("dry_run", dry_run);
        let engine = Arc::clone(&self.0);
        let found = blocking(Stage::Store, move || engine.reap(Reap { dry_run, volumes })).await?;
        let encode = |left: Leftover| proto::Leftover {
            kind: left.left.name().to_owned(),
            path: left.path.display().to_string(),
            size_bytes: left.bytes,
            why: left.why,
            removed: left.removed,
            kept_because: left.kept_because,
        };
        Ok(Response::new(proto::ReapLeftoversResponse { leftovers: found.into_iter().map(encode).collect() }))
    }

    async fn scrub_store(&self, _request: Request<proto::ScrubStoreRequest>) -> Result<Response<proto::ScrubStoreResponse>, Status> {
        let engine = Arc::clone(&self.0);
        let done = blocking(Stage::Store, move || engine.scrub()).await?;
        let encode = |damaged: Damaged| proto::DamagedObject {
            kind: damaged.kind.name().to_owned(),
            name: name_of(damaged.kind, &damaged.object),
            why: damaged.why,
            quarantined: damaged.quarantined,
        };
        Ok(Response::new(proto::ScrubStoreResponse {
            checked: done.checked,
            bytes: done.bytes,
            damaged: done.damaged.into_iter().map(encode).collect(),
        }))
    }

    async fn backup_catalog(&self, request: Request<proto::BackupCatalogRequest>) -> Result<Response<proto::BackupCatalogResponse>, Status> {
        let caller = Caller::of(&request)?;
        let keep = request.into_inner().keep as usize;
        let engine = Arc::clone(&self.0);
        let backup = blocking(Stage::Store, move || engine.store.back_up(keep)).await?;
        caller.note("backup", backup.path.display());
        tracing::info!(path = %backup.path.display(), bytes = backup.size, "catalogue backed up");
        Ok(Response::new(proto::BackupCatalogResponse {
            path: backup.path.display().to_string(),
            size_bytes: backup.size,
            digest: backup.digest.to_string(),
            removed_paths: backup.removed.iter().map(|path| path.display().to_string()).collect(),
        }))
    }
}

fn create_lease(engine: &Engine, request: proto::CreateLeaseRequest) -> Result<Lease> {
    use proto::create_lease_request::Object;
    let missing =
        |what: &str, name: &str| Error::new(Kind::NotFound, Stage::Store, name, format!("there is no such {what}")).with_reason("NOT_IN_STORE");
    let catalog = &engine.store.catalog;
    let (kind, object) = match request.object {
        None => return Err(Error::field(Stage::Request, "object", "one of image_id, golden_key and blob_digest is required")),
        Some(Object::ImageId(id)) => {
            catalog.image(&id)?.ok_or_else(|| missing("image", &id))?;
            (Held::Image, id)
        }
        Some(Object::GoldenKey(text)) => {
            let key: Digest = format!("sha256:{text}").parse().map_err(|why: String| Error::field(Stage::Request, "golden_key", why))?;
            catalog.golden(key)?.ok_or_else(|| missing("golden image", &text))?;
            (Held::Golden, key.hex())
        }
        Some(Object::BlobDigest(text)) => {
            let digest: Digest = text.parse().map_err(|why: String| Error::field(Stage::Request, "blob_digest", why))?;
            if !engine.store.has_blob(&digest)? {
                return Err(missing("tarball", &text));
            }
            (Held::Blob, digest.to_string())
        }
    };
    let printable = |field: &'static str, text: &str, max: usize| match text.chars().count() > max || text.chars().any(char::is_control) {
        true => Err(Error::field(Stage::Request, field, format!("has more than {max} characters, or some that can't be printed"))),
        false => Ok(()),
    };
    if request.owner.is_empty() {
        return Err(Error::field(Stage::Request, "owner", "is required"));
    }
    printable("owner", &request.owner, OWNER_CHARS_MAX)?;
    printable("reason", &request.reason, REASON_CHARS_MAX)?;
    let now = now_secs();
    let expires = match i64::try_from(request.ttl_seconds).ok().and_then(|ttl| now.checked_add(ttl)) {
        _ if request.ttl_seconds == 0 => None,
        Some(end) => Some(end),
        None => return Err(Error::field(Stage::Request, "ttl_seconds", format!("{} is no time", request.ttl_seconds))),
    };
    let id = format!("lse-{}", &uuid::Uuid::new_v4().simple().to_string()[..20]);
    let lease = Lease { id, kind, object, owner: request.owner, reason: request.reason, created: now, expires };
    catalog.add_lease(lease.clone())?;
    Ok(lease)
}

fn encode_lease(lease: Lease) -> proto::Lease {
    use proto::lease::Object;
    proto::Lease {
        id: lease.id,
        object: Some(match lease.kind {
            Held::Image => Object::ImageId(lease.object),
            Held::Golden => Object::GoldenKey(lease.object),
            Held::Blob => Object::BlobDigest(lease.object),
        }),
        owner: lease.owner,
        reason: lease.reason,
        created_at: Some(encode::timestamp(lease.created)),
        expires_at: lease.expires.map(encode::timestamp),
    }
}

/// How callers name it.
fn name_of(kind: Kept, object: &Digest) -> String {
    match kind {
        Kept::Golden => object.hex(),
        Kept::Blob => object.to_string(),
    }
}

fn encode_collected(done: Collected) -> proto::CollectGarbageResponse {
    let object = |item: Item| proto::StoreObject {
        kind: item.kind.name().to_owned(),
        name: name_of(item.kind, &item.object),
        size_bytes: item.bytes,
        last_used_at: Some(encode::timestamp(item.last_used)),
        removed: item.keep.is_none(),
        kept_because: item.keep.as_ref().map(|keep| keep.word().to_owned()).unwrap_or_default(),
        explanation: item.keep.map(|keep| keep.to_string()).unwrap_or_default(),
    };
    proto::CollectGarbageResponse {
        objects: done.items.into_iter().map(object).collect(),
        used_bytes: done.used_bytes,
        freed_bytes: done.freed_bytes,
    }
}
