//! Charts as inline SVG, drawn by plotters in the colours of the palette.

use std::io;

use maud::{Markup, PreEscaped, html};
use plotters::{
    chart::{ChartBuilder, ChartContext},
    coord::{CoordTranslate, Shift, cartesian::Cartesian2d},
    drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea},
    element::{Circle, Cross, EmptyElement, PathElement, Polygon, Rectangle, TriangleMarker},
    prelude::SVGBackend,
    series::LineSeries,
    style::{Color, IntoFont, TextStyle},
};

use super::{
    axis::Axis,
    palette::{GRID, HEAT, INK, LOOKS, Look, Marker},
};

/// Why a chart cannot be drawn.
pub(super) type Error = DrawingAreaErrorKind<io::Error>;

/// The drawing surface of charts.
type Backend<'a> = SVGBackend<'a>;
type Context<'a, 'b> = ChartContext<'a, Backend<'b>, Cartesian2d<Axis, Axis>>;

/// Font size. A chart is shown at about half its size in two columns, and at a third on a phone.
const LETTERS: f64 = 39.68;

/// Half the width of a marker.
const MARK: i32 = 10;

/// The look of the series with an index.
pub(super) fn look(series: usize) -> Look {
    LOOKS[series % LOOKS.len()]
}

/// A series of a chart.
#[derive(Clone, Debug)]
pub(super) struct Line {
    /// Name of the series.
    pub(super) name: String,
    /// Points of the series. Points that are not finite, or not positive on a logarithmic axis, are
    /// left out.
    pub(super) points: Vec<(f64, f64)>,
}

/// A vertical axis without its range.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scale {
    /// From 0 to 100 percent.
    Percent,
    /// From zero to the largest value, in percent.
    FromZero,
    /// Logarithmic, around the values.
    Logarithmic,
}

impl Scale {
    fn drawable(self, value: f64) -> bool {
        value.is_finite() && (value > 0.0 || !matches!(self, Self::Logarithmic))
    }

    /// The axis for the values; `None` if there is nothing to draw.
    fn axis(self, values: impl Iterator<Item = f64>) -> Option<Axis> {
        let ends = values.filter(|value| self.drawable(*value)).fold(None, |ends, value| {
            let (low, high): (f64, f64) = ends.unwrap_or((value, value));
            Some((low.min(value), high.max(value)))
        });
        let (low, high) = ends?;
        let percent =
            |fraction: f64| format!("{:.4}", 100.0 * fraction).parse::<f64>().unwrap_or(0.0);
        let percent = |fraction| format!("{}%", percent(fraction));
        Some(match self {
            Self::Percent => Axis::linear(0.0, 1.0, percent),
            Self::FromZero => Axis::linear(0.0, high * 1.05, percent),
            Self::Logarithmic => Axis::logarithmic(low / 1.15, high * 1.15),
        })
    }
}

/// A line chart.
#[derive(Clone, Debug)]
pub(super) struct Lines {
    /// Description for screen readers.
    pub(super) title: String,
    /// Name of the horizontal axis.
    pub(super) across: String,
    pub(super) x: Axis,
    pub(super) scale: Scale,
    /// Series; each has the look of its index.
    pub(super) lines: Vec<Line>,
    /// Points to mark with a ring.
    pub(super) rings: Vec<(f64, f64)>,
    /// Width and height.
    pub(super) size: (u32, u32),
}

/// Size of a chart in two columns.
pub(super) const LARGE: (u32, u32) = (1000, 620);

/// Size of a chart in one column.
pub(super) const WIDE: (u32, u32) = (2000, 560);

/// Size of a small chart.
pub(super) const SMALL: (u32, u32) = (640, 400);

impl Lines {
    /// Draws the chart without a legend; a sentence if there is nothing to draw.
    pub(super) fn draw(&self) -> Result<Markup, Error> {
        let values = self.lines.iter().flat_map(|line| &line.points).map(|(_, y)| *y);
        let Some(y) = self.scale.axis(values) else {
            return Ok(html! { p.empty { "There is nothing to draw." } });
        };
        svg(&self.title, self.size, |root| {
            let mut chart = frame(root, &self.across, self.x.clone(), y)?;
            for (i, line) in self.lines.iter().enumerate() {
                let look = look(i);
                let runs = line.points.split(|(_, y)| !self.scale.drawable(*y));
                // One marker per point if they fit; otherwise every `step`-th point.
                let step = line.points.len().div_ceil(self.size.0 as usize / 120).max(1);
                for run in runs {
                    let style = look.colour.stroke_width(4);
                    chart.draw_series(LineSeries::new(run.iter().copied(), style))?;
                    for point in run.iter().step_by(step) {
                        mark(chart.plotting_area(), look, *point)?;
                    }
                }
            }
            let drawable = self.rings.iter().filter(|(_, y)| self.scale.drawable(*y));
            for point in drawable {
                chart.plotting_area().draw(&(EmptyElement::at(*point) + ring((0, 0))))?;
            }
            Ok(())
        })
    }
}

