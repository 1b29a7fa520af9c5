//! Lock messages of two peers to a node's client and server while pins come and go. Neither panics, and a message that is
//! refused changes nothing.
//!
//! Input: steps of one byte that says what happens, and for a message the bytes its values are made of.
#![no_main]

use libfuzzer_sys::fuzz_target;
use verbfs_lock::*;
use verbfs_protocol::wire::{Source, Wire};
use verbfs_protocol::{Class, Ino, LockMessage, Node, Range, Resource};

/// The input as a source of values, most of them small: numbers of grants, requests and slots meet then.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&byte, rest)) => {
                self.0 = rest;
                byte
            }
            None => 0,
        }
    }
}

impl Source for Bytes<'_> {
    fn number(&mut self, bits: u32) -> u64 {
        let number = match self.byte() {
            byte @ 0..250 => u64::from(byte % 16),
            250 => u64::MAX,
            251 => u64::MAX - 1,
            _ => (0..8).fold(0, |number, _| number << 8 | u64::from(self.byte())),
        };
        number & (u64::MAX >> (64 - bits.clamp(1, 64)))
    }
    fn below(&mut self, bound: u64) -> u64 {
        u64::from(self.byte()) % bound
    }
    fn length(&mut self, maximum: usize) -> usize {
        usize::from(self.byte() % 4).min(maximum)
    }
    fn is_lawful(&self) -> bool {
        false
    }
}

/// Pins at most: the search is for messages.
const PINS_MAX: u64 = 64;

fn resource(choice: u8) -> Resource {
    let server = u16::from(choice % 3);
    let ino = Ino::new(server, 7);
    match choice / 3 % 3 {
        0 => Resource::data(ino, server),
        1 => Resource::attr(ino),
        _ => Resource::name(ino),
    }
}

fuzz_target!(|input: &[u8]| {
    let me = Node { slot: 0, incarnation: 1 };
    let mut client = LockClient::new(me, ClientOptions::default());
    let mut server = LockServer::new(0, 1, ServerOptions::default());
    let mut token = 0;
    let mut fences: Vec<FenceId> = Vec::new();
    let mut rest = input;
    let mut now = 0;
    while let Some((&step, after)) = rest.split_first() {
        rest = after;
        now += 1;
        let mut effects = Vec::new();
        match step % 8 {
            0..=3 => {
                let mut source = Bytes(rest);
                let message = LockMessage::sample(&mut source);
                rest = source.0;
                let from = Node { slot: 1 + u16::from(step / 8 % 2), incarnation: 1 };
                if is_for_server(&message) {
                    let mut effects = Vec::new();
                    let before = server.clone();
                    if server.handle(from, message, now, &mut effects).is_err() {
                        assert!(effects.is_empty() && server == before, "a refused message changed the server");
                    }
                } else {
                    let before = client.clone();
                    if client.handle(from.slot, message, now, &mut GiveUpNeed, &mut effects).is_err() {
                        assert!(effects.is_empty() && client == before, "a refused message changed the client");
                    }
                }
            }
            4 | 5 if token < PINS_MAX => {
                token += 1;
                let resource = resource(step / 8);
                let kind = match (step % 8, resource.class) {
                    (4, Class::Attr) => PinKind::Extend,
                    (4, _) => PinKind::Write,
                    _ => PinKind::Shared,
                };
                client.pin(PinRequest::new(PinToken(token), resource, Range::UNIT, kind), now, &mut effects);
            }
            6 if token > 0 => client.unpin(PinToken(1 + u64::from(step / 8) % token), now, &mut effects),
            7 => {
                for fence in std::mem::take(&mut fences) {
                    client.vacated(fence, Vacated::WrittenBack, now, &mut effects);
                }
                client.tick(now, &mut GiveUpNeed, &mut effects);
                server.node_gone(1 + u16::from(step / 8 % 2), now, &mut Vec::new());
                client.server_lost(1 + u16::from(step / 8 % 2), &mut effects);
                client.server_back(1 + u16::from(step / 8 % 2), now, &mut effects);
            }
            _ => {}
        }
        fences.extend(effects.iter().filter_map(|effect| match effect {
            ClientEffect::Vacate { fence, .. } => Some(*fence),
            _ => None,
        }));
    }
});
