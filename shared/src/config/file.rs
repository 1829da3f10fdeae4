//! What may be written: the known keys of each table, and what to say about an unknown one.
//! Knows nothing of values.

/// What stands under a key.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shape {
    /// A single value, or a list of single values.
    Value,
    /// One table with these keys.
    Table(&'static [Key]),
    /// A list of tables with these keys: `[[name]]`.
    Tables(&'static [Key]),
    /// A single value, a table with these keys, or a list of both.
    Mixed(&'static [Key]),
    /// A table with keys of the user's choice, each with a single value.
    Free,
}

/// A known key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub name: &'static str,
    pub shape: Shape,
}

const fn value(name: &'static str) -> Key {
    Key {
        name,
        shape: Shape::Value,
    }
}

const fn shaped(name: &'static str, shape: Shape) -> Key {
    Key { name, shape }
}

/// The top level of a file.
pub(super) const ROOT: &[Key] = &[
    value("user"),
    value("worker_processes"),
    value("worker_cpu_affinity"),
    value("worker_connections"),
    value("worker_backlog_size"),
    value("worker_shutdown_timeout"),
    value("flow_steering"),
    value("pid"),
    shaped("error_log", Shape::Table(&[value("path"), value("level")])),
    value("include"),
    shaped("log_format", Shape::Tables(LOG_FORMAT)),
    shaped("http", Shape::Table(HTTP)),
    shaped("stream", Shape::Table(STREAM)),
    shaped("upstream", Shape::Tables(UPSTREAM)),
    shaped("server", Shape::Tables(SERVER)),
    shaped("limit_conn_zone", Shape::Tables(LIMIT_CONN_ZONE)),
    shaped("map", Shape::Tables(MAP)),
];

/// `[stream]`: what every server inherits.
pub(super) const STREAM: &[Key] = &[
    value("ebpf_enable"),
    value("proxy_timeout"),
    value("proxy_connect_timeout"),
    value("proxy_next_upstream"),
    value("proxy_next_upstream_tries"),
    value("proxy_next_upstream_timeout"),
    value("proxy_buffer_size"),
    value("proxy_half_close"),
    value("tcp_nodelay"),
    value("tcp_congestion"),
    value("proxy_socket_keepalive"),
    value("proxy_bind"),
    value("ebpf_timer_period"),
    value("ebpf_backlog_size"),
    value("ebpf_offload_after"),
    value("on_reload"),
    value("proxy_protocol"),
    value("proxy_protocol_timeout"),
    value("set_real_ip_from"),
    value("access"),
    value("limit_conn"),
    value("limit_conn_rate"),
    value("proxy_upload_rate"),
    value("proxy_download_rate"),
    value("ssl_preread"),
    value("preread_buffer_size"),
    value("preread_timeout"),
    shaped("access_log", Shape::Mixed(ACCESS_LOG)),
    shaped("resolver", Shape::Mixed(RESOLVER)),
    value("resolver_timeout"),
];

/// A `resolver` that is a table.
const RESOLVER: &[Key] = &[
    value("addresses"),
    value("valid"),
    value("hold"),
    value("ipv4"),
    value("ipv6"),
];

/// `[[map]]`.
const MAP: &[Key] = &[
    value("source"),
    value("variable"),
    value("hostnames"),
    value("values"),
];

/// `[[limit_conn_zone]]`.
const LIMIT_CONN_ZONE: &[Key] = &[value("name"), value("key")];

/// `[http]`.
const HTTP: &[Key] = &[shaped(
    "listen",
    Shape::Mixed(&[value("address"), value("backlog"), value("mode")]),
)];

/// `[[log_format]]`.
const LOG_FORMAT: &[Key] = &[value("name"), value("escape"), value("format")];

/// An `access_log` that is a table.
const ACCESS_LOG: &[Key] = &[value("path"), value("format"), value("buffer"), value("flush")];

/// `[[upstream]]`.
const UPSTREAM: &[Key] = &[
    value("name"),
    value("balance"),
    shaped("resolver", Shape::Mixed(RESOLVER)),
    value("resolver_timeout"),
    shaped("server", Shape::Mixed(PEER)),
    shaped("check", Shape::Table(CHECK)),
    shaped("queue", Shape::Table(&[value("size"), value("timeout")])),
];

/// `check` of an `[[upstream]]`.
const CHECK: &[Key] = &[
    value("interval"),
    value("rise"),
    value("fall"),
    value("timeout"),
    value("port"),
    value("send"),
    value("expect"),
];

/// An entry of an upstream's `server` that is a table.
const PEER: &[Key] = &[
    value("address"),
    value("weight"),
    value("backup"),
    value("down"),
    value("max_conns"),
    value("max_fails"),
    value("fail_timeout"),
    value("slow_start"),
    value("resolve"),
    value("service"),
];

/// `[[server]]`: its own keys, then those of [`STREAM`].
const SERVER: &[Key] = &[
    shaped("listen", Shape::Mixed(LISTEN)),
    value("proxy_pass"),
    shaped("set", Shape::Free),
    value("ebpf_status_return"),
    value("ebpf_enable"),
    value("proxy_timeout"),
    value("proxy_connect_timeout"),
    value("proxy_next_upstream"),
    value("proxy_next_upstream_tries"),
    value("proxy_next_upstream_timeout"),
    value("proxy_buffer_size"),
    value("proxy_half_close"),
    value("tcp_nodelay"),
    value("tcp_congestion"),
    value("proxy_socket_keepalive"),
    value("proxy_bind"),
    value("ebpf_timer_period"),
    value("ebpf_backlog_size"),
    value("ebpf_offload_after"),
    value("on_reload"),
    value("proxy_protocol"),
    value("proxy_protocol_timeout"),
    value("set_real_ip_from"),
    value("access"),
    value("limit_conn"),
    value("limit_conn_rate"),
    value("proxy_upload_rate"),
    value("proxy_download_rate"),
    value("ssl_preread"),
    value("preread_buffer_size"),
    value("preread_timeout"),
    shaped("access_log", Shape::Mixed(ACCESS_LOG)),
    shaped("resolver", Shape::Mixed(RESOLVER)),
    value("resolver_timeout"),
];

/// An entry of a server's `listen` that is a table.
const LISTEN: &[Key] = &[
    value("address"),
    value("backlog"),
    value("proxy_protocol"),
    value("ipv6only"),
    value("rcvbuf"),
    value("sndbuf"),
    value("deferred"),
    value("fastopen"),
    value("so_keepalive"),
    value("mode"),
];

/// Names that users of nginx and of its module bring along, with ours.
const FORMER_NAMES: &[(&str, &str)] = &[
    ("ebpf_proxy_timeout", "proxy_timeout"),
    ("ebpf_proxy_buffer_size", "proxy_buffer_size"),
    ("allow", "access"),
    ("deny", "access"),
];

pub(super) fn find(keys: &[Key], name: &str) -> Option<Key> {
    keys.iter().find(|key| key.name == name).copied()
}

/// The key of this table that was meant by an unknown one.
pub(super) fn meant(keys: &[Key], name: &str) -> Option<&'static str> {
    let former = FORMER_NAMES.iter().find(|(former, _)| *former == name);
    let ours = former.and_then(|(_, ours)| find(keys, ours)).map(|key| key.name);
    // A key of another table, spelt as it should be, is in the wrong place rather than misspelt.
    ours.or_else(|| {
        places_of(name)
            .is_empty()
            .then(|| nearest(name, keys.iter().map(|key| key.name)))
            .flatten()
    })
}

