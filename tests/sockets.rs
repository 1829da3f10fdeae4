//! What `listen` says of a socket besides its address, proved by what the kernel then does; unix sockets and ranges of
//! ports as listeners.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::pattern::{pause, ping};
use crate::harness::program::{need, run, shell};
use crate::harness::sockets::{number_after, ss, try_connect};
use crate::harness::{
    Flag, PATIENCE, Plan, Port, Proxy, Status, Upstream, connect, process, receive, receive_exactly, send,
    upstream, within,
};
use nix::sys::signal::Signal;

/// Sessions that a listener has taken.
#[track_caller]
fn accepted(status: &Status, address: &str) -> u64 {
    let listeners = status.json()["listeners"].as_array().expect("listeners");
    let row = listeners.iter().find(|row| row["address"] == address);
    let row = row.unwrap_or_else(|| panic!("no listener {address}: {:#}", status.json()));
    row["accepted"].as_u64().expect("a number")
}

#[test]
fn clients_are_probed_as_the_listener_says_and_peers_as_the_host_does() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let probed = plan.server_listening(
        "so_keepalive = \"33s:7s:3\"",
        &echo,
        "proxy_socket_keepalive = true",
    );
    let not = plan.server(&echo);
    let proxy = plan.start();
    let mut clients = [probed, not].map(connect);
    clients
        .iter_mut()
        .for_each(|client| ping(client, 1, 1).expect("a session"));
    let timer = ss("-o", &format!("sport = :{}", probed.port()));
    let left = number_after(&timer, "timer:(keepalive,");
    assert!((25..=33).contains(&left) && timer.contains("sec"), "{timer}");
    let timer = ss("-o", &format!("sport = :{}", not.port()));
    assert!(!timer.contains("keepalive"), "{timer}");
    // The proxy's two connections to the upstream: of the host's two hours, and without.
    let both = ss(
        "-op",
        &format!("dport = :{} and ( src 127.0.0.1 )", echo.address.port()),
    );
    assert_eq!(both.matches("timer:(keepalive,").count(), 1, "{both}");
    proxy.wait("both are in the kernel", |s| s.offloaded() == 2);
}

