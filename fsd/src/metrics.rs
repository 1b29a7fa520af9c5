//! What a daemon counts and measures, in one list: [`Metrics`].
//!
//! Adding a metric is one line in the list below; it is then a field to count on, a line of the
//! Prometheus text, and a value in [`Snapshot`]. Its Prometheus name follows from the field:
//! `verbfs_FIELD_total` for counters, `verbfs_FIELD` for gauges, `verbfs_FIELD_seconds` for histograms.
//!
//! Counting is one relaxed atomic addition (a histogram: three), without locks and without
//! allocation. A reader sees each value exactly, but not all of them at one instant.

use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fmt::Write,
    marker::PhantomData,
    sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// The values of one label, known in advance so that counting is an index into an array.
pub trait Label: Copy + 'static {
    /// Name of the label.
    const NAME: &'static str;
    /// Its values, in the order of [`Label::index`].
    const VALUES: &'static [&'static str];
    fn index(self) -> usize;
}

/// Declares an enum and its label values.
macro_rules! labels {
    ($($(#[$doc:meta])* $name:ident $label:literal { $($variant:ident $value:literal),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($variant),* }
        impl Label for $name {
            const NAME: &'static str = $label;
            const VALUES: &'static [&'static str] = &[$($value),*];
            fn index(self) -> usize {
                self as usize
            }
        }
        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$variant),*];
        }
    )*};
}

labels! {
    /// Lock classes, in locking order.
    LockClass "class" { Rename "rename", Name "name", Open "open", Attr "attr", Data "data" }
    /// Lanes of the mailbox, in the order in which handling may wait.
    Lane "lane" { NameSpace "ns", Lock "lock", Control "ctrl", Io "io", Ack "ack" }
    /// Directions as this node sees them.
    Direction "direction" { Sent "sent", Received "received" }
    /// One-sided operations on far memory.
    FabricOperation "operation" { Read "read", Write "write", Atomic "atomic" }
    /// Requests that the kernel makes.
    FuseOperation "operation" {
        Lookup "lookup", Forget "forget", Getattr "getattr", Setattr "setattr", Readlink "readlink",
        Mknod "mknod", Mkdir "mkdir", Unlink "unlink", Rmdir "rmdir", Symlink "symlink", Rename "rename",
        Link "link", Open "open", Create "create", Read "read", Write "write", Flush "flush",
        Release "release", Fsync "fsync", Opendir "opendir", Readdir "readdir", Readdirplus "readdirplus",
        Releasedir "releasedir", Fsyncdir "fsyncdir", Statfs "statfs", Setxattr "setxattr",
        Getxattr "getxattr", Listxattr "listxattr", Removexattr "removexattr", Access "access",
        Getlk "getlk", Setlk "setlk", Flock "flock", Fallocate "fallocate", Lseek "lseek",
        CopyFileRange "copy_file_range", Ioctl "ioctl", Other "other",
    }
}

/// Only ever grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn increment(&self) {
        self.add(1);
    }
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Relaxed);
    }
    /// Takes over what is counted elsewhere.
    pub fn raise_to(&self, total: u64) {
        self.0.fetch_max(total, Relaxed);
    }
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    pub fn set(&self, value: i64) {
        self.0.store(value, Relaxed);
    }
    pub fn add(&self, difference: i64) {
        self.0.fetch_add(difference, Relaxed);
    }
    pub fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

/// Shortest time that is told apart from zero, 2^8 ns: below it a clock reading itself counts.
const FIRST_OCTAVE: u32 = 8;
/// Longest: 2^37 ns, 137 s; a call that takes longer has failed long since.
const LAST_OCTAVE: u32 = 37;
/// Each doubling is divided in this many buckets, so a quantile is at most a quarter too large.
const STEPS: u32 = 4;
/// One for all below, the octaves, one for all above.
const BUCKETS: usize = ((LAST_OCTAVE - FIRST_OCTAVE) * STEPS) as usize + 2;
const _: () = assert!(STEPS.is_power_of_two() && FIRST_OCTAVE > STEPS.ilog2());

