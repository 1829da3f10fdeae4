//! What master and workers may: the rights that they keep, what each missing one is said to be needed for,
//! and that workers are confined.

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::pattern::ping;
use crate::harness::program::{copy_for, need, run};
use crate::harness::{Plan, Proxy, Upstream, connect, process, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const NOBODY: u32 = 65534;
/// Another user than the one who starts the program.
const OTHER: (&str, &str) = ("daemon", "1");

/// The rights that are of use, by the names that setpriv(1) gives them, with their numbers
/// (linux/capability.h).
const USEFUL: [(&str, u32); 9] = [
    ("bpf", 39),
    ("net_admin", 12),
    ("perfmon", 38),
    ("net_bind_service", 10),
    ("net_raw", 13),
    ("setuid", 7),
    ("setgid", 6),
    ("setpcap", 8),
    ("kill", 5),
];
const SYS_RESOURCE: u32 = 24;

fn mask() -> u64 {
    let numbers = USEFUL.iter().map(|(_, number)| number).chain(&[SYS_RESOURCE]);
    numbers.fold(0, |mask, number| mask | 1 << number)
}

fn capabilities(pid: i32, set: &str) -> u64 {
    u64::from_str_radix(&process::field(pid, set), 16).expect("a set of capabilities")
}

/// A plan to be started by an ordinary user who has all useful rights but `left_out`.
fn as_user_without(left_out: &str) -> Plan {
    need("setpriv", "util-linux");
    let plan = Plan::new();
    let binary = copy_for(NOBODY, &plan);
    let held: Vec<String> = USEFUL
        .iter()
        .filter(|(name, _)| *name != left_out)
        .map(|(name, _)| format!("+{name}"))
        .collect();
    let held = held.join(",");
    let launcher = [
        "setpriv",
        &format!("--reuid={NOBODY}"),
        &format!("--regid={NOBODY}"),
        "--clear-groups",
        &format!("--inh-caps={held}"),
        &format!("--ambient-caps={held}"),
        "--",
    ];
    plan.binary(binary).launched_by(&launcher)
}

/// As the start of a plan by an ordinary user who has no right but those of the file that is started.
fn as_user_with_a_file_that_has_rights() -> Plan {
    need("setcap", "libcap2-bin");
    let plan = as_user_without("nothing");
    let launcher = &plan.launcher()[..4].to_vec();
    let launcher: Vec<&str> = launcher.iter().map(String::as_str).collect();
    let plan = plan.launched_by(&launcher);
    give_rights(&plan.file("master"));
    plan
}

fn give_rights(file: &Path) {
    let names: Vec<String> = USEFUL.iter().map(|(name, _)| format!("cap_{name}")).collect();
    let mut command = Command::new("setcap");
    command.arg(format!("{}=ep", names.join(","))).arg(file);
    run(command, Duration::from_secs(10)).must_succeed("setcap");
}

/// Puts a new copy of the binary in the place of the one that runs, and asks the master to become it.
fn begin_upgrade(proxy: &Proxy, prepare: impl FnOnce(&Path)) {
    let (binary, new) = (proxy.dir().join("master"), proxy.dir().join("new"));
    crate::harness::program::copy(env!("CARGO_BIN_EXE_master"), &new);
    prepare(&new);
    std::fs::rename(&new, &binary).expect("putting the new binary in its place");
    assert_ne!(process::executable(proxy.pid()), binary, "the old binary runs");
    proxy.signal(Signal::SIGUSR2);
}

/// Waits until the master is the new binary, with the rights that it had, and the session went on.
#[track_caller]
fn assert_upgraded(proxy: &Proxy, client: &mut TcpStream, workers: &[i32], rights: u64) {
    let binary = proxy.dir().join("master");
    assert!(
        within(Duration::from_secs(15), || process::executable(proxy.pid())
            == binary),
        "the master still is the old binary:\n{}",
        proxy.log()
    );
    proxy.wait("new workers serve, and have the session", |s| {
        let mut now = s.workers().into_iter();
        now.all(|w| !workers.contains(&w.pid)) && s.offloaded() == 1
    });
    ping(client, 2, 3).expect("the session after the upgrade");
    assert_eq!(capabilities(proxy.pid(), "CapEff"), rights);
    proxy.reload();
    ping(client, 3, 3).expect("the session after a reload");
}

#[test]
fn a_master_that_is_no_root_can_be_upgraded_with_ambient_rights() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = as_user_without("nothing").global(&format!("user = \"{}\"", OTHER.0));
    let front = plan.server(&echo);
    let proxy = plan.start();
    let mut client = connect(front);
    ping(&mut client, 1, 3).expect("a session");
    let rights = capabilities(proxy.pid(), "CapEff");
    let workers = [proxy.worker()];
    begin_upgrade(&proxy, |_| {});
    assert_upgraded(&proxy, &mut client, &workers, rights);
}