#[test]
fn sockets_have_the_congestion_control_that_the_file_says() {
    let read = |name: &str| {
        let path = format!("/proc/sys/net/ipv4/{name}");
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    let default = read("tcp_congestion_control").trim().to_owned();
    let allowed = read("tcp_allowed_congestion_control");
    // reno is always among them.
    let other = allowed.split_whitespace().find(|name| *name != default);
    let other = other.expect("a host that allows another one than its default");
    // No network is shared over the loopback device: what paces is not used there unless the file says so.
    let unpaced = if default.starts_with("bbr") {
        "reno"
    } else {
        &default
    };
    let echo = Upstream::echo("127.0.0.1");
    let cases = [("auto", unpaced), ("system", &default), (other, other)];
    for (said, expected) in cases {
        let mut plan = Plan::new();
        let front = plan.server_listening("", &echo, &format!("tcp_congestion = \"{said}\""));
        let proxy = plan.start();
        let mut client = connect(front);
        ping(&mut client, 1, 1).expect("a session");
        proxy.wait("it is in the kernel", |s| s.offloaded() == 1);
        let ends = [
            ("the client's", format!("sport = :{}", front.port())),
            ("the peer's", format!("dport = :{}", echo.address.port())),
        ];
        for (whose, filter) in ends {
            let found = ss("-i", &filter);
            assert!(
                found.split_whitespace().any(|word| word == expected),
                "{said}: {whose} connection is without {expected}: {found}"
            );
        }
    }
    let mut plan = Plan::new();
    plan.server_listening("", &echo, "tcp_congestion = \"no_such_thing\"");
    let file = plan.file("proxy.toml");
    std::fs::write(&file, plan.text()).expect("the configuration");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_master"));
    command.arg("-c").arg(&file);
    let refused = run(command, Duration::from_secs(20));
    assert_eq!(refused.code, Some(1), "{refused:?}");
    let why = "tcp_congestion = \"no_such_thing\": this kernel does not have it";
    assert!(refused.err.contains(why), "{refused:?}");
}

#[test]
fn buffers_have_the_sizes_that_the_listener_says_while_a_source_is_held_back_too() {
    const BYTES: u64 = 24 << 20;
    let flags = [(); 2].map(|()| std::sync::Arc::new(Flag::default()));
    let [release, has_all] = flags.clone();
    let slow = Upstream::serve("127.0.0.1", move |mut stream| {
        let mut writer = stream.try_clone().expect("a second handle");
        let sender = std::thread::spawn(move || send(&mut writer, 2, 0, BYTES));
        within(PATIENCE, || release.is_up());
        receive_exactly(&mut stream, 1, BYTES);
        has_all.raise();
        sender.join().expect("the sender").expect("sending to the client");
        // Whoever ended first would leave the rest of the other way to user space, if that is held back.
        stream.read(&mut [0]).expect("the end")
    });
    let [release, has_all] = flags;
    let mut plan = Plan::new().stream("ebpf_backlog_size = \"256k\"");
    let front = plan.server_listening("rcvbuf = \"100k\", sndbuf = 150000", &slow, "");
    let proxy = plan.start();
    let client = connect(front);
    let mut writer = client.try_clone().expect("a second handle");
    let _at_the_end = release.raise_at_the_end();
    let sizes = || {
        let memory = ss("-m", &format!("sport = :{}", front.port()));
        (number_after(&memory, ",rb"), number_after(&memory, ",tb"))
    };
    // For a moment it may be more, see `make_room` in `bpf/c/slot/buffers.h`.
    let must_be_as_given = || {
        let given = (2 * 100 * 1024, 2 * 150_000);
        assert!(within(PATIENCE, || sizes() == given), "{:?}", sizes());
    };
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || send(&mut writer, 1, 0, BYTES));
        // Neither reader reads: what the kernel forwards comes to a stop, both ways.
        let mut before = u64::MAX;
        let stopped = within(PATIENCE, || {
            pause(200);
            let now = proxy.status().sockmap().sum();
            now > 0 && std::mem::replace(&mut before, now) == now
        });
        assert!(stopped, "what is forwarded does not come to a stop");
        must_be_as_given();
        release.raise();
        let mut reader = client.try_clone().expect("a second handle");
        receive_exactly(&mut reader, 2, BYTES);
        sending
            .join()
            .expect("the writer")
            .expect("sending to the upstream");
    });
    assert!(within(PATIENCE, || has_all.is_up()), "the upstream has not all");
    must_be_as_given();
    drop(client);
    slow.result();
    let status = proxy.settle();
    assert_eq!(status.sockmap().to_upstream, BYTES);
    assert_eq!(status.sockmap().to_downstream, BYTES);
    assert_eq!(status.fallbacks(), 0);
    let pauses = proxy.log();
    assert!(!pauses.contains(" 0 pauses"), "nothing was held back: {pauses}");
}

#[test]
fn a_reload_gives_buffers_their_sizes_and_takes_them_away_again() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server_listening("backlog = 100", &echo, "");
    let proxy = plan.start();
    let size = || {
        let mut client = connect(front);
        ping(&mut client, 1, 1).expect("a session");
        let memory = ss(
            "-m",
            &format!(
                "sport = :{} and dport = :{}",
                front.port(),
                client.local_addr().expect("the client's address").port()
            ),
        );
        number_after(&memory, ",rb")
    };
    let own = size();
    proxy.edit("backlog = 100", "backlog = 100, rcvbuf = \"32k\"");
    proxy.reload();
    assert_eq!(size(), 64 << 10);
    proxy.edit(", rcvbuf = \"32k\"", "");
    proxy.reload();
    assert_eq!(size(), own);
}

