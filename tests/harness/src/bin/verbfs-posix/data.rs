//! Bytes: appends, holes, mappings, and the many ways to move bytes, seen at once through every mount.

use crate::support::*;
use crate::{checks, same};
use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{self, FallocateFlags, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::{File, metadata};
use std::io::{IoSlice, IoSliceMut, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use verbfs_harness::clock::now;
use verbfs_harness::sys::{Mapping, PageBuffer};

checks! {
    write_seen_at_once, overwrite_seen_at_once, append_from_all_mounts_never_overwrites, append_ignores_the_offset,
    writers_of_different_ranges, writers_of_interleaved_bytes, shared_counter_by_ping_pong, large_reads_and_writes, write_far_past_the_end,
    truncate_up_reads_zeros, truncate_down_and_up_hides_old_bytes, truncate_seen_by_open_files,
    reads_at_the_end, sparse_file_of_8_tib, seek_finds_data_and_holes, punch_hole, zero_range, preallocation_keeps_size,
    preallocation_extends, impossible_offsets, file_size_limit, vectored_io, shared_offset_after_fork, sync_calls,
    synchronous_handles, sendfile_from_and_to, splice_through_a_pipe, copy_file_range_within_and_between,
    direct_io_is_coherent, private_mapping, private_mapping_sees_the_file, shared_mapping_across_mounts,
    shared_mapping_against_read_and_write, shared_mapping_ping_pong, mapping_past_the_end, mapped_write_survives_msync,
    execute_from_the_mount, advice_is_accepted, write_and_close_then_read, mtime_of_mapped_writes,
    no_space_arrives_at_write,
}

fn open(path: &Path) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("open {}", path.display()))
}

fn on_all(c: &Context, name: &str) -> Result<Vec<File>> {
    (0..3).map(|mount| open(&c.on(mount, name))).collect()
}

fn read_at(file: &File, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0xEE; len];
    let mut done = 0;
    while done < len {
        match file.read_at(&mut bytes[done..], offset + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

/// Bytes that differ from place to place and from `salt` to `salt`.
fn pattern(salt: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(31).wrapping_add(i >> 8) ^ salt.wrapping_mul(97)) as u8).collect()
}

fn differ(got: &[u8], expected: &[u8], what: &str) -> Result<()> {
    ensure!(got.len() == expected.len(), "{what}: {} bytes, expected {}", got.len(), expected.len());
    if let Some(at) = got.iter().zip(expected).position(|(g, e)| g != e) {
        let wrong = got.iter().zip(expected).filter(|(g, e)| g != e).count();
        bail!(
            "{what}: byte {at} is {:#04x}, expected {:#04x} ({wrong} of {} differ)",
            got[at],
            expected[at],
            got.len()
        );
    }
    Ok(())
}

fn write_seen_at_once(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    let mut expected = Vec::new();
    for round in 0..120u64 {
        let bytes = pattern(round, [1, 100, 4096, 5000, 70_000][round as usize % 5]);
        files[round as usize % 3].write_all_at(&bytes, expected.len() as u64)?;
        expected.extend(&bytes);
        for (mount, file) in files.iter().enumerate() {
            let at = expected.len() - bytes.len();
            differ(&read_at(file, at as u64, bytes.len() + 10)?, &bytes, &format!("round {round}, mount {mount}"))?;
        }
    }
    differ(&std::fs::read(c.b("f"))?, &expected, "the whole file")
}

fn overwrite_seen_at_once(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    files[0].write_all_at(&[0; 20_000], 0)?;
    let mut expected = vec![0; 20_000];
    for round in 0..200usize {
        let at = round * 977 % 19_000;
        let bytes = pattern(round as u64, 1 + round * 13 % 1000);
        files[round % 3].write_all_at(&bytes, at as u64)?;
        expected[at..at + bytes.len()].copy_from_slice(&bytes);
        differ(&read_at(&files[(round + 1) % 3], 0, 20_000)?, &expected, &format!("round {round}"))?;
    }
    Ok(())
}

