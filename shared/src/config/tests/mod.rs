//! Tests of `load` and `dump` as a whole, on a machine that is made up: 4 CPUs of which 3 may be used, the users
//! `web` and `nobody`, the host `db` with two addresses, and one set of environment variables.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

mod errors;
mod fuzz;
mod manual;
mod property;
mod shipped;

use super::load::{load_dumped_in, load_in, read_in};
use super::world::World;
use super::*;

#[derive(Default)]
struct Fake {
    environment: BTreeMap<&'static str, &'static str>,
}

impl World for Fake {
    fn variable(&self, name: &str) -> Option<OsString> {
        self.environment.get(name).map(OsString::from)
    }

    fn variables(&self) -> Vec<(OsString, OsString)> {
        self.environment
            .iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect()
    }

    fn online_cpus(&self) -> Vec<usize> {
        vec![0, 1, 2, 3]
    }

    fn allowed_cpus(&self) -> Vec<usize> {
        vec![0, 1, 3]
    }

    fn user(&self, name: &str) -> io::Result<Option<User>> {
        let uid = match name {
            "web" => 33,
            "nobody" => 65534,
            _ => return Ok(None),
        };
        Ok(Some(User {
            name: name.to_owned(),
            uid,
            gid: uid,
        }))
    }

    fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        match host {
            "db" => Ok(vec![
                ([10, 0, 0, 1], port).into(),
                ([10, 0, 0, 2], port).into(),
                ([10, 0, 0, 1], port).into(),
            ]),
            _ => Err(io::Error::other("no such name")),
        }
    }
}

/// A directory of its own for one test, removed at its end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Directory {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "culvert-config-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("a directory for the test");
        Directory(path)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory for the file");
        std::fs::write(&path, text).expect("the file is written");
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Loads one file, with the directory cut from its errors.
fn load_with(world: &Fake, directory: &Directory, text: &str, set: &[&str]) -> Result<Config, Vec<String>> {
    let path = directory.file("a.toml", text);
    let set: Vec<String> = set.iter().map(|set| (*set).to_owned()).collect();
    let prefix = format!("{}/", directory.0.display());
    load_in(world, &path, &set).map_err(|errors| {
        errors
            .iter()
            .map(|e| e.to_string().replace(&prefix, ""))
            .collect()
    })
}

fn loaded(text: &str) -> Config {
    load_with(&Fake::default(), &Directory::new(), text, &[]).unwrap_or_else(|errors| panic!("{errors:#?}"))
}

fn errors(text: &str) -> Vec<String> {
    load_with(&Fake::default(), &Directory::new(), text, &[]).expect_err("the configuration is wrong")
}

const SERVER: &str = "[[server]]\nlisten = 8080\nproxy_pass = \"127.0.0.1:80\"\n";

#[test]
fn the_least_configuration_has_every_default() {
    let config = loaded(SERVER);
    let address: SocketAddr = ([127, 0, 0, 1], 80).into();
    let peers = vec![Peer::new(Address::Tcp(address))];
    let stream = Stream {
        ebpf_enable: true,
        proxy_timeout: Duration::from_secs(600),
        proxy_connect_timeout: Duration::from_secs(60),
        proxy_next_upstream: true,
        proxy_next_upstream_tries: 0,
        proxy_next_upstream_timeout: Duration::ZERO,
        proxy_buffer_size: 16_384,
        proxy_half_close: true,
        tcp_nodelay: true,
        tcp_congestion: TcpCongestion::Auto,
        proxy_socket_keepalive: false,
        proxy_bind: ProxyBind::Off,
        ebpf_timer_period: Duration::from_secs(2),
        ebpf_backlog_size: 4 << 20,
        ebpf_offload_after: OffloadAfter::Auto,
        on_reload: OnReload::Keep,
        proxy_protocol: None,
        proxy_protocol_timeout: Duration::from_secs(30),
        set_real_ip_from: Vec::new(),
        access: Vec::new(),
        limit_conn: Vec::new(),
        limit_conn_rate: Vec::new(),
        proxy_upload_rate: Rate::OFF,
        proxy_download_rate: Rate::OFF,
        ssl_preread: false,
        preread_buffer_size: 16 * 1024,
        preread_timeout: Duration::from_secs(30),
        resolver: None,
        access_log: None,
    };
    let expected = Config {
        user: None,
        worker_cpus: vec![vec![0], vec![1], vec![3]],
        worker_connections: 1024,
        worker_backlog_size: Some(256 << 20),
        worker_shutdown_timeout: Some(Duration::from_secs(3600)),
        flow_steering: FlowSteering::Off,
        pid: PathBuf::from("/run/culvert/master.pid"),
        error_log: ErrorLog {
            target: LogTarget::Stderr,
            level: log::LevelFilter::Info,
        },
        upstreams: vec![Upstream {
            name: "127.0.0.1:80".to_owned(),
            balance: Balance::RoundRobin,
            peers,
            check: None,
            queue: None,
            names: Vec::new(),
        }],
        stream: stream.clone(),
        maps: Vec::new(),
        limit_zones: Vec::new(),
        servers: vec![Server {
            listen: vec![Listen {
                address: Address::Tcp(([0, 0, 0, 0], 8080).into()),
                backlog: 511,
                proxy_protocol: false,
                options: ListenOptions::default(),
            }],
            action: Action::Proxy(Target::Upstream(0)),
            stream,
        }],
    };
    assert_eq!(config, expected);
}

