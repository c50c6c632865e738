//! One pull's conversation with a registry and its mirrors: manifests, blobs, authorization, redirects.

mod authorize;
mod failure;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_RANGE, LOCATION, RANGE, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio::sync::{Mutex, mpsc};

use super::challenge;
use super::hosts::{self, Endpoint};
use super::transport::{self, HttpClient};
use crate::auth::Credentials;
use crate::config::RegistryConfig;
use crate::digest::Digest;
use crate::error::Error;
use crate::manifest;
use crate::reference::Reference;

const MAX_REDIRECTS: usize = 10;
/// Broken downloads are taken up again this often, as long as each try brings something.
const MAX_RESUMES: usize = 10;
const MAX_ERROR_BODY: u64 = 64 << 10;

/// A registry's hosts as one pull sees them.
pub(crate) struct Session {
    /// The registry's name in the reference.
    host: String,
    repository: String,
    remotes: Vec<Remote>,
    credentials: Option<Credentials>,
    stall: Duration,
}

struct Remote {
    endpoint: Endpoint,
    client: HttpClient,
    /// What the host has accepted so far.
    authorization: Mutex<Option<HeaderValue>>,
    /// Could not be reached once: not asked again by this pull while another host is left.
    unreachable: AtomicBool,
}

/// A manifest or index as it was sent.
pub(crate) struct Fetched {
    pub bytes: Bytes,
    pub digest: Digest,
}

impl Session {
    /// Reads the configuration of the reference's registry. Blocks on small files.
    pub(crate) fn open(config: &RegistryConfig, reference: &Reference, credentials: Option<Credentials>) -> Result<Self, Error> {
        let mut remotes = Vec::new();
        for endpoint in hosts::endpoints(&config.config_dirs, reference.host())? {
            let client = transport::client(&endpoint, config.connect_timeout)?;
            remotes.push(Remote { endpoint, client, authorization: Mutex::new(None), unreachable: AtomicBool::new(false) });
        }
        Ok(Session {
            host: reference.host().to_string(),
            repository: reference.path().to_string(),
            remotes,
            credentials,
            stall: config.stall_timeout,
        })
    }

    /// Fetches a manifest or index by tag or digest; with a digest it is verified.
    pub(crate) async fn manifest(&self, target: &str, expected: Option<Digest>) -> Result<Fetched, Error> {
        let mut last = None;
        for remote in self.reachable() {
            let usable = if expected.is_some() { remote.endpoint.pull } else { remote.endpoint.resolve && remote.endpoint.pull };
            if !usable {
                continue;
            }
            match self.manifest_from(remote, target, expected).await {
                Ok(fetched) => return Ok(fetched),
                Err(error) => self.note(remote, &mut last, error),
            }
        }
        Err(last.unwrap_or_else(|| self.nobody()))
    }

    async fn manifest_from(&self, remote: &Remote, target: &str, expected: Option<Digest>) -> Result<Fetched, Error> {
        let path = format!("{}/manifests/{target}", self.repository);
        let accept = [(ACCEPT, HeaderValue::from_static(manifest::ACCEPT))];
        let response = self.get(remote, &path, &accept).await?;
        let sent = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        let sent: Option<Digest> = sent.and_then(|text| text.parse().ok());
        let bytes = self.collect(remote, response, manifest::MAX_DOCUMENT).await?;
        let digest = Digest::of(&bytes);
        match expected.or(sent) {
            Some(wanted) if wanted != digest => Err(Error::DigestMismatch {
                subject: format!("manifest {}/{}:{target}", self.host, self.repository),
                expected: wanted,
                found: digest,
            }),
            _ => Ok(Fetched { bytes, digest }),
        }
    }

