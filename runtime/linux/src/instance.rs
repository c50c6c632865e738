//! The mark of one berth among several on a machine: in the names of everything it makes.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Six lower-case hexadecimal digits, from the absolute path of the state folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(u32);

impl InstanceId {
    /// The id of the instance with this state folder. The path should be absolute; trailing slashes, doubled slashes and `.` do not count.
    #[must_use]
    pub fn of_state_dir(path: &Path) -> Self {
        // FNV-1a, 64 bits, folded to 24. Nothing here is secret; it must only stay the same for ever.
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        for component in path.components() {
            for byte in component.as_os_str().as_bytes().iter().chain(b"/") {
                hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        Self(((hash ^ (hash >> 24) ^ (hash >> 48)) & 0xff_ffff) as u32)
    }

    /// Reads the six digits back.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.len() == 6 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if digits { u32::from_str_radix(text, 16).ok().map(Self) } else { None }
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:06x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_is_the_same_for_every_spelling_of_a_path_and_for_ever() {
        let id = InstanceId::of_state_dir(Path::new("/run/berth"));
        assert_eq!(id, InstanceId::of_state_dir(Path::new("/run//berth/")));
        assert_ne!(id, InstanceId::of_state_dir(Path::new("/run/berth2")));
        assert_eq!(InstanceId::parse(&id.to_string()), Some(id));
        assert_eq!(InstanceId::parse("00000G"), None);
        assert_eq!(InstanceId::parse("+12345"), None);
    }
}