fn port_of(listen: &Listen) -> u16 {
    listen.address.tcp().expect("TCP").port()
}

#[test]
fn the_forms_of_listen_are_those_of_nginx() {
    let config = loaded(
        r#"[[server]]
        listen = ["8080", "*:81", 82, "127.0.0.1:8080", { address = "[::]:8080", backlog = 7 }, "db:1", "[fe80::1]:9"]
        ebpf_status_return = true"#,
    );
    let listen: Vec<String> = config.servers[0]
        .listen
        .iter()
        .map(|l| format!("{} {}", l.address, l.backlog))
        .collect();
    let expected = [
        "0.0.0.0:8080 511",
        "0.0.0.0:81 511",
        "0.0.0.0:82 511",
        "127.0.0.1:8080 511",
        "[::]:8080 7",
        "10.0.0.1:1 511",
        "10.0.0.2:1 511",
        "[fe80::1]:9 511",
    ];
    assert_eq!(listen, expected);
}

#[test]
fn servers_inherit_from_stream_what_they_do_not_set() {
    let config = loaded(&format!(
        "[stream]\nebpf_enable = false\nproxy_timeout = 5\n{SERVER}[[server]]\nlisten = 81\nproxy_pass = \"127.0.0.1:80\"\n\
         ebpf_enable = true\n"
    ));
    let [first, second] = config.servers.as_slice() else {
        panic!("two servers")
    };
    assert!(!first.stream.ebpf_enable && second.stream.ebpf_enable);
    assert_eq!(second.stream.proxy_timeout, Duration::from_secs(5));
    assert_eq!(
        config.upstreams.len(),
        1,
        "one unnamed upstream for the same address"
    );
}

#[test]
fn a_host_name_stands_for_all_its_addresses() {
    let config = loaded(
        "[[upstream]]\nname = \"u\"\nserver = [{ address = \"db:5432\", weight = 2 }, \"unix:/a b\"]\n[[server]]\nlisten = 1\nproxy_pass = \"u\"",
    );
    let peers: Vec<String> = config.upstreams[0]
        .peers
        .iter()
        .map(|p| format!("{} {}", p.address, p.weight))
        .collect();
    assert_eq!(peers, ["10.0.0.1:5432 2", "10.0.0.2:5432 2", "unix:/a b 1"]);
}

#[test]
fn variables_that_the_file_knows_are_substituted_and_those_of_a_session_stay() {
    let config = loaded(
        r#"[[upstream]]
        name = "u80"
        server = "127.0.0.1:1"
        [[server]]
        listen = 80
        set = { a = "u$b", b = "80" }
        proxy_pass = "$a"
        [[server]]
        listen = 81
        set = { tail = "x" }
        proxy_pass = "u$server_port$tail""#,
    );
    assert_eq!(config.servers[0].action, Action::Proxy(Target::Upstream(0)));
    let parts = vec![
        Part::Literal("u".into()),
        Part::Variable(Variable::ServerPort),
        Part::Literal("x".into()),
    ];
    assert_eq!(
        config.servers[1].action,
        Action::Proxy(Target::Variable(Template(parts)))
    );
}

