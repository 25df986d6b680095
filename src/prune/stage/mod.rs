//! The refinement stages, the `[[refine]]` tables of a recipe. A stage is one file, with its keys,
//! needs, cost and run, and one line in the list below.

mod compensate;
mod distill;
mod end_to_end;
mod own_rows;
mod rebuild;
mod reconstruct;
mod step;
mod swap;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Deref,
    path::Path,
    sync::LazyLock,
};

use figment::value::Value;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

pub use self::{
    compensate::Compensate,
    distill::Distill,
    end_to_end::EndToEnd,
    rebuild::{Alpha, Rebuild, Rounds},
    reconstruct::Reconstruct,
    step::Step,
    swap::Swap,
};
use super::{Cost, Error, Event, Pruning, Sampled, Tally, group::GroupState};
use crate::{
    checkpoint::Pruned,
    choice::sentence,
    dtype::Dtype,
    executor::{
        Loss,
        ops::{Ops, Products},
    },
    family::Decoder,
    mask::{Distribution, Scope},
    model::Model,
    plan::Plan,
};

/// A stage as recipes, `barber check` and the forecast see it.
pub trait Stage {
    /// Errors in the keys' values, beyond their types; `given` lists the keys that the recipe has.
    fn check(&self, given: &[&str]) -> Vec<Wrong>;

    /// The stage and its settings in one line.
    fn describe(&self, refinement: &Described<'_>) -> String;

    /// The scope in which weights compete, if an override may change it.
    fn scope(&self) -> Option<Scope> {
        None
    }

    /// The scopes that the stage supports.
    fn scopes(&self) -> &'static [Scope] {
        &[]
    }

    /// Whether the stage uses the recipe's `metric` pipeline.
    fn uses_metrics(&self) -> bool {
        false
    }

    /// Whether the stage works where whole structures are removed.
    fn takes_structures(&self) -> bool {
        false
    }

    /// Whether the stage changes biases, which a model may have to get.
    fn changes_biases(&self) -> bool {
        false
    }

    /// Whether the stage needs the Gram matrices of inputs.
    fn needs_gram(&self) -> bool {
        false
    }

    /// Maximum number of swaps per row that the stage searches for.
    fn searches(&self) -> usize {
        0
    }

    /// How ranks share the work on masks and values; `None` if each rank finds all of them.
    fn shares(&self) -> Option<Shares> {
        None
    }

    /// How often the weights are gone through, to choose among them or to change them, beside the search
    /// for swaps and the solution of linear equations.
    fn choices(&self) -> usize {
        0
    }

    /// Maximum number of steps over the whole model.
    fn steps(&self) -> usize {
        0
    }

    /// Adds the passes of one group to `tally`.
    fn count(&self, tally: &mut Tally<'_>);

    /// Maximum cost on the whole model.
    fn model_cost(&self, pruning: &Pruning<'_>, decoder: &Decoder, plan: &Plan) -> Cost {
        let _ = (pruning, decoder, plan);
        Cost::default()
    }
}

/// How ranks share a stage's work on masks and values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shares {
    /// Each rank works on a share of each matrix's rows, and sends so many bits for each weight.
    Rows(f64),
    /// Each rank works on some whole matrices of a group, and sends their masks.
    Matrices,
}

/// The run of a stage that works group by group, on any device.
trait Run: Stage {
    /// What the stage does, as part of a sentence.
    const HELP: &'static str;

    /// Refines a group.
    fn run<D: Ops>(
        &self,
        state: &mut GroupState<'_, D>,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Outcome, Error>;
}

/// The run of a stage that works on the whole model once its layers are done, on any device.
trait RunModel: Stage {
    /// What the stage does, as part of a sentence.
    const HELP: &'static str;

    /// Refines the masks of all matrices of the plan, from the beginning or from a saved state of
    /// the stage.
    fn run<D: Ops>(
        &self,
        state: &mut ModelState<'_, D>,
        saved: Option<&mut dyn SavedStage>,
        watch: &mut Watch<'_>,
    ) -> Result<(), Error>;
}

/// An event of a stage that works on the whole model.
pub(super) enum StageEvent<'a> {
    /// A stage that continues did work again that it had done before it was saved.
    Repeated(Products),
    /// A step is done: its report, the masks, and what the stage continues from.
    Step(&'a Step, &'a Pruned, &'a dyn StageState),
}

/// Watches a stage that works on the whole model.
pub(super) type Watch<'a> = dyn FnMut(StageEvent<'_>) -> Result<(), Error> + 'a;

/// What a stage that works on the whole model continues from, between two steps.
pub trait StageState {
    /// Calls `add` with each entry of the state: the masks of `pruned`, and all that the stage has
    /// found. All ranks call it together, as each has a part.
    ///
    /// # Errors
    /// If an entry cannot be read or added.
    fn write(
        &self,
        pruned: &Pruned,
        add: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error>;
}

/// The saved state of a stage.
pub trait SavedStage {
    /// The next entry.
    ///
    /// # Errors
    /// If it cannot be read.
    fn next(&mut self) -> Result<Vec<u8>, Error>;

