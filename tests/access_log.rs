//! Access logs: lines against what the ends counted, rotation under load, disks that take nothing.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::time::Instant;

use crate::harness::pattern::{ping, receive_from};
use crate::harness::program::need;
use crate::harness::{
    Flag, PATIENCE, Plan, Port, Proxy, Received, Upstream, connect, process, receive, send, within,
};
use crate::keeper_room::leave_room_for;
use crate::reload::{HALVES, half_a_reload, tell};
use nix::sys::signal::Signal;
use serde_json::Value;

const UP: u64 = 11;
const DOWN: u64 = 22;
const UP_BYTES: u64 = 300_007;
const DOWN_BYTES: u64 = 700_001;

/// Takes the client's stream to its end, then sends its own.
fn server() -> Upstream<Received> {
    Upstream::serve("127.0.0.1", |mut stream| {
        let received = receive(&mut stream, UP);
        send(&mut stream, DOWN, 0, DOWN_BYTES).expect("sending to the client");
        received
    })
}

/// `access_log` with the ready-made JSON format.
fn json_log(file: &Path) -> String {
    format!(
        "access_log = {{ path = \"{}\", format = \"json\", flush = \"50ms\" }}",
        file.display()
    )
}

/// The lines of a file, once there are as many as are wanted.
#[track_caller]
fn lines(file: &Path, wanted: usize) -> Vec<Value> {
    let read = || std::fs::read_to_string(file).unwrap_or_default();
    let came = within(PATIENCE, || read().lines().count() >= wanted);
    let text = read();
    assert!(came, "{wanted} lines are wanted in {}: {text}", file.display());
    assert!(text.is_empty() || text.ends_with('\n'));
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    text.lines().map(parse).collect()
}

#[track_caller]
fn number(line: &Value, key: &str) -> u64 {
    line[key]
        .as_u64()
        .unwrap_or_else(|| panic!("no number {key} in {line}"))
}

#[track_caller]
fn text<'l>(line: &'l Value, key: &str) -> &'l str {
    line[key]
        .as_str()
        .unwrap_or_else(|| panic!("no text {key} in {line}"))
}

#[test]
fn a_line_says_what_both_ends_counted_whoever_carried_it() {
    for (datapath, setting) in [("sockmap", "true"), ("relay", "false")] {
        let upstream = server();
        let mut plan = Plan::new().stream(&format!("ebpf_enable = {setting}"));
        let file = plan.file("access.log");
        let front = plan.server_with("127.0.0.1", &upstream, &json_log(&file));
        let proxy = plan.start();
        let mut client = connect(front);
        let port = client.local_addr().expect("an address").port();
        // Early bytes may be copied: let the kernel take the session first.
        proxy.wait("the session has begun", |s| {
            (s.active(), s.offloaded()) == (1, u64::from(datapath == "sockmap"))
        });
        send(&mut client, UP, 0, UP_BYTES).expect("sending");
        client.shutdown(Shutdown::Write).expect("ending");
        receive(&mut client, DOWN).must_be_whole(DOWN_BYTES);
        upstream.result().must_be_whole(UP_BYTES);
        proxy.settle();

        let lines = lines(&file, 1);
        let line = &lines[0];
        for (key, bytes) in [
            ("bytes_received", UP_BYTES),
            ("bytes_sent", DOWN_BYTES),
            ("upstream_bytes_sent", UP_BYTES),
            ("upstream_bytes_received", DOWN_BYTES),
        ] {
            assert_eq!(number(line, key), bytes, "{key}: {line}");
        }
        assert_eq!(
            number(line, "sockmap_to_upstream") + number(line, "relay_to_upstream"),
            UP_BYTES
        );
        assert_eq!(
            number(line, &format!("{datapath}_to_downstream")),
            DOWN_BYTES,
            "{line}"
        );
        assert_eq!(text(line, "datapath"), datapath);
        assert_eq!(text(line, "close_reason"), "finished");
        assert_eq!(number(line, "status"), 200);
        assert_eq!(text(line, "remote_addr"), "127.0.0.1");
        assert_eq!(number(line, "remote_port"), u64::from(port));
        assert_eq!(number(line, "server_port"), u64::from(front.port()));
        assert_eq!(text(line, "listener"), front.to_string());
        assert_eq!(text(line, "upstream_addr"), upstream.address.to_string());
        assert!(text(line, "upstream_connect_time").starts_with("0."), "{line}");
        assert_eq!(number(line, "pid"), proxy.worker() as u64);
        let threads = std::fs::read_dir(format!("/proc/{}/task", proxy.worker())).expect("threads");
        let confinement: Vec<String> = threads
            .flatten()
            .map(|thread| thread.file_name().to_string_lossy().parse().expect("a number"))
            .map(|thread| process::field(thread, "Seccomp"))
            .collect();
        assert_eq!(
            confinement, ["2"; 3],
            "the writer of a log is as confined as the rest"
        );
        assert!(
            !proxy.log().contains("closed: finished"),
            "the error log repeats the line: {}",
            proxy.log()
        );
    }
}

