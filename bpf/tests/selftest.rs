//! The self-test passes on this kernel, and each of its steps notices what it is there for. What is spoilt
//! is spoilt in the kernel's own maps, so that the kernel itself does the wrong thing. Its sessions also show what
//! the program announces as a socket's window. Needs root.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;
use std::time::Duration;

use culvert_bpf::selftest::{Session, run, run_meddled};
use culvert_bpf::{Bpf, Cgroup, SlotMaps};
use culvert_shared::ids::Direction;
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::libc;

/// What is spoilt is mostly noticed when a step's time is over.
const STEP_TIME: Duration = Duration::from_secs(1);

/// The process changes its cgroup, so one test at a time.
static ONE: Mutex<()> = Mutex::new(());

fn open() -> (Cgroup, Bpf) {
    let cgroup = Cgroup::enter().expect("a cgroup2 mount");
    let bpf = Bpf::open(&cgroup).expect("needs root");
    (cgroup, bpf)
}

// Places of the maps in `SlotMaps::fds`.
const SOURCES: usize = 0;
const TARGETS: usize = 1;
const FLOWS: usize = 2;

// Offsets in `struct flow` (c/abi.h).
const NEXT_SEQ: usize = 32;
const HIGH_BYTES: usize = 44;
const LANE: usize = 68;
const GATHER: usize = 96;
const WINDOW_BYTES: usize = 100;
const NARROWED: usize = 108;

fn map(maps: &SlotMaps, place: usize) -> MapHandle {
    let fd: RawFd = maps.fds()[place];
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).expect("what the descriptor is");
    let id = info.lines().find_map(|line| line.strip_prefix("map_id:"));
    let id = id.expect("a map").trim().parse().expect("a number");
    MapHandle::from_map_id(id).expect("opening a map needs CAP_SYS_ADMIN")
}

fn key(session: &Session<'_>, direction: Direction) -> [u8; 4] {
    (2 * session.place.0 + direction as u32).to_ne_bytes()
}

/// Changes one word of a flow.
fn change(session: &Session<'_>, direction: Direction, offset: usize, new: impl FnOnce(u32) -> u32) {
    let flows = map(session.maps, FLOWS);
    let key = key(session, direction);
    let mut flow = flows
        .lookup(&key, MapFlags::ANY)
        .expect("looking up")
        .expect("a flow");
    let word = &mut flow[offset..offset + 4];
    let old = u32::from_ne_bytes((&*word).try_into().expect("four bytes"));
    word.copy_from_slice(&new(old).to_ne_bytes());
    flows.update(&key, &flow, MapFlags::ANY).expect("updating");
}

/// Takes the socket where a direction begins out of a sockmap.
fn remove(session: &Session<'_>, place: usize, direction: Direction) {
    map(session.maps, place)
        .delete(&key(session, direction))
        .expect("deleting");
}