    /// The error of a state that is not one of this stage.
    fn damaged(&self) -> Error;

    /// Checks that there are no more entries, and that all were read as they were written.
    ///
    /// # Errors
    /// If that is not so.
    fn end(&mut self) -> Result<(), Error>;
}

/// The whole model while its stages run.
pub struct ModelState<'a, D: Ops> {
    /// The dense model.
    pub model: &'a Model<'a, D>,
    /// Which matrices are pruned.
    pub plan: &'a Plan,
    /// The calibration samples.
    pub samples: Sampled<'a>,
    /// The format in which changed weights are stored; `None` for the checkpoint's.
    pub dtype: Option<Dtype>,
    /// The directory for the scratch files of changed weights.
    pub scratch: &'a Path,
    /// What pruning decided so far.
    pub pruned: Pruned,
}

/// Numbers as bytes. Those below 2^53, and all f32, are exact.
fn bytes(numbers: impl IntoIterator<Item = f64>) -> Vec<u8> {
    numbers.into_iter().flat_map(f64::to_le_bytes).collect()
}

/// The numbers of [`bytes`].
fn numbers(bytes: &[u8]) -> Vec<f64> {
    bytes.as_chunks().0.iter().map(|chunk| f64::from_le_bytes(*chunk)).collect()
}

/// The errors of counts that are zero, by their keys.
fn wrong_counts(
    counts: impl IntoIterator<Item = (&'static str, usize)>,
) -> impl Iterator<Item = Wrong> {
    counts.into_iter().filter(|(_, count)| *count == 0).map(|(key, _)| Wrong {
        key,
        why: "must be at least 1, got 0".into(),
        help: "leave it out for the default",
    })
}

/// The error of a step size that is none.
fn wrong_step_size(key: &'static str, size: f64, help: &'static str) -> Option<Wrong> {
    let wrong = !(size.is_finite() && size > 0.0);
    wrong.then(|| Wrong { key, why: format!("must be > 0, got {size}"), help })
}

/// The result of a stage on a group.
pub(super) struct Outcome {
    /// The output error before the stage.
    pub(super) before: Loss,
    /// The output error after the stage, if the stage measured it.
    pub(super) after: Option<Loss>,
    /// Whether the changes were kept.
    pub(super) accepted: bool,
    /// The distribution of scores of swapped and unchanged weights, if the stage uses scores.
    pub(super) scores: Option<Distribution>,
}

impl Outcome {
    /// The outcome of changed weights, which `undo` takes back where they do not lower the error.
    fn of_change<D: Ops>(
        state: &mut GroupState<'_, D>,
        before: Loss,
        undo: impl FnOnce(&mut Pruned),
    ) -> Result<Self, Error> {
        state.loss = None;
        let after = state.error()?;
        let accepted = after.improves(before);
        if !accepted {
            undo(state.pruned);
            state.loss = Some(before);
        }
        let after = Some(if accepted { after } else { before });
        Ok(Self { before, after, accepted, scores: None })
    }
}

/// A wrong value of a stage's key.
#[derive(Clone, Debug, PartialEq)]
pub struct Wrong {
    /// The key.
    pub key: &'static str,
    /// What is wrong.
    pub why: String,
    /// What to do about it.
    pub help: &'static str,
}

/// Settings outside a stage that its description mentions.
pub struct Described<'a> {
    /// The names of the pipeline's metrics.
    pub metrics: &'a str,
    /// The names of the groups.
    pub groups: &'a [&'a str],
    /// The weight β of the outputs on the dense model's hidden states in the target output.
    pub blend: f64,
    /// Whether whole structures are removed.
    pub structures: bool,
}

/// An entry of the list of stages.
pub(crate) struct Kind {
    /// The stage's name in a recipe.
    pub(crate) name: &'static str,
    /// What the stage does, as a part of a sentence.
    help: &'static str,
    /// The schema of the stage's keys.
    schema: fn(&mut SchemaGenerator) -> Schema,
    /// Reads the stage's keys.
    pub(crate) read: fn(&Value) -> figment::error::Result<Refine>,
}