#[test]
fn a_session_that_no_peer_takes_is_a_502_with_every_peer_that_was_tried() {
    let (one, two) = (Port::claim(), Port::claim());
    let upstream = Upstream::echo("127.0.0.1");
    let (one, two) = (one.on("127.0.0.1"), two.on("127.0.0.1"));
    let groups = format!(
        "[[upstream]]\nname = \"none\"\nserver = [\"{one}\", \"{two}\"]\n\n\
         [[upstream]]\nname = \"last\"\nserver = [{{ address = \"{one}\", weight = 9 }}, \"{}\"]\n",
        upstream.address
    );
    let mut plan = Plan::new().tables(&groups);
    let file = plan.file("access.log");
    let nowhere = plan.server_with("127.0.0.1", "none", &json_log(&file));
    let somewhere = plan.server_with("127.0.0.1", "last", &json_log(&file));
    let proxy = plan.start();
    let mut client = connect(nowhere);
    assert!(!matches!(client.read(&mut [0; 1]), Ok(1..)));
    lines(&file, 1);
    ping(&mut connect(somewhere), 1, 1).expect("an echo");
    let lines = lines(&file, 2);
    assert_eq!(number(&lines[0], "status"), 502);
    assert_eq!(text(&lines[0], "close_reason"), "connect_failed");
    assert_eq!(text(&lines[0], "upstream_addr"), format!("{one}, {two}"));
    assert_eq!(text(&lines[0], "upstream_connect_time"), "-, -");
    assert_eq!(number(&lines[1], "status"), 200);
    assert_eq!(
        text(&lines[1], "upstream_addr"),
        format!("{one}, {}", upstream.address)
    );
    assert!(text(&lines[1], "upstream_connect_time").starts_with("-, 0."));
    proxy.settle();
}

#[test]
fn what_a_line_says_of_the_peers_that_were_tried_is_what_nginx_says() {
    let upstream = Upstream::echo("127.0.0.1");
    let ports: Vec<Port> = (0..6).map(|_| Port::claim()).collect();
    let at = |index: usize| ports[index].on("127.0.0.1");
    let (one, two, good) = (at(0), at(1), upstream.address);
    let groups = [
        ("refused", format!("{one}"), format!("{two}"), false),
        ("second", format!("{one}"), format!("{good}"), false),
        ("downed", format!("{one}"), format!("{good}"), true),
        ("denied", format!("{good}"), format!("{two}"), false),
    ];
    let format = "$status [$upstream_addr] $upstream_connect_time / $upstream_session_time \
                  [$upstream_bytes_sent] [$upstream_bytes_received]";
    let mut plan = Plan::new();
    let (ours, theirs) = (plan.file("ours.log"), plan.file("theirs.log"));
    plan = plan.tables(&format!(
        "[[log_format]]\nname = \"tried\"\nformat = \"{format}\"\n"
    ));
    let mut block = format!(
        "log_format tried '{format}'; access_log {} tried;\nserver {{ listen {}; return up; access_log off; }}\n",
        theirs.display(),
        at(2)
    );
    let mut fronts = Vec::new();
    for ((name, first, last, down), port) in groups.iter().zip(&ports[2..]) {
        let is_down = if *down { "down" } else { "" };
        let deny = if *name == "denied" { "deny all;" } else { "" };
        block.push_str(&format!(
            "upstream {name} {{ server {first} weight=9 {is_down}; server {last} {is_down}; }}\n"
        ));
        let listen = port.on("127.0.0.2");
        block.push_str(&format!(
            "server {{ listen {listen}; {deny} proxy_pass {name}; }}\n"
        ));
        plan = plan.tables(&format!(
            "[[upstream]]\nname = \"{name}\"\nserver = [{{ address = \"{first}\", weight = 9, down = {down} }}, \
             {{ address = \"{last}\", down = {down} }}]\n"
        ));
        let access = if deny.is_empty() {
            ""
        } else {
            "access = [\"deny all\"]\n"
        };
        let log = format!(
            "{access}access_log = {{ path = \"{}\", format = \"tried\", flush = \"0\" }}",
            ours.display()
        );
        fronts.push((listen, plan.server_with("127.0.0.1", *name, &log)));
    }
    let _nginx = crate::syslog::nginx(&plan, &block, at(2));
    let proxy = plan.start();
    let said = |file: &Path, count: usize| {
        let read = || std::fs::read_to_string(file).unwrap_or_default();
        assert!(
            within(PATIENCE, || read().lines().count() == count),
            "{}: {}",
            count,
            read()
        );
        read().lines().last().expect("a line").to_owned()
    };
    for (at, (nginx, ours_at)) in fronts.iter().enumerate() {
        let lines = [(nginx, &theirs), (ours_at, &ours)].map(|(front, file)| {
            // A client that is not let in may be reset before connecting has returned.
            let client = TcpStream::connect(*front);
            let echoed = client.is_ok_and(|mut client| ping(&mut client, 1, 2).is_ok());
            assert_eq!(echoed, groups[at].0 == "second", "{}", groups[at].0);
            without_times(&said(file, at + 1))
        });
        assert_eq!(lines[0], lines[1], "nginx's line and ours for {}", groups[at].0);
    }
    proxy.settle();
}