#[test]
fn a_master_that_has_the_rights_of_its_file_becomes_no_file_without_them() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = as_user_with_a_file_that_has_rights();
    let front = plan.server(&echo);
    let proxy = plan.start();
    let mut client = connect(front);
    ping(&mut client, 1, 3).expect("a session");
    proxy.wait("the session is offloaded", |s| s.offloaded() == 1);
    let rights = capabilities(proxy.pid(), "CapEff");
    assert_eq!(rights, mask() & !(1 << SYS_RESOURCE));
    let worker = proxy.worker();

    begin_upgrade(&proxy, |_| {});
    assert!(
        within(Duration::from_secs(15), || proxy.log().contains("upgrade to ")
            && proxy.log().contains(" refused")),
        "{}",
        proxy.log()
    );
    assert!(
        proxy.log().contains("it would run without CAP_BPF, "),
        "{}",
        proxy.log()
    );
    assert_eq!(proxy.worker(), worker, "nothing has changed");

    begin_upgrade(&proxy, give_rights);
    assert_upgraded(&proxy, &mut client, &[worker], rights);
}

/// The rights that the log says are missing.
fn named(log: &str) -> BTreeSet<String> {
    let words = log.split(|letter: char| !letter.is_ascii_uppercase() && letter != '_');
    words
        .filter(|word| word.starts_with("CAP_"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn a_master_started_as_root_keeps_only_the_rights_that_it_uses_and_can_reload_with_them() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2).global("user = \"nobody\"");
    let front = plan.server(&echo);
    let proxy = plan.start();
    for set in ["CapPrm", "CapEff", "CapInh", "CapAmb", "CapBnd"] {
        let held = capabilities(proxy.pid(), set);
        assert_eq!(held & !mask(), 0, "{set} of the master is {held:#x}");
    }
    assert_eq!(capabilities(proxy.pid(), "CapEff") | 1 << SYS_RESOURCE, mask());
    assert_eq!(process::field(proxy.pid(), "NoNewPrivs"), "1");
    let generation = proxy.status().generation();
    // Other maps, another worker: all of it is made anew.
    let text = std::fs::read_to_string(proxy.file()).expect("the configuration");
    let text = text.replace(
        "worker_processes = 2",
        "worker_processes = 3\nworker_connections = 99",
    );
    std::fs::write(proxy.file(), text).expect("writing the configuration");
    proxy.signal(Signal::SIGHUP);
    proxy.wait("the generation has changed", |s| {
        s.generation() > generation && s.workers().len() == 3
    });
    let mut client = connect(front);
    ping(&mut client, 1, 3).expect("a session");
    proxy.wait("the session is offloaded", |s| s.offloaded() == 1);
}

#[test]
fn every_thread_of_a_worker_is_confined() {
    let mut plan = Plan::new().workers(2);
    plan.server("127.0.0.1:1");
    let proxy = plan.start();
    let status = proxy.status();
    assert_eq!(
        status.json()["confinement"]["seccomp"],
        true,
        "{:#}",
        status.json()
    );
    assert!(
        status.json()["confinement"]["landlock"].as_i64() >= Some(1),
        "{:#}",
        status.json()
    );
    for worker in status.workers() {
        let tasks: Vec<_> = std::fs::read_dir(format!("/proc/{}/task", worker.pid))
            .expect("the threads of a worker")
            .map(|task| task.expect("a thread").path().join("status"))
            .collect();
        assert!(tasks.len() >= 2, "a worker has its log writer besides: {tasks:?}");
        for task in tasks {
            let text = std::fs::read_to_string(&task).expect("the state of a thread");
            assert!(text.contains("\nSeccomp:\t2\n"), "{}: {text}", task.display());
        }
    }
    assert_eq!(process::field(proxy.pid(), "Seccomp"), "0", "the master is not");
}

#[test]
fn an_ordinary_user_with_the_rights_forwards_in_the_kernel() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = as_user_without("nothing")
        .workers(2)
        .global(&format!("user = \"{}\"", OTHER.0));
    let front = plan.server(&echo);
    let proxy = plan.start();
    let mut client = connect(front);
    ping(&mut client, 1, 3).expect("a session");
    proxy.wait("the session is offloaded", |s| s.offloaded() == 1);
    assert_eq!(named(&proxy.log()), BTreeSet::new(), "{}", proxy.log());
    for worker in proxy.status().workers() {
        let ids = process::field(worker.pid, "Uid");
        assert!(ids.split_whitespace().all(|id| id == OTHER.1), "uids {ids}");
        assert_eq!(
            capabilities(worker.pid, "CapPrm") | capabilities(worker.pid, "CapBnd"),
            0
        );
    }
}

