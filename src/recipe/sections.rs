//! The sections of a recipe. The documentation of each key is the help that users see.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use barber_metric::Needs;
use bytesize::ByteSize;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{SeqAccess, Visitor, value::SeqAccessDeserializer},
};
use serde_json::{Map, Value, json};

use super::{
    Device, Dtype, Format, Init, MetricStep, Pattern, Prompts, Refine, Scope, Selection, Text,
    preset,
};
use crate::{
    choice::{optional_word, word},
    evaluate::TASKS,
    hub::is_name,
    precision::Precision,
    prune::{Allocation, By, Side},
    structure::Structure,
};

/// Maximum number of samples, tokens, segments or questions.
pub(super) const MOST: usize = 1 << 24;

/// A complete pruning experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// A set of defaults: `paper`, LLM-Barber as published; `best`, the most accurate masks;
    /// `fast`, less accurate ones in a small part of the time; `reconstructed`, the most accurate
    /// model, whose kept weights change. `barber check` shows its values.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = preset::names().collect::<Vec<_>>()))]
    pub preset: Option<String>,
    /// The model to prune.
    pub model: Model,
    /// The text that statistics are computed on.
    pub calibration: Calibration,
    /// How many weights to prune, and where.
    pub sparsity: Sparsity,
    /// The mask that the refinement starts from.
    pub mask: Mask,
    /// The groups of linear layers that are refined together. Left out: the model family's groups,
    /// self-attention and MLP.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<BlockGroup>,
    /// Settings for some of the tensors, in place of those of `sparsity` and the stages.
    #[serde(rename = "override", skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
    /// Which model's hidden states statistics and targets are computed on.
    pub streams: Streams,
    /// The stages that refine the masks, in order. Left out: the initial mask is the result.
    pub refine: Vec<Refine>,
    /// The metrics that score weights for the stage `rebuild`, in order. Left out:
    /// `weight-gradient`.
    pub metric: Vec<MetricStep>,
    /// The device and memory to run the model with.
    pub executor: Executor,
    /// The pruned checkpoint.
    pub output: Output,
    /// What to measure on the result.
    pub evaluate: Evaluate,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            preset: None,
            model: Model::default(),
            calibration: Calibration::default(),
            sparsity: Sparsity::default(),
            mask: Mask::default(),
            blocks: Vec::new(),
            overrides: Vec::new(),
            streams: Streams::default(),
            refine: Vec::new(),
            metric: vec![MetricStep::new("weight-gradient")],
            executor: Executor::default(),
            output: Output::default(),
            evaluate: Evaluate::default(),
        }
    }
}

/// The model to prune.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// The checkpoint: a directory in the Hugging Face layout, or `owner/name` on the hub. Every
    /// recipe needs it.
    pub path: PathBuf,
    /// The branch, tag or commit of a model on the hub. Left out: `main`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The dense model that the sparse model at `path` was made from: a directory or a name on the
    /// hub. With `mask.init = "none"` the zeros of the sparse model are refined; the dense model is
    /// the reference and has the values of all weights, or with `mask.retain` of those that come back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense: Option<PathBuf>,
    /// The branch, tag or commit of `dense` on the hub. Left out: `main`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense_revision: Option<String>,
}

impl Model {
    /// Path or hub name of the dense model, and its revision.
    pub fn reference(&self) -> (&Path, Option<&str>) {
        match &self.dense {
            Some(dense) => (dense, self.dense_revision.as_deref()),
            None => (&self.path, self.revision.as_deref()),
        }
    }
}