/// The same with all times alike.
fn without_times(text: &str) -> String {
    let words = text
        .split(' ')
        .map(|word| match word.trim_end_matches(',').parse::<f64>() {
            Ok(_) if word.contains('.') => word.replace(|c: char| c.is_ascii_digit(), "0"),
            _ => word.to_owned(),
        });
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn a_session_that_an_earlier_worker_began_has_one_line_with_all_its_bytes() {
    let upstream = server();
    let mut plan = Plan::new();
    let file = plan.file("access.log");
    let front = plan.server_with("127.0.0.1", &upstream, &json_log(&file));
    let proxy = plan.start();
    let first = proxy.worker();
    let mut client = connect(front);
    send(&mut client, UP, 0, 1000).expect("sending");
    proxy.signal(Signal::SIGHUP);
    proxy.wait("another worker has the session", |s| {
        let workers = s.workers();
        workers.len() == 1 && workers[0].pid != first && workers[0].sessions == 1
    });
    send(&mut client, UP, 1000, UP_BYTES).expect("sending on");
    client.shutdown(Shutdown::Write).expect("ending");
    receive(&mut client, DOWN).must_be_whole(DOWN_BYTES);
    proxy.settle();
    let lines = lines(&file, 1);
    assert_eq!(lines.len(), 1);
    assert_eq!(number(&lines[0], "bytes_received"), UP_BYTES);
    assert_eq!(number(&lines[0], "bytes_sent"), DOWN_BYTES);
    assert_eq!(number(&lines[0], "pid"), proxy.worker() as u64);
    assert!(text(&lines[0], "upstream_connect_time").starts_with("0."));
}

#[test]
fn rotation_under_load_loses_no_line() {
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2);
    let file = plan.file("access.log");
    let front = plan.server_with("127.0.0.1", &upstream, &json_log(&file));
    let mut proxy = plan.start();
    let enough = Flag::default();
    let (mut sessions, mut files) = (0, Vec::new());
    std::thread::scope(|scope| {
        let _end = enough.raise_at_the_end();
        let load = || {
            let mut sessions = 0;
            while !enough.is_up() {
                ping(&mut connect(front), sessions, 1).expect("an echo");
                sessions += 1;
            }
            sessions
        };
        let threads = [scope.spawn(load), scope.spawn(load)];
        for round in 0..12 {
            assert!(
                within(PATIENCE, || file.metadata().is_ok_and(|data| data.len() > 0)),
                "no lines come"
            );
            let moved = proxy.dir().join(format!("access.log.{round}"));
            std::fs::rename(&file, &moved).expect("moving the log away");
            files.push(moved);
            // A reload opens the files anew as well, and leaves workers of the old generation behind.
            let (signal, word) = match round % 4 {
                3 => (Signal::SIGHUP, "generation"),
                _ => (Signal::SIGUSR1, "the log"),
            };
            proxy.signal(signal);
            assert!(within(PATIENCE, || file.exists()), "no new file after {word}");
        }
        enough.raise();
        sessions = threads
            .into_iter()
            .map(|thread| thread.join().expect("a client"))
            .sum();
    });
    proxy.settle();
    proxy.stop();
    // Into the last one nothing may have come.
    files.push(file);
    let mut numbers: Vec<u64> = files
        .iter()
        .flat_map(|file| lines(file, 0))
        .map(|line| number(&line, "connection"))
        .collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (1..=sessions).collect::<Vec<u64>>());
}

