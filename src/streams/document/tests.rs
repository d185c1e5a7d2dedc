use proptest::prelude::*;
use serde_json::json;

use super::*;

/// A document shaped as Ubuntu's of released downloads.
fn ubuntu() -> Value {
    json!({
        "format": "products:1.0", "content_id": "com.ubuntu.cloud:released:download", "datatype": "image-downloads",
        "updated": "Thu, 09 Oct 2014 13:12:40 +0000", "license": "http://www.canonical.com/intellectual-property-policy",
        "_aliases": {"crsn": {"useast1": {"endpoint": "https://ec2.us-east-1.amazonaws.com", "region": "us-east-1"}}},
        "products": {
            "com.ubuntu.cloud:server:12.04:amd64": {
                "aliases": "12.04,p,precise", "arch": "amd64", "os": "ubuntu", "release": "precise", "supported": true, "version": "12.04",
                "versions": {
                    "20140908": {
                        "label": "release", "pubname": "ubuntu-precise-12.04-amd64-server-20140908",
                        "items": {
                            "root.tar.gz": {
                                "ftype": "root.tar.gz", "md5": "7b4b4b4f6f3cb4b4b4b4b4b4b4b4b4b4", "size": 216_000_000,
                                "sha256": "BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD",
                                "path": "server/releases/precise/release-20140908/ubuntu-12.04-server-cloudimg-amd64-root.tar.gz"
                            },
                            "useast1": {"ftype": "ami", "crsn": "useast1", "virt": ["pv", "hvm"], "arch": "i386"}
                        }
                    },
                    "20140110": {"label": "beta", "items": {}}
                }
            }
        }
    })
}

fn parse(value: &Value) -> Result<Products> {
    Products::parse(value.to_string().as_bytes(), &Limits::default())
}

#[test]
fn fields_are_inherited_from_the_inside_out() {
    let products = parse(&ubuntu()).expect("a document");
    assert_eq!((products.content_id.as_str(), products.updated), ("com.ubuntu.cloud:released:download", Some(1_412_860_360)));
    let items: Vec<_> = products.items().collect();
    assert_eq!(items.len(), 2);
    let [tar, ami] = [items[0], items[1]];
    let text = |item: &ItemRef<'_>, key: &str| item.text(key).map(Cow::into_owned);
    for (key, want) in [
        ("arch", "amd64"),
        ("label", "release"),
        ("content_id", "com.ubuntu.cloud:released:download"),
        ("product_name", "com.ubuntu.cloud:server:12.04:amd64"),
        ("version_name", "20140908"),
        ("item_name", "root.tar.gz"),
        ("supported", "True"),
        ("size", "216000000"),
    ] {
        assert_eq!(text(&tar, key).as_deref(), Some(want), "{key}");
    }
    assert_eq!(text(&ami, "arch").as_deref(), Some("i386"), "the item's own wins");
    assert_eq!(text(&ami, "region").as_deref(), Some("us-east-1"), "from its alias");
    assert_eq!(text(&tar, "region"), None);
    assert_eq!(text(&ami, "virt").as_deref(), Some("pv,hvm"));
    assert_eq!(ami.list("virt"), ["pv", "hvm"]);
    assert_eq!(tar.list("aliases"), ["12.04", "p", "precise"], "a comma string is a list");
    let download = tar.download().expect("right").expect("a path");
    assert_eq!(download.digest, Some(Digest::of(b"abc")));
    assert_eq!(download.size, Some(216_000_000));
    assert_eq!(ami.download().expect("right"), None);
}

#[test]
fn versions_order_as_bytes() {
    let mut value = ubuntu();
    let versions = &mut value["products"]["com.ubuntu.cloud:server:12.04:amd64"]["versions"];
    for name in ["20140908.1", "20140908_10", "a", "B", "9"] {
        versions[name] = json!({});
    }
    let products = parse(&value).expect("a document");
    let names: Vec<&str> = products.products.values().flat_map(|product| product.versions.keys().map(String::as_str)).collect();
    assert_eq!(names, ["20140110", "20140908", "20140908.1", "20140908_10", "9", "B", "a"]);
}

#[test]
fn what_is_wrong_is_refused_and_named() {
    let change = |pointer: &str, to: Value| {
        let mut value = ubuntu();
        *value.pointer_mut(pointer).expect(pointer) = to;
        parse(&value)
    };
    const ITEM: &str = "/products/com.ubuntu.cloud:server:12.04:amd64/versions/20140908/items";
    for (pointer, to, want) in [
        ("/format".to_owned(), json!("products:2.0"), "products:2.0"),
        ("/updated".to_owned(), json!("tomorrow"), "updated"),
        ("/products".to_owned(), json!([]), "products"),
        ("/_aliases/crsn".to_owned(), json!({"useast1": {"items": {}}}), "_aliases.crsn.useast1.items"),
        (format!("{ITEM}/useast1/crsn"), json!("nowhere"), "no alias \"nowhere\""),
        (format!("{ITEM}/useast1"), json!(3), "useast1"),
    ] {
        let error = change(&pointer, to).expect_err(&pointer);
        assert_eq!((error.kind(), error.reason()), (Kind::Corrupt, "STREAM_INVALID"), "{pointer}");
        assert!(error.chain().contains(want), "{pointer}: {}", error.chain());
    }
    for (key, to) in [("path", json!("../../etc/passwd")), ("path", json!("https://elsewhere/x")), ("sha256", json!("abc")), ("size", json!(-1))] {
        let products = change(&format!("{ITEM}/root.tar.gz/{key}"), to).expect("only the item is wrong");
        let item = products.items().next().expect("an item");
        assert!(item.download().expect_err(key).chain().contains(key));
    }
    for text in ["", "[]", "{", "{\"format\": \"products:1.0\", \"format\": \"x\", \"products\": {}}"] {
        assert_eq!(Products::parse(text.as_bytes(), &Limits::default()).expect_err(text).kind(), Kind::Corrupt, "{text}");
    }
}

