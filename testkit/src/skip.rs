//! Skipping loudly: a test that cannot run here says so past the harness's capture, and the runner counts it.

use std::io::Write;

/// What the line of a skipped test starts with; `e2e/test.sh` counts these lines.
pub const SKIPPED: &str = "SKIPPED ";

/// Writes the line of a skipped test to the real standard error. Use [`skip!`](crate::skip).
pub fn report_skip(test: &str, reason: &str) {
    // The macros print! and eprint! are captured while a test passes; a handle of one's own is not.
    let line = format!("\n{SKIPPED}{test}: {reason}\n");
    // Without a standard error there is nobody to tell.
    let _ = std::io::stderr().write_all(line.as_bytes());
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
