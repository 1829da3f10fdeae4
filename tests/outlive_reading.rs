//! Sessions whose workers are replaced or killed before a byte of theirs moves: while a PROXY header or a TLS hello is still
//! to come, or while the peer is being connected and is then to be told who the client is. They go on in the next worker
//! with what is already known of them and with the time that they have left.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::harness::hello::hello;
use crate::harness::load::KEPT_AFTER;
use crate::harness::pattern::{fill, pause, ping};
use crate::harness::sockets::Deaf;
use crate::harness::{
    Bytes, Ending, Front, PATIENCE, Plan, Port, Proxy, Upstream, connect, patient, process, receive,
    upstream, within,
};
use culvert_shared::sessions::Record;
use culvert_shared::sys::shm::Shared;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const TRUST: &str = "set_real_ip_from = \"127.0.0.0/8\"";
const IN: &str = "proxy_protocol = true";
const V1: &[u8] = b"PROXY TCP4 192.0.2.7 198.51.100.9 40000 443\r\n";
/// What a peer is told of a client that [`V1`] names.
const BELIEVED: &str = "192.0.2.7 127.0.0.1 40000";
const PAYLOAD: usize = 30_000;

/// A header of version 2 that names 192.0.2.7:40000, with a TLV of nothing.
fn v2() -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec();
    header.extend((12 + 103_u16).to_be_bytes());
    header.extend([192, 0, 2, 7, 198, 51, 100, 9, 0x9c, 0x40, 0x01, 0xbb]);
    header.extend([4, 0, 100]);
    header.extend([0; 100]);
    header
}

fn read_line(stream: &mut TcpStream) -> String {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while !line.ends_with(b"\n") && stream.read(&mut byte).is_ok_and(|read| read == 1) {
        line.push(byte[0]);
    }
    String::from_utf8_lossy(&line).into_owned()
}

/// What a peer does: tells its client the header that it was sent, then gives everything back.
fn tell_and_echo(mut stream: TcpStream) {
    let line = read_line(&mut stream);
    let _ = stream.write_all(line.as_bytes());
    upstream::echo(stream);
}

/// A session in the making: what its client has still to send, and what the peer must hear of it.
struct Case {
    name: &'static str,
    client: TcpStream,
    rest: Vec<Vec<u8>>,
    /// What comes through the proxy in front of the payload, a hello.
    forwarded: Vec<u8>,
    /// The client as the peer is told of it.
    source: String,
    front: SocketAddr,
}

impl Case {
    /// `pieces[0]` is sent now, each further one when the session is played on.
    fn new(name: &'static str, front: SocketAddr, pieces: &[&[u8]], source: Option<&str>) -> Case {
        let mut client = connect(front);
        client.write_all(pieces[0]).expect("the first piece");
        let own = client.local_addr().expect("the client's address");
        Case {
            name,
            rest: pieces[1..].iter().map(|piece| piece.to_vec()).collect(),
            forwarded: Vec::new(),
            source: source.map_or_else(|| format!("{} 127.0.0.1 {}", own.ip(), own.port()), str::to_owned),
            client,
            front,
        }
    }

    /// The hello is forwarded.
    fn with_hello(mut self, hello: &[u8]) -> Case {
        self.forwarded = hello.to_vec();
        self
    }

    /// Sends the next piece.
    fn say_more(&mut self) {
        if !self.rest.is_empty() {
            let piece = self.rest.remove(0);
            self.client.write_all(&piece).expect("a further piece");
        }
    }

    /// Plays the session to its end; says how long the header was that the peer was sent.
    #[track_caller]
    fn play_on(mut self) -> u64 {
        let name = self.name;
        while !self.rest.is_empty() {
            self.say_more();
            pause(5);
        }
        let line = read_line(&mut self.client);
        let port = self.front.port();
        assert_eq!(line, format!("PROXY TCP4 {} {port}\r\n", self.source), "{name}");
        let mut payload = vec![0; PAYLOAD];
        fill(5, 0, &mut payload);
        let mut heard = vec![0; self.forwarded.len()];
        self.client.read_exact(&mut heard).expect("the hello again");
        assert_eq!(heard, self.forwarded, "{name}: the hello");
        self.client.write_all(&payload).expect("the payload");
        let mut heard = vec![0; PAYLOAD];
        self.client.read_exact(&mut heard).expect("the payload again");
        assert!(heard == payload, "{name}: the payload");
        self.client.shutdown(Shutdown::Write).expect("the end");
        receive(&mut self.client, 1).must_be_whole(0);
        line.len() as u64
    }
}

