//! The cgroup of a process that is about to be made. With folders it is there before the process, which is born in it; a scope of
//! systemd's is made of the process itself.

use berth_linux::Pid;

use crate::cgroup::Cgroup;
use crate::layout::Layout;
use crate::path::CgroupPath;
use crate::resources::Resources;
use crate::{Error, Result};

/// Where a process will be.
#[derive(Debug, Clone)]
pub enum Placement {
    /// In a cgroup that exists.
    In(Cgroup),
    /// In a scope that systemd will make of it.
    Scope {
        /// The scope's cgroup, which does not exist yet.
        cgroup: Cgroup,
        /// What is mounted.
        layout: Box<Layout>,
        /// Its limits.
        resources: Box<Resources>,
    },
}

impl Placement {
    /// Prepares a cgroup with its limits. After an error there is nothing.
    pub fn prepare(layout: &Layout, path: &CgroupPath, resources: &Resources) -> Result<Self> {
        if path.unit().is_some() && !path.is_slice() {
            resources.validate()?;
            let cgroup = Cgroup::at(layout, path)?;
            return Ok(Self::Scope { cgroup, layout: Box::new(layout.clone()), resources: Box::new(resources.clone()) });
        }
        let cgroup = Cgroup::create(layout, path)?;
        if let Err(error) = cgroup.apply(resources) {
            // The limit is what to report.
            let _ = cgroup.delete();
            return Err(error);
        }
        Ok(Self::In(cgroup))
    }

    /// The cgroup, which may not exist before [`Placement::settle`].
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        match self {
            Self::In(cgroup) | Self::Scope { cgroup, .. } => cgroup,
        }
    }

    /// The cgroup in which the process can be born ([`Cgroup::dirfd`]): v2 alone has that.
    #[must_use]
    pub fn birthplace(&self) -> Option<&Cgroup> {
        match self {
            Self::In(cgroup) => Some(cgroup).filter(|cgroup| cgroup.is_v2()),
            Self::Scope { .. } => None,
        }
    }

    /// Puts the process where it belongs, unless it was born there. It must not have done anything yet. After an error the
    /// caller ends it and deletes the cgroup.
    pub fn settle(&self, process: Pid) -> Result<()> {
        match self {
            Self::In(cgroup) if cgroup.is_v2() => Ok(()),
            Self::In(cgroup) => cgroup.attach(process),
            Self::Scope { cgroup, layout, resources } => {
                cgroup.create_scope(layout, process, resources)?;
                cgroup.apply_files(resources)
            }
        }
    }

    /// Makes a cgroup without limits of the calling process, which must not be in a PID namespace that systemd does not see into.
    pub fn enter(layout: &Layout, path: &CgroupPath) -> Result<()> {
        match Self::prepare(layout, path, &Resources::default())? {
            Self::In(cgroup) => cgroup.attach_self(),
            scope @ Self::Scope { .. } => scope.settle(rustix::process::getpid()),
        }
    }
}

impl Cgroup {
    /// Has systemd make the scope, then adds what systemd leaves out: the hierarchies and controllers that it does not manage.
    fn create_scope(&self, layout: &Layout, process: Pid, resources: &Resources) -> Result<()> {
        self.manager().start(self.path(), Some(process), resources, self.is_v2())?;
        let tracked = if self.is_v2() { self.v2_dir() } else { self.v1_dir("name=systemd").or(self.v2_dir()) };
        if tracked.is_some_and(|dir| !dir.is_dir()) {
            // systemd has done it elsewhere: it sees another tree than we do.
            return Err(Error::NotFound { path: self.path().clone() });
        }
        self.create_missing(layout)?;
        if self.is_v2() { Ok(()) } else { self.attach(process) }
    }
}
