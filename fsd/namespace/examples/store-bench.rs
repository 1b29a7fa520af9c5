//! Which embedded store? One commit per create (entry, inode, parent), look-ups, one commit per unlink,
//! memory with all files in place, and what is left after `kill -9`.
//!
//! ```text
//! cargo run --release -p verbfs-namespace --example store-bench -- [files] [directory]
//! ```
//! Every engine runs in a process of its own, so that its memory is its own.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use verbfs_namespace::{Entry, Store, StoreOptions, name_hash};
use verbfs_protocol::{Attributes, FileKind, Ino, Layout, Time};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const ENGINES: [&str; 6] = ["Store", "heed no-sync", "heed write-map", "redb durable", "redb no-sync", "fjall"];
/// Commits that sync take milliseconds: fewer files do.
const FILES_WHEN_SYNCING: u64 = 2000;
/// Commits before the process is killed.
const COMMITS_BEFORE_KILL: u64 = 3000;
const COMMITS_BEFORE_KILL_WHEN_SYNCING: u64 = 300;
/// Bytes of an inode record with a layout of eight slots.
const INODE_BYTES: usize = 120;

trait Engine {
    fn create(&mut self, file: u64) -> Result<()>;
    fn lookup(&mut self, file: u64) -> Result<bool>;
    fn unlink(&mut self, file: u64) -> Result<()>;
}

fn name(file: u64) -> Vec<u8> {
    format!("file-{file:08}.dat").into_bytes()
}

fn inode_key(file: u64) -> [u8; 8] {
    (file + 2).to_be_bytes()
}

fn entry_key(file: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&Ino::ROOT.0.to_be_bytes());
    key[8..].copy_from_slice(&name_hash(&name(file)).to_be_bytes());
    key
}

fn entry_value(file: u64) -> Vec<u8> {
    let mut value = vec![0; 12];
    value[..8].copy_from_slice(&(file + 2).to_le_bytes());
    value.extend(name(file));
    value
}

/// The crate itself, with its checks, counts and encoding.
struct Typed(Store);

fn attributes(ino: Ino, kind: FileKind, size: u64) -> Attributes {
    let time = Time { seconds: 1_700_000_000, nanoseconds: 1 };
    Attributes {
        ino,
        kind,
        mode: 0o644,
        uid: 1000,
        gid: 1000,
        nlink: 1,
        rdev: 0,
        size,
        pages: 0,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        truncate_generation: 0,
        layout: Layout { chunk_pages: 256, slots: (0..8).collect() },
        has_xattrs: false,
    }
}

impl Engine for Typed {
    fn create(&mut self, file: u64) -> Result<()> {
        Ok(self.0.write::<_, verbfs_namespace::Error>(|txn| {
            let ino = Ino(file + 2);
            txn.put_inode(&attributes(ino, FileKind::Regular, 0))?;
            txn.put_entry(Ino::ROOT, &name(file), Entry { ino, kind: FileKind::Regular })?;
            txn.put_inode(&attributes(Ino::ROOT, FileKind::Directory, file))
        })?)
    }
    fn lookup(&mut self, file: u64) -> Result<bool> {
        Ok(self.0.read::<_, verbfs_namespace::Error>(|txn| {
            let Some(entry) = txn.entry(Ino::ROOT, &name(file))? else { return Ok(false) };
            Ok(txn.inode(entry.ino)?.is_some())
        })?)
    }
    fn unlink(&mut self, file: u64) -> Result<()> {
        Ok(self.0.write::<_, verbfs_namespace::Error>(|txn| {
            let entry = txn.delete_entry(Ino::ROOT, &name(file))?.expect("created before");
            txn.delete_inode(entry.ino)?;
            txn.put_inode(&attributes(Ino::ROOT, FileKind::Directory, file))
        })?)
    }
}

struct Heed {
    env: heed::Env<heed::WithoutTls>,
    inodes: heed::Database<heed::types::Bytes, heed::types::Bytes>,
    entries: heed::Database<heed::types::Bytes, heed::types::Bytes>,
}

