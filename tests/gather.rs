//! Streams of small pieces: where they come faster than the kernel takes them one by one, they are copied many at once, and
//! the kernel has the session again soon after. Nothing is lost, doubled or moved where the one takes over from the
//! other, whatever else happens at that moment.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use crate::harness::pattern::{pause, ping, receive_from};
use crate::harness::slow::{DOWN, MIB, PIECE, UP, bound, finish, must_be_sound, proxy_with};
use crate::harness::sockets::reset;
use crate::harness::turns::alone;
use crate::harness::{
    Ending, Flag, PATIENCE, Proxy, Received, Towards, Writer, process, receive, send, within,
};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBuf;
use nix::unistd::Pid;

/// A small piece.
const SMALL: usize = 64;
/// How long pieces are copied before the kernel is given them again, and more than enough for that.
const BACK_AGAIN_MS: u64 = 1500;

fn gathers(proxy: &Proxy) -> u64 {
    proxy.status().number("/gathers")
}

/// Reads the stream of `seed` to its end, in a thread.
fn reading(stream: &TcpStream, seed: u64) -> std::thread::JoinHandle<Received> {
    let mut stream = stream.try_clone().expect("a second handle");
    std::thread::spawn(move || receive(&mut stream, seed))
}

#[test]
fn small_pieces_are_copied_many_at_once_and_what_follows_is_the_kernels_again() {
    const PIECES: u64 = 8 * MIB;
    const PROBE: u64 = 64 << 10;
    const BULK: u64 = 32 * MIB;
    let _alone = alone();
    for ip in ["127.0.0.1", "::1"] {
        let (proxy, front) = proxy_with(ip, "");
        let mut all = 0;
        for towards in Towards::BOTH {
            let (mut writing, mut reading) = front.offloaded(&proxy, towards);
            let before = gathers(&proxy);
            let writer = Writer::start(&writing, UP, PIECES, SMALL);
            assert_eq!(receive_from(&mut reading, UP, 0, PIECES).bytes, PIECES);
            writer.join().expect("writing the pieces");
            assert!(gathers(&proxy) > before, "nothing was gathered");
            let mut sent = PIECES;
            let is_back = within(PATIENCE, || {
                pause(BACK_AGAIN_MS);
                let before = proxy.status().relay().sum();
                let next = sent + PROBE;
                send(&mut writing, UP, sent, next).expect("writing a probe");
                assert_eq!(receive_from(&mut reading, UP, sent, next).bytes, PROBE);
                sent = next;
                proxy.status().relay().sum() == before
            });
            assert!(is_back, "it is copied for ever");
            let copied = proxy.status().relay().sum();
            let whole = sent + BULK;
            let writer = std::thread::spawn(move || send(&mut writing, UP, sent, whole).map(|()| writing));
            assert_eq!(receive_from(&mut reading, UP, sent, whole).bytes, BULK);
            let writing = writer.join().expect("the writer").expect("writing the bulk");
            assert_eq!(
                proxy.status().relay().sum(),
                copied,
                "of the bulk some was copied"
            );
            writing.shutdown(Shutdown::Write).expect("ending");
            receive_from(&mut reading, UP, whole, u64::MAX).must_be_whole(0);
            all += whole;
        }
        let status = proxy.settle();
        must_be_sound(&status);
        assert_eq!(status.carried().sum(), all);
        assert_eq!(status.number("/closes/finished"), 2, "{:#}", status.json());
        assert_eq!(status.fallbacks(), 0);
    }
}

#[test]
fn questions_and_answers_are_not_gathered_nor_is_bulk() {
    let _alone = alone();
    let (proxy, front) = proxy_with("127.0.0.1", "");
    let (mut client, upstream) = front.offloaded(&proxy, Towards::Upstream);
    let mut answering = upstream.try_clone().expect("a second handle");
    let answers = std::thread::spawn(move || std::io::copy(&mut answering.try_clone()?, &mut answering));
    ping(&mut client, UP, 3000).expect("questions");
    client.shutdown(Shutdown::Write).expect("ending");
    answers.join().expect("the answers").expect("answering");
    drop((client, upstream));
    let (writing, reader) = front.offloaded(&proxy, Towards::Downstream);
    let writer = Writer::start(&writing, DOWN, 64 * MIB, PIECE);
    finish(writer, writing, reader, DOWN, 0, 64 * MIB);
    let status = proxy.settle();
    assert_eq!(status.number("/gathers"), 0);
    assert_eq!(status.relay().sum(), 0, "{:#}", status.json());
}

