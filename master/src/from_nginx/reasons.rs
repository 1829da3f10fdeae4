//! Directives that have no key here: what becomes of each, and why.

use super::out::Level;

/// A name, or the beginning of names if it ends in `*`.
type Pattern = &'static str;
type Row = (Pattern, Level, &'static str);

use Level::{Idle, Lost, Note};

const NO_TLS: &str =
    "Culvert does not speak TLS itself; ssl_preread and [[map]] lead TLS connections without opening them";
const OTHER_SERVERS: &str = "only the stream block is carried over, this one stays with nginx";
const HASH: &str = "tables take the room they need";
const PROCESS: &str = "a service manager's business";
const UDP: &str = "it is about UDP";
const JS: &str = "no scripts run here";
const COUNTERS: &str = "everything is counted always, see http and ebpf_status_return";
const NO_VARIABLE: &str = "no such variable is made here; a [[map]] with patterns may do";

const MAIN: &[Row] = &[
    ("http", Note, OTHER_SERVERS),
    ("mail", Note, OTHER_SERVERS),
    ("rtmp", Note, OTHER_SERVERS),
    ("load_module", Idle, "there are no modules to load"),
    (
        "worker_rlimit_nofile",
        Idle,
        "the limit is raised by itself to what worker_connections needs",
    ),
    ("worker_rlimit_core", Lost, "set LimitCORE= in the service's unit"),
    ("worker_priority", Lost, "set Nice= in the service's unit"),
    (
        "working_directory",
        Lost,
        "set WorkingDirectory= in the service's unit",
    ),
    (
        "master_process",
        Lost,
        "workers are always processes of their own",
    ),
    ("env", Idle, "no variable of the environment is taken away"),
    ("lock_file", Idle, "nothing is locked between workers"),
    ("timer_resolution", Idle, "the clock is read when it is needed"),
    ("pcre_jit", Idle, "regular expressions run in bounded time"),
    ("thread_pool", Idle, "no thread pool is needed"),
    ("debug_points", Idle, "a means of debugging nginx"),
    ("google_perftools_profiles", Idle, "a means of debugging nginx"),
    ("ssl_engine", Idle, NO_TLS),
    ("ssl_object_cache_inheritable", Idle, NO_TLS),
    ("quic_bpf", Idle, UDP),
    ("daemon", Idle, PROCESS),
];

const EVENTS: &[Row] = &[
    ("use", Idle, "epoll is used, always"),
    (
        "multi_accept",
        Idle,
        "a worker takes up to 64 connections in a turn",
    ),
    (
        "accept_mutex*",
        Idle,
        "each worker has listening sockets of its own",
    ),
    ("worker_aio_requests", Idle, "no files are read"),
    (
        "debug_connection",
        Lost,
        "the level of the error log counts for all connections",
    ),
];

const STREAM: &[Row] = &[
    ("variables_hash_*", Idle, HASH),
    ("map_hash_*", Idle, HASH),
    ("server_names_hash_*", Idle, HASH),
    ("open_log_file_cache", Idle, "log files stay open"),
    (
        "limit_conn_log_level",
        Idle,
        "refused sessions are counted, the access log names them",
    ),
    (
        "limit_conn_dry_run",
        Lost,
        "limits are limits: leave limit_conn out instead",
    ),
    ("proxy_requests", Idle, UDP),
    ("proxy_responses", Idle, UDP),
    ("ssl_alpn", Idle, NO_TLS),
    ("ssl_*", Idle, NO_TLS),
    ("proxy_ssl_*", Idle, NO_TLS),
    ("status_zone", Idle, COUNTERS),
    ("geo", Lost, NO_VARIABLE),
    ("geoip*", Lost, NO_VARIABLE),
    (
        "split_clients",
        Lost,
        "no such variable is made here; weights of an [[upstream]] with balance = \"hash …\" may do",
    ),
    ("keyval*", Lost, NO_VARIABLE),
    ("js_*", Lost, JS),
    ("perl*", Lost, JS),
    ("zone_sync*", Lost, "there is no cluster to tell"),
    ("health_check_timeout", Idle, "see check in [[upstream]]"),
    (
        "health_check",
        Lost,
        "only the server of a group is checked: see check in [[upstream]]",
    ),
    ("proxy_session_drop", Lost, "see on_reload"),
    ("error_log", Lost, "there is one error log, for the whole program"),
    ("mqtt*", Lost, "the bytes of a session are not looked at"),
    ("otel*", Lost, "there are no traces; see http for metrics"),
    ("num_map*", Lost, NO_VARIABLE),
    (
        "server_name",
        Lost,
        "servers of one address are told apart by ssl_preread and a [[map]] from $ssl_preread_server_name",
    ),
];

/// What a `server` cannot do without: it would lead elsewhere, or let in whom nginx keeps out.
const NEEDED: &[(Pattern, &str)] = &[
    ("return", "Culvert writes no text of its own"),
    (
        "pass",
        "a connection cannot be passed to another server of the file",
    ),
    ("js_access", JS),
    ("js_filter", JS),
    ("js_preread", JS),
    ("preread_by_lua*", JS),
    ("content_by_lua*", JS),
    ("mqtt_preread", "only TLS hellos are read ahead"),
    (
        "server_name",
        "servers of one address are told apart by ssl_preread and a [[map]] from $ssl_preread_server_name",
    ),
];

const UPSTREAM: &[Row] = &[
    (
        "zone",
        Idle,
        "the state of all peers is common to all workers, always",
    ),
    (
        "ip_hash",
        Lost,
        "nginx has it for http only; write balance = \"source\"",
    ),
    ("keepalive*", Lost, "nginx has it for http only"),
    ("state", Lost, "peers stand in this file"),
    ("ntlm", Lost, "nginx has it for http only"),
    ("sticky*", Lost, "nginx has it for http only"),
    (
        "check_shm_size",
        Idle,
        "the state of all peers is common to all workers, always",
    ),
];

fn fits(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == pattern,
    }
}

fn find(rows: &[Row], name: &str) -> Option<(Level, &'static str)> {
    rows.iter()
        .find(|(pattern, ..)| fits(pattern, name))
        .map(|(_, level, reason)| (*level, *reason))
}

/// Outside every block.
pub fn main(name: &str) -> (Level, &'static str) {
    find(MAIN, name).unwrap_or((Lost, "it is not known here"))
}

/// In `events`.
pub fn events(name: &str) -> (Level, &'static str) {
    find(EVENTS, name).unwrap_or((Lost, "it is not known here"))
}

/// In `stream` and its servers.
pub fn stream(name: &str) -> (Level, &'static str) {
    find(STREAM, name).unwrap_or((Lost, "it is not known here"))
}

/// In an upstream group.
pub fn upstream(name: &str) -> (Level, &'static str) {
    find(UPSTREAM, name).unwrap_or((Lost, "it is not known here"))
}

/// Why a server that has this directive is left out.
pub fn needed(name: &str) -> Option<&'static str> {
    NEEDED
        .iter()
        .find(|(pattern, _)| fits(pattern, name))
        .map(|(_, reason)| *reason)
}
