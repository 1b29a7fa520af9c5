//! What the objects under test may do, one step at a time: the sequential specifications for [`crate::linearize`].

pub mod data;
pub mod locks;
pub mod names;
pub mod words;
