//! Times encoding and decoding of the messages that every lock costs.
//!
//! ```text
//! cargo run --release -p verbfs-protocol --example message-bench
//! ```

use std::hint::black_box;
use std::time::Instant;
use verbfs_protocol::header::Source;
use verbfs_protocol::lock::{LockFlags, LockMessage};
use verbfs_protocol::*;

const ROUNDS: u32 = 1_000_000;
/// The best of so many: others use the machine too.
const ATTEMPTS: usize = 7;

fn best_nanoseconds(mut work: impl FnMut()) -> f64 {
    (0..ATTEMPTS)
        .map(|_| {
            let began = Instant::now();
            (0..ROUNDS).for_each(|_| work());
            began.elapsed().as_nanos() as f64 / f64::from(ROUNDS)
        })
        .fold(f64::INFINITY, f64::min)
}

fn main() {
    let source = Source { slot: 1, node_incarnation: 7, daemon_incarnation: 3, view: 1 };
    let request = RequestId { node: Node { slot: 1, incarnation: 7 }, sequence: 123_456 };
    let grant = GrantId { server: 2, server_incarnation: 9, sequence: 654_321 };
    let resource = Resource::data(Ino::new(2, 4711), 2);
    let range = Range::new(1000, 1256);
    let messages = [
        (
            "LOCK",
            LockMessage::Lock {
                request,
                resource,
                mode: Mode::X,
                need: range,
                want: Range::ALL,
                flags: LockFlags::default(),
                upgrade: None,
                after_releases: 17,
            },
        ),
        ("GRANT", LockMessage::Grant { request, grant, resource, range, mode: Mode::X, from: None }),
        (
            "REVOKE",
            LockMessage::Revoke {
                grant,
                resource,
                revoke_sequence: 1,
                need: range,
                want: Range::ALL,
                keep: Some(Mode::S),
                successor: None,
            },
        ),
        ("RELEASE", LockMessage::Release { grant, resource, range, keep: None, revoke_sequence: 1 }),
    ];
    println!("| message | bytes | encode, ns | decode, ns |\n|---|---|---|---|");
    for (name, message) in messages {
        let message =
            Message::Lock(Envelope { message, attributes: None, home_time: None, report: None, entries: None });
        let record = message.record(source);
        let encode = best_nanoseconds(|| drop(black_box(black_box(&message).record(source))));
        let decode = best_nanoseconds(|| {
            black_box(Message::from_record(black_box(&record)).is_ok());
        });
        println!("| {name} | {} | {encode:.0} | {decode:.0} |", record.len());
    }
}