/// What happens to the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Reload,
    Kill,
}

/// An old worker waits for no client: it is gone long before the time of any of them is over.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// Replaces the worker; the old one must be gone soon.
#[track_caller]
fn replace(proxy: &Proxy, event: Event) {
    let old = proxy.worker();
    match event {
        Event::Reload => _ = proxy.reload(),
        Event::Kill => kill(Pid::from_raw(old), Signal::SIGKILL).expect("killing the worker"),
    }
    let gone = within(GONE_WITHIN, || !process::is_alive(old));
    assert!(gone, "{event:?}: process {old} has not gone");
    proxy.wait("one worker serves", |s| {
        let workers = s.workers();
        workers.len() == 1 && workers[0].pid != old
    });
}

fn every_stage_through(event: Event, times: usize) {
    let told = Upstream::serve("127.0.0.1", tell_and_echo);
    let named = format!(
        "[[upstream]]\nname = \"to-one.example-192.0.2.7\"\nserver = \"{0}\"\n\
         [[upstream]]\nname = \"to-one.example-127.0.0.1\"\nserver = \"{0}\"\n",
        told.address
    );
    let deaf = Deaf::new();
    let mut plan = Plan::new().tables(&named);
    let send = format!("{TRUST}\n{IN}");
    let tls = format!("{send}\nssl_preread = true");
    let by_name = "to-$ssl_preread_server_name-$remote_addr";
    let header = plan.server_listening(IN, &told, &send);
    let header_of_strangers = plan.server_listening(IN, &told, IN);
    let only_hello = plan.server_with("127.0.0.1", by_name, &tls);
    let both = plan.server_listening(IN, by_name, &tls);
    let to_deaf = plan.server_listening(IN, deaf.address, &send);
    let proxy = plan.start();

    let (v2, hello) = (v2(), hello("one.example"));
    let (half_v2, half_hello) = (v2.len() / 2, hello.len() / 2);
    let glued = [V1, &hello[..half_hello]].concat();
    let mut cases = vec![
        Case::new("nothing was sent", header, &[b"", V1], Some(BELIEVED)),
        Case::new(
            "half a header of version 1",
            header,
            &[&V1[..20], &V1[20..44], &V1[44..]],
            Some(BELIEVED),
        ),
        Case::new(
            "half a header of version 2",
            header,
            &[&v2[..5], &v2[5..half_v2], &v2[half_v2..]],
            Some(BELIEVED),
        ),
        Case::new(
            "half a header that is not believed",
            header_of_strangers,
            &[&V1[..20], &V1[20..]],
            None,
        ),
        Case::new("no hello", only_hello, &[b"", &hello], None).with_hello(&hello),
        Case::new(
            "half a hello",
            only_hello,
            &[&hello[..half_hello], &hello[half_hello..]],
            None,
        )
        .with_hello(&hello),
        Case::new(
            "a header and no hello",
            both,
            &[V1, &hello[..7], &hello[7..]],
            Some(BELIEVED),
        )
        .with_hello(&hello),
        Case::new(
            "a header glued to half a hello",
            both,
            &[&glued, &hello[half_hello..]],
            Some(BELIEVED),
        )
        .with_hello(&hello),
        Case::new(
            "half a header, then a hello",
            both,
            &[
                &v2[..half_v2],
                &[&v2[half_v2..], &hello[..9]].concat(),
                &hello[9..],
            ],
            Some(BELIEVED),
        )
        .with_hello(&hello),
    ];
    let early = b"said while the peer is being connected";
    let connecting = Case::new(
        "a header, and a peer that does not answer",
        to_deaf,
        &[&[V1, early].concat()],
        Some(BELIEVED),
    )
    .with_hello(early);
    std::thread::sleep(patient(KEPT_AFTER + Duration::from_millis(200)));
    if event == Event::Kill {
        proxy.wait("all are kept", |s| s.number("/sessions/kept") >= s.active());
    }
    for _ in 0..times {
        replace(&proxy, event);
        cases.iter_mut().for_each(Case::say_more);
        pause(50);
        if event == Event::Kill {
            proxy.wait("all are kept", |s| s.number("/sessions/kept") >= s.active());
        }
    }
    let _peer = Upstream::on(deaf.hear(), tell_and_echo);
    cases.push(connecting);
    let sessions = cases.len() as u64;
    let forwarded: usize = cases.iter().map(|case| PAYLOAD + case.forwarded.len()).sum();
    let headers: u64 = cases.into_iter().map(Case::play_on).sum();
    let status = proxy.settle();
    assert_eq!(status.number("/closes/finished"), sessions, "{:#}", status.json());
    assert_eq!(
        status.number("/sessions/total"),
        sessions,
        "none was counted twice"
    );
    assert_eq!(status.fallbacks(), 0);
    let both = |to_upstream, to_downstream| Bytes {
        to_upstream,
        to_downstream,
    };
    assert_eq!(status.relay(), both(headers, 0), "headers, each once");
    assert_eq!(
        status.sockmap(),
        both(forwarded as u64, forwarded as u64 + headers),
        "carried by the kernel"
    );
}