/// The bucket of a time in nanoseconds. Bucket `b` holds times below `upper_bound(b)` and not below `upper_bound(b - 1)`.
fn bucket(nanoseconds: u64) -> usize {
    if nanoseconds < 1 << FIRST_OCTAVE {
        return 0;
    }
    let octave = nanoseconds.ilog2();
    if octave >= LAST_OCTAVE {
        return BUCKETS - 1;
    }
    let step = (nanoseconds >> (octave - STEPS.ilog2())) as u32 & (STEPS - 1);
    1 + ((octave - FIRST_OCTAVE) * STEPS + step) as usize
}

/// Nanoseconds; the last bucket has no bound.
fn upper_bound(bucket: usize) -> Option<u64> {
    if bucket + 1 == BUCKETS {
        return None;
    }
    let octave = FIRST_OCTAVE + bucket as u32 / STEPS;
    let step = u64::from(bucket as u32 % STEPS);
    Some((1 << octave) + (step << (octave - STEPS.ilog2())))
}

/// Times in buckets that grow by a quarter of a doubling: 256 ns to 137 s.
#[derive(Debug)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    nanoseconds: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { buckets: [const { AtomicU64::new(0) }; BUCKETS], nanoseconds: AtomicU64::new(0) }
    }
}

impl Histogram {
    pub fn record(&self, time: Duration) {
        self.record_nanoseconds(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }
    pub fn record_nanoseconds(&self, nanoseconds: u64) {
        self.buckets[bucket(nanoseconds)].fetch_add(1, Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Relaxed);
    }
    /// Records the time since `start`.
    pub fn record_since(&self, start: Instant) {
        self.record(start.elapsed());
    }
    pub fn snapshot(&self) -> Times {
        let buckets: Vec<(u16, u64)> = self
            .buckets
            .iter()
            .enumerate()
            .map(|(bucket, count)| (bucket as u16, count.load(Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        Times { count, nanoseconds: self.nanoseconds.load(Relaxed), buckets }
    }
}

/// One metric for every value of a label.
#[derive(Debug)]
pub struct Family<L: Label, M> {
    members: Box<[M]>,
    label: PhantomData<L>,
}

impl<L: Label, M: Default> Default for Family<L, M> {
    fn default() -> Self {
        Family { members: L::VALUES.iter().map(|_| M::default()).collect(), label: PhantomData }
    }
}

impl<L: Label, M> Family<L, M> {
    pub fn of(&self, label: L) -> &M {
        &self.members[label.index()]
    }
}

impl<L: Label, M> std::ops::Index<L> for Family<L, M> {
    type Output = M;
    fn index(&self, label: L) -> &M {
        self.of(label)
    }
}

/// Turns a metric into samples, one per label value.
trait Sample {
    fn sample(&self, name: &str, into: &mut BTreeMap<String, Value>);
}

impl Sample for Counter {
    fn sample(&self, name: &str, into: &mut BTreeMap<String, Value>) {
        into.insert(name.into(), Value::Counter(self.get()));
    }
}
impl Sample for Gauge {
    fn sample(&self, name: &str, into: &mut BTreeMap<String, Value>) {
        into.insert(name.into(), Value::Gauge(self.get()));
    }
}
impl Sample for Histogram {
    fn sample(&self, name: &str, into: &mut BTreeMap<String, Value>) {
        into.insert(name.into(), Value::Times(self.snapshot()));
    }
}
impl<L: Label, M: Sample> Sample for Family<L, M> {
    fn sample(&self, name: &str, into: &mut BTreeMap<String, Value>) {
        for (member, value) in self.members.iter().zip(L::VALUES) {
            member.sample(&format!("{name}{{{}=\"{value}\"}}", L::NAME), into);
        }
    }
}

macro_rules! metric_type {
    (counter) => { Counter };
    (gauge) => { Gauge };
    (histogram) => { Histogram };
    ($kind:ident $label:ident) => { Family<$label, metric_type!($kind)> };
}
macro_rules! metric_name {
    (counter $name:ident) => {
        concat!("verbfs_", stringify!($name), "_total")
    };
    (gauge $name:ident) => {
        concat!("verbfs_", stringify!($name))
    };
    (histogram $name:ident) => {
        concat!("verbfs_", stringify!($name), "_seconds")
    };
}

macro_rules! metrics {
    ($( $kind:ident $name:ident $([$label:ident])? $help:literal; )*) => {
        /// Everything a daemon counts and measures. Shared by reference; see the module.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $( #[doc = $help] pub $name: metric_type!($kind $($label)?), )*
        }

        /// Name, type and help text of every metric, in the order of the list.
        pub const DESCRIPTIONS: &[Description] = &[
            $( Description { name: metric_name!($kind $name), kind: stringify!($kind), help: $help } ),*
        ];

        impl Metrics {
            fn sample(&self) -> BTreeMap<String, Value> {
                let mut samples = BTreeMap::new();
                $( self.$name.sample(metric_name!($kind $name), &mut samples); )*
                samples
            }
        }
    };
}

metrics! {
    // Locks, as a client of lock servers.
    counter lock_hits[LockClass] "Pins that a lock already held covered.";
    counter lock_requests[LockClass] "Lock requests sent to servers.";
    counter lock_upgrades[LockClass] "Lock requests for a stronger mode of a lock held.";
    counter lock_revokes_received[LockClass] "Revokes of locks this node held.";
    counter lock_releases[LockClass] "Locks given up, wholly or in part.";
    gauge locks_held "Ranges this node has locked now.";
    histogram lock_wait[LockClass] "From asking a server for a lock to holding it.";
    histogram lock_hold[LockClass] "From being granted a lock to giving it up, in whole milliseconds.";
    histogram lock_revoke "From receiving a revoke to having given up what it names.";
    // Hand-over of dirty pages from holder to holder.
    counter hand_overs[Direction] "Dirty ranges handed to (sent) or taken from (received) another holder.";
    counter hand_over_pages[Direction] "Dirty pages handed to or taken from another holder.";
    histogram hand_over "From the grant that names a predecessor to having its pages.";
    // Locks, as a server.
    counter lock_grants[LockClass] "Locks granted to nodes.";
    counter lock_denials[LockClass] "Lock requests denied.";
    counter lock_revokes_sent[LockClass] "Revokes sent to holders.";
    counter lock_glimpses "Sizes collected from writers without taking their locks.";
    gauge lock_grants_live "Grants in this node's tables now.";
    gauge lock_waiters "Lock requests that wait in this node's tables now.";
    histogram glimpse "From being asked for attributes to answering without a lock.";
    // fcntl and flock locks, as the home of files.
    counter file_lock_requests "fcntl and flock requests.";
    counter file_lock_deadlocks "fcntl requests refused because they would have closed a cycle.";
    gauge file_lock_waiters "fcntl and flock requests that wait now.";
    // The page cache.
    counter cache_hits "Pages of reads that found all they wanted in the cache.";
    counter cache_misses "Pages fetched from the node that stores them.";
    counter cache_evictions "Clean pages dropped to make room.";
    gauge cache_pages "Pages in the cache now.";
    gauge cache_dirty_pages "Pages in the cache now that are newer than what is stored.";
    counter write_throttled "Writers that waited because too much was dirty.";
    counter write_back_pages "Dirty pages written to the nodes that store them.";
    counter write_back_errors "Write-backs that failed.";
    histogram write_back "From posting a run of dirty pages to its commit.";
    // Storage of this node.
    gauge arena_bytes "Bytes this node can store.";
    gauge arena_used_bytes "Bytes allocated to files.";
    gauge arena_reserved_bytes "Bytes promised to writers and not yet allocated.";
    counter arena_full "Requests for space refused because there was none.";
    gauge inodes "Inodes whose home is this node.";
    counter transactions "Transactions committed to the store of names and attributes.";
    histogram transaction "From beginning to having committed a transaction.";
    // Messages and one-sided operations.
    counter messages_sent[Lane] "Messages sent to other nodes.";
    counter messages_received[Lane] "Messages received from other nodes.";
    counter messages_resent "Messages sent again after a connection was made anew.";
    counter message_bytes[Direction] "Bytes of messages.";
    counter messages_invalid "Messages that were malformed or made no sense; each cost its sender the connection.";
    counter credit_stalls "Times a lane had messages to send and no room at the receiver.";
    counter fabric_operations[FabricOperation] "One-sided operations posted.";
    counter fabric_bytes[FabricOperation] "Bytes moved by one-sided operations.";
    counter fabric_errors "One-sided operations that failed.";
    // Membership.
    gauge view "Number of the membership view.";
    gauge members "Nodes in the view, this one included.";
    counter peers_refused "Connections that this node tried and one side refused: wrong key, cluster, slot, version or incarnation.";
    counter peers_lost "Connections lost.";
    // Requests of the kernel.
    gauge requests_in_flight "Requests of the kernel that are not yet answered.";
    counter invalidations "Times the kernel was told to drop what it caches of an inode.";
    counter read_bytes "Bytes read by requests of the kernel.";
    counter written_bytes "Bytes written by requests of the kernel.";
    histogram request[FuseOperation] "From receiving a request of the kernel to answering it.";
}

/// What a metric is called and means.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    pub help: &'static str,
}

impl Metrics {
    pub fn new() -> Metrics {
        Metrics::default()
    }

    /// All values now; `uptime` is the daemon's, and dates the snapshot.
    pub fn snapshot(&self, uptime: Duration) -> Snapshot {
        Snapshot { uptime_nanoseconds: uptime.as_nanos() as u64, samples: self.sample() }
    }

    /// All values in the text format of Prometheus (version 0.0.4). Members of a family that never counted are left out.
    pub fn to_prometheus(&self) -> String {
        let samples = self.sample();
        let mut text = String::with_capacity(32 << 10);
        for Description { name, kind, help } in DESCRIPTIONS {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            // A name may begin another name; its own samples end there or go on with labels.
            let own = samples
                .range(name.to_string()..)
                .take_while(|(key, _)| key.starts_with(name))
                .filter(|(key, _)| key.len() == name.len() || key.as_bytes()[name.len()] == b'{');
            for (key, value) in own {
                match value {
                    Value::Counter(0) | Value::Times(Times { count: 0, .. }) if key.contains('{') => {}
                    Value::Counter(value) => drop(writeln!(text, "{key} {value}")),
                    Value::Gauge(value) => drop(writeln!(text, "{key} {value}")),
                    Value::Times(times) => times.to_prometheus(name, &key[name.len()..], &mut text),
                }
            }
        }
        text
    }
}

/// All values at one time, by Prometheus name and label: `verbfs_request_seconds{operation="read"}`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// How long the daemon had run.
    pub uptime_nanoseconds: u64,
    pub samples: BTreeMap<String, Value>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Value {
    Counter(u64),
    Gauge(i64),
    Times(Times),
}

/// What a histogram holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Times {
    pub count: u64,
    /// Sum of all times.
    pub nanoseconds: u64,
    /// Buckets that are not empty, ascending, and their counts.
    pub buckets: Vec<(u16, u64)>,
}

impl Times {
    /// A time that the share `quantile` (0 to 1) of all times does not exceed, at most a quarter too large; `None` when there are none.
    pub fn quantile(&self, quantile: f64) -> Option<Duration> {
        let rank = ((self.count as f64 * quantile.clamp(0.0, 1.0)).ceil() as u64).max(1);
        let mut seen = 0;
        for &(bucket, count) in &self.buckets {
            seen += count;
            if seen >= rank {
                let bound = upper_bound(bucket.into()).unwrap_or(1 << LAST_OCTAVE);
                return Some(Duration::from_nanos(bound));
            }
        }
        None
    }

