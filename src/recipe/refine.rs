//! A stage of the refinement as a recipe writes it: a `[[refine]]` table.

use std::{borrow::Cow, fmt};

use figment::value::{Dict, Value};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Visitor};

use super::{
    Recipe, Scope,
    error::{Fault, Problem},
    sections::{optional_word, word},
};
use crate::prune::{Alpha, Side};

/// A stage that refines masks, or weights, group by group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["use"]))]
pub struct Refine {
    /// What the stage does: `swap`, exact swaps of a kept and a pruned weight where that lowers the
    /// matrix's output error most (arXiv 2512.10922); `rebuild`, swaps by the scores that gradients
    /// of the group's output error give (LLM-Barber, arXiv 2408.10631); `reconstruct`, other values
    /// for the kept weights, which the other stages leave as they are.
    #[serde(rename = "use", deserialize_with = "word_of")]
    #[schemars(with = "Kind")]
    pub stage: Option<Kind>,
    /// Of `swap` and `rebuild`: the weights that compete, all of a `group`, all of a `layer`, those
    /// of a `row` (an output) or those of a `column` (an input). Swaps know `row` and `layer`.
    #[serde(deserialize_with = "optional_word", skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
    /// Of `swap`: how many swaps a row has at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Of `swap` and `reconstruct`: how far the correlations of inputs are shrunk towards zero,
    /// from 0 to 1. With few samples, much of a measured correlation is chance.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1))]
    pub shrinkage: Option<f64>,
    /// Of `rebuild`: the fraction of the worthwhile swaps to make, those that raise the kept
    /// weights' score, from 0 to 1; or `auto`, the fraction that lowers the group's output error
    /// most. The paper has 0.1, and 0.01 for Wanda's mask on models of 7 billion weights. Where a
    /// scope has fewer than 1/alpha worthwhile swaps, none is made: the rows of small models need
    /// 0.1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<Share>,
    /// Of `rebuild`: where gradients are taken, at the `dense` weights, as the paper does, or at the
    /// `sparse` ones.
    #[serde(deserialize_with = "optional_word", skip_serializing_if = "Option::is_none")]
    pub gradient: Option<Side>,
    /// Of `rebuild`: how many rounds to make at most, each with new gradients, or
    /// `until-converged`. It stops as soon as a round does not lower the error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounds: Option<Rounds>,
    /// Of `rebuild`: whether kept weights that the initial mask's rule changed (`sparsegpt`) stay as
    /// it left them. Otherwise every kept weight is the dense one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retain: Option<bool>,
    /// Of `reconstruct`: how values are found, by `least-squares` of each row, or by steps down the
    /// `gradient` of the group's output error (arXiv 2510.14444).
    #[serde(deserialize_with = "optional_word", skip_serializing_if = "Option::is_none")]
    pub method: Option<Values>,
    /// Of `reconstruct` by `gradient`: how often the calibration samples are gone through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passes: Option<usize>,
    /// Of `reconstruct` by `gradient`: the step size, as a fraction of the root mean square of the
    /// matrix's weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub rate: Option<f64>,
    /// Of `reconstruct` by `least-squares`: how strongly the weights are held at their values, as a
    /// fraction of the mean squared input.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub damping: Option<f64>,
}

/// What a stage does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Exact swaps.
    Swap,
    /// LLM-Barber's rebuild.
    Rebuild,
    /// Other values for kept weights.
    Reconstruct,
}

impl Kind {
    /// What a recipe calls it.
    const fn name(self) -> &'static str {
        match self {
            Self::Swap => "swap",
            Self::Rebuild => "rebuild",
            Self::Reconstruct => "reconstruct",
        }
    }
}

/// How a reconstruction finds values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Values {
    /// Least squares of each row.
    LeastSquares,
    /// Steps down the gradient.
    Gradient,
}

/// α: a number, or `auto`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share(pub Alpha);

/// A number of rounds, or `until-converged`: as many as lower the error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounds(pub usize);

const AUTO: &str = "auto";
const CONVERGED: &str = "until-converged";

