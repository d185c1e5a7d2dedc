//! A template of an LXD image: what is written is within limits, a template that renders is a right one, and an instance's own texts stay as they are.

#![no_main]

use std::collections::BTreeMap;

use cloudletd::manifest::{
    lxd::pongo::{Context, check, render},
    template::OUTPUT_LEN_MAX,
};
use libfuzzer_sys::fuzz_target;

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(source) = std::str::from_utf8(bytes) else { return };
    let context = Context {
        instance: map(&[("name", "web1"), ("type", "virtual-machine")]),
        // What looks like a template is text.
        config: map(&[("user.network-config", "{{ instance.name }}{% endif %}"), ("user.empty", "")]),
        properties: map(&[("default", "yes")]),
        trigger: "create".into(),
        path: "/etc/x".into(),
    };
    let rendered = render("x.tpl", source, &context);
    if let Ok(text) = &rendered {
        assert!(text.len() <= OUTPUT_LEN_MAX);
        check("x.tpl", source).expect("what renders is right");
        assert_eq!(render("x.tpl", source, &context).ok().as_ref(), Some(text));
    }
    if let Err(error) = rendered {
        assert!(!error.message().chars().any(char::is_control), "{:?}", error.message());
    }
});
