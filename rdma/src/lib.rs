//! One-sided memory fabric and ring messages
