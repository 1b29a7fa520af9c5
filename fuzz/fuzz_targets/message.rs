//! Bytes from a peer: whatever decodes encodes to the same bytes, and the rest is refused without a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use verbfs_protocol::Message;

fuzz_target!(|record: &[u8]| {
    if let Ok((source, message)) = Message::from_record(record) {
        assert_eq!(message.record(source), record, "two encodings of {message:?}");
    }
});