/// Records of different lengths, each tells its writer and number: all must be there, whole, and in each writer's order.
fn append_from_all_mounts_never_overwrites(c: &Context) -> Result<()> {
    const RECORDS: u32 = 300;
    const WRITERS: usize = 6;
    let length = |writer: usize, n: u32| 16 + (writer * 131 + n as usize * 37) % 3000;
    let writers = (0..WRITERS)
        .map(|writer| {
            Box::new(move || {
                let mut file = File::options().append(true).create(true).open(c.on(writer, "log"))?;
                for n in 0..RECORDS {
                    let mut record = vec![writer as u8; length(writer, n)];
                    record[..4].copy_from_slice(&(length(writer, n) as u32).to_le_bytes());
                    record[4..8].copy_from_slice(&n.to_le_bytes());
                    same!(file.write(&record)?, record.len(), "bytes appended");
                }
                Ok(())
            }) as Box<dyn FnOnce() -> Result<()>>
        })
        .collect();
    together(writers)?;
    for mount in 0..3 {
        let bytes = std::fs::read(c.on(mount, "log"))?;
        let (mut at, mut next) = (0, [0u32; WRITERS]);
        while at < bytes.len() {
            ensure!(at + 9 <= bytes.len(), "a torn record at {at}");
            let len = u32::from_le_bytes(bytes[at..at + 4].try_into()?) as usize;
            let n = u32::from_le_bytes(bytes[at + 4..at + 8].try_into()?);
            let writer = bytes[at + 8] as usize;
            ensure!(
                writer < WRITERS && len == length(writer, n) && at + len <= bytes.len(),
                "no record begins at {at} (mount {mount})"
            );
            ensure!(
                bytes[at + 8..at + len].iter().all(|b| *b as usize == writer),
                "the record at {at} is mixed (mount {mount})"
            );
            same!(n, next[writer], "number of writer {writer}'s record at {at}, mount {mount}");
            next[writer] += 1;
            at += len;
        }
        same!(next, [RECORDS; WRITERS], "records by writer, mount {mount}");
    }
    Ok(())
}

fn append_ignores_the_offset(c: &Context) -> Result<()> {
    std::fs::write(c.a("f"), "0123456789")?;
    let mut file = File::options().append(true).read(true).open(c.b("f"))?;
    file.seek(std::io::SeekFrom::Start(2))?;
    file.write_all(b"A")?;
    open(&c.c("f"))?.write_all_at(b"LONGER", 11)?;
    file.write_all(b"B")?;
    same!(std::fs::read_to_string(c.a("f"))?, "0123456789ALONGERB", "bytes");
    // Where the kernel believes the end was, it leaves the offset: a mount that was not asked for the size since another
    // one changed it is wrong there (docs/semantics.md, stock limits). Asked, it is right.
    same!(file.metadata()?.len(), 18, "size");
    file.write_all(b"C")?;
    same!(file.stream_position()?, 19, "offset after an append");
    Ok(())
}

fn writers_of_different_ranges(c: &Context) -> Result<()> {
    const PART: usize = 3 << 19;
    let writers = (0..6usize)
        .map(|writer| {
            Box::new(move || {
                let file = open(&c.on(writer, "f"))?;
                for (n, piece) in pattern(writer as u64, PART).chunks(50_000).enumerate() {
                    file.write_all_at(piece, (writer * PART + n * 50_000) as u64)?;
                }
                Ok(())
            }) as Box<dyn FnOnce() -> Result<()>>
        })
        .collect();
    together(writers)?;
    for mount in 0..3 {
        let bytes = std::fs::read(c.on(mount, "f"))?;
        for writer in 0..6 {
            let part = &bytes[(writer * PART).min(bytes.len())..((writer + 1) * PART).min(bytes.len())];
            differ(part, &pattern(writer as u64, PART), &format!("part {writer}, mount {mount}"))?;
        }
    }
    Ok(())
}

/// Neighbouring bytes of the same pages from all mounts: nobody's byte may be lost to somebody's page.
fn writers_of_interleaved_bytes(c: &Context) -> Result<()> {
    const STRIPE: usize = 100;
    const ROUNDS: usize = 120;
    let writers = (0..6usize)
        .map(|writer| {
            Box::new(move || {
                let file = open(&c.on(writer, "f"))?;
                for round in 0..ROUNDS {
                    file.write_all_at(&[writer as u8 + 1; STRIPE], ((round * 6 + writer) * STRIPE) as u64)?;
                }
                Ok(())
            }) as Box<dyn FnOnce() -> Result<()>>
        })
        .collect();
    together(writers)?;
    let expected: Vec<u8> = (0..ROUNDS * 6 * STRIPE).map(|i| (i / STRIPE % 6) as u8 + 1).collect();
    for mount in 0..3 {
        differ(&std::fs::read(c.on(mount, "f"))?, &expected, &format!("mount {mount}"))?;
    }
    Ok(())
}

/// Two processes on two mounts take turns by a number in the file.
fn shared_counter_by_ping_pong(c: &Context) -> Result<()> {
    const TURNS: u64 = 400;
    open(&c.a("f"))?.write_all_at(&0u64.to_le_bytes(), 0)?;
    let player = |mount: usize| {
        move || -> Result<()> {
            let file = open(&c.on(mount, "f"))?;
            let begun = now();
            let mut latest = 0;
            while latest < TURNS {
                let mut bytes = [0; 8];
                file.read_exact_at(&mut bytes, 0)?;
                let value = u64::from_le_bytes(bytes);
                ensure!(value >= latest, "the number went back from {latest} to {value}");
                latest = value;
                if value % 2 == mount as u64 && value < TURNS {
                    latest = value + 1;
                    file.write_all_at(&latest.to_le_bytes(), 0)?;
                }
                ensure!(now() - begun < 30_000_000_000, "still at {value} after 30 s");
            }
            Ok(())
        }
    };
    together(vec![Box::new(player(0)), Box::new(player(1))])
}

