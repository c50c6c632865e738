//! Signals: the CRI numbers them in its own way, so they are mapped by name.

use berth_cri_api::v1::Signal;

/// The Linux number of a CRI signal; none for RUNTIME_DEFAULT and numbers that the contract does not have.
pub(crate) fn linux_number(cri: i32) -> Option<i32> {
    let signal = Signal::try_from(cri).ok()?;
    parse(signal.as_str_name())
}

/// The Linux number of a signal as images name it: "SIGTERM", "TERM", "15", "RTMIN+3", "SIGRTMINPLUS3".
pub(crate) fn parse(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let upper = text.trim().to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return realtime(rest, &["PLUS", "+"]).map(|n| 34 + n).filter(|n| *n <= 64);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return realtime(rest, &["MINUS", "-"]).map(|n| 64 - n).filter(|n| *n >= 34);
    }
    Some(match name {
        "HUP" => 1,
        "INT" => 2,
        "QUIT" => 3,
        "ILL" => 4,
        "TRAP" => 5,
        "ABRT" | "IOT" => 6,
        "BUS" => 7,
        "FPE" => 8,
        "KILL" => 9,
        "USR1" => 10,
        "SEGV" => 11,
        "USR2" => 12,
        "PIPE" => 13,
        "ALRM" => 14,
        "TERM" => 15,
        "STKFLT" => 16,
        "CHLD" | "CLD" => 17,
        "CONT" => 18,
        "STOP" => 19,
        "TSTP" => 20,
        "TTIN" => 21,
        "TTOU" => 22,
        "URG" => 23,
        "XCPU" => 24,
        "XFSZ" => 25,
        "VTALRM" => 26,
        "PROF" => 27,
        "WINCH" => 28,
        "IO" | "POLL" => 29,
        "PWR" => 30,
        "SYS" => 31,
        _ => return None,
    })
}

fn realtime(rest: &str, separators: &[&str]) -> Option<i32> {
    if rest.is_empty() {
        return Some(0);
    }
    separators.iter().find_map(|s| rest.strip_prefix(s)).and_then(|n| n.parse().ok())
}

/// The CRI number of a Linux signal; 0 where there is none.
pub(crate) fn cri_number(linux: i32) -> i32 {
    (1..=65).find(|n| linux_number(*n) == Some(linux)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_mapped_by_name_and_not_by_number() {
        for (cri, linux) in [(23, 15), (13, 9), (8, 1), (35, 34), (65, 64), (36, 35), (64, 63), (51, 50), (3, 7)] {
            assert_eq!(linux_number(cri), Some(linux), "CRI {cri}");
        }
        assert_eq!(linux_number(0), None);
        assert_eq!(linux_number(999), None);
    }

    #[test]
    fn every_cri_signal_has_a_linux_number_and_comes_back() {
        for cri in 1..=65 {
            let linux = linux_number(cri).unwrap();
            assert_eq!(linux_number(cri_number(linux)), Some(linux), "CRI {cri}");
        }
    }

    #[test]
    fn image_stop_signals_are_read_in_all_their_forms() {
        for (text, want) in [
            ("SIGTERM", Some(15)),
            ("quit", Some(3)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-2", Some(62)),
            ("SIGNOPE", None),
            ("0", None),
        ] {
            assert_eq!(parse(text), want, "{text}");
        }
    }
}
