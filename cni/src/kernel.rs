//! The one thread that talks to the kernel for a network, and what it remembers: ensured bridges, NAT rules, host ports.
//!
//! Links, addresses, rules are changed under the kernel's own locks anyway, so more threads would only wait there.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use berth_linux::netlink::{NETFILTER, ROUTE};
use tokio::sync::oneshot;

use crate::conntrack;
use crate::netlink::{Socket, link, route};
use crate::nft::{self, HostPort, Nat};
use crate::{Cidr, Error, Result, records, sysctl};

type Job = Box<dyn FnOnce(&mut Kernel) + Send>;

/// Host ports that were closed, and who waits until the flows through them are forgotten.
type Closed = (Vec<HostPort>, oneshot::Sender<Result<()>>);

/// Sends jobs to the thread. The thread ends with the last sender.
#[derive(Debug, Clone)]
pub(crate) struct Worker {
    jobs: mpsc::Sender<Job>,
    closed: Arc<Mutex<Vec<Closed>>>,
}

impl Worker {
    /// Starts the thread in the calling thread's network namespace.
    pub(crate) fn spawn(kernel: Kernel) -> Result<Self> {
        let (sender, receiver) = mpsc::channel::<Job>();
        let mut kernel = kernel;
        let run = move || {
            while let Ok(job) = receiver.recv() {
                job(&mut kernel);
            }
        };
        std::thread::Builder::new().name("berth-net".to_owned()).spawn(run).map_err(|source| Error::Netlink {
            operation: "start",
            subject: "the netlink thread".to_owned(),
            source: source.into(),
        })?;
        Ok(Self { jobs: sender, closed: Arc::default() })
    }

    /// Runs a job and waits for what it returns. The job runs even when the waiting future is dropped.
    pub(crate) async fn run<T, F>(&self, job: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut Kernel) -> Result<T> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        // The receiver is gone when nobody waits any more.
        self.submit(move |kernel| drop(sender.send(job(kernel))))?;
        receiver.await.map_err(|_| Error::WorkerEnded)?
    }

    /// Queues a job without waiting for it.
    pub(crate) fn submit(&self, job: impl FnOnce(&mut Kernel) + Send + 'static) -> Result<()> {
        self.jobs.send(Box::new(job)).map_err(|_| Error::WorkerEnded)
    }

    /// Forgets the flows through host ports that were closed. Whoever asks while others wait shares one look at the kernel's table
    /// with them: it takes milliseconds.
    pub(crate) async fn forget_flows(&self, ports: Vec<HostPort>) -> Result<()> {
        if ports.is_empty() {
            return Ok(());
        }
        let (sender, receiver) = oneshot::channel();
        self.closed.lock().unwrap_or_else(PoisonError::into_inner).push((ports, sender));
        let closed = Arc::clone(&self.closed);
        self.submit(move |kernel| {
            let closed = std::mem::take(&mut *closed.lock().unwrap_or_else(PoisonError::into_inner));
            let ports: Vec<HostPort> = closed.iter().flat_map(|(ports, _)| ports.clone()).collect();
            let outcome = conntrack::forget_pods(&mut kernel.netfilter, &ports);
            for (_, waiting) in closed {
                // Nobody waits any more: the work is done all the same.
                let _ = waiting.send(outcome.clone());
            }
        })?;
        receiver.await.map_err(|_| Error::WorkerEnded)?
    }
}

/// A bridge as it was made sure of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EnsuredBridge {
    pub index: u32,
    pub mac: String,
    pub gateways: Vec<Cidr>,
}

/// Sockets in the host's network namespace, and what is known to be in place.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub route: Socket,
    netfilter: Socket,
    table: String,
    nat: Nat,
    nat_path: PathBuf,
    nat_in_place: bool,
    host_ports: BTreeMap<String, Vec<HostPort>>,
    pub bridges: HashMap<String, EnsuredBridge>,
}

impl Kernel {
    /// Opens the sockets in the calling thread's network namespace. `nat_path` keeps what the NAT rules depend on.
    pub(crate) fn open(table: &str, nat_path: PathBuf) -> Result<Self> {
        let open = |protocol| Socket::open(protocol).map_err(|e| Error::netlink("open", "netlink socket")(e.into()));
        Ok(Self {
            route: open(ROUTE)?,
            netfilter: open(NETFILTER)?,
            table: table.to_owned(),
            nat: records::read(&nat_path)?.unwrap_or_default(),
            nat_path,
            nat_in_place: false,
            host_ports: BTreeMap::new(),
            bridges: HashMap::new(),
        })
    }

