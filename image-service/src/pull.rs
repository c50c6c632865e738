//! Pulling: one task owns each pull, callers wait for it, and the last one who leaves ends it.

use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::{Buf, Bytes};
use futures::future::{BoxFuture, FutureExt, Shared, TryFutureExt};
use futures::stream::{self, StreamExt, TryStreamExt};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::auth::Credentials;
use crate::config::RegistryConfig;
use crate::digest::Digest;
use crate::error::Error;
use crate::image::{ImageConfig, ImageId};
use crate::manifest::{self, Descriptor, Manifest, Parsed};
use crate::reference::Reference;
use crate::registry::Session;
use crate::store::busy_blocking;
use crate::store::core::{BlobPin, Core, LayerPin, NewImage, Staged};
use crate::store::disk;
use crate::store::reaper::Busy;
use crate::unpack::stream::{Expected, unpack};

/// Chunks of a download that wait for the decoder; a chunk is what one read of the connection brought.
const CHUNKS_UNDER_WAY: usize = 32;
const MAX_INDEX_DEPTH: usize = 3;

type Key = (Reference, Option<Credentials>);
type Outcome = Shared<BoxFuture<'static, Result<ImageId, Arc<Error>>>>;

/// The pulls under way.
#[derive(Default)]
pub(crate) struct Pulls {
    running: Arc<Mutex<Running>>,
    layers: Arc<LayerLocks>,
}

#[derive(Default)]
struct Running {
    pulls: HashMap<Key, Pull>,
    next: u64,
}

struct Pull {
    serial: u64,
    waiters: usize,
    abort: AbortHandle,
    outcome: Outcome,
}

fn lock(running: &Mutex<Running>) -> MutexGuard<'_, Running> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One caller's interest in a pull.
struct Waiter {
    running: Arc<Mutex<Running>>,
    key: Key,
    serial: u64,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut running = lock(&self.running);
        if let Some(pull) = running.pulls.get_mut(&self.key).filter(|pull| pull.serial == self.serial) {
            pull.waiters -= 1;
            if pull.waiters == 0 {
                pull.abort.abort();
                running.pulls.remove(&self.key);
            }
        }
    }
}

impl Pulls {
    /// Waits for the pull of a reference, which is started unless it is under way.
    pub(crate) async fn join(
        &self,
        core: &Arc<Core>,
        config: &RegistryConfig,
        reference: &Reference,
        credentials: Option<Credentials>,
    ) -> Result<ImageId, Error> {
        let (outcome, waiter) = self.enter(core, config, (reference.clone(), credentials));
        let done = outcome.await;
        drop(waiter);
        done.map_err(Error::Shared)
    }

    fn enter(&self, core: &Arc<Core>, config: &RegistryConfig, key: Key) -> (Outcome, Waiter) {
        let mut running = lock(&self.running);
        if let Some(pull) = running.pulls.get_mut(&key) {
            pull.waiters += 1;
            let waiter = Waiter { running: self.running.clone(), key, serial: pull.serial };
            return (pull.outcome.clone(), waiter);
        }
        running.next += 1;
        let serial = running.next;
        let job = Job {
            core: core.clone(),
            config: config.clone(),
            layers: self.layers.clone(),
            reference: key.0.clone(),
            _busy: Busy::new(&core.signal),
        };
        let (credentials, ended, ended_key) = (key.1.clone(), self.running.clone(), key.clone());
        let task = tokio::spawn(async move {
            let done = job.run(credentials).await;
            // Whoever comes now starts anew.
            let mut running = lock(&ended);
            if running.pulls.get(&ended_key).is_some_and(|pull| pull.serial == serial) {
                running.pulls.remove(&ended_key);
            }
            done
        });
        let abort = task.abort_handle();
        let outcome = async move {
            match task.await {
                Ok(done) => done.map_err(Arc::new),
                Err(error) if error.is_cancelled() => Err(Arc::new(Error::Canceled)),
                Err(_) => Err(Arc::new(Error::Worker { task: "pull" })),
            }
        }
        .boxed()
        .shared();
        let pull = Pull { serial, waiters: 1, abort, outcome: outcome.clone() };
        running.pulls.insert(key.clone(), pull);
        (outcome, Waiter { running: self.running.clone(), key, serial })
    }
}

/// Lets one pull at a time unpack a layer; the next one finds it done.
#[derive(Default)]
struct LayerLocks {
    locks: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
}

