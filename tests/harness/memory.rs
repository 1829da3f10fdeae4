//! What the machine's memory is taken by, as `/proc` shows it. Reads only; the figures are the whole machine's.

/// Bytes that all TCP sockets of the machine are charged for. What no socket is charged for is not in here.
pub fn tcp_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/net/sockstat").expect("reading /proc/net/sockstat");
    let line = text
        .lines()
        .find(|line| line.starts_with("TCP:"))
        .expect("a line for TCP");
    let mut words = line.split_whitespace().skip_while(|word| *word != "mem");
    let pages: u64 = words
        .nth(1)
        .and_then(|word| word.parse().ok())
        .expect("TCP's pages");
    pages * 4096
}

/// Bytes that could be had without swapping.
pub fn available_bytes() -> u64 {
    of_meminfo("MemAvailable:")
}

/// Bytes of the kernel's own small objects, the heads of segments among them, whoever is charged for them.
pub fn slab_bytes() -> u64 {
    of_meminfo("Slab:")
}

/// The largest receive buffer that TCP gives a socket by itself.
pub fn largest_receive_buffer() -> u64 {
    last_number("ipv4/tcp_rmem")
}

/// The largest receive buffer that may be asked for; the kernel doubles it.
pub fn settable_receive_buffer() -> u64 {
    last_number("core/rmem_max")
}

/// The largest send buffer that may be asked for; the kernel doubles it.
pub fn settable_send_buffer() -> u64 {
    last_number("core/wmem_max")
}

fn last_number(name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/sys/net/{name}")).expect(name);
    let last = text.split_whitespace().next_back();
    last.and_then(|number| number.parse().ok()).expect(name)
}

fn of_meminfo(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("reading /proc/meminfo");
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect(key) * 1024
}
