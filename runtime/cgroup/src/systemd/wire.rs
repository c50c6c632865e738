//! The D-Bus wire format, as far as systemd's manager needs it: method calls are written, replies and signals are read. Pure: it does no
//! input and output, and trusts no length that it reads.

use super::Failure;

/// The longest message that is read: far above any reply to the calls that are made here.
pub(super) const MAX_MESSAGE: usize = 16 << 20;
/// The fixed part of a header.
pub(super) const FIXED: usize = 16;

/// A value inside a property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Text(String),
    Bool(bool),
    Count(u64),
    Pids(Vec<u32>),
    Bytes(Vec<u8>),
    Pairs(Vec<(String, String)>),
}

impl Value {
    fn signature(&self) -> &'static str {
        match self {
            Self::Text(_) => "s",
            Self::Bool(_) => "b",
            Self::Count(_) => "t",
            Self::Pids(_) => "au",
            Self::Bytes(_) => "ay",
            Self::Pairs(_) => "a(ss)",
        }
    }
}

/// A property of a unit.
pub(super) type Property = (&'static str, Value);

/// The arguments of a call, in their order. Little endian.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    signature: String,
    bytes: Vec<u8>,
}

fn pad(bytes: &mut Vec<u8>, to: usize) {
    bytes.resize(bytes.len().next_multiple_of(to), 0);
}

fn put_u32(bytes: &mut Vec<u8>, value: u32) {
    pad(bytes, 4);
    bytes.extend(value.to_le_bytes());
}

/// Lengths are 32 bits wide; what is written here is far shorter.
fn put_length(bytes: &mut Vec<u8>, length: usize) {
    put_u32(bytes, u32::try_from(length).unwrap_or(u32::MAX));
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    put_length(bytes, text.len());
    bytes.extend(text.as_bytes());
    bytes.push(0);
}

fn put_signature(bytes: &mut Vec<u8>, signature: &str) {
    bytes.push(signature.len() as u8);
    bytes.extend(signature.as_bytes());
    bytes.push(0);
}

/// An array: its length in bytes (without the padding before the first element), then the elements.
fn put_array(bytes: &mut Vec<u8>, alignment: usize, elements: impl FnOnce(&mut Vec<u8>)) {
    put_u32(bytes, 0);
    let length_at = bytes.len() - 4;
    pad(bytes, alignment);
    let begin = bytes.len();
    elements(bytes);
    let length = u32::try_from(bytes.len() - begin).unwrap_or(u32::MAX);
    bytes[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
}

fn put_value(bytes: &mut Vec<u8>, value: &Value) {
    put_signature(bytes, value.signature());
    match value {
        Value::Text(text) => put_text(bytes, text),
        Value::Bool(value) => put_u32(bytes, u32::from(*value)),
        Value::Count(value) => {
            pad(bytes, 8);
            bytes.extend(value.to_le_bytes());
        }
        Value::Pids(pids) => put_array(bytes, 4, |bytes| pids.iter().for_each(|pid| put_u32(bytes, *pid))),
        Value::Bytes(value) => put_array(bytes, 1, |bytes| bytes.extend(value)),
        Value::Pairs(pairs) => put_array(bytes, 8, |bytes| {
            for (one, other) in pairs {
                pad(bytes, 8);
                put_text(bytes, one);
                put_text(bytes, other);
            }
        }),
    }
}

impl Arguments {
    pub(super) fn text(mut self, text: &str) -> Self {
        self.signature.push('s');
        put_text(&mut self.bytes, text);
        self
    }

    pub(super) fn bool(mut self, value: bool) -> Self {
        self.signature.push('b');
        put_u32(&mut self.bytes, u32::from(value));
        self
    }

    pub(super) fn properties(mut self, properties: &[Property]) -> Self {
        self.signature.push_str("a(sv)");
        put_array(&mut self.bytes, 8, |bytes| {
            for (name, value) in properties {
                pad(bytes, 8);
                put_text(bytes, name);
                put_value(bytes, value);
            }
        });
        self
    }

    /// No further units.
    pub(super) fn no_units(mut self) -> Self {
        self.signature.push_str("a(sa(sv))");
        put_array(&mut self.bytes, 8, |_| {});
        self
    }
}

/// Whom a call is for.
pub(super) struct Target {
    /// Absent where nobody is between the peers.
    pub(super) destination: Option<&'static str>,
    pub(super) path: &'static str,
    pub(super) interface: &'static str,
}

/// A method call as bytes.
pub(super) fn call(serial: u32, target: &Target, member: &str, arguments: &Arguments) -> Vec<u8> {
    // Little endian, method call, no flags, version 1.
    let mut bytes = vec![b'l', 1, 0, 1];
    put_length(&mut bytes, arguments.bytes.len());
    put_u32(&mut bytes, serial);
    put_array(&mut bytes, 8, |bytes| {
        let mut text_field = |code: u8, signature: &str, text: &str| {
            pad(bytes, 8);
            bytes.push(code);
            put_signature(bytes, signature);
            put_text(bytes, text);
        };
        text_field(1, "o", target.path);
        text_field(2, "s", target.interface);
        text_field(3, "s", member);
        if let Some(destination) = target.destination {
            text_field(6, "s", destination);
        }
        if !arguments.signature.is_empty() {
            pad(bytes, 8);
            bytes.push(8);
            put_signature(bytes, "g");
            put_signature(bytes, &arguments.signature);
        }
    });
    pad(&mut bytes, 8);
    bytes.extend(&arguments.bytes);
    bytes
}

/// What kind of message was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Return,
    Error,
    Signal,
    Other,
}

