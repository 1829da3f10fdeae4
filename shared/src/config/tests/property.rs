//! What must hold for every configuration: a dumped one loads as an equal one, and no text makes the loader panic.

use proptest::prelude::*;

use super::*;

fn stream() -> impl Strategy<Value = Stream> {
    let millis = |range: std::ops::RangeInclusive<u64>| range.prop_map(Duration::from_millis);
    let year = 365 * 86_400_000;
    let times = (millis(1..=year), millis(1..=year), millis(10..=3_600_000));
    let sizes = (1usize..=64 << 20, 64u32 << 10..=1 << 30, offload_after());
    let next = (0u32..=65_535, millis(0..=year));
    let versions = prop::option::of(prop::sample::select(vec![ProxyProtocol::V1, ProxyProtocol::V2]));
    let networks = prop::collection::vec(network(), 0..3);
    let whom = prop::option::of(network());
    let rule = (any::<bool>(), whom).prop_map(|(allow, whom)| Rule { allow, whom });
    let access = prop::collection::vec(rule, 0..3);
    let header = (versions, millis(1..=year), networks, access);
    let limit = (0usize..2, 1u32..=65_535).prop_map(|(zone, connections)| LimitConn { zone, connections });
    let rate =
        (0usize..2, 1u32..=60_000, any::<bool>(), 0u32..=65_535).prop_map(|(zone, each, minute, burst)| {
            LimitRate {
                zone,
                connections: each,
                period: Duration::from_secs(if minute { 60 } else { 1 }),
                burst,
            }
        });
    let hello = (
        1usize..=64 << 10,
        millis(1..=year),
        proxy_bind(),
        tcp_congestion(),
    );
    // Each zone once.
    let limits = (
        prop::collection::vec(limit, 0..3).prop_map(|mut limits| {
            limits.dedup_by_key(|limit| limit.zone);
            limits
        }),
        prop::collection::vec(rate, 0..3).prop_map(|mut rates| {
            rates.dedup_by_key(|rate| rate.zone);
            rates
        }),
        [session_rate(), session_rate()],
    );
    (
        any::<[bool; 7]>(),
        times,
        (sizes, next),
        header,
        limits,
        hello,
        access_log(),
        prop::option::of(resolver().prop_map(Arc::new)),
    )
        .prop_map(
            |(flags, times, (sizes, next), header, limits, hello, access_log, resolver)| Stream {
                ebpf_enable: flags[0],
                proxy_timeout: times.0,
                proxy_connect_timeout: times.1,
                proxy_next_upstream: flags[5],
                proxy_next_upstream_tries: next.0,
                proxy_next_upstream_timeout: next.1,
                proxy_buffer_size: sizes.0,
                proxy_half_close: flags[1],
                tcp_nodelay: flags[2],
                tcp_congestion: hello.3,
                proxy_socket_keepalive: flags[6],
                proxy_bind: hello.2,
                ebpf_timer_period: times.2,
                ebpf_backlog_size: sizes.1,
                ebpf_offload_after: sizes.2,
                on_reload: if flags[3] { OnReload::Keep } else { OnReload::Close },
                proxy_protocol: header.0,
                proxy_protocol_timeout: header.1,
                set_real_ip_from: header.2,
                access: header.3,
                limit_conn: limits.0,
                limit_conn_rate: limits.1,
                proxy_upload_rate: limits.2[0].clone(),
                proxy_download_rate: limits.2[1].clone(),
                ssl_preread: flags[4],
                preread_buffer_size: hello.0,
                preread_timeout: hello.1,
                resolver,
                access_log,
            },
        )
}

fn session_rate() -> impl Strategy<Value = Rate> {
    let map = (0usize..2).prop_map(|map| Part::Variable(Variable::Map(map)));
    prop_oneof![
        (0u64..=1 << 40).prop_map(Rate::Fixed),
        map.prop_map(|map| Rate::Variable(Template(vec![map]))),
    ]
}

fn offload_after() -> impl Strategy<Value = OffloadAfter> {
    prop_oneof![
        Just(OffloadAfter::Auto),
        (0u64..=1 << 30).prop_map(OffloadAfter::Bytes),
    ]
}

