//! The bytes of messages: pinned, canonical, and nothing else accepted.

use proptest::prelude::*;
use std::collections::BTreeSet;
use std::fmt::{Debug, Write};
use verbfs_protocol::header::{HEADER_LENGTH, Source as Sender, frame, unframe};
use verbfs_protocol::lock::{LockFlags, LockMessage, Successor};
use verbfs_protocol::wire::{Fault, Reader, Source, Variants, Wire};
use verbfs_protocol::*;

const SENDER: Sender =
    Sender { slot: 0x0102, node_incarnation: 0x0304_0506, daemon_incarnation: 0x0708_090a, view: 0x0b0c_0d0e };

/// Values that differ from field to field, everything there; or the least there can be.
struct Counting {
    next: u64,
    full: bool,
}

impl Source for Counting {
    fn number(&mut self, bits: u32) -> u64 {
        if !self.full {
            return 0;
        }
        self.next += 1;
        (self.next * 0x0123_4567_89ab_cdef) >> (64 - bits)
    }
    fn below(&mut self, bound: u64) -> u64 {
        if self.full { bound - 1 } else { 0 }
    }
    fn length(&mut self, maximum: usize) -> usize {
        if self.full { maximum.min(2) } else { 0 }
    }
    fn is_lawful(&self) -> bool {
        true
    }
}

/// Choices out of bytes, so that what fails shrinks with them; zeros when they are used up.
struct Choices<'a>(std::slice::Iter<'a, u8>);

impl Source for Choices<'_> {
    fn number(&mut self, bits: u32) -> u64 {
        let mut number = 0;
        for _ in 0..bits.div_ceil(8) {
            number = number << 8 | u64::from(*self.0.next().unwrap_or(&0));
        }
        number & (u64::MAX >> (64 - bits))
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.number(16) % bound
    }
    fn length(&mut self, maximum: usize) -> usize {
        match self.number(8) {
            255 => maximum.min(5000),
            small => (small as usize % 5).min(maximum),
        }
    }
    fn is_lawful(&self) -> bool {
        true
    }
}

fn message(number: usize, choices: &[u8]) -> Message {
    let types = Message::types();
    Message::sample(types[number % types.len()], &mut Choices(choices.iter())).unwrap()
}

