//! Bytes under DATA locks: read, write, truncate, allocate, punch.
//!
//! A call pins ATTR before DATA, all DATA of one call in ascending server slots, and drops everything
//! together. Copies between the caller's bytes and the cache happen in one step, with all pages present, so
//! a call of up to 1 MiB is atomic on its own node too.
//!
//! *The size floor.* Most reads end below the end of file and need no ATTR lock. A size learnt under ATTR
//! while DATA is held stays a lower bound for the pages held, since truncation takes DATA X on everything it
//! cuts. So each file has one floor: it is raised only while ATTR (or a write) is pinned, and is lowered to
//! the start of every range whose lock is newly acquired or lost. A read that ends above it starts
//! again with ATTR S.
//!
//! Bytes of a page beyond the end of file are always zero.

use super::*;
use crate::cache::Presence;
use crate::ranges::RangeSet;
use verbfs_lock::PinKind;

/// Longest single read or write, bytes: what is atomic.
pub const PIECE_MAX: u64 = 1 << 20;
/// Largest file, bytes: what off_t holds, less a page.
pub const FILE_MAX: u64 = i64::MAX as u64 - PAGE_SIZE;
/// All pages a file may have.
pub(crate) const ALL_PAGES: Range = Range::new(0, u64::MAX);

#[derive(Default)]
pub(crate) struct FileState {
    pub layout: Option<Rc<Layout>>,
    /// The home said that there is no such inode.
    pub gone: bool,
    /// Handles open for writing on this node.
    pub writers: usize,
    pub size_floor: u64,
    /// Extents by first page, valid under the DATA lock on them.
    pub extents: std::collections::BTreeMap<u64, Extent>,
    /// Pages whose layout is known: those without an extent are holes.
    pub known: RangeSet,
    /// Questions about extents that are out, by number: whom, and for which pages the answer will still be true. What is
    /// forgotten meanwhile is not learnt from an answer that was on its way.
    pub asked: Vec<(u64, Slot, RangeSet)>,
    /// Pages allocated ahead, under DATA X: they have extents, are not in the cache, and do not count as the file's yet. Of what
    /// this node holds X on and knows, every uncommitted page is in the cache, about to be written under a pin, or spare.
    pub spare: RangeSet,
    /// Pages that the kernel may cache. While the file is open for writing here, all of them are under X.
    pub kernel: RangeSet,
    /// Ranges whose kernel pages are being dropped, and since when.
    pub sweeping: Vec<(Range, Instant)>,
    /// Ranges that a write(2) of this node is about to change: the kernel gets no page of them.
    pub writing: Vec<Range>,
    /// Ranges being vacated: background write-back leaves them alone.
    pub vacating: Vec<Range>,
    /// Data was lost; the next fsync says so.
    pub error: Option<Errno>,
}

impl FileState {
    pub fn extent_of(&self, page: u64) -> Option<Extent> {
        let (_, extent) = self.extents.range(..=page).next_back()?;
        if page >= extent.page + extent.pages {
            return None;
        }
        let skip = page - extent.page;
        Some(Extent {
            page,
            arena_page: extent.arena_page + skip,
            pages: extent.pages - skip,
            committed: extent.committed,
        })
    }

    /// Learns what a server answered for `range`, where nothing was known. A page that has an extent keeps it: it is the same
    /// one. What is new, uncommitted and not `cached` is spare: a page that is cached, or being fetched from an earlier holder,
    /// has a write behind it.
    fn learn_new(&mut self, range: Range, extents: &[Extent], cached: impl Fn(u64) -> bool) {
        for extent in extents {
            let answered = Range::new(extent.page, extent.page + extent.pages).intersect(range);
            for part in self.without_extent(answered) {
                let arena_page = extent.arena_page + (part.lo - extent.page);
                self.extents.insert(part.lo, Extent { page: part.lo, arena_page, pages: part.len(), ..*extent });
                if !extent.committed {
                    for page in (part.lo..part.hi).filter(|page| !cached(*page)) {
                        self.spare.insert(Range::new(page, page + 1));
                    }
                }
            }
        }
        self.known.insert(range);
    }

    /// The parts of `range` that have no extent as far as is known.
    fn without_extent(&self, range: Range) -> Vec<Range> {
        let mut parts = Vec::new();
        let mut lo = range.lo;
        while lo < range.hi {
            match self.extent_of(lo) {
                Some(extent) => lo += extent.pages,
                None => {
                    let next = self.extents.range(lo..range.hi).next().map_or(range.hi, |(page, _)| *page);
                    parts.push(Range::new(lo, next));
                    lo = next;
                }
            }
        }
        parts
    }

    /// Pages of `range` that have an extent.
    fn pages_allocated(&self, range: Range) -> u64 {
        range.len() - self.without_extent(range).iter().map(|part| part.len()).sum::<u64>()
    }

    /// Takes spare pages of `range` into use, or out to be given back.
    pub fn take_spare(&mut self, range: Range) -> Vec<Range> {
        let taken: Vec<Range> =
            self.spare.iter().filter(|piece| piece.overlaps(range)).map(|piece| piece.intersect(range)).collect();
        self.spare.remove(range);
        taken
    }

    /// Those parts of ranges that a server stores.
    pub fn stored_by(&self, server: Slot, ranges: impl Iterator<Item = Range>) -> Vec<Range> {
        match &self.layout {
            Some(layout) if layout.slots.len() > 1 => ranges
                .flat_map(|range| pieces(layout, range))
                .filter(|(slot, _)| *slot == server)
                .map(|(_, piece)| piece)
                .collect(),
            _ => ranges.collect(),
        }
    }

    /// What of `range` is spare on a server.
    pub fn spare_of(&self, server: Slot, range: Range) -> Vec<Range> {
        let within = self.spare.iter().filter(|piece| piece.overlaps(range)).map(|piece| piece.intersect(range));
        self.stored_by(server, within)
    }

    /// What no write-back has committed goes with DATA X: the server frees it at the release.
    pub fn forget_uncommitted(&mut self, server: Slot, range: Range) {
        self.void_answers(Some(server), range);
        // Also what came with a hand-over and whose place was never asked for: it must not outlive the lock.
        for part in self.spare_of(server, range) {
            self.spare.remove(part);
        }
        let uncommitted = self
            .extents
            .values()
            .filter(|extent| !extent.committed)
            .map(|extent| Range::new(extent.page, extent.page + extent.pages).intersect(range))
            .filter(|part| !part.is_empty());
        for part in self.stored_by(server, uncommitted) {
            self.forget_layout(part);
        }
    }

