//! The fork server and its children: one process for each question, which has nothing but what it was asked.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use cloudletd::{
    config::worker::{Confine, Worker},
    error::Error,
    manifest::{
        apply::{Expanded, Source},
        lxd::pongo,
    },
    streams::document::{Document, Limits},
    trust::minisign::Keys,
    worker::{Launcher, Signed, Vouching},
};
use serde_json::{Map, Value, json};

use crate::common::{daemon::Daemon, fixture};

/// Children that wait for a question.
const SPARE: usize = 3;

fn launcher() -> Launcher {
    Launcher::new(&Worker::default()).with_program(env!("CARGO_BIN_EXE_cloudletd"))
}

fn in_process() -> Launcher {
    Launcher::new(&Worker { confine: Confine::Off, ..Worker::default() })
}

/// A key, and its signature over `hello`.
struct Signature {
    keys: Keys,
    signature: Vec<u8>,
}

impl Signature {
    fn new(dir: &Path) -> Signature {
        let at = |name: &str| dir.join(name).to_str().expect("text").to_owned();
        fs::write(dir.join("hello"), "hello").expect("written");
        let (public, secret) = (at("key.pub"), at("key"));
        for arguments in [vec!["-G", "-W", "-f", "-p", &public, "-s", &secret], vec!["-S", "-s", &secret, "-m", &at("hello")]] {
            let output = Command::new("minisign").args(&arguments).output().expect("minisign is installed");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        let keys = Keys::parse(&fs::read_to_string(&public).expect("there"), "keys").expect("a key");
        Signature { keys, signature: fs::read(dir.join("hello.minisig")).expect("there") }
    }

    fn verify(&self, launcher: &Launcher, bytes: &[u8]) -> Result<(), Error> {
        launcher.verify(Vouching::Minisign(&self.keys), &self.signature, Signed::Bytes(bytes), "hello").map(drop)
    }
}

/// The processes of the daemon's program that are below this one, by whether their parent is the test itself.
fn workers() -> (Vec<i32>, Vec<i32>) {
    let stat = |pid: i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        (fields.next()? != "Z").then_some(())?;
        fields.next()?.parse::<i32>().ok()
    };
    let own = std::process::id() as i32;
    let pids: Vec<(i32, i32)> = fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| Some((pid, stat(pid)?)))
        .filter(|(pid, _)| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.ends_with(b"cloudletd\0worker\0")))
        .collect();
    let servers: Vec<i32> = pids.iter().filter(|(_, parent)| *parent == own).map(|(pid, _)| *pid).collect();
    let children = pids.iter().filter(|(_, parent)| servers.contains(parent)).map(|(pid, _)| *pid).collect();
    (servers, children)
}

fn eventually(what: &str, is: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}: not after {:?}: {:?}", begun.elapsed(), workers());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs one test alone with the processes it counts: in a process of its own, named by its argument.
fn alone(test: &str, body: impl FnOnce()) {
    const MARK: &str = "CLOUDLETD_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        return body();
    }
    let own = std::env::current_exe().expect("this program");
    let output = Command::new(own).args(["--exact", test, "--nocapture"]).env(MARK, "1").output().expect("starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}\n{err}");
}

#[test]
fn each_question_has_a_process_of_its_own_and_many_at_once_are_answered() {
    alone("readers::each_question_has_a_process_of_its_own_and_many_at_once_are_answered", || {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (signature, launcher) = (Signature::new(dir.path()), launcher());
        std::thread::scope(|scope| {
            for asker in 0..40 {
                let (signature, launcher) = (&signature, launcher.clone());
                scope.spawn(move || {
                    for _ in 0..5 {
                        match asker % 2 {
                            0 => signature.verify(&launcher, b"hello").expect("good"),
                            _ => assert_eq!(signature.verify(&launcher, b"other").expect_err("of other bytes").reason(), "SIGNATURE_INVALID"),
                        }
                    }
                });
            }
        });
        let (servers, _) = workers();
        assert_eq!(servers.len(), 1, "one fork server for all of them");
        eventually("every child that was asked ends", || workers().1.len() == SPARE);
        let spare = workers().1;
        drop(launcher);
        let is_there = |pid: &i32| Path::new("/proc").join(pid.to_string()).exists();
        eventually("the fork server ends with the one who started it, and its children", || !servers.iter().chain(&spare).any(is_there));
    });
}