#[test]
fn each_right_that_the_data_path_lacks_is_named_and_sessions_are_copied() {
    for (left_out, name) in [
        ("bpf", "CAP_BPF"),
        ("net_admin", "CAP_NET_ADMIN"),
        ("perfmon", "CAP_PERFMON"),
    ] {
        let mut plan = as_user_without(left_out);
        plan.server("127.0.0.1:1");
        let proxy = plan.start();
        let log = proxy.log();
        let line = log
            .lines()
            .find(|line| line.contains("[warn]"))
            .expect("a warning");
        assert!(
            line.contains(&format!("{name} is missing, which ")),
            "without {left_out}: {line}"
        );
        for (_, other) in [("", "CAP_BPF"), ("", "CAP_NET_ADMIN"), ("", "CAP_PERFMON")] {
            let said = line.contains(&format!("{other} is missing"));
            assert_eq!(said, other == name, "without {left_out}: {line}");
        }
        let status = proxy.status();
        assert_eq!(status.json()["datapath"], "relay");
        let reason = status.json()["datapath_reason"].as_str().unwrap_or_default();
        assert!(reason.starts_with(name), "{reason}");
    }
}

#[test]
fn each_right_that_workers_need_is_named_where_the_configuration_would_use_it() {
    for (left_out, name, level, words) in [
        ("setuid", "CAP_SETUID", "[warn]", "is ignored"),
        ("setgid", "CAP_SETGID", "[warn]", "is ignored"),
        ("setpcap", "CAP_SETPCAP", "[info]", "bounding set"),
        ("kill", "CAP_KILL", "[info]", "killed by root"),
    ] {
        let mut plan = as_user_without(left_out).global(&format!("user = \"{}\"", OTHER.0));
        plan.server("127.0.0.1:1");
        let proxy = plan.start();
        let log = proxy.log();
        assert_eq!(
            named(&log),
            BTreeSet::from([name.to_owned()]),
            "without {left_out}:\n{log}"
        );
        let line = log.lines().find(|line| line.contains(name)).expect("a line");
        assert!(
            line.contains(level) && line.contains(words),
            "without {left_out}: {line}"
        );
    }
}

#[test]
fn a_worker_that_is_ended_for_a_forbidden_call_is_replaced_and_the_log_says_so() {
    let mut plan = Plan::new();
    plan.server("127.0.0.1:1");
    let proxy = plan.start();
    let worker = proxy.worker();
    // What seccomp sends.
    kill(Pid::from_raw(worker), Signal::SIGSYS).expect("killing the worker");
    proxy.wait("the worker is replaced", |s| {
        s.workers().iter().all(|w| w.pid != worker)
    });
    let words = format!("worker 0 (process {worker}) was killed for a system call that no worker makes");
    assert!(proxy.log().contains(&words), "{}", proxy.log());
}

/// What a start that must fail says.
fn fails(plan: &Plan, launcher: &[String], text: String) -> String {
    let file = plan.file("proxy.toml");
    std::fs::write(&file, text).expect("writing the configuration");
    let mut command = Command::new(&launcher[0]);
    command
        .args(&launcher[1..])
        .arg(plan.file("master"))
        .arg("-c")
        .arg(&file);
    let finished = run(command, Duration::from_secs(20));
    assert_eq!(finished.code, Some(1), "{finished:?}");
    finished.err
}

#[test]
fn a_low_port_without_the_right_for_it_is_refused_with_its_name() {
    let plan = as_user_without("net_bind_service")
        .tables("[[server]]\nlisten = \"127.0.0.1:987\"\nproxy_pass = \"127.0.0.1:1\"\n");
    let said = fails(&plan, plan.launcher(), plan.text());
    assert!(
        said.contains("failed to bind 127.0.0.1:987: permission denied"),
        "{said}"
    );
    assert!(said.contains("CAP_NET_BIND_SERVICE"), "{said}");
}

#[test]
fn a_descriptor_limit_that_cannot_be_raised_is_refused_with_what_would_help() {
    need("prlimit", "util-linux");
    let plan = as_user_without("nothing").global("worker_connections = 5000");
    let mut launcher = vec![
        "prlimit".to_owned(),
        "--nofile=1000:1000".to_owned(),
        "--".to_owned(),
    ];
    launcher.extend(plan.launcher().iter().cloned());
    let said = fails(&plan, &launcher, plan.text());
    assert!(said.contains("worker_connections = 5000 needs 10"), "{said}");
    assert!(
        said.contains("the limit is 1000: lower worker_connections to at most "),
        "{said}"
    );
    assert!(
        said.contains("LimitNOFILE=") && said.contains("CAP_SYS_RESOURCE"),
        "{said}"
    );
}

#[test]
fn the_version_says_which_rights_are_missing_and_what_confines_workers() {
    let plan = as_user_without("perfmon");
    let launcher = plan.launcher();
    let mut command = Command::new(&launcher[0]);
    command.args(&launcher[1..]).arg(plan.file("master")).arg("-V");
    let said = run(command, Duration::from_secs(20)).must_succeed("-V");
    let rights: Vec<_> = said.lines().filter(|line| line.starts_with("rights: ")).collect();
    assert_eq!(rights.len(), 2, "{said}");
    assert!(
        rights[0].starts_with("rights: CAP_PERFMON is missing, which "),
        "{said}"
    );
    assert!(
        rights[1].starts_with("rights: CAP_SYS_RESOURCE is missing, which "),
        "{said}"
    );
    assert!(
        said.contains("workers are confined by seccomp, landlock "),
        "{said}"
    );
}
