//! A step of the metric pipeline as a recipe writes it: a `[[metric]]` table.

use std::{borrow::Cow, fmt};

use figment::value::{Dict, Value};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{MapAccess, Visitor},
    ser::SerializeMap,
};
use serde_json::{Map, json};

/// A step of the metric pipeline.
///
/// A table in TOML: `use` names the metric, every other key is a parameter of that metric.
/// Parameters are checked when the pipeline is built.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MetricStep {
    /// The metric's name, the key `use`.
    pub metric: String,
    /// The metric's parameters; missing ones have the metric's defaults.
    pub parameters: Dict,
}

impl MetricStep {
    /// The metric of this name with its default parameters.
    pub fn new(metric: impl Into<String>) -> Self {
        Self { metric: metric.into(), parameters: Dict::new() }
    }
}

impl Serialize for MetricStep {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1 + self.parameters.len()))?;
        map.serialize_entry("use", &self.metric)?;
        for (name, value) in &self.parameters {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for MetricStep {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Table;

        impl<'de> Visitor<'de> for Table {
            type Value = MetricStep;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<MetricStep, A::Error> {
                let mut step = MetricStep::default();
                while let Some(key) = map.next_key::<String>()? {
                    if key == "use" {
                        step.metric = map.next_value()?;
                    } else {
                        let value: Value = map.next_value()?;
                        step.parameters.insert(key, value);
                    }
                }
                Ok(step)
            }
        }

        deserializer.deserialize_map(Table)
    }
}

impl JsonSchema for MetricStep {
    fn schema_name() -> Cow<'static, str> {
        "MetricStep".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let of_use = json!({
            "type": "string",
            "description": "The metric's name; the table's other keys are its parameters."
        });
        let mut step = json_schema!({
            "type": "object",
            "description": "A step of the metric pipeline.",
            "properties": { "use": of_use },
            "required": ["use"]
        });
        // The pipeline reports metrics with the same name.
        let plugins = barber_metric::registered().unwrap_or_default();
        let known = plugins.values().map(|plugin| {
            let mut schema = plugin.schema(generator);
            let mut keys = Map::new();
            keys.insert("use".into(), json!({ "const": plugin.name, "description": plugin.help }));
            if let Some(serde_json::Value::Object(parameters)) = schema.remove("properties") {
                keys.extend(parameters);
            }
            schema.insert("properties".into(), keys.into());
            schema.insert("description".into(), plugin.help.into());
            schema.to_value()
        });
        let known: Vec<_> = known.collect();
        if !known.is_empty() {
            step.insert("oneOf".into(), known.into());
        }
        step
    }
}
