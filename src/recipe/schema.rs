//! The JSON Schema of recipes, from the documentation of the types and the linked metrics. Editors
//! use it, and the help of keys comes from it.

use schemars::{
    Schema,
    generate::SchemaSettings,
    transform::{RecursiveTransform, Transform},
};
use serde_json::{Map, Value, json};

use super::Recipe;

/// The key of a recipe's file that names the recipe to extend.
pub(super) const EXTENDS: &str = "extends";
/// The table of a recipe's file that lists the values of swept keys.
pub(super) const SWEEP: &str = "sweep";
const EXTENDS_HELP: &str = "The path of a recipe that this one extends, relative to this one: keys \
    that this one leaves out come from there. Tables are merged key by key, arrays replaced as a \
    whole. A preset is below both, and paths are relative to the recipe that they stand in.";
const SWEEP_HELP: &str = "Lists of values for keys of the recipe, such as `sparsity.ratio = [0.5, 0.6]`: \
    the recipe is run for every combination of them, each into a directory of its own in \
    `output.path`.";

/// The JSON Schema of a recipe, with the parameters of all linked metrics: draft 7 without
/// references, which TOML editors support best.
///
/// ```
/// let schema = llm_barber::recipe::schema();
/// let ratio = &schema["properties"]["sparsity"]["properties"]["ratio"];
/// assert_eq!(ratio["default"], 0.5);
/// assert!(ratio["description"].as_str().unwrap().ends_with("Default: `0.5`."));
/// ```
pub fn schema() -> Value {
    let mut schema = plain();
    RecursiveTransform(explain).transform(&mut schema);
    let mut lists = swept(schema.as_value());
    if let (Some(Value::Object(keys)), Some(Value::Object(lists))) =
        (schema.pointer_mut("/properties"), lists.get_mut("properties"))
    {
        lists.remove(EXTENDS);
        lists.remove(SWEEP);
        keys[SWEEP]["properties"] = lists.clone().into();
        keys[SWEEP]["additionalProperties"] = false.into();
    }
    let mut all = Map::new();
    all.insert("$schema".into(), schema.remove("$schema").unwrap_or_default());
    all.insert("title".into(), "Barber recipe".into());
    all.extend(schema.as_object_mut().map(std::mem::take).into_iter().flatten());
    all.into()
}

/// The schema of a table in `[sweep]`, which has lists of values for its keys.
fn swept(schema: &Value) -> Value {
    let help = &schema["description"];
    let of_table = |table: &Value| {
        let keys = table["properties"].as_object().into_iter().flatten();
        let keys: Map<String, Value> = keys.map(|(name, key)| (name.clone(), swept(key))).collect();
        keys
    };
    let list = json!({ "type": "array", "minItems": 1, "items": schema });
    match (schema.get("properties"), schema["items"].get("properties")) {
        (Some(_), _) => json!({
            "type": "object",
            "description": help,
            "properties": of_table(schema),
            "additionalProperties": false
        }),
        // A sweep of an array of tables is over whole arrays, or over a key of one table.
        (None, Some(_)) if schema["items"]["type"] == "object" => {
            let open = schema["items"].get("oneOf").is_some();
            let table = json!({
                "type": "object",
                "properties": of_table(&schema["items"]),
                "additionalProperties": open
            });
            json!({
                "description": help,
                "anyOf": [
                    list,
                    {
                        "type": "object",
                        "patternProperties": { "^[0-9]+$": table },
                        "additionalProperties": false
                    }
                ]
            })
        }
        _ => json!({ "type": "array", "minItems": 1, "items": schema, "description": help }),
    }
}

/// The schema as derived from the types.
pub(super) fn plain() -> Schema {
    let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<Recipe>();
    RecursiveTransform(simplify).transform(&mut schema);
    if let Some(Value::Object(keys)) = schema.pointer_mut("/properties") {
        keys.insert(EXTENDS.into(), json!({ "type": "string", "description": EXTENDS_HELP }));
        keys.insert(SWEEP.into(), json!({ "type": "object", "description": SWEEP_HELP }));
    }
    schema
}

/// Removes `null`, which TOML lacks, and empty schemas; turns choices of words into plain lists.
fn simplify(schema: &mut Schema) {
    let Some(schema) = schema.as_object_mut() else { return };
    schema.remove("format");
    let null = |schema: &Value| schema["type"] == "null";
    if let Some(Value::Array(types)) = schema.get_mut("type") {
        types.retain(|name| name != "null");
        if let [only] = types.as_slice() {
            schema["type"] = only.clone();
        }
    }
    if let Some(Value::Array(any)) = schema.get_mut("anyOf")
        && any.iter().any(null)
    {
        any.retain(|alternative| !null(alternative));
        if let [Value::Object(only)] = any.as_slice() {
            let only = only.clone();
            schema.remove("anyOf");
            for (key, value) in only {
                schema.entry(key).or_insert(value);
            }
        }
    }
    let says_nothing = |value: &Value| value.is_null() || value.is_object() || value == "";
    if schema.get("default").is_some_and(says_nothing) {
        schema.remove("default");
    }
    // A word with its documentation is a schema of its own.
    let word = |schema: &Value| Some((schema.get("const")?.clone(), schema["description"].clone()));
    let words = schema.get("oneOf").and_then(Value::as_array);
    let words = words.and_then(|all| all.iter().map(word).collect::<Option<Vec<_>>>());
    if let Some(words) = words {
        let (words, help): (Vec<_>, Vec<_>) = words.into_iter().unzip();
        schema.remove("oneOf");
        schema.insert("type".into(), "string".into());
        schema.insert("enum".into(), words.into());
        schema.insert("x-taplo".into(), json!({ "docs": { "enumValues": help } }));
    }
}

/// Formats descriptions for editors: paragraphs without line breaks, with the default at the end.
fn explain(schema: &mut Schema) {
    let Some(schema) = schema.as_object_mut() else { return };
    let Some(help) = schema.get("description").and_then(Value::as_str) else { return };
    let mut help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some(default) = schema.get("default") {
        help += &format!("\n\nDefault: `{default}`.");
    }
    schema.insert("description".into(), help.into());
}
