//! Test tools that see a file system only as mounted directories.
//!
//! Nothing here knows verbfs: every tool takes directories (`--mount A --mount B ...`) that show one and the same tree,
//! and judges only what system calls return. Passing one local directory several times is therefore legal, and is how the
//! tools themselves are tried.
//!
//! | module | promise |
//! |---|---|
//! | [`mounts`] | a fresh working directory, seen through every mount, removed afterwards |
//! | [`rng`] | one seed, same choices |
//! | [`clock`] | one clock for all processes of this host, and of virtual machines on it |
//! | [`history`] | calls with start and end, saved and read back |
//! | [`meeting`] | processes of several machines take part in one run |
//! | [`linearize`] | accepts a history if and only if some order of instants explains it |
//! | [`model`] | what files, names, words and locks may do, one step at a time |
//! | [`coherence`] | concurrent client processes that record histories |
//! | [`pattern`] | file contents in which every word tells who wrote it, and where |
//! | [`progress`] | long work shows that it lives |
//! | [`watchdog`] | a call that does not come back is reported |
//! | [`sys`] | the few system calls that `rustix` and `nix` do not wrap |
//!
//! The binaries `verbfs-coherence`, `verbfs-exerciser`, `verbfs-namespace-exerciser` and `verbfs-posix` explain
//! themselves at the top of their main files; `verbfs-vm-clock` tries the clock that virtual machines share.

pub mod clock;
pub mod coherence;
pub mod history;
pub mod linearize;
pub mod meeting;
pub mod model;
pub mod mounts;
pub mod pattern;
pub mod progress;
pub mod rng;
pub mod sys;
pub mod watchdog;