#[test]
fn a_worker_that_drains_writes_to_the_new_file() {
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let file = plan.file("access.log");
    let front = plan.server_with("127.0.0.1", &upstream, &json_log(&file));
    let proxy = plan.start();
    let mut client = connect(front);
    ping(&mut client, 1, 1).expect("an echo");
    let worker = proxy.worker();
    // Paused, the master has no other worker, and this one waits for its session.
    proxy.signal(Signal::SIGWINCH);
    let old = proxy.dir().join("old");
    std::fs::rename(&file, &old).expect("moving the log away");
    proxy.signal(Signal::SIGUSR1);
    let let_go = || !process::descriptors(worker).contains(&old);
    assert!(within(PATIENCE, || file.exists() && let_go()));
    ping(&mut client, 1, 1).expect("an echo");
    drop(client);
    let lines = lines(&file, 1);
    assert_eq!(number(&lines[0], "pid"), worker as u64);
    assert_eq!(number(&lines[0], "bytes_sent"), 48);
}

#[test]
fn logs_that_are_rotated_during_a_reload_are_new_for_the_next_generation_too() {
    let upstream = Upstream::echo("127.0.0.1");
    let begin = || {
        let mut plan = Plan::new().workers(2);
        let file = plan.file("access.log");
        let front = plan.server_with("127.0.0.1", &upstream, &json_log(&file));
        let proxy = plan.start();
        half_a_reload(&proxy).map(|half| (file, front, proxy, half))
    };
    let (file, front, proxy, (old, last)) = (0..HALVES)
        .find_map(|_| begin())
        .expect("a worker that is not ready");
    let moved = proxy.dir().join("moved");
    std::fs::rename(&file, &moved).expect("moving the log away");
    proxy.signal(Signal::SIGUSR1);
    assert!(within(PATIENCE, || file.exists()));
    old.iter()
        .chain([&last])
        .for_each(|&pid| tell(pid, Signal::SIGCONT));
    let status = proxy.wait("the next generation serves", |s| s.generation() == 2);
    // Those that replace its workers get what the master has.
    for worker in status.workers().iter().filter(|worker| !worker.draining) {
        tell(worker.pid, Signal::SIGKILL);
    }
    proxy.wait("others have come", |s| {
        let new = |pid: i32| status.workers().iter().all(|worker| worker.pid != pid);
        s.workers().len() == 2 && s.workers().iter().all(|worker| new(worker.pid))
    });
    for _ in 0..6 {
        ping(&mut connect(front), 1, 1).expect("an echo");
    }
    assert_eq!(lines(&file, 6).len(), 6);
    assert_eq!(lines(&moved, 0).len(), 0);
}

#[test]
fn a_worker_hears_of_new_logs_however_many_descriptors_are_under_way() {
    const LOGS: usize = 30;
    need("setpriv", "util-linux");
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().launched_by(&["setpriv", "--bounding-set=-sys_resource", "--"]);
    let files: Vec<_> = (0..LOGS)
        .map(|log| plan.file(&format!("access-{log}.log")))
        .collect();
    let fronts: Vec<_> = files
        .iter()
        .map(|file| plan.server_with("127.0.0.1", &upstream, &json_log(file)))
        .collect();
    let proxy = plan.start();
    let worker = proxy.worker();
    tell(worker, Signal::SIGSTOP);
    // Each time all logs are sent to it, and the kernel lets so many be under way as the master may have open.
    leave_room_for(proxy.pid(), 5 * LOGS as u64);
    for _ in 0..15 {
        std::fs::rename(&files[0], proxy.dir().join("old")).expect("moving the log away");
        proxy.signal(Signal::SIGUSR1);
        assert!(within(PATIENCE, || files[0].exists()), "{}", proxy.log());
    }
    tell(worker, Signal::SIGCONT);
    ping(&mut connect(fronts[0]), 1, 1).expect("an echo");
    assert_eq!(lines(&files[0], 1).len(), 1);
}

