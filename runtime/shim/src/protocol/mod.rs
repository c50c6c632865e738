//! Version 1 of the protocol between the agent and a pod's shim: types and frames, no I/O.
//!
//! Rules for later versions: fields and variants are only added; unknown fields are ignored by both sides; a request that a
//! shim does not know is answered with [`FailureKind::Unsupported`]; an agent skips a frame that is a
//! [`FrameError::Body`] error (an event of a later version). A newer agent speaks to the shims of an older one.

mod answer;
pub mod config;
pub mod frame;
mod message;

use serde::Deserialize;

pub use answer::*;
pub use config::{CONFIG_FD, IdMapping, LISTEN_FD, NETNS_FD, NetMode, NsMode, READY_FD, Ready, SandboxConfig, UserNamespace};
pub use frame::{Decoder, FrameError, encode};
pub use message::*;

/// Version of the protocol described here.
pub const VERSION: u32 = 1;

/// The `seq` of a request whose other content cannot be read, to answer it nevertheless.
pub fn seq_of(body: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct OnlySeq {
        seq: u64,
    }
    serde_json::from_slice::<OnlySeq>(body).ok().map(|only| only.seq)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden<T>(value: &T, text: &str)
    where
        T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
    {
        assert_eq!(serde_json::to_string(value).unwrap(), text);
        assert_eq!(&serde_json::from_str::<T>(text).unwrap(), value);
    }

    #[test]
    fn version_1_looks_like_this_on_the_wire() {
        golden(&ToShim { seq: 7, request: Request::Hello { version: 1 } }, r#"{"seq":7,"request":{"hello":{"version":1}}}"#);
        golden(&ToShim { seq: 8, request: Request::Namespaces }, r#"{"seq":8,"request":"namespaces"}"#);
        golden(
            &ToShim { seq: 9, request: Request::Kill { id: "c".into(), exec: None, signal: 15, all: false } },
            r#"{"seq":9,"request":{"kill":{"id":"c","exec":null,"signal":15,"all":false}}}"#,
        );
        golden(
            &FromShim::Reply { seq: 7, reply: Reply::Created { pid: 12, warnings: Vec::new() } },
            r#"{"reply":{"seq":7,"reply":{"created":{"pid":12}}}}"#,
        );
        golden(
            &FromShim::Reply {
                seq: 7,
                reply: Reply::Error(Failure { kind: FailureKind::NotFound, message: "no container c".into(), errno: None }),
            },
            r#"{"reply":{"seq":7,"reply":{"error":{"kind":"not_found","message":"no container c"}}}}"#,
        );
        golden(&FromShim::Event(Event::LogsDrained { id: "c".into() }), r#"{"event":{"logs_drained":{"id":"c"}}}"#);
        golden(
            &ExitRecord {
                pid: 5,
                code: 137,
                signal: 9,
                oom: true,
                started_at_ns: 1,
                finished_at_ns: 2,
                start_error: String::new(),
            },
            r#"{"pid":5,"code":137,"signal":9,"oom":true,"started_at_ns":1,"finished_at_ns":2}"#,
        );
    }

    #[test]
    fn fields_and_sorts_of_a_later_version_do_not_disturb() {
        let text = r#"{"seq":1,"request":{"create":{"id":"c","ext":{"cgroup":"/a","later":{"x":1}}}},"trace":"t"}"#;
        let message: ToShim = serde_json::from_str(text).unwrap();
        let Request::Create { ext, .. } = message.request else {
            panic!("not a create");
        };
        assert_eq!(ext.cgroup, "/a");
        assert_eq!(ext.root, Root::Spec);
        let failure: Failure = serde_json::from_str(r#"{"kind":"moon_phase","message":"m"}"#).unwrap();
        assert_eq!(failure.kind, FailureKind::Other);
        let config: SandboxConfig = serde_json::from_str(r#"{"version":2,"sandbox_id":"s","colour":"red"}"#).unwrap();
        assert_eq!(config.net, NetMode::New);
    }

    #[test]
    fn a_request_of_a_later_version_still_tells_its_seq() {
        let body = br#"{"seq":41,"request":{"teleport":{"to":"mars"}}}"#;
        assert!(serde_json::from_slice::<ToShim>(body).is_err());
        assert_eq!(seq_of(body), Some(41));
        assert_eq!(seq_of(b"not json"), None);
    }
}