/// The text that statistics are computed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Calibration {
    /// A file of plain text; of JSON Lines, a JSON list of objects (`.jsonl`, `.ndjson`,
    /// `.jsonlines`, `.json`) or Parquet (`.parquet`), whose records are documents; or of JSON
    /// `{"token_ids": [[…], …]}`. Text and JSON may be compressed with gzip or Zstandard. Needed by
    /// the masks `wanda`, `sparsegpt` and `alps`, by metrics that use inputs, by every stage, and by
    /// the allocations `owl` and `error`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<PathBuf>,
    /// The field of a record that holds its text. If no field is named `a.b`, it is the field `b`
    /// of the object `a`.
    pub field: String,
    /// Number of samples to take from the text.
    #[schemars(range(min = 1, max = MOST))]
    pub samples: usize,
    /// Number of further samples to hold out from all statistics. Reports have the effect of each
    /// stage on them, too, and swaps, guarded rebuilds and reconstructions that do not lower the
    /// error on them are undone.
    #[schemars(range(max = MOST))]
    pub held_out: usize,
    /// Length of a sample, in tokens. Left out: the smaller of 2048 and the model's number of
    /// positions.
    #[schemars(range(min = 2, max = MOST))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequence_length: Option<usize>,
    /// The seed of the random selection.
    pub seed: u64,
    /// Which parts of the text become samples: `random` draws places in the whole text with the
    /// seed; `sequential` takes consecutive parts from the beginning; `documents` draws documents
    /// longer than a sample, and a place in each; `packed` tokenises the documents one by one and
    /// packs them end to end.
    #[serde(deserialize_with = "word")]
    pub selection: Selection,
    /// Whether each text, or each document of `documents` and `packed`, gets the special tokens
    /// that the tokenizer adds, such as the one that begins a text.
    pub special_tokens: bool,
}

impl Default for Calibration {
    fn default() -> Self {
        Self {
            source: None,
            field: "text".into(),
            samples: 128,
            held_out: 0,
            sequence_length: None,
            seed: 0,
            selection: Selection::Random,
            special_tokens: true,
        }
    }
}

/// How many weights to prune, and where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Sparsity {
    /// What is removed.
    #[schemars(description = Structure::help_on("What is removed"))]
    pub structure: Structure,
    /// Several structures that are removed together, in place of `structure` and `ratio`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub structures: Vec<StructureRatio>,
    /// Of channels, the number that is left in each layer is a multiple of this: fewer go than `ratio`
    /// says.
    #[schemars(range(min = 1))]
    pub multiple: usize,
    /// The pattern of the zeros.
    #[schemars(description = Pattern::help_on("Where zeros may be"))]
    pub pattern: Pattern,
    /// The fraction of the weights to prune, at least 0 and below 1; with a `structure`, of the
    /// structures of each layer, or of the layers, rounded down. With a pattern N:M it is 1 − N/M, and can be left out.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub ratio: f64,
    /// How the ratio is spread over the decoder layers: `uniform`, the same in all; `owl`, lower in
    /// layers with more outliers (arXiv 2310.05175); `error`, higher in layers whose output changes
    /// less. Over all layers exactly the ratio is pruned. Unstructured patterns only.
    #[serde(deserialize_with = "word")]
    pub allocation: Allocate,
    /// For `owl` and `error`: the largest difference between a layer's ratio and `ratio`.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub spread: f64,
    /// For `owl`: a weight is an outlier if its score exceeds the layer's mean by this factor.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub outlier: f64,
    /// For patterns N:M: whether inner channels are put in the order in which masks lose least, before
    /// anything is pruned. These are the columns of `down_proj` with the rows of `gate_proj` and
    /// `up_proj`, and the columns of `o_proj` with the rows of `v_proj`, within a head. The model computes
    /// the same, and each part's order is kept where it lowers the error of the part's output. Needs
    /// `calibration.source`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub permute: bool,
    /// Tensors to leave unpruned, as globs over their names with or without `.weight`: `lm_head`,
    /// `*.down_proj`, `model.layers.0.*`.
    pub exclude: Vec<String>,
}

/// A structure to remove.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StructureRatio {
    /// What is removed.
    #[schemars(description = Structure::help_on("What is removed"))]
    pub structure: Structure,
    /// The fraction of these structures to remove, above 0 and below 1: of those of each layer, or of
    /// the layers, rounded down.
    #[schemars(extend("exclusiveMinimum" = 0), extend("exclusiveMaximum" = 1))]
    pub ratio: f64,
}

/// How a ratio is spread over the decoder layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Allocate {
    /// The same ratio in all layers.
    #[default]
    Uniform,
    /// Lower ratios in layers with more outliers.
    Owl,
    /// Lower ratios in layers whose measured error is larger.
    Error,
}

impl Default for Sparsity {
    fn default() -> Self {
        Self {
            structure: Structure::default(),
            structures: Vec::new(),
            multiple: 1,
            pattern: Pattern::UNSTRUCTURED,
            ratio: 0.5,
            allocation: Allocate::Uniform,
            spread: 0.08,
            outlier: 5.0,
            permute: false,
            exclude: vec!["lm_head".into()],
        }
    }
}

