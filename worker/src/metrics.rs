//! The metrics in Prometheus' text format: everything that is counted, with labels that the configuration bounds.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use culvert_shared::counters::{CloseReason, FallbackReason, HISTOGRAM_US, Histogram};
use culvert_shared::ids::Direction;
use culvert_shared::members::NameState;
use culvert_shared::peers::{Failures, Former};

use crate::balance::{Group, Health};
use crate::clock;
use crate::event_loop::Worker;

/// Text in the making.
struct Page(String);

impl Page {
    /// Begins a metric; its samples follow.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (at, (label, text)) in labels.iter().enumerate() {
            self.0.push(if at == 0 { '{' } else { ',' });
            let text = text
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            let _ = write!(self.0, "{label}=\"{text}\"");
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    /// A metric with one sample.
    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.family(name, "histogram", help);
        let bucket = format!("{name}_bucket");
        let mut below = 0;
        for (limit_us, count) in HISTOGRAM_US.iter().zip(&histogram.buckets) {
            below += load(count);
            let limit = (*limit_us as f64 / 1e6).to_string();
            self.sample(&bucket, &[("le", &limit)], below);
        }
        let all = below + histogram.buckets.last().map_or(0, load);
        self.sample(&bucket, &[("le", "+Inf")], all);
        self.sample(&format!("{name}_sum"), &[], load(&histogram.sum_us) as f64 / 1e6);
        self.sample(&format!("{name}_count"), &[], all);
    }
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Relaxed)
}

/// Why a connection is not let in.
const REJECTIONS: [CloseReason; 4] = [
    CloseReason::Denied,
    CloseReason::LimitConn,
    CloseReason::LimitRate,
    CloseReason::BadRequest,
];

const COUNTER: &str = "counter";
const GAUGE: &str = "gauge";

impl Worker {
    /// The whole page.
    pub(crate) fn metrics(&self) -> String {
        let mut page = Page(String::with_capacity(16 << 10));
        self.program_metrics(&mut page);
        self.worker_metrics(&mut page);
        self.session_metrics(&mut page);
        self.datapath_metrics(&mut page);
        self.listener_metrics(&mut page);
        self.upstream_metrics(&mut page);
        self.name_metrics(&mut page);
        self.host_metrics(&mut page);
        page.0
    }