/// Does the self-test, spoiling one step; returns what it said.
fn spoilt(step: &str, spoil: impl Fn(&Session<'_>)) -> String {
    let _one = ONE.lock().unwrap_or_else(|error| error.into_inner());
    let (_cgroup, bpf) = open();
    let mut was_there = false;
    let result = run_meddled(&bpf, STEP_TIME, &mut |name, session| {
        if name == step {
            was_there = true;
            spoil(session);
        }
    });
    assert!(was_there, "the self-test came as far as {step}: {result:?}");
    let said = format!("{:#}", result.expect_err("the self-test was to fail"));
    println!("{said}");
    assert!(said.contains(&format!("failed at {step}: ")), "{said}");
    said
}

#[test]
fn this_kernel_passes_quickly_and_nothing_of_it_is_counted_as_traffic() {
    let _one = ONE.lock().unwrap_or_else(|error| error.into_inner());
    let (_cgroup, bpf) = open();
    let took = run(&bpf).expect("passing");
    println!("{took:?}");
    // Where the processors have nothing else to do, a tenth of a second.
    assert!(took < Duration::from_secs(4), "it took {took:?}");
    for direction in Direction::BOTH {
        assert_eq!(bpf.totals().forwarded_bytes(direction), 0);
    }
}

#[test]
fn it_leaves_no_descriptor_behind() {
    let _one = ONE.lock().unwrap_or_else(|error| error.into_inner());
    let count = || fs::read_dir("/proc/self/fd").expect("descriptors").count();
    let (_cgroup, bpf) = open();
    let before = count();
    for _ in 0..3 {
        run(&bpf).expect("passing");
    }
    assert_eq!(count(), before);
}

#[test]
fn a_pair_whose_bytes_are_not_forwarded_fails_at_activation() {
    let said = spoilt("activation", |session| {
        remove(session, TARGETS, Direction::ToDownstream)
    });
    assert!(said.contains("server: "), "{said}");
}

#[test]
fn bytes_that_come_twice_fail_at_overlap() {
    // The program takes the next segment's old bytes for new ones.
    let said = spoilt("overlap", |session| {
        change(session, Direction::ToUpstream, NEXT_SEQ, |seq| {
            seq.wrapping_sub(4)
        })
    });
    assert!(said.contains("server: from byte 8 on"), "{said}");
}

#[test]
fn a_target_that_a_fin_has_ended_fails_at_end_of_stream() {
    // What redirecting an empty segment does to its target.
    let said = spoilt("end of stream", |session| {
        let _ = session.upstream.stream().shutdown(std::net::Shutdown::Write);
    });
    assert!(said.contains("upstream: "), "{said}");
}

#[test]
fn the_other_direction_cut_off_fails_at_end_of_stream() {
    let said = spoilt("end of stream", |session| {
        remove(session, SOURCES, Direction::ToDownstream)
    });
    assert!(said.contains("client: 0 of 4000 bytes came"), "{said}");
}

#[test]
fn a_backlog_that_is_thrown_away_fails_at_partial_send() {
    let said = spoilt("partial send", |session| {
        for place in [SOURCES, TARGETS] {
            remove(session, place, Direction::ToDownstream);
        }
    });
    assert!(said.contains("server: "), "{said}");
}

#[test]
fn a_source_that_is_never_held_back_fails_at_pause_and_resume() {
    let said = spoilt("pause and resume", |session| {
        change(session, Direction::ToUpstream, HIGH_BYTES, |_| i32::MAX as u32)
    });
    assert!(said.contains("was to be held back"), "{said}");
}

#[test]
fn a_program_that_does_not_say_when_a_target_has_drained_fails_at_pause_and_resume() {
    let said = spoilt("pause and resume", |session| {
        change(session, Direction::ToUpstream, LANE, |_| u32::MAX)
    });
    assert!(said.contains("the program said 0 times"), "{said}");
}

/// The largest window that a socket announces, after it was set to `new` if given.
fn window_clamp(socket: &TcpStream, new: Option<u32>) -> u32 {
    let (fd, level, name) = (socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP);
    let mut bytes = new.unwrap_or(0);
    let mut len = size_of::<u32>() as libc::socklen_t;
    // SAFETY: both look at no more than the word, which lives across the calls.
    let failed = unsafe {
        let word = std::ptr::from_mut(&mut bytes).cast();
        new.is_some_and(|_| libc::setsockopt(fd, level, name, word, len) != 0)
            || libc::getsockopt(fd, level, name, word, &mut len) != 0
    };
    assert!(!failed, "TCP_WINDOW_CLAMP: {}", std::io::Error::last_os_error());
    bytes
}

/// The largest window that a source announces once segments have come, if it was `before` until then and these words of the
/// source's flow are changed.
fn largest_announced(before: u32, words: &[(usize, u32)]) -> u32 {
    let _one = ONE.lock().unwrap_or_else(|error| error.into_inner());
    let (_cgroup, bpf) = open();
    let mut clamp = None;
    // It fails: more comes than it has sent.
    let _ = run_meddled(&bpf, STEP_TIME, &mut |name, session| {
        if name != "activation" {
            return;
        }
        let source = session.upstream.stream();
        window_clamp(source, Some(before));
        for (offset, word) in words {
            change(session, Direction::ToDownstream, *offset, |_| *word);
        }
        let mut server = session.server.stream();
        for _ in 0..20 {
            server.write_all(&[0; 100]).expect("sending");
            std::thread::sleep(Duration::from_millis(5));
        }
        clamp = Some(window_clamp(source, None));
    });
    clamp.expect("the self-test came as far as activation")
}

#[test]
fn a_window_that_was_narrowed_is_as_large_as_before_once_nothing_is_gathered() {
    let window = 60_000;
    for narrow in [window / 8, window / 2 + 1, window - 1] {
        let words = [(WINDOW_BYTES, window), (NARROWED, 1)];
        assert_eq!(largest_announced(narrow, &words), window, "after {narrow}");
    }
}

#[test]
fn a_buffer_that_grows_while_nothing_waits_there_announces_no_more() {
    // A window that a fresh buffer is more than twice as large as.
    let window = 30_000;
    for narrowed in [0, 1] {
        let words = [(WINDOW_BYTES, window), (GATHER, 1), (NARROWED, narrowed)];
        assert_eq!(
            largest_announced(2 * window, &words),
            window,
            "narrowed: {narrowed}"
        );
    }
}
