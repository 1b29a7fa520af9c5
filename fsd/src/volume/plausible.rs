//! What a peer's word can be, beyond what its encoding already rules out. Arithmetic on what passes does not overflow.

use super::*;

/// Pages from and up to which ranges are counted in bytes.
const PAGES_MAX: u64 = u64::MAX / PAGE_SIZE;

/// Attributes of an inode.
pub(super) fn attributes(attributes: &Attributes) -> bool {
    attributes.size <= i64::MAX as u64 && attributes.pages <= PAGES_MAX && attributes.truncate_generation < u64::MAX / 2
}

/// Attributes that a node of this slot, as their home, may speak of.
pub(super) fn attributes_of(home: Slot, found: &Attributes) -> bool {
    found.ino.home() == home && attributes(found)
}

/// What a holder changed.
pub(super) fn report(report: &AttributeReport) -> bool {
    report.size <= i64::MAX as u64
        && report.pages_delta.unsigned_abs() <= PAGES_MAX
        && report.truncations <= u32::MAX as u64
}

/// The answer to a question for the extents of `range`: within it, in order, none twice.
pub(super) fn extents(range: Range, extents: &[Extent]) -> bool {
    let mut behind = range.lo;
    extents.iter().all(|extent| {
        let fits = extent.page >= behind
            && extent.pages > 0
            && extent.page.checked_add(extent.pages).is_some_and(|end| end <= range.hi)
            && extent.arena_page.checked_add(extent.pages).is_some_and(|end| end <= PAGES_MAX);
        behind = extent.page.saturating_add(extent.pages);
        fits
    })
}

/// An extended attribute's name and value.
pub(super) fn xattr(name: &[u8], value: &[u8]) -> bool {
    !name.is_empty() && name.len() <= NAME_MAX && !name.contains(&0) && value.len() <= XATTR_VALUE_MAX
}

/// What a coordinator may ask this home to prepare.
pub(super) fn update(update: &Update) -> bool {
    match update {
        Update::PutEntry { name, .. } | Update::DeleteEntry { name, .. } => names::check_name(name).is_ok(),
        Update::Touch { entries, links, .. } => entries.unsigned_abs() <= 1 && links.unsigned_abs() <= 1,
        Update::CreateInode { attributes: new, target, parent, xattrs } => {
            attributes(new)
                && target.is_empty() == (new.kind != FileKind::Symlink)
                && target.len() <= SYMLINK_MAX
                && parent.is_some() == (new.kind == FileKind::Directory)
                && xattrs.iter().all(|(name, value)| xattr(name, value))
        }
        Update::Links { delta, .. } => delta.unsigned_abs() == 1,
        Update::RemoveDirectory { .. } | Update::Moved { .. } => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_lie_in_their_range_in_order() {
        let extent = |page, arena_page, pages| Extent { page, arena_page, pages, committed: true };
        let range = Range::new(10, 20);
        assert!(extents(range, &[]));
        assert!(extents(range, &[extent(10, 0, 3), extent(13, 90, 7)]));
        for wrong in [
            vec![extent(9, 0, 3)],
            vec![extent(19, 0, 2)],
            vec![extent(12, 0, 0)],
            vec![extent(12, 0, 3), extent(14, 0, 1)],
            vec![extent(12, 0, 3), extent(10, 0, 1)],
            vec![extent(12, 0, u64::MAX)],
            vec![extent(12, u64::MAX, 1)],
            vec![extent(12, PAGES_MAX, 1)],
        ] {
            assert!(!extents(range, &wrong), "{wrong:?}");
        }
    }

    #[test]
    fn reports_do_not_overflow_what_they_are_added_to() {
        let lawful = AttributeReport { size: 1 << 40, pages_delta: -4, truncations: 2, ..Default::default() };
        assert!(report(&lawful));
        assert!(!report(&AttributeReport { size: u64::MAX, ..lawful }));
        assert!(!report(&AttributeReport { pages_delta: i64::MIN, ..lawful }));
        assert!(!report(&AttributeReport { truncations: u64::MAX, ..lawful }));
    }

    #[test]
    fn updates_have_names_that_can_be() {
        let entry = |name: &[u8]| Update::DeleteEntry { directory: Ino::ROOT, name: name.to_vec() };
        assert!(update(&entry(b"name")));
        for name in [&b""[..], b"..", b"a/b", b"a\0b", &[b'x'; NAME_MAX + 1]] {
            assert!(!update(&entry(name)));
        }
        assert!(!update(&Update::Links { ino: Ino::ROOT, delta: i64::MIN, time: Time::default() }));
    }
}