fn messages() -> impl Strategy<Value = Message> {
    (any::<usize>(), proptest::collection::vec(any::<u8>(), 0..400)).prop_map(|(number, bytes)| message(number, &bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn from_hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn decode<T: Wire>(bytes: &[u8]) -> Result<T, wire::Malformed> {
    let mut reader = Reader::new(bytes);
    let value = T::decode(&mut reader)?;
    reader.end()?;
    Ok(value)
}

fn encode<T: Wire>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    value.encode(&mut bytes);
    bytes
}

/// The lines there must be: what stands at the front of a line, and the rest as it would be today.
fn wanted() -> Vec<(String, String)> {
    fn line(name: String, bytes: &[u8], value: &dyn Debug) -> (String, String) {
        (name, format!("{} {value:?}", hex(bytes)))
    }
    let mut lines = Vec::new();
    for full in [false, true] {
        for message_type in Message::types() {
            let value = Message::sample(message_type, &mut Counting { next: 0, full }).unwrap();
            lines.push(line(format!("message {message_type:04x} {full}"), &value.body(), &value));
        }
        fn variants<T: Wire + Variants + Debug>(name: &str, full: bool, lines: &mut Vec<(String, String)>) {
            for (index, variant) in T::VARIANTS.iter().enumerate() {
                let value = T::sample_variant(index, &mut Counting { next: 0, full });
                lines.push(line(format!("{name} {} {full}", variant.number), &encode(&value), &value));
            }
        }
        variants::<Operation>("operation", full, &mut lines);
        variants::<Update>("update", full, &mut lines);
        variants::<NewTime>("new-time", full, &mut lines);
        variants::<FileKind>("file-kind", full, &mut lines);
        variants::<Class>("class", full, &mut lines);
        variants::<Mode>("mode", full, &mut lines);
        variants::<LockSpace>("lock-space", full, &mut lines);
        variants::<FileLockKind>("file-lock-kind", full, &mut lines);
    }
    lines
}

/// `layout.txt` holds bytes and value of every message and every variant, once with everything that may be absent and once
/// without. Lines are added, never changed, as long as the protocol version is the same.
#[test]
fn every_message_has_its_pinned_bytes() {
    let text = include_str!("layout.txt");
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(lines[0], format!("version {PROTOCOL_VERSION}"), "a new version starts a new file");
    fn same<T: Wire + Debug>(bytes: &[u8], value: &str) {
        let decoded: T = decode(bytes).unwrap();
        assert_eq!(format!("{decoded:?}"), value);
        assert_eq!(encode(&decoded), bytes);
    }
    let mut pinned = BTreeSet::new();
    for line in &lines[1..] {
        let parts: Vec<&str> = line.splitn(5, ' ').collect();
        let [kind, number, full, bytes, value] = parts[..] else { panic!("what is this: {line}") };
        let bytes = from_hex(bytes);
        match kind {
            "message" => {
                let message_type = u16::from_str_radix(number, 16).unwrap();
                let message =
                    Message::from_body(message_type, &bytes).unwrap_or_else(|error| panic!("{error}: {line}"));
                assert_eq!(format!("{message:?}"), value);
                assert_eq!((message.message_type(), message.body()), (message_type, bytes));
            }
            "operation" => same::<Operation>(&bytes, value),
            "update" => same::<Update>(&bytes, value),
            "new-time" => same::<NewTime>(&bytes, value),
            "file-kind" => same::<FileKind>(&bytes, value),
            "class" => same::<Class>(&bytes, value),
            "mode" => same::<Mode>(&bytes, value),
            "lock-space" => same::<LockSpace>(&bytes, value),
            "file-lock-kind" => same::<FileLockKind>(&bytes, value),
            _ => panic!("what is this: {line}"),
        }
        pinned.insert(format!("{kind} {number} {full}"));
    }
    let missing: Vec<String> = wanted()
        .into_iter()
        .filter(|(name, _)| !pinned.contains(name))
        .map(|(name, rest)| format!("{name} {rest}"))
        .collect();
    assert!(missing.is_empty(), "not pinned; read these lines and add them to layout.txt:\n{}", missing.join("\n"));
}

#[test]
fn the_header_has_its_pinned_bytes() {
    let record = frame(SENDER, 0x0f10, b"body");
    assert_eq!(hex(&record), "0400100f0e0d0c0b02010000060504030a0908070400000062".to_string() + "6f6479");
    assert_eq!(unframe(&record).unwrap(), (SENDER, 0x0f10, &b"body"[..]));
    for length in 0..record.len() {
        assert!(unframe(&record[..length]).is_err(), "{length} bytes are no record");
    }
    let mut other_version = record.clone();
    other_version[0] ^= 1;
    assert!(matches!(unframe(&other_version), Err(DecodeError::Version(5))));
    let mut reserved = record.clone();
    reserved[10] = 1;
    assert!(matches!(unframe(&reserved), Err(DecodeError::Reserved(1))));
    let mut longer = record;
    longer.push(0);
    assert!(matches!(unframe(&longer), Err(DecodeError::Length { header: 4, record: 5 })));
}

fn request(sequence: u64) -> RequestId {
    RequestId { node: Node { slot: 0x1112, incarnation: 0x1314_1516 }, sequence }
}

fn grant() -> GrantId {
    GrantId { server: 0x2122, server_incarnation: 0x2324_2526, sequence: 0x2728_292a_2b2c_2d2e }
}

/// What a kernel module would declare as packed structures.
#[test]
fn fields_of_lock_messages_stand_at_fixed_offsets() {
    let resource = Resource { class: Class::Data, ino: Ino(0x3132_3334_3536_3738), server: 0x393a };
    let lock = |upgrade| {
        let flags = LockFlags { r#try: true, no_growth: false, one_shot: true };
        let (need, want) = (Range::new(0x41, 0x42), Range::new(0x43, u64::MAX));
        let message = LockMessage::Lock {
            request: request(0x1718_191a_1b1c_1d1e),
            resource,
            mode: Mode::X,
            need,
            want,
            flags,
            upgrade,
            after_releases: 0x51,
        };
        Message::Lock(Envelope { message, attributes: None, home_time: None, report: None, entries: None })
    };
    let bytes = lock(Some(grant())).body();
    let field = |offset: usize, length: usize| hex(&bytes[offset..offset + length]);
    assert_eq!(field(0, 14), "1211161514131e1d1c1b1a191817", "request");
    assert_eq!(field(14, 11), "0538373635343332313a39", "resource");
    assert_eq!(field(25, 1), "03", "mode");
    assert_eq!(field(26, 16), "41000000000000004200000000000000", "need");
    assert_eq!(field(42, 16), "4300000000000000ffffffffffffffff", "want");
    assert_eq!(field(58, 1), "05", "flags");
    assert_eq!(field(59, 15), "012221262524232e2d2c2b2a292827", "upgrade");
    assert_eq!(field(74, 8), "5100000000000000", "after_releases");
    assert_eq!(field(82, 1), "00", "attached");
    assert_eq!(bytes.len(), 83);
    let without = lock(None).body();
    assert_eq!(without.len(), 83, "an absent field keeps its place");
    assert_eq!(hex(&without[59..74]), "00".repeat(15));
}

#[test]
fn fixed_parts_have_their_sizes() {
    fn sizes<T: Variants>() -> Vec<(&'static str, u8, Option<usize>)> {
        T::VARIANTS.iter().map(|variant| (variant.name, variant.number, variant.size)).collect()
    }
    assert_eq!(
        sizes::<LockMessage>(),
        [
            ("Lock", 1, Some(82)),
            ("Cancel", 2, Some(25)),
            ("Grant", 3, Some(73)),
            ("Deny", 4, Some(18)),
            ("Observed", 5, Some(14)),
            ("Revoke", 6, Some(80)),
            ("Glimpse", 7, Some(29)),
            ("Thaw", 8, Some(29)),
            ("Done", 9, Some(41)),
            ("HandBack", 10, Some(41)),
            ("Recall", 11, Some(4)),
            ("Release", 12, Some(47)),
            ("Taken", 13, Some(25)),
            ("Refused", 14, Some(25)),
            ("Glimpsed", 15, Some(29)),
            ("Probe", 16, Some(25)),
        ]
    );
    assert_eq!(
        sizes::<Request>(),
        [
            ("Operation", 1, None),
            ("Lookup", 2, None),
            ("List", 3, Some(20)),
            ("Parent", 4, Some(8)),
            ("ReserveInode", 5, Some(0)),
            ("ReadLink", 6, Some(8)),
            ("GetXattr", 7, None),
            ("ListXattr", 8, Some(8)),
            ("Layout", 9, Some(24)),
            ("Allocate", 10, Some(41)),
            ("Commit", 11, None),
            ("Free", 12, Some(24)),
            ("Sync", 13, Some(8)),
            ("Flush", 14, Some(27)),
            ("Prepare", 15, None),
            ("Decide", 16, Some(15)),
            ("SetFileLock", 17, Some(53)),
            ("GetFileLock", 18, Some(44)),
            ("CancelFileLock", 19, Some(16)),
            ("ReleaseFileLocks", 20, Some(27)),
            ("WaitsFor", 21, Some(18)),
            ("Statfs", 22, Some(0)),
            ("Describe", 23, Some(11)),
            ("DescribeFileLocks", 24, Some(8)),
            ("GiveBack", 25, None),
            ("ReturnSpare", 26, Some(0)),
        ]
    );
    assert_eq!(
        sizes::<Reply>(),
        [
            ("Done", 1, Some(0)),
            ("Attributes", 2, None),
            ("Created", 3, None),
            ("Entry", 4, Some(10)),
            ("Entries", 5, None),
            ("Ino", 6, Some(8)),
            ("Bytes", 7, None),
            ("Names", 8, None),
            ("Extents", 9, None),
            ("Flushed", 10, Some(39)),
            ("Freed", 11, Some(8)),
            ("Decided", 12, None),
            ("FileLock", 13, Some(36)),
            ("FileLocks", 14, None),
            ("Owners", 15, None),
            ("Space", 16, Some(32)),
            ("Holders", 17, None),
        ]
    );
    assert_eq!(sizes::<Operation>().len(), 9);
    assert_eq!(sizes::<Update>().len(), 7);
    let plain = [
        ("Ino", Ino::SIZE, 8),
        ("Node", Node::SIZE, 6),
        ("GrantId", GrantId::SIZE, 14),
        ("RequestId", RequestId::SIZE, 14),
        ("Range", Range::SIZE, 16),
        ("Resource", Resource::SIZE, 11),
        ("Successor", Successor::SIZE, 16),
        ("LockFlags", LockFlags::SIZE, 1),
        ("Time", Time::SIZE, 12),
        ("AttributeReport", AttributeReport::SIZE, 38),
        ("Extent", Extent::SIZE, 25),
        ("HandOverPage", HandOverPage::SIZE, 17),
        ("Caller", Caller::SIZE, 12),
        ("RenameFlags", RenameFlags::SIZE, 1),
        ("LockOwner", LockOwner::SIZE, 18),
        ("FileLock", FileLock::SIZE, 35),
        ("Space", Space::SIZE, 32),
    ];
    for (name, size, expected) in plain {
        assert_eq!(size, Some(expected), "{name}");
    }
    assert_eq!(Attributes::MINIMUM, 110, "attributes without the slots of their layout");
    assert_eq!(HandOver::MINIMUM, 67, "a hand-over without its pages");
}

/// The first field at fault, by type and body.
fn fault(message_type: u16, body: &[u8]) -> (String, Fault) {
    match Message::from_body(message_type, body) {
        Err(DecodeError::Body(malformed)) => (malformed.field(), malformed.fault().clone()),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn what_no_sender_writes_is_refused_by_name() {
    let full = |message_type| Message::sample(message_type, &mut Counting { next: 0, full: true }).unwrap().body();
    let changed = |message_type, offset: usize, bytes: &[u8]| {
        let mut body = full(message_type);
        body[offset..offset + bytes.len()].copy_from_slice(bytes);
        fault(message_type, &body)
    };
    let (lock, release, hand_over, allocate, beat) = (0x0101, 0x010c, 0x0400, 0x020a, 0x0500);
    let field = |name: &str, fault| (name.to_string(), fault);
    assert_eq!(changed(lock, 14, &[6]), field("Lock.resource.class", Fault::Unknown { what: "Class", value: 6 }));
    assert_eq!(changed(lock, 25, &[0]), field("Lock.mode", Fault::Unknown { what: "Mode", value: 0 }));
    assert_eq!(changed(lock, 58, &[8]), field("Lock.flags", Fault::Unknown { what: "LockFlags", value: 8 }));
    assert_eq!(changed(lock, 59, &[2]), field("Lock.upgrade", Fault::Boolean(2)));
    assert_eq!(changed(lock, 59, &[0]), field("Lock.upgrade", Fault::AbsentNotZero));
    let inverted = [2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(changed(lock, 26, &inverted), field("Lock.need", Fault::Inverted { lo: 2, hi: 1 }));
    assert_eq!(changed(release, 25, &inverted), field("Release.range", Fault::Inverted { lo: 2, hi: 1 }));
    assert_eq!(changed(lock, 82, &[16]), field("attached", Fault::Unknown { what: "set of attachments", value: 16 }));
    assert_eq!(
        changed(lock, 83 + 8, &1_000_000_000u32.to_le_bytes()),
        field("home_time.nanoseconds", Fault::TooLarge { value: 1_000_000_000, maximum: 999_999_999 })
    );
    assert_eq!(changed(allocate, 8 + 40, &[0xff]), field("Allocate.zero", Fault::Boolean(0xff)));
    assert_eq!(
        changed(hand_over, 59, &(RUNS_MAX as u32 + 1).to_le_bytes()),
        field("pages", Fault::OverLimit { length: RUNS_MAX + 1, limit: RUNS_MAX })
    );
    assert_eq!(
        changed(hand_over, 59, &5u32.to_le_bytes()),
        // What is left: two pages, and the list behind them.
        field("pages", Fault::Short { needed: 5 * 17, left: 2 * 17 + 4 + 2 * 16 })
    );
    let (failed, holders) = (0x0300, 0x0311);
    assert_eq!(changed(failed, 8, &0i32.to_le_bytes()), field("errno", Fault::NoErrno(0)));
    assert_eq!(changed(failed, 8, &(-5i32).to_le_bytes()), field("errno", Fault::NoErrno(-5)));
    // Count of holders, then slot, range and mode of the first, then the length of its state.
    assert_eq!(changed(holders, 8 + 4 + 19 + 4, &[0xff]), field("Holders.holders.state", Fault::NotUtf8));
    let mut longer = full(beat);
    longer.push(0);
    assert_eq!(fault(beat, &longer), field("", Fault::Trailing(1)));
    for unknown in [0x0000, 0x0100, 0x0111, 0x0200, 0x021b, 0x0312, 0x0401, 0x0501, 0x0600, 0xffff] {
        assert!(Message::from_body(unknown, &full(lock)).is_err(), "type {unknown:04x}");
    }
}

#[test]
fn names_and_values_beyond_their_limits_are_refused() {
    let directory = Ino::ROOT;
    let body = |request| Message::Request { id: 1, request }.body();
    let lookup = |length| body(Request::Lookup { directory, name: vec![b'n'; length] });
    assert!(Message::from_body(0x0202, &lookup(NAME_MAX)).is_ok());
    assert_eq!(
        fault(0x0202, &lookup(NAME_MAX + 1)),
        ("Lookup.name".into(), Fault::OverLimit { length: NAME_MAX + 1, limit: NAME_MAX })
    );
    let commit = |length| body(Request::Commit { ino: directory, ranges: vec![Range::UNIT; length] });
    assert!(Message::from_body(0x020b, &commit(RUNS_MAX)).is_ok());
    assert_eq!(
        fault(0x020b, &commit(RUNS_MAX + 1)),
        ("Commit.ranges".into(), Fault::OverLimit { length: RUNS_MAX + 1, limit: RUNS_MAX })
    );
    let set = |value: usize| {
        let kind = Operation::SetXattr {
            ino: directory,
            name: vec![b'x'],
            value: vec![0; value],
            create: false,
            replace: false,
        };
        let caller = Caller { uid: 0, gid: 0, pid: 0 };
        body(Request::Operation { operation: request(1), acked_below: 0, caller, kind })
    };
    assert!(Message::from_body(0x0201, &set(XATTR_VALUE_MAX)).is_ok());
    assert_eq!(
        fault(0x0201, &set(XATTR_VALUE_MAX + 1)),
        (
            "Operation.kind.SetXattr.value".into(),
            Fault::OverLimit { length: XATTR_VALUE_MAX + 1, limit: XATTR_VALUE_MAX }
        )
    );
}

#[test]
fn prepared_updates_have_a_versioned_record() {
    let updates: Vec<Update> =
        (0..7).map(|index| Update::sample_variant(index, &mut Counting { next: 0, full: true })).collect();
    let record = prepared_record(&updates);
    assert_eq!(record[..5], [1, 7, 0, 0, 0]);
    assert_eq!(parse_prepared_record(&record).unwrap(), updates);
    for length in 0..record.len() {
        assert!(parse_prepared_record(&record[..length]).is_err());
    }
    assert!(matches!(parse_prepared_record(&[2, 0, 0, 0, 0]), Err(DecodeError::Version(2))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn every_message_comes_back_as_it_went(message in messages()) {
        let (sender, back) = Message::from_record(&message.record(SENDER)).unwrap();
        prop_assert_eq!(sender, SENDER);
        prop_assert_eq!(back, message);
    }

    #[test]
    fn no_message_may_be_cut_or_go_on(message in messages(), more in 1..40usize) {
        let mut body = message.body();
        // Long lists are the same element over and over: their middle is left out.
        for length in (0..body.len()).filter(|at| *at < 600 || body.len() - *at < 100) {
            prop_assert!(Message::from_body(message.message_type(), &body[..length]).is_err());
        }
        body.resize(body.len() + more, 0);
        prop_assert!(Message::from_body(message.message_type(), &body).is_err());
    }

    #[test]
    fn whatever_decodes_encodes_to_the_same_bytes(
        number in any::<usize>(),
        bytes in proptest::collection::vec(prop_oneof![3 => 0..3u8, 1 => any::<u8>()], 0..300),
    ) {
        let types = Message::types();
        let message_type = types[number % types.len()];
        if let Ok(message) = Message::from_body(message_type, &bytes) {
            prop_assert_eq!(message.message_type(), message_type);
            prop_assert_eq!(message.body(), bytes.clone());
        }
        let _ = Message::from_record(&bytes);
        let _ = parse_prepared_record(&bytes);
    }

    #[test]
    fn changed_bytes_are_another_message_or_none(
        message in messages(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = message.body();
        prop_assume!(!bytes.is_empty());
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(changed) = Message::from_body(message.message_type(), &bytes) {
            prop_assert_eq!(changed.body(), bytes);
        }
    }
}

const _: () = assert!(HEADER_LENGTH == 24);
