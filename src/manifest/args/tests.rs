use serde_json::json;

use super::*;

fn args(schema: Value) -> Args {
    Args::compile(&schema).expect("a schema")
}

fn map(value: Value) -> Map<String, Value> {
    value.as_object().expect("an object").clone()
}

fn fields(error: &Error) -> Vec<&str> {
    error.violations().iter().map(|v| v.field.as_str()).collect()
}

#[test]
fn bare_properties_get_defaults_and_are_required_without() {
    let args = args(
        json!({"hostname": {"type": "string", "default": "debian-host"}, "port": {"type": "integer"}, "note": {"type": "string", "optional": true}}),
    );
    assert_eq!(args.resolve(&map(json!({"port": 80}))).expect("right"), map(json!({"hostname": "debian-host", "port": 80})));
    assert_eq!(fields(&args.resolve(&Map::new()).expect_err("port")), ["args.port"]);
    let error = args.resolve(&map(json!({"port": "x", "hostnme": "a"}))).expect_err("two problems");
    let mut found = fields(&error);
    found.sort_unstable();
    assert_eq!(found, ["args.hostnme", "args.port"]);
    assert!(error.violations().iter().any(|v| v.description.contains("did you mean \"hostname\"?")), "{error:?}");
}

#[test]
fn required_in_the_style_of_draft_3_is_understood() {
    let args =
        args(json!({"a": {"type": "string", "required": false}, "b": {"type": "string", "required": true, "default": "x"}, "c": {"required": true}}));
    assert_eq!(fields(&args.resolve(&Map::new()).expect_err("c")), ["args.c"]);
    assert_eq!(args.resolve(&map(json!({"c": 1}))).expect("right"), map(json!({"b": "x", "c": 1})));
}

#[test]
fn groups_nest_in_the_bare_form() {
    let args = args(
        json!({"db": {"user": {"type": "string", "default": "app"}, "title": {"type": "string", "default": "t"}}, "mail": {"host": {"type": "string"}}}),
    );
    let resolved = args.resolve(&map(json!({"mail": {"host": "mx"}}))).expect("right");
    assert_eq!(resolved, map(json!({"db": {"user": "app", "title": "t"}, "mail": {"host": "mx"}})));
    assert_eq!(fields(&args.resolve(&map(json!({"mail": {}}))).expect_err("host")), ["args.mail.host"]);
    assert_eq!(fields(&args.resolve(&map(json!({"mail": {"host": "a", "hots": "b"}}))).expect_err("hots")), ["args.mail.hots"]);
}

#[test]
fn an_argument_may_be_called_type_or_properties() {
    let args = args(json!({"type": {"type": "string", "default": "web"}, "properties": {"type": "string", "default": "p"}}));
    assert_eq!(args.resolve(&Map::new()).expect("right"), map(json!({"type": "web", "properties": "p"})));
}

#[test]
fn whole_schemas_of_both_ages_work() {
    let old = args(
        json!({"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "any", "optional": true}, "c": {"type": ["integer", "null"], "default": 3}}}),
    );
    assert_eq!(fields(&old.resolve(&Map::new()).expect_err("a")), ["args.a"]);
    assert_eq!(old.resolve(&map(json!({"a": "x", "more": 1}))).expect("open"), map(json!({"a": "x", "c": 3, "more": 1})));
    let new = args(json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "required": ["b"], "additionalProperties": false,
        "properties": {"a": {"type": "string"}, "b": {"$ref": "#/$defs/port"}, "list": {"type": "array", "items": {"$ref": "#/$defs/pair"}}},
        "$defs": {"port": {"type": "integer", "minimum": 1, "maximum": 65535, "default": 80}, "pair": {"type": "object", "properties": {"k": {"default": "v"}}}}
    }));
    assert_eq!(new.resolve(&map(json!({"list": [{}, {"k": 1}]}))).expect("right"), map(json!({"b": 80, "list": [{"k": "v"}, {"k": 1}]})));
    assert_eq!(fields(&new.resolve(&map(json!({"b": 70000}))).expect_err("range")), ["args.b"]);
    let draft4 = args(json!({"$schema": "http://json-schema.org/draft-04/schema#", "properties": {"n": {"minimum": 0, "exclusiveMinimum": true}}}));
    assert_eq!(fields(&draft4.resolve(&map(json!({"n": 0}))).expect_err("exclusive")), ["args.n"]);
}

#[test]
fn keywords_of_old_drafts_are_translated() {
    let args = args(json!({
        "n": {"type": "integer", "divisibleBy": 4, "minimum": 0, "minimumCanEqual": false, "optional": true},
        "u": {"type": ["string", {"type": "object", "properties": {"x": {"type": "integer"}}}], "optional": true},
        "d": {"disallow": "string", "optional": true},
        "ip": {"type": "string", "format": "ip-address", "optional": true}
    }));
    for good in [json!({"n": 8}), json!({"u": "a"}), json!({"u": {"x": 1}}), json!({"d": 1}), json!({"ip": "192.0.2.1"})] {
        assert!(args.resolve(&map(good.clone())).is_ok(), "{good}");
    }
    for bad in [json!({"n": 0}), json!({"n": 6}), json!({"u": 1}), json!({"u": {}}), json!({"d": "s"}), json!({"ip": "x"})] {
        assert!(args.resolve(&map(bad.clone())).is_err(), "{bad}");
    }
}

