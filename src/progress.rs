//! How far work has come, for whoever shows it.

/// What the steps of a phase are, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steps {
    /// Decoder layers.
    Layers(usize),
    /// Bytes of a file or of several.
    Bytes(u64),
    /// Equal parts of its work.
    Parts(u64),
}

impl Steps {
    /// Number of steps.
    pub const fn count(self) -> u64 {
        match self {
            Self::Layers(layers) => layers as u64,
            Self::Bytes(count) | Self::Parts(count) => count,
        }
    }
}

/// Counts the steps of a phase. Dropped when the phase ends.
pub trait Bar {
    /// Some more steps are done.
    fn advance(&self, steps: u64);

    /// So many steps are done in all.
    fn reach(&self, steps: u64);
}

/// Counts nothing.
impl Bar for () {
    fn advance(&self, _steps: u64) {}

    fn reach(&self, _steps: u64) {}
}
