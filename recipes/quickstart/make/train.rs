//! Trains a tiny LLaMA with Barber's own executor and AdamW (arXiv 1711.05101).

use std::{
    cell::Cell, collections::HashMap, error::Error, f32::consts::PI, fs, path::Path, rc::Rc,
    time::Instant,
};

use dfdx::{
    tensor::{Cpu, CpuError, OwnedTape, Tape, Tensor},
    tensor_ops::Backward,
};
use half::f16;
use llm_barber::{
    executor::{
        AttentionWeights, Inner, PartWeights, Positions, forward,
        ops::{Add, CrossEntropy, Hold, InputGradient, Linear, Matrix, Norm, Normalise, Weight},
    },
    family::{self, Decoder, Part},
    random::SplitMix64,
};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;

const SEQUENCE: usize = 128;
const BATCH: usize = 16;
const PEAK_RATE: f32 = 4e-3;
const WARM_UP: usize = 100;
const DECAY: f32 = 0.0;
const LARGEST_NORM: f32 = 1.0;
const BETAS: [f32; 2] = [0.9, 0.99];

/// A trained tensor, with the state of AdamW.
struct Parameter {
    shape: Vec<usize>,
    values: Vec<f32>,
    moments: [Vec<f32>; 2],
}

type Parameters = HashMap<String, Parameter>;
type Taped = Matrix<Cpu, OwnedTape<f32, Cpu>>;
type Loss = Tensor<(), f32, Cpu, OwnedTape<f32, Cpu>>;
/// A parameter's name, and what belongs to it.
type Named<T> = Vec<(String, T)>;

/// The tensors of one step, whose gradients are wanted.
#[derive(Default)]
struct Traced {
    weights: Named<Weight<Cpu>>,
    /// What the tape finds of a norm's weight.
    norms: Named<Rc<Cell<Vec<f32>>>>,
}

/// Trains on `tokens` and writes the checkpoint to `dir`.
pub(crate) fn train(
    tokens: &[u32],
    vocabulary: usize,
    steps: usize,
    dir: &Path,
) -> Result<(), Box<dyn Error>> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
        "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocabulary,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": false,
        "attention_bias": false, "mlp_bias": false, "bos_token_id": 1, "eos_token_id": 2
    });
    fs::write(dir.join("config.json"), format!("{config:#}\n"))?;
    let decoder = family::decoder(&config)?;
    let mut random = SplitMix64::new(0);
    let mut parameters = initial(&decoder, &mut random);
    let (device, started, mut recent) = (Cpu::default(), Instant::now(), 0.0);
    for step in 0..steps {
        let mut batch = Vec::with_capacity(BATCH * SEQUENCE);
        let mut targets = batch.clone();
        for _ in 0..BATCH {
            let start = random.below(tokens.len() - SEQUENCE);
            batch.extend_from_slice(&tokens[start..start + SEQUENCE]);
            targets.extend_from_slice(&tokens[start + 1..=start + SEQUENCE]);
        }
        let mut traced = Traced::default();
        let loss = loss(&device, &decoder, &parameters, &batch, &targets, &mut traced)?;
        recent += loss.as_vec()[0] / targets.len() as f32;
        loss.try_backward()?;
        let gradients = traced.gradients(targets.len())?;
        update(&mut parameters, gradients, step, steps);
        if (step + 1) % 100 == 0 {
            let perplexity = (recent / 100.0).exp();
            println!("step {:5}  perplexity {perplexity:8.3}  {:.0?}", step + 1, started.elapsed());
            recent = 0.0;
        }
    }
    write(&parameters, dir)
}

