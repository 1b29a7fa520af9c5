//! The daemon's page cache: slots of one page each in one registered region.
//!
//! A page of a file is in at most one slot. What may be done with it is decided by locks, not here:
//! this table knows which slot holds which page, whether its bytes are newer than storage (*dirty*),
//! being sent (*write-back*), being fetched, or kept for a successor (*transit*).
//!
//! Replacement is CLOCK (Corbató, "A paging experiment with the Multics system", 1968) over clean pages.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use verbfs_protocol::{Ino, PAGE_SIZE, Range};

/// Where the bytes of the slots are.
pub trait CacheMemory: Send {
    /// Start of the memory; valid, writable and at a fixed place as long as `self` lives.
    fn base(&self) -> *mut u8;
    /// Bytes.
    fn length(&self) -> usize;
}

/// Memory of this process that nobody else sees; for a volume of one node.
pub struct PrivateMemory(memmap2::MmapMut);

impl PrivateMemory {
    pub fn new(length: usize) -> std::io::Result<PrivateMemory> {
        memmap2::MmapMut::map_anon(length).map(PrivateMemory)
    }
}

impl CacheMemory for PrivateMemory {
    fn base(&self) -> *mut u8 {
        self.0.as_ptr() as *mut u8
    }
    fn length(&self) -> usize {
        self.0.len()
    }
}

/// A slot of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotIndex(u32);

impl SlotIndex {
    /// Byte offset of the slot in the region.
    pub fn offset(self) -> usize {
        self.0 as usize * PAGE_SIZE as usize
    }
    /// The slot `count` places on.
    pub fn plus(self, count: usize) -> SlotIndex {
        SlotIndex(self.0 + count as u32)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// Reserved for a page whose bytes are on their way.
    Fetching,
    Ready,
    /// Of no page any more, while a one-sided operation may still read or write its bytes: free when that has ended.
    Orphan,
}

#[derive(Clone, Copy, Debug)]
struct SlotInfo {
    ino: Ino,
    page: u64,
    state: State,
    dirty: bool,
    write_back: bool,
    transit: bool,
    /// Was dirty when it was put aside for a successor.
    transit_dirty: bool,
    referenced: bool,
}

const FREE: SlotInfo = SlotInfo {
    ino: Ino(0),
    page: 0,
    state: State::Free,
    dirty: false,
    write_back: false,
    transit: false,
    transit_dirty: false,
    referenced: false,
};

/// How a page stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    Absent,
    Fetching,
    Ready(SlotIndex),
}

pub struct PageCache {
    memory: Box<dyn CacheMemory>,
    slots: Vec<SlotInfo>,
    free: Vec<u32>,
    hand: usize,
    files: HashMap<Ino, BTreeMap<u64, u32>>,
    dirty: HashMap<Ino, BTreeSet<u64>>,
    dirty_pages: usize,
    writing_pages: usize,
    evictions: u64,
}

impl PageCache {
    pub fn new(memory: Box<dyn CacheMemory>) -> PageCache {
        let count = memory.length() / PAGE_SIZE as usize;
        PageCache {
            memory,
            slots: vec![FREE; count],
            free: (0..count as u32).rev().collect(),
            hand: 0,
            files: HashMap::new(),
            dirty: HashMap::new(),
            dirty_pages: 0,
            writing_pages: 0,
            evictions: 0,
        }
    }

