use std::{fs, path::PathBuf};

use serde_json::json;

use super::*;
use crate::manifest::check::check;

fn data(kind: &str) -> Vec<(String, Vec<u8>)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/manifests").join(kind);
    let mut files: Vec<_> = fs::read_dir(&directory).expect("the test data").map(|entry| entry.expect("an entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    assert!(files.len() > 5, "{} has the examples", directory.display());
    files.into_iter().map(|path| (path.with_extension("").to_string_lossy().into_owned(), fs::read(&path).expect("a file"))).collect()
}

fn parse(document: Value) -> Result<Manifest> {
    Manifest::parse(document.to_string().as_bytes())
}

fn path(text: &str) -> GuestPath {
    GuestPath::new(text).expect("a path")
}

#[test]
fn valid_examples_parse_and_pass_the_schema() {
    let validator = jsonschema::draft202012::options().offline().build(&schema::schema()).expect("a schema");
    for (name, bytes) in data("valid") {
        let manifest = Manifest::parse(&bytes).unwrap_or_else(|error| panic!("{name}: {error:?} {:?}", error.violations()));
        let document: Value = serde_json::from_slice(&bytes).expect("JSON");
        assert_eq!(manifest.to_json(), &document, "{name}");
        let errors: Vec<String> = validator.iter_errors(&document).map(|error| format!("{}: {error}", error.instance_path())).collect();
        assert!(errors.is_empty(), "{name}: {errors:?}");
        assert!(check(&bytes).is_valid(), "{name}");
    }
}

/// serde_json's fast way of reading decimals is off by the last digit now and then.
#[test]
fn numbers_do_not_change_an_images_identity_when_they_are_kept_and_read_again() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..5_000 {
        state = state.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
        let text = format!(r#"{{"args": {{"a": {{"type": "number", "default": 0.{state:020}e{}}}}}}}"#, state % 60);
        let manifest = Manifest::parse(text.as_bytes()).expect("right");
        let kept = serde_json::to_string(&manifest.to_judged()).expect("JSON");
        let again = Manifest::judged(serde_json::from_str(&kept).expect("JSON")).expect("right");
        assert_eq!((again.digest, serde_json::from_str::<Value>(&text).ok().as_ref()), (manifest.digest, Some(manifest.to_json())), "{text}");
    }
}

/// Each line of an `.expect` file: line and column, field (`-` for the document), a part of the message.
#[test]
fn invalid_examples_are_refused_at_the_field() {
    for (name, bytes) in data("invalid") {
        let error = Manifest::parse(&bytes).expect_err(&name);
        assert!(!error.violations().is_empty() && error.reason() != "INVALID_REQUEST", "{name}: {error:?}");
        let report = check(&bytes);
        let shown: Vec<String> =
            report.problems.iter().map(|p| format!("{}:{} {} {}", p.position.line, p.position.column, p.field, p.message)).collect();
        let expected = fs::read_to_string(format!("{name}.expect")).expect("what to expect");
        assert_eq!(expected.lines().count(), report.problems.len(), "{name}: {shown:#?}");
        for (line, problem) in expected.lines().zip(&report.problems) {
            let (place, rest) = line.split_once(' ').expect("a place");
            let (field, message) = rest.split_once(' ').unwrap_or((rest, ""));
            assert_eq!(format!("{}:{}", problem.position.line, problem.position.column), place, "{name}: {shown:#?}");
            assert_eq!(problem.field, if field == "-" { "" } else { field }, "{name}: {shown:#?}");
            assert!(problem.message.contains(message), "{name}: {line}: {shown:#?}");
        }
    }
}

#[test]
fn the_published_schema_is_the_one_in_the_code() {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("proto/manifest.schema.json");
    let text = format!("{:#}\n", schema::schema());
    if std::env::var_os("UPDATE_SCHEMA").is_some() {
        fs::write(&file, &text).expect("write the schema");
    }
    let published: Value = serde_json::from_str(&fs::read_to_string(&file).expect("the schema")).expect("JSON");
    assert_eq!(published, schema::schema(), "run this test with UPDATE_SCHEMA=1 and look at the difference");
}

#[test]
fn the_schema_and_the_reader_know_the_same_fields() {
    let schema = schema::schema();
    let mut published: Vec<&str> = schema["properties"].as_object().expect("properties").keys().map(String::as_str).collect();
    let mut known = read::FIELDS.to_vec();
    published.sort_unstable();
    known.sort_unstable();
    assert_eq!(published, known);
}

#[test]
fn an_original_of_2010_works_unchanged() {
    let bytes = data("valid").into_iter().find(|(name, _)| name.ends_with("2010-debian-lenny")).expect("the example").1;
    let manifest = Manifest::parse(&bytes).expect("right");
    assert_eq!((manifest.name(), manifest.arch(), manifest.machine()), ("debian-lenny-base", Some("i386"), Some("i686")));
    assert_eq!(manifest.entry_point_names(), ["init", "chroot"]);
    assert_eq!(manifest.entry_points().init.as_ref().and_then(|kernel| kernel.flavor.as_deref()), Some("xen-686"));
    assert!(manifest.rootfs().is_none() && manifest.filesystem().is_none() && manifest.disk_size().is_none());
    let args = manifest.resolve_args(json!({"hostname": "web1"}).as_object().expect("an object")).expect("right");
    assert_eq!(Value::Object(args), json!({"hostname": "web1", "swappiness": 60}));
    let volatile = manifest.volatile_patterns().expect("compiled before");
    for (given, want) in [
        ("/var/log/syslog", true),
        ("/var/log/apt", false),
        ("/var/log/apt/term.log", true),
        ("/etc/udev/rules.d/70-persistent-net.rules", true),
        ("/home/x", false),
    ] {
        assert_eq!(volatile.matches(&path(given)).expect("cheap"), want, "{given}");
    }
    assert!(manifest.is_persistent(&path("/home/a/b")) && !manifest.is_persistent(&path("/homes")));
}

#[test]
fn everything_is_read() {
    let bytes = data("valid").into_iter().find(|(name, _)| name.ends_with("everything")).expect("the example").1;
    let manifest = Manifest::parse(&bytes).expect("right");
    assert_eq!((manifest.layout(), manifest.disk_size(), manifest.bus()), (Some(Layout::Gpt), Some(10 << 30), Some(Bus::Virtio)));
    assert_eq!(
        (manifest.filesystem(), manifest.profile(), manifest.label(), manifest.bytes_per_inode()),
        (Some(FsKind::Ext4), Some(Profile::Grub206), Some("root"), Some(16384))
    );
    assert_eq!(manifest.rootfs().and_then(|rootfs| rootfs.size), Some(134_217_728));
    assert_eq!(manifest.devices().iter().map(|device| device.role.name()).collect::<Vec<_>>(), ["root", "data", "swap", "scratch"]);
    assert_eq!(manifest.network_backend(), Some(BackendKind::Networkd));
    assert!(manifest.is_secret_arg("api_key") && manifest.is_secret_arg("tls") && !manifest.is_secret_arg("hostname"));
    let root = data("valid").into_iter().find(|(name, _)| name.ends_with("root-device-says-it-all")).expect("the example").1;
    let root = Manifest::parse(&root).expect("right");
    assert_eq!((root.filesystem(), root.disk_size(), root.label()), (Some(FsKind::Btrfs), Some(4 << 30), Some("system-root-2026")));
}

#[test]
fn formatting_and_order_do_not_change_digest_and_id() {
    let one = Manifest::parse(b"{\"name\": \"x\",\n  \"args\": {\"b\": {\"default\": 1}, \"a\": {\"default\": \"\\u00e9\"}}}").expect("right");
    let two = Manifest::parse("{\"args\":{\"a\":{\"default\":\"é\"},\"b\":{\"default\":1}},\"name\":\"x\"}".as_bytes()).expect("right");
    assert_eq!(one.digest(), two.digest());
    assert_eq!(ImageId::derive(&one, "sha256:0"), ImageId::derive(&two, "sha256:0"));
    assert_ne!(one.digest(), Manifest::parse(b"{\"name\": \"y\"}").expect("right").digest());
    // Fixed for good: image ids that providers have stored follow from it.
    assert_eq!(Manifest::parse(b" {} ").expect("right").digest(), Digest::of(b"{}"));
}

#[test]
fn many_problems_are_all_reported_within_bounds() {
    let error = parse(json!({"name": 1, "arch": 2, "volatile": ["("], "args": [], "disk": {"size": -1}})).expect_err("five problems");
    let fields: Vec<&str> = error.violations().iter().map(|v| v.field.as_str()).collect();
    assert_eq!(fields, ["args", "volatile[0]", "disk.size", "name", "arch"]);
    let many: Map<String, Value> = (0..5000).map(|i| (format!("field{i}"), Value::Null)).collect();
    assert!(parse(Value::Object(many)).expect_err("many").violations().len() <= 64);
}

#[test]
fn size_and_depth_are_limited() {
    let long = format!("{{\"description\": \"{}\"}}", "x".repeat(LEN_MAX));
    assert!(Manifest::parse(long.as_bytes()).expect_err("too long").to_string().contains("the limit is 1048576"));
    let deep = format!("{{\"x-a\": {}1{}}}", "[".repeat(DEPTH_MAX), "]".repeat(DEPTH_MAX));
    assert!(Manifest::parse(deep.as_bytes()).expect_err("too deep").to_string().contains("deep"));
}

proptest::proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "(\"(args|volatile|disk|size|type|default|properties|rootfs|x-y)\": ?|[{}\\[\\],]|\"[^\"\\\\]{0,6}\"|[0-9]{1,20}|null|true)*") {
        let _ = Manifest::parse(text.as_bytes());
        let _ = Manifest::parse(format!("{{{text}}}").as_bytes());
    }
}

/// A warm render parses the manifest again; a render as a whole has a budget of a few milliseconds.
#[test]
fn parsing_is_cheap() {
    for (name, bytes) in data("valid") {
        let best = (0..10).map(|_| {
            let started = std::time::Instant::now();
            assert!(Manifest::parse(&bytes).is_ok());
            started.elapsed()
        });
        let best = best.min().expect("ten runs");
        println!("{name}: {best:?}");
        assert!(best.as_millis() < 50, "{name}: {best:?}");
    }
}
