//! YAML text to JSON values with line numbers, resolving plain scalars as YAML 1.1 does (`on`, `yes`, `0644`), which is
//! what every other Kubernetes tool does with these files. Knows no Kubernetes kinds.

use std::collections::BTreeMap;
use std::rc::Rc;

use saphyr_parser::{Event, Parser, ScalarStyle, Span, StrInput};
use serde_json::{Map, Number, Value};

/// One document of a file.
#[derive(Clone, Debug)]
pub struct Document {
    /// The content.
    pub value: Value,
    /// Line of each element, by path (`spec.containers[0].name`).
    pub lines: Lines,
}

/// Where each element of a document stands.
#[derive(Clone, Debug, Default)]
pub struct Lines {
    start: usize,
    by_path: BTreeMap<String, usize>,
}

impl Lines {
    /// The line of the element, or of the nearest enclosing one that is known.
    pub fn of(&self, path: &str) -> usize {
        let mut path = path;
        loop {
            if let Some(line) = self.by_path.get(path) {
                return *line;
            }
            match path.rfind(['.', '[']) {
                Some(cut) => path = &path[..cut],
                None => return self.start,
            }
        }
    }

    /// Line of the document's first element.
    pub fn start(&self) -> usize {
        self.start
    }

    /// The same lines seen from the element at `path` (an item of a list, say).
    pub fn below(&self, path: &str) -> Lines {
        let by_path = self
            .by_path
            .iter()
            .filter_map(|(p, line)| Some((p.strip_prefix(path)?.strip_prefix('.')?.to_owned(), *line)))
            .collect();
        Lines { start: self.of(path), by_path }
    }
}

/// Text that is not usable YAML.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct YamlError {
    /// Line of the first problem, from 1.
    pub line: usize,
    /// What is wrong.
    pub message: String,
}

/// More nodes than any pod has; aliases could otherwise grow without end.
const MAX_NODES: usize = 200_000;
/// Deeper than any pod, aliases included: what reads a node goes down into it on a thread's small stack.
const MAX_DEPTH: usize = 100;

/// All documents of a text; empty ones are left out.
pub fn parse_documents(text: &str) -> Result<Vec<Document>, YamlError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim_start().starts_with('{')
        && let Some(documents) = parse_json(text)?
    {
        return Ok(documents);
    }
    let mut reader = Reader { parser: Parser::new_from_str(text), anchors: BTreeMap::new(), nodes: 0 };
    let mut documents = Vec::new();
    loop {
        let (event, span) = reader.next()?;
        match event {
            Event::StreamEnd => return Ok(documents),
            Event::DocumentStart(_) => {
                reader.anchors.clear();
                let first = reader.next()?;
                let node = reader.node(first, 0)?;
                if node.value == Content::Null {
                    continue;
                }
                let mut lines = Lines { start: node.line, by_path: BTreeMap::new() };
                let value = node.into_json(String::new(), &mut lines);
                documents.push(Document { value, lines });
            }
            Event::StreamStart | Event::DocumentEnd | Event::Nothing => {}
            _ => return Err(error(&span, "content outside of a document")),
        }
    }
}

/// A text that begins with a brace is JSON if it parses as such (flow YAML otherwise); `None` means: not JSON.
fn parse_json(text: &str) -> Result<Option<Vec<Document>>, YamlError> {
    let mut documents = Vec::new();
    for value in serde_json::Deserializer::from_str(text).into_iter::<Value>() {
        match value {
            Ok(value) => documents.push(Document { value, lines: Lines { start: 1, by_path: BTreeMap::new() } }),
            Err(e) if e.is_eof() => return Err(YamlError { line: e.line(), message: e.to_string() }),
            Err(_) => return Ok(None),
        }
    }
    Ok(Some(documents))
}

#[derive(Clone, Debug, PartialEq)]
enum Content {
    Null,
    Scalar(Value),
    List(Vec<Node>),
    Map(Vec<(String, usize, Node)>),
}

#[derive(Clone, Debug, PartialEq)]
struct Node {
    line: usize,
    value: Content,
}

