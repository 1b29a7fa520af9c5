//! Which incarnations of a slot may connect.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::handshake::{Incarnation, Refusal};

#[derive(Debug, Default, Clone, Copy)]
struct Admission {
    /// Incarnations below are stale.
    minimum: Option<Incarnation>,
    /// Node incarnations up to this one were fenced.
    fenced: Option<u32>,
}

/// What a provider admits from each slot. Shared between the thread that polls and those that shake hands.
#[derive(Debug, Default)]
pub(crate) struct Admissions(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// The slots that may connect at all. Absent: every one.
    members: Option<HashSet<u16>>,
    admissions: HashMap<u16, Admission>,
}

impl Admissions {
    fn lock(&self) -> MutexGuard<'_, Known> {
        // It stays whole whatever panicked: each change is one assignment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn admit(&self, slot: u16, incarnation: Incarnation) -> Result<(), Refusal> {
        let known = self.lock();
        if known.members.as_ref().is_some_and(|members| !members.contains(&slot)) {
            return Err(Refusal::Slot);
        }
        let admission = known.admissions.get(&slot).copied().unwrap_or_default();
        drop(known);
        if admission.fenced.is_some_and(|fenced| incarnation.node <= fenced) {
            return Err(Refusal::Fenced);
        }
        if admission.minimum.is_some_and(|minimum| incarnation < minimum) {
            return Err(Refusal::Stale);
        }
        Ok(())
    }

    /// Only these slots are admitted from now on.
    pub(crate) fn admit_only(&self, slots: &[u16]) {
        self.lock().members = Some(slots.iter().copied().collect());
    }

    /// Incarnations before this one are stale from now on.
    pub(crate) fn require(&self, slot: u16, incarnation: Incarnation) {
        let mut known = self.lock();
        let admission = known.admissions.entry(slot).or_default();
        admission.minimum = admission.minimum.max(Some(incarnation));
    }

    /// Every incarnation up to this one of the node is fenced from now on.
    pub(crate) fn refuse(&self, slot: u16, node_incarnation: u32) {
        let mut known = self.lock();
        let admission = known.admissions.entry(slot).or_default();
        admission.fenced = admission.fenced.max(Some(node_incarnation));
    }
}

/// At most one refusal a second is logged, or a peer that tries again and again fills the disk. `Some(n)`: log this one,
/// `n` have gone unlogged since the last.
pub(crate) fn refusal_to_log() -> Option<u64> {
    static LAST: Mutex<(Option<Instant>, u64)> = Mutex::new((None, 0));
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if last.0.is_some_and(|at| at.elapsed() < Duration::from_secs(1)) {
        last.1 += 1;
        return None;
    }
    let unlogged = last.1;
    *last = (Some(Instant::now()), 0);
    Some(unlogged)
}
