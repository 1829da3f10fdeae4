//! `conf/seed.toml`: the test configuration of the nginx module that this program replaces, carried
//! over. Its ports are replaced by free ones; everything else is used as it stands.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::harness::pattern::exchange_and_end;
use crate::harness::{
    Bytes, PATIENCE, Plan, Port, Proxy, Upstream, connect, exchange, program, upstream, within,
};

fn seed_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../conf/seed.toml")
}

/// Replaces `key = …` at the top level of the file.
fn with_key(text: &str, key: &str, value: &str) -> String {
    let other = |line: &&str| line.split('=').next().is_none_or(|left| left.trim() != key);
    let kept: Vec<&str> = text.lines().filter(other).collect();
    format!("{key} = {value}\n{}\n", kept.join("\n"))
}

#[test]
fn the_seeds_configuration_is_accepted_as_it_stands() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_master"));
    command.args(["-t", "-c"]).arg(seed_file());
    let checked = program::run(command, Duration::from_secs(20));
    let said = format!("{}{}", checked.out, checked.err);
    assert_eq!(checked.code, Some(0), "{said}");
    assert!(said.contains("test is successful"), "{said}");
}

#[test]
fn the_seeds_configuration_does_what_the_seed_did() {
    let download = Upstream::serve("127.0.0.1", |stream| exchange(stream, 1, 3_000_000, 2));
    let upload = Upstream::serve("127.0.0.1", |stream| exchange(stream, 3, 10, 4));
    let perf = Upstream::serve("127.0.0.1", upstream::echo);

    let mut text = std::fs::read_to_string(seed_file()).expect("reading conf/seed.toml");
    let mut fronts = BTreeMap::new();
    let plan = Plan::new();
    let mut replace = |old: u16, new: u16| {
        let (from, to) = (format!(":{old}\""), format!(":{new}\""));
        assert!(
            text.contains(&from),
            "conf/seed.toml has no address with port {old}:\n{text}"
        );
        text = text.replace(&from, &to);
    };
    for old in [8080u16, 8081, 10000, 10001] {
        let port = Port::claim();
        replace(old, port.number);
        fronts.insert(old, port);
    }
    replace(30001, plan.status_port());
    replace(8000, download.address.port());
    replace(8001, upload.address.port());
    replace(20001, perf.address.port());
    assert!(
        text.contains("$my_servers"),
        "the seed passes port 8080 on through a variable"
    );
    let text = with_key(&text, "pid", &format!("\"{}\"", plan.file("seed.pid").display()));
    let log = plan.file("error.log");
    let text = with_key(
        &text,
        "error_log",
        &format!("{{ path = \"{}\", level = \"debug\" }}", log.display()),
    );
    let file = plan.file("seed.toml");
    std::fs::write(&file, text).expect("writing the configuration");
    let proxy = Proxy::start_file(plan, &file);
    let front = |old: u16| connect(fronts[&old].on("127.0.0.1"));
    assert_eq!(proxy.status().workers().len(), 1);

    exchange(front(8080), 2, 2_000_000, 1).must_be_whole(3_000_000);
    download.result().must_be_whole(2_000_000);
    exchange(front(8081), 4, 2_500_000, 3).must_be_whole(10);
    upload.result().must_be_whole(2_500_000);

    let before = proxy.settle();
    let client = front(10000);
    proxy.wait("the session is offloaded", |s| s.offloaded() == 1);
    exchange_and_end(client, 5, 1_000_000, 5, 1_000_000);
    let offloaded = proxy.settle();
    assert_eq!(
        offloaded.relay(),
        before.relay(),
        "10000 is forwarded in the kernel"
    );
    assert_eq!(
        offloaded.sockmap().to_upstream,
        before.sockmap().to_upstream + 1_000_000
    );

    exchange(front(10001), 6, 1_000_000, 6).must_be_whole(1_000_000);
    let copied = proxy.settle();
    assert_eq!(copied.sockmap(), offloaded.sockmap(), "10001 is copied");
    let Bytes {
        to_upstream,
        to_downstream,
    } = copied.relay();
    let was = offloaded.relay();
    assert_eq!(
        (to_upstream - was.to_upstream, to_downstream - was.to_downstream),
        (1_000_000, 1_000_000)
    );
    let of_10001 = fronts[&10001].number.to_string();
    let mut text = String::new();
    let told = within(PATIENCE, || {
        text = std::fs::read_to_string(&log).expect("the error log");
        text.contains(&of_10001)
    });
    assert!(told, "the error log tells of the session on port 10001:\n{text}");
}