#[test]
fn sessions_that_are_read_ahead_or_connecting_come_through_a_reload() {
    every_stage_through(Event::Reload, 1);
}

#[test]
fn they_come_through_a_reload_after_each_piece() {
    every_stage_through(Event::Reload, 3);
}

#[test]
fn they_come_through_the_death_of_their_worker() {
    every_stage_through(Event::Kill, 2);
}

#[test]
fn a_client_that_sends_no_header_or_hello_is_given_up_at_its_own_time_whoever_waits_for_it() {
    const LIMIT: Duration = Duration::from_secs(4);
    // The program counts whole milliseconds, of its own clock.
    const ROUNDING: Duration = Duration::from_millis(5);
    let told = Upstream::serve("127.0.0.1", tell_and_echo);
    let mut plan =
        Plan::new().stream("proxy_protocol_timeout = \"4s\"\npreread_timeout = \"4s\"\naccess = []");
    let header = plan.server_listening(IN, &told, TRUST);
    let hello = plan.server_with("127.0.0.1", &told, "ssl_preread = true");
    let proxy = plan.start();
    let begun = Instant::now();
    let mut clients = [header, hello].map(connect);
    for (client, first) in clients.iter_mut().zip([&V1[..9], &[22, 3, 1]]) {
        client.write_all(first).expect("the beginning");
    }
    for _ in 0..2 {
        pause(1200);
        replace(&proxy, Event::Reload);
    }
    for mut client in clients {
        assert_eq!(receive(&mut client, 1).ending, Ending::Reset);
        // Time that began anew would be over after 6.4 s.
        let took = begun.elapsed();
        assert!(
            took + ROUNDING >= LIMIT && took < LIMIT + patient(Duration::from_millis(2300)),
            "closed after {took:?}"
        );
    }
    assert_eq!(proxy.settle().number("/closes/read_timeout"), 2);
}

/// A client that has said half of what it has to, and whose listener is then somewhere else.
fn with_its_listener_gone(on_reload: &str) -> (Proxy, Case, Upstream<()>) {
    let told = Upstream::serve("127.0.0.1", tell_and_echo);
    let mut plan = Plan::new().stream(&format!("on_reload = \"{on_reload}\""));
    let gone = plan.server_listening(IN, &told, &format!("{TRUST}\n{IN}"));
    let proxy = plan.start();
    let case = Case::new("half a header", gone, &[&V1[..9], &V1[9..]], Some(BELIEVED));
    proxy.wait("it is there", |s| s.active() == 1);
    let elsewhere = Port::claim();
    proxy.edit(&gone.to_string(), &elsewhere.on("127.0.0.1").to_string());
    (proxy, case, told)
}

