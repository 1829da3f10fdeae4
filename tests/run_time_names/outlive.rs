//! Sessions that wait for a host's addresses while their worker, or the program, is replaced or ends.

use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{TLS, answer_of, ask_for, by_sni, echoes, hosts, name_failed, slow};
use crate::harness::dns::{OK, a_record, fake, reply, resolver};
use crate::harness::greeter::greeter_on;
use crate::harness::hello::hello;
use crate::harness::load::KEPT_AFTER;
use crate::harness::sockets::Deaf;
use crate::harness::{Ending, Flag, PATIENCE, Plan, Port, Proxy, patient, receive};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What happens to the worker, or to the program, while a name is looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Reload,
    Kill,
    Upgrade,
}

fn replace(proxy: &Proxy, event: Event) {
    let old = proxy.worker();
    match event {
        Event::Reload => _ = proxy.reload(),
        Event::Kill => kill(Pid::from_raw(old), Signal::SIGKILL).expect("killing the worker"),
        Event::Upgrade => {
            let before = proxy.status().generation();
            proxy.signal(Signal::SIGUSR2);
            proxy.wait("the next generation serves", |s| s.generation() > before);
        }
    }
    proxy.wait("one other worker serves", |s| {
        let workers = s.workers();
        workers.len() == 1 && workers[0].pid != old
    });
}

fn waiting_comes_through(event: Event) {
    let port = Port::claim().number;
    let _two = greeter_on("127.0.0.2", port, 2);
    let ready = Arc::new(Flag::default());
    let _end = ready.raise_at_the_end();
    let (address, _) = slow(&ready, [127, 0, 0, 2]);
    let mut plan = Plan::new().stream(&resolver(address, ", ipv6 = false"));
    let front = plan.server_with("127.0.0.1", &by_sni(port)[..], TLS);
    let proxy = plan.start();
    let mut client = ask_for(front, "app.test");
    proxy.wait("it waits", |status| hosts(status, "sessions") == 1);
    if event == Event::Kill {
        std::thread::sleep(patient(KEPT_AFTER + Duration::from_millis(200)));
        proxy.wait("it is kept", |status| status.number("/sessions/kept") == 1);
    }
    replace(&proxy, event);
    proxy.wait("the next worker has it", |status| {
        (status.active(), status.number("/sessions/adopted")) == (1, 1)
    });
    ready.raise();
    assert_eq!(answer_of(&mut client, "app.test"), Some(2));
    echoes(&mut client, 30_000);
    client.shutdown(Shutdown::Write).expect("the end");
    receive(&mut client, 1).must_be_whole(0);
    let status = proxy.settle();
    assert_eq!(status.number("/closes/finished"), 1, "{:#}", status.json());
    assert_eq!(
        (hosts(&status, "sessions"), status.relay().sum()),
        (1, 0),
        "counted once, carried by the kernel"
    );
    assert_eq!(
        status.sockmap().to_upstream,
        hello("app.test").len() as u64 + 30_000
    );
}

#[test]
fn a_session_that_waits_for_a_name_comes_through_a_reload() {
    waiting_comes_through(Event::Reload);
}

#[test]
fn a_session_that_waits_for_a_name_comes_through_the_death_of_its_worker() {
    waiting_comes_through(Event::Kill);
}

#[test]
fn a_session_that_waits_for_a_name_comes_through_an_upgrade() {
    waiting_comes_through(Event::Upgrade);
}

#[test]
fn one_that_is_not_kept_yet_when_its_worker_dies_is_reset_and_counted() {
    let (address, _) = fake(|_, _| Vec::new());
    let mut plan = Plan::new().stream(&resolver(address, ", ipv6 = false"));
    let front = plan.server_with("127.0.0.1", &by_sni(443)[..], TLS);
    let proxy = plan.start();
    let mut client = ask_for(front, "app.test");
    proxy.wait("it waits", |status| hosts(status, "sessions") == 1);
    replace(&proxy, Event::Kill);
    assert_eq!(receive(&mut client, 1).ending, Ending::Reset);
    assert_eq!(proxy.settle().number("/closes/worker_died"), 1);
}

#[test]
fn a_session_that_waits_in_several_workers_waits_no_longer_than_in_one() {
    let (address, _) = fake(|_, _| Vec::new());
    let line = format!(
        "{}\nresolver_timeout = \"8s\"",
        resolver(address, ", ipv6 = false")
    );
    let mut plan = Plan::new().stream(&line);
    let front = plan.server_with("127.0.0.1", &by_sni(443)[..], TLS);
    let proxy = plan.start();
    let begun = Instant::now();
    let mut client = ask_for(front, "app.test");
    proxy.wait("it waits", |status| hosts(status, "sessions") == 1);
    // What the master asks goes on through reloads, so the name is changed: only the session's own time counts.
    for n in 0..2 {
        std::thread::sleep(Duration::from_secs(2));
        let from = if n == 0 {
            "server_name:443"
        } else {
            "server_name-0:443"
        };
        proxy.edit(from, &format!("server_name-{n}:443"));
        replace(&proxy, Event::Reload);
    }
    assert_eq!(receive(&mut client, 1).ending, Ending::Reset);
    let took = begun.elapsed();
    // With time that begins anew it would be the eight seconds of the last lookup, from the fourth on.
    assert!(
        (Duration::from_millis(7900)..Duration::from_millis(11_500)).contains(&took),
        "{took:?}"
    );
    assert_eq!(name_failed(&proxy.settle()), 1);
    proxy.must_say("app.test-1 could not be resolved");
}

