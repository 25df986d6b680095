//! What is known of one weight matrix when its weights are scored.

use std::fmt;

/// The shape of a weight matrix: a row is an output of the linear layer, a column an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dims {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
}

impl Dims {
    /// The number of weights.
    pub const fn len(self) -> usize {
        self.rows * self.columns
    }

    /// Whether there is no weight at all.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {}]", self.rows, self.columns)
    }
}

/// The statistics that a metric asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// [`LayerStats::squared_gradient`]: one forward and backward pass per calibration sample.
    pub squared_gradient: bool,
    /// [`LayerStats::input_square`]: one forward pass per calibration sample.
    pub input_square: bool,
}

impl Needs {
    /// The weight and the mask suffice.
    pub const NOTHING: Self = Self { squared_gradient: false, input_square: false };
    /// The mean squared gradient.
    pub const SQUARED_GRADIENT: Self = Self { squared_gradient: true, input_square: false };
    /// The mean squared input norms.
    pub const INPUT_SQUARE: Self = Self { squared_gradient: false, input_square: true };

    /// What either of two stages needs.
    pub const fn or(self, other: Self) -> Self {
        Self {
            squared_gradient: self.squared_gradient || other.squared_gradient,
            input_square: self.input_square || other.input_square,
        }
    }
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.squared_gradient, self.input_square) {
            (false, false) => "nothing but the weights",
            (true, false) => "squared gradient",
            (false, true) => "input norms",
            (true, true) => "squared gradient, input norms",
        })
    }
}

/// What is known of one weight matrix.
#[derive(Clone, Copy, Debug)]
pub struct LayerStats<'a> {
    /// The matrix's tensor name in the checkpoint.
    pub name: &'a str,
    /// Its shape.
    pub dims: Dims,
    /// The dense weights, row-major.
    pub weight: &'a [f32],
    /// The current mask, row-major; `true` is kept.
    pub mask: &'a [bool],
    /// Mean over calibration samples of the squared gradient of the block's output error with
    /// respect to each dense weight, row-major (LLM-Barber, arXiv 2408.10631).
    pub squared_gradient: Option<&'a [f32]>,
    /// Mean over calibration samples of Σ x² over a sample's tokens, one per column (Wanda,
    /// arXiv 2306.11695).
    pub input_square: Option<&'a [f32]>,
}

impl<'a> LayerStats<'a> {
    /// The mean squared gradient.
    ///
    /// # Errors
    /// If [`Needs::squared_gradient`] was not declared.
    pub fn squared_gradient(&self) -> Result<&'a [f32], Error> {
        self.squared_gradient.ok_or(Error::Undeclared("squared_gradient"))
    }

    /// The mean squared input norms.
    ///
    /// # Errors
    /// If [`Needs::input_square`] was not declared.
    pub fn input_square(&self) -> Result<&'a [f32], Error> {
        self.input_square.ok_or(Error::Undeclared("input_square"))
    }
}

/// Why a metric could not score a matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// A statistic that [`crate::Metric::needs`] did not declare.
    Undeclared(&'static str),
    /// A reason of the metric's own.
    Metric(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Undeclared(name) => {
                write!(f, "the metric uses `{name}` but does not declare that it needs it")
            }
            Self::Metric(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for Error {}
