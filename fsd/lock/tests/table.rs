//! One test per line of the tables in PROTOCOL.md, message by message.

use verbfs_lock::*;
use verbfs_protocol::lock::{LockFlags, Successor};
use verbfs_protocol::{
    GrantId, Ino, LockMessage, LockMessage as M, Mode, Mode::*, Node, Range, RequestId, Resource, Slot,
};

const A: Slot = 1;
const B: Slot = 2;
const C: Slot = 3;

fn node(slot: Slot) -> Node {
    Node { slot, incarnation: 1 }
}
fn data() -> Resource {
    Resource::data(Ino::new(0, 5), 0)
}
fn attr() -> Resource {
    Resource::attr(Ino::new(0, 5))
}
fn range(lo: u64, hi: u64) -> Range {
    Range::new(lo, hi)
}
fn gid(sequence: u64) -> GrantId {
    GrantId { server: 0, server_incarnation: 1, sequence }
}

// ---------------------------------------------------------------- server

struct Server {
    server: LockServer,
    sequence: u64,
}

type Sent = Vec<(Slot, LockMessage)>;

impl Server {
    fn new() -> Server {
        Self::with(ServerOptions { hand_over: false, ..ServerOptions::default() })
    }
    fn with(options: ServerOptions) -> Server {
        Server { server: LockServer::new(0, 1, options), sequence: 0 }
    }
    fn say(&mut self, from: Slot, message: LockMessage) -> Sent {
        let mut effects = Vec::new();
        self.server.handle(node(from), message, 0, &mut effects).unwrap();
        effects.into_iter().map(|ServerEffect::Send { to, message }| (to, message)).collect()
    }
    fn ask(&mut self, from: Slot, resource: Resource, mode: Mode, need: Range, want: Range, flags: LockFlags) -> Sent {
        self.sequence += 1;
        let request = RequestId { node: node(from), sequence: self.sequence };
        self.say(from, M::Lock { request, resource, mode, need, want, flags, upgrade: None, after_releases: 0 })
    }
    fn lock(&mut self, from: Slot, mode: Mode, lo: u64, hi: u64) -> Sent {
        self.ask(from, data(), mode, range(lo, hi), range(lo, hi), LockFlags::default())
    }
    fn attr(&mut self, from: Slot, mode: Mode) -> Sent {
        self.ask(from, attr(), mode, Range::UNIT, Range::UNIT, LockFlags::default())
    }
    fn stat(&mut self, from: Slot) -> Sent {
        self.ask(from, attr(), S, Range::UNIT, Range::UNIT, LockFlags { one_shot: true, ..LockFlags::default() })
    }
    fn release(&mut self, from: Slot, resource: Resource, sequence: u64, released: Range, keep: Option<Mode>) -> Sent {
        self.say(from, M::Release { grant: gid(sequence), resource, range: released, keep, revoke_sequence: 0 })
    }
    fn gone(&mut self, slot: Slot) -> Sent {
        let mut effects = Vec::new();
        self.server.node_gone(slot, 0, &mut effects);
        effects.into_iter().map(|ServerEffect::Send { to, message }| (to, message)).collect()
    }
}

