//! Logs that are sent to syslog: what the datagrams say, beside nginx's, and that servers which are away, come back
//! or do not read cost nothing but lines.

use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::harness::pattern::ping;
use crate::harness::program::{Running, need};
use crate::harness::{PATIENCE, Plan, Port, Upstream, connect, within};
use nix::sys::signal::Signal;

const SOON: Duration = PATIENCE;

/// Datagrams as they come, until none is wanted any more.
fn reading(receive: impl Fn(&mut [u8]) -> std::io::Result<usize> + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(bytes) = receive(&mut buffer) {
            let line = String::from_utf8_lossy(&buffer[..bytes]).into_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// A syslog server over UDP.
fn udp(ip: &str) -> (SocketAddr, Receiver<String>) {
    let socket = UdpSocket::bind((ip, 0)).expect("binding a syslog server");
    let address = socket.local_addr().expect("its address");
    (address, reading(move |buffer| socket.recv(buffer)))
}

/// A syslog server on a unix socket, which closes when its lines are dropped and another has come.
fn unix(path: &Path) -> Receiver<String> {
    let socket = UnixDatagram::bind(path).expect("binding a syslog server");
    reading(move |buffer| socket.recv(buffer))
}

/// The next datagram for which `wanted` holds.
#[track_caller]
fn next(lines: &Receiver<String>, what: &str, wanted: impl Fn(&str) -> bool) -> String {
    let end = Instant::now() + SOON;
    let mut others = Vec::new();
    while let Ok(line) = lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
        if wanted(&line) {
            return line;
        }
        others.push(line);
    }
    panic!("no datagram {what}; there were: {others:#?}");
}

/// What stands before and behind the time, `Nov  3 01:02:03`.
#[track_caller]
fn without_time(line: &str) -> (String, String) {
    let (priority, rest) = line.split_once('>').expect("a priority");
    let (time, rest) = rest.split_at_checked(15).expect("a time");
    let bytes = time.as_bytes();
    assert!(
        bytes[3] == b' ' && bytes[6] == b' ' && bytes[9] == b':' && bytes[12] == b':',
        "{line}"
    );
    assert!(bytes[4] == b' ' || bytes[4].is_ascii_digit(), "{line}");
    (priority.to_owned(), rest.to_owned())
}

/// nginx with this `stream` block.
pub fn nginx(plan: &Plan, block: &str, listens: SocketAddr) -> Running {
    let file = plan.file("nginx.conf");
    let text = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\nmaster_process off;\n\
         error_log stderr notice;\npid {};\nevents {{ worker_connections 256; }}\nstream {{ {block} }}\n",
        plan.file("nginx.pid").display()
    );
    std::fs::write(&file, text).expect("nginx's configuration");
    let mut command = Command::new(need("nginx", "nginx-light libnginx-mod-stream"));
    command.arg("-c").arg(&file);
    Running::start(command).wait_for(listens)
}

#[test]
fn a_line_of_an_access_log_is_the_datagram_that_nginx_sends() {
    let upstream = Upstream::echo("127.0.0.1");
    let (four, four_lines) = udp("127.0.0.1");
    let (six, six_lines) = udp("::1");
    let mut plan = Plan::new();
    let path = plan.file("log.sock");
    let unix_lines = unix(&path);
    let format = "$protocol $status [$bytes_sent]";
    let targets = [
        (format!("syslog:server={four},tag=ours"), &four_lines),
        (
            format!("syslog:server={six},facility=local3,severity=warn,tag=Some_1,nohostname"),
            &six_lines,
        ),
        (
            format!("syslog:server=unix:{},facility=daemon,tag=a", path.display()),
            &unix_lines,
        ),
    ];
    plan = plan.tables(&format!(
        "[[log_format]]\nname = \"short\"\nformat = \"{format}\"\n"
    ));
    let mut block = format!("log_format short '{format}';\n");
    let ports: Vec<Port> = targets.iter().map(|_| Port::claim()).collect();
    let mut fronts = Vec::new();
    for ((target, _), port) in targets.iter().zip(&ports) {
        let line = format!("access_log = {{ path = \"{target}\", format = \"short\" }}");
        fronts.push(plan.server_with("127.0.0.1", &upstream, &line));
        block.push_str(&format!(
            "server {{ listen {}; proxy_pass {}; access_log {target} short; }}\n",
            port.on("127.0.0.1"),
            upstream.address
        ));
    }
    let _nginx = nginx(&plan, &block, ports[2].on("127.0.0.1"));
    let proxy = plan.start();
    for ((front, port), (target, lines)) in fronts.iter().zip(&ports).zip(&targets) {
        // Waiting for nginx to listen was a session too.
        while lines.try_recv().is_ok() {}
        let both = [port.on("127.0.0.1"), *front].map(|address| {
            ping(&mut connect(address), 1, 3).expect("an echo");
            without_time(&next(lines, "of a session", |line| !line.ends_with("[0]")))
        });
        assert_eq!(both[0], both[1], "nginx's and ours for {target}");
    }
    // A line is counted after it was sent.
    let status = proxy.wait("three lines are counted", |s| {
        s.number("/access_log/written") == 3
    });
    assert_eq!(status.number("/access_log/dropped"), 0);
}

