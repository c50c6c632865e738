//! Files with holes: where the data is, and writing without filling zeroes in.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// The block size in which zeroes become holes.
const BLOCK: usize = 4096;

/// The ranges of a file that hold data. A filesystem without holes answers with one range.
pub fn data_ranges(fd: BorrowedFd<'_>) -> io::Result<Vec<Range<u64>>> {
    let size = rustix::fs::fstat(fd)?.st_size as u64;
    let mut ranges = Vec::new();
    let mut position = 0;
    while position < size {
        let start = match rustix::fs::seek(fd, SeekFrom::Data(position)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(fd, SeekFrom::Hole(start))?.min(size);
        if end <= start {
            break;
        }
        ranges.push(start..end);
        position = end;
    }
    Ok(ranges)
}

/// Writes bytes at an offset of a new file, leaving whole blocks of zeroes out. The caller sets the file's length at the end
/// (ftruncate), since a hole at the end makes no length.
pub fn write_sparse(fd: BorrowedFd<'_>, mut offset: u64, bytes: &[u8]) -> io::Result<()> {
    for block in bytes.chunks(BLOCK) {
        if block.iter().any(|byte| *byte != 0) {
            let mut rest = block;
            let mut at = offset;
            while !rest.is_empty() {
                let written = rustix::io::retry_on_intr(|| rustix::io::pwrite(fd, rest, at))?;
                if written == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                rest = &rest[written..];
                at += written as u64;
            }
        }
        offset += block.len() as u64;
    }
    Ok(())
}
