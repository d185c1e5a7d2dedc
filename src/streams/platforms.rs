//! Instance types as a `products:1.0` document: a product is an instance type, an item is a cloud (endpoint and region) that has it.
//!
//! ```text
//! m1.small {hypervisor: xen, mode: pv, arch: "i386,amd64", cpus: 1, memory_mib: 1740, nested_virtualization: false, containers: "lxc"}
//!   20261122
//!     us-east-1 {endpoint: https://ec2.us-east-1.amazonaws.com, region: us-east-1}
//! ```
//!
//! Fields are inherited and aliased as in every products document, so that a cloud may differ in one of them. The newest version counts. The JSON Schema is
//! `proto/platforms.schema.json`.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::{ItemRef, Limits, Products, date, document::invalid, publish::both};
use crate::{
    boot::platform::{Bus, Firmware},
    error::Result,
    matching::{Cloud, Container, Hypervisor, Mode, Platform},
};

/// Datatype of such a document.
pub const DATATYPE: &str = "platforms";

/// Instance types in a document; the largest clouds have a thousand.
pub const PLATFORMS_MAX: usize = 10_000;

/// Reads the instance types of a document. `Kind::Corrupt` (`STREAM_INVALID`) naming what is wrong.
pub fn parse(bytes: &[u8]) -> Result<Vec<Platform>> {
    of(&Products::parse(bytes, &Limits::default())?)
}

/// The instance types of a document that was read. Fails as [`parse`] does.
pub fn of(products: &Products) -> Result<Vec<Platform>> {
    if !products.datatype.is_empty() && products.datatype != DATATYPE {
        return Err(invalid(format!("has datatype {:?}, not {DATATYPE:?}", products.datatype)));
    }
    let mut platforms: Vec<Platform> = Vec::new();
    let mut known: HashMap<Platform, usize> = HashMap::new();
    for (product, of_product) in &products.products {
        let Some(version) = of_product.versions.keys().next_back() else { continue };
        for item in products.items_of(product, version) {
            let platform = platform(&item)?;
            // A cloud that has the same thing adds itself; one that differs is a platform of its own.
            let without = Platform { clouds: Vec::new(), ..platform.clone() };
            if let Some(index) = known.get(&without) {
                platforms[*index].clouds.extend(platform.clouds);
                continue;
            }
            if platforms.len() >= PLATFORMS_MAX {
                return Err(invalid(format!("has more than {PLATFORMS_MAX} instance types")));
            }
            known.insert(without, platforms.len());
            platforms.push(platform);
        }
    }
    Ok(platforms)
}

fn platform(item: &ItemRef<'_>) -> Result<Platform> {
    let wrong = |key: &str, why: &str| invalid(format!("{}.{key}: {why}", item.pedigree()));
    let text = |key: &str| item.text(key).map(std::borrow::Cow::into_owned);
    let word = |key: &str| text(key).map(Value::String);
    let number = |key: &str| text(key).map(|text| text.parse::<u64>().map_err(|_| wrong(key, "is not a number"))).transpose();
    let flag = |key: &str| match text(key).as_deref() {
        None | Some("False" | "false" | "no" | "0") => Ok(false),
        Some("True" | "true" | "yes" | "1") => Ok(true),
        Some(_) => Err(wrong(key, "is neither true nor false")),
    };
    let hypervisor = text("hypervisor").ok_or_else(|| wrong("hypervisor", "is required"))?;
    let hypervisor = Hypervisor::parse(&hypervisor).ok_or_else(|| wrong("hypervisor", "is none of xen, kvm, none"))?;
    let mode = match text("mode") {
        Some(mode) => Mode::parse(&mode).ok_or_else(|| wrong("mode", "is none of pv, pvh, hvm, dom0, kvm, metal"))?,
        None => Mode::of(hypervisor),
    };
    if mode.hypervisor() != hypervisor {
        return Err(wrong("mode", "does not belong to the hypervisor"));
    }
    let firmware: Option<Firmware> =
        word("firmware").map(serde_json::from_value).transpose().map_err(|_| wrong("firmware", "is none of bios, uefi, direct, loader"))?;
    let bus: Option<Bus> = word("bus").map(serde_json::from_value).transpose().map_err(|_| wrong("bus", "is none of virtio, scsi, nvme, xen"))?;
    let list = |list_key: &str, comma_key: &str| {
        let list = item.list(list_key);
        if list.is_empty() { item.list(comma_key) } else { list }
    };
    let archs = list("arch_list", "arch");
    if archs.is_empty() {
        return Err(wrong("arch", "is required"));
    }
    let kinds = list("container_kinds", "containers");
    let containers = kinds.iter().map(|kind| Container::parse(kind).ok_or_else(|| wrong("containers", "is none of lxc, kvm, xen")));
    let containers = if kinds.is_empty() { None } else { Some(containers.collect::<Result<_>>()?) };
    Ok(Platform {
        name: item.product.to_owned(),
        clouds: vec![Cloud { region: text("region").unwrap_or_default(), endpoint: text("endpoint").unwrap_or_default() }],
        hypervisor,
        mode,
        firmware,
        bus,
        archs,
        cpus: number("cpus")?.and_then(|cpus| u32::try_from(cpus).ok()).unwrap_or(1),
        memory_mib: number("memory_mib")?.unwrap_or(0),
        nested_virtualization: flag("nested_virtualization")?,
        secure_boot: flag("secure_boot")?,
        configured: false,
        supplies_kernel: flag("supplies_kernel")?,
        containers,
    })
}

