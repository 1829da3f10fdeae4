//! What is to be changed on the host, and the journal of what was. Pure: reads and writes nothing.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;

/// The kernel's documentation gives this many entries to a moderately loaded server (scaling.rst). They take
/// 128 KiB.
const TABLE_MIN: u64 = 32_768;
/// 16 MiB. The kernel allows 2^29.
const TABLE_MAX: u64 = 1 << 22;
/// Entries for each flow. An entry belongs to the flow that wrote it last, so the more there are, the rarer
/// two sessions that push each other out.
const ENTRIES_PER_FLOW: u64 = 4;

/// A setting of the host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Knob {
    /// net.core.rps_sock_flow_entries: the table in which a flow's CPU is left; one for the whole host.
    FlowTable,
    /// rps_flow_cnt of a receive queue: which CPU each flow of the queue is sent to now.
    Queue {
        /// The network device.
        device: String,
        /// Such as `rx-0`.
        queue: String,
    },
}

impl Knob {
    /// Where it is, from the root of the file system.
    pub fn path(&self) -> PathBuf {
        match self {
            Knob::FlowTable => "proc/sys/net/core/rps_sock_flow_entries".into(),
            Knob::Queue { device, queue } => {
                format!("sys/class/net/{device}/queues/{queue}/rps_flow_cnt").into()
            }
        }
    }

    fn parse(text: &str) -> Option<Knob> {
        if text == FLOW_TABLE {
            return Some(Knob::FlowTable);
        }
        let (device, queue) = text.split_once('/')?;
        let number = queue.strip_prefix("rx-")?;
        // It becomes part of a path that root writes to.
        let is_name = !device.is_empty() && !device.starts_with('.');
        let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        (is_name && is_number).then(|| Knob::Queue {
            device: device.to_owned(),
            queue: queue.to_owned(),
        })
    }
}

const FLOW_TABLE: &str = "rps_sock_flow_entries";

impl std::fmt::Display for Knob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Knob::FlowTable => f.write_str(FLOW_TABLE),
            Knob::Queue { device, queue } => write!(f, "{device}/{queue}"),
        }
    }
}

/// A setting that was found with one value and given another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The setting.
    pub knob: Knob,
    /// What it was.
    pub found: u64,
    /// What it was made.
    pub set: u64,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} to {}", self.knob, self.found, self.set)
    }
}

/// The journal as text: on which host it was written (boot and network namespace), then the changes in
/// their order. A setting may be there more than once, and is put back in the opposite order.
pub fn write_journal(host: &str, changes: &[Change]) -> String {
    let lines = changes.iter().map(|change| {
        let Change { knob, found, set } = change;
        format!("{knob} {found} {set}\n")
    });
    std::iter::once(format!("{host}\n")).chain(lines).collect()
}

/// The host and the changes of a journal; `None`: that is no journal.
pub fn read_journal(text: &str) -> Option<(&str, Vec<Change>)> {
    let mut lines = text.lines();
    let host = lines.next()?;
    let change = |line: &str| {
        let mut words = line.split(' ');
        let change = Change {
            knob: Knob::parse(words.next()?)?,
            found: words.next()?.parse().ok()?,
            set: words.next()?.parse().ok()?,
        };
        words.next().is_none().then_some(change)
    };
    let changes: Option<Vec<Change>> = lines.map(change).collect();
    Some((host, changes?))
}

/// A network device.
#[derive(Clone, Debug, Default)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// It is up.
    pub is_up: bool,
    /// It is the loopback device.
    pub is_loopback: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// The devices through which the packets of these local addresses come: all that are up for a wildcard,
/// otherwise those that have the address.
pub fn carriers(local: &[IpAddr], devices: &[Device]) -> BTreeSet<String> {
    let carries = |device: &&Device, address: &IpAddr| {
        if address.is_unspecified() {
            device.is_up
        } else {
            // All of 127.0.0.0/8 is loopback, though the device has but one address of it.
            device.addresses.contains(address) || (device.is_loopback && address.is_loopback())
        }
    };
    local
        .iter()
        .flat_map(|address| devices.iter().filter(move |device| carries(device, address)))
        .map(|device| device.name.clone())
        .collect()
}

