//! The operations as compositions of dfdx's own, for any device: what a GPU runs, where dfdx's
//! kernels are fast, and what tests compare the CPU's kernels with.

use std::{f32::consts::PI, ops::Range, sync::Arc};

use dfdx::{
    shapes::{Axes2, Axes3, Axis, HasShape},
    tensor::{Gradients, OwnedTape, PutTape, SplitTape, Tape, Tensor},
    tensor_ops::{
        Backward, BroadcastTo, Device, LogSumExpTo, MeanTo, PermuteTo, ReshapeTo, SelectTo, SumTo,
        TryAdd, TryDiv, TryMatMul, TryMul, TryStack, TrySub,
    },
};

use super::{Activation, Heads, Rotation, Sight};

/// A matrix of a device, [rows, columns].
pub(super) type Rank2<D, T = dfdx::tensor::NoneTape> = Tensor<(usize, usize), f32, D, T>;

/// The score of what a row does not see.
const UNSEEN: f32 = -1e30;

fn constant<D: Device<f32>>(
    device: &D,
    values: Vec<f32>,
    shape: (usize, usize),
) -> Result<Rank2<D>, D::Err> {
    device.try_tensor_from_vec(values, shape)
}

/// f(x), element by element.
pub(super) fn activate<D: Device<f32>, T: Tape<f32, D>>(
    x: Rank2<D, T>,
    activation: Activation,
) -> Result<Rank2<D, T>, D::Err> {
    match activation {
        Activation::Silu => x.retaped::<T>().try_sigmoid()?.try_mul(x),
        Activation::Gelu => gelu(x),
        Activation::GeluTanh => x.try_fast_gelu(),
        Activation::Relu => x.try_relu(),
    }
}

/// x Φ(x). The slope of dfdx's own is wrong; ours, Φ(x) + x φ(x), has Φ from the value.
fn gelu<D: Device<f32>, T: Tape<f32, D>>(x: Rank2<D, T>) -> Result<Rank2<D, T>, D::Err> {
    let (x, mut tape) = x.split_tape();
    let y = x.clone().try_accurate_gelu()?;
    let output = y.clone();
    tape.add_backward_op(move |gradients| {
        gradients.get_or_alloc_mut(&output)?;
        let g = gradients.get(&output);
        let square = x.clone().try_square()?;
        // y − x / 2 = x (Φ − 1 / 2), times x / x²; where x is next to zero, so is Φ − 1 / 2.
        let above = output.try_sub(x.clone().try_mul(0.5)?)?.try_mul(x.clone())?;
        let above = above.try_div(square.clone().try_add(1e-12)?)?;
        let density = square.try_mul(-0.5)?.try_exp()?.try_mul(1.0 / (2.0 * PI).sqrt())?;
        let slope = above.try_add(0.5)?.try_add(density.try_mul(x.clone())?)?;
        add_gradient(gradients, &x, g.try_mul(slope)?)
    });
    Ok(y.put_tape(tape))
}

/// f(gate) · up.
pub(super) fn gated<D: Device<f32>, T: Tape<f32, D>>(
    gate: Rank2<D, T>,
    up: Rank2<D, T>,
    activation: Activation,
) -> Result<Rank2<D, T>, D::Err> {
    activate(gate, activation)?.try_mul(up)
}

/// c · tanh(x / c).
pub(super) fn cap<D: Device<f32>, T: Tape<f32, D>>(
    x: Rank2<D, T>,
    cap: f32,
) -> Result<Rank2<D, T>, D::Err> {
    x.try_div(cap)?.try_tanh()?.try_mul(cap)
}

/// Some columns of each row.
pub(super) fn columns<D: Device<f32>, T: Tape<f32, D>>(
    x: Rank2<D, T>,
    columns: Range<usize>,
) -> Result<Rank2<D, T>, D::Err> {
    let shape = (x.shape().0, columns.len());
    x.try_slice((.., columns))?.try_reshape_like(&shape)
}

