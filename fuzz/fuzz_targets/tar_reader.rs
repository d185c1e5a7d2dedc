//! Any bytes as a tar archive: the reader, the model and the facts, under limits small enough that every input is cheap. Beyond "no panic": what is
//! accepted keeps the promises of [`cloudletd::tree::Entry`], and the same bytes give the same tree.

#![no_main]

use std::io::Read;

use cloudletd::{
    error::Result,
    guest::watch::Watch,
    names::GuestPath,
    progress::Progress,
    tree::{
        Entry, EntryKind, TreeSink,
        archive::{self, Limits},
        collect::Collector,
        model::Model,
    },
};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fn limits() -> Limits {
    Limits {
        entries: 500,
        depth: 40,
        extension_bytes: 64 << 10,
        xattr_value_bytes: 4 << 10,
        xattr_total_bytes: 16 << 10,
        sparse_pairs: 200,
        file_bytes: 1 << 40,
        archive_bytes: 4 << 20,
    }
}

/// Checks every entry on its way to the model.
struct Checked<'a>(&'a mut Model);

impl TreeSink for Checked<'_> {
    fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<()> {
        assert!(entry.meta.mode <= 0o7777, "{entry:?}");
        assert!(entry.meta.mtime.nanos < 1_000_000_000, "{entry:?}");
        assert!(entry.meta.xattrs.windows(2).all(|pair| pair[0].name < pair[1].name), "xattrs are sorted and unique: {entry:?}");
        assert!(entry.path.components().all(|name| !matches!(name, b"" | b"." | b"..") && !name.contains(&0)), "{entry:?}");
        let mut stored = 0;
        match &entry.kind {
            EntryKind::File { size, spans } => {
                let mut end = 0;
                for span in spans {
                    assert!(span.len > 0 && span.offset >= end, "spans ascend: {entry:?}");
                    end = span.offset.checked_add(span.len).expect("spans are within the file");
                    stored += span.len;
                }
                assert!(end <= *size && *size <= limits().file_bytes, "{entry:?}");
            }
            EntryKind::Symlink { target } => assert!((1..=4095).contains(&target.len()) && !target.contains(&0), "{entry:?}"),
            _ => {}
        }
        let mut counted = Counted { inner: data, len: 0 };
        let taken = self.0.entry(entry, &mut counted);
        assert!(counted.len <= stored, "more data than the spans hold: {entry:?}");
        taken
    }
}

struct Counted<'a> {
    inner: &'a mut dyn Read,
    len: u64,
}

impl Read for Counted<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let len = self.inner.read(out)?;
        self.len += len as u64;
        Ok(len)
    }
}

fn read(bytes: &[u8], leaves_out: &dyn Fn(&GuestPath) -> bool) -> (Result<archive::Summary>, Model, cloudletd::guest::facts::GuestFacts) {
    let mut model = Model::default();
    let mut checked = Checked(&mut model);
    let watch = Watch::new(&[GuestPath::new("/a").expect("valid")]);
    let mut collector = Collector::new(&mut checked, &watch);
    let outcome = archive::read(&mut &bytes[..], &limits(), leaves_out, &mut collector, &Progress::default());
    let facts = collector.finish();
    (outcome, model, facts)
}

fuzz_target!(|bytes: &[u8]| {
    let (outcome, model, facts) = read(bytes, &|_| false);
    if let Ok(summary) = &outcome {
        assert_eq!(summary.archive_bytes, bytes.len() as u64, "read to the end");
        assert_eq!(summary.left_out, 0);
    }
    if let Err(error) = &outcome {
        let _ = error.chain();
    }
    for (path, _) in facts.nodes.iter().filter(|_| outcome.is_ok()) {
        let path = GuestPath::new(path).expect("facts have guest paths");
        assert!(path.is_root() || model.get(&path).is_some(), "the facts have {path}, the tree has not");
        let _ = facts.resolve(&path.to_string());
    }
    for (path, node) in model.iter() {
        assert!(path.parent().is_none_or(|parent| model.get(&parent).is_some_and(|node| node.kind == EntryKind::Directory)), "{path} has no parent");
        let _ = node.content(1 << 20);
    }
    // What is left out does not stand in the tree, and takes what is below with it.
    let (filtered, rest, _) = read(bytes, &|path| path.file_name().is_some_and(|name| name.len() % 2 == 1));
    if filtered.is_ok() {
        assert!(rest.iter().all(|(path, _)| path.is_root() || path.file_name().is_some_and(|name| name.len() % 2 == 0)));
    }
});

// Most mutations are repaired; the others are for the code that checks headers.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let len = fuzzer_mutate(data, size, max_size);
    if !seed.is_multiple_of(5) {
        fuzz_kit::tar::repair(&mut data[..len]);
    }
    len
});
