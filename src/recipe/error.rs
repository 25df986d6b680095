//! What is wrong with a recipe: every problem names its key, where its value comes from, and what
//! to do about it.

use std::{fmt, ops::Range, sync::Arc};

use miette::{
    Diagnostic, LabeledSpan, MietteError, MietteSpanContents, SourceCode, SourceSpan, SpanContents,
};

use crate::limits::PROBLEMS;

/// Why a recipe could not be resolved: all that was found to be wrong, not just the first.
#[derive(Debug)]
pub struct RecipeError {
    /// What the user calls the recipe: its file.
    name: String,
    problems: Vec<Problem>,
    /// How many more there are.
    more: usize,
}

impl RecipeError {
    /// `problems` must not be empty.
    pub(super) fn new(name: &str, mut problems: Vec<Problem>) -> Self {
        debug_assert!(!problems.is_empty());
        let more = problems.len().saturating_sub(PROBLEMS);
        problems.truncate(PROBLEMS);
        Self { name: name.into(), problems, more }
    }

    /// The problems, in the order they were found, as far as they are shown.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// The problem, if there is just one.
    fn only(&self) -> Option<&Problem> {
        match self.problems.as_slice() {
            [problem] => Some(problem),
            _ => None,
        }
    }
}

impl fmt::Display for RecipeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.only() {
            Some(problem) => problem.fmt(f),
            None if self.more == 0 => {
                write!(f, "{} has {} problems", self.name, self.problems.len())
            }
            None => {
                let all = self.problems.len() + self.more;
                write!(f, "{} has {all} problems, of which these are the first", self.name)
            }
        }
    }
}

impl std::error::Error for RecipeError {}

impl Diagnostic for RecipeError {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.only()?.help()
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.only()?.source_code()
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        self.only()?.labels()
    }

    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        (self.problems.len() > 1).then(|| {
            Box::new(self.problems.iter().map(|p| p as &dyn Diagnostic))
                as Box<dyn Iterator<Item = &dyn Diagnostic>>
        })
    }
}

/// One thing that is wrong with a recipe.
#[derive(Clone, Debug)]
pub struct Problem {
    /// The segments of the key's path.
    pub(super) path: Vec<String>,
    /// In which way it is wrong.
    pub fault: Fault,
    /// What to do about it.
    pub help: Option<String>,
    /// Where the value comes from: `recipe.toml line 12`, `environment variable BARBER_…`,
    /// `--set …`; `None` if it is nowhere.
    pub origin: Option<String>,
    /// What of that to point at.
    pub(super) excerpt: Option<Excerpt>,
    /// The key that it is in conflict with.
    pub(super) against: Option<Against>,
}

/// A piece of a text that a recipe is made of.
#[derive(Clone, Debug)]
pub(super) struct Excerpt {
    pub(super) name: Arc<str>,
    pub(super) text: Arc<str>,
    pub(super) span: Range<usize>,
}

/// A key that another one is in conflict with.
#[derive(Clone, Debug)]
pub(super) struct Against {
    pub(super) path: Vec<String>,
    /// Where it stands, if that is in the same text.
    pub(super) span: Option<Range<usize>>,
    /// Where it comes from, if that is anywhere else.
    pub(super) origin: Option<String>,
}

impl Problem {
    pub(super) fn new(path: Vec<String>, fault: Fault) -> Self {
        Self { path, fault, help: None, origin: None, excerpt: None, against: None }
    }

    /// A problem with the key `key`, written with dots.
    pub(super) fn at(key: &str, fault: Fault) -> Self {
        Self::new(segments(key), fault)
    }

    pub(super) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The path of the key, such as `metric.0.power`; empty if it is the recipe as a whole.
    pub fn key(&self) -> String {
        self.path.join(".")
    }

    /// Whether it is what another one is.
    pub(super) fn is(&self, other: &Self) -> bool {
        (&self.path, &self.fault, &self.origin) == (&other.path, &other.fault, &other.origin)
    }

