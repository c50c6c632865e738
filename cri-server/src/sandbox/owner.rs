//! The owner task of a sandbox: picks an event, lets the state machine apply it, shows the result, answers, and starts the slow
//! work whose completion comes back as an event.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use berth_nri::api::Event as NriEvent;
use tokio::sync::{mpsc, oneshot};

use super::run;
use super::state::{Change, Done, Event, Machine, Op, Outbox, Reply, Task};
use crate::Server;
use crate::board::{ContainerView, SandboxView};
use crate::checkpoint;
use crate::container;
use crate::error::{Error, Shared};
use crate::id::{ContainerId, SandboxId};
use crate::nri;
use crate::progress::UNDO;
use crate::records::{self, ContainerRecord};
use crate::spec::{Resources, SandboxMetadata, SandboxSpec};
use crate::why;

/// Where an owner gets its events. In boxes: the room that a channel sets aside is for 32 of them at least, one for each sandbox.
#[derive(Clone)]
pub(crate) struct Mail(mpsc::UnboundedSender<Box<Event>>);

/// The owner's end.
pub(crate) type Inbox = mpsc::UnboundedReceiver<Box<Event>>;

/// The owner has ended.
pub(crate) struct Ended;

/// A mailbox and its owner's end.
pub(crate) fn mailbox() -> (Mail, Inbox) {
    let (mail, inbox) = mpsc::unbounded_channel();
    (Mail(mail), inbox)
}

impl Mail {
    /// Tells the owner, unless it has ended.
    pub(crate) fn send(&self, event: Event) -> Result<(), Ended> {
        self.0.send(Box::new(event)).map_err(|_| Ended)
    }
}

/// What an owner answers for at this moment.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    /// Something of the system may be held: processes, cgroups, network.
    pub(crate) system: bool,
    pub(crate) cgroup_parent: String,
    /// Also those being made or removed.
    pub(crate) containers: BTreeSet<ContainerId>,
}

impl Held {
    fn of(machine: &Machine) -> Self {
        Self { system: true, cgroup_parent: machine.spec.cgroup_parent.clone(), containers: BTreeSet::new() }
    }
}

#[derive(Default)]
struct Register {
    held: BTreeMap<SandboxId, Held>,
    owners: HashMap<SandboxId, Mail>,
    names: HashMap<SandboxMetadata, SandboxId>,
}

/// Who owns which sandbox.
#[derive(Default)]
pub(crate) struct Owners {
    register: Mutex<Register>,
}

impl Owners {
    fn lock(&self) -> MutexGuard<'_, Register> {
        self.register.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mailbox of a sandbox.
    pub(crate) fn get(&self, id: &SandboxId) -> Option<Mail> {
        self.lock().owners.get(id).cloned()
    }

    /// All sandboxes that have an owner.
    pub(crate) fn ids(&self) -> Vec<SandboxId> {
        self.lock().owners.keys().cloned().collect()
    }

    /// All sandboxes that have an owner, with what they are called.
    pub(crate) fn named(&self) -> Vec<(SandboxId, SandboxMetadata)> {
        self.lock().names.iter().map(|(metadata, id)| (id.clone(), metadata.clone())).collect()
    }

    /// What each owner answers for.
    pub(crate) fn held(&self) -> BTreeMap<SandboxId, Held> {
        self.lock().held.clone()
    }

    /// Brings [`Self::held`] up to date: before the work begins that makes something.
    fn hold(&self, machine: &Machine) {
        let mut register = self.lock();
        let held = register.held.entry(machine.id.clone()).or_insert_with(|| Held::of(machine));
        held.system = machine.holds();
        if held.containers.len() != machine.containers.len() || !held.containers.iter().eq(machine.containers.keys()) {
            held.containers = machine.containers.keys().cloned().collect();
        }
    }

    fn forget(&self, id: &SandboxId, metadata: &SandboxMetadata) {
        let mut register = self.lock();
        register.owners.remove(id);
        register.held.remove(id);
        if register.names.get(metadata) == Some(id) {
            register.names.remove(metadata);
        }
    }

    /// Registers a sandbox that the recovery found.
    pub(crate) fn register(&self, id: &SandboxId, metadata: &SandboxMetadata, mail: Mail) {
        let mut register = self.lock();
        register.owners.insert(id.clone(), mail);
        register.names.insert(metadata.clone(), id.clone());
    }
}

