//! What a recipe says, section by section. The documentation of each key is its users' help.

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
    prune::{Allocation, By, Side},
};

/// The most that a number of samples, tokens, segments or questions may be.
pub(super) const MOST: usize = 1 << 24;

/// A pruning experiment, whole: who reads it knows what will happen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// A set of defaults: `paper`, LLM-Barber as published; `best`, the most accurate masks;
    /// `fast`, nearly as accurate ones in less time. `barber check` shows its values.
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
    /// The groups of layers that are rebuilt as one. Left out: the model family's own grouping,
    /// self-attention and MLP.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<BlockGroup>,
    /// Other settings for some of the tensors than those of `sparsity` and the stages.
    #[serde(rename = "override", skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
    /// Which model's hidden states statistics and targets are computed on.
    pub streams: Streams,
    /// The stages that refine the masks, in order, group by group. Left out: the initial mask is
    /// the result.
    pub refine: Vec<Refine>,
    /// The pipeline that scores weights for the stage `rebuild`, a metric after the other. Left
    /// out: the one metric `weight-gradient`.
    pub metric: Vec<MetricStep>,
    /// What runs the model.
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
    /// The dense model that a sparse one, at `path`, was made of, in the same forms as `path`: with
    /// `mask.init = "none"` the sparse one's zeros are refined, and the dense one's weights are the
    /// reference, and come back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense: Option<PathBuf>,
    /// The branch, tag or commit of `dense` on the hub. Left out: `main`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense_revision: Option<String>,
}

impl Model {
    /// Path or name of the dense model, and its revision.
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
    /// Plain text; JSON Lines, a JSON list of objects (`.jsonl`, `.ndjson`, `.jsonlines`, `.json`) or
    /// Parquet (`.parquet`), whose records are documents; or a JSON file `{"token_ids": [[…], …]}`.
    /// Text and JSON may be compressed with gzip or Zstandard. Needed by the masks `wanda` and `sparsegpt`, by metrics of
    /// inputs, by every stage of a refinement, and by the allocations `owl` and `error`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<PathBuf>,
    /// The field of a record that holds its text; where no field has that whole name, `a.b` is the
    /// field `b` of the object `a`.
    pub field: String,
    /// How many samples to take from the text.
    #[schemars(range(min = 1, max = MOST))]
    pub samples: usize,
    /// How many samples to hold out: no statistics are computed on them. The effect of each stage
    /// is reported on them too, and swaps, guarded rebuilds and reconstructions that do not lower
    /// the error on them are undone.
    #[schemars(range(max = MOST))]
    pub held_out: usize,
    /// The length of a sample, in tokens. Left out: the smaller of 2048 and the number of positions
    /// that the model has.
    #[schemars(range(min = 2, max = MOST))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequence_length: Option<usize>,
    /// The seed of the random selection.
    pub seed: u64,
    /// Which parts of the text become samples: `random` draws places of the whole text with the
    /// seed; `sequential` takes them from the beginning on, one after the other; `documents` draws
    /// documents longer than a sample, and a place in each; `packed` tokenises the documents one by
    /// one and packs them end to end.
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
    /// Where zeros may be.
    #[schemars(description = Pattern::help_on("Where zeros may be"))]
    pub pattern: Pattern,
    /// The fraction of the weights to prune, at least 0 and below 1. With a pattern N:M it is 1 −
    /// N/M, and can be left out.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub ratio: f64,
    /// How the ratio is spread over the decoder layers: `uniform`, the same in all; `owl`, less in
    /// layers with more outliers (arXiv 2310.05175); `error`, more in layers whose output changes
    /// less. Over all layers exactly the ratio is pruned. Unstructured only.
    #[serde(deserialize_with = "word")]
    pub allocation: Allocate,
    /// How far a layer's ratio may be from `ratio` where the allocation is not uniform.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub spread: f64,
    /// Of `owl`: a weight is an outlier if its score is more than so many times its layer's mean.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub outlier: f64,
    /// Tensors to leave as they are, as globs over their names with or without `.weight`:
    /// `lm_head`, `*.down_proj`, `model.layers.0.*`.
    pub exclude: Vec<String>,
}

