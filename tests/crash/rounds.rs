//! One round: an operation, a kill, a daemon that finds what is left, the same operation again.

use std::time::{Duration, Instant};

use cloudletd::{
    names::Digest,
    proto::{self, DeviceRole, VolumeFormat, collect_garbage_request::Goal},
};

use crate::{
    judge::{self, Seen},
    rig::{Rig, Stop},
};

const MIB: u64 = 1 << 20;

/// What is interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A render to a fresh name.
    Render(VolumeFormat),
    /// A render of an instance with devices beside its root.
    Devices,
    /// A render that takes the place of the instance's volume.
    Replace(VolumeFormat),
    /// A render for which the tarball is fetched and the golden built.
    Cold,
    /// Deleting a volume.
    Delete(VolumeFormat),
    /// Collecting golden and tarball.
    Collect,
}

use VolumeFormat::{Block, Loop, Qcow2, Qcow2Overlay, Raw};

/// Steps of a file.
const FILE: [(&str, u32); 5] = [("file-created", 1), ("file-written", 1), ("file-flushed", 1), ("file-named", 1), ("file-durable", 1)];

impl Kind {
    pub const ALL: [Kind; 17] = [
        Kind::Render(Qcow2Overlay),
        Kind::Render(Qcow2),
        Kind::Render(Raw),
        Kind::Render(Loop),
        Kind::Render(Block),
        Kind::Devices,
        Kind::Replace(Qcow2Overlay),
        Kind::Replace(Qcow2),
        Kind::Replace(Raw),
        Kind::Replace(Loop),
        Kind::Replace(Block),
        Kind::Cold,
        Kind::Delete(Qcow2Overlay),
        Kind::Delete(Raw),
        Kind::Delete(Loop),
        Kind::Delete(Block),
        Kind::Collect,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Render(Qcow2Overlay) => "render overlay",
            Kind::Render(Qcow2) => "render qcow2",
            Kind::Render(Raw) => "render raw",
            Kind::Render(Loop) => "render loop",
            Kind::Render(_) => "render block",
            Kind::Devices => "render with devices",
            Kind::Replace(Qcow2Overlay) => "replace overlay",
            Kind::Replace(Qcow2) => "replace qcow2",
            Kind::Replace(Raw) => "replace raw",
            Kind::Replace(Loop) => "replace loop",
            Kind::Replace(_) => "replace block",
            Kind::Cold => "cold render",
            Kind::Delete(Qcow2Overlay) => "delete overlay",
            Kind::Delete(Raw) => "delete raw",
            Kind::Delete(Loop) => "delete loop",
            Kind::Delete(_) => "delete block",
            Kind::Collect => "collect",
        }
    }

    /// The steps that it comes to, each with how many times.
    pub fn steps(self) -> Vec<(&'static str, u32)> {
        let mut steps = Vec::new();
        match self {
            Kind::Render(format) | Kind::Replace(format) => {
                steps.push(("render-admitted", 1));
                match format {
                    Block => steps.extend([("head-marked", 1), ("head-next", 1), ("head-half", 1), ("head-written", 1)]),
                    _ => steps.extend(FILE),
                }
                if format == Loop {
                    steps.push(("loop-attached", 1));
                }
                if format == Block || matches!(self, Kind::Replace(_)) {
                    steps.push(("render-sealed", 1));
                }
                steps.extend([("render-published", 1), ("render-recorded", 1)]);
            }
            // Swap, data and the root.
            Kind::Devices => {
                for times in 1..=3 {
                    steps.extend(FILE.map(|(step, _)| (step, times)));
                }
                steps.extend([("render-published", 1), ("render-recorded", 1)]);
            }
            Kind::Cold => steps.extend([("blob-recorded", 1), ("blob-named", 1), ("golden-begun", 1), ("golden-recorded", 1), ("golden-named", 1)]),
            Kind::Delete(_) => steps.extend([("delete-marked", 1), ("delete-unlinked", 1), ("delete-recorded", 1)]),
            Kind::Collect => steps.extend([("collect-marked", 1), ("collect-unlinked", 1), ("collect-marked", 2), ("collect-unlinked", 2)]),
        }
        steps
    }

    /// About as long as it takes, microseconds; kills at random fall into this.
    pub fn lasts_us(self) -> u64 {
        match self {
            Kind::Render(Block) | Kind::Replace(Block) | Kind::Cold => 120_000,
            Kind::Devices | Kind::Replace(_) => 80_000,
            Kind::Render(_) => 50_000,
            Kind::Delete(_) | Kind::Collect => 20_000,
        }
    }

    pub fn format(self) -> VolumeFormat {
        match self {
            Kind::Render(format) | Kind::Replace(format) | Kind::Delete(format) => format,
            Kind::Devices => Raw,
            Kind::Cold | Kind::Collect => Qcow2Overlay,
        }
    }

    fn replaces(self) -> bool {
        matches!(self, Kind::Replace(_))
    }
}

