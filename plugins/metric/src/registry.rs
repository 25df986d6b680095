//! The metrics that are linked into this program, collected by `inventory`.

use std::{collections::BTreeMap, fmt};

use figment::value::{Dict, Num, Value};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Serialize, de::DeserializeOwned};

use crate::{Metric, Needs};

/// The registration of a metric; submit one with [`inventory::submit!`].
pub struct MetricPlugin {
    /// The metric's name in a recipe's `use`.
    pub name: &'static str,
    /// Description in one line.
    pub help: &'static str,
    build: fn(Dict) -> figment::error::Result<Box<dyn Metric>>,
    needs: fn() -> Needs,
    structures: fn() -> &'static [&'static str],
    parameters: fn() -> Vec<Parameter>,
    schema: fn(&mut SchemaGenerator) -> Schema,
}

/// A parameter of a metric, for listings and documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Key of the parameter in the recipe's `[[metric]]` table.
    pub name: String,
    /// Default value, in TOML.
    pub default: String,
    /// Documentation comment of the parameter.
    pub help: String,
}

impl MetricPlugin {
    /// The plugin of metric `M`, whose fields are its parameters. Derive `Serialize`,
    /// `Deserialize` (with `deny_unknown_fields` and `default`) and `JsonSchema` for it: a field's
    /// documentation comment becomes its help.
    pub const fn of<M>(name: &'static str, help: &'static str) -> Self
    where
        M: Metric + Default + Serialize + DeserializeOwned + JsonSchema + 'static,
    {
        Self {
            name,
            help,
            build: |parameters| {
                Value::from(parameters).deserialize::<M>().map(|m| Box::new(m) as Box<dyn Metric>)
            },
            needs: || M::default().needs(),
            structures: || M::default().structures(),
            parameters: parameters::<M>,
            schema: M::json_schema,
        }
    }

    /// The metric with the given parameters; missing ones have their defaults.
    ///
    /// # Errors
    /// If a parameter is unknown or has the wrong type; the error's path starts at the table.
    pub fn build(&self, parameters: Dict) -> figment::error::Result<Box<dyn Metric>> {
        (self.build)(parameters)
    }

    /// The statistics that the metric needs with its default parameters.
    pub fn needs(&self) -> Needs {
        (self.needs)()
    }

    /// The kinds of structures that the metric scores directly, with its default parameters.
    pub fn structures(&self) -> &'static [&'static str] {
        (self.structures)()
    }

    /// The JSON Schema of the metric's parameters, a table, in the style of the generator.
    pub fn schema(&self, generator: &mut SchemaGenerator) -> Schema {
        (self.schema)(generator)
    }

    /// The metric's parameters.
    pub fn parameters(&self) -> Vec<Parameter> {
        (self.parameters)()
    }
}

fn parameters<M: Default + Serialize + JsonSchema>() -> Vec<Parameter> {
    let schema = schemars::schema_for!(M);
    let help = |name: &str| {
        let text = schema.get("properties")?.get(name)?.get("description")?.as_str()?;
        Some(text.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let defaults = match Value::serialize(M::default()) {
        Ok(Value::Dict(_, dict)) => dict,
        _ => Dict::new(),
    };
    defaults
        .into_iter()
        .map(|(name, value)| Parameter {
            help: help(&name).unwrap_or_default(),
            default: display(&value),
            name,
        })
        .collect()
}

pub(crate) fn display(value: &Value) -> String {
    match value {
        Value::String(_, text) => format!("{text:?}"),
        Value::Char(_, c) => format!("{:?}", c.to_string()),
        Value::Bool(_, b) => b.to_string(),
        Value::Num(_, Num::F32(x)) => format!("{x:?}"),
        Value::Num(_, Num::F64(x)) => format!("{x:?}"),
        Value::Num(_, n) => {
            n.to_i128().map_or_else(|| n.to_u128().unwrap_or(0).to_string(), |i| i.to_string())
        }
        Value::Empty(..) => "none".into(),
        Value::Array(_, items) => {
            format!("[{}]", items.iter().map(display).collect::<Vec<_>>().join(", "))
        }
        Value::Dict(..) => "{…}".into(),
    }
}

inventory::collect!(MetricPlugin);

/// Two plugins have the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Duplicate {
    /// The name.
    pub name: &'static str,
    /// The descriptions of the two plugins.
    pub help: [&'static str; 2],
}

impl fmt::Display for Duplicate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, help: [a, b] } = self;
        write!(f, "two metric plugins are named `{name}`: \"{a}\" and \"{b}\"")
    }
}

impl std::error::Error for Duplicate {}

/// All metrics linked into this program, by name.
///
/// # Errors
/// If two have the same name, so that recipes would be ambiguous.
pub fn registered() -> Result<BTreeMap<&'static str, &'static MetricPlugin>, Duplicate> {
    by_name(inventory::iter::<MetricPlugin>())
}

fn by_name(
    plugins: impl IntoIterator<Item = &'static MetricPlugin>,
) -> Result<BTreeMap<&'static str, &'static MetricPlugin>, Duplicate> {
    let mut found = BTreeMap::new();
    for plugin in plugins {
        if let Some(other) = found.insert(plugin.name, plugin) {
            // The order of `inventory` is arbitrary, but the message must not depend on it.
            let mut help = [other.help, plugin.help];
            help.sort_unstable();
            return Err(Duplicate { name: plugin.name, help });
        }
    }
    Ok(found)
}
