//! What daemons answer, for people.

use super::table::{
    Align::{Left, Right},
    Table, printable,
};
use crate::{
    config::Config,
    control::{LockEntry, LockList, MemberState, NodeState, Standing, Status, Top},
    metrics::{DESCRIPTIONS, Snapshot, Times},
};
use std::{fmt::Write, path::Path, time::Duration};

/// `verbfs status`.
pub fn status(status: &Status) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<9} {}", printable(&value));
    };
    line("cluster", format!("{}, view {}, fabric {}", status.cluster, status.view, status.fabric));
    line("node", format!("slot {} on {}, incarnation {}", status.slot, status.hostname, status.incarnation));
    line(
        "daemon",
        format!(
            "{}, process {}, up {}, version {}",
            state(status.state),
            status.pid,
            time(Duration::from_secs(status.uptime_seconds)),
            status.version
        ),
    );
    let storage = &status.storage;
    line(
        "storage",
        format!(
            "{} of {} used ({}), {} reserved, {} inodes",
            bytes(storage.used),
            bytes(storage.bytes),
            percent(storage.used, storage.bytes),
            bytes(storage.reserved),
            storage.inodes
        ),
    );
    let cache = &status.cache;
    line(
        "cache",
        format!(
            "{} of {} used ({}), {} dirty",
            bytes(cache.used),
            bytes(cache.bytes),
            percent(cache.used, cache.bytes),
            bytes(cache.dirty)
        ),
    );
    line(
        "locks",
        format!(
            "{} held here; as a server: {} granted, {} waiting",
            status.locks_held, status.locks_granted, status.lock_waiters
        ),
    );
    if let Some(metrics) = &status.metrics {
        line("metrics", metrics.clone());
    }

    let mut members = Table::new([
        ("SLOT", Right),
        ("ADDRESS", Left),
        ("STATE", Left),
        ("INCARNATION", Right),
        ("LAST HEARD", Right),
    ]);
    for member in &status.members {
        members.row([
            member.slot.to_string(),
            member.address.clone(),
            member_state(member.state).into(),
            or_dash(member.incarnation),
            member
                .silent_milliseconds
                .map_or("-".into(), |silent| format!("{} ago", time(Duration::from_millis(silent)))),
        ]);
    }
    let _ = write!(text, "\n{members}");

    let mut mounts = Table::new([("MOUNTED AT", Left), ("FRONT END", Left), ("MODE", Left), ("REQUESTS", Right)]);
    for mount in &status.mounts {
        let mode = if mount.read_only { "read-only" } else { "read-write" };
        mounts.row([
            mount.directory.display().to_string(),
            mount.front_end.clone(),
            mode.into(),
            mount.requests_in_flight.to_string(),
        ]);
    }
    if mounts.is_empty() {
        text.push_str("\nmounted nowhere; `verbfs mount DIRECTORY` mounts it\n");
    } else {
        let _ = write!(text, "\n{mounts}");
    }
    text
}

/// What `verbfs start` says once the daemon answers.
pub fn started(status: &Status, log: &Path) -> String {
    let mut text = format!(
        "node {} of {} is {} (process {}, log {})\n",
        status.slot,
        status.cluster,
        state(status.state),
        status.pid,
        log.display()
    );
    for member in &status.members {
        if matches!(member.state, MemberState::Connecting | MemberState::Silent | MemberState::Absent) {
            let _ = writeln!(
                text,
                "node {} at {} is {}",
                member.slot,
                printable(&member.address),
                member_state(member.state)
            );
        }
    }
    for mount in &status.mounts {
        let _ = writeln!(text, "mounted at {}", printable(&mount.directory.display().to_string()));
    }
    text
}

/// `verbfs config check`.
pub fn config_check(config: &Config, path: &Path, key: &str, own: &str) -> String {
    let mut text = format!("{} is usable\n", path.display());
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<12} {value}");
    };
    line("cluster", config.cluster.clone());
    line("key", key.into());
    line("this node", own.into());
    line("fabric", format!("{:?}", config.fabric()).to_lowercase());
    let nodes: Vec<String> = config.nodes.iter().map(|node| format!("{}={}", node.slot, node.address)).collect();
    line("nodes", nodes.join(", "));
    line(
        "storage",
        format!(
            "{} per node, chunks of {} over {} nodes",
            config.storage.arena_size, config.storage.chunk_size, config.storage.width
        ),
    );
    line("cache", format!("{}, writers wait at {} dirty", config.cache.size, bytes(config.dirty_bytes())));
    text
}

