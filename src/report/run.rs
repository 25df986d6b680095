//! What a run did, as data: what `barber-report.json` holds, and all that the page is made of.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use serde::{Deserialize, Serialize, Serializer, ser::SerializeStruct};

use super::OutputError;
use crate::{
    calibration::Extent,
    checkpoint::{Format, Masks},
    evaluate::{Accuracy, Perplexity},
    family::Decoder,
    plan::Plan,
    prune::{GroupReport, Step},
    recipe::Setting,
    version::Version,
};

/// What a run did. What is not finite is `null` in JSON, and not a number again when it is read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The program that ran.
    #[serde(flatten)]
    pub version: Version,
    /// The dense checkpoint, as the recipe names it.
    #[serde(default)]
    pub model: PathBuf,
    /// The checkpoint that was written.
    pub output: PathBuf,
    /// Number of weights of all of the dense model's matrices, embeddings included.
    #[serde(default)]
    pub model_weights: usize,
    /// How many weights were subject to pruning.
    pub prunable_weights: usize,
    /// How many of them are pruned.
    pub pruned_weights: usize,
    /// How many of the kept ones are not the dense model's.
    pub changed_weights: usize,
    /// The fraction of each layer that is pruned, where it is not the same of all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allocation: Vec<f64>,
    /// The perplexities, text by text.
    pub perplexity: Vec<TextReport>,
    /// The accuracies, task by task.
    pub tasks: Vec<TaskReport>,
    /// What the models go on to say, prompt by prompt.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub generations: Vec<GenerationReport>,
    /// The calibration samples, if statistics were gathered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Extent>,
    /// The matrices that were subject to pruning, layer by layer.
    #[serde(default)]
    pub matrices: Vec<Matrix>,
    /// The refined groups, in their order.
    pub groups: Vec<GroupReport>,
    /// The steps of the stage that refined the whole model, if one did.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// How much of the output errors of `groups` the refinement left.
    #[serde(default)]
    pub output_error: Option<OutputError>,
    /// Seconds that each phase took.
    pub seconds: BTreeMap<String, f64>,
    /// The most memory that the process had of its own in each phase, in bytes: without the pages
    /// of the mapped checkpoint, and without a GPU's memory. Empty where the system does not say.
    #[serde(default)]
    pub memory: BTreeMap<String, u64>,
    /// What the checkpoints take on disk.
    #[serde(default)]
    pub sizes: Sizes,
    /// Floating-point operations of the matrix products that the masks took, attention's included.
    pub operations: u64,
    /// Seconds that each thread spent on these products, on average; 0 on a GPU, which does not
    /// say.
    #[serde(default)]
    pub product_seconds: f64,
    /// Those that were expected, by the layers' shapes.
    pub least_operations: f64,
    /// The recipe, value by value.
    #[serde(default)]
    pub recipe: Vec<Setting>,
    /// SHA-256 of what the run read.
    pub inputs: BTreeMap<PathBuf, String>,
    /// SHA-256 of each file that it wrote, but for its reports.
    #[serde(default, deserialize_with = "super::file::of_files")]
    pub outputs: BTreeMap<String, String>,
}

impl Report {
    /// The fraction of the prunable weights that is pruned.
    pub fn sparsity(&self) -> f64 {
        self.pruned_weights as f64 / self.prunable_weights.max(1) as f64
    }

    /// What the model is called: its name on the hub, also where its path is in the hub's cache, or
    /// that of its directory.
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

    /// The fraction of the weights of all of the model's matrices, embeddings included, that is
    /// pruned; `None` where the report does not say how many these are.
    pub fn model_sparsity(&self) -> Option<f64> {
        (self.model_weights > 0).then(|| self.pruned_weights as f64 / self.model_weights as f64)
    }

    /// The seconds of all phases.
    pub fn total_seconds(&self) -> f64 {
        self.seconds.values().sum()
    }

    /// The most memory of all phases, in bytes.
    pub fn peak_memory(&self) -> Option<u64> {
        self.memory.values().max().copied()
    }

