//! The file source: a folder (or one file) of manifests, watched by inotify and read again now and then. A broken file
//! leaves its pods alone; a missing one counts after a short absence. Emits whole sets of pods, decides nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Pod;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::accepted::AcceptedStore;
use super::manifest::{is_manifest_name, read_manifest};
use super::static_pod::{Origin, StaticPod};
use super::watch::{Events, Watch};
use super::{SourceName, SourceUpdate, WARNING};
use crate::clock::Clock;
use crate::objects::Object;

/// Larger files are refused unread.
const MAX_FILE: u64 = 10 * 1024 * 1024;

/// How soon a folder that could not be read is tried again.
const UNREADABLE_RETRY: Duration = Duration::from_secs(1);

/// How long a file has to stay unchanged that no event vouches for, though events come: whoever writes it has not closed it yet. Over
/// a bad link that takes a while, and the first part of a manifest may be a valid one.
const UNVOUCHED: Duration = Duration::from_secs(30);

/// How much of the removal's time files that are young at the start may take together to settle before the first set is published.
const START_SETTLES: u32 = 10;

/// What the scanner needs to know.
#[derive(Clone, Debug)]
pub struct FileSourceConfig {
    /// Folder or file.
    pub path: PathBuf,
    /// The node's name.
    pub node_name: String,
    /// The kubelet's folder, for the record of accepted pods.
    pub kubelet_root: PathBuf,
    /// How long a manifest must be away (or unchanged, when no event vouches for it) before that counts.
    pub settle: Duration,
    /// Full re-read.
    pub rescan: Duration,
    /// Sysctls allowed besides the safe ones.
    pub allowed_unsafe_sysctls: Vec<String>,
    /// Wall clock.
    pub clock: Clock,
}

/// What tells that a file has not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

#[derive(Debug, Default)]
struct FileState {
    stamp: Option<Stamp>,
    digest: Option<[u8; 32]>,
    pods: Vec<StaticPod>,
    objects: Vec<Object>,
    warnings: Vec<String>,
    problems: Vec<String>,
    missing_since: Option<Instant>,
    /// What it looked like when no event vouched for it.
    unsettled: Option<Unsettled>,
    /// What it stands for is not on record.
    unsaved: bool,
}

/// A file that somebody may still be writing.
#[derive(Clone, Copy, Debug)]
struct Unsettled {
    stamp: Stamp,
    since: Instant,
    /// How long it has to stay so.
    patience: Duration,
}

impl FileState {
    /// What its pods and objects are called.
    fn names(&self) -> impl Iterator<Item = String> {
        self.pods.iter().map(pod_name).chain(self.objects.iter().map(|object| object.name().to_string()))
    }
}

fn pod_name(pod: &StaticPod) -> String {
    format!("pod {}", pod.full_name())
}

fn duplicate((path, name, owner): &(PathBuf, String, PathBuf)) -> String {
    format!("{}: {name} is already defined by {}", path.display(), owner.display())
}

/// Outcome of one look at the files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Whether the set of pods or of problems changed.
    pub changed: bool,
    /// When to look again because something has not settled.
    pub look_again: Option<Instant>,
}

/// The files and what they stand for.
#[derive(Debug)]
pub struct Scanner {
    config: FileSourceConfig,
    store: AcceptedStore,
    files: BTreeMap<PathBuf, FileState>,
    /// The file whose word counts, by what pods and objects are called: `pod default/web-n`, `Secret default/s`.
    owners: BTreeMap<String, PathBuf>,
    /// What files hold that another one has: the file, what it is called, the other.
    lost: BTreeSet<(PathBuf, String, PathBuf)>,
    /// Pods that lost their name since the last update, each with its file and the one that has it.
    rejected: Vec<(Arc<Pod>, String)>,
    /// The record does not say yet which file has what several hold.
    owners_unsaved: bool,
    skipped: BTreeSet<PathBuf>,
    fresh: BTreeSet<String>,
    scanned: bool,
    folder_missing: bool,
    unreadable: bool,
    /// Events have been coming since before the last look: a file that is complete has been vouched for.
    watched: bool,
    /// The events themselves, while they come.
    events: Option<Events>,
    /// Until when files that are young at the start hold the first set back.
    settled_by: Option<Instant>,
    settling: bool,
}