#[test]
fn an_end_or_a_reset_among_small_pieces_arrives_as_what_it_is() {
    let _alone = alone();
    let (proxy, front) = proxy_with("127.0.0.1", "");
    for towards in Towards::BOTH {
        for number in 1..=12u64 {
            let bytes = number * 100_003;
            let (writing, reader) = front.offloaded(&proxy, towards);
            let reader = reading(&reader, UP);
            let writer = Writer::start_to_end(&writing, UP, bytes, SMALL);
            writer.join().expect("writing");
            drop(writing);
            reader.join().expect("the reader").must_be_whole(bytes);
            let (writing, reader) = front.offloaded(&proxy, towards);
            let reader = reading(&reader, UP);
            Writer::start(&writing, UP, bytes, SMALL).join().expect("writing");
            reset(writing);
            let got = reader.join().expect("the reader");
            got.must_be_a_prefix_and_a_reset(bytes);
        }
    }
    let status = proxy.settle();
    must_be_sound(&status);
    assert_eq!(status.number("/closes/finished"), 24, "{:#}", status.json());
    assert!(status.number("/gathers") > 0);
}

/// What a writer of small pieces has written, and whether a reset ended that.
struct Sent {
    bytes: u64,
    failed: bool,
}

/// Small pieces both ways on sessions that are old enough to outlive their worker, while `happen` is done to it again and again.
fn small_pieces_while(happen: impl Fn(&Proxy)) -> (Proxy, Vec<Received>, Vec<Sent>) {
    let (proxy, front) = proxy_with("127.0.0.1", "");
    let sessions: Vec<_> = (0..2).map(|_| front.open()).collect();
    proxy.wait("the sessions are kept", |s| s.number("/sessions/kept") == 2);
    let stop = &Flag::default();
    let (mut received, mut sent) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        let _stop = stop.raise_at_the_end();
        let ends: Vec<_> = sessions
            .iter()
            .flat_map(|(client, upstream)| [(client, upstream, UP), (upstream, client, DOWN)])
            .collect();
        let readers: Vec<_> = ends
            .iter()
            .map(|(_, reader, seed)| reading(reader, *seed))
            .collect();
        let writers: Vec<_> = ends
            .iter()
            .map(|&(writing, _, seed)| scope.spawn(move || pieces_until(writing, seed, stop)))
            .collect();
        for _ in 0..4 {
            pause(400);
            happen(&proxy);
        }
        pause(400);
        stop.raise();
        sent = writers
            .into_iter()
            .map(|writer| writer.join().expect("a writer"))
            .collect();
        received = readers
            .into_iter()
            .map(|reader| reader.join().expect("a reader"))
            .collect();
    });
    drop(sessions);
    (proxy, received, sent)
}

/// Writes small pieces until it is told to stop, and ends the stream then.
fn pieces_until(mut stream: &TcpStream, seed: u64, stop: &Flag) -> Sent {
    let mut bytes = 0;
    while !stop.is_up() && bytes < 64 * MIB {
        if send(&mut stream, seed, bytes, bytes + SMALL as u64).is_err() {
            return Sent { bytes, failed: true };
        }
        bytes += SMALL as u64;
    }
    let failed = stream.shutdown(Shutdown::Write).is_err();
    Sent { bytes, failed }
}

#[test]
fn reloads_amid_small_pieces_lose_nothing() {
    let _alone = alone();
    let (proxy, received, sent) = small_pieces_while(|proxy| drop(proxy.reload()));
    for (got, sent) in received.iter().zip(&sent) {
        got.must_be_whole(sent.bytes);
    }
    let status = proxy.settle();
    must_be_sound(&status);
    assert_eq!(
        status.carried().sum(),
        sent.iter().map(|sent| sent.bytes).sum::<u64>()
    );
    assert!(status.number("/gathers") > 0, "{:#}", status.json());
    assert!(status.sockmap().sum() > 0);
}

