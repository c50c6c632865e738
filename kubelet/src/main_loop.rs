//! The kubelet's main loop: sources in, workers out, container events between. Owns which pods have a worker; what a pod
//! needs is its worker's business.

mod allotting;
mod letting_in;
mod orders;
mod resizing;
mod second_look;

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::allotting::{Allotment, Allotting};
use self::second_look::SecondLooks;
use crate::admission::NodeConditions;
use crate::api::{self, ApiPods};
use crate::control::{Order, PodControl};
use crate::cri as calls;
use crate::events::{self, RuntimeEvent};
use crate::execute::Executor;
use crate::housekeeping::Strays;
use crate::memory::{Pending, Termination};
use crate::metrics::families;
use crate::objects::Object;
use crate::observed::{Listing, list_all};
use crate::pod::{self, FullName, PodUid};
use crate::record::Weight;
use crate::resources::{QosClass, pod_cpu_request, qos_class};
use crate::saved_status::SavedStatus;
use crate::server::Health;
use crate::source::file::{self, FileSourceConfig};
use crate::source::{SourceName, SourceUpdate, Withheld};
use crate::status::is_terminal_phase;
use crate::table::PodTable;
use crate::worker::{Message, Outlet, Worker, mailbox};
use crate::{Result, hook_record, housekeeping, logs, orphan};

/// How long what the sources keep on disk is waited for at the end.
const SOURCES_END: Duration = Duration::from_secs(2);

/// A worker seen from outside.
struct Handle {
    /// With the resources that it has been given.
    pod: Arc<Pod>,
    /// Those that it waits for.
    pending: Option<Pending>,
    name: FullName,
    inbox: Outlet,
    ending: bool,
    /// What the last listing had of the pod.
    listed: Vec<(String, i32)>,
}

impl Handle {
    /// The pod as its source has it.
    fn wanted(&self) -> &Arc<Pod> {
        self.pending.as_ref().map_or(&self.pod, |pending| &pending.wanted)
    }
}

enum Action {
    Source(SourceUpdate),
    Event(RuntimeEvent),
    Ordered(Order),
    Ended(PodUid, bool),
    Allotted(PodUid, Allotment),
    Relist,
    Listed(Result<Listing>),
    CollectGarbage,
    Stop,
}

/// The loop and what it owns.
pub(crate) struct Main {
    executor: Executor,
    table: PodTable,
    health: Health,
    stop: CancellationToken,
    workers: BTreeMap<PodUid, Handle>,
    tasks: JoinSet<(PodUid, bool)>,
    /// Pods whose name, or UID, a worker that is ending still has.
    queued: BTreeMap<PodUid, Arc<Pod>>,
    /// Why queued pods wait, where it is a port of the host or a class that is not there.
    refused: BTreeMap<PodUid, String>,
    /// Pods that were not let in: they have failed, and stay so for as long as their source has them.
    rejected: BTreeSet<PodUid>,
    /// Who is being given devices and processors.
    allotting: Allotting,
    /// Pods for which the node's object is asked for again.
    second_looks: SecondLooks,
    /// What new pods are judged by.
    conditions: NodeConditions,
    orders: mpsc::UnboundedReceiver<Order>,
    control: PodControl,
    /// Pods that began a life and have not been taken up yet.
    fresh: BTreeSet<String>,
    /// What the last listing found in the runtime: it had its ports first.
    present: BTreeSet<PodUid>,
    sources: BTreeMap<SourceName, Vec<Arc<Pod>>>,
    objects: BTreeMap<SourceName, Vec<Object>>,
    /// What each source cannot carry out.
    problems: BTreeMap<SourceName, Vec<String>>,
    configured: Vec<SourceName>,
    /// Sources of which only what they last said is known.
    remembered: BTreeSet<SourceName>,
    /// Of those, pods that are not started.
    withheld: BTreeMap<PodUid, Withheld>,
    /// What the API server has of this node's pods.
    api: ApiPods,
    updates: mpsc::Receiver<SourceUpdate>,
    events: mpsc::Receiver<RuntimeEvent>,
    has_events: bool,
    listing: Option<tokio::task::JoinHandle<Result<Listing>>>,
    /// The sources that were ready when a listing was acted on: of their pods it is known what runs. `None` before the first one.
    listed: Option<BTreeSet<SourceName>>,
    /// Pods that ended since the running listing began: it may still have them.
    ended: BTreeSet<PodUid>,
    relist_at: Instant,
    /// When the last listing began.
    listed_at: Option<Instant>,
    garbage_at: Instant,
    /// Locked by the task that collects, which is one at a time.
    strays: Arc<Mutex<Strays>>,
}