#[test]
fn the_error_log_goes_to_syslog_with_the_severity_of_each_line() {
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let path = plan.file("log.sock");
    let lines = unix(&path);
    let front = plan.server(&upstream);
    let proxy = plan
        .global(&format!(
            "error_log = {{ path = \"syslog:server=unix:{},facility=daemon,tag=one,nohostname\", level = \"info\" }}",
            path.display()
        ))
        .start();
    let master = format!(" {}: ", proxy.pid());
    let line = next(&lines, "of the master", |line| {
        line.contains(" serves with 1 workers") && line.contains(&master)
    });
    // daemon is 3, info 6.
    let (priority, rest) = without_time(&line);
    assert_eq!(priority, "<30");
    assert!(rest.starts_with(" one: "), "{line}");
    assert!(!line.ends_with('\n'), "{line:?}");
    let worker = format!(" {}: ", proxy.worker());
    ping(&mut connect(front), 1, 3).expect("an echo");
    let line = next(&lines, "of the session", |line| {
        line.contains("closed: finished") && line.contains(&worker)
    });
    assert_eq!(without_time(&line).0, "<30");
    // The worker has another socket after this, and is told what it is.
    proxy.signal(Signal::SIGUSR1);
    next(&lines, "of the signal", |line| line.contains("SIGUSR1"));
    ping(&mut connect(front), 1, 3).expect("an echo");
    let line = next(&lines, "of the session", |line| line.contains("closed: finished"));
    let (priority, rest) = without_time(&line);
    assert!(priority == "<30" && rest.starts_with(" one: "), "{line}");

    let text = std::fs::read_to_string(proxy.file()).expect("the configuration");
    std::fs::write(proxy.file(), format!("wrong = true\n{text}")).expect("writing it");
    proxy.signal(Signal::SIGHUP);
    let line = next(&lines, "of the refused file", |line| line.contains("[error]"));
    assert_eq!(without_time(&line).0, "<27");
    std::fs::write(proxy.file(), text).expect("writing it");
    assert!(!proxy.log().contains("[error]"), "{}", proxy.log());
}

#[test]
fn a_reload_changes_from_a_file_to_syslog_and_back() {
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let file = plan.file("error.log");
    let (server, lines) = udp("127.0.0.1");
    let front = plan.server(&upstream);
    let log = format!("path = \"{}\"", file.display());
    let syslog = format!("path = \"syslog:server={server},tag=two\"");
    let proxy = plan.global(&format!("error_log = {{ {log} }}")).start();
    let session = || ping(&mut connect(front), 1, 3).expect("an echo");
    let ends = || {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(!text.contains(" two: "), "a header of syslog in a file: {text}");
        text.matches("closed: finished").count()
    };
    session();
    assert!(within(SOON, || ends() == 1));
    proxy.edit(&log, &syslog);
    proxy.reload();
    session();
    let line = next(&lines, "of a session", |line| line.contains("closed: finished"));
    assert!(line.contains(" two: "), "{line}");
    proxy.edit(&syslog, &log);
    proxy.reload();
    session();
    assert!(within(SOON, || ends() == 2));
}

#[test]
fn a_syslog_server_that_comes_back_has_lines_again() {
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2);
    let path = plan.file("log.sock");
    let target = format!("syslog:server=unix:{}", path.display());
    let front = plan.server_with(
        "127.0.0.1",
        &upstream,
        &format!("access_log = \"{target},tag=access\""),
    );
    // Nobody is there: it starts all the same.
    let proxy = plan
        .global(&format!("error_log = {{ path = \"{target},tag=error\" }}"))
        .start();
    ping(&mut connect(front), 1, 3).expect("an echo");
    let status = proxy.wait("the lines are counted as dropped", |s| {
        s.number("/access_log/dropped") == 1 && s.number("/log_lines_dropped") > 0
    });
    assert_eq!(status.number("/access_log/written"), 0);
    for round in 1..=3 {
        let socket = UnixDatagram::bind(&path).expect("binding a syslog server");
        socket.set_read_timeout(Some(SOON)).expect("a timeout");
        let read = |tag: &str| {
            let mut buffer = [0; 4096];
            loop {
                let bytes = socket.recv(&mut buffer).expect(tag);
                if String::from_utf8_lossy(&buffer[..bytes]).contains(tag) {
                    return;
                }
            }
        };
        ping(&mut connect(front), round, 3).expect("an echo");
        read(" access: ");
        proxy.signal(Signal::SIGUSR1);
        read(" error: ");
        drop(socket);
        std::fs::remove_file(&path).expect("removing the socket");
    }
    // A line is counted after it was sent.
    proxy.wait("three lines are counted", |s| {
        s.number("/access_log/written") == 3
    });
}

#[test]
fn a_syslog_server_that_does_not_read_holds_nobody_up() {
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let path = plan.file("log.sock");
    // It is there and never looks.
    let _socket = UnixDatagram::bind(&path).expect("binding a syslog server");
    let target = format!("syslog:server=unix:{}", path.display());
    let front = plan.server_with("127.0.0.1", &upstream, &format!("access_log = \"{target}\""));
    let mut proxy = plan
        .global(&format!(
            "error_log = {{ path = \"{target}\", level = \"debug\" }}"
        ))
        .start();
    let started = Instant::now();
    for round in 0..600 {
        ping(&mut connect(front), round, 1).expect("an echo");
    }
    for _ in 0..3 {
        proxy.reload();
    }
    let lasted = started.elapsed();
    assert!(
        lasted < Duration::from_secs(20),
        "600 sessions and three reloads took {lasted:?}"
    );
    ping(&mut connect(front), 1, 1).expect("an echo");
    proxy.wait("lines of the master are counted", |s| {
        s.number("/log_lines_dropped") > 0
    });
    proxy.signal(Signal::SIGQUIT);
    let exit = proxy.wait_for_exit(PATIENCE);
    assert!(exit.is_some_and(|exit| exit.success()), "{exit:?}");
}