/// The document of these instance types, as of `now` (seconds since 1970).
pub fn document(content_id: &str, platforms: &[Platform], now: i64) -> Value {
    let mut products = serde_json::Map::new();
    for platform in platforms {
        let mut fields = json!({
            "hypervisor": platform.hypervisor.name(), "mode": platform.mode.name(), "cpus": platform.cpus, "memory_mib": platform.memory_mib,
            "nested_virtualization": platform.nested_virtualization, "secure_boot": platform.secure_boot, "supplies_kernel": platform.supplies_kernel,
        });
        if let Some(firmware) = platform.firmware {
            fields["firmware"] = firmware.name().into();
        }
        if let Some(bus) = platform.bus {
            fields["bus"] = json!(bus);
        }
        both(&mut fields, "arch_list", "arch", &platform.archs);
        let kinds: Vec<String> =
            Container::ALL.into_iter().filter(|kind| platform.why_not(*kind).is_none()).map(|kind| kind.name().to_owned()).collect();
        both(&mut fields, "container_kinds", "containers", &kinds);
        let mut items = serde_json::Map::new();
        for cloud in &platform.clouds {
            let name = if cloud.region.is_empty() { "default" } else { &cloud.region };
            items.insert(name.to_owned(), json!({"region": cloud.region, "endpoint": cloud.endpoint}));
        }
        fields["versions"] = json!({date::day(now): {"items": items}});
        // The same name on clouds that differ: the later ones have the region in their name, and a number where that is not enough.
        let mut name = platform.name.clone();
        if products.contains_key(&name) {
            name = format!("{name}@{}", platform.clouds.first().map(|cloud| cloud.region.as_str()).unwrap_or_default());
        }
        if products.contains_key(&name) {
            let free = (2..).map(|number| format!("{name}.{number}")).find(|name| !products.contains_key(name));
            name = free.expect("numbers do not end");
        }
        products.insert(name, fields);
    }
    json!({"format": "products:1.0", "content_id": content_id, "datatype": DATATYPE, "updated": date::format(now), "products": products})
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The worked example's instance types.
    pub(crate) const EXAMPLE: &str = include_str!("../../tests/data/streams/platforms.json");
    const SCHEMA: &str = include_str!("../../proto/platforms.schema.json");

    #[test]
    fn the_example_and_what_we_publish_fit_the_schema() {
        let schema: Value = serde_json::from_str(SCHEMA).expect("JSON");
        let validator = jsonschema::validator_for(&schema).expect("a schema");
        let example: Value = serde_json::from_str(EXAMPLE).expect("JSON");
        let complaints = |value: &Value| validator.iter_errors(value).map(|error| format!("{} {error}", error.instance_path())).collect::<Vec<_>>();
        assert_eq!(complaints(&example), Vec::<String>::new());
        let platforms = parse(EXAMPLE.as_bytes()).expect("platforms");
        assert_eq!(platforms.len(), 6);
        assert_eq!(platforms.iter().find(|platform| platform.name == "m1.small").expect("there").clouds.len(), 2, "one per cloud");
        let published = document("example:platforms", &platforms, 1_795_000_000);
        assert_eq!(complaints(&published), Vec::<String>::new());
        for (pointer, to) in
            [("/products/m1.small/hypervisor", json!("vmware")), ("/products/m1.small/cpus", json!(0)), ("/format", json!("index:1.0"))]
        {
            let mut wrong = published.clone();
            *wrong.pointer_mut(pointer).expect(pointer) = to;
            assert!(!complaints(&wrong).is_empty(), "{pointer}");
        }
        let again = parse(published.to_string().as_bytes()).expect("read again");
        // What is published says which containers fit, so that is given when it is read again.
        let without = |platforms: &[Platform]| platforms.iter().map(|platform| Platform { containers: None, ..platform.clone() }).collect::<Vec<_>>();
        assert_eq!(without(&again), without(&platforms));
    }

    #[test]
    fn instance_types_of_one_name_all_stay_and_too_many_are_refused() {
        let product = |items: Vec<(String, Value)>| {
            let items: serde_json::Map<String, Value> = items.into_iter().collect();
            let fields = json!({"hypervisor": "kvm", "arch": "amd64", "versions": {"1": {"items": items}}});
            json!({"format": "products:1.0", "products": {"m1": fields}}).to_string()
        };
        let same = (1..=4).map(|cpus| (format!("i{cpus}"), json!({"cpus": cpus, "region": "here", "endpoint": "https://e"}))).collect();
        let read = parse(product(same).as_bytes()).expect("four of one name");
        assert_eq!(read.len(), 4);
        let published = document("id", &read, 1);
        assert_eq!(parse(published.to_string().as_bytes()).expect("ours").len(), 4, "{published}");
        let many = |count: usize| product((0..count).map(|memory| (format!("i{memory}"), json!({"memory_mib": memory}))).collect());
        assert_eq!(parse(many(PLATFORMS_MAX).as_bytes()).expect("as many as may be").len(), PLATFORMS_MAX);
        assert!(parse(many(PLATFORMS_MAX + 1).as_bytes()).expect_err("one more").chain().contains("more than 10000"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, want) in [
            ("\"pv\"", "\"kvm\"", "mode"),
            ("\"xen\"", "\"vmware\"", "hypervisor"),
            ("\"i386,amd64\"", "\"\"", "arch"),
            ("1740", "\"much\"", "memory_mib"),
        ] {
            let error = parse(EXAMPLE.replacen(from, to, 1).as_bytes()).expect_err(want);
            assert!(error.chain().contains(want), "{}", error.chain());
        }
    }
}
