//! What the kernel carries: every feature by itself, every two of them on a listener among others, and all that go together, at rest
//! and while workers are replaced. Who carries the bytes is read from the access log's line of each session, and must
//! be what the table in the README says.

mod features;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use self::features::{AROUND, Carrier, FEATURES, Feature, Front, Header, Pass, Peer, Setup};
use crate::harness::hello::hello;
use crate::harness::pattern::fill;
use crate::harness::program::{Running, need};
use crate::harness::{Plan, Port, Proxy, Upstream, connect, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What a client sends in a round: these come back, and then the answer.
const QUESTION: usize = 48 << 10;
const ANSWER: usize = 400 << 10;
const SEED: u64 = 77;

const FORMAT: &str = "$listener $sockmap_to_upstream $sockmap_to_downstream $relay_to_upstream $relay_to_downstream \
                      $datapath $fallback_reason $close_reason";

fn take_header(stream: &mut impl Read, header: Header) -> std::io::Result<()> {
    let mut fixed = [0; 16];
    match header {
        Header::None => {}
        Header::V1 => loop {
            stream.read_exact(&mut fixed[..1])?;
            if fixed[0] == b'\n' {
                break;
            }
        },
        Header::V2 => {
            stream.read_exact(&mut fixed)?;
            let length = u16::from_be_bytes([fixed[14], fixed[15]]);
            stream.read_exact(&mut vec![0; usize::from(length)])?;
        }
    }
    Ok(())
}

/// Takes a header if one is due, then a question at a time.
fn serve(mut stream: impl Read + Write, header: Header) {
    // A check of its health says nothing.
    if take_header(&mut stream, header).is_err() {
        return;
    }
    let mut answer = vec![0; QUESTION + ANSWER];
    fill(SEED, 0, &mut answer[QUESTION..]);
    while stream.read_exact(&mut answer[..QUESTION]).is_ok() {
        if stream.write_all(&answer).is_err() {
            return;
        }
    }
}

/// The servers, one for each way of listening and each header.
struct Servers {
    addresses: HashMap<(Peer, Header), String>,
    _tcp: Vec<Upstream<()>>,
    _unix: Vec<Receiver<()>>,
}

impl Servers {
    fn new(plan: &Plan) -> Servers {
        let mut servers = Servers {
            addresses: HashMap::new(),
            _tcp: Vec::new(),
            _unix: Vec::new(),
        };
        for header in [Header::None, Header::V1, Header::V2] {
            for (peer, ip) in [(Peer::V4, "127.0.0.1"), (Peer::V6, "::1")] {
                let server = Upstream::serve(ip, move |stream| serve(stream, header));
                servers
                    .addresses
                    .insert((peer, header), server.address.to_string());
                servers._tcp.push(server);
            }
            let path = plan.file(&format!("{header:?}.sock"));
            let name = format!("unix:{}", path.display());
            servers.addresses.insert((Peer::Unix, header), name);
            servers
                ._unix
                .push(crate::harness::upstream::unix(&path, move |stream| {
                    serve(stream, header)
                }));
        }
        servers
    }
}

/// dnsmasq, which knows that `one.test` is 127.0.0.1.
fn name_server(port: &Port) -> Running {
    let mut command = Command::new(need("dnsmasq", "dnsmasq-base"));
    command.args([
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
    ]);
    command.args([
        "--bind-interfaces",
        "--listen-address=127.0.0.4",
        "--user=root",
        "--group=root",
    ]);
    command.args([
        "--pid-file=",
        "--local=/test/",
        "--local-ttl=1",
        "--log-facility=-",
    ]);
    command.args([
        "--host-record=one.test,127.0.0.1",
        &format!("--port={}", port.number),
    ]);
    Running::start(command).wait_for(port.on("127.0.0.4"))
}

/// Where clients connect to, and what the access log calls it.
#[derive(Clone, Debug)]
enum Place {
    Tcp(SocketAddr, String),
    Unix(PathBuf),
}

impl Place {
    fn name(&self) -> String {
        match self {
            Place::Tcp(_, name) => name.clone(),
            Place::Unix(path) => format!("unix:{}", path.display()),
        }
    }
}

/// A client's end.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn connect(place: &Place) -> Stream {
        match place {
            Place::Tcp(address, _) => Stream::Tcp(connect(*address)),
            Place::Unix(path) => {
                let stream = UnixStream::connect(path).expect("connecting");
                let _ = stream.set_read_timeout(Some(crate::harness::PATIENCE));
                Stream::Unix(stream)
            }
        }
    }

    fn end(&self) -> std::io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(buffer),
            Stream::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(buffer),
            Stream::Unix(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A proxy with a listener for each setup.
struct Bench {
    proxy: Proxy,
    setups: Vec<(Setup, Place)>,
    http: SocketAddr,
    log: PathBuf,
    _servers: Servers,
    _names: Running,
    _ports: Vec<Port>,
}

impl Bench {
    fn start(setups: Vec<Setup>) -> Bench {
        let plan = Plan::new().lifetime(Duration::from_secs(300));
        let log = plan.file("access.log");
        let servers = Servers::new(&plan);
        // The first takes nothing, the second is not there.
        let (down, dead, http, dns) = (Port::claim(), Port::claim(), Port::claim(), Port::claim());
        let name_server = name_server(&dns);
        let mut groups = String::new();
        let mut names = String::new();
        for (n, setup) in setups.iter().enumerate() {
            let address = &servers.addresses[&(setup.peer, setup.expects)];
            let beside = match setup.many_peers {
                false => String::new(),
                true => format!(
                    "{{ address = \"127.0.0.1:{}\", down = true }}, \
                     {{ address = \"127.0.0.1:{}\", max_fails = 3, fail_timeout = \"1s\" }}, \
                     {{ address = \"{address}\", backup = true }},",
                    down.number, dead.number
                ),
            };
            let _ = write!(
                groups,
                "[[upstream]]\nname = \"group-{n}\"\nbalance = \"{}\"\n\
                 server = [{beside} {{ address = \"{}\", weight = 7, max_conns = 100{} }}]\n{}\n\n",
                setup.balance,
                match setup.by_name {
                    true => address.replace("127.0.0.1", "one.test"),
                    false => address.clone(),
                },
                if setup.by_name { ", resolve = true" } else { "" },
                setup.group.join("\n")
            );
            let _ = writeln!(names, "  \"{} group-{n}\",", name_of(n));
        }
        let tables = format!(
            "[http]\nlisten = \"127.0.0.1:{}\"\n\n[[log_format]]\nname = \"carried\"\nformat = \"{FORMAT}\"\n\n\
             [[limit_conn_zone]]\nname = \"per_client\"\nkey = \"$remote_addr\"\n\n\
             [[map]]\nsource = \"$ssl_preread_server_name\"\nvariable = \"$by_name\"\nvalues = [\n{names}]\n\n\
             [[map]]\nsource = \"$server_port\"\nvariable = \"$host\"\nvalues = [\"default one.test\"]\n\n{groups}",
            http.number
        );
        let log_line = format!(
            "access_log = {{ path = \"{}\", format = \"carried\", flush = \"50ms\" }}",
            log.display()
        );
        let resolver = format!("resolver = \"127.0.0.4:{}\"", dns.number);
        let mut plan = plan.stream(&log_line).stream(&resolver).tables(&tables);
        let mut led = Vec::new();
        let mut ports = vec![down, dead, dns];
        for (n, setup) in setups.into_iter().enumerate() {
            let port = Port::claim();
            let place = match setup.front {
                Front::Ip(ip) => Place::Tcp(port.on(ip), port.on(ip).to_string()),
                Front::Dual => Place::Tcp(port.on("127.0.0.1"), port.on("::").to_string()),
                Front::Unix => Place::Unix(plan.file(&format!("front-{n}.sock"))),
            };
            let front = place.name();
            ports.push(port);
            let pass = match setup.pass {
                Pass::Name => format!("proxy_pass = \"group-{n}\""),
                Pass::Variable => format!("set = {{ to = \"group-{n}\" }}\nproxy_pass = \"$to\""),
                Pass::Hello => "proxy_pass = \"$by_name\"".to_owned(),
                Pass::Host => {
                    let address = &servers.addresses[&(setup.peer, setup.expects)];
                    format!("proxy_pass = \"{}\"", address.replace("127.0.0.1", "$host"))
                }
            };
            plan = plan.tables(&format!(
                "[[server]]\nlisten = {{ address = \"{front}\", {} }}\n{pass}\n{}\n",
                setup.listen.join(", "),
                setup.lines.join("\n")
            ));
            led.push((setup, place));
        }
        let http_at = http.on("127.0.0.1");
        ports.push(http);
        Bench {
            proxy: plan.start(),
            setups: led,
            http: http_at,
            log,
            _servers: servers,
            _names: name_server,
            _ports: ports,
        }
    }

    /// Asks for the metrics.
    fn scrape(&self) {
        let mut stream = connect(self.http);
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .expect("a request");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("the metrics");
        assert!(text.contains("culvert_datapath_bytes_total"), "{text}");
    }

    /// Compares each session's line with what its setup should come to, after so many rounds.
    #[track_caller]
    fn must_be_carried_as_said(&self, rounds: usize) {
        let read = || std::fs::read_to_string(&self.log).unwrap_or_default();
        let came = within(Duration::from_secs(10), || {
            read().lines().count() >= self.setups.len()
        });
        assert!(came, "{} lines are wanted:\n{}", self.setups.len(), read());
        let text = read();
        let lines: HashMap<&str, &str> = text.lines().filter_map(|line| line.split_once(' ')).collect();
        assert_eq!(lines.len(), self.setups.len(), "a line for each session:\n{text}");
        let mut wrong = String::new();
        for (setup, front) in &self.setups {
            let said = lines[front.name().as_str()];
            if let Err(why) = compare(setup, said, rounds) {
                let _ = writeln!(wrong, "{}: {why}: {said}", setup.name);
            }
        }
        assert!(wrong.is_empty(), "of {} sessions:\n{wrong}", self.setups.len());
        let status = self.proxy.status();
        let whole: Vec<Carrier> = self.setups.iter().map(|(setup, _)| setup.carrier).collect();
        for reason in ["not_tcp", "rate_limited"] {
            let wanted = whole.iter().filter(|carrier| carrier.reason() == reason).count() as u64;
            assert_eq!(status.number(&format!("/fallbacks/{reason}")), wanted, "{reason}");
        }
    }
}

/// Whether a line of [`FORMAT`], without its first word, is that of a session of this setup.
fn compare(setup: &Setup, said: &str, rounds: usize) -> Result<(), &'static str> {
    let words: Vec<&str> = said.split(' ').collect();
    let number = |at: usize| words[at].parse::<usize>().unwrap_or(usize::MAX);
    let (kernel, copy) = ([number(0), number(1)], [number(2), number(3)]);
    let all = [rounds * QUESTION, rounds * (QUESTION + ANSWER)];
    // The header that the peer is sent is the proxy's own.
    let header = [
        match setup.expects {
            Header::None => 0..=0,
            Header::V1 => 20..=107,
            Header::V2 => 16..=52,
        },
        0..=0,
    ];
    for (way, header) in header.iter().enumerate() {
        let (carried, own) = match setup.carrier.copied()[way] {
            false => (kernel[way], copy[way]),
            true => (all[way], copy[way].wrapping_sub(all[way])),
        };
        if setup.carrier == Carrier::Late {
            let own = (kernel[way] + copy[way]).wrapping_sub(all[way]);
            if !header.contains(&own) {
                return Err("another number of bytes");
            }
            continue;
        }
        if setup.carrier.copied()[way] && kernel[way] != 0 {
            return Err("the kernel carried what user space should");
        }
        if carried != all[way] {
            return Err("the kernel did not carry all of it");
        }
        if !header.contains(&own) {
            return Err("user space copied another number of bytes");
        }
    }
    if setup.carrier == Carrier::Late && (words[4] != "mixed" || kernel.iter().sum::<usize>() < ANSWER / 2) {
        return Err("the kernel did not take it");
    }
    if words[5] != setup.carrier.reason() {
        return Err("another reason");
    }
    if !setup.closes.contains(&words[6]) {
        return Err("another end");
    }
    Ok(())
}

