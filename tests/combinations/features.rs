//! What a session may have: each feature with its row in the README's table, who carries the bytes then, and how a
//! configuration asks for it. A new feature is one more entry here, and one more row there.

/// Who carries the bytes of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// The kernel, both ways.
    Kernel,
    /// User space to the upstream, the kernel to the client.
    UploadLimited,
    /// The kernel to the upstream, user space to the client.
    DownloadLimited,
    /// User space, because both ways are limited.
    Limited,
    /// User space, because a peer is no TCP socket.
    NotTcp,
    /// User space, because the operator says so.
    Off,
    /// User space at first, because the operator says so, then the kernel.
    Late,
}

impl Carrier {
    /// Whether user space carries the bytes to the upstream, and to the client.
    pub fn copied(self) -> [bool; 2] {
        match self {
            Carrier::Kernel | Carrier::Late => [false; 2],
            Carrier::UploadLimited => [true, false],
            Carrier::DownloadLimited => [false, true],
            Carrier::Limited | Carrier::NotTcp | Carrier::Off => [true; 2],
        }
    }

    /// Why the kernel does not, as it is counted; `-`: nothing is.
    pub fn reason(self) -> &'static str {
        match self {
            Carrier::Kernel | Carrier::Off | Carrier::Late => "-",
            Carrier::NotTcp => "not_tcp",
            Carrier::UploadLimited | Carrier::DownloadLimited | Carrier::Limited => "rate_limited",
        }
    }

    /// The second and third cell of a row of the README's table.
    pub fn cells(self) -> [String; 2] {
        let who = match self.copied() {
            _ if self == Carrier::Late => "user space, then the kernel",
            [false, false] => "the kernel",
            [true, true] => "user space",
            [true, false] => "user space to the upstream, the kernel to the client",
            [false, true] => "the kernel to the upstream, user space to the client",
        };
        let counted = match self.reason() {
            "-" => String::new(),
            reason => format!("`{reason}`"),
        };
        [who.to_owned(), counted]
    }

    /// What two features together come to.
    pub fn and(self, other: Carrier) -> Carrier {
        let order = [
            Carrier::Off,
            Carrier::NotTcp,
            Carrier::Limited,
            Carrier::UploadLimited,
            Carrier::DownloadLimited,
            Carrier::Late,
        ];
        let first = order.into_iter().find(|one| *one == self || *one == other);
        first.unwrap_or(Carrier::Kernel)
    }
}

/// How the upstream's side listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    V4,
    V6,
    Unix,
}

/// How a listener is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Front {
    /// At an address of its own.
    Ip(&'static str),
    /// At every address of both families, over IPv4.
    Dual,
    Unix,
}

/// The header that the upstream waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Header {
    None,
    V1,
    V2,
}

/// How `proxy_pass` says where a session goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Name,
    Variable,
    Hello,
    /// By a host's name, which is looked up for the session.
    Host,
}

/// One listener with all that is behind it.
#[derive(Clone, Debug)]
pub struct Setup {
    pub name: String,
    pub carrier: Carrier,
    /// Of the `[[server]]`.
    pub lines: Vec<&'static str>,
    /// Of the listener.
    pub listen: Vec<&'static str>,
    /// Of the `[[upstream]]`.
    pub group: Vec<&'static str>,
    pub front: Front,
    /// What the client says before its payload.
    pub says: &'static [u8],
    pub pass: Pass,
    pub balance: &'static str,
    /// The group has peers beside the one that serves.
    pub many_peers: bool,
    pub peer: Peer,
    /// The peer has a name that is looked up while the program runs.
    pub by_name: bool,
    pub expects: Header,
    /// The client ends its stream before it has its answer.
    pub ends_early: bool,
    /// The reasons that its end may be counted as.
    pub closes: &'static [&'static str],
}

impl Setup {
    /// Only what is there without any feature.
    pub fn plain() -> Setup {
        Setup {
            name: "nothing else".to_owned(),
            carrier: Carrier::Kernel,
            lines: Vec::new(),
            listen: vec!["backlog = 511"],
            group: Vec::new(),
            front: Front::Ip("127.0.0.1"),
            says: b"",
            pass: Pass::Name,
            balance: "round_robin",
            many_peers: false,
            peer: Peer::V4,
            by_name: false,
            expects: Header::None,
            ends_early: false,
            closes: &["finished"],
        }
    }

