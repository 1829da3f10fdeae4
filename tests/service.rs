//! What a service manager is told: this test is one, on a socket of its own.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use crate::harness::pattern::pause;
use crate::harness::{Plan, Proxy};
use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

const PATIENCE: Duration = Duration::from_secs(10);

struct Manager(UnixDatagram);

impl Manager {
    fn at(address: &SocketAddr) -> Manager {
        let socket = UnixDatagram::bind_addr(address).expect("a socket for notifications");
        socket.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        Manager(socket)
    }

    fn next(&self) -> String {
        let mut buffer = [0; 4096];
        let got = self.0.recv(&mut buffer).expect("a notification");
        String::from_utf8_lossy(&buffer[..got]).into_owned()
    }

    /// The next message that begins with this; what comes before it must be harmless.
    #[track_caller]
    fn expect(&self, beginning: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let message = self.next();
            if message.starts_with(beginning) {
                return message;
            }
            let harmless = message.starts_with("STATUS=") || message.starts_with("WATCHDOG=");
            assert!(
                harmless && Instant::now() < end,
                "{message:?} instead of {beginning:?}"
            );
        }
    }

    /// Messages within a time.
    fn gather(&self, limit: Duration) -> Vec<String> {
        pause(limit.as_millis() as u64);
        self.0.set_nonblocking(true).expect("not waiting");
        let mut messages = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(got) = self.0.recv(&mut buffer) {
            messages.push(String::from_utf8_lossy(&buffer[..got]).into_owned());
        }
        self.0.set_nonblocking(false).expect("waiting");
        messages
    }
}

fn start(address: &str, watchdog: Option<&str>) -> Proxy {
    let mut launcher = vec!["env".to_owned(), format!("NOTIFY_SOCKET={address}")];
    launcher.extend(watchdog.map(|limit| format!("WATCHDOG_USEC={limit}")));
    let launcher: Vec<&str> = launcher.iter().map(String::as_str).collect();
    let mut plan = Plan::new().workers(2).launched_by(&launcher);
    plan.server("127.0.0.1:1");
    plan.start()
}

fn now_us() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock");
    now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000
}

fn follows_start_reload_and_stop(address: &SocketAddr, name: &str) {
    let manager = Manager::at(address);
    let mut proxy = start(name, None);
    let ready = manager.expect("READY=1");
    assert_eq!(ready, format!("READY=1\nMAINPID={}", proxy.pid()));
    assert!(
        manager
            .expect("STATUS=generation 1: 2 of 2 workers serve")
            .contains("in the kernel")
    );

    // One that succeeds, and one that is refused at once.
    for spoil in [false, true] {
        if spoil {
            std::fs::write(proxy.file(), "no such key = 1").expect("spoiling the file");
        }
        let before = now_us();
        proxy.signal(Signal::SIGHUP);
        let reloading = manager.expect("RELOADING=1\nMONOTONIC_USEC=");
        let at: i64 = reloading
            .rsplit('=')
            .next()
            .and_then(|at| at.parse().ok())
            .expect("a time");
        assert!(before <= at && at <= now_us(), "{before} {reloading}");
        manager.expect("READY=1");
    }
    assert!(proxy.log().contains("reload refused"), "{}", proxy.log());

    proxy.signal(Signal::SIGTERM);
    manager.expect("STOPPING=1");
    assert!(proxy.wait_for_exit(PATIENCE).is_some_and(|exit| exit.success()));
    let rest = manager.gather(Duration::ZERO);
    assert!(
        rest.iter().all(|message| message.starts_with("STATUS=")),
        "{rest:?}"
    );
}

#[test]
fn start_reload_and_stop_are_told_at_a_path() {
    let scratch = crate::harness::Scratch::new();
    let path = scratch.file("notify");
    let address = SocketAddr::from_pathname(&path).expect("an address");
    follows_start_reload_and_stop(&address, &path.display().to_string());
}

#[test]
fn start_reload_and_stop_are_told_at_an_abstract_name() {
    let name = format!("culvert-test-{}-notify", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("an address");
    follows_start_reload_and_stop(&address, &format!("@{name}"));
}

#[test]
fn signs_of_life_come_twice_as_often_as_asked_for_and_end_when_the_master_hangs() {
    let name = format!("culvert-test-{}-watchdog", std::process::id());
    let manager = Manager::at(&SocketAddr::from_abstract_name(&name).expect("an address"));
    let proxy = start(&format!("@{name}"), Some("1000000"));
    manager.expect("READY=1");
    let beats = |messages: Vec<String>| messages.iter().filter(|message| *message == "WATCHDOG=1").count();
    manager.gather(Duration::ZERO);
    let begun = Instant::now();
    let counted = beats(manager.gather(Duration::from_secs(4)));
    let due = begun.elapsed().as_millis() as usize / 500;
    // Each may be a little late; half as many would be what was asked for.
    assert!(
        (due * 5 / 8..=due + 1).contains(&counted),
        "{counted} signs of life, {due} were due"
    );
    let master = Pid::from_raw(proxy.pid());
    kill(master, Signal::SIGSTOP).expect("stopping the master");
    pause(100);
    manager.gather(Duration::ZERO);
    let counted = beats(manager.gather(Duration::from_secs(2)));
    kill(master, Signal::SIGCONT).expect("letting the master go on");
    assert_eq!(counted, 0, "a stopped master gives signs of life");
    manager.expect("WATCHDOG=1");
}

#[test]
fn a_service_manager_that_is_not_there_harms_nothing() {
    let mut proxy = start("@culvert-test-nobody-listens", Some("400000"));
    assert_eq!(proxy.status().workers().len(), 2);
    proxy.stop();
}
