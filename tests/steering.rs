//! `flow_steering`: where the kernel forwards, and that the host is afterwards what it was before.
//!
//! These tests change the host's settings for the loopback device, one test at a time; whatever happens in a
//! test, they are put back.

use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use crate::harness::pattern::{pause, ping};
use crate::harness::program::{need, shell};
use crate::harness::turns::{Turn, alone};
use crate::harness::{Bytes, Plan, Proxy, Status, Upstream, connect, exchange, process, receive, send};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const TABLE: &str = "/proc/sys/net/core/rps_sock_flow_entries";
const QUEUE: &str = "/sys/class/net/lo/queues/rx-0/rps_flow_cnt";
const CPUS: &str = "/sys/class/net/lo/queues/rx-0/rps_cpus";

const UP: u64 = 11;
const DOWN: u64 = 22;
const ON: &str = "flow_steering = \"rfs\"\nworker_cpu_affinity = [\"10\"]";

/// The host's settings, for one test alone, as an administrator has left them.
struct Host {
    before: [String; 2],
    _alone: Turn,
}

/// What the administrator of these tests has set: not nothing, so that putting back is not just clearing.
const FOUND: [&str; 3] = ["0", "512", "0"];
/// What 64 and what 1024 connections of one worker need.
const SET: [&str; 3] = ["32768", "32768", "0"];

impl Host {
    fn take() -> Host {
        let alone = alone();
        let host = Host {
            before: [TABLE, QUEUE].map(read),
            _alone: alone,
        };
        write(TABLE, FOUND[0]);
        write(QUEUE, FOUND[1]);
        assert_eq!(values(), FOUND, "rps_cpus of lo is the third");
        host
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        write(TABLE, &self.before[0]);
        write(QUEUE, &self.before[1]);
    }
}

fn read(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("failed to read {path}: {e}"));
    text.trim().to_owned()
}

fn write(path: &str, value: &str) {
    std::fs::write(path, value).unwrap_or_else(|e| panic!("failed to write {path} (as root?): {e}"));
}

fn values() -> [String; 3] {
    [TABLE, QUEUE, CPUS].map(read)
}

/// Keeps this thread, and all threads and processes that it starts, on CPU 0.
fn stay_on_cpu_0() {
    let mut set = CpuSet::new();
    set.set(0).expect("CPU 0");
    sched_setaffinity(Pid::from_raw(0), &set).expect("staying on CPU 0");
    let cpus = std::fs::read_to_string("/sys/devices/system/cpu/online").expect("the CPUs");
    assert_ne!(cpus.trim(), "0", "this test needs two CPUs");
}

/// What was forwarded on CPU 1, in per cent of all, from one status to another.
#[track_caller]
fn share_of_cpu_1(before: &Status, after: &Status) -> (f64, f64) {
    let all = |status: &Status| status.sockmap();
    let (from, to) = (before.cpu(1), after.cpu(1));
    let share = |part: u64, whole: u64| 100.0 * part as f64 / whole as f64;
    (
        share(
            to.to_upstream - from.to_upstream,
            all(after).to_upstream - all(before).to_upstream,
        ),
        share(
            to.to_downstream - from.to_downstream,
            all(after).to_downstream - all(before).to_downstream,
        ),
    )
}

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Who {
    Both,
    Client,
    Server,
}

/// Streams by several sessions one after the other, with everything but the worker on CPU 0; says what share
/// the kernel forwarded on the worker's.
fn shares_with(settings: &str, who: Who) -> (f64, f64) {
    const SESSIONS: u64 = 4;
    const BYTES: u64 = 40 << 20;
    stay_on_cpu_0();
    let upstream = Upstream::serve("127.0.0.1", move |mut stream: TcpStream| match who {
        Who::Both => exchange(stream, DOWN, BYTES, UP).must_be_whole(BYTES),
        Who::Client => receive(&mut stream, UP).must_be_whole(BYTES),
        Who::Server => send(&mut stream, DOWN, 0, BYTES).expect("sending"),
    });
    let mut plan = Plan::new().global(settings);
    let front = plan.server(&upstream);
    let proxy = plan.start();
    assert_eq!(process::field(proxy.worker(), "Cpus_allowed_list"), "1");
    let before = proxy.status();
    for _ in 0..SESSIONS {
        let mut client = connect(front);
        match who {
            Who::Both => exchange(client, UP, BYTES, DOWN).must_be_whole(BYTES),
            Who::Client => send(&mut client, UP, 0, BYTES).expect("sending"),
            Who::Server => receive(&mut client, DOWN).must_be_whole(BYTES),
        }
    }
    (0..SESSIONS).for_each(|_| upstream.result());
    let after = proxy.settle();
    let all = Bytes {
        to_upstream: if who == Who::Server { 0 } else { SESSIONS * BYTES },
        to_downstream: if who == Who::Client { 0 } else { SESSIONS * BYTES },
    };
    assert_eq!(after.carried(), all);
    // What a source has left that ends while it is held back is copied, by the worker.
    let copied = after.relay();
    assert!(copied.sum() * 10 < all.sum(), "copied: {copied:?}");
    let shares = share_of_cpu_1(&before, &after);
    println!("{who:?} sends, with {settings:?}: {shares:.1?} % on CPU 1, to the upstream and to the client");
    shares
}

