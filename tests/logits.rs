//! The forward pass against transformers: logits of tiny random checkpoints, one for each family,
//! and for each way in which configuration, storage and quantisation change it. `tests/fixtures/` has
//! them and the scripts that recorded them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::path::Path;

use dfdx::tensor::Cpu;
use llm_barber::{
    checkpoint::{Pruned, Reader},
    evaluate::{logits, perplexity},
    executor::ops::Ops,
    model::Model,
};
use safetensors::SafeTensors;

fn agrees(name: &str) {
    agrees_on(Cpu::default(), name);
    #[cfg(feature = "cuda")]
    if let Some(gpu) = util::gpu() {
        agrees_on(gpu, name);
    }
}

fn agrees_on<D: Ops>(device: D, name: &str) {
    let dir = Path::new("tests/fixtures/logits").join(name);
    let expected = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let [ids, recorded] = ["ids", "logits"].map(|name| expected.tensor(name).unwrap());
    let length = ids.shape()[1];
    let ids: Vec<u32> = ids
        .data()
        .chunks_exact(8)
        .map(|b| i64::from_le_bytes(b.try_into().unwrap()).try_into().unwrap())
        .collect();
    let recorded: Vec<f32> = recorded
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let reader = Reader::open(&dir).unwrap();
    let model = Model::new(&reader, device).unwrap();
    let found = ids.chunks(length).map(|ids| logits(&model, &Pruned::dense(), ids).unwrap());
    let found: Vec<f32> = found.flatten().collect();
    assert_eq!(found.len(), recorded.len());
    for (i, (recorded, found)) in recorded.iter().zip(found).enumerate() {
        assert!((recorded - found).abs() < 1e-4, "logit {i}: {recorded} {found}");
    }
    // The perplexity is that of the recorded logits.
    let segments: Vec<Vec<u32>> = ids.chunks(length).map(<[u32]>::to_vec).collect();
    let found = perplexity(&model, &Pruned::dense(), &segments, |_| ()).unwrap();
    let rows = recorded.chunks(recorded.len() / ids.len()).map(|row| {
        let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
        move |token: u32| sum.ln() - f64::from(row[token as usize])
    });
    let losses = rows.enumerate().filter(|(i, _)| (i + 1) % length != 0);
    let losses: Vec<f64> = losses.map(|(i, loss)| loss(ids[i + 1])).collect();
    let expected = (losses.iter().sum::<f64>() / losses.len() as f64).exp();
    assert!((found.perplexity / expected - 1.0).abs() < 1e-5, "{} {expected}", found.perplexity);
}

macro_rules! agrees {
    ($($test:ident $name:literal)*) => { $(
        #[test]
        fn $test() {
            agrees($name);
        }
    )* };
}

agrees! {
    biases "biases"
    cohere2 "cohere2"
    cohere2_with_biases "cohere2-biases"
    deepseek_v3 "deepseek-v3"
    deepseek_v3_in_one_group "deepseek-v3-one-group"
    deepseek_v3_with_biases "deepseek-v3-biases"
    dynamic "dynamic"
    exaone4 "exaone4"
    exaone4_without_a_window "exaone4-no-window"
    f32 "f32"
    float8_in_blocks "float8-blocks"
    float8_in_rows "float8-rows"
    fp8 "fp8"
    fp8_blocks_that_end_early "fp8-uneven"
    fp8_experts "fp8-moe"
    fp8_with_a_scale_per_matrix "fp8-matrix"
    gemma2 "gemma2"
    gemma3 "gemma3"
    gemma3_by_type_of_layer "gemma3-by-type"
    gemma3_with_images "gemma3-images"
    glm4 "glm4"
    gpt_neox "gpt-neox"
    gpt_neox_one_part_after_the_other "gpt-neox-one-after-the-other"
    gpt_oss "gpt-oss"
    gpt_oss_by_default "gpt-oss-defaults"
    granite "granite"
    granite_with_biases "granite-biases"
    granitemoe "granitemoe"
    granitemoe_with_biases "granitemoe-biases"
    grouped_and_tied "gqa-tied"
    head_dim "head-dim"
    int8_in_groups "int8-groups"
    int8_in_rows "int8-rows"
    int8_packed "int8-packed"
    int8_with_a_scale_per_matrix "int8-matrix"
    linear "linear"
    llama3 "llama3"
    ministral "ministral"
    ministral3_with_images "ministral3"
    ministral3_without_images "ministral3-text"
    mistral "mistral"
    mistral_with_images "mistral3"
    mistral_without_a_window "mistral-no-window"
    mixtral "mixtral"
    mixtral_with_a_window "mixtral-window"
    nemotron "nemotron"
    nemotron_with_biases "nemotron-biases"
    olmo2 "olmo2"
    olmo3 "olmo3"
    olmo3_with_another_theta "olmo3-theta"
    olmoe "olmoe"
    opt "opt"
    opt_with_norms_after "opt-norm-after"
    opt_without_biases "opt-no-bias"
    phi "phi"
    phi_with_norms_of_queries_and_keys "phi-norms"
    phi3 "phi3"
    phi3_longrope "phi3-longrope"
    qwen2 "qwen2"
    qwen2_moe "qwen2-moe"
    qwen2_moe_in_some_layers "qwen2-moe-mixed"
    qwen3 "qwen3"
    qwen3_moe "qwen3-moe"
    qwen3_moe_in_some_layers "qwen3-moe-mixed"
    seed_oss "seed-oss"
    seed_oss_with_biases "seed-oss-biases"
    sharded_bf16 "sharded-bf16"
    sharded_f16 "sharded-f16"
    smollm3 "smollm3"
    smollm3_with_windows "smollm3-windows"
    yarn "yarn"
}
