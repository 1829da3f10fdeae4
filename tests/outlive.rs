//! Sessions outlive workers: under a load of long streams and short connections workers are replaced, killed, added
//! and taken away, and the program is exchanged. `harness::load` says what sizes the environment can ask for; with
//! large ones, run one test at a time (`--test-threads=1`).

mod harness;

use std::time::Duration;

use harness::load::{Load, Sizes};
use harness::{Plan, Proxy};
use nix::sys::signal::Signal;

/// A proxy under load.
fn under_load(plan: Plan) -> (Proxy, Load) {
    let sizes = Sizes::get();
    // At `info` each short connection would write a line.
    let mut plan = plan
        .lifetime(sizes.lifetime())
        .global("error_log = { path = \"stderr\", level = \"warn\" }")
        .global("worker_connections = 2048");
    let mut load = Load::new(&mut plan, sizes);
    let proxy = plan.start();
    load.begin(&proxy);
    (proxy, load)
}

#[test]
fn the_load_itself_is_carried_without_a_fault() {
    let (proxy, mut load) = under_load(Plan::new().workers(2));
    load.churn(10, 1);
    load.meanwhile(Duration::from_secs(1), || {});
    load.finish(&proxy, "undisturbed");
}

#[test]
fn reloads_three_times_a_second_break_nothing_and_old_workers_go_at_once() {
    let (proxy, mut load) = under_load(Plan::new().workers(2));
    load.churn(10, 2);
    let before = proxy.status().generation();
    load.meanwhile(Duration::from_millis(300), || proxy.signal(Signal::SIGHUP));
    let generations = proxy.status().generation() - before;
    let expected = Sizes::get().lasts.as_millis() as u64 / 1000;
    assert!(
        generations >= expected,
        "only {generations} generations in {expected} s"
    );
    load.ledger.note(format!("{generations} generations"));
    load.finish(&proxy, "reloads");
}