/// How a ratio is spread over the decoder layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Allocate {
    /// The same in all.
    #[default]
    Uniform,
    /// By outliers.
    Owl,
    /// By measured errors.
    Error,
}

impl Default for Sparsity {
    fn default() -> Self {
        Self {
            pattern: Pattern::UNSTRUCTURED,
            ratio: 0.5,
            allocation: Allocate::Uniform,
            spread: 0.08,
            outlier: 5.0,
            exclude: vec!["lm_head".into()],
        }
    }
}

/// The mask that the refinement starts from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Mask {
    /// What the initial mask prunes.
    #[schemars(description = Init::help_on("What the initial mask prunes"))]
    pub init: Init,
    /// Of `metric`: the metrics that score the weights, one after the other, as for a rebuild.
    /// Metrics of gradients cannot be used here: there is no error yet.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub metric: Vec<MetricStep>,
    /// Of `metric`: the weights that compete, those of a `row` (an output), which is left out, or all
    /// of a `layer`.
    #[serde(deserialize_with = "optional_word", skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
    /// How often the calibration samples go through the layers: 2, as the paper does, for all
    /// initial masks first and then the refinement of all; 1 for both in one pass, in which a
    /// layer's initial mask comes from the refined layers before it, and which takes less time.
    #[schemars(range(min = 1, max = 2))]
    pub passes: usize,
}

impl Default for Mask {
    fn default() -> Self {
        Self { init: Init::default(), metric: Vec::new(), scope: None, passes: 2 }
    }
}

/// A group of layers that is rebuilt as one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["name", "layers"]))]
pub struct BlockGroup {
    /// What reports call the group.
    pub name: String,
    /// The linear layers it consists of, such as `q_proj`.
    pub layers: Vec<String>,
}

/// Tensors that are pruned otherwise than the rest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["tensors"]))]
pub struct Override {
    /// Which tensors: a glob over their names with or without `.weight`, such as `*.down_proj` or
    /// `model.layers.0.*`, or a list of globs.
    #[serde(deserialize_with = "one_or_more")]
    #[schemars(extend("type" = ["string", "array"]))]
    pub tensors: Vec<String>,
    /// The fraction of their weights to prune.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub ratio: Option<f64>,
    /// Their pattern.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<Pattern>,
    /// Where their weights compete in rebuilds and swaps. Those of a group whose scope is `group`
    /// compete with one another.
    #[serde(deserialize_with = "optional_word", skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
}

/// Which model's hidden states statistics and targets are computed on: the dense model's, or those
/// of the model as pruned so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Streams {
    /// Which model's hidden states the statistics of inputs are computed on, for initial masks,
    /// swaps and reconstruction: the `sparse` model's, as is usual, or the `dense` model's.
    #[serde(deserialize_with = "word")]
    pub statistics: Side,
    /// The weight, from 0 to 1, of the dense model's own output in a group's target output. The
    /// rest is the dense group's output on the pruned model's hidden states, which is the paper's
    /// target. Above 0 it makes up for errors of the layers before, and takes one more forward pass
    /// and one more set of hidden states.
    #[schemars(range(min = 0, max = 1))]
    pub blend: f64,
}

/// What runs the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Executor {
    /// `cpu`, or `cuda:0` for the first NVIDIA GPU; that needs a binary with the feature `cuda`.
    pub device: Device,
    /// How much memory the run may take, such as `6 GiB`: the device's, where that is a GPU. What
    /// does not fit of the calibration samples' hidden states waits in a scratch file beside the
    /// output. Left out: most of what is free, within the limits of the control group.
    #[schemars(with = "Option<String>", extend("type" = ["string", "integer"]))]
    #[serde(serialize_with = "exactly", skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// How hidden states wait between two layers: `f32`, or in half the memory as `f16` or `bf16`,
    /// which rounds them.
    #[serde(deserialize_with = "word")]
    pub stream_dtype: Dtype,
}

