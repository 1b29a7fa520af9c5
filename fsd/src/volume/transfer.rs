//! Pages between cache and arenas: fetch, write-back, vacating a range, hand-over.
//!
//! Runs that are contiguous in the arena and in the cache travel in one operation. A page is *under write-back* from
//! before its bytes are read until its home has committed them; whoever wants to vacate, free or hand over
//! a range first waits for that to end.

use super::data::{FileState, hulls, pieces};
use super::*;
use crate::cache::{Presence, SlotIndex};
use crate::metrics::{Direction, FabricOperation};
use verbfs_protocol::lock::Successor;

/// Most pages in one batch of write-back: one COMMIT.
const BATCH_PAGES: usize = 1024;
/// Most spare pages that a hand-over names: 1 GiB.
pub(crate) const SPARE_PAGES_MAX: u64 = 1 << 18;

/// One one-sided operation.
struct Run {
    slot: Slot,
    /// First page at `slot`: of its arena, or of its cache.
    page: u64,
    first: SlotIndex,
    pages: usize,
}

/// Joins neighbours.
fn runs(mut pages: Vec<(Slot, u64, SlotIndex)>) -> Vec<Run> {
    pages.sort_unstable_by_key(|(slot, page, _)| (*slot, *page));
    let mut runs: Vec<Run> = Vec::new();
    for (slot, page, index) in pages {
        if let Some(last) = runs.last_mut()
            && last.slot == slot
            && last.page + last.pages as u64 == page
            && last.first.offset() + last.pages * PAGE_SIZE as usize == index.offset()
        {
            last.pages += 1;
            continue;
        }
        runs.push(Run { slot, page, first: index, pages: 1 });
    }
    runs
}

impl Volume {
    /// Fetches committed pages that are absent, under DATA pins. Pages that others fetch meanwhile are left to them.
    pub(crate) async fn fetch_pages(self: &Rc<Self>, ino: Ino, layout: &Layout, pages: &[u64]) -> Result<()> {
        let mut wanted = Vec::new();
        let mut reserved = Vec::new();
        {
            let files = self.files.borrow();
            let Some(file) = files.get(&ino) else { return Ok(()) };
            let mut cache = self.cache.borrow_mut();
            for &page in pages {
                let Some(extent) = file.extent_of(page) else { continue };
                if cache.presence(ino, page) != Presence::Absent {
                    continue;
                }
                let Some(index) = cache.reserve(ino, page) else { break };
                wanted.push((layout.slot_of_page(page), extent.arena_page, index));
                reserved.push(index);
            }
        }
        if reserved.is_empty() {
            // Somebody else is at it, or the cache is full.
            if self.cache.borrow().used() == self.cache.borrow().capacity() {
                self.make_room().await;
            }
            return Ok(());
        }
        let outcome = self.read_runs(runs(wanted)).await;
        {
            let mut cache = self.cache.borrow_mut();
            for index in reserved {
                if outcome.is_err() {
                    cache.abandon(index);
                } else {
                    cache.fetched(index);
                }
            }
        }
        self.cache_changed.notify();
        outcome
    }

    /// Reads from arenas into the cache. Returns when no operation is under way any more, also after an error.
    async fn read_runs(self: &Rc<Self>, runs: Vec<Run>) -> Result<()> {
        self.metrics.cache_misses.add(runs.iter().map(|run| run.pages as u64).sum());
        self.move_runs(runs, FabricOperation::Read).await
    }

    /// Writes from the cache into arenas; otherwise as [`Volume::read_runs`].
    async fn write_runs(self: &Rc<Self>, runs: Vec<Run>) -> Result<()> {
        self.metrics.write_back_pages.add(runs.iter().map(|run| run.pages as u64).sum());
        self.move_runs(runs, FabricOperation::Write).await
    }

