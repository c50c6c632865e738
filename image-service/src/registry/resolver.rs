//! Host names to addresses without the C library's resolver, which a static program cannot use: `localhost` and
//! /etc/hosts here, DNS by hickory.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use hickory_resolver::Resolver as Dns;
use hyper_util::client::legacy::connect::dns::Name;

/// Reads /etc/hosts and /etc/resolv.conf at each look-up: a node's may change while it runs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resolver;

impl tower::Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, io::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        Box::pin(async move {
            let addresses = resolve(name.as_str()).await?;
            // The connector puts the port in.
            Ok(addresses.into_iter().map(|address| SocketAddr::new(address, 0)).collect::<Vec<_>>().into_iter())
        })
    }
}

async fn resolve(name: &str) -> io::Result<Vec<IpAddr>> {
    if name == "localhost" {
        return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
    }
    if let Ok(hosts) = tokio::fs::read_to_string(Path::new("/etc/hosts")).await {
        let found = in_hosts(&hosts, name);
        if !found.is_empty() {
            return Ok(found);
        }
    }
    let failed = |error: hickory_resolver::net::NetError| io::Error::other(format!("look up {name}: {error}"));
    let dns = Dns::builder_tokio().and_then(|builder| builder.build()).map_err(failed)?;
    let found = dns.lookup_ip(name).await.map_err(failed)?;
    Ok(found.iter().collect())
}

fn in_hosts(text: &str, name: &str) -> Vec<IpAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
            let address = words.next()?.parse().ok()?;
            words.any(|word| word.eq_ignore_ascii_case(name)).then_some(address)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_files_are_read() {
        let text = "# comment\n127.0.0.1 localhost\n10.0.0.1\treg.example reg # reg.other\n\nbad reg\n::1 REG";
        assert_eq!(in_hosts(text, "reg"), ["10.0.0.1".parse::<IpAddr>().unwrap(), "::1".parse().unwrap()]);
        assert!(in_hosts(text, "reg.other").is_empty());
    }
}
