//! Round trips between two processes of this host, in nanoseconds, one JSON line each:
//! the floor (a cache line, an event descriptor) and the mailbox above it, awake and asleep.
//!
//! Goals: awake within 5 of a cache line's round trip, asleep within 1.5 of an event descriptor's. Medians on a virtual machine
//! with two cores, 40 bytes: cache line 101 ns, mailbox 414 ns (when the host puts the cores far apart: 405 and 802);
//! event descriptor 5.4 us on one core and 48 us on two, mailbox asleep 5.8 us and 51 us.
//!
//! `cargo run --release -p verbfs-rdma --example pingpong [ROUNDS]`

use std::os::fd::RawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use verbfs_rdma::{Endpoint, EndpointConfig, Event, Lane, Limits};

/// Rounds in one sample: below the clock's grain a single round trip cannot be measured.
const BATCH: u64 = 32;

fn report(name: &str, payload: usize, mut samples: Vec<u64>) {
    samples.sort_unstable();
    let at = |per_mille: usize| samples[(samples.len() - 1) * per_mille / 1000];
    println!(
        "{{\"measurement\":\"{name}\",\"payload_bytes\":{payload},\"rounds\":{},\"minimum_ns\":{},\"median_ns\":{},\"p99_ns\":{}}}",
        samples.len() as u64 * BATCH,
        at(0),
        at(500),
        at(990)
    );
}

fn measure(name: &str, payload: usize, rounds: u64, mut round: impl FnMut(u64)) {
    let mut samples = Vec::new();
    let mut number = 0;
    // The first batches warm caches and are dropped.
    for batch in 0..rounds / BATCH + 4 {
        let start = Instant::now();
        for _ in 0..BATCH {
            number += 1;
            round(number);
        }
        if batch >= 4 {
            samples.push(start.elapsed().as_nanos() as u64 / BATCH);
        }
    }
    report(name, payload, samples);
}

/// What is written to an event descriptor.
static ONE: u64 = 1;

/// Where the two processes run. Waking an idle core costs far more than a switch on a busy one, so both are measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cores {
    Two,
    One,
}

impl Cores {
    fn name(self) -> &'static str {
        if self == Cores::Two { "two_cores" } else { "one_core" }
    }
    /// Binds the calling process, which has one thread yet or whose later threads inherit it.
    fn bind(self, far: bool) {
        // SAFETY: an all-zero set is valid.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: `set` is valid, and its size is what we say. On a machine with one core the call fails, harmlessly.
        unsafe {
            libc::CPU_SET(usize::from(self == Cores::Two && far), &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
        }
    }
}

/// Runs `child` in a forked process. Only while this process has one thread.
fn fork(child: impl FnOnce()) -> libc::pid_t {
    // SAFETY: no other thread exists yet, so the child may do anything.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        child();
        // SAFETY: ends the child without running the parent's destructors.
        unsafe { libc::_exit(0) };
    }
    assert!(pid > 0);
    pid
}

fn stop(pid: libc::pid_t) {
    // SAFETY: a child of ours.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, std::ptr::null_mut(), 0);
    }
}

fn cache_line(rounds: u64) {
    // SAFETY: a fresh anonymous mapping, never unmapped.
    let words: &'static [AtomicU64; 64] = unsafe {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let memory = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert_ne!(memory, libc::MAP_FAILED);
        &*memory.cast()
    };
    let (ping, pong) = (&words[0], &words[32]);
    Cores::Two.bind(false);
    let child = fork(|| {
        Cores::Two.bind(true);
        for number in 1.. {
            while ping.load(Ordering::Acquire) != number {
                std::hint::spin_loop();
            }
            pong.store(number, Ordering::Release);
        }
    });
    measure("cache_line", 8, rounds, |number| {
        ping.store(number, Ordering::Release);
        while pong.load(Ordering::Acquire) != number {
            std::hint::spin_loop();
        }
    });
    stop(child);
}

fn wait(descriptor: RawFd) {
    let mut entry = libc::pollfd { fd: descriptor, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&mut entry, 1, -1) };
}