/// What a round saw.
pub struct Outcome {
    pub kills: u32,
    /// Whether the daemon died at the step that it was told to.
    pub reached: bool,
    /// The step of recovery at which the next one died.
    pub recovery_step: Option<&'static str>,
    /// Whether the operation had taken effect when the next daemon served.
    pub had_effect: bool,
    pub recoveries: Vec<Duration>,
}

/// An operation, to be asked for once or several times.
pub enum Operation {
    Render { key: String, spec: Box<proto::RenderSpec> },
    Delete(proto::VolumeRef),
    Collect,
}

fn volume_of(format: VolumeFormat) -> proto::VolumeRef {
    match format {
        Block => proto::VolumeRef { pool: "devices".into(), name: "vm-disk".into() },
        _ => proto::VolumeRef { pool: "files".into(), name: "web1".into() },
    }
}

fn spec(rig: &Rig, kind: Kind, hostname: &str) -> proto::RenderSpec {
    let devices = [("swap", DeviceRole::Swap, 1), ("data", DeviceRole::Data, 16)];
    let device = |(name, role, mib): (&str, DeviceRole, u64)| proto::DeviceSpec {
        name: name.into(),
        role: role as i32,
        size_bytes: mib * MIB,
        filesystem: if role == DeviceRole::Data { "ext4".into() } else { String::new() },
        mount: if role == DeviceRole::Data { "/srv".into() } else { String::new() },
        ..Default::default()
    };
    proto::RenderSpec {
        image_id: rig.image.clone(),
        instance: Some(proto::InstanceConfig {
            name: "web1".into(),
            hostname: format!("{hostname}.example.com"),
            network: Some(proto::Network {
                interfaces: vec![proto::Interface {
                    name: "eth0".into(),
                    addresses: vec!["192.0.2.10/24".into()],
                    gateway4: "192.0.2.1".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        }),
        volume: Some(volume_of(kind.format())),
        format: kind.format() as i32,
        replace: kind.replaces(),
        devices: if kind == Kind::Devices { devices.map(device).to_vec() } else { Vec::new() },
        ..Default::default()
    }
}

/// Asks for it and waits for its end; an error when the daemon dies, or refuses.
pub async fn ask(clients: crate::rig::Clients, operation: &Operation) -> Result<Option<proto::Render>, tonic::Status> {
    let mut clients = clients;
    match operation {
        Operation::Render { key, spec } => {
            let request = proto::StartRenderRequest { idempotency_key: key.clone(), spec: Some((**spec).clone()) };
            let started = clients.renders.start_render(request).await?.into_inner().render.expect("a render");
            let mut stream = clients.renders.watch_render(proto::WatchRenderRequest { render_id: started.id }).await?.into_inner();
            let mut last = started_of(stream.message().await?);
            while let Some(message) = stream.message().await? {
                last = started_of(Some(message));
            }
            // A stream that ends without the end of the render is the end of the daemon.
            match &last {
                Some(render) if !matches!(render.state(), proto::RenderState::Queued | proto::RenderState::Running) => Ok(last),
                _ => Err(tonic::Status::unavailable("the watch ended")),
            }
        }
        Operation::Delete(volume) => {
            clients.volumes.delete_volume(proto::DeleteVolumeRequest { volume: Some(volume.clone()), delete_data: true }).await?;
            Ok(None)
        }
        Operation::Collect => {
            let request = proto::CollectGarbageRequest { dry_run: false, goal: Some(Goal::UsedBytesMax(0)), min_age_seconds: Some(0) };
            clients.stores.collect_garbage(request).await?;
            Ok(None)
        }
    }
}

fn started_of(message: Option<proto::WatchRenderResponse>) -> Option<proto::Render> {
    message.and_then(|message| message.render)
}

/// The same, and it has to succeed.
#[track_caller]
pub fn demand(rig: &Rig, operation: &Operation) -> Option<proto::Render> {
    let answer = rig.runtime.block_on(ask(rig.clients(), operation));
    let render = answer.unwrap_or_else(|status| panic!("{status:?}\n{}", rig.log()));
    if let Some(render) = &render {
        assert_eq!(render.state(), proto::RenderState::Succeeded, "{:?}\n{}", render.error, rig.log());
    }
    render
}

/// A render.
pub fn render(rig: &Rig, kind: Kind, key: &str, hostname: &str) -> Operation {
    Operation::Render { key: key.to_owned(), spec: Box::new(spec(rig, kind, hostname)) }
}

/// The deletion of the volume of that format.
pub fn delete(format: VolumeFormat) -> Operation {
    Operation::Delete(volume_of(format))
}

/// The collection of everything that may go.
pub fn collect() -> Operation {
    Operation::Collect
}

/// The root volume has to be whole, and to be the instance's.
#[track_caller]
pub fn expect_content(rig: &Rig, kind: Kind, hostname: &str, seen: &Seen, context: &str) {
    let volume = root(seen).unwrap_or_else(|| panic!("{context}: no volume"));
    let content = judge::content(rig, volume);
    // Without a reference it is enough that the judges are content.
    let reference = rig.reference.get(&reference_name(kind, hostname));
    assert!(reference.is_none_or(|reference| *reference == content), "{context}: the volume is not {hostname}'s");
}

fn reference_name(kind: Kind, hostname: &str) -> String {
    let what = if kind == Kind::Devices { "with devices" } else { "alone" };
    format!("{hostname} {what}")
}

/// Remembers what clean renders hold.
pub fn learn(rig: &mut Rig) {
    for (kind, hostname) in [(Kind::Render(Raw), "one"), (Kind::Render(Raw), "two"), (Kind::Devices, "two")] {
        let mut digests = Vec::new();
        for attempt in 0..2 {
            let spec = Box::new(spec(rig, kind, hostname));
            demand(rig, &Operation::Render { key: format!("learn-{hostname}-{}-{attempt}", kind.name().replace(' ', "-")), spec });
            let seen = judge::look(rig, false);
            digests.push(judge::lines(rig, root(&seen).expect("a root")));
            demand(rig, &Operation::Delete(volume_of(Raw)));
        }
        assert_eq!(digests[0], digests[1], "two clean renders of {hostname} hold the same");
        rig.reference.insert(reference_name(kind, hostname), Digest::of(digests[0].join("\n").as_bytes()));
    }
    let mut clients = rig.clients();
    let goldens = rig.runtime.block_on(clients.renders.list_goldens(proto::ListGoldensRequest::default())).expect("a list").into_inner().goldens;
    rig.golden = goldens[0].digest.clone();
    rig.kill();
}

fn root(seen: &Seen) -> Option<&proto::Volume> {
    seen.volumes.iter().find(|volume| volume.role() == DeviceRole::Root)
}

/// Whether the volume holds what `hostname` should.
fn holds(rig: &Rig, kind: Kind, hostname: &str, content: Digest) -> bool {
    rig.reference.get(&reference_name(kind, hostname)) == Some(&content)
}

/// Runs one round on the host as the one before left it, and leaves it without volumes.
pub fn run(rig: &mut Rig, round: usize, kind: Kind, stop: &Stop, recovery: Option<&'static str>) -> Outcome {
    let context = format!("round {round}: {} {stop:?}, next start {recovery:?}", kind.name());
    println!("{context}");
    let mut outcome = Outcome { kills: 0, reached: false, recovery_step: None, had_effect: false, recoveries: Vec::new() };
    // What has to be there before; by a daemon that lives until it is asked to.
    let (first, second) = (format!("first-{round}"), format!("second-{round}"));
    rig.start(None);
    match kind {
        Kind::Replace(format) | Kind::Delete(format) => {
            let operation = render(rig, Kind::Render(format), &first, "one");
            demand(rig, &operation);
        }
        Kind::Cold => {
            demand(rig, &Operation::Collect);
        }
        Kind::Collect | Kind::Render(_) | Kind::Devices => {
            // A golden to be collected, or to be warm.
            let operation = render(rig, Kind::Render(Qcow2Overlay), &first, "one");
            demand(rig, &operation);
            demand(rig, &Operation::Delete(volume_of(Qcow2Overlay)));
        }
    }
    rig.kill();
    let operation = match kind {
        Kind::Delete(format) => Operation::Delete(volume_of(format)),
        Kind::Collect => Operation::Collect,
        _ => render(rig, kind, &second, "two"),
    };
    interrupt(rig, stop, &operation, &mut outcome);
    // The next daemon, which may have the same luck.
    if let Some(step) = recovery {
        assert!(rig.start(Some((step, 1))).is_none(), "{context}: it did not come to {step}");
        (outcome.kills, outcome.recovery_step) = (outcome.kills + 1, Some(step));
    }
    outcome.recoveries.extend(rig.start(None));
    let seen = judge::look(rig, kind == Kind::Replace(Block));
    outcome.had_effect = check(rig, kind, &operation, &seen, &context);
    // The same again, twice: once it does what is missing, once it has nothing to do.
    let answers = [demand(rig, &operation), demand(rig, &operation)];
    assert_eq!(answers[0], answers[1], "{context}: the answer to a retry");
    let seen = judge::look(rig, false);
    assert!(check(rig, kind, &operation, &seen, &context), "{context}: the retry had no effect");
    if let Operation::Render { key, .. } = &operation {
        let other = render(rig, kind, key, "three");
        let refused = rig.runtime.block_on(ask(rig.clients(), &other)).expect_err("another request with the same key");
        assert_eq!(refused.code(), tonic::Code::AlreadyExists, "{context}: {refused:?}");
        demand(rig, &Operation::Delete(volume_of(kind.format())));
    }
    let seen = judge::look(rig, false);
    assert!(seen.volumes.is_empty(), "{context}: {:?}", seen.volumes);
    rig.kill();
    outcome
}

/// Starts a daemon, asks for the operation, and has the daemon die.
fn interrupt(rig: &mut Rig, stop: &Stop, operation: &Operation, outcome: &mut Outcome) {
    outcome.kills += 1;
    match stop {
        Stop::At { step, times } => {
            let served = rig.start(Some((step, *times)));
            assert!(served.is_some(), "the daemon died at {step} before it was asked for anything");
            let clients = rig.clients();
            let answer = rig.runtime.block_on(ask(clients, operation));
            if answer.is_err() {
                rig.reap_or_fail(step);
                outcome.reached = true;
            } else {
                // After the answer: the last steps.
                let begun = Instant::now();
                while begun.elapsed() < Duration::from_secs(2) && !rig.has_ended() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                outcome.reached = rig.kill();
            }
        }
        Stop::After(pause) => {
            rig.start(None);
            let clients = rig.clients();
            rig.runtime.block_on(async {
                // Dropped when the time is over: the daemon goes on, and is killed at work.
                let _ = tokio::time::timeout(*pause, ask(clients, operation)).await;
            });
            rig.kill();
        }
    }
}

/// Whether the operation has taken effect; panics when it has in part.
fn check(rig: &Rig, kind: Kind, operation: &Operation, seen: &Seen, context: &str) -> bool {
    match operation {
        Operation::Collect => !seen_golden(rig),
        Operation::Delete(_) => match root(seen) {
            None => true,
            Some(volume) => {
                let content = judge::content(rig, volume);
                assert!(holds(rig, kind, "one", content), "{context}: the volume that was not deleted is not what it was");
                false
            }
        },
        Operation::Render { key, .. } => {
            let render = seen.renders.iter().find(|render| render.idempotency_key == *key);
            let succeeded = render.is_some_and(|render| render.state() == proto::RenderState::Succeeded);
            let Some(volume) = root(seen) else {
                assert!(!succeeded && !kind.replaces() && seen.volumes.is_empty(), "{context}: {render:?} and {:?}", seen.volumes);
                return false;
            };
            let is_ours = render.is_some_and(|render| render.id == volume.render_id);
            assert_eq!(is_ours, succeeded, "{context}: {render:?} and {volume:?}");
            let is_blank = kind == Kind::Replace(Block) && !succeeded;
            if !is_blank {
                let content = judge::content(rig, volume);
                let hostname = if succeeded { "two" } else { "one" };
                assert!(holds(rig, kind, hostname, content), "{context}: the volume is not {hostname}'s");
            }
            if succeeded && kind == Kind::Devices {
                assert_eq!(seen.volumes.len(), 3, "{context}: {:?}", seen.volumes);
            }
            succeeded
        }
    }
}

fn seen_golden(rig: &Rig) -> bool {
    std::fs::read_dir(rig.path("state/goldens")).expect("goldens").count() + std::fs::read_dir(rig.path("state/blobs")).expect("blobs").count() > 0
}
