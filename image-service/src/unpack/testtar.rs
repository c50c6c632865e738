//! Writes archives for tests byte by byte, the forbidden ones too.

/// A layer archive under construction.
#[derive(Default)]
pub struct TestTar {
    bytes: Vec<u8>,
    records: Vec<(String, Vec<u8>)>,
    owner: (u32, u32),
    mtime: u64,
}

#[allow(dead_code)]
impl TestTar {
    pub fn new() -> Self {
        TestTar { mtime: 1_700_000_000, ..Default::default() }
    }

    /// Owner of the entries that follow.
    pub fn owned(mut self, uid: u32, gid: u32) -> Self {
        self.owner = (uid, gid);
        self
    }

    /// Time of the entries that follow.
    pub fn at(mut self, mtime: u64) -> Self {
        self.mtime = mtime;
        self
    }

    /// A PAX record for the next entry.
    pub fn pax(mut self, key: &str, value: &[u8]) -> Self {
        self.records.push((key.into(), value.to_vec()));
        self
    }

    pub fn xattr(self, key: &str, value: &[u8]) -> Self {
        self.pax(&format!("SCHILY.xattr.{key}"), value)
    }

    pub fn dir(self, path: &str, mode: u32) -> Self {
        self.entry(path, b'5', mode, "", (0, 0), b"")
    }

    pub fn file(self, path: &str, data: impl AsRef<[u8]>) -> Self {
        self.entry(path, b'0', 0o644, "", (0, 0), data.as_ref())
    }

    pub fn file_mode(self, path: &str, mode: u32, data: impl AsRef<[u8]>) -> Self {
        self.entry(path, b'0', mode, "", (0, 0), data.as_ref())
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(path, b'2', 0o777, target, (0, 0), b"")
    }

    pub fn hard(self, path: &str, target: &str) -> Self {
        self.entry(path, b'1', 0o644, target, (0, 0), b"")
    }

    pub fn fifo(self, path: &str, mode: u32) -> Self {
        self.entry(path, b'6', mode, "", (0, 0), b"")
    }

    pub fn device(self, path: &str, mode: u32, block: bool, major: u32, minor: u32) -> Self {
        self.entry(path, if block { b'4' } else { b'3' }, mode, "", (major, minor), b"")
    }

    pub fn whiteout(self, folder: &str, name: &str) -> Self {
        let slash = if folder.is_empty() { "" } else { "/" };
        self.file(&format!("{folder}{slash}.wh.{name}"), b"")
    }

    pub fn opaque(self, folder: &str) -> Self {
        self.whiteout(folder, ".wh..opq")
    }

    pub fn entry(mut self, path: &str, flag: u8, mode: u32, link: &str, device: (u32, u32), data: &[u8]) -> Self {
        if path.len() > 100 {
            self.records.push(("path".into(), path.into()));
        }
        if link.len() > 100 {
            self.records.push(("linkpath".into(), link.into()));
        }
        let records = std::mem::take(&mut self.records);
        if !records.is_empty() {
            let mut body = Vec::new();
            for (key, value) in &records {
                let rest = key.len() + value.len() + 3;
                let mut length = rest + 1;
                while length != rest + length.to_string().len() {
                    length = rest + length.to_string().len();
                }
                body.extend_from_slice(format!("{length} {key}=").as_bytes());
                body.extend_from_slice(value);
                body.push(b'\n');
            }
            self.raw("PaxHeaders/x", b'x', 0o644, "", (0, 0), &body);
        }
        self.raw(path, flag, mode, link, device, data);
        self
    }

    fn raw(&mut self, path: &str, flag: u8, mode: u32, link: &str, device: (u32, u32), data: &[u8]) {
        let mut block = [0u8; 512];
        let put = |block: &mut [u8; 512], at: usize, text: &[u8]| block[at..at + text.len()].copy_from_slice(text);
        put(&mut block, 0, &path.as_bytes()[..path.len().min(100)]);
        put(&mut block, 100, format!("{mode:07o}").as_bytes());
        put(&mut block, 108, format!("{:07o}", self.owner.0).as_bytes());
        put(&mut block, 116, format!("{:07o}", self.owner.1).as_bytes());
        put(&mut block, 124, format!("{:011o}", data.len()).as_bytes());
        put(&mut block, 136, format!("{:011o}", self.mtime).as_bytes());
        put(&mut block, 148, b"        ");
        block[156] = flag;
        put(&mut block, 157, &link.as_bytes()[..link.len().min(100)]);
        put(&mut block, 257, b"ustar\x0000");
        put(&mut block, 329, format!("{:07o}", device.0).as_bytes());
        put(&mut block, 337, format!("{:07o}", device.1).as_bytes());
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        put(&mut block, 148, format!("{sum:06o}\0").as_bytes());
        self.bytes.extend_from_slice(&block);
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
    }

    /// The archive, ended.
    pub fn build(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        self.bytes
    }
}
