//! Pods that have to go because the node runs short: signals, thresholds, ranking.

pub mod threshold;
