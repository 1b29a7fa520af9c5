//! The fabric endpoint as the volume uses it: connections made and kept up, deaths noticed, events translated.

use crate::cache::CacheMemory;
use crate::metrics::Metrics;
use crate::volume::{Transport, TransportEvent, TransportStatistics};
use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use verbfs_protocol::{Node, Slot, lock};
use verbfs_rdma::{ConnectError, DisconnectReason, Endpoint, Event, Lane, Region, RemoteKey};

/// Between attempts to reach a peer that is not there.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(200);

/// How long the next life of a daemon that has ended may take from its first contact to its session, before both are fenced.
const SUCCESSOR_PATIENCE: Duration = Duration::from_secs(5);

/// The cache's memory as a registered region.
pub struct RegisteredMemory(pub Region);

impl CacheMemory for RegisteredMemory {
    fn base(&self) -> *mut u8 {
        self.0.as_ptr()
    }
    fn length(&self) -> usize {
        self.0.len()
    }
}

struct PeerState {
    connected: bool,
    last_attempt: Option<Instant>,
    /// Process of the last known incarnation, until it is known to be gone.
    process: Option<u32>,
    /// Since when the next life of a peer that has ended has been seen, while it has no session.
    successor_since: Option<Instant>,
    /// Why the last attempt failed, to say it once.
    last_failure: String,
}

pub struct FabricTransport {
    endpoint: Endpoint,
    cache: Region,
    peers: BTreeMap<Slot, PeerState>,
    metrics: Arc<Metrics>,
    pending: Vec<TransportEvent>,
}

impl FabricTransport {
    /// `endpoint` listens already; `peers` are all other members.
    pub fn new(
        endpoint: Endpoint,
        cache: Region,
        peers: impl IntoIterator<Item = Slot>,
        metrics: Arc<Metrics>,
    ) -> FabricTransport {
        let peers = peers
            .into_iter()
            .map(|slot| {
                (
                    slot,
                    PeerState {
                        connected: false,
                        last_attempt: None,
                        process: None,
                        successor_since: None,
                        last_failure: String::new(),
                    },
                )
            })
            .collect();
        FabricTransport { endpoint, cache, peers, metrics, pending: Vec::new() }
    }

    fn lane(lane: lock::Lane) -> Lane {
        match lane {
            lock::Lane::Ns => Lane::Ns,
            lock::Lane::Lock => Lane::Lock,
            lock::Lane::Ctrl => Lane::Ctrl,
            lock::Lane::Io => Lane::Io,
            lock::Lane::Ack => Lane::Ack,
        }
    }

    fn translate(&mut self, event: Event) -> Option<TransportEvent> {
        match event {
            Event::Message { slot, payload, .. } => Some(TransportEvent::Message { slot, record: payload }),
            Event::Completed { work_id, result, slot } => {
                if let Err(error) = &result {
                    tracing::warn!(slot, %error, "a one-sided operation failed");
                }
                Some(TransportEvent::Completed { work: work_id, ok: result.is_ok() })
            }
            Event::Connected { slot, hello } => {
                let peer = self.peers.get_mut(&slot)?;
                peer.connected = true;
                peer.successor_since = None;
                peer.process = Some(hello.pid);
                peer.last_failure.clear();
                Some(TransportEvent::Connected { slot, node: Node { slot, incarnation: hello.incarnation.node } })
            }
            Event::ConnectFailed { slot, reason } => {
                let peer = self.peers.get_mut(&slot)?;
                let refused = matches!(reason, ConnectError::RefusedByPeer(_) | ConnectError::RefusedByUs(_));
                if refused {
                    self.metrics.peers_refused.add(1);
                }
                let reason = reason.to_string();
                if peer.last_failure != reason {
                    if refused {
                        tracing::warn!(
                            slot,
                            %reason,
                            "peer refused; trying on: compare key, cluster name, [[nodes]] and version of both"
                        );
                    } else {
                        tracing::info!(slot, %reason, "peer not reached; trying on");
                    }
                    peer.last_failure = reason;
                }
                None
            }
            Event::Disconnected { slot, reason } => {
                let peer = self.peers.get_mut(&slot)?;
                peer.connected = self.endpoint.is_connected(slot);
                if peer.connected || matches!(reason, DisconnectReason::Replaced) {
                    return None;
                }
                Some(TransportEvent::Disconnected { slot, reason: reason.to_string() })
            }
            Event::SessionLost { slot, loss, .. } => {
                tracing::info!(slot, %loss, "session over");
                Some(TransportEvent::Lost { slot })
            }
        }
    }
}

