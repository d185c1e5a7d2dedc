use serde_json::json;

use super::*;

fn context() -> serde_json::Value {
    json!({
        "args": {"hostname": "web1", "port": 80, "ratio": 2.0, "half": 0.5, "on": true, "none": null, "list": ["a", "b"], "map": {"k": "v"}, "evil": "a'b\"c\n<%= args.port %>", "big": "x".repeat(60_000)},
        "dns": {"nameservers": ["192.0.2.53", "2001:db8::53"], "search": []},
        "ip": {"interfaces": [{"name": "eth0", "address": "192.0.2.10", "gateway": null}]}
    })
}

#[track_caller]
fn gives(source: &str, want: &str) {
    assert_eq!(render("/etc/x", source, &context()).map_err(|e| format!("{e:?}")), Ok(want.to_owned()), "{source}");
}

#[track_caller]
fn refuses(source: &str, reason: &str, part: &str) {
    match render("/etc/x", source, &context()) {
        Ok(text) => panic!("{source} gave {:?}", &text[..text.len().min(200)]),
        Err(error) => {
            assert_eq!(error.reason(), reason, "{source}: {error:?}");
            assert!(error.to_string().contains(part) && error.object() == "/etc/x", "{source}: {error:?} lacks {part:?}");
        }
    }
}

#[test]
fn expressions_print_as_in_2010() {
    gives("<%= args.hostname %>\n", "web1\n");
    gives("<%=args.hostname%>.<%= args['hostname'] %>", "web1.web1");
    gives("<%= args.port %> <%= args.ratio %> <%= args.half %> <%= args.on %> <%= 'x' == 'y' %>", "80 2 0.5 true false");
    gives("<%= args.list %> <%= dns.nameservers[0] %>", "a,b 192.0.2.53");
    gives("<%= args.hostname + '.example' %> <%= args.hostname ~ args.port %>", "web1.example web180");
    gives("no tags { at } {{ all }} {% here %} % > < %", "no tags { at } {{ all }} {% here %} % > < %");
    gives("", "");
}

#[test]
fn statements_and_white_space() {
    gives("<% for n in dns.nameservers %>nameserver <%= n %>\n<% endfor %>", "nameserver 192.0.2.53\nnameserver 2001:db8::53\n");
    gives("<%- if args.on and not args.none -%>\n yes \n<%- else -%> no <%- endif %>!", "yes!");
    gives(
        "<% for i in ip.interfaces if i.name is startingwith('eth') %><%= loop.index %>:<%= i.name %><% if i.gateway %>gw<% endif %><% endfor %>",
        "1:eth0",
    );
    gives("<% for k, v in args.map|items %><%= k %>=<%= v %><% endfor %>", "k=v");
    gives("<% set fqdn = args.hostname ~ '.example' %><%= fqdn %><%# a comment <% if %>", "web1.example");
    gives("<%= \"<%\" %> <%= '%>' %>", "<% %>");
    gives("a\r\nb\r\n", "a\r\nb\r\n");
    gives("<%= args.none|default('x', true) %><%= args.missing|default('y') %><%= 'z' if args.none %>", "xy");
    gives("<% for i in range(5) %><% if i == 3 %><% break %><% endif %><%= i %><% endfor %>", "012");
    gives("<%= args.list|map(attribute='x')|length if false else args.list|length %>", "2");
}

#[test]
fn output_is_not_expanded_again() {
    gives("<%= args.evil %>", "a'b\"c\n<%= args.port %>");
    gives("<%= '<' ~ '%= args.port %' ~ '>' %>", "<%= args.port %>");
}

