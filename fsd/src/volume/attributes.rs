//! Attributes under ATTR locks.
//!
//! The home keeps the record. A node that holds S or X caches it; a node that holds X or E may change
//! size and times without asking, and *reports* what it changed when the lock goes, is weakened or is
//! glimpsed. Effective attributes are the base the home gave plus the own, unreported changes.
//!
//! | held | base | size |
//! |---|---|---|
//! | S | exact | exact |
//! | X | exact | exact: base plus own changes |
//! | E | exact but for size, times, pages | a lower bound |
//!
//! mtime is not a maximum (LESSONS 8c): a write after utimes to the future lowers it. The home therefore
//! replaces mtime by what holders report, and takes the greatest only among reports since the last utimes.
//! Holders tell time by the home's clock as of the grant plus their own elapsed time.

use super::*;
use verbfs_lock::PinKind;

/// Where Linux keeps a file's capabilities.
pub(crate) const CAPABILITY_XATTR: &[u8] = b"security.capability";

#[derive(Clone, Debug, Default)]
pub(crate) struct AttributeState {
    /// What the home said; `None`: no such inode.
    base: Option<Attributes>,
    /// Changes not reported yet. `size` counts only if `sized`.
    report: AttributeReport,
    sized: bool,
    changed: bool,
    /// The base is of a file without capabilities: as long as it is held, nobody gives it any.
    no_capability: bool,
    /// The home's clock when it spoke, and ours.
    home_time: Option<(Time, Instant)>,
}

impl AttributeState {
    fn effective(&self) -> Option<Attributes> {
        let mut attributes = self.base.clone()?;
        if !self.changed {
            return Some(attributes);
        }
        if self.sized {
            attributes.size =
                if self.report.exact_size { self.report.size } else { attributes.size.max(self.report.size) };
        }
        if let Some(touched) = self.report.touched {
            attributes.mtime = touched;
            attributes.ctime = attributes.ctime.max(touched);
        }
        attributes.pages = attributes.pages.saturating_add_signed(self.report.pages_delta);
        attributes.truncate_generation = attributes.truncate_generation.saturating_add(self.report.truncations);
        Some(attributes)
    }
}

/// This host's wall clock.
pub(crate) fn wall_clock() -> Time {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Time { seconds: now.as_secs() as i64, nanoseconds: now.subsec_nanos() }
}

fn later(time: Time, by: Duration) -> Time {
    let nanoseconds = time.nanoseconds as u64 + by.subsec_nanos() as u64;
    Time {
        seconds: time.seconds.saturating_add((by.as_secs() + nanoseconds / 1_000_000_000) as i64),
        nanoseconds: (nanoseconds % 1_000_000_000) as u32,
    }
}

impl Volume {
    pub(crate) fn clock(&self) -> Time {
        wall_clock()
    }

    /// Now, by the clock of the inode's home as far as this node knows it.
    fn home_clock(&self, ino: Ino) -> Time {
        if ino.home() == self.slot() {
            return self.clock();
        }
        match self.attributes.borrow().get(&ino).and_then(|state| state.home_time) {
            Some((time, at)) => later(time, at.elapsed()),
            None => self.clock(),
        }
    }

    /// stat(2): exact, and no writer loses its lock over it.
    pub async fn attributes(self: &Rc<Self>, ino: Ino) -> Result<Attributes> {
        let options = locks::PinOptions { one_shot: true, ..Default::default() };
        if self.mutated("stat_without_glimpse") {
            let state = self.attributes.borrow().get(&ino).and_then(|state| state.effective());
            if let Some(attributes) = state {
                return Ok(attributes);
            }
        }
        let (pin, outcome) =
            self.pin_with(Resource::attr(ino), Range::UNIT, Range::UNIT, PinKind::Shared, options).await?;
        match outcome {
            locks::Outcome::Pinned => self.pinned_attributes(ino),
            locks::Outcome::Observed => {
                let answer = self.glimpse_answers.borrow_mut().remove(&pin.number());
                let attributes = *answer.flatten().ok_or(Errno::ESTALE)?;
                if attributes.ino != ino {
                    self.refuse(ino.home(), "attributes of another inode than was asked about");
                    return Err(Errno::EIO);
                }
                Ok(attributes)
            }
        }
    }

