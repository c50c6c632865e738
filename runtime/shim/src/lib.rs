//! The pod shim: parent of a pod's containers, and the protocol to talk to it
