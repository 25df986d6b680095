//! Text generation, a token at a time.

use std::collections::BTreeMap;

use super::head::{Head, drawn};
use crate::{
    checkpoint::Pruned,
    executor::{History, Positions, ops::Ops},
    family::Part,
    model::{Error, Model},
    random::SplitMix64,
};

/// Number of tokens by which a prompt is continued.
pub const GENERATED: usize = 40;

/// Maximum bytes of keys and values of texts that are continued together, unless those of one text
/// take more: 2 GiB.
const TOGETHER: usize = 1 << 31;

/// The continuations of prompts by the pruned model. Each token is the most likely one, the first
/// among equals. A continuation ends early at the end-of-text token, which is left out, or when the
/// model has no more positions. Calls `done_so_far` with the finished fraction of the work.
///
/// # Errors
/// If the model cannot be run.
pub fn generate<D: Ops>(
    model: &Model<'_, D>,
    pruned: &Pruned,
    prompts: &[Vec<u32>],
    done_so_far: impl FnMut(f64),
) -> Result<Vec<Vec<u32>>, Error> {
    let ends = model.last_tokens();
    let next = |_: usize, logits: &[f32]| Some(most_likely(logits)).filter(|id| !ends.contains(id));
    let longest = model.decoder.max_positions();
    continuations(model, pruned, prompts, (GENERATED, longest), next, done_so_far)
}

/// Texts of `length` tokens that the dense model writes: each begins with a prompt, and every other
/// token is drawn from the model's predictions (self-calibration, arXiv 2410.17170). An end-of-text
/// token does not end a text: another one begins. The draws of a text depend on `seed` and on the
/// index of its prompt alone. Calls `done_so_far` with the finished fraction of the work.
///
/// # Errors
/// If the model cannot be run.
pub fn written<D: Ops>(
    model: &Model<'_, D>,
    prompts: &[Vec<u32>],
    length: usize,
    seed: u64,
    mut done_so_far: impl FnMut(f64),
) -> Result<Vec<Vec<u32>>, Error> {
    let mut seeds = SplitMix64::new(seed);
    let mut random: Vec<_> = prompts.iter().map(|_| SplitMix64::new(seeds.bits())).collect();
    let together = (TOGETHER / History::bytes(&model.decoder, length).max(1)).max(1);
    let (mut texts, all) = (Vec::new(), prompts.len() as f64);
    for (prompts, random) in prompts.chunks(together).zip(random.chunks_mut(together)) {
        let most = prompts.iter().map(|prompt| length.saturating_sub(prompt.len())).max();
        let next = |i: usize, logits: &[f32]| Some(drawn(logits, &mut random[i]));
        let before = texts.len() as f64;
        let so_far = |done| done_so_far((before + done * prompts.len() as f64) / all);
        let limits = (most.unwrap_or(0), length);
        let continued = continuations(model, &Pruned::dense(), prompts, limits, next, so_far)?;
        texts.extend(
            prompts.iter().zip(continued).map(|(prompt, more)| [&prompt[..], &more].concat()),
        );
    }
    Ok(texts)
}

/// A text that is being continued.
struct Growing {
    /// Index of its prompt.
    prompt: usize,
    /// The tokens that have not gone through the model.
    new: Vec<u32>,
    /// Number of tokens that have.
    before: usize,
}

