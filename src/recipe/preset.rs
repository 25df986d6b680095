//! Presets: named parts of recipes. A recipe's own values override those of its preset.

use figment::value::Dict;

use super::{
    error::{Fault, Problem, alternatives},
    text::Text,
};
use crate::nearest::nearest;

/// The presets: names and texts.
const PRESETS: [(&str, &str); 4] = [
    ("paper", include_str!("presets/paper.toml")),
    ("best", include_str!("presets/best.toml")),
    ("fast", include_str!("presets/fast.toml")),
    ("reconstructed", include_str!("presets/reconstructed.toml")),
];

/// The names of the presets.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|(name, _)| *name)
}

/// The text of a preset and its values.
pub(super) fn preset(name: &str) -> Result<(Text, Dict), Problem> {
    let found = PRESETS.iter().find(|(known, _)| *known == name);
    let parsed = found.and_then(|(name, text)| Text::parse(&format!("preset `{name}`"), text).ok());
    parsed.ok_or_else(|| {
        let near = nearest(name, names()).map(|near| format!("did you mean `{near}`? "));
        let help = format!("{}there is {}", near.unwrap_or_default(), alternatives(names()));
        Problem::at("preset", Fault::Choice { found: name.into() }).help(help)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_parts_of_recipes() {
        for (name, _) in PRESETS {
            assert!(preset(name).unwrap().1.contains_key("refine"), "{name}");
        }
        assert!(preset("bset").is_err_and(|problem| problem.help.unwrap().contains("`best`")));
    }
}