#[test]
fn a_session_that_waits_for_a_name_is_finished_by_a_program_that_quits() {
    let port = Port::claim().number;
    let _two = greeter_on("127.0.0.2", port, 2);
    let ready = Arc::new(Flag::default());
    let _end = ready.raise_at_the_end();
    let (address, _) = slow(&ready, [127, 0, 0, 2]);
    let mut plan = Plan::new().stream(&resolver(address, ", ipv6 = false"));
    let front = plan.server_with("127.0.0.1", &by_sni(port)[..], TLS);
    let mut proxy = plan.start();
    let mut client = ask_for(front, "app.test");
    proxy.wait("it waits", |status| hosts(status, "sessions") == 1);
    proxy.signal(Signal::SIGQUIT);
    proxy.must_say("SIGQUIT: finishing 1");
    ready.raise();
    assert_eq!(answer_of(&mut client, "app.test"), Some(2));
    drop(client);
    let exit = proxy.wait_for_exit(PATIENCE).expect("it ends");
    assert_eq!(exit.code(), Some(0));
}

#[test]
fn a_session_that_was_taken_over_while_it_was_connecting_tries_the_other_addresses_too() {
    let deaf = Deaf::new();
    let port = deaf.address.port();
    let SocketAddr::V4(ip) = deaf.address else {
        panic!("IPv4")
    };
    let silent = ip.ip().octets();
    let _two = greeter_on("127.0.0.2", port, 2);
    let (address, _) = fake(move |_, question| {
        vec![reply(
            question,
            OK,
            &[&a_record(silent), &a_record([127, 0, 0, 2])],
        )]
    });
    let line = resolver(address, ", ipv6 = false, valid = \"1m\"");
    let mut plan = Plan::new().stream(&format!("{line}\nproxy_connect_timeout = \"3s\""));
    let front = plan.server_with("127.0.0.1", &by_sni(port)[..], TLS);
    let proxy = plan.start();
    // Of two sessions one begins with the address that is silent.
    let mut clients = [(); 2].map(|()| ask_for(front, "app.test"));
    proxy.wait("one is connected", |status| {
        status.number("/sessions/offloaded") == 1
    });
    replace(&proxy, Event::Reload);
    for client in &mut clients {
        assert_eq!(answer_of(client, "app.test"), Some(2));
    }
    proxy.must_say(&format!("failed to connect to {}", deaf.address));
}

/// `has_read`: the master has read the worker's question when it dies.
fn ends_with_the_master(has_read: bool) {
    let (address, _) = fake(|_, _| Vec::new());
    let mut plan = Plan::new().stream(&resolver(address, ", ipv6 = false"));
    let front = plan.server_with("127.0.0.1", &by_sni(443)[..], TLS);
    let mut proxy = plan.start();
    if !has_read {
        proxy.signal(Signal::SIGSTOP);
    }
    let mut client = ask_for(front, "app.test");
    proxy.wait("it waits", |status| {
        (hosts(status, "sessions"), hosts(status, "lookups")) == (1, u64::from(has_read))
    });
    let begun = Instant::now();
    proxy.signal(Signal::SIGKILL);
    proxy.wait_for_exit(PATIENCE).expect("it is killed");
    assert_eq!(receive(&mut client, 1).ending, Ending::Reset);
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    proxy.must_say("app.test could not be resolved for client");
    proxy.must_say("the master is gone, and nobody else asks");
}

#[test]
fn a_session_that_waits_for_a_name_ends_at_once_when_the_master_is_gone() {
    ends_with_the_master(true);
}

#[test]
fn a_session_whose_question_the_master_has_not_read_ends_with_it_too() {
    ends_with_the_master(false);
}

#[test]
fn a_session_whose_listener_goes_while_its_name_is_looked_up_is_led_on_by_the_worker_that_knows_where_to() {
    let port = Port::claim().number;
    let _two = greeter_on("127.0.0.2", port, 2);
    let ready = Arc::new(Flag::default());
    let _end = ready.raise_at_the_end();
    let (address, _) = slow(&ready, [127, 0, 0, 2]);
    let mut plan = Plan::new().stream(&resolver(address, ", ipv6 = false"));
    let front = plan.server_with("127.0.0.1", &by_sni(port)[..], TLS);
    let elsewhere = Port::claim();
    let proxy = plan.start();
    let mut client = ask_for(front, "app.test");
    proxy.wait("it waits", |status| hosts(status, "sessions") == 1);
    proxy.edit(
        &format!("listen = \"{front}\""),
        &format!("listen = \"{}\"", elsewhere.on("127.0.0.1")),
    );
    proxy.reload();
    ready.raise();
    assert_eq!(answer_of(&mut client, "app.test"), Some(2));
    echoes(&mut client, 30_000);
    proxy.wait("the old worker has gone", |status| status.workers().len() == 1);
    echoes(&mut client, 30_000);
    drop(client);
    assert_eq!(proxy.settle().number("/closes/finished"), 1);
}
