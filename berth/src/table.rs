//! Plain text tables and ages, in the look of kubectl and crictl. Pure.

use std::time::Duration;

/// Left-aligned columns, three blanks apart; no trailing blanks.
pub fn render(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|h| h.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            text.push_str(cell);
            for _ in cell.chars().count()..width + 3 {
                text.push(' ');
            }
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
        text
    };
    let mut out = line(&mut header.iter().copied());
    for row in rows {
        out.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    out
}

/// An age as kubectl shows it: `42s`, `5m3s`, `3h12m`, `4d`.
pub fn age(elapsed: Duration) -> String {
    let seconds = elapsed.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 if !seconds.is_multiple_of(60) => format!("{minutes}m{}s", seconds % 60),
        120..10_800 => format!("{minutes}m"),
        10_800..28_800 if minutes % 60 != 0 => format!("{hours}h{}m", minutes % 60),
        10_800..172_800 => format!("{hours}h"),
        172_800..691_200 if hours % 24 != 0 => format!("{days}d{}h", hours % 24),
        _ => format!("{days}d"),
    }
}

/// A size in decimal units, as crictl shows it: `3.21MB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit < UNITS.len() - 1 {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = usize::from(value < 100.0) + usize::from(value < 10.0);
    if unit == 0 { format!("{bytes}B") } else { format!("{value:.decimals$}{}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_read_as_kubectls() {
        for (seconds, want) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (303, "5m3s"),
            (3600, "60m"),
            (11_520, "3h12m"),
            (86_400, "24h"),
            (180_000, "2d2h"),
            (900_000, "10d"),
        ] {
            assert_eq!(age(Duration::from_secs(seconds)), want, "{seconds} s");
        }
    }

    #[test]
    fn sizes_are_decimal() {
        assert_eq!(size(999), "999B");
        assert_eq!(size(3_210_000), "3.21MB");
        assert_eq!(size(72_600_000), "72.6MB");
        assert_eq!(size(726_000_000), "726MB");
    }

    #[test]
    fn columns_line_up() {
        let text = render(&["NAME", "AGE"], &[vec!["web".into(), "3s".into()], vec!["longer-name".into(), "10d".into()]]);
        assert_eq!(text, "NAME          AGE\nweb           3s\nlonger-name   10d\n");
    }
}
