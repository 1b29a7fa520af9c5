//! Tells flock(2) from fcntl(2) locks.
//!
//! The kernel sends both as the same requests; only `FUSE_LK_FLOCK` in `fuse_lk_in.lk_flags` tells
//! them apart, and `fuser` 0.18 drops that field. Nothing else will do: the range of a flock
//! is that of a whole-file fcntl lock, and owners of both kinds come scrambled with a key that only the kernel has.
//!
//! `fuser` hands its file system a reference *into* the buffer that holds the request as the kernel
//! sent it (`Request` is a transparent wrapper of the header, `fuser::Request::ref_cast`); the lock
//! request follows the header there:
//! ```text
//!  0  fuse_in_header (40 bytes): u32 length, u32 opcode, ...
//! 40  fuse_lk_in: u64 fh, u64 owner, u64 start, u64 end, u32 type, u32 pid, u32 lk_flags, u32 padding
//! ```
//! What is read is compared with all that `fuser` did hand over, so a change of its
//! inner workings shows as [`flags`] returning `None` (the lock is refused with EIO), not as a lock in the wrong
//! space. The workspace pins `fuser`'s minor version, and `tests` of the mounts cover both kinds.

use fuser::Request;

const HEADER_BYTES: usize = 40;
const LOCK_BYTES: usize = 48;
const OPCODE_GETLK: u32 = 31;
const OPCODE_SETLKW: u32 = 33;
/// The request comes from flock(2).
pub const FUSE_LK_FLOCK: u32 = 1 << 0;

const _: () = assert!(size_of::<Request>() == HEADER_BYTES);

/// What `fuser` says of a lock request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockArguments {
    /// The open file.
    pub handle: u64,
    /// The owner, scrambled by the kernel.
    pub owner: u64,
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    pub kind: i32,
    /// Thread group that asks; 0 in an unlock.
    pub pid: u32,
}

/// `lk_flags` of a getlk or setlk request; `None` if the request does not lie where it should.
///
/// Must only be called with a `Request` that `fuser` passed to `Filesystem::getlk` or `setlk`, from within that call.
pub fn flags(request: &Request, expected: LockArguments) -> Option<u32> {
    let start = std::ptr::from_ref(request).cast::<u8>();
    // SAFETY: the header itself is behind the reference.
    let header: [u8; 8] = unsafe { start.cast::<[u8; 8]>().read() };
    let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let opcode = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
    if length < HEADER_BYTES + LOCK_BYTES || !(OPCODE_GETLK..=OPCODE_SETLKW).contains(&opcode) {
        return None;
    }
    // SAFETY: `fuser` checked that the buffer the header lies in holds `length` bytes of initialised request
    // (`AnyRequest::try_from`), and keeps it borrowed for as long as `request` lives. The read goes beyond the referent of
    // `request` within one allocation, as `container_of` does.
    let arguments: [u8; LOCK_BYTES] = unsafe { start.add(HEADER_BYTES).cast::<[u8; LOCK_BYTES]>().read() };
    parse(&arguments, expected)
}

/// `lk_flags` of the bytes of a `fuse_lk_in` that says `expected` otherwise.
fn parse(arguments: &[u8; LOCK_BYTES], expected: LockArguments) -> Option<u32> {
    let long = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| arguments[at + i]));
    let short = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| arguments[at + i]));
    let seen = LockArguments {
        handle: long(0),
        owner: long(8),
        start: long(16),
        end: long(24),
        kind: short(32) as i32,
        pid: short(36),
    };
    (seen == expected).then(|| short(40))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_says_something_else_is_not_believed() {
        let mut arguments = [0u8; LOCK_BYTES];
        arguments[0] = 7;
        arguments[40] = FUSE_LK_FLOCK as u8;
        let expected = LockArguments { handle: 7, owner: 0, start: 0, end: 0, kind: 0, pid: 0 };
        assert_eq!(parse(&arguments, expected), Some(FUSE_LK_FLOCK));
        assert_eq!(parse(&arguments, LockArguments { owner: 1, ..expected }), None);
    }
}