#[test]
fn a_child_that_does_what_it_may_not_is_killed_and_the_fork_server_goes_on() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (signature, launcher) = (Signature::new(dir.path()), launcher());
    // What only the fork server may do is among it.
    for call in ["open", "socket", "execve", "fork", "kill", "mount", "ptrace", "recvmsg", "sendmsg", "socketpair", "pidfd"] {
        let error = signature.verify(&launcher.clone().with_misdeed(call), b"hello").expect_err(call);
        assert_eq!(error.reason(), "WORKER_DIED", "{call}: {}", error.chain());
        assert!(error.message().contains("SIGSYS"), "{call}: {}", error.chain());
    }
    let error = signature.verify(&launcher.clone().with_misdeed("panic"), b"hello").expect_err("it panics");
    assert!(error.message().contains("exit status: 101"), "{}", error.chain());
    let error = signature.verify(&launcher.clone().with_misdeed("memory"), b"hello").expect_err("it has too much");
    assert!(error.message().contains("signal 6"), "{}", error.chain());
    signature.verify(&launcher, b"hello").expect("the others are answered as before");
}

#[test]
fn a_child_has_no_descriptor_of_another_and_one_that_nobody_waits_for_is_ended() {
    alone("readers::a_child_has_no_descriptor_of_another_and_one_that_nobody_waits_for_is_ended", || {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (signature, launcher) = (Signature::new(dir.path()), launcher());
        let count = || signature.verify(&launcher.clone().with_misdeed("descriptors"), b"hello").expect_err("it says how many").message().to_owned();
        let by_itself = count();
        // Standard error, the socket twice (for reading and writing), and null four times; what this test inherited is not among them.
        assert!(by_itself.contains("exit status: 107"), "{by_itself}");
        let patience = Duration::from_secs(3);
        std::thread::scope(|scope| {
            for _ in 0..10 {
                let launcher = launcher.clone().with_misdeed("hang").with_patience(patience);
                scope.spawn(|| {
                    let launcher = launcher;
                    let error = signature.verify(&launcher, b"hello").expect_err("it hangs");
                    assert!(error.message().contains("no answer in time"), "{}", error.chain());
                });
            }
            eventually("ten hang", || workers().1.len() == 10 + SPARE);
            assert_eq!(count(), by_itself);
        });
        eventually("those that hung are gone", || workers().1.len() == SPARE);
        signature.verify(&launcher, b"hello").expect("good");
    });
}

#[test]
fn a_fork_server_that_was_killed_is_started_again_by_the_next_question() {
    alone("readers::a_fork_server_that_was_killed_is_started_again_by_the_next_question", || {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (signature, launcher) = (Signature::new(dir.path()), launcher());
        signature.verify(&launcher, b"hello").expect("good");
        let before = workers().0;
        let hanging = launcher.clone().with_misdeed("hang");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| signature.verify(&hanging, b"hello").expect_err("it is killed"));
            eventually("one hangs", || workers().1.len() == 1 + SPARE);
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(before[0]), nix::sys::signal::Signal::SIGKILL).expect("it was there");
            assert_eq!(waits.join().expect("ends").reason(), "WORKER_DIED");
        });
        signature.verify(&launcher, b"hello").expect("by another");
        let after = workers().0;
        assert!(after.len() == 1 && after != before, "{before:?} {after:?}");
    });
}

/// All that a caller sees of an error.
fn shown(error: &Error) -> impl PartialEq + std::fmt::Debug + use<> {
    let violations: Vec<_> = error.violations().iter().map(|violation| (violation.field.clone(), violation.description.clone())).collect();
    (error.kind(), error.stage(), error.object().to_owned(), error.chain(), error.reason(), error.hint().map(str::to_owned), violations)
}

#[test]
fn a_manifest_is_the_same_whoever_reads_it() {
    let (confined, inside) = (launcher(), in_process());
    let (mut right, mut wrong) = (0, 0);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/manifests");
    let files = ["valid", "invalid"].map(|kind| fs::read_dir(folder.join(kind)).expect("manifests")).into_iter().flatten();
    let texts = files.map(|file| file.expect("a file").path()).filter(|path| path.extension().is_some_and(|end| end == "json"));
    let texts = texts.map(|path| fs::read_to_string(path).expect("text"));
    let many_problems = Value::from_iter((0..100).map(|n| (format!("field{n}"), Value::from(n)))).to_string();
    for text in texts.chain([String::new(), "[".repeat(100_000), "\u{0}".into(), many_problems, format!("\"{}\"", "x".repeat(2 << 20))]) {
        match (confined.manifest(&text), inside.manifest(&text)) {
            (Ok(confined), Ok(inside)) => {
                // Everything that is in one, but for the order of the document's members.
                assert_eq!(format!("{confined:?}"), format!("{inside:?}"));
                right += 1;
            }
            (Err(confined), Err(inside)) => {
                assert_eq!(shown(&confined), shown(&inside), "{}", text.chars().take(200).collect::<String>());
                wrong += 1;
            }
            (confined, inside) => panic!("{confined:?} {inside:?}"),
        }
    }
    assert!(right >= 5 && wrong >= 25, "{right} {wrong}");
    for call in ["open", "socket", "execve", "fork"] {
        let error = confined.clone().with_misdeed(call).manifest("{}").expect_err(call);
        assert!(error.reason() == "WORKER_DIED" && error.message().contains("SIGSYS"), "{call}: {}", error.chain());
    }
}