fn initial(decoder: &Decoder, random: &mut SplitMix64) -> Parameters {
    let mut parameters = Parameters::new();
    let mut add = |name: &str, shape: Vec<usize>, deviation: f32| {
        let count = shape.iter().product();
        // The sum of four uniform numbers is near enough to normal.
        let mut noise =
            || (0..4).map(|_| (random.bits() >> 40) as f32 / (1 << 24) as f32 - 0.5).sum::<f32>();
        let values: Vec<f32> = match shape[..] {
            [_] => vec![1.0; count],
            _ => (0..count).map(|_| noise() * 3f32.sqrt() * deviation).collect(),
        };
        let moments = [vec![0.0; count], vec![0.0; count]];
        parameters.insert(name.to_owned(), Parameter { shape, values, moments });
    };
    let (width, vocabulary) = (decoder.hidden_size, decoder.vocab_size);
    add(&decoder.embedding.weight, vec![vocabulary, width], 0.3);
    for layer in &decoder.layers {
        for part in Part::ALL {
            if let Some(norm) = &layer.part(part).input_norm {
                norm.weight.iter().for_each(|name| add(name, vec![width], 0.0));
            }
            for linear in layer.projections(part) {
                let (rows, columns) = (linear.dims.rows, linear.dims.columns);
                add(&linear.weight, vec![rows, columns], (columns as f32).sqrt().recip());
            }
        }
    }
    if let Some(norm) = &decoder.final_norm {
        norm.weight.iter().for_each(|name| add(name, vec![width], 0.0));
    }
    add(&decoder.head, vec![vocabulary, width], (width as f32).sqrt().recip());
    parameters
}

impl Traced {
    fn weight(
        &mut self,
        device: &Cpu,
        parameters: &Parameters,
        name: &str,
    ) -> Result<Weight<Cpu>, Box<dyn Error>> {
        let Parameter { shape, values, .. } = &parameters[name];
        let weight = Weight::new(device, values, (shape[0], shape[1]), None);
        let weight = weight.map_err(|e| e.to_string())?.traced();
        self.weights.push((name.into(), weight.clone()));
        Ok(weight)
    }

    /// The norm of hidden states; the backward pass finds the gradient of its weight.
    fn normalise(
        &mut self,
        parameters: &Parameters,
        of: &family::Norm,
        states: Taped,
    ) -> Result<Taped, Box<dyn Error>> {
        let name = of.weight.as_ref().ok_or("a norm without weights")?;
        let (values, fail) = (parameters[name].values.clone(), |e: CpuError| e.to_string());
        let (x, tape) = states.split_tape();
        let weight = x.device().hold(values, (1, x.shape().1)).map_err(fail)?;
        let norm = Norm { weight, bias: None, epsilon: of.epsilon, centred: false };
        let found = Rc::default();
        self.norms.push((name.clone(), Rc::clone(&found)));
        let y = Cpu::normalise(x.clone().put_tape(tape), &norm).map_err(fail)?;
        let (y, mut tape) = y.split_tape();
        let output = y.name();
        tape.add_backward_op(move |gradients| {
            let gradient = Cpu::take_gradient(gradients, &output)?;
            found.set(norm.weight_gradient(&x, &gradient));
            Cpu::add_gradient(gradients, &output, gradient)
        });
        Ok(y.put_tape(tape))
    }

    /// The gradients of the mean loss over `count` predictions.
    fn gradients(self, count: usize) -> Result<Named<Vec<f32>>, Box<dyn Error>> {
        let mut found = Vec::new();
        for (name, weight) in self.weights {
            let trace = weight.take_trace().ok_or("a weight without a gradient")?;
            found.push((name, trace.gradient().map_err(|e| e.to_string())?));
        }
        found.extend(self.norms.into_iter().map(|(name, gradient)| (name, gradient.take())));
        for (_, gradient) in &mut found {
            gradient.iter_mut().for_each(|g| *g /= count as f32);
        }
        Ok(found)
    }
}

