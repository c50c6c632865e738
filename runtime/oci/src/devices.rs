//! Devices that every container may use, for those who make its control group.

use berth_cgroup::DeviceRule;

/// Devices that every container may use, whatever its rules say: (type, major, minor, access); no number means any.
const DEFAULT_RULES: [(&str, Option<i64>, Option<i64>, &str); 10] = [
    ("c", None, None, "m"),
    ("b", None, None, "m"),
    ("c", Some(1), Some(3), "rwm"),
    ("c", Some(1), Some(8), "rwm"),
    ("c", Some(1), Some(7), "rwm"),
    ("c", Some(5), Some(0), "rwm"),
    ("c", Some(1), Some(5), "rwm"),
    ("c", Some(1), Some(9), "rwm"),
    ("c", Some(136), None, "rwm"),
    ("c", Some(5), Some(2), "rwm"),
];

/// The rules of the default devices, to be appended to a spec's own when it has any.
#[must_use]
pub fn default_device_rules() -> Vec<DeviceRule> {
    DEFAULT_RULES
        .iter()
        .map(|(kind, major, minor, access)| DeviceRule {
            allow: true,
            kind: Some((*kind).to_owned()),
            major: *major,
            minor: *minor,
            access: Some((*access).to_owned()),
        })
        .collect()
}
