//! Wall-clock time as nanoseconds and as the texts of log files. UTC only: a static binary has no time zones.

use rustix::time::{ClockId, clock_gettime};

const SECOND: i64 = 1_000_000_000;

/// Unix time in nanoseconds.
pub fn now_ns() -> i64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec * SECOND + now.tv_nsec
}

/// Monotonic time in milliseconds, for deadlines.
pub fn monotonic_ms() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// Year, month, day, hour, minute, second of a unix time in seconds.
fn civil(seconds: i64) -> [u32; 6] {
    let days = seconds.div_euclid(86_400);
    let of_day = seconds.rem_euclid(86_400) as u32;
    // Days since 0000-03-01, in eras of 400 years: leap days fall at the end of such years.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    [year as u32, month as u32, day as u32, of_day / 3600, of_day / 60 % 60, of_day % 60]
}

fn push_digits(out: &mut Vec<u8>, mut value: u32, width: usize) {
    let start = out.len();
    out.resize(start + width, b'0');
    for place in (start..start + width).rev() {
        out[place] = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

/// Appends `2006-01-02T15:04:05.000000000Z`.
pub fn push_rfc3339(out: &mut Vec<u8>, ns: i64) {
    let [year, month, day, hour, minute, second] = civil(ns.div_euclid(SECOND));
    for (value, width, behind) in
        [(year, 4, b'-'), (month, 2, b'-'), (day, 2, b'T'), (hour, 2, b':'), (minute, 2, b':'), (second, 2, b'.')]
    {
        push_digits(out, value, width);
        out.push(behind);
    }
    push_digits(out, ns.rem_euclid(SECOND) as u32, 9);
    out.push(b'Z');
}

/// The kubelet's suffix of a rotated log file: `20060102-150405`.
pub fn rotation_suffix(seconds: i64) -> String {
    let [year, month, day, hour, minute, second] = civil(seconds);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_the_log_format_wants_them() {
        for (ns, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (1, "1970-01-01T00:00:00.000000001Z"),
            (951_827_696 * SECOND + 123_456_789, "2000-02-29T12:34:56.123456789Z"),
            (1_709_251_199 * SECOND + 999_999_999, "2024-02-29T23:59:59.999999999Z"),
            (1_709_251_200 * SECOND, "2024-03-01T00:00:00.000000000Z"),
            (4_102_444_799 * SECOND, "2099-12-31T23:59:59.000000000Z"),
        ] {
            let mut out = Vec::new();
            push_rfc3339(&mut out, ns);
            assert_eq!(String::from_utf8(out).unwrap(), text);
        }
        assert_eq!(rotation_suffix(1_709_251_199), "20240229-235959");
    }
}
