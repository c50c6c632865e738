//! The CRI log format: bytes of a stream become entries. Knows nothing of files and clocks.

/// Longest content of one entry.
pub const MAX_CONTENT: usize = 16 * 1024;

/// Whether an entry ends its line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// `P`: the line goes on in the next entry (or the stream ended without a line end).
    Partial,
    /// `F`.
    Full,
}

impl Tag {
    /// As written.
    pub fn text(self) -> &'static [u8] {
        match self {
            Tag::Partial => b" P ",
            Tag::Full => b" F ",
        }
    }
}

/// Cuts a stream into entries. Holds the unfinished line only.
#[derive(Debug, Default)]
pub struct Splitter {
    pending: Vec<u8>,
}

impl Splitter {
    /// Takes the next bytes of the stream.
    pub fn feed(&mut self, mut data: &[u8], emit: &mut impl FnMut(Tag, &[u8])) {
        while let Some(end) = data.iter().position(|byte| *byte == b'\n') {
            if self.pending.is_empty() {
                emit_line(&data[..end], emit);
            } else {
                self.pending.extend_from_slice(&data[..end]);
                let line = std::mem::take(&mut self.pending);
                emit_line(&line, emit);
            }
            data = &data[end + 1..];
        }
        if data.is_empty() {
            return;
        }
        self.pending.extend_from_slice(data);
        let mut from = 0;
        // A carriage return right behind a full piece may belong to the line end: it waits for the next byte.
        while let rest = &self.pending[from..]
            && rest.len() > MAX_CONTENT
            && rest[MAX_CONTENT..] != *b"\r"
        {
            emit(Tag::Partial, &rest[..MAX_CONTENT]);
            from += MAX_CONTENT;
        }
        self.pending.drain(..from);
    }

    /// The stream has ended: what has no line end is a partial entry.
    pub fn finish(&mut self, emit: &mut impl FnMut(Tag, &[u8])) {
        let rest = std::mem::take(&mut self.pending);
        for piece in rest.chunks(MAX_CONTENT) {
            emit(Tag::Partial, piece);
        }
    }

    /// Gives back memory that an unfinished line does not need.
    pub fn shrink(&mut self) {
        self.pending.shrink_to_fit();
    }
}

/// One line without its newline.
fn emit_line(line: &[u8], emit: &mut impl FnMut(Tag, &[u8])) {
    let mut line = line.strip_suffix(b"\r").unwrap_or(line);
    while line.len() > MAX_CONTENT {
        let (piece, rest) = line.split_at(MAX_CONTENT);
        emit(Tag::Partial, piece);
        line = rest;
    }
    emit(Tag::Full, line);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(chunks: &[&[u8]]) -> Vec<(char, Vec<u8>)> {
        let mut seen = Vec::new();
        let mut emit = |tag: Tag, content: &[u8]| seen.push((tag.text()[1] as char, content.to_vec()));
        let mut splitter = Splitter::default();
        for chunk in chunks {
            splitter.feed(chunk, &mut emit);
        }
        splitter.finish(&mut emit);
        seen
    }

    /// An entry's tag and text.
    type Tagged<'a> = (char, &'a [u8]);
    /// Bytes before a line's end, its end, and sizes and tags of the entries.
    type Cut<'a> = (usize, &'a [u8], &'a [(char, usize)]);

    #[test]
    fn lines_become_full_entries_and_a_rest_a_partial_one() {
        let table: &[(&[&[u8]], &[Tagged<'_>])] = &[
            (&[b""], &[]),
            (&[b"a\n"], &[('F', b"a")]),
            (&[b"\n"], &[('F', b"")]),
            (&[b"a\r\n"], &[('F', b"a")]),
            (&[b"\r\n"], &[('F', b"")]),
            (&[b"a\r\r\n"], &[('F', b"a\r")]),
            (&[b"a\rb\n"], &[('F', b"a\rb")]),
            (&[b"a\r", b"\n"], &[('F', b"a")]),
            (&[b"a", b"b", b"c\nd"], &[('F', b"abc"), ('P', b"d")]),
            (&[b"a\n\nb\n"], &[('F', b"a"), ('F', b""), ('F', b"b")]),
            (&[b"end\r"], &[('P', b"end\r")]),
            (&[b"\xff\0\n"], &[('F', b"\xff\0")]),
        ];
        for (chunks, entries) in table {
            let want: Vec<(char, Vec<u8>)> = entries.iter().map(|(tag, text)| (*tag, text.to_vec())).collect();
            assert_eq!(split(chunks), want, "{chunks:?}");
        }
    }

    #[test]
    fn long_lines_are_cut_at_16_kib_and_closed_by_a_full_entry() {
        const M: usize = MAX_CONTENT;
        let table: &[Cut<'_>] = &[
            (M, b"\n", &[('F', M)]),
            (M, b"\r\n", &[('F', M)]),
            (M + 1, b"\n", &[('P', M), ('F', 1)]),
            (M + 1, b"\r\n", &[('P', M), ('F', 1)]),
            (2 * M, b"\n", &[('P', M), ('F', M)]),
            (2 * M, b"\r\n", &[('P', M), ('F', M)]),
            (3 * M + 5, b"\n", &[('P', M), ('P', M), ('P', M), ('F', 5)]),
            (M, b"", &[('P', M)]),
            (M + 1, b"", &[('P', M), ('P', 1)]),
            (M, b"\r", &[('P', M), ('P', 1)]),
        ];
        for (length, end, want) in table {
            let mut text = vec![b'x'; *length];
            text.extend_from_slice(end);
            for step in [1, 7, 1000, 4096, 16_383, 16_384, 16_385, text.len()] {
                let chunks: Vec<&[u8]> = text.chunks(step).collect();
                let sizes: Vec<(char, usize)> = split(&chunks).iter().map(|(tag, text)| (*tag, text.len())).collect();
                assert_eq!(&sizes, want, "{length} {end:?} in steps of {step}");
            }
        }
    }
}