/// The values that `flows` flows need, with the receive queues of each device. The kernel rounds up to
/// powers of two; these are.
pub fn wanted(flows: u64, devices: &[(String, Vec<String>)]) -> Vec<(Knob, u64)> {
    let entries = (ENTRIES_PER_FLOW * flows)
        .clamp(TABLE_MIN, TABLE_MAX)
        .next_power_of_two();
    let mut wanted = vec![(Knob::FlowTable, entries)];
    for (device, queues) in devices {
        // As the kernel's documentation has it: what all flows need, shared by the queues.
        let each = (entries / queues.len().max(1) as u64).next_power_of_two();
        wanted.extend(queues.iter().map(|queue| {
            let knob = Knob::Queue {
                device: device.clone(),
                queue: queue.clone(),
            };
            (knob, each)
        }));
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(device: &str, queue: &str) -> Knob {
        Knob::Queue {
            device: device.into(),
            queue: queue.into(),
        }
    }

    #[test]
    fn a_journal_is_read_as_it_was_written() {
        let change = |knob, found, set| Change { knob, found, set };
        let changes = vec![
            change(Knob::FlowTable, 0, 32_768),
            change(queue("eth0.7", "rx-12"), 4096, 8192),
            change(Knob::FlowTable, 32_768, 65_536),
        ];
        let text = write_journal("boot net", &changes);
        assert_eq!(read_journal(&text), Some(("boot net", changes)));
        assert_eq!(read_journal("boot net\n"), Some(("boot net", Vec::new())));
    }

    #[test]
    fn what_is_no_journal_changes_nothing() {
        for line in [
            "",
            "lo/rx-0 0",
            "lo/rx-0 0 1 2",
            "lo/rx-0 0 -1",
            "lo 0 1",
            "lo/tx-0 0 1",
            "lo/rx- 0 1",
            "../rx-0 0 1",
            "lo/rx-0/../x 0 1",
            "/rx-0 0 1",
        ] {
            assert_eq!(read_journal(&format!("host\n{line}\n")), None, "{line:?}");
        }
        assert_eq!(read_journal(""), None);
    }

    #[test]
    fn a_wildcard_is_carried_by_every_device_that_is_up_and_an_address_by_its_own() {
        let device = |name: &str, is_up, addresses: &[&str]| Device {
            name: name.into(),
            is_up,
            is_loopback: name == "lo",
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        };
        let devices = [
            device("lo", true, &["127.0.0.1", "::1"]),
            device("eth0", true, &["192.0.2.1", "2001:db8::1"]),
            device("eth1", true, &["198.51.100.1"]),
            device("eth2", false, &[]),
        ];
        for (local, expected) in [
            (&["0.0.0.0"][..], &["eth0", "eth1", "lo"][..]),
            (&["::"], &["eth0", "eth1", "lo"]),
            (&["192.0.2.1"], &["eth0"]),
            (&["2001:db8::1", "198.51.100.1"], &["eth0", "eth1"]),
            (&["127.0.0.7"], &["lo"]),
            (&["::1"], &["lo"]),
            (&["203.0.113.9"], &[]),
            (&[], &[]),
        ] {
            let local: Vec<IpAddr> = local.iter().map(|text| text.parse().unwrap()).collect();
            let found: Vec<String> = carriers(&local, &devices).into_iter().collect();
            assert_eq!(found, expected, "{local:?}");
        }
    }

    #[test]
    fn tables_hold_the_flows_several_times_over_and_stay_within_bounds() {
        let devices = [
            (
                "eth0".to_owned(),
                vec!["rx-0".to_owned(), "rx-1".to_owned(), "rx-2".to_owned()],
            ),
            ("lo".to_owned(), vec!["rx-0".to_owned()]),
        ];
        let sizes = |flows| wanted(flows, &devices).into_iter().map(|(_, size)| size);
        assert_eq!(
            sizes(1).collect::<Vec<_>>(),
            [32_768, 16_384, 16_384, 16_384, 32_768]
        );
        assert_eq!(sizes(20_000).next(), Some(131_072));
        assert_eq!(sizes(u64::from(u32::MAX)).next(), Some(TABLE_MAX));
        assert!(sizes(77_777).all(u64::is_power_of_two));
        assert_eq!(wanted(1, &devices)[3].0, queue("eth0", "rx-2"));
    }
}