impl Scanner {
    /// Knows what was accepted before; has looked at nothing yet.
    pub fn new(config: FileSourceConfig) -> Scanner {
        let store = AcceptedStore::below(&config.kubelet_root);
        let mut files = BTreeMap::new();
        let mut owners = store.load_owners();
        owners.retain(|_, path| *path == config.path || path.parent() == Some(&config.path));
        for record in store.load() {
            if record.path != config.path && record.path.parent() != Some(&config.path) {
                continue;
            }
            let state = FileState { pods: record.pods, objects: record.objects, ..FileState::default() };
            for name in state.names() {
                owners.entry(name).or_insert_with(|| record.path.clone());
            }
            files.insert(record.path, state);
        }
        Scanner {
            config,
            store,
            files,
            owners,
            lost: BTreeSet::new(),
            rejected: Vec::new(),
            owners_unsaved: false,
            skipped: BTreeSet::new(),
            fresh: BTreeSet::new(),
            scanned: false,
            folder_missing: false,
            unreadable: false,
            watched: false,
            events: None,
            settled_by: None,
            settling: false,
        }
    }

    /// Whether a set can be published: every file known from before was seen or has been away long enough.
    pub fn is_ready(&self) -> bool {
        self.scanned
            && !self.unreadable
            && !self.settling
            && self.files.values().all(|f| f.stamp.is_some() || f.missing_since.is_none())
    }

    /// Looks at the files. `vouched` are names that an event vouches for: written and closed, or moved in.
    pub fn scan(&mut self, now: Instant, vouched: &BTreeSet<OsString>) -> Scan {
        let mut scan = Scan::default();
        let first = !self.scanned;
        let present = match self.list() {
            Ok(present) => present,
            Err(error) => {
                // What cannot be looked at (no right, no descriptors, a stale mount) is not gone: pods stay as they are.
                tracing::error!(path = %self.config.path.display(), %error, "manifests cannot be read: pods are left alone");
                self.unreadable = true;
                scan.look_again = Some(now + self.config.rescan.min(UNREADABLE_RETRY));
                return scan;
            }
        };
        self.unreadable = false;
        self.scanned = true;
        for path in &present {
            let vouched = path.file_name().is_some_and(|name| vouched.contains(name));
            self.look_at(path, vouched, now, &mut scan);
        }
        let settled_by = *self.settled_by.get_or_insert(now + self.config.settle * START_SETTLES);
        let is_young = |file: &FileState| file.unsettled.is_some_and(|unsettled| !unsettled.patience.is_zero());
        self.settling = now < settled_by && self.files.values().any(is_young);
        self.settle_missing(&present, now, &mut scan);
        self.save_again();
        if scan.changed || first || self.owners_unsaved {
            self.assign_owners(first);
        }
        scan.changed |= first;
        scan
    }

    /// The manifests that exist, sorted by name. Only what the kernel says is not there counts as missing.
    fn list(&mut self) -> io::Result<BTreeSet<PathBuf>> {
        let root = self.config.path.clone();
        let metadata = match fs::metadata(&root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            metadata => Some(metadata?),
        };
        if metadata.is_none() && !self.folder_missing {
            tracing::warn!(path = %root.display(), "manifests are missing: nothing to run until they appear");
        }
        self.folder_missing = metadata.is_none();
        match metadata {
            Some(metadata) if metadata.is_file() => Ok(BTreeSet::from([root])),
            Some(metadata) if metadata.is_dir() => self.list_folder(&root),
            _ => Ok(BTreeSet::new()),
        }
    }

    fn list_folder(&mut self, root: &Path) -> io::Result<BTreeSet<PathBuf>> {
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(root)? {
            let path = entry?.path();
            if !is_manifest_name(&path) {
                continue;
            }
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_file() => _ = found.insert(path),
                Ok(_) if self.skipped.insert(path.clone()) => {
                    tracing::warn!(path = %path.display(), "not a regular file: skipped");
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => _ = found.insert(path),
                _ => {}
            }
        }
        Ok(found)
    }

