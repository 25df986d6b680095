//! The model card of a pruned checkpoint: `README.md` with the metadata that the hub reads. It says
//! what was done, the results, and how to load the model. It contains no path of this machine.

use std::{fmt, path::Path};

use super::{
    Report, StructureReport,
    figure::{change, headline},
    front_matter::FrontMatter,
};
use crate::{
    calibration::Extent,
    checkpoint::{CARD, Format, MASKS},
    evaluate::Perplexity,
    permutation::PermutedPart,
    recipe::{Recipe, describe},
};

/// The model card of a run. `dense` is the directory of the dense model.
pub fn card(recipe: &Recipe, report: &Report, dense: &Path) -> String {
    Card { recipe, report, dense: FrontMatter::of(&dense.join(CARD)) }.to_string()
}

/// A model card.
struct Card<'a> {
    /// Recipe of the run.
    recipe: &'a Recipe,
    /// Report of the run.
    report: &'a Report,
    /// Front matter of the dense model's card.
    dense: FrontMatter,
}

impl Card<'_> {
    /// Storage format of the matrices; dense if none is compressed.
    fn format(&self) -> Format {
        match self.report.sizes.compressed_matrices {
            0 => Format::default(),
            _ => self.report.sizes.format,
        }
    }

    fn metadata(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "---")?;
        if let Some(base) = self.recipe.hub_name() {
            // The hub knows finetune, adapter, merge and quantized.
            writeln!(f, "base_model: {base}\nbase_model_relation: finetune")?;
        }
        write!(f, "{}", self.dense)?;
        writeln!(f, "library_name: transformers\npipeline_tag: text-generation")?;
        writeln!(f, "tags:\n- pruned")?;
        if self.report.structures.is_empty() {
            writeln!(f, "- sparse")?;
        }
        writeln!(f, "- llm-barber")?;
        if !self.format().is_dense() {
            writeln!(f, "- compressed-tensors")?;
        }
        writeln!(f, "---\n")
    }

    fn done(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Recipe { sparsity, calibration, .. } = self.recipe;
        let Report { prunable_weights, pruned_weights, changed_weights, sizes, .. } = self.report;
        let fraction = 100.0 * *pruned_weights as f64 / (*prunable_weights).max(1) as f64;
        let (path, revision) = self.recipe.model.reference();
        let name = file_name(path);
        writeln!(f, "# {}, {} pruned\n", plain(&name), headline(self.report.sparsity()))?;
        match (self.recipe.hub_name(), revision) {
            (Some(base), revision) => {
                write!(f, "[{base}](https://huggingface.co/{base})")?;
                revision.iter().try_for_each(|of| write!(f, " at revision `{}`", code(of)))?;
            }
            (None, _) => f.write_str(&plain(&name))?,
        }
        match StructureReport::in_words(&self.report.structures) {
            Some(structures) => write!(f, " without {structures}, which are")?,
            None => f.write_str(" with zeros for")?,
        }
        writeln!(
            f,
            " {pruned_weights} of the {prunable_weights} weights of \
             {} matrices ({fraction:.2}%; {:.2}% of all of the model's weights, embeddings included), \
             made by Barber {}, an implementation of \
             [LLM-Barber](https://arxiv.org/abs/2408.10631).\n",
            sizes.pruned_matrices,
            100.0 * self.report.model_sparsity().unwrap_or_default(),
            self.report.version.barber
        )?;
        let removed = self.report.structures.iter().map(|of| of.structure.many());
        match removed.collect::<Vec<_>>().join(", ") {
            none if none.is_empty() => writeln!(f, "- Pattern: {}", sparsity.pattern)?,
            removed => writeln!(f, "- Removed: {removed}")?,
        }
        writeln!(f, "- Initial mask: {}", plain(&describe::init(self.recipe)))?;
        if let Some(permuted) = PermutedPart::in_words(&self.report.permuted) {
            writeln!(f, "- Permuted: {permuted}; the dense model computes the same in this order")?;
        }
        let blocks = self.report.group_names();
        for stage in describe::stages(self.recipe, &blocks) {
            writeln!(f, "- Refinement: {}", plain(&stage))?;
        }
        if let Some(error) = &self.report.output_error {
            let [mean, worst] = [error.mean, error.worst].map(|of| change(1.0, of));
            let place = plain(&error.worst_place());
            writeln!(
                f,
                "- Output error: changed by the refinement by {mean}, the mean of the groups, and by \
                 {worst} in {place}"
            )?;
        }
        if let Some((source, of)) = calibration.source.as_deref().zip(self.report.calibration) {
            let Extent { samples, held_out, shortest, longest, .. } = of;
            let source = plain(&file_name(source));
            let length = match shortest == longest {
                true => longest.to_string(),
                false => format!("{shortest} to {longest}"),
            };
            let noun = if samples == 1 { "sample" } else { "samples" };
            write!(f, "- Calibration: {samples} {noun} of {length} tokens of {source}")?;
            match held_out {
                0 => writeln!(f)?,
                _ => writeln!(f, ", and {held_out} held out")?,
            }
        }
        if let Some(quantisation) = &self.report.quantisation {
            writeln!(f, "- Dense model: {}", plain(quantisation))?;
        }
        match changed_weights {
            0 => writeln!(f, "- Kept weights: the dense model's")?,
            changed => {
                let kept = prunable_weights - pruned_weights;
                writeln!(f, "- Kept weights: {changed} of {kept} are not the dense model's")?;
            }
        }
        if self.report.changed_biases > 0 {
            let changed = self.report.changed_biases;
            writeln!(f, "- Biases: {changed} values are not the dense model's")?;
        }
        let [dense, output] =
            [&sizes.dense, &sizes.output].map(|size| megabytes(size.weight_bytes));
        writeln!(
            f,
            "- Weights: {output} MB, stored as `{}`; the dense model's, {dense} MB",
            self.format()
        )
    }

    fn results(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { perplexity, tasks, .. } = self.report;
        if perplexity.is_empty() && tasks.is_empty() {
            return Ok(());
        }
        writeln!(f, "\n## Results\n")?;
        let initial = perplexity.iter().any(|of| of.found.initial.is_some())
            || tasks.iter().any(|of| of.found.initial.is_some());
        let refined = perplexity.iter().any(|of| of.found.refined.is_some())
            || tasks.iter().any(|of| of.found.refined.is_some());
        // The initial mask has its own column only if it is not the result.
        let between = initial && refined;
        let columns = if between { "dense | initial mask | pruned" } else { "dense | pruned" };
        writeln!(f, "| | {columns} |\n|---|{}", "---:|".repeat(2 + usize::from(between)))?;
        let mut row = |name: &str, [dense, initial, refined]: [Option<String>; 3]| {
            let last = refined.or_else(|| initial.clone());
            let cells = [dense, initial.filter(|_| between), last].into_iter().flatten();
            writeln!(f, "| {name} | {} |", cells.collect::<Vec<_>>().join(" | "))
        };
        let texts = &self.recipe.evaluate.perplexity;
        for (of, text) in perplexity.iter().zip(texts) {
            let name = text.name.clone().unwrap_or_else(|| file_name(&text.path));
            let found = &of.found;
            let shown =
                [Some(&found.dense), found.initial.as_ref(), found.refined.as_ref()].map(|found| {
                    let Perplexity { perplexity, perplexity_stderr, .. } = found?;
                    let error = perplexity_stderr.map(|error| format!(" ± {error:.2}"));
                    Some(format!("{perplexity:.2}{}", error.unwrap_or_default()))
                });
            row(&format!("{}, perplexity (lower is better)", plain(&name)), shown)?;
        }
        for of in tasks {
            let found = &of.found;
            let shown =
                [Some(&found.dense), found.initial.as_ref(), found.refined.as_ref()].map(|found| {
                    let found = found?;
                    Some(format!("{:.1}% ± {:.1}", 100.0 * found.acc, 100.0 * found.acc_stderr))
                });
            row(&format!("{}, zero-shot accuracy (higher is better)", plain(&of.task)), shown)?;
        }
        if let Some(of) = perplexity.first() {
            let Perplexity { segments, predictions, .. } = of.found.dense;
            // The first token of a segment is not predicted.
            let length = predictions / segments.max(1) + 1;
            writeln!(
                f,
                "\nPerplexities are on segments of {length} tokens ({segments} segments of the first text)."
            )?;
        }
        Ok(())
    }

    fn loading(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n## How to load it\n")?;
        f.write_str(self.format().loading)?;
        if self.recipe.output.masks {
            writeln!(
                f,
                "\n`{MASKS}` has the masks of the pruned matrices, one bit per weight: \
                 `numpy.unpackbits(bits, axis=-1, count=columns, bitorder=\"little\")` gives 1 for each \
                 kept weight of a matrix."
            )?;
        }
        Ok(())
    }

    fn recipe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let recipe = self.recipe.clone().without_directories();
        // `prune` has checked that TOML can express the recipe.
        let toml = recipe.to_toml().unwrap_or_default();
        let fence = fence(&toml);
        writeln!(
            f,
            "\n## Recipe\n\nOf files it has the names only.\n\n{fence}toml\n{}\n{fence}",
            toml.trim()
        )
    }
}

