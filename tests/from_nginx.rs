//! `--from-nginx`: what is printed for nginx's configurations, and that nginx and this program serve the same from one file.
//!
//! `data/from_nginx/NAME.conf` is a configuration of nginx, `NAME.toml` and `NAME.stderr` are what is printed for it. After a
//! change, look at the difference: `UPDATE_TRANSLATIONS=1 cargo test -p master --test blackbox from_nginx::each; git diff tests/data`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::harness::program::{Finished, Running, need, run};
use crate::harness::{Plan, Port, Proxy, Upstream};

const QUICK: Duration = Duration::from_secs(20);

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/from_nginx")
}

fn master(directory: &Path, args: &[&str]) -> Finished {
    let mut command = Command::new(env!("CARGO_BIN_EXE_master"));
    command.args(args).current_dir(directory).env_clear();
    run(command, QUICK)
}

/// The names of nginx's configurations, without `.conf`.
fn names() -> Vec<String> {
    let entries = std::fs::read_dir(data()).expect("nginx's configurations");
    let files = entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"));
    let mut names: Vec<String> = files
        .filter_map(|name| name.strip_suffix(".conf").map(str::to_owned))
        .collect();
    names.sort();
    assert!(names.len() >= 5, "only {names:?}");
    names
}

#[test]
fn each_configuration_of_nginx_gives_exactly_its_translation() {
    let mut wrong = Vec::new();
    for name in names() {
        let printed = master(&data(), &["--from-nginx", &format!("{name}.conf")]);
        if std::env::var_os("UPDATE_TRANSLATIONS").is_some() {
            for (ending, text) in [("toml", &printed.out), ("stderr", &printed.err)] {
                let file = data().join(format!("{name}.{ending}"));
                match text.is_empty() {
                    true => drop(std::fs::remove_file(file)),
                    false => std::fs::write(file, text).expect("writing what is printed"),
                }
            }
        }
        let expected = |ending: &str| {
            std::fs::read_to_string(data().join(format!("{name}.{ending}"))).unwrap_or_default()
        };
        let whole = !printed.err.contains("not carried over");
        if printed.out != expected("toml")
            || printed.err != expected("stderr")
            || printed.code != Some(i32::from(!whole))
        {
            wrong.push(format!(
                "{name}: exit {:?}\n{}---\n{}",
                printed.code, printed.out, printed.err
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn what_is_printed_is_toml_and_is_accepted_whenever_nothing_was_refused() {
    let scratch = crate::harness::Scratch::new();
    let mut accepted = 0;
    for name in names() {
        let printed = master(&data(), &["--from-nginx", &format!("{name}.conf")]);
        let table = printed.out.parse::<toml::Table>();
        assert!(table.is_ok(), "{name}: {table:?}\n{}", printed.out);
        let file = scratch.file("printed.toml");
        std::fs::write(&file, &printed.out).expect("writing what was printed");
        let checked = master(scratch.path(), &["-t", "-c", "printed.toml"]);
        if printed.code == Some(0) {
            // That this host has not the folders of the logs is none of the file's faults.
            let is_of_host =
                |line: &str| line.starts_with("warning: ") || line.contains("would not start here");
            let is_right = checked.code == Some(0) || checked.err.lines().all(is_of_host);
            assert!(is_right, "{name}: {}\n{}", checked.err, printed.out);
            accepted += 1;
        }
    }
    assert!(
        accepted >= 4,
        "only {accepted} configurations are carried over whole"
    );
}

#[test]
fn what_is_no_configuration_of_nginx_is_refused_in_one_line() {
    let scratch = crate::harness::Scratch::new();
    let refused = |text: &[u8]| {
        std::fs::write(scratch.file("nginx.conf"), text).expect("a file");
        let printed = master(scratch.path(), &["--from-nginx", "nginx.conf"]);
        assert_eq!(
            (printed.code, printed.out.as_str()),
            (Some(1), ""),
            "{}",
            printed.err
        );
        assert_eq!(printed.err.lines().count(), 1, "{}", printed.err);
        printed.err
    };
    assert!(refused(b"stream {\n server {").contains("nginx.conf:2: unexpected end of file"));
    assert!(refused(b"events { }\n}").contains("nginx.conf:2: unexpected \"}\""));
    assert!(refused(b"events { }").contains("there is no stream block"));
    assert!(refused(b"include nginx.conf;").contains("includes itself"));
    assert!(refused(&b"a{".repeat(5000)).contains("blocks in each other"));
    assert!(refused(&b"a;".repeat(600_000)).contains("directives"));
    let absent = master(scratch.path(), &["--from-nginx", "absent.conf"]);
    assert_eq!(absent.code, Some(1));
    assert!(
        absent.err.contains("failed to read absent.conf"),
        "{}",
        absent.err
    );
    // What never ends is not read.
    for endless in ["/dev/zero", "/dev"] {
        std::fs::write(
            scratch.file("endless.conf"),
            format!("include {endless};\nstream {{ }}"),
        )
        .expect("a file");
        let printed = master(scratch.path(), &["--from-nginx", "endless.conf"]);
        assert!(printed.err.contains("not a file"), "{}", printed.err);
    }
}

/// Gives back what comes behind a mark and, where it has one, the line that comes first.
fn marked(mark: &'static str, reads_a_line: bool) -> Upstream<()> {
    Upstream::serve("127.0.0.1", move |mut stream| {
        let mut line = Vec::new();
        let mut byte = [0];
        while reads_a_line && !line.ends_with(b"\n") && stream.read(&mut byte).is_ok_and(|read| read == 1) {
            line.push(byte[0]);
        }
        let _ = stream.write_all(&[mark.as_bytes(), b":", &line, b";"].concat());
        crate::harness::upstream::echo(stream);
    })
}

/// What a client gets up to the first `;` when it sends this: `closed` if it gets nothing.
fn asks(from: &str, to: SocketAddr, sends: &[u8]) -> String {
    let socket = TcpStreamFrom(from).connect(to);
    let Ok(mut stream) = socket else {
        return "refused".to_owned();
    };
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .expect("a limit");
    let _ = stream.write_all(sends);
    let (mut answer, mut byte) = (Vec::new(), [0]);
    while !answer.ends_with(b";") {
        match stream.read(&mut byte) {
            Ok(1) => answer.push(byte[0]),
            Ok(_) => break,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => return format!("{error}"),
        }
    }
    match answer.is_empty() {
        true => "closed".to_owned(),
        // Ports of clients differ from one time to the next.
        false => {
            let text = String::from_utf8_lossy(&answer).into_owned();
            let words: Vec<&str> = text.split_whitespace().collect();
            match words.as_slice() {
                [proxy, family, client, server, _, port, _] => {
                    format!("{proxy} {family} {client} {server} {port}")
                }
                _ => text,
            }
        }
    }
}

/// A client with an address of its own.
struct TcpStreamFrom<'a>(&'a str);

impl TcpStreamFrom<'_> {
    fn connect(&self, to: SocketAddr) -> std::io::Result<TcpStream> {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
        use std::os::fd::AsRawFd;
        let own = socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        let from: SocketAddr = format!("{}:0", self.0).parse().expect("an address");
        let (SocketAddr::V4(from), SocketAddr::V4(to)) = (from, to) else {
            panic!("{from} and {to} are not both IPv4");
        };
        bind(own.as_raw_fd(), &SockaddrIn::from(from))?;
        connect(own.as_raw_fd(), &SockaddrIn::from(to))?;
        Ok(TcpStream::from(own))
    }
}

/// A TLS hello that asks for this name.
fn hello(name: &str) -> Vec<u8> {
    let long = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
    let list = long(&[&[0][..], &long(name.as_bytes())].concat());
    let extensions = match name {
        "" => long(&[&[0, 21][..], &long(&[0; 4])].concat()),
        _ => long(&[&[0, 0][..], &long(&list)].concat()),
    };
    let body = [&[3, 3][..], &[7; 32], &[0, 0, 2, 0x13, 1, 1, 0], &extensions].concat();
    let length = (body.len() as u32).to_be_bytes();
    let message = [&[1][..], &length[1..], &body].concat();
    [&[22, 3, 1][..], &long(&message)].concat()
}

/// What clients of the servers on these ports get, in words.
fn behaviour(ports: &[SocketAddr]) -> Vec<String> {
    let [weighted, named, guarded, header, behind] = ports else {
        panic!("five servers");
    };
    let mut seen = Vec::new();
    for turn in 0..14 {
        seen.push(format!("weights {turn}: {}", asks("127.0.0.1", *weighted, b"x")));
    }
    for name in [
        "a.example.org",
        "A.EXAMPLE.ORG",
        "deep.b.example.org",
        "example.net",
        "www.example.net",
        "mail.anything",
        "api-7.example.com",
        "api-x.example.com",
        "two.by-name",
        "tw-o.by-number",
        "one.by-name",
        "other",
        "",
    ] {
        seen.push(format!(
            "name {name:?}: {}",
            asks("127.0.0.1", *named, &hello(name))
        ));
    }
    seen.push(format!(
        "no TLS: {}",
        asks("127.0.0.1", *named, b"GET / HTTP/1.0\r\n\r\n")
    ));
    for client in ["127.0.0.1", "127.0.0.2", "127.0.1.1", "127.0.1.7", "127.9.0.1"] {
        seen.push(format!("client {client}: {}", asks(client, *guarded, b"x")));
    }
    seen.push(format!("header: {}", asks("127.0.0.3", *header, b"x")));
    for (from, what) in [
        (
            "127.0.0.1",
            &b"PROXY TCP4 192.0.2.7 198.51.100.9 40000 443\r\nx"[..],
        ),
        ("127.0.0.1", b"PROXY TCP4 192.0.2.8 198.51.100.9 40000 443\r\nx"),
        ("127.0.0.9", b"PROXY TCP4 192.0.2.7 198.51.100.9 40000 443\r\nx"),
        ("127.0.0.1", b"PROXY UNKNOWN\r\nx"),
        ("127.0.0.1", b"no header at all\r\n"),
    ] {
        let text = String::from_utf8_lossy(what).into_owned();
        seen.push(format!("{text:?} from {from}: {}", asks(from, *behind, what)));
    }
    seen
}

#[test]
fn nginx_and_this_program_serve_the_same_from_one_file() {
    let plain = ["one", "two", "three"].map(|mark| marked(mark, false));
    let [one, two, three] = &plain;
    let line = marked("line", true);
    let ports: Vec<Port> = (0..5).map(|_| Port::claim()).collect();
    let fronts: Vec<SocketAddr> = ports.iter().map(|port| port.on("127.0.0.1")).collect();
    let plan = Plan::new().lifetime(Duration::from_secs(60));
    let [weighted, named, guarded, header, behind] = [0, 1, 2, 3, 4].map(|n: usize| ports[n].number);
    let text = format!(
        r#"
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
user root;
worker_processes 1;
pid {pid};
error_log stderr notice;
events {{ worker_connections 256; }}
stream {{
    upstream weighted {{
        server {one} weight=5;
        server {two};
        server {three} weight=2;
    }}
    upstream to_two {{ server {two}; }}
    map $ssl_preread_server_name $leads_to {{
        hostnames;
        ~^api-\d+\.example\.com$ {three};
        "~^api-.*\.com$" to_two;
        "~^(?<zone>two|one)\.by-name$" to_$zone;
        "~^(t)(w-?)(?:o)\.by-number$" $1o_two;
        a.example.org    {one};
        *.b.example.org  to_two;
        .example.net     {three};
        mail.*           {two};
        "~^(other)?$"    to_two;
        default          {one};
    }}
    server {{ listen 127.0.0.1:{weighted}; proxy_pass weighted; }}
    server {{ listen 127.0.0.1:{named}; ssl_preread on; proxy_pass $leads_to; }}
    server {{
        listen 127.0.0.1:{guarded};
        deny 127.0.0.2;
        allow 127.0.0.0/24;
        deny 127.0.1.0/29;
        allow 127.0.1.0/24;
        deny all;
        proxy_pass {one};
    }}
    server {{ listen 127.0.0.1:{header}; proxy_protocol on; proxy_pass {line}; }}
    server {{
        listen 127.0.0.1:{behind} proxy_protocol;
        set_real_ip_from 127.0.0.1;
        deny 192.0.2.8;
        proxy_protocol on;
        proxy_pass {line};
    }}
}}
"#,
        pid = plan.file("master.pid").display(),
        one = one.address,
        two = two.address,
        three = three.address,
        line = line.address,
    );
    let file = plan.file("nginx.conf");
    std::fs::write(&file, text).expect("nginx's configuration");

    let nginx = need("nginx", "nginx-light libnginx-mod-stream");
    let mut tested = Command::new(&nginx);
    tested.arg("-t").arg("-c").arg(&file);
    run(tested, QUICK).must_succeed("nginx -t");
    let mut command = Command::new(&nginx);
    command.args(["-g", "daemon off;", "-c"]).arg(&file);
    let running = Running::start(command).wait_for(fronts[0]);
    // One connection was nginx's start; its turn of the weights has to be taken back to the beginning.
    (0..7).for_each(|_| drop(asks("127.0.0.1", fronts[0], b"x")));
    let nginxs = behaviour(&fronts);
    drop(running);

    let printed = master(
        plan.file("").as_path(),
        &["--from-nginx", &file.display().to_string()],
    );
    assert_eq!(printed.code, Some(0), "{}\n{}", printed.err, printed.out);
    let status = format!(
        "\n[[server]]\nlisten = \"127.0.0.1:{}\"\nebpf_status_return = true\n",
        plan.status_port()
    );
    let toml = plan.file("from_nginx.toml");
    std::fs::write(&toml, printed.out + &status).expect("writing what was printed");
    let proxy = Proxy::start_file(plan, &toml);
    let ours = behaviour(&fronts);
    assert_eq!(ours, nginxs, "\n{ours:#?}\n{nginxs:#?}");
    assert!(nginxs.iter().any(|seen| seen.ends_with("closed")), "{nginxs:#?}");
    let status = proxy.settle();
    assert!(
        status.sockmap().to_downstream > 0,
        "the kernel carried bytes: {:#}",
        status.json()
    );
}