impl LayerLocks {
    async fn lock(&self, diff_id: Digest) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            match locks.get(&diff_id).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(tokio::sync::Mutex::new(()));
                    locks.insert(diff_id, Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}

/// One pull. Dropped at any await, it leaves nothing but staged folders, which delete themselves.
struct Job {
    core: Arc<Core>,
    config: RegistryConfig,
    layers: Arc<LayerLocks>,
    reference: Reference,
    _busy: Busy,
}

/// A layer that is in the store, or waits for its parents.
enum Ready {
    Placed(LayerPin),
    Waits(Staged),
}

/// What a layer must be and where it belongs.
#[derive(Clone, Copy)]
struct Wanted {
    blob: Digest,
    size: u64,
    diff_id: Digest,
    chain_id: Digest,
}

/// What the registry said about the image.
struct Resolved {
    /// Of what the reference means: the index when it is one.
    top: Digest,
    manifest: Digest,
    content: Manifest,
    blobs: Vec<BlobPin>,
}

impl Job {
    async fn run(self, credentials: Option<Credentials>) -> Result<ImageId, Error> {
        let (config, reference) = (self.config.clone(), self.reference.clone());
        let session = self.blocking(move || Session::open(&config, &reference, credentials)).await?;
        let mut resolved = self.resolve(&session).await?;
        let (id, config, diff_ids) = self.configuration(&session, &mut resolved).await?;
        let layers = self.layers(&session, &resolved.content.layers, &diff_ids).await?;
        let size = resolved.content.layers.iter().map(|layer| layer.size).sum::<u64>() + resolved.content.config.size;
        let new = NewImage {
            id,
            config,
            size,
            layers,
            blobs: resolved.blobs,
            manifest: Some(resolved.manifest),
            tags: self.reference.repo_tag().into_iter().collect(),
            digests: vec![self.reference.repo_digest(resolved.top)],
        };
        let core = self.core.clone();
        // Not undone when everybody leaves now: the image is complete.
        self.blocking(move || core.commit(new)).await
    }

    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
        busy_blocking(&self.core.signal, work).await
    }

    async fn resolve(&self, session: &Session) -> Result<Resolved, Error> {
        let mut target = self.reference.target();
        let mut expected = self.reference.digest();
        let mut top = None;
        let mut blobs = Vec::new();
        for _ in 0..MAX_INDEX_DEPTH {
            let fetched = session.manifest(&target, expected).await.map_err(|error| match error {
                Error::NotFound { .. } if top.is_none() => Error::NotFound { reference: self.reference.to_string() },
                other => other,
            })?;
            let subject = format!("{}@{}", self.reference.repository(), fetched.digest);
            let (core, digest, bytes) = (self.core.clone(), fetched.digest, fetched.bytes.clone());
            let parsed = manifest::parse(&subject, &fetched.bytes)?;
            blobs.push(self.blocking(move || core.place_blob(digest, &bytes)).await?);
            let top = *top.get_or_insert(digest);
            match parsed {
                Parsed::Manifest(content) => return Ok(Resolved { top, manifest: digest, content, blobs }),
                Parsed::Index(manifests) => {
                    let chosen = manifest::choose(&subject, &manifests, &self.config.platform)?.digest()?;
                    target = chosen.to_string();
                    expected = Some(chosen);
                }
            }
        }
        Err(Error::Unsupported {
            subject: self.reference.to_string(),
            reason: "an index that holds indexes that hold indexes".into(),
        })
    }

    async fn configuration(
        &self,
        session: &Session,
        resolved: &mut Resolved,
    ) -> Result<(ImageId, ImageConfig, Vec<Digest>), Error> {
        let descriptor = &resolved.content.config;
        let digest = descriptor.digest()?;
        let (pin, bytes) = match self.core.blobs.pin(&digest) {
            Some(pin) => {
                let core = self.core.clone();
                (pin, self.blocking(move || core.read_blob(&digest)).await?)
            }
            None => {
                let bytes = session.document(digest, descriptor.size).await?;
                let core = self.core.clone();
                self.blocking(move || Ok((core.place_blob(digest, &bytes)?, bytes))).await?
            }
        };
        resolved.blobs.push(pin);
        let subject = format!("configuration of {}", self.reference);
        let (config, diff_ids) = manifest::parse_config(&subject, &bytes)?;
        let count = resolved.content.layers.len();
        manifest::check_config(&self.reference.to_string(), &config, &diff_ids, count, &self.config.platform)?;
        Ok((ImageId::new(digest), config, diff_ids))
    }

