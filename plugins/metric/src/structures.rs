//! The statistics of whole structures for scoring them.

use crate::Error;

/// Structures that compete to be removed, and their statistics.
#[derive(Clone, Copy, Debug, Default)]
pub struct StructureStats<'a> {
    /// What they are, as a recipe's `sparsity.structure` names it: `layers`, `experts`.
    pub structure: &'a str,
    /// Index of their layer; `None` if they are of the whole model.
    pub layer: Option<usize>,
    /// Of each layer, one minus the mean cosine between the hidden states before and after it over all
    /// calibration tokens (ShortGPT, arXiv 2403.03853, section 2.2).
    pub influence: Option<&'a [f32]>,
    /// Of each expert, the mean over the calibration tokens that it sees of its weight times the norm
    /// of its output (REAP, arXiv 2510.13999, section 4).
    pub contribution: Option<&'a [f32]>,
}

impl<'a> StructureStats<'a> {
    /// The influence of layers.
    ///
    /// # Errors
    /// If [`Needs::influence`](crate::Needs::influence) was not declared.
    pub fn influence(&self) -> Result<&'a [f32], Error> {
        self.influence.ok_or(Error::Undeclared("influence"))
    }

    /// The contribution of experts.
    ///
    /// # Errors
    /// If [`Needs::contribution`](crate::Needs::contribution) was not declared.
    pub fn contribution(&self) -> Result<&'a [f32], Error> {
        self.contribution.ok_or(Error::Undeclared("contribution"))
    }
}
