//! Every method of every service, with what it takes to call it. A method that is not here can't be called; a test compares the table with the descriptors.

use crate::config::Role;

/// How far a method reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// What belongs to no pool and harms nobody: a role in any pool is enough.
    Host,
    /// Something in a pool. The layer wants the role in any pool, the service wants it in that one.
    Pool,
    /// What callers of all pools depend on: the role is needed everywhere.
    Everywhere,
}

/// Whether a method changes anything; what does is written to the audit log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Looks.
    Reads,
    /// Changes.
    Changes,
}

/// What it takes to call a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Full name of the service.
    pub service: &'static str,
    /// Name of the method.
    pub method: &'static str,
    /// The least role.
    pub role: Role,
    /// How far it reaches.
    pub scope: Scope,
    /// Whether it changes anything.
    pub effect: Effect,
}

const fn rule(service: &'static str, method: &'static str, role: Role, scope: Scope, effect: Effect) -> Rule {
    Rule { service, method, role, scope, effect }
}

const CATALOGUE: &str = "cloudlet.v1.CatalogueService";
const HOST: &str = "cloudlet.v1.HostService";
const IMAGE: &str = "cloudlet.v1.ImageService";
const RENDER: &str = "cloudlet.v1.RenderService";
const SHARE: &str = "cloudlet.v1.ShareService";
const STORE: &str = "cloudlet.v1.StoreService";
const VOLUME: &str = "cloudlet.v1.VolumeService";
const HEALTH: &str = "grpc.health.v1.Health";
const REFLECTION_V1: &str = "grpc.reflection.v1.ServerReflection";
const REFLECTION_V1ALPHA: &str = "grpc.reflection.v1alpha.ServerReflection";

