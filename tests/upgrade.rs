//! USR2: the master becomes the program that now stands where it was started from. The process stays, nobody is cut
//! off, and a program that cannot take over changes nothing.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::harness::dns::DnsServer;
use crate::harness::greeter::{greeter_on, seed};
use crate::harness::load::{Load, Sizes};
use crate::harness::pattern::{pause, ping};
use crate::harness::program::{need, run};
use crate::harness::{PATIENCE, Plan, Port, Proxy, Upstream, connect, process, within};
use nix::sys::signal::Signal;

/// An upgrade is through, or refused, in this time.
const SOON: Duration = PATIENCE;

/// Puts a program where another one stands, as a package manager does: the old one's file lives on without a name.
fn install(at: &Path, what: impl FnOnce(&Path)) {
    let new = at.with_extension("new");
    let _ = std::fs::remove_file(&new);
    what(&new);
    std::fs::rename(&new, at).expect("putting the new program in its place");
}

fn good(at: &Path) {
    crate::harness::program::copy(env!("CARGO_BIN_EXE_master"), at);
}

fn script(at: &Path, text: &str) {
    place(at, format!("#!/bin/sh\n{text}\n").as_bytes());
}

/// Writes a program that is to be run at once; see `harness::program::copy` for why another process does it.
fn place(at: &Path, content: &[u8]) {
    let draft = at.with_extension("draft");
    std::fs::write(&draft, content).expect("writing a program");
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).expect("making it executable");
    crate::harness::program::copy(&draft.display().to_string(), at);
    std::fs::remove_file(&draft).expect("removing the draft");
}

/// A plan that starts its own copy of the binary.
fn with_own_binary(plan: Plan) -> (Plan, PathBuf) {
    let binary = plan.file("culvert");
    good(&binary);
    (plan.binary(binary.clone()), binary)
}

/// The workers that serve; one that has just left may still be listed beside them.
fn pids(proxy: &Proxy) -> Vec<i32> {
    let workers = proxy.status().workers();
    workers.iter().filter(|w| !w.draining).map(|w| w.pid).collect()
}

/// Upgrades to a new copy, and waits until it has taken over.
#[track_caller]
fn upgrade(proxy: &Proxy, binary: &Path) {
    install(binary, good);
    assert_ne!(process::executable(proxy.pid()), binary, "the old program runs");
    let old = pids(proxy);
    proxy.signal(Signal::SIGUSR2);
    assert!(
        within(SOON, || process::executable(proxy.pid()) == binary),
        "the master still is the old program; its log:\n{}",
        proxy.log()
    );
    proxy.wait("new workers serve", |s| {
        let workers = s.workers();
        let serving = || workers.iter().filter(|w| !w.draining);
        serving().count() == old.len() && serving().all(|w| !old.contains(&w.pid))
    });
    assert!(
        within(Duration::from_secs(10), || !old
            .iter()
            .any(|&w| process::is_alive(w))),
        "workers of the old program live on: {old:?}"
    );
}

#[test]
fn an_upgrade_under_load_keeps_the_process_and_breaks_nothing() {
    let sizes = Sizes::get();
    let (plan, binary) = with_own_binary(Plan::new().workers(2));
    let mut plan = plan
        .lifetime(sizes.lifetime())
        .global("error_log = { path = \"stderr\", level = \"warn\" }")
        .global("worker_connections = 2048");
    let mut load = Load::new(&mut plan, sizes);
    let proxy = plan.start();
    load.begin(&proxy);
    load.churn(10, 6);
    load.meanwhile(Duration::from_millis(1500), || upgrade(&proxy, &binary));
    let file = std::fs::read_to_string(proxy.dir().join("master.pid")).expect("the pid file");
    assert_eq!(
        file.trim(),
        proxy.pid().to_string(),
        "the pid file after an upgrade"
    );
    load.finish(&proxy, "upgrades");
}