    async fn move_runs(self: &Rc<Self>, runs: Vec<Run>, operation: FabricOperation) -> Result<()> {
        let mut waiting = Vec::new();
        let mut outcome = Ok(());
        for run in runs {
            let moved = if run.slot == self.slot() {
                self.copy_run(&run, operation)
            } else {
                let key = self.arena_keys.borrow().get(&run.slot).copied().ok_or(Errno::EIO);
                key.and_then(|key| self.post_run(&run, key, operation)).map(|receiver| waiting.push(receiver))
            };
            if moved.is_err() {
                outcome = moved;
                break;
            }
        }
        self.finish(waiting).await.and(outcome)
    }

    /// Between the cache and this node's own arena.
    fn copy_run(&self, run: &Run, operation: FabricOperation) -> Result<()> {
        self.check_arena(run.page, run.pages)?;
        let extents = self.extents.borrow();
        let mut cache = self.cache.borrow_mut();
        for page in 0..run.pages {
            let bytes = cache.bytes(run.first.plus(page));
            let offset = (run.page + page as u64) * PAGE_SIZE;
            match operation {
                FabricOperation::Read => extents.arena().copy_out(offset, bytes),
                _ => extents.arena().copy_in(offset, bytes),
            }
        }
        Ok(())
    }

    /// Between the cache and the memory of `key` of another node.
    fn post_run(&self, run: &Run, key: u32, operation: FabricOperation) -> Result<Receiver<bool>> {
        let length = run.pages * PAGE_SIZE as usize;
        let read = operation == FabricOperation::Read;
        let receiver = self.post(run.slot, read, run.first.offset(), key, run.page * PAGE_SIZE, length)?;
        self.metrics.fabric_operations[operation].increment();
        self.metrics.fabric_bytes[operation].add(length as u64);
        Ok(receiver)
    }

    fn check_arena(&self, page: u64, pages: usize) -> Result<()> {
        if page + pages as u64 <= self.extents.borrow().arena().total_pages() { Ok(()) } else { Err(Errno::EIO) }
    }

    fn post(
        &self,
        slot: Slot,
        read: bool,
        cache_offset: usize,
        key: u32,
        offset: u64,
        length: usize,
    ) -> Result<Receiver<bool>> {
        let work = self.number();
        let (sender, receiver) = oneshot();
        let mut transport = self.transport.borrow_mut();
        let transport = transport.as_mut().ok_or(Errno::EIO)?;
        let posted = if read {
            transport.read(slot, cache_offset, key, offset, length, work)
        } else {
            transport.write(slot, cache_offset, key, offset, length, work)
        };
        match posted {
            Ok(()) => {
                self.transfers.borrow_mut().insert(work, sender);
                Ok(receiver)
            }
            Err(error) => {
                tracing::warn!(slot, %error, "a one-sided operation could not be posted");
                Err(Errno::EIO)
            }
        }
    }

    async fn finish(&self, waiting: Vec<Receiver<bool>>) -> Result<()> {
        let mut ok = true;
        for receiver in waiting {
            ok &= receiver.await.unwrap_or(false);
        }
        if ok { Ok(()) } else { Err(Errno::EIO) }
    }

    /// Writes dirty pages back and has their homes commit them. Pages already under write-back are left to whoever does it.
    pub(crate) async fn write_back(self: &Rc<Self>, ino: Ino, pages: &[u64]) -> Result<()> {
        let layout = self.layout(ino).await?;
        let mut outcome = Ok(());
        for batch in pages.chunks(BATCH_PAGES) {
            outcome = self.write_back_batch(ino, &layout, batch).await.and(outcome);
        }
        outcome
    }