/// What to say about a key that is not among `keys`.
pub(super) fn unknown_key(keys: &[Key], name: &str) -> String {
    let places = places_of(name);
    match meant(keys, name) {
        Some(ours) if FORMER_NAMES.contains(&(name, ours)) => {
            format!("unknown key, its name here is \"{ours}\"")
        }
        Some(near) => format!("unknown key, did you mean \"{near}\"?"),
        None if !places.is_empty() => format!("unknown key here, it belongs {}", places.join(" or ")),
        None => {
            let known: Vec<&str> = keys.iter().map(|key| key.name).collect();
            format!("unknown key, known here: {}", known.join(", "))
        }
    }
}

/// The tables that know the key, in words.
fn places_of(name: &str) -> Vec<&'static str> {
    let tables = [
        ("at the top level", ROOT),
        ("in [stream]", STREAM),
        ("in [[server]]", SERVER),
        ("in [[upstream]]", UPSTREAM),
    ];
    tables
        .iter()
        .filter(|(_, keys)| find(keys, name).is_some())
        .map(|(place, _)| *place)
        .collect()
}

/// The candidate that is a slip of the finger away from `name`.
pub(super) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // A third of the letters may differ: more than that, and the guess is noise.
    let allowed = name.chars().count() / 3;
    let scored = candidates.map(|near| (strsim::damerau_levenshtein(name, near), near));
    scored
        .filter(|(distance, _)| *distance <= allowed.max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, near)| near)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stream_key_can_be_set_in_a_server() {
        for key in STREAM {
            assert!(
                find(SERVER, key.name).is_some(),
                "{} is missing in SERVER",
                key.name
            );
        }
    }

    #[test]
    fn every_default_belongs_to_a_known_key() {
        for (path, _) in super::super::defaults::KEYS {
            let known = match path.split_once('.') {
                None => find(ROOT, path).is_some(),
                Some((table, name)) => match find(ROOT, table) {
                    Some(Key {
                        shape: Shape::Table(keys),
                        ..
                    }) => find(keys, name).is_some(),
                    _ => false,
                },
            };
            assert!(known, "{path} has a default but cannot be written");
        }
    }

    #[test]
    fn an_unknown_key_gets_the_most_helpful_hint() {
        assert_eq!(
            unknown_key(ROOT, "worker_proceses"),
            "unknown key, did you mean \"worker_processes\"?"
        );
        assert_eq!(
            unknown_key(ROOT, "proxy_timeout"),
            "unknown key here, it belongs in [stream] or in [[server]]"
        );
        assert_eq!(
            unknown_key(STREAM, "ebpf_proxy_timeout"),
            "unknown key, its name here is \"proxy_timeout\""
        );
        assert_eq!(
            unknown_key(STREAM, "upstream"),
            "unknown key here, it belongs at the top level"
        );
        assert_eq!(
            unknown_key(PEER, "priority"),
            "unknown key, known here: address, weight, backup, down, max_conns, max_fails, fail_timeout, slow_start, \
             resolve, service"
        );
    }
}