#[test]
fn an_upgraded_master_still_reloads_replaces_workers_and_stops() {
    let echo = Upstream::echo("127.0.0.1");
    let (plan, binary) = with_own_binary(Plan::new().workers(2));
    let mut plan = plan;
    let front = plan.server(&echo);
    let proxy = plan.start();
    let mut client = connect(front);
    ping(&mut client, 1, 3).expect("a session before");
    pause(2200);
    let before = proxy.status();
    upgrade(&proxy, &binary);
    let after = proxy.status();
    assert!(
        after.number("/sessions/total") >= before.number("/sessions/total"),
        "a counter fell"
    );
    assert!(after.sockmap().sum() >= before.sockmap().sum(), "a counter fell");
    let uptimes = [&before, &after].map(|status| status.number("/uptime_seconds"));
    assert!(
        uptimes[0] >= 2 && uptimes[1] >= uptimes[0] && uptimes[1] < 100,
        "{uptimes:?}"
    );
    proxy.wait("the session is counted once", |s| s.active() == 1);
    ping(&mut client, 2, 3).expect("the session after the upgrade");

    proxy.reload();
    ping(&mut client, 3, 3).expect("the session after a reload");
    proxy.wait("the old workers are gone", |s| s.workers().len() == 2);
    for worker in pids(&proxy) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker), Signal::SIGKILL)
            .expect("killing a worker");
    }
    proxy.wait("the workers are replaced", |s| s.number("/worker_restarts") == 2);
    ping(&mut client, 4, 3).expect("the session after its worker was killed");
    ping(&mut connect(front), 5, 3).expect("a new session");
    upgrade(&proxy, &binary);
    ping(&mut client, 6, 3).expect("the session after the second upgrade");
    let relayed = proxy.status().relay().sum();
    assert_eq!(relayed, 0, "user space has copied bytes");
    drop(client);
    assert_eq!(proxy.settle().sockmap().sum(), 2 * 24 * 3 * 6);
}

#[test]
fn an_upgrade_may_take_listeners_away_and_bring_others() {
    let echo = Upstream::echo("127.0.0.1");
    let (plan, binary) = with_own_binary(Plan::new().workers(2));
    let mut plan = plan;
    let (stays, goes) = (plan.server(&echo), plan.server(&echo));
    let new = Port::claim();
    let proxy = plan.start();
    let mut client = connect(goes);
    ping(&mut client, 1, 3).expect("a session before");
    let comes = new.on("127.0.0.1");
    proxy.edit(&goes.to_string(), &comes.to_string());
    upgrade(&proxy, &binary);
    assert_eq!(proxy.status().json()["accept"], "cpu");
    for front in [stays, comes] {
        ping(&mut connect(front), 2, 3).expect("a new session");
    }
    ping(&mut client, 3, 3).expect("the session of the listener that is gone");
    assert!(
        crate::harness::sockets::try_connect(goes).is_err(),
        "nobody listens there"
    );
}

#[test]
fn a_program_that_cannot_take_over_is_refused_and_the_old_one_goes_on() {
    let echo = Upstream::echo("127.0.0.1");
    let (plan, binary) = with_own_binary(Plan::new().workers(2));
    let mut plan = plan;
    let front = plan.server(&echo);
    let proxy = plan.start();
    let mut client = connect(front);
    ping(&mut client, 1, 3).expect("a session before");
    let old = pids(&proxy);
    let generation = proxy.status().generation();

    type Install = fn(&Path);
    let bad: [(&str, Install); 6] = [
        ("a program that fails", |at| script(at, "exit 1")),
        ("a program that does nothing, successfully", |at| {
            script(at, "exit 0")
        }),
        ("a program that hangs", |at| script(at, "exec sleep 30")),
        ("a file that is no program", |at| {
            std::fs::write(at, "not a program").expect("writing a file")
        }),
        ("an empty file that may be run", |at| {
            std::fs::write(at, "").expect("writing a file");
            std::fs::set_permissions(at, std::fs::Permissions::from_mode(0o755)).expect("its mode");
        }),
        ("another program", |at| {
            crate::harness::program::copy("/bin/true", at);
        }),
    ];
    let name = binary.display().to_string();
    for (what, new) in bad {
        install(&binary, new);
        let lines = proxy.log().lines().count();
        proxy.signal(Signal::SIGUSR2);
        let refused = within(SOON, || {
            let log = proxy.log();
            let mut fresh = log.lines().skip(lines);
            fresh.any(|line| line.contains("[error]") && line.contains(&name))
        });
        assert!(
            refused,
            "{what}: no error names {name}; the log:\n{}",
            proxy.log()
        );
        assert_ne!(process::executable(proxy.pid()), binary, "{what}");
        assert_eq!(pids(&proxy), old, "{what}: the workers");
        assert_eq!(proxy.status().generation(), generation, "{what}");
        ping(&mut client, 2, 3).expect("the old session");
        ping(&mut connect(front), 3, 3).expect("a new session");
        proxy.wait("one session is left", |s| s.active() == 1);
        let mut children = Vec::new();
        let alone = within(SOON, || {
            children = process::children(proxy.pid());
            children.len() == 2
        });
        assert!(alone, "{what}: processes beside the workers: {children:?}");
    }

    std::fs::remove_file(&binary).expect("removing the program");
    proxy.signal(Signal::SIGUSR2);
    pause(500);
    ping(&mut client, 4, 3).expect("the old session when no program is there");
    assert_eq!(pids(&proxy), old);

    upgrade(&proxy, &binary);
    ping(&mut client, 5, 3).expect("the session after an upgrade at last");
}