#[test]
fn as_many_connections_may_wait_as_backlog_says() {
    need("unshare", "util-linux");
    need("ip", "iproute2");
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server_listening("backlog = 5000", &echo, "");
    let (file, log) = (plan.file("proxy.toml"), plan.file("log"));
    std::fs::write(&file, plan.text()).expect("writing the configuration");
    // The host's bound is mostly lower.
    let inside = format!(
        "ip link set lo up; echo 20000 >/proc/sys/net/core/somaxconn; {} -c {} 2>{log} & pid=$!; \
         for i in $(seq 200); do grep -q \"worker 0 started\" {log} && break; sleep 0.05; done; \
         ss -Hltn \"sport = :{}\"; kill -TERM $pid; wait $pid",
        env!("CARGO_BIN_EXE_master"),
        file.display(),
        front.port(),
        log = log.display(),
    );
    let listening = shell(
        &format!("unshare --net bash -c '{inside}'"),
        Duration::from_secs(20),
    );
    let queues: Vec<&str> = listening
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
        .collect();
    assert!(
        !queues.is_empty() && queues.iter().all(|queue| *queue == "5000"),
        "{listening}"
    );
}

#[test]
fn a_deferred_listener_accepts_when_the_client_has_said_something() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let deferred = plan.server_listening("deferred = true", &echo, "");
    let plain = plan.server(&echo);
    let proxy = plan.start();
    // After a second it is accepted all the same.
    let is_silent_for = Duration::from_millis(900);
    let looked_in_time = (1..=5u64).any(|nth| {
        let begun = Instant::now();
        let mut silent = connect(deferred);
        let silent_too = connect(plain);
        proxy.wait("the plain listener has accepted", |s| {
            accepted(s, &plain.to_string()) == nth
        });
        pause(300);
        let before = accepted(&proxy.status(), &deferred.to_string());
        let in_time = begun.elapsed() < is_silent_for;
        assert!(!in_time || before == nth - 1, "{before} are accepted");
        ping(&mut silent, 1, 2).expect("a session");
        assert_eq!(accepted(&proxy.status(), &deferred.to_string()), nth);
        proxy.wait("it is in the kernel", |s| s.offloaded() == 2);
        drop((silent, silent_too));
        proxy.settle();
        in_time
    });
    assert!(looked_in_time);
}

/// Tells what a connection began with, and then echoes.
fn header_then_echo(mut stream: TcpStream) -> String {
    let mut header = Vec::new();
    let mut byte = [0];
    while !header.ends_with(b"\r\n") && stream.read_exact(&mut byte).is_ok() {
        header.push(byte[0]);
    }
    upstream::echo(stream);
    String::from_utf8_lossy(&header).into_owned()
}

#[test]
fn an_ipv6_wildcard_takes_ipv4_only_where_it_is_told_to_and_a_reload_changes_that() {
    let server = Upstream::serve("127.0.0.1", header_then_echo);
    let mut plan = Plan::new().workers(2);
    let port = Port::claim();
    plan = plan.tables(&format!(
        "[[server]]\nlisten = {{ address = \"[::]:{}\", backlog = 9 }}\nproxy_pass = \"{}\"\nproxy_protocol = true\n\
         access = [\"allow 127.0.0.1\", \"allow ::1\", \"deny all\"]\n",
        port.number, server.address
    ));
    let proxy = plan.start();
    let (v4, v6) = (port.on("127.0.0.1"), port.on("::1"));
    let session = |address: SocketAddr| {
        let mut client = connect(address);
        ping(&mut client, 1, 2).expect("a session");
        drop(client);
        server.result()
    };
    assert!(session(v6).starts_with("PROXY TCP6 ::1 ::1 "));
    try_connect(v4).expect_err("an IPv4 connection to an IPv6 listener");

    proxy.edit("backlog = 9", "backlog = 9, ipv6only = false");
    proxy.reload();
    assert!(
        session(v4).starts_with("PROXY TCP4 127.0.0.1 127.0.0.1 "),
        "a client is known by its IPv4 address"
    );
    assert!(session(v6).starts_with("PROXY TCP6 ::1 ::1 "));
    proxy.wait("new workers alone serve", |s| s.workers().len() == 2);
    assert!(session(v6).starts_with("PROXY TCP6 ::1 ::1 "));
    assert!(proxy.settle().sockmap().sum() > 0);

    proxy.edit("ipv6only = false", "ipv6only = true");
    proxy.reload();
    let closed = within(PATIENCE, || try_connect(v4).is_err());
    assert!(closed, "IPv4 connections are still taken");
    assert!(session(v6).starts_with("PROXY TCP6 ::1 ::1 "));
}