#[test]
fn a_client_whose_listener_is_gone_before_it_has_said_where_to_goes_there_all_the_same() {
    let (proxy, mut case, _told) = with_its_listener_gone("keep");
    let old = proxy.worker();
    proxy.reload();
    proxy.reload();
    // Only the worker that accepted it knows where it would go. From then on any worker can have it.
    assert!(process::is_alive(old), "{}", proxy.log());
    case.say_more();
    let gone = within(GONE_WITHIN, || !process::is_alive(old));
    assert!(gone, "it holds its old worker: {}", proxy.log());
    case.play_on();
    let status = proxy.settle();
    assert_eq!(status.number("/closes/finished"), 1, "{:#}", status.json());
    assert_eq!(
        status.sockmap().to_upstream,
        PAYLOAD as u64,
        "{:#}",
        status.json()
    );
}

#[test]
fn a_worker_that_stays_for_such_a_client_hears_nothing_of_the_sessions_that_others_have_now() {
    const PINGS: u64 = 200;
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let gone = plan.server_listening(IN, &echo, IN);
    let front = plan.server_with("127.0.0.1", &echo, "ebpf_enable = false");
    let proxy = plan.start();
    let _case = Case::new("half a header", gone, &[&V1[..9]], None);
    let mut client = connect(front);
    ping(&mut client, 1, 1).expect("a session");
    proxy.wait("both are there", |s| s.active() == 2);
    let elsewhere = Port::claim();
    proxy.edit(&gone.to_string(), &elsewhere.on("127.0.0.1").to_string());
    let old = proxy.worker();
    proxy.reload();
    proxy.wait("each has one", |s| s.workers().iter().all(|w| w.sessions == 1));
    let before = process::voluntary_switches(old);
    for round in 0..PINGS {
        ping(&mut client, round, 1).expect("the session goes on");
    }
    let woken = process::voluntary_switches(old) - before;
    assert!(
        woken <= 10,
        "{PINGS} pings that others copy wake it {woken} times"
    );
}

#[test]
fn a_client_whose_listener_is_gone_before_it_has_said_where_to_is_reset_where_that_is_wanted() {
    let (proxy, mut case, _told) = with_its_listener_gone("close");
    replace(&proxy, Event::Reload);
    assert_eq!(receive(&mut case.client, 1).ending, Ending::Reset);
    assert_eq!(proxy.settle().number("/closes/removed"), 1);
}

#[test]
fn a_peer_that_was_tried_in_one_worker_is_not_tried_again_in_the_next() {
    for event in [Event::Reload, Event::Kill] {
        let (refuses, deaf) = (Port::claim().on("127.0.0.1"), Deaf::new());
        let peer = |address| format!("{{ address = \"{address}\", max_fails = 0 }}");
        let group = format!(
            "[[upstream]]\nname = \"group\"\nserver = [{}, {}]\n",
            peer(refuses),
            peer(deaf.address)
        );
        let mut plan = Plan::new()
            .stream("proxy_connect_timeout = \"4s\"")
            .tables(&group);
        let front = plan.server("group");
        let proxy = plan.start();
        let mut client = connect(front);
        let tries = |address: SocketAddr| {
            let words = format!("failed to connect to {address} ");
            proxy.log().matches(&words).count()
        };
        let refused = || within(PATIENCE, || tries(refuses) == 1);
        assert!(refused(), "{event:?}: {}", proxy.log());
        proxy.wait("it is kept", |s| s.number("/sessions/kept") == 1);
        replace(&proxy, event);
        assert_eq!(receive(&mut client, 1).ending, Ending::Reset);
        let told = within(PATIENCE, || tries(deaf.address) == 1);
        assert!(told && tries(refuses) == 1, "{event:?}: {}", proxy.log());
        assert_eq!(proxy.settle().number("/closes/connect_timeout"), 1);
    }
}

