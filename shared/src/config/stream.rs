//! The settings of `[stream]`, and of a server that says something else.

use std::sync::Arc;
use std::time::Duration;

use config::{Map, Value};

use super::check::YEAR;
use super::servers::Servers;
use super::valid::{self, Given};
use super::{
    AccessLog, LimitConn, LimitRate, Network, OffloadAfter, ProxyBind, Rate, Resolver, Rule, TcpCongestion,
    units,
};

/// Two buffers of this size for each relayed session are 128 MiB: enough for any link.
const BUFFER_MAX_BYTES: usize = 64 << 20;

/// Looked at anew with each segment that arrives, so it must not be long. A hello with everything is below 16 KiB.
const PREREAD_MAX_BYTES: usize = 64 << 10;

/// Less than one full segment of the loopback device would pause at each of them.
const BACKLOG_SIZE_MIN_BYTES: usize = 64 << 10;

/// Sequence numbers are compared in 32 bits, signed.
const BACKLOG_SIZE_MAX_BYTES: usize = 1 << 30;

/// More peers than a program can have counters for.
const TRIES_MAX: u32 = 65_535;

/// More often than this, looking at idle sessions would itself be work.
const TIMER_PERIOD_MIN: Duration = Duration::from_millis(10);

/// Less often than this, timeouts would be noticed far too late.
const TIMER_PERIOD_MAX: Duration = Duration::from_secs(3600);

/// Settings of `[stream]` that a server inherits.
#[derive(Clone, Debug, PartialEq)]
pub struct Stream {
    /// Forward in the kernel.
    pub ebpf_enable: bool,
    /// Close a session when no byte moved either way for this long.
    pub proxy_timeout: Duration,
    /// How long connecting to a peer may take.
    pub proxy_connect_timeout: Duration,
    /// Try the next peer when one cannot be connected to.
    pub proxy_next_upstream: bool,
    /// Attempts that one session makes at most; 0: as many as there are peers.
    pub proxy_next_upstream_tries: u32,
    /// After which time no further attempt is begun; 0: no limit.
    pub proxy_next_upstream_timeout: Duration,
    /// User-space copy buffer, in bytes, for each direction.
    pub proxy_buffer_size: usize,
    /// Pass an end of stream on and keep the other direction open.
    pub proxy_half_close: bool,
    /// Set TCP_NODELAY on both sockets.
    pub tcp_nodelay: bool,
    /// The congestion control of both sockets.
    pub tcp_congestion: TcpCongestion,
    /// Ask silent peers whether they are still there (SO_KEEPALIVE).
    pub proxy_socket_keepalive: bool,
    /// Where connections to peers come from.
    pub proxy_bind: ProxyBind,
    /// How often the counters of idle sessions are looked at.
    pub ebpf_timer_period: Duration,
    /// Bytes that may be outstanding towards one side of an offloaded session before the other is held back.
    pub ebpf_backlog_size: u32,
    /// When the kernel takes a session.
    pub ebpf_offload_after: OffloadAfter,
    /// What becomes of a session whose listener or peer is gone after a reload.
    pub on_reload: OnReload,
    /// Send the upstream a PROXY header of this version.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// How long a client may take to send its PROXY header.
    pub proxy_protocol_timeout: Duration,
    /// Whose PROXY headers are believed.
    pub set_real_ip_from: Vec<Network>,
    /// Who may connect.
    pub access: Vec<Rule>,
    /// How many sessions a key may have at once.
    pub limit_conn: Vec<LimitConn>,
    /// How fast the connections of a key may come.
    pub limit_conn_rate: Vec<LimitRate>,
    /// How fast a session's bytes may come from the client.
    pub proxy_upload_rate: Rate,
    /// How fast they may come from the peer.
    pub proxy_download_rate: Rate,
    /// Look at the client's TLS hello before its peer is chosen.
    pub ssl_preread: bool,
    /// How long a TLS hello may be, in bytes.
    pub preread_buffer_size: usize,
    /// How long a client may take to send it.
    pub preread_timeout: Duration,
    /// Who is asked for the addresses of a host name that `proxy_pass` gives a session; `None`: nobody.
    pub resolver: Option<Arc<Resolver>>,
    /// Where a line is written for each ended session; equal ones of a configuration are the same value.
    pub access_log: Option<Arc<AccessLog>>,
}

