//! Many ranges on one resource and many resources: nothing here may cost more than a look-up by range.

use std::time::{Duration, Instant};
use verbfs_lock::*;
use verbfs_protocol::lock::LockFlags;
use verbfs_protocol::{Ino, LockMessage, Mode, Node, Range, RequestId, Resource};

/// Many times what it takes, few times what a scan per request would take.
const LIMIT: Duration = Duration::from_secs(20);

fn lock(
    server: &mut LockServer,
    sequence: u64,
    slot: u16,
    resource: Resource,
    need: Range,
    no_growth: bool,
) -> Vec<ServerEffect> {
    let node = Node { slot, incarnation: 1 };
    let flags = LockFlags { no_growth, ..LockFlags::default() };
    let request = RequestId { node, sequence };
    let mut effects = Vec::new();
    let message = LockMessage::Lock {
        request,
        resource,
        mode: Mode::X,
        need,
        want: Range::ALL,
        flags,
        upgrade: None,
        after_releases: 0,
    };
    server.handle(node, message, 0, &mut effects).unwrap();
    effects
}

#[test]
fn many_ranges_on_one_resource() {
    let begun = Instant::now();
    let mut server = LockServer::new(0, 1, ServerOptions::default());
    let resource = Resource::data(Ino::new(0, 1), 0);
    const RANGES: u64 = 50_000;
    for at in 0..RANGES {
        let effects = lock(&mut server, at + 1, (at % 8) as u16, resource, Range::new(2 * at, 2 * at + 1), true);
        assert_eq!(effects.len(), 1);
    }
    // Each takes one range from its neighbour, by a revoke and a hand-over.
    for at in 0..RANGES {
        let effects =
            lock(&mut server, RANGES + at + 1, ((at + 1) % 8) as u16, resource, Range::new(2 * at, 2 * at + 1), true);
        assert_eq!(effects.len(), 2);
        let ServerEffect::Send { to, message: LockMessage::Grant { grant, .. } } = effects[1] else {
            panic!("{effects:?}")
        };
        server
            .handle(Node { slot: to, incarnation: 1 }, LockMessage::Taken { grant, resource }, 0, &mut Vec::new())
            .unwrap();
    }
    assert_eq!(server.holders(resource).len() as u64, RANGES);
    eprintln!("{RANGES} ranges granted and handed over in {:.1?}", begun.elapsed());
    assert!(cfg!(debug_assertions) || begun.elapsed() < LIMIT);
}

#[test]
fn many_resources() {
    let begun = Instant::now();
    let mut server = LockServer::new(0, 1, ServerOptions::default());
    let mut client = LockClient::new(Node { slot: 0, incarnation: 1 }, ClientOptions::default());
    const RESOURCES: u64 = if cfg!(debug_assertions) { 50_000 } else { 300_000 };
    for at in 0..RESOURCES {
        let resource = Resource::data(Ino::new(0, at + 1), 0);
        let request = PinRequest {
            want: Range::ALL,
            ..PinRequest::new(PinToken(at + 1), resource, Range::new(0, 1), PinKind::Write)
        };
        let (mut asked, mut granted, mut effects) = (Vec::new(), Vec::new(), Vec::new());
        assert!(!client.pin(request, 0, &mut asked));
        let Some(ClientEffect::Send { message, .. }) = asked.pop() else { panic!("no LOCK") };
        server.handle(Node { slot: 0, incarnation: 1 }, message, 0, &mut granted).unwrap();
        let Some(ServerEffect::Send { message, .. }) = granted.pop() else { panic!("no GRANT") };
        client.handle(0, message, 0, &mut GiveUpNeed, &mut effects).unwrap();
        client.unpin(PinToken(at + 1), 0, &mut effects);
    }
    assert_eq!(client.len() as u64, RESOURCES);
    eprintln!("{RESOURCES} resources locked in {:.1?}", begun.elapsed());
    let begun = Instant::now();
    let resource = Resource::data(Ino::new(0, 1), 0);
    const PINS: u64 = 300_000;
    for at in 0..PINS {
        let request = PinRequest::new(PinToken(RESOURCES + at + 1), resource, Range::new(at, at + 1), PinKind::Write);
        let mut effects = Vec::new();
        assert!(client.pin(request, 0, &mut effects));
        client.unpin(request.token, 0, &mut effects);
        assert!(effects.is_empty());
    }
    eprintln!("a cached lock pinned and unpinned in {:.0?}", begun.elapsed() / PINS as u32);
    let (mut effects, mut rest) = (Vec::new(), Vec::new());
    client.trim(0, &mut effects);
    for effect in effects {
        let ClientEffect::Vacate { fence, .. } = effect else { panic!("{effect:?}") };
        client.vacated(fence, Vacated::WrittenBack, 0, &mut rest);
    }
    for effect in rest {
        let ClientEffect::Send { message, .. } = effect else { panic!("{effect:?}") };
        server.handle(Node { slot: 0, incarnation: 1 }, message, 0, &mut Vec::new()).unwrap();
    }
    assert!(client.is_empty());
    assert_eq!((client.grants().count(), server.resources().count()), (0, 0), "nothing is kept of what nobody holds");
}
