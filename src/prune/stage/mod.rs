//! The refinement stages: what a `[[refine]]` table of a recipe may say. A stage is one file, with
//! its keys, what it needs, what it costs and how it runs, and one line in the list below.

mod end_to_end;
mod rebuild;
mod reconstruct;
mod swap;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Deref,
    sync::LazyLock,
};

use figment::value::Value;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

pub use self::{
    end_to_end::{EndToEnd, Step},
    rebuild::{Alpha, Rebuild, Rounds},
    reconstruct::Reconstruct,
    swap::Swap,
};
use super::{Cost, Error, Event, Pruning, Sampled, Tally, group::GroupState};
use crate::{
    checkpoint::Pruned,
    choice::sentence,
    executor::{Loss, ops::Ops},
    family::Decoder,
    mask::{Distribution, Scope},
    model::Model,
    plan::Plan,
};

/// What a recipe, `barber check` and the forecast ask of a stage.
pub trait Stage {
    /// What is wrong with the keys, beyond their types; `given` are those that the recipe gives.
    fn check(&self, given: &[&str]) -> Vec<Wrong>;

    /// The stage in a line.
    fn describe(&self, refinement: &Described<'_>) -> String;

    /// The scope in which weights compete, where an override may say otherwise.
    fn scope(&self) -> Option<Scope> {
        None
    }

    /// The scopes that it knows.
    fn scopes(&self) -> &'static [Scope] {
        &[]
    }

    /// Whether the recipe's `metric` pipeline scores its weights.
    fn uses_metrics(&self) -> bool {
        false
    }

    /// Whether it works on the Gram matrices of inputs.
    fn needs_gram(&self) -> bool {
        false
    }

    /// The number of swaps per row that it may search for, at most.
    fn searches(&self) -> usize {
        0
    }

    /// The number of steps that it makes over the whole model, at most.
    fn steps(&self) -> usize {
        0
    }

    /// Counts the matrix products of one group.
    fn count(&self, tally: &mut Tally<'_>);

    /// What it takes on the whole model, at most.
    fn model_cost(&self, pruning: &Pruning<'_>, decoder: &Decoder, plan: &Plan) -> Cost {
        let _ = (pruning, decoder, plan);
        Cost::default()
    }
}

/// The run of a stage that works group by group, on any device.
trait Run: Stage {
    /// What it does, as a part of a sentence.
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
    /// What it does, as a part of a sentence.
    const HELP: &'static str;

    /// Refines the masks of all matrices of the plan.
    fn run<D: Ops>(
        &self,
        state: &mut ModelState<'_, D>,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Error>;
}

/// The whole model while its stages run.
pub struct ModelState<'a, D: Ops> {
    /// The dense model.
    pub model: &'a Model<'a, D>,
    /// Which matrices are pruned.
    pub plan: &'a Plan,
    /// The calibration samples.
    pub samples: Sampled<'a>,
    /// What pruning decided so far.
    pub pruned: Pruned,
}

/// What came of a stage.
pub(super) struct Outcome {
    /// The output error before it.
    pub(super) before: Loss,
    /// The output error after it, if it was measured.
    pub(super) after: Option<Loss>,
    /// Whether its changes stayed.
    pub(super) accepted: bool,
    /// The scores of the weights, by what became of them.
    pub(super) scores: Option<Distribution>,
}

/// What is wrong with a key of a stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Wrong {
    /// The key.
    pub key: &'static str,
    /// What is wrong.
    pub why: String,
    /// What to do about it.
    pub help: &'static str,
}

/// The rest of the refinement, as far as the description of a stage tells it.
pub struct Described<'a> {
    /// The metrics of the pipeline.
    pub metrics: &'a str,
    /// The names of the groups.
    pub groups: &'a [&'a str],
    /// The weight of the dense model's output in the target.
    pub blend: f64,
}

/// A stage's entry in the list.
pub(crate) struct Kind {
    /// What a recipe calls it.
    pub(crate) name: &'static str,
    /// What it does, as a part of a sentence.
    help: &'static str,
    /// The schema of its keys.
    schema: fn(&mut SchemaGenerator) -> Schema,
    /// Reads its keys.
    pub(crate) read: fn(&Value) -> figment::error::Result<Refine>,
}

macro_rules! stages {
    (
        groups: { $($group_name:literal: $group:ident,)* }
        model: { $($model_name:literal: $model:ident,)* }
    ) => {
        stages!(@all $($group_name: $group,)* $($model_name: $model,)*);

        impl Refine {
            /// Whether it works group by group; if not, it works on the whole model once its layers
            /// are done.
            pub const fn is_of_groups(&self) -> bool {
                match self {
                    $(Self::$group(_) => true,)*
                    $(Self::$model(_) => false,)*
                }
            }

            /// Refines a group, if it works group by group.
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

            /// Refines the whole model, if it works on that.
            pub(super) fn run_model<D: Ops>(
                &self,
                state: &mut ModelState<'_, D>,
                event: &mut dyn FnMut(Event<'_>),
            ) -> Result<(), Error> {
                match self {
                    $(Self::$group(_) => Ok(()),)*
                    $(Self::$model(stage) => stage.run(state, event),)*
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

        /// Their names.
        pub(crate) static NAMES: &[&str] = &[$($name,)*];

        impl Refine {
            /// What a recipe calls it.
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
    }
    model: {
        "end-to-end": EndToEnd,
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
    /// Its keys, each with its schema.
    fn keys(&self, generator: &mut SchemaGenerator) -> Map<String, serde_json::Value> {
        match (self.schema)(generator).remove("properties") {
            Some(serde_json::Value::Object(keys)) => keys,
            _ => Map::new(),
        }
    }
}

/// One table with the keys of all stages, each of which says whose it is.
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
                schema["description"] = format!("Of {}: {help}", of.join(" and ")).into();
                properties.insert(key, schema);
            }
        }
        json_schema!({
            "type": "object",
            "description": "A stage that refines masks, or weights, group by group.",
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
