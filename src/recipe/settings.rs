//! The values of a recipe, key by key, with their sources.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Loaded, Recipe};

/// A value of a recipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Path of the key, such as `sparsity.ratio` or `refine.0.use`.
    pub key: String,
    /// The value in the common syntax of JSON and TOML.
    pub value: String,
    /// The source of the value; see [`Loaded::origin`].
    pub source: String,
}

impl Loaded {
    /// All values of the recipe, in the order of the sections.
    ///
    /// ```
    /// let loaded = llm_barber::recipe::load("recipes/quickstart.toml".as_ref(), &[]).unwrap();
    /// let settings = loaded.settings().unwrap();
    /// let ratio = settings.iter().find(|setting| setting.key == "sparsity.ratio").unwrap();
    /// assert_eq!((&*ratio.value, &*ratio.source), ("0.5", "recipes/quickstart.toml line 19"));
    /// ```
    ///
    /// # Errors
    /// If a value cannot be written, such as a path that is not Unicode.
    pub fn settings(&self) -> Result<Vec<Setting>, serde_json::Error> {
        self.settings_of(&self.recipe)
    }

    /// All values of the `settled` recipe, in which the model's defaults are filled in.
    pub(crate) fn settings_of(&self, settled: &Recipe) -> Result<Vec<Setting>, serde_json::Error> {
        let mut settings = Vec::new();
        let value = serde_json::to_value(settled as &dyn erased_serde::Serialize)?;
        flatten(&value, &mut Vec::new(), &mut |key, value| {
            let source = self.origin(&key);
            settings.push(Setting { key, value, source });
        });
        Ok(settings)
    }
}

/// Calls `found` with each key and its value.
fn flatten(value: &Value, path: &mut Vec<String>, found: &mut impl FnMut(String, String)) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(items) if items.iter().any(Value::is_object) => {
            items.iter().enumerate().map(|(i, value)| (i.to_string(), value)).collect()
        }
        _ => return found(path.join("."), value.to_string()),
    };
    for (name, value) in children {
        path.push(name);
        flatten(value, path, found);
        path.pop();
    }
}