    /// With these features.
    pub fn with(features: &[&Feature]) -> Setup {
        let mut setup = Setup::plain();
        setup.name = features.iter().map(|f| f.name).collect::<Vec<_>>().join(" + ");
        for feature in features {
            setup.carrier = setup.carrier.and(feature.carrier);
            (feature.apply)(&mut setup);
        }
        setup
    }
}

/// One thing that may be asked for.
pub struct Feature {
    pub name: &'static str,
    /// The first cell of its row.
    pub row: &'static str,
    /// Two features that have one of these in common exclude each other.
    pub slots: &'static [&'static str],
    pub carrier: Carrier,
    pub apply: fn(&mut Setup),
}

const fn kernel(
    name: &'static str,
    row: &'static str,
    slots: &'static [&'static str],
    apply: fn(&mut Setup),
) -> Feature {
    Feature {
        name,
        row,
        slots,
        carrier: Carrier::Kernel,
        apply,
    }
}

const fn copied(
    name: &'static str,
    row: &'static str,
    slots: &'static [&'static str],
    carrier: Carrier,
    apply: fn(&mut Setup),
) -> Feature {
    Feature {
        name,
        row,
        slots,
        carrier,
        apply,
    }
}

const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\xc6\x33\x64\x09\x9c\x40\x01\xbb";
const BALANCE: &str = "`balance`, each way";
const PROXY_IN: &str = "`listen = { proxy_protocol = true }`, v1 and v2, `set_real_ip_from`";
const PROXY_OUT: &str = "`proxy_protocol = \"v1\"` and `\"v2\"`";
const BELIEVED: &str = "set_real_ip_from = [\"127.0.0.1\", \"::1\", \"unix:\"]";

