//! Escapes control characters in texts for the terminal. Names of tensors and files,
//! configurations, recipes and reports come from outside and may have such characters, so all
//! output passes through here.

use std::{borrow::Cow, error::Error, fmt, fmt::Write};

use miette::{
    Diagnostic, LabeledSpan, MietteHandler, NamedSource, ReportHandler, SourceCode, SourceSpan,
};

/// Whether a character controls the terminal or the direction of text.
fn acts(c: char) -> bool {
    let moves = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}');
    let isolates = matches!(c, '\u{2066}'..='\u{2069}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}');
    (c.is_control() && !matches!(c, '\n' | '\t')) || moves || isolates
}

/// The text with control characters escaped as in JSON, so that JSON stays valid.
pub(super) fn clean(text: &str) -> Cow<'_, str> {
    if !text.contains(acts) {
        return text.into();
    }
    let mut cleaned = String::new();
    for c in text.chars() {
        if acts(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a string cannot fail.
                let _ = write!(cleaned, "\\u{unit:04x}");
            }
        } else {
            cleaned.push(c);
        }
    }
    cleaned.into()
}

/// [`clean`], in one line.
pub(super) fn line(text: &str) -> String {
    clean(text).replace('\n', "\\n").replace('\t', "\\t")
}

/// The text with each byte of control characters replaced by a question mark, so that offsets stay
/// the same.
fn in_place(text: &str) -> String {
    let mut cleaned = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let ends_line = c == '\r' && chars.peek() == Some(&'\n');
        if acts(c) && !ends_line {
            cleaned.extend(std::iter::repeat_n('?', c.len_utf8()));
        } else {
            cleaned.push(c);
        }
    }
    cleaned
}

/// Shows errors, cleaned before they are coloured.
pub(super) struct Handler(pub(super) MietteHandler);

impl ReportHandler for Handler {
    fn debug(&self, error: &dyn Diagnostic, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.debug(&Cleaned::of(error), f)
    }
}

/// An error with its texts cleaned.
#[derive(Debug)]
struct Cleaned {
    message: String,
    help: Option<String>,
    source: Option<NamedSource<String>>,
    labels: Vec<LabeledSpan>,
    related: Vec<Cleaned>,
    cause: Option<Box<Cleaned>>,
}

impl Cleaned {
    fn of(error: &dyn Diagnostic) -> Self {
        let labels: Vec<LabeledSpan> = error.labels().into_iter().flatten().collect();
        let source = error.source_code().zip(labels.first());
        let label = |label: &LabeledSpan| {
            LabeledSpan::new_with_span(label.label().map(line), *label.inner())
        };
        Self {
            help: error.help().map(|help| clean(&help.to_string()).into()),
            source: source.and_then(|(source, label)| whole(source, label.inner())),
            labels: labels.iter().map(label).collect(),
            related: error.related().into_iter().flatten().map(Self::of).collect(),
            ..Self::plain(&error.to_string(), error.source())
        }
    }

    /// A message without a source, and the message of its cause.
    fn plain(message: &str, cause: Option<&(dyn Error + 'static)>) -> Self {
        let cause = cause.map(|cause| Box::new(Self::plain(&cause.to_string(), cause.source())));
        let message = clean(message).into();
        let (labels, related) = (Vec::new(), Vec::new());
        Self { message, help: None, source: None, labels, related, cause }
    }
}

/// All of a source's text, cleaned in place.
fn whole(source: &dyn SourceCode, span: &SourceSpan) -> Option<NamedSource<String>> {
    let found = source.read_span(span, usize::MAX, usize::MAX).ok()?;
    let text = in_place(std::str::from_utf8(found.data()).ok()?);
    Some(NamedSource::new(line(found.name().unwrap_or_default()), text))
}

impl fmt::Display for Cleaned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Cleaned {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_ref().map(|cause| &**cause as &(dyn Error + 'static))
    }
}

impl Diagnostic for Cleaned {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.source.as_ref().map(|source| source as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        Some(Box::new(self.labels.iter().cloned()))
    }

    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        Some(Box::new(self.related.iter().map(|error| error as &dyn Diagnostic)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_escaped() {
        assert_eq!(
            clean("\u{1b}[2J\u{9b}m\r\u{202e}x\u{7f}"),
            "\\u001b[2J\\u009bm\\u000d\\u202ex\\u007f"
        );
        assert_eq!(line("a\tb\nc"), "a\\tb\\nc");
        let plain = "“Grüße”, 日本, α = 0.1\n\t× 1.75 → 20 %";
        assert!(matches!(clean(plain), Cow::Borrowed(_)));
        assert_eq!(in_place("a\u{202e}b\r\nc\rd"), "a???b\r\nc?d");
    }

    proptest! {
        #[test]
        fn nothing_that_acts_is_left(text in any::<String>()) {
            let cleaned = clean(&text).into_owned();
            prop_assert!(!cleaned.contains(acts));
            prop_assert_eq!(clean(&cleaned), cleaned.as_str());
            prop_assert!(!line(&text).contains(char::is_control));
            prop_assert_eq!(in_place(&text).len(), text.len());
        }

        /// JSON that is printed is the JSON that was meant.
        #[test]
        fn json_stays_what_it_is(text in any::<String>(), tag in "[\u{202e}\u{e0041}\u{1b}\u{9b}]*") {
            let value = serde_json::json!({ "text": text, "tag": tag });
            let printed = clean(&value.to_string()).into_owned();
            prop_assert!(!printed.contains(acts));
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&printed).unwrap(), value);
        }
    }
}
