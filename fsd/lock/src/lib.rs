//! The verbfs lock server and client as pure state machines
