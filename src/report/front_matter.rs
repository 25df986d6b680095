//! What the card of the dense model says about it: the few keys of its YAML front matter that hold
//! for the pruned one, too.
//!
//! The text is not ours, so it is not given to a YAML parser: a key counts if it stands at the
//! start of a line, with words after it or as a list under it. What is written in any other way is
//! left out, as if it were not known.

use std::{fmt, io::Read, path::Path};

use crate::files;

/// Keys that hold for the pruned model, too.
const KEYS: [&str; 4] = ["license", "license_name", "license_link", "language"];
/// Maximum length of the front matter in bytes.
const LONGEST: u64 = 1 << 16;
/// Maximum number of values of a key.
const MOST: usize = 64;

/// Keys of a model card, with their values.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct FrontMatter(Vec<(&'static str, Vec<String>)>);

impl FrontMatter {
    /// Reads the front matter of a card; empty if there is none.
    pub(super) fn of(card: &Path) -> Self {
        let mut text = Vec::new();
        match files::open(card).map(|file| file.take(LONGEST).read_to_end(&mut text)) {
            Ok(Ok(_)) => Self::parse(&String::from_utf8_lossy(&text)),
            _ => Self::default(),
        }
    }

    fn parse(text: &str) -> Self {
        let mut lines = text.lines();
        if lines.next().is_none_or(|line| line.trim_end() != "---") {
            return Self::default();
        }
        let mut found: Vec<(&'static str, Vec<String>)> = Vec::new();
        let mut open = None;
        for line in lines.map(str::trim_end) {
            if line == "---" {
                found.retain(|(_, values)| !values.is_empty() && values.len() <= MOST);
                return Self(found);
            }
            if let Some(item) = line.trim_start().strip_prefix("- ") {
                if let (Some(key), Some(value)) = (open, word(item)) {
                    let of = found.iter_mut().find(|(known, _)| *known == key);
                    of.into_iter().for_each(|(_, values)| values.push(value.clone()));
                }
                continue;
            }
            let pair = line.split_once(':');
            let key = pair.and_then(|(key, _)| KEYS.into_iter().find(|known| *known == key));
            let new = key.filter(|key| found.iter().all(|(known, _)| known != key));
            open = new;
            if let (Some(key), Some((_, rest))) = (new, pair) {
                let rest = rest.trim();
                let list = rest.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
                let values = match list {
                    Some(list) => list.split(',').filter_map(word).collect(),
                    None => word(rest).into_iter().collect(),
                };
                found.push((key, values));
            }
        }
        // It does not end.
        Self::default()
    }
}

/// A plain scalar that has the same meaning in double quotes.
fn word(text: &str) -> Option<String> {
    let text = text.trim();
    let quoted = |quote| text.strip_prefix(quote).and_then(|text| text.strip_suffix(quote));
    let text = quoted('"').or_else(|| quoted('\'')).unwrap_or(text);
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._+/: ".contains(c);
    // A path leads nowhere from another directory.
    let path = text.contains('/') && !text.starts_with("https://");
    let fits = !text.is_empty() && text.len() <= 256 && text.chars().all(plain);
    (fits && !path).then(|| text.to_owned())
}

impl fmt::Display for FrontMatter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (key, values) in &self.0 {
            match values.as_slice() {
                [value] => writeln!(f, "{key}: \"{value}\"")?,
                values => {
                    writeln!(f, "{key}:")?;
                    values.iter().try_for_each(|value| writeln!(f, "- \"{value}\""))?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(text: &str) -> String {
        FrontMatter::parse(text).to_string()
    }

    #[test]
    fn known_keys_are_taken_over() {
        let text = "---\nlibrary_name: transformers\nlicense: 'apache-2.0'\nlanguage:\n- en\n  - no\n\
                    tags:\n- x\n---\nlicense: mit\n";
        assert_eq!(shown(text), "license: \"apache-2.0\"\nlanguage:\n- \"en\"\n- \"no\"\n");
        assert_eq!(
            shown("---\r\nlanguage: [en, \"fr\"]\r\n---"),
            "language:\n- \"en\"\n- \"fr\"\n"
        );
        let link = "license: other\nlicense_name: llama3\nlicense_link: https://example.com/l";
        assert_eq!(
            shown(&format!("---\n{link}\n---\n")),
            "license: \"other\"\nlicense_name: \"llama3\"\nlicense_link: \"https://example.com/l\"\n"
        );
    }

    #[test]
    fn what_is_not_plain_is_not_known() {
        for text in [
            "",
            "license: mit",
            "---\nlicense: mit\n",
            "# Card\n---\nlicense: mit\n---\n",
            "---\nlicense: &a [*a, *a]\n---\n",
            "---\nlicense: >\n  folded\n---\n",
            "---\nlicense: \"a\\u0000\"\n---\n",
            "---\nlicense_link: /home/somebody/LICENSE\n---\n",
            "---\nmodel:\n  license: mit\n---\n",
        ] {
            assert_eq!(shown(text), "", "{text:?}");
        }
        // The first one counts, whatever it is.
        assert_eq!(shown("---\nlicense: {}\nlicense: mit\n---\n"), "");
    }

    proptest! {
        #[test]
        fn any_text_gives_plain_lines(body in "[ -~\n]{0,200}") {
            let shown = shown(&format!("---\nlicense:{body}\n---\n"));
            for line in shown.lines() {
                prop_assert!(line.ends_with('"') || line.ends_with(':'), "{line}");
                prop_assert!(!line.contains('\\'), "{line}");
            }
        }
    }
}
