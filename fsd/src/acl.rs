//! POSIX access control lists: the arithmetic of acl(5), without any I/O.
//!
//! The kernel checks permissions (the mounts run with `default_permissions` and
//! `FUSE_POSIX_ACL`); what is left to a file system is to keep lists and mode bits in step:
//!
//! | when | what | here |
//! |---|---|---|
//! | `setxattr("system.posix_acl_access")` | the mode follows the list; a list that says no more than a mode is not stored | [`Acl::stored_as`] |
//! | `chmod` | the list follows the mode | [`Acl::chmod`] |
//! | a new inode | the parent's default list replaces the umask | [`inherit`] |
//!
//! The bytes are those of the extended attributes `system.posix_acl_access` and
//! `system.posix_acl_default`, version 2, little endian:
//! ```text
//! 0  u32  version = 2
//! 4  entries of 8 bytes:  u16 tag, u16 permissions, u32 user or group (else 2^32 - 1)
//! ```

/// The extended attribute that holds the list that decides access.
pub const ACCESS_XATTR: &[u8] = b"system.posix_acl_access";
/// The extended attribute of a directory that holds what its new children inherit.
pub const DEFAULT_XATTR: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const HEADER_BYTES: usize = 4;
const ENTRY_BYTES: usize = 8;
/// What stands in the place of a user or group where the tag names none.
const UNDEFINED_ID: u32 = u32::MAX;

const TAG_USER_OBJECT: u16 = 0x01;
const TAG_USER: u16 = 0x02;
const TAG_GROUP_OBJECT: u16 = 0x04;
const TAG_GROUP: u16 = 0x08;
const TAG_MASK: u16 = 0x10;
const TAG_OTHER: u16 = 0x20;

/// Why bytes are not a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AclError {
    /// Another version than 2: `EOPNOTSUPP`.
    Version,
    /// Not a list as acl(5) defines validity: `EINVAL`.
    Invalid,
}

impl AclError {
    /// The error number that setxattr(2) reports.
    pub fn errno(self) -> i32 {
        match self {
            AclError::Version => libc::EOPNOTSUPP,
            AclError::Invalid => libc::EINVAL,
        }
    }
}

/// A valid list: exactly one entry for the owner, the owning group and others, and a
/// mask where there are named users or groups (acl(5), "VALID ACLS").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl {
    /// Permissions of the owner, `0 ..= 7`.
    owner: u8,
    /// Named users in the order in which they were given.
    users: Vec<(u32, u8)>,
    /// Permissions of the owning group.
    group: u8,
    /// Named groups in the order in which they were given.
    groups: Vec<(u32, u8)>,
    /// What named users, the owning group and named groups get at most.
    mask: Option<u8>,
    /// Permissions of all others.
    other: u8,
}

impl Acl {
    /// The list that says what the permission bits of `mode` say (acl(5), "minimal ACL").
    pub fn from_mode(mode: u32) -> Acl {
        Acl {
            owner: bits(mode, 6),
            users: Vec::new(),
            group: bits(mode, 3),
            groups: Vec::new(),
            mask: None,
            other: bits(mode, 0),
        }
    }

    /// Reads the value of an extended attribute. `Ok(None)` is the list without entries, which
    /// setxattr(2) takes as "remove the list". Accepts exactly what the kernel's
    /// `posix_acl_from_xattr` and `posix_acl_valid` accept: entries in the order owner, users, group,
    /// groups, mask, others.
    pub fn parse(bytes: &[u8]) -> Result<Option<Acl>, AclError> {
        let (version, entries) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(AclError::Invalid)?;
        if u32::from_le_bytes(*version) != VERSION {
            return Err(AclError::Version);
        }
        if !entries.len().is_multiple_of(ENTRY_BYTES) {
            return Err(AclError::Invalid);
        }
        if entries.is_empty() {
            return Ok(None);
        }
        let (mut owner, mut group, mut mask, mut other) = (None, None, None, None);
        let (mut users, mut groups) = (Vec::new(), Vec::new());
        for entry in entries.chunks_exact(ENTRY_BYTES) {
            let tag = u16::from_le_bytes([entry[0], entry[1]]);
            let permissions = u16::from_le_bytes([entry[2], entry[3]]);
            let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
            if permissions > 7 {
                return Err(AclError::Invalid);
            }
            let permissions = permissions as u8;
            let slot = match tag {
                TAG_USER_OBJECT if owner.is_none() => &mut owner,
                TAG_USER if owner.is_some() && group.is_none() && id != UNDEFINED_ID => {
                    users.push((id, permissions));
                    continue;
                }
                TAG_GROUP_OBJECT if owner.is_some() && group.is_none() => &mut group,
                TAG_GROUP if group.is_some() && mask.is_none() && other.is_none() && id != UNDEFINED_ID => {
                    groups.push((id, permissions));
                    continue;
                }
                TAG_MASK if group.is_some() && mask.is_none() && other.is_none() => &mut mask,
                TAG_OTHER if group.is_some() && other.is_none() => &mut other,
                _ => return Err(AclError::Invalid),
            };
            *slot = Some(permissions);
        }
        let (Some(owner), Some(group), Some(other)) = (owner, group, other) else {
            return Err(AclError::Invalid);
        };
        if mask.is_none() && !(users.is_empty() && groups.is_empty()) {
            return Err(AclError::Invalid);
        }
        Ok(Some(Acl { owner, users, group, groups, mask, other }))
    }