fn name_of(number: usize) -> String {
    format!("name-{number}.example")
}

/// A client of one of the listeners.
struct Client<'b> {
    stream: Stream,
    setup: &'b Setup,
    question: Vec<u8>,
}

impl Client<'_> {
    fn new(bench: &Bench, number: usize) -> Client<'_> {
        let (setup, front) = &bench.setups[number];
        let mut question = vec![0; QUESTION];
        fill(number as u64, 0, &mut question);
        if setup.pass == Pass::Hello {
            let hello = hello(&name_of(number));
            question[..hello.len()].copy_from_slice(&hello);
        }
        let mut stream = Stream::connect(front);
        stream.write_all(setup.says).expect("the header");
        Client {
            stream,
            setup,
            question,
        }
    }

    /// Asks, and looks at the answer.
    fn round(&mut self) {
        let name = &self.setup.name;
        let failed = |e| panic!("{name}: {e}");
        self.stream.write_all(&self.question).unwrap_or_else(failed);
        let mut got = vec![0; QUESTION + ANSWER];
        let (echo, answer) = got.split_at_mut(QUESTION);
        self.stream.read_exact(echo).unwrap_or_else(failed);
        assert!(echo == self.question, "{name}: the question came back changed");
        if self.setup.ends_early {
            self.stream.end().unwrap_or_else(failed);
        }
        self.stream.read_exact(answer).unwrap_or_else(failed);
        let mut right = vec![0; ANSWER];
        fill(SEED, 0, &mut right);
        assert!(answer == right, "{name}: another answer");
    }

    /// Ends, and sees the end.
    fn end(mut self) {
        if !self.setup.ends_early {
            self.stream.end().expect("the end of the stream");
        }
        let rest = self.stream.read(&mut [0; 1]);
        // Without half close the end of one stream is a reset of the other.
        let reset = self.setup.closes.contains(&"half_closed") && rest.is_err();
        assert!(reset || matches!(rest, Ok(0)), "{}: {rest:?}", self.setup.name);
    }
}

