//! Vector instructions.

/// Runs a kernel, an expression, with the widest vector instructions that the processor has: it is
/// compiled for each of them, and so is what is inlined into it.
macro_rules! simd {
    ($kernel:expr) => {
        pulp::Arch::new().dispatch($crate::simd::Kernel(
            #[inline(always)]
            || $kernel,
        ))
    };
}
pub(crate) use simd;

/// A kernel that is always inlined. As an `FnOnce` it would be called through an adapter, which the
/// compiler may leave a function of its own, for the narrowest instructions.
pub(crate) struct Kernel<F>(pub(crate) F);

impl<R, F: FnMut() -> R> pulp::NullaryFnOnce for Kernel<F> {
    type Output = R;

    #[inline(always)]
    fn call(mut self) -> R {
        (self.0)()
    }
}