#[test]
fn a_program_that_has_much_to_say_against_an_upgrade_is_heard() {
    let (plan, binary) = with_own_binary(Plan::new());
    let proxy = plan.start();
    let wrong: String = (0..2000).map(|n| format!("nonsense_{n} = 1\n")).collect();
    proxy.edit(
        "worker_processes = 1\n",
        &format!("worker_processes = 1\n{wrong}"),
    );
    install(&binary, good);
    proxy.signal(Signal::SIGUSR2);
    proxy.wait("it is refused", |s| s.number("/reloads/failed") == 1);
    let why = "the configuration has errors: ";
    proxy.must_say(why);
    let log = proxy.log();
    let refused = log.lines().find(|line| line.contains("refused"));
    assert!(refused.is_some_and(|line| line.contains(why)), "{log}");
}

#[test]
fn a_program_that_could_not_go_on_with_the_configuration_in_force_is_refused() {
    need("prlimit", "util-linux");
    let without_the_right = ["setpriv", "--bounding-set=-sys_resource", "--"];
    let (plan, binary) = with_own_binary(Plan::new().global("worker_connections = 1000"));
    let plan = plan.launched_by(&[&without_the_right[..], &["prlimit", "--nofile=4096"]].concat());
    let proxy = plan.start();
    let old = pids(&proxy);
    // Enough for the file as it is now, and it cannot be raised again.
    proxy.edit("worker_connections = 1000", "worker_connections = 100");
    let mut command = Command::new("prlimit");
    command.args(["--pid", &proxy.pid().to_string(), "--nofile=1024:1024"]);
    run(command, Duration::from_secs(10)).must_succeed("prlimit");
    install(&binary, good);
    proxy.signal(Signal::SIGUSR2);
    let why = "with the configuration that is in force: worker_connections = 1000 needs";
    assert!(within(SOON, || proxy.log().contains(why)), "{}", proxy.log());
    assert_eq!(pids(&proxy), old, "nothing has changed");
    proxy.reload();
    upgrade(&proxy, &binary);
}

/// A copy of the binary that says of its memory that it is laid out in another way.
fn of_another_layout(at: &Path, what: &str) {
    let mut bytes = std::fs::read(env!("CARGO_BIN_EXE_master")).expect("reading the binary");
    let text = format!("culvert {what}, layout ").into_bytes();
    let found: Vec<usize> = (0..bytes.len() - text.len())
        .filter(|from| bytes[*from..].starts_with(&text))
        .collect();
    assert!(!found.is_empty(), "the binary does not name its layout of {what}");
    for from in found {
        bytes[from + text.len()] = b'x';
    }
    place(at, &bytes);
}

#[test]
fn a_binary_that_lays_its_memory_out_differently_is_refused() {
    let echo = Upstream::echo("127.0.0.1");
    let (mut plan, binary) = with_own_binary(Plan::new());
    let front = plan.server(&echo);
    let proxy = plan.start();
    let mut client = connect(front);
    ping(&mut client, 1, 3).expect("a session before");
    for (what, refused) in [("sessions", 1), ("maps", 2), ("limits", 3)] {
        install(&binary, |at| of_another_layout(at, what));
        let old = pids(&proxy);
        proxy.signal(Signal::SIGUSR2);
        let said = format!("the {what} of the running binary");
        assert!(within(SOON, || proxy.log().contains(&said)), "{}", proxy.log());
        assert_eq!(pids(&proxy), old);
        assert_eq!(proxy.status().number("/reloads/failed"), refused);
        ping(&mut client, 2, 3).expect("the session");
        ping(&mut connect(front), 3, 3).expect("a new session");
    }
    upgrade(&proxy, &binary);
    ping(&mut client, 4, 3).expect("the session after an upgrade at last");
}

/// Where cgroups (version 2) are made.
fn cgroups() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("the mounts");
    let root = mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields[2] == "cgroup2").then(|| PathBuf::from(fields[1]))
    });
    root.expect("a cgroup2 mount")
}

