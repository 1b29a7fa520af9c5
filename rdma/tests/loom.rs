//! The shared-memory algorithms of `verbfs_rdma::sync`, under every interleaving and reordering that loom can find.
//! Runs with plain `cargo test`: the algorithms are generic over their words.

use std::sync::atomic::Ordering;

use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread;
use verbfs_rdma::sync::immediate_ring::{Consumer, ENTRY_WORDS, Producer, PushError};
use verbfs_rdma::sync::{Platform, Word, event_count, publication, revocation};

struct Loom;

#[derive(Debug)]
struct LoomWord(AtomicU64);

impl LoomWord {
    fn new() -> LoomWord {
        LoomWord(AtomicU64::new(0))
    }
}

impl Word for LoomWord {
    fn load(&self, order: Ordering) -> u64 {
        self.0.load(order)
    }
    fn store(&self, value: u64, order: Ordering) {
        self.0.store(value, order)
    }
    fn swap(&self, value: u64, order: Ordering) -> u64 {
        self.0.swap(value, order)
    }
}

impl Platform for Loom {
    type Word = LoomWord;
    fn fence(order: Ordering) {
        loom::sync::atomic::fence(order)
    }
}

fn model(check: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(check);
}

/// The receiver sleeps only if the sender sees it sleep.
#[test]
fn no_wake_up_is_lost() {
    model(|| {
        let words = Arc::new([LoomWord::new(), LoomWord::new()]);
        let sender = thread::spawn({
            let words = words.clone();
            move || {
                publication::publish(&words[0], 1);
                event_count::must_wake::<Loom>(&words[1])
            }
        });
        event_count::announce::<Loom>(&words[1]);
        let found = publication::observe(&words[0]) != 0;
        if found {
            event_count::withdraw::<Loom>(&words[1]);
        }
        let woken = sender.join().unwrap();
        assert!(found || woken, "the receiver sleeps and nobody wakes it");
    });
}

/// Of two senders exactly those that see the announcement pay for the wake-up: at most one.
#[test]
fn one_announcement_is_one_wake_up() {
    model(|| {
        let sleeping = Arc::new(LoomWord::new());
        event_count::announce::<Loom>(&sleeping);
        let other = thread::spawn({
            let sleeping = sleeping.clone();
            move || event_count::must_wake::<Loom>(&sleeping)
        });
        let here = event_count::must_wake::<Loom>(&sleeping);
        assert_eq!(usize::from(here) + usize::from(other.join().unwrap()), 1);
    });
}

/// Immediates arrive in order, whole, and with what was written before them; a ring of two wraps.
#[test]
fn immediates_follow_their_bytes() {
    struct Ring {
        entries: [[LoomWord; ENTRY_WORDS]; 2],
        head: LoomWord,
        stalled: LoomWord,
        data: [LoomWord; 3],
    }
    model(|| {
        let entry = || [LoomWord::new(), LoomWord::new(), LoomWord::new()];
        let ring = Arc::new(Ring {
            entries: [entry(), entry()],
            head: LoomWord::new(),
            stalled: LoomWord::new(),
            data: [LoomWord::new(), LoomWord::new(), LoomWord::new()],
        });
        let producer = thread::spawn({
            let ring = ring.clone();
            move || {
                let mut producer = Producer::default();
                for number in 0..3u32 {
                    ring.data[number as usize].store(u64::from(number) + 10, Ordering::Relaxed);
                    match producer.push::<Loom>(&ring.entries, &ring.head, &ring.stalled, number, number + 1) {
                        Ok(()) => {}
                        Err(PushError::Full) => return number,
                        Err(PushError::Corrupt) => panic!("the consumer keeps to the protocol"),
                    }
                }
                3
            }
        });
        let mut consumer = Consumer::default();
        let mut expected = 0;
        for _ in 0..2 {
            if let Some((immediate, length)) = consumer.pop::<Loom>(&ring.entries, &ring.head) {
                assert_eq!((immediate, length), (expected, expected + 1));
                let data = ring.data[immediate as usize].load(Ordering::Relaxed);
                assert_eq!(data, u64::from(immediate) + 10, "the announcement overtook its bytes");
                expected += 1;
            }
        }
        let woken = consumer.must_wake_producer::<Loom>(&ring.stalled);
        let pushed = producer.join().unwrap();
        // Three go into a ring of two as soon as one is popped: whoever still found it full overlooked the pop, so the
        // consumer must have seen that it waits.
        assert!(pushed == 3 || expected == 0 || woken, "the producer waits for ever");
    });
}

/// Once the target finds the initiator quiet after revoking, no byte changes any more.
#[test]
fn the_revoked_stay_out() {
    model(|| {
        let words = Arc::new([LoomWord::new(), LoomWord::new(), LoomWord::new()]);
        let initiator = thread::spawn({
            let words = words.clone();
            move || {
                for value in 1..=2 {
                    if revocation::enter::<Loom>(&words[0], &words[1]) {
                        words[2].store(value, Ordering::Relaxed);
                        revocation::leave::<Loom>(&words[1]);
                    }
                }
            }
        });
        revocation::revoke::<Loom>(&words[0]);
        let quiet = revocation::is_quiet::<Loom>(&words[1]);
        let before = words[2].load(Ordering::Relaxed);
        initiator.join().unwrap();
        let after = words[2].load(Ordering::Relaxed);
        assert!(!quiet || before == after, "memory changed behind a fence");
    });
}

/// A ring of two units, three records: bodies are whole, and units are empty when they are written again.
#[test]
fn records_are_whole_and_units_are_reused_empty() {
    struct Ring {
        heads: [LoomWord; 2],
        bodies: [LoomWord; 2],
        credit: LoomWord,
    }
    model(|| {
        let pair = || [LoomWord::new(), LoomWord::new()];
        let ring = Arc::new(Ring { heads: pair(), bodies: pair(), credit: LoomWord::new() });
        let sender = thread::spawn({
            let ring = ring.clone();
            move || {
                for position in 0..3u64 {
                    if position - publication::observe(&ring.credit) >= 2 {
                        return;
                    }
                    let unit = position as usize % 2;
                    ring.bodies[unit].store(position + 100, Ordering::Relaxed);
                    publication::publish(&ring.heads[unit], position + 1);
                }
            }
        });
        let mut position = 0u64;
        for _ in 0..3 {
            let unit = position as usize % 2;
            let head = publication::observe(&ring.heads[unit]);
            if head != 0 {
                assert_eq!(head, position + 1, "an old record passes for a new one");
                assert_eq!(ring.bodies[unit].load(Ordering::Relaxed), position + 100, "a torn record");
                publication::clear(&ring.heads[unit]);
                position += 1;
                publication::publish(&ring.credit, position);
            }
        }
        sender.join().unwrap();
    });
}