    /// The value of the extended attribute.
    pub fn serialise(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        let mut put = |tag: u16, permissions: u8, id: u32| {
            bytes.extend_from_slice(&tag.to_le_bytes());
            bytes.extend_from_slice(&u16::from(permissions).to_le_bytes());
            bytes.extend_from_slice(&id.to_le_bytes());
        };
        put(TAG_USER_OBJECT, self.owner, UNDEFINED_ID);
        self.users.iter().for_each(|&(id, permissions)| put(TAG_USER, permissions, id));
        put(TAG_GROUP_OBJECT, self.group, UNDEFINED_ID);
        self.groups.iter().for_each(|&(id, permissions)| put(TAG_GROUP, permissions, id));
        if let Some(mask) = self.mask {
            put(TAG_MASK, mask, UNDEFINED_ID);
        }
        put(TAG_OTHER, self.other, UNDEFINED_ID);
        bytes
    }

    /// Whether nine mode bits say the same (acl(5), "CORRESPONDENCE BETWEEN ACL ENTRIES AND FILE PERMISSION BITS").
    pub fn is_mode(&self) -> bool {
        self.mask.is_none() && self.users.is_empty() && self.groups.is_empty()
    }

    /// `mode` with its nine permission bits replaced by what stat(2) shows for this list: the
    /// group bits are the mask where there is one.
    pub fn mode(&self, mode: u32) -> u32 {
        mode & !0o777
            | u32::from(self.owner) << 6
            | u32::from(self.mask.unwrap_or(self.group)) << 3
            | u32::from(self.other)
    }

    /// What setxattr of an access list makes of an inode of this `mode`: its new mode, and the list
    /// to store, or `None` where the mode says it all. (The set-group-id bit is the caller's business.)
    pub fn stored_as(self, mode: u32) -> (u32, Option<Acl>) {
        let mode = self.mode(mode);
        (mode, if self.is_mode() { None } else { Some(self) })
    }

    /// The list after chmod(2) to `mode`: owner and others follow, and so does the mask, or where
    /// there is none the owning group.
    pub fn chmod(mut self, mode: u32) -> Acl {
        self.owner = bits(mode, 6);
        self.other = bits(mode, 0);
        match &mut self.mask {
            Some(mask) => *mask = bits(mode, 3),
            None => self.group = bits(mode, 3),
        }
        self
    }
}

/// What a new inode gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inherited {
    /// Mode bits, set-id and sticky bits as asked.
    pub mode: u32,
    /// Access list to store.
    pub access: Option<Acl>,
    /// Default list to store: only on directories.
    pub default: Option<Acl>,
}

/// The mode and lists of a new inode (acl(5), "OBJECT CREATION AND DEFAULT ACLS"): the intersection
/// of the parent's default list with the mode asked for; without one, the mode less `umask`.
/// Not for symbolic links, which have neither.
pub fn inherit(default: Option<&Acl>, mode: u32, umask: u32, is_directory: bool) -> Inherited {
    let Some(default) = default else {
        return Inherited { mode: mode & !(umask & 0o777), access: None, default: None };
    };
    let mut access = default.clone();
    access.owner &= bits(mode, 6);
    access.other &= bits(mode, 0);
    match &mut access.mask {
        Some(mask) => *mask &= bits(mode, 3),
        None => access.group &= bits(mode, 3),
    }
    let (mode, access) = access.stored_as(mode);
    Inherited { mode, access, default: is_directory.then(|| default.clone()) }
}

