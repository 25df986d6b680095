//! Zero-shot accuracy on multiple-choice questions, computed like lm-eval: the answer is the choice
//! with the highest likelihood.

use serde::{Deserialize, Serialize};

use super::{likelihood::log_likelihoods, losses::CERTAIN, task::Question};
use crate::{
    calibration::{self, Tokens},
    checkpoint::Pruned,
    executor::ops::Ops,
    executor::{or_nan, some_or_nan},
    model::{self, Model},
};

/// The accuracy of a model on a task.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// The fraction of questions whose likeliest choice is right.
    #[serde(deserialize_with = "or_nan")]
    pub acc: f64,
    /// Standard error of `acc`.
    #[serde(deserialize_with = "or_nan")]
    pub acc_stderr: f64,
    /// The fraction of questions whose likeliest choice is right, with log-likelihoods divided by
    /// the choices' lengths in characters. Some tasks have none, as in lm-eval.
    #[serde(default, deserialize_with = "some_or_nan", skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<f64>,
    /// Standard error of `acc_norm`.
    #[serde(default, deserialize_with = "some_or_nan", skip_serializing_if = "Option::is_none")]
    pub acc_norm_stderr: Option<f64>,
    /// Number of questions.
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
    /// The questions cannot be tokenised.
    #[error(transparent)]
    Tokens(#[from] calibration::Error),
    /// The model could not be run.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// A choice has no tokens.
    #[error("question {number}: the continuation {text:?} has no tokens")]
    Empty {
        /// The question, from 1 on.
        number: usize,
        /// The continuation.
        text: String,
    },
    /// A question has no context, and the model has no token to stand in for it.
    #[error(
        "question {number} has no context, and the model's config.json names neither a \
         `bos_token_id` nor an `eos_token_id` to stand in its place"
    )]
    NoFirstToken {
        /// The question, from 1 on.
        number: usize,
    },
    /// A log-likelihood is NaN.
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
    /// Token ids of context and continuation.
    pub(super) ids: Vec<u32>,
    /// Number of token ids of the continuation.
    pub(super) continuation: usize,
}

/// The accuracy of the pruned model. Calls `done_so_far` with the finished fraction of the work.
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

/// The tokens of a request. Spaces at the end of the context count as part of the continuation. The
/// continuation is the tokens of both together beyond those of the context. `first` stands for an
/// empty context; `None` if it is needed but missing.
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
        // The tokenizer may have added the first token already.
        let ids = tokens.encode(&rest)?;
        let begun = first.is_some() && ids.first() == first.as_ref();
        (ids, usize::from(begun))
    } else {
        let start = tokens.encode(trimmed)?.len();
        (tokens.encode(&format!("{trimmed}{rest}"))?, start)
    };
    let continuation = ids.len().saturating_sub(start);
    // A token must come before the first predicted one.
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

/// The fraction of right answers, and its standard error from the sample's deviation.
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
