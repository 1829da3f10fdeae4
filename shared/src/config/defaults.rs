//! Every default, with its reason beside it. Decides nothing else.
//!
//! nginx's default is taken wherever nginx has the setting; a deviation says why.

/// The defaults of keys that stand once in the file, in the words that a file would use. They are the
/// lowest layer: file, environment and `--set` go over them. `user` has none: workers then run as whoever
/// started the master, as with nginx built without a user.
pub(super) const KEYS: &[(&str, Default)] = &[
    // One single-threaded worker fills one CPU. nginx says 1, from the time of one CPU.
    ("worker_processes", Default::Text("auto")),
    // A worker that stays on its CPU keeps its caches, and its sessions' kernel work with it. nginx leaves this to the
    // scheduler.
    ("worker_cpu_affinity", Default::Text("auto")),
    // nginx's packages set 1024. Ours counts sessions (two sockets each), and twice as many sockmap slots.
    ("worker_connections", Default::Number(1024)),
    // Sixty-four readers at once that have stopped with all that ebpf_backlog_size gives them: rare, and
    // a sixteenth of the memory of a host with 4 GiB for each worker.
    ("worker_backlog_size", Default::Text("256m")),
    // nginx waits without limit; workers that never leave are what its users complain about. An hour lets
    // all but the longest sessions end by themselves.
    ("worker_shutdown_timeout", Default::Text("1h")),
    // It changes settings of the host, which a program does only when it is told to.
    ("flow_steering", Default::Text("off")),
    // /run is where the Filesystem Hierarchy Standard keeps process ids.
    ("pid", Default::Text("/run/culvert/master.pid")),
    // A service manager and a container collect standard error.
    ("error_log.path", Default::Text("stderr")),
    // Starts, reloads, stops and how each session ended. nginx says error, and so is silent about all of them.
    ("error_log.level", Default::Text("info")),
    // What the program is for.
    ("stream.ebpf_enable", Default::Flag(true)),
    // nginx: proxy_timeout 10m.
    ("stream.proxy_timeout", Default::Text("10m")),
    // nginx: proxy_connect_timeout 60s.
    ("stream.proxy_connect_timeout", Default::Text("60s")),
    // nginx: proxy_next_upstream on, without limits (0).
    ("stream.proxy_next_upstream", Default::Flag(true)),
    ("stream.proxy_next_upstream_tries", Default::Number(0)),
    ("stream.proxy_next_upstream_timeout", Default::Text("0")),
    // nginx: resolver_timeout 30s.
    ("stream.resolver_timeout", Default::Text("30s")),
    // nginx: proxy_buffer_size 16k.
    ("stream.proxy_buffer_size", Default::Text("16k")),
    // nginx says off and so loses what still flows the other way; a proxy must not cut a half-closed stream.
    ("stream.proxy_half_close", Default::Flag(true)),
    // nginx: tcp_nodelay on.
    ("stream.tcp_nodelay", Default::Flag(true)),
    // No network is shared over the loopback device, so what paces there (bbr) only costs timers.
    ("stream.tcp_congestion", Default::Text("auto")),
    // nginx: proxy_socket_keepalive off.
    ("stream.proxy_socket_keepalive", Default::Flag(false)),
    // nginx: none, which is off.
    ("stream.proxy_bind", Default::Text("off")),
    // The period of the nginx module from which the name comes: a small part of any sensible proxy_timeout.
    ("stream.ebpf_timer_period", Default::Text("2s")),
    // As much as Linux lets a socket's own send buffer grow to (tcp_wmem, 4 MiB): below it a fast stream over a
    // long way would be slower than without a proxy.
    ("stream.ebpf_backlog_size", Default::Text("4m")),
    // The kernel carries what it can from the first byte on, but where that would cost more than it saves.
    ("stream.ebpf_offload_after", Default::Text("auto")),
    // A reload that takes a listener away says that nobody new shall come, not that those who are there shall go:
    // what nginx does too, as long as its old workers may live.
    ("stream.on_reload", Default::Text("keep")),
    // nginx: proxy_protocol off.
    ("stream.proxy_protocol", Default::Flag(false)),
    // nginx: proxy_protocol_timeout 30s.
    ("stream.proxy_protocol_timeout", Default::Text("30s")),
    // nginx: proxy_upload_rate 0, proxy_download_rate 0.
    ("stream.proxy_upload_rate", Default::Number(0)),
    ("stream.proxy_download_rate", Default::Number(0)),
    // nginx: ssl_preread off.
    ("stream.ssl_preread", Default::Flag(false)),
    // nginx: preread_buffer_size 16k.
    ("stream.preread_buffer_size", Default::Text("16k")),
    // nginx: preread_timeout 30s.
    ("stream.preread_timeout", Default::Text("30s")),
    // nginx: off, unless a file says where.
    ("stream.access_log", Default::Text("off")),
];

/// A default as a file would write it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Default {
    /// A string.
    Text(&'static str),
    /// An integer.
    Number(i64),
    /// A boolean.
    Flag(bool),
}

impl From<Default> for config::Value {
    fn from(default: Default) -> Self {
        match default {
            Default::Text(text) => text.into(),
            Default::Number(number) => number.into(),
            Default::Flag(flag) => flag.into(),
        }
    }
}

/// The format of an access log that names none: what nginx's own examples have, and how the session was carried.
pub(super) const LOG_FORMAT: &str = "main";

/// Lines that a worker gathers before they are written, in bytes: nginx's, where it gathers at all. A write for
/// each session would cost more than the line.
pub(super) const LOG_BUFFER_BYTES: usize = 64 << 10;

/// How long a line may wait for others: nobody who follows the file notices a second.
pub(super) const LOG_FLUSH: std::time::Duration = std::time::Duration::from_secs(1);

/// Share of a peer that names none: all equal, as with nginx.
pub(super) const WEIGHT: u32 = 1;

/// Failed attempts that take a peer out, and for how long: nginx's.
pub(super) const MAX_FAILS: u32 = 1;
/// See [`MAX_FAILS`].
pub(super) const FAIL_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// How often a peer is checked, how many results in a row are believed, and how long a check may take: those of nginx's
/// health_check and its timeout.
pub(super) const CHECK_INTERVAL: std::time::Duration = std::time::Duration::from_secs(5);
/// See [`CHECK_INTERVAL`].
pub(super) const CHECK_RISE: u32 = 1;
/// See [`CHECK_INTERVAL`].
pub(super) const CHECK_FALL: u32 = 1;
/// See [`CHECK_INTERVAL`].
pub(super) const CHECK_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// How long a session waits for a place: nginx's.
pub(super) const QUEUE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);
/// How long a lookup may take where nothing is written: nginx's.
pub(super) const RESOLVER_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);
/// For how long a name that is said to have no addresses keeps those that it had: HAProxy's `hold nx`. nginx
/// believes it at once, so that a zone that is empty for a second takes everything down.
pub(super) const RESOLVER_HOLD: std::time::Duration = std::time::Duration::from_secs(30);

/// Length of an accept queue, in connections: nginx's on Linux. The kernel caps it at net.core.somaxconn.
pub(super) const BACKLOG: u32 = 511;
