//! Conjugate gradients beside least squares in closed form, on a matrix of the shape of LLaMA-7B's
//! `down_proj` at 50%: seconds a row, and how far apart the values are.
//!
//! `BARBER_ROWS` is the number of rows that each solves, `4,256` if left out: a factorisation for each
//! of 4,096 rows takes hours.
#![allow(clippy::print_stdout, reason = "a table is what a benchmark is for")]

use std::{env, time::Instant};

use barber_metric::Dims;
use dfdx::tensor::Cpu;
use llm_barber::{
    executor::ops::{Hold, Sums},
    mask::{Mask, OutputError, conjugate_gradient, least_squares},
    random::SplitMix64,
};

const COLUMNS: usize = 11008;
const TOKENS: usize = 4096;

fn main() {
    let rows = env::var("BARBER_ROWS").unwrap_or_else(|_| "4,256".into());
    let Some((Ok(exact), Ok(all))) =
        rows.split_once(',').map(|(a, b)| (a.parse::<usize>(), b.parse::<usize>()))
    else {
        println!("BARBER_ROWS: `{rows}` is not ROWS,ROWS");
        return;
    };
    let mut random = SplitMix64::new(0);
    let mut noise = |count: usize| -> Vec<f32> {
        (0..count).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect()
    };
    // Inputs that hang together, a few of them far larger than the rest.
    let mut x = noise(TOKENS * COLUMNS);
    for x in x.chunks_mut(COLUMNS) {
        (1..COLUMNS).for_each(|j| x[j] += 0.7 * x[j - 1]);
        (0..COLUMNS).step_by(97).for_each(|j| x[j] *= 30.0);
    }
    let cpu = Cpu::default();
    let x = cpu.hold(x, (TOKENS, COLUMNS)).expect("memory");
    let mut sum = cpu.nothing(COLUMNS, COLUMNS).expect("memory");
    Cpu::add_product(&mut sum, &x, &x).expect("memory");
    let gram = Cpu::sums(sum).expect("memory");
    drop(x);
    let weight = noise(all * COLUMNS);
    let keeps = noise(all * COLUMNS);
    let error = OutputError { gram: &gram, shift: None, shrinkage: 0.2 };
    let mut values = Vec::new();
    let names = ["least squares", "conjugate gradients"];
    for (name, rows) in names.into_iter().zip([exact, all]) {
        let (dims, weight) = (Dims { rows, columns: COLUMNS }, &weight[..rows * COLUMNS]);
        let mask = Mask::from_fn(dims, |i| keeps[i] > 0.0);
        let started = Instant::now();
        let solve = if values.is_empty() { least_squares } else { conjugate_gradient };
        let found = solve("down_proj", weight, &mask, error, 0.01).expect("values");
        let seconds = started.elapsed().as_secs_f64() / rows as f64;
        println!("{name}: {seconds:.4} s a row, {rows} rows");
        values.push((seconds, found));
    }
    let [(slow, expected), (fast, found)] = &values[..] else { return };
    let square = |of: &mut dyn Iterator<Item = f32>| of.map(|x| f64::from(x * x)).sum::<f64>();
    let apart = square(&mut expected.iter().zip(found).map(|(a, b)| a - b));
    let size = square(&mut expected.iter().copied());
    println!("{:.1} times as fast; values apart by {:.1e}", slow / fast, (apart / size).sqrt());
}