    /// Attributes while a pin on ATTR (or the OPEN lock, for what never changes) is held.
    pub(crate) fn pinned_attributes(&self, ino: Ino) -> Result<Attributes> {
        self.attributes.borrow().get(&ino).and_then(|state| state.effective()).ok_or(Errno::ESTALE)
    }

    /// Whether the inode exists, asked under the OPEN lock. An inode never comes into being twice.
    pub(crate) async fn attributes_exist(self: &Rc<Self>, ino: Ino) -> Result<bool> {
        if ino.home() == self.slot() {
            return Ok(self.stored_attributes(ino)?.is_some());
        }
        // The grant of OPEN said it, unless that is long ago.
        if let Some(file) = self.files.borrow().get(&ino)
            && (file.gone || file.layout.is_some())
        {
            return Ok(!file.gone);
        }
        match self.attributes(ino).await {
            Ok(attributes) => {
                if self.is_usable(&attributes.layout) {
                    self.files.borrow_mut().entry(ino).or_default().layout.get_or_insert(Rc::new(attributes.layout));
                }
                Ok(true)
            }
            Err(Errno::ESTALE) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A layout, which may come from a peer, that data can be found by.
    pub(crate) fn is_usable(&self, layout: &Layout) -> bool {
        layout.is_valid() && layout.slots.iter().all(|slot| self.options.members.contains(slot))
    }

    /// The layout of a file; it never changes while the inode lives.
    pub(crate) async fn layout(self: &Rc<Self>, ino: Ino) -> Result<Rc<Layout>> {
        if let Some(layout) = self.files.borrow().get(&ino).and_then(|file| file.layout.clone()) {
            return Ok(layout);
        }
        let attributes = if ino.home() == self.slot() {
            self.stored_attributes(ino)?.ok_or(Errno::ESTALE)?
        } else {
            self.attributes(ino).await?
        };
        if !self.is_usable(&attributes.layout) {
            return Err(Errno::EINVAL);
        }
        let layout = Rc::new(attributes.layout);
        self.files.borrow_mut().entry(ino).or_default().layout = Some(layout.clone());
        Ok(layout)
    }

    /// GRANT of ATTR brought these; `held` is what was held before it.
    pub(crate) fn adopt_attributes(
        &self,
        ino: Ino,
        held: Option<Mode>,
        attributes: Option<Attributes>,
        home_time: Option<Time>,
    ) {
        // What is held already bounds the size: under X this node knows it better, under S and E nobody made the file smaller.
        let mut states = self.attributes.borrow_mut();
        let state = states.entry(ino).or_default();
        let known = state.base.as_ref().map(|base| base.size);
        state.base = attributes.map(|mut attributes| {
            attributes.size = match (held, known) {
                (Some(Mode::X), Some(size)) => size,
                (Some(_), Some(size)) => attributes.size.max(size),
                _ => attributes.size,
            };
            attributes
        });
        state.no_capability = false;
        state.home_time = home_time.map(|time| (time, Instant::now()));
    }

    /// Replaces the base, under X, after the home changed the record.
    pub(crate) fn replace_base(&self, attributes: Attributes) {
        if let Some(state) = self.attributes.borrow_mut().get_mut(&attributes.ino) {
            state.base = Some(attributes);
            state.no_capability = false;
        }
    }

    /// Whether a change of the file's bytes by `caller`, under a pin on ATTR, must first take privileges away: set-id bits unless
    /// root writes, file capabilities whoever does (as Linux has it).
    pub(crate) async fn takes_privileges(
        self: &Rc<Self>,
        caller: Caller,
        ino: Ino,
        attributes: &Attributes,
    ) -> Result<bool> {
        if self.mutated("no_clear_set_id") {
            return Ok(false);
        }
        if attributes.mode & 0o6000 != 0 && caller.uid != 0 && data::clears_set_id(attributes.mode) {
            return Ok(true);
        }
        let known = |state: &AttributeState| state.no_capability;
        if !attributes.has_xattrs || self.attributes.borrow().get(&ino).is_some_and(known) {
            return Ok(false);
        }
        match self.call(ino.home(), Request::GetXattr { ino, name: CAPABILITY_XATTR.to_vec() }).await {
            Ok(_) => Ok(true),
            Err(Errno::ENODATA) => {
                if let Some(state) = self.attributes.borrow_mut().get_mut(&ino) {
                    state.no_capability = true;
                }
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// A write up to `end` happened, under E or X.
    pub(crate) fn note_write(&self, ino: Ino, end: u64, pages: i64) {
        let now = self.home_clock(ino);
        let mut states = self.attributes.borrow_mut();
        let state = states.entry(ino).or_default();
        state.changed = true;
        let known = if state.sized { state.report.size } else { 0 };
        let base = state.base.as_ref().map_or(0, |base| base.size);
        if state.report.exact_size {
            state.report.size = known.max(end);
        } else if end > base.max(known) {
            state.report.size = end;
            state.sized = true;
        }
        state.report.touched = Some(state.report.touched.map_or(now, |touched| touched.max(now)));
        state.report.pages_delta = state.report.pages_delta.saturating_add(pages);
    }

    /// The file was truncated or extended to `size`, under X.
    pub(crate) fn note_size(&self, ino: Ino, size: u64, pages: i64) {
        let now = self.home_clock(ino);
        let mut states = self.attributes.borrow_mut();
        let state = states.entry(ino).or_default();
        state.changed = true;
        state.sized = true;
        state.report.size = size;
        state.report.exact_size = true;
        state.report.touched = Some(now);
        state.report.pages_delta = state.report.pages_delta.saturating_add(pages);
        state.report.truncations += 1;
    }

    /// What this node must tell the home, and forgets as unreported. `None`: nothing changed.
    pub(crate) fn take_report(&self, ino: Ino) -> Option<AttributeReport> {
        let mut states = self.attributes.borrow_mut();
        let state = states.get_mut(&ino)?;
        if !state.changed {
            return None;
        }
        let mut report = state.report;
        if !state.sized {
            report.size = 0;
        }
        let effective = state.effective();
        state.base = effective;
        state.report = AttributeReport::default();
        state.sized = false;
        state.changed = false;
        Some(report)
    }

    // ---- the home's side

    /// The record of an inode born here.
    pub(crate) fn stored_attributes(&self, ino: Ino) -> Result<Option<Attributes>> {
        if ino.home() != self.slot() {
            return Ok(None);
        }
        self.store.borrow().read(|txn| txn.inode(ino)).map_err(storage::store_error)
    }

    /// Takes a holder's changes into the record.
    pub(crate) fn apply_report(&self, ino: Ino, report: AttributeReport) {
        if ino.home() != self.slot() {
            return;
        }
        let Ok(Some(mut record)) = self.stored_attributes(ino) else { return };
        record.size = if report.exact_size { report.size } else { record.size.max(report.size) };
        record.pages = record.pages.saturating_add_signed(report.pages_delta);
        record.truncate_generation = record.truncate_generation.saturating_add(report.truncations);
        if let Some(touched) = report.touched {
            let mut times = self.touched.borrow_mut();
            let exposed = times.entry(ino).or_insert(touched);
            *exposed = (*exposed).max(touched);
            record.mtime = *exposed;
            record.ctime = record.ctime.max(touched);
        }
        if let Err(error) = self.put_attributes(&record) {
            tracing::error!(%ino, ?error, "attributes reported by a holder could not be stored");
        }
        self.replace_base_unchanged(record);
    }

    /// The home's own lock client may hold E on the inode: its base follows the record.
    fn replace_base_unchanged(&self, record: Attributes) {
        if let Some(state) = self.attributes.borrow_mut().get_mut(&record.ino)
            && state.base.is_some()
        {
            state.base = Some(record);
        }
    }

    /// Before the home works on a record under X, its own unreported changes go into it.
    pub(crate) fn absorb_own_report(&self, ino: Ino) {
        if ino.home() == self.slot()
            && let Some(report) = self.take_report(ino)
        {
            self.apply_report(ino, report);
        }
    }

    /// The answers to a node that is gone will not come to bringing attributes or entries.
    pub(crate) fn forget_observers(&self, slot: Slot) {
        self.asked.borrow_mut().retain(|request, _| request.node.slot != slot);
    }

    /// Forgets attributes of inodes under no lock, when there are many.
    pub(crate) fn prune_attributes(&self) {
        const KEEP: usize = 65_536;
        let mut states = self.attributes.borrow_mut();
        if states.len() <= KEEP {
            return;
        }
        let client = self.lock_client.borrow();
        states.retain(|ino, state| state.changed || client.held(Resource::attr(*ino), Range::UNIT).is_some());
    }
}
