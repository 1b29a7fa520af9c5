//! The lock server.
use crate::Tick;
use verbfs_protocol::{GrantId, Ino, LockMessage, Mode, Node, Range, RequestId, Resource, Slot};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServerOptions {
    /// Let pages go from an X holder to the next X holder directly (DATA).
    pub hand_over: bool,
    /// Once conflicts were seen on a resource, grants grow only to this alignment (pages).
    pub conflict_granule: u64,
    /// So many grants without a conflict make a resource uncontended again.
    pub calm_after: u32,
}
impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions { hand_over: true, conflict_granule: 256, calm_after: 64 }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerCounters {
    pub requests: u64,
    pub grants: u64,
    pub conflicts: u64,
    pub revokes: u64,
    pub hand_overs: u64,
    pub hand_overs_taken: u64,
    pub hand_backs: u64,
    pub releases: u64,
    pub glimpse_rounds: u64,
    pub observed: u64,
    pub denials: u64,
    pub cancels: u64,
    pub longest_queue: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerEffect {
    /// `to` may be the own slot.
    Send { to: Slot, message: LockMessage },
}

/// One range one node holds, for `verbfs locks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HolderView {
    pub slot: Slot,
    pub grant: GrantId,
    pub range: Range,
    pub mode: Mode,
    pub revoking: bool,
    pub handing: bool,
    pub incoming: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaiterView {
    pub request: RequestId,
    pub mode: Mode,
    pub need: Range,
    pub since: Tick,
}

pub struct LockServer {
    counters: ServerCounters,
}

impl LockServer {
    pub fn new(_slot: Slot, _server_incarnation: u32, _options: ServerOptions) -> Self {
        todo!()
    }
    pub fn handle(&mut self, _from: Node, _message: LockMessage, _now: Tick, _effects: &mut Vec<ServerEffect>) {
        todo!()
    }
    /// After fencing: what the node held, awaited or owed an answer for is gone.
    pub fn node_gone(&mut self, _slot: Slot, _now: Tick, _effects: &mut Vec<ServerEffect>) {
        todo!()
    }
    /// X holders on the DATA this server keeps of `ino`, X and E holders on its ATTR.
    pub fn exclusive_holders(&self, _ino: Ino) -> Vec<(Slot, GrantId, Resource, Range)> {
        todo!()
    }
    pub fn holders(&self, _resource: Resource) -> Vec<HolderView> {
        todo!()
    }
    pub fn waiters(&self, _resource: Resource) -> Vec<WaiterView> {
        todo!()
    }
    /// Resources with a grant or a waiter.
    pub fn resources(&self) -> impl Iterator<Item = Resource> + '_ {
        std::iter::empty()
    }
    pub fn counters(&self) -> &ServerCounters {
        &self.counters
    }
}
