//! Real programs through the proxy, each with the proof that the kernel carried what the program
//! counted: iperf3, curl, redis, ssh, PostgreSQL.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::program::{Running, need, run, shell};
use crate::harness::{Plan, Port, Proxy, Scratch, Status, pattern};
use nix::sys::signal::Signal;
use serde_json::Value;

const MINUTE: Duration = Duration::from_secs(60);

/// A proxy with two workers before a program that listens on `address`.
fn proxy_before(address: SocketAddr) -> (Proxy, SocketAddr) {
    let mut plan = Plan::new().workers(2).lifetime(MINUTE * 2);
    let front = plan.server(address);
    (plan.start(), front)
}

/// A waiting connection would be a session: asks only once the proxy is at rest.
#[track_caller]
fn assert_the_kernel_carried(status: &Status, direction: &str, counted: u64) {
    let sockmap = status.number(&format!("/bytes/sockmap/{direction}"));
    let relay = status.number(&format!("/bytes/relay/{direction}"));
    assert!(counted > 0, "the program counted nothing {direction}");
    // What a source has left that ends while it is held back is copied, however much there was before.
    let copied = (counted / 100).max((16 << 20).min(counted / 10));
    assert!(
        sockmap + copied >= counted,
        "{direction}: the program counted {counted} bytes, the kernel carried {sockmap}, user space {relay}"
    );
    assert!(
        relay <= copied,
        "{direction}: user space carried {relay} of {counted} bytes"
    );
}

#[test]
fn iperf3_is_carried_by_the_kernel_in_both_directions() {
    let iperf3 = need("iperf3", "iperf3");
    for (direction, options) in [
        ("to_upstream", &[][..]),
        ("to_downstream", &["-R"]),
        ("both", &["--bidir", "-P2"]),
    ] {
        let port = Port::claim();
        let address = port.on("127.0.0.1");
        let mut server = Command::new(&iperf3);
        server.args(["-s", "-B", "127.0.0.1", "-p", &address.port().to_string()]);
        let _server = Running::start(server).wait_for(address);
        let (proxy, front) = proxy_before(address);

        let mut client = Command::new(&iperf3);
        client
            .args([
                "-J",
                "-t",
                "2",
                "-c",
                "127.0.0.1",
                "-p",
                &front.port().to_string(),
            ])
            .args(options);
        let report = run(client, MINUTE).must_succeed("iperf3");
        let report: Value = serde_json::from_str(&report).expect("iperf3's report is JSON");
        let counted = |key: &str| {
            let bytes = report
                .pointer(&format!("/end/{key}/bytes"))
                .and_then(Value::as_u64);
            bytes.unwrap_or_else(|| panic!("iperf3's report has no bytes in {key}: {report:#}"))
        };
        let status = proxy.settle();
        if direction == "both" {
            assert_the_kernel_carried(&status, "to_upstream", counted("sum_received"));
            assert_the_kernel_carried(&status, "to_downstream", counted("sum_received_bidir_reverse"));
        } else {
            assert_the_kernel_carried(&status, direction, counted("sum_received"));
        }
    }
}

/// One GiB in which no two blocks are alike.
fn write_a_gibibyte(file: &Path) {
    use std::io::Write;
    let mut block = vec![0u8; 4 << 20];
    pattern::fill(7, 0, &mut block);
    let mut out = std::fs::File::create(file).expect("creating the file");
    for number in 0..256u64 {
        for page in block.chunks_mut(4096) {
            page[..8].copy_from_slice(&number.to_le_bytes());
        }
        out.write_all(&block).expect("writing the file");
    }
}

#[test]
fn curl_gets_a_gibibyte_with_the_right_sha256() {
    let (curl, python) = (need("curl", "curl"), need("python3", "python3"));
    need("sha256sum", "coreutils");
    let scratch = Scratch::new();
    write_a_gibibyte(&scratch.file("big"));
    let port = Port::claim();
    let address = port.on("127.0.0.1");
    let mut server = Command::new(python);
    server
        .args(["-m", "http.server", "--bind", "127.0.0.1", "--directory"])
        .arg(scratch.path());
    server.arg(address.port().to_string());
    let _server = Running::start(server).wait_for(address);
    let (proxy, front) = proxy_before(address);

    let sum = |line: &str| shell(line, MINUTE).split_whitespace().next().map(str::to_owned);
    let wanted = sum(&format!("sha256sum < {}", scratch.file("big").display()));
    let got = sum(&format!("{} -sSf http://{front}/big | sha256sum", curl.display()));
    assert_eq!(got, wanted, "the SHA-256 of what curl got");
    assert_the_kernel_carried(&proxy.settle(), "to_downstream", 1 << 30);
}