#[test]
fn affinity_takes_auto_masks_and_lists_and_reuses_the_last() {
    let cpus = |keys: &str| loaded(&format!("{keys}\n{SERVER}")).worker_cpus;
    assert_eq!(cpus("worker_processes = 4"), [[0], [1], [3], [0]]);
    assert_eq!(
        cpus("worker_processes = 3\nworker_cpu_affinity = [\"0-1\", \"3\"]"),
        [vec![0, 1], vec![3], vec![3]]
    );
    assert_eq!(
        cpus("worker_processes = 2\nworker_cpu_affinity = \"0101 1000\""),
        [vec![0, 2], vec![3]]
    );
    assert_eq!(
        cpus("worker_processes = 1\nworker_cpu_affinity = [\"0\", \"1\"]"),
        [[0]]
    );
    let wrong = errors(&format!("worker_cpu_affinity = [\"1\", \"10\"]\n{SERVER}"));
    assert!(
        wrong[0].starts_with("a.toml:1:23: worker_cpu_affinity: bit masks beside bare CPU numbers ("),
        "{wrong:?}"
    );
}

#[test]
fn a_shutdown_timeout_of_zero_means_without_limit() {
    assert_eq!(
        loaded(&format!("worker_shutdown_timeout = 0\n{SERVER}")).worker_shutdown_timeout,
        None
    );
}

#[test]
fn nginx_levels_have_their_nearest_here() {
    let level = |name: &str| {
        loaded(&format!("error_log = {{ level = \"{name}\" }}\n{SERVER}"))
            .error_log
            .level
    };
    assert_eq!(level("notice"), log::LevelFilter::Info);
    assert_eq!(level("emerg"), log::LevelFilter::Error);
    assert_eq!(level("debug"), log::LevelFilter::Debug);
}

#[test]
fn environment_variables_stand_in_strings_for_any_type() {
    let world = Fake {
        environment: [("WORKERS", "2"), ("EBPF", "false"), ("CULVERT_PEER", "db:1")].into(),
    };
    let text = "worker_processes = \"${WORKERS}\"\n[stream]\nebpf_enable = \"${EBPF}\"\nproxy_timeout = \"${NONE:-7s}\"\n\
                [[server]]\nlisten = \"${PORT:-80}\"\nproxy_pass = \"${CULVERT_PEER}\"";
    let config = load_with(&world, &Directory::new(), text, &[]).expect("valid");
    assert_eq!(config.worker_cpus.len(), 2);
    assert_eq!(config.servers[0].stream.proxy_timeout, Duration::from_secs(7));
    assert!(!config.servers[0].stream.ebpf_enable);
    assert_eq!(config.upstreams[0].name, "db:1");

    let world = Fake {
        environment: [("WORKERS", "many")].into(),
    };
    let wrong = load_with(&world, &Directory::new(), text, &[]).expect_err("wrong");
    assert!(wrong[0].starts_with(
        "a.toml:1:20: worker_processes: neither \"auto\" nor a number (\"${WORKERS}\", which is \"many\"), "
    ));
    assert!(wrong[1].starts_with(
        "a.toml:3:15: stream.ebpf_enable: environment variable EBPF is not set (\"${EBPF}\"), "
    ));
    assert_eq!(wrong.len(), 3, "{wrong:#?}");
}

#[test]
fn environment_and_command_line_go_over_the_file_in_that_order() {
    let environment = [
        ("CULVERT_WORKER_PROCESSES", "2"),
        ("CULVERT_STREAM__PROXY_TIMEOUT", "9s"),
        ("CULVERT_STREAM__EBPF_ENABLE", "off"),
        ("CULVERT_SERVICE_HOST", "10.0.0.1"),
        ("CULVERT_PORT", "tcp://10.0.0.1:80"),
        ("CULVERT_PORT_80_TCP", "tcp://10.0.0.1:80"),
        ("CULVERT_HTTP_METRICS_SERVICE_HOST", "10.0.0.1"),
        ("CULVERT_HTTP_METRICS_SERVICE_PORT", "80"),
        ("CULVERT_HTTP_METRICS_SERVICE_PORT_WEB", "80"),
        ("CULVERT_HTTP_METRICS_PORT", "udp://10.0.0.1:80"),
        ("CULVERT_HTTP_METRICS_PORT_80_UDP_ADDR", "10.0.0.1"),
    ];
    let world = Fake {
        environment: environment.into(),
    };
    let set = [
        "worker_processes=1",
        "server[0].listen=[\"81\", \"82\"]",
        "server[0].listen[1]=83",
        "worker_cpu_affinity=0001",
    ];
    let config = load_with(
        &world,
        &Directory::new(),
        &format!("worker_processes = 3\n{SERVER}"),
        &set,
    )
    .expect("valid");
    assert_eq!(config.worker_cpus, [[0]]);
    assert_eq!(config.servers[0].stream.proxy_timeout, Duration::from_secs(9));
    assert!(!config.servers[0].stream.ebpf_enable);
    let ports: Vec<u16> = config.servers[0].listen.iter().map(port_of).collect();
    assert_eq!(ports, [81, 83]);
}