fn large_reads_and_writes(c: &Context) -> Result<()> {
    let bytes = pattern(3, 9 << 20);
    let files = on_all(c, "f")?;
    let mut done = 0;
    while done < bytes.len() {
        done += files[0].write_at(&bytes[done..], 12_345 + done as u64)?;
    }
    differ(&read_at(&files[1], 12_345, bytes.len() + 1)?, &bytes, "9 MiB on the second mount")?;
    let mut one = vec![0; bytes.len()];
    let n = files[2].read_at(&mut one, 12_345)?;
    same!(n, bytes.len(), "bytes by one read of 9 MiB");
    differ(&one, &bytes, "one read of 9 MiB")
}

fn write_far_past_the_end(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    files[0].write_all_at(b"start", 0)?;
    files[1].write_all_at(b"far", 3_000_000)?;
    let mut expected = b"start".to_vec();
    expected.resize(3_000_000, 0);
    expected.extend(b"far");
    differ(&std::fs::read(c.c("f"))?, &expected, "the file with a gap")
}

fn truncate_up_reads_zeros(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    files[0].write_all_at(b"0123456789", 0)?;
    files[1].set_len(2_500_000)?;
    let mut expected = b"0123456789".to_vec();
    expected.resize(2_500_000, 0);
    differ(&read_at(&files[2], 0, 3_000_000)?, &expected, "the extended file")
}

fn truncate_down_and_up_hides_old_bytes(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    for (round, cut) in [5, 4095, 4096, 4097, 100_000, 1 << 20, (1 << 20) + 1].into_iter().enumerate() {
        files[round % 3].write_all_at(&vec![0xAA; 1_200_000], 0)?;
        files[(round + 1) % 3].set_len(cut)?;
        files[(round + 2) % 3].set_len(1_200_000)?;
        let mut expected = vec![0xAA; cut as usize];
        expected.resize(1_200_000, 0);
        for (mount, file) in files.iter().enumerate() {
            differ(&read_at(file, 0, 1_200_000)?, &expected, &format!("cut at {cut}, mount {mount}"))?;
        }
        // The same by a write past the cut.
        files[0].set_len(cut)?;
        files[1].write_all_at(b"x", 1_199_999)?;
        expected[1_199_999] = b'x';
        differ(&read_at(&files[2], 0, 1_200_000)?, &expected, &format!("write past a cut at {cut}"))?;
    }
    Ok(())
}

fn truncate_seen_by_open_files(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    for round in 0..30usize {
        let size = (round * 7919 % 30_000) as u64;
        files[round % 3].write_all_at(&[1; 30_000], 0)?;
        files[(round + 1) % 3].set_len(size)?;
        for file in &files {
            same!(file.metadata()?.len(), size, "size in round {round}");
            same!(read_at(file, 0, 40_000)?.len(), size as usize, "bytes in round {round}");
        }
    }
    Ok(())
}

fn reads_at_the_end(c: &Context) -> Result<()> {
    std::fs::write(c.a("f"), "0123456789")?;
    let file = File::open(c.b("f"))?;
    let mut bytes = [0; 20];
    same!(file.read_at(&mut bytes, 4)?, 6, "bytes across the end");
    same!(file.read_at(&mut bytes, 10)?, 0, "bytes at the end");
    same!(file.read_at(&mut bytes, 1 << 40)?, 0, "bytes far behind the end");
    same!(file.read_at(&mut bytes[..0], 0)?, 0, "bytes by an empty read");
    let writer = open(&c.c("f"))?;
    same!(writer.write_at(&[], 1 << 30)?, 0, "bytes by an empty write");
    same!(metadata(c.a("f"))?.len(), 10, "size after an empty write");
    Ok(())
}