#[test]
fn redis_answers_its_benchmark_and_returns_what_was_stored() {
    let (server, benchmark) = (
        need("redis-server", "redis-server"),
        need("redis-benchmark", "redis-tools"),
    );
    let cli = need("redis-cli", "redis-tools");
    let scratch = Scratch::new();
    let port = Port::claim();
    let address = port.on("127.0.0.1");
    let mut command = Command::new(server);
    command.args([
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        "--port",
    ]);
    command
        .arg(address.port().to_string())
        .arg("--dir")
        .arg(scratch.path());
    let _server = Running::start(command).wait_for(address);
    let (proxy, front) = proxy_before(address);
    let on = |address: SocketAddr| format!("-h {} -p {}", address.ip(), address.port());

    let value = "0123456789abcdef".repeat(20_000);
    std::fs::write(scratch.file("value"), &value).expect("writing the value");
    let cli = cli.display();
    shell(
        &format!(
            "{cli} {} -x set key < {}",
            on(front),
            scratch.file("value").display()
        ),
        MINUTE,
    );
    assert_eq!(
        shell(&format!("{cli} {} get key", on(front)), MINUTE).trim_end(),
        value
    );

    let line = format!(
        "{} {} -t set,get -c 20 -n 30000 -d 2000 --csv",
        benchmark.display(),
        on(front)
    );
    let report = shell(&line, MINUTE);
    assert!(
        report.contains("\"SET\"") && report.contains("\"GET\""),
        "redis-benchmark wrote: {report}"
    );

    let status = proxy.settle();
    // Asked past the proxy; the few bytes of the question and of the waiting connection are noise.
    let info = shell(&format!("{cli} {} info stats", on(address)), MINUTE);
    let counted = |key: &str| {
        let line = info
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|n| n.trim().parse::<u64>().ok())
            .unwrap_or_else(|| panic!("redis has no {key}: {info}"))
    };
    assert_the_kernel_carried(&status, "to_upstream", counted("total_net_input_bytes") - 10_000);
    assert_the_kernel_carried(
        &status,
        "to_downstream",
        counted("total_net_output_bytes") - 10_000,
    );
}

#[test]
fn ssh_copies_both_ways_although_the_server_talks_first() {
    const LENGTH: u64 = 48 << 20;
    let (sshd, ssh) = (need("sshd", "openssh-server"), need("ssh", "openssh-client"));
    let keygen = need("ssh-keygen", "openssh-client");
    let scratch = Scratch::new();
    let dir = scratch.path().display();
    shell(
        &format!(
            "mkdir -p /run/sshd; cd {dir}; for k in host user; do {} -q -t ed25519 -N '' -f $k; done",
            keygen.display()
        ),
        MINUTE,
    );
    let port = Port::claim();
    let address = port.on("127.0.0.1");
    let config = format!(
        "ListenAddress {address}\nHostKey {dir}/host\nAuthorizedKeysFile {dir}/user.pub\nPidFile none\n\
         StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nUseDNS no\n"
    );
    std::fs::write(scratch.file("sshd_config"), config).expect("writing sshd_config");
    let mut command = Command::new(sshd);
    command.args(["-D", "-e", "-f"]).arg(scratch.file("sshd_config"));
    let _server = Running::start(command).wait_for(address);
    let (proxy, front) = proxy_before(address);

    let mut data = vec![0u8; LENGTH as usize];
    pattern::fill(9, 0, &mut data);
    std::fs::write(scratch.file("data"), &data).expect("writing the data");
    let line = format!(
        "{} -v -F none -p {} -i {dir}/user -o IdentitiesOnly=yes -o StrictHostKeyChecking=no \
         -o UserKnownHostsFile=/dev/null root@127.0.0.1 cat < {dir}/data 2> {dir}/ssh.log > {dir}/back \
         || {{ cat {dir}/ssh.log >&2; exit 1; }}",
        ssh.display(),
        front.port()
    );
    shell(&line, MINUTE);
    assert!(
        std::fs::read(scratch.file("back")).expect("what came back") == data,
        "ssh brought back other bytes"
    );
    // What ssh itself put on the wire is a little more than this.
    let status = proxy.settle();
    assert_the_kernel_carried(&status, "to_upstream", LENGTH);
    assert_the_kernel_carried(&status, "to_downstream", LENGTH);
}