impl Heed {
    fn open(directory: &Path, flags: heed::EnvFlags) -> Result<Heed> {
        let mut options = heed::EnvOpenOptions::new().read_txn_without_tls();
        options.map_size(4 << 30).max_dbs(2);
        // SAFETY: a benchmark's own directory, opened once.
        let env = unsafe { options.flags(flags).open(directory)? };
        let mut txn = env.write_txn()?;
        let inodes = env.create_database(&mut txn, Some("inodes"))?;
        let entries = env.create_database(&mut txn, Some("entries"))?;
        txn.commit()?;
        Ok(Heed { env, inodes, entries })
    }
}

impl Engine for Heed {
    fn create(&mut self, file: u64) -> Result<()> {
        let mut txn = self.env.write_txn()?;
        self.inodes.put(&mut txn, &inode_key(file), &[1; INODE_BYTES])?;
        self.entries.put(&mut txn, &entry_key(file), &entry_value(file))?;
        self.inodes.put(&mut txn, &Ino::ROOT.0.to_be_bytes(), &[2; INODE_BYTES])?;
        Ok(txn.commit()?)
    }
    fn lookup(&mut self, file: u64) -> Result<bool> {
        let txn = self.env.read_txn()?;
        Ok(self.entries.get(&txn, &entry_key(file))?.is_some() && self.inodes.get(&txn, &inode_key(file))?.is_some())
    }
    fn unlink(&mut self, file: u64) -> Result<()> {
        let mut txn = self.env.write_txn()?;
        self.inodes.delete(&mut txn, &inode_key(file))?;
        self.entries.delete(&mut txn, &entry_key(file))?;
        self.inodes.put(&mut txn, &Ino::ROOT.0.to_be_bytes(), &[2; INODE_BYTES])?;
        Ok(txn.commit()?)
    }
}

const REDB_INODES: redb::TableDefinition<&[u8], &[u8]> = redb::TableDefinition::new("inodes");
const REDB_ENTRIES: redb::TableDefinition<&[u8], &[u8]> = redb::TableDefinition::new("entries");

struct Redb(redb::Database, redb::Durability);

impl Redb {
    fn open(directory: &Path, durability: redb::Durability) -> Result<Redb> {
        let database = redb::Database::create(directory.join("redb"))?;
        let txn = database.begin_write()?;
        txn.open_table(REDB_INODES)?;
        txn.open_table(REDB_ENTRIES)?;
        txn.commit()?;
        Ok(Redb(database, durability))
    }
    fn write(&self) -> Result<redb::WriteTransaction> {
        let mut txn = self.0.begin_write()?;
        txn.set_durability(self.1)?;
        Ok(txn)
    }
}

impl Engine for Redb {
    fn create(&mut self, file: u64) -> Result<()> {
        let txn = self.write()?;
        {
            let mut inodes = txn.open_table(REDB_INODES)?;
            inodes.insert(&inode_key(file)[..], &[1; INODE_BYTES][..])?;
            inodes.insert(&Ino::ROOT.0.to_be_bytes()[..], &[2; INODE_BYTES][..])?;
            txn.open_table(REDB_ENTRIES)?.insert(&entry_key(file)[..], &entry_value(file)[..])?;
        }
        Ok(txn.commit()?)
    }
    fn lookup(&mut self, file: u64) -> Result<bool> {
        use redb::ReadableDatabase;
        let txn = self.0.begin_read()?;
        Ok(txn.open_table(REDB_ENTRIES)?.get(&entry_key(file)[..])?.is_some()
            && txn.open_table(REDB_INODES)?.get(&inode_key(file)[..])?.is_some())
    }
    fn unlink(&mut self, file: u64) -> Result<()> {
        let txn = self.write()?;
        {
            let mut inodes = txn.open_table(REDB_INODES)?;
            inodes.remove(&inode_key(file)[..])?;
            inodes.insert(&Ino::ROOT.0.to_be_bytes()[..], &[2; INODE_BYTES][..])?;
            txn.open_table(REDB_ENTRIES)?.remove(&entry_key(file)[..])?;
        }
        Ok(txn.commit()?)
    }
}

