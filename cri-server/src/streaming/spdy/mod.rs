//! SPDY/3.1 as Kubernetes' clients use it: streams with headers over one byte stream, no flow control. Knows no exec.

mod frame;
mod headers;
mod session;

pub(crate) use session::{Session, Stream, StreamWriter};