#[test]
fn filters_write_values_for_their_files() {
    gives("<%= args.evil|shell %>", "'a'\\''b\"c\n<%= args.port %>'");
    gives("<%= args.evil|json %>", "\"a'b\\\"c\\n<%= args.port %>\"");
    gives("<%= 'a\u{85}\u{2028}'|yaml %>", "\"a\\u0085\\u2028\"");
    gives("<%= args.map|json %> <%= args.list|yaml %> <%= args.none|json %>", "{\"k\":\"v\"} [\"a\",\"b\"] null");
    gives("<%= '<a b=\"&\">'|xml %>", "&lt;a b=&quot;&amp;&quot;&gt;");
    gives(
        "<%= args.hostname|ini %> <%= args.list|join(', ') %> <%= 'a b'|split|join('-') %> <%= 'aXb'|replace('X', 'YY')|upper %>",
        "web1 a, b a-b AYYB",
    );
    gives("<%= ip.interfaces|map(attribute='name')|join %>", "eth0");
    refuses("<%= args.evil|ini %>", "TEMPLATE_FAILED", "U+000A");
    refuses("<%= ' x'|line %>", "TEMPLATE_FAILED", "white space");
    refuses("<%= args.map|shell %>", "TEMPLATE_FAILED", "not map");
    refuses("<%= args.hostname|bogus %>", "TEMPLATE_SYNTAX", "shell");
    refuses("<%= args.missing|json %>", "TEMPLATE_UNDEFINED", "undefined");
}

#[test]
fn every_filter_that_is_named_exists() {
    for name in FILTERS {
        assert!(check("x", &format!("<%= 1|{name} %>")).is_ok(), "{name}");
    }
}

#[test]
fn what_is_missing_is_an_error_with_its_place() {
    refuses("\n\n  <%= args.missing %>", "TEMPLATE_UNDEFINED", "line 3, column 7: `args.missing` is undefined");
    refuses("<%= nothing.at.all %>", "TEMPLATE_UNDEFINED", "`nothing` is undefined");
    refuses("<% if args.missing %><% endif %>", "TEMPLATE_UNDEFINED", "args.missing");
    refuses("<%= args.none %>", "TEMPLATE_FAILED", "null");
    refuses("<%= args.map %>", "TEMPLATE_FAILED", "object");
    refuses("<%= args.hostname", "TEMPLATE_SYNTAX", "not closed");
    refuses("<% if args.on %>", "TEMPLATE_SYNTAX", "line 1");
    refuses("a\nb <% esle %>", "TEMPLATE_SYNTAX", "line 2, column 6");
    refuses("<%% x", "TEMPLATE_SYNTAX", "<%%");
    refuses("<%- args.hostname %>", "TEMPLATE_SYNTAX", "to print a value write <%= … %>");
}

#[test]
fn javascript_is_named_as_such() {
    for (source, part) in [
        ("x\n<% for (var i = 0; i < 3; i++) { %>x<% } %>", "line 2, column 4"),
        ("<% if (args.on) { %>x<% } %>", "a block in braces"),
        ("<% } %>", "a block in braces"),
        ("<% } else { %>", "a block in braces"),
        ("<% var x = 1 %>", "\"var\""),
        ("<%= args.a || 'b' %>", "\"||\""),
        ("<%= args.a && 'b' %>", "\"&&\""),
        ("<%= !args.a %>", "\"!\""),
        ("<%= args.a ? 1 : 2 %>", "\"?\""),
        ("<%= args.a === 1 %>", "\"===\""),
        ("<%= args.hostname; %>", "\";\""),
        ("<%= args.hostname.toUpperCase() %>", ".toUpperCase(…)"),
        ("<%= args.list.length %>", "|length"),
        ("<% args.list.forEach(function(x) { %>", ""),
        ("<%= function() { return 1 } %>", "\"function\""),
        ("<%= `a${b}` %>", ""),
    ] {
        refuses(source, "TEMPLATE_JAVASCRIPT", part);
    }
}

#[test]
fn nothing_but_text_production_is_offered() {
    for source in [
        "<% include '/etc/shadow' %>",
        "<% import 'x' as y %>",
        "<% from 'x' import y %>",
        "<% extends 'x' %>",
        "<% macro m() %><% endmacro %>",
        "<% block x %><% endblock %>",
        "<% filter upper %><% endfilter %>",
        "<% set x %>a<% endset %>",
        "<% do x %>",
        "<% autoescape true %><% endautoescape %>",
        "<% raw %><% endraw %>",
        "<% with x = 1 %><% endwith %>",
        "<% call x() %><% endcall %>",
        "<% for x in args.list recursive %><% endfor %>",
        "<%= debug() %>",
        "<%= namespace() %>",
        "<%= super() %>",
        "<%= (args)() %>",
        "<%= args['x']() %>",
        "<%= 'a' * 3 %>",
        "<%= 2 ** 9 %>",
        "<% set a.b = 1 %>",
        "<%= (1 %> <%= 2) %>",
        "<%= loop(1) %>",
        "<% 'x' %>",
        "<%= args.hostname <% %>",
    ] {
        refuses(source, "TEMPLATE_SYNTAX", "line 1");
    }
}

