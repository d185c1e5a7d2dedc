//! Applying a manifest to an instance: the context that templates see, and the edits that rendering them makes. Pure.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Manifest, json::element, template};
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::edit::{Attrs, Edit, EditOp},
    guest::{
        config::{Cidr, InstanceConfig, Interface, Network},
        facts::{CONTENT_LEN_MAX, CONTENT_TOTAL_MAX, GuestFacts, NodeKind},
    },
    names::{GuestPath, Hostname},
};

/// Time that all templates of an image may take together; honest ones take microseconds.
const TIME_MAX: Duration = Duration::from_secs(5);
/// Bytes that all templates of an image may produce together: a block patch is a few of them.
pub const OUTPUT_TOTAL_MAX: usize = 8 * 1024 * 1024;
/// Characters from which on the value of a secret is looked for in results; shorter ones are found anywhere.
const SECRET_LEN_MIN: usize = 3;

/// What templates may know about the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Its id in the catalogue.
    pub id: String,
    /// Its name; empty when it has none.
    pub name: String,
}

/// What templates see. `args`, `dns` and `ip` as in 2010; `instance`, `network` and `image` beside them:
///
/// ```text
/// args       the arguments with defaults
/// dns        nameservers [address…], search [domain…]
/// ip         interfaces [{name, mac, address, netmask, prefix, gateway, broadcast, addresses […], …}…]
/// instance   name, hostname (first label), fqdn, domain
/// network    configured, backend, interfaces (as in ip), nameservers, search
/// image      id, name
/// ```
///
/// Every member is always there: what is not known is null, so that a template can ask for it.
pub fn context(config: &InstanceConfig, args: &Map<String, Value>, image: &ImageInfo) -> Value {
    let none = Network::default();
    let network = config.network.as_ref().unwrap_or(&none);
    let interfaces: Vec<Value> = network.interfaces.iter().map(interface).collect();
    let nameservers = unique(network.nameservers.iter().chain(network.interfaces.iter().flat_map(|i| &i.nameservers)).map(IpAddr::to_string));
    let search = unique(network.search.iter().chain(network.interfaces.iter().flat_map(|i| &i.search)).map(Hostname::to_string));
    let hostname = config.hostname.clone().or_else(|| config.instance.as_str().parse().ok());
    json!({
        "args": args,
        "dns": {"nameservers": nameservers, "search": search},
        "ip": {"interfaces": interfaces},
        "instance": {
            "name": config.instance.as_str(),
            "hostname": hostname.as_ref().map(Hostname::short),
            "fqdn": hostname.as_ref().map(Hostname::as_str),
            "domain": hostname.as_ref().and_then(Hostname::domain),
        },
        "network": {
            "configured": config.network.is_some(),
            "backend": network.backend.map(|backend| backend.name()),
            "interfaces": interfaces,
            "nameservers": nameservers,
            "search": search,
        },
        "image": {"id": image.id, "name": image.name},
    })
}

fn unique(texts: impl Iterator<Item = String>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    texts.filter(|text| seen.insert(text.clone())).collect()
}

/// An interface in the shape of 2010: one address with its netmask and gateway (the first IPv4 one, else the first), and all there is beside it.
fn interface(interface: &Interface) -> Value {
    let main = interface.addresses.iter().find(|cidr| cidr.address.is_ipv4()).or(interface.addresses.first());
    let six = interface.addresses.iter().find(|cidr| cidr.address.is_ipv6());
    let gateway = match main.map(|cidr| cidr.address) {
        Some(IpAddr::V6(_)) => interface.gateway6.map(IpAddr::V6),
        _ => interface.gateway4.map(IpAddr::V4),
    };
    let main = main.map_or(json!({"address": null, "prefix": null, "netmask": null, "broadcast": null, "network": null, "family": null}), address);
    let mut shown = json!({
        "name": interface.name.as_str(),
        "mac": interface.mac.map(|mac| mac.to_string()),
        "gateway": gateway,
        "address6": six.map(|cidr| cidr.address),
        "prefix6": six.map(|cidr| cidr.prefix),
        "gateway4": interface.gateway4,
        "gateway6": interface.gateway6,
        "addresses": interface.addresses.iter().map(address).collect::<Vec<_>>(),
        "dhcp": interface.dhcp4 || interface.dhcp6,
        "dhcp4": interface.dhcp4,
        "dhcp6": interface.dhcp6,
        "mtu": interface.mtu,
        "nameservers": interface.nameservers,
        "search": interface.search.iter().map(Hostname::as_str).collect::<Vec<_>>(),
        "routes": interface.routes.iter().map(|route| {
            json!({"to": format!("{}/{}", route.to.address, route.to.prefix), "via": route.via, "metric": route.metric})
        }).collect::<Vec<_>>(),
    });
    if let (Value::Object(shown), Value::Object(main)) = (&mut shown, main) {
        shown.extend(main);
    }
    shown
}