/// A message that was read.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) kind: Kind,
    pub(super) reply_to: u32,
    pub(super) member: String,
    pub(super) error: String,
    signature: String,
    big: bool,
    body: Vec<u8>,
}

/// How long a message is in all, by its fixed part.
pub(super) fn length(fixed: &[u8; FIXED]) -> Result<usize, Failure> {
    let big = is_big(fixed[0])?;
    let number = |at: usize| number(big, [fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]) as usize;
    let (body, fields) = (number(4), number(12));
    if fixed[3] != 1 || body > MAX_MESSAGE || fields > MAX_MESSAGE {
        return Err(Failure::Protocol("a header that no message has"));
    }
    Ok((FIXED + fields).next_multiple_of(8) + body)
}

fn is_big(mark: u8) -> Result<bool, Failure> {
    match mark {
        b'l' => Ok(false),
        b'B' => Ok(true),
        _ => Err(Failure::Protocol("an unknown byte order")),
    }
}

fn number(big: bool, bytes: [u8; 4]) -> u32 {
    if big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }
}

/// Reads a whole message. Unknown header fields are passed over.
pub(super) fn parse(bytes: &[u8]) -> Result<Message, Failure> {
    let big = is_big(*bytes.first().unwrap_or(&0))?;
    let kind = match bytes.get(1) {
        Some(2) => Kind::Return,
        Some(3) => Kind::Error,
        Some(4) => Kind::Signal,
        _ => Kind::Other,
    };
    let mut reader = Reader { bytes, at: 12, big };
    let end = reader.u32()? as usize + FIXED;
    let (mut reply_to, mut member, mut error, mut signature) = (0, String::new(), String::new(), String::new());
    while reader.at < end {
        reader.align(8);
        let code = reader.byte()?;
        match (code, reader.signature()?.as_str()) {
            (3, "s") => member = reader.text()?,
            (4, "s") => error = reader.text()?,
            (5, "u") => reply_to = reader.u32()?,
            (8, "g") => signature = reader.signature()?,
            (_, "s" | "o") => drop(reader.text()?),
            (_, "u") => drop(reader.u32()?),
            (_, "g") => drop(reader.signature()?),
            _ => return Err(Failure::Protocol("a header field of an unknown type")),
        }
    }
    reader.align(8);
    let body = bytes.get(reader.at..).unwrap_or_default().to_vec();
    Ok(Message { kind, reply_to, member, error, signature, big, body })
}

impl Message {
    /// The body's first values, as many as are text, paths or 32-bit numbers.
    pub(super) fn values(&self) -> Result<Vec<String>, Failure> {
        let mut reader = Reader { bytes: &self.body, at: 0, big: self.big };
        let mut values = Vec::new();
        for kind in self.signature.bytes() {
            match kind {
                b's' | b'o' => values.push(reader.text()?),
                b'u' => values.push(reader.u32()?.to_string()),
                _ => break,
            }
        }
        Ok(values)
    }

