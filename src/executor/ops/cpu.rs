//! Functions that the CPU's kernels share: sums in lanes, the exponential.

/// Number of elements that one task works on.
pub(super) const CHUNK: usize = 1 << 14;

/// Number of lanes of sums, which the compiler keeps in vector registers. The result depends on it.
pub(super) const LANES: usize = 16;

/// Σ f(a, b).
#[inline(always)]
pub(super) fn sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a.remainder().iter().zip(b.remainder());
    let rest = rest.fold(0.0, |sum, (a, b)| sum + f(*a, *b));
    let mut lanes = [0.0f32; LANES];
    for (a, b) in a.zip(b) {
        for i in 0..LANES {
            lanes[i] += f(a[i], b[i]);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// eˣ to two units in the last place, without a branch: x = n ln 2 + r, eˣ = 2ⁿ eʳ, with the
/// polynomial of the Cephes library for eʳ. Below e⁻⁸⁷ and above e⁸⁸ the result stays there.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2²³ rounds to a whole number, which is then in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2[0] - n * LN_2[1];
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::simd;

    #[test]
    fn the_exponential_is_right() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let expected = f64::from(x).exp();
            let found = f64::from(simd!(exp(x)));
            assert!((found / expected - 1.0).abs() < 3e-7, "{x}: {found} {expected}");
        }
        assert!(exp(-1e30) < 1e-37 && exp(1e30) > 1e38 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_have_a_rest() {
        let x: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(simd!(sum(&x, &x, |a, b| a * b)), x.iter().map(|x| x * x).sum::<f32>());
    }
}