#[test]
fn the_kernel_forwards_on_the_workers_cpu_in_both_directions_and_without_steering_it_does_not() {
    let _host = Host::take();
    for who in [Who::Both, Who::Client, Who::Server] {
        let is_steered = || {
            let (up, down) = shares_with(ON, who);
            (who == Who::Server || up >= 95.0) && (who == Who::Client || down >= 95.0)
        };
        // A sender that is starved into a retransmission has a new hash, and strays until the next look.
        assert!(
            (0..3).any(|_| is_steered()),
            "{who:?}: the output has the figures"
        );
    }
    assert_eq!(values(), FOUND, "after the program's end");
    let free = shares_with("worker_cpu_affinity = [\"10\"]", Who::Both);
    assert!((free.0 + free.1) / 2.0 < 75.0, "not steered: {free:?} %");
}

#[test]
fn a_session_whose_marks_were_lost_is_marked_anew() {
    const BULK: u64 = 64 << 20;
    let _host = Host::take();
    stay_on_cpu_0();
    let upstream = Upstream::serve("127.0.0.1", |mut stream: TcpStream| receive(&mut stream, UP));
    let mut plan = Plan::new().global(ON).stream("ebpf_timer_period = \"50ms\"");
    let front = plan.server(&upstream);
    let proxy = plan.start();
    let mut client = connect(front);
    let mut sent = 0;
    let mut bulk = |bytes: u64| {
        let before = proxy.status();
        send(&mut client, UP, sent, sent + bytes).expect("sending");
        sent += bytes;
        let after = proxy.wait("all is forwarded", |s| s.sockmap().to_upstream == sent);
        share_of_cpu_1(&before, &after).0
    };
    bulk(BULK);
    // Writing the size of the table clears it (rps_sock_flow_sysctl, Linux 6.12).
    // They may be made anew before anything is sent: then once more.
    let lost = (0..20).any(|_| {
        write(TABLE, SET[0]);
        bulk(1000) == 0.0
    });
    assert!(lost, "the marks were lost");
    for _ in 0..10 {
        pause(20);
        bulk(1000);
    }
    // A client that is starved into a retransmission has a new hash, and strays until the next look.
    let again: Vec<f64> = (0..5).map(|_| bulk(BULK)).collect();
    let best = again.iter().copied().fold(0.0, f64::max);
    assert!(best >= 95.0, "after the marks were lost: {again:?} %");
    println!("after the marks were lost: {again:?} %");
    drop(client);
    upstream.result().must_be_whole(sent);
}

fn echo_plan(settings: &str) -> (Plan, Upstream<()>, std::net::SocketAddr) {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().global(settings);
    let front = plan.server(&echo);
    (plan, echo, front)
}

#[test]
fn the_host_is_what_it_was_after_term_after_quit_and_after_a_reload_to_off() {
    let _host = Host::take();
    for end in [Signal::SIGTERM, Signal::SIGQUIT] {
        let (plan, _echo, front) = echo_plan(ON);
        let mut proxy = plan.start();
        assert_eq!(values(), SET);
        let journal = proxy.dir().join("master.pid.steering");
        assert!(journal.exists(), "what was found is on record");
        ping(&mut connect(front), 1, 3).expect("a session");
        for (from, to, expected) in [("rfs", "off", FOUND), ("off", "rfs", SET)] {
            let text = std::fs::read_to_string(proxy.file()).expect("the configuration");
            let text = text.replace(&format!("\"{from}\""), &format!("\"{to}\""));
            std::fs::write(proxy.file(), text).expect("writing the configuration");
            let generation = proxy.status().generation();
            proxy.signal(Signal::SIGHUP);
            proxy.wait("the new generation serves", |s| s.generation() > generation);
            assert_eq!(values(), expected, "after a reload from {from} to {to}");
            assert_eq!(journal.exists(), to == "rfs");
        }
        proxy.signal(end);
        let exit = proxy.wait_for_exit(Duration::from_secs(10));
        assert_eq!(exit.and_then(|exit| exit.code()), Some(0), "after {end}");
        assert_eq!(values(), FOUND, "after {end}");
        assert!(!journal.exists());
    }
}

