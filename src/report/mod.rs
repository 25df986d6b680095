//! The report of a run, as data and as a page, and pages that compare several. Data flows one way:
//! a run makes a [`Report`], which is written as JSON, and a page is made of the report alone.
//!
//! A page is one HTML file that loads nothing and runs nothing: tables, and charts in SVG that
//! plotters draws. It is for light and dark, wide and narrow screens, for keyboards and screen
//! readers, and says nothing by colour alone.

mod axis;
mod bounds;
mod card;
mod chart;
mod comparison;
mod figure;
mod file;
mod front_matter;
mod names;
mod output_error;
mod page;
mod palette;
mod run;
mod section;
mod table;

pub(crate) use self::figure::headline;
pub use self::{
    card::card,
    comparison::{Comparison, Difference, Figure, Kind, Run},
    file::{Error, read},
    output_error::OutputError,
    run::{
        GenerationReport, Matrix, Report, Size, Sizes, Stages, StructureReport, TaskReport,
        TextReport,
    },
};
pub use crate::checkpoint::{CARD, HTML, JSON};

/// Why a page cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[error("a chart of the report cannot be drawn: {0}")]
pub struct PageError(String);

impl From<chart::Error> for PageError {
    fn from(error: chart::Error) -> Self {
        Self(error.to_string())
    }
}

/// The HTML page of a run, in one file.
///
/// ```
/// use llm_barber::report::{Report, page};
///
/// let report = Report { model: "models/<tiny>".into(), ..Report::default() };
/// let html = page(&report).unwrap();
/// assert!(html.starts_with("<!DOCTYPE html>") && html.contains("models/&lt;tiny&gt;"));
/// ```
///
/// # Errors
/// If a chart cannot be drawn.
pub fn page(report: &Report) -> Result<String, PageError> {
    Ok(page::page(report)?)
}

/// The HTML page that compares runs, in one file.
///
/// # Errors
/// If a chart cannot be drawn.
pub fn comparison_page(runs: &[Run]) -> Result<String, PageError> {
    Ok(comparison::page(runs)?)
}