fn go_together(features: &[&Feature]) -> bool {
    let slots: Vec<&str> = features
        .iter()
        .flat_map(|feature| feature.slots)
        .copied()
        .collect();
    slots
        .iter()
        .enumerate()
        .all(|(n, slot)| !slots[..n].contains(slot))
}

/// As many of the features that the kernel carries as go together, in this order.
fn together(order: impl Iterator<Item = &'static Feature>) -> Setup {
    let mut taken: Vec<&Feature> = Vec::new();
    for feature in order.filter(|feature| feature.carrier == Carrier::Kernel) {
        taken.push(feature);
        if !go_together(&taken) {
            taken.pop();
        }
    }
    Setup::with(&taken)
}

fn one_round_each(setups: Vec<Setup>) {
    let bench = Bench::start(setups);
    for number in 0..bench.setups.len() {
        let mut client = Client::new(&bench, number);
        client.round();
        client.end();
        if number == 0 {
            bench.scrape();
        }
    }
    bench.proxy.settle();
    bench.must_be_carried_as_said(1);
}

/// Few sets of features in which each two that go together stand side by side. What copies stands beside features that do
/// not, or what these do would not be seen: so no set has two that copy, unless the two are what it is for.
fn sets() -> Vec<Vec<&'static Feature>> {
    let copies = |feature: &Feature| feature.carrier != Carrier::Kernel;
    let mut open: Vec<[usize; 2]> = (0..FEATURES.len())
        .flat_map(|one| (one + 1..FEATURES.len()).map(move |other| [one, other]))
        .filter(|pair| go_together(&pair.map(|n| &FEATURES[n])))
        .collect();
    let mut sets = Vec::new();
    while let Some(&first) = open.first() {
        let mut set = first.to_vec();
        loop {
            let gain = |n: usize| {
                let news =
                    |pair: &&[usize; 2]| pair.contains(&n) && pair.iter().any(|other| set.contains(other));
                open.iter().filter(news).count()
            };
            let fits = |n: &usize| {
                let with: Vec<&Feature> = set.iter().chain([n]).map(|n| &FEATURES[*n]).collect();
                go_together(&with) && !copies(&FEATURES[*n])
            };
            let best = (0..FEATURES.len())
                .filter(|n| !set.contains(n))
                .filter(fits)
                .max_by_key(|n| gain(*n));
            match best.filter(|n| gain(*n) > 0) {
                Some(n) => set.push(n),
                None => break,
            }
        }
        open.retain(|pair| !pair.iter().all(|n| set.contains(n)));
        sets.push(set.into_iter().map(|n| &FEATURES[n]).collect());
    }
    sets
}

