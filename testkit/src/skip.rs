//! What a test tells the runner past the harness's capture: that it cannot run here, and what it measured.

use std::io::Write;

/// What the line of a skipped test starts with; `e2e/test.sh` counts these lines.
pub const SKIPPED: &str = "SKIPPED ";

/// What the line of a measurement starts with; `e2e/test.sh` shows these lines.
pub const MEASURED: &str = "MEASURED ";

/// Whether a line is for the runner.
#[must_use]
pub fn is_for_runner(line: &str) -> bool {
    line.starts_with(SKIPPED) || line.starts_with(MEASURED)
}

/// Shows a measurement even when the test passes.
pub fn report_measured(text: &str) {
    write_line(&format!("{MEASURED}{text}"));
}

/// Writes the line of a skipped test to the real standard error. Use [`skip!`](crate::skip).
pub fn report_skip(test: &str, reason: &str) {
    write_line(&format!("{SKIPPED}{test}: {reason}"));
}

/// The macros print! and eprint! are captured while a test passes; a handle of one's own is not.
pub fn write_line(line: &str) {
    // Without a standard error there is nobody to tell.
    let _ = std::io::stderr().write_all(
        format!(
            "
{line}
"
        )
        .as_bytes(),
    );
}

/// Ends the test as skipped, loudly: `skip!("needs cgroup v2")`. The test's function must return `()`.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)*) => {{
        fn here() {}
        $crate::report_skip($crate::sandbox::test_name(here).as_str(), &format!($($reason)*));
        return;
    }};
}