/// Whether a process of this host has ended.
fn process_is_gone(pid: u32) -> bool {
    // A zombie has ended too: nothing of it runs or maps memory any more.
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X'])),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

impl Transport for FabricTransport {
    fn send(&mut self, slot: Slot, lane: lock::Lane, record: &[u8]) -> Result<(), String> {
        self.endpoint.send(slot, Self::lane(lane), record).map_err(|error| error.to_string())
    }

    fn read(
        &mut self,
        slot: Slot,
        cache_offset: usize,
        key: u32,
        offset: u64,
        length: usize,
        work: u64,
    ) -> Result<(), String> {
        self.endpoint
            .read(slot, &self.cache, cache_offset as u64, RemoteKey(key), offset, length as u32, work)
            .map_err(|error| error.to_string())
    }

    fn write(
        &mut self,
        slot: Slot,
        cache_offset: usize,
        key: u32,
        offset: u64,
        length: usize,
        work: u64,
    ) -> Result<(), String> {
        self.endpoint
            .write(slot, &self.cache, cache_offset as u64, RemoteKey(key), offset, length as u32, work)
            .map_err(|error| error.to_string())
    }

    fn poll(&mut self, events: &mut Vec<TransportEvent>) {
        events.append(&mut self.pending);
        let mut found = Vec::new();
        self.endpoint.poll(&mut found);
        for event in found {
            events.extend(self.translate(event));
        }
    }

    fn refuse(&mut self, slot: Slot, _reason: &str) {
        self.endpoint.disconnect(slot);
    }

    fn statistics(&self) -> TransportStatistics {
        let statistics = self.endpoint.statistics();
        TransportStatistics {
            messages_sent: statistics.messages_sent.iter().sum(),
            messages_received: statistics.messages_received.iter().sum(),
            messages_resent: statistics.records_resent,
            credit_stalls: statistics.credit_stalls,
            bytes_read: statistics.bytes_read,
            bytes_written: statistics.bytes_written,
        }
    }

    fn event_fd(&self) -> RawFd {
        self.endpoint.event_fd()
    }

    fn arm(&mut self) -> bool {
        self.pending.is_empty() && self.endpoint.arm()
    }

    fn is_quiet(&mut self) -> bool {
        self.pending.is_empty() && self.endpoint.is_quiet()
    }

    fn interrupt(&self) {
        self.endpoint.interrupt();
    }

    fn maintain(&mut self) {
        for (&slot, peer) in &mut self.peers {
            if peer.connected {
                continue;
            }
            // A daemon that has ended is out of our memory for good: its locks may go.
            if let Some(process) = peer.process
                && process != std::process::id()
                && process_is_gone(process)
            {
                peer.process = None;
                // Its next life has a session already: the old one ended with that, and a fence would hit the living.
                if self.endpoint.peer(slot).is_some_and(|hello| hello.pid != process) {
                    continue;
                }
                // Or is about to have one.
                if self.endpoint.has_successor(slot) {
                    let since = *peer.successor_since.get_or_insert_with(Instant::now);
                    if since.elapsed() < SUCCESSOR_PATIENCE {
                        peer.process = Some(process);
                        continue;
                    }
                }
                peer.successor_since = None;
                if let Err(error) = self.endpoint.fence(slot) {
                    tracing::error!(slot, %error, "a peer that ended could not be fenced");
                    peer.process = Some(process);
                    continue;
                }
            }
            if peer.last_attempt.is_none_or(|at| at.elapsed() >= RECONNECT_INTERVAL) {
                peer.last_attempt = Some(Instant::now());
                if let Err(error) = self.endpoint.connect(slot) {
                    tracing::error!(slot, %error, "cannot connect");
                }
            }
        }
    }
}
