//! SPDY/3.1 as Kubernetes' clients use it: streams with headers over one byte stream, no flow control. Knows no exec.

mod frame;
mod headers;
mod reader;
mod session;
#[cfg(test)]
mod tests;

pub(crate) use session::{Limits, Session, Stream, StreamWriter, Why};
