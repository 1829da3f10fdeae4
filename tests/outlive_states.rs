//! Sessions in every state in which a worker can be replaced or killed: held back, half closed, ended while held back,
//! copied, connecting, with a unix socket upstream. Each has to come through whole. Where the worker may hold bytes in
//! its own memory, a kill may also reset it, with an exact prefix; a clean end of half a stream is never right.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use crate::harness::end::{Ends, Gap, Half, Script, Start, play};
use crate::harness::load::KEPT_AFTER;
use crate::harness::pattern::ping;
use crate::harness::sockets::Deaf;
use crate::harness::{
    Ending, Flag, Front, PATIENCE, Plan, Proxy, Received, Towards, Writer, connect, patient, process,
    receive, send, upstream, within,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MIB: u64 = 1 << 20;
/// An old worker is gone so soon, whatever its sessions do: some of them would keep it for much longer.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// What happens to the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Reload,
    Kill,
}

/// What a kill may do to a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Care {
    /// It comes through.
    Kept,
    /// It comes through or is reset: its bytes go through the worker.
    KeptOrReset,
}

/// One direction of a session when all is over: what was sent, and what came of it.
struct Ended {
    sent: u64,
    received: Received,
}

/// A session that waits in its state, and how to play it to its end.
struct Case {
    name: String,
    care: Care,
    play_on: Box<dyn FnOnce() -> Vec<Ended>>,
}

impl Case {
    fn new(name: String, care: Care, play_on: impl FnOnce() -> Vec<Ended> + 'static) -> Case {
        Case {
            name,
            care,
            play_on: Box::new(play_on),
        }
    }

    /// What is wrong with how it ended.
    fn judge(self, event: Event) -> Option<String> {
        let Case { name, care, play_on } = self;
        for Ended { sent, received } in play_on() {
            let whole = Received {
                bytes: sent,
                ending: Ending::Fin,
                wrong_at: None,
            };
            let prefix =
                received.ending == Ending::Reset && received.wrong_at.is_none() && received.bytes <= sent;
            if received == whole {
                continue;
            }
            if event == Event::Kill && care == Care::KeptOrReset && prefix {
                eprintln!(
                    "{name}: reset after {} of {sent} bytes, which may be",
                    received.bytes
                );
                continue;
            }
            return Some(format!("{name}: {received:?}, {sent} bytes were sent"));
        }
        None
    }
}

/// What an end meets that says `bytes` bytes, ends its direction and reads the other one to its end. How the connection
/// stands is looked at first: a failing write takes the error that the reader would have seen.
fn say_and_hear(stream: &mut TcpStream, out: u64, bytes: u64, into: u64) -> Received {
    let met = |ending| Received {
        bytes: 0,
        ending,
        wrong_at: None,
    };
    stream
        .set_nonblocking(true)
        .expect("a socket that does not block");
    let ahead = stream.peek(&mut [0]);
    stream.set_nonblocking(false).expect("a socket that blocks");
    match ahead {
        Err(e) if e.kind() == ErrorKind::ConnectionReset => return met(Ending::Reset),
        Ok(0) => return met(Ending::Fin),
        _ => {}
    }
    match send(stream, out, 0, bytes).and_then(|()| stream.shutdown(Shutdown::Write)) {
        Ok(()) => receive(stream, into),
        Err(_) => met(Ending::Reset),
    }
}

/// Its reader has stopped, and the source is held back.
fn held_back(front: &Front, proxy: &Proxy, towards: Towards) -> Case {
    let (mut writer, mut reader) = front.offloaded(proxy, towards);
    let writing = Writer::start(&writer, 11, 64 * MIB, 64 * 1024);
    writing.wait_for_stall();
    Case::new(format!("held back, {towards:?}"), Care::Kept, move || {
        let reading = std::thread::spawn(move || receive(&mut reader, 11));
        let sent = writing.join().unwrap_or(64 * MIB);
        // The other direction ends when the reader's socket goes.
        let _ = writer.shutdown(Shutdown::Write);
        let received = reading.join().expect("the reading thread");
        let back = receive(&mut writer, 12);
        vec![
            Ended { sent, received },
            Ended {
                sent: 0,
                received: back,
            },
        ]
    })
}

/// Its source has sent all it had and its end while the reader had stopped. What the source has left is copied.
fn ended_while_held_back(front: &Front, proxy: &Proxy, towards: Towards, bytes: u64) -> Case {
    let (mut writer, mut reader) = front.offloaded(proxy, towards);
    let writing = Writer::start_to_end(&writer, 13, bytes, 16 * 1024);
    let name = format!("ended after {bytes} bytes while held back, {towards:?}");
    Case::new(name, Care::KeptOrReset, move || {
        let received = receive(&mut reader, 13);
        writing.join().expect("writing");
        let _ = reader.shutdown(Shutdown::Write);
        let back = receive(&mut writer, 14);
        vec![
            Ended {
                sent: bytes,
                received,
            },
            Ended {
                sent: 0,
                received: back,
            },
        ]
    })
}

