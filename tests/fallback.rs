//! Where BPF is not to be had, the program serves all the same by copying, says why once, and counts it.

use std::time::Duration;

use crate::harness::program::{copy_for, need};
use crate::harness::{Bytes, Plan, Upstream, connect, exchange, process};

const UP: u64 = 11;
const DOWN: u64 = 22;
const NOBODY: u32 = 65534;

fn serves_by_copying(plan: Plan, as_user: u32) {
    const SESSIONS: u64 = 12;
    const QUESTION: u64 = 300_000;
    const ANSWER: u64 = 500_000;
    let upstream = Upstream::serve("127.0.0.1", |stream| exchange(stream, DOWN, ANSWER, UP));
    let mut plan = plan.workers(3);
    let front = plan.server(&upstream);
    let proxy = plan.start();
    for worker in proxy.status().workers() {
        let ids = process::field(worker.pid, "Uid");
        assert!(
            ids.split_whitespace().all(|id| id == as_user.to_string()),
            "worker {worker:?} has uids {ids}"
        );
    }

    std::thread::scope(|scope| {
        for _ in 0..SESSIONS {
            scope.spawn(|| exchange(connect(front), UP, QUESTION, DOWN).must_be_whole(ANSWER));
        }
    });
    for _ in 0..SESSIONS {
        upstream.result().must_be_whole(QUESTION);
    }

    let status = proxy.settle();
    let all = Bytes {
        to_upstream: SESSIONS * QUESTION,
        to_downstream: SESSIONS * ANSWER,
    };
    assert_eq!(status.relay(), all);
    assert_eq!(status.sockmap(), Bytes::default());
    assert_eq!(
        status.fallbacks(),
        SESSIONS,
        "every session counts as a fallback: {:#}",
        status.json()
    );

    let log = proxy.log();
    let about: Vec<_> = log
        .lines()
        .filter(|l| l.contains("[warn]") || l.contains("[error]"))
        .collect();
    assert_eq!(
        about.len(),
        1,
        "one line says why the kernel does not forward:\n{log}"
    );
    let line = about[0].to_lowercase();
    assert!(line.contains("bpf"), "the line names BPF: {line}");
    let reason = ["permission", "permitted", "cap_", "capabilit"]
        .iter()
        .any(|word| line.contains(word));
    assert!(reason, "the line says that a right is missing: {line}");
}

#[test]
fn root_without_the_capabilities_for_bpf_serves_by_copying() {
    need("setpriv", "util-linux");
    let launcher = [
        "setpriv",
        "--bounding-set=-bpf,-net_admin,-sys_admin,-perfmon",
        "--",
    ];
    serves_by_copying(Plan::new().launched_by(&launcher), 0);
}

#[test]
fn an_unprivileged_user_is_served_by_copying() {
    need("setpriv", "util-linux");
    let plan = Plan::new();
    let binary = copy_for(NOBODY, &plan);
    let (uid, gid) = (format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"));
    let launcher = ["setpriv", &uid, &gid, "--clear-groups", "--"];
    serves_by_copying(plan.binary(binary).launched_by(&launcher), NOBODY);
}

#[test]
fn the_check_of_a_configuration_says_that_bpf_is_not_to_be_had() {
    need("setpriv", "util-linux");
    let mut plan = Plan::new();
    plan.server("127.0.0.1:1");
    let file = plan.file("proxy.toml");
    std::fs::write(&file, plan.text()).expect("writing the configuration");
    let mut command = std::process::Command::new("setpriv");
    command
        .arg("--bounding-set=-bpf,-net_admin,-sys_admin,-perfmon")
        .arg(env!("CARGO_BIN_EXE_master"));
    command.args(["-t", "-c"]).arg(&file);
    let checked = crate::harness::program::run(command, Duration::from_secs(20));
    let said = format!("{}{}", checked.out, checked.err);
    assert_eq!(
        checked.code,
        Some(0),
        "the file is right, and the program would serve: {said}"
    );
    assert!(
        said.to_lowercase().contains("bpf"),
        "it says what would be missing: {said}"
    );
}