    /// What is on its way from a server (from any) says nothing about `range` any more.
    pub fn void_answers(&mut self, server: Option<Slot>, range: Range) {
        for (_, slot, valid) in &mut self.asked {
            if server.is_none_or(|server| server == *slot) {
                valid.remove(range);
            }
        }
    }

    /// Learns that of `range` exactly `extents` exist.
    pub fn learn(&mut self, range: Range, extents: &[Extent]) {
        self.drop_layout(range);
        for extent in extents {
            let part = Range::new(extent.page, extent.page + extent.pages).intersect(range);
            if !part.is_empty() {
                self.extents.insert(
                    part.lo,
                    Extent {
                        page: part.lo,
                        arena_page: extent.arena_page + (part.lo - extent.page),
                        pages: part.len(),
                        committed: extent.committed,
                    },
                );
            }
        }
        self.known.insert(range);
    }

    pub fn forget_layout(&mut self, range: Range) {
        self.void_answers(None, range);
        self.drop_layout(range);
    }

    fn drop_layout(&mut self, range: Range) {
        self.known.remove(range);
        self.spare.remove(range);
        let mut touching: Vec<u64> = self.extents.range(range.lo..range.hi).map(|(page, _)| *page).collect();
        if let Some((page, extent)) = self.extents.range(..range.lo).next_back()
            && page + extent.pages > range.lo
        {
            touching.push(*page);
        }
        for page in touching {
            let extent = self.extents.remove(&page).expect("it was just listed");
            for rest in Range::new(extent.page, extent.page + extent.pages).without(range) {
                self.extents.insert(
                    rest.lo,
                    Extent {
                        page: rest.lo,
                        arena_page: extent.arena_page + (rest.lo - extent.page),
                        pages: rest.len(),
                        committed: extent.committed,
                    },
                );
            }
        }
    }

    pub fn commit(&mut self, range: Range) {
        let parts: Vec<Extent> = (range.lo..range.hi)
            .scan(range.lo, |next, _| {
                let extent = (*next < range.hi).then(|| self.extent_of(*next)).flatten()?;
                let pages = extent.pages.min(range.hi - *next);
                *next += pages;
                Some(Extent { pages, committed: true, ..extent })
            })
            .collect();
        for part in parts {
            let known = Range::new(part.page, part.page + part.pages);
            self.learn(known, &[part]);
        }
    }
}

/// Pages that bytes `[offset, offset + length)` touch.
pub(crate) fn pages_of(offset: u64, length: u64) -> Range {
    Range::new(offset / PAGE_SIZE, (offset + length).div_ceil(PAGE_SIZE))
}

/// A range split where the storing slot changes.
pub(crate) fn pieces(layout: &Layout, range: Range) -> Vec<(Slot, Range)> {
    if layout.slots.len() == 1 {
        return vec![(layout.slots[0], range)];
    }
    let chunk = layout.chunk_pages as u64;
    let mut pieces = Vec::new();
    let mut lo = range.lo;
    while lo < range.hi {
        let hi = (lo / chunk + 1).saturating_mul(chunk).min(range.hi);
        pieces.push((layout.slot_of_page(lo), Range::new(lo, hi)));
        lo = hi;
    }
    pieces
}

/// For each slot that stores part of a range, the hull of its part, ascending by slot: the order of pins.
pub(crate) fn hulls(layout: &Layout, range: Range) -> Vec<(Slot, Range)> {
    let chunk = layout.chunk_pages as u64;
    let mut hulls: std::collections::BTreeMap<Slot, Range> = Default::default();
    if range.len() / chunk > 2 * layout.slots.len() as u64 {
        for slot in &layout.slots {
            hulls.insert(*slot, range);
        }
    } else {
        for (slot, piece) in pieces(layout, range) {
            hulls.entry(slot).and_modify(|hull| *hull = hull.hull(piece)).or_insert(piece);
        }
    }
    hulls.into_iter().collect()
}

/// What stands between a copy and its doing.
enum Copied {
    Done,
    /// These pages must be fetched first.
    Fetch(Vec<u64>),
    /// Somebody else fetches a page.
    Wait,
    /// No free slot.
    NoRoom,
}

impl Volume {
    /// Pins the data of a page range on all servers that store it.
    pub(crate) async fn pin_data(
        self: &Rc<Self>,
        ino: Ino,
        layout: &Layout,
        range: Range,
        kind: PinKind,
        through_fence: bool,
    ) -> Result<Vec<Pin>> {
        let mut pins = Vec::new();
        for (slot, hull) in hulls(layout, range) {
            let options = locks::PinOptions { through_fence, ..Default::default() };
            pins.push(self.pin_with(Resource::data(ino, slot), hull, ALL_PAGES, kind, options).await?.0);
        }
        Ok(pins)
    }

    /// Pins for a page that the kernel fills with its lock held. Whoever drops the kernel's pages of a range waits for
    /// such locks, so a fill that stands before that very fence is let through it, and the drop comes again after it.
    /// Not at once, though: a program that touches its mapping in a loop would keep every fence open for ever.
    async fn pin_for_kernel(
        self: &Rc<Self>,
        ino: Ino,
        layout: &Layout,
        range: Range,
        kind: PinKind,
    ) -> Result<Vec<Pin>> {
        /// A drop that takes longer waits for somebody: it takes microseconds otherwise.
        const PATIENCE: Duration = Duration::from_millis(2);
        let blocked = || {
            let waits = |(swept, since): &(Range, Instant)| swept.overlaps(range) && since.elapsed() >= PATIENCE;
            self.with_file(ino, |file| file.sweeping.iter().any(waits))
        };
        loop {
            let through = blocked();
            let mut pinning = std::pin::pin!(self.pin_data(ino, layout, range, kind, through));
            let mut patience = std::pin::pin!(self.executor.sleep(PATIENCE));
            let outcome = std::future::poll_fn(|context| {
                if let std::task::Poll::Ready(outcome) = pinning.as_mut().poll(context) {
                    return std::task::Poll::Ready(Some(outcome));
                }
                while !through && patience.as_mut().poll(context).is_ready() {
                    if blocked() {
                        return std::task::Poll::Ready(None);
                    }
                    patience.set(self.executor.sleep(PATIENCE));
                }
                std::task::Poll::Pending
            })
            .await;
            let Some(outcome) = outcome else { continue };
            let pins = outcome?;
            // A write(2) that drops what the kernel has of these pages: the same patience, the same reason.
            let written = || self.with_file(ino, |file| file.writing.iter().any(|written| written.overlaps(range)));
            if !written() || through || blocked() {
                return Ok(pins);
            }
            drop(pins);
            while written() && !blocked() {
                self.executor.sleep(PATIENCE).await;
            }
        }
    }