/// x Wᵀ + b, of W transposed. The gradient of the weight is not computed: `note` gets that of the
/// output.
pub(super) fn linear<D: Device<f32>, T: Tape<f32, D>>(
    x: Rank2<D, T>,
    weight: Rank2<D>,
    bias: Option<Rank2<D>>,
    input_gradient: bool,
    known: Option<Rank2<D>>,
    note: impl FnOnce(Rank2<D>, Rank2<D>) -> Result<(), D::Err> + 'static,
) -> Result<Rank2<D, T>, D::Err> {
    let (x, mut tape) = x.split_tape();
    let y = match (known, bias) {
        (Some(y), _) => y,
        (None, bias) => {
            let y = x.clone().try_matmul(weight.clone())?;
            match bias {
                Some(bias) => {
                    let bias = bias.try_reshape_like(&(y.shape().1,))?;
                    let bias = bias.try_broadcast_like::<_, Axis<0>>(y.shape())?;
                    y.try_add(bias)?
                }
                None => y,
            }
        }
    };
    let output = y.clone();
    tape.add_backward_op(move |gradients| {
        gradients.get_or_alloc_mut(&output)?;
        let g = gradients.get(&output);
        if input_gradient {
            let gx = g.clone().try_matmul(weight.try_permute::<_, Axes2<1, 0>>()?)?;
            add_gradient(gradients, &x, gx)?;
        }
        note(x, g)
    });
    Ok(y.put_tape(tape))
}

/// y + x Δᵀ, of Δ transposed and as a whole: few entries take a GPU no less time than many.
pub(super) fn add_sparse_product<D: Device<f32>>(
    y: Rank2<D>,
    x: &Rank2<D>,
    entries: &Rank2<D>,
) -> Result<Rank2<D>, D::Err> {
    y.try_add(x.clone().try_matmul(entries.clone())?)
}

/// Adds to the gradient of a tensor. A gradient is raw memory of the device, which only dfdx's own
/// operations write: that of Σ x · c with respect to x is c.
fn add_gradient<D: Device<f32>>(
    gradients: &mut Gradients<f32, D>,
    of: &Rank2<D>,
    gradient: Rank2<D>,
) -> Result<(), D::Err> {
    gradients.get_or_alloc_mut(of)?;
    let total = gradients.get(of).try_add(gradient)?;
    let sum: Tensor<(), f32, D, _> = of.retaped::<OwnedTape<f32, D>>().try_mul(total)?.try_sum()?;
    let mut own = sum.try_backward()?;
    std::mem::swap(gradients.get_or_alloc_mut(of)?, own.get_or_alloc_mut(of)?);
    Ok(())
}

/// The norm of every `width` channels.
pub(super) fn normalise<D: Device<f32>, T: Tape<f32, D>>(
    x: Rank2<D, T>,
    weight: Rank2<D>,
    bias: Option<Rank2<D>>,
    epsilon: f32,
    centred: bool,
) -> Result<Rank2<D, T>, D::Err> {
    let shape = *x.shape();
    let width = weight.shape().1;
    let rows = (shape.0 * shape.1 / width, width);
    let wide = |vector: Rank2<D>| {
        vector.try_reshape_like(&(width,))?.try_broadcast_like::<_, Axis<0>>(&rows)
    };
    let mut x = x.try_reshape_like(&rows)?;
    if centred {
        let mean: Tensor<(usize,), f32, D, T> = x.retaped::<T>().try_mean::<_, Axis<1>>()?;
        x = x.try_sub(mean.try_broadcast_like::<_, Axis<1>>(&rows)?)?;
    }
    let square: Tensor<(usize,), f32, D, T> =
        x.retaped::<T>().try_square()?.try_mean::<_, Axis<1>>()?;
    let deviation = square.try_add(epsilon)?.try_sqrt()?;
    let mut y = x.try_div(deviation.try_broadcast_like::<_, Axis<1>>(&rows)?)?;
    y = y.try_mul(wide(weight)?)?;
    if let Some(bias) = bias {
        y = y.try_add(wide(bias)?)?;
    }
    y.try_reshape_like(&shape)
}

