//! A simplestreams document: read under limits. Items that name bytes name them below the mirror's root, every field is looked up, and errors have no
//! control character.

#![no_main]

use cloudletd::streams::{Filters, Index, Limits, Products, Url, date};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let limits = Limits { products_max: 64, versions_max: 64, items_max: 64, ..Limits::default() };
    let root = Url::parse("https://mirror.example/root").expect("a URL");
    if let Ok(index) = Index::parse(bytes, &limits) {
        for entry in index.entries.values() {
            assert!(entry.path.below(&root).expect("below").path().starts_with("/root/"));
        }
    }
    let Ok(products) = Products::parse(bytes, &limits) else { return };
    let filters = Filters::parse(&["arch=amd64", "release!~(noble|jammy)"]).expect("filters");
    for item in products.items() {
        let _ = filters.accept(&item).expect("ends");
        if let Ok(Some(download)) = item.download() {
            let url = download.path.below(&root).expect("below");
            assert!(url.path().starts_with("/root/") && url.host_str() == Some("mirror.example"), "{url}");
        }
    }
    if let Some(secs) = products.updated {
        assert_eq!(date::parse(&date::format(secs)), Some(secs));
    }
});