    /// The port of the socket that changes nf_tables.
    pub(crate) fn netfilter_port(&self) -> Result<u32> {
        self.netfilter.inner().port().map_err(|e| Error::netlink("look at", "netlink socket")(e.into()))
    }

    /// Sees to it that a bridge's subnets are masqueraded, and that its pods pass where the host forwards nothing by default.
    pub(crate) fn ensure_masquerade(&mut self, bridge: &str, networks: &[Cidr]) -> Result<()> {
        if self.nat.bridges.insert(bridge.to_owned()) {
            self.nat_in_place = false;
            records::write(&self.nat_path, &self.nat)?;
        }
        self.ensure_nat(networks, true, None)
    }

    /// Sees to it that these subnets are known to the NAT rules and that the rules are there.
    pub(crate) fn ensure_nat(&mut self, networks: &[Cidr], masquerade: bool, mark_bit: Option<u32>) -> Result<()> {
        let mut changed = false;
        for network in networks {
            changed |= self.nat.add(*network, masquerade);
        }
        if let Some(bit) = mark_bit.filter(|bit| *bit != self.nat.mark_bit) {
            self.nat.mark_bit = bit;
            changed = true;
        }
        if changed {
            records::write(&self.nat_path, &self.nat)?;
        }
        if changed || !self.nat_in_place {
            nft::ensure_table(&mut self.netfilter, &self.table, &self.nat)?;
            nft::ensure_forward(&mut self.netfilter, &self.table, &self.nat.bridges)?;
            self.nat_in_place = true;
        }
        Ok(())
    }

    /// Replaces what the NAT rules depend on, and writes the rules.
    pub(crate) fn replace_nat(&mut self, nat: Nat) -> Result<()> {
        self.nat = nat;
        records::write(&self.nat_path, &self.nat)?;
        self.nat_in_place = false;
        self.ensure_nat(&[], false, None)
    }

    pub(crate) fn nat(&self) -> &Nat {
        &self.nat
    }

    /// Tells of host ports that are in place already (after a restart), for [`Kernel::repair`].
    pub(crate) fn remember_host_ports(&mut self, owner: &str, ports: Vec<HostPort>) {
        if !ports.is_empty() {
            self.host_ports.insert(owner.to_owned(), ports);
        }
    }

    /// Opens host ports: rules, sysctls, elements, and no old flow that leads elsewhere.
    pub(crate) fn open_host_ports(&mut self, owner: &str, ports: Vec<HostPort>, networks: &[Cidr], mark_bit: u32) -> Result<()> {
        self.ensure_nat(networks, false, Some(mark_bit))?;
        for ip in ports.iter().map(|p| p.pod).filter(IpAddr::is_ipv4).collect::<HashSet<_>>() {
            self.open_localhost(ip)?;
        }
        let added = nft::add_host_ports(&mut self.netfilter, &self.table, owner, &ports);
        match added {
            // Somebody removed the table since: put everything back, then try once more.
            Err(error) if error.errno() == Some(rustix::io::Errno::NOENT.raw_os_error()) => {
                self.repair()?;
                nft::add_host_ports(&mut self.netfilter, &self.table, owner, &ports)?;
            }
            other => other?,
        }
        let local = route::dump_addresses(&mut self.route).map_err(Error::netlink("list", "addresses"))?;
        let local: HashSet<IpAddr> = local.into_iter().map(|(_, cidr)| cidr.addr()).collect();
        conntrack::forget_old(&mut self.netfilter, &ports, &local)?;
        self.host_ports.insert(owner.to_owned(), ports);
        Ok(())
    }

    /// Lets packets from 127.0.0.1 leave towards the pod, and their answers come back. The table's guard chain keeps the pods
    /// from reaching 127.0.0.1 by themselves.
    fn open_localhost(&mut self, pod: IpAddr) -> Result<()> {
        let index = route::link_towards(&mut self.route, pod).map_err(Error::netlink("find route to", pod.to_string()))?;
        let Some(index) = index else { return Ok(()) };
        let link = link::link_by_index(&mut self.route, index).map_err(Error::netlink("look at", format!("link {index}")))?;
        match link {
            Some(link) => sysctl::ensure(&format!("ipv4/conf/{}/route_localnet", link.name), "1").map(drop),
            None => Ok(()),
        }
    }

