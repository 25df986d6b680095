//! The CPU's kernels, in percent of what the machine can do: of the best rate of matrix products that
//! this run measures, or of the bandwidth of a copy that is larger than the caches.
#![allow(clippy::print_stdout, reason = "a table is what a benchmark is for")]

use std::{hint::black_box, time::Instant};

use barber_metric::{Dims, LayerStats};
use criterion::{Criterion, Throughput};
use dfdx::tensor::Cpu;
use llm_barber::{
    executor::ops::{
        Attention, Gated, Heads, Hold, InputGradient, Linear, Matrix, Norm, Normalise,
        SparseProduct, Sums, Trace, Weight,
    },
    family::Activation,
    mask::{Amount, Comparison, Distribution, Init, Pattern, Scope, Scored, rebuild},
    random::SplitMix64,
};

const TOKENS: usize = 2048;

fn matrix(rows: usize, columns: usize) -> Matrix<Cpu> {
    let values = (0..rows * columns).map(|i| (i * 7919 % 2003) as f32 / 1000.0 - 1.0).collect();
    Cpu::default().hold(values, (rows, columns)).expect("memory")
}

/// Measures a kernel; returns its best time in seconds.
fn measure(c: &mut Criterion, name: &str, work: Throughput, mut kernel: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    let mut group = c.benchmark_group("kernels");
    group.throughput(work).sample_size(10);
    group.bench_function(name, |b| {
        b.iter_custom(|times| {
            let started = Instant::now();
            (0..times).for_each(|_| kernel());
            let taken = started.elapsed();
            best = best.min(taken.as_secs_f64() / times as f64);
            taken
        });
    });
    group.finish();
    best
}

fn linear(c: &mut Criterion, name: &str, inputs: usize, outputs: usize) -> (f64, f64) {
    let values: Vec<f32> = matrix(outputs, inputs).to_vec();
    let weight = Weight::new(&Cpu::default(), &values, (outputs, inputs), None).expect("memory");
    let x = matrix(TOKENS, inputs);
    let work = 2.0 * (TOKENS * inputs * outputs) as f64;
    let best = measure(c, name, Throughput::Elements(work as u64), || {
        black_box(Cpu::linear(x.clone(), &weight, InputGradient::Skipped, None).expect("memory"));
    });
    (work, best)
}

