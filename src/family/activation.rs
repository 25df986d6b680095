//! The activation functions of MLPs, by the names that transformers gives them.

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x σ(x).
    Silu,
    /// x Φ(x), Φ being the normal distribution function (arXiv 1606.08415).
    Gelu,
    /// x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2.
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// x σ(1.702 x).
    QuickGelu,
    /// max(x, 0)² (arXiv 2109.08668).
    SquaredRelu,
}

impl Activation {
    /// Every function, in the order of the CUDA kernels' numbers.
    pub const ALL: [Self; 6] =
        [Self::Silu, Self::Gelu, Self::GeluTanh, Self::Relu, Self::QuickGelu, Self::SquaredRelu];
}

/// The functions by their names in a `config.json`, those of transformers' `ACT2FN`; several names
/// may have the same function.
pub(super) const NAMES: &[(&str, Activation)] = &[
    ("gelu", Activation::Gelu),
    ("gelu_accurate", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_python", Activation::Gelu),
    ("gelu_python_tanh", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("quick_gelu", Activation::QuickGelu),
    ("relu", Activation::Relu),
    ("relu2", Activation::SquaredRelu),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
];