impl Main {
    pub(crate) fn new(
        executor: Executor,
        table: PodTable,
        health: Health,
        (control, orders): (PodControl, mpsc::UnboundedReceiver<Order>),
        stop: CancellationToken,
    ) -> Main {
        let (sender, updates) = mpsc::channel(16);
        let mut configured = Vec::new();
        if let Some(path) = &executor.config.manifests {
            configured.push(SourceName::File);
            let source = FileSourceConfig {
                path: path.clone(),
                node_name: executor.config.node_name.clone(),
                kubelet_root: executor.config.kubelet_root.clone(),
                settle: executor.config.timing.removal_settle,
                rescan: executor.config.timing.rescan,
                allowed_unsafe_sysctls: executor.config.allowed_unsafe_sysctls.clone(),
                clock: executor.config.clock.clone(),
            };
            tokio::spawn(file::run(source, sender.clone(), stop.clone()));
        }
        let api = ApiPods::default();
        if let Some(server) = &executor.config.api {
            configured.push(SourceName::Api);
            if executor.config.manifests.is_none() {
                api.set_static(Vec::new());
            }
            api::start_pods(server, &executor, (&table, &api), sender, &stop);
        }
        let (event_sender, events) = mpsc::channel(1000);
        tokio::spawn(events::run(executor.runtime.clone(), event_sender, stop.clone()));
        let now = Instant::now();
        Main {
            garbage_at: now + executor.config.timing.garbage,
            strays: Arc::new(Mutex::new(Strays::at_start(&executor.config.kubelet_root))),
            executor,
            table,
            health,
            stop,
            workers: BTreeMap::new(),
            tasks: JoinSet::new(),
            queued: BTreeMap::new(),
            refused: BTreeMap::new(),
            rejected: BTreeSet::new(),
            allotting: Allotting::default(),
            second_looks: SecondLooks::default(),
            conditions: NodeConditions::default(),
            orders,
            control,
            fresh: BTreeSet::new(),
            present: BTreeSet::new(),
            sources: BTreeMap::new(),
            objects: BTreeMap::new(),
            problems: BTreeMap::new(),
            configured,
            remembered: BTreeSet::new(),
            withheld: BTreeMap::new(),
            api,
            updates,
            events,
            has_events: false,
            listing: None,
            listed: None,
            ended: BTreeSet::new(),
            relist_at: now,
            listed_at: None,
        }
    }

    pub(crate) async fn run(&mut self) {
        loop {
            let action = self.next_action().await;
            self.health.turned();
            if let Action::Stop = action {
                return;
            }
            self.apply(action);
        }
    }