fn sparse_file_of_8_tib(c: &Context) -> Result<()> {
    const END: u64 = 8 << 40;
    let files = on_all(c, "f")?;
    match files[0].write_at(b"end", END - 3) {
        Err(e) if e.raw_os_error() == Some(libc::EFBIG) => return skip("files end below 8 TiB"),
        other => same!(other?, 3, "bytes at 8 TiB"),
    }
    same!(metadata(c.b("f"))?.len(), END, "size");
    ensure!(metadata(c.b("f"))?.blocks() < 100_000, "a sparse file takes {} blocks", metadata(c.b("f"))?.blocks());
    differ(&read_at(&files[1], END / 2 + 17, 100_000)?, &[0; 100_000], "bytes in the hole")?;
    differ(&read_at(&files[2], END - 3, 10)?, b"end", "bytes at the end")?;
    let data = fs::seek(&files[1], SeekFrom::Data(0))?;
    ensure!(data == 0 || (END - (16 << 20)..END).contains(&data), "SEEK_DATA says {data}");
    files[2].write_all_at(b"middle", 5 << 40)?;
    differ(&read_at(&files[0], 5 << 40, 6)?, b"middle", "bytes in the middle")?;
    files[1].set_len(10)?;
    same!(read_at(&files[0], 0, 100)?.len(), 10, "bytes after truncation");
    files[2].set_len(END)?;
    differ(&read_at(&files[0], END - 3, 10)?, &[0; 3], "bytes at the end after truncation down and up")?;
    differ(&read_at(&files[0], 5 << 40, 6)?, &[0; 6], "bytes in the middle after truncation down and up")
}

/// The SEEK_DATA and SEEK_HOLE answers must never call written bytes a hole; calling a hole data is allowed.
fn seek_finds_data_and_holes(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    let places = [0u64, 1 << 20, 5 << 20, (9 << 20) + 4096];
    files[0].set_len(12 << 20)?;
    for (n, place) in places.iter().enumerate() {
        files[n % 3].write_all_at(&[7; 4096], *place)?;
    }
    for file in &files {
        let (mut at, mut found) = (0, Vec::new());
        loop {
            let data = match fs::seek(file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(Errno::NXIO) => break,
                Err(e) => return Err(e.into()),
            };
            ensure!(data >= at, "SEEK_DATA went back from {at} to {data}");
            let hole = fs::seek(file, SeekFrom::Hole(data))?;
            ensure!(hole > data && hole <= 12 << 20, "SEEK_HOLE says {hole} from {data}");
            found.push((data, hole));
            at = hole;
        }
        for place in places {
            ensure!(
                found.iter().any(|(d, h)| *d <= place && place + 4096 <= *h),
                "data at {place} is not among {found:?}"
            );
        }
        fails_with(fs::seek(file, SeekFrom::Data(12 << 20)), &[Errno::NXIO], "SEEK_DATA at the end")?;
        fails_with(fs::seek(file, SeekFrom::Hole(13 << 20)), &[Errno::NXIO], "SEEK_HOLE behind the end")?;
    }
    Ok(())
}