#[test]
fn arguments_and_templates_are_the_same_whoever_reads_them() {
    let (confined, inside) = (launcher(), in_process());
    let manifest = json!({
        "args": {"port": {"type": "integer", "default": 80, "maximum": 65535}, "name": {"type": "string", "pattern": "^[a-z]+$"},
                 "password": {"type": "string", "format": "password", "optional": true}},
    });
    let manifest = confined.manifest(&manifest.to_string()).expect("right");
    for given in
        [json!({"name": "web"}), json!({"name": "Web", "port": 70_000}), json!({"nmae": "web"}), json!({"name": "web", "password": "hunter2\u{7}"})]
    {
        let given = given.as_object().expect("an object").clone();
        match (confined.resolve_args(&manifest, &given), inside.resolve_args(&manifest, &given)) {
            (Ok(confined), Ok(inside)) => assert_eq!(confined, inside),
            (Err(confined), Err(inside)) => assert_eq!(shown(&confined), shown(&inside)),
            other => panic!("{other:?}"),
        }
    }
    let none = confined.manifest("{}").expect("right");
    // Nobody is asked: there is nothing foreign in it.
    assert_eq!(confined.clone().with_misdeed("open").resolve_args(&none, &Map::new()).expect("no arguments"), Map::new());
    assert!(confined.resolve_args(&none, json!({"a": 1}).as_object().expect("an object")).is_err());

    let context = json!({"args": {"port": 8080, "password": "hunter2", "list": [1, 2]}, "instance": {"name": "web-1"}});
    let source = |text: &str| Source { field: "templates[0]".into(), path: "/etc/app".into(), text: text.into() };
    for text in [
        "<%= args.port %>\n\u{1}é",
        "<%= args.password %>",
        "<% for x in args.list %><%= x %>,<% endfor %>",
        "<%= nothing %>",
        "<% if %>",
        "<%= args.password / 2 %>",
    ] {
        let sources = || vec![source("plain <%= instance.name %>"), source(text)];
        match (confined.expand(sources(), context.clone(), manifest.secret_args()), inside.expand(sources(), context.clone(), manifest.secret_args()))
        {
            (Ok(confined), Ok(inside)) => {
                assert_eq!(confined, inside);
                assert_eq!(confined[0], Expanded { text: "plain web-1".into(), is_secret: false });
                assert_eq!(confined[1].is_secret, text.contains("password"));
            }
            (Err(confined), Err(inside)) => {
                assert_eq!(shown(&confined), shown(&inside));
                assert!(!confined.chain().contains("hunter2"), "{}", confined.chain());
            }
            other => panic!("{other:?}"),
        }
    }
    // As much as templates may write, every byte of it escaped on its way.
    let large = json!({"args": {"block": "\u{1}".repeat(60_000)}});
    let sources: Vec<Source> = (0..8).map(|_| source(&"<%= args.block %>".repeat(17))).collect();
    let written = confined.expand(sources.clone(), large.clone(), manifest.secret_args()).expect("8 MiB");
    assert_eq!(written.iter().map(|file| file.text.len()).sum::<usize>(), 8 * 17 * 60_000);

    let context = pongo::Context { config: [("user.port".to_owned(), "8080".to_owned())].into(), trigger: "create".into(), ..Default::default() };
    let request = |source: &'static str| pongo::Request { name: "x.tpl".into(), source: source.into(), context: context.clone() };
    for source in ["{{ config_get(\"user.port\", \"80\") }} {{ trigger }}", "{% for x in y %}", "{{"] {
        match (confined.expand_lxd(&[request("a"), request(source)]), inside.expand_lxd(&[request("a"), request(source)])) {
            (Ok(confined), Ok(inside)) => assert_eq!((confined, inside[1].as_str()), (vec!["a".to_owned(), "8080 create".to_owned()], "8080 create")),
            (Err(confined), Err(inside)) => assert_eq!(shown(&confined), shown(&inside)),
            other => panic!("{other:?}"),
        }
    }
    for call in ["open", "socket", "execve", "fork"] {
        let launcher = confined.clone().with_misdeed(call);
        let died = [
            launcher.resolve_args(&manifest, &Map::new()).map(drop),
            launcher.expand(vec![source("<%= 1 %>")], json!({}), manifest.secret_args()).map(drop),
            launcher.expand_lxd(&[request("a")]).map(drop),
        ];
        died.into_iter().for_each(|result| assert_eq!(result.expect_err(call).reason(), "WORKER_DIED"));
    }
}