    /// `None` when there are none.
    pub fn mean(&self) -> Option<Duration> {
        self.nanoseconds.checked_div(self.count).map(Duration::from_nanos)
    }

    /// What came since `before`.
    pub fn since(&self, before: &Times) -> Times {
        let mut buckets: BTreeMap<u16, u64> = self.buckets.iter().copied().collect();
        for (bucket, count) in &before.buckets {
            if let Some(now) = buckets.get_mut(bucket) {
                *now = now.saturating_sub(*count);
            }
        }
        Times {
            count: self.count.saturating_sub(before.count),
            nanoseconds: self.nanoseconds.saturating_sub(before.nanoseconds),
            buckets: buckets.into_iter().filter(|(_, count)| *count > 0).collect(),
        }
    }

    /// Both together.
    pub fn merge(&mut self, other: &Times) {
        let mut buckets: BTreeMap<u16, u64> = self.buckets.iter().copied().collect();
        for &(bucket, count) in &other.buckets {
            *buckets.entry(bucket).or_default() += count;
        }
        self.count += other.count;
        self.nanoseconds += other.nanoseconds;
        self.buckets = buckets.into_iter().collect();
    }

    /// Prometheus gets whole octaves: a fourth of the lines, and always the same bounds.
    fn to_prometheus(&self, name: &str, labels: &str, text: &mut String) {
        let inner = labels.trim_start_matches('{').trim_end_matches('}');
        let separator = if inner.is_empty() { "" } else { "," };
        let mut below = self.buckets.iter().peekable();
        let mut seen = 0;
        for octave in FIRST_OCTAVE..=LAST_OCTAVE {
            let bound = 1u64 << octave;
            while let Some((_, count)) =
                below.next_if(|(bucket, _)| upper_bound((*bucket).into()).is_some_and(|upper| upper <= bound))
            {
                seen += count;
            }
            let seconds = bound as f64 / 1e9;
            let _ = writeln!(text, "{name}_bucket{{{inner}{separator}le=\"{seconds}\"}} {seen}");
        }
        let _ = writeln!(text, "{name}_bucket{{{inner}{separator}le=\"+Inf\"}} {}", self.count);
        let _ = writeln!(text, "{name}_sum{labels} {}", self.nanoseconds as f64 / 1e9);
        let _ = writeln!(text, "{name}_count{labels} {}", self.count);
    }
}

impl Snapshot {
    /// The sum of a counter over all its labels. `name` is a field of [`Metrics`].
    pub fn counter(&self, name: &str) -> u64 {
        self.family(&format!("verbfs_{name}_total"))
            .map(|(_, value)| if let Value::Counter(count) = value { *count } else { 0 })
            .sum()
    }