/// Three ports in a row.
fn three_ports() -> [Port; 3] {
    loop {
        let ports = [Port::claim(), Port::claim(), Port::claim()];
        if (0..3).all(|n| ports[n].number == ports[0].number + n as u16) {
            return ports;
        }
    }
}

#[test]
fn each_port_of_a_range_is_a_listener_of_its_own() {
    let server = Upstream::serve("127.0.0.1", header_then_echo);
    let ports = three_ports();
    let first = ports[0].number;
    let plan = Plan::new().tables(&format!(
        "[[server]]\nlisten = [\"127.0.0.1:{first}-{}\", \"[::1]:{first}-{first}\"]\nproxy_pass = \"{}\"\n\
         proxy_protocol = true\n",
        first + 2,
        server.address
    ));
    let proxy = plan.start();
    for (sessions, port) in (first..=first + 2).enumerate() {
        for _ in 0..=sessions {
            let mut client = connect(SocketAddr::from(([127, 0, 0, 1], port)));
            ping(&mut client, 1, 1).expect("a session");
            drop(client);
            assert!(server.result().ends_with(&format!(" {port}\r\n")));
        }
    }
    let status = proxy.settle();
    for (sessions, port) in (first..=first + 2).enumerate() {
        assert_eq!(
            accepted(&status, &format!("127.0.0.1:{port}")),
            sessions as u64 + 1
        );
    }
    assert_eq!(accepted(&status, &format!("[::1]:{first}")), 0);
}

/// A plan with a server on a unix socket, and where that is.
fn unix_plan(workers: usize, options: &str, target: &str, lines: &str) -> (Plan, std::path::PathBuf) {
    let plan = Plan::new().workers(workers);
    let path = plan.file("front.sock");
    let table = format!(
        "[[server]]\nlisten = {{ address = \"unix:{}\"{options} }}\nproxy_pass = \"{target}\"\n{lines}\n",
        path.display()
    );
    (plan.tables(&table), path)
}

fn unix_connect(path: &Path) -> std::io::Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// One question and its answer.
fn unix_ping(stream: &mut UnixStream, word: &[u8]) -> std::io::Result<()> {
    stream.write_all(word)?;
    let mut answer = vec![0; word.len()];
    stream.read_exact(&mut answer)?;
    assert_eq!(answer, word);
    Ok(())
}

/// Asks on new connections until the flag is up; returns how many there were. None may fail.
fn ask_again_and_again(path: &Path, stop: &Flag) -> u64 {
    let mut asked = 0;
    while !stop.is_up() {
        let mut client = unix_connect(path).unwrap_or_else(|e| panic!("connection {asked}: {e}"));
        unix_ping(&mut client, b"anybody?").unwrap_or_else(|e| panic!("question {asked}: {e}"));
        asked += 1;
    }
    asked
}

#[test]
fn a_unix_listener_serves_every_byte_and_is_counted_as_what_the_kernel_cannot_forward() {
    const BYTES: u64 = 8 << 20;
    let echo = Upstream::echo("127.0.0.1");
    let (plan, path) = unix_plan(2, "", &echo.address.to_string(), "");
    let mut proxy = plan.start();
    let file = std::fs::symlink_metadata(&path).expect("the socket's file");
    assert!(file.file_type().is_socket());
    assert_eq!(file.mode() & 0o777, 0o666);
    let client = unix_connect(&path).expect("connecting");
    let mut writer = client.try_clone().expect("a second handle");
    let mut reader = client.try_clone().expect("a second handle");
    let sending = std::thread::spawn(move || {
        send(&mut writer, 1, 0, BYTES).expect("sending");
        writer.shutdown(Shutdown::Write).expect("the end");
    });
    receive(&mut reader, 1).must_be_whole(BYTES);
    sending.join().expect("the writer");
    let status = proxy.settle();
    assert_eq!(status.relay().to_upstream, BYTES);
    assert_eq!(status.relay().to_downstream, BYTES);
    assert_eq!(status.number("/fallbacks/not_tcp"), 1);
    assert_eq!(accepted(&status, &format!("unix:{}", path.display())), 1);
    proxy.stop();
    assert!(!path.exists(), "the socket's file stays after a stop");
}

