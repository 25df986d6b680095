//! Prompts for text generation: `evaluate.generate`.

use std::{borrow::Cow, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{SeqAccess, Visitor},
};

use super::error::{Fault, Problem};

/// Prompts for the model to continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompts {
    /// Number of segments of the first perplexity text whose beginnings are prompts.
    Beginnings(usize),
    /// The prompts themselves.
    Texts(Vec<String>),
}

/// Maximum number of prompts.
const MOST: usize = 100;

impl Default for Prompts {
    fn default() -> Self {
        Self::Beginnings(0)
    }
}

impl Prompts {
    /// Number of prompts.
    pub fn len(&self) -> usize {
        match self {
            Self::Beginnings(count) => *count,
            Self::Texts(texts) => texts.len(),
        }
    }

    /// Whether there are no prompts.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Serialize for Prompts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Beginnings(count) => count.serialize(serializer),
            Self::Texts(texts) => texts.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Prompts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of prompts, or a list of texts")
            }

            fn visit_u64<E: serde::de::Error>(self, count: u64) -> Result<Prompts, E> {
                Ok(Prompts::Beginnings(usize::try_from(count).unwrap_or(usize::MAX)))
            }

            fn visit_i64<E: serde::de::Error>(self, count: i64) -> Result<Prompts, E> {
                let wrong = serde::de::Unexpected::Signed(count);
                let count = u64::try_from(count).map_err(|_| E::invalid_value(wrong, &self))?;
                self.visit_u64(count)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut texts: A) -> Result<Prompts, A::Error> {
                let mut found = Vec::new();
                while let Some(text) = texts.next_element()? {
                    found.push(text);
                }
                Ok(if found.is_empty() { Prompts::default() } else { Prompts::Texts(found) })
            }
        }

        deserializer.deserialize_any(Either)
    }
}

impl JsonSchema for Prompts {
    fn schema_name() -> Cow<'static, str> {
        "Prompts".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "integer", "minimum": 0, "maximum": MOST },
                { "type": "array", "items": { "type": "string", "minLength": 1 }, "maxItems": MOST },
            ]
        })
    }
}

/// Checks the prompts, beyond their type.
pub(super) fn check(prompts: &Prompts, problems: &mut Vec<Problem>) {
    let mut wrong = |why: String, help: &str| {
        problems.push(Problem::at("evaluate.generate", Fault::Value(why)).help(help));
    };
    if prompts.len() > MOST {
        wrong(
            format!("has {} prompts", prompts.len()),
            "at most 100 are allowed; about three are enough",
        );
    }
    if let Prompts::Texts(texts) = prompts
        && texts.iter().any(|text| text.trim().is_empty())
    {
        wrong("has an empty prompt".into(), "give each prompt a few words");
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{
        super::{Recipe, RecipeError, load_text},
        *,
    };

    fn load(lines: &str) -> Result<Recipe, RecipeError> {
        let fine = "model.path = 'm'\ncalibration.source = 'c'\noutput.path = 'o'\n";
        Ok(load_text(Path::new("r.toml"), &format!("{fine}{lines}"), [], &[])?.recipe)
    }

    #[test]
    fn prompts_are_a_number_or_texts() {
        let read = |lines: &str| load(lines).unwrap().evaluate.generate;
        assert_eq!(read(""), Prompts::Beginnings(0));
        let beginnings = read("evaluate.perplexity = ['t']\nevaluate.generate = 2");
        assert_eq!(beginnings, Prompts::Beginnings(2));
        let texts = read("evaluate.generate = ['Once upon', 'The']");
        assert_eq!(texts, Prompts::Texts(vec!["Once upon".into(), "The".into()]));
    }

    #[test]
    fn other_prompts_are_wrong() {
        for (lines, expected) in [
            ("evaluate.generate = ['a', ' ']", "an empty prompt"),
            ("evaluate.perplexity = ['t']\nevaluate.generate = 101", "101 prompts"),
            ("evaluate.generate = -1", "a number of prompts, or a list of texts"),
            ("evaluate.generate = 'a'", "a number of prompts, or a list of texts"),
            ("evaluate.generate = [1]", "string"),
        ] {
            let error = load(lines).unwrap_err();
            let [problem] = error.problems() else { panic!("{lines}: {error:?}") };
            assert!(problem.key().starts_with("evaluate.generate"), "{lines}: {problem:?}");
            assert!(format!("{problem:?}").contains(expected), "{lines}: {problem:?}");
        }
    }
}
