use proptest::prelude::*;

use super::*;

fn map(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
    entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn context() -> Context {
    Context {
        instance: map(&[("name", "web1"), ("type", "virtual-machine"), ("privileged", "false")]),
        config: map(&[("user.meta-data", "a: b\r\n"), ("user.empty", "")]),
        properties: map(&[("default", "#cloud-config\n{}\n")]),
        trigger: "create".into(),
        path: "/etc/x".into(),
    }
}

fn shown(source: &str) -> String {
    render("t.tpl", source, &context()).unwrap_or_else(|error| panic!("{source}: {error}"))
}

/// What Canonical's and distrobuilder's images carry.
#[test]
fn templates_of_published_images_are_understood() {
    assert_eq!(shown("{{ container.name }}\n"), "web1\n");
    let meta = "#cloud-config\ninstance-id: {{ container.name }}\nlocal-hostname: {{ container.name }}\n{{ config_get(\"user.meta-data\", \"\") }}";
    assert_eq!(shown(meta), "#cloud-config\ninstance-id: web1\nlocal-hostname: web1\na: b");
    assert_eq!(shown("{{ config_get(\"user.user-data\", properties.default) }}"), "#cloud-config\n{}\n");
    let network = "{% if config_get(\"user.network-config\", \"\") == \"\" %}version: 1\nconfig:\n    - type: physical\n      name: eth0\n      subnets:\n          \
        - type: {% if config_get(\"user.network_mode\", \"\") == \"link-local\" %}manual{% else %}dhcp{% endif %}\n            control: auto{% else %}\
        {{ config_get(\"user.network-config\", \"\") }}{% endif %}";
    assert_eq!(
        shown(network),
        "version: 1\nconfig:\n    - type: physical\n      name: eth0\n      subnets:\n          - type: dhcp\n            control: auto"
    );
    let nested = "{%- if config_get(\"cloud-init.user-data\", properties.default) == properties.default -%}\n\
        {{ config_get(\"user.user-data\", properties.default) }}\n{%- else -%}\n\
        {{- config_get(\"cloud-init.user-data\", properties.default) }}\n{%- endif %}\n";
    assert_eq!(shown(nested), "#cloud-config\n{}\n\n");
    let by_type = "name: {% if instance.type == \"virtual-machine\" %}enp5s0{% else %}eth0{% endif %}\n";
    assert_eq!(shown(by_type), "name: enp5s0\n");
}

#[test]
fn expressions_mean_what_they_mean_in_pongo2() {
    for (source, expected) in [
        ("{{ properties.none }}|{{ config[\"user.empty\"] }}|{{ config.user.x }}", "||"),
        ("{{ config[\"user.meta-data\"] }}", "a: b\r\n"),
        ("{{ true }} {{ 7 }} {{ trigger }} {{ path }}", "True 7 create /etc/x"),
        ("{{ properties.none|default:\"x\" }}{{ properties.default|default:'y' }}", "x#cloud-config\n{}\n"),
        ("{% if not properties.none and (trigger == \"start\" or \"web\" in container.name) %}yes{% endif %}", "yes"),
        ("{% if !config_get(\"user.empty\", \"x\") && \"user.empty\" in config %}yes{% elif true %}no{% endif %}", "yes"),
        ("{% if properties.none == \"\" %}empty{% elif trigger != \"create\" %}b{% else %}nothing{% endif %}", "nothing"),
        ("a \n {#- not seen #} {%- if true -%} \n b {%- endif -%} \n c", "a \n bc"),
        ("{{ \"a \\\"quoted\\\" \\\\ text\" }}", "a \"quoted\" \\ text"),
        ("{ {} } %} #} }}", "{ {} } %} #} }}"),
    ] {
        assert_eq!(shown(source), expected, "{source}");
    }
}

#[test]
fn what_a_template_prints_is_not_expanded_again() {
    let mut hostile = context();
    hostile.config.insert("user.x".into(), "{{ container.name }}{% if".into());
    assert_eq!(render("t", "{{ config_get(\"user.x\", \"\") }}", &hostile).expect("rendered"), "{{ container.name }}{% if");
}

#[test]
fn what_is_not_supported_is_refused_by_name_and_line() {
    for (source, message) in [
        ("a\n{% for x in devices %}{% endfor %}", "line 2, column 1: the statement \"for\" is not supported"),
        ("{% include \"/etc/shadow\" %}", "the statement \"include\" is not supported"),
        ("{{ devices.eth0 }}", "\"devices\" is not offered"),
        ("{{ container.name|upper }}", "the filter \"upper\" is not supported"),
        ("{{ container.name.Title() }}", "only config_get() can be called"),
        ("{{ config }}", "prints a whole map"),
        ("{{ config_get(\"x\") }}", "\",\" is expected"),
        ("{{ container.name", "is not closed with }}"),
        ("{% if true %}", "this if has no endif"),
        ("{% if true %}{% else %}{% else %}{% endif %}", "else does not belong here"),
        ("{% endif %}", "endif without an if"),
        ("{{ \"\\x41\" }}", "a backslash in a string"),
        ("{{ 1 + 1 }}", "'+' is not supported"),
        ("{{ }}", "the tag ends where a value is expected"),
        ("{# never", "this comment is not closed"),
    ] {
        let error = render("t.tpl", source, &context()).expect_err(source);
        assert_eq!(error.reason(), "TEMPLATE_SYNTAX", "{source}");
        assert!(error.message().contains(message), "{source}: {}", error.message());
    }
}

#[test]
fn what_a_template_may_cost_is_bounded() {
    let deep = "{% if true %}".repeat(40) + &"{% endif %}".repeat(40);
    assert!(check("t", &deep).is_err());
    assert!(check("t", &format!("{{{{ {}1{} }}}}", "(".repeat(40), ")".repeat(40))).is_err());
    assert!(check("t", &format!("{{{{ {}1 }}}}", "not ".repeat(40))).is_err());
    assert_eq!(check("t", &"{{ 1 }}".repeat(6000)).expect_err("many").reason(), "TEMPLATE_LIMIT");
    assert_eq!(check("t", &"x".repeat(300 * 1024)).expect_err("long").reason(), "TEMPLATE_LIMIT");
    let mut large = context();
    large.config.insert("k".into(), "x".repeat(64 * 1024));
    assert_eq!(render("t", &"{{ config.k }}".repeat(100), &large).expect_err("much").reason(), "TEMPLATE_LIMIT");
}

proptest! {
    #[test]
    fn no_template_makes_it_panic(source in "[{}%# a-c\"'\\\\().,|:!=\\[\\]7\n-]{0,60}") {
        let _ = render("t", &source, &context());
    }

    #[test]
    fn no_sequence_of_known_words_makes_it_panic(words in prop::collection::vec(prop::sample::select(vec![
        "{%", "%}", "{{", "}}", "{#", "#}", "-%}", "{%-", "if", "elif", "else", "endif", "not", "or", "in", "config_get", "(", ")", "config", ".", "\"a\"",
        ",", "|", "default", ":", "[", "]", "==", "\n", "é",
    ]), 0..40)) {
        let _ = render("t", &words.join(" "), &context());
    }
}
