//! Inodes, directory entries, xattrs and extents in an embedded transactional store