/// Everything that a session may have by itself.
pub const FEATURES: &[Feature] = &[
    kernel("least_conn", BALANCE, &["balance"], |s| s.balance = "least_conn"),
    kernel("least_time", BALANCE, &["balance"], |s| s.balance = "least_time"),
    kernel("random", BALANCE, &["balance"], |s| s.balance = "random"),
    kernel("random two", BALANCE, &["balance"], |s| s.balance = "random two"),
    kernel("hash", BALANCE, &["balance"], |s| s.balance = "hash $remote_addr"),
    kernel("consistent", BALANCE, &["balance"], |s| {
        s.balance = "hash $remote_addr consistent"
    }),
    kernel("source", BALANCE, &["balance"], |s| s.balance = "source"),
    kernel(
        "peers",
        "`weight`, `backup`, `down`, `max_conns`, `max_fails`; `proxy_next_upstream` after a peer that refuses",
        &["peers", "peer"],
        |s| s.many_peers = true,
    ),
    kernel(
        "variable",
        "`proxy_pass` with `set` and `$variables`",
        &["pass"],
        |s| s.pass = Pass::Variable,
    ),
    kernel("hello", "`ssl_preread` with `[[map]]`", &["pass"], |s| {
        s.pass = Pass::Hello;
        s.lines.push("ssl_preread = true");
    }),
    kernel("v1 in", PROXY_IN, &["in"], |s| {
        s.says = b"PROXY TCP4 192.0.2.7 198.51.100.9 40000 443\r\n";
        s.listen.push("proxy_protocol = true");
        s.lines.push(BELIEVED);
    }),
    kernel("v2 in", PROXY_IN, &["in"], |s| {
        s.says = V2;
        s.listen.push("proxy_protocol = true");
        s.lines.push(BELIEVED);
    }),
    kernel("v1 out", PROXY_OUT, &["out"], |s| {
        s.expects = Header::V1;
        s.lines.push("proxy_protocol = \"v1\"");
    }),
    kernel("v2 out", PROXY_OUT, &["out"], |s| {
        s.expects = Header::V2;
        s.lines.push("proxy_protocol = \"v2\"");
    }),
    kernel("access", "`access`", &["access"], |s| {
        let rule = "access = [\"deny 10.0.0.0/8\", \"allow 127.0.0.0/8\", \"allow ::1\", \"allow 192.0.2.0/24\", \"allow unix:\", \"deny all\"]";
        s.lines.push(rule);
    }),
    kernel(
        "limit_conn",
        "`limit_conn`, `limit_conn_rate`",
        &["limit_conn"],
        |s| {
            s.lines.push("limit_conn = \"per_client 1000\"");
        },
    ),
    kernel(
        "limit_conn_rate",
        "`limit_conn`, `limit_conn_rate`",
        &["limit_conn_rate"],
        |s| {
            s.lines
                .push("limit_conn_rate = \"per_client 50000/s burst=1000\"");
        },
    ),
    copied(
        "upload",
        "`proxy_upload_rate`",
        &["rate"],
        Carrier::UploadLimited,
        |s| {
            s.lines.push("proxy_upload_rate = \"200m\"");
        },
    ),
    copied(
        "download",
        "`proxy_download_rate`",
        &["rate"],
        Carrier::DownloadLimited,
        |s| {
            s.lines.push("proxy_download_rate = \"200m\"");
        },
    ),
    copied(
        "both rates",
        "`proxy_upload_rate` and `proxy_download_rate`",
        &["rate"],
        Carrier::Limited,
        |s| {
            s.lines
                .push("proxy_upload_rate = \"200m\"\nproxy_download_rate = \"200m\"");
        },
    ),
    kernel("v6 client", "IPv6, on either side or both", &["listen"], |s| {
        s.front = Front::Ip("::1")
    }),
    kernel("both families", "`ipv6only = false`", &["listen"], |s| {
        s.front = Front::Dual;
        s.listen.push("ipv6only = false");
    }),
    copied(
        "unix listener",
        "`unix:` listeners",
        // What the others say of a listener is said of TCP.
        &["listen", "keepalive", "deferred", "fastopen", "buffers"],
        Carrier::NotTcp,
        |s| s.front = Front::Unix,
    ),
    kernel("v6 peer", "IPv6, on either side or both", &["peer"], |s| {
        s.peer = Peer::V6
    }),
    copied("unix peer", "`unix:` peers", &["peer"], Carrier::NotTcp, |s| {
        s.peer = Peer::Unix
    }),
    kernel("no half close", "`proxy_half_close = false`", &["end"], |s| {
        // Whichever end comes first.
        s.closes = &["half_closed", "finished"];
        s.lines.push("proxy_half_close = false");
    }),
    kernel(
        "early end",
        "a half-closed session, until it is held back for the first time",
        &["end", "backlog"],
        |s| {
            s.ends_early = true;
        },
    ),
    kernel(
        "small backlog",
        "a small `ebpf_backlog_size`, sources held back",
        &["backlog"],
        |s| {
            s.lines.push("ebpf_backlog_size = \"64k\"");
        },
    ),
    kernel("delay", "`tcp_nodelay = false`", &["nodelay"], |s| {
        s.lines.push("tcp_nodelay = false")
    }),
    copied(
        "ebpf off",
        "`ebpf_enable = false`",
        &["ebpf"],
        Carrier::Off,
        |s| s.lines.push("ebpf_enable = false"),
    ),
    copied(
        "late",
        "`ebpf_offload_after`",
        // What is limited one way would be copied in part the other way.
        &["ebpf", "rate"],
        Carrier::Late,
        |s| s.lines.push("ebpf_offload_after = \"1k\""),
    ),
    kernel("bind", "`proxy_bind`", &["bind", "peer"], |s| {
        s.lines.push("proxy_bind = \"127.0.0.1\"");
    }),
    kernel(
        "keepalive",
        "`proxy_socket_keepalive`, `so_keepalive`",
        &["keepalive"],
        |s| {
            s.lines.push("proxy_socket_keepalive = true");
            s.listen.push("so_keepalive = true");
        },
    ),
    kernel("buffers", "`rcvbuf`, `sndbuf`", &["buffers"], |s| {
        s.listen.push("rcvbuf = \"128k\", sndbuf = \"128k\"");
    }),
    kernel("deferred", "`deferred`", &["deferred"], |s| {
        s.listen.push("deferred = true")
    }),
    kernel(
        "fastopen",
        "`fastopen`, for clients without data in the SYN",
        &["fastopen"],
        |s| s.listen.push("fastopen = 16"),
    ),
    kernel("by name", "`resolve`", &["peer"], |s| s.by_name = true),
    kernel(
        "by host",
        "`resolver` with a host in `proxy_pass`",
        // It leads past the group.
        &["pass", "peer", "peers", "balance"],
        |s| s.pass = Pass::Host,
    ),
    kernel("check", "`check`", &["check"], |s| {
        s.group.push("check = { interval = \"200ms\" }")
    }),
    kernel("queue", "`queue`", &["queue"], |s| {
        s.group.push("queue = { size = 10 }")
    }),
];

/// What is on in every test here, or happens to sessions, or to the host (`tests/steering.rs`): the rows that have no
/// feature of their own.
pub const AROUND: &[&str] = &[
    "`flow_steering`",
    "`access_log`, `log_format`",
    "`http`: metrics, status",
    "a reload (HUP), for sessions that go on",
    "an upgrade (USR2), for sessions that go on",
    "a worker's death, for sessions that go on",
];