/// Rotates the heads of each row: x · cos + (x R) · sin, where R swaps the two halves of a head's
/// rotated channels and turns the sign of the second.
pub(super) fn rotary<D: Device<f32>, T: Tape<f32, D>>(
    x: Rank2<D, T>,
    rotation: &Rotation,
    head: usize,
) -> Result<Rank2<D, T>, D::Err> {
    let (shape, half, positions) = (*x.shape(), rotation.half, rotation.positions());
    let device = x.device().clone();
    let mut swap = vec![0.0; head * head];
    for i in 0..half {
        swap[(i + half) * head + i] = -1.0;
        swap[i * head + i + half] = 1.0;
    }
    let table = |angles: &[f32], rest: f32| {
        let mut table = vec![rest; positions * head];
        for (row, angles) in table.chunks_exact_mut(head).zip(angles.chunks_exact(half)) {
            row[..half].copy_from_slice(angles);
            row[half..2 * half].copy_from_slice(angles);
        }
        let table = constant(&device, table, (positions, head))?;
        let whole = (shape.0 / positions, positions, shape.1 / head, head);
        let table = table.try_broadcast_like::<_, Axes2<0, 2>>(&whole)?;
        table.try_reshape_like(&(shape.0 * shape.1 / head, head))
    };
    let heads = x.try_reshape_like(&(shape.0 * shape.1 / head, head))?;
    let swapped = heads.retaped::<T>().try_matmul(constant(&device, swap, (head, head))?)?;
    let straight = heads.try_mul(table(&rotation.cos, 1.0)?)?;
    straight.try_add(swapped.try_mul(table(&rotation.sin, 0.0)?)?)?.try_reshape_like(&shape)
}

/// What each row of a sequence sees, as an addition to scores, [rows, rows].
fn mask<D: Device<f32>>(
    device: &D,
    heads: &Heads,
    sights: Option<&Arc<Vec<Sight>>>,
) -> Result<Rank2<D>, D::Err> {
    let length = heads.sequence_length;
    let mut mask = vec![UNSEEN; length * length];
    for (row, mask) in mask.chunks_exact_mut(length.max(1)).enumerate() {
        let sight = sights.map_or_else(Sight::default, |sights| sights[row].clone());
        for seen in sight.seen(row, heads.window) {
            mask[seen].fill(0.0);
        }
    }
    constant(device, mask, (length, length))
}

/// Causal attention, the query heads of one key head at a time: no more scores than theirs are
/// held.
pub(super) fn attention<D: Device<f32>, T: Tape<f32, D>>(
    q: Rank2<D, T>,
    k: Rank2<D, T>,
    v: Rank2<D, T>,
    heads: Heads,
    sights: Option<&Arc<Vec<Sight>>>,
) -> Result<Rank2<D, T>, D::Err> {
    let (rows, width) = *q.shape();
    let (length, per, w) = (heads.sequence_length, heads.queries / heads.keys, heads.width);
    let mask = mask(&q.device().clone(), &heads, sights)?;
    let (q, q_tape) = q.split_tape();
    let (k, k_tape) = k.split_tape();
    let (v, v_tape) = v.split_tape();
    let tape = q_tape.merge(k_tape).merge(v_tape);
    let part = |x: &Rank2<D>, sequence: usize, columns: Range<usize>| {
        x.retaped::<T>().try_slice((sequence * length..(sequence + 1) * length, columns))
    };
    let scores = (per, length, length);
    let mask = mask.try_broadcast_like::<_, Axis<0>>(&scores)?;
    let mut sequences = Vec::new();
    for sequence in 0..rows / length {
        let mut outputs = Vec::new();
        for key in 0..heads.keys {
            let columns = key * w..(key + 1) * w;
            let q = part(&q, sequence, key * per * w..(key + 1) * per * w)?;
            let q = q.try_reshape_like(&(length, per, w))?.try_permute::<_, Axes3<1, 0, 2>>()?;
            let q = q.try_reshape_like(&(per * length, w))?.try_mul(heads.scale)?;
            let k = part(&k, sequence, columns.clone())?.try_permute::<_, Axes2<1, 0>>()?;
            let mut s = q.try_matmul(k)?;
            if let Some(cap) = heads.cap {
                s = self::cap(s, cap)?;
            }
            let s = s.try_reshape_like(&scores)?.try_add(mask.clone())?;
            let p = s.try_softmax::<Axis<2>>()?.try_reshape_like(&(per * length, length))?;
            let o = p.try_matmul(part(&v, sequence, columns)?)?;
            let o = o.try_reshape_like(&(per, length, w))?.try_permute::<_, Axes3<1, 0, 2>>()?;
            outputs.push(o.try_reshape_like(&(length, per * w))?);
        }
        let joined = outputs.try_stack()?.try_permute::<_, Axes3<1, 0, 2>>()?;
        sequences.push(joined.try_reshape_like(&(length, width))?);
    }
    let (o, o_tape) = sequences.try_stack()?.try_reshape_like(&(rows, width))?.split_tape();
    Ok(o.put_tape(o_tape.merge(tape)))
}

