//! Sessions outlive workers: under a load of long streams and short connections workers are replaced, killed, added
//! and taken away. `harness::load` says what sizes the environment can ask for; with large ones, run one test at a
//! time (`--test-threads=1`).

use std::cell::RefCell;
use std::net::TcpStream;
use std::time::Duration;

use crate::harness::load::{Load, Sizes};
use crate::harness::pattern::ping;
use crate::harness::random::Random;
use crate::harness::sockets::{Deaf, connect};
use crate::harness::turns::beside_others;
use crate::harness::{PATIENCE, Plan, Proxy, Upstream, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A proxy under load.
fn under_load(plan: Plan) -> (Proxy, Load) {
    let sizes = Sizes::get();
    let mut plan = plan
        .lifetime(sizes.lifetime())
        .global("error_log = { path = \"stderr\", level = \"warn\" }");
    let mut load = Load::new(&mut plan, sizes);
    let proxy = plan.start();
    load.begin(&proxy);
    (proxy, load)
}

fn two_workers() -> Plan {
    Plan::new().workers(2).global("worker_connections = 2048")
}

#[test]
fn the_load_itself_is_carried_without_a_fault() {
    let _beside = beside_others();
    let (proxy, mut load) = under_load(two_workers());
    load.churn(10, 1);
    load.meanwhile(Duration::from_secs(1), || {});
    load.finish(&proxy, "undisturbed");
}

#[test]
fn reloads_three_times_a_second_break_nothing_and_old_workers_go_at_once() {
    let _beside = beside_others();
    let (proxy, mut load) = under_load(two_workers());
    load.churn(10, 2);
    let before = proxy.status().generation();
    load.meanwhile(Duration::from_millis(300), || proxy.signal(Signal::SIGHUP));
    let expected = Sizes::get().lasts.as_secs();
    let mut generations = 0;
    let enough = within(PATIENCE, || {
        generations = proxy.status().generation() - before;
        generations >= expected || {
            proxy.signal(Signal::SIGHUP);
            false
        }
    });
    assert!(enough, "only {generations} generations, not {expected}");
    load.ledger.note(format!("{generations} generations"));
    load.finish(&proxy, "reloads");
}

#[test]
fn a_worker_that_is_killed_each_second_takes_no_session_with_it_that_is_old_enough() {
    let _beside = beside_others();
    let (proxy, mut load) = under_load(two_workers());
    load.churn(20, 3);
    let random = RefCell::new(Random(3));
    load.meanwhile(Duration::from_secs(1), || {
        let workers = proxy.status().workers();
        let victim = &workers[random.borrow_mut().below(workers.len() as u64) as usize];
        load.ledger
            .killing(|| kill(Pid::from_raw(victim.pid), Signal::SIGKILL))
            .expect("killing a worker");
    });
    let kills = load.ledger.kills() as u64;
    let status = proxy.wait("the last of them is replaced", |s| {
        s.number("/worker_restarts") >= kills
    });
    assert_eq!(
        status.number("/worker_restarts"),
        kills,
        "workers that were replaced, and workers that were killed"
    );
    load.finish(&proxy, "kills");
}

#[test]
fn workers_come_and_go_with_the_file_and_no_connection_is_lost() {
    let _beside = beside_others();
    let (proxy, mut load) = under_load(two_workers());
    load.churn(10, 4);
    let mut now = 2;
    let mut next = [4, 1, 3, 2].into_iter().cycle();
    load.meanwhile(Duration::from_millis(900), || {
        let count = next.next().expect("a number of workers");
        proxy.edit(
            &format!("worker_processes = {now}\n"),
            &format!("worker_processes = {count}\n"),
        );
        proxy.reload();
        proxy.wait(&format!("{count} workers serve"), |s| {
            s.workers().iter().filter(|w| !w.draining).count() == count
        });
        now = count;
    });
    load.finish(&proxy, "worker_processes");
}

#[test]
fn worker_connections_may_change_and_no_connection_is_lost() {
    let _beside = beside_others();
    let (proxy, mut load) = under_load(two_workers());
    load.churn(10, 5);
    let mut now = 2048;
    // The smallest still holds all of the load in either worker.
    let least = 2 * Sizes::get().streams + 200;
    let mut next = [least, 4096, 1500 + least, 2048].into_iter().cycle();
    load.meanwhile(Duration::from_millis(900), || {
        let count = next.next().expect("a number of connections");
        proxy.edit(
            &format!("worker_connections = {now}\n"),
            &format!("worker_connections = {count}\n"),
        );
        proxy.reload();
        now = count;
    });
    load.finish(&proxy, "worker_connections");
}

#[test]
fn what_a_slot_that_goes_was_still_connecting_is_handed_over() {
    let _beside = beside_others();
    const SESSIONS: usize = 40;
    let deaf = Deaf::new();
    let mut plan = Plan::new().workers(2);
    let front = plan.server(deaf.address);
    let proxy = plan.start();
    let mut clients: Vec<TcpStream> = Vec::new();
    // In steps, so that no worker is given more than its share before its sessions are counted (accept.bpf.c).
    while clients.len() < SESSIONS {
        clients.extend((0..SESSIONS / 4).map(|_| connect(front)));
        proxy.wait("they are connecting", |s| s.active() == clients.len() as u64);
    }
    assert!(proxy.status().workers().iter().all(|worker| worker.sessions > 0));
    proxy.edit("worker_processes = 2\n", "worker_processes = 1\n");
    proxy.reload();
    proxy.wait("one worker has all of them", |s| {
        s.workers().len() == 1 && s.active() == SESSIONS as u64
    });
    let upstream = Upstream::on(deaf.hear(), crate::harness::upstream::echo);
    for client in &mut clients {
        ping(client, 1, 2).expect("an echo once the upstream answers");
    }
    drop(clients);
    assert_eq!(proxy.settle().number("/closes/finished"), SESSIONS as u64);
    drop(upstream);
}