    fn program_metrics(&self, page: &mut Page) {
        let board = &self.board[0];
        page.family("culvert_build_info", GAUGE, "The program's version; always 1.");
        page.sample("culvert_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
        let started = load(&board.started_unix_ms) as f64 / 1000.0;
        page.one(
            "culvert_start_time_seconds",
            GAUGE,
            "When the program started, Unix time.",
            started,
        );
        let generation = load(&board.generation);
        page.one(
            "culvert_config_generation",
            GAUGE,
            "The configuration's generation: 1 at start.",
            generation,
        );
        let name = "culvert_config_reloads_total";
        page.family(name, COUNTER, "Reloads of the configuration.");
        page.sample(name, &[("result", "succeeded")], load(&board.reloads_succeeded));
        page.sample(name, &[("result", "failed")], load(&board.reloads_failed));
        let good = 1 - load(&board.last_reload_failed).min(1);
        let help = "Whether the last reload succeeded; 1 before the first one.";
        page.one("culvert_config_last_reload_successful", GAUGE, help, good);
        let at = load(&board.last_reload_unix_ms).max(load(&board.started_unix_ms)) as f64 / 1000.0;
        let help = "When the configuration was last loaded with success, Unix time.";
        page.one("culvert_config_last_reload_timestamp_seconds", GAUGE, help, at);
        let name = "culvert_log_dropped_total";
        page.family(name, COUNTER, "Log lines that were dropped.");
        page.sample(name, &[("log", "error")], load(&board.log_lines_dropped));
        page.sample(name, &[("log", "access")], load(&board.access_lines_dropped));
        let written = load(&board.access_lines_written);
        page.one(
            "culvert_access_log_lines_total",
            COUNTER,
            "Lines of access logs that were written.",
            written,
        );
    }

    fn worker_metrics(&self, page: &mut Page) {
        let board = &self.board[0];
        let live = || board.live_workers().map(|(_, row)| row);
        let draining = live().filter(|row| row.draining.load(Relaxed) != 0).count();
        let ready = live()
            .filter(|row| row.draining.load(Relaxed) == 0 && row.ready.load(Relaxed) != 0)
            .count();
        let starting = live().count() - draining - ready;
        page.family("culvert_workers", GAUGE, "Worker processes.");
        for (state, count) in [("ready", ready), ("draining", draining), ("starting", starting)] {
            page.sample("culvert_workers", &[("state", state)], count);
        }
        let restarts = load(&board.worker_restarts);
        page.one(
            "culvert_worker_restarts_total",
            COUNTER,
            "Workers that died and were replaced.",
            restarts,
        );
        // A slot may have an old worker and a new one.
        let mut slots: BTreeMap<u32, [u64; 3]> = BTreeMap::new();
        for row in live() {
            let of_slot = slots.entry(row.slot.load(Relaxed)).or_default();
            of_slot[0] += u64::from(row.sessions.load(Relaxed));
            of_slot[1] += 2 * u64::from(row.pairs.load(Relaxed));
            // They share the slot's map.
            of_slot[2] = of_slot[2].max(2 * u64::from(row.pairs_total.load(Relaxed)));
        }
        page.family(
            "culvert_worker_sessions",
            GAUGE,
            "Open sessions of a worker slot.",
        );
        for (slot, [sessions, ..]) in &slots {
            page.sample(
                "culvert_worker_sessions",
                &[("worker", &slot.to_string())],
                sessions,
            );
        }
        page.family(
            "culvert_sockmap_slots",
            GAUGE,
            "Places in the sockmap of a worker slot.",
        );
        for (slot, [_, used, all]) in &slots {
            let slot = slot.to_string();
            for (state, count) in [("used", *used), ("free", all.saturating_sub(*used))] {
                page.sample(
                    "culvert_sockmap_slots",
                    &[("worker", &slot), ("state", state)],
                    count,
                );
            }
        }
    }

    fn session_metrics(&self, page: &mut Page) {
        let board = &self.board[0];
        let now_ms = clock::now_ms();
        let (active, offloaded) = (board.active(now_ms), board.offloaded(now_ms));
        page.one(
            "culvert_sessions_begun_total",
            COUNTER,
            "Sessions accepted.",
            load(&board.sessions),
        );
        let help = "Sessions that entered the kernel.";
        page.one(
            "culvert_sessions_offloaded_total",
            COUNTER,
            help,
            load(&board.sessions_offloaded),
        );
        let help = "Sessions that were copied at first because they might be short (ebpf_offload_after).";
        page.one(
            "culvert_sessions_copied_first_total",
            COUNTER,
            help,
            load(&board.sessions_copied_first),
        );
        page.family(
            "culvert_sessions_active",
            GAUGE,
            "Open sessions, by who carries their bytes.",
        );
        page.sample("culvert_sessions_active", &[("path", "sockmap")], offloaded);
        let relayed = active.saturating_sub(offloaded);
        page.sample("culvert_sessions_active", &[("path", "relay")], relayed);
        let help = "Open sessions that would outlive their worker.";
        page.one("culvert_sessions_kept", GAUGE, help, load(&board.kept));
        let help = "Sessions that end with their worker because the master did not get their sockets.";
        page.one(
            "culvert_sessions_unkept_total",
            COUNTER,
            help,
            load(&board.unkept),
        );
        let help = "Sessions that a worker took over from another one.";
        page.one(
            "culvert_sessions_adopted_total",
            COUNTER,
            help,
            load(&board.adopted),
        );
        self.closes(page);
        let help = "How long sessions lasted that have ended.";
        page.histogram("culvert_session_duration_seconds", help, &board.session_duration);
        let help = "How long connecting to a peer took, where it succeeded.";
        page.histogram(
            "culvert_upstream_connect_duration_seconds",
            help,
            &board.connect_duration,
        );
    }

    /// Most listeners know few of the reasons: what has never happened there has no sample.
    fn closes(&self, page: &mut Page) {
        let board = &self.board[0];
        let listeners = self.listener_rows();
        let name = "culvert_sessions_total";
        let help = "Ended sessions, by why they ended; of those whose worker died the listener is not known.";
        page.family(name, COUNTER, help);
        for reason in CloseReason::ALL {
            let reason_label = ("close_reason", reason.name());
            if *reason == CloseReason::WorkerDied {
                let count = load(&board.closes[*reason as usize]);
                page.sample(name, &[("listener", ""), reason_label], count);
                continue;
            }
            for (listener, row) in &listeners {
                let count = load(&board.listeners[*row].closes[*reason as usize]);
                if count > 0 {
                    page.sample(name, &[("listener", listener), reason_label], count);
                }
            }
        }
        let name = "culvert_listener_connections_rejected_total";
        page.family(
            name,
            COUNTER,
            "Connections that were not let in, among the ended sessions.",
        );
        for (listener, row) in &listeners {
            for reason in REJECTIONS {
                let count = load(&board.listeners[*row].closes[reason as usize]);
                page.sample(name, &[("listener", listener), ("reason", reason.name())], count);
            }
        }
    }

    /// The listeners of the present generation, with their rows.
    fn listener_rows(&self) -> Vec<(String, usize)> {
        let rows = self.rows.iter().zip(&self.addresses);
        rows.map(|((row, _), address)| (address.to_string(), *row))
            .collect()
    }

    fn datapath_metrics(&self, page: &mut Page) {
        let board = &self.board[0];
        let there = u8::from(self.wards[0].store.maps.is_some());
        page.one(
            "culvert_datapath_sockmap",
            GAUGE,
            "Whether sessions can be forwarded in the kernel.",
            there,
        );
        let name = "culvert_datapath_bytes_total";
        page.family(name, COUNTER, "Bytes carried, those of open sessions included.");
        for way in Direction::BOTH {
            let kernel = self
                .totals
                .as_ref()
                .map_or(0, |totals| totals.forwarded_bytes(way));
            let copied = load(&board.relay_bytes[way.index()]);
            for (path, bytes) in [("sockmap", kernel), ("relay", copied)] {
                page.sample(name, &[("path", path), ("direction", way.name())], bytes);
            }
        }
        let name = "culvert_datapath_cpu_bytes_total";
        page.family(name, COUNTER, "Bytes that the kernel forwarded, by CPU.");
        for (cpu, bytes) in self.totals.iter().flat_map(|totals| totals.by_cpu()) {
            for way in Direction::BOTH {
                let cpu = cpu.to_string();
                page.sample(
                    name,
                    &[("cpu", &cpu), ("direction", way.name())],
                    bytes[way.index()],
                );
            }
        }
        let name = "culvert_datapath_fallbacks_total";
        page.family(
            name,
            COUNTER,
            "Sessions that should be forwarded in the kernel and are copied.",
        );
        for (reason, count) in FallbackReason::ALL.iter().zip(&board.fallbacks) {
            page.sample(name, &[("reason", reason.name())], load(count));
        }
        let help = "Times that a source was held back for its reader.";
        page.one(
            "culvert_datapath_pauses_total",
            COUNTER,
            help,
            self.totals.as_ref().map_or(0, |totals| totals.pauses()),
        );
        let help =
            "Times that a direction was copied for a while, most often because small pieces came too fast.";
        page.one(
            "culvert_datapath_gathers_total",
            COUNTER,
            help,
            load(&self.board[0].gathers),
        );
    }

    fn listener_metrics(&self, page: &mut Page) {
        let board = &self.board[0];
        let listeners = self.listener_rows();
        let mut all = |name: &str, kind, help, value: &dyn Fn(usize) -> u64| {
            page.family(name, kind, help);
            for (listener, row) in &listeners {
                page.sample(name, &[("listener", listener)], value(*row));
            }
        };
        let rows = &board.listeners;
        let name = "culvert_listener_connections_accepted_total";
        all(name, COUNTER, "Connections accepted.", &|row| {
            load(&rows[row].accepted)
        });
        let name = "culvert_listener_connections_active";
        all(name, GAUGE, "Open sessions.", &|row| {
            board.listener_active(row, clock::now_ms())
        });
        let name = "culvert_listener_received_bytes_total";
        let help = "Bytes from clients, over ended sessions.";
        all(name, COUNTER, help, &|row| load(&rows[row].bytes[0]));
        let name = "culvert_listener_sent_bytes_total";
        all(name, COUNTER, "Bytes to clients, over ended sessions.", &|row| {
            load(&rows[row].bytes[1])
        });
    }

    fn upstream_metrics(&self, page: &mut Page) {
        let (board, now_ms) = (&self.board[0], clock::now_ms());
        // An address may stand twice in a group; a sample may not. Peers whose names do not stand for them any more are
        // shown as long as they have rows; after that they count in the upstream's sum of those that are gone.
        let mut peers: BTreeMap<(&str, String), Vec<usize>> = BTreeMap::new();
        for (upstream, group) in self.config.upstreams.iter().zip(&self.groups) {
            let members = group.members().iter().map(|peer| (&peer.address, peer.row));
            let former = group.former().iter().map(|(address, row)| (address, *row));
            for (address, row) in members.chain(former) {
                let of_peer = peers.entry((&upstream.name, address.to_string())).or_default();
                of_peer.push(row);
            }
        }
        let named = self.config.upstreams.iter().zip(&self.group_rows);
        let named: Vec<(&str, &Former)> = named
            .filter(|(upstream, _)| !upstream.names.is_empty())
            .map(|(upstream, row)| (upstream.name.as_str(), &board.groups[*row].former))
            .collect();
        type Gone<'a> = Option<&'a dyn Fn(&Former) -> u64>;
        let mut all = |name: &str, kind, help, value: &dyn Fn(usize) -> u64, gone: Gone<'_>| {
            page.family(name, kind, help);
            for ((upstream, peer), rows) in &peers {
                let sum: u64 = rows.iter().map(|row| value(*row)).sum();
                page.sample(name, &[("upstream", upstream), ("peer", peer)], sum);
            }
            let Some(gone) = gone else { return };
            for (upstream, former) in &named {
                page.sample(name, &[("upstream", upstream), ("peer", "gone")], gone(former));
            }
        };
        let rows = &board.peers;
        let name = "culvert_upstream_connections_total";
        let help = "Connections established.";
        let gone = |gone: &Former| load(&gone.connected);
        all(
            name,
            COUNTER,
            help,
            &|row| load(&rows[row].connected),
            Some(&gone),
        );
        let name = "culvert_upstream_checks_passed_total";
        let value = |row: usize| load(&rows[row].check.passed);
        let help = "Health checks that passed.";
        all(
            name,
            COUNTER,
            help,
            &value,
            Some(&|gone| load(&gone.checks_passed)),
        );
        let name = "culvert_upstream_checks_failed_total";
        let value = |row: usize| load(&rows[row].check.failed);
        let help = "Health checks that failed.";
        all(
            name,
            COUNTER,
            help,
            &value,
            Some(&|gone| load(&gone.checks_failed)),
        );
        let name = "culvert_upstream_sessions_active";
        let value = |row: usize| board.peer_active(row, now_ms);
        all(name, GAUGE, "Open sessions.", &value, None);
        let name = "culvert_upstream_sent_bytes_total";
        let help = "Bytes to peers, over ended sessions.";
        let value = |row: usize| load(&rows[row].bytes[0]);
        all(name, COUNTER, help, &value, Some(&|gone| load(&gone.bytes[0])));
        let name = "culvert_upstream_received_bytes_total";
        let help = "Bytes from peers, over ended sessions.";
        let value = |row: usize| load(&rows[row].bytes[1]);
        all(name, COUNTER, help, &value, Some(&|gone| load(&gone.bytes[1])));
        let name = "culvert_upstream_connect_failures_total";
        page.family(name, COUNTER, "Attempts to connect that failed.");
        let mut failed = |upstream: &str, peer: &str, of: &[&Failures]| {
            let sum = |value: fn(&Failures) -> &AtomicU64| {
                of.iter().map(|failures| load(value(failures))).sum::<u64>()
            };
            for (reason, count) in [
                ("timeout", sum(|of| &of.timeouts)),
                ("error", sum(|of| &of.errors)),
            ] {
                page.sample(
                    name,
                    &[("upstream", upstream), ("peer", peer), ("reason", reason)],
                    count,
                );
            }
        };
        for ((upstream, peer), of_peer) in &peers {
            let failures: Vec<&Failures> = of_peer.iter().map(|row| &rows[*row].connect_failures).collect();
            failed(upstream, peer, &failures);
        }
        for (upstream, former) in &named {
            failed(upstream, "gone", &[&former.connect_failures]);
        }
        let name = "culvert_upstream_peer_up";
        page.family(name, GAUGE, "Whether the peer takes sessions.");
        for ((upstream, peer), rows) in &peers {
            let up = rows.iter().any(|row| self.is_peer_up(*row));
            page.sample(name, &[("upstream", upstream), ("peer", peer)], u8::from(up));
        }
        self.queue_metrics(page);
    }

