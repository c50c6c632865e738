//! The metrics of a pod: its network interfaces.

use berth_cri_api::v1::MetricType::Counter;

use super::{Descriptor, Needs};
use crate::stats::network::Interface;

/// A metric of an interface.
pub(in crate::metrics) type PodDescriptor = Descriptor<fn(&Interface) -> u64>;

/// Of a pod: one value for each interface.
pub(in crate::metrics) const POD: &[PodDescriptor] = &[
    Descriptor {
        name: "container_network_receive_bytes_total",
        help: "Bytes received.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.rx[0],
    },
    Descriptor {
        name: "container_network_receive_errors_total",
        help: "Errors while packets were received.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.rx[2],
    },
    Descriptor {
        name: "container_network_receive_packets_dropped_total",
        help: "Packets dropped while they were received.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.rx[3],
    },
    Descriptor {
        name: "container_network_receive_packets_total",
        help: "Packets received.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.rx[1],
    },
    Descriptor {
        name: "container_network_transmit_bytes_total",
        help: "Bytes sent.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.tx[0],
    },
    Descriptor {
        name: "container_network_transmit_errors_total",
        help: "Errors while packets were sent.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.tx[2],
    },
    Descriptor {
        name: "container_network_transmit_packets_dropped_total",
        help: "Packets dropped while they were sent.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.tx[3],
    },
    Descriptor {
        name: "container_network_transmit_packets_total",
        help: "Packets sent.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.tx[1],
    },
];
