//! The verbfs daemon and command line