/// Submits RunPodSandbox: to the owner of the sandbox with this metadata, or to a new one.
pub(crate) fn submit_run(server: &Arc<Server>, spec: impl Into<Arc<SandboxSpec>>, reply: Reply<SandboxId>) {
    let spec: Arc<SandboxSpec> = spec.into();
    let mut register = server.owners.lock();
    if let Some(mail) = register.names.get(&spec.metadata).and_then(|id| register.owners.get(id)) {
        // Owners leave the register before they end, and answer what came before that.
        let _ = mail.send(Event::Op(Op::Run { spec, reply }));
        return;
    }
    let id = SandboxId::random();
    let (mail, inbox) = mailbox();
    register.names.insert(spec.metadata.clone(), id.clone());
    register.owners.insert(id.clone(), mail.clone());
    drop(register);
    let machine = Machine::new(id, spec.clone());
    let _ = mail.send(Event::Op(Op::Run { spec, reply }));
    tokio::spawn(own(server.clone(), machine, mail, inbox));
}

/// Submits an operation to the owner of a sandbox and waits for the answer.
pub(crate) async fn submit<T>(server: &Server, id: &SandboxId, op: impl FnOnce(Reply<T>) -> Op) -> Shared<T> {
    let gone = || Arc::new(Error::NotFound { kind: "pod sandbox", id: id.as_str().into() });
    let mail = server.owners.get(id).ok_or_else(gone)?;
    let (reply, answer) = oneshot::channel();
    mail.send(Event::Op(op(reply))).map_err(|_| gone())?;
    answer.await.map_err(|_| gone())?
}

/// Puts a sandbox with all it has on the board. Recovery does it before anybody may ask: a list, or the network's cleaning
/// up, that does not know a living pod yet would take it for a dead one.
pub(crate) fn introduce(server: &Arc<Server>, machine: &Machine) {
    server.owners.hold(machine);
    show(server, machine, &everything(machine));
}

/// The owner's loop. Ends when the sandbox is removed or could not be made.
pub(crate) async fn own(server: Arc<Server>, mut machine: Machine, mail: Mail, mut inbox: Inbox) {
    introduce(&server, &machine);
    loop {
        let deadline = machine.deadline();
        let event = tokio::select! {
            event = inbox.recv() => match event {
                Some(event) => *event,
                None => return,
            },
            () = sleep_until(deadline) => Event::Tick,
        };
        let out = machine.apply(event, std::time::Instant::now());
        for (id, until) in machine.graces() {
            server.progress.grace(id.as_str(), until);
        }
        server.progress.again(machine.id.as_str(), machine.undo_again());
        server.owners.hold(&machine);
        show(&server, &machine, &out);
        if machine.over() {
            server.owners.forget(&machine.id, &machine.spec.metadata);
            server.progress.over(machine.id.as_str());
        }
        for id in &out.gone {
            server.progress.over(id.as_str());
            server.filters.forget(id);
            server.repeated.forget(id);
        }
        for (id, change) in &out.events {
            server.events.announce(&server.board, || sandbox_view(&machine, &server), id, *change);
            if *change == Change::Stopped {
                nri::stopped(&server, id);
            }
        }
        let unheard: Vec<Arc<Error>> = out.answers.into_iter().filter_map(|answer| answer()).collect();
        for (id, change) in &out.events {
            report(&machine, id, *change);
        }
        report_unheard(&machine, &unheard);
        // What was done can be seen: plugins may be told of it.
        drop(out.pass);
        for task in out.tasks {
            let about = About::of(&task, &machine);
            server.progress.operate(&about.subject, &about.name, about.operation);
            let changes = task.changes_what_there_is();
            let slow = work(server.clone(), machine.id.clone(), machine.spec.clone(), machine.created_at, task, mail.clone());
            server.tasks.spawn(perform(server.clone(), about, changes, slow, mail.clone()));
        }
        for (spec, reply) in out.heirs {
            submit_run(&server, spec, reply);
        }
        if machine.over() {
            // What came while it ended is for the next of the name.
            while let Ok(event) = inbox.try_recv() {
                if let Event::Op(Op::Run { spec, reply }) = *event {
                    submit_run(&server, spec, reply);
                }
            }
            return;
        }
    }
}

