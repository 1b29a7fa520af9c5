//! A node between an honest member (slot 1) and a liar (slot 2), message by message.

use super::*;
use crate::cache::PrivateMemory;
use verbfs_arena::{Arena, ArenaOptions, ExtentTable};
use verbfs_lock::PinKind;
use verbfs_namespace::{Store, StoreOptions};
use verbfs_protocol::lock::Successor;

const ME: Slot = 0;
const HONEST: Slot = 1;
const LIAR: Slot = 2;

/// What the volume has told its fabric, and what the fabric will tell it.
#[derive(Default)]
struct Wire {
    sent: Vec<(Slot, Message)>,
    refused: Vec<Slot>,
    events: Vec<TransportEvent>,
}

struct TestTransport(Rc<RefCell<Wire>>);

impl Transport for TestTransport {
    fn send(&mut self, slot: Slot, _: verbfs_protocol::lock::Lane, record: &[u8]) -> std::result::Result<(), String> {
        let (_, message) = Message::from_record(record).map_err(|error| error.to_string())?;
        self.0.borrow_mut().sent.push((slot, message));
        Ok(())
    }
    fn read(&mut self, _: Slot, _: usize, _: u32, _: u64, _: usize, work: u64) -> std::result::Result<(), String> {
        self.0.borrow_mut().events.push(TransportEvent::Completed { work, ok: true });
        Ok(())
    }
    fn write(&mut self, _: Slot, _: usize, _: u32, _: u64, _: usize, work: u64) -> std::result::Result<(), String> {
        self.0.borrow_mut().events.push(TransportEvent::Completed { work, ok: true });
        Ok(())
    }
    fn poll(&mut self, events: &mut Vec<TransportEvent>) {
        events.append(&mut self.0.borrow_mut().events);
    }
    fn refuse(&mut self, slot: Slot, _: &str) {
        self.0.borrow_mut().refused.push(slot);
    }
    fn statistics(&self) -> TransportStatistics {
        TransportStatistics::default()
    }
    fn event_fd(&self) -> std::os::fd::RawFd {
        -1
    }
    fn arm(&mut self) -> bool {
        true
    }
    fn is_quiet(&mut self) -> bool {
        false
    }
    fn interrupt(&self) {}
    fn maintain(&mut self) {}
}

struct Bench {
    volume: Rc<Volume>,
    wire: Rc<RefCell<Wire>>,
    _directory: tempfile::TempDir,
}

fn node(slot: Slot) -> Node {
    Node { slot, incarnation: 1 }
}

impl Bench {
    /// Slot 0 of three, connected to the others.
    fn new() -> Bench {
        let directory = tempfile::tempdir().expect("a directory");
        let store = Store::open(&directory.path().join("store"), StoreOptions::default()).expect("a store");
        let arena = Arena::open(&directory.path().join("arena"), 1 << 20, ArenaOptions::default()).expect("an arena");
        let extents = ExtentTable::load(&store, arena).expect("a table");
        let wire = Rc::new(RefCell::new(Wire::default()));
        let options = VolumeOptions {
            me: node(ME),
            daemon_incarnation: 1,
            members: vec![ME, HONEST, LIAR],
            chunk_pages: 4,
            width: 1,
            dirty_background: 64,
            dirty_limit: 128,
            peer_timeout: Duration::from_millis(50),
            maximum_grants: 1000,
            hand_over: true,
            minimum_hold: 0,
        };
        let foundations = Foundations {
            store,
            extents,
            arena_key: 1,
            cache: PageCache::new(Box::new(PrivateMemory::new(1 << 20).expect("memory"))),
            cache_key: 2,
            transport: Some(Box::new(TestTransport(wire.clone()))),
            metrics: Arc::new(crate::metrics::Metrics::new()),
        };
        let volume = Volume::new(options, foundations);
        volume.make_root(0o755, 0, 0).expect("a root");
        let bench = Bench { volume, wire, _directory: directory };
        bench.happen(TransportEvent::Connected { slot: HONEST, node: node(HONEST) });
        bench.happen(TransportEvent::Connected { slot: LIAR, node: node(LIAR) });
        bench
    }

    fn settle(&self) {
        loop {
            self.volume.executor.fire_timers(Instant::now());
            self.volume.run();
            if !self.volume.poll_transport() {
                break;
            }
        }
    }

    fn happen(&self, event: TransportEvent) {
        self.wire.borrow_mut().events.push(event);
        self.settle();
    }