    /// Streams a blob; the receiver verifies its digest. Errors when `sink` closes early.
    pub(crate) async fn blob(&self, digest: Digest, size: u64, sink: &mpsc::Sender<Bytes>) -> Result<(), Error> {
        let mut offset = 0;
        let mut last = None;
        for remote in self.reachable().filter(|remote| remote.endpoint.pull) {
            for _ in 0..MAX_RESUMES {
                let before = offset;
                match self.blob_from(remote, digest, size, &mut offset, sink).await {
                    Ok(()) => return Ok(()),
                    Err(Error::Canceled) => return Err(Error::Canceled),
                    Err(error @ (Error::Unavailable { .. } | Error::Stalled { .. })) if offset > before => {
                        tracing::debug!(%digest, offset, %error, "download broke off: resuming");
                        last = Some(error);
                    }
                    Err(error) => {
                        self.note(remote, &mut last, error);
                        break;
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| self.nobody()))
    }

    async fn blob_from(
        &self,
        remote: &Remote,
        digest: Digest,
        size: u64,
        offset: &mut u64,
        sink: &mpsc::Sender<Bytes>,
    ) -> Result<(), Error> {
        let subject = || format!("blob {digest}");
        if *offset == size && size > 0 {
            return Ok(());
        }
        let path = format!("{}/blobs/{digest}", self.repository);
        let mut headers = Vec::new();
        if *offset > 0
            && let Ok(range) = HeaderValue::try_from(format!("bytes={offset}-"))
        {
            headers.push((RANGE, range));
        }
        let response = self.get(remote, &path, &headers).await?;
        let mut skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let start = format!("bytes {offset}-");
                let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
                if !range.is_some_and(|range| range.starts_with(&start)) {
                    return Err(self.protocol(remote, "the partial content is not what was asked for"));
                }
                0
            }
            _ => *offset,
        };
        let mut body = response.into_body();
        while let Some(mut chunk) = self.chunk(remote, &mut body).await? {
            if skip > 0 {
                let step = skip.min(chunk.len() as u64);
                skip -= step;
                chunk = chunk.slice(step as usize..);
            }
            if chunk.is_empty() {
                continue;
            }
            *offset += chunk.len() as u64;
            if *offset > size {
                return Err(Error::SizeMismatch { subject: subject(), expected: size, found: *offset });
            }
            sink.send(chunk).await.map_err(|_| Error::Canceled)?;
        }
        if *offset < size {
            return Err(Error::Unavailable {
                host: remote.endpoint.authority.clone(),
                source: format!("blob {digest} ended after {offset} of {size} bytes").into(),
            });
        }
        Ok(())
    }

    /// Fetches a small blob whole and verifies it.
    pub(crate) async fn document(&self, digest: Digest, size: u64) -> Result<Vec<u8>, Error> {
        let subject = format!("blob {digest}");
        if size > manifest::MAX_DOCUMENT {
            return Err(Error::Unsupported { subject, reason: format!("{size} bytes are too many for a configuration") });
        }
        let (sink, mut source) = mpsc::channel::<Bytes>(4);
        let download = async {
            let done = self.blob(digest, size, &sink).await;
            drop(sink);
            done
        };
        let collect = async {
            let mut bytes = Vec::new();
            while let Some(chunk) = source.recv().await {
                bytes.extend_from_slice(&chunk);
            }
            bytes
        };
        let (done, bytes) = tokio::join!(download, collect);
        done?;
        match Digest::of(&bytes) {
            found if found == digest => Ok(bytes),
            found => Err(Error::DigestMismatch { subject, expected: digest, found }),
        }
    }

    /// A GET below the API's prefix, authorized as the host demands; redirects are followed.
    async fn get(
        &self,
        remote: &Remote,
        path: &str,
        headers: &[(http::HeaderName, HeaderValue)],
    ) -> Result<Response<Incoming>, Error> {
        let endpoint = &remote.endpoint;
        let mut url = format!("{}://{}{}/{path}", endpoint.scheme, endpoint.authority, endpoint.prefix);
        if endpoint.mirror {
            url = format!("{url}?{}", challenge::form(&[("ns", &self.host)]));
        }
        let url: Uri = url.parse().map_err(|_| self.protocol(remote, format!("{url:?} is not a URL")))?;
        let mut tried = None;
        loop {
            let authorization = remote.authorization.lock().await.clone();
            let response = self.follow(remote, &url, headers, authorization.as_ref()).await?;
            let status = response.status();
            if status == StatusCode::UNAUTHORIZED && tried.is_none() {
                tried = Some(self.authorize(remote, response.headers(), authorization).await?);
                continue;
            }
            if status.is_success() {
                return Ok(response);
            }
            return Err(self.failure(remote, path, response).await);
        }
    }