/// One line for each step of a pod's or container's life.
fn report(machine: &Machine, id: &str, change: Change) {
    let m = &machine.spec.metadata;
    let pod = format_args!("{}/{}", m.namespace, m.name);
    if id == machine.id.as_str() {
        match change {
            // Both at once, for clients.
            Change::Created => {}
            Change::Started => tracing::info!(%pod, sandbox = id, attempt = m.attempt, "pod sandbox runs"),
            Change::Stopped => tracing::info!(%pod, sandbox = id, "pod sandbox stopped"),
            Change::Deleted => tracing::info!(%pod, sandbox = id, "pod sandbox removed"),
        }
        return;
    }
    let container = machine.containers.get(&ContainerId::from(id));
    let name = container.map_or("", |c| c.name());
    match (change, container.and_then(|c| c.exit())) {
        (Change::Created, _) => tracing::info!(%pod, name, container = id, sandbox = %machine.id, "container created"),
        (Change::Started, _) => {
            tracing::info!(%pod, name, container = id, pid = container.and_then(|c| c.pid), "container started");
        }
        (Change::Stopped, Some(exit)) => {
            tracing::info!(%pod, name, container = id, code = exit.code, reason = exit.reason, "container exited");
        }
        (Change::Stopped, None) => tracing::info!(%pod, name, container = id, "container exited"),
        (Change::Deleted, _) => tracing::info!(%pod, container = id, "container removed"),
    }
}

/// Errors of operations whose clients have hung up; those of the others are the clients' to tell.
fn report_unheard(machine: &Machine, errors: &[Arc<Error>]) {
    let m = &machine.spec.metadata;
    for (at, error) in errors.iter().enumerate() {
        if !errors[..at].iter().any(|earlier| Arc::ptr_eq(earlier, error)) {
            let (pod, error) = (format_args!("{}/{}", m.namespace, m.name), crate::error::text(&**error));
            tracing::warn!(%pod, sandbox = %machine.id, error, "an operation failed whose client has gone");
        }
    }
}