#[test]
fn documents_are_bounded() {
    let text = ubuntu().to_string();
    let all = Limits::default();
    for limits in [
        Limits { bytes_max: text.len() as u64 - 1, ..all },
        Limits { products_max: 0, ..all },
        Limits { versions_max: 1, ..all },
        Limits { items_max: 1, ..all },
    ] {
        let error = Products::parse(text.as_bytes(), &limits).expect_err("too large");
        assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "STREAM_TOO_LARGE"), "{limits:?}");
    }
    assert_eq!(Products::parse(text.as_bytes(), &Limits { depth_max: 3, ..all }).expect_err("too deep").kind(), Kind::Corrupt);
    // Many short references to one long alias.
    let items: Map<String, Value> = (0..100).map(|index| (format!("i{index}"), json!({"a": "x"}))).collect();
    let bomb = json!({
        "format": "products:1.0", "_aliases": {"a": {"x": {"long": "y".repeat(2000)}}}, "products": {"p": {"versions": {"v": {"items": items}}}}
    });
    let text = bomb.to_string();
    let error = Products::parse(text.as_bytes(), &Limits { bytes_max: text.len() as u64, ..all }).expect_err("too much");
    assert!(error.chain().contains("aliases"), "{}", error.chain());
}

#[test]
fn an_index_names_its_documents() {
    let value = json!({
        "format": "index:1.0", "updated": "Thu, 09 Oct 2014 13:12:40 +0000",
        "index": {
            "com.ubuntu.cloud:released:download": {
                "datatype": "image-downloads", "format": "products:1.0", "updated": "Thu, 09 Oct 2014 13:12:39 +0000",
                "path": "streams/v1/com.ubuntu.cloud:released:download.json", "products": ["com.ubuntu.cloud:server:12.04:amd64"]
            },
            "com.ubuntu.cloud:released:aws": {
                "datatype": "image-ids", "format": "products:1.0", "path": "streams/v1/aws.json",
                "clouds": [{"region": "us-east-1", "endpoint": "https://ec2.us-east-1.amazonaws.com"}]
            }
        }
    });
    let index = Index::parse(value.to_string().as_bytes(), &Limits::default()).expect("an index");
    let entry = &index.entries["com.ubuntu.cloud:released:download"];
    assert_eq!(entry.path.signed().as_str(), "streams/v1/com.ubuntu.cloud:released:download.sjson");
    assert_eq!((entry.updated, entry.products.len()), (Some(1_412_860_359), 1));
    assert_eq!(index.entries["com.ubuntu.cloud:released:aws"].clouds[0].0, "us-east-1");
    let escaping = value.to_string().replace("streams/v1/aws.json", "/etc/passwd");
    assert!(Index::parse(escaping.as_bytes(), &Limits::default()).expect_err("escapes").chain().contains("aws"));
    assert!(Products::parse(value.to_string().as_bytes(), &Limits::default()).expect_err("an index").chain().contains("index:1.0"));
}

/// JSON of the shapes that a reader trips over.
fn any_json() -> impl Strategy<Value = Value> {
    let name =
        prop_oneof![Just("products"), Just("versions"), Just("items"), Just("_aliases"), Just("path"), Just("size"), Just("updated"), Just("a")];
    let leaf =
        prop_oneof![Just(Value::Null), any::<bool>().prop_map(Value::from), any::<i64>().prop_map(Value::from), "[a./]{0,6}".prop_map(Value::from)];
    leaf.prop_recursive(6, 48, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(name.clone().prop_map(str::to_owned), inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn no_tree_makes_the_reader_panic(products in any_json(), aliases in any_json(), format in prop_oneof![Just("products:1.0"), Just("index:1.0")]) {
        let value = json!({"format": format, "products": products.clone(), "index": products, "_aliases": aliases});
        let text = value.to_string();
        if let Ok(tree) = Products::parse(text.as_bytes(), &Limits::default()) {
            for item in tree.items() {
                let _ = item.download();
                let _ = item.text("a");
            }
        }
        let _ = Index::parse(text.as_bytes(), &Limits::default());
    }

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Products::parse(&bytes, &Limits::default());
        let _ = super::parse(&bytes, &Limits::default());
    }
}
