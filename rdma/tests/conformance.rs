//! The conformance suite on `shm`.

#[macro_use]
mod suite;

use verbfs_rdma::Incarnation;
use verbfs_rdma::endpoint::EndpointConfig;
use verbfs_rdma::fabric::Fabric;
use verbfs_rdma::shm::{ShmConfig, ShmFabric};

struct Shm;

impl suite::Provider for Shm {
    const EFFORT: u32 = 100;

    fn fabric(config: EndpointConfig) -> Box<dyn Fabric> {
        let incarnation = Incarnation { node: config.node_incarnation, daemon: config.daemon_incarnation };
        let fabric = ShmFabric::new(ShmConfig {
            slot: config.slot,
            incarnation,
            cluster: config.cluster,
            key: config.key,
            directory: config.directory,
            handshake_timeout: config.limits.handshake_timeout,
            fence_timeout: config.limits.fence_timeout,
        });
        Box::new(fabric.unwrap())
    }
}

conformance! { Shm }
