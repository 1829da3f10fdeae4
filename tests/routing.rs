//! Which upstream a session goes to: groups, weights, `set` and `$variables`.

use std::io::Read;

use crate::harness::pattern::{fill, ping};
use crate::harness::{Plan, Port, Upstream, connect, send};

/// A server that greets with eight bytes of its own.
fn greeter(seed: u64) -> Upstream<std::io::Result<()>> {
    Upstream::serve("127.0.0.1", move |mut stream| send(&mut stream, seed, 0, 8))
}

/// Connects, and tells whether the greeter of `seed` answered.
fn is_greeted_by(front: std::net::SocketAddr, seed: u64) -> bool {
    let (mut greeting, mut expected) = ([0u8; 8], [0u8; 8]);
    connect(front).read_exact(&mut greeting).expect("a greeting");
    fill(seed, 0, &mut expected);
    greeting == expected
}

#[test]
fn a_server_in_a_group_is_passed_over_when_it_refuses() {
    let nobody = Port::claim();
    let upstream = Upstream::echo("127.0.0.1");
    let group = format!(
        "[[upstream]]\nname = \"group\"\nserver = [{{ address = \"{}\" }}, {{ address = \"{}\" }}]\n",
        nobody.on("127.0.0.1"),
        upstream.address
    );
    let mut plan = Plan::new().tables(&group);
    let front = plan.server("group");
    let proxy = plan.start();
    for seed in 0..20 {
        ping(&mut connect(front), seed, 2).expect("an answer from the server that lives");
    }
    proxy.settle();
}

#[test]
fn weights_share_the_sessions_out_in_their_proportion() {
    let (one, two) = (greeter(1), greeter(2));
    let group = format!(
        "[[upstream]]\nname = \"group\"\nbalance = \"round_robin\"\nserver = [\n  \
         {{ address = \"{}\", weight = 3 }},\n  {{ address = \"{}\" }},\n]\n",
        one.address, two.address
    );
    let mut plan = Plan::new().tables(&group);
    let front = plan.server_with("127.0.0.1", "$where", "set = { where = \"group\" }");
    let proxy = plan.start();
    let first = (0..40).filter(|_| is_greeted_by(front, 1)).count();
    assert_eq!(
        first, 30,
        "of 40 sessions the server of weight 3 beside weight 1 gets 30"
    );
    proxy.settle();
}

#[test]
fn each_server_resolves_the_variable_that_it_sets_itself() {
    let (one, two) = (greeter(1), greeter(2));
    let groups = format!(
        "[[upstream]]\nname = \"first\"\nserver = [{{ address = \"{}\" }}]\n\n\
         [[upstream]]\nname = \"second\"\nserver = [{{ address = \"{}\" }}]\n",
        one.address, two.address
    );
    let mut plan = Plan::new().tables(&groups);
    let to_first = plan.server_with("127.0.0.1", "$where", "set = { where = \"first\" }");
    let to_second = plan.server_with("127.0.0.1", "$where", "set = { where = \"second\" }");
    let proxy = plan.start();
    for _ in 0..5 {
        assert!(
            is_greeted_by(to_first, 1),
            "the first server's variable names the first group"
        );
        assert!(
            is_greeted_by(to_second, 2),
            "the second server's variable names the second group"
        );
    }
    proxy.settle();
}

#[test]
fn a_server_listens_on_every_address_of_its_list() {
    let upstream = greeter(1);
    let (one, two) = (Port::claim(), Port::claim());
    let (v4, v6) = (one.on("127.0.0.1"), two.on("::1"));
    let server = format!(
        "[[server]]\nlisten = [\"{v4}\", \"{v6}\"]\nproxy_pass = \"{}\"\n",
        upstream.address
    );
    let proxy = Plan::new().tables(&server).start();
    assert!(is_greeted_by(v4, 1) && is_greeted_by(v6, 1));
    proxy.settle();
}