struct Fjall {
    database: fjall::Database,
    inodes: fjall::Keyspace,
    entries: fjall::Keyspace,
}

impl Fjall {
    fn open(directory: &Path) -> Result<Fjall> {
        let database = fjall::Database::builder(directory.join("fjall")).open()?;
        let inodes = database.keyspace("inodes", fjall::KeyspaceCreateOptions::default)?;
        let entries = database.keyspace("entries", fjall::KeyspaceCreateOptions::default)?;
        Ok(Fjall { database, inodes, entries })
    }
}

impl Engine for Fjall {
    fn create(&mut self, file: u64) -> Result<()> {
        let mut batch = self.database.batch().durability(Some(fjall::PersistMode::Buffer));
        batch.insert(&self.inodes, inode_key(file), [1; INODE_BYTES]);
        batch.insert(&self.entries, entry_key(file), entry_value(file));
        batch.insert(&self.inodes, Ino::ROOT.0.to_be_bytes(), [2; INODE_BYTES]);
        Ok(batch.commit()?)
    }
    fn lookup(&mut self, file: u64) -> Result<bool> {
        Ok(self.entries.get(entry_key(file))?.is_some() && self.inodes.get(inode_key(file))?.is_some())
    }
    fn unlink(&mut self, file: u64) -> Result<()> {
        let mut batch = self.database.batch().durability(Some(fjall::PersistMode::Buffer));
        batch.remove(&self.inodes, inode_key(file));
        batch.remove(&self.entries, entry_key(file));
        batch.insert(&self.inodes, Ino::ROOT.0.to_be_bytes(), [2; INODE_BYTES]);
        Ok(batch.commit()?)
    }
}

fn open(engine: &str, directory: &Path) -> Result<Box<dyn Engine>> {
    use heed::EnvFlags;
    Ok(match engine {
        "Store" => Box::new(Typed(Store::open(directory, StoreOptions::default())?)),
        "heed no-sync" => Box::new(Heed::open(directory, EnvFlags::NO_SYNC)?),
        "heed write-map" => Box::new(Heed::open(directory, EnvFlags::NO_SYNC | EnvFlags::WRITE_MAP)?),
        "redb durable" => Box::new(Redb::open(directory, redb::Durability::Immediate)?),
        "redb no-sync" => Box::new(Redb::open(directory, redb::Durability::None)?),
        "fjall" => Box::new(Fjall::open(directory)?),
        _ => return Err(format!("no engine {engine}").into()),
    })
}

/// Calls `each` with 0..count in an order that jumps about, and returns mean and 99th percentile in microseconds.
fn measure(count: u64, scattered: bool, mut each: impl FnMut(u64) -> Result<()>) -> Result<(f64, f64)> {
    // Coprime to every count that is not its multiple: visits each file once.
    const STEP: u64 = 1_000_003;
    let mut nanoseconds = Vec::with_capacity(count as usize);
    for number in 0..count {
        let file = if scattered { (number as u128 * STEP as u128 % count as u128) as u64 } else { number };
        let start = Instant::now();
        each(file)?;
        nanoseconds.push(start.elapsed().as_nanos() as u64);
    }
    let mean = nanoseconds.iter().sum::<u64>() as f64 / count as f64;
    nanoseconds.sort_unstable();
    Ok((mean / 1e3, nanoseconds[(count * 99 / 100) as usize] as f64 / 1e3))
}

fn memory(field: &str) -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field)).ok_or("no such field")?;
    Ok(line.split_whitespace().nth(1).ok_or("no value")?.parse::<f64>()? / 1024.0)
}