impl Node {
    fn into_json(self, path: String, lines: &mut Lines) -> Value {
        let line = self.line;
        let value = match self.value {
            Content::Null => Value::Null,
            Content::Scalar(value) => value,
            Content::List(items) => {
                Value::Array(items.into_iter().enumerate().map(|(i, n)| n.into_json(format!("{path}[{i}]"), lines)).collect())
            }
            Content::Map(entries) => {
                let mut map = Map::new();
                for (key, key_line, node) in entries {
                    let below = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    let value = node.into_json(below.clone(), lines);
                    lines.by_path.insert(below, key_line);
                    map.insert(key, value);
                }
                Value::Object(map)
            }
        };
        lines.by_path.insert(path, line);
        value
    }
}

struct Reader<'t> {
    parser: Parser<'t, StrInput<'t>>,
    anchors: BTreeMap<usize, Rc<Node>>,
    nodes: usize,
}

impl<'t> Reader<'t> {
    fn next(&mut self) -> Result<(Event<'t>, Span), YamlError> {
        match self.parser.next_event() {
            Some(Ok(event)) => Ok(event),
            Some(Err(e)) => Err(YamlError { line: e.marker().line(), message: e.info().to_owned() }),
            None => Err(YamlError { line: 0, message: "the text ends in the middle of a document".to_owned() }),
        }
    }

    fn node(&mut self, (event, span): (Event<'t>, Span), depth: usize) -> Result<Node, YamlError> {
        self.take(&span, 1, depth)?;
        let line = span.start.line();
        let (anchor, node) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                let tag = tag.as_ref().map(|t| (t.is_yaml_core_schema(), t.suffix.clone()));
                let value = match (style, tag) {
                    (ScalarStyle::Plain, None) => resolve_plain(&text).map_err(|m| error(&span, &m))?,
                    (_, Some((true, suffix))) => resolve_tagged(&suffix, &text).map_err(|m| error(&span, &m))?,
                    (_, Some((false, suffix))) if !suffix.is_empty() => {
                        return Err(error(&span, &format!("tag !{suffix} has no meaning here")));
                    }
                    _ => Content::Scalar(Value::String(text.into_owned())),
                };
                (anchor, Node { line, value })
            }
            Event::SequenceStart(anchor, _) => (anchor, Node { line, value: Content::List(self.items(depth)?) }),
            Event::MappingStart(anchor, _) => (anchor, Node { line, value: Content::Map(self.entries(depth)?) }),
            Event::Alias(id) => {
                let node = self.anchors.get(&id).cloned().ok_or_else(|| error(&span, "alias of an unknown anchor"))?;
                let (count, height) = measure(&node);
                self.take(&span, count, depth + height)?;
                (0, Node::clone(&node))
            }
            _ => return Err(error(&span, "a value is missing")),
        };
        if anchor != 0 {
            // It is kept a second time: anchors within anchors count each.
            self.take(&span, measure(&node).0, depth)?;
            self.anchors.insert(anchor, Rc::new(node.clone()));
        }
        Ok(node)
    }

    /// Counts nodes before there are any.
    fn take(&mut self, span: &Span, nodes: usize, depth: usize) -> Result<(), YamlError> {
        self.nodes += nodes;
        if self.nodes > MAX_NODES {
            return Err(error(span, "too many elements"));
        }
        if depth > MAX_DEPTH {
            return Err(error(span, "nested too deeply"));
        }
        Ok(())
    }

    fn items(&mut self, depth: usize) -> Result<Vec<Node>, YamlError> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(items),
                event => items.push(self.node(event, depth + 1)?),
            }
        }
    }

    fn entries(&mut self, depth: usize) -> Result<Vec<(String, usize, Node)>, YamlError> {
        let mut entries: Vec<(String, usize, Node)> = Vec::new();
        let mut merged: Vec<(String, usize, Node)> = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::MappingEnd {
                break;
            }
            let merge = matches!(&event, Event::Scalar(text, ScalarStyle::Plain, _, _) if text == "<<");
            let key = self.node((event, span), depth + 1)?;
            let event = self.next()?;
            let value = self.node(event, depth + 1)?;
            if merge {
                merged.extend(merge_sources(value, &span)?);
                continue;
            }
            let name = key_text(key.value).ok_or_else(|| error(&span, "a key must be a plain value"))?;
            if entries.iter().any(|(other, _, _)| *other == name) {
                return Err(error(&span, &format!("key {name:?} is given twice")));
            }
            entries.push((name, key.line, value));
        }
        for (name, line, value) in merged {
            if !entries.iter().any(|(other, _, _)| *other == name) {
                entries.push((name, line, value));
            }
        }
        Ok(entries)
    }
}