#[test]
fn included_files_add_up_in_byte_order() {
    let directory = Directory::new();
    directory.file("conf.d/b.toml", "[[server]]\nlisten = 2\nproxy_pass = \"u\"");
    directory.file(
        "conf.d/Z.toml",
        "[[server]]\nlisten = 1\nproxy_pass = \"u\"\n[stream]\nproxy_timeout = \"1s\"",
    );
    directory.file("conf.d/.hidden.toml", "broken");
    directory.file(
        "conf.d/u.inc",
        "upstream = [{ name = \"u\", server = \"127.0.0.1:1\" }]",
    );
    let text = format!(
        "include = [\"conf.d/*.toml\", \"conf.d/u.inc\", \"none.d/*\"]\nstream.tcp_nodelay = false\n{SERVER}"
    );
    let config = load_with(&Fake::default(), &directory, &text, &[]).expect("valid");
    let ports: Vec<u16> = config
        .servers
        .iter()
        .map(|server| port_of(&server.listen[0]))
        .collect();
    assert_eq!(ports, [8080, 1, 2]);
    assert_eq!(config.servers[0].stream.proxy_timeout, Duration::from_secs(1));
    assert!(!config.servers[2].stream.tcp_nodelay);
}

#[test]
fn a_server_asks_its_own_resolver_or_that_of_stream_and_equal_ones_are_one() {
    let directory = Directory::new();
    let server = |port: u16, lines: &str| format!("[[server]]\nlisten = {port}\n{lines}\n");
    let name = "proxy_pass = \"$ssl_preread_server_name:443\"";
    let text = [
        "[stream]\nresolver = \"192.0.2.1\"\nresolver_timeout = \"5s\"\n".to_owned(),
        server(81, name),
        server(82, &format!("{name}\nresolver_timeout = \"2s\"")),
        server(
            83,
            &format!("{name}\nresolver = {{ addresses = \"192.0.2.2\", valid = \"9s\" }}"),
        ),
        server(84, &format!("{name}\nresolver_timeout = \"5s\"")),
        server(85, "proxy_pass = \"192.0.2.9:1\"\nresolver = \"192.0.2.3\""),
    ];
    let config = load_with(&Fake::default(), &directory, &text.concat(), &[]).expect("right");
    let shown: Vec<(String, u64, Option<u64>)> = config
        .resolvers()
        .iter()
        .map(|resolver| {
            let valid = resolver.valid.map(|valid| valid.as_secs());
            (resolver.servers[0].to_string(), resolver.timeout.as_secs(), valid)
        })
        .collect();
    // What leads nowhere by name asks nobody.
    let expected = [
        ("192.0.2.1:53".to_owned(), 5, None),
        ("192.0.2.1:53".to_owned(), 2, None),
        ("192.0.2.2:53".to_owned(), 5, Some(9)),
    ];
    assert_eq!(shown, expected);
    let alone = [
        &server(81, name)[..],
        &server(82, "resolver_timeout = \"2s\"\nproxy_pass = \"192.0.2.9:1\""),
    ];
    let config = load_with(&Fake::default(), &directory, &alone.concat(), &[]).expect("right without one");
    assert_eq!(config.servers[0].stream.resolver, None);
    assert_eq!(config.servers[1].stream.resolver, None, "how long says not whom");
}

#[test]
fn what_is_dumped_is_the_same_where_the_environment_names_other_things() {
    let world = Fake {
        environment: [("CULVERT_PEER", "10.0.0.1:1"), ("CULVERT_WORKER_PROCESSES", "2")].into(),
    };
    let text = r#"[[map]]
        source = "$remote_addr"
        variable = "$text_0"
        values = ["default a"]
        [[server]]
        listen = 80
        proxy_pass = "${CULVERT_PEER}"
        [[server]]
        listen = 81
        set = { tail = "b.example:80" }
        proxy_pass = "$text_0$tail""#;
    let config = load_with(&world, &Directory::new(), text, &[]).expect("right");
    let dumped = dump(&config);
    assert_eq!(load_dumped_in(&world, &dumped), Ok(config), "{dumped}");
}