/// A plan that is started in a new cgroup, as by a service manager.
fn in_new_cgroup(plan: Plan, name: &str) -> (Plan, PathBuf) {
    let given = cgroups().join(format!("culvert-test-{name}-{}", std::process::id()));
    std::fs::create_dir(&given).expect("making a cgroup needs root");
    let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", given.display());
    (plan.launched_by(&["sh", "-c", &enter, "sh"]), given)
}

/// The cgroups that the process has programs attached to, by the numbers of their directories.
fn attached_to(pid: i32) -> Vec<u64> {
    let infos = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("the master's descriptors");
    let texts = infos
        .flatten()
        .filter_map(|info| std::fs::read_to_string(info.path()).ok());
    let mut found = Vec::new();
    for text in texts.filter(|text| text.contains("link_type:\tcgroup")) {
        let number = text.lines().find_map(|line| line.strip_prefix("cgroup_id:"));
        found.push(number.expect("a cgroup").trim().parse().expect("its number"));
    }
    found
}

/// The cgroups of sockets with this address as their own: of those that listen and of those that were accepted.
fn cgroups_of_sockets(own: SocketAddr) -> BTreeSet<String> {
    need("ss", "iproute2");
    let mut command = Command::new("ss");
    command.args(["-Htan", "--cgroup", "src", &own.to_string()]);
    let said = run(command, Duration::from_secs(10)).must_succeed("ss");
    let words = said.split_whitespace();
    words
        .filter_map(|word| word.strip_prefix("cgroup:"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn other_programs_sockets_are_left_alone_even_where_a_cgroup_takes_a_right_that_is_given_up() {
    let echo = Upstream::echo("127.0.0.1");
    let (plan, binary) = with_own_binary(Plan::new().workers(2));
    let (mut plan, given) = in_new_cgroup(plan, "closed");
    // As the root of all is: only who passes over permissions makes something in it.
    std::fs::set_permissions(&given, std::fs::Permissions::from_mode(0o555)).expect("closing it");
    let front = plan.server(&echo);
    let mut proxy = plan.start();
    let own = given.join(format!("culvert-{}", proxy.pid()));
    let seen = format!(
        "/{}",
        own.strip_prefix(cgroups())
            .expect("a cgroup below the root")
            .display()
    );
    let mut client = connect(front);
    let check = |client: &mut TcpStream, step: u64| {
        ping(client, step, 3).expect("the session");
        ping(&mut connect(front), step, 3).expect("a new session");
        let number = std::fs::metadata(&own).expect("a cgroup of its own").ino();
        let attached = attached_to(proxy.pid());
        assert!(!attached.is_empty(), "no program is attached");
        assert!(
            attached.iter().all(|at| *at == number),
            "attached to {attached:?}, not {number}"
        );
        assert_eq!(cgroups_of_sockets(front), BTreeSet::from([seen.clone()]));
        let strangers = cgroups_of_sockets(client.local_addr().expect("an address"));
        assert!(
            !strangers.contains(&seen),
            "a client's socket is in {strangers:?}"
        );
    };
    check(&mut client, 1);
    proxy.edit("worker_processes = 2", "worker_processes = 3");
    proxy.reload();
    check(&mut client, 2);
    upgrade(&proxy, &binary);
    check(&mut client, 3);
    proxy.stop();
    // What may not be removed without that right goes when the next one starts.
    proxy.edit("worker_processes = 3", "worker_processes = 2");
    proxy.start_again();
    assert!(!own.exists(), "an abandoned cgroup is left");
    let own = given.join(format!("culvert-{}", proxy.pid()));
    proxy.stop();
    let _ = std::fs::remove_dir(own);
    std::fs::remove_dir(&given).expect("nothing else is left in the cgroup");
}

#[test]
fn where_no_cgroup_can_be_made_the_log_says_who_pays() {
    let (plan, given) = in_new_cgroup(Plan::new(), "full");
    std::fs::write(given.join("cgroup.max.descendants"), "0").expect("allowing no cgroup in it");
    let mut plan = plan;
    plan.server("127.0.0.1:1");
    let mut proxy = plan.start();
    assert_eq!(
        attached_to(proxy.pid()),
        [std::fs::metadata(&given).expect("it").ino()]
    );
    let words = format!("about every TCP socket of {}", given.display());
    assert!(proxy.log().contains(&words), "{}", proxy.log());
    proxy.stop();
    std::fs::remove_dir(&given).expect("nothing is left in the cgroup");
}

#[test]
fn an_upgraded_master_leaves_nothing_behind_when_it_is_stopped() {
    let echo = Upstream::echo("127.0.0.1");
    // Given by a service manager: the root of all may not be writable.
    let (plan, binary) = with_own_binary(Plan::new().workers(2));
    let (mut plan, given) = in_new_cgroup(plan, "left");
    let front = plan.server(&echo);
    let mut proxy = plan.start();
    let own = given.join(format!("culvert-{}", proxy.pid()));
    assert!(own.exists(), "the program has no cgroup of its own");
    let _client = connect(front);
    upgrade(&proxy, &binary);
    upgrade(&proxy, &binary);
    let name = process::field(proxy.pid(), "Name");
    assert_eq!(name, "culvert", "the name of the process after an upgrade");
    let pid_file = proxy.dir().join("master.pid");
    assert!(pid_file.exists() && own.exists());
    proxy.signal(Signal::SIGTERM);
    let status = proxy.wait_for_exit(PATIENCE).expect("it ends");
    assert!(status.success(), "{status}");
    assert!(!pid_file.exists(), "the pid file is left");
    assert!(!own.exists(), "the cgroup is left");
    std::fs::remove_dir(&given).expect("nothing is left in the cgroup");
    std::net::TcpStream::connect(front).expect_err("the address is still bound");
}

#[test]
fn sessions_that_are_copied_in_user_space_survive_an_upgrade() {
    let echo = Upstream::echo("127.0.0.1");
    let (plan, binary) = with_own_binary(Plan::new());
    let mut plan = plan.stream("ebpf_enable = false");
    let front = plan.server(&echo);
    let proxy = plan.start();
    let (mut old, mut young) = (connect(front), connect(front));
    ping(&mut old, 1, 3).expect("a session before");
    pause(1500);
    ping(&mut young, 2, 3).expect("a young session before");
    upgrade(&proxy, &binary);
    upgrade(&proxy, &binary);
    ping(&mut old, 3, 3).expect("the session after the upgrades");
    ping(&mut young, 4, 3).expect("the young session after the upgrades");
    assert_eq!(proxy.status().active(), 2);
    drop((old, young));
    assert_eq!(proxy.settle().relay().sum(), 2 * 24 * 3 * 4);
}

#[test]
fn access_logs_that_cannot_be_opened_anew_are_written_on_and_rotated_after_an_upgrade() {
    let echo = Upstream::echo("127.0.0.1");
    let (mut plan, binary) = with_own_binary(Plan::new().workers(2));
    let (folder, away) = (plan.file("logs"), plan.file("away"));
    std::fs::create_dir(&folder).expect("a folder");
    let log = |name: &str| {
        let path = folder.join(name).display().to_string();
        format!("access_log = {{ path = \"{path}\", format = \"json\", flush = \"0\" }}")
    };
    let fronts = ["one.log", "other.log"].map(|name| plan.server_with("127.0.0.1", &echo, &log(name)));
    let proxy = plan.start();
    let old = pids(&proxy);
    std::fs::rename(&folder, &away).expect("moving the folder away");

    install(&binary, good);
    proxy.signal(Signal::SIGUSR2);
    let upgraded = within(SOON, || process::executable(proxy.pid()) == binary);
    assert!(upgraded, "{}", proxy.log());
    // Its workers would have none.
    proxy.wait("the reload is refused", |s| s.number("/reloads/failed") == 1);
    assert_eq!(pids(&proxy), old, "the old workers serve on");
    let writes_to = |folder: &Path| {
        for (front, name) in fronts.iter().zip(["one.log", "other.log"]) {
            ping(&mut connect(*front), 1, 3).expect("a session");
            let read = || std::fs::read_to_string(folder.join(name)).unwrap_or_default();
            let said = format!("\"listener\":\"{front}\"");
            let written = within(SOON, || read().lines().count() == 1 && read().contains(&said));
            assert!(written, "{}, {name}: {}", folder.display(), read());
        }
    };
    writes_to(&away);
    std::fs::create_dir(&folder).expect("the folder again");
    proxy.signal(Signal::SIGUSR1);
    let opened = || {
        ["one.log", "other.log"]
            .iter()
            .all(|name| folder.join(name).exists())
    };
    assert!(within(SOON, opened), "{}", proxy.log());
    writes_to(&folder);
    proxy.reload();
}

#[test]
fn peers_are_found_by_their_names_though_the_reload_after_an_upgrade_is_refused() {
    let port = Port::claim().number;
    let (_two, _three) = (greeter_on("127.0.0.2", port, 2), greeter_on("127.0.0.3", port, 3));
    let server = DnsServer::started("127.0.0.2 backend.test");
    let (plan, binary) = with_own_binary(Plan::new());
    let folder = plan.file("logs");
    std::fs::create_dir(&folder).expect("a folder");
    let log = format!("access_log = \"{}\"", folder.join("access.log").display());
    let mut plan = plan.stream(&server.resolver("")).stream(&log).tables(&format!(
        "[[upstream]]\nname = \"group\"\nserver = [{{ address = \"backend.test:{port}\", resolve = true }}]"
    ));
    let front = plan.server("group");
    let proxy = plan.start();
    assert_eq!(seed(front), Some(2));
    std::fs::remove_dir_all(&folder).expect("removing the folder");
    install(&binary, good);
    proxy.signal(Signal::SIGUSR2);
    proxy.wait("the reload is refused", |s| s.number("/reloads/failed") == 1);
    assert_eq!(process::executable(proxy.pid()), binary, "{}", proxy.log());
    let worker = nix::unistd::Pid::from_raw(proxy.worker());
    nix::sys::signal::kill(worker, Signal::SIGKILL).expect("killing the worker");
    assert!(within(SOON, || seed(front) == Some(2)), "{}", proxy.log());
    server.change("127.0.0.3 backend.test");
    assert!(within(SOON, || seed(front) == Some(3)), "{}", proxy.log());
}

#[test]
fn connections_that_wait_while_the_program_is_paused_outwait_an_upgrade() {
    let echo = Upstream::echo("127.0.0.1");
    let (mut plan, binary) = with_own_binary(Plan::new().workers(2));
    let front = plan.server(&echo);
    let proxy = plan.start();
    let old = pids(&proxy);
    proxy.signal(Signal::SIGWINCH);
    assert!(within(SOON, || !old.iter().any(|&w| process::is_alive(w))));
    let mut waiting: Vec<_> = (0..20).map(|_| connect(front)).collect();
    install(&binary, good);
    proxy.signal(Signal::SIGUSR2);
    assert!(
        within(SOON, || process::executable(proxy.pid()) == binary),
        "{}",
        proxy.log()
    );
    pause(300);
    let workers = process::children(proxy.pid());
    assert!(workers.is_empty(), "it is paused no more: {workers:?}");
    proxy.signal(Signal::SIGHUP);
    for (seed, client) in waiting.iter_mut().enumerate() {
        ping(client, seed as u64, 3).expect("a connection that has waited");
    }
}

#[test]
fn what_comes_while_the_new_program_is_asked_is_done() {
    let echo = Upstream::echo("127.0.0.1");
    let (mut plan, binary) = with_own_binary(Plan::new().workers(2));
    let front = plan.server(&echo);
    let real = plan.file("culvert-real");
    let proxy = plan.start();
    let mut client = connect(front);
    ping(&mut client, 1, 3).expect("a session before");
    proxy.wait("it is kept", |s| s.number("/sessions/kept") == 1);
    // Takes its time to answer.
    good(&real);
    let text = format!(
        "case \"$*\" in *--take-over-check*) sleep 3;; esac\nexec {} \"$@\"",
        real.display()
    );
    install(&binary, |at| script(at, &text));
    proxy.signal(Signal::SIGUSR2);
    pause(300);
    let killed = pids(&proxy)[0];
    // It may be gone by itself just now.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(killed), Signal::SIGKILL);
    proxy.signal(Signal::SIGHUP);
    proxy.signal(Signal::SIGUSR2);
    proxy.wait("the worker is replaced", |s| s.number("/worker_restarts") == 1);
    assert_ne!(process::executable(proxy.pid()), real, "it is upgraded already");
    ping(&mut client, 2, 3).expect("the session while the new program is asked");
    let upgraded = within(SOON, || process::executable(proxy.pid()) == real);
    assert!(upgraded, "{}", proxy.log());
    // The reload, and the upgrade.
    proxy.wait("both are done", |s| s.generation() == 3);
    ping(&mut client, 3, 3).expect("the session after the upgrade");

    // An upgrade during a reload waits for its end.
    install(&binary, good);
    proxy.signal(Signal::SIGHUP);
    proxy.signal(Signal::SIGUSR2);
    let upgraded = within(SOON, || process::executable(proxy.pid()) == binary);
    assert!(upgraded, "{}", proxy.log());
    proxy.wait("both are done", |s| s.generation() == 5);
    ping(&mut client, 4, 3).expect("the session at the end");
}
