//! HostService.

use std::{num::NonZeroU32, sync::Arc};

use tonic::{Request, Response, Status};

use crate::{
    api::{authorise::Caller, encode},
    error::{Result, Stage},
    fs::FsKind,
    host::info::{Hypervisor, space},
    proto::{self, host_service_server::HostService},
    render::{Engine, blocking, keys::KeyStatus},
    server::tls::{self, Certificates},
    target::{Place, Pool, VolumeFormat},
};

/// The service over the engine.
pub struct Hosts {
    /// The engine.
    pub engine: Arc<Engine>,
    /// What the TCP listener shows, when it speaks TLS.
    pub certificates: Option<Arc<Certificates>>,
}

fn tls_status(status: &tls::Status) -> proto::TlsStatus {
    proto::TlsStatus {
        certificate_sha256: status.fingerprint.hex(),
        not_after: Some(encode::timestamp(status.not_after)),
        loaded_at: Some(encode::timestamp(status.loaded)),
        reload_error: status.error.clone().unwrap_or_default(),
    }
}

fn key_status(engine: &Engine) -> Option<proto::KeyStatus> {
    let KeyStatus { loaded, error } = engine.key_status()?;
    Some(proto::KeyStatus { loaded_at: Some(encode::timestamp(loaded)), reload_error: error.unwrap_or_default() })
}

fn confinement(engine: &Engine) -> proto::Confinement {
    let keeper = engine.config.keeper.socket.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
    let told = proto::Confinement { keeper, ..Default::default() };
    match engine.missing_layers() {
        Ok(Some(missing)) => proto::Confinement { confined: true, missing, ..told },
        Ok(None) => told,
        Err(error) => proto::Confinement { confined: true, error, ..told },
    }
}

fn pool_info(pool: &Pool) -> proto::PoolInfo {
    match &pool.place {
        Place::Directory { path } => {
            // A pool that is not there (not mounted yet) shows up with no space instead of failing the whole answer.
            let space = space(path).ok();
            proto::PoolInfo {
                name: pool.name.to_string(),
                kind: "directory".to_owned(),
                path: path.to_string_lossy().into_owned(),
                total_bytes: space.map_or(0, |space| space.total_bytes),
                free_bytes: space.map_or(0, |space| space.available_bytes),
                formats: [VolumeFormat::Raw, VolumeFormat::Qcow2Overlay, VolumeFormat::Qcow2, VolumeFormat::Loop]
                    .map(|format| encode::format(format) as i32)
                    .to_vec(),
                devices: Vec::new(),
            }
        }
        Place::Devices { directory, allow } => proto::PoolInfo {
            name: pool.name.to_string(),
            kind: "devices".to_owned(),
            path: directory.to_string_lossy().into_owned(),
            total_bytes: 0,
            free_bytes: 0,
            formats: vec![encode::format(VolumeFormat::Block) as i32],
            devices: allow.clone(),
        },
    }
}

#[tonic::async_trait]
impl HostService for Hosts {
    async fn list_platforms(&self, request: Request<proto::ListPlatformsRequest>) -> Result<Response<proto::ListPlatformsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let platforms = self.engine.config.platforms.iter().filter(|platform| caller.may_use_platform(platform.name.as_str()));
        let mut platforms: Vec<_> = platforms.map(encode::platform).collect();
        platforms.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Response::new(proto::ListPlatformsResponse { platforms }))
    }

    async fn get_caller(&self, request: Request<proto::GetCallerRequest>) -> Result<Response<proto::GetCallerResponse>, Status> {
        let caller = Caller::of(&request)?;
        let (engine, owner) = (Arc::clone(&self.engine), caller.owner().to_owned());
        let (has, held) = blocking(Stage::Store, move || engine.usage(&owner)).await?;
        let (grants, identity) = (caller.grants(), caller.identity());
        let limits = &grants.limits;
        Ok(Response::new(proto::GetCallerResponse {
            owner: grants.owner.clone(),
            identity: identity.to_string(),
            role: grants.everywhere.map(|role| role.to_string()).unwrap_or_default(),
            pool_roles: grants.pools.iter().map(|(pool, role)| (pool.to_string(), role.to_string())).collect(),
            limits: Some(proto::CallerLimits {
                volumes: limits.volumes,
                virtual_size_bytes: limits.virtual_size.map(|size| size.0),
                allocated_size_bytes: limits.allocated_size.map(|size| size.0),
                concurrent_renders: limits.concurrent_renders,
                calls_per_second: limits.calls_per_second.map(NonZeroU32::get),
            }),
            usage: Some(proto::CallerUsage {
                volumes: has.volumes + held.made.volumes,
                virtual_size_bytes: has.virtual_bytes + held.made.virtual_bytes,
                allocated_size_bytes: has.allocated_bytes + held.made.allocated_bytes,
                renders: held.renders,
            }),
        }))
    }

    async fn get_host_info(&self, request: Request<proto::GetHostInfoRequest>) -> Result<Response<proto::GetHostInfoResponse>, Status> {
        let caller = Caller::of(&request)?;
        let engine = Arc::clone(&self.engine);
        let tls = self.certificates.as_ref().map(|certificates| tls_status(&certificates.status()));
        let response = blocking(Stage::Host, move || {
            let host = engine.host_info()?;
            let (renders_running, renders_queued) = engine.load();
            let filesystems = [FsKind::Ext4, FsKind::Xfs, FsKind::Btrfs].into_iter().filter(|kind| engine.filesystem_works(*kind, &host));
            Ok(proto::GetHostInfoResponse {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                filesystems: filesystems.map(|kind| kind.name().to_owned()).collect(),
                hypervisors: match host.hypervisor {
                    Hypervisor::Xen => vec!["xen".to_owned()],
                    Hypervisor::Kvm => vec!["kvm".to_owned()],
                    Hypervisor::None => Vec::new(),
                },
                kernel: host.kernel.clone(),
                arch: host.arch.clone(),
                pools: engine.pools.values().filter(|pool| caller.sees(Some(pool.name.as_str()))).map(pool_info).collect(),
                tools: host
                    .tools
                    .iter()
                    .map(|tool| proto::Tool {
                        name: tool.name.clone(),
                        path: tool.path.to_string_lossy().into_owned(),
                        version: tool.version.clone(),
                    })
                    .collect(),
                state_directory: engine.store.dir().to_string_lossy().into_owned(),
                state_free_bytes: space(engine.store.dir()).map_or(0, |space| space.available_bytes),
                renders_running,
                renders_queued,
                tls,
                confinement: Some(confinement(&engine)),
                keys: key_status(&engine),
            })
        });
        Ok(Response::new(response.await?))
    }
}
