//! The data of a report: the contents of `barber-report.json`, from which the page is made.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
};

use serde::{Deserialize, Serialize, Serializer, ser::SerializeStruct};

use super::OutputError;
use crate::{
    calibration::Extent,
    checkpoint::{Format, Masks},
    evaluate::{Accuracy, Perplexity},
    family::Decoder,
    permutation::PermutedPart,
    plan::Plan,
    prune::{ExpertReport, GroupReport, Step},
    recipe::Setting,
    structure::{Indices, Removal, Structure},
    version::Version,
};

/// The report of a run. Numbers that are not finite are `null` in JSON and are read back as NaN.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Program version that ran.
    #[serde(flatten)]
    pub version: Version,
    /// Path of the dense checkpoint, as in the recipe.
    #[serde(default)]
    pub model: PathBuf,
    /// Quantisation of the dense checkpoint, whose weights were dequantised, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantisation: Option<String>,
    /// Path of the written checkpoint.
    pub output: PathBuf,
    /// Number of weights of all matrices of the dense model, embeddings included.
    #[serde(default)]
    pub model_weights: usize,
    /// Number of weights of all matrices of the result, zeros included.
    #[serde(default)]
    pub output_weights: usize,
    /// Number of weights that were subject to pruning.
    pub prunable_weights: usize,
    /// Number of pruned weights.
    pub pruned_weights: usize,
    /// Number of kept weights that differ from the dense model's.
    pub changed_weights: usize,
    /// Number of values of biases that differ from the dense model's, or that it lacks.
    #[serde(default)]
    pub changed_biases: usize,
    /// What was done to the inner channels of each part, if the recipe has `sparsity.permute`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub permuted: Vec<PermutedPart>,
    /// Fraction of each layer that is pruned, if layers differ.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allocation: Vec<f64>,
    /// Perplexity of each text.
    pub perplexity: Vec<TextReport>,
    /// Accuracy on each task.
    pub tasks: Vec<TaskReport>,
    /// Continuations of each prompt.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub generations: Vec<GenerationReport>,
    /// Number and length of the calibration samples, if statistics were gathered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Extent>,
    /// Structures that were removed as a whole, if the recipe has a `sparsity.structure`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub structures: Vec<StructureReport>,
    /// Matrices that were subject to pruning, layer by layer.
    #[serde(default)]
    pub matrices: Vec<Matrix>,
    /// Refined groups, in the order of refinement.
    pub groups: Vec<GroupReport>,
    /// Number of calibration tokens that each expert saw, by layer; empty if the model has no
    /// experts, or no statistics were computed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<ExpertReport>,
    /// Steps of the end-to-end stage, if there was one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// Fraction of the output errors of `groups` that is left after the refinement.
    #[serde(default)]
    pub output_error: Option<OutputError>,
    /// Duration of each phase in seconds.
    pub seconds: BTreeMap<String, f64>,
    /// Peak private memory of the process in each phase, in bytes: without the pages of the mapped
    /// checkpoint and without a GPU's memory. Empty if the system does not report it.
    #[serde(default)]
    pub memory: BTreeMap<String, u64>,
    /// Sizes of the checkpoints on disk.
    #[serde(default)]
    pub sizes: Sizes,
    /// Floating-point operations of the matrix products of the pruning, attention included.
    pub operations: u64,
    /// Seconds that a thread spent on these products, averaged over the threads; 0 on a GPU, which
    /// does not measure it.
    #[serde(default)]
    pub product_seconds: f64,
    /// Expected number of these operations, computed from the layers' shapes.
    pub least_operations: f64,
    /// Values of the recipe.
    #[serde(default)]
    pub recipe: Vec<Setting>,
    /// SHA-256 of each file that the run read.
    pub inputs: BTreeMap<PathBuf, String>,
    /// SHA-256 of each file that the run wrote, except its reports.
    #[serde(default, deserialize_with = "super::file::of_files")]
    pub outputs: BTreeMap<String, String>,
}

impl Report {
    /// Fraction of the prunable weights that is pruned.
    pub fn sparsity(&self) -> f64 {
        self.pruned_weights as f64 / self.prunable_weights.max(1) as f64
    }

    /// Name of the model: its name on the hub, if the path is such a name or lies in the hub's
    /// cache; otherwise the name of its directory.
    pub fn model_name(&self) -> String {
        let parts = self.model.iter().map(|part| part.to_string_lossy());
        let parts: Vec<_> = parts.filter(|part| part != "." && part != "..").collect();
        let cached = parts.iter().find_map(|part| part.strip_prefix("models--"));
        match (cached, &parts[..]) {
            (Some(name), _) => name.replace("--", "/"),
            (None, [owner, name]) if self.model.is_relative() => format!("{owner}/{name}"),
            (None, parts) => parts.last().map(ToString::to_string).unwrap_or_default(),
        }
    }