fn allocate(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> Result<()> {
    match fs::fallocate(file, flags, offset, len) {
        Err(Errno::OPNOTSUPP) => skip(format!("fallocate {flags:?}")),
        other => Ok(other?),
    }
}

fn punch_hole(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    let mut expected = pattern(1, 2_300_000);
    files[0].write_all_at(&expected, 0)?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for (n, (offset, len)) in
        [(0, 4096), (5000, 100), (8000, 9000), (1_040_000, 20_000), (2_290_000, 50_000)].into_iter().enumerate()
    {
        allocate(&files[n % 3], flags, offset as u64, len as u64)?;
        let end = (offset + len).min(expected.len());
        expected[offset..end].fill(0);
        differ(&read_at(&files[(n + 1) % 3], 0, 3_000_000)?, &expected, &format!("hole at {offset}"))?;
    }
    same!(metadata(c.b("f"))?.len(), 2_300_000, "size");
    let before = {
        files[0].sync_all()?;
        metadata(c.b("f"))?.blocks()
    };
    allocate(&files[1], flags, 0, 2 << 20)?;
    files[0].sync_all()?;
    let after = metadata(c.c("f"))?.blocks();
    ensure!(after < before, "{before} blocks before and {after} after a hole of 2 MiB");
    Ok(())
}

fn zero_range(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    let mut expected = pattern(2, 50_000);
    files[0].write_all_at(&expected, 0)?;
    allocate(&files[1], FallocateFlags::ZERO_RANGE, 3000, 10_000)?;
    expected[3000..13_000].fill(0);
    differ(&read_at(&files[2], 0, 60_000)?, &expected, "after ZERO_RANGE")?;
    allocate(&files[2], FallocateFlags::ZERO_RANGE, 40_000, 30_000)?;
    expected[40_000..].fill(0);
    expected.resize(70_000, 0);
    differ(&read_at(&files[0], 0, 80_000)?, &expected, "after ZERO_RANGE past the end")
}

fn preallocation_keeps_size(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    files[0].write_all_at(b"data", 0)?;
    allocate(&files[1], FallocateFlags::KEEP_SIZE, 0, 1 << 20)?;
    same!(metadata(c.c("f"))?.len(), 4, "size");
    files[2].set_len(1 << 20)?;
    let mut expected = b"data".to_vec();
    expected.resize(1 << 20, 0);
    differ(&read_at(&files[0], 0, 2 << 20)?, &expected, "preallocated bytes")
}

fn preallocation_extends(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    files[0].write_all_at(b"data", 0)?;
    allocate(&files[1], FallocateFlags::empty(), 1000, 1 << 20)?;
    same!(metadata(c.c("f"))?.len(), 1000 + (1 << 20), "size");
    let mut expected = b"data".to_vec();
    expected.resize(1000 + (1 << 20), 0);
    differ(&read_at(&files[2], 0, 2 << 20)?, &expected, "preallocated bytes")?;
    fails_with(fs::fallocate(&files[0], FallocateFlags::empty(), 0, 0), &[Errno::INVAL], "fallocate of nothing")
}

fn impossible_offsets(c: &Context) -> Result<()> {
    let file = open(&c.b("f"))?;
    let far = i64::MAX as u64 - 2;
    fails_with(file.write_at(b"0123456789", far), &[Errno::FBIG, Errno::INVAL], "a write across the largest offset")?;
    fails_with(fs::ftruncate(&file, u64::MAX), &[Errno::INVAL], "ftruncate to a negative size")?;
    fails_with(fs::seek(&file, SeekFrom::End(-5)), &[Errno::INVAL], "lseek before the start")?;
    fails_with(file.read_at(&mut [0; 5], u64::MAX - 5), &[Errno::INVAL], "pread at a negative offset")?;
    same!(metadata(c.a("f"))?.len(), 0, "size after failed calls");
    Ok(())
}

fn file_size_limit(c: &Context) -> Result<()> {
    Task::start(|| {
        use nix::sys::resource::{Resource, setrlimit};
        use nix::sys::signal::{SigHandler, Signal, signal};
        // SAFETY: ignoring a signal installs no handler that could run anything.
        unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn)? };
        setrlimit(Resource::RLIMIT_FSIZE, 10_000, 10_000)?;
        let file = open(&c.a("f"))?;
        same!(file.write_at(&[1; 20_000], 0)?, 10_000, "bytes written up to the limit");
        fails_with(file.write_at(b"x", 10_000), &[Errno::FBIG], "a write at the limit")?;
        fails_with(file.set_len(10_001), &[Errno::FBIG], "ftruncate past the limit")
    })?
    .join()?;
    same!(metadata(c.b("f"))?.len(), 10_000, "size");
    Ok(())
}

fn vectored_io(c: &Context) -> Result<()> {
    let mut writer = open(&c.a("f"))?;
    let parts = [pattern(1, 10), pattern(2, 5000), pattern(3, 1)];
    let slices: Vec<IoSlice> = parts.iter().map(|p| IoSlice::new(p)).collect();
    same!(writer.write_vectored(&slices)?, 5011, "bytes by writev");
    let (mut one, mut two) = (vec![0; 5000], vec![0; 11]);
    let mut reader = File::open(c.b("f"))?;
    same!(reader.read_vectored(&mut [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)])?, 5011, "bytes by readv");
    differ(&[one, two].concat(), &parts.concat(), "bytes")
}

fn shared_offset_after_fork(c: &Context) -> Result<()> {
    let mut file = open(&c.a("f"))?;
    file.write_all(b"one ")?;
    let mut copy = file.try_clone()?;
    Task::start(|| Ok(copy.write_all(b"two ")?))?.join()?;
    file.write_all(b"three")?;
    same!(std::fs::read_to_string(c.b("f"))?, "one two three", "bytes");
    Ok(())
}

fn sync_calls(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    files[0].write_all_at(&pattern(1, 100_000), 0)?;
    files[0].sync_all()?;
    files[0].sync_data()?;
    files[1].sync_all()?;
    File::open(c.c("f"))?.sync_all().context("fsync of a read-only handle")?;
    File::open(c.a(""))?.sync_all().context("fsync of a directory")?;
    File::open(c.b(""))?.sync_data().context("fdatasync of a directory")?;
    fs::syncfs(&files[2]).context("syncfs")?;
    // sync_file_range has no wrapper; close and read back instead.
    drop(files);
    differ(&std::fs::read(c.b("f"))?, &pattern(1, 100_000), "bytes after sync")
}

fn synchronous_handles(c: &Context) -> Result<()> {
    for (n, flags) in [OFlags::SYNC, OFlags::DSYNC].into_iter().enumerate() {
        let fd = fs::open(c.on(n, "f"), OFlags::CREATE | OFlags::WRONLY | flags, Mode::from_raw_mode(0o644))?;
        let file = File::from(fd);
        for round in 0..10 {
            file.write_all_at(&pattern(round, 5000), round * 5000)?;
            differ(&std::fs::read(c.on(n + 1, "f"))?[round as usize * 5000..][..5000], &pattern(round, 5000), "bytes")?;
        }
        drop(file);
        std::fs::remove_file(c.c("f"))?;
    }
    Ok(())
}