fn main() {
    let mut c = Criterion::default().configure_from_args();
    let (work, best) = linear(&mut c, "matrix product, 2048 × 4096 × 4096", 4096, 4096);
    let peak = work / best;
    let from = vec![1.0f32; 1 << 26];
    let mut to = vec![0.0f32; 1 << 26];
    let bytes = 2.0 * 4.0 * from.len() as f64;
    let copy = measure(&mut c, "copy", Throughput::Bytes(bytes as u64), || {
        use rayon::prelude::*;
        to.par_chunks_mut(1 << 16).zip(from.par_chunks(1 << 16)).for_each(|(a, b)| {
            a.copy_from_slice(b);
        });
        black_box(&to);
    });
    let bandwidth = bytes / copy;
    let mut rows = vec![format!("peak: {:.0} GFLOP/s, {:.1} GB/s", peak / 1e9, bandwidth / 1e9)];
    let mut row = |name: &str, work: f64, best: f64, of: f64| {
        rows.push(format!("{name:45} {:9.3} ms  {:5.1}%", best * 1e3, 100.0 * work / best / of));
    };
    for (inputs, outputs) in [(576, 576), (576, 1536), (1536, 576), (4096, 11008)] {
        let name = format!("linear, 2048 × {inputs} × {outputs}");
        let (work, best) = linear(&mut c, &name, inputs, outputs);
        row(&name, work, best, peak);
    }
    for (inputs, outputs) in [(576, 1536), (4096, 4096)] {
        let (input, gradient) = (matrix(TOKENS, inputs), matrix(TOKENS, outputs));
        let trace = Trace { input, gradient, rows: None };
        let samples: Vec<_> = (0..8).map(|i| i * 256..(i + 1) * 256).collect();
        let mut sum = Cpu::default().nothing(outputs, inputs).expect("memory");
        let work = 2.0 * (TOKENS * inputs * outputs) as f64;
        let name = format!("squared gradients, 2048 × {inputs} × {outputs}");
        let best = measure(&mut c, &name, Throughput::Elements(work as u64), || {
            let mut layers = [(&mut sum, trace.clone())];
            Cpu::add_squared_gradients(&mut layers, &samples).expect("memory");
        });
        row(&name, work, best, peak);
    }
    let heads = Heads {
        queries: 9,
        keys: 3,
        width: 64,
        values: 64,
        sequence_length: 256,
        scale: 0.125,
        window: None,
        cap: None,
    };
    let (q, k) = (matrix(TOKENS, 576), matrix(TOKENS, 192));
    // What causal attention needs: half of each sequence's scores, and as much for the outputs.
    let work = 2.0 * (TOKENS * 256 * 576) as f64;
    let best = measure(&mut c, "attention", Throughput::Elements(work as u64), || {
        let attended = Cpu::attention(q.clone(), k.clone(), k.clone(), heads, None, None, None);
        black_box(attended.expect("memory"));
    });
    row("attention, 8 × 256 tokens, 9 heads of 64", work, best, peak);
    let (gate, up) = (matrix(TOKENS, 1536), matrix(TOKENS, 1536));
    let bytes = 3.0 * 4.0 * (TOKENS * 1536) as f64;
    let best = measure(&mut c, "SwiGLU", Throughput::Bytes(bytes as u64), || {
        black_box(Cpu::gated(gate.clone(), up.clone(), Activation::Silu.into()).expect("memory"));
    });
    row("SwiGLU, 2048 × 1536 (of bandwidth)", bytes, best, bandwidth);
    let norm = Norm { weight: matrix(1, 576), bias: None, epsilon: 1e-5, centred: false };
    let bytes = 2.0 * 4.0 * (TOKENS * 576) as f64;
    let best = measure(&mut c, "norm", Throughput::Bytes(bytes as u64), || {
        black_box(Cpu::normalise(q.clone(), &norm).expect("memory"));
    });
    row("RMS norm, 2048 × 576 (of bandwidth)", bytes, best, bandwidth);
    // Half of the weights are pruned, the scores no longer say which.
    let dims = Dims { rows: 1536, columns: 576 };
    let noise = |seed| {
        let mut random = SplitMix64::new(seed);
        (0..dims.len()).map(|_| (random.bits() >> 40) as f32 + 1.0).collect::<Vec<_>>()
    };
    let mut scores = noise(1);
    let other = scores.clone();
    scores.iter_mut().zip(noise(2)).for_each(|(score, noise)| *score += 0.3 * noise);
    let half = Amount::Ratio(0.5);
    let metric = Init::named("metric").expect("an initial mask");
    let start = |scores: &[f32]| {
        let stats = LayerStats { name: "w", dims, weight: scores, ..LayerStats::default() };
        metric.choose(&stats, Pattern::UNSTRUCTURED, half, Some((scores, None))).expect("a mask")
    };
    let initial = start(&other).mask;
    let bytes = 4.0 * dims.len() as f64;
    let best = measure(&mut c, "mask rebuild", Throughput::Bytes(bytes as u64), || {
        let mut mask = initial.clone();
        let (scope, pattern) = (Scope::Row, Pattern::UNSTRUCTURED);
        let mut group = [Scored { name: "w", scores: &scores, mask: &mut mask }];
        black_box(rebuild(&mut group, scope, pattern, 0.1, Comparison::Pools).expect("a mask"));
    });
    row("mask rebuild by rows, 1536 × 576 (of bandwidth)", bytes, best, bandwidth);
    let best = measure(&mut c, "distribution", Throughput::Bytes(bytes as u64), || {
        Distribution::default().matrix(&initial, &initial, |i| black_box(&scores)[i]);
    });
    row("scores' distribution, 1536 × 576 (of bandwidth)", bytes, best, bandwidth);
    let best = measure(&mut c, "initial mask", Throughput::Bytes(bytes as u64), || {
        black_box(start(&scores));
    });
    row("initial mask by rows, 1536 × 576 (of bandwidth)", bytes, best, bandwidth);
    let entries: Vec<_> =
        (0..dims.len()).step_by(50).map(|i| (i / dims.columns, i % dims.columns, 0.5)).collect();
    let entries = Cpu::default().entries(entries, (dims.rows, dims.columns)).expect("memory");
    let (x, y) = (matrix(TOKENS, dims.columns), matrix(TOKENS, dims.rows));
    let bytes = 4.0 * (TOKENS * (dims.columns + 2 * dims.rows)) as f64;
    let best = measure(&mut c, "sparse product", Throughput::Bytes(bytes as u64), || {
        let found = Cpu::add_sparse_product(y.clone(), &x, &entries);
        black_box(found.expect("memory"));
    });
    row("sparse product of 2%, 2048 × 576 × 1536 (of bandwidth)", bytes, best, bandwidth);
    println!("\n{}", rows.join("\n"));
}
