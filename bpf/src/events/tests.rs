//! The reader of a ring buffer beside a program that fills it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use libbpf_rs::libbpf_sys::{self, bpf_insn};
use libbpf_rs::{MapHandle, MapType};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::{Event, EventKind, Events};

/// BPF instructions (linux/bpf.h), as `struct bpf_insn` has them.
fn instruction(code: u32, registers: u8, offset: i16, immediate: i32) -> bpf_insn {
    let [to, from] = [registers & 0xf, registers >> 4];
    bpf_insn {
        code: code as u8,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(to, from),
        off: offset,
        imm: immediate,
    }
}

/// A program that puts one event, of the first pair's first flow that is held back, into the ring buffer.
fn teller(ring: &MapHandle) -> OwnedFd {
    use libbpf_sys::*;
    const EVENT: i16 = -8;
    let program = [
        instruction(BPF_ST | BPF_MEM | BPF_W, 10, EVENT, 0),
        instruction(BPF_ST | BPF_MEM | BPF_W, 10, EVENT + 4, 1),
        instruction(
            BPF_LD | BPF_DW | BPF_IMM,
            1 | (BPF_PSEUDO_MAP_FD as u8) << 4,
            0,
            ring.as_fd().as_raw_fd(),
        ),
        instruction(0, 0, 0, 0),
        instruction(BPF_ALU64 | BPF_MOV | BPF_X, 2 | 10 << 4, 0, 0),
        instruction(BPF_ALU64 | BPF_ADD | BPF_K, 2, 0, EVENT.into()),
        instruction(BPF_ALU64 | BPF_MOV | BPF_K, 3, 0, 8),
        instruction(BPF_ALU64 | BPF_MOV | BPF_K, 4, 0, 0),
        instruction(BPF_JMP | BPF_CALL, 0, 0, BPF_FUNC_ringbuf_output as i32),
        instruction(BPF_JMP | BPF_EXIT, 0, 0, 0),
    ];
    let mut options = bpf_prog_load_opts {
        sz: size_of::<bpf_prog_load_opts>() as _,
        prog_flags: BPF_F_SLEEPABLE,
        ..Default::default()
    };
    // SAFETY: the program, the strings and the options live across the call.
    let loaded = unsafe {
        bpf_prog_load(
            BPF_PROG_TYPE_SYSCALL,
            c"tell".as_ptr(),
            c"GPL".as_ptr(),
            program.as_ptr(),
            program.len() as _,
            &mut options,
        )
    };
    assert!(loaded >= 0, "failed to load a program (as root?): error {loaded}");
    // SAFETY: a new descriptor that nobody else has.
    unsafe { OwnedFd::from_raw_fd(loaded) }
}

fn tell(program: BorrowedFd<'_>) {
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as _,
        ..Default::default()
    };
    // SAFETY: the program takes no context; the options live across the call.
    let result = unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &mut options) };
    assert_eq!(result, 0, "failed to run the program");
}

#[test]
fn an_edge_triggered_reader_is_told_of_every_event() {
    /// Far fewer than the ring buffer holds.
    const AHEAD: usize = 100;
    /// One in some 20,000 came at the wrong moment when it was not looked for again.
    const TOLD: usize = 600_000;
    const PATIENCE: Duration = Duration::from_secs(3);
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as _,
        ..Default::default()
    };
    let ring = MapHandle::create(MapType::RingBuf, Some("events"), 0, 0, 64 * 1024, &options)
        .expect("a ring buffer");
    let program = teller(&ring);
    let mut events = Events::open(&ring).expect("its reader");
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll");
    // SAFETY: the reader has it open until after the last use.
    let readable = unsafe { BorrowedFd::borrow_raw(events.raw_fd()) };
    let interest = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0);
    epoll.add(readable, interest).expect("watching the reader");
    let (taken, overlooked) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let end = Instant::now() + PATIENCE;
            for told in 1..=TOLD {
                tell(program.as_fd());
                // Not always at the same distance from the reader's turn.
                (0..told * 7919 % 500).for_each(|_| std::hint::spin_loop());
                while told > taken.load(SeqCst) + AHEAD && overlooked.load(SeqCst) == 0 {
                    std::thread::yield_now();
                }
                if overlooked.load(SeqCst) > 0 || Instant::now() > end {
                    break;
                }
            }
            taken.fetch_add(TOLD, SeqCst);
        });
        let mut happened = [EpollEvent::empty()];
        while taken.load(SeqCst) < TOLD {
            let patience = EpollTimeout::try_from(Duration::from_secs(1)).expect("a second");
            let woken = epoll.wait(&mut happened, patience).expect("waiting");
            let came = events.take();
            let first = Event {
                pair: 0,
                direction: culvert_shared::ids::Direction::ToUpstream,
                kind: EventKind::Paused,
            };
            assert!(came.iter().all(|event| *event == first));
            if woken == 0 {
                overlooked.fetch_add(came.len(), SeqCst);
            }
            taken.fetch_add(came.len(), SeqCst);
        }
    });
    assert_eq!(
        overlooked.into_inner(),
        0,
        "events lay there and the reader was not told"
    );
}
