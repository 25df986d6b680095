//! The tensors that a recipe leaves as they are.

use globset::{Glob, GlobSet, GlobSetBuilder};

use super::Sparsity;

/// The tensors that a recipe leaves as they are.
#[derive(Clone, Debug)]
pub struct Exclude(GlobSet);

impl Exclude {
    /// Whether the tensor of this name is excluded, with or without its `.weight`.
    pub fn matches(&self, tensor: &str) -> bool {
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        self.0.is_match(tensor) || self.0.is_match(module)
    }
}

impl Sparsity {
    /// The globs of [`Sparsity::exclude`], ready to match.
    ///
    /// ```
    /// let sparsity = llm_barber::recipe::Sparsity::default();
    /// assert!(sparsity.excluded().unwrap().matches("lm_head.weight"));
    /// ```
    ///
    /// # Errors
    /// If one is no glob; loading a recipe has checked that they are.
    pub fn excluded(&self) -> Result<Exclude, globset::Error> {
        let mut set = GlobSetBuilder::new();
        for glob in &self.exclude {
            set.add(Glob::new(glob)?);
        }
        set.build().map(Exclude)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_tensors_and_modules() {
        let exclude = vec!["*.down_proj".into(), "model.layers.[01].*".into()];
        let exclude = Sparsity { exclude, ..Sparsity::default() }.excluded().unwrap();
        for name in ["model.layers.5.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"] {
            assert!(exclude.matches(name), "{name}");
        }
        for name in ["model.layers.5.mlp.up_proj.weight", "down_proj.weight", "lm_head.weight"] {
            assert!(!exclude.matches(name), "{name}");
        }
    }
}