    /// Before a write(2) under DATA pins: what the kernel caches of the range goes, and nothing of it comes back until
    /// the guard is dropped. (The kernel itself drops such pages before it sends the write, and may have filled them again.)
    async fn begin_write_beside_mappings(self: &Rc<Self>, ino: Ino, range: Range) -> Option<WritingRange> {
        let cached = |file: &mut FileState| file.kernel.iter().any(|piece| piece.overlaps(range));
        if !self.with_file(ino, cached) {
            return None;
        }
        self.with_file(ino, |file| file.writing.push(range));
        let guard = WritingRange { volume: self.clone(), ino, range };
        while self.with_file(ino, cached) {
            self.sweep_kernel(ino, range).await;
        }
        Some(guard)
    }

    pub(crate) fn cap_size_floor(&self, ino: Ino, page: u64) {
        if self.mutated("size_floor_never_capped") {
            return;
        }
        if let Some(file) = self.files.borrow_mut().get_mut(&ino) {
            file.size_floor = file.size_floor.min(page.saturating_mul(PAGE_SIZE));
        }
    }

    pub(crate) fn with_file<T>(&self, ino: Ino, f: impl FnOnce(&mut FileState) -> T) -> T {
        f(self.files.borrow_mut().entry(ino).or_default())
    }

    /// Drops what is known of a file of which nothing is cached, open or locked.
    pub(crate) fn prune_file(&self, ino: Ino) {
        let mut files = self.files.borrow_mut();
        let Some(file) = files.get(&ino) else { return };
        if file.writers == 0
            && file.error.is_none()
            && file.vacating.is_empty()
            && file.kernel.is_empty()
            && file.sweeping.is_empty()
            && file.writing.is_empty()
            && file.extents.is_empty()
            && file.asked.is_empty()
            && self.cache.borrow().pages_in(ino, Range::ALL).is_empty()
            && !self.open_files.borrow().values().any(|open| open.ino == ino)
        {
            files.remove(&ino);
        }
    }

    /// Learns the layout of all pages of a range, under a DATA pin on it.
    async fn ensure_layout(self: &Rc<Self>, ino: Ino, layout: &Layout, range: Range) -> Result<()> {
        let missing = self.with_file(ino, |file| file.known.missing(range));
        for (slot, piece) in missing.into_iter().flat_map(|range| pieces(layout, range)) {
            // The whole chunk, where the lock reaches that far: one request for what will be asked next.
            let chunk_pages = layout.chunk_pages as u64;
            let chunk = Range::new(
                piece.lo / chunk_pages * chunk_pages,
                (piece.lo / chunk_pages + 1).saturating_mul(chunk_pages),
            );
            let asked = match self.lock_client.borrow().held(Resource::data(ino, slot), chunk) {
                Some(_) if chunk.contains(piece) => chunk,
                _ => piece,
            };
            self.ask_extents(ino, slot, asked, Request::Layout { ino, range: asked }).await?;
        }
        Ok(())
    }

    /// Asks a server about extents and learns what it answers about `asked`. What is known meanwhile is newer, for this node may
    /// have allocated there; what was forgotten meanwhile stays so: its lock is gone or the pages are.
    async fn ask_extents(self: &Rc<Self>, ino: Ino, slot: Slot, asked: Range, request: Request) -> Result<u64> {
        let number = self.number();
        let mut valid = RangeSet::default();
        valid.insert(asked);
        self.with_file(ino, |file| file.asked.push((number, slot, valid)));
        let outcome = self.request_extents(slot, request).await;
        let cache = self.cache.borrow();
        self.with_file(ino, |file| {
            let index = file.asked.iter().position(|(other, ..)| *other == number).expect("a file that asks is kept");
            let (_, _, valid) = file.asked.swap_remove(index);
            let (extents, new) = outcome?;
            for part in valid.iter() {
                file.learn_new(part, &extents, |page| cache.presence(ino, page) != Presence::Absent);
            }
            Ok(new)
        })
    }

    /// Has every page of a range allocated, under a DATA X pin. Returns the pages that were new to the file. `zero`: those that
    /// were are zeros in the arena, and stay; the pin is exclusive.
    ///
    /// # Errors
    /// ENOSPC: nothing may be dirtied.
    pub(crate) async fn ensure_allocated(
        self: &Rc<Self>,
        ino: Ino,
        layout: &Layout,
        range: Range,
        zero: bool,
    ) -> Result<u64> {
        let mut taken = Vec::new();
        let outcome = self.allocate_pieces(ino, layout, range, zero, &mut taken).await;
        self.with_file(ino, |file| match outcome {
            Ok(allocated) => Ok(allocated + taken.iter().map(|part| part.len()).sum::<u64>()),
            Err(error) => {
                // What of it still has its place here was not written, and is spare again.
                for page in taken.iter().flat_map(|part| part.lo..part.hi) {
                    if file.extent_of(page).is_some_and(|extent| !extent.committed) {
                        file.spare.insert(Range::new(page, page + 1));
                    }
                }
                Err(error)
            }
        })
    }

    async fn allocate_pieces(
        self: &Rc<Self>,
        ino: Ino,
        layout: &Layout,
        range: Range,
        zero: bool,
        taken: &mut Vec<Range>,
    ) -> Result<u64> {
        if zero {
            // What is spare goes back first: the server zeroes what it allocates, not what it has allocated.
            let spare = self.with_file(ino, |file| file.take_spare(range));
            self.give_back(ino, layout, spare).await?;
        }
        let mut allocated = 0;
        for (slot, piece) in pieces(layout, range) {
            if self.with_file(ino, |file| file.pages_allocated(piece) < piece.len()) {
                let ahead = if zero { piece } else { self.allocation_window(ino, layout, slot, piece) };
                let request = Request::Allocate { ino, range: piece, ahead, zero };
                let new = self.ask_extents(ino, slot, ahead, request).await?;
                if zero {
                    allocated += new;
                }
            }
            // Only now: what came with a hand-over was spare before, and is again when its place is learnt.
            taken.extend(self.with_file(ino, |file| file.take_spare(piece)));
        }
        Ok(allocated)
    }

