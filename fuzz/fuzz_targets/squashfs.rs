//! Any bytes as a squashfs image: under limits small enough that every input is cheap. Beyond "no panic": what is accepted keeps the promises of
//! [`cloudletd::tree::Entry`], and the same bytes give the same tree.

#![no_main]

use std::io::Read;

use cloudletd::{
    error::Result,
    progress::Progress,
    tree::{Entry, EntryKind, TreeSink, archive::Limits, model::Model, squashfs},
};
use libfuzzer_sys::fuzz_target;

fn limits() -> Limits {
    Limits { entries: 500, depth: 40, xattr_value_bytes: 4 << 10, xattr_total_bytes: 16 << 10, sparse_pairs: 200, file_bytes: 1 << 22, archive_bytes: 1 << 22, ..Limits::default() }
}

/// Checks every entry on its way to the model.
struct Checked<'a>(&'a mut Model);

impl TreeSink for Checked<'_> {
    fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<()> {
        assert!(entry.meta.mode <= 0o7777, "{entry:?}");
        assert!(entry.meta.xattrs.windows(2).all(|pair| pair[0].name < pair[1].name), "{entry:?}");
        let mut content = Vec::new();
        let read = data.read_to_end(&mut content);
        match &entry.kind {
            EntryKind::File { size, spans } => {
                let mut end = 0;
                for span in spans {
                    assert!(span.len > 0 && span.offset >= end, "{entry:?}");
                    end = span.offset + span.len;
                }
                assert!(end <= *size, "{entry:?}");
                if read.is_ok() {
                    assert_eq!(content.len() as u64, spans.iter().map(|span| span.len).sum::<u64>(), "{entry:?}");
                }
            }
            EntryKind::Symlink { target } => assert!((1..=4095).contains(&target.len()) && !target.contains(&0), "{entry:?}"),
            _ => assert!(content.is_empty(), "{entry:?}"),
        }
        self.0.entry(entry, &mut &content[..])
    }
}

fn tree(bytes: &[u8]) -> Option<Model> {
    let mut model = Model::default();
    let read = squashfs::read(&bytes, &limits(), &|_| false, &mut Checked(&mut model), &Progress::default());
    read.ok().map(|_| model)
}

fuzz_target!(|bytes: &[u8]| {
    assert_eq!(tree(bytes), tree(bytes));
});
