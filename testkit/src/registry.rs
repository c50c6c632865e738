//! A registry on loopback that does what a test tells it: speaks the distribution API, demands credentials, redirects, breaks off,
//! damages or withholds content. Every request is kept for the test to look at.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::image::digest;

/// What the registry wants to see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    /// Nothing.
    #[default]
    Open,
    /// `Authorization: Basic` on every request.
    Basic {
        /// User name.
        user: String,
        /// Password.
        password: String,
    },
    /// A token from `/token`, which wants the user (or nobody when `user` is empty), or the refresh token.
    Bearer {
        /// User name; empty gives tokens to everybody.
        user: String,
        /// Password.
        password: String,
        /// An identity token that is accepted instead.
        refresh_token: String,
    },
}

/// How a blob is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// One bit is wrong.
    Damaged,
    /// The connection breaks after so many bytes, as often as told.
    BreakAfter(usize, u32),
    /// Nothing follows these bytes until [`Registry::release`].
    HoldAfter(usize),
    /// The whole answer is this status.
    Status(u16),
    /// Sent elsewhere, such as `http://host/path`.
    Redirect(String),
    /// More bytes than there are follow.
    Longer,
}

/// A request that was received.
#[derive(Clone, Debug)]
pub struct Received {
    /// `GET` and the like.
    pub method: String,
    /// Path with query.
    pub path: String,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    /// The body.
    pub body: Vec<u8>,
}

#[derive(Default)]
struct State {
    blobs: HashMap<String, Vec<u8>>,
    /// `repository:tag` and `repository@digest` to media type and bytes.
    manifests: HashMap<String, (String, Vec<u8>)>,
    auth: Auth,
    ranges: bool,
    faults: HashMap<String, Fault>,
    received: Vec<Received>,
    released: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
    address: SocketAddr,
    scheme: &'static str,
}

/// The registry; it ends when dropped.
pub struct Registry {
    shared: Arc<Shared>,
}

/// Turns an accepted connection into what is read and written: TLS for a test that wants it.
pub trait Wrap: Send + Sync + 'static {
    /// `None` ends the connection.
    fn wrap(&self, stream: TcpStream) -> Option<Box<dyn Stream>>;
}

/// Something to read from and write to.
pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

struct Plain;

impl Wrap for Plain {
    fn wrap(&self, stream: TcpStream) -> Option<Box<dyn Stream>> {
        Some(Box::new(stream))
    }
}

impl Registry {
    /// Starts an empty registry on a free port of 127.0.0.1.
    ///
    /// # Panics
    /// When loopback cannot be bound.
    #[must_use]
    pub fn start() -> Self {
        Self::start_wrapped("http", Arc::new(Plain))
    }