    fn look_at(&mut self, path: &Path, vouched: bool, now: Instant, scan: &mut Scan) {
        let state = self.files.entry(path.to_owned()).or_default();
        state.missing_since = None;
        let Ok(metadata) = fs::metadata(path) else { return };
        let stamp = stamp_of(&metadata);
        if state.stamp == Some(stamp) {
            return;
        }
        // Of what a link leads to the folder has no events.
        let is_link = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink());
        let patience = if self.watched && !is_link { UNVOUCHED.max(self.config.settle) } else { self.config.settle };
        let unsettled = state.unsettled.filter(|before| before.stamp == stamp);
        let unsettled = unsettled.unwrap_or(Unsettled { stamp, since: now, patience });
        state.unsettled = Some(unsettled);
        // A time to come, where the clock has jumped back, says nothing: the file settles as long as it is seen unchanged.
        let written = metadata.modified().ok().and_then(|modified| SystemTime::now().duration_since(modified).ok());
        let age = written.unwrap_or_default().max(now.saturating_duration_since(unsettled.since));
        if !vouched && age < unsettled.patience {
            // Somebody may still be writing: no event has said otherwise.
            sooner(&mut scan.look_again, unsettled.since + unsettled.patience);
            return;
        }
        // Settled it is, also when reading it fails now.
        state.unsettled = Some(Unsettled { patience: Duration::ZERO, ..unsettled });
        let content = if metadata.len() > MAX_FILE {
            Err(vec![format!("{}: larger than 10 MB", path.display())])
        } else {
            match fs::read(path) {
                Ok(bytes) => Ok(bytes),
                Err(error) => {
                    // Whatever is in it has not been seen: its stamp is not kept, it is read again.
                    sooner(&mut scan.look_again, now + self.config.rescan.min(UNREADABLE_RETRY));
                    let problems = vec![format!("{}: {error}", path.display())];
                    if state.problems != problems {
                        tracing::error!(running = state.pods.len(), "{}", problems[0]);
                        state.problems = problems;
                        scan.changed = true;
                    }
                    return;
                }
            }
        };
        let is_open = |events: &Events| events.is_open(path.file_name().unwrap_or_default());
        if self.events.as_ref().is_some_and(is_open) {
            // Whoever began to write while it was read will close it: that is when it is complete.
            state.unsettled = Some(Unsettled { stamp, since: now, patience: UNVOUCHED.max(self.config.settle) });
            sooner(&mut scan.look_again, now + UNVOUCHED);
            return;
        }
        state.unsettled = None;
        let digest = content.as_ref().ok().map(|bytes| <[u8; 32]>::from(Sha256::digest(bytes)));
        state.stamp = Some(stamp);
        if digest.is_some() && digest == state.digest {
            return;
        }
        state.digest = digest;
        let accepted = self.accepted(path);
        let state = self.files.entry(path.to_owned()).or_default();
        let origin = Origin {
            path,
            node_name: &self.config.node_name,
            seen: self.config.clock.now(),
            allowed_unsafe_sysctls: &self.config.allowed_unsafe_sysctls,
        };
        let read = content.and_then(|bytes| {
            let manifest = read_manifest(&bytes, &origin, &accepted);
            for warning in &manifest.warnings {
                tracing::warn!("{warning}");
            }
            state.warnings = manifest.warnings;
            if manifest.errors.is_empty() { Ok((manifest.pods, manifest.objects)) } else { Err(manifest.errors) }
        });
        scan.changed = true;
        match read {
            Ok((pods, objects)) => {
                state.problems.clear();
                let uid = |pod: &StaticPod| pod.pod.metadata.uid.clone().unwrap_or_default();
                self.fresh.extend(pods.iter().map(uid).filter(|new| !accepted.iter().any(|old| uid(old) == *new)));
                (state.pods, state.objects) = (pods, objects);
                let saved = self.store.save(path, &state.pods, &state.objects);
                state.unsaved = saved.is_err();
                if let Err(error) = saved {
                    tracing::warn!(%error, "accepted pods are not on record yet");
                }
            }
            Err(problems) => {
                for problem in &problems {
                    tracing::error!(running = state.pods.len(), "{problem}");
                }
                state.problems = told_with(problems, &state.pods);
            }
        }
    }

    /// What could not be put on record is tried again at each look.
    fn save_again(&mut self) {
        for (path, state) in self.files.iter_mut().filter(|(_, state)| state.unsaved) {
            match self.store.save(path, &state.pods, &state.objects) {
                Ok(()) => state.unsaved = false,
                Err(error) => tracing::debug!(%error, "accepted pods are not on record yet"),
            }
        }
    }

    /// The pods that are accepted, the file's own first: a file that was renamed or copied stands for the pod that runs.
    fn accepted(&self, path: &Path) -> Vec<StaticPod> {
        let own = self.files.get(path).into_iter();
        let others = self.files.iter().filter(|(other, _)| *other != path).map(|(_, state)| state);
        own.chain(others).flat_map(|state| state.pods.iter().cloned()).collect()
    }

    fn settle_missing(&mut self, present: &BTreeSet<PathBuf>, now: Instant, scan: &mut Scan) {
        let settle = self.config.settle;
        let mut gone = Vec::new();
        for (path, state) in self.files.iter_mut().filter(|(path, _)| !present.contains(*path)) {
            let deadline = *state.missing_since.get_or_insert(now) + settle;
            if now < deadline {
                state.stamp = None;
                sooner(&mut scan.look_again, deadline);
            } else {
                gone.push(path.clone());
            }
        }
        for path in gone {
            tracing::info!(path = %path.display(), "manifest removed");
            self.files.remove(&path);
            if let Err(error) = self.store.remove(&path) {
                tracing::warn!(%error, "record of a removed manifest stays");
            }
            scan.changed = true;
        }
    }

    /// One file per pod and object: the one that has it keeps it, else the first by path. Who loses is told once, and on record:
    /// after a restart nothing changes hands either.
    fn assign_owners(&mut self, first: bool) {
        let mut owners: BTreeMap<String, PathBuf> = BTreeMap::new();
        for (path, state) in &self.files {
            for name in state.names() {
                if self.owners.get(&name) == Some(path) || !owners.contains_key(&name) {
                    owners.insert(name, path.clone());
                }
            }
        }
        let mut lost = BTreeSet::new();
        for (path, state) in &self.files {
            let others = |name: &String| owners.get(name).filter(|owner| *owner != path).cloned();
            lost.extend(state.names().filter_map(|name| others(&name).map(|owner| (path.clone(), name, owner))));
        }
        for entry @ (path, name, owner) in lost.difference(&self.lost) {
            tracing::warn!("{}: it has no effect", duplicate(entry));
            let pods = self.files.get(path).into_iter().flat_map(|state| &state.pods);
            let why = || format!("{} is already defined by {}", path.display(), owner.display());
            self.rejected.extend(pods.filter(|pod| pod_name(pod) == *name).map(|pod| (pod.pod.clone(), why())));
        }
        // At the start the record is of before: what was settled while no agent ran leaves it too.
        if lost != self.lost || first || self.owners_unsaved {
            let contested = lost.iter().map(|(_, name, owner)| (name.clone(), owner.clone())).collect();
            let saved = self.store.save_owners(&contested);
            if let (Err(error), false) = (&saved, self.owners_unsaved) {
                tracing::warn!(%error, "which file has a name is not on record");
            }
            self.owners_unsaved = saved.is_err();
        }
        (self.owners, self.lost) = (owners, lost);
    }

    /// The pods of all files, each name once.
    pub fn update(&self) -> SourceUpdate {
        let mut update = SourceUpdate {
            source: SourceName::File,
            pods: Vec::new(),
            fresh: self.fresh.clone(),
            objects: Vec::new(),
            problems: Vec::new(),
            rejected: self.rejected.clone(),
            is_remembered: false,
            withheld: Vec::new(),
        };
        let mut uids = BTreeSet::new();
        for (path, state) in &self.files {
            update.problems.extend(state.problems.iter().cloned());
            update.problems.extend(state.warnings.iter().map(|warning| format!("{WARNING}{warning}")));
            let is_ours = |name: &String| self.owners.get(name) == Some(path);
            update.objects.extend(state.objects.iter().filter(|object| is_ours(&object.name().to_string())).cloned());
            for pod in state.pods.iter().filter(|pod| is_ours(&pod_name(pod))) {
                if uids.insert(pod.pod.metadata.uid.clone()) {
                    update.pods.push(pod.pod.clone());
                } else {
                    update.problems.push(format!("{}: the UID of {} is another pod's", path.display(), pod_name(pod)));
                }
            }
        }
        update.problems.extend(self.lost.iter().map(duplicate));
        update
    }
}

