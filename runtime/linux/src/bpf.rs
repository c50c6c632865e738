//! The bpf system call, for device programs of cgroup v2. What a program says is made elsewhere.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use crate::syscall::{check, check_fd};

/// One instruction of eBPF, as the kernel takes it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BpfInsn {
    /// Operation.
    pub code: u8,
    /// Destination register (low four bits) and source register.
    pub registers: u8,
    /// Jump or memory offset.
    pub offset: i16,
    /// Constant.
    pub imm: i32,
}

impl BpfInsn {
    /// An instruction from its parts.
    #[must_use]
    pub fn new(code: u8, dst: u8, src: u8, offset: i16, imm: i32) -> Self {
        Self { code, registers: (dst & 0xf) | (src << 4), offset, imm }
    }

    /// The destination register.
    #[must_use]
    pub fn dst(&self) -> u8 {
        self.registers & 0xf
    }

    /// The source register.
    #[must_use]
    pub fn src(&self) -> u8 {
        self.registers >> 4
    }
}

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_DETACH: libc::c_long = 9;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;
/// The most programs a cgroup can have (`BPF_CGROUP_MAX_PROGS`).
const MAX_PROGRAMS: usize = 64;

#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

#[repr(C)]
#[derive(Default)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    padding: u32,
}

#[repr(C)]
#[derive(Default)]
struct IdAttr {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

/// # Safety
/// `T` must be the layout that the kernel has for this command, and what its pointers point to must be valid for it.
unsafe fn bpf<T>(command: libc::c_long, attr: &mut T) -> libc::c_long {
    // SAFETY: the size is that of the structure; the rest is this function's condition.
    unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_mut(attr), size_of::<T>()) }
}

/// Loads a program that decides about device accesses. The verifier's words are part of the error.
pub fn load_device_program(instructions: &[BpfInsn]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let mut attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(instructions.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        insns: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        prog_name: *b"berth_devices\0\0\0",
        ..LoadAttr::default()
    };
    // SAFETY: LoadAttr is the beginning of the kernel's structure for this command; instructions and licence outlive the call.
    let first = check_fd(unsafe { bpf(BPF_PROG_LOAD, &mut attr) });
    let Err(error) = first else { return first };
    // Once more, for the verifier's log.
    let mut log = vec![0u8; 16 * 1024];
    attr.log_level = 1;
    attr.log_size = log.len() as u32;
    attr.log_buf = log.as_mut_ptr() as u64;
    // SAFETY: as above; the log buffer has the size given and outlives the call.
    if let Ok(fd) = check_fd(unsafe { bpf(BPF_PROG_LOAD, &mut attr) }) {
        return Ok(fd);
    }
    let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
    match String::from_utf8_lossy(&log[..end]).trim() {
        "" => Err(error),
        text => Err(io::Error::new(error.kind(), format!("{error}: {text}"))),
    }
}

/// Makes the program the only device program that decides for a cgroup (of those attached to it directly). The cgroup is never
/// without one in between.
pub fn replace_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let old = device_programs(cgroup)?;
    match old.as_slice() {
        [one] => match attach(cgroup, program, Some(std::os::fd::AsFd::as_fd(one))) {
            // A kernel before 5.6, or a program attached in another mode: add, then remove.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            result => return result,
        },
        [] => return attach(cgroup, program, None),
        _ => {}
    }
    attach(cgroup, program, None)?;
    for old in &old {
        detach(cgroup, std::os::fd::AsFd::as_fd(old))?;
    }
    Ok(())
}

/// Attaches a device program to a cgroup (next to others, all of which must allow), or in the place of one.
pub fn attach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>, replace: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut attr = AttachAttr {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
        replace_bpf_fd: 0,
    };
    if let Some(replace) = replace {
        attr.attach_flags |= BPF_F_REPLACE;
        attr.replace_bpf_fd = replace.as_raw_fd() as u32;
    }
    // SAFETY: AttachAttr is the beginning of the kernel's structure for this command; numbers only.
    check(unsafe { bpf(BPF_PROG_ATTACH, &mut attr) })?;
    Ok(())
}

fn detach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = AttachAttr {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        ..AttachAttr::default()
    };
    // SAFETY: as in `attach`.
    check(unsafe { bpf(BPF_PROG_DETACH, &mut attr) })?;
    Ok(())
}

/// The device programs attached to a cgroup directly.
pub fn device_programs(cgroup: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
    let mut ids = [0u32; MAX_PROGRAMS];
    let mut attr = QueryAttr {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: MAX_PROGRAMS as u32,
        ..QueryAttr::default()
    };
    // SAFETY: QueryAttr is the beginning of the kernel's structure for this command; the id array has the length given.
    check(unsafe { bpf(BPF_PROG_QUERY, &mut attr) })?;
    let mut programs = Vec::new();
    for id in ids.iter().take(attr.prog_cnt as usize) {
        let mut attr = IdAttr { id: *id, ..IdAttr::default() };
        // SAFETY: IdAttr is the beginning of the kernel's structure for this command; numbers only.
        match check_fd(unsafe { bpf(BPF_PROG_GET_FD_BY_ID, &mut attr) }) {
            Ok(fd) => programs.push(fd),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(programs)
}
