//! The node agent: pod sources, workers, plans, status