    fn is_peer_up(&self, row: usize) -> bool {
        let scene = self.scene();
        let is_up = |group: &Group| {
            group
                .index_of(row)
                .is_some_and(|index| group.health(&scene, index) == Health::Up)
        };
        self.groups.iter().any(is_up)
    }

    fn queue_metrics(&self, page: &mut Page) {
        let board = &self.board[0];
        let groups = self.config.upstreams.iter().zip(&self.group_rows);
        let queues: Vec<(&str, usize)> = groups.map(|(group, row)| (group.name.as_str(), *row)).collect();
        let mut all = |name: &str, kind, help, value: &dyn Fn(usize) -> u64| {
            page.family(name, kind, help);
            for (upstream, row) in &queues {
                page.sample(name, &[("upstream", upstream)], value(*row));
            }
        };
        let counters = |row: usize| &board.groups[row].queue;
        let name = "culvert_upstream_queue_waiting";
        all(name, GAUGE, "Sessions that wait for a place.", &|row| {
            board.waiting(row)
        });
        let name = "culvert_upstream_queued_total";
        all(name, COUNTER, "Sessions that had to wait for a place.", &|row| {
            load(&counters(row).queued)
        });
        let name = "culvert_upstream_queue_timeouts_total";
        all(name, COUNTER, "Sessions that found no place in time.", &|row| {
            load(&counters(row).timed_out)
        });
        let name = "culvert_upstream_queue_overflows_total";
        all(name, COUNTER, "Sessions that found the queue full.", &|row| {
            load(&counters(row).overflowed)
        });
    }