#[test]
fn unix_sockets_on_both_sides() {
    const BYTES: u64 = 3 << 20;
    let scratch = crate::harness::Scratch::new();
    let behind = scratch.file("back.sock");
    let results = upstream::unix(&behind, |mut stream| {
        let received = receive(&mut stream, 1);
        send(&mut stream, 2, 0, BYTES).expect("answering");
        received
    });
    let (plan, path) = unix_plan(1, ", mode = \"0600\"", &format!("unix:{}", behind.display()), "");
    let proxy = plan.start();
    let mode = std::fs::symlink_metadata(&path).expect("the file").mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = unix_connect(&path).expect("connecting");
    send(&mut client, 1, 0, BYTES).expect("asking");
    client.shutdown(Shutdown::Write).expect("the end");
    receive(&mut client, 2).must_be_whole(BYTES);
    results
        .recv_timeout(PATIENCE)
        .expect("the upstream")
        .must_be_whole(BYTES);
    assert_eq!(proxy.settle().number("/fallbacks/not_tcp"), 1);
}

#[test]
fn a_client_of_a_unix_socket_has_no_address() {
    let server = Upstream::serve("127.0.0.1", header_then_echo);
    let target = server.address.to_string();
    let lines = "proxy_protocol = true\naccess = [\"deny 0.0.0.0/0\", \"allow unix:\", \"deny all\"]\n\
                 proxy_bind = \"transparent\"";
    let (plan, path) = unix_plan(1, "", &target, lines);
    let proxy = plan.start();
    let mut client = unix_connect(&path).expect("connecting");
    unix_ping(&mut client, b"hello").expect("a session");
    drop(client);
    assert_eq!(server.result(), "PROXY UNKNOWN\r\n");
    proxy.edit("\"allow unix:\"", "\"allow 0.0.0.0/0\"");
    proxy.reload();
    let mut client = unix_connect(&path).expect("connecting");
    assert!(unix_ping(&mut client, b"hello").is_err(), "it was to be denied");
    proxy.must_say("client unix: listener unix:");
}

#[test]
fn a_unix_listener_loses_no_connection_at_reloads_upgrades_and_deaths_of_workers() {
    let echo = Upstream::echo("127.0.0.1");
    let (plan, path) = unix_plan(2, "", &echo.address.to_string(), "");
    let binary = plan.file("culvert");
    crate::harness::program::copy(env!("CARGO_BIN_EXE_master"), &binary);
    let proxy = plan.binary(binary.clone()).start();
    let mut resting = unix_connect(&path).expect("connecting");
    unix_ping(&mut resting, b"before").expect("a session");
    let stop = Flag::default();
    let inode = || std::fs::symlink_metadata(&path).expect("the file").ino();
    let before = inode();
    let counts: Vec<u64> = std::thread::scope(|scope| {
        let _stop = stop.raise_at_the_end();
        let asking: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| ask_again_and_again(&path, &stop)))
            .collect();
        pause(300);
        for workers in [3, 1, 2] {
            let text = std::fs::read_to_string(proxy.file()).expect("the configuration");
            let (_, rest) = text.split_once('\n').expect("lines");
            std::fs::write(proxy.file(), format!("worker_processes = {workers}\n{rest}")).expect("writing");
            proxy.reload();
            proxy.wait("the workers are as many as they should be", |s| {
                s.workers().iter().filter(|w| !w.draining).count() == workers
            });
        }
        let new = binary.with_extension("new");
        crate::harness::program::copy(env!("CARGO_BIN_EXE_master"), &new);
        std::fs::rename(&new, &binary).expect("a new binary");
        let generation = proxy.status().generation();
        proxy.signal(Signal::SIGUSR2);
        proxy.wait("the new binary serves", |s| s.generation() > generation);
        assert_eq!(process::executable(proxy.pid()), binary, "the new binary runs");
        pause(300);
        stop.raise();
        asking
            .into_iter()
            .map(|asking| asking.join().expect("no question may fail"))
            .collect()
    });
    assert!(counts.iter().all(|count| *count > 20), "{counts:?}");
    assert_eq!(inode(), before, "the socket was made anew");
    unix_ping(&mut resting, b"after").expect("the session from before");
    let other = path.with_file_name("other.sock");
    proxy.edit("front.sock", "other.sock");
    proxy.reload();
    assert!(within(PATIENCE, || !path.exists()), "the old path stays");
    unix_ping(&mut unix_connect(&other).expect("the new path"), b"moved").expect("a session");
    unix_ping(&mut resting, b"still").expect("the session from before");
}

