//! Greedy text generation.

use super::{head::Head, perplexity::hidden};
use crate::{
    checkpoint::Pruned,
    executor::ops::Ops,
    model::{Error, Model},
};

/// Number of tokens by which a prompt is continued.
pub const GENERATED: usize = 40;

/// The continuations of prompts by the pruned model. Each token is the most likely one, the first
/// among equals. A continuation ends early at the end-of-text token, which is left out, or when the
/// model has no more positions. All prompts go through a layer together, so that its weights are
/// read once per token. Calls `done_so_far` with the finished fraction of the work.
///
/// # Errors
/// If the model cannot be run.
pub fn generate<D: Ops>(
    model: &Model<'_, D>,
    pruned: &Pruned,
    prompts: &[Vec<u32>],
    mut done_so_far: impl FnMut(f64),
) -> Result<Vec<Vec<u32>>, Error> {
    let (ends, longest) = (model.last_tokens(), model.decoder.max_positions());
    let mut continuations = vec![Vec::new(); prompts.len()];
    let mut going: Vec<usize> = (0..prompts.len()).filter(|i| !prompts[*i].is_empty()).collect();
    for step in 0..GENERATED {
        going.retain(|i| prompts[*i].len() + continuations[*i].len() < longest);
        if going.is_empty() {
            break;
        }
        let texts: Vec<Vec<u32>> =
            going.iter().map(|i| [&prompts[*i][..], &continuations[*i]].concat()).collect();
        let stream = model.embed(&texts, 0)?;
        let so_far = |layers: f64| done_so_far((step as f64 + layers) / GENERATED as f64);
        let states = hidden(model, pruned, stream, so_far)?;
        let head = Head::new(model)?;
        let tokens = model.executor.of_samples(&states, |i, states| {
            let mut token = 0;
            head.tiles(states, &[texts[i].len() - 1], |_, logits| {
                token = most_likely(&logits.on_host()?);
                Ok(())
            })?;
            Ok::<_, Error>(vec![f64::from(token)])
        })?;
        let mut ended = Vec::new();
        for (i, token) in tokens.into_iter().flatten().enumerate() {
            match ends.contains(&(token as u32)) {
                true => ended.push(going[i]),
                false => continuations[going[i]].push(token as u32),
            }
        }
        going.retain(|i| !ended.contains(i));
    }
    Ok(continuations)
}

/// The first token with the highest logit.
fn most_likely(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, logit) in (0..).zip(logits) {
        if *logit > best.1 {
            best = (token, *logit);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use dfdx::tensor::Cpu;

    use super::*;
    use crate::{checkpoint::Reader, evaluate::logits};

    #[test]
    fn each_token_is_the_most_likely_one_after_those_before() {
        // Learned positions, a window, and both kinds of layers.
        for name in ["opt", "mistral", "gemma2"] {
            let reader = Reader::open(&Path::new("tests/fixtures/logits").join(name)).unwrap();
            let model = Model::new(&reader, Cpu::default()).unwrap();
            let prompts = [vec![5, 6, 7, 8, 9], vec![30, 31], Vec::new()];
            let found = generate(&model, &Pruned::dense(), &prompts, |_| ()).unwrap();
            assert!(found[2].is_empty());
            for (prompt, found) in prompts.iter().zip(&found).take(2) {
                let mut text = prompt.clone();
                // A batch of texts may be summed in another order than one alone: the first few
                // tokens are far from any tie.
                for token in &found[..found.len().min(4)] {
                    let logits = logits(&model, &Pruned::dense(), &text).unwrap();
                    let last = logits.chunks(model.decoder.vocab_size).last().unwrap();
                    assert_eq!(*token, most_likely(last), "{name}");
                    text.push(*token);
                }
                let most = GENERATED.min(model.decoder.max_positions() - prompt.len());
                assert!(found.len() <= most);
                let ends = model.last_tokens();
                assert!(found.iter().all(|token| !ends.contains(token)));
            }
        }
    }

    #[test]
    fn of_equals_the_first_is_the_most_likely() {
        assert_eq!(most_likely(&[1.0, 3.0, f32::NAN, 3.0]), 1);
        assert_eq!(most_likely(&[f32::NAN]), 0);
    }
}