    /// The text in a body that is a variant.
    pub(super) fn variant_text(&self) -> Result<String, Failure> {
        let mut reader = Reader { bytes: &self.body, at: 0, big: self.big };
        match (self.signature.as_str(), reader.signature()?.as_str()) {
            ("v", "s") => reader.text(),
            _ => Err(Failure::Protocol("a property that is no text")),
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    big: bool,
}

impl Reader<'_> {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, count: usize) -> Result<&[u8], Failure> {
        let end = self.at.checked_add(count).ok_or(Failure::Protocol("a message that is too short"))?;
        let part = self.bytes.get(self.at..end).ok_or(Failure::Protocol("a message that is too short"))?;
        self.at = end;
        Ok(part)
    }

    fn byte(&mut self) -> Result<u8, Failure> {
        self.take(1).map(|part| part[0])
    }

    fn u32(&mut self) -> Result<u32, Failure> {
        self.align(4);
        let big = self.big;
        let part = self.take(4)?;
        Ok(number(big, [part[0], part[1], part[2], part[3]]))
    }

    fn text(&mut self) -> Result<String, Failure> {
        let length = self.u32()? as usize;
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.byte()?;
        Ok(text)
    }

    fn signature(&mut self) -> Result<String, Failure> {
        let length = usize::from(self.byte()?);
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.byte()?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_laid_out_as_the_specification_says() {
        let target = Target { destination: None, path: "/a", interface: "b.c" };
        let bytes = call(7, &target, "D", &Arguments::default().text("x").bool(true));
        let expected: &[&[u8]] = &[
            b"l\x01\x00\x01\x0c\x00\x00\x00\x07\x00\x00\x00\x36\x00\x00\x00",
            b"\x01\x01o\x00\x02\x00\x00\x00/a\x00\x00\x00\x00\x00\x00",
            b"\x02\x01s\x00\x03\x00\x00\x00b.c\x00\x00\x00\x00\x00",
            b"\x03\x01s\x00\x01\x00\x00\x00D\x00\x00\x00\x00\x00\x00\x00",
            b"\x08\x01g\x00\x02sb\x00",
            b"\x01\x00\x00\x00x\x00\x00\x00\x01\x00\x00\x00",
        ];
        // The last field is 7 bytes long: the array counts no padding behind it, the header has it.
        assert_eq!(bytes.len(), length(bytes[..FIXED].try_into().unwrap()).unwrap());
        let expected = expected.concat();
        assert_eq!(bytes[FIXED..], expected[FIXED..]);
        assert_eq!(bytes[..12], expected[..12]);
    }

    #[test]
    fn replies_of_either_byte_order_are_read_and_cut_ones_refused() {
        let mut little = b"l\x02\x01\x01\x0b\x00\x00\x00\x01\x00\x00\x00\x0f\x00\x00\x00".to_vec();
        little.extend(b"\x05\x01u\x00\x09\x00\x00\x00\x08\x01g\x00\x01o\x00\x00\x06\x00\x00\x00/job/1\x00");
        let mut big = b"B\x02\x01\x01\x00\x00\x00\x0b\x00\x00\x00\x01\x00\x00\x00\x0f".to_vec();
        big.extend(b"\x05\x01u\x00\x00\x00\x00\x09\x08\x01g\x00\x01o\x00\x00\x00\x00\x00\x06/job/1\x00");
        for bytes in [&little, &big] {
            assert_eq!(length(bytes[..FIXED].try_into().unwrap()).unwrap(), bytes.len());
            let message = parse(bytes).unwrap();
            assert_eq!((message.kind, message.reply_to), (Kind::Return, 9));
            assert_eq!(message.values().unwrap(), ["/job/1"]);
        }
        assert!(parse(&little[..28]).is_err());
        assert!(parse(&little[..40]).unwrap().values().is_err());
        assert!(length(b"l\x02\x01\x01\xff\xff\xff\xff\x01\x00\x00\x00\x0f\x00\x00\x00").is_err());
        assert!(length(b"x\x02\x01\x01\x00\x00\x00\x00\x01\x00\x00\x00\x0f\x00\x00\x00").is_err());
    }
}
