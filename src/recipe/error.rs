//! The errors of a recipe: every problem names its key, the source of its value, and what to do.

use std::{fmt, ops::Range, sync::Arc};

use miette::{
    Diagnostic, LabeledSpan, MietteError, MietteSpanContents, SourceCode, SourceSpan, SpanContents,
};

use crate::limits::PROBLEMS;

/// All problems of a recipe that could not be resolved.
#[derive(Debug)]
pub struct RecipeError {
    /// The recipe's file, as the user named it.
    name: String,
    problems: Vec<Problem>,
    /// Number of further problems, which are not kept.
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

    /// The problems in the order they were found, at most as many as are shown.
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

/// A problem with one key of a recipe.
#[derive(Clone, Debug)]
pub struct Problem {
    /// The segments of the key's path.
    pub(super) path: Vec<String>,
    /// What is wrong.
    pub fault: Fault,
    /// What to do about it.
    pub help: Option<String>,
    /// The source of the value: `recipe.toml line 12`, `environment variable BARBER_…`, `--set …`;
    /// `None` if the key is not set.
    pub origin: Option<String>,
    /// The piece of the source to point at.
    pub(super) excerpt: Option<Excerpt>,
    /// The key that the value conflicts with.
    pub(super) against: Option<Against>,
}

/// A piece of a recipe's file, of a `--set` or of an environment variable.
#[derive(Clone, Debug)]
pub(super) struct Excerpt {
    pub(super) name: Arc<str>,
    pub(super) text: Arc<str>,
    pub(super) span: Range<usize>,
}

/// A key that another key conflicts with.
#[derive(Clone, Debug)]
pub(super) struct Against {
    pub(super) path: Vec<String>,
    /// The place of the key, if it is in the same text.
    pub(super) span: Option<Range<usize>>,
    /// The source of the key, if it is in another text.
    pub(super) origin: Option<String>,
}

impl Problem {
    pub(super) fn new(path: Vec<String>, fault: Fault) -> Self {
        Self { path, fault, help: None, origin: None, excerpt: None, against: None }
    }

    /// A problem with `key`, whose segments are joined by dots.
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

    /// Whether two problems are the same.
    pub(super) fn is(&self, other: &Self) -> bool {
        (&self.path, &self.fault, &self.origin) == (&other.path, &other.fault, &other.origin)
    }

    /// The text that the problem points at, in a file, a `--set` or an environment variable.
    pub fn excerpt(&self) -> Option<&str> {
        let Excerpt { text, span, .. } = self.excerpt.as_ref()?;
        text.get(span.clone())
    }

    /// Adds the key that the value conflicts with; its segments are joined by dots.
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

/// The source of a value, to follow "is".
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

/// What is wrong with a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// The file could not be read.
    Read(String),
    /// The text is not TOML.
    Syntax(String),
    /// A `--set` or an environment variable is not an assignment of a value to a key.
    Assignment(String),
    /// No recipe has this key.
    UnknownKey,
    /// The key is required but not set.
    Missing,
    /// The value has the wrong type.
    Type {
        /// The value's type, or the value.
        found: String,
        /// The expected type.
        expected: String,
    },
    /// The value is not one of the allowed names.
    Choice {
        /// The value.
        found: String,
    },
    /// The value is wrong for the given reason.
    Value(String),
    /// No metric of that name is linked into the program.
    UnknownMetric {
        /// The name.
        name: String,
    },
    /// Two metrics linked into the program have one name.
    DuplicateMetric(barber_metric::Duplicate),
}

/// The segments of a key that are joined by dots.
pub(super) fn segments(key: &str) -> Vec<String> {
    key.split('.').map(str::to_owned).collect()
}

/// Names as a list in a sentence: "`a`, `b` or `c`".
pub(super) fn alternatives<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.into_iter().map(|name| format!("`{name}`")).collect();
    match names.split_last() {
        None => String::new(),
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
    }
}