fn tcp_congestion() -> impl Strategy<Value = TcpCongestion> {
    prop_oneof![
        Just(TcpCongestion::Auto),
        Just(TcpCongestion::System),
        "[a-z][a-z0-9_]{0,14}".prop_filter_map("a word of its own", |name| {
            let algorithm = Algorithm::new(&name)?;
            (name != "auto" && name != "system").then_some(TcpCongestion::Named(algorithm))
        }),
    ]
}

fn proxy_bind() -> impl Strategy<Value = ProxyBind> {
    let some = any::<std::net::IpAddr>().prop_filter("every address", |ip| !ip.is_unspecified());
    prop_oneof![
        Just(ProxyBind::Off),
        any::<bool>().prop_map(|port| ProxyBind::Client { port }),
        (some, any::<u16>(), any::<bool>()).prop_map(|(ip, port, transparent)| ProxyBind::Address {
            address: (ip, port).into(),
            transparent
        }),
    ]
}

fn listen_options() -> impl Strategy<Value = ListenOptions> {
    let buffer = || prop::option::of(1u32..=1 << 30);
    let seconds = || prop::option::of(1u32..=32_767);
    let keepalive = (seconds(), seconds(), prop::option::of(1u32..=127));
    let keepalive = prop::option::of(keepalive.prop_map(|(idle_s, interval_s, probes)| Keepalive {
        idle_s,
        interval_s,
        probes,
    }));
    let queue = prop::option::of(1u32..=1 << 20);
    (buffer(), buffer(), any::<bool>(), queue, keepalive).prop_map(
        |(rcvbuf, sndbuf, deferred, fastopen, keepalive)| ListenOptions {
            rcvbuf,
            sndbuf,
            deferred,
            fastopen,
            keepalive,
            ..ListenOptions::default()
        },
    )
}

fn network() -> impl Strategy<Value = Network> {
    (any::<std::net::IpAddr>(), 0u8..=32).prop_map(|(ip, bits)| Network::new(ip, bits).expect("few bits"))
}

/// One of a few formats, so that logs share them; each name stands for one format.
fn log_format() -> impl Strategy<Value = LogFormat> {
    (0usize..4).prop_map(|n| {
        let (_, variable) = log_format::VARIABLES[n];
        let literal = |text: &str| LogPart::Literal(text.to_owned());
        LogFormat {
            name: format!("f{n} ${{é}}"),
            escape: [Escape::Default, Escape::Json, Escape::None, Escape::Json][n],
            parts: vec![
                literal("{\"a\":"),
                LogPart::Variable(variable),
                literal("x\\é"),
                LogPart::Variable(variable),
                LogPart::Variable(variable),
                literal(" }"),
            ],
        }
    })
}

fn access_log() -> impl Strategy<Value = Option<Arc<AccessLog>>> {
    let log = (
        "/[ -~é\n]{1,30}",
        log_format(),
        1usize..=4 << 20,
        0u64..=365 * 86_400_000,
    );
    prop::option::of(log.prop_map(|(path, format, buffer_bytes, flush)| {
        Arc::new(AccessLog {
            target: LogTarget::File(path.into()),
            format: Arc::new(format),
            buffer_bytes,
            flush: Duration::from_millis(flush),
        })
    }))
}

fn peer_address() -> impl Strategy<Value = Address> {
    prop_oneof![
        (any::<std::net::IpAddr>(), 1u16..).prop_map(|(ip, port)| Address::Tcp((ip, port).into())),
        "/[ -~é]{0,40}".prop_map(|path| Address::Unix(path.into())),
    ]
}

/// One map of each kind of pattern, the second made from the first.
fn maps() -> Vec<VariableMap> {
    let text = r#"
        [[server]]
        listen = 81
        proxy_pass = "127.0.0.1:80"
        [[map]]
        source = "$ssl_preread_server_name"
        variable = "$one"
        hostnames = true
        values = ["a.example x", "*.b.example $remote_addr:80", ".c.example \"\"", "d.* y z", "\"\" e", "~^w{1} v", "~*^w{1} V", "~^(a)(?<b>c)$ $1x$2$b-$remote_port", "~*[A-Z] u", "default w"]
        [[map]]
        source = "$one-$server_port"
        variable = "$two"
        values = ["\\\\*.b $one", "* star"]
    "#;
    let directory = Directory::new();
    load_with(&Fake::default(), &directory, text, &[])
        .expect("right maps")
        .maps
}