fn merge_sources(value: Node, span: &Span) -> Result<Vec<(String, usize, Node)>, YamlError> {
    match value.value {
        Content::Map(entries) => Ok(entries),
        Content::List(items) => {
            let mut all = Vec::new();
            for item in items {
                match item.value {
                    Content::Map(entries) => all.extend(entries),
                    _ => return Err(error(span, "<< needs a map or a list of maps")),
                }
            }
            Ok(all)
        }
        _ => Err(error(span, "<< needs a map or a list of maps")),
    }
}

/// How many nodes there are, and how many levels below this one.
fn measure(node: &Node) -> (usize, usize) {
    let below = |(count, height): (usize, usize), node: &Node| {
        let (nodes, levels) = measure(node);
        (count + nodes, height.max(levels + 1))
    };
    match &node.value {
        Content::List(items) => items.iter().fold((1, 0), below),
        Content::Map(entries) => entries.iter().fold((1 + entries.len(), 0), |all, (_, _, node)| below(all, node)),
        Content::Null | Content::Scalar(_) => (1, 0),
    }
}

fn key_text(key: Content) -> Option<String> {
    match key {
        Content::Null => Some("null".to_owned()),
        Content::Scalar(Value::String(text)) => Some(text),
        Content::Scalar(other) => Some(other.to_string()),
        Content::List(_) | Content::Map(_) => None,
    }
}

fn error(span: &Span, message: &str) -> YamlError {
    YamlError { line: span.start.line(), message: message.to_owned() }
}

fn resolve_tagged(suffix: &str, text: &str) -> Result<Content, String> {
    match suffix {
        "str" | "binary" => Ok(Content::Scalar(Value::String(text.to_owned()))),
        "bool" | "int" | "float" | "null" => resolve_plain(text),
        other => Err(format!("tag !!{other} has no meaning here")),
    }
}

/// A plain scalar's value by YAML 1.1's rules.
fn resolve_plain(text: &str) -> Result<Content, String> {
    let value = match text {
        "" | "~" | "null" | "Null" | "NULL" => return Ok(Content::Null),
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => Value::Bool(true),
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => Value::Bool(false),
        ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" | "-.inf" | "-.Inf" | "-.INF" | ".nan" | ".NaN" | ".NAN" => {
            return Err(format!("{text} is not a number that JSON knows"));
        }
        _ if text.starts_with('_') => Value::String(text.to_owned()),
        _ => match parse_int(text).or_else(|| parse_float(text)) {
            Some(number) => Value::Number(number),
            None => Value::String(text.to_owned()),
        },
    };
    Ok(Content::Scalar(value))
}

fn parse_int(text: &str) -> Option<Number> {
    let plain = text.replace('_', "");
    if !plain.starts_with(['+', '-']) && !plain.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let (negative, digits) = match plain.as_bytes().first()? {
        b'-' => (true, &plain[1..]),
        b'+' => (false, &plain[1..]),
        _ => (false, plain.as_str()),
    };
    let (radix, digits) = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, &digits[2..]),
        [b'0', b'b' | b'B', ..] => (2, &digits[2..]),
        [b'0', b'o' | b'O', ..] => (8, &digits[2..]),
        [b'0', _, ..] => (8, &digits[1..]),
        _ => (10, digits),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return None;
    }
    let magnitude = u64::from_str_radix(digits, radix).ok()?;
    match negative {
        true => 0i64.checked_sub_unsigned(magnitude).map(Number::from),
        false => Some(Number::from(magnitude)),
    }
}