impl Default for Executor {
    fn default() -> Self {
        Self { device: Device::Cpu, memory: None, stream_dtype: Dtype::F32 }
    }
}

/// The pruned checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Output {
    /// The directory to write; pruning needs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// How pruned matrices are stored.
    #[schemars(description = Format::help_on("How pruned matrices are stored"))]
    pub format: Format,
    /// How weights are stored: `f32`, `f16` or `bf16`. Left out: as in the dense checkpoint.
    #[serde(deserialize_with = "optional_word", skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
}

/// What to measure on the result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Evaluate {
    /// Texts to measure the perplexity on: paths or, for data sets, tables with a `path`.
    pub perplexity: Vec<Text>,
    /// The length of a segment of text, in tokens. Left out: the smaller of 2048 and the number of
    /// positions that the model has.
    #[schemars(range(min = 2, max = MOST))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequence_length: Option<usize>,
    /// How many segments of each text to measure at most. Left out: all.
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
    /// How many questions of each task to ask at most. Left out: all.
    #[schemars(range(min = 1, max = MOST))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub questions: Option<usize>,
    /// Prompts that the dense and the pruned model continue, side by side on the page: how many
    /// beginnings of segments of the first text, or a list of prompts. Each is continued by 40 tokens,
    /// the most likely ones. Left out: none.
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
    /// If TOML cannot say a value, such as a path that is not Unicode.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        // Each type's code once, not once for each of TOML's serialisers.
        toml::to_string_pretty::<dyn erased_serde::Serialize>(self)
    }

    /// The recipe with absolute paths: it means the same from wherever it is read.
    ///
    /// # Errors
    /// If the current directory cannot be told.
    pub fn absolute(mut self) -> std::io::Result<Self> {
        for (key, path) in self.paths_mut() {
            if !path.as_os_str().is_empty() && !is_of_hub(&key, path) {
                *path = std::path::absolute(&path)?;
            }
        }
        Ok(self)
    }

    /// The recipe with the names of files and directories in place of their paths, and without an
    /// output: for readers elsewhere.
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

    /// The dense model's name on the hub, if it is from there.
    pub fn hub_name(&self) -> Option<&str> {
        let (path, _) = self.model.reference();
        path.to_str().filter(|_| is_of_hub("model.path", path))
    }

    /// How the ratio is spread over the layers, if that is not uniform.
    pub fn allocation(&self) -> Option<Allocation> {
        let Sparsity { allocation, spread, outlier, .. } = self.sparsity;
        let by = match allocation {
            Allocate::Uniform => return None,
            Allocate::Owl => By::Outliers(outlier),
            Allocate::Error => By::Error,
        };
        Some(Allocation { by, spread })
    }

    /// The statistics that the initial masks need, as far as their metrics are known.
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

    /// The texts and the tasks that a run reads.
    pub(crate) fn texts(&self) -> impl Iterator<Item = &Path> {
        let calibration = self.calibration.source.iter().filter(|_| self.calibrates());
        let perplexity = self.evaluate.perplexity.iter().map(|text| &text.path);
        let files = calibration.chain(perplexity).chain(self.evaluate.tasks.values());
        files.map(PathBuf::as_path)
    }

    /// The stages that work group by group, and those that work on the whole model after them.
    pub fn stages(&self) -> (&[Refine], &[Refine]) {
        let groups = self.refine.iter().take_while(|stage| stage.is_of_groups()).count();
        self.refine.split_at(groups)
    }

    /// Whether the recipe gathers statistics on the calibration text.
    pub fn calibrates(&self) -> bool {
        self.allocation().is_some() || self.initial_needs().inputs() || !self.refine.is_empty()
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

/// A number of bytes in the largest unit in which it loses nothing.
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
