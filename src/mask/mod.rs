//! Masks: patterns, initial masks, rebuilds and swaps. All functions are pure: scores in, masks
//! out.

mod assignment;
mod bits;
mod conjugate_gradient;
mod distribution;
mod error;
mod init;
mod least_squares;
mod order;
mod pattern;
mod permute;
#[cfg(test)]
mod properties;
mod rebuild;
mod scope;
mod swap;

pub use bits::Mask;
pub(crate) use conjugate_gradient::ROWS as FITTED;
pub use conjugate_gradient::conjugate_gradient;
pub use distribution::{Distribution, Histogram};
pub use error::Error;
pub use init::{Amount, Init, Initial, InitialMask, Scores, weight_norm};
pub(crate) use init::{CHOICE, Takes, floored};
pub use least_squares::least_squares;
pub(crate) use pattern::Tile;
pub use pattern::{ParsePatternError, Pattern};
pub use permute::Channels;
pub use rebuild::{Comparison, Scored, rebuild};
pub use scope::Scope;
pub(crate) use swap::BLOCK;
pub use swap::{Ends, OutputError, Swapped, row_ends, swap};