#[test]
fn a_socket_file_that_a_killed_program_left_is_no_obstacle_but_a_living_program_is() {
    let echo = Upstream::echo("127.0.0.1");
    let (plan, path) = unix_plan(1, "", &echo.address.to_string(), "");
    let mut proxy = plan.start();
    let other = Plan::new().tables(&format!(
        "[[server]]\nlisten = \"unix:{}\"\nproxy_pass = \"127.0.0.1:1\"\n",
        path.display()
    ));
    let file = other.file("other.toml");
    std::fs::write(&file, other.text()).expect("writing the configuration");
    let mut second = std::process::Command::new(env!("CARGO_BIN_EXE_master"));
    second.arg("-c").arg(&file);
    let refused = crate::harness::program::run(second, Duration::from_secs(10));
    assert_eq!(refused.code, Some(1), "{}", refused.err);
    let said = format!("failed to bind unix:{}: address already in use", path.display());
    assert!(refused.err.contains(&said), "{}", refused.err);
    unix_ping(&mut unix_connect(&path).expect("connecting"), b"still here").expect("the first program");

    let workers = process::children(proxy.pid());
    proxy.signal(Signal::SIGKILL);
    proxy.wait_for_exit(PATIENCE).expect("the master is killed");
    assert!(within(PATIENCE, || !workers
        .iter()
        .any(|w| process::is_alive(*w))));
    assert!(path.exists(), "nobody was left to remove it");
    proxy.start_again();
    unix_ping(&mut unix_connect(&path).expect("connecting"), b"back").expect("a session");
    proxy.must_say("a socket that nobody answered on");
}

/// What the program has is what its dump says.
#[test]
fn the_dump_says_every_option_and_is_read_again() {
    let plan = Plan::new().tables(
        "[[server]]\nproxy_pass = \"127.0.0.1:1\"\nproxy_bind = \"10.0.0.1:500 transparent\"\n\
         listen = [{ address = \"127.0.0.1:7000-7001\", so_keepalive = \"30m::10\", rcvbuf = \"64k\", sndbuf = 5000, \
         deferred = true, fastopen = 12 }, { address = \"[::]:7000\", ipv6only = false }, \
         { address = \"unix:/run/x.sock\", mode = \"660\" }]\n",
    );
    let file = plan.file("first.toml");
    std::fs::write(&file, plan.text()).expect("writing the configuration");
    let dump = |file: &Path| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_master"));
        command.args(["-q", "-T", "-c"]).arg(file);
        crate::harness::program::run(command, Duration::from_secs(20)).must_succeed("-T")
    };
    let text = dump(&file);
    let both = ", rcvbuf = \"64k\", sndbuf = \"5000\", deferred = true, fastopen = 12, so_keepalive = \"30m::10\" },";
    for said in [
        &format!("\"127.0.0.1:7000\", backlog = 511, proxy_protocol = false{both}"),
        &format!("\"127.0.0.1:7001\", backlog = 511, proxy_protocol = false{both}"),
        "\"[::]:7000\", backlog = 511, proxy_protocol = false, ipv6only = false },",
        "\"unix:/run/x.sock\", backlog = 511, proxy_protocol = false, mode = \"0660\" },",
        "proxy_bind = \"10.0.0.1:500 transparent\"",
    ] {
        assert!(text.contains(said), "{said}\n{text}");
    }
    let again = plan.file("second.toml");
    std::fs::write(&again, &text).expect("writing the dump");
    assert_eq!(dump(&again), text);
}

/// A proxy that ends well although its listener's file is gone.
#[test]
fn a_socket_file_that_somebody_else_has_put_there_is_left_alone() {
    let (plan, path) = unix_plan(1, "", "127.0.0.1:1", "");
    let mut proxy: Proxy = plan.start();
    std::fs::remove_file(&path).expect("removing the file");
    let _theirs = std::os::unix::net::UnixListener::bind(&path).expect("another socket");
    proxy.stop();
    assert!(path.exists(), "another program's socket was removed");
}