    async fn next_action(&mut self) -> Action {
        let idle = self.listing.is_none();
        let listing = async {
            match &mut self.listing {
                Some(task) => task.await,
                None => pending().await,
            }
        };
        let allotted = self.allotting.next();
        let heartbeat = Instant::now() + self.executor.config.timing.stuck / 3;
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Action::Stop,
            Some(order) = self.orders.recv() => Action::Ordered(order),
            Some(update) = self.updates.recv() => Action::Source(update),
            Some(Ok((uid, gone))) = self.tasks.join_next() => Action::Ended(uid, gone),
            (uid, allotted) = allotted => Action::Allotted(uid, allotted),
            Some(event) = self.events.recv() => Action::Event(event),
            listed = listing => Action::Listed(match listed {
                Ok(listed) => listed,
                Err(_) => return Action::Stop,
            }),
            () = tokio::time::sleep_until(self.relist_at), if idle => Action::Relist,
            () = tokio::time::sleep_until(self.garbage_at) => Action::CollectGarbage,
            () = tokio::time::sleep_until(heartbeat) => Action::Relist,
        }
    }

    fn apply(&mut self, action: Action) {
        match action {
            Action::Source(update) => self.set_source(update),
            Action::Event(event) => self.take_event(event),
            Action::Ordered(order) => self.carry_out(order),
            Action::Ended(uid, gone) => self.worker_ended(&uid, gone),
            Action::Allotted(uid, allotted) => self.take_allotted(uid, allotted),
            Action::Relist => self.begin_listing(),
            Action::Listed(listed) => {
                self.listing = None;
                self.take_listing(listed);
            }
            Action::CollectGarbage => {
                self.garbage_at = Instant::now() + self.executor.config.timing.garbage;
                self.collect_garbage();
            }
            Action::Stop => {}
        }
    }

    fn all_sources_ready(&self) -> bool {
        self.configured.iter().all(|source| self.has_spoken(*source))
    }

    /// Whether what the source wants now is known: what it does not have is wanted by nobody.
    fn has_spoken(&self, source: SourceName) -> bool {
        self.sources.contains_key(&source) && !self.remembered.contains(&source)
    }

    /// Whether a pod of this source that is not among its pods is wanted by nobody: it has said what it wants, or it is not used any
    /// more.
    fn is_settled(&self, source: SourceName) -> bool {
        match self.configured.contains(&source) {
            true => self.has_spoken(source),
            false => self.all_sources_ready(),
        }
    }

    /// Whether a listing has been acted on since all sources are ready.
    fn all_listed(&self) -> bool {
        let is_listed = |source, listed: &BTreeSet<_>| self.has_spoken(source) && listed.contains(&source);
        self.listed.as_ref().is_some_and(|listed| self.configured.iter().all(|source| is_listed(*source, listed)))
    }

    fn set_source(&mut self, update: SourceUpdate) {
        // Each source speaks of its own alone.
        self.problems.insert(update.source, update.problems);
        self.health.set_problems(self.problems.values().flatten().cloned().collect());
        for (pod, why) in update.rejected {
            let text = format!("Error validating pod {} from file due to duplicate pod name: {why}", pod::format_pod(&pod));
            self.executor.recorder.event(&pod, None, Weight::Warning, "FailedValidation", &text);
        }
        self.fresh.extend(update.fresh);
        if self.objects.get(&update.source).map_or(&[][..], Vec::as_slice) != update.objects {
            self.objects.insert(update.source, update.objects);
            // The sources are few and asked in one order: of two objects of a name the first source's counts.
            self.executor.objects.local().replace(self.objects.values().rev().flatten().cloned().collect());
            for handle in self.workers.values() {
                let _ = handle.inbox.send(Message::ObjectsChanged);
            }
        }
        if update.source != SourceName::Api && self.executor.config.api.is_some() {
            self.api.set_static(update.pods.clone());
        }
        let mut first = self.sources.insert(update.source, update.pods).is_none();
        if update.is_remembered {
            self.remembered.insert(update.source);
            self.withheld = update.withheld.into_iter().filter_map(|one| Some((PodUid::of(&one.pod)?, one))).collect();
        } else if self.remembered.remove(&update.source) {
            // What runs and is wanted by nobody is only looked for now, and its name and ports may be another pod's.
            first = true;
            self.withheld.clear();
            if let Some(listed) = &mut self.listed {
                listed.remove(&update.source);
            }
        }
        self.reconcile();
        if first {
            self.relist_at = Instant::now();
        }
    }

    /// Workers for all wanted pods, ends for all others: removals before additions.
    fn reconcile(&mut self) {
        let mut wanted: BTreeMap<PodUid, Arc<Pod>> = BTreeMap::new();
        for pod in self.sources.values().flatten() {
            if let Some(uid) = PodUid::of(pod) {
                wanted.entry(uid).or_insert_with(|| self.with_classes(pod));
            }
        }
        for (uid, handle) in &mut self.workers {
            // A source that has not said yet what it wants ends nothing.
            let has_spoken = |source| self.sources.contains_key(&source) && !self.remembered.contains(&source);
            let is_told = SourceName::of(&handle.pod).is_none_or(has_spoken);
            if is_told && !wanted.contains_key(uid) && !handle.ending {
                tracing::info!(pod = %pod::format_pod(&handle.pod), "pod ends");
                end(handle);
            }
        }
        let remembered = self.remembered.clone();
        // A source that is not heard may still want what it has not been asked about.
        let is_unheard = |pod: &Pod| SourceName::of(pod).is_some_and(|source| remembered.contains(&source));
        self.queued.retain(|uid, pod| wanted.contains_key(uid) || is_unheard(pod));
        self.forget_refusals(|uid, table| {
            wanted.contains_key(uid) || !remembered.is_empty() && table.known(uid).is_some_and(|known| is_unheard(&known.pod))
        });
        let mut updates = Vec::new();
        self.allotting.forget(|uid| wanted.contains_key(uid));
        self.second_looks.retain(|uid| wanted.contains_key(uid));
        for (uid, pod) in wanted {
            match self.workers.get(&uid) {
                Some(handle) if !handle.ending => updates.push((uid, pod)),
                // One that was not let in has nothing to end, but its deletion to be finished.
                _ if self.rejected.contains(&uid) && !pod::is_deleting(&pod) => {}
                _ => _ = self.queued.insert(uid, pod),
            }
        }
        self.update(updates);
        self.start_queued();
        self.update_qos();
    }

    fn spawn(&mut self, uid: PodUid, pod: Arc<Pod>) {
        if self.fresh.remove(uid.as_str()) && !self.present.contains(&uid) {
            // An earlier life's logs and status would count as restarts of this one.
            logs::remove_pod(&self.executor.config.pod_logs_dir, &pod);
            SavedStatus::new(&self.executor.pod_dir(&pod)).remove();
            hook_record::forget(&self.executor.pod_dir(&pod));
        }
        let saved = SavedStatus::new(&self.executor.pod_dir(&pod)).load();
        let present = self.present.contains(&uid);
        let (pod, pending) = Main::resume_resize(&pod, saved.as_ref().filter(|_| present).map(|saved| &saved.status));
        if let Some(saved) = saved.filter(|saved| saved.is_over(present)) {
            // Until its worker has looked: what is over takes no room and no ports from the pods that come with it.
            self.table.set(&uid, &pod, saved.status);
        }
        let told = self.told_of(&uid);
        if let Some(ended) = told.as_ref().filter(|told| is_terminal_phase(told.phase.as_deref())) {
            self.table.set(&uid, &pod, ended.clone());
        }
        let (inbox, messages) = mailbox();
        let worker = Worker::new(
            uid.clone(),
            pod.clone(),
            self.executor.clone(),
            self.table.clone(),
            messages,
            inbox.downgrade(),
            (self.stop.clone(), told),
        );
        let name = FullName::of(&pod);
        tracing::info!(pod = %pod::format_pod(&pod), "pod is taken up");
        if let Some(pending) = pending.clone() {
            let _ = inbox.send(Message::ResizePending(pending));
        }
        self.workers.insert(uid.clone(), Handle { pod, pending, name, inbox, ending: false, listed: Vec::new() });
        self.tasks.spawn(async move {
            let gone = worker.run().await;
            (uid, gone)
        });
    }

    /// What has been said of a pod so far: that this kubelet has not let it in, or what the API server has.
    fn told_of(&mut self, uid: &PodUid) -> Option<PodStatus> {
        let refused = self.rejected.remove(uid).then(|| self.table.status(uid)).flatten();
        let held = || self.api.held(uid).filter(|held| held.mirror.is_none() && held.status.start_time.is_some());
        refused.or_else(|| Some(PodStatus::clone(&held()?.status)))
    }

    fn worker_ended(&mut self, uid: &PodUid, gone: bool) {
        let Some(handle) = self.workers.remove(uid) else { return };
        if gone {
            tracing::info!(pod = %pod::format_pod(&handle.pod), "pod is gone");
            self.release_allotments();
            if pod::is_static(&handle.pod) {
                // Its mirror has nothing to show any more.
                self.api.tell();
            }
        }
        self.executor.objects.release(uid);
        self.ended.insert(uid.clone());
        self.allotting.others_ended();
        self.retry_resizes();
        self.start_queued();
        self.update_qos();
    }

    fn take_event(&mut self, event: RuntimeEvent) {
        match event {
            RuntimeEvent::Changed(uid) => {
                let handle = PodUid::new(&uid).and_then(|uid| self.workers.get(&uid));
                if let Some(handle) = handle {
                    let _ = handle.inbox.send(Message::Look);
                }
            }
            RuntimeEvent::Connected => {
                self.has_events = true;
                // What happened before is only seen by looking.
                self.relist_at = Instant::now();
            }
            RuntimeEvent::Disconnected => {
                self.has_events = false;
                self.relist_at = self.relist_at.min(Instant::now() + self.relist_period());
            }
        }
    }

    fn relist_period(&self) -> Duration {
        let timing = &self.executor.config.timing;
        if self.has_events { timing.relist } else { timing.relist_without_events }
    }

    fn begin_listing(&mut self) {
        self.relist_at = Instant::now() + self.relist_period();
        if self.listing.is_none() {
            self.ended.clear();
            let runtime = self.executor.runtime.clone();
            let now = Instant::now();
            if let Some(before) = self.listed_at.replace(now) {
                runtime.metrics().observe(&families::RELIST_INTERVAL, &[], now.saturating_duration_since(before));
            }
            self.listing = Some(tokio::spawn(async move {
                let begun = Instant::now();
                let listed = list_all(&runtime).await;
                runtime.metrics().observe(&families::RELIST_SECONDS, &[], begun.elapsed());
                listed
            }));
        }
    }

    /// Wakes the workers of pods that changed, ends pods that nobody wants.
    fn take_listing(&mut self, listed: Result<Listing>) {
        let listing = match listed {
            Ok(listing) => listing,
            Err(error) => {
                tracing::warn!(error = %calls::message(&error), "the runtime cannot be listed");
                self.health.runtime_failed();
                return;
            }
        };
        self.health.runtime_answered();
        for (uid, handle) in &mut self.workers {
            let now = listing.get(uid.as_str()).map(|pod| pod.entries.clone()).unwrap_or_default();
            if now != handle.listed {
                handle.listed = now;
                let _ = handle.inbox.send(Message::Look);
            }
        }
        if self.sources.is_empty() && !self.configured.is_empty() {
            return;
        }
        for (uid, listed) in &listing {
            let Some(uid) = PodUid::new(uid) else { continue };
            // Whose source has not spoken may still be wanted: the API server may be away for long, and the node goes on.
            let source = listed.source.as_deref().and_then(SourceName::from_annotation);
            if !source.map_or(self.all_sources_ready(), |source| self.is_settled(source)) {
                continue;
            }
            let known = self.workers.contains_key(&uid) || self.queued.contains_key(&uid) || self.ended.contains(&uid);
            if known {
                continue;
            }
            let pod = orphan::describe(&uid, listed);
            self.executor.runtime.metrics().count(&families::ORPHANED_PODS, &[]);
            tracing::warn!(pod = %pod::format_pod(&pod), "nobody wants this pod: it ends");
            self.spawn(uid.clone(), Arc::new(pod));
            if let Some(handle) = self.workers.get_mut(&uid) {
                end(handle);
            }
        }
        let before = self.all_listed();
        self.listed.get_or_insert_default().extend(self.sources.keys());
        if !before && self.all_listed() {
            // Now it is known whose the folders are that an earlier kubelet has left.
            self.garbage_at = Instant::now();
        }
        self.judge_withheld(&listing);
        self.present = listing.keys().filter_map(|uid| PodUid::new(uid)).collect();
        self.allotting.others_ended();
        self.retry_resizes();
        self.start_queued();
        self.update_qos();
    }

    fn update_qos(&self) {
        let Some(cgroups) = self.executor.cgroups.clone() else { return };
        let burstable = self.workers.values().filter(|h| qos_class(&h.pod) == QosClass::Burstable);
        let millis = burstable.map(|h| pod_cpu_request(&h.pod)).sum();
        let none = self.workers.is_empty();
        tokio::task::spawn_blocking(move || {
            let updated = if none { cgroups.remove_empty() } else { cgroups.update_qos(millis) };
            if let Err(error) = updated {
                tracing::warn!(%error, "the QoS cgroups keep their weights");
            }
        });
    }

    fn collect_garbage(&self) {
        // Before the first listing nobody knows what runs of pods that are not wanted any more: they get their grace first.
        if !self.all_listed() {
            return;
        }
        self.release_allotments();
        let known: Vec<PodUid> = self.workers.keys().chain(self.queued.keys()).cloned().collect();
        self.executor.objects.forget_strays(&known, &self.executor.config.kubelet_root);
        let (config, cgroups) = (self.executor.config.clone(), self.executor.cgroups.clone());
        let drivers = self.executor.volumes.drivers.clone();
        let strays = self.strays.clone();
        tokio::task::spawn_blocking(move || {
            let mut strays = strays.lock().unwrap_or_else(PoisonError::into_inner);
            housekeeping::collect(&config, cgroups.as_ref(), &drivers, &known, &mut strays);
        });
        self.update_qos();
    }

    pub(crate) async fn stop(&mut self) {
        while self.tasks.join_next().await.is_some() {}
        // The sources end when what they keep on disk is there.
        let ended = async { while self.updates.recv().await.is_some() {} };
        if tokio::time::timeout(SOURCES_END, ended).await.is_err() {
            tracing::warn!("what the API server said last is not all on record");
        }
    }
}

/// Tells a worker that its pod is to end and to be forgotten.
fn end(handle: &mut Handle) {
    handle.ending = true;
    let grace = pod::deletion_grace_seconds(&handle.pod);
    let _ = handle.inbox.send(Message::Terminate(Termination { grace, forget: true }));
}
