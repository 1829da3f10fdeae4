//! `ebpf_offload_after`: how much of a session is copied before the kernel takes it.

use std::fmt;

use super::diagnostic::Fault;
use super::units;
use super::valid::Given;

/// The largest number of bytes.
const MAX_BYTES: usize = 1 << 30;

/// When the kernel takes a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OffloadAfter {
    /// At once, unless most sessions of its listener are short and they come fast.
    Auto,
    /// When it has moved so many bytes, both ways together; 0: at once.
    Bytes(u64),
}

impl OffloadAfter {
    pub(super) fn read(given: Given) -> Result<OffloadAfter, Fault> {
        if given.str() == Some("auto") {
            return Ok(OffloadAfter::Auto);
        }
        let bytes = units::size(given, 0..=MAX_BYTES);
        bytes
            .map(|bytes| OffloadAfter::Bytes(bytes as u64))
            .map_err(|fault| Fault {
                remedy: format!("{}, or \"auto\"", fault.remedy),
                ..fault
            })
    }
}

impl fmt::Display for OffloadAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OffloadAfter::Auto => f.write_str("auto"),
            OffloadAfter::Bytes(bytes) => f.write_str(&units::write_size(*bytes as usize)),
        }
    }
}
