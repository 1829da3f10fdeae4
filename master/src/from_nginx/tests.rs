//! What is printed for any text: TOML, and no panic. The corpus is `tests/data/fuzz/nginx` and nginx's configurations in
//! `tests/data/from_nginx`. A longer run by hand: `PROPTEST_CASES=1000000 cargo test --release -p master any_text`.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

fn corpus() -> Vec<Vec<u8>> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
    let mut files: Vec<PathBuf> = Vec::new();
    for folder in ["fuzz/nginx", "from_nginx"] {
        let entries =
            std::fs::read_dir(data.join(folder)).unwrap_or_else(|error| panic!("{folder}: {error}"));
        files.extend(entries.map(|entry| entry.unwrap().path()));
    }
    files.retain(|file| file.extension().is_some_and(|ending| ending == "conf"));
    files.sort();
    assert!(files.len() >= 12, "only {} inputs", files.len());
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// Reads a text and prints what it is here. Nothing that it includes is read, and no name is looked up.
fn print(text: &[u8]) -> Option<String> {
    let directives = tree::read_text(Path::new("/nonexistent/nginx.conf"), text).ok()?;
    let document = translate(&directives).ok()?;
    let page = document.page();
    for remark in document.remarks() {
        assert!(
            !remark.line().chars().any(char::is_control),
            "{:?}",
            remark.line()
        );
    }
    let parsed = page.text.parse::<toml::Table>();
    assert!(parsed.is_ok(), "{parsed:?}\n{}", page.text);
    Some(page.text)
}

/// Includes of absolute paths would read this machine's files.
fn harmless(text: Vec<u8>) -> Vec<u8> {
    String::from_utf8_lossy(&text)
        .replace("include", "includ")
        .into_bytes()
}

#[test]
fn every_input_of_the_corpus_is_printed_or_refused_wherever_it_is_cut() {
    let mut printed = 0;
    for text in corpus() {
        printed += usize::from(print(&text).is_some());
        for cut in 0..text.len().min(3000) {
            print(&text[..cut]);
        }
    }
    assert!(printed >= 8, "only {printed} inputs are taken");
}

/// Words that mean something, between which anything may stand.
fn directive() -> impl Strategy<Value = String> {
    let names = [
        "listen",
        "proxy_pass",
        "set",
        "map",
        "server",
        "upstream",
        "hash",
        "allow",
        "limit_conn",
        "limit_conn_zone",
        "access_log",
        "log_format",
        "proxy_timeout",
        "ssl_preread",
        "resolver",
        "error_log",
        "user",
        "worker_cpu_affinity",
        "default",
        "random",
    ];
    let words = [
        "80",
        "[::1]:80",
        "a",
        "$a",
        "${b}c",
        "$remote_addr",
        "zone=a:1m",
        "zone=a",
        "on",
        "off",
        "10s",
        "1m",
        "weight=2",
        "\"\"",
        "'x y'",
        "~^(a)$",
        "ssl",
        "udp",
        "consistent",
        "unix:/a",
        "\\$",
        "\"\\\"\"",
        "\u{1}",
        "é",
        "${",
        "1001",
        "auto",
        "backup",
        "default",
    ];
    let word = proptest::sample::select(words.to_vec());
    (
        proptest::sample::select(names.to_vec()),
        proptest::collection::vec(word, 0..5),
    )
        .prop_map(|(name, words)| format!("{name} {}", words.join(" ")))
}