fn sendfile_from_and_to(c: &Context) -> Result<()> {
    let bytes = pattern(4, 700_000);
    std::fs::write(c.a("from"), &bytes)?;
    let from = File::open(c.b("from"))?;
    let to = open(&c.c("to"))?;
    let mut offset = 1000;
    while offset < bytes.len() as u64 {
        ensure!(fs::sendfile(&to, &from, Some(&mut offset), 300_000)? > 0, "sendfile ended at {offset}");
    }
    differ(&std::fs::read(c.a("to"))?, &bytes[1000..], "bytes")
}

fn splice_through_a_pipe(c: &Context) -> Result<()> {
    let bytes = pattern(5, 300_000);
    std::fs::write(c.a("from"), &bytes)?;
    let from = File::open(c.b("from"))?;
    let to = open(&c.c("to"))?;
    let (reader, writer) = rustix::pipe::pipe()?;
    let flags = rustix::pipe::SpliceFlags::empty();
    loop {
        let n = rustix::pipe::splice(&from, None, &writer, None, 50_000, flags).context("splice into the pipe")?;
        if n == 0 {
            break;
        }
        let mut left = n;
        while left > 0 {
            left -= rustix::pipe::splice(&reader, None, &to, None, left, flags).context("splice out of the pipe")?;
        }
    }
    differ(&std::fs::read(c.a("to"))?, &bytes, "bytes")
}

fn copy_file_range_within_and_between(c: &Context) -> Result<()> {
    let mut bytes = pattern(6, 200_000);
    let files = on_all(c, "f")?;
    files[1].write_all_at(&bytes, 0)?;
    // As cp does: the kernel ends a copy at the size it last saw.
    for file in &files {
        same!(file.metadata()?.len(), 200_000, "size before copying");
    }
    let to = open(&c.a("to"))?;
    let (mut from_at, mut to_at) = (1000, 50);
    while from_at < 150_000 {
        let len = 150_000 - from_at as usize;
        let n = fs::copy_file_range(&files[0], Some(&mut from_at), &to, Some(&mut to_at), len)?;
        ensure!(n > 0, "copy_file_range ended at {from_at}");
    }
    differ(&std::fs::read(c.b("to"))?[50..], &bytes[1000..150_000], "bytes of the other file")?;
    // Within one file.
    let (mut from_at, mut to_at) = (0, 100_000);
    while from_at < 50_000 {
        let len = 50_000 - from_at as usize;
        let n = fs::copy_file_range(&files[2], Some(&mut from_at), &files[2], Some(&mut to_at), len)?;
        ensure!(n > 0, "copy_file_range ended at {from_at}");
    }
    bytes.copy_within(0..50_000, 100_000);
    differ(&std::fs::read(c.b("f"))?, &bytes, "bytes within one file")?;
    // From one mount to another the kernel may refuse, but not copy wrongly.
    let other = open(&c.b("between"))?;
    match fs::copy_file_range(&files[0], Some(&mut 0), &other, Some(&mut 0), 200_000) {
        Err(Errno::XDEV) => Ok(()),
        Err(e) => Err(e).context("copy_file_range between mounts"),
        Ok(n) => differ(&std::fs::read(c.c("between"))?, &bytes[..n], "bytes between mounts"),
    }
}

fn direct_io_is_coherent(c: &Context) -> Result<()> {
    let direct = |mount: usize| -> Result<File> {
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::DIRECT;
        match fs::open(c.on(mount, "f"), flags, Mode::from_raw_mode(0o644)) {
            Err(Errno::INVAL) => skip("no O_DIRECT"),
            other => Ok(File::from(other?)),
        }
    };
    let (a, b, buffered) = (direct(0)?, direct(1)?, open(&c.c("f"))?);
    let mut block = PageBuffer::new(64 << 10);
    for round in 0..20u64 {
        block.copy_from_slice(&pattern(round, 64 << 10));
        a.write_all_at(&block, 0)?;
        differ(&read_at(&buffered, 0, 64 << 10)?, &block, "buffered read after a direct write")?;
        buffered.write_all_at(&pattern(round + 100, 5000), 6000)?;
        let mut back = PageBuffer::new(64 << 10);
        same!(b.read_at(&mut back, 0)?, 64 << 10, "bytes by a direct read");
        differ(&back[6000..11_000], &pattern(round + 100, 5000), "direct read after a buffered write")?;
        differ(&back[11_000..], &block[11_000..], "direct read of the rest")?;
    }
    Ok(())
}

