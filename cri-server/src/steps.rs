//! The steps that operations are made of, and how long each may take: one table. The executors enter it in [`crate::progress`]
//! and obey it; nobody else has time-outs of his own. What happens past a limit is in `docs/adr/0009-deadlines.md`.

use std::time::Duration;

use berth_shim::protocol::Request;

/// The limits that a user may have to change: what takes how long depends on his plugins, hooks and disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// One run of one CNI plugin; past it the plugin is killed. 60 s: kubelets wait four minutes for a sandbox, and a chain
    /// has up to three slow plugins.
    pub cni_plugin: Duration,
    /// Opening a container's volumes and making its process, hooks included. 60 s: half of what kubelets wait for.
    pub create_container: Duration,
    /// From the open gate to the running program, the opening of the log included.
    pub start_container: Duration,
    /// Records, folders and files of ours. A disk that takes longer is broken.
    pub storage: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            cni_plugin: Duration::from_secs(60),
            create_container: Duration::from_secs(60),
            start_container: Duration::from_secs(30),
            storage: Duration::from_secs(30),
        }
    }
}

/// How long a checkpoint may take when the client does not say: enough for much memory on a slow disk, and not for ever.
pub(crate) const CHECKPOINT: Duration = Duration::from_secs(30 * 60);

/// What happens to a step that is past its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Past {
    /// It is given up: asking again does no harm, or what was asked is killed.
    GivenUp,
    /// It can not be taken back without knowing how it ended: the callers are answered and it goes on.
    GoesOn,
}

/// One step of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Folders, files and first record of a sandbox.
    MakeFolders,
    /// From the shim's exec to its word that it is ready.
    StartShim,
    /// A question that a healthy shim answers at once: greeting, namespaces, state, signal, terminal.
    AskShim,
    /// The whole plugin chain.
    AttachNetwork,
    DetachNetwork,
    WriteRecord,
    /// Image, user, volumes, spec: opens files of foreign file systems.
    OpenVolumes,
    CreateInShim,
    StartInShim,
    /// SIGKILL to all of a cgroup, until it is empty.
    KillInShim,
    DeleteInShim,
    /// From the request to the running command.
    ExecInShim,
    /// The log's writer opens the file anew.
    ReopenLog,
    UpdateLimits,
    /// CRIU's dump and the archive of it. The client says how long.
    Checkpoint,
    EndShim,
    /// A killed shim has to be reaped.
    ReapShim,
    RemoveCgroup,
    /// After a shim's death: cgroups killed and removed, exits collected.
    Bury,
    Erase,
    /// NRI: one plugin after the other, with what they want of other containers.
    AskPlugins,
}

