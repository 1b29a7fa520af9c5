//! Advisory (fcntl and flock) lock table as a pure state machine