fn address(cidr: &Cidr) -> Value {
    let (mask, broadcast, network) = match cidr.address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(cidr.prefix.min(32))).unwrap_or(0);
            let bits = u32::from(address);
            // RFC 3021: a /31 or /32 has no broadcast address.
            let broadcast = (cidr.prefix < 31).then(|| Ipv4Addr::from(bits | !mask));
            (Some(Ipv4Addr::from(mask)), broadcast, IpAddr::V4(Ipv4Addr::from(bits & mask)))
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(cidr.prefix.min(128))).unwrap_or(0);
            (None, None, IpAddr::V6((u128::from(address) & mask).into()))
        }
    };
    let family = if cidr.address.is_ipv4() { 4 } else { 6 };
    json!({"address": cidr.address, "prefix": cidr.prefix, "netmask": mask, "broadcast": broadcast, "network": network, "family": family})
}

/// A template to expand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Where the manifest names it: `templates[i]`.
    pub field: String,
    /// Its path in the image.
    pub path: String,
    /// The template.
    pub text: String,
}

/// What a template writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expanded {
    /// The file's content.
    pub text: String,
    /// Whether the value of a secret argument may be in it.
    pub is_secret: bool,
}

/// Renders every template of the manifest: one edit per file, with its mode and owner. A template that is reached through a symlink is written where
/// the link leads; two names of one file are one template; a file without any tag is left alone. `expand` is [`expand`], here or in another process.
///
/// Errors name the field `templates[i]` and the path, and for mistakes in a template the line: reasons `TEMPLATE_NOT_IN_IMAGE`,
/// `TEMPLATE_NOT_A_FILE`, `TEMPLATE_TOO_LARGE`, `TEMPLATE_NOT_UTF8`, and those of `expand`. Edits whose content may hold the value of a secret argument are
/// marked secret.
pub fn template_edits(
    manifest: &Manifest,
    facts: &GuestFacts,
    context: Value,
    expand: impl FnOnce(Vec<Source>, Value, &BTreeSet<String>) -> Result<Vec<Expanded>>,
) -> Result<Vec<Edit>> {
    let mut seen = BTreeSet::new();
    let (mut places, mut sources) = (Vec::new(), Vec::new());
    for (index, path) in manifest.templates().iter().enumerate() {
        let field = element("templates", index);
        let file = find(facts, path).map_err(|(reason, message)| {
            Error::new(Kind::InvalidRequest, Stage::Inject, path.to_string(), message.clone())
                .with_reason(reason)
                .with_violation(field.clone(), message)
        })?;
        if seen.insert(file.path.clone()) && file.source.contains("<%") {
            sources.push(Source { field, path: path.display().into_owned(), text: file.source.to_owned() });
            places.push((file.path, file.attrs));
        }
    }
    let expanded = expand(sources, context, manifest.secret_args())?;
    let edits = places.into_iter().zip(expanded).map(|((path, attrs), Expanded { text, is_secret })| Edit {
        path,
        secret: is_secret,
        op: EditOp::WriteFile { content: text.into_bytes(), attrs },
        why: "template of the manifest".to_owned(),
    });
    Ok(edits.collect())
}

