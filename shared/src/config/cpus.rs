//! `worker_cpu_affinity`: nginx's bit masks and CPU lists. Reads and writes sets of CPUs, asks no machine.
//!
//! An entry of only the digits 0 and 1, two or more of them, is a bit mask whose rightmost digit is CPU 0.
//! Anything else is a list of CPUs and ranges; so `"0"` and `"1"` are the CPUs 0 and 1. Bare numbers beside
//! masks (`["9", "10"]`, `["1", "10"]`) would be taken in one way or the other by surprise: they are refused.

use std::collections::BTreeSet;

use super::diagnostic::Fault;

/// Far above any kernel's NR_CPUS (8192): keeps a range like 0-4000000000 from filling memory.
const CPU_LIMIT: usize = 65_536;

/// What is said to every wrong entry.
pub(super) const REMEDY: &str =
    "allowed: \"auto\", a bit mask such as \"0101\" (rightmost digit: CPU 0), or a list such as \"0-3,8\"";

/// The CPUs of one entry, ascending, never empty.
pub(super) fn entry(text: &str, online: &[usize]) -> Result<Vec<usize>, Fault> {
    let cpus = if is_mask(text) {
        parse_mask(text)
    } else {
        parse_list(text).ok_or_else(|| wrong(text))?
    };
    if cpus.is_empty() {
        return Err(Fault::new("selects no CPU", REMEDY));
    }
    match cpus.iter().find(|cpu| !online.contains(cpu)) {
        None => Ok(cpus),
        Some(absent) => Err(Fault::new(
            format!("CPU {absent} does not exist or is offline"),
            "allowed: the CPUs in /sys/devices/system/cpu/online",
        )),
    }
}

fn wrong(text: &str) -> Fault {
    let what = if text.starts_with("auto") {
        "\"auto\" stands alone"
    } else {
        "neither a mask nor a list of CPUs"
    };
    Fault::new(what, REMEDY)
}

/// Whether masks and bare numbers stand side by side, so that one of them means something else than it seems.
pub(super) fn is_ambiguous(entries: &[&str]) -> bool {
    let bare = |text: &&str| !is_mask(text) && !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    entries.iter().any(|text| is_mask(text)) && entries.iter().any(bare)
}

/// The fault of ambiguous entries.
pub(super) fn ambiguous() -> Fault {
    Fault::new(
        "bit masks beside bare CPU numbers",
        "write every entry as a mask (\"0010\"), or the numbers as ranges (\"10-10\")",
    )
}

fn is_mask(text: &str) -> bool {
    text.len() >= 2 && text.bytes().all(|b| matches!(b, b'0' | b'1'))
}

fn parse_mask(text: &str) -> Vec<usize> {
    text.bytes()
        .rev()
        .enumerate()
        .filter(|(_, bit)| *bit == b'1')
        .map(|(cpu, _)| cpu)
        .collect()
}

/// A list such as `0-3,8`, as the kernel writes it too.
pub(super) fn parse_list(text: &str) -> Option<Vec<usize>> {
    let number = |text: &str| {
        let text = text.trim();
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        text.parse::<usize>()
            .ok()
            .filter(|&cpu| digits && cpu < CPU_LIMIT)
    };
    let mut cpus = BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus.into_iter().collect())
}

/// Writes a set so that no entry can be taken for a mask: `0-3,8-8`.
pub(super) fn write_list(cpus: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &cpu in cpus {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => runs.push((cpu, cpu)),
        }
    }
    let runs: Vec<String> = runs
        .iter()
        .map(|(first, last)| format!("{first}-{last}"))
        .collect();
    runs.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONLINE: &[usize] = &[0, 1, 2, 3, 8, 10];

    #[test]
    fn two_or_more_binary_digits_are_a_mask_with_cpu_0_on_the_right() {
        assert_eq!(entry("0001", ONLINE), Ok(vec![0]));
        assert_eq!(entry("0101", ONLINE), Ok(vec![0, 2]));
        assert_eq!(entry("10", ONLINE), Ok(vec![1]));
    }

    #[test]
    fn a_single_digit_is_a_cpu() {
        assert_eq!(entry("0", ONLINE), Ok(vec![0]));
        assert_eq!(entry("1", ONLINE), Ok(vec![1]));
    }

    #[test]
    fn lists_hold_cpus_and_ranges_in_any_order() {
        assert_eq!(entry("0-3,8", ONLINE), Ok(vec![0, 1, 2, 3, 8]));
        assert_eq!(entry("8, 2-3,2", ONLINE), Ok(vec![2, 3, 8]));
        assert_eq!(entry("10-10", ONLINE), Ok(vec![10]));
    }

    #[test]
    fn wrong_entries_say_why() {
        assert_eq!(
            entry("0000", ONLINE).map_err(|f| f.what),
            Err("selects no CPU".to_owned())
        );
        assert_eq!(
            entry("3-1", ONLINE).map_err(|f| f.what),
            Err("neither a mask nor a list of CPUs".to_owned())
        );
        assert_eq!(
            entry("", ONLINE).map_err(|f| f.what),
            Err("neither a mask nor a list of CPUs".to_owned())
        );
        assert_eq!(
            entry("+1", ONLINE).map_err(|f| f.what),
            Err("neither a mask nor a list of CPUs".to_owned())
        );
        assert_eq!(
            entry("0-4000000000", ONLINE).map_err(|f| f.what),
            Err("neither a mask nor a list of CPUs".to_owned())
        );
        assert_eq!(
            entry("auto 01", ONLINE).map_err(|f| f.what),
            Err("\"auto\" stands alone".to_owned())
        );
        assert_eq!(
            entry("0,4", ONLINE).map_err(|f| f.what),
            Err("CPU 4 does not exist or is offline".to_owned())
        );
        assert_eq!(
            entry("1000000", ONLINE).map_err(|f| f.what),
            Err("CPU 6 does not exist or is offline".to_owned())
        );
    }

    #[test]
    fn bare_numbers_beside_masks_are_ambiguous() {
        assert!(is_ambiguous(&["9", "10"]));
        assert!(is_ambiguous(&["1", "10"]));
        assert!(!is_ambiguous(&["01", "10"]));
        assert!(!is_ambiguous(&["0", "1", "2"]));
        assert!(!is_ambiguous(&["9-9", "10"]));
    }

    #[test]
    fn a_written_list_is_never_a_mask() {
        assert_eq!(write_list(&[0, 1, 2, 3, 8]), "0-3,8-8");
        assert_eq!(write_list(&[10]), "10-10");
    }
}
