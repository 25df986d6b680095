//! Measures the rate of matrix products on a device, with the shapes of a model.

use std::{collections::BTreeMap, time::Instant};

use super::{
    BATCH, Error,
    ops::{InputGradient, Matrix, Ops, Products, Weight},
};
use crate::family::Decoder;

/// Approximate time of a measurement, in seconds.
const SECONDS: f64 = 1.0;
/// Maximum cost of a measurement as a fraction of the work ahead: short runs should not wait for
/// their forecast.
const COST: f64 = 0.01;
/// Maximum number of outputs of a measured product. Larger products have the same rate, and would
/// take too long.
const OUTPUTS: usize = 1024;

/// Floating-point operations per second of matrix products on a device: a batch of hidden states
/// times each weight of a decoder, on all threads. The measurement takes about a second, or less if
/// only `work` operations are ahead.
///
/// # Errors
/// If the device runs out of memory, or is lost.
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

/// Measures products with one weight for about half of `seconds`, or until `enough` operations are
/// done.
fn products<D: Ops>(
    device: &D,
    (outputs, inputs): (usize, usize),
    seconds: f64,
    enough: f64,
) -> Result<Products, D::Err> {
    // The values do not matter as long as they are not denormal.
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
        // A GPU computes asynchronously, in order: this waits for the last product.
        product(&row)?.on_host()?;
        let operations = count * 2 * (BATCH * outputs * inputs) as u64;
        Ok(Products { operations, seconds: started.elapsed().as_secs_f64() })
    };
    // The first product of a shape prepares what the others use.
    timed(1)?;
    let mut count = 1;
    loop {
        let timed = timed(count)?;
        // The measurements before took the other half, as each takes twice as long as the last.
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
