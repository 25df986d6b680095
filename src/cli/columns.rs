//! What stands in columns: tables of words and figures, and text beside its label.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets::NOTHING};

/// How a column stands under its heading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    /// Words, which begin together.
    Words(&'static str),
    /// Figures, which end together.
    Figures(&'static str),
}

/// An empty table with these columns.
pub(super) fn columns(columns: &[Column]) -> Table {
    let mut table = Table::new();
    let heading = |column: &Column| match *column {
        Column::Words(heading) | Column::Figures(heading) => heading,
    };
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().map(heading));
    for (i, (cells, column)) in table.column_iter_mut().zip(columns).enumerate() {
        cells.set_padding((if i == 0 { 0 } else { 2 }, 0));
        cells.set_cell_alignment(match column {
            Column::Words(_) => CellAlignment::Left,
            Column::Figures(_) => CellAlignment::Right,
        });
    }
    table
}

/// The columns of the terminal that lines are made for.
const WIDTH: usize = 80;
/// Where the text beside a label begins.
const TEXT: usize = 10;

/// A text beside its label, in as many lines as it needs. No word is broken: a path stays whole.
pub(super) fn labelled(label: &str, text: &str) -> String {
    wrapped(&format!("{label:TEXT$}"), &" ".repeat(TEXT), text)
}

/// A text in as many lines as it needs, with what the first and the others begin with.
pub(super) fn wrapped(first: &str, rest: &str, text: &str) -> String {
    let options = textwrap::Options::new(WIDTH)
        .break_words(false)
        .word_splitter(textwrap::WordSplitter::NoHyphenation)
        .initial_indent(first)
        .subsequent_indent(rest);
    textwrap::fill(text, options)
}

/// Texts with a comment each, the comments one under the other. Where a text is too long for its
/// comment to stand there, the comment gets a line of its own.
pub(super) fn commented(lines: &[(String, String)]) -> String {
    let width = |of: fn(&(String, String)) -> &String| {
        lines.iter().map(|line| of(line).chars().count()).max().unwrap_or(0)
    };
    let (text, comment) = (width(|line| &line.0), width(|line| &line.1));
    let column = WIDTH.saturating_sub(comment).max(WIDTH / 2).min(text + 3);
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
        assert!(lines[0].starts_with("time      0.1 s,") && lines[0].len() <= WIDTH, "{found}");
        assert_eq!(lines[1], format!("          {path}"));
        assert_eq!(lines[2], "          end");
    }

    #[test]
    fn figures_end_together_and_words_begin_together() {
        let mut table = columns(&[Column::Words(""), Column::Figures("size"), Column::Words("as")]);
        table.add_row(["one", "5 B", "dense"]).add_row(["others", "12 kB", ""]);
        let expected = "         size  as\none       5 B  dense\nothers  12 kB";
        assert_eq!(table.trim_fmt(), expected);
    }
}