/// Map, and skip where shared mappings are refused.
fn map(file: &File, len: usize, shared: bool) -> Result<Mapping> {
    match Mapping::new(file.as_fd(), 0, len, shared, true) {
        Err(e) if shared && e.raw_os_error() == Some(libc::ENODEV) => skip("no shared mappings"),
        other => Ok(other?),
    }
}

fn private_mapping(c: &Context) -> Result<()> {
    let bytes = pattern(7, 20_000);
    std::fs::write(c.a("f"), &bytes)?;
    let mapping = map(&open(&c.b("f"))?, 20_000, false)?;
    let mut got = vec![0; 20_000];
    mapping.read(0, &mut got);
    differ(&got, &bytes, "bytes in the mapping")?;
    mapping.write(5000, b"private");
    differ(&std::fs::read(c.a("f"))?, &bytes, "the file after a private change")
}

fn private_mapping_sees_the_file(c: &Context) -> Result<()> {
    for round in 0..10 {
        std::fs::write(c.on(round, "f"), pattern(round as u64, 10_000))?;
        let file = File::open(c.on(round + 1, "f"))?;
        let mapping = Mapping::new(file.as_fd(), 0, 10_000, false, false)?;
        let mut got = vec![0; 10_000];
        mapping.read(0, &mut got);
        differ(&got, &pattern(round as u64, 10_000), &format!("a new mapping in round {round}"))?;
    }
    Ok(())
}

fn shared_mapping_across_mounts(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    files[0].set_len(3 * 4096)?;
    // As every program does before it maps: the kernel bounds a mapping by the size it last saw.
    for file in &files {
        same!(file.metadata()?.len(), 3 * 4096, "size before mapping");
    }
    let mappings: Vec<Mapping> = files.iter().map(|f| map(f, 3 * 4096, true)).collect::<Result<_>>()?;
    for round in 0..300u64 {
        let word = [0, 1, 511, 512, 1100, 1535][round as usize % 6];
        mappings[round as usize % 3].store(word, round + 1);
        for (mount, mapping) in mappings.iter().enumerate() {
            same!(mapping.load(word), round + 1, "word {word} through mount {mount} in round {round}");
        }
    }
    Ok(())
}

fn shared_mapping_against_read_and_write(c: &Context) -> Result<()> {
    let files = on_all(c, "f")?;
    files[0].write_all_at(&[0; 8192], 0)?;
    let mapping = map(&files[0], 8192, true)?;
    for round in 0..100u64 {
        mapping.store(7, round);
        for (mount, file) in files.iter().enumerate() {
            differ(&read_at(file, 56, 8)?, &round.to_le_bytes(), &format!("read through mount {mount} after a store"))?;
        }
        files[1].write_all_at(&(round + 5000).to_le_bytes(), 4096)?;
        same!(mapping.load(512), round + 5000, "load after a write on another mount");
        files[0].write_all_at(&(round + 9000).to_le_bytes(), 4096)?;
        same!(mapping.load(512), round + 9000, "load after a write on the same mount");
    }
    Ok(())
}

fn shared_mapping_ping_pong(c: &Context) -> Result<()> {
    const TURNS: u64 = 200;
    open(&c.a("f"))?.set_len(4096)?;
    let player = |mount: usize| {
        move || -> Result<()> {
            let mapping = map(&open(&c.on(mount, "f"))?, 4096, true)?;
            let begun = now();
            loop {
                let value = mapping.load(3);
                if value >= TURNS {
                    return Ok(());
                }
                if value % 2 == mount as u64 {
                    mapping.store(3, value + 1);
                } else {
                    std::thread::yield_now();
                }
                ensure!(now() - begun < 30_000_000_000, "still at {value} after 30 s");
            }
        }
    };
    together(vec![Box::new(player(0)), Box::new(player(1))])
}

/// Behind the last page of the file a mapping has no bytes; in the last page they are zero.
fn mapping_past_the_end(c: &Context) -> Result<()> {
    std::fs::write(c.a("f"), [9; 5000])?;
    let file = File::open(c.b("f"))?;
    let mapping = Mapping::new(file.as_fd(), 0, 4 * 4096, false, false)?;
    let mut tail = [1; 8192 - 5000];
    mapping.read(5000, &mut tail);
    ensure!(tail.iter().all(|b| *b == 0), "the last page holds bytes behind the end");
    let mut task = Task::start(|| {
        mapping.read(3 * 4096, &mut [0]);
        Ok(())
    })?;
    let end = task.process().wait(TASK_LIMIT);
    same!(end, verbfs_harness::sys::ChildEnd::Killed(libc::SIGBUS), "a load behind the end");
    Ok(())
}

