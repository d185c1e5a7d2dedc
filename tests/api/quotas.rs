//! What callers may have and ask for: quotas of volumes, bytes and renders, calls a second, and the owner that they count for.

use std::{num::NonZeroU32, time::Duration};

use cloudletd::{
    config::{Access, CallerLimits, Role},
    proto::{self, VolumeFormat, host_service_client::HostServiceClient},
    units::{Bytes, MIB},
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use crate::common::{
    pki::Authority,
    server::{Daemon, spec, volume},
};

/// A caller with a certificate.
struct Client {
    renders: proto::render_service_client::RenderServiceClient<Channel>,
    volumes: proto::volume_service_client::VolumeServiceClient<Channel>,
    hosts: HostServiceClient<Channel>,
}

impl Client {
    async fn connect(authority: &Authority, address: std::net::SocketAddr, name: &str) -> Client {
        let channel = authority.endpoint(address, Some(authority.issue(name))).connect().await.expect("a client of ours");
        Client {
            renders: proto::render_service_client::RenderServiceClient::new(channel.clone()),
            volumes: proto::volume_service_client::VolumeServiceClient::new(channel.clone()),
            hosts: HostServiceClient::new(channel),
        }
    }

    async fn start(&mut self, key: &str, spec: proto::RenderSpec) -> Result<proto::Render, Status> {
        let request = proto::StartRenderRequest { idempotency_key: key.into(), spec: Some(spec) };
        self.renders.start_render(request).await.map(|response| response.into_inner().render.expect("a render"))
    }

    async fn used(&mut self) -> (String, proto::CallerUsage) {
        let response = self.hosts.get_caller(proto::GetCallerRequest {}).await.expect("answered").into_inner();
        (response.owner, response.usage.expect("always there"))
    }
}

#[track_caller]
fn assert_refused(result: Result<proto::Render, Status>, reason: &str, owner: &str, retry: bool) {
    let status = result.expect_err(reason);
    assert_eq!(status.code(), Code::ResourceExhausted, "{}", status.message());
    let details = status.get_error_details();
    assert_eq!(details.error_info().expect("always there").reason, reason, "{}", status.message());
    assert_eq!(details.quota_failure().expect("whose quota").violations[0].subject, owner);
    assert_eq!(details.retry_info().is_some(), retry, "{}", status.message());
}

fn entry(name: &str, limits: CallerLimits) -> Access {
    Access { common_names: vec![name.to_owned()], limits, ..Access::new(Role::Render) }
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_and_bytes_are_bounded_per_owner_across_restarts_and_replacement() {
    let authority = Authority::new();
    let dir = tempfile::tempdir().expect("temporary directory");
    let limits =
        CallerLimits { volumes: Some(2), virtual_size: Some(Bytes(200 * MIB)), allocated_size: Some(Bytes(100 * MIB)), ..CallerLimits::default() };
    let start = async || {
        let mut address = None;
        let daemon = Daemon::start_in(dir.path(), |config| {
            address = Some(authority.serve(config, dir.path()));
            config.access = vec![Access { name: Some("team".into()), ..entry("web*", limits) }, entry("other", CallerLimits::default())];
        })
        .await;
        (daemon, address.expect("set"))
    };
    let (mut daemon, address) = start().await;
    let image = daemon.image().await;
    let mut one = Client::connect(&authority, address, "web1").await;
    // The volume's size is the golden's, 64 MiB; an overlay allocates next to nothing.
    let first = one.start("first", spec(&image, "vm1", VolumeFormat::Qcow2Overlay)).await.expect("within the quota");
    daemon.wait(&first.id).await;
    assert_eq!(one.used().await.0, "team");
    assert_eq!(one.used().await.1.virtual_size_bytes, 64 * MIB);

    let mut large = spec(&image, "vm2", VolumeFormat::Qcow2Overlay);
    large.size_bytes = 150 * MIB;
    assert_refused(one.start("large", large).await, "QUOTA_VIRTUAL_SIZE", "team", false);
    let mut allocated = spec(&image, "vm2", VolumeFormat::Raw);
    allocated.size_bytes = 120 * MIB;
    allocated.options = Some(proto::VolumeOptions { preallocation: proto::Preallocation::Falloc as i32, ..Default::default() });
    assert_refused(one.start("allocated", allocated).await, "QUOTA_ALLOCATED_SIZE", "team", false);
    daemon.stop().await;

    let (mut daemon, address) = start().await;
    // Another certificate of the same entry is the same owner.
    let mut two = Client::connect(&authority, address, "web2").await;
    assert_eq!(two.used().await.1.volumes, 1, "owners are remembered");
    let second = two.start("second", spec(&image, "vm2", VolumeFormat::Qcow2Overlay)).await.expect("within the quota");
    daemon.wait(&second.id).await;
    assert_refused(two.start("third", spec(&image, "vm3", VolumeFormat::Qcow2Overlay)).await, "QUOTA_VOLUMES", "team", false);
    let mut other = Client::connect(&authority, address, "other").await;
    let theirs = other.start("theirs", spec(&image, "vm3", VolumeFormat::Qcow2Overlay)).await.expect("no limit for them");
    daemon.wait(&theirs.id).await;

    // Whoever replaces a volume does not become its owner, and replacing one's own takes nothing more.
    let mut again = spec(&image, "vm2", VolumeFormat::Qcow2Overlay);
    again.replace = true;
    let replaced = other.start("replaced", again.clone()).await.expect("in the same pool");
    assert_eq!(daemon.wait(&replaced.id).await.state(), proto::RenderState::Succeeded);
    assert_eq!((two.used().await.1.volumes, other.used().await.1.volumes), (2, 1));
    let replaced = two.start("replaced-again", again).await.expect("nothing more than there is");
    assert_eq!(daemon.wait(&replaced.id).await.state(), proto::RenderState::Succeeded);
    two.volumes.delete_volume(proto::DeleteVolumeRequest { volume: Some(volume("vm1")), delete_data: false }).await.expect("deleted");
    assert_eq!(two.used().await.1.volumes, 1);
    let third = two.start("third", spec(&image, "vm4", VolumeFormat::Qcow2Overlay)).await.expect("there is room again");
    assert_eq!(daemon.wait(&third.id).await.state(), proto::RenderState::Succeeded);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn renders_at_one_time_are_bounded_per_owner() {
    let authority = Authority::new();
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut address = None;
    let mut daemon = Daemon::start_in(dir.path(), |config| {
        address = Some(authority.serve(config, dir.path()));
        let limits = CallerLimits { concurrent_renders: Some(1), ..CallerLimits::default() };
        config.access = vec![entry("web1", limits)];
    })
    .await;
    let image = daemon.image().await;
    let mut client = Client::connect(&authority, address.expect("set"), "web1").await;
    let mut last = None;
    for index in 0..50 {
        let name = format!("vm{index}");
        match client.start(&name, spec(&image, &name, VolumeFormat::Qcow2)).await {
            Ok(render) => last = Some(render.id),
            Err(status) => {
                assert_refused(Err(status), "QUOTA_RENDERS", "cn:web1", true);
                daemon.wait(&last.expect("one goes on")).await;
                client.start(&name, spec(&image, &name, VolumeFormat::Qcow2)).await.expect("the one before has ended");
                daemon.stop().await;
                return;
            }
        }
    }
    panic!("50 renders never met each other");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_per_second_are_bounded_per_owner_and_the_answer_says_when_to_come_back() {
    let authority = Authority::new();
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut address = None;
    let daemon = Daemon::start_in(dir.path(), |config| {
        address = Some(authority.serve(config, dir.path()));
        let limits = CallerLimits { calls_per_second: NonZeroU32::new(2), burst: NonZeroU32::new(5), ..CallerLimits::default() };
        config.access = vec![entry("web*", limits)];
    })
    .await;
    let address = address.expect("set");
    let mut client = Client::connect(&authority, address, "web1").await;
    let mut refusal = None;
    for _ in 0..20 {
        if let Err(status) = client.hosts.get_host_info(proto::GetHostInfoRequest {}).await {
            refusal = Some(status);
            break;
        }
    }
    let status = refusal.expect("20 calls are more than 5 at once");
    assert_eq!(status.code(), Code::ResourceExhausted);
    let wait = status.get_error_details().retry_info().and_then(|info| info.retry_delay).expect("when to come back");
    assert!(wait <= Duration::from_millis(600), "{wait:?}");
    let mut other = Client::connect(&authority, address, "web2").await;
    other.hosts.get_host_info(proto::GetHostInfoRequest {}).await.expect("another owner, another bucket");
    tokio::time::sleep(wait + Duration::from_millis(50)).await;
    client.hosts.get_host_info(proto::GetHostInfoRequest {}).await.expect("it was time");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_owners_may_choose_the_same_idempotency_key() {
    let authority = Authority::new();
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut address = None;
    let mut daemon = Daemon::start_in(dir.path(), |config| {
        address = Some(authority.serve(config, dir.path()));
        config.access = vec![Access { name: Some("team".into()), ..entry("web*", CallerLimits::default()) }, entry("other", CallerLimits::default())];
    })
    .await;
    let image = daemon.image().await;
    let mut one = Client::connect(&authority, address.expect("set"), "web1").await;
    let mut colleague = Client::connect(&authority, address.expect("set"), "web2").await;
    let mut other = Client::connect(&authority, address.expect("set"), "other").await;

    let first = one.start("deploy-1", spec(&image, "vm1", VolumeFormat::Qcow2Overlay)).await.expect("a free key");
    let theirs = other.start("deploy-1", spec(&image, "vm2", VolumeFormat::Qcow2Overlay)).await.expect("free for them as well");
    assert_ne!(first.id, theirs.id);
    assert_eq!((first.idempotency_key.as_str(), theirs.idempotency_key.as_str()), ("deploy-1", "deploy-1"));
    for render in [&first, &theirs] {
        assert_eq!(daemon.wait(&render.id).await.state(), proto::RenderState::Succeeded);
    }
    let same = colleague.start("deploy-1", spec(&image, "vm1", VolumeFormat::Qcow2Overlay)).await.expect("a retry");
    assert_eq!(same.id, first.id, "the key is the owner's, whoever of them asks");
    let status = colleague.start("deploy-1", spec(&image, "vm3", VolumeFormat::Qcow2Overlay)).await.expect_err("another request");
    assert_eq!(status.code(), Code::AlreadyExists);
    assert!(!status.message().contains(char::is_control), "{:?}", status.message());
    daemon.stop().await;
}