    /// What to allocate with pages of one chunk that have to be: more, the more of the chunk is allocated, so that a lonely page
    /// in a sparse file stays alone and a file that grows asks once or twice for each chunk.
    fn allocation_window(&self, ino: Ino, layout: &Layout, slot: Slot, piece: Range) -> Range {
        /// Pages ahead and behind for each page of the chunk that has its place already.
        const GROWTH: u64 = 4;
        let chunk_pages = layout.chunk_pages as u64;
        let start = piece.lo / chunk_pages * chunk_pages;
        let chunk = Range::new(start, start.saturating_add(chunk_pages));
        let more = GROWTH * self.with_file(ino, |file| file.pages_allocated(chunk));
        if more == 0 || !chunk.contains(piece) {
            return piece;
        }
        let window = Range::new(piece.lo.saturating_sub(more), piece.hi.saturating_add(more)).intersect(chunk);
        self.lock_client.borrow().held_exclusively_around(Resource::data(ino, slot), piece, window)
    }

    /// Gives pages back that were allocated ahead and taken out of `spare`, under an exclusive DATA pin on them: nobody may
    /// take them into use while the request is on its way.
    async fn give_back(self: &Rc<Self>, ino: Ino, layout: &Layout, spare: Vec<Range>) -> Result<()> {
        let mut by_slot: std::collections::BTreeMap<Slot, Vec<Range>> = Default::default();
        for (slot, piece) in spare.into_iter().flat_map(|range| pieces(layout, range)) {
            debug_assert!(
                self.cache.borrow().pages_in(ino, piece).is_empty(),
                "{ino} {piece} is spare and in the cache"
            );
            self.with_file(ino, |file| file.forget_layout(piece));
            by_slot.entry(slot).or_default().push(piece);
        }
        for (slot, ranges) in by_slot {
            for ranges in ranges.chunks(RUNS_MAX) {
                self.call(slot, Request::GiveBack { ino, ranges: ranges.to_vec() }).await?;
            }
        }
        Ok(())
    }

    /// Gives back what this node has spare of a file, because nobody here writes it any more, or of all files on a server
    /// that is short of space. What is pinned, or on its way to another node, stays.
    pub(crate) async fn give_back_spare(self: &Rc<Self>, only: Option<Ino>, server: Option<Slot>) {
        let mut spare = Vec::new();
        for (ino, file) in self.files.borrow().iter() {
            let Some(layout) = file.layout.clone() else { continue };
            if only.is_some_and(|only| only != *ino) || file.spare.is_empty() {
                continue;
            }
            let parts: Vec<(Slot, Range)> = file
                .spare
                .iter()
                .flat_map(|range| pieces(&layout, range))
                .filter(|(slot, _)| server.is_none_or(|server| server == *slot))
                .collect();
            spare.push((*ino, layout, parts));
        }
        for (ino, layout, parts) in spare {
            for parts in parts.chunks(RUNS_MAX) {
                let mut pins = Vec::new();
                let mut taken = Vec::new();
                for (slot, part) in parts {
                    let Some(pin) = self.pin_held(Resource::data(ino, *slot), *part, PinKind::Exclusive) else {
                        continue;
                    };
                    pins.push(pin);
                    taken.extend(self.with_file(ino, |file| file.take_spare(*part)));
                }
                // A server that cannot be asked frees what is spare when it takes the lock back.
                if let Err(error) = self.give_back(ino, &layout, taken).await {
                    tracing::debug!(%ino, ?error, "spare pages were not given back");
                }
            }
        }
    }

    async fn request_extents(self: &Rc<Self>, slot: Slot, request: Request) -> Result<(Vec<Extent>, u64)> {
        let (mut all, mut new) = (Vec::new(), 0);
        let mut requests = vec![request];
        while let Some(request) = requests.pop() {
            match (self.call(slot, request.clone()).await, request) {
                (
                    Ok(Reply::Extents { key, extents, allocated }),
                    Request::Layout { range: asked, .. } | Request::Allocate { ahead: asked, .. },
                ) if plausible::extents(asked, &extents) && allocated <= asked.len() => {
                    self.arena_keys.borrow_mut().insert(slot, key);
                    all.extend(extents);
                    new += allocated;
                }
                // More extents than one reply holds: in two halves, the lower first.
                (Err(Errno::E2BIG), Request::Layout { ino, range }) if range.len() > 1 => {
                    let middle = range.lo + range.len() / 2;
                    requests.push(Request::Layout { ino, range: Range::new(middle, range.hi) });
                    requests.push(Request::Layout { ino, range: Range::new(range.lo, middle) });
                }
                (Ok(_), _) => return Err(Errno::EPROTO),
                (Err(error), _) => return Err(error),
            }
        }
        Ok((all, new))
    }

    /// Reads at most [`PIECE_MAX`] bytes; short at the end of file. `page_cache`: the kernel fills a page of its
    /// cache, whose lock it holds: the range is entered through a fence, no ATTR lock is waited for, and
    /// what lies beyond the end of file is zeros (the kernel knows the size).
    pub async fn read(self: &Rc<Self>, handle: u64, offset: u64, size: u32, page_cache: bool) -> Result<Vec<u8>> {
        let open = self.open_file(handle)?;
        let data = self.read_file(open.ino, offset, size as u64, page_cache).await?;
        self.metrics.read_bytes.add(data.len() as u64);
        Ok(data)
    }