/// One side has ended its direction, the other goes on.
fn half_closed(front: &Front, proxy: &Proxy, towards: Towards) -> Case {
    let (mut ending, mut going_on) = front.offloaded(proxy, towards);
    send(&mut ending, 15, 0, 100_000).expect("sending");
    ending.shutdown(Shutdown::Write).expect("ending the stream");
    receive(&mut going_on, 15).must_be_whole(100_000);
    send(&mut going_on, 16, 0, 50_000).expect("sending");
    Case::new(format!("half closed, {towards:?}"), Care::Kept, move || {
        let sending = std::thread::spawn(move || {
            // It fails where the session was reset, which the other end tells.
            let _ = send(&mut going_on, 16, 50_000, 4 * MIB);
            let _ = going_on.shutdown(Shutdown::Write);
            going_on
        });
        let received = receive(&mut ending, 16);
        sending.join().expect("the sending thread");
        vec![Ended {
            sent: 4 * MIB,
            received,
        }]
    })
}

/// Both directions flow, some megabytes a second, for longer than the test takes to replace the worker.
fn flowing(front: &Front, name: &str, care: Care) -> Case {
    const BYTES: u64 = 20 * MIB;
    let half = |seed| Half {
        seed,
        bytes: BYTES,
        piece: 32 * 1024,
        gap: Some(Gap {
            every: 32 * 1024,
            pause: Duration::from_millis(12),
        }),
    };
    let script = |out, into| Script {
        out: half(out),
        into: half(into),
        start: Start::After(Duration::ZERO),
        glued: false,
        ends: Ends::AtOnce,
        reset_after: None,
        receive_buffer: None,
    };
    let (client, server) = front.open();
    let start =
        move |script: Script, stream| std::thread::spawn(move || play(&script, stream, &Flag::default()));
    let ends = [start(script(17, 18), client), start(script(18, 17), server)];
    Case::new(name.to_owned(), care, move || {
        let outcomes = ends.map(|end| end.join().expect("an end"));
        let one = |reader: usize| Ended {
            sent: BYTES,
            received: outcomes[reader].received,
        };
        vec![one(0), one(1)]
    })
}

/// It has said something, and rests.
fn resting(front: &Front, name: &str, care: Care) -> Case {
    let (mut client, mut server) = front.open();
    send(&mut client, 19, 0, 1000).expect("sending");
    crate::harness::receive_exactly(&mut server, 19, 1000);
    Case::new(name.to_owned(), care, move || {
        let saying = std::thread::spawn(move || say_and_hear(&mut client, 20, 100_000, 21));
        let back = say_and_hear(&mut server, 21, 100_000, 20);
        let received = saying.join().expect("the client's end");
        let ended = |received| Ended {
            sent: 100_000,
            received,
        };
        vec![ended(received), ended(back)]
    })
}

/// Its upstream answers no SYN yet.
fn connecting(front: std::net::SocketAddr, deaf: Deaf) -> Case {
    let mut client = connect(front);
    send(&mut client, 22, 0, 5000).expect("sending while the upstream is being connected");
    Case::new("connecting".to_owned(), Care::KeptOrReset, move || {
        let listener = deaf.hear();
        listener
            .set_nonblocking(true)
            .expect("a listener that does not block");
        std::thread::spawn(move || {
            let end = Instant::now() + patient(PATIENCE);
            // A given-up attempt may come first.
            while Instant::now() < end {
                match listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false).expect("a socket that blocks");
                        std::thread::spawn(move || upstream::echo(stream));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(20)),
                }
            }
        });
        let received = say_and_hear(&mut client, 22, 0, 22);
        vec![Ended { sent: 5000, received }]
    })
}

/// Its upstream is a unix socket.
fn through_a_unix_socket(front: std::net::SocketAddr) -> Case {
    let mut client = connect(front);
    ping(&mut client, 23, 5).expect("a session before");
    Case::new(
        "a unix socket upstream".to_owned(),
        Care::KeptOrReset,
        move || {
            let received = say_and_hear(&mut client, 24, 50_000, 24);
            vec![Ended {
                sent: 50_000,
                received,
            }]
        },
    )
}

