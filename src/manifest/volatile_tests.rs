use super::*;

fn path(text: &str) -> GuestPath {
    GuestPath::new(text).expect("a path")
}

#[track_caller]
fn check(pattern: &str, matching: &[&str], others: &[&str]) {
    let volatile = Volatile::compile(&[pattern]).expect("a pattern");
    for given in matching {
        assert!(volatile.matches(&path(given)).expect("cheap"), "{pattern} must match {given}");
    }
    for given in others {
        assert!(!volatile.matches(&path(given)).expect("cheap"), "{pattern} must not match {given}");
    }
}

#[test]
fn patterns_are_anchored_at_the_start_only() {
    check("/var/run/.+", &["/var/run/x.pid", "/var/run/a/b"], &["/var/run", "/srv/var/run/x"]);
    check("/tmp", &["/tmp", "/tmp/x", "/tmpfile"], &["/var/tmp"]);
    check("/etc/mtab$", &["/etc/mtab"], &["/etc/mtab2", "/etc/mtab/x"]);
    check("^/dev/log$", &["/dev/log"], &["/dev/log2"]);
    check("/a|/b", &["/a", "/b", "/bc"], &["/c", "/x/a"]);
    check(".*\\.pyc$", &["/usr/lib/x.pyc"], &["/usr/lib/x.py"]);
    check("/x+y", &["/xxy"], &["/y"]);
    check("/x*y", &["/y", "/xxy"], &["/z"]);
    check("/x?/?y", &["/x/y", "/y"], &["/xx/y"]);
}

#[test]
fn look_ahead_and_look_behind_work() {
    check("/var/log/(?!apt).+", &["/var/log/syslog", "/var/log/x/apt"], &["/var/log/apt", "/var/log/apt/term.log"]);
    check("/var/lib/apt/lists/(?!partial).+", &["/var/lib/apt/lists/x_Release"], &["/var/lib/apt/lists/partial", "/var/lib/apt/lists/partial/x"]);
    check("/home/(?=[^/]+/tmp$).*", &["/home/a/tmp"], &["/home/a/tmp2"]);
    check("/.*(?<!keep)\\.log$", &["/var/a.log"], &["/var/keep.log"]);
}

#[test]
fn a_pattern_without_leading_slash_means_the_path_without_it() {
    check("var/cache/.+", &["/var/cache/x"], &["/srv/var/cache/x"]);
    check("^tmp/", &["/tmp/x"], &["/var/tmp/x"]);
}

#[test]
fn python_syntax_is_translated() {
    check("/(?P<n>[a-z]+)/(?P=n)\\Z", &["/ab/ab"], &["/ab/ac", "/ab/abc"]);
    check("(?i)/ETC/x", &["/etc/X"], &["/etd/x"]);
    check("/a(?i)b", &["/AB"], &[]);
    check("(?u)/\\w+$", &["/ab_1"], &["/\u{e9}"]);
    check("/[[]x[]]", &["/[x]"], &["/x"]);
    check("/[]]", &["/]"], &["/["]);
    check("/[^]a]$", &["/b"], &["/]", "/a"]);
    check("/[a&&b]$", &["/&", "/a"], &["/c"]);
    check("/a{,2}$", &["/aa", "/a"], &["/aaa"]);
    check("/a{2}$", &["/aa"], &["/aaa", "/a"]);
    check("/a{x}", &["/a{x}"], &["/ax"]);
    check("/\\h\\e", &["/he"], &["/ae"]);
    check("/caf\u{e9}+", &["/caf\u{e9}", "/caf\u{e9}\u{e9}"], &["/cafe"]);
    check("/a(?#as in (b)c$", &["/ac"], &["/abc"]);
    check("/(a)(?(1)b|c)", &["/ab"], &["/ac"]);
}