    /// Fraction of the weights of all matrices, embeddings included, that is pruned; `None` if the
    /// report lacks their number.
    pub fn model_sparsity(&self) -> Option<f64> {
        (self.model_weights > 0).then(|| self.pruned_weights as f64 / self.model_weights as f64)
    }

    /// Sum of the phases' durations, in seconds.
    pub fn total_seconds(&self) -> f64 {
        self.seconds.values().sum()
    }

    /// Largest peak memory of the phases, in bytes.
    pub fn peak_memory(&self) -> Option<u64> {
        self.memory.values().max().copied()
    }

    /// Indices of the layers in the report.
    pub fn layers(&self) -> BTreeSet<usize> {
        let pruned = self.matrices.iter().map(|matrix| matrix.layer);
        pruned.chain(self.groups.iter().map(|group| group.layer)).collect()
    }

    /// Index of the last layer; 0 if there are none.
    pub fn last_layer(&self) -> usize {
        self.layers().last().copied().unwrap_or(0)
    }

    /// Names of the groups, in the order of their first occurrence.
    pub fn group_names(&self) -> Vec<&str> {
        let mut names = Vec::new();
        let pruned = self.matrices.iter().map(|matrix| matrix.group.as_str());
        for name in pruned.chain(self.groups.iter().map(|group| group.group.as_str())) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// Matrices of a group of a layer.
    pub fn of<'a>(&'a self, layer: usize, group: &'a str) -> impl Iterator<Item = &'a Matrix> {
        self.matrices.iter().filter(move |of| of.layer == layer && of.group == group)
    }

    /// Whether there are results after the refinement, and none of the initial masks.
    pub fn refined_in_one_pass(&self) -> bool {
        let perplexity = self
            .perplexity
            .iter()
            .map(|of| (of.found.initial.is_some(), of.found.refined.is_some()));
        let tasks =
            self.tasks.iter().map(|of| (of.found.initial.is_some(), of.found.refined.is_some()));
        let mut found = perplexity.chain(tasks).peekable();
        found.peek().is_some() && found.all(|(initial, refined)| refined && !initial)
    }

    /// Groups in which the stage with this index was reverted.
    pub fn taken_back(&self, stage: usize) -> impl Iterator<Item = &GroupReport> {
        let taken_back =
            move |group: &&GroupReport| group.stages.get(stage).is_some_and(|of| !of.accepted);
        self.groups.iter().filter(taken_back)
    }
}

/// Perplexity of the models on one text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextReport {
    /// Path of the text, or its name in the recipe.
    pub text: String,
    /// Perplexity of each model.
    #[serde(flatten)]
    pub found: Stages<Perplexity>,
}

/// Accuracy of the models on one task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskReport {
    /// Name of the task.
    pub task: String,
    /// Accuracy of each model.
    #[serde(flatten)]
    pub found: Stages<Accuracy>,
}

/// Continuations of one prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationReport {
    /// The prompt.
    pub prompt: String,
    /// Continuation by each model.
    #[serde(flatten)]
    pub found: Stages<String>,
}

/// Results of the model before, during and after pruning. JSON also has [`Stages::last`], as
/// `final`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Stages<T> {
    /// Result of the dense model.
    pub dense: T,
    /// Result with the initial masks.
    pub initial: Option<T>,
    /// Result after the refinement.
    pub refined: Option<T>,
}

impl<T: Serialize> Serialize for Stages<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut keys = serializer.serialize_struct("Stages", 4)?;
        keys.serialize_field("dense", &self.dense)?;
        keys.serialize_field("initial", &self.initial)?;
        keys.serialize_field("refined", &self.refined)?;
        keys.serialize_field("final", self.last())?;
        keys.end()
    }
}

impl<T> Stages<T> {
    /// The results that exist, with their names.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &T)> {
        let pruned = [("pruned, initial mask", &self.initial), ("pruned, refined", &self.refined)];
        let pruned = pruned.into_iter().filter_map(|(name, found)| Some((name, found.as_ref()?)));
        std::iter::once(("dense", &self.dense)).chain(pruned)
    }

    /// Result of the written model; the dense model's if there is no other.
    pub fn last(&self) -> &T {
        self.refined.as_ref().or(self.initial.as_ref()).unwrap_or(&self.dense)
    }
}

