//! VolumeService.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::{
    api::{Page, authorise::Caller, decode, encode},
    config::Role,
    error::{Error, Kind, Result, Stage},
    fs::edit::Edit,
    mapping::{self, Bus, Role as DeviceRole},
    names::{PoolName, VolumeName},
    proto::{self, volume_service_server::VolumeService},
    render::{Engine, blocking, reconfigure::Reconfigure},
};

/// The service over the engine.
pub struct Volumes(pub Arc<Engine>);

fn names(volume: Option<proto::VolumeRef>) -> Result<(PoolName, VolumeName)> {
    let volume = volume.ok_or_else(|| Error::field(Stage::Request, "volume", "is required"))?;
    Ok((
        volume.pool.parse().map_err(|why: String| Error::field(Stage::Request, "volume.pool", why))?,
        volume.name.parse().map_err(|why: String| Error::field(Stage::Request, "volume.name", why))?,
    ))
}

fn bus_of(text: &str) -> Result<Bus> {
    match text {
        "" | "virtio" => Ok(Bus::Virtio),
        "xen" => Ok(Bus::Xen),
        "scsi" => Ok(Bus::Scsi),
        "nvme" => Ok(Bus::Nvme),
        other => Err(Error::field(Stage::Request, "bus", format!("{other:?} is not xen, virtio, scsi or nvme"))),
    }
}

#[tonic::async_trait]
impl VolumeService for Volumes {
    async fn list_volumes(&self, request: Request<proto::ListVolumesRequest>) -> Result<Response<proto::ListVolumesResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let page = Page::new(request.page_size, &request.page_token)?;
        let pools = if request.pool.is_empty() {
            caller.pools()
        } else {
            let pool: PoolName = request.pool.parse().map_err(|why: String| Error::field(Stage::Request, "pool", why))?;
            caller.check_pool(&pool, Role::Read, "pool")?;
            self.0.pool(&pool)?;
            Some(vec![request.pool.as_str()])
        };
        let (records, next_page_token) = page.cut(self.0.store.catalog.volumes(pools.as_deref(), page.limit(), page.offset)?);
        let volumes = records.iter().map(encode::volume).collect();
        Ok(Response::new(proto::ListVolumesResponse { volumes, next_page_token }))
    }

    async fn get_mapping(&self, request: Request<proto::GetMappingRequest>) -> Result<Response<proto::GetMappingResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        if !request.platform.is_empty() && !caller.may_use_platform(&request.platform) {
            let denied = Error::new(Kind::PermissionDenied, Stage::Request, request.platform, "the caller may not use this platform");
            return Err(denied.with_reason("PLATFORM_NOT_ALLOWED").with_violation("platform", "is not allowed").into());
        }
        let platform = if request.platform.is_empty() { None } else { Some(self.0.platform(&request.platform)?) };
        let catalog = &self.0.store.catalog;
        let (found, what) = match (request.volume, request.render_id.as_str()) {
            (Some(_), id) if !id.is_empty() => return Err(Error::field(Stage::Request, "render_id", "is exclusive with volume").into()),
            (None, id) if !id.is_empty() => {
                let found = catalog.volume_of_render(id)?.filter(|record| caller.sees(Some(record.volume.pool.as_str())));
                (found, id.to_owned())
            }
            (volume, _) => {
                let (pool, name) = names(volume)?;
                caller.check_pool(&pool, Role::Read, "volume.pool")?;
                (catalog.volume(pool.as_str(), name.as_str())?, format!("{pool}/{name}"))
            }
        };
        let record =
            found.ok_or_else(|| Error::new(Kind::NotFound, Stage::Report, what, "there is no such volume").with_reason("VOLUME_NOT_FOUND"))?;
        let mapping = &record.mapping;
        // A platform that was renamed since the render says nothing.
        let rendered_for = mapping.platforms.first().and_then(|name| self.0.platform(name).ok());
        let bus = match (platform.or(rendered_for), request.bus.as_str()) {
            (Some(config), "") => config.platform().bus,
            (_, text) => bus_of(text)?,
        };
        let machine = match platform {
            Some(config) => Some(self.0.machine_forms(mapping, config).await?),
            None => None,
        };
        Ok(Response::new(proto::GetMappingResponse {
            libvirt_xml: if bus == Bus::Nvme { String::new() } else { mapping::libvirt::disks(mapping, bus)? },
            machine,
            xl_disks: mapping
                .devices
                .iter()
                .enumerate()
                .map(|(index, device)| mapping::xl::disk_line(device, index, Bus::Xen))
                .collect::<Result<_>>()?,
            qemu_args: mapping::qemu::arguments(mapping, bus)?,
            ec2_json: mapping::ec2::document(mapping, bus)?.to_string(),
            mapping_json: encode::mapping_json(mapping)?,
            mapping: Some(encode::mapping(mapping)),
        }))
    }

    async fn delete_volume(&self, request: Request<proto::DeleteVolumeRequest>) -> Result<Response<proto::DeleteVolumeResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let (pool, name) = names(request.volume)?;
        caller.note("volume", format_args!("{pool}/{name}"));
        caller.check_pool(&pool, Role::Render, "volume.pool")?;
        let engine = Arc::clone(&self.0);
        let deleted = blocking(Stage::Target, move || {
            // What goes with a root may lie in other pools.
            for attached in engine.store.catalog.volumes_of_root(pool.as_str(), name.as_str())? {
                if attached.role != DeviceRole::Data || request.delete_data {
                    caller.check_pool(&attached.volume.pool, Role::Render, "volume")?;
                }
            }
            engine.delete_volume(&pool, &name, request.delete_data)
        })
        .await?;
        Ok(Response::new(proto::DeleteVolumeResponse { deleted }))
    }

    async fn reconfigure_volume(
        &self,
        request: Request<proto::ReconfigureVolumeRequest>,
    ) -> Result<Response<proto::ReconfigureVolumeResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let (pool, name) = names(request.volume)?;
        caller.note("volume", format_args!("{pool}/{name}"));
        caller.check_pool(&pool, Role::Render, "volume.pool")?;
        let wanted = Reconfigure {
            pool,
            name,
            instance: decode::instance_config("instance", request.instance.as_ref())?,
            fresh_host_keys: request.fresh_host_keys,
            expand_templates: request.expand_templates,
            dry_run: request.dry_run,
        };
        let done = self.0.reconfigure_volume(wanted).await?;
        let edit = |edit: &Edit| proto::ReconfigureEdit { verb: edit.op.verb().to_owned(), path: edit.path.to_string(), why: edit.why.clone() };
        Ok(Response::new(proto::ReconfigureVolumeResponse {
            injected_json: done.mapping.injected.to_string(),
            patch_blocks: done.patch_blocks,
            written_bytes: done.written_bytes,
            edits: done.edits.iter().map(edit).collect(),
            mapping: Some(encode::mapping(&done.mapping)),
        }))
    }
}
