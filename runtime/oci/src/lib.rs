//! The OCI runtime core: a runtime spec becomes a plan, the plan becomes a process