    /// As [`Registry::start`] with every connection wrapped; `scheme` is that of its own URLs.
    ///
    /// # Panics
    /// When loopback cannot be bound.
    #[must_use]
    pub fn start_wrapped(scheme: &'static str, wrap: Arc<dyn Wrap>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind loopback");
        let address = listener.local_addr().expect("address of the listener");
        let shared = Arc::new(Shared {
            state: Mutex::new(State { ranges: true, ..State::default() }),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            address,
            scheme,
        });
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if accepting.stop.load(Ordering::SeqCst) {
                    return;
                }
                let (serving, wrap) = (accepting.clone(), wrap.clone());
                std::thread::spawn(move || {
                    if let Some(stream) = wrap.wrap(stream) {
                        serve(&serving, stream);
                    }
                });
            }
        });
        Registry { shared }
    }

    /// `127.0.0.1:<port>`.
    #[must_use]
    pub fn host(&self) -> String {
        self.shared.address.to_string()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.shared)
    }

    /// Stores a blob and returns its digest.
    pub fn put_blob(&self, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        self.state().blobs.insert(digest.clone(), bytes.to_vec());
        digest
    }

    /// Stores a manifest or index under its digest and, when `tag` is not empty, under the tag.
    pub fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        let mut state = self.state();
        let value = (media_type.to_string(), bytes.to_vec());
        state.manifests.insert(format!("{repository}@{digest}"), value.clone());
        if !tag.is_empty() {
            state.manifests.insert(format!("{repository}:{tag}"), value);
        }
        digest
    }

    /// What is demanded from now on.
    pub fn demand(&self, auth: Auth) {
        self.state().auth = auth;
    }

    /// Whether parts of blobs can be asked for.
    pub fn serve_ranges(&self, serve: bool) {
        self.state().ranges = serve;
    }

    /// How a blob is sent from now on.
    pub fn fault(&self, digest: &str, fault: Fault) {
        self.state().faults.insert(digest.to_string(), fault);
    }

    /// Blobs are sent as they are again.
    pub fn heal(&self) {
        self.state().faults.clear();
    }

    /// Lets what [`Fault::HoldAfter`] holds go on.
    pub fn release(&self) {
        self.state().released = true;
        self.shared.changed.notify_all();
    }

    /// All requests so far.
    #[must_use]
    pub fn received(&self) -> Vec<Received> {
        self.state().received.clone()
    }

    /// How many requests had this in their path.
    #[must_use]
    pub fn count(&self, part: &str) -> usize {
        self.state().received.iter().filter(|request| request.path.contains(part)).count()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.release();
        // Wakes the accepting thread; when it is gone already there is nothing to wake.
        let _ = TcpStream::connect(self.shared.address);
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(shared: &Shared, stream: Box<dyn Stream>) {
    let mut stream = BufReader::new(stream);
    while let Some(request) = read_request(&mut stream) {
        lock(shared).received.push(request.clone());
        if answer(shared, &request, stream.get_mut()).is_none() {
            return;
        }
    }
}

fn read_request(stream: &mut BufReader<Box<dyn Stream>>) -> Option<Received> {
    let mut line = String::new();
    stream.read_line(&mut line).ok().filter(|count| *count > 0)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_string(), words.next()?.to_string());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_string());
    }
    let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    Some(Received { method, path, headers, body })
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: u16, body: &[u8]) -> Self {
        Answer { status, headers: Vec::new(), body: body.to_vec() }
    }

    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_string(), value.into()));
        self
    }

    fn head(&self, length: usize) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} -\r\nContent-Length: {length}\r\n", self.status);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        head.into_bytes()
    }

    fn send(&self, stream: &mut dyn Stream) -> Option<()> {
        stream.write_all(&self.head(self.body.len())).ok()?;
        stream.write_all(&self.body).ok()?;
        stream.flush().ok()
    }
}

/// `None` ends the connection.
fn answer(shared: &Shared, request: &Received, stream: &mut dyn Stream) -> Option<()> {
    let path = request.path.split('?').next().unwrap_or_default();
    if path == "/token" {
        return token(shared, request).send(stream);
    }
    if let Some(refusal) = refuse(shared, request) {
        return refusal.send(stream);
    }
    let Some((repository, rest)) =
        path.strip_prefix("/v2/").and_then(|rest| rest.split_once("/manifests/").or_else(|| rest.split_once("/blobs/")))
    else {
        return Answer::new(if path == "/v2/" { 200 } else { 404 }, b"{}").send(stream);
    };
    if !path.contains("/blobs/") {
        return manifest(shared, repository, rest).send(stream);
    }
    blob(shared, request, rest, stream)
}