    async fn write_back_batch(self: &Rc<Self>, ino: Ino, layout: &Layout, pages: &[u64]) -> Result<()> {
        // Pages that came by hand-over bring no layout.
        let unknown: Vec<u64> = {
            let files = self.files.borrow();
            let file = files.get(&ino);
            pages.iter().copied().filter(|page| file.and_then(|file| file.extent_of(*page)).is_none()).collect()
        };
        for page in unknown {
            if self.cache.borrow().dirty_in(ino, Range::new(page, page + 1)).is_empty() {
                continue;
            }
            let allocated = self.ensure_allocated(ino, layout, Range::new(page, page + 1), false).await?;
            if allocated > 0 {
                self.note_write(ino, 0, allocated as i64);
            }
        }
        let mut writing = Vec::new();
        let mut transfers = Vec::new();
        {
            let files = self.files.borrow();
            let Some(file) = files.get(&ino) else { return Ok(()) };
            let mut cache = self.cache.borrow_mut();
            for &page in pages {
                let Presence::Ready(index) = cache.presence(ino, page) else { continue };
                if !cache.is_dirty(index) || cache.is_writing(index) || cache.is_transit(index) {
                    continue;
                }
                let Some(extent) = file.extent_of(page) else { continue };
                cache.begin_write_back(index);
                writing.push((page, index));
                transfers.push((layout.slot_of_page(page), extent.arena_page, index));
            }
        }
        if writing.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        let guard =
            Writing { volume: self.clone(), pages: RefCell::new(writing.iter().map(|(_, index)| *index).collect()) };
        let mut outcome = self.write_runs(runs(transfers)).await;
        if outcome.is_ok() {
            let mut by_slot: std::collections::BTreeMap<Slot, Vec<Range>> = Default::default();
            for (page, _) in &writing {
                let ranges = by_slot.entry(layout.slot_of_page(*page)).or_default();
                match ranges.last_mut() {
                    Some(last) if last.hi == *page => last.hi += 1,
                    _ => ranges.push(Range::new(*page, *page + 1)),
                }
            }
            for (slot, ranges) in by_slot {
                match self.call(slot, Request::Commit { ino, ranges: ranges.clone() }).await {
                    Ok(_) => {
                        if let Some(file) = self.files.borrow_mut().get_mut(&ino) {
                            for range in ranges {
                                file.commit(range);
                            }
                        }
                    }
                    Err(error) => outcome = Err(error),
                }
            }
        }
        guard.finish(outcome.is_ok());
        self.metrics.write_back.record(began.elapsed());
        if outcome.is_err() {
            self.metrics.write_back_errors.increment();
        }
        outcome
    }

    /// Waits until no page of the range is under write-back.
    pub(crate) async fn wait_for_write_back(self: &Rc<Self>, ino: Ino, range: Range) {
        loop {
            let busy = {
                let cache = self.cache.borrow();
                cache.writing_pages() > 0
                    && cache
                        .pages_in(ino, range)
                        .into_iter()
                        .any(|page| cache.slot_of(ino, page).is_some_and(|slot| cache.is_writing(slot)))
            };
            if !busy {
                return;
            }
            self.cache_changed.wait().await;
        }
    }

    /// Has everything that is dirty in a range of one server written back: what was dirty at the call, once. Waits for
    /// hand-overs towards this node first: their pages are dirty data of this file too.
    pub(crate) async fn flush_range(self: &Rc<Self>, resource: Resource, range: Range) -> Result<()> {
        // Towards this node, their pages are dirty data of this file too; away from it, they are until the successor has them.
        while self.is_taking_over(resource, range) || self.is_handing_over(resource.ino, range) {
            self.cache_changed.wait().await;
        }
        self.wait_for_write_back(resource.ino, range).await;
        let dirty = self.cache.borrow().dirty_in(resource.ino, range);
        if dirty.is_empty() {
            return Ok(());
        }
        let dirty = self.stored_at(resource.ino, resource.server, dirty).await?;
        let outcome = self.write_back(resource.ino, &dirty).await;
        // Another task may have been writing some of them.
        self.wait_for_write_back(resource.ino, range).await;
        outcome
    }

    fn is_handing_over(&self, ino: Ino, range: Range) -> bool {
        let cache = self.cache.borrow();
        cache
            .pages_in(ino, range)
            .into_iter()
            .any(|page| cache.slot_of(ino, page).is_some_and(|slot| cache.is_transit(slot)))
    }