impl fmt::Display for Card<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.metadata(f)?;
        self.done(f)?;
        self.results(f)?;
        self.loading(f)?;
        self.recipe(f)
    }
}

/// The last component of a path.
fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

/// Escapes a text for Markdown, in one line.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    for c in text.chars() {
        match c {
            c if c.is_control() => plain.push(' '),
            '\\' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '|' | '#' | '&' | '~' => {
                plain.extend(['\\', c]);
            }
            c => plain.push(c),
        }
    }
    plain
}

/// A code fence for a text: longer than any fence in the text.
fn fence(text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    "`".repeat((longest + 1).max(4))
}

/// Escapes a text for a code span.
fn code(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() && *c != '`').collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// No line of a text ends the block of code that it stands in.
        #[test]
        fn a_fence_holds_its_text(text in "[`~a\n ]{0,60}") {
            let fence = fence(&text);
            prop_assert!(text.lines().all(|line| !line.trim().starts_with(&fence)));
        }

        /// Nothing in a text is markup.
        #[test]
        fn a_plain_text_is_one_line_without_markup(text in any::<String>()) {
            let plain = plain(&text);
            prop_assert!(!plain.contains(char::is_control));
            for markup in ["<", "`", "[", "*", "|", "&"] {
                let escaped = format!("\\{markup}");
                prop_assert_eq!(plain.matches(markup).count(), plain.matches(&escaped).count());
            }
        }
    }
}
