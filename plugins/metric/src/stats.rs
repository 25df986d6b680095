//! The statistics of a weight matrix for scoring its weights.

use std::fmt;

/// The shape of a weight matrix: a row is an output of the linear layer, a column an input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Dims {
    /// Number of outputs.
    pub rows: usize,
    /// Number of inputs.
    pub columns: usize,
}

impl Dims {
    /// Number of weights.
    pub const fn len(self) -> usize {
        self.rows * self.columns
    }

    /// Whether there are no weights.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {}]", self.rows, self.columns)
    }
}

/// The statistics that a metric needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// [`LayerStats::squared_gradient`]: one forward and backward pass per calibration sample.
    pub squared_gradient: bool,
    /// [`LayerStats::input_square`]: one forward pass per calibration sample.
    pub input_square: bool,
    /// [`LayerStats::input_variance`]: one forward pass per calibration sample.
    pub input_variance: bool,
    /// [`LayerStats::gram`]: one forward pass per calibration sample, and a product of the inputs
    /// with themselves; columns² numbers of memory.
    pub gram: bool,
    /// [`StructureStats::influence`](crate::StructureStats::influence): one forward pass per calibration
    /// sample.
    pub influence: bool,
    /// [`StructureStats::contribution`](crate::StructureStats::contribution): one forward pass per
    /// calibration sample.
    pub contribution: bool,
}

impl Needs {
    /// The weight and the mask suffice.
    pub const NOTHING: Self = Self {
        squared_gradient: false,
        input_square: false,
        input_variance: false,
        gram: false,
        influence: false,
        contribution: false,
    };
    /// The mean squared gradient.
    pub const SQUARED_GRADIENT: Self = Self { squared_gradient: true, ..Self::NOTHING };
    /// The mean squared input norms.
    pub const INPUT_SQUARE: Self = Self { input_square: true, ..Self::NOTHING };
    /// The variance of the inputs.
    pub const INPUT_VARIANCE: Self = Self { input_variance: true, ..Self::NOTHING };
    /// The Gram matrix of the inputs.
    pub const GRAM: Self = Self { gram: true, ..Self::NOTHING };
    /// What layers change of the hidden states.
    pub const INFLUENCE: Self = Self { influence: true, ..Self::NOTHING };
    /// What experts contribute to the hidden states.
    pub const CONTRIBUTION: Self = Self { contribution: true, ..Self::NOTHING };

    /// The statistics that either of two steps needs.
    pub const fn or(self, other: Self) -> Self {
        Self {
            squared_gradient: self.squared_gradient || other.squared_gradient,
            input_square: self.input_square || other.input_square,
            input_variance: self.input_variance || other.input_variance,
            gram: self.gram || other.gram,
            influence: self.influence || other.influence,
            contribution: self.contribution || other.contribution,
        }
    }

    /// Whether a statistic of a linear layer's inputs is needed.
    pub const fn inputs(self) -> bool {
        self.input_square || self.input_variance || self.gram
    }

    /// Whether the squares of inputs are summed.
    pub const fn squares(self) -> bool {
        self.input_square || self.input_variance
    }

    /// Whether a statistic of whole structures is needed.
    pub const fn structures(self) -> bool {
        self.influence || self.contribution
    }

    /// Whether a statistic needs calibration samples.
    pub const fn samples(self) -> bool {
        self.squared_gradient || self.inputs() || self.structures()
    }
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let statistics = [
            (self.squared_gradient, "squared gradient"),
            (self.input_square, "input norms"),
            (self.input_variance, "variance of the inputs"),
            (self.gram, "Gram matrix of the inputs"),
            (self.influence, "influence of layers"),
            (self.contribution, "contribution of experts"),
        ];
        let mut needed = statistics.iter().filter(|(needed, _)| *needed).map(|(_, name)| *name);
        f.write_str(needed.next().unwrap_or("nothing but the weights"))?;
        needed.try_for_each(|name| write!(f, ", {name}"))
    }
}

/// A weight matrix and its statistics.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerStats<'a> {
    /// The matrix's tensor name in the checkpoint.
    pub name: &'a str,
    /// The matrix's shape.
    pub dims: Dims,
    /// The dense weights, row-major.
    pub weight: &'a [f32],
    /// The current mask, row-major; `true` is kept.
    pub mask: &'a [bool],
    /// Whether structures are scored that have whole rows of the matrix, such as channels, which have
    /// rows of the gate and up projections.
    pub whole_rows: bool,
    /// Mean over calibration samples of the squared gradient of the block's output error with
    /// respect to each dense weight, row-major (LLM-Barber, arXiv 2408.10631).
    pub squared_gradient: Option<&'a [f32]>,
    /// Mean over calibration samples of Σ x² over a sample's tokens, one per column (Wanda,
    /// arXiv 2306.11695).
    pub input_square: Option<&'a [f32]>,
    /// Variance of each input over all calibration tokens, one per column (FLAP, arXiv 2312.11983,
    /// section 3.2).
    pub input_variance: Option<&'a [f32]>,
    /// Mean over calibration samples of Σ x xᵀ over a sample's tokens, [columns, columns],
    /// symmetric; its diagonal is `input_square`. Twice this is the Hessian of SparseGPT
    /// (arXiv 2301.00774).
    pub gram: Option<&'a [f32]>,
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

    /// The variance of the inputs.
    ///
    /// # Errors
    /// If [`Needs::input_variance`] was not declared.
    pub fn input_variance(&self) -> Result<&'a [f32], Error> {
        self.input_variance.ok_or(Error::Undeclared("input_variance"))
    }

    /// ‖x_j‖, the norm of each input: √(mean Σ x_j²).
    ///
    /// # Errors
    /// If [`Needs::input_square`] was not declared.
    pub fn input_norms(&self) -> Result<Vec<f32>, Error> {
        Ok(self.input_square()?.iter().map(|square| square.sqrt()).collect())
    }

    /// The Gram matrix of the inputs.
    ///
    /// # Errors
    /// If [`Needs::gram`] was not declared.
    pub fn gram(&self) -> Result<&'a [f32], Error> {
        self.gram.ok_or(Error::Undeclared("gram"))
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
