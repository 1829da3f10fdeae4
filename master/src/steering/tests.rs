//! On a host made of files, so that no right is needed.

use super::*;
use crate::testing;

/// A host with a loopback device, as a folder; this machine's own addresses lead to it.
struct Host(PathBuf);

const TABLE: &str = "proc/sys/net/core/rps_sock_flow_entries";
const QUEUE: &str = "sys/class/net/lo/queues/rx-0/rps_flow_cnt";

impl Host {
    fn new(name: &str) -> Host {
        let host = Host(std::env::temp_dir().join(format!("culvert-{}-steering-{name}", std::process::id())));
        for (file, content) in [
            (TABLE, "0\n"),
            (QUEUE, "0\n"),
            ("proc/sys/kernel/random/boot_id", "boot\n"),
        ] {
            let path = host.0.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        host
    }

    fn config(&self, flow_steering: FlowSteering) -> Config {
        let mut config = testing::config(&["127.0.0.1:1"], &[("u", &["127.0.0.1:2"])]);
        config.flow_steering = flow_steering;
        config.pid = self.0.join("master.pid");
        config
    }

    fn values(&self) -> (u64, u64) {
        let read = |file| {
            fs::read_to_string(self.0.join(file))
                .unwrap()
                .trim()
                .parse()
                .unwrap()
        };
        (read(TABLE), read(QUEUE))
    }

    fn set(&self, file: &str, value: &str) {
        fs::write(self.0.join(file), value).unwrap();
    }

    fn has_journal(&self) -> bool {
        self.0.join("master.pid.steering").exists()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn values_are_raised_and_put_back_at_the_end() {
    let host = Host::new("raised");
    let steering = Steering::begin_at(&host.0, &host.config(FlowSteering::Rfs));
    assert_eq!(host.values(), (32_768, 32_768));
    assert!(host.has_journal());
    drop(steering);
    assert_eq!(host.values(), (0, 0));
    assert!(!host.has_journal());
}

#[test]
fn a_larger_value_of_the_administrator_stays_and_a_smaller_one_comes_back() {
    let host = Host::new("larger");
    host.set(TABLE, "1048576\n");
    host.set(QUEUE, "2048\n");
    let steering = Steering::begin_at(&host.0, &host.config(FlowSteering::Rfs));
    assert_eq!(host.values(), (1_048_576, 32_768));
    drop(steering);
    assert_eq!(host.values(), (1_048_576, 2048));
}

#[test]
fn a_value_that_the_administrator_changed_meanwhile_is_left_alone() {
    let host = Host::new("meanwhile");
    let steering = Steering::begin_at(&host.0, &host.config(FlowSteering::Rfs));
    host.set(TABLE, "65536\n");
    drop(steering);
    assert_eq!(host.values(), (65_536, 0));
}

#[test]
fn off_changes_nothing_and_a_reload_turns_it_on_grows_it_and_turns_it_off() {
    let host = Host::new("reload");
    let mut steering = Steering::begin_at(&host.0, &host.config(FlowSteering::Off));
    assert_eq!(host.values(), (0, 0));
    steering.apply(&host.config(FlowSteering::Rfs));
    assert_eq!(host.values(), (32_768, 32_768));
    let mut larger = host.config(FlowSteering::Rfs);
    larger.worker_connections = 10_000;
    steering.apply(&larger);
    assert_eq!(host.values(), (131_072, 131_072));
    steering.apply(&host.config(FlowSteering::Rfs));
    assert_eq!(host.values(), (131_072, 131_072));
    steering.apply(&host.config(FlowSteering::Off));
    assert_eq!(host.values(), (0, 0));
    assert!(!host.has_journal());
}

#[test]
fn after_a_crash_the_next_start_takes_over_or_puts_back() {
    let host = Host::new("crash");
    host.set(QUEUE, "512\n");
    for next in [FlowSteering::Rfs, FlowSteering::Off] {
        std::mem::forget(Steering::begin_at(&host.0, &host.config(FlowSteering::Rfs)));
        assert_eq!(host.values(), (32_768, 32_768));
        let steering = Steering::begin_at(&host.0, &host.config(next));
        if next == FlowSteering::Off {
            assert_eq!(host.values(), (0, 512));
        }
        drop(steering);
        assert_eq!(host.values(), (0, 512), "{next:?}");
        assert!(!host.has_journal());
    }
}

#[test]
fn after_a_crash_before_the_change_or_between_two_nothing_is_made_up() {
    let host = Host::new("between");
    std::mem::forget(Steering::begin_at(&host.0, &host.config(FlowSteering::Rfs)));
    // As if it had died with the journal written and one of the two values set.
    host.set(TABLE, "0\n");
    drop(Steering::begin_at(&host.0, &host.config(FlowSteering::Off)));
    assert_eq!(host.values(), (0, 0));
}

#[test]
fn the_journal_of_another_boot_is_not_acted_upon() {
    let host = Host::new("boot");
    std::mem::forget(Steering::begin_at(&host.0, &host.config(FlowSteering::Rfs)));
    host.set("proc/sys/kernel/random/boot_id", "another\n");
    drop(Steering::begin_at(&host.0, &host.config(FlowSteering::Off)));
    assert_eq!(
        host.values(),
        (32_768, 32_768),
        "set by the administrator, as far as this boot knows"
    );
}

#[test]
fn a_failure_half_way_leaves_the_host_as_it_was() {
    let host = Host::new("half");
    host.set(QUEUE, "many\n");
    let steering = Steering::begin_at(&host.0, &host.config(FlowSteering::Rfs));
    assert_eq!(fs::read_to_string(host.0.join(TABLE)).unwrap(), "0\n");
    assert!(!host.has_journal());
    drop(steering);
}

#[test]
fn a_journal_that_cannot_be_written_leaves_no_half_of_one_behind() {
    let host = Host::new("unwritten");
    fs::create_dir(host.0.join("master.pid.steering")).unwrap();
    let steering = Steering::begin_at(&host.0, &host.config(FlowSteering::Rfs));
    assert_eq!(host.values(), (0, 0));
    assert!(!host.0.join("master.pid.steering.new").exists());
    drop(steering);
}

#[test]
fn the_devices_below_a_bond_are_steered_and_those_below_a_bridge_are_not() {
    let host = Host::new("lower");
    let net = host.0.join("sys/class/net");
    for folder in [
        "lo/lower_bond0",
        "bond0/lower_eth0",
        "bond0/lower_br0",
        "br0/lower_veth0",
        "br0/bridge",
    ] {
        fs::create_dir_all(net.join(folder)).unwrap();
    }
    let steering = Steering::begin_at(&host.0, &host.config(FlowSteering::Off));
    let names = steering.with_lower_devices(BTreeSet::from(["lo".to_owned()]));
    assert_eq!(Vec::from_iter(names), ["bond0", "br0", "eth0", "lo"]);
}

#[test]
fn a_new_pid_file_takes_the_journal_along() {
    let host = Host::new("moved");
    let mut steering = Steering::begin_at(&host.0, &host.config(FlowSteering::Rfs));
    let mut moved = host.config(FlowSteering::Rfs);
    moved.pid = host.0.join("other.pid");
    steering.apply(&moved);
    assert!(!host.has_journal() && host.0.join("other.pid.steering").exists());
    drop(steering);
    assert_eq!(host.values(), (0, 0));
}

#[test]
fn a_peer_on_this_host_is_reached_through_loopback() {
    let towards = |peer: &str| address_towards(peer.parse().unwrap());
    assert_eq!(towards("127.0.0.3:80"), Some([127, 0, 0, 1].into()));
}
