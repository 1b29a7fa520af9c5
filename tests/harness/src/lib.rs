//! Histories, checkers and exercisers that test mounted file systems