    async fn follow(
        &self,
        remote: &Remote,
        url: &Uri,
        headers: &[(http::HeaderName, HeaderValue)],
        authorization: Option<&HeaderValue>,
    ) -> Result<Response<Incoming>, Error> {
        let mut url = url.clone();
        let home = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = HeaderMap::new();
            request.extend(headers.iter().cloned());
            // Secrets stay with the host that they were given for.
            if same_origin(&url, &home) {
                for (name, value) in &remote.endpoint.headers {
                    request.append(name.clone(), value.clone());
                }
                if let Some(authorization) = authorization {
                    request.insert(AUTHORIZATION, authorization.clone());
                }
            }
            let response = self.send(remote, Method::GET, url.clone(), request, Bytes::new()).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| join(&url, location));
            url = next.ok_or_else(|| self.protocol(remote, "a redirect leads nowhere"))?;
        }
        Err(self.protocol(remote, "too many redirects"))
    }

    async fn send(
        &self,
        remote: &Remote,
        method: Method,
        url: Uri,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Response<Incoming>, Error> {
        let host = url.authority().map(ToString::to_string).unwrap_or_default();
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = url;
        *request.headers_mut() = headers;
        request.headers_mut().insert(USER_AGENT, HeaderValue::from_static(concat!("berth/", env!("CARGO_PKG_VERSION"))));
        match tokio::time::timeout(self.stall, remote.client.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(Error::Unavailable { host, source: Box::new(error) }),
            Err(_) => Err(Error::Stalled { host, after: self.stall }),
        }
    }

    async fn chunk(&self, remote: &Remote, body: &mut Incoming) -> Result<Option<Bytes>, Error> {
        let host = || remote.endpoint.authority.clone();
        loop {
            match tokio::time::timeout(self.stall, body.frame()).await {
                Err(_) => return Err(Error::Stalled { host: host(), after: self.stall }),
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(Error::Unavailable { host: host(), source: Box::new(error) }),
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    async fn collect(&self, remote: &Remote, response: Response<Incoming>, limit: u64) -> Result<Bytes, Error> {
        let mut body = response.into_body();
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunk(remote, &mut body).await? {
            if (bytes.len() + chunk.len()) as u64 > limit {
                return Err(self.protocol(remote, format!("the answer is longer than {limit} bytes")));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.into())
    }

    fn reachable(&self) -> impl Iterator<Item = &Remote> {
        let (last, others) = match self.remotes.split_last() {
            Some((last, others)) => (Some(last), others),
            None => (None, &[][..]),
        };
        others.iter().filter(|remote| !remote.unreachable.load(Ordering::Relaxed)).chain(last)
    }

    /// The last host's error is the one reported: mirrors come first, the registry itself last.
    fn note(&self, remote: &Remote, last: &mut Option<Error>, error: Error) {
        if remote.endpoint.mirror {
            tracing::info!(mirror = remote.endpoint.authority, registry = self.host, %error, "registry mirror failed");
        }
        if matches!(error, Error::Unavailable { .. } | Error::Stalled { .. }) {
            remote.unreachable.store(true, Ordering::Relaxed);
        }
        *last = Some(error);
    }
}

/// Whether two URLs mean the same host over the same kind of connection: HTTPS' secrets never go out in the clear.
fn same_origin(a: &Uri, b: &Uri) -> bool {
    a.authority() == b.authority() && a.scheme() == b.scheme()
}

/// Resolves a `Location` against the URL that it came from.
fn join(base: &Uri, location: &str) -> Option<Uri> {
    let scheme = base.scheme_str()?;
    let absolute = if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{scheme}://{}{location}", base.authority()?)
    } else if location.contains("://") {
        location.to_string()
    } else {
        let path = base.path();
        let folder = &path[..=path.rfind('/')?];
        format!("{scheme}://{}{folder}{location}", base.authority()?)
    };
    let uri: Uri = absolute.parse().ok()?;
    (uri.authority().is_some() && matches!(uri.scheme_str(), Some("http" | "https"))).then_some(uri)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_follow_neither_to_another_host_nor_into_the_clear() {
        let home: Uri = "https://r.example:5000/v2/a".parse().unwrap();
        for (url, same) in [
            ("https://r.example:5000/other", true),
            ("http://r.example:5000/v2/a", false),
            ("https://r.example/v2/a", false),
            ("https://r.example.evil:5000/v2/a", false),
        ] {
            assert_eq!(same_origin(&home, &url.parse().unwrap()), same, "{url}");
        }
    }

    #[test]
    fn redirects_are_resolved() {
        let base: Uri = "https://r.example:5000/v2/a/blobs/x?ns=y".parse().unwrap();
        for (location, expected) in [
            ("https://cdn.example/x?sig=1", Some("https://cdn.example/x?sig=1")),
            ("/v2/b", Some("https://r.example:5000/v2/b")),
            ("//cdn.example/y", Some("https://cdn.example/y")),
            ("z", Some("https://r.example:5000/v2/a/blobs/z")),
            ("ftp://x/y", None),
        ] {
            assert_eq!(join(&base, location).map(|uri| uri.to_string()).as_deref(), expected, "{location}");
        }
    }
}
