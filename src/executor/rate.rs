//! How fast a device multiplies matrices of a model's shapes: measured, not looked up.

use std::{collections::BTreeMap, time::Instant};

use super::{
    BATCH, Error,
    ops::{InputGradient, Matrix, Ops, Products, Weight},
};
use crate::family::Decoder;

/// Seconds that a measurement takes, about.
const SECONDS: f64 = 1.0;
/// The fraction of the work ahead that a measurement may cost: a run of two seconds does not wait
/// a third one for its forecast.
const COST: f64 = 0.01;
/// Outputs that are computed of a weight at most. A product of more of them has the same rate, and
/// would not fit in the time.
const OUTPUTS: usize = 1024;

/// The floating-point operations a second of matrix products on a device: a batch of hidden states
/// times each weight of a decoder, on all threads. It is measured in about a second, or in less
/// where only `work` operations are to come.
///
/// # Errors
/// If the device has not enough memory, or is lost.
pub fn rate<D: Ops>(device: &D, decoder: &Decoder, work: f64) -> Result<f64, Error> {
    let mut shapes: BTreeMap<(usize, usize), f64> = BTreeMap::new();
    for linear in decoder.projections() {
        *shapes.entry((linear.dims.rows, linear.dims.columns)).or_default() +=
            linear.dims.len() as f64;
    }
    let count = shapes.len() as f64;
    let (mut weights, mut seconds) = (0.0, 0.0);
    for ((outputs, inputs), of) in shapes {
        let shape = (outputs.min(OUTPUTS), inputs);
        let timed = products(device, shape, SECONDS / count, COST * work / count);
        let timed = timed.map_err(Error::device)?;
        weights += of;
        seconds += of * timed.seconds / timed.operations as f64;
    }
    Ok(weights / seconds)
}

/// Products with one weight, (outputs, inputs), that took about half of so many `seconds`, or less
/// where `enough` operations were done before.
fn products<D: Ops>(
    device: &D,
    (outputs, inputs): (usize, usize),
    seconds: f64,
    enough: f64,
) -> Result<Products, D::Err> {
    // Any numbers will do that are not denormal.
    let numbers = |count: usize| (0..count).map(|i| (i % 7) as f32 - 3.0).collect::<Vec<_>>();
    let weight = Weight::new(device, &numbers(outputs * inputs), (outputs, inputs), None)?;
    let batch = device.hold(numbers(BATCH * inputs), (BATCH, inputs))?;
    let row = device.hold(numbers(inputs), (1, inputs))?;
    let product = |x: &Matrix<D>| D::linear(x.clone(), &weight, InputGradient::Skipped, None);
    let timed = |count: u64| {
        let started = Instant::now();
        for _ in 0..count {
            product(&batch)?;
        }
        // A GPU computes in the background, in order: this waits for all of it.
        product(&row)?.on_host()?;
        let operations = count * 2 * (BATCH * outputs * inputs) as u64;
        Ok(Products { operations, seconds: started.elapsed().as_secs_f64() })
    };
    // The first product of a shape prepares what the others use.
    timed(1)?;
    let mut count = 1;
    loop {
        let timed = timed(count)?;
        // The ones before, each half as long, have taken the other half of the time.
        if timed.seconds >= seconds / 2.0 || timed.operations as f64 >= enough {
            return Ok(timed);
        }
        count *= 2;
    }
}

#[cfg(test)]
mod tests {
    use dfdx::tensor::Cpu;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_rate_is_measured() {
        let decoder = crate::family::decoder(&json!({
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16
        }))
        .unwrap();
        let found = rate(&Cpu::default(), &decoder, 1.0).unwrap();
        assert!(found.is_finite() && found > 0.0, "{found}");
    }

    #[test]
    fn products_are_repeated_until_they_can_be_timed() {
        let one = 2 * (BATCH * 8 * 4) as u64;
        for (seconds, enough, count) in [(1e9, 0.0, 1), (1e9, 4.5 * one as f64, 8), (0.0, 1e9, 1)] {
            let found = products(&Cpu::default(), (8, 4), seconds, enough).unwrap();
            assert_eq!(found.operations, count * one);
            assert!(found.seconds > 0.0);
        }
    }
}
