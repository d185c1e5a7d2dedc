//! Start, restart, cancel, host information, reflection.

use cloudletd::proto::{self, VolumeFormat};

use crate::common::server::{Daemon, spec};

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_daemon_knows_everything_and_fails_what_was_interrupted() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut daemon = Daemon::start_in(dir.path(), |_| ()).await;
    let image = daemon.image().await;
    let before = daemon.render("key", spec(&image, "web1", VolumeFormat::Qcow2Overlay)).await;
    let mapping = daemon.mapping("web1").await;
    daemon.stop().await;
    std::fs::write(dir.path().join("pool/.cloudletd-stage-rnd-0-web2"), "unfinished").expect("write");
    std::fs::write(dir.path().join("state/tmp/upload-0"), "unfinished").expect("write");

    let mut daemon = Daemon::start_in(dir.path(), |_| ()).await;
    assert_eq!(daemon.mapping("web1").await, mapping);
    let after = daemon.renders.get_render(proto::GetRenderRequest { render_id: before.id.clone() }).await.expect("there").into_inner().render;
    assert_eq!(after, Some(before));
    assert!(!dir.path().join("pool/.cloudletd-stage-rnd-0-web2").exists());
    assert!(!dir.path().join("state/tmp/upload-0").exists());
    // Times have whole seconds.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    daemon.render("warm", spec(&image, "web2", VolumeFormat::Qcow2Overlay)).await;
    let golden = daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list").into_inner().goldens.remove(0);
    assert!(golden.last_used_at.expect("used").seconds > golden.created_at.expect("built").seconds, "the warm render used the golden");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_daemons_never_share_a_state_directory() {
    let daemon = Daemon::start().await;
    let mut config = cloudletd::config::Config { state_dir: daemon.dir.join("state"), ..Default::default() };
    config.listen.unix = daemon.dir.join("other");
    let error = cloudletd::server::serve_until(config.checked().expect("valid"), std::future::pending()).await.expect_err("the directory is taken");
    assert_eq!(error.kind(), cloudletd::error::Kind::Busy);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_renders_leave_nothing() {
    let mut daemon = Daemon::start_with(|config| config.limits.concurrent_renders = 1).await;
    let image = daemon.image().await;
    let mut ids = Vec::new();
    for index in 0..20 {
        let started = daemon.start_render(&format!("key-{index}"), spec(&image, &format!("vm{index}"), VolumeFormat::Qcow2)).await.expect("accepted");
        ids.push(started.render.expect("a render").id);
    }
    for id in &ids {
        daemon.renders.cancel_render(proto::CancelRenderRequest { render_id: id.clone() }).await.expect("asked");
    }
    let mut cancelled = 0;
    let mut finished = 0;
    for id in &ids {
        match daemon.wait(id).await.state() {
            proto::RenderState::Cancelled => cancelled += 1,
            proto::RenderState::Succeeded => finished += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(cancelled > 0, "twenty renders behind one permit were all faster than their cancellation");
    let files = std::fs::read_dir(daemon.dir.join("pool")).expect("the pool").count();
    assert_eq!(files, finished, "only finished volumes are there");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn host_information_tells_pools_tools_and_filesystems() {
    let mut daemon = Daemon::start().await;
    let info = daemon.hosts.get_host_info(proto::GetHostInfoRequest {}).await.expect("answered").into_inner();
    assert_eq!(info.pools.len(), 1);
    assert!(info.pools[0].free_bytes > 0 && info.pools[0].total_bytes >= info.pools[0].free_bytes);
    assert!(info.filesystems.contains(&"ext4".to_owned()));
    assert_eq!(info.arch, std::env::consts::ARCH);
    assert_eq!(
        info.hypervisors.contains(&"kvm".to_owned()),
        std::path::Path::new("/dev/kvm").exists() && !std::path::Path::new("/proc/xen/capabilities").exists()
    );
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn host_information_tells_how_foreign_bytes_are_confined() {
    use cloudletd::config::worker::Confine;
    for (confine, program, confined, error) in
        [(Confine::Required, None, true, ""), (Confine::Off, None, false, ""), (Confine::Required, Some("/nonexistent"), true, "/nonexistent")]
    {
        let mut daemon = Daemon::start_with(|config| {
            config.worker.confine = confine;
            if let Some(program) = program {
                config.worker.program = Some(program.into());
            }
        })
        .await;
        let info = daemon.hosts.get_host_info(proto::GetHostInfoRequest {}).await.expect("answered").into_inner();
        let told = info.confinement.expect("always there");
        assert!(told.confined == confined && told.error.contains(error) && told.error.is_empty() == error.is_empty(), "{confine:?}: {told:?}");
        // Root can become another user.
        assert!(!nix::unistd::geteuid().is_root() || told.missing.iter().all(|layer| !layer.contains("another user")), "{told:?}");
        daemon.stop().await;
    }
}