/// Expands templates in the order given. No message shows the value of a secret argument. Reasons `TEMPLATE_LIMIT` and those of [`template::render`].
pub fn expand(sources: &[Source], context: &Value, secret_args: &BTreeSet<String>) -> Result<Vec<Expanded>> {
    let secrets = Secrets::of(secret_args, context);
    let started = Instant::now();
    let mut total = 0;
    let mut expanded = Vec::with_capacity(sources.len());
    for Source { field, path, text: source } in sources {
        let text = template::render(path, source, context)
            .map_err(|error| secrets.redact(&error).with_violation(field.clone(), secrets.hide(error.message())))?;
        total += text.len();
        if total > OUTPUT_TOTAL_MAX || started.elapsed() > TIME_MAX {
            let message = format!(
                "the templates up to here write {total} bytes in {:?}; the limits are {OUTPUT_TOTAL_MAX} and {TIME_MAX:?}",
                started.elapsed()
            );
            return Err(Error::new(Kind::InvalidRequest, Stage::Inject, path.clone(), message.clone())
                .with_reason("TEMPLATE_LIMIT")
                .with_violation(field.clone(), message));
        }
        expanded.push(Expanded { is_secret: secrets.may_be_in(source, &text), text });
    }
    Ok(expanded)
}

struct TemplateFile<'a> {
    path: GuestPath,
    source: &'a str,
    attrs: Attrs,
}

fn find<'a>(facts: &'a GuestFacts, path: &GuestPath) -> std::result::Result<TemplateFile<'a>, (&'static str, String)> {
    let given = std::str::from_utf8(path.as_bytes()).map_err(|_| ("TEMPLATE_NOT_IN_IMAGE", "the path is not UTF-8".to_owned()))?;
    let Some((found, node)) = facts.resolve(given) else {
        let dangling = if facts.node(given).is_some() { "the template is a symlink that leads nowhere" } else { "the template is not in the image" };
        return Err(("TEMPLATE_NOT_IN_IMAGE", dangling.to_owned()));
    };
    let NodeKind::File { size, content } = &node.kind else {
        return Err((
            "TEMPLATE_NOT_A_FILE",
            format!("the template must be a regular file{}", if found == given { String::new() } else { format!("; it leads to {found}") }),
        ));
    };
    let Some(content) = content else {
        let message =
            format!("the template has {size} bytes; a template may have {CONTENT_LEN_MAX}, and all files that injection reads {CONTENT_TOTAL_MAX}");
        return Err(("TEMPLATE_TOO_LARGE", message));
    };
    let source = std::str::from_utf8(content).map_err(|e| {
        let line = content[..e.valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        ("TEMPLATE_NOT_UTF8", format!("line {line}: the template is not UTF-8"))
    })?;
    let path = GuestPath::new(&found).map_err(|message| ("TEMPLATE_NOT_IN_IMAGE", message))?;
    let attrs = Attrs { mode: node.mode, uid: node.uid, gid: node.gid, xattrs: Vec::new() };
    Ok(TemplateFile { path, source, attrs })
}

/// The secret arguments: their names, and the texts in their values.
struct Secrets<'a> {
    names: &'a BTreeSet<String>,
    values: Vec<String>,
}

impl<'a> Secrets<'a> {
    fn of(names: &'a BTreeSet<String>, context: &Value) -> Secrets<'a> {
        let mut values = Vec::new();
        for name in names {
            texts(&context["args"][name], &mut values);
        }
        values.retain(|value| value.chars().count() >= SECRET_LEN_MIN);
        // The longest first, so that one that contains another is hidden whole.
        values.sort_by_key(|value| std::cmp::Reverse(value.len()));
        Secrets { names, values }
    }

    /// Whether a file may contain a secret: its template names one or all arguments, or the value is there to be seen.
    fn may_be_in(&self, source: &str, content: &str) -> bool {
        !self.names.is_empty()
            && (template::mentions_all_args(source)
                || self.names.iter().any(|name| template::mentions(source, name))
                || self.values.iter().any(|value| content.contains(value)))
    }

    fn hide(&self, text: &str) -> String {
        self.values.iter().fold(text.to_owned(), |text, value| text.replace(value.as_str(), "[redacted]"))
    }

    fn redact(&self, error: &Error) -> Error {
        let redacted = Error::new(error.kind(), error.stage(), error.object(), self.hide(error.message())).with_reason(error.reason());
        match error.hint() {
            Some(hint) => redacted.with_hint(hint),
            None => redacted,
        }
    }
}

fn texts(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::String(text) => found.push(text.clone()),
        Value::Number(number) => found.push(number.to_string()),
        Value::Array(elements) => elements.iter().for_each(|value| texts(value, found)),
        Value::Object(members) => members.values().for_each(|value| texts(value, found)),
        Value::Null | Value::Bool(_) => {}
    }
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