#[test]
fn the_death_of_a_worker_amid_small_pieces_leaves_them_whole_or_an_exact_prefix_and_a_reset() {
    let _alone = alone();
    let (proxy, received, sent) = small_pieces_while(|proxy| {
        let worker = proxy.worker();
        kill(Pid::from_raw(worker), Signal::SIGKILL).expect("killing");
        let replaced = within(Duration::from_secs(10), || {
            proxy.status().workers().iter().all(|w| w.pid != worker)
        });
        assert!(replaced, "{:?}", process::children(proxy.pid()));
    });
    let mut resets = 0;
    for (number, got) in received.iter().enumerate() {
        // A reset is told once: to the reader of a socket, or to who writes to it.
        match (got.ending, sent[number ^ 1].failed) {
            (Ending::Fin, false) => got.must_be_whole(sent[number].bytes),
            (Ending::Fin, true) => assert_eq!(got.wrong_at, None),
            // The last piece may have gone out in part.
            _ => got.must_be_a_prefix_and_a_reset(sent[number].bytes + SMALL as u64),
        }
        resets += u64::from(got.ending == Ending::Reset || sent[number ^ 1].failed);
    }
    eprintln!("{resets} of {} ends were reset", received.len());
    must_be_sound(&proxy.settle());
}

#[test]
fn a_reader_that_stops_amid_small_pieces_stops_their_writer() {
    const TOTAL: u64 = 256 * MIB;
    let _alone = alone();
    let (proxy, front) = proxy_with("127.0.0.1", "");
    for towards in Towards::BOTH {
        let (writing, mut reader) = front.offloaded(&proxy, towards);
        // Its own buffer would grow to whatever the host allows.
        setsockopt(&reader, RcvBuf, &(1 << 20)).expect("SO_RCVBUF");
        let writer = Writer::start(&writing, UP, TOTAL, SMALL);
        let read = receive_from(&mut reader, UP, 0, 4 * MIB).bytes;
        let accepted = writer.wait_for_stall();
        eprintln!("{towards:?}: {} bytes taken and not read", accepted - read);
        assert!(accepted - read < bound(), "{accepted} bytes taken, {read} read");
        assert_eq!(receive_from(&mut reader, UP, read, accepted + MIB).wrong_at, None);
        reset(reader);
        let _ = writer.join_failed();
    }
    let status = proxy.settle();
    must_be_sound(&status);
    assert!(status.number("/gathers") > 0);
}

#[test]
fn what_was_copied_counts_as_outstanding_no_longer_than_it_is() {
    const BULK: u64 = 32 * MIB;
    let _alone = alone();
    let (proxy, front) = proxy_with("127.0.0.1", "");
    for towards in Towards::BOTH {
        let (writing, mut reader) = front.offloaded(&proxy, towards);
        setsockopt(&reader, RcvBuf, &(64 * 1024)).expect("SO_RCVBUF");
        // A pause gives the target a send buffer that small pieces leave half empty.
        let writer = Writer::start(&writing, UP, BULK, PIECE);
        writer.wait_for_stall();
        let mut read = receive_from(&mut reader, UP, 0, BULK).bytes;
        writer.join().expect("writing the bulk");
        // Nobody reads the pieces, so nothing tells that they are acknowledged.
        let before = gathers(&proxy);
        let mut written = BULK;
        for _ in 0..20 {
            assert_eq!(receive_from(&mut reader, UP, read, written).bytes, written - read);
            read = written;
            written = pieces_while(&writing, written, || gathers(&proxy) == before);
            if gathers(&proxy) > before {
                break;
            }
        }
        assert!(gathers(&proxy) > before, "nothing was gathered");
        // The kernel has it again, and nothing comes.
        pause(BACK_AGAIN_MS);
        assert_eq!(receive_from(&mut reader, UP, read, written).bytes, written - read);
        proxy.wait("nothing is outstanding", |s| {
            s.number("/workers/0/backlog_bytes") == 0
        });
        drop((writing, reader));
    }
    must_be_sound(&proxy.settle());
}

/// Writes small pieces of a stream from there on as long as it shall, but no more than the target's send buffer takes with ease.
fn pieces_while(writing: &TcpStream, from: u64, go_on: impl Fn() -> bool) -> u64 {
    const MOST: u64 = 3 * MIB / 2;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (mut handle, mut written) = (writing, from);
            while !stop.load(Relaxed) && written < from + MOST {
                send(&mut handle, UP, written, written + SMALL as u64).expect("writing");
                written += SMALL as u64;
            }
            written
        });
        within(PATIENCE, || thread.is_finished() || !go_on());
        stop.store(true, Relaxed);
        thread.join().expect("the writer")
    })
}