    fn host_metrics(&self, page: &mut Page) {
        let hosts = &self.board[0].hosts;
        for (name, help, counter) in [
            (
                "culvert_host_sessions_total",
                "Sessions that proxy_pass led to a host by its name.",
                &hosts.sessions,
            ),
            (
                "culvert_host_sessions_remembered_total",
                "Those of them for which the answer was known.",
                &hosts.remembered,
            ),
            (
                "culvert_host_lookups_total",
                "Hosts that name servers were asked for.",
                &hosts.lookups,
            ),
            (
                "culvert_host_lookup_failures_total",
                "Those of them that brought no address.",
                &hosts.failed,
            ),
            (
                "culvert_host_lookups_refused_total",
                "Hosts that were not asked for because too many others were.",
                &hosts.refused,
            ),
        ] {
            page.one(name, COUNTER, help, load(counter));
        }
    }

    fn name_metrics(&self, page: &mut Page) {
        let upstreams = self.config.upstreams.iter().zip(self.members.iter());
        // A name may stand twice in a group; a sample may not.
        let mut states: BTreeMap<(&str, String), NameState> = BTreeMap::new();
        for (upstream, set) in upstreams {
            for (index, named) in upstream.names.iter().enumerate() {
                states.insert((&upstream.name, named.to_string()), set.state(index));
            }
        }
        if states.is_empty() {
            return;
        }
        let mut all = |name: &str, kind, help, value: &dyn Fn(&NameState) -> f64| {
            page.family(name, kind, help);
            for ((upstream, named), state) in &states {
                page.sample(name, &[("upstream", upstream), ("name", named)], value(state));
            }
        };
        let name = "culvert_name_lookups_total";
        let help = "Lookups of a name that ended, one way or the other.";
        all(name, COUNTER, help, &|state| state.lookups as f64);
        let name = "culvert_name_lookup_failures_total";
        all(name, COUNTER, "Lookups of a name that failed.", &|state| {
            state.failures as f64
        });
        let name = "culvert_name_last_lookup_timestamp_seconds";
        let help = "When a lookup of a name last ended; 0: none has yet.";
        all(name, GAUGE, help, &|state| state.last_lookup_unix_ms as f64 / 1e3);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_values_are_escaped() {
        let mut page = Page(String::new());
        page.sample("m", &[("a", "x\"\\\ny"), ("b", "")], 7);
        page.sample("m", &[], 0.5);
        assert_eq!(page.0, "m{a=\"x\\\"\\\\\\ny\",b=\"\"} 7\nm 0.5\n");
    }
}
