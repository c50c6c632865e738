//! The messages of CRIU's RPC that a dump needs, by the field numbers of its interface. Data only.

/// `DUMP` of the request kinds.
pub(super) const DUMP: i32 = 1;
/// Cgroup mode `SOFT`: properties are restored where the cgroup is made anew. runc's default too.
pub(super) const CGROUPS_SOFT: i32 = 3;

/// What CRIU is asked for.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Request {
    #[prost(int32, required, tag = "1")]
    pub(super) kind: i32,
    #[prost(message, optional, tag = "2")]
    pub(super) options: Option<Options>,
}

/// How to dump. Descriptors are numbers in the process that made the socket.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Options {
    #[prost(int32, required, tag = "1")]
    pub(super) images_dir: i32,
    #[prost(int32, optional, tag = "2")]
    pub(super) pid: Option<i32>,
    #[prost(bool, optional, tag = "3")]
    pub(super) leave_running: Option<bool>,
    #[prost(int32, optional, tag = "9")]
    pub(super) log_level: Option<i32>,
    #[prost(string, optional, tag = "10")]
    pub(super) log_file: Option<String>,
    #[prost(int32, optional, tag = "17")]
    pub(super) work_dir: Option<i32>,
    #[prost(message, repeated, tag = "23")]
    pub(super) external_mounts: Vec<ExternalMount>,
    #[prost(bool, optional, tag = "24")]
    pub(super) manage_cgroups: Option<bool>,
    #[prost(int32, optional, tag = "34")]
    pub(super) cgroup_mode: Option<i32>,
    #[prost(string, repeated, tag = "37")]
    pub(super) external: Vec<String>,
    #[prost(bool, optional, tag = "50")]
    pub(super) orphan_terminals: Option<bool>,
    #[prost(string, optional, tag = "51")]
    pub(super) config_file: Option<String>,
}

/// A mount whose content is not the container's.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct ExternalMount {
    #[prost(string, required, tag = "1")]
    pub(super) mount_point: String,
    #[prost(string, required, tag = "2")]
    pub(super) name: String,
}

/// What CRIU answers.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Response {
    #[prost(int32, required, tag = "1")]
    pub(super) kind: i32,
    #[prost(bool, required, tag = "2")]
    pub(super) success: bool,
    #[prost(int32, optional, tag = "7")]
    pub(super) errno: Option<i32>,
    #[prost(string, optional, tag = "9")]
    pub(super) text: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn the_bytes_are_those_of_the_interface() {
        let options = Options { images_dir: 7, pid: Some(300), leave_running: Some(true), ..Default::default() };
        let request = Request { kind: DUMP, options: Some(options) };
        // kind = 1; options: images_dir_fd = 7, pid = 300, leave_running = true.
        assert_eq!(request.encode_to_vec(), [8, 1, 18, 7, 8, 7, 16, 0xac, 2, 24, 1]);
        let answer = Response::decode(&[8, 1, 16, 0, 56, 5, 74, 2, b'n', b'o'][..]).unwrap();
        assert_eq!((answer.success, answer.errno, answer.text.as_deref()), (false, Some(5), Some("no")));
        // What later versions add does not disturb.
        assert!(Response::decode(&[8, 1, 16, 1, 0xd8, 5, 9][..]).unwrap().success);
    }
}