#[test]
fn a_document_of_a_stream_is_the_same_whoever_reads_it() {
    let (confined, inside) = (launcher(), in_process());
    let limits = Limits { bytes_max: 1 << 20, ..Limits::default() };
    let mut items = Map::new();
    for n in 0..500 {
        items.insert(
            format!("item{n}"),
            json!({"ftype": "root.tar", "path": format!("a/{n}"), "size": n, "flag": n % 2 == 0, "list": ["x", 3], "half": 0.5, "at": "eu"}),
        );
    }
    let products = json!({
        "format": "products:1.0", "content_id": "c:d", "datatype": "image-downloads", "updated": "Thu, 19 Nov 2026 10:00:00 +0000",
        "_aliases": {"at": {"eu": {"region": "eu-1", "endpoint": "https://eu.example"}}},
        "products": {"p\u{1}é": {"arch": "amd64", "versions": {"20261119": {"items": items}}}},
    });
    let index = json!({
        "format": "index:1.0", "updated": "Thu, 19 Nov 2026 10:00:00 +0000",
        "index": {"c:d": {"path": "streams/v1/c.json", "format": "products:1.0", "products": ["p"], "clouds": [{"region": "eu-1", "endpoint": "https://e"}]}},
    });
    let outside = json!({"format": "index:1.0", "index": {"c": {"path": "../c.json"}}});
    let mut right = 0;
    for text in [
        products.to_string(),
        index.to_string(),
        outside.to_string(),
        "{".into(),
        "[]".into(),
        json!({"format": "x"}).to_string(),
        " ".repeat(2 << 20),
    ] {
        match (confined.stream_document(text.as_bytes(), &limits), inside.stream_document(text.as_bytes(), &limits)) {
            (Ok(confined), Ok(inside)) => {
                assert_eq!(confined, inside);
                right += 1;
                if let Document::Products(products) = confined {
                    let item = products.items().next().expect("items");
                    assert_eq!((item.text("region").as_deref(), item.text("list").as_deref()), (Some("eu-1"), Some("x,3")));
                }
            }
            (Err(confined), Err(inside)) => assert_eq!(shown(&confined), shown(&inside)),
            other => panic!("{other:?}"),
        }
        let both = (confined.stream_products(text.as_bytes(), &limits), inside.stream_products(text.as_bytes(), &limits));
        match both {
            (Ok(confined), Ok(inside)) => assert_eq!(confined, inside),
            (Err(confined), Err(inside)) => assert_eq!(shown(&confined), shown(&inside)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(right, 2);
    let error = confined.with_misdeed("open").stream_products(products.to_string().as_bytes(), &limits).expect_err("it is killed");
    assert_eq!(error.reason(), "WORKER_DIED");
}

#[test]
fn a_daemon_whose_fork_server_is_killed_reads_the_next_manifest_all_the_same() {
    let daemon = Daemon::start("");
    let (path, url) = (daemon.directory().join("manifest.json"), format!("file://{}", fixture::get("bookworm-ifupdown").tarball.display()));
    let id_of = |name: &str| {
        fs::write(&path, json!({"name": name, "rootfs": {"url": url}}).to_string()).expect("written");
        let said = daemon.script_ok("create-image.sh", &[path.to_str().expect("text")]);
        said.split_whitespace().find(|word| word.starts_with("img-")).expect("an id").to_owned()
    };
    let first = id_of("first");
    let servers = crate::worker::workers_of(daemon.pid());
    assert_eq!(servers.len(), 1, "{servers:?}");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(servers[0]), nix::sys::signal::Signal::SIGKILL).expect("it was there");
    let second = id_of("second");
    let said = daemon.script_ok("list-images.sh", &[]);
    assert!(said.contains(&first) && said.contains(&second), "{said}");
}