/// `verbfs locks`.
pub fn locks(locks: &LockList) -> String {
    let mut text = String::new();
    if let Some(ino) = locks.ino {
        let path = locks.path.as_ref().map(|path| format!("{}: ", printable(&path.display().to_string())));
        let home = locks.home.map(|home| format!(", home node {home}"));
        let _ = writeln!(text, "{}inode {ino}{}", path.unwrap_or_default(), home.unwrap_or_default());
    }
    let waits = locks.entries.iter().filter(|entry| entry.standing == Standing::Waits).count();
    let _ = writeln!(text, "{} held, {waits} waited for", locks.entries.len() - waits);
    let mut entries: Vec<&LockEntry> = locks.entries.iter().collect();
    // A holder and who waits for it stand together; the longest first.
    let class = |entry: &LockEntry| {
        let order = ["rename", "name", "open", "attr", "data", "flock", "fcntl"];
        order.iter().position(|class| *class == entry.class).unwrap_or(order.len())
    };
    entries.sort_by_key(|entry| {
        (
            entry.ino,
            class(entry),
            entry.standing == Standing::Waits,
            entry.start,
            std::cmp::Reverse(entry.age_milliseconds),
        )
    });
    let mut table = Table::new([
        ("INODE", Right),
        ("CLASS", Left),
        ("RANGE", Left),
        ("MODE", Left),
        ("", Left),
        ("NODE", Left),
        ("PROCESS", Left),
        ("STATE", Left),
        ("SERVER", Right),
        ("SINCE", Right),
    ]);
    for entry in entries {
        table.row([
            entry.ino.to_string(),
            entry.class.clone(),
            range(entry),
            entry.mode.clone(),
            if entry.standing == Standing::Holds { "holds" } else { "waits" }.into(),
            match &entry.host {
                Some(host) => format!("{} ({host})", entry.node),
                None => entry.node.to_string(),
            },
            match (entry.pid, &entry.command) {
                (Some(pid), Some(command)) => format!("{pid} ({command})"),
                (Some(pid), None) => pid.to_string(),
                (None, _) => "-".into(),
            },
            entry.state.clone(),
            entry.server.to_string(),
            entry.age_milliseconds.map_or("-".into(), |age| time(Duration::from_millis(age))),
        ]);
    }
    if !table.is_empty() {
        let _ = write!(text, "\n{table}");
    }
    if locks.truncated {
        text.push_str("\nthere are more; ask for one file\n");
    }
    for (node, reason) in &locks.unreachable {
        let _ = writeln!(text, "\nnode {node} did not answer ({}): its locks are missing above", printable(reason));
    }
    text
}

/// A range in the unit of its class.
fn range(entry: &LockEntry) -> String {
    match (entry.class.as_str(), entry.start, entry.end) {
        ("data" | "fcntl", 0, None) => "all bytes".into(),
        ("data" | "fcntl", start, None) => format!("bytes {start} to the end"),
        ("data" | "fcntl", start, Some(end)) => format!("bytes {start} to {}", end.saturating_sub(1)),
        ("name", 0, None) => "all names".into(),
        ("name", start, Some(end)) if end == start.saturating_add(1) => format!("name #{start:x}"),
        ("name", start, Some(end)) => format!("names #{start:x} to #{:x}", end.saturating_sub(1)),
        ("name", start, None) => format!("names #{start:x} to the last"),
        _ => "whole".into(),
    }
}

