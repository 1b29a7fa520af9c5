//! The conformance suite on `verbs`. It needs an RDMA device, so it runs only when asked for (`--ignored`), with the address
//! of the device in VERBFS_RDMA_ADDRESS; scripts/steps/verbs.sh does so in a virtual machine with SoftRoCE. SoftRoCE in Linux
//! 6.1 drops completions when many queue pairs are driven at once, and the addresses below are used by every test: run
//! them one at a time (`--test-threads=1`).

#[macro_use]
mod suite;

use std::net::{IpAddr, SocketAddr};

use verbfs_rdma::Incarnation;
use verbfs_rdma::endpoint::EndpointConfig;
use verbfs_rdma::fabric::Fabric;
use verbfs_rdma::verbs::{VerbsConfig, VerbsFabric};

/// Slots of the tests are below this; slot 0 listens at the first port.
const SLOTS: u16 = 8;
const FIRST_PORT: u16 = 18_500;

struct Verbs;

impl suite::Provider for Verbs {
    /// SoftRoCE in an emulated machine is slow, and what random cases find they find with `shm` as well.
    const EFFORT: u32 = 4;

    fn fabric(config: EndpointConfig) -> Box<dyn Fabric> {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
        let address = std::env::var("VERBFS_RDMA_ADDRESS").expect("VERBFS_RDMA_ADDRESS: the address of an RDMA device");
        let address: IpAddr = address.parse().expect("VERBFS_RDMA_ADDRESS is an IP address");
        let fabric = VerbsFabric::new(VerbsConfig {
            slot: config.slot,
            incarnation: Incarnation { node: config.node_incarnation, daemon: config.daemon_incarnation },
            cluster: config.cluster,
            key: config.key,
            addresses: (0..SLOTS).map(|slot| (slot, SocketAddr::new(address, FIRST_PORT + slot))).collect(),
            handshake_timeout: config.limits.handshake_timeout,
        });
        Box::new(fabric.unwrap_or_else(|error| panic!("{error}")))
    }
}

conformance! { Verbs, #[ignore = "needs an RDMA device: see scripts/steps/verbs.sh"] }
