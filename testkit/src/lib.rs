//! Development only: throw-away namespaces, fake registry, bounded waits
