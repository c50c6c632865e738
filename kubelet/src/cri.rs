//! The runtime as the kubelet sees it: CRI clients with the contract's time limits. The only caller of the generated
//! clients; decides nothing about pods.

/// A gRPC status as the kubelet prints it: the message, with the code unless it is Unknown.
pub fn status_text(status: &tonic::Status) -> String {
    match status.code() {
        tonic::Code::Unknown => status.message().to_owned(),
        code => format!("rpc error: code = {code:?} desc = {}", status.message()),
    }
}