/// The mask that the refinement starts from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Mask {
    /// The initial mask.
    #[schemars(description = Init::help_on("What the initial mask prunes"))]
    pub init: Init,
    /// For `metric`: the metrics that score the weights, one after the other, as for a rebuild.
    /// Metrics that need gradients can be used with a `sparsity.structure` alone: the gradients are
    /// those of the dense model's loss on the calibration samples.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub metric: Vec<MetricStep>,
    /// For `metric`: the weights that compete, those of a `row` (one output) or all of a `layer`.
    /// Left out: `row`.
    #[serde(deserialize_with = "optional_word", skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
    /// Number of passes of the calibration samples through the layers: 2, as in the paper, makes
    /// all initial masks first and then refines them; 1 makes and refines the masks layer by layer,
    /// so that initial masks see refined layers before them, and takes less time.
    #[schemars(range(min = 1, max = 2))]
    pub passes: usize,
    /// For `none`: whether the kept weights of pruned matrices begin with the values of the sparse
    /// model at `model.path`. If not, they have those of `model.dense`.
    pub retain: bool,
}

impl Default for Mask {
    fn default() -> Self {
        Self { init: Init::default(), metric: Vec::new(), scope: None, passes: 2, retain: false }
    }
}

/// A group of linear layers that are refined together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["name", "layers"]))]
pub struct BlockGroup {
    /// Name of the group in reports.
    pub name: String,
    /// The linear layers of the group, such as `q_proj`, or globs over their names, such as
    /// `*.experts.3.*`.
    pub layers: Vec<String>,
}

/// Settings for some of the tensors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["tensors"]))]
pub struct Override {
    /// Which tensors: a glob over their names with or without `.weight`, such as `*.down_proj` or
    /// `model.layers.0.*`, or a list of globs.
    #[serde(deserialize_with = "one_or_more")]
    #[schemars(extend("type" = ["string", "array"]))]
    pub tensors: Vec<String>,
    /// The fraction of these tensors' weights to prune.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub ratio: Option<f64>,
    /// The pattern of these tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<Pattern>,
    /// The scope in which these tensors' weights compete in rebuilds and swaps. With `group`, those
    /// of a group compete with one another.
    #[serde(deserialize_with = "optional_word", skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
}

/// Which model's hidden states statistics and targets are computed on: the dense model's, or those
/// of the model pruned so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Streams {
    /// Which model's hidden states the statistics of inputs are computed on, for initial masks,
    /// swaps and reconstructions: the `sparse` model's, as is usual, or the `dense` model's.
    #[serde(deserialize_with = "word")]
    pub statistics: Side,
    /// The weight, from 0 to 1, of the dense model's output in a group's target output; the rest is
    /// the dense group's output on the pruned model's hidden states, the paper's target. Values
    /// above 0 correct errors of the layers before, and take one more forward pass and one more set
    /// of hidden states.
    #[schemars(range(min = 0, max = 1))]
    pub blend: f64,
}

/// The device and memory to run the model with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Executor {
    /// `cpu`, or `cuda:0` for the first NVIDIA GPU, which needs a binary with the feature `cuda`.
    pub device: Device,
    /// How a GPU computes matrix products: in `f32`; on tensor cores in `tf32`, with factors of 10 bits; or
    /// on tensor cores as three products of bf16 numbers, `bf16x3`, with factors of 16 bits.
    #[serde(deserialize_with = "word")]
    pub precision: Precision,
    /// The memory that the run may take, such as `6 GiB`; on a GPU, the GPU's memory. Hidden states
    /// of the calibration samples that do not fit go to a scratch file beside the output. Left out:
    /// most of the free memory, within the limits of the control group.
    #[schemars(with = "Option<String>", extend("type" = ["string", "integer"]))]
    #[serde(serialize_with = "exactly", skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// The format of hidden states between two layers: `f32`, or `f16` or `bf16`, which take half
    /// the memory and round.
    #[serde(deserialize_with = "word")]
    pub stream_dtype: Dtype,
}

impl Default for Executor {
    fn default() -> Self {
        let precision = Precision::F32;
        Self { device: Device::Cpu, precision, memory: None, stream_dtype: Dtype::F32 }
    }
}