    pub(crate) async fn read_file(
        self: &Rc<Self>,
        ino: Ino,
        offset: u64,
        size: u64,
        page_cache: bool,
    ) -> Result<Vec<u8>> {
        let size = size.min(PIECE_MAX).min(FILE_MAX.saturating_sub(offset));
        if size == 0 {
            return Ok(Vec::new());
        }
        let layout = self.layout(ino).await?;
        let range = pages_of(offset, size);
        // A page the kernel caches of a file open for writing may be stored to without asking: X.
        let kind =
            if page_cache && self.with_file(ino, |file| file.writers > 0) { PinKind::Write } else { PinKind::Shared };
        let mut pins = if page_cache {
            self.pin_for_kernel(ino, &layout, range, kind).await?
        } else {
            self.pin_data(ino, &layout, range, kind, false).await?
        };
        let mut up_to_end = false;
        if page_cache {
            if kind == PinKind::Shared && self.with_file(ino, |file| file.writers > 0) {
                // Opened for writing while this waited: what the kernel gets now must be under X.
                drop(pins);
                pins = self.pin_for_kernel(ino, &layout, range, PinKind::Write).await?;
            }
            self.with_file(ino, |file| file.kernel.insert(range));
        } else if offset + size > self.with_file(ino, |file| file.size_floor) {
            drop(pins);
            let attribute_pin = self.pin(Resource::attr(ino), Range::UNIT, Range::UNIT, PinKind::Shared).await?;
            if self.pinned_attributes(ino)?.size <= offset {
                return Ok(Vec::new());
            }
            pins = self.pin_data(ino, &layout, range, kind, false).await?;
            let end = self.pinned_attributes(ino)?.size;
            self.with_file(ino, |file| file.size_floor = file.size_floor.max(end));
            pins.push(attribute_pin);
            up_to_end = true;
        }
        let mut output = Vec::new();
        let mut fetched = false;
        loop {
            // ATTR S keeps other nodes from changing the size, not the writers of this one: where it counts, it is read
            // in the same step as the bytes.
            let length = |volume: &Volume| -> Result<u64> {
                Ok(if up_to_end { volume.pinned_attributes(ino)?.size.saturating_sub(offset).min(size) } else { size })
            };
            let expected = length(self)?;
            if expected == 0 {
                return Ok(Vec::new());
            }
            self.ensure_layout(ino, &layout, pages_of(offset, expected)).await?;
            if length(self)? != expected {
                continue;
            }
            output.resize(expected as usize, 0);
            match self.try_copy_out(ino, offset, &mut output) {
                Copied::Done => break,
                Copied::Fetch(pages) => {
                    fetched = true;
                    self.fetch_pages(ino, &layout, &pages).await?
                }
                Copied::Wait => self.cache_changed.wait().await,
                Copied::NoRoom => self.make_room().await,
            }
        }
        if !fetched {
            self.metrics.cache_hits.add(pages_of(offset, output.len() as u64).len());
        }
        for pin in &pins {
            pin.check()?;
        }
        Ok(output)
    }

    fn try_copy_out(&self, ino: Ino, offset: u64, output: &mut [u8]) -> Copied {
        let files = self.files.borrow();
        let file = files.get(&ino);
        let mut cache = self.cache.borrow_mut();
        let range = pages_of(offset, output.len() as u64);
        let mut wanted = Vec::new();
        let mut waiting = false;
        for page in range.lo..range.hi {
            match cache.presence(ino, page) {
                Presence::Ready(_) => {}
                Presence::Fetching => waiting = true,
                Presence::Absent => {
                    if file.and_then(|file| file.extent_of(page)).is_some_and(|extent| extent.committed) {
                        wanted.push(page);
                    }
                }
            }
        }
        if !wanted.is_empty() {
            return Copied::Fetch(wanted);
        }
        if waiting {
            return Copied::Wait;
        }
        let end = offset + output.len() as u64;
        for page in range.lo..range.hi {
            let start = (page * PAGE_SIZE).max(offset);
            let stop = ((page + 1) * PAGE_SIZE).min(end);
            let target = &mut output[(start - offset) as usize..(stop - offset) as usize];
            match cache.presence(ino, page) {
                Presence::Ready(slot) => {
                    let within = (start - page * PAGE_SIZE) as usize;
                    target.copy_from_slice(&cache.bytes(slot)[within..within + target.len()]);
                }
                _ => target.fill(0),
            }
        }
        Copied::Done
    }

    /// Writes at most [`PIECE_MAX`] bytes. `append`: at the end of file, wherever `offset` points. `page_cache`: the
    /// kernel writes a page of its cache back (its lock held): no ATTR lock is waited for, the size stays.
    pub async fn write(
        self: &Rc<Self>,
        caller: Caller,
        handle: u64,
        offset: u64,
        data: Vec<u8>,
        append: bool,
        page_cache: bool,
    ) -> Result<usize> {
        let open = self.open_file(handle)?;
        let written = self.write_file(caller, open.ino, offset, &data, append, page_cache).await?;
        self.metrics.written_bytes.add(written as u64);
        Ok(written)
    }

    pub(crate) async fn write_file(
        self: &Rc<Self>,
        caller: Caller,
        ino: Ino,
        offset: u64,
        data: &[u8],
        append: bool,
        page_cache: bool,
    ) -> Result<usize> {
        let data = &data[..data.len().min(PIECE_MAX as usize)];
        if data.is_empty() {
            return Ok(0);
        }
        let written = data.len();
        if !page_cache {
            self.throttle().await;
        }
        let layout = self.layout(ino).await?;
        let mut offset = offset;
        let attribute_pin = loop {
            if page_cache {
                break self.pin_held(Resource::attr(ino), Range::UNIT, PinKind::Extend);
            }
            let kind =
                if append && !self.mutated("append_without_exclusive") { PinKind::Exclusive } else { PinKind::Extend };
            let pin = self.pin(Resource::attr(ino), Range::UNIT, Range::UNIT, kind).await?;
            let attributes = self.pinned_attributes(ino)?;
            if self.takes_privileges(caller, ino, &attributes).await? {
                drop(pin);
                self.change(caller, ino, Change { clear_set_id: true, ..Default::default() }).await?;
                continue;
            }
            if append {
                offset = attributes.size;
            }
            break Some(pin);
        };
        if offset > FILE_MAX || data.len() as u64 > FILE_MAX - offset {
            return Err(Errno::EFBIG);
        }
        let mut data = data;
        if page_cache {
            // The kernel writes whole pages; what lies behind the end of file is not of the file.
            let size = if attribute_pin.is_some() {
                self.pinned_attributes(ino).map(|attributes| attributes.size).ok()
            } else {
                None
            };
            let within = size.map_or(data.len() as u64, |size| size.saturating_sub(offset));
            data = &data[..data.len().min(within as usize)];
            if data.is_empty() {
                return Ok(written);
            }
        }
        let end = offset + data.len() as u64;
        let range = pages_of(offset, data.len() as u64);
        let pins = self.pin_data(ino, &layout, range, PinKind::Write, page_cache).await?;
        let allocated = self.ensure_allocated(ino, &layout, range, false).await?;
        if allocated > 0 {
            self.note_write(ino, 0, allocated as i64);
        }
        let _writing = if page_cache { None } else { self.begin_write_beside_mappings(ino, range).await };
        loop {
            match self.try_copy_in(ino, offset, data) {
                Copied::Done => break,
                Copied::Fetch(pages) => self.fetch_pages(ino, &layout, &pages).await?,
                Copied::Wait => self.cache_changed.wait().await,
                Copied::NoRoom => self.make_room().await,
            }
        }
        for pin in pins.iter().chain(&attribute_pin) {
            pin.check()?;
        }
        if attribute_pin.is_some() {
            self.note_write(ino, if page_cache { 0 } else { end }, 0);
        } else {
            // A store through a mapping is seen in the bytes at once; its time follows when ATTR can be had.
            let volume = self.clone();
            self.spawn(async move {
                if let Ok(_pin) = volume.pin(Resource::attr(ino), Range::UNIT, Range::UNIT, PinKind::Extend).await {
                    volume.note_write(ino, 0, 0);
                }
            });
        }
        if !page_cache {
            self.with_file(ino, |file| file.size_floor = file.size_floor.max(end));
        }
        self.start_write_back_if_needed();
        Ok(written)
    }

