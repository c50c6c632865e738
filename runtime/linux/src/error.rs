//! The crate's error: one variant per failed operation, with its subject and the kernel's errno as source.

use std::io;

/// A result whose error names the failed operation.
pub type Result<T> = std::result::Result<T, Error>;

macro_rules! operations {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// A failed kernel operation. The text names the operation and its subject; the source is the errno.
        #[derive(Debug, thiserror::Error)]
        #[non_exhaustive]
        pub enum Error {
            $($(#[$doc])* #[error($text)] $variant {
                /// What the operation was applied to, and what the kernel said about it.
                subject: String,
                /// The errno.
                #[source]
                source: io::Error,
            },)*
        }

        impl Error {
            /// The failed system call's error.
            #[must_use]
            pub fn io(&self) -> &io::Error {
                match self {
                    $(Error::$variant { source, .. } => source,)*
                }
            }
        }
    };
}

operations! {
    /// A file or folder could not be opened.
    Open = "open {subject}",
    /// A file could not be read.
    Read = "read {subject}",
    /// A file could not be written.
    Write = "write {subject}",
    /// A namespace could not be opened, or it is of another kind.
    OpenNamespace = "open namespace {subject}",
    /// A namespace could not be entered.
    EnterNamespace = "enter namespace {subject}",
    /// Namespaces could not be made.
    Unshare = "unshare {subject}",
    /// A user or group id map could not be written.
    IdMap = "write id map {subject}",
    /// A thread could not be started.
    Thread = "start thread {subject}",
    /// A filesystem context could not be opened: the type is unknown.
    FsOpen = "open filesystem type {subject}",
    /// A filesystem option was refused.
    FsConfig = "set filesystem option {subject}",
    /// A filesystem instance could not be made.
    FsCreate = "create filesystem {subject}",
    /// A filesystem instance could not be turned into a mount.
    FsMount = "mount filesystem {subject}",
    /// A mount could not be cloned or opened.
    OpenTree = "open mount tree {subject}",
    /// A mount could not be attached.
    MoveMount = "attach mount at {subject}",
    /// A mount's attributes could not be changed.
    MountSetattr = "change attributes of mount {subject}",
    /// The classic mount call failed.
    Mount = "mount {subject}",
    /// A mount could not be removed.
    Unmount = "unmount {subject}",
    /// The root could not be changed.
    PivotRoot = "pivot root to {subject}",
    /// A program could not be started.
    Spawn = "spawn {subject}",
}

impl Error {
    /// The errno of the failed call, when it was the kernel that refused.
    #[must_use]
    pub fn raw_errno(&self) -> Option<i32> {
        self.io().raw_os_error()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_the_operation_and_not_the_source() {
        let error = Error::Unmount { subject: "/mnt".to_owned(), source: io::Error::from_raw_os_error(libc::EBUSY) };
        assert_eq!(error.to_string(), "unmount /mnt");
        assert_eq!(error.raw_errno(), Some(libc::EBUSY));
    }
}
