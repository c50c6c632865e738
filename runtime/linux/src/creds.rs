//! User and group ids of a process with one thread. The kernel keeps them per thread: a threaded caller would change only itself.

use std::io;

use rustix::process::{Gid, Uid};

/// Sets the supplementary groups.
pub fn set_groups(groups: &[u32]) -> io::Result<()> {
    let groups: Vec<Gid> = groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    Ok(rustix::thread::set_thread_groups(&groups)?)
}

/// Sets the real, effective, saved and filesystem group.
pub fn set_gid(gid: u32) -> io::Result<()> {
    let gid = Gid::from_raw(gid);
    Ok(rustix::thread::set_thread_res_gid(gid, gid, gid)?)
}

/// Sets the real, effective, saved and filesystem user. From 0 to another this clears the effective and ambient capabilities, and the
/// permitted ones too unless [`crate::caps::set_keepcaps`].
pub fn set_uid(uid: u32) -> io::Result<()> {
    let uid = Uid::from_raw(uid);
    Ok(rustix::thread::set_thread_res_uid(uid, uid, uid)?)
}

/// Sets groups, group and user, in the order in which each is still allowed.
pub fn set_ids(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    set_groups(groups)?;
    set_gid(gid)?;
    set_uid(uid)
}
