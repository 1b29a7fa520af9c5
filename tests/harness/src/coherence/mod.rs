//! Concurrent client processes that record histories, and the verdict on them.
//!
//! The driver makes the files, starts one process for each client (the program itself, with a hidden first argument),
//! lets them go together, collects their calls, and hands them to the checker: by file, by word, by lock table, and
//! all names together.

pub mod client;
pub mod driver;
pub mod verdict;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The first argument that turns the program into a client.
pub const CLIENT_ARGUMENT: &str = "__client";

/// A kind of calls that are tried together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Bytes and sizes of files.
    Data,
    /// Names in directories.
    Names,
    /// Words of a shared mapping.
    Mmap,
    /// fcntl and flock locks.
    Locks,
}

impl Family {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Family::Data => "data",
            Family::Names => "names",
            Family::Mmap => "mmap",
            Family::Locks => "locks",
        }
    }
}

/// Files of the data family: 0 is used in few pages, 1 around the 1 MiB boundary, 2 by appends and truncation.
pub const DATA_FILES: u32 = 3;
/// The file whose words are mapped.
pub const MAPPED_FILE: &str = "mapped";
/// Pages of the mapped file.
pub const MAPPED_PAGES: u64 = 3;
/// The numbers of the words used: few, several in one page, none next to another.
pub const MAPPED_WORDS: [u64; 6] = [0, 1, 511, 512, 700, 1100];
/// Directories of the names family.
pub const DIRECTORIES: usize = 2;
/// Names in each of them.
pub const NAMES: usize = 4;
/// The file that is locked.
pub const LOCKED_FILE: &str = "locked";
/// Bytes of the locked file that one unit of the lock model stands for.
pub const LOCK_UNIT: u64 = 100;

/// What a client process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClientConfig {
    /// What to do.
    pub family: Family,
    /// Its number, from 0.
    pub client: u32,
    /// Clients in all.
    pub clients: u32,
    /// The number of its mount.
    pub mount: u32,
    /// The working directory through its mount.
    pub directory: PathBuf,
    /// Its own seed.
    pub seed: u64,
    /// How many calls to make.
    pub operations: u64,
    /// The longest read or write.
    pub max_io: u64,
    /// Whether sizes are asked for (local file systems show sizes in the middle of a write).
    pub stat: bool,
    /// Whether `fallocate` can punch holes here.
    pub punch: bool,
    /// Pretend that calls take up to so many microseconds longer, before and after.
    pub dilate: u64,
    /// How long a call may take before the run is declared stuck.
    pub stall_seconds: u64,
}

/// What a client process writes to its standard output, a line each.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Message {
    /// Files are open; the client waits for a line on its standard input.
    Ready,
    /// A call came back.
    Call(crate::history::Call),
    /// A call does not come back: what it is, and what the kernel says of the thread.
    Stalled { client: u32, mount: u32, call: String, seconds: u64, kernel: String },
    /// The client cannot work here at all.
    Unsupported(String),
    /// All calls are made.
    Finished,
}

/// Name number `slot` below the working directory.
pub fn slot_path(slot: usize) -> String {
    format!("d{}/n{}", slot / NAMES, slot % NAMES)
}
