//! Suites against the built binary
