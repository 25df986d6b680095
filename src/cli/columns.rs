//! Output in columns that fit the terminal: tables of words and figures, and texts beside labels.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets::NOTHING};
use textwrap::core::display_width;

use super::clean;

/// The alignment of a column, and its heading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    /// Words, aligned on the left.
    Words(&'static str),
    /// Figures, aligned on the right.
    Figures(&'static str),
}

impl Column {
    pub(super) const fn heading(self) -> &'static str {
        match self {
            Self::Words(heading) | Self::Figures(heading) => heading,
        }
    }
}

/// The width of the terminal, or the value of COLUMNS; `None` in a pipe.
fn terminal() -> Option<usize> {
    // Unit tests must not depend on the terminal.
    if cfg!(test) {
        return None;
    }
    let said = std::env::var("COLUMNS").ok().and_then(|columns| columns.trim().parse().ok());
    let size = || console::Term::stdout().size_checked();
    said.or_else(|| size().map(|(_, columns)| columns.into())).filter(|columns| *columns > 0)
}

/// Maximum width of lines of text.
pub(super) const WIDTH: usize = 80;

/// The width of lines of text.
fn width() -> usize {
    terminal().map_or(WIDTH, |columns| columns.min(WIDTH))
}

/// A table, the first column of which names the rows.
pub(super) fn columns(columns: &[Column], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| clean::line(cell)).collect()).collect();
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().map(|column| column.heading()));
    for (i, (cells, column)) in table.column_iter_mut().zip(columns).enumerate() {
        cells.set_padding((if i == 0 { 0 } else { 2 }, 0));
        cells.set_cell_alignment(match column {
            Column::Words(_) => CellAlignment::Left,
            Column::Figures(_) => CellAlignment::Right,
        });
    }
    table.add_rows(&rows);
    let headings: Vec<&str> = columns.iter().map(|column| column.heading()).collect();
    fitted(table.trim_fmt(), &headings, &rows)
}

/// A table, or its rows one below the other if it is wider than the terminal.
pub(super) fn fitted(table: String, headings: &[impl AsRef<str>], rows: &[Vec<String>]) -> String {
    let widest = table.lines().map(display_width).max().unwrap_or(0);
    match terminal() {
        Some(columns) if columns < widest => stacked(headings, rows),
        _ => table,
    }
}

/// The rows of a table one below the other: the first cell, and below it the other cells that are
/// not empty, each beside its heading.
fn stacked(headings: &[impl AsRef<str>], rows: &[Vec<String>]) -> String {
    let headings: Vec<&str> = headings.iter().map(AsRef::as_ref).collect();
    let widest = headings[1..].iter().map(|heading| display_width(heading)).max().unwrap_or(0);
    let mut lines = Vec::new();
    for row in rows {
        lines.push(wrapped("", "  ", &row[0]));
        for (heading, cell) in headings.iter().zip(row).skip(1).filter(|(_, cell)| !cell.is_empty())
        {
            let fill = " ".repeat(widest - display_width(heading));
            lines.push(wrapped(&format!("  {heading}{fill}  "), &" ".repeat(widest + 4), cell));
        }
    }
    lines.join("\n")
}

/// Column of the text beside a label.
const TEXT: usize = 10;

/// A text beside its label, wrapped between words only, so that paths stay whole.
pub(super) fn labelled(label: &str, text: &str) -> String {
    wrapped(&format!("{label:0$} ", TEXT - 1), &" ".repeat(TEXT), &clean::line(text))
}

/// A text beside its label: wrapped on a terminal, in one line in a pipe, for programs.
pub(super) fn line(label: &str, text: &str) -> String {
    let text = &clean::line(text);
    let first = if label.is_empty() { String::new() } else { format!("{label:0$} ", TEXT - 1) };
    match terminal() {
        Some(columns) => filled(columns, &first, &" ".repeat(TEXT), text),
        None => format!("{first}{text}"),
    }
}

/// A wrapped text; `first` and `rest` are the indents of the first and the other lines.
pub(super) fn wrapped(first: &str, rest: &str, text: &str) -> String {
    filled(width(), first, rest, text)
}

fn filled(width: usize, first: &str, rest: &str, text: &str) -> String {
    let options = textwrap::Options::new(width)
        .break_words(false)
        .word_splitter(textwrap::WordSplitter::NoHyphenation)
        .initial_indent(first)
        .subsequent_indent(rest);
    textwrap::fill(text, options)
}

/// Texts with aligned comments. If a text is too long, its comment gets its own line.
pub(super) fn commented(lines: &[(String, String)]) -> String {
    let widest = |of: fn(&(String, String)) -> &String| {
        lines.iter().map(|line| of(line).chars().count()).max().unwrap_or(0)
    };
    let (text, comment) = (widest(|line| &line.0), widest(|line| &line.1));
    let width = self::width();
    let column = width.saturating_sub(comment).max(4).min(text + 3);
    let lines = lines.iter().map(|(text, comment)| match text.chars().count() {
        length if length < column => format!("{text:column$}{comment}"),
        _ => format!("{text}\n{:column$}{comment}", ""),
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_stand_one_under_the_other() {
        let line = |text: usize, comment: usize| ("t".repeat(text), "c".repeat(comment));
        let found = commented(&[line(5, 30), line(60, 9), line(49, 3)]);
        let expected = [
            format!("{:50}{}", "ttttt", "c".repeat(30)),
            "t".repeat(60),
            format!("{:50}{}", "", "c".repeat(9)),
            format!("{} ccc", "t".repeat(49)),
        ];
        assert_eq!(found.lines().collect::<Vec<_>>(), expected);
        assert_eq!(
            commented(&[line(14, 3), line(3, 4)]).lines().last(),
            Some("ttt              cccc")
        );
    }

    #[test]
    fn long_texts_go_on_under_their_beginning() {
        let path = "directory-".repeat(9);
        let found = labelled("time", &format!("{} {path} end", "0.1 s, ".repeat(10)));
        let lines: Vec<&str> = found.lines().collect();
        assert_eq!(lines.len(), 3, "{found}");
        assert!(lines[0].starts_with("time      0.1 s,") && lines[0].len() <= 80, "{found}");
        assert_eq!(lines[1], format!("          {path}"));
        assert_eq!(lines[2], "          end");
        assert_eq!(labelled("reconstruct", "6 of 6"), "reconstruct 6 of 6");
    }

    #[test]
    fn figures_end_together_and_words_begin_together() {
        let heads = [Column::Words(""), Column::Figures("size"), Column::Words("as")];
        let rows = [["one", "5 B", "dense"], ["others", "12 kB", ""]];
        let rows = rows.map(|row| row.map(str::to_owned).to_vec());
        let expected = "         size  as\none       5 B  dense\nothers  12 kB";
        assert_eq!(columns(&heads, &rows), expected);
        let expected = "one\n  size  5 B\n  as    dense\nothers\n  size  12 kB";
        assert_eq!(stacked(&["", "size", "as"], &rows), expected);
    }
}