/// Every state at once in one worker, and then the event.
fn every_state_through(event: Event) {
    let mut plan = Plan::new();
    let front = |plan: &mut Plan, lines| Front::new(plan, "127.0.0.1", lines);
    let kernel = front(&mut plan, "");
    let gated = front(&mut plan, "ebpf_backlog_size = \"64k\"");
    let relayed = front(&mut plan, "ebpf_enable = false");
    let deaf = Deaf::new();
    let to_deaf = plan.server(deaf.address);
    let socket = plan.file("upstream.sock");
    let _unix = upstream::unix(&socket, |mut stream| {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(got) = stream.read(&mut buffer) {
            if got == 0 || stream.write_all(&buffer[..got]).is_err() {
                break;
            }
        }
    });
    let to_unix = plan.server(format!("unix:{}", socket.display()).as_str());
    let proxy = plan.start();

    let mut cases = Vec::new();
    for towards in Towards::BOTH {
        cases.push(held_back(&gated, &proxy, towards));
        for bytes in [150_000, 200_000, 300_000] {
            cases.push(ended_while_held_back(&gated, &proxy, towards, bytes));
        }
        cases.push(half_closed(&kernel, &proxy, towards));
    }
    cases.push(connecting(to_deaf, deaf));
    cases.push(through_a_unix_socket(to_unix));
    cases.push(resting(&relayed, "resting, copied", Care::KeptOrReset));
    cases.push(resting(&kernel, "resting, in the kernel", Care::Kept));
    cases.push(flowing(&relayed, "flowing, copied", Care::KeptOrReset));
    cases.push(flowing(&kernel, "flowing, in the kernel", Care::Kept));
    std::thread::sleep(patient(KEPT_AFTER + Duration::from_millis(200)));

    let old = proxy.worker();
    match event {
        Event::Reload => _ = proxy.reload(),
        Event::Kill => kill(Pid::from_raw(old), Signal::SIGKILL).expect("killing the worker"),
    }
    let gone = within(GONE_WITHIN, || !process::is_alive(old));
    proxy.wait("another worker serves", |s| {
        s.workers().iter().any(|w| w.pid != old)
    });
    let mut faults: Vec<String> = cases.into_iter().filter_map(|case| case.judge(event)).collect();
    if !gone {
        faults.push(format!("process {old} has not gone"));
    }
    assert!(faults.is_empty(), "{event:?}:\n{}", faults.join("\n"));
    let status = proxy.settle();
    for reason in ["integrity", "idle_timeout", "resource"] {
        assert_eq!(status.number(&format!("/closes/{reason}")), 0, "{reason}");
    }
}

#[test]
fn sessions_in_every_state_come_through_a_reload() {
    every_state_through(Event::Reload);
}

#[test]
fn sessions_in_every_state_come_through_the_death_of_their_worker() {
    every_state_through(Event::Kill);
}

#[test]
fn a_copied_session_whose_reader_has_stopped_comes_through_a_reload() {
    let mut plan = Plan::new();
    let front = Front::new(&mut plan, "127.0.0.1", "ebpf_enable = false");
    let proxy = plan.start();
    for towards in Towards::BOTH {
        let (client, server) = front.open();
        let (writer, mut reader) = match towards {
            Towards::Upstream => (client, server),
            Towards::Downstream => (server, client),
        };
        let writing = Writer::start_to_end(&writer, 25, 32 * MIB, 64 * 1024);
        writing.wait_for_stall();
        for _ in 0..3 {
            let old = proxy.worker();
            proxy.reload();
            let gone = within(GONE_WITHIN, || !process::is_alive(old));
            assert!(gone, "{towards:?}: the old worker waits for the reader");
            proxy.wait("one worker serves", |s| s.workers().len() == 1);
        }
        receive(&mut reader, 25).must_be_whole(32 * MIB);
        writing.join().expect("writing");
    }
}

#[test]
fn a_copied_session_whose_reader_has_stopped_comes_through_the_death_of_its_worker() {
    let mut plan = Plan::new();
    let front = Front::new(&mut plan, "127.0.0.1", "ebpf_enable = false");
    let proxy = plan.start();
    for towards in Towards::BOTH {
        let worker = proxy.worker();
        let (client, server) = front.open();
        let (writer, mut reader) = match towards {
            Towards::Upstream => (client, server),
            Towards::Downstream => (server, client),
        };
        let writing = Writer::start_to_end(&writer, 28, 32 * MIB, 64 * 1024);
        writing.wait_for_stall();
        proxy.wait("it is kept", |s| s.number("/sessions/kept") == 1);
        kill(Pid::from_raw(worker), Signal::SIGKILL).expect("killing the worker");
        proxy.wait("another worker serves", |s| {
            s.workers().iter().any(|w| w.pid != worker)
        });
        receive(&mut reader, 28).must_be_whole(32 * MIB);
        writing.join().expect("writing");
        drop(reader);
        proxy.settle();
    }
}

#[test]
fn a_session_that_is_too_young_ends_in_a_reset_at_both_ends_when_its_worker_dies() {
    let mut plan = Plan::new();
    let front = Front::new(&mut plan, "127.0.0.1", "");
    let proxy = plan.start();
    let worker = proxy.worker();
    let (mut client, mut server) = front.open();
    send(&mut client, 26, 0, 10_000).expect("sending");
    kill(Pid::from_raw(worker), Signal::SIGKILL).expect("killing the worker");
    receive(&mut server, 26).must_be_a_prefix_and_a_reset(10_000);
    assert_eq!(receive(&mut client, 27).ending, Ending::Reset);
    proxy.settle();
}