fn parse_float(text: &str) -> Option<Number> {
    let plain = text.replace('_', "");
    let unsigned = plain.strip_prefix(['+', '-']).unwrap_or(&plain);
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((m, e)) => (m, Some(e)),
        None => (unsigned, None),
    };
    if let Some(exponent) = exponent {
        let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
    }
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    let number: f64 = plain.parse().ok()?;
    if number.fract() == 0.0 && number.abs() < 9e15 {
        return Some(Number::from(number as i64));
    }
    Number::from_f64(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn one(text: &str) -> Value {
        parse_documents(text).unwrap().remove(0).value
    }

    #[test]
    fn plain_scalars_follow_yaml_1_1() {
        let cases = [
            ("on", json!(true)),
            ("off", json!(false)),
            ("yes", json!(true)),
            ("No", json!(false)),
            ("y", json!(true)),
            ("true", json!(true)),
            ("~", json!(null)),
            ("", json!(null)),
            ("0644", json!(420)),
            ("0x10", json!(16)),
            ("0b11", json!(3)),
            ("1_000", json!(1000)),
            ("-5", json!(-5)),
            ("08", json!(8)),
            ("1.5", json!(1.5)),
            ("1.0", json!(1)),
            ("1e3", json!(1000)),
            (".5", json!(0.5)),
            ("1.2.3", json!("1.2.3")),
            ("2001-12-14", json!("2001-12-14")),
            ("12:30:45", json!("12:30:45")),
            ("128Mi", json!("128Mi")),
            ("\"on\"", json!("on")),
            ("'0644'", json!("0644")),
            ("!!str 5", json!("5")),
            ("-", json!("-")),
            ("+", json!("+")),
            ("_1", json!("_1")),
            ("18446744073709551615", json!(18446744073709551615u64)),
        ];
        for (text, expected) in cases {
            let text = if text == "-" { "'-'" } else { text };
            assert_eq!(one(&format!("k: {text}\n"))["k"], expected, "{text}");
        }
    }

    #[test]
    fn several_documents_and_empty_ones_keep_their_lines() {
        let docs = parse_documents("---\n# nothing\n---\na: 1\n---\n\nb:\n- c: 2\n").unwrap();
        assert_eq!(docs.len(), 2);
        assert_eq!(docs[0].lines.start(), 4);
        assert_eq!(docs[1].lines.of("b[0].c"), 8);
        assert_eq!(docs[1].lines.of("b[0].missing.deep"), 8);
    }

    #[test]
    fn a_key_given_twice_is_an_error_with_its_line() {
        let error = parse_documents("a: 1\nb: 2\na: 3\n").unwrap_err();
        assert_eq!((error.line, error.message.as_str()), (3, "key \"a\" is given twice"));
    }

    #[test]
    fn anchors_and_merge_keys_work_and_bombs_do_not() {
        let value = one("base: &b {x: 1, y: 2}\nuse:\n  <<: *b\n  z: 3\n");
        assert_eq!(value["use"], json!({"z": 3, "x": 1, "true": 2}));
        let mut bomb = String::from("a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n");
        for i in 1..9 {
            let items = vec![format!("*a{}", i - 1); 10].join(",");
            bomb.push_str(&format!("a{i}: &a{i} [{items}]\n"));
        }
        assert!(parse_documents(&bomb).unwrap_err().message.contains("too many"));
        let mut within = "1,".repeat(10_000);
        for i in 0..50 {
            within = format!("&a{i} [{within}]");
        }
        assert!(parse_documents(&format!("a: {within}\n")).unwrap_err().message.contains("too many"), "each is kept");
    }

    #[test]
    fn aliases_count_as_deep_as_what_they_stand_for() {
        let chain = |links: usize| {
            let mut text = String::from("a0: &a0 [1]\n");
            for i in 1..links {
                text.push_str(&format!("a{i}: &a{i} [*a{}]\n", i - 1));
            }
            parse_documents(&text)
        };
        assert!(chain(90).is_ok());
        let error = chain(200).unwrap_err();
        assert!(error.line > 90 && error.message == "nested too deeply", "{error}");
    }

    #[test]
    fn json_files_and_streams_of_json_are_read() {
        let docs = parse_documents("{\"a\": \"on\"}\n{\"b\": 2}\n").unwrap();
        assert_eq!(docs.iter().map(|d| d.value.clone()).collect::<Vec<_>>(), [json!({"a": "on"}), json!({"b": 2})]);
        assert!(parse_documents("{\"a\": ").is_err());
        assert_eq!(one("{a: on}"), json!({"a": true}));
    }

    #[test]
    fn tabs_and_unclosed_quotes_are_errors_with_a_line() {
        assert_eq!(parse_documents("a:\n\tb: 1\n").unwrap_err().line, 2);
        assert!(parse_documents("a: \"open\nb: 1\n").is_err());
    }
}
