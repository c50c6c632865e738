//! Host names to addresses without the C library's resolver, which a static program cannot use: `localhost` and /etc/hosts here, DNS
//! by hickory. The files are read at each look-up: a node's may change while it runs.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};

use hickory_resolver::Resolver as Dns;
use hyper_util::client::legacy::connect::dns::Name;

/// The resolver of every connection.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Resolver;

impl tower::Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        Box::pin(async move {
            let found = addresses(name.as_str()).await?;
            // Whoever connects puts the port in.
            Ok(found.into_iter().map(|address| SocketAddr::new(address, 0)).collect::<Vec<_>>().into_iter())
        })
    }
}

/// The addresses of a name.
pub(crate) async fn addresses(name: &str) -> io::Result<Vec<IpAddr>> {
    if let Ok(address) = name.trim_start_matches('[').trim_end_matches(']').parse() {
        return Ok(vec![address]);
    }
    if name.eq_ignore_ascii_case("localhost") {
        return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
    }
    let hosts = tokio::fs::read_to_string("/etc/hosts").await.unwrap_or_default();
    let found = of_hosts_file(&hosts, name);
    if !found.is_empty() {
        return Ok(found);
    }
    let failed = |error: hickory_resolver::net::NetError| io::Error::other(format!("look up {name}: {error}"));
    let dns = Dns::builder_tokio().and_then(|builder| builder.build()).map_err(failed)?;
    Ok(dns.lookup_ip(name).await.map_err(failed)?.iter().collect())
}

fn of_hosts_file(text: &str, name: &str) -> Vec<IpAddr> {
    let address_of = |line: &str| {
        let mut words = line.split('#').next()?.split_ascii_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|word| word.eq_ignore_ascii_case(name)).then_some(address)
    };
    text.lines().filter_map(address_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_file_knows_names_in_any_case_and_comments_do_not_count() {
        let text = "10.0.0.1\tcp.example cp # other\nnonsense cp\nfd00::1 CP\n#10.0.0.2 cp\n";
        assert_eq!(of_hosts_file(text, "cp"), ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
        assert!(of_hosts_file(text, "other").is_empty());
    }

    #[tokio::test]
    async fn addresses_need_no_resolver() {
        assert_eq!(addresses("[::1]").await.unwrap(), [IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])]);
        assert_eq!(addresses("192.0.2.1").await.unwrap(), [IpAddr::from([192, 0, 2, 1])]);
    }
}
