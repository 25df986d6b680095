//! Zero-shot accuracy: which choice of a question a model finds likeliest, as lm-eval counts it.

use serde::{Deserialize, Serialize};

use super::{likelihood::log_likelihoods, losses::CERTAIN, task::Question};
use crate::{
    calibration::{self, Tokens},
    checkpoint::Pruned,
    executor::ops::Ops,
    executor::{or_nan, some_or_nan},
    model::{self, Model},
};

/// How many questions a model answers rightly.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// The fraction of questions whose likeliest choice is right.
    #[serde(deserialize_with = "or_nan")]
    pub acc: f64,
    /// Its standard error.
    #[serde(deserialize_with = "or_nan")]
    pub acc_stderr: f64,
    /// The fraction of questions whose likeliest choice is right, each choice's log-likelihood being
    /// divided by its length in characters. Some tasks have none, as in lm-eval.
    #[serde(default, deserialize_with = "some_or_nan", skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<f64>,
    /// Its standard error.
    #[serde(default, deserialize_with = "some_or_nan", skip_serializing_if = "Option::is_none")]
    pub acc_norm_stderr: Option<f64>,
    /// How many questions there are.
    pub questions: usize,
}

impl Accuracy {
    /// Whether this accuracy and another one differ by more than chance: by more than two standard
    /// errors of the difference.
    pub fn differs(&self, other: &Self) -> bool {
        (self.acc - other.acc).abs() > CERTAIN * self.acc_stderr.hypot(other.acc_stderr)
    }
}

/// Why questions could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// They cannot be tokenised.
    #[error(transparent)]
    Tokens(#[from] calibration::Error),
    /// The model could not be run.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// A choice has nothing that could be likely or not.
    #[error("question {number}: the continuation {text:?} has no tokens")]
    Empty {
        /// The question, from 1 on.
        number: usize,
        /// The continuation.
        text: String,
    },
    /// Nothing can stand before a continuation without a context.
    #[error(
        "question {number} has no context, and the model's config.json names neither a \
         `bos_token_id` nor an `eos_token_id` to stand in its place"
    )]
    NoFirstToken {
        /// The question, from 1 on.
        number: usize,
    },
    /// The model's answers are not numbers.
    #[error(
        "question {number}: a log-likelihood is not a number; the model's activations overflow f32"
    )]
    NotFinite {
        /// The question, from 1 on.
        number: usize,
    },
}

/// A continuation and what it continues, in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Context and continuation.
    pub(super) ids: Vec<u32>,
    /// How many of them are the continuation.
    pub(super) continuation: usize,
}

/// The accuracy of the model, as pruning left it. Calls `done_so_far` with the fraction of
/// the work that is done.
///
/// # Errors
/// If the questions cannot be tokenised or the model cannot be run.
pub fn accuracy<D: Ops>(
    model: &Model<'_, D>,
    pruned: &Pruned,
    questions: &[Question],
    tokens: &Tokens,
    done_so_far: impl FnMut(f64),
) -> Result<Accuracy, Error> {
    let longest = model.decoder.max_positions();
    let first = model.first_token();
    let mut requests = Vec::with_capacity(questions.len());
    for (question, number) in questions.iter().zip(1..) {
        let mut found = Vec::with_capacity(question.requests.len());
        for (context, continuation) in &question.requests {
            let request = request(tokens, context, continuation, longest, first)?
                .ok_or(Error::NoFirstToken { number })?;
            if request.continuation == 0 {
                return Err(Error::Empty { number, text: continuation.clone() });
            }
            found.push(request);
        }
        requests.push(found);
    }
    let found = log_likelihoods(model, pruned, &requests, done_so_far)?;
    let broken = found.iter().position(|found| found.iter().any(|score| !score.is_finite()));
    if let Some(question) = broken {
        return Err(Error::NotFinite { number: question + 1 });
    }
    let plain = questions.iter().zip(&found);
    let plain =
        plain.map(|(question, found)| first_highest(found.iter().copied()) == question.gold);
    let (acc, acc_stderr) = mean(&plain.collect::<Vec<_>>());
    let normed = questions.iter().zip(&found).map(|(question, found)| {
        let scores = found.iter().zip(question.lengths.as_ref()?);
        let scores = scores.map(|(score, length)| score / *length as f64);
        Some(first_highest(scores) == question.gold)
    });
    let normed = normed.collect::<Option<Vec<_>>>().map(|right| mean(&right));
    Ok(Accuracy {
        acc,
        acc_stderr,
        acc_norm: normed.map(|(fraction, _)| fraction),
        acc_norm_stderr: normed.map(|(_, error)| error),
        questions: questions.len(),
    })
}

/// The tokens of a request: spaces at the context's end belong to the continuation, and the
/// continuation is what the tokens of both have beyond the context's own. `first` stands for a
/// missing context; `None` if it is needed and there is none.
fn request(
    tokens: &Tokens,
    context: &str,
    continuation: &str,
    longest: usize,
    first: Option<u32>,
) -> Result<Option<Request>, calibration::Error> {
    let trimmed = context.trim_end();
    let rest = format!("{}{continuation}", &context[trimmed.len()..]);
    let (mut ids, start) = if trimmed.is_empty() {
        // The tokenizer may have begun the text itself.
        let ids = tokens.encode(&rest)?;
        let begun = first.is_some() && ids.first() == first.as_ref();
        (ids, usize::from(begun))
    } else {
        let start = tokens.encode(trimmed)?.len();
        (tokens.encode(&format!("{trimmed}{rest}"))?, start)
    };
    let continuation = ids.len().saturating_sub(start);
    // Something must come before the first token that is predicted.
    if continuation == ids.len() {
        let Some(first) = first else { return Ok(None) };
        ids.insert(0, first);
    }
    let surplus = ids.len().saturating_sub(longest.saturating_add(1));
    ids.drain(..surplus);
    Ok(Some(Request { continuation: continuation.min(ids.len() - 1), ids }))
}

fn first_highest(scores: impl Iterator<Item = f64>) -> usize {
    let mut highest = (0, f64::NEG_INFINITY);
    for (i, score) in scores.enumerate() {
        if score > highest.1 {
            highest = (i, score);
        }
    }
    highest.0
}

/// The fraction of the right ones, and its standard error by the sample's deviation.
fn mean(right: &[bool]) -> (f64, f64) {
    let count = right.len() as f64;
    let fraction = right.iter().filter(|right| **right).count() as f64 / count;
    (fraction, (fraction * (1.0 - fraction) / (count - 1.0).max(1.0)).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_have_the_samples_standard_error() {
        let (fraction, error) = mean(&[true, false, true, true]);
        assert_eq!((fraction, error), (0.75, 0.25));
        assert_eq!(mean(&[true]), (1.0, 0.0));
        assert_eq!(first_highest([1.0, 3.0, 3.0].into_iter()), 1);
    }
}