prop_compose! {
    fn peer()(
        address in peer_address(),
        weight in 1u32..=2_000,
        flags in any::<[bool; 2]>(),
        limits in (0u32..=1 << 30, 0u32..=65_535),
        times in (1u64..=1_000_000, 0u64..=1_000_000),
    ) -> Peer {
        Peer {
            address,
            weight,
            backup: flags[0],
            down: flags[1],
            max_conns: limits.0,
            max_fails: limits.1,
            fail_timeout: Duration::from_millis(times.0),
            slow_start: Duration::from_millis(times.1),
        }
    }
}

fn queue() -> impl Strategy<Value = Queue> {
    (1u32..=1 << 30, 1u64..=1_000_000).prop_map(|(size, timeout)| Queue {
        size,
        timeout: Duration::from_millis(timeout),
    })
}

fn check() -> impl Strategy<Value = Check> {
    let pattern = |text: &str| Expect::Pattern(regex::bytes::Regex::new(text).expect("a pattern"));
    let expect = prop_oneof![
        prop::collection::vec(any::<u8>(), 1..20).prop_map(Expect::Text),
        prop::sample::select(vec!["^(220|250) ", "(?i)ok[${]", "~"]).prop_map(pattern),
    ];
    let port = prop::option::of(1u16..);
    let bytes = prop::collection::vec(any::<u8>(), 0..20);
    let numbers = (10u64..=1_000_000, 1u64..=1_000_000, 1u32..=9, 1u32..=9);
    (numbers, port, bytes, prop::option::of(expect)).prop_map(|(numbers, port, send, expect)| Check {
        interval: Duration::from_millis(numbers.0),
        timeout: Duration::from_millis(numbers.1),
        rise: numbers.2,
        fall: numbers.3,
        port,
        send,
        expect,
    })
}

fn resolver() -> impl Strategy<Value = Resolver> {
    let servers = prop::collection::vec((any::<[u8; 15]>(), 1u16..), 1..3).prop_map(|servers| {
        let address = |(ip, port): ([u8; 15], u16)| {
            let mut v6 = [1; 16];
            v6[1..].copy_from_slice(&ip);
            match port % 2 {
                0 => SocketAddr::from((v6, port)),
                _ => SocketAddr::from(([1, ip[0], ip[1], ip[2]], port)),
            }
        };
        servers.into_iter().map(address).collect()
    });
    let seconds = |least: u64| (least..=1_000_000).prop_map(Duration::from_secs);
    let valid = prop::option::of(seconds(1));
    (
        servers,
        valid,
        seconds(0),
        any::<bool>(),
        any::<bool>(),
        seconds(1),
    )
        .prop_map(|(servers, valid, hold, ipv4, ipv6, timeout)| Resolver {
            servers,
            valid,
            hold,
            ipv4,
            ipv6: ipv6 || !ipv4,
            timeout,
        })
}

prop_compose! {
    /// All names of an upstream ask the same resolver.
    fn names()(
        found in prop::collection::vec(("[a-z0-9_-]{1,9}[.][a-z]{1,63}", prop::option::of("[a-z_.]{1,9}"), 1u16.., peer()), 0..3),
        resolver in resolver(),
    ) -> Vec<Named> {
        let named = |(host, service, port, mut like): (String, Option<String>, u16, Peer)| {
            let service = service.filter(|name| name.split('.').all(|label| !label.is_empty()));
            like.address = Address::Unix(Default::default());
            like.backup = false;
            let port = if service.is_some() { 0 } else { port };
            Named { host, port, service, like, resolver: resolver.clone() }
        };
        found.into_iter().map(named).collect()
    }
}

fn balance() -> impl Strategy<Value = Balance> {
    let key = |text: &str| {
        Template(vec![
            Part::Literal(text.to_owned()),
            Part::Variable(Variable::RemoteAddr),
        ])
    };
    prop::sample::select(vec![
        Balance::RoundRobin,
        Balance::LeastConn,
        Balance::Hash {
            key: key("{x}-"),
            consistent: true,
        },
        Balance::Hash {
            key: key("é"),
            consistent: false,
        },
        Balance::Random,
        Balance::RandomTwo(Metric::Connections),
        Balance::RandomTwo(Metric::Time),
        Balance::LeastTime,
        Balance::Source,
    ])
}