/// The table.
pub const RULES: &[Rule] = &[
    rule(CATALOGUE, "ListStreams", Role::Read, Scope::Host, Effect::Reads),
    rule(CATALOGUE, "SyncStream", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(CATALOGUE, "ListStreamImages", Role::Read, Scope::Host, Effect::Reads),
    // From trees that the configuration names, so it takes no more than CreateImage.
    rule(CATALOGUE, "ImportStreamImage", Role::Render, Scope::Host, Effect::Changes),
    rule(CATALOGUE, "PublishImages", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(CATALOGUE, "Match", Role::Read, Scope::Host, Effect::Reads),
    // What a name means is what everybody's next render gets.
    rule(CATALOGUE, "SetImageName", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(CATALOGUE, "RemoveImageName", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(CATALOGUE, "SetImageAlias", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(CATALOGUE, "ResolveImage", Role::Read, Scope::Host, Effect::Reads),
    rule(CATALOGUE, "SearchImages", Role::Read, Scope::Host, Effect::Reads),
    rule(CATALOGUE, "LabelImage", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(CATALOGUE, "DeprecateImage", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(CATALOGUE, "CheckDeleteImage", Role::Read, Scope::Host, Effect::Reads),
    rule(HOST, "GetHostInfo", Role::Read, Scope::Host, Effect::Reads),
    rule(HOST, "ListPlatforms", Role::Read, Scope::Host, Effect::Reads),
    rule(HOST, "GetCaller", Role::Read, Scope::Host, Effect::Reads),
    rule(IMAGE, "CreateImage", Role::Render, Scope::Host, Effect::Changes),
    rule(IMAGE, "UploadRootfs", Role::Render, Scope::Host, Effect::Changes),
    rule(IMAGE, "GetImage", Role::Read, Scope::Host, Effect::Reads),
    rule(IMAGE, "ListImages", Role::Read, Scope::Host, Effect::Reads),
    rule(IMAGE, "DeleteImage", Role::Admin, Scope::Everywhere, Effect::Changes),
    // Shows what a volume would hold, so whoever may make it may see it.
    rule(RENDER, "PlanRender", Role::Render, Scope::Pool, Effect::Reads),
    rule(RENDER, "StartRender", Role::Render, Scope::Pool, Effect::Changes),
    rule(RENDER, "WatchRender", Role::Read, Scope::Pool, Effect::Reads),
    rule(RENDER, "GetRender", Role::Read, Scope::Pool, Effect::Reads),
    rule(RENDER, "ListRenders", Role::Read, Scope::Pool, Effect::Reads),
    rule(RENDER, "CancelRender", Role::Render, Scope::Pool, Effect::Changes),
    rule(RENDER, "Prerender", Role::Render, Scope::Host, Effect::Changes),
    rule(RENDER, "ListGoldens", Role::Read, Scope::Host, Effect::Reads),
    rule(RENDER, "DeleteGolden", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(SHARE, "ListRemotes", Role::Read, Scope::Host, Effect::Reads),
    // What goes out goes to everybody who reads the remote, and what comes in takes space from everybody.
    rule(SHARE, "PushGolden", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(SHARE, "PullGolden", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(SHARE, "PushBlob", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(SHARE, "PullBlob", Role::Admin, Scope::Everywhere, Effect::Changes),
    // What is held takes space from everybody.
    rule(STORE, "CreateLease", Role::Render, Scope::Everywhere, Effect::Changes),
    rule(STORE, "ReleaseLease", Role::Render, Scope::Everywhere, Effect::Changes),
    rule(STORE, "ListLeases", Role::Read, Scope::Host, Effect::Reads),
    rule(STORE, "CollectGarbage", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(STORE, "ReapLeftovers", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(STORE, "ScrubStore", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(STORE, "BackupCatalog", Role::Admin, Scope::Everywhere, Effect::Changes),
    rule(VOLUME, "ListVolumes", Role::Read, Scope::Pool, Effect::Reads),
    rule(VOLUME, "GetMapping", Role::Read, Scope::Pool, Effect::Reads),
    rule(VOLUME, "DeleteVolume", Role::Render, Scope::Pool, Effect::Changes),
    rule(VOLUME, "ReconfigureVolume", Role::Render, Scope::Pool, Effect::Changes),
    rule(HEALTH, "Check", Role::Read, Scope::Host, Effect::Reads),
    rule(HEALTH, "Watch", Role::Read, Scope::Host, Effect::Reads),
    rule(REFLECTION_V1, "ServerReflectionInfo", Role::Read, Scope::Host, Effect::Reads),
    rule(REFLECTION_V1ALPHA, "ServerReflectionInfo", Role::Read, Scope::Host, Effect::Reads),
];

/// The rule of a request's path, `/service/method`.
pub fn find(path: &str) -> Option<&'static Rule> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    RULES.iter().find(|rule| rule.service == service && rule.method == method)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message;

    use super::*;

    /// Whoever adds a method decides here who may call it.
    #[test]
    fn every_method_of_the_descriptors_is_in_the_table_and_nothing_else_of_ours() {
        let sets = [
            crate::proto::DESCRIPTOR_SET,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ];
        let mut described = BTreeSet::new();
        for set in sets {
            let set = prost_types::FileDescriptorSet::decode(set).expect("a descriptor set");
            for file in &set.file {
                for service in &file.service {
                    for method in &service.method {
                        described.insert(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
                    }
                }
            }
        }
        let known: BTreeSet<String> = RULES.iter().map(|rule| format!("/{}/{}", rule.service, rule.method)).collect();
        assert_eq!(known, described, "api::authorise::table and the protocol differ");
        assert_eq!(known.len(), RULES.len(), "a method is in the table twice");
    }

    #[test]
    fn only_whole_paths_are_found() {
        assert_eq!(find("/cloudlet.v1.HostService/GetHostInfo").map(|rule| rule.role), Some(Role::Read));
        for path in ["", "/", "cloudlet.v1.HostService/GetHostInfo", "/cloudlet.v1.HostService/GetHostInfo/", "/cloudlet.v1.HostService/gethostinfo"]
        {
            assert_eq!(find(path), None, "{path}");
        }
    }
}
