//! Pod networking: the CNI library and the bridge, host-local, loopback and portmap plugins
