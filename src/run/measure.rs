//! Measures models on texts, tasks and prompts.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Error, ScheduledPhase, Watch, schedule::measuring};
use crate::{
    calibration::{Text, Tokens, segments},
    checkpoint::Pruned,
    evaluate::{Accuracy, Perplexity, Question, Task, accuracy, generate, perplexity},
    executor::ops::Ops,
    family::Decoder,
    model::Model,
    progress::Steps,
    recipe::{Evaluate, Prompts, Recipe},
};

type Texts = Vec<(Text, Vec<Vec<u32>>)>;

fn texts<D: Ops>(recipe: &Recipe, model: &Model<'_, D>) -> Result<Texts, Error> {
    let Evaluate { perplexity, sequence_length, segments: limit, special_tokens, .. } =
        &recipe.evaluate;
    let tokens = tokens(model, *special_tokens);
    let length = model.decoder.sequence(*sequence_length);
    let read = |text: &Text| {
        let segments = segments(text, length, text.segments.or(*limit), &tokens)?;
        check_text(model, text, &segments, "evaluate.sequence_length")?;
        Ok((text.clone(), segments))
    };
    perplexity.iter().map(read).collect()
}

/// Number of predictions below which a perplexity is called uncertain. On ordinary text the loss of
/// a token varies by 2 to 3 nats, so a perplexity over 1,000 tokens is uncertain by nearly a tenth,
/// which is as much as many methods differ by.
const FEW: usize = 1000;

/// Warns if the model has too few positions for a text's segments, or if the segments are too few;
/// `key` sets their length.
pub(crate) fn check_text<D: Ops>(
    model: &Model<'_, D>,
    text: &Text,
    segments: &[Vec<u32>],
    key: &str,
) -> Result<(), Error> {
    let name = text.short();
    let longest = segments.iter().map(Vec::len).max().unwrap_or(0);
    model.within(&format!("{name}: segments"), longest, key)?;
    let predictions: usize = segments.iter().map(|segment| segment.len().saturating_sub(1)).sum();
    if predictions < FEW || segments.len() < 2 {
        let (count, noun) =
            (segments.len(), if segments.len() == 1 { "segment" } else { "segments" });
        tracing::warn!(
            "{name}: a perplexity over {predictions} predictions in {count} {noun} is uncertain; \
             take at least {FEW}, in several segments"
        );
    }
    Ok(())
}

fn tasks(recipe: &Recipe) -> Result<Vec<Asked>, Error> {
    let named = |(name, file): (&String, &PathBuf)| Some((Task::named(name)?, file.clone()));
    let tasks = recipe.evaluate.tasks.iter().filter_map(named);
    tasks.map(|(task, file)| Asked::read(task, &file, recipe.evaluate.questions)).collect()
}

/// The texts, tasks and prompts of a run.
pub(crate) struct Tests {
    /// Texts, in segments.
    pub(crate) texts: Texts,
    /// Tasks, with their questions.
    pub(crate) tasks: Vec<Asked>,
    /// Prompts to continue.
    pub(crate) prompts: Vec<Prompt>,
    tokens: Tokens,
}

impl Tests {
    /// Reads the texts, tasks and prompts of a recipe.
    pub(crate) fn read<D: Ops>(recipe: &Recipe, model: &Model<'_, D>) -> Result<Self, Error> {
        let tokens = tokens(model, recipe.evaluate.special_tokens);
        let (texts, tasks) = (texts(recipe, model)?, tasks(recipe)?);
        let prompts = prompts(&recipe.evaluate.generate, &texts, &tokens)?;
        Ok(Self { texts, tasks, prompts, tokens })
    }

    /// Measures a pruned model, which progress bars call `name`.
    pub(crate) fn measure<D: Ops>(
        &self,
        model: &Model<'_, D>,
        pruned: &Pruned,
        name: &str,
        watch: &dyn Watch,
    ) -> Result<Found, Error> {
        let mut found = Found::default();
        for (text, segments) in &self.texts {
            let name = measuring(name, &text.short());
            found.perplexity.push(measure(model, pruned, segments, &name, watch)?);
        }
        for asked in &self.tasks {
            let name = measuring(name, asked.task.name);
            found.accuracy.push(asked.answer(model, pruned, &self.tokens, &name, watch)?);
        }
        if !self.prompts.is_empty() {
            let bar = watch.bar(&measuring(name, GENERATION), Steps::Parts(PARTS));
            let prompts: Vec<_> = self.prompts.iter().map(|prompt| prompt.ids.clone()).collect();
            let continued = generate(model, pruned, &prompts, |done| bar.reach(parts(done)))?;
            let said = self.prompts.iter().zip(&continued);
            let said = said.map(|(prompt, ids)| prompt.continuation(ids, &self.tokens));
            found.generations = said.collect::<Result<_, _>>()?;
        }
        Ok(found)
    }
}

