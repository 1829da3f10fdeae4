//! What is said about wrong configurations: everything at once, in file order, each error once.

use super::*;

#[test]
fn all_errors_come_at_once_in_file_order() {
    let found = errors(
        "worker_processes = 0\nuser = \"who\"\n[stream]\nproxy_timeout = \"10min\"\nlimit_rate = \"1m\"\n\
         [[server]]\nlisten = \"0.0.0.0:80\"\nproxy_pass = \"nowhere\"\n\
         [[server]]\nlisten = [80]\nebpf_status_return = true\nproxy_pass = \"127.0.0.1:1\"\n",
    );
    let starts = [
        "a.toml:1:20: worker_processes: out of range (0), allowed: \"auto\", or a whole number from 1 to 256",
        "a.toml:2:8: user: unknown user (\"who\"), ",
        "a.toml:4:17: stream.proxy_timeout: unknown unit \"min\" (\"10min\"), allowed: 1ms to 365d, ",
        "a.toml:5:1: stream.limit_rate: unknown key, known here: ",
        "a.toml:8:14: server[0].proxy_pass: there is no upstream \"nowhere\" (\"nowhere\"), ",
        "a.toml:10:11: server[1].listen[0]: 0.0.0.0:80 is already taken by server[0].listen at ",
        "a.toml:12:14: server[1].proxy_pass: the server has ebpf_status_return = true (\"127.0.0.1:1\"), ",
    ];
    assert_eq!(found.len(), starts.len(), "{found:#?}");
    for (line, start) in found.iter().zip(starts) {
        assert!(line.starts_with(start), "{line}\nshould start with\n{start}");
        assert!(!line.contains('\n'), "{line}");
    }
}

#[test]
fn one_wrong_value_gives_one_error() {
    let server = |keys: &str| errors(&format!("[[server]]\n{keys}"));
    assert_eq!(server("listen = 1\nproxy_pass = \"\"").len(), 1);
    assert_eq!(server("listen = 1\nproxy_pass = 5").len(), 1);
    assert_eq!(
        server("listen = 1\nproxy_pass = \"$a\"\nset = { a = \"$b\" }").len(),
        1
    );
    assert_eq!(
        server("listen = 1\nproxy_pass = \"$a\"\nset = { a = \"$a\" }").len(),
        1
    );
    assert_eq!(
        server("listen = 1\nproxy_pass = \"$a\"\nset = { a = 1 }").len(),
        1
    );
    assert_eq!(server("listen = 1\nebpf_status_return = 1").len(), 1);
    assert_eq!(
        server("listen = { backlog = 1 }\nebpf_status_return = true").len(),
        1
    );
    assert_eq!(errors("server = 5").len(), 1);
    assert_eq!(errors("[server]\nlisten = 1").len(), 1);
    assert_eq!(
        errors("stream = 5\n[[server]]\nlisten = 1\nebpf_status_return = true").len(),
        1
    );
    assert_eq!(errors("").len(), 1);
}

#[test]
fn a_wrong_override_names_its_place() {
    let world = Fake {
        environment: [("CULVERT_WORKER_PROCESES", "2"), ("CULVERT_PID", "")].into(),
    };
    let set = [
        "worker_processes=0",
        "server[1].listen=80",
        "server.listen=80",
        "stream=5",
        "include=a",
        "worker_connections.x=1",
        "server[x]=1",
        "server[-1].listen=80",
        "server[4000000000].listen=80",
        "nothing",
        "server[0].set.a=$b",
        "server[0].set.a.b=x",
    ];
    let found = load_with(&world, &Directory::new(), SERVER, &set).expect_err("wrong");
    let starts = [
        "CULVERT_PID: pid: empty (\"\"), ",
        "CULVERT_WORKER_PROCESES: worker_proceses: unknown key, did you mean \"worker_processes\"?",
        "--set: nothing: no value, write --set KEY=VALUE",
        "--set: worker_processes: out of range (\"0\"), ",
        "--set: server[1].listen: there are 1 entries, counted from 0",
        "--set: server.listen: unknown key, say which one: server[0].listen",
        "--set: stream: a table, override one of its keys",
        "--set: include: cannot be overridden, it belongs to a file",
        "--set: worker_connections.x: unknown key, worker_connections has no keys",
        "--set: server[x]: unknown key, write for example server[0].listen",
        "--set: server[-1].listen: unknown key, write for example server[0].listen",
        "--set: server[4000000000].listen: there are 1 entries, counted from 0",
        "--set: server[0].set.a: variable $b is not defined (\"$b\"), ",
        "--set: server[0].set.a.b: unknown key, server[0].set.a has no keys",
    ];
    assert_eq!(found.len(), starts.len(), "{found:#?}");
    for start in starts {
        assert!(
            found.iter().any(|line| line.starts_with(start)),
            "{start}\nis missing in {found:#?}"
        );
    }
}