impl Step {
    /// All of them, for tests and documents.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 21] = [
        Self::MakeFolders,
        Self::StartShim,
        Self::AskShim,
        Self::AttachNetwork,
        Self::DetachNetwork,
        Self::WriteRecord,
        Self::OpenVolumes,
        Self::CreateInShim,
        Self::StartInShim,
        Self::KillInShim,
        Self::DeleteInShim,
        Self::ExecInShim,
        Self::ReopenLog,
        Self::UpdateLimits,
        Self::Checkpoint,
        Self::EndShim,
        Self::ReapShim,
        Self::RemoveCgroup,
        Self::Bury,
        Self::Erase,
        Self::AskPlugins,
    ];

    /// (what it does, how long it may take, what happens then).
    fn row(self, deadlines: &Deadlines) -> (&'static str, Duration, Past) {
        use Past::{GivenUp, GoesOn};
        let seconds = Duration::from_secs;
        match self {
            Self::MakeFolders => ("make the folders", deadlines.storage, GoesOn),
            // 2 to 10 ms on a quiet machine; a machine without memory may take a hundred times as long.
            Self::StartShim => ("start the shim", seconds(15), GivenUp),
            Self::AskShim => ("ask the shim", seconds(10), GivenUp),
            // Each plugin has its own limit and is killed by it; this is for a chain of several.
            Self::AttachNetwork => ("set up the network", deadlines.cni_plugin * 3, GoesOn),
            Self::DetachNetwork => ("tear down the network", deadlines.cni_plugin * 3, GoesOn),
            Self::WriteRecord => ("write the record", deadlines.storage, GoesOn),
            Self::OpenVolumes => ("open the image and the volumes", deadlines.create_container, GoesOn),
            Self::CreateInShim => ("create the container's process", deadlines.create_container, GoesOn),
            Self::StartInShim => ("start the program", deadlines.start_container, GoesOn),
            // A process in uninterruptible sleep ends when its disk answers.
            Self::KillInShim => ("kill the container's processes", seconds(20), GivenUp),
            Self::DeleteInShim => ("delete the container", seconds(30), GivenUp),
            Self::ExecInShim => ("start the command", deadlines.start_container, GivenUp),
            Self::ReopenLog => ("open the log anew", seconds(10), GivenUp),
            Self::UpdateLimits => ("set the limits", seconds(15), GoesOn),
            Self::Checkpoint => ("checkpoint the container", CHECKPOINT, GivenUp),
            Self::EndShim => ("end the shim", seconds(10), GivenUp),
            Self::ReapShim => ("reap the shim", seconds(10), GivenUp),
            Self::RemoveCgroup => ("end the processes of the cgroup and remove it", seconds(30), GoesOn),
            Self::Bury => ("end what the dead shim left", seconds(30), GoesOn),
            Self::Erase => ("erase the folders", deadlines.storage, GoesOn),
            // Each plugin has its own limit (nri.requestTimeout) and is dropped past it; this is for many, and a queue before them.
            Self::AskPlugins => ("ask the NRI plugins", seconds(30), GoesOn),
        }
    }

    /// What it does, as a verb.
    pub(crate) fn text(self) -> &'static str {
        self.row(&Deadlines::default()).0
    }

    /// How long it may take.
    pub(crate) fn limit(self, deadlines: &Deadlines) -> Duration {
        self.row(deadlines).1
    }

    /// What happens past the limit.
    pub(crate) fn past(self) -> Past {
        self.row(&Deadlines::default()).2
    }

    /// The step that a request to a shim is, and whom it is about: a container's id, or none for the sandbox.
    pub(crate) fn of(request: &Request) -> (Self, Option<&str>) {
        match request {
            Request::Create { id, .. } => (Self::CreateInShim, Some(id)),
            Request::Start { id } => (Self::StartInShim, Some(id)),
            Request::Kill { id, all: true, exec: None, .. } => (Self::KillInShim, Some(id)),
            Request::Kill { id, .. } | Request::Attach { id, .. } | Request::Resize { id, .. } => (Self::AskShim, Some(id)),
            Request::CloseStdin { id } => (Self::AskShim, Some(id)),
            Request::Exec { container, .. } => (Self::ExecInShim, Some(container)),
            Request::ReopenLog { id } => (Self::ReopenLog, Some(id)),
            Request::Delete { id, .. } => (Self::DeleteInShim, Some(id)),
            Request::Shutdown { .. } => (Self::EndShim, None),
            _ => (Self::AskShim, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_has_a_name_of_its_own_and_a_limit_that_clients_live_to_see() {
        let mut names = std::collections::BTreeSet::new();
        for step in Step::ALL {
            if step == Step::Checkpoint {
                // Its clients say how long they wait.
                continue;
            }
            assert!(names.insert(step.text()), "{step:?}");
            let limit = step.limit(&Deadlines::default());
            // Kubelets give up after two minutes, for RunPodSandbox after four.
            let most = if matches!(step, Step::AttachNetwork | Step::DetachNetwork) { 180 } else { 60 };
            assert!(limit >= Duration::from_secs(10) && limit <= Duration::from_secs(most), "{step:?}");
        }
    }

    #[test]
    fn what_makes_something_is_never_given_up() {
        for step in [Step::CreateInShim, Step::StartInShim, Step::OpenVolumes, Step::AttachNetwork, Step::MakeFolders] {
            assert_eq!(step.past(), Past::GoesOn, "{step:?}");
        }
    }

    #[test]
    fn the_users_limits_reach_the_steps() {
        let deadlines = Deadlines { cni_plugin: Duration::from_secs(7), ..Default::default() };
        assert_eq!(Step::AttachNetwork.limit(&deadlines), Duration::from_secs(21));
    }
}
