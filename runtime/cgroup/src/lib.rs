//! Control groups: v1, v2 and hybrid layouts, limits, statistics and events