fn event_descriptor(rounds: u64, cores: Cores) {
    // SAFETY: no pointers are passed.
    let (ping, pong) = unsafe { (libc::eventfd(0, libc::EFD_NONBLOCK), libc::eventfd(0, libc::EFD_NONBLOCK)) };
    let signal = |descriptor: RawFd| {
        // SAFETY: eight readable bytes.
        unsafe { libc::write(descriptor, (&raw const ONE).cast(), 8) };
    };
    // As the daemon does: wait, then drain.
    let take = |descriptor: RawFd| {
        wait(descriptor);
        let mut count = 0u64;
        // SAFETY: eight writable bytes.
        unsafe { libc::read(descriptor, (&raw mut count).cast(), 8) };
    };
    cores.bind(false);
    let child = fork(|| {
        cores.bind(true);
        loop {
            take(ping);
            signal(pong);
        }
    });
    measure(&format!("eventfd_{}", cores.name()), 8, rounds, |_| {
        signal(ping);
        take(pong);
    });
    stop(child);
}

fn endpoint(directory: &Path, slot: u16) -> Endpoint {
    let mut endpoint = Endpoint::new(EndpointConfig {
        slot,
        node_incarnation: 1,
        daemon_incarnation: 1,
        cluster: "pingpong".into(),
        key: [1; 32],
        directory: directory.into(),
        limits: Limits::default(),
    })
    .expect("an endpoint");
    endpoint.listen().expect("a socket");
    endpoint
}

/// Polls until a message is there, and says where it came from and what it is.
fn receive(endpoint: &mut Endpoint, events: &mut Vec<Event>, asleep: bool) -> Vec<u8> {
    loop {
        endpoint.poll(events);
        for event in events.drain(..) {
            if let Event::Message { payload, .. } = event {
                return payload;
            }
        }
        if asleep {
            if endpoint.arm() {
                wait(endpoint.event_fd());
            }
        } else {
            std::hint::spin_loop();
        }
    }
}

fn mailbox(rounds: u64, payload: usize, asleep: bool, cores: Cores) {
    cores.bind(false);
    let directory = std::env::temp_dir().join(format!(
        "verbfs-pingpong-{}-{payload}-{asleep}-{}",
        std::process::id(),
        cores.name()
    ));
    std::fs::create_dir_all(&directory).expect("a directory");
    let mut child = std::process::Command::new(std::env::current_exe().expect("our own program"))
        .args([
            "echo",
            directory.to_str().expect("a plain path"),
            if asleep { "asleep" } else { "awake" },
            cores.name(),
        ])
        .spawn()
        .expect("a child");
    let mut near = endpoint(&directory, 1);
    let mut events = Vec::new();
    'connecting: loop {
        near.connect(2).expect("a valid slot");
        let deadline = Instant::now() + Duration::from_millis(100);
        while Instant::now() < deadline {
            near.poll(&mut events);
            if near.is_connected(2) {
                break 'connecting;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    events.clear();
    let message = vec![42; payload];
    let name = format!("mailbox_{}_{}", if asleep { "asleep" } else { "awake" }, cores.name());
    measure(&name, payload, rounds, |_| {
        near.send(2, Lane::Lock, &message).expect("a session");
        receive(&mut near, &mut events, asleep);
    });
    child.kill().expect("a child");
    child.wait().expect("a child");
    drop(near);
    let _ = std::fs::remove_dir_all(directory);
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|word| word == "echo") {
        let cores = if arguments[4] == "two_cores" { Cores::Two } else { Cores::One };
        cores.bind(true);
        let mut far = endpoint(Path::new(&arguments[2]), 2);
        let mut events = Vec::new();
        loop {
            let payload = receive(&mut far, &mut events, arguments[3] == "asleep");
            far.send(1, Lane::Ack, &payload).expect("a session");
        }
    }
    let rounds = arguments.get(1).map_or(200_000, |word| word.parse().expect("a number of rounds"));
    cache_line(rounds);
    for payload in [40, 1024] {
        mailbox(rounds, payload, false, Cores::Two);
    }
    mailbox(rounds / 100, 128 * 1024, false, Cores::Two);
    for cores in [Cores::Two, Cores::One] {
        event_descriptor(rounds / 10, cores);
        for payload in [40, 1024] {
            mailbox(rounds / 10, payload, true, cores);
        }
    }
}