/// A chart with one row per name and one value in each.
pub(super) fn dots(
    title: &str,
    across: &str,
    names: &[String],
    values: &[Option<f64>],
) -> Result<Markup, Error> {
    let known = values.iter().flatten().copied();
    let Some(x) = Scale::Logarithmic.axis(known) else {
        return Ok(html! { p.empty { "There is nothing to draw." } });
    };
    svg(title, (WIDE.0, rows(names.len())), |root| {
        let chart = frame(root, across, x, Axis::names(names))?;
        for (row, value) in values.iter().rev().enumerate() {
            if let Some(value) = value.filter(|value| Scale::Logarithmic.drawable(*value)) {
                mark(chart.plotting_area(), look(0), (value, row as f64))?;
            }
        }
        Ok(())
    })
}

/// Height of a row.
const ROW: u32 = 66;

/// Height of a chart with `count` rows.
const fn rows(count: usize) -> u32 {
    ROW * count as u32 + 120
}

/// A heatmap with one row per name and one column per index up to `end`. Each cell is a row, a
/// column and a value from 0 to 1, drawn in a colour of the palette's [`HEAT`], from the first to
/// the last; cells of value 0 are blank.
pub(super) fn heatmap(
    title: &str,
    across: &str,
    names: &[String],
    end: usize,
    values: impl Iterator<Item = (usize, usize, f64)>,
) -> Result<Markup, Error> {
    let last = names.len().saturating_sub(1);
    svg(title, (WIDE.0, rows(names.len())), |root| {
        let chart = frame(root, across, Axis::numbers(end), Axis::names(names))?;
        let area = chart.plotting_area();
        let half =
            |pixels: u32, cells: usize| (f64::from(pixels) / cells as f64 / 2.0 - 1.0) as i32;
        let (width, height) = area.dim_in_pixel();
        let (x, y) = (half(width, end + 1).max(1), half(height, names.len()).max(1));
        for (row, column, value) in values.filter(|(_, _, value)| *value > 0.0) {
            let level = (value * HEAT.len() as f64).ceil() as usize;
            let colour = HEAT[level.clamp(1, HEAT.len()) - 1].colour;
            let at = (column as f64, last.saturating_sub(row) as f64);
            let cell = Rectangle::new([(-x, -y), (x, y)], colour.filled());
            area.draw(&(EmptyElement::at(at) + cell))?;
        }
        Ok(())
    })
}

/// The legend of a heatmap whose last colour stands for `most`.
pub(super) fn heat_legend(most: f64, show: impl Fn(f64) -> String) -> Result<Markup, Error> {
    /// Size of a key.
    const KEY: (u32, u32) = (60, 44);
    let mut keys = Vec::new();
    for (i, look) in HEAT.iter().enumerate() {
        let corners = [(0, 0), (KEY.0 as i32, KEY.1 as i32)];
        let key = drawn(KEY, |root| root.draw(&Rectangle::new(corners, look.colour.filled())))?;
        keys.push((key, show(most * (i + 1) as f64 / HEAT.len() as f64)));
    }
    Ok(html! {
        ul.legend.scale {
            @for (key, end) in keys {
                li { svg viewBox="0 0 60 44" width="30" height="22" aria-hidden="true" { (key) } "to " (end) }
            }
        }
    })
}

