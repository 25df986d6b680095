//! Judging a model: perplexity, and the accuracy of its answers to questions.

mod accuracy;
mod head;
mod likelihood;
mod perplexity;
mod task;

pub use self::{
    accuracy::{Accuracy, Error, accuracy},
    perplexity::{Perplexity, STATES, logits, perplexity},
    task::{Question, TASKS, Task},
};
