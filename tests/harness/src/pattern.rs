//! File contents in which every 8-byte word tells which write put it there, and at which place in the file.
//!
//! A word holds the tag of its write (upper 32 bits) and a check value of tag and word number (lower 32 bits). A word
//! that is torn, or that landed elsewhere, fails its check and decodes as [`GARBAGE`]. A word of zeros is a hole ([`ZERO`]).
//! Appended words carry a check value that fits everywhere, since an append does not know its place.

/// Bytes of a word.
pub const WORD: u64 = 8;
/// Tag of bytes nobody wrote.
pub const ZERO: u32 = 0;
/// Tag of bytes that no write can have put there.
pub const GARBAGE: u32 = u32::MAX;

/// Stands for the word number where the place is not known.
const FLOATING: u64 = u64::MAX;

/// A stretch of `len` bytes that carry one tag.
pub type Run = (u64, u32);

fn word(tag: u32, index: u64) -> u64 {
    let mixed = (tag as u64 ^ index.rotate_left(17)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (tag as u64) << 32 | mixed >> 32
}

/// Fill `buffer`, which lies at `offset` in the file, with words of `tag`.
pub fn fill(buffer: &mut [u8], offset: u64, tag: u32) {
    debug_assert!(offset.is_multiple_of(WORD) && buffer.len().is_multiple_of(WORD as usize));
    for (i, bytes) in buffer.chunks_exact_mut(WORD as usize).enumerate() {
        bytes.copy_from_slice(&word(tag, offset / WORD + i as u64).to_le_bytes());
    }
}

/// Which tags are in `buffer`, which was read at `offset`.
pub fn decode(buffer: &[u8], offset: u64) -> Vec<Run> {
    let mut runs = Vec::new();
    for (i, bytes) in buffer.chunks(WORD as usize).enumerate() {
        let tag = match <[u8; 8]>::try_from(bytes) {
            Ok(b) => decode_word(u64::from_le_bytes(b), offset / WORD + i as u64),
            Err(_) => GARBAGE,
        };
        push(&mut runs, bytes.len() as u64, tag);
    }
    runs
}

/// The tag in one word read at word number `index`.
pub fn decode_word(value: u64, index: u64) -> u32 {
    let tag = (value >> 32) as u32;
    match value {
        0 => ZERO,
        v if v == word(tag, index) || v == word(tag, FLOATING) => tag,
        _ => GARBAGE,
    }
}

/// A word of `tag` that may stand anywhere: an append does not know its place beforehand.
pub fn floating_word(tag: u32) -> [u8; 8] {
    word(tag, FLOATING).to_le_bytes()
}

/// The word of `tag` at word number `index`.
pub fn encode_word(tag: u32, index: u64) -> u64 {
    word(tag, index)
}

/// Append `len` bytes of `tag` to `runs`, merging with the last one when it carries the same tag.
pub fn push(runs: &mut Vec<Run>, len: u64, tag: u32) {
    if len == 0 {
        return;
    }
    match runs.last_mut() {
        Some(last) if last.1 == tag => last.0 += len,
        _ => runs.push((len, tag)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_tell_writes_apart_and_find_misplaced_words() {
        let mut b = vec![0u8; 64];
        fill(&mut b[..24], 4096, 9);
        fill(&mut b[32..], 4096 + 32, 10);
        assert_eq!(decode(&b, 4096), vec![(24, 9), (8, ZERO), (32, 10)]);
        assert_eq!(decode(&b[..8], 0), vec![(8, GARBAGE)]);
        b[1] ^= 1;
        assert_eq!(decode(&b[..8], 4096), vec![(8, GARBAGE)]);
    }
}