/// The measurements of one model.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Found {
    /// Perplexity on each text.
    pub(crate) perplexity: Vec<Perplexity>,
    /// Accuracy on each task.
    pub(crate) accuracy: Vec<Accuracy>,
    /// Continuation of each prompt.
    #[serde(default)]
    pub(crate) generations: Vec<String>,
}

/// Name of text generation in progress bars.
pub(super) const GENERATION: &str = "examples";

/// A prompt and its token ids.
pub(crate) struct Prompt {
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
}

impl Prompt {
    /// The text of token ids that continue the prompt.
    fn continuation(&self, ids: &[u32], tokens: &Tokens) -> Result<String, Error> {
        let (before, all) = (tokens.decode(&self.ids)?, [&self.ids[..], ids].concat());
        // Whether the first word begins with a space depends on the prompt.
        match tokens.decode(&all)?.strip_prefix(&before) {
            Some(text) => Ok(text.to_owned()),
            None => Ok(tokens.decode(ids)?),
        }
    }
}

/// The prompts of a recipe. Beginnings are taken from segments spread over the whole text.
fn prompts(of: &Prompts, texts: &Texts, tokens: &Tokens) -> Result<Vec<Prompt>, Error> {
    /// Number of tokens of a beginning.
    const BEGINNING: usize = 16;
    match (of, texts.first()) {
        (Prompts::Texts(texts), _) => {
            let read = |text: &String| Ok(Prompt { text: text.clone(), ids: tokens.encode(text)? });
            texts.iter().map(read).collect()
        }
        (Prompts::Beginnings(count), Some((_, segments))) => {
            let count = (*count).min(segments.len());
            let beginning = |i: usize| {
                let segment = &segments[i * segments.len() / count];
                let ids = segment[..segment.len().min(BEGINNING)].to_vec();
                Ok(Prompt { text: tokens.decode(&ids)?, ids })
            };
            (0..count).map(beginning).collect()
        }
        (Prompts::Beginnings(_), None) => Ok(Vec::new()),
    }
}

/// A task and its questions.
pub(crate) struct Asked {
    /// The task.
    pub(crate) task: &'static Task,
    /// File of the questions.
    pub(crate) file: PathBuf,
    questions: Vec<Question>,
}

impl Asked {
    /// Reads the questions of a file.
    pub(crate) fn read(
        task: &'static Task,
        file: &Path,
        limit: Option<usize>,
    ) -> Result<Self, Error> {
        let questions = task.questions(file, limit)?;
        if questions.is_empty() {
            return Err(Error::NoQuestions(file.to_owned()));
        }
        Ok(Self { task, file: file.to_owned(), questions })
    }

    /// The phase in which the questions are answered.
    pub(crate) fn scheduled(&self, decoder: &Decoder) -> ScheduledPhase {
        ScheduledPhase::task(self.task.name, &self.questions, decoder)
    }

    /// The accuracy of a pruned model; shows a progress bar.
    pub(crate) fn answer<D: Ops>(
        &self,
        model: &Model<'_, D>,
        pruned: &Pruned,
        tokens: &Tokens,
        name: &str,
        watch: &dyn Watch,
    ) -> Result<Accuracy, Error> {
        let bar = watch.bar(name, Steps::Parts(PARTS));
        let reach = |done| bar.reach(parts(done));
        Ok(accuracy(model, pruned, &self.questions, tokens, reach)?)
    }
}

/// Number of steps in the progress bar of a measurement.
pub(crate) const PARTS: u64 = 1000;

/// A fraction in parts.
pub(crate) fn parts(fraction: f64) -> u64 {
    (fraction * PARTS as f64) as u64
}

/// The tokenizer of a model.
pub(crate) fn tokens<D: Ops>(model: &Model<'_, D>, special: bool) -> Tokens {
    Tokens::of(model.reader.path(), model.decoder.vocab_size, special)
}

/// The perplexity of a pruned model; shows a progress bar.
pub(crate) fn measure<D: Ops>(
    model: &Model<'_, D>,
    pruned: &Pruned,
    segments: &[Vec<u32>],
    name: &str,
    watch: &dyn Watch,
) -> Result<Perplexity, Error> {
    let bar = watch.bar(name, Steps::Parts(PARTS));
    Ok(perplexity(model, pruned, segments, |done| bar.reach(parts(done)))?)
}
