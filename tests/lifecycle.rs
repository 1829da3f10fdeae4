//! The master's life: signals, the pid file, the commands that find it, and its log file.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::pattern::{pause, ping};
use crate::harness::program::{Running, need, run};
use crate::harness::{Ending, Flag, PATIENCE, Plan, Proxy, Upstream, connect, process, receive, within};
use nix::sys::signal::Signal;

const DOWN: u64 = 22;
const SOON: Duration = PATIENCE;

/// A proxy before an echo, with one session open and at rest.
fn with_a_session(plan: Plan) -> (Proxy, TcpStream, std::net::SocketAddr, Upstream<()>) {
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = plan;
    let front = plan.server(&upstream);
    let proxy = plan.start();
    let mut client = connect(front);
    ping(&mut client, 1, 3).expect("a first echo");
    (proxy, client, front, upstream)
}

#[track_caller]
fn must_end_with_zero(proxy: &mut Proxy, limit: Duration) {
    let exit = proxy.wait_for_exit(limit);
    let exit = exit.unwrap_or_else(|| panic!("the master still runs after {limit:?}"));
    assert_eq!(exit.code(), Some(0), "{exit}");
}

#[test]
fn term_and_int_end_at_once_and_reset_open_sessions() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (mut proxy, mut client, _, _upstream) = with_a_session(Plan::new().workers(2));
        let workers = process::children(proxy.pid());
        assert_eq!(workers.len(), 2);
        proxy.signal(signal);
        must_end_with_zero(&mut proxy, SOON);
        assert!(
            within(SOON, || !workers.iter().any(|&w| process::is_alive(w))),
            "workers outlived the master"
        );
        assert_eq!(
            receive(&mut client, DOWN).ending,
            Ending::Reset,
            "a cut session ends in a reset"
        );
        assert!(
            !proxy.dir().join("master.pid").exists(),
            "the pid file is left behind"
        );
    }
}

#[test]
fn quit_lets_open_sessions_finish_and_takes_no_new_ones() {
    let (mut proxy, mut client, front, _upstream) = with_a_session(Plan::new().workers(2));
    proxy.signal(Signal::SIGQUIT);
    let refused = || match TcpStream::connect_timeout(&front, Duration::from_secs(1)) {
        Err(e) => e.kind() == std::io::ErrorKind::ConnectionRefused,
        Ok(_) => false,
    };
    assert!(within(SOON, refused), "new connections are still accepted");
    pause(500);
    assert!(
        proxy.wait_for_exit(Duration::ZERO).is_none(),
        "the master left an open session behind"
    );
    ping(&mut client, 2, 100).expect("the old session goes on");
    drop(client);
    must_end_with_zero(&mut proxy, SOON);
}

#[test]
fn quit_waits_no_longer_than_worker_shutdown_timeout() {
    let (mut proxy, mut client, _, _upstream) =
        with_a_session(Plan::new().global("worker_shutdown_timeout = \"1s\""));
    let start = Instant::now();
    proxy.signal(Signal::SIGQUIT);
    must_end_with_zero(&mut proxy, SOON);
    assert!(
        start.elapsed() > Duration::from_millis(800),
        "cut after {:?} already",
        start.elapsed()
    );
    assert_eq!(receive(&mut client, DOWN).ending, Ending::Reset);
}

#[test]
fn term_cuts_a_graceful_stop_short() {
    let (mut proxy, _client, _, _upstream) = with_a_session(Plan::new());
    proxy.signal(Signal::SIGQUIT);
    pause(300);
    proxy.signal(Signal::SIGTERM);
    must_end_with_zero(&mut proxy, SOON);
}

#[test]
fn the_commands_find_the_master_by_its_pid_file() {
    let (mut proxy, mut client, front, _upstream) = with_a_session(Plan::new());
    let pid = std::fs::read_to_string(proxy.dir().join("master.pid")).expect("the pid file");
    assert_eq!(pid.trim(), proxy.pid().to_string());

    let before = proxy.status().generation();
    proxy.command("reload").must_succeed("-s reload");
    proxy.wait("the generation has changed", |s| s.generation() == before + 1);
    ping(&mut client, 2, 10).expect("the old session after the reload");
    ping(&mut connect(front), 3, 10).expect("a new session after the reload");

    // Who stops a program must not have to mend its file first.
    proxy.edit("[stream]", "[stream]\nproxy_timeout = \"never\"");
    assert_eq!(proxy.command("reload").code, Some(1));
    proxy.command("reopen").must_succeed("-s reopen");
    proxy.command("quit").must_succeed("-s quit");
    pause(200);
    ping(&mut client, 4, 10).expect("the old session while the master waits for it");
    proxy.command("stop").must_succeed("-s stop");
    must_end_with_zero(&mut proxy, SOON);
}

