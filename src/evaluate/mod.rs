//! Judging a model: perplexity, the accuracy of its answers to questions, and what it goes on to say.

mod accuracy;
mod generate;
mod head;
mod likelihood;
mod losses;
mod perplexity;
mod task;

pub use self::{
    accuracy::{Accuracy, Error, accuracy},
    generate::{GENERATED, generate},
    losses::Loss,
    perplexity::{Perplexity, STATES, logits, perplexity},
    task::{Question, TASKS, Task},
};
pub(crate) use self::{
    head::{Head, LOGITS},
    perplexity::hidden,
};