/// The continuations of prompts by at most `most` tokens each, to at most `longest` tokens in all. `next`
/// gets the index of a prompt and the logits of its next token, and returns the token; `None` ends the
/// text. All texts go through a layer together, so that its weights are read once per
/// token; the keys and values of their tokens are kept, in f32 on the host.
///
/// # Errors
/// If the model cannot be run.
pub(crate) fn continuations<D: Ops>(
    model: &Model<'_, D>,
    pruned: &Pruned,
    prompts: &[Vec<u32>],
    (most, longest): (usize, usize),
    mut next: impl FnMut(usize, &[f32]) -> Option<u32>,
    mut done_so_far: impl FnMut(f64),
) -> Result<Vec<Vec<u32>>, Error> {
    // The keys and values of a text stay where they were made: each rank continues all texts.
    let model = &model.alone();
    let (decoder, executor) = (&model.decoder, &model.executor);
    let layers = decoder.layers.len();
    let mut continued = vec![Vec::new(); prompts.len()];
    let prompts = prompts.iter().enumerate().filter(|(_, ids)| !ids.is_empty());
    let mut texts: Vec<Growing> =
        prompts.map(|(prompt, ids)| Growing { prompt, new: ids.clone(), before: 0 }).collect();
    let of_each = texts.iter().map(|text| History::new(longest.min(text.new.len() + most)));
    let mut histories = vec![of_each.collect::<Vec<_>>(); layers];
    let head = Head::new(model)?;
    for step in 0..most {
        keep(&mut texts, &mut histories, |text| text.before + text.new.len() < longest);
        if texts.is_empty() {
            break;
        }
        let mut known = BTreeMap::new();
        let mut positions = |text: &Growing| {
            let new = || Positions::after(decoder, text.before, text.new.len());
            known.entry((text.before, text.new.len())).or_insert_with(new).clone()
        };
        let samples: Vec<_> = texts.iter().map(|text| (&text.new[..], positions(text))).collect();
        let mut stream = model.embed_at(samples.into_iter(), 0)?;
        for (layer, histories) in histories.iter_mut().enumerate() {
            for part in Part::ALL {
                let weights = model.part(layer, part, pruned)?;
                executor
                    .go_on(&weights, &mut stream, histories)
                    .map_err(Error::executor(format!("layer {layer}, {part:?}")))?;
            }
            done_so_far((step as f64 + (layer + 1) as f64 / layers as f64) / most as f64);
        }
        let (mut last, mut tokens) = (Vec::new(), Vec::new());
        executor.each_sample(&stream, |_, states| {
            last.extend(&states[states.len() - decoder.hidden_size..]);
            Ok::<_, Error>(())
        })?;
        head.tiles(&last, &(0..texts.len()).collect::<Vec<_>>(), |rows, logits| {
            let logits = logits.on_host()?;
            let each = rows.iter().zip(logits.chunks(decoder.vocab_size));
            tokens.extend(each.map(|(row, logits)| next(texts[*row].prompt, logits)));
            Ok(())
        })?;
        for (text, token) in texts.iter_mut().zip(&tokens) {
            text.before += text.new.len();
            text.new = token.iter().copied().collect();
            continued[text.prompt].extend(token);
        }
        keep(&mut texts, &mut histories, |text| !text.new.is_empty());
    }
    Ok(continued)
}

/// Keeps only some texts, and their histories in each layer.
fn keep(texts: &mut Vec<Growing>, layers: &mut [Vec<History>], goes_on: impl Fn(&Growing) -> bool) {
    for histories in layers {
        let mut goes_on = texts.iter().map(&goes_on);
        histories.retain(|_| goes_on.next().unwrap_or(false));
    }
    texts.retain(goes_on);
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
    use std::{fs, path::Path};

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
    fn logits_are_those_of_the_whole_text_in_every_family() {
        let mut families = 0;
        for entry in fs::read_dir("tests/fixtures/logits").unwrap() {
            let dir = entry.unwrap().path();
            if !dir.join("config.json").exists() {
                continue;
            }
            families += 1;
            let reader = Reader::open(&dir).unwrap();
            let model = Model::new(&reader, Cpu::default()).unwrap();
            let width = model.decoder.vocab_size;
            let prompts = [vec![5, 6, 7, 8, 9], vec![3], vec![1, 2, 3, 4, 5]];
            let (mut random, mut seen) = (SplitMix64::new(1), vec![Vec::new(); 3]);
            let next = |i: usize, logits: &[f32]| {
                seen[i].push(logits.to_vec());
                Some(drawn(logits, &mut random))
            };
            let found =
                continuations(&model, &Pruned::dense(), &prompts, (4, 9), next, |_| ()).unwrap();
            for ((prompt, more), seen) in prompts.iter().zip(&found).zip(&seen) {
                assert_eq!((more.len(), seen.len()), (4, 4), "{}", dir.display());
                let whole = [&prompt[..], more].concat();
                let expected = logits(&model, &Pruned::dense(), &whole).unwrap();
                let expected = expected.chunks(width).skip(prompt.len() - 1);
                for (found, expected) in seen.iter().flatten().zip(expected.flatten()) {
                    let apart = (found - expected).abs();
                    assert!(apart < 1e-3, "{}: {found} {expected}", dir.display());
                }
            }
        }
        assert!(families >= 30, "{families}");
    }

    #[test]
    fn written_texts_begin_with_their_prompts_and_depend_on_the_seed() {
        let reader = Reader::open(Path::new("tests/fixtures/logits/gemma2")).unwrap();
        let model = Model::new(&reader, Cpu::default()).unwrap();
        let prompts = [vec![5, 6, 7], vec![8], vec![5, 6, 7]];
        let of = |prompts: &[Vec<u32>], seed| written(&model, prompts, 12, seed, |_| ()).unwrap();
        let texts = of(&prompts, 0);
        for (text, prompt) in texts.iter().zip(&prompts) {
            assert_eq!((text.len(), &text[..prompt.len()]), (12, &prompt[..]));
        }
        // The same prompt is continued in another way.
        assert_ne!(texts[0], texts[2]);
        assert_eq!(texts, of(&prompts, 0));
        assert_ne!(texts, of(&prompts, 1));
    }

    #[test]
    fn of_equals_the_first_is_the_most_likely() {
        assert_eq!(most_likely(&[1.0, 3.0, f32::NAN, 3.0]), 1);
        assert_eq!(most_likely(&[f32::NAN]), 0);
    }
}
