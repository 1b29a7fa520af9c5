//! `verbfs-bad-peer`: a peer with the right key that says what no peer should. The daemons must live, and go on serving.
//!
//! ```text
//! verbfs-bad-peer --attack ATTACK --directory RUN --key FILE --cluster NAME --slot N --life N --target SLOT... [--seed N] [--messages N]
//! ```
//!
//! | attack | what it says |
//! |---|---|
//! | typed | every type of message that decodes, with values drawn at random and from the edges |
//! | bytes | such messages spoilt: cut, prolonged, bits turned, other versions, types, lengths, senders |
//! | answer | a home: whatever is asked is answered, mostly with what fits the question, and with attributes, layouts, extents and grants that cannot be |
//! | scribble | one-sided writes into rings and credit words, and at regions and offsets that do not exist |
//! | stranger | random bytes, true and false handshakes on the socket: needs no key |
//! | wrong-key, wrong-cluster | a handshake that must be refused |
//!
//! Values come from the protocol's own list of types (its `sample` functions), half of the time with fields that must not
//! decode. So a new type of message takes part without a line here.
//!
//! At the end of an attack each target must still answer a proper question. Exit status: 0 it does (or refused, where it should),
//! 1 it does not, 3 the tool could not do its work.

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use verbfs_harness::rng::{Rng, seed_or_clock};
use verbfs_protocol::header::{self, HEADER_LENGTH, Source};
use verbfs_protocol::lock::{LockMessage, Successor};
use verbfs_protocol::wire::{Source as Choices, Wire};
use verbfs_protocol::{
    Attributes, Envelope, Extent, FileKind, GrantId, HandOver, HandOverPage, Ino, Layout, Message, Mode, Range, Reply,
    Request, Resource, Time, group,
};
use verbfs_rdma::{Endpoint, EndpointConfig, Event, Lane, Limits, RemoteKey};

/// How long a target may take to answer at the end, connecting included.
const PATIENCE: Duration = Duration::from_secs(20);
/// Number of the question at the end of an attack.
const LAST_QUESTION: u64 = u64::MAX - 7;

#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
enum Attack {
    Typed,
    Bytes,
    Answer,
    Scribble,
    Stranger,
    WrongKey,
    WrongCluster,
}

/// Attack daemons as a peer that holds the cluster key.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[arg(long)]
    attack: Attack,
    /// Where the daemons' sockets lie.
    #[arg(long)]
    directory: PathBuf,
    /// The cluster key.
    #[arg(long)]
    key: PathBuf,
    #[arg(long)]
    cluster: String,
    /// The slot to pose as; its daemon must not run.
    #[arg(long)]
    slot: u16,
    /// Which life of that slot's node to pose as; each run needs a later one.
    #[arg(long)]
    life: u32,
    /// Who is attacked.
    #[arg(long = "target", required = true)]
    targets: Vec<u16>,
    /// Inode numbers that exist.
    #[arg(long = "ino")]
    inos: Vec<u64>,
    #[arg(long)]
    seed: Option<u64>,
    #[arg(long, default_value_t = 2000)]
    messages: u64,
    /// answer: how long.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

struct Peer {
    endpoint: Endpoint,
    rng: Rng,
    slot: u16,
    life: u32,
    inos: Vec<u64>,
    sent: BTreeMap<u16, u64>,
    disconnections: u64,
    answered: BTreeMap<u16, bool>,
    /// Whether samples must be values that decode.
    lawful: bool,
}

/// Numbers with a taste for edges and for inodes that exist, and short lists.
impl Choices for Peer {
    fn number(&mut self, bits: u32) -> u64 {
        Peer::number(self) & (u64::MAX >> (64 - bits))
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.rng.below(bound)
    }
    fn length(&mut self, maximum: usize) -> usize {
        match self.rng.below(40) {
            0 if self.lawful => maximum.min(5000),
            0 => maximum.min(70_000) + 1,
            1..8 => self.rng.below(200).min(maximum as u64) as usize,
            _ => self.rng.below(4).min(maximum as u64) as usize,
        }
    }
    fn is_lawful(&self) -> bool {
        self.lawful
    }
}