fn disk_megabytes(directory: &Path) -> Result<f64> {
    use std::os::unix::fs::MetadataExt;
    let mut blocks = 0;
    let mut open = vec![directory.to_path_buf()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                open.push(entry.path());
            }
            blocks += entry.metadata()?.blocks();
        }
    }
    Ok(blocks as f64 * 512.0 / 1e6)
}

fn run(engine: &str, directory: &Path, files: u64) -> Result<()> {
    let mut store = open(engine, directory)?;
    let create = measure(files, false, |file| store.create(file))?;
    let lookup = measure(files, true, |file| if store.lookup(file)? { Ok(()) } else { Err("file lost".into()) })?;
    let (anonymous, mapped) = (memory("RssAnon")?, memory("RssFile")?);
    let disk = disk_megabytes(directory)?;
    let unlink = measure(files / 10, true, |file| store.unlink(file))?;
    println!(
        "{engine:15} {files:>8} {:>8.1} {:>8.1} {:>8.2} {:>8.2} {:>8.1} {anonymous:>9.0} {mapped:>9.0} {disk:>8.0}",
        create.0, create.1, lookup.0, lookup.1, unlink.0
    );
    std::io::stdout().flush()?;
    // No orderly close: that would sync.
    std::process::exit(0)
}

/// Creates files for ever and reports each once its commit has returned.
fn create_until_killed(engine: &str, directory: &Path) -> Result<()> {
    let mut store = open(engine, directory)?;
    let mut out = std::io::stdout().lock();
    for file in 0.. {
        store.create(file)?;
        writeln!(out, "{file}")?;
    }
    Ok(())
}

/// Commits acknowledged, and how many of them are gone.
fn kill(engine: &str, directory: &Path, commits: u64) -> Result<(u64, u64)> {
    let mut child =
        Command::new(std::env::current_exe()?).args(["kill", engine]).arg(directory).stdout(Stdio::piped()).spawn()?;
    let mut acknowledged = 0;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no pipe")?).lines();
    while acknowledged < commits
        && let Some(line) = lines.next()
    {
        acknowledged = line?.parse::<u64>()? + 1;
    }
    child.kill()?;
    child.wait()?;
    for line in lines {
        // A line may be cut short by the kill.
        acknowledged = acknowledged.max(line?.parse::<u64>().map_or(0, |file| file + 1).min(acknowledged + 1));
    }
    let mut store = open(engine, directory)?;
    let mut lost = 0;
    for file in 0..acknowledged {
        lost += u64::from(!store.lookup(file)?);
    }
    Ok((acknowledged, lost))
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["run", engine, directory, files] => return run(engine, Path::new(directory), files.parse()?),
        ["kill", engine, directory] => return create_until_killed(engine, Path::new(directory)),
        _ => {}
    }
    let files: u64 = arguments.first().map_or(Ok(1_000_000), |files| files.parse())?;
    let base = arguments.get(1).map_or_else(std::env::temp_dir, PathBuf::from);
    println!("                            create us         lookup us       unlink  memory, MB          disk");
    println!("engine             files     mean      p99     mean      p99     mean      heap    mapped       MB");
    for engine in ENGINES {
        let directory = tempfile::tempdir_in(&base)?;
        let files = if engine == "redb durable" { FILES_WHEN_SYNCING.min(files) } else { files };
        Command::new(std::env::current_exe()?)
            .args(["run", engine])
            .arg(directory.path())
            .arg(files.to_string())
            .status()?;
    }
    println!("\nafter kill -9: commits acknowledged, lost");
    for engine in ENGINES {
        let directory = tempfile::tempdir_in(&base)?;
        let commits = if engine == "redb durable" { COMMITS_BEFORE_KILL_WHEN_SYNCING } else { COMMITS_BEFORE_KILL };
        match kill(engine, directory.path(), commits) {
            Ok((acknowledged, lost)) => println!("{engine:15} {acknowledged:>8} {lost:>8}"),
            Err(error) => println!("{engine:15} {error}"),
        }
    }
    Ok(())
}
