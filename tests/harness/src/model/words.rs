//! One 8-byte word of a shared mapping: a register.

use crate::linearize::{Model, Step};
use serde::{Deserialize, Serialize};

/// How a word was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Via {
    /// A load or store through MAP_SHARED.
    Mapping,
    /// `pread` or `pwrite` of these 8 bytes.
    Call,
}

/// An access to one word, with its result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WordOp {
    /// The word carried `tag`.
    Load { tag: u32, via: Via },
    /// The word was given `tag`.
    Store { tag: u32, via: Via },
}

/// The specification of one word. Its state is the tag it carries.
pub struct WordModel;

impl Model for WordModel {
    type State = u32;
    type Op = WordOp;
    type Local = ();

    fn step(&self, state: &u32, op: &WordOp, _: &()) -> Vec<Step<u32, ()>> {
        match op {
            WordOp::Load { tag, .. } if tag != state => vec![],
            WordOp::Load { tag, .. } | WordOp::Store { tag, .. } => vec![Step::Done(*tag)],
        }
    }

    fn is_observer(&self, op: &WordOp) -> bool {
        matches!(op, WordOp::Load { .. })
    }
}