impl Stream {
    /// Where everything went wrong, an hour and a byte stand in for what `[stream]` would have said.
    pub(super) fn stand_in() -> Stream {
        let hour = Duration::from_secs(3600);
        Stream {
            ebpf_enable: true,
            proxy_timeout: hour,
            proxy_connect_timeout: hour,
            proxy_next_upstream: true,
            proxy_next_upstream_tries: 0,
            proxy_next_upstream_timeout: Duration::ZERO,
            proxy_buffer_size: 1,
            proxy_half_close: true,
            tcp_nodelay: true,
            tcp_congestion: TcpCongestion::System,
            proxy_socket_keepalive: false,
            proxy_bind: ProxyBind::Off,
            ebpf_timer_period: hour,
            ebpf_backlog_size: BACKLOG_SIZE_MIN_BYTES as u32,
            ebpf_offload_after: OffloadAfter::Auto,
            on_reload: OnReload::Keep,
            proxy_protocol: None,
            proxy_protocol_timeout: hour,
            set_real_ip_from: Vec::new(),
            access: Vec::new(),
            limit_conn: Vec::new(),
            limit_conn_rate: Vec::new(),
            proxy_upload_rate: Rate::OFF,
            proxy_download_rate: Rate::OFF,
            ssl_preread: false,
            preread_buffer_size: 1,
            preread_timeout: hour,
            resolver: None,
            access_log: None,
        }
    }
}

/// A version of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

/// What becomes of a session whose listener or peer is gone after a reload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReload {
    /// It goes on until it ends by itself.
    Keep,
    /// It is reset.
    Close,
}