    /// What it points at: a piece of a file's text, of a `--set` or of an environment variable.
    pub fn excerpt(&self) -> Option<&str> {
        let Excerpt { text, span, .. } = self.excerpt.as_ref()?;
        text.get(span.clone())
    }

    /// Says which key, written with dots, makes the value wrong.
    pub(super) fn against(mut self, key: &str) -> Self {
        self.against = Some(Against { path: segments(key), span: None, origin: None });
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.key();
        match &self.fault {
            Fault::Read(why) => write!(f, "the file cannot be read: {why}")?,
            Fault::Syntax(why) => write!(f, "not TOML: {why}")?,
            Fault::Assignment(why) => f.write_str(why)?,
            Fault::UnknownKey => match self.path.split_last() {
                Some((last, [])) => write!(f, "unknown key `{last}`")?,
                _ => write!(f, "unknown key `{key}`")?,
            },
            Fault::Missing => write!(f, "`{key}` is missing")?,
            Fault::Type { found, expected } => {
                write!(f, "`{key}` is {found}, expected {expected}")?;
            }
            Fault::Choice { found } => write!(f, "`{key}` cannot be `{found}`")?,
            Fault::Value(why) => write!(f, "`{key}`: {why}")?,
            Fault::UnknownMetric { name } => write!(f, "`{key}`: unknown metric `{name}`")?,
            Fault::DuplicateMetric(duplicate) => duplicate.fmt(f)?,
        }
        if let Some(origin) = self.origin.as_ref().filter(|_| self.excerpt.is_none()) {
            write!(f, " ({origin})")?;
        }
        match &self.against {
            Some(Against { path, origin: Some(origin), .. }) => {
                write!(f, "; `{}` is {}", path.join("."), from(origin))
            }
            _ => Ok(()),
        }
    }
}

/// Where a value is from, after "is".
fn from(origin: &str) -> String {
    if origin == "default" { "the default".into() } else { format!("from {origin}") }
}

impl std::error::Error for Problem {}

impl Diagnostic for Problem {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.excerpt.as_ref().map(|excerpt| excerpt as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let span = self.excerpt.as_ref()?.span.clone();
        let label = match self.fault {
            Fault::UnknownKey => "unknown key",
            Fault::Missing => "missing here",
            _ => "here",
        };
        let label = LabeledSpan::at(span, label);
        let against = self.against.as_ref().and_then(|against| against.span.clone());
        let against = against.map(|span| LabeledSpan::at(span, "with this"));
        Some(Box::new(std::iter::once(label).chain(against)))
    }
}

impl SourceCode for Excerpt {
    fn read_span<'a>(
        &'a self,
        span: &SourceSpan,
        before: usize,
        after: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let found = self.text.read_span(span, before, after)?;
        Ok(Box::new(MietteSpanContents::new_named(
            self.name.to_string(),
            found.data(),
            *found.span(),
            found.line(),
            found.column(),
            found.line_count(),
        )))
    }
}

/// In which way a key is wrong.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// The file could not be read.
    Read(String),
    /// The text is not TOML.
    Syntax(String),
    /// A `--set` or an environment variable does not say which key has which value.
    Assignment(String),
    /// There is no such key.
    UnknownKey,
    /// The key is needed, and not given.
    Missing,
    /// The value has the wrong type.
    Type {
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// The value is none of the allowed ones.
    Choice {
        /// It.
        found: String,
    },
    /// The value cannot be, for the reason given.
    Value(String),
    /// No metric of that name is linked into the program.
    UnknownMetric {
        /// It.
        name: String,
    },
    /// Two metrics linked into the program have one name.
    DuplicateMetric(barber_metric::Duplicate),
}

/// The segments of a key written with dots.
pub(super) fn segments(key: &str) -> Vec<String> {
    key.split('.').map(str::to_owned).collect()
}

/// Names as a sentence lists them: "`a`, `b` or `c`".
pub(super) fn alternatives<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.into_iter().map(|name| format!("`{name}`")).collect();
    match names.split_last() {
        None => String::new(),
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
    }
}