/// The sum of the cross-entropy over a batch of sequences.
fn loss(
    device: &Cpu,
    decoder: &Decoder,
    parameters: &Parameters,
    batch: &[u32],
    targets: &[u32],
    traced: &mut Traced,
) -> Result<Loss, Box<dyn Error>> {
    let fail = |e: CpuError| e.to_string();
    let Decoder { hidden_size: width, vocab_size: vocabulary, .. } = decoder;
    // The embedding is the linear layer of one-hot rows: no operation of its own is needed.
    let mut one_hot = vec![0.0; batch.len() * vocabulary];
    for (row, &token) in one_hot.chunks_exact_mut(*vocabulary).zip(batch) {
        row[token as usize] = 1.0;
    }
    let table = &parameters[&decoder.embedding.weight].values;
    let transposed: Vec<f32> =
        (0..width * vocabulary).map(|i| table[i % vocabulary * width + i / vocabulary]).collect();
    let embedding = Weight::new(device, &transposed, (*width, *vocabulary), None);
    let embedding = embedding.map_err(fail)?.traced();
    traced.weights.push((decoder.embedding.weight.clone(), embedding.clone()));
    let one_hot = device.hold(one_hot, (batch.len(), *vocabulary)).map_err(fail)?;
    let one_hot = one_hot.put_tape(OwnedTape::default());
    let mut states: Taped =
        Cpu::linear(one_hot, &embedding, InputGradient::Skipped, None).map_err(fail)?;

    let positions = Positions::new(decoder, SEQUENCE);
    for layer in &decoder.layers {
        for part in Part::ALL {
            let mut linears = Vec::new();
            for linear in layer.projections(part) {
                linears.push(traced.weight(device, parameters, &linear.weight)?);
            }
            let of = layer.part(part);
            let weights = PartWeights {
                part,
                projections: of.projections.clone(),
                input_norm: None,
                linears,
                inner: match &of.inner {
                    family::Inner::Attention(attention) => {
                        let of = attention.clone();
                        let (head_norms, sinks, latents) = (None, None, None);
                        let weights = AttentionWeights { of, head_norms, sinks, latents };
                        Inner::Attention(Box::new(weights))
                    }
                    family::Inner::Gated(activation) => Inner::Gated(*activation),
                    family::Inner::Plain(activation) => Inner::Plain(*activation),
                },
                router: None,
                output_norm: None,
                residual_norm: None,
                parallel: false,
            };
            let (residual, tape) = states.split_tape();
            let mut input = residual.clone().put_tape(tape);
            if let Some(norm) = &of.input_norm {
                input = traced.normalise(parameters, norm, input)?;
            }
            let output = forward(&weights, &positions, input, InputGradient::Wanted);
            states = output.and_then(|output| Cpu::add(output, residual)).map_err(fail)?;
        }
    }
    if let Some(norm) = &decoder.final_norm {
        states = traced.normalise(parameters, norm, states)?;
    }
    let head = traced.weight(device, parameters, &decoder.head)?;
    let logits = Cpu::linear(states, &head, InputGradient::Wanted, None).map_err(fail)?;
    Ok(Cpu::cross_entropy(logits, targets).map_err(fail)?)
}

/// One step of AdamW, with the norm of all gradients clipped.
fn update(parameters: &mut Parameters, gradients: Named<Vec<f32>>, step: usize, steps: usize) {
    let squares = gradients.iter().flat_map(|(_, g)| g).map(|g| f64::from(*g).powi(2));
    let clip = (LARGEST_NORM / squares.sum::<f64>().sqrt() as f32).min(1.0);
    let progress = step as f32 / steps as f32;
    let warm_up = ((step + 1) as f32 / WARM_UP as f32).min(1.0);
    let rate = PEAK_RATE * warm_up * (0.02 + 0.98 * (0.5 + 0.5 * (PI * progress).cos()));
    let corrections = BETAS.map(|beta| 1.0 - beta.powi(step as i32 + 1));
    for (name, mut gradient) in gradients {
        let Some(Parameter { shape, values, moments: [mean, square] }) = parameters.get_mut(&name)
        else {
            continue;
        };
        if name.contains("embed_tokens") {
            // It was trained transposed.
            let (rows, columns) = (shape[0], shape[1]);
            gradient =
                (0..rows * columns).map(|i| gradient[i % columns * rows + i / columns]).collect();
        }
        let decay = if shape.len() > 1 { DECAY } else { 0.0 };
        for i in 0..values.len() {
            let g = gradient[i] * clip;
            mean[i] += (1.0 - BETAS[0]) * (g - mean[i]);
            square[i] += (1.0 - BETAS[1]) * (g * g - square[i]);
            let (mean, square) = (mean[i] / corrections[0], square[i] / corrections[1]);
            values[i] -= rate * (mean / (square.sqrt() + 1e-8) + decay * values[i]);
        }
    }
}

fn write(parameters: &Parameters, dir: &Path) -> Result<(), Box<dyn Error>> {
    let mut encoded: Vec<_> = parameters
        .iter()
        .map(|(name, Parameter { shape, values, .. })| {
            let halves = values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes());
            (name, shape.clone(), halves.collect::<Vec<u8>>())
        })
        .collect();
    encoded.sort();
    let mut views = Vec::new();
    for (name, shape, bytes) in &encoded {
        views.push((name.as_str(), TensorView::new(Dtype::F16, shape.clone(), bytes)?));
    }
    let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    safetensors::serialize_to_file(views, metadata, &dir.join("model.safetensors"))?;
    Ok(())
}