/// What a test cares about in a message.
#[derive(Debug, PartialEq)]
enum Gist {
    Grant(Slot, u64, Mode, Range, Option<u64>),
    Revoke(Slot, u64, Range, Option<Mode>, Option<u64>),
    Deny(Slot, i32),
    Other(Slot, &'static str),
}
use Gist::*;

fn gist(sent: Sent) -> Vec<Gist> {
    sent.into_iter()
        .map(|(to, message)| match message {
            M::Grant { grant, range, mode, from, .. } => {
                Grant(to, grant.sequence, mode, range, from.map(|from| from.grant.sequence))
            }
            M::Revoke { grant, need, keep, successor, .. } => {
                Revoke(to, grant.sequence, need, keep, successor.map(|successor| successor.grant.sequence))
            }
            M::Deny { errno, .. } => Deny(to, errno),
            M::Observed { .. } => Other(to, "observed"),
            M::Glimpse { .. } => Other(to, "glimpse"),
            M::Thaw { .. } => Other(to, "thaw"),
            M::Done { .. } => Other(to, "done"),
            M::HandBack { .. } => Other(to, "hand back"),
            other => panic!("a server does not send {other:?}"),
        })
        .collect()
}

#[test]
fn free_range_is_granted_as_wanted() {
    let mut server = Server::new();
    let sent = server.ask(A, data(), X, range(3, 4), Range::ALL, LockFlags::default());
    assert_eq!(gist(sent), [Grant(A, 1, X, Range::ALL, None)]);
}

#[test]
fn growth_stops_at_grants_and_waiters_of_others() {
    let mut server = Server::new();
    server.lock(A, X, 0, 2);
    assert_eq!(
        gist(server.ask(B, data(), X, range(10, 11), Range::ALL, LockFlags::default())),
        [Grant(B, 2, X, range(2, u64::MAX), None)]
    );
    // C waits for what B holds; A grows no further than C's need.
    assert_eq!(gist(server.lock(C, X, 5, 6)), [Revoke(B, 2, range(5, 6), None, None)]);
    server.release(B, data(), 2, range(2, 100), None);
    assert_eq!(
        gist(server.ask(A, data(), S, range(20, 21), Range::ALL, LockFlags::default())),
        [Grant(A, 4, S, range(6, 100), None)]
    );
}

#[test]
fn no_growth_means_none() {
    let mut server = Server::new();
    let flags = LockFlags { no_growth: true, ..LockFlags::default() };
    assert_eq!(gist(server.ask(A, data(), X, range(3, 4), Range::ALL, flags)), [Grant(A, 1, X, range(3, 4), None)]);
}

#[test]
fn conflicts_cap_growth_until_calm() {
    let mut server = Server::with(ServerOptions {
        hand_over: false,
        conflict_granule: 16,
        calm_after: 2,
        ..ServerOptions::default()
    });
    server.ask(A, data(), X, range(0, 1), Range::ALL, LockFlags::default());
    server.lock(B, X, 100, 101);
    server.release(A, data(), 1, range(50, u64::MAX), None);
    let want =
        |server: &mut Server, lo| gist(server.ask(B, data(), X, range(lo, lo + 1), Range::ALL, LockFlags::default()));
    assert_eq!(want(&mut server, 200), [Grant(B, 3, X, range(192, 208), None)]);
    want(&mut server, 300);
    assert_eq!(want(&mut server, 400), [Grant(B, 5, X, range(50, u64::MAX), None)]);
}

#[test]
fn a_conflict_revokes_all_holders_at_once() {
    let mut server = Server::new();
    server.lock(A, S, 0, 4);
    server.lock(B, S, 2, 8);
    assert_eq!(
        gist(server.lock(C, X, 3, 6)),
        [Revoke(A, 1, range(3, 4), None, None), Revoke(B, 2, range(3, 6), None, None)]
    );
    assert_eq!(gist(server.release(B, data(), 2, range(2, 8), None)), []);
    assert_eq!(gist(server.release(A, data(), 1, range(3, 4), None)), [Grant(C, 3, X, range(3, 6), None)]);
    assert_eq!(server.server.holders(data()).len(), 2, "A keeps [0, 3)");
}

#[test]
fn try_is_denied_and_revokes_nothing() {
    let mut server = Server::new();
    server.lock(A, X, 0, 4);
    let flags = LockFlags { r#try: true, ..LockFlags::default() };
    assert_eq!(gist(server.ask(B, data(), S, range(0, 1), range(0, 1), flags)), [Deny(B, 11)]);
}

#[test]
fn a_release_that_does_not_cover_the_need_does_not_count() {
    let mut server = Server::new();
    server.lock(A, X, 0, 8);
    server.lock(B, X, 2, 6);
    assert_eq!(gist(server.release(A, data(), 1, range(2, 4), None)), []);
    assert_eq!(gist(server.release(A, data(), 1, range(4, 6), None)), [Grant(B, 2, X, range(2, 6), None)]);
}

#[test]
fn a_reader_leaves_the_writer_shared() {
    let mut server = Server::new();
    server.lock(A, X, 0, 8);
    assert_eq!(gist(server.lock(B, S, 0, 2)), [Revoke(A, 1, range(0, 2), Some(S), None)]);
    assert_eq!(gist(server.release(A, data(), 1, range(0, 2), Some(S))), [Grant(B, 2, S, range(0, 2), None)]);
}

#[test]
fn more_conflicts_revoke_more() {
    let mut server = Server::new();
    server.lock(A, X, 0, 8);
    assert_eq!(gist(server.lock(B, S, 0, 2)), [Revoke(A, 1, range(0, 2), Some(S), None)]);
    assert_eq!(gist(server.lock(C, X, 4, 6)), [Revoke(A, 1, range(4, 6), None, None)]);
    // A second writer behind the reader has to wait for the reader's grant.
    assert_eq!(gist(server.lock(C, X, 0, 1)), []);
    assert_eq!(
        gist(server.release(A, data(), 1, range(0, 2), Some(S))),
        [
            Grant(B, 2, S, range(0, 2), None),
            Revoke(A, 1, range(0, 1), None, None),
            Revoke(B, 2, range(0, 1), None, None)
        ]
    );
}

#[test]
fn waiters_are_served_in_order() {
    let mut server = Server::new();
    server.lock(A, S, 0, 1);
    server.lock(B, X, 0, 1);
    // C's reader does not pass B's writer, though it goes with A.
    assert_eq!(gist(server.lock(C, S, 0, 1)), []);
    assert_eq!(
        gist(server.release(A, data(), 1, range(0, 1), None)),
        [Grant(B, 2, X, range(0, 1), None), Revoke(B, 2, range(0, 1), Some(S), None)]
    );
}

#[test]
fn a_sole_reader_upgrades_in_place() {
    let mut server = Server::new();
    server.lock(A, S, 0, 8);
    assert_eq!(gist(server.lock(A, X, 2, 4)), [Grant(A, 2, X, range(2, 4), None)]);
    // The old number is superseded there, and only there.
    server.release(A, data(), 1, range(0, 8), None);
    let holders = server.server.holders(data());
    assert_eq!((holders.len(), holders[0].grant, holders[0].range), (1, gid(2), range(2, 4)));
}

#[test]
fn a_grant_never_weakens() {
    let mut server = Server::new();
    server.lock(A, X, 0, 4);
    server.lock(A, S, 2, 8);
    let modes: Vec<_> = server.server.holders(data()).iter().map(|holder| (holder.range, holder.mode)).collect();
    assert_eq!(modes, [(range(0, 2), X), (range(2, 4), X), (range(4, 8), S)]);
}

#[test]
fn two_upgraders_do_not_deadlock() {
    let mut server = Server::new();
    server.lock(A, S, 0, 1);
    server.lock(B, S, 0, 1);
    assert_eq!(gist(server.lock(A, X, 0, 1)), [Revoke(B, 2, range(0, 1), None, None)]);
    assert_eq!(gist(server.lock(B, X, 0, 1)), []);
    let sent = gist(server.release(B, data(), 2, range(0, 1), None));
    assert_eq!(sent, [Grant(A, 3, X, range(0, 1), None), Revoke(A, 3, range(0, 1), None, None)]);
    assert_eq!(gist(server.release(A, data(), 3, range(0, 1), None)), [Grant(B, 4, X, range(0, 1), None)]);
}

#[test]
fn unknown_grants_are_answered_and_change_nothing() {
    let mut server = Server::new();
    server.lock(A, X, 0, 1);
    for message in [
        M::Release { grant: gid(77), resource: data(), range: range(0, 1), keep: None, revoke_sequence: 0 },
        M::Taken { grant: gid(77), resource: data() },
        M::Refused { grant: gid(77), resource: data() },
        M::Glimpsed { grant: gid(77), resource: data(), round: 3 },
        M::Cancel { request: RequestId { node: node(A), sequence: 99 }, resource: data() },
    ] {
        assert_eq!(gist(server.say(A, message)), []);
    }
    assert_eq!(server.server.holders(data()).len(), 1);
}

#[test]
fn a_request_waits_for_the_release_sent_before_it() {
    let mut server = Server::new();
    server.attr(A, E);
    let request = RequestId { node: node(A), sequence: 50 };
    let early = M::Lock {
        request,
        resource: attr(),
        mode: S,
        need: Range::UNIT,
        want: Range::UNIT,
        flags: LockFlags::default(),
        upgrade: None,
        after_releases: 1,
    };
    assert_eq!(gist(server.say(A, early)), []);
    assert_eq!(
        gist(server.say(A, M::Cancel { request: RequestId { node: node(A), sequence: 51 }, resource: attr() })),
        []
    );
    assert_eq!(gist(server.release(A, attr(), 1, Range::UNIT, None)), [Grant(A, 2, S, Range::UNIT, None)]);
}

#[test]
fn cancel_removes_the_waiter_and_is_confirmed() {
    let mut server = Server::new();
    server.lock(A, S, 0, 1);
    server.lock(B, X, 0, 1);
    server.lock(C, S, 0, 1);
    let cancel = M::Cancel { request: RequestId { node: node(B), sequence: 2 }, resource: data() };
    // A is still giving up, as it was asked to; C need not wait for that.
    assert_eq!(gist(server.say(B, cancel)), [Deny(B, 125), Grant(C, 2, S, range(0, 1), None)]);
}

#[test]
fn nonsense_is_denied() {
    let mut server = Server::new();
    assert_eq!(gist(server.lock(A, E, 0, 1)), [Deny(A, 22)]);
    assert_eq!(gist(server.lock(A, S, 1, 1)), [Deny(A, 22)]);
    let elsewhere = Resource::data(Ino::new(0, 5), 7);
    assert_eq!(gist(server.ask(A, elsewhere, S, range(0, 1), range(0, 1), LockFlags::default())), [Deny(A, 22)]);
}

#[test]
fn unused_resources_are_forgotten() {
    let mut server = Server::new();
    server.lock(A, X, 0, 1);
    server.attr(B, S);
    server.release(A, data(), 1, range(0, 1), None);
    server.gone(B);
    assert_eq!(server.server.resources().count(), 0);
}

#[test]
fn a_sole_extender_gets_x_and_keeps_e() {
    let mut server = Server::new();
    assert_eq!(gist(server.attr(A, E)), [Grant(A, 1, X, Range::UNIT, None)]);
    assert_eq!(gist(server.attr(B, E)), [Revoke(A, 1, Range::UNIT, Some(E), None)]);
    assert_eq!(gist(server.release(A, attr(), 1, Range::UNIT, Some(E))), [Grant(B, 2, E, Range::UNIT, None)]);
    assert_eq!(server.server.exclusive_holders(Ino::new(0, 5)).len(), 2);
}

fn extenders() -> Server {
    let mut server = Server::new();
    server.attr(A, E);
    server.attr(B, E);
    server.release(A, attr(), 1, Range::UNIT, Some(E));
    server
}
fn glimpsed(server: &mut Server, from: Slot, sequence: u64, round: u32) -> Vec<Gist> {
    gist(server.say(from, M::Glimpsed { grant: gid(sequence), resource: attr(), round }))
}

#[test]
fn stat_glimpses_all_extenders_and_takes_nothing() {
    let mut server = extenders();
    assert_eq!(gist(server.stat(C)), [Other(A, "glimpse"), Other(B, "glimpse")]);
    // Nobody begins to extend meanwhile.
    assert_eq!(gist(server.attr(4, E)), []);
    assert_eq!(glimpsed(&mut server, A, 1, 1), []);
    assert_eq!(glimpsed(&mut server, A, 1, 1), []);
    assert_eq!(
        glimpsed(&mut server, B, 2, 1),
        [Other(C, "observed"), Other(A, "thaw"), Other(B, "thaw"), Grant(4, 3, E, Range::UNIT, None)]
    );
}

#[test]
fn one_round_answers_all_that_came_before_its_end() {
    let mut server = extenders();
    server.stat(C);
    glimpsed(&mut server, A, 1, 1);
    assert_eq!(gist(server.stat(4)), []);
    assert_eq!(
        glimpsed(&mut server, B, 2, 1),
        [Other(C, "observed"), Other(4, "observed"), Other(A, "thaw"), Other(B, "thaw")]
    );
}

#[test]
fn a_release_or_a_death_ends_a_round_too() {
    let mut server = extenders();
    server.stat(C);
    assert_eq!(gist(server.release(A, attr(), 1, Range::UNIT, None)), []);
    let sent = gist(server.gone(B));
    // Nobody extends any more: an ordinary grant.
    assert_eq!(sent, [Grant(C, 3, S, Range::UNIT, None)]);
}

#[test]
fn stat_leaves_the_exclusive_holder_extending() {
    let mut server = Server::new();
    server.attr(A, X);
    assert_eq!(gist(server.stat(C)), [Revoke(A, 1, Range::UNIT, Some(E), None)]);
    assert_eq!(gist(server.release(A, attr(), 1, Range::UNIT, Some(E))), [Other(A, "glimpse")]);
}

#[test]
fn a_reader_of_attributes_that_stays_takes_e_away() {
    let mut server = extenders();
    assert_eq!(gist(server.attr(C, S)), [Revoke(A, 1, Range::UNIT, None, None), Revoke(B, 2, Range::UNIT, None, None)]);
}

#[test]
fn stat_of_an_extender_counts_its_own_size() {
    let mut server = extenders();
    assert_eq!(gist(server.stat(A)), [Other(A, "glimpse"), Other(B, "glimpse")]);
}

fn handing() -> Server {
    let mut server = Server::with(ServerOptions { conflict_granule: 1, ..ServerOptions::default() });
    server.lock(A, X, 0, 8);
    let sent = gist(server.lock(B, X, 2, 4));
    assert_eq!(sent, [Revoke(A, 1, range(2, 4), None, Some(2)), Grant(B, 2, X, range(2, 4), Some(1))]);
    server
}

#[test]
fn hand_over_is_taken() {
    let mut server = handing();
    assert!(server.server.is_incoming(data(), gid(2)));
    assert_eq!(gist(server.say(B, M::Taken { grant: gid(2), resource: data() })), [Other(A, "done")]);
    let holders: Vec<_> = server.server.holders(data()).iter().map(|holder| (holder.slot, holder.range)).collect();
    assert_eq!(holders, [(A, range(0, 2)), (A, range(4, 8)), (B, range(2, 4))]);
}

#[test]
fn hand_over_ends_in_storage_when_the_holder_flushes() {
    let mut server = handing();
    assert_eq!(gist(server.release(A, data(), 1, range(2, 3), None)), []);
    assert_eq!(gist(server.release(A, data(), 1, range(3, 4), None)), [Grant(B, 2, X, range(2, 4), None)]);
    assert_eq!(gist(server.say(B, M::Taken { grant: gid(2), resource: data() })), [], "a late TAKEN changes nothing");
}

#[test]
fn hand_over_ends_in_storage_when_the_holder_dies() {
    let mut server = handing();
    assert_eq!(gist(server.gone(A)), [Grant(B, 2, X, range(2, 4), None)]);
}

#[test]
fn hand_over_goes_back_when_the_successor_dies_or_refuses() {
    let mut server = handing();
    assert_eq!(gist(server.say(B, M::Refused { grant: gid(2), resource: data() })), [Other(A, "hand back")]);
    assert_eq!(gist(server.release(A, data(), 1, range(2, 4), None)), [Grant(B, 2, X, range(2, 4), None)]);
    let mut server = handing();
    assert_eq!(gist(server.lock(C, S, 2, 3)), [Revoke(B, 2, range(2, 3), Some(S), None)]);
    assert_eq!(gist(server.gone(B)), [Other(A, "hand back")]);
    assert_eq!(gist(server.release(A, data(), 1, range(2, 4), None)), [Grant(C, 3, S, range(2, 3), None)]);
}

#[test]
fn a_conflict_with_an_incoming_grant_revokes_it_at_once_or_hands_it_on() {
    let mut server = handing();
    // A reader: the successor remembers the revoke.
    assert_eq!(gist(server.lock(C, S, 2, 3)), [Revoke(B, 2, range(2, 3), Some(S), None)]);
    assert_eq!(gist(server.say(B, M::Taken { grant: gid(2), resource: data() })), [Other(A, "done")]);
    assert_eq!(gist(server.release(B, data(), 2, range(2, 3), Some(S))), [Grant(C, 3, S, range(2, 3), None)]);
    // A writer: once taken, the pages go on directly.
    let mut server = handing();
    assert_eq!(gist(server.lock(C, X, 2, 3)), []);
    let sent = gist(server.say(B, M::Taken { grant: gid(2), resource: data() }));
    assert_eq!(
        sent,
        [Other(A, "done"), Revoke(B, 2, range(2, 3), None, Some(3)), Grant(C, 3, X, range(2, 3), Some(2))]
    );
}

#[test]
fn a_paused_hand_over_is_a_plain_revoke() {
    let mut server = handing();
    server.lock(C, X, 2, 3);
    server.server.pause_hand_over(Ino::new(0, 5));
    server.server.pause_hand_over(Ino::new(0, 5));
    server.server.resume_hand_over(Ino::new(0, 5));
    // What had begun goes on; what waited for it gets its pages from storage.
    let sent = gist(server.say(B, M::Taken { grant: gid(2), resource: data() }));
    assert_eq!(sent, [Other(A, "done"), Revoke(B, 2, range(2, 3), None, None)]);
    assert_eq!(gist(server.release(B, data(), 2, range(2, 3), None)), [Grant(C, 3, X, range(2, 3), None)]);
    server.server.resume_hand_over(Ino::new(0, 5));
    assert_eq!(
        gist(server.lock(B, X, 2, 3)),
        [Revoke(C, 3, range(2, 3), None, Some(4)), Grant(B, 4, X, range(2, 3), Some(3))]
    );
}

#[test]
fn the_old_holder_waits_behind_its_own_hand_over() {
    let mut server = handing();
    assert_eq!(gist(server.lock(A, X, 2, 3)), []);
    let sent = gist(server.say(B, M::Taken { grant: gid(2), resource: data() }));
    assert_eq!(
        sent,
        [Other(A, "done"), Revoke(B, 2, range(2, 3), None, Some(3)), Grant(A, 3, X, range(2, 3), Some(2))]
    );
}

#[test]
fn a_dead_node_is_not_heard_and_its_next_life_is() {
    let mut server = Server::new();
    server.lock(A, X, 0, 1);
    server.lock(B, X, 0, 1);
    assert_eq!(gist(server.gone(A)), [Grant(B, 2, X, range(0, 1), None)]);
    assert_eq!(gist(server.lock(A, X, 5, 6)), []);
    let reborn = Node { slot: A, incarnation: 2 };
    let request = RequestId { node: reborn, sequence: 1 };
    let mut effects = Vec::new();
    let message = M::Lock {
        request,
        resource: data(),
        mode: X,
        need: range(5, 6),
        want: range(5, 6),
        flags: LockFlags::default(),
        upgrade: None,
        after_releases: 0,
    };
    server.server.handle(reborn, message, 0, &mut effects).unwrap();
    assert_eq!(effects.len(), 1);
}

// ---------------------------------------------------------------- client

struct Client {
    client: LockClient,
    token: u64,
    grant: u64,
    now: Tick,
}

impl Client {
    fn new() -> Client {
        Self::with(ClientOptions::default())
    }
    fn with(options: ClientOptions) -> Client {
        Client { client: LockClient::new(node(A), options), token: 0, grant: 0, now: 0 }
    }
    fn request(&mut self, kind: PinKind, lo: u64, hi: u64) -> PinRequest {
        self.token += 1;
        PinRequest::new(PinToken(self.token), data(), range(lo, hi), kind)
    }
    fn pin_as(&mut self, request: PinRequest) -> (PinToken, bool, Vec<ClientEffect>) {
        let mut effects = Vec::new();
        let pinned = self.client.pin(request, self.now, &mut effects);
        (request.token, pinned, effects)
    }
    fn pin(&mut self, kind: PinKind, lo: u64, hi: u64) -> (PinToken, bool, Vec<ClientEffect>) {
        let request = self.request(kind, lo, hi);
        self.pin_as(request)
    }
    fn pin_attr(&mut self, kind: PinKind, one_shot: bool) -> (PinToken, bool, Vec<ClientEffect>) {
        let request = PinRequest {
            resource: attr(),
            range: Range::UNIT,
            want: Range::UNIT,
            one_shot,
            ..self.request(kind, 0, 1)
        };
        self.pin_as(request)
    }
    fn unpin(&mut self, token: PinToken) -> Vec<ClientEffect> {
        let mut effects = Vec::new();
        self.client.unpin(token, self.now, &mut effects);
        effects
    }
    fn hear(&mut self, message: LockMessage) -> Vec<ClientEffect> {
        let mut effects = Vec::new();
        self.client.handle(0, message, self.now, &mut GiveUpNeed, &mut effects).unwrap();
        effects
    }
    /// Answers the LOCK among `effects` with a grant of what it needs, or of `granted`.
    fn grant(
        &mut self,
        effects: &[ClientEffect],
        granted: Option<Range>,
        from: Option<Successor>,
    ) -> Vec<ClientEffect> {
        let Some((request, resource, mode, need)) = effects.iter().find_map(|effect| match effect {
            ClientEffect::Send { message: M::Lock { request, resource, mode, need, .. }, .. } => {
                Some((*request, *resource, *mode, *need))
            }
            _ => None,
        }) else {
            panic!("no LOCK in {effects:?}")
        };
        self.grant += 1;
        self.hear(M::Grant { request, grant: gid(self.grant), resource, range: granted.unwrap_or(need), mode, from })
    }
    /// A held range.
    fn hold(&mut self, kind: PinKind, lo: u64, hi: u64) {
        let (token, pinned, effects) = self.pin(kind, lo, hi);
        assert!(!pinned);
        self.grant(&effects, None, None);
        self.unpin(token);
    }
    fn revoke(&mut self, sequence: u64, lo: u64, hi: u64, keep: Option<Mode>) -> Vec<ClientEffect> {
        self.hear(revoke(sequence, lo, hi, keep, None))
    }
    fn vacated(&mut self, effects: &[ClientEffect], outcome: Vacated) -> (bool, Vec<ClientEffect>) {
        let fence = fence(effects).expect("a Vacate");
        let mut effects = Vec::new();
        let accepted = self.client.vacated(fence, outcome, self.now, &mut effects);
        (accepted, effects)
    }
}

fn revoke(sequence: u64, lo: u64, hi: u64, keep: Option<Mode>, successor: Option<Successor>) -> LockMessage {
    M::Revoke {
        grant: gid(sequence),
        resource: data(),
        revoke_sequence: 1,
        need: range(lo, hi),
        want: range(lo, hi),
        keep,
        successor,
    }
}
fn fence(effects: &[ClientEffect]) -> Option<FenceId> {
    effects.iter().find_map(|effect| match effect {
        ClientEffect::Vacate { fence, .. } => Some(*fence),
        _ => None,
    })
}
fn pinned(effects: &[ClientEffect]) -> Vec<PinToken> {
    effects
        .iter()
        .filter_map(|effect| if let ClientEffect::Pinned { token } = effect { Some(*token) } else { None })
        .collect()
}
fn released(effects: &[ClientEffect]) -> Vec<(Range, Option<Mode>)> {
    let release = |effect: &ClientEffect| {
        if let ClientEffect::Send { message: M::Release { range, keep, .. }, .. } = effect {
            Some((*range, *keep))
        } else {
            None
        }
    };
    effects.iter().filter_map(release).collect()
}
fn asks(effects: &[ClientEffect]) -> usize {
    effects.iter().filter(|effect| matches!(effect, ClientEffect::Send { message: M::Lock { .. }, .. })).count()
}
fn sends(effects: &[ClientEffect], which: impl Fn(&LockMessage) -> bool) -> bool {
    effects.iter().any(|effect| matches!(effect, ClientEffect::Send { message, .. } if which(message)))
}
const PEER: Successor = Successor { slot: B, grant: GrantId { server: 0, server_incarnation: 1, sequence: 70 } };

#[test]
fn a_pin_without_lock_asks_and_a_cached_lock_serves_the_next() {
    let mut client = Client::new();
    let request = PinRequest { want: range(0, 10), ..client.request(PinKind::Shared, 2, 3) };
    let (first, now, effects) = client.pin_as(request);
    assert!(!now && asks(&effects) == 1);
    assert_eq!(client.client.held(data(), range(2, 3)), None);
    let effects = client.grant(&effects, Some(range(0, 10)), None);
    assert_eq!(pinned(&effects), [first]);
    assert!(matches!(&effects[0], ClientEffect::Acquired { fresh, .. } if *fresh == [range(0, 10)]));
    client.unpin(first);
    assert!(client.pin(PinKind::Shared, 5, 8).1, "cached");
    assert_eq!(client.client.held(data(), range(0, 10)), Some(S));
    assert_eq!(client.client.held(data(), range(0, 11)), None);
}

#[test]
fn a_pin_holds_nothing_while_it_waits() {
    let mut client = Client::new();
    client.hold(PinKind::Shared, 0, 4);
    client.pin(PinKind::Shared, 2, 6);
    // Half of it is held, and can be revoked at once.
    assert!(fence(&client.revoke(1, 0, 4, None)).is_some());
}

#[test]
fn an_upgrade_supersedes_in_place() {
    let mut client = Client::new();
    client.hold(PinKind::Shared, 0, 4);
    let (token, now, effects) = client.pin(PinKind::Write, 1, 2);
    assert!(!now && sends(&effects, |message| matches!(message, M::Lock { upgrade: Some(old), .. } if *old == gid(1))));
    let effects = client.grant(&effects, None, None);
    assert_eq!(pinned(&effects), [token]);
    assert!(matches!(&effects[0], ClientEffect::Acquired { fresh, .. } if fresh.is_empty()));
    assert_eq!(client.client.held(data(), range(1, 2)), Some(X));
    assert_eq!(client.client.held(data(), range(0, 4)), Some(S));
}

#[test]
fn a_fence_drains_pins_and_stops_new_ones() {
    let mut client = Client::new();
    client.hold(PinKind::Write, 0, 8);
    let (inside, now, _) = client.pin(PinKind::Write, 0, 2);
    assert!(now);
    let effects = client.revoke(1, 0, 4, None);
    assert!(fence(&effects).is_none(), "it waits for the pin");
    let (outside, now, _) = client.pin(PinKind::Write, 4, 8);
    assert!(now, "what is not asked for is not disturbed");
    let (late, now, effects) = client.pin(PinKind::Write, 1, 2);
    assert!(!now && asks(&effects) == 0, "it waits behind the fence");
    let effects = client.unpin(inside);
    assert!(fence(&effects).is_some() && pinned(&effects).is_empty());
    let (accepted, effects) = client.vacated(&effects, Vacated::WrittenBack);
    assert!(accepted);
    assert_eq!(released(&effects), [(range(0, 4), None)]);
    assert_eq!(asks(&effects), 1, "then it asks anew, after the release");
    assert!(sends(&effects, |message| matches!(message, M::Lock { after_releases: 1, .. })));
    assert_eq!(client.client.held(data(), range(4, 8)), Some(X));
    let effects = client.grant(&effects, None, None);
    assert_eq!(pinned(&effects), [late]);
    client.unpin(outside);
}

#[test]
fn a_downgrade_keeps_shared() {
    let mut client = Client::new();
    client.hold(PinKind::Write, 0, 8);
    let effects = client.revoke(1, 0, 4, Some(S));
    assert!(matches!(effects[0], ClientEffect::Vacate { keep: Some(S), held: X, .. }));
    // Weaker before it is done: swept again.
    let more = client.revoke(1, 0, 4, None);
    assert!(more.is_empty());
    let (accepted, effects) = client.vacated(&effects, Vacated::WrittenBack);
    assert!(!accepted);
    assert!(matches!(effects[0], ClientEffect::Vacate { keep: None, .. }));
    assert_eq!(released(&client.vacated(&effects, Vacated::WrittenBack).1), [(range(0, 4), None)]);
    // A revoke of what is no more than that already is answered at once.
    client.hold(PinKind::Shared, 20, 21);
    assert_eq!(released(&client.revoke(2, 20, 21, Some(S))), [(range(20, 21), Some(S))]);
    assert_eq!(client.client.held(data(), range(20, 21)), Some(S));
}

#[test]
fn unknown_grants_are_answered() {
    let mut client = Client::new();
    assert_eq!(released(&client.revoke(9, 0, 4, None)), [(range(0, 4), None)]);
    assert!(sends(&client.hear(M::Glimpse { grant: gid(9), resource: attr(), round: 4 }), |message| matches!(
        message,
        M::Glimpsed { round: 4, .. }
    )));
    assert_eq!(
        released(&client.hear(M::HandBack { grant: gid(9), resource: data(), range: range(0, 1) })),
        [(range(0, 1), None)]
    );
    assert!(client.hear(M::Done { grant: gid(9), resource: data(), range: range(0, 1) }).is_empty());
    assert!(client.hear(M::Thaw { grant: gid(9), resource: attr(), round: 4 }).is_empty());
}

#[test]
fn through_fence_pins_enter_until_vacated_and_cause_another_sweep() {
    let mut client = Client::new();
    client.hold(PinKind::Write, 0, 8);
    let effects = client.revoke(1, 0, 4, None);
    let through = PinRequest { through_fence: true, ..client.request(PinKind::Write, 0, 1) };
    let (token, now, _) = client.pin_as(through);
    assert!(now);
    let (accepted, more) = client.vacated(&effects, Vacated::WrittenBack);
    assert!(!accepted && fence(&more).is_none(), "it is still inside");
    let effects = client.unpin(token);
    assert!(fence(&effects).is_some());
    // In and out between: again.
    let again = PinRequest { through_fence: true, ..client.request(PinKind::Shared, 0, 1) };
    let (token, now, _) = client.pin_as(again);
    assert!(now);
    assert!(fence(&client.unpin(token)).is_none());
    let (accepted, effects) = client.vacated(&effects, Vacated::WrittenBack);
    assert!(!accepted);
    assert!(client.vacated(&effects, Vacated::WrittenBack).0);
    let late = PinRequest { through_fence: true, ..client.request(PinKind::Shared, 0, 1) };
    assert!(!client.pin_as(late).1);
}

fn reservation(options: ClientOptions) -> bool {
    let mut client = Client::with(options);
    client.hold(PinKind::Shared, 0, 4);
    let (alone, _, effects) = client.pin(PinKind::Exclusive, 0, 4);
    let upcall = PinRequest { through_fence: true, ..client.request(PinKind::Shared, 0, 1) };
    let (inside, now, _) = client.pin_as(upcall);
    assert!(now);
    assert!(pinned(&client.grant(&effects, None, None)).is_empty(), "the upcall is inside");
    assert!(fence(&client.revoke(2, 0, 4, None)).is_none());
    let effects = client.unpin(inside);
    if pinned(&effects) != [alone] || fence(&effects).is_some() {
        return false;
    }
    fence(&client.unpin(alone)).is_some()
}

#[test]
fn each_grant_serves_the_pin_that_asked() {
    assert!(reservation(ClientOptions::default()));
    let mutations = Mutations { skip_reservation: true, ..Mutations::default() };
    assert!(!reservation(ClientOptions { mutations, ..ClientOptions::default() }), "somebody notices skip_reservation");
}

#[test]
fn exclusive_runs_alone_and_is_not_starved() {
    let mut client = Client::new();
    client.hold(PinKind::Write, 0, 8);
    let (reader, now, _) = client.pin(PinKind::Shared, 0, 2);
    assert!(now);
    let (alone, now, _) = client.pin(PinKind::Exclusive, 0, 4);
    assert!(!now);
    let (later, now, _) = client.pin(PinKind::Shared, 1, 2);
    assert!(!now, "it does not pass the one who waits to be alone");
    assert!(client.pin(PinKind::Shared, 6, 7).1);
    let upcall = PinRequest { through_fence: true, ..client.request(PinKind::Shared, 0, 1) };
    let (upcall, now, _) = client.pin_as(upcall);
    assert!(now);
    client.unpin(upcall);
    assert_eq!(pinned(&client.unpin(reader)), [alone]);
    assert_eq!(pinned(&client.unpin(alone)), [later]);
}

#[test]
fn cancel_crosses_grant() {
    let mut client = Client::new();
    let (token, _, asked) = client.pin(PinKind::Write, 0, 1);
    assert!(sends(&client.unpin(token), |message| matches!(message, M::Cancel { .. })));
    client.grant(&asked, None, None);
    assert_eq!(client.client.held(data(), range(0, 1)), Some(X), "what came is kept until revoked");
    // Confirmed: nothing is left.
    let (token, _, asked) = client.pin(PinKind::Write, 7, 8);
    client.unpin(token);
    let ClientEffect::Send { message: M::Lock { request, .. }, .. } = &asked[0] else { panic!() };
    client.hear(M::Deny { request: *request, errno: 125 });
    assert_eq!(client.client.waiting().count(), 0);
}

#[test]
fn a_request_outlives_its_asker_if_another_pin_waits_for_it() {
    let mut client = Client::new();
    let (first, _, asked) = client.pin(PinKind::Write, 0, 4);
    let (second, _, none) = client.pin(PinKind::Shared, 1, 2);
    assert_eq!(asks(&none), 0);
    assert!(client.unpin(first).is_empty());
    assert_eq!(pinned(&client.grant(&asked, None, None)), [second]);
}

#[test]
fn try_fails_rather_than_waits() {
    let mut client = Client::new();
    let attempt = PinRequest { r#try: true, ..client.request(PinKind::Write, 0, 1) };
    let (token, _, asked) = client.pin_as(attempt);
    let ClientEffect::Send { message: M::Lock { request, flags, .. }, .. } = &asked[0] else { panic!() };
    assert!(flags.r#try);
    assert_eq!(client.hear(M::Deny { request: *request, errno: 11 }), [ClientEffect::PinFailed { token, errno: 11 }]);
    client.hold(PinKind::Write, 0, 1);
    client.revoke(1, 0, 1, None);
    let attempt = PinRequest { r#try: true, ..client.request(PinKind::Write, 0, 1) };
    let (token, _, effects) = client.pin_as(attempt);
    assert_eq!(effects, [ClientEffect::PinFailed { token, errno: 11 }]);
}

#[test]
fn incoming_waits_for_its_pages_and_remembers_revokes() {
    let mut client = Client::new();
    let (token, _, asked) = client.pin(PinKind::Write, 0, 2);
    let effects = client.grant(&asked, None, Some(PEER));
    assert!(matches!(effects[..], [ClientEffect::AwaitHandOver { .. }]));
    assert_eq!(client.client.held(data(), range(0, 2)), None);
    assert!(client.revoke(1, 0, 1, None).is_empty(), "remembered");
    let mut effects = Vec::new();
    client.client.fetched(gid(1), true, 0, &mut effects);
    assert!(sends(&effects, |message| matches!(message, M::Taken { .. })));
    assert_eq!(pinned(&effects), [token]);
    assert!(fence(&effects).is_none(), "its operation runs once");
    assert!(fence(&client.unpin(token)).is_some());
}

#[test]
fn incoming_ends_in_storage() {
    let mut client = Client::new();
    let (token, _, asked) = client.pin(PinKind::Write, 0, 2);
    let effects = client.grant(&asked, None, Some(PEER));
    assert_eq!(pinned(&effects), []);
    let mut effects = Vec::new();
    client.client.fetched(gid(1), false, 0, &mut effects);
    assert!(sends(&effects, |message| matches!(message, M::Refused { .. })));
    let mut effects = Vec::new();
    client.client.fetched(gid(1), true, 0, &mut effects);
    assert!(effects.is_empty(), "what was read after a refusal does not count");
    let request = RequestId { node: node(A), sequence: 1 };
    let again = M::Grant { request, grant: gid(1), resource: data(), range: range(0, 2), mode: X, from: None };
    assert_eq!(pinned(&client.hear(again.clone())), [token]);
    assert!(client.hear(again).is_empty(), "once is enough");
}

#[test]
fn handed_over_pages_stay_until_done_or_come_back() {
    let mut client = Client::new();
    client.hold(PinKind::Write, 0, 8);
    let effects = client.hear(revoke(1, 2, 4, None, Some(PEER)));
    assert!(matches!(effects[0], ClientEffect::Vacate { successor: Some(PEER), .. }));
    let (accepted, effects) = client.vacated(&effects, Vacated::HandedOver);
    assert!(accepted && released(&effects).is_empty());
    assert_eq!(client.client.held(data(), range(2, 4)), None);
    let done = M::Done { grant: gid(1), resource: data(), range: range(2, 4) };
    assert_eq!(client.hear(done), [ClientEffect::Dropped { resource: data(), range: range(2, 4), grant: gid(1) }]);
    let effects = client.hear(revoke(1, 4, 6, None, Some(PEER)));
    client.vacated(&effects, Vacated::HandedOver);
    let effects = client.hear(M::HandBack { grant: gid(1), resource: data(), range: range(4, 6) });
    assert!(matches!(effects[0], ClientEffect::Vacate { successor: None, keep: None, .. }));
    let upcall = PinRequest { through_fence: true, ..client.request(PinKind::Shared, 4, 5) };
    assert!(!client.pin_as(upcall).1, "pages that were away are not read here");
    assert_eq!(released(&client.vacated(&effects, Vacated::WrittenBack).1), [(range(4, 6), None)]);
}

#[test]
fn hand_back_before_the_hand_over_stops_it() {
    let mut client = Client::new();
    client.hold(PinKind::Write, 0, 8);
    let effects = client.hear(revoke(1, 2, 4, None, Some(PEER)));
    assert!(client.hear(M::HandBack { grant: gid(1), resource: data(), range: range(2, 4) }).is_empty());
    let (accepted, effects) = client.vacated(&effects, Vacated::HandedOver);
    assert!(!accepted && matches!(effects[0], ClientEffect::Vacate { successor: None, .. }));
}

fn extender() -> (Client, PinToken) {
    let mut client = Client::new();
    let (token, _, asked) = client.pin_attr(PinKind::Extend, false);
    client.grant(&asked, None, None);
    (client, token)
}

#[test]
fn a_glimpse_drains_and_freezes() {
    let (mut client, token) = extender();
    let glimpse = |round| M::Glimpse { grant: gid(1), resource: attr(), round };
    let thaw = |round| M::Thaw { grant: gid(1), resource: attr(), round };
    assert!(client.hear(glimpse(1)).is_empty());
    let (late, now, _) = client.pin_attr(PinKind::Extend, false);
    assert!(!now);
    assert!(sends(&client.unpin(token), |message| matches!(message, M::Glimpsed { round: 1, .. })));
    // Another round before the first ends.
    assert!(sends(&client.hear(glimpse(2)), |message| matches!(message, M::Glimpsed { round: 2, .. })));
    assert!(client.hear(thaw(1)).is_empty());
    assert_eq!(pinned(&client.hear(thaw(2))), [late]);
}

#[test]
fn a_one_shot_pin_is_answered_without_a_lock() {
    let mut client = Client::new();
    let (token, _, asked) = client.pin_attr(PinKind::Shared, true);
    let ClientEffect::Send { message: M::Lock { request, flags, .. }, .. } = &asked[0] else { panic!() };
    assert!(flags.one_shot);
    assert_eq!(
        asks(&client.pin_attr(PinKind::Shared, true).2),
        1,
        "an answer to another may be older than this one's beginning"
    );
    assert_eq!(client.hear(M::Observed { request: *request }), [ClientEffect::Observed { token }]);
}

#[test]
fn open_pins_join_those_inside() {
    let mut client = Client::new();
    let open = Resource::open(Ino::new(0, 5));
    let request = |client: &mut Client| PinRequest {
        resource: open,
        range: Range::UNIT,
        want: Range::UNIT,
        ..client.request(PinKind::Shared, 0, 1)
    };
    let first = request(&mut client);
    let (first, _, asked) = client.pin_as(first);
    client.grant(&asked, None, None);
    client.hear(M::Revoke {
        grant: gid(1),
        resource: open,
        revoke_sequence: 1,
        need: Range::UNIT,
        want: Range::UNIT,
        keep: None,
        successor: None,
    });
    let second = request(&mut client);
    let (second, now, _) = client.pin_as(second);
    assert!(now);
    client.unpin(first);
    assert!(fence(&client.unpin(second)).is_some());
    let third = request(&mut client);
    assert!(!client.pin_as(third).1);
}

#[test]
fn a_grant_has_a_minimum_life() {
    let mut client = Client::with(ClientOptions { minimum_hold: 10, ..ClientOptions::default() });
    client.now = 5;
    client.hold(PinKind::Write, 0, 4);
    client.now = 6;
    assert!(client.revoke(1, 0, 4, None).is_empty());
    assert!(client.pin(PinKind::Write, 0, 1).1, "until then it is as good as ever");
    client.unpin(PinToken(2));
    assert_eq!(client.client.next_due(), Some(15));
    let mut effects = Vec::new();
    client.client.tick(14, &mut GiveUpNeed, &mut effects);
    assert!(effects.is_empty());
    client.client.tick(15, &mut GiveUpNeed, &mut effects);
    assert!(fence(&effects).is_some());
}

#[test]
fn the_policy_gives_more_but_nothing_asked_for() {
    struct All;
    impl RevokePolicy for All {
        fn give_up(&mut self, _: Resource, granted: Range, _: Range, _: Range) -> Range {
            granted
        }
    }
    let mut client = Client::new();
    client.hold(PinKind::Shared, 0, 100);
    client.pin(PinKind::Write, 50, 60);
    let mut effects = Vec::new();
    client.client.handle(0, revoke(1, 10, 11, None, None), 0, &mut All, &mut effects).unwrap();
    assert!(matches!(effects[0], ClientEffect::Vacate { range: Range { lo: 0, hi: 50 }, .. }));
}

#[test]
fn trim_gives_up_the_least_recently_used() {
    let mut client = Client::new();
    for at in 0..4 {
        let resource = Resource::data(Ino::new(0, 10 + at), 0);
        let request = PinRequest { resource, ..client.request(PinKind::Shared, 0, 1) };
        let (token, _, asked) = client.pin_as(request);
        client.grant(&asked, None, None);
        if at != 2 {
            client.unpin(token);
        }
    }
    assert_eq!(client.client.len(), 4);
    let mut effects = Vec::new();
    client.client.trim(2, &mut effects);
    let given: Vec<u64> = effects
        .iter()
        .filter_map(|effect| {
            if let ClientEffect::Vacate { resource, .. } = effect { Some(resource.ino.sequence()) } else { None }
        })
        .collect();
    assert_eq!(given, [10, 11]);
    // The fences count as given up already.
    let mut effects = Vec::new();
    client.client.trim(2, &mut effects);
    assert!(effects.is_empty());
    assert_eq!(client.hear(M::Recall { count: 9 }).len(), 1, "a pinned one stays");
}

#[test]
fn a_lost_server_voids_its_grants_and_is_asked_again() {
    let mut client = Client::new();
    client.hold(PinKind::Write, 0, 4);
    let (running, now, _) = client.pin(PinKind::Write, 0, 1);
    assert!(now);
    let (waiting, _, _) = client.pin(PinKind::Write, 8, 9);
    client.revoke(1, 2, 4, None);
    let mut effects = Vec::new();
    client.client.server_lost(0, &mut effects);
    assert_eq!(effects.iter().filter(|effect| matches!(effect, ClientEffect::Lost { mode: X, .. })).count(), 2);
    assert!(client.client.is_broken(running));
    assert_eq!(client.client.held(data(), range(0, 1)), None);
    let (_, now, effects) = client.pin(PinKind::Shared, 0, 1);
    assert!(!now && effects.is_empty());
    let mut effects = Vec::new();
    client.client.server_back(0, 0, &mut effects);
    assert_eq!(asks(&effects), 2);
    client.unpin(running);
    assert_eq!(pinned(&client.grant(&effects, None, None)), [waiting]);
}

/// A piece of an empty or inverted range once lay in the table until the next lawful grant met it, and that one never ended.
#[test]
fn a_grant_that_cannot_be_is_refused_and_changes_nothing() {
    let mut client = Client::new();
    client.hold(PinKind::Write, 20, 30);
    let request = PinRequest { want: range(0, 10), ..client.request(PinKind::Write, 2, 4) };
    let (token, _, effects) = client.pin_as(request);
    let request = effects
        .iter()
        .find_map(|effect| match effect {
            ClientEffect::Send { message: M::Lock { request, .. }, .. } => Some(*request),
            _ => None,
        })
        .expect("a LOCK");
    let lawful = |range, mode, from| M::Grant { request, grant: gid(9), resource: data(), range, mode, from };
    let other = RequestId { node: node(B), ..request };
    let mine = Successor { slot: A, ..PEER };
    for (from, message) in [
        (B, lawful(range(2, 4), X, None)),
        (0, lawful(range(3, 3), X, None)),
        (0, lawful(range(4, 2), X, None)),
        (0, lawful(range(3, 4), X, None)),
        (0, lawful(range(2, 11), X, None)),
        (0, lawful(Range::ALL, X, None)),
        (0, lawful(range(2, 4), S, None)),
        (0, lawful(range(2, 4), E, None)),
        (0, lawful(range(2, 4), S, Some(PEER))),
        (0, lawful(range(2, 4), X, Some(mine))),
        (0, M::Grant { request, grant: gid(9), resource: attr(), range: Range::UNIT, mode: X, from: None }),
        (0, M::Grant { request: other, grant: gid(9), resource: data(), range: range(2, 4), mode: X, from: None }),
        (
            0,
            M::Grant {
                request,
                grant: GrantId { server: B, ..gid(9) },
                resource: data(),
                range: range(2, 4),
                mode: X,
                from: None,
            },
        ),
        (B, M::Deny { request, errno: 22 }),
        (0, M::Observed { request }),
        (0, revoke(1, 25, 25, None, None)),
        (0, revoke(1, 20, 30, Some(E), None)),
        (0, revoke(1, 20, 30, Some(S), Some(PEER))),
        (0, revoke(1, 20, 30, None, Some(mine))),
        (B, revoke(1, 20, 30, None, None)),
        (0, M::Glimpse { grant: gid(1), resource: data(), round: 1 }),
        (0, M::HandBack { grant: gid(1), resource: data(), range: range(5, 5) }),
    ] {
        let before = client.client.clone();
        let mut effects = Vec::new();
        let outcome = client.client.handle(from, message.clone(), 0, &mut GiveUpNeed, &mut effects);
        assert!(outcome.is_err(), "taken from {from}: {message:?}");
        assert!(effects.is_empty() && client.client == before, "{message:?} has changed something");
    }
    let effects = client.hear(lawful(range(0, 10), X, None));
    assert_eq!(pinned(&effects), [token]);
}
