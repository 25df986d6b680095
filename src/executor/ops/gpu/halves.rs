//! Matrix products on tensor cores in nearly the precision of f32: a factor x is split into two bf16
//! numbers, the nearest one and the one that is nearest to the rest, x ≈ x₁ + x₂, and
//! a b ≈ a₁ b₁ + a₁ b₂ + a₂ b₁. The product of the rests, which is left out, is below 2⁻¹⁶ of a b.

#![allow(unsafe_code, reason = "products of bf16 numbers take addresses")]

use std::ffi::c_void;

use cudarc::{
    cublas::{
        StridedBatchedConfig, result,
        sys::{cublasComputeType_t, cublasGemmAlgo_t, cudaDataType},
    },
    driver::{CudaViewMut, DevicePtr, DevicePtrMut},
};

use super::{Factor, Gpu, Grid, Result, Slice, kernels};

kernels! {
    functions "
// The nearest bf16 number, as the upper half of its bits; infinite and NaN ones stay so.
__device__ unsigned nearest_half(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits >> 16 | ((bits & 0xffffu) != 0);
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
";

    /// Splits `n` numbers from a `start` on.
    fn split(
        n: usize,
        start: usize,
        x: &Slice,
        first: &mut Slice<u16>,
        second: &mut Slice<u16>,
    ) "
    index_t i = ELEMENT;
    if (i >= n) return;
    unsigned half = nearest_half(x[start + i]);
    float rest = x[start + i] - __uint_as_float(half << 16);
    first[i] = half;
    second[i] = isfinite(rest) ? nearest_half(rest) : 0;
"
}

/// The numbers that a factor consists of.
pub(super) struct Halves([Slice<u16>; 2]);

impl Halves {
    /// Splits the factors of `count` products, of this shape as it lies in memory.
    pub(super) fn new(
        gpu: &Gpu,
        factor: &Factor<'_>,
        shape: (usize, usize),
        count: usize,
    ) -> Result<Self> {
        let extent = factor.place.extent(shape, count);
        // SAFETY: every pattern of bits is a number, and the kernel writes them all.
        let stale = || unsafe { gpu.device.alloc::<u16>(extent.max(1)) };
        let (mut first, mut second) = (stale()?, stale()?);
        let (grid, start) = (Grid::each(extent), factor.place.start);
        split(gpu, grid, extent, start, factor.numbers, &mut first, &mut second)?;
        Ok(Self([first, second]))
    }
}

/// What cuBLAS's product of two factors and a target is, from their halves.
///
/// # Safety
/// All matrices of the configuration have to be within the numbers.
pub(super) unsafe fn product(
    gpu: &Gpu,
    config: &StridedBatchedConfig<f32>,
    (a, b): (&Halves, &Halves),
    c: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    let StridedBatchedConfig { gemm, batch_size, stride_a, stride_b, stride_c } = config;
    let target = *c.device_ptr_mut() as *mut c_void;
    // The smaller ones first.
    for (i, (first, second)) in [(1, 0), (0, 1), (0, 0)].into_iter().enumerate() {
        let [left, right] = [&a.0[first], &b.0[second]].map(|of| *of.device_ptr() as *const c_void);
        let keep = if i == 0 { gemm.beta } else { 1.0 };
        // SAFETY: as of this function.
        unsafe {
            result::gemm_strided_batched_ex(
                *gpu.blas.handle(),
                gemm.transa,
                gemm.transb,
                gemm.m,
                gemm.n,
                gemm.k,
                (&raw const gemm.alpha).cast(),
                left,
                cudaDataType::CUDA_R_16BF,
                gemm.lda,
                *stride_a,
                right,
                cudaDataType::CUDA_R_16BF,
                gemm.ldb,
                *stride_b,
                (&raw const keep).cast(),
                target,
                cudaDataType::CUDA_R_32F,
                gemm.ldc,
                *stride_c,
                *batch_size,
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublasGemmAlgo_t::CUBLAS_GEMM_DFALT,
            )
        }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        executor::ops::{gpu::Place, testing},
        precision::Precision,
    };

    /// Of products that begin within their numbers, as they are and transposed, added to what is there.
    #[test]
    #[ignore = "needs the GPU that BARBER_TEST_DEVICE names"]
    fn products_on_tensor_cores_are_nearly_those_of_f32() {
        let device = testing::gpu().unwrap();
        let gpu = Gpu::of(&device).unwrap();
        let noise = |n: usize, by: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * by) % 1009) as f32 / 504.5 - 1.0).collect()
        };
        let (rows, columns, depth) = (33, 20, 70);
        let a = gpu.numbers(&noise(2 * rows * depth + 7, 7919)).unwrap();
        let b = gpu.numbers(&noise(2 * columns * depth + 5, 7907)).unwrap();
        let first = noise(2 * rows * columns, 7901);
        let product = |precision| {
            gpu.set_precision(precision).unwrap();
            let mut c = gpu.numbers(&first).unwrap();
            let of_a = Place { start: 7, stride: depth, next: rows * depth };
            let of_b = Place { start: 5, stride: depth, next: columns * depth };
            let at = Place { start: 0, stride: columns, next: rows * columns };
            let factors = (Factor::new(&a, of_a), Factor::new(&b, of_b).transposed());
            let (shape, c_at) = ((rows, columns, depth), (&mut *c, at));
            gpu.product(shape, (0.5, 2.0), factors.0, factors.1, c_at, 2).unwrap();
            gpu.download(&c).unwrap()
        };
        let expected = product(Precision::F32);
        let most = expected.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        for (precision, error) in [(Precision::Bf16x3, 1e-5), (Precision::Tf32, 2e-3)] {
            let found = product(precision);
            let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
            let apart = apart.fold(0.0, f32::max);
            assert!(apart > 0.0 && apart < error * most, "{precision:?}: {apart} of {most}");
        }
        gpu.set_precision(Precision::F32).unwrap();
    }
}