    /// The layers that it says something of.
    pub fn layers(&self) -> BTreeSet<usize> {
        let pruned = self.matrices.iter().map(|matrix| matrix.layer);
        pruned.chain(self.groups.iter().map(|group| group.layer)).collect()
    }

    /// The number of the last of them; 0 if there are none.
    pub fn last_layer(&self) -> usize {
        self.layers().last().copied().unwrap_or(0)
    }

    /// The names of the groups, in the order in which they come first.
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

    /// The matrices of a group of a layer.
    pub fn of<'a>(&'a self, layer: usize, group: &'a str) -> impl Iterator<Item = &'a Matrix> {
        self.matrices.iter().filter(move |of| of.layer == layer && of.group == group)
    }

    /// Whether what was measured was refined, and nothing was measured of the initial masks.
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

    /// The groups in which a stage, by its number, was taken back.
    pub fn taken_back(&self, stage: usize) -> impl Iterator<Item = &GroupReport> {
        let taken_back =
            move |group: &&GroupReport| group.stages.get(stage).is_some_and(|of| !of.accepted);
        self.groups.iter().filter(taken_back)
    }
}

/// The perplexities on one text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextReport {
    /// The text: its path, or the name that the recipe gives it.
    pub text: String,
    /// What was measured.
    #[serde(flatten)]
    pub found: Stages<Perplexity>,
}

/// The accuracies on one task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskReport {
    /// The task.
    pub task: String,
    /// What was measured.
    #[serde(flatten)]
    pub found: Stages<Accuracy>,
}

/// The continuations of one prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationReport {
    /// The prompt.
    pub prompt: String,
    /// What each model goes on to say.
    #[serde(flatten)]
    pub found: Stages<String>,
}

/// What was measured of the model on its way. In JSON it has [`Stages::last`] too, as `final`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Stages<T> {
    /// Of the dense model.
    pub dense: T,
    /// With the initial masks.
    pub initial: Option<T>,
    /// Refined.
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
    /// Those that there are, with their names.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &T)> {
        let pruned = [("pruned, initial mask", &self.initial), ("pruned, refined", &self.refined)];
        let pruned = pruned.into_iter().filter_map(|(name, found)| Some((name, found.as_ref()?)));
        std::iter::once(("dense", &self.dense)).chain(pruned)
    }

    /// Of the model that was written; the dense one's if no other was measured.
    pub fn last(&self) -> &T {
        self.refined.as_ref().or(self.initial.as_ref()).unwrap_or(&self.dense)
    }
}

/// A matrix that was subject to pruning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Matrix {
    /// Its tensor name.
    pub tensor: String,
    /// The decoder layer.
    pub layer: usize,
    /// The group.
    pub group: String,
    /// Outputs and inputs.
    pub shape: [usize; 2],
    /// Where its zeros may be, as a recipe says it: `unstructured`, `2:4`.
    pub pattern: String,
    /// How many weights the initial mask keeps.
    pub initial: usize,
    /// How many are kept in the end.
    pub kept: usize,
}

impl Matrix {
    /// How many weights it has.
    pub fn weights(&self) -> usize {
        self.shape[0].saturating_mul(self.shape[1])
    }

    /// The matrices of a plan, with the masks that they have in the end and what the refinement
    /// says of those before.
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
                    pattern: member.rule.pattern.to_string(),
                    initial: initial.get(&*tensor).copied().unwrap_or(kept),
                    kept,
                    tensor,
                });
            }
        }
        all
    }
}

/// What the dense checkpoint takes on disk, and what the pruned one does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// How pruned matrices are stored.
    pub format: Format,
    /// The dense checkpoint.
    pub dense: Size,
    /// The pruned one.
    pub output: Size,
    /// How many matrices are pruned.
    pub pruned_matrices: usize,
    /// How many of them are compressed; the others would not get smaller, or the format does not
    /// store their pattern.
    pub compressed_matrices: usize,
}

/// What a checkpoint takes on disk, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Its tensors.
    pub weight_bytes: u64,
    /// Its files, but for its card and what Barber adds about a run.
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