#[test]
fn a_peer_gets_the_header_that_was_to_be_sent_when_connecting_to_it_began_and_the_log_names_the_client() {
    let deaf = Deaf::new();
    let mut plan = Plan::new();
    let log = plan.file("access.log");
    let lines = format!(
        "{TRUST}\nproxy_protocol = \"v1\"\naccess_log = {{ path = \"{}\", format = \"json\", flush = \"50ms\" }}",
        log.display()
    );
    let front = plan.server_listening(IN, deaf.address, &lines);
    let proxy = plan.start();
    let case = Case::new("changed", front, &[V1], Some(BELIEVED));
    proxy.wait("it is there", |s| s.active() == 1);
    proxy.edit("proxy_protocol = \"v1\"", "proxy_protocol = false");
    replace(&proxy, Event::Reload);
    let _peer = Upstream::on(deaf.hear(), tell_and_echo);
    case.play_on();
    proxy.settle();
    let line = || std::fs::read_to_string(&log).unwrap_or_default();
    assert!(within(PATIENCE, || line().ends_with('\n')));
    assert!(line().contains("192.0.2.7"), "{}", line());
}

#[test]
fn clients_of_the_status_that_neither_ask_nor_read_do_not_keep_an_old_worker() {
    let told = Upstream::serve("127.0.0.1", tell_and_echo);
    let http = Port::claim();
    let listen = format!("http = {{ listen = \"{}\" }}", http.on("127.0.0.1"));
    let mut plan = Plan::new().global(&listen);
    plan.server(&told);
    let status = Port::claim();
    plan = plan.tables(&format!(
        "[[server]]\nlisten = {{ address = \"{}\", {IN} }}\nebpf_status_return = true\n",
        status.on("127.0.0.1")
    ));
    let proxy = plan.start();
    let mut asking = connect(http.on("127.0.0.1"));
    asking.write_all(b"GET /metr").expect("half a request");
    let mut waiting = connect(status.on("127.0.0.1"));
    waiting.write_all(&V1[..9]).expect("half a header");
    pause(50);
    replace(&proxy, Event::Reload);
    waiting.write_all(&V1[9..]).expect("the rest");
    let mut document = String::new();
    waiting.read_to_string(&mut document).expect("a document");
    assert!(document.starts_with('{'), "{document}");
}

#[test]
fn a_session_at_which_two_workers_died_is_reset_and_the_others_go_on() {
    let mut plan = Plan::new().global("worker_connections = 64");
    let front = Front::new(&mut plan, "127.0.0.1", "");
    let proxy = plan.start();
    let mut sessions: Vec<_> = (0..3).map(|_| front.open()).collect();
    proxy.wait("all are kept", |s| s.number("/sessions/kept") == 3);

    // As if two workers had begun to take the first session over, and no more was heard of them.
    let fds = std::fs::read_dir(format!("/proc/{}/fd", proxy.pid())).expect("the master's descriptors");
    let is_table = |path: &std::path::PathBuf| {
        std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("culvert-sessions"))
    };
    let path = fds.flatten().map(|entry| entry.path()).find(is_table);
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path.expect("a table of sessions"))
        .expect("the table");
    let records = Shared::<Record>::of_fd(std::os::fd::AsFd::as_fd(&file), 64).expect("the records");
    let client = sessions[0].0.local_addr().expect("the client's address");
    let record = records
        .iter()
        .find(|record| record.read().is_some_and(|saved| saved.client == client))
        .expect("its record");
    assert!(record.begin_adoption() && record.begin_adoption());

    replace(&proxy, Event::Kill);
    let (mut client, mut server) = sessions.remove(0);
    assert_eq!(receive(&mut client, 1).ending, Ending::Reset);
    assert_eq!(receive(&mut server, 1).ending, Ending::Reset);
    proxy.must_say("workers have died at taking it over");
    for (client, server) in sessions {
        let echo = std::thread::spawn(move || upstream::echo(server));
        let mut client = client;
        ping(&mut client, 4, 3).expect("a session that goes on");
        drop(client);
        echo.join().expect("the echo");
    }
    assert_eq!(proxy.settle().number("/closes/worker_died"), 1);
}
