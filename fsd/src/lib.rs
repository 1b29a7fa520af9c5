//! The verbfs daemon as a library: see docs/architecture.md for the rooms and what leads where.

pub mod acl;
pub mod cache;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod demo;
pub mod errno;
pub mod executor;
pub mod fabric;
pub mod frontend;
pub mod metrics;
pub mod node;
pub mod ranges;
pub mod softroce;
pub mod topology;
pub mod transport;
pub mod volume;
