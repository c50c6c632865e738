//! Limits: what is wished for, written to the files of v1 or v2. A wish that cannot be fulfilled is an error that names it.

pub mod convert;
mod v1;
mod v2;

use std::path::{Path, PathBuf};

use crate::cgroup::Cgroup;
use crate::resources::Resources;
use crate::{Error, Result, file};

impl Cgroup {
    /// Sets the limits of a cgroup that is being made. After an error some may be set: delete it.
    pub fn apply(&self, resources: &Resources) -> Result<()> {
        resources.validate()?;
        if self.path().unit().is_some() {
            self.manager().set(self.path(), resources, self.is_v2())?;
        }
        self.apply_files(resources)
    }

    /// [`Cgroup::apply`] to the files alone.
    pub(crate) fn apply_files(&self, resources: &Resources) -> Result<()> {
        resources.validate()?;
        self.write_limits(resources, &mut Writer::default())
    }

    /// Changes the limits of a cgroup in use: all, or (block device rates and device rules aside) none. What is absent or 0 stays. A memory
    /// limit below the present use is refused, because the kernel would kill for it.
    pub fn update(&self, resources: &Resources) -> Result<()> {
        resources.validate()?;
        self.check_memory_use(resources)?;
        let mut writer = Writer { undo: Some(Vec::new()) };
        let mut result = self.write_limits(resources, &mut writer);
        if result.is_ok() && self.path().unit().is_some() {
            // systemd rounds some values and writes them itself: the exact ones go behind it.
            let set = self.manager().set(self.path(), resources, self.is_v2());
            result = set.and_then(|()| self.write_limits(resources, &mut Writer::default()));
        }
        if result.is_err() {
            writer.roll_back();
        }
        result
    }

    fn write_limits(&self, resources: &Resources, writer: &mut Writer) -> Result<()> {
        if self.is_v2() { v2::apply(self, resources, writer) } else { v1::apply(self, resources, writer) }
    }

    fn check_memory_use(&self, resources: &Resources) -> Result<()> {
        let Some(limit) = resources.memory.as_ref().and_then(|memory| memory.limit).filter(|limit| *limit > 0) else {
            return Ok(());
        };
        let path = match (self.v1_dir("memory"), self.v2_dir()) {
            (Some(dir), _) => dir.join("memory.usage_in_bytes"),
            (None, Some(dir)) => dir.join("memory.current"),
            (None, None) => return Ok(()),
        };
        match file::read_number(&path)? {
            Some(usage) if usage > limit as u64 => Err(Error::BelowUsage { limit, usage }),
            _ => Ok(()),
        }
    }
}

/// Writes values, remembering the old ones when it may have to take them back.
#[derive(Default)]
struct Writer {
    undo: Option<Vec<(PathBuf, String)>>,
}

impl Writer {
    /// Sets a value. A missing file is a missing controller.
    fn set(&mut self, dir: &Path, name: &str, value: &str, limit: &str) -> Result<()> {
        let path = dir.join(name);
        if let Some(undo) = &mut self.undo {
            let old = file::read_raw(&path).unwrap_or_default();
            let old = old.trim();
            // Files of several lines (rates by device) cannot be set back by writing what they say.
            if !old.is_empty() && !old.contains('\n') {
                undo.push((path.clone(), old.to_owned()));
            }
        }
        match file::write_raw(&path, value) {
            Ok(()) => Ok(()),
            Err(error) if file::is_gone(&error) => Err(missing(name, limit)),
            Err(source) => Err(Error::Write { path, value: value.to_owned(), source }),
        }
    }

    fn roll_back(self) {
        for (path, value) in self.undo.unwrap_or_default().into_iter().rev() {
            // The error that led here is the one to report.
            let _ = file::write_raw(&path, &value);
        }
    }
}

/// A file `memory.max` that is not there is the controller `memory` that is not there.
fn missing(name: &str, limit: &str) -> Error {
    let controller = name.split('.').next().unwrap_or(name);
    let part = if name.starts_with("memory.memsw") || name.starts_with("memory.swap") { " with swap accounting" } else { "" };
    Error::MissingController { controller: format!("{controller}{part}"), limit: limit.to_owned() }
}

/// Whether the machine has swap space: without any, a limit on it is fulfilled by nothing.
fn machine_has_swap() -> bool {
    let text = file::read_raw(Path::new("/proc/swaps")).unwrap_or_default();
    text.lines().count() > 1
}

/// -1 and the like in the words of v2.
fn or_max(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

/// A value that is wished for: present and not 0.
fn wished(value: Option<i64>) -> Option<i64> {
    value.filter(|value| *value != 0)
}

/// A count that is wished for: present and not 0.
fn wished_count(value: Option<u64>) -> Option<u64> {
    value.filter(|value| *value != 0)
}

/// A list that is wished for: present and not empty.
fn wished_list(value: &Option<String>) -> Option<&str> {
    value.as_deref().filter(|value| !value.is_empty())
}
