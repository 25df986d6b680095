//! The operations as compositions of dfdx's own, which tests compare each device's kernels with.

use std::{f32::consts::PI, ops::Range, sync::Arc};

use dfdx::{
    shapes::{Axes2, Axes3, Axis, HasShape},
    tensor::{Gradients, OwnedTape, PutTape, SplitTape, Tape, Tensor},
    tensor_ops::{
        Backward, BroadcastTo, Device, LogSumExpTo, MeanTo, PermuteTo, ReshapeTo, SelectTo, SumTo,
        TryAdd, TryDiv, TryMatMul, TryMul, TryStack, TrySub,
    },
};

use super::{Heads, Rotation, Sight};
use crate::family::Activation;

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
        Activation::QuickGelu => x.retaped::<T>().try_mul(1.702)?.try_sigmoid()?.try_mul(x),
        Activation::SquaredRelu => x.try_relu()?.try_square(),
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

/// x Wᵀ + b, of W transposed.
pub(super) fn linear<D: Device<f32>, T: Tape<f32, D>>(
    x: Rank2<D, T>,
    weight: Rank2<D>,
    bias: Option<Rank2<D>>,
) -> Result<Rank2<D, T>, D::Err> {
    let y = x.try_matmul(weight)?;
    let Some(bias) = bias else { return Ok(y) };
    let bias = bias.try_reshape_like(&(y.shape().1,))?;
    let bias = bias.try_broadcast_like::<_, Axis<0>>(y.shape())?;
    y.try_add(bias)
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

mod tests {
    use dfdx::tensor::{Cpu, Merge};

    use super::*;
    use crate::executor::ops::{InputGradient, Matrix, Norm, Ops, Trace, Weight, testing::noise};

    type Taped<D> = Rank2<D, OwnedTape<f32, D>>;
    type TapedMatrix<D> = Matrix<D, OwnedTape<f32, D>>;

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

    /// As close as rounding leaves numbers that are as large as the largest of them.
    fn close(found: &[f32], expected: &[f32], what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        let most = 1e-4 * expected.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((found - expected).abs() <= most, "{what}, {i}: {found}, not {expected}");
        }
    }

    fn cpu(values: Vec<f32>, shape: (usize, usize)) -> Rank2<Cpu> {
        constant(&Cpu::default(), values, shape).unwrap()
    }

    /// Both give the same values, and the same gradients of their inputs.
    fn agree<D: Ops, const N: usize>(
        device: &D,
        what: &str,
        shapes: [(usize, usize); N],
        kernel: impl Fn([TapedMatrix<D>; N]) -> Result<TapedMatrix<D>, D::Err>,
        composed: impl Fn([Taped<Cpu>; N]) -> Result<Taped<Cpu>, dfdx::tensor::CpuError>,
    ) {
        let values =
            std::array::from_fn::<_, N, _>(|i| noise(shapes[i].0 * shapes[i].1, 11 + i as u64));
        let inputs = std::array::from_fn(|i| cpu(values[i].clone(), shapes[i]));
        let y = composed(inputs.clone().map(|x| x.put_tape(OwnedTape::default()))).unwrap();
        let (shape, expected) = (*y.shape(), y.as_vec());
        let (target, samples) = (noise(expected.len(), 99), [0..shape.0 - 1, shape.0 - 1..shape.0]);
        let loss = squared_error(y, cpu(target.clone(), shape), &samples).unwrap();
        let gradients = loss.try_backward().unwrap();
        let expected_gradients = inputs.map(|x| gradients.get(&x).as_vec());

        let inputs = std::array::from_fn(|i| device.hold(values[i].clone(), shapes[i]).unwrap());
        let y = kernel(inputs.clone().map(|x| x.put_tape(OwnedTape::default()))).unwrap();
        assert_eq!(y.shape(), shape, "{what}");
        close(&y.on_host().unwrap(), &expected, what);
        let target = device.hold(target, shape).unwrap();
        let loss = D::squared_error(y, &target, &samples).unwrap();
        let mut gradients = loss.try_backward().unwrap();
        for (x, expected) in inputs.iter().zip(expected_gradients) {
            let found = D::take_gradient(&mut gradients, x).unwrap();
            close(&found, &expected, &format!("gradient of {what}"));
        }
    }

    mod bodies {
        use super::*;

        pub(super) fn activations<D: Ops>(device: &D) {
            for f in Activation::ALL {
                let what = format!("{f:?}");
                agree(device, &what, [(5, 7)], |[x]| D::activate(x, f), |[x]| activate(x, f));
                let shapes = [(3, 400), (3, 400)];
                let kernel = |[a, b]: [_; 2]| D::gated(a, b, f);
                agree(device, &what, shapes, kernel, |[a, b]| gated(a, b, f));
            }
        }

        pub(super) fn linear_layers<D: Ops>(device: &D) {
            for bias in [None, Some(noise(4, 3))] {
                let values = noise(20, 1);
                let weight = Weight::new(device, &values, (4, 5), bias.clone()).unwrap();
                let kernel = |[x]: [_; 1]| D::linear(x, &weight, InputGradient::Wanted, None);
                let transposed = (0..20).map(|i| values[i % 4 * 5 + i / 4]).collect::<Vec<_>>();
                agree(device, "linear", [(3, 5)], kernel, |[x]| {
                    let bias = bias.clone().map(|bias| cpu(bias, (1, 4)));
                    linear(x, cpu(transposed.clone(), (5, 4)), bias)
                });
            }
        }

        pub(super) fn norms<D: Ops>(device: &D) {
            for (bias, centred) in [(false, false), (true, true), (false, true)] {
                for (width, columns) in [(6, 6), (3, 6), (700, 700)] {
                    let (vector, shape) = (|seed| noise(width, seed), (1, width));
                    let norm = Norm {
                        weight: device.hold(vector(1), shape).unwrap(),
                        bias: bias.then(|| device.hold(vector(2), shape).unwrap()),
                        epsilon: 1e-5,
                        centred,
                    };
                    let kernel = |[x]: [_; 1]| D::normalise(x, &norm);
                    agree(device, "norm", [(4, columns)], kernel, |[x]| {
                        let bias = bias.then(|| cpu(vector(2), shape));
                        normalise(x, cpu(vector(1), shape), bias, 1e-5, centred)
                    });
                }
            }
        }

        pub(super) fn rotations<D: Ops>(device: &D) {
            let angles = noise(6, 4);
            let rotation = Rotation {
                cos: Arc::new(angles.iter().map(|a| 1.1 * a.cos()).collect()),
                sin: Arc::new(angles.iter().map(|a| 1.1 * a.sin()).collect()),
                half: 2,
            };
            for head in [4, 5] {
                let kernel = |[x]: [_; 1]| D::rotary(x, &rotation, head);
                agree(device, "rotary", [(6, 2 * head)], kernel, |[x]| rotary(x, &rotation, head));
            }
        }

        pub(super) fn attentions<D: Ops>(device: &D) {
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
            let check = |heads: Heads, rows: usize, sights: Option<&Arc<Vec<Sight>>>| {
                let keys = (rows, heads.keys * heads.width);
                let shapes = [(rows, heads.queries * heads.width), keys, keys];
                let kernel = |[q, k, v]: [_; 3]| D::attention(q, k, v, heads, sights, None);
                agree(device, "attention", shapes, kernel, |[q, k, v]| {
                    attention(q, k, v, heads, sights)
                });
            };
            for heads in [plain, capped, Heads { queries: 2, ..plain }] {
                for sights in [None, Some(&branched)] {
                    check(heads, 6, sights);
                }
            }
            // More rows than a tile has, on a CPU; more keys than a block of threads, on a GPU.
            check(Heads { sequence_length: 300, window: Some(270), ..plain }, 300, None);
        }

        pub(super) fn columns_and_caps<D: Ops>(device: &D) {
            let kernel = |[x]: [_; 1]| D::columns(x, 2..5);
            agree(device, "columns", [(3, 7)], kernel, |[x]| super::super::columns(x, 2..5));
            let add = |[a, b]: [TapedMatrix<D>; 2]| {
                let ((a, a_tape), (b, b_tape)) = (a.split_tape(), b.split_tape());
                D::add(a.put_tape(a_tape.merge(b_tape)), b)
            };
            agree(device, "sum", [(3, 7), (3, 7)], add, |[a, b]| a.try_add(b));
            let x = noise(12, 1);
            let expected = cap(cpu(x.clone(), (3, 4)), 0.5).unwrap().as_vec();
            let found = D::cap(&device.hold(x, (3, 4)).unwrap(), 0.5).unwrap();
            close(&found.on_host().unwrap(), &expected, "cap");
        }

        pub(super) fn losses<D: Ops>(device: &D) {
            let (rows, width, samples) = (5, 300, [0..2, 2..5]);
            let [y, t] = [1, 2].map(|seed| noise(rows * width, seed));
            let targets = [3, 0, 299, 2, 2];
            let theirs = |values: &[f32]| cpu(values.to_vec(), (rows, width));
            let ours = |values: &[f32]| device.hold(values.to_vec(), (rows, width)).unwrap();

            let (x, other) = (ours(&y), theirs(&y));
            let taped = x.clone().put_tape(OwnedTape::default());
            let found = D::squared_error(taped, &ours(&t), &samples).unwrap();
            let expected = other.retaped::<OwnedTape<f32, Cpu>>();
            let expected = squared_error(expected, theirs(&t), &samples).unwrap();
            close(&found.as_vec(), &expected.as_vec(), "squared error");
            let found = D::take_gradient(&mut found.try_backward().unwrap(), &x).unwrap();
            let expected = expected.try_backward().unwrap().get(&other).as_vec();
            close(&found, &expected, "gradient of squared error");

            let (x, other) = (ours(&y), theirs(&y));
            let found = D::cross_entropy(x.clone().put_tape(OwnedTape::default()), &targets);
            let found = found.unwrap();
            let expected = cross_entropy(other.retaped::<OwnedTape<f32, Cpu>>(), &targets).unwrap();
            close(&found.as_vec(), &expected.as_vec(), "cross-entropy");
            let found = D::take_gradient(&mut found.try_backward().unwrap(), &x).unwrap();
            let expected = expected.try_backward().unwrap().get(&other).as_vec();
            close(&found, &expected, "gradient of cross-entropy");
        }

        pub(super) fn sums<D: Ops>(device: &D) {
            let (rows, samples) = (50, [0..20, 20..50]);
            let [x, other, g] =
                [(1, 33), (3, 33), (2, 4)].map(|(seed, width)| (noise(rows * width, seed), width));
            let ours = |(values, width): &(Vec<f32>, usize)| {
                device.hold(values.clone(), (rows, *width)).unwrap()
            };
            let theirs = |(values, width): &(Vec<f32>, usize)| cpu(values.clone(), (rows, *width));
            let trace = Trace { input: ours(&x), gradient: ours(&g) };
            let empty = |rows, columns| cpu(vec![0.0; rows * columns], (rows, columns));

            let (mut found, mut expected) = (device.nothing(4, 33).unwrap(), empty(4, 33));
            let mut layers = [(&mut found, trace.clone())];
            D::add_squared_gradients(&mut layers, &samples).unwrap();
            add_squared_gradients(&mut expected, &theirs(&x), &theirs(&g), &samples).unwrap();
            close(&D::sums(found).unwrap(), &expected.as_vec(), "squared gradients");

            let (mut found, mut expected) = (device.nothing(33, 33).unwrap(), empty(33, 33));
            D::add_gram(&mut found, &trace.input).unwrap();
            D::add_gram(&mut found, &trace.input).unwrap();
            add_product(&mut expected, &theirs(&x), &theirs(&x)).unwrap();
            add_product(&mut expected, &theirs(&x), &theirs(&x)).unwrap();
            let (found, expected) = (D::sums(found).unwrap(), expected.as_vec());
            // Of a Gram matrix what lies below the diagonal counts.
            let below = |gram: &[f32]| -> Vec<f32> {
                (0..33).flat_map(|i| gram[i * 33..=i * 34].to_vec()).collect()
            };
            close(&below(&found), &below(&expected), "Gram matrix");

            let (mut found, mut expected) = (device.nothing(4, 33).unwrap(), empty(4, 33));
            D::add_product(&mut found, &trace.gradient, &trace.input).unwrap();
            add_product(&mut expected, &theirs(&g), &theirs(&x)).unwrap();
            close(&D::sums(found).unwrap(), &expected.as_vec(), "product");

            let entries = device.entries(vec![(1, 0, 0.5), (3, 32, -2.0)], (4, 33)).unwrap();
            let found = D::add_sparse_product(ours(&g), &ours(&x), &entries).unwrap();
            let mut entries = vec![0.0; 132];
            (entries[1], entries[32 * 4 + 3]) = (0.5, -2.0);
            let expected =
                add_sparse_product(theirs(&g), &theirs(&x), &cpu(entries, (33, 4))).unwrap();
            close(&found.on_host().unwrap(), &expected.as_vec(), "sparse product");

            let found = D::blend(&trace.input, &ours(&other), 0.3).unwrap();
            let expected = blend(&theirs(&x), &theirs(&other), 0.3).unwrap();
            close(&found.on_host().unwrap(), &expected.as_vec(), "blend");
            let found = D::difference(&trace.input, &ours(&other)).unwrap();
            let expected = theirs(&other).try_sub(theirs(&x)).unwrap();
            close(&found.on_host().unwrap(), &expected.as_vec(), "difference");

            let found = D::column_squares(&trace.input, &samples).unwrap().concat();
            let expected = super::column_squares(&theirs(&x), &samples).unwrap().concat();
            close(&found, &expected, "column squares");
        }

        pub(super) fn what_is_not_finite_is_found<D: Ops>(device: &D) {
            for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = noise(1000, 1);
                let held = |values: &[f32]| device.hold(values.to_vec(), (10, 100)).unwrap();
                assert_eq!(D::first_not_finite(&held(&values)).unwrap(), None);
                (values[977], values[512]) = (wrong, wrong);
                let (place, value) = D::first_not_finite(&held(&values)).unwrap().unwrap();
                assert_eq!((place, value.to_bits()), (512, wrong.to_bits()));
            }
        }
    }

    on_devices!(activations);
    on_devices!(linear_layers);
    on_devices!(norms);
    on_devices!(rotations);
    on_devices!(attentions);
    on_devices!(columns_and_caps);
    on_devices!(losses);
    on_devices!(sums);
    on_devices!(what_is_not_finite_is_found);
}