impl Serialize for Share {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Alpha::Share(share) => serializer.serialize_f64(share),
            Alpha::Auto => serializer.serialize_str(AUTO),
        }
    }
}

impl Serialize for Rounds {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            usize::MAX => serializer.serialize_str(CONVERGED),
            rounds => rounds.serialize(serializer),
        }
    }
}

impl JsonSchema for Share {
    fn schema_name() -> Cow<'static, str> {
        "Share".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "number", "minimum": 0, "maximum": 1 }, { "const": AUTO }] })
    }
}

impl JsonSchema for Rounds {
    fn schema_name() -> Cow<'static, str> {
        "Rounds".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "integer", "minimum": 1 }, { "const": CONVERGED }] })
    }
}

/// A number or one word.
struct NumberOr<'a> {
    word: &'a str,
    expecting: &'a str,
}

impl Visitor<'_> for NumberOr<'_> {
    type Value = Option<f64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, or \"{}\"", self.expecting, self.word)
    }

    fn visit_f64<E>(self, number: f64) -> Result<Self::Value, E> {
        Ok(Some(number))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Self::Value, E> {
        Ok(Some(number as f64))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
        Ok(Some(number as f64))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
        if text == self.word {
            return Ok(None);
        }
        Err(E::invalid_value(serde::de::Unexpected::Str(text), &self))
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let found =
            deserializer.deserialize_any(NumberOr { word: AUTO, expecting: "a share of swaps" })?;
        Ok(Self(found.map_or(Alpha::Auto, Alpha::Share)))
    }
}

impl<'de> Deserialize<'de> for Rounds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expecting = "a whole number of rounds from 1 on";
        let visitor = NumberOr { word: CONVERGED, expecting };
        match deserializer.deserialize_any(visitor)? {
            None => Ok(Self(usize::MAX)),
            Some(rounds) if rounds >= 1.0 && rounds.fract() == 0.0 && rounds < 1e6 => {
                Ok(Self(rounds as usize))
            }
            Some(rounds) => {
                let unexpected = serde::de::Unexpected::Float(rounds);
                Err(serde::de::Error::invalid_value(unexpected, &expecting))
            }
        }
    }
}

fn word_of<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Kind>, D::Error> {
    word(deserializer).map(Some)
}

impl Refine {
    /// The keys that it gives beside `use`, and the stages that know them.
    fn given(&self) -> impl Iterator<Item = (&'static str, &'static [Kind])> {
        let keys: [(bool, &'static str, &'static [Kind]); 11] = [
            (self.scope.is_some(), "scope", &[Kind::Swap, Kind::Rebuild]),
            (self.limit.is_some(), "limit", &[Kind::Swap]),
            (self.shrinkage.is_some(), "shrinkage", &[Kind::Swap, Kind::Reconstruct]),
            (self.alpha.is_some(), "alpha", &[Kind::Rebuild]),
            (self.gradient.is_some(), "gradient", &[Kind::Rebuild]),
            (self.rounds.is_some(), "rounds", &[Kind::Rebuild]),
            (self.retain.is_some(), "retain", &[Kind::Rebuild]),
            (self.method.is_some(), "method", &[Kind::Reconstruct]),
            (self.passes.is_some(), "passes", &[Kind::Reconstruct]),
            (self.rate.is_some(), "rate", &[Kind::Reconstruct]),
            (self.damping.is_some(), "damping", &[Kind::Reconstruct]),
        ];
        keys.into_iter().filter(|(given, ..)| *given).map(|(_, key, of)| (key, of))
    }

    /// Fills in what is left out.
    fn settle(&mut self) {
        match self.stage {
            Some(Kind::Swap) => {
                self.scope.get_or_insert(Scope::Row);
                self.limit.get_or_insert(100);
                self.shrinkage.get_or_insert(0.2);
            }
            Some(Kind::Rebuild) => {
                self.scope.get_or_insert(Scope::Row);
                self.alpha.get_or_insert(Share(Alpha::Share(0.1)));
                self.gradient.get_or_insert(Side::Dense);
                self.rounds.get_or_insert(Rounds(1));
                self.retain.get_or_insert(false);
            }
            Some(Kind::Reconstruct) => match self.method.get_or_insert(Values::LeastSquares) {
                Values::LeastSquares => {
                    self.damping.get_or_insert(0.01);
                    self.shrinkage.get_or_insert(0.2);
                }
                Values::Gradient => {
                    self.passes.get_or_insert(8);
                    self.rate.get_or_insert(0.002);
                }
            },
            None => {}
        }
    }
}