async fn sleep_until(deadline: Option<std::time::Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// An outbox that shows all there is.
fn everything(machine: &Machine) -> Outbox {
    Outbox { sandbox_changed: machine.listed(), changed: machine.containers.keys().cloned().collect(), ..Default::default() }
}

/// Brings the board up to date, and the durable records.
fn show(server: &Server, machine: &Machine, out: &Outbox) {
    for id in &out.gone {
        server.board.remove_container(id);
    }
    for id in &out.changed {
        if let Some(view) = container_view(machine, id) {
            keep(server, &view);
            server.board.put_container(view);
        }
    }
    if out.sandbox_changed {
        if machine.listed() {
            server.board.put_sandbox(sandbox_view(machine, server));
        } else {
            server.board.remove_sandbox(&machine.id);
        }
    }
}

fn sandbox_view(machine: &Machine, server: &Server) -> SandboxView {
    let live = machine.live().filter(|_| machine.ready());
    SandboxView {
        id: machine.id.clone(),
        spec: machine.spec.clone(),
        ready: machine.ready(),
        created_at: machine.created_at,
        ips: live.map(|l| l.ips.clone()).unwrap_or_default(),
        pid: live.and_then(|l| l.process.as_ref()).map(|p| p.pid),
        // Where it was made, whatever the driver is now.
        cgroup: machine
            .live()
            .map_or_else(|| server.cgroups.sandbox(&machine.spec.cgroup_parent, &machine.id), |live| live.cgroup.clone()),
        reason: machine.why_not_ready().to_owned(),
    }
}

fn container_view(machine: &Machine, id: &ContainerId) -> Option<ContainerView> {
    let container = machine.containers.get(id)?;
    Some(ContainerView {
        id: id.clone(),
        sandbox: machine.id.clone(),
        facts: container.facts.clone()?,
        resources: container.resources.clone(),
        state: container.state()?,
        created_at: container.created_at,
        started_at: container.started_at,
        pid: container.pid,
        exit: container.exit().cloned(),
    })
}

/// Hands the record of a container to the durable side, without its environment.
fn keep(server: &Server, view: &ContainerView) {
    let record = ContainerRecord {
        version: records::VERSION,
        id: view.id.clone(),
        sandbox: view.sandbox.clone(),
        boot: server.boot.clone(),
        created_at: view.created_at,
        started_at: view.started_at,
        resources: view.resources.clone(),
        exit: view.exit.clone(),
        forlorn: false,
        facts: (*view.facts).clone(),
    };
    let record = record.without_environment();
    server.durable.put(crate::paths::record(&server.paths.kept_container(&view.id)), records::encode(&record));
}

/// How often a step that takes long is looked at. Most work ends before the first look.
const LOOK: Duration = Duration::from_millis(500);

/// What a piece of work is about.
struct About {
    /// The CRI call, or what comes nearest.
    operation: &'static str,
    subject: String,
    container: Option<ContainerId>,
    /// For people.
    name: String,
}

impl About {
    fn of(task: &Task, machine: &Machine) -> Self {
        let (operation, container) = match task {
            Task::Run => ("RunPodSandbox", None),
            Task::Create { id, .. } => ("CreateContainer", Some(id)),
            Task::Start { id, .. } => ("StartContainer", Some(id)),
            Task::Signal { id, .. } | Task::Kill { id, .. } => ("StopContainer", Some(id)),
            Task::Delete { id, .. } => ("RemoveContainer", Some(id)),
            Task::Update { id, .. } => ("UpdateContainerResources", Some(id)),
            Task::ReopenLog { id, .. } => ("ReopenContainerLog", Some(id)),
            Task::Checkpoint { id, .. } => ("CheckpointContainer", Some(id)),
            Task::Bury { .. } => ("burial", None),
            Task::TearDown { .. } | Task::Erase { .. } if machine.remains() => (UNDO, None),
            Task::TearDown { .. } | Task::KillShim { .. } => ("StopPodSandbox", None),
            Task::Erase { .. } => ("RemovePodSandbox", None),
            Task::Resize { .. } => ("UpdatePodSandboxResources", None),
        };
        let m = &machine.spec.metadata;
        let mut name = format!("{}/{}", m.namespace, m.name);
        if let Some(container) = container.and_then(|id| machine.containers.get(id)) {
            name = format!("{name}/{}", container.name());
        }
        let subject = container.map_or(machine.id.as_str(), ContainerId::as_str).to_owned();
        Self { operation, subject, container: container.cloned(), name }
    }
}

/// Does one piece of slow work and reports back; says so when one of its steps is past its limit.
async fn perform(server: Arc<Server>, about: About, changes: bool, work: impl Future<Output = Option<Done>>, mail: Mail) {
    let pass = if changes { server.nri.enter().await } else { None };
    tokio::pin!(work);
    let done = loop {
        tokio::select! {
            done = &mut work => break done,
            () = tokio::time::sleep(LOOK) => {
                if let Some(error) = server.progress.overdue(&about.subject) {
                    let error = why::with_plugin(&server, error);
                    server.progress.failed(&about.subject, about.name.clone(), about.operation, &error);
                    let _ = mail.send(Event::Overdue { container: about.container.clone(), error: Arc::new(error) });
                }
            }
        }
    };
    let Some(done) = done else { return server.progress.succeeded(&about.subject, about.operation) };
    match done.error() {
        Some(error) => {
            // Nobody asked for it, so nobody is told. Signals are tried again many times.
            if about.operation == UNDO || matches!(done, Done::Killed(_)) {
                let text = crate::error::text(error);
                tracing::warn!(pod = about.name, operation = about.operation, id = about.subject, error = text, "failed");
            }
            server.progress.failed(&about.subject, about.name, about.operation, error);
        }
        None => server.progress.succeeded(&about.subject, about.operation),
    }
    let _ = mail.send(Event::Done(done, pass));
}

/// One piece of slow work; none where it has answered itself.
async fn work(
    server: Arc<Server>,
    id: SandboxId,
    spec: Arc<SandboxSpec>,
    created_at: i64,
    task: Task,
    mail: Mail,
) -> Option<Done> {
    let done = match task {
        Task::Run => Done::Ran(run::run(server, id, spec, created_at, mail.clone()).await),
        Task::Create { id: container, spec, log_directory, live } => {
            let result = container::create::create(&server, &live, &container, *spec, &log_directory).await;
            Done::Created { id: container, result }
        }
        Task::Start { id: container, live } => {
            let result = container::control::ask_and_start(&server, &live, &container).await;
            let at = result.as_ref().copied().unwrap_or_else(|_| crate::clock::now_ns());
            Done::Started { id: container, at, result: result.map(|_| ()) }
        }
        Task::Signal { id: container, pid, signal, live } => {
            let result = container::ask::ask(&live, &container, pid, signal).await;
            Done::Signalled { id: container, result }
        }
        Task::Kill { id: container, live } => {
            let result = container::control::signal(&live, &container, 9, true).await;
            Done::Signalled { id: container, result }
        }
        Task::Delete { id: container, live } => {
            nri::container(&server, &container, NriEvent::RemoveContainer).await;
            let result = container::control::delete(&server, &id, live.as_deref(), &spec, &container).await;
            Done::Deleted { id: container, result }
        }
        Task::Update { id: container, resources, merged, by_plugin, reply, live } => {
            let changed = container::control::ask_and_update(&server, &live, &container, *resources, *merged, by_plugin).await;
            let (resources, result) = match changed {
                Ok(merged) => (merged, Ok(())),
                Err(error) => (Resources::default(), Err(error)),
            };
            Done::Updated { id: container, resources: Box::new(resources), reply, result }
        }
        Task::ReopenLog { id: container, reply, live } => {
            let _ = reply.send(container::control::reopen_log(&live, &container).await.map_err(Arc::new));
            return None;
        }
        Task::Checkpoint { id: container, wanted, cut, reply } => {
            let result = checkpoint::run(&server, &container, &wanted, cut).await;
            Done::Checkpointed { id: container, reply, result }
        }
        Task::Resize { spec, reply, live } => {
            let result = match nri::update_pod(&server, &id, &spec).await {
                Ok(()) => note(&server, &live, &spec, created_at, false).await,
                refused => refused,
            };
            if result.is_ok() {
                nri::updated_pod(&server, &id, &spec).await;
            }
            Done::Resized { spec, reply, result }
        }
        Task::Bury { live, containers } => Done::Lost(container::control::bury(&server, &live, containers).await),
        Task::TearDown { live, told } => {
            if told {
                nri::pod(&server, &id, NriEvent::StopPodSandbox).await;
            }
            // With the shim go its exit records, and the durable ones are written off this path: the state folder has them.
            container::control::note_exits(&server, &id).await;
            let result = live.give_back(&server).await;
            if result.is_ok() && told {
                // The machine's spec, not that of the holdings: it may have been resized since.
                if let Err(error) = note(&server, &live, &spec, created_at, true).await {
                    tracing::warn!(error = %crate::error::text(&error), "state record");
                }
            }
            let rest = result.is_err().then_some(live);
            Done::TornDown { rest, result }
        }
        Task::Erase { told } => {
            if told {
                nri::pod(&server, &id, NriEvent::RemovePodSandbox).await;
            }
            Done::Erased(run::erase(&server, &id).await)
        }
        Task::KillShim { live } => {
            tracing::warn!(sandbox = %id, "the pod is to end and its shim does not answer: the shim is killed");
            Done::Killed(live.kill_shim(&server).await)
        }
    };
    Some(done)
}

/// Writes the records of a sandbox that was ready: as it is now, or that nothing of it lives any more.
async fn note(
    server: &Arc<Server>,
    live: &super::holdings::Live,
    spec: &SandboxSpec,
    created_at: i64,
    stopped: bool,
) -> Result<(), Error> {
    let mut record = run::record(&live.id, spec, created_at, &live.cgroup, server);
    record.ready = true;
    record.stopped = stopped;
    let bytes = records::encode(&record);
    server.durable.put(crate::paths::record(&server.paths.kept_sandbox(&live.id)), bytes.clone());
    let state = crate::paths::record(&server.paths.live_sandbox(&live.id));
    // What another boot made has no folder there any more.
    let has_folder = |state: &std::path::Path| state.parent().is_some_and(std::path::Path::exists);
    crate::blocking(move || if has_folder(&state) { records::write(&state, &bytes) } else { Ok(()) }).await
}
