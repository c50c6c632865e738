//! Netlink attributes: a writer with nesting and a reader that never leaves its bytes.

/// Marks an attribute that holds attributes.
const NESTED: u16 = 0x8000;
/// The bits of an attribute's type that are its number.
const NUMBER: u16 = 0x3fff;
const HEADER: usize = 4;

fn align(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// Attributes being written.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Attributes(Vec<u8>);

impl Attributes {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn bytes(mut self, number: u16, value: &[u8]) -> Self {
        // Every value that is written here is far shorter than 64 KiB: names, addresses, lists of host ports.
        let length = u16::try_from(HEADER + value.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&number.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(align(self.0.len()), 0);
        self
    }

    /// A string with its terminating zero.
    pub(crate) fn string(self, number: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(number, &bytes)
    }

    pub(crate) fn be32(self, number: u16, value: u32) -> Self {
        self.bytes(number, &value.to_be_bytes())
    }

    pub(crate) fn nest(self, number: u16, inner: Self) -> Self {
        self.bytes(number | NESTED, &inner.0)
    }
}

/// Reads attributes: (number, value). Stops at the first that does not fit.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (header, _) = bytes.split_at_checked(HEADER)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let number = u16::from_ne_bytes([header[2], header[3]]) & NUMBER;
        let value = bytes.get(HEADER..length)?;
        bytes = bytes.get(align(length)..).unwrap_or_default();
        Some((number, value))
    })
}

/// The value of the first attribute with this number.
pub(crate) fn find(bytes: &[u8], number: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(n, value)| (n == number).then_some(value))
}

/// A 32-bit number in the machine's order.
pub(crate) fn as_u32(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.get(..4)?.try_into().ok()?))
}

/// A string without its terminating zero.
pub(crate) fn as_string(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// An address of four or sixteen bytes.
pub(crate) fn as_ip(value: &[u8]) -> Option<std::net::IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(value) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(value).ok().map(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let bytes =
            Attributes::new().string(1, "abc").be32(2, 7).nest(3, Attributes::new().bytes(1, &[9]).bytes(2, &[1, 2, 3, 4, 5])).0;
        let all: Vec<_> = attributes(&bytes).collect();
        assert_eq!(all[0], (1, &b"abc\0"[..]));
        assert_eq!(all[1], (2, &[0, 0, 0, 7][..]));
        assert_eq!(find(all[2].1, 2), Some(&[1, 2, 3, 4, 5][..]));
        assert_eq!(all.len(), 3);
    }

    #[test]
    fn malformed_attributes_end_the_reading() {
        assert_eq!(attributes(&[1, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[255, 0, 1, 0, 1]).count(), 0);
        assert_eq!(attributes(&[4, 0, 1]).count(), 0);
        assert_eq!(attributes(&[5, 0, 1, 0, 42]).collect::<Vec<_>>(), [(1, &[42][..])]);
    }
}