/// The legend of a chart: the names of the series with their lines and markers, and the meaning of
/// a ring, if there are any.
pub(super) fn legend(names: &[impl AsRef<str>], rings: Option<&str>) -> Result<Markup, Error> {
    /// Size of a key.
    const KEY: (u32, u32) = (90, 44);
    let middle = (KEY.0 as i32 / 2, KEY.1 as i32 / 2);
    let mut keys = Vec::new();
    for (i, name) in names.iter().enumerate() {
        let look = look(i);
        let key = drawn(KEY, |root| {
            let ends = vec![(0, middle.1), (KEY.0 as i32, middle.1)];
            root.draw(&PathElement::new(ends, look.colour.stroke_width(4)))?;
            mark(root, look, middle)
        })?;
        keys.push((key, name.as_ref()));
    }
    if let Some(name) = rings {
        keys.push((drawn(KEY, |root| root.draw(&ring(middle)))?, name));
    }
    Ok(html! {
        ul.legend {
            @for (key, name) in keys {
                li { svg viewBox="0 0 90 44" width="45" height="22" aria-hidden="true" { (key) } (name) }
            }
        }
    })
}

/// A ring around a marker.
fn ring(at: (i32, i32)) -> Circle<(i32, i32), i32> {
    Circle::new(at, MARK + 8, INK.colour.stroke_width(4))
}

/// Draws axes and a grid.
fn frame<'a, 'b>(
    root: &'a DrawingArea<Backend<'b>, Shift>,
    across: &str,
    x: Axis,
    y: Axis,
) -> Result<Context<'a, 'b>, Error> {
    let labels = (x.labels(), y.labels());
    let width = y.label_width() as f64 * LETTERS * 0.47 + 24.0;
    let mut chart = ChartBuilder::on(root)
        .margin_top(16)
        .margin_right(48)
        .x_label_area_size(2.0 * LETTERS + 16.0)
        .y_label_area_size(width)
        .build_cartesian_2d(x, y)?;
    let mut mesh = chart.configure_mesh();
    mesh.bold_line_style(GRID.colour.stroke_width(2))
        .light_line_style(plotters::style::TRANSPARENT)
        .axis_style(INK.colour.stroke_width(2))
        .label_style(letters())
        .axis_desc_style(letters())
        .x_labels(labels.0)
        .y_labels(labels.1)
        .x_desc(across);
    mesh.draw()?;
    Ok(chart)
}

fn letters() -> TextStyle<'static> {
    ("sans-serif", LETTERS).into_font().color(&INK.colour)
}

/// Draws a marker at a point.
fn mark<C: CoordTranslate>(
    area: &DrawingArea<Backend<'_>, C>,
    look: Look,
    at: C::From,
) -> Result<(), Error> {
    let (style, size) = (look.colour.filled(), MARK);
    let place = EmptyElement::at(at);
    match look.marker {
        Marker::Circle => area.draw(&(place + Circle::new((0, 0), size, style))),
        Marker::Triangle => area.draw(&(place + TriangleMarker::new((0, 0), size + 4, style))),
        Marker::Square => {
            area.draw(&(place + Rectangle::new([(-size, -size), (size, size)], style)))
        }
        Marker::Diamond => {
            let size = size + 3;
            let corners = vec![(0, -size), (size, 0), (0, size), (-size, 0)];
            area.draw(&(place + Polygon::new(corners, style)))
        }
        Marker::Cross => {
            area.draw(&(place + Cross::new((0, 0), size, look.colour.stroke_width(4))))
        }
    }
}

/// Draws an SVG element for a page.
fn svg(
    title: &str,
    size: (u32, u32),
    draw: impl FnOnce(&DrawingArea<Backend<'_>, Shift>) -> Result<(), Error>,
) -> Result<Markup, Error> {
    let picture = drawn(size, draw)?;
    let view = format!("0 0 {} {}", size.0, size.1);
    Ok(html! {
        svg.chart viewBox=(view) role="img" aria-label=(title) { title { (title) } (picture) }
    })
}

/// Draws the contents of an SVG element.
fn drawn(
    size: (u32, u32),
    draw: impl FnOnce(&DrawingArea<Backend<'_>, Shift>) -> Result<(), Error>,
) -> Result<Markup, Error> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        draw(&root)?;
        root.present()?;
    }
    // The page has its own element around the contents, with a title.
    let inner = text.split_once('>').map_or("", |(_, inner)| inner);
    let inner = inner.rsplit_once("</svg>").map_or(inner, |(inner, _)| inner);
    // Attributes that every element has by default, or has from the style sheet.
    let usual =
        [" opacity=\"1\"", " font-family=\"sans-serif\"", " stroke=\"none\" stroke-width=\"1\""];
    let inner = usual.iter().fold(inner.to_owned(), |text, usual| text.replace(usual, ""));
    Ok(PreEscaped(inner.replace(">\n", ">").replace("\n</", "</")))
}
