//! Documents of other hosts: a byte that chooses, and one of mirrors, of platforms, or of a golden image. What is accepted is within the bounds that its users
//! rely on.

#![no_main]

use cloudletd::{
    disk::Layout,
    fs::{FsKind, Profile},
    names::Digest,
    share::manifest::{CHUNK_LEN, FORMAT, GoldenManifest, chunk_len},
    source::mirrors_json::{self, Leads},
    store::records::{GOLDEN_FORMAT, GoldenBoot, GoldenSpec},
    streams::platforms,
};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

fn spec() -> GoldenSpec {
    GoldenSpec {
        rootfs: Digest::of(b""),
        prefix: None,
        volatile: Vec::new(),
        templates: Vec::new(),
        filesystem: FsKind::Ext4,
        profile: Profile::Modern,
        label: String::new(),
        bytes_per_inode: 16384,
        layout: Layout::Bare,
        size_bytes: 10 * CHUNK_LEN + 4096,
        arch: "x86_64".into(),
        boot: GoldenBoot::default(),
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else { return };
    match which % 3 {
        0 => {
            for entry in mirrors_json::parse(bytes).unwrap_or_default() {
                let path = match &entry.leads {
                    Leads::Mirror { url, path } => {
                        assert!(url.starts_with("http://") || url.starts_with("https://"), "{url}");
                        path
                    }
                    Leads::Document(path) => path,
                };
                assert!(!path.starts_with('/') && path.split('/').all(|part| part != ".."), "{path}");
                let _ = entry.is_for("region", "https://endpoint.example");
            }
        }
        1 => {
            if let Ok(read) = platforms::parse(bytes) {
                let again = platforms::document("id", &read, 1).to_string();
                let again = platforms::parse(again.as_bytes()).expect("what we write is read");
                assert_eq!(again.len(), read.len());
            }
        }
        _ => {
            let spec = spec();
            let Ok(Value::Object(mut manifest)) = serde_json::from_slice(bytes) else { return };
            // What no chance would guess.
            let known = json!({"format": FORMAT, "golden_format": GOLDEN_FORMAT, "key": spec.key(), "spec": spec, "chunk_bytes": CHUNK_LEN});
            manifest.extend(known.as_object().expect("an object").clone());
            if let Ok(manifest) = GoldenManifest::parse(Value::Object(manifest).to_string().as_bytes(), &spec) {
                let mut end = 0;
                for chunk in &manifest.chunks {
                    assert!(chunk.index * CHUNK_LEN >= end);
                    end = chunk.index * CHUNK_LEN + chunk_len(spec.size_bytes, chunk.index);
                    assert!(end <= spec.size_bytes);
                }
                assert!(manifest.data_len_max() <= spec.size_bytes);
                let _ = manifest.identity();
            }
        }
    }
});
