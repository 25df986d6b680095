//! The phases that a run will go through.

use super::{
    PERMUTATION, Tests,
    measure::{GENERATION, Prompt},
    single_pass,
};
use crate::{
    calibration::Text,
    estimate::Estimate,
    evaluate::{GENERATED, Question},
    family::Decoder,
    recipe::Recipe,
};

/// A phase of a run, before it begins.
#[derive(Clone, Debug, PartialEq)]
pub struct ScheduledPhase {
    /// Name of the phase.
    pub name: String,
    /// Kind of the phase. Phases of the same kind take time in proportion to their work.
    pub kind: String,
    /// Estimated floating-point operations of the phase's matrix products.
    pub work: f64,
}

/// The phases of a run, in order.
pub(crate) fn schedule(
    recipe: &Recipe,
    decoder: &Decoder,
    tests: &Tests,
    expected: &Estimate,
) -> Vec<ScheduledPhase> {
    let mut phases = tests.phases("dense", decoder);
    let own = |name: &str, work| ScheduledPhase { name: name.into(), kind: name.into(), work };
    if recipe.sparsity.permute {
        phases.push(own(PERMUTATION, expected.permutation));
    }
    if recipe.allocation().is_some() {
        phases.push(own("allocation", expected.allocation));
    }
    if !single_pass(recipe) {
        phases.push(own("initial masks", expected.initial));
        phases.extend(tests.phases("initial masks", decoder));
    }
    if !recipe.refine.is_empty() {
        let before = expected.permutation + expected.allocation + expected.initial;
        phases.push(own("refinement", expected.pruning - before));
        phases.extend(tests.phases("refined", decoder));
    }
    phases
}

impl Tests {
    /// The phases that measure a model.
    fn phases(&self, model: &str, decoder: &Decoder) -> Vec<ScheduledPhase> {
        let texts =
            self.texts.iter().map(|(text, segments)| ScheduledPhase::text(text, segments, decoder));
        let tasks = self.tasks.iter().map(|asked| asked.scheduled(decoder));
        let of =
            |phase: ScheduledPhase| ScheduledPhase { name: measuring(model, &phase.name), ..phase };
        let prompts =
            (!self.prompts.is_empty()).then(|| ScheduledPhase::generation(&self.prompts, decoder));
        texts.chain(tasks).chain(prompts).map(of).collect()
    }
}

/// Name of the phase that measures a model on a text or a task.
pub(crate) fn measuring(model: &str, on: &str) -> String {
    format!("{model}, {on}")
}

impl ScheduledPhase {
    /// The phase that measures a perplexity.
    pub(crate) fn text(text: &Text, segments: &[Vec<u32>], decoder: &Decoder) -> Self {
        let tokens: usize = segments.iter().map(Vec::len).sum();
        let work = 2.0 * tokens as f64 * (body(decoder) + head(decoder));
        Self { name: text.short(), kind: text.label(), work }
    }

    /// The phase that continues prompts: every token goes through the model once.
    fn generation(prompts: &[Prompt], decoder: &Decoder) -> Self {
        let predictions = GENERATED * prompts.len();
        let tokens = prompts.iter().map(|of| of.ids.len()).sum::<usize>() + predictions;
        let work = tokens as f64 * body(decoder) + predictions as f64 * head(decoder);
        Self { name: GENERATION.into(), kind: GENERATION.into(), work: 2.0 * work }
    }

    /// The phase that answers a task's questions.
    pub(crate) fn task(name: &str, questions: &[Question], decoder: &Decoder) -> Self {
        let work = questions.iter().map(|question| {
            let context = question.requests.iter().map(|(context, _)| context.len()).max();
            let continued: usize = question.requests.iter().map(|(_, more)| more.len()).sum();
            let read = (context.unwrap_or(0) + continued) as f64 / BYTES;
            2.0 * (read * body(decoder) + continued as f64 / BYTES * head(decoder))
        });
        Self { name: name.into(), kind: name.into(), work: work.sum() }
    }
}

/// Estimated number of bytes per token.
const BYTES: f64 = 4.0;

/// Number of weights of the decoder layers.
fn body(decoder: &Decoder) -> f64 {
    decoder.projections().map(|linear| linear.dims.len() as f64).sum()
}

/// Number of weights of the output head.
fn head(decoder: &Decoder) -> f64 {
    (decoder.vocab_size * decoder.embedding.width) as f64
}
