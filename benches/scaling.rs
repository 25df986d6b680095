//! How time and memory grow: with samples, sequence length, layers and width, on LLaMAs with random
//! weights; one decoder layer of LLaMA-7B's shape within 6 GiB, extrapolated to the whole model; and
//! one of Qwen3-30B-A3B's shape, a mixture of experts, within 4 GiB, and the same with an MLP of as
//! many operations. Beside them, what percentage of the time at the layers was matrix products, and
//! at what rate.
//!
//! `BARBER_SCALING=7b` runs the large layer alone, `BARBER_SCALING=experts` the mixture of experts,
//! `BARBER_SCALING=small` the others. `BARBER_SCALING=gpu` runs layers of LLaMA-7B's and 13B's shapes
//! on the first GPU alone, with `--features cuda`.
#![allow(clippy::print_stdout, reason = "a table is what a benchmark is for")]

mod util;

use std::{
    env, fs,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use half::f16;
use llm_barber::{family, random::SplitMix64};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use util::{AtLayers, Run, at_layers, peak, run};

#[derive(Clone, Copy)]
struct Shape {
    hidden: usize,
    mlp: usize,
    heads: usize,
    layers: usize,
    samples: usize,
    length: usize,
}

const VOCABULARY: usize = 256;
const GIB: f64 = (1_u64 << 30) as f64;

/// The configuration of a LLaMA.
fn llama(shape: Shape) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
        "hidden_size": shape.hidden, "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads, "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": true,
    })
}

/// The experts of Qwen3-30B-A3B: their number, those of each token, and their width.
const EXPERTS: (usize, usize, usize) = (128, 8, 768);

/// The configuration of a layer of Qwen3-30B-A3B, or of one with an MLP as wide as the experts of a
/// token together.
fn qwen3(experts: bool) -> Value {
    let (count, active, width) = EXPERTS;
    json!({
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": if experts { "qwen3_moe" } else { "qwen3" }, "torch_dtype": "float16",
        "hidden_size": 2048, "intermediate_size": active * width, "moe_intermediate_size": width,
        "num_experts": count, "num_experts_per_tok": active, "norm_topk_prob": true,
        "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": VOCABULARY, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
        "tie_word_embeddings": true,
    })
}

/// Writes a model with random weights, and random calibration tokens: `samples` of `length`.
fn make(config: &Value, (samples, length): (usize, usize), dir: &Path) {
    let _ = fs::remove_dir_all(dir);
    fs::create_dir_all(dir).expect("a directory");
    fs::write(dir.join("config.json"), config.to_string()).expect("a configuration");
    let decoder = family::decoder(config).expect("a decoder");
    let mut random = SplitMix64::new(1);
    let mut tensors = Vec::new();
    for (name, shape) in decoder.tensors() {
        let count: usize = shape.iter().product();
        let scale = (shape[shape.len() - 1] as f32).sqrt().recip();
        let mut bytes = Vec::with_capacity(2 * count);
        for _ in 0..count {
            let x = match shape.len() {
                1 => 1.0,
                _ => scale * ((random.bits() >> 40) as f32 / (1 << 22) as f32 - 2.0),
            };
            bytes.extend(f16::from_f32(x).to_le_bytes());
        }
        tensors.push((name.to_owned(), shape, bytes));
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(Dtype::F16, shape.clone(), bytes).expect("a tensor"))
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).expect("weights");
    let ids = |_| (0..length).map(|_| random.below(VOCABULARY)).collect::<Vec<_>>();
    let ids: Vec<_> = (0..samples).map(ids).collect();
    let ids = json!({ "token_ids": ids });
    fs::write(dir.join("tokens.json"), ids.to_string()).expect("tokens");
}

/// How a run on so many samples of so many tokens went, and what it did at the layers.
fn measure(config: &Value, of: (usize, usize), sets: &[&str]) -> (Run, AtLayers) {
    let dir = env::temp_dir().join("barber-scaling");
    let out = env::temp_dir().join("barber-scaling-out");
    make(config, of, &dir);
    let mut command = Command::new(env!("CARGO_BIN_EXE_barber"));
    command.args(["prune", "recipes/smollm2-wanda.toml", "--force", "--json"]);
    for set in [
        format!("model.path={}", dir.display()),
        format!("calibration.source={}", dir.join("tokens.json").display()),
        format!("calibration.samples={}", of.0),
        format!("calibration.sequence_length={}", of.1),
        // The model's own directory is refused.
        format!("output.path={}", out.display()),
        "evaluate.perplexity=[]".into(),
    ] {
        command.args(["--set", &set]);
    }
    sets.iter().for_each(|set| _ = command.args(["--set", set]));
    let found = run(&mut command);
    let layers = at_layers(&out);
    let _ = fs::remove_dir_all(&dir);
    let _ = fs::remove_dir_all(&out);
    (found, layers)
}

