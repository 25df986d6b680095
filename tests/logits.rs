//! The forward pass against transformers: logits of tiny random checkpoints, one for each way in
//! which a LLaMA's configuration changes it. `tests/fixtures/make-logits.py` recorded them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use dfdx::tensor::Cpu;
use llm_barber::{
    checkpoint::Reader,
    evaluate::logits,
    model::{Masks, Model},
};

#[derive(serde::Deserialize)]
struct Expected {
    token_ids: Vec<u32>,
    /// Of the last position.
    logits: Vec<f32>,
}

fn agrees(name: &str) {
    let dir = Path::new("tests/fixtures/logits").join(name);
    let expected = std::fs::read(dir.join("expected.json")).unwrap();
    let Expected { token_ids, logits: expected } = serde_json::from_slice(&expected).unwrap();
    let reader = Reader::open(&dir).unwrap();
    let model = Model::new(&reader, Cpu::default()).unwrap();
    let found = logits(&model, &Masks::new(), &token_ids).unwrap();
    assert_eq!(found.len(), token_ids.len() * expected.len());
    let last = &found[found.len() - expected.len()..];
    assert!(expected.iter().any(|logit| logit.abs() > 0.1));
    for (i, (expected, found)) in expected.iter().zip(last).enumerate() {
        assert!((expected - found).abs() < 1e-4, "token {i}: {expected} {found}");
    }
}

macro_rules! agrees {
    ($($name:ident)*) => { $(
        #[test]
        fn $name() {
            agrees(stringify!($name));
        }
    )* };
}

agrees! { tied biased linear dynamic yarn llama3 longrope }
