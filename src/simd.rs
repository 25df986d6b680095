//! Vector instructions.

use rayon::prelude::*;

/// Runs a kernel, an expression, with the widest vector instructions of the processor. The kernel
/// and everything inlined into it are compiled for each of them.
macro_rules! simd {
    ($kernel:expr) => {
        pulp::Arch::new().dispatch($crate::simd::Kernel(
            #[inline(always)]
            || $kernel,
        ))
    };
}
pub(crate) use simd;

/// A kernel that is always inlined. An `FnOnce` would be called through an adapter, which the
/// compiler may leave as a function of its own, compiled for the narrowest instructions.
pub(crate) struct Kernel<F>(pub(crate) F);

impl<R, F: FnMut() -> R> pulp::NullaryFnOnce for Kernel<F> {
    type Output = R;

    #[inline(always)]
    fn call(mut self) -> R {
        (self.0)()
    }
}

/// Index of the first value for which `wrong` is true. There is almost never one, so that looking
/// at all values is faster than stopping at the first.
pub(crate) fn first(values: &[f32], wrong: impl Fn(f32) -> bool + Sync) -> Option<usize> {
    let any = |values: &[f32]| simd!(values.iter().fold(false, |any, value| any | wrong(*value)));
    if !values.par_chunks(1 << 14).any(any) {
        return None;
    }
    values.iter().position(|value| wrong(*value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_found() {
        let mut values = vec![0.0; 100_000];
        assert_eq!(first(&values, f32::is_nan), None);
        values[99_999] = f32::NAN;
        values[70_000] = f32::NAN;
        assert_eq!(first(&values, f32::is_nan), Some(70_000));
        assert_eq!(first(&[], f32::is_nan), None);
    }
}