#[test]
fn every_two_features_on_one_listener_are_carried_as_the_readme_says() {
    let sets: Vec<Setup> = sets().iter().map(|set| Setup::with(set)).collect();
    assert!(sets.len() < 100, "{} sets", sets.len());
    // A listener takes a while to start.
    for part in sets.chunks(16) {
        one_round_each(part.to_vec());
    }
}

#[test]
fn all_that_go_together_on_one_listener_are_carried_by_the_kernel() {
    let forwards = together(FEATURES.iter());
    let backwards = together(FEATURES.iter().rev());
    assert!(forwards.name.matches('+').count() >= 9, "{}", forwards.name);
    one_round_each(vec![forwards, backwards]);
}

/// A session of each feature, and of all together, lives through what `happens`.
fn lives_through(happens: impl Fn(&Proxy)) {
    let mut setups = vec![Setup::plain(), together(FEATURES.iter())];
    setups.extend(FEATURES.iter().map(|feature| Setup::with(&[feature])));
    setups.retain(|setup| !setup.ends_early);
    let bench = Bench::start(setups);
    let sessions = bench.setups.len();
    let mut clients: Vec<Client> = (0..sessions).map(|number| Client::new(&bench, number)).collect();
    clients.iter_mut().for_each(Client::round);
    bench.proxy.wait("every session is kept", |s| {
        s.number("/sessions/kept") == sessions as u64
    });
    happens(&bench.proxy);
    bench.proxy.wait("every session is adopted", |s| {
        s.number("/sessions/adopted") == sessions as u64 && s.active() == sessions as u64
    });
    clients.iter_mut().for_each(Client::round);
    clients.into_iter().for_each(Client::end);
    bench.proxy.settle();
    bench.must_be_carried_as_said(2);
}

