//! One regular file: its bytes (as tags of the writes that put them there) and its size.

use crate::linearize::{Model, Step};
use crate::pattern::{Run, ZERO, push};
use serde::{Deserialize, Serialize};

/// A call on one file, with its result. A call that failed is no member: it ends the run as an unexpected error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DataOp {
    /// `pread`: what came back, as stretches of one tag each. Short only at the end of the file.
    Read { offset: u64, len: u64, got: Vec<Run> },
    /// `pwrite` of `len` bytes of `tag`, all of them written.
    Write { offset: u64, len: u64, tag: u32 },
    /// `write` through an O_APPEND handle.
    Append { len: u64, tag: u32 },
    /// `ftruncate`.
    Truncate { size: u64 },
    /// `fallocate` with PUNCH_HOLE and KEEP_SIZE.
    Punch { offset: u64, len: u64 },
    /// `fstat` (or `stat` when `by_name`): the size seen.
    Size { size: u64, by_name: bool },
}

/// The file: consecutive stretches from offset 0; their sum is the size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct FileState {
    runs: Vec<Run>,
}

impl FileState {
    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.runs.iter().map(|r| r.0).sum()
    }

    /// The stretches in `offset..offset + len`, as far as the file reaches.
    pub fn read(&self, offset: u64, len: u64) -> Vec<Run> {
        let mut out = Vec::new();
        let (mut at, end) = (0, offset + len);
        for &(length, tag) in &self.runs {
            let (from, to) = (at.max(offset), (at + length).min(end));
            if from < to {
                push(&mut out, to - from, tag);
            }
            at += length;
        }
        out
    }

    fn reads_as(&self, offset: u64, len: u64, got: &[Run]) -> bool {
        self.read(offset, len) == got
    }

    /// The file after `len` bytes of `tag` were written at `offset`.
    pub fn write(&self, offset: u64, len: u64, tag: u32) -> Self {
        let size = self.size();
        let mut runs = self.read(0, offset);
        if len > 0 && offset > size {
            push(&mut runs, offset - size, ZERO);
        }
        push(&mut runs, len, tag);
        let end = offset + len;
        if end < size {
            for (length, tag) in self.read(end, size - end) {
                push(&mut runs, length, tag);
            }
        }
        Self { runs }
    }

    /// The file cut or extended with zeros.
    pub fn truncate(&self, size: u64) -> Self {
        let mut runs = self.read(0, size);
        push(&mut runs, size.saturating_sub(self.size()), ZERO);
        Self { runs }
    }

    /// The file with zeros in a range, its size unchanged.
    pub fn punch(&self, offset: u64, len: u64) -> Self {
        let end = (offset + len).min(self.size());
        if offset >= end { self.clone() } else { self.write(offset, end - offset, ZERO) }
    }
}

/// The specification of one file.
pub struct DataModel;

impl Model for DataModel {
    type State = FileState;
    type Op = DataOp;
    type Local = ();

    fn step(&self, state: &FileState, op: &DataOp, _: &()) -> Vec<Step<FileState, ()>> {
        let next = match op {
            DataOp::Read { offset, len, got } => state.reads_as(*offset, *len, got).then(|| state.clone()),
            DataOp::Size { size, .. } => (state.size() == *size).then(|| state.clone()),
            DataOp::Write { offset, len, tag } => Some(state.write(*offset, *len, *tag)),
            DataOp::Append { len, tag } => Some(state.write(state.size(), *len, *tag)),
            DataOp::Truncate { size } => Some(state.truncate(*size)),
            DataOp::Punch { offset, len } => Some(state.punch(*offset, *len)),
        };
        next.map(Step::Done).into_iter().collect()
    }

    fn is_observer(&self, op: &DataOp) -> bool {
        matches!(op, DataOp::Read { .. } | DataOp::Size { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_behaves_like_bytes() {
        let f = FileState::default().write(8, 16, 5);
        assert_eq!(f.read(0, 100), vec![(8, ZERO), (16, 5)]);
        let f = f.write(16, 4, 6);
        assert_eq!(f.read(0, 100), vec![(8, ZERO), (8, 5), (4, 6), (4, 5)]);
        assert_eq!(f.truncate(10).truncate(12).read(0, 100), vec![(8, ZERO), (2, 5), (2, ZERO)]);
        assert_eq!(f.punch(20, 100).size(), 24);
        assert_eq!(f.punch(30, 10), f);
        assert_eq!(f.read(24, 8), vec![]);
    }
}