#[test]
fn a_start_that_cannot_write_its_pid_file_leaves_no_half_of_one_behind() {
    let plan = Plan::new();
    let file = plan.file("proxy.toml");
    std::fs::write(&file, plan.text()).expect("writing the configuration");
    // As on a full disk: files are made, and nothing can be written into them. What it says goes through a pipe.
    let script = r#"{ (trap "" XFSZ; ulimit -f 0; exec "$0" -c "$1"); echo "exit $?"; } 2>&1 | cat"#;
    let mut command = Command::new("sh");
    command
        .args(["-c", script, env!("CARGO_BIN_EXE_master")])
        .arg(&file);
    let said = run(command, Duration::from_secs(10)).out;
    assert!(said.contains("failed to take the pid file"), "{said}");
    assert!(said.ends_with("exit 1\n"), "{said}");
    let folder = std::fs::read_dir(file.parent().expect("a folder")).expect("the folder");
    let names = folder.map(|entry| entry.expect("an entry").file_name().display().to_string());
    let names: Vec<String> = names.filter(|name| name.ends_with(".new")).collect();
    assert!(names.is_empty(), "{names:?}");
}

#[test]
fn what_keeps_the_program_from_starting_is_in_its_error_log_too() {
    let plan = Plan::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address");
    let log = plan.file("error.log");
    let plan = plan
        .global(&format!("error_log = {{ path = \"{}\" }}", log.display()))
        .tables(&format!(
            "[[server]]\nlisten = \"{address}\"\nproxy_pass = \"127.0.0.1:1\"\n"
        ));
    let file = plan.file("proxy.toml");
    std::fs::write(&file, plan.text()).expect("writing the configuration");
    let mut command = Command::new(env!("CARGO_BIN_EXE_master"));
    command.arg("-c").arg(&file);
    let finished = run(command, Duration::from_secs(20));
    assert_eq!(finished.code, Some(1), "{finished:?}");
    let words = format!("failed to bind {address}");
    assert!(finished.err.contains(&words), "{finished:?}");
    let log = std::fs::read_to_string(log).expect("the log");
    assert!(log.contains(&words), "{log}");
}

#[test]
fn a_stale_pid_file_is_refused_and_nobody_is_signalled() {
    let proxy = Plan::new();
    let file = proxy.file("proxy.toml");
    std::fs::write(&file, proxy.text()).expect("writing the configuration");
    let pid_file = proxy.file("master.pid");
    let stop = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_master"));
        command.args(["-s", "stop", "-c"]).arg(&file);
        run(command, Duration::from_secs(10))
    };

    let missing = stop();
    assert_eq!(missing.code, Some(1), "without a pid file: {missing:?}");
    assert!(
        missing.err.contains("master.pid"),
        "the error names the file: {}",
        missing.err
    );

    let mut gone = Command::new(need("true", "coreutils"))
        .spawn()
        .expect("running true");
    gone.wait().expect("waiting for true");
    std::fs::write(&pid_file, format!("{}\n", gone.id())).expect("writing the pid file");
    let dead = stop();
    assert_eq!(dead.code, Some(1), "with the pid of nobody: {dead:?}");
    assert!(
        dead.err.contains("master.pid"),
        "the error names the file: {}",
        dead.err
    );

    let mut sleep = Command::new(need("sleep", "coreutils"));
    sleep.arg("50");
    let innocent = Running::start(sleep);
    std::fs::write(&pid_file, format!("{}\n", innocent.pid())).expect("writing the pid file");
    let foreign = stop();
    assert_eq!(
        foreign.code,
        Some(1),
        "with the pid of another program: {foreign:?}"
    );
    pause(100);
    assert!(process::is_alive(innocent.pid()), "another program was signalled");

    std::fs::write(&pid_file, "not a number\n").expect("writing the pid file");
    assert_eq!(stop().code, Some(1), "with a pid file that holds no number");
}

#[test]
fn the_check_of_a_configuration_is_safe_beside_a_running_proxy() {
    let (proxy, mut client, front, _upstream) = with_a_session(Plan::new());
    for _ in 0..3 {
        let mut command = Command::new(env!("CARGO_BIN_EXE_master"));
        command.args(["-t", "-c"]).arg(proxy.file());
        let checked = run(command, Duration::from_secs(20));
        let said = format!("{}{}", checked.out, checked.err);
        assert_eq!(checked.code, Some(0), "{said}");
        let expected = format!("configuration file {} test is successful", proxy.file().display());
        assert!(said.contains(&expected), "{said}");
        ping(&mut client, 2, 10).expect("the old session");
        ping(&mut connect(front), 3, 10).expect("a new session");
    }
    let pid = std::fs::read_to_string(proxy.dir().join("master.pid")).expect("the pid file");
    assert_eq!(
        pid.trim(),
        proxy.pid().to_string(),
        "the check must not touch the pid file"
    );
}

