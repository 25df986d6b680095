//! Rotary position embedding and its scaling variants.

/// Rotary position embedding (RoFormer, arXiv 2104.09864).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {}
