//! Progress of work, for a display.

/// The unit and number of the steps of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steps {
    /// Decoder layers.
    Layers(usize),
    /// Bytes of one or several files.
    Bytes(u64),
    /// Equal parts of the phase.
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

/// A progress bar of one phase. Dropped when the phase ends.
pub trait Bar {
    /// Adds steps.
    fn advance(&self, steps: u64);

    /// Sets the number of steps done so far.
    fn reach(&self, steps: u64);
}

/// Shows nothing.
impl Bar for () {
    fn advance(&self, _steps: u64) {}

    fn reach(&self, _steps: u64) {}
}