/// The sum over samples, which are rows, of mean((y − t)²).
pub(super) fn squared_error<D: Device<f32>, T: Tape<f32, D>>(
    y: Rank2<D, T>,
    target: Rank2<D>,
    samples: &[Range<usize>],
) -> Result<Tensor<(), f32, D, T>, D::Err> {
    let (rows, width) = *y.shape();
    // Each row counts with its share of its sample's mean.
    let mut shares = vec![0.0; rows];
    for sample in samples {
        shares[sample.clone()].fill(1.0 / (sample.len() * width) as f32);
    }
    let shares = y.device().try_tensor_from_vec(shares, (rows,))?;
    let square: Tensor<(usize,), f32, D, T> =
        y.try_sub(target)?.try_square()?.try_sum::<_, Axis<1>>()?;
    square.try_mul(shares)?.try_sum()
}

/// Σ (log Σ exp(z) − z_target) over rows.
pub(super) fn cross_entropy<D: Device<f32>, T: Tape<f32, D>>(
    logits: Rank2<D, T>,
    targets: &[u32],
) -> Result<Tensor<(), f32, D, T>, D::Err> {
    let (rows, _) = *logits.shape();
    let targets: Vec<usize> = targets.iter().map(|&target| target as usize).collect();
    let targets = logits.device().try_tensor_from_vec(targets, (rows,))?;
    let all: Tensor<(usize,), f32, D, T> = logits.retaped::<T>().try_logsumexp::<_, Axis<1>>()?;
    let right: Tensor<(usize,), f32, D, T> = logits.try_select(targets)?;
    all.try_sub(right)?.try_sum()
}

/// Adds the square of gᵀ x, for the rows of each sample.
pub(super) fn add_squared_gradients<D: Device<f32>>(
    sum: &mut Rank2<D>,
    x: &Rank2<D>,
    g: &Rank2<D>,
    samples: &[Range<usize>],
) -> Result<(), D::Err> {
    for sample in samples {
        let of = |matrix: &Rank2<D>| matrix.clone().try_slice((sample.clone(), ..));
        let g = of(g)?.try_permute::<_, Axes2<1, 0>>()?;
        let square = g.try_matmul(of(x)?.try_reshape_like(&(sample.len(), x.shape().1))?)?;
        *sum = sum.clone().try_add(square.try_square()?)?;
    }
    Ok(())
}

/// Adds aᵀ b.
pub(super) fn add_product<D: Device<f32>>(
    sum: &mut Rank2<D>,
    a: &Rank2<D>,
    b: &Rank2<D>,
) -> Result<(), D::Err> {
    let product = a.clone().try_permute::<_, Axes2<1, 0>>()?.try_matmul(b.clone())?;
    *sum = sum.clone().try_add(product)?;
    Ok(())
}

/// (1 − t) a + t b.
pub(super) fn blend<D: Device<f32>>(
    a: &Rank2<D>,
    b: &Rank2<D>,
    t: f32,
) -> Result<Rank2<D>, D::Err> {
    a.clone().try_mul(1.0 - t)?.try_add(b.clone().try_mul(t)?)
}