    fn say(&self, from: Slot, message: Message) {
        self.volume.receive(node(from), message);
        self.settle();
    }

    fn say_lock(&self, from: Slot, message: LockMessage) {
        self.say(
            from,
            Message::Lock(Envelope { message, attributes: None, home_time: None, report: None, entries: None }),
        );
    }

    /// Starts a task; its result is there when it has ended.
    fn begin<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Rc<RefCell<Option<T>>> {
        let result = Rc::new(RefCell::new(None));
        let target = result.clone();
        self.volume.spawn(async move {
            let value = future.await;
            *target.borrow_mut() = Some(value);
        });
        self.settle();
        result
    }

    fn pin(&self, resource: Resource, kind: PinKind) -> Rc<RefCell<Option<Result<Pin>>>> {
        let volume = self.volume.clone();
        self.begin(async move { volume.pin(resource, Range::UNIT, Range::UNIT, kind).await })
    }

    /// The last LOCK sent to a slot.
    fn asked(&self, slot: Slot) -> RequestId {
        let wire = self.wire.borrow();
        let found = wire.sent.iter().rev().find_map(|(to, message)| match message {
            Message::Lock(Envelope { message: LockMessage::Lock { request, .. }, .. }) if *to == slot => Some(*request),
            _ => None,
        });
        found.expect("a LOCK was sent")
    }

    /// The last request sent to a slot.
    fn requested(&self, slot: Slot) -> Option<(u64, Request)> {
        self.wire.borrow().sent.iter().rev().find_map(|(to, message)| match message {
            Message::Request { id, request } if *to == slot => Some((*id, request.clone())),
            _ => None,
        })
    }

    fn refusals(&self) -> Vec<Slot> {
        std::mem::take(&mut self.wire.borrow_mut().refused)
    }

    /// A file of the honest member, as an open one is known.
    fn know_file(&self, ino: Ino) {
        let layout = Layout { chunk_pages: 4, slots: vec![ino.home()] };
        self.volume.files.borrow_mut().entry(ino).or_default().layout = Some(Rc::new(layout));
    }
}

fn grant_of(server: Slot, sequence: u64) -> GrantId {
    GrantId { server, server_incarnation: 1, sequence }
}

fn hand_over(resource: Resource, new_grant: GrantId, pages: &[u64]) -> Message {
    Message::HandOver(HandOver {
        resource,
        new_grant,
        old_grant: grant_of(resource.server, 1),
        range: Range::UNIT,
        key: 9,
        pages: pages.iter().map(|page| HandOverPage { page: *page, offset: 0, dirty: true }).collect(),
        spare: Vec::new(),
    })
}

/// GRANT of an awaited hand-over from the honest member, by itself.
fn announced(bench: &Bench, resource: Resource, grant: GrantId) {
    let from = Some(Successor { slot: HONEST, grant: grant_of(HONEST, 1) });
    let request = bench.asked(HONEST);
    bench.say_lock(HONEST, LockMessage::Grant { request, grant, resource, range: Range::UNIT, mode: Mode::X, from });
}

#[test]
fn a_false_hand_over_does_not_take_the_place_of_the_true_one() {
    let ino = Ino::new(HONEST, 7);
    let resource = Resource::data(ino, HONEST);
    let grant = grant_of(HONEST, 5);
    // Said before the grant is known, and after; the true one before it, and after.
    for (liar_first, truth_first) in [(true, true), (true, false), (false, true), (false, false)] {
        for late_lie in [false, true] {
            let bench = Bench::new();
            bench.know_file(ino);
            let pin = bench.pin(resource, PinKind::Write);
            if truth_first && !liar_first {
                bench.say(HONEST, hand_over(resource, grant, &[0]));
            }
            bench.say(LIAR, hand_over(resource, grant, &[]));
            if truth_first && liar_first {
                bench.say(HONEST, hand_over(resource, grant, &[0]));
            }
            announced(&bench, resource, grant);
            if !truth_first {
                assert!(pin.borrow().is_none(), "a hand-over that nobody but the liar gave was taken");
                if late_lie {
                    bench.say(LIAR, hand_over(resource, grant, &[]));
                    assert_eq!(bench.refusals(), [LIAR]);
                }
                bench.say(HONEST, hand_over(resource, grant, &[0]));
            }
            assert!(matches!(*pin.borrow(), Some(Ok(_))), "the true hand-over is lost");
            assert_eq!(bench.volume.cache.borrow().dirty_in(ino, Range::ALL), [0]);
        }
    }
}