    fn try_copy_in(&self, ino: Ino, offset: u64, data: &[u8]) -> Copied {
        let files = self.files.borrow();
        let file = files.get(&ino);
        let mut cache = self.cache.borrow_mut();
        let end = offset + data.len() as u64;
        let range = pages_of(offset, data.len() as u64);
        let mut wanted = Vec::new();
        let mut waiting = false;
        for page in range.lo..range.hi {
            let covered = page * PAGE_SIZE >= offset && (page + 1) * PAGE_SIZE <= end;
            match cache.presence(ino, page) {
                Presence::Ready(_) => {}
                Presence::Fetching => waiting = true,
                Presence::Absent if covered => {}
                Presence::Absent => {
                    if file.and_then(|file| file.extent_of(page)).is_some_and(|extent| extent.committed) {
                        wanted.push(page);
                    }
                }
            }
        }
        if !wanted.is_empty() {
            return Copied::Fetch(wanted);
        }
        if waiting {
            return Copied::Wait;
        }
        // All slots first, so that a full cache leaves nothing half written.
        let mut taken = Vec::new();
        for page in range.lo..range.hi {
            if cache.presence(ino, page) == Presence::Absent {
                match cache.reserve(ino, page) {
                    Some(slot) => {
                        taken.push(slot);
                        let covered = page * PAGE_SIZE >= offset && (page + 1) * PAGE_SIZE <= end;
                        if !covered {
                            cache.bytes(slot).fill(0);
                        }
                    }
                    None => {
                        for slot in taken {
                            cache.abandon(slot);
                        }
                        return Copied::NoRoom;
                    }
                }
            } else if let Presence::Ready(slot) = cache.presence(ino, page) {
                // Keeps it from being evicted for the slots still to be taken.
                cache.mark_dirty(slot);
            }
        }
        for slot in taken {
            cache.fetched(slot);
        }
        for page in range.lo..range.hi {
            let start = (page * PAGE_SIZE).max(offset);
            let stop = ((page + 1) * PAGE_SIZE).min(end);
            let source = &data[(start - offset) as usize..(stop - offset) as usize];
            let Presence::Ready(slot) = cache.presence(ino, page) else { unreachable!("every page has a slot") };
            let within = (start - page * PAGE_SIZE) as usize;
            cache.bytes(slot)[within..within + source.len()].copy_from_slice(source);
            cache.mark_dirty(slot);
        }
        Copied::Done
    }

    /// Sets the size; what is cut off is gone everywhere, what is added reads as zeros.
    pub async fn truncate(self: &Rc<Self>, caller: Caller, ino: Ino, size: u64) -> Result<Attributes> {
        if size > FILE_MAX {
            return Err(Errno::EFBIG);
        }
        let layout = self.layout(ino).await?;
        loop {
            let attribute_pin = self.pin(Resource::attr(ino), Range::UNIT, Range::UNIT, PinKind::Exclusive).await?;
            let attributes = self.pinned_attributes(ino)?;
            match attributes.kind {
                FileKind::Regular => {}
                FileKind::Directory => return Err(Errno::EISDIR),
                _ => return Err(Errno::EINVAL),
            }
            if self.takes_privileges(caller, ino, &attributes).await? {
                drop(attribute_pin);
                self.change(caller, ino, Change { clear_set_id: true, ..Default::default() }).await?;
                continue;
            }
            let mut pages = 0;
            if size < attributes.size {
                let range = Range::new(size / PAGE_SIZE, u64::MAX);
                let pins = self.pin_data(ino, &layout, range, PinKind::Exclusive, false).await?;
                if !size.is_multiple_of(PAGE_SIZE) {
                    pages += self.zero_within(ino, &layout, size, PAGE_SIZE - size % PAGE_SIZE).await? as i64;
                }
                pages -= self.free_pages(ino, &layout, Range::new(size.div_ceil(PAGE_SIZE), u64::MAX)).await? as i64;
                for pin in &pins {
                    pin.check()?;
                }
                self.with_file(ino, |file| file.size_floor = file.size_floor.min(size));
                self.note_size(ino, size, pages);
            } else {
                self.note_size(ino, size, 0);
            }
            attribute_pin.check()?;
            return self.pinned_attributes(ino);
        }
    }

    /// Writes zeros to part of one page, under DATA X, if it has any bytes. Returns pages newly allocated.
    async fn zero_within(self: &Rc<Self>, ino: Ino, layout: &Layout, offset: u64, length: u64) -> Result<u64> {
        if length == 0 {
            return Ok(0);
        }
        let range = pages_of(offset, length);
        self.ensure_layout(ino, layout, range).await?;
        let hole = self.with_file(ino, |file| file.extent_of(range.lo).is_none());
        let cached = self.cache.borrow().presence(ino, range.lo) != Presence::Absent;
        if hole && !cached {
            return Ok(0);
        }
        let allocated = self.ensure_allocated(ino, layout, range, false).await?;
        let zeros = vec![0; length as usize];
        loop {
            match self.try_copy_in(ino, offset, &zeros) {
                Copied::Done => return Ok(allocated),
                Copied::Fetch(pages) => self.fetch_pages(ino, layout, &pages).await?,
                Copied::Wait => self.cache_changed.wait().await,
                Copied::NoRoom => self.make_room().await,
            }
        }
    }

    /// Gives back whole pages, under DATA X: they are holes afterwards.
    pub(crate) async fn free_pages(self: &Rc<Self>, ino: Ino, layout: &Layout, range: Range) -> Result<u64> {
        if range.is_empty() {
            return Ok(0);
        }
        // No write-back of these pages may be in flight when their extents are freed.
        self.wait_for_write_back(ino, range).await;
        {
            let mut cache = self.cache.borrow_mut();
            for page in cache.pages_in(ino, range) {
                cache.forget(ino, page);
            }
        }
        self.cache_changed.notify();
        let mut freed = 0;
        let spare: u64 = self.with_file(ino, |file| file.take_spare(range)).iter().map(|part| part.len()).sum();
        for (slot, hull) in hulls(layout, range) {
            match self.call(slot, Request::Free { ino, range: hull }).await? {
                Reply::Freed(pages) if pages <= hull.len().min(u64::MAX / PAGE_SIZE) => freed += pages,
                _ => return Err(Errno::EPROTO),
            }
        }
        self.with_file(ino, |file| file.forget_layout(range));
        // What was spare never counted.
        Ok(freed.saturating_sub(spare))
    }