#[test]
fn paths_that_are_not_utf8_are_matched_as_bytes() {
    let volatile = Volatile::compile(&["/tmp/.+$"]).expect("a pattern");
    assert!(volatile.matches(&GuestPath::new(b"/tmp/\xff\xfe").expect("a path")).expect("cheap"));
}

#[test]
fn bad_patterns_are_named_by_index() {
    let error = Volatile::compile(&["/ok", "/bad(", "/x"]).expect_err("unbalanced");
    assert_eq!(error.violations()[0].field, "volatile[1]");
    for bad in [
        "",
        "/a\\",
        "/[a",
        "(?x) /a",
        "/a(?P=)",
        "/(?P>x)",
        "/\\u00e9",
        "/[\u{e9}]",
        "/(?<=a+)b**",
        "(?:/[^x]{1000}){1000}",
        "/a)?(",
        "/a(?#x",
        "/\\xg1",
        "/a\u{1}",
        &"x".repeat(1025),
    ] {
        assert!(Volatile::compile(&[bad]).is_err(), "{bad:?} was accepted");
    }
    assert!(Volatile::compile(&vec!["/x"; PATTERNS_MAX + 1]).is_err());
}

#[test]
fn catastrophic_backtracking_is_an_error_not_a_hang() {
    let volatile = Volatile::compile(&["/(?:(a*)*)*(?:(a*)*)*\\1c"]).expect("legal");
    let started = std::time::Instant::now();
    let error = volatile.matches(&path(&format!("/{}b", "a".repeat(200)))).expect_err("too costly");
    assert_eq!((error.kind(), error.reason()), (Kind::Unsupported, "VOLATILE_PATTERN_TOO_COSTLY"));
    assert!(started.elapsed().as_millis() < 500);
}

/// The patterns are of the kind that images of 2010 carried.
#[test]
fn a_tree_of_thirteen_thousand_paths_costs_milliseconds() {
    let patterns = [
        "/etc/rc6.d/S00vzreboot$",
        "/var/log/(?!apt).+",
        "/var/log/apt/.+",
        "/var/run/.+",
        "/sys/.+",
        "/proc/.+",
        "/var/tmp/.+",
        "/tmp/.+",
        "/var/cache/apt/archives/lock$",
        "/etc/mtab$",
        "/dev/log$",
        "/usr/lib/python2.6/.+\\.pyc",
        "/var/lib/apt/lists/(?!partial).+",
        "/var/cache/apt/pkgcache.bin$",
        "/var/cache/apt/archives/.+\\.deb",
        "/var/cache/debconf/.+",
        "/root/\\..*history$",
        "/home/[^/]+/\\.cache/.+",
        ".*\\.dpkg-(old|new|dist)$",
        "/core$",
    ];
    let volatile = Volatile::compile(&patterns).expect("patterns");
    let paths: Vec<GuestPath> = (0..13_000).map(|i| path(&format!("/usr/share/doc/package-{}/examples/file{i}.txt", i % 700))).collect();
    let cost = (0..5).map(|_| {
        let started = std::time::Instant::now();
        assert_eq!(paths.iter().filter(|path| volatile.matches(path).expect("cheap")).count(), 0);
        started.elapsed()
    });
    let best = cost.min().expect("five runs");
    println!("13000 paths, 20 patterns: {best:?}");
    assert!(best.as_millis() < 100, "{best:?}: far beyond what even a noisy machine needs");
}

proptest::proptest! {
    #[test]
    fn the_prefix_test_never_hides_a_match(pattern in "[/ab.*+?|()^$\\\\\\[\\]{}2,-]{1,10}", subject in "/[ab./-]{0,8}") {
        if let (Ok(compiled), Ok(path)) = (compile(&pattern), GuestPath::new(&subject)) {
            let subject = if compiled.relative { &path.as_bytes()[1..] } else { path.as_bytes() };
            if compiled.regex.is_match(subject).unwrap_or(false) {
                proptest::prop_assert!(subject.starts_with(&compiled.prefix), "{:?} {:?}", pattern, path);
            }
        }
    }
}