impl Peer {
    fn new(arguments: &Arguments, key: [u8; 32], cluster: &str, rng: Rng) -> Result<Peer> {
        let mut endpoint = Endpoint::new(EndpointConfig {
            slot: arguments.slot,
            node_incarnation: arguments.life,
            daemon_incarnation: arguments.life,
            cluster: cluster.to_string(),
            key,
            directory: arguments.directory.clone(),
            limits: Limits::default(),
        })?;
        endpoint.listen().context("the slot's own daemon must not run")?;
        let mut inos = vec![1, 0, 2, u64::MAX, 1 << 48, (1 << 48) + 1, (2 << 48) + 1, (9 << 48) + 1];
        inos.extend(&arguments.inos);
        Ok(Peer {
            endpoint,
            rng,
            slot: arguments.slot,
            life: arguments.life,
            inos,
            sent: BTreeMap::new(),
            disconnections: 0,
            answered: BTreeMap::new(),
            lawful: true,
        })
    }

    fn source(&self) -> Source {
        Source { slot: self.slot, node_incarnation: self.life, daemon_incarnation: self.life, view: 1 }
    }

    /// Handles what has come; `answer`: as a bad home.
    fn poll(&mut self, answer: bool) {
        let mut events = Vec::new();
        self.endpoint.poll(&mut events);
        let quiet = events.is_empty();
        for event in events {
            match event {
                Event::Disconnected { .. } => self.disconnections += 1,
                Event::Message { slot, payload, .. } => {
                    let Ok((_, message)) = Message::from_record(&payload) else { continue };
                    if let Message::Reply { id: LAST_QUESTION, .. } = message {
                        self.answered.insert(slot, true);
                    } else if answer {
                        self.answer(slot, message);
                    }
                }
                _ => {}
            }
        }
        if quiet {
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits for a connection.
    fn connected(&mut self, target: u16, answer: bool) -> Result<()> {
        let began = Instant::now();
        let mut attempted: Option<Instant> = None;
        while !self.endpoint.is_connected(target) {
            ensure!(began.elapsed() < PATIENCE, "slot {target} does not let a peer in again");
            if attempted.is_none_or(|at| at.elapsed() > Duration::from_millis(20)) {
                attempted = Some(Instant::now());
                let _ = self.endpoint.connect(target);
            }
            self.poll(answer);
        }
        Ok(())
    }

    fn send_record(&mut self, target: u16, lane: Lane, record: &[u8]) {
        // No session, or a full queue: the attack goes on with the next one.
        if self.endpoint.send(target, lane, record).is_ok() {
            *self.sent.entry(target).or_default() += 1;
        }
    }

    fn send(&mut self, target: u16, message: &Message) {
        let record = message.record(self.source());
        self.send_record(target, lane_of(message), &record);
    }

    /// A number with a taste for edges.
    fn number(&mut self) -> u64 {
        match self.rng.below(8) {
            0 => *self.rng.pick(&[
                0,
                1,
                255,
                256,
                4095,
                4096,
                u64::MAX,
                u64::MAX - 1,
                1 << 32,
                1 << 63,
                u64::MAX / 4096,
                (1 << 52) - 1,
                1 << 51,
            ]),
            1 => self.rng.bits() >> self.rng.below(64),
            2 | 3 => *self.rng.pick(&self.inos),
            _ => self.rng.below(6),
        }
    }

    fn typed<T: Wire>(&mut self) -> T {
        self.lawful = self.rng.percent(50);
        T::sample(self)
    }

    fn typed_message(&mut self) -> Message {
        loop {
            // All groups often, although requests and replies have most of the types.
            let wanted = *self.rng.pick(&[
                group::LOCK,
                group::LOCK,
                group::LOCK,
                group::REQUEST,
                group::REQUEST,
                group::REQUEST,
                group::REPLY,
                group::HAND_OVER,
                group::BEAT,
            ]);
            let types: Vec<u16> =
                Message::types().into_iter().filter(|number| number.to_be_bytes()[0] == wanted).collect();
            let message_type = *self.rng.pick(&types);
            self.lawful = self.rng.percent(80);
            let mut message = Message::sample(message_type, self).expect("the list of types is complete");
            // Numbers of requests that may be outstanding.
            if let Message::Request { id, .. } | Message::Reply { id, .. } = &mut message {
                *id = self.rng.below(100);
            }
            match &message {
                // What a peer may lawfully destroy is no test: no commits, no changes to what exists.
                Message::Request { request: Request::Decide { commit: true, .. }, .. } => continue,
                Message::Request { request: Request::Free { ino, .. } | Request::Commit { ino, .. }, .. }
                    if self.inos[8..].contains(&ino.0) =>
                {
                    continue;
                }
                _ => return message,
            }
        }
    }

    fn spoilt(&mut self) -> (Lane, Vec<u8>) {
        let message = self.typed_message();
        let mut record = message.record(self.source());
        let lane = if self.rng.percent(80) { lane_of(&message) } else { *self.rng.pick(&Lane::ALL) };
        match self.rng.below(9) {
            0 => record.truncate(self.rng.below(record.len() as u64 + 1) as usize),
            1 => record.extend((0..self.rng.between(1, 3000)).map(|_| 7)),
            2 => {
                for _ in 0..self.rng.between(1, 8) {
                    let at = self.rng.below(record.len() as u64) as usize;
                    record[at] ^= 1 << self.rng.below(8);
                }
            }
            // The header, field by field: version, type, view, slot, zero, incarnations, length.
            3 => {
                let at = self.rng.below(HEADER_LENGTH as u64) as usize;
                record[at] = self.rng.bits() as u8;
            }
            4 => record = (0..self.rng.below(2000)).map(|_| self.rng.bits() as u8).collect(),
            5 => {
                // A length that lies about a body that is there.
                let length = (self.number() as u32).to_le_bytes();
                record[20..24].copy_from_slice(&length);
            }
            6 => {
                // A body cut, and a length that agrees.
                record.truncate(HEADER_LENGTH + self.rng.below((record.len() - HEADER_LENGTH) as u64 + 1) as usize);
                let length = ((record.len() - HEADER_LENGTH) as u32).to_le_bytes();
                record[20..24].copy_from_slice(&length);
            }
            7 => {
                let body: Vec<u8> = (0..self.rng.below(600)).map(|_| self.rng.bits() as u8).collect();
                let message_type = self.rng.below(8) as u16;
                record = header::frame(self.source(), message_type, &body);
            }
            _ => {
                // A list said to be longer than memory.
                let at = HEADER_LENGTH + self.rng.below((record.len() - HEADER_LENGTH) as u64 + 1) as usize;
                record.truncate(at);
                record.extend([0xff; 4]);
                let length = ((record.len() - HEADER_LENGTH) as u32).to_le_bytes();
                record[20..24].copy_from_slice(&length);
            }
        }
        (lane, record)
    }

    fn range(&mut self, near: Range) -> Range {
        match self.rng.below(6) {
            0 => Range { lo: self.number(), hi: self.number() },
            1 => Range::ALL,
            2 => Range { lo: near.hi, hi: near.lo },
            _ => near,
        }
    }

    fn attributes(&mut self, ino: Ino) -> Attributes {
        let slots = self
            .rng
            .pick(&[vec![2, 0, 1], vec![2, 0, 1], vec![2], vec![], vec![0], vec![65535], vec![2, 77], vec![2; 300]])
            .clone();
        Attributes {
            ino: if self.rng.percent(80) { ino } else { Ino(self.number()) },
            kind: *self.rng.pick(&[
                FileKind::Regular,
                FileKind::Regular,
                FileKind::Directory,
                FileKind::Symlink,
                FileKind::Fifo,
            ]),
            mode: self.number() as u32,
            uid: 0,
            gid: 0,
            nlink: self.number() as u32,
            rdev: self.number() as u32,
            size: self.number(),
            pages: self.number(),
            atime: Time { seconds: self.number() as i64, nanoseconds: self.number() as u32 },
            mtime: Time { seconds: self.number() as i64, nanoseconds: self.number() as u32 },
            ctime: Time { seconds: i64::MAX, nanoseconds: u32::MAX },
            crtime: Time::default(),
            truncate_generation: self.number(),
            layout: Layout { chunk_pages: *self.rng.pick(&[256, 256, 256, 1, 0, u32::MAX]), slots },
            has_xattrs: self.rng.percent(30),
        }
    }

    fn reply(&mut self, request: &Request) -> Result<Reply, i32> {
        if self.rng.percent(15) {
            return if self.rng.percent(50) { Ok(self.typed()) } else { Err(self.number() as i32) };
        }
        let mut reply = match request {
            Request::Lookup { .. } => {
                let ino = Ino(self.number());
                Reply::Entry(self.rng.percent(80).then_some((ino, FileKind::Regular)))
            }
            Request::List { .. } => {
                let entries = (0..self.rng.below(5)).map(|_| self.typed()).collect();
                Reply::Entries { entries, end: self.rng.percent(70) }
            }
            Request::Layout { range, .. } | Request::Allocate { range, .. } => {
                let extents = (0..self.rng.below(4))
                    .map(|_| Extent {
                        page: if self.rng.percent(70) { range.lo } else { self.number() },
                        arena_page: self.number(),
                        pages: self.number(),
                        committed: self.rng.percent(70),
                    })
                    .collect();
                Reply::Extents { key: self.rng.below(40) as u32, extents, allocated: self.number() }
            }
            Request::ReserveInode | Request::Parent { .. } => Reply::Ino(Ino(self.number())),
            Request::Operation { .. } => {
                let ino = Ino(self.number());
                let attributes = Box::new(self.attributes(ino));
                if self.rng.percent(60) {
                    Reply::Created { attributes, created: self.rng.percent(50) }
                } else {
                    Reply::Attributes(attributes)
                }
            }
            Request::ReadLink { .. } | Request::GetXattr { .. } => {
                let length = self.rng.pick(&[0usize, 1, 5000, 100_000]);
                Reply::Bytes(vec![b'/'; *length])
            }
            Request::ListXattr { .. } => Reply::Names(vec![vec![b'x'; self.rng.below(70_000) as usize], Vec::new()]),
            Request::Free { .. } => Reply::Freed(self.number()),
            Request::Statfs => self.typed(),
            _ => Reply::Done,
        };
        if self.rng.percent(10) {
            reply = self.typed();
        }
        if self.rng.percent(10) { Err(self.number() as i32) } else { Ok(reply) }
    }

    fn grant(&mut self) -> GrantId {
        GrantId { server: self.slot, server_incarnation: self.life, sequence: self.rng.below(50) }
    }

    fn envelope(&mut self, message: LockMessage, ino: Ino) -> Message {
        let attributes = self.rng.percent(80).then(|| Box::new(self.attributes(ino)));
        let home_time =
            self.rng.percent(80).then(|| Time { seconds: self.number() as i64, nanoseconds: self.number() as u32 });
        let report = self.rng.percent(20).then(|| self.typed());
        Message::Lock(Envelope { message, attributes, home_time, report, entries: None })
    }

    fn answer(&mut self, from: u16, message: Message) {
        match message {
            Message::Request { id, request } => {
                let reply = self.reply(&request);
                let id = if self.rng.percent(95) { id } else { self.number() };
                self.send(from, &Message::Reply { id, reply });
            }
            Message::Lock(Envelope {
                message: LockMessage::Lock { request, resource, mode, need, want, .. }, ..
            }) => {
                let grant = self.grant();
                let range = if self.rng.percent(50) { need } else { self.range(want) };
                let mode = if self.rng.percent(80) { mode } else { *self.rng.pick(&[Mode::S, Mode::E, Mode::X]) };
                let successor =
                    self.rng.percent(15).then_some(Successor { slot: *self.rng.pick(&[0, 1, 2, 99]), grant });
                let observed = self.rng.percent(15);
                let message = if observed {
                    LockMessage::Observed { request }
                } else {
                    LockMessage::Grant { request, grant, resource, range, mode, from: successor }
                };
                let envelope = self.envelope(message, resource.ino);
                self.send(from, &envelope);
                if successor.is_some() && self.rng.percent(80) {
                    let pages = (range.lo..range.lo.saturating_add(self.rng.below(4)))
                        .map(|page| HandOverPage {
                            page,
                            offset: if self.rng.percent(60) { 0 } else { self.number() },
                            dirty: self.rng.percent(50),
                        })
                        .collect();
                    let old_grant = self.grant();
                    let key = self.rng.below(40) as u32;
                    self.send(
                        from,
                        &Message::HandOver(HandOver {
                            resource,
                            new_grant: grant,
                            old_grant,
                            range,
                            key,
                            pages,
                            spare: vec![range],
                        }),
                    );
                }
                if self.rng.percent(30) {
                    let need = self.range(range);
                    let message = match self.rng.below(5) {
                        0 => LockMessage::Glimpse { grant, resource, round: 1 },
                        1 => LockMessage::Done { grant, resource, range: need },
                        2 => LockMessage::HandBack { grant, resource, range: need },
                        3 => LockMessage::Recall { count: u32::MAX },
                        _ => {
                            let successor = self
                                .rng
                                .percent(40)
                                .then_some(Successor { slot: *self.rng.pick(&[0, 1, 2, 99]), grant });
                            LockMessage::Revoke {
                                grant,
                                resource,
                                revoke_sequence: 1,
                                need,
                                want: Range::ALL,
                                keep: self.rng.percent(40).then_some(Mode::S),
                                successor,
                            }
                        }
                    };
                    let envelope = self.envelope(message, resource.ino);
                    self.send(from, &envelope);
                }
            }
            // Granted something: let go of something else.
            Message::Lock(Envelope { message: LockMessage::Grant { grant, resource, range, .. }, .. }) => {
                let range = self.range(range);
                let keep = self.rng.percent(30).then_some(Mode::X);
                let revoke_sequence = self.rng.below(3) as u32;
                let envelope =
                    self.envelope(LockMessage::Release { grant, resource, range, keep, revoke_sequence }, resource.ino);
                self.send(from, &envelope);
            }
            Message::Lock(Envelope {
                message: LockMessage::Revoke { grant, resource, need, revoke_sequence, .. },
                ..
            }) => {
                let message = match self.rng.below(4) {
                    0 => LockMessage::Taken { grant, resource },
                    1 => LockMessage::Refused { grant, resource },
                    2 => LockMessage::Glimpsed { grant, resource, round: 0 },
                    _ => LockMessage::Release { grant, resource, range: need, keep: None, revoke_sequence },
                };
                let envelope = self.envelope(message, resource.ino);
                self.send(from, &envelope);
            }
            _ => {}
        }
    }

    /// Asks for locks of the target as a client would, on what exists and on what does not.
    fn ask_for_locks(&mut self, target: u16, sequence: u64) {
        let ino = Ino(self.number());
        let resource = *self.rng.pick(&[
            Resource::attr(ino),
            Resource::open(ino),
            Resource::name(ino),
            Resource::data(ino, target),
            Resource::data(ino, 1 - target.min(1)),
        ]);
        let need =
            if self.rng.percent(70) { Range { lo: 0, hi: 1 } } else { Range { lo: self.number(), hi: self.number() } };
        let want = self.range(need);
        let request = verbfs_protocol::RequestId {
            node: verbfs_protocol::Node { slot: self.slot, incarnation: self.life },
            sequence,
        };
        let mode = *self.rng.pick(&[Mode::S, Mode::E, Mode::X]);
        let message = LockMessage::Lock {
            request,
            resource,
            mode,
            need,
            want,
            flags: self.typed(),
            upgrade: None,
            after_releases: 0,
        };
        self.send(
            target,
            &Message::Lock(Envelope { message, attributes: None, home_time: None, report: None, entries: None }),
        );
    }

    /// One-sided writes where they do not belong.
    fn scribble(&mut self, target: u16) -> Result<()> {
        let region = self.endpoint.register_local_memory(64 << 10)?;
        let noise: Vec<u8> = (0..64 << 10).map(|_| self.rng.bits() as u8).collect();
        region.write_at(0, &noise);
        for number in 0..200u64 {
            self.connected(target, false)?;
            // A lawful message first, so that the rings are in use.
            let beat = Message::Beat { number, echo: false };
            self.send(target, &beat);
            // Rings lie in the first 84 KiB of their region: of larger regions, which hold pages, nothing else is hit.
            let offset = if self.rng.percent(80) { self.rng.below(84 << 10) } else { self.number() };
            let length = self.rng.between(1, 4096) as u32;
            let key = RemoteKey(if self.rng.percent(90) { self.rng.below(24) as u32 } else { self.number() as u32 });
            let from = self.rng.below(32 << 10);
            let _ = self.endpoint.write(target, &region, from, key, offset, length, number);
            for _ in 0..3 {
                self.poll(false);
            }
        }
        Ok(())
    }

    /// Whether the target still answers.
    fn still_serves(&mut self, target: u16) -> Result<()> {
        let began = Instant::now();
        let mut asked: Option<Instant> = None;
        while !self.answered.get(&target).copied().unwrap_or(false) {
            ensure!(began.elapsed() < PATIENCE, "slot {target} does not answer a proper question");
            self.connected(target, false)?;
            if asked.is_none_or(|at| at.elapsed() > Duration::from_millis(500)) {
                asked = Some(Instant::now());
                self.send(target, &Message::Request { id: LAST_QUESTION, request: Request::Statfs });
            }
            self.poll(false);
        }
        Ok(())
    }
}

fn lane_of(message: &Message) -> Lane {
    Lane::ALL[message.lane() as usize]
}

fn refused(arguments: &Arguments, key: [u8; 32], cluster: &str, rng: Rng) -> Result<()> {
    let mut peer = Peer::new(arguments, key, cluster, rng)?;
    for &target in &arguments.targets {
        for _ in 0..20 {
            peer.endpoint.connect(target)?;
            let began = Instant::now();
            'attempt: loop {
                ensure!(began.elapsed() < PATIENCE, "slot {target} neither refuses nor accepts");
                let mut events = Vec::new();
                peer.endpoint.poll(&mut events);
                for event in events {
                    match event {
                        Event::Connected { slot, .. } => bail!("slot {slot} let a stranger in"),
                        Event::ConnectFailed { slot, reason } if slot == target => {
                            println!("slot {target}: {reason}");
                            break 'attempt;
                        }
                        _ => {}
                    }
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    Ok(())
}

/// Bytes on the socket from somebody who has no key.
fn stranger(directory: &Path, targets: &[u16], messages: u64, mut rng: Rng) -> Result<()> {
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, connect, recv, send, socket};
    let mut silent = Vec::new();
    for number in 0..messages {
        let target = *rng.pick(targets);
        let path = directory.join(format!("{target}.sock"));
        let kind = if rng.percent(90) { SocketType::SEQPACKET } else { SocketType::STREAM };
        let stranger = socket(AddressFamily::UNIX, kind, None)?;
        if connect(&stranger, &SocketAddrUnix::new(&path)?).is_err() {
            continue;
        }
        for _ in 0..rng.between(1, 4) {
            let mut bytes: Vec<u8> = (0..rng.below(400)).map(|_| rng.bits() as u8).collect();
            if rng.percent(50) {
                // The outside of a hello.
                bytes.resize(97, 0);
                bytes[0] = 1;
                bytes[1..9].copy_from_slice(b"verbfs\x00\x01");
                bytes[9..13].copy_from_slice(&(rng.below(3) as u32).to_le_bytes());
                bytes[13..15].copy_from_slice(&(rng.below(5) as u16).to_le_bytes());
            }
            if send(&stranger, &bytes, SendFlags::NOSIGNAL).is_err() {
                break;
            }
            if rng.percent(20) {
                let mut answer = [0u8; 256];
                let _ = recv(&stranger, &mut answer[..], RecvFlags::DONTWAIT);
            }
        }
        if number % 50 == 0 && silent.len() < 30 {
            silent.push(stranger);
        }
    }
    // The control socket is of another kind; a line that is no request must not matter.
    for &target in targets {
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().contains(&target.to_string()))
                && let Ok(mut stream) = UnixStream::connect(&path)
            {
                use std::io::Write;
                let bytes: Vec<u8> = (0..3000).map(|_| rng.bits() as u8).collect();
                let _ = stream.write_all(&bytes);
                let _ = stream.write_all(b"\n{\"Mount\":{\"directory\":7}}\n");
            }
        }
    }
    Ok(())
}

fn run(arguments: &Arguments) -> Result<bool> {
    let seed = seed_or_clock(arguments.seed);
    println!("{:?}, seed {seed}", arguments.attack);
    let mut rng = Rng::new(seed);
    let mut key: [u8; 32] = std::fs::read(&arguments.key)?.try_into().ok().context("a key has 32 bytes")?;
    match arguments.attack {
        Attack::Stranger => {
            return stranger(&arguments.directory, &arguments.targets, arguments.messages, rng).map(|()| true);
        }
        Attack::WrongKey => {
            key[rng.below(32) as usize] ^= 1;
            return refused(arguments, key, &arguments.cluster, rng).map(|()| true);
        }
        Attack::WrongCluster => return refused(arguments, key, "another", rng).map(|()| true),
        _ => {}
    }
    let mut peer = Peer::new(arguments, key, &arguments.cluster, rng)?;
    let mut good = true;
    let attack = |peer: &mut Peer| -> Result<()> {
        match arguments.attack {
            Attack::Typed | Attack::Bytes => {
                for number in 0..arguments.messages {
                    let target = *peer.rng.pick(&arguments.targets);
                    peer.connected(target, false)?;
                    if arguments.attack == Attack::Typed {
                        if peer.rng.percent(20) {
                            peer.ask_for_locks(target, number);
                        } else {
                            let message = peer.typed_message();
                            peer.send(target, &message);
                        }
                    } else {
                        let (lane, record) = peer.spoilt();
                        peer.send_record(target, lane, &record);
                    }
                    peer.poll(arguments.attack == Attack::Typed);
                }
            }
            Attack::Answer => {
                let until = Instant::now() + Duration::from_secs(arguments.seconds);
                let mut sequence = 0;
                while Instant::now() < until {
                    for &target in &arguments.targets {
                        peer.connected(target, true)?;
                        if peer.rng.percent(1) {
                            sequence += 1;
                            peer.ask_for_locks(target, sequence);
                        }
                    }
                    peer.poll(true);
                }
            }
            Attack::Scribble => {
                for &target in &arguments.targets {
                    peer.scribble(target)?;
                }
            }
            _ => unreachable!("handled above"),
        }
        Ok(())
    };
    if let Err(error) = attack(&mut peer) {
        println!("{error:#}");
        good = false;
    }
    if good {
        for &target in &arguments.targets {
            if let Err(error) = peer.still_serves(target) {
                println!("{error:#}");
                good = false;
            }
        }
    }
    println!("{:?} messages to each slot, {} disconnections", peer.sent, peer.disconnections);
    Ok(good)
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("verbfs-bad-peer: {error:#}");
            ExitCode::from(3)
        }
    }
}