/// The pruned checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Output {
    /// The directory to write. Pruning needs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The format of pruned matrices.
    #[schemars(description = Format::help_on("How pruned matrices are stored"))]
    pub format: Format,
    /// The number format of weights: `f32`, `f16` or `bf16`. Left out: that of the dense
    /// checkpoint.
    #[serde(deserialize_with = "optional_word", skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// Whether to write the masks beside the weights, as `masks.safetensors`: one bit per weight of
    /// each pruned matrix, set if the weight is kept. Fine-tuning can keep the zeros with them.
    pub masks: bool,
}

/// What to measure on the result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Evaluate {
    /// Texts to measure the perplexity on: paths, or tables with a `path` for data sets.
    pub perplexity: Vec<Text>,
    /// Length of a segment of text, in tokens. Left out: the smaller of 2048 and the model's number
    /// of positions.
    #[schemars(range(min = 2, max = MOST))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequence_length: Option<usize>,
    /// Maximum number of segments of each text. Left out: all.
    #[schemars(range(min = 1, max = MOST))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segments: Option<usize>,
    /// Whether each text gets the special tokens that the tokenizer adds.
    pub special_tokens: bool,
    /// Zero-shot tasks, each with a file of its questions, JSON Lines or Parquet in the data set's
    /// usual layout: `arc_easy = "arc_easy.jsonl"`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "tasks")]
    pub tasks: BTreeMap<String, PathBuf>,
    /// Maximum number of questions of each task. Left out: all.
    #[schemars(range(min = 1, max = MOST))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub questions: Option<usize>,
    /// Prompts that the dense and the pruned model continue, side by side on the page: a number of
    /// segments of the first text, whose beginnings are prompts, or a list of prompts. Each is
    /// continued by the 40 most likely tokens, one after the other. Left out: none.
    #[serde(skip_serializing_if = "Prompts::is_empty")]
    pub generate: Prompts,
}

impl Default for Evaluate {
    fn default() -> Self {
        Self {
            perplexity: Vec::new(),
            sequence_length: None,
            segments: None,
            special_tokens: true,
            tasks: BTreeMap::new(),
            questions: None,
            generate: Prompts::default(),
        }
    }
}