#[test]
fn nobody_waits_for_what_a_lost_server_announced() {
    let ino = Ino::new(LIAR, 7);
    let resource = Resource::data(ino, LIAR);
    let bench = Bench::new();
    bench.know_file(ino);
    let pin = bench.pin(resource, PinKind::Write);
    // The liar names the honest member as the old holder, which knows nothing of it.
    let from = Some(Successor { slot: HONEST, grant: grant_of(LIAR, 1) });
    let (request, grant) = (bench.asked(LIAR), grant_of(LIAR, 5));
    bench.say_lock(LIAR, LockMessage::Grant { request, grant, resource, range: Range::UNIT, mode: Mode::X, from });
    assert!(bench.volume.is_taking_over(resource, Range::ALL));
    bench.happen(TransportEvent::Lost { slot: LIAR });
    // In its next life that server may ask for a flush: nothing of the old one is in the way.
    let volume = bench.volume.clone();
    let flushed = bench.begin(async move { volume.flush_range(resource, Range::ALL).await });
    assert!(flushed.borrow().is_some(), "a flush waits for a hand-over that died with its server");
    assert!(pin.borrow().is_none());
    bench.happen(TransportEvent::Connected { slot: LIAR, node: Node { slot: LIAR, incarnation: 2 } });
    let request = bench.asked(LIAR);
    let honest = Envelope {
        message: LockMessage::Grant {
            request,
            grant: GrantId { server_incarnation: 2, ..grant },
            resource,
            range: Range::UNIT,
            mode: Mode::X,
            from: None,
        },
        attributes: None,
        home_time: None,
        report: None,
        entries: None,
    };
    bench.volume.receive(Node { slot: LIAR, incarnation: 2 }, Message::Lock(honest));
    bench.settle();
    assert!(matches!(*pin.borrow(), Some(Ok(_))));
}

#[test]
fn a_member_grants_and_denies_only_what_it_was_asked() {
    let resource = Resource::data(Ino::new(HONEST, 7), HONEST);
    let bench = Bench::new();
    let pin = bench.pin(resource, PinKind::Write);
    let request = bench.asked(HONEST);
    let grant = grant_of(HONEST, 1);
    let lawful = LockMessage::Grant { request, grant, resource, range: Range::UNIT, mode: Mode::X, from: None };
    bench.say_lock(LIAR, lawful.clone());
    bench.say_lock(LIAR, LockMessage::Deny { request, errno: libc::EINVAL });
    bench.say_lock(LIAR, LockMessage::Glimpse { grant, resource, round: 1 });
    bench.say_lock(LIAR, LockMessage::Observed { request });
    assert_eq!(bench.refusals(), [LIAR; 4]);
    // And its own server's word has to fit the question.
    let elsewhere = LockMessage::Grant { request, grant, resource, range: Range::new(7, 9), mode: Mode::X, from: None };
    bench.say_lock(HONEST, elsewhere);
    assert_eq!(bench.refusals(), [HONEST]);
    assert!(pin.borrow().is_none());
    bench.say_lock(HONEST, lawful);
    assert!(matches!(*pin.borrow(), Some(Ok(_))));
    assert!(bench.refusals().is_empty());
}

#[test]
fn a_hand_over_brings_no_page_that_another_server_stores() {
    let ino = Ino::new(HONEST, 7);
    let resource = Resource::data(ino, LIAR);
    let bench = Bench::new();
    // Chunk 0 lies at the honest member, chunk 1 at the liar; this node has a page of chunk 0 dirty.
    let layout = Layout { chunk_pages: 4, slots: vec![HONEST, LIAR] };
    bench.volume.files.borrow_mut().entry(ino).or_default().layout = Some(Rc::new(layout));
    {
        let mut cache = bench.volume.cache.borrow_mut();
        let slot = cache.insert(ino, 1).expect("room");
        cache.mark_dirty(slot);
    }
    let range = Range::new(0, 8);
    let volume = bench.volume.clone();
    let _pin = bench.begin(async move { volume.pin(resource, range, range, PinKind::Write).await });
    let (request, grant) = (bench.asked(LIAR), grant_of(LIAR, 5));
    let from = Some(Successor { slot: LIAR, grant: grant_of(LIAR, 1) });
    bench.say_lock(LIAR, LockMessage::Grant { request, grant, resource, range, mode: Mode::X, from });
    let page = HandOverPage { page: 1, offset: 0, dirty: false };
    let old_grant = grant_of(LIAR, 1);
    bench.say(
        LIAR,
        Message::HandOver(HandOver {
            resource,
            new_grant: grant,
            old_grant,
            range,
            key: 9,
            pages: vec![page],
            spare: vec![range],
        }),
    );
    assert_eq!(bench.volume.cache.borrow().dirty_in(ino, Range::ALL), [1], "a dirty page of another server is gone");
    let spare: Vec<Range> = bench.volume.files.borrow()[&ino].spare.iter().collect();
    assert!(spare.iter().all(|range| range.lo >= 4), "pages of another server are taken for spare: {spare:?}");
}