    /// fallocate(2): allocate, punch a hole, zero a range, with or without keeping the size.
    ///
    /// # Errors
    /// EOPNOTSUPP for other modes; ENOSPC; EFBIG.
    pub async fn fallocate(
        self: &Rc<Self>,
        caller: Caller,
        handle: u64,
        mode: i32,
        offset: u64,
        length: u64,
    ) -> Result<()> {
        let ino = self.open_file(handle)?.ino;
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let punch = mode & libc::FALLOC_FL_PUNCH_HOLE != 0;
        let zero = mode & libc::FALLOC_FL_ZERO_RANGE != 0;
        if mode & !(libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0
            || (punch && (zero || !keep_size))
        {
            return Err(Errno::EOPNOTSUPP);
        }
        if length == 0 {
            return Err(Errno::EINVAL);
        }
        let end = offset.checked_add(length).filter(|end| *end <= FILE_MAX).ok_or(Errno::EFBIG)?;
        let layout = self.layout(ino).await?;
        let attribute_pin = loop {
            let pin = self.pin(Resource::attr(ino), Range::UNIT, Range::UNIT, PinKind::Exclusive).await?;
            let attributes = self.pinned_attributes(ino)?;
            if attributes.kind != FileKind::Regular {
                return Err(Errno::ENXIO);
            }
            if self.takes_privileges(caller, ino, &attributes).await? {
                drop(pin);
                self.change(caller, ino, Change { clear_set_id: true, ..Default::default() }).await?;
                continue;
            }
            break pin;
        };
        let size = self.pinned_attributes(ino)?.size;
        let range = pages_of(offset, length);
        let pins = self.pin_data(ino, &layout, range, PinKind::Exclusive, false).await?;
        let mut pages = 0;
        if punch || zero {
            let whole = Range::new(offset.div_ceil(PAGE_SIZE), end / PAGE_SIZE);
            if whole.lo > whole.hi {
                // Within one page.
                pages += self.zero_within(ino, &layout, offset, length).await? as i64;
            } else {
                pages += self.zero_within(ino, &layout, offset, whole.lo * PAGE_SIZE - offset).await? as i64;
                pages += self.zero_within(ino, &layout, whole.hi * PAGE_SIZE, end - whole.hi * PAGE_SIZE).await? as i64;
                pages -= self.free_pages(ino, &layout, whole).await? as i64;
            }
        }
        if !punch {
            // In steps, so that a long range neither makes one huge message nor holds the home's core for long.
            let mut made = RangeSet::default();
            let mut allocated = 0;
            let mut lo = range.lo;
            while lo < range.hi {
                let step = Range::new(lo, (lo + PIECE_MAX / PAGE_SIZE).min(range.hi));
                match self.allocate_step(ino, &layout, step, &mut made).await {
                    Ok(new) => allocated += new as i64,
                    Err(error) => {
                        // What a call that failed has taken must not keep the volume full. None of it was counted yet.
                        for part in made.iter() {
                            self.free_pages(ino, &layout, part).await?;
                        }
                        self.note_write(ino, 0, pages);
                        return Err(error);
                    }
                }
                lo = step.hi;
            }
            pages += allocated;
        }
        for pin in pins.iter().chain([&attribute_pin]) {
            pin.check()?;
        }
        if !keep_size && end > size {
            self.note_size(ino, end, pages);
        } else {
            self.note_write(ino, 0, pages);
        }
        Ok(())
    }

    /// Allocates pages of zeros where there are holes; notes in `made` which those were, before it tries.
    async fn allocate_step(
        self: &Rc<Self>,
        ino: Ino,
        layout: &Layout,
        step: Range,
        made: &mut RangeSet,
    ) -> Result<u64> {
        self.ensure_layout(ino, layout, step).await?;
        self.with_file(ino, |file| {
            let spare: Vec<Range> = file.spare.iter().filter(|part| part.overlaps(step)).collect();
            let holes = file.without_extent(step).into_iter().chain(spare.into_iter().map(|part| part.intersect(step)));
            holes.for_each(|part| made.insert(part));
        });
        self.ensure_allocated(ino, layout, step, true).await
    }

    /// SEEK_HOLE and SEEK_DATA: the next hole or data at or behind `offset`.
    ///
    /// # Errors
    /// ENXIO at or behind the end of file, and where no data follows.
    pub async fn seek(self: &Rc<Self>, ino: Ino, offset: u64, hole: bool) -> Result<u64> {
        let layout = self.layout(ino).await?;
        let _attribute_pin = self.pin(Resource::attr(ino), Range::UNIT, Range::UNIT, PinKind::Shared).await?;
        let size = self.pinned_attributes(ino)?.size;
        if offset >= size {
            return Err(Errno::ENXIO);
        }
        let range = Range::new(offset / PAGE_SIZE, size.div_ceil(PAGE_SIZE));
        let _pins = self.pin_data(ino, &layout, range, PinKind::Shared, false).await?;
        let mut extents = Vec::new();
        for (slot, hull) in hulls(&layout, range) {
            let (found, _) = self.request_extents(slot, Request::Layout { ino, range: hull }).await?;
            for extent in found {
                if extent.committed {
                    extents.push((extent.page, extent.pages));
                    continue;
                }
                // Not committed: data where this node has written, spare elsewhere.
                let pages = self.cache.borrow().pages_in(ino, Range::new(extent.page, extent.page + extent.pages));
                extents.extend(pages.into_iter().map(|page| (page, 1)));
            }
        }
        extents.sort_unstable();
        let mut position = range.lo;
        for (page, pages) in extents {
            if page > position {
                if hole {
                    break;
                }
                position = page;
            }
            if !hole && position < page + pages {
                return Ok((position * PAGE_SIZE).max(offset));
            }
            position = position.max(page + pages);
        }
        if hole { Ok((position * PAGE_SIZE).clamp(offset, size)) } else { Err(Errno::ENXIO) }
    }

    /// copy_file_range(2), piece by piece; returns what was copied.
    pub async fn copy_range(
        self: &Rc<Self>,
        caller: Caller,
        from: u64,
        from_offset: u64,
        to: u64,
        to_offset: u64,
        length: u64,
    ) -> Result<usize> {
        let source = self.open_file(from)?.ino;
        let target = self.open_file(to)?.ino;
        // One reply says how much: a bounded part of a long copy keeps the call killable.
        const STEP_MAX: u64 = 16 << 20;
        let length = length.min(STEP_MAX);
        if source == target && from_offset < to_offset + length && to_offset < from_offset + length {
            return Err(Errno::EINVAL);
        }
        let mut copied = 0;
        while copied < length {
            let piece = PIECE_MAX.min(length - copied);
            let data = self.read_file(source, from_offset + copied, piece, false).await?;
            if data.is_empty() {
                break;
            }
            match self.write_file(caller, target, to_offset + copied, &data, false, false).await {
                Ok(written) => copied += written as u64,
                Err(error) if copied == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(copied as usize)
    }

    /// Makes every write to the file that has returned on any node, and its name, survive the death of any daemon.
    ///
    /// # Errors
    /// EIO when acknowledged data was lost, once per loss; ENOSPC never (space is taken before a page is dirtied).
    pub async fn fsync(self: &Rc<Self>, ino: Ino, _data_only: bool) -> Result<()> {
        let mut slots: Vec<Slot> = match self.layout(ino).await {
            Ok(layout) => {
                // Slots that store no part of the file need not be there, nor be asked.
                let attributes = self.attributes(ino).await?;
                let chunks = attributes.size.div_ceil(layout.chunk_pages as u64 * PAGE_SIZE);
                layout.slots.iter().copied().take(chunks.min(Layout::MAX_WIDTH as u64) as usize).collect()
            }
            // Directories and the like have no data.
            Err(Errno::EINVAL) => Vec::new(),
            Err(error) => return Err(error),
        };
        if self.mutated("sync_own_pages_only") {
            slots.retain(|slot| *slot == self.slot());
        }
        slots.push(ino.home());
        slots.sort_unstable();
        slots.dedup();
        let calls = slots.into_iter().map(|slot| -> std::pin::Pin<Box<dyn Future<Output = Result<Reply>>>> {
            let volume = self.clone();
            Box::pin(async move { volume.call(slot, Request::Sync { ino }).await })
        });
        for outcome in crate::executor::join_all(calls.collect()).await {
            outcome?;
        }
        match self.with_file(ino, |file| file.error.take()) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// See [`FileState::writing`].
struct WritingRange {
    volume: Rc<Volume>,
    ino: Ino,
    range: Range,
}

impl Drop for WritingRange {
    fn drop(&mut self) {
        self.volume.with_file(self.ino, |file| {
            if let Some(index) = file.writing.iter().position(|other| *other == self.range) {
                file.writing.swap_remove(index);
            }
        });
    }
}

/// Whether a write by an ordinary user changes this mode: set-group-id without group execute means something else.
pub(crate) fn clears_set_id(mode: u32) -> bool {
    mode & 0o4000 != 0 || mode & 0o2010 == 0o2010
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(page: u64, pages: u64, committed: bool) -> Extent {
        Extent { page, arena_page: 1000 + page, pages, committed }
    }

    #[test]
    fn what_is_allocated_and_neither_committed_nor_dirty_is_spare() {
        let mut file = FileState::default();
        file.learn_new(Range::new(0, 20), &[extent(0, 4, true), extent(4, 10, false)], |page| page == 5);
        assert_eq!(file.spare.iter().collect::<Vec<_>>(), [Range::new(4, 5), Range::new(6, 14)]);
        assert_eq!(file.pages_allocated(Range::new(0, 20)), 14);
        assert!(file.known.contains(Range::new(0, 20)), "the rest is known to be holes");
        // Taken into use, and asked for again by a write that was under way: it does not become spare a second time.
        assert_eq!(file.take_spare(Range::new(6, 8)), [Range::new(6, 8)]);
        file.learn_new(Range::new(0, 20), &[extent(0, 4, true), extent(4, 10, false)], |_| false);
        assert_eq!(file.spare.iter().collect::<Vec<_>>(), [Range::new(4, 5), Range::new(8, 14)]);
        // A hole that was allocated since.
        file.learn_new(Range::new(14, 16), &[extent(14, 2, false)], |_| false);
        assert!(file.spare.contains(Range::new(8, 16)));
    }

    #[test]
    fn a_lock_that_goes_takes_what_was_not_committed_along() {
        let mut file = FileState::default();
        file.learn_new(Range::new(0, 20), &[extent(0, 4, true), extent(4, 10, false)], |page| page < 8);
        file.commit(Range::new(4, 6));
        file.spare.insert(Range::new(2, 3));
        file.asked.push((1, 0, RangeSet::default()));
        file.asked[0].2.insert(Range::new(0, 20));
        file.forget_uncommitted(0, Range::new(0, 12));
        assert!(file.extent_of(5).is_some_and(|extent| extent.committed));
        assert!(file.extent_of(6).is_none() && file.extent_of(11).is_none());
        assert_eq!(file.spare.iter().collect::<Vec<_>>(), [Range::new(12, 14)]);
        assert_eq!(file.known.missing(Range::new(0, 20)), [Range::new(6, 12)]);
        // Freed: nothing of it is spare, and what an answer under way says of it does not count.
        file.forget_layout(Range::new(12, 13));
        assert_eq!(file.spare.iter().collect::<Vec<_>>(), [Range::new(13, 14)]);
        assert_eq!(file.asked[0].2.iter().collect::<Vec<_>>(), [Range::new(13, 20)]);
    }

    #[test]
    fn what_goes_with_one_servers_lock_leaves_the_others_alone() {
        let layout = Layout { slots: vec![0, 1], chunk_pages: 4 };
        let mut file = FileState { layout: Some(Rc::new(layout)), ..Default::default() };
        file.learn_new(Range::new(0, 16), &[extent(0, 16, false)], |_| false);
        file.asked.push((1, 1, RangeSet::default()));
        file.asked[0].2.insert(Range::new(0, 16));
        assert_eq!(file.spare_of(1, Range::new(2, 14)), [Range::new(4, 8), Range::new(12, 14)]);
        file.forget_uncommitted(0, Range::new(0, 16));
        assert_eq!(file.spare.iter().collect::<Vec<_>>(), [Range::new(4, 8), Range::new(12, 16)]);
        assert!(file.extent_of(0).is_none() && file.extent_of(4).is_some());
        assert!(file.asked[0].2.contains(Range::new(4, 8)));
    }
}