#[test]
fn a_killed_worker_changes_nothing_for_the_host_or_for_its_successor() {
    let _host = Host::take();
    let (plan, _echo, front) = echo_plan(ON);
    let mut proxy = plan.start();
    let victim = proxy.worker();
    kill(Pid::from_raw(victim), Signal::SIGKILL).expect("killing the worker");
    proxy.wait("the worker is replaced", |s| {
        s.workers()
            .iter()
            .all(|w| w.pid != victim && process::is_alive(w.pid))
    });
    ping(&mut connect(front), 1, 3).expect("a session of the new worker");
    assert_eq!(values(), SET);
    proxy.stop();
    assert_eq!(values(), FOUND);
}

/// The same pid file for another proxy, and so the same record of what was found.
fn successor(of: &Proxy, settings: &str) -> Proxy {
    let (plan, _echo, _) = echo_plan(settings);
    let text = plan.text();
    let own: PathBuf = plan.file("master.pid");
    let text = text.replace(
        &own.display().to_string(),
        &of.dir().join("master.pid").display().to_string(),
    );
    let file = plan.file("proxy.toml");
    std::fs::write(&file, text).expect("writing the configuration");
    Proxy::start_file(plan, &file)
}

#[test]
fn after_a_kill_of_the_master_its_successor_puts_back_what_it_found() {
    let _host = Host::take();
    for (settings, meanwhile) in [(ON, SET), ("flow_steering = \"off\"", FOUND)] {
        let (plan, _echo, _) = echo_plan(ON);
        let mut first = plan.start();
        first.signal(Signal::SIGKILL);
        first
            .wait_for_exit(Duration::from_secs(5))
            .expect("it was killed");
        assert_eq!(values(), SET, "nobody was there to put it back");
        let mut second = successor(&first, settings);
        assert_eq!(values(), meanwhile, "with {settings:?}");
        second.stop();
        assert_eq!(values(), FOUND, "with {settings:?}");
        assert!(!first.dir().join("master.pid.steering").exists());
    }
}

#[test]
fn without_the_right_to_set_it_up_there_is_one_warning_and_sessions_are_served() {
    let _host = Host::take();
    need("setpriv", "util-linux");
    let (plan, _echo, front) = echo_plan(ON);
    let proxy = plan
        .launched_by(&["setpriv", "--bounding-set=-net_admin", "--"])
        .start();
    ping(&mut connect(front), 1, 3).expect("a session");
    assert_eq!(values(), FOUND);
    let log = proxy.log();
    let is_warning = |line: &&str| line.contains("steering") && !line.contains("[info]");
    let about: Vec<_> = log.lines().filter(is_warning).collect();
    assert_eq!(about.len(), 1, "{log}");
    for word in ["[warn]", "rps_flow_cnt", "CAP_NET_ADMIN", "serving goes on"] {
        assert!(about[0].contains(word), "{word} is not in {}", about[0]);
    }
}

#[test]
fn in_a_network_namespace_of_its_own_the_hosts_devices_are_left_alone() {
    let _host = Host::take();
    need("unshare", "util-linux");
    need("ip", "iproute2");
    let (plan, _echo, _) = echo_plan(ON);
    let (file, log, status) = (plan.file("proxy.toml"), plan.file("log"), plan.status_port());
    std::fs::write(&file, plan.text()).expect("writing the configuration");
    // /sys is still the host's in there, with the host's lo.
    let inside = format!(
        "ip link set lo up; {} -c {} 2>{log} & pid=$!; \
         for i in $(seq 200); do grep -q \"worker 0 started\" {log} && break; sleep 0.05; done; \
         exec 3<>/dev/tcp/127.0.0.1/{status}; cat <&3; cat {QUEUE} >&2; kill -TERM $pid; wait $pid",
        env!("CARGO_BIN_EXE_master"),
        file.display(),
        log = log.display(),
    );
    let document = shell(
        &format!("unshare --net bash -c '{inside}'"),
        Duration::from_secs(20),
    );
    assert!(document.contains("\"workers\""), "it serves: {document:?}");
    let log = std::fs::read_to_string(log).expect("the log");
    let about: Vec<_> = log.lines().filter(|line| line.contains("steering")).collect();
    assert_eq!(about.len(), 1, "{log}");
    assert!(
        about[0].contains("[warn]") && about[0].contains("network namespace"),
        "{log}"
    );
    assert_eq!(values(), FOUND);
}

#[test]
fn a_larger_value_of_the_administrator_stays() {
    let _host = Host::take();
    write(TABLE, "65536");
    let (plan, _echo, _) = echo_plan(ON);
    let mut proxy = plan.start();
    assert_eq!(values(), ["65536", SET[1], SET[2]]);
    proxy.must_say("lo/rx-0 512 to 32768");
    proxy.stop();
    assert_eq!(values(), ["65536", FOUND[1], FOUND[2]]);
}