    /// Closes every host port of an owner; which they were, for [`Worker::forget_flows`].
    pub(crate) fn close_host_ports(&mut self, owner: &str) -> Result<Vec<HostPort>> {
        let elements = self.elements_of(|other| other == owner)?;
        nft::delete_elements(&mut self.netfilter, &self.table, &elements)?;
        // What was remembered counts too: an earlier try may have ended between the two steps.
        let known = self.host_ports.remove(owner).unwrap_or_default();
        Ok(elements.iter().filter_map(nft::Element::host_port).chain(known).collect())
    }

    /// Closes the host ports of every owner that is not wanted.
    pub(crate) fn retain_host_ports(&mut self, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let elements = self.elements_of(|owner| !wanted(owner))?;
        nft::delete_elements(&mut self.netfilter, &self.table, &elements)?;
        self.host_ports.retain(|owner, _| wanted(owner));
        let ports: Vec<HostPort> = elements.iter().filter_map(nft::Element::host_port).collect();
        conntrack::forget_pods(&mut self.netfilter, &ports)
    }

    /// The elements in the maps of those owners.
    pub(crate) fn elements_of(&mut self, owner: impl Fn(&str) -> bool) -> Result<Vec<nft::Element>> {
        let elements = nft::dump_elements(&mut self.netfilter, &self.table)?;
        Ok(elements.into_iter().filter(|element| owner(&element.owner)).collect())
    }

    /// Puts the rules and every remembered host port back in place, whatever is missing.
    pub(crate) fn repair(&mut self) -> Result<()> {
        if !nft::is_intact(&mut self.netfilter, &self.table, &self.nat)? {
            nft::ensure_table(&mut self.netfilter, &self.table, &self.nat)?;
        }
        nft::ensure_forward(&mut self.netfilter, &self.table, &self.nat.bridges)?;
        self.nat_in_place = true;
        let present = nft::dump_elements(&mut self.netfilter, &self.table)?;
        for (owner, ports) in &self.host_ports {
            let missing: Vec<HostPort> =
                ports.iter().filter(|port| !present.iter().any(|element| port.is(element))).cloned().collect();
            if !missing.is_empty() {
                nft::add_host_ports(&mut self.netfilter, &self.table, owner, &missing)?;
            }
        }
        Ok(())
    }

    /// Whether there is anything to repair: a network that never needed the table does not get one.
    pub(crate) fn uses_nat(&self) -> bool {
        self.nat_in_place || !self.host_ports.is_empty() || !self.nat.subnets.is_empty()
    }

    /// Removes the table.
    pub(crate) fn delete_table(&mut self) -> Result<()> {
        self.nat = Nat::default();
        self.host_ports.clear();
        self.nat_in_place = false;
        nft::delete_table(&mut self.netfilter, &self.table)?;
        nft::remove_forward(&mut self.netfilter, &self.table)?;
        records::remove(&self.nat_path)
    }
}

/// Opens a route socket inside a network namespace, after `prepare` has run there. The socket stays in that namespace wherever it is used.
pub(crate) fn pod_socket<T: Send>(
    netns: impl AsFd,
    subject: &str,
    prepare: impl FnOnce() -> Result<T> + Send,
) -> Result<(Socket, T)> {
    let opened = berth_linux::ns::with_netns(netns.as_fd(), || -> Result<(Socket, T)> {
        let prepared = prepare()?;
        let socket = Socket::open(ROUTE).map_err(|e| Error::netlink("open", "netlink socket")(e.into()))?;
        Ok((socket, prepared))
    });
    opened.map_err(|error| Error::Netns { subject: subject.to_owned(), source: Arc::new(std::io::Error::other(error)) })?
}

/// Refuses the network namespace that this process is in: an interface for a pod would be made on the host.
pub(crate) fn refuse_own_netns(netns: BorrowedFd<'_>) -> Result<()> {
    let id = |fd: BorrowedFd<'_>| berth_linux::ns::ns_id(fd);
    let own = berth_linux::ns::open_ns(None, berth_linux::ns::NamespaceKind::Net).map_err(std::io::Error::other);
    let same = own.and_then(|own| Ok(id(own.as_fd())? == id(netns)?));
    let error = |source| Error::Netns { subject: "a pod".to_owned(), source: Arc::new(source) };
    if same.map_err(error)? {
        return Err(Error::InvalidName { what: "network namespace", value: "the host's own".to_owned() });
    }
    Ok(())
}
