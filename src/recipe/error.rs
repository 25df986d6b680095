//! What is wrong with a recipe: every problem names its key, where its value comes from, and what
//! to do about it.

use std::fmt;

use miette::{Diagnostic, LabeledSpan, NamedSource, SourceCode};

use crate::limits::PROBLEMS;

/// Why a recipe could not be resolved: all that was found to be wrong, not just the first.
#[derive(Debug)]
pub struct RecipeError {
    /// What the user calls the recipe: its file.
    name: String,
    text: Option<NamedSource<String>>,
    problems: Vec<Problem>,
    /// How many more there are.
    more: usize,
}

impl RecipeError {
    /// `problems` must not be empty.
    pub(super) fn new(name: &str, text: Option<&str>, mut problems: Vec<Problem>) -> Self {
        debug_assert!(!problems.is_empty());
        let more = problems.len().saturating_sub(PROBLEMS);
        problems.truncate(PROBLEMS);
        let text = text.map(|text| NamedSource::new(name, text.to_owned()).with_language("TOML"));
        Self { name: name.into(), text, problems, more }
    }

    /// The problems, in the order they were found, as far as they are shown.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl fmt::Display for RecipeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.as_slice() {
            [problem] => problem.fmt(f),
            problems if self.more == 0 => {
                write!(f, "{} has {} problems", self.name, problems.len())
            }
            problems => {
                let all = problems.len() + self.more;
                write!(f, "{} has {all} problems, of which these are the first", self.name)
            }
        }
    }
}

impl std::error::Error for RecipeError {}

impl Diagnostic for RecipeError {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        match self.problems.as_slice() {
            [problem] => problem.help(),
            _ => None,
        }
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.text.as_ref().map(|text| text as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        match self.problems.as_slice() {
            [problem] => problem.labels(),
            _ => None,
        }
    }

    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        (self.problems.len() > 1).then(|| {
            Box::new(self.problems.iter().map(|p| p as &dyn Diagnostic))
                as Box<dyn Iterator<Item = &dyn Diagnostic>>
        })
    }
}

/// One thing that is wrong with a recipe.
#[derive(Clone, Debug, PartialEq)]
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
    /// The bytes of the recipe's text to point at.
    pub(super) span: Option<std::ops::Range<usize>>,
}

impl Problem {
    pub(super) fn new(path: Vec<String>, fault: Fault) -> Self {
        Self { path, fault, help: None, origin: None, span: None }
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

    /// The bytes of the recipe's text that the problem is at, if it is there.
    pub fn span(&self) -> Option<std::ops::Range<usize>> {
        self.span.clone()
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
            Fault::UnknownMetric { name } => write!(f, "`{key}`: no metric is named `{name}`")?,
            Fault::DuplicateMetric(duplicate) => duplicate.fmt(f)?,
        }
        match &self.origin {
            Some(origin) if self.span.is_none() => write!(f, " ({origin})"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for Problem {}

impl Diagnostic for Problem {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let span = self.span.clone()?;
        let label = match self.fault {
            Fault::UnknownKey => "unknown key",
            Fault::Missing => "missing here",
            _ => "here",
        };
        let label = LabeledSpan::at(span, label);
        Some(Box::new(std::iter::once(label)))
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

/// Bytes of a name that is compared with others: no known one is half as long.
const NAME: usize = 64;

/// The name that is most like `name`, if any is alike.
pub(super) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if name.len() > NAME {
        return None;
    }
    known
        .into_iter()
        .map(|candidate| (strsim::normalized_damerau_levenshtein(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness >= 0.5)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
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