#[test]
fn postgresql_runs_its_benchmark_and_copies_a_table() {
    const ROWS: u64 = 400_000;
    let bin = need("initdb", "postgresql-15")
        .parent()
        .expect("a directory")
        .display()
        .to_string();
    let (psql, pgbench) = (
        need("psql", "postgresql-client-15"),
        need("pgbench", "postgresql-15"),
    );
    need("setpriv", "util-linux");
    let scratch = Scratch::new();
    std::fs::set_permissions(scratch.path(), std::fs::Permissions::from_mode(0o777)).expect("permissions");
    let dir = scratch.path().display();
    let port = Port::claim();
    let address = port.on("127.0.0.1");
    // PostgreSQL refuses to run as root.
    let user = "setpriv --reuid=postgres --regid=postgres --init-groups --";
    shell(
        &format!("cd {dir}; {user} {bin}/initdb -N -A trust -U postgres -D {dir}/db > {dir}/init.log"),
        MINUTE,
    );
    let mut command = Command::new("setpriv");
    command
        .args(user.split(' ').skip(1))
        .arg(format!("{bin}/postgres"))
        .current_dir(scratch.path());
    command.args([
        "-h",
        "127.0.0.1",
        "-c",
        "fsync=off",
        "-p",
        &address.port().to_string(),
    ]);
    command.args(["-D", &format!("{dir}/db"), "-k", &format!("{dir}")]);
    let _server = Running::start(command)
        .stopped_by(Signal::SIGINT)
        .wait_for(address);
    let (proxy, front) = proxy_before(address);
    let on = |address: SocketAddr| format!("-h {} -p {} -U postgres", address.ip(), address.port());

    let (psql, pgbench) = (psql.display(), pgbench.display());
    let ready = format!(
        "for i in $(seq 100); do {psql} {} -c 'select 1' && break; sleep 0.1; done",
        on(address)
    );
    shell(&ready, MINUTE);
    shell(
        &format!("cd {dir}; {pgbench} {} -q -i -s 1 postgres", on(front)),
        MINUTE,
    );
    let report = shell(
        &format!("cd {dir}; {pgbench} {} -c 8 -j 2 -t 150 postgres", on(front)),
        MINUTE,
    );
    assert!(
        report.contains("1200/1200"),
        "pgbench did not finish all transactions: {report}"
    );

    // Every client asks for encryption with its first eight bytes and waits for the answer.
    let before = proxy.settle();
    let select = format!("select i, md5(i::text) from generate_series(1, {ROWS}) i");
    let copy = |address: SocketAddr, file: &str| {
        shell(
            &format!(
                "{psql} {} -c \"copy ({select}) to stdout\" > {dir}/{file}",
                on(address)
            ),
            MINUTE,
        );
        std::fs::read(scratch.file(file)).expect("the copied table")
    };
    let (direct, proxied) = (copy(address, "direct"), copy(front, "proxied"));
    assert!(direct == proxied, "the table that came through the proxy differs");
    let after = proxy.settle();
    let carried = after.sockmap().to_downstream - before.sockmap().to_downstream;
    let copied = after.relay().to_downstream - before.relay().to_downstream;
    assert!(
        carried >= proxied.len() as u64,
        "{carried} of {} bytes, {copied} by copying",
        proxied.len()
    );
    assert!(
        after.sockmap().sum() * 1000 >= after.carried().sum() * 998,
        "by copying: {:?}",
        after.relay()
    );
}