impl Recipe {
    /// The resolved recipe as TOML, which loads as an equal recipe.
    ///
    /// # Errors
    /// If TOML cannot represent a value, such as a path that is not Unicode.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        // Compiles each type's code once, not once for each of TOML's serialisers.
        toml::to_string_pretty::<dyn erased_serde::Serialize>(self)
    }

    /// The recipe with absolute paths, which does not depend on the current directory.
    ///
    /// # Errors
    /// If the current directory is unknown.
    pub fn absolute(mut self) -> std::io::Result<Self> {
        for (key, path) in self.paths_mut() {
            if !path.as_os_str().is_empty() && !is_of_hub(&key, path) {
                *path = std::path::absolute(&path)?;
            }
        }
        Ok(self)
    }

    /// The recipe with file names in place of paths, and without an output, for publication.
    pub fn without_directories(mut self) -> Self {
        self.output.path = None;
        for (key, path) in self.paths_mut() {
            if !is_of_hub(&key, path)
                && let Some(name) = path.file_name()
            {
                *path = name.into();
            }
        }
        self
    }

    /// The dense model's name on the hub; `None` for a directory.
    pub fn hub_name(&self) -> Option<&str> {
        let (path, _) = self.model.reference();
        path.to_str().filter(|_| is_of_hub("model.path", path))
    }

    /// The structures that are removed as a whole, with the keys that name them; empty if single weights
    /// are pruned.
    pub fn structures(&self) -> Vec<(String, StructureRatio)> {
        let Sparsity { structure, ratio, structures, .. } = &self.sparsity;
        let several = structures.iter().enumerate();
        let mut all: Vec<_> =
            several.map(|(i, of)| (format!("sparsity.structures.{i}"), of.clone())).collect();
        if all.is_empty() && structure.is_whole() {
            let (structure, ratio) = (*structure, *ratio);
            all.push(("sparsity".into(), StructureRatio { structure, ratio }));
        }
        all
    }

    /// The allocation of the ratio to layers; `None` if uniform.
    pub fn allocation(&self) -> Option<Allocation> {
        let Sparsity { allocation, spread, outlier, .. } = self.sparsity;
        let by = match allocation {
            Allocate::Uniform => return None,
            Allocate::Owl => By::Outliers(outlier),
            Allocate::Error => By::Error,
        };
        Some(Allocation { by, spread })
    }

    /// The statistics that the initial masks need; unknown metrics count as needing none.
    pub fn initial_needs(&self) -> Needs {
        let plugins = barber_metric::registered().unwrap_or_default();
        let needs = |step: &MetricStep| {
            let built = plugins.get(step.metric.as_str())?.build(step.parameters.clone());
            built.ok().map(|metric| metric.needs())
        };
        let Mask { init, metric, .. } = &self.mask;
        let metrics = metric.iter().filter(|_| init.metrics);
        metrics.filter_map(needs).fold(init.needs, Needs::or)
    }

    /// The files of the texts and tasks that a run reads.
    pub(crate) fn texts(&self) -> impl Iterator<Item = &Path> {
        let calibration = self.calibration.source.iter().filter(|_| self.calibrates());
        let perplexity = self.evaluate.perplexity.iter().map(|text| &text.path);
        let files = calibration.chain(perplexity).chain(self.evaluate.tasks.values());
        files.map(PathBuf::as_path)
    }

    /// The stages that work group by group, and then those that work on the whole model.
    pub fn stages(&self) -> (&[Refine], &[Refine]) {
        let groups = self.refine.iter().take_while(|stage| stage.is_of_groups()).count();
        self.refine.split_at(groups)
    }

    /// Whether the recipe needs the calibration text.
    pub fn calibrates(&self) -> bool {
        let permutes = self.sparsity.permute;
        let initial = self.initial_needs().samples() || self.allocation().is_some() || permutes;
        initial || !self.refine.is_empty()
    }

    /// Every path, with its key.
    pub(super) fn paths_mut(&mut self) -> Vec<(String, &mut PathBuf)> {
        let mut paths = vec![("model.path".to_owned(), &mut self.model.path)];
        paths.extend(self.model.dense.iter_mut().map(|p| ("model.dense".into(), p)));
        paths.extend(self.calibration.source.iter_mut().map(|p| ("calibration.source".into(), p)));
        paths.extend(self.output.path.iter_mut().map(|p| ("output.path".into(), p)));
        let texts = self.evaluate.perplexity.iter_mut().enumerate();
        paths.extend(texts.map(|(i, text)| (format!("evaluate.perplexity.{i}"), &mut text.path)));
        let tasks = self.evaluate.tasks.iter_mut();
        paths.extend(tasks.map(|(name, path)| (format!("evaluate.tasks.{name}"), path)));
        paths
    }
}

/// The keys of models, which may be names on the hub.
pub(super) const MODELS: [&str; 2] = ["model.path", "model.dense"];

/// Whether the path of a key is the name of a model on the hub.
fn is_of_hub(key: &str, path: &Path) -> bool {
    MODELS.contains(&key) && !path.is_dir() && is_name(path)
}

/// A number of bytes in the largest unit that represents it exactly.
fn exactly<S: Serializer>(size: &Option<ByteSize>, serializer: S) -> Result<S::Ok, S::Error> {
    let Some(size) = size else { return serializer.serialize_none() };
    let short = size.to_string();
    let exact = short.parse() == Ok(*size);
    if exact { short } else { format!("{} B", size.as_u64()) }.serialize(serializer)
}

/// A text, or a list of texts.
fn one_or_more<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Texts;

    impl<'de> Visitor<'de> for Texts {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string or a list of strings")
        }

        fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
            Ok(vec![text.to_owned()])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
            Vec::deserialize(SeqAccessDeserializer::new(list))
        }
    }

    deserializer.deserialize_any(Texts)
}

/// The schema of tasks' files, by the tasks' names.
fn tasks(_: &mut SchemaGenerator) -> Schema {
    let file = |name: &str| json!({ "type": "string", "description": format!("The file of the questions of {name}.") });
    let tasks: Map<String, Value> =
        TASKS.iter().map(|task| (task.name.to_owned(), file(task.name))).collect();
    json_schema!({ "type": "object", "properties": tasks, "additionalProperties": false })
}
