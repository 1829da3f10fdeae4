//! Each attempt is made by a process of its own: this test program, started again for one test that is
//! ignored otherwise, because a confined process stays so and some attempts end it.

use super::*;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{setsockopt, sockopt};
use std::ffi::CString;
use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

const ATTEMPT: &str = "CONFINE_ATTEMPT";
/// The exit status of an attempt that was answered with an error, as it should be.
const REFUSED_WITH_ERROR: i32 = 42;
/// The exit status of an attempt that went well, as it should.
const DONE: i32 = 43;
const UNIX_PEER: &str = "CONFINE_UNIX_PEER";
const SIGSYS: i32 = libc::SIGSYS;

fn command(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "confine::tests::the_attempt",
            "--ignored",
            "--nocapture",
        ])
        .env(ATTEMPT, name);
    command
}

fn attempt(name: &str) -> Output {
    command(name).output().unwrap()
}

#[track_caller]
fn must_be_killed(name: &str) {
    let output = attempt(name);
    assert_eq!(output.status.signal(), Some(SIGSYS), "{name}: {output:?}");
}

#[track_caller]
fn must_be_refused(name: &str) {
    let output = attempt(name);
    assert_eq!(
        output.status.code(),
        Some(REFUSED_WITH_ERROR),
        "{name}: {output:?}"
    );
}

fn refused<T>(result: std::io::Result<T>) -> ! {
    match result.map(drop).map_err(|error| error.raw_os_error()) {
        Err(Some(libc::EACCES)) => std::process::exit(REFUSED_WITH_ERROR),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
#[ignore = "made by the other tests, in a process of its own"]
fn the_attempt() {
    let name = std::env::var(ATTEMPT).expect("this is no test by itself");
    let cgroup = culvert_bpf::Cgroup::stay().unwrap();
    // libbpf looks at files when it is first asked for a map, which would hide what comes after.
    if name == "making a map" {
        drop(culvert_bpf::Bpf::open(&cgroup).expect("needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"));
    }
    if name == "opening a file, landlock alone" {
        close_file_system().unwrap();
        refused(File::open("/dev/null"))
    }
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let path = std::env::var(UNIX_PEER).unwrap_or_default();
    apply().unwrap();
    assert!(
        APPLIED.get().is_some_and(|applied| applied.missing().is_none()),
        "{APPLIED:?}"
    );
    match name.as_str() {
        "opening a file" => refused(File::open("/dev/null")),
        "opening a file in a thread" => {
            let opened = std::thread::spawn(|| File::open("/dev/null")).join().unwrap();
            refused(opened)
        }
        "looking at a file" => refused(std::fs::metadata("/etc/passwd")),
        "executing a program" => {
            let path = CString::new("/bin/true").unwrap();
            let never = nix::unistd::execv(&path, &[&path]);
            panic!("{never:?}")
        }
        "executing a program in a thread" => {
            let path = CString::new("/bin/true").unwrap();
            let never = std::thread::spawn(move || nix::unistd::execv(&path, &[&path])).join();
            panic!("{never:?}")
        }
        "starting a process" => panic!("{:?}", Command::new("/bin/true").status()),
        "tracing" => panic!("{:?}", nix::sys::ptrace::traceme()),
        "signalling another process" => {
            panic!("{:?}", nix::sys::signal::kill(nix::unistd::getppid(), None))
        }
        "choosing among the workers" => {
            let program = libc::sock_fprog {
                len: 0,
                filter: std::ptr::null_mut(),
            };
            panic!("{:?}", setsockopt(&tcp, sockopt::AttachReusePortCbpf, &program))
        }
        "writing over a log" => panic!("{:?}", fcntl(&tcp, FcntlArg::F_SETFL(OFlag::empty()))),
        "listening" => panic!("{:?}", TcpListener::bind("127.0.0.1:0")),
        "a datagram socket" => panic!("{:?}", std::os::unix::net::UnixDatagram::unbound()),
        "making a map" => panic!("{:?}", culvert_bpf::Bpf::open(&cgroup).map(drop)),
        "working" => {
            let stream = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
            stream.set_nonblocking(true).unwrap();
            tcp.accept().unwrap();
            setsockopt(&stream, sockopt::KeepAlive, &true).unwrap();
            fcntl(tcp.try_clone().unwrap(), FcntlArg::F_GETFL).unwrap();
            UnixStream::connect(path).unwrap();
            let second = std::thread::Builder::new().name("second".into()).spawn(|| ());
            second.unwrap().join().unwrap();
            std::process::exit(DONE)
        }
        other => panic!("no attempt {other:?}"),
    }
}

#[test]
fn files_are_out_of_reach_by_either_means() {
    must_be_refused("opening a file, landlock alone");
    must_be_refused("opening a file");
    must_be_refused("looking at a file");
}

#[test]
fn a_thread_that_starts_later_is_confined_as_well() {
    must_be_refused("opening a file in a thread");
    must_be_killed("executing a program in a thread");
}

#[test]
fn what_no_worker_does_ends_the_process() {
    for name in [
        "executing a program",
        "starting a process",
        "tracing",
        "signalling another process",
        "writing over a log",
        "choosing among the workers",
        "listening",
        "a datagram socket",
        "making a map",
    ] {
        must_be_killed(name);
    }
}

#[test]
fn what_a_worker_does_is_open_to_it() {
    let path = std::env::temp_dir().join(format!("culvert-confine-{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let output = command("working").env(UNIX_PEER, &path).output().unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(output.status.code(), Some(DONE), "{output:?}");
    listener.accept().unwrap();
}

#[test]
fn what_the_kernel_lacks_is_named() {
    let all = Confinement {
        seccomp: true,
        landlock: Some(6),
    };
    assert_eq!(all.missing(), None);
    assert_eq!(all.to_string(), "seccomp, landlock 6");
    let none = Confinement {
        seccomp: false,
        landlock: None,
    };
    let words = none.missing().unwrap();
    assert!(
        words.contains("CONFIG_SECCOMP_FILTER") && words.contains("CONFIG_SECURITY_LANDLOCK"),
        "{words}"
    );
    assert_eq!(none.to_string(), "no seccomp, no landlock");
}
