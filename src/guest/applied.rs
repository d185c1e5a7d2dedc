//! `/.cloudlet/applied_config`: what the instance was told about itself, for programs inside it. JSON, 0644, never a secret.
//!
//! Left out altogether: password hashes, keys, the content of files. Of `args`, the values that the manifest marks as secret and those whose
//! names say so are replaced by `"[redacted]"` (failures.md 22; cloud-init CVE-2023-1786).

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::{
    error::Result,
    fs::edit::Attrs,
    guest::{
        config::{Bond, Bridge, Cidr, InstanceConfig, Interface, LinkKind, Network, Route, Rule, Vlan},
        json,
        plan::Plan,
    },
    units::Timestamp,
};

/// Where it is.
pub const PATH: &str = "/.cloudlet/applied_config";

/// Parts of names that mark a value as secret even if the manifest does not.
const SECRET_NAMES: [&str; 9] = ["password", "passwd", "passphrase", "secret", "token", "private", "credential", "apikey", "api_key"];

/// Writes the document.
pub fn write_applied_config(
    plan: &mut Plan<'_>,
    config: &InstanceConfig,
    secret_args: &BTreeSet<String>,
    machine_id: &str,
    now: Timestamp,
) -> Result<()> {
    let mut document = document(config, secret_args);
    if let Value::Object(fields) = &mut document {
        fields.insert("machine_id".into(), machine_id.into());
        fields.insert("applied_at_secs".into(), now.secs.into());
    }
    plan.make_dir("/.cloudlet", Attrs::root(0o755), "record of the applied configuration")?;
    plan.write(PATH, json::escaped(&document), 0o644, "record of the applied configuration")
}

/// The configuration as a document without secrets; also fit for logs.
pub fn document(config: &InstanceConfig, secret_args: &BTreeSet<String>) -> Value {
    let InstanceConfig { instance, hostname, args, network, authorized_keys, root_password_hash: _, machine_id: _, ssh_host_keys: _, files, setup } =
        config;
    let users: Map<String, Value> = authorized_keys.iter().map(|keys| (keys.user.clone(), keys.keys.len().into())).collect();
    json!({
        "instance": instance.as_str(),
        "hostname": hostname.as_ref().map(|name| name.as_str()),
        "args": redacted(args, secret_args),
        "network": network.as_ref().map(network_value),
        "authorized_key_counts": users,
        "users": setup.users.iter().map(|user| user.name.as_str()).collect::<Vec<_>>(),
        "files": files.iter().map(|file| file.path.to_string()).collect::<Vec<_>>(),
    })
}

fn is_secret(name: &str) -> bool {
    let name = name.to_lowercase();
    SECRET_NAMES.iter().any(|part| name.contains(part))
}

fn redacted(args: &Map<String, Value>, secret_args: &BTreeSet<String>) -> Map<String, Value> {
    args.iter()
        .map(|(name, value)| {
            let hidden = secret_args.contains(name) || is_secret(name);
            (name.clone(), if hidden { "[redacted]".into() } else { redacted_inside(value) })
        })
        .collect()
}

fn redacted_inside(value: &Value) -> Value {
    match value {
        Value::Object(fields) => redacted(fields, &BTreeSet::new()).into(),
        Value::Array(items) => items.iter().map(redacted_inside).collect(),
        other => other.clone(),
    }
}

/// The network in the form that `decode` reads, so that what one instance was given can be given again.
pub fn network_value(network: &Network) -> Value {
    let Network { interfaces, nameservers, search, backend } = network;
    json!({
        "interfaces": interfaces.iter().map(interface_value).collect::<Vec<_>>(),
        "nameservers": nameservers,
        "search": search,
        "backend": backend.map(|kind| kind.name()),
    })
}

fn interface_value(interface: &Interface) -> Value {
    let Interface {
        name,
        kind,
        mac,
        addresses,
        gateway4,
        gateway6,
        metric,
        routes,
        rules,
        dhcp4,
        dhcp6,
        accept_ra,
        ipv6_privacy,
        link_local,
        optional,
        mtu,
        nameservers,
        search,
    } = interface;
    let mut value = json!({
        "name": name,
        "mac": mac,
        "addresses": addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "gateway4": gateway4,
        "gateway6": gateway6,
        "metric": metric,
        "routes": routes.iter().map(route_value).collect::<Vec<_>>(),
        "rules": rules.iter().map(rule_value).collect::<Vec<_>>(),
        "dhcp4": dhcp4,
        "dhcp6": dhcp6,
        "accept_ra": accept_ra,
        "ipv6_privacy": ipv6_privacy,
        "link_local": link_local,
        "optional": optional,
        "mtu": mtu,
        "nameservers": nameservers,
        "search": search,
    });
    let link = match kind {
        LinkKind::Ethernet => return value,
        LinkKind::Bond(Bond { members, mode, primary, miimon_ms, lacp_rate, hash_policy }) => json!({
            "members": members,
            "mode": mode.name(),
            "primary": primary,
            "miimon_ms": miimon_ms,
            "lacp_rate": lacp_rate.map(|rate| rate.name()),
            "xmit_hash_policy": hash_policy.map(|policy| policy.name()),
        }),
        LinkKind::Bridge(Bridge { members, stp, forward_delay, hello_time, max_age, ageing_time, priority }) => json!({
            "members": members,
            "stp": stp,
            "forward_delay": forward_delay,
            "hello_time": hello_time,
            "max_age": max_age,
            "ageing_time": ageing_time,
            "priority": priority,
        }),
        LinkKind::Vlan(Vlan { id, link }) => json!({"id": id, "link": link}),
    };
    value[kind.name()] = link;
    value
}

fn route_value(route: &Route) -> Value {
    let Route { to, via, kind, metric, table, on_link } = route;
    json!({"to": to.to_string(), "via": via, "type": kind.name(), "metric": metric, "table": table, "on_link": on_link})
}

fn rule_value(rule: &Rule) -> Value {
    let Rule { from, to, table, priority, mark } = rule;
    let text = |cidr: &Option<Cidr>| cidr.map(|cidr| cidr.to_string());
    json!({"from": text(from), "to": text(to), "table": table, "priority": priority, "mark": mark})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_args_are_redacted_by_mark_and_by_name_at_every_depth() {
        let Value::Object(args) = json!({"title": "x", "pin": 7, "db": {"Password": "p", "host": "h"}, "list": [{"auth_token": 1}]}) else {
            panic!("an object");
        };
        let got = Value::Object(redacted(&args, &BTreeSet::from(["pin".to_owned()])));
        assert_eq!(
            got,
            json!({"title": "x", "pin": "[redacted]", "db": {"Password": "[redacted]", "host": "h"}, "list": [{"auth_token": "[redacted]"}]})
        );
    }
}
