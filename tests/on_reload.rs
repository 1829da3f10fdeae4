//! `on_reload`: what becomes of sessions whose listener or upstream is gone after a reload.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};

use crate::harness::pattern::ping;
use crate::harness::sockets::try_connect;
use crate::harness::{Ending, PATIENCE, Plan, Proxy, Upstream, connect, process, receive, within};
use nix::sys::signal::Signal;

/// Echoes, and tells how the connection ended.
fn echo_to_the_end(mut stream: TcpStream) -> Ending {
    use std::io::Write;
    let mut buffer = [0u8; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ending::Fin,
            Ok(got) => {
                if stream.write_all(&buffer[..got]).is_err() {
                    return Ending::Reset;
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ending::Reset,
            Err(_) => return Ending::Silent,
        }
    }
}

/// What a session loses at the reload.
#[derive(Debug, Clone, Copy)]
enum Gone {
    /// Its `[[server]]` is no longer in the file.
    Listener,
    /// Its `[[server]]` listens somewhere else.
    Address,
    /// `proxy_pass` names another address.
    ProxyPass,
    /// Its peer is no longer in the group.
    Peer,
}

/// The whole file: a server that stays as it is, and one that loses something in the second text.
fn texts(
    plan: &Plan,
    gone: Gone,
    setting: &str,
    ports: [SocketAddr; 3],
    peers: [SocketAddr; 2],
) -> [String; 2] {
    let base = plan.text();
    let [stays, loses, other] = ports;
    let [peer, other_peer] = peers;
    let server = |listen: SocketAddr, pass: String| {
        format!("[[server]]\nlisten = \"{listen}\"\nproxy_pass = \"{pass}\"\n{setting}\n")
    };
    let group = |list: String| format!("[[upstream]]\nname = \"group\"\nserver = [{list}]\n");
    let kept = server(stays, peer.to_string());
    let (before, after) = match gone {
        Gone::Listener => (server(loses, peer.to_string()), String::new()),
        Gone::Address => (server(loses, peer.to_string()), server(other, peer.to_string())),
        Gone::ProxyPass => (
            server(loses, peer.to_string()),
            server(loses, other_peer.to_string()),
        ),
        Gone::Peer => {
            let with = |list| group(list) + &server(loses, "group".to_owned());
            (with(format!("\"{peer}\"")), with(format!("\"{other_peer}\"")))
        }
    };
    [before, after].map(|text| format!("{base}{kept}{text}"))
}

/// A session with something gone at a reload, and one beside it that loses nothing.
#[track_caller]
fn after_a_reload(gone: Gone, setting: &str, in_stream: bool) -> (Proxy, [TcpStream; 2], Upstream<Ending>) {
    let (upstream, other) = (
        Upstream::serve("127.0.0.1", echo_to_the_end),
        Upstream::serve("127.0.0.1", echo_to_the_end),
    );
    let mut plan = Plan::new().workers(2);
    let mut server_setting = setting;
    if in_stream {
        plan = plan.stream(setting);
        server_setting = "";
    }
    // Places for the servers of the texts.
    let claimed = [(); 3].map(|()| crate::harness::Port::claim());
    let ports = [0, 1, 2].map(|i: usize| claimed[i].on("127.0.0.1"));
    let [before, after] = texts(
        &plan,
        gone,
        server_setting,
        ports,
        [upstream.address, other.address],
    );
    let file = plan.file("proxy.toml");
    std::fs::write(&file, before).expect("writing the configuration");
    let proxy = Proxy::start_file(plan, &file);
    let mut sessions = [connect(ports[0]), connect(ports[1])];
    for session in &mut sessions {
        ping(session, 1, 3).expect("a session before");
    }
    proxy.wait("both are offloaded", |s| s.offloaded() == 2);
    let old: Vec<i32> = proxy.status().workers().iter().map(|w| w.pid).collect();
    std::fs::write(&file, after).expect("writing the configuration");
    proxy.reload();
    assert!(
        within(PATIENCE, || !old.iter().any(|&pid| process::is_alive(pid))),
        "{gone:?}: old workers live on"
    );
    if matches!(gone, Gone::Listener | Gone::Address) {
        assert!(try_connect(ports[1]).is_err(), "{gone:?}: it still listens");
    }
    // They stay claimed as long as the test binary runs.
    std::mem::forget(claimed);
    (proxy, sessions, upstream)
}

const ALL: [Gone; 4] = [Gone::Listener, Gone::Address, Gone::ProxyPass, Gone::Peer];

#[test]
fn sessions_are_kept_by_default_when_their_listener_or_upstream_is_gone() {
    for gone in ALL {
        let (proxy, mut sessions, upstream) = after_a_reload(gone, "", false);
        for session in &mut sessions {
            ping(session, 2, 20).unwrap_or_else(|e| panic!("{gone:?}: {e}"));
        }
        proxy.signal(Signal::SIGHUP);
        for session in &mut sessions {
            ping(session, 3, 20).unwrap_or_else(|e| panic!("{gone:?}, one more reload later: {e}"));
        }
        proxy.wait("both are counted again", |s| s.active() == 2);
        drop(sessions);
        assert_eq!([upstream.result(), upstream.result()], [Ending::Fin, Ending::Fin]);
        let carried = proxy.settle();
        assert_eq!(
            carried.sockmap().sum(),
            2 * 2 * 24 * 43,
            "{gone:?}: carried by the kernel"
        );
        assert_eq!(carried.relay().sum(), 0, "{gone:?}");
    }
}

#[test]
fn sessions_are_reset_where_on_reload_is_close_and_the_others_go_on() {
    let mut faults = Vec::new();
    // The key may stand in either place.
    for (gone, in_stream) in ALL.into_iter().flat_map(|gone| [(gone, true), (gone, false)]) {
        let name = format!(
            "{gone:?}, in {}",
            if in_stream { "[stream]" } else { "[[server]]" }
        );
        let (proxy, sessions, upstream) = after_a_reload(gone, "on_reload = \"close\"", in_stream);
        let [mut stays, loses] = sessions;
        let ending = receive(&mut &loses, 1).ending;
        ping(&mut stays, 2, 20).unwrap_or_else(|e| panic!("{name}: a session that lost nothing: {e}"));
        if ending != Ending::Reset {
            faults.push(format!("{name}: {ending:?} at the client's end"));
            continue;
        }
        assert_eq!(upstream.result(), Ending::Reset, "{name}: the upstream's end");
        proxy.wait("one is left", |s| s.active() == 1);
        drop(stays);
        assert_eq!(upstream.result(), Ending::Fin);
    }
    assert!(
        faults.is_empty(),
        "sessions that should have been reset:\n{}",
        faults.join("\n")
    );
}

#[test]
fn a_session_whose_server_stays_as_it_is_is_never_closed() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2).stream("on_reload = \"close\"");
    let front = plan.server(&echo);
    let proxy = plan.start();
    let mut client = connect(front);
    for round in 0..4 {
        ping(&mut client, round, 5).expect("a session between reloads");
        proxy.reload();
    }
    proxy.edit(
        "on_reload = \"close\"",
        "on_reload = \"keep\"\nproxy_timeout = \"7m\"",
    );
    proxy.reload();
    ping(&mut client, 9, 5).expect("a session after a change that does not concern it");
}