    async fn layers(&self, session: &Session, layers: &[Descriptor], diff_ids: &[Digest]) -> Result<Vec<LayerPin>, Error> {
        let mut wanted = Vec::new();
        for ((layer, diff_id), chain_id) in layers.iter().zip(diff_ids).zip(manifest::chain_ids(diff_ids)) {
            wanted.push(Wanted { blob: layer.digest()?, size: layer.size, diff_id: *diff_id, chain_id });
        }
        let jobs: Vec<BoxFuture<'_, Result<(usize, Ready), Error>>> = wanted
            .iter()
            .enumerate()
            .map(|(at, wanted)| self.layer(session, *wanted).map_ok(move |ready| (at, ready)).boxed())
            .collect();
        let mut ready: Vec<(usize, Ready)> =
            stream::iter(jobs).buffer_unordered(self.config.parallel_layers.max(1)).try_collect().await?;
        ready.sort_by_key(|(at, _)| *at);
        let mut placed: Vec<LayerPin> = Vec::new();
        for ((_, ready), wanted) in ready.into_iter().zip(wanted) {
            placed.push(match ready {
                Ready::Placed(pin) => pin,
                Ready::Waits(staged) => {
                    let (core, parents) = (self.core.clone(), placed.clone());
                    self.blocking(move || core.place_over(staged, &parents, &wanted.chain_id)).await?
                }
            });
        }
        Ok(placed)
    }

    async fn layer(&self, session: &Session, wanted: Wanted) -> Result<Ready, Error> {
        let _one_at_a_time = self.layers.lock(wanted.diff_id).await;
        if let Some(pin) = self.core.find_layer(&wanted.diff_id, &wanted.chain_id) {
            return Ok(Ready::Placed(pin));
        }
        let (sink, source) = mpsc::channel(CHUNKS_UNDER_WAY);
        let core = self.core.clone();
        let unpacked = self
            .blocking(move || unpack_layer(&core, ChannelReader::new(source), Some((wanted.blob, wanted.size)), wanted.diff_id));
        let downloaded = async {
            let done = session.blob(wanted.blob, wanted.size, &sink).await;
            drop(sink);
            done
        };
        match tokio::join!(downloaded, unpacked) {
            (Ok(()), unpacked) => unpacked,
            // The unpacker closed the channel: it knows why.
            (Err(Error::Canceled), Err(error)) => Err(error),
            (Err(error), _) => Err(error),
        }
    }
}

/// Unpacks a layer into a staging folder and puts it in its place when it needs no parents.
fn unpack_layer(
    core: &Core,
    source: impl Read + Send + 'static,
    blob: Option<(Digest, u64)>,
    diff_id: Digest,
) -> Result<Ready, Error> {
    let dir = core.stage()?;
    let root = dir.path().join("fs");
    std::fs::create_dir(&root).map_err(|source| Error::file("create", &root, source))?;
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&root, private).map_err(|source| Error::file("set the mode of", &root, source))?;
    let applied = unpack(source, &Expected { blob, diff_id }, disk::open_dir(&root)?)?;
    let self_contained = applied.is_self_contained();
    let staged = Staged { dir, applied, diff_id };
    if self_contained { core.place_layer(staged).map(Ready::Placed) } else { Ok(Ready::Waits(staged)) }
}

/// Unpacks one layer of an archive over those before it, unless it is there.
pub(crate) fn import_layer(
    core: &Core,
    source: impl Read + Send + 'static,
    blob: Option<(Digest, u64)>,
    diff_id: Digest,
    chain_id: &Digest,
    parents: &[LayerPin],
) -> Result<LayerPin, Error> {
    match unpack_layer(core, source, blob, diff_id)? {
        Ready::Placed(pin) => Ok(pin),
        Ready::Waits(staged) => core.place_over(staged, parents, chain_id),
    }
}

/// The blocking end of a download.
struct ChannelReader {
    source: mpsc::Receiver<Bytes>,
    chunk: Bytes,
}

impl ChannelReader {
    fn new(source: mpsc::Receiver<Bytes>) -> Self {
        ChannelReader { source, chunk: Bytes::new() }
    }
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.chunk.has_remaining() {
            // A download that broke off ends here too: size and digest tell it from a whole one.
            match self.source.blocking_recv() {
                Some(chunk) => self.chunk = chunk,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.chunk.remaining());
        self.chunk.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}