/// `verbfs top`: `now` as it was taken, `between` what happened since the look before.
pub fn top(now: &Top, between: &Snapshot) -> String {
    let mut text = String::new();
    let up = Duration::from_nanos(now.snapshot.uptime_nanoseconds);
    let _ = writeln!(
        text,
        "{} node {}, up {}, view {}, {} members; over {:.1} s:\n",
        printable(&now.cluster),
        now.slot,
        time(up),
        between.gauge("view"),
        between.gauge("members"),
        between.seconds()
    );
    let rate = |name: &str| count(between.rate(name));
    let byte_rate = |name: &str| format!("{}/s", bytes(between.rate(name) as u64));
    let requests = between.times("request");
    let hits = between.counter("cache_hits");
    let looks = hits + between.counter("cache_misses");
    let pages = |name: &str| bytes(between.gauge(name).max(0) as u64 * crate::config::PAGE_SIZE);
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<9} {value}");
    };
    line(
        "programs",
        format!(
            "{}/s requests, read {}, written {}, {} in flight",
            count(per_second(requests.count, between.seconds())),
            byte_rate("read_bytes"),
            byte_rate("written_bytes"),
            between.gauge("requests_in_flight")
        ),
    );
    line(
        "cache",
        format!(
            "hits {}, {} used, {} dirty, write-back {}/s, {}/s writers throttled",
            percent(hits, looks),
            pages("cache_pages"),
            pages("cache_dirty_pages"),
            bytes((between.rate("write_back_pages") * crate::config::PAGE_SIZE as f64) as u64),
            rate("write_throttled")
        ),
    );
    line(
        "locks",
        format!(
            "{}/s hits, {}/s asked for, {}/s revoked, {}/s handed over, {} held",
            rate("lock_hits"),
            rate("lock_requests"),
            rate("lock_revokes_received"),
            rate("hand_overs"),
            between.gauge("locks_held")
        ),
    );
    line(
        "server",
        format!(
            "{}/s granted, {}/s revokes sent, {}/s glimpses, {} grants, {} waiting",
            rate("lock_grants"),
            rate("lock_revokes_sent"),
            rate("lock_glimpses"),
            between.gauge("lock_grants_live"),
            between.gauge("lock_waiters")
        ),
    );
    line(
        "fabric",
        format!(
            "{}/s messages sent, {}/s received, {}/s one-sided operations, {}",
            rate("messages_sent"),
            rate("messages_received"),
            rate("fabric_operations"),
            byte_rate("fabric_bytes")
        ),
    );

    let mut table = Table::new([
        ("TIME OF", Left),
        ("PER SECOND", Right),
        ("MEAN", Right),
        ("MEDIAN", Right),
        ("99 %", Right),
        ("LONGEST", Right),
    ]);
    let mut add = |name: String, times: &Times| {
        let show = |time: Option<Duration>| time.map_or("-".into(), self::time);
        table.row([
            name,
            count(per_second(times.count, between.seconds())),
            show(times.mean()),
            show(times.quantile(0.5)),
            show(times.quantile(0.99)),
            show(times.quantile(1.0)),
        ]);
    };
    for (name, field) in [
        ("lock wait", "lock_wait"),
        ("lock hold", "lock_hold"),
        ("revoke", "lock_revoke"),
        ("hand-over", "hand_over"),
        ("glimpse", "glimpse"),
        ("write-back", "write_back"),
        ("transaction", "transaction"),
    ] {
        let times = between.times(field);
        if times.count > 0 {
            add(name.into(), &times);
        }
    }
    let mut by_operation = between.times_by_label("request");
    by_operation.sort_by_key(|(_, times)| std::cmp::Reverse(times.count));
    for (operation, times) in &by_operation {
        add(operation.clone(), times);
    }
    if table.is_empty() {
        text.push_str("\nnothing happened\n");
    } else {
        let _ = write!(text, "\n{table}");
    }
    text
}