    /// Those pages that a server stores.
    async fn stored_at(self: &Rc<Self>, ino: Ino, server: Slot, mut pages: Vec<u64>) -> Result<Vec<u64>> {
        if pages.is_empty() {
            return Ok(pages);
        }
        let layout = self.layout(ino).await?;
        pages.retain(|page| layout.slot_of_page(*page) == server);
        Ok(pages)
    }

    /// Does what a revoke of DATA asks: unmap, write back, drop. Or, with a successor: keeps the pages for it, and
    /// returns the message that tells it where they are.
    pub(crate) async fn vacate_data(
        self: &Rc<Self>,
        resource: Resource,
        range: Range,
        held: Mode,
        grant: GrantId,
        keep: Option<Mode>,
        successor: Option<Successor>,
    ) -> Option<(Slot, HandOver)> {
        let ino = resource.ino;
        // 1. The kernel's pages. What it had dirty comes back as writes through the fence.
        if held == Mode::X || keep.is_none() {
            self.sweep_kernel(ino, range).await;
        }
        self.with_vacating(ino, |vacating| vacating.push(range));
        let outcome = self.vacate_pages(resource, range, held, grant, keep, successor).await;
        self.with_vacating(ino, |vacating| {
            if let Some(index) = vacating.iter().position(|other| *other == range) {
                vacating.swap_remove(index);
            }
        });
        self.cache_changed.notify();
        self.prune_file(ino);
        outcome
    }

    /// Has the kernel drop what it may cache of a range. Pages being filled whose lock is still awaited are not among
    /// them: they hold nothing yet, and waiting for their page locks would be waiting for this very fence.
    pub(crate) async fn sweep_kernel(self: &Rc<Self>, ino: Ino, range: Range) {
        let cached: Vec<Range> = {
            let mut files = self.files.borrow_mut();
            let Some(file) = files.get_mut(&ino) else { return };
            let cached =
                file.kernel.iter().filter(|piece| piece.overlaps(range)).map(|piece| piece.intersect(range)).collect();
            file.kernel.remove(range);
            cached
        };
        for piece in cached {
            let sweep = (piece, Instant::now());
            self.files.borrow_mut().entry(ino).or_default().sweeping.push(sweep);
            self.invalidate_kernel(ino, piece).await;
            if let Some(file) = self.files.borrow_mut().get_mut(&ino)
                && let Some(index) = file.sweeping.iter().position(|other| *other == sweep)
            {
                file.sweeping.swap_remove(index);
            }
        }
    }

    fn with_vacating(&self, ino: Ino, f: impl FnOnce(&mut Vec<Range>)) {
        f(&mut self.files.borrow_mut().entry(ino).or_default().vacating);
    }

