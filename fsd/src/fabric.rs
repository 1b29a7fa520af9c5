//! Which provider a daemon runs on, and why.
//!
//! All members must choose alike, or they never meet. So the choice follows from the configuration, which they share, and
//! not from what one of them finds on its host: a missing device is an error, not a reason to do otherwise.

use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};

use anyhow::Context;
use verbfs_protocol::Slot;
use verbfs_rdma::verbs::{VerbsConfig, VerbsFabric};
use verbfs_rdma::{Endpoint, EndpointConfig, Incarnation, Limits};

use crate::config::{Config, Fabric};

/// An endpoint that nobody can reach yet.
pub struct Opened {
    pub endpoint: Endpoint,
    /// The provider, and in brackets why it was chosen.
    pub description: String,
    /// Where it will listen, for messages.
    pub place: String,
}

/// Opens the endpoint of node `slot`.
///
/// # Errors
/// What is missing, with what to do about it.
pub fn open(config: &Config, slot: Slot, incarnation: Incarnation) -> anyhow::Result<Opened> {
    let key = config.load_key()?;
    let limits = Limits::default();
    let chosen = config.fabric == Fabric::Auto;
    if config.fabric() == Fabric::Verbs {
        let addresses = addresses(config)?;
        let fabric = VerbsFabric::new(VerbsConfig {
            slot,
            incarnation,
            cluster: config.cluster.clone(),
            key: *key.bytes(),
            handshake_timeout: limits.handshake_timeout,
            addresses: addresses.clone(),
        })
        .with_context(|| format!("node {slot}: cannot use RDMA"))?;
        let why = if chosen { "nodes are on several hosts" } else { "as configured" };
        let device = fabric.device();
        let description = format!("verbs ({} port {}; {why})", device.name(), device.port());
        let place = addresses.get(&slot).map_or_else(String::new, SocketAddr::to_string);
        return Ok(Opened { endpoint: Endpoint::with_fabric(slot, limits, Box::new(fabric)), description, place });
    }
    let endpoint = Endpoint::new(EndpointConfig {
        slot,
        node_incarnation: incarnation.node,
        daemon_incarnation: incarnation.daemon,
        cluster: config.cluster.clone(),
        key: *key.bytes(),
        directory: config.runtime_directory(),
        limits,
    })
    .with_context(|| format!("node {slot}: cannot make the shared-memory fabric"))?;
    let why = if chosen { "all nodes are on this host" } else { "as configured" };
    let place = config.runtime_directory().display().to_string();
    Ok(Opened { endpoint, description: format!("shm ({why})"), place })
}

/// Where node `slot` is.
///
/// # Errors
/// Its name has no address.
pub fn address_of(config: &Config, slot: Slot) -> anyhow::Result<SocketAddr> {
    addresses(config)?.remove(&slot).with_context(|| format!("nodes: there is no slot {slot}"))
}

/// Where each node is.
fn addresses(config: &Config) -> anyhow::Result<BTreeMap<Slot, SocketAddr>> {
    let mut addresses = BTreeMap::new();
    for node in &config.nodes {
        let (host, port) = node.host_and_port().map_err(anyhow::Error::msg)?;
        let mut found = (host.as_str(), port)
            .to_socket_addrs()
            .with_context(|| format!("nodes: slot {}: cannot find the address of {host:?}", node.slot))?;
        let address = found.next().with_context(|| format!("nodes: slot {}: {host:?} has no address", node.slot))?;
        addresses.insert(node.slot, address);
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_and_missing_devices_named() {
        let text =
            "fabric = 'verbs'\nnodes = [{slot = 0, address = '127.0.0.1'}, {slot = 1, address = '127.0.0.1:4791'}]";
        let config: Config = toml::from_str(text).unwrap();
        let found = addresses(&config).unwrap();
        assert_eq!(found[&0], "127.0.0.1:4790".parse().unwrap());
        assert_eq!(found[&1], "127.0.0.1:4791".parse().unwrap());
    }
}
