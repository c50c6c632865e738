//! The gate that plugins join through. Operations on pods and containers pass it freely; while a plugin is told what there is,
//! none is under way, so that nothing is missed between what the plugin was told and the first event it gets. It guards no data.

use std::sync::Arc;

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

/// The gate. Fair: who comes after a waiting plugin waits behind it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gate(Arc<RwLock<()>>);

/// An operation under way. Kept until its outcome can be seen by [`crate::Runtime::snapshot`].
#[derive(Debug)]
pub struct Pass(#[allow(dead_code, reason = "held, not read")] OwnedRwLockReadGuard<()>);

/// No operation is under way.
pub(crate) struct Closed(#[allow(dead_code, reason = "held, not read")] OwnedRwLockWriteGuard<()>);

impl Gate {
    /// Begins an operation.
    pub(crate) async fn enter(&self) -> Pass {
        match self.0.clone().try_read_owned() {
            Ok(guard) => Pass(guard),
            Err(_) => Pass(self.0.clone().read_owned().await),
        }
    }

    /// Waits until no operation is under way, and holds others off.
    pub(crate) async fn close(&self) -> Closed {
        Closed(self.0.clone().write_owned().await)
    }
}