    async fn vacate_pages(
        self: &Rc<Self>,
        resource: Resource,
        range: Range,
        held: Mode,
        grant: GrantId,
        keep: Option<Mode>,
        successor: Option<Successor>,
    ) -> Option<(Slot, HandOver)> {
        let ino = resource.ino;
        // 2. Nothing in flight.
        self.wait_for_write_back(ino, range).await;
        let cached = self.cache.borrow().pages_in(ino, range);
        let pages = match self.stored_at(ino, resource.server, cached).await {
            Ok(pages) => pages,
            Err(error) => {
                tracing::error!(%resource, %range, ?error, "layout unknown while vacating; its pages are lost");
                self.lose(resource, range, held);
                return None;
            }
        };
        // A hand-over that was taken back: the pages are this node's again.
        {
            let mut cache = self.cache.borrow_mut();
            for page in &pages {
                if let Some(index) = cache.slot_of(ino, *page)
                    && cache.is_transit(index)
                {
                    cache.end_transit(index);
                }
            }
        }
        // 3. To the successor, if there is one. What is spare stays this node's until the fence is given up for it.
        let spare = self.with_file(ino, |file| file.spare_of(resource.server, range));
        if let Some(successor) = successor
            && held == Mode::X
            && pages.len() <= RUNS_MAX
            && spare.len() <= RUNS_MAX
            && spare.iter().map(|part| part.len()).sum::<u64>() <= SPARE_PAGES_MAX
        {
            let mut message = HandOver {
                resource,
                new_grant: successor.grant,
                old_grant: grant,
                range,
                key: self.cache_key,
                pages: Vec::with_capacity(pages.len()),
                spare,
            };
            {
                let mut cache = self.cache.borrow_mut();
                for page in &pages {
                    if let Some(index) = cache.slot_of(ino, *page) {
                        let dirty = cache.begin_transit(index) && !self.mutated("hand_over_drops_dirty");
                        message.pages.push(HandOverPage { page: *page, offset: index.offset() as u64, dirty });
                    }
                }
            }
            self.metrics.hand_overs[Direction::Sent].increment();
            self.metrics.hand_over_pages[Direction::Sent].add(message.pages.len() as u64);
            self.cap_size_floor(ino, range.lo);
            return Some((successor.slot, message));
        }
        // 4. Home.
        if !self.mutated("no_write_back_before_release") {
            loop {
                let dirty: Vec<u64> = {
                    let cache = self.cache.borrow();
                    pages
                        .iter()
                        .copied()
                        .filter(|page| cache.slot_of(ino, *page).is_some_and(|slot| cache.is_dirty(slot)))
                        .collect()
                };
                if dirty.is_empty() {
                    // Background write-back may have got there first: wait for its commit too.
                    self.wait_for_write_back(ino, range).await;
                    let cache = self.cache.borrow();
                    if pages.iter().all(|page| cache.slot_of(ino, *page).is_none_or(|slot| !cache.is_dirty(slot))) {
                        break;
                    }
                    continue;
                }
                if let Err(error) = self.write_back(ino, &dirty).await {
                    tracing::error!(%resource, %range, ?error, "write-back before a release failed: {} pages lost, the next fsync says so", dirty.len());
                    self.lose(resource, range, held);
                    break;
                }
                self.wait_for_write_back(ino, range).await;
            }
        }
        // 5. What the new mode does not allow goes.
        if let Some(file) = self.files.borrow_mut().get_mut(&ino) {
            file.forget_uncommitted(resource.server, range);
        }
        if keep.is_none() {
            self.cap_size_floor(ino, range.lo);
            if !self.mutated("keep_pages_after_revoke") {
                self.forget_pages(resource, range);
            }
        }
        None
    }

    /// Drops pages and layout of a range that one server stores.
    fn forget_pages(&self, resource: Resource, range: Range) {
        let ino = resource.ino;
        let mut files = self.files.borrow_mut();
        let Some(file) = files.get_mut(&ino) else { return };
        // Also where nothing is known: an answer may be on its way.
        file.void_answers(Some(resource.server), range);
        for part in file.spare_of(resource.server, range) {
            file.spare.remove(part);
        }
        let parts: Vec<Range> = match &file.layout {
            Some(layout) if layout.slots.len() > 1 => {
                let mut parts: Vec<Range> = Vec::new();
                // Only where something is known: a range may reach to the end of all files.
                let extents = file.extents.values().map(|extent| Range::new(extent.page, extent.page + extent.pages));
                let cached = self
                    .cache
                    .borrow()
                    .pages_in(ino, range)
                    .into_iter()
                    .map(|page| Range::new(page, page + 1))
                    .collect::<Vec<_>>();
                for piece in file.known.iter().chain(extents).chain(cached).filter(|piece| piece.overlaps(range)) {
                    parts.extend(
                        pieces(layout, piece.intersect(range))
                            .into_iter()
                            .filter(|(slot, _)| *slot == resource.server)
                            .map(|(_, piece)| piece),
                    );
                }
                parts
            }
            _ => vec![range],
        };
        let mut cache = self.cache.borrow_mut();
        for part in parts {
            file.forget_layout(part);
            for page in cache.pages_in(ino, part) {
                cache.forget(ino, page);
            }
        }
    }

    /// The successor has everything.
    pub(crate) fn drop_transit(&self, resource: Resource, range: Range) {
        self.forget_pages(resource, range);
        self.cache_changed.notify();
        self.prune_file(resource.ino);
    }