#[test]
fn errors_of_included_files_name_the_file() {
    let directory = Directory::new();
    directory.file(
        "b.toml",
        "include = \"a.toml\"\nuser = \"web\"\n[[server]]\nlisten = 8080\nproxy_pass = \"nowhere\"",
    );
    let text = format!("include = [\"b.toml\", \"b.toml\", \"c.toml\"]\nuser = \"web\"\n{SERVER}");
    let found = load_with(&Fake::default(), &directory, &text, &[]).expect_err("wrong");
    let starts = [
        "a.toml:1:22: include[1]: b.toml has been read already (\"b.toml\"), ",
        "a.toml:1:32: include[2]: no such file: c.toml (\"c.toml\"), ",
        "b.toml:1:11: include: a.toml has been read already (\"a.toml\"), ",
        "b.toml:2:8: user: already set at a.toml:2:8 (\"web\"), ",
        "b.toml:4:10: server[1].listen: 0.0.0.0:8080 is already taken by server[0].listen at a.toml:4:10 (8080), ",
        "b.toml:5:14: server[1].proxy_pass: there is no upstream \"nowhere\" ",
    ];
    assert_eq!(found.len(), starts.len(), "{found:#?}");
    for (line, start) in found.iter().zip(starts) {
        assert!(line.starts_with(start), "{line}\nshould start with\n{start}");
    }

    directory.file("b.toml", "a = = 1");
    let found = load_with(&Fake::default(), &directory, "include = \"b.toml\"", &[]).expect_err("wrong");
    assert!(
        found.iter().all(|line| line.starts_with("b.toml:1:")),
        "{found:#?}"
    );
}

#[test]
fn a_file_that_is_not_there_or_not_text_is_one_error() {
    let directory = Directory::new();
    let path = directory.0.join("none.toml");
    let found = load_in(&Fake::default(), &path, &[]).expect_err("no file");
    assert_eq!(found.len(), 1);
    assert!(
        found[0]
            .to_string()
            .ends_with("none.toml: cannot be read: No such file or directory (os error 2)")
    );
    std::fs::write(&path, b"user = 1\npid = \"\xff\"").expect("written");
    let found = load_in(&Fake::default(), &path, &[]).expect_err("not text");
    assert!(
        found[0]
            .to_string()
            .ends_with("none.toml:2:8: not valid UTF-8, write the file in that encoding"),
        "{found:?}"
    );
}

#[test]
fn each_server_that_leads_nowhere_is_told() {
    for wrong in ["nowhere", "nothing:80", "127.0.0.1:99999"] {
        let server = |port: u16| format!("[[server]]\nlisten = {port}\nproxy_pass = \"{wrong}\"\n");
        let found = errors(&[server(1), server(2), server(3)].concat());
        assert_eq!(found.len(), 3, "{found:#?}");
        assert!(
            found[2].starts_with("a.toml:9:14: server[2].proxy_pass: "),
            "{found:#?}"
        );
    }
}

#[test]
fn a_misspelt_key_does_not_count_as_missing() {
    assert_eq!(errors("[[server]]\nlistn = 1\nproxy_pas = \"x\"").len(), 2);
}

#[test]
fn a_wrong_value_in_set_is_blamed_once_wherever_it_is_used() {
    let set = |set: &str| {
        errors(&format!(
            "[[server]]\nlisten = 1\nproxy_pass = \"$a:80\"\nset = {{ {set} }}"
        ))
    };
    let circle = set("a = \"x$b\", b = \"$c\", c = \"$a\"");
    assert_eq!(circle.len(), 1, "{circle:#?}");
    assert!(
        circle[0].contains("variables in a circle: $a → $b → $c → $a (\"$a\"), "),
        "{circle:#?}"
    );
    let undefined = set("a = \"$b\", b = \"$none\"");
    assert_eq!(undefined.len(), 1, "{undefined:#?}");
    assert!(
        undefined[0].contains("server[0].set.b: variable $none is not defined"),
        "{undefined:#?}"
    );
    assert_eq!(set("a = \"1\", \"$b\" = \"$\"").len(), 1);
    assert_eq!(set("a = \"1\", \"\" = \"$\"").len(), 1);
    assert_eq!(set("a = \"1\", remote_addr = \"$\"").len(), 1);
}