#[test]
fn an_inode_of_a_home_that_does_not_exist_is_an_error_at_once() {
    let bench = Bench::new();
    let pin = bench.pin(Resource::attr(Ino::new(77, 1)), PinKind::Shared);
    assert!(matches!(*pin.borrow(), Some(Err(Errno::EIO))));
}

#[test]
fn a_home_speaks_for_its_own_inodes() {
    let bench = Bench::new();
    let (parent, foreign) = (Ino::new(LIAR, 1), Ino::new(HONEST, 7));
    let caller = Caller { uid: 0, gid: 0, pid: 1 };
    let new = NewInode { kind: FileKind::Regular, mode: 0o644, umask: 0, rdev: 0, target: Vec::new() };
    let volume = bench.volume.clone();
    let created = bench.begin(async move { volume.create(caller, parent, b"name", new, false, true).await });
    let (id, _) = bench.requested(LIAR).expect("the create was asked for");
    let mut attributes = bench.volume.stored_attributes(Ino::ROOT).expect("the store answers").expect("a root");
    attributes.ino = foreign;
    attributes.layout = Layout { chunk_pages: 4, slots: vec![LIAR] };
    let reply = Ok(Reply::Created { attributes: Box::new(attributes), created: false });
    bench.say(LIAR, Message::Reply { id, reply });
    assert!(created.borrow().is_some());
    let known = bench.volume.files.borrow().get(&foreign).and_then(|file| file.layout.clone());
    assert_eq!(known, None, "a liar says where an honest home's file lies");
}

#[test]
fn nobody_makes_an_inode_that_is_there() {
    let bench = Bench::new();
    let before = bench.volume.stored_attributes(Ino::ROOT).expect("the store answers").expect("a root");
    // As a participant.
    let attributes = Box::new(Attributes { mode: 0o777, uid: 1000, ..before.clone() });
    let create = Update::CreateInode { attributes, target: Vec::new(), parent: Some(Ino::ROOT), xattrs: Vec::new() };
    let transaction = OperationId { node: node(LIAR), sequence: 1 };
    bench.say(LIAR, Message::Request { id: 1, request: Request::Prepare { transaction, updates: vec![create] } });
    bench.say(LIAR, Message::Request { id: 2, request: Request::Decide { transaction, commit: true } });
    // As a coordinator that asks the liar for a fresh number.
    let caller = Caller { uid: 0, gid: 0, pid: 1 };
    let mut asked = 0;
    for number in 0..64 {
        let name = format!("directory{number}").into_bytes();
        let new = NewInode { kind: FileKind::Directory, mode: 0o755, umask: 0, rdev: 0, target: Vec::new() };
        let volume = bench.volume.clone();
        let made = bench.begin(async move { volume.make_directory(caller, Ino::ROOT, &name, new).await });
        let reserving = |slot| match bench.requested(slot) {
            Some((id, Request::ReserveInode)) => Some(id),
            _ => None,
        };
        if let Some(id) = reserving(LIAR) {
            asked += 1;
            bench.say(LIAR, Message::Reply { id, reply: Ok(Reply::Ino(Ino::ROOT)) });
            assert!(matches!(*made.borrow(), Some(Err(Errno::EPROTO))));
        } else if let Some(id) = reserving(HONEST) {
            bench.say(HONEST, Message::Reply { id, reply: Err(libc::ENOSPC) });
        }
        bench.wire.borrow_mut().sent.clear();
    }
    assert!(asked > 0, "no directory's home was the liar");
    let after = bench.volume.stored_attributes(Ino::ROOT).expect("the store answers").expect("a root");
    assert_eq!((after.mode, after.uid), (before.mode, before.uid));
}