#[test]
fn bad_schemas_are_refused_at_their_field() {
    for (schema, field) in [
        (json!([]), "args"),
        (json!({"a": "string"}), "args.a"),
        (json!({"a": {"type": "strnig"}}), "args.a.type"),
        (json!({"a": {"type": "string", "default": 3}}), "args.a.default"),
        (json!({"a": {"$ref": "http://169.254.169.254/x"}}), "args.a.$ref"),
        (json!({"a": {"$ref": "file:///etc/passwd"}}), "args.a.$ref"),
        (json!({"a": {"type": "object", "properties": {"b": {"$ref": "other.json#/x"}}}}), "args.a.properties.b.$ref"),
        (json!({"type": "string"}), "args.type"),
        (json!({"a": {"type": "string", "pattern": "("}}), "args.a.pattern"),
        (json!({"$schema": "https://evil.example/schema", "properties": {}}), "args.$schema"),
        (json!({"a": {"$id": "http://x.example/", "type": "string"}}), "args.a.$id"),
        (json!({"a": {"type": "string", "minLength": "x"}}), "args.a.minLength"),
    ] {
        let error = Args::compile(&schema).expect_err("bad");
        assert_eq!(fields(&error), [field], "{schema}: {error:?}");
    }
}

#[test]
fn secrets_are_known_and_never_shown() {
    let args = args(
        json!({"pw": {"type": "string", "format": "password", "minLength": 9}, "db": {"key": {"type": "string", "writeOnly": true, "maxLength": 2}}, "n": {"type": "integer"}}),
    );
    assert!(args.is_secret("pw") && args.is_secret("db") && !args.is_secret("n"));
    let error = args.resolve(&map(json!({"pw": "hunter2", "db": {"key": "hunter2"}, "n": "visible"}))).expect_err("three problems");
    assert!(!format!("{error:?} {:?}", error.violations()).contains("hunter2"), "{error:?}");
    assert!(format!("{:?}", error.violations()).contains("visible"));
    let error = args.resolve(&map(json!({"pw": {"x": "hunter2"}, "hunter": ["hunter2"]}))).expect_err("wrong");
    assert!(!format!("{error:?} {:?}", error.violations()).contains("hunter2"), "{error:?}");
}

#[test]
fn control_characters_size_and_backtracking_are_limited() {
    let args = args(json!({"a": {"type": "string"}, "b": {"type": "array", "optional": true}}));
    assert!(args.resolve(&map(json!({"a": "two\nlines\tand a tab"}))).is_ok());
    assert_eq!(fields(&args.resolve(&map(json!({"a": "x", "b": ["\u{1b}[2J"]}))).expect_err("escape")), ["args.b[0]"]);
    assert_eq!(fields(&args.resolve(&map(json!({"a": "x\u{85}"}))).expect_err("C1")), ["args.a"]);
    assert_eq!(fields(&args.resolve(&map(json!({"a": "x".repeat(ARGS_LEN_MAX)}))).expect_err("size")), ["args"]);
    let costly = Args::compile(&json!({"a": {"type": "string", "pattern": "^(?:(a*)*)*(?:(a*)*)*\\1c$"}})).expect("a schema");
    assert_eq!(fields(&costly.resolve(&map(json!({"a": "a".repeat(100)}))).expect_err("backtracking")), ["args.a"]);
}

#[test]
fn schemas_that_refer_to_themselves_or_multiply_are_refused() {
    let with = |property: Value, definitions: Value| json!({"$schema": "http://json-schema.org/draft-07/schema#", "properties": {"a": property}, "definitions": definitions});
    let reference = |name: String| json!({"$ref": format!("#/definitions/{name}")});
    let doubling: Map<String, Value> =
        (0..30).map(|i| (format!("d{i}"), json!({"allOf": [reference(format!("d{}", i + 1)), reference(format!("d{}", i + 1))]}))).collect();
    let mut doubling = Value::Object(doubling);
    doubling["d30"] = json!({"type": "string"});
    for schema in [
        with(json!({"$ref": "#/properties/a"}), json!({})),
        with(json!({"$ref": "#"}), json!({})),
        with(reference("n".into()), json!({"n": {"properties": {"n": {"$ref": "#/definitions/n"}}}})),
        with(reference("nowhere".into()), json!({})),
        with(reference("d0".into()), doubling),
        Value::Object((0..200).map(|i| (format!("a{i}"), json!({"pattern": "^a{900}$"}))).collect()),
    ] {
        assert!(Args::compile(&schema).is_err(), "{schema}");
    }
    let shared = args(with(reference("s".into()), json!({"s": {"type": "string", "format": "password"}})));
    assert!(shared.is_secret("a"));
}
