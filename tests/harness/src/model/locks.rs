//! Advisory locks on one file, by unit of the file and client.
//!
//! That two clients never hold conflicting locks, and that a refusal is justified by somebody who really holds one, are
//! both consequences: a grant takes effect only in a state without conflict, a refusal only in one with it.

use crate::linearize::{Model, Step};
use serde::{Deserialize, Serialize};

/// The parts of the file that are locked as a whole.
pub const UNITS: usize = 6;

/// A mode of holding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Mode {
    /// Not held.
    Free,
    /// Held together with other readers.
    Shared,
    /// Held alone.
    Exclusive,
}

/// A lock call of `client` on units `from..to`, with its result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockOp {
    /// Who called.
    pub client: u32,
    /// The first unit.
    pub from: usize,
    /// The unit after the last.
    pub to: usize,
    /// What was asked for; `Free` is an unlock.
    pub mode: Mode,
    /// What came of it.
    pub outcome: Outcome,
}

/// What a lock call did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Granted at once, or unlocked.
    Granted,
    /// Granted, and the call would have waited (F_SETLKW).
    GrantedBlocking,
    /// Refused with EAGAIN.
    Refused,
    /// F_GETLK found no conflict.
    WouldGrant,
    /// F_GETLK found a conflict.
    WouldRefuse,
}

/// Who holds what: one row for each client.
pub type LockState = Vec<[Mode; UNITS]>;

/// The specification of the locks of one file.
pub struct LockModel;

impl LockModel {
    /// Nobody holds anything.
    pub fn initial(clients: usize) -> LockState {
        vec![[Mode::Free; UNITS]; clients]
    }

    fn conflict(state: &LockState, op: &LockOp) -> bool {
        let worst_allowed = match op.mode {
            Mode::Free => return false,
            Mode::Shared => Mode::Shared,
            Mode::Exclusive => Mode::Free,
        };
        state.iter().enumerate().any(|(client, row)| {
            client != op.client as usize && row[op.from..op.to].iter().any(|held| *held > worst_allowed)
        })
    }
}

impl Model for LockModel {
    type State = LockState;
    type Op = LockOp;
    type Local = ();

    fn step(&self, state: &LockState, op: &LockOp, _: &()) -> Vec<Step<LockState, ()>> {
        let conflict = Self::conflict(state, op);
        match op.outcome {
            Outcome::Granted | Outcome::GrantedBlocking if !conflict => {
                let mut next = state.clone();
                next[op.client as usize][op.from..op.to].fill(op.mode);
                vec![Step::Done(next)]
            }
            Outcome::Refused | Outcome::WouldRefuse if conflict => vec![Step::Done(state.clone())],
            Outcome::WouldGrant if !conflict => vec![Step::Done(state.clone())],
            _ => vec![],
        }
    }

    fn is_observer(&self, op: &LockOp) -> bool {
        matches!(op.outcome, Outcome::Refused | Outcome::WouldGrant | Outcome::WouldRefuse)
    }
}
