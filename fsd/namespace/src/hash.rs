//! Hashes of names: the order of a directory, readdir cursors and NAME lock ranges.
//!
//! All nodes must compute the same hash for ever, so it is spelt out here: SipHash-2-4
//! under a fixed key, cut to 55 bits and shifted left by [`COLLISION_BITS`]. The bits below number
//! the names that collide, which gives every entry a cursor of its own:
//!
//! ```text
//! bit 63   62 .......................... 8   7 ........ 0
//!     0    hash of the name (never 0)        collision number     = cursor
//!     0    hash of the name (never 0)        0                    = name_hash(name)
//! ```
//!
//! Cursors below [`CURSOR_MIN`] are never used by an entry: 0 is the start of a
//! directory, 1 and 2 are free for "." and "..".

/// Bits of a cursor that tell apart the names of one hash.
pub const COLLISION_BITS: u32 = 8;
/// Most names of one hash in one directory. With a 55-bit hash even a directory of 2^32 names meets
/// no bucket of more than a handful; finding 257 colliding names on purpose takes more than 2^54 hashes.
pub const COLLISIONS_MAX: u64 = 1 << COLLISION_BITS;
/// The smallest cursor an entry can have.
pub const CURSOR_MIN: u64 = COLLISIONS_MAX;
/// Bits of the hash proper: cursors must stay below 2^63, since telldir's offset is signed.
const HASH_BITS: u32 = 63 - COLLISION_BITS;
const _: () = assert!(HASH_BITS + COLLISION_BITS == 63);

/// "verbfs directory", the key of the hash. Part of the disk format and of the protocol.
const KEY: [u64; 2] = [u64::from_le_bytes(*b"verbfs d"), u64::from_le_bytes(*b"irectory")];

/// The hash of a name: a multiple of [`COLLISIONS_MAX`], at least [`CURSOR_MIN`], below 2^63.
/// The NAME lock of a name is `[name_hash, name_hash + 1)`.
pub fn name_hash(name: &[u8]) -> u64 {
    fit(siphash_2_4(KEY, name))
}

/// Cuts any 64-bit hash to what [`name_hash`] may return.
pub(crate) fn fit(hash: u64) -> u64 {
    ((hash >> (64 - HASH_BITS)).max(1)) << COLLISION_BITS
}

fn siphash_2_4(key: [u64; 2], bytes: &[u8]) -> u64 {
    let mut state = [
        key[0] ^ 0x736f6d6570736575,
        key[1] ^ 0x646f72616e646f6d,
        key[0] ^ 0x6c7967656e657261,
        key[1] ^ 0x7465646279746573,
    ];
    let mut words = bytes.chunks_exact(8);
    for word in &mut words {
        let word = u64::from_le_bytes(word.try_into().expect("chunks of 8 bytes"));
        state[3] ^= word;
        rounds(&mut state, 2);
        state[0] ^= word;
    }
    let mut last = (bytes.len() as u64) << 56;
    for (place, &byte) in words.remainder().iter().enumerate() {
        last |= (byte as u64) << (8 * place);
    }
    state[3] ^= last;
    rounds(&mut state, 2);
    state[0] ^= last;
    state[2] ^= 0xff;
    rounds(&mut state, 4);
    state[0] ^ state[1] ^ state[2] ^ state[3]
}

fn rounds(state: &mut [u64; 4], count: usize) {
    let [mut a, mut b, mut c, mut d] = *state;
    for _ in 0..count {
        a = a.wrapping_add(b);
        b = b.rotate_left(13) ^ a;
        a = a.rotate_left(32);
        c = c.wrapping_add(d);
        d = d.rotate_left(16) ^ c;
        a = a.wrapping_add(d);
        d = d.rotate_left(21) ^ a;
        c = c.wrapping_add(b);
        b = b.rotate_left(17) ^ c;
        c = c.rotate_left(32);
    }
    *state = [a, b, c, d];
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors of the reference implementation: key 00 01 .. 0f, messages of 0, 1, 2 .. bytes 00 01 02 ..
    #[test]
    fn siphash_gives_the_reference_vectors() {
        let key: Vec<u8> = (0..16).collect();
        let key = [u64::from_le_bytes(key[..8].try_into().unwrap()), u64::from_le_bytes(key[8..].try_into().unwrap())];
        let message: Vec<u8> = (0..15).collect();
        assert_eq!(siphash_2_4(key, b""), 0x726fdb47dd0e0e31);
        assert_eq!(siphash_2_4(key, &message), 0xa129ca6149be45e5);
    }

    #[test]
    fn hashes_fit_into_a_cursor() {
        assert_eq!(fit(0), CURSOR_MIN);
        assert_eq!(fit(u64::MAX) | (COLLISIONS_MAX - 1), (1 << 63) - 1);
        for name in [&b"a"[..], b"", b"some longer name than eight bytes"] {
            assert_eq!(name_hash(name) % COLLISIONS_MAX, 0);
            assert!(name_hash(name) >= CURSOR_MIN && name_hash(name) < 1 << 63);
        }
    }

    /// The hash is part of the format: this value may never change.
    #[test]
    fn the_hash_of_a_name_is_for_ever() {
        assert_eq!(name_hash(b"verbfs"), 492367297357769472);
    }
}