#[test]
fn a_full_disk_costs_lines_and_nothing_else() {
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server_with("127.0.0.1", &upstream, &json_log(Path::new("/dev/full")));
    let proxy = plan.start();
    for seed in 0..50 {
        ping(&mut connect(front), seed, 1).expect("an echo");
    }
    proxy.settle();
    proxy.wait("every line is counted as dropped", |s| {
        s.number("/access_log/dropped") == 50
    });
    assert_eq!(proxy.status().number("/access_log/written"), 0);
    proxy.must_say(
        "the access log /dev/full loses lines (dropped, in the status, counts them): No space left on device",
    );
    let log = proxy.log();
    assert_eq!(log.matches("[error] ").count(), 1, "{log}");
}

/// A proxy that logs lines of 100 kB to a pipe, at once, and where it listens.
fn before_a_pipe(upstream: &Upstream<()>) -> (Proxy, std::net::SocketAddr, std::path::PathBuf) {
    let wide = "x".repeat(100_000);
    let mut plan = Plan::new().tables(&format!(
        "[[log_format]]\nname = \"wide\"\nformat = \"$connection {wide}\""
    ));
    let pipe = plan.file("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("a named pipe");
    let log = format!(
        "access_log = {{ path = \"{}\", format = \"wide\", flush = \"0\" }}",
        pipe.display()
    );
    let front = plan.server_with("127.0.0.1", upstream, &log);
    (plan.start(), front, pipe)
}

#[test]
fn a_reader_that_is_stuck_holds_up_no_session_and_the_lost_lines_are_counted() {
    let upstream = Upstream::echo("127.0.0.1");
    let (mut proxy, front, pipe) = before_a_pipe(&upstream);
    let started = Instant::now();
    for seed in 0..200 {
        ping(&mut connect(front), seed, 1).expect("an echo");
    }
    assert!(started.elapsed() < PATIENCE, "sessions waited for the log");
    proxy.settle();
    let dropped = proxy
        .wait("lines are dropped", |s| s.number("/access_log/dropped") > 0)
        .number("/access_log/dropped");
    // 8 MiB wait for the reader; whoever comes reads them.
    let mut reader = std::fs::File::open(&pipe).expect("the pipe");
    let reading = std::thread::spawn(move || {
        let (mut buffer, mut lines) = (vec![0; 1 << 20], 0);
        while lines < 200 - dropped {
            let read = reader.read(&mut buffer).expect("reading the pipe");
            lines += buffer[..read].iter().filter(|byte| **byte == b'\n').count() as u64;
        }
        lines
    });
    assert_eq!(reading.join().expect("the reader") + dropped, 200);
    proxy.wait("the rest is counted as written", |s| {
        s.number("/access_log/written") == 200 - dropped
    });
    proxy.stop();
}

#[test]
fn a_stuck_reader_does_not_keep_the_program_from_stopping() {
    let upstream = Upstream::echo("127.0.0.1");
    let (mut proxy, front, _pipe) = before_a_pipe(&upstream);
    for seed in 0..5 {
        ping(&mut connect(front), seed, 1).expect("an echo");
    }
    proxy.settle();
    proxy.stop();
}

#[test]
fn lines_are_written_before_the_program_ends() {
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let file = plan.file("access.log");
    let log = format!(
        "access_log = {{ path = \"{}\", format = \"json\", buffer = \"1m\", flush = \"1h\" }}",
        file.display()
    );
    let front = plan.server_with("127.0.0.1", &upstream, &log);
    let mut proxy = plan.start();
    let mut client = connect(front);
    ping(&mut client, 1, 1).expect("an echo");
    client.write_all(b"and a byte more").expect("writing");
    receive_from(&mut client, 0, 0, 15);
    assert_eq!(
        std::fs::read(&file).expect("the log").len(),
        0,
        "it waits for others"
    );
    proxy.stop();
    let lines = lines(&file, 1);
    assert_eq!(text(&lines[0], "close_reason"), "shutdown");
    assert_eq!(number(&lines[0], "bytes_sent"), 39);
}