/// `verbfs top --json`: counters per second, gauges, and times in microseconds, by metric without prefix and label.
pub fn top_json(now: &Top, between: &Snapshot) -> serde_json::Value {
    use serde_json::{Map, Value, json};
    let (mut counters, mut gauges, mut times) = (Map::new(), Map::new(), Map::new());
    let micros = |time: Option<Duration>| time.map(|time| time.as_nanos() as f64 / 1e3);
    let summary = |times: &Times| {
        json!({
            "per_second": per_second(times.count, between.seconds()),
            "mean_us": micros(times.mean()),
            "p50_us": micros(times.quantile(0.5)),
            "p99_us": micros(times.quantile(0.99)),
            "max_us": micros(times.quantile(1.0)),
        })
    };
    for description in DESCRIPTIONS {
        let name = description.name.trim_start_matches("verbfs_");
        match description.kind {
            "counter" => {
                let name = name.trim_end_matches("_total");
                counters.insert(name.into(), Value::from(between.rate(name)));
            }
            "gauge" => drop(gauges.insert(name.into(), Value::from(between.gauge(name)))),
            _ => {
                let name = name.trim_end_matches("_seconds");
                let mut all = summary(&between.times(name));
                let by_label = between.times_by_label(name);
                if by_label.iter().any(|(label, _)| !label.is_empty()) {
                    all["by_label"] = by_label.iter().map(|(label, times)| (label.clone(), summary(times))).collect();
                }
                times.insert(name.into(), all);
            }
        }
    }
    json!({
        "cluster": now.cluster,
        "slot": now.slot,
        "uptime_seconds": now.snapshot.seconds(),
        "seconds": between.seconds(),
        "per_second": counters,
        "gauges": gauges,
        "times": times,
    })
}

fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or("-".into(), |value| value.to_string())
}

fn state(state: NodeState) -> &'static str {
    match state {
        NodeState::Joining => "joining",
        NodeState::Serving => "serving",
        NodeState::Suspended => "suspended: its lease lapsed, calls wait",
        NodeState::Evicted => "evicted: calls fail with EIO, restart it",
        NodeState::Stopping => "stopping",
    }
}

fn member_state(state: MemberState) -> &'static str {
    match state {
        MemberState::Own => "this node",
        MemberState::Connected => "connected",
        MemberState::Connecting => "connecting",
        MemberState::Silent => "silent",
        MemberState::Evicted => "evicted",
        MemberState::Absent => "not there",
    }
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".into() } else { format!("{:.0} %", part as f64 * 100.0 / whole as f64) }
}

/// Bytes with three digits that count.
pub fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    if value < 1024.0 {
        return format!("{bytes} B");
    }
    for unit in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        value /= 1024.0;
        if value < 999.5 {
            return format!("{} {unit}", digits(value));
        }
    }
    format!("{:.0} EiB", value / 1024.0)
}

/// A number of events.
fn count(value: f64) -> String {
    if value < 999.5 {
        if value == value.trunc() { format!("{value:.0}") } else { digits(value) }
    } else if value < 999_500.0 {
        format!("{}k", digits(value / 1e3))
    } else {
        format!("{}M", digits(value / 1e6))
    }
}

