//! HOME for a process whose environment has none: its user's folder by the container's own /etc/passwd, as runc has it.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;

use rustix::fs::{FileType, Mode, OFlags};

/// Longer files are not looked through: who the user is does not depend on it.
const MAX_PASSWD: u64 = 1 << 20;

/// Adds HOME where it is missing. To be called inside the container's root, without any of the machine's descriptors, as the user.
pub(super) fn add_home(env: &mut Vec<CString>, uid: u32) {
    if env.iter().any(|entry| entry.as_bytes().starts_with(b"HOME=")) {
        return;
    }
    let text = read_passwd().unwrap_or_default();
    let home = home_of(&text, uid).unwrap_or(b"/");
    // A line of text holds no NUL, or it is not taken.
    env.extend(CString::new([b"HOME=", home].concat()));
}

/// The container decides what stands there: a pipe must not make us wait, nor a device give without end.
fn read_passwd() -> Option<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(c"/etc/passwd", flags, Mode::empty()).ok()?;
    let stat = rustix::fs::fstat(&fd).ok()?;
    let mut text = Vec::new();
    if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
        File::from(fd).take(MAX_PASSWD).read_to_end(&mut text).ok()?;
    }
    Some(text)
}

fn home_of(text: &[u8], uid: u32) -> Option<&[u8]> {
    text.split(|byte| *byte == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b':').collect();
        let found = std::str::from_utf8(fields.get(2)?).ok()?.parse() == Ok(uid);
        fields.get(5).copied().filter(|home| found && !home.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_is_the_first_that_the_users_id_has() {
        let text =
            b"root:x:0:0:root:/root:/bin/sh\nbroken\nnone:x:5:5::\nweb:x:33:33:www:/var/www:/bin/sh\nagain:x:33:1::/other:\n";
        for (uid, home) in [(0, Some("/root")), (33, Some("/var/www")), (5, None), (7, None)] {
            assert_eq!(home_of(text, uid), home.map(str::as_bytes), "{uid}");
        }
        let mut env = vec![c"A=1".to_owned(), c"HOME=/mine".to_owned()];
        add_home(&mut env, 0);
        assert_eq!(env.len(), 2);
    }
}