fn manifest(shared: &Shared, repository: &str, target: &str) -> Answer {
    let joiner = if target.contains(':') { '@' } else { ':' };
    match lock(shared).manifests.get(&format!("{repository}{joiner}{target}")) {
        Some((media_type, bytes)) => {
            Answer::new(200, bytes).with("Content-Type", media_type).with("Docker-Content-Digest", digest(bytes))
        }
        None => Answer::new(404, br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#),
    }
}

fn blob(shared: &Shared, request: &Received, target: &str, stream: &mut dyn Stream) -> Option<()> {
    let (bytes, fault, ranges) = {
        let mut state = lock(shared);
        let bytes = state.blobs.get(target).cloned();
        let fault = state.faults.get(target).cloned();
        if let Some(Fault::BreakAfter(_, left)) = state.faults.get_mut(target) {
            *left = left.saturating_sub(1);
        }
        (bytes, fault, state.ranges)
    };
    let Some(mut bytes) = bytes else {
        return Answer::new(404, br#"{"errors":[{"code":"BLOB_UNKNOWN"}]}"#).send(stream);
    };
    let mut answer = Answer::new(200, &[]);
    let start = request
        .headers
        .get("range")
        .and_then(|range| range.strip_prefix("bytes="))
        .and_then(|range| range.trim_end_matches('-').parse::<usize>().ok());
    if let Some(start) = start.filter(|start| ranges && *start < bytes.len()) {
        let whole = bytes.len();
        bytes.drain(..start);
        answer = Answer::new(206, &[]).with("Content-Range", format!("bytes {start}-{}/{whole}", whole - 1));
    }
    let length = bytes.len();
    match fault {
        Some(Fault::Status(status)) => return Answer::new(status, b"{}").send(stream),
        Some(Fault::Redirect(location)) => {
            return Answer::new(307, b"").with("Location", location).send(stream);
        }
        Some(Fault::Damaged) => bytes[length / 2] ^= 1,
        Some(Fault::Longer) => bytes.extend_from_slice(&[0; 4096]),
        Some(Fault::BreakAfter(count, left)) if left > 0 => {
            stream.write_all(&answer.head(length)).ok()?;
            stream.write_all(&bytes[..count.min(length)]).ok()?;
            let _ = stream.flush();
            return None;
        }
        Some(Fault::HoldAfter(count)) => {
            let count = count.min(length);
            stream.write_all(&answer.head(length)).ok()?;
            stream.write_all(&bytes[..count]).ok()?;
            stream.flush().ok()?;
            let state = shared.changed.wait_while(lock(shared), |state| !state.released).unwrap_or_else(PoisonError::into_inner);
            drop(state);
            stream.write_all(&bytes[count..]).ok()?;
            return stream.flush().ok();
        }
        _ => {}
    }
    answer.body = bytes;
    answer.send(stream)
}

/// The answer to a request that does not show what is demanded.
fn refuse(shared: &Shared, request: &Received) -> Option<Answer> {
    let shown = request.headers.get("authorization").map(String::as_str);
    let body = br#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#;
    match &lock(shared).auth {
        Auth::Open => None,
        Auth::Basic { user, password } => (shown != Some(&basic(user, password)))
            .then(|| Answer::new(401, body).with("WWW-Authenticate", "Basic realm=\"fake\"")),
        Auth::Bearer { .. } => (shown != Some("Bearer good-token")).then(|| {
            let challenge = format!(
                "Bearer realm=\"{}://{}/token\",service=\"fake\",scope=\"repository:some/thing:pull\"",
                shared.scheme, shared.address
            );
            Answer::new(401, body).with("WWW-Authenticate", challenge)
        }),
    }
}

fn token(shared: &Shared, request: &Received) -> Answer {
    let good = br#"{"token":"good-token","expires_in":60}"#;
    let Auth::Bearer { user, password, refresh_token } = &lock(shared).auth else {
        return Answer::new(404, b"");
    };
    let granted = if request.method == "POST" {
        let wanted = format!("refresh_token={refresh_token}");
        let body = String::from_utf8_lossy(&request.body).into_owned();
        let mut fields = body.split('&');
        !refresh_token.is_empty() && body.contains("grant_type=refresh_token") && fields.any(|field| field == wanted)
    } else {
        user.is_empty() || request.headers.get("authorization") == Some(&basic(user, password))
    };
    if granted { Answer::new(200, good) } else { Answer::new(401, br#"{"details":"incorrect username or password"}"#) }
}

fn basic(user: &str, password: &str) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = "Basic ".to_string();
    for group in format!("{user}:{password}").as_bytes().chunks(3) {
        let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for at in 0..4 {
            out.push(if at <= group.len() { char::from(ALPHABET[(bits >> (18 - 6 * at)) as usize & 63]) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_credentials_are_base64() {
        assert_eq!(basic("u", "p"), "Basic dTpw");
        assert_eq!(basic("user", "pass"), "Basic dXNlcjpwYXNz");
        assert_eq!(basic("a", ""), "Basic YTo=");
        assert_eq!(basic("ab", "c"), "Basic YWI6Yw==");
    }
}