    /// The sum of a gauge over all its labels.
    pub fn gauge(&self, name: &str) -> i64 {
        self.family(&format!("verbfs_{name}"))
            .map(|(_, value)| if let Value::Gauge(value) = value { *value } else { 0 })
            .sum()
    }

    /// A histogram, its labels taken together.
    pub fn times(&self, name: &str) -> Times {
        let mut all = Times::default();
        for (_, value) in self.family(&format!("verbfs_{name}_seconds")) {
            if let Value::Times(times) = value {
                all.merge(times);
            }
        }
        all
    }

    /// A histogram by label value, those without any time left out.
    pub fn times_by_label(&self, name: &str) -> Vec<(String, Times)> {
        self.family(&format!("verbfs_{name}_seconds"))
            .filter_map(|(label, value)| match value {
                Value::Times(times) if times.count > 0 => Some((label.to_string(), times.clone())),
                _ => None,
            })
            .collect()
    }

    /// Samples of one metric with their label values ("" without a label).
    fn family<'a>(&'a self, name: &str) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let name = name.to_string();
        self.samples
            .range(name.clone()..)
            .map_while(move |(key, value)| {
                let rest = key.strip_prefix(&name)?;
                Some((rest, value))
            })
            .filter_map(|(rest, value)| {
                if rest.is_empty() {
                    Some(("", value))
                } else if rest.starts_with('{') {
                    Some((rest.split('"').nth(1)?, value))
                } else {
                    None
                }
            })
    }

    /// What happened since `before`, a snapshot of the same daemon. Gauges keep their present value. After a restart of
    /// the daemon (its uptime went back) everything counts as new.
    pub fn since(&self, before: &Snapshot) -> Snapshot {
        if self.uptime_nanoseconds < before.uptime_nanoseconds {
            return self.clone();
        }
        let samples = self
            .samples
            .iter()
            .map(|(key, value)| {
                let value = match (value, before.samples.get(key)) {
                    (Value::Counter(now), Some(Value::Counter(then))) => Value::Counter(now.saturating_sub(*then)),
                    (Value::Times(now), Some(Value::Times(then))) => Value::Times(now.since(then)),
                    (value, _) => value.clone(),
                };
                (key.clone(), value)
            })
            .collect();
        Snapshot { uptime_nanoseconds: self.uptime_nanoseconds - before.uptime_nanoseconds, samples }
    }

    /// Seconds that a snapshot spans: since the start of the daemon or, after [`Snapshot::since`], between two.
    pub fn seconds(&self) -> f64 {
        self.uptime_nanoseconds as f64 / 1e9
    }

    /// A counter per second of the span.
    pub fn rate(&self, name: &str) -> f64 {
        let seconds = self.seconds();
        if seconds > 0.0 { self.counter(name) as f64 / seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn buckets_meet_without_gap() {
        assert_eq!(bucket(0), 0);
        assert_eq!(upper_bound(0), Some(1 << FIRST_OCTAVE));
        for b in 0..BUCKETS - 1 {
            let bound = upper_bound(b).unwrap();
            assert_eq!(bucket(bound - 1), b);
            assert_eq!(bucket(bound), b + 1);
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    proptest! {
        #[test]
        fn quantiles_are_at_most_a_quarter_too_large(nanoseconds in 256u64..1 << 36) {
            let histogram = Histogram::default();
            histogram.record_nanoseconds(nanoseconds);
            let told = histogram.snapshot().quantile(0.5).unwrap().as_nanos() as f64;
            prop_assert!(told > nanoseconds as f64 && told <= nanoseconds as f64 * 1.25 + 1.0);
        }
    }

    #[test]
    fn quantiles() {
        let histogram = Histogram::default();
        assert_eq!(histogram.snapshot().quantile(0.5), None);
        assert_eq!(histogram.snapshot().mean(), None);
        for micros in 1..=1000 {
            histogram.record(Duration::from_micros(micros));
        }
        let times = histogram.snapshot();
        let near = |quantile: f64, micros: f64| {
            let told = times.quantile(quantile).unwrap().as_secs_f64() * 1e6;
            assert!(told >= micros && told <= micros * 1.26, "{quantile}: {told}");
        };
        near(0.0, 1.0);
        near(0.5, 500.0);
        near(0.99, 990.0);
        near(1.0, 1000.0);
        assert_eq!(times.mean(), Some(Duration::from_nanos(500_500)));
    }

    #[test]
    fn names_are_unique_and_follow_the_rules() {
        let mut names = std::collections::BTreeSet::new();
        for Description { name, kind, help } in DESCRIPTIONS {
            assert!(names.insert(name), "{name} stands twice in the list");
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{name}");
            assert!(help.ends_with('.') && !help.contains(['\n', '\\']), "{name}: {help}");
            assert!(["counter", "gauge", "histogram"].contains(kind));
        }
        for values in
            [LockClass::VALUES, Lane::VALUES, FuseOperation::VALUES, Direction::VALUES, FabricOperation::VALUES]
        {
            assert!(values.iter().all(|value| value.chars().all(|c| c.is_ascii_lowercase() || c == '_')));
        }
        assert_eq!(FuseOperation::ALL.len(), FuseOperation::VALUES.len());
        assert_eq!(FuseOperation::Other.index() + 1, FuseOperation::VALUES.len());
    }

    /// Reads the text format by its grammar: HELP, TYPE, then samples of that metric only; histograms cumulative and closed by +Inf.
    fn check_prometheus(text: &str) -> BTreeMap<String, f64> {
        let mut samples = BTreeMap::new();
        let (mut name, mut kind) = (String::new(), String::new());
        let mut described = std::collections::BTreeSet::new();
        let mut last_bucket: BTreeMap<String, f64> = BTreeMap::new();
        assert!(text.ends_with('\n'));
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                name = rest.split(' ').next().unwrap().into();
                assert!(described.insert(name.clone()), "{name} described twice");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (of, type_name) = rest.split_once(' ').unwrap();
                assert_eq!(of, name);
                kind = type_name.into();
            } else {
                let (key, value) = line.rsplit_once(' ').unwrap();
                let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
                let (sample, labels) = match key.split_once('{') {
                    Some((sample, labels)) => (sample, labels.strip_suffix('}').unwrap()),
                    None => (key, ""),
                };
                for label in labels.split(',').filter(|label| !label.is_empty()) {
                    let (label, value) = label.split_once('=').unwrap();
                    assert!(label.chars().all(|c| c.is_ascii_lowercase()));
                    assert!(value.len() > 2 && value.starts_with('"') && value.ends_with('"'));
                }
                let suffix = sample.strip_prefix(&name).unwrap_or_else(|| panic!("{sample} below {name}"));
                match kind.as_str() {
                    "histogram" => assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{line}"),
                    _ => assert_eq!(suffix, ""),
                }
                if suffix == "_bucket" {
                    let series = format!("{name}{}", labels.split("le=").next().unwrap());
                    let before = last_bucket.insert(series, value).unwrap_or(0.0);
                    assert!(value >= before, "not cumulative: {line}");
                }
                assert!(samples.insert(key.to_string(), value).is_none(), "{key} stands twice");
            }
        }
        for (key, value) in &samples {
            if key.contains("le=\"+Inf\"") {
                let count = key.replace("_bucket", "_count").replace(",le=\"+Inf\"", "").replace("{le=\"+Inf\"}", "");
                assert_eq!(samples.get(&count), Some(value), "{count}");
            }
        }
        assert_eq!(described.len(), DESCRIPTIONS.len());
        samples
    }

    #[test]
    fn prometheus_text_is_well_formed() {
        let metrics = Metrics::new();
        check_prometheus(&metrics.to_prometheus());
        metrics.lock_requests[LockClass::Data].add(3);
        metrics.cache_dirty_pages.set(-1);
        metrics.request.of(FuseOperation::Read).record(Duration::from_micros(10));
        metrics.request.of(FuseOperation::Read).record(Duration::from_secs(1000));
        metrics.request.of(FuseOperation::Write).record(Duration::ZERO);
        metrics.hand_over.record(Duration::from_millis(2));
        let samples = check_prometheus(&metrics.to_prometheus());
        assert_eq!(samples["verbfs_lock_requests_total{class=\"data\"}"], 3.0);
        assert_eq!(samples["verbfs_cache_dirty_pages"], -1.0);
        assert_eq!(samples["verbfs_request_seconds_count{operation=\"read\"}"], 2.0);
        assert_eq!(samples["verbfs_request_seconds_bucket{operation=\"read\",le=\"0.000016384\"}"], 1.0);
        assert_eq!(samples["verbfs_hand_over_seconds_bucket{le=\"+Inf\"}"], 1.0);
        assert!(samples["verbfs_hand_over_seconds_sum"] > 0.0019);
        assert!(!samples.contains_key("verbfs_lock_requests_total{class=\"name\"}"), "idle members are left out");
    }

    #[test]
    fn snapshots_give_rates() {
        let metrics = Metrics::new();
        metrics.lock_requests[LockClass::Data].add(3);
        metrics.request[FuseOperation::Read].record(Duration::from_micros(10));
        let before = metrics.snapshot(Duration::from_secs(10));
        metrics.lock_requests[LockClass::Data].add(4);
        metrics.lock_requests[LockClass::Attr].add(2);
        metrics.members.set(3);
        metrics.request[FuseOperation::Read].record(Duration::from_millis(10));
        let after = metrics.snapshot(Duration::from_secs(12));
        let between = after.since(&before);
        assert_eq!(between.counter("lock_requests"), 6);
        assert_eq!(between.rate("lock_requests"), 3.0);
        assert_eq!(between.gauge("members"), 3);
        assert_eq!(between.times("request").count, 1);
        assert!(between.times("request").quantile(0.5).unwrap() >= Duration::from_millis(10));
        assert_eq!(between.times_by_label("request")[0].0, "read");
        assert_eq!(before.since(&after), before, "a restarted daemon");
        let text = serde_json::to_string(&after).unwrap();
        assert_eq!(serde_json::from_str::<Snapshot>(&text).unwrap(), after);
    }

    #[test]
    fn counts_from_many_threads() {
        let metrics = Metrics::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        metrics.cache_hits.increment();
                        metrics.write_back.record_nanoseconds(1000);
                    }
                });
            }
        });
        assert_eq!(metrics.cache_hits.get(), 40_000);
        assert_eq!(metrics.write_back.snapshot().count, 40_000);
    }
}
