//! The log as runc writes it, because its callers read the last error out of it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{SystemTime, UNIX_EPOCH};

pub(super) struct Log {
    file: Option<File>,
    json: bool,
}

impl Log {
    pub(super) fn new(path: Option<&str>, format: Option<&str>, _debug: bool) -> Result<Self, String> {
        let json = match format {
            None | Some("text") => false,
            Some("json") => true,
            Some(other) => return Err(format!("invalid log-format: {other}")),
        };
        let open = |path| OpenOptions::new().append(true).create(true).mode(0o644).open(path);
        let file = path.map(|path| open(path).map_err(|error| format!("open log {path}: {error}"))).transpose()?;
        Ok(Self { file, json })
    }

    pub(super) fn error(&self, message: &str) {
        self.write("error", message);
    }

    pub(super) fn warn(&self, message: &str) {
        if self.file.is_none() {
            eprintln!("berth oci: warning: {message}");
        }
        self.write("warning", message);
    }

    fn write(&self, level: &str, message: &str) {
        let Some(mut file) = self.file.as_ref() else { return };
        let time = rfc3339(SystemTime::now());
        let line = match self.json {
            true => serde_json::json!({ "level": level, "msg": message, "time": time }).to_string(),
            false => format!("time={time:?} level={level} msg={message:?}"),
        };
        // A log that cannot be written must not hide what it was to say: the caller also prints it.
        let _ = writeln!(file, "{line}");
    }
}

/// A time in UTC, as `2026-11-21T10:01:02.123456789Z`.
pub(super) fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days to a civil date by eras of 400 years that begin on the first of March.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second % 3600 / 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z", since.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_written_in_utc() {
        for (second, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000000000Z"),
            (1_795_255_262, "2026-11-21T10:01:02.000000000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(second)), text);
        }
    }
}