fn digits(value: f64) -> String {
    if value < 9.995 {
        format!("{value:.2}")
    } else if value < 99.95 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

/// A length of time with three digits that count.
pub fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        0.0 => "0 s".into(),
        _ if seconds < 999.5e-9 => format!("{:.0} ns", seconds * 1e9),
        _ if seconds < 999.5e-6 => format!("{} us", digits(seconds * 1e6)),
        _ if seconds < 999.5e-3 => format!("{} ms", digits(seconds * 1e3)),
        _ if seconds < 120.0 => format!("{} s", digits(seconds)),
        _ if seconds < 7200.0 => format!("{:.0} min", seconds / 60.0),
        _ if seconds < 172_800.0 => format!("{:.1} h", seconds / 3600.0),
        _ => format!("{:.1} d", seconds / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        control::{CacheUse, Member, Mount, StorageUse},
        metrics::{FuseOperation, LockClass, Metrics},
    };

    #[test]
    fn units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1 << 20), "1.00 MiB");
        assert_eq!(bytes(1000 << 20), "0.98 GiB");
        assert_eq!(bytes(u64::MAX), "16 EiB");
        assert_eq!(count(0.0), "0");
        assert_eq!(count(0.5), "0.50");
        assert_eq!(count(123_456.0), "123k");
        assert_eq!(time(Duration::from_nanos(12_300)), "12.3 us");
        assert_eq!(time(Duration::from_secs(3)), "3.00 s");
        assert_eq!(time(Duration::from_secs(86_400)), "24.0 h");
    }

    #[test]
    fn status_names_members_and_mounts() {
        let member = |slot, state, silent| Member {
            slot,
            address: format!("node{slot}"),
            incarnation: Some(3),
            state,
            silent_milliseconds: silent,
        };
        let shown = status(&Status {
            cluster: "demo".into(),
            state: NodeState::Serving,
            hostname: "host".into(),
            members: vec![member(0, MemberState::Own, None), member(1, MemberState::Silent, Some(12_000))],
            mounts: vec![Mount {
                directory: "/mnt/a".into(),
                front_end: "stock".into(),
                read_only: false,
                requests_in_flight: 2,
            }],
            storage: StorageUse { bytes: 1 << 30, used: 1 << 29, ..StorageUse::default() },
            cache: CacheUse::default(),
            ..Status::default()
        });
        for part in
            ["demo", "serving", "512 MiB of 1.00 GiB used (50 %)", "silent", "12.0 s ago", "/mnt/a", "read-write"]
        {
            assert!(shown.contains(part), "{part} is missing:\n{shown}");
        }
        assert!(status(&Status::default()).contains("verbfs mount"));
    }

    fn entry(class: &str, standing: Standing, node: u16) -> LockEntry {
        LockEntry {
            ino: 17,
            class: class.into(),
            server: 0,
            start: 4096,
            end: Some(8192),
            mode: "X".into(),
            standing,
            state: "granted".into(),
            node,
            host: Some("host".into()),
            pid: None,
            command: None,
            age_milliseconds: Some(1500),
        }
    }

    #[test]
    fn locks_name_node_process_and_range() {
        let mut waiter = entry("data", Standing::Waits, 2);
        (waiter.pid, waiter.command) = (Some(4711), Some("dd".into()));
        let mut all = entry("fcntl", Standing::Holds, 1);
        (all.start, all.end) = (0, None);
        let answer = LockList {
            ino: Some(17),
            path: Some("/mnt/a/file".into()),
            home: Some(0),
            entries: vec![all, waiter, entry("data", Standing::Holds, 1)],
            unreachable: vec![(2, "silent for 12 s".into())],
            truncated: false,
        };
        let shown = locks(&answer);
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0], "/mnt/a/file: inode 17, home node 0");
        assert_eq!(lines[1], "2 held, 1 waited for");
        assert!(lines[4].contains("holds  1 (host)") && lines[4].contains("bytes 4096 to 8191"), "{shown}");
        assert!(lines[5].contains("waits  2 (host)  4711 (dd)"), "{shown}");
        assert!(lines[6].contains("all bytes"), "{shown}");
        assert!(shown.contains("node 2 did not answer"));
        assert_eq!(locks(&LockList::default()), "0 held, 0 waited for\n");
    }

    #[test]
    fn top_shows_rates_and_times() {
        let metrics = Metrics::new();
        let before = metrics.snapshot(Duration::from_secs(1));
        metrics.lock_requests[LockClass::Data].add(3000);
        metrics.cache_hits.add(3);
        metrics.cache_misses.add(1);
        metrics.request[FuseOperation::Write].record(Duration::from_micros(20));
        metrics.lock_wait[LockClass::Data].record(Duration::from_millis(2));
        let snapshot = metrics.snapshot(Duration::from_secs(3));
        let between = snapshot.since(&before);
        let now = Top { cluster: "demo".into(), slot: 1, snapshot };
        let shown = top(&now, &between);
        for part in ["demo node 1", "hits 75 %", "1.50k/s asked for", "write ", "lock wait", "0.50"] {
            assert!(shown.contains(part), "{part} is missing:\n{shown}");
        }
        let json = top_json(&now, &between);
        assert_eq!(json["per_second"]["lock_requests"], 1500.0);
        assert_eq!(json["times"]["request"]["by_label"]["write"]["mean_us"], 20.0);
        assert_eq!(json["gauges"]["members"], 0);
        assert!(top(&now, &now.snapshot.since(&now.snapshot)).contains("nothing happened"));
    }

    #[test]
    fn names_cannot_draw_on_the_terminal() {
        let mut bad = entry("data", Standing::Waits, 2);
        (bad.pid, bad.command) = (Some(1), Some("\x1b[2J".into()));
        assert!(!locks(&LockList { entries: vec![bad], ..LockList::default() }).contains('\x1b'));
    }
}