#[test]
fn a_reload_changes_nothing_of_it() {
    lives_through(|proxy| drop(proxy.reload()));
}

#[test]
fn an_upgrade_changes_nothing_of_it() {
    lives_through(|proxy| proxy.signal(Signal::SIGUSR2));
}

#[test]
fn a_workers_death_changes_nothing_of_it() {
    lives_through(|proxy| kill(Pid::from_raw(proxy.worker()), Signal::SIGKILL).expect("killing the worker"));
}

#[test]
fn the_table_in_the_readme_has_these_features_and_says_the_same_of_them() {
    let readme =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).expect("the README");
    let (_, section) = readme
        .split_once("\n## What the kernel carries\n")
        .expect("the section");
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| "));
    let rows: Vec<Vec<&str>> = rows
        .skip(1)
        .map(|row| row.trim_end_matches('|').split(" |").map(str::trim).collect())
        .collect();
    for feature in FEATURES {
        let [who, counted] = feature.carrier.cells();
        let row = rows.iter().find(|row| row[0] == feature.row);
        let row = row.unwrap_or_else(|| panic!("the README has no row {:?}", feature.row));
        assert_eq!(row[1..], [who, counted], "{:?}", feature.row);
    }
    for around in AROUND {
        assert!(
            rows.iter().any(|row| row[0] == *around),
            "the README has no row {around:?}"
        );
    }
    for row in &rows {
        let known = FEATURES.iter().any(|feature| feature.row == row[0]) || AROUND.contains(&row[0]);
        assert!(known, "no test has the README's row {:?}", row[0]);
    }
}