#[test]
fn what_a_pattern_names_and_cannot_be_read_is_not_left_out_in_silence() {
    let directory = Directory::new();
    directory.file("conf.d/sub.toml/a", "");
    directory.file(
        "conf.d/a.toml",
        "[[server]]\nlisten = 2\nproxy_pass = \"127.0.0.1:80\"",
    );
    std::os::unix::fs::symlink("/nonexistent/b.toml", directory.0.join("conf.d/b.toml")).expect("a symlink");
    let text =
        format!("include = [\"conf.d/*.toml\", \"conf.d\", \"/dev/null\", \"conf.d/a.toml/b\"]\n{SERVER}");
    let found = load_with(&Fake::default(), &directory, &text, &[]).expect_err("wrong");
    let starts = [
        "a.toml:1:12: include[0]: no such file: conf.d/b.toml (\"conf.d/*.toml\"), ",
        "a.toml:1:12: include[0]: a directory: conf.d/sub.toml (\"conf.d/*.toml\"), ",
        "a.toml:1:29: include[1]: a directory: conf.d (\"conf.d\"), ",
        "a.toml:1:39: include[2]: not a file: /dev/null (\"/dev/null\"), ",
        "a.toml:1:52: include[3]: conf.d/a.toml/b cannot be read: Not a directory (os error 20) (",
    ];
    assert_eq!(found.len(), starts.len(), "{found:#?}");
    for (line, start) in found.iter().zip(starts) {
        assert!(line.starts_with(start), "{line}\nshould start with\n{start}");
    }
}

#[test]
fn a_file_without_an_end_is_not_read_to_it() {
    let found = load_in(&Fake::default(), Path::new("/dev/zero"), &[]).expect_err("no configuration");
    assert_eq!(
        found[0].to_string(),
        "/dev/zero: cannot be read: larger than 16 MiB"
    );
}

/// Where each is looked up takes the same time wherever it stands, on lines of its own and on one line.
#[test]
fn a_configuration_of_tens_of_thousands_of_values_is_read_in_a_moment() {
    for end in ["\n", " "] {
        let lines: String = (0..40_000).map(|n| format!("\"n{n}.example x\",{end}")).collect();
        let text = format!(
            "{SERVER}[[map]]\nsource = \"$remote_addr\"\nvariable = \"$x\"\nvalues = [{end}{lines}5]"
        );
        let begun = std::time::Instant::now();
        let found = errors(&text);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        let place = match end {
            "\n" => "a.toml:40008:1: map[0].values[40000]: ".to_owned(),
            _ => format!("a.toml:7:{}: map[0].values[40000]: ", lines.len() + 12),
        };
        assert!(found[0].starts_with(&place), "{found:?}");
        assert_eq!(found.len(), 1, "{found:?}");
    }
}

#[test]
fn there_are_no_more_listeners_upstreams_and_peers_than_can_be_counted() {
    let found =
        errors("[[server]]\nlisten = [\"1-1024\", \"2000-3000\", 4000]\nproxy_pass = \"127.0.0.1:80\"");
    let start =
        "a.toml:2:21: server[0].listen[1]: with it there are more than 1024 listeners (\"2000-3000\"), ";
    assert!(found[0].starts_with(start), "{found:?}");
    assert_eq!(found.len(), 2, "{found:?}");

    let peers: Vec<String> = (0..4096)
        .map(|n| format!("\"10.0.{}.{}:80\"", n / 256, n % 256))
        .collect();
    let group = format!("[[upstream]]\nname = \"u\"\nserver = [{}]\n", peers.join(","));
    assert_eq!(errors(&format!("{group}{SERVER}")).len(), 1);
    let found = errors(&format!("{group}{SERVER}"));
    let start =
        "a.toml:6:14: server[0].proxy_pass: with it there are more than 4096 peers (\"127.0.0.1:80\"), ";
    assert!(found[0].starts_with(start), "{found:?}");

    let groups: String = (0..1025)
        .map(|n| format!("[[upstream]]\nname = \"u{n}\"\nserver = \"127.0.0.1:80\"\n"))
        .collect();
    let found = errors(&format!(
        "{groups}[[server]]\nlisten = 1\nebpf_status_return = true"
    ));
    let start = "a.toml:3075:10: upstream[1024].server: with it there are more than 1024 upstreams (";
    assert!(found[0].starts_with(start), "{found:?}");
    assert_eq!(found.len(), 1, "{found:?}");
}