    /// Pages of a range on one server whose bytes nobody has committed: dirty, under write-back, or kept for a successor.
    fn unsaved_in(&self, resource: Resource, range: Range) -> usize {
        let layout = self.files.borrow().get(&resource.ino).and_then(|file| file.layout.clone());
        let cache = self.cache.borrow();
        let unsaved = |page: &u64| {
            layout.as_ref().is_none_or(|layout| layout.slot_of_page(*page) == resource.server)
                && cache
                    .slot_of(resource.ino, *page)
                    .is_some_and(|slot| cache.is_dirty(slot) || cache.is_writing(slot) || cache.is_transit_dirty(slot))
        };
        cache.pages_in(resource.ino, range).iter().filter(|page| unsaved(page)).count()
    }

    /// A lock went without its data having gone home: the dirty part is lost, and fsync says so.
    pub(crate) fn lose(&self, resource: Resource, range: Range, mode: Mode) {
        match resource.class {
            Class::Data => {
                let lost = self.unsaved_in(resource, range);
                if lost > 0 && mode == Mode::X {
                    tracing::error!(%resource, %range, lost, "dirty pages lost with their lock");
                    self.files.borrow_mut().entry(resource.ino).or_default().error = Some(Errno::EIO);
                    self.metrics.write_back_errors.add(lost as u64);
                }
                self.cap_size_floor(resource.ino, range.lo);
                self.forget_pages(resource, range);
                self.cache_changed.notify();
            }
            Class::Name => self.names.borrow_mut().drop_range(resource.ino, range),
            Class::Attr => {
                if self.take_report(resource.ino).is_some_and(|report| report.exact_size || report.size > 0) {
                    self.files.borrow_mut().entry(resource.ino).or_default().error = Some(Errno::EIO);
                }
            }
            Class::Open | Class::Rename => {}
        }
    }

    /// Fetches the pages of a hand-over; `false` when they cannot be had.
    pub(crate) async fn fetch_hand_over(self: &Rc<Self>, from: Slot, message: &HandOver) -> bool {
        let ino = message.resource.ino;
        // The range of a striped file covers pages of other servers too: those are not this hand-over's.
        let layout = self.files.borrow().get(&ino).and_then(|file| file.layout.clone());
        let stored_there =
            |page: u64| layout.as_ref().is_some_and(|layout| layout.slot_of_page(page) == message.resource.server);
        if !message.pages.iter().all(|page| stored_there(page.page)) {
            tracing::debug!(from, resource = %message.resource, "a hand-over of pages that lie elsewhere, or of a file not known any more");
            return false;
        }
        self.cap_size_floor(ino, message.range.lo);
        let mut wanted = Vec::new();
        let mut reserved = Vec::new();
        for page in &message.pages {
            let index = loop {
                let index = {
                    let mut cache = self.cache.borrow_mut();
                    if cache.presence(ino, page.page) != Presence::Absent {
                        cache.forget(ino, page.page);
                    }
                    cache.reserve(ino, page.page)
                };
                match index {
                    Some(index) => break index,
                    None => self.make_room().await,
                }
            };
            reserved.push((index, page.dirty));
            wanted.push((from, page.offset / PAGE_SIZE, index));
        }
        let posted: Vec<_> =
            runs(wanted).iter().map(|run| self.post_run(run, message.key, FabricOperation::Read)).collect();
        self.metrics.hand_over_pages[Direction::Received].add(message.pages.len() as u64);
        let complete = posted.iter().all(|run| run.is_ok());
        let wanted = self.finish(posted.into_iter().flatten().collect()).await.is_ok() && complete;
        // Storage became current meanwhile: these bytes may be older.
        let ok = wanted && self.hand_overs.borrow().fetching.contains_key(&message.new_grant);
        if ok && let Some(file) = self.files.borrow_mut().get_mut(&ino) {
            // Of this server's pages only, and of none that is here: the rest is not the sender's to give.
            let layout = file.layout.clone();
            let parts = layout.iter().flat_map(|layout| message.spare.iter().flat_map(|spare| pieces(layout, *spare)));
            let cache = self.cache.borrow();
            for (_, part) in parts.filter(|(slot, _)| *slot == message.resource.server) {
                if cache.pages_in(ino, part).is_empty() {
                    file.spare.insert(part);
                }
            }
        }
        let mut cache = self.cache.borrow_mut();
        for (index, dirty) in reserved {
            if !ok {
                cache.abandon(index);
            } else if cache.fetched(index) && dirty {
                cache.mark_dirty(index);
            }
        }
        ok
    }