/// What is wrong with a file, with the pods that go on as it had them before: a problem names the file, and users ask by pod.
fn told_with(mut problems: Vec<String>, pods: &[StaticPod]) -> Vec<String> {
    if !pods.is_empty() {
        let names: Vec<String> = pods.iter().map(|pod| pod.full_name().to_string()).collect();
        for problem in &mut problems {
            problem.push_str(&format!(" (pod {} stays as it was)", names.join(", ")));
        }
    }
    problems
}

fn stamp_of(metadata: &fs::Metadata) -> Stamp {
    Stamp {
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.size(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    }
}

fn sooner(at: &mut Option<Instant>, candidate: Instant) {
    *at = Some(at.map_or(candidate, |at| at.min(candidate)));
}

/// Runs the source until `shutdown`; each change of the set is sent whole.
pub async fn run(config: FileSourceConfig, updates: mpsc::Sender<SourceUpdate>, shutdown: CancellationToken) {
    let mut watch = Watch::new(&config.path);
    let mut scanner = Scanner::new(config.clone());
    let mut vouched = BTreeSet::new();
    let (mut published, mut dirty) = (false, true);
    loop {
        let mut names = std::mem::take(&mut vouched);
        let events = watch.events();
        let watching = events.is_some();
        scanner.events = events;
        let look = tokio::task::spawn_blocking(move || {
            names.extend(scanner.events.iter().flat_map(Events::take_complete));
            let scan = scanner.scan(Instant::now(), &names);
            (scanner, scan, names)
        });
        let Ok((back, scan, names)) = look.await else {
            tracing::error!("the file source died");
            return;
        };
        scanner = back;
        // What was written before the watch began has no event.
        scanner.watched = watching;
        if scanner.unreadable {
            vouched = names;
        }
        dirty |= scan.changed;
        if dirty && (published || scanner.is_ready()) {
            (published, dirty) = (true, false);
            let update = scanner.update();
            scanner.fresh.clear();
            scanner.rejected.clear();
            if updates.send(update).await.is_err() {
                return;
            }
        }
        let pause = if scanner.folder_missing { config.rescan.min(Duration::from_secs(1)) } else { config.rescan };
        let until = (Instant::now() + pause).min(scan.look_again.unwrap_or(Instant::now() + pause));
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep_until(until) => {}
            () = watch.changed() => {}
        }
        watch.ensure(&config.path);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    struct Folder {
        root: tempfile::TempDir,
        now: Instant,
    }

    impl Folder {
        fn new() -> Folder {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir(root.path().join("m")).unwrap();
            Folder { root, now: Instant::now() }
        }

        fn scanner(&self) -> Scanner {
            Scanner::new(FileSourceConfig {
                path: self.root.path().join("m"),
                node_name: "n".into(),
                kubelet_root: self.root.path().join("k"),
                settle: Duration::from_millis(300),
                rescan: Duration::from_secs(20),
                allowed_unsafe_sysctls: Vec::new(),
                clock: Clock::default(),
            })
        }

        /// Writes a file as if it had been there for a while.
        fn write(&self, name: &str, text: &str) {
            let path = self.root.path().join("m").join(name);
            fs::write(&path, text).unwrap();
            let old = SystemTime::now() - Duration::from_secs(10);
            fs::File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
        }

        fn remove(&self, name: &str) {
            fs::remove_file(self.root.path().join("m").join(name)).unwrap();
        }
    }

    fn pod(name: &str, image: &str) -> String {
        format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{containers: [{{name: c, image: {image}}}]}}\n")
    }

    fn names(scanner: &Scanner) -> Vec<String> {
        let images = |p: &k8s_openapi::api::core::v1::Pod| p.spec.as_ref().unwrap().containers[0].image.clone().unwrap();
        scanner.update().pods.iter().map(|p| format!("{}={}", crate::pod::name(p), images(p))).collect()
    }

    const NONE: &BTreeSet<OsString> = &BTreeSet::new();

    #[tokio::test]
    async fn what_the_next_writer_has_begun_is_not_read_on_the_word_of_the_last() {
        let folder = Folder::new();
        let path = folder.root.path().join("m");
        let watch = Watch::new(&path);
        let mut scanner = folder.scanner();
        (scanner.events, scanner.watched) = (watch.events(), true);
        let events = watch.events().unwrap();
        fs::write(path.join("a.yaml"), pod("a", "i1")).unwrap();
        assert!(scanner.scan(folder.now, &events.take_complete()).changed);
        fs::write(path.join("a.yaml"), pod("a", "i2")).unwrap();
        let vouched = events.take_complete();
        let mut file = fs::File::create(path.join("a.yaml")).unwrap();
        file.write_all(pod("half", "i3").as_bytes()).unwrap();
        assert!(!scanner.scan(folder.now, &vouched).changed && names(&scanner) == ["a-n=i1"], "half of a file");
        fs::write(path.join("a.yaml"), pod("a", "i4")).unwrap();
        drop(file);
        assert!(scanner.scan(folder.now, &events.take_complete()).changed);
        assert_eq!(names(&scanner), ["a-n=i4"]);
        // Begun, and not ended when the events are taken: complete is what is closed.
        let file = fs::File::create(path.join("a.yaml")).unwrap();
        assert!(events.take_complete().is_empty());
        drop(file);
        assert_eq!(events.take_complete().len(), 1);
    }

    #[test]
    fn a_folder_that_cannot_be_read_leaves_the_pods_alone() {
        let folder = Folder::new();
        folder.write("a.yaml", &pod("a", "i"));
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        let (path, away) = (folder.root.path().join("m"), folder.root.path().join("away"));
        fs::rename(&path, &away).unwrap();
        // ELOOP stands for EACCES and EMFILE, which root and a test cannot have.
        std::os::unix::fs::symlink("m", &path).unwrap();
        for seconds in [1, 2] {
            let scan = scanner.scan(folder.now + Duration::from_secs(seconds), NONE);
            assert!(!scan.changed && scan.look_again.is_some());
        }
        assert_eq!(names(&scanner), ["a-n=i"]);
        fs::remove_file(&path).unwrap();
        fs::rename(&away, &path).unwrap();
        assert!(!scanner.scan(folder.now + Duration::from_secs(3), NONE).changed);
        assert!(scanner.is_ready());
    }

    #[test]
    fn a_file_from_the_future_settles_too() {
        let folder = Folder::new();
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        folder.write("a.yaml", &pod("a", "i"));
        let path = folder.root.path().join("m/a.yaml");
        fs::File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_modified(SystemTime::now() + Duration::from_secs(86_400))
            .unwrap();
        let at = |millis| folder.now + Duration::from_millis(millis);
        assert!(scanner.scan(at(1000), NONE).look_again.is_some());
        assert!(scanner.scan(at(1299), NONE).look_again.is_some() && names(&scanner).is_empty());
        assert!(scanner.scan(at(1300), NONE).changed);
        assert_eq!(names(&scanner), ["a-n=i"]);
    }

    #[test]
    fn only_manifests_count_and_links_are_followed() {
        let folder = Folder::new();
        folder.write("b.yaml", &pod("b", "i"));
        folder.write(".a.yaml", &pod("hidden", "i"));
        folder.write("c.txt", &pod("text", "i"));
        folder.write("d.yml", &format!("{}---\n{}", pod("d", "i"), pod("e", "i")));
        fs::create_dir(folder.root.path().join("m/sub.yaml")).unwrap();
        fs::write(folder.root.path().join("target"), pod("linked", "i")).unwrap();
        std::os::unix::fs::symlink("../target", folder.root.path().join("m/l.yaml")).unwrap();
        let mut scanner = folder.scanner();
        assert!(scanner.scan(folder.now, &BTreeSet::from(["l.yaml".into()])).changed);
        assert_eq!(names(&scanner), ["b-n=i", "d-n=i", "e-n=i", "linked-n=i"]);
        assert!(!scanner.scan(folder.now, NONE).changed);
    }

    #[test]
    fn an_edit_counts_at_once_when_an_event_vouches_for_it_and_later_otherwise() {
        let folder = Folder::new();
        folder.write("a.yaml", &pod("a", "i"));
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        fs::write(folder.root.path().join("m/a.yaml"), pod("a", "j")).unwrap();
        let scan = scanner.scan(folder.now, NONE);
        assert_eq!(scan, Scan { changed: false, look_again: Some(folder.now + Duration::from_millis(300)) });
        assert_eq!(names(&scanner), ["a-n=i"]);
        let scan = scanner.scan(folder.now, &BTreeSet::from(["a.yaml".into()]));
        assert!(scan.changed && scan.look_again.is_none());
        assert_eq!(names(&scanner), ["a-n=j"]);
    }

    #[test]
    fn a_removal_counts_after_a_short_absence_only() {
        let folder = Folder::new();
        folder.write("a.yaml", &pod("a", "i"));
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        folder.remove("a.yaml");
        let soon = folder.now + Duration::from_millis(10);
        assert_eq!(scanner.scan(soon, NONE).look_again, Some(soon + Duration::from_millis(300)));
        folder.write("a.yaml", &pod("a", "i"));
        assert!(!scanner.scan(soon + Duration::from_millis(20), NONE).changed, "it came back as it was");
        folder.remove("a.yaml");
        let later = soon + Duration::from_secs(1);
        assert!(!scanner.scan(later, NONE).changed);
        assert!(scanner.scan(later + Duration::from_millis(300), NONE).changed);
        assert!(names(&scanner).is_empty());
    }

    #[test]
    fn a_broken_file_keeps_its_pods_and_is_named() {
        let folder = Folder::new();
        folder.write("a.yaml", &pod("a", "i"));
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        for broken in ["", "apiVersion: v1\nkind: Pod\nmetadata: {", "a: [", &pod("A", "i")] {
            folder.write("a.yaml", broken);
            assert!(scanner.scan(folder.now, NONE).changed);
            assert_eq!(names(&scanner), ["a-n=i"], "{broken:?}");
            let problems = scanner.update().problems;
            assert!(problems[0].starts_with(&folder.root.path().join("m/a.yaml").display().to_string()), "{problems:?}");
            assert!(problems[0].ends_with(" (pod default/a-n stays as it was)"), "{problems:?}");
        }
        folder.write("a.yaml", &pod("a", "k"));
        scanner.scan(folder.now, NONE);
        assert!(scanner.update().problems.is_empty());
        assert_eq!(names(&scanner), ["a-n=k"]);
    }

    #[test]
    fn the_file_that_has_a_name_keeps_it() {
        let folder = Folder::new();
        folder.write("b.yaml", &pod("web", "first"));
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        folder.write("a.yaml", &pod("web", "second"));
        scanner.scan(folder.now, NONE);
        assert_eq!(names(&scanner), ["web-n=first"]);
        assert!(scanner.update().problems[0].contains("a.yaml: pod default/web-n is already defined by"));
        // Also after a restart.
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        assert_eq!(names(&scanner), ["web-n=first"]);
        folder.remove("b.yaml");
        scanner.scan(folder.now, NONE);
        scanner.scan(folder.now + Duration::from_secs(1), NONE);
        assert_eq!(names(&scanner), ["web-n=second"]);
    }

    #[test]
    fn a_name_stays_with_its_file_over_restarts_whichever_comes_first() {
        let folder = Folder::new();
        let config_map = |text: &str| format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: cfg}}\ndata: {{a: {text}}}\n");
        let held = |scanner: &Scanner| match &scanner.update().objects[..] {
            [Object::ConfigMap(map)] => map.data.as_ref().unwrap()["a"].clone(),
            other => panic!("{other:?}"),
        };
        folder.write("b.yaml", &config_map("first"));
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        folder.write("a.yaml", &config_map("before"));
        folder.write("c.yaml", &config_map("behind"));
        scanner.scan(folder.now, NONE);
        assert_eq!(held(&scanner), "first");
        let told = scanner.update().problems;
        assert!(told.len() == 2 && told[0].contains("a.yaml: ConfigMap default/cfg is already defined by"), "{told:?}");
        assert!(told[0].ends_with("b.yaml"), "{told:?}");
        // The copy that sorts first, and the one behind, have it after a restart no more than before.
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        assert_eq!(held(&scanner), "first");
        folder.write("b.yaml", &config_map("edited"));
        scanner.scan(folder.now, NONE);
        assert_eq!(held(&scanner), "edited", "an edit of the owner arrives");
        for name in ["a.yaml", "c.yaml"] {
            folder.remove(name);
        }
        scanner.scan(folder.now, NONE);
        scanner.scan(folder.now + Duration::from_secs(1), NONE);
        assert!(scanner.update().problems.is_empty());
        assert!(!folder.root.path().join("k/static-pods/owners").exists(), "nothing is contested any more");
    }

    #[test]
    fn a_pod_that_another_file_has_is_rejected_once() {
        let folder = Folder::new();
        folder.write("b.yaml", &pod("web", "first"));
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        folder.write("a.yaml", &pod("web", "second"));
        scanner.scan(folder.now, NONE);
        let rejected = std::mem::take(&mut scanner.rejected);
        assert!(rejected.len() == 1 && rejected[0].1.ends_with("b.yaml"), "{rejected:?}");
        folder.write("a.yaml", &pod("web", "third"));
        scanner.scan(folder.now, NONE);
        assert!(scanner.rejected.is_empty() && names(&scanner) == ["web-n=first"]);
    }

    #[test]
    fn accepted_pods_outlive_a_restart_with_a_broken_file() {
        let folder = Folder::new();
        folder.write("a.yaml", &pod("a", "i"));
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        let before = scanner.update().pods;
        folder.write("a.yaml", "{{{");
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        assert!(scanner.is_ready());
        assert_eq!(scanner.update().pods, before);
        // A file that went meanwhile holds the first set back until it has been away long enough.
        folder.remove("a.yaml");
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        assert!(!scanner.is_ready());
        scanner.scan(folder.now + Duration::from_millis(300), NONE);
        assert!(scanner.is_ready() && scanner.update().pods.is_empty());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_read_again() {
        let folder = Folder::new();
        folder.write("a.yaml", &pod("a", "i"));
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        let path = folder.root.path().join("m/a.yaml");
        fs::remove_file(&path).unwrap();
        // A regular file whose reading fails with EIO, whoever reads it.
        std::os::unix::fs::symlink("/proc/self/mem", &path).unwrap();
        let vouched = BTreeSet::from(["a.yaml".into()]);
        let at = |millis| folder.now + Duration::from_millis(millis);
        let scan = scanner.scan(at(10), &vouched);
        assert_eq!((scan.changed, scan.look_again), (true, Some(at(1010))), "its problem is told, and it is tried again");
        assert!(scanner.update().problems[0].contains("a.yaml: "));
        assert_eq!(names(&scanner), ["a-n=i"], "what it stood for stays");
        let scan = scanner.scan(at(20), &vouched);
        assert_eq!((scan.changed, scan.look_again), (false, Some(at(1020))), "again, and told once");
        // When it can be read it is.
        fs::remove_file(&path).unwrap();
        folder.write("a.yaml", &pod("a", "j"));
        assert!(scanner.scan(at(30), NONE).changed);
        assert_eq!(names(&scanner), ["a-n=j"]);
    }

    #[test]
    fn a_file_that_is_being_written_waits_for_its_writer_while_events_come() {
        let folder = Folder::new();
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        scanner.watched = true;
        let at = |millis| folder.now + Duration::from_millis(millis);
        // The first of two pods, and then nothing for a while.
        let path = folder.root.path().join("m/a.yaml");
        fs::write(&path, pod("a", "i")).unwrap();
        assert!(scanner.scan(at(0), NONE).look_again.is_some());
        assert!(!scanner.scan(at(5000), NONE).changed && names(&scanner).is_empty());
        fs::write(&path, format!("{}---\n{}", pod("a", "i"), pod("b", "i"))).unwrap();
        assert!(scanner.scan(at(5001), &BTreeSet::from(["a.yaml".into()])).changed);
        assert_eq!(names(&scanner), ["a-n=i", "b-n=i"]);
        // Of a writer that dies nothing is ever heard.
        fs::write(&path, pod("b", "j")).unwrap();
        assert!(scanner.scan(at(6000), NONE).look_again == Some(at(36_000)));
        assert!(scanner.scan(at(36_000), NONE).changed);
    }

    #[test]
    fn young_files_settle_before_the_first_set_is_published() {
        let folder = Folder::new();
        folder.write("old.yaml", &pod("old", "i"));
        fs::write(folder.root.path().join("m/young.yaml"), pod("young", "i")).unwrap();
        let mut scanner = folder.scanner();
        let at = |millis| folder.now + Duration::from_millis(millis);
        assert_eq!(scanner.scan(at(0), NONE).look_again, Some(at(300)));
        assert!(!scanner.is_ready() && names(&scanner) == ["old-n=i"]);
        scanner.scan(at(300), NONE);
        assert!(scanner.is_ready());
        assert_eq!(names(&scanner), ["old-n=i", "young-n=i"]);
        // One that never settles holds nothing back for ever.
        let mut scanner = folder.scanner();
        for step in 0..=10 {
            fs::write(
                folder.root.path().join("m/young.yaml"),
                format!("{}\n{}", "#".repeat(step as usize + 1), pod("young", "i")),
            )
            .unwrap();
            scanner.scan(at(300 * step), NONE);
            assert_eq!(scanner.is_ready(), step == 10, "{step}");
        }
    }

    #[test]
    fn what_could_not_be_put_on_record_is_put_there_later() {
        let folder = Folder::new();
        folder.write("a.yaml", &pod("a", "i"));
        let store = folder.root.path().join("k/static-pods");
        fs::create_dir(folder.root.path().join("k")).unwrap();
        fs::write(&store, "in the way").unwrap();
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        fs::remove_file(&store).unwrap();
        scanner.scan(folder.now, NONE);
        folder.write("a.yaml", "{{{");
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, NONE);
        assert_eq!(names(&scanner), ["a-n=i"]);
    }

    #[test]
    fn large_files_are_refused_unread() {
        let folder = Folder::new();
        folder.write("a.yaml", "");
        let path = folder.root.path().join("m/a.yaml");
        fs::File::options().write(true).open(path).unwrap().set_len(MAX_FILE + 1).unwrap();
        let mut scanner = folder.scanner();
        scanner.scan(folder.now, &BTreeSet::from(["a.yaml".into()]));
        assert!(scanner.update().problems[0].ends_with("larger than 10 MB"));
    }
}