#[test]
fn a_hostile_template_runs_into_limits() {
    let started = Instant::now();
    refuses("<% for a in range(4000) %><% for b in range(4000) %><% endfor %><% endfor %>", "TEMPLATE_LIMIT", "steps");
    refuses("<% for a in range(100) %><%= args.big %><% endfor %>", "TEMPLATE_LIMIT", "bytes");
    let doubling: String = (0..60).map(|i| format!("<% set x{} = x{i} ~ x{i} %>", i + 1)).collect();
    refuses(&format!("<% set x0 = args.big %>{doubling}"), "TEMPLATE_LIMIT", "more than 32 values");
    let nesting: String = (0..60).map(|i| format!("<% set x{} = [x{i}, x{i}] %>", i + 1)).collect();
    refuses(&format!("<% set x0 = 'a' %>{nesting}"), "TEMPLATE_LIMIT", "more than 32 values");
    let loops: String = (0..40).map(|i| format!("<% for x{} in [x{i} ~ x{i}] %>", i + 1)).collect();
    refuses(&format!("<% set x0 = args.big %>{loops}"), "TEMPLATE_LIMIT", "more than 32 values");
    refuses("<%= args.big|replace('x', args.big) %>", "TEMPLATE_FAILED", "bytes");
    refuses("<%= range(100000000)|length %>", "TEMPLATE_FAILED", "limit");
    refuses("<%= args.big|list|length %>", "TEMPLATE_FAILED", "not a string");
    refuses(&format!("<%= {}1{} %>", "(".repeat(5000), ")".repeat(5000)), "TEMPLATE_SYNTAX", "line 1");
    refuses(&"<% if true %>".repeat(4000), "TEMPLATE_SYNTAX", "line 1");
    refuses(&"x".repeat(SOURCE_LEN_MAX + 1), "TEMPLATE_LIMIT", "bytes");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[test]
fn what_a_template_mentions_is_known() {
    assert!(mentions("a <%= args.password %>", "password") && mentions("<%= args['password'] %>", "password"));
    assert!(!mentions("password <%= args.x %>", "password"));
    for (source, whole) in [
        ("<%= args|json %>", true),
        ("<%= args[k] %>", true),
        ("<% for a in args|items %>", true),
        ("<%= args.x %>", false),
        ("<%= args['x'] %>", false),
        ("<%= a.args %>", false),
    ] {
        assert_eq!(mentions_all_args(source), whole, "{source}");
    }
}

proptest::proptest! {
    #[test]
    fn no_source_makes_it_panic_or_hang(source in "(<%=?-?|%>|args|\\.hostname|\"|'|for x in |if |endif|endfor|[(){}\\[\\]|~+,=# a1\n])*") {
        let _ = render("x", &source, &context());
    }

    #[test]
    fn text_without_tags_comes_back_unchanged(source in "[^<]*") {
        proptest::prop_assert_eq!(render("x", &source, &context()).map_err(|e| e.to_string()), Ok(source));
    }
}

/// What fuel can't see: long values made again and again. The bound is seconds, for a machine that is slow and busy.
#[test]
fn the_costliest_loop_ends_soon() {
    let sum = vec!["args.big"; 30].join(" ~ ");
    let source = format!(
        "<% set x = {sum} %><% for a in range(4000) %><% for b in range(4000) %><% if (x ~ a)|length == 1 %>!<% endif %><% endfor %><% endfor %>"
    );
    let started = Instant::now();
    refuses(&source, "TEMPLATE_LIMIT", "steps");
    println!("costliest loop: {:?}", started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn an_ordinary_template_takes_well_under_a_millisecond() {
    let source = "auto lo\niface lo inet loopback\n<% for i in ip.interfaces %>auto <%= i.name %>\niface <%= i.name %> inet static\n  address <%= i.address %>\n<% endfor %>";
    let context = context();
    let best = (0..20)
        .map(|_| {
            let started = Instant::now();
            assert!(render("/etc/network/interfaces", source, &context).is_ok());
            started.elapsed()
        })
        .min()
        .expect("twenty runs");
    println!("ordinary template: {best:?}");
    assert!(best < Duration::from_millis(5), "{best:?}");
}