    /// Waits, when the cache is full, until something can be evicted.
    pub(crate) async fn make_room(self: &Rc<Self>) {
        self.start_write_back();
        let changed = self.cache_changed.wait();
        // A page may have become clean between the failure and this wait; look again soon in any case.
        let pause = self.executor.sleep(Duration::from_millis(20));
        let mut changed = std::pin::pin!(changed);
        let mut pause = std::pin::pin!(pause);
        std::future::poll_fn(|context| {
            if changed.as_mut().poll(context).is_ready() || pause.as_mut().poll(context).is_ready() {
                return std::task::Poll::Ready(());
            }
            std::task::Poll::Pending
        })
        .await
    }

    /// Writers wait while too much is dirty. Called before any pin is taken.
    pub(crate) async fn throttle(self: &Rc<Self>) {
        while self.cache.borrow().dirty_pages() >= self.options.dirty_limit {
            self.metrics.write_throttled.increment();
            self.make_room().await;
        }
    }

    pub(crate) fn start_write_back_if_needed(self: &Rc<Self>) {
        if self.cache.borrow().dirty_pages() >= self.options.dirty_background {
            self.start_write_back();
        }
    }

    /// Starts background write-back unless it runs.
    pub(crate) fn start_write_back(self: &Rc<Self>) {
        if self.flushing.replace(true) {
            return;
        }
        let volume = self.clone();
        self.spawn(async move {
            let files = volume.cache.borrow().dirty_files();
            for ino in files {
                let pages: Vec<u64> = {
                    let files = volume.files.borrow();
                    let vacating = files.get(&ino).map(|file: &FileState| file.vacating.clone()).unwrap_or_default();
                    volume
                        .cache
                        .borrow()
                        .dirty_in(ino, Range::ALL)
                        .into_iter()
                        .filter(|page| !vacating.iter().any(|range| range.lo <= *page && *page < range.hi))
                        .collect()
                };
                for batch in pages.chunks(BATCH_PAGES) {
                    // Whoever vacates meanwhile waits for pages under write-back; those not yet begun are its own to write.
                    let vacating = volume.files.borrow().get(&ino).is_some_and(|file| !file.vacating.is_empty());
                    if vacating {
                        break;
                    }
                    if let Err(error) = volume.write_back(ino, batch).await {
                        tracing::warn!(%ino, ?error, "background write-back failed; the pages stay dirty");
                        break;
                    }
                }
            }
            volume.flushing.set(false);
            volume.cache_changed.notify();
        });
    }

    /// Servers that store a file's pages, with the hull of `range` on each.
    pub(crate) fn data_resources(&self, ino: Ino, layout: &Layout, range: Range) -> Vec<(Resource, Range)> {
        hulls(layout, range).into_iter().map(|(slot, hull)| (Resource::data(ino, slot), hull)).collect()
    }
}

/// Pages under write-back: dirty again unless they were committed.
struct Writing {
    volume: Rc<Volume>,
    pages: RefCell<Vec<SlotIndex>>,
}

impl Writing {
    fn finish(&self, committed: bool) {
        let pages = self.pages.take();
        if pages.is_empty() {
            return;
        }
        let mut cache = self.volume.cache.borrow_mut();
        for index in pages {
            cache.end_write_back(index, committed);
        }
        drop(cache);
        self.volume.cache_changed.notify();
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.finish(false);
    }
}
