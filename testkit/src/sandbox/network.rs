//! The network of a sandbox, by the `ip` program: `lo` up, and one interface with an address and a default route.

use std::io;
use std::process::{Command, Stdio};

use super::NODE_IP;

/// A veth pair with both ends here: unlike a dummy interface every kernel that runs pods has it, and it has a carrier.
const SCRIPT: &str = "link set lo up
link add uplink0 type veth peer name uplink0-far
link set uplink0-far up
address add 10.77.0.1/24 dev uplink0
link set uplink0 up
route add default via 10.77.0.254 dev uplink0
";

/// Configures the network namespace of the calling thread.
pub fn configure() -> io::Result<()> {
    debug_assert!(SCRIPT.contains(NODE_IP));
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        io::Write::write_all(&mut stdin, SCRIPT.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!(
            "ip -batch: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    // The shapes that runtimes meet on hosts, whatever this machine's defaults are.
    std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "0").or_else(ignore_absent)?;
    Ok(())
}

fn ignore_absent(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound {
        Ok(())
    } else {
        Err(error)
    }
}
