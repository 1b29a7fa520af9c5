//! A node's storage: mapped memory allocated in extents