fn mapped_write_survives_msync(c: &Context) -> Result<()> {
    let file = open(&c.a("f"))?;
    file.set_len(100_000)?;
    let mapping = map(&file, 100_000, true)?;
    let bytes = pattern(8, 100_000);
    mapping.write(0, &bytes);
    mapping.sync()?;
    drop(mapping);
    drop(file);
    differ(&std::fs::read(c.b("f"))?, &bytes, "bytes")
}

fn mtime_of_mapped_writes(c: &Context) -> Result<()> {
    let file = open(&c.a("f"))?;
    file.set_len(4096)?;
    let mapping = map(&file, 4096, true)?;
    let before = metadata(c.b("f"))?;
    std::thread::sleep(std::time::Duration::from_millis(25));
    mapping.store(0, 1);
    mapping.sync()?;
    let after = metadata(c.b("f"))?;
    ensure!(
        (after.mtime(), after.mtime_nsec()) > (before.mtime(), before.mtime_nsec()),
        "mtime did not move after a mapped write and msync"
    );
    Ok(())
}

fn execute_from_the_mount(c: &Context) -> Result<()> {
    let program = std::fs::canonicalize("/bin/true")?;
    std::fs::copy(&program, c.a("true"))?;
    std::fs::set_permissions(c.a("true"), std::fs::Permissions::from_mode(0o755))?;
    for mount in 0..3 {
        let status = std::process::Command::new(c.on(mount, "true"))
            .status()
            .with_context(|| format!("exec through mount {mount}"))?;
        ensure!(status.success(), "the program on mount {mount} ended with {status}");
    }
    std::fs::write(c.b("script"), "#!/bin/sh\necho from-the-mount\n")?;
    std::fs::set_permissions(c.c("script"), std::fs::Permissions::from_mode(0o755))?;
    let output = std::process::Command::new(c.a("script")).output()?;
    same!(output.stdout, b"from-the-mount\n", "output of a script");
    std::fs::set_permissions(c.b("true"), std::fs::Permissions::from_mode(0o644))?;
    fails_with(std::process::Command::new(c.c("true")).status(), &[Errno::ACCESS], "exec without x bit")
}

fn advice_is_accepted(c: &Context) -> Result<()> {
    use rustix::fs::Advice;
    let file = open(&c.a("f"))?;
    file.write_all_at(&pattern(9, 100_000), 0)?;
    for advice in [Advice::Sequential, Advice::Random, Advice::WillNeed, Advice::DontNeed, Advice::Normal] {
        fs::fadvise(&file, 0, None, advice).with_context(|| format!("fadvise {advice:?}"))?;
    }
    differ(&read_at(&file, 0, 100_000)?, &pattern(9, 100_000), "bytes after advice")
}

fn write_and_close_then_read(c: &Context) -> Result<()> {
    for round in 0..60u64 {
        let bytes = pattern(round, 1 + round as usize * 997);
        let name = format!("f{round}");
        std::fs::write(c.on(round as usize, &name), &bytes)?;
        let mut got = Vec::new();
        File::open(c.on(round as usize + 1, &name))?.read_to_end(&mut got)?;
        differ(&got, &bytes, &format!("file {round}"))?;
    }
    Ok(())
}

/// Only with --fill: no space is told by the write that has none, and comes back when files go.
fn no_space_arrives_at_write(c: &Context) -> Result<()> {
    if !c.fill {
        return skip("--fill was not given");
    }
    let free = || -> Result<u64> {
        let s = fs::statvfs(&*c.b(""))?;
        Ok(s.f_bavail * s.f_frsize)
    };
    let before = free()?;
    let piece = pattern(10, 1 << 20);
    let (mut written, mut full) = (0u64, false);
    let mut progress = verbfs_harness::progress::Progress::new("fill", before >> 20);
    for n in 0.. {
        let path = c.on(n, &format!("fill{n}"));
        let file = match File::create(&path) {
            Ok(file) => file,
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => break,
            Err(e) => return Err(e.into()),
        };
        let mut offset = 0;
        while offset < 64 << 20 {
            match file.write_at(&piece, offset) {
                Ok(n) => offset += n as u64,
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                    full = true;
                    break;
                }
                Err(e) => return Err(e).context("write"),
            }
            progress.set((written + offset) >> 20);
        }
        written += offset;
        file.sync_all().context("fsync of what write accepted")?;
        if full {
            break;
        }
    }
    ensure!(full, "the file system never said ENOSPC");
    ensure!(written >= before / 2, "{written} bytes fitted into {before} free ones");
    for entry in std::fs::read_dir(c.a(""))? {
        std::fs::remove_file(entry?.path())?;
    }
    let begun = now();
    while free()? < before - before / 20 {
        ensure!(now() - begun < 30_000_000_000, "{} of {before} bytes are free 30 s after all was removed", free()?);
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    std::fs::write(c.c("again"), &piece)?;
    differ(&std::fs::read(c.a("again"))?, &piece, "a file written after that")
}