macro_rules! stages {
    (
        groups: { $($group_name:literal: $group:ident,)* }
        model: { $($model_name:literal: $model:ident,)* }
    ) => {
        stages!(@all $($group_name: $group,)* $($model_name: $model,)*);

        impl Refine {
            /// Whether the stage works group by group; if not, it works on the whole model after
            /// all layers.
            pub const fn is_of_groups(&self) -> bool {
                match self {
                    $(Self::$group(_) => true,)*
                    $(Self::$model(_) => false,)*
                }
            }

            /// Refines a group, for a stage that works group by group.
            pub(super) fn run<D: Ops>(
                &self,
                state: &mut GroupState<'_, D>,
                event: &mut dyn FnMut(Event<'_>),
            ) -> Result<Option<Outcome>, Error> {
                match self {
                    $(Self::$group(stage) => stage.run(state, event).map(Some),)*
                    $(Self::$model(_) => Ok(None),)*
                }
            }

            /// Refines the whole model, for a stage that works on all of it.
            pub(super) fn run_model<D: Ops>(
                &self,
                state: &mut ModelState<'_, D>,
                saved: Option<&mut dyn SavedStage>,
                watch: &mut Watch<'_>,
            ) -> Result<(), Error> {
                match self {
                    $(Self::$group(_) => Ok(()),)*
                    $(Self::$model(stage) => stage.run(state, saved, watch),)*
                }
            }
        }
    };
    (@all $($name:literal: $stage:ident,)*) => {
        /// A refinement stage and its keys.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "use")]
        pub enum Refine {
            $(
                #[doc = concat!("The stage `", $name, "`.")]
                #[serde(rename = $name)]
                $stage($stage),
            )*
        }

        /// Every stage.
        pub(crate) static KINDS: &[Kind] = &[$(Kind {
            name: $name,
            help: $stage::HELP,
            schema: $stage::json_schema,
            read: |keys| keys.deserialize().map(Refine::$stage),
        },)*];

        /// The stages' names.
        pub(crate) static NAMES: &[&str] = &[$($name,)*];

        impl Refine {
            /// The stage's name in a recipe.
            pub const fn name(&self) -> &'static str {
                match self {
                    $(Self::$stage(_) => $name,)*
                }
            }
        }

        impl Deref for Refine {
            type Target = dyn Stage;

            fn deref(&self) -> &Self::Target {
                match self {
                    $(Self::$stage(stage) => stage,)*
                }
            }
        }
    };
}

stages! {
    groups: {
        "swap": Swap,
        "rebuild": Rebuild,
        "reconstruct": Reconstruct,
        "compensate": Compensate,
    }
    model: {
        "end-to-end": EndToEnd,
        "distill": Distill,
    }
}

/// The stages that have a key.
pub(crate) fn with_key(key: &str) -> &'static [&'static str] {
    static STAGES: LazyLock<BTreeMap<String, Vec<&str>>> = LazyLock::new(|| {
        let mut stages = BTreeMap::<String, Vec<&str>>::new();
        for kind in KINDS {
            for (key, _) in kind.keys(&mut SchemaGenerator::default()) {
                stages.entry(key).or_default().push(kind.name);
            }
        }
        stages
    });
    STAGES.get(key).map_or(&[], Vec::as_slice)
}

impl Kind {
    /// The stage's keys and their schemas.
    fn keys(&self, generator: &mut SchemaGenerator) -> Map<String, serde_json::Value> {
        match (self.schema)(generator).remove("properties") {
            Some(serde_json::Value::Object(keys)) => keys,
            _ => Map::new(),
        }
    }
}

/// One table with the keys of all stages; the description of a key names its stages.
impl JsonSchema for Refine {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Refine".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let helps: Vec<String> =
            KINDS.iter().map(|kind| format!("`{}`, {}", kind.name, kind.help)).collect();
        let sentences: Vec<String> = KINDS.iter().map(|kind| sentence(kind.help)).collect();
        let mut properties = Map::new();
        properties.insert(
            "use".into(),
            json!({
                "type": "string",
                "enum": NAMES,
                "description": format!("What the stage does: {}.", helps.join("; ")),
                "x-taplo": { "docs": { "enumValues": sentences } },
            }),
        );
        let mut seen = BTreeSet::new();
        for kind in KINDS {
            for (key, mut schema) in kind.keys(generator) {
                if !seen.insert(key.clone()) {
                    continue;
                }
                let of: Vec<String> =
                    with_key(&key).iter().map(|name| format!("`{name}`")).collect();
                let help = schema["description"].as_str().unwrap_or_default();
                let mut letters = help.chars();
                let first = letters.next().into_iter().flat_map(char::to_lowercase);
                let help: String = first.chain(letters).collect();
                schema["description"] = format!("For {}: {help}", of.join(" and ")).into();
                properties.insert(key, schema);
            }
        }
        json_schema!({
            "type": "object",
            "description": "A stage that refines masks or weights.",
            "properties": properties,
            "additionalProperties": false,
            "required": ["use"],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_left_empty_has_its_defaults() {
        for kind in KINDS {
            let empty = (kind.read)(&Value::from(figment::value::Dict::new())).unwrap();
            assert_eq!(empty.name(), kind.name);
            assert_eq!(empty.check(&[]), []);
            let written = Value::serialize(&empty).unwrap();
            assert_eq!(written.deserialize::<Refine>().unwrap(), empty, "{written:?}");
        }
    }

    #[test]
    fn stages_that_share_a_key_share_its_meaning() {
        let generator = &mut SchemaGenerator::default();
        let all: Vec<_> = KINDS.iter().flat_map(|kind| kind.keys(generator)).collect();
        for (key, schema) in &all {
            for (_, other) in all.iter().filter(|(of, _)| of == key) {
                assert_eq!(schema["description"], other["description"], "{key}");
                assert_eq!(schema["default"], other["default"], "{key}");
            }
        }
    }
}
