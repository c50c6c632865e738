//! The program that becomes a container's first process must not be the file on disk: a container could reach it through
//! /proc/self/exe and overwrite it. It is a sealed copy in memory, which nothing can change: of the small program that the caller
//! brings along for this, or of this very program.

use std::borrow::Cow;
use std::ffi::{CString, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;

use berth_linux::memfd::{is_sealed, sealed_memfd};
use berth_linux::process::fexecve;
use rustix::fs::{Mode, OFlags};

use super::{Global, INIT_PROGRAM};

/// Goes on only as a sealed copy: executes that with the same arguments when this is not it yet.
pub(super) fn run_from_sealed_copy(global: &Global) -> Result<(), String> {
    let exe = rustix::fs::open("/proc/self/exe", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| format!("open /proc/self/exe: {errno}"))?;
    if is_sealed(exe.as_fd()) {
        return Ok(());
    }
    let bytes = match global.init_program {
        Some(program) => Cow::from(program),
        None => Cow::from(std::fs::read("/proc/self/exe").map_err(|error| format!("read /proc/self/exe: {error}"))?),
    };
    let copy = sealed_memfd("berth-oci", &bytes, true).map_err(|error| format!("make a sealed copy of this program: {error}"))?;
    drop(bytes);
    let c_string = |text: OsString| CString::new(text.into_vec()).unwrap_or_default();
    let argv: Vec<CString> = match global.init_program {
        Some(_) => [INIT_PROGRAM.into()].into_iter().chain(global.words.iter().map(OsString::from)).map(c_string).collect(),
        None => std::env::args_os().map(c_string).collect(),
    };
    let envp: Vec<CString> = std::env::vars_os()
        .map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            c_string(name)
        })
        .collect();
    Err(format!("execute the sealed copy of this program: {}", fexecve(copy.as_fd(), &argv, &envp)))
}