/// Σ x² of each column, over each of some ranges of rows.
pub(super) fn column_squares<D: Device<f32>>(
    x: &Rank2<D>,
    rows: &[Range<usize>],
) -> Result<Vec<Vec<f32>>, D::Err> {
    let of = |rows: &Range<usize>| {
        let x = x.clone().try_slice((rows.clone(), ..))?.try_square()?;
        let sums: Tensor<(usize,), f32, D> = x.try_sum::<_, Axis<0>>()?;
        Ok(sums.as_vec())
    };
    rows.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use dfdx::{tensor::Cpu, tensor_ops::Backward};

    use super::*;
    use crate::executor::ops::{
        Activate, Attention, Blend, Cap, ColumnSquares, Columns, CrossEntropy, Gated,
        InputGradient, Linear, Matrix, Norm, Normalise, Rotary, SparseProduct, SquaredError, Sums,
        Trace, Weight,
        testing::{gradient, matrix, noise, traced, weighted_sum},
    };

    type Taped<D> = Rank2<D, OwnedTape<f32, D>>;

    /// Runs a test on the CPU, and on the device that `BARBER_TEST_DEVICE` names.
    macro_rules! on_devices {
        ($test:ident) => {
            #[test]
            fn $test() {
                super::tests::bodies::$test(&Cpu::default());
                #[cfg(feature = "cuda")]
                if let Ok(name) = std::env::var("BARBER_TEST_DEVICE") {
                    let crate::executor::Device::Cuda(number) = name.parse().unwrap() else {
                        return;
                    };
                    super::tests::bodies::$test(&crate::executor::cuda(number).unwrap().0);
                }
            }
        };
    }

    fn close(found: &[f32], expected: &[f32], what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let most = 1e-4 * expected.abs().max(1.0);
            assert!((found - expected).abs() < most, "{what}, {i}: {found}, not {expected}");
        }
    }

    /// Both give the same values, and the same gradients of their inputs.
    fn agree<D: Device<f32>, const N: usize>(
        device: &D,
        what: &str,
        shapes: [(usize, usize); N],
        kernel: impl Fn([Matrix<Cpu, OwnedTape<f32, Cpu>>; N]) -> Matrix<Cpu, OwnedTape<f32, Cpu>>,
        composed: impl Fn([Taped<D>; N]) -> Result<Taped<D>, D::Err>,
    ) {
        let mut seed = 10;
        let values = shapes.map(|(rows, columns)| {
            seed += 1;
            noise(rows * columns, seed)
        });
        let mut i = 0;
        let inputs = values.clone().map(|values| {
            i += 1;
            matrix(values, shapes[i - 1])
        });
        let (y, tape) = kernel(inputs.clone().map(traced)).split_tape();
        let expected = y.to_vec();
        let mut gradients = weighted_sum(y.put_tape(tape)).backward();
        let expected_gradients = inputs.map(|x| gradient(&mut gradients, &x));

        let mut i = 0;
        let inputs = values.map(|values| {
            i += 1;
            constant(device, values, shapes[i - 1]).unwrap()
        });
        let y = composed(inputs.clone().map(|x| x.put_tape(OwnedTape::default()))).unwrap();
        close(&y.as_vec(), &expected, what);
        let factors = noise(expected.len(), 99);
        let factors = constant(device, factors, *y.shape()).unwrap();
        let sum: Tensor<(), f32, D, _> = y.try_mul(factors).unwrap().try_sum().unwrap();
        let gradients = sum.try_backward().unwrap();
        for (x, expected) in inputs.iter().zip(expected_gradients) {
            close(&gradients.get(x).as_vec(), &expected, &format!("gradient of {what}"));
        }
    }

    mod bodies {
        use super::*;

        pub(super) fn activations<D: Device<f32>>(device: &D) {
            for activation in
                [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu]
            {
                let kernel = |[x]: [_; 1]| Cpu::activate(x, activation).unwrap();
                agree(device, &format!("{activation:?}"), [(5, 7)], kernel, |[x]| {
                    activate(x, activation)
                });
            }
        }

        pub(super) fn linear_layers<D: Device<f32>>(device: &D) {
            for bias in [None, Some(noise(4, 3))] {
                let values = noise(20, 1);
                let weight = Weight::new(&Cpu::default(), &values, (4, 5), bias.clone()).unwrap();
                let kernel =
                    |[x]: [_; 1]| Cpu::linear(x, &weight, InputGradient::Wanted, None).unwrap();
                let transposed = (0..20).map(|i| values[i % 4 * 5 + i / 4]).collect::<Vec<_>>();
                let w = || constant(device, transposed.clone(), (5, 4)).unwrap();
                let bias = || bias.clone().map(|bias| constant(device, bias, (1, 4)).unwrap());
                agree(device, "linear", [(3, 5)], kernel, |[x]| {
                    linear(x, w(), bias(), true, None, |_, _| Ok(()))
                });
            }
        }

        pub(super) fn norms<D: Device<f32>>(device: &D) {
            for (bias, centred) in [(false, false), (true, true), (false, true)] {
                for (width, columns) in [(6, 6), (3, 6)] {
                    let vector = |seed| noise(width, seed);
                    let shape = (1, width);
                    let norm = Norm {
                        weight: matrix(vector(1), shape),
                        bias: bias.then(|| matrix(vector(2), shape)),
                        epsilon: 1e-5,
                        centred,
                    };
                    let kernel = |[x]: [_; 1]| Cpu::normalise(x, &norm).unwrap();
                    agree(device, "norm", [(4, columns)], kernel, |[x]| {
                        let bias = bias.then(|| constant(device, vector(2), shape).unwrap());
                        let weight = constant(device, vector(1), shape)?;
                        normalise(x, weight, bias, 1e-5, centred)
                    });
                }
            }
        }

        pub(super) fn rotations<D: Device<f32>>(device: &D) {
            let angles = noise(6, 4);
            let rotation = Rotation {
                cos: Arc::new(angles.iter().map(|a| 1.1 * a.cos()).collect()),
                sin: Arc::new(angles.iter().map(|a| 1.1 * a.sin()).collect()),
                half: 2,
            };
            for head in [4, 5] {
                let kernel = |[x]: [_; 1]| Cpu::rotary(x, &rotation, head).unwrap();
                agree(device, "rotary", [(6, 2 * head)], kernel, |[x]| rotary(x, &rotation, head));
            }
        }

        pub(super) fn attentions<D: Device<f32>>(device: &D) {
            let plain = Heads {
                queries: 4,
                keys: 2,
                width: 3,
                sequence_length: 3,
                scale: 0.6,
                window: None,
                cap: None,
            };
            let capped = Heads { window: Some(2), cap: Some(0.5), ..plain };
            let sight = |root, branch| Sight { root, branch };
            let branched = Arc::new(vec![sight(0..0, 0), sight(0..1, 1), sight(0..1, 2)]);
            for heads in [plain, capped, Heads { queries: 2, ..plain }] {
                for sights in [None, Some(&branched)] {
                    let shapes = [(6, heads.queries * 3), (6, 6), (6, 6)];
                    let kernel =
                        |[q, k, v]: [_; 3]| Cpu::attention(q, k, v, heads, sights, None).unwrap();
                    agree(device, "attention", shapes, kernel, |[q, k, v]| {
                        attention(q, k, v, heads, sights)
                    });
                }
            }
        }

        pub(super) fn gates_and_caps<D: Device<f32>>(device: &D) {
            let kernel = |[a, b]: [_; 2]| Cpu::gated(a, b, Activation::Silu).unwrap();
            agree(device, "gated", [(3, 4), (3, 4)], kernel, |[a, b]| {
                gated(a, b, Activation::Silu)
            });
            let x = noise(12, 1);
            let expected = Cpu::cap(&matrix(x.clone(), (3, 4)), 0.5).unwrap().to_vec();
            let found = cap(constant(device, x, (3, 4)).unwrap(), 0.5).unwrap().as_vec();
            close(&found, &expected, "cap");
        }

        pub(super) fn columns<D: Device<f32>>(device: &D) {
            let kernel = |[x]: [_; 1]| Cpu::columns(x, 2..5).unwrap();
            agree(device, "columns", [(3, 7)], kernel, |[x]| super::super::columns(x, 2..5));
        }

        pub(super) fn losses<D: Device<f32>>(device: &D) {
            let samples = [0..2, 2..5];
            let (y, t, targets) = (noise(35, 1), noise(35, 2), [3, 0, 6, 2, 2]);
            let cpu = |values: &[f32]| matrix(values.to_vec(), (5, 7));
            let other = |values: &[f32]| constant(device, values.to_vec(), (5, 7)).unwrap();
            let taped = || other(&y).put_tape(OwnedTape::default());
            let error = Cpu::squared_error(cpu(&y), &cpu(&t), &samples).unwrap();
            let found = squared_error(taped(), other(&t), &samples).unwrap();
            close(&found.as_vec(), &error.as_vec(), "squared error");
            let entropy = Cpu::cross_entropy(cpu(&y), &targets).unwrap();
            let found = cross_entropy(taped(), &targets).unwrap();
            close(&found.as_vec(), &entropy.as_vec(), "cross-entropy");

            let (x, expected) = (other(&y), cpu(&y));
            let mut gradients = Cpu::squared_error(traced(expected.clone()), &cpu(&t), &samples)
                .unwrap()
                .backward();
            let found = squared_error(x.retaped::<OwnedTape<f32, D>>(), other(&t), &samples);
            let found = found.unwrap().try_backward().unwrap().get(&x).as_vec();
            close(&found, &gradient(&mut gradients, &expected), "gradient of squared error");
            let mut gradients =
                Cpu::cross_entropy(traced(expected.clone()), &targets).unwrap().backward();
            let found = cross_entropy(x.retaped::<OwnedTape<f32, D>>(), &targets);
            let found = found.unwrap().try_backward().unwrap().get(&x).as_vec();
            close(&found, &gradient(&mut gradients, &expected), "gradient of cross-entropy");
        }

        pub(super) fn sums<D: Device<f32>>(device: &D) {
            let samples = [0..2, 2..5];
            let (x, g) = (noise(15, 1), noise(20, 2));
            let trace =
                Trace { input: matrix(x.clone(), (5, 3)), gradient: matrix(g.clone(), (5, 4)) };
            let mut expected = Cpu::default().nothing(4, 3).unwrap();
            Cpu::add_squared_gradients(&mut expected, &trace, &samples).unwrap();
            let mut sum = constant(device, vec![0.0; 12], (4, 3)).unwrap();
            let other = |values: &[f32], width| constant(device, values.to_vec(), (5, width));
            let (x, g) = (other(&x, 3).unwrap(), other(&g, 4).unwrap());
            add_squared_gradients(&mut sum, &x, &g, &samples).unwrap();
            close(&sum.as_vec(), &Cpu::sums(expected), "squared gradients");

            let mut expected = Cpu::default().nothing(3, 3).unwrap();
            Cpu::add_gram(&mut expected, &trace.input).unwrap();
            let mut sum = constant(device, vec![0.0; 9], (3, 3)).unwrap();
            add_product(&mut sum, &x, &x).unwrap();
            close(&sum.as_vec(), &Cpu::sums(expected), "Gram matrix");

            let mut expected = Cpu::default().nothing(4, 3).unwrap();
            Cpu::add_product(&mut expected, &trace.gradient, &trace.input).unwrap();
            let mut sum = constant(device, vec![0.0; 12], (4, 3)).unwrap();
            add_product(&mut sum, &g, &x).unwrap();
            close(&sum.as_vec(), &Cpu::sums(expected), "product");

            let entries = Cpu::default().entries(vec![(1, 0, 0.5), (3, 2, -2.0)], (4, 3)).unwrap();
            let y = trace.gradient.clone();
            let expected = Cpu::add_sparse_product(y, &trace.input, &entries).unwrap();
            let mut entries = vec![0.0; 12];
            (entries[1], entries[2 * 4 + 3]) = (0.5, -2.0);
            let entries = constant(device, entries, (3, 4)).unwrap();
            let found = add_sparse_product(g.clone(), &x, &entries).unwrap();
            close(&found.as_vec(), &expected.to_vec(), "sparse product");

            let other = matrix(noise(15, 3), (5, 3));
            let expected = Cpu::blend(&trace.input, &other, 0.3).unwrap();
            let found = constant(device, other.to_vec(), (5, 3)).unwrap();
            let found = blend(&x, &found, 0.3).unwrap();
            close(&found.as_vec(), &expected.to_vec(), "blend");

            let expected = Cpu::column_squares(&trace.input, &samples).unwrap().concat();
            let found = super::column_squares(&x, &samples).unwrap().concat();
            close(&found, &expected, "column squares");
        }
    }

    on_devices!(activations);
    on_devices!(linear_layers);
    on_devices!(norms);
    on_devices!(rotations);
    on_devices!(attentions);
    on_devices!(columns);
    on_devices!(gates_and_caps);
    on_devices!(losses);
    on_devices!(sums);
}