/// Three permission bits of a mode.
fn bits(mode: u32, shift: u32) -> u8 {
    (mode >> shift & 7) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn raw(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0];
        for &(tag, permissions, id) in entries {
            bytes.extend_from_slice(&tag.to_le_bytes());
            bytes.extend_from_slice(&permissions.to_le_bytes());
            bytes.extend_from_slice(&id.to_le_bytes());
        }
        bytes
    }

    fn any_acl() -> impl Strategy<Value = Acl> {
        let named = || prop::collection::vec((0..UNDEFINED_ID, 0u8..8), 0..4);
        (0u8..8, named(), 0u8..8, named(), prop::option::of(0u8..8), 0u8..8).prop_map(
            |(owner, users, group, groups, mask, other)| {
                let mask = if users.is_empty() && groups.is_empty() { mask } else { Some(mask.unwrap_or(7)) };
                Acl { owner, users, group, groups, mask, other }
            },
        )
    }

    /// The kernel's `posix_acl_valid`, written as its state machine: the reference of `parse`.
    fn kernel_accepts(entries: &[(u16, u16, u32)]) -> bool {
        let (mut state, mut needs_mask) = (TAG_USER_OBJECT, false);
        for &(tag, permissions, id) in entries {
            if permissions & !7 != 0 {
                return false;
            }
            state = match (tag, state) {
                (TAG_USER_OBJECT, TAG_USER_OBJECT) => TAG_USER,
                (TAG_USER, TAG_USER) | (TAG_GROUP, TAG_GROUP) if id != UNDEFINED_ID => {
                    needs_mask = true;
                    state
                }
                (TAG_GROUP_OBJECT, TAG_USER) => TAG_GROUP,
                (TAG_MASK, TAG_GROUP) => TAG_OTHER,
                (TAG_OTHER, TAG_OTHER) => 0,
                (TAG_OTHER, TAG_GROUP) if !needs_mask => 0,
                _ => return false,
            }
        }
        state == 0
    }

    #[test]
    fn malformed_values_are_refused_as_by_the_kernel() {
        assert_eq!(Acl::parse(&[]), Err(AclError::Invalid));
        assert_eq!(Acl::parse(&[2, 0, 0]), Err(AclError::Invalid));
        assert_eq!(Acl::parse(&[1, 0, 0, 0]), Err(AclError::Version));
        assert_eq!(Acl::parse(&[2, 0, 0, 0]), Ok(None));
        assert_eq!(Acl::parse(&[2, 0, 0, 0, 1]), Err(AclError::Invalid));
        // A named user without a mask.
        let named = [
            (TAG_USER_OBJECT, 7, UNDEFINED_ID),
            (TAG_USER, 7, 5),
            (TAG_GROUP_OBJECT, 5, UNDEFINED_ID),
            (TAG_OTHER, 0, UNDEFINED_ID),
        ];
        assert_eq!(Acl::parse(&raw(&named)), Err(AclError::Invalid));
    }

    #[test]
    fn the_example_of_a_default_list_with_a_mask() {
        // user::rwx user:5:rwx group::r-x mask::rwx other::r-x, open(..., 0640) under umask 077.
        let default = Acl { owner: 7, users: vec![(5, 7)], group: 5, groups: vec![], mask: Some(7), other: 5 };
        let file = inherit(Some(&default), 0o640, 0o077, false);
        assert_eq!(file.mode, 0o640);
        assert_eq!(file.access, Some(Acl { owner: 6, mask: Some(4), other: 0, ..default.clone() }));
        assert_eq!(file.default, None);
        let directory = inherit(Some(&default), 0o2777, 0o077, true);
        assert_eq!((directory.mode, directory.default.as_ref()), (0o2775, Some(&default)));
    }

    #[test]
    fn a_minimal_default_list_stores_nothing_on_files() {
        let file = inherit(Some(&Acl::from_mode(0o750)), 0o666, 0o777, false);
        assert_eq!(file, Inherited { mode: 0o640, access: None, default: None });
    }

    #[test]
    fn without_a_default_list_the_umask_counts() {
        assert_eq!(inherit(None, 0o4777, 0o022, true), Inherited { mode: 0o4755, access: None, default: None });
    }

    proptest! {
        #[test]
        fn bytes_round_trip(acl in any_acl()) {
            prop_assert_eq!(Acl::parse(&acl.serialise()), Ok(Some(acl)));
        }

        #[test]
        fn parse_accepts_what_the_kernel_accepts(
            entries in prop::collection::vec((prop::sample::select(vec![1u16, 2, 4, 8, 16, 32, 64]), 0u16..9, prop::sample::select(vec![0, 7, UNDEFINED_ID])), 1..7)
        ) {
            prop_assert_eq!(Acl::parse(&raw(&entries)).is_ok(), kernel_accepts(&entries));
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = Acl::parse(&bytes);
        }

        #[test]
        fn chmod_shows_in_the_mode(acl in any_acl(), mode in 0u32..0o10000) {
            prop_assert_eq!(acl.chmod(mode).mode(mode), mode);
        }

        #[test]
        fn chmod_to_the_shown_mode_changes_nothing(acl in any_acl()) {
            let mode = acl.mode(0);
            prop_assert_eq!(acl.clone().chmod(mode), acl);
        }

        #[test]
        fn an_inherited_mode_grants_no_more_than_asked_or_than_the_default(acl in any_acl(), mode in 0u32..0o10000, umask in 0u32..0o1000) {
            let new = inherit(Some(&acl), mode, umask, true);
            prop_assert_eq!(new.mode & !mode, 0);
            prop_assert_eq!(new.mode & 0o777 & !acl.mode(0), 0);
            prop_assert_eq!(new.mode & 0o7000, mode & 0o7000);
            match &new.access {
                Some(access) => prop_assert_eq!(access.mode(new.mode), new.mode),
                None => prop_assert!(acl.is_mode()),
            }
        }
    }
}