/// Where a server leads, before indexes are known.
#[derive(Clone, Debug)]
enum Way {
    Status,
    Named(prop::sample::Index),
    Direct(SocketAddr),
    Dynamic(Vec<(Variable, String)>),
}

fn way() -> impl Strategy<Value = Way> {
    let names: Vec<Variable> = template::SESSION_VARIABLES
        .iter()
        .map(|(_, variable)| *variable)
        .collect();
    prop_oneof![
        Just(Way::Status),
        any::<prop::sample::Index>().prop_map(Way::Named),
        (any::<std::net::IpAddr>(), 1u16..).prop_map(|address| Way::Direct(address.into())),
        prop::collection::vec((prop::sample::select(names), "[a-z0-9:.-]{0,4}"), 1..4).prop_map(Way::Dynamic),
    ]
}

prop_compose! {
    fn configs()(
        user in prop::option::of(prop::sample::select(vec![("web", 33), ("nobody", 65534)])),
        worker_cpus in prop::collection::vec(prop::sample::subsequence(vec![0usize, 1, 2, 3], 1..=4), 1..6),
        worker_connections in 1u32..=1 << 20,
        worker_backlog_size in prop::option::of(1u64..=1 << 40),
        shutdown in prop::option::of(1u64..=31_536_000_000),
        flow_steering in prop::sample::select(vec![FlowSteering::Off, FlowSteering::Rfs]),
        paths in ("/[ -~é\n]{1,30}", prop::option::of("/[ -~é\n]{1,30}")),
        level in prop::sample::select(vec![log::LevelFilter::Error, log::LevelFilter::Warn, log::LevelFilter::Trace]),
        groups in prop::collection::vec((balance(), prop::collection::vec(peer(), 1..4), prop::option::of(check()), prop::option::of(queue()), names()), 1..4),
        stream in stream(),
        http in any::<bool>(),
        servers in prop::collection::vec((way(), stream(), 1usize..4, 1u32..=1 << 20, listen_options()), 1..4),
    ) -> Config {
        let mut upstreams: Vec<Upstream> = groups.into_iter().enumerate().map(|(n, (balance, mut peers, check, queue, mut names))| {
            peers[0].backup = false;
            let grows = matches!(balance, Balance::RoundRobin | Balance::LeastConn | Balance::LeastTime);
            let likes = names.iter_mut().map(|named| &mut named.like);
            for peer in peers.iter_mut().chain(likes).filter(|_| !grows) {
                peer.slow_start = Duration::ZERO;
            }
            let tcp = peers.iter().all(|peer| matches!(peer.address, Address::Tcp(_)));
            let check = check.map(|check| Check { port: check.port.filter(|_| tcp), ..check });
            Upstream { name: format!("group-{n}.é"), balance, peers, check, queue, names }
        }).collect();
        let named = upstreams.len();
        let mut port = 1000;
        let mut built = Vec::new();
        for (way, mut own, listeners, backlog, options) in servers {
            // A server cannot say that there is none.
            own.resolver = own.resolver.or_else(|| stream.resolver.clone());
            let listen = (0..listeners).map(|n| {
                port += 1;
                let ip: std::net::IpAddr = if n == 0 { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
                let (address, options) = match n {
                    2 => {
                        let (rcvbuf, sndbuf) = (options.rcvbuf, options.sndbuf);
                        let mode = Some(port as u32 % 0o1000);
                        let options = ListenOptions { rcvbuf, sndbuf, mode, ..ListenOptions::default() };
                        (Address::Unix(format!("/run/a ${{b}}é-{port}").into()), options)
                    }
                    n => (Address::Tcp((ip, port).into()), ListenOptions { dual: n == 1 && port % 2 == 0, ..options.clone() }),
                };
                Listen { address, backlog, proxy_protocol: backlog % 2 == 0, options }
            }).collect();
            let action = match way {
                Way::Status => Action::Status,
                Way::Named(index) => Action::Proxy(Target::Upstream(index.index(named))),
                Way::Direct(address) => {
                    let name = address.to_string();
                    let index = upstreams.iter().position(|upstream| upstream.name == name).unwrap_or_else(|| {
                        let peers = vec![Peer::new(Address::Tcp(address))];
                        upstreams.push(Upstream { name, balance: Balance::RoundRobin, peers, check: None, queue: None, names: Vec::new() });
                        upstreams.len() - 1
                    });
                    Action::Proxy(Target::Upstream(index))
                }
                Way::Dynamic(pieces) => {
                    let mut parts = Vec::new();
                    for (variable, literal) in pieces {
                        parts.push(Part::Variable(variable));
                        if !literal.is_empty() {
                            parts.push(Part::Literal(literal));
                        }
                    }
                    Action::Proxy(Target::Variable(Template(parts)))
                }
            };
            built.push(Server { listen, action, stream: own });
        }
        if http {
            let stream = Stream { access_log: None, ..stream.clone() };
            let listen = vec![Listen {
                address: Address::Tcp(([127, 0, 0, 1], 9).into()),
                backlog: 5,
                proxy_protocol: false,
                options: ListenOptions::default(),
            }];
            built.push(Server { listen, action: Action::Http, stream });
        }
        Config {
            user: user.map(|(name, id)| User { name: name.to_owned(), uid: id, gid: id }),
            worker_cpus,
            worker_connections,
            worker_backlog_size,
            worker_shutdown_timeout: shutdown.map(Duration::from_millis),
            flow_steering,
            pid: paths.0.into(),
            error_log: ErrorLog {
                target: paths.1.map_or(LogTarget::Stderr, |path| LogTarget::File(path.into())),
                level,
            },
            upstreams,
            stream,
            maps: maps(),
            limit_zones: vec![
                LimitZone { name: "one".into(), key: Template(vec![Part::Variable(Variable::RemoteAddr)]) },
                LimitZone {
                    name: "two".into(),
                    key: Template(vec![Part::Literal("x-".into()), Part::Variable(Variable::ServerPort), Part::Literal("-y".into())]),
                },
            ],
            servers: built,
        }
    }
}

/// Words that a configuration is made of, so that arbitrary text gets past the first letter.
fn almost_toml() -> impl Strategy<Value = String> {
    let words = vec![
        "[[server]]",
        "[stream]",
        "[[upstream]]",
        "listen",
        "proxy_pass",
        "server",
        "set",
        "name",
        "weight",
        "\n",
        "=",
        "\"",
        "{",
        "}",
        "[",
        "]",
        ",",
        ".",
        "0",
        "-1",
        "1e9",
        "true",
        "80",
        "\"u\"",
        "\"${A:-\"",
        "\"$a\"",
        "\"0101\"",
        "\"1h\"",
        "worker_cpu_affinity",
        "include",
        "user",
        "1979-05-27",
        "'''",
        "#",
        "\"[::]:1\"",
        "\"*:1\"",
        "\"unix:\"",
        "\"1-2\"",
        "so_keepalive",
        "\"1::2\"",
        "é",
        "\r",
    ];
    prop::collection::vec(prop::sample::select(words), 0..40).prop_map(|words| words.join(" "))
}

proptest! {
    #[test]
    fn a_dumped_configuration_loads_as_an_equal_one(config in configs()) {
        let directory = Directory::new();
        let text = dump(&config);
        let again = load_with(&Fake::default(), &directory, &text, &[]);
        prop_assert_eq!(again, Ok(config), "{}", text);
    }

    #[test]
    fn arbitrary_text_is_loaded_or_refused_but_never_panics(
        text in prop_oneof![almost_toml(), "\\PC{0,60}", "[\\x00-\\x7f]{0,60}"],
        set in prop::collection::vec("[a-z_.\\[\\]0-9=]{0,20}|server\\[0\\]\\.[a-z]{0,8}=\\PC{0,10}|\\PC{0,10}", 0..3),
    ) {
        let directory = Directory::new();
        let path = directory.file("a.toml", &text);
        if let Err(found) = load_in(&Fake::default(), &path, &set) {
            prop_assert!(!found.is_empty());
            for diagnostic in found {
                prop_assert!(!diagnostic.to_string().contains(['\n', '\r']), "{diagnostic}");
            }
        }
    }
}