/// The structures of one kind that were removed as a whole: the result has fewer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StructureReport {
    /// What was removed, as in a recipe.
    pub structure: Structure,
    /// Number of such structures of each layer of the dense model; or of the model, if they are layers.
    pub of: usize,
    /// Number of them that are lost.
    pub lost: usize,
    /// Indices of the structures that each layer lost, or the model. A layer that is gone has none.
    pub removed: Vec<Indices>,
    /// Whether biases of output projections were changed or added to make up for them.
    #[serde(default)]
    pub compensated: bool,
}

impl StructureReport {
    /// The structures that are removed by these masks, by kind.
    pub fn all(removal: &Removal, decoder: &Decoder, masks: &Masks) -> Vec<Self> {
        let gone = removal.gone(decoder, masks).into_iter();
        let each = removal.lost.iter().zip(gone).map(|(of, removed)| Self {
            structure: of.structure,
            of: of.of,
            lost: of.removed,
            removed,
            compensated: of.compensated,
        });
        each.collect()
    }

    /// All kinds, in words; `None` if there is none.
    pub fn in_words(all: &[Self]) -> Option<String> {
        let each: Vec<String> = all.iter().map(ToString::to_string).collect();
        (!each.is_empty()).then(|| each.join(" and "))
    }
}

impl fmt::Display for StructureReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { structure, of, lost, removed, .. } = self;
        write!(f, "{lost} of the {of} {}", structure.many())?;
        if structure.is_of_model() {
            return Ok(());
        }
        match removed.iter().filter(|removed| **removed != Indices::default()).count() {
            1 => write!(f, " of one layer"),
            layers => write!(f, " of each of {layers} layers"),
        }
    }
}

/// A matrix that was subject to pruning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Matrix {
    /// Tensor name.
    pub tensor: String,
    /// Index of the decoder layer.
    pub layer: usize,
    /// Name of the group.
    pub group: String,
    /// Number of outputs (rows) and of inputs (columns) of the dense model's matrix.
    pub shape: [usize; 2],
    /// Sparsity pattern, as in a recipe: `unstructured`, `2:4`; or the structure that was removed,
    /// such as `channels`.
    pub pattern: String,
    /// Number of weights that the initial mask keeps.
    pub initial: usize,
    /// Number of weights that the final mask keeps.
    pub kept: usize,
}

impl Matrix {
    /// Number of weights.
    pub fn weights(&self) -> usize {
        self.shape[0].saturating_mul(self.shape[1])
    }

    /// The matrices of a plan, with their final masks and, from the refinement, their initial
    /// masks.
    pub fn all(
        plan: &Plan,
        decoder: &Decoder,
        masks: &Masks,
        refined: &[GroupReport],
    ) -> Vec<Self> {
        let first = refined.iter().filter_map(|group| group.stages.first());
        let matrices = first.flat_map(|stage| &stage.matrices);
        let initial: BTreeMap<&str, usize> =
            matrices.map(|matrix| (matrix.tensor.as_str(), matrix.kept_before)).collect();
        let mut all = Vec::new();
        for (layer, groups) in plan.layers.iter().enumerate() {
            for (group, member) in
                groups.iter().flat_map(|group| group.members.iter().map(move |m| (group, m)))
            {
                let linear = member.of(&decoder.layers[layer]);
                let tensor = linear.weight.clone();
                let kept = masks.get(&tensor).map_or(linear.dims.len(), |mask| mask.kept());
                all.push(Self {
                    layer,
                    group: group.name.clone(),
                    shape: [linear.dims.rows, linear.dims.columns],
                    pattern: plan.what(layer, *member),
                    initial: initial.get(&*tensor).copied().unwrap_or(kept),
                    kept,
                    tensor,
                });
            }
        }
        all
    }
}

/// Sizes of the dense and the pruned checkpoint on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// Storage format of pruned matrices.
    pub format: Format,
    /// Size of the dense checkpoint.
    pub dense: Size,
    /// Size of the pruned checkpoint.
    pub output: Size,
    /// Number of pruned matrices.
    pub pruned_matrices: usize,
    /// Number of compressed matrices. The others would not get smaller, or the format does not
    /// support their pattern.
    pub compressed_matrices: usize,
}

/// Size of a checkpoint on disk, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Size of the tensors.
    pub weight_bytes: u64,
    /// Size of the files, except the model card and the files that Barber adds.
    pub directory_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_called_by_their_names() {
        let cached = "cache/huggingface/hub/models--owner--name/snapshots/0123abcd";
        for (path, expected) in [
            ("owner/name", "owner/name"),
            (cached, "owner/name"),
            ("/models/llama", "llama"),
            ("recipes/quickstart/model", "model"),
            ("./model", "model"),
            ("../model", "model"),
            ("", ""),
        ] {
            let report = Report { model: path.into(), ..Report::default() };
            assert_eq!(report.model_name(), expected, "{path}");
        }
    }
}