fn block() -> impl Strategy<Value = String> {
    let simple = directive().prop_map(|directive| format!("{directive};\n"));
    simple.prop_recursive(3, 40, 8, |inner| {
        let inner = proptest::collection::vec(inner, 0..8);
        (directive(), inner).prop_map(|(directive, inner)| format!("{directive} {{\n{}}}\n", inner.concat()))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_text_is_printed_or_refused(
        which in any::<Index>(),
        changes in proptest::collection::vec((any::<Index>(), 0usize..5, any::<u8>(), any::<Index>()), 0..6),
    ) {
        let corpus = corpus();
        let mut text = corpus[which.index(corpus.len())].clone();
        for (at, how, byte, from) in changes {
            let at = at.index(text.len() + 1);
            match how {
                0 => text.truncate(at),
                1 => text.insert(at, byte),
                2 if at < text.len() => drop(text.remove(at)),
                3 => {
                    let other = &corpus[usize::from(byte) % corpus.len()];
                    let from = from.index(other.len().max(1));
                    let piece = other[from..other.len().min(from + 40)].to_vec();
                    text.splice(at..at, piece);
                }
                _ if at < text.len() => text[at] ^= byte,
                _ => {}
            }
        }
        print(&harmless(text));
    }

    #[test]
    fn any_directives_anywhere_are_printed(inner in proptest::collection::vec(block(), 0..12)) {
        let text = format!("stream {{\n{}}}\n", inner.concat());
        if tree::read_text(Path::new("/nonexistent/nginx.conf"), text.as_bytes()).is_ok() {
            prop_assert!(print(text.as_bytes()).is_some());
        }
    }
}

#[test]
fn of_a_parameter_that_stands_twice_the_last_one_counts() {
    let text = "stream {
        resolver 127.0.0.1 valid=1s ipv4=on valid=2s ipv4=off;
        log_format one $status;
        access_log /log one buffer=1k flush=1s buffer=2k flush=2s;
        match pong { send one; expect one; send two; expect ~ two; }
        upstream group { zone group 64k; server 127.0.0.1:1 weight=1 backup weight=2 backup; }
        server {
            listen 80 so_keepalive=off backlog=1 so_keepalive=on backlog=2;
            proxy_pass group;
            health_check interval=1s port=1 match=pong interval=2s port=2;
        }
    }";
    let page = print(text.as_bytes()).expect("a translation");
    for wanted in [
        r#"{ addresses = ["127.0.0.1"], valid = "2s", ipv4 = false }"#,
        r#"buffer = "2k", flush = "2s" }"#,
        r#"{ send = "two", expect = "~ two", interval = "2s", port = 2 }"#,
        r#"{ address = "127.0.0.1:1", weight = 2, backup = true }"#,
        r#"{ address = "0.0.0.0:80", so_keepalive = true, backlog = 2 }"#,
    ] {
        assert!(page.contains(wanted), "{wanted} is not in\n{page}");
    }
}

#[test]
fn a_server_that_would_be_weaker_than_nginxs_is_a_comment() {
    for line in [
        "deny;",
        "limit_conn nowhere 1;",
        "proxy_ssl on;",
        "js_access a.b;",
        "preread_by_lua_block { ngx.exit(1) }",
        "content_by_lua_file a;",
        "return a;",
        "include /nonexistent;",
    ] {
        let text = format!("stream {{ server {{ listen 80; proxy_pass 127.0.0.1:1; {line} }} }}");
        let printed = print(text.as_bytes()).expect(line);
        assert!(!printed.contains("\n[[server]]"), "{line}: {printed}");
        assert!(printed.contains("\n# [[server]]"), "{line}: {printed}");
        let text = format!("stream {{ server {{ listen 80; proxy_pass 127.0.0.1:1; }} {line} }}");
        let printed = print(text.as_bytes()).expect(line);
        assert!(!printed.contains("\n[[server]]"), "{line}: {printed}");
    }
}

#[test]
fn a_server_without_tls_of_its_own_inherits_everything_else_that_is_lost() {
    for (lines, kept) in [
        ("proxy_ssl on;", true),
        ("proxy_ssl on; deny;", false),
        ("deny; proxy_ssl on;", false),
    ] {
        let text =
            format!("stream {{ {lines} server {{ listen 80; proxy_pass 127.0.0.1:1; proxy_ssl off; }} }}");
        let printed = print(text.as_bytes()).expect(lines);
        assert_eq!(printed.contains("\n[[server]]"), kept, "{lines}: {printed}");
    }
}

#[test]
fn variables_that_change_their_value_on_the_way_are_not_carried_over() {
    for (lines, kept) in [
        ("set $a 127.0.0.1; set $b $a:1;", true),
        ("set $a 127.0.0.1; set $b $a:1; set $a 127.0.0.2;", false),
        ("set $a 127.0.0.1; set $b $a:1; set $A 127.0.0.2;", false),
        ("set $b $a:1; set $a 127.0.0.1;", false),
        ("set $b $b:1;", false),
    ] {
        let text = format!("stream {{ server {{ listen 80; {lines} proxy_pass $b; }} }}");
        let printed = print(text.as_bytes()).expect(lines);
        assert_eq!(printed.contains("\n[[server]]"), kept, "{lines}: {printed}");
    }
}

#[test]
fn masks_are_masks_from_hostnames_on() {
    let text = "stream { map $remote_addr $x { .a one; *.b two; c three; hostnames; .d four; \\.e five; \\default six; } }";
    let printed = print(text.as_bytes()).expect("a translation");
    let values: Vec<&str> = printed.lines().filter(|line| line.starts_with("  ")).collect();
    let expected = [
        r#"  "c three","#,
        r#"  ".d four","#,
        r#"  ".e five","#,
        r#"  "\\default six","#,
        r#"  "~*^\\.a$ one","#,
        r#"  "~*^\\*\\.b$ two","#,
    ];
    assert_eq!(values, expected, "{printed}");
}

#[test]
fn jitter_of_health_checks_is_said_to_be_lost() {
    let text = "stream { upstream u { server 127.0.0.1:1; } server { listen 80; proxy_pass u; health_check jitter=3s; } }";
    let printed = print(text.as_bytes()).expect("a translation");
    assert!(printed.contains("not carried over: of it jitter=3s"), "{printed}");
}

#[test]
fn what_the_check_finds_is_told_at_nginxs_line() {
    let text = "stream {\n server {\n  listen 80;\n  proxy_timeout 5parsecs;\n  proxy_pass nobody;\n }\n server {\n  listen 80;\n  proxy_pass nobody;\n }\n}\n";
    let directives = tree::read_text(Path::new("n.conf"), text.as_bytes()).unwrap();
    let mut document = translate(&directives).unwrap();
    assert!(
        document
            .remarks()
            .iter()
            .all(|remark| remark.level != Level::Lost)
    );
    assert_eq!(examine(&mut document), Vec::<String>::new());
    let lost: Vec<String> = document
        .remarks()
        .into_iter()
        .filter(|remark| remark.level == Level::Lost)
        .map(|r| r.line())
        .collect();
    assert_eq!(lost.len(), 4, "{lost:#?}");
    assert!(
        lost[0].starts_with("n.conf:4: ") && lost[0].contains("unknown unit"),
        "{lost:#?}"
    );
    assert!(
        lost[1].starts_with("n.conf:5: ") && lost[1].contains("no upstream"),
        "{lost:#?}"
    );
    assert!(
        lost[2].contains("0.0.0.0:80 is already taken by server[0].listen at n.conf:3 (")
            && !lost[2].contains("what is printed"),
        "{lost:#?}"
    );
    let page = document.page().text;
    let comment = page
        .lines()
        .position(|line| line.starts_with("# n.conf:4: "))
        .expect("a comment");
    assert!(
        page.lines()
            .nth(comment + 1)
            .unwrap()
            .starts_with("proxy_timeout"),
        "{page}"
    );
}