/// The most memory that the first GPU's processes have until it `ended`, in MiB.
fn gpu_memory(ended: &AtomicBool) -> u64 {
    let mut most = 0;
    while !ended.load(Ordering::Relaxed) {
        let mut command = Command::new("nvidia-smi");
        command.args(["--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]);
        let output = command.output().expect("nvidia-smi");
        let now = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap_or(0);
        most = most.max(now);
        thread::sleep(Duration::from_millis(200));
    }
    most
}

/// Two layers each, at the paper's 128 samples, in one pass and in two.
fn on_gpu() {
    let (samples, length, layers) = (128, 2048, 2);
    println!("{samples} × {length} tokens, {layers} layers");
    println!("shape      passes  a layer  the whole model  TFLOP/s  GPU memory  host memory");
    for passes in [1, 2] {
        for (name, hidden, mlp, all) in
            [("LLaMA-7B", 4096, 11008, 32), ("LLaMA-13B", 5120, 13824, 40)]
        {
            let shape = Shape { hidden, mlp, heads: hidden / 128, layers, samples, length };
            let (ended, set) = (AtomicBool::new(false), format!("mask.passes={passes}"));
            let (gpu, (Run { seconds, memory }, found)) = thread::scope(|scope| {
                let gpu = scope.spawn(|| gpu_memory(&ended));
                let sets = ["executor.device=cuda:0", &set];
                let found = measure(&llama(shape), (samples, length), &sets);
                ended.store(true, Ordering::Relaxed);
                (gpu.join().expect("a number"), found)
            });
            let layer = seconds / layers as f64;
            println!(
                "{name:9}  {passes:6}  {layer:5.1} s  {:11.0} min  {:7.1}  {:6.1} GiB  {:8.2} GB",
                layer * f64::from(all) / 60.0,
                found.operations / found.seconds / 1e12,
                gpu as f64 / 1024.0,
                memory as f64 / 1e9,
            );
        }
    }
}

fn main() {
    let wanted = env::var("BARBER_SCALING").unwrap_or_default();
    if wanted == "gpu" {
        return on_gpu();
    }
    let peak = peak();
    println!("the best rate of matrix products is {:.0} GFLOP/s;", peak / 1e9);
    println!(
        "products: their percentage of the time at the layers, and their rate in percent of the best"
    );
    if !["7b", "experts"].contains(&&*wanted) {
        let base = Shape { hidden: 512, mlp: 1408, heads: 8, layers: 4, samples: 16, length: 512 };
        println!(
            "hidden  layers  samples  tokens      time  per token, layer, weight    products     memory"
        );
        for shape in [
            base,
            Shape { samples: 32, ..base },
            Shape { samples: 64, ..base },
            Shape { length: 1024, ..base },
            Shape { length: 2048, ..base },
            Shape { layers: 8, ..base },
            Shape { layers: 16, ..base },
            Shape { hidden: 1024, mlp: 2816, heads: 16, ..base },
        ] {
            let Shape { hidden, mlp, layers, samples, length, .. } = shape;
            let (Run { seconds, memory }, found) =
                measure(&llama(shape), (samples, length), &["executor.memory=600 MB"]);
            let weights = layers * (4 * hidden * hidden + 3 * hidden * mlp);
            println!(
                "{hidden:6}  {layers:6}  {samples:7}  {length:6}  {seconds:6.1} s  {:22.3} ps  \
                 {:3.0}% at {:2.0}%  {:6.0} MB",
                seconds * 1e12 / (samples * length) as f64 / weights as f64,
                found.product_time(),
                found.rate(peak),
                memory as f64 / 1e6
            );
        }
    }
    if !["small", "experts"].contains(&&*wanted) {
        let layer =
            Shape { hidden: 4096, mlp: 11008, heads: 32, layers: 1, samples: 16, length: 2048 };
        let (Run { seconds, memory }, found) =
            measure(&llama(layer), (layer.samples, layer.length), &["executor.memory=5 GiB"]);
        println!(
            "one layer of LLaMA-7B, 16 × 2048 tokens: {seconds:.0} s, products {:.0}% at {:.0}% of the best \
             rate, {:.2} GB",
            found.product_time(),
            found.rate(peak),
            memory as f64 / 1e9
        );
        println!("the whole model, 32 layers: {:.1} h", 32.0 * seconds / 3600.0);
    }
    if !["small", "7b"].contains(&&*wanted) {
        experts(peak);
    }
}

/// A layer of Qwen3-30B-A3B's shape, and the same with an MLP of as many operations a token.
fn experts(peak: f64) {
    let of = (16, 2048);
    let tokens = (of.0 * of.1) as f64;
    let rates = [true, false].map(|experts| {
        let (Run { memory, .. }, found) = measure(&qwen3(experts), of, &["executor.memory=3.7 GB"]);
        println!(
            "one layer of Qwen3-30B-A3B{}, {} × {} tokens: {:.0} tokens/s, products {:.0}% at {:.0}% of \
             the best rate, {:.2} GiB",
            if experts { "" } else { " with one MLP" },
            of.0,
            of.1,
            tokens / found.seconds,
            found.product_time(),
            found.rate(peak),
            memory as f64 / GIB
        );
        assert!(memory as f64 <= 4.0 * GIB, "a layer takes more than 4 GiB");
        found.rate(peak)
    });
    println!("the products of experts: {:.0}% of the dense rate", 100.0 * rates[0] / rates[1]);
}
