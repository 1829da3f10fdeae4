//! The local time. The time zone is read once for a process, by its first call: workers inherit it from the
//! master, because they cannot open its file.

use nix::libc;

/// A second in the local time zone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalTime {
    /// The year.
    pub year: i32,
    /// The month, 1 to 12.
    pub month: u8,
    /// The day of the month, from 1.
    pub day: u8,
    /// The hour.
    pub hour: u8,
    /// The minute.
    pub minute: u8,
    /// The second; 60 is a leap second.
    pub second: u8,
    /// Minutes east of UTC.
    pub offset_minutes: i32,
}

/// The local time of a Unix time in seconds; the epoch for one that no calendar holds.
pub fn local_time(unix_seconds: i64) -> LocalTime {
    // SAFETY: `tm` is plain numbers and a pointer that is not followed; all zeros is a valid value.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    let seconds: libc::time_t = unix_seconds;
    // SAFETY: both pointers are to values that live across the call.
    unsafe { libc::localtime_r(&seconds, &mut tm) };
    LocalTime {
        year: tm.tm_year + 1900,
        month: tm.tm_mon as u8 + 1,
        day: tm.tm_mday.max(1) as u8,
        hour: tm.tm_hour as u8,
        minute: tm.tm_min as u8,
        second: tm.tm_sec as u8,
        offset_minutes: (tm.tm_gmtoff / 60) as i32,
    }
}
