//! Exit records: one small file per ended container, on tmpfs, complete or not there.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use berth_shim::protocol::ExitRecord;
use rustix::fs::{AtFlags, Mode, OFlags};

/// The folder of the records.
#[derive(Debug)]
pub struct ExitRecords {
    folder: OwnedFd,
}

impl ExitRecords {
    /// Opens the folder, which must exist.
    pub fn open(folder: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { folder: rustix::fs::open(folder, flags, Mode::empty())? })
    }

    /// Puts a record under its name in one step.
    pub fn write(&self, id: &str, record: &ExitRecord) -> io::Result<()> {
        let bytes = serde_json::to_vec(record)?;
        let draft = format!(".{id}.exit");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(&self.folder, &draft, flags, Mode::from_raw_mode(0o600))?;
        let written = rustix::io::retry_on_intr(|| rustix::io::write(&file, &bytes))?;
        if written != bytes.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(rustix::fs::renameat(&self.folder, &draft, &self.folder, format!("{id}.exit"))?)
    }

    /// Removes a record, if there is one.
    pub fn remove(&self, id: &str) {
        let _ = rustix::fs::unlinkat(&self.folder, format!("{id}.exit"), AtFlags::empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_appears_whole_and_goes() {
        let folder = tempfile::tempdir().unwrap();
        let records = ExitRecords::open(folder.path()).unwrap();
        let record = ExitRecord {
            pid: 7,
            code: 137,
            signal: 9,
            oom: true,
            started_at_ns: 1,
            finished_at_ns: 2,
            start_error: String::new(),
        };
        records.write("c1", &record).unwrap();
        records.write("c1", &record).unwrap();
        let text = std::fs::read(folder.path().join("c1.exit")).unwrap();
        assert_eq!(serde_json::from_slice::<ExitRecord>(&text).unwrap(), record);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        records.remove("c1");
        records.remove("c1");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
