//! Evaluates a model: perplexity, accuracy on tasks, and text generation.

mod accuracy;
mod generate;
mod head;
mod likelihood;
mod losses;
mod perplexity;
mod task;

pub use self::{
    accuracy::{Accuracy, Error, accuracy},
    generate::{GENERATED, generate, written},
    losses::Loss,
    perplexity::{Perplexity, STATES, logits, perplexity},
    task::{Question, TASKS, Task},
};
pub(crate) use self::{
    head::{Head, LOGITS},
    perplexity::hidden,
};