    /// Slots in all.
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }
    pub fn used(&self) -> usize {
        self.slots.len() - self.free.len()
    }
    pub fn dirty_pages(&self) -> usize {
        self.dirty_pages
    }
    /// Clean pages dropped to make room, ever.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }
    /// Pages under write-back.
    pub fn writing_pages(&self) -> usize {
        self.writing_pages
    }

    pub fn presence(&self, ino: Ino, page: u64) -> Presence {
        match self.files.get(&ino).and_then(|pages| pages.get(&page)) {
            None => Presence::Absent,
            Some(&index) => match self.slots[index as usize].state {
                State::Ready => Presence::Ready(SlotIndex(index)),
                State::Fetching => Presence::Fetching,
                State::Free | State::Orphan => unreachable!("such a slot is of no page"),
            },
        }
    }

    /// Bytes of a page. The reference is to memory that peers may read one-sided at any time and that only
    /// this process writes; page copies happen inside the core, where no fetch into a Ready slot is under way.
    pub fn bytes(&mut self, slot: SlotIndex) -> &mut [u8] {
        self.slots[slot.0 as usize].referenced = true;
        // SAFETY: the slot lies within the memory (its index came from this table), the memory lives as long
        // as self, and &mut self makes this the only reference in this process: fetches write only into
        // slots in state Fetching, for which no caller holds a SlotIndex but the one that reserved it.
        unsafe { std::slice::from_raw_parts_mut(self.memory.base().add(slot.offset()), PAGE_SIZE as usize) }
    }

    /// Takes a slot for a page that is absent, evicting a clean page if need be. `None`: everything is dirty,
    /// in flight or fetching; the caller has pages written back and tries again.
    fn take_slot(&mut self) -> Option<u32> {
        if let Some(index) = self.free.pop() {
            return Some(index);
        }
        // Twice round: the first pass clears the reference bits.
        for _ in 0..2 * self.slots.len() {
            let index = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let info = &mut self.slots[index];
            if info.state != State::Ready || info.dirty || info.write_back || info.transit {
                continue;
            }
            if info.referenced {
                info.referenced = false;
                continue;
            }
            let (ino, page) = (info.ino, info.page);
            self.forget(ino, page);
            self.evictions += 1;
            return self.free.pop();
        }
        None
    }

    fn place(&mut self, ino: Ino, page: u64, state: State) -> Option<SlotIndex> {
        debug_assert_eq!(self.presence(ino, page), Presence::Absent);
        let index = self.take_slot()?;
        self.slots[index as usize] = SlotInfo { ino, page, state, referenced: true, ..FREE };
        self.files.entry(ino).or_default().insert(page, index);
        Some(SlotIndex(index))
    }

    /// A slot for a page whose bytes will be fetched into it; [`PageCache::fetched`] or [`PageCache::abandon`] must follow, once
    /// no operation writes into it any more.
    pub fn reserve(&mut self, ino: Ino, page: u64) -> Option<SlotIndex> {
        self.place(ino, page, State::Fetching)
    }

    /// A slot whose bytes the caller writes in full before anything else happens.
    pub fn insert(&mut self, ino: Ino, page: u64) -> Option<SlotIndex> {
        self.place(ino, page, State::Ready)
    }

    /// The bytes of a reserved slot are there. `false`: its page was dropped meanwhile, and the slot is free now.
    pub fn fetched(&mut self, slot: SlotIndex) -> bool {
        let info = &mut self.slots[slot.0 as usize];
        if info.state == State::Orphan {
            self.release_slot(slot.0);
            return false;
        }
        debug_assert_eq!(info.state, State::Fetching);
        info.state = State::Ready;
        true
    }

    /// The bytes of a reserved slot will not come.
    pub fn abandon(&mut self, slot: SlotIndex) {
        let SlotInfo { ino, page, state, .. } = self.slots[slot.0 as usize];
        debug_assert!(matches!(state, State::Fetching | State::Orphan));
        if state == State::Fetching {
            self.unmap(ino, page);
        }
        self.release_slot(slot.0);
    }

    pub fn mark_dirty(&mut self, slot: SlotIndex) {
        let info = &mut self.slots[slot.0 as usize];
        debug_assert_eq!(info.state, State::Ready);
        // In transit it may be: who passes a fence writes to what is kept for a successor. The fence is not given up then, and
        // end_transit follows.
        info.referenced = true;
        if !info.dirty {
            info.dirty = true;
            self.dirty.entry(info.ino).or_default().insert(info.page);
            self.dirty_pages += 1;
        }
    }

    pub fn is_dirty(&self, slot: SlotIndex) -> bool {
        self.slots[slot.0 as usize].dirty
    }

    fn clear_dirty(&mut self, index: u32) {
        let info = &mut self.slots[index as usize];
        if info.dirty {
            info.dirty = false;
            self.dirty_pages -= 1;
            if let Some(pages) = self.dirty.get_mut(&info.ino) {
                pages.remove(&info.page);
                if pages.is_empty() {
                    self.dirty.remove(&info.ino);
                }
            }
        }
    }

    /// The page is about to be sent: clean from here on unless written again. Its slot stays until [`PageCache::end_write_back`].
    pub fn begin_write_back(&mut self, slot: SlotIndex) {
        self.clear_dirty(slot.0);
        let info = &mut self.slots[slot.0 as usize];
        debug_assert!(!info.write_back);
        info.write_back = true;
        self.writing_pages += 1;
    }

    /// Sent and committed, or not: then the page is dirty again.
    pub fn end_write_back(&mut self, slot: SlotIndex, committed: bool) {
        let info = &mut self.slots[slot.0 as usize];
        debug_assert!(info.write_back);
        info.write_back = false;
        self.writing_pages -= 1;
        if info.state == State::Orphan {
            self.release_slot(slot.0);
        } else if !committed {
            self.mark_dirty(slot);
        }
    }

    pub fn is_writing(&self, slot: SlotIndex) -> bool {
        self.slots[slot.0 as usize].write_back
    }

    /// Keeps a page for a successor: it is not dirty for this node any more, and not evicted.
    pub fn begin_transit(&mut self, slot: SlotIndex) -> bool {
        let was_dirty = self.slots[slot.0 as usize].dirty;
        self.clear_dirty(slot.0);
        let info = &mut self.slots[slot.0 as usize];
        info.transit = true;
        info.transit_dirty = was_dirty;
        was_dirty
    }

    /// The successor is gone: the page is this node's again, dirty if it was.
    pub fn end_transit(&mut self, slot: SlotIndex) {
        let info = &mut self.slots[slot.0 as usize];
        info.transit = false;
        if std::mem::take(&mut info.transit_dirty) {
            self.mark_dirty(slot);
        }
    }

    /// Whether the page is kept for a successor and was dirty.
    pub fn is_transit_dirty(&self, slot: SlotIndex) -> bool {
        self.slots[slot.0 as usize].transit_dirty
    }

    pub fn is_transit(&self, slot: SlotIndex) -> bool {
        self.slots[slot.0 as usize].transit
    }

    /// Drops a page, dirty or not. Its slot is free at once, or when the operation on it has ended.
    pub fn forget(&mut self, ino: Ino, page: u64) {
        let Some(index) = self.unmap(ino, page) else { return };
        self.clear_dirty(index);
        let info = &mut self.slots[index as usize];
        if info.write_back || info.state == State::Fetching {
            info.state = State::Orphan;
        } else {
            self.release_slot(index);
        }
    }

    fn unmap(&mut self, ino: Ino, page: u64) -> Option<u32> {
        let pages = self.files.get_mut(&ino)?;
        let index = pages.remove(&page)?;
        if pages.is_empty() {
            self.files.remove(&ino);
        }
        Some(index)
    }

    fn release_slot(&mut self, index: u32) {
        self.slots[index as usize] = FREE;
        self.free.push(index);
    }

    /// Pages of a file in a range, present in whatever state, ascending.
    pub fn pages_in(&self, ino: Ino, range: Range) -> Vec<u64> {
        self.files
            .get(&ino)
            .map(|pages| pages.range(range.lo..range.hi).map(|(&page, _)| page).collect())
            .unwrap_or_default()
    }

    /// The nearest cached pages around a range: the end of the one below, the start of the one above.
    pub fn neighbours(&self, ino: Ino, range: Range) -> (Option<u64>, Option<u64>) {
        match self.files.get(&ino) {
            None => (None, None),
            Some(pages) => (
                pages.range(..range.lo).next_back().map(|(&page, _)| page + 1),
                pages.range(range.hi..).next().map(|(&page, _)| page),
            ),
        }
    }

    pub fn dirty_in(&self, ino: Ino, range: Range) -> Vec<u64> {
        self.dirty.get(&ino).map(|pages| pages.range(range.lo..range.hi).copied().collect()).unwrap_or_default()
    }

    /// Files with dirty pages.
    pub fn dirty_files(&self) -> Vec<Ino> {
        self.dirty.keys().copied().collect()
    }

    pub fn slot_of(&self, ino: Ino, page: u64) -> Option<SlotIndex> {
        match self.presence(ino, page) {
            Presence::Ready(slot) => Some(slot),
            _ => None,
        }
    }

    /// Checks that the tables agree; for tests and debug builds.
    pub fn check(&self) {
        let mut dirty = 0;
        let mut used = 0;
        for (ino, pages) in &self.files {
            for (page, &index) in pages {
                let info = &self.slots[index as usize];
                assert_eq!((info.ino, info.page), (*ino, *page));
                assert!(matches!(info.state, State::Fetching | State::Ready));
                used += 1;
                if info.dirty {
                    dirty += 1;
                    assert!(self.dirty[ino].contains(page));
                }
            }
        }
        used += self.slots.iter().filter(|info| info.state == State::Orphan).count();
        assert_eq!(used, self.used());
        assert_eq!(self.writing_pages, self.slots.iter().filter(|info| info.write_back).count());
        assert_eq!(dirty, self.dirty_pages);
        assert_eq!(dirty, self.dirty.values().map(BTreeSet::len).sum::<usize>());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(pages: usize) -> PageCache {
        PageCache::new(Box::new(PrivateMemory::new(pages * PAGE_SIZE as usize).unwrap()))
    }

    #[test]
    fn clean_pages_make_room_and_dirty_ones_do_not() {
        let mut cache = cache(4);
        let ino = Ino(7);
        for page in 0..4 {
            let slot = cache.insert(ino, page).unwrap();
            cache.bytes(slot).fill(page as u8);
            if page < 3 {
                cache.mark_dirty(slot);
            }
        }
        assert!(cache.insert(ino, 9).is_some(), "page 3 is clean");
        assert_eq!(cache.presence(ino, 3), Presence::Absent);
        let slot = cache.slot_of(ino, 9).unwrap();
        cache.mark_dirty(slot);
        assert!(cache.insert(ino, 10).is_none(), "all dirty");
        let slot = cache.slot_of(ino, 1).unwrap();
        cache.begin_write_back(slot);
        assert!(cache.insert(ino, 10).is_none(), "in flight");
        cache.end_write_back(slot, true);
        assert!(cache.insert(ino, 10).is_some());
        cache.check();
    }

    #[test]
    fn a_page_written_during_write_back_is_dirty_afterwards() {
        let mut cache = cache(2);
        let slot = cache.insert(Ino(1), 0).unwrap();
        cache.mark_dirty(slot);
        cache.begin_write_back(slot);
        assert_eq!(cache.dirty_pages(), 0);
        cache.mark_dirty(slot);
        cache.end_write_back(slot, true);
        assert_eq!(cache.dirty_in(Ino(1), Range::ALL), vec![0]);
        cache.begin_write_back(slot);
        cache.end_write_back(slot, false);
        assert_eq!(cache.dirty_in(Ino(1), Range::ALL), vec![0], "a failed write-back leaves the page dirty");
        cache.check();
    }

    #[test]
    fn a_slot_is_not_used_again_while_an_operation_is_on_it() {
        let mut cache = cache(2);
        let (lost, other) = (Ino(1), Ino(2));
        let fetching = cache.reserve(lost, 0).unwrap();
        let writing = cache.insert(lost, 1).unwrap();
        cache.mark_dirty(writing);
        cache.begin_write_back(writing);
        for page in 0..2 {
            cache.forget(lost, page);
            assert_eq!(cache.presence(lost, page), Presence::Absent);
        }
        cache.check();
        assert!(cache.reserve(other, 0).is_none(), "both slots are still being read or written");
        assert!(!cache.fetched(fetching), "its page is gone");
        let slot = cache.reserve(other, 0).unwrap();
        assert_eq!(slot, fetching);
        cache.end_write_back(writing, false);
        cache.check();
        let second = cache.reserve(lost, 1).unwrap();
        assert_eq!(second, writing);
        assert!(cache.fetched(second));
        cache.abandon(slot);
        assert_eq!((cache.used(), cache.dirty_pages(), cache.writing_pages()), (1, 0, 0));
        cache.check();
    }

    #[test]
    fn transit_keeps_the_page_but_not_its_dirt() {
        let mut cache = cache(1);
        let slot = cache.insert(Ino(1), 5).unwrap();
        cache.mark_dirty(slot);
        assert!(cache.begin_transit(slot));
        assert_eq!(cache.dirty_pages(), 0);
        assert!(cache.insert(Ino(1), 6).is_none(), "a page in transit is not evicted");
        cache.end_transit(slot);
        assert_eq!(cache.dirty_pages(), 1);
        cache.forget(Ino(1), 5);
        assert_eq!(cache.used(), 0);
        cache.check();
    }
}