#[test]
fn usr1_reopens_a_log_file_that_was_moved_away() {
    let plan = Plan::new();
    let (log, moved) = (plan.file("error.log"), plan.file("error.log.1"));
    let (proxy, client, front, _upstream) = with_a_session(plan.global(&format!(
        "error_log = {{ path = \"{}\", level = \"debug\" }}",
        log.display()
    )));
    drop(client);
    proxy.settle();
    std::fs::rename(&log, &moved).expect("moving the log away");
    proxy.signal(Signal::SIGUSR1);
    assert!(within(SOON, || log.exists()), "no new log file after USR1");
    let closed = |pid: i32| within(SOON, || !process::descriptors(pid).contains(&moved));
    assert!(
        closed(proxy.pid()) && closed(proxy.worker()),
        "the old file is kept"
    );
    let old = std::fs::read(&moved).expect("the old log").len();

    let pid = proxy.worker().to_string();
    ping(&mut connect(front), 2, 1).expect("a session");
    proxy.settle();
    proxy.signal(Signal::SIGHUP);
    let read = || std::fs::read_to_string(&log).unwrap_or_default();
    assert!(
        within(SOON, || read().contains(&pid)),
        "the worker does not write to the new file:\n{}",
        read()
    );
    let master = format!(" {}: ", proxy.pid());
    assert!(
        within(SOON, || read().contains(&master)),
        "the master does not write to the new file:\n{}",
        read()
    );
    assert_eq!(
        std::fs::read(&moved).expect("the old log").len(),
        old,
        "the old file still grows"
    );
}

#[test]
fn a_named_pipe_that_nobody_reads_holds_up_neither_start_nor_reload_nor_replacement() {
    let plan = Plan::new();
    let pipe = plan.file("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("a named pipe");
    let log = format!(
        "error_log = {{ path = \"{}\", level = \"debug\" }}",
        pipe.display()
    );
    let (mut proxy, client, front, _upstream) = with_a_session(plan.global(&log));
    drop(client);
    let mut filling = OpenOptions::new();
    filling.write(true).custom_flags(nix::libc::O_NONBLOCK);
    let mut filling = filling.open(&pipe).expect("the pipe");
    while filling.write(b"full\n").is_ok() {}
    let started = Instant::now();
    for seed in 0..10 {
        ping(&mut connect(front), seed, 1).expect("an echo");
    }
    for _ in 0..3 {
        proxy.reload();
    }
    let victim = proxy.worker();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(victim), Signal::SIGKILL).expect("killing the worker");
    proxy.wait("another worker serves", |s| {
        s.workers().len() == 1 && s.workers()[0].pid != victim
    });
    assert!(started.elapsed() < 2 * SOON, "the log held somebody up");
    proxy.wait("the lines are counted", |s| s.number("/log_lines_dropped") > 0);
    // A reader has whole lines, of the master too.
    let mut lines = BufReader::new(File::open(&pipe).expect("the pipe")).lines();
    let of_the_master = format!(" {}: SIGUSR1", proxy.pid());
    let heard = Flag::default();
    std::thread::scope(|scope| {
        let _heard = heard.raise_at_the_end();
        // Again and again: what is said while the pipe is full is lost, and its reader may be slow.
        scope.spawn(|| {
            while !heard.is_up() {
                proxy.signal(Signal::SIGUSR1);
                pause(100);
            }
        });
        let found = lines.by_ref().map(|line| line.expect("a line")).find(|line| {
            let whole = line == "full" || line.starts_with("20") && line.contains("Z [");
            assert!(whole, "half a line: {line}");
            line.contains(&of_the_master)
        });
        assert!(found.is_some());
    });
    proxy.signal(Signal::SIGQUIT);
    must_end_with_zero(&mut proxy, SOON);
}

#[test]
fn lines_that_a_full_disk_does_not_take_are_counted() {
    let (proxy, client, front, _upstream) =
        with_a_session(Plan::new().global("error_log = { path = \"/dev/full\", level = \"info\" }"));
    let of_the_master = proxy.status().number("/log_lines_dropped");
    assert!(
        of_the_master > 0,
        "what the master said at its start is not counted"
    );
    drop(client);
    for seed in 0..5 {
        ping(&mut connect(front), seed, 1).expect("an echo");
    }
    proxy.wait("the worker's lines are counted", |s| {
        s.number("/log_lines_dropped") >= of_the_master + 6
    });
}