impl OnReload {
    /// All of them, with the words that a file uses.
    pub(crate) const ALL: [(&'static str, OnReload); 2] =
        [("keep", OnReload::Keep), ("close", OnReload::Close)];
}

impl Servers<'_, '_> {
    /// What a table says, and for the rest what it inherits.
    pub(super) fn stream(&mut self, table: &Map<String, Value>, key: &str, inherited: &Stream) -> Stream {
        let millisecond = Duration::from_millis(1);
        let timeout = |given: Given| units::duration(given, millisecond..=YEAR);
        // 0 means: no limit, both as with nginx.
        let limit = |given: Given| units::duration(given, Duration::ZERO..=YEAR);
        let tries = |given: Given| valid::number(given, 0..=TRIES_MAX);
        let period = |given: Given| units::duration(given, TIMER_PERIOD_MIN..=TIMER_PERIOD_MAX);
        let buffer = |given: Given| units::size(given, 1..=BUFFER_MAX_BYTES);
        let backlog = |given: Given| units::size(given, BACKLOG_SIZE_MIN_BYTES..=BACKLOG_SIZE_MAX_BYTES);
        let preread = |given: Given| units::size(given, 1..=PREREAD_MAX_BYTES);
        let (zones, maps) = (self.zones, self.maps);
        let rate = |given: Given| Rate::read(given, maps);
        let check = &mut self.check;
        let Stream {
            ebpf_enable,
            proxy_timeout,
            proxy_connect_timeout,
            proxy_next_upstream,
            proxy_next_upstream_tries,
            proxy_next_upstream_timeout,
            proxy_buffer_size,
            proxy_half_close,
            tcp_nodelay,
            tcp_congestion,
            proxy_socket_keepalive,
            proxy_bind,
            ebpf_timer_period,
            ebpf_backlog_size,
            ebpf_offload_after,
            on_reload,
            proxy_protocol,
            proxy_protocol_timeout,
            ref set_real_ip_from,
            ref access,
            ref limit_conn,
            ref limit_conn_rate,
            ref proxy_upload_rate,
            ref proxy_download_rate,
            ssl_preread,
            preread_buffer_size,
            preread_timeout,
            // What a table says of it counts together with what the other one says: see `Servers::read`.
            resolver: _,
            ref access_log,
        } = *inherited;
        let access_log = self.access_logs.of_table(check, table, key, access_log);
        Stream {
            ebpf_enable: check
                .at(table, key, "ebpf_enable", valid::boolean)
                .unwrap_or(ebpf_enable),
            proxy_timeout: check
                .at(table, key, "proxy_timeout", timeout)
                .unwrap_or(proxy_timeout),
            proxy_connect_timeout: check
                .at(table, key, "proxy_connect_timeout", timeout)
                .unwrap_or(proxy_connect_timeout),
            proxy_next_upstream: check
                .at(table, key, "proxy_next_upstream", valid::boolean)
                .unwrap_or(proxy_next_upstream),
            proxy_next_upstream_tries: check
                .at(table, key, "proxy_next_upstream_tries", tries)
                .unwrap_or(proxy_next_upstream_tries),
            proxy_next_upstream_timeout: check
                .at(table, key, "proxy_next_upstream_timeout", limit)
                .unwrap_or(proxy_next_upstream_timeout),
            proxy_buffer_size: check
                .at(table, key, "proxy_buffer_size", buffer)
                .unwrap_or(proxy_buffer_size),
            proxy_half_close: check
                .at(table, key, "proxy_half_close", valid::boolean)
                .unwrap_or(proxy_half_close),
            tcp_nodelay: check
                .at(table, key, "tcp_nodelay", valid::boolean)
                .unwrap_or(tcp_nodelay),
            tcp_congestion: check
                .at(table, key, "tcp_congestion", TcpCongestion::read)
                .unwrap_or(tcp_congestion),
            proxy_socket_keepalive: check
                .at(table, key, "proxy_socket_keepalive", valid::boolean)
                .unwrap_or(proxy_socket_keepalive),
            proxy_bind: check
                .at(table, key, "proxy_bind", ProxyBind::read)
                .unwrap_or(proxy_bind),
            ebpf_timer_period: check
                .at(table, key, "ebpf_timer_period", period)
                .unwrap_or(ebpf_timer_period),
            ebpf_backlog_size: check
                .at(table, key, "ebpf_backlog_size", backlog)
                .map_or(ebpf_backlog_size, |bytes| bytes as u32),
            ebpf_offload_after: check
                .at(table, key, "ebpf_offload_after", OffloadAfter::read)
                .unwrap_or(ebpf_offload_after),
            on_reload: check
                .at(table, key, "on_reload", valid::on_reload)
                .unwrap_or(on_reload),
            proxy_protocol: check
                .at(table, key, "proxy_protocol", valid::proxy_protocol)
                .unwrap_or(proxy_protocol),
            proxy_protocol_timeout: check
                .at(table, key, "proxy_protocol_timeout", timeout)
                .unwrap_or(proxy_protocol_timeout),
            set_real_ip_from: check
                .list(table, key, "set_real_ip_from", |given| {
                    Network::read(valid::text(given, "\"10.0.0.0/8\"")?)
                })
                .unwrap_or_else(|| set_real_ip_from.clone()),
            access: check
                .list(table, key, "access", |given| {
                    Rule::read(valid::text(given, "\"deny 10.0.0.0/8\"")?)
                })
                .unwrap_or_else(|| access.clone()),
            limit_conn: check
                .limit_conn(table, key, zones)
                .unwrap_or_else(|| limit_conn.clone()),
            limit_conn_rate: check
                .limit_conn_rate(table, key, zones)
                .unwrap_or_else(|| limit_conn_rate.clone()),
            proxy_upload_rate: check
                .at(table, key, "proxy_upload_rate", rate)
                .unwrap_or_else(|| proxy_upload_rate.clone()),
            proxy_download_rate: check
                .at(table, key, "proxy_download_rate", rate)
                .unwrap_or_else(|| proxy_download_rate.clone()),
            ssl_preread: check
                .at(table, key, "ssl_preread", valid::boolean)
                .unwrap_or(ssl_preread),
            preread_buffer_size: check
                .at(table, key, "preread_buffer_size", preread)
                .unwrap_or(preread_buffer_size),
            preread_timeout: check
                .at(table, key, "preread_timeout", timeout)
                .unwrap_or(preread_timeout),
            resolver: None,
            access_log,
        }
    }
}