/// What each key is where a stage that knows it leaves it out.
pub(super) fn defaults() -> Dict {
    let of = |stage, method| Refine { stage: Some(stage), method, ..Refine::default() };
    let stages = [
        of(Kind::Swap, None),
        of(Kind::Rebuild, None),
        of(Kind::Reconstruct, Some(Values::Gradient)),
        of(Kind::Reconstruct, None),
    ];
    let mut defaults = Dict::new();
    for mut stage in stages {
        stage.settle();
        if let Ok(Value::Dict(_, keys)) = Value::serialize(&stage) {
            defaults.extend(keys);
        }
    }
    defaults.remove("use");
    defaults
}

/// Fills in what the stages leave out, and says what is wrong with them, beyond their types.
pub(super) fn settle(recipe: &mut Recipe, problems: &mut Vec<Problem>) {
    for (i, refine) in recipe.refine.iter_mut().enumerate() {
        let Some(stage) = refine.stage else {
            let problem = Problem::at(&format!("refine.{i}.use"), Fault::Missing);
            problems.push(problem.help("a stage is `swap`, `rebuild` or `reconstruct`"));
            continue;
        };
        for (key, of) in refine.given() {
            if !of.contains(&stage) {
                let of: Vec<String> = of.iter().map(|kind| format!("`{}`", kind.name())).collect();
                let why = format!("is no key of the stage `{}`", stage.name());
                let path = format!("refine.{i}.{key}");
                let problem = Problem::at(&path, Fault::Value(why));
                let problem = problem.help(format!("it is one of {}", of.join(" and ")));
                problems.push(problem.against(&format!("refine.{i}.use")));
            }
        }
        let mut wrong = |key: &str, why: String, help: &str| {
            let path = format!("refine.{i}.{key}");
            problems.push(Problem::at(&path, Fault::Value(why)).help(help));
        };
        if let Some(Share(Alpha::Share(alpha))) = refine.alpha
            && !(0.0..=1.0).contains(&alpha)
        {
            let help = "it must be from 0, no swap, to 1, every swap that raises the score, or \
                        \"auto\"";
            wrong("alpha", format!("{alpha} is not a share of swaps"), help);
        }
        if let Some(shrinkage) = refine.shrinkage
            && !(0.0..=1.0).contains(&shrinkage)
        {
            let help = "it must be from 0, as the samples say, to 1, no correlation at all";
            wrong("shrinkage", format!("{shrinkage} is no share"), help);
        }
        if let (Kind::Swap, Some(scope @ (Scope::Group | Scope::Column))) = (stage, refine.scope) {
            let help = "swaps are within a `row` or a `layer`";
            wrong("scope", format!("{scope} is no scope of swaps"), help);
        }
        if let Some(damping) = refine.damping
            && !(damping.is_finite() && damping >= 0.0)
        {
            wrong("damping", format!("{damping} holds nothing"), "0.01 is usual; 0 is none");
        }
        let method = refine.method.unwrap_or(Values::LeastSquares);
        let strange = match (stage, method) {
            (Kind::Reconstruct, Values::Gradient) => {
                [("damping", refine.damping.is_some()), ("shrinkage", refine.shrinkage.is_some())]
            }
            (Kind::Reconstruct, Values::LeastSquares) => {
                [("passes", refine.passes.is_some()), ("rate", refine.rate.is_some())]
            }
            _ => [("", false); 2],
        };
        for (key, _) in strange.into_iter().filter(|(_, given)| *given) {
            wrong(key, "is no key of this method".into(), "leave it out, or change `method`");
        }
        if let Some(rate) = refine.rate
            && !(rate.is_finite() && rate > 0.0)
        {
            wrong("rate", format!("{rate} goes nowhere"), "0.002 is usual");
        }
        refine.settle();
    }
}
